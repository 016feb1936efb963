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
ESTIMATORS = ("idem", "combined")
TARGETS = ("jvp", "lagrangian")
BETAS = (2.0, 6.0, 20.0)
LENGTHS = (None, 10.0, 25.0)


def arm_name(estimator: str, target: str, beta: float, w) -> str:
    """The name of a combination in the record."""
    length = "as it is" if w is None else f"{w:g}"
    return f"{estimator}, {target}, beta {beta:g}, w {length}"


COMBINATIONS: dict[str, dict[str, Any]] = {
    arm_name(estimator, target, beta, w): {
        "estimator": estimator,
        "target": target,
        "noise_range": [0.1, beta],
        "rescale": w,
    }
    for estimator, target, beta, w in product(
        ESTIMATORS, TARGETS, BETAS, LENGTHS
    )
}


LITERAL = SOM.profiles["paper-literal"]
ONE_CHANGE: dict[str, dict[str, Any]] = {
    "default": {},
    "box estimator": {"estimator": "box"},
    "idem estimator": {"estimator": "idem"},
    "semigroup target": {"target": "semigroup"},
    "jvp target": {"target": "jvp"},
    "length 6": {"rescale": 6.0},
    "score as it is, beta to 6": {"rescale": None, "noise_range": [0.1, 6.0]},
    "beta to 20": {"noise_range": [0.1, 20.0]},
    "no anchors": {"anchor_share": 0.0},
    "no rows from the prior": {"prior_share": 0.0},
    "online policy": {"ema_policy": False},
    "paper-literal": {
        name: getattr(LITERAL, name)
        for name in (
            "estimator", "rescale", "target", "anchor_share", "prior_share",
            "q_scale", "inverse_temperature", "ema_policy",
        )
    }
    | {"noise_range": list(LITERAL.noise_range)},
}  # fmt: skip


def few(fits: list[Sampler], scape: Landscape) -> dict:
    """A small picture of the first seed: 300 samples."""
    return {"samples": picture(fits, scape, 300)["samples"]}


STUDIES["choices"] = Study(
    {
        name: {"algo": "som", "landscape": "eight-modes", "steps": 3000}
        | change
        for name, change in (COMBINATIONS | ONE_CHANGE).items()
    },
    (tally, few),
    most_seeds=1,
)
