"""QSM: Langevin steps against closed forms, the score's regression, a bandit."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import transitions

from som.agent.actor_critic import candidates, make_agent, q_value
from som.baselines.qsm import QSM, QSMConfig, langevin_path, step_sizes

TINY = QSMConfig(width=8, depth=1, batch_size=4, num_particles=3, num_steps=3)


def test_step_sizes_fall_on_a_line_and_stay_positive():
    np.testing.assert_allclose(step_sizes(4, 0.8), [0.8, 0.6, 0.4, 0.2], rtol=1e-6)


def test_two_steps_by_hand_clip_included():
    key, start = jax.random.PRNGKey(0), jnp.array([[2.0, -0.3]])
    kicks = [jax.random.normal(k, (1, 2)) for k in jax.random.split(key, 2)]
    a = np.asarray(start)
    for size, kick in zip((0.5, 0.1), kicks, strict=True):
        a = np.clip(a + size / 2 * (1 - 3 * a) + size**0.5 * np.asarray(kick), -1, 1)
    path = langevin_path(lambda a, _: 1 - 3 * a, start, jnp.array([0.5, 0.1]), key)
    assert path.shape == (3, 1, 2)
    np.testing.assert_array_equal(path[0], start)
    np.testing.assert_allclose(path[-1], a, atol=1e-6)
    always_up = langevin_path(lambda a, _: 100 + 0 * a, start, jnp.ones(5), key)
    np.testing.assert_array_equal(always_up[1:], jnp.ones((5, 1, 2)))


@pytest.mark.parametrize("product", [0.5, 2.0, 3.5])
def test_stationary_variance_of_a_bowl(product):
    """Var = 1 / (k (1 - delta k / 4)), and 1 / k for short steps."""
    k = 400.0
    sizes = jnp.full(150, product / k)
    start = jnp.zeros((4000, 1))
    walk = jax.jit(partial(langevin_path, lambda a, _: -k * a))
    path = walk(start, sizes, jax.random.PRNGKey(1))[50::10]
    np.testing.assert_allclose(path.var() * k, 1 / (1 - product / 4), rtol=0.06)


def test_beyond_the_limit_it_jumps_from_wall_to_wall():
    sizes = jnp.full(30, 8 / 400.0)
    start = jnp.full((50, 1), 0.5)
    path = langevin_path(lambda a, _: -400 * a, start, sizes, jax.random.PRNGKey(1))
    np.testing.assert_array_equal(jnp.abs(path[-2:]), jnp.ones((2, 50, 1)))
    np.testing.assert_array_equal(path[-1], -path[-2])


def test_path_with_and_without_jit():
    noise, key = jax.random.normal(jax.random.PRNGKey(2), (3, 2)), jax.random.PRNGKey(1)

    def path(key):
        return langevin_path(lambda a, _: -a, noise, step_sizes(4, 1.0), key)

    fast = jax.jit(path)(key)
    with jax.disable_jit():
        slow = path(key)
    np.testing.assert_allclose(fast, slow, atol=1e-6)


def test_score_is_regressed_on_the_slope_of_the_smaller_critic():
    agent = QSM(replace(TINY, activation="gelu", q_factor=3.0), 3, 2)
    state, batch = agent.init(jax.random.PRNGKey(0)), transitions(4)
    s, a = batch.observation, batch.action
    zero = jax.tree.map(jnp.zeros_like, state.policy)
    aim = np.zeros((4, 2))
    for axis, e in enumerate(0.01 * np.eye(2, dtype=np.float32)):
        up, down = (q_value(agent, state.critic, s, a + x) for x in (e, -e))
        aim[:, axis] = 3 * (up - down) / 0.02
    loss = agent.policy_loss(zero, state, batch, jax.random.PRNGKey(1))
    np.testing.assert_allclose(loss, np.mean(np.sum(aim**2, -1)), rtol=1e-2)
    last = max(zero["params"], key=lambda n: int(n.split("_")[1]))
    slope = jax.grad(agent.policy_loss)(zero, state, batch, jax.random.PRNGKey(1))
    bias = slope["params"][last]["bias"]
    np.testing.assert_allclose(bias, -2 * aim.mean(0), rtol=2e-2, atol=1e-4)


def test_walk_is_the_agents_and_exploring_adds_nothing():
    agent = QSM(TINY, 3, 2)
    state = agent.init(jax.random.PRNGKey(0))
    s, key = transitions(5).observation, jax.random.PRNGKey(1)
    k_noise, k_path = jax.random.split(key)
    noise = jax.random.normal(k_noise, (4, 5, 2))
    path = agent.transport(state.policy, noise, s, k_path)
    assert path.shape == (4, 4, 5, 2)
    drawn = candidates(agent, state.policy, s, key, 4)
    np.testing.assert_allclose(drawn, path[-1], atol=1e-6)
    plain, explored = (agent.act(state, s, key, explore) for explore in (False, True))
    np.testing.assert_array_equal(plain, explored)


def test_updates_are_finite_and_the_temperature_rests():
    agent = QSM(TINY, 3, 2)
    start = state = agent.init(jax.random.PRNGKey(0))
    for i in range(2):
        state, metrics = jax.jit(agent.update)(
            state, transitions(4), jax.random.PRNGKey(i)
        )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, metrics)))
    assert state.log_alpha == start.log_alpha
    for name in ("policy", "critic", "target_critic"):
        pair = (jax.tree.leaves(getattr(x, name)) for x in (start, state))
        assert any(not np.array_equal(*xy) for xy in zip(*pair, strict=True)), name


def test_profiles_and_bad_settings():
    paper, laptop, relax, bandit = (
        make_agent("qsm", 3, 2, p).config
        for p in ("paper", "laptop", "relax", "bandit")
    )
    assert paper == QSMConfig()
    assert (paper.width, paper.depth, paper.activation) == (256, 3, "relu")
    assert (paper.actor_lr, paper.critic_lr, paper.reward_scale) == (3e-4, 3e-4, 0.2)
    assert (paper.num_steps, paper.num_particles, paper.policy_delay) == (20, 32, 1)
    assert (paper.first_step, laptop.first_step) == (1.0, 0.1)
    assert relax == replace(paper, reward_scale=1.0)
    assert bandit.q_factor == 10
    with pytest.raises(ValueError, match="num_steps is 0; at least 1"):
        QSMConfig(num_steps=0)
    with pytest.raises(ValueError, match="a positive number is wanted"):
        QSMConfig(first_step=-1.0)
