"""A policy to use: its actions, its returns, its file."""

from dataclasses import asdict, replace
from pathlib import Path

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from carts import AGENT, config, train
from examples import Cart

from som.agent.actor_critic import AGENTS, make_agent, q_value
from som.training import environments, loop
from som.training import policy as policies
from som.training.policy import (
    Policy,
    evaluate,
    load,
    of_this_version,
    restore_agent,
    rollout_states,
)
from som.training.records import CheckpointError, read_metadata, save


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
    expected = load(straight.out).state
    with jax.enable_x64(True):  # its noise has other bits then, so other actions
        wide = load(straight.out)
        action = wide(np.array([[0.5, 0.0], [-1.0, 0.5]]))
    for a, b in zip(*map(jax.tree.leaves, (wide.state, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert action.shape == (2, 1) and (np.abs(action) <= 2).all()


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


@pytest.mark.parametrize(
    ("algo", "candidates", "values"),
    [
        (
            "som",
            [[[-0.45873, 0.91687], [-0.50151, 0.65026]],
             [[-0.15152, 2.18049], [-0.18810, 1.89790]]],
            [0.15733, 0.13897],
        ),
        (
            "sac",
            [[[0.04392, 2.53323], [-0.09823, 2.35728]],
             [[0.25376, 2.90460], [0.13953, 2.85066]]],
            [-0.31903, -0.36859],
        ),
    ],
)  # fmt: skip
def test_a_policy_of_version_0_1_is_still_read(algo, candidates, values):
    path = Path(__file__).parent / "recordings" / f"{algo}-0.1.npz"
    policy, s = load(path), np.linspace(-1, 1, 6).reshape(2, 3)
    assert (policy.algo, policy.env_id) == (algo, "Made-v0")
    np.testing.assert_allclose(policy.candidates(s, 2, seed=0), candidates, atol=1e-4)
    np.testing.assert_allclose(policy.q(s, np.zeros((1, 2))), values, atol=1e-4)


def test_a_setting_that_came_later_gets_its_classs_default():
    som = AGENTS["som"]
    stored = asdict(replace(som.profiles["laptop"], width=8))
    for name in ("tau", "noise_range"):
        del stored[name]  # they came later
    assert som.profiles["laptop"].tau != som.profiles["paper"].tau
    old = {"algo": "som", "profile": "laptop", "agent": stored}
    config = restore_agent(of_this_version(old), 2, 1).config
    assert config.width == 8
    assert (config.tau, config.noise_range) == (0.005, (0.1, 2.0))
    assert of_this_version({"algo": "gone"}) == {"algo": "gone"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"agent": {"widht": 8}}, "'widht'; did you mean 'width'"),
        ({"algo": "somm"}, "unknown algorithm 'somm'"),
        ({"profile": "labtop"}, "unknown profile 'labtop'"),
    ],
)
def test_another_versions_file_gets_one_sentence(change, message, tmp_path):
    path = tmp_path / "policy.npz"
    old = read_metadata(Path(__file__).parent / "recordings" / "som-0.1.npz")
    save(path, {}, old | change)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith("another version of som wrote this and can read it: ")
    assert message in text and "\n" not in text


# Noise, candidates, values

STATES = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def som():
    """A policy that has learned nothing, in a box of its own."""
    agent = make_agent("som", 3, 2, width=8, depth=1, reward_scale=0.5)
    state = agent.init(jax.random.PRNGKey(0))
    state = jax.tree.map(lambda x: x[None], state)._replace(step=state.step)
    return Policy(agent, state, "Made-v0", [-1.0, 0.0], [3.0, 0.5])


def test_repr_is_short(som):
    assert repr(som) == "<som policy for Made-v0: observation [3] to action [2]>"


def test_noise_is_counted_from_the_seed(som):
    som.reset()
    first = [som.act(STATES) for _ in range(2)]
    assert not np.allclose(*first)
    for count, actions in enumerate(first, 1):
        key = jax.random.PRNGKey(count)
        expected = som.agent.act(som.state, jnp.asarray(STATES), key)
        np.testing.assert_allclose(actions, expected, atol=1e-6)
    som.reset()
    np.testing.assert_array_equal(first, [som.act(STATES) for _ in range(2)])
    som.reset(3)
    third = som.act(STATES)
    assert not np.allclose(third, first[0])
    som.reset(3)
    np.testing.assert_array_equal(som.act(STATES), third)


