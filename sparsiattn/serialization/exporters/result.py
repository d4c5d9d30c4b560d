"""What `export` gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ExportResult:
    """A program on disk that answered as the model does. ``print`` it, or take `to_dict`.

    Attributes:
        path: What to load.
        format: ``"onnx"``, ``"pt2"`` or ``"aoti"``.
        model: Class of the model.
        strategy: Name of the strategy; None for a dense model.
        kernels: How many sites each kernel serves; ``"dense"`` is the host's own attention.
        input_shape: Of the images that it was made with, ``(B, C, H, W)``.
        dynamic_batch: Whether it takes any batch size.
        batches: Batch sizes at which it was compared with the model.
        max_difference: The largest absolute difference to the eager model's outputs, on images it
            was not made with.
        tolerance: What was allowed, relative to the largest output where that is above 1.
        bytes: Size of all files.
        files: All that was written.
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
        """JSON form: one entry a field."""
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
