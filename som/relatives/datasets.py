"""Recordings to learn from.

Exported by tools/export.py from book/relatives/datasets.md; edit the chapter.
"""

__all__ = [
    "Episode",
    "returns",
    "Uniform",
    "COPIES",
    "DATA_SEED",
    "record",
    "repeat",
    "replayed",
    "Maze",
    "MAZES",
    "needed",
    "BallMaze",
    "next_cells",
    "Waypoints",
    "REFERENCES",
    "references",
    "normalized_score",
    "maze_test",
    "Steps",
    "stack_steps",
    "ROOT",
    "minari_root",
    "content_hash",
    "set_folder",
    "write_set",
    "Recordings",
    "read_set",
    "Recipe",
    "gather",
    "make_set",
    "ROBOTS",
    "EXPERT_STEPS",
    "training_command",
    "recipes",
    "describe",
    "episode_counts",
]

# %% Imports
import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from som.agent.actor_critic import closest
from som.training import environments, replay
from som.training.checkpoints import load_checkpoint
from som.training.command_line import COMMANDS, count
from som.training.environments import Task, as_task, rescale
from som.training.logs import ProgressLine, plain_console
from som.training.loop import Trainer
from som.training.policy import load
from som.training.records import CheckpointError
from som.training.runs import read_config


# %% An episode
class Episode(NamedTuple):
    """One recorded episode.

    Args:
        observation: [T + 1, O]; the last is the one after the last step.
        action: [T, A], in the task's units.
        reward: of each step, [T].
        terminated: the task reached an end after the last step.
        truncated: the recording was cut there, and the task was not over.
        seed: of the environment's reset; None where it is not known.
    """

    observation: Float[np.ndarray, "later O"]
    action: Float[np.ndarray, "T A"]
    reward: Float[np.ndarray, " T"]
    terminated: bool
    truncated: bool
    seed: int | None = None


def returns(episodes: Sequence[Episode]) -> Float[np.ndarray, " P"]:
    """Undiscounted return of each of P episodes, summed in double."""
    return np.array([e.reward.sum(dtype=np.float64) for e in episodes])


# %% Playing
class Uniform:
    """Acts at random, whatever it observes.

    Args:
        action_size: A.
    """

    algo = "uniform"

    def __init__(self, action_size: int):
        self.action_size = action_size
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """Begin the random numbers anew."""
        self._rng = np.random.default_rng(seed)

    def act(self, observation) -> Float[np.ndarray, "*E A"]:
        """Actions for observations [..., O], uniform in [-1, 1]."""
        shape = (*np.shape(observation)[:-1], self.action_size)
        return self._rng.uniform(-1, 1, shape).astype(np.float32)


COPIES = 100  # of the task, at most, that play side by side
DATA_SEED = 2_000_000
"""Added to a seed: no recording begins where an evaluation does."""


