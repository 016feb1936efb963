"""Nine tasks.

Exported by tools/export.py from book/mujoco/locomotion.md; edit the chapter.
"""

__all__ = [
    "LOCOMOTION",
    "PAPER",
    "Group",
    "SOM",
    "BEFORE",
    "LAPTOP",
    "PRINTED",
    "PIECES",
    "EXPLODING",
    "THREE",
    "GROUPS",
    "FIRST_SEED",
    "LongRun",
    "long_runs",
    "row_of",
    "NineTasks",
    "Curves",
    "learning_curves",
    "final",
    "COLOURS",
    "draw",
    "player",
    "normalised_mean",
]

# %% Imports
import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from som.training import sweep
from som.training.command_line import STUDIES
from som.training.environments import TASKS
from som.training.loop import completed
from som.training.records import (
    Table,
    curve_arrays,
    in_words,
    mean_ci,
    read_record,
    read_run,
    write_record,
)


# %% What the paper reports
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


# %% Runs that fit into a night
class Group(NamedTuple):
    """Runs that are compared: every arm on every task."""

    tasks: tuple[str, ...]
    arms: dict[str, dict[str, Any]]
    """By label: `algo`, `profile`, and settings that differ from it."""
    steps: int
    seeds: int


SOM = {"algo": "som", "profile": "sample-efficient"}
BEFORE = {
    "residual": False, "inverse_temperature": 10.0, "target_particles": 1,
    "normalize_observations": False, "climb": 0.0,
}  # fmt: skip
LAPTOP = {"algo": "som", "profile": "laptop"}
PRINTED = {
    "algo": "som", "profile": "paper-literal", "width": 128,
    "batch_size": 128, "num_particles": 16, "num_samples": 12, "tau": 0.02,
    "reward_scale": 1.0, "actor_lr": 1e-3, "critic_lr": 1e-3,
    "initial_alpha": 1.0, "policy_delay": 1, "warmup": 5_000,
    "updates_per_step": 0.4, "normalize_observations": True,
}  # fmt: skip
PIECES: dict[str, dict[str, Any]] = {
    "β to 20": {"noise_range": (0.1, 20.0)},
    "Eulerian target": {"target": "jvp", "anchor_share": 0.0},
    "no rows from the prior": {"prior_share": 0.0},
    "α as temperature": {"inverse_temperature": None, "q_scale": "batch"},
    "online policy": {"ema_policy": False},
}
"""Pieces of the printed algorithm; two more have groups of their own."""
EXPLODING = {"sde": "ve", "noise_range": (0.03, 1.5)}  # see the chapter
THREE = "HalfCheetah-v4", "Hopper-v4", "Walker2d-v4"
GROUPS = {
    "main": Group(
        tuple(TASKS),
        {"SOM": SOM, "SAC": SOM | {"algo": "sac", "num_particles": 16}},
        100_000,
        4,
    ),
    "before": Group(tuple(TASKS), {"SOM before": SOM | BEFORE}, 100_000, 1),
    "flow alone": Group(
        tuple(TASKS), {"flow alone": SOM | {"climb": 0.0}}, 100_000, 2
    ),
    "laptop": Group(
        (*THREE, "InvertedDoublePendulum-v4", "Humanoid-v4"),
        {"laptop": LAPTOP},
        50_000,
        2,
    ),
    "as printed": Group(
        ("HalfCheetah-v4", "Hopper-v4", "InvertedDoublePendulum-v4"),
        {"as printed": PRINTED}
        | {name: LAPTOP | piece for name, piece in PIECES.items()},
        50_000,
        2,
    ),
    "length": Group(
        THREE,
        {f"w {w:g}": LAPTOP | {"rescale": w} for w in (5.0, 25.0, 100.0)},
        50_000,
        2,
    ),
    "guesses": Group(
        THREE,
        {
            f"K {k}, {name}": LAPTOP | {"num_samples": k, "estimator": name}
            for name in ("combined", "idem")
            for k in (4, 16, 64)
        },
        50_000,
        2,
    ),
    "exploding": Group(
        (*THREE, "Humanoid-v4"), {"VE": LAPTOP | EXPLODING}, 50_000, 2
    ),
    "one step": Group(
        THREE, {"MFP": {"algo": "mfp", "profile": "laptop"}}, 50_000, 2
    ),
}
"""All runs of this part, in the order in which they are made."""
FIRST_SEED = 10  # settings were chosen on lower ones


