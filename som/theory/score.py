"""The score from the critic.

Exported by tools/export.py from book/theory/score.md; edit the chapter.
"""

__all__ = [
    "Energy",
    "evaluate",
    "gaussian_proposals",
    "weighted_gradient",
    "idem_score",
    "Proposals",
    "box_proposals",
    "posterior_mean_score",
    "box_score",
    "lattice",
    "tilt",
    "combined_score",
]

# %% Imports
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float

from som.theory.sde import SDE

Energy = Callable[[Array], Array]  # alpha * Q: [..., A] -> [...]


# %% The paper's estimator
def evaluate(function, guesses: Float[Array, "K A"], chunk: int):
    """Apply function to each guess, `chunk` of them at once (0: all).

    The values are the same; memory grows with chunk, not with K.
    """
    return jax.lax.map(function, guesses, batch_size=chunk or len(guesses))


def gaussian_proposals(
    key, a_t: Float[Array, "A"], t, sde: SDE, num_samples: int
) -> Float[Array, "K A"]:
    """Guesses of the clean action: a_0|t ~ N(a_t/m, sigma^2/m^2 I)."""
    noise = jax.random.normal(key, (num_samples, *a_t.shape))
    return (a_t + sde.std(t) * noise) / sde.mean(t)


def weighted_gradient(
    energies: Float[Array, "K"], gradients: Float[Array, "K A"], t, sde: SDE
) -> Float[Array, "A"]:
    """Equation (5) written out: sum_i softmax_i(energy) grad_i / m(t)."""
    return jax.nn.softmax(energies) @ gradients / sde.mean(t)


def idem_score(
    energy: Energy,
    a_t: Float[Array, "A"],
    t,
    sde: SDE,
    key,
    num_samples: int,
    chunk: int = 0,
) -> Float[Array, "A"]:
    """Monte Carlo score of p_t, exactly as in Equation (5) of the paper.

    Args:
        energy: alpha * Q, maps [..., A] to [...].
        a_t: noisy action, [A].
        t: diffusion time, scalar in (0, 1].
        sde: forward SDE.
        key: random key.
        num_samples: K, the number of guesses a_0|t.
        chunk: guesses evaluated at once; 0 means all (memory only).

    Returns:
        Estimate of the gradient of log p_t at a_t, [A]; its relative error
        falls as 1/sqrt(K) and grows quickly with t.
    """
    guesses = gaussian_proposals(key, a_t, t, sde, num_samples)
    energies, gradients = evaluate(jax.value_and_grad(energy), guesses, chunk)
    return weighted_gradient(energies, gradients, t, sde)


# %% Guesses that stay in the box
class Proposals(NamedTuple):
    """Guesses of the clean action inside the box [-1, 1]^A.

    actions [K, A]; mean [A] is the exact mean of their distribution;
    log_tilt [K] is what their distribution has in excess of the truncated
    posterior kernel (zero without a slope).
    """

    actions: Float[Array, "K A"]
    mean: Float[Array, "A"]
    log_tilt: Float[Array, "K"]


def box_proposals(
    uniforms: Float[Array, "K A"], a_t: Float[Array, "A"], t, sde: SDE, slope
) -> Proposals:
    """N(a_t/m + s^2 slope, s^2 I) truncated to the box, with s = sigma/m.

    The inverse distribution function turns uniforms into samples. Each
    coordinate is mirrored so that the box lies in the lower tail, where
    float32 resolves the normal distribution down to 13 deviations.
    """
    scale = sde.std(t) / sde.mean(t)
    centre = a_t / sde.mean(t) + scale**2 * slope
    left, right = (-1 - centre) / scale, (1 - centre) / scale
    sign = jnp.where(left + right > 0, -1.0, 1.0)
    high = jnp.maximum(jnp.where(sign > 0, right, -left), -12.0)
    low = jnp.minimum(jnp.where(sign > 0, left, -right), high)
    p_low, p_high = ndtr(low), ndtr(high)
    z = ndtri(p_low + uniforms * (p_high - p_low))
    actions = jnp.clip(centre + sign * scale * z, -1, 1)
    mass = jnp.maximum(p_high - p_low, 1e-35)
    bend = jnp.exp(-0.5 * low**2) - jnp.exp(-0.5 * high**2)
    mean = centre + sign * scale * bend / (mass * np.sqrt(2 * np.pi))
    return Proposals(actions, jnp.clip(mean, -1, 1), actions @ slope)


