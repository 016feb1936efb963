"""Records: atomic files, refusals in one sentence, statistics, curves."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from som.training import records
from som.training.records import (
    CheckpointError,
    bootstrap_ci,
    iqm,
    load,
    mean_ci,
    plot_curves,
    provenance,
    read_metadata,
    read_record,
    save,
    source_hash,
    write_record,
)


class Pair(NamedTuple):
    first: object
    second: object


@flax.struct.dataclass
class State:
    params: object
    step: object


def a_tree():
    return State(
        params={
            "w": jnp.arange(6.0).reshape(2, 3),
            "b": [np.zeros(0, np.float64), np.array(True), None],
        },
        step=Pair(jnp.int32(3), jax.random.PRNGKey(1)),
    )


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 400
    return text


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "checkpoint.npz"


def test_round_trip_is_exact(path):
    tree = a_tree()
    save(path, tree, {"step": 7, "nan": float("nan"), "array": np.arange(2)})
    again, metadata = load(path, like=tree)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for old, new in zip(jax.tree.leaves(tree), jax.tree.leaves(again), strict=True):
        assert isinstance(new, np.ndarray) and new.dtype == old.dtype
        np.testing.assert_array_equal(old, new)
    assert metadata == {"step": 7, "nan": None, "array": [0, 1]}
    assert read_metadata(path) == metadata
    assert os.listdir(path.parent) == [path.name]


def test_like_may_be_shapes_only(path):
    tree = Pair(jnp.arange(6.0).reshape(2, 3), jnp.int32(3))
    save(path, tree, {})
    again, _ = load(path, like=jax.eval_shape(lambda: tree))
    np.testing.assert_array_equal(again.first, tree.first)


def test_bare_array(path):
    save(path, np.arange(3), {})
    np.testing.assert_array_equal(load(path, np.zeros(3, int))[0], [0, 1, 2])


@pytest.mark.parametrize("leaf", ["text", object(), jax.random.key(0)])
def test_only_numbers(path, leaf):
    with pytest.raises(ValueError, match="numbers and booleans") as error:
        save(path, {"x": leaf}, {})
    one_sentence(error)
    assert not path.exists()


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_crash_between_write_and_replace_keeps_the_old_file(
    path, monkeypatch, function
):
    save(path, {"x": np.zeros(4)}, {"step": 1})

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, function, crash)
    with pytest.raises(KeyboardInterrupt):
        save(path, {"x": np.ones(4)}, {"step": 2})
    tree, metadata = load(path, {"x": np.zeros(4)})
    assert metadata == {"step": 1} and not tree["x"].any()
    assert os.listdir(path.parent) == [path.name]


def test_full_disk_keeps_the_old_file(path, monkeypatch):
    save(path, {"x": np.zeros(4)}, {"step": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records.os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left") as error:
            save(path, {"x": np.ones(4)}, {"step": 2})
        assert "the previous file is intact" in one_sentence(error)
        with pytest.raises(CheckpointError, match="No space left"):
            write_record(path.parent / "record.json", {})
    assert read_metadata(path) == {"step": 1}
    assert os.listdir(path.parent) == [path.name]


def test_file_size_limit_of_the_system_keeps_the_old_file(path):
    save(path, {"x": np.zeros(4)}, {"step": 1})
    program = (
        "import resource, sys, numpy as np\n"
        "from som.training.records import save, CheckpointError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try: save(sys.argv[1], {'x': np.zeros(10**5)}, {})\n"
        "except CheckpointError as error: print(error)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "File too large; the previous file is intact." in out.stdout
    assert read_metadata(path) == {"step": 1}
    assert os.listdir(path.parent) == [path.name]


def test_killed_writer_leaves_a_loadable_file_and_its_rest_is_removed(path):
    program = (
        "import sys, numpy as np\n"
        "from som.training.records import save\n"
        "for i in range(10**9):\n"
        "    save(sys.argv[1], {'x': np.full(300_000, i)}, {'i': i})\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(path)])
    deadline = time.monotonic() + 60
    while not path.exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    tree, metadata = load(path, {"x": np.zeros(300_000, int)})
    assert np.all(tree["x"] == metadata["i"])
    path.with_name(f".{path.name}.1.unfinished").touch()
    save(path, {"x": np.zeros(1)}, {})
    assert os.listdir(path.parent) == [path.name]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "x.npz", tmp_path / "file" / "y" / "x.npz"):
        with pytest.raises(CheckpointError, match="cannot write") as error:
            save(target, {}, {})
        one_sentence(error)
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(CheckpointError, match="cannot write"):
        save(tmp_path / "folder.npz", {}, {})


def test_missing(path):
    with pytest.raises(CheckpointError, match="there is no checkpoint at") as error:
        load(path, {})
    one_sentence(error)
    with pytest.raises(CheckpointError, match="there is no record at"):
        read_record(path)


@pytest.mark.parametrize("keep", [0, 1, 10, 200, -1, -30])
def test_truncated(path, keep):
    save(path, {"x": np.arange(100)}, {"step": 1})
    path.write_bytes(path.read_bytes()[:keep])
    for read in (lambda p: load(p, {"x": np.arange(100)}), read_metadata):
        with pytest.raises(CheckpointError, match="not a complete checkpoint") as error:
            read(path)
        one_sentence(error)


@pytest.mark.parametrize("size", [10, 10_000])
def test_every_flipped_byte_of_an_array_is_noticed(path, size):
    like = {"x": np.arange(size, dtype=np.int64)}
    save(path, like, {})
    data = bytearray(path.read_bytes())
    start = data.find(like["x"].tobytes())
    for offset in (0, 4 * size, 8 * size - 1):
        damaged = bytearray(data)
        damaged[start + offset] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="CRC"):
            load(path, like)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_foreign_files_are_refused_and_run_nothing(tmp_path):
    target = str(tmp_path / "executed")
    metadata = np.frombuffer(b"{}", np.uint8)
    np.savez(tmp_path / "elsewhere.npz", x=np.zeros(3))
    np.savez(
        tmp_path / "attack.npz",
        **{"tree['x']": np.array([Payload(target)], dtype=object)},
        metadata=metadata,
    )
    np.savez(
        tmp_path / "attack2.npz", metadata=np.array([Payload(target)], dtype=object)
    )
    np.save(tmp_path / "plain.npy", np.zeros(3))
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(1000))
    (tmp_path / "pickle").write_bytes(pickle.dumps(Payload(target)))
    with zipfile.ZipFile(tmp_path / "raw.npz", "w") as archive:
        archive.writestr("metadata.npy", pickle.dumps(Payload(target)))
    np.savez(tmp_path / "list.npz", metadata=np.frombuffer(b"[1]", np.uint8))
    np.savez(tmp_path / "text.npz", metadata=np.frombuffer(b"\xff{", np.uint8))
    (tmp_path / "a folder").mkdir()
    for name in sorted(os.listdir(tmp_path)):
        with pytest.raises(CheckpointError, match="of this package") as error:
            load(tmp_path / name, {"x": np.zeros(3)})
        one_sentence(error)
    assert not os.path.exists(target)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"x": np.zeros(4)}, r"tree\['x'\] is float64\[3\], not float64\[4\]"),
        ({"x": np.zeros(3, np.int32)}, "float64.*not int32"),
        ({"x": np.zeros(3), "y": 1.0}, r"it lacks tree\['y'\]"),
        ({}, r"unexpected entry tree\['x'\]"),
        ([np.zeros(3)], "checkpoint of something else"),
    ],
)
def test_mismatch_is_named(path, like, message):
    save(path, {"x": np.zeros(3)}, {})
    with pytest.raises(CheckpointError, match=message) as error:
        load(path, like)
    one_sentence(error)


def test_record_round_trip_is_standard_json(tmp_path):
    target = tmp_path / "a" / "record.json"
    write_record(target, {"x": [float("inf"), np.float32(1)], "seeds": (0, 1)})
    assert read_record(target) == {"x": [None, 1.0], "seeds": [0, 1]}
    assert "NaN" not in target.read_text() and "Inf" not in target.read_text()
    with pytest.raises(ValueError, match="JSON cannot hold a object"):
        write_record(target, {"x": object()})
    assert read_record(target) == {"x": [None, 1.0], "seeds": [0, 1]}
    for text in ("", "[1]", "{"):
        target.write_text(text)
        with pytest.raises(CheckpointError, match="is not a run record") as error:
            read_record(target)
        one_sentence(error)


def test_provenance():
    facts = provenance()
    json.dumps(facts)
    assert facts["jax"] == jax.__version__ and facts["numpy"] == np.__version__
    assert facts["source"] == source_hash() and len(facts["source"]) == 16
    assert facts["commit"] is None or len(facts["commit"]) == 40
    assert facts["cpu"] and facts["cores"] >= 1


def test_source_hash_follows_the_source(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_package_folder", lambda: tmp_path)
    (tmp_path / "a.py").write_text("x = 1")
    first = source_hash()
    (tmp_path / "notes.txt").touch()
    assert source_hash() == first
    (tmp_path / "a.py").write_text("x = 2")
    assert source_hash() != first
    assert records._commit() is None


def test_mean_ci_against_scipy():
    x = np.random.default_rng(0).normal(size=(5, 3))
    mean, low, high = mean_ci(x, level=0.9)
    expected = scipy.stats.t.interval(
        0.9, df=4, loc=x.mean(0), scale=scipy.stats.sem(x, axis=0)
    )
    np.testing.assert_allclose(mean, x.mean(0))
    np.testing.assert_allclose([low, high], expected)
    mean, low, high = mean_ci([3.0])
    assert mean == 3 and np.isnan(low) and np.isnan(high)


@pytest.mark.parametrize("n", range(1, 20))
def test_iqm_against_scipy(n):
    x = np.random.default_rng(n).normal(size=n)
    np.testing.assert_allclose(iqm(x), scipy.stats.trim_mean(x, 0.25), atol=1e-12)


def test_iqm_by_hand_ignores_outliers():
    assert iqm([[-1e9, 1, 2, 3], [4, 5, 6, 1e9]]) == 3.5


def test_bootstrap_is_stratified_and_reproducible():
    # Between the tasks lies a gulf; within each there is no spread at all.
    x = np.tile([0.0, 100.0], (5, 1))
    assert bootstrap_ci(x, statistic=np.mean, samples=50) == (50.0, 50.0)
    y = np.random.default_rng(0).normal(size=30)
    low, high = bootstrap_ci(y, samples=200)
    assert low < iqm(y) < high
    assert (low, high) == bootstrap_ci(y, samples=200)
    assert (low, high) != bootstrap_ci(y, samples=200, seed=1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_ci([]),
        lambda: mean_ci([1.0], level=2.0),
        lambda: iqm([]),
        lambda: bootstrap_ci(np.zeros((2, 2, 2))),
        lambda: bootstrap_ci([1.0, 2.0], level=0.0),
        lambda: plot_curves([]),
        lambda: plot_curves([{"curve": []}]),
    ],
)
def test_bad_statistics_input(call):
    with pytest.raises(ValueError) as error:
        call()
    one_sentence(error)


def a_record(seeds, offset=0.0, env="Task-v0", **config):
    return {
        "algo": "som",
        "env": env,
        "profile": "laptop",
        "seeds": seeds,
        "config": config,
        "curve": [
            {"step": step, "returns": [[step + s + offset, None] for s in seeds]}
            for step in (0, 100)
        ],
    }


def test_plot_pools_seeds_and_separates_tasks_and_configs(tmp_path):
    runs = [a_record([0, 1]), a_record([2]), a_record([0], agent={"width": 64})]
    for run in runs:
        for point in run["curve"]:
            point["returns"] = [seed[:1] for seed in point["returns"]]
    runs[0]["config"] = runs[1]["config"] = {"agent": {"width": 32}}
    other = {**runs[2], "env": "Other-v0"}
    figure = plot_curves([*runs, other], tmp_path / "curve.svg")
    first, second = figure.axes
    assert first.get_title() == "Task-v0" and second.get_title() == "Other-v0"
    labels = first.get_legend_handles_labels()[1]
    assert labels == [
        "som, laptop, width=32: 3 seeds",
        "som, laptop, width=64: 1 seed",
    ]
    pooled = next(ln for ln in first.lines if ln.get_label() == labels[0])
    np.testing.assert_allclose(pooled.get_ydata(), [1.0, 101.0])
    again = plot_curves([*runs[:2], runs[1]]).axes[0]
    assert again.get_legend_handles_labels()[1] == [
        "som, laptop: 3 seeds",
        "som, laptop: 1 seed",
    ]
    assert b"<svg" in (tmp_path / "curve.svg").read_bytes()
    with pytest.raises(ValueError, match="a picture is one of"):
        plot_curves(runs, tmp_path / "curve.txt")


# What is no file, or unpacks to more than it is


def test_a_zip_bomb_is_not_unpacked(path):
    save(path, {"x": np.zeros(3)}, {})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("metadata.npy", bytes(10**8))
    with pytest.raises(CheckpointError, match="longer than the file") as error:
        read_metadata(path)
    one_sentence(error)


def test_two_entries_of_one_name(path):
    save(path, {"x": np.zeros(3)}, {})
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("metadata.npy", b"")
    with pytest.raises(CheckpointError, match="two entries"):
        read_metadata(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize("read", [read_metadata, read_record])
def test_what_is_no_file_is_not_read(tmp_path, kind, read):
    """A pipe nobody writes to, and a device without an end."""
    odd = tmp_path / "odd"
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "folder":
        odd.mkdir()
    else:
        odd.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError):
        read(odd)


def test_a_record_has_no_nan(tmp_path):
    (tmp_path / "record.json").write_text('{"curve": NaN}')
    with pytest.raises(CheckpointError, match="not a run record"):
        read_record(tmp_path / "record.json")


POINT = {"step": 1, "updates": 1, "seconds": 1.0, "returns": [[1.0]], "metrics": {}}
RUN = {
    "algo": "som", "env": "A-v0", "profile": "laptop", "seeds": [0], "config": {},
    "provenance": {}, "curve": [POINT],
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [{"curve": None}, {"seeds": 3}, {"seeds": []}, {"curve": [3]}, {"curve": [{}]},
     {"curve": [POINT | {"returns": [[]]}]}, {"curve": [POINT | {"step": None}]},
     {"curve": [POINT | {"returns": [["x"]]}]}, {"curve": [POINT | {"metrics": 1}]}],
)  # fmt: skip
def test_what_is_no_record_of_a_run(tmp_path, change):
    path = tmp_path / "record.json"
    write_record(path, RUN)
    assert records.read_run(path) == RUN
    write_record(path, RUN | change)
    with pytest.raises(CheckpointError) as error:
        records.read_run(path)
    one_sentence(error)


def test_a_table_is_one_for_people_and_for_terminals():
    table = records.Table(("task", "n"), [("<b>", 12), ("long name", 3)])
    shown = table._repr_html_()
    assert "&lt;b&gt;" in shown and "<b>" not in shown
    assert shown.count("<tr>") == 3 and shown.count("<td>") == 2
    assert shown.count('<td style="text-align: right">') == 2
    assert repr(table) == "task       n\n<b>        12\nlong name   3"
    with pytest.raises(ValueError, match="1 cells; 2 are wanted"):
        records.Table(("task", "n"), [("a",)])


def test_a_mean_in_words():
    assert records.in_words(310.4, 295.2, 325.1) == "310 (295 to 325)"
    assert records.in_words(0.5, np.nan, np.nan, ".2f") == "0.50"
