"""Compares the outputs of a dense model with those of the patched one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsiattn.errors import DataError, InvalidOption, InvalidType

Metric = Literal["features", "classes"] | Callable[[Any, Any], Any]
METRICS = ("features", "classes")

# fields of transformers' output objects; the first one that exists is compared
FIELDS = ("logits", "image_embeds", "feature_maps", "last_hidden_state", "predicted_depth")

HEADS = ("head", "heads", "classifier", "fc")
"""Names of heads that users replace by `nn.Identity` to get features."""


@dataclass(frozen=True)
class OutputMetric:
    """How two outputs of the same model are compared.

    Attributes:
        kind: ``"classes"`` for the share of images (or of pixels, in segmentation) whose top-1
            class stays the same; ``"features"`` for the cosine similarity of the channels, averaged
            over positions and feature maps; ``"callable"`` for a function of the user.
        guessed: Whether the kind was derived from the model and not given by the user.
        function: Function of the dense and the patched output that returns ``[B]`` or a number;
            for ``"callable"`` only.

    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model, images = tiny_vit(num_classes=0), tiny_images(2)
    >>> metric = OutputMetric.of(model, model(images))
    >>> features = metric.outputs(model, (images,), {})
    >>> metric.kind, features.shape, metric.compare(model, features, -features).tolist()
    ('features', torch.Size([2, 65, 48]), [-1.0, -1.0])
    """

    kind: str
    guessed: bool = False
    function: Callable[[Any, Any], Any] | None = None

    @classmethod
    def of(cls, model: nn.Module, output: Any, metric: Metric | None = None) -> OutputMetric:
        """The metric that the user chose, else the one that fits the model.

        Args:
            model: The model, without wrappers.
            output: Output of the dense model, for any images.
            metric: ``"features"``, ``"classes"``, a callable, or None.

        Raises:
            InvalidOption: ``metric`` is something else, or is ``"classes"`` for a model without a
                head.
            DataError: The output has no tensor that can be compared.
        """
        if metric is None:
            return cls("classes" if has_classes(model, output) else "features", guessed=True)
        if metric == "classes":
            refuse_headless(model)
        return cls.named(metric)

    @classmethod
    def named(cls, metric: Metric) -> OutputMetric:
        """The metric that the user chose; needs no output of the model.

        Raises:
            InvalidOption: ``metric`` is neither a known name nor a callable.
        """
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
        """Name of the value in tables."""
        return {"classes": "answers kept", "features": "cosine"}.get(self.kind, "metric")

    def outputs(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model and return what is compared: its output, or its features at all positions.

        A timm model returns one pooled vector or logits, so its ``forward_features`` is called to
        get all positions. A compiled model is called as it was compiled.
        """
        has_features = hasattr(model, "forward_features") and hasattr(model, "num_classes")
        compiled = "_orig_mod" in model._modules
        if self.kind == "features" and has_features and not compiled and not kwargs:
            return model.forward_features(*args)  # type: ignore[operator]
        return model(*args, **kwargs)

    def compare(self, model: nn.Module, dense: Any, patched: Any) -> Tensor | float:
        """Agreement per image ``[B]`` (or the number of the user's function); 1 is full agreement.

        Non-finite values in the patched output count as disagreement.

        Raises:
            DataError: The dense output is not finite, or the patched one has another shape.
            InvalidType: The user's function returned neither a number nor ``[B]``.
        """
        if self.function is not None:
            return _checked(self.function(dense, patched))
        if self.kind == "classes":
            before, after = _pair(main_tensor(dense), main_tensor(patched))
            return same_choice(before, after, 1 if before.dim() == 4 else -1)
        maps = zip(main_tensors(dense), main_tensors(patched), strict=True)
        return torch.stack([_map_cosine(model, *_pair(*both)) for both in maps]).mean(0)


def _checked(value: Any) -> Tensor | float:
    """The result of the user's function, which must be a number or ``[B]``."""
    if isinstance(value, Tensor) and value.dim() < 2 and not value.is_complex():
        return value.detach() if value.dim() else float(value)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InvalidType(
            f"metric(dense, patched) must return a number or a tensor [B], got {got}"
        ) from error


