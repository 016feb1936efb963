"""Faults on purpose: a few of each arm, and what the record of them holds."""

import random

import numpy as np
import pytest

from som.training import records, reliability
from som.training.command_line import STUDIES


def run(arm, trials, seed=0):
    *_, table = reliability.ARMS[arm](trials, seed)
    failed = {row["fault"]: row["failed"] for row in table.values() if row["failed"]}
    assert not failed
    return table


def test_spoiled_files_are_refused(monkeypatch):
    monkeypatch.setattr(reliability, "SECONDS", 30.0)  # any machine
    table = run("files", 150, seed=3)
    assert sum(row["tried"] for row in table.values()) == 150
    assert any(row["said"] for row in table.values())


def test_what_is_no_number_stops_a_run():
    run("numbers", 3)


def test_tasks_that_misbehave():
    table = run("tasks", 2)
    assert "point" in table["the task: raises"]["said"]


def test_a_killed_run_comes_to_the_same_end():
    run("kill", 1)


def test_a_trial_that_fails_is_told():
    table = reliability.Table()
    table["a fault"].add(True, "fine")
    table["a fault"].add(False, "broken")
    row = table["a fault"]
    assert (row["tried"], row["held"], row["failed"]) == (2, 1, ["broken"])


def test_an_other_end_is_noticed(tmp_path):
    for seed in (0, 1):
        reliability.small(tmp_path / str(seed), seed)
    assert reliability.same_end(tmp_path / "0", tmp_path / "0")
    assert not reliability.same_end(tmp_path / "0", tmp_path / "1")


def test_the_same_faults_from_the_same_seed():
    spoil = reliability.BYTES["a bit flipped"]
    one, two = (spoil(random.Random(3), b"some bytes") for _ in range(2))
    assert one == two != b"some bytes"


def test_growth_and_speed():
    notes = [(i, 100 + (i > 5), 10 * i, 2 * i) for i in range(12)]
    assert reliability.growth(notes) == pytest.approx(0.01)
    np.testing.assert_allclose(reliability.speed(notes), 5)


def test_the_study_makes_its_record(tmp_path, monkeypatch):
    def arm(trials, seed):
        table = reliability.Table()
        for _ in range(trials):
            table["it"].add(True, "said")
            yield table

    monkeypatch.setattr(reliability, "ARMS", {"one": arm, "two": arm})
    study = reliability.Campaign({"one": {"trials": 2}, "two": {"trials": 3}})
    told = []
    path = tmp_path / "reliability.json"
    record = study.run(path, [4], None, lambda *now: told.append(now))
    assert records.read_record(path) == records.as_json(record)
    assert told == [(2, "one"), (5, "two")] and record["seeds"] == [4]
    assert record["arms"]["two"]["faults"][0]["held"] == 3
    assert study.total(None) == 5 and study.total(1) == 2
    one, two = record["arms"].values()
    again = reliability.Campaign({"two": {"trials": 1}}).run(path, [4])
    assert again["arms"]["one"] == one and one["source"] == records.source_hash()
    assert (two["trials"], again["arms"]["two"]["trials"]) == (3, 1)
    assert set(STUDIES["reliability"].arms) <= {*reliability.__dict__, "ray"}
