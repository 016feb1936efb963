"""SOM: score-based one-step MeanFlow policy optimisation.

The package is exported from the chapters of the book; this file only gathers
the names that people use first.
"""

from importlib import import_module

from som.agent.actor_critic import AGENTS, make_agent
from som.training.loop import Run, load, resume, train

__all__ = ["AGENTS", "Run", "load", "make_agent", "resume", "train"]

for name in ("agent.som", "baselines.sdac", "baselines.dacer", "baselines.mfp"):
    import_module(f"som.{name}")  # enters its class in AGENTS
for name in ("landscapes", "robustness", "choices"):
    import_module(f"som.studies.{name}")  # enters its studies in STUDIES
import_module("som.mujoco.speed")  # enters its benchmarks in BENCHMARKS
