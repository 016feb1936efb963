"""The training loop.

Exported by tools/export.py from book/training/loop.md; edit the chapter.
"""

__all__ = [
    "LoopConfig",
    "LAPTOP",
    "profiles",
    "schedule",
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
    "acting",
    "act",
    "Policy",
    "evaluate",
    "rollout_states",
    "Run",
    "restore_agent",
    "Trainer",
    "collect",
    "run_chunk",
    "check_finite",
    "save_checkpoint",
    "load_checkpoint",
    "save_packed",
    "load_packed",
    "refill",
    "save_policy",
    "load",
    "interruptible",
    "make_record",
    "save_all",
    "EVALUATION_SEED",
    "evaluate_now",
    "begin_slice",
    "finish",
    "defaults",
    "make_config",
    "train",
    "is_finished",
    "resume",
]

# %% Imports
import json
import operator
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from som.agent.critic import Transition
from som.agent.actor_critic import AGENTS, closest, make_agent
from som.training import environments, records, replay


# %% The order of one run
@dataclass(frozen=True)
class LoopConfig:
    """How experience and updates alternate; defaults are the paper's.

    Raises:
        ValueError: a field that is not a number of the right kind and size.
    """

    num_envs: int = 5  # environments per seed
    warmup: int = 100_000  # environment steps of uniform actions
    capacity: int = 1_000_000  # rows of the replay buffer
    updates_per_step: float = 0.2  # updates per environment step
    chunk_steps: int = 250  # environment steps per dispatch
    evaluations: int = 40  # evenly spaced over the run
    episodes: int = 20  # per evaluation
    checkpoint_seconds: float = 300.0  # between two checkpoints

    def __post_init__(self):
        for f in fields(self):
            value, count = getattr(self, f.name), f.type is int
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


def profiles(kind) -> list[str]:
    """The profiles with which an agent's class learns a task."""
    return [name for name in kind.profiles if name != "bandit"]


def schedule(kind, profile: str) -> LoopConfig:
    """The schedule of an agent's class in one of its profiles.

    It is LAPTOP or else the paper's, with what the class says in its `loops`.
    """
    usual = LAPTOP if profile == "laptop" else LoopConfig()
    return replace(usual, **kind.loops.get(profile, {}))


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
def learn(agent, state, buffer, rows, keys, updates: int):
    """Add fresh rows, then make many updates, in one dispatch.

    Args:
        agent: the algorithm.
        state: agent states [S, ...].
        buffer: replay buffers [S, ...]; donated, written in place.
        rows: packed transitions [S, n, D].
        keys: random keys [S, 2].
        updates: number of updates.

    Returns:
        state, buffer, and metrics averaged over the updates [S].
    """
    buffer = jax.vmap(replay.add)(buffer, rows)
    axes = seed_axes(state)

    def one(state, buffer, key):
        k_draw, k_update = jax.random.split(key)
        places = replay.draw(buffer, k_draw, agent.config.batch_size)
        drawn, kept = buffer.rows[places], agent.rewrites
        batch = replay.unpack(drawn, agent.action_size, kept)
        batch = agent.revise(state, batch)
        if kept:
            width = agent.action_size
            rows = buffer.rows.at[places, -width:].set(batch.guide)
            buffer = buffer._replace(rows=rows)
        state, metrics = agent.update(state, batch, k_update)
        return state, buffer, metrics

    def body(carry, i):
        every = jax.vmap(one, (axes, 0, 0), (axes, 0, 0))
        state, buffer, metrics = every(carry[0], carry[1], fold(keys, i))
        return (state, buffer), metrics

    (state, buffer), metrics = jax.lax.scan(
        body, (state, buffer), jnp.arange(updates)
    )
    return state, buffer, jax.tree.map(partial(jnp.mean, axis=0), metrics)


@partial(jax.jit, static_argnames=("agent", "num_envs"))
def learn_on_policy(agent, state, rows, keys, num_envs: int):
    """One update from all the rows of a chunk, in their order.

    Args:
        agent: the algorithm; its update takes a batch [T, E, ...].
        state: agent states [S, ...].
        rows: packed transitions [S, n, D], n = T E.
        keys: random keys [S, 2].
        num_envs: E.

    Returns:
        state, and metrics [S].
    """
    axes, (num, _, width) = seed_axes(state), rows.shape
    rows = rows.reshape(num, -1, num_envs, width)
    batch = replay.unpack(rows, agent.action_size)
    return jax.vmap(agent.update, (axes, 0, 0), (axes, 0))(state, batch, keys)


