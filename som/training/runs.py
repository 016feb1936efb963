"""Runs.

Exported by tools/export.py from book/training/runs.md; edit the chapter.
"""

__all__ = [
    "Terminated",
    "Stop",
    "terminable",
    "interruptible",
    "InUse",
    "alone",
    "make_record",
    "save_all",
    "EVALUATION_SEED",
    "evaluation_is_due",
    "evaluation_seconds",
    "evaluate_now",
    "keep_best",
    "Run",
    "begin_slice",
    "finish",
    "train",
    "check_same",
    "memory_maps",
    "read_config",
    "is_finished",
    "resume",
]

# %% Imports
import builtins
import gc
import inspect
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from som.agent.actor_critic import closest
from som.training import logs, records
from som.training.checkpoints import (
    check_sound,
    load_checkpoint,
    load_packed,
    save_checkpoint,
    save_packed,
)
from som.training.environments import Task, TaskError, recorded
from som.training.loop import (
    Trainer,
    completed,
    make_config,
    restore_loop,
    run_chunk,
    seed_numbers,
)
from som.training.policy import (
    Policy,
    acting,
    evaluate,
    load,
    read_policies,
    restore_agent,
    save_policy,
)


# %% Ctrl-C
class Terminated(KeyboardInterrupt):
    """SIGTERM: whoever lent the machine wants it back."""


class Stop(threading.Event):
    """An event that a signal sets."""

    raises: type[KeyboardInterrupt] = KeyboardInterrupt
    """What is raised once everything is saved."""


