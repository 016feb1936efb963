"""The update at the hardware's limit.

Exported by tools/export.py from book/mujoco/speed.md; edit the chapter.
"""

__all__ = [
    "matmul",
    "stream",
    "peaks",
    "operations",
    "traffic",
    "floors",
    "parts",
    "kernels",
    "largest_difference",
    "cycle",
    "update_times",
    "one_action",
    "action_times",
    "physics_speeds",
    "loop_speed",
    "AXES",
    "growth",
    "parity",
    "parity_title",
    "compile_seconds",
    "algorithms",
    "machine",
]

# %% Imports
import contextlib
import dataclasses
import gzip
import json
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from som.agent.actor_critic import (
    AGENTS,
    best_of_n,
    critic_step,
    make_agent,
    policy_step,
)
from som.agent.critic import Transition
from som.agent.som import flow_velocity
from som.training import environments, loop, replay
from som.training.policy import Policy
from som.training.command_line import BENCHMARKS, medians


# %% What a machine can do
def matmul() -> tuple[Callable[[], jax.Array], float]:
    """A large square float32 matrix product.

    Returns:
        A call that computes it, and its floating-point operations.
    """
    size = 2048 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (size, size))
    return partial(jax.jit(jnp.matmul), x, x), 2.0 * size**3


def stream(size: int = 2**26) -> tuple[Callable[[], jax.Array], float]:
    """Read an array that no cache holds, and write another one.

    Args:
        size: numbers in the array.

    Returns:
        A call that does it, and the bytes it moves.
    """
    return partial(jax.jit(jnp.negative), jnp.ones(size)), 8.0 * size


def peaks(repeats: int) -> dict[str, float]:
    """What this machine can do: its peak and its bandwidth.

    Args:
        repeats: timings per median.

    Returns:
        GFLOP/s of a matrix product, GB/s of a copy.
    """
    product, operations = matmul()
    copy, moved = stream()
    seconds = medians({"product": product, "copy": copy}, repeats)
    return {
        "matmul GFLOP/s": operations / seconds["product"] / 1e9,
        "memory GB/s": moved / seconds["copy"] / 1e9,
    }


# %% What an update must do
def _guessers(config: Any) -> int:
    """G of Equation (eq-speed-count): what asks about K guesses, a state."""
    rows = config.rows_per_state
    return {"idem": 2 * rows, "shared": 1}.get(config.estimator, rows)


def operations(agent: Any) -> dict[str, float]:
    """Operations of the matrix products of one update that trains all.

    Equations (eq-speed-rows) and (eq-speed-count) of the chapter.

    Args:
        agent: a SOM agent.

    Returns:
        Floating-point operations by part.
    """
    c, o, a = agent.config, agent.observation_size, agent.action_size
    middle = (c.depth - 1) * c.width**2
    kappa = 4 * (a * c.width + middle + 2 * c.width)
    kappa_s = 4 * o * c.width
    pi = 2 * (2 * a * c.width + middle)
    pi_s = 2 * ((o + 32) * c.width + 2048)
    each, shared = c.rows_per_state, c.estimator == "shared"
    guesses = c.num_samples * _guessers(c)
    centre = 2 * each * (kappa + kappa_s)
    centre *= c.estimator in ("combined", "shared")
    num = c.target_particles or c.num_particles
    choice = num * kappa + kappa_s if num > 1 else 0
    b = float(c.batch_size)
    states = min(b, float(c.policy_batch or b))  # of the policy's step
    jump = shared * (pi + pi_s)
    passes = 6 + 2 * c.lagging_critic if c.batch_norm else 4
    return {
        "K pass": states * (guesses * kappa + kappa_s + centre + jump),
        "N pass": b * (num * pi + choice + pi_s),
        "critics": passes * b * (kappa + kappa_s),
        "policy": 4 * each * states * (pi + pi_s)
        + 8 * min(states, 32.0) * kappa,
    }


