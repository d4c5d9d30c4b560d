"""What is installed, what works here, and the command that mends what does not."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from typing import Any

import torch

from sparsiattn.kernels import xformers as fmha
from sparsiattn.patching.text import aligned
from sparsiattn.registry.listing import list_kernels, list_plugins

CORE = (
    "torch",
    "timm",
    "pluggy",
    "einops",
    "safetensors",
    "numpy",
    "typer",
    "rich",
    "huggingface_hub",
)
EXTRAS = {
    "train": ("accelerate", "torchvision", "yaml"),
    "hf": ("transformers",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "viz": ("matplotlib", "sklearn"),
    "xformers": ("xformers",),
}
_DISTRIBUTION = {"yaml": "pyyaml", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. status: ``"ok"``, ``"missing"`` (an extra that is not there),
    ``"off"`` (cannot work on this machine) or ``"broken"``. fix: a command, empty where there is
    nothing to mend."""

    group: str
    name: str
    status: str
    detail: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found. works: whether the core can run. findings: a `Finding` each for what
    was looked at, good and bad."""

    works: bool
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines: list[str] = []
        for group in dict.fromkeys(one.group for one in self.findings):
            rows = [one for one in self.findings if one.group == group]
            lines += [f"{group}:", *(f"  {line}" for line in aligned([_row(one) for one in rows]))]
        fixes = dict.fromkeys(one.fix for one in self.findings if one.fix)
        if fixes:
            lines += ["to mend or to add:", *(f"  {fix}" for fix in fixes)]
        lines.append("the core works" if self.works else "the core does NOT work")
        return "\n".join(lines)


def _row(one: Finding) -> tuple[str, ...]:
    return one.name, one.status, one.detail


def doctor() -> Diagnosis:
    """Versions, devices, kernels and plug-ins of this installation, and a patch tried and undone.

    >>> doctor().works
    True
    """
    findings = [Finding("system", "python", "ok", f"{platform.python_version()} {sys.platform}")]
    findings += [Finding("system", name, "ok", detail) for name, detail in _devices()]
    findings += [_package("core", name, f"pip install -U {name}") for name in CORE]
    for extra, names in EXTRAS.items():
        fix = f"pip install 'sparsiattn[{extra}]'"
        findings += [_package(f"extra {extra}", name, fix) for name in names]
    findings += [
        Finding("kernels", name, "off" if info.reasons else "ok", "; ".join(info.reasons))
        for name, info in list_kernels().items()
    ]
    findings += [_plugin(plugin) for plugin in list_plugins().values()]
    trial = _trial()
    return Diagnosis(trial.status == "ok", (*findings, trial))


def _devices() -> list[tuple[str, str]]:
    found = [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = f"{about.total_memory / 2**30:.0f} GiB"
        found.append((f"cuda:{index}", f"{about.name}, {memory}, {about.major}.{about.minor}"))
    return found


def _package(group: str, name: str, fix: str) -> Finding:
    """Importing is the test: wheels of another torch are installed, and fail only then."""
    try:
        version = metadata.version(_DISTRIBUTION.get(name, name))
    except metadata.PackageNotFoundError:
        return Finding(group, name, "broken" if group == "core" else "missing", "", fix)
    # a wheel of xformers for another torch imports, says so on stderr, and fails when it is used
    problem = fmha.probe().reason if name == "xformers" else _problem(lambda: import_module(name))
    if not problem:
        return Finding(group, name, "ok", version)
    again = f"pip install --force-reinstall --no-deps {_DISTRIBUTION.get(name, name)}"
    return Finding(group, name, "broken", f"{version}: {problem}", again)


def _problem(action: Callable[[], Any]) -> str | None:
    """The first line of what went wrong; an import may raise anything at all."""
    try:
        action()
    except Exception as error:
        text = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {text[0]}"
    return None


def _plugin(plugin: Any) -> Finding:
    if not plugin.broken:
        return Finding("plug-ins", plugin.name, "ok", plugin.distribution)
    fix = f"pip install -U {plugin.distribution}" if plugin.distribution else ""
    return Finding("plug-ins", plugin.name, "broken", str(plugin.error), fix)


def _trial() -> Finding:
    """A small model, patched, run and restored."""
    from sparsiattn.patching.apply import patch
    from sparsiattn.testing.hosts import tiny_images, tiny_vit

    def action() -> None:
        model, images = tiny_vit(), tiny_images(1)
        with torch.no_grad():
            before = model(images)
            with patch(model, "connectivity", k=0.2):
                changed = not torch.equal(model(images), before)
            restored = torch.equal(model(images), before)
        if not (changed and restored):
            raise RuntimeError(f"patched output differs: {changed}, restored: {restored}")

    problem = _problem(action)
    return Finding("trial", "patch and undo", "ok" if problem is None else "broken", problem or "")
