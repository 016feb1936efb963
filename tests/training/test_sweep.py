"""Sweeps: a plan, runs that end once, and a Ray whose workers are killed."""

import json
import sys
import threading

import numpy as np
import psutil
import pytest

from som.agent.actor_critic import AGENTS
from som.training import loop, runs, sweep
from som.training.command_line import main
from som.training.environments import TASKS
from som.training.records import mean_ci, read_record, write_record
from som.training.sweep import (
    gather,
    has_ended,
    on_ray,
    one_by_one,
    plan,
    plot,
    run_one,
    save_results,
    steps_saved,
    summary,
    table,
    usual_steps,
)

TASK = "InvertedDoublePendulum-v4"
TINY = {
    "width": 8, "depth": 1, "batch_size": 8, "num_particles": 2,
    "warmup": 100, "capacity": 2000, "chunk_steps": 50, "evaluations": 2,
    "episodes": 2, "updates_per_step": 0.04,
}  # fmt: skip
STEPS = 600
WORDS = ["sweep", "--algos", "sac", "--envs", TASK, "--steps", str(STEPS)]
WORDS += [w for k, v in TINY.items() for w in ("--set", f"{k}={v}")]


def tiny(out, seeds=(0, 1), algos=("sac",), **changes):
    return plan(algos, [TASK], seeds, out, **{"steps": STEPS, **TINY, **changes})


def arrays(job):
    """Everything in a policy's file, its settings included."""
    with np.load(job.folder / "policy.npz") as file:
        return {name: file[name] for name in file.files}


def assert_same(one, two):
    """Two runs ended with the same policy and the same curve, to the bit."""
    first, second = arrays(one), arrays(two)
    assert set(first) == set(second)
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name], err_msg=name)
    curves = [read_record(job.folder / "record.json")["curve"] for job in (one, two)]
    returns = [[(p["step"], p["returns"]) for p in curve] for curve in curves]
    assert returns[0] == returns[1]


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    """Two finished runs, one after the other, and what progress was told."""
    jobs, told = tiny(tmp_path_factory.mktemp("sweep")), []
    one_by_one(jobs, lambda *now: told.append(now))
    return jobs, told


# The plan


def test_plan_is_the_product_seeds_outermost(tmp_path):
    jobs = plan(("som", "sdac"), [TASK, "Reacher-v4"], (4, 7), tmp_path, 300)
    folders = [str(job.folder.relative_to(tmp_path)) for job in jobs]
    assert len(jobs) == 2 * 2 * 2
    assert folders[:3] == [f"{TASK}/som/4", f"{TASK}/sdac/4", "Reacher-v4/som/4"]
    assert jobs[0].name == f"som {TASK} 4"
    assert all(job.config["steps"] == 300 for job in jobs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("algo", "env", "profile", "steps"),
    [
        ("som", "Ant-v4", "paper", 5_000_000),
        ("som", "Pusher-v4", "paper", 1_000_000),
        ("ppo", "Pusher-v4", "paper", 5_000_000),
        ("som", "Ant-v4", "laptop", 50_000),
    ],
)
def test_usual_steps(algo, env, profile, steps):
    assert usual_steps(algo, env, profile) == steps


def test_a_setting_goes_to_the_algorithms_that_have_it(tmp_path):
    own = {name: vars(loop.defaults(name, "laptop")[0]) for name in AGENTS}
    field = next(k for k in own["som"] if k not in own["sdac"])
    value = own["som"][field]
    jobs = plan(["som", "sdac"], [TASK], [0], tmp_path, **{field: value, "width": 8})
    for job, name in zip(jobs, ("som", "sdac"), strict=True):
        wanted = own[name] | {"width": 8}
        assert job.config["agent"] == json.loads(json.dumps(wanted))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algos": ["sim"]}, "unknown algorithm 'sim'; did you mean 'som'"),
        ({"envs": ["HalfCheeta-v4"]}, "no Gymnasium task: did you mean 'HalfCheetah"),
        ({"algos": ["som", "som"]}, "none of them twice"),
        ({"seeds": []}, r"seeds is \[\]; a number of seeds, or a list"),
        ({"seeds": [-1]}, "different whole numbers"),
        ({"steps": 0}, "at least 1 is wanted"),
        ({"profile": "papr"}, "did you mean 'paper'"),
        ({"widht": 3}, "unknown setting 'widht'; did you mean 'width'"),
        ({"warmup": -1}, "warmup is -1"),
    ],
)
def test_plan_refuses(change, message, tmp_path):
    given = {"algos": ["som"], "envs": [TASK], "seeds": [0], "out": tmp_path}
    with pytest.raises(ValueError, match=message):
        plan(**given | change)


