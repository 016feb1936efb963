"""Runs: they learn, they resume to the bit, they refuse clearly."""

import os
import shutil
import signal
import time

import numpy as np
import pytest
from carts import assert_same_arrays, train
from examples import in_a_process

from som.training import logs, records, runs
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
