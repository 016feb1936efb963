"""The command `som`: arguments, files, sentences instead of tracebacks."""

import argparse
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import imageio.v2 as imageio
import numpy as np
import onnxruntime
import pytest
from rich.console import Console

from som.agent.actor_critic import AGENTS
from som.training import command_line, film, records
from som.training.command_line import (
    ProgressLine,
    assignment,
    count,
    main,
    medians,
    override,
    parser,
    seed_list,
)
from som.training.policy import load
from som.training.records import read_metadata, read_record

TASK = "InvertedDoublePendulum-v4"
TINY = [
    "width=8", "depth=1", "batch_size=8", "num_samples=4", "num_particles=2", "chunk=0",
    "warmup=100", "capacity=2000", "chunk_steps=50", "evaluations=2", "episodes=2",
    "updates_per_step=0.04",
]  # fmt: skip
TRAIN = ["train", "--env", TASK, "--steps", "600"]


def command(*words):
    """The words of a tiny training run."""
    return [*words, *(w for field in TINY for w in ("--set", field))]


def refused(capsys, words, status=1):
    """The one sentence that main writes about these words."""
    assert main(words) == status
    text = capsys.readouterr().err
    assert text.startswith("som: ") and text.endswith((".\n", "?\n"))
    assert text.count("\n") == 1 and "Traceback" not in text
    return text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two seeds."""
    out = tmp_path_factory.mktemp("runs") / "a"
    assert main(command(*TRAIN, "--seeds", "2", "--out", str(out))) == 0
    return out


# Words


@pytest.mark.parametrize(("text", "value"), [("20", 20), ("5e6", 5_000_000)])
def test_count(text, value):
    assert count(text) == value


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "inf", "nan", "many", ""])
def test_count_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError, match="positive whole number"):
        count(text)


@pytest.mark.parametrize(
    ("text", "seeds"), [("3", (0, 1, 2)), ("4,7", (4, 7)), ("5,", (5,))]
)
def test_seed_list(text, seeds):
    assert seed_list(text) == seeds


@pytest.mark.parametrize("text", ["0", "-1", "1,1", "1,x", ",", "1,-2", "two"])
def test_seed_list_refuses(text):
    with pytest.raises(argparse.ArgumentTypeError):
        seed_list(text)


@dataclass(frozen=True)
class Config:
    width: int = 3
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"
    span: tuple[float, float] = (0.0, 1.0)
    weight: float | None = None
    flag: bool = False


@dataclass(frozen=True)
class Loop:
    steps: int = 5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("steps=7", 7),
        ("width=1e2", 100),
        ("rate=1", 1.0),
        ("kind=b", "b"),
        ("span=0.5,2", (0.5, 2.0)),
        ("weight=25", 25.0),
        ("weight=None", None),
        ("flag=True", True),
        ("flag=true", True),
        ("flag=FALSE", False),
        ("weight=none", None),
        ("weight=null", None),
    ],
)
def test_override(text, value):
    name, given = override(text, Loop(), Config())
    assert name == text.partition("=")[0]
    assert given == value and type(given) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht=3", "'width'"),
        ("width", "field=value"),
        ("width=1.5", "wanted is int"),
        ("width=True", "wanted is int"),
        ("kind=c", "'a', 'b'"),
        ("span=1,2,3", "tuple"),
        ("flag=1", "wanted is bool"),
        ("rate=fast", "wanted is float"),
    ],
)
def test_override_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        override(text, Loop(), Config())


# Help


def test_every_option_of_every_command_says_its_default(capsys):
    commands = parser()._subparsers._group_actions[0].choices
    assert set(commands) == {
        "train", "resume", "evaluate", "render", "plot", "sweep", "benchmark",
        "study", "settings", "export", "dataset",
        "imitate",
    }  # fmt: skip
    for name, sub in commands.items():
        for action in sub._actions:
            if action.dest != "help":
                assert "default" in action.help, (name, action.dest)
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert f"usage: som {name}" in capsys.readouterr().out


# Progress


def test_progress_writes_few_plain_lines_into_a_pipe():
    text = io.StringIO()
    with ProgressLine(1000, Console(file=text), every=60.0) as progress:
        for step in range(0, 1001, 10):
            progress(step, {"evaluation/return": [1.0, 3.0]} if step else {})
    lines = text.getvalue().splitlines()
    assert len(lines) == 2
    assert "0 of 1,000 steps" in lines[0]
    assert "1,000 of 1,000 steps" in lines[1] and "return 2.0" in lines[1]


def test_progress_draws_a_bar_on_a_terminal():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with ProgressLine(1000, console) as progress:
        progress(0, {})
        progress(500, {"evaluation/return": [7.0]})
    assert "500 of 1,000 steps" in text.getvalue()
    assert "return 7.0" in text.getvalue()


# Sentences


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ([], 2, "COMMAND"),
        (["trian"], 2, "unknown command 'trian'; did you mean 'train'?"),
        (["train", "--steps", "-5"], 2, "'-5' is not a positive whole number"),
        (["train", "--sedes", "3"], 2, "--sedes"),
        (["train", "--seed", "42"], 2, "--seed; did you mean --seeds"),
        (["train", "--set", "seed=42"], 1, "here it is the argument 'seeds'"),
        (["sweep", "--seed=42"], 2, "--seed; did you mean --seeds"),
        (["train", "--steps", "200"], 1, "at least 251 are wanted"),
        (["train", "--algo", "sum"], 1, "'som'"),
        (["train", "--profile", "latpop"], 1, "'laptop'"),
        (["train", "--set", "widht=3"], 1, "'width'"),
        (["train", "--env", "HalfCheeta-v4"], 1, "HalfCheetah-v4"),
        (["train", "--env", "CartPole-v1"], 1, "Discrete"),
        (["resume", "nowhere"], 1, "nowhere"),
        (["evaluate", "nowhere"], 1, "nowhere"),
        (["render", "nowhere"], 1, "nowhere"),
        (["plot", "nowhere"], 1, "nowhere"),
    ],
)
def test_one_sentence(words, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, words, status)
    assert os.listdir(tmp_path) == []


def test_unwritable_folder(capsys, tmp_path):
    (tmp_path / "file").touch()
    out = str(tmp_path / "file" / "run")
    assert out in refused(capsys, command(*TRAIN, "--out", out))


def test_unknown_task_in_a_real_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "som", "train", "--env", "Hoper-v4"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert "Hopper-v4" in done.stderr and "Traceback" not in done.stderr


def test_defects_keep_their_traceback(monkeypatch):
    def defect(*_):
        raise KeyError("a bug")

    monkeypatch.setattr(command_line, "_plot", defect)
    with pytest.raises(KeyError):
        main(["plot", "x"])


# Training and what follows


def test_train_prints_what_to_do_next(run, capsys):
    assert main(command(*TRAIN, "--seeds", "2", "--out", str(run))) == 0
    text = capsys.readouterr().out
    assert "already finished" in text
    assert "seed 0" in text and "seed 1" in text and "mean" in text
    assert f"render {run} --out {run / 'policy.mp4'}" in text
    for name in ("learning_curve.png", "policy.npz", "record.json"):
        assert (run / name).stat().st_size > 0
        assert str(run / name) in text


def test_twice_trains_once(run, capsys):
    before = (run / "record.json").read_bytes(), (run / "policy.npz").read_bytes()
    assert main(command(*TRAIN, "--seeds", "2", "--out", str(run))) == 0
    assert before == (
        (run / "record.json").read_bytes(), (run / "policy.npz").read_bytes(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds", "1"], "seeds"),
        (["--seeds", "2", "--set", "rescale=25"], "rescale"),
        (["--seeds", "2", "--profile", "paper"], "profile"),
    ],
)
def test_another_run_in_the_folder_is_refused(run, capsys, words, message):
    before = (run / "record.json").read_bytes()
    text = refused(capsys, [*command(*TRAIN), *words, "--out", str(run)])
    assert message in text and "--out" in text
    assert before == (run / "record.json").read_bytes()


def test_the_same_words_continue_an_interrupted_run(run, tmp_path, capsys, monkeypatch):
    words = command(*TRAIN, "--seeds", "2", "--out", str(tmp_path))

    def interrupt(self, step, metrics):
        if step == 400:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressLine, "__call__", interrupt)
        assert main(words) == 130
    assert f"resume {tmp_path}" in capsys.readouterr().err
    assert main(words) == 0
    assert "continuing the unfinished run" in capsys.readouterr().out
    with np.load(run / "policy.npz") as one, np.load(tmp_path / "policy.npz") as two:
        assert one.files == two.files
        for name in one.files:
            np.testing.assert_array_equal(one[name], two[name])


def test_slices_until_the_run_is_done(run, tmp_path, capsys):
    words = command(*TRAIN, "--seeds", "2", "--out", str(tmp_path))
    for _ in range(20):
        assert main([*words, "--time-limit", "0.001"]) == 0
        text = capsys.readouterr().out
        if "the time is up" not in text:
            break
        assert f"resume {tmp_path}" in text
    with np.load(run / "policy.npz") as one, np.load(tmp_path / "policy.npz") as two:
        for name in one.files:
            np.testing.assert_array_equal(one[name], two[name])


def test_no_time_gets_one_sentence(tmp_path, capsys):
    words = command(*TRAIN, "--out", str(tmp_path / "run"), "--time-limit", "0")
    assert "time_limit is 0.0" in refused(capsys, words)


def test_evaluate(run, capsys):
    assert main(["evaluate", str(run), "--episodes", "3", "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert "3 episodes" in first and "95 % interval" in first
    assert main(["evaluate", str(run / "policy.npz"), "--episodes", "3", "--seed",
                 "1"]) == 0  # fmt: skip
    assert capsys.readouterr().out == first


def test_a_hint_can_be_typed_again_where_a_path_has_a_space(tmp_path, capsys):
    out = tmp_path / "my runs"
    words = command(*TRAIN, "--out", str(out), "--time-limit", "0.001")
    assert main(words) == 0
    assert f"resume '{out}'" in capsys.readouterr().out


def test_a_path_that_ascii_cannot_hold(tmp_path, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    words = command(*TRAIN, "--out", str(tmp_path / "läufe"))
    assert main([*words, "--time-limit", "0.001"]) == 0
    sys.stdout.flush()
    assert rb"l\xe4ufe" in raw.getvalue()


def test_a_closed_pipe_loses_nothing(tmp_path, capsys, monkeypatch):
    def closed(self, step, metrics):
        if step == 300:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(ProgressLine, "__call__", closed)
    monkeypatch.setattr(command_line.os, "dup2", lambda *_: None)
    assert main(command(*TRAIN, "--out", str(tmp_path))) == 141
    assert f"resume {tmp_path}" in capsys.readouterr().err
    assert read_metadata(tmp_path / "checkpoint.npz")["chunk"] == 6


def test_longer_from_the_shell(tmp_path, capsys):
    words = command("train", "--env", TASK, "--out", str(tmp_path))
    assert main([*words, "--steps", "300"]) == 0
    assert main([*words, "--steps", "400"]) == 0
    assert "goes on, to 400 steps" in capsys.readouterr().out
    assert main(["resume", str(tmp_path), "--steps", "500"]) == 0
    assert "return after 500 steps" in capsys.readouterr().out
    assert "has 500, and at least" in refused(
        capsys, ["resume", str(tmp_path), "--steps", "100"]
    )


def test_films_while_it_learns(tmp_path, monkeypatch):
    filmed = []
    monkeypatch.setattr(command_line, "film", lambda policy, path: filmed.append(path))
    words = command(*TRAIN, "--out", str(tmp_path), "--film-every", "250")
    assert main(words) == 0
    names = [path.name for path in filmed]
    assert names == ["50.mp4", "250.mp4", "500.mp4"]


def test_export(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), "--index", "1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"policy.onnx: som on {TASK}, ")
    scope = {"onnxruntime": onnxruntime, "observation": np.ones(11, np.float32)}
    *first, last = [line.strip() for line in text.splitlines()[2:]]
    exec("\n".join(first), scope)
    expected = load(run, 1)(np.ones(11), seed=0)
    np.testing.assert_allclose(eval(last, scope), expected, atol=1e-5)


def test_export_for_numpy_alone(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["export", str(run), "--out", "act.npz", "--candidates", "1"]
    assert main(words) == 0
    scope = {"observation": np.ones(11, np.float32)}
    *first, last = [x.strip() for x in capsys.readouterr().out.splitlines()[2:]]
    exec("\n".join(first), scope)
    expected = load(run).candidates(np.ones(11), 1, seed=0)[0]
    np.testing.assert_allclose(eval(last, scope), expected, atol=1e-5)


def test_export_refuses(run, tmp_path, capsys):
    before = (run / "policy.npz").read_bytes()
    for name in ("policy.npz", "policy.mp4"):
        refused(capsys, ["export", str(run), "--out", str(run / name)])
    assert (run / "policy.npz").read_bytes() == before
    assert not (run / "numpy_policy.py").exists()
    refused(capsys, ["export", str(run), "--index", "2"])
    refused(capsys, ["export", str(run), "--candidates", "0"], status=2)


def test_plot(run, tmp_path, capsys):
    out = tmp_path / "curve.png"
    assert main(["plot", str(run), str(run / "record.json"), "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "seed 1" in capsys.readouterr().out
    text = refused(capsys, ["plot", str(run), "--out", str(tmp_path / "curve.doc")])
    assert "png" in text


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_render(run, tmp_path, capsys, renderer, suffix):
    out = tmp_path / "new" / f"policy.{suffix}"
    words = ["render", str(run), "--out", str(out), "--width", "64", "--height", "48"]
    assert main([*words, "--seconds", "0.5"]) == 0
    frames = np.stack([frame[..., :3] for frame in imageio.get_reader(out)])
    assert frames.shape == (10, 48, 64, 3)  # 20 frames per second of the task
    assert frames.std() > 5 and np.abs(np.diff(frames.astype(int), axis=0)).max() > 5
    assert os.listdir(out.parent) == [out.name]


def test_render_whole_episodes(run, tmp_path, capsys, renderer):
    out = tmp_path / "policy.gif"
    words = ["render", str(run), "--out", str(out), "--width", "16", "--height", "16"]
    assert main([*words, "--episodes", "2"]) == 0
    returns = capsys.readouterr().out.splitlines()[-1].partition(": ")[2]
    assert len(returns.split(", ")) == 2


def test_sigterm_before_a_run_begins(tmp_path, capsys, monkeypatch):
    words = command(*TRAIN, "--out", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)

    def terminate(*args):
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_atomically", terminate)
        assert main(words) == 143
    assert "before the first checkpoint; nothing was saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert main(words) == 0


def test_render_refuses_before_it_draws(run, capsys, monkeypatch):
    monkeypatch.setattr(film, "choose_renderer", lambda: 1 / 0)
    for words in (["--out", "x.avi"], ["--width", "31"], ["--height", "8"],
                  ["--seconds", "0"]):  # fmt: skip
        refused(capsys, ["render", str(run), *words])


def test_ctrl_c_keeps_what_is_saved(tmp_path):
    out = tmp_path / "run"
    words = command("train", "--env", TASK, "--out", str(out))
    child = subprocess.Popen(
        [sys.executable, "-m", "som", *words, "--steps", "1e7", "--set", "warmup=9e6"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = child.stdout.readline()
        while "of 10,000,000 steps" not in line:
            assert line, child.stderr.read()
            line = child.stdout.readline()
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=300)
    finally:
        child.kill()
    assert child.returncode == 130, errors
    assert errors.count("som: interrupted") == 1 and "Traceback" not in errors
    assert f"resume {out}" in errors
    assert read_metadata(out / "checkpoint.npz")


# Tasks of one's own

OWN = """
import gymnasium as gym
from gymnasium.envs.classic_control import PendulumEnv


