"""Runs.

Exported by tools/export.py from book/training/runs.md; edit the chapter.
"""

__all__ = [
    "interruptible",
    "make_record",
    "save_all",
    "EVALUATION_SEED",
    "evaluate_now",
    "Run",
    "begin_slice",
    "finish",
    "train",
    "is_finished",
    "resume",
]

# %% Imports
import json
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from som.training import records
from som.training.checkpoints import (
    load_checkpoint,
    load_packed,
    save_checkpoint,
    save_packed,
)
from som.training.loop import Trainer, make_config, run_chunk
from som.training.policy import Policy, evaluate, load, save_policy


# %% Ctrl-C
@contextmanager
def interruptible():
    """Yield an event that Ctrl-C sets; a second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


# %% The folder of a run
def make_record(trainer: Trainer) -> dict[str, Any]:
    """The run record as it stands, exactly as JSON gives it back."""
    config = trainer.config
    record = {
        **{
            k: config[k] for k in ("algo", "env", "profile", "seeds", "steps")
        },
        "config": {
            "agent": asdict(trainer.agent.config),
            "loop": asdict(trainer.loop),
        },
        "curve": trainer.curve,
        "slices": trainer.slices,
        "provenance": records.provenance(),
        "wall_seconds": trainer.seconds,
    }
    return json.loads(json.dumps(record))


def save_all(trainer: Trainer, buffer, out: Path) -> dict[str, Any]:
    """Write checkpoint, policy, learning curve and record.

    Args:
        trainer: at the end of a chunk.
        buffer: its replay buffers.
        out: the run's folder.

    Returns:
        The record.

    Raises:
        records.CheckpointError: something cannot be written; what was
            there before is intact.
    """
    save_checkpoint(trainer, buffer, out / "checkpoint.npz")
    task = trainer.envs[0]
    save_policy(
        out / "policy.npz", trainer.config, trainer.agent, trainer.state,
        task.action_low, task.action_high,
    )  # fmt: skip
    record = make_record(trainer)
    if trainer.curve:
        records.plot_curves([record], out / "learning_curve.png")
    records.write_record(out / "record.json", record)
    return record


EVALUATION_SEED = 1_000_000
"""Added to a seed: evaluation never sees the training episodes."""


def evaluate_now(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Evaluate every seed and append the result to the curve.

    Args:
        trainer: at the end of a chunk.
        metrics: of that chunk, [S] each.
    """
    returns = [
        evaluate(
            trainer.policy(i),
            trainer.config["env"],
            trainer.loop.episodes,
            EVALUATION_SEED + seed,
        ).tolist()
        for i, seed in enumerate(trainer.seeds)
    ]
    trainer.curve.append(
        {
            "step": trainer.steps,
            "updates": int(trainer.state.step),
            "seconds": trainer.seconds,
            "returns": returns,
            "metrics": {
                k: np.asarray(v).tolist() for k, v in metrics.items()
            },
        }
    )


# %% To the end
@dataclass
class Run:
    """What train returns.

    record: the run record, equal to record.json where a folder was given;
    policy: the first seed's policy; out: the run's folder, or None.
    """

    record: dict[str, Any]
    policy: Policy
    out: Path | None


def begin_slice(trainer: Trainer) -> None:
    """Note where, when and with which code the run goes on."""
    where = records.provenance()
    trainer.slices.append(
        {
            "first_step": trainer.steps,
            "refilled": trainer.refilled,
            "seconds": 0.0,
            **{k: where[k] for k in ("commit", "source", "device", "date")},
        }
    )


def finish(
    trainer: Trainer, buffer, out: Path | None, progress, stop_at=np.inf
) -> Run:
    """Run a trainer to its end, evaluating and saving on the way.

    Args:
        trainer: fresh, or from a checkpoint.
        buffer: its replay buffers.
        out: the run's folder, or None to save nothing.
        progress: called as progress(step, metrics) after each chunk.
        stop_at: time.monotonic() after which no chunk begins.

    Raises:
        FloatingPointError: training diverged.
        KeyboardInterrupt: Ctrl-C; everything is saved.
    """
    begin_slice(trainer)
    before = trainer.seconds
    every = trainer.config["steps"] / trainer.loop.evaluations
    start, saved = time.monotonic() - trainer.seconds, time.monotonic()
    record = None
    with interruptible() as stop:
        while trainer.chunk < trainer.chunks:
            done = trainer.steps
            try:
                buffer, metrics = run_chunk(trainer, buffer)
            except FloatingPointError as error:
                kept = _last_checkpoint(trainer, out)
                raise FloatingPointError(f"{error}; {kept}") from None
            last, shown = trainer.chunk == trainer.chunks, dict(metrics)
            if last or trainer.steps // every > done // every:
                evaluate_now(trainer, metrics)
                returns = trainer.curve[-1]["returns"]
                shown["evaluation/return"] = np.mean(returns, axis=1)
            trainer.seconds = time.monotonic() - start
            trainer.slices[-1]["seconds"] = trainer.seconds - before
            if progress:
                progress(min(trainer.steps, trainer.config["steps"]), shown)
            due = time.monotonic() - saved > trainer.loop.checkpoint_seconds
            late = time.monotonic() > stop_at
            if out and (last or due or late or stop.is_set()):
                record = save_all(trainer, buffer, out)
                saved = time.monotonic()
            if stop.is_set() and not last:
                raise KeyboardInterrupt
            if late and not last:
                if out:
                    save_packed(trainer, out)
                break
    if out and not record:  # stopped between its last checkpoint and record
        record = save_all(trainer, buffer, out)
    return Run(record or make_record(trainer), trainer.policy(), out)


