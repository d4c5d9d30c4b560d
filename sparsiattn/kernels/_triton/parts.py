"""What the forward and the backward kernel share: who attends, to which keys, with which logits."""

import triton
import triton.language as tl

# triton's interpreter keeps bfloat16 as the bits of an integer, and would multiply those
WIDEN = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)
"""Logits are kept in units of log 2, because exp2 is what the hardware computes."""


@triton.jit
def program_work(heads, tiles, parts):
    """Image, head, tile and part of the tile that this program computes. Parts of one tile and
    tiles of one head are neighbours, so that keys stay in the cache."""
    program = tl.program_id(0)
    part = program % parts
    tile = (program // parts) % tiles
    pair = program // parts // tiles
    image, head = pair // heads, pair % heads
    return image.to(tl.int64), head.to(tl.int64), tile.to(tl.int64), part


@triton.jit
def query_tokens(order, weight, tile, part, slots, ROWS: tl.constexpr):
    """Patch queries in this part of a tile, and which of its slots hold one of their own."""
    slot = part * ROWS + tl.arange(0, ROWS)
    valid = slot < slots
    if order is None:
        token = tile + slot
    else:
        token = tl.load(order + tile * slots + slot, mask=valid, other=0)
    if weight is not None:
        valid = valid & (tl.load(weight + tile * slots + slot, mask=valid, other=0.0) > 0.0)
    return token, valid


@triton.jit
def key_tokens(place, chosen, held, table, keys, prefix, UNIT: tl.constexpr):
    """Keys at these places of a list, and which of the places hold one."""
    present = place < keys
    if table is None:
        token = tl.load(chosen + place, mask=present, other=0)
    else:
        listed = present & (place >= prefix)
        unit = (place - prefix) // UNIT
        slot = (place - prefix) % UNIT
        block = tl.load(chosen + unit, mask=listed, other=0)
        token = tl.load(table + block * UNIT + slot, mask=listed, other=0) + prefix
        token = tl.where(listed, token, place)
        if held is not None:
            in_prefix = place < prefix
            size = tl.load(held + unit, mask=listed, other=0)
            present = present & (in_prefix | (slot < size))
    return token, present


@triton.jit
def at_rows(token, stride, WIDTH: tl.constexpr):
    """Offsets of whole rows, ``[len(token), WIDTH]``."""
    return token[:, None] * stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def within(present, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Mask of the elements of rows ``[len(present), PADDED]`` that exist."""
    mask = present[:, None]
    if WIDTH < PADDED:
        mask = mask & (tl.arange(0, PADDED) < WIDTH)[None, :]
    return mask


@triton.jit
def host_logits(host, offsets, pairs, BOOLEAN: tl.constexpr, LOWEST: tl.constexpr):
    """The host's mask at some pairs; what lies at ``LOWEST`` or below forbids."""
    stored = tl.load(host + offsets, mask=pairs, other=0)
    if BOOLEAN:
        bias = tl.where(stored != 0, 0.0, float("-inf"))
    else:
        bias = stored.to(tl.float32)
        if LOWEST is not None:
            bias = tl.where(bias > LOWEST, bias, float("-inf"))
    return bias * LOG2E


@triton.jit
def cell_logits(rows, offsets, pairs):
    """Logits of summary keys; minus infinity where a cell has none to stand for."""
    return tl.load(rows + offsets, mask=pairs, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def product(a, b, acc=None):
    """``a @ b + acc`` in single precision at least, never in TF32."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
