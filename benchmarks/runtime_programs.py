"""How each runtime of ``runtimes.py`` gets its program, dense or patched."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import sparsiattn

Call = Callable[[], list[Tensor]]

# Keys whose scores agree to the last digits may be chosen otherwise: the rows give cosines instead.
TOLERANCE = 0.05


@dataclass
class Pair:
    """A model of which each side, dense or patched, is wanted in many runtimes.

    Attributes:
        model: The dense model, whose output is a tuple; it stays as it is.
        images: What it is run on, ``[B, C, H, W]``.
        line: Options of ``patch``.
        folder: For programs.
        threads: Of every runtime.
    """

    model: nn.Module
    images: Tensor
    line: dict[str, Any]
    folder: Path
    threads: int
    programs: dict[str, Path] = field(default_factory=dict)

    def side(self, side: str, prepare: Callable[[nn.Module], Any] = lambda model: None) -> Any:
        """A copy of the model, prepared, then patched if that is its side."""
        model = deepcopy(self.model)
        prepare(model)
        if side == "patched":
            example = self.images[:1].to(next(model.parameters()).dtype)
            sparsiattn.patch(model, **self.line, input=example)
        return model

    def onnx(self, side: str) -> Path:
        """An exported program, made once for all runtimes that read it."""
        if side not in self.programs:
            path = self.folder / f"{side}.onnx"
            with torch.inference_mode(False):
                images = self.images.clone()
                sparsiattn.export(self.side(side), images, path, "onnx", tolerance=TOLERANCE)
            self.programs[side] = path
        return self.programs[side]

    def arrays(self) -> Any:
        return self.images.numpy()


def _torch_call(model: nn.Module, images: Tensor) -> Call:
    @torch.inference_mode()
    def run() -> list[Tensor]:
        return [x.float() for x in model(images)]

    return run


def eager(pair: Pair, side: str) -> Call:
    model = pair.side(side)
    patch = sparsiattn.patch_of(model)
    if patch is not None:
        patch.warmup(pair.images)
    return _torch_call(model, pair.images)


def compiled(pair: Pair, side: str) -> Call:
    torch.compiler.reset()
    return _torch_call(torch.compile(pair.side(side)), pair.images)  # type: ignore[arg-type]


def bfloat16(pair: Pair, side: str) -> Call:
    model = pair.side(side, lambda model: model.to(torch.bfloat16))
    patch, images = sparsiattn.patch_of(model), pair.images.to(torch.bfloat16)
    if patch is not None:
        patch.warmup(images)
    return _torch_call(model, images)


def torchao_int8(pair: Pair, side: str) -> Call:
    """Weights and, by token, inputs of linear layers; compiled, as torchao asks for."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    def prepare(model: nn.Module) -> None:
        with torch.inference_mode(False):
            quantize_(model, Int8DynamicActivationInt8WeightConfig())

    torch.compiler.reset()
    return _torch_call(torch.compile(pair.side(side, prepare)), pair.images)  # type: ignore[arg-type]


def _onnxruntime(path: Path, pair: Pair) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = pair.threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: pair.arrays()}
    return lambda: [torch.from_numpy(x) for x in session.run(None, feed)]


def onnxruntime_fp32(pair: Pair, side: str) -> Call:
    return _onnxruntime(pair.onnx(side), pair)


def onnxruntime_int8(pair: Pair, side: str) -> Call:
    """Weights and, by tensor, inputs of linear layers, quantised as they come."""
    from onnxruntime.quantization import quantize_dynamic

    path = pair.folder / f"{side}-int8.onnx"
    quantize_dynamic(pair.onnx(side), path, op_types_to_quantize=["MatMul", "Gemm"])
    return _onnxruntime(path, pair)


def _openvino(model: Any, pair: Pair) -> Call:
    import openvino

    hints = {
        "INFERENCE_NUM_THREADS": pair.threads, "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }  # fmt: skip
    request = openvino.Core().compile_model(model, "CPU", hints).create_infer_request()
    feed = {0: pair.arrays()}
    return lambda: [torch.from_numpy(x) for x in request.infer(feed).to_tuple()]


def openvino_fp32(pair: Pair, side: str) -> Call:
    import openvino

    return _openvino(openvino.Core().read_model(pair.onnx(side)), pair)


def openvino_int8(pair: Pair, side: str) -> Call:
    """Weights and inputs of all layers, ranges from the images that are run."""
    import nncf
    import openvino

    model = openvino.Core().read_model(pair.onnx(side))
    known = nncf.Dataset([pair.arrays()])
    quantised = nncf.quantize(model, known, subset_size=1, model_type=nncf.ModelType.TRANSFORMER)
    return _openvino(quantised, pair)


class Runtime(NamedTuple):
    """What makes its calls, and the packages beside torch that it needs."""

    make: Callable[[Pair, str], Call]
    needs: tuple[str, ...] = ()


_ONNX = ("onnx", "onnxscript", "onnxruntime")
RUNTIMES = {
    "torch": Runtime(eager),
    "torch bfloat16": Runtime(bfloat16),
    "torch.compile": Runtime(compiled),
    "torchao int8, compiled": Runtime(torchao_int8, ("torchao",)),
    "ONNX Runtime": Runtime(onnxruntime_fp32, _ONNX),
    "ONNX Runtime int8": Runtime(onnxruntime_int8, _ONNX),
    "OpenVINO": Runtime(openvino_fp32, (*_ONNX, "openvino")),
    "OpenVINO int8": Runtime(openvino_int8, (*_ONNX, "openvino", "nncf")),
}


def missing(runtime: str) -> list[str]:
    """Packages that it needs and that are not installed."""
    return [package for package in RUNTIMES[runtime].needs if find_spec(package) is None]


def versions() -> dict[str, str]:
    """Of all packages of all runtimes that are installed."""
    packages = dict.fromkeys(p for runtime in RUNTIMES.values() for p in runtime.needs)
    return {p: metadata.version(p) for p in packages if find_spec(p) is not None}
