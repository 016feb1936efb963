"""MFP: MeanFlow towards the best of N.

Exported by tools/export.py from book/baselines/mfp.md; edit the chapter.
"""

__all__ = [
    "MFPConfig",
    "path",
    "row_loss",
    "LAPTOP",
    "MFP",
]

# %% Imports
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from som.agent.actor_critic import (
    AGENTS,
    BASELINE_LOOPS,
    LAPTOP_FRAME,
    ActorCriticConfig,
    best_of_n,
)
from som.agent.critic import Transition
from som.agent.som import OneStep
from som.theory import meanflow


# %% The code
@dataclass(frozen=True)
class MFPConfig(ActorCriticConfig):
    """Settings of MFP; defaults are Table 3 of the SOM paper."""

    ivc_weight: float = 1.0  # nu, weight of the velocity constraint
    noise_scale: float = 0.0  # no noise beside the policy's own
    distributional: bool = False  # critics predict a std beside the mean
    residual: bool = False  # the policy's output has its input added


def path(a_star: Float[Array, "... A"], noise, t) -> tuple[Array, Array]:
    """The straight path: the point a_t and the pair's velocity.

    Args:
        a_star: where the path ends at t = 0, [..., A].
        noise: where it starts at t = 1, [..., A].
        t: time, a scalar or [..., 1].

    Returns:
        a_t and da_t/dt, [..., A] each.
    """
    return (1 - t) * a_star + t * noise, noise - a_star


def row_loss(
    u, a_star: Float[Array, "A"], noise, r, t, ivc_weight
) -> Float[Array, ""]:
    """MeanFlow loss plus the velocity constraint, for one state.

    Args:
        u: average velocity, maps (a [A], r, t) to [A].
        a_star: chosen action, [A].
        noise: start of the path, [A].
        r, t: end and start of the interval, scalars with r <= t.
        ivc_weight: nu.

    Returns:
        Loss, a scalar.
    """
    a_t, v = path(a_star, noise, t)
    aim = meanflow.target(u, v, a_t, r, t)
    identity = jnp.sum((u(a_t, r, t) - aim) ** 2)
    constraint = jnp.sum((u(a_t, t, t) - v) ** 2)
    return identity + ivc_weight * constraint


LAPTOP = MFPConfig(**LAPTOP_FRAME, policy_delay=1)


@dataclass(frozen=True)
class MFP(OneStep):
    """MeanFlow towards the best of N actions (Mean Velocity Policy).

    Args:
        config: see MFPConfig.
        observation_size: O.
        action_size: A; actions live in [-1, 1]^A.
    """

    config: MFPConfig

    profiles: ClassVar[dict[str, Any]] = {
        "paper": MFPConfig(),
        "laptop": LAPTOP,
    }
    loops: ClassVar[dict[str, dict[str, Any]]] = BASELINE_LOOPS

    def policy_loss(self, policy, state, batch: Transition, key) -> Array:
        """The mean of row_loss over the batch's states, towards fresh a*."""
        k_best, k_noise, k_time = jax.random.split(key, 3)
        a_star = best_of_n(
            self, state.policy, state.critic, batch.observation, k_best
        )
        noise = jax.random.normal(k_noise, a_star.shape)
        r, t = jnp.sort(jax.random.uniform(k_time, (2, len(noise))), axis=0)

        def row(observation, a_star, noise, r, t):
            def u(a, r, t):
                return self.policy_net.apply(policy, a, r, t, observation)

            weight = self.config.ivc_weight
            return row_loss(u, a_star, noise, r, t, weight)

        rows = jax.vmap(row)(batch.observation, a_star, noise, r, t)
        return jnp.mean(rows)


AGENTS["mfp"] = MFP