store = jax.jit(jax.vmap(replay.add), donate_argnums=0)


# %% Acting, and a policy to use
def acting(agent, state):
    """The state without what only learning needs."""
    return state._replace(**dict.fromkeys(agent.learning_only, ()))


@partial(jax.jit, static_argnames=("agent", "explore"))
def act(agent, state, observation, keys, explore: bool):
    """Actions of all seeds.

    Args:
        agent: the algorithm.
        state: agent states [S, ...], whole or as `acting` leaves them.
        observation: [S, E, O].
        keys: random keys [S, 2].
        explore: add the exploration noise.

    Returns:
        Actions in [-1, 1], [S, E, A].
    """
    choose = partial(agent.act, explore=explore)
    return jax.vmap(choose, (seed_axes(state), 0, 0))(
        state, observation, keys
    )


class Policy:
    """A trained policy: NumPy observations in, NumPy actions out.

    Args:
        agent: the algorithm.
        state: agent states [S, ...], of which one seed is used.
        env_id: the task it was trained on.
        low, high: the task's action bounds, [A].
        index: which seed.
    """

    def __init__(self, agent, state, env_id: str, low, high, index: int = 0):
        self.agent, self.env_id = agent, env_id
        self.algo = next(k for k, v in AGENTS.items() if isinstance(agent, v))
        state = acting(agent, state)
        self.state = jax.tree.map(
            lambda x: jnp.asarray(x)[index], state._replace(step=())
        )._replace(step=jnp.asarray(state.step))
        self.low = np.asarray(low, np.float32)
        self.high = np.asarray(high, np.float32)
        self.calls = 0

    def act(self, observation) -> np.ndarray:
        """Action in [-1, 1], without exploration noise.

        Args:
            observation: [O] or [B, O].

        Returns:
            [A] or [B, A].

        Raises:
            ValueError: another shape, or a number that is not finite.
        """
        observation = np.asarray(observation, np.float32)
        size = self.agent.observation_size
        if observation.ndim not in (1, 2) or observation.shape[-1] != size:
            raise ValueError(
                f"observation has shape {list(observation.shape)}; "
                f"[{size}] or [B, {size}] is wanted"
            )
        if not np.isfinite(observation).all():
            raise ValueError(
                "observation holds NaN or infinity; finite numbers are wanted"
            )
        self.calls += 1
        return np.asarray(
            _act_one(self.agent, self.state, observation, self.calls)
        )

    def __call__(self, observation) -> np.ndarray:
        """Action in the task's own units, [A] or [B, A]; see act."""
        return environments.rescale(
            self.act(observation), self.low, self.high
        )


@partial(jax.jit, static_argnames="agent")
def _act_one(agent, state, observation, calls):
    return agent.act(state, observation, jax.random.PRNGKey(calls))


# %% Evaluation
def evaluate(
    policy: Policy, env: str, episodes: int = 20, seed: int = 0
) -> np.ndarray:
    """Undiscounted returns of whole episodes, without exploration noise.

    Args:
        policy: what to evaluate.
        env: task id.
        episodes: number of episodes, run side by side.
        seed: seed of the environments.

    Returns:
        Returns, [episodes], the first episode of each environment.

    Raises:
        ValueError: no episodes, or an unknown task.
    """
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}; at least 1 is wanted")
    envs = environments.make(env, episodes, seed)
    policy.calls = 0
    returns = np.full(episodes, np.nan)
    observation = envs.reset()
    while np.isnan(returns).any():
        step = envs.step(policy.act(observation))
        observation = step.observation
        returns = np.where(np.isnan(returns), step.episode_return, returns)
    return returns