def _random_batch(agent: Any, key: jax.Array) -> Transition:
    size, observations = agent.config.batch_size, agent.observation_size
    a, b, c, d = jax.random.split(key, 4)
    action = jax.random.uniform(b, (size, agent.action_size), minval=-1.0)
    return Transition(
        jax.random.normal(a, (size, observations)),
        action,
        jax.random.normal(c, (size,)),
        jnp.zeros(size),
        jax.random.normal(d, (size, observations)),
        action if agent.rewrites else (),
    )


# %% What it must move
def traffic(agent: Any) -> dict[str, float]:
    """Bytes that one update moves to memory and back.

    Args:
        agent: a SOM agent.

    Returns:
        Bytes of the state, each number read and written once; and of the
        hidden units of K pass and N pass, written and read once, which
        count where caches cannot hold them.
    """
    c = agent.config
    shapes = jax.eval_shape(agent.init, jax.random.PRNGKey(0))
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    layer = 8.0 * c.width * c.depth
    states = min(c.batch_size, c.policy_batch or c.batch_size)
    num = c.target_particles or c.num_particles
    return {
        "state": 2.0 * state,
        "K pass": layer * states * 2 * c.num_samples * _guessers(c),
        "N pass": layer * c.batch_size * (3 * num if num > 1 else 1),
    }


def floors(agent: Any, peak: float, bandwidth: float) -> dict[str, float]:
    """Least times of an update, Equation (eq-speed-floor) of the chapter.

    Args:
        agent: a SOM agent.
        peak: floating-point operations per second.
        bandwidth: bytes per second.

    Returns:
        Milliseconds, means over a cycle of updates: of the arithmetic, of
        moving the state, and of moving the activations too.
    """
    delay = agent.config.policy_delay

    def mean(parts: Mapping[str, float]) -> float:
        delayed = ("K pass", "policy")
        return sum(v / delay if k in delayed else v for k, v in parts.items())

    moved = traffic(agent)
    return {
        "arithmetic ms": 1e3 * mean(operations(agent)) / peak,
        "state ms": 1e3 * moved["state"] / bandwidth,
        "activations ms": 1e3 * mean(moved) / bandwidth,
    }


# %% Where the time goes
def parts(repeats: int, **overrides: Any) -> dict[str, float]:
    """Times of the parts of an update, each a program of its own.

    Args:
        repeats: timings per median.
        **overrides: fields of the `paper` profile to change.

    Returns:
        Milliseconds.
    """
    agent = make_agent("som", 17, 6, "paper", **overrides)
    key = jax.random.PRNGKey(0)
    state, batch = jax.jit(agent.init)(key), _random_batch(agent, key)
    best = jax.jit(partial(best_of_n, agent))
    networks = state.policy, state.critic
    inputs = state, batch, key
    calls = {
        "N pass": partial(best, *networks, batch.next_observation, key),
        "critics": partial(jax.jit(partial(critic_step, agent)), *inputs),
        "policy": partial(jax.jit(partial(policy_step, agent)), *inputs),
        "update": partial(jax.jit(agent.update), *inputs),
    }
    return {f"{k} ms": 1e3 * v for k, v in medians(calls, repeats).items()}


def kernels(call: Callable[[], Any], most: int = 8) -> dict[str, float]:
    """Kinds of kernels that the device runs, by a trace of the profiler.

    Args:
        call: what to trace; it is called once before.
        most: how many kinds to tell apart.

    Returns:
        Percent of the kernels' time, the largest first.
    """
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        file = next(Path(folder).rglob("*.trace.json.gz"))
        events = json.loads(gzip.decompress(file.read_bytes()))
    times: Counter[str] = Counter()
    for event in events["traceEvents"]:
        if name := event.get("args", {}).get("hlo_op"):
            times[re.sub(r"[._\d]+$", "", name)] += event.get("dur", 0)
    for outer in ("while", "cond", "conditional", "call"):
        times.pop(outer, None)  # their time is that of what they contain
    whole = sum(times.values()) or 1
    return {f"{k} %": 100 * v / whole for k, v in times.most_common(most)}