def record(
    actor: Any,
    env: Any,
    episodes: int,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda done: None,
) -> list[Episode]:
    """Record whole episodes.

    Args:
        actor: has `reset(seed)`, and `act` from [E, O] to [E, A].
        env: an id, a factory or a Task.
        episodes: how many.
        seed: of the environments and of the actor.
        progress: told the episodes that have ended.

    Returns:
        The episodes: the first of every copy, then the second, and so on.

    Raises:
        ValueError: no episodes, or an unknown task.
        environments.TaskError: the task fails.
    """
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}; at least 1 is wanted")
    copies = min(episodes, COPIES)
    rounds = -(-episodes // copies)
    actor.reset(seed)
    steps, begun = [], []
    ended = np.zeros(copies, int)
    with environments.make(env, copies, DATA_SEED + seed) as envs:
        bounds = envs.action_low, envs.action_high
        observation, seeds = envs.reset(), envs.episode_seeds()
        while (ended < rounds).any():
            action = np.asarray(actor.act(observation), np.float32)
            step = envs.step(action)
            steps.append((observation, rescale(action, *bounds), step))
            begun.append(seeds)
            observation, done = step.observation, step.terminated
            if (done := done | step.truncated).any():
                ended, seeds = ended + done, envs.episode_seeds()
                progress(min(episodes, int(ended.clip(0, rounds).sum())))
    return _cut(steps, np.array(begun), rounds)[:episodes]


def _cut(steps: list[Any], begun, rounds: int) -> list[Episode]:
    """Episodes of copies that were stepped together, round by round."""
    observation, action, step = zip(*steps, strict=True)
    rows = environments.Step(*map(np.stack, zip(*step, strict=True)))
    arrays = np.stack(observation), np.stack(action), rows.reward
    done = rows.terminated | rows.truncated
    found = []
    for i in range(done.shape[1]):
        last = np.flatnonzero(done[:, i])[:rounds]
        first = [0, *(last[:-1] + 1)]
        for a, b in zip(first, last, strict=True):
            s, u, r = (x[a : b + 1, i].copy() for x in arrays)
            s = np.concatenate([s, rows.next_observation[b, i][None]])
            flags = bool(rows.terminated[b, i]), bool(rows.truncated[b, i])
            flags = flags[0], flags[1] and not flags[0]
            found.append(Episode(s, u, r, *flags, int(begun[a, i])))
    return [found[i * rounds + k] for k in range(rounds)
            for i in range(done.shape[1])]  # fmt: skip


def repeat(episode: Episode, env: Any) -> Float[np.ndarray, "later O"]:
    """Send an episode's actions to its task again.

    Args:
        episode: with its seed.
        env: an id, a factory or a Task.

    Returns:
        The observations [T + 1, O] that they lead through.

    Raises:
        ValueError: the episode has no seed.
    """
    if episode.seed is None:
        raise ValueError("the episode's seed is None; a number is wanted")
    one = environments.make_one(env)
    seen = [one.reset(seed=episode.seed)[0]]
    for action in episode.action:
        seen.append(one.step(action)[0])
    one.close()
    return np.array(seen, np.float32)


# %% The memory of a run
def replayed(run: str | Path, index: int = 0) -> list[Episode]:
    """The episodes that the replay of a run holds, oldest first.

    Args:
        run: the folder of the run, with its checkpoint.
        index: which of its seeds, counted from 0.

    Raises:
        CheckpointError: no run there, or one without a whole checkpoint.
        ValueError: no such seed.
    """
    out = Path(run)
    config = read_config(out)
    seeds = config["seeds"]
    if not 0 <= index < len(seeds):
        raise ValueError(
            f"index is {index}; the run has {len(seeds)} seed(s), counted "
            "from 0"
        )
    with contextlib.closing(
        Trainer(config, environments.recorded(config))
    ) as trainer:
        buffer = load_checkpoint(trainer, out / "checkpoint.npz")
        added, capacity = int(buffer.added[index]), trainer.loop.capacity
        rows = np.asarray(buffer.rows[index])[: min(added, capacity)]
        rows = (
            np.roll(rows, -(added % capacity), 0)
            if added > capacity
            else rows
        )
        rows = np.concatenate([rows, np.asarray(trainer.rows[index])])
        first, agent = max(0, added - capacity), trainer.agent
        parts = replay.unpack(
            jnp.asarray(rows), agent.action_size, agent.rewrites
        )
        low, high = trainer.envs[0].action_low, trainer.envs[0].action_high
    s, a, r, ended, after = (np.asarray(x) for x in parts[:5])
    copy = (first + np.arange(len(s))) % trainer.loop.num_envs
    whole = s, rescale(a, low, high), r, ended > 0, after
    pieces = [_split(*(x[copy == i] for x in whole)) for i in range(
        trainer.loop.num_envs)]  # fmt: skip
    return [e for piece in pieces for e in piece]


def _split(s, a, r, ended, after) -> list[Episode]:
    """Episodes of rows that follow each other, but where one ended."""
    follows = (s[1:] == after[:-1]).all(-1) & ~ended[:-1]
    last = np.flatnonzero(np.append(~follows, True))
    first = [0, *(last[:-1] + 1)]
    return [
        Episode(np.concatenate([s[i : j + 1], after[j : j + 1]]),
                a[i : j + 1], r[i : j + 1], bool(ended[j]), not ended[j])
        for i, j in zip(first, last, strict=True)
    ]  # fmt: skip


# %% Mazes
class Maze(NamedTuple):
    """A maze: its map, the longest episode, the goal of its test.

    Args:
        rows: of cells one metre wide; `#` is a wall.
        steps: after which an episode is cut.
        goal: row and column, counted from 0, of the test's goal.
    """

    rows: tuple[str, ...]
    steps: int
    goal: tuple[int, int]

    @property
    def free(self) -> Bool[np.ndarray, "R C"]:
        """Whether each cell is free."""
        return np.array([list(row) for row in self.rows]) != "#"

    def centre(self, cell: Any) -> Float[np.ndarray, "*B 2"]:
        """Places x, y in metres of cells (row, column), [..., 2]."""
        cell, middle = np.asarray(cell), np.array(self.free.shape) / 2
        y, x = np.moveaxis(middle - cell - 0.5, -1, 0)
        return np.stack([-x, y], -1)

    def cell(self, place: Any) -> Int[np.ndarray, "*B 2"]:
        """Cells (row, column) of places x, y in metres, [..., 2]."""
        x, y = np.moveaxis(np.asarray(place), -1, 0)
        middle = np.array(self.free.shape) / 2
        return np.floor(middle + np.stack([-y, x], -1)).astype(int)


MAZES: dict[str, Maze] = {
    "MazeU-v0": Maze(
        ("#####", "#...#", "###.#", "#...#", "#####"), 300, (1, 1)
    ),
    "MazeMedium-v0": Maze(
        ("########", "#..##..#", "#..#...#", "##...###",
         "#..#...#", "#.#..#.#", "#...#..#", "########"), 600, (6, 6),
    ),
}  # fmt: skip


def needed(module: str) -> Any:
    """Import a module of the extra `relatives`.

    Raises:
        ValueError: it is not installed.
    """
    package = module.partition(".")[0]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # it has news
            importlib.import_module(package)
            return importlib.import_module(module)
    except ModuleNotFoundError:
        name = package.replace("_", "-")
        raise ValueError(
            f"{name} is not installed here: `pip install "
            "'som[relatives]'`, or in this repository `pip install -e "
            "'.[relatives]'`, brings it"
        ) from None


class BallMaze(gym.Wrapper):
    """A ball in a maze; observes place, velocity and goal, [6].

    Args:
        maze: a key of MAZES.
        goal: row and column of a cell whose centre stays the goal; by
            default the next goal is drawn when one is reached.
        render_mode: as Gymnasium has it.

    Raises:
        ValueError: an unknown maze, a goal that is no free cell.
    """

    def __init__(self, maze: str, goal=None, render_mode: str | None = None):
        self.plan = MAZES[closest(maze, MAZES, "maze")]
        self.goal = None if goal is None else tuple(map(int, goal))
        free = list(map(tuple, np.argwhere(self.plan.free).tolist()))
        if self.goal is not None and self.goal not in free:
            raise ValueError(
                f"goal is {self.goal}; a free cell of {maze}, such as "
                f"{self.plan.goal}, is wanted"
            )
        point = needed("gymnasium_robotics.envs.maze.point_maze")
        one = point.PointMazeEnv(
            (1 - self.plan.free.astype(int)).tolist(), render_mode,
            continuing_task=True, reset_target=goal is None,
        )  # fmt: skip
        Path(one.tmp_xml_file_path).unlink(missing_ok=True)
        super().__init__(one)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (6,))

    def reset(self, *, seed=None, options=None):
        """Begin an episode; see Gymnasium."""
        if self.goal is not None:
            options = (options or {}) | {"goal_cell": np.array(self.goal)}
        seen, info = self.env.reset(seed=seed, options=options)
        if self.goal is not None:  # drawn near the centre; now in it
            one: Any = self.env
            one.goal[:] = self.plan.centre(self.goal)
            one.update_target_site_pos()
            seen = seen | {"desired_goal": one.goal}
        return self._flat(seen), info

    def step(self, action):
        """Take one step; see Gymnasium."""
        seen, *rest = self.env.step(action)
        return self._flat(seen), *rest

    def _flat(self, seen) -> Float[np.ndarray, "6"]:
        parts = seen["observation"], seen["desired_goal"]
        return np.concatenate(parts).astype(np.float32)