def rollout_states(
    policy: Policy, steps: int = 800, seed: int = 0
) -> np.ndarray:
    """Observations that a policy acts on, one episode after the other.

    Args:
        policy: trained; acts without exploration noise, Appendix D.
        steps: T, environment steps.
        seed: seed of the environment.

    Returns:
        Observations in time order, [T, O].

    Raises:
        ValueError: no steps.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is wanted")
    envs = environments.make(policy.env_id, 1, seed)
    policy.calls = 0  # the same rollout every time
    observation, seen = envs.reset(), []
    for _ in range(steps):
        seen.append(observation[0])
        observation = envs.step(policy.act(observation)).observation
    return np.stack(seen)


# %% What a run holds
@dataclass
class Run:
    """What train returns.

    record: the run record, equal to record.json where a folder was given;
    policy: the first seed's policy; out: the run's folder, or None.
    """

    record: dict[str, Any]
    policy: Policy
    out: Path | None


def restore_agent(config: dict[str, Any], observation_size, action_size):
    """The agent of a configuration, also of one that JSON has stored.

    Raises:
        records.CheckpointError: a setting that the agent does not have.
    """
    settings = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in config["agent"].items()
    }
    name, profile = config["algo"], config["profile"]
    try:
        return make_agent(
            name, observation_size, action_size, profile, **settings
        )
    except ValueError as error:
        raise records.CheckpointError(
            f"another version of som wrote this: {error}"
        ) from None


class Trainer:
    """Everything that a run holds between two chunks, but its buffers.

    Args:
        config: what make_config returns.
    """

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.loop = LoopConfig(**config["loop"])
        self.seeds = tuple(config["seeds"])
        self.envs = [
            environments.make(config["env"], self.loop.num_envs, seed)
            for seed in self.seeds
        ]
        sizes = self.envs[0].observation_size, self.envs[0].action_size
        self.agent = restore_agent(config, *sizes)
        self.keys = jnp.stack([jax.random.PRNGKey(s) for s in self.seeds])
        self.state = init_seeds(self.agent, self.seeds)
        self.chunk, self.seconds = 0, 0.0
        self.curve: list[dict[str, Any]] = []
        self.slices: list[dict[str, Any]] = []  # see "A run in slices"
        self.refilled = 0
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

    def key(self, stream: int, i: int):
        """Keys [S, 2] of a stream in chunk i, Equation (eq-loop-keys)."""
        return fold(fold(self.keys, stream), i)

    def policy(self, index: int = 0) -> Policy:
        """The current policy of one seed."""
        env = self.envs[0]
        return Policy(
            self.agent,
            self.state,
            env.env_id,
            env.action_low,
            env.action_high,
            index,
        )


# %% Collecting a chunk
def collect(trainer: Trainer, state, keys=None) -> np.ndarray:
    """Step every environment for one chunk with a fixed state's policy.

    Args:
        trainer: its environments and observations move on.
        state: agent states to act with.
        keys: random keys [S, 2]; by default those of the current chunk.

    Returns:
        Packed transitions [S, n, D], in time order.
    """
    loop, state = trainer.loop, acting(trainer.agent, state)
    size = loop.num_envs, trainer.agent.action_size
    warm = trainer.steps < loop.warmup
    keys = trainer.key(ACT, trainer.chunk) if keys is None else keys
    keys = np.asarray(_fold_each(keys, loop.vector_steps))
    moves = []
    for now in keys:
        if warm:
            action = np.asarray(_uniform(now, size))
        else:
            action = np.asarray(
                act(trainer.agent, state, trainer.observation, now, True)
            )
        pairs = zip(trainer.envs, action, strict=True)
        steps = zip(*(env.step(a) for env, a in pairs), strict=True)
        step = environments.Step(*map(np.stack, steps))
        last, trainer.observation = trainer.observation, step.observation
        moves.append(
            (
                last,
                action,
                step.reward,
                step.terminated,
                step.next_observation,
            )
        )
    stacked: Any = (np.stack(part, 1) for part in zip(*moves, strict=True))
    taken = Transition(*stacked)
    if trainer.agent.rewrites:
        taken = taken._replace(guide=taken.action)
    return replay.pack(taken).reshape(trainer.rows.shape)


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
    """
    if trainer.agent.on_policy:
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
        )
    elif trainer.chunk:
        buffer = store(buffer, trainer.rows)
    trainer.rows = collect(trainer, before)
    trainer.chunk += 1
    if job:
        trainer.state, buffer, metrics = job.result()
        metrics = jax.device_get(metrics)
        check_finite(trainer, metrics)
    return buffer, metrics