@contextmanager
def _handled(handle, *signals: int):
    """Let a function handle signals; only a main thread may say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = [signal.signal(which, handle) for which in signals]
    try:
        yield
    finally:
        for which, old in zip(signals, previous, strict=True):
            signal.signal(which, old)


def terminable():
    """A context in which SIGTERM raises Terminated, as Ctrl-C raises."""

    def handle(signum, frame):
        raise Terminated

    return _handled(handle, signal.SIGTERM)


@contextmanager
def interruptible():
    """Yield a Stop that Ctrl-C or SIGTERM sets; a second stops at once."""
    stop = Stop()

    def handle(signum, frame):
        if signum == signal.SIGTERM:
            stop.raises = Terminated
        if stop.is_set():
            raise stop.raises
        stop.set()
        with suppress(Exception):  # nobody may be reading
            print(
                "stopping: this chunk is finished and saved; a second "
                "Ctrl-C stops at once",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    with _handled(handle, signal.SIGINT, signal.SIGTERM):
        yield stop


# %% One at a time
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class InUse(records.CheckpointError):
    """Another process trains in this folder; one sentence."""


_locks: set[int] = set()


def _let_go() -> None:
    for file in _locks:
        os.close(file)
    _locks.clear()


if fcntl:
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def alone(out: Path | None):
    """Hold the lock of a run's folder.

    Args:
        out: the folder; without one, and where no lock can be had,
            nothing is held.

    Raises:
        InUse: another holds it.
    """
    try:
        file = _lock(out) if out and fcntl else None
    except BlockingIOError:
        raise InUse(
            f"{out} is in use by {_owner(out)}: wait for it, stop it, or "
            "choose another folder"
        ) from None
    except OSError:  # a read-only folder, or a drive without locks
        file = None
    try:
        yield
    finally:
        if file in _locks:
            _locks.discard(file)
            os.close(file)


def _lock(out: Path) -> int:
    file = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        name = f"process {os.getpid()} on {socket.gethostname()}"
        os.pwrite(file, name.encode(), 0)
    except BaseException:
        os.close(file)
        raise
    _locks.add(file)
    return file


def _owner(out) -> str:
    with suppress(OSError):
        if name := (out / ".lock").read_text(errors="replace")[:100]:
            return name
    return "another process"


# %% The folder of a run
def make_record(trainer: Trainer) -> dict[str, Any]:
    """The run record as it stands, exactly as JSON gives it back."""
    config = trainer.config
    record: dict[str, Any] = {
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
    if "env_kwargs" in config:
        record["config"]["env"] = config["env_kwargs"]
    return records.as_json(record)


def save_all(
    trainer: Trainer, buffer, out: Path, envs=None
) -> dict[str, Any]:
    """Write checkpoint, policies, learning curve and record.

    Args:
        trainer: at the end of a chunk.
        buffer: its replay buffers.
        out: the run's folder.
        envs: as in save_checkpoint.

    Returns:
        The record.

    Raises:
        records.CheckpointError: something cannot be written; what was
            there before is intact.
        FloatingPointError: a number is not finite; nothing is written.
    """
    try:
        check_sound(trainer, buffer)
    except FloatingPointError as error:
        kept = _last_checkpoint(trainer, out)
        raise FloatingPointError(f"{error}; {kept}") from None
    if not (out / "config.json").exists():  # the folder was removed
        records.write_record(out / "config.json", trainer.config)
    task = trainer.envs[0]

    def save_acting(name: str, state, scale) -> None:
        save_policy(
            out / name, trainer.config, trainer.agent, state,
            task.action_low, task.action_high, scale,
        )  # fmt: skip

    if trainer.best is not None:
        save_acting("policy-best.npz", trainer.best, trainer.best_scale)
    save_checkpoint(trainer, buffer, out / "checkpoint.npz", envs)
    save_acting("policy.npz", trainer.state, trainer.scale)
    record = make_record(trainer)
    _draw(trainer, record, out / "learning_curve.png")
    records.write_record(out / "record.json", record)
    return record


def _draw(trainer: Trainer, record: dict[str, Any], path: Path) -> None:
    points = len(trainer.curve)
    if points and not (points == trainer.drawn and path.exists()):
        records.plot_curves([record], path)
        trainer.drawn = points
        gc.collect()


# %% When to evaluate, and the best so far
EVALUATION_SEED = 1_000_000
"""Added to a seed: evaluation never sees the training episodes."""


def evaluation_is_due(trainer: Trainer, last_steps: int) -> bool:
    """Whether to evaluate at the end of this chunk.

    Args:
        trainer: at the end of a chunk.
        last_steps: where the chunk began.
    """
    if trainer.chunk >= trainer.chunks:
        return True
    every = trainer.config["steps"] / trainer.loop.evaluations
    if trainer.steps // every == last_steps // every:
        return False
    last = trainer.curve[-1]["updates"] if trainer.curve else -1
    return last < int(trainer.state.step)


def evaluation_seconds(curve: list[dict[str, Any]]) -> float:
    """Seconds that the evaluations of a curve have taken."""
    return sum((point.get("evaluation_seconds", 0.0) for point in curve), 0.0)


def evaluate_now(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Evaluate every seed, append to the curve, keep what was best.

    Args:
        trainer: at the end of a chunk.
        metrics: of that chunk, [S] each.
    """
    start = time.monotonic()
    returns = [
        evaluate(
            trainer.policy(i),
            episodes=trainer.loop.episodes,
            seed=EVALUATION_SEED + seed,
        ).tolist()
        for i, seed in enumerate(trainer.seeds)
    ]
    keep_best(trainer, np.mean(returns, axis=1))
    trainer.curve.append(
        {
            "step": trainer.steps,
            "updates": int(trainer.state.step),
            "seconds": trainer.seconds,
            "evaluation_seconds": time.monotonic() - start,
            "returns": returns,
            "metrics": {
                k: np.asarray(v).tolist() for k, v in metrics.items()
            },
        }
    )


def keep_best(trainer: Trainer, means: np.ndarray) -> None:
    """Keep what a seed acts with, if no earlier evaluation was better.

    Args:
        trainer: its curve holds the earlier evaluations.
        means: mean returns of this one, [S].
    """
    better = np.full(len(means), True)
    if trainer.best is not None:
        earlier = [np.mean(p["returns"], axis=1) for p in trainer.curve]
        better = means > np.max(earlier, axis=0, initial=-np.inf)
    now = acting(trainer.agent, trainer.state)
    old = now if trainer.best is None else trainer.best

    def pick(new, old):
        wide = better.reshape(-1, *[1] * (np.ndim(new) - 1))
        return np.where(wide, new, old)

    trees = now._replace(step=()), old._replace(step=())
    trainer.best = jax.tree.map(pick, *trees)._replace(step=now.step)
    if (scale := trainer.scale) is not None:
        earlier_scale = trainer.best_scale or scale
        trainer.best_scale = jax.tree.map(pick, scale, earlier_scale)


