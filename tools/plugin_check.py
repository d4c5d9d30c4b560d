"""Build the wheels of sparsiattn and of the plug-in template, and test them in a new environment.

The environment does not see the checkout. Torch, timm and the other dependencies are not downloaded
again: a .pth file adds the site-packages of the running interpreter after the environment's own,
which contain the wheels. The running interpreter needs pip and setuptools >= 77; no network is
needed.

    python tools/plugin_check.py [--slow] [more arguments for pytest]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "examples" / "plugin-template"


def wheel(source: Path, work: Path) -> Path:
    """Build the wheel of a copy, so that the tree is not changed and no stale files are used."""
    copy = work / "source" / source.name
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "benchmarks", "__pycache__")
    shutil.copytree(source, copy, ignore=skip)
    wheels = work / "wheels" / source.name
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir"]
    run([sys.executable, "-m", "pip", "wheel", *options, str(wheels), str(copy)], work)
    (built,) = wheels.glob("*.whl")
    return built


def environment(folder: Path) -> Path:
    """Create a virtual environment, and return its interpreter."""
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    inside = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site_packages = subprocess.run(
        [python, "-c", inside], capture_output=True, text=True, check=True
    )
    paths = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    # only paths: .pth files in these folders, such as an editable sparsiattn's, are not read
    Path(site_packages.stdout.strip(), "behind.pth").write_text("\n".join(paths) + "\n")
    return python


def run(command: list[str | Path], folder: Path, **environment: str) -> None:
    """Run a command in a folder without a checkout, and without the caller's import path."""
    hidden = ("PYTHONPATH", "PYTEST_ADDOPTS", "SPARSIATTN_PLUGINS", "SPARSIATTN_NATIVE")
    clean = {name: value for name, value in os.environ.items() if name not in hidden}
    words = [str(part) for part in command]
    subprocess.run(words, cwd=folder, env={**clean, **environment}, check=True)


def main(arguments: list[str]) -> None:
    slow = "--slow" in arguments
    extra = [argument for argument in arguments if argument != "--slow"]
    chosen = [] if slow else ["-m", "not slow"]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        wheels = [wheel(source, work) for source in (ROOT, TEMPLATE)]
        python = environment(work / "environment")
        install = ["install", "--quiet", "--no-deps", "--no-index", "--force-reinstall"]
        run([sys.executable, "-m", "pip", "--python", python, *install, *wheels], work)
        where = f"import sparsiattn, nearest_keys; root = {str(work)!r}; "
        where += "assert sparsiattn.__file__.startswith(root), sparsiattn.__file__; "
        run([python, "-c", where + "print(sparsiattn.__file__)"], work)
        tests = work / "source" / TEMPLATE.name / "tests"
        pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull]
        pytest += ["-W", "ignore::pytest.PytestUnknownMarkWarning", "--rootdir", str(tests)]
        run([*pytest, tests, *chosen, *extra], work)
        some = ["-k", "TestPlugins or TestStrategy"]
        run([*pytest, "--sparsiattn-suite", "nearest-keys", *some, *chosen, *extra], work)


if __name__ == "__main__":
    main(sys.argv[1:])
