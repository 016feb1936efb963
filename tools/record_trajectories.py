"""Record the v4 tasks on MuJoCo 2.3.7: tests/training/recordings/<task>.npz.

MuJoCo 2.3.7 has wheels up to Python 3.11, so this runs in an environment of its own:

    python3.11 -m venv .venv-mujoco-2.3.7
    .venv-mujoco-2.3.7/bin/pip install mujoco==2.3.7 gymnasium==0.29.1 "numpy<2"
    .venv-mujoco-2.3.7/bin/python tools/record_trajectories.py

Random actions, each held for 10 steps so that the bodies move; a new episode where
one ends. Row k holds the state before step k (the constraint solver's warm start is
part of it), the action in [-1, 1], and what the step returned.
"""

import warnings
from collections import defaultdict
from pathlib import Path

import gymnasium as gym
import mujoco
import numpy as np

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "training" / "recordings"
STEPS, HOLD = 60, 10
# With seed 41 the arm of Pusher hits the object; elsewhere any seed does.
SEEDS = {
    "Ant": 0,
    "HalfCheetah": 0,
    "Hopper": 0,
    "Humanoid": 0,
    "Walker2d": 0,
    "Swimmer": 0,
    "InvertedDoublePendulum": 0,
    "Pusher": 41,
    "Reacher": 0,
}


def record(env_id, seed):
    """Play one task; return its arrays, one row a step."""
    env = gym.make(env_id).unwrapped
    low, high = env.action_space.low, env.action_space.high
    rng = np.random.default_rng(seed)
    rows = defaultdict(list)
    first = True
    for k in range(STEPS):
        if first:
            env.reset(seed=seed)
        if k % HOLD == 0:
            action = rng.uniform(-1, 1, low.size).astype(np.float32)
        row = {
            "seed": seed,
            "first": first,
            "action": action,
            "qpos": env.data.qpos.copy(),
            "qvel": env.data.qvel.copy(),
            "qacc_warmstart": env.data.qacc_warmstart.copy(),
        }
        observation, reward, terminated, _, _ = env.step(
            (high + low) / 2 + (high - low) / 2 * action
        )
        row |= {
            "next_qpos": env.data.qpos.copy(),
            "next_qvel": env.data.qvel.copy(),
            "observation": observation,
            "reward": reward,
            "terminated": terminated,
        }
        for name, value in row.items():
            rows[name].append(value)
        first = terminated
        seed += terminated
    return {name: np.array(values) for name, values in rows.items()}


if __name__ == "__main__":
    if mujoco.__version__ != "2.3.7":
        raise SystemExit(f"MuJoCo is {mujoco.__version__}: 2.3.7 is wanted")
    warnings.simplefilter("ignore", DeprecationWarning)
    FOLDER.mkdir(exist_ok=True)
    for task, seed in SEEDS.items():
        path = FOLDER / f"{task}-v4.npz"
        arrays = record(f"{task}-v4", seed)
        np.savez_compressed(path, mujoco=mujoco.__version__, **arrays)
        print(
            f"{path.name}: {arrays['first'].sum()} episodes, "
            f"{path.stat().st_size / 1000:.0f} kB"
        )