for _name, _maze in MAZES.items():
    if _name not in gym.registry:
        gym.register(
            _name, "som.relatives.datasets:BallMaze",
            max_episode_steps=_maze.steps, kwargs={"maze": _name},
        )  # fmt: skip


# %% The way
def next_cells(
    free: Bool[np.ndarray, "R C"],
) -> Int[np.ndarray, "R C R C 2"]:
    """For each goal, and each cell, the neighbour one step nearer.

    Args:
        free: whether each cell is free.

    Returns:
        Row and column [goal's row, column, cell's row, column, 2]; the
        cell itself at the goal, in walls, and where no way leads.
    """
    nearer = np.tile(np.indices(free.shape).transpose(1, 2, 0),
                     (*free.shape, 1, 1, 1))  # fmt: skip
    for goal in map(tuple, np.argwhere(free)):
        waiting, seen = deque([goal]), {goal}
        while waiting:
            i, j = cell = waiting.popleft()
            for near in ((i, j + 1), (i + 1, j), (i, j - 1), (i - 1, j)):
                inside = near[0] < free.shape[0] and near[1] < free.shape[1]
                if inside and min(near) >= 0 and free[near]:
                    if near not in seen:
                        nearer[goal][near] = cell
                        seen.add(near)
                        waiting.append(near)
    return nearer


