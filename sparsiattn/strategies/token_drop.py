"""The strategy `token_drop`: drops the tokens with the lowest scores.

Scores are class attention (EViT, ICLR 2022, arXiv 2202.07800), a learned score (DynamicViT, NeurIPS
2021, arXiv 2106.02034), the norm, or random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sparsiattn.attention.budget import Budget, check_budget
from sparsiattn.attention.site import Site
from sparsiattn.errors import InvalidOption, InvalidType
from sparsiattn.strategies.base import check_flag, is_number
from sparsiattn.strategies.keep_predictor import KeepPredictor
from sparsiattn.strategies.random import draw, site_key
from sparsiattn.strategies.reduction import Reduction
from sparsiattn.strategies.token_base import Place, TokenInputs, TokenPlanner, TokenStrategy

SCORES = ("cls", "mean_query", "learned", "norm", "random")
ADAPTIVE = "adaptive"
SKIPS = ("mlp", "window")

Keep = Budget | str | Sequence[Budget] | Callable[[Site], Budget]


@dataclass(frozen=True)
class TokenDrop(TokenStrategy):
    """Keeps the patch tokens with the best scores and drops the others.

    Args:
        keep: Share or count of the current patch tokens (``ceil``), one for all layers, a list, a
            function of the `Site`, or ``"adaptive"`` to keep a number that depends on the scores of
            each image.
        score: ``"cls"`` (attention of the class tokens, mean over heads; ``"mean_query"`` if there
            are none), ``"mean_query"`` (attention of the mean patch query), ``"learned"``
            (DynamicViT's predictor, at the block's entry; needs training), ``"norm"`` (Euclidean
            norm of the token), ``"random"`` (the same for every image).
        fuse: Whether to add one token that is the sum of the dropped ones, weighted by score.
        mass: With ``keep="adaptive"``, keep the fewest tokens that hold this share of the total
            score; 0.9 by default.
        threshold: With ``keep="adaptive"``, used instead of ``mass``: keep tokens whose score is at
            least this many times the mean.
        seed: Seed of ``score="random"``.
        skip: What dropped tokens skip in models whose grid must stay complete, such as Swin.
            ``"mlp"``: they skip the MLP, up to the end of the stage. ``"window"``: complete
            windows, scored by their mean token, skip the block unchanged; ``keep`` is then the
            share of windows that do not skip, and ``layers`` are the blocks that choose windows,
            each independently. By default these are the first sixth of the blocks, where a window
            costs most and matters least.

    >>> TokenDrop(keep=[0.7, 0.5], layers=[3, 6]).layers_in(12)
    (3, 6)
    """

    name = "token_drop"
    paper = "https://arxiv.org/abs/2202.07800"
    fidelity = (
        'as published code with score="cls" (EViT); score="learned" is DynamicViT, arXiv 2106.02034'
    )

    keep: Keep = 0.7
    score: str = "cls"
    fuse: bool = False
    mass: float | None = None
    threshold: float | None = None
    seed: int = 0
    skip: str = "mlp"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in SCORES:
            raise InvalidOption(f"score must be one of {SCORES}, got {self.score!r}")
        check_flag("fuse", self.fuse)
        if self.fuse and self.score not in ("cls", "mean_query"):
            raise InvalidOption(
                f"fuse=True weighs dropped tokens by attention, so score must be 'cls' or "
                f"'mean_query', got {self.score!r}"
            )
        keeps = self.keep if isinstance(self.keep, (list, tuple)) else [self.keep]
        for keep in keeps:
            if self.keep != ADAPTIVE and not callable(keep):
                check_budget(keep, "keep")
        self._check_skip()
        if type(self.seed) is not int:
            raise InvalidType(f"seed must be an int, got {self.seed!r}")
        self._check_adaptive()

    def _check_skip(self) -> None:
        if self.skip not in SKIPS:
            raise InvalidOption(f"skip must be one of {SKIPS}, got {self.skip!r}")
        if self.skip != "window":
            return
        if self.score not in ("norm", "random"):
            raise InvalidOption(
                f"skip='window' needs score='norm' or score='random', got {self.score!r}"
            )
        if self.keep == ADAPTIVE:
            raise InvalidOption(
                "skip='window' needs a fixed keep, the same for every image, got keep='adaptive'"
            )

    def _check_adaptive(self) -> None:
        rules = [name for name in ("mass", "threshold") if getattr(self, name) is not None]
        if rules and self.keep != ADAPTIVE:
            raise InvalidOption(f"{' and '.join(rules)} need keep='adaptive', got {self.keep!r}")
        if len(rules) > 1:
            raise InvalidOption("keep='adaptive' takes mass or threshold, got both")
        if self.mass is not None and not (is_number(self.mass) and 0 < self.mass <= 1):
            raise InvalidOption(f"mass must be a share in (0, 1], got {self.mass!r}")
        if self.threshold is not None and not (is_number(self.threshold) and self.threshold > 0):
            raise InvalidOption(f"threshold must be a number > 0, got {self.threshold!r}")

    def is_ragged(self) -> bool:
        return self.keep == ADAPTIVE

    def skips_windows(self) -> bool:
        return self.skip == "window"

    def default_layers(self, depth: int) -> tuple[int, ...]:
        if not self.skips_windows():
            return super().default_layers(depth)
        return tuple(range(max(1, depth // 6)))

    def placement(self) -> Place:
        return "entry" if self.score == "learned" else "middle"

    def reads_attention(self) -> bool:
        return self.score in ("cls", "mean_query")

    def for_model(self, class_tokens: int, windowed: bool, model: str) -> TokenDrop:
        if self.score == "cls" and not class_tokens and not windowed:
            return replace(self, score="mean_query")
        return self

    def resolve_for(self, site: Site, position: int, count: int) -> TokenDrop:
        resolved = super().resolve_for(site, position, count)
        assert isinstance(resolved, TokenDrop)
        if self.keep != ADAPTIVE:
            check_budget(resolved.keep, "keep")
        return resolved

    def check(self, tokens: int, first: bool) -> None:
        if isinstance(self.keep, int) and self.keep > tokens:
            raise InvalidOption(f"keep={self.keep} exceeds the {tokens} patch tokens there")

    def planner(self, site: Site, width: int) -> TokenPlanner:
        if self.score == "learned":
            return KeepPredictor(self.reduce_scored, width, site.name, self.keep)
        if self.score == "random":
            return partial(self.reduce_drawn, site_key(self.seed, site))
        return super().planner(site, width)

    def reduce(self, tokens: TokenInputs) -> Reduction | None:
        return self.reduce_scored(self.scores(tokens))

    def reduce_scored(self, scores: Tensor) -> Reduction | None:
        """Keep the tokens with the best scores ``[B, n]`` (positive with ``keep="adaptive"``)."""
        fuse = scores if self.fuse else None
        if self.keep == ADAPTIVE:
            return Reduction.where(self.enough(scores), fuse)
        return Reduction.top(scores, self.keep, fuse)  # type: ignore[arg-type]

    def scores(self, tokens: TokenInputs) -> Tensor:
        """The score of each token, ``[B, n]``; higher is better."""
        if self.score == "cls":
            return tokens.class_attention()
        if self.score == "mean_query":
            return tokens.mean_attention()
        norms: Tensor = torch.linalg.vector_norm(tokens.x.float(), dim=-1)
        return norms

    def reduce_drawn(self, key: int, tokens: TokenInputs) -> Reduction | None:
        """Keep random tokens, the same for all images; ``key`` is the result of `site_key`."""
        scores = draw(key, 1, 1, tokens.count, tokens.x.device)[0, 0]
        return self.reduce_scored(scores.expand(tokens.x.shape[0], -1))

    def enough(self, scores: Tensor) -> Tensor:
        """The tokens that each image keeps with ``keep="adaptive"``, ``[B, n]``; at least one."""
        share = scores / scores.sum(1, keepdim=True)
        best = share >= share.amax(1, keepdim=True)
        if self.threshold is not None:
            return (share * share.shape[1] >= self.threshold) | best
        ranked = share.sort(dim=1, descending=True, stable=True)
        enough = ranked.values.cumsum(1) - ranked.values < (0.9 if self.mass is None else self.mass)
        return torch.zeros_like(enough).scatter(1, ranked.indices, enough) | best
