"""Checkpoints.

Exported by tools/export.py from book/training/checkpoints.md; edit the chapter.
"""

__all__ = [
    "save_checkpoint",
    "check_sound",
    "load_checkpoint",
    "save_packed",
    "load_packed",
    "refill",
]

# %% Imports
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from som.training import records, replay
from som.training.loop import (
    REFILL,
    Trainer,
    check_finite,
    collect,
    fold,
    store,
)


# %% A whole checkpoint
def _contents(trainer: Trainer, buffer, rows, envs=None) -> dict[str, Any]:
    """What a checkpoint holds, with these rows of the buffers."""
    return {
        "state": trainer.state,
        "buffer": buffer._replace(rows=rows),
        "rows": trainer.rows,
        "envs": envs or [env.state() for env in trainer.envs],
        **_seen(trainer, slice(None)),
    }


def _seen(trainer: Trainer, seeds) -> dict[str, Any]:
    """What some seeds have seen, if that counts."""
    if trainer.seen is None:
        return {}
    return {"seen": jax.tree.map(lambda x: x[seeds], trainer.seen)}


def _metadata(trainer: Trainer) -> dict[str, Any]:
    names = "chunk", "seconds", "curve", "slices"
    return {name: getattr(trainer, name) for name in names}


def save_checkpoint(trainer: Trainer, buffer, path: Path, envs=None) -> None:
    """Write all that resume needs, atomically; only the filled rows.

    Args:
        trainer: at the end of a chunk.
        buffer: its replay buffers.
        path: the file.
        envs: states of the environments, if not those that they are in.

    Raises:
        records.CheckpointError: it cannot be written; an old one is intact.
    """
    rows = _filled(trainer, buffer)
    metadata = {"filled": rows.shape[1]} | _metadata(trainer)
    records.save(path, _contents(trainer, buffer, rows, envs), metadata)


def _filled(trainer: Trainer, buffer) -> np.ndarray:
    filled = min(int(buffer.added[0]), trainer.loop.capacity)
    return np.asarray(buffer.rows)[:, :filled]  # a view, on a CPU


def check_sound(trainer: Trainer, buffer) -> None:
    """Refuse to save a number that is not finite.

    Args:
        trainer: at the end of a chunk.
        buffer: its replay buffers.

    Raises:
        FloatingPointError: there is one in the state or in the replay.
    """
    check_finite(trainer, {})
    for name, rows in (
        ("the replay", _filled(trainer, buffer)),
        ("the last experience", trainer.rows),
    ):
        if rows.size and not np.isfinite([rows.min(), rows.max()]).all():
            raise FloatingPointError(
                f"{name} is not finite at step {trainer.steps}: nothing is "
                "saved"
            )


def load_checkpoint(trainer: Trainer, path: Path):
    """Bring a fresh trainer to where a checkpoint was.

    Args:
        trainer: made of the same configuration; changed.
        path: the file.

    Returns:
        The replay buffers.

    Raises:
        records.CheckpointError: not a checkpoint of this run.
    """
    filled = records.read_metadata(path).get("filled", 0)
    if not (type(filled) is int and 0 <= filled <= trainer.loop.capacity):
        raise records.CheckpointError(
            f"{path} is a checkpoint of another size: it has {filled!r:.40} "
            "rows of experience"
        )
    empty = trainer.empty_buffer()
    shape = len(trainer.seeds), filled, trainer.rows.shape[-1]
    rows = jax.ShapeDtypeStruct(shape, jnp.float32)
    tree, metadata = records.load(path, _contents(trainer, empty, rows))
    kept = tree["buffer"].rows, tree["rows"]
    _restore(trainer, tree["state"], tree["envs"], metadata, kept)
    trainer.seen = tree.get("seen")
    trainer.rows = tree["rows"]
    return replay.Replay(
        _fill(empty.rows, tree["buffer"].rows),
        jnp.asarray(tree["buffer"].added),
    )


