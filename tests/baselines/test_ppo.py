"""PPO: its sums and its clip by hand, when it stops, and what it learns."""

from functools import partial

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from som.agent.actor_critic import make_agent
from som.agent.critic import Transition
from som.baselines.ppo import (
    PPO,
    PPOConfig,
    clipped_gain,
    discounted_sum,
    goes_on,
    improve_policy,
)
from som.training import environments, loop, replay
from som.training.policy import evaluate
from som.training.runs import train


class Broom(gym.Env):
    """Keep an unstable point within one of the origin, for 50 steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-0.5, 0.5, 1)
        return np.float32(self.state), {}

    def step(self, action):
        push = 0.2 * action + 0.1 * self.np_random.normal(size=1)
        self.state = 1.1 * self.state + push
        fallen = bool(abs(self.state[0]) > 1)
        return np.float32(self.state), 1.0, fallen, False, {}


gym.register("TestBroom-v0", entry_point=Broom, max_episode_steps=50)


def tiny(**changes):
    settings = {"width": 8, "depth": 1, "policy_steps": 10, "value_steps": 5}
    settings |= {"target_kl": 0.01} | changes
    return make_agent("ppo", 2, 1, **settings)


def chunk(agent, state, T=30, E=3, seed=0):
    """Steps of the state's policy in a task that sometimes ends."""
    keys = jax.random.split(jax.random.PRNGKey(seed), 3)
    s = jax.random.normal(keys[0], (T + 1, E, 2))
    a = agent.act(state, s[:-1], keys[1], True)
    ended = jax.random.bernoulli(keys[2], 0.1, (T, E)).astype(jnp.float32)
    reward = s[:-1, :, 0] * a[..., 0]
    return Transition(s[:-1], a, reward, ended, s[1:])