# %% The steering
class Waypoints:
    """Steers the ball of a maze from cell to cell towards its goal.

    Equation (eq-datasets-steering) of the chapter.

    Args:
        maze: a key of MAZES.
        noise: deviation of the noise on each action, in units of it.
        spread: most metres by which the way is shifted.
    """

    algo = "waypoints"
    gains = 10.0, 1.0  # of the distance, 1/m; of the velocity, s/m

    def __init__(self, maze: str, noise: float = 0.3, spread: float = 0.2):
        self.maze = MAZES[closest(maze, MAZES, "maze")]
        self.noise, self.spread = noise, spread
        self._next = next_cells(self.maze.free)
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """Begin the random numbers anew."""
        self._rng = np.random.default_rng(seed)
        self._goal = self._shift = np.zeros((0, 2))

    def act(self, observation) -> Float[np.ndarray, "E 2"]:
        """Forces for observations [E, 6]: place, velocity, goal."""
        place, velocity, goal = np.split(np.asarray(observation), 3, -1)
        shift = self._rng.uniform(-self.spread, self.spread, goal.shape)
        if goal.shape == self._goal.shape:
            kept = (goal == self._goal).all(-1, keepdims=True)
            shift = np.where(kept, self._shift, shift)
        self._goal, self._shift = goal, shift
        cell, end = self.maze.cell(place), self.maze.cell(goal)
        way = self.maze.centre(self._next[(*end.T, *cell.T)]) + shift
        way = np.where((cell == end).all(-1, keepdims=True), goal, way)
        spring, damper = self.gains
        pull = spring * (way - place) - damper * velocity
        pull += self.noise * self._rng.normal(size=pull.shape)
        return np.clip(pull, -1, 1).astype(np.float32)


# %% Scores
REFERENCES: dict[str, tuple[float, float]] = {
    "Hopper": (-20.27, 3234.3),
    "HalfCheetah": (-280.18, 12135.0),
    "Walker2d": (1.63, 4592.3),
    "MazeU": (0.0, 228.0),
    "MazeMedium": (0.0, 471.0),
}  # least and greatest return, by task without its version


def references(env: Any) -> tuple[float, float] | None:
    """Returns that score 0 and 100; None for a task without them."""
    return REFERENCES.get(as_task(env).name.rpartition("-v")[0])


def normalized_score(env: Any, value: Any) -> Any:
    """Score of returns on a task, Equation (eq-datasets-score).

    Args:
        env: an id or a Task.
        value: returns of any shape.

    Raises:
        ValueError: the task has no reference scores.
    """
    scale = references(env)
    if scale is None:
        raise ValueError(
            f"{as_task(env).name} has no reference scores; known are those "
            f"of {', '.join(REFERENCES)}"
        )
    return 100 * (np.asarray(value) - scale[0]) / (scale[1] - scale[0])


def maze_test(name: str) -> Task:
    """The test of a maze: one goal that stays."""
    return Task(name, {"goal": MAZES[closest(name, MAZES, "maze")].goal})


# %% Arrays to learn from
class Steps(NamedTuple):
    """The steps of P episodes, one after the other, n together.

    Args:
        observation: s, [n, O].
        action: a in [-1, 1], [n, A].
        reward: r, [n].
        next_observation: s', [n, O]; true also where an episode ends.
        terminated: the task reached an end after this step, [n].
        truncated: the recording was cut after this step, [n].
        time: steps since the episode's first, [n].
        first: index of each episode's first step, [P].
    """

    observation: Float[np.ndarray, "n O"]
    action: Float[np.ndarray, "n A"]
    reward: Float[np.ndarray, " n"]
    next_observation: Float[np.ndarray, "n O"]
    terminated: Bool[np.ndarray, " n"]
    truncated: Bool[np.ndarray, " n"]
    time: Int[np.ndarray, " n"]
    first: Int[np.ndarray, " P"]


def stack_steps(episodes: Sequence[Episode], low, high) -> Steps:
    """All steps of some episodes.

    Args:
        episodes: at least one.
        low, high: bounds of the task's actions, [A].

    Raises:
        ValueError: no episodes.
    """
    if not episodes:
        raise ValueError("there are no episodes; at least one is wanted")
    lengths = np.array([len(e.reward) for e in episodes])
    first = np.cumsum(lengths) - lengths
    last = first + lengths - 1
    flags = np.zeros((2, lengths.sum()), bool)
    flags[0, last] = [e.terminated for e in episodes]
    flags[1, last] = [e.truncated for e in episodes]
    joined = lambda parts: np.concatenate(list(parts))
    width = np.maximum(np.asarray(high) - low, 1e-9)  # none where fixed
    action = 2 * (joined(e.action for e in episodes) - low) / width - 1
    return Steps(
        joined(e.observation[:-1] for e in episodes),
        np.clip(action, -1, 1).astype(np.float32),
        joined(e.reward for e in episodes),
        joined(e.observation[1:] for e in episodes),
        flags[0],
        flags[1],
        joined(np.arange(n) for n in lengths),
        first,
    )


