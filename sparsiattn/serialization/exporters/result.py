"""`ExportResult`: the result of `export`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ExportResult:
    """An exported program whose outputs equal the model's. Print it, or use `to_dict`.

    Attributes:
        path: Path of the file to load.
        format: ``"onnx"``, ``"pt2"`` or ``"aoti"``.
        model: Class name of the model.
        strategy: Name of the strategy; None if the model is not patched.
        kernels: Number of sites by kernel; ``"dense"`` is the host's own attention.
        input_shape: Shape of the example images, ``(B, C, H, W)``.
        dynamic_batch: Whether the program takes any batch size.
        batches: Batch sizes at which it was compared with the model.
        max_difference: Largest absolute difference from the eager model's outputs, on images other
            than the example.
        tolerance: Allowed difference, relative to the largest output if that is above 1.
        bytes: Size of all files in bytes.
        files: Paths of all files.

    >>> result = ExportResult(
    ...     path=Path("vit.pt2"), format="pt2", model="VisionTransformer", strategy="topk",
    ...     kernels={"gather": 12}, input_shape=(2, 3, 224, 224), dynamic_batch=True,
    ...     batches=(2, 1, 3), max_difference=2.6e-6, tolerance=1e-4, bytes=88_000_000,
    ...     files=("vit.pt2",),
    ... )
    >>> print(result)
    VisionTransformer, topk, as pt2: batch any of 3x224x224, kernels: gather at 12 sites
    largest difference to eager 2.6e-06 (allowed 1e-04) at batches 2, 1, 3
    wrote vit.pt2, 88.0 MB
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
        """Plain data for JSON, with one entry per field."""
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

    # a terminal or notebook shows the last value by its repr
    __repr__ = __str__
