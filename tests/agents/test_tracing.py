"""Tracing an agent's update: in threads, with jit and without, for many seeds."""

import jax
import jax.numpy as jnp
import pytest
from examples import NAMES, assert_same, batch_for, make, update
from flax.linen import kw_only_dataclasses

from som.training import loop

KEY = jax.random.PRNGKey(0)


@pytest.mark.parametrize("name", NAMES)
def test_two_threads_may_trace(name, monkeypatch):
    """Making a class is what flax cannot do in two threads, so none is made."""
    agent = make(name)
    state, batch = agent.init(KEY), batch_for(agent)

    def refuse(*args, **kwargs):
        raise AssertionError("a class is made while an update is traced")

    monkeypatch.setattr(kw_only_dataclasses, "dataclass", refuse)
    jax.eval_shape(agent.update, state, batch, KEY)
    jax.eval_shape(agent.act, state, jnp.ones(3), KEY)


@pytest.mark.parametrize("name", NAMES)
def test_neither_jit_nor_a_second_seed_changes_a_seed(name):
    """Two seeds side by side, an operation at a time, are each one in one program."""
    agent = make(name)
    both, batch = loop.init_seeds(agent, (0, 1)), batch_for(agent)
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), batch)
    keys = jax.random.split(KEY, 2)
    axes = loop.seed_axes(both)
    every = jax.vmap(agent.update, (axes, 0, 0), (axes, 0))
    together, measured = every(both, twice, keys)
    for i in range(2):
        alone = loop.init_seeds(agent, (i,))
        alone = jax.tree.map(lambda x: x[0], alone._replace(step=()))
        alone = alone._replace(step=jnp.zeros((), jnp.int32))
        expected, metrics = update(agent, alone, batch, keys[i])
        of_one = together._replace(step=()), measured
        got = jax.tree.map(lambda x, i=i: x[i], of_one)
        wanted = expected._replace(step=()), metrics
        assert_same(got, wanted, rtol=2e-3, atol=2e-5)
