"""The distributional critic.

Exported by tools/export.py from book/agent/critic.md; edit the chapter.
"""

__all__ = [
    "Transition",
    "Target",
    "td_target",
    "critic_loss",
    "update_bound",
    "polyak",
    "scalar_critic_loss",
]

# %% Imports
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


# %% What the critic learns from
class Transition(NamedTuple):
    """One step of experience, or a batch of them.

    observation [..., O], action [..., A] in [-1, 1], reward [...],
    terminated [...] (1 where the episode truly ended, 0 at time limits),
    next_observation [..., O]. A guide [..., A] is there for agents that
    keep a better action beside the one that was taken.
    """

    observation: Float[Array, "... O"]
    action: Float[Array, "... A"]
    reward: Float[Array, "..."]
    terminated: Float[Array, "..."]
    next_observation: Float[Array, "... O"]
    guide: Any = ()


# %% Why a distribution
class Target(NamedTuple):
    """Where one critic update aims: the mean and a sample of the return."""

    mean: Float[Array, "B 1"]
    sample: Float[Array, "B 2"]


def td_target(
    key: jax.Array,
    reward: Float[Array, "B"],
    discount: Float[Array, "B"],
    next_mean: Float[Array, "B 2"],
    next_std: Float[Array, "B 2"],
) -> Target:
    """Bellman target of the twin distributional critic (DSAC-T, DACER).

    The twin with the smaller mean speaks for both. The sample adds its
    standard deviation times a normal number cut to [-3, 3], drawn apart for
    each twin.

    Args:
        key: random key.
        reward: scaled reward, [B].
        discount: gamma, or zero after a terminal step, [B].
        next_mean, next_std: target critics at (s', a'), [B, 2].

    Returns:
        Mean of the return [B, 1] and a sample of it for each twin [B, 2].
    """
    pick = jnp.argmin(next_mean, -1, keepdims=True)
    mean = jnp.take_along_axis(next_mean, pick, -1)
    std = jnp.take_along_axis(next_std, pick, -1)
    z = jnp.clip(jax.random.normal(key, next_mean.shape), -3, 3)
    reward, discount = reward[:, None], discount[:, None]
    return Target(
        reward + discount * mean, reward + discount * (mean + std * z)
    )


# %% From the likelihood to the loss
def critic_loss(
    mean: Float[Array, "B 2"],
    std: Float[Array, "B 2"],
    target: Target,
    bound: Float[Array, "2"],
) -> Float[Array, ""]:
    """Distributional critic loss of DACER (after DSAC-T), summed over twins.

    Only its gradient has a meaning: that of a Gaussian log-likelihood, with
    the sample kept within 3 bound of the mean, denominators kept away from
    zero by 0.1, and steps scaled back by bound^2 + 0.1.

    Args:
        mean, std: online critics at (s, a), [B, 2].
        target: from td_target.
        bound: running mean of std per twin, a constant here, [2].

    Returns:
        Scalar whose gradient moves mean and std.
    """
    sg = jax.lax.stop_gradient
    gap = jnp.clip(target.sample - mean, -3 * bound, 3 * bound)
    pull_mean = sg((target.mean - mean) / (std**2 + 0.1))
    pull_std = sg((gap**2 - std**2) / (std**3 + 0.1))
    gain = mean * pull_mean + std * pull_std
    return -jnp.sum((bound**2 + 0.1) * jnp.mean(gain, 0))


# %% The running bound
def update_bound(
    bound: Float[Array, "2"],
    std: Float[Array, "B 2"],
    tau: float,
    first: Bool[Array, ""],
) -> Float[Array, "2"]:
    """Running mean of the twins' std; the first batch starts it.

    Args:
        bound: the value so far, ignored if first, [2].
        std: online critics at the batch, [B, 2].
        tau: share of the batch in the new value.
        first: whether this is the first batch.

    Returns:
        New bound without gradient, [2].
    """
    batch = jax.lax.stop_gradient(jnp.mean(std, 0))
    return jnp.where(first, batch, bound + tau * (batch - bound))


# %% Targets that lag
def polyak(target, online, tau: float | Float[Array, ""]):
    """Move every leaf of target the fraction tau towards online.

    Args:
        target, online: pytrees of one structure.
        tau: fraction, 0 keeps target, 1 copies online.

    Returns:
        Pytree of the same structure.
    """
    return jax.tree.map(lambda x, y: x + tau * (y - x), target, online)


# %% The plain alternative
def scalar_critic_loss(
    mean: Float[Array, "B 2"], target: Target
) -> Float[Array, ""]:
    """Mean squared error from the target's mean, summed over the twins."""
    return jnp.sum(jnp.mean((mean - target.mean) ** 2, 0))
