"""Putting a strategy on a model and taking it off: survey, plan, check, install, report, load.

May import `sparsiattn.serialization` and what stands below it; training, analysis, testing and
the command line build on it. `discovery` finds the attention of a model that was never seen.
"""

from sparsiattn.patching.apply import apply_strategy, patch, patch_quietly, resolve
from sparsiattn.patching.discovery import AttentionCall, Backbone, Pooling, count_class_tokens
from sparsiattn.patching.discovery.meta_model import MetaInputs
from sparsiattn.patching.handle import Patch, patch_of, unpatch
from sparsiattn.patching.load import from_pretrained
from sparsiattn.patching.model_call import eval_mode, logits_of
from sparsiattn.patching.model_outputs import OutputMetric
from sparsiattn.patching.report import Report, SiteReport
from sparsiattn.patching.sparsifiner import load_sparsifiner
