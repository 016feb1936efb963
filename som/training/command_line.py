"""The command line.

Exported by tools/export.py from book/training/command_line.md; edit the chapter.
"""

__all__ = [
    "count",
    "seed_list",
    "LITERALS",
    "assignment",
    "override",
    "names",
    "medians",
    "BENCHMARKS",
    "show_machine",
    "show_table",
    "STUDIES",
    "COMMANDS",
    "parser",
    "main",
]

import argparse
import ast
import contextlib
import dataclasses
import difflib
import os
import shlex
import shutil
import statistics
import sys
import time
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gymnasium.error import Error as GymnasiumError

from som.agent.actor_critic import AGENTS, closest
from som.training import environments, loop, runs, settings, sweep
from som.training.export import export
from som.training.film import film
from som.training.logs import (
    LOGS,
    ProgressLine,
    clock,
    first_line,
    plain_console,
    progress_line,
)
from som.training.policy import evaluate, load
from som.training.records import (
    bootstrap_ci,
    curve_arrays,
    iqm,
    mean_ci,
    plot_curves,
    provenance,
    read_run,
    write_record,
)


# %% From words to values
def count(text: str) -> int:
    """Read a positive whole number; `5e6` is one.

    Args:
        text: what was typed.

    Returns:
        The number.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (value >= 1 and value.is_integer()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a positive whole number such as 20 or 5e6"
        )
    return int(value)


def seed_list(text: str) -> tuple[int, ...]:
    """Read seeds: `3` is 0, 1, 2 and `4,7` is those two.

    Args:
        text: a count, or a list with commas (one seed is `4,`).

    Returns:
        The seeds.

    Raises:
        argparse.ArgumentTypeError: not a count or list of distinct seeds.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if "," not in text:
        return tuple(range(count(text)))
    if not parts or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of seeds such as 3 nor a list of "
            "seeds such as 0,1,2"
        )
    seeds = tuple(int(part) for part in parts)
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return seeds


def _convert(value: Any, hint: Any) -> Any:
    """The value as the type that the hint names, or a ValueError."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in options:
            with contextlib.suppress(ValueError):
                return _convert(value, option)
    elif origin is typing.Literal and value in options:
        return value
    elif origin is tuple and isinstance(value, tuple | list):
        if len(value) == len(options):
            pairs = zip(value, options, strict=True)
            return tuple(_convert(v, option) for v, option in pairs)
    elif hint in (int, float) and type(value) in (int, float):
        if hint is float or float(value).is_integer():
            return hint(value)
    elif hint in (bool, str, types.NoneType) and type(value) is hint:
        return value
    raise ValueError


LITERALS = {"true": "True", "false": "False", "none": "None", "null": "None"}
"""Words of shells and of other languages, in Python's."""


def assignment(text: str) -> tuple[str, Any]:
    """Read `field=value`, such as an argument of a task.

    Args:
        text: what was typed.

    Returns:
        The field's name, and its value: a Python literal, or else the text.

    Raises:
        ValueError: there is no `=`.
    """
    field, sign, given = (part.strip() for part in text.partition("="))
    if not sign:
        raise ValueError(f"{text!r} is not of the form field=value.")
    try:
        return field, ast.literal_eval(LITERALS.get(given.lower(), given))
    except (ValueError, SyntaxError):
        return field, given


def override(text: str, *configs: Any) -> tuple[str, Any]:
    """Read one `field=value` for one of some configurations.

    Args:
        text: what was typed.
        *configs: dataclasses, one of which has the field.

    Returns:
        The field's name and its new value, of the field's type.

    Raises:
        ValueError: no such field, or a value of another type.
    """
    field, value = assignment(text)
    owners = {f.name: c for c in configs for f in dataclasses.fields(c)}
    config = owners[closest(field, owners, "setting")]
    hint = typing.get_type_hints(type(config))[field]
    try:
        return field, _convert(value, hint)
    except ValueError:
        wanted = getattr(hint, "__name__", None) or str(hint)
        if typing.get_args(hint):
            wanted = str(hint).replace("typing.", "")
        raise ValueError(
            f"{field} is {text.partition('=')[2].strip()!r}; "
            f"wanted is {wanted}, "
            f"such as {getattr(config, field)!r}."
        ) from None


