"""The score from the critic.

Exported by tools/export.py from book/theory/score.md; edit the chapter.
"""

__all__ = [
    "Energy",
    "gaussian_proposals",
    "weighted_gradient",
    "evaluate",
    "idem_score",
    "MIN_STD",
    "TAIL",
    "kernel_at",
    "Proposals",
    "box_proposals",
    "posterior_mean_score",
    "lattice",
    "box_score",
    "REACH",
    "tilt",
    "combined_score",
    "fit_slope",
    "shared_score",
    "guesses_near",
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
def gaussian_proposals(
    key: jax.Array, a_t: Float[Array, "A"], t, sde: SDE, num_samples: int
) -> Float[Array, "K A"]:
    """Guesses of the clean action: a_0|t ~ N(a_t/m, sigma^2/m^2 I).

    Args:
        key: random key.
        a_t: noisy action, [A].
        t: diffusion time, scalar in [0, 1].
        sde: forward SDE.
        num_samples: K, the number of guesses.

    Returns:
        Guesses, [K, A]; many lie outside the action box when t is large.
    """
    noise = jax.random.normal(key, (num_samples, *a_t.shape))
    return (a_t + sde.std(t) * noise) / sde.mean(t)


def weighted_gradient(
    energies: Float[Array, "K"], gradients: Float[Array, "K A"], t, sde: SDE
) -> Float[Array, "A"]:
    """Equation (5) written out: sum_i softmax_i(energy) grad_i / m(t).

    Args:
        energies: alpha * Q at the guesses, [K].
        gradients: gradients of the energy at the guesses, [K, A].
        t: diffusion time, scalar in [0, 1].
        sde: forward SDE.

    Returns:
        Estimate of the score, [A].
    """
    return jax.nn.softmax(energies) @ gradients / sde.mean(t)


def evaluate(function: Callable, guesses: Float[Array, "K A"], chunk: int):
    """Apply a function to each guess, `chunk` of them at once (0: all).

    Memory grows with chunk instead of K; the values are the same.
    """
    return jax.lax.map(function, guesses, batch_size=chunk or len(guesses))


def idem_score(
    energy: Energy,
    a_t: Float[Array, "A"],
    t,
    sde: SDE,
    key: jax.Array,
    num_samples: int,
    chunk: int = 0,
) -> Float[Array, "A"]:
    """Monte Carlo score of p_t, exactly as in Equation (5) of the paper.

    Args:
        energy: alpha * Q, maps [..., A] to [...]; also asked outside the box.
        a_t: noisy action, [A].
        t: diffusion time, scalar in [0, 1].
        sde: forward SDE.
        key: random key.
        num_samples: K, the number of guesses.
        chunk: guesses evaluated at once, 0 for all; bounds the memory.

    Returns:
        Estimate of the gradient of log p_t at a_t, [A]; its error falls as
        1/sqrt(K) and grows quickly with t.
    """
    guesses = gaussian_proposals(key, a_t, t, sde, num_samples)
    with_gradient = jax.value_and_grad(energy)
    energies, gradients = evaluate(with_gradient, guesses, chunk)
    return weighted_gradient(energies, gradients, t, sde)


# %% Guesses that stay in the box
MIN_STD = 1e-3  # of the kernel, in units of the action
TAIL = 10.0  # deviations beyond which a tail is taken as exponential


def kernel_at(t, sde: SDE) -> tuple[Array, Array]:
    """The kernel's m(t), and sigma(t) but not below MIN_STD."""
    return sde.mean(t), jnp.maximum(sde.std(t), MIN_STD)


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
    uniforms: Float[Array, "K A"],
    a_t: Float[Array, "A"],
    t,
    sde: SDE,
    slope: Float[Array, "A"],
) -> Proposals:
    """N(a_t/m + s^2 slope, s^2 I) cut off at the box, with s = sigma/m.

    Args:
        uniforms: numbers in [0, 1], [K, A], one for each coordinate.
        a_t: noisy action, [A]; may lie far outside the box.
        t: diffusion time, scalar in [0, 1].
        sde: forward SDE.
        slope: tilt of the guesses, per unit of action, [A]; may be zero.

    Returns:
        K guesses in the box, their exact mean and their log-tilt.
    """
    mean, std = kernel_at(t, sde)
    scale = std / mean
    centre = a_t / mean + scale**2 * slope
    side = jnp.where(centre < 0, -1.0, 1.0)  # the wall nearer to the centre
    wall = (1 - jnp.abs(centre)) / scale  # and its distance, in deviations
    high = jnp.maximum(wall, -TAIL)
    stretch = jnp.maximum(-wall / TAIL, 1.0)
    low = high - 2 * stretch / scale
    p_low, p_high = ndtr(low), ndtr(high)
    mass = jnp.maximum(p_high - p_low, 1e-35)
    uniforms = jnp.clip(uniforms, 1e-6, 1 - 1e-6)
    z = ndtri(p_low + uniforms * mass)
    bend = jnp.exp(-0.5 * low**2) - jnp.exp(-0.5 * high**2)
    mean_z = bend / (mass * np.sqrt(2 * np.pi))

    def place(z):
        return side * jnp.clip(1 + scale * (z - high) / stretch, -1, 1)

    actions = place(z)
    return Proposals(actions, place(mean_z), actions @ slope)


