"""The training loop.

Exported by tools/export.py from book/training/loop.md; edit the chapter.
"""

__all__ = [
    "LoopConfig",
    "LOOPS",
    "seed_axes",
    "init_seeds",
    "learn",
    "store",
    "act",
    "Policy",
    "evaluate",
    "Run",
    "Trainer",
    "collect",
    "run_chunk",
    "save_checkpoint",
    "load_checkpoint",
    "acting",
    "save_policy",
    "load",
    "interruptible",
    "make_record",
    "save_all",
    "evaluate_now",
    "EVALUATION_SEED",
    "finish",
    "train",
    "resume",
]

# %% Imports
import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from som.agent.critic import Transition
from som.agent.som import AGENTS, closest, make_agent
from som.training import environments, records, replay


# %% The schedule
@dataclass(frozen=True)
class LoopConfig:
    """How experience and updates alternate; defaults are the paper's."""

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
            value = getattr(self, f.name)
            if value < (0 if f.name == "warmup" else 1e-9):
                raise ValueError(
                    f"{f.name} is {value}; a positive number is wanted"
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


LOOPS = {
    "paper": LoopConfig(),
    "paper-literal": LoopConfig(),
    "laptop": LoopConfig(
        warmup=5_000,
        capacity=300_000,
        updates_per_step=0.4,
        evaluations=12,
        checkpoint_seconds=60.0,
    ),
}


# %% Seeds side by side
def seed_axes(state):
    """vmap axes of an agent's state: 0, but the common step has none."""
    return jax.tree.map(lambda _: 0, state)._replace(step=None)


def init_seeds(agent, seeds: tuple[int, ...]):
    """Agent states of all seeds, stacked [S, ...]; one common step."""
    keys = jnp.stack([jax.random.PRNGKey(seed) for seed in seeds])
    state = jax.vmap(agent.init)(keys)
    return state._replace(step=state.step[0])


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
        k_sample, k_update = jax.random.split(key)
        drawn = replay.sample(buffer, k_sample, agent.config.batch_size)
        batch = replay.unpack(drawn, agent.action_size)
        return agent.update(state, batch, k_update)

    def body(state, i):
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
        return jax.vmap(one, (axes, 0, 0), (axes, 0))(state, buffer, now)

    state, metrics = jax.lax.scan(body, state, jnp.arange(updates))
    return state, buffer, jax.tree.map(partial(jnp.mean, axis=0), metrics)


store = jax.jit(jax.vmap(replay.add), donate_argnums=0)


@partial(jax.jit, static_argnames=("agent", "explore"))
def act(agent, state, observation, keys, explore: bool):
    """Actions of all seeds, [S, E, A], for observations [S, E, O]."""
    choose = partial(agent.act, explore=explore)
    return jax.vmap(choose, (seed_axes(state), 0, 0))(state, observation, keys)


# %% A policy to use
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
        axes = seed_axes(state)
        self.agent, self.env_id = agent, env_id
        self.algo = next(k for k, v in AGENTS.items() if isinstance(agent, v))
        self.state = jax.tree.map(
            lambda x, axis: x if axis is None else x[index],
            state,
            axes,
            is_leaf=lambda x: x is None,
        )
        self.low, self.high = np.asarray(low), np.asarray(high)
        self.calls = 0

    def act(self, observation) -> np.ndarray:
        """Action in [-1, 1] for an observation [O] or several [B, O].

        Raises:
            ValueError: another shape, or a number that is not finite.
        """
        observation = np.asarray(observation, np.float32)
        size = self.agent.observation_size
        if observation.shape[-1:] != (size,) or observation.ndim > 2:
            raise ValueError(
                f"observation has shape {observation.shape}; "
                f"[{size}] or [B, {size}] is wanted"
            )
        if not np.isfinite(observation).all():
            raise ValueError("observation holds NaN or infinity")
        self.calls += 1
        key = jax.random.PRNGKey(self.calls)
        return np.asarray(_act_one(self.agent, self.state, observation, key))

    def __call__(self, observation) -> np.ndarray:
        """Action in the environment's own units, [A] or [B, A]."""
        return environments.rescale(self.act(observation), self.low, self.high)


@partial(jax.jit, static_argnames="agent")
def _act_one(agent, state, observation, key):
    return agent.act(state, observation, key)


def evaluate(policy: Policy, env: str, episodes: int = 20, seed: int = 0):
    """Undiscounted returns of whole episodes, without exploration noise.

    Args:
        policy: what to evaluate.
        env: task id.
        episodes: number of episodes, run side by side.
        seed: seed of the environments.

    Returns:
        Returns, [episodes].
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


# %% One run
@dataclass
class Run:
    """What train returns.

    record: the run record (see the chapter on records); policy: the first
    seed's policy; out: the run's folder, or None.
    """

    record: dict[str, Any]
    policy: Policy
    out: Path | None


class Trainer:
    """Everything that a run holds between two dispatches."""

    def __init__(self, config: dict[str, Any]):
        self.config = config
        self.loop = LoopConfig(**config["loop"])
        self.seeds = tuple(config["seeds"])
        self.envs = [
            environments.make(config["env"], self.loop.num_envs, seed)
            for seed in self.seeds
        ]
        sizes = self.envs[0].observation_size, self.envs[0].action_size
        self.agent = make_agent(
            config["algo"], *sizes, config["profile"], **config["agent"]
        )
        self.keys = jnp.stack([jax.random.PRNGKey(s) for s in self.seeds])
        self.state = init_seeds(self.agent, self.seeds)
        self.chunk, self.seconds, self.curve = 0, 0.0, []
        width = 2 * sizes[0] + sizes[1] + 2
        n = self.loop.vector_steps * self.loop.num_envs
        self.rows = np.zeros((len(self.seeds), n, width), np.float32)
        self.observation = np.stack([env.reset() for env in self.envs])

    def empty_buffer(self):
        """Replay buffers of all seeds, [S, ...]."""
        sizes = self.agent.observation_size, self.agent.action_size
        one = replay.init(self.loop.capacity, *sizes)
        return jax.tree.map(
            lambda x: jnp.zeros((len(self.seeds), *x.shape), x.dtype), one
        )

    @property
    def steps(self) -> int:
        """Environment steps made by each seed."""
        return self.chunk * self.rows.shape[1]

    @property
    def chunks(self) -> int:
        """Dispatches in the whole run."""
        return -(-self.config["steps"] // self.rows.shape[1])

    def key(self, stream: int, i: int):
        """Random keys [S, 2] of a stream (0 acting, 1 learning) at i."""
        fold = jax.vmap(jax.random.fold_in, (0, None))
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


def collect(trainer: Trainer, state) -> np.ndarray:
    """Step every environment for one chunk with a fixed state's policy.

    Args:
        trainer: its environments and observations move on.
        state: agent states to act with.

    Returns:
        Packed transitions [S, n, D], in time order.
    """
    loop, shape = trainer.loop, trainer.observation.shape[:2]
    shape = (*shape, trainer.agent.action_size)
    warm = trainer.steps < loop.warmup
    keys = trainer.key(0, trainer.chunk)
    rows = []
    for i in range(loop.vector_steps):
        now = _fold(keys, i)
        if warm:
            action = np.asarray(_uniform(now, shape[1:]))
        else:
            action = np.asarray(
                act(trainer.agent, state, trainer.observation, now, True)
            )
        steps = [
            env.step(a) for env, a in zip(trainer.envs, action, strict=True)
        ]
        step = environments.Step(*map(np.stack, zip(*steps, strict=True)))
        rows.append(
            replay.pack(
                Transition(
                    trainer.observation,
                    action,
                    step.reward,
                    step.terminated,
                    step.next_observation,
                )
            )
        )
        trainer.observation = step.observation
    return np.stack(rows, 1).reshape(trainer.rows.shape)


@jax.jit
def _fold(keys, i):
    return jax.vmap(jax.random.fold_in, (0, None))(keys, i)


@partial(jax.jit, static_argnames="shape")
def _uniform(keys, shape):
    draw = partial(jax.random.uniform, shape=shape, minval=-1, maxval=1)
    return jax.vmap(lambda k: draw(k))(keys)


# %% The loop itself
def run_chunk(trainer: Trainer, buffer):
    """Learn from the past on the device while the host makes experience.

    Returns:
        The buffers, and metrics [S] (empty before learning starts).

    Raises:
        FloatingPointError: a metric is not finite.
    """
    before, metrics = trainer.state, {}
    if trainer.chunk and trainer.steps >= trainer.loop.warmup:
        trainer.state, buffer, metrics = learn(
            trainer.agent,
            before,
            buffer,
            trainer.rows,
            trainer.key(1, trainer.chunk),
            trainer.loop.updates,
        )
    elif trainer.chunk:
        buffer = store(buffer, trainer.rows)
    trainer.rows = collect(trainer, before)
    trainer.chunk += 1
    metrics = jax.device_get(metrics)
    for name, value in metrics.items():
        if not np.isfinite(value).all():
            raise FloatingPointError(
                f"training diverged: {name} is {value} at step {trainer.steps}"
            )
    return buffer, metrics


# %% Saving and resuming
def save_checkpoint(trainer: Trainer, buffer, path: Path) -> None:
    """Write all that resume needs, atomically; only the filled rows."""
    filled = min(int(buffer.added[0]), trainer.loop.capacity)
    tree = {
        "state": trainer.state,
        "buffer": buffer._replace(rows=buffer.rows[:, :filled]),
        "rows": trainer.rows,
        "envs": [env.state() for env in trainer.envs],
    }
    metadata = {
        "filled": filled,
        "chunk": trainer.chunk,
        "seconds": trainer.seconds,
        "curve": trainer.curve,
    }
    records.save(path, tree, metadata)


def load_checkpoint(trainer: Trainer, path: Path):
    """Bring a fresh trainer to where a checkpoint was; return the buffers.

    Raises:
        records.CheckpointError: not a checkpoint of this run.
    """
    filled = records.read_metadata(path).get("filled", 0)
    buffer = trainer.empty_buffer()
    like = {
        "state": trainer.state,
        "buffer": buffer._replace(rows=buffer.rows[:, :filled]),
        "rows": trainer.rows,
        "envs": [env.state() for env in trainer.envs],
    }
    tree, metadata = records.load(path, like)
    trainer.state = jax.tree.map(jnp.asarray, tree["state"])
    trainer.rows = tree["rows"]
    trainer.chunk, trainer.seconds = metadata["chunk"], metadata["seconds"]
    trainer.curve = metadata["curve"]
    trainer.observation = np.stack(
        [
            env.restore(state)
            for env, state in zip(trainer.envs, tree["envs"], strict=True)
        ]
    )
    rows = buffer.rows.at[:, :filled].set(tree["buffer"].rows)
    return replay.Replay(rows, jnp.asarray(tree["buffer"].added))


def acting(agent, state):
    """The state without what only learning needs."""
    return state._replace(**dict.fromkeys(agent.learning_only, ()))


def save_policy(trainer: Trainer, path: Path) -> None:
    """Write the policies of all seeds to one small file."""
    env = trainer.envs[0]
    tree = {
        "state": acting(trainer.agent, trainer.state),
        "low": env.action_low,
        "high": env.action_high,
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
        agent = make_agent(
            metadata["algo"], *sizes, metadata["profile"], **metadata["agent"]
        )
        env_id, seeds = metadata["env"], tuple(metadata["seeds"])
    except KeyError as error:
        raise records.CheckpointError(
            f"{path} is not a policy: it lacks {error}"
        ) from None
    if not 0 <= index < len(seeds):
        raise ValueError(f"index is {index}; the policy has {len(seeds)} seeds")
    like = {
        "state": jax.eval_shape(
            lambda: acting(agent, init_seeds(agent, seeds))
        ),
        "low": np.zeros(sizes[1], np.float32),
        "high": np.zeros(sizes[1], np.float32),
    }
    tree, _ = records.load(path, like)
    return Policy(agent, tree["state"], env_id, tree["low"], tree["high"], index)


# %% Train and resume
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


def make_record(trainer: Trainer) -> dict[str, Any]:
    """The run record as it stands."""
    config = trainer.config
    return {
        **{k: config[k] for k in ("algo", "env", "profile", "seeds", "steps")},
        "config": {
            "agent": asdict(trainer.agent.config),
            "loop": asdict(trainer.loop),
        },
        "curve": trainer.curve,
        "provenance": records.provenance(),
        "wall_seconds": trainer.seconds,
    }


def save_all(trainer: Trainer, buffer, out: Path) -> None:
    """Checkpoint, policy, record and learning curve of a run's folder."""
    save_checkpoint(trainer, buffer, out / "checkpoint.npz")
    save_policy(trainer, out / "policy.npz")
    record = make_record(trainer)
    records.write_record(out / "record.json", record)
    if trainer.curve:
        records.plot_curves([record], out / "learning_curve.png")


def evaluate_now(trainer: Trainer, metrics: dict[str, Any]) -> None:
    """Evaluate every seed and append the result to the curve."""
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
            "metrics": {k: np.asarray(v).tolist() for k, v in metrics.items()},
        }
    )


