"""Attention calls that are not attention between tokens: over channels, or in a head that returns
one vector for the image. Shapes of the dry run tell, not names."""

from __future__ import annotations

from sparsiattn.errors import ProbeFailed
from sparsiattn.patching.discovery.meta_model import image_inputs, meta_copy
from sparsiattn.patching.discovery.probe import AttentionCall, probe


def over_channels(call: AttentionCall) -> bool:
    """Whether the rows of the scores are channels (XCiT, DaViT, EdgeNeXt): as many, times the
    heads, as the module's input is wide, and each as long as that has tokens."""
    given, (rows, length) = call.given, call.q[-2:]
    if given is None or len(given) not in (3, 4) or len(call.q) != 4 or call.k[-2] != rows:
        return False
    windows, heads = call.q[:2]
    for axis in {-1} if len(given) == 3 else {1, -1}:
        width = given[axis]
        tokens = given.numel() // (width * windows)
        if (rows * heads, length) == (width, tokens):
            return length * heads != width or _grow_longer(call, axis)
    return False


def _grow_longer(call: AttentionCall, axis: int) -> bool:
    """As many channels a head as tokens, so that shapes fit both readings: whether twice the tokens
    make the rows longer, not more. Modules bound to their count of tokens attend to tokens."""
    assert call.given is not None
    shape = list(call.given)
    shape[1 if axis == -1 else 2] *= 2
    try:
        again = probe(meta_copy(call.module), image_inputs(call.module, tuple(shape))).calls
    except ProbeFailed:
        return False
    return bool(again) and again[0].q[-1] > call.q[-1]


def pools(call: AttentionCall) -> bool:
    """Whether the module makes one vector of the image's tokens and one more of its own (the
    attention head of CLIP's ResNets): of all its rows only that one's is used."""
    given, returned = call.given, call.returned
    if given is None or returned is None or len(returned) != 2 or returned[0] != 1:
        return False
    counts = [given.numel() // given[axis] for axis in (1, -1)] if len(given) > 2 else []
    return any(call.q[-2] == count + 1 for count in counts)
