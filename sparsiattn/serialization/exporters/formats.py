"""The three export formats, with functions that write and read each."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsiattn.errors import ExportFailed, InvalidOption
from sparsiattn.runtime.hook_tools import tensors_in
from sparsiattn.serialization.exporters.operators import translations

Run = Callable[[Tensor], list[Tensor]]
Program = torch.export.ExportedProgram

_INLINE = 1_500_000_000
"""Largest size of weights in bytes for an ONNX model in one file; the format's limit is 2 GiB."""


class Format(NamedTuple):
    """An export format.

    Attributes:
        needs: Packages that it needs besides torch.
        suffix: Suffix of its files.
        write: Writes a program, traced with the given images, to a file.
        read: Reads a file as a function from images to a list of outputs.
    """

    needs: tuple[str, ...]
    suffix: str
    write: Callable[[Program, Tensor, Path], None]
    read: Callable[[Path], Run]


def check(name: str) -> Format:
    """The format with this name.

    Raises:
        InvalidOption: There is no such format, or a package is missing.
    """
    form = FORMATS.get(name)
    if form is None:
        raise InvalidOption(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    missing = [package for package in form.needs if find_spec(package) is None]
    if missing:
        raise InvalidOption(
            f"format {name!r} needs {', '.join(missing)}: pip install 'sparsiattn[export]'"
        )
    return form


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and prints of the exporters inside the block; their errors are raised."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _write_pt2(program: Program, images: Tensor, path: Path) -> None:
    torch.export.save(program, path)


def _read_pt2(path: Path) -> Run:
    return _runner(torch.export.load(path).module())


def _runner(model: Callable[[Tensor], Any]) -> Run:
    @torch.no_grad()
    def run(images: Tensor) -> list[Tensor]:
        return tensors_in(model(images))

    return run


def _write_aoti(program: Program, images: Tensor, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    with torch.no_grad():
        aoti_compile_and_package(program, package_path=str(path))


def _read_aoti(path: Path) -> Run:
    from torch._inductor import aoti_load_package

    return _runner(aoti_load_package(str(path)))


def _write_onnx(program: Program, images: Tensor, path: Path) -> None:
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    onnx: Any = torch.onnx.export(
        program, (images,), dynamo=True, verbose=False, custom_translation_table=translations()
    )
    onnx.save(str(path), external_data=weights > _INLINE)


def _read_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(out) for out in session.run(None, {name: images.cpu().numpy()})]

    return run


def written(form: Format, program: Program, images: Tensor, path: Path) -> Run:
    """Write a program to a file and read it back.

    Args:
        form: The format.
        program: The program.
        images: The images that it was traced with.
        path: The file.

    Returns:
        The program as read from the file.

    Raises:
        ExportFailed: The program cannot be written or read.
    """
    try:
        with quiet():
            form.write(program, images, path)
            return form.read(path)
    except Exception as error:  # exporters, compilers and runtimes have their own errors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = [line for line in lines if "No ONNX function" in line] or lines[:2]
        raise ExportFailed(
            f"{path.name} cannot be created: {' '.join(cause) or type(error).__name__}"
        ) from error


FORMATS = {
    "onnx": Format(("onnx", "onnxscript", "onnxruntime"), ".onnx", _write_onnx, _read_onnx),
    "pt2": Format((), ".pt2", _write_pt2, _read_pt2),
    "aoti": Format((), ".pt2", _write_aoti, _read_aoti),
}
