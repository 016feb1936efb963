"""Capture: policies whose height is known, and what is kept of runs."""

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import Climber

import som
from som.agent.actor_critic import ActorCriticConfig
from som.mujoco import capture as module
from som.mujoco.capture import capture, collect, foretold, frozen, measure, trace
from som.studies.bandit import with_known_critic
from som.training.policy import Policy
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
    small = {"width": 8, "depth": 1, "residual": False}
    agent = som.make_agent("som", 3, 2, "laptop", **small)
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
        evaluations=1, episodes=2, inverse_temperature=20.0, **small,
    )  # fmt: skip
    record = collect(tmp_path / "runs", tmp_path / "record.json")
    assert read_record(tmp_path / "record.json") == record
    (row,) = record["runs"]
    assert row["algo"] == "som" and row["seed"] == 3
    assert row["changes"]["inverse_temperature"] == 20.0
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


class Thirty(gym.Env):
    """A reward of 1 for each of 30 steps, and then the end or the clock."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, ends):
        self.ends = ends

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 30
        return np.zeros(3, np.float32), {}

    def step(self, action):
        self.left -= 1
        over = self.left == 0
        here = np.full(3, 1 - self.left / 30, np.float32)
        return here, 1.0, over and self.ends, over and not self.ends, {}


for ends in (True, False):
    name = f"Thirty-v{int(ends)}"
    gym.register(name, entry_point=Thirty, kwargs={"ends": ends})


def of_a_bowl(task, **settings):
    """A policy whose critic is the bowl, and which always acts at 0."""
    agent = som.make_agent("som", 3, 2, "laptop", width=8, depth=1, **settings)
    agent = with_known_critic(agent, bowl)
    shapes = jax.eval_shape(agent.init, KEY)
    state = jax.tree.map(lambda x: np.zeros((1, *x.shape), x.dtype), shapes)
    return Policy(agent, state, task, -np.ones(2), np.ones(2))


@pytest.mark.filterwarnings("ignore:invalid value")  # what is said is constant
def test_what_was_foretold_and_what_came(monkeypatch):
    policy = of_a_bowl("Thirty-v1", residual=True)
    monkeypatch.setattr(module, "load", lambda run: policy)
    found = foretold("a run", steps=100)
    left = 30 - np.arange(90) % 30  # the last ten steps have no end
    assert found["states"] == 90
    assert found["came"] == pytest.approx(np.mean((1 - 0.99**left) / 0.01))
    assert found["said"] == pytest.approx(3 - 0.3125)


def test_nothing_is_known_of_what_the_clock_cut(monkeypatch):
    policy = of_a_bowl("Thirty-v0")
    monkeypatch.setattr(module, "load", lambda run: policy)
    monkeypatch.setattr(module, "AHEAD", 20)
    found = foretold("a run", steps=100)
    assert found["states"] == 3 * 10  # of 30 steps the first ten show 20 more


def test_a_new_policy_learns_from_a_critic_that_stands_still(monkeypatch):
    policy = of_a_bowl("Thirty-v1", num_samples=8, batch_size=32)
    monkeypatch.setattr(module, "load", lambda run: policy)
    found = frozen("a run", updates=200, actor_lr=3e-3)
    # Noise as it is comes to 0.2 or so, with a spread of 0.7.
    assert 0.5 < found["one jump"] < 1.001 and found["spread"] < 0.6
