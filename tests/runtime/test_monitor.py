"""`Patch.monitor`: which calls count, what happens when they are low, and how it ends."""

from __future__ import annotations

import copy
import io
import json
import pickle
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsiattn
from sparsiattn import LowAttentionMass
from sparsiattn.errors import InvalidOption, ModelChanged, UnknownName
from sparsiattn.runtime import attention_rows
from sparsiattn.runtime import settings as patch_settings
from sparsiattn.testing.hosts import tiny_images, tiny_vit

SITES = ["blocks.0.attn", "blocks.1.attn"]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not patch_settings._SETTINGS.get()


def run(model: nn.Module, calls: int = 1, batch: int = 2) -> Tensor:
    with torch.no_grad():
        for _ in range(calls):
            out = model(tiny_images(batch))
    return out  # type: ignore[no-any-return]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were computed, look by look."""
    counted: list[int] = []
    compute = attention_rows.compute

    def counting(inputs: Any, pattern: Any, rows: Tensor) -> Any:
        counted.append(len(rows))
        return compute(inputs, pattern, rows)

    monkeypatch.setattr(attention_rows, "compute", counting)
    return counted


def test_every_so_many_calls_a_few_rows_and_nothing_else(looks: list[int]) -> None:
    model = tiny_vit()
    patch = sparsiattn.patch(model, "topk", k=0.25)
    monitor = patch.monitor(every=3, rows=5)
    seen = []
    for _ in range(7):
        run(model)
        seen.append(len(looks))
    assert seen == [2, 2, 2, 4, 4, 4, 6]  # two sites in calls 1, 4 and 7
    assert set(looks) == {5}
    found = monitor.report()
    assert (found.calls, found.watched, found.rows, found.sites) == (7, 3, 5, 2)
    monitor.close()
    run(model, 4)
    assert len(looks) == 6
    assert monitor.report().calls == 7


def test_rows_move_on_and_leave_out_prefix_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vit()
    patch = sparsiattn.patch(model, "topk", k=0.25)
    seen: list[tuple[int, ...]] = []
    compute = attention_rows.compute
    monkeypatch.setattr(
        attention_rows,
        "compute",
        lambda inputs, pattern, rows: (
            seen.append(tuple(rows.tolist())),
            compute(inputs, pattern, rows),
        )[1],
    )
    with patch.monitor(every=1, rows=4, sites=SITES[1]):
        run(model, 30)
    assert all(len(set(rows)) == 4 and min(rows) >= 1 and max(rows) <= 64 for rows in seen)
    assert len({row for rows in seen for row in rows}) > 50


def test_calls_that_do_not_count(looks: list[int]) -> None:
    model = tiny_vit()
    patch = sparsiattn.patch(model, "topk", k=0.25)
    with patch.monitor(every=1) as monitor:
        with patch.disabled():
            run(model)
        with patch.observing(lambda *_: None):
            run(model)
        patch.warmup(tiny_images())
        model.train()
        run(model)
        model.eval()
        model.forward_features(tiny_images())  # type: ignore[operator]
        model.blocks[0](torch.zeros(1, 65, 48))  # type: ignore[index,operator]
        patch.report()
        assert (monitor.report().calls, looks) == (0, [])
        assert "0 of 0 calls watched (nothing measured yet" in str(patch.report())
        run(model)
        assert (monitor.report().calls, len(looks)) == (1, 2)


def test_outputs_and_random_numbers_stay_as_they_are() -> None:
    model = tiny_vit()
    patch = sparsiattn.patch(model, "topk", k=0.25)
    state, plain = torch.get_rng_state(), run(model)
    with patch.monitor(every=1):
        assert torch.equal(run(model), plain)
        with torch.inference_mode():
            assert torch.equal(model(tiny_images(2)), plain)
        images = tiny_images(2).requires_grad_()
        model(images).sum().backward()
        assert images.grad is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_sites_are_chosen(looks: list[int]) -> None:
    model = tiny_vit()
    patch = sparsiattn.patch(model, "topk", k=0.25)
    with patch.monitor(every=1, sites="blocks.1.*") as monitor:
        run(model)
    assert len(looks) == 1
    assert monitor.report().lowest_site == SITES[1]
    with pytest.raises(UnknownName):
        patch.monitor(sites="no.such")


def test_a_pass_that_raises_is_not_watched() -> None:
    model = tiny_vit()
    patch = sparsiattn.patch(model, "topk", k=0.25)

    def fails(error: type[BaseException], *_: Any) -> None:
        raise error

    with patch.monitor(every=1) as monitor:
        for error in (RuntimeError, KeyboardInterrupt):
            hook = model.blocks[1].register_forward_hook(partial(fails, error))  # type: ignore[index,operator]
            with pytest.raises(error):
                run(model)
            hook.remove()
        found = monitor.report()
        assert (found.calls, found.watched) == (2, 0)
        run(model)  # goes on, and sweeps what the interrupt left
        assert monitor.report().watched == 1
        assert not patch.monitored


