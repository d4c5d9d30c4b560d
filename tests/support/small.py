"""Real architectures made small enough to run by the hundred: runs of equal blocks are cut to two,
only parameters that are left are ever allocated, and images are as small as the model takes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

KEPT = 2
_POOL = 1_000_003  # a prime, so that rows of a matrix filled from the pool differ


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made inside have real buffers and parameters without data."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta:
            empty = parameter.detach().to("meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build_light(make: Callable[[], nn.Module]) -> nn.Module:
    """``make()`` in eval mode without data in its parameters where that is possible: some models
    compute buffers on the device of their parameters, and are made in full."""
    with suppress(Exception), parameters_on_meta(), torch.no_grad():
        model = make().eval()
        for module in model.modules():
            if hasattr(module, "init_non_persistent_buffers"):
                # timm 1.0.23 fills them where parameters have data alone
                module.init_non_persistent_buffers()
        if not any(buffer.is_meta for buffer in model.buffers()):
            return model
    return make().eval()


def _signature(module: nn.Module) -> Any:
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    # what has no parameters may stand for a place in the forward (an activation, an identity)
    return (type(module), tuple(type(m) for m in module.modules()), shapes) if shapes else module


def _kept(signatures: list[Any]) -> list[int]:
    """Places that stay: of a repeated pattern of up to four blocks one turn, of a repeated block
    two (a shifted window follows one that is not)."""
    places = list(range(len(signatures)))
    for period in (1, 2, 3, 4):
        stay: list[int] = []
        for place in places:
            seen = [signatures[i] for i in (*stay, place)]
            turns = KEPT if period == 1 else 1
            tail, turn = seen[-period:], period * (turns + 1)
            if len(seen) < turn or seen[-turn:] != tail * (turns + 1):
                stay.append(place)
                continue
            del stay[len(stay) - period + 1 :]  # the turn that this block completes
        places = stay
    return places


def shorten(model: nn.Module) -> dict[nn.Module, OrderedDict[str, Any]]:
    """Cut runs of equal blocks; returns what the containers held, for `restore`."""
    before = {}
    for parent in list(model.modules()):
        if not isinstance(parent, (nn.Sequential, nn.ModuleList)):
            continue
        names, children = list(parent._modules), list(parent)
        places = _kept([_signature(child) for child in children])
        if len(places) == len(children):
            continue
        before[parent] = OrderedDict(parent._modules)
        numbered = all(name.isdigit() for name in names)
        parent._modules = OrderedDict(
            (str(i) if numbered else names[place], children[place])
            for i, place in enumerate(places)
        )
    return before


def restore(before: dict[nn.Module, OrderedDict[str, Any]]) -> None:
    for parent, children in before.items():
        parent._modules = children


def materialise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give parameters without data values: matrices of unit gain, norms about one, everything that
    starts near zero in most models (biases, layer scales, tokens) large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(_POOL, generator=generator)
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:
                value = _drawn(module, name, parameter, pool, len(made))
                made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[id(parameter)]
    return model


def _drawn(
    module: nn.Module, name: str, parameter: nn.Parameter, pool: Tensor, count: int
) -> Tensor:
    if not parameter.is_floating_point():
        return torch.zeros(parameter.shape, dtype=parameter.dtype)
    if parameter.dim() == 0:
        return torch.ones((), dtype=parameter.dtype)
    size, start = parameter.numel(), (count * 7919) % (_POOL // 2)
    flat = torch.cat([pool] * math.ceil((start + size) / _POOL))[start : start + size]
    value = flat.reshape(parameter.shape).to(parameter.dtype)
    if parameter.dim() == 1:
        return value * 0.1 + (1.0 if name == "weight" else 0.0)
    if "weight" in name:
        return value * (size / len(value)) ** -0.5
    return value * 0.5


def redraw_small(model: nn.Module) -> None:
    """Draw parameters anew that are all below 1e-3 in size: many branches and heads start at
    zero, and a change of attention there would show nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.is_floating_point() and parameter.abs().max() < 1e-3:
                parameter.normal_(std=0.1 if parameter.dim() == 1 else 0.02, generator=generator)
