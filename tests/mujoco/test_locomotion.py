"""The long runs as a study, their curves, and the normalised mean."""

import numpy as np
import pytest
from examples import Cart  # noqa: F401  (registers the task)
from matplotlib.figure import Figure

from som.mujoco import locomotion
from som.mujoco.locomotion import (
    FIRST_SEED,
    LOCOMOTION,
    PAPER,
    Group,
    NineTasks,
    draw,
    final,
    learning_curves,
    long_runs,
    normalised_mean,
    player,
)
from som.training.records import read_record
from som.training.runs import is_finished

TINY = {
    "width": 8, "depth": 1, "batch_size": 8, "num_samples": 2, "num_particles": 2,
    "warmup": 100, "capacity": 1_000, "chunk_steps": 50, "checkpoint_seconds": 1e9,
}  # fmt: skip
SOM = {"algo": "som", "profile": "laptop", **TINY}
SMALL = {
    "main": Group(("Cart-v0",), {"SOM": SOM, "cold": SOM | {"sharpening": 8.0}}, 250, 2)
}


def test_table_is_the_papers():
    assert len(PAPER) == 10
    assert all(tuple(row) == LOCOMOTION for row in PAPER.values())
    assert tuple(PAPER["som"]["Hopper-v4"]) == (3425.2, 353.6)
    assert tuple(PAPER["qvpo"]["Ant-v4"]) == (430.3, 2277.9)


def test_main_runs_come_first_and_whole_with_one_seed(tmp_path):
    runs = long_runs(tmp_path, (0, 1))
    first = runs[:18]
    assert {run.group for run in first} == {"main"}
    assert {run.job.config["seeds"][0] for run in first} == {FIRST_SEED}
    assert len({run.job.config["env"] for run in first}) == 9
    assert len({run.job.folder for run in runs}) == len(runs)
    each = range(NineTasks.most_seeds)
    total = sum(run.job.config["steps"] for run in long_runs(tmp_path, each))
    assert NineTasks().total(None) == total


@pytest.fixture
def study(monkeypatch, tmp_path):
    monkeypatch.setattr(locomotion, "GROUPS", SMALL)
    return NineTasks(str(tmp_path / "runs"))


def test_the_study_goes_on_where_its_record_ends(study, tmp_path, monkeypatch):
    path, told = tmp_path / "record.json", []
    record = study.run(path, (0,), progress=lambda done, _: told.append(done))
    assert read_record(path) == record
    assert [row["label"] for row in record["runs"]] == ["SOM", "cold"]
    assert [row["seed"] for row in record["runs"]] == [FIRST_SEED] * 2
    assert told[-1] == 500
    # A machine that has the record and not the runs makes what is new alone.
    elsewhere = NineTasks(str(tmp_path / "elsewhere"))
    more = elsewhere.run(path, (0, 1))
    assert more["runs"][:2] == record["runs"] and len(more["runs"]) == 4
    made = [run.job.folder for run in long_runs(elsewhere.folder, (0, 1))]
    assert [is_finished(f) for f in made] == [False, False, True, True]
    found = learning_curves(more, "main")["Cart-v0"]
    assert found["SOM"].returns.shape == (2, len(found["SOM"].steps))
    assert found["SOM"].seeds == (FIRST_SEED, FIRST_SEED + 1)
    assert final(None) == "" and " to " in final(found["cold"])
    figure = Figure()
    draw(figure, {"Hopper-v4": {"SOM": found["SOM"], "SAC": found["cold"]}})
    assert len(figure.axes[0].lines) == 2 * 3  # two seeds and their mean, each
    assert not figure.axes[1].get_visible()
    # A setting that changed makes its runs anew, and no others.
    colder = {"SOM": SOM, "cold": SOM | {"sharpening": 16.0}}
    changed = {"main": SMALL["main"]._replace(arms=colder)}
    monkeypatch.setattr(locomotion, "GROUPS", changed)
    again = NineTasks(str(tmp_path / "third")).run(path, (0,))["runs"]
    assert again[:2] == [row for row in more["runs"] if row["label"] == "SOM"]
    assert again[2]["config"]["agent"]["sharpening"] == 16 and len(again) == 3


def test_a_run_that_diverged_is_named_and_in_no_curve(study, tmp_path):
    (run, *_) = long_runs(study.folder, (0,))
    locomotion.sweep.records.write_record(
        run.job.folder / "failed.json", {"error": "the critic's loss is nan"}
    )
    record = study.run(tmp_path / "record.json", (0,))
    assert record["runs"][0]["failed"] == "the critic's loss is nan"
    assert list(learning_curves(record, "main")["Cart-v0"]) == ["cold"]


def test_normalised_mean_by_hand():
    least = np.array([430.3, 5447.0, 1280.3, 299.2, 1323.3])
    greatest = np.array([7033.5, 15789.8, 3462.8, 7365.7, 5472.8])
    both = normalised_mean(np.stack([least, greatest]))
    np.testing.assert_allclose(both, [0, 1], atol=1e-12)
    np.testing.assert_allclose(normalised_mean((least + greatest) / 2), 0.5)
    one = least.copy()
    one[2] = 3462.8
    np.testing.assert_allclose(normalised_mean(one), 0.2)


def test_a_film_is_carried_by_the_page(tmp_path):
    film = tmp_path / "x.mp4"
    film.write_bytes(b"film")
    page = player(film, "a hopper")
    assert 'src="data:video/mp4;base64,ZmlsbQ=="' in page
    assert 'aria-label="a hopper"' in page
