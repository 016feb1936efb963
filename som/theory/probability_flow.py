"""The probability flow.

Exported by tools/export.py from book/theory/probability_flow.md; edit the chapter.
"""

__all__ = [
    "velocity",
    "integrate",
    "unit_rescale",
]

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from som.theory.sde import SDE


# %% The velocity
def velocity(score, a_t, t, sde: SDE) -> Float[Array, "... A"]:
    """Probability-flow velocity, Equation (2); for VP it is Equation (6).

    Args:
        score: gradient of log p_t at a_t, [..., A].
        a_t: noisy action, [..., A].
        t: diffusion time, a scalar or [..., 1].
        sde: forward SDE.

    Returns:
        da_t/dt along the flow, [..., A], in action units per unit of time.
    """
    return sde.drift(a_t, t) - 0.5 * sde.diffusion_squared(t) * score


# %% Following the flow
def integrate(
    velocity_fn: Callable, a_1: Float[Array, "... A"], num_steps: int
) -> Float[Array, "... A"]:
    """Follow da/dt = velocity_fn(a, t) from t = 1 to t = 0 (Heun's method).

    Args:
        velocity_fn: maps (a [..., A], t scalar) to [..., A].
        a_1: where to start, [..., A].
        num_steps: number of equal steps; the error falls as its square.

    Returns:
        Where the flow is at t = 0, [..., A].

    Raises:
        ValueError: num_steps is below one.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; at least 1 is wanted")
    dt = 1.0 / num_steps

    def step(i, a):
        t = 1.0 - i * dt
        v = velocity_fn(a, t)
        v_end = velocity_fn(a - dt * v, t - dt)
        return a - 0.5 * dt * (v + v_end)

    return jax.lax.fori_loop(0, num_steps, step, a_1)


# %% Unit rescaling
def unit_rescale(score, w, eps=1e-8) -> Float[Array, "... A"]:
    """Keep the direction of each score, give it length w: Equation (8).

    Args:
        score: [..., A]; each vector along the last axis is one sample.
        w: length wanted.
        eps: keeps a vanishing score finite; scores well below it keep
            their size, times w / eps.

    Returns:
        Rescaled score, [..., A].
    """
    norm = jnp.linalg.norm(score, axis=-1, keepdims=True)
    return w * score / (norm + eps)
