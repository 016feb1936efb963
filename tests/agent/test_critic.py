"""The distributional critic: targets, loss, bound and lagging copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from som.agent.critic import Target, critic_loss, polyak, td_target, update_bound

KEY = jax.random.key(0)
SLOPES = jax.grad(critic_loss, (0, 1))


def arrays(*values):
    return [jnp.asarray(v, jnp.float32) for v in values]


def test_the_twin_with_the_smaller_mean_speaks_with_its_own_std():
    mean, std = arrays([[1.0, 2.0], [3.0, -1.0]], [[0.0, 9.0], [9.0, 0.0]])
    reward, discount = arrays([1.0, 2.0], [0.9, 0.5])
    target = td_target(KEY, reward, discount, mean, std)
    np.testing.assert_allclose(target.mean, [[1.9], [1.5]], rtol=1e-6)
    np.testing.assert_allclose(target.sample, [[1.9, 1.9], [1.5, 1.5]], rtol=1e-6)


def test_nothing_follows_a_terminal_step():
    mean, std, reward, discount = arrays([[5.0, 6.0]], [[1.0, 1.0]], [7.0], [0.0])
    target = td_target(KEY, reward, discount, mean, std)
    np.testing.assert_array_equal(target.mean, [[7.0]])
    np.testing.assert_array_equal(target.sample, [[7.0, 7.0]])


def test_samples_scatter_by_the_discounted_std_cut_at_three():
    n = 20_000
    one = jnp.ones((n, 2))
    zero = jnp.zeros(n)
    sample = td_target(KEY, zero, zero + 0.5, 0 * one, 2 * one).sample
    assert jnp.abs(sample).max() == pytest.approx(3.0)
    np.testing.assert_allclose(sample.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(sample.std(0), np.sqrt(0.995), rtol=0.02)
    assert abs(np.corrcoef(np.asarray(sample).T)[0, 1]) < 0.03


def test_gradient_by_hand():
    mean, std = arrays([[1.0, 0.0]], [[1.0, 0.5]])
    target = Target(*arrays([[2.0]], [[3.0, -9.0]]))
    (bound,) = arrays([2.0, 0.5])
    d_mean, d_std = SLOPES(mean, std, target, bound)
    # Twin 1: factor 4.1, gap 2 inside 6. Twin 2: factor .35, gap -9 cut to -1.5.
    expected_mean = [[-4.1 * 1 / 1.1, -0.35 * 2 / 0.35]]
    expected_std = [[-4.1 * (4 - 1) / 1.1, -0.35 * (2.25 - 0.25) / 0.225]]
    np.testing.assert_allclose(d_mean, expected_mean, rtol=1e-5)
    np.testing.assert_allclose(d_std, expected_std, rtol=1e-5)


def test_gradient_is_a_rescaled_gaussian_likelihood():
    rng = np.random.default_rng(0)
    mean, y = rng.normal(size=(2, 6, 2))
    std, y, bound = rng.uniform(0.3, 2, (6, 2)), y[:, :1], np.array([30.0, 50.0])
    ours = SLOPES(*arrays(mean, std), Target(*arrays(y, np.tile(y, 2))), *arrays(bound))

    def nll(m, s):
        return np.log(s) + (y - m) ** 2 / (2 * s**2)

    h = 1e-6
    d_mean = (nll(mean + h, std) - nll(mean - h, std)) / (2 * h)
    d_std = (nll(mean, std + h) - nll(mean, std - h)) / (2 * h)
    for power, got, likelihood in zip((2, 3), ours, (d_mean, d_std), strict=True):
        ratio = (bound**2 + 0.1) * std**power / (std**power + 0.1) / 6
        np.testing.assert_allclose(got, ratio * likelihood, rtol=1e-3, atol=1e-2)


def test_equal_std_gives_the_step_of_a_squared_error():
    mean, y = arrays([[0.0, 1.0], [2.0, 3.0]], [[1.0], [5.0]])
    bound = jnp.array([0.7, 1.3])
    d_mean, d_std = SLOPES(mean, jnp.tile(bound, (2, 1)), Target(y, mean), bound)
    np.testing.assert_allclose(d_mean, (mean - y) / 2, rtol=1e-5)
    assert jnp.all(d_std > 0)  # no surprise: the deviation shrinks


def test_no_gradient_reaches_the_target():
    mean, std = arrays([[1.0, 0.0]], [[1.0, 0.5]])
    target = Target(*arrays([[2.0]], [[1.5, -1.0]]))
    bound = jnp.ones(2)
    slopes = jax.grad(lambda y: critic_loss(mean, std, y, bound))(target)
    assert not np.any(slopes.mean) and not np.any(slopes.sample)


def test_first_batch_starts_the_bound_and_later_ones_move_it():
    std = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    first = update_bound(jnp.full(2, -9.0), std, 0.1, jnp.array(True))
    np.testing.assert_allclose(first, [2.0, 3.0])
    later = update_bound(first, 10 * std, 0.1, jnp.array(False))
    np.testing.assert_allclose(later, [0.9 * 2 + 2, 0.9 * 3 + 3], rtol=1e-6)
    assert not np.any(jax.jacobian(update_bound, 1)(first, std, 0.1, jnp.array(True)))


def test_polyak_mixes_every_leaf():
    target, online = {"a": jnp.zeros(2), "b": jnp.ones(1)}, {"a": jnp.ones(2), "b": 3.0}
    moved = polyak(target, online, 0.25)
    np.testing.assert_allclose(moved["a"], [0.25, 0.25])
    np.testing.assert_allclose(moved["b"], [1.5])
    np.testing.assert_array_equal(polyak(target, online, 0.0)["b"], target["b"])


def test_a_table_of_means_and_stds_learns_a_gaussian_return():
    """One state, rewards N(-1, 0.7^2): plain gradient descent finds both numbers."""
    rows = 64

    def loss(params, key):
        mean, std = (
            jnp.broadcast_to(p, (rows, 2))
            for p in (params[0], jax.nn.softplus(params[1]))
        )
        keys = jax.random.split(key)
        reward = -1 + 0.7 * jax.random.normal(keys[0], (rows,))
        target = td_target(keys[1], reward, jnp.zeros(rows), mean, std)
        bound = update_bound(jnp.ones(2), std, 1.0, jnp.array(True))
        return critic_loss(mean, std, target, bound)

    def step(params, key):
        slopes = jax.grad(loss)(params, key)
        params = jax.tree.map(lambda p, g: p - 0.05 * g, params, slopes)
        return params, params

    start = (jnp.zeros(2), jnp.zeros(2))
    path = jax.lax.scan(step, start, jax.random.split(KEY, 1500))[1]
    mean, std = (p[-500:].mean(0) for p in (path[0], jax.nn.softplus(path[1])))
    np.testing.assert_allclose(mean, -1, atol=0.05)
    np.testing.assert_allclose(std, 0.7, atol=0.04)
