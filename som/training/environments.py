"""Environments.

Exported by tools/export.py from book/training/environments.md; edit the chapter.
"""

__all__ = [
    "TASKS",
    "rescale",
    "restore_physics",
    "restore_object",
    "Pusher",
    "make_one",
    "Fields",
    "Rules",
    "RULES",
    "Step",
    "Plain",
    "Batched",
    "Environments",
    "make",
    "render_env",
]

import copy
import difflib
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import gymnasium as gym
import mujoco
import numpy as np
import numpy.typing as npt
from gymnasium.envs.mujoco import MujocoEnv
from gymnasium.envs.mujoco.pusher_v4 import (
    DEFAULT_CAMERA_CONFIG,
    PusherEnv,
)
from jaxtyping import Bool, Float, Int
from mujoco.batch import Batch


# %% The tasks
TASKS = (
    "Ant-v4",
    "HalfCheetah-v4",
    "Hopper-v4",
    "Humanoid-v4",
    "Walker2d-v4",
    "Swimmer-v4",
    "InvertedDoublePendulum-v4",
    "Pusher-v4",
    "Reacher-v4",
)
"""The nine tasks of the paper."""


def rescale(
    action: Float[np.ndarray, "*E A"],
    low: Float[np.ndarray, " A"],
    high: Float[np.ndarray, " A"],
) -> Float[np.ndarray, "*E A"]:
    """Map actions in [-1, 1] to the task's box, Equation (eq-rescale).

    Args:
        action: `[..., A]` in [-1, 1]; one outside counts as the nearest
            inside.
        low: lower bounds `[A]`, in the task's units.
        high: upper bounds `[A]`, in the task's units.

    Returns:
        Actions `[..., A]` in the task's units.
    """
    return (high + low) / 2 + (high - low) / 2 * np.clip(action, -1, 1)


# %% Why simulators drift
def restore_physics(task: MujocoEnv) -> None:
    """Give a v4 task, in place, the contacts and resets of MuJoCo 2.3.7.

    Equation (eq-margin) of the chapter, and the two habits of the old reset.

    Args:
        task: an unwrapped environment whose id ends in -v4, just made.
    """
    model, data = task.model, task.data
    version = tuple(int(n) for n in mujoco.__version__.split(".")[:2])
    if version >= (3, 5):
        model.geom_margin *= 0.5

    def set_state(qpos, qvel):
        qpos = np.array(qpos)
        mujoco.mj_normalizeQuat(model, qpos)
        type(task).set_state(task, qpos, qvel)
        data.qacc_warmstart[:] = data.qacc

    task.set_state = set_state  # type: ignore[method-assign]


def restore_object(model: mujoco.MjModel) -> None:
    """Let the object of Pusher-v4 move as in MuJoCo 2.3.7, in place.

    Equation (eq-invweight) of the chapter, and the older collision finder.

    Args:
        model: the compiled model of Pusher-v4.
    """
    model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_NATIVECCD
    for name in ("object", "goal"):
        body = model.body(name)
        dofs = slice(body.dofadr[0], body.dofadr[0] + body.dofnum[0])
        inertia = model.dof_armature[dofs] + body.mass
        model.dof_invweight0[dofs] = 1 / inertia
        model.body_invweight0[body.id, 0] = (2 / 3) / inertia[0]


class Pusher(PusherEnv):
    """Gymnasium's Pusher-v4 without its refusal of MuJoCo 3."""

    def __init__(self, **kwargs):
        space = gym.spaces.Box(-np.inf, np.inf, (23,), np.float64)
        MujocoEnv.__init__(
            self,
            "pusher.xml",
            5,
            space,
            default_camera_config=DEFAULT_CAMERA_CONFIG,
            **kwargs,
        )


def make_one(env_id: str, paper_physics: bool = True, **kwargs) -> gym.Env:
    """Make one Gymnasium environment; v4 tasks get the paper's physics.

    Args:
        env_id: a Gymnasium id, such as "Ant-v4".
        paper_physics: False leaves MuJoCo's physics as installed.
        **kwargs: passed on to `gymnasium.make`.

    Returns:
        The environment, with actions in the task's own units.

    Raises:
        ValueError: an unknown id, or a task that cannot be made here.
    """
    spec = copy.copy(_find(env_id))
    if env_id == "Pusher-v4":
        spec.entry_point = Pusher
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is out of date")
            env = gym.make(spec, disable_env_checker=True, **kwargs)
    except (gym.error.Error, ImportError) as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"cannot make {env_id!r}: {reason}") from error
    finally:
        mujoco.set_mju_user_warning(handler)
    task: Any = env.unwrapped
    v4 = isinstance(task, MujocoEnv) and env_id.endswith("-v4")
    if paper_physics and v4:
        restore_physics(task)
        if env_id == "Pusher-v4":
            restore_object(task.model)
    return env