# %% Train, and go on training
def _invocation() -> str:
    """How `som` is called from the shell that we were called from."""
    if shutil.which("som"):
        return "som"
    here = os.path.relpath(sys.executable)
    return f"{shlex.quote(min(here, sys.executable, key=len))} -m som"


def _word(path: Any) -> str:
    """A path as a shell wants it."""
    return shlex.quote(str(path))


def _print_final(record: dict[str, Any]) -> None:
    """The last evaluation, seed by seed."""
    steps, returns = curve_arrays(record)
    final = returns[:, -1]
    number = len(record["curve"][-1]["returns"][0])
    print(f"  return after {steps[-1]:,.0f} steps, {number} episodes each")
    for seed, value in zip(record["seeds"], final, strict=True):
        print(f"  seed {seed:<4} {value:10.1f}")
    mean, low, high = mean_ci(final)
    interval = f"   95 % interval [{low:.1f}, {high:.1f}]"
    print(f"  mean      {mean:10.1f}{interval if len(final) > 1 else ''}")
    if len(final) > 3:
        bounds = "bootstrap [{:.1f}, {:.1f}]".format(*bootstrap_ci(final))
        print(f"  IQM       {iqm(final):10.1f}   {bounds}")


def _report(out: Path) -> None:
    record = read_run(out / "record.json")
    if not runs.is_finished(out):
        print("the time is up, everything is saved; go on with")
        print(f"  {_invocation()} resume {_word(out)}")
        return
    facts = "{algo} on {env}, profile {profile}:"
    print(facts.format(**record))
    _print_final(record)
    spent, seconds = _evaluating(record), record["wall_seconds"]
    print(f"learned in {clock(seconds)}, evaluation {spent / seconds:.0%}")
    if spent > max(60.0, seconds / 2):
        print("  (fewer episodes cost less: --set episodes=N)")
    print(f"  curve   {out / 'learning_curve.png'}")
    print(f"  policy  {out / 'policy.npz'} (the best is policy-best.npz)")
    print(f"  metrics {out / 'metrics.csv'}")
    print(f"  record  {out / 'record.json'}")
    print("watch it with")
    film = _word(out / "policy.mp4")
    print(f"  {_invocation()} render {_word(out)} --out {film}")


def _evaluating(record: dict[str, Any]) -> float:
    return runs.evaluation_seconds(record["curve"])


def _filming(line: ProgressLine, out: Path, every: int | None) -> Any:
    """A callback like line that also makes a film every so many steps."""
    if not every:
        return line
    seen = -1

    def progress(step: int, metrics: dict[str, Any], trainer: Any) -> None:
        nonlocal seen
        line(step, metrics)
        if seen < 0 or step // every > seen // every:
            film(trainer.policy(), out / "films" / f"{step}.mp4")
        seen = step

    return progress


def _train(args: argparse.Namespace) -> None:
    configs = loop.defaults(args.algo, args.profile)
    given = dict(override(text, *configs) for text in args.overrides)
    kwargs = dict(map(assignment, args.env_kwargs))
    task = environments.Task(args.env, kwargs)
    environments.make(task, 1, 0).close()  # a wrong name is told first
    wanted = loop.make_config(
        args.algo, task, args.steps, args.seeds, args.profile, given
    )
    usual = (args.algo, args.profile) == ("som", "laptop")
    name = args.env if usual else f"{args.env}-{args.algo}-{args.profile}"
    out = Path(args.out or f"runs/{name}")
    args.out = str(out)
    if (out / "config.json").exists():
        runs.check_same(out, wanted, given)
        _resume(args)
        return
    print(first_line(wanted))
    with progress_line(wanted) as line:
        runs.train(
            args.algo, args.env, args.steps, args.seeds, args.profile,
            out, _filming(line, out, args.film_every), args.time_limit,
            args.log, kwargs, **given,
        )  # fmt: skip
    _report(out)


