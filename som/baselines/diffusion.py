"""Denoising in steps.

Exported by tools/export.py from book/baselines/diffusion.md; edit the chapter.
"""

__all__ = [
    "Schedule",
    "schedule_of",
    "linear_schedule",
    "vp_schedule",
    "cosine_schedule",
    "line_or_cosine",
    "perturb",
    "Denoiser",
    "posterior",
    "clean",
    "reverse_path",
    "DiffusionConfig",
    "LAPTOP",
    "DiffusionAgent",
]

# %% Imports
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from som.agent.actor_critic import (
    BASELINE_LOOPS,
    LAPTOP_FRAME,
    ActorCritic,
    ActorCriticConfig,
)
from som.agent.networks import Field
from som.theory.sde import VP


# %% Noise in steps
class Schedule(NamedTuple):
    """Noise by step, entries 0 (the action) to T (noise)."""

    beta: Float[Array, "N"]  # variance added by step n; beta[0] is 0
    mean: Float[Array, "N"]  # m_n, what is left of the action
    std: Float[Array, "N"]  # sigma_n, deviation of the noise in it


def schedule_of(beta) -> Schedule:
    """The schedule of the step sizes beta_1 ... beta_T.

    Raises:
        ValueError: a step size outside (0, 1).
    """
    beta = np.concatenate([[0.0], np.asarray(beta, np.float64)])
    if not np.all((beta[1:] > 0) & (beta[1:] < 1)):
        raise ValueError(f"step sizes {beta[1:]} are not all in (0, 1)")
    log_mean = 0.5 * np.cumsum(np.log1p(-beta))
    mean, std = np.exp(log_mean), np.sqrt(-np.expm1(2 * log_mean))
    return Schedule(*(jnp.asarray(x, jnp.float32) for x in (beta, mean, std)))


def linear_schedule(num_steps: int, scale: float) -> Schedule:
    """Step sizes on a line from 0.0001 scale to 0.999 scale."""
    return schedule_of(scale * np.linspace(1e-4, 0.999, num_steps))


def vp_schedule(
    num_steps: int, beta_min: float = 0.1, beta_max: float = 10.0
) -> Schedule:
    """Steps that follow the VP SDE with these noise rates exactly."""
    times = np.linspace(0, 1, num_steps + 1)
    integral = VP(beta_min, beta_max).integral(times)
    return schedule_of(-np.expm1(-np.diff(integral)))


def cosine_schedule(num_steps: int, offset: float = 0.008) -> Schedule:
    """Steps that leave a squared cosine of the action, each at most 0.999.

    Args:
        num_steps: T.
        offset: c, makes the first steps longer.

    Returns:
        Schedule with Equation (eq-diffusion-cosine) of the chapter.
    """
    share = (np.arange(num_steps + 1) / num_steps + offset) / (1 + offset)
    left = np.cos(share * np.pi / 2) ** 2
    return schedule_of(np.minimum(1 - left[1:] / left[:-1], 0.999))


def line_or_cosine(num_steps: int, scale: float | None) -> Schedule:
    """The linear schedule with this scale, or without one the cosine."""
    if scale is None:
        return cosine_schedule(num_steps)
    return linear_schedule(num_steps, scale)


def perturb(
    schedule: Schedule,
    a_0: Float[Array, "*B A"],
    step: Int[Array, "..."],
    noise: Float[Array, "*B A"],
) -> Float[Array, "*B A"]:
    """The action after `step` steps of noise, mean * a_0 + std * noise."""
    mean, std = schedule.mean[step], schedule.std[step]
    return mean[..., None] * a_0 + std[..., None] * noise


# %% The denoiser
class Denoiser(Field):
    """Noise epsilon(a, step, s) in a noised action: [..., A].

    Args of a call: noised action a [..., A], step 1 to T [...], observation
    [..., O]; the rest as in Field.
    """

    activation: str = "mish"

    def __call__(
        self, a, step: Int[Array, "..."], observation
    ) -> Float[Array, "... A"]:
        """A field given the step's number."""
        time = jnp.asarray(step, jnp.float32)
        return self.vector(a, observation, time)


