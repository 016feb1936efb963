"""What an update must cost.

Exported by tools/export.py from book/mujoco/cost.md; edit the chapter.
"""

__all__ = [
    "matmul",
    "stream",
    "peaks",
    "operations",
    "TINY",
    "random_batch",
    "traffic",
    "floors",
    "MACHINES",
    "measured",
    "shown",
]

# %% Imports
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from som.agent.actor_critic import make_agent
from som.agent.critic import Transition
from som.training.command_line import medians
from som.training.records import Table, read_record


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
    """G of Equation (eq-cost-count): what asks about K guesses, a state."""
    rows = config.rows_per_state
    return {"idem": 2 * rows, "shared": 1}.get(config.estimator, rows)


def operations(agent: Any) -> dict[str, float]:
    """Operations of the matrix products of one update that trains all.

    Equations (eq-cost-rows) and (eq-cost-count) of the chapter.

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


TINY: dict[str, Any] = {
    "width": 4, "depth": 1, "batch_size": 4, "num_samples": 2,
    "num_particles": 2, "estimator": "box", "target": "jvp", "chunk": 1,
    "discount": 0.0,
}  # fmt: skip
"""Settings of SOM's smallest update."""


def random_batch(agent: Any, key: jax.Array) -> Transition:
    """Random numbers in the place of experience.

    Args:
        agent: its sizes, and whether it keeps guides.
        key: random key.

    Returns:
        Transitions, leading axis B.
    """
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
    """Least times of an update, Equation (eq-cost-floor) of the chapter.

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


# %% The records of two machines
MACHINES = "CPU", "H200"


def measured(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The records of the machines that were measured, by name.

    Args:
        folder: where `cpu.json` and `h200.json` would be.
    """
    paths = {name: Path(folder) / f"{name.lower()}.json" for name in MACHINES}
    return {
        k: read_record(path) for k, path in paths.items() if path.exists()
    }


def shown(machines: Mapping[str, dict[str, Any]], title: str) -> Table:
    """One of the tables of a benchmark, a column for each machine.

    Args:
        machines: what `measured` returns.
        title: of the table.
    """
    columns = {
        name: record["tables"][title]
        for name, record in machines.items()
        if title in record["tables"]
    }
    names = dict.fromkeys(
        row for column in columns.values() for row in column
    )

    def number(value):
        if value is None:
            return ""
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

    rows = [(n, *(number(c.get(n)) for c in columns.values())) for n in names]
    return Table((title, *columns), rows or [("not yet run",)])