def _resume(args: argparse.Namespace) -> None:
    out = Path(args.out)
    config = runs.read_config(out)
    longer = (args.steps or 0) > config["steps"]
    if runs.is_finished(out) and not longer:
        runs.resume(out, False, steps=args.steps)  # may refuse
        print(f"the run in {out} is already finished.")
        _report(out)
        return
    if longer:
        config["steps"] = args.steps
        print(f"the run in {out} goes on, to {args.steps:,} steps.")
    else:
        print(f"continuing the unfinished run in {out}.")
    print(first_line(config))
    with progress_line(config) as line:
        progress = _filming(line, out, args.film_every)
        runs.resume(out, progress, args.time_limit, args.steps, args.log)
    _report(out)


# %% Many runs
def names(text: str) -> list[str]:
    """Read names with commas between them: `som,sdac`.

    Args:
        text: what was typed.
    """
    return [part.strip() for part in text.split(",") if part.strip()]


def _sweep(args: argparse.Namespace) -> None:
    algos = list(AGENTS) if args.algos == ["all"] else args.algos
    envs = list(environments.TASKS) if args.envs == ["all"] else args.envs
    known = [c for algo in algos for c in loop.defaults(algo, args.profile)]
    given = dict(override(text, *known) for text in args.overrides)
    kwargs = dict(map(assignment, args.env_kwargs))
    jobs = sweep.plan(
        algos, envs, args.seeds, args.out, args.steps, args.profile, kwargs,
        **given,
    )  # fmt: skip
    ended = sum(map(sweep.has_ended, jobs))
    print(f"{len(jobs)} runs, {ended} of them ended before")
    total = sum(job.config["steps"] for job in jobs)
    with ProgressLine(total, plain_console()) as line:

        def tell(done: int, status: str) -> None:
            line.result = f"{status}  "
            line(done, {})

        lost = None
        try:
            if args.ray:
                sweep.on_ray(jobs, args.ray, args.cpus, args.gpus, tell)
            else:
                sweep.one_by_one(jobs, tell)
        except ChildProcessError as error:
            lost = error  # told below the results of the others
    print(sweep.table(sweep.save_results(jobs, args.out)))
    print(f"  curves  {Path(args.out) / 'sweep.png'}")
    print(f"  record  {Path(args.out) / 'sweep.json'}")
    if lost:
        raise lost


# %% How good is it?
def _evaluate(args: argparse.Namespace) -> None:
    policy = load(args.path, args.index)
    returns = np.asarray(
        evaluate(policy, episodes=args.episodes, seed=args.seed)
    )
    mean, low, high = mean_ci(returns)
    print(f"{policy.algo} on {policy.env_id}, {len(returns)} episodes:")
    print(f"  mean   {mean:10.1f}   95 % interval [{low:.1f}, {high:.1f}]")
    print(f"  least  {returns.min():10.1f}   greatest {returns.max():.1f}")


def _render(args: argparse.Namespace) -> None:
    policy = load(args.path, args.index)
    returns = film(
        policy, args.out, args.seconds, args.episodes or 0,
        args.width, args.height, args.seed,
    )  # fmt: skip
    print(f"{args.out}: {policy.algo} on {policy.env_id}")
    if returns:
        ended = ", ".join(f"{r:.1f}" for r in returns)
        print(f"returns of the episodes that ended: {ended}")


# %% Export
_USE = {
    ".onnx": (
        "session = onnxruntime.InferenceSession({path!r})",
        'session.run(None, {{"observation": observation[None]}})[0][0]',
    ),
    ".npz": (
        "from numpy_policy import act, load",
        "act(load({name!r}), observation)",
    ),
}  # by the file's ending


def _export(args: argparse.Namespace) -> None:
    policy = load(args.path, args.index)
    path = export(policy, args.out, args.candidates)
    size = path.stat().st_size / 1e3
    print(f"{path}: {policy.algo} on {policy.env_id}, {size:,.0f} kB")
    print("an action is")
    for line in _USE[path.suffix]:
        print(f"  {line.format(path=str(path), name=path.name)}")


# %% Comparing runs
def _record_of(path: str) -> dict[str, Any]:
    return read_run(
        Path(path) / "record.json" if Path(path).is_dir() else path
    )


def _plot(args: argparse.Namespace) -> None:
    plot_curves([_record_of(run) for run in args.runs], args.out)
    for run in args.runs:
        print(f"{run}:")
        _print_final(_record_of(run))
    print(f"curve: {args.out}")


