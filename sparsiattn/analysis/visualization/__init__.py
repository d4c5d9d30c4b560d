"""Pictures of what a patched model attends to: see `show`."""

from sparsiattn.analysis.visualization.recording import show
from sparsiattn.analysis.visualization.result import AttentionView, BlockTokens, Point, SiteShown

__all__ = ["AttentionView", "BlockTokens", "Point", "SiteShown", "show"]