def posterior_mean_score(
    proposals: Proposals, energies: Float[Array, "K"], a_t, t, sde: SDE
) -> Float[Array, "A"]:
    """(m E[a_0 | a_t] - a_t) / sigma^2, the mean taken over the guesses.

    The proposals' own sample mean is replaced by their exact mean (a
    control variate), so equal weights give the exact answer.
    """
    weights = jax.nn.softmax(energies - proposals.log_tilt)
    excess = weights - 1 / len(weights)
    a_0 = proposals.mean + excess @ proposals.actions
    return (sde.mean(t) * a_0 - a_t) / sde.std(t) ** 2


def box_score(
    energy: Energy,
    a_t: Float[Array, "A"],
    t,
    sde: SDE,
    key,
    num_samples: int,
    chunk: int = 0,
) -> Float[Array, "A"]:
    """Monte Carlo score of exp(energy) 1[-1,1]^A diffused to time t.

    Args and Returns: as idem_score. Needs values of the energy inside the
    box only, and no gradient.
    """
    uniforms = jax.random.uniform(key, (num_samples, *a_t.shape))
    slope = jnp.zeros_like(a_t)
    proposals = box_proposals(uniforms, a_t, t, sde, slope)
    energies = evaluate(energy, proposals.actions, chunk)
    return posterior_mean_score(proposals, energies, a_t, t, sde)


# %% Both at once
def lattice(key, num_samples: int, size: int) -> Float[Array, "K A"]:
    """Evenly spread uniforms: a rank-one lattice with a random shift.

    The generalised golden ratio gives the generator; the shift makes each
    point uniform, so that estimates keep the expectation of random ones.
    """
    root = 2.0
    for _ in range(40):
        root = (1 + root) ** (1 / (size + 1))
    generator = root ** -np.arange(1.0, size + 1)
    points = np.arange(num_samples)[:, None] * generator % 1
    shift = jax.random.uniform(key, (size,))
    uniforms = (jnp.asarray(points, jnp.float32) + shift) % 1
    return jnp.clip(uniforms, 1e-6, 1 - 1e-6)


def tilt(
    gradient: Float[Array, "... A"], t, sde: SDE, reach=0.2
) -> Float[Array, "... A"]:
    """How far to tilt the proposals towards a gradient of the energy.

    The full gradient where the kernel is narrower than `reach` (an action
    distance over which the energy is about linear), fading as the square
    beyond it; the shift s^2 * slope never exceeds two deviations s.
    """
    scale = sde.std(t) / sde.mean(t)
    slope = gradient / (1 + (scale / reach) ** 2)
    return jnp.clip(slope, -2 / scale, 2 / scale)


def combined_score(
    energy: Energy,
    a_t: Float[Array, "A"],
    t,
    sde: SDE,
    key,
    num_samples: int,
    chunk: int = 0,
) -> Float[Array, "A"]:
    """Posterior mean under guesses tilted by one gradient of the energy.

    Exact as t -> 0, where the tilt alone is the answer (as in idem_score),
    and accurate at large t (as box_score); one gradient instead of K.

    Args and Returns: as idem_score, for the target of box_score.
    """
    near = jnp.clip(a_t / sde.mean(t), -1, 1)
    slope = tilt(jax.grad(energy)(near), t, sde)
    uniforms = lattice(key, num_samples, a_t.shape[-1])
    proposals = box_proposals(uniforms, a_t, t, sde, slope)
    energies = evaluate(energy, proposals.actions, chunk)
    return posterior_mean_score(proposals, energies, a_t, t, sde)
