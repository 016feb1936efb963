"""LQL and NC-LQL: the walk, the levels, and what the agents learn."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import transitions

from som.agent.actor_critic import AGENTS, best_of_n, candidates, make_agent, q_value
from som.agent.critic import Transition
from som.baselines.nclql import (
    LQL,
    NCLQL,
    LangevinConfig,
    NoisyCritic,
    level_step,
)
from som.baselines.qsm import langevin_path
from som.studies.bandit import fit, with_known_critic

SIZES = {"width": 8, "depth": 1, "batch_size": 4}


def tiny(name, **options):
    steps = {"num_levels": 3} if name == "nclql" else {"num_steps": 3}
    return make_agent(name, 3, 2, **SIZES | steps | options)


def begin(agent, seed=0):
    return jax.jit(agent.init)(jax.random.PRNGKey(seed))


def test_walk_by_hand():
    key, start = jax.random.PRNGKey(0), jnp.array([0.2, -0.9])
    sizes = jnp.array([0.04, 0.01])
    path = langevin_path(lambda a, level: (level + 1) * a, start, sizes, key, 2)
    a, points = np.asarray(start), [np.asarray(start)]
    for i, k in enumerate(jax.random.split(key, 4)):
        eta = (0.04, 0.01)[i // 2]
        z = np.asarray(jax.random.normal(k, (2,)))
        a = np.clip(a + eta / 2 * (i // 2 + 1) * a + np.sqrt(eta) * z, -1, 1)
        points.append(a)
    np.testing.assert_allclose(path, points, rtol=1e-5)


def test_plain_walk_has_the_variance_of_its_bias():
    eta, kappa = 0.02, 50.0
    walk = partial(langevin_path, lambda a, _: -kappa * a, num_steps=150)
    start, key = jnp.zeros(4000), jax.random.PRNGKey(1)
    spread = jax.jit(walk)(start, jnp.array([eta]), key)[-1].std()
    expected = (1 / kappa / (1 - eta * kappa / 4)) ** 0.5
    np.testing.assert_allclose(spread, expected, rtol=0.05)


def test_levels_of_the_public_code():
    agent = make_agent("nclql", 3, 2, "paper")
    np.testing.assert_allclose(agent.sigmas, np.geomspace(0.1, 0.001, 10), rtol=1e-5)
    config = agent.config
    assert (config.width, config.depth, config.activation) == (256, 3, "mish")
    assert (config.critic_lr, config.tau, config.batch_size) == (1e-4, 0.005, 256)
    assert (config.weight, config.num_steps, config.num_particles) == (500.0, 2, 1)
    assert config.unit and not config.distributional and config.reward_scale == 0.2
    plain = make_agent("lql", 3, 2, "paper").config
    assert plain.num_levels == 1 and not plain.unit and plain.num_steps == 20


def test_critic_answers_at_its_last_level():
    net = NoisyCritic(8, 1, 4)
    s, a = jnp.ones(3), jnp.ones((5, 2))
    params = jax.jit(net.init)(jax.random.PRNGKey(0), s, a)
    apply = jax.jit(net.apply)
    mean, std = apply(params, s, a)
    assert mean.shape == std.shape == (5, 2) and np.all(std > 0)
    np.testing.assert_allclose(mean, apply(params, s, a, 3)[0], rtol=1e-5)
    rows = apply(params, s, a, jnp.arange(5))[0]
    np.testing.assert_allclose(rows[3], mean[3], rtol=1e-5)
    assert np.abs(rows[0] - mean[0]).min() > 1e-6
    assert np.abs(mean[:, 0] - mean[:, 1]).min() > 1e-6


@pytest.mark.parametrize("name", ["lql", "nclql"])
def test_path_starts_uniform_and_ends_at_candidates(name):
    agent, s, key = tiny(name), transitions(4).observation, jax.random.PRNGKey(1)
    state = begin(agent)
    k_noise, k_path = jax.random.split(key)
    noise = jax.random.normal(k_noise, (6, 4, 2))
    path = agent.transport(state.critic, noise, s, k_path)
    steps = agent.config.num_levels * agent.config.num_steps
    assert path.shape == (steps + 1, 6, 4, 2)
    np.testing.assert_allclose(
        path[0], jax.scipy.special.erf(noise / 2**0.5), atol=1e-6
    )
    drawn = candidates(agent, agent.acting_policy(state), s, key, 6)
    np.testing.assert_allclose(path[-1], drawn, atol=1e-5)


def test_direction_is_that_of_the_sum_and_forgets_its_length():
    """With no noise to speak of, each step is eta w / 2 long, uphill."""
    agent = tiny("nclql", step_size=1e-10, weight=2e8, noise_range=(0.1, 0.1))
    state, s = begin(agent), jnp.ones(3)
    path = agent.transport(state.critic, jnp.zeros(2), s, jax.random.PRNGKey(0))
    steps = np.diff(path, axis=0)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=-1), 0.01, rtol=1e-2)
    g = jax.grad(lambda a: agent.twins(state.critic, s, a, 0).sum())(path[0])
    np.testing.assert_allclose(steps[0] / 0.01, g / np.linalg.norm(g), atol=1e-2)


def test_level_step_aims_at_the_clean_values_of_before():
    """The loss, written out, with other critics before than now."""
    agent, batch, key = tiny("nclql"), transitions(4), jax.random.PRNGKey(3)
    apply = jax.jit(agent.critic_net.apply)
    before, now = (begin(agent, i) for i in (0, 1))
    moved, opt, loss = level_step(
        agent, before.critic, now.critic, now.critic_opt, batch, key
    )
    k_level, k_noise = jax.random.split(key)
    level = jax.random.randint(k_level, (4,), 0, 2)
    noise = jax.random.normal(k_noise, (4, 2))
    by_hand = 0.0
    for i in range(4):
        s, a = batch.observation[i], batch.action[i]
        target = apply(before.critic, s, a)[0].mean()
        a_l = a + agent.sigmas[level[i]] * noise[i]
        q = apply(now.critic, s, a_l, level[i])[0]
        by_hand += np.sum((q - target) ** 2) / 4
    np.testing.assert_allclose(loss, by_hand, rtol=1e-4)
    pairs = zip(*map(jax.tree.leaves, (moved, now.critic)), strict=True)
    assert any(not np.array_equal(x, y) for x, y in pairs)
    assert opt[0].count == 1


@pytest.mark.parametrize(("name", "adam_steps"), [("lql", 1), ("nclql", 2)])
def test_updates_are_finite_and_repeat(name, adam_steps):
    agent = tiny(name)
    start = begin(agent)
    update, batch = jax.jit(agent.update), transitions(4)
    state, metrics = update(start, batch, jax.random.PRNGKey(1))
    again, _ = update(start, batch, jax.random.PRNGKey(1))
    plain, _ = agent.update(start, batch, jax.random.PRNGKey(1))
    for x, y, z in zip(*map(jax.tree.leaves, (state, again, plain)), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_allclose(x, z, atol=1e-4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, metrics)))
    assert state.critic_opt[0].count == adam_steps and state.step == 1
    assert ("critic/level_loss" in metrics) == (name == "nclql")
    assert state.policy == () and state.log_alpha == start.log_alpha
    rows = zip(
        *(jax.tree.leaves(x.target_critic) for x in (start, state)),
        jax.tree.leaves(state.critic),
        strict=True,
    )
    for old, lagging, online in rows:
        tau = agent.config.tau
        np.testing.assert_allclose(lagging, old + tau * (online - old), atol=1e-6)


def test_exploring_adds_nothing_and_more_walks_choose_by_value():
    agent, s, key = tiny("nclql"), transitions(4).observation, jax.random.PRNGKey(2)
    state = begin(agent)
    plain, explored = (agent.act(state, s, key, explore) for explore in (False, True))
    np.testing.assert_array_equal(plain, explored)
    assert np.abs(plain).max() <= 1
    many = NCLQL(replace(agent.config, num_particles=5), 3, 2)
    drawn = candidates(many, state.critic, s, key, 5)
    best = best_of_n(many, state.critic, state.critic, s, key)
    q = q_value(many, state.critic, s, drawn)
    np.testing.assert_allclose(
        q_value(many, state.critic, s, best), q.max(0), rtol=1e-4
    )


def test_neither_is_a_kind_of_the_other():
    assert AGENTS["lql"] is LQL and AGENTS["nclql"] is NCLQL
    assert not issubclass(LQL, NCLQL) and not issubclass(NCLQL, LQL)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_levels": 0}, "num_levels is 0; at least 1"),
        ({"num_steps": 0}, "num_steps is 0; at least 1"),
        ({"noise_range": (0.1, 0.2)}, "noise_range is"),
        ({"step_size": 0.0}, "positive numbers are wanted"),
    ],
)
def test_bad_settings_are_named(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LangevinConfig(**options)


def hill(a):
    return 1 - jnp.sum((a - 0.4) ** 2, -1)


@pytest.mark.parametrize("name", ["lql", "nclql"])
def test_a_known_critic_serves_at_every_level(name):
    agent = with_known_critic(make_agent(name, 1, 2, "bandit"), hill)
    state, key = begin(agent), jax.random.PRNGKey(1)
    a = agent.act(state, jnp.zeros((500, 1)), key)
    bound = 0.3 if name == "lql" else 0.1  # exp(20 Q) has a deviation of 0.16
    assert float(jnp.linalg.norm(a - 0.4, axis=-1).mean()) < bound


def test_the_bandit_study_fits_it():
    options = {"width": 8, "depth": 1, "batch_size": 16, "num_levels": 2}
    sampler = fit("nclql", hill, jax.random.PRNGKey(0), 2, **options)
    noise = sampler.prior(jax.random.PRNGKey(1), 7)
    assert sampler.path(noise).shape == (5, 7, 2)
    assert sampler.at(noise, (1.0, 0.5, 0.0)).shape == (3, 7, 2)
    assert np.isfinite(sampler.q(sampler(noise))).all()


@pytest.mark.parametrize("name", ["lql", "nclql"])
def test_a_quadratic_bandit_is_learned(name):
    agent = make_agent(
        name, 2, 2, "bandit", width=32, depth=2, batch_size=64, discount=0.0,
        reward_scale=1.0, critic_lr=3e-3, tau=0.05,
    )  # fmt: skip

    def body(state, key):
        k_draw, k_update = jax.random.split(key)
        s, a = jax.random.uniform(k_draw, (2, 64, 2), minval=-0.7, maxval=0.7)
        reward = 1 - jnp.sum((a - s) ** 2, -1)
        batch = Transition(s, a, reward, jnp.ones(64), s)
        return agent.update(state, batch, k_update)[0], None

    keys = jax.random.split(jax.random.PRNGKey(0), 800)
    state, _ = jax.jit(partial(jax.lax.scan, body))(agent.init(keys[0]), keys)
    s = jax.random.uniform(jax.random.PRNGKey(1), (500, 2), minval=-0.7, maxval=0.7)
    a = jax.jit(agent.act)(state, s, jax.random.PRNGKey(2))
    distance = float(jnp.linalg.norm(a - s, axis=-1).mean())
    assert distance < 0.35, distance  # uniform actions: 0.83
