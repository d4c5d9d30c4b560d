"""Conformance suites that built-ins pass and plug-in authors subclass (with pytest); `doctor`.

class TestMine(StrategySuite):
    strategy = Mine(k=0.25)

The command line and tests import from here.
"""

from importlib.util import find_spec

if find_spec("pytest"):  # suites need it, and `doctor` must run without
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