# %% A file that others can read
ROOT = "MINARI_DATASETS_PATH"


@contextlib.contextmanager
def minari_root(root: str | Path | None) -> Iterator[Any]:
    """Minari, with its sets in another folder for a while.

    Args:
        root: the folder; None: Minari's own.

    Raises:
        ValueError: Minari is not installed.
    """
    minari, before = needed("minari"), os.environ.get(ROOT)
    needed("h5py")
    if root is not None:
        os.environ[ROOT] = str(root)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of fields that may be missing
            yield minari
    finally:
        os.environ.pop(ROOT, None)
        if before is not None:
            os.environ[ROOT] = before


def content_hash(episodes: Sequence[Episode]) -> str:
    """SHA-256 of all that was recorded, as hexadecimal digits."""
    digest = hashlib.sha256()
    for episode in episodes:
        for name, value in episode._asdict().items():
            array = np.asarray(-1 if value is None else value)
            digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def set_folder(minari: Any, name: str) -> Path:
    """Where a set is or would be.

    Raises:
        ValueError: this cannot be the name of a set.
    """
    from minari.dataset.minari_dataset import parse_dataset_id

    try:
        parse_dataset_id(name)
    except (ValueError, TypeError):
        raise ValueError(
            f"{name!r} is no name of a set; one such as "
            "som/halfcheetah/medium-v0 is wanted"
        ) from None
    return Path(minari.storage.get_dataset_path(name))


def write_set(
    name: str,
    episodes: Sequence[Episode],
    env: Any,
    algorithm: str,
    recipe: dict[str, Any] | None = None,
    root: str | Path | None = None,
) -> str:
    """Store episodes as a set of Minari.

    Args:
        name: such as "som/halfcheetah/medium-v0".
        episodes: at least one.
        env: the task that they are of.
        algorithm: who acted.
        recipe: how they were made; kept with them.
        root: the folder of all sets; None: Minari's own.

    Returns:
        The hash of the content.

    Raises:
        ValueError: no episodes, a bad name, or one that exists; Minari is
            not installed.
    """
    if not episodes:
        raise ValueError(f"{name} has no episodes; at least one is wanted")
    with minari_root(root) as minari:
        folder = set_folder(minari, name)
        if folder.exists():
            raise ValueError(
                f"the set {name} exists in {folder.parent}: choose another "
                "name, or remove it"
            )
        aside = Path(minari.storage.get_dataset_path()) / ".unfinished"
    with minari_root(aside) as minari:
        half = set_folder(minari, name)
        shutil.rmtree(half, ignore_errors=True)
        digest = _fill(minari, name, episodes, env, algorithm, recipe or {})
    with minari_root(root) as minari:
        namespace, _, _ = name.rpartition("/")
        if (
            namespace
            and namespace not in minari.namespace.list_local_namespaces()
        ):
            minari.namespace.create_namespace(namespace)
        os.replace(half, folder)
        shutil.rmtree(aside, ignore_errors=True)
    return digest


def _fill(minari, name, episodes, env, algorithm, recipe) -> str:
    """Write a set where Minari's sets are now."""
    digest, task = content_hash(episodes), as_task(env)
    with environments.make(task, 1, 0) as envs:
        low, high = envs.action_low, envs.action_high
        kept = minari.create_dataset_from_buffers(
            name,
            [_buffer(i, episode) for i, episode in enumerate(episodes)],
            env=envs.env if isinstance(task.env, str) else None,
            algorithm_name=algorithm,
            observation_space=gym.spaces.Box(
                -np.inf, np.inf, (envs.observation_size,)
            ),
            action_space=gym.spaces.Box(low, high),
            description=f"Recorded by som, with {algorithm} on {task.name}. "
            "Tasks whose name ends in -v4 have the physics of MuJoCo 2.3.7: "
            "som.training.environments.make_one makes them.",
        )
    more: dict[str, Any] = {
        "content_hash": digest,
        "recipe": json.dumps(recipe),
    }
    more |= {"env": task.name, "env_kwargs": json.dumps(dict(task.kwargs))}
    if scale := references(task):
        more |= {"ref_min_score": scale[0], "ref_max_score": scale[1]}
    kept.storage.update_metadata(more)
    return digest


