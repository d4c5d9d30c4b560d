"""What `export` gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ExportResult:
    """A program on disk that answered as the model does. ``print`` it, or take `to_dict`.

    path: what to load; bytes: its size. format: ``"onnx"``, ``"pt2"`` or ``"aoti"``. strategy: None
    for a dense model. input_shape, dynamic_batch: of the images it takes.
    max_difference: the largest absolute difference to the eager model's outputs, over all batch
    sizes in ``batches``, on images it was not made with. tolerance: what was allowed, relative to
    the largest output where that is above 1. kernels: how many sites each kernel serves;
    ``"dense"`` is the host's own attention. files: all that was written.
    """

    path: Path
    format: str
    model: str
    strategy: str | None
    kernels: dict[str, int]
    input_shape: tuple[int, ...]
    dynamic_batch: bool
    batches: tuple[int, ...]
    max_difference: float
    tolerance: float
    bytes: int
    files: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        shape = "x".join(map(str, self.input_shape[1:]))
        batch = "any" if self.dynamic_batch else str(self.input_shape[0])
        served = ", ".join(f"{name} at {n} sites" for name, n in self.kernels.items())
        return (
            f"{self.model}, {self.strategy or 'not patched'}, as {self.format}: batch {batch} of "
            f"{shape}{f', kernels: {served}' if served else ''}\n"
            f"largest difference to eager {self.max_difference:.1e} (allowed {self.tolerance:.0e}) "
            f"at batches {', '.join(map(str, self.batches))}\n"
            f"wrote {self.path}, {self.bytes / 1e6:.1f} MB"
        )
