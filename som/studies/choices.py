"""What the open choices do.

Exported by tools/export.py from book/studies/choices.md; edit the chapter.
"""

__all__ = [
    "ESTIMATORS",
    "TARGETS",
    "BETAS",
    "LENGTHS",
    "arm_name",
    "COMBINATIONS",
    "LITERAL",
    "ONE_CHANGE",
    "few",
]

# %% Imports
from itertools import product
from typing import Any

import numpy as np

from som.agent.som import SOM
from som.studies.bandit import Sampler
from som.studies.landscapes import Landscape, Study, picture, tally
from som.training.command_line import STUDIES


# %% Four choices, all combinations
ESTIMATORS = ("idem", "box")
TARGETS = ("jvp", "lagrangian")
BETAS = (2.0, 20.0)
LENGTHS: dict[str, dict[str, Any]] = {
    "as it is": {"sharpening": 0.0},
    "sharpened": {"sharpening": 4.0},
    "w 6": {"rescale": 6.0},
    "w 25": {"rescale": 25.0},
}


def arm_name(estimator: str, target: str, beta: float, length: str) -> str:
    """The name of a combination in the record."""
    return f"{estimator}, {target}, beta {beta:g}, {length}"


COMBINATIONS: dict[str, dict[str, Any]] = {
    arm_name(estimator, target, beta, length): {
        "estimator": estimator,
        "target": target,
        "noise_range": [0.1, beta],
        **LENGTHS[length],
    }
    for estimator, target, beta, length in product(
        ESTIMATORS, TARGETS, BETAS, LENGTHS
    )
}


LITERAL = SOM.profiles["paper-literal"]
ONE_CHANGE: dict[str, dict[str, Any]] = {
    "default": {},
    "combined estimator": {"estimator": "combined"},
    "sharpening 2": {"sharpening": 2.0},
    "sharpening 8": {"sharpening": 8.0},
    "8 guesses": {"num_samples": 8},
    "64 guesses": {"num_samples": 64},
    "with anchors": {"anchor_share": 0.25},
    "no rows from the prior": {"prior_share": 0.0},
    "online policy": {"ema_policy": False},
    "half the policy's step": {"actor_lr": 1e-3},
    "paper-literal": {
        name: getattr(LITERAL, name)
        for name in (
            "estimator", "sharpening", "rescale", "target", "anchor_share",
            "prior_share", "q_scale", "inverse_temperature", "ema_policy",
        )
    }
    | {"noise_range": list(LITERAL.noise_range)},
}  # fmt: skip


def few(fits: list[Sampler], scape: Landscape) -> dict:
    """A small picture of the first seed: 300 samples."""
    return {"samples": picture(fits, scape, 300)["samples"]}


STUDIES["choices"] = Study(
    {
        name: {"algo": "som", "landscape": "eight-modes", "steps": 1500}
        | change
        for name, change in (COMBINATIONS | ONE_CHANGE).items()
    },
    (tally, few),
    most_seeds=1,
)
