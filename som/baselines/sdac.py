"""SDAC: denoising towards a Boltzmann policy.

Exported by tools/export.py from book/baselines/sdac.md; edit the chapter.
"""

__all__ = [
    "weighted_noise",
    "ReweightedConfig",
    "Reweighted",
    "SDACConfig",
    "policy_loss",
    "SDAC",
]

# %% Imports
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from som.agent.actor_critic import AGENTS, add_noise, best_of_n, q_value
from som.agent.critic import Transition
from som.baselines.diffusion import (
    LAPTOP,
    DiffusionAgent,
    DiffusionConfig,
    Schedule,
    clean,
    linear_schedule,
    perturb,
)


# %% The target noise
def weighted_noise(
    energy: Callable,
    a_n: Float[Array, "A"],
    schedule: Schedule,
    step: Int[Array, ""],
    key: jax.Array,
    num_samples: int,
    limit: float = 1.0,
) -> Float[Array, "A"]:
    """Mean noise in a_n if actions follow exp(energy); K guesses.

    Args:
        energy: lambda * Q of one state, [K, A] -> [K].
        a_n: noised action.
        schedule: noise by step.
        step: n, from 1 to T.
        key: random key of the guesses.
        num_samples: K.
        limit: half width of the box to which guesses are clipped.
    """
    noise = jax.random.normal(key, (num_samples, *a_n.shape))
    guesses = clean(schedule, a_n, noise, step, limit)
    return jax.nn.softmax(energy(guesses)) @ noise


# %% The agent
@dataclass(frozen=True)
class ReweightedConfig(DiffusionConfig):
    """Settings that SDAC and DPMD share; defaults are Table 3's."""

    distributional: bool = False  # critics predict a std beside the mean
    beta_scale: float = 0.8  # factor of the linear schedule
    start_std: float = 0.5  # deviation of the noise the chain starts from


@dataclass(frozen=True)
class Reweighted(DiffusionAgent):
    """A chain that learns by reweighted score matching; left blank is how."""

    @property
    def schedule(self) -> Schedule:
        """The linear schedule, scaled."""
        return linear_schedule(self.config.num_steps, self.config.beta_scale)

    @property
    def prior_std(self) -> float:
        """Deviation of the noise that the chain starts from."""
        return self.config.start_std


@dataclass(frozen=True)
class SDACConfig(ReweightedConfig):
    """Settings of SDAC; defaults are Table 3 of the paper."""

    num_samples: int = 64  # K, guesses at the action behind a noised one
    q_factor: float = 5.0  # kappa: lambda = kappa / alpha


def policy_loss(agent: "SDAC", policy, state, batch: Transition, key):
    """Squared distance of the denoiser from the weighted noise."""
    config, num = agent.config, len(batch.observation)
    k_best, k_explore, k_step, k_noise, k_row = jax.random.split(key, 5)
    fixed = jax.lax.stop_gradient(policy)
    s = batch.observation
    a_0 = best_of_n(agent, fixed, state.critic, s, k_best)
    a_0 = add_noise(agent, a_0, state.log_alpha, k_explore)
    step = jax.random.randint(k_step, (num,), 1, config.num_steps + 1)
    noise = jax.random.normal(k_noise, a_0.shape)
    a_n = perturb(agent.schedule, a_0, step, noise)
    factor = config.q_factor / jnp.exp(state.log_alpha)

    def target(s, a_n, step, key):
        energy = lambda a: factor * q_value(agent, state.critic, s, a)
        return weighted_noise(
            energy, a_n, agent.schedule, step, key, config.num_samples
        )

    keys = jax.random.split(k_row, num)
    aim = jax.vmap(target)(s, a_n, step, keys)
    seen = agent.denoiser.apply(policy, a_n, step, s)
    return jnp.mean(jnp.sum((seen - aim) ** 2, -1))


@dataclass(frozen=True)
class SDAC(Reweighted):
    """Soft diffusion actor-critic (Ma et al., 2025).

    Args:
        config: see SDACConfig.
        observation_size: O.
        action_size: A; actions live in [-1, 1]^A.
    """

    config: SDACConfig

    profiles: ClassVar[dict[str, Any]] = {
        "paper": SDACConfig(),
        "laptop": SDACConfig(**LAPTOP, num_samples=32),
        "bandit": SDACConfig(
            **LAPTOP
            | {"num_particles": 1, "actor_lr": 2e-3, "policy_delay": 2},
            num_samples=16,
            q_factor=50.0,
        ),
    }

    def policy_loss(self, policy, state, batch: Transition, key) -> Array:
        """The loss of the denoiser against the critic of the last update."""
        return policy_loss(self, policy, state, batch, key)


AGENTS["sdac"] = SDAC