# %% To the end
@dataclass(repr=False)
class Run:
    """What train returns.

    record: the run record, equal to record.json where a folder was given;
    policy: the first seed's policy; out: the run's folder, or None;
    policies: those of all seeds; best: each seed's best by evaluation.
    """

    record: dict[str, Any]
    policy: Policy
    out: Path | None
    policies: list[Policy]
    best: list[Policy]

    def __repr__(self) -> str:
        curve, seeds = self.record["curve"], self.record["seeds"]
        said = "not evaluated yet"
        if curve:
            mean = np.mean(curve[-1]["returns"])
            said = f"return {mean:.1f} after {curve[-1]['step']:,} steps"
        return (
            "<run of {algo} on {env}: ".format(**self.record)
            + f"{len(seeds)} seed(s), {said}, in {self.out or 'no folder'}>"
        )


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


def _caller(progress) -> Callable[[int, dict, Trainer], Any]:
    """A callback as a function of step, metrics and trainer."""
    if progress is None or progress is False:
        return lambda step, metrics, trainer: None
    try:
        sees = "trainer" in inspect.signature(progress).parameters
    except ValueError:  # some of C's functions have no signature
        sees = False
    if sees:
        return lambda step, metrics, trainer: progress(
            step, metrics, trainer=trainer
        )
    return lambda step, metrics, trainer: progress(step, metrics)


def finish(
    trainer: Trainer,
    buffer,
    out: Path | None,
    progress=None,
    stop_at=np.inf,
    watchers=(),
) -> Run:
    """Run a trainer to its end, evaluating and saving on the way.

    Args:
        trainer: fresh, or from a checkpoint.
        buffer: its replay buffers.
        out: the run's folder, or None to save nothing.
        progress: as in train.
        stop_at: time.monotonic() after which no chunk begins.
        watchers: what gets the rows of each chunk, as in som.training.logs.

    Raises:
        FloatingPointError: training diverged.
        environments.TaskError: the task fails.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything is saved.
    """
    begin_slice(trainer)
    tell, before = _caller(progress), trainer.seconds
    start, saved = time.monotonic() - before, time.monotonic()
    record = None
    with interruptible() as stop:
        if _evaluation_is_missing(trainer):
            evaluate_now(trainer, {})
        while trainer.chunk < trainer.chunks:
            buffer, table = _one_chunk(trainer, buffer, out)
            trainer.seconds = time.monotonic() - start
            trainer.slices[-1]["seconds"] = trainer.seconds - before
            try:
                for watcher in watchers:
                    watcher.write(table)
                now = logs.averages(table)
                halt = tell(table[0]["step"], now, trainer) is True
            except (Exception, SystemExit):
                if out:
                    save_all(trainer, buffer, out)
                raise
            last = trainer.chunk == trainer.chunks
            due = time.monotonic() - saved > trainer.loop.checkpoint_seconds
            late = time.monotonic() > stop_at
            if out and (last or due or late or halt or stop.is_set()):
                record = save_all(trainer, buffer, out)
                saved = time.monotonic()
            if stop.is_set() and not last:
                raise stop.raises
            if late and not last and out:
                save_packed(trainer, out)
            if late or halt:
                break
    if out and not record:  # stopped between its last checkpoint and record
        record = save_all(trainer, buffer, out)
    return _run(trainer, record or make_record(trainer), out)


