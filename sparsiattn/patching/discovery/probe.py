"""Finds in one dry run which modules call attention, how often and with which shapes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsiattn.attention.layout import HostCall
from sparsiattn.attention.packing import PackedInput, PackedPart, Packing
from sparsiattn.errors import ProbeFailed
from sparsiattn.patching.discovery.host_records import HostRecords
from sparsiattn.patching.discovery.meta_model import MetaInputs, run_dry, shapes
from sparsiattn.patching.discovery.pixel_numbers import places_in
from sparsiattn.patching.discovery.pixel_tracking import PixelNumbers, tracking_places
from sparsiattn.patching.discovery.position_tables import PositionTables
from sparsiattn.patching.discovery.whole_operators import WholeLinearTrial, whole_attention
from sparsiattn.runtime.hook_tools import first_argument, first_tensor
from sparsiattn.runtime.image import read_packing
from sparsiattn.runtime.lifting import without_scores
from sparsiattn.runtime.multihead import WatchWeights, Weights
from sparsiattn.runtime.sdpa_intercept import pop, push


@dataclass(frozen=True)
class MapSource:
    """The convolution that made the tokens of a dry run's image.

    Attributes:
        name: Module path.
        size: Rows and columns of its output; the frames of a video are stacked vertically.
    """

    name: str
    size: tuple[int, int]


@dataclass(frozen=True)
class AttentionCall:
    """The attention calls of one module in the dry run, with a batch of one image.

    Attributes:
        name: Path of the innermost module that was running when attention was called.
        module: That module, in the copy.
        parents: Its ancestors, from the root down to its parent.
        q: Shape of the query.
        k: Shape of the key.
        v: Shape of the value.
        mask: Shape of the mask; None if there is none.
        mask_dtype: Dtype of the mask; None if there is none.
        causal: Whether attention was causal.
        count: Number of calls in one forward pass.
        lengths: Number of queries of each of these calls; -1 for a call with another number of
            keys.
        uniform: Whether all of these calls had the same shapes.
        weights: Whether the attention weights that `nn.MultiheadAttention` also returns are used.
        lifted: Whether the module computes attention with plain operations; see
            `sparsiattn.runtime.lifting`.
        input_shape: Shape of the module's first input tensor.
        output_shape: Shape of its first output tensor.
        aspect: Height over width of the image, in patches.
        q_places: Number of the pixel that each query comes from, in the shape of ``q`` without the
            last dimension; None if no image is known. See
            `sparsiattn.patching.discovery.pixel_tracking`.
        k_places: The same for keys.
        image: Shape of the image that the pixel numbers refer to.
        map: The convolution that makes the tokens, and the size of its output.
        sums_bias: Whether its mask is the sum of one term per key row and one per key column; see
            `FactoredBias`.
        parts: The images (or clips, or windows) of these calls, if they are parts of a sequence of
            several images; else empty.
    """

    name: str
    module: nn.Module
    parents: tuple[nn.Module, ...]
    q: torch.Size
    k: torch.Size
    v: torch.Size
    mask: torch.Size | None
    mask_dtype: torch.dtype | None
    causal: bool
    count: int = 1
    uniform: bool = True
    weights: Weights = "unasked"
    lifted: bool = False
    input_shape: torch.Size | None = None
    output_shape: torch.Size | None = None
    aspect: float = 1.0
    q_places: Tensor | None = field(default=None, repr=False, compare=False)
    k_places: Tensor | None = field(default=None, repr=False, compare=False)
    image: tuple[int, ...] = ()
    map: MapSource | None = None
    sums_bias: bool = False
    lengths: tuple[int, ...] = ()
    parts: tuple[PackedPart, ...] = ()

    def nearest(self, attribute: str) -> Any:
        """The attribute of the module or of its closest ancestor that has it; else None."""
        for module in (self.module, *reversed(self.parents)):
            value = getattr(module, attribute, None)
            if value is not None:
                return value
        return None


def _joined(before: AttentionCall, latest: AttentionCall) -> AttentionCall:
    """Merge the record of a module's earlier calls with its latest call."""
    alike = (before.q, before.k, before.v) == (latest.q, latest.k, latest.v)
    return replace(
        latest,
        count=before.count + 1,
        lengths=before.lengths + latest.lengths,
        uniform=before.uniform and alike,
        lifted=before.lifted or latest.lifted,
    )


def _home_name(name: str, module: nn.Module) -> str:
    """Name of the module whose attention this is: for an `nn.Softmax`, its parent."""
    return name.rpartition(".")[0] if isinstance(module, nn.Softmax) else name


