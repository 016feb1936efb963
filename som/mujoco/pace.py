"""The pace of a run.

Exported by tools/export.py from book/mujoco/pace.md; edit the chapter.
"""

__all__ = [
    "one_action",
    "action_times",
    "physics_speeds",
    "loop_speed",
]

# %% Imports
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import numpy as np

from som.agent.actor_critic import make_agent
from som.training import environments, loop
from som.training.command_line import medians
from som.training.policy import Policy


# %% An action
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


# %% The physics
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


# %% Both together
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
