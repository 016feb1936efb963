"""MeanFlow: one step instead of many.

Exported by tools/export.py from book/theory/meanflow.md; edit the chapter.
"""

__all__ = [
    "AverageVelocity",
    "one_step",
    "target",
    "semigroup_target",
    "lagrangian_target",
    "correction_target",
]

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

AverageVelocity = Callable  # u(a [A], r, t) -> [A]


# %% The average velocity
def one_step(u: AverageVelocity, noise) -> Float[Array, "A"]:
    """The policy's map from noise to action: a = noise - u(noise, 0, 1).

    Section 3.4 of the paper.

    Args:
        u: average velocity, maps (a [A], r, t) to [A].
        noise: a_1, a draw from the prior, [A].

    Returns:
        Action a_0, [A], in action units; nothing confines it to the box.
    """
    return noise - u(noise, jnp.zeros(()), jnp.ones(()))


# %% Move the start: the Eulerian target
def target(u: AverageVelocity, velocity, a_t, r, t) -> Float[Array, "A"]:
    """MeanFlow's regression target: the right-hand side of Equation (7).

    u_tgt = v - (t - r) (v . d_a u + d_t u), gradient stopped.

    Args:
        u: average velocity, maps (a [A], r, t) to [A].
        velocity: v(a_t, t), [A].
        a_t: point at time t, [A].
        r: end of the interval, scalar with r <= t.
        t: start of the interval, scalar.

    Returns:
        Target for u(a_t, r, t), [A]; at r = t it is the velocity.
    """
    one, zero = jnp.ones_like(t), jnp.zeros_like(r)
    _, du_dt = jax.jvp(u, (a_t, r, t), (velocity, zero, one))
    return jax.lax.stop_gradient(velocity - (t - r) * du_dt)


# %% Two jumps: the semigroup target
def semigroup_target(u: AverageVelocity, a_t, r, s, t) -> Float[Array, "A"]:
    """Two shorter jumps, t to s to r, averaged over the long one.

    (t-r) u(a_t,r,t) = (t-s) u(a_t,s,t) + (s-r) u(a_s,r,s), with
    a_s = a_t - (t-s) u(a_t,s,t). Needs anchors u(a,t,t) = v elsewhere.

    Args:
        u: average velocity, maps (a [A], r, t) to [A].
        a_t: point at time t, [A].
        r: end of the second jump, scalar.
        s: time between the jumps, scalar with r <= s <= t.
        t: start of the first jump, scalar.

    Returns:
        Target for u(a_t, r, t), [A], gradient stopped.
    """
    first = u(a_t, s, t)
    second = u(a_t - (t - s) * first, r, s)
    share = (t - s) / jnp.maximum(t - r, 1e-6)
    return jax.lax.stop_gradient(share * first + (1 - share) * second)


# %% Move the end: the Lagrangian target
def lagrangian_target(
    u: AverageVelocity, velocity_fn: Callable, a_t, r, t
) -> Float[Array, "A"]:
    """Ask the end of the jump to move with the flow; no spatial derivative.

    X_r = a_t - (t-r) u(a_t,r,t) must satisfy dX_r/dr = v(X_r, r), hence
    u = v(X_r, r) + (t-r) d_r u. At r = t it is the anchor u = v(a_t, t).

    Args:
        u: average velocity, maps (a [A], r, t) to [A].
        velocity_fn: v, maps (a [A], t) to [A]; asked at (X_r, r) only.
        a_t: point at time t, [A].
        r: end of the interval, scalar with r <= t.
        t: start of the interval, scalar.

    Returns:
        Target for u(a_t, r, t), [A], gradient stopped.
    """
    average, du_dr = jax.jvp(
        lambda r: u(a_t, r, t), (r,), (jnp.ones_like(r),)
    )
    end = a_t - (t - r) * average
    return jax.lax.stop_gradient(velocity_fn(end, r) + (t - r) * du_dr)


# %% Let the flow finish: the endpoint correction
def correction_target(
    u: AverageVelocity, velocity_fn: Callable, a_1, s, num_steps: int = 2
) -> Float[Array, "A"]:
    """The network's jump 1 to s, then Euler steps of the flow to 0.

    A target for u(a_1, 0, 1) alone; needs other rows that teach the jump
    from 1 to s.

    Args:
        u: average velocity, maps (a [A], r, t) to [A].
        velocity_fn: v, maps (a [A], t) to [A]; asked num_steps times, at
            times from s down to s / num_steps.
        a_1: draw from the prior, [A].
        s: time where the flow takes over, scalar in (0, 1).
        num_steps: number of Euler steps from s to 0.

    Returns:
        Target for u(a_1, 0, 1), [A], gradient stopped.
    """
    a, step = a_1 - (1 - s) * u(a_1, s, jnp.ones_like(s)), s / num_steps
    for i in range(num_steps):
        a -= step * velocity_fn(a, s - i * step)
    return jax.lax.stop_gradient(a_1 - a)
