"""Where each token of a dry run comes from in the image: tensors without data carry it along.

Beside a tensor stands another of the same shape (`places_in`) that holds, for every element, the
number of the pixel it comes from. Operations that move data move the numbers along, a convolution
hands on the number at the centre of its window, a linear map that of its row. What no rule covers
is `UNKNOWN`, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from sparsiattn.patching.discovery.meta_cache import recalling

UNKNOWN = -1
"""In the place of a pixel's number: the element depends on the image, it is not known where."""
SPECIAL = -2
"""The element does not depend on the image: class tokens, registers, prompts."""
PADDING = -3
"""The element was put beside the image to fill a window."""

_PLACES = "_sparsiattn_places"
aten = torch.ops.aten


def places_in(tensor: Tensor) -> Tensor | None:
    """Numbers of pixels, of the tensor's shape (int32 on the CPU); None if it has no image."""
    return getattr(tensor, _PLACES, None)


class PixelNumbers:
    """Lets the images among a dry run's inputs carry the numbers of their pixels.

    Args:
        inputs: Arguments and keyword arguments; images are floating-point tensors of four
            dimensions or more on the meta device, with rows and columns last.

    Attributes:
        images: The first number and the shape of every image.
    """

    def __init__(self, inputs: Any) -> None:
        self.images: list[tuple[int, tuple[int, ...]]] = []
        start = 0
        for tensor in tree_leaves(inputs):
            if isinstance(tensor, Tensor) and tensor.dim() >= 4 and tensor.is_floating_point():
                self.images.append((start, tuple(tensor.shape)))
                start += _number(tensor, start)

    def of_one_image(
        self, places: Sequence[Tensor | None]
    ) -> tuple[list[Tensor | None], tuple[int, ...]]:
        """Numbers counted from the start of the image they are of, and that image's shape.

        None for all where they are of several images, or of none.
        """
        numbers = [x[x >= 0] for x in places if x is not None]
        numbers = [x for x in numbers if x.numel()]
        for start, shape in self.images if numbers else ():
            end = start + torch.Size(shape).numel()
            if all(start <= int(x.min()) and int(x.max()) < end for x in numbers):
                moved = [x if x is None else torch.where(x >= 0, x - start, x) for x in places]
                return moved, shape
        return [None] * len(places), ()


def _number(image: Tensor, start: int) -> int:
    """Number an image's pixels from ``start``; returns how many numbers that took.

    In an image ``[B, C, H, W]`` the channels share them.
    """
    shape = (image.shape[0], 1, *image.shape[2:]) if image.dim() == 4 else tuple(image.shape)
    count = torch.Size(shape).numel()
    numbers = torch.arange(start, start + count, dtype=torch.int32, device="cpu")
    setattr(image, _PLACES, numbers.view(shape).expand(image.shape))
    return count


@contextmanager
def tracking_places() -> Iterator[None]:
    """Operators on meta tensors carry the numbers of pixels along inside the block."""
    with recalling(), _TrackPlaces():
        yield


class _TrackPlaces(TorchDispatchMode):
    """Applies `RULES` to every operator that takes a tensor with numbers.

    Blocks of a transformer do the same to the same numbers again and again, so results are kept.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[Any, Sequence[Tensor | None]] = {}
        self._kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # operators come here before they are taken apart
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        carried: list[Tensor] = []
        key = (func, _key(args, carried), _key(kwargs, carried))
        if carried:
            places = self._known.get(key)
            if places is None or func.overloadpacket is aten.copy_:
                places = _places_of(func, args, kwargs, out)
                # keys hold addresses of the numbers that came in, which must live as long
                self._known[key] = places
                self._kept += carried
            results = out if isinstance(out, (tuple, list)) else (out,)
            for tensor, numbers in zip(results, places, strict=False):
                if isinstance(tensor, Tensor):
                    _attach(tensor, numbers)
        return out


def _key(value: Any, carried: list[Tensor]) -> Any:
    """What places depend on in an operator's arguments; numbers in them go to ``carried``."""
    if isinstance(value, Tensor):
        numbers = places_in(value)
        if numbers is not None:
            carried.append(numbers)
            return id(numbers)
        # a tensor with values is known by itself: `Tensor` hashes by identity, and `is` comes first
        return tuple(value.shape) if value.is_meta else value
    if isinstance(value, (list, tuple)):
        return tuple(_key(item, carried) for item in value)
    if isinstance(value, dict):
        return tuple((name, _key(item, carried)) for name, item in value.items())
    return value


