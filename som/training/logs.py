"""Logs.

Exported by tools/export.py from book/training/logs.md; edit the chapter.
"""

__all__ = [
    "clock",
    "plain_console",
    "ProgressLine",
    "progress_line",
    "first_line",
    "rows",
    "averages",
    "read_table",
    "Table",
    "TensorBoard",
    "WandB",
    "LOGS",
    "curves",
]

# %% Imports
import csv
import io
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from som.agent.actor_critic import AGENTS
from som.training import records
from som.training.loop import Trainer, schedule


# %% Progress
def clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds, 0:01:48."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def plain_console() -> Console:
    """A console on standard output that draws only on a terminal."""
    # Left to itself, rich takes a notebook's output for a terminal.
    return Console(force_jupyter=False, force_terminal=sys.stdout.isatty())


class ProgressLine:
    """A callback `progress(step, metrics)` that tells a person.

    Args:
        total: environment steps of the whole run.
        console: where to write; a bar if it is a terminal, else lines.
        every: least seconds between two lines.
        warmup: environment steps in which nothing is learned.
        unit: what is counted.
    """

    def __init__(
        self,
        total: int,
        console: Console,
        every: float = 5.0,
        warmup: int = 0,
        unit: str = "steps",
    ):
        self.total, self.console, self.every = total, console, every
        self.warmup, self.unit, self.result = warmup, unit, ""
        self._start: tuple[int, float] | None = None
        self._last = -float("inf")
        self._bar = Progress(
            TextColumn(f"{{task.completed:,.0f}} of {{task.total:,}} {unit}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, note="starting")

    def __enter__(self) -> "ProgressLine":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, step: int, metrics: dict[str, Any]) -> None:
        now = time.monotonic()
        self._start = self._start or (step, now)
        speed = (step - self._start[0]) / max(now - self._start[1], 1e-9)
        if "evaluation/return" in metrics:
            mean = float(np.mean(metrics["evaluation/return"]))
            self.result = f"return {mean:,.1f}  "
        note = "warming up  " if step < self.warmup else self.result
        note += f"{speed:,.0f} {self.unit}/s" if speed else ""
        if self.console.is_terminal:
            self._bar.update(self._task, completed=step, note=note)
        elif now - self._last >= self.every or step >= self.total:
            self._last = now
            left = (self.total - step) / speed if speed else 0.0
            self.console.out(
                f"{step:>11,} of {self.total:,} {self.unit}  {note}"
                + (f"  {clock(left)} left" if left else ""),
                highlight=False,
            )


def progress_line(config: dict[str, Any]) -> ProgressLine:
    """The ProgressLine of a run on standard output.

    Args:
        config: what make_config returns.
    """
    warmup = config["loop"]["warmup"]
    return ProgressLine(config["steps"], plain_console(), warmup=warmup)


def first_line(config: dict[str, Any]) -> str:
    """What is learned, where, and for how long.

    Args:
        config: what make_config returns.
    """
    device = jax.devices()[0]
    where = device.platform
    if device.device_kind != where:
        where += f" ({device.device_kind})"
    count, warmup = len(config["seeds"]), config["loop"]["warmup"]
    line = (
        f"{config['algo']} on {config['env']}, profile {config['profile']}, "
        f"on {where}: {config['steps']:,} steps, "
        f"{count} seed{'s' * (count > 1)}"
    )
    usual = schedule(AGENTS[config["algo"]], config["profile"])
    if warmup < usual.warmup and warmup == config["steps"] // 2:
        line += f", warm-up {warmup:,} steps (usually {usual.warmup:,})"
    if (each := config["loop"]["episodes"]) < usual.episodes:
        line += f", {each} episodes an evaluation (usually {usual.episodes})"
    return line


# %% A row for each chunk and seed
def rows(
    trainer: Trainer, metrics: dict[str, Any], returns: Any = None
) -> list[dict[str, Any]]:
    """What is known after a chunk, a row for each seed.

    Args:
        trainer: at the end of a chunk.
        metrics: of that chunk, [S] each.
        returns: of an evaluation, if there was one, [S, episodes].
    """
    ended, lengths = trainer.ends  # [T, S, E]
    table = []
    for i, seed in enumerate(trainer.seeds):
        row = {
            "step": min(trainer.steps, trainer.config["steps"]),
            "seed": seed,
            "seconds": round(trainer.seconds, 2),
            "updates": int(trainer.state.step),
        }
        done = np.isfinite(ended[:, i])
        if done.any():
            row["episode/return"] = float(ended[:, i][done].mean())
            row["episode/length"] = float(lengths[:, i][done].mean())
        row |= {k: float(v[i]) for k, v in metrics.items()}
        if returns is not None:
            row["evaluation/return"] = float(np.mean(returns[i]))
        table.append(row)
    return table


def averages(table: list[dict[str, Any]]) -> dict[str, float]:
    """The mean over the seeds of all but step, seed, seconds and updates."""
    skip = "step", "seed", "seconds", "updates"
    names = dict.fromkeys(k for row in table for k in row if k not in skip)
    return {
        name: float(np.mean([row[name] for row in table if name in row]))
        for name in names
    }


def read_table(path: Path) -> list[dict[str, str]]:
    """The complete rows of a metrics.csv, as text; none if there is none.

    Args:
        path: the file.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]  # a cut line is not a row
    return list(csv.DictReader(io.StringIO(whole), restval=""))


def _step_of(row: dict[str, str]) -> float:
    """The step of a row; infinite where a damaged row has none."""
    try:
        return float(row["step"])
    except (KeyError, TypeError, ValueError):
        return float("inf")


class Table:
    """A metrics.csv to which rows are appended.

    Args:
        path: the file.
        step: rows past this step are thrown away.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path = path
        self.names: list[str] = []
        if path.exists():
            old = read_table(path)
            self._rewrite([r for r in old if _step_of(r) <= step])

    def _rewrite(self, table: Iterable[dict[str, Any]]) -> None:
        table = list(table)
        names = self.names + [name for row in table for name in row]
        self.names = list(dict.fromkeys(names))
        text = self._text(table, header=True).encode()
        records.write_atomically(self.path, lambda file: file.write(text))

    def _text(self, table, header: bool = False) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.names, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(table)
        return text.getvalue()

    def write(self, table: list[dict[str, Any]]) -> None:
        """Append rows; a new name becomes a new column."""
        new = {name for row in table for name in row} - set(self.names)
        if new or not self.path.exists():  # the folder was removed
            self._rewrite([*read_table(self.path), *table])
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(self._text(table))

    def close(self) -> None:
        """Nothing is held open."""


# %% TensorBoard and Weights & Biases
class TensorBoard:
    """The rows as scalars, one for each seed.

    Args:
        out: the run's folder; the events are in its folder tensorboard.
        config: the run's settings.
        step: where the run goes on; what was logged after it is hidden.

    Raises:
        ValueError: tensorboardX is not installed.
    """

    def __init__(self, out: Path, config: dict[str, Any], step: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ValueError(_missing("tensorboardX")) from None
        purge = step + 1 if step else None
        self.writer = SummaryWriter(
            str(out / "tensorboard"),
            purge_step=purge,
            filename_suffix=f".{step}",
        )

    def write(self, table: list[dict[str, Any]]) -> None:
        """Log rows."""
        for row in table:
            for name, value in _measured(row).items():
                title = f"{name}/seed {row['seed']}"
                self.writer.add_scalar(title, value, row["step"])

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class WandB:
    """The rows as a run of Weights & Biases, offline by default.

    Args:
        out: the run's folder; the run is in its folder wandb.
        config: the run's settings.
        step: where the run goes on.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self, out: Path, config: dict[str, Any], step: int):
        try:
            import wandb
        except ImportError:
            raise ValueError(_missing("wandb")) from None
        self.run = wandb.init(
            project="som",
            name=out.name,
            dir=str(out),
            config=config,
            mode=os.environ.get("WANDB_MODE", "offline"),
        )

    def write(self, table: list[dict[str, Any]]) -> None:
        """Log rows."""
        named = {
            f"{name}/seed {row['seed']}": value
            for row in table
            for name, value in _measured(row).items()
        }
        self.run.log(named, step=table[0]["step"])

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()


def _measured(row: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("step", "seed")}


def _missing(package: str) -> str:
    return (
        f"{package} is not installed here: `pip install {package}` brings it"
    )


LOGS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB}


# %% The curve as a table
def curves(run: Any) -> dict[str, list]:
    """The evaluations of a run as columns of equal length.

    Args:
        run: what train returns, its folder, or its record.

    Returns:
        Columns step, seed, seconds, updates, return (the mean over the
        evaluation's episodes), and the metrics; nan where there is none.

    Raises:
        records.CheckpointError: no record in the folder.
    """
    record = getattr(run, "record", run)
    if not isinstance(record, dict):
        record = records.read_run(Path(record) / "record.json")
    table = [
        {
            "step": point["step"],
            "seed": seed,
            "seconds": point["seconds"],
            "updates": point["updates"],
            "return": float(np.mean(np.array(point["returns"][i], float))),
            **{name: of[i] for name, of in point["metrics"].items()},
        }
        for point in record["curve"]
        for i, seed in enumerate(record["seeds"])
    ]
    names = dict.fromkeys(name for row in table for name in row)
    return {k: [row.get(k, float("nan")) for row in table] for k in names}