def _buffer(i: int, episode: Episode) -> Any:
    """An episode as Minari wants it."""
    end = np.arange(len(episode.reward)) == len(episode.reward) - 1
    return needed("minari.data_collector").EpisodeBuffer(
        id=i, seed=episode.seed, observations=episode.observation,
        actions=episode.action, rewards=episode.reward,
        terminations=end & episode.terminated,
        truncations=end & episode.truncated, infos={},
    )  # fmt: skip


class Recordings(NamedTuple):
    """A set that was read.

    Args:
        name: of the set.
        task: that it is of.
        episodes: in their order.
        low, high: bounds of the actions, [A].
        algorithm: who acted.
        recipe: how it was made.
        hash: of the content.
    """

    name: str
    task: Task
    episodes: list[Episode]
    low: Float[np.ndarray, " A"]
    high: Float[np.ndarray, " A"]
    algorithm: str
    recipe: dict[str, Any]
    hash: str

    def steps(self, episodes: slice = slice(None)) -> Steps:
        """The steps of some of the episodes; by default of all."""
        return stack_steps(self.episodes[episodes], self.low, self.high)


def read_set(name: str, root: str | Path | None = None) -> Recordings:
    """Read a set of Minari.

    Args:
        name: such as "som/halfcheetah/medium-v0".
        root: the folder of all sets; None: Minari's own.

    Raises:
        ValueError: there is no such set, it is damaged, or its
            observations or actions are no vectors; no Minari.
    """
    with minari_root(root) as minari:
        folder = set_folder(minari, name)
        if not (folder / "data" / "metadata.json").exists():
            known = ", ".join(minari.list_local_datasets()) or "none"
            raise ValueError(
                f"there is no set {name} in "
                f"{minari.storage.get_dataset_path()} (there: {known}); `som "
                "dataset` makes one"
            )
        kept = minari.load_dataset(name)
        facts, space = kept.storage.metadata, kept.action_space
        seeds = [m.get("seed") for m in kept.storage.get_episode_metadata(
            range(kept.total_episodes))]  # fmt: skip
        episodes = [
            _episode(name, *pair)
            for pair in zip(kept.iterate_episodes(), seeds, strict=True)
        ]
    digest = content_hash(episodes)
    if facts.get("content_hash", digest) != digest:
        raise ValueError(
            f"the set {name} is damaged: its content has the hash "
            f"{digest[:12]}, and {facts['content_hash'][:12]} is wanted"
        )
    spec = kept.spec.env_spec
    env = facts.get("env") or (spec.id if spec else "unknown")
    task = Task(env, json.loads(facts.get("env_kwargs", "{}")))
    return Recordings(
        name, task, episodes, space.low, space.high,
        facts.get("algorithm_name", "unknown"),
        json.loads(facts.get("recipe", "{}")), digest,
    )  # fmt: skip


def _episode(name: str, data: Any, seed: int | None) -> Episode:
    """An episode of Minari as one of ours."""
    arrays = data.observations, data.actions
    if not all(isinstance(x, np.ndarray) and x.ndim == 2 for x in arrays):
        raise ValueError(
            f"the set {name} has observations or actions that are no "
            "vectors; vectors are wanted"
        )
    s, a, r = (np.asarray(x, np.float32) for x in (*arrays, data.rewards))
    ended, cut = bool(data.terminations[-1]), bool(data.truncations[-1])
    seed = None if seed is None else int(seed)
    return Episode(s, a, r, ended, cut or not ended, seed)


# %% From the command line
class Recipe(NamedTuple):
    """How a set is made.

    Args:
        sources: what episodes come from, in this order.
        episodes: of each source; 0: all that there are.
        env: the task, where no source knows it.
        seed: of the environments and the actors.
    """

    sources: tuple[str, ...]
    episodes: tuple[int, ...]
    env: str | None = None
    seed: int = 0


def gather(
    source: str,
    episodes: int,
    env: str | None,
    seed: int,
    root: str | Path | None,
    progress: Callable[[int], Any],
) -> tuple[Task, str, list[Episode]]:
    """The episodes of one source, their task, and who acted.

    Raises:
        ValueError: a source that does not exist, or lacks its task.
    """
    if source.startswith("replay:"):
        run = source.removeprefix("replay:")
        found = replayed(run)
        config = read_config(Path(run))
        name = f"replay of {config['algo']}"
        return environments.recorded(config), name, found[-episodes:]
    if source in ("uniform", "waypoints"):
        if env is None:
            raise ValueError(
                f"{source} knows no task: --env, such as Hopper-v4, is wanted"
            )
        actor: Any = Waypoints(env) if source == "waypoints" else None
        if actor is None:
            with environments.make(env, 1, 0) as envs:
                actor = Uniform(envs.action_size)
        task = Task(env)
    elif Path(source).exists():
        actor = load(source)
        task = Task(env) if env else actor.task
    else:
        try:
            kept = read_set(source, root)
        except ValueError as error:
            raise ValueError(
                f"{source} is no run folder, no file of a policy, neither "
                f"uniform nor waypoints, and no set ({error})"
            ) from None
        return kept.task, kept.algorithm, kept.episodes[: episodes or None]
    if episodes < 1:
        raise ValueError(f"{source} never ends: --episodes is wanted")
    return task, actor.algo, record(actor, task, episodes, seed, progress)