def _pair(dense: Tensor, patched: Tensor) -> tuple[Tensor, Tensor]:
    """Check that the dense output is finite and that the shapes agree; returns both."""
    if dense.shape != patched.shape:
        raise DataError(
            f"the patched model returns shape {tuple(patched.shape)}, the dense one "
            f"{tuple(dense.shape)}: pass metric=function(dense, patched), or let token strategies "
            "restore original positions (restore='auto')"
        )
    if not dense.isfinite().all():
        raise DataError(
            "the dense model's output is not finite, so nothing can be compared with it: "
            "check the images and the weights"
        )
    return dense, patched


def same_choice(dense: Tensor, patched: Tensor, axis: int = -1) -> Tensor:
    """Share of positions with the same top-1 class, ``[B]``.

    Positions with non-finite values in the patched output count as different.

    Args:
        dense: ``[B, classes]``, ``[B, N, classes]`` or ``[B, classes, H, W]``.
        patched: A tensor of the same shape.
        axis: Axis of the classes.

    >>> same_choice(torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    same = dense.argmax(axis) == patched.argmax(axis)
    return _by_image((same & patched.isfinite().all(axis)).to(_wide(dense)))


def cosine(dense: Tensor, patched: Tensor) -> Tensor:
    """Cosine similarity over the last axis of ``[B, ..., D]``, averaged over positions, ``[B]``.

    Positions with non-finite values count as 0. Bitwise equal positions, also zeros, count as 1.

    >>> cosine(torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[4.0, 3.0], [0.0, 0.0]]))
    tensor([0.9600, 1.0000], dtype=torch.float64)
    """
    equal = (dense == patched).all(-1)
    dense, patched = (_unit_scale(x.to(_wide(x))) for x in (dense, patched))
    values = F.cosine_similarity(patched, dense, dim=-1)
    return _by_image(values.nan_to_num(0.0).masked_fill(equal, 1.0))


def _unit_scale(x: Tensor) -> Tensor:
    """Rows scaled to a largest entry of 1, so that squares neither underflow nor overflow."""
    return x / x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # mps has no float64


def _by_image(values: Tensor) -> Tensor:
    """Means of ``[B, ...]`` over all but the first axis."""
    return values[:, None].flatten(1).mean(1)


def _map_cosine(model: nn.Module, dense: Tensor, patched: Tensor) -> Tensor:
    axis = channel_axis(model, dense)
    return cosine(dense.movedim(axis, -1), patched.movedim(axis, -1))


def main_tensor(output: Any) -> Tensor:
    """The first tensor of `main_tensors`; in a tuple of outputs, logits come first.

    Raises:
        DataError: The output has no tensor that can be compared.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return main_tensors(output)[0]


def main_tensors(output: Any) -> list[Tensor]:
    """The tensors of an output that are compared: one, or all feature maps if there are several.

    Args:
        output: A tensor, a sequence of feature maps, an output object of transformers (of which
            one field is compared, see `FIELDS`), or a dict of feature maps.

    Raises:
        DataError: There is no tensor, or not all are float tensors ``[B, ...]``.

    >>> [x.shape for x in main_tensors([torch.zeros(2, 8, 4, 4), torch.zeros(2, 16, 2, 2)])]
    [torch.Size([2, 8, 4, 4]), torch.Size([2, 16, 2, 2])]
    """
    value: Any = next(filter(None, (_field(output, name) for name in FIELDS)), None)
    if value is None:
        value = list(output.values()) if isinstance(output, Mapping) else output
    tensors = [value] if isinstance(value, Tensor) else value
    if not isinstance(tensors, Sequence) or not tensors or not all(map(_is_map, tensors)):
        got = sorted(output) if isinstance(output, Mapping) else type(output).__name__
        raise DataError(
            "outputs must be float tensors [B, ...] with 2 to 4 dimensions to be compared, got "
            f"{got}: pass metric=function(dense, patched) to compare yours"
        )
    if len({len(tensor) for tensor in tensors}) > 1:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise DataError(
            f"outputs must have the same batch size to be compared, got shapes {shapes}: pass "
            "metric=function(dense, patched) to compare yours"
        )
    return list(tensors)


