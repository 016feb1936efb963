"""MFP: its path and losses against closed forms, and what the agent learns."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import transitions

from som.agent.actor_critic import candidates, make_agent
from som.baselines.mfp import MFP, MFPConfig, path, row_loss

TINY = MFPConfig(width=8, depth=1, batch_size=4, num_particles=3)
A_STAR = jnp.array([0.5, -0.2])


def to_the_point(a, r, t):
    return (a - A_STAR) / t


def test_path_is_straight_from_noise_to_action():
    noise = jnp.array([1.0, 2.0])
    points = [path(A_STAR, noise, t) for t in (0.0, 0.25, 1.0)]
    np.testing.assert_allclose(points[0][0], A_STAR)
    np.testing.assert_allclose(points[1][0], [0.625, 0.35], rtol=1e-6)
    np.testing.assert_allclose(points[2][0], noise)
    for _, v in points:
        np.testing.assert_allclose(v, noise - A_STAR)


def test_row_loss_by_hand():
    # u = c a + d t: v = e - a*, du/dt = c v + d, both written out.
    c, d, e = 0.3, 0.7, np.array([1.0, -0.5])
    r, t, weight = 0.2, 0.6, 0.5
    a_star = np.asarray(A_STAR)
    a_t, v = 0.4 * a_star + 0.6 * e, e - a_star
    u = c * a_t + d * t
    identity = np.sum((u - (v - (t - r) * (c * v + d))) ** 2)
    expected = identity + weight * np.sum((u - v) ** 2)
    got = row_loss(
        lambda a, r, t: c * a + d * t,
        A_STAR,
        jnp.asarray(e, jnp.float32),
        jnp.float32(r),
        jnp.float32(t),
        weight,
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_target_is_a_constant_of_the_loss():
    # For u = p the loss is |p - sg[v]|^2 (1 + lambda): its gradient is 4 (p - v).
    p, e = jnp.array([0.1, 0.2]), jnp.array([1.0, 0.0])
    r, t = jnp.float32(0.1), jnp.float32(0.7)

    def loss(p):
        return row_loss(lambda a, r, t: p, A_STAR, e, r, t, 1.0)

    np.testing.assert_allclose(jax.grad(loss)(p), 4 * (p - (e - A_STAR)), rtol=1e-5)


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_one_point_has_zero_loss_and_only_the_constraint_sees_a_constant(t):
    r, t, noise = jnp.float32(0.1), jnp.float32(t), jnp.array([0.7, -1.3])

    def shifted(a, r, t):
        return to_the_point(a, r, t) + 0.3 / jnp.maximum(t - r, 0.01)

    one = partial(row_loss, a_star=A_STAR, noise=noise, r=r, t=t)
    assert one(to_the_point, ivc_weight=1.0) < 1e-9
    assert one(shifted, ivc_weight=0.0) < 1e-8
    np.testing.assert_allclose(one(shifted, ivc_weight=1.0), 1800, rtol=1e-3)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_updates_are_finite_and_move_what_learns(weight):
    agent = MFP(replace(TINY, ivc_weight=weight), 3, 2)
    start = state = agent.init(jax.random.PRNGKey(0))
    for i in range(2):
        state, metrics = jax.jit(agent.update)(
            state, transitions(4), jax.random.PRNGKey(i)
        )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, metrics)))
    for name in ("policy", "critic", "target_policy", "target_critic"):
        pairs = zip(
            jax.tree.leaves(getattr(start, name)),
            jax.tree.leaves(getattr(state, name)),
            strict=True,
        )
        assert any(not np.array_equal(x, y) for x, y in pairs), name
    assert state.log_alpha == start.log_alpha


def test_one_step_and_no_noise_when_exploring():
    agent = MFP(TINY, 3, 2)
    state = agent.init(jax.random.PRNGKey(0))
    s, key = transitions(5).observation, jax.random.PRNGKey(1)
    noise = jax.random.normal(jax.random.split(key)[0], (4, 5, 2))
    zero, one = jnp.zeros(()), jnp.ones(())
    by_hand = noise - agent.policy_net.apply(state.policy, noise, zero, one, s)
    drawn = candidates(agent, state.policy, s, key, 4)
    np.testing.assert_allclose(drawn, jnp.clip(by_hand, -1, 1), atol=1e-6)
    plain, explored = (agent.act(state, s, key, explore) for explore in (False, True))
    np.testing.assert_array_equal(plain, explored)


def test_profiles_hold_the_papers_values():
    paper = make_agent("mfp", 3, 2, profile="paper").config
    assert (paper.width, paper.depth, paper.activation) == (256, 3, "gelu")
    assert (paper.actor_lr, paper.critic_lr) == (1e-4, 1e-4)
    assert (paper.num_particles, paper.batch_size) == (32, 256)
    assert not paper.distributional and paper.ivc_weight == 1.0
    laptop = make_agent("mfp", 3, 2).config
    assert (laptop.width, laptop.batch_size, laptop.num_particles) == (128, 128, 16)
