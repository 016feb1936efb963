"""SAC: its density against closed forms, its losses by hand, and what it learns."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import transitions
from scipy.stats import norm

from som.agent.actor_critic import candidates, critic_step, make_agent
from som.agent.critic import Transition
from som.baselines.sac import LOG_STD, SAC, log_slope, squash
from som.training import loop
from som.training.policy import acting


def tiny(**changes):
    return make_agent("sac", 3, 2, **{"width": 8, "depth": 1} | changes)


def leaves_equal(one, two):
    for x, y in zip(*map(jax.tree.leaves, (one, two)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_slope_of_tanh_by_hand_and_far_out():
    # tanh(log 2) = 3/5, so 1 - tanh^2 = 16/25.
    got = log_slope(jnp.array([0.0, np.log(2), -np.log(2), 30.0, -30.0]))
    far = 2 * np.log(2) - 60
    expected = [0.0, np.log(16 / 25), np.log(16 / 25), far, far]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.isfinite(jax.grad(log_slope)(30.0))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.3), (-2.0, 0.5)])
def test_density_is_the_slope_of_the_distribution(mean, std):
    a, h = np.linspace(-0.99, 0.99, 67), 1e-6
    cdf = norm.cdf((np.arctanh([a + h, a - h]) - mean) / std)
    noise = (np.arctanh(a) - mean) / std
    ones = np.ones((67, 1))
    action, log_pi = squash(
        *(jnp.float32(x) for x in (mean * ones, np.log(std) * ones, noise[:, None]))
    )
    np.testing.assert_allclose(action[:, 0], a, atol=1e-6)
    slope = (cdf[0] - cdf[1]) / (2 * h)
    np.testing.assert_allclose(np.exp(log_pi), slope, rtol=2e-3, atol=1e-6)


def test_dimensions_add_and_the_slope_may_be_left_out():
    parts = jax.random.normal(jax.random.PRNGKey(0), (3, 5, 4))
    both = [squash(*parts, jacobian)[1] for jacobian in (True, False)]
    each = [squash(*parts[..., j : j + 1])[1] for j in range(4)]
    np.testing.assert_allclose(both[0], sum(each), rtol=1e-5)
    u = parts[0] + jnp.exp(parts[1]) * parts[2]
    np.testing.assert_allclose(
        both[1] - both[0], jnp.sum(log_slope(u), -1), rtol=1e-4, atol=1e-4
    )


def test_log_std_stays_in_its_range():
    agent = tiny()
    policy = jax.tree.map(lambda x: 1e3 * x, agent.init_policy(jax.random.PRNGKey(0)))
    _, log_std = agent.moments(policy, transitions(50).observation)
    assert log_std.min() == LOG_STD[0] and log_std.max() == LOG_STD[1]


def test_entropy_is_in_the_target_of_both_twins_and_in_the_losses():
    agent, batch, key = tiny(initial_alpha=0.5), transitions(6), jax.random.PRNGKey(3)
    state = agent.init(jax.random.PRNGKey(0))
    s = batch.next_observation
    a, log_pi = agent.draw(state.policy, s, key)
    drawn, price = agent.follow(state, s, key)
    np.testing.assert_array_equal(drawn, a)
    np.testing.assert_allclose(price, 0.5 * log_pi, rtol=1e-5)
    plain = tiny(initial_alpha=0.5, distributional=False)
    *_, metrics = critic_step(plain, state, batch, key)
    k_next = jax.random.split(key)[0]
    a, log_pi = plain.draw(state.policy, s, k_next)
    q = plain.critic_net.apply(state.target_critic, s, a)[0].min(-1)
    reward = plain.config.reward_scale * batch.reward
    gain = plain.config.discount * (1 - batch.terminated) * (q - 0.5 * log_pi)
    now = plain.critic_net.apply(state.critic, batch.observation, batch.action)[0]
    by_hand = np.sum(np.mean((now - (reward + gain)[:, None]) ** 2, 0))
    np.testing.assert_allclose(metrics["critic/loss"], by_hand, rtol=1e-4)
    a, log_pi = agent.draw(state.policy, batch.observation, key)
    q = agent.critic_net.apply(state.critic, batch.observation, a)[0].min(-1)
    loss = agent.policy_loss(state.policy, state, batch, key)
    np.testing.assert_allclose(loss, np.mean(0.5 * log_pi - q), rtol=1e-5)
    slope = jax.grad(agent.alpha_loss)(state.log_alpha, state, batch, key)
    np.testing.assert_allclose(slope, 2 - np.mean(log_pi), rtol=1e-5)


def test_relax_forgets_the_slope():
    agent = tiny(initial_alpha=1.0)
    without = SAC(SAC.profiles["relax"], 3, 2)
    assert not without.config.jacobian
    without = tiny(initial_alpha=1.0, jacobian=False)
    state, s = agent.init(jax.random.PRNGKey(0)), transitions(5).observation
    key = jax.random.PRNGKey(1)
    a, log_pi = agent.draw(state.policy, s, key)
    same, of_u = without.draw(state.policy, s, key)
    np.testing.assert_array_equal(a, same)
    np.testing.assert_allclose(
        of_u - log_pi, np.log(1 - np.asarray(a) ** 2).sum(-1), rtol=1e-3, atol=1e-4
    )


def test_acts_by_the_mean_and_explores_by_a_draw():
    agent = tiny()
    state = acting(agent, agent.init(jax.random.PRNGKey(0)))
    s, keys = transitions(5).observation, jax.random.split(jax.random.PRNGKey(1))
    mean = np.tanh(agent.moments(state.policy, s)[0])
    for key in keys:
        np.testing.assert_allclose(agent.act(state, s, key), mean, rtol=1e-6)
    drawn = [agent.act(state, s, key, True) for key in keys]
    again = agent.act(state, s, keys[0], True)
    np.testing.assert_array_equal(drawn[0], again)
    assert np.abs(drawn[0] - drawn[1]).min() > 1e-4
    assert np.abs(drawn).max() <= 1
    one = candidates(agent, state.policy, s, keys[0], 1)[0]
    np.testing.assert_array_equal(drawn[0], one)
    many = candidates(agent, state.policy, s[0], keys[0], 4000)
    np.testing.assert_allclose(np.median(many, 0), mean[0], atol=0.08)


@pytest.mark.parametrize("discount", [0.0, 0.99])
def test_every_update_moves_all_that_learns(discount):
    agent = tiny(discount=discount)
    start = agent.init(jax.random.PRNGKey(0))
    step, batch, key = jax.jit(agent.update), transitions(4), jax.random.PRNGKey(1)
    state, metrics = step(start, batch, key)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, metrics)))
    for name in ("policy", "critic", "target_critic", "log_alpha"):
        pairs = zip(
            *(jax.tree.leaves(getattr(x, name)) for x in (start, state)), strict=True
        )
        assert any(not np.array_equal(x, y) for x, y in pairs), name
    leaves_equal(step(start, batch, key), (state, metrics))


def test_profiles_hold_the_papers_values():
    paper = SAC.profiles["paper"]
    assert (paper.width, paper.depth, paper.activation) == (256, 3, "gelu")
    assert paper.actor_lr == paper.critic_lr == paper.alpha_lr == 3e-4
    assert (paper.num_particles, paper.target_entropy) == (1, -1.0)
    assert (paper.discount, paper.tau, paper.reward_scale) == (0.99, 0.005, 0.2)
    assert (paper.alpha_delay, paper.policy_delay) == (1, 1)
    np.testing.assert_allclose(np.log(paper.initial_alpha), 1)
    for name in ("paper", "relax"):
        assert loop.schedule(SAC, name).warmup == 30_000
    scaled = replace(loop.LAPTOP, normalize_observations=True)
    assert loop.schedule(SAC, "laptop") == scaled


def test_climbs_a_hill_and_its_temperature_finds_the_answer():
    agent = make_agent(
        "sac", 2, 2, width=32, depth=2, batch_size=128, discount=0.0,
        reward_scale=1.0, actor_lr=3e-3, critic_lr=3e-3, alpha_lr=1e-2,
    )  # fmt: skip

    def body(state, key):
        k_draw, k_update = jax.random.split(key)
        s, a = jax.random.uniform(k_draw, (2, 128, 2), minval=-0.7, maxval=0.7)
        reward = 1 - jnp.sum((a - s) ** 2, -1)
        batch = Transition(s, a, reward, jnp.ones(128), s)
        return agent.update(state, batch, k_update)[0], None

    keys = jax.random.split(jax.random.PRNGKey(0), 1200)
    state, _ = jax.jit(partial(jax.lax.scan, body))(agent.init(keys[0]), keys)
    s = jax.random.uniform(keys[1], (300, 2), minval=-0.7, maxval=0.7)
    distance = jnp.linalg.norm(agent.act(state, s, keys[2]) - s, axis=-1).mean()
    assert distance < 0.15  # uniform actions: 0.83
    # Entropy -1 per dimension and curvature 2: alpha = exp(-2) / (pi e) = 0.016.
    alpha = float(jnp.exp(state.log_alpha))
    assert 0.008 < alpha < 0.032, alpha