def test_a_folder_with_another_run_is_refused(serial, tmp_path):
    out = serial[0][0].folder.parents[2]
    assert tiny(out) == serial[0]
    with pytest.raises(ValueError, match="other settings \\(agent, steps\\)"):
        tiny(out, steps=700, width=16)


# One run, and one after the other


def test_serial_runs_are_those_of_train(serial, tmp_path):
    jobs, told = serial
    run = runs.train("sac", TASK, STEPS, (1,), out=tmp_path / "alone", **TINY)
    assert_same(jobs[1], sweep.Job(run.out, {}))
    assert told[-1] == (2 * STEPS, f"run 2 of 2, sac {TASK} 1")
    assert [steps for steps, _ in told] == sorted(steps for steps, _ in told)


def test_what_has_ended_is_left_alone(serial):
    jobs, _ = serial
    before = [(j.folder / "policy.npz").stat().st_mtime_ns for j in jobs]
    one_by_one(jobs)
    assert before == [(j.folder / "policy.npz").stat().st_mtime_ns for j in jobs]
    assert all(map(has_ended, jobs)) and steps_saved(jobs[0]) == STEPS


def test_ctrl_c_loses_nothing(serial, tmp_path):
    jobs = tiny(tmp_path)
    assert steps_saved(jobs[0]) == 0

    def press(steps, status):
        if steps == 300:
            runs.signal.raise_signal(runs.signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        one_by_one(jobs, press)
    assert steps_saved(jobs[0]) == 300 and not has_ended(jobs[0])
    one_by_one(jobs)
    for one, two in zip(jobs, serial[0], strict=True):
        assert_same(one, two)


def test_divergence_is_an_ending(serial, tmp_path, monkeypatch):
    def diverged(trainer, metrics):
        raise FloatingPointError("training diverged")

    jobs = tiny(tmp_path, seeds=(0,)) + serial[0]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "check_finite", diverged)
        one_by_one(jobs)
    assert has_ended(jobs[0]) and not runs.is_finished(jobs[0].folder)
    run_one(jobs[0], lambda *_: pytest.fail("it was tried again"))
    entry = gather(jobs[:1])[0]
    assert entry["seeds"] == [] and "diverged" in entry["failed"]["0"]
    assert "seed 0 failed: training diverged" in table([entry])
    assert np.isnan(summary([entry])[0].mean)
    plot([entry])


# Results


def test_table_plot_and_file(serial, tmp_path):
    jobs, _ = serial
    (entry,) = save_results(jobs, tmp_path)
    assert read_record(tmp_path / "sweep.json")["results"] == [entry]
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert entry["seeds"] == [0, 1] and entry["evaluated_at"] == [300, 600]
    record = read_record(jobs[1].folder / "record.json")
    last = np.mean(record["curve"][-1]["returns"][0])
    assert entry["returns"][1][-1] == pytest.approx(last)
    assert len(entry["made_by"]) == 1 and entry["config"] == record["config"]
    row = summary([entry])[0]
    final = [returns[-1] for returns in entry["returns"]]
    assert (row.mean, row.low, row.high) == pytest.approx([*map(float, mean_ci(final))])
    assert f"{row.mean:.1f}" in table([entry])
    assert "nan" not in table(gather(jobs[:1]))  # one seed has no interval


