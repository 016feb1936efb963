"""Rewards that lie.

Exported by tools/export.py from book/studies/robustness.md; edit the chapter.
"""

__all__ = [
    "CONDITIONS",
    "TIMES",
    "SIDE",
    "stages",
    "log_kernel",
    "smoothed_q",
    "posterior_mean",
]

# %% Imports
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from som.studies.bandit import Sampler
from som.studies.landscapes import (
    METHODS,
    Landscape,
    Study,
    rounded,
    tally,
)
from som.theory.boltzmann import box_grid
from som.theory.sde import SDE
from som.training.command_line import STUDIES


# %% Two ways to lie
CONDITIONS: dict[str, dict[str, Any]] = {
    "clean": {},
    "noise 0.2": {"noise": 0.2},
    "noise 0.3": {"noise": 0.3},
    "noise 2": {"noise": 2.0},
    "noise 3": {"noise": 3.0},
    "bump 0.5, 0.3": {"bump": [0.5, 0.3]},
    "bump 1, 0.1": {"bump": [1.0, 0.1]},
    "bump 1, 0.3": {"bump": [1.0, 0.3]},
}  # what is told to fit; a bump is (c, sigma)


# %% The study
TIMES = (0.75, 0.5, 0.25, 0.0)
SIDE = 40  # cells along each axis of a kept landscape


def stages(fits: list[Sampler], scape: Landscape, num: int = 200) -> dict:
    """Of the first seed: Q over the box, and actions at four times."""
    first = fits[0]
    noise = first.prior(jax.random.PRNGKey(9), num)
    q, places = first.q(box_grid(SIDE)), first.at(noise, TIMES)
    return {"q": rounded(q), "places": rounded(places)}


STUDIES["robustness"] = Study(
    {
        f"{algo}, {name}": METHODS[algo]
        | {"landscape": "eight-modes", "steps": 2500}
        | condition
        for name, condition in CONDITIONS.items()
        for algo in ("som", "sdac", "mfp")
    },
    (tally, stages),
)


# %% The kernel that smooths
def log_kernel(size: int, t, sde: SDE) -> Float[Array, "P P"]:
    """Log-weights of the cells a_0 (columns) seen from a_t = m a (rows).

    Args:
        size: cells along each axis, G; there are P = G * G.
        t: diffusion time, scalar.
        sde: forward SDE.
    """
    points = box_grid(size).reshape(-1, 2)
    gap = jnp.sum((points[:, None] - points[None]) ** 2, -1)
    width = sde.std(t) / sde.mean(t)
    return jax.nn.log_softmax(-0.5 * gap / width**2, axis=-1)


def smoothed_q(
    q: Float[Array, "G G"], factor: float, t, sde: SDE
) -> Float[Array, "G G"]:
    """Q seen through the kernel: Q_t / factor at m(t) times the grid.

    Args:
        q: values at box_grid(G).
        factor: lambda, the inverse temperature.
        t: diffusion time, scalar.
        sde: forward SDE.

    Returns:
        Free energy in units of q, [G, G], by quadrature over the cells.
    """
    logits = log_kernel(len(q), t, sde) + factor * q.reshape(-1)
    return jax.nn.logsumexp(logits, axis=-1).reshape(q.shape) / factor


def posterior_mean(
    error: Float[Array, "G G"], q: Float[Array, "G G"], factor, t, sde: SDE
) -> Float[Array, "G G"]:
    """Mean of error(a_0) given a_t, where p_0 is exp(factor * q): [G, G]."""
    logits = log_kernel(len(q), t, sde) + factor * q.reshape(-1)
    return (jax.nn.softmax(logits) @ error.reshape(-1)).reshape(q.shape)
