"""Every estimator of the score against closed forms and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import truncnorm

from som.theory import score as S
from som.theory.boltzmann import GaussianMixture
from som.theory.sde import VE, VP

VP_SDE, VE_SDE = VP(0.1, 6.0), VE(0.01, 3.0)
ESTIMATORS = {
    "idem": S.idem_score,
    "box": S.box_score,
    "combined": S.combined_score,
}
MIXTURE = GaussianMixture(
    jnp.array([[0.3, -0.2], [-0.3, 0.1]]), jnp.array([2.0, 1.0]), 0.15
)
propose = jax.jit(S.box_proposals, static_argnums=3)


def wavy(a):
    """An energy that presses against the wall at +1 in every coordinate."""
    return jnp.sum(2 * a + jnp.sin(4 * a), -1)


def box_reference(energy, a_t, t, sde):
    """Score of exp(energy) on [-1, 1], diffused, by quadrature; [1] to float."""
    a = np.linspace(-1, 1, 4001)
    m, std = float(sde.mean(t)), float(sde.std(t))
    log_q = np.asarray(energy(a[:, None]), float) - 0.5 * ((a - a_t / m) * m / std) ** 2
    q = np.exp(log_q - log_q.max())
    return (m * np.trapezoid(a * q, a) / np.trapezoid(q, a) - a_t) / std**2


def estimate(name, energy, a_t, t, sde, num_samples, seeds=1):
    """Estimates for several keys, [seeds, A]."""
    keys = jax.random.split(jax.random.key(0), seeds)
    run = jax.jit(
        jax.vmap(lambda key: ESTIMATORS[name](energy, a_t, t, sde, key, num_samples))
    )
    return np.asarray(run(keys))


@pytest.mark.parametrize("sde", [VP_SDE, VE_SDE], ids=["vp", "ve"])
@pytest.mark.parametrize(
    ("name", "t"), [("idem", 0.05), ("box", 0.3), ("combined", 0.3)]
)
def test_agrees_with_the_closed_form_of_a_mixture(name, t, sde):
    a_t = jnp.array([0.25, 0.1])
    found = estimate(name, MIXTURE.log_prob, a_t, t, sde, 20_000)[0]
    exact = MIXTURE.score(a_t, sde.mean(t), sde.std(t))
    assert np.linalg.norm(found - exact) < 0.05 * np.linalg.norm(exact)


@pytest.mark.parametrize("name", ["box", "combined"])
@pytest.mark.parametrize("t", [0.02, 0.3, 0.9])
def test_agrees_with_quadrature_where_the_walls_push(name, t):
    points = jnp.array([[-1.3], [0.2], [0.9], [1.6]])
    run = jax.jit(
        jax.vmap(
            lambda a_t: ESTIMATORS[name](wavy, a_t, t, VP_SDE, jax.random.key(1), 5000)
        )
    )
    exact = np.array([box_reference(wavy, float(a[0]), t, VP_SDE) for a in points])
    np.testing.assert_allclose(run(points)[:, 0], exact, rtol=0.04, atol=0.06)


def test_weighted_gradient_is_the_gradient_of_the_log_sum_exp():
    a_t, key, t = jnp.array([0.4, -0.3]), jax.random.key(2), 0.4

    def log_sum_exp(a_t):
        guesses = S.gaussian_proposals(key, a_t, t, VP_SDE, 50)
        return jax.nn.logsumexp(MIXTURE.log_prob(guesses))

    @jax.jit
    def both(a_t):
        found = S.idem_score(MIXTURE.log_prob, a_t, t, VP_SDE, key, 50)
        return found, jax.grad(log_sum_exp)(a_t)

    np.testing.assert_allclose(*both(a_t), rtol=1e-4)


def test_weighted_gradient_by_hand():
    energies = jnp.log(jnp.array([1.0, 3.0]))
    gradients = jnp.array([[4.0, 0.0], [0.0, 8.0]])
    found = S.weighted_gradient(energies, gradients, 0.5, VE_SDE)
    np.testing.assert_allclose(found, [1.0, 6.0], rtol=1e-6)


@pytest.mark.parametrize("t", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("outside", [-0.5, 0.5, 5.0, 12.0, 30.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_proposals_follow_the_truncated_normal(t, outside, sign):
    m, std = float(VP_SDE.mean(t)), float(VP_SDE.std(t))
    s = std / m
    centre = sign * (1 + outside * s)
    quantiles = np.linspace(0.02, 0.98, 49)
    a_t = jnp.array([centre * m], jnp.float32)
    uniforms = jnp.asarray(quantiles[:, None], jnp.float32)
    found = propose(uniforms, a_t, t, VP_SDE, jnp.zeros(1))
    law = truncnorm((-1 - centre) / s, (1 - centre) / s, centre, s)
    ordered = np.sort(found.actions[:, 0])
    tolerance = 0.1 * law.std() + 2e-6
    np.testing.assert_allclose(ordered, law.ppf(quantiles), atol=tolerance)
    tolerance = 0.02 * law.std() + 2e-6
    np.testing.assert_allclose(found.mean[0], law.mean(), atol=tolerance)
    np.testing.assert_array_equal(found.log_tilt, 0.0)


def test_proposals_stay_in_the_box_even_for_extreme_uniforms():
    uniforms = jnp.array([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    for t in (0.0, 1e-3, 0.5, 1.0):
        a_t, slope = jnp.array([0.2, -4.0]), jnp.array([1e4, -3.0])
        found = propose(uniforms, a_t, t, VP_SDE, slope)
        assert np.all(np.abs(found.actions) <= 1)
        assert np.all(np.abs(found.mean) <= 1)
        assert np.all(np.isfinite(found.log_tilt))


def test_proposals_of_a_narrow_kernel_stay_near_the_noisy_action():
    uniforms = jnp.array([[0.0], [0.5], [1.0]])
    found = propose(uniforms, jnp.array([0.2]), 1e-3, VP_SDE, jnp.zeros(1))
    assert np.all(np.abs(found.actions - 0.2) < 0.06)


@pytest.mark.parametrize("t", [0.02, 0.3, 0.9])
def test_a_linear_energy_needs_a_single_guess(t):
    slope, a_t = jnp.array([1.5]), jnp.array([0.5])
    guess = propose(jnp.full((1, 1), 0.3), a_t, t, VP_SDE, slope)
    found = S.posterior_mean_score(guess, guess.actions @ slope, a_t, t, VP_SDE)
    exact = box_reference(lambda a: 1.5 * a[..., 0], 0.5, t, VP_SDE)
    np.testing.assert_allclose(found[0], exact, rtol=2e-3)


def test_a_constant_energy_has_an_exact_score_for_any_sample():
    a_t = jnp.array([0.7])
    found = estimate("box", lambda a: 0 * a[..., 0] + 7, a_t, 0.5, VP_SDE, 3, seeds=4)
    exact = box_reference(lambda a: 0 * a[..., 0], 0.7, 0.5, VP_SDE)
    np.testing.assert_allclose(found, np.full((4, 1), exact), rtol=1e-3)


@pytest.mark.parametrize("sde", [VP_SDE, VE_SDE], ids=["vp", "ve"])
def test_tilt_is_the_gradient_at_small_times_and_capped(sde):
    gradient = jnp.array([2.0, -1e6, 0.0])
    narrow = S.tilt(gradient, 0.0, sde)
    np.testing.assert_allclose(narrow[0], 2.0, rtol=0.01)
    for t in (0.0, 0.3, 1.0):
        mean, std = S.kernel_at(t, sde)
        shift = np.abs(S.tilt(gradient, t, sde)) * std / mean
        assert np.all(shift <= 1.0001)
        np.testing.assert_allclose(shift[1], 1.0, rtol=1e-4)
        assert shift[2] == 0


def test_tilt_centres_the_guesses_on_the_posterior_of_a_quadratic():
    target, centre, length, t = jnp.array([0.1]), jnp.array([0.15]), 0.3, 0.05
    mean, scale = VP_SDE.mean(t), VP_SDE.std(t) / VP_SDE.mean(t)
    slope = S.tilt((target - centre) / length**2, t, VP_SDE, reach=length)
    guess = propose(jnp.ones((1, 1)), mean * centre, t, VP_SDE, slope)
    best = (length**2 * centre + scale**2 * target) / (length**2 + scale**2)
    np.testing.assert_allclose(guess.mean, best, atol=1e-4)


def test_the_tilt_does_not_change_the_expectation():
    a_t, t, count = jnp.array([0.3, -0.2]), 0.2, 1024

    @jax.jit
    @jax.vmap
    def tilted(key):
        uniforms = jax.random.uniform(key, (count, 2))
        slope = jnp.array([1.0, -2.0])
        guesses = S.box_proposals(uniforms, a_t, t, VP_SDE, slope)
        energies = wavy(guesses.actions)
        return S.posterior_mean_score(guesses, energies, a_t, t, VP_SDE)

    found = np.asarray(tilted(jax.random.split(jax.random.key(3), 200)))
    exact = np.array([box_reference(wavy, float(a), t, VP_SDE) for a in a_t])
    error = found.std(0) / np.sqrt(len(found))
    # Self-normalised weights have a bias of order 1/K of their own.
    allowance = 4 * error + found.std(0) / np.sqrt(count)
    assert np.all(np.abs(found.mean(0) - exact) < allowance)


@pytest.mark.parametrize("size", [1, 2, 6, 17])
def test_lattice_points_are_even_and_uniform_over_shifts(size):
    keys = jax.random.split(jax.random.key(4), 2000)
    points = np.asarray(jax.jit(jax.vmap(lambda k: S.lattice(k, 64, size)))(keys))
    assert points.min() >= 0 and points.max() <= 1
    counts = np.histogram(points[0, :, 0], 8, (0, 1))[0]
    assert counts.min() >= 7 and counts.max() <= 9
    np.testing.assert_allclose(points[:, 13].mean(0), 0.5, atol=0.03)
    np.testing.assert_allclose(points[:, 13].var(0), 1 / 12, atol=0.01)
    assert len(np.unique(points[0], axis=0)) == 64


@pytest.mark.parametrize(
    ("name", "t", "order"),
    [("idem", 0.05, -0.5), ("box", 0.3, -1.0), ("combined", 0.3, -1.0)],
)
def test_error_falls_with_the_number_of_guesses(name, t, order):
    a_t = jnp.array([0.25, 0.1])
    few, many = (
        estimate(name, MIXTURE.log_prob, a_t, t, VP_SDE, k, seeds=200).std(0).mean()
        for k in (64, 1024)
    )
    assert abs(np.log(many / few) / np.log(16) - order) < 0.2


def test_combined_beats_both_early_and_follows_the_better_later():
    for t, share in ((0.03, 0.9), (0.3, 1.1)):
        a_t = jnp.array([0.25, 0.1])
        exact = MIXTURE.score(a_t, VP_SDE.mean(t), VP_SDE.std(t))
        rms = {
            name: np.sqrt(
                np.mean(
                    (estimate(name, MIXTURE.log_prob, a_t, t, VP_SDE, 100, 100) - exact)
                    ** 2
                )
            )
            for name in ESTIMATORS
        }
        assert rms["combined"] < share * min(rms["idem"], rms["box"])


@pytest.mark.parametrize("sde", [VP_SDE, VE_SDE], ids=["vp", "ve"])
def test_finite_and_inward_far_outside_the_box(sde):
    run = jax.jit(
        lambda a_t, t: S.combined_score(wavy, a_t, t, sde, jax.random.key(5), 16)
    )
    for t in (0.0, 1e-6, 1e-3, 0.1, 1.0):
        found = np.asarray(run(jnp.array([30.0, -30.0]), t))
        assert np.all(np.isfinite(found)) and found[0] < 0 < found[1]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_same_key_same_score_under_jit_and_vmap(name):
    keys = jax.random.split(jax.random.key(6), 3)
    a_t = jnp.array([[0.1, 0.2], [0.5, -0.9], [1.2, 0.0]])
    t = jnp.array([0.1, 0.5, 0.9])

    def one(a_t, t, key):
        return ESTIMATORS[name](wavy, a_t, t, VP_SDE, key, 8)

    batched = jax.jit(jax.vmap(one))
    np.testing.assert_array_equal(batched(a_t, t, keys), batched(a_t, t, keys))
    alone = jax.jit(one)
    for i in range(3):
        found = alone(a_t[i], t[i], keys[i])
        np.testing.assert_allclose(batched(a_t, t, keys)[i], found, rtol=1e-3)
    assert np.any(batched(a_t, t, keys) != batched(a_t, t, keys[::-1]))


def test_a_linear_energy_is_found_from_few_guesses():
    slope = jnp.array([3.0, -2.0, 0.5])
    guesses = S.guesses_near(jax.random.key(7), jnp.array([[0.9, 0.0, -0.3]]), 8)
    found = S.fit_slope(guesses, guesses @ slope + 7, ridge=1e-4)
    np.testing.assert_allclose(found, slope, rtol=5e-3, atol=5e-3)
    ridged = S.fit_slope(guesses, guesses @ slope)
    assert np.linalg.norm(ridged) < np.linalg.norm(slope)
    assert np.linalg.norm(ridged - slope) < 0.3 * np.linalg.norm(slope)


def test_the_slope_is_discounted_by_leaving_each_guess_out():
    keys = jax.random.split(jax.random.key(8), 2)
    x = np.asarray(jax.random.uniform(keys[0], (12, 2)), np.float64)
    y = x @ [2.0, -1.0] + 0.5 * np.asarray(jax.random.normal(keys[1], (12,)))

    def plane(x, y):
        return np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]

    others = [np.arange(12) != k for k in range(12)]
    missed = [
        y[k] - np.r_[x[k], 1] @ plane(x[rest], y[rest]) for k, rest in enumerate(others)
    ]
    by_mean = [y[k] - y[rest].mean() for k, rest in enumerate(others)]
    share = 1 - np.sum(np.square(missed)) / np.sum(np.square(by_mean))
    assert 0.05 < share < 0.95
    found = S.fit_slope(jnp.asarray(x), jnp.asarray(y), ridge=0.0)
    np.testing.assert_allclose(found, share * plane(x, y)[:2], rtol=1e-3)


def test_no_slope_where_the_energies_lie_on_no_plane():
    guesses = S.guesses_near(jax.random.key(9), jnp.zeros((1, 2)), 64, width=0.3)
    ring = -40 * (jnp.linalg.norm(guesses, axis=-1) - 0.3) ** 2
    assert np.linalg.norm(S.fit_slope(guesses, ring)) < 0.3
    for energies in (jnp.ones(64), jnp.zeros(64)):
        np.testing.assert_array_equal(S.fit_slope(guesses, energies), 0)
    same = jnp.full((4, 2), 0.5)
    assert np.all(np.isfinite(S.fit_slope(same, jnp.arange(4.0))))


@pytest.mark.parametrize("t", [0.02, 0.3, 0.9])
def test_shared_score_of_a_linear_energy_is_exact(t):
    slope, a_t = jnp.array([1.5]), jnp.array([0.5])
    found = S.shared_score(lambda a: a @ slope, slope, a_t, t, VP_SDE)
    exact = box_reference(lambda a: 1.5 * a[..., 0], 0.5, t, VP_SDE)
    np.testing.assert_allclose(found[0], exact, rtol=2e-3)


def test_shared_score_is_the_gradient_early_and_finite_anywhere():
    inside, slope = jnp.array([0.25, 0.1]), jnp.array([30.0, -30.0])
    run = jax.jit(lambda a, t: S.shared_score(MIXTURE.log_prob, slope, a, t, VP_SDE))
    exact = MIXTURE.score(inside)
    np.testing.assert_allclose(run(inside, 1e-4), exact, rtol=0.05, atol=0.05)
    for t in (0.0, 1e-6, 1e-3, 0.1, 1.0):
        found = np.asarray(run(jnp.array([30.0, -30.0]), t))
        assert np.all(np.isfinite(found)) and found[0] < 0 < found[1]


def test_guesses_surround_their_centres_inside_the_box():
    centres = jnp.array([[1.0, -0.5], [-1.0, 0.5]])
    found = np.asarray(S.guesses_near(jax.random.key(10), centres, 512, width=0.2))
    assert found.shape == (512, 2) and np.abs(found).max() <= 1
    law = truncnorm(-10, 0, 1, 0.2)
    for mine, side in ((found[::2], 1), (found[1::2], -1)):
        np.testing.assert_allclose(side * mine[:, 0].mean(), law.mean(), atol=0.03)
        np.testing.assert_allclose(mine[:, 1].mean(), -0.5 * side, atol=0.03)
        np.testing.assert_allclose(mine[:, 1].std(), 0.2, atol=0.03)
