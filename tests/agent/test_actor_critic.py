"""The frame: acting, both critics, names."""

import inspect
import re
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import transitions

from som import train
from som.agent.actor_critic import (
    AGENTS,
    ELSEWHERE,
    ActorCritic,
    ActorCriticConfig,
    add_noise,
    best_of_n,
    candidates,
    closest,
    critic_step,
    q_value,
)
from som.agent.som import SOM, SOMConfig
from som.training.loop import LoopConfig

TINY = SOMConfig(width=8, depth=1, batch_size=4, num_samples=4, num_particles=3)


def test_best_of_n_is_the_greatest_q():
    agent = SOM(TINY, 3, 2)
    state, key = agent.init(jax.random.PRNGKey(0)), jax.random.PRNGKey(2)
    s = transitions(5).observation
    drawn = candidates(agent, state.policy, s, key, TINY.num_particles)
    best = best_of_n(agent, state.policy, state.critic, s, key)
    q = np.array(
        [[q_value(agent, state.critic, s[i], a[i]) for i in range(5)] for a in drawn]
    )
    np.testing.assert_allclose(best, drawn[q.argmax(0), np.arange(5)])


def test_act_is_reproducible_bounded_and_noisy_only_when_exploring():
    agent = SOM(TINY, 3, 2)
    state, key = agent.init(jax.random.PRNGKey(0)), jax.random.PRNGKey(2)
    s = transitions(5).observation
    act = jax.jit(agent.act, static_argnames="explore")
    quiet, noisy = act(state, s, key), act(state, s, key, explore=True)
    assert quiet.shape == (5, 2)
    np.testing.assert_array_equal(quiet, act(state, s, key))
    assert not np.array_equal(quiet, noisy)
    assert np.abs(noisy).max() <= 1
    assert act(state, s[0], key).shape == (2,)


def test_noise_has_the_stated_deviation():
    agent = SOM(TINY, 3, 1)
    noise = add_noise(
        agent, jnp.zeros((20_000, 1)), jnp.log(2.0), jax.random.PRNGKey(0)
    )
    assert abs(float(noise.std()) - 0.2) < 0.004  # four standard errors


def test_lagging_policy_acts_only_if_asked():
    state = SOM(TINY, 3, 2).init(jax.random.PRNGKey(0))
    state = state._replace(target_policy="lagging", policy="online")
    for flag, name in ((True, "lagging"), (False, "online")):
        agent = SOM(replace(TINY, ema_policy=flag), 3, 2)
        assert agent.acting_policy(state) == name


def test_scalar_critic_ignores_its_std():
    """One step of the scalar critic must not move the std head."""
    agent = SOM(replace(TINY, distributional=False), 3, 2)
    state = agent.init(jax.random.PRNGKey(0))
    critic, *_ = critic_step(agent, state, transitions(4), jax.random.PRNGKey(1))
    last = max(critic["params"]["VmapMLP_0"], key=lambda n: int(n.split("_")[1]))
    old = state.critic["params"]["VmapMLP_0"][last]["bias"]
    new = critic["params"]["VmapMLP_0"][last]["bias"]
    np.testing.assert_array_equal(old[:, 1], new[:, 1])
    assert np.all(old[:, 0] != new[:, 0])


def test_terminal_steps_do_not_bootstrap():
    """With every step terminal the target is the reward, whatever the policy."""
    agent = SOM(replace(TINY, distributional=False), 3, 2)
    state = agent.init(jax.random.PRNGKey(0))
    batch = transitions(4)._replace(terminated=jnp.ones(4))
    *_, metrics = critic_step(agent, state, batch, jax.random.PRNGKey(1))
    mean, _ = agent.critic_net.apply(state.critic, batch.observation, batch.action)
    by_hand = np.sum(np.mean((np.asarray(mean) - 0.2) ** 2, 0))
    np.testing.assert_allclose(metrics["critic/loss"], by_hand, rtol=1e-5)


def test_policy_targets_and_temperature_wait_for_their_turn():
    agent = SOM(replace(TINY, policy_delay=2, alpha_delay=3), 3, 2)
    old, key = agent.init(jax.random.PRNGKey(0)), jax.random.PRNGKey(1)
    for step in range(4):
        new, metrics = jax.jit(agent.update)(old, transitions(4), key)
        same = {
            name: jax.tree.all(jax.tree.map(np.array_equal, a, b))
            for name, a, b in zip(old._fields, old, new, strict=True)
        }
        assert not same["critic"]
        for name in ("policy", "target_policy", "target_critic"):
            assert same[name] == (step % 2 == 1), (step, name)
        assert same["log_alpha"] == (step % 3 != 0), step
        assert (metrics["policy/loss"] == 0) == (step % 2 == 1), step
        old = new


def test_blanks_are_blank():
    agent = ActorCritic(ActorCriticConfig(), 3, 2)
    for call in (
        lambda: agent.init(jax.random.PRNGKey(0)),
        lambda: agent.transport(None, None, None, None),
        lambda: agent.policy_loss(None, None, transitions(1), None),
    ):
        with pytest.raises(NotImplementedError):
            call()


def test_closest_names_the_nearest():
    assert closest("som", AGENTS, "algorithm") == "som"
    with pytest.raises(ValueError, match=r"unknown algorithm 'smo'.*'som'"):
        closest("smo", AGENTS, "algorithm")
    with pytest.raises(ValueError, match=r"did you mean 'sac'\?$"):
        closest("SAC", AGENTS, "algorithm")


def test_closest_names_three_at_most_and_all_where_none_is_near():
    names = ["actor_lr", "critic_lr", "alpha_lr", "value_lr", "width"]
    with pytest.raises(ValueError) as error:
        closest("a_lr", names, "setting")
    near = "'value_lr' or 'alpha_lr' or 'actor_lr'"
    assert str(error.value) == f"unknown setting 'a_lr'; did you mean {near}?"
    every = "actor_lr, alpha_lr, critic_lr, value_lr, width"
    with pytest.raises(ValueError, match=f"unknown setting 'zebra'; known are {every}"):
        closest("zebra", names, "setting")
    meant = "unknown setting 'gama'; if 'gamma' is meant: here it is 'discount'"
    with pytest.raises(ValueError, match=meant):
        closest("gama", names, "setting")
    with pytest.raises(ValueError, match="if 'learning_rate' is meant: here they are"):
        closest("learning_rat", [*names, "lagging_critic"], "setting")


def test_names_of_other_libraries_lead_to_names_that_exist():
    ours = {f.name for kind in AGENTS.values() for f in fields(kind.profiles["laptop"])}
    ours |= {f.name for f in fields(LoopConfig)} | {*AGENTS}
    ours |= {*inspect.signature(train).parameters}
    for word, hint in ELSEWHERE.items():
        assert word not in ours
        with pytest.raises(ValueError, match=re.escape(f"setting '{word}'; {hint}")):
            closest(word, ours, "setting")
        named = set(re.findall(r"'(\w+)'", hint))
        assert named <= ours and (named or hint.startswith("there is none")), hint