# %% What closes the gap
def largest_difference(x: Any, y: Any) -> float:
    """Largest difference of two trees, in units of each leaf's largest.

    Args:
        x, y: pytrees of one structure.
    """
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    return max(
        float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30))
        for a, b in ((np.asarray(a), np.asarray(b)) for a, b in pairs)
    )


def _score_memory(agent: Any, state: Any, batch: Transition) -> int:
    """Bytes that XLA reserves while it computes the field of a batch."""

    def field(observation, action, critic, key):
        velocity = flow_velocity(agent, critic, 1.0, observation, key)
        return velocity(action, 0.5)

    fields = jax.jit(jax.vmap(field, (0, 0, None, None)))
    compiled: Any = fields.lower(
        batch.observation, batch.action, state.critic, jax.random.key(0)
    ).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def cycle(agent: Any, seeds: int = 1) -> tuple[Callable[[], Any], int]:
    """Updates as a run makes them: scanned, seeds side by side.

    Args:
        agent: an off-policy agent.
        seeds: S, how many learn together.

    Returns:
        A call that makes whole cycles of policy_delay updates of every
        seed and returns their states [S, ...], and how many it makes.
    """
    delay = getattr(agent.config, "policy_delay", 1)
    updates = delay * (1 if jax.default_backend() == "cpu" else 32)
    state = loop.init_seeds(agent, tuple(range(seeds)))
    state = state._replace(step=state.step + delay)
    keys = jnp.stack([jax.random.PRNGKey(i) for i in range(seeds)])
    packed = replay.pack(_random_batch(agent, keys[0]))
    rows = jnp.stack([jnp.asarray(packed)] * seeds)
    sizes = agent.observation_size, agent.action_size
    empty = replay.init(4 * len(packed), *sizes, agent.rewrites)
    buffer = jax.tree.map(lambda x: jnp.stack([x] * seeds), empty)

    def call() -> Any:
        nonlocal buffer  # donated
        new, buffer, _ = loop.learn(agent, state, buffer, rows, keys, updates)
        return new

    return call, updates


# %% How fast it is
def update_times(
    profile: str, repeats: int, **overrides: Any
) -> dict[str, float]:
    """Time and memory of an update, plain and chunked.

    Args:
        profile: the agent's profile.
        repeats: timings per median.
        **overrides: fields of the configuration to change.

    Returns:
        Milliseconds, operations, shares of the peak, MiB.
    """
    result: dict[str, float] = {}
    product, operations = matmul()
    calls: dict[str, Callable[[], Any]] = {"matmul": product}
    key = jax.random.PRNGKey(0)
    for kind, chunk in {"plain": {"chunk": 0}, "chunked": {}}.items():
        agent = make_agent("som", 17, 6, profile, **{**overrides, **chunk})
        state, batch = jax.jit(agent.init)(key), _random_batch(agent, key)
        lowered = jax.jit(agent.update).lower(state, batch, key)
        compiled: Any = lowered.compile()
        quiet = state._replace(step=state.step + 1)
        for name, at in {"policy": state, "critics": quiet}.items():
            calls[f"{kind} {name}"] = partial(compiled, at, batch, key)
        if kind == "plain":
            result["gflop"] = compiled.cost_analysis()["flops"] / 1e9
        memory = _score_memory(agent, state, batch)
        result[f"{kind} score MiB"] = memory / 2**20
    for name, seconds in medians(calls, repeats).items():
        result[f"{name} ms"] = 1e3 * seconds
    delay = agent.config.policy_delay
    peak = operations / (result.pop("matmul ms") / 1e3)
    result["matmul peak GFLOP/s"] = peak / 1e9
    for kind in ("plain", "chunked"):
        whole = result[f"{kind} policy ms"]
        part = result[f"{kind} critics ms"] if delay > 1 else whole
        result[f"{kind} cycle ms"] = (whole + (delay - 1) * part) / delay
        result[f"{kind} share of peak"] = (
            result["gflop"] * 1e9 / (whole / 1e3) / peak
        )
    result["chunked to plain"] = (
        result["chunked policy ms"] / result["plain policy ms"]
    )
    return result


