"""QVPO: the weighted regression, its weights, what carries no gradient, a bandit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import transitions

from som.agent.actor_critic import candidates, make_agent, q_value
from som.baselines.diffusion import perturb
from som.baselines.qvpo import QVPO, QVPOConfig, elite, weighted_denoising

TINY = {"width": 8, "depth": 1, "num_steps": 3, "num_particles": 2, "num_samples": 4}


def tiny(**options):
    return make_agent("qvpo", 3, 2, **TINY | options)


@pytest.fixture(scope="module")
def start():
    agent = tiny()
    return agent, jax.jit(agent.init)(jax.random.PRNGKey(0)), transitions(4)


def test_weighted_denoising_by_hand(start):
    agent, state, batch = start
    a_0 = jax.random.uniform(jax.random.PRNGKey(1), (2, 4, 2), minval=-1)
    weight = jnp.arange(8.0).reshape(2, 4)
    key = jax.random.PRNGKey(2)
    loss = jax.jit(partial(weighted_denoising, agent))
    got = loss(state.policy, batch.observation, a_0, weight, key)
    k_step, k_noise = jax.random.split(key)
    step = jax.random.randint(k_step, (2, 4), 1, 4)
    noise = jax.random.normal(k_noise, (2, 4, 2))
    net = jax.jit(agent.denoiser.apply)
    total = 0.0
    for row in np.ndindex(2, 4):
        a_n = perturb(agent.schedule, a_0[row], step[row], noise[row])
        seen = net(state.policy, a_n, step[row], batch.observation[row[1]])
        total += weight[row] * np.sum((seen - noise[row]) ** 2)
    np.testing.assert_allclose(got, total / 8, rtol=1e-4)


def test_elite_is_the_best_and_its_weight_is_not_negative(start):
    agent, state, batch = start
    s, key = batch.observation, jax.random.PRNGKey(3)
    run = jax.jit(partial(elite, agent))
    best, weight = run(state.policy, state.critic, s, key)
    draw = jax.jit(partial(candidates, agent), static_argnums=3)
    drawn = draw(state.policy, s, key, 4)
    q = np.asarray(jax.jit(partial(q_value, agent))(state.critic, s, drawn))
    np.testing.assert_allclose(best, drawn[q.argmax(0), np.arange(4)], atol=1e-6)
    np.testing.assert_allclose(weight, q.max(0) - q.mean(0), atol=1e-6)
    assert weight.min() >= 0
    same = jax.tree.map(jnp.zeros_like, state.critic)  # a critic without opinion
    np.testing.assert_array_equal(run(state.policy, same, s, key)[1], 0)


def test_omega_falls_on_a_line_to_its_floor():
    config = QVPOConfig(entropy_steps=1000)
    got = [float(config.omega(step)) for step in (0, 500, 900, 5000)]
    np.testing.assert_allclose(got, [0.02, 0.01, 0.002, 0.002], rtol=1e-4)


def test_profiles():
    kinds = ("paper", "official", "laptop")
    paper, official, laptop = (make_agent("qvpo", 3, 2, p) for p in kinds)
    config = paper.config
    assert config == QVPOConfig()
    assert (config.width, config.depth, config.activation) == (256, 3, "mish")
    assert (config.actor_lr, config.critic_lr) == (3e-4, 3e-4)
    assert (config.num_steps, config.num_particles, config.num_samples) == (20, 32, 64)
    assert (config.noise_scale, config.reward_scale) == (0.0, 0.2)
    assert not config.distributional
    np.testing.assert_allclose(paper.schedule.beta[-1], 0.3 * 0.999, rtol=1e-5)
    assert (official.config.actor_lr, official.config.critic_lr) == (1e-4, 3e-4)
    assert official.config.num_particles == 4
    assert QVPO.loops["official"] == {"warmup": 10_000, "updates_per_step": 1.0}
    left = np.cos((np.arange(20) / 20 + 0.008) / 1.008 * np.pi / 2)
    np.testing.assert_allclose(official.schedule.mean[:-1], left / left[0], rtol=1e-4)
    assert official.schedule.beta[-1] == np.float32(0.999)
    assert laptop.config.num_steps == 10
    assert laptop.schedule.mean[-1] < 0.01


@pytest.mark.parametrize("wrong", [{"num_samples": 1}, {"entropy_steps": 0}])
def test_bad_settings_are_one_sentence(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} is .; at least . is wanted"):
        QVPOConfig(**wrong)


def test_loss_is_the_weighted_error_without_a_gradient_in_the_weights(start):
    agent, state, batch = start
    state, key = state._replace(step=jnp.array(10_000)), jax.random.PRNGKey(4)
    s = batch.observation

    def by_hand(policy, source):
        k_elite, k_uniform, k_loss = jax.random.split(key, 3)
        best, weight = elite(agent, source, state.critic, s, k_elite)
        uniform = jax.random.uniform(k_uniform, (10, 4, 2), minval=-1, maxval=1)
        a_0 = jnp.concatenate([jax.lax.stop_gradient(best)[None], uniform])
        rows = jnp.concatenate([weight[None], jnp.tile(0.01 * weight, (10, 1))])
        return weighted_denoising(agent, policy, s, a_0, rows, k_loss)

    @jax.jit
    def both(policy):
        ours = jax.value_and_grad(agent.policy_loss)(policy, state, batch, key)
        return ours, jax.value_and_grad(by_hand, (0, 1))(policy, policy)

    (ours, gradient), (hand, (own, leak)) = both(state.policy)
    np.testing.assert_allclose(ours, hand, rtol=1e-5)
    for x, y in zip(*map(jax.tree.leaves, (gradient, own)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(leak)) > 1e-4


def test_no_noise_and_no_temperature(start):
    agent, state, batch = start
    s, key = batch.observation, jax.random.PRNGKey(1)
    act = jax.jit(agent.act, static_argnames="explore")
    np.testing.assert_array_equal(act(state, s, key), act(state, s, key, explore=True))
    after, metrics = jax.jit(agent.update)(state, batch, key)
    assert after.log_alpha == state.log_alpha
    assert all(np.isfinite(x) for x in metrics.values())