def test_threads_count_together_and_are_watched_apart() -> None:
    model = tiny_vit()
    patch = sparsiattn.patch(model, "topk", k=0.25)
    plain = run(model)
    same = []
    with patch.monitor(every=2) as monitor:

        def work() -> None:
            same.extend(bool(torch.equal(run(model), plain)) for _ in range(10))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = monitor.report()
    assert (found.calls, found.watched) == (40, 20)
    assert same == [True] * 40


# --- low ones ------------------------------------------------------------------------------------


def test_one_warning_and_a_count() -> None:
    model = tiny_vit()
    patch = sparsiattn.patch(model, "topk", k=0.25)
    with patch.monitor(every=1, bound=0.999) as monitor:
        with pytest.warns(LowAttentionMass, match="below bound=0.999: .* shown once") as caught:
            run(model, 3)
        assert len(caught) == 1
        found = monitor.report()
        assert (found.below, found.is_dense, found.dense_calls) == (3, False, 0)
        assert "calls below 0.999: 3" in str(patch.report())
        monitor.resume()
        with pytest.warns(LowAttentionMass):
            run(model)
    with patch.monitor(every=1, bound=1e-6) as monitor, warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, 3)
    assert monitor.report().below == 0


def test_dense_from_the_next_call_on_until_it_resumes() -> None:
    model = tiny_vit()
    dense = run(model)
    patch = sparsiattn.patch(model, "local", k=9)
    sparse = run(model)
    assert not torch.equal(sparse, dense)
    monitor = patch.monitor(every=2, bound=0.999, on_low="dense")
    with pytest.warns(LowAttentionMass, match=r"active_monitor\.resume\(\) makes"):
        assert torch.equal(run(model), sparse)  # this very call stays what it was
    for _ in range(3):
        assert torch.equal(run(model), dense)
    features = model.forward_features(tiny_images(2))  # type: ignore[operator]
    with patch.disabled():
        assert torch.equal(features, model.forward_features(tiny_images(2)))  # type: ignore[operator]
    found = patch.report().monitor
    assert found is not None
    assert (found.calls, found.watched, found.is_dense, found.dense_calls) == (4, 1, True, 3)
    assert "dense now: active_monitor.resume()" in str(patch.report())
    assert patch.active_monitor is monitor
    monitor.resume()
    with pytest.warns(LowAttentionMass):
        run(model, 2)  # calls 5 and 6, of which the fifth is watched
    assert torch.equal(run(model), dense)
    monitor.close()
    assert torch.equal(run(model), sparse)
    assert patch.active_monitor is None
    assert monitor.report().dense_calls == 5


def test_dense_is_for_token_strategies_as_well() -> None:
    model = tiny_vit()
    dense = run(model)
    patch = sparsiattn.patch(model, "hybrid", k=0.25, keep=0.7, only_if_faster=False)
    with patch.monitor(bound=0.999, on_low="dense"):
        with pytest.warns(LowAttentionMass):
            sparse = run(model)
        assert torch.equal(run(model), dense)
        assert torch.equal(
            model.forward_features(tiny_images(2)),  # type: ignore[operator]
            model.forward_features(tiny_images(2)),  # type: ignore[operator]
        )
    assert torch.equal(run(model), sparse)


def test_the_bound_counts_summary_keys() -> None:
    model = tiny_vit()
    patch = sparsiattn.patch(model, "local", k=9, background=2)
    with patch.monitor() as monitor:
        run(model)
    found = monitor.report()
    assert found.lowest is not None
    assert found.lowest_overlap is not None
    between = (found.lowest + found.lowest_overlap) / 2
    with patch.monitor(bound=between) as monitor:
        run(model)  # no warning, which would be an error here
    assert monitor.report().below == 0
    above = (found.lowest_overlap + 1) / 2
    with patch.monitor(bound=above) as monitor, pytest.warns(LowAttentionMass, match="summary"):
        run(model)
    assert monitor.report().below == 1


def test_training_stays_sparse_while_calls_run_dense() -> None:
    model = tiny_vit()
    patch = sparsiattn.patch(model, "local", k=9)
    sparse = run(model)
    with patch.monitor(bound=0.999, on_low="dense"):
        with pytest.warns(LowAttentionMass):
            run(model)
        model.train()
        assert torch.allclose(run(model), sparse)
        model.eval()
        assert sparsiattn.show(model, tiny_images(1)).sites  # looks at what is patched


