"""Sweeps.

Exported by tools/export.py from book/training/sweep.md; edit the chapter.
"""

__all__ = [
    "QUICK",
    "usual_steps",
    "Job",
    "plan",
    "run_one",
    "has_ended",
    "steps_saved",
    "Progress",
    "one_by_one",
    "TRIES",
    "on_ray",
    "gather",
    "Row",
    "summary",
    "table",
    "COLORS",
    "plot",
    "save_results",
]

# %% Imports
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from som.agent.actor_critic import closest
from som.training import environments, loop, records
from som.training.policy import restore_agent
from som.training.runs import is_finished, resume


# %% A list of independent runs
QUICK = "InvertedDoublePendulum-v4", "Pusher-v4", "Reacher-v4"
"""Tasks that the paper gives one million steps, and not five."""


def usual_steps(algo: str, env: str, profile: str) -> int:
    """Environment steps of a run where nothing else is asked for.

    Section 5.1 of the paper.

    Args:
        algo, env, profile: as in som.train.
    """
    if profile in loop.FOR_A_LAPTOP:
        return 50_000
    return 1_000_000 if env in QUICK and algo != "ppo" else 5_000_000


class Job(NamedTuple):
    """One run of a sweep."""

    folder: Path
    """Everything that is known of the run."""
    config: dict[str, Any]
    """What its config.json holds or will hold."""

    @property
    def name(self) -> str:
        """Algorithm, task and seed."""
        return "{algo} {env} {seeds[0]}".format(**self.config)


