"""A policy acts the same in JAX, in NumPy and as an ONNX graph."""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

from som import AGENTS, make_agent
from som.agent.actor_critic import q_value
from som.agent.som import SOM
from som.studies.bandit import with_known_critic
from som.training import export as exporting
from som.training import records
from som.training.export import act, candidates, export, load, value
from som.training.policy import Policy

SIZES = 5, 3  # of an observation and of an action
LOW, HIGH = np.float32([-1, -2, 0]), np.float32([1, 3, 4])
STATES = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
NOISE = np.random.default_rng(1).normal(size=(7, 3)).astype(np.float32)
SMALL = {"width": 16, "depth": 2}


def policy_of(agent):
    """The policy of an agent with random weights and biases."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(agent.init, jax.random.PRNGKey(0))

    def fill(path, x):
        value = 0.3 * rng.normal(size=(1, *x.shape))
        spread = jax.tree_util.keystr(path).endswith("['var']")
        return np.float32(abs(value) if spread else value)

    named = jax.tree_util.tree_map_with_path
    state = named(fill, shapes)._replace(step=np.zeros((), np.int32))
    return Policy(agent, state, "Made-v0", LOW, HIGH)


@cache
def policy(algo="som", **settings):
    """One for each set of settings: compiling takes most of the time here."""
    return policy_of(make_agent(algo, *SIZES, **SMALL, **settings))


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options)


def played(policy, folder, **options):
    """The actions at STATES of both players, [8, 3] each."""
    arrays = load(export(policy, folder / "p.npz", **options))
    graph = session(export(policy, folder / "p.onnx", **options))
    numpy = np.stack([act(arrays, s) for s in STATES])
    return numpy, graph.run(None, {"observation": STATES})[0]


@pytest.mark.parametrize(
    ("algo", "settings"),
    [
        *[(algo, {}) for algo in ("som", "mfp", "sac", "ppo")],
        *[(algo, {"residual": True}) for algo in ("som", "mfp")],
    ],
)
def test_same_actions_everywhere(algo, settings, tmp_path):
    ours = policy(algo, **settings)
    expected = ours(STATES, seed=0)
    assert np.ptp(expected, 0).max() > 0.1
    for actions in played(ours, tmp_path):
        np.testing.assert_allclose(actions, expected, atol=1e-5)
        assert ((actions >= LOW) & (actions <= HIGH)).all()


@pytest.mark.parametrize(
    ("algo", "settings"),
    [("som", {"batch_norm": True}), ("sac", {"num_particles": 4, "batch_norm": True})],
)
def test_a_critic_that_normalises(algo, settings, tmp_path):
    ours = policy(algo, **settings)
    for actions in played(ours, tmp_path):
        np.testing.assert_allclose(actions, ours(STATES, seed=0), atol=1e-5)
    inside = np.random.default_rng(2).uniform(-1, 1, (9, 3)).astype(np.float32)
    actions = (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * inside
    given = value(load(tmp_path / "p.npz"), STATES[0], inside)
    np.testing.assert_allclose(given, ours.q(STATES[0], actions), rtol=1e-4)


@pytest.mark.parametrize(
    ("activation", "depth"), [("gelu", 1), ("mish", 2), ("relu", 1), ("tanh", 3)]
)
def test_every_activation_and_depth(activation, depth, tmp_path):
    ours = policy_of(
        make_agent("som", *SIZES, width=8, depth=depth, activation=activation)
    )
    for actions in played(ours, tmp_path):
        np.testing.assert_allclose(actions, ours(STATES, seed=0), atol=1e-4)


def test_another_prior_is_kept(tmp_path):
    ours = policy(sde="ve", noise_range=(0.01, 3.0))
    assert ours.agent.prior_std > 2
    for actions in played(ours, tmp_path):
        np.testing.assert_allclose(actions, ours(STATES, seed=0), atol=1e-5)


@pytest.mark.parametrize("num", [1, 5])
def test_other_numbers_of_candidates(num, tmp_path):
    ours = policy()
    choice = ours.candidates(STATES, num, seed=0)
    best = ours.q(STATES, choice).argmax(0)
    expected = np.take_along_axis(choice, best[None, :, None], 0)[0]
    for actions in played(ours, tmp_path, candidates=num):
        np.testing.assert_allclose(actions, expected, atol=1e-5)
    arrays = load(tmp_path / "p.npz")
    assert ("q0_in_0" in arrays) == (num > 1)
    assert len(arrays["noise"]) == num


def test_given_noise_is_used(tmp_path):
    ours = policy()
    agent, state = ours.agent, ours.state
    arrays = load(export(ours, tmp_path / "p.npz"))
    graph = session(export(ours, tmp_path / "p.onnx"))
    inputs = {"observation": STATES, "noise": NOISE}
    every = graph.run(None, inputs)[0]

    @jax.jit
    def by_hand(s):
        noise = agent.prior_std * jnp.asarray(NOISE)
        params, key = agent.acting_policy(state), jax.random.PRNGKey(0)
        actions = jnp.clip(agent.transport(params, noise, s, key)[-1], -1, 1)
        return actions, q_value(agent, state.critic, s, actions)

    for s, of_graph in zip(STATES, every, strict=True):
        actions, q = map(np.asarray, by_hand(s))
        np.testing.assert_allclose(candidates(arrays, s, NOISE), actions, atol=1e-5)
        np.testing.assert_allclose(value(arrays, s, actions), q, atol=1e-4)
        expected = (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * actions[q.argmax()]
        np.testing.assert_allclose(act(arrays, s, NOISE), expected, atol=1e-5)
        np.testing.assert_allclose(of_graph, expected, atol=1e-5)


@pytest.mark.parametrize("algo", ["sac", "ppo"])
def test_a_gaussian_can_be_drawn_from(algo, tmp_path):
    ours = policy(algo)
    arrays = load(export(ours, tmp_path / "p.npz"))
    graph = session(export(ours, tmp_path / "p.onnx"))
    agent, state = ours.agent, ours.state

    @jax.jit
    def by_hand(s, z):
        if algo == "sac":
            params, key = agent.acting_policy(state), jax.random.PRNGKey(0)
            return agent.transport(params, z, s, key)[-1]
        return agent.mean(state.policy, s) + jnp.exp(state.policy["log_std"]) * z

    raw = np.asarray(by_hand(STATES, np.tile(NOISE[0], (8, 1))))
    expected = (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * np.clip(raw, -1, 1)
    drawn = [act(arrays, s, NOISE[:1]) for s in STATES]
    np.testing.assert_allclose(drawn, expected, atol=1e-5)
    inputs = {"observation": STATES, "noise": NOISE[:1]}
    np.testing.assert_allclose(graph.run(None, inputs)[0], expected, atol=1e-5)


def test_the_values_are_those_of_the_policy(tmp_path):
    ours = policy(reward_scale=0.2)
    arrays = load(export(ours, tmp_path / "p.npz"))
    inside = np.random.default_rng(2).uniform(-1, 1, (9, 3)).astype(np.float32)
    actions = (LOW + HIGH) / 2 + (HIGH - LOW) / 2 * inside
    expected = ours.q(STATES[0], actions)
    np.testing.assert_allclose(value(arrays, STATES[0], inside), expected, rtol=1e-4)


# What is refused


@pytest.mark.parametrize("algo", sorted(set(AGENTS) - {"som", "mfp", "sac", "ppo"}))
def test_chains_are_refused(algo, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"^no export is known for .*: it is known for agents that act in one",
    ):
        export(policy(algo), tmp_path / "p.onnx")
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class Shy(SOM):
    """Goes half the way: a part that no export knows of."""

    def transport(self, policy, noise, observation, key):
        path = super().transport(policy, noise, observation, key)
        return path.at[-1].mul(0.5)


def test_what_acts_otherwise_is_refused(tmp_path):
    agent = make_agent("som", *SIZES, **SMALL)
    shy = policy_of(Shy(agent.config, *SIZES))
    for name in ("p.onnx", "p.npz"):
        with pytest.raises(ValueError, match=r"^som with these settings cannot be"):
            export(shy, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_wrong_value_is_refused():
    ours = policy()
    arrays = exporting.to_arrays(ours)
    exporting.check(ours, arrays)
    arrays["q1_bias_0"] = arrays["q1_bias_0"] + 1
    with pytest.raises(ValueError, match="that the exported arrays do not hold"):
        exporting.check(ours, arrays)


def test_another_critic_stays_behind(tmp_path):
    agent = make_agent("som", *SIZES, **SMALL)
    known = policy_of(with_known_critic(agent, lambda a: jnp.sum(a, -1)))
    with pytest.raises(ValueError, match="a critic of its own kind; one candidate"):
        export(known, tmp_path / "p.npz")
    arrays = load(export(known, tmp_path / "p.npz", candidates=1))
    expected = known.candidates(STATES[0], 1, seed=0)[0]
    np.testing.assert_allclose(act(arrays, STATES[0]), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("algo", "settings", "name", "options", "message"),
    [
        ("som", {}, "p.pt", {}, r"p\.pt must end in \.onnx or \.npz$"),
        ("som", {}, "p", {}, r"p must end in \.onnx or \.npz$"),
        ("som", {"activation": "elu"}, "p.npz", {}, "'elu'; one of gelu, mish, relu"),
        ("som", {}, "p.npz", {"candidates": 0}, "num_particles is 0; at least 1"),
        ("ppo", {}, "p.npz", {"candidates": 2}, "^ppo has one action for each"),
    ],
)
def test_one_sentence(algo, settings, name, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export(policy(algo, **settings), tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_without_the_package_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match="`pip install onnx` brings it"):
        export(policy(), tmp_path / "p.onnx")
    export(policy(), tmp_path / "p.npz")


# The files


def test_a_trained_policy_is_not_replaced(tmp_path):
    path = tmp_path / "policy.npz"
    records.save(path, {"state": np.zeros(3)}, {"algo": "som"})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is no exported policy; it is not replaced"):
        export(policy(), path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    path.write_bytes(b"someone's notes")
    with pytest.raises(ValueError, match="is no exported policy"):
        export(policy(), path)
    other = tmp_path / "mine.npz"
    for algo in ("som", "sac"):  # an exported one is
        export(policy(algo), other)
    assert load(other)["form"] == "squash"


def test_the_archive_never_runs_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    np.savez(tmp_path / "p.npz", noise=np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        load(tmp_path / "p.npz")
    assert not (tmp_path / "sprung").exists()


def test_the_player_needs_numpy_alone(tmp_path):
    ours = policy()
    export(ours, tmp_path / "p.npz")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
import numpy
allowed = set(sys.modules)
import numpy_policy
assert set(sys.modules) - allowed == {"numpy_policy"}, set(sys.modules) - allowed
arrays = numpy_policy.load(sys.argv[1] + "/p.npz")
print(*numpy_policy.act(arrays, numpy.linspace(-1, 1, 5)))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = ours(np.linspace(-1, 1, 5), seed=0)
    np.testing.assert_allclose(np.float64(done.stdout.split()), expected, atol=1e-5)


def test_the_graph_says_what_it_is(tmp_path):
    graph = session(export(policy(), tmp_path / "new" / "p.onnx"))
    assert {i.name: i.shape for i in graph.get_inputs()} == {"observation": ["B", 5]}
    defaults = graph.get_overridable_initializers()
    assert {i.name: i.shape for i in defaults} == {"noise": ["N", 3]}
    assert [(o.name, o.shape) for o in graph.get_outputs()] == [("action", ["B", 3])]
    facts = graph.get_modelmeta().custom_metadata_map
    assert facts == {"algo": "som", "env": "Made-v0"}


def test_the_policy_stays_as_it_was(tmp_path):
    ours = policy()
    before = ours.agent, ours.calls
    export(ours, tmp_path / "p.npz", candidates=2)
    assert (ours.agent, ours.calls) == before
    assert ours.agent.config.num_particles != 2
