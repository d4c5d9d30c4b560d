"""Conformance suites that built-ins pass and plug-in authors subclass (with pytest).

class TestMine(StrategySuite):
    strategy = Mine(k=0.25)
"""

from sparsiattn.testing.backbone import BackboneSuite
from sparsiattn.testing.kernel import KernelSuite
from sparsiattn.testing.laws import PatchSuite
from sparsiattn.testing.plugin import temporary_plugin
from sparsiattn.testing.strategy import StrategySuite
from sparsiattn.testing.tokens import TokenStrategySuite

__all__ = [
    "BackboneSuite",
    "KernelSuite",
    "PatchSuite",
    "StrategySuite",
    "TokenStrategySuite",
    "temporary_plugin",
]
