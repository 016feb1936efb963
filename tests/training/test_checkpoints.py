"""Checkpoints: to the bit where all is saved, refused where it is another run."""

import jax
import numpy as np
import pytest
from carts import advance, assert_same, config, everything, train

from som.training import checkpoints, loop, runs
from som.training.checkpoints import (
    load_checkpoint,
    load_packed,
    save_checkpoint,
    save_packed,
)
from som.training.records import CheckpointError


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_resume_from_any_chunk_is_exact(tmp_path, at):
    """In warm-up, just before and after the first update, and later."""
    one = loop.Trainer(config())
    buffer = advance(one, one.empty_buffer(), at)
    save_checkpoint(one, buffer, tmp_path / "c.npz")
    two = loop.Trainer(config())
    other = load_checkpoint(two, tmp_path / "c.npz")
    assert_same(everything(one, buffer), everything(two, other))
    buffer, other = advance(one, buffer, 2), advance(two, other, 2)
    assert_same(everything(one, buffer), everything(two, other))


def test_a_checkpoint_loads_with_wide_numbers_too(tmp_path):
    one = loop.Trainer(config())
    buffer = advance(one, one.empty_buffer(), 3)
    save_checkpoint(one, buffer, tmp_path / "c.npz")
    with jax.enable_x64(True):
        two = loop.Trainer(config())
        other = load_checkpoint(two, tmp_path / "c.npz")
        assert_same(everything(one, buffer), everything(two, other))


def test_resume_with_a_ring_that_has_wrapped(tmp_path):
    small = config(capacity=300)
    one = loop.Trainer(small)
    buffer = one.empty_buffer()
    for _ in range(5):
        buffer = loop.store(buffer, loop.collect(one, one.state))
        one.chunk += 1
    save_checkpoint(one, buffer, tmp_path / "c.npz")
    two = loop.Trainer(small)
    other = load_checkpoint(two, tmp_path / "c.npz")
    assert int(other.added[0]) == 500
    assert_same(everything(one, buffer), everything(two, other))


def test_packed_checkpoint_goes_on_with_a_new_replay(tmp_path):
    """Only the optimisers' moments are rounded; the record tells of the refill."""
    train(tmp_path, steps=600, seeds=(3, 5), time_limit=1e-9)
    for _ in range(3):
        runs.resume(tmp_path, time_limit=1e-9)
    whole = loop.Trainer(config((3, 5)))
    load_checkpoint(whole, tmp_path / "checkpoint.npz")
    packed = loop.Trainer(config((3, 5)))
    buffer = load_packed(packed, tmp_path)
    assert packed.chunk == 4 and packed.refilled == 200
    assert int(buffer.added[0]) == 100  # the other hundred rows are pending
    assert not np.array_equal(packed.rows, whole.rows)
    for name in whole.state._fields:
        pair = getattr(whole.state, name), getattr(packed.state, name)
        near = 2**-8 if name.endswith("_opt") else 0
        for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_allclose(a, b, rtol=near)
            assert a.dtype == b.dtype
    (tmp_path / "checkpoint.npz").unlink()
    run = runs.resume(tmp_path)
    refilled = [part["refilled"] for part in run.record["slices"]]
    assert refilled == [0, 0, 0, 0, 200]
    assert run.record["curve"][-1]["step"] == 600


def test_packed_checkpoints_must_belong_together(tmp_path):
    train(tmp_path, seeds=(0, 1), time_limit=1e-9)
    first = (tmp_path / "packed-1.npz").read_bytes()
    runs.resume(tmp_path, time_limit=1e-9)
    (tmp_path / "packed-1.npz").write_bytes(first)
    (tmp_path / "checkpoint.npz").unlink()
    with pytest.raises(CheckpointError, match=r"different chunks: \[1, 2\]"):
        runs.resume(tmp_path)


def test_packed_checkpoint_of_the_paper_is_small(tmp_path):
    """Ten megabytes at most for one seed of the largest task."""
    run = config() | {"env": "Humanoid-v4", "profile": "paper", "agent": {}}
    save_packed(loop.Trainer(run), tmp_path)
    assert (tmp_path / "packed-0.npz").stat().st_size < 10e6


def test_checkpoint_of_another_version(tmp_path, monkeypatch):
    trainer = loop.Trainer(config())
    whole = checkpoints._metadata
    old = {k: v for k, v in whole(trainer).items() if k != "slices"}
    monkeypatch.setattr(checkpoints, "_metadata", lambda trainer: old)
    save_checkpoint(trainer, trainer.empty_buffer(), tmp_path / "c.npz")
    monkeypatch.setattr(checkpoints, "_metadata", whole)
    with pytest.raises(CheckpointError, match="lacks slices: another version"):
        load_checkpoint(trainer, tmp_path / "c.npz")


def test_checkpoint_of_another_run(tmp_path, straight):
    for other, sentence in [
        (config((0, 1)), "something else: it lacks .*envs"),
        (config(num_envs=4), "another size: .*envs"),
    ]:
        with pytest.raises(CheckpointError, match=sentence):
            load_checkpoint(loop.Trainer(other), straight.out / "checkpoint.npz")
    with pytest.raises(CheckpointError, match="something else"):
        load_checkpoint(loop.Trainer(config()), straight.out / "policy.npz")
