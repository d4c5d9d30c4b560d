"""The conformance suites for this package's strategy and kernel."""

from __future__ import annotations

import torch
from sparsiattn.testing import KernelSuite, StrategySuite

from nearest_keys.kernel import NearestKeysSoftmax
from nearest_keys.strategy import NearestKeys


class TestNearestKeys(StrategySuite):
    strategy = NearestKeys(k=0.25)


class TestNearestKeysTiles(StrategySuite):
    strategy = NearestKeys(k=0.25, tile=(2, 2), background=2)


class TestNearestKeysSoftmax(KernelSuite):
    kernel = NearestKeysSoftmax()
    dtypes = (torch.float32,)
