"""The update at the hardware's limit.

Exported by tools/export.py from book/mujoco/speed.md; edit the chapter.
"""

__all__ = [
    "parts",
    "kernels",
    "largest_difference",
    "cycle",
    "update_times",
    "AXES",
    "growth",
]

# %% Imports
import dataclasses
import gzip
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from som.agent.actor_critic import (
    AGENTS,
    best_of_n,
    critic_step,
    make_agent,
    policy_step,
)
from som.agent.critic import Transition
from som.agent.som import flow_velocity
from som.mujoco.cost import matmul, random_batch
from som.training import loop, replay
from som.training.command_line import medians


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
    state, batch = agent.init(key), random_batch(agent, key)
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
    packed = replay.pack(random_batch(agent, keys[0]))
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
        state, batch = agent.init(key), random_batch(agent, key)
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
