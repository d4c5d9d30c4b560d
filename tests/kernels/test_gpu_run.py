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

from sparsiattn.analysis.benchmark.tuning_cases import Case
from sparsiattn.kernels import Triton
from sparsiattn.registry import REGISTRY
from tests.support import ROOT
from tests.support.fake_gpu import NEEDED

sys.path.append(str(ROOT / "benchmarks"))

import gpu_device
import gpu_kernels
import gpu_models
import gpu_run
import gpu_smoke
import gpu_table
import gpu_tune
import kernels as kernel_benchmark
from gpu_run import Run, Stage


def python(code: str, seconds: int = 60, part: int = 1) -> Stage:
    return Stage(part, seconds, ("-c", code))


def lines(out: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (out / "stages.jsonl").read_text().splitlines()]


def test_a_failed_stage_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = {"bad": python("print('lost'); raise SystemExit(3)"), "good": python("print('kept')")}
    assert gpu_run.run_all(stages, Run(tmp_path)) == 1
    rows = [(row["stage"], row["result"], row["status"]) for row in lines(tmp_path)]
    assert rows == [("bad", "failed", 3), ("good", "ok", 0)]
    assert (tmp_path / "bad.log").read_text() == "lost\n"
    printed = capsys.readouterr().out
    assert re.search(r"bad +failed", printed)
    assert re.search(r"good +ok", printed)
    assert gpu_run.run_all({"good": stages["good"]}, Run(tmp_path)) == 0


def test_a_slow_stage_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    stages = {"slow": python(code, seconds=3), "next": python("")}
    assert gpu_run.run_all(stages, Run(tmp_path)) == 1
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


