"""Pictures of a patched model's attention.

`show` records one forward pass; `AttentionView` draws it with matplotlib or as an HTML page.
"""

from sparsiattn.analysis.visualization.recording import show
from sparsiattn.analysis.visualization.result import BlockTokens, Point, SiteAttention
from sparsiattn.analysis.visualization.view import AttentionView

__all__ = ["AttentionView", "BlockTokens", "Point", "SiteAttention", "show"]