class Heavy(PendulumEnv):
    def step(self, action):
        if self.g == 13:
            raise OverflowError("too heavy")
        return super().step(action)


gym.register("Heavy-v0", entry_point=Heavy, max_episode_steps=20)
"""


def test_a_task_of_a_module_in_the_current_folder(tmp_path):
    """By the console script, whose folder is elsewhere; each command anew."""
    (tmp_path / "its_own.py").write_text(OWN)
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "start.py"
    script.write_text(
        "from som.training.command_line import main\nraise SystemExit(main())\n"
    )

    def som(*words):
        return subprocess.run(
            [sys.executable, str(script), *words],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip

    words = command("train", "--env", "its_own:Heavy-v0", "--steps", "200")
    done = som(*words, "--out", "run", "--env-kwargs", "g=9.0")
    assert done.returncode == 0, done.stderr
    record = read_record(tmp_path / "run" / "record.json")
    assert record["env"] == "its_own:Heavy-v0" and record["config"]["env"] == {"g": 9}
    done = som("evaluate", "run", "--episodes", "2")
    assert "its_own:Heavy-v0, 2 episodes" in done.stdout, done.stderr
    done = som(*words, "--out", "run")
    assert "env_kwargs is {'g': 9.0} there and {} here" in done.stderr
    done = som(*words, "--out", "other", "--env-kwargs", "g=13")
    place = tmp_path / "its_own.py"
    assert f"failed: OverflowError: too heavy ({place}, line 9); no checkpoint" in (
        done.stderr
    )


def test_assignment():
    assert assignment("g = 9.5") == ("g", 9.5)
    assert assignment("sizes=[1, 2]") == ("sizes", [1, 2])
    assert assignment("name=a=b") == ("name", "a=b")
    with pytest.raises(ValueError, match="'g' is not of the form field=value"):
        assignment("g")


# Studies


class Toy:
    """A study of two arms that only tells what it was asked."""

    arms = ("one", "two")

    def __init__(self, most_seeds=None):
        self.most_seeds = most_seeds

    def total(self, steps):
        return 2 * (steps or 50)

    def run(self, path, seeds, steps, progress, processes):
        progress(self.total(steps), "two")
        path.write_text(f"{list(seeds)} {steps} {processes}")


@pytest.mark.parametrize("backend, processes", [("cpu", 3), ("gpu", 1)])
def test_study_runs_one_or_all(tmp_path, capsys, monkeypatch, backend, processes):
    studies = {"a": Toy(), "b": Toy(), "c": Toy(most_seeds=1)}
    monkeypatch.setattr(command_line, "STUDIES", studies)
    monkeypatch.setattr(command_line.jax, "default_backend", lambda: backend)
    monkeypatch.setattr(command_line.os, "cpu_count", lambda: 3)
    out = ["--out", str(tmp_path)]
    assert main(["study", "b", "--seeds", "2", "--steps", "7", *out]) == 0
    assert (tmp_path / "b.json").read_text() == f"[0, 1] 7 {processes}"
    assert not (tmp_path / "a.json").exists()
    told = capsys.readouterr().out
    assert "b: 2 fits, 2 seeds each" in told and "14 of 14 steps  two" in told
    assert main(["study", "all", *out]) == 0
    whole = f"[0, 1, 2, 3, 4] None {processes}"
    assert (tmp_path / "a.json").read_text() == whole
    assert (tmp_path / "c.json").read_text() == f"[0] None {processes}"
    assert "c: 2 fits, 1 seeds each" in capsys.readouterr().out


def test_unknown_study_gets_the_nearest_name(capsys):
    assert main(["study", "two-moon"]) == 1
    assert "did you mean 'two-moons'?" in capsys.readouterr().err


def test_medians_are_of_the_right_call():
    times = medians({"slow": lambda: time.sleep(0.02), "quick": lambda: None}, 3)
    assert times["quick"] < 0.01 < times["slow"] < 1.0


# Benchmark


@pytest.fixture
def benchmarks(monkeypatch):
    """Two benchmarks that only tell what they were asked."""

    def machine(repeats):
        yield "one", {"a": float(repeats), "b": 1e-5}
        yield "two", {"c": 1234.5}

    def algorithms(repeats, names, profile):
        yield f"times, {profile}", {name: float(repeats) for name in names}

    both = {"machine": machine, "algorithms": algorithms}
    monkeypatch.setattr(command_line, "BENCHMARKS", both)


def test_benchmark_prints_and_records(benchmarks, tmp_path, capsys):
    path = tmp_path / "new" / "record.json"
    assert main(["benchmark", "--repeats", "3", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    for shown in ("medians of 3", "3.000", "1.0e-05", "1,23", f"written to {path}"):
        assert shown in text
    record = read_record(path)
    assert record["repeats"] == 3 and record["provenance"]["cores"] > 0
    assert record["tables"] == {"one": {"a": 3.0, "b": 1e-5}, "two": {"c": 1234.5}}


def test_benchmark_keeps_what_was_measured_before_a_failure(
    benchmarks, tmp_path, capsys, monkeypatch
):
    def fails(repeats):
        yield "one", {"a": 1.0}
        raise MemoryError("too large")

    monkeypatch.setitem(command_line.BENCHMARKS, "machine", fails)
    path = tmp_path / "record.json"
    assert main(["benchmark", "--json", str(path)]) == 1
    assert read_record(path)["tables"] == {"one": {"a": 1.0}}


@pytest.mark.parametrize(
    ("algos", "names"),
    [("som", {"som"}), ("mfp, som", {"mfp", "som"}), ("all", set(AGENTS))],
)
def test_benchmark_of_algorithms(benchmarks, tmp_path, algos, names):
    path = tmp_path / "record.json"
    assert main(["benchmark", "--algos", algos, "--json", str(path)]) == 0
    assert set(read_record(path)["tables"]["times, paper"]) == names
    command = [
        "benchmark",
        "--algos",
        "sac",
        "--profile",
        "laptop",
        "--json",
        str(path),
    ]
    assert main(command) == 0
    assert read_record(path)["tables"] == {"times, laptop": {"sac": 7.0}}


def test_benchmark_of_an_unknown_algorithm(benchmarks, capsys):
    assert "did you mean 'som'" in refused(capsys, ["benchmark", "--algos", "sum"])
    words = ["benchmark", "--algos", "mfp", "--profile", "sample-efficient"]
    assert "sample-efficient" in refused(capsys, words)
