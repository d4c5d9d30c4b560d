"""Attention calls that are not attention between tokens: over channels, or in a head that returns
one vector for the image. Shapes of the dry run tell, not names."""

from __future__ import annotations

from sparsiattn.errors import ProbeFailed
from sparsiattn.patching.discovery.meta_model import image_inputs, meta_copy
from sparsiattn.patching.discovery.probe import AttentionCall, probe


def over_channels(call: AttentionCall) -> bool:
    """Whether the rows of the scores are channels (XCiT, DaViT, EdgeNeXt).

    They are as many, times the heads, as the module's input is wide, and each as long as that has
    tokens.
    """
    shape, (rows, length) = call.input_shape, call.q[-2:]
    if shape is None or len(shape) not in (3, 4) or len(call.q) != 4 or call.k[-2] != rows:
        return False
    windows, heads = call.q[:2]
    for axis in {-1} if len(shape) == 3 else {1, -1}:
        width = shape[axis]
        tokens = shape.numel() // (width * windows)
        if (rows * heads, length) == (width, tokens):
            return length * heads != width or _grow_longer(call, axis)
    return False


def _grow_longer(call: AttentionCall, axis: int) -> bool:
    """Whether twice the tokens make the rows longer, not more.

    Where a head has as many channels as there are tokens, shapes fit both readings. Modules bound
    to their count of tokens attend to tokens.
    """
    assert call.input_shape is not None
    shape = list(call.input_shape)
    shape[1 if axis == -1 else 2] *= 2
    try:
        again = probe(meta_copy(call.module), image_inputs(call.module, tuple(shape))).calls
    except ProbeFailed:
        return False
    return bool(again) and again[0].q[-1] > call.q[-1]


def pools(call: AttentionCall) -> bool:
    """Whether the module makes one vector of the image's tokens and one more of its own.

    Of all rows of its attention only the one of that more is used (the head of CLIP's ResNets).
    """
    shape, output = call.input_shape, call.output_shape
    if shape is None or output is None or len(output) != 2 or output[0] != 1:
        return False
    counts = [shape.numel() // shape[axis] for axis in (1, -1)] if len(shape) > 2 else []
    return any(call.q[-2] == count + 1 for count in counts)