def one_action(agent: Any) -> Callable[[], np.ndarray]:
    """A call in which a fresh policy answers one observation.

    Args:
        agent: any agent.
    """
    state = loop.init_seeds(agent, (0,))
    bound = np.ones(agent.action_size, np.float32)
    policy = Policy(agent, state, "HalfCheetah-v4", -bound, bound)
    return partial(policy, np.zeros(agent.observation_size, np.float32))


def action_times(repeats: int, **overrides: Any) -> dict[str, float]:
    """Time that a policy takes to answer one observation.

    Args:
        repeats: a hundredth of the timings per median.
        **overrides: fields of the `paper` profile to change.

    Returns:
        Milliseconds, for the best of one and of 32 candidates.
    """
    calls = {}
    for number in (1, 32):
        settings = {**overrides, "num_particles": number}
        agent = make_agent("som", 17, 6, "paper", **settings)
        calls[f"N={number} ms"] = one_action(agent)
    return {k: 1e3 * v for k, v in medians(calls, 100 * repeats).items()}


def physics_speeds(
    tasks: Iterable[str], repeats: int, num_envs: int = 8, steps: int = 100
) -> dict[str, float]:
    """Environment steps per second under random actions.

    Args:
        tasks: Gymnasium ids.
        repeats: timings per median.
        num_envs: copies stepped together.
        steps: steps of each copy per timing.

    Returns:
        Steps per second of all copies together, resets included.
    """
    speeds = {}
    for task in tasks:
        envs = environments.make(task, num_envs, seed=0)
        size = (num_envs, envs.action_size)
        rng = np.random.default_rng(0)
        moves = rng.uniform(-1, 1, (steps, *size)).astype(np.float32)
        envs.reset()

        call = partial(_step_all, envs, moves)
        speeds[task] = num_envs * steps / medians({"": call}, repeats)[""]
    return speeds


def _step_all(envs: environments.Environments, actions: np.ndarray) -> None:
    for action in actions:
        envs.step(action)


def loop_speed(
    repeats: int, task: str = "HalfCheetah-v4", **overrides: Any
) -> dict[str, float]:
    """Speed of the whole loop, and what it costs beside the updates.

    Args:
        repeats: timings per median.
        task: Gymnasium id.
        **overrides: fields of the agent's or the loop's configuration.

    Returns:
        Steps per second, milliseconds, share of the updates' time, MiB.
    """
    schedule = {
        **dataclasses.asdict(loop.LAPTOP), "warmup": 1
    }  # fmt: skip
    schedule |= {k: v for k, v in overrides.items() if k in schedule}
    agent = {k: v for k, v in overrides.items() if k not in schedule}
    trainer = loop.Trainer(
        {
            "algo": "som", "env": task, "steps": 10**9, "seeds": [0],
            "profile": "laptop", "agent": agent, "loop": schedule,
        }
    )  # fmt: skip
    times: dict[str, list[float]] = {k: [] for k in ("all", "host", "learn")}
    buffer = trainer.empty_buffer()
    for _ in range(2):
        buffer, _ = loop.run_chunk(trainer, buffer)
    for _ in range(repeats):
        start = time.perf_counter()
        buffer, _ = loop.run_chunk(trainer, buffer)
        times["all"].append(time.perf_counter() - start)
    for _ in range(repeats):
        start = time.perf_counter()
        trainer.state, buffer, metrics = loop.learn(
            trainer.agent, trainer.state, buffer, trainer.rows,
            trainer.key(loop.LEARN, trainer.chunk), trainer.loop.updates,
        )  # fmt: skip
        jax.block_until_ready((trainer.state, buffer, metrics))
        times["learn"].append(time.perf_counter() - start)
        start = time.perf_counter()
        trainer.rows = loop.collect(trainer, trainer.state)
        loop.check_finite(trainer, jax.device_get(metrics))
        times["host"].append(time.perf_counter() - start)
        trainer.chunk += 1
    median = {k: statistics.median(v) for k, v in times.items()}
    steps, number = trainer.rows.shape[1], trainer.loop.num_envs
    physics = steps / physics_speeds([task], repeats, number)[task]
    overhead = median["host"] - physics
    compiled: Any = loop.learn.lower(
        trainer.agent, trainer.state, buffer, trainer.rows,
        trainer.key(loop.LEARN, 0), trainer.loop.updates,
    ).compile()  # fmt: skip
    return {
        "steps per second": steps / median["all"],
        "updates per second": trainer.loop.updates / median["all"],
        "update ms": 1e3 * median["learn"] / trainer.loop.updates,
        "physics ms per chunk": 1e3 * physics,
        "overhead ms per chunk": 1e3 * overhead,
        "overhead to updates": overhead / median["learn"],
        "buffer MiB": sum(x.nbytes for x in buffer) / 2**20,
        "temporary MiB": (
            compiled.memory_analysis().temp_size_in_bytes / 2**20
        ),
    }


