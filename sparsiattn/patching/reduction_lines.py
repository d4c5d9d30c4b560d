"""Lines of a report about blocks that carry fewer tokens."""

from __future__ import annotations

from sparsiattn.patching.dry_run import DryRun
from sparsiattn.runtime.block_runtime import BlockRuntime
from sparsiattn.runtime.patch_state import PatchState

_PLACES = {
    "entry": "before attention",
    "middle": "between attention and MLP",
    "exit": "after the block",
    "bypass": "which skip only the MLP because the grid must stay complete",
    "windows": "which skip the block because the grid must stay complete",
}


def reduction_lines(state: PatchState, run: DryRun | None) -> tuple[str, ...]:
    """One line for every block that reduces: its number of patch tokens, and where it reduces."""
    if run is None or state.tokens is None:
        return ()
    lines = []
    for block in state.blocks:
        if block.strategy is None or block.placement is None:
            continue
        # a block that runs several times has several counts
        counts = ", then ".join(map(str, run.counts.get(block.index, [])))
        unit = "windows" if block.placement == "windows" else "patch tokens"
        tokens = f"{counts} {unit}, " if counts else ""
        place = _PLACES[block.placement] + _why_after(block)
        lines.append(f"{block.block.name}: {block.strategy.name}, {tokens}{place}")
    if run.ragged:
        lines.append("counts adapt to each image: MACs are known only after a forward pass")
    if state.restores_last:
        lines.append("original positions are restored after the last block")
    return tuple(lines)


def _why_after(runtime: BlockRuntime) -> str:
    """Why a block does not reduce between attention and MLP although its strategy would."""
    assert runtime.strategy is not None
    if runtime.placement != "exit" or runtime.strategy.placement() != "middle":
        return ""
    tail = runtime.block.tail
    if tail is None:
        return ", whose attention and MLP are one step"
    if tail.mixes:
        return f", whose MLP needs all tokens ({tail.mixes})"
    return f": in training mode {tail.eval_only}" if tail.eval_only else ""