def _restore(trainer: Trainer, state, envs, metadata, rows=()) -> None:
    kinds = {name: type(new) for name, new in _metadata(trainer).items()}
    missing = [
        name
        for name, kind in kinds.items()
        if not isinstance(metadata.get(name), kind)
    ]
    if missing:
        raise records.CheckpointError(
            f"the checkpoint lacks {', '.join(missing)}: another version of "
            "som wrote it; begin the run anew"
        )
    floats = [
        np.asarray(x)
        for x in jax.tree.leaves((state, envs, rows))
        if x.dtype.kind == "f"
    ]
    if not all(np.isfinite(x).all() for x in floats):
        raise records.CheckpointError(
            "the checkpoint holds a number that is not finite"
        )
    trainer.state = jax.tree.map(jnp.asarray, state)
    pairs = zip(trainer.envs, envs, strict=True)
    trainer.observation = np.stack([env.restore(old) for env, old in pairs])
    for name in _metadata(trainer):
        setattr(trainer, name, metadata[name])


@partial(jax.jit, donate_argnums=0)
def _fill(rows, old):
    return rows.at[:, : old.shape[1]].set(old)


# %% A packed checkpoint
def _halve(x):
    """The bits of a bfloat16 for a float32; anything else as it is."""
    if x.dtype != np.float32:
        return x
    return np.asarray(jnp.asarray(x, jnp.bfloat16)).view(np.uint16)


def _widen(x):
    """What _halve kept, as float32: the lower half of its bits is zero."""
    if x.dtype != np.uint16:
        return x
    return (x.astype(np.uint32) << 16).view(np.float32)


def _moments(state, change):
    """The state with the numbers of its optimisers changed."""
    names = [name for name in state._fields if name.endswith("_opt")]
    new = {n: jax.tree.map(change, getattr(state, n)) for n in names}
    return state._replace(**new)


def _one_seed(trainer: Trainer, i: int) -> dict[str, Any]:
    """What the packed checkpoint of a seed holds."""
    state = trainer.state
    pick = jax.tree.map(lambda x: x[i], state._replace(step=()))
    pick = _moments(pick._replace(step=state.step), _halve)
    envs = trainer.envs[i].state()
    return {"state": pick, "envs": envs, **_seen(trainer, i)}


def save_packed(trainer: Trainer, out: Path) -> None:
    """Write packed-SEED.npz for every seed: all but the replay.

    Args:
        trainer: at the end of a chunk.
        out: the run's folder.

    Raises:
        records.CheckpointError: one cannot be written.
    """
    for i, seed in enumerate(trainer.seeds):
        path = out / f"packed-{seed}.npz"
        records.save(path, _one_seed(trainer, i), _metadata(trainer))


def load_packed(trainer: Trainer, out: Path):
    """Bring a fresh trainer to where a packed checkpoint was.

    Args:
        trainer: made of the same configuration; changed.
        out: the run's folder.

    Returns:
        Replay buffers that the current policy has filled again.

    Raises:
        records.CheckpointError: a seed's file is missing, of another run,
            or of another step than the others.
    """
    trees, chunks = [], set()
    metadata: dict[str, Any] = {}
    for i, seed in enumerate(trainer.seeds):
        path = out / f"packed-{seed}.npz"
        tree, metadata = records.load(path, _one_seed(trainer, i))
        trees.append(tree)
        chunks.add(metadata["chunk"])
    if len(chunks) > 1:
        raise records.CheckpointError(
            f"the packed checkpoints in {out} are of different chunks: "
            f"{sorted(chunks)}"
        )
    states = [tree["state"] for tree in trees]
    state = jax.tree.map(lambda *x: np.stack(x), *states)
    state = _moments(state._replace(step=states[0].step), _widen)
    _restore(trainer, state, [tree["envs"] for tree in trees], metadata)
    if trainer.seen is not None:
        parts = [tree["seen"] for tree in trees]
        trainer.seen = jax.tree.map(lambda *x: np.stack(x), *parts)
    return refill(trainer)


def refill(trainer: Trainer):
    """Replay buffers with fresh rows of the current policy.

    Args:
        trainer: its environments move on; its last rows are pending.
    """
    buffer, size = trainer.empty_buffer(), trainer.rows.shape[1]
    wanted = min(trainer.steps, trainer.loop.warmup)
    for i in range(max(1, -(-wanted // size))):
        if i:
            buffer = store(buffer, trainer.rows)
        keys = fold(trainer.key(REFILL, trainer.chunk), i)
        trainer.rows = collect(trainer, trainer.state, keys)
        trainer.refilled += size
    return buffer
