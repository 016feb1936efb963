"""SDAC: the weighted noise, the loss, a bandit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from examples import transitions

from som.agent.actor_critic import (
    add_noise,
    best_of_n,
    candidates,
    make_agent,
    q_value,
)
from som.baselines.diffusion import clean, linear_schedule, perturb
from som.baselines.sdac import SDACConfig, weighted_noise
from som.theory.boltzmann import GaussianMixture

TINY = {"width": 8, "depth": 1, "num_steps": 3, "num_particles": 2, "num_samples": 4}


def tiny(**options):
    return make_agent("sdac", 3, 2, **TINY | options)


def test_weights_by_hand():
    """An energy that only knows two values picks a mean of some noises."""
    schedule, key = linear_schedule(20, 0.8), jax.random.PRNGKey(0)
    a_n, step = jnp.array([0.2, 0.1]), jnp.array(6)
    noise = np.asarray(jax.random.normal(key, (8, 2)))
    right = np.asarray(clean(schedule, a_n, noise, step))[:, 0] > 0
    assert 0 < right.sum() < 8
    ours = weighted_noise(
        lambda a: jnp.where(a[..., 0] > 0, 0.0, -50.0), a_n, schedule, step, key, 8
    )
    np.testing.assert_allclose(ours, noise[right].mean(0), atol=1e-6)


def test_constant_energy_gives_the_plain_mean():
    schedule, key = linear_schedule(20, 0.8), jax.random.PRNGKey(1)
    ours = weighted_noise(
        lambda a: 7.0 + 0 * a[..., 0], jnp.zeros(2), schedule, jnp.array(9), key, 50
    )
    noise = jax.random.normal(key, (50, 2))
    np.testing.assert_allclose(ours, noise.mean(0), atol=1e-6)


def test_target_agrees_with_the_closed_form():
    mixture = GaussianMixture(
        jnp.array([[0.4, 0.2], [-0.3, -0.4]]), jnp.array([2.0, 1.0]), 0.15
    )
    schedule = linear_schedule(20, 0.8)
    a_0 = mixture.sample(jax.random.PRNGKey(1), 30)
    noise = jax.random.normal(jax.random.PRNGKey(2), a_0.shape)
    keys = jax.random.split(jax.random.PRNGKey(3), 30)
    for n in (3, 8):
        step = jnp.array(n)
        a_n = perturb(schedule, a_0, step, noise)
        mean, std = schedule.mean[n], schedule.std[n]
        estimate = jax.jit(
            jax.vmap(
                lambda a, key, step=step: weighted_noise(
                    mixture.log_prob, a, schedule, step, key, 8192, jnp.inf
                )
            )
        )(a_n, keys)
        exact = -std * mixture.score(a_n, mean, std)
        gap = np.sqrt(np.mean((estimate - exact) ** 2) / np.mean(exact**2))
        assert gap < 0.08


def test_profiles():
    paper, laptop = (make_agent("sdac", 3, 2, p).config for p in ("paper", "laptop"))
    assert paper == SDACConfig()
    assert (paper.width, paper.depth, paper.activation) == (256, 3, "mish")
    assert (paper.actor_lr, paper.critic_lr, paper.alpha_lr) == (3e-4, 3e-4, 7e-3)
    assert (paper.num_steps, paper.num_particles, paper.alpha_delay) == (20, 32, 250)
    assert (paper.num_samples, paper.reward_scale) == (64, 0.2)
    assert not paper.distributional and paper.ema_policy
    assert (laptop.width, laptop.batch_size, laptop.num_particles) == (128, 128, 16)
    assert make_agent("sdac", 3, 2).prior_std == 0.5
    assert make_agent("sdac", 3, 2, start_std=1.0).prior_std == 1.0


def test_path_ends_at_candidates():
    agent, key, s = tiny(), jax.random.PRNGKey(0), transitions(4).observation
    policy = agent.init_policy(jax.random.PRNGKey(1))
    k_noise, k_path = jax.random.split(key)
    noise = 0.5 * jax.random.normal(k_noise, (6, 4, 2))
    path = agent.transport(policy, noise, s, k_path)
    np.testing.assert_allclose(
        path[-1], candidates(agent, policy, s, key, 6), atol=1e-6
    )


def test_target_with_and_without_jit():
    schedule, key = linear_schedule(20, 0.8), jax.random.PRNGKey(1)

    def target(a_n):
        energy = partial(jnp.sum, axis=-1)
        return weighted_noise(energy, a_n, schedule, jnp.array(4), key, 8)

    a_n = jnp.array([0.3, -0.4])
    np.testing.assert_allclose(jax.jit(target)(a_n), target(a_n), rtol=1e-5)


def test_the_proposal_carries_no_gradient():
    """Moving the critic's constants moves the target, not the gradient's path."""
    agent, batch, key = tiny(), transitions(4), jax.random.PRNGKey(1)
    state = agent.init(jax.random.PRNGKey(0))
    loss = jax.jit(partial(agent.policy_loss, state=state, batch=batch, key=key))
    gradient = jax.jit(jax.grad(loss))(state.policy)
    # The last bias enters linearly: d loss / d bias = 2 mean(seen - aim).
    last = max(gradient["params"]["MLP_0"], key=lambda n: int(n.split("_")[1]))
    slope = np.asarray(gradient["params"]["MLP_0"][last]["bias"])
    config = agent.config
    k_best, k_explore, k_step, k_noise, k_row = jax.random.split(key, 5)
    s = batch.observation
    a_0 = best_of_n(agent, state.policy, state.critic, s, k_best)
    a_0 = add_noise(agent, a_0, state.log_alpha, k_explore)
    step = jax.random.randint(k_step, (4,), 1, config.num_steps + 1)
    a_n = perturb(agent.schedule, a_0, step, jax.random.normal(k_noise, a_0.shape))
    gaps = [
        agent.denoiser.apply(state.policy, a_n[i], step[i], s[i])
        - weighted_noise(
            lambda a, i=i: 5 * q_value(agent, state.critic, s[i], a),
            a_n[i],
            agent.schedule,
            step[i],
            k,
            config.num_samples,
        )
        for i, k in enumerate(jax.random.split(k_row, 4))
    ]
    np.testing.assert_allclose(slope, 2 * np.mean(gaps, 0), rtol=1e-3, atol=1e-5)
