"""Logs: what a run tells while it learns, and never twice."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from carts import train
from rich.console import Console

import som
from som.training import logs
from som.training.loop import make_config


def test_rows_of_a_run(straight):
    table = logs.read_table(straight.out / "metrics.csv")
    assert [int(row["step"]) for row in table] == list(range(100, 1001, 100))
    assert {row["seed"] for row in table} == {"0"}
    assert [int(row["updates"]) for row in table[:4]] == [0, 0, 40, 80]
    assert {row["episode/length"] for row in table} == {"20.0"}
    assert [row["critic/loss"] != "" for row in table] == 2 * [False] + 8 * [True]
    evaluated = {
        int(row["step"]): float(row["evaluation/return"])
        for row in table
        if row["evaluation/return"]
    }
    curve = straight.record["curve"]
    assert evaluated == {p["step"]: np.mean(p["returns"]) for p in curve}
    last = curve[-1]["metrics"]["critic/loss"][0]
    assert float(table[-1]["critic/loss"]) == pytest.approx(last)


def test_rows_after_the_checkpoint_and_a_cut_line_go(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,seed,x\n100,0,1.5\n200,0,2.5\n1")
    table = logs.Table(path, 100)
    table.write([{"step": 200, "seed": 0, "x": 9.0, "y": 1.0}])
    assert path.read_text() == "step,seed,x,y\n100,0,1.5,\n200,0,9.0,1.0\n"


def test_curves_are_columns(straight):
    columns = som.curves(straight)
    assert columns == som.curves(straight.out) == som.curves(straight.record)
    assert columns["step"] == [500, 1000] and columns["seed"] == [0, 0]
    returns = [np.mean(p["returns"]) for p in straight.record["curve"]]
    assert columns["return"] == returns
    assert {len(column) for column in columns.values()} == {2}


def test_first_line_says_where_and_what_is_shortened():
    config = make_config("som", "Hopper-v4", 4_000, 2, "laptop", {})
    assert logs.first_line(config) == (
        "som on Hopper-v4, profile laptop, on cpu: 4,000 steps, 2 seeds, "
        "warm-up 2,000 steps (usually 5,000), 6 episodes an evaluation (usually 20)"
    )


def test_progress_says_warming_up():
    text = io.StringIO()
    console = Console(file=text)
    with logs.ProgressLine(300, console, every=0.0, warmup=200) as line:
        for step in (100, 200, 300):
            line(step, {"evaluation/return": 1.5} if step == 200 else {})
    said = text.getvalue().splitlines()
    assert ["warming up" in row for row in said] == [True, False, False]
    assert "return 1.5" in said[2]


def test_a_missing_writer_gets_a_sentence(tmp_path, monkeypatch):
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=f"{package} is not installed here"):
            train(tmp_path / name, log=name)
        assert not (tmp_path / name / "config.json").exists()


def test_tensorboard_gets_the_rows(tmp_path):
    pytest.importorskip("tensorboardX")
    train(tmp_path, steps=300, log="tensorboard")
    files = list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    assert len(files) == 1
    data = files[0].read_bytes()
    assert b"critic/loss/seed_0" in data and b"evaluation/return/seed_0" in data


def test_wandb_gets_the_rows_offline(tmp_path, monkeypatch):
    told, logged = {}, {}
    run = SimpleNamespace(
        log=lambda values, step: logged.update({step: values}),
        finish=lambda: told.update(finished=True),
    )
    fake = SimpleNamespace(init=lambda **words: told.update(words) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train(tmp_path / "run", steps=300, log=["wandb"], seeds=2)
    assert told["mode"] == "offline" and told["finished"]
    assert told["config"]["agent"]["width"] == 32 and told["name"] == "run"
    assert list(logged) == [100, 200, 300]
    assert {"critic/loss/seed 0", "critic/loss/seed 1"} <= set(logged[300])
    assert "critic/loss/seed 0" not in logged[200]