# %% How fast is it?
def medians(
    calls: Mapping[str, Callable[[], Any]], repeats: int
) -> dict[str, float]:
    """Median seconds of several functions, timed in turn.

    Args:
        calls: functions whose results JAX may still be computing when
            they return; each is called once before anything is timed.
        repeats: timings of each.

    Returns:
        Seconds, under the same names.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


BENCHMARKS: dict[
    str, Callable[..., Iterator[tuple[str, dict[str, float]]]]
] = {}  # by name; see mujoco/benchmark


def show_machine(record: dict[str, Any]) -> None:
    """Print where and how a benchmark's record was made."""
    facts = record["provenance"]
    print(f"{facts['cpu']}, {facts['cores']} cores, JAX {facts['jax']} on")
    print(f"{facts['device']}, medians of {record['repeats']}")


def show_table(title: str, rows: dict[str, float]) -> None:
    """Print one table of a benchmark."""
    print(title)
    for name, value in rows.items():
        digits = 0 if value >= 1000 else 3 if value < 10 else 1
        small = 0 < abs(value) < 1e-3
        text = f"{value:.1e}" if small else f"{value:,.{digits}f}"
        print(f"  {name:28} {text:>12}")


def _benchmark(args: argparse.Namespace) -> None:
    tables = BENCHMARKS["machine"](args.repeats)
    if args.algos:
        given = [name.strip() for name in args.algos.split(",")]
        names = list(AGENTS) if given == ["all"] else given
        names = [closest(name, AGENTS, "algorithm") for name in names]
        for name in names:
            loop.defaults(name, args.profile)  # has it such a profile?
        tables = BENCHMARKS["algorithms"](args.repeats, names, args.profile)
    record: dict[str, Any] = {
        "provenance": provenance(), "repeats": args.repeats, "tables": {}
    }  # fmt: skip
    show_machine(record)
    for title, rows in tables:
        record["tables"][title] = rows
        show_table(title, rows)
        if args.json:
            write_record(args.json, record)
    if args.json:
        print(f"written to {args.json}")


# %% What can be set
def _settings_list(args: argparse.Namespace) -> None:
    settings.show(args.algo, args.profile)


def _add_settings(commands: Any) -> None:
    command = commands.add_parser(
        "settings",
        help="list every setting with its meaning",
        description="List every setting of an algorithm and of its loop: "
        "its value in a profile and in the profile paper, and its meaning.",
    )
    command.set_defaults(run=_settings_list)
    command.add_argument(
        "--algo", default="som", metavar="NAME",
        help=f"algorithm, one of {', '.join(AGENTS)} (default: som)",
    )  # fmt: skip
    command.add_argument(
        "--profile", default="laptop", metavar="NAME",
        help="set of hyper-parameters (default: laptop)",
    )  # fmt: skip


# %% Studies
STUDIES: dict[str, Any] = {}  # by name; see the chapters on studies


def _study(args: argparse.Namespace) -> None:
    names = [
        name for name, study in STUDIES.items()
        if not getattr(study, "overnight", False)
    ]  # fmt: skip
    if args.name != "all":
        names = [closest(args.name, STUDIES, "study")]
    # A GPU is one for all; cores are not.
    alone = jax.default_backend() != "cpu"
    processes = 1 if alone else os.cpu_count() or 1
    for name in names:
        study, path = STUDIES[name], Path(args.out) / f"{name}.json"
        seeds = args.seeds[: study.most_seeds]
        print(f"{name}: {len(study.arms)} fits, {len(seeds)} seeds each")
        total = study.total(args.steps)
        with ProgressLine(total, plain_console()) as line:

            def tell(done: int, arm: str, line=line) -> None:
                line.result = f"{arm}  "
                line(done, {})

            study.run(path, seeds, args.steps, tell, processes)
        print(f"written to {path}")


# %% The parser
COMMANDS: dict[str, Callable[[Any], None]] = {}
"""Commands of later chapters: each adds its own to the subparsers."""