# %% Growth
AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "K": ("num_samples", (25, 50, 100, 200)),
    "batch": ("batch_size", (64, 128, 256, 512)),
    "N": ("target_particles", (1, 8, 32, 128)),
    "width": ("width", (64, 128, 256, 512)),
    "seeds": ("seeds", (1, 2, 5, 10)),
}  # what grows: its field, "seeds" or one of the configuration; values


def growth(
    repeats: int,
    axes: Mapping[str, tuple[str, Sequence[int]]] = AXES,
    **overrides: Any,
) -> dict[str, dict[str, float]]:
    """Time of an update against each size, others as in `paper`.

    Args:
        repeats: timings per median.
        axes: what grows, as in AXES.
        **overrides: fields of the `paper` profile to change.

    Returns:
        For each axis, milliseconds per update (of all seeds together) by
        value, means over a cycle of updates.
    """
    paper = dataclasses.asdict(AGENTS["som"].profiles["paper"])
    base = paper | overrides | {"seeds": 1}
    calls: dict[str, Callable[[], Any]] = {}
    names: dict[str, dict[str, str]] = {axis: {} for axis in axes}
    for axis, (field, values) in axes.items():
        for value in values:
            config = base | {field: value}
            names[axis][str(value)] = name = str(config)
            if name not in calls:
                seeds = config.pop("seeds")
                agent = make_agent("som", 17, 6, "paper", **config)
                calls[name], updates = cycle(agent, seeds)
    seconds = medians(calls, repeats)
    return {
        axis: {v: 1e3 * seconds[name] / updates for v, name in rows.items()}
        for axis, rows in names.items()
    }


# %% The same numbers everywhere
def _update_elsewhere(agent: Any, inputs: Any) -> Any:
    """One update on the default device; on a CPU, without fusion."""
    inputs = jax.device_put(inputs, jax.devices()[0])
    lowered = jax.jit(agent.update).lower(*inputs)
    options: dict[str, str | bool] = {}
    if jax.default_backend() == "cpu":
        options["xla_disable_hlo_passes"] = "fusion"
    return lowered.compile(options)(*inputs)


def parity(**overrides: Any) -> dict[str, float]:
    """One update on the CPU against the same one on the default device.

    Args:
        **overrides: fields of the `paper` profile to change.

    Returns:
        Largest relative difference of each part of the state, and of the
        metrics, with float32 matrix products.
    """
    agent = make_agent("som", 17, 6, "paper", **overrides)
    keys = jax.random.split(jax.random.PRNGKey(0), 4)
    alone = jax.default_backend() == "cpu"
    host = None if alone else jax.devices("cpu")[0]
    with jax.default_matmul_precision("highest"):
        with jax.default_device(host):
            state, update = (
                jax.jit(agent.init)(keys[0]),
                jax.jit(agent.update),
            )
            for key in keys[1:]:
                state, _ = update(state, _random_batch(agent, key), key)
            state = state._replace(step=jnp.zeros_like(state.step))
            inputs = state, _random_batch(agent, keys[0]), keys[0]
            mine, metrics = update(*inputs)
        theirs, others = _update_elsewhere(agent, inputs)
    result = {
        name: largest_difference(getattr(mine, name), getattr(theirs, name))
        for name in mine._fields
    }
    return result | {"metrics": largest_difference(metrics, others)}


