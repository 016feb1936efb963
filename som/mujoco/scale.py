"""The paper's scale.

Exported by tools/export.py from book/mujoco/scale.md; edit the chapter.
"""

__all__ = [
    "STEPS",
    "run_name",
    "train_command",
    "Runs",
    "record_of",
    "find_runs",
    "result",
    "table",
    "missing",
    "SIX",
    "ASKED",
]

# %% Imports
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from som.agent.actor_critic import closest
from som.mujoco.locomotion import EXPLODING, PAPER
from som.training.environments import TASKS
from som.training.loop import make_config
from som.training.records import Table, curve_arrays, mean_ci, read_record
from som.training.sweep import usual_steps


# %% The protocol
STEPS = {task: usual_steps("som", task, "paper") for task in TASKS}


# %% A name for every run
def _settings(changes: dict[str, Any]) -> list[str]:
    """The changes as FIELD=VALUE, sorted, as the command line reads them."""
    word = lambda v: f"{v:g}" if isinstance(v, float) else str(v)
    values = {
        k: ",".join(map(word, v)) if isinstance(v, list | tuple) else word(v)
        for k, v in sorted(changes.items())
    }
    return [f"{field}={value}" for field, value in values.items()]


def run_name(
    env: str, profile: str = "paper", algo: str = "som", **changes
) -> str:
    """The name of a run, the stem of its files.

    Args:
        env: the task.
        profile: set of hyper-parameters.
        algo: name of the algorithm; SOM is not mentioned.
        **changes: fields that differ from the profile.

    Returns:
        Such as "Hopper-v4-paper-rescale=5".
    """
    middle = [] if algo == "som" else [algo]
    return "-".join([env, *middle, profile, *_settings(changes)])


def train_command(
    env: str, profile: str = "paper", algo: str = "som", **changes
) -> str:
    """The command that makes a run: five seeds, the paper's steps.

    Args:
        env, profile, algo, changes: as in run_name.

    Returns:
        One line for the shell; its folder is runs/NAME.

    Raises:
        ValueError: an unknown task, profile, algorithm or field.
    """
    steps = STEPS[closest(env, STEPS, "task")]
    make_config(algo, env, steps, range(5), profile, changes)  # may refuse
    name = run_name(env, profile, algo, **changes)
    words = ["som", "train", "--env", env, "--profile", profile]
    words += ["--algo", algo] if algo != "som" else []
    words += ["--steps", f"{steps // 10**6}e6", "--seeds", "5"]
    for setting in _settings(changes):
        words += ["--set", setting]
    return shlex.join([*words, "--out", f"runs/{name}"])


Runs = dict[str, dict[str, dict[str, Any] | None]]
"""By task and label, the record of a run, or None."""


def record_of(name: str, folder: str | Path) -> dict[str, Any] | None:
    """The kept record of a run, or None.

    Args:
        name: from run_name.
        folder: where NAME.json would lie.
    """
    path = Path(folder) / f"{name}.json"
    return read_record(path) if path.exists() else None


def find_runs(
    tasks: Iterable[str], arms: dict[str, dict[str, Any]], folder: str | Path
) -> Runs:
    """The records of several tasks and settings.

    Args:
        tasks: which tasks.
        arms: by label, keywords of run_name.
        folder: of the kept records.

    Returns:
        By task and label, the record, or None where there is none.
    """
    return {
        task: {
            label: record_of(run_name(task, **arm), folder)
            for label, arm in arms.items()
        }
        for task in tasks
    }


def result(record: dict[str, Any] | None) -> str:
    """The last evaluation in words: mean over seeds and 95 % interval.

    A run that is not at its end says how far it is.
    """
    if record is None:
        return "not yet run"
    steps, returns = curve_arrays(record)
    mean, low, high = mean_ci(returns[:, -1])
    text = f"{mean:.0f} [{low:.0f}, {high:.0f}]"
    if steps[-1] < record["steps"]:
        text += f" at {steps[-1] / 1e6:.2g}M"
    return text


def table(runs: Runs) -> Table:
    """The results: a row for each task, a column for each label."""
    labels = list(next(iter(runs.values())))
    rows = [
        (task, *(result(row[label]) for label in labels))
        for task, row in runs.items()
    ]
    return Table(("task", *labels), rows)


def missing(runs: Runs, arms: dict[str, dict[str, Any]]) -> list[str]:
    """The commands of the runs that have no record.

    Args:
        runs: from find_runs.
        arms: the same as there.
    """
    return [
        train_command(task, **arms[label])
        for task, row in runs.items()
        for label, record in row.items()
        if record is None
    ]


# %% What is asked for
SIX = (
    "HalfCheetah-v4", "Hopper-v4", "Ant-v4", "Humanoid-v4", "Swimmer-v4",
    "Walker2d-v4",
)  # fmt: skip
ASKED: dict[str, tuple[Iterable[str], dict[str, dict[str, Any]]]] = {
    "the nine tasks": (
        TASKS, {p: {"profile": p} for p in ("paper", "paper-literal")}
    ),
    "the other SDE": (TASKS, {"VE": EXPLODING}),
    "length": (SIX, {f"w {w:g}": {"rescale": w} for w in (5.0, 25.0, 1e2)}),
    "sharpening": (SIX, {f"w_s {w}": {"sharpening": w} for w in (0.0, 8.0)}),
    "guesses": (SIX, {f"K {k}": {"num_samples": k} for k in (1, 10, 300)}),
}  # fmt: skip
"""By name of a list, its tasks and its arms: keywords of run_name."""
