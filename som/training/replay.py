"""Replay.

Exported by tools/export.py from book/training/replay.md; edit the chapter.
"""

__all__ = [
    "Replay",
    "init",
    "pack",
    "unpack",
    "add",
    "draw",
]

# %% Imports
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from som.agent.critic import Transition


# %% One array for everything
class Replay(NamedTuple):
    """Ring buffer of transitions, one packed row each, on the device.

    rows [C, D] with D = 2 O + A + 2, Equation (eq-replay-width) of the
    chapter, and A more with guides; added counts all rows ever written
    (below 2^31).
    """

    rows: Float[Array, "C D"]
    added: Int[Array, ""]


def init(
    capacity: int,
    observation_size: int,
    action_size: int,
    guided: bool = False,
) -> Replay:
    """An empty buffer.

    Args:
        capacity: C, the most rows it holds.
        observation_size: O.
        action_size: A.
        guided: whether each row ends with a guide.

    Raises:
        ValueError: capacity is below one.
    """
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}; at least 1 is wanted")
    width = 2 * observation_size + (1 + guided) * action_size + 2
    return Replay(jnp.zeros((capacity, width)), jnp.zeros((), jnp.int32))


def pack(batch: Transition) -> Float[np.ndarray, "... D"]:
    """Transitions side by side in one float32 array, on the host.

    Args:
        batch: transitions with any leading axes, NumPy arrays.

    Returns:
        Rows [..., D] in the order s, a, r, terminated, s', guide.
    """
    parts = [batch.observation, batch.action, batch.reward[..., None]]
    parts += [batch.terminated[..., None], batch.next_observation]
    parts += [batch.guide] * (not isinstance(batch.guide, tuple))
    return np.concatenate([np.asarray(p, np.float32) for p in parts], -1)


def unpack(
    rows: Float[Array, "... D"], action_size: int, guided: bool = False
) -> Transition:
    """Undo pack; the observation size follows from the width.

    Args:
        rows: packed rows [..., D].
        action_size: A.
        guided: whether each row ends with a guide.

    Returns:
        The transitions; terminated is 0.0 or 1.0.
    """
    O = (rows.shape[-1] - (1 + guided) * action_size - 2) // 2
    cuts = np.cumsum([O, action_size, 1, 1, O])
    s, a, r, ended, after, guide = jnp.split(rows, cuts, -1)
    extra = guide if guided else ()
    return Transition(s, a, r[..., 0], ended[..., 0], after, extra)


# %% A ring
def add(replay: Replay, rows: Float[Array, "n D"]) -> Replay:
    """Write rows over the oldest ones, Equation (eq-replay-place).

    Under jit with the buffer donated, the write happens in place.

    Args:
        replay: the buffer.
        rows: n packed rows, oldest first, n at most the capacity.

    Raises:
        ValueError: more rows than the buffer holds.
    """
    capacity = len(replay.rows)
    if len(rows) > capacity:
        raise ValueError(
            f"{len(rows)} rows are given to a buffer of {capacity}; "
            "at most that many are wanted"
        )
    places = (replay.added + jnp.arange(len(rows))) % capacity
    return Replay(replay.rows.at[places].set(rows), replay.added + len(rows))


# %% Uniform, with replacement
def draw(replay: Replay, key: jax.Array, num: int) -> Int[Array, "B"]:
    """Draw places uniformly, with replacement, from those written.

    Args:
        replay: a buffer with at least one row.
        key: random key.
        num: B, rows to draw.

    Returns:
        Places [B]: a batch is replay.rows[draw(replay, key, num)].
    """
    filled = jnp.minimum(replay.added, len(replay.rows))
    return jax.random.randint(key, (num,), 0, filled)
