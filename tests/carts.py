"""Short runs on the cart, which the tests of several chapters share."""

import jax
import numpy as np
from examples import Cart  # noqa: F401  (registers the task)

from som.training import loop, runs

# Compiling an update takes most of the time here, so all tests share these.
AGENT = {
    "width": 32, "depth": 2, "batch_size": 32, "num_samples": 4,
    "num_particles": 4, "actor_lr": 2e-3, "critic_lr": 2e-3,
}  # fmt: skip
LOOP = {
    "num_envs": 5, "warmup": 200, "capacity": 40_000, "updates_per_step": 0.4,
    "chunk_steps": 100, "evaluations": 2, "episodes": 3, "checkpoint_seconds": 1e9,
    "normalize_observations": False,
}  # fmt: skip
STEPS = 1_000


def config(seeds=(0,), **changes):
    """The configuration of a trainer."""
    return {
        "algo": "som", "env": "Cart-v0", "steps": STEPS, "seeds": list(seeds),
        "profile": "laptop", "agent": AGENT, "loop": {**LOOP, **changes},
    }  # fmt: skip


def train(out=None, progress=None, steps=STEPS, **changes):
    """A short run of one seed."""
    options = {"env": "Cart-v0", **AGENT, **LOOP, **changes}
    return runs.train(steps=steps, out=out, progress=progress, **options)


def advance(trainer, buffer, chunks):
    for _ in range(chunks):
        buffer, _ = loop.run_chunk(trainer, buffer)
    return buffer


def everything(trainer, buffer):
    """Every array that decides how a run goes on."""
    envs = [env.state() for env in trainer.envs]
    return jax.tree.leaves(
        (trainer.state, buffer, trainer.rows, trainer.observation, envs)
    )


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_same_arrays(one, two):
    """Two checkpoint files hold the same arrays, to the bit."""
    with np.load(one) as a, np.load(two) as b:
        assert set(a) == set(b)
        for name in set(a) - {"metadata"}:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)
