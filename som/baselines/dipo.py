"""DIPO: imitate better actions.

Exported by tools/export.py from book/baselines/dipo.md; edit the chapter.
"""

__all__ = [
    "climb",
    "denoising_error",
    "DIPOConfig",
    "guide_of",
    "DIPO",
]

# %% Imports
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from som.agent.actor_critic import (
    AGENTS,
    BASELINE_LOOPS,
    at_least_one,
    best_of_n,
    q_value,
)
from som.agent.critic import Transition
from som.baselines.diffusion import (
    LAPTOP,
    DiffusionAgent,
    DiffusionConfig,
    Schedule,
    line_or_cosine,
    perturb,
)


# %% Walking up
def climb(
    q: Callable,
    start: Float[Array, "*B A"],
    num_steps: int,
    step_size: float,
    max_norm: float,
) -> Float[Array, "*B A"]:
    """Actions after some steps of a fresh Adam up q, within the box.

    Args:
        q: values of actions, [..., A] -> [...].
        start: where the walk begins.
        num_steps: of Adam.
        step_size: Adam's learning rate.
        max_norm: bound of the norm of the whole batch's gradient.
    """
    adam = optax.chain(
        optax.clip_by_global_norm(max_norm), optax.adam(step_size, eps=1e-5)
    )
    downhill = jax.grad(lambda a: -jnp.sum(q(a)))

    def move(_, carry):
        a, opt = carry
        change, opt = adam.update(downhill(a), opt)
        return jnp.clip(a + change, -1, 1), opt

    return jax.lax.fori_loop(0, num_steps, move, (start, adam.init(start)))[0]


# %% Imitating
def denoising_error(
    agent: DiffusionAgent, policy, observation, a_0: Float[Array, "*B A"], key
) -> Float[Array, "*B"]:
    """Squared error of the noise that the denoiser sees, row by row.

    Args:
        agent: its denoiser, schedule and number of steps are used.
        policy: parameters of the denoiser.
        observation: states, of shapes that broadcast with the rows.
        a_0: actions to imitate.
        key: random key of steps and noises.
    """
    k_step, k_noise = jax.random.split(key)
    last = agent.config.num_steps
    step = jax.random.randint(k_step, a_0.shape[:-1], 1, last + 1)
    noise = jax.random.normal(k_noise, a_0.shape)
    a_n = perturb(agent.schedule, a_0, step, noise)
    seen = agent.denoiser.apply(policy, a_n, step, observation)
    return jnp.sum((seen - noise) ** 2, -1)


# %% The agent
@dataclass(frozen=True)
class DIPOConfig(DiffusionConfig):
    """Settings of DIPO; defaults are Table 3 of the paper."""

    num_steps: int = 100  # T, denoising steps
    num_gradient_steps: int = 30  # Adam steps of a guide at each visit
    guide_lr: float = 0.03  # Adam step of the guides
    guide_clip: float = 0.1  # bound of their gradient's norm, times A
    beta_scale: float | None = 0.3  # of the linear schedule; None: cosine
    distributional: bool = False  # critics predict a std beside the mean
    noise_scale: float = 0.0  # no noise beside the chain's own
    num_particles: int = 1  # N of best-of-N
    policy_delay: int = 1  # updates per step of policy and targets
    ema_policy: bool = False  # act with the lagging copy of the policy

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "num_gradient_steps")


def guide_of(batch: Transition) -> Float[Array, "B A"]:
    """The guides of a batch; its actions where it has none."""
    return batch.action if isinstance(batch.guide, tuple) else batch.guide


@dataclass(frozen=True)
class DIPO(DiffusionAgent):
    """Diffusion policy with action gradients (Yang et al., 2023).

    Args:
        config: see DIPOConfig.
        observation_size: O.
        action_size: A; actions live in [-1, 1]^A.
    """

    config: DIPOConfig

    profiles: ClassVar[dict[str, Any]] = {
        "paper": DIPOConfig(),
        "laptop": DIPOConfig(
            **LAPTOP | {"num_particles": 1},
            num_gradient_steps=10,
            beta_scale=None,
        ),
        "relax": DIPOConfig(activation="relu", reward_scale=1.0),
        "official": DIPOConfig(
            beta_scale=None, num_gradient_steps=20, reward_scale=1.0
        ),
    }
    loops: ClassVar[dict[str, dict[str, Any]]] = BASELINE_LOOPS | {
        "relax": BASELINE_LOOPS["paper"],
        "official": {"warmup": 10_000, "updates_per_step": 1.0},
    }
    rewrites: ClassVar[bool] = True

    @property
    def schedule(self) -> Schedule:
        """The linear schedule, or the cosine."""
        return line_or_cosine(self.config.num_steps, self.config.beta_scale)

    def revise(self, state, batch: Transition) -> Transition:
        """The batch with guides that have walked up the critic."""
        config = self.config
        guide = climb(
            partial(q_value, self, state.critic, batch.observation),
            guide_of(batch),
            config.num_gradient_steps,
            config.guide_lr,
            config.guide_clip * self.action_size,
        )
        return batch._replace(guide=guide)

    def policy_loss(self, policy, state, batch: Transition, key) -> Array:
        """The denoiser's error on the guides."""
        s, g = batch.observation, guide_of(batch)
        return jnp.mean(denoising_error(self, policy, s, g, key))

    def next_action(self, state, observation, key) -> Array:
        """What the lagging policy does, [B, A]."""
        policy = state.target_policy
        return best_of_n(self, policy, state.critic, observation, key)


AGENTS["dipo"] = DIPO
