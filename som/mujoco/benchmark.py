"""All agents against the clock.

Exported by tools/export.py from book/mujoco/benchmark.md; edit the chapter.
"""

__all__ = [
    "compile_seconds",
    "algorithms",
    "machine",
]

# %% Imports
import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from som.agent.actor_critic import make_agent
from som.mujoco.cost import peaks, random_batch
from som.mujoco.pace import (
    action_times,
    loop_speed,
    one_action,
    physics_speeds,
)
from som.mujoco.precision import parity, parity_title
from som.mujoco.speed import cycle, growth, kernels, parts, update_times
from som.training import environments
from som.training.command_line import BENCHMARKS, medians


# %% One step of training, and one action
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
    state, batch = agent.init(key), random_batch(agent, key)

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


# %% The benchmark of a machine
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
