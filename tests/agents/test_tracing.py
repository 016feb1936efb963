"""Tracing an agent's update: with jit and without, in threads, for many seeds."""

import jax
import jax.numpy as jnp
import pytest
from examples import NAMES, assert_same, batch_for, make, update
from flax.linen import kw_only_dataclasses

from som.training import loop

KEY = jax.random.PRNGKey(0)


@pytest.mark.parametrize("name", NAMES)
def test_jit_changes_nothing(name):
    agent = make(name)
    state, batch = agent.init(KEY), batch_for(agent)
    with jax.disable_jit():
        plain = agent.update(state, batch, KEY)
    compiled = update(agent, state, batch, KEY)
    assert_same(plain, compiled, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_two_threads_may_trace(name, monkeypatch):
    """Making a class is what flax cannot do in two threads, so none is made."""
    agent = make(name)
    state, batch = jax.jit(agent.init)(KEY), batch_for(agent)

    def refuse(*args, **kwargs):
        raise AssertionError("a class is made while an update is traced")

    monkeypatch.setattr(kw_only_dataclasses, "dataclass", refuse)
    jax.eval_shape(agent.update, state, batch, KEY)
    jax.eval_shape(agent.act, state, jnp.ones(3), KEY)


@pytest.mark.parametrize("name", NAMES)
def test_seeds_side_by_side_are_seeds_alone(name):
    agent = make(name)
    both, batch = loop.init_seeds(agent, (0, 1)), batch_for(agent)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    keys = jax.random.split(KEY, 2)
    axes = loop.seed_axes(both)
    every = jax.jit(jax.vmap(agent.update, (axes, 0, 0), (axes, 0)))
    together, _ = every(both, twice, keys)
    for i in range(2):
        alone = loop.init_seeds(agent, (i,))
        alone = jax.tree.map(lambda x: x[0], alone._replace(step=()))
        alone = alone._replace(step=jnp.zeros((), jnp.int32))
        expected, _ = update(agent, alone, batch, keys[i])
        got = jax.tree.map(lambda x, i=i: x[i], together._replace(step=()))
        assert_same(got, expected._replace(step=()), rtol=2e-3, atol=2e-5)