def _attach(tensor: Tensor, numbers: Tensor | None) -> None:
    if numbers is None or numbers.shape != tensor.shape:
        numbers = _constant(UNKNOWN, tensor.shape)
    setattr(tensor, _PLACES, numbers)


def _places_of(func: Any, args: Any, kwargs: Any, out: Any) -> Sequence[Tensor | None]:
    """Numbers for each result of an operator; None where they are not known."""
    rule = RULES.get(func.overloadpacket)
    if rule is None and torch.Tag.pointwise in func.tags:
        rule = _pointwise
    if rule is None:
        return [None] * len(tree_leaves(out))
    try:
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            places = rule(func, args, kwargs, out)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return [None] * len(tree_leaves(out))  # a form of the operator that the rule does not know
    return places if isinstance(places, (tuple, list)) else (places,)


def _constant(value: int, shape: Sequence[int]) -> Tensor:
    return torch.tensor(value, dtype=torch.int32, device="cpu").expand(tuple(shape))


def _numbers(x: Any) -> Tensor:
    """Numbers of an argument; one without an image is special everywhere."""
    places = places_in(x)
    return _constant(SPECIAL, x.shape) if places is None else places


def _thin(numbers: Tensor) -> Tensor:
    """The same with size 1 in every dimension along which it is one value repeated."""
    for dim, stride in enumerate(numbers.stride()):
        if stride == 0 and numbers.shape[dim] > 1:
            numbers = numbers.narrow(dim, 0, 1)
    return numbers


# --- rules: (func, args, kwargs, out) -> numbers of the results