def same(one, two, **tolerance):
    for x, y in zip(*map(jax.tree.leaves, (one, two)), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


# Sums within episodes


def test_sum_by_hand():
    x = jnp.array([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])
    on = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    got = discounted_sum(x, on, 0.5)
    np.testing.assert_allclose(got, [[3.0, 1.0], [4.0, 4.0], [4.0, 4.0]])
    np.testing.assert_array_equal(discounted_sum(x, on, 0.0), x)


def test_sum_is_the_definition():
    rng, decay = np.random.default_rng(0), 0.9
    x, on = rng.normal(size=25), rng.uniform(size=25) < 0.8
    expected = []
    for t in range(25):
        end = next((k for k in range(t, 25) if not on[k]), 24)
        expected.append(sum(decay ** (k - t) * x[k] for k in range(t, end + 1)))
    got = discounted_sum(jnp.float32(x), jnp.float32(on), decay)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_an_episode_goes_on_where_the_next_row_begins_at_its_end():
    s = jnp.array([0.0, 1.0, 2.0, 5.0, 6.0])[:, None]
    after = jnp.array([1.0, 2.0, 3.0, 6.0, 7.0])[:, None]
    ended = jnp.array([1.0, 0.0, 0.0, 0.0, 0.0])  # a fall, even with no jump
    batch = Transition(s, s, ended, ended, after)
    np.testing.assert_array_equal(goes_on(batch), [0, 1, 0, 1, 0])


def test_ends_are_those_of_the_environments():
    envs = environments.make("TestBroom-v0", 4, seed=0)
    last, rows, ended = envs.reset(), [], []
    for _ in range(200):
        step = envs.step(-0.5 * last)
        row = last, last, step.reward, step.terminated, step.next_observation
        rows.append([np.float32(x) for x in row])
        ended.append(step.terminated | step.truncated)
        last = step.observation
    batch = Transition(*(jnp.stack(x) for x in zip(*rows, strict=True)))
    assert 0 < batch.terminated.sum() < np.sum(ended)
    np.testing.assert_array_equal(goes_on(batch)[:-1], 1 - np.array(ended)[:-1])


# The objective and its steps


def test_clip_by_hand():
    ratio = jnp.array([0.5, 1.0, 1.5, 0.5, 1.0, 1.5])
    advantage = jnp.array([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])
    gain = clipped_gain(ratio, advantage, 0.2)
    np.testing.assert_allclose(gain, [0.5, 1.0, 1.2, -0.8, -1.0, -1.5])


def test_log_prob_is_that_of_the_draw():
    agent, key = tiny(initial_log_std=0.3), jax.random.PRNGKey(1)
    state = agent.init(jax.random.PRNGKey(0))
    s = jax.random.normal(jax.random.PRNGKey(2), (200, 2))
    a, noise = agent.act(state, s, key, True), jax.random.normal(key, (200, 1))
    assert np.abs(a).max() > 1  # the environment clips, the row does not
    expected = np.sum(norm.logpdf(noise) - 0.3, -1)
    np.testing.assert_allclose(
        agent.log_prob(state.policy, s, a), expected, rtol=1e-4, atol=1e-5
    )
    mean = agent.mean(jax.tree.map(lambda x: 100 * x, state.policy), s)
    large = state._replace(policy=jax.tree.map(lambda x: 100 * x, state.policy))
    np.testing.assert_allclose(agent.act(large, s, key), np.clip(mean, -1, 1))
    assert np.abs(mean).max() > 1


def test_the_first_gradient_is_the_policy_gradient():
    agent = tiny(policy_steps=1, actor_lr=1e-3)
    state = agent.init(jax.random.PRNGKey(0))
    batch = chunk(agent, state)

    def gain(policy):
        log_prob = agent.log_prob(policy, batch.observation, batch.action)
        return jnp.mean(batch.reward * log_prob)

    gradient = jax.jit(jax.grad(gain))(state.policy)
    policy, _, steps, _ = jax.jit(partial(improve_policy, agent))(
        state.policy, state.policy_opt, batch, batch.reward
    )
    assert steps == 1
    moved = jax.tree.map(lambda new, old: new - old, policy, state.policy)
    for g, m in zip(*map(jax.tree.leaves, (gradient, moved)), strict=True):
        sure = np.abs(g) > 1e-4  # Adam's first step: the learning rate, uphill
        np.testing.assert_allclose(m[sure], 1e-3 * np.sign(g[sure]), rtol=2e-2)


def test_steps_stop_where_plain_python_stops():
    agent = tiny(actor_lr=1e-2)
    state = agent.init(jax.random.PRNGKey(0))
    batch = chunk(agent, state)
    run = jax.jit(partial(improve_policy, agent))
    policy, _, steps, kl = run(state.policy, state.policy_opt, batch, batch.reward)
    assert 1 < steps < 10 and kl > 0.015
    short = PPOConfig(
        width=8, depth=1, actor_lr=1e-2, policy_steps=int(steps) - 1, value_steps=1
    )
    one = jax.jit(partial(improve_policy, PPO(short, 2, 1)))(
        state.policy, state.policy_opt, batch, batch.reward
    )
    assert one[2] == steps - 1 and one[3] <= 0.015  # it was still near then
    old, new = (
        agent.log_prob(p, batch.observation, batch.action)
        for p in (state.policy, policy)
    )
    np.testing.assert_allclose(kl, np.mean(old - new), rtol=1e-3)


def test_each_seed_stops_for_itself():
    agent = tiny(actor_lr=1e-2, policy_steps=20)
    states = [agent.init(jax.random.PRNGKey(i)) for i in range(3)]
    chunks = [chunk(agent, s, seed=i) for i, s in enumerate(states)]
    stack = partial(jax.tree.map, lambda *x: jnp.stack(x))
    together = stack(*states)._replace(step=states[0].step)
    axes = loop.seed_axes(together)
    update = jax.vmap(agent.update, (axes, 0, None), (axes, 0))
    key = jax.random.PRNGKey(0)
    both, metrics = jax.jit(update)(together, stack(*chunks), key)
    assert both.step == 1 and len(set(np.asarray(metrics["policy/steps"]))) > 1
    for i, (state, batch) in enumerate(zip(states, chunks, strict=True)):
        alone, numbers = jax.jit(agent.update)(state, batch, key)
        for name, value in numbers.items():
            np.testing.assert_allclose(metrics[name][i], value, rtol=1e-3, atol=1e-4)
        pick = jax.tree.map(lambda x, i=i: x[i], both._replace(step=()))
        same(pick, alone._replace(step=()), rtol=1e-3, atol=1e-4)


# The update


@pytest.mark.parametrize("discount", [0.0, 0.99])
def test_update_learns_the_rewards_to_go(discount):
    agent = tiny(discount=discount, reward_scale=2.0, value_steps=300, value_lr=1e-2)
    state = agent.init(jax.random.PRNGKey(0))
    batch = chunk(agent, state)
    value, after = (
        agent.values(state.value, s)
        for s in (batch.observation, batch.next_observation)
    )
    total = np.zeros((31, 3))
    total[30] = after[-1]
    for t in reversed(range(30)):
        follows = discount * (1 - batch.terminated[t])
        total[t] = 2 * batch.reward[t] + follows * total[t + 1]
    new, metrics = jax.jit(agent.update)(state, batch, jax.random.PRNGKey(0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((new, metrics)))
    np.testing.assert_allclose(metrics["value/mean"], total[:30].mean(), rtol=1e-3)
    learned = agent.values(new.value, batch.observation)
    before, now = (np.mean((v - total[:30]) ** 2) for v in (value, learned))
    assert now < 0.8 * before


def test_equal_advantages_are_no_trouble():
    agent = tiny(discount=0.0)
    state = agent.init(jax.random.PRNGKey(0))
    batch = chunk(agent, state)
    zero = jnp.zeros_like(batch.observation)
    batch = batch._replace(
        observation=zero, next_observation=zero, reward=1 + 0 * batch.reward
    )
    new, metrics = jax.jit(agent.update)(state, batch, jax.random.PRNGKey(0))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((new, metrics)))


def test_profiles_hold_the_papers_values():
    paper = PPO.profiles["paper"]
    assert (paper.width, paper.depth, paper.activation) == (512, 3, "gelu")
    assert (paper.discount, paper.trace, paper.clip) == (0.995, 0.95, 0.2)
    assert (paper.actor_lr, paper.value_lr, paper.target_kl) == (1e-4, 1e-3, 0.01)
    assert (paper.policy_steps, paper.value_steps) == (80, 80)
    assert paper.reward_scale == 1
    up = PPO.profiles["spinningup"]
    assert (up.width, up.depth, up.activation) == (64, 2, "tanh")
    assert (up.discount, up.trace, up.actor_lr) == (0.99, 0.97, 3e-4)
    for name, rows in [("paper", 4000), ("laptop", 500), ("spinningup", 4000)]:
        schedule = loop.schedule(PPO, name)
        assert schedule.warmup == 0
        assert schedule.vector_steps * schedule.num_envs == rows


@pytest.mark.parametrize("name", ["width", "depth", "policy_steps", "value_steps"])
def test_settings_refuse(name):
    with pytest.raises(ValueError, match=f"^{name} is 0; at least 1 is wanted$"):
        PPOConfig(**{name: 0})


# In the loop

RUN = {"width": 32}


def test_a_chunk_is_made_by_the_state_that_learns_from_it():
    config = loop.make_config("ppo", "TestBroom-v0", 1000, (0,), "laptop", RUN)
    trainer = loop.Trainer(config)
    buffer = trainer.empty_buffer()
    for number in range(2):
        before = trainer.state
        buffer, metrics = loop.run_chunk(trainer, buffer)
        rows = jnp.asarray(trainer.rows).reshape(1, 100, 5, -1)
        batch = replay.unpack(rows, 1)
        key = loop.fold(trainer.key(loop.ACT, number), 0)
        seen = batch.observation[:, 0]
        acted = loop.act(trainer.agent, before, seen, key, True)
        np.testing.assert_array_equal(acted, batch.action[:, 0])
        assert metrics["policy/steps"][0] >= 1
    assert trainer.state.step == 2 and int(buffer.added[0]) == 0


def test_balances_a_broom():
    run = train("ppo", "TestBroom-v0", steps=5_000, seeds=(0,), evaluations=1, **RUN)
    final = np.mean(run.record["curve"][-1]["returns"])
    assert final > 35, final  # doing nothing lasts about 18 steps, 50 is all
    again = evaluate(run.policy, "TestBroom-v0", 3, seed=5)
    np.testing.assert_array_equal(
        again, evaluate(run.policy, "TestBroom-v0", 3, seed=5)
    )
