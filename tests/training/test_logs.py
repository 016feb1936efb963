"""Logs: what a run tells while it learns, and never twice."""

import io
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from carts import train
from rich.console import Console

import som
from som.training import logs, runs
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
    lost = straight.record["curve"][0] | {"returns": [[None]]}  # null: not finite
    assert np.isnan(som.curves(straight.record | {"curve": [lost]})["return"][0])


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


def read_events(folder):
    """The scalars of TensorBoard's files, {step: {tag: value}}, and what is purged.

    A file is a row of records: 8 bytes of length, 4 of checksum, the record, 4 more.
    """
    event_pb2 = pytest.importorskip(
        "tensorboardX.proto.event_pb2", reason="tensorboardX is not installed"
    )
    scalars, purged = {}, []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            size = 12 + int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12:size])
            data = data[size + 4 :]
            if event.HasField("session_log"):
                purged.append(event.step)
                scalars = {k: v for k, v in scalars.items() if k < event.step}
            for value in event.summary.value:
                scalars.setdefault(event.step, {})[value.tag] = value.simple_value
    return scalars, purged


def logged_table(folder):
    """The rows of metrics.csv as TensorBoard is told them."""
    table = {}
    for row in logs.read_table(folder / "metrics.csv"):
        now = table.setdefault(int(row["step"]), {})
        for name, value in row.items():
            if name not in ("step", "seed") and value:
                now[f"{name}/seed_{row['seed']}"] = float(value)
    return table


def test_tensorboard_shows_the_table(tmp_path):
    """Also of a run that lost its last chunks and made them again."""
    kept = tmp_path / "kept.npz"

    def keep(step, metrics):
        if step == 400:
            shutil.copy(tmp_path / "run" / "checkpoint.npz", kept)  # of step 300

    words = {"steps": 500, "seeds": 2, "checkpoint_seconds": 1e-9}
    run = train(tmp_path / "run", keep, log="tensorboard", **words)
    shutil.copy(kept, run.out / "checkpoint.npz")
    (run.out / "record.json").unlink()
    for killed in (False, True):
        if killed:
            runs.resume(run.out, log="tensorboard")
        scalars, purged = read_events(run.out / "tensorboard")
        table = logged_table(run.out)
        assert list(scalars) == list(table) == [100, 200, 300, 400, 500]
        for step, row in table.items():
            assert scalars[step] == pytest.approx(row, rel=1e-6)
        assert purged == [301] * killed
    assert {"critic/loss/seed_1", "evaluation/return/seed_0"} <= set(scalars[500])


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


def read_wandb(path):
    """The records of W&B's file, a log of LevelDB.

    Seven bytes of its own come first. A record is in parts, none of which crosses a
    block of 2^15 bytes; before each part are 4 bytes of checksum, 2 of length, and
    one that says whether it is the whole (1), a first (2), middle (3) or last (4).
    """
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record = (record if kind in (3, 4) else b"") + data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield record


def test_wandb_itself_keeps_the_rows(tmp_path, monkeypatch):
    """Not in CI, where it is not installed: it is large, and logs in by default."""
    reason = "wandb is not installed: `pip install -e .[logs]` brings it"
    wandb = pytest.importorskip("wandb", reason=reason)
    record_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train(tmp_path, steps=300, log="wandb")
    wandb.teardown()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    rows = {}
    for data in read_wandb(path):
        record = record_pb2.Record.FromString(data)
        row = {
            "/".join(i.nested_key) or i.key: i.value_json for i in record.history.item
        }
        if row:
            rows[int(row["_step"])] = row
    for step, wanted in logged_table(tmp_path).items():
        got = {k.replace(" ", "_"): json.loads(v) for k, v in rows[step].items()}
        assert wanted.items() <= got.items()