def _one_chunk(trainer: Trainer, buffer, out: Path | None):
    """One chunk, evaluated if it is time; the buffers and the rows."""
    done, begun = trainer.steps, [env.state() for env in trainer.envs]
    try:
        buffer, metrics = run_chunk(trainer, buffer)
        returns = None
        if evaluation_is_due(trainer, done):
            evaluate_now(trainer, metrics)
            returns = trainer.curve[-1]["returns"]
    except (FloatingPointError, TaskError) as error:
        if isinstance(error, TaskError) and out and trainer.chunk:
            middle = trainer.steps == done  # else while it was evaluated
            rest = (trainer.rescued, out, begun) if middle else (buffer, out)
            with suppress(records.CheckpointError):
                save_all(trainer, *rest)
        kept = _last_checkpoint(trainer, out)
        raise type(error)(f"{error}; {kept}") from error.__cause__
    return buffer, logs.rows(trainer, metrics, returns)


def _evaluation_is_missing(trainer: Trainer) -> bool:
    """Whether the run was saved because an evaluation failed."""
    last = trainer.curve[-1]["step"] if trainer.curve else 0
    begun = trainer.steps - trainer.rows.shape[1]
    return last < trainer.steps and evaluation_is_due(trainer, begun)


def _run(trainer: Trainer, record: dict[str, Any], out: Path | None) -> Run:
    number = range(len(trainer.seeds))
    policies = [trainer.policy(i) for i in number]
    best = [trainer.policy(i, best=trainer.best is not None) for i in number]
    return Run(record, policies[0], out, policies, best)


def _last_checkpoint(trainer, out):
    path = out / "checkpoint.npz" if out else None
    if path is None or not path.exists():
        return "no checkpoint had been saved"
    try:
        step = records.read_metadata(path)["chunk"] * trainer.rows.shape[1]
    except (records.CheckpointError, KeyError):
        return f"{path} is damaged"
    return f"the last good checkpoint is {path}, of step {step}"


# %% Train and resume
def train(
    algo: str = "som",
    env: Any = "HalfCheetah-v4",
    steps: int = 1_000_000,
    seeds=(0,),
    profile: str = "laptop",
    out=None,
    progress: Callable[..., Any] | bool | None = None,
    time_limit: float = np.inf,
    log=(),
    env_kwargs: Mapping[str, Any] | None = None,
    wrappers: Sequence[Callable] = (),
    **overrides,
) -> Run:
    """Train an agent on a task, several seeds side by side.

    Args:
        algo: name of the algorithm, a key of som.AGENTS.
        env: the task, with a bounded Box of actions: a Gymnasium id, also
            "module:Env-v0", or a function or class that makes one.
        steps: environment steps per seed (rounded up to whole chunks).
        seeds: distinct non-negative integers; a number n is the first n.
        profile: "paper", "laptop", "sample-efficient", ...
        out: folder for checkpoints, policy, record and curve; None: none.
            One that holds the same run is gone on with.
        progress: called as progress(step, metrics) after each chunk, with
            trainer=... if it has such a parameter; True from it stops.
            None shows progress in a terminal or notebook, True always,
            False never.
        time_limit: seconds after which no further chunk begins; resume
            goes on.
        log: names of som.training.logs.LOGS that get the metrics, too.
        env_kwargs: arguments of the task; the record keeps them.
        wrappers: what the environments are wrapped in, the innermost first.
        **overrides: fields of the agent's config or of LoopConfig.

    Returns:
        The run, finished unless its time was up or progress stopped it.

    Raises:
        ValueError: bad input, or a folder that holds another run or is
            InUse.
        FloatingPointError: training diverged.
        environments.TaskError: the task fails; resume continues.
        KeyboardInterrupt: Ctrl-C or SIGTERM; resume continues.
    """
    stop_at = _stop_at(time_limit)
    task = Task(env, env_kwargs or {}, wrappers)
    config = make_config(algo, task, steps, seeds, profile, overrides)
    out = None if out is None else Path(out).absolute()  # a task may chdir
    if out and (out / "config.json").exists():
        check_same(out, config, overrides)
        more = config["steps"], log, env, wrappers
        return resume(out, progress, time_limit, *more)
    kinds = _kinds(out, log)  # before a folder is made
    with closing(Trainer(config, task)) as trainer, ExitStack() as held:
        if out:
            records.make_folder(out)
            held.enter_context(alone(out))
            if (out / "config.json").exists():
                raise InUse(f"another process has begun a run in {out}")
        watchers = _watchers(out, config, 0, kinds)
        if out:
            records.write_record(out / "config.json", config)
        buffer = trainer.empty_buffer()
        return _shown(trainer, buffer, out, progress, stop_at, watchers)