class _UsageError(ValueError):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any):
        # An abbreviation would make 42 seeds of `--seed 42`.
        super().__init__(**{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, args=None, namespace=None):  # type: ignore
        known, extra = super().parse_known_args(args, namespace)
        if extra:
            wrong = extra[0].partition("=")[0]
            options = [o for a in self._actions for o in a.option_strings]
            near = difflib.get_close_matches(wrong, options)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            self.error(f"unknown argument {wrong}{hint}")
        return known, extra

    def _check_value(self, action, value):
        if action.choices is not None:
            try:
                closest(value, action.choices, "command")
            except ValueError as error:
                self.error(str(error))

    def error(self, message: str) -> typing.NoReturn:
        raise _UsageError(f"{message} (see {self.prog} --help).")


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train", help="learn a policy", description="Learn a policy."
    )
    train.set_defaults(run=_train)
    option = train.add_argument
    option(
        "--algo",
        default="som",
        metavar="NAME",
        help=f"algorithm, one of {', '.join(AGENTS)} (default: som)",
    )
    option(
        "--env",
        default="HalfCheetah-v4",
        metavar="ID",
        help="Gymnasium task with continuous actions; module:ID imports "
        "a module first (default: HalfCheetah-v4)",
    )
    _add_env_kwargs(train)
    option(
        "--steps",
        type=count,
        default=1_000_000,
        metavar="N",
        help="environment steps per seed; 5e6 is understood; more than the "
        "run in DIR has make it longer (default: 1e6)",
    )
    option(
        "--seeds",
        type=seed_list,
        default=(0,),
        metavar="SEEDS",
        help="a number of seeds (3 is 0, 1, 2), or the seeds themselves "
        "with commas (4,7); they learn side by side (default: 1)",
    )
    option(
        "--profile",
        default="laptop",
        metavar="NAME",
        help="set of settings: laptop, sample-efficient, paper, ... "
        "(default: laptop)",
    )
    option(
        "--out",
        metavar="DIR",
        help="run folder, made if missing (default: runs/ENV, for SOM's "
        "laptop profile; else runs/ENV-ALGO-PROFILE)",
    )
    _add_steering(train)
    option("--set", action="append", default=[], metavar="FIELD=VALUE",
           dest="overrides", help="change one field of the profile; may be "
           "repeated (default: none)")  # fmt: skip


def _add_sweep(commands: Any) -> None:
    command = commands.add_parser(
        "sweep",
        help="train algorithms on tasks with seeds",
        description="Train algorithms on tasks with seeds, one run for "
        "each combination; typed again, go on with what is unfinished.",
    )
    command.set_defaults(run=_sweep)
    option = command.add_argument
    option("--algos", type=names, default=["all"], metavar="NAMES",
           help=f"algorithms with commas, of {', '.join(AGENTS)}; or all "
           "(default: all)")  # fmt: skip
    option("--envs", type=names, default=["all"], metavar="IDS",
           help="Gymnasium tasks with commas, also as module:ID; or all, "
           "the paper's nine (default: all)")  # fmt: skip
    _add_env_kwargs(command)
    option("--seeds", type=seed_list, default=tuple(range(5)),
           metavar="SEEDS", help="a number of seeds, or the seeds themselves "
           "with commas; one run each (default: 5)")  # fmt: skip
    option("--steps", type=count, metavar="N",
           help="environment steps of each run (default: 50 000 for the "
           "profile laptop; else the paper's 1e6 or 5e6)")  # fmt: skip
    option("--profile", default="laptop", metavar="NAME",
           help="set of settings: laptop, sample-efficient, paper, ... "
           "(default: laptop)")  # fmt: skip
    option("--out", default="runs/sweep", metavar="DIR",
           help="folder of the sweep; runs are in DIR/TASK/ALGORITHM/SEED "
           "(default: runs/sweep)")  # fmt: skip
    option("--ray", metavar="ADDRESS",
           help="run on Ray: local starts one on this machine, auto finds "
           "the one that runs here, else HOST:PORT (default: without Ray, "
           "one run after the other)")  # fmt: skip
    option("--cpus", type=float, default=1.0, metavar="N",
           help="cores of each run on Ray (default: 1)")  # fmt: skip
    option("--gpus", type=float, default=0.0, metavar="N",
           help="GPUs of each run on Ray; 0.2 is a fifth of one "
           "(default: 0)")  # fmt: skip
    option("--set", action="append", default=[], metavar="FIELD=VALUE",
           dest="overrides", help="change one field of every algorithm "
           "that has it; may be repeated (default: none)")  # fmt: skip


