"""Runs: they learn, they resume to the bit, they refuse clearly."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from carts import AGENT, LOOP, STEPS, assert_same_arrays, config, train
from examples import Cart, in_a_process

from som.training import checkpoints, environments, logs, loop, records, runs
from som.training.policy import evaluate, load
from som.training.records import CheckpointError


def test_it_learns():
    run = train(steps=6_000, evaluations=1, episodes=20)
    final = np.mean(run.record["curve"][-1]["returns"])
    assert final > -5, "idle returns about -17, random actions -34"


# Saving and resuming


def test_resume_after_kill(tmp_path, straight):
    """Training that is killed outright ends where the undisturbed run ended."""
    out = tmp_path / "killed"
    assert in_a_process(_train_and_die, out) == -signal.SIGKILL
    assert records.read_metadata(out / "checkpoint.npz")["chunk"] == 6
    run = runs.resume(out)
    assert_same_arrays(out / "checkpoint.npz", straight.out / "checkpoint.npz")
    assert_same_arrays(out / "policy.npz", straight.out / "policy.npz")
    returns = [point["returns"] for point in run.record["curve"]]
    assert returns == [point["returns"] for point in straight.record["curve"]]
    assert_same_arrays(out / "policy-best.npz", straight.out / "policy-best.npz")
    tables = [logs.read_table(run.out / "metrics.csv") for run in (run, straight)]
    assert [row["step"] for row in tables[0]] == [str(s) for s in range(100, 1001, 100)]
    for one, two in zip(*tables, strict=True):
        assert one | {"seconds": 0} == two | {"seconds": 0}


def test_resume_before_the_first_checkpoint_starts_over(tmp_path, straight):
    config_of = records.read_record(straight.out / "config.json")
    records.write_record(tmp_path / "config.json", config_of)
    runs.resume(tmp_path)
    assert_same_arrays(tmp_path / "checkpoint.npz", straight.out / "checkpoint.npz")


@pytest.mark.parametrize("chunk", [2, 5])
def test_ctrl_c_saves_and_resume_continues(tmp_path, straight, chunk):
    """Once in warm-up, once while learning."""

    def interrupt(step, metrics):
        if step == 100 * chunk:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # ignored in a background job
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert records.read_metadata(tmp_path / "checkpoint.npz")["chunk"] == chunk
    runs.resume(tmp_path)
    assert_same_arrays(tmp_path / "checkpoint.npz", straight.out / "checkpoint.npz")


def test_ten_slices_are_one_run(tmp_path, straight):
    """Each chunk in a slice of its own, from one whole checkpoint to the next."""
    run = train(tmp_path, time_limit=1e-9)
    for chunk in range(2, 11):
        assert not runs.is_finished(tmp_path)
        (tmp_path / "packed-0.npz").unlink()
        run = runs.resume(tmp_path, time_limit=1e-9)
        assert records.read_metadata(tmp_path / "checkpoint.npz")["chunk"] == chunk
    assert runs.is_finished(tmp_path)
    assert_same_arrays(tmp_path / "checkpoint.npz", straight.out / "checkpoint.npz")
    assert_same_arrays(tmp_path / "policy.npz", straight.out / "policy.npz")
    slices = run.record["slices"]
    assert [part["first_step"] for part in slices] == list(range(0, 1000, 100))
    assert all(part["refilled"] == 0 for part in slices)
    seconds = sum(part["seconds"] for part in slices)
    assert seconds == pytest.approx(run.record["wall_seconds"])


def test_the_newer_checkpoint_is_taken(tmp_path):
    run = train(tmp_path, time_limit=1e-9)
    old = (tmp_path / "checkpoint.npz").read_bytes()
    run = runs.resume(tmp_path, time_limit=1e-9)
    (tmp_path / "checkpoint.npz").write_bytes(old)
    run = runs.resume(tmp_path, time_limit=1e-9)
    assert [p["refilled"] for p in run.record["slices"]] == [0, 0, 200]
    assert [p["first_step"] for p in run.record["slices"]] == [0, 100, 200]


def test_a_file_of_something_else_is_not_overwritten(tmp_path, straight):
    config_of = records.read_record(straight.out / "config.json")
    records.write_record(tmp_path / "config.json", config_of)
    shutil.copy(straight.out / "policy.npz", tmp_path / "checkpoint.npz")
    with pytest.raises(CheckpointError, match="something else"):
        runs.resume(tmp_path)


# Steering


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


# Divergence


@pytest.mark.parametrize("where", ["metric", "parameter"])
def test_divergence_stops_and_keeps_the_last_good_state(tmp_path, monkeypatch, where):
    learn, calls = loop.learn, []

    def poison(x):
        return x * jnp.nan

    def poisoned(*args):
        state, buffer, metrics = learn(*args)
        calls.append(1)
        if len(calls) == 4:
            if where == "metric":
                metrics["critic/loss"] = jnp.full(1, jnp.nan)
            else:
                state = state._replace(policy=jax.tree.map(poison, state.policy))
        return state, buffer, metrics

    monkeypatch.setattr(loop, "learn", poisoned)
    name = "critic/loss" if where == "metric" else "a parameter"
    sentence = (
        f"^training diverged: {name} of seed 0 is not finite at step 600; "
        f"the last good checkpoint is {tmp_path / 'checkpoint.npz'}, of step 500$"
    )
    with pytest.raises(FloatingPointError, match=sentence):
        train(tmp_path, checkpoint_seconds=1e-9)
    trainer = loop.Trainer(config())
    checkpoints.load_checkpoint(trainer, tmp_path / "checkpoint.npz")
    assert trainer.steps == 500
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(trainer.state))


def test_divergence_without_a_checkpoint(monkeypatch):
    def diverged(agent, state, buffer, rows, keys, updates, scale):
        return state, buffer, {"critic/loss": jnp.array([jnp.inf])}

    monkeypatch.setattr(loop, "learn", diverged)
    with pytest.raises(FloatingPointError, match="step 300; no checkpoint had been"):
        train()


# Arguments


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"warmpu": 1}, "unknown setting 'warmpu'; did you mean 'warmup'?"),
        ({"batchsize": 1}, "unknown setting 'batchsize'; did you mean 'batch_size'?"),
        ({"algo": "sam"}, "unknown algorithm 'sam'; did you mean 'som'?"),
        ({"profile": "labtop"}, "unknown profile 'labtop'; did you mean 'laptop'?"),
        ({"steps": 0}, "steps is 0; at least 1 is wanted"),
        ({"steps": -5}, "steps is -5; at least 1 is wanted"),
        ({"seeds": ()}, r"seeds is \(\); a number of seeds, or a list of different"),
        ({"seeds": (1, 1)}, r"seeds is \(1, 1\); .* a list of different whole numbers"),
        ({"seeds": (-1,)}, r"seeds is \(-1,\); .* a list of different"),
        ({"seeds": (0.5,)}, r"seeds is \(0.5,\); .* a list of different"),
        ({"seeds": 0}, "seeds is 0; a number of seeds, or a list of different"),
        ({"seed": 42}, "unknown setting 'seed'; here it is the argument 'seeds'"),
        ({"log": ["tensorbord"]}, "unknown log 'tensorbord'; did you mean 'tensorbo"),
        ({"capacity": 0}, "capacity is 0; a whole number of at least 1 is wanted"),
        ({"env": "Kart-v0"}, "did you mean 'Cart-v0'?"),
        ({"env": "CartPole-v1"}, "a Box of one dimension is wanted"),
    ],
)  # fmt: skip
def test_train_refuses(tmp_path, change, sentence):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=sentence):
        runs.train(**{"env": "Cart-v0", "steps": 1000, "out": out, **change})
    assert not out.exists()


def test_train_refuses_a_folder_that_holds_another_run(straight):
    before = (straight.out / "config.json").read_bytes()
    for change, sentence in [
        ({"width": 16}, "width is 32 there and 16 here"),
        ({"seeds": [1]}, r"seeds is \[0\] there and \[1\] here"),
        ({"steps": 900}, "steps is 1000 there and 900 here"),
        ({"warmup": 300}, "warmup is 200 there and 300 here"),
    ]:
        with pytest.raises(ValueError, match=f"holds another run .{sentence}"):
            train(straight.out, **change)
    assert (straight.out / "config.json").read_bytes() == before


def test_logs_want_a_folder():
    with pytest.raises(ValueError, match="log is 'wandb'; it wants a folder, out"):
        train(log="wandb")


def test_train_refuses_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        train(tmp_path / "file" / "run", progress=pytest.fail)


def test_progress_sees_every_chunk():
    seen = []
    train(progress=lambda step, metrics: seen.append((step, metrics)), steps=450)
    assert [step for step, _ in seen] == [100, 200, 300, 400, 450]
    assert "critic/loss" not in seen[1][1] and "critic/loss" in seen[2][1]
    assert "evaluation/return" in seen[-1][1]


def _die(step, metrics):
    if step == 700:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)


def _train_and_die(out):
    train(out, _die, checkpoint_seconds=1e-9)


# Tasks of one's own


class Own(Cart):
    """A cart with arguments, which counts what is open and fails when asked."""

    open, fails_at = 0, None

    def __init__(self, gain=1.0):
        self.gain, self.steps = gain, 0
        Own.open += 1

    def step(self, action):
        self.steps += 1
        if self.steps == Own.fails_at:
            raise KeyError("axle")
        return super().step(self.gain * action)

    def close(self):
        Own.open -= 1


def timed(**kwargs):
    return gym.wrappers.TimeLimit(Own(**kwargs), 20)


@pytest.fixture
def own():
    Own.open, Own.fails_at = 0, None
    yield Own
    assert Own.open == 0


def test_a_factory_trains_as_the_id_does(tmp_path, own, straight):
    run = train(tmp_path, env=timed)
    assert_same_arrays(tmp_path / "checkpoint.npz", straight.out / "checkpoint.npz")
    assert run.record["env"] == run.policy.env_id == "timed()"
    np.testing.assert_array_equal(
        evaluate(load(tmp_path), timed, 3), evaluate(straight.policy, "Cart-v0", 3)
    )
    with pytest.raises(ValueError, match=r"timed\(\) is made by a program.* as env"):
        evaluate(load(tmp_path))


def test_a_run_on_a_factory_is_resumed_with_it(tmp_path, own, straight):
    def stop(step, metrics):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop, env=Own, wrappers=[limit], env_kwargs={"gain": 1})
    config_of = records.read_record(tmp_path / "config.json")
    assert (config_of["env"], config_of["env_kwargs"]) == ("limit(Own())", {"gain": 1})
    with pytest.raises(ValueError, match=r"limit\(Own\(\)\) is made by a program"):
        runs.resume(tmp_path)
    with pytest.raises(CheckpointError, match=r"on limit\(Own\(\)\), .* Cart-v0"):
        runs.resume(tmp_path, env="Cart-v0")
    run = runs.resume(tmp_path, env=Own, wrappers=[limit])
    assert_same_arrays(tmp_path / "checkpoint.npz", straight.out / "checkpoint.npz")
    assert run.record["config"]["env"] == {"gain": 1}


def limit(env):
    return gym.wrappers.TimeLimit(env, 20)


def test_a_mistake_of_the_task_is_told_with_what_is_saved(tmp_path, own):
    own.fails_at = 70  # of 200 in each copy
    changes = {"env": timed, "checkpoint_seconds": 1e-9}
    told = rf"^step of timed\(\) failed: KeyError: 'axle' \({__file__}, line \d+\); "
    path = tmp_path / "checkpoint.npz"
    with pytest.raises(environments.TaskError, match=told) as caught:
        train(tmp_path, **changes)
    assert str(caught.value).endswith(f"checkpoint is {path}, of step 300")
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(environments.TaskError, match="no checkpoint had been saved"):
        train(**changes)
    own.fails_at = None
    assert runs.resume(tmp_path, env=timed).record["curve"][-1]["step"] == STEPS


def test_a_single_environment_is_refused(own, tmp_path):
    one = Own()
    with pytest.raises(ValueError, match=r"one environment, .*: give its Gymnasium id"):
        train(tmp_path / "run", env=one)
    one.close()
    assert not (tmp_path / "run").exists()


def test_a_run_prints_in_one_line(straight):
    mean = np.mean(straight.record["curve"][-1]["returns"])
    assert repr(straight) == (
        f"<run of som on Cart-v0: 1 seed(s), return {mean:.1f} after 1,000 steps, "
        f"in {straight.out}>"
    )
    record = {**straight.record, "curve": []}
    fresh = runs.Run(record, straight.policy, None, [straight.policy], [])
    assert repr(fresh).endswith("1 seed(s), not evaluated yet, in no folder>")


def test_a_run_of_an_older_version_is_taken_up(tmp_path, straight):
    out = tmp_path / "run"
    shutil.copytree(straight.out, out)
    (out / "record.json").unlink()  # killed before its last word
    stored = records.read_record(out / "config.json")
    assert stored["agent"].pop("tau") != 0.005  # as if it had come later
    records.write_record(out / "config.json", stored)
    config = runs.resume(out).policy.agent.config
    assert config == replace(straight.policy.agent.config, tau=0.005)


# Faults


class Breaks(Cart):
    """The cart, which fails in one step of its first copy."""

    left = None  # steps until then

    def step(self, action):
        if Breaks.left is not None:
            Breaks.left -= 1
            if Breaks.left == 0:
                raise self.error
        return super().step(action)

    error = RuntimeError("stuck")


gym.register("Breaks-v0", entry_point=Breaks, max_episode_steps=20)


@pytest.mark.parametrize("error", [RuntimeError("stuck"), SystemExit(1)])
@pytest.mark.parametrize("at", [333, 777])
def test_what_was_learned_is_kept_when_a_task_fails(tmp_path, monkeypatch, error, at):
    """Up to the chunk before, to the bit, though nothing was saved before."""
    options = {"env": "Breaks-v0", "evaluations": 1}
    train(tmp_path / "straight", **options)
    monkeypatch.setattr(Breaks, "left", at)
    monkeypatch.setattr(Breaks, "error", error)
    with pytest.raises(environments.TaskError, match=r"Breaks-v0.*last good") as told:
        train(tmp_path / "run", **options)
    assert f"of step {at // 100 * 100}" in str(told.value)
    monkeypatch.setattr(Breaks, "left", None)
    train(tmp_path / "run", **options)
    names = "checkpoint.npz", "policy.npz"
    for name in names:
        assert_same_arrays(tmp_path / "run" / name, tmp_path / "straight" / name)


def test_an_evaluation_that_failed_is_made_up_for(tmp_path, straight, monkeypatch):
    evaluate, calls = runs.evaluate, []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise environments.TaskError("step of Cart-v0 failed")
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(runs, "evaluate", fail)
    with pytest.raises(environments.TaskError, match="of step 1000"):
        train(tmp_path)
    assert not runs.is_finished(tmp_path)
    run = train(tmp_path)
    returns = [point["returns"] for point in run.record["curve"]]
    assert returns == [point["returns"] for point in straight.record["curve"]]
    assert runs.is_finished(tmp_path)


def test_two_in_one_folder_are_one_too_many(tmp_path):
    told = []

    def second(step, metrics):
        if step == 300:
            for call in (train, runs.resume):
                with pytest.raises(runs.InUse, match=r"is in use by process \d+"):
                    call(tmp_path)
                told.append(step)

    train(tmp_path, second)
    assert told == [300, 300]


HOLD = """
import os, sys, time
from pathlib import Path
from som.training import runs
with runs.alone(Path(sys.argv[1])):
    child = os.fork()
    print(child or "", flush=True)
    time.sleep(60)
