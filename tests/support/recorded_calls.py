"""Calls of the compiled code with all their memory, to be made again on another processor."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sparsiattn.kernels.native import biased, build, gradients, lists, merge, ops, rows
from sparsiattn.kernels.native.entries import ENTRIES


@dataclass
class Recorded:
    """One call.

    Attributes:
        name: Of the function, a key of `ENTRIES`.
        packed: Its struct.
        before: What each pointer points to, by its offset in the struct; nothing for the function
            that runs regions in threads.
        addresses: Of the same.
        results: What was there afterwards, of pointers to what the operator returned.
    """

    name: str
    packed: bytes
    before: dict[int, bytes]
    addresses: dict[int, int]
    results: dict[int, Tensor]

    def to_bytes(self) -> bytes:
        """As replay.c reads it."""
        parts = [_number(len(self.name)), self.name.encode()]
        parts += [_number(len(self.packed)), self.packed, _number(len(self.before))]
        for offset, memory in self.before.items():
            parts += [_number(offset), _number(len(memory)), memory]
        return b"".join(parts)


def _number(x: int) -> bytes:
    return struct.pack("<q", x)


def offsets_of_pointers(layout: str) -> list[int]:
    """Where in a struct its pointers are."""
    one_by_one = re.sub(r"(\d+)(\w)", lambda m: int(m[1]) * m[2], layout.removeprefix("@"))
    return [struct.calcsize(f"@{one_by_one[:i]}0P") for i, x in enumerate(one_by_one) if x == "P"]


def record(function: Callable[[], Any]) -> list[Recorded]:
    """What a function calls.

    The results of a call are those tensors that ``function`` returns.
    """
    seen: dict[int, Tensor] = {}
    calls: list[Recorded] = []
    addresses_of = ops.addresses_of

    def noting(*tensors: Tensor | None) -> list[int]:
        seen.update({x.data_ptr(): x for x in tensors if x is not None})
        return addresses_of(*tensors)

    def recording(name: str, run: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        def call(packed: bytes) -> Any:
            calls.append(_before(name, packed, seen))
            return run(packed)

        return call

    code = build.code()
    wrapped = {name: recording(name, getattr(code, name)) for name in ENTRIES}
    with pytest.MonkeyPatch.context() as patch:
        for module in (ops, rows, lists, gradients, merge, biased):
            patch.setattr(module, "addresses_of", noting)
        patch.setattr(build._state, "code", replace(code, **wrapped))
        returned = [x for x in tree_leaves(function()) if isinstance(x, Tensor)]
    for call in calls:
        found = {x.data_ptr(): x for x in returned}
        call.results = {o: found[at] for o, at in call.addresses.items() if at in found}
        assert call.results, f"nothing that {call.name} writes was returned"
    return calls


def _before(name: str, packed: bytes, seen: dict[int, Tensor]) -> Recorded:
    call = Recorded(name, packed, {}, {}, {})
    for offset in offsets_of_pointers(ENTRIES[name].call.format):
        (address,) = struct.unpack_from("@P", packed, offset)
        if not address:
            continue
        call.addresses[offset] = address
        call.before[offset] = b"" if address == build.code().parallel else _memory(seen[address])
    return call


def _memory(x: Tensor) -> bytes:
    """All bytes from where a tensor begins to where its memory ends."""
    storage = x.untyped_storage()
    start = x.data_ptr() - storage.data_ptr()
    return torch.empty(0, dtype=torch.uint8).set_(storage)[start:].numpy().tobytes()


def results_of(calls: list[Recorded], replayed: bytes) -> list[list[Tensor]]:
    """What replay.c wrote, as tensors like those of ``results``, call by call."""
    found, at = [], 0
    for call in calls:
        tensors = []
        for offset, memory in call.before.items():
            like = call.results.get(offset)
            if like is not None:
                part = bytearray(replayed[at : at + len(memory)])
                flat = torch.frombuffer(part, dtype=like.dtype)
                tensors.append(flat.as_strided(like.shape, like.stride()))
            at += len(memory)
        found.append(tensors)
    assert at == len(replayed)
    return found
