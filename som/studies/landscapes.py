"""Three landscapes, four methods.

Exported by tools/export.py from book/studies/landscapes.md; edit the chapter.
"""

__all__ = [
    "Landscape",
    "at_moons",
    "at_cells",
    "hills",
    "circle",
    "drawn",
    "LANDSCAPES",
    "landscape",
    "mode_entropy",
    "tally",
    "picture",
    "rounded",
    "Study",
    "fit_arm",
    "fit_arms",
    "METHODS",
    "OTHERS",
    "Timing",
]

# %% Imports
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from som.studies.bandit import (
    Sampler,
    advance,
    fit_seeds,
    noise_grid,
)
from som.theory.boltzmann import (
    Reward,
    checkerboard,
    eight_modes,
    gaussian_bump,
    moon_gaussians,
    near,
    two_moons,
)
from som.training.command_line import STUDIES, medians
from som.training.records import (
    begun,
    provenance,
    read_record,
    write_record,
)


# %% What counts as a mode
@dataclass(frozen=True, eq=False)
class Landscape:
    """A reward over the square, and what counts as one of its modes.

    Args:
        reward: maps actions [..., 2] to [...].
        at_modes: whether each action [n, 2] is at each mode: [n, m].
    """

    reward: Reward
    at_modes: Callable[[Any], Bool[np.ndarray, "n m"]]


def at_moons(actions) -> Bool[np.ndarray, "n 2"]:
    """Whether each action [n, 2] is within 0.1 of the upper, lower moon."""
    gap = np.asarray(actions)[:, None] - np.asarray(moon_gaussians().means)
    distance = np.linalg.norm(gap, axis=-1).reshape(len(gap), 2, -1)
    return distance.min(-1) < 0.1


def at_cells(actions) -> Bool[np.ndarray, "n 8"]:
    """Whether each action [n, 2] is in each high cell of the board."""
    column, row = np.floor((np.asarray(actions) + 0.8) / 0.4).T
    return np.stack(
        [
            (column == i) & (row == j)
            for i in range(4)
            for j in range(4)
            if (i + j) % 2 == 0
        ],
        axis=-1,
    )


def hills(tall, low=(), std: float = 0.12) -> Landscape:
    """Gaussian hills, the tall ones of height 1.

    Args:
        tall: centres [m, 2]; these are the modes.
        low: decoys as (x, y, height, std).
        std: deviation of the tall hills, in units of the action.
    """
    rows = [(x, y, 1.0, std) for x, y in tall] + list(low)
    x, y, height, width = np.array(rows, np.float32).T

    def reward(a):
        square = (a[..., :1] - x) ** 2 + (a[..., 1:] - y) ** 2
        return jnp.sum(height * jnp.exp(-0.5 * square / width**2), -1)

    return Landscape(jax.jit(reward), lambda actions: near(actions, tall))


def circle(count: int, radius: float, start: float = 0.0):
    """Points (x, y) at equal angles, the first at `start` of a turn."""
    angle = 2 * np.pi * (start + np.arange(count) / count)
    return [(radius * np.cos(x), radius * np.sin(x)) for x in angle]


def drawn(seed: int) -> Landscape:
    """Two to six tall hills and up to four decoys, at random places.

    The hills are narrow and at least 1/2 apart, so that the tall ones are
    equally high and no action is at two of them.
    """
    rng = np.random.default_rng(seed)
    tall, low = rng.integers(2, 7), rng.integers(0, 5)
    places: list[np.ndarray] = []
    while len(places) < tall + low:
        place = rng.uniform(-0.85, 0.85, 2)
        if all(np.linalg.norm(place - other) >= 0.5 for other in places):
            places.append(place)
    decoys = [
        (*place, rng.uniform(0.3, 0.8), rng.uniform(0.08, 0.14))
        for place in places[tall:]
    ]
    return hills(places[:tall], decoys, rng.uniform(0.08, 0.14))


LANDSCAPES: dict[str, Callable[[], Landscape]] = {
    "eight-modes": lambda: Landscape(eight_modes(), near),
    "two-moons": lambda: Landscape(two_moons(), at_moons),
    "checkerboard": lambda: Landscape(checkerboard(), at_cells),
    "three wide": lambda: hills(circle(3, 0.6, 0.25), std=0.2),
    "five and five": lambda: hills(
        circle(5, 0.72), [(*c, 0.6, 0.1) for c in circle(5, 0.72, 0.1)], 0.1
    ),
    "round a hill": lambda: hills(circle(4, 0.7, 0.1), [(0, 0, 0.7, 0.3)]),
    "scattered": lambda: hills(
        [(-0.6, 0.5), (0.1, 0.75), (0.7, -0.1), (-0.2, -0.7)],
        [(0.6, 0.6, 0.8, 0.1), (-0.7, -0.3, 0.7, 0.15), (0, 0, 0.6, 0.1)],
    ),
} | {f"drawn {seed}": partial(drawn, seed) for seed in range(4)}


