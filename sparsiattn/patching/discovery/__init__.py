"""Finds attention calls and blocks by running a copy of the model on the meta device."""

from sparsiattn.patching.discovery.backbone import (
    Backbone,
    Pooling,
    backbone_of,
)
from sparsiattn.patching.discovery.blocks import find_blocks
from sparsiattn.patching.discovery.host_attributes import count_class_tokens
from sparsiattn.patching.discovery.meta_model import MetaInputs, meta_copy, run_dry
from sparsiattn.patching.discovery.probe import AttentionCall