def _move(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Operators that only move data: what they do to the tensor, they do to its numbers."""
    return func(_numbers(args[0]), *args[1:], **kwargs)


def _view(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    return _numbers(args[0]).reshape(out.shape)


def _same(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Every element stays where it is: norms, softmax, copies, changes of type."""
    first = out[0] if isinstance(out, (tuple, list)) else out
    numbers = _numbers(args[0])
    return (numbers,) if numbers.shape == first.shape else (None,)


def _pointwise(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Operands laid over each other: those with an image count, if they agree."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    total: Tensor | None = None
    for numbers in (places_in(x) for x in tensors):
        if numbers is not None:
            total = numbers if total is None else _agreed(total, numbers)
    assert total is not None
    first = out[0] if isinstance(out, (tuple, list)) else out
    # the very same object where nothing changes, so that later blocks find what is kept for it
    return (total if total.shape == first.shape else total.expand(first.shape),)


def _agreed(a: Tensor, b: Tensor) -> Tensor:
    """A pixel's number wins over none, and the first operand's over another."""
    if a is b:
        return a
    thin_a, thin_b = _thin(a), _thin(b)
    if a.shape == b.shape and thin_a.shape == thin_b.shape and torch.equal(thin_a, thin_b):
        return a
    neither = torch.where(thin_b >= 0, thin_b, torch.maximum(thin_a, thin_b))
    return torch.where(thin_a >= 0, thin_a, neither)


def _complex(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """Pairs of numbers as one complex number, and back (rotary positions)."""
    if out.is_complex():
        return _numbers(args[0])[..., 0]
    return _numbers(args[0]).unsqueeze(-1).expand(out.shape)


def _concatenate(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    parts = [_numbers(x) for x in args[0] if x.dim() == out.dim() or func is not _CAT]
    if func is not _CAT:
        return func(parts, *args[1:], **kwargs)  # type: ignore[no-any-return]
    along = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    for dim in range(out.dim()):  # dimensions of one value stay so
        if dim != along and all(x.stride(dim) == 0 or x.shape[dim] == 1 for x in parts):
            parts = [x.narrow(dim, 0, 1) for x in parts]
    return torch.cat(parts, along).expand(out.shape)


_CAT = aten.cat.default


def _pad(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    padded: Tensor = aten.constant_pad_nd(_numbers(args[0]), args[1], PADDING)
    return padded


def _index(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
    """Gathered elements, where the indices have values or all choices are the same."""
    numbers, *rest = args
    numbers = _numbers(numbers)
    indices = [x for x in tree_leaves((rest, kwargs)) if isinstance(x, Tensor)]
    if any(x.is_meta for x in indices):
        if not _is_indifferent(func, numbers, rest) or any(x.dtype == torch.bool for x in indices):
            return None
        rest, kwargs = tree_map(_first_choice, (rest, kwargs))
    gathered: Tensor = func(numbers, *rest, **kwargs)
    return gathered


def _is_indifferent(func: Any, numbers: Tensor, rest: Any) -> bool:
    """Whether numbers do not change along the dimensions that an operator takes elements of."""
    if func.overloadpacket is aten.index:
        dims = [dim for dim, index in enumerate(rest[0]) if index is not None]
    else:
        dims = [rest[0]]
    return all(numbers.stride(dim) == 0 or numbers.shape[dim] == 1 for dim in dims)


def _first_choice(index: Any) -> Any:
    is_meta = isinstance(index, Tensor) and index.is_meta
    return torch.zeros(index.shape, dtype=torch.long, device="cpu") if is_meta else index


def _patches(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """`torch.nn.functional.unfold`: it pads with zeros, and knows floating-point numbers only."""
    shifted = (_numbers(args[0]) - PADDING).double()
    return func(shifted, *args[1:], **kwargs).to(torch.int32) + PADDING  # type: ignore[no-any-return]


def _reduce(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """A sum, mean or maximum is where its terms are, if all are in one place."""
    numbers, dims = _numbers(args[0]), _argument(func, args, kwargs, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(numbers.dim()))
    dims = sorted({dim % numbers.dim() for dim in dims}, reverse=True)
    agreed = _thin(numbers)
    for dim in dims:
        low, high = agreed.amin(dim, keepdim=True), agreed.amax(dim, keepdim=True)
        agreed = torch.where(low == high, low, UNKNOWN).to(torch.int32)
    results = out if isinstance(out, (tuple, list)) else (out,)
    if not _argument(func, args, kwargs, "keepdim"):
        for dim in dims:
            agreed = agreed.squeeze(dim)
    return [agreed.expand(result.shape) for result in results]


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    """An operator's argument by its name; None where it is left out."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[i] if i < len(args) else kwargs.get(name)
    return None


def _product(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
    """A matrix product hands on the numbers of its rows; a constant times tokens, of columns."""
    left, right = args[-2:] if func.overloadpacket in _ADDING else args[:2]
    if left.dim() < 2 or right.dim() < 2:
        return None
    rows, columns = _thin(_numbers(left)[..., :1]), _thin(_numbers(right)[..., :1, :])
    # attention over channels: rows are channels, all alike, and columns are tokens
    by_column = rows.shape[-2] == 1 < columns.shape[-1] or places_in(left) is None
    return (columns if by_column else rows).expand(out.shape)


_ADDING = (aten.addmm, aten.baddbmm, aten.addbmm)


def _attention(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Attention has the places of its queries."""
    return (_numbers(args[0])[..., :1].expand(out[0].shape),)


def _convolve(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
    """The number at the centre of each window, of the first channel."""
    x, weight, _, stride, padding, dilation, transposed = args[:7]
    if transposed:
        return None
    centres = [
        _centres(size, n, step, dil * (kernel - 1) // 2 - pad)
        for size, n, step, pad, dil, kernel in zip(
            x.shape[2:], out.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    return _sampled(_numbers(x), centres, out.shape)


def _pool(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """As `_convolve`, for pools with a kernel, a stride and a padding."""
    x, first = args[0], out[0] if isinstance(out, (tuple, list)) else out
    dims = first.dim() - 2
    sizes = [list(value) for value in args[1:4] if isinstance(value, (list, tuple))]
    kernel, stride, padding = (*sizes, *([], [0])[len(sizes) - 1 :])[:3]
    kernel, stride, padding = (
        s * dims if len(s) == 1 else s for s in (kernel, stride or kernel, padding)
    )
    centres = [
        _centres(size, n, step, (k - 1) // 2 - pad)
        for size, n, step, pad, k in zip(
            x.shape[-dims:], first.shape[-dims:], stride, padding, kernel, strict=True
        )
    ]
    return (_sampled(_numbers(x), centres, first.shape),)


def _resize(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """An image resized, or pooled to a size: the nearest place."""
    x, dims = args[0], out.dim() - 2
    places = [
        ((torch.arange(n, device="cpu") * 2 + 1) * size // (2 * n)).clamp_max(size - 1)
        for size, n in zip(x.shape[-dims:], out.shape[-dims:], strict=True)
    ]
    return _sampled(_numbers(x), places, out.shape)


def _centres(size: int, count: int, step: int, first: int) -> Tensor:
    return (torch.arange(count, device="cpu") * step + first).clamp(0, size - 1)


def _sampled(numbers: Tensor, places: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Numbers at these places of the trailing dimensions, the same for every channel."""
    numbers = numbers.narrow(1, 0, 1) if numbers.dim() > len(places) + 1 else numbers
    for i, index in enumerate(places):
        numbers = numbers.index_select(numbers.dim() - len(places) + i, index)
    return numbers.expand(tuple(shape))


def _write(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """``x.copy_(y)``, also through a view: what the view is of gets the numbers, too."""
    target, numbers = args[0], _numbers(args[1])
    base = target._base
    if base is not None and base.is_contiguous():
        known = _numbers(base).clone(memory_format=torch.contiguous_format)
        geometry = target.size(), target.stride(), target.storage_offset()
        known.as_strided(*geometry).copy_(numbers)
        setattr(base, _PLACES, known)
    elif base is not None:
        setattr(base, _PLACES, _constant(UNKNOWN, base.shape))
    return numbers.expand(target.shape)


Rule = Callable[[Any, Any, Any, Any], Any]


def _rules() -> dict[Any, Rule]:
    groups: list[tuple[Rule, str]] = [
        (
            _move,
            "permute transpose t expand unsqueeze squeeze select slice split split_with_sizes "
            "unbind flip roll diagonal unfold repeat pixel_shuffle pixel_unshuffle alias detach "
            "lift_fresh rot90 channel_shuffle",
        ),
        (_complex, "view_as_complex view_as_real"),
        (_view, "view _unsafe_view reshape _reshape_alias"),
        (
            _same,
            "clone _to_copy native_layer_norm native_group_norm native_batch_norm "
            "_native_batch_norm_legit _native_batch_norm_legit_no_training cudnn_batch_norm "
            "_fused_rms_norm _softmax _log_softmax _safe_softmax "
            "native_dropout bernoulli _conj contiguous "
            "masked_fill masked_fill_ dropout cumsum",
        ),
        (_pointwise, "hardswish hardsigmoid hardtanh silu gelu elu leaky_relu mish relu6"),
        (_concatenate, "cat stack"),
        (_pad, "constant_pad_nd"),
        (_index, "index index_select gather take_along_dim"),
        (_patches, "im2col"),
        (_reduce, "sum mean amax amin var std var_mean linalg_vector_norm any all"),
        (_product, "mm bmm addmm baddbmm"),
        (
            _attention,
            "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
            "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_cudnn_attention "
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        (_convolve, "convolution _convolution"),
        (_pool, "max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d"),
        (
            _resize,
            "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d "
            "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d upsample_linear1d "
            "upsample_nearest1d upsample_trilinear3d upsample_nearest3d _upsample_bilinear2d_aa "
            "_upsample_bicubic2d_aa _upsample_nearest_exact2d",
        ),
        (_write, "copy_"),
    ]
    return {
        getattr(aten, name): rule
        for rule, names in groups
        for name in names.split()
        if hasattr(aten, name)
    }


RULES = _rules()
"""Rules by operator, whatever its overload."""