def _add_env_kwargs(command: Any) -> None:
    command.add_argument(
        "--env-kwargs", action="append", default=[], metavar="FIELD=VALUE",
        help="one argument of the task; may be repeated (default: none)",
    )  # fmt: skip


def _add_steering(command: Any) -> None:
    option = command.add_argument
    option("--film-every", type=count, metavar="N",
           help="also film the first seed's policy every N environment "
           "steps, into DIR/films (default: no films)")  # fmt: skip
    option("--log", action="append", default=[], metavar="NAME",
           help=f"also log the metrics for {' or '.join(LOGS)}; may be "
           "repeated (default: metrics.csv only)")  # fmt: skip
    command.add_argument(
        "--time-limit",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="stop cleanly after so long, with a checkpoint; `som resume` "
        "goes on (default: never)",
    )


def _add_playing(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="play a saved policy and report its returns",
        description="Play a saved policy and report its returns.",
    )
    evaluate.set_defaults(run=_evaluate)
    render = commands.add_parser(
        "render", help="film a policy", description="Film a policy."
    )
    render.set_defaults(run=_render)
    take = commands.add_parser(
        "export",
        help="write a policy for a place without JAX",
        description="Write a policy for a place without JAX.",
    )
    take.set_defaults(run=_export)
    for command in (evaluate, render, take):
        command.add_argument(
            "path", help="a run folder or a policy.npz (no default)"
        )
        command.add_argument(
            "--index", type=int, default=0, metavar="I",
            help="which of the run's seeds, counted from 0 (default: 0)",
        )  # fmt: skip
    for command in (evaluate, render):
        command.add_argument(
            "--seed", type=int, default=0, metavar="N",
            help="seed of the task's first states (default: 0)",
        )  # fmt: skip
    evaluate.add_argument(
        "--episodes",
        type=count,
        default=20,
        metavar="N",
        help="episodes to play (default: 20)",
    )
    take.add_argument(
        "--out", default="policy.onnx", metavar="FILE",
        help="the file: .onnx, or .npz, which NumPy alone can play "
        "(default: policy.onnx)",
    )  # fmt: skip
    take.add_argument(
        "--candidates", type=count, metavar="N",
        help="act with the best of N; 1 leaves the critics out (default: "
        "as it was trained)",
    )  # fmt: skip
    option = render.add_argument
    option(
        "--out",
        default="policy.mp4",
        metavar="FILE",
        help="the film, ending in .mp4 or .gif (default: policy.mp4)",
    )
    option(
        "--seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="length in seconds of the task's own time (default: 10)",
    )
    option(
        "--episodes",
        type=count,
        metavar="N",
        help="film N whole episodes instead (default: by --seconds)",
    )
    option(
        "--width",
        type=count,
        default=480,
        metavar="PIXELS",
        help="width of the picture in pixels (default: 480)",
    )
    option("--height", type=count, default=480, metavar="PIXELS",
           help="height of the picture in pixels (default: 480)")  # fmt: skip


