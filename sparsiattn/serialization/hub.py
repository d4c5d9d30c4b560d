"""Upload and download of saved patches on the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

from sparsiattn.errors import DataError, UnknownName, first_line
from sparsiattn.runtime.patch_state import PatchState
from sparsiattn.serialization.files import CONFIG, HOST, WEIGHTS
from sparsiattn.serialization.save import save


def push(
    state: PatchState,
    repo_id: str,
    *,
    whole: bool = False,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a sparsiattn patch",
    create_pr: bool = False,
) -> str:
    """Upload an active patch in one commit.

    The arguments from ``private`` on are passed to `huggingface_hub`.

    Args:
        state: The patch.
        repo_id: ``user/name``.
        whole: Whether to upload the host's weights too.
        private: Whether a new repository is private.
        token: Access token.
        revision: Branch to commit to.
        commit_message: First line of the commit message.
        create_pr: Whether to open a pull request instead.

    Returns:
        URL of the commit.

    Raises:
        DataError: The Hub refuses the upload or cannot be reached.
    """
    import huggingface_hub

    with tempfile.TemporaryDirectory() as folder:
        save(state, Path(folder), include_model=whole)
        (Path(folder) / "README.md").write_text(_card(state, repo_id), encoding="utf-8")
        api = huggingface_hub.HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit: Any = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
            )
        except Exception as error:  # errors of the Hub, the network and the system
            reason = first_line(error, named=True)
            raise DataError(f"{repo_id!r} cannot be uploaded: {reason}") from error
    return str(getattr(commit, "commit_url", commit))


def _card(state: PatchState, repo_id: str) -> str:
    strategy = state.strategy.name
    return (
        "---\nlibrary_name: sparsiattn\ntags:\n- sparsiattn\n- sparse-attention\n---\n\n"
        f"`{strategy}` for {type(state.model).__name__}, saved by sparsiattn.\n\n"
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
    """Download a saved patch from the Hub to the cache.

    The other arguments are passed to `huggingface_hub`.

    Args:
        repo_id: ``ORG/NAME``.
        revision: Branch, tag or commit.
        token: Access token.
        cache_dir: Folder for downloads; None for the default cache.
        local_files_only: Whether to read only the cache.

    Returns:
        The folder, which `load` takes.

    Raises:
        UnknownName: The repository cannot be reached and is not in the cache.
    """
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=[CONFIG, WEIGHTS, HOST],
        )
    except Exception as error:  # errors of the Hub, the network and the system
        raise UnknownName(
            f"no saved patch {repo_id!r}: there is no such folder, and the Hugging Face Hub "
            f"returned {first_line(error, named=True)}"
        ) from error
    return Path(folder)
