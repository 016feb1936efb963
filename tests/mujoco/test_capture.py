"""Capture: policies whose height is known, and what is kept of runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import Climber

import som
from som.agent.actor_critic import ActorCriticConfig
from som.mujoco import capture as module
from som.mujoco.capture import capture, collect, measure, trace
from som.studies.bandit import with_known_critic
from som.training.records import read_record

KEY = jax.random.PRNGKey(0)
TOP = jnp.array([0.5, -0.25])
STATES = jnp.zeros((4, 3))


def bowl(a):
    return 3.0 - jnp.sum((a - TOP) ** 2, -1)


def test_a_policy_at_the_top_has_one_and_uniform_actions_have_zero():
    agent = with_known_critic(Climber(ActorCriticConfig(width=8), 3, 2), bowl)
    state = agent.init(KEY)
    flat = jax.tree.map(jnp.zeros_like, state.policy)
    there = {"params": {**flat["params"], "bias": TOP}}
    found = capture(agent, there, state.critic, STATES, KEY)
    assert found["one jump"] == pytest.approx(1, abs=2e-3)
    assert found["best of 16"] == pytest.approx(1, abs=2e-3)
    assert found["size"] == pytest.approx(0.375) and "flow" not in found
    # At the centre Q is |top|^2 below its best, uniform actions 2/3 more.
    found = capture(agent, flat, state.critic, STATES, KEY)
    by_hand = 1 - 0.3125 / (0.3125 + 2 / 3)
    assert found["one jump"] == pytest.approx(by_hand, abs=0.05)
    assert found["top"] == pytest.approx(0.375, abs=0.02)


def test_ways_of_som():
    agent = som.make_agent("som", 3, 2, "laptop", width=8, depth=1)
    agent = with_known_critic(agent, bowl)
    state = agent.init(KEY)
    still = jax.tree.map(jnp.zeros_like, state.policy)
    found = capture(agent, still, state.critic, jnp.zeros((400, 3)), KEY)
    noise = jax.random.normal(KEY, (100_000, 2)) * agent.prior_std
    low = bowl(jax.random.uniform(KEY, (100_000, 2), minval=-1)).mean()
    by_hand = (bowl(jnp.clip(noise, -1, 1)).mean() - low) / (3 - low)
    for way in ("one jump", "two jumps"):  # a network that says 0 stays
        assert abs(found[way] - by_hand) < 0.05
    assert found["one jump"] < found["best of 16"] < found["flow"] < 1.001
    assert found["flow"] > 0.9


def test_colder_flows_end_higher():
    ends = []
    for cold in (3.0, 100.0):
        agent = som.make_agent("som", 3, 2, "laptop", width=8, depth=1)
        agent = with_known_critic(agent, bowl)
        state = agent.init(KEY)
        a = module.flow(agent, state.critic, cold, STATES, KEY)
        ends.append(bowl(a).mean())
    assert ends[0] < ends[1] <= 3


def test_a_record_of_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TRACES", {})
    small = {"width": 8, "depth": 1, "num_samples": 4, "warmup": 250}
    run = som.train(
        "som", "Cart-v0", 500, (3,), out=tmp_path / "runs" / "a",
        evaluations=1, episodes=2, inverse_temperature=40.0, **small,
    )  # fmt: skip
    record = collect(tmp_path / "runs", tmp_path / "record.json")
    assert read_record(tmp_path / "record.json") == record
    (row,) = record["runs"]
    assert row["algo"] == "som" and row["seed"] == 3
    assert row["changes"]["inverse_temperature"] == 40.0
    assert row["changes"].keys() >= {"width", "depth"}
    assert "noise_scale" not in row["changes"]
    assert row["returns"] == [np.mean(run.record["curve"][-1]["returns"])]
    assert row["capture"] == measure(tmp_path / "runs" / "a")


def test_a_trace_asks_the_critic_of_now_and_the_one_before():
    small = {"width": 8, "depth": 1, "num_samples": 4, "warmup": 250}
    found = trace(1000, every=500, capacity=2000, **small)
    assert found["steps"] == [500, 1000]
    for now, before in zip(found["now"], found["before"], strict=True):
        assert now.keys() == before.keys() >= {"flow", "two jumps"}
        assert now != before