@cache
def landscape(
    name: str, bump: tuple[float, float] | None = None
) -> Landscape:
    """A landscape by its name, by request with a bump (height, width)."""
    found = LANDSCAPES[name]()
    if bump is None:
        return found
    return Landscape(gaussian_bump(found.reward, *bump), found.at_modes)


# %% What is measured
def mode_entropy(shares: Sequence[float] | np.ndarray) -> float:
    """Entropy of the shares among the modes, from 0 (one) to 1 (all alike).

    No action at any mode counts as 0.
    """
    shares = np.asarray(shares, float)
    if not shares.sum() > 0:
        return 0.0
    p = shares[shares > 0] / shares.sum()
    return 0.0 - float(np.sum(p * np.log(p)) / np.log(len(shares)))


def tally(fits: list[Sampler], scape: Landscape, num: int = 2000) -> dict:
    """Where the actions land, for each seed; shares are [S, m]."""
    key = jax.random.PRNGKey(9)
    actions = [fit(fit.prior(key, num)) for fit in fits]
    shares = [scape.at_modes(a).mean(0) for a in actions]
    grids = [fit(fit.agent.prior_std * noise_grid()) for fit in fits]
    return {
        "shares": shares,
        "entropy": [mode_entropy(s) for s in shares],
        "reward": [float(scape.reward(a).mean()) for a in actions],
        "arrows": [int(scape.at_modes(a).any(1).sum()) for a in grids],
    }


def picture(fits: list[Sampler], scape: Landscape, num: int = 2000) -> dict:
    """What is drawn of the first seed: samples, and paths from a grid."""
    first = fits[0]
    samples = first(first.prior(jax.random.PRNGKey(9), num))
    paths = first.path(first.agent.prior_std * noise_grid())
    return {"samples": rounded(samples), "paths": rounded(paths)}


def rounded(x) -> list:
    """Numbers for a record, to the thousandth."""
    return np.round(np.asarray(x, float), 3).tolist()


# %% A study is a table of fits
@dataclass(frozen=True)
class Study:
    """Fits to be compared, and what is kept of each.

    Args:
        arms: by name, what the fit is told: `algo`, `landscape`, `steps`,
            perhaps a `bump` (height, width) and options of fit_seeds.
        measures: functions of (samplers, Landscape) to a dict for JSON.
        most_seeds: no more than so many, however many are asked for.
    """

    arms: dict[str, dict[str, Any]]
    measures: tuple[Callable[[list[Sampler], Landscape], dict], ...]
    most_seeds: int | None = None

    def total(self, steps: int | None) -> int:
        """Updates of all arms together."""
        return sum(steps or arm["steps"] for arm in self.arms.values())

    def run(
        self,
        path: str | Path,
        seeds: Sequence[int],
        steps: int | None = None,
        progress: Callable[[int, str], None] = lambda done, arm: None,
        processes: int = 1,
    ) -> dict[str, Any]:
        """Fit every arm and write the record.

        Args:
            path: of the record, ending in .json.
            seeds: one agent each, side by side.
            steps: updates, in the place of each arm's own.
            progress: told the updates made so far, and the arm's name.
            processes: as in fit_arms.

        Returns:
            The record.
        """
        path, seeds = Path(path), list(seeds)[: self.most_seeds]
        kept = path.with_suffix(".unfinished.json")
        record = begun(kept, seeds)
        change = {"steps": steps} if steps else {}
        arms = {name: arm | change for name, arm in self.arms.items()}
        made = dict.fromkeys(arms, 0)

        def tell(name: str, done: int) -> None:
            made[name] = done
            progress(sum(made.values()), name)

        todo = {}
        for name, arm in arms.items():
            if record["arms"].get(name, {}).get("settings") == arm:
                tell(name, arm["steps"])
            else:
                todo[name] = arm
        for name, result in fit_arms(
            todo, seeds, self.measures, tell, processes
        ):
            record["arms"][name] = {"settings": arms[name]} | result
            write_record(kept, record)
        record["arms"] = {name: record["arms"][name] for name in arms}
        write_record(path, record)
        kept.unlink()
        return record


def fit_arm(
    arm: dict[str, Any], seeds: Sequence[int], measures, progress
) -> dict[str, Any]:
    """Fit one arm of a study, all seeds side by side, and measure it."""
    hashable = lambda v: tuple(v) if isinstance(v, list) else v
    options: dict[str, Any] = {
        name: hashable(value) for name, value in arm.items()
    }
    names = "algo", "landscape", "steps", "bump"
    algo, name, steps, bump = (options.pop(n, None) for n in names)
    clean = landscape(name)
    scape = landscape(name, bump)
    keys = jnp.stack([jax.random.PRNGKey(seed) for seed in seeds])
    start = time.monotonic()
    fits = fit_seeds(
        algo, scape.reward, keys, steps, progress=progress, **options
    )
    result: dict[str, Any] = {"seconds": time.monotonic() - start}
    for measure in measures:
        result |= measure(fits, clean)
    return result


