"""Rules for how operators change the pixel numbers of their arguments; see `pixel_tracking`.

Each rule takes an operator, its arguments, keyword arguments and result, and returns the pixel
numbers of the results, or None where they are not known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from sparsiattn.patching.discovery.pixel_numbers import (
    PADDING,
    PLACES,
    UNKNOWN,
    constant,
    numbers_of,
    places_in,
    thin,
)

aten = torch.ops.aten


def _move(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """For operators that only move data: apply the same operator to the numbers."""
    return func(numbers_of(args[0]), *args[1:], **kwargs)


def _shift(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """For operators that move elements along given dimensions; keeps expanded dimensions small."""
    numbers = numbers_of(args[0])
    if kwargs or not args[-1] or len(args) < len(func._schema.arguments):  # over the flat tensor
        return func(numbers, *args[1:], **kwargs)  # type: ignore[no-any-return]
    moved: Tensor = func(thin(numbers), *args[1:])
    return moved.expand(out.shape)


def _view(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    numbers, shape = numbers_of(args[0]), list(out.shape)
    try:
        return numbers.view(shape)
    except RuntimeError:  # a copy is needed; it stays small along trailing expanded dimensions
        small = _alike(numbers)
    before, after = _constant_tail(small, shape)
    for dim in range(small.dim() - before, small.dim()):
        small = small.narrow(dim, 0, 1)
    return small.reshape([*shape[: len(shape) - after], *[1] * after]).expand(shape)


def _constant_tail(numbers: Tensor, shape: Sequence[int]) -> tuple[int, int]:
    """How many trailing dimensions are expanded, and how many of a new shape those become."""
    before = after = 0
    inner = outer = 1
    tail = 0, 0
    for stride, size in zip(reversed(numbers.stride()), reversed(numbers.shape), strict=True):
        if stride and size > 1:
            break
        before, inner = before + 1, inner * size
        while outer < inner and after < len(shape):
            after += 1
            outer *= shape[-after]
        if outer == inner:
            tail = before, after
    return tail


def _alike(numbers: Tensor) -> Tensor:
    """The same numbers, with stride 0 along every dimension in which they are all equal."""
    small = thin(numbers)
    for dim in range(small.dim()):
        first = small.narrow(dim, 0, 1) if small.shape[dim] else small
        if small.shape[dim] > 1 and bool((small == first).all()):
            small = first
    return small.expand(numbers.shape)


def _same(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """For operators that keep every element's position: norms, softmax, copies, dtype changes."""
    first = out[0] if isinstance(out, (tuple, list)) else out
    numbers = numbers_of(args[0])
    return (numbers,) if numbers.shape == first.shape else (None,)