def plan(
    algos: Sequence[str],
    envs: Sequence[str],
    seeds: int | Sequence[int],
    out: str | Path,
    steps: int | None = None,
    profile: str = "laptop",
    env_kwargs: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> list[Job]:
    """The runs of a sweep; writes nothing.

    Args:
        algos: keys of som.AGENTS.
        envs: Gymnasium ids.
        seeds: non-negative integers, one run each; n is the first n.
        out: the sweep's folder; runs are in OUT/TASK/ALGORITHM/SEED.
        steps: environment steps of each run; None is usual_steps.
        profile: "paper", "laptop", "sample-efficient", ....
        env_kwargs: arguments of every task.
        **overrides: fields of the agents' configs or of LoopConfig; each
            goes to every algorithm that has it.

    Raises:
        ValueError: a name, number or setting that no run can have, a run
            named twice, or a folder that holds another run.
    """
    settings = {
        algo: {
            f.name
            for part in loop.defaults(algo, profile)
            for f in fields(part)
        }
        for algo in algos
    }
    for name in overrides:
        closest(name, sorted(set().union(*settings.values())), "setting")
    jobs = []
    for seed in loop.seed_numbers(seeds):
        for env in envs:
            task = environments.Task(env, env_kwargs or {})
            for algo in algos:
                number = steps
                if number is None:
                    number = usual_steps(algo, env, profile)
                own = {
                    name: value
                    for name, value in overrides.items()
                    if name in settings[algo]
                }
                config = loop.make_config(
                    algo, task, number, [seed], profile, own
                )
                folder = Path(out) / env / algo / str(seed)
                jobs.append(Job(folder, json.loads(json.dumps(config))))
    _check(jobs)
    return jobs


def _check(jobs: list[Job]) -> None:
    if not jobs or len({job.folder for job in jobs}) < len(jobs):
        raise ValueError(
            "a sweep wants at least one algorithm, task and seed, and none "
            "of them twice"
        )
    sizes: dict[str, tuple[int, int]] = {}
    for job in jobs:
        env, new = job.config["env"], job.config
        if env not in sizes:
            with environments.make(environments.recorded(new), 1, 0) as one:
                sizes[env] = one.observation_size, one.action_size
        restore_agent(new, *sizes[env])
        path = job.folder / "config.json"
        saved = new
        if path.exists():
            saved = loop.completed(records.read_record(path))
        names = sorted(new.keys() | saved.keys())
        differing = [k for k in names if saved.get(k) != new.get(k)]
        if differing:
            raise ValueError(
                f"{job.folder} holds a run with other settings "
                f"({', '.join(differing)}): choose another folder"
            )


# %% The folder is the only state
def run_one(
    job: Job, progress: Callable[[int, dict], Any] | None = None
) -> None:
    """Bring a run to its end, from wherever it is.

    A run that diverges leaves failed.json with the sentence why.

    Args:
        job: the run; one that has ended is left alone.
        progress: called as progress(step, metrics) after each chunk; True
            stops the run.

    Raises:
        records.CheckpointError: something cannot be written or is damaged.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    if has_ended(job):
        return
    config = job.folder / "config.json"
    if not config.exists():
        records.write_record(config, job.config)
    try:
        resume(job.folder, progress)
    except FloatingPointError as error:
        why = {"error": str(error).partition(";")[0]}
        records.write_record(job.folder / "failed.json", why)


def has_ended(job: Job) -> bool:
    """Whether a run has made all its steps, or has diverged."""
    if (job.folder / "failed.json").exists():
        return True
    try:
        return is_finished(job.folder)
    except (records.CheckpointError, KeyError, TypeError):
        return False  # run_one will say what is damaged


def steps_saved(job: Job) -> int:
    """Environment steps of a run that a power cut could not undo.

    Args:
        job: the run; one that has diverged has nothing left to do, and
            counts as whole.
    """
    steps = job.config["steps"]
    if has_ended(job):
        return steps
    path = job.folder / "checkpoint.npz"
    if not path.exists():
        return 0
    schedule = loop.restore_loop(job.config["loop"])
    chunk = schedule.vector_steps * schedule.num_envs
    try:
        return min(steps, records.read_metadata(path)["chunk"] * chunk)
    except (records.CheckpointError, KeyError, TypeError):
        return 0  # run_one will say what is damaged


Progress = Callable[[int, str], None]
"""Called with the environment steps of all runs so far, and a status."""


def one_by_one(jobs: Sequence[Job], progress: Progress | None = None) -> None:
    """Bring every run to its end, one after the other, in this process.

    Args:
        jobs: what plan returns.
        progress: called after each chunk.

    Raises:
        ChildProcessError: some runs failed; the others have ended.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    lost = {}
    done = [steps_saved(job) for job in jobs]
    for i, job in enumerate(jobs):

        def tell(step: int, metrics: dict, i: int = i, job: Job = job):
            done[i] = step
            if progress:
                progress(sum(done), f"run {i + 1} of {len(jobs)}, {job.name}")

        try:
            run_one(job, tell)
        except Exception as error:
            lost[job.name] = _sentence(error)
            error.__traceback__ = None  # it holds the run's arrays
        jax.clear_caches()  # some fifty runs' programs fill a process's maps
    _tell_lost(lost, len(jobs))


def _tell_lost(lost: Mapping[str, str], count: int) -> None:
    """Name the runs of a sweep that failed, if there are any."""
    if lost:
        told = "; ".join(f"{name}: {why}" for name, why in lost.items())
        raise ChildProcessError(
            f"{len(lost)} of {count} runs were lost ({told}); the same "
            "sweep goes on from their checkpoints"
        )


def _sentence(error: Any) -> str:
    """Why a run was lost: its own or its worker's exception, or Ray's."""
    cause = getattr(error, "cause", None) or error
    return f"{type(cause).__name__}: {cause}".splitlines()[0]


# %% Many machines
TRIES = 10
"""How often Ray begins a run before it counts as lost."""


def _in_worker(job: Job, cpus: float, gpus: float) -> None:
    """What a Ray worker does; JAX has not looked for devices yet."""
    os.environ["NPROC"] = str(max(1, int(cpus)))  # XLA's threads
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # share the GPU
    if not gpus:
        jax.config.update("jax_platforms", "cpu")
    run_one(job)


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError(
            "Ray is not installed here: `pip install ray` brings it"
        ) from None
    return ray


def _start(ray: Any, address: str) -> None:
    """Start or find Ray, without its telemetry and its remarks."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with warnings.catch_warnings():
        # Ray's forks run nothing of JAX's threads.
        warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
        ray.init(address, log_to_driver=False, logging_level="error")


def on_ray(
    jobs: Sequence[Job],
    address: str = "local",
    cpus: float = 1.0,
    gpus: float = 0.0,
    progress: Progress | None = None,
) -> None:
    """Bring every run to its end, as tasks of a Ray cluster.

    Args:
        jobs: what plan returns, on a file system that all machines share.
        address: "local" starts Ray on this machine and stops it at the end,
            "auto" is the Ray that runs here, else "HOST:PORT".
        cpus: cores of each run; XLA gets as many threads.
        gpus: share of a GPU of each run; 0 is none.
        progress: called every two seconds.

    Raises:
        ValueError: Ray is missing, or a share that no run can have.
        ConnectionError: no Ray at that address.
        ChildProcessError: runs that were lost TRIES times.
        KeyboardInterrupt: Ctrl-C; the same call goes on.
    """
    if not (cpus > 0 and gpus >= 0):
        raise ValueError(
            f"a run's share is {cpus:g} cores and {gpus:g} GPUs; more than 0 "
            "cores and at least 0 GPUs are wanted"
        )
    ray, lost = _ray(), {}
    _start(ray, address)
    try:
        have = ray.cluster_resources()
        if address == "local" and (
            cpus > have.get("CPU", 0) or gpus > have.get("GPU", 0)
        ):
            raise ValueError(
                f"a run's share is {cpus:g} cores and {gpus:g} GPUs; this "
                f"machine has {have.get('CPU', 0):g} and "
                f"{have.get('GPU', 0):g}"
            )
        task = ray.remote(
            num_cpus=cpus,
            num_gpus=gpus,
            max_retries=TRIES - 1,
            retry_exceptions=[
                OSError, records.CheckpointError, jax.errors.JaxRuntimeError
            ],
        )(_in_worker)  # fmt: skip
        waiting = {}
        for job in jobs:
            there = job._replace(folder=job.folder.resolve())
            named = task.options(name=job.name)  # the worker's title in ps
            waiting[named.remote(there, cpus, gpus)] = job
        while waiting:
            ready, _ = ray.wait(list(waiting), timeout=2.0)
            for reference in ready:
                job = waiting.pop(reference)
                try:
                    ray.get(reference)
                    if not has_ended(job):
                        lost[job.name] = f"{job.folder} is not shared"
                except ray.exceptions.RayError as error:
                    lost[job.name] = _sentence(error)
            if progress:
                _survey(jobs, list(waiting.values()), progress)
    except KeyboardInterrupt:
        for reference in waiting:
            ray.cancel(reference)
        ray.wait(list(waiting), num_returns=len(waiting), timeout=60)
        raise
    finally:
        ray.shutdown()
    _tell_lost(lost, len(jobs))


def _survey(jobs, waiting, progress: Progress) -> None:
    """Tell where a sweep is, by what is on the disk."""
    left = sum(job.config["steps"] - steps_saved(job) for job in waiting)
    total = sum(job.config["steps"] for job in jobs)
    begun = sum((job.folder / "config.json").exists() for job in waiting)
    ended = len(jobs) - len(waiting)
    progress(
        total - left, f"{ended} of {len(jobs)} runs ended, {begun} begun"
    )


# %% One table, one plot, one file
def gather(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """What the runs have left, by task and algorithm.

    Args:
        jobs: what plan returns; those that have not ended are left out.

    Returns:
        One entry for each algorithm on each task, in the order of the plan;
        its fields are those of the chapter's table.
    """
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        key = job.config["env"], job.config["algo"]
        groups.setdefault(key, []).append(job)
    return [_entry(group) for group in groups.values()]


def _together(curves):
    """The steps at which all were evaluated, and their returns there."""
    common = [set(steps.tolist()) for steps, _ in curves]
    steps = sorted(set.intersection(*common)) if common else []
    kept = [returns[0][np.isin(at, steps)].tolist() for at, returns in curves]
    return steps, kept


def _entry(jobs: list[Job]) -> dict[str, Any]:
    runs, failed, origins = [], {}, []
    for job in jobs:
        path = job.folder / "failed.json"
        if path.exists():
            seed = str(job.config["seeds"][0])
            failed[seed] = str(records.read_record(path).get("error"))
        elif has_ended(job):
            runs.append(records.read_run(job.folder / "record.json"))
    for run in runs:
        made_by = {k: v for k, v in run["provenance"].items() if k != "date"}
        if made_by not in origins:
            origins.append(made_by)
    steps, curves = _together([records.curve_arrays(run) for run in runs])
    names = "algo", "env", "profile", "steps"
    return {
        **{name: jobs[0].config[name] for name in names},
        "config": runs[0]["config"] if runs else None,
        "seeds": [run["seeds"][0] for run in runs],
        "evaluated_at": steps,
        "returns": curves,
        "wall_seconds": [run["wall_seconds"] for run in runs],
        "made_by": origins,
        "failed": failed,
    }


class Row(NamedTuple):
    """The result of one algorithm on one task; nan where there is none."""

    env: str
    algo: str
    seeds: int
    """Finished runs."""
    mean: float
    """Return of the last evaluation, mean over the seeds."""
    low: float
    """Lower end of its 95 % interval; nan for one seed."""
    high: float
    """Upper end."""
    seconds: float
    """Wall time of a run, median over the seeds."""


def summary(entries: Sequence[dict[str, Any]]) -> list[Row]:
    """The final returns of a sweep.

    Student's interval over seeds, as in the chapter on records.

    Args:
        entries: what gather returns, or the results in a sweep.json.
    """
    rows = []
    for entry in entries:
        numbers = [np.nan] * 4
        if entry["seeds"]:
            final = [returns[-1] for returns in entry["returns"]]
            seconds = np.median(entry["wall_seconds"])
            numbers = [*map(float, records.mean_ci(final)), float(seconds)]
        count = len(entry["seeds"])
        rows.append(Row(entry["env"], entry["algo"], count, *numbers))
    return rows


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The final returns of a sweep, as text.

    Args:
        entries: what gather returns, or the results in a sweep.json.
    """
    lines = [
        f"{'task':25} {'algorithm':9} {'seeds':>5} {'return':>9} "
        f"{'(95 %)':>10} {'seconds':>8}"
    ]
    for row, entry in zip(summary(entries), entries, strict=True):
        half = f"+- {row.high - row.mean:.1f}" if row.seeds > 1 else ""
        lines.append(
            f"{row.env:25} {row.algo:9} {row.seeds:5} {row.mean:9.1f} "
            f"{half:>10} {row.seconds:8,.0f}"
        )
        for seed, why in entry["failed"].items():
            lines.append(f"  seed {seed} failed: {why}")
    return "\n".join(lines)


COLORS = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"


def plot(
    entries: Sequence[dict[str, Any]], path: str | Path | None = None
) -> Figure:
    """Learning curves of a sweep: a panel per task, a curve per algorithm.

    Args:
        entries: what gather returns, or the results in a sweep.json.
        path: where to write the picture, if anywhere.

    Returns:
        The figure: means over seeds with 95 % intervals.
    """
    tasks = list(dict.fromkeys(entry["env"] for entry in entries))
    algos = list(dict.fromkeys(entry["algo"] for entry in entries))
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure((7, 2.4 * rows + 0.6), facecolor="white")
    figure.set_layout_engine("constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    lines: dict[str, Any] = {}
    for axes, task in zip(panels, tasks, strict=False):
        axes.set_title(task.removesuffix("-v4"), fontsize=10)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 5))
        for entry in entries:
            if entry["env"] == task and entry["seeds"]:
                i = algos.index(entry["algo"])
                color, style = COLORS[i % 6], "--" if i // 6 % 2 else "-"
                steps = entry["evaluated_at"]
                mean, low, high = records.mean_ci(entry["returns"])
                (lines[entry["algo"]],) = axes.plot(
                    steps, mean, style, color=color, lw=1.6
                )
                axes.fill_between(
                    steps, low, high, color=color, alpha=0.2, lw=0
                )
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(figure.axes)[len(tasks) :]:
        axes.set_visible(False)
    figure.supxlabel("environment steps", fontsize=10)
    figure.supylabel("return", fontsize=10)
    shown = [algo for algo in algos if algo in lines]
    figure.legend(
        [lines[algo] for algo in shown], shown, frameon=False,
        loc="outside upper center", ncols=5, fontsize="small",
    )  # fmt: skip
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def save_results(
    jobs: Sequence[Job], out: str | Path
) -> list[dict[str, Any]]:
    """Write sweep.json and sweep.png.

    Args:
        jobs: what plan returns.
        out: their folder.

    Returns:
        The results: what gather returns.

    Raises:
        OSError: one of them cannot be written.
        records.CheckpointError: the same, or a run's record is damaged.
    """
    out, entries = Path(out), gather(jobs)
    content = {"provenance": records.provenance(), "results": entries}
    records.write_record(out / "sweep.json", content)
    plot(entries, out / "sweep.png")
    return entries
