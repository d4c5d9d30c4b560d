"""Patching a model with a strategy and undoing it: survey, plan, check, install, report, load.

`discovery` finds the attention of unknown models. The package may import `sparsiattn.serialization`
and the layers below it; training, analysis, testing and the command line build on it.
"""

from sparsiattn.patching.apply import apply_strategy, patch, patch_quietly, resolve
from sparsiattn.patching.discovery import AttentionCall, Backbone, Pooling, count_class_tokens
from sparsiattn.patching.discovery.meta_model import MetaInputs
from sparsiattn.patching.handle import Patch, patch_of, unpatch
from sparsiattn.patching.load import from_pretrained
from sparsiattn.patching.model_call import eval_mode, logits_of
from sparsiattn.patching.model_outputs import OutputMetric
from sparsiattn.patching.report import Report
from sparsiattn.patching.site_report import SiteReport
from sparsiattn.patching.sparsifiner import load_sparsifiner