def parity_title() -> str:
    """What `parity` compares on this machine."""
    device = jax.default_backend()
    other = "CPU without fusion" if device == "cpu" else device
    return f"largest relative difference, CPU against {other}"


# %% All agents
@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Compile anew even what the disk holds compiled."""
    used = jax.config.jax_enable_compilation_cache  # type: ignore
    try:
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", used)
        compilation_cache.reset_cache()


def compile_seconds(agent: Any) -> float:
    """Seconds until one update is traced and compiled.

    Args:
        agent: an off-policy agent.
    """
    key = jax.random.PRNGKey(0)
    state, batch = jax.jit(agent.init)(key), _random_batch(agent, key)

    def update(state, batch, key):
        return agent.update(state, agent.revise(state, batch), key)

    with _without_cache():
        start = time.perf_counter()
        jax.jit(update).lower(state, batch, key).compile()
        return time.perf_counter() - start


def algorithms(
    repeats: int,
    names: Iterable[str],
    profile: str = "paper",
    **overrides: Any,
) -> Iterator[tuple[str, dict[str, float]]]:
    """Time agents against each other, as Table 2 of the paper.

    Args:
        repeats: timings per median.
        names: keys of AGENTS.
        profile: one that all of them have.
        **overrides: fields of their configurations to change.

    Yields:
        The title of a table, and a row for each agent.
    """
    agents = {
        name: make_agent(name, 17, 6, profile, **overrides) for name in names
    }
    learners = {
        name: agent
        for name, agent in agents.items()
        if not getattr(agent, "on_policy", False)
    }
    yield (
        "seconds to compile one update",
        {name: compile_seconds(agent) for name, agent in learners.items()},
    )
    cycles = {name: cycle(agent) for name, agent in learners.items()}
    calls = {name: call for name, (call, _) in cycles.items()}
    yield (
        f"ms per update, {profile} profile",
        {
            name: 1e3 * seconds / cycles[name][1]
            for name, seconds in medians(calls, repeats).items()
        },
    )
    actions = {name: one_action(agent) for name, agent in agents.items()}
    yield (
        f"ms per action, {profile} profile",
        {k: 1e3 * v for k, v in medians(actions, 100 * repeats).items()},
    )


# %% The benchmark
def machine(repeats: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Measure this machine and SOM on it, one table after the other.

    Args:
        repeats: timings per median.

    Yields:
        The title of a table, and its rows.
    """
    yield "the machine", peaks(repeats)
    for profile in ("paper", "paper-literal", "laptop"):
        # The laptop profile does not chunk; here it is asked to, to compare.
        chunk = {"chunk": 5} if profile == "laptop" else {}
        title = f"one update, {profile} profile, HalfCheetah's sizes"
        yield title, update_times(profile, repeats, **chunk)
    yield "parts of one update, paper profile", parts(repeats)
    agent = make_agent("som", 17, 6, "paper")
    yield "kernels of a cycle of updates, % of time", kernels(cycle(agent)[0])
    yield "one action, paper profile", action_times(repeats)
    speeds = physics_speeds(environments.RULES, repeats)
    yield "environment steps per second, 8 copies", speeds
    yield "the loop, laptop profile, HalfCheetah-v4", loop_speed(repeats)
    yield parity_title(), parity()
    for axis, rows in growth(repeats).items():
        yield f"ms per update against {axis}", rows


BENCHMARKS["machine"] = machine
BENCHMARKS["algorithms"] = algorithms
