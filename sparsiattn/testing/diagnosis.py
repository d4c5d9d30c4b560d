"""`doctor`: checks which parts of an installation work, with commands that fix broken ones."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from typing import Any

import torch

from sparsiattn.errors import first_line
from sparsiattn.kernels import xformers as fmha
from sparsiattn.kernels.native import build as native
from sparsiattn.patching import patch_quietly
from sparsiattn.patching.text import aligned
from sparsiattn.registry import list_kernels, list_plugins
from sparsiattn.testing.hosts import tiny_images, tiny_vit

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
    "lazy_loader",
)
EXTRAS = {
    "train": ("accelerate", "torchvision", "yaml"),
    "hf": ("transformers",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "viz": ("matplotlib", "sklearn"),
    "xformers": ("xformers",),
}
_AGAIN = "pip install --force-reinstall --no-deps"
_DISTRIBUTION = {"yaml": "pyyaml", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        group: ``"core"``, ``"kernels"``, ``"extra train"`` ...
        name: Name of the package, kernel or plug-in.
        status: ``"ok"``, ``"missing"`` (an optional package that is not installed), ``"off"``
            (cannot work on this machine) or ``"broken"``.
        detail: Its version, or the problem.
        fix: A command that fixes the problem; empty if there is none.
    """

    group: str
    name: str
    status: str
    detail: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The result of `doctor`.

    Attributes:
        works: Whether a small model can be patched and restored.
        findings: The results of all checks.

    >>> diagnosis = doctor()
    >>> next(finding.status for finding in diagnosis.findings if finding.name == "torch")
    'ok'
    """

    works: bool
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        groups: dict[str, list[tuple[str, ...]]] = {}
        for row in self.findings:
            groups.setdefault(row.group, []).append((row.name, row.status, row.detail))
        lines = []
        for group, rows in groups.items():
            lines += [f"{group}:", *(f"  {line}" for line in aligned(rows))]
        fixes = dict.fromkeys(row.fix for row in self.findings if row.fix)
        if fixes:
            lines += ["to fix or to install:", *(f"  {fix}" for fix in fixes)]
        lines.append("the core works" if self.works else "the core does NOT work")
        return "\n".join(lines)

    # a terminal or notebook shows the last value by its repr
    __repr__ = __str__


def doctor() -> Diagnosis:
    """Check versions, devices, kernels and plug-ins, and patch and restore a small model.

    >>> doctor().works
    True
    """
    findings = [*_system(), *_packages()]
    for name, info in list_kernels().items():
        status = "off" if info.reasons else "ok"
        findings.append(Finding("kernels", name, status, "; ".join(info.reasons)))
    findings += native_code()
    findings += [_plugin(plugin) for plugin in list_plugins().values()]
    problem = _problem(_patch_and_undo)
    status = "broken" if problem else "ok"
    findings.append(Finding("trial", "patch and undo", status, problem or ""))
    return Diagnosis(not problem, tuple(findings))


def _system() -> Iterator[Finding]:
    yield Finding("system", "python", "ok", f"{platform.python_version()} {sys.platform}")
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    yield Finding("system", "cpu", "ok", cpu)
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        detail = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {gpu.major}.{gpu.minor}"
        yield Finding("system", f"cuda:{index}", "ok", detail)


def native_code() -> Iterator[Finding]:
    """The source of compiled code for the CPU, and faults of the package's own library."""
    for fault in native.faults():
        fix = "" if native.is_chosen() else f"{_AGAIN} sparsiattn"
        yield Finding("native code", "library", "broken", fault, fix)
    reason = native.problem()
    otherwise = reason or "none yet: patch.warmup(images) compiles it"
    status = "off" if reason else "ok"
    yield Finding("native code", "in use", status, native.source() or otherwise)


def _packages() -> Iterator[Finding]:
    for name in CORE:
        yield _package("core", name, f"pip install -U {name}")
    for extra, names in EXTRAS.items():
        for name in names:
            yield _package(f"extra {extra}", name, f"pip install 'sparsiattn[{extra}]'")


def _package(group: str, name: str, fix: str) -> Finding:
    """Check a package by importing it, as a wheel for another torch only fails then."""
    distribution = _DISTRIBUTION.get(name, name)
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return Finding(group, name, "broken" if group == "core" else "missing", "", fix)
    # a wheel of xformers for another torch can be imported, but fails when it is used
    problem = fmha.probe().reason if name == "xformers" else _problem(lambda: import_module(name))
    if not problem:
        return Finding(group, name, "ok", version)
    return Finding(group, name, "broken", f"{version}: {problem}", f"{_AGAIN} {distribution}")


def _problem(action: Callable[[], Any]) -> str | None:
    """The error of an action, on one line; None if it succeeds. Imports may raise any error."""
    try:
        action()
    except Exception as error:
        return first_line(error, named=True)
    return None


def _plugin(plugin: Any) -> Finding:
    if not plugin.broken:
        return Finding("plug-ins", plugin.name, "ok", plugin.distribution)
    fix = f"pip install -U {plugin.distribution}" if plugin.distribution else ""
    return Finding("plug-ins", plugin.name, "broken", str(plugin.error), fix)


def _patch_and_undo() -> None:
    """Raise if a small model cannot be patched, run and restored."""
    model, images = tiny_vit(), tiny_images(1)
    with torch.no_grad():
        before = model(images)
        with patch_quietly(model, "connectivity", k=0.2):
            changed = not torch.equal(model(images), before)
        restored = torch.equal(model(images), before)
    if not (changed and restored):
        raise RuntimeError(f"patched output differs: {changed}, restored: {restored}")
