"""The update, timed: the same one, at sizes that take no time."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from som.agent.actor_critic import make_agent
from som.mujoco.cost import TINY
from som.mujoco.speed import (
    cycle,
    growth,
    kernels,
    largest_difference,
    parts,
    update_times,
)


def test_largest_difference_is_relative_to_each_leaf():
    x = {"a": jnp.array([100.0, 0.0]), "b": jnp.array([0.0, 1e-3])}
    y = {"a": jnp.array([100.0, 1.0]), "b": jnp.array([1e-4, 1e-3])}
    assert largest_difference(x, y) == pytest.approx(0.1)
    assert largest_difference(x, x) == 0


def test_cycle_makes_whole_cycles_and_the_same_ones():
    agent = make_agent("som", 17, 6, "paper", **TINY)
    call, updates = cycle(agent, seeds=2)
    assert updates % agent.config.policy_delay == 0
    first, second = call(), call()
    assert first.step == agent.config.policy_delay + updates
    assert first.log_alpha.shape == (2,)
    assert largest_difference(first, second) == 0
    policies = jax.tree.leaves(first.policy)
    assert any(np.abs(x[0] - x[1]).max() > 0 for x in policies)


def test_kernels_are_named_and_sum_to_a_whole():
    product = jax.jit(lambda x: jnp.tanh(x @ x))
    shares = kernels(partial(product, jnp.ones((256, 256))))
    assert shares and 0 < sum(shares.values()) <= 100.1
    assert not any("." in name for name in shares)


def test_times_of_an_update():
    result = update_times("paper", 1, **TINY)
    assert all(value > 0 for value in result.values())


def test_times_of_the_parts():
    result = parts(1, **TINY)
    assert set(result) == {"N pass ms", "critics ms", "policy ms", "update ms"}
    assert min(result.values()) > 0


def test_growth_times_a_shared_size_once():
    axes = {"K": ("num_samples", (2,)), "seeds": ("seeds", (1, 2))}
    result = growth(1, axes, **TINY)
    assert [list(rows) for rows in result.values()] == [["2"], ["1", "2"]]
    assert result["K"]["2"] == result["seeds"]["1"] > 0
