"""Conformance suites that built-ins pass and plug-in authors subclass (with pytest).

class TestMine(StrategySuite):
    strategy = Mine(k=0.25)
"""

from sparsiattn.testing.backbone import BackboneSuite
from sparsiattn.testing.kernel import KernelSuite
from sparsiattn.testing.plugin import temporary_plugin
from sparsiattn.testing.strategy import StrategySuite

__all__ = ["BackboneSuite", "KernelSuite", "StrategySuite", "temporary_plugin"]
