"""Published methods as plug-ins, one file each, which use only public names of the library.

They register through the same hooks as third-party plug-ins, and import only names in
``sparsiattn.__all__`` (a test checks their imports). No other module of the library imports them,
except that the root package exports `block_mask`.
"""

from __future__ import annotations

from sparsiattn import Strategy, TokenStrategy, hookimpl
from sparsiattn.methods.ailurus import AiluRus
from sparsiattn.methods.atc import ATC
from sparsiattn.methods.atrous import Atrous
from sparsiattn.methods.ats import ATS
from sparsiattn.methods.attention_reuse import AttentionReuse
from sparsiattn.methods.avggt import AVGGT
from sparsiattn.methods.bigbird import BigBird
from sparsiattn.methods.bilevel import BiLevel
from sparsiattn.methods.binary_topk import BinaryTopK
from sparsiattn.methods.diffrate import DiffRate
from sparsiattn.methods.dpc_knn import DPCKNN
from sparsiattn.methods.expedit import Expedit
from sparsiattn.methods.fibottention import Fibottention
from sparsiattn.methods.hypergraph import Hypergraph
from sparsiattn.methods.kmedoids import KMedoids
from sparsiattn.methods.linformer import Linformer
from sparsiattn.methods.longformer import Longformer
from sparsiattn.methods.lowrank import LowRank
from sparsiattn.methods.patch_merger import PatchMerger
from sparsiattn.methods.sd_filter import SDFilter
from sparsiattn.methods.sinkhorn import Sinkhorn
from sparsiattn.methods.sit import SiT
from sparsiattn.methods.skipat import SkipAt

METHODS: list[type[Strategy] | type[TokenStrategy]] = [
    Linformer,
    LowRank,
    Hypergraph,
    AttentionReuse,
    SkipAt,
    BiLevel,
    BinaryTopK,
    SDFilter,
    Fibottention,
    Longformer,
    BigBird,
    Atrous,
    AVGGT,
    ATC,
    AiluRus,
    Expedit,
    KMedoids,
    DPCKNN,
    ATS,
    SiT,
    PatchMerger,
    Sinkhorn,
    DiffRate,
]


@hookimpl
def sparsiattn_strategies() -> list[type[Strategy] | type[TokenStrategy]]:
    """Return the attention strategies first, then the token strategies."""
    return METHODS
