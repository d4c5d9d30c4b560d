"""Recognises attention that is not between tokens, by shapes of the dry run and not by names.

It is attention over channels, or in a head that returns one vector per image.
"""

from __future__ import annotations

from sparsiattn.errors import ProbeFailed
from sparsiattn.patching.discovery.host_attributes import head_count
from sparsiattn.patching.discovery.meta_model import image_inputs, meta_copy
from sparsiattn.patching.discovery.probe import AttentionCall, probe


def over_channels(call: AttentionCall) -> bool:
    """Whether the rows of the scores are channels (XCiT, DaViT, EdgeNeXt).

    Rows times heads are then as many as the channels of the module's input, and a row is as long as
    the input has tokens.
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
    """Whether doubling the tokens makes rows longer instead of adding rows.

    If a head has as many channels as there are tokens, the shapes fit both cases. Modules that only
    run with a fixed number of tokens attend to tokens.
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
    """Whether the module pools the image's tokens, plus one token that it adds, to one vector.

    Only the attention row of the added token is then used (the head of CLIP's ResNets).
    """
    shape, output = call.input_shape, call.output_shape
    if shape is None or output is None or len(output) != 2 or output[0] != 1:
        return False
    counts = [shape.numel() // shape[axis] for axis in (1, -1)] if len(shape) > 2 else []
    return any(call.q[-2] == count + 1 for count in counts)


def heads_per_call(call: AttentionCall) -> int | None:
    """Number of heads in one call; 1 for a module that calls attention once per head."""
    heads = head_count(call.module)
    return 1 if len(call.q) == 3 and call.count == heads else heads
