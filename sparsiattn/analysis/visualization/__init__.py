"""Pictures of what a patched model attends to.

`show` records one forward pass; `AttentionView` draws it (matplotlib, or one HTML page).
The command line and the root of the package import from here.
"""

from sparsiattn.analysis.visualization.recording import show
from sparsiattn.analysis.visualization.result import BlockTokens, Point, SiteAttention
from sparsiattn.analysis.visualization.view import AttentionView

__all__ = ["AttentionView", "BlockTokens", "Point", "SiteAttention", "show"]