def _stop_at(time_limit: float) -> float:
    if not time_limit > 0:
        raise ValueError(
            f"time_limit is {time_limit}; a number of seconds is wanted"
        )
    return time.monotonic() + time_limit


def check_same(out: Path, config: dict[str, Any], asked) -> None:
    """Refuse a folder whose run is another one, or has more steps.

    Args:
        out: a folder that holds a run.
        config: what make_config returns.
        asked: names of the settings that were given.

    Raises:
        ValueError: a setting differs.
    """
    saved = _settings(read_config(out))
    skip = {"warmup", "evaluations", "episodes"} - set(asked)
    differing = [
        f"{name} is {saved.get(name)} there and {value} here"
        for name, value in _settings(config).items()
        if name not in skip
        and saved.get(name) != value
        and not (name == "steps" and value > saved["steps"])
    ]
    if differing:
        raise ValueError(
            f"{out} holds another run ({'; '.join(differing[:3])}): choose "
            "another folder (--out in the shell), or resume that run"
        )


def _settings(run: dict[str, Any]) -> dict[str, Any]:
    """Every setting of a run under its own name."""
    head = {k: run[k] for k in ("algo", "env", "steps", "profile", "seeds")}
    head["env_kwargs"] = run.get("env_kwargs", {})
    return {**head, **run["agent"], **run["loop"]}


def memory_maps() -> float:
    """Which share of the maps that this process may have is in use."""
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        with open("/proc/self/maps", "rb") as file:
            return sum(1 for _ in file) / limit
    except OSError:  # not Linux
        return 0.0


def _shown(trainer, buffer, out, progress, stop_at, watchers) -> Run:
    """Bring a trainer to its end, and show how far it is."""
    if memory_maps() > 0.5:
        jax.clear_caches()
    try:
        rest = out, progress, stop_at, watchers
        person = sys.stdout.isatty() or hasattr(builtins, "__IPYTHON__")
        if progress is not True and (progress is not None or not person):
            return finish(trainer, buffer, *rest)
        print(logs.first_line(trainer.config))
        with logs.progress_line(trainer.config) as line:
            return finish(trainer, buffer, out, line, stop_at, watchers)
    finally:
        for watcher in watchers:
            watcher.close()


def _kinds(out: Path | None, log) -> list[Any]:
    """Classes of the logs that were asked for by name."""
    names = [log] if isinstance(log, str) else list(log)
    if names and out is None:
        raise ValueError(f"log is {log!r}; it wants a folder, out")
    return [logs.LOGS[closest(name, logs.LOGS, "log")] for name in names]


def _watchers(out: Path | None, config, step: int, kinds) -> list[Any]:
    """What gets the rows of each chunk."""
    if out is None:
        return []
    table = logs.Table(out / "metrics.csv", step)
    return [table, *(kind(out, config, step) for kind in kinds)]


def read_config(out: Path) -> dict[str, Any]:
    """The settings of the run in a folder, with those that came since.

    Args:
        out: the folder.

    Raises:
        records.CheckpointError: no config.json there, or none of a run.
    """
    path = out / "config.json"
    stored = records.read_record(path)
    try:
        config = completed(stored)
        steps, kwargs = config["steps"], config.get("env_kwargs", {})
        if not (type(steps) is int and steps >= 1):
            raise ValueError(f"steps is {steps!r:.40}")
        if not (type(config["env"]) is str and isinstance(kwargs, dict)):
            raise ValueError("env is not the name of a task")
        seed_numbers(list(config["seeds"]))
        restore_loop(config["loop"])
        restore_agent(config, 1, 1)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise records.CheckpointError(
            f"{path} does not describe a run: {why}"
        ) from None
    return config


def is_finished(out: Path) -> bool:
    """Whether the run in a folder has made all its steps."""
    if not (out / "record.json").exists():
        return False
    curve = records.read_run(out / "record.json")["curve"]
    steps = read_config(out)["steps"]
    return bool(curve) and curve[-1]["step"] >= steps


