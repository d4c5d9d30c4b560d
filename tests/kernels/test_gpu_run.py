"""``benchmarks/gpu_run.py``, its stages and the programs that they start, without a GPU."""

from __future__ import annotations

import json
import os
import re
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from sparsiattn.kernels import Triton
from sparsiattn.registry import REGISTRY
from tests.support import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import gpu_run
import gpu_smoke
import kernels as kernel_benchmark
from gpu_run import Stage


def python(code: str, seconds: int = 60, part: int = 1) -> Stage:
    return Stage(part, seconds, ("-c", code))


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]


def test_a_failed_stage_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {"bad": python("print('lost'); raise SystemExit(3)"), "good": python("print('kept')")}
    assert gpu_run.run(stages, tmp_path) == 1
    rows = [(row["stage"], row["result"], row["status"]) for row in lines(tmp_path)]
    assert rows == [("bad", "failed", 3), ("good", "ok", 0)]
    assert (tmp_path / "bad.log").read_text() == "lost\n"
    printed = capsys.readouterr().out
    assert re.search(r"bad +failed", printed)
    assert re.search(r"good +ok", printed)
    assert gpu_run.run({"good": stages["good"]}, tmp_path) == 0


def test_a_slow_stage_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    assert gpu_run.run({"slow": python(code, seconds=3), "next": python("")}, tmp_path) == 1
    assert time.monotonic() - start < 30
    assert [row["result"] for row in lines(tmp_path)] == ["too slow", "ok"]
    child = int((tmp_path / "slow.log").read_text())
    for _ in range(100):  # until its new parent has taken note
        if not is_running(child):
            return
        time.sleep(0.1)
    pytest.fail("a process of the stage is still running")


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and re.search(r"State:\s+Z", status.read_text()))


def test_files_of_a_stage_are_copied_as_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a stage that failed afterwards; others are left alone."""
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    (results / "old.json").write_text("{}")
    monkeypatch.setattr(gpu_run, "RESULTS", results)
    code = f"open({str(results / 'new.json')!r}, 'w').write('[1]'); raise SystemExit(1)"
    gpu_run.run({"writes": python(code)}, out)
    assert sorted(path.name for path in out.iterdir()) == ["new.json", "stages.jsonl", "writes.log"]


def test_what_ended_well_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = tmp_path / "mark"
    code = f"import os; os.path.exists({str(mark)!r}) or exit(1)"
    stages = {"steady": python(""), "later": python(code)}
    monkeypatch.setattr(gpu_run, "STAGES", stages)
    assert gpu_run.main(["--out", str(tmp_path / "out")]) == 1
    mark.touch()
    assert gpu_run.main(["--out", str(tmp_path / "out"), "--resume"]) == 0
    ran = [(row["stage"], row["result"]) for row in lines(tmp_path / "out")]
    assert ran == [("steady", "ok"), ("later", "failed"), ("later", "ok")]


def test_stages_are_chosen_by_name_or_part(capsys: pytest.CaptureFixture[str]) -> None:
    stages = {"a": python(""), "b": python("", part=2), "c": python("", part=2)}
    assert list(gpu_run.chosen([], stages)) == ["a", "b", "c"]
    assert list(gpu_run.chosen(["c", "a"], stages)) == ["a", "c"]
    assert list(gpu_run.chosen(["part2"], stages)) == ["b", "c"]
    with pytest.raises(SystemExit):
        gpu_run.main(["smok"])
    assert "unknown stage smok; known: " in capsys.readouterr().err


def test_every_part_ends_in_nine_minutes() -> None:
    for part in {stage.part for stage in gpu_run.STAGES.values()}:
        seconds = [stage.seconds for stage in gpu_run.STAGES.values() if stage.part == part]
        assert sum(seconds) <= 540, part


@pytest.mark.parametrize("name", [name for name in gpu_run.STAGES if name != "tests"])
def test_programs_of_stages_know_their_options(name: str) -> None:
    program, *options = gpu_run.STAGES[name].command
    source = (ROOT / program).read_text()
    for option in options:
        if option.startswith("--"):
            assert f'add_argument("{option}"' in source, option


def test_the_smoke_test_goes_on_after_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_smoke.py", "--device", "cpu"])
    monkeypatch.setattr(gpu_smoke, "KERNELS", ("gather", "triton"))
    monkeypatch.setattr(gpu_smoke, "SHAPES", {"uneven": gpu_smoke.SHAPES["uneven"]})

    def wrong() -> dict[str, object]:
        raise RuntimeError("no backend")

    monkeypatch.setattr(gpu_smoke, "backends", wrong)
    assert gpu_smoke.main() == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {row["check"]: row for row in rows}
    assert found["attention of torch"]["failed"] == "RuntimeError: no backend"
    assert len(found["gather, uneven"]["errors"]) == 4, "the result and three gradients"
    assert found["triton, uneven"]["refused"]
    assert found["sdpa, ragged"]["errors"]


def test_the_smoke_test_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = REGISTRY.get("kernels", "sdpa")
    monkeypatch.setattr(
        type(kernel), "__call__", lambda self, inputs, _: inputs.v + 0 * (inputs.q + inputs.k)
    )
    with pytest.raises(ValueError, match="differs from the reference"):
        gpu_smoke.compare(kernel, lambda: gpu_smoke.packed_call("cpu"))


def test_a_benchmark_of_a_kernel_that_refuses_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not compile what the kernel does not take."""
    monkeypatch.setattr(Triton, "warmup", lambda *call: pytest.fail("warmed up"))
    monkeypatch.setattr(Triton, "why_unavailable", lambda self: [])
    row = kernel_benchmark.case(64, 0.25, (4, 4), 1, "cpu", torch.float32, 1, Triton())
    assert row["refused"] == ["needs CUDA tensors, got cpu"]


def test_a_hint_at_tf32_is_no_error() -> None:
    """Torch's compiler gives it on a GPU, up to 2.14; here, warnings are errors."""
    warnings.warn(
        "TensorFloat32 tensor cores for float32 matrix multiplication available but not enabled. "
        "Consider setting `torch.set_float32_matmul_precision('high')` for better performance.",
        stacklevel=1,
    )
