"""Four targets of the average velocity: fixed points, open ends, learning."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from som.theory.meanflow import (
    correction_target,
    lagrangian_target,
    one_step,
    semigroup_target,
    target,
)
from som.theory.probability_flow import integrate, velocity
from som.theory.sde import VP

WIDTH = 0.3
SDE = VP(0.1, 6.0)


def spread(t):
    return jnp.sqrt((SDE.mean(t) * WIDTH) ** 2 + SDE.std(t) ** 2)


def exact_v(a, t):
    return velocity(-a / spread(t) ** 2, a, t, SDE)


def exact_u(a, r, t):
    return a * (1 - spread(r) / spread(t)) / (t - r)


def rough_u(a, r, t):
    """Some smooth function that is the average velocity of no flow."""
    return jnp.sin(a) * (1 + r * t) + jnp.roll(a, 1) * t**2


@pytest.fixture(scope="module")
def batch():
    keys = jax.random.split(jax.random.key(0), 2)
    r, t = jnp.sort(jax.random.uniform(keys[0], (2, 64)), axis=0)
    return jax.random.normal(keys[1], (64, 2)), 0.9 * r, t


def three_targets(u, v, a, r, t):
    return {
        "eulerian": target(u, v(a, t), a, r, t),
        "semigroup": semigroup_target(u, a, r, 0.6 * r + 0.4 * t, t),
        "lagrangian": lagrangian_target(u, v, a, r, t),
    }


def test_the_true_average_velocity_is_its_own_target(batch):
    found = jax.jit(jax.vmap(partial(three_targets, exact_u, exact_v)))(*batch)
    expected = jax.vmap(exact_u)(*batch)
    for name, values in found.items():
        np.testing.assert_allclose(values, expected, rtol=2e-3, atol=2e-4, err_msg=name)


def test_targets_of_another_function_are_not_that_function(batch):
    found = jax.jit(jax.vmap(partial(three_targets, rough_u, exact_v)))(*batch)
    here = jax.vmap(rough_u)(*batch)
    for name, values in found.items():
        assert jnp.abs(values - here).max() > 0.1, name


def test_derivatives_agree_with_finite_differences(batch):
    a, r, t = (x[:8] for x in batch)
    h = 1e-2
    v = jax.vmap(exact_v)(a, t)
    u = jax.vmap(rough_u)
    along = (u(a + h * v, r, t + h) - u(a - h * v, r, t - h)) / (2 * h)
    interval = (t - r)[:, None]
    np.testing.assert_allclose(
        jax.vmap(partial(target, rough_u))(v, a, r, t),
        v - interval * along,
        rtol=1e-2,
        atol=1e-2,
    )
    end = a - interval * u(a, r, t)
    du_dr = (u(a, r + h, t) - u(a, r - h, t)) / (2 * h)
    np.testing.assert_allclose(
        jax.vmap(partial(lagrangian_target, rough_u, exact_v))(a, r, t),
        jax.vmap(exact_v)(end, r) + interval * du_dr,
        rtol=1e-2,
        atol=1e-2,
    )


def test_the_semigroup_target_ends_where_two_jumps_end(batch):
    a, r, t = (x[0] for x in batch)
    s = 0.5 * (r + t)
    middle = a - (t - s) * rough_u(a, s, t)
    end = middle - (s - r) * rough_u(middle, r, s)
    found = a - (t - r) * semigroup_target(rough_u, a, r, s, t)
    np.testing.assert_allclose(found, end, rtol=1e-5, atol=1e-6)


def test_anchors_are_the_velocity():
    a, t = jnp.array([0.3, -1.2]), jnp.array(0.7)
    v = exact_v(a, t)
    np.testing.assert_allclose(target(rough_u, v, a, t, t), v)
    np.testing.assert_allclose(lagrangian_target(rough_u, exact_v, a, t, t), v)


def test_the_identity_leaves_a_function_of_the_end_open(batch):
    def shifted(a, r, t):
        end = a * spread(r) / spread(t)
        return exact_u(a, r, t) + jnp.sin(3 * end) / (t - r)

    a, r, t = batch
    v = jax.vmap(exact_v)(a, t)
    value = jax.vmap(shifted)(a, r, t)
    found = jax.vmap(partial(target, shifted))(v, a, r, t)
    assert (jnp.abs(found - value) / (1 + jnp.abs(value))).max() < 1e-3
    assert jnp.abs(value - jax.vmap(exact_u)(a, r, t)).max() > 0.5


def test_the_lagrangian_leaves_a_function_of_the_start_open(batch):
    def shifted(a, r, t):
        return (a - (a + 0.3) * spread(r) / spread(t)) / (t - r)

    value = jax.vmap(shifted)(*batch)
    found = jax.vmap(partial(lagrangian_target, shifted, exact_v))(*batch)
    assert (jnp.abs(found - value) / (1 + jnp.abs(value))).max() < 1e-3
    assert jnp.abs(value - jax.vmap(exact_u)(*batch)).max() > 0.3


def test_no_gradient_flows_through_a_target():
    a, r, s, t = jnp.array([0.5]), jnp.array(0.2), jnp.array(0.4), jnp.array(0.9)

    def total(scale):
        def u(a, r, t):
            return scale * rough_u(a, r, t)

        return jnp.sum(
            target(u, exact_v(a, t), a, r, t)
            + semigroup_target(u, a, r, s, t)
            + lagrangian_target(u, exact_v, a, r, t)
        )

    assert jax.grad(total)(1.3) == 0
    assert total(1.3) != total(1.4)


def test_one_step_is_the_end_of_the_flow():
    noise = jnp.array([1.0, -0.4])
    end = jax.jit(lambda a: integrate(exact_v, a, 200))(noise)
    np.testing.assert_allclose(one_step(exact_u, noise), end, atol=1e-3)


@pytest.mark.parametrize("kind", ["eulerian", "lagrangian"])
def test_a_small_network_learns_the_one_step_map(kind):
    """The one-step action of N(0, 0.3^2) is the noise times 0.3 / s_1."""
    sizes = [3, 32, 32, 1]

    def u(layers, a, r, t):
        h = jnp.concatenate([a, jnp.stack([t, t - r])])
        for weights, bias in layers[:-1]:
            h = jax.nn.gelu(h @ weights + bias)
        return h @ layers[-1][0] + layers[-1][1]

    def one(layers, a, r, t):
        here = partial(u, layers)
        if kind == "eulerian":
            return target(here, exact_v(a, t), a, r, t)
        return lagrangian_target(here, exact_v, a, r, t)

    def loss(layers, a, r, t):
        wanted = jax.vmap(one, (None, 0, 0, 0))(layers, a, r, t)
        got = jax.vmap(u, (None, 0, 0, 0))(layers, a, r, t)
        return jnp.mean((got - wanted) ** 2)

    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 1500))

    def update(carry, key):
        layers, state = carry
        keys = jax.random.split(key)
        a = 1.5 * jax.random.normal(keys[0], (64, 1))
        r, t = jnp.sort(jax.random.uniform(keys[1], (2, 64)), axis=0)
        r = jnp.where(jnp.arange(64) < 16, t, r)
        step, state = optimizer.update(jax.grad(loss)(layers, a, r, t), state)
        return (optax.apply_updates(layers, step), state), None

    keys = jax.random.split(jax.random.key(0), 3)
    layers = [
        (jax.random.normal(k, (i, o)) / np.sqrt(i), jnp.zeros(o))
        for k, i, o in zip(keys, sizes, sizes[1:], strict=False)
    ]
    noise = jnp.linspace(-2, 2, 41)[:, None]
    exact = noise * WIDTH / spread(1.0)

    @jax.jit
    def run(layers):
        keys = jax.random.split(jax.random.key(1), 1500)
        layers, _ = jax.lax.scan(update, (layers, optimizer.init(layers)), keys)
        return layers[0]

    def error(layers):
        ends = jax.vmap(partial(one_step, partial(u, layers)))(noise)
        return float(jnp.abs(ends - exact).mean())

    before, after = error(layers), error(run(layers))
    assert after < 0.1 < before, (before, after)


@pytest.fixture(scope="module")
def starts():
    keys = jax.random.split(jax.random.key(5), 2)
    s = jax.random.uniform(keys[0], (64,), minval=0.05, maxval=0.5)
    return jax.random.normal(keys[1], (64, 2)), s


def corrected(u, starts, num_steps, v=exact_v):
    one = partial(correction_target, u, v, num_steps=num_steps)
    return jax.jit(jax.vmap(one))(*starts)


def test_the_correction_of_the_true_map_is_off_by_the_error_of_euler(starts):
    exact = jax.vmap(lambda a: exact_u(a, 0.0, 1.0))(starts[0])
    error = [jnp.abs(corrected(exact_u, starts, n) - exact).mean() for n in (16, 32)]
    assert error[1] < 0.01
    np.testing.assert_allclose(error[0] / error[1], 2, rtol=0.15)


def test_the_correction_by_hand(starts):
    found = corrected(rough_u, starts, 2)
    for i in range(3):
        a, s = starts[0][i], starts[1][i]
        x = a - (1 - s) * rough_u(a, s, 1.0)
        x = x - s / 2 * exact_v(x, s)
        x = x - s / 2 * exact_v(x, s / 2)
        np.testing.assert_allclose(found[i], a - x, rtol=1e-4, atol=1e-5)


def test_the_correction_shrinks_an_error_as_the_flow_does(starts):
    def off(a, r, t):
        return exact_u(a, r, t) - 0.1 / (t - r)

    moved = corrected(exact_u, starts, 32) - corrected(off, starts, 32)
    factor = WIDTH / jax.vmap(spread)(starts[1])[:, None]
    np.testing.assert_allclose(moved, 0.1 * factor + 0 * moved, atol=4e-3)
    assert moved.max() < 0.1


def test_the_correction_believes_a_wrong_start(starts):
    def u(a, r, t):
        return (a - (a + 0.3) * spread(r) / spread(t)) / (t - r)

    wrong = jax.vmap(lambda a: u(a, 0.0, 1.0))(starts[0])
    np.testing.assert_allclose(corrected(u, starts, 32), wrong, atol=0.03)
    exact = jax.vmap(lambda a: exact_u(a, 0.0, 1.0))(starts[0])
    assert jnp.abs(wrong - exact).min() > 0.05


def test_no_gradient_flows_through_the_correction():
    def loss(scale):
        def u(a, r, t):
            return scale * rough_u(a, r, t)

        return correction_target(u, exact_v, jnp.ones(2), jnp.float32(0.3)).sum()

    assert jax.grad(loss)(1.5) == 0
