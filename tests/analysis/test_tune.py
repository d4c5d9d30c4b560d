"""`tune`: what it fits, what it writes, and what becomes of a file that cannot be used."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsiattn
from sparsiattn import AttentionInputs, Pattern, Site
from sparsiattn.analysis.benchmark import price_fit, tuning, tuning_cases
from sparsiattn.analysis.benchmark.tuning_cases import Case, Measured
from sparsiattn.analysis.benchmark.tuning_verdict import verdict_of
from sparsiattn.kernels import CallShape, Gather, Prices, Reference, Work, choose, cost
from sparsiattn.kernels import tuning_cache as tuningfile
from sparsiattn.kernels.tuning_cache import TuningIgnored
from sparsiattn.registry import REGISTRY
from sparsiattn.runtime import timing
from sparsiattn.strategies import finish
from tests.support import zoo

CPU = torch.device("cpu")
CASES = (
    Case(16, 0.25, heads=2, dim=8), Case(64, 0.25, (2, 2), heads=2, dim=8),
    Case(16, None, heads=2, dim=8, batch=3),
)  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SPARSIATTN_CACHE", str(tmp_path / "cache"))
    cost.reload()
    yield tmp_path / "cache" / "tuning.json"
    monkeypatch.undo()
    tuningfile.forget()
    cost.reload()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Every call takes the time it is given here, and 1 ms otherwise; each still runs once."""
    given: dict[str, float] = {}

    def seconds(call: Callable[[], Any]) -> float:
        call()
        return given.get(names[call], 1e-3)

    def alternate_within(
        calls: Mapping[str, Callable[[], Any]], rounds: int, limit: float
    ) -> timing.Sampled:
        names.update({call: name for name, call in calls.items()})
        return real(calls, rounds, limit)

    names: dict[Callable[[], Any], str] = {}
    real = timing.alternate_within
    monkeypatch.setattr(timing, "seconds", seconds)
    monkeypatch.setattr(timing, "alternate_within", alternate_within)
    monkeypatch.setattr(tuning, "QUICK", CASES)
    return given


# -- the fit ----------------------------------------------------------------------------------


def works() -> list[Work]:
    return [
        Work(calls, macs, macs / dim, moved)
        for calls in (1, 50) for macs in (1e6, 1e9) for dim in (32, 128) for moved in (1e5, 1e8)
    ]  # fmt: skip


def test_the_fit_finds_the_prices_that_made_the_times() -> None:
    truth = Prices(2e-5, 1e-11, 5e-10, 3e-10)
    start = Prices(1e-4, 1e-12, 1e-8, 1e-9)
    found = price_fit.fit([(work, truth.of(work)) for work in works()], start, ridge=1e-6)
    for name in ("call", "mac", "logit", "byte"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=0.05), name


def test_prices_that_nothing_tells_stay_where_they_were() -> None:
    truth, start = Prices(1e-5, 1e-11, 1e-12, 1e-10), Prices(1e-5, 3e-11, 7e-9, 5e-8)
    known = [(Work(1, macs), truth.of(Work(1, macs))) for macs in (1e6, 1e7, 1e8, 1e9)]
    found = price_fit.fit(known, start)
    assert found.mac == pytest.approx(1e-11, rel=0.05)
    assert (found.logit, found.byte) == pytest.approx((7e-9, 5e-8), rel=0.01)


def test_the_fit_is_positive_on_noise_too() -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(16, generator=generator).exp().tolist()
    known = [(work, 1e-3 * factor) for work, factor in zip(works(), noise, strict=True)]
    found = price_fit.fit(known, Prices(1e-5, 1e-11, 1e-9, 1e-10))
    assert all(0 < getattr(found, name) < math.inf for name in ("call", "mac", "logit", "byte"))


# -- tune ---------------------------------------------------------------------------------------


