"""DIPO: guides that climb, are written back and imitated; a bandit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import transitions

from som.agent.actor_critic import candidates, make_agent, q_value
from som.agent.critic import Transition
from som.baselines.diffusion import cosine_schedule, linear_schedule
from som.baselines.dipo import DIPO, DIPOConfig, climb, denoising_error, guide_of
from som.training import loop, replay

TINY = {"width": 8, "depth": 1, "num_steps": 3, "batch_size": 4}
BEST = jnp.array([0.4, -0.3])


def tiny(**options):
    return make_agent("dipo", 3, 2, **TINY | options)


def bowl(a):
    return -10 * jnp.sum((a - BEST) ** 2, -1)


def test_first_step_is_one_step_size_along_every_axis():
    start = jnp.array([[0.0, 0.0], [0.9, 0.9]])
    moved = climb(bowl, start, 1, 0.03, 0.2)
    by_hand = [[0.03, -0.03], [-0.03, -0.03]]
    np.testing.assert_allclose(moved - start, by_hand, atol=1e-4)


def test_two_steps_by_hand_with_the_norm_of_the_whole_batch():
    start, max_norm = np.array([[0.0, 0.0], [0.9, 0.9]]), 0.5
    a, mean, square = start.copy(), 0.0, 0.0
    for i in (1, 2):
        slope = 20 * (a - np.asarray(BEST))
        slope *= min(1, max_norm / np.linalg.norm(slope))
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        size = np.sqrt(square / (1 - 0.999**i)) + 1e-5
        a = a - 0.1 * mean / (1 - 0.9**i) / size
    got = climb(bowl, jnp.asarray(start, jnp.float32), 2, 0.1, max_norm)
    np.testing.assert_allclose(got, a, atol=1e-5)


def test_all_rise_and_find_the_maximum_in_three_visits():
    start = jax.random.uniform(jax.random.PRNGKey(0), (64, 2), minval=-1, maxval=1)
    visit = jax.jit(partial(climb, bowl, num_steps=30, step_size=0.03, max_norm=0.2))
    once = visit(start)
    assert np.all(bowl(once) > bowl(start))
    assert np.abs(visit(visit(once)) - BEST).max() < 0.02


def test_guides_stay_in_the_box():
    edge = climb(lambda a: 5 * a[:, 0] + a[:, 1], jnp.full((3, 2), 0.9), 30, 0.03, 0.2)
    np.testing.assert_array_equal(edge, jnp.ones((3, 2)))


def test_revise_starts_from_the_guide_or_else_from_the_action():
    agent, batch = tiny(), transitions(4)
    state = agent.init(jax.random.PRNGKey(0))
    revise = jax.jit(agent.revise)
    fresh = revise(state, batch)
    same = revise(state, batch._replace(guide=batch.action))
    np.testing.assert_allclose(fresh.guide, same.guide, atol=1e-6)
    on = revise(state, fresh)
    np.testing.assert_array_equal(on.action, batch.action)
    q = partial(q_value, agent, state.critic, batch.observation)
    assert q(batch.action).mean() < q(fresh.guide).mean() < q(on.guide).mean()
    np.testing.assert_array_equal(guide_of(batch), batch.action)
    np.testing.assert_array_equal(guide_of(on), on.guide)


def test_policy_imitates_guides_and_critic_values_actions():
    agent, batch, key = tiny(), transitions(4), jax.random.PRNGKey(1)
    state = jax.jit(agent.init)(jax.random.PRNGKey(0))
    batch = batch._replace(guide=batch.action)
    guided = batch._replace(guide=-batch.action)
    policy_loss = jax.jit(agent.policy_loss)
    loss, other = (policy_loss(state.policy, state, b, key) for b in (guided, batch))
    rows = denoising_error(agent, state.policy, batch.observation, -batch.action, key)
    np.testing.assert_allclose(loss, rows.mean(), rtol=1e-5)
    assert rows.shape == (4,) and loss != other
    update = jax.jit(agent.update)
    plain, with_guides = (update(state, b, key)[0] for b in (batch, guided))
    critics = map(jax.tree.leaves, (plain.critic, with_guides.critic))
    for x, y in zip(*critics, strict=True):
        np.testing.assert_array_equal(x, y)
    x, y = (jax.tree.leaves(s.policy) for s in (plain, with_guides))
    assert any(not np.array_equal(*pair) for pair in zip(x, y, strict=True))
    assert plain.log_alpha == state.log_alpha


def test_bellman_target_takes_one_sample_of_the_lagging_policy():
    agent, s, key = tiny(), transitions(5).observation, jax.random.PRNGKey(1)
    state = agent.init(jax.random.PRNGKey(0))
    state = state._replace(policy=jax.tree.map(jnp.zeros_like, state.policy))
    drawn = candidates(agent, state.target_policy, s, key, 1)[0]
    np.testing.assert_allclose(agent.next_action(state, s, key), drawn, atol=1e-6)
    acted = agent.act(state, s, key)
    online = candidates(agent, state.policy, s, jax.random.split(key)[0], 1)[0]
    np.testing.assert_allclose(acted, online, atol=1e-6)
    np.testing.assert_array_equal(acted, agent.act(state, s, key, True))


def test_the_loop_writes_the_guides_of_the_drawn_rows_and_only_those():
    agent, rng = tiny(), np.random.default_rng(0)
    batch = Transition(
        rng.normal(size=(12, 3)), rng.uniform(-1, 1, (12, 2)), rng.normal(size=12),
        np.zeros(12), rng.normal(size=(12, 3)),
    )  # fmt: skip
    before = replay.pack(batch._replace(guide=batch.action))
    state, keys = loop.init_seeds(agent, (0,)), jax.random.PRNGKey(7)[None]
    empty = jax.tree.map(lambda x: x[None], replay.init(20, 3, 2, guided=True))
    _, buffer, _ = loop.learn(agent, state, empty, before[None], keys, 1)
    after = np.asarray(buffer.rows[0, :12])
    filled = replay.Replay(jnp.asarray(before), jnp.int32(12))
    drawn = replay.draw(filled, jax.random.split(loop.fold(keys, 0)[0])[0], 4)
    changed = np.flatnonzero(np.any(after != before, 1))
    assert set(changed) == set(np.asarray(drawn).tolist())
    np.testing.assert_array_equal(after[:, :-2], before[:, :-2])
    one = jax.tree.map(lambda x: x[0], state._replace(step=()))
    rows = replay.unpack(jnp.asarray(before)[drawn], 2, True)
    revised = jax.jit(agent.revise)(one, rows)
    np.testing.assert_allclose(after[drawn, -2:], revised.guide, atol=1e-4)


def test_profiles_and_schedules():
    paper, laptop, relax, official = (
        make_agent("dipo", 3, 2, p) for p in ("paper", "laptop", "relax", "official")
    )
    config = paper.config
    assert config == DIPOConfig() and DIPO.rewrites
    assert (config.width, config.depth, config.activation) == (256, 3, "mish")
    assert (config.actor_lr, config.critic_lr, config.reward_scale) == (3e-4, 3e-4, 0.2)
    assert (config.num_steps, config.num_gradient_steps) == (100, 30)
    assert (config.num_particles, config.policy_delay) == (1, 1)
    np.testing.assert_array_equal(paper.schedule.beta, linear_schedule(100, 0.3).beta)
    np.testing.assert_array_equal(laptop.schedule.beta, cosine_schedule(10).beta)
    assert (relax.config.activation, relax.config.reward_scale) == ("relu", 1.0)
    np.testing.assert_array_equal(official.schedule.beta, cosine_schedule(100).beta)
    assert loop.schedule(DIPO, "paper").warmup == 30_000
    assert loop.schedule(DIPO, "official").updates_per_step == 1.0
    with pytest.raises(ValueError, match="num_gradient_steps is 0; at least 1"):
        DIPOConfig(num_gradient_steps=0)
