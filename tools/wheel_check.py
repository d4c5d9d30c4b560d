"""Build the sdist and a wheel from it, install the wheel into a new environment and use it there.

If the wheel was built with a C compiler, the environment has no access to one, and the compiled
code must run nevertheless. For the environment see `plugin_check`. Needs pip and setuptools >= 77.

    python tools/wheel_check.py [FOLDER]    # stores sdist and wheel in FOLDER
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from plugin_check import ROOT, environment, run, wheel

IN_WHEEL = (
    "sparsiattn/__init__.pyi",
    "sparsiattn/py.typed",
    "sparsiattn_backbones/py.typed",
    "sparsiattn/training/recipes/sparsifiner_deit_small.yaml",
    "sparsiattn/kernels/native/attention.c",
    "sparsiattn/registry/plugin_template/pyproject.toml.txt",
)
NOT_IN_WHEEL = ("tests/", "tools/", "benchmarks/", "docs/", "examples/")
USE = """
import timm, torch, sparsiattn
from sparsiattn.training import recipes
assert sparsiattn.__file__.startswith({root!r}), sparsiattn.__file__
assert not any(plugin.error for plugin in sparsiattn.list_plugins().values())
model, x = timm.create_model("test_vit").eval(), torch.randn(1, 3, 160, 160)
with torch.inference_mode():
    dense = model(x)
    # at 101 tokens, selecting keys by logits costs more than it saves
    for name, saves in (("connectivity", False), ("token_drop", True), ("bilevel", True)):
        with sparsiattn.patch(model, name) as patch:
            assert not torch.equal(model(x), dense), name
            assert (patch.report().macs < patch.report().macs_dense) == saves, name
    assert torch.equal(model(x), dense)
assert recipes()
print(sparsiattn.__version__, "works")
"""
# without a compiler, a cache or a warmup
USE_COMPILED = """
import shutil, timm, torch, sparsiattn
assert sparsiattn.__file__.startswith({root!r}), sparsiattn.__file__
assert not any(map(shutil.which, ("cc", "gcc", "clang")))
model, x = timm.create_model("deit_small_patch16_224").eval(), torch.randn(1, 3, 224, 224)
with torch.inference_mode(), sparsiattn.patch(model, "connectivity", k=0.1) as patch:
    model(x)
    report = patch.report()
kernels = {{site.kernel for site in report.sites}}
assert kernels == {{"native"}}, (kernels, report.sites[0].refusals)
assert not report.native_faults, report.native_faults
print("compiled code runs without a compiler")
"""


def sdist(work: Path) -> Path:
    """Build the source archive of a copy without generated files."""
    copy = work / "checkout"
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "site")
    shutil.copytree(ROOT, copy, ignore=skip)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    run([sys.executable, "-c", code], copy)
    (archive,) = (copy / "dist").glob("*.tar.gz")
    return archive


def unpacked(archive: Path, work: Path) -> Path:
    with tarfile.open(archive) as file:
        file.extractall(work / "unpacked", filter="data")
    (folder,) = (work / "unpacked").iterdir()
    return folder


def check_names(built: Path) -> None:
    names = zipfile.ZipFile(built).namelist()
    missing = [name for name in IN_WHEEL if name not in names]
    foreign = [name for name in names if name.startswith(NOT_IN_WHEEL)]
    if missing or foreign:
        raise SystemExit(f"{built.name}: missing {missing}, unexpected {foreign}")


def compiles() -> bool:
    return any(map(shutil.which, ("clang",) if os.name == "nt" else ("cc", "gcc", "clang")))


def use_compiled(built: Path, python: Path, work: Path) -> None:
    if "-py3-none-" not in built.name:
        raise SystemExit(f"{built.name} is not for every Python")
    if built.stem.endswith("-any"):
        raise SystemExit(f"{built.name} has no compiled code, although there is a compiler")
    away = {"PATH": str(python.parent), "CC": "", "SPARSIATTN_CACHE": str(work / "cache")}
    run([python, "-c", USE_COMPILED.format(root=str(work))], work, **away)


def main(arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        archive = sdist(work)
        built = wheel(unpacked(archive, work), work)
        check_names(built)
        python = environment(work / "environment")
        install = ["install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", built]
        run([sys.executable, "-m", "pip", "--python", python, *install], work)
        run([python, "-c", USE.format(root=str(work))], work)
        if compiles():
            use_compiled(built, python, work)
        for command in ("list --json", "doctor --json"):
            words = [str(python), "-m", "sparsiattn", *command.split()]
            subprocess.run(words, cwd=work, check=True, stdout=subprocess.DEVNULL)
        for keep in arguments:
            Path(keep).mkdir(parents=True, exist_ok=True)
            for file in (archive, built):
                shutil.copy(file, keep)


if __name__ == "__main__":
    main(sys.argv[1:])
