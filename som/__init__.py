"""SOM: score-based one-step MeanFlow policy optimisation.

The package is exported from the chapters of the book; this file only gathers
the names that people use first.
"""

from importlib import import_module

from som.agent.actor_critic import AGENTS, make_agent
from som.training.logs import curves
from som.training.policy import load
from som.training.runs import Run, resume, train

__all__ = ["AGENTS", "Run", "curves", "load", "make_agent", "resume", "train"]

import_module("som.agent.som")  # these enter their classes in AGENTS
for name in (
    "sac", "ppo", "dipo", "qsm", "dacer", "qvpo", "sdac", "dpmd", "mfp", "nclql",
):  # fmt: skip
    import_module(f"som.baselines.{name}")
for name in ("landscapes", "robustness", "choices"):
    import_module(f"som.studies.{name}")  # enters its studies in STUDIES
import_module("som.mujoco.speed")  # enters its tables in BENCHMARKS