def fit_arms(
    arms: dict[str, dict[str, Any]],
    seeds: Sequence[int],
    measures,
    tell: Callable[[str, int], None],
    processes: int,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Fit arms, and yield the name and the result of each as it is done.

    Args:
        arms: by name, as in Study.
        seeds, measures: as in fit_arm.
        tell: called with an arm's name and the updates made of it.
        processes: as many arms at once, each in a process with one core;
            with 1 they are fitted in turn and here.

    Raises:
        ChildProcessError: a process ended before its arm was fitted.
    """
    if processes == 1:
        for name, arm in arms.items():
            yield name, fit_arm(arm, seeds, measures, partial(tell, name))
        return
    spawn, waiting = get_context("spawn"), list(arms.items())
    running: dict[Any, tuple[str, Any]] = {}  # by pipe: the arm, its process
    cache_dir = tempfile.mkdtemp(prefix="som-study-")
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                name, arm = waiting.pop(0)
                ours, end = spawn.Pipe(duplex=False)
                told = end, arm, seeds, measures, cache_dir
                job = spawn.Process(target=_fit_apart, args=told, daemon=True)
                job.start()
                end.close()  # the child's alone, so that its death is seen
                running[ours] = name, job
            ready: list[Any] = connection.wait(list(running))
            for pipe in ready:
                name, job = running[pipe]
                try:
                    news = pipe.recv()
                except EOFError:
                    job.join()
                    raise ChildProcessError(
                        f"the fit of {name} ended without a result: "
                        f"its process has exit code {job.exitcode}"
                    ) from None
                if isinstance(news, Exception):
                    raise news
                if isinstance(news, int):
                    tell(name, news)
                else:
                    del running[pipe]
                    yield name, news
    finally:
        for _, job in running.values():
            job.kill()
            job.join()
        shutil.rmtree(cache_dir)


def _fit_apart(pipe, arm, seeds, measures, cache_dir) -> None:
    """Fit one arm in a process of its own: numbers of updates, the result.

    Once the parent is gone, telling it fails and the process ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    os.environ["NPROC"] = "1"  # XLA's threads; the other cores have a fit
    # Small programs are the same in every fit: one compiles them for all.
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", cache_dir)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    try:
        pipe.send(fit_arm(arm, seeds, measures, pipe.send))
    except BrokenPipeError:
        return
    except Exception as error:
        pipe.send(error)


METHODS: dict[str, dict[str, Any]] = {
    name: {"algo": name} for name in ("sdac", "dacer", "som", "mfp")
}

for name, steps in {
    "eight-modes": 12_000,
    "two-moons": 6_000,
    "checkerboard": 6_000,
}.items():
    task = {"landscape": name, "steps": steps}
    STUDIES[name] = Study(
        {k: method | task for k, method in METHODS.items()},
        (tally, picture),
    )

OTHERS = {
    "by-hand": ("three wide", "five and five", "round a hill", "scattered"),
    "drawn": tuple(f"drawn {seed}" for seed in range(4)),
}
for study, names in OTHERS.items():
    STUDIES[study] = Study(
        {
            name: {"algo": "som", "landscape": name, "steps": 12_000}
            for name in names
        },
        (tally, picture),
        most_seeds=2,
    )


# %% What it costs
@dataclass(frozen=True)
class Timing:
    """A study of speed: milliseconds per update and per action."""

    arms: dict[str, dict[str, Any]]
    most_seeds: int | None = None

    def total(self, steps: int | None) -> int:
        """One for each arm."""
        return len(self.arms)

    def run(
        self, path, seeds, steps=None, progress=None, processes=1
    ) -> dict[str, Any]:
        """Time the agents in turn and write the record.

        Args:
            path, seeds, progress: as in Study.run.
            steps: timings per median.
            processes: not used; what is timed wants the machine alone.
        """
        reward = landscape("eight-modes").reward
        keys = jnp.stack([jax.random.PRNGKey(seed) for seed in seeds])
        updates, actions = {}, {}
        for name, arm in self.arms.items():
            fits = fit_seeds(arm["algo"], reward, keys, 1)
            agent, state = fits[0].agent, [fit.state for fit in fits]
            states = jax.tree.map(lambda *x: jnp.stack(x), *state)
            states = states._replace(step=state[0].step)
            updates[name] = partial(
                advance, agent, reward, 0.0, 0.5, states, keys, 50
            )
            act = jax.jit(agent.act)
            actions[name] = partial(act, state[0], jnp.zeros(1), keys[0])
            if progress:
                progress(len(updates), name)
        each = 1e3 / (50 * len(keys))
        record = {
            "seeds": list(seeds),
            "provenance": provenance(),
            "ms per update": {
                k: each * v for k, v in medians(updates, steps or 15).items()
            },
            "ms per action": {
                k: 1e3 * v for k, v in medians(actions, 500).items()
            },
        }
        write_record(path, record)
        return record


STUDIES["speed"] = Timing(METHODS)
