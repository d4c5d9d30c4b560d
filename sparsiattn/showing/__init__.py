"""Pictures of what a patched model attends to: see `show`."""

from sparsiattn.showing.record import show
from sparsiattn.showing.shown import BlockTokens, Point, Shown, SiteShown

__all__ = ["BlockTokens", "Point", "Shown", "SiteShown", "show"]
