"""A policy to use: its actions, its returns, its file."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from carts import AGENT, config, train

from som.agent.actor_critic import AGENTS, make_agent
from som.training import environments, loop
from som.training.policy import (
    Policy,
    evaluate,
    load,
    restore_agent,
    rollout_states,
)
from som.training.records import CheckpointError


def test_rollout_is_what_stepping_by_hand_gives():
    agent = make_agent("som", 11, 1, width=8, depth=1, num_particles=3)
    one, task = np.ones(1, np.float32), "InvertedDoublePendulum-v4"
    policy = Policy(agent, loop.init_seeds(agent, (0,)), task, -one, one)
    seen = rollout_states(policy, 40, seed=3)
    assert seen.shape == (40, 11)
    envs = environments.make(task, 1, 3)
    policy.calls, observation, ended = 0, envs.reset(), 0
    for expected in seen:
        assert np.array_equal(observation[0], expected)
        step = envs.step(policy.act(observation))
        observation, ended = step.observation, ended + step.terminated[0]
    assert ended > 1  # untrained, it falls soon, and stands again
    assert np.array_equal(seen, rollout_states(policy, 40, seed=3))
    assert not np.array_equal(seen[:1], rollout_states(policy, 1, seed=4))
    with pytest.raises(ValueError, match="steps is 0; at least 1"):
        rollout_states(policy, 0)


def test_policy_takes_one_and_many(straight):
    one = straight.policy(np.zeros(2))
    many = straight.policy([[0.5, 0.0], [-0.5, 0.0]])
    assert (one.shape, many.shape) == ((1,), (2, 1))
    assert isinstance(many, np.ndarray) and (np.abs(many) <= 2).all()


def test_policy_answers_in_the_units_of_the_task(straight):
    policy = load(straight.out)
    here = np.array([[2.0, 0.0], [-2.0, 0.0]])
    inside = policy.act(here)
    policy.calls = 0
    np.testing.assert_allclose(policy(here), 2 * inside)
    assert (policy.algo, policy.env_id) == ("som", "Cart-v0")


@pytest.mark.parametrize("shape", [(), (3,), (4, 3), (2, 2, 2)])
def test_policy_refuses_other_shapes(straight, shape):
    with pytest.raises(ValueError, match=r"has shape .*; \[2\] or \[B, 2\] is wanted"):
        straight.policy(np.zeros(shape))


def test_policy_refuses_what_is_not_finite(straight):
    with pytest.raises(ValueError, match="observation holds NaN or infinity"):
        straight.policy([np.nan, 0.0])


def test_a_policy_loads_with_wide_numbers_too(straight):
    here = np.array([[0.5, 0.0], [-1.0, 0.5]])
    expected = load(straight.out)(here)
    with jax.enable_x64(True):
        np.testing.assert_allclose(load(straight.out)(here), expected, atol=1e-4)


def test_load_refuses(straight, tmp_path):
    with pytest.raises(ValueError, match=r"index is 1; the policy has 1 seed\(s\)"):
        load(straight.out, 1)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="is not a policy"):
        load(straight.out / "checkpoint.npz")
    (tmp_path / "policy.npz").write_bytes(b"PK not ours")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        load(tmp_path)


def test_evaluation_repeats(straight):
    first = evaluate(straight.policy, "Cart-v0", 4, seed=5)
    assert first.shape == (4,) and np.isfinite(first).all()
    second = evaluate(load(straight.out), "Cart-v0", 4, seed=5)
    np.testing.assert_array_equal(first, second)
    other = evaluate(straight.policy, "Cart-v0", 4, seed=6)
    assert (first != other).any()
    with pytest.raises(ValueError, match="episodes is 0"):
        evaluate(straight.policy, "Cart-v0", 0)


def test_tuples_of_a_config_survive_json():
    stored = config() | {"agent": {**AGENT, "noise_range": [0.1, 3.0]}}
    agent = restore_agent(stored, 2, 1)
    assert agent.config.noise_range == (0.1, 3.0)
    hash(agent)  # jit needs it


def test_a_run_keeps_its_settings_when_the_profile_changes(tmp_path, monkeypatch):
    train(tmp_path / "run", steps=300)
    before = load(tmp_path / "run").agent.config
    profiles = AGENTS["som"].profiles
    later = replace(profiles["laptop"], noise_range=(0.1, 5.0), tau=0.5)
    monkeypatch.setitem(profiles, "laptop", later)
    assert load(tmp_path / "run").agent.config == before
    fresh = loop.make_config("som", "Cart-v0", 1000, [0], "laptop", {})
    assert loop.Trainer(fresh).agent.config == later


def test_a_setting_of_another_version_is_refused():
    stored = config() | {"agent": {"noise_rnge": [0.1, 3.0]}}
    with pytest.raises(CheckpointError, match=r"another version.*noise_rnge"):
        restore_agent(stored, 2, 1)