def _find(env_id):
    """Return the specification of an id, or name the nearest known one."""
    try:
        return gym.spec(env_id)
    except (gym.error.Error, ImportError) as error:
        match = difflib.get_close_matches
        near = match(env_id, TASKS, 1) or match(env_id, gym.registry, 1, 0)
        raise ValueError(
            f"{env_id!r} is no Gymnasium task: did you mean {near[0]!r}?"
        ) from error


# %% The rules of the nine tasks
Fields = Mapping[str, np.ndarray]
"""Fields of MjData by name, one row an environment: `[E, ...]`."""


class Rules(NamedTuple):
    """A task's observation, reward and end, for all environments at once."""

    observe: Callable[[Fields], np.ndarray]
    """Of the fields after a step: observations `[E, O]`."""
    reward: Callable[[Fields, Fields, np.ndarray, float], np.ndarray]
    """Of the fields before and after, actions, seconds a step: `[E]`."""
    healthy: Callable[[Fields], np.ndarray] | None = None
    """Of the fields after: False where the episode terminates."""
    derived: tuple[str, ...] = ()
    """The fields beside `qpos` and `qvel` that the functions read."""


def _join(*parts):
    return np.concatenate(parts, axis=1)


def _joints(skip, limit=np.inf):
    """Observe positions but the first `skip`, and clipped velocities."""
    return lambda d: _join(
        d["qpos"][:, skip:], np.clip(d["qvel"], -limit, limit)
    )


def _cost(action):
    return np.sum(np.square(action), axis=1)


def _speed(alive, weight, x=lambda d: d["qpos"][:, 0]):
    """Reward speed along x, being alive, and small actions."""

    def reward(before, after, action, dt):
        return (x(after) - x(before)) / dt + alive - weight * _cost(action)

    return reward


def _ant_healthy(d):
    z = d["qpos"][:, 2]
    finite = np.isfinite(_join(d["qpos"], d["qvel"])).all(1)
    return finite & (z >= 0.2) & (z <= 1.0)


def _hopper_healthy(d):
    z, tilt = d["qpos"][:, 1], d["qpos"][:, 2]
    bounded = np.abs(_join(d["qpos"][:, 2:], d["qvel"])) < 100
    return bounded.all(1) & (z > 0.7) & (np.abs(tilt) < 0.2)


def _walker_healthy(d):
    z, tilt = d["qpos"][:, 1], d["qpos"][:, 2]
    return (z > 0.8) & (z < 2.0) & (np.abs(tilt) < 1.0)


def _pendulum_observe(d):
    angles = d["qpos"][:, 1:]
    return _join(
        d["qpos"][:, :1],
        np.sin(angles),
        np.cos(angles),
        np.clip(d["qvel"], -10, 10),
        np.clip(d["qfrc_constraint"], -10, 10),
    )


def _pendulum_reward(before, after, action, dt):
    x, y = after["site_xpos"][:, 0, 0], after["site_xpos"][:, 0, 2]
    v1, v2 = after["qvel"][:, 1], after["qvel"][:, 2]
    distance = 0.01 * x**2 + (y - 2) ** 2
    return 10 - distance - (1e-3 * v1**2 + 5e-3 * v2**2)


_FINGERTIP, _TARGET = 3, 4  # bodies of reacher.xml
_TIPS_ARM, _OBJECT, _GOAL = 10, 11, 12  # bodies of pusher.xml


def _distance(d, i, j):
    gap = d["xpos"][:, i] - d["xpos"][:, j]
    return np.sqrt(np.vecdot(gap, gap))


def _reacher_observe(d):
    angles = d["qpos"][:, :2]
    gap = d["xpos"][:, _FINGERTIP] - d["xpos"][:, _TARGET]
    state = d["qpos"][:, 2:], d["qvel"][:, :2]
    return _join(np.cos(angles), np.sin(angles), *state, gap)


def _reacher_reward(before, after, action, dt):
    return -_distance(before, _FINGERTIP, _TARGET) - _cost(action)


def _pusher_observe(d):
    bodies = [d["xpos"][:, i] for i in (_TIPS_ARM, _OBJECT, _GOAL)]
    return _join(d["qpos"][:, :7], d["qvel"][:, :7], *bodies)


def _pusher_reward(before, after, action, dt):
    near = _distance(before, _OBJECT, _TIPS_ARM)
    far = _distance(before, _OBJECT, _GOAL)
    return -far - 0.1 * _cost(action) - 0.5 * near


