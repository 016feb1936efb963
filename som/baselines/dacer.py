"""DACER: a gradient through the whole chain.

Exported by tools/export.py from book/baselines/dacer.md; edit the chapter.
"""

__all__ = [
    "Mixture",
    "RIDGE",
    "fit_to_shares",
    "log_joint",
    "spread_out",
    "fit_mixture",
    "mixture_entropy",
    "DACERConfig",
    "DACER",
]

# %% Imports
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from som.agent.actor_critic import AGENTS, add_noise, candidates, q_value
from som.agent.critic import Transition
from som.baselines.diffusion import (
    LAPTOP,
    DiffusionAgent,
    DiffusionConfig,
    Schedule,
    vp_schedule,
)


# %% A Gaussian mixture by expectation-maximisation
class Mixture(NamedTuple):
    """Gaussian mixture with full covariances."""

    weight: Float[Array, "M"]
    mean: Float[Array, "M A"]
    cov: Float[Array, "M A A"]


RIDGE = 1e-5  # added to variances; float32 cannot bear much less


def fit_to_shares(
    x: Float[Array, "N A"], share: Float[Array, "N M"]
) -> Mixture:
    """The mixture whose components own these shares of the samples."""
    total = jnp.sum(share, 0) + 1e-6
    mean = share.T @ x / total[:, None]
    gap = x[:, None] - mean
    cov = jnp.einsum("nm,nma,nmb->mab", share, gap, gap)
    ridge = RIDGE * jnp.eye(x.shape[-1])
    return Mixture(
        total / jnp.sum(total), mean, cov / total[:, None, None] + ridge
    )


def log_joint(
    x: Float[Array, "N A"], mixture: Mixture
) -> Float[Array, "N M"]:
    """log(w_j N(x_n; mu_j, Sigma_j)) of every sample and component."""

    def component(weight, mean, cov):
        root = jnp.linalg.cholesky(cov)
        gap = jax.scipy.linalg.solve_triangular(
            root, (x - mean).T, lower=True
        )
        log_det = jnp.sum(jnp.log(jnp.diag(root)))
        norm = 0.5 * x.shape[-1] * jnp.log(2 * jnp.pi) + log_det
        return jnp.log(weight) - norm - 0.5 * jnp.sum(gap**2, 0)

    return jax.vmap(component, out_axes=1)(*mixture)


def spread_out(x: Float[Array, "N A"], num: int) -> Float[Array, "N M"]:
    """Shares of 0 and 1: the nearest of num samples that lie far apart."""
    nearest = jnp.sum((x - jnp.mean(x, 0)) ** 2, -1)
    distances = []
    for _ in range(num):
        centre = x[jnp.argmax(nearest)]
        distances.append(jnp.sum((x - centre) ** 2, -1))
        nearest = jnp.minimum(nearest, distances[-1])
    closest = jnp.argmin(jnp.stack(distances), 0)
    return jax.nn.one_hot(closest, num)


def fit_mixture(
    x: Float[Array, "N A"], num: int, rounds: int = 50
) -> Mixture:
    """A mixture of num Gaussians, by rounds of EM.

    Args:
        x: samples, [N, A].
        num: M, components.
        rounds: of EM, a fixed number.
    """

    def one_round(_, mixture):
        share = jax.nn.softmax(log_joint(x, mixture), -1)
        return fit_to_shares(x, share)

    start = fit_to_shares(x, spread_out(x, num))
    return jax.lax.fori_loop(0, rounds, one_round, start)


def mixture_entropy(mixture: Mixture) -> Float[Array, ""]:
    """Entropy in nats as if the components did not overlap."""
    weight, mean, cov = mixture
    half_log_det = 0.5 * jnp.linalg.slogdet(cov)[1]
    gaussian = 0.5 * mean.shape[-1] * (1 + jnp.log(2 * jnp.pi))
    return jnp.sum(weight * (gaussian + half_log_det - jnp.log(weight)))


# %% The agent
@dataclass(frozen=True)
class DACERConfig(DiffusionConfig):
    """Settings of DACER; defaults are Table 3 of the paper."""

    noise_scale: float = 0.1  # in units of alpha; 0.15: HalfCheetah, Humanoid
    noise_range: tuple[float, float] = (0.1, 10.0)  # beta of the VP schedule
    num_particles: int = 1  # N of best-of-N
    initial_alpha: float = 3.0  # where the temperature starts
    alpha_lr: float = 3e-2  # Adam step of log alpha
    alpha_delay: int = 10_000  # updates between two steps of alpha
    ema_policy: bool = False  # act with the lagging copy of the policy
    num_components: int = 3  # Gaussians of the entropy's mixture
    entropy_samples: int = 200  # actions per state for the mixture


@dataclass(frozen=True)
class DACER(DiffusionAgent):
    """Diffusion actor-critic with entropy regulator (Wang et al., 2024).

    Args:
        config: see DACERConfig.
        observation_size: O.
        action_size: A; actions live in [-1, 1]^A.
    """

    config: DACERConfig

    profiles: ClassVar[dict[str, Any]] = {
        "paper": DACERConfig(),
        "laptop": DACERConfig(
            **LAPTOP
            | {
                "num_particles": 1,
                "actor_lr": 3e-4,  # see "Traps", as for the next
                "reward_scale": 0.2,
            },
            alpha_delay=1_000,
            entropy_samples=64,
        ),
    }

    @property
    def schedule(self) -> Schedule:
        """The steps of the VP SDE."""
        return vp_schedule(self.config.num_steps, *self.config.noise_range)

    def noisy_actions(
        self, policy, observation, log_alpha, key, num: int
    ) -> Float[Array, "N ... A"]:
        """What the policy is here: num samples of the chain, plus noise."""
        k_path, k_noise = jax.random.split(key)
        action = candidates(self, policy, observation, k_path, num)
        return add_noise(self, action, log_alpha, k_noise)

    def policy_loss(self, policy, state, batch: Transition, key) -> Array:
        """Minus the smaller Q of one action per state, through the chain."""
        s = batch.observation
        action = self.noisy_actions(policy, s, state.log_alpha, key, 1)[0]
        return -jnp.mean(q_value(self, state.critic, s, action))

    def entropy(self, state, observation: Float[Array, "B O"], key) -> Array:
        """Entropy of the actions by mixtures in nats, mean over states."""
        actions = self.noisy_actions(
            state.policy,
            observation,
            state.log_alpha,
            key,
            self.config.entropy_samples,
        )

        def one_state(x):
            fitted = fit_mixture(x, self.config.num_components)
            return mixture_entropy(fitted)

        return jnp.mean(jax.vmap(one_state, in_axes=1)(actions))

    def alpha_loss(self, log_alpha, state, batch: Transition, key) -> Array:
        """log(alpha) times the excess of the measured entropy."""
        entropy = self.entropy(state, batch.observation, key)
        target = self.config.target_entropy * self.action_size
        return log_alpha * (entropy - target)


AGENTS["dacer"] = DACER
