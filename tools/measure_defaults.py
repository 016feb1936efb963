"""Measure what SOM's open choices do on the eight-mode bandit.

    python tools/measure_defaults.py [--updates 6000] [--seeds 2]

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

from som.agent.som import SOM
from som.studies.bandit import fit_seeds, near, noise_grid
from som.theory.boltzmann import eight_modes
from som.training.records import provenance, read_record, write_record

OUT = Path(__file__).resolve().parents[1] / "book/results/agent/eight_modes.json"
SHARED = ("estimator", "rescale", "target", "anchor_share", "prior_share")
SHARED += ("q_scale", "noise_range", "inverse_temperature", "ema_policy")
LITERAL = {f: getattr(SOM.profiles["paper-literal"], f) for f in SHARED}
ARMS = {
    "default": {},
    "idem estimator": {"estimator": "idem"},
    "box estimator": {"estimator": "box"},
    "length 12": {"rescale": 12.0},
    "score as it is, beta to 6": {"rescale": None, "noise_range": (0.1, 6.0)},
    "no rows from the prior": {"prior_share": 0.0},
    "online policy": {"ema_policy": False},
    "beta to 20": {"noise_range": (0.1, 20.0)},
    "jvp target": {"target": "jvp"},
    "semigroup target": {"target": "semigroup"},
    "paper-literal": LITERAL,
}


def measure(overrides, updates, seeds):
    """Train one arm; return hits per mode [S, 4], arrows on modes [S], seconds."""
    start = time.monotonic()
    keys = jnp.stack([jax.random.PRNGKey(seed) for seed in range(seeds)])
    fits = fit_seeds("som", eight_modes(), keys, updates, on_policy=0.0, **overrides)
    seconds = time.monotonic() - start
    hits = [near(f(f.prior(jax.random.PRNGKey(9), 2000))).mean(0) for f in fits]
    arrows = [int(near(f(noise_grid())).any(1).sum()) for f in fits]
    hits = [h.tolist() for h in hits]
    return {"hits": hits, "arrows": arrows, "seconds": seconds}


def main():
    """Run the missing arms and print each result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=2)
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