def test_tune_measures_fits_and_writes(clock: dict[str, float], cache: Path) -> None:
    clock |= {"dense": 1e-3, "gather": 1e-4, "sdpa": 4e-3, "planning": 5e-4}
    seen: list[tuple[int, int]] = []
    found = sparsiattn.tune("cpu", on_case=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert found.path == cache
    by = {(row.case, row.kernel): row for row in found.rows}
    ways = {"dense", "masked", "planning", "reference", "sdpa", "gather"}
    assert {name for _, name in by} == ways
    tiled = by[CASES[1], "gather"]
    assert tiled.ratio == pytest.approx(10)
    assert (CASES[2], "sdpa") in by
    assert (CASES[2], "gather") not in by
    entry = json.loads(cache.read_text())["entries"]
    assert list(entry) == [tuningfile.key(CPU, torch.float32)]
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["kernel"] == "dense"


def test_what_was_measured_decides(clock: dict[str, float]) -> None:
    """The same model, on a machine where gathering is fast, and on one where it is slow."""
    model = zoo.build("vit")
    chosen = []
    for gather, sdpa in ((1e-5, 1e-2), (1e-2, 1e-5)):
        clock |= {"dense": 1e-3, "planning": 1e-5, "gather": gather, "sdpa": sdpa}
        sparsiattn.tune("cpu")
        with sparsiattn.patch(model, "connectivity", k=0.25) as live, torch.no_grad():
            model(zoo.images(model))
            assert live.runtimes[0].last_choice is not None
            chosen.append(live.runtimes[0].last_choice.kernel.name)
            assert "measurements of `sparsiattn tune` on this machine" in str(live.report())
    assert chosen == ["gather", "sdpa"]


def test_planning_decides_what_stays_dense(clock: dict[str, float]) -> None:
    model, dense = zoo.build("vit"), []
    for planning in (1e-6, 1e-1):
        clock |= {"dense": 1e-2, "gather": 1e-3, "sdpa": 1e-3, "planning": planning}
        sparsiattn.tune("cpu")
        with sparsiattn.patch(model, k=0.25, tile=(2, 2), only_if_faster=True) as live:
            dense.append([runtime.dense for runtime in live.runtimes])
            row = live.report().sites[0]
            assert ("with planning would run at" in row.note) == row.note.startswith("left dense")
    assert dense == [[False, False], [True, True]]


def test_a_live_patch_chooses_anew_after_tune(clock: dict[str, float]) -> None:
    model = zoo.build("vit")
    with sparsiattn.patch(model, k=0.25) as live, torch.no_grad():
        for gather, sdpa in ((1e-5, 1e-2), (1e-2, 1e-5)):
            clock |= {"gather": gather, "sdpa": sdpa}
            sparsiattn.tune("cpu")
            model(zoo.images(model))
            assert live.runtimes[0].last_choice is not None
            assert live.runtimes[0].last_choice.kernel.name == (
                "gather" if gather < sdpa else "sdpa"
            )


def test_a_shape_that_tune_covered_is_reported_as_measured(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock |= {"dense": 1e-3, "gather": 1e-3, "sdpa": 5e-4, "planning": 5e-4}
    monkeypatch.setattr(tuning, "QUICK", (Case(64, 0.25, heads=3, dim=16),))
    sparsiattn.tune("cpu")
    model = zoo.build("vit")
    with sparsiattn.patch(model, k=0.25) as live:
        row = live.report().sites[0]
        kernels = {"gather": 1 / (1 + 0.5), "sdpa": 1 / (0.5 + 0.5)}
        assert row.measured == pytest.approx(kernels[row.kernel])
        with torch.no_grad():  # a predictor that was fitted ranks by another rule
            live.runtimes[0].planner.down.mul_(1.5)
        assert [site.measured is None for site in live.report().sites] == [True, False]
    for other in ({"k": 0.3}, {"k": 0.25, "background": 3}, {"strategy": "topk", "k": 0.25}):
        with sparsiattn.patch(model, **other) as live:
            assert live.report().sites[0].measured is None


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"device": "mps"}, ValueError, "'mps'"),
        ({"device": "cpu", "dtypes": []}, TypeError, "dtypes must be"),
        ({"device": "cpu", "dtypes": [torch.int8]}, TypeError, "int8"),
        ({"device": "cpu", "budget": 0}, ValueError, "budget must be"),
        ({"device": "cpu", "budget": float("nan")}, ValueError, "budget must be"),
        ({"device": "cpu", "budget": True}, ValueError, "budget must be"),
        pytest.param(
            {"device": "cuda"}, ValueError, "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ],
)  # fmt: skip
def test_refusals(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        sparsiattn.tune(**options)
    assert isinstance(caught.value, sparsiattn.SparsiattnError)


def test_real_measurements_of_one_small_case() -> None:
    rows, failures = tuning_cases.measure(CASES[1], CPU, torch.float32, rounds=2)
    assert failures == []
    assert {row.kernel for row in rows} >= {"dense", "masked", "planning", "gather", "sdpa"}
    assert all(row.seconds > 0 and row.ratio > 0 for row in rows)
    assert all(isinstance(row, Measured) and row.work is not None for row in rows)


def test_kernels_that_would_compile_first_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gather, "not_ready", lambda *_: ["not compiled yet"])
    for compiles in (True, False):
        rows, _ = tuning_cases.measure(CASES[1], CPU, torch.float32, rounds=1, compiles=compiles)
        kernels = {row.kernel for row in rows}
        assert ("gather" in kernels) is compiles
        assert "sdpa" in kernels


