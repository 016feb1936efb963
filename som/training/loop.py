"""The training loop.

Exported by tools/export.py from book/training/loop.md; edit the chapter.
"""

__all__ = [
    "LoopConfig",
    "LAPTOP",
    "FOR_A_LAPTOP",
    "profiles",
    "schedule",
    "defaults",
    "make_config",
    "restore_loop",
    "completed",
    "seed_numbers",
    "TESTED",
    "shortened",
    "INIT",
    "ACT",
    "LEARN",
    "REFILL",
    "seed_axes",
    "init_seeds",
    "fold",
    "learn",
    "learn_on_policy",
    "store",
    "Seen",
    "nothing_seen",
    "see",
    "scale_of",
    "Trainer",
    "act",
    "collect",
    "run_chunk",
    "check_finite",
]

# %% Imports
import operator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from som.agent.critic import Transition
from som.agent.actor_critic import AGENTS, closest, make_agent
from som.training import environments, records, replay
from som.training.policy import (
    Policy,
    Scale,
    acting,
    normalize,
    of_this_version,
    restore_agent,
)


# %% The order of one run
@dataclass(frozen=True)
class LoopConfig:
    """How experience and updates alternate; defaults are the paper's.

    Raises:
        ValueError: a field that is not a number of the right kind and size.
    """

    num_envs: int = 5  # copies of the task for each seed
    warmup: int = 100_000  # environment steps of uniform actions at the start
    capacity: int = 1_000_000  # rows of the replay buffer, one for each step
    updates_per_step: float = 0.2  # updates for each environment step
    chunk_steps: int = 250  # environment steps between two dispatches
    evaluations: int = 40  # number of them, evenly spaced over the run
    episodes: int = 20  # number in each evaluation, for each seed
    checkpoint_seconds: float = 300.0  # seconds between two; inf: none
    normalize_observations: bool = False  # in deviations from their mean

    def __post_init__(self):
        for f in fields(self):
            value, count = getattr(self, f.name), f.type is int
            if f.type is bool:
                if not isinstance(value, bool):
                    raise ValueError(
                        f"{f.name} is {value!r}; True or False is wanted"
                    )
                continue
            least = 0 if f.name == "warmup" else 1 if count else 1e-9
            kind = int if count else int | float
            if not (isinstance(value, kind) and value >= least):
                noun = "whole number" if count else "number"
                raise ValueError(
                    f"{f.name} is {value!r}; "
                    f"a {noun} of at least {least:g} is wanted"
                )
        rows = self.vector_steps * self.num_envs
        if rows > self.capacity:
            raise ValueError(
                f"capacity is {self.capacity}; at least the {rows} rows of "
                "one chunk are wanted"
            )

    @property
    def vector_steps(self) -> int:
        """Steps of each environment between two dispatches."""
        return max(1, self.chunk_steps // self.num_envs)

    @property
    def updates(self) -> int:
        """Updates per dispatch."""
        steps = self.vector_steps * self.num_envs
        return max(1, round(steps * self.updates_per_step))


LAPTOP = LoopConfig(
    warmup=5_000,
    capacity=300_000,
    updates_per_step=0.4,
    evaluations=12,
    checkpoint_seconds=60.0,
)


FOR_A_LAPTOP = "laptop", "sample-efficient"


def profiles(kind) -> list[str]:
    """The profiles with which an agent's class learns a task."""
    return [name for name in kind.profiles if name != "bandit"]


def schedule(kind, profile: str) -> LoopConfig:
    """The schedule of an agent's class in one of its profiles.

    It is LAPTOP for those FOR_A_LAPTOP, else the paper's, with what the
    class says in its `loops`.
    """
    usual = LAPTOP if profile in FOR_A_LAPTOP else LoopConfig()
    return replace(usual, **kind.loops.get(profile, {}))


# %% The settings of a run
def defaults(algo: str, profile: str) -> tuple[Any, LoopConfig]:
    """The configurations of an agent and of its loop in a profile.

    Args:
        algo, profile: as in train.

    Raises:
        ValueError: no such algorithm or profile.
    """
    kind: Any = AGENTS[closest(algo, AGENTS, "algorithm")]
    agent = kind.profiles[closest(profile, profiles(kind), "profile")]
    return agent, schedule(kind, profile)


def make_config(
    algo: str, env: Any, steps, seeds, profile: str, overrides: dict[str, Any]
) -> dict[str, Any]:
    """What config.json holds: a run's settings, checked and sorted by owner.

    Args:
        algo, steps, seeds, profile: as in train.
        env: an id, a factory or a Task.
        overrides: fields of the agent's config or of LoopConfig.

    Raises:
        ValueError: a number, name or setting that no run can have.
    """
    number = isinstance(steps, int | float | np.integer)
    if not (number and 1 <= steps < float("inf")):
        raise ValueError(f"steps is {steps!r}; at least 1 is wanted")
    seeds, steps = seed_numbers(seeds), int(steps)
    agent, usual = defaults(algo, profile)
    own = {f.name for f in fields(usual)}
    for name in overrides:
        closest(name, own | {f.name for f in fields(agent)}, "setting")
    given = {k: v for k, v in overrides.items() if k in own}
    rest = {k: v for k, v in overrides.items() if k not in own}
    task = environments.as_task(env)
    longest = environments.longest_episode(task)
    less = shortened(usual, steps, longest, given.get("evaluations"))
    loop = replace(usual, **less | given)
    if not AGENTS[algo].on_policy:
        _check_it_learns(loop, steps)
    config = {
        "algo": algo,
        "env": task.name,
        **({"env_kwargs": task.kwargs} if task.kwargs else {}),
        "steps": steps,
        "seeds": seeds,
        "profile": profile,
        "agent": asdict(replace(agent, **rest)),
        "loop": asdict(loop),
    }
    return records.as_json(config)


def restore_loop(stored: dict[str, Any]) -> LoopConfig:
    """A schedule from JSON, which has null where a number is infinite."""
    inf = float("inf")
    numbers: dict[str, Any] = {
        k: inf if v is None else v for k, v in stored.items()
    }
    return LoopConfig(**numbers)


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """A stored run's settings with those that have come since."""
    if "loop" not in config:
        return config  # those who use it say so
    loop = asdict(restore_loop(config["loop"]))
    return records.as_json(of_this_version(config) | {"loop": loop})


def seed_numbers(seeds) -> list[int]:
    """Seeds as a list; a whole number n is 0, 1, ..., n - 1.

    Args:
        seeds: a count, or different whole numbers.

    Raises:
        ValueError: anything else.
    """
    try:
        count = isinstance(seeds, int | np.integer)
        given = range(seeds) if count else seeds
        numbers = [operator.index(seed) for seed in given]
    except TypeError:
        numbers = []
    if not 0 < len(numbers) == len({s for s in numbers if 0 <= s < 2**31}):
        raise ValueError(
            f"seeds is {seeds!r}; a number of seeds, or a list of different "
            "whole numbers from 0 to 2147483647 is wanted"
        )
    return numbers


TESTED = 6
"""Environment steps of evaluation, at most, for each step of learning."""


def shortened(
    usual: LoopConfig,
    steps: int,
    longest: int,
    evaluations: int | None = None,
) -> dict[str, int]:
    """What a schedule for long runs becomes in one of some steps.

    Args:
        usual: the schedule.
        steps: environment steps of the run.
        longest: steps of the task's longest episode.
        evaluations: how many are made, if that is given.

    Returns:
        warmup, evaluations and episodes, Equation (eq-loop-episodes).
    """
    number = min(usual.evaluations, max(1, steps // 1000))
    fit = TESTED * steps // ((evaluations or number) * longest)
    return {
        "warmup": min(usual.warmup, steps // 2),
        "evaluations": number,
        "episodes": min(usual.episodes, max(1, fit)),
    }


def _check_it_learns(loop: LoopConfig, steps: int) -> None:
    chunk = loop.vector_steps * loop.num_envs
    least = chunk * max(1, -(-loop.warmup // chunk)) + 1
    if steps < least:
        raise ValueError(
            f"steps is {steps}; with a warmup of {loop.warmup} and chunks of "
            f"{chunk} steps, at least {least} are wanted to learn anything"
        )


# %% Seeds side by side
INIT, ACT, LEARN, REFILL = range(4)  # streams of random keys


def seed_axes(state):
    """The vmap axes of an agent's state: all 0, but none for the step."""
    return jax.tree.map(lambda _: 0, state)._replace(step=None)


def init_seeds(agent, seeds: tuple[int, ...]):
    """Agent states of all seeds, stacked [S, ...], with one common step.

    Args:
        agent: the algorithm.
        seeds: non-negative integers.
    """
    keys = fold(jnp.stack([jax.random.PRNGKey(s) for s in seeds]), INIT)
    states = [_init(agent, key) for key in keys]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return state._replace(step=states[0].step)


@partial(jax.jit, static_argnames="agent")
def _init(agent, key):
    return agent.init(key)


@jax.jit
def fold(keys, i):
    """Random keys [S, 2] of the number i, from parents [S, 2]."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, i)


# %% Learning: many updates in one dispatch
@partial(jax.jit, static_argnames=("agent", "updates"), donate_argnums=2)
def learn(agent, state, buffer, rows, keys, updates: int, scale=None):
    """Add fresh rows, then make many updates, in one dispatch.

    Args:
        agent: the algorithm.
        state: agent states [S, ...].
        buffer: replay buffers [S, ...]; donated, written in place.
        rows: packed transitions [S, n, D].
        keys: random keys [S, 2].
        updates: number of updates.
        scale: in which units the agents observe, [S, O]; None: as it is.

    Returns:
        state, buffer, and metrics averaged over the updates [S].
    """
    buffer = jax.vmap(replay.add)(buffer, rows)
    axes = seed_axes(state)

    def one(state, buffer, key, scale):
        k_draw, k_update = jax.random.split(key)
        places = replay.draw(buffer, k_draw, agent.config.batch_size)
        drawn, kept = buffer.rows[places], agent.rewrites
        batch = replay.unpack(drawn, agent.action_size, kept)
        batch = agent.revise(state, _shown(batch, scale))
        if kept:
            width = agent.action_size
            rows = buffer.rows.at[places, -width:].set(batch.guide)
            buffer = buffer._replace(rows=rows)
        state, metrics = agent.update(state, batch, k_update)
        return state, buffer, metrics

    def body(carry, i):
        every = jax.vmap(one, (axes, 0, 0, 0), (axes, 0, 0))
        state, buffer, metrics = every(
            carry[0], carry[1], fold(keys, i), scale
        )
        return (state, buffer), metrics

    (state, buffer), metrics = jax.lax.scan(
        body, (state, buffer), jnp.arange(updates)
    )
    return state, buffer, jax.tree.map(partial(jnp.mean, axis=0), metrics)


def _shown(batch: Transition, scale: Scale | None) -> Transition:
    """A batch with its observations as the agent is shown them."""
    return batch._replace(
        observation=normalize(batch.observation, scale),
        next_observation=normalize(batch.next_observation, scale),
    )


@partial(jax.jit, static_argnames=("agent", "num_envs"))
def learn_on_policy(agent, state, rows, keys, num_envs: int, scale=None):
    """One update from all the rows of a chunk, in their order.

    Args:
        agent: the algorithm; its update takes a batch [T, E, ...].
        state: agent states [S, ...].
        rows: packed transitions [S, n, D], n = T E.
        keys: random keys [S, 2].
        num_envs: E.
        scale: as in learn.

    Returns:
        state, and metrics [S].
    """
    axes, (num, _, width) = seed_axes(state), rows.shape
    rows = rows.reshape(num, -1, num_envs, width)
    batch = replay.unpack(rows, agent.action_size)
    batch = jax.vmap(_shown)(batch, scale)
    return jax.vmap(agent.update, (axes, 0, 0), (axes, 0))(state, batch, keys)


store = jax.jit(jax.vmap(replay.add), donate_argnums=0)


# %% The scale of what was seen
class Seen(NamedTuple):
    """How many observations were collected, their mean and spread."""

    number: np.ndarray  # [S, 1]
    mean: np.ndarray  # [S, O]
    spread: np.ndarray  # sum of squared distances from the mean, [S, O]


def nothing_seen(num: int, size: int) -> Seen:
    """Before the first observation, of some seeds and coordinates."""
    zeros = np.zeros((num, size))
    return Seen(np.zeros((num, 1)), zeros, zeros)


def see(seen: Seen, observations: np.ndarray) -> Seen:
    """What was seen with some more observations, Equation (eq-loop-merge).

    Args:
        seen: of S seeds.
        observations: new ones, [S, n, O].
    """
    new = np.asarray(observations, np.float64)
    more, mean = new.shape[1], new.mean(1)
    spread = np.square(new - mean[:, None]).sum(1)
    number, gap = seen.number + more, mean - seen.mean
    return Seen(
        number,
        seen.mean + gap * more / number,
        seen.spread + spread + gap**2 * seen.number * more / number,
    )


def scale_of(seen: Seen) -> Scale:
    """Mean and deviation of what was seen, [S, O] in single precision."""
    std = np.sqrt(seen.spread / np.maximum(seen.number, 1))
    varies = std > 1e-6 * np.abs(seen.mean)
    return Scale(np.float32(seen.mean), np.float32(np.where(varies, std, 1)))


# %% What a run holds
class Trainer:
    """Everything that a run holds between two chunks, but its buffers.

    Args:
        config: what make_config returns.
        task: what its environments are made of, if a program makes them.
    """

    def __init__(self, config: dict[str, Any], task: Any = None):
        self.config = config
        self.task = task or environments.recorded(config)
        self.loop = restore_loop(config["loop"])
        self.seeds = tuple(config["seeds"])
        num, self.envs = self.loop.num_envs, []
        with ExitStack() as opened:
            for seed in self.seeds:
                envs = environments.make(self.task, num, seed)
                self.envs.append(opened.enter_context(envs))
            self._begin()
            self._opened = opened.pop_all()

    def close(self) -> None:
        """Close the environments, and end the learner's thread."""
        self.learner.shutdown()
        self._opened.close()

    def _begin(self):
        sizes = self.envs[0].observation_size, self.envs[0].action_size
        self.agent = restore_agent(self.config, *sizes)
        self.keys = jnp.stack([jax.random.PRNGKey(s) for s in self.seeds])
        self.state = init_seeds(self.agent, self.seeds)
        self.chunk, self.seconds = 0, 0.0
        self.curve: list[dict[str, Any]] = []
        self.best: Any = None  # what each seed acted with at its best,
        self.best_scale: Scale | None = None  # and in which units
        self.seen: Seen | None = None
        if self.loop.normalize_observations:
            self.seen = nothing_seen(len(self.seeds), sizes[0])
        self.ends: Any = None  # see collect
        self.rescued: Any = None  # the buffers, when collect fails
        self.slices: list[
            dict[str, Any]
        ] = []  # see the chapter on checkpoints
        self.refilled, self.drawn = 0, 0  # points of the curve in a picture
        n = self.loop.vector_steps * self.loop.num_envs
        width = jax.eval_shape(self._one_buffer).rows.shape[-1]
        self.rows = np.zeros((len(self.seeds), n, width), np.float32)
        self.observation = np.stack([env.reset() for env in self.envs])
        self.learner = ThreadPoolExecutor(1)  # see run_chunk

    def _one_buffer(self):
        return replay.init(
            self.loop.capacity,
            self.agent.observation_size,
            self.agent.action_size,
            self.agent.rewrites,
        )

    def empty_buffer(self):
        """Replay buffers of all seeds, [S, ...]."""
        one = jax.eval_shape(self._one_buffer)
        return jax.tree.map(
            lambda x: jnp.zeros((len(self.seeds), *x.shape), x.dtype), one
        )

    @property
    def steps(self) -> int:
        """Environment steps made by each seed."""
        return self.chunk * self.rows.shape[1]

    @property
    def chunks(self) -> int:
        """Chunks of the whole run."""
        return -(-self.config["steps"] // self.rows.shape[1])

    @property
    def scale(self) -> Scale | None:
        """In which units the agents observe now; None: as it is."""
        return None if self.seen is None else scale_of(self.seen)

    def key(self, stream: int, i: int):
        """Keys [S, 2] of a stream in chunk i, Equation (eq-loop-keys)."""
        return fold(fold(self.keys, stream), i)

    def policy(self, index: int = 0, best: bool = False) -> Policy:
        """The policy of one seed, the current one or the best so far."""
        env = self.envs[0]
        return Policy(
            self.agent,
            self.best if best else self.state,
            self.task,
            env.action_low,
            env.action_high,
            index,
            self.best_scale if best else self.scale,
        )


# %% Collecting a chunk
@partial(jax.jit, static_argnames=("agent", "explore"))
def act(agent, state, observation, keys, explore: bool, scale=None):
    """Actions of all seeds.

    Args:
        agent: the algorithm.
        state: agent states [S, ...], whole or as `acting` leaves them.
        observation: [S, E, O].
        keys: random keys [S, 2].
        explore: add the exploration noise.
        scale: in which units the agents observe, [S, O]; None: as it is.

    Returns:
        Actions in [-1, 1], [S, E, A].
    """
    observation = jax.vmap(normalize)(observation, scale)
    choose = partial(agent.act, explore=explore)
    return jax.vmap(choose, (seed_axes(state), 0, 0))(
        state, observation, keys
    )


def collect(trainer: Trainer, state, keys=None) -> np.ndarray:
    """Step every environment for one chunk with a fixed state's policy.

    Args:
        trainer: its environments and observations move on; its `ends` are
            the returns and lengths of the episodes that ended, [T, S, E]
            each, with nan as the return where none did; its `seen` grows.
        state: agent states to act with.
        keys: random keys [S, 2]; by default those of the current chunk.

    Returns:
        Packed transitions [S, n, D], in time order.
    """
    loop, state = trainer.loop, acting(trainer.agent, state)
    size = loop.num_envs, trainer.agent.action_size
    warm, scale = trainer.steps < loop.warmup, trainer.scale
    keys = trainer.key(ACT, trainer.chunk) if keys is None else keys
    keys = np.asarray(_fold_each(keys, loop.vector_steps))
    moves, ends = [], []
    for now in keys:
        if warm:
            action = np.asarray(_uniform(now, size))
        else:
            action = np.asarray(
                act(
                    trainer.agent,
                    state,
                    trainer.observation,
                    now,
                    True,
                    scale,
                )
            )
        pairs = zip(trainer.envs, action, strict=True)
        steps = zip(*(env.step(a) for env, a in pairs), strict=True)
        step = environments.Step(*map(np.stack, steps))
        last, trainer.observation = trainer.observation, step.observation
        ends.append((step.episode_return, step.episode_length))
        moves.append(
            (
                last,
                action,
                step.reward,
                step.terminated,
                step.next_observation,
            )
        )
    trainer.ends = [np.stack(part) for part in zip(*ends, strict=True)]
    stacked: Any = (np.stack(part, 1) for part in zip(*moves, strict=True))
    taken = Transition(*stacked)
    if trainer.seen is not None:
        num, width = len(trainer.seeds), taken.observation.shape[-1]
        flat = taken.observation.reshape(num, -1, width)
        trainer.seen = see(trainer.seen, np.asarray(flat))
    if trainer.agent.rewrites:
        taken = taken._replace(guide=taken.action)
    rows = replay.pack(taken)
    if not np.isfinite([rows.min(), rows.max()]).all():
        end = trainer.steps + rows[0].size // rows.shape[-1]
        raise FloatingPointError(f"experience is not finite at step {end}")
    return rows.reshape(trainer.rows.shape)


@partial(jax.jit, static_argnames="num")
def _fold_each(keys, num):
    return jax.vmap(partial(fold, keys))(jnp.arange(num))


@partial(jax.jit, static_argnames="shape")
def _uniform(keys, shape):
    draw = partial(jax.random.uniform, shape=shape, minval=-1, maxval=1)
    return jax.vmap(lambda k: draw(k))(keys)


# %% One chunk: the device learns while the host simulates
def run_chunk(trainer: Trainer, buffer):
    """Learn from the past on the device while the host makes experience.

    Args:
        trainer: moves on by one chunk.
        buffer: replay buffers; donated.

    Returns:
        The buffers, and metrics [S] (empty before learning starts).

    Raises:
        FloatingPointError: a metric or a parameter is not finite.
        environments.TaskError: the task fails. The trainer is, but for
            its environments, where it was, and its `rescued` are the
            buffers with which this chunk can be begun again.
    """
    if trainer.agent.on_policy:
        trainer.rescued = buffer
        return buffer, _learn_from_this_chunk(trainer)
    before, metrics, job = trainer.state, {}, None
    if trainer.chunk and trainer.steps >= trainer.loop.warmup:
        job = trainer.learner.submit(
            learn,
            trainer.agent,
            before,
            buffer,
            trainer.rows,
            trainer.key(LEARN, trainer.chunk),
            trainer.loop.updates,
            trainer.scale,
        )
    elif trainer.chunk:
        buffer = store(buffer, trainer.rows)
    try:
        trainer.rows = collect(trainer, before)
    except ValueError:  # of the task
        trainer.rescued = _undo(trainer, job.result()[1] if job else buffer)
        raise
    trainer.chunk += 1
    if job:
        trainer.state, buffer, metrics = job.result()
        metrics = jax.device_get(metrics)
    check_finite(trainer, metrics)
    return buffer, metrics


def _undo(trainer: Trainer, buffer):
    """Buffers in which the last rows are in their places, not counted."""
    count = trainer.rows.shape[1] if trainer.chunk else 0
    return buffer._replace(added=buffer.added - count)


def _learn_from_this_chunk(trainer: Trainer) -> dict[str, np.ndarray]:
    scale = trainer.scale  # with which these actions are chosen
    trainer.rows = collect(trainer, trainer.state)
    trainer.state, metrics = learn_on_policy(
        trainer.agent,
        trainer.state,
        trainer.rows,
        trainer.key(LEARN, trainer.chunk),
        trainer.loop.num_envs,
        scale,
    )
    trainer.chunk += 1
    metrics = jax.device_get(metrics)
    check_finite(trainer, metrics)
    return metrics


def check_finite(trainer: Trainer, metrics: dict[str, np.ndarray]) -> None:
    """Refuse a diverged state.

    Raises:
        FloatingPointError: a metric or a parameter is not finite.
    """
    sound = {**metrics, "a parameter": np.asarray(_all_finite(trainer.state))}
    for name, value in sound.items():
        for seed, number in zip(trainer.seeds, value, strict=True):
            if not np.isfinite(number):
                raise FloatingPointError(
                    f"training diverged: {name} of seed {seed} is not "
                    f"finite at step {trainer.steps}"
                )


@jax.jit
def _all_finite(state):
    """Zero for each seed whose state is finite, else NaN, [S]."""
    leaves = jax.tree.leaves(state._replace(step=()))
    rows = [x.reshape(len(x), -1) for x in leaves]
    # One sum: a sum for each leaf would compile four times as long.
    return jnp.sum(0 * jnp.concatenate(rows, 1), 1)