def _field(output: Any, name: str) -> list[Tensor] | None:
    """Tensors of a field of an output object or dict; None without such a field."""
    value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
    if name == "predicted_depth" and isinstance(value, Tensor):
        return [value.flatten(1)]  # a depth map has no channels
    if isinstance(value, Tensor):
        return [value]
    return list(value) if isinstance(value, (tuple, list)) else None


def _is_map(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and 2 <= value.dim() <= 4


def has_classes(model: nn.Module, output: Any) -> bool:
    """Whether a model predicts classes (of images or of pixels), judged by it and its output."""
    tensor = main_tensor(output)
    has_logits = _field(output, "logits") is not None
    if says_headless(model):
        return False
    if tensor.dim() != 2:
        return has_logits and tensor.dim() == 4
    count = getattr(model, "num_classes", None)
    if isinstance(count, int):
        return count > 0
    return has_logits or _ends_in_head(model, tensor.shape[1])


def says_headless(model: nn.Module) -> bool:
    """Whether a model's attributes say that it returns features; it need not run for this.

    >>> from sparsiattn.testing.hosts import tiny_vit
    >>> says_headless(tiny_vit(num_classes=0)), says_headless(tiny_vit())
    (True, False)
    """
    heads = [model._modules[name] for name in HEADS if name in model._modules]
    if heads and all(isinstance(head, nn.Identity) for head in heads):
        return True  # set by the user; num_classes may still have its old value
    count = getattr(model, "num_classes", None)
    if isinstance(count, int):
        return count == 0
    # a transformers model without a head is its own base
    return getattr(model, "base_model", None) is model and "For" not in type(model).__name__


def refuse_headless(model: nn.Module) -> None:
    """Raise `InvalidOption` for a model without a head, for which ``"classes"`` was chosen."""
    if says_headless(model):
        raise InvalidOption(
            f"metric='classes' needs a head, and this {type(model).__name__} has none "
            "(num_classes=0, or nn.Identity in its place): use metric='features'"
        )


def is_headless(model: nn.Module, output: Any) -> bool:
    """Whether a model is known to return features, by its attributes or the width of its output.

    For some models neither this nor `has_classes` is true; they may return either.
    """
    if says_headless(model):
        return True
    if isinstance(getattr(model, "num_classes", None), int) or _field(output, "logits"):
        return False
    if any(_field(output, name) for name in FIELDS):
        return True
    features = main_tensor(output)
    return features.dim() != 2 or features.shape[1] in _inner_widths(model)


def _ends_in_head(model: nn.Module, width: int) -> bool:
    """Whether the last linear layer is a head: of this output width, which no inner layer has.

    The last linear layer of a headless ViT belongs to a block, and projections of embeddings have
    no bias.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].out_features != width or linear[-1].bias is None:
        return False
    return width not in _inner_widths(model)


def _inner_widths(model: nn.Module) -> set[int]:
    norms = (module for module in model.modules() if isinstance(module, nn.LayerNorm))
    return {norm.normalized_shape[-1] for norm in norms}


def _said_widths(model: nn.Module) -> set[Any]:
    """Numbers of channels that are attributes of a model or of its config."""
    config = getattr(model, "config", None)
    places = (model, "num_features"), (model, "channels"), (config, "hidden_size")
    named = [getattr(holder, name, ()) for holder, name in places]
    several = [widths if isinstance(widths, (list, tuple)) else [widths] for widths in named]
    return {width for widths in several for width in widths}


def channel_axis(model: nn.Module, features: Tensor) -> int:
    """The axis of the channels: ``[B, D]``, ``[B, N, D]``, ``[B, H, W, D]`` or ``[B, D, H, W]``.

    With four axes it is the one that the model states, else the one whose size is a width of the
    model, else the one next to two equal (spatial) axes.
    """
    if features.dim() != 4:
        return -1
    layout = getattr(model, "output_fmt", None)  # timm's
    layout = str(getattr(layout, "value", layout))
    if layout in ("NHWC", "NCHW"):
        return -1 if layout == "NHWC" else 1
    _, first, middle, last = features.shape
    widths = _inner_widths(model) | _said_widths(model)
    if (first in widths) != (last in widths):
        return 1 if first in widths else -1
    return -1 if first == middle != last else 1
