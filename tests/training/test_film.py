"""A film of a policy: complete, or the old one."""

import os

import gymnasium as gym
import imageio.v2 as imageio
import mujoco
import numpy as np
import pytest

from som.training import environments, film
from som.training.environments import Task, TaskError


def test_nothing_can_draw(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(film, "_DRAW_NOTHING", "raise SystemExit(1)")
    with pytest.raises(ValueError, match=r"libegl1 and libgl1-mesa-dri.*libosmesa6"):
        film.choose_renderer()
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(ValueError, match="MUJOCO_GL=osmesa"):
        film.choose_renderer()


def test_failed_film_leaves_the_old_one(tmp_path, renderer):
    class Broken:
        task = "InvertedDoublePendulum-v4"

        def act(self, observation):
            raise OSError("No space left on device")

    out = tmp_path / "policy.gif"
    out.write_bytes(b"old")
    with pytest.raises(OSError, match="No space"):
        film.film(Broken(), out, width=16, height=16)
    assert out.read_bytes() == b"old" and os.listdir(tmp_path) == [out.name]


@pytest.mark.parametrize(
    ("name", "chosen", "camera"),
    [("HalfCheetah-v4", {}, 0), ("Reacher-v4", {}, -1),
     ("Ant-v4", {"camera_id": 0}, 0)],
)  # fmt: skip
def test_the_camera_follows_what_runs(name, chosen, camera, renderer):
    env = gym.make(name, render_mode="rgb_array", width=16, height=16, **chosen)
    film.track(env.unwrapped)
    assert env.unwrapped.mujoco_renderer.camera_id == camera
    env.close()


def test_a_robot_that_ran_away_is_in_the_picture(renderer):
    with environments.make("HalfCheetah-v4", 1, 0, picture=(64, 64)) as envs:
        film.choose_renderer()
        film.track(envs.env.unwrapped)
        envs.reset()
        near = envs.render()
        envs.env.unwrapped.data.qpos[0] = 30.0
        mujoco.mj_forward(envs.env.unwrapped.model, envs.env.unwrapped.data)
        far = envs.render()

    def orange(x):
        return np.mean((x[..., 0] > 1.3 * x[..., 2]) & (x[..., 0] > 80))

    assert orange(near) > 0.005 and orange(far) > 0.5 * orange(near)


class Screen(gym.Env):
    """Draws a grey that brightens with each step; has no end and no render_fps."""

    action_space = observation_space = gym.spaces.Box(-2, 2, (1,))
    open = 0

    def __init__(self, render_mode=None, nan_at=np.inf, wrong=False):
        self.render_mode, self.nan_at, self.wrong = render_mode, nan_at, wrong
        Screen.open += 1

    def reset(self, *, seed=None, options=None):
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        assert action == [-2]  # what the policy wants, in the task's units
        self.time += 1
        reward = np.nan if self.time == self.nan_at else 1.0
        return np.zeros(1, np.float32), reward, False, False, {}

    def render(self):
        return None if self.wrong else np.full((16, 16, 3), self.time % 250, np.uint8)

    def close(self):
        Screen.open -= 1


class Still:
    """Wants the least that there is."""

    def __init__(self, task):
        self.task = task

    def act(self, observation):
        return np.full((1, 1), -1.0)


@pytest.fixture(autouse=True)
def everything_is_closed():
    Screen.open = 0
    yield
    assert Screen.open == 0


def test_without_a_frame_rate_30_are_shown(tmp_path):
    path = tmp_path / "still.mp4"
    assert film.film(Still(Screen), path, seconds=0.5) == []
    with imageio.get_reader(path) as reader:
        assert reader.get_meta_data()["fps"] == 30
        assert sum(1 for _ in reader) == 15


def test_episodes_of_a_task_without_a_limit_end(tmp_path):
    short = Task(Screen, wrappers=[lambda env: gym.wrappers.TimeLimit(env, 40)])
    returns = film.film(Still(short), tmp_path / "a.gif", episodes=2)
    assert returns == [40, 40]
    frames = np.stack([f[..., 0] for f in imageio.get_reader(tmp_path / "a.gif")])
    np.testing.assert_array_equal(frames[:, 0, 0], [*range(40), *range(40)])
    assert film.film(Still(Screen), tmp_path / "b.gif", episodes=1) == [1000]


def test_what_is_wrong_with_a_task_is_told(tmp_path):
    path = tmp_path / "a.gif"
    with pytest.raises(TaskError, match=r"Screen\(\) returned .* not finite at step 3"):
        film.film(Still(Task(Screen, {"nan_at": 3})), path)
    with pytest.raises(TaskError, match=r"Screen\(\) drew \[\]: a picture"):
        film.film(Still(Task(Screen, {"wrong": True})), path)
    with pytest.raises(ValueError, match=r"draws nothing: .* not None$"):
        film.film(Still(lambda: Screen()), path)
    # Such a factory may draw all the same.
    film.film(Still(lambda: Screen("rgb_array")), path, seconds=0.1)
    assert os.listdir(tmp_path) == [path.name]


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pygame", None)
    with pytest.raises(
        TaskError, match=r"cannot draw Pendulum-v1: pygame .*gymnasium\["
    ):
        film.film(Still("Pendulum-v1"), tmp_path / "a.gif")
