"""Pictures of what a patched model attends to: see `show`."""

from sparsiattn.analysis.visualization.recording import show
from sparsiattn.analysis.visualization.result import BlockTokens, Point, Shown, SiteShown

__all__ = ["BlockTokens", "Point", "Shown", "SiteShown", "show"]
