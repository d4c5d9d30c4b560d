"""Peak memory of a call, from what the allocators report to torch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes on this kind of device above what was taken before, at the peak of the call."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    results: Any = recorded.profiler.kineto_results
    kind = "CUDA" if device.type == "cuda" else "CPU"
    events = [
        event
        for event in results.events()
        if event.name() == "[memory]" and event.device_type().name == kind
    ]
    taken = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        peak = max(peak, taken)
    return peak
