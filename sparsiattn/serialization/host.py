"""Create the host model of a saved patch."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from torch import nn

from sparsiattn.errors import InvalidOption, MismatchedPatch
from sparsiattn.serialization.files import HOST, Saved, read, read_tensors
from sparsiattn.serialization.origin import build


def host_of(folder: str | PathLike[str], *, pretrained: bool = False) -> nn.Module:
    """Create the unpatched host of a saved patch.

    Args:
        folder: A folder that `Patch.save` wrote.
        pretrained: Whether to download published weights if the folder has none.
    """
    return make_host(read(Path(folder)), str(folder), pretrained)


def host_without_weights(folder: str | PathLike[str]) -> nn.Module:
    """As `host_of`, without loading weights; it needs no memory under ``torch.device("meta")``."""
    saved = read(Path(folder))
    return make_host(saved._replace(files={}), str(folder), pretrained=False)


def has_weights(folder: str | PathLike[str]) -> bool:
    """Whether a saved patch contains the weights of its host."""
    return HOST in read(Path(folder)).files


def make_host(saved: Saved, name: str, pretrained: bool) -> nn.Module:
    """Create the host of a loaded patch, with its saved weights if there are any.

    Args:
        saved: The patch.
        name: Name of the folder, for error messages.
        pretrained: As in `host_of`.

    Raises:
        InvalidOption: The file does not describe the host, or it cannot be created here.
    """
    origin = saved.config["origin"]
    if origin is None:
        raise InvalidOption(
            f"{name} does not describe how to create its {saved.config['host']['class']}: build "
            "the model in Python and use sparsiattn.load(model, folder). Models that timm, "
            "transformers or sparsiattn.create_model created by name are saved with a description"
        )
    if HOST not in saved.files:
        return build(origin, pretrained)
    host = build(origin)
    load_host(host, saved)
    return host


def load_host(model: nn.Module, saved: Saved) -> None:
    """Load a saved host's weights into a model.

    Raises:
        MismatchedPatch: Names or shapes of weights differ; nothing is loaded then.
    """
    path = saved.files[HOST]
    try:
        tensors = read_tensors(path)
        present = model.state_dict()
        wrong = sorted(set(present) ^ set(tensors))
        wrong += [n for n in present if n in tensors and present[n].shape != tensors[n].shape]
        if wrong:
            raise MismatchedPatch(f"{path} does not fit {type(model).__name__}: {wrong[:3]} differ")
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise MismatchedPatch(f"{path} does not fit {type(model).__name__}: {error}") from error
