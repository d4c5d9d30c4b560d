"""Sparse attention for any Vision Transformer: patch at run time, undo in one call.

This import is light (PEP 562): a public name is imported, and torch with it, where it is first
used. ``_NAMES`` says where each one lives; the imports below it say the same to type checkers.
"""

from __future__ import annotations

import warnings
from importlib import import_module, util
from typing import TYPE_CHECKING

from sparsiattn._version import __version__ as __version__

_NAMES = {
    "sparsiattn.analysis.benchmark.sites": "measure_sites",
    "sparsiattn.analysis.benchmark.tuning": "Tuning tune",
    "sparsiattn.analysis.benchmark.whole_model": "BenchResult bench",
    "sparsiattn.analysis.inspection": "Inspection inspect",
    "sparsiattn.analysis.profiling.profiler": "profile",
    "sparsiattn.analysis.profiling.result": "Profile",
    "sparsiattn.analysis.schedule_search": "SearchResult search",
    "sparsiattn.analysis.visualization": "AttentionView show",
    "sparsiattn.attention.budget": "check_budget count_of",
    "sparsiattn.attention.geometry": "Grid",
    "sparsiattn.attention.inputs": "AttentionInputs",
    "sparsiattn.attention.layout": "Layout",
    "sparsiattn.attention.pattern": "Mask Pattern",
    "sparsiattn.attention.site": "Site",
    "sparsiattn.errors": """AlreadyPatched CheckpointNotWritten DataError ExportFailed
        InvalidOption InvalidType KernelRefused MismatchedCheckpoint MismatchedPatch
        ModelChanged NothingToPatch PluginError ProbeFailed SparsiattnError TrainingDiverged
        UnknownName""",
    "sparsiattn.kernels.base": "Kernel",
    "sparsiattn.kernels.cost": "CallShape Work",
    "sparsiattn.kernels.gathered_mask": "GatheredMask attend_gathered",
    "sparsiattn.methods.block_masks": "block_mask",
    "sparsiattn.patching.apply": "patch",
    "sparsiattn.patching.discovery.backbone": "Backbone Pooling count_class_tokens",
    "sparsiattn.patching.discovery.meta_model": "MetaInputs",
    "sparsiattn.patching.discovery.probe": "AttentionCall",
    "sparsiattn.patching.handle": "Patch patch_of unpatch",
    "sparsiattn.patching.load": "from_pretrained load",
    "sparsiattn.patching.report": "Report",
    "sparsiattn.patching.sparsifiner": "load_sparsifiner",
    "sparsiattn.registry.hookspecs": "PLUGIN_API hookimpl",
    "sparsiattn.registry.listing": "list_backbones list_kernels list_plugins list_strategies",
    "sparsiattn.runtime.attribute_override": "AttributeOverride",
    "sparsiattn.serialization.creating": "create_model",
    "sparsiattn.serialization.exporters": "ExportResult export",
    "sparsiattn.strategies.base": "LearnedPlanner Planner Strategy",
    "sparsiattn.strategies.random": "hash_integers",
    "sparsiattn.strategies.reduction": "Reduction",
    "sparsiattn.strategies.token_base": "LearnedTokenPlanner TokenInputs TokenStrategy",
    "sparsiattn.testing.diagnosis": "Diagnosis doctor",
    "sparsiattn.training": "Recipe TrainResult calibrate train",
    "sparsiattn.training.evaluation": "Evaluation evaluate",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
# Names of earlier versions, with a warning until the next minor version.
_RENAMED = {
    "Bench": "BenchResult",
    "Exported": "ExportResult",
    "LearnedTokens": "LearnedTokenPlanner",
    "Shown": "AttentionView",
    "backbones": "list_backbones",
    "plugins": "list_plugins",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from sparsiattn.analysis.benchmark.sites import measure_sites as measure_sites
    from sparsiattn.analysis.benchmark.tuning import Tuning as Tuning
    from sparsiattn.analysis.benchmark.tuning import tune as tune
    from sparsiattn.analysis.benchmark.whole_model import BenchResult as BenchResult
    from sparsiattn.analysis.benchmark.whole_model import bench as bench
    from sparsiattn.analysis.inspection import Inspection as Inspection
    from sparsiattn.analysis.inspection import inspect as inspect
    from sparsiattn.analysis.profiling.profiler import profile as profile
    from sparsiattn.analysis.profiling.result import Profile as Profile
    from sparsiattn.analysis.schedule_search import SearchResult as SearchResult
    from sparsiattn.analysis.schedule_search import search as search
    from sparsiattn.analysis.visualization import AttentionView as AttentionView
    from sparsiattn.analysis.visualization import show as show
    from sparsiattn.attention.budget import check_budget as check_budget
    from sparsiattn.attention.budget import count_of as count_of
    from sparsiattn.attention.geometry import Grid as Grid
    from sparsiattn.attention.inputs import AttentionInputs as AttentionInputs
    from sparsiattn.attention.layout import Layout as Layout
    from sparsiattn.attention.pattern import Mask as Mask
    from sparsiattn.attention.pattern import Pattern as Pattern
    from sparsiattn.attention.site import Site as Site
    from sparsiattn.errors import AlreadyPatched as AlreadyPatched
    from sparsiattn.errors import CheckpointNotWritten as CheckpointNotWritten
    from sparsiattn.errors import DataError as DataError
    from sparsiattn.errors import ExportFailed as ExportFailed
    from sparsiattn.errors import InvalidOption as InvalidOption
    from sparsiattn.errors import InvalidType as InvalidType
    from sparsiattn.errors import KernelRefused as KernelRefused
    from sparsiattn.errors import MismatchedCheckpoint as MismatchedCheckpoint
    from sparsiattn.errors import MismatchedPatch as MismatchedPatch
    from sparsiattn.errors import ModelChanged as ModelChanged
    from sparsiattn.errors import NothingToPatch as NothingToPatch
    from sparsiattn.errors import PluginError as PluginError
    from sparsiattn.errors import ProbeFailed as ProbeFailed
    from sparsiattn.errors import SparsiattnError as SparsiattnError
    from sparsiattn.errors import TrainingDiverged as TrainingDiverged
    from sparsiattn.errors import UnknownName as UnknownName
    from sparsiattn.kernels.base import Kernel as Kernel
    from sparsiattn.kernels.cost import CallShape as CallShape
    from sparsiattn.kernels.cost import Work as Work
    from sparsiattn.kernels.gathered_mask import GatheredMask as GatheredMask
    from sparsiattn.kernels.gathered_mask import attend_gathered as attend_gathered
    from sparsiattn.methods.block_masks import block_mask as block_mask
    from sparsiattn.patching.apply import patch as patch
    from sparsiattn.patching.discovery.backbone import Backbone as Backbone
    from sparsiattn.patching.discovery.backbone import Pooling as Pooling
    from sparsiattn.patching.discovery.backbone import count_class_tokens as count_class_tokens
    from sparsiattn.patching.discovery.meta_model import MetaInputs as MetaInputs
    from sparsiattn.patching.discovery.probe import AttentionCall as AttentionCall
    from sparsiattn.patching.handle import Patch as Patch
    from sparsiattn.patching.handle import patch_of as patch_of
    from sparsiattn.patching.handle import unpatch as unpatch
    from sparsiattn.patching.load import from_pretrained as from_pretrained
    from sparsiattn.patching.load import load as load
    from sparsiattn.patching.report import Report as Report
    from sparsiattn.patching.sparsifiner import load_sparsifiner as load_sparsifiner
    from sparsiattn.registry.hookspecs import PLUGIN_API as PLUGIN_API
    from sparsiattn.registry.hookspecs import hookimpl as hookimpl
    from sparsiattn.registry.listing import list_backbones as list_backbones
    from sparsiattn.registry.listing import list_kernels as list_kernels
    from sparsiattn.registry.listing import list_plugins as list_plugins
    from sparsiattn.registry.listing import list_strategies as list_strategies
    from sparsiattn.runtime.attribute_override import AttributeOverride as AttributeOverride
    from sparsiattn.serialization.creating import create_model as create_model
    from sparsiattn.serialization.exporters import ExportResult as ExportResult
    from sparsiattn.serialization.exporters import export as export
    from sparsiattn.strategies.base import LearnedPlanner as LearnedPlanner
    from sparsiattn.strategies.base import Planner as Planner
    from sparsiattn.strategies.base import Strategy as Strategy
    from sparsiattn.strategies.random import hash_integers as hash_integers
    from sparsiattn.strategies.reduction import Reduction as Reduction
    from sparsiattn.strategies.token_base import LearnedTokenPlanner as LearnedTokenPlanner
    from sparsiattn.strategies.token_base import TokenInputs as TokenInputs
    from sparsiattn.strategies.token_base import TokenStrategy as TokenStrategy
    from sparsiattn.testing.diagnosis import Diagnosis as Diagnosis
    from sparsiattn.testing.diagnosis import doctor as doctor
    from sparsiattn.training import Recipe as Recipe
    from sparsiattn.training import TrainResult as TrainResult
    from sparsiattn.training import calibrate as calibrate
    from sparsiattn.training import train as train
    from sparsiattn.training.evaluation import Evaluation as Evaluation
    from sparsiattn.training.evaluation import evaluate as evaluate
else:  # unseen by type checkers, for which it would make every name exist

    def __getattr__(name):
        """A public name, imported now and kept, or a sub-package."""
        if name in _HOMES:
            value = globals()[name] = getattr(import_module(_HOMES[name]), name)
            return value
        if name in _RENAMED:
            warnings.warn(
                f"sparsiattn.{name} is deprecated: use sparsiattn.{_RENAMED[name]}",
                DeprecationWarning,
                stacklevel=2,
            )
            return __getattr__(_RENAMED[name])
        if util.find_spec(f"{__name__}.{name}"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
