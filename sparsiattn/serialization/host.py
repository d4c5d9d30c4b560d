"""The host of a saved patch, made anew."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from torch import nn

from sparsiattn.errors import InvalidOption, MismatchedPatch
from sparsiattn.serialization.files import HOST, Saved, read, read_tensors
from sparsiattn.serialization.origin import build


def host_of(folder: str | PathLike[str], *, pretrained: bool = False) -> nn.Module:
    """The host of a saved patch, unpatched.

    Args:
        folder: What `Patch.save` wrote.
        pretrained: Whether to download published weights where the folder has none.
    """
    return make_host(read(Path(folder)), str(folder), pretrained)


def host_without_weights(folder: str | PathLike[str]) -> nn.Module:
    """As `host_of` without weights, so that it costs no memory under ``torch.device("meta")``."""
    saved = read(Path(folder))
    return make_host(saved._replace(files={}), str(folder), pretrained=False)


def has_weights(folder: str | PathLike[str]) -> bool:
    """Whether a saved patch brings the weights of its host along."""
    return HOST in read(Path(folder)).files


def make_host(saved: Saved, name: str, pretrained: bool) -> nn.Module:
    """The host of a patch that was read, with its saved weights where there are any.

    Args:
        saved: The patch.
        name: Where it was read, for errors.
        pretrained: As in `host_of`.

    Raises:
        InvalidOption: The file does not say how to make it, or it cannot be made here.
    """
    origin = saved.config["origin"]
    if origin is None:
        raise InvalidOption(
            f"{name} does not say how to make its {saved.config['host']['class']}: build the model "
            "in Python and use sparsiattn.load(model, folder). Saved by this version, models of "
            "timm and transformers made by name say it, and those of sparsiattn.create_model"
        )
    if HOST not in saved.files:
        return build(origin, pretrained)
    host = build(origin)
    load_host(host, saved)
    return host


def load_host(model: nn.Module, saved: Saved) -> None:
    """Load a saved host's weights into a model; nothing is loaded unless all fit.

    Raises:
        MismatchedPatch: They do not.
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