def test_whole_matrices_are_not_measured_where_they_are_huge() -> None:
    assert 16 * 17**2 < tuning_cases.MOST_LOGITS < 6 * 4097**2


def test_masks_and_votes_are_priced_by_what_they_took(clock: dict[str, float]) -> None:
    """A host's bias costs what masked attention took, not a constant times dense attention."""
    clock |= {"dense": 1e-3, "masked": 5e-3}
    sparsiattn.tune("cpu")
    plain = CallShape(1, 2, 65, 65, 8, 8, torch.float32, CPU)
    ratio = cost.dense_seconds(replace(plain, biased=True)) / cost.dense_seconds(plain)
    assert ratio == pytest.approx(5, rel=0.1)


@pytest.mark.parametrize("case", [case for case in tuning.QUICK[:5] if case.tile != 1], ids=str)
def test_planning_is_priced_by_the_votes_that_it_takes(case: Case) -> None:
    """Counted over the whole plan: the planner itself only puts votes off."""
    with torch.inference_mode():
        _, _, work = tuning_cases._prepare(case, CPU, torch.float32)
    assert work is not None
    # squares of queries vote for every key, at least one square for each tile
    tiles = case.tokens // math.prod(case.tile)  # type: ignore[arg-type]
    assert work.macs >= case.heads * tiles * case.tokens * case.dim
    assert work.logits > 0


# -- kernels that fail ----------------------------------------------------------------------------


class Failing(sparsiattn.Kernel):
    """Takes every call, says that it is fast, and raises."""

    name = "failing"
    summary = "raises"
    error: Exception = RuntimeError("no such instruction\nsecond line")
    at_least = 0  # queries

    def why_not(self, inputs: Any, pattern: Any) -> list[str]:
        return []

    def speed(self, inputs: Any, pattern: Any) -> float:
        return 100.0

    def __call__(self, inputs: Any, pattern: Any) -> torch.Tensor:
        if inputs.n_queries >= self.at_least:
            raise self.error
        return Reference()(inputs, pattern)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    kernel, known = Failing(), REGISTRY.all("kernels")
    monkeypatch.setattr(
        type(REGISTRY), "all",
        lambda self, kind, *rest: {"failing": kernel, **known} if kind == "kernels" else {},
    )  # fmt: skip
    return kernel


def chosen_by(kernel: Failing, tokens: int) -> str:
    q = torch.randn(1, 2, tokens, 8)
    inputs = AttentionInputs(q, q, q, 0.3, None, Site.of(q, q, q))
    pattern = finish(Pattern.top(q @ q.mT, 0.25), inputs)
    return choose([kernel, Gather()], inputs, pattern, explicit=False).kernel.name


def test_a_kernel_that_raises_is_named_recorded_and_not_chosen(
    clock: dict[str, float], cache: Path, failing: Failing
) -> None:
    assert chosen_by(failing, 17) == "failing"
    found = sparsiattn.tune("cpu")
    assert {f.kernel for f in found.failures} == {"failing"}
    assert {row.kernel for row in found.rows} >= {"dense", "gather"}  # the others went on
    said = "\n".join(found.verdict())
    assert "failed: failing (float32, 16 tokens): RuntimeError: no such instruction" in said
    assert "second line" not in said
    (entry,) = json.loads(cache.read_text())["entries"].values()
    assert entry["failed"] == {
        "failing": {"error": "RuntimeError: no such instruction", "pairs": 0}
    }
    for again in range(2):  # in this process, and in one that reads the file
        assert chosen_by(failing, 17) == "gather", again
        tuningfile.forget()
        cost.reload()
    failing.error, failing.at_least = RuntimeError("mended"), 10**9
    sparsiattn.tune("cpu")
    assert chosen_by(failing, 17) == "failing"


def test_a_named_kernel_raises_its_own_error(clock: dict[str, float], failing: Failing) -> None:
    sparsiattn.tune("cpu")
    q = torch.randn(1, 2, 17, 8)
    inputs = AttentionInputs(q, q, q, 0.3, None, Site.of(q, q, q))
    pattern = finish(Pattern.top(q @ q.mT, 0.25), inputs)
    assert choose([failing], inputs, pattern, explicit=True).kernel is failing


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_where_memory_was_short_larger_calls_are_refused_alone(
    clock: dict[str, float], failing: Failing, error: Exception
) -> None:
    failing.error, failing.at_least = error, 65
    sparsiattn.tune("cpu")
    assert [chosen_by(failing, tokens) for tokens in (17, 65, 100)] == ["failing", *["gather"] * 2]


