"""QSM: the critic's slope as a score.

Exported by tools/export.py from book/baselines/qsm.md; edit the chapter.
"""

__all__ = [
    "step_sizes",
    "langevin_path",
    "QSMConfig",
    "QSM",
]

# %% Imports
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from som.agent.actor_critic import (
    AGENTS,
    BASELINE_LOOPS,
    LAPTOP_FRAME,
    ActorCritic,
    ActorCriticConfig,
    at_least_one,
    q_value,
)
from som.agent.critic import Transition
from som.agent.networks import MLP


# %% The walk
def step_sizes(num_steps: int, first_step: float) -> Float[Array, "T"]:
    """delta_0 ... delta_{T-1}, on a line from first_step towards zero."""
    return first_step * (1 - jnp.arange(num_steps) / num_steps)


def langevin_path(
    score: Callable,
    start: Float[Array, "*B A"],
    sizes: Float[Array, "L"],
    key: jax.Array,
    num_steps: int = 1,
) -> Float[Array, "N *B A"]:
    """Clipped Langevin steps along a score, all points of the way.

    Args:
        score: (actions [..., A], level) -> [..., A].
        start: where the walk begins, [..., A].
        sizes: delta of each level, the variance of a step's noise.
        key: random key of that noise.
        num_steps: steps on each level.

    Returns:
        The start and the end of every step, [L num_steps + 1, ..., A].
    """

    def move(a, level_and_key):
        level, key = level_and_key
        size, z = sizes[level], jax.random.normal(key, a.shape)
        a = a + size / 2 * score(a, level) + jnp.sqrt(size) * z
        a = jnp.clip(a, -1, 1)
        return a, a

    levels = jnp.repeat(jnp.arange(len(sizes)), num_steps)
    keys = jax.random.split(key, len(levels))
    path = jax.lax.scan(move, start, (levels, keys))[1]
    return jnp.concatenate([start[None], path])


# %% The agent
@dataclass(frozen=True)
class QSMConfig(ActorCriticConfig):
    """Settings of QSM; defaults are Table 3 of the paper."""

    activation: str = "relu"  # between the layers, a name of jax.nn
    actor_lr: float = 3e-4  # Adam step of the policy
    critic_lr: float = 3e-4  # Adam step of the critics
    num_steps: int = 20  # T, Langevin steps
    first_step: float = 1.0  # delta_0, the variance of the first step
    q_factor: float = 1.0  # M: the score is M grad Q
    distributional: bool = False  # critics predict a std beside the mean
    noise_scale: float = 0.0  # no noise beside the walk's own
    policy_delay: int = 1  # updates per step of policy and targets
    ema_policy: bool = False  # act with the lagging copy of the policy

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "num_steps")
        if not self.first_step > 0:
            raise ValueError(
                f"first_step is {self.first_step}; "
                "a positive number is wanted"
            )


@dataclass(frozen=True)
class QSM(ActorCritic):
    """Q-score matching with Langevin steps (after Psenka et al., 2024).

    Args:
        config: see QSMConfig.
        observation_size: O.
        action_size: A; actions live in [-1, 1]^A.
    """

    config: QSMConfig

    profiles: ClassVar[dict[str, Any]] = {
        "paper": QSMConfig(),
        "laptop": QSMConfig(
            **LAPTOP_FRAME | {"reward_scale": 0.2}, first_step=0.1
        ),
        "relax": QSMConfig(reward_scale=1.0),
        "bandit": QSMConfig(**LAPTOP_FRAME, first_step=0.02, q_factor=10.0),
    }
    loops: ClassVar[dict[str, dict[str, Any]]] = BASELINE_LOOPS | {
        "relax": BASELINE_LOOPS["paper"]
    }

    @property
    def score_net(self) -> MLP:
        """The network Psi_theta(s, a)."""
        config, size = self.config, self.action_size
        return MLP(config.width, config.depth, size, config.activation)

    def init_policy(self, key) -> Any:
        """Fresh parameters of the score network."""
        s, a = jnp.zeros(self.observation_size), jnp.zeros(self.action_size)
        return self.score_net.init(key, s, a)

    def transport(self, policy, noise, observation, key) -> Array:
        """The Langevin walk, [T + 1, ..., A]."""
        sizes = step_sizes(self.config.num_steps, self.config.first_step)
        score = lambda a, _: self.score_net.apply(policy, observation, a)
        return langevin_path(score, noise, sizes, key)

    def policy_loss(self, policy, state, batch: Transition, key) -> Array:
        """Squared distance of the score from M grad Q, at the actions."""
        s, a = batch.observation, batch.action
        q = lambda a: jnp.sum(q_value(self, state.critic, s, a))
        aim = self.config.q_factor * jax.grad(q)(a)
        seen = self.score_net.apply(policy, s, a)
        return jnp.mean(jnp.sum((seen - aim) ** 2, -1))


AGENTS["qsm"] = QSM
