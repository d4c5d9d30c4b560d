"""`export`: a patched model as a program that runs without this library."""

from __future__ import annotations

import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsiattn.errors import ExportFailed, InvalidOption, InvalidType
from sparsiattn.runtime.patch_state import state_of, unwrap
from sparsiattn.serialization.exporters.formats import Run, _flat, check, written
from sparsiattn.serialization.exporters.program import kernels_used, traced, twin_of
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
    """Write a model, as it is patched now, as a program that needs neither this library nor the
    model's own, and compare its outputs with the model's before the file is put in place.

    input: images ``[B, C, H, W]`` like those to come, on the model's device. format: ``"pt2"``
    (torch.export), ``"onnx"`` (torch's exporter with ``dynamo=True``, run in onnxruntime), or
    ``"aoti"`` (an AOTInductor package; needs a C++ compiler). kernel: ``"gather"``, ``"sdpa"`` or
    ``"reference"``, None for the fastest of these: other kernels run code of their own.
    dynamic_batch: the program takes any batch size, else that of ``input``. tolerance: the largest
    difference allowed, as a share of the largest output where that is above 1. Choices among keys
    whose scores agree to the last digits may fall otherwise in another runtime.

    The model stays as it is. Raises `InvalidOption` for what cannot be exported, with the reason:
    token counts that depend on values (``keep="adaptive"``) have no fixed shapes; `ExportFailed`
    where a program cannot be made or differs by more than allowed, and nothing is written then.

    >>> import tempfile, sparsiattn
    >>> from sparsiattn.testing.hosts import tiny_images, tiny_vit
    >>> model, images = tiny_vit(), tiny_images(2)
    >>> with tempfile.TemporaryDirectory() as folder, sparsiattn.patch(model, "random", k=0.25):
    ...     made = export(model, images, f"{folder}/vit.pt2")
    ...     program = torch.export.load(made.path).module()
    ...     torch.allclose(program(tiny_images(5)), model(tiny_images(5)), atol=1e-5)
    True
    """
    form, place = check(format), Path(path)
    _check(input, place, tolerance)
    if place.suffix != form.suffix:
        raise InvalidOption(f"a file of format {format!r} ends in {form.suffix!r}, got {place}")
    twin = twin_of(model, kernel)
    example = input.detach()
    if dynamic_batch and len(example) < 2:  # a batch of one would be taken for a constant
        example = example.expand(2, *example.shape[1:]).contiguous()
    served = kernels_used(state_of(twin), example, twin)
    program = traced(twin, example, dynamic_batch)
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as folder:
        run = written(form, program, example, Path(folder) / place.name)
        batches = tuple(dict.fromkeys((len(example), 1, 3) if dynamic_batch else (len(example),)))
        difference = _compare(run, twin, example, batches, tolerance, format)
        files = _move(Path(folder), place)
    live = state_of(twin)
    return ExportResult(
        path=place, format=format, model=type(unwrap(model)).__name__,
        strategy=None if live is None else live.strategy.name, kernels=served,
        input_shape=tuple(example.shape), dynamic_batch=dynamic_batch, batches=batches,
        max_difference=difference, tolerance=tolerance,
        bytes=sum(file.stat().st_size for file in files), files=tuple(map(str, files)),
    )  # fmt: skip


def _check(images: Any, path: Path, tolerance: float) -> None:
    if not isinstance(images, Tensor):
        raise InvalidType(f"input must be a tensor of images, got {type(images).__name__}")
    if not images.is_floating_point() or not images.numel():
        raise InvalidOption(f"input must hold images, got {tuple(images.shape)} {images.dtype}")
    if not tolerance > 0:
        raise InvalidOption(f"tolerance must be above 0, got {tolerance!r}")
    if path.is_dir():
        raise InvalidOption(f"export() needs the path of a file, {path} is a directory")


def _compare(
    run: Run, twin: nn.Module, example: Tensor, batches: tuple[int, ...], allowed: float, name: str
) -> float:
    """The largest difference over batches of noise. Raises `ExportFailed` above what is allowed."""
    worst = 0.0
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        noise = torch.randn(batch, *example.shape[1:], generator=generator).to(example)
        with torch.no_grad():
            wanted = _flat(twin(noise))
        try:
            found = run(noise)
        except Exception as error:  # of the runtime
            raise ExportFailed(f"the {name} program fails at batch {batch}: {error}") from error
        if [one.shape for one in found] != [one.shape for one in wanted]:
            raise ExportFailed(
                f"the {name} program gives {[tuple(one.shape) for one in found]} at batch {batch}, "
                f"the model {[tuple(one.shape) for one in wanted]}"
            )
        for mine, theirs in zip(found, wanted, strict=True):
            worst = max(worst, _difference(mine, theirs, allowed, name, batch))
    return worst


def _difference(mine: Tensor, theirs: Tensor, allowed: float, name: str, batch: int) -> float:
    theirs = theirs.to(mine.device)
    found = float((mine.double() - theirs.double()).abs().max()) if mine.numel() else 0.0
    scale = max(1.0, float(theirs.double().abs().max())) if mine.numel() else 1.0
    if not found <= allowed * scale:
        raise ExportFailed(
            f"the {name} program differs from the model by {found:.1e} at batch {batch}, more than "
            f"{allowed:.0e}: nothing was written. Where keys or tokens have nearly equal scores "
            "another runtime may choose others; tolerance= allows more"
        )
    return found


def _move(folder: Path, place: Path) -> list[Path]:
    """What was written into its place, the main file last."""
    files = sorted(folder.iterdir(), key=lambda file: file.name == place.name)
    for file in files:
        if file.is_dir():
            shutil.rmtree(place.parent / file.name, ignore_errors=True)
        file.replace(place.parent / file.name)
    return [place.parent / file.name for file in files]