def _learn_from_this_chunk(trainer: Trainer) -> dict[str, np.ndarray]:
    trainer.rows = collect(trainer, trainer.state)
    trainer.state, metrics = learn_on_policy(
        trainer.agent,
        trainer.state,
        trainer.rows,
        trainer.key(LEARN, trainer.chunk),
        trainer.loop.num_envs,
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
    return sum(jnp.sum(0 * x.reshape(len(x), -1), 1) for x in leaves)


# %% What is saved, and how a run resumes
def _contents(trainer: Trainer, buffer, rows) -> dict[str, Any]:
    """What a checkpoint holds, with these rows of the buffers."""
    return {
        "state": trainer.state,
        "buffer": buffer._replace(rows=rows),
        "rows": trainer.rows,
        "envs": [env.state() for env in trainer.envs],
    }


def _metadata(trainer: Trainer) -> dict[str, Any]:
    names = "chunk", "seconds", "curve", "slices"
    return {name: getattr(trainer, name) for name in names}


def save_checkpoint(trainer: Trainer, buffer, path: Path) -> None:
    """Write all that resume needs, atomically; only the filled rows.

    Args:
        trainer: at the end of a chunk.
        buffer: its replay buffers.
        path: the file.

    Raises:
        records.CheckpointError: it cannot be written; an old one is intact.
    """
    filled = min(int(buffer.added[0]), trainer.loop.capacity)
    rows = np.asarray(buffer.rows)[:, :filled]  # a view, on a CPU
    metadata = {"filled": filled} | _metadata(trainer)
    records.save(path, _contents(trainer, buffer, rows), metadata)


def load_checkpoint(trainer: Trainer, path: Path):
    """Bring a fresh trainer to where a checkpoint was.

    Args:
        trainer: made of the same configuration; changed.
        path: the file.

    Returns:
        The replay buffers.

    Raises:
        records.CheckpointError: not a checkpoint of this run.
    """
    filled = records.read_metadata(path).get("filled", 0)
    empty = trainer.empty_buffer()
    shape = len(trainer.seeds), filled, trainer.rows.shape[-1]
    rows = jax.ShapeDtypeStruct(shape, jnp.float32)
    tree, metadata = records.load(path, _contents(trainer, empty, rows))
    _restore(trainer, tree["state"], tree["envs"], metadata)
    trainer.rows = tree["rows"]
    return replay.Replay(
        _fill(empty.rows, tree["buffer"].rows),
        jnp.asarray(tree["buffer"].added),
    )


def _restore(trainer: Trainer, state, envs, metadata) -> None:
    missing = [name for name in _metadata(trainer) if name not in metadata]
    if missing:
        raise records.CheckpointError(
            f"the checkpoint lacks {', '.join(missing)}: another version of "
            "som wrote it; begin the run anew"
        )
    trainer.state = jax.tree.map(jnp.asarray, state)
    pairs = zip(trainer.envs, envs, strict=True)
    trainer.observation = np.stack([env.restore(old) for env, old in pairs])
    for name in _metadata(trainer):
        setattr(trainer, name, metadata[name])


@partial(jax.jit, donate_argnums=0)
def _fill(rows, old):
    return rows.at[:, : old.shape[1]].set(old)


# %% A run in slices
def _halve(x):
    """The bits of a bfloat16 for a float32; anything else as it is."""
    if x.dtype != np.float32:
        return x
    return np.asarray(jnp.asarray(x, jnp.bfloat16)).view(np.uint16)


def _widen(x):
    """What _halve kept, as float32: the lower half of its bits is zero."""
    if x.dtype != np.uint16:
        return x
    return (x.astype(np.uint32) << 16).view(np.float32)


def _moments(state, change):
    """The state with the numbers of its optimisers changed."""
    names = [name for name in state._fields if name.endswith("_opt")]
    new = {n: jax.tree.map(change, getattr(state, n)) for n in names}
    return state._replace(**new)


def _one_seed(trainer: Trainer, i: int) -> dict[str, Any]:
    """What the packed checkpoint of a seed holds."""
    state = trainer.state
    pick = jax.tree.map(lambda x: x[i], state._replace(step=()))
    pick = _moments(pick._replace(step=state.step), _halve)
    return {"state": pick, "envs": trainer.envs[i].state()}


def save_packed(trainer: Trainer, out: Path) -> None:
    """Write packed-SEED.npz for every seed: all but the replay.

    Args:
        trainer: at the end of a chunk.
        out: the run's folder.

    Raises:
        records.CheckpointError: one cannot be written.
    """
    for i, seed in enumerate(trainer.seeds):
        path = out / f"packed-{seed}.npz"
        records.save(path, _one_seed(trainer, i), _metadata(trainer))


def load_packed(trainer: Trainer, out: Path):
    """Bring a fresh trainer to where a packed checkpoint was.

    Args:
        trainer: made of the same configuration; changed.
        out: the run's folder.

    Returns:
        Replay buffers that the current policy has filled again.

    Raises:
        records.CheckpointError: a seed's file is missing, of another run,
            or of another step than the others.
    """
    trees, chunks = [], set()
    metadata: dict[str, Any] = {}
    for i, seed in enumerate(trainer.seeds):
        path = out / f"packed-{seed}.npz"
        tree, metadata = records.load(path, _one_seed(trainer, i))
        trees.append(tree)
        chunks.add(metadata["chunk"])
    if len(chunks) > 1:
        raise records.CheckpointError(
            f"the packed checkpoints in {out} are of different chunks: "
            f"{sorted(chunks)}"
        )
    states = [tree["state"] for tree in trees]
    state = jax.tree.map(lambda *x: np.stack(x), *states)
    state = _moments(state._replace(step=states[0].step), _widen)
    _restore(trainer, state, [tree["envs"] for tree in trees], metadata)
    return refill(trainer)


def refill(trainer: Trainer):
    """Replay buffers with fresh rows of the current policy.

    Args:
        trainer: its environments move on; its last rows are pending.
    """
    buffer, size = trainer.empty_buffer(), trainer.rows.shape[1]
    wanted = min(trainer.steps, trainer.loop.warmup)
    for i in range(max(1, -(-wanted // size))):
        if i:
            buffer = store(buffer, trainer.rows)
        keys = fold(trainer.key(REFILL, trainer.chunk), i)
        trainer.rows = collect(trainer, trainer.state, keys)
        trainer.refilled += size
    return buffer


# %% The policy
def save_policy(trainer: Trainer, path: Path) -> None:
    """Write the policies of all seeds to one small file.

    Args:
        trainer: at the end of a chunk.
        path: the file.

    Raises:
        records.CheckpointError: it cannot be written; an old one is intact.
    """
    env = trainer.envs[0]
    tree = {
        "state": acting(trainer.agent, trainer.state),
        "low": np.float32(env.action_low),
        "high": np.float32(env.action_high),
    }
    names = ("algo", "env", "seeds", "profile", "agent")
    metadata = {name: trainer.config[name] for name in names}
    metadata["observation_size"] = trainer.agent.observation_size
    metadata["action_size"] = trainer.agent.action_size
    records.save(path, tree, metadata)


def load(path, index: int = 0) -> Policy:
    """Load a trained policy.

    Args:
        path: a run's folder, or its policy.npz.
        index: which of its seeds, counted from 0.

    Returns:
        The policy: NumPy observation in, action in the task's units out.

    Raises:
        records.CheckpointError: no policy there, or not one of ours.
        ValueError: no such seed.
    """
    path = Path(path)
    path = path / "policy.npz" if path.is_dir() else path
    metadata = records.read_metadata(path)
    try:
        sizes = metadata["observation_size"], metadata["action_size"]
        agent = restore_agent(metadata, *sizes)
        env_id, seeds = metadata["env"], tuple(metadata["seeds"])
    except (KeyError, AttributeError, TypeError) as error:
        raise records.CheckpointError(
            f"{path} is not a policy: its metadata lacks {error}"
        ) from None
    if not 0 <= index < len(seeds):
        raise ValueError(
            f"index is {index}; the policy has {len(seeds)} seed(s), "
            "counted from 0"
        )
    state = jax.eval_shape(lambda: acting(agent, init_seeds(agent, seeds)))
    bound = np.zeros(sizes[1], np.float32)
    like = {"state": state, "low": bound, "high": bound}
    tree, _ = records.load(path, like)
    return Policy(
        agent, tree["state"], env_id, tree["low"], tree["high"], index
    )


# %% Ctrl-C
@contextmanager
def interruptible():
    """Yield an event that Ctrl-C sets; a second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)


# %% The folder of a run
def make_record(trainer: Trainer) -> dict[str, Any]:
    """The run record as it stands, exactly as JSON gives it back."""
    config = trainer.config
    record = {
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
    return json.loads(json.dumps(record))


def save_all(trainer: Trainer, buffer, out: Path) -> dict[str, Any]:
    """Write checkpoint, policy, learning curve and record.

    Args:
        trainer: at the end of a chunk.
        buffer: its replay buffers.
        out: the run's folder.

    Returns:
        The record.

    Raises:
        records.CheckpointError: something cannot be written; what was
            there before is intact.
    """
    save_checkpoint(trainer, buffer, out / "checkpoint.npz")
    save_policy(trainer, out / "policy.npz")
    record = make_record(trainer)
    if trainer.curve:
        records.plot_curves([record], out / "learning_curve.png")
    records.write_record(out / "record.json", record)
    return record


EVALUATION_SEED = 1_000_000
"""Added to a seed: evaluation never sees the training episodes."""


def evaluate_now(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Evaluate every seed and append the result to the curve.

    Args:
        trainer: at the end of a chunk.
        metrics: of that chunk, [S] each.
    """
    returns = [
        evaluate(
            trainer.policy(i),
            trainer.config["env"],
            trainer.loop.episodes,
            EVALUATION_SEED + seed,
        ).tolist()
        for i, seed in enumerate(trainer.seeds)
    ]
    trainer.curve.append(
        {
            "step": trainer.steps,
            "updates": int(trainer.state.step),
            "seconds": trainer.seconds,
            "returns": returns,
            "metrics": {
                k: np.asarray(v).tolist() for k, v in metrics.items()
            },
        }
    )


# %% To the end
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


def finish(
    trainer: Trainer, buffer, out: Path | None, progress, stop_at=np.inf
) -> Run:
    """Run a trainer to its end, evaluating and saving on the way.

    Args:
        trainer: fresh, or from a checkpoint.
        buffer: its replay buffers.
        out: the run's folder, or None to save nothing.
        progress: called as progress(step, metrics) after each chunk.
        stop_at: time.monotonic() after which no chunk begins.

    Raises:
        FloatingPointError: training diverged.
        KeyboardInterrupt: Ctrl-C; everything is saved.
    """
    begin_slice(trainer)
    before = trainer.seconds
    every = trainer.config["steps"] / trainer.loop.evaluations
    start, saved = time.monotonic() - trainer.seconds, time.monotonic()
    record = None
    with interruptible() as stop:
        while trainer.chunk < trainer.chunks:
            done = trainer.steps
            try:
                buffer, metrics = run_chunk(trainer, buffer)
            except FloatingPointError as error:
                kept = _last_checkpoint(trainer, out)
                raise FloatingPointError(f"{error}; {kept}") from None
            last, shown = trainer.chunk == trainer.chunks, dict(metrics)
            if last or trainer.steps // every > done // every:
                evaluate_now(trainer, metrics)
                returns = trainer.curve[-1]["returns"]
                shown["evaluation/return"] = np.mean(returns, axis=1)
            trainer.seconds = time.monotonic() - start
            trainer.slices[-1]["seconds"] = trainer.seconds - before
            if progress:
                progress(min(trainer.steps, trainer.config["steps"]), shown)
            due = time.monotonic() - saved > trainer.loop.checkpoint_seconds
            late = time.monotonic() > stop_at
            if out and (last or due or late or stop.is_set()):
                record = save_all(trainer, buffer, out)
                saved = time.monotonic()
            if stop.is_set() and not last:
                raise KeyboardInterrupt
            if late and not last:
                if out:
                    save_packed(trainer, out)
                break
    if out and not record:  # stopped between its last checkpoint and record
        record = save_all(trainer, buffer, out)
    return Run(record or make_record(trainer), trainer.policy(), out)


def _last_checkpoint(trainer, out):
    path = out / "checkpoint.npz" if out else None
    if path is None or not path.exists():
        return "no checkpoint had been saved"
    step = records.read_metadata(path)["chunk"] * trainer.rows.shape[1]
    return f"the last good checkpoint is {path}, of step {step}"


# %% Train and resume
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
    algo: str, env: str, steps, seeds, profile: str, overrides: dict[str, Any]
) -> dict[str, Any]:
    """What config.json holds: a run's settings, checked and sorted by owner.

    Args:
        algo, env, steps, seeds, profile: as in train.
        overrides: fields of the agent's config or of LoopConfig.

    Raises:
        ValueError: a number, name or setting that no run can have.
    """
    number = isinstance(steps, int | float | np.integer)
    if not (number and 1 <= steps < float("inf")):
        raise ValueError(f"steps is {steps!r}; at least 1 is wanted")
    try:
        seeds = [operator.index(seed) for seed in seeds]
        good = 0 < len(seeds) == len({s for s in seeds if 0 <= s < 2**31})
    except TypeError:
        good = False
    if not good:
        raise ValueError(
            f"seeds is {seeds!r}; a list of different whole numbers from 0 "
            "to 2147483647 is wanted"
        )
    agent, usual = defaults(algo, profile)
    own = {f.name for f in fields(usual)}
    for name in overrides:
        closest(name, own | {f.name for f in fields(agent)}, "setting")
    loop = {k: v for k, v in overrides.items() if k in own}
    rest = {k: v for k, v in overrides.items() if k not in own}
    return {
        "algo": algo,
        "env": env,
        "steps": int(steps),
        "seeds": seeds,
        "profile": profile,
        "agent": asdict(replace(agent, **rest)),
        "loop": asdict(replace(usual, **loop)),
    }


def train(
    algo: str = "som",
    env: str = "HalfCheetah-v4",
    steps: int = 1_000_000,
    seeds=(0,),
    profile: str = "laptop",
    out=None,
    progress: Callable[[int, dict], None] | None = None,
    time_limit: float = np.inf,
    **overrides,
) -> Run:
    """Train an agent on a task, several seeds side by side.

    Args:
        algo: name of the algorithm, a key of som.AGENTS.
        env: Gymnasium id of a task with a bounded Box of actions.
        steps: environment steps per seed (rounded up to whole chunks).
        seeds: distinct non-negative integers.
        profile: "paper", "laptop" or "paper-literal".
        out: folder for checkpoints, policy, record and curve; None: none.
        progress: called as progress(step, metrics) after each chunk.
        time_limit: seconds after which no further chunk begins; resume
            goes on.
        **overrides: fields of the agent's config or of LoopConfig.

    Returns:
        The run, finished unless its time was up.

    Raises:
        ValueError: bad input, or a folder that already holds a run.
        FloatingPointError: training diverged.
        KeyboardInterrupt: Ctrl-C; resume continues.
    """
    stop_at = _stop_at(time_limit)
    config = make_config(algo, env, steps, seeds, profile, overrides)
    out = None if out is None else Path(out)
    if out and (out / "config.json").exists():
        raise ValueError(f"{out} already holds a run; resume it instead")
    trainer = Trainer(config)
    if out:
        records.write_record(out / "config.json", config)
    return finish(trainer, trainer.empty_buffer(), out, progress, stop_at)


def _stop_at(time_limit: float) -> float:
    if not time_limit > 0:
        raise ValueError(
            f"time_limit is {time_limit}; a number of seconds is wanted"
        )
    return time.monotonic() + time_limit


def is_finished(out: Path) -> bool:
    """Whether the run in a folder has made all its steps."""
    if not (out / "record.json").exists():
        return False
    record = records.read_record(out / "record.json")
    curve = record["curve"]
    return bool(curve) and curve[-1]["step"] >= record["steps"]


def resume(
    out,
    progress: Callable[[int, dict], None] | None = None,
    time_limit: float = np.inf,
) -> Run:
    """Continue an interrupted run.

    From a whole checkpoint to the parameters it would have had; from a
    packed one, if that is newer, with a replay made anew.

    Args:
        out: the run's folder.
        progress, time_limit: as in train.

    Returns:
        The run, finished unless its time was up; one that was finished
        before comes back as it is.

    Raises:
        records.CheckpointError: no run there, or a damaged one.
        FloatingPointError: training diverged.
        KeyboardInterrupt: Ctrl-C; resume continues.
    """
    out, stop_at = Path(out), _stop_at(time_limit)
    config = records.read_record(out / "config.json")
    if is_finished(out):
        record = records.read_record(out / "record.json")
        return Run(record, load(out), out)
    try:
        trainer = Trainer(config)
    except (KeyError, TypeError) as error:
        raise records.CheckpointError(
            f"{out / 'config.json'} does not describe a run: {error}"
        ) from None
    whole = out / "checkpoint.npz"
    packed = out / f"packed-{trainer.seeds[0]}.npz"
    if _chunk(packed) > _chunk(whole):
        buffer = load_packed(trainer, out)
    elif whole.exists():
        buffer = load_checkpoint(trainer, whole)
    else:
        buffer = trainer.empty_buffer()
    return finish(trainer, buffer, out, progress, stop_at)


def _chunk(path: Path) -> int:
    """How many chunks a checkpoint has behind it; 0 if there is none."""
    if not path.exists():
        return 0
    return records.read_metadata(path).get("chunk", 0)
