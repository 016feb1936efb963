"""A run of every agent of som.AGENTS that is killed goes on to the same end."""

import os
import signal

import jax
import numpy as np
import pytest
from examples import NAMES, assert_same, in_a_process, tiny

from som import AGENTS, load, resume, train
from som.training.runs import is_finished

LOOP = {
    "num_envs": 5, "warmup": 100, "capacity": 2_000, "updates_per_step": 0.1,
    "chunk_steps": 100, "evaluations": 1, "episodes": 2, "checkpoint_seconds": 1e-9,
}  # fmt: skip


def run(name, out, progress=None):
    """Four chunks on the cart."""
    schedule = LOOP | ({"warmup": 0} if AGENTS[name].on_policy else {})
    options = tiny(name) | schedule
    return train(name, "Cart-v0", 400, out=out, progress=progress, **options)


def die(step, metrics):
    if step >= 300:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("name", NAMES)
def test_resume_after_kill(name, tmp_path):
    assert in_a_process(run, name, tmp_path / "cut", die) == -signal.SIGKILL
    assert not is_finished(tmp_path / "cut")
    cut, whole = resume(tmp_path / "cut"), run(name, tmp_path / "whole")
    assert cut.record["curve"][-1]["returns"] == whole.record["curve"][-1]["returns"]
    assert_same(cut.policy.state, whole.policy.state)
    s = np.array([0.5, -0.2])
    np.testing.assert_array_equal(load(tmp_path / "cut")(s), whole.policy(s))
    jax.clear_caches()  # see conftest.py; no other test uses what these runs compiled
