"""Inputs that several tests share."""

import jax
import jax.numpy as jnp

from som.agent.critic import Transition


def transitions(n, observation_size=3, action_size=2):
    """Make n random steps of experience; none is terminal."""
    keys = jax.random.split(jax.random.PRNGKey(5), 3)
    return Transition(
        jax.random.normal(keys[0], (n, observation_size)),
        jax.random.uniform(keys[1], (n, action_size), minval=-1, maxval=1),
        jnp.ones(n),
        jnp.zeros(n),
        jax.random.normal(keys[2], (n, observation_size)),
    )