"""


def test_a_lock_does_not_outlive_its_owner(tmp_path):
    """Not even in a process that the owner has forked off."""
    place = str(Path(__file__).parents[2])
    owner = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": place},
    )  # fmt: skip
    child = int(owner.stdout.readline())
    try:
        with pytest.raises(runs.InUse), runs.alone(tmp_path):
            pass
        owner.kill()
        owner.wait()
        os.kill(child, 0)  # it lives
        with runs.alone(tmp_path):
            pass
    finally:
        owner.kill()
        os.kill(child, signal.SIGKILL)
        owner.stdout.close()


def test_no_lock_where_none_can_be_had(tmp_path, monkeypatch):
    with runs.alone(None), runs.alone(tmp_path / "missing"):
        pass
    monkeypatch.setattr(runs, "fcntl", None)
    with runs.alone(tmp_path), runs.alone(tmp_path):
        pass


def test_sigterm_has_an_exception_of_its_own(capsys):
    with runs.interruptible() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert "stopping" in capsys.readouterr().err
        assert stop.raises is runs.Terminated
        with pytest.raises(runs.Terminated):
            signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("where", ["replay", "rows", "observation", "action"])
def test_nothing_that_is_no_number_is_saved(tmp_path, straight, monkeypatch, where):
    whole = runs.run_chunk

    def spoil(trainer, buffer):
        if trainer.chunk == 5:
            if where == "replay":
                buffer = buffer._replace(rows=buffer.rows.at[0, 7, 1].set(jnp.nan))
            elif where == "action":
                old = trainer.state.target_policy
                new = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), old)
                trainer.state = trainer.state._replace(target_policy=new)
            else:
                name = {"rows": "rows"}.get(where, "observation")
                setattr(trainer, name, np.full_like(getattr(trainer, name), np.nan))
        return whole(trainer, buffer)

    monkeypatch.setattr(runs, "run_chunk", spoil)
    with pytest.raises(FloatingPointError, match="of step 500"):
        train(tmp_path, checkpoint_seconds=1e-9)
    monkeypatch.undo()
    runs.resume(tmp_path)
    assert_same_arrays(tmp_path / "checkpoint.npz", straight.out / "checkpoint.npz")


def test_a_removed_folder_is_made_again(tmp_path):
    out = tmp_path / "run"

    def remove(step, metrics):
        if step == 500:
            shutil.rmtree(out)

    train(out, remove)
    assert runs.is_finished(out)
    steps = [row["step"] for row in logs.read_table(out / "metrics.csv")]
    assert steps == ["600", "700", "800", "900", "1000"]


def test_a_damaged_table_does_not_stop_a_run(tmp_path):
    train(tmp_path, time_limit=1e-9)
    (tmp_path / "metrics.csv").write_bytes(b"step,seed\n1\xff,\x00\n\n,,,\n")
    runs.resume(tmp_path)
    steps = [row["step"] for row in logs.read_table(tmp_path / "metrics.csv")]
    assert steps[0] == "200" and steps[-1] == "1000"


@pytest.mark.parametrize(
    "change",
    [{"steps": "many"}, {"steps": 0}, {"env": 3}, {"seeds": [[]]}, {"loop": None},
     {"agent": {"width": "wide"}}, {"agent": {"actor_lr": None}}, {"algo": []}],
)  # fmt: skip
def test_a_config_that_describes_no_run(tmp_path, change):
    config_of = config() | change
    records.write_record(tmp_path / "config.json", config_of)
    with pytest.raises(CheckpointError, match="does not describe a run") as error:
        runs.resume(tmp_path)
    assert "\n" not in str(error.value)