def make_set(
    name: str,
    recipe: Recipe,
    root: str | Path | None = None,
    progress: Callable[[int], Any] = lambda done: None,
) -> Recordings:
    """Make a set, unless it exists.

    Args:
        name: such as "som/halfcheetah/medium-v0".
        recipe: how.
        root: the folder of all sets; None: Minari's own.
        progress: told the episodes that have been recorded.

    Raises:
        ValueError: it exists and was made otherwise; sources that do not
            fit together or do not exist.
    """
    wanted = json.loads(json.dumps(recipe._asdict()))
    if len(recipe.sources) != len(recipe.episodes):
        raise ValueError(
            f"there are {len(recipe.sources)} sources and "
            f"{len(recipe.episodes)} numbers of episodes; as many of these "
            "as of those, or one, are wanted"
        )
    with minari_root(root) as minari:
        exists = set_folder(minari, name).exists()
    if exists:
        kept = read_set(name, root)
        if kept.recipe != wanted:
            raise ValueError(
                f"{name} exists and was made of {kept.recipe}: choose "
                "another name, or remove it"
            )
        return kept
    parts: list[tuple[Task, str, list[Episode]]] = []
    for source, number in zip(recipe.sources, recipe.episodes, strict=True):
        done = sum(len(part[2]) for part in parts)
        tell = lambda n, done=done: progress(done + n)
        rest = recipe.env, recipe.seed, root, tell
        parts.append(gather(source, number, *rest))
    tasks, actors, episodes = zip(*parts, strict=True)
    if any(task != tasks[0] for task in tasks):
        raise ValueError(
            f"the sources of {name} are of the tasks "
            f"{', '.join(t.name for t in tasks)}; one task is wanted"
        )
    whole = [episode for part in episodes for episode in part]
    acted = " and ".join(dict.fromkeys(actors))
    write_set(name, whole, tasks[0], acted, wanted, root)
    return read_set(name, root)


# %% All sets of this part
ROBOTS: dict[str, tuple[int, int]] = {
    "HalfCheetah-v4": (100, 20_000),
    "Hopper-v4": (5_000, 60_000),
    "Walker2d-v4": (5_000, 50_000),
}  # random episodes; steps of training after which a policy is "medium"
EXPERT_STEPS = 100_000  # of training, after which it is "expert"


def training_command(env: str, kind: str, runs: str) -> str:
    """The command that makes one of the runs: "medium" or "expert"."""
    steps = ROBOTS[env][1] if kind == "medium" else EXPERT_STEPS
    return (
        f"som train --algo sac --env {env} --profile sample-efficient "
        f"--steps {steps} --out {runs}/{env}-{kind}"
    )


def recipes(runs: str = "runs/relatives") -> dict[str, Recipe]:
    """Every set of this part, by name.

    Args:
        runs: the folder of the runs.
    """
    found: dict[str, Recipe] = {}
    for env, (number, _) in ROBOTS.items():
        name = f"som/{env.rpartition('-')[0].lower()}"
        medium, expert = (f"{runs}/{env}-{k}" for k in ("medium", "expert"))
        both = f"{name}/medium-v0", f"{name}/expert-v0"
        found |= {
            f"{name}/random-v0": Recipe(("uniform",), (number,), env),
            both[0]: Recipe((medium,), (100,)),
            f"{name}/medium-replay-v0": Recipe((f"replay:{medium}",), (0,)),
            both[1]: Recipe((f"{expert}/policy-best.npz",), (100,)),
            f"{name}/medium-expert-v0": Recipe(both, (0, 0)),
        }
    for env in MAZES:
        name = (
            "som/maze-" + env.removeprefix("Maze").rpartition("-")[0].lower()
        )
        found[f"{name}/tours-v0"] = Recipe(("waypoints",), (1_000,), env)
    return found