def pointwise(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """For pointwise operators: the agreed numbers of the operands that have some."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    total: Tensor | None = None
    for numbers in (places_in(x) for x in tensors):
        if numbers is not None:
            total = numbers if total is None else _agreed(total, numbers)
    assert total is not None
    first = out[0] if isinstance(out, (tuple, list)) else out
    # the same object if nothing changes, so that the cache works in later blocks
    return (total if total.shape == first.shape else total.expand(first.shape),)


def _agreed(a: Tensor, b: Tensor) -> Tensor:
    """Combine two tensors of numbers: pixel numbers take precedence, then the first operand."""
    if a is b:
        return a
    thin_a, thin_b = thin(a), thin(b)
    if a.shape == b.shape and thin_a.shape == thin_b.shape and torch.equal(thin_a, thin_b):
        return a
    neither = torch.where(thin_b >= 0, thin_b, torch.maximum(thin_a, thin_b))
    return torch.where(thin_a >= 0, thin_a, neither)


def _complex(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """For conversions between pairs of numbers and complex numbers (rotary embeddings)."""
    if out.is_complex():
        return numbers_of(args[0])[..., 0]
    return numbers_of(args[0]).unsqueeze(-1).expand(out.shape)


def _concatenate(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    parts = [numbers_of(x) for x in args[0] if x.dim() == out.dim() or func is not _CAT]
    if func is not _CAT:
        return func(parts, *args[1:], **kwargs)  # type: ignore[no-any-return]
    along = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    for dim in range(out.dim()):  # keep expanded dimensions small
        if dim != along and all(x.stride(dim) == 0 or x.shape[dim] == 1 for x in parts):
            parts = [x.narrow(dim, 0, 1) for x in parts]
    return torch.cat(parts, along).expand(out.shape)


_CAT = aten.cat.default


def _pad(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    numbers, sides = numbers_of(args[0]), args[1]
    for i in range(numbers.dim()):  # `sides` starts with the last dimension
        dim = numbers.dim() - 1 - i
        is_padded = any(sides[2 * i : 2 * i + 2])
        if not is_padded and numbers.stride(dim) == 0 and numbers.shape[dim] > 1:
            numbers = numbers.narrow(dim, 0, 1)
    padded: Tensor = aten.constant_pad_nd(numbers, sides, PADDING)
    return padded.expand(out.shape)


def _index(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
    """For gathered elements, if the indices have values or do not matter."""
    numbers, *rest = args
    numbers = numbers_of(numbers)
    indices = [x for x in tree_leaves((rest, kwargs)) if isinstance(x, Tensor)]
    if any(x.is_meta for x in indices):
        if not _is_indifferent(func, numbers, rest) or any(x.dtype == torch.bool for x in indices):
            return None
        rest, kwargs = tree_map(_first_choice, (rest, kwargs))
    gathered: Tensor = func(numbers, *rest, **kwargs)
    return gathered


def _is_indifferent(func: Any, numbers: Tensor, rest: Any) -> bool:
    """Whether the numbers are constant along the dimensions that an operator indexes."""
    if func.overloadpacket is aten.index:
        dims = [dim for dim, index in enumerate(rest[0]) if index is not None]
    else:
        dims = [rest[0]]
    return all(numbers.stride(dim) == 0 or numbers.shape[dim] == 1 for dim in dims)


def _first_choice(index: Any) -> Any:
    is_meta = isinstance(index, Tensor) and index.is_meta
    return torch.zeros(index.shape, dtype=torch.long, device="cpu") if is_meta else index


def _patches(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """For `torch.nn.functional.unfold`, which pads with zeros and needs floating-point numbers."""
    shifted = (numbers_of(args[0]) - PADDING).double()
    return func(shifted, *args[1:], **kwargs).to(torch.int32) + PADDING  # type: ignore[no-any-return]


def _reduce(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """For reductions: the number of the terms if all are equal, else `UNKNOWN`."""
    numbers, dims = numbers_of(args[0]), _argument(func, args, kwargs, "dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(numbers.dim()))
    dims = sorted({dim % numbers.dim() for dim in dims}, reverse=True)
    agreed = thin(numbers)
    for dim in dims:
        low, high = agreed.amin(dim, keepdim=True), agreed.amax(dim, keepdim=True)
        agreed = torch.where(low == high, low, UNKNOWN).to(torch.int32)
    results = out if isinstance(out, (tuple, list)) else (out,)
    if not _argument(func, args, kwargs, "keepdim"):
        for dim in dims:
            agreed = agreed.squeeze(dim)
    return [agreed.expand(result.shape) for result in results]


def _argument(func: Any, args: Any, kwargs: Any, name: str) -> Any:
    """An operator's argument by name; None if it was not passed."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            return args[i] if i < len(args) else kwargs.get(name)
    return None


def _product(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
    """For matrix products."""
    left, right = args[-2:] if func.overloadpacket in _ADDING else args[:2]
    if left.dim() < 2 or right.dim() < 2:
        return None
    return _multiplied(places_in(left), numbers_of(right), out.shape)


def _multiplied(left: Tensor | None, right: Tensor, shape: torch.Size) -> Tensor:
    """Numbers of a product: those of the rows, or of the columns if the rows are constants.

    Args:
        left: Numbers of the left factor; None if no image is tracked in it.
        right: Those of the right factor.
        shape: Shape of the product.
    """
    columns = thin(right[..., :1, :])
    if left is None:
        return columns.expand(shape)
    rows = thin(left[..., :1])
    # attention over channels: rows are channels, all with the same numbers, columns are tokens
    alike = rows.shape[-2] == 1 < columns.shape[-1] and not bool((rows == UNKNOWN).any())
    return (columns if alike else rows).expand(shape)


def _linear(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
    """For ``linear(x, weight, bias)``."""
    x, weight = args[:2]
    if x.dim() < 2 or weight.dim() != 2:
        return None
    return _multiplied(places_in(x), numbers_of(weight).mT, out.shape)


_ADDING = (aten.addmm, aten.baddbmm, aten.addbmm)


def _attention(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """For attention: the numbers of the queries."""
    return (numbers_of(args[0])[..., :1].expand(out[0].shape),)


def _whole_attention(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """For `scaled_dot_product_attention`: its two products, so that channels can attend, too."""
    q, k, v, *rest = args
    lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    shape = torch.Size((*lead, q.shape[-2], k.shape[-2]))
    scores = None
    if places_in(q) is not None or places_in(k) is not None:
        scores = _multiplied(places_in(q), numbers_of(k).mT, shape)
    mask = places_in(rest[0]) if rest and rest[0] is not None else None
    if mask is not None:
        scores = mask.expand(shape) if scores is None else _agreed(scores, mask.expand(shape))
    return _multiplied(scores, numbers_of(v), out.shape)


def _convolve(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor | None:
    """For convolutions: the number at the centre of each window, of the first channel."""
    x, weight, _, stride, padding, dilation, transposed = args[:7]
    if transposed:
        return None
    centres = [
        _centres(size, n, step, dil * (kernel - 1) // 2 - pad)
        for size, n, step, pad, dil, kernel in zip(
            x.shape[2:], out.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    return _sampled(numbers_of(x), centres, out.shape)


def _pool(func: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """For pooling with kernel, stride and padding: as `_convolve`."""
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
    return (_sampled(numbers_of(x), centres, first.shape),)


def _resize(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """For resizing and adaptive pooling: the number at the nearest position."""
    x, dims = args[0], out.dim() - 2
    places = [
        ((torch.arange(n, device="cpu") * 2 + 1) * size // (2 * n)).clamp_max(size - 1)
        for size, n in zip(x.shape[-dims:], out.shape[-dims:], strict=True)
    ]
    return _sampled(numbers_of(x), places, out.shape)


def _centres(size: int, count: int, step: int, first: int) -> Tensor:
    return (torch.arange(count, device="cpu") * step + first).clamp(0, size - 1)


def _sampled(numbers: Tensor, places: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """The numbers at these positions of the trailing dimensions, the same for every channel."""
    numbers = numbers.narrow(1, 0, 1) if numbers.dim() > len(places) + 1 else numbers
    for i, index in enumerate(places):
        numbers = numbers.index_select(numbers.dim() - len(places) + i, index)
    return numbers.expand(tuple(shape))


def _write(func: Any, args: Any, kwargs: Any, out: Tensor) -> Tensor:
    """For ``x.copy_(y)``; if ``x`` is a view, its base gets the numbers, too."""
    target, numbers = args[0], numbers_of(args[1])
    base = target._base
    if base is not None and base.is_contiguous():
        known = numbers_of(base).clone(memory_format=torch.contiguous_format)
        geometry = target.size(), target.stride(), target.storage_offset()
        known.as_strided(*geometry).copy_(numbers)
        setattr(base, PLACES, known)
    elif base is not None:
        setattr(base, PLACES, constant(UNKNOWN, base.shape))
    return numbers.expand(target.shape)


Rule = Callable[[Any, Any, Any, Any], Any]


def _rules() -> dict[Any, Rule]:
    groups: list[tuple[Rule, str]] = [
        (
            _move,
            "permute transpose t expand unsqueeze squeeze select slice split split_with_sizes "
            "unbind diagonal unfold repeat pixel_shuffle pixel_unshuffle alias detach "
            "lift_fresh rot90 channel_shuffle",
        ),
        (_shift, "flip roll"),
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
        (pointwise, "hardswish hardsigmoid hardtanh silu gelu elu leaky_relu mish relu6"),
        (_concatenate, "cat stack"),
        (_pad, "constant_pad_nd"),
        (_index, "index index_select gather take_along_dim"),
        (_patches, "im2col"),
        (_reduce, "sum mean amax amin var std var_mean linalg_vector_norm any all"),
        (_product, "mm bmm addmm baddbmm"),
        (_linear, "linear"),
        (_whole_attention, "scaled_dot_product_attention"),
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
"""Rules by operator, for all of its overloads."""