def test_rows_of_a_stage_that_is_stopped_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that was cut short is left out, of rows made twice the last one counts."""
    lines = [{"row": "c | dense a", "ms": 2.0}, {"row": "c | dense b", "ms": 1.0},
             {"row": "c | new", "failed": "no"}, {"row": "c | new", "ms": 0.5}]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"row": "c | cut'
    code = f"open({str(tmp_path / 'k.jsonl')!r}, 'w').write({text!r}); import time; time.sleep(60)"
    assert gpu_run.run_all({"writes": python(code, seconds=3)}, Run(tmp_path)) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [stage["result"] for stage in found["stages"]] == ["too slow"]
    ratios = {row["row"]: row["ratio"] for row in found["rows"]}
    assert ratios == {"c | dense a": 0.5, "c | dense b": 1.0, "c | new": 2.0}
    assert re.search(r"c \| new +0.5 +2", capsys.readouterr().out)


def test_rows_are_compared_with_dense_attention_of_their_own_case() -> None:
    rows = [
        {"row": "a | dense cudnn", "ms": 4.0, "graph_ms": 3.0},
        {"row": "a | dense flash", "ms": 5.0, "graph_ms": 2.0},
        {"row": "a | triton", "ms": 2.0, "graph_ms": 1.0},
        {"row": "a | training, dense flash", "ms": 10.0},
        {"row": "a | training, triton", "ms": 5.0},
        {"row": "b | triton", "ms": 1.0},
        {"row": "m | dense | B=8", "ms": 8.0},
        {"row": "m | dense | B=1", "ms": 1.0},
        {"row": "m | token_merge | B=8", "ms": 4.0},
        {"row": "r | ragged, padded", "ms": 3.0},
        {"row": "r | ragged, varlen", "ms": 1.0},
        {"row": "a | gather", "failed": "no memory"},
    ]
    found = {row["row"]: (row.get("ratio"), row.get("graph_ratio")) for row in
             gpu_table.with_ratios(rows)}  # fmt: skip
    assert found["a | triton"] == (2.0, 2.0)
    assert found["a | training, triton"] == (2.0, None)
    assert found["b | triton"] == (None, None)
    assert found["m | token_merge | B=8"] == (2.0, None)
    assert found["r | ragged, varlen"] == (3.0, None)
    assert found["a | gather"] == (None, None)


def test_rows_that_are_there_are_not_made_again(tmp_path: Path) -> None:
    def wrong() -> dict[str, object]:
        raise ValueError("no\nmemory")

    path = tmp_path / "rows.jsonl"
    rows = gpu_device.Rows(path)
    rows.add("good", lambda: {"ms": 1.0})
    rows.add("bad", wrong)
    assert rows.failed == 1
    assert [row.get("failed") for row in gpu_device.read(path)] == [None, "ValueError: no memory"]
    again = gpu_device.Rows(path, resume=True)
    again.add("good", wrong)
    again.add("bad", lambda: {"ms": 2.0})
    assert again.failed == 0
    assert [row["ms"] for row in gpu_device.read(path)] == [1.0, 2.0]
    fake = gpu_device.Rows(path, fake=True, resume=True)
    assert not fake.done, "rows with times do not count in a run without a GPU"
    assert gpu_device.read(gpu_device.Rows(path).path) == []


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
    assert gpu_run.done_before(tmp_path / "out", fake=False) == {"steady", "later"}
    assert gpu_run.done_before(tmp_path / "out", fake=True) == set()


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


PROGRAMS = {
    "gpu_smoke": gpu_smoke, "gpu_kernels": gpu_kernels, "gpu_models": gpu_models,
    "gpu_tune": gpu_tune,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, stage in gpu_run.STAGES.items() if stage.rows])
def test_programs_of_stages_know_their_options(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program, *options = Run(tmp_path, resume=True, fake=True).command(gpu_run.STAGES[name])
    with pytest.raises(SystemExit) as end:  # after the options, as far as they are known
        PROGRAMS[Path(program).stem].main([*options, "--help"])
    assert end.value.code == 0
    assert "--fake" in capsys.readouterr().out


def test_tests_have_a_time_limit_each_and_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(gpu_run.os, "cpu_count", lambda: 16)
    command = Run(Path("out")).command(Stage(1, 400, gpu_run._tests()))
    assert "--timeout=150" in command
    assert command[command.index("-n") + 1] == "12"
    assert "--collect-only" not in command
    assert "--collect-only" in Run(Path("out"), fake=True).command(gpu_run.STAGES["tests"])


def rows_in(out: Path, name: str) -> dict[str, dict[str, object]]:
    rows = {str(row["row"]): row for row in gpu_device.read(out / f"{name}.jsonl")}
    assert rows
    assert all(row["fake"] for row in rows.values())
    assert not {name: row for name, row in rows.items() if "failed" in row}
    return rows


@NEEDED
@pytest.mark.parametrize("kind", ["forward", "ragged", "sizes"])
def test_rows_of_kernels_without_a_gpu(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = gpu_kernels.Case(64, 2, 2, 0.25, (4, 4))
    monkeypatch.setattr(gpu_kernels, "CASES", (case,) * 7)
    monkeypatch.setattr(gpu_kernels, "IN_BLOCKS", {"scores": "predictor", "block": (4, 4)})
    small = {"forward": (0, 3, 4, 5), "ragged": (1, 3), "sizes": (0,)}[kind]
    made = list(gpu_kernels.SETS[kind]())
    rows = [made[i] for i in small]
    monkeypatch.setitem(gpu_kernels.SETS, kind, lambda: iter(rows))
    assert gpu_kernels.main(["--fake", "--set", kind, "--out", str(tmp_path)]) == 0
    found = rows_in(tmp_path, f"kernels-{kind}")
    assert list(found) == [name for name, _ in rows]
    assert all(row["ms"] is None and row["launches"] for row in found.values())
    if kind == "forward":
        launches = [found[f"{case} | {line}"]["launches"] for line in
                    ("triton", "triton alone", "planning alone")]  # fmt: skip
        assert launches[0] == launches[1] + launches[2] == 4  # type: ignore[operator]


@NEEDED
@pytest.mark.slow
def test_rows_of_a_model_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpu_models.Model("test_vit", 160, (2,), compiles=True)
    monkeypatch.setattr(gpu_models, "MODELS", (model,))
    names = ("dense", "connectivity k=0.1")
    monkeypatch.setattr(gpu_models, "LINES", {name: gpu_models.LINES[name] for name in names})
    assert gpu_models.main(["--fake", "--out", str(tmp_path)]) == 0
    found = rows_in(tmp_path, "models")
    head = "test_vit 160 px | connectivity k=0.1"
    assert found[f"{head} | B=2"]["kernels"], "some kernel ran"
    assert f"{head} | B=2 | compile, reduce-overhead" in found
    more = {name: found[f"test_vit 160 px | {name} | B=2"]["launches"] for name in names}
    assert more["dense"] < more["connectivity k=0.1"]  # type: ignore[operator]


@NEEDED
def test_rows_of_tune_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tune.tuning, "QUICK", (Case(64, 0.25, (4, 4), heads=2, dim=16),))
    monkeypatch.setenv("SPARSIATTN_CACHE", str(tmp_path))
    assert gpu_tune.main(["--fake", "--out", str(tmp_path)]) == 0
    found = rows_in(tmp_path, "tune")
    assert "tune" in found
    kernels = {name.rpartition(" | ")[2] for name in found if " | " in name}
    assert {"dense", "planning", "triton", "gather"} <= kernels
    assert not any("ms" in row for row in found.values()), "nothing was measured"


@NEEDED
@pytest.mark.slow
def test_the_smoke_test_walks_without_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_smoke, "KERNELS", ("triton",))
    monkeypatch.setattr(gpu_smoke, "RAGGED_KERNELS", ())
    monkeypatch.setattr(gpu_smoke, "SHAPES", {"uneven": gpu_smoke.SHAPES["uneven"]})
    assert gpu_smoke.main(["--fake", "--out", str(tmp_path)]) == 0
    assert rows_in(tmp_path, "smoke")["triton, uneven"]["results"] == 4


@NEEDED
@pytest.mark.slow
def test_the_whole_run_without_a_gpu(tmp_path: Path) -> None:
    assert gpu_run.main(["--fake", "--out", str(tmp_path)]) == 0, (
        tmp_path / "gpu.json"
    ).read_text()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["fake"]
    assert {stage["result"] for stage in found["stages"]} == {"ok"}
    assert len(found["rows"]) > 150
    assert all(row["fake"] and "failed" not in row for row in found["rows"])


def test_the_smoke_test_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_smoke, "KERNELS", ("gather", "triton"))
    monkeypatch.setattr(gpu_smoke, "SHAPES", {"uneven": gpu_smoke.SHAPES["uneven"]})

    def wrong() -> dict[str, object]:
        raise RuntimeError("no backend")

    monkeypatch.setattr(gpu_smoke, "backends", wrong)
    assert gpu_smoke.main(["--device", "cpu", "--out", str(tmp_path)]) == 1
    found = {row["row"]: row for row in gpu_device.read(tmp_path / "smoke.jsonl")}
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