def test_plot_tells_ten_algorithms_apart():
    entry = {"env": "Ant-v4", "seeds": [0], "evaluated_at": [1, 2], "returns": [[3, 4]]}
    figure = plot([{**entry, "algo": str(i)} for i in range(10)])
    looks = {(ln.get_color(), ln.get_linestyle()) for ln in figure.axes[0].lines}
    assert len(looks) == 10
    assert len(plot([{**entry, "algo": "a", "env": e} for e in TASKS]).axes) == 9


# The command


def test_command(tmp_path, capsys):
    words = [*WORDS, "--seeds", "2,", "--out", str(tmp_path)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert text.startswith("1 runs, 0 of them ended before") and TASK in text
    assert (tmp_path / "sweep.json").exists()
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("1 runs, 1 of them ended before")
    assert main([*words, "--set", "widht=3"]) == 1
    assert "did you mean 'width'" in capsys.readouterr().err


def test_command_interrupted(tmp_path, capsys, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "one_by_one", press)
    assert main([*WORDS, "--out", str(tmp_path)]) == 130
    assert "the same command goes on" in capsys.readouterr().err


@pytest.mark.parametrize("share", [(0.0, 0.0), (float("nan"), 0.0), (1.0, -1.0)])
def test_a_share_that_is_none(share):
    with pytest.raises(ValueError, match="more than 0 cores"):
        on_ray([], "local", *share)


def test_without_ray(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main([*WORDS, "--ray", "local", "--out", str(tmp_path)]) == 1
    assert "pip install ray" in capsys.readouterr().err


def test_no_ray_at_the_address(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ConnectionError):
        on_ray(tiny(tmp_path), "auto")


# A real Ray


def test_killed_worker_loses_nothing(serial, tmp_path):
    pytest.importorskip("ray")
    jobs = tiny(tmp_path, checkpoint_seconds=1e-9)
    write_record(jobs[1].folder / "config.json", jobs[1].config)  # begun before
    told, killed, stop = [], [], threading.Event()

    def kill_once():
        while not stop.wait(0.005) and not killed:
            if steps_saved(jobs[0]) >= 150:
                for child in psutil.Process().children(recursive=True):
                    if child.cmdline()[:1] == [f"ray::{jobs[0].name}"]:
                        child.kill()
                        killed.append(child.pid)

    thread = threading.Thread(target=kill_once)
    thread.start()
    try:
        on_ray(jobs, "local", progress=lambda *now: told.append(now))
    finally:
        stop.set()
        thread.join()
    first, second = (read_record(j.folder / "record.json")["slices"] for j in jobs)
    assert len(killed) == 1 and len(first) == 2 and len(second) == 1
    assert first[1]["first_step"] >= 150
    assert told[-1] == (2 * STEPS, "2 of 2 runs ended, 0 begun")
    for one, two in zip(jobs, serial[0], strict=True):
        saved = arrays(one), arrays(two)
        assert saved[0].pop("metadata").tobytes() == saved[1].pop("metadata").tobytes()
        assert_same(one, two)


# A run that fails


def test_a_run_that_fails_is_named_and_the_others_go_on(serial, tmp_path, capsys):
    jobs = tiny(tmp_path)
    jobs[0].folder.mkdir(parents=True)
    (jobs[0].folder / "checkpoint.npz").write_bytes(b"damaged")
    for _ in range(2):  # and again at the next try
        with pytest.raises(ChildProcessError, match=f"1 of 2 .*{jobs[0].name}: Check"):
            one_by_one(jobs)
        assert has_ended(jobs[1]) and not has_ended(jobs[0])
    (jobs[0].folder / "checkpoint.npz").unlink()
    one_by_one(jobs)
    for one, two in zip(jobs, serial[0], strict=True):
        assert_same(one, two)


def test_the_command_tells_the_others_results(tmp_path, capsys):
    words = [*WORDS, "--seeds", "2,", "--out", str(tmp_path)]
    (folder,) = (job.folder for job in tiny(tmp_path)[:1])
    folder = folder.with_name("2")
    folder.mkdir(parents=True)
    (folder / "checkpoint.npz").mkdir()
    assert main(words) == 1
    said = capsys.readouterr()
    assert "1 of 1 runs were lost" in said.err and TASK in said.out
