"""A film.

Exported by tools/export.py from book/training/film.md; edit the chapter.
"""

__all__ = [
    "choose_renderer",
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


# %% Frame by frame
def _frames(
    policy: Any, env: Any, episodes: int, seconds: float, returns: list[float]
) -> Iterator[np.ndarray]:
    """Pictures of the policy at work; appends each finished return."""
    left = None
    if not episodes:
        left = max(1, round(seconds * env.metadata["render_fps"]))
    observation, total = env.reset()[0], 0.0
    while left is None or left > 0:
        yield env.render()
        left = None if left is None else left - 1
        action = policy(np.asarray(observation, np.float32))
        # The policy acts in the task's own units, as the inner task does.
        observation, reward, ended, cut, _ = env.env.step(action)
        total += float(reward)
        if ended or cut:
            returns.append(total)
            if left is None and len(returns) == episodes:
                return
            observation, total = env.reset()[0], 0.0


def film(
    policy: Any,
    path: str | Path,
    seconds: float = 10.0,
    episodes: int = 0,
    width: int = 480,
    height: int = 480,
    seed: int = 0,
) -> list[float]:
    """Film a policy at the task's own speed.

    Args:
        policy: what `som.load` returns.
        path: the film, ending in .mp4 or .gif.
        seconds: length in the task's own time, if `episodes` is 0.
        episodes: whole episodes to film, instead of seconds.
        width: of the picture, in pixels, even.
        height: of the picture, in pixels, even.
        seed: of the first episode.

    Returns:
        The returns of the episodes that ended.

    Raises:
        ValueError: another ending, an odd size, or nothing can draw.
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
    env = environments.render_env(policy.env_id, seed, width, height)
    if isinstance(env.unwrapped, MujocoEnv):
        choose_renderer()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    returns: list[float] = []
    try:
        fps = env.metadata["render_fps"]
        options[".gif"]["duration"] = 1000 / fps
        options[".mp4"]["fps"] = fps
        writer: Any = imageio.get_writer(unfinished, **options[path.suffix])
        with writer:
            for frame in _frames(policy, env, episodes, seconds, returns):
                writer.append_data(frame)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
        env.close()
    return returns