def resume(
    out,
    progress: Callable[..., Any] | bool | None = None,
    time_limit: float = np.inf,
    steps: int | None = None,
    log=(),
    env: Any = None,
    wrappers: Sequence[Callable] = (),
) -> Run:
    """Continue an interrupted run, or make a finished one longer.

    From a whole checkpoint to the parameters it would have had; from a
    packed one, if that is newer, with a replay made anew.

    Args:
        out: the run's folder.
        progress, time_limit, log: as in train.
        steps: environment steps of the whole run, if it is to get longer.
        env, wrappers: what train was given, if that was not only an id.

    Returns:
        The run, finished unless its time was up or progress stopped it;
        one that was finished before comes back as it is.

    Raises:
        records.CheckpointError: no run there, a damaged one, one on
            another task, or one that is InUse.
        ValueError: fewer steps than the run has.
        FloatingPointError: training diverged.
        environments.TaskError: the task fails; resume continues.
        KeyboardInterrupt: Ctrl-C or SIGTERM; resume continues.
    """
    out, stop_at = Path(out).absolute(), _stop_at(time_limit)
    config = read_config(out)
    if is_finished(out) and steps in (None, config["steps"]):
        return _finished(out)
    with alone(out):
        if steps is not None:
            config = _longer(out, config, int(steps))
        rest = progress, stop_at, log, env, wrappers
        return _go_on(out, config, *rest)


def _go_on(out: Path, config, progress, stop_at, log, env, wrappers) -> Run:
    """Resume a run whose folder is ours alone."""
    try:
        task = _same_task(config, env, wrappers)
        trainer = Trainer(config, task)
    except (KeyError, TypeError) as error:
        raise records.CheckpointError(
            f"{out / 'config.json'} does not describe a run: {error}"
        ) from None
    whole = out / "checkpoint.npz"
    packed = out / f"packed-{trainer.seeds[0]}.npz"
    with closing(trainer):
        if _chunk(packed) > _chunk(whole):
            buffer = load_packed(trainer, out)
        elif whole.exists():
            buffer = load_checkpoint(trainer, whole)
        else:
            buffer = trainer.empty_buffer()
        if trainer.curve and (out / "policy-best.npz").exists():
            best = read_policies(out / "policy-best.npz")[1]
            trainer.best = best["state"]
            trainer.best_scale = best.get("scale")
        watchers = _watchers(out, config, trainer.steps, _kinds(out, log))
        return _shown(trainer, buffer, out, progress, stop_at, watchers)


def _same_task(config: dict[str, Any], env, wrappers) -> Task:
    """The task of a run, made again of what train was given."""
    kept = recorded(config)
    if env is None and not wrappers:
        return kept
    task = Task(kept.env if env is None else env, kept.kwargs, wrappers)
    if task.name != kept.name:
        raise records.CheckpointError(
            f"this run is on {kept.name}, and env and wrappers make "
            f"{task.name}: what train was given is wanted"
        )
    return task


def _chunk(path: Path) -> int:
    """How many chunks a checkpoint has behind it; 0 if there is none."""
    if not path.exists():
        return 0
    return records.read_metadata(path).get("chunk", 0)


def _finished(out: Path) -> Run:
    """A finished run, as it is on the disk."""
    record = records.read_run(out / "record.json")
    number = range(len(record["seeds"]))
    policies = [load(out, i) for i in number]
    path = out / "policy-best.npz"
    best = [load(path if path.exists() else out, i) for i in number]
    return Run(record, policies[0], out, policies, best)


def _longer(out: Path, config: dict[str, Any], steps: int) -> dict[str, Any]:
    """A run's settings with more steps, written to its folder."""
    old = config["steps"]
    if steps < old:
        raise ValueError(
            f"steps is {steps}; the run in {out} has {old}, and at least as "
            "many are wanted"
        )
    if steps == old:
        return config
    number = max(1, round(config["loop"]["evaluations"] * steps / old))
    loop = {**config["loop"], "evaluations": number}
    config = {**config, "steps": steps, "loop": loop}
    records.write_record(out / "config.json", config)
    return config
