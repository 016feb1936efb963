"""DPMD: its weights, one mirror step in closed form, the loss, a bandit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import transitions

from som.agent.actor_critic import (
    add_noise,
    best_of_n,
    make_agent,
    q_value,
)
from som.baselines.diffusion import linear_schedule, perturb
from som.baselines.dpmd import mirror_weights
from som.baselines.sdac import ReweightedConfig

TINY = {"width": 8, "depth": 1, "num_steps": 3, "num_particles": 2}


def tiny(**options):
    return make_agent("dpmd", 3, 2, **TINY | options)


def test_weights_by_hand():
    q = jnp.array([1.0, 3.0])  # mean 2, deviation 1
    np.testing.assert_allclose(mirror_weights(q, 2.0), np.exp([-0.5, 0.5]), rtol=1e-5)


def test_weights_know_no_unit_and_no_origin():
    q = jax.random.normal(jax.random.PRNGKey(0), (50,))
    for scale, shift in ((1e-2, 0.0), (7.0, 300.0)):
        got = mirror_weights(scale * q + shift, 1.0)
        np.testing.assert_allclose(got, mirror_weights(q, 1.0), rtol=1e-2)


def test_weights_are_clipped_and_survive_equal_values():
    q = jnp.zeros(101).at[0].set(1.0)
    np.testing.assert_allclose(mirror_weights(q, 1.0)[0], np.exp(3), rtol=1e-5)
    np.testing.assert_allclose(mirror_weights(jnp.full(9, 4.0), 1.0), 1)


def slipped(q, alpha=1.0):
    """Weights of the public code: the division comes first."""
    return jnp.exp(jnp.clip(q - q.mean() / q.std(), -3, 3) / alpha)


def test_the_slip_makes_all_rows_alike():
    z = jax.random.normal(jax.random.PRNGKey(0), (200,))
    assert float(jnp.ptp(slipped(100 + 10 * z))) == 0
    assert float(jnp.ptp(mirror_weights(100 + 10 * z, 1.0))) > 5
    np.testing.assert_array_equal(slipped(-100 + 10 * z), jnp.exp(-3))


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_a_step_moves_a_gaussian_by_its_deviation_over_alpha(alpha):
    """The regression's line is the denoiser of the moved Gaussian."""
    mu, s, n = 0.2, 0.3, jnp.array(6)
    keys = jax.random.split(jax.random.PRNGKey(0))
    a_0, noise = (jax.random.normal(k, (100_000, 1)) for k in keys)
    a_0, schedule = mu + s * a_0, linear_schedule(20, 0.8)
    weight = np.asarray(mirror_weights(40 * a_0[:, 0], alpha))
    a_n = perturb(schedule, a_0, n, noise)
    line = np.polyfit(a_n[:, 0], noise[:, 0], 1, w=np.sqrt(weight))
    m, std = float(schedule.mean[n]), float(schedule.std[n])
    slope = std / (m**2 * s**2 + std**2)
    np.testing.assert_allclose(line, [slope, -slope * m * (mu + s / alpha)], atol=0.03)


def test_profiles():
    paper, laptop = (make_agent("dpmd", 3, 2, p).config for p in ("paper", "laptop"))
    assert paper == ReweightedConfig()
    assert (paper.width, paper.depth, paper.activation) == (256, 3, "mish")
    assert (paper.actor_lr, paper.critic_lr, paper.alpha_lr) == (3e-4, 3e-4, 7e-3)
    assert (paper.num_steps, paper.num_particles, paper.alpha_delay) == (20, 32, 250)
    assert (paper.noise_scale, paper.reward_scale) == (0.1, 0.2)
    assert (paper.beta_scale, paper.start_std) == (0.8, 0.5)
    assert not paper.distributional and paper.ema_policy
    assert (laptop.width, laptop.batch_size, laptop.num_particles) == (128, 128, 16)
    assert make_agent("dpmd", 3, 2).prior_std == 0.5


def test_loss_by_hand_and_at_the_states_themselves():
    agent, batch, key = tiny(), transitions(4), jax.random.PRNGKey(1)
    state = jax.jit(agent.init)(jax.random.PRNGKey(0))
    state = state._replace(log_alpha=jnp.log(2.0))
    (k_best, k_explore), (k_step, k_noise) = (
        jax.random.split(k) for k in jax.random.split(key)
    )
    s = batch.observation
    best = jax.jit(partial(best_of_n, agent))
    a_0 = best(state.policy, state.critic, s, k_best)
    a_0 = add_noise(agent, a_0, state.log_alpha, k_explore)
    q = np.asarray(jax.jit(partial(q_value, agent))(state.critic, s, a_0))
    weight = np.exp((q - q.mean()) / q.std() / 2)  # four values stay within 3
    step = jax.random.randint(k_step, (4,), 1, 4)
    noise = jax.random.normal(k_noise, (4, 2))
    a_n = perturb(agent.schedule, a_0, step, noise)
    seen = jax.jit(agent.denoiser.apply)(state.policy, a_n, step, s)
    by_hand = np.mean(weight * np.sum((seen - noise) ** 2, -1))
    loss = jax.jit(agent.policy_loss)
    np.testing.assert_allclose(
        loss(state.policy, state, batch, key), by_hand, rtol=1e-3
    )
    elsewhere = batch._replace(next_observation=batch.observation + 1)
    assert loss(state.policy, state, elsewhere, key) == loss(
        state.policy, state, batch, key
    )
