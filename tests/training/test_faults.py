"""Runs of tasks that are the user's own, and faults on purpose: nothing is lost."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from carts import STEPS, assert_same_arrays, config, train
from examples import Cart

from som.training import checkpoints, environments, logs, loop, records, runs
from som.training.policy import evaluate, load
from som.training.records import CheckpointError

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