RULES = {
    "Ant-v4": Rules(
        _joints(2),
        _speed(1.0, 0.5, x=lambda d: d["xpos"][:, 1, 0]),
        _ant_healthy,
        ("xpos",),
    ),
    "HalfCheetah-v4": Rules(_joints(1), _speed(0.0, 0.1)),
    "Hopper-v4": Rules(_joints(1, 10), _speed(1.0, 1e-3), _hopper_healthy),
    "Walker2d-v4": Rules(_joints(1, 10), _speed(1.0, 1e-3), _walker_healthy),
    "Swimmer-v4": Rules(_joints(2), _speed(0.0, 1e-4)),
    "InvertedDoublePendulum-v4": Rules(
        _pendulum_observe,
        _pendulum_reward,
        lambda d: d["site_xpos"][:, 0, 2] > 1,
        ("site_xpos", "qfrc_constraint"),
    ),
    "Pusher-v4": Rules(_pusher_observe, _pusher_reward, None, ("xpos",)),
    "Reacher-v4": Rules(_reacher_observe, _reacher_reward, None, ("xpos",)),
}
"""The tasks that step in a batch."""


# %% Two ways for an episode to end
class Step(NamedTuple):
    """What one step of every environment returned; fresh arrays."""

    observation: Float[np.ndarray, "E O"]
    """To act on next: the first of a new episode where one has ended."""
    reward: Float[np.ndarray, " E"]
    """The task's own reward, unscaled."""
    terminated: Bool[np.ndarray, " E"]
    """The task reached an end: no value follows."""
    truncated: Bool[np.ndarray, " E"]
    """The time limit cut the episode: its value goes on."""
    next_observation: Float[np.ndarray, "E O"]
    """The true successor, also where the episode ended."""
    episode_return: Float[np.ndarray, " E"]
    """Sum of the rewards of an episode that ended, else nan."""
    episode_length: Int[np.ndarray, " E"]
    """Steps so far in the episode, this one included."""


