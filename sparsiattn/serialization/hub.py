"""Saved patches from a folder or the Hugging Face Hub, with their host."""

from __future__ import annotations

import tempfile
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sparsiattn.errors import DataError, InvalidOption, UnknownName
from sparsiattn.serialization.files import CONFIG, HOST, WEIGHTS, Saved, read
from sparsiattn.serialization.origin import build
from sparsiattn.serialization.saving import apply, load_host, save

if TYPE_CHECKING:
    from sparsiattn.runtime.handle import Patch


def from_pretrained(
    name: str | PathLike[str],
    model: nn.Module | None = None,
    *,
    pretrained: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Patch:
    """A saved patch on its host: ``from_pretrained(name).model`` is ready to run.

    name: a folder that `Patch.save` or `Patch.merge_and_export` wrote, or ``ORG/NAME`` on the
    Hugging Face Hub. model: the host, None to make it as the file says. pretrained: where the file
    has no weights of the host, True takes those its library publishes and False random ones; None
    is an error then. revision, token, cache_dir, local_files_only: as `huggingface_hub` takes them.

    Raises `UnknownName` where nothing is found, `MismatchedPatch` for a file that is damaged or of
    another model, and `InvalidOption` where the host cannot be made.

    >>> import tempfile, timm, sparsiattn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with sparsiattn.patch(timm.create_model("test_vit"), k=0.2) as patch:
    ...         _ = patch.merge_and_export(folder)
    ...     from_pretrained(folder)
    <Patch: connectivity on 6 sites of VisionTransformer, kernel='auto'>
    """
    if model is not None and pretrained is not None:
        raise InvalidOption("pretrained= is for a host that is made here, and model= was given")
    saved = read(_folder(name, revision, token, cache_dir, local_files_only))
    if model is not None:
        return apply(model, saved)
    if pretrained is None and HOST not in saved.files:
        raise InvalidOption(
            f"{name} holds a patch without weights of its host: give model=, or pretrained=True "
            "for the published weights, or pretrained=False for random ones"
        )
    host = _host(saved, str(name), bool(pretrained))
    return apply(host.eval(), saved)


def host_of(folder: str | PathLike[str], *, pretrained: bool = False) -> nn.Module:
    """The host of a saved patch, unpatched: with its saved weights where there are any."""
    return _host(read(Path(folder)), str(folder), pretrained)


def origin_in(folder: str | PathLike[str]) -> nn.Module:
    """As `host_of` without weights, so that it costs no memory under ``torch.device("meta")``."""
    saved = read(Path(folder))
    return _host(saved._replace(files={}), str(folder), pretrained=False)


def has_weights(folder: str | PathLike[str]) -> bool:
    """Whether a saved patch brings the weights of its host along."""
    return HOST in read(Path(folder)).files


def _host(saved: Saved, name: str, pretrained: bool) -> nn.Module:
    origin = saved.config["origin"]
    if origin is None:
        raise InvalidOption(
            f"{name} does not say how to make its {saved.config['host']['class']}: build the model "
            "in Python and use sparsiattn.load(model, folder). Saved by this version, models of "
            "timm, transformers and torchvision made by name say it, and those of "
            "sparsiattn.create_model"
        )
    if HOST not in saved.files:
        return build(origin, pretrained)
    host = build(origin)
    load_host(host, saved)
    return host


def push(
    handle: Patch,
    repo_id: str,
    *,
    whole: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a sparsiattn patch",
    create_pr: bool = False,
) -> str:
    """Upload a live patch in one commit; gives the address. The options are `huggingface_hub`'s.

    Raises `DataError` where the Hub refuses or cannot be reached.
    """
    import huggingface_hub

    with tempfile.TemporaryDirectory() as folder:
        save(handle, Path(folder), whole=whole)
        (Path(folder) / "README.md").write_text(_card(handle, repo_id), encoding="utf-8")
        api = huggingface_hub.HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            done: Any = api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=revision, create_pr=create_pr,
                commit_message=commit_message,
            )  # fmt: skip
        except Exception as error:  # the Hub's, the network's and the system's own
            raise DataError(f"{repo_id!r} cannot be uploaded: {_first(error)}") from error
    return str(getattr(done, "commit_url", done))


def _card(handle: Patch, repo_id: str) -> str:
    strategy = handle.strategy.name
    return (
        "---\nlibrary_name: sparsiattn\ntags:\n- sparsiattn\n- sparse-attention\n---\n\n"
        f"`{strategy}` for {type(handle.model).__name__}, saved by sparsiattn.\n\n"
        f"```python\nimport sparsiattn\n\n"
        f"patch = sparsiattn.from_pretrained({repo_id!r}, model)\n```\n"
    )


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """A saved patch of the Hub as a folder of the cache, which `load` takes.

    Raises `UnknownName` where it cannot be reached and is not in the cache.
    """
    import huggingface_hub

    try:
        found = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=[CONFIG, WEIGHTS, HOST],
        )
    except Exception as error:  # the Hub's, the network's and the system's own
        raise UnknownName(
            f"no saved patch {repo_id!r}: it is no folder here, and the Hugging Face Hub says "
            f"{_first(error)}"
        ) from error
    return Path(found)


def _folder(
    name: str | PathLike[str], revision: str | None, token: str | bool | None,
    cache: str | PathLike[str] | None, local: bool,
) -> Path:  # fmt: skip
    path = Path(name)
    if path.exists():
        return path
    return download(
        str(name), revision=revision, token=token, cache_dir=cache, local_files_only=local
    )


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
