"""The forward SDEs: kernels against moment equations, simulation, quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad

from som.theory.boltzmann import eight_gaussians
from som.theory.sde import VE, VP

SDES = [VP(), VP(0.1, 20.0), VP(1.5, 1.5), VE(), VE(0.05, 1.0)]
IDS = [str(s) for s in SDES]
TIMES = np.linspace(0.05, 1, 8)


@pytest.mark.parametrize("sde", SDES[:3], ids=IDS[:3])
def test_beta_integrates_to_integral(sde):
    for t in TIMES:
        assert np.isclose(sde.integral(t), quad(sde.beta, 0, t)[0], rtol=1e-9)


@pytest.mark.parametrize("sde", SDES[:3], ids=IDS[:3])
def test_vp_preserves_unit_variance(sde):
    total = sde.mean(TIMES) ** 2 + sde.std(TIMES) ** 2
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_vp_std_is_accurate_at_small_times():
    sde, t = VP(), np.array([1e-8, 1e-6, 1e-4, 1e-2])
    exact = np.sqrt(-np.expm1(-sde.integral(t)))
    ours = sde.std(jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(ours, exact, rtol=1e-6)


@pytest.mark.parametrize("sde", SDES, ids=IDS)
def test_kernels_solve_the_moment_equations(sde):
    # m' = f m and (sigma^2)' = 2 f sigma^2 + g^2, by automatic differentiation.
    t = jnp.asarray(TIMES, jnp.float32)
    rate = sde.drift(jnp.ones_like(t), t)
    d_mean = jax.vmap(jax.grad(sde.mean))(t)
    d_variance = jax.vmap(jax.grad(lambda t: sde.std(t) ** 2))(t)
    np.testing.assert_allclose(d_mean, rate * sde.mean(t), rtol=1e-5, atol=1e-6)
    expected = 2 * rate * sde.std(t) ** 2 + sde.diffusion_squared(t)
    np.testing.assert_allclose(d_variance, expected, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("sde", SDES, ids=IDS)
def test_start_and_end(sde):
    assert np.isclose(sde.mean(0.0), 1)
    assert np.isclose(sde.std(0.0), getattr(sde, "sigma_min", 0.0))
    assert np.isclose(sde.std(1.0) / sde.prior_std(), 1, atol=0.2 + sde.mean(1.0) ** 2)


def test_prior_is_the_end_of_the_kernel():
    assert np.isclose(VE(0.01, 4.0).std(1.0), VE(0.01, 4.0).prior_std(), rtol=1e-6)
    assert np.isclose(VP(0.1, 20.0).std(1.0), VP().prior_std(), rtol=1e-4)


@pytest.mark.parametrize("sde", [VP(), VE()], ids=["VP", "VE"])
def test_euler_maruyama_ensemble_agrees_with_the_kernel(sde):
    n, steps, a_0 = 20_000, 100, 0.8

    @jax.jit
    def simulate(key):
        keys = jax.random.split(key, steps + 1)
        a = a_0 + sde.std(0.0) * jax.random.normal(keys[0], (n,))

        def step(a, inputs):
            key, t = inputs
            noise = jax.random.normal(key, a.shape)
            kick = jnp.sqrt(sde.diffusion_squared(t) / steps)
            return a + sde.drift(a, t) / steps + kick * noise, None

        # Midpoints leave a bias of second order, far below the sampling error.
        t = (jnp.arange(steps) + 0.5) / steps
        return jax.lax.scan(step, a, (keys[1:], t))[0]

    a = np.asarray(simulate(jax.random.key(0)))
    mean, variance = float(sde.mean(1.0)) * a_0, float(sde.std(1.0)) ** 2
    assert abs(a.mean() - mean) < 4 * np.sqrt(variance / n) + 1e-3
    assert abs(a.var() / variance - 1) < 4 * np.sqrt(2 / n) + 1e-3


@pytest.mark.parametrize("sde", [VP(), VE()], ids=["VP", "VE"])
def test_perturb_has_the_kernels_moments(sde):
    n, t = 20_000, 0.4
    a_0 = jnp.tile(jnp.array([0.5, -0.9]), (n, 1))
    a_t = np.asarray(sde.perturb(jax.random.key(1), a_0, t))
    std = float(sde.std(t))
    expected = np.asarray(sde.mean(t) * a_0[0])
    assert np.all(np.abs(a_t.mean(0) - expected) < 4 * std / np.sqrt(n))
    assert np.all(np.abs(a_t.std(0) - std) < 4 * std / np.sqrt(2 * n))
    assert abs(np.corrcoef(a_t.T)[0, 1]) < 4 / np.sqrt(n)


@pytest.mark.parametrize("sde", [VP(), VE()], ids=["VP", "VE"])
def test_perturb_takes_one_time_per_action(sde):
    a_0 = jnp.ones((3, 2))
    t = jnp.array([[0.1], [0.5], [1.0]])
    key = jax.random.key(2)
    together = sde.perturb(key, a_0, t)
    noise = jax.random.normal(key, a_0.shape)
    for i in range(3):
        single = sde.mean(t[i]) * a_0[i] + sde.std(t[i]) * noise[i]
        np.testing.assert_allclose(together[i], single, rtol=1e-6)


def test_vp_is_ve_in_other_units():
    sde, mixture = VP(), eight_gaussians()
    a = jax.random.normal(jax.random.key(3), (20, 2))
    for t in (0.1, 0.5, 1.0):
        m, sigma = sde.mean(t), sde.std(t)
        direct = mixture.score(a, m, sigma)
        other = mixture.score(a / m, 1.0, sigma / m) / m
        np.testing.assert_allclose(direct, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "low, high",
    [(0.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (0.1, float("inf")), (0.1, float("nan"))],
)
def test_bad_schedules_are_refused(low, high):
    with pytest.raises(ValueError, match="VP wants 0 < beta_min"):
        VP(low, high)
    with pytest.raises(ValueError, match="VE wants 0 < sigma_min"):
        VE(low, high)


def test_constant_beta_is_allowed_and_constant_sigma_is_not():
    assert np.isclose(VP(2.0, 2.0).mean(1.0), np.exp(-1.0))
    with pytest.raises(ValueError, match="sigma_min"):
        VE(1.0, 1.0)