# --- its life ------------------------------------------------------------------------------------


def test_closing_and_undoing_restore_everything() -> None:
    model = tiny_vit()
    dense = run(model)
    patch = sparsiattn.patch(model, "local", k=9)
    before = {key: len(vars(model)[key]) for key in ("_forward_hooks", "_forward_pre_hooks")}
    monitor = patch.monitor(bound=0.999, on_low="dense")
    assert before == {key: len(vars(model)[key]) for key in before}
    with pytest.raises(InvalidOption, match="already has a monitor"):
        patch.monitor()
    with pytest.warns(LowAttentionMass):
        run(model)
    patch.unpatch()
    assert monitor.closed
    assert torch.equal(run(model), dense)
    monitor.close()
    assert monitor.report().watched == 1
    assert "closed" in repr(monitor)
    with pytest.raises(ModelChanged, match="undone"):
        patch.monitor()
    with sparsiattn.patch(model, "local", k=9) as again:
        again.monitor().close()
        again.monitor().close()


def test_copies_are_neither_watched_nor_dense() -> None:
    model = tiny_vit()
    patch = sparsiattn.patch(model, "local", k=9)
    sparse = run(model)
    with patch.monitor(every=1, bound=0.999, on_low="dense") as monitor:
        with pytest.warns(LowAttentionMass):
            run(model)
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(saved, weights_only=False),
        ]
        for copied in copies:
            assert torch.equal(run(copied), sparse)
            live = sparsiattn.patch_of(copied)
            assert live is not None
            assert live.active_monitor is None
            with live.monitor():  # can be watched by itself
                run(copied)
        assert monitor.report().calls == 1


def test_a_report_has_it_as_data() -> None:
    model = tiny_vit()
    patch = sparsiattn.patch(model, "topk", k=0.25)
    assert patch.report().monitor is None
    assert "monitor" not in str(patch.report())
    with patch.monitor(every=10):
        run(model, 11)
        data = json.loads(json.dumps(patch.report().to_dict()))["monitor"]
        assert (data["calls"], data["watched"], data["every"]) == (11, 2, 10)
        line = str(patch.report()).splitlines()
        assert any(
            text.startswith("monitor: 2 of 11 calls watched (1 in 10, 8 rows of 2 sites): kept")
            for text in line
        )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 0}, "every must be an int >= 1"),
        ({"every": 1.5}, "every must be an int >= 1"),
        ({"rows": True}, "rows must be an int >= 1"),
        ({"bound": 0}, "bound must be above 0 and at most 1"),
        ({"bound": 1.1}, "bound must be above 0 and at most 1"),
        ({"on_low": "stop"}, "on_low must be 'warn' or 'dense'"),
        ({"on_low": "dense"}, "needs a bound"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], says: str) -> None:
    patch = sparsiattn.patch(tiny_vit(), "topk", k=0.25)
    with pytest.raises(InvalidOption, match=says):
        patch.monitor(**options)
    assert patch.active_monitor is None


@pytest.mark.parametrize("strategy", ["dense", "linformer", "token_drop"])
def test_where_no_key_is_dropped_there_is_nothing_to_watch(strategy: str) -> None:
    patch = sparsiattn.patch(tiny_vit(), strategy)
    with pytest.raises(InvalidOption, match="drops none at"):
        patch.monitor()


# --- compiled ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_models_stay_whole_and_follow_the_switch() -> None:
    model = tiny_vit()
    dense = run(model)
    patch = sparsiattn.patch(model, "local", k=9)
    sparse = run(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    monitor = patch.monitor(every=1, bound=0.999, on_low="dense")
    assert torch.allclose(run(compiled), sparse, atol=1e-5)
    assert monitor.report().calls == 0
    with torch.compiler.set_stance("force_eager"), pytest.warns(LowAttentionMass):
        run(compiled)
    assert monitor.report().watched == 1
    assert torch.allclose(run(compiled), dense, atol=1e-5)
    assert torch.allclose(run(model), dense, atol=1e-5)
    monitor.close()
    assert torch.allclose(run(compiled), sparse, atol=1e-5)


def test_traced_and_exported_programs_have_none_of_it(looks: list[int]) -> None:
    model = tiny_vit()
    patch = sparsiattn.patch(model, "local", k=9)
    plain = run(model)
    with patch.monitor(every=1) as monitor:
        program = torch.export.export(model, (tiny_images(2),))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            traced = torch.jit.trace(model, tiny_images(2), check_trace=False)
        assert looks == []
        assert torch.allclose(program.module()(tiny_images(2)), plain, atol=1e-5)
        assert torch.allclose(traced(tiny_images(2)), plain, atol=1e-5)
        assert monitor.report().watched == 0