class LongRun(NamedTuple):
    """One run of a group."""

    group: str
    label: str
    job: sweep.Job


def long_runs(
    folder: str | Path, seeds: Sequence[int], steps: int | None = None
) -> list[LongRun]:
    """All runs, group by group, seed by seed.

    Args:
        folder: of the runs; below it a folder for each group, in it one for
            each label, and in that what a sweep makes.
        seeds: 0, 1, ...; a group takes as many as it has, and adds
            FIRST_SEED to each.
        steps: environment steps, in the place of each group's own.
    """
    found = []
    for name, group in GROUPS.items():
        runs = [
            LongRun(name, label, job)
            for label, arm in group.arms.items()
            for job in sweep.plan(
                [arm["algo"]], group.tasks,
                [FIRST_SEED + seed for seed in seeds[: group.seeds]],
                Path(folder) / name / label, steps or group.steps,
                evaluations=10, episodes=10,
                **{k: v for k, v in arm.items() if k != "algo"},
            )
        ]  # fmt: skip
        at = lambda run, tasks=group.tasks: (
            run.job.config["seeds"], tasks.index(run.job.config["env"])
        )  # fmt: skip
        found += sorted(runs, key=at)
    return found


def row_of(run: LongRun) -> dict[str, Any]:
    """What is kept of a run that has ended."""
    names = "env", "algo", "profile", "steps"
    row: dict[str, Any] = {"group": run.group, "label": run.label}
    row |= {name: run.job.config[name] for name in names}
    row |= {"seed": run.job.config["seeds"][0], "config": run.job.config}
    failed = run.job.folder / "failed.json"
    if failed.exists():
        return row | {"failed": read_record(failed)["error"]}
    made = read_run(run.job.folder / "record.json")
    at, returns = curve_arrays(made)
    return row | {
        "evaluated_at": at.tolist(),
        "returns": returns[0].round(2).tolist(),
        "seconds": round(made["wall_seconds"]),
        "provenance": made["provenance"],
    }


@dataclass(frozen=True)
class NineTasks:
    """The long runs as a study; a night on two cores.

    Args:
        folder: of the runs.
        most_seeds: no more than so many, however many are asked for.
        overnight: `som study all` leaves it out.
    """

    folder: str = "runs/nine-tasks"
    most_seeds: int = 4
    overnight: bool = True

    @property
    def arms(self) -> list[str]:
        """Name of each arm."""
        return [f"{g}, {a}" for g in GROUPS for a in GROUPS[g].arms]

    def total(self, steps: int | None) -> int:
        """Environment steps of all runs together."""
        return sum(
            len(g.tasks) * len(g.arms) * g.seeds * (steps or g.steps)
            for g in GROUPS.values()
        )

    def run(
        self, path, seeds, steps=None, progress=None, processes=1
    ) -> dict[str, Any]:
        """Make every run that the record lacks, and write the record.

        Args:
            path: of the record, ending in .json; written after each run.
            seeds: 0, 1, ..., as in long_runs.
            steps: environment steps, in the place of each group's own.
            progress: told the steps made so far, and what is running.
            processes: with more than one, as many runs at once, on Ray.

        Returns:
            The record: `runs`, a row for each.
        """
        path, each = Path(path), range(self.most_seeds)
        whole = long_runs(self.folder, each, steps)
        rows = read_record(path)["runs"] if path.exists() else []
        known = [run.job.config for run in whole]
        rows = [
            row | {"config": config} for row in rows
            if (config := completed(row["config"])) in known
        ]  # fmt: skip
        have = [row["config"] for row in rows]
        asked = {FIRST_SEED + seed for seed in seeds}
        todo = [
            run for run in whole
            if run.job.config["seeds"][0] in asked
            and run.job.config not in have
        ]  # fmt: skip
        before = sum(config["steps"] for config in have)

        def keep() -> None:
            ended = [run for run in todo if sweep.has_ended(run.job)]
            if len(rows) < len(have) + len(ended):
                rows[len(have) :] = map(row_of, ended)
                write_record(path, {"runs": rows})

        def tell(done: int, status: str) -> None:
            keep()
            if progress:
                progress(before + done, status)

        jobs, alone = [run.job for run in todo], processes == 1
        make = sweep.one_by_one if alone else sweep.on_ray
        make(jobs, progress=tell)
        keep()
        return {"runs": rows}


