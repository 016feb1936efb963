"""Boltzmann policies, mixtures and rewards of the plane, each computed twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from som.theory.boltzmann import (
    TALL_MODES,
    GaussianMixture,
    boltzmann_samples,
    box_grid,
    checkerboard,
    eight_gaussians,
    eight_modes,
    gaussian_bump,
    gaussian_noise,
    moon_gaussians,
    near,
    normalised_density,
    two_moons,
)

REWARDS = {
    "eight_modes": eight_modes,
    "two_moons": two_moons,
    "checkerboard": checkerboard,
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random_mixture(rng, components=4, size=3, std=0.2):
    means = jnp.asarray(rng.uniform(-0.7, 0.7, (components, size)), jnp.float32)
    weights = jnp.asarray(rng.uniform(1, 3, components), jnp.float32)
    return GaussianMixture(means, weights, std)


@pytest.mark.parametrize("m, sigma", [(1.0, 0.0), (0.8, 0.4), (0.05, 1.0)])
def test_mixture_matches_gaussians_summed_in_float64(rng, m, sigma):
    mixture = random_mixture(rng)
    a = rng.uniform(-1, 1, (7, 3))
    variance = m**2 * mixture.std**2 + sigma**2
    means, weights = np.float64(mixture.means), np.float64(mixture.weights)
    square = np.sum((a[:, None] - m * means) ** 2, -1)
    bells = np.exp(-square / (2 * variance)) / (2 * np.pi * variance) ** 1.5
    density = bells @ (weights / weights.sum())
    ours = mixture.log_prob(jnp.asarray(a, jnp.float32), m, sigma)
    np.testing.assert_allclose(ours, np.log(density), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m, sigma", [(1.0, 0.0), (0.8, 0.4), (0.05, 1.0)])
def test_mixture_score_matches_autodiff(rng, m, sigma):
    mixture = random_mixture(rng)
    a = jnp.asarray(rng.uniform(-1, 1, (7, 3)), jnp.float32)
    auto = jax.vmap(jax.grad(lambda x: mixture.log_prob(x, m, sigma)))(a)
    np.testing.assert_allclose(mixture.score(a, m, sigma), auto, rtol=1e-4, atol=1e-4)


def test_mixture_score_matches_a_numerical_convolution(rng):
    mixture = random_mixture(rng, size=1)
    m, sigma = 0.7, 0.5
    a_0 = jnp.linspace(-3, 3, 4001)[:, None]
    a_t = jnp.asarray(rng.uniform(-1, 1, (5, 1)), jnp.float32)
    kernel = jnp.exp(-0.5 * (a_t - m * a_0.T) ** 2 / sigma**2)
    joint = kernel * jnp.exp(mixture.log_prob(a_0))
    clean = joint @ a_0 / joint.sum(1, keepdims=True)
    expected = (m * clean - a_t) / sigma**2
    np.testing.assert_allclose(mixture.score(a_t, m, sigma), expected, atol=1e-3)


def test_one_component_and_far_away_points_are_linear():
    one = GaussianMixture(jnp.array([[0.5, 0.0]]), jnp.array([3.0]), 0.1)
    a = jnp.array([[0.2, -0.4], [30.0, 40.0]])
    np.testing.assert_allclose(one.score(a), (one.means - a) / 0.01, rtol=1e-5)
    far = eight_gaussians().score(jnp.array([50.0, 0.0]))
    expected = (eight_gaussians().means[0] - jnp.array([50.0, 0.0])) / 0.15**2
    np.testing.assert_allclose(far, expected, rtol=1e-4, atol=1e-2)


def test_mixture_batches_agree_with_single_points(rng):
    mixture = random_mixture(rng)
    a = jnp.asarray(rng.uniform(-1, 1, (2, 3, 3)), jnp.float32)
    assert mixture.log_prob(a).shape == (2, 3)
    np.testing.assert_allclose(mixture.score(a)[1, 2], mixture.score(a[1, 2]), 1e-5)


def test_mixture_samples_have_the_weights_and_the_spread():
    mixture = eight_gaussians()
    n = 20_000
    a = mixture.sample(jax.random.key(0), n)
    square = jnp.sum((a[:, None] - mixture.means) ** 2, -1)
    counts = np.bincount(np.asarray(square.argmin(1)), minlength=8)
    share = np.array([2, 1] * 4) / 12
    # A few samples cross to a neighbour: the deviation is 0.28 of the distance.
    assert np.all(np.abs(counts / n - share) < 0.01 + 4 * np.sqrt(share / n))
    variance = mixture.std**2 + 0.25
    np.testing.assert_allclose(a.var(0), variance, rtol=0.05)


@pytest.mark.parametrize(
    "means, weights, std, message",
    [
        (jnp.zeros((2, 2)), jnp.array([1.0, 0.0]), 0.1, "weights > 0"),
        (jnp.zeros((2, 2)), jnp.array([1.0, -1.0]), 0.1, "weights > 0"),
        (jnp.zeros((2, 2)), jnp.array([1.0, jnp.nan]), 0.1, "weights > 0"),
        (jnp.zeros((2, 2)), jnp.ones(2), 0.0, "std > 0"),
        (jnp.zeros((2, 2)), jnp.ones(2), float("nan"), "std > 0"),
    ],
)
def test_bad_mixtures_are_refused(means, weights, std, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(means, weights, std)


def test_mixtures_can_be_built_while_tracing():
    score = jax.jit(lambda a: eight_gaussians().score(a))
    a = jnp.array([0.1, 0.2])
    np.testing.assert_allclose(score(a), eight_gaussians().score(a), rtol=1e-4)


def test_eight_modes_match_the_papers_formula(rng):
    def density(a):
        angles = 2 * np.pi * np.arange(8) / 8
        mu = np.sqrt(2) * np.stack([np.cos(angles), np.sin(angles)], -1)
        square = np.sum((a[..., None, :] - mu) ** 2, -1)
        return np.exp(-square / (2 * 0.3**2)) @ np.array([2, 1] * 4)

    near = np.linspace(-0.005, 0.005, 101)
    patch = np.stack(np.meshgrid(np.sqrt(2) + near, near), -1)
    top = density(patch).max()
    assert top > density(np.array([np.sqrt(2), 0.0]))
    a = rng.uniform(-1, 1, (500, 2))
    ours = eight_modes()(jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(ours, density(2 * a) / top, atol=2e-5)


def test_normalised_density_finds_a_peak_between_components():
    # Two components closer than two deviations: one peak, halfway.
    means = jnp.array([[-0.1, 0.0], [0.1, 0.0]])
    reward = normalised_density(GaussianMixture(means, jnp.ones(2), 0.2))
    assert reward(means[0]) < 0.999
    assert np.isclose(reward(jnp.zeros(2)), 1, atol=2e-4)


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_lie_in_the_unit_interval_and_reach_one(name):
    reward = REWARDS[name]()
    image = reward(box_grid(201))
    assert image.shape == (201, 201)
    assert float(image.min()) >= 0 and float(image.max()) <= 1
    assert float(image.max()) > 0.999
    border = jnp.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert float(border.max()) < 0.2


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_have_the_gradient_of_finite_differences(name, rng):
    reward = jax.jit(REWARDS[name]())
    a = jnp.asarray(rng.uniform(-0.9, 0.9, (50, 2)), jnp.float32)
    slope = jax.vmap(jax.grad(reward))(a)
    h = 2e-3
    for axis in range(2):
        shift = h * jnp.eye(2)[axis]
        central = (reward(a + shift) - reward(a - shift)) / (2 * h)
        np.testing.assert_allclose(slope[:, axis], central, atol=0.03)


def test_two_moons_are_a_uniform_arc_convolved_with_noise(rng):
    theta = np.pi * (np.arange(2000) + 0.5) / 2000
    arcs = np.concatenate(
        [
            np.stack([np.cos(theta), np.sin(theta)], -1),
            np.stack([1 - np.cos(theta), 0.5 - np.sin(theta)], -1),
        ]
    )
    a = rng.uniform(-1, 1, (200, 2))
    data = 2 * a + [0.5, 0.25]
    density = np.exp(-((data[:, None] - arcs) ** 2).sum(-1) / 0.02).mean(1)
    ours = two_moons()(jnp.asarray(a, jnp.float32))
    # Free up to one factor; at the tips 64 components are not a continuum.
    factor = density @ density / (density @ np.asarray(ours))
    np.testing.assert_allclose(density / factor, ours, atol=4e-3)
    # A half turn about the centre swaps the moons.
    turned = two_moons()(-jnp.asarray(a, jnp.float32))
    np.testing.assert_allclose(turned, ours, atol=1e-5)
    np.testing.assert_allclose(moon_gaussians().means.mean(0), 0, atol=1e-6)


def test_checkerboard_cells():
    centres = jnp.linspace(-0.6, 0.6, 4)
    board = checkerboard()(jnp.stack(jnp.meshgrid(centres, centres), -1))
    expected = (np.indices((4, 4)).sum(0) + 1) % 2
    np.testing.assert_allclose(board, expected, atol=1e-5)
    # Half of a filled cell's height at its edge, also where cells touch.
    edges = jnp.array([[-0.4, -0.6], [-0.8, -0.6], [0.0, 0.0]])
    np.testing.assert_allclose(checkerboard()(edges), 0.5, atol=1e-5)


def test_box_grid_holds_the_centres_of_cells():
    grid = box_grid(4)
    np.testing.assert_allclose(grid[0, :, 0], [-0.75, -0.25, 0.25, 0.75])
    np.testing.assert_allclose(grid[:, 0, 1], [-0.75, -0.25, 0.25, 0.75])


def test_boltzmann_samples_match_sums_over_a_grid():
    reward, n = eight_modes(), 20_000
    a = boltzmann_samples(lambda x: 5 * reward(x), jax.random.key(0), n)
    assert a.shape == (n, 2) and float(jnp.abs(a).max()) <= 1
    cells = box_grid(128).reshape(-1, 2)
    p = jax.nn.softmax(5 * reward(cells))
    values = reward(a)
    error = values.std() / np.sqrt(n)
    assert abs(values.mean() - p @ reward(cells)) < 4 * error
    error = a.std(0) / np.sqrt(n)
    assert np.all(np.abs(a.mean(0)) < 4 * error)
    again = boltzmann_samples(lambda x: 5 * reward(x), jax.random.key(0), n)
    np.testing.assert_array_equal(a, again)


def test_noise_is_independent_reproducible_and_of_its_size():
    clean, n = eight_modes(), 20_000
    noisy = gaussian_noise(clean, 0.5)
    a = jnp.full((n, 2), 0.3)
    first = noisy(a, jax.random.key(0)) - clean(a)
    second = noisy(a, jax.random.key(1)) - clean(a)
    assert abs(first.mean()) < 4 * 0.5 / np.sqrt(n)
    assert abs(first.std() - 0.5) < 4 * 0.5 / np.sqrt(2 * n)
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(n)
    np.testing.assert_array_equal(first, noisy(a, jax.random.key(0)) - clean(a))
    assert noisy(a[0], jax.random.key(0)).shape == ()


def test_bump_is_deterministic_and_has_its_height_and_width():
    clean = eight_modes()
    bump = gaussian_bump(clean, 0.8, 0.25)
    a = jnp.array([[0.0, 0.0], [0.25, 0.0], [0.0, -0.5]])
    expected = 0.8 * np.exp([0.0, -0.5, -2.0])
    np.testing.assert_allclose(bump(a) - clean(a), expected, atol=1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_bad_perturbations_are_refused(bad):
    with pytest.raises(ValueError, match="std > 0"):
        gaussian_noise(eight_modes(), bad)
    with pytest.raises(ValueError, match="width > 0"):
        gaussian_bump(eight_modes(), 1.0, bad)


def test_near_counts_within_half_a_paper_unit():
    points = np.array(TALL_MODES[1]) + np.array([[0.0, 0.24], [0.0, 0.26]])
    np.testing.assert_array_equal(near(points)[:, 1], [True, False])
    assert near(points).sum() == 1
    reward = eight_modes()
    np.testing.assert_allclose(reward(jnp.asarray(TALL_MODES)), 1, atol=0.01)
