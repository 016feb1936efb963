"""Landscapes and the records of studies: counting, resuming, refusing."""

import json
import multiprocessing
import os
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from examples import Climber

from som.agent.actor_critic import AGENTS
from som.studies import landscapes
from som.studies.bandit import Sampler
from som.studies.landscapes import (
    LANDSCAPES,
    Study,
    Timing,
    at_cells,
    at_moons,
    circle,
    fit_arm,
    hills,
    landscape,
    mode_entropy,
    picture,
    tally,
)
from som.theory.boltzmann import box_grid, checkerboard, two_moons
from som.training.command_line import STUDIES
from som.training.records import read_record

TINY = {"width": 8, "depth": 1, "batch_size": 8, "landscape": "two-moons"}
TINY |= {"algo": "climber", "steps": 3}
TOY = Study({"first": TINY, "second": TINY | {"actor_lr": 0.5}}, (tally,))


@pytest.fixture(autouse=True)
def climber(monkeypatch):
    monkeypatch.setitem(AGENTS, "climber", Climber)


def test_each_landscape_is_a_reward_with_disjoint_modes():
    actions = box_grid(60).reshape(-1, 2)
    for name in LANDSCAPES:
        scape = landscape(name)
        reward, there = np.asarray(scape.reward(actions)), scape.at_modes(actions)
        assert reward.shape == (3600,) and np.isfinite(reward).all()
        assert there.any(0).all() and there.sum(1).max() == 1
        assert there[reward.argmax()].any(), name
        assert reward[there.any(1)].mean() > 2 * reward[~there.any(1)].mean(), name


def test_cells_are_the_high_ones():
    actions = box_grid(80).reshape(-1, 2)
    inside = at_cells(actions)
    assert inside.shape == (6400, 8)
    high = np.asarray(checkerboard()(actions)) > 0.5
    assert np.mean(inside.any(1) == high) > 0.98


def test_moons_are_upper_and_lower():
    top, bottom = [-0.25, 0.375], [0.25, -0.375]
    np.testing.assert_array_equal(at_moons([top, bottom]), np.eye(2, dtype=bool))
    assert two_moons()(jnp.array([top, bottom])).min() > 0.9


def test_hills_add_up():
    scape = hills([(0.5, 0.0)], [(-0.5, 0.0, 0.5, 0.3)], std=0.1)
    reward = scape.reward(jnp.array([[0.5, 0.0], [0.6, 0.0], [-0.5, 0.0]]))
    far = 0.5 * np.exp(-0.5 * (np.array([1.0, 1.1]) / 0.3) ** 2)
    expected = [1 + far[0], np.exp(-0.5) + far[1], 0.5]
    np.testing.assert_allclose(reward, expected, rtol=1e-5)
    assert scape.at_modes([[0.5, 0.2], [-0.5, 0.0]]).tolist() == [[True], [False]]


def test_circle_starts_at_a_share_of_a_turn():
    np.testing.assert_allclose(circle(4, 0.5, 0.25)[0], (0, 0.5), atol=1e-12)
    assert len(circle(5, 1.0)) == 5


@pytest.mark.parametrize(
    ("shares", "entropy"),
    [
        ([0.25] * 4, 1),
        ([0.5, 0.0, 0.0], 0),
        ([0.0, 0.0], 0),
        ([0.1, 0.1, 0.0, 0.0], 0.5),
    ],
)
def test_mode_entropy(shares, entropy):
    assert mode_entropy(shares) == pytest.approx(entropy)


def test_bump_changes_the_reward_and_not_the_modes():
    origin = jnp.zeros((1, 2))
    clean, bumped = landscape("two-moons"), landscape("two-moons", (0.5, 0.1))
    assert float((bumped.reward(origin) - clean.reward(origin))[0]) == pytest.approx(
        0.5
    )
    assert bumped.at_modes is clean.at_modes


class Fixed(Sampler):
    """A sampler whose actions are known."""

    def path(self, noise, key=None):
        east = jnp.asarray(noise)[:, :1] > 0
        a = jnp.where(east, jnp.array([0.7071, 0.0]), jnp.array([0.0, 0.1]))
        return jnp.stack([jnp.asarray(noise), a])


FIXED = Fixed(SimpleNamespace(prior_std=1.0), None)


def test_tally_counts():
    result = tally([FIXED, FIXED], landscape("eight-modes"))
    shares = np.array(result["shares"])
    assert shares.shape == (2, 4)
    assert abs(shares[0, 1] - 0.5) < 0.05 and shares[0, [0, 2, 3]].max() == 0
    assert result["arrows"] == [21, 21]  # three of the seven columns are east
    assert result["entropy"] == [0, 0]
    assert 0.4 < result["reward"][0] < 0.6


def test_picture_is_of_the_first_seed():
    result = picture([FIXED], landscape("eight-modes"), 5)
    assert np.shape(result["samples"]) == (5, 2)
    assert np.shape(result["paths"]) == (2, 49, 2)


