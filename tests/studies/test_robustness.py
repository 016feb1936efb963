"""Rewards that lie: the conditions, the kernel that smooths, its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from som.studies.bandit import fit
from som.studies.landscapes import landscape
from som.studies.robustness import (
    CONDITIONS,
    SIDE,
    TIMES,
    log_kernel,
    posterior_mean,
    smoothed_q,
    stages,
)
from som.theory.boltzmann import box_grid
from som.theory.sde import VP
from som.training.command_line import STUDIES

SDE = VP(0.1, 2.0)


def test_every_method_meets_every_condition():
    arms = STUDIES["robustness"].arms
    assert len(arms) == 3 * len(CONDITIONS)
    noise = {arm.get("noise") for arm in arms.values()}
    assert {0.2, 0.3, 2.0, 3.0} <= noise


def test_smoothed_q_by_monte_carlo():
    q = landscape("eight-modes").reward(box_grid(30))
    t, factor = 0.5, 6.0
    mean, std = float(SDE.mean(t)), float(SDE.std(t))
    value = smoothed_q(q, factor, t, SDE)[20, 9]
    # a_0 from the kernel around a_t / m, cut to the box by rejection
    rng = np.random.default_rng(0)
    centre = np.asarray(box_grid(30)[20, 9])
    a = centre + std / mean * rng.normal(size=(400_000, 2))
    a = a[np.abs(a).max(1) < 1]
    energies = factor * np.asarray(landscape("eight-modes").reward(jnp.asarray(a)))
    expected = np.log(np.exp(energies).mean()) / factor
    assert float(value) == pytest.approx(expected, abs=0.01)


def test_constants_pass_and_bumps_are_lowered():
    flat = jnp.full((20, 20), 0.7)
    np.testing.assert_allclose(smoothed_q(flat, 5.0, 0.5, SDE), 0.7, rtol=1e-5)
    peak = jnp.exp(-jnp.sum(box_grid(20) ** 2, -1) / 0.02)
    tops = [float(smoothed_q(peak, 5.0, t, SDE).max()) for t in (0.05, 0.2, 0.8)]
    assert 1 > tops[0] > tops[1] > tops[2] > 0


def test_posterior_mean_is_the_derivative():
    q = landscape("two-moons").reward(box_grid(16))
    error = jnp.sin(7 * box_grid(16)[..., 0])
    step = 1e-2
    up, down = (smoothed_q(q + s * error, 8.0, 0.3, SDE) for s in (step, -step))
    mean = posterior_mean(error, q, 8.0, 0.3, SDE)
    np.testing.assert_allclose((up - down) / (2 * step), mean, atol=2e-3)


def test_kernel_rows_are_distributions():
    rows = jnp.exp(log_kernel(12, 0.4, SDE))
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(rows[40].argmax(), 40)


@pytest.mark.parametrize("algo", ["som", "sdac", "mfp"])
def test_stages_end_where_the_sampler_does(algo):
    tiny = {"width": 8, "depth": 1, "batch_size": 8}
    scape = landscape("eight-modes")
    sampler = fit(algo, scape.reward, jax.random.PRNGKey(0), 2, **tiny)
    result = stages([sampler], scape, 6)
    assert np.shape(result["q"]) == (SIDE, SIDE)
    assert np.shape(result["places"]) == (len(TIMES), 6, 2)
    noise = sampler.prior(jax.random.PRNGKey(9), 6)
    np.testing.assert_allclose(result["places"][-1], sampler(noise), atol=1e-3)
    np.testing.assert_allclose(sampler.at(noise, [1.0])[0], noise, rtol=1e-6)