def _add_study(commands: Any) -> None:
    study = commands.add_parser(
        "study",
        help="make the record of a study of the book",
        description="Make the record of a study of the book.",
    )
    study.set_defaults(run=_study)
    option = study.add_argument
    option("name", metavar="NAME",
           help=f"one of {', '.join(STUDIES)}; or all, without those that "
           "take a night (no default)")  # fmt: skip
    option("--seeds", type=seed_list, default=tuple(range(5)),
           metavar="SEEDS", help="a number of seeds, or the seeds themselves "
           "with commas (default: 5)")  # fmt: skip
    option("--steps", type=count, metavar="N",
           help="updates of every fit (default: each fit's own)")  # fmt: skip
    option("--out", default="book/results/studies", metavar="DIR",
           help="folder of the records "
           "(default: book/results/studies)")  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The parser of the command `som`.

    Returns:
        A parser whose result has `run`, the function to call with it.
    """
    top = _Parser(
        prog="som",
        description="Score-based one-step MeanFlow policies: train, watch, "
        "compare.",
    )
    commands = top.add_subparsers(
        title="commands", dest="command", required=True, metavar="COMMAND"
    )
    _add_train(commands)
    _add_sweep(commands)
    resume = commands.add_parser(
        "resume",
        help="continue an interrupted run",
        description="Continue an interrupted run from its last checkpoint, "
        "or make a finished one longer.",
    )
    resume.add_argument("out", metavar="DIR", help="run folder (no default)")
    resume.add_argument(
        "--steps", type=count, metavar="N",
        help="environment steps of the whole run, to make it longer "
        "(default: as many as it has)",
    )  # fmt: skip
    _add_steering(resume)
    resume.set_defaults(run=_resume)
    _add_playing(commands)
    plot = commands.add_parser(
        "plot",
        help="draw learning curves",
        description="Draw the learning curves of runs: mean and 95 % "
        "interval over seeds.",
    )
    plot.add_argument(
        "runs", nargs="+", metavar="DIR",
        help="run folders or record.json files; runs that differ only in "
        "seeds are pooled (no default)",
    )  # fmt: skip
    plot.add_argument("--out", default="curve.png", metavar="FILE",
                      help="picture, .png, .svg or .pdf "
                      "(default: curve.png)")  # fmt: skip
    plot.set_defaults(run=_plot)
    bench = commands.add_parser(
        "benchmark",
        help="measure speed and memory on this machine",
        description="Measure speed and memory on this machine.",
    )
    bench.add_argument(
        "--repeats",
        type=count,
        default=7,
        metavar="N",
        help="timings per median (default: 7)",
    )
    bench.add_argument(
        "--algos",
        metavar="NAMES",
        help="time the agents instead: all, or names with commas "
        "(default: SOM's update and this machine)",
    )
    bench.add_argument("--profile", default="paper", metavar="NAME",
                       help="of those agents (default: paper)")  # fmt: skip
    bench.add_argument("--json", metavar="FILE",
                       help="also write the results there, with their "
                       "provenance (default: not written)")  # fmt: skip
    bench.set_defaults(run=_benchmark)
    _add_settings(commands)
    _add_study(commands)
    for add in COMMANDS.values():
        add(commands)
    return top


def _interrupted(args: argparse.Namespace | None) -> str:
    out = getattr(args, "out", None)
    if args and args.command == "study":
        return "interrupted; the same command goes on after the last fit."
    if args and args.command == "sweep":
        return "interrupted; the same command goes on from what is saved."
    if args is None or args.command not in ("train", "resume") or not out:
        return getattr(args, "interrupted", "interrupted.")
    if not (Path(out) / "checkpoint.npz").exists():
        return "interrupted before the first checkpoint; nothing was saved."
    return (
        f"interrupted; the checkpoint in {out} is complete, and "
        f"`{_invocation()} resume {_word(out)}` goes on from it."
    )


def _find_own_modules() -> None:
    """Look for modules in the current folder, as `python -m som` does."""
    here = os.getcwd()
    if not sys.flags.safe_path and not {"", here} & set(sys.path):
        sys.path.insert(0, here)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `som`.

    Args:
        argv: the words after `som`; by default those of this process.

    Returns:
        The exit status: 0 done, 1 failed, 2 misused, 130 interrupted, 141
        nobody reads what is written, 143 SIGTERM.
    """
    args = None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a path may not fit into ASCII
            stream.reconfigure(errors="backslashreplace")
    # ffmpeg is started by a fork that runs nothing of JAX's threads.
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    try:
        _find_own_modules()
        args = parser().parse_args(argv)
        with runs.terminable():
            args.run(args)
        return 0
    except runs.Terminated:
        status, sentence = 143, _interrupted(args)
    except KeyboardInterrupt:
        status, sentence = 130, _interrupted(args)
    except BrokenPipeError:
        # The reader of our output has left; Python flushes it once more.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status, sentence = 141, _interrupted(args)
    except _UsageError as error:
        status, sentence = 2, str(error)
    except (
        ValueError, OSError, ArithmeticError, MemoryError, GymnasiumError,
        jax.errors.JaxRuntimeError,
    ) as error:  # fmt: skip
        status, sentence = 1, str(error) or type(error).__name__
    sentence = " ".join(sentence.split())
    end = "" if sentence.endswith((".", "?")) else "."
    print(f"som: {sentence}{end}", file=sys.stderr)
    return status
