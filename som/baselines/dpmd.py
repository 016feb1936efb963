"""DPMD: mirror descent with a chain.

Exported by tools/export.py from book/baselines/dpmd.md; edit the chapter.
"""

__all__ = [
    "mirror_weights",
    "DPMD",
]

# %% Imports
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from som.agent.actor_critic import AGENTS, q_value
from som.agent.critic import Transition
from som.baselines.diffusion import LAPTOP
from som.baselines.qvpo import weighted_denoising
from som.baselines.sdac import Reweighted, ReweightedConfig


# %% Values without a unit
def mirror_weights(
    q: Float[Array, "B"],
    alpha: Float[Array, ""] | float,
    limit: float = 3.0,
) -> Float[Array, "B"]:
    """Weights exp(z / alpha), z the values in deviations from their mean.

    Args:
        q: values of the actions.
        alpha: temperature, positive.
        limit: deviations to which z is clipped.
    """
    z = (q - jnp.mean(q)) / (jnp.std(q) + 1e-6)
    return jnp.exp(jnp.clip(z, -limit, limit) / alpha)


# %% The agent
@dataclass(frozen=True)
class DPMD(Reweighted):
    """Diffusion policy mirror descent (Ma et al., 2025).

    Args:
        config: see ReweightedConfig.
        observation_size: O.
        action_size: A; actions live in [-1, 1]^A.
    """

    config: ReweightedConfig

    profiles: ClassVar[dict[str, Any]] = {
        "paper": ReweightedConfig(),
        "laptop": ReweightedConfig(**LAPTOP),
    }

    def policy_loss(self, policy, state, batch: Transition, key) -> Array:
        """Error of the denoiser at own actions, weighted by their values."""
        s = batch.observation
        k_action, k_loss = jax.random.split(key)
        a_0 = self.next_action(state, s, k_action)
        q = q_value(self, state.critic, s, a_0)
        weight = mirror_weights(q, jnp.exp(state.log_alpha))
        return weighted_denoising(self, policy, s, a_0, weight, k_loss)


AGENTS["dpmd"] = DPMD