def _last_checkpoint(trainer, out):
    path = out / "checkpoint.npz" if out else None
    if path is None or not path.exists():
        return "no checkpoint had been saved"
    step = records.read_metadata(path)["chunk"] * trainer.rows.shape[1]
    return f"the last good checkpoint is {path}, of step {step}"


# %% Train and resume
def train(
    algo: str = "som",
    env: str = "HalfCheetah-v4",
    steps: int = 1_000_000,
    seeds=(0,),
    profile: str = "laptop",
    out=None,
    progress: Callable[[int, dict], None] | None = None,
    time_limit: float = np.inf,
    **overrides,
) -> Run:
    """Train an agent on a task, several seeds side by side.

    Args:
        algo: name of the algorithm, a key of som.AGENTS.
        env: Gymnasium id of a task with a bounded Box of actions.
        steps: environment steps per seed (rounded up to whole chunks).
        seeds: distinct non-negative integers.
        profile: "paper", "laptop", "sample-efficient", ....
        out: folder for checkpoints, policy, record and curve; None: none.
        progress: called as progress(step, metrics) after each chunk.
        time_limit: seconds after which no further chunk begins; resume
            goes on.
        **overrides: fields of the agent's config or of LoopConfig.

    Returns:
        The run, finished unless its time was up.

    Raises:
        ValueError: bad input, or a folder that already holds a run.
        FloatingPointError: training diverged.
        KeyboardInterrupt: Ctrl-C; resume continues.
    """
    stop_at = _stop_at(time_limit)
    config = make_config(algo, env, steps, seeds, profile, overrides)
    out = None if out is None else Path(out)
    if out and (out / "config.json").exists():
        raise ValueError(f"{out} already holds a run; resume it instead")
    trainer = Trainer(config)
    if out:
        records.write_record(out / "config.json", config)
    return finish(trainer, trainer.empty_buffer(), out, progress, stop_at)


def _stop_at(time_limit: float) -> float:
    if not time_limit > 0:
        raise ValueError(
            f"time_limit is {time_limit}; a number of seconds is wanted"
        )
    return time.monotonic() + time_limit


def is_finished(out: Path) -> bool:
    """Whether the run in a folder has made all its steps."""
    if not (out / "record.json").exists():
        return False
    record = records.read_record(out / "record.json")
    curve = record["curve"]
    return bool(curve) and curve[-1]["step"] >= record["steps"]


def resume(
    out,
    progress: Callable[[int, dict], None] | None = None,
    time_limit: float = np.inf,
) -> Run:
    """Continue an interrupted run.

    From a whole checkpoint to the parameters it would have had; from a
    packed one, if that is newer, with a replay made anew.

    Args:
        out: the run's folder.
        progress, time_limit: as in train.

    Returns:
        The run, finished unless its time was up; one that was finished
        before comes back as it is.

    Raises:
        records.CheckpointError: no run there, or a damaged one.
        FloatingPointError: training diverged.
        KeyboardInterrupt: Ctrl-C; resume continues.
    """
    out, stop_at = Path(out), _stop_at(time_limit)
    config = records.read_record(out / "config.json")
    if is_finished(out):
        record = records.read_record(out / "record.json")
        return Run(record, load(out), out)
    try:
        trainer = Trainer(config)
    except (KeyError, TypeError) as error:
        raise records.CheckpointError(
            f"{out / 'config.json'} does not describe a run: {error}"
        ) from None
    whole = out / "checkpoint.npz"
    packed = out / f"packed-{trainer.seeds[0]}.npz"
    if _chunk(packed) > _chunk(whole):
        buffer = load_packed(trainer, out)
    elif whole.exists():
        buffer = load_checkpoint(trainer, whole)
    else:
        buffer = trainer.empty_buffer()
    return finish(trainer, buffer, out, progress, stop_at)


def _chunk(path: Path) -> int:
    """How many chunks a checkpoint has behind it; 0 if there is none."""
    if not path.exists():
        return 0
    return records.read_metadata(path).get("chunk", 0)