def test_bump_is_learned_from_and_not_measured_with():
    seen = {}

    def measure(fits, scape):
        seen["scape"] = scape
        return {"q": float(fits[0].q(jnp.zeros(2)))}

    arm = TINY | {"bump": [7.0, 0.1], "known": True}
    result = fit_arm(arm, [0], (measure,), lambda done: None)
    clean = landscape("two-moons")
    assert seen["scape"] is clean
    lifted = 7 + float(clean.reward(jnp.zeros(2)))
    assert result["q"] == pytest.approx(lifted, rel=1e-4)


def test_record_is_complete_and_nothing_else_is_left(tmp_path):
    told = []
    record = TOY.run(
        tmp_path / "toy.json", [0, 1], progress=lambda *now: told.append(now)
    )
    assert [p.name for p in tmp_path.iterdir()] == ["toy.json"]
    assert read_record(tmp_path / "toy.json") == json.loads(
        json.dumps(record, default=list)
    )
    assert list(record["arms"]) == ["first", "second"]
    assert np.shape(record["arms"]["first"]["shares"]) == (2, 2)
    assert told == [(3, "first"), (6, "second")]


def test_killed_study_goes_on_with_the_same_numbers(tmp_path, monkeypatch):
    whole = TOY.run(tmp_path / "whole.json", [0, 1])

    def kill(done, arm):
        if arm == "second":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TOY.run(tmp_path / "cut.json", [0, 1], progress=kill)
    assert (tmp_path / "cut.unfinished.json").exists()

    fitted = []
    fit = landscapes.fit_arm

    def spy(arm, *rest):
        fitted.append(arm.get("actor_lr"))
        return fit(arm, *rest)

    monkeypatch.setattr(landscapes, "fit_arm", spy)
    again = TOY.run(tmp_path / "cut.json", [0, 1])
    assert fitted == [0.5]
    for name in ("first", "second"):
        for number in ("shares", "reward", "entropy", "arrows"):
            first, second = (r["arms"][name][number] for r in (whole, again))
            np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("change", ["seeds", "source", "steps"])
def test_what_was_begun_otherwise_is_begun_anew(tmp_path, monkeypatch, change):
    record = TOY.run(tmp_path / "toy.json", [0])
    if change == "source":
        record["provenance"]["source"] = "other"
    landscapes.write_record(tmp_path / "toy.unfinished.json", record)
    fitted = []

    def spy(arm, *rest):
        fitted.append(arm.get("actor_lr"))
        return {}

    monkeypatch.setattr(landscapes, "fit_arm", spy)
    seeds, steps = [1] if change == "seeds" else [0], 4 if change == "steps" else None
    TOY.run(tmp_path / "toy.json", seeds, steps)
    assert len(fitted) == 2


def test_error_of_one_arm_ends_the_study(tmp_path):
    arms = {"bad": TINY | {"algo": "clumber"}}
    with pytest.raises(ValueError, match=r"clumber.*climber"):
        Study(arms, (tally,)).run(tmp_path / "bad.json", [0])
    assert not (tmp_path / "bad.json").exists()


SMALL = {"algo": "mfp", "width": 8, "depth": 1, "batch_size": 8}
SMALL |= {"landscape": "two-moons", "steps": 3}
PAIR = Study({"a": SMALL, "b": SMALL | {"actor_lr": 0.5}}, (tally,))


def test_processes_come_to_the_numbers_of_fits_in_turn(tmp_path):
    told = []
    apart = PAIR.run(
        tmp_path / "apart.json",
        [0, 1],
        progress=lambda *now: told.append(now),
        processes=2,
    )
    here = PAIR.run(tmp_path / "here.json", [0, 1])
    assert max(done for done, _ in told) == 6
    assert {arm for _, arm in told} == set("ab") == set(apart["arms"])
    for name in "ab":
        for number in ("shares", "reward", "entropy", "arrows"):
            first, second = (r["arms"][name][number] for r in (apart, here))
            np.testing.assert_allclose(first, second, atol=1e-6)


def test_error_in_a_process_is_told_as_it_is(tmp_path):
    bad = Study({"bad": SMALL | {"width": 0}, "b": SMALL}, (tally,))
    with pytest.raises(ValueError, match="width"):
        bad.run(tmp_path / "bad.json", [0], processes=2)
    assert multiprocessing.active_children() == []


def dies(fits, scape):
    os._exit(7)


def test_process_that_dies_ends_the_study(tmp_path):
    study = Study({"a": SMALL}, (dies,))
    with pytest.raises(ChildProcessError, match=r"fit of a .*exit code 7"):
        study.run(tmp_path / "dead.json", [0], processes=2)


def test_most_seeds(tmp_path):
    study = Study({"one": TINY}, (tally,), most_seeds=1)
    assert study.run(tmp_path / "few.json", [3, 4])["seeds"] == [3]


def test_timing(tmp_path):
    timing = Timing({"one": {"algo": "climber"}})
    record = timing.run(tmp_path / "speed.json", [0], steps=1)
    assert record["ms per update"]["one"] > record["ms per action"]["one"] > 0


def test_methods_of_the_paper_are_in_every_landscape():
    for name in ("eight-modes", "two-moons", "checkerboard"):
        assert set(STUDIES[name].arms) == {"sdac", "dacer", "som", "mfp"}
        assert all(a["landscape"] == name for a in STUDIES[name].arms.values())
