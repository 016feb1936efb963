"""SOM: score-based one-step MeanFlow policy optimisation.

The package is exported from the chapters of the book; this file only gathers
the names that people use first.
"""

from importlib import import_module
from pkgutil import walk_packages

from som.agent.actor_critic import AGENTS, make_agent
from som.training.policy import load
from som.training.runs import Run, resume, train

__all__ = ["AGENTS", "Run", "load", "make_agent", "resume", "train"]

# Agents enter their class in AGENTS as they are imported, studies and benchmarks
# likewise; so every module is imported, and a new one need not be named here.
for module in walk_packages(__path__, "som."):
    if module.name != "som.__main__":
        import_module(module.name)
