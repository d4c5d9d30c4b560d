"""`export`: write a patched model as a program that runs without this library."""

from __future__ import annotations

import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.errors import ExportFailed, InvalidOption, InvalidType
from sparsiattn.runtime.hook_tools import tensors_in
from sparsiattn.runtime.patch_state import state_of, unwrap
from sparsiattn.serialization.exporters.formats import Run, check, written
from sparsiattn.serialization.exporters.program import exportable_copy, kernels_used, traced
from sparsiattn.serialization.exporters.result import ExportResult

__all__ = ["ExportResult", "export"]


def export(
    model: nn.Module,
    input: Tensor,
    path: str | PathLike[str],
    format: str = "pt2",
    *,
    kernel: str | None = None,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> ExportResult:
    """Export a model in its current state as a program that runs without this library.

    The program does not need the model's own library either. Its outputs are compared with the
    model's before the file is written to its place. The model is not changed.

    Args:
        model: The model, patched or not.
        input: Example images ``[B, C, H, W]`` on the model's device.
        path: Path of the file.
        format: ``"pt2"`` (torch.export), ``"onnx"`` (torch's exporter with ``dynamo=True``, run in
            onnxruntime), or ``"aoti"`` (an AOTInductor package; needs a C++ compiler).
        kernel: ``"gather"``, ``"sdpa"`` or ``"reference"``; None for the fastest of these. Other
            kernels use custom code and cannot be exported.
        dynamic_batch: Whether the program takes any batch size; else only that of ``input``.
        tolerance: Largest allowed difference of an output, relative to the largest output if that
            is above 1. Another runtime may select other keys among nearly equal scores.

    Returns:
        The files, and the result of the comparison.

    Raises:
        InvalidOption: The model cannot be exported, for example as its numbers of tokens depend on
            values (``keep="adaptive"``).
        ExportFailed: The program cannot be created, or differs by more than ``tolerance``. Nothing
            is written then.

    >>> import tempfile, sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model, images = tiny_vit(), tiny_images(2)
    >>> with tempfile.TemporaryDirectory() as folder, sparsiattn.patch(model, "random", k=0.25):
    ...     result = export(model, images, f"{folder}/vit.pt2")
    ...     program = torch.export.load(result.path).module()
    ...     torch.allclose(program(tiny_images(5)), model(tiny_images(5)), atol=1e-5)
    True
    """
    form, place = check(format), Path(path)
    _check(input, place, tolerance)
    if place.suffix != form.suffix:
        raise InvalidOption(
            f"the path for format {format!r} must end in {form.suffix!r}, got {place}"
        )
    model_copy = exportable_copy(model, kernel)
    state = state_of(model_copy)
    example = input.detach()
    if dynamic_batch and len(example) < 2:  # torch.export treats a size of one as a constant
        example = example.expand(2, *example.shape[1:]).contiguous()
    kernels = kernels_used(state, example, model_copy)
    program = traced(model_copy, example, dynamic_batch)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as folder:
        run = written(form, program, example, Path(folder) / place.name)
        batches = tuple(dict.fromkeys((len(example), 1, 3) if dynamic_batch else (len(example),)))
        difference = _compare(run, model_copy, example, batches, tolerance, format)
        files = _move(Path(folder), place)
    return ExportResult(
        path=place,
        format=format,
        model=type(unwrap(model)).__name__,
        strategy=None if state is None else state.strategy.name,
        kernels=kernels,
        input_shape=tuple(example.shape),
        dynamic_batch=dynamic_batch,
        batches=batches,
        max_difference=difference,
        tolerance=tolerance,
        bytes=sum(file.stat().st_size for file in files),
        files=tuple(map(str, files)),
    )


def _check(images: Any, path: Path, tolerance: float) -> None:
    if not isinstance(images, Tensor):
        raise InvalidType(f"input must be a tensor of images, got {type(images).__name__}")
    if not images.is_floating_point() or not images.numel():
        raise InvalidOption(
            f"input must be floating-point images, got {tuple(images.shape)} {images.dtype}"
        )
    if not tolerance > 0:
        raise InvalidOption(f"tolerance must be above 0, got {tolerance!r}")
    if path.is_dir():
        raise InvalidOption(f"path must be a file, but {path} is a directory")


def _compare(
    run: Run, model: nn.Module, example: Tensor, batches: tuple[int, ...], allowed: float, name: str
) -> float:
    """The largest difference on batches of noise; raises `ExportFailed` if it is too large."""
    largest = 0.0
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        noise = torch.randn(batch, *example.shape[1:], generator=generator).to(example)
        with torch.no_grad():
            expected = tensors_in(model(noise))
        try:
            actual = run(noise)
        except Exception as error:  # any error of the runtime
            raise ExportFailed(f"the {name} program fails at batch {batch}: {error}") from error
        got, wanted = ([tuple(x.shape) for x in outputs] for outputs in (actual, expected))
        if got != wanted:
            raise ExportFailed(
                f"the {name} program returns shapes {got} at batch {batch}, the model {wanted}"
            )
        for outputs in zip(actual, expected, strict=True):
            largest = max(largest, _difference(*outputs, allowed, name, batch))
    return largest


def _difference(actual: Tensor, expected: Tensor, allowed: float, name: str, batch: int) -> float:
    if not actual.numel():
        return 0.0
    expected = expected.to(actual.device).double()
    difference = float((actual.double() - expected).abs().max())
    if not difference <= allowed * max(1.0, float(expected.abs().max())):  # NaN compares false
        raise ExportFailed(
            f"the {name} program differs from the model by {difference:.1e} at batch {batch}, more "
            f"than {allowed:.0e}: nothing was written. If keys or tokens have nearly equal scores, "
            "another runtime may select others; raise tolerance= to accept that"
        )
    return difference


def _move(folder: Path, place: Path) -> list[Path]:
    """Move the written files to their place, the main file last; returns their paths."""
    files = sorted(folder.iterdir(), key=lambda file: file.name == place.name)
    for file in files:
        if file.is_dir():
            shutil.rmtree(place.parent / file.name, ignore_errors=True)
        file.replace(place.parent / file.name)
    return [place.parent / file.name for file in files]
