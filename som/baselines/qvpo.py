"""QVPO: imitate the best, weighted.

Exported by tools/export.py from book/baselines/qvpo.md; edit the chapter.
"""

__all__ = [
    "weighted_denoising",
    "elite",
    "QVPOConfig",
    "QVPO",
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
    candidates,
    q_value,
)
from som.agent.critic import Transition
from som.baselines.diffusion import (
    LAPTOP,
    DiffusionAgent,
    DiffusionConfig,
    Schedule,
    line_or_cosine,
)
from som.baselines.dipo import denoising_error


# %% The weighted regression
def weighted_denoising(
    agent: Any,
    policy,
    observation: Float[Array, "... O"],
    a_0: Float[Array, "*R A"],
    weight: Float[Array, "*R"],
    key: jax.Array,
) -> Float[Array, ""]:
    """Mean of the weighted squared errors of the denoiser.

    Its minimiser is the denoiser of the density weight * (law of a_0).

    Args:
        agent: a DiffusionAgent.
        policy: parameters of its denoiser.
        observation: states, of shapes that broadcast with the rows.
        a_0: clean actions.
        weight: of each row, not negative.
        key: random key of steps and noise.
    """
    error = denoising_error(agent, policy, observation, a_0, key)
    return jnp.mean(weight * error)


def elite(
    agent: "QVPO", policy, critic, observation: Float[Array, "*B O"], key
) -> tuple[Float[Array, "*B A"], Float[Array, "*B"]]:
    """The best of K actions of each state, and by how much it beats the mean.

    Args:
        agent: QVPO.
        policy: parameters of the denoiser.
        critic: parameters of the critics.
        observation: states, [..., O].
        key: random key of the actions.

    Returns:
        Actions [..., A] and weights [...], which are not negative.
    """
    num = agent.config.num_samples
    actions = candidates(agent, policy, observation, key, num)
    q = q_value(agent, critic, observation, actions)
    best = jnp.argmax(q, 0)[None, ..., None]
    advantage = jnp.max(q, 0) - jnp.mean(q, 0)  # rounding may sink it below 0
    best_action = jnp.take_along_axis(actions, best, 0)[0]
    return best_action, jnp.maximum(advantage, 0)


# %% The agent
@dataclass(frozen=True)
class QVPOConfig(DiffusionConfig):
    """Settings of QVPO; defaults are Table 3 of the paper.

    Raises:
        ValueError: fewer than two samples or no entropy step.
    """

    distributional: bool = False  # critics predict a std beside the mean
    noise_scale: float = 0.0  # no noise beside the policy's own
    beta_scale: float | None = 0.3  # of the linear schedule; None: cosine
    num_samples: int = 64  # K, actions of which the best is imitated
    num_uniform: int = 10  # M, uniform actions per state
    omega_range: tuple[float, float] = (0.02, 0.002)  # weight, first and last
    entropy_steps: int = 1_000_000  # updates in which omega would be zero

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("num_samples", 2), ("entropy_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; "
                    f"at least {least} is wanted"
                )

    def omega(self, step) -> Float[Array, ""]:
        """Weight of a uniform row after some updates, a scalar."""
        first, last = self.omega_range
        left = 1 - jnp.asarray(step) / self.entropy_steps
        return jnp.maximum(last, first * left)


@dataclass(frozen=True)
class QVPO(DiffusionAgent):
    """Q-weighted variational policy optimisation (Ding et al., 2024).

    Args:
        config: see QVPOConfig.
        observation_size: O.
        action_size: A; actions live in [-1, 1]^A.
    """

    config: QVPOConfig

    profiles: ClassVar[dict[str, Any]] = {
        "paper": QVPOConfig(),
        "official": QVPOConfig(
            actor_lr=1e-4,
            num_particles=4,
            beta_scale=None,
            reward_scale=1.0,
            policy_delay=1,
            ema_policy=False,
        ),
        "laptop": QVPOConfig(
            **LAPTOP, beta_scale=None, num_samples=16, entropy_steps=20_000
        ),
    }
    loops: ClassVar[dict[str, dict[str, Any]]] = BASELINE_LOOPS | {
        "official": {"warmup": 10_000, "updates_per_step": 1.0}
    }

    @property
    def schedule(self) -> Schedule:
        """The linear schedule, scaled, or the cosine."""
        return line_or_cosine(self.config.num_steps, self.config.beta_scale)

    def policy_loss(self, policy, state, batch: Transition, key) -> Array:
        """Weighted error at the best own actions and at uniform ones."""
        config, s = self.config, batch.observation
        k_elite, k_uniform, k_loss = jax.random.split(key, 3)
        best, weight = elite(self, state.policy, state.critic, s, k_elite)
        shape = (config.num_uniform, *best.shape)
        uniform = jax.random.uniform(k_uniform, shape, minval=-1, maxval=1)
        a_0 = jnp.concatenate([best[None], uniform])
        share = jnp.ones((len(a_0), 1)).at[1:].set(config.omega(state.step))
        return weighted_denoising(
            self, policy, s, a_0, share * weight, k_loss
        )


AGENTS["qvpo"] = QVPO
