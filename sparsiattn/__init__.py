"""Sparse attention for any Vision Transformer: patch at run time, undo in one call."""

from __future__ import annotations

from importlib import metadata as _metadata

# First, because importing a subpackage binds its name here, and below `kernels` and `strategies`
# become the functions that list what is registered.
import sparsiattn.kernels
import sparsiattn.strategies  # noqa: F401
from sparsiattn.analysis.benchmark.sites import measure_sites
from sparsiattn.analysis.benchmark.tuning import Tuning, tune
from sparsiattn.analysis.benchmark.whole_model import BenchResult, bench
from sparsiattn.analysis.inspection import Inspection, inspect
from sparsiattn.analysis.profiling.profiler import profile
from sparsiattn.analysis.profiling.result import Profile
from sparsiattn.analysis.schedule_search import SearchResult, search
from sparsiattn.analysis.visualization import AttentionView, show
from sparsiattn.attention.block_masks import block_mask
from sparsiattn.attention.budget import check_budget, count_of
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.pattern import Pattern
from sparsiattn.attention.site import Site
from sparsiattn.errors import (
    AlreadyPatched,
    CheckpointNotWritten,
    DataError,
    ExportFailed,
    InvalidOption,
    InvalidType,
    KernelRefused,
    MismatchedCheckpoint,
    MismatchedPatch,
    ModelChanged,
    NothingToPatch,
    PluginError,
    ProbeFailed,
    SparsiattnError,
    TrainingDiverged,
    UnknownName,
)
from sparsiattn.kernels.base import Kernel
from sparsiattn.patching.apply import patch
from sparsiattn.patching.discovery.backbone import Backbone
from sparsiattn.patching.report import Report
from sparsiattn.patching.sparsifiner import load_sparsifiner
from sparsiattn.registry.hookspecs import hookimpl
from sparsiattn.registry.listing import backbones, kernels, plugins, strategies
from sparsiattn.registry.plugin_api import PLUGIN_API
from sparsiattn.runtime.handle import Patch, patch_of, unpatch
from sparsiattn.serialization.creating import create_model
from sparsiattn.serialization.exporters import ExportResult, export
from sparsiattn.serialization.hub import from_pretrained
from sparsiattn.serialization.saving import load
from sparsiattn.strategies.base import LearnedPlanner, Planner, Strategy
from sparsiattn.strategies.random import hash_integers
from sparsiattn.strategies.token_base import (
    LearnedTokenPlanner,
    Reduction,
    TokenInputs,
    TokenStrategy,
)
from sparsiattn.testing.diagnosis import Diagnosis, doctor
from sparsiattn.training import Recipe, TrainResult, calibrate, train
from sparsiattn.training.evaluation import Evaluation, evaluate

try:
    __version__ = _metadata.version("sparsiattn")
except _metadata.PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "PLUGIN_API",
    "AlreadyPatched",
    "AttentionInputs",
    "AttentionView",
    "Backbone",
    "BenchResult",
    "CheckpointNotWritten",
    "DataError",
    "Diagnosis",
    "Evaluation",
    "ExportFailed",
    "ExportResult",
    "Inspection",
    "InvalidOption",
    "InvalidType",
    "Kernel",
    "KernelRefused",
    "LearnedPlanner",
    "LearnedTokenPlanner",
    "MismatchedCheckpoint",
    "MismatchedPatch",
    "ModelChanged",
    "NothingToPatch",
    "Patch",
    "Pattern",
    "Planner",
    "PluginError",
    "ProbeFailed",
    "Profile",
    "Recipe",
    "Reduction",
    "Report",
    "SearchResult",
    "Site",
    "SparsiattnError",
    "Strategy",
    "TokenInputs",
    "TokenStrategy",
    "TrainResult",
    "TrainingDiverged",
    "Tuning",
    "UnknownName",
    "backbones",
    "bench",
    "block_mask",
    "calibrate",
    "check_budget",
    "count_of",
    "create_model",
    "doctor",
    "evaluate",
    "export",
    "from_pretrained",
    "hash_integers",
    "hookimpl",
    "inspect",
    "kernels",
    "load",
    "load_sparsifiner",
    "measure_sites",
    "patch",
    "patch_of",
    "plugins",
    "profile",
    "search",
    "show",
    "strategies",
    "train",
    "tune",
    "unpatch",
]