EVALUATION_SEED = 1_000_000  # evaluation never sees the training episodes


def finish(trainer: Trainer, buffer, out: Path | None, progress) -> Run:
    """Run a trainer to its end, evaluating and saving on the way."""
    loop, every = trainer.loop, trainer.config["steps"] / trainer.loop.evaluations
    start, saved = time.monotonic() - trainer.seconds, time.monotonic()
    with interruptible() as stop:
        while trainer.chunk < trainer.chunks:
            done = trainer.steps
            buffer, metrics = run_chunk(trainer, buffer)
            last = trainer.chunk == trainer.chunks
            shown = dict(metrics)
            if last or trainer.steps // every > done // every:
                evaluate_now(trainer, metrics)
                shown["evaluation/return"] = np.mean(
                    trainer.curve[-1]["returns"], axis=1
                )
            trainer.seconds = time.monotonic() - start
            if progress:
                progress(min(trainer.steps, trainer.config["steps"]), shown)
            due = time.monotonic() - saved > loop.checkpoint_seconds
            if out and (last or due or stop.is_set()):
                save_all(trainer, buffer, out)
                saved = time.monotonic()
            if stop.is_set() and not last:
                raise KeyboardInterrupt
    return Run(make_record(trainer), trainer.policy(), out)


def train(
    algo: str = "som",
    env: str = "HalfCheetah-v4",
    steps: int = 1_000_000,
    seeds=(0,),
    profile: str = "laptop",
    out=None,
    progress: Callable[[int, dict], None] | None = None,
    **overrides,
) -> Run:
    """Train an agent on a task, several seeds side by side.

    Args:
        algo: name of the algorithm, a key of som.AGENTS.
        env: Gymnasium id of a task with a bounded Box of actions.
        steps: environment steps per seed (rounded up to whole dispatches).
        seeds: distinct non-negative integers.
        profile: "paper", "laptop" or "paper-literal".
        out: folder for checkpoints, policy, record and curve; None: none.
        progress: called as progress(step, metrics) after each dispatch.
        **overrides: fields of the agent's config or of LoopConfig.

    Returns:
        The finished run.

    Raises:
        ValueError: bad input, or a folder that already holds a run.
        FloatingPointError: training diverged.
    """
    seeds = tuple(int(s) for s in seeds)
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is wanted")
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds is {seeds}; distinct numbers >= 0 are wanted")
    schedule = LOOPS[closest(profile, LOOPS, "profile")]
    own = {f.name for f in fields(schedule)}
    loop = {k: v for k, v in overrides.items() if k in own}
    config = {
        "algo": algo,
        "env": env,
        "steps": int(steps),
        "seeds": list(seeds),
        "profile": profile,
        "agent": {k: v for k, v in overrides.items() if k not in own},
        "loop": asdict(replace(schedule, **loop)),
    }
    trainer = Trainer(config)
    if out is not None:
        out = Path(out)
        if (out / "config.json").exists():
            raise ValueError(f"{out} already holds a run; resume it instead")
        records.write_record(out / "config.json", config)
    return finish(trainer, trainer.empty_buffer(), out, progress)


def resume(out, progress: Callable[[int, dict], None] | None = None) -> Run:
    """Continue an interrupted run to the parameters it would have had.

    Args:
        out: the run's folder.
        progress: as in train.

    Raises:
        records.CheckpointError: no run there, or a damaged one.
    """
    out = Path(out)
    trainer = Trainer(records.read_record(out / "config.json"))
    if (out / "checkpoint.npz").exists():
        buffer = load_checkpoint(trainer, out / "checkpoint.npz")
    else:
        buffer = trainer.empty_buffer()
    return finish(trainer, buffer, out, progress)
