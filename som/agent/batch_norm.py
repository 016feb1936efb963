"""A critic that learns from little.

Exported by tools/export.py from book/agent/batch_norm.md; edit the chapter.
"""

__all__ = [
    "Pairs",
    "joint_pass",
]

# %% Imports
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


# %% Two populations
Pairs = tuple[Float[Array, "B O"], Float[Array, "B A"]]


def joint_pass(net: Any, critic: Any, now: Pairs, after: Pairs):
    """Both pairs of the Bellman equation as one batch of 2 B rows.

    Equation (eq-batch-norm-joint).

    Args:
        net: a `Critic` with batch_norm.
        critic: its parameters and running statistics.
        now: states and actions (s, a), [B, O] and [B, A].
        after: what followed, (s', a'), of the same shapes.

    Returns:
        Mean and std at (s, a), [B, 2] each; the same at (s', a'); and the
        running statistics after this batch, as {"batch_stats": ...}.
    """
    glued = [jnp.concatenate(both) for both in zip(now, after, strict=True)]
    both, stats = net.clone(training=True).apply(
        critic, *glued, mutable=["batch_stats"]
    )
    size = len(now[0])
    here, there = (
        jax.tree.map(lambda x: x[half], both)
        for half in (slice(None, size), slice(size, None))
    )
    return here, there, stats