STUDIES["nine-tasks"] = NineTasks()


class Curves(NamedTuple):
    """The learning curves of an arm on a task."""

    steps: Float[np.ndarray, " P"]
    returns: Float[np.ndarray, "S P"]
    seeds: tuple[int, ...]
    minutes: float
    """Wall time of the quickest seed; the others were disturbed."""


def learning_curves(
    record: dict[str, Any], *groups: str
) -> dict[str, dict[str, Curves]]:
    """The finished runs of groups, by task and label.

    Args:
        record: of the study.
        groups: keys of GROUPS.
    """
    found: dict[str, dict[str, Curves]] = {}
    places = [
        (group, task, label)
        for group in groups
        for task in GROUPS[group].tasks
        for label in GROUPS[group].arms
    ]
    for place in places:
        rows = [
            row for row in record["runs"]
            if (row["group"], row["env"], row["label"]) == place
            and "failed" not in row
        ]  # fmt: skip
        if rows:
            _, task, label = place
            found.setdefault(task, {})[label] = Curves(
                np.array(rows[0]["evaluated_at"]),
                np.array([row["returns"] for row in rows]),
                tuple(row["seed"] for row in rows),
                min(row["seconds"] for row in rows) / 60,
            )
    return found


def final(arm: Curves | None) -> str:
    """The last evaluation in words: mean over seeds, 95 % interval."""
    if arm is None:
        return ""
    mean, low, high = map(float, mean_ci(arm.returns[:, -1]))
    return in_words(mean, low, high)


COLOURS = {"SOM": "#0072B2", "SAC": "#D55E00"}


def draw(figure: Figure, found: dict[str, dict[str, Curves]]) -> None:
    """Learning curves of the main group, a panel for each task.

    Thin lines are seeds, thick ones their mean. Dashed: the paper's final
    return of SOM, where it is not far above the panel.

    Args:
        figure: of matplotlib, empty.
        found: from learning_curves.
    """
    rows = -(-len(found) // 3)
    figure.set(facecolor="white", layout_engine="constrained")
    figure.set_size_inches(7, 1.9 * rows)
    axes = figure.subplots(rows, 3, squeeze=False).flat
    for ax, (task, arms) in zip(axes, found.items(), strict=False):
        for label, arm in arms.items():
            x, color = arm.steps / 1000, COLOURS[label]
            ax.plot(x, arm.returns.T, color=color, lw=0.5)
            ax.plot(x, arm.returns.mean(0), color=color, lw=2, label=label)
        low, high = ax.get_ylim()
        level = PAPER["som"].get(task, (np.inf, 0))[0]
        if level < high + 0.5 * (high - low):
            ax.axhline(level, color="0.4", ls="--", lw=1)
        ax.set_title(task.removesuffix("-v4"), fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=7)
    for ax in list(figure.axes)[len(found) :]:
        ax.set_visible(False)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        *handles, loc="outside upper center", ncols=len(COLOURS),
        fontsize=8, frameon=False,
    )  # fmt: skip
    figure.supxlabel("thousand environment steps", fontsize=9)
    figure.supylabel("return", fontsize=9)


# %% To look at
def player(film: str | Path, label: str) -> str:
    """A film as HTML that carries its own data.

    Args:
        film: an .mp4 file.
        label: what is seen, for those who do not see it.
    """
    data = base64.b64encode(Path(film).read_bytes()).decode()
    return (
        f'<figure><video controls loop muted width="200" aria-label="{label}"'
        f' src="data:video/mp4;base64,{data}"></video>'
        f"<figcaption>{label}</figcaption></figure>"
    )


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