def posterior_mean_score(
    proposals: Proposals,
    energies: Float[Array, "K"],
    a_t: Float[Array, "A"],
    t,
    sde: SDE,
) -> Float[Array, "A"]:
    """(m E[a_0 | a_t] - a_t) / sigma^2, the mean taken over the guesses.

    Args:
        proposals: guesses from box_proposals, K of them.
        energies: alpha * Q at the guesses, [K].
        a_t: noisy action, [A].
        t: diffusion time, scalar in [0, 1].
        sde: forward SDE.

    Returns:
        Estimate of the score, [A]; exact when the energy is constant, or
        linear with the proposals' slope.
    """
    mean, std = kernel_at(t, sde)
    weights = jax.nn.softmax(energies - proposals.log_tilt)
    excess = weights - 1 / len(weights)
    a_0 = proposals.mean + excess @ proposals.actions
    return (mean * a_0 - a_t) / std**2


# %% Evenly spread guesses
def lattice(
    key: jax.Array, num_samples: int, size: int
) -> Float[Array, "K A"]:
    """Evenly spread uniforms: a lattice with a random shift.

    Args:
        key: random key of the shift.
        num_samples: K, the number of points.
        size: A, the number of coordinates of a point.

    Returns:
        Points of the unit cube, [K, A], each uniformly distributed.
    """
    root = 2.0
    for _ in range(60):  # converges to the root of x^A = x + 1
        root = (1 + root) ** (1 / size)
    generator = np.append(1 / num_samples, root ** -np.arange(1.0, size))
    points = np.arange(num_samples)[:, None] * generator % 1
    shift = jax.random.uniform(key, (size,))
    return (jnp.asarray(points, jnp.float32) + shift) % 1


def box_score(
    energy: Energy,
    a_t: Float[Array, "A"],
    t,
    sde: SDE,
    key: jax.Array,
    num_samples: int,
    chunk: int = 0,
) -> Float[Array, "A"]:
    """Monte Carlo score of exp(energy) 1[-1,1]^A diffused to time t.

    The posterior mean over evenly spread guesses. Needs values of the
    energy inside the box only, and no gradient.

    Args:
        energy: alpha * Q, maps [..., A] to [...].
        a_t: noisy action, [A].
        t: diffusion time, scalar in [0, 1].
        sde: forward SDE.
        key: random key.
        num_samples: K, the number of guesses.
        chunk: guesses evaluated at once, 0 for all; bounds the memory.

    Returns:
        Estimate of the gradient of log p_t at a_t, [A].
    """
    uniforms = lattice(key, num_samples, a_t.shape[-1])
    proposals = box_proposals(uniforms, a_t, t, sde, jnp.zeros_like(a_t))
    energies = evaluate(energy, proposals.actions, chunk)
    return posterior_mean_score(proposals, energies, a_t, t, sde)


# %% One gradient tilts them all
REACH = 0.3  # action distance over which an energy is about linear


def tilt(
    gradient: Float[Array, "... A"], t, sde: SDE, reach: float = REACH
) -> Float[Array, "... A"]:
    """How far to tilt the guesses towards a gradient of the energy.

    Args:
        gradient: gradient of the energy at the centre of the guesses,
            moved into the box, [..., A].
        t: diffusion time, scalar in [0, 1].
        sde: forward SDE.
        reach: action distance over which the energy is about linear.

    Returns:
        Slope for box_proposals, [..., A]: the full gradient where the
        kernel is narrower than `reach`, fading as the square beyond it. A
        coordinate of the centre never moves by more than one deviation s.
    """
    mean, std = kernel_at(t, sde)
    scale = std / mean
    slope = gradient / (1 + (scale / reach) ** 2)
    return jnp.clip(slope, -1 / scale, 1 / scale)


