"""Attention in this library's terms: sites, inputs ``[B, H, N, D]``, token grids, key patterns.

It imports `sparsiattn.errors` only and does not depend on models, kernels or strategies. Every
package except `sparsiattn.registry` may import it.
"""

from sparsiattn.attention.background import CountedSummary, Summary
from sparsiattn.attention.block import Block, Tail
from sparsiattn.attention.budget import Budget, check_budget, count_of
from sparsiattn.attention.cross_layer_state import CrossLayerState
from sparsiattn.attention.geometry import Grid, Tile, Tiles
from sparsiattn.attention.inputs import AttentionInputs
from sparsiattn.attention.key_lists import KeyBlocks, KeyIndex, KeyLists
from sparsiattn.attention.layout import HostCall, Layout
from sparsiattn.attention.lengths import Lengths
from sparsiattn.attention.packed import PackedTokens
from sparsiattn.attention.pattern import ComputedPattern, Dense, Mask, Pattern, Ranked
from sparsiattn.attention.sdpa import dense_attention
from sparsiattn.attention.site import Site
from sparsiattn.attention.token_state import ReductionStep, TokenState
from sparsiattn.attention.top_logits import TopKeys, TopLogits
