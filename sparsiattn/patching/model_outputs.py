"""What a model says of images, and how much of it stays when the model is patched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn.errors import DataError, InvalidOption

Metric = Literal["features", "classes"] | Callable[[Any, Any], Any]
METRICS = ("features", "classes")

# fields of transformers' output objects, the first that is there counts
FIELDS = ("logits", "image_embeds", "last_hidden_state", "predicted_depth")


@dataclass(frozen=True)
class OutputMetric:
    """How two outputs of one model are compared.

    Attributes:
        kind: ``"classes"``: the share of images with the same first choice; ``"features"``: the
            cosine of the channels, mean over positions; ``"callable"``: a function of the user.
        guessed: Whether the model was asked, not the user.
        function: Of dense and patched output, gives ``[B]`` or a number; for ``"callable"`` only.
    """

    kind: str
    guessed: bool = False
    function: Callable[[Any, Any], Any] | None = None

    @classmethod
    def of(cls, model: nn.Module, output: Any, metric: Metric | None = None) -> OutputMetric:
        """The metric that the user named, else the one that fits the model.

        Args:
            model: Unwrapped.
            output: Of the dense model, for any images.
            metric: ``"features"``, ``"classes"``, a callable, or None.

        Raises:
            InvalidOption: ``metric`` is something else.
            DataError: The output has nothing that can be compared.
        """
        if metric is None:
            return cls("classes" if has_classes(model, output) else "features", guessed=True)
        if callable(metric):
            return cls("callable", function=metric)
        if metric not in METRICS:
            raise InvalidOption(
                f"metric must be {' or '.join(map(repr, METRICS))} or a function of the dense and "
                f"the patched output, got {metric!r}"
            )
        return cls(metric)

    @property
    def label(self) -> str:
        """What the figure is, for tables."""
        return {"classes": "answers kept", "features": "cosine"}.get(self.kind, "metric")

    def outputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is compared: the model's output, or its features at all positions.

        A headless timm model returns one pooled vector; its ``forward_features`` has them all.
        """
        pools = getattr(model, "num_classes", None) == 0 and hasattr(model, "forward_features")
        if self.kind == "features" and pools and not kwargs:
            return model.forward_features(*args)  # type: ignore[operator]
        return model(*args, **kwargs)

    def compare(self, model: nn.Module, dense: Any, patched: Any) -> Tensor | float:
        """How much stays, by image ``[B]`` (or one number of the user's function); 1 is all.

        Raises:
            DataError: The dense output is not finite.
        """
        if self.function is not None:
            return self.function(dense, patched)  # type: ignore[no-any-return]
        before, after = main_tensor(dense), main_tensor(patched)
        if not before.isfinite().all():
            raise DataError(
                "the dense model's output is not finite, so nothing can be compared with it: "
                "check the images and the weights"
            )
        if self.kind == "classes":
            return same_choice(before, after)
        axis = channel_axis(model, before)
        return cosine(before.movedim(axis, -1), after.movedim(axis, -1))


def same_choice(dense: Tensor, patched: Tensor) -> Tensor:
    """1 where both ``[B, classes]`` choose the same class, else 0, also where one is not finite."""
    same = dense.argmax(-1) == patched.argmax(-1)
    return (same & patched.isfinite().all(-1)).double()


def cosine(dense: Tensor, patched: Tensor) -> Tensor:
    """Cosine over the last axis of ``[B, ..., D]``, mean over positions; 0 where not finite."""
    values = F.cosine_similarity(patched.double(), dense.double(), dim=-1)
    return values.nan_to_num(0.0).reshape(len(values), -1).mean(1)


def main_tensor(output: Any) -> Tensor:
    """The tensor of an output that says most.

    Raises:
        DataError: There is none, or there are several that no rule tells apart.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    fields = output if isinstance(output, Mapping) else {}
    known = [fields[name] for name in FIELDS if isinstance(fields.get(name), Tensor)]
    tensors = known[:1] or [value for value in fields.values() if isinstance(value, Tensor)]
    if isinstance(output, Tensor):
        tensors = [output]
    if len(tensors) != 1 or not tensors[0].is_floating_point() or tensors[0].dim() < 2:
        got = sorted(fields) if fields else type(output).__name__
        raise DataError(
            "outputs are compared by one tensor [B, ...] of floats: pass "
            f"metric=function(dense, patched) to compare yours, got {got}"
        )
    return tensors[0]


def has_classes(model: nn.Module, output: Any) -> bool:
    """Whether a model is a classifier, by what it says of itself and by its output's shape."""
    if main_tensor(output).dim() != 2:
        return False
    count = getattr(model, "num_classes", None)
    if isinstance(count, int):
        return count > 0
    if isinstance(output, Mapping):
        return "logits" in output
    width = main_tensor(output).shape[1]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    # the last linear layer of a headless ViT belongs to a block, whose width the output has, too
    return bool(linear) and linear[-1].out_features == width != linear[-1].in_features


def channel_axis(model: nn.Module, features: Tensor) -> int:
    """Where the channels of ``[B, D]``, ``[B, N, D]``, ``[B, H, W, D]`` or ``[B, D, H, W]`` are."""
    if features.dim() != 4:
        return -1
    width = getattr(model, "num_features", None)
    return -1 if width == features.shape[-1] != features.shape[1] else 1
