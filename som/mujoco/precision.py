"""How exact it has to be.

Exported by tools/export.py from book/mujoco/precision.md; edit the chapter.
"""

__all__ = [
    "parity",
    "parity_title",
]

# %% Imports
from typing import Any

import jax
import jax.numpy as jnp

from som.agent.actor_critic import make_agent
from som.mujoco.cost import random_batch
from som.mujoco.speed import largest_difference


# %% The same numbers everywhere
def _update_elsewhere(agent: Any, inputs: Any) -> Any:
    """One update on the default device; on a CPU, without fusion."""
    inputs = jax.device_put(inputs, jax.devices()[0])
    lowered = jax.jit(agent.update).lower(*inputs)
    options: dict[str, str | bool] = {}
    if jax.default_backend() == "cpu":
        options["xla_disable_hlo_passes"] = "fusion"
        # Without these a running sum that is not fused comes out wrong.
        options["xla_cpu_use_fusion_emitters"] = True
    return lowered.compile(options)(*inputs)


def parity(**overrides: Any) -> dict[str, float]:
    """One update on the CPU against the same one on the default device.

    Args:
        **overrides: fields of the `paper` profile to change.

    Returns:
        Largest relative difference of each part of the state, and of the
        metrics, with float32 matrix products.
    """
    agent = make_agent("som", 17, 6, "paper", **overrides)
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    alone = jax.default_backend() == "cpu"
    host = None if alone else jax.devices("cpu")[0]
    with jax.default_matmul_precision("highest"):
        with jax.default_device(host):
            state, update = (
                agent.init(keys[0]),
                jax.jit(agent.update),
            )
            for key in keys[1:]:
                state, _ = update(state, random_batch(agent, key), key)
            state = state._replace(step=jnp.zeros_like(state.step))
            inputs = state, random_batch(agent, keys[0]), keys[0]
            mine, metrics = update(*inputs)
        theirs, others = _update_elsewhere(agent, inputs)
    result = {
        name: largest_difference(getattr(mine, name), getattr(theirs, name))
        for name in mine._fields
    }
    return result | {"metrics": largest_difference(metrics, others)}


def parity_title() -> str:
    """What `parity` compares on this machine."""
    device = jax.default_backend()
    other = "CPU without fusion" if device == "cpu" else device
    return f"largest relative difference, CPU against {other}"
