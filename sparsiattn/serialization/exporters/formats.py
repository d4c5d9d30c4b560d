"""The three formats: how each is written, and how it is run again."""

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
from sparsiattn.serialization.exporters.operators import translations

Run = Callable[[Tensor], list[Tensor]]
Program = torch.export.ExportedProgram

_INLINE = 1_500_000_000
"""Bytes of weights up to which an ONNX model is one file; the format itself ends at 2 GiB."""


class Format(NamedTuple):
    """needs: packages beside torch; suffix: of its files; write: program, example and path to a
    file; read: a file as a function from images to flat outputs."""

    needs: tuple[str, ...]
    suffix: str
    write: Callable[[Program, Tensor, Path], None]
    read: Callable[[Path, Program], Run]


def check(name: str) -> Format:
    """Raises `InvalidOption` for an unknown format or where a package is missing."""
    found = FORMATS.get(name)
    if found is None:
        raise InvalidOption(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    missing = [package for package in found.needs if find_spec(package) is None]
    if missing:
        raise InvalidOption(
            f"format {name!r} needs {', '.join(missing)}: pip install 'sparsiattn[export]'"
        )
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters' own chatter is of no use to who called them; their errors are."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _write_pt2(program: Program, images: Tensor, path: Path) -> None:
    torch.export.save(program, path)


def _read_pt2(path: Path, program: Program) -> Run:
    module = torch.export.load(path).module()

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return _flat(module(images))

    return run


def _write_aoti(program: Program, images: Tensor, path: Path) -> None:
    from torch._inductor import aoti_compile_and_package

    with torch.no_grad():
        aoti_compile_and_package(program, package_path=str(path))


def _read_aoti(path: Path, program: Program) -> Run:
    from torch._inductor import aoti_load_package

    model = aoti_load_package(str(path))

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return _flat(model(images))

    return run


def _write_onnx(program: Program, images: Tensor, path: Path) -> None:
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    made: Any = torch.onnx.export(
        program, (images,), dynamo=True, verbose=False, custom_translation_table=translations()
    )
    made.save(str(path), external_data=weights > _INLINE)


def _read_onnx(path: Path, program: Program) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(out) for out in session.run(None, {name: images.cpu().numpy()})]

    return run


def _flat(outputs: Any) -> list[Tensor]:
    """All tensors of what a model returned, in order."""
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def written(form: Format, program: Program, images: Tensor, path: Path) -> Run:
    """The program in a file, read again. Raises `ExportFailed`."""
    try:
        with quiet():
            form.write(program, images, path)
            return form.read(path, program)
    except Exception as error:  # exporters, compilers and runtimes each have their own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = [line for line in lines if "No ONNX function" in line] or lines[:2]
        raise ExportFailed(
            f"{path.name} cannot be made: {' '.join(cause) or type(error).__name__}"
        ) from error


FORMATS = {
    "onnx": Format(("onnx", "onnxscript", "onnxruntime"), ".onnx", _write_onnx, _read_onnx),
    "pt2": Format((), ".pt2", _write_pt2, _read_pt2),
    "aoti": Format((), ".pt2", _write_aoti, _read_aoti),
}
