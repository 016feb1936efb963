"""Recordings: episodes, mazes, their steering, sets of Minari, the command."""

import os
import subprocess
import sys

import numpy as np
import pytest

from som import load, train
from som.relatives import datasets
from som.relatives.datasets import (
    COPIES,
    DATA_SEED,
    MAZES,
    ROBOTS,
    BallMaze,
    Episode,
    Recipe,
    Uniform,
    Waypoints,
    content_hash,
    maze_test,
    next_cells,
    normalized_score,
    read_set,
    recipes,
    record,
    repeat,
    replayed,
    returns,
    stack_steps,
    training_command,
    write_set,
)
from som.training import environments
from som.training.command_line import main
from som.training.policy import evaluate


@pytest.fixture(scope="module")
def hopper():
    return record(Uniform(3), "Hopper-v4", 6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of two seeds, with an episode that the time limit cut."""
    out = tmp_path_factory.mktemp("run") / "cheetah"
    train(
        "sac", "InvertedDoublePendulum-v4", steps=400, seeds=2, out=out,
        progress=False, num_envs=2, chunk_steps=40, warmup=300, evaluations=1,
        episodes=1, width=8, batch_size=8, capacity=250,
    )  # fmt: skip
    return out


def fake(length=3, terminated=True, size=2, seed=0):
    rng = np.random.default_rng(seed)

    def numbers(*shape):
        return rng.normal(size=shape).astype(np.float32)

    action = rng.uniform(-1, 1, (length, size)).astype(np.float32)
    parts = numbers(length + 1, 4), action, numbers(length)
    return Episode(*parts, terminated, not terminated, seed)


# Episodes


def test_a_recording_is_what_happened(hopper):
    for episode in hopper[::3]:
        np.testing.assert_array_equal(repeat(episode, "Hopper-v4"), episode.observation)
        assert episode.terminated and not episode.truncated
        assert len(episode.observation) == len(episode.action) + 1


def test_a_recording_has_the_returns_of_an_evaluation(run):
    policy = load(run)
    episodes = record(policy, policy.task, 3)
    expected = evaluate(policy, episodes=3, seed=DATA_SEED)
    np.testing.assert_allclose(returns(episodes), expected, rtol=1e-6)


def test_more_episodes_than_copies_are_as_many_from_each(monkeypatch):
    monkeypatch.setattr(datasets, "COPIES", 2)
    told = []
    five = record(Uniform(3), "Hopper-v4", 5, progress=told.append)
    assert len(five) == 5 and told[-1] == 5 and told == sorted(told)
    for episode in five:
        np.testing.assert_array_equal(repeat(episode, "Hopper-v4"), episode.observation)
    assert len({e.seed for e in five}) == 5
    assert COPIES == 100


def test_a_time_limit_is_no_end():
    class Short(environments.gym.Wrapper):
        def step(self, action):
            *rest, info = self.env.step(action)
            return rest[0], 1.0, False, False, info

    task = environments.Task("Hopper-v4", wrappers=(Short,))
    (episode,) = record(Uniform(3), task, 1)
    assert len(episode.reward) == 1000 == returns([episode])[0]
    assert episode.truncated and not episode.terminated


def test_actions_are_in_the_units_of_the_task():
    (episode,) = record(Uniform(7), "Pusher-v4", 1)
    assert np.abs(episode.action).max() > 1.5
    steps = stack_steps([episode], -2 * np.ones(7), 2 * np.ones(7))
    np.testing.assert_allclose(steps.action, episode.action / 2, atol=1e-6)


def test_same_seed_same_hash(hopper):
    again = record(Uniform(3), "Hopper-v4", 6)
    other = record(Uniform(3), "Hopper-v4", 6, seed=1)
    assert content_hash(again) == content_hash(hopper) != content_hash(other)
    changed = [hopper[0]._replace(terminated=False), *hopper[1:]]
    assert content_hash(changed) != content_hash(hopper)


@pytest.mark.parametrize("index", [0, 1])
def test_the_replay_of_a_run(run, index):
    episodes = replayed(run, index)
    lengths = [len(e.reward) for e in episodes]
    assert sum(lengths) == 250 + 40  # the capacity, and the last chunk
    task = "InvertedDoublePendulum-v4"
    assert all(e.terminated != e.truncated for e in episodes)
    assert sum(e.truncated for e in episodes) == 2
    one = environments.make_one(task)
    for episode in episodes:
        assert episode.seed is None
        assert one.observation_space.shape == episode.observation[0].shape
    with pytest.raises(ValueError, match="seed is None"):
        repeat(episodes[0], task)


def test_the_replay_of_nobody(run, tmp_path):
    with pytest.raises(ValueError, match="no record at"):
        replayed(tmp_path)
    with pytest.raises(ValueError, match=r"has 2 seed\(s\)"):
        replayed(run, 2)


def test_steps_lie_side_by_side():
    episodes = [fake(3), fake(1, False, seed=1), fake(2, seed=2)]
    steps = stack_steps(episodes, -np.ones(2), np.ones(2))
    np.testing.assert_array_equal(steps.first, [0, 3, 4])
    np.testing.assert_array_equal(steps.time, [0, 1, 2, 0, 0, 1])
    np.testing.assert_array_equal(steps.terminated, [0, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(steps.truncated, [0, 0, 0, 1, 0, 0])
    np.testing.assert_array_equal(steps.next_observation[2], episodes[0].observation[3])
    np.testing.assert_array_equal(steps.observation[4], episodes[2].observation[0])
    with pytest.raises(ValueError, match="no episodes"):
        stack_steps([], -1, 1)
    with pytest.raises(ValueError, match="episodes is 0"):
        record(Uniform(3), "Hopper-v4", 0)


# Mazes


def test_ways_in_a_small_maze():
    free = np.array([list("..#"), list("#.."), list("#.#")]) != "#"
    nearer = next_cells(free)
    assert nearer[1, 2, 0, 0].tolist() == [0, 1]
    assert nearer[1, 2, 0, 1].tolist() == [1, 1]
    assert nearer[1, 2, 2, 1].tolist() == [1, 1]
    assert nearer[1, 2, 1, 2].tolist() == [1, 2]
    assert nearer[1, 2, 2, 0].tolist() == [2, 0]  # a wall


@pytest.mark.parametrize("name", MAZES)
def test_cells_are_where_gymnasium_has_them(name):
    one = BallMaze(name)
    maze, theirs = MAZES[name], one.env.maze
    for cell in np.argwhere(maze.free):
        place = theirs.cell_rowcol_to_xy(cell)
        np.testing.assert_allclose(maze.centre(cell), place)
        assert (
            maze.cell(place + 0.3).tolist()
            == theirs.cell_xy_to_rowcol(place + 0.3).tolist()
        )


def test_the_steering_reaches_its_goals():
    (episode,) = record(Waypoints("MazeU-v0"), "MazeU-v0", 1)
    goals = episode.observation[:, 4:]
    new = np.flatnonzero((np.diff(goals, axis=0) != 0).any(-1))
    assert len(new) >= 2
    # Gymnasium shows the next goal one step after the arrival.
    gap = np.linalg.norm(episode.observation[new, :2] - goals[new], axis=-1)
    assert (gap <= 0.45 + 1e-6).all()
    assert episode.reward[new - 1].tolist() == [1.0] * len(new)
    np.testing.assert_array_equal(repeat(episode, "MazeU-v0"), episode.observation)


def test_the_test_of_a_maze_has_one_goal():
    (episode,) = record(Waypoints("MazeU-v0"), maze_test("MazeU-v0"), 1)
    goal = MAZES["MazeU-v0"].centre(MAZES["MazeU-v0"].goal)
    np.testing.assert_allclose(
        episode.observation[:, 4:], np.tile(goal, (301, 1)), atol=1e-6
    )
    assert returns([episode])[0] > 100 and episode.truncated
    with pytest.raises(ValueError, match=r"goal is \(0, 0\); a free cell"):
        BallMaze("MazeU-v0", goal=(0, 0))
    with pytest.raises(ValueError, match="unknown maze 'MazeU-v1'"):
        BallMaze("MazeU-v1")


def test_a_maze_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    BallMaze("MazeU-v0").close()
    assert list(tmp_path.iterdir()) == []


def test_scores():
    assert normalized_score("Hopper-v4", 3234.3) == pytest.approx(100)
    assert normalized_score("Hopper-v5", -20.27) == pytest.approx(0)
    with pytest.raises(ValueError, match="Ant-v4 has no reference scores"):
        normalized_score("Ant-v4", 1.0)


# Sets


def test_a_set_comes_back_to_the_bit(hopper, tmp_path):
    mine = [hopper[0]._replace(seed=None), *hopper[1:]]
    digest = write_set("som/a/b-v0", mine, "Hopper-v4", "uniform", {"x": 1}, tmp_path)
    back = read_set("som/a/b-v0", tmp_path)
    assert back.hash == digest == content_hash(mine) and back.recipe == {"x": 1}
    assert (back.task.name, back.algorithm) == ("Hopper-v4", "uniform")
    for one, other in zip(mine, back.episodes, strict=True):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(x, y)
    steps = back.steps(slice(2))
    assert len(steps.first) == 2 and steps.terminated.sum() == 2
    assert datasets.ROOT not in os.environ
    assert not (tmp_path / ".unfinished").exists()


def test_a_set_is_refused(hopper, tmp_path):
    def write(name, which):
        write_set(name, which, "Hopper-v4", "u", root=tmp_path)

    write("x-v0", hopper[:1])
    with pytest.raises(ValueError, match="the set x-v0 exists"):
        write("x-v0", hopper[:1])
    with pytest.raises(ValueError, match="no name of a set; one such as som/"):
        write("no name", hopper[:1])
    with pytest.raises(ValueError, match="x-v1 has no episodes"):
        write("x-v1", [])
    with pytest.raises(ValueError, match=r"no set x-v1 in .* \(there: x-v0\)"):
        read_set("x-v1", tmp_path)


def test_a_damaged_set_is_refused(hopper, tmp_path):
    import h5py

    write_set("x-v0", hopper[:1], "Hopper-v4", "u", root=tmp_path)
    with h5py.File(tmp_path / "x-v0/data/main_data.hdf5", "a") as file:
        file["episode_0/rewards"][0] += 1
    with pytest.raises(ValueError, match="x-v0 is damaged"):
        read_set("x-v0", tmp_path)


def test_half_a_set_is_no_set(hopper, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_set("x-v0", hopper[:1], "Hopper-v4", "u", root=tmp_path)
    monkeypatch.undo()
    assert not (tmp_path / "x-v0").exists()
    write_set("x-v0", hopper[:1], "Hopper-v4", "u", root=tmp_path)
    assert len(read_set("x-v0", tmp_path).episodes) == 1


def test_what_is_missing_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ValueError, match=r"minari is not .* 'som\[relatives\]'`"):
        read_set("x-v0", tmp_path)
    assert main(["dataset", "all", "--root", str(tmp_path)]) == 1
    assert "pip install" in capsys.readouterr().err
    name = "gymnasium_robotics.envs.maze.point_maze"
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ValueError, match="gymnasium-robotics is not installed"):
        BallMaze("MazeU-v0")


def test_importing_som_needs_none_of_it():
    code = (
        "import sys, som; wrong = {'minari', 'h5py', 'gymnasium_robotics'} & "
        "set(sys.modules); assert not wrong, wrong"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The command


def test_the_command(run, tmp_path, capsys):
    root = ["--root", str(tmp_path)]
    made = ["--episodes", "2", "--out", "som/ip/medium-v0"]
    assert main(["dataset", str(run), *made, *root]) == 0
    first = capsys.readouterr().out
    assert "sac on InvertedDoublePendulum-v4" in first and "hash" in first
    assert main(["dataset", str(run), *made, *root]) == 0  # it is there
    assert first.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]
    mixed = ["som/ip/medium-v0", f"replay:{run}", "--out", "som/ip/both-v0"]
    assert main(["dataset", *mixed, *root]) == 0
    both = read_set("som/ip/both-v0", tmp_path)
    assert both.algorithm == "sac and replay of sac"
    assert len(both.episodes) == 2 + len(replayed(run))
    uniform = ["uniform", "--env", "InvertedDoublePendulum-v4", "--episodes", "1"]
    assert main(["dataset", *uniform, "--out", "u-v0", *root]) == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["uniform", "--episodes", "2", "--out", "x-v0"], "knows no task: --env"),
        (["nobody", "--episodes", "2", "--out", "x-v0"], "nobody is no run folder"),
        (["uniform", "--env", "Hopper-v4", "--out", "x-v0"], "--episodes is wanted"),
        (["uniform", "--env", "Hopper-v4"], "no name was given: --out"),
        (
            ["uniform", "--env", "Hopper-v4", "--episodes", "1,2", "--out", "x-v0"],
            "1 sources and 2 numbers",
        ),
        (
            ["waypoints", "--env", "Hopper-v4", "--episodes", "1", "--out", "x-v0"],
            "unknown maze 'Hopper-v4'",
        ),
        (["uniform", "--episodes", "two"], "'two' is not a positive whole number"),
    ],
)
def test_the_command_says_what_is_wrong(words, sentence, tmp_path, capsys):
    assert main(["dataset", *words, "--root", str(tmp_path)]) in (1, 2)
    assert sentence in capsys.readouterr().err


def test_a_name_that_means_another_set(hopper, tmp_path, capsys):
    write_set("x-v0", hopper[:1], "Hopper-v4", "u", {"seed": 9}, tmp_path)
    words = "dataset uniform --env Hopper-v4 --episodes 1 --out x-v0 --root"
    assert main([*words.split(), str(tmp_path)]) == 1
    assert "exists and was made of" in capsys.readouterr().err
    words = "dataset x-v0 uniform --env Walker2d-v4 --episodes 1 --out y-v0 --root"
    assert main([*words.split(), str(tmp_path)]) == 1
    assert "one task is wanted" in capsys.readouterr().err


def test_all_sets_but_those_of_missing_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "ROBOTS", {"Hopper-v4": (2, 600)})
    few = {k: r._replace(episodes=(1,)) for k, r in recipes("runs").items()
           if "maze" in k}  # fmt: skip
    whole = recipes("runs") | few
    assert len(whole) == 5 + len(MAZES)
    monkeypatch.setattr(datasets, "recipes", lambda runs: whole)
    words = ["dataset", "all", "--root", str(tmp_path), "--runs", "runs"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert training_command("Hopper-v4", "medium", "runs") in said.out
    assert "4 of 7 sets want 2 runs" in said.err
    assert len(read_set("som/hopper/random-v0", tmp_path).episodes) == 2
    assert len(read_set("som/maze-u/tours-v0", tmp_path).episodes) == 1


def test_the_recipes_make_five_sets_of_each_robot():
    named = recipes("runs/x")
    assert len(named) == 5 * len(ROBOTS) + len(MAZES)
    assert named["som/hopper/medium-replay-v0"] == Recipe(
        ("replay:runs/x/Hopper-v4-medium",), (0,)
    )
    for name, recipe in named.items():  # a mixture comes after its parts
        earlier = list(named)[: list(named).index(name)]
        assert all(s in earlier for s in recipe.sources if s.startswith("som/"))
