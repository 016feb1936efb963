"""Planners in one step, and the study of priors and guidance."""

import jax.numpy as jnp
import numpy as np
import pytest
from relatives.test_prior_guidance import GAUSSIAN, KEY, MU, SDE, S, Z

from som.relatives import planners
from som.relatives.planners import (
    KNOBS,
    PriorStudy,
    fit_method,
    flow_loss,
    line_velocity,
    plane_planner,
)
from som.relatives.prior_guidance import MEASURES, VALUES, Hills, exact_noise
from som.theory.sde import VP
from som.training.command_line import STUDIES
from som.training.records import read_record


@pytest.mark.parametrize("sde", [SDE, VP(2.0, 2.0)])
def test_the_lines_velocity_is_that_of_a_gaussian(sde):
    v = line_velocity(exact_noise(GAUSSIAN, sde), sde)
    for t in (0.1, 0.5, 0.8):
        wide = ((1 - t) ** 2 * S**2 + t**2) ** 0.5
        rate = (t - (1 - t) * S**2) / wide
        wanted = -MU + rate * (Z - (1 - t) * MU) / wide
        np.testing.assert_allclose(v(Z, t), wanted, atol=0.02)


def test_the_exact_average_velocity_has_no_error():
    def wide(t):
        return jnp.sqrt((1 - t) ** 2 * S**2 + t**2)

    def apply(params, a, r, t, s):
        z = (a - (1 - t) * MU) / wide(t)
        return (a - (1 - r) * MU - wide(r) * z) / jnp.maximum(t - r, 1e-4) + params

    v = line_velocity(exact_noise(GAUSSIAN, SDE), SDE)
    plan, s = GAUSSIAN.sample(KEY, 64), jnp.zeros((64, 1))
    right, wrong = (float(flow_loss(apply, p, v, s, plan, KEY)) for p in (0.0, 0.5))
    assert right < 0.02 and wrong > 5 * right


def test_every_method_can_be_measured(monkeypatch):
    monkeypatch.setattr(planners, "NUM_STEPS", 2)
    monkeypatch.setattr(planners, "plane_planner", lambda name: lambda z: MU + S * z)
    for method, knobs in KNOBS.items():
        arm = {"value": "one hill", "planner": "20 steps", "method": method}
        made = fit_method(arm | {"knobs": knobs[:1], "steps": 2}, [0, 1], num=16)
        assert set(made) == set(MEASURES)
        for found in made.values():
            assert np.shape(found) == (1, 2) and np.isfinite(found).all()


def test_the_study_has_every_method_and_planner():
    arms = STUDIES["prior-guidance"].arms
    assert {arm["method"] for arm in arms.values()} == set(KNOBS)
    assert {arm["value"] for arm in arms.values()} == set(VALUES)
    assert all(isinstance(VALUES[a["value"]], Hills) for a in arms.values())


def test_a_killed_study_goes_on(tmp_path, monkeypatch):
    made = []

    def fit(arm, seeds):
        made.append(arm["method"])
        if made == ["a", "b"]:
            raise KeyboardInterrupt
        return {"value": [[1.0]]}

    monkeypatch.setattr(planners, "fit_method", fit)
    study = PriorStudy({m: {"method": m, "knobs": [1, 2]} for m in "ab"})
    with pytest.raises(KeyboardInterrupt):
        study.run(tmp_path / "x.json", [0])
    told = []
    study.run(tmp_path / "x.json", [0], progress=lambda *x: told.append(x))
    assert made == ["a", "b", "b"] and told == [(2, "a"), (4, "b")]
    assert study.total(None) == 4
    assert list(read_record(tmp_path / "x.json")["arms"]) == ["a", "b"]
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_there_are_two_planners():
    with pytest.raises(ValueError, match="'20 steps' or 'one step' is wanted"):
        plane_planner("two steps")