def describe(made: Recordings) -> str:
    """What is in a set, in a few lines for a person."""
    lengths = [len(e.reward) for e in made.episodes]
    ended = sum(e.terminated for e in made.episodes)
    values = returns(made.episodes)
    score = ""
    if references(made.task) and not made.task.env.startswith("Maze"):
        score = f", score {normalized_score(made.task, values).mean():.1f}"
    return (
        f"{made.name}: {made.algorithm} on {made.task.name}\n"
        f"  {len(lengths):,} episodes of {np.mean(lengths):.0f} steps on the "
        f"average, {sum(lengths):,} steps\n"
        f"  {ended:,} terminated, {len(lengths) - ended:,} truncated\n"
        f"  mean return {values.mean():.1f}{score}\n"
        f"  hash {made.hash[:12]}"
    )


def _missing_run(recipe: Recipe, runs: str) -> str | None:
    """The command that makes a run which a recipe wants, if one does."""
    for source in recipe.sources:
        path = source.removeprefix("replay:").removesuffix("/policy-best.npz")
        env, _, kind = path.removeprefix(f"{runs}/").rpartition("-")
        ours = path.startswith(f"{runs}/") and env in ROBOTS
        if ours and not (Path(path) / "policy.npz").exists():
            return training_command(env, kind, runs)
    return None


def _all(args: argparse.Namespace) -> None:
    missing: dict[str, str] = {}  # by set: what makes the run it lacks
    wanted = recipes(args.runs)
    for name, recipe in wanted.items():
        lacks = [missing[s] for s in recipe.sources if s in missing]
        lacks += [_missing_run(recipe, args.runs) or ""]
        if command := next(filter(None, lacks), ""):
            missing[name] = command
        else:
            _one(name, recipe, args.root)
    commands = list(dict.fromkeys(missing.values()))
    for command in commands:
        names = [name for name in missing if missing[name] == command]
        print(f"not made, for want of a run: {', '.join(names)}\n  {command}")
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(wanted)} sets want {len(commands)} runs "
            "that are missing: the commands above make them, then the same "
            "command makes the sets"
        )


def _one(name: str, recipe: Recipe, root: str | None) -> None:
    total, console = sum(recipe.episodes) or 1, plain_console()
    with ProgressLine(total, console, unit="episodes") as line:
        line.result = f"{name}  "
        made = make_set(name, recipe, root, lambda done: line(done, {}))
    print(describe(made))


def episode_counts(text: str) -> tuple[int, ...]:
    """Read numbers of episodes, one for each source: `100` or `100,10`.

    Raises:
        argparse.ArgumentTypeError: one is not a positive whole number.
    """
    return tuple(count(part.strip()) for part in text.split(","))


def _dataset(args: argparse.Namespace) -> None:
    with minari_root(args.root):
        pass  # told first, if Minari is missing
    if args.sources == ["all"]:
        _all(args)
        return
    if args.out is None:
        raise ValueError(
            "no name was given: --out, such as som/halfcheetah/medium-v0, "
            "is wanted"
        )
    numbers = args.episodes or (0,)
    if len(numbers) == 1:
        numbers *= len(args.sources)
    recipe = Recipe(tuple(args.sources), numbers, args.env, args.seed)
    _one(args.out, recipe, args.root)


def _add_dataset(commands: Any) -> None:
    command = commands.add_parser(
        "dataset",
        help="record episodes to learn from",
        description="Record episodes, and store them as a set of Minari.",
    )
    command.set_defaults(
        run=_dataset,
        interrupted="interrupted; the same command goes on after the last "
        "whole set.",
    )
    option = command.add_argument
    option("sources", nargs="+", metavar="SOURCE",
           help="a run folder, a policy.npz, replay:DIR, uniform, waypoints "
           "or the name of a set; several make a mixture; or all: every set "
           "of the book (no default)")  # fmt: skip
    option("--episodes", type=episode_counts, metavar="N",
           help="episodes of each source, or numbers with commas, one for "
           "each (default: all of a replay or a set)")  # fmt: skip
    option("--out", metavar="NAME",
           help="name of the set, such as som/halfcheetah/medium-v0 (no "
           "default)")  # fmt: skip
    option("--env", metavar="ID",
           help="task, for uniform and waypoints (default: the "
           "policy's own)")  # fmt: skip
    option(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the tasks' first states and of who acts (default: 0)",
    )
    option("--runs", default="runs/relatives", metavar="DIR",
           help="for all: folder of the runs (default: "
           "runs/relatives)")  # fmt: skip
    option("--root", metavar="DIR",
           help=f"folder of all sets (default: ${ROOT}, or Minari's "
           "own)")  # fmt: skip


COMMANDS["dataset"] = _add_dataset