class _Recorder:
    """Records attention calls, with hooks on every module that track the innermost one."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        pixels: PixelNumbers,
        tally: Any,
        packed: PackedInput | None = None,
    ) -> None:
        self.calls: OrderedDict[str, AttentionCall] = OrderedDict()
        self.packed = packed
        self.packing: Packing | None = None
        self.pixels, self.tally = pixels, tally
        self.running = True  # hooks that stay in the copy are called in other traces, too
        self.map: MapSource | None = None
        self.listed = {
            f"{name}.{child}".lstrip(".")
            for name, module in modules.items()
            if isinstance(module, (nn.ModuleList, nn.Sequential))
            for child in module._modules
        }
        self.entered: dict[str, Tensor | None] = {}
        self.heads: dict[str, str] = {}
        self.trial = WholeLinearTrial()
        self.watched: dict[str, WatchWeights] = {}
        self.input_shapes: dict[str, torch.Size] = {}
        self.output_shapes: dict[str, torch.Size] = {}
        self.positions = PositionTables()
        self.hooks: list[RemovableHandle] = []
        self._placed: dict[Any, tuple[Any, dict[str, Any]]] = {}
        for name, module in modules.items():
            if isinstance(module, nn.MultiheadAttention):
                self.watched[name] = WatchWeights(module)
            parents = tuple(_parents(modules, name))
            key = -1 - id(module)  # negative: the keys of patched sites count up from 1
            opener = self._opener(name, module, parents, key)
            hooks = (
                module.register_forward_pre_hook(opener, with_kwargs=True),
                module.register_forward_hook(self._closer(name, key), always_call=True),
            )
            if name not in self.watched:  # watched modules keep the hooks of the probe
                self.hooks += hooks
            self.trial.names[key] = _home_name(name, module)

    def clear(self) -> None:
        self.calls.clear()
        if self.tally is not None:
            self.tally.clear()
        self.entered.clear()
        self.heads.clear()
        self.map = None
        self.positions.clear()
        self.trial.clear()
        for watched in self.watched.values():
            watched.clear()

    def note_operator(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """See every operator of the run."""
        if self.tally is not None:
            self.tally(func, args, kwargs, out)
        if self.packed is not None:
            self.positions.note_operator(func, args, out)

    def _opener(self, name: str, module: nn.Module, parents: Any, key: int) -> Any:
        def record(call: HostCall) -> Tensor:
            latest = AttentionCall(
                name,
                module,
                parents,
                q=call.q.shape,
                k=call.k.shape,
                v=call.v.shape,
                mask=None if call.mask is None else call.mask.shape,
                mask_dtype=None if call.mask is None else call.mask.dtype,
                causal=call.causal,
                lifted=self.trial.attending,
                sums_bias=self.trial.is_sum(call.mask),
                lengths=(call.q.shape[-2] if call.q.shape[-2] == call.k.shape[-2] else -1,),
                **self._places(call),
            )
            before = self.calls.get(name)
            self.calls[name] = latest if before is None else _joined(before, latest)
            return whole_attention(call) if self.running else call.dense()

        def open_scope(_: nn.Module, args: Any, kwargs: Any) -> None:
            _note(self.input_shapes, name, (*args, *kwargs.values()))
            if self.packed is not None:
                self.positions.note_arguments((*args, *kwargs.values()))
                if self.packed.module == name:
                    self.packing = read_packing(self.packed, module, args, kwargs)
            self._note_entrance(name, first_argument(args, kwargs))
            push(record, key)

        return open_scope

    def _places(self, call: HostCall) -> dict[str, Any]:
        """The pixels that queries and keys come from, as fields of `AttentionCall`."""
        places = [places_in(x) for x in (call.q, call.k)]
        key = tuple(map(id, places))
        if key not in self._placed:
            rows, image = self.pixels.of_one_image([x if x is None else x[..., 0] for x in places])
            fields = {"q_places": rows[0], "k_places": rows[1], "image": image}
            self._placed[key] = places, fields  # keeps `places` alive, since keys are ids
        return {**self._placed[key][1], "map": self.map}

    def _note_entrance(self, name: str, x: Tensor | None) -> None:
        """Record the inputs of container elements, and the first module in each with that input."""
        if name in self.listed:
            self.entered[name] = x
        outer = name
        while "." in outer:
            outer = outer.rpartition(".")[0]
            if x is not None and self.entered.get(outer) is x:
                self.heads.setdefault(outer, name)

    def entrances(self) -> tuple[str, ...]:
        """Modules around attention whose input a checkpoint may pass again in recomputation."""
        around = [a for a in self.entered if any(name.startswith(f"{a}.") for name in self.calls)]
        names = [name for a in around for name in (a, self.heads.get(a)) if name is not None]
        return tuple(dict.fromkeys(names))

    def _note_map(self, name: str, module: nn.Module, output: Any) -> None:
        """Record the first convolution over the image."""
        is_map = isinstance(module, (nn.Conv2d, nn.Conv3d)) and isinstance(output, Tensor)
        if is_map and self.map is None and places_in(output) is not None:
            rows, columns = output.shape[-2:]
            frames = output.shape[2] if isinstance(module, nn.Conv3d) else 1
            self.map = MapSource(name, (frames * rows, columns))

    def _closer(self, name: str, key: int) -> Any:
        def close(module: nn.Module, args: Any, output: Any) -> Any:
            pop(key)
            self._note_map(name, module, output)
            output = without_scores(output, home=key)
            values = output if isinstance(output, (tuple, list)) else (output,)
            _note(self.output_shapes, name, values)
            return output

        return close


def _note(shapes: dict[str, torch.Size], name: str, values: Sequence[Any]) -> None:
    tensor = first_tensor(values)
    if tensor is not None:
        with torch._C.DisableTorchFunction():  # a mode would see this read in every module
            shapes[name] = tensor.shape


def _parents(modules: Mapping[str, nn.Module], name: str) -> Iterator[nn.Module]:
    """Ancestors of a module, from the root down."""
    if name:
        yield modules[""]
    end = name.find(".")
    while end >= 0:
        yield modules[name[:end]]
        end = name.find(".", end + 1)


@dataclass(frozen=True)
class Probe:
    """The record of a dry run.

    Attributes:
        calls: Attention calls in order.
        softmaxes: ``(module name, description)`` of every other softmax.
        returned: Shapes of the model's output tensors.
        read_by_hooks: Names of modules whose tensors the host's own hooks use.
        entrances: Modules around attention whose input a checkpoint may pass again in
            recomputation: elements of containers, and the first module in each.
        positions: Tables of the rows and columns of patches, if the model takes several images as
            one sequence.
        packing: Sizes of the images in the sequence of several that the model took; None if it took
            none, or if they have no values in this run.
    """

    calls: list[AttentionCall]
    softmaxes: list[tuple[str, str]]
    returned: list[torch.Size]
    read_by_hooks: frozenset[str] = frozenset()
    entrances: tuple[str, ...] = ()
    positions: PositionTables = field(default_factory=PositionTables)
    packing: Packing | None = None


def probe(
    model: nn.Module, inputs: MetaInputs, tally: Any = None, packed: PackedInput | None = None
) -> Probe:
    """Find every attention call of a model, including attention in plain operations.

    Args:
        model: A `meta_copy`; its `nn.MultiheadAttention` modules keep the hooks of the probe.
        inputs: The inputs of the copy.
        tally: Called with every operator of the run, see `tracking_places`; cleared if the run
            starts again.
        packed: How the model takes several images as one sequence, according to its adapter.

    Raises:
        InvalidOption: The sizes of these images do not add up to the number of patches.
        ProbeFailed: The model does not run with these inputs.
    """
    modules = dict(model.named_modules())
    records = HostRecords(modules)
    recorder = _Recorder(modules, PixelNumbers(inputs), tally, packed)
    records.leave_out(modules)
    with tracking_places(recorder.note_operator):
        output = _run(model, inputs, recorder)
        if records.watch(dict(model.named_modules())):  # the host registered hooks in this run
            recorder.clear()
            output = _run(model, inputs, recorder)
    recorder.running = False
    for hook in recorder.hooks:
        hook.remove()
    weights = {name: watched.verdict() for name, watched in recorder.watched.items()}
    returned = shapes(output)
    del output  # had to be alive until here: see `WatchWeights.verdict`
    calls = [
        replace(
            call,
            weights=weights.get(call.name, "unasked"),
            input_shape=recorder.input_shapes.get(call.name),
            output_shape=recorder.output_shapes.get(call.name),
        )
        for call in recorder.calls.values()
    ]
    softmaxes = recorder.trial.softmaxes.items()
    others = [(name or "(root)", what) for name, what in softmaxes if name not in recorder.calls]
    read = frozenset(records.readers)
    seen = recorder.entrances(), recorder.positions, recorder.packing
    return Probe(calls, others, returned, read, *seen)


def _run(model: nn.Module, inputs: MetaInputs, recorder: _Recorder) -> Any:
    try:
        with recorder.trial:
            return run_dry(model, inputs, recorder.clear)
    except ProbeFailed:  # the host accepts only plain tensors as scores
        recorder.clear()
        return run_dry(model, inputs, recorder.clear)
