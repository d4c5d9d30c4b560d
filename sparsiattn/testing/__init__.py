"""Conformance suites for plug-in authors (with pytest), small test models, and `doctor`.

It may import every package except `sparsiattn.methods` and the command line, which may import it.
Subclass a suite to test a plug-in:

class TestMine(StrategySuite):
    strategy = Mine(k=0.25)
"""

from importlib.util import find_spec

from sparsiattn.testing.diagnosis import Diagnosis, doctor
from sparsiattn.testing.hosts import (
    random_inputs,
    tiny_images,
    tiny_vit,
    windowed_images,
    windowed_vit,
)

if find_spec("pytest"):  # suites need pytest, but `doctor` must run without it
    from sparsiattn.testing.backbone import BackboneSuite
    from sparsiattn.testing.kernel import KernelSuite
    from sparsiattn.testing.laws import PatchSuite
    from sparsiattn.testing.plugin import temporary_plugin
    from sparsiattn.testing.strategy import StrategySuite
    from sparsiattn.testing.tokens import TokenStrategySuite

__all__ = [
    "BackboneSuite",
    "Diagnosis",
    "KernelSuite",
    "PatchSuite",
    "StrategySuite",
    "TokenStrategySuite",
    "doctor",
    "random_inputs",
    "temporary_plugin",
    "tiny_images",
    "tiny_vit",
    "windowed_images",
    "windowed_vit",
]
