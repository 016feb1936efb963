"""A film.

Exported by tools/export.py from book/training/film.md; edit the chapter.
"""

__all__ = [
    "choose_renderer",
    "track",
    "film",
]

# %% Imports
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import mujoco
import numpy as np
from gymnasium.envs.mujoco import MujocoEnv

from som.training import environments


# %% What can draw here
_DRAW_NOTHING = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco/>")
with mujoco.Renderer(model, 16, 16) as renderer:
    renderer.update_scene(mujoco.MjData(model))
    renderer.render()
"""


def choose_renderer() -> None:
    """Set MUJOCO_GL to a library that can draw without a screen.

    A value that is set already is the only one tried.

    Raises:
        ValueError: none works; the sentence names the Debian packages.
    """
    given = os.environ.get("MUJOCO_GL")
    screen = ["glfw"] if os.environ.get("DISPLAY") else []
    if sys.platform != "linux":
        return
    for name in [given] if given else ["egl", "osmesa", *screen]:
        child = subprocess.run(
            [sys.executable, "-c", _DRAW_NOTHING],
            env={**os.environ, "MUJOCO_GL": name},
            capture_output=True,
        )
        if child.returncode == 0:
            os.environ["MUJOCO_GL"] = name
            return
    raise ValueError(
        "nothing here can draw"
        + (f" with MUJOCO_GL={given}" if given else "")
        + ": install the Debian packages libegl1 and libgl1-mesa-dri (EGL), "
        "or libosmesa6 (OSMesa)."
    )


# %% A camera that comes along
def track(env: MujocoEnv) -> None:
    """Look through the model's camera `track`, if nothing else is chosen.

    Args:
        env: the task without wrappers, not drawn yet.
    """
    renderer, camera = env.mujoco_renderer, mujoco.mjtObj.mjOBJ_CAMERA
    if renderer.camera_id in (None, -1):
        renderer.camera_id = mujoco.mj_name2id(env.model, camera, "track")


# %% Frame by frame
def _frames(
    policy: Any,
    envs: Any,
    episodes: int,
    seconds: float,
    returns: list[float],
) -> Iterator[np.ndarray]:
    """Pictures of the policy at work; appends each finished return."""
    left = max(1, round(seconds * envs.fps))
    observation = envs.reset()
    while len(returns) < episodes if episodes else left > 0:
        yield envs.render()
        left -= 1
        step = envs.step(policy.act(observation))
        observation = step.observation
        if step.terminated[0] or step.truncated[0]:
            returns.append(float(step.episode_return[0]))


def film(
    policy: Any,
    path: str | Path,
    seconds: float = 10.0,
    episodes: int = 0,
    width: int = 480,
    height: int = 480,
    seed: int = 0,
    env: Any = None,
) -> list[float]:
    """Film a policy at the task's own speed.

    Args:
        policy: what `som.load` returns; its `act` and `task` are used.
        path: the film, ending in .mp4 or .gif.
        seconds: length in the task's own time, if `episodes` is 0.
        episodes: whole episodes to film, instead of seconds.
        width: of the picture, in pixels, even.
        height: of the picture, in pixels, even.
        seed: as in `evaluate`, of which the first episode is filmed.
        env: an id, factory or Task; None is the policy's own.

    Returns:
        The returns of the episodes that ended.

    Raises:
        ValueError: another ending, an odd size, or nothing can draw.
        environments.TaskError: the task fails, or draws no picture.
    """
    path = Path(path)
    options: dict[str, Any] = {
        ".mp4": {"macro_block_size": 2},
        ".gif": {"loop": 0},
    }
    if path.suffix not in options:
        raise ValueError(f"{path} must end in .mp4 or .gif.")
    if width < 16 or height < 16 or width % 2 or height % 2:
        raise ValueError(
            f"the picture is {width} x {height} pixels; both must be even "
            "and at least 16."
        )
    if not episodes and not 0 < seconds < float("inf"):
        raise ValueError(f"a film of {seconds} seconds cannot be made.")
    task = policy.task if env is None else env
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    returns: list[float] = []
    picture = width, height
    try:
        with environments.make(task, 1, seed, picture=picture) as envs:
            if isinstance(envs.env.unwrapped, MujocoEnv):
                choose_renderer()
                track(envs.env.unwrapped)
            path.parent.mkdir(parents=True, exist_ok=True)
            options[".gif"]["duration"] = 1000 / envs.fps
            options[".mp4"]["fps"] = envs.fps
            pictures = _frames(policy, envs, episodes, seconds, returns)
            kind = options[path.suffix]
            writer: Any = imageio.get_writer(unfinished, **kind)
            with writer:
                for frame in pictures:
                    writer.append_data(frame)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return returns
