"""Compiles the C library into the package where there is a compiler; pyproject.toml says the rest.

With it the wheel is `py3-none-PLATFORM`: ctypes loads the library, so it fits every Python and
torch. Without it the wheel is for any platform; `sparsiattn doctor` says what it lacks.
"""

from __future__ import annotations

import shutil
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
LIBRARIES = Path("sparsiattn", "kernels", "native", "lib")


def toolchain() -> Any:
    """toolchain.py alone: the package needs torch, which is not there when a wheel is built."""
    spec = spec_from_file_location("toolchain", HERE / LIBRARIES.parent / "toolchain.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class WithLibraries(Distribution):  # type: ignore[misc]
    """The distribution, and the libraries that were compiled for it; None before that."""

    libraries_built: list[Path] | None = None

    def build_libraries(self) -> list[Path]:
        """Compile them, once."""
        if self.libraries_built is None:
            self.libraries_built, failures = toolchain().compile_levels(HERE / "build" / "native")
            for failure in failures:
                print(f"sparsiattn: not compiled: {failure}", file=sys.stderr)
            if not self.libraries_built:
                print("sparsiattn: no compiled code; `gather` does its work", file=sys.stderr)
        return self.libraries_built

    def has_ext_modules(self) -> bool:
        """Whether files are of one platform: setuptools lays the wheel out by that."""
        return bool(self.libraries_built)


class BuildPy(build_py):  # type: ignore[misc]
    """Puts the libraries beside the Python files; in an editable install, into the checkout."""

    def run(self) -> None:
        super().run()
        target = (HERE if self.editable_mode else Path(self.build_lib)) / LIBRARIES
        shutil.rmtree(target, ignore_errors=True)
        for library in self.distribution.build_libraries():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, target)


class BdistWheel(bdist_wheel):  # type: ignore[misc]
    """A wheel for every Python of a platform, or of all where nothing was compiled."""

    def run(self) -> None:
        self.root_is_pure = not self.distribution.build_libraries()
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        *_, platform = super().get_tag()
        if sys.platform == "darwin" and not self.root_is_pure:
            kind = {"x86": "x86_64", "arm": "arm64"}[toolchain().machine()]
            platform = platform.replace("universal2", kind)
        return "py3", "none", platform


setup(distclass=WithLibraries, cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
