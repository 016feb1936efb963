"""Runs that are looked at, stopped, made longer and interrupted."""

import gc
import shutil
import signal
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from carts import AGENT, LOOP, STEPS, assert_same_arrays, train
from examples import Cart

from som.training import records, runs
from som.training.policy import evaluate, load
from som.training.records import CheckpointError


def test_the_same_call_twice_trains_once(straight):
    before = (straight.out / "record.json").stat().st_mtime_ns
    again = train(straight.out)
    assert again.record == straight.record
    assert (straight.out / "record.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("how", ["train", "resume"])
def test_a_finished_run_gets_longer(tmp_path, straight, how):
    """To the bits and the curve that it would have had at once."""
    train(tmp_path, steps=500, evaluations=1)
    assert runs.is_finished(tmp_path)
    with pytest.raises(ValueError, match=r"steps is 400; the run in .* has 500"):
        runs.resume(tmp_path, steps=400)
    if how == "train":
        run = train(tmp_path, steps=1000, evaluations=1)
    else:
        run = runs.resume(tmp_path, steps=1000)
    for name in ("checkpoint.npz", "policy.npz", "policy-best.npz"):
        assert_same_arrays(tmp_path / name, straight.out / name)
    assert run.record["steps"] == 1000
    for one, two in zip(run.record["curve"], straight.record["curve"], strict=True):
        assert (one["step"], one["returns"]) == (two["step"], two["returns"])


def test_a_run_that_was_extended_but_killed_goes_on(tmp_path):
    train(tmp_path, steps=500)
    config_of = records.read_record(tmp_path / "config.json")
    records.write_record(tmp_path / "config.json", config_of | {"steps": 600})
    assert not runs.is_finished(tmp_path)
    assert runs.resume(tmp_path).record["curve"][-1]["step"] == 600


def _say_stop(step, metrics):
    return step == 300


def _fail(step, metrics):
    if step == 300:
        raise RuntimeError("a mistake in the callback")


@pytest.mark.parametrize("progress", [_say_stop, _fail])
def test_progress_may_stop_a_run(tmp_path, straight, progress):
    if progress is _fail:
        with pytest.raises(RuntimeError, match="a mistake in the callback"):
            train(tmp_path, progress)
    else:
        run = train(tmp_path, progress)
        assert run.record["slices"][0]["seconds"] > 0
    assert records.read_metadata(tmp_path / "checkpoint.npz")["chunk"] == 3
    assert not runs.is_finished(tmp_path)
    runs.resume(tmp_path)
    assert_same_arrays(tmp_path / "checkpoint.npz", straight.out / "checkpoint.npz")


def test_progress_may_see_the_trainer():
    seen = []

    def watch(step, metrics, trainer):
        seen.append((step, trainer.steps, trainer.policy(1)(np.zeros(2)).shape))
        return len(seen) == 2

    train(progress=watch, seeds=2)
    assert seen == [(100, 100, (1,)), (200, 200, (1,))]


def test_metrics_are_plain_floats():
    seen = {}
    run = train(progress=lambda step, metrics: seen.update({step: metrics}), seeds=2)
    assert {type(v) for now in seen.values() for v in now.values()} == {float}
    assert seen[100]["episode/length"] == 20
    last = run.record["curve"][-1]
    assert seen[1000]["evaluation/return"] == pytest.approx(np.mean(last["returns"]))
    mean = np.mean(last["metrics"]["critic/loss"])
    assert seen[1000]["critic/loss"] == pytest.approx(mean)


def test_all_seeds_and_the_best_are_at_hand(tmp_path):
    run = train(tmp_path, seeds=[0, 4], evaluations=5, steps=2000)
    curve = np.array([np.mean(p["returns"], 1) for p in run.record["curve"]])
    again = runs.resume(tmp_path)
    for i, seed in enumerate((0, 4)):
        where = 3, runs.EVALUATION_SEED + seed
        for policies, point in ((run.policies, -1), (run.best, curve[:, i].argmax())):
            returns = evaluate(policies[i], "Cart-v0", *where)
            assert returns.tolist() == run.record["curve"][point]["returns"][i]
        best = load(tmp_path / "policy-best.npz", i), again.best[i], run.best[i]
        values = [policy.act(np.ones((3, 2))) for policy in best[:2]]
        np.testing.assert_array_equal(*values)


def test_an_untouched_network_is_evaluated_once():
    run = train(warmup=500, evaluations=10, steps=1000)
    updates = [point["updates"] for point in run.record["curve"]]
    assert updates[0] == 0 and updates[-1] == 200
    assert len(set(updates)) == len(updates) == 6  # at 100, and from 600 on


def test_the_curve_does_not_depend_on_the_clock(monkeypatch):
    """However slow a machine is at evaluating, each evaluation takes place."""
    quick = train(evaluations=5)

    def slow(policy, **words):
        return time.sleep(1) or evaluate(policy, **words)

    monkeypatch.setattr(runs, "evaluate", slow)
    curves = [run.record["curve"] for run in (quick, train(evaluations=5))]
    for one, two in zip(*curves, strict=True):
        assert (one["step"], one["returns"]) == (two["step"], two["returns"])
    assert [point["step"] for point in curves[0]] == [200, 400, 600, 800, 1000]
    assert all(point["evaluation_seconds"] >= 1 for point in curves[1])


def test_a_short_run_on_long_episodes_says_how_few_it_plays(tmp_path, capsys):
    """And a run of an older version, which played more, is taken up as it was."""
    kept = {k: v for k, v in LOOP.items() if k not in ("evaluations", "episodes")}
    words = {"env": Cart, "steps": 1000, **AGENT, **kept}
    run = runs.train(**words, out=tmp_path, progress=True)
    assert np.shape(run.record["curve"][0]["returns"]) == (1, 6)
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith(", 6 episodes an evaluation (usually 20)")
    config_of = records.read_record(tmp_path / "config.json")
    config_of["loop"]["episodes"] = 20
    records.write_record(tmp_path / "config.json", config_of)
    assert runs.train(**words, out=tmp_path).record == run.record


def test_no_checkpoint_before_the_end(tmp_path):
    train(tmp_path, checkpoint_seconds=float("inf"), time_limit=1e-9)
    assert runs.resume(tmp_path).record["curve"][-1]["step"] == STEPS


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_programs_are_forgotten_before_maps_run_out(monkeypatch, share):
    assert 0 < runs.memory_maps() < 1
    called = []
    monkeypatch.setattr(runs, "memory_maps", lambda: share)
    monkeypatch.setattr(runs.jax, "clear_caches", lambda: called.append(1))
    train(steps=300)
    assert len(called) == (share > 0.5)


def test_a_terminal_shows_progress_unless_told_not_to(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    train(progress=False)
    assert capsys.readouterr().out == ""
    train()
    text = capsys.readouterr().out
    assert "som on Cart-v0, profile laptop, on cpu: 1,000 steps, 1 seed" in text
    assert "1,000 of 1,000 steps" in text


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_no_time_is_refused(limit):
    with pytest.raises(ValueError, match=r"time_limit is .*seconds"):
        train(time_limit=limit)


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_ctrl_c_stops_at_once(first):
    with runs.interruptible() as stop:
        signal.raise_signal(first)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_interruptible_in_another_thread():
    def enter():
        with runs.interruptible() as stop:
            seen.append(stop.is_set())

    seen = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]


def test_full_disk_loses_nothing(tmp_path, straight, monkeypatch):
    savez, calls = np.savez, []

    def full(file, **arrays):
        calls.append(1)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        savez(file, **arrays)

    monkeypatch.setattr(records.np, "savez", full)
    with pytest.raises(CheckpointError, match=r"No space left.* is intact"):
        train(tmp_path, checkpoint_seconds=1e-9)
    monkeypatch.undo()
    assert records.read_metadata(tmp_path / "checkpoint.npz")["chunk"] == 3
    runs.resume(tmp_path)
    assert_same_arrays(tmp_path / "checkpoint.npz", straight.out / "checkpoint.npz")


def test_finished_run_comes_back_as_it_is(straight):
    files = sorted(straight.out.iterdir())
    before = [f.stat().st_mtime_ns for f in files]
    again = runs.resume(straight.out)
    assert again.record == straight.record
    assert [f.stat().st_mtime_ns for f in files] == before
    here = np.zeros((3, 2))
    straight.policy.calls = 0  # the noise of its first call
    np.testing.assert_array_equal(again.policy(here), straight.policy(here))


def test_resume_between_the_last_checkpoint_and_the_record(tmp_path, straight):
    for name in ("config.json", "checkpoint.npz"):
        shutil.copy(straight.out / name, tmp_path)
    run = runs.resume(tmp_path)
    assert run.record["curve"] == straight.record["curve"]
    assert records.read_record(tmp_path / "record.json") == run.record


def test_folder_of_a_run(straight):
    names = {"config.json", "checkpoint.npz", "policy.npz", "record.json"}
    names |= {"learning_curve.png", "policy-best.npz", "metrics.csv", ".lock"}
    assert {f.name for f in straight.out.iterdir()} == names
    assert records.read_record(straight.out / "record.json") == straight.record


def test_a_curve_is_drawn_where_it_has_grown_and_its_figure_freed(
    tmp_path, monkeypatch
):
    draw, figures = records.plot_curves, []

    def watched(*args):
        figure = draw(*args)
        figures.append(weakref.ref(figure))
        return figure

    monkeypatch.setattr(records, "plot_curves", watched)
    gc.disable()
    try:
        train(tmp_path / "often", checkpoint_seconds=1e-9)
    finally:
        gc.enable()
    assert [figure() for figure in figures] == [None, None]  # two evaluations


def test_record(straight):
    record = straight.record
    assert [p["step"] for p in record["curve"]] == [500, 1000]
    assert [p["updates"] for p in record["curve"]] == [120, 320]
    assert np.shape(record["curve"][0]["returns"]) == (1, 3)
    assert record["config"]["agent"]["width"] == 32
    assert record["config"]["loop"]["warmup"] == 200
    assert record["seeds"] == [0] and record["wall_seconds"] > 0


def test_resume_refuses_what_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="no record at"):
        runs.resume(tmp_path)
    records.write_record(tmp_path / "config.json", {"algo": "som"})
    with pytest.raises(CheckpointError, match="does not describe a run"):
        runs.resume(tmp_path)
