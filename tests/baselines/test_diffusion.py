"""The chain: schedules, one step back, the agent that all others extend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from som.agent.actor_critic import candidates
from som.baselines.diffusion import (
    DiffusionAgent,
    DiffusionConfig,
    clean,
    cosine_schedule,
    linear_schedule,
    perturb,
    posterior,
    reverse_path,
    schedule_of,
    vp_schedule,
)
from som.theory.sde import VP


class Chain(DiffusionAgent):
    @property
    def schedule(self):
        return vp_schedule(self.config.num_steps)


AGENT = Chain(DiffusionConfig(width=8, depth=1, num_steps=3), 3, 2)


def test_schedules_against_products_and_the_sde():
    linear = linear_schedule(20, 0.8)
    beta = 0.8 * np.linspace(1e-4, 0.999, 20)
    np.testing.assert_allclose(linear.beta[1:], beta, rtol=1e-6)
    alpha_bar = np.cumprod(1 - beta)
    np.testing.assert_allclose(linear.mean[1:] ** 2, alpha_bar, rtol=1e-5)
    np.testing.assert_allclose(linear.std[1:] ** 2, 1 - alpha_bar, rtol=1e-4)
    vp, sde = vp_schedule(7, 0.2, 5.0), VP(0.2, 5.0)
    times = jnp.arange(8) / 7
    np.testing.assert_allclose(vp.mean, sde.mean(times), rtol=1e-5)
    np.testing.assert_allclose(vp.std, sde.std(times), rtol=1e-5)
    for schedule in (linear, vp):
        assert (schedule.beta[0], schedule.mean[0], schedule.std[0]) == (0, 1, 0)


def test_cosine_schedule_by_hand():
    """Without an offset and T = 2: m^2 = 1, cos^2(pi / 4), and the bound."""
    schedule = cosine_schedule(2, 0.0)
    np.testing.assert_allclose(schedule.beta, [0, 0.5, 0.999], rtol=1e-6)
    np.testing.assert_allclose(schedule.mean**2, [1, 0.5, 0.0005], rtol=1e-5)
    schedule = cosine_schedule(50)
    angle = (np.arange(51) / 50 + 0.008) / 1.008 * np.pi / 2
    left = (np.cos(angle) / np.cos(angle[0])) ** 2
    np.testing.assert_allclose(schedule.mean[:-1] ** 2, left[:-1], atol=1e-6)
    assert schedule.beta[-1] == np.float32(0.999) and schedule.mean[-1] > 0


@pytest.mark.parametrize("beta", [[0.1, 1.0], [0.0, 0.5], [-0.1], [np.nan]])
def test_step_sizes_are_checked(beta):
    with pytest.raises(ValueError, match=r"not all in \(0, 1\)"):
        schedule_of(beta)


def test_two_steps_and_two_values_by_hand():
    """beta = 1/2, 1/2: m = 1, 0.7071, 0.5 and variances 0, 0.5, 0.75."""
    schedule = schedule_of([0.5, 0.5])
    np.testing.assert_allclose(schedule.mean, [1, 0.5**0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(schedule.std**2, [0, 0.5, 0.75], rtol=1e-6)
    a_0, a_2 = jnp.array([0.6]), jnp.array([-0.9])
    mean, variance = posterior(schedule, a_0, a_2, jnp.array(2))
    half = 0.5**0.5
    np.testing.assert_allclose(variance, 1 / 3, rtol=1e-5)
    np.testing.assert_allclose(
        mean[0], (half * 0.5 * 0.6 - half * 0.5 * 0.9) / 0.75, rtol=1e-5
    )
    mean, variance = posterior(schedule, a_0, a_2, jnp.array(1))
    np.testing.assert_allclose((mean[0], variance), (0.6, 0), rtol=1e-6)
    noised = perturb(schedule, a_0, jnp.array(2), jnp.array([2.0]))
    np.testing.assert_allclose(noised, 0.3 + 3**0.5, rtol=1e-6)


def test_clean_inverts_perturb_and_clips():
    schedule, step = linear_schedule(20, 0.8), jnp.array(9)
    a_0, noise = jnp.array([0.3, -0.8]), jnp.array([1.5, 0.2])
    a_n = perturb(schedule, a_0, step, noise)
    np.testing.assert_allclose(clean(schedule, a_n, noise, step), a_0, atol=1e-5)
    far = clean(schedule, a_n + 10, noise, step)
    np.testing.assert_array_equal(far, [1, 1])
    assert np.all(clean(schedule, a_n + 10, noise, step, jnp.inf) > 1)


def test_exact_denoiser_of_one_point_ends_there():
    point, schedule = jnp.array([0.25, -0.5]), vp_schedule(10)

    def denoise(a, step):
        return (a - schedule.mean[step] * point) / schedule.std[step]

    k_start, k_path = jax.random.split(jax.random.PRNGKey(0))
    start = jax.random.normal(k_start, (50, 2))
    path = reverse_path(denoise, start, schedule, k_path)
    np.testing.assert_allclose(path[-1], jnp.broadcast_to(point, (50, 2)), atol=1e-5)
    np.testing.assert_array_equal(path[0], start)


def test_path_with_and_without_jit_and_twice():
    schedule, key = vp_schedule(4), jax.random.PRNGKey(1)
    noise = jax.random.normal(jax.random.PRNGKey(2), (3, 2))

    def path(key):
        return reverse_path(lambda a, step: 0.1 * step * a, noise, schedule, key)

    fast = jax.jit(path)(key)
    assert fast.shape == (5, 3, 2)
    with jax.disable_jit():
        slow = path(key)
    np.testing.assert_allclose(fast, slow, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(fast, jax.jit(path)(key))
    other = jax.jit(path)(jax.random.PRNGKey(3))
    assert not np.allclose(fast[1], other[1])


def test_path_ends_at_the_candidates():
    key, s = jax.random.PRNGKey(0), jnp.ones((4, 3))
    policy = AGENT.init_policy(jax.random.PRNGKey(1))
    k_noise, k_path = jax.random.split(key)
    noise = jax.random.normal(k_noise, (6, 4, 2))
    path = AGENT.transport(policy, noise, s, k_path)
    drawn = candidates(AGENT, policy, s, key, 6)
    assert path.shape == (4, 6, 4, 2)
    np.testing.assert_allclose(path[-1], drawn, atol=1e-6)


def test_denoiser_broadcasts_and_sees_step_and_state():
    policy = AGENT.init_policy(jax.random.PRNGKey(1))
    net = AGENT.denoiser
    a, s = jnp.ones((5, 4, 2)), jax.random.normal(jax.random.PRNGKey(2), (4, 3))
    together = net.apply(policy, a, jnp.array([1, 2, 3, 3]), s)
    alone = net.apply(policy, a[0, 1], jnp.array(2), s[1])
    np.testing.assert_allclose(together[3, 1], alone, atol=1e-6)
    assert not np.allclose(alone, net.apply(policy, a[0, 1], jnp.array(3), s[1]))
    assert not np.allclose(alone, net.apply(policy, a[0, 1], jnp.array(2), s[2]))


def test_blanks_and_bad_settings():
    with pytest.raises(NotImplementedError):
        _ = DiffusionAgent(DiffusionConfig(), 3, 2).schedule
    with pytest.raises(ValueError, match="num_steps is 1"):
        DiffusionConfig(num_steps=1)
    with pytest.raises(ValueError, match="width is 0"):
        DiffusionConfig(width=0)