def test_with_a_seed_the_observation_decides_alone(som):
    som.reset()
    all_at_once = som(STATES, seed=7)
    assert som.calls == 0
    one_by_one = [som(s, seed=7) for s in STATES[::-1]]
    np.testing.assert_allclose(one_by_one[::-1], all_at_once, atol=1e-6)
    assert not np.allclose(som(STATES, seed=8), all_at_once)
    assert not np.allclose(som(STATES), all_at_once)


def test_candidates_are_what_is_chosen_from(som):
    many = som.candidates(STATES, 16, seed=7)
    assert many.shape == (16, 6, 2) and som.agent.config.num_particles == 16
    assert (many >= som.low).all() and (many <= som.high).all()
    assert np.ptp(many, 0).min() > 0
    best = som.q(STATES, many).argmax(0)
    chosen = many[best, np.arange(6)]
    np.testing.assert_allclose(som(STATES, seed=7), chosen, atol=1e-6)
    alone = som.candidates(STATES[2], 16, seed=7)
    np.testing.assert_allclose(alone, many[:, 2], atol=1e-6)
    assert not np.allclose(som.candidates(STATES, 16), many)


def test_q_is_in_the_units_of_the_task(som):
    actions = np.float32([[-1, 0], [3, 0.5], [1, 0.25], [99, 0.25]])
    inside = np.float32([[-1, -1], [1, 1], [0, 0], [1, 0]])
    s = jnp.asarray(STATES[:4])
    raw = q_value(som.agent, som.state.critic, s, jnp.asarray(inside))
    np.testing.assert_allclose(som.q(s, actions), raw / 0.5, rtol=1e-5)
    assert som.q(STATES[0], actions[0]).shape == ()
    grid = som.q(STATES[0], np.stack([actions] * 5))
    assert grid.shape == (5, 4)


@pytest.mark.parametrize("seed", [-1, 2**31, 1.5, "one"])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="a whole number from 0 to 2147483647"):
        policies._whole(seed)


def test_a_wrong_seed_is_refused_everywhere(som):
    for ask in (som.reset, lambda seed: som(STATES, seed)):
        with pytest.raises(ValueError, match="seed is -1"):
            ask(-1)


def test_candidates_and_q_refuse(som):
    with pytest.raises(ValueError, match="num is 0; at least 1 is wanted"):
        som.candidates(STATES, 0)
    with pytest.raises(ValueError, match=r"shape \[3\]; \[\.\.\., 2\] is wanted"):
        som.q(STATES[0], np.zeros(3))
    with pytest.raises(ValueError, match="observation holds NaN"):
        som.q(np.full(3, np.nan), np.zeros(2))
    agent = make_agent("ppo", 3, 2, width=8, depth=1)
    state = agent.init(jax.random.PRNGKey(0))
    state = jax.tree.map(lambda x: x[None], state)._replace(step=state.step)
    ppo = Policy(agent, state, "Made-v0", [-1.0, 0.0], [3.0, 0.5])
    for ask in (
        lambda: ppo.q(STATES[0], np.zeros(2)),
        lambda: ppo.candidates(STATES, 2),
    ):
        with pytest.raises(ValueError, match=r"^ppo has no candidates and no critic"):
            ask()


def test_a_dictionary_is_not_an_observation_yet(straight):
    with pytest.raises(ValueError, match=r"observation is a dict; .*spaces\.flatten"):
        straight.policy({"x": 0.5, "v": 0.0})


class Closing(Cart):
    """Counts what is open."""

    open = 0

    def __init__(self):
        Closing.open += 1

    def close(self):
        Closing.open -= 1


def test_evaluation_takes_a_factory_and_closes_it(straight):
    def timed():
        return gym.wrappers.TimeLimit(Closing(), 20)

    made = evaluate(straight.policy, timed, 4, seed=5)
    np.testing.assert_array_equal(made, evaluate(straight.policy, None, 4, seed=5))
    assert Closing.open == 0

    class Broken(Closing):
        def step(self, action):
            raise RuntimeError("stuck")

    told = r"^step of .*Broken\(\) failed: RuntimeError: stuck \(.*test_policy.py, line"
    with pytest.raises(environments.TaskError, match=told):
        evaluate(straight.policy, Broken, 4)
    assert Closing.open == 0
