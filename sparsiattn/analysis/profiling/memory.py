"""Peak memory of a call, from allocator events in torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Peak memory of a call in bytes on a type of device, above the memory in use before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    results: Any = recorded.profiler.kineto_results
    kind = "CUDA" if device.type == "cuda" else "CPU"
    memory = [event for event in results.events() if event.name() == "[memory]"]
    events = [event for event in memory if event.device_type().name == kind]
    events.sort(key=lambda event: event.start_ns())
    # positive events allocate bytes, negative events free them
    return int(max(accumulate((event.nbytes() for event in events), initial=0)))
