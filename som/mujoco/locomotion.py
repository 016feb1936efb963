"""Nine tasks.

Exported by tools/export.py from book/mujoco/locomotion.md; edit the chapter.
"""

__all__ = [
    "STEPS",
    "LOCOMOTION",
    "PAPER",
    "run_name",
    "train_command",
    "Runs",
    "record_of",
    "find_runs",
    "result",
    "table",
    "missing",
    "draw_runs",
    "normalised_mean",
    "player",
]

# %% Imports
import base64
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from som.agent.actor_critic import closest
from som.training.environments import TASKS
from som.training.loop import make_config
from som.training.records import Table, curve_arrays, mean_ci, read_record
from som.training.sweep import usual_steps


# %% The protocol
STEPS = {task: usual_steps("som", task, "paper") for task in TASKS}


LOCOMOTION = (
    "Ant-v4", "HalfCheetah-v4", "Hopper-v4", "Humanoid-v4", "Walker2d-v4",
)  # fmt: skip
_TABLE_1 = """
dacer 6953.5 1029.7 14445.8  281.5 3462.8  709.2 3915.5 3006.2 4723.6 2276.1
dipo  3112.0  640.7 11762.1 1912.9 1962.7  158.8 6139.4  645.9 5425.8  181.3
dpmd  5714.1  887.8 14020.6  946.3 3257.6  623.3 4968.4 1991.1 4953.8  707.1
qsm   1671.0  377.9 13922.1 1032.4 1493.3  146.7 2082.9  842.4 4144.9  575.3
qvpo   430.3 2277.9  5447.0 4585.8 2232.1 1189.3 1127.1  937.4 1323.3 1609.7
sdac  3067.0  926.6 14820.9 1049.0 2036.4  431.5 5803.5  520.6 4702.1  627.4
mfp   5150.7  785.6  6400.3  966.5 1280.3  981.8 4862.2  603.1 1849.8 1356.2
sac   5711.6  530.4 11098.7 1697.4 1722.6  248.7 5179.5  335.0 5348.6  712.9
ppo   5417.2  283.6  7112.6  576.7 2282.5  770.3  299.2  119.0 3096.3  540.3
som   7033.5  304.2 15789.8  910.9 3425.2  353.6 7365.7  493.3 5472.8  526.9
"""
PAPER = {
    row.split()[0]: dict(
        zip(LOCOMOTION, np.array(row.split()[1:], float).reshape(5, 2))
    )
    for row in _TABLE_1.strip().splitlines()
}
"""Table 1: by algorithm and task, the mean return and its half width."""


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


def draw_runs(axes, runs: Runs, colours: dict[str, str]) -> None:
    """Learning curves: thin lines for seeds, thick ones for their mean.

    Args:
        axes: of matplotlib, one for each task; dashed where Table 1 has a
            return of SOM, which also fixes the height.
        runs: from find_runs.
        colours: by label.
    """
    for ax, (task, row) in zip(axes, runs.items(), strict=True):
        if task in PAPER["som"]:
            level = PAPER["som"][task][0]
            ax.axhline(level, color="0.4", ls="--", lw=1)
            ax.set_ylim(0, 1.25 * level)
        for label, record in row.items():
            if record is not None:
                steps, returns = curve_arrays(record)
                ax.plot(steps, returns.T, color=colours[label], lw=0.5)
                ax.plot(steps, returns.mean(0), color=colours[label], lw=2)
        if not any(row.values()):
            ax.text(0.5, 0.4, "not yet run", ha="center", color="0.4",
                    transform=ax.transAxes, fontsize=9)  # fmt: skip
        ax.set_xlim(0, STEPS[task])
        ax.set_xticks([0, STEPS[task]], ["0", f"{STEPS[task] // 10**6}M"])
        ax.set_title(task.removesuffix("-v4"), fontsize=9)
        ax.tick_params(labelsize=7)


# %% One number for five tasks
def normalised_mean(
    returns: Float[np.ndarray, "*S 5"],
) -> Float[np.ndarray, "*S"]:
    """Min-max normalised return, averaged over the tasks of LOCOMOTION.

    The range of a task is that of the ten means in the paper's Table 1.

    Args:
        returns: one for each task of LOCOMOTION, perhaps for each seed.

    Returns:
        0 where all are the table's least, 1 where all are its greatest.
    """
    means = np.array([[row[e][0] for e in LOCOMOTION]
                      for row in PAPER.values()])  # fmt: skip
    low, high = means.min(0), means.max(0)
    return np.asarray(np.mean((returns - low) / (high - low), -1))


# %% To look at
def player(film: str | Path, label: str) -> str:
    """A film as HTML that carries its own data.

    Args:
        film: an .mp4 file.
        label: what is seen, for those who do not see it.
    """
    data = base64.b64encode(Path(film).read_bytes()).decode()
    return (
        f'<figure><video controls loop muted width="320" aria-label="{label}"'
        f' src="data:video/mp4;base64,{data}"></video>'
        f"<figcaption>{label}</figcaption></figure>"
    )