# %% Stepping many at once
class Plain:
    """An engine of separate Gymnasium environments, for any task.

    Args:
        env_id: the task.
        num_envs: number of copies, `E`.
        threads: most threads to use; tasks other than MuJoCo's use one.
    """

    def __init__(self, env_id: str, num_envs: int, threads: int):
        self.envs = [make_one(env_id) for _ in range(num_envs)]
        self.env = self.envs[0]
        mujoco_task = isinstance(self.env.unwrapped, MujocoEnv)
        self._threads = min(threads, num_envs) if mujoco_task else 1
        self._pool = ThreadPoolExecutor(self._threads)

    def reset(self, i: int, seed: int) -> np.ndarray:
        """Begin an episode in copy i; return its observation `[O]`."""
        return self.envs[i].reset(seed=seed)[0]

    def step(self, ids: np.ndarray, actions: np.ndarray) -> tuple:
        """Step the copies `ids` by actions `[n, A]` in the task's units.

        Returns:
            Observations `[n, O]`, rewards, terminated and truncated `[n]`.
        """
        n = min(self._threads, len(ids))

        def run(k):
            pairs = zip(ids[k::n], actions[k::n], strict=True)
            return [self.envs[i].step(action)[:4] for i, action in pairs]

        parts = list((self._pool.map if n > 1 else map)(run, range(n)))
        rows = [parts[j % n][j // n] for j in range(len(ids))]
        return tuple(np.array(x) for x in zip(*rows, strict=True))


class Batched:
    """An engine with all copies in one `mujoco.batch.Batch`.

    Args:
        env_id: one of `RULES`.
        num_envs: number of copies, `E`.
        threads: most threads to use.
    """

    def __init__(self, env_id: str, num_envs: int, threads: int):
        self.env = make_one(env_id)
        task: Any = self.env.unwrapped
        self._task, self._rules = task, RULES[env_id]
        self._batch = Batch(task.model, num_envs, min(threads, num_envs))
        names = ("qpos", "qvel", *self._rules.derived)
        self._fields = {name: self._batch.bind(name) for name in names}
        self._last = {k: v.copy() for k, v in self._fields.items()}

    def reset(self, i: int, seed: int) -> np.ndarray:
        """Begin an episode in copy i; return its observation `[O]`."""
        observation = self.env.reset(seed=seed)[0]
        data, row = self._task.data, self._batch.state[i]
        everything = mujoco.mjtState.mjSTATE_INTEGRATION
        mujoco.mj_getState(self._task.model, data, row, everything)
        for name, value in self._last.items():
            value[i] = getattr(data, name)
        return observation

    def step(self, ids: np.ndarray, actions: np.ndarray) -> tuple:
        """Step the copies `ids` by actions `[n, A]` in the task's units.

        Returns:
            Observations `[n, O]`, rewards, terminated and truncated `[n]`.
        """
        self._batch.ctrl[ids] = actions
        self._batch.step(ids, nstep=self._task.frame_skip)
        before = {k: v[ids] for k, v in self._last.items()}
        after = {k: v[ids] for k, v in self._fields.items()}
        for name, value in after.items():
            self._last[name][ids] = value
        observe, reward, healthy, _ = self._rules
        rewards = reward(before, after, actions, self._task.dt)
        never = np.zeros(len(ids), bool)
        terminated = never if healthy is None else ~healthy(after)
        return observe(after), rewards, terminated, never


class Environments:
    """Copies of one task, stepped together; `make` makes them.

    Args:
        env_id: the task.
        engine: what moves the simulations.
        num_envs: number of copies, `E`.
        seed: non-negative integer from which every episode's seed derives.
    """

    def __init__(
        self, env_id: str, engine: Plain | Batched, num_envs: int, seed: int
    ):
        env: Any = engine.env
        space = env.action_space
        _check_spaces(env_id, space, env.observation_space)
        self.env_id, self.num_envs, self.seed = env_id, num_envs, seed
        self.observation_size = env.observation_space.shape[0]
        self.action_size = space.shape[0]
        self.action_low, self.action_high = space.low, space.high
        self.max_episode_steps = env.spec.max_episode_steps or 1000
        self._engine = engine
        self._episode = np.full(num_envs, -1)
        self._length = np.zeros(num_envs, int)
        self._return = np.zeros(num_envs)
        shape = num_envs, self.max_episode_steps, self.action_size
        self._actions = np.zeros(shape, np.float32)

    def reset(self) -> Float[np.ndarray, "E O"]:
        """Begin a new episode everywhere; return observations `[E, O]`."""
        self._episode += 1
        return np.array([self._begin(i) for i in range(self.num_envs)])

    def step(self, actions: npt.ArrayLike) -> Step:
        """Take one step everywhere; begin a new episode where one ends.

        Args:
            actions: `[E, A]` in [-1, 1]; one outside is clipped.

        Returns:
            A `Step` of fresh arrays, the floats in single precision.

        Raises:
            ValueError: actions of another shape or not finite, a step
                before `reset`, a task that returns nan or infinity.
        """
        actions = self._check_actions(np.asarray(actions, np.float32))
        ids = np.arange(self.num_envs)
        self._actions[ids, self._length] = actions
        after, reward, terminated, truncated = self._move(ids, actions)
        ended = terminated | truncated
        returns = np.where(ended, self._return, np.nan).astype(np.float32)
        length, observation = self._length.copy(), after.copy()
        for i in np.flatnonzero(ended).tolist():
            self._episode[i] += 1
            observation[i] = self._begin(i)
        return Step(
            observation, reward, terminated, truncated, after, returns, length
        )

    def state(self) -> dict[str, np.ndarray]:
        """Return what `restore` needs, in arrays of fixed shapes."""
        return {
            "seed": np.array(self.seed),
            "episode": self._episode.copy(),
            "length": self._length.copy(),
            "actions": self._actions.copy(),
        }

    def restore(
        self, state: Mapping[str, np.ndarray]
    ) -> Float[np.ndarray, "E O"]:
        """Return to a state by repeating the actions that led to it.

        Args:
            state: from `state`, of as many copies of the same task.

        Returns:
            The observations `[E, O]` to act on next.

        Raises:
            ValueError: arrays of other names or shapes.
        """
        want = {name: value.shape for name, value in self.state().items()}
        got = {name: np.shape(value) for name, value in state.items()}
        if got != want:
            raise ValueError(
                f"the state of {self.env_id} has the shapes {got}: "
                f"{want} is wanted"
            )
        self.seed = int(state["seed"])
        self._episode = np.array(state["episode"])
        self._actions = np.array(state["actions"])
        size = self.num_envs, self.observation_size
        observation = np.zeros(size, np.float32)
        for i in np.flatnonzero(self._episode >= 0).tolist():
            ids, observation[i] = np.array([i]), self._begin(i)
            for action in self._actions[i, : state["length"][i]]:
                observation[i] = self._move(ids, action[None])[0][0]
        return observation

    def _begin(self, i):
        """Begin copy i's episode from its own seed; return `[O]`."""
        self._length[i], self._return[i] = 0, 0.0
        entropy = self.seed, i, int(self._episode[i])
        seed = np.random.SeedSequence(entropy).generate_state(1)[0]
        return np.float32(self._engine.reset(i, int(seed)))

    def _move(self, ids, actions):
        """Step the copies `ids` and count; refuse what is not finite."""
        actions = rescale(actions, self.action_low, self.action_high)
        observation, reward, terminated, truncated = self._engine.step(
            ids, actions
        )
        self._length[ids] += 1
        self._return[ids] += reward
        with np.errstate(over="ignore"):
            observation, reward = np.float32(observation), np.float32(reward)
        sound = np.isfinite(observation).all(1) & np.isfinite(reward)
        if not sound.all():
            i = ids[np.argmin(sound)]
            raise ValueError(
                f"{self.env_id} returned an observation or reward that is "
                f"not finite at step {self._length[i]} of episode "
                f"{self._episode[i]} of environment {i}"
            )
        truncated = truncated | (self._length[ids] >= self.max_episode_steps)
        return observation, reward, terminated, truncated

    def _check_actions(self, actions):
        """Refuse actions of another shape, not finite, or too early."""
        want = self.num_envs, self.action_size
        if actions.shape != want:
            raise ValueError(
                f"{self.env_id} was given actions of shape "
                f"{actions.shape}: {want} is wanted"
            )
        sound = np.isfinite(actions).all(1)
        if not sound.all():
            raise ValueError(
                f"{self.env_id} was given an action that is not finite, "
                f"{actions[np.argmin(sound)]}, in environment "
                f"{np.argmin(sound)}: numbers in [-1, 1] are wanted"
            )
        if self._episode[0] < 0:
            raise ValueError(f"{self.env_id} needs reset() before step()")
        return actions


def _check_spaces(env_id, action, observation):
    """Refuse tasks without a bounded Box of actions and flat observations."""
    box = gym.spaces.Box
    if not isinstance(action, box) or len(action.shape) != 1:
        raise ValueError(
            f"{env_id} takes actions from {action}: "
            "a Box of one dimension is wanted"
        )
    if not action.is_bounded():
        raise ValueError(
            f"{env_id} takes actions from {action}: finite bounds are wanted"
        )
    if not isinstance(observation, box) or len(observation.shape) != 1:
        raise ValueError(
            f"{env_id} returns observations from {observation}: "
            "a Box of one dimension is wanted"
        )


def make(
    env_id: str, num_envs: int, seed: int, threads: int = 0
) -> Environments:
    """Make copies of a Gymnasium task; v4 tasks get the paper's physics.

    Args:
        env_id: any task with a bounded Box of actions and flat
            observations; one without a time limit gets 1000 steps.
        num_envs: number of copies, `E`.
        seed: non-negative integer from which every episode's seed derives.
        threads: threads for the physics; 0 means one per core.

    Returns:
        The environments; `reset` comes before the first `step`.

    Raises:
        ValueError: an unknown id, unsuitable spaces, no copies, a negative
            seed or number of threads.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}: at least 1 is wanted")
    if seed < 0:
        raise ValueError(f"seed is {seed}: at least 0 is wanted")
    if threads < 0:
        raise ValueError(f"threads is {threads}: at least 0 is wanted")
    engine = Batched if env_id in RULES else Plain
    threads = threads or os.cpu_count() or 1
    return Environments(
        env_id, engine(env_id, num_envs, threads), num_envs, seed
    )


# %% One to look at
def render_env(
    env_id: str, seed: int, width: int = 480, height: int = 480
) -> gym.Env:
    """Make one environment that draws itself, for a video.

    Args:
        env_id: as for `make`.
        seed: non-negative integer; fixes the episodes from the first
            `reset()` on.
        width: of a frame, in pixels; only MuJoCo's tasks heed it.
        height: of a frame, in pixels; only MuJoCo's tasks heed it.

    Returns:
        A Gymnasium environment with `render_mode="rgb_array"`, the physics
        of `make`, and actions in [-1, 1].

    Raises:
        ValueError: an unknown id or unsuitable spaces.
    """
    env: Any = make_one(env_id, render_mode="rgb_array")
    if isinstance(env.unwrapped, MujocoEnv):
        size: dict[str, Any] = {"width": width, "height": height}
        env = make_one(env_id, render_mode="rgb_array", **size)
    _check_spaces(env_id, env.action_space, env.observation_space)
    low, high = env.action_space.low, env.action_space.high
    env.unwrapped.np_random = gym.utils.seeding.np_random(seed)[0]
    return gym.wrappers.TransformAction(
        env,
        lambda action: rescale(action, low, high),
        gym.spaces.Box(-1, 1, env.action_space.shape, np.float32),
    )
