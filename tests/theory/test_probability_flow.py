"""The probability flow: the field, its rescaling and the sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from som.theory.boltzmann import GaussianMixture
from som.theory.probability_flow import integrate, unit_rescale, velocity
from som.theory.sde import VE, VP

SDES = [VP(0.1, 6.0), VE(0.05, 2.0)]
MIXTURE = GaussianMixture(
    jnp.array([[0.7, 0.0], [-0.5, 0.4]]), jnp.array([2.0, 1.0]), 0.2
)


def spread(sde, t, width):
    """Standard deviation at time t when the actions are N(0, width^2)."""
    return jnp.sqrt((sde.mean(t) * width) ** 2 + sde.std(t) ** 2)


@pytest.mark.parametrize("sde", SDES)
def test_velocity_moves_the_crowd_as_the_fokker_planck_equation(sde):
    def log_p(a, t):
        return MIXTURE.log_prob(a, sde.mean(t), sde.std(t))

    def residual(a, t):
        da, dt = jax.grad(log_p, argnums=(0, 1))(a, t)
        v, jacobian = (
            f(lambda a: velocity(jax.grad(log_p)(a, t), a, t, sde))(a)
            for f in (lambda v: v, jax.jacfwd)
        )
        divergence = jnp.trace(jacobian)
        return (dt + divergence + v @ da) / (abs(dt) + abs(divergence) + 1)

    a = jax.random.uniform(jax.random.key(0), (50, 2), minval=-1.5, maxval=1.5)
    t = jnp.linspace(0.1, 1.0, 50)
    assert jnp.abs(jax.jit(jax.vmap(residual))(a, t)).max() < 1e-3


def test_velocity_is_equation_6_for_vp_and_has_no_drift_for_ve():
    a, score, t = jnp.array([0.5, -1.0]), jnp.array([2.0, 3.0]), 0.4
    vp, ve = SDES
    expected = -0.5 * (0.1 + 5.9 * t) * (a + score)
    np.testing.assert_allclose(velocity(score, a, t, vp), expected, rtol=1e-6)
    h = 1e-3
    rate = (ve.std(t + h) ** 2 - ve.std(t - h) ** 2) / (2 * h)
    np.testing.assert_allclose(velocity(score, a, t, ve), -rate / 2 * score, rtol=1e-3)


@pytest.mark.parametrize("sde", SDES)
def test_integrate_is_of_second_order(sde):
    width = 0.5
    a_1 = jnp.array([[1.0, -2.0]])
    exact = a_1 * spread(sde, 0.0, width) / spread(sde, 1.0, width)

    def field(a, t):
        return velocity(-a / spread(sde, t, width) ** 2, a, t, sde)

    errors = [
        float(
            jnp.abs(jax.jit(lambda a, n=n: integrate(field, a, n))(a_1) - exact).max()
        )
        for n in (16, 32, 64)
    ]
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(orders, 2, atol=0.2)


def test_integrate_refuses_no_steps():
    with pytest.raises(ValueError, match="num_steps is 0; at least 1 is wanted"):
        integrate(lambda a, t: a, jnp.zeros(2), 0)


def test_the_flow_ends_in_the_mixture():
    sde = VP(0.1, 6.0)
    keys = jax.random.split(jax.random.key(0), 3)
    index = jax.random.categorical(keys[0], jnp.log(MIXTURE.weights), shape=(2000,))
    a_0 = MIXTURE.means[index] + 0.2 * jax.random.normal(keys[1], (2000, 2))

    def field(a, t):
        return velocity(MIXTURE.score(a, sde.mean(t), sde.std(t)), a, t, sde)

    a_1 = sde.perturb(keys[2], a_0, 1.0)
    ends = jax.jit(lambda a: integrate(field, a, 40))(a_1)
    standard_error = 4 * a_0.std(0) * np.sqrt(2 / 2000)
    assert (jnp.abs(ends.mean(0) - a_0.mean(0)) < standard_error).all()
    assert (jnp.abs(ends.std(0) - a_0.std(0)) < standard_error).all()
    share = (jnp.linalg.norm(ends - MIXTURE.means[0], axis=-1) < 0.6).mean()
    assert abs(share - 2 / 3) < 0.05


def test_the_drift_alone_expands_from_noise_to_action():
    sde = VP(0.1, 2.0)
    end = integrate(lambda a, t: velocity(0 * a, a, t, sde), jnp.ones(1), 50)
    np.testing.assert_allclose(end, 1 / sde.mean(1.0), rtol=1e-3)
    assert end > 1.6


def test_unit_rescale_keeps_the_direction_and_sets_the_length():
    score = jax.random.normal(jax.random.key(0), (4, 5, 3))
    scaled = unit_rescale(score, 25.0)
    np.testing.assert_allclose(jnp.linalg.norm(scaled, axis=-1), 25.0, rtol=1e-5)
    np.testing.assert_allclose(unit_rescale(1e3 * score, 25.0), scaled, rtol=1e-4)
    cosine = (scaled * score).sum(-1) / 25 / jnp.linalg.norm(score, axis=-1)
    np.testing.assert_allclose(cosine, 1.0, rtol=1e-5)
    assert (unit_rescale(jnp.zeros((2, 3)), 25.0) == 0).all()
