"""The log of a run: one JSON object per line, and TensorBoard events if the recipe sets them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsiattn.errors import CheckpointNotWritten, InvalidOption
from sparsiattn.training.checkpoint import LOG, TrainState, write_errors

Row = dict[str, Any]


class Log:
    """Rows of one run, in memory and in ``log.jsonl``; only the first process writes a file."""

    def __init__(self, folder: Path | None, on_row: Callable[[Row], Any] | None) -> None:
        self.folder, self.on_row, self.rows = folder, on_row, list[Row]()
        self.path = None if folder is None else folder / LOG
        self.board: Any = None

    def resume(self, state: TrainState) -> None:
        """Keep the rows that a checkpoint counts, as later ones will be written again."""
        if self.path is None or not self.path.exists():
            return
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise CheckpointNotWritten(f"{self.path} cannot be read: {error}") from error
        rows = [row for row in map(_parsed, lines) if row is not None]
        self.rows = [row for row in rows if _is_counted(row, state)]
        self._write("w", "".join(json.dumps(row) + "\n" for row in self.rows))

    def start_board(self, step: int) -> None:
        """Also write TensorBoard events; those after ``step`` will be written again."""
        if self.folder is None:
            raise InvalidOption("tensorboard needs a folder for its event files: pass out=")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            message = f"tensorboard is missing: {error}; pip install tensorboard"
            raise InvalidOption(message) from error
        # accelerate's tracker cannot purge the steps that a resumed run repeats
        self.board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=step + 1)

    def add(self, row: Row) -> None:
        """Write a row and pass it to the user's callback."""
        self.rows.append(row)
        self._write("a", json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in _scalars(row).items():
                self.board.add_scalar(f"{row['stage']}/{name}", value, row["step"])
        if self.on_row is not None:
            self.on_row(row)

    def close(self) -> None:
        """Close the TensorBoard writer."""
        if self.board is not None:
            self.board.close()

    def _write(self, mode: str, text: str) -> None:
        if self.path is not None:
            with write_errors(self.path), self.path.open(mode, encoding="utf-8") as file:
                file.write(text)


def _parsed(line: str) -> Row | None:
    """The row in a line; None for an incomplete line of a process that was killed."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "step" in row else None


def _is_counted(row: Row, state: TrainState) -> bool:
    """Whether a row was written before a checkpoint.

    A checkpoint after the last update of an epoch may be older than the row of that epoch.
    """
    if row["step"] == state.step and "epoch_loss" in row:
        return state.batch == 0
    return bool(row["step"] <= state.step)


def _scalars(row: Row) -> dict[str, float]:
    """The numbers in a row and in its parts."""
    parts = {f"parts/{name}": value for name, value in row.get("parts", {}).items()}
    names = row.keys() - {"stage", "step", "parts"}
    return parts | {name: row[name] for name in sorted(names) if row[name] is not None}
