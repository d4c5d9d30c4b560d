"""Create the package of a new plug-in: a strategy, a kernel, their tests and a README."""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path

from sparsiattn.errors import InvalidOption
from sparsiattn.registry.hookspecs import PLUGIN_API
from sparsiattn.registry.registry import REGISTRY

TEMPLATES = Path(__file__).with_name("plugin_template")
# Suffix of the templates, so that no tool treats them as Python or imports them by mistake.
SUFFIX = ".txt"
NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
TAKEN = frozenset(
    ("sparsiattn", "sparsiattn_backbones", "sparsiattn_pytest", "torch", "timm", "test")
)


def new_plugin(name: str, directory: Path | str = ".") -> Path:
    """Write a plug-in package into a new folder with the name of the plug-in.

    Args:
        name: Name of the distribution: lower-case words joined by ``-`` or ``_``. The import
            package, the entry point and the strategy have the same name with ``_``.
        directory: Folder in which the new folder is created.

    Returns:
        The new folder.

    Raises:
        InvalidOption: The name is invalid or taken, or the folder exists.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(path.name for path in new_plugin("far-keys", folder).iterdir())
    ['README.md', 'pyproject.toml', 'src', 'tests']
    """
    _check_name(name)
    target = Path(directory) / name
    if target.exists():
        raise InvalidOption(f"{target} exists: choose another name, or another --directory")
    for path, text in rendered(name).items():
        file = target / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return target


def rendered(name: str) -> dict[str, str]:
    """Text of every file of a plug-in called ``name``, by its path in the plug-in's folder."""
    words = re.split("[-_]", name)
    package = "_".join(words)
    values = {
        "distribution": name,
        "package": package,
        "Class": "".join(word.capitalize() for word in words),
        "api": repr(PLUGIN_API),
    }
    files = {}
    for template in sorted(TEMPLATES.rglob(f"*{SUFFIX}")):
        text = template.read_text(encoding="utf-8")
        for key, value in values.items():
            text = text.replace("{{" + key + "}}", value)
        path = template.relative_to(TEMPLATES).as_posix().removesuffix(SUFFIX)
        files[path.replace("PACKAGE", package)] = text
    return files


def _check_name(name: str) -> None:
    package = name.replace("-", "_")
    if not NAME.fullmatch(name) or keyword.iskeyword(package):
        raise InvalidOption(
            f"the name of a plug-in must be lower-case words joined by '-' or '_', such as "
            f"far-keys; got {name!r}"
        )
    if package in TAKEN or package in sys.stdlib_module_names:
        raise InvalidOption(f"{name!r} is the name of another module; choose another")
    if package in REGISTRY.all("strategies"):
        plugin = REGISTRY.plugin_of("strategies", package)
        raise InvalidOption(
            f"a strategy {package!r} is registered by {plugin!r}; choose another name"
        )
