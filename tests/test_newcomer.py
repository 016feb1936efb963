"""Ten things that a new user does, as that user does them.

A folder with a task of the user's own, the command `som` typed there, and a script
that is run there. What the commands and the script leave is what the tests look at.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from training.test_logs import read_events

ROOT = Path(__file__).resolve().parents[1]
SOM = Path(sys.executable).parent / "som"
SETTINGS = {
    "width": 32, "depth": 1, "batch_size": 32, "num_samples": 4, "num_particles": 4,
    "actor_lr": 2e-3, "critic_lr": 2e-3, "warmup": 200, "capacity": 40_000,
    "chunk_steps": 100, "evaluations": 2, "episodes": 3,
}  # fmt: skip
SET = [word for pair in SETTINGS.items() for word in ("--set", "{}={}".format(*pair))]

TASK = '''\
import gymnasium as gym
import numpy as np


class Mine(gym.Env):
    """Pull a weight on a spring to the point that costs least."""

    observation_space = gym.spaces.Box(-9, 9, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 3.0, (1,), np.float32)

    def __init__(self, gain=1.0):
        self.gain, self.steps = gain, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2)
        return np.float32(self.state), {}

    def step(self, action):
        assert self.action_space.contains(action)
        x, v = self.state
        v = 0.8 * v + 0.2 * (self.gain * float(action[0]) - x)
        self.state = np.clip([x + 0.4 * v, v], -9, 9)
        return np.float32(self.state), -abs(x - 0.5), False, False, {}


gym.register("Mine-v0", entry_point=Mine, max_episode_steps=20)
'''
FAULTY = TASK.replace("Mine", "Faulty").replace(
    "        x, v = self.state\n",
    "        self.steps += 1\n"
    "        x, v = self.state * (1 / (self.steps != 65))  # in a fourth episode\n",
)

SCRIPT = """\
import json
from functools import partial

import gymnasium as gym
import mytask
import numpy as np

import som
from som.training.policy import evaluate
from som.training.runs import EVALUATION_SEED

SETTINGS = json.load(open("settings.json"))
told = {}

# From Python: a class, wrappers and arguments instead of an id.
short = partial(gym.wrappers.TimeLimit, max_episode_steps=20)
half = partial(gym.wrappers.TransformReward, func=lambda reward: reward / 2)
run = som.train(
    env=mytask.Mine, wrappers=[short, half], env_kwargs={"gain": 2.0}, steps=400,
    out="runs/wrapped", **SETTINGS,
)
whole = partial(lambda: short(mytask.Mine(gain=2.0)))
told["wrapped"] = {
    "env": run.record["env"],
    "kwargs": run.record["config"]["env"],
    "half": run.record["curve"][-1]["returns"][0],
    "whole": evaluate(run.policy, whole, 3, EVALUATION_SEED).tolist(),
}

# Stop by a condition of one's own; the same call goes on.
seen = []


def enough(step, metrics):
    seen.append((step, sorted(metrics)))
    return step == 300


call = dict(env="mytask:Mine-v0", steps=600, out="runs/stopped", **SETTINGS)
told["stopped"] = len(som.train(progress=enough, **call).record["curve"])
told["seen"] = seen
told["going on"] = som.train(progress=False, **call).record["curve"][-1]["step"]

# The curve as columns.
told["curves"] = som.curves("runs/mine")

# A policy, its critic and its candidates; two files that leave JAX.
policy = som.load("runs/mine")
states = np.random.default_rng(0).uniform(-1, 1, (50, 2)).astype(np.float32)
np.save("states.npy", states)
np.save("actions.npy", policy(states, seed=0))
np.save("alone.npy", [policy(row, seed=0) for row in states])
choice = policy.candidates(states, SETTINGS["num_particles"], seed=0)
np.save("candidates.npy", choice)
np.save("values.npy", policy.q(states, choice))
np.save("stopped.npy", som.load("runs/stopped")(states, seed=0))
again = evaluate(policy, episodes=3, seed=EVALUATION_SEED)
told["policy"] = {"text": repr(policy), "returns": again.tolist()}
som.export(policy, "policy.onnx")
som.export(policy, "policy.npz")
json.dump(told, open("told.json", "w"))
"""

ELSEWHERE = """\
import sys
import numpy as np
from numpy_policy import act, load