# %% One step back
def posterior(
    schedule: Schedule,
    a_0: Float[Array, "*B A"],
    a_n: Float[Array, "*B A"],
    step: Int[Array, ""],
) -> tuple[Float[Array, "*B A"], Float[Array, ""]]:
    """Mean and variance of a_{n-1} given a_n and a_0, for one step n."""
    beta, variance = schedule.beta[step], schedule.std[step] ** 2
    before = schedule.std[step - 1] ** 2
    of_a_0 = schedule.mean[step - 1] * beta / variance
    of_a_n = jnp.sqrt(1 - beta) * before / variance
    return of_a_0 * a_0 + of_a_n * a_n, before / variance * beta


def clean(schedule: Schedule, a_n, noise, step, limit: float = 1.0) -> Array:
    """The action behind a_n if `noise` is in it, clipped to +-limit."""
    a_0 = (a_n - schedule.std[step] * noise) / schedule.mean[step]
    return jnp.clip(a_0, -limit, limit)


def reverse_path(
    denoise: Callable,
    noise: Float[Array, "*B A"],
    schedule: Schedule,
    key: jax.Array,
    limit: float = 1.0,
) -> Float[Array, "N *B A"]:
    """The denoising chain, from noise to action, all of its points.

    Args:
        denoise: noise in a noised action, (a [..., A], step) -> [..., A].
        noise: a_T, where the chain starts.
        schedule: of T steps.
        key: random key of the noise on the way.
        limit: half width of the box that holds a_0; jnp.inf for none.

    Returns:
        a_T, ..., a_0, [T + 1, ..., A].
    """

    def back(a_n, step_and_key):
        step, key = step_and_key
        a_0 = clean(schedule, a_n, denoise(a_n, step), step, limit)
        mean, variance = posterior(schedule, a_0, a_n, step)
        fresh = jax.random.normal(key, a_n.shape)
        a = mean + jnp.sqrt(variance) * fresh
        return a, a

    num_steps = len(schedule.beta) - 1
    steps = jnp.arange(num_steps, 0, -1)
    keys = jax.random.split(key, num_steps)
    path = jax.lax.scan(back, noise, (steps, keys))[1]
    return jnp.concatenate([noise[None], path])


# %% An agent that denoises
@dataclass(frozen=True)
class DiffusionConfig(ActorCriticConfig):
    """Settings of an agent that denoises; defaults are Table 3's."""

    activation: str = "mish"  # between the layers, a name of jax.nn
    actor_lr: float = 3e-4  # Adam step of the policy
    critic_lr: float = 3e-4  # Adam step of the critics
    num_steps: int = 20  # T, denoising steps

    def __post_init__(self):
        super().__post_init__()
        if self.num_steps < 2:
            raise ValueError(
                f"num_steps is {self.num_steps}; at least 2 is wanted"
            )


LAPTOP: dict[str, Any] = LAPTOP_FRAME | {
    "policy_delay": 1,
    "activation": "gelu",  # as SOM's
    "num_steps": 10,
}  # what the profiles `laptop` of these agents share


@dataclass(frozen=True)
class DiffusionAgent(ActorCritic):
    """An agent whose policy is a denoising chain.

    Left blank are the schedule and policy_loss.
    """

    config: Any

    loops: ClassVar[dict[str, dict[str, Any]]] = BASELINE_LOOPS

    @property
    def schedule(self) -> Schedule:
        """The noise of each step."""
        raise NotImplementedError

    @property
    def denoiser(self) -> Any:
        """The network epsilon_theta(a, step, s), a `Denoiser`."""
        config = self.config
        size = self.action_size
        return Denoiser(size, config.width, config.depth, config.activation)

    def init_policy(self, key) -> Any:
        """Fresh parameters of the denoiser."""
        s, a = jnp.zeros(self.observation_size), jnp.zeros(self.action_size)
        return self.denoiser.init(key, a, jnp.ones((), jnp.int32), s)

    def transport(self, policy, noise, observation, key) -> Array:
        """The denoising chain, [T + 1, ..., A]."""

        def denoise(a, step):
            return self.denoiser.apply(policy, a, step, observation)

        return reverse_path(denoise, noise, self.schedule, key)
