"""The joint pass: one batch, shared statistics, and what agents make of it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import transitions

from som.agent.actor_critic import AGENTS, critic_step, make_agent, q_value
from som.agent.batch_norm import joint_pass
from som.agent.networks import Critic
from som.baselines.nclql import NCLQL

NET = Critic(8, 2, batch_norm=True)
TINY = {"width": 8, "depth": 2, "batch_norm": True}


def pairs(seed, num=6):
    s, a = jax.random.normal(jax.random.PRNGKey(seed), (2, num, 3))
    return 5 * s + 1, jnp.tanh(a[:, :2])


def test_statistics_are_those_of_both_pairs():
    now, after = pairs(0), pairs(1)
    critic = NET.init(jax.random.PRNGKey(2), now[0][0], now[1][0])
    *_, stats = joint_pass(NET, critic, now, after)
    first = stats["batch_stats"]["VmapMLP_0"]["BatchNorm_0"]
    both = np.concatenate([now[0], after[0]])
    for twin in range(2):
        np.testing.assert_allclose(
            first["mean"][twin], 0.01 * both.mean(0), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(
            first["var"][twin], 0.99 + 0.01 * both.var(0), rtol=1e-4
        )


def test_first_layer_by_hand():
    """A network of one layer: normalise, multiply, bend, normalise, multiply."""
    net = Critic(4, 1, "relu", batch_norm=True)
    now, after = pairs(0), pairs(1)
    critic = net.init(jax.random.PRNGKey(2), now[0][0], now[1][0])
    (mean, _), (next_mean, _), _ = joint_pass(net, critic, now, after)
    s, a = (np.concatenate(x) for x in zip(now, after, strict=True))

    def even(x):
        return (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-3)

    own = critic["params"]["VmapMLP_0"]
    for twin in range(2):
        w_s, w_a, w = (own[f"Dense_{i}"]["kernel"][twin] for i in range(3))
        h = even(s) @ w_s + even(a) @ w_a
        out = even(np.maximum(h, 0)) @ w
        np.testing.assert_allclose(mean[:, twin], out[:6, 0], atol=1e-4)
        np.testing.assert_allclose(next_mean[:, twin], out[6:, 0], atol=1e-4)


@pytest.mark.parametrize("lagging", [True, False])
def test_the_target_is_the_lagging_critic_or_todays(lagging):
    """The scalar loss, put together again from the two passes."""
    agent = make_agent(
        "som", 3, 2, **TINY, distributional=False, lagging_critic=lagging,
        target_particles=1, num_samples=4,
    )  # fmt: skip
    state = agent.init(jax.random.PRNGKey(0))
    other = agent.init(jax.random.PRNGKey(5)).critic
    state = state._replace(target_critic=other)
    batch, key = transitions(6), jax.random.PRNGKey(1)
    critic, _, _, metrics = critic_step(agent, state, batch, key)
    k_next = jax.random.split(key)[0]
    a = agent.next_action(state, batch.next_observation, k_next)
    now, after = (batch.observation, batch.action), (batch.next_observation, a)
    net = agent.critic_net
    (mean, _), (todays, _), stats = joint_pass(net, state.critic, now, after)
    (_, _), (lagged, _), _ = joint_pass(net, other, now, after)
    next_q = (lagged if lagging else todays).min(-1)
    target = batch.reward + 0.99 * (1 - batch.terminated) * next_q
    by_hand = np.sum(np.mean((mean - target[:, None]) ** 2, 0))
    np.testing.assert_allclose(metrics["critic/loss"], by_hand, rtol=1e-4)
    for x, y in zip(
        jax.tree.leaves(critic["batch_stats"]),
        jax.tree.leaves(stats["batch_stats"]),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)


def test_asking_for_values_moves_no_statistics():
    agent = make_agent("som", 3, 2, **TINY)
    critic = agent.init(jax.random.PRNGKey(0)).critic
    s, a = pairs(3)
    alone = [q_value(agent, critic, s[i], a[i]) for i in range(6)]
    np.testing.assert_allclose(q_value(agent, critic, s, a), alone, atol=1e-5)


@pytest.mark.parametrize("name", sorted(set(AGENTS) - {"ppo", "nclql"}))
def test_every_off_policy_agent_learns_with_it(name):
    agent = make_agent(name, 3, 2, **TINY)
    few = {"num_steps": 2, "num_samples": 4, "num_particles": 2, "batch_size": 6}
    known = set(agent.config.__dataclass_fields__)
    few = {k: v for k, v in few.items() if k in known}
    agent = replace(agent, config=replace(agent.config, **few))
    start = agent.init(jax.random.PRNGKey(0))
    state, metrics = jax.jit(agent.update)(start, transitions(6), jax.random.PRNGKey(1))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, metrics)))
    for part in ("params", "batch_stats"):
        before, after = (jax.tree.leaves(x.critic[part]) for x in (start, state))
        moved = [not np.array_equal(x, y) for x, y in zip(before, after, strict=True)]
        assert any(moved), part


def test_noise_levels_refuse_it():
    with pytest.raises(ValueError, match="batch_norm"):
        replace(NCLQL.profiles["laptop"], batch_norm=True)