arrays = load("policy.npz")
np.save("numpy.npy", [act(arrays, state) for state in np.load("states.npy")])
print({"jax", "som"} & set(sys.modules))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The user's folder: a task, settings, and nothing else."""
    path = tmp_path_factory.mktemp("newcomer")
    (path / "mytask.py").write_text(TASK)
    (path / "faulty.py").write_text(FAULTY)
    (path / "settings.json").write_text(json.dumps(SETTINGS))
    return path


def typed(folder, *words, path=ROOT):
    """What a command answers: its status, its lines, and its complaints."""
    env = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines(), done.stderr


def record_of(folder, run):
    return json.loads((folder / "runs" / run / "record.json").read_text())


@pytest.fixture(scope="module")
def trained(folder):
    """A run on the user's task from the shell, also told to TensorBoard."""
    words = "train", "--env", "mytask:Mine-v0", "--steps", "600", "--out", "runs/mine"
    status, lines, error = typed(folder, SOM, *words, "--log", "tensorboard", *SET)
    assert status == 0, error
    return lines


@pytest.fixture(scope="module")
def told(folder, trained):
    """What the user's script says, once the run from the shell is there."""
    status, _, error = typed(folder, sys.executable, "-c", SCRIPT)
    assert status == 0, error
    return json.loads((folder / "told.json").read_text())


def test_1_train_on_a_task_of_ones_own_from_the_shell(folder, trained):
    record = record_of(folder, "mine")
    assert record["env"] == "mytask:Mine-v0" and record["curve"][-1]["step"] == 600
    assert trained[0].startswith("som on mytask:Mine-v0, profile laptop, on ")
    assert "  return after 600 steps, 3 episodes each" in trained
    mean = np.mean(record["curve"][-1]["returns"])
    assert f"  seed 0    {mean:10.1f}" in trained
    assert -40 < mean < 0  # twenty steps, each of which costs less than two


def test_2_train_from_python_with_a_factory_and_wrappers(told):
    wrapped = told["wrapped"]
    assert wrapped["env"] == "TransformReward(TimeLimit(Mine()))"
    assert wrapped["kwargs"] == {"gain": 2.0}
    np.testing.assert_allclose(2 * np.array(wrapped["half"]), wrapped["whole"], 1e-5)


def test_3_a_mistake_is_shown_with_its_line_and_mended(folder):
    words = "train", "--env", "faulty:Faulty-v0", "--steps", "600", "--out", "runs/bad"
    saving = "--set", "checkpoint_seconds=1e-9"
    status, lines, error = typed(folder, SOM, *words, *saving, *SET)
    line = FAULTY[: FAULTY.index("!= 65")].count("\n") + 1
    assert status == 1 and "Traceback" not in error
    assert error.startswith("som: step of faulty:Faulty-v0 failed: ")
    assert f"ZeroDivisionError: division by zero ({folder}/faulty.py, line {line}); the"
    assert f"{folder}/faulty.py, line {line}" in error
    kept = f"{folder}/runs/bad/checkpoint.npz, of step 300.\n"
    assert error.endswith(f"checkpoint is {kept}")
    (folder / "faulty.py").write_text(TASK.replace("Mine", "Faulty"))
    status, lines, error = typed(folder, SOM, "resume", "runs/bad")
    assert status == 0, error
    assert lines[0] == "continuing the unfinished run in runs/bad."
    assert record_of(folder, "bad")["curve"][-1]["step"] == 600
    assert [p["first_step"] for p in record_of(folder, "bad")["slices"]] == [0, 300]


def test_4_a_finished_run_gets_longer(folder, told):
    before = record_of(folder, "stopped")["curve"]
    words = "resume", "runs/stopped", "--steps", "900"
    status, lines, error = typed(folder, SOM, *words)
    assert status == 0, error
    assert lines[0] == "the run in runs/stopped goes on, to 900 steps."
    after = record_of(folder, "stopped")["curve"]
    assert [point["step"] for point in after] == [300, 600, 900]
    assert after[:2] == before