# %% The combined estimator
def combined_score(
    energy: Energy,
    a_t: Float[Array, "A"],
    t,
    sde: SDE,
    key: jax.Array,
    num_samples: int,
    chunk: int = 0,
) -> Float[Array, "A"]:
    """Posterior mean under evenly spread guesses, tilted by one gradient.

    For the target of box_score: exact as t -> 0, where the tilt alone is
    the answer (as in idem_score), accurate at large t (as box_score).

    Args:
        energy: alpha * Q, maps [..., A] to [...].
        a_t: noisy action, [A].
        t: diffusion time, scalar in [0, 1].
        sde: forward SDE.
        key: random key.
        num_samples: K, the number of guesses.
        chunk: guesses evaluated at once, 0 for all; bounds the memory.

    Returns:
        Estimate of the gradient of log p_t at a_t, [A].
    """
    near = jnp.clip(a_t / sde.mean(t), -1, 1)
    slope = tilt(jax.grad(energy)(near), t, sde)
    uniforms = lattice(key, num_samples, a_t.shape[-1])
    proposals = box_proposals(uniforms, a_t, t, sde, slope)
    energies = evaluate(energy, proposals.actions, chunk)
    return posterior_mean_score(proposals, energies, a_t, t, sde)


# %% A plane through them
def fit_slope(
    actions: Float[Array, "K A"],
    energies: Float[Array, "K"],
    ridge: float = 0.1,
) -> Float[Array, "A"]:
    """Slope of the plane through the energies of a state's guesses.

    Args:
        actions: the guesses, [K, A]; any K > 1, any distribution.
        energies: alpha * Q at the guesses, [K].
        ridge: added to the variances, in units of their mean.

    Returns:
        Least-squares slope, [A], times the share of the variance that the
        plane through the other guesses predicts of each one (0 to 1).
    """
    num, size = actions.shape
    x, y = actions - jnp.mean(actions, 0), energies - jnp.mean(energies)
    cov = x.T @ x / num
    cov += (ridge * jnp.trace(cov) / size + 1e-6) * jnp.eye(size)
    back = jnp.linalg.solve(cov, x.T) / num  # [A, K]
    slope = back @ y
    leverage = jnp.sum(back * x.T, 0) + 1 / num
    missed = (y - x @ slope) / jnp.maximum(1 - leverage, 0.01)
    by_mean = y / (1 - 1 / num)  # what the mean of the others misses
    unexplained = jnp.sum(missed**2) / jnp.maximum(jnp.sum(by_mean**2), 1e-9)
    return slope * jnp.maximum(1 - unexplained, 0)


def shared_score(
    energy: Energy,
    slope: Float[Array, "A"],
    a_t: Float[Array, "A"],
    t,
    sde: SDE,
) -> Float[Array, "A"]:
    """Score from one gradient and a slope that the whole state shares.

    The exact posterior mean for an energy of constant slope: the gradient
    near a_t where the kernel is narrow, the shared slope where it is wide.

    Args:
        energy: alpha * Q, maps [..., A] to [...]; asked for one gradient.
        slope: of the state's energies around the policy, from fit_slope.
        a_t: noisy action, [A].
        t: diffusion time, scalar in [0, 1].
        sde: forward SDE.

    Returns:
        Estimate of the gradient of log p_t at a_t, [A]; its error does not
        vanish as guesses are added.
    """
    mean, std = kernel_at(t, sde)
    near = jnp.clip(a_t / sde.mean(t), -1, 1)
    wide = 1 / (1 + (REACH * mean / std) ** 2)
    slope = tilt(jax.grad(energy)(near), t, sde) + wide * slope
    middle = jnp.full((1, len(a_t)), 0.5)
    a_0 = box_proposals(middle, a_t, t, sde, slope).mean
    return (mean * a_0 - a_t) / std**2


def guesses_near(
    key: jax.Array,
    actions: Float[Array, "J A"],
    num_samples: int,
    width: float = 0.5,
) -> Float[Array, "K A"]:
    """Evenly spread guesses around given actions, inside the box.

    Args:
        key: random key of the lattice.
        actions: centres in the box, [J, A], taken in turn.
        num_samples: K, the number of guesses.
        width: deviation of the normal around each centre.

    Returns:
        Guesses in the box, [K, A].
    """
    centre = actions[jnp.arange(num_samples) % len(actions)]
    uniforms = lattice(key, num_samples, actions.shape[-1])
    low, high = ndtr((-1 - centre) / width), ndtr((1 - centre) / width)
    uniforms = jnp.clip(uniforms, 1e-6, 1 - 1e-6)
    z = ndtri(low + uniforms * (high - low))
    return jnp.clip(centre + width * z, -1, 1)
