"""Measure what SOM's open choices do on the eight-mode bandit.

    python tools/measure_defaults.py [--updates 3000] [--seeds 1]

Every arm changes one field of the laptop profile; each is trained with a learned
critic on uniform queries. The record is book/results/agent/eight_modes.json; arms
that it already holds are not run again.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from som.agent.actor_critic import candidates, make_agent
from som.agent.critic import Transition
from som.agent.som import SOM
from som.theory.boltzmann import eight_modes
from som.training.loop import init_seeds, seed_axes
from som.training.records import provenance, read_record, write_record

OUT = Path(__file__).resolve().parents[1] / "book/results/agent/eight_modes.json"
SHARED = ("estimator", "rescale", "target", "anchor_share", "q_scale")
SHARED += ("noise_range", "inverse_temperature", "initial_alpha")
LITERAL = {f: getattr(SOM.profiles["paper-literal"], f) for f in SHARED}
ARMS = {
    "default": {},
    "idem estimator": {"estimator": "idem"},
    "box estimator": {"estimator": "box"},
    "unit length 12, beta to 2": {"rescale": 12.0, "noise_range": (0.1, 2.0)},
    "beta to 20": {"noise_range": (0.1, 20.0)},
    "jvp target": {"target": "jvp"},
    "semigroup target": {"target": "semigroup"},
    "paper-literal": LITERAL,
}
PEAKS = np.sqrt(2) / 2 * np.array([[0, 1], [1, 0], [0, -1], [-1, 0]])


def near_peaks(actions):
    """Whether each action [n, 2] is within half a paper unit of each peak, [n, 4]."""
    return np.linalg.norm(actions[:, None] - PEAKS, axis=-1) < 0.25


def measure(overrides, updates, seeds):
    """Train one arm; return hits per mode [S, 4], arrows on modes [S], seconds."""
    agent = make_agent("som", 1, 2, num_particles=4, **overrides)
    reward, size = eight_modes(), agent.config.batch_size
    state = init_seeds(agent, tuple(range(seeds)))
    axes = seed_axes(state)

    def one(state, key):
        k_action, k_update = jax.random.split(key)
        a = jax.random.uniform(k_action, (size, 2), minval=-1, maxval=1)
        zero = jnp.zeros((size, 1))
        batch = Transition(zero, a, 5 * reward(a), jnp.ones(size), zero)
        return agent.update(state, batch, k_update)[0]

    def body(state, i):
        keys = jax.vmap(lambda s: jax.random.fold_in(jax.random.PRNGKey(s), i))(
            100 + jnp.arange(seeds)
        )
        return jax.vmap(one, (axes, 0), axes)(state, keys), None

    start = time.monotonic()
    state = jax.jit(lambda s: jax.lax.scan(body, s, jnp.arange(updates))[0])(state)
    jax.block_until_ready(state)
    seconds = time.monotonic() - start
    grid = jnp.linspace(-2, 2, 7)
    grid = jnp.stack(jnp.meshgrid(grid, grid), -1).reshape(-1, 2)
    hits, arrows = [], []
    for i in range(seeds):
        policy = jax.tree.map(lambda x, i=i: x[i], agent.acting_policy(state))
        drawn = candidates(agent, policy, jnp.zeros(1), jax.random.PRNGKey(9), 2000)
        path = agent.transport(policy, grid, jnp.zeros(1), None)
        ends = jnp.clip(path[-1], -1, 1)
        hits.append(near_peaks(drawn).mean(0).tolist())
        arrows.append(int(near_peaks(ends).any(1).sum()))
    return {"hits": hits, "arrows": arrows, "seconds": seconds}


def main():
    """Run the missing arms and print each result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    record = {"updates": args.updates, "seeds": args.seeds, "arms": {}}
    if OUT.exists():
        old = read_record(OUT)
        if (old["updates"], old["seeds"]) == (args.updates, args.seeds):
            record = old
    origin = provenance()
    for name, overrides in ARMS.items():
        if name not in record["arms"]:
            result = measure(overrides, args.updates, args.seeds)
            record["arms"][name] = result | {"settings": overrides}
            write_record(OUT, record | {"provenance": origin})
        hits = np.sum(record["arms"][name]["hits"], 1)
        print(f"{name:24} {np.round(hits, 3)}", flush=True)


if __name__ == "__main__":
    main()