def test_5_a_run_stops_when_progress_says_so(folder, told):
    assert [step for step, _ in told["seen"]] == [100, 200, 300]
    assert "evaluation/return" in told["seen"][2][1]
    assert "critic/loss" not in told["seen"][1][1]  # still warming up
    assert told["stopped"] == 1 and told["going on"] == 600
    # It has become the policy of the run that nothing stopped.
    actions = np.load(folder / "actions.npy")
    np.testing.assert_array_equal(np.load(folder / "stopped.npy"), actions)


def test_6_the_table_and_the_curve(folder, told):
    columns = told["curves"]
    assert (columns["step"], columns["seed"]) == ([300, 600], [0, 0])
    returns = [
        np.mean(point["returns"]) for point in record_of(folder, "mine")["curve"]
    ]
    assert columns["return"] == returns
    with open(folder / "runs/mine/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [f"{i}00" for i in range(1, 7)]
    for row, wanted in zip(rows[2::3], returns, strict=True):
        assert float(row["evaluation/return"]) == pytest.approx(wanted)
    loss = float(rows[-1]["critic/loss"])
    assert loss == pytest.approx(columns["critic/loss"][-1])


def test_7_what_a_policy_can_be_asked(folder, told):
    names = "actions", "alone", "candidates", "values"
    actions, alone, choice, values = (np.load(folder / f"{n}.npy") for n in names)
    assert told["policy"]["text"].startswith("<som policy for mytask:Mine-v0: ")
    assert (
        told["policy"]["returns"]
        == record_of(folder, "mine")["curve"][-1]["returns"][0]
    )
    np.testing.assert_allclose(actions, alone, atol=1e-5)
    best = np.take_along_axis(choice, values.argmax(0)[None, :, None], 0)[0]
    np.testing.assert_allclose(actions, best, atol=1e-5)
    assert choice.shape == (4, 50, 1) and values.shape == (4, 50)
    assert choice.min() >= -1 and 1 < choice.max() <= 3  # the task's own units


def test_8_a_policy_acts_where_jax_is_not(folder, told):
    status, lines, error = typed(folder, sys.executable, "-c", ELSEWHERE, path="")
    assert status == 0, error
    assert lines == ["set()"]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    graph = onnxruntime.InferenceSession(folder / "policy.onnx", options)
    states, actions = (np.load(folder / f"{n}.npy") for n in ("states", "actions"))
    for other in (
        graph.run(None, {"observation": states})[0],
        np.load(folder / "numpy.npy"),
    ):
        np.testing.assert_allclose(other, actions, atol=1e-5)


def test_9_tensorboard_shows_the_run(folder, trained):
    scalars, _ = read_events(folder / "runs/mine/tensorboard")
    with open(folder / "runs/mine/metrics.csv") as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file)}
    assert list(scalars) == list(rows)
    for name in ("critic/loss", "evaluation/return", "episode/return"):
        wanted = float(rows[600][name])
        assert scalars[600][f"{name}/seed_0"] == pytest.approx(wanted, rel=1e-6)


def test_10_an_agent_of_ones_own_passes_its_tests_and_trains(tmp_path, folder):
    """In a copy of the project, since making it changes the project."""
    for part in ("som", "tools", "tests", "book/baselines"):
        skip = shutil.ignore_patterns("__pycache__", "recordings")
        shutil.copytree(ROOT / part, tmp_path / part, ignore=skip)
    for name in ("_toc.yml", "pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    new = sys.executable, "tools/new.py", "agent", "climber"
    status, _, error = typed(tmp_path, *new, path=tmp_path)
    assert status == 0, error
    both = (
        "import sys, pytest; failed = pytest.main(sys.argv[1:3]);"
        "from som.training.command_line import main;"
        "sys.exit(failed or main(sys.argv[3:]))"
    )
    words = "train", "--algo", "climber", "--env", "Pendulum-v1", "--steps", "400"
    tiny = "--set", "warmup=200", "--set", "width=32", "--set", "episodes=1"
    status, lines, error = typed(
        tmp_path, sys.executable, "-c", both, "-q", "tests/baselines/test_climber.py",
        *words, *tiny, path=tmp_path,
    )  # fmt: skip
    assert status == 0, "\n".join(lines) + error
    assert any(" passed in " in line for line in lines)
    record = record_of(tmp_path, "Pendulum-v1-climber-laptop")
    assert record["algo"] == "climber" and record["curve"][-1]["updates"] > 0