def test_where_dense_attention_itself_fails_tune_says_so(
    clock: dict[str, float], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(tuning_cases, "dense_attention", broken)
    with pytest.raises(sparsiattn.SparsiattnError, match=r"any shape on cpu: .*not implemented"):
        sparsiattn.tune("cpu")
    assert not cache.exists()


# -- the budget -----------------------------------------------------------------------------------


def test_the_budget_ends_it_and_says_what_is_left_out(clock: dict[str, float]) -> None:
    found = sparsiattn.tune("cpu", budget=1e-9)
    assert {row.case for row in found.rows} == {CASES[0]}
    assert found.unmeasured == len(CASES) - 1
    assert found.verdict()[-1] == "not measured, as the time limit was reached: 2 shapes"
    full = sparsiattn.tune("cpu", budget=1e9)
    assert (full.unmeasured, {row.case for row in full.rows}) == (0, set(CASES))


def test_calls_that_are_slow_run_less_often() -> None:
    ran: dict[str, int] = {"first": 0, "slow": 0, "fast": 0}

    def call(name: str, pause: float) -> Callable[[], None]:
        def run() -> None:
            ran[name] += 1
            time.sleep(pause)

        return run

    pauses = {"first": 0.0, "slow": 0.05, "fast": 0.0}
    calls = {name: call(name, pause) for name, pause in pauses.items()}
    sampled = timing.alternate_within(calls, rounds=6, limit=0.06)
    assert ran == {"first": 7, "slow": 1, "fast": 7}
    assert {name: len(times) for name, times in sampled.times.items()} == {
        "first": 6, "slow": 1, "fast": 6,
    }  # fmt: skip
    assert sampled.times["slow"][0] >= 0.05


# -- the verdict ----------------------------------------------------------------------------------


def rows_of(speeds: dict[int, dict[str, float]]) -> list[Measured]:
    return [
        Measured(Case(tokens, 0.1), "float32", name, 1.0, ratio, None)
        for tokens, ratios in speeds.items()
        for name, ratio in {"dense": 1.0, "planning": 4.0, **ratios}.items()
    ]


@pytest.mark.parametrize(
    ("speeds", "fastest", "pays"),
    [
        ({196: {"a": 0.5, "b": 0.9}, 576: {"a": 4.0, "b": 2.0}, 4096: {"a": 2.0, "b": 12.0}},
         "dense at 196 tokens, a at 576 tokens, b at 4,096 tokens",
         "from 576 tokens on, planning included (2.00x at 576, 3.00x at 4,096)"),
        ({196: {"a": 4.0}, 576: {"a": 1.2}, 1024: {"a": 12.0}},
         "a at 196 tokens, dense at 576 tokens, a at 1,024 tokens",
         "from 1,024 tokens on, planning included (3.00x at 1,024)"),
        ({196: {"a": 0.4}, 576: {"a": 1.0}}, "dense at 196 to 576 tokens",
         "at no measured size (best: 0.80x at 576 tokens): use a token strategy instead"),
    ],
)  # fmt: skip
def test_the_verdict(speeds: dict[int, dict[str, float]], fastest: str, pays: str) -> None:
    rows = rows_of(speeds)
    assert list(verdict_of(rows)) == [
        f"fastest here, float32: {fastest}", f"sparse attention pays {pays}",
    ]  # fmt: skip
    found = tuning.Tuning("cpu x", tuple(rows), {}, Path("there.json"))
    assert str(found).splitlines()[2:] == ["kernel='auto' uses these times from now on: there.json"]


# -- the file -----------------------------------------------------------------------------------


def entry(**changed: Any) -> dict[str, Any]:
    price = {"call": 1e-5, "mac": 1e-11, "logit": 1e-9, "byte": 1e-10, "row": 1e-9}
    return {
        "date": "2026-01-01",
        "prices": {"dense": price, "gather": price},
        "rows": [],
        **changed,
    }


def written(content: object, where: Path) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(content if isinstance(content, str) else json.dumps(content))
    tuningfile.forget()
    cost.reload()


BROKEN = {
    "not JSON": "{",
    "not UTF-8": "\udcff",
    "a list": [],
    "another format": {"format": 99, "entries": {}},
    "no entries": {"format": 1},
    "no prices": {"format": 1, "entries": {"x": entry(prices=None)}},
    "a price that is text": {
        "format": 1, "entries": {"x": entry(prices={"dense": {"call": "1"}})},
    },
    "a price of zero": {
        "format": 1,
        "entries": {"x": entry(prices={"dense": dict.fromkeys(tuningfile.PRICE_FIELDS, 0)})},
    },
    "a price that is no number": '{"format": 1, "entries": {"x": {"rows": [], "prices": '
    '{"dense": {"call": NaN, "mac": 1, "logit": 1, "byte": 1, "row": 1}}}}}',
    "a failure that is text": {"format": 1, "entries": {"x": entry(failed={"gather": "broken"})}},
    "a failure of no size": {
        "format": 1, "entries": {"x": entry(failed={"gather": {"error": "x", "pairs": 1.5}})},
    },
    "no rows": {"format": 1, "entries": {"x": entry(rows=7)}},
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_ignored_with_one_warning(content: Any, cache: Path) -> None:
    cache.parent.mkdir()
    if content == "\udcff":
        cache.write_bytes(b"\xff\xfe{")
    else:
        written(content, cache)
    with pytest.warns(TuningIgnored, match="tuning.json is ignored"):
        live = sparsiattn.patch(zoo.build("vit"), k=0.25)
    text = str(live.report())  # a second warning would be an error here
    assert "tuning file" in text
    assert "is ignored" in text


def test_a_folder_in_its_place_is_ignored(cache: Path) -> None:
    cache.mkdir(parents=True)
    with pytest.warns(TuningIgnored, match="IsADirectoryError"):
        assert tuningfile.find(CPU, torch.float32) is None


def test_a_file_for_another_machine_is_no_fault(cache: Path) -> None:
    written({"format": 1, "entries": {"cpu another | torch 1.0": entry()}}, cache)
    assert not cost.is_tuned(CPU, torch.float32)
    assert tuningfile.fault() is None


def test_an_entry_holds_for_its_dtype_only(cache: Path) -> None:
    written({"format": 1, "entries": {tuningfile.key(CPU, torch.bfloat16): entry()}}, cache)
    assert cost.is_tuned(CPU, torch.bfloat16)
    assert not cost.is_tuned(CPU, torch.float32)


def test_writing_keeps_the_entries_of_others(cache: Path) -> None:
    written({"format": 1, "entries": {"another": entry()}}, cache)
    assert tuningfile.write({"mine": entry()}) == cache
    assert set(json.loads(cache.read_text())["entries"]) == {"another", "mine"}
    assert [path.name for path in cache.parent.iterdir()] == ["tuning.json"]


def test_writing_replaces_a_broken_file(cache: Path) -> None:
    written("{", cache)
    assert tuningfile.write({"mine": entry()}) == cache
    tuningfile.forget()
    assert set(tuningfile._entries(cache)) == {"mine"}


def test_a_writer_that_fails_half_way_leaves_the_file_whole(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written({"format": 1, "entries": {"before": entry()}}, cache)
    before = cache.read_text()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.warns(TuningIgnored, match="cannot be written: OSError: disk full"):
        assert tuningfile.write({"mine": entry()}) is None
    assert cache.read_text() == before
    assert [path.name for path in cache.parent.iterdir()] == ["tuning.json"]


def test_what_cannot_be_written_holds_in_this_process(
    clock: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSIATTN_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(TuningIgnored, match="cannot be written"):
        found = sparsiattn.tune("cpu")
    assert found.path is None
    assert cost.is_tuned(CPU, torch.float32)
    live = sparsiattn.patch(zoo.build("vit"), k=0.25)
    assert "cannot be written" in str(live.report())


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIATTN_CACHE", "/here")
    assert tuningfile.path() == Path("/here/tuning.json")
    monkeypatch.delenv("SPARSIATTN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert tuningfile.path() == Path("/xdg/sparsiattn/tuning.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert tuningfile.path() == Path("/home/me/.cache/sparsiattn/tuning.json")


def test_no_file_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuningfile.find(CPU, torch.float32) is None
        assert tuningfile.fault() is None


def test_neither_patch_nor_forward_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> float:
        raise AssertionError("a clock was read")

    for name in ("seconds", "alternate", "alternate_within"):
        monkeypatch.setattr(timing, name, never)
    monkeypatch.setattr(timing.time, "perf_counter", never)
    model = zoo.build("vit")
    with sparsiattn.patch(model, k=0.25, only_if_faster=True) as live, torch.no_grad():
        model(zoo.images(model))
        live.report()
