"""Environments.

Exported by tools/export.py from book/training/environments.md; edit the chapter.
"""

__all__ = [
    "TASKS",
    "rescale",
    "Task",
    "as_task",
    "recorded",
    "TaskError",
    "ActionError",
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
    "LONGEST",
    "Environments",
    "longest_episode",
    "make",
]

import copy
import difflib
import importlib
import inspect
import json
import os
import re
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
        Actions `[..., A]` in the task's units, never outside its box.
    """
    inside = np.clip(action, -1, 1)
    return np.clip((high + low) / 2 + (high - low) / 2 * inside, low, high)


# %% Tasks of your own
@dataclass(frozen=True)
class Task:
    """What the copies of an environment are made of.

    Raises:
        ValueError: a single environment, or arguments that JSON cannot hold.
    """

    env: Any  # a Gymnasium id, or a function or class that makes one
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    wrappers: Sequence[Callable[[Any], Any]] = ()  # the innermost first

    def __post_init__(self):
        if isinstance(self.env, gym.Env | gym.vector.VectorEnv):
            raise ValueError(
                f"env is one environment, {self.env}, and several are "
                "needed: give its Gymnasium id, its class, or a function "
                "that makes one"
            )
        if not (isinstance(self.env, str) or callable(self.env)):
            raise ValueError(
                f"env is {self.env!r}; a Gymnasium id, or a function or "
                "class that makes an environment, is wanted"
            )
        try:  # what is made now is what the record will say
            kept = json.loads(json.dumps(dict(self.kwargs), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"env_kwargs is {self.kwargs!r}, which a record cannot "
                f"keep ({error}): numbers, texts and lists are wanted"
            ) from None
        object.__setattr__(self, "kwargs", kept)

    @property
    def name(self) -> str:
        """The id, or what is called: `Wrapper(make())`."""
        name = self.env
        if not isinstance(name, str):
            name = f"{_name(name)}()"
        for wrapper in self.wrappers:
            name = f"{_name(wrapper)}({name})"
        return name


def _name(call):
    call = getattr(call, "func", call)  # of a partial
    return getattr(call, "__qualname__", type(call).__qualname__)


def as_task(env: Any) -> Task:
    """The task that is meant by a Task, an id or a factory."""
    return env if isinstance(env, Task) else Task(env)


def recorded(config: Mapping[str, Any]) -> Task:
    """The task of a run's config.json, or of a policy's metadata.

    Args:
        config: has "env", its name, and "env_kwargs" where there are any.

    Raises:
        KeyError: it has no "env".
    """
    return Task(config["env"], config.get("env_kwargs", {}))


class TaskError(ValueError):
    """A task fails, or returns what nobody can learn from; one sentence."""


class ActionError(ValueError, FloatingPointError):
    """An action is not finite: the agent has diverged; one sentence."""


_PYTHON = ("<frozen", sysconfig.get_path("stdlib"), gym.__path__[0])
_LIBRARIES = (*_PYTHON, sysconfig.get_path("purelib"))


def _told(error):
    """What an error says, and on which line of the user's it arose."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, gym.error.Error):
        return text
    text = f"{type(error).__name__}: {text}".rstrip(": ")
    frames = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals is not globals()
    ]
    for foreign in (_LIBRARIES, _PYTHON):
        own = [f for f in frames if not f[0].startswith(foreign)]
        if own:
            return "{} ({}, line {})".format(text, *own[-1])
    return _told(error.__cause__) if error.__cause__ else text


@contextmanager
def _blame(what: str) -> Iterator[None]:
    """Say of an error in a task's own code what failed, and where."""
    try:
        yield
    except (Exception, SystemExit) as error:
        raise TaskError(f"{what}: {_told(error)}") from error


def _find(env_id):
    """Return the specification of an id, or name the nearest known one."""
    if env_id.endswith(")"):
        raise ValueError(
            f"{env_id} is made by a program, and files keep only its name: "
            "give what makes it again, as env"
        )
    module, _, name = env_id.rpartition(":")
    if module:
        _import(module, env_id)
    try:
        return gym.spec(name)
    except (gym.error.Error, ImportError) as error:
        match = difflib.get_close_matches
        near = match(name, TASKS, 1) or match(name, gym.registry, 3)
        whole = [f"{module}:{n}" if module else n for n in near]
        hint = "wanted is an id such as 'HalfCheetah-v4' or 'module:Mine-v0'"
        if near:
            hint = f"did you mean {' or '.join(map(repr, whole))}?"
        raise ValueError(
            f"{env_id!r} is no Gymnasium task: {hint}"
        ) from error


def _import(module, env_id):
    """Import the module of an id, which registers it."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{env_id!r} names the module {module!r}, which is neither "
                "in the current folder nor on Python's path"
            ) from error
        raise ValueError(
            f"cannot import {module!r}: {_told(error)}"
        ) from error
    except Exception as error:
        raise ValueError(
            f"cannot import {module!r}: {_told(error)}"
        ) from error


_LEAVES = (
    gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete,
    gym.spaces.MultiBinary,
)  # fmt: skip


def _flattens(space):
    """Whether Gymnasium lays a space end to end without loss."""
    if isinstance(space, gym.spaces.Dict):
        return all(map(_flattens, space.spaces.values()))
    if isinstance(space, gym.spaces.Tuple):
        return all(map(_flattens, space.spaces))
    return isinstance(space, _LEAVES)


def _is_vector(space):
    box = isinstance(space, gym.spaces.Box) and len(space.shape) == 1
    return box and space.shape[0] > 0


def _flat(env, name):
    """Flatten observations; refuse spaces that no agent can act in."""
    if not _is_vector(env.observation_space) and _flattens(
        env.observation_space
    ):
        env = gym.wrappers.FlattenObservation(env)
    box = "a Box of one dimension"
    for does, space, wanted in (
        ("takes actions from", env.action_space, box),
        (
            "returns observations from",
            env.observation_space,
            f"{box}, or what Gymnasium flattens to one without loss,",
        ),
    ):
        shown = f"{name} {does} {' '.join(str(space).split())}"
        if not _is_vector(space):
            raise ValueError(f"{shown}: {wanted} is wanted")
        if space is env.action_space:
            _check_bounds(space, shown)
    return env


def _check_bounds(space, shown):
    if not np.issubdtype(space.dtype, np.floating):
        raise ValueError(f"{shown}: a Box of floats is wanted")
    largest = min(np.finfo(t).max for t in (space.dtype, np.float32)) / 4
    if not (np.abs([space.low, space.high]) < largest).all():
        raise ValueError(
            f"{shown}: finite bounds are wanted, less than {largest:.1g}"
        )


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


def _is_robot(spec, kwargs):
    """Whether an id is a v4 robot of Gymnasium, with its own model."""
    own = r"gymnasium\.envs\.mujoco\.\w+_v4:"
    model = {**spec.kwargs, **kwargs}.get("xml_file")
    return re.match(own, str(spec.entry_point)) and model is None


def _from_registry(spec, paper_physics, **kwargs):
    """Make a registered environment; a v4 robot gets the paper's physics."""
    robot, spec = _is_robot(spec, kwargs), copy.copy(spec)
    if robot and spec.id == "Pusher-v4":
        spec.entry_point = Pusher
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is out of date")
            env = gym.make(spec, disable_env_checker=True, **kwargs)
    finally:
        mujoco.set_mju_user_warning(handler)
    if robot and paper_physics:
        task: Any = env.unwrapped
        restore_physics(task)
        if spec.id == "Pusher-v4":
            restore_object(task.model)
    return env


def make_one(env: Any, paper_physics: bool = True, **kwargs) -> gym.Env:
    """Make one environment; Gymnasium's v4 robots get the paper's physics.

    Args:
        env: a Gymnasium id such as "Ant-v4", a factory, or a Task.
        paper_physics: False leaves MuJoCo's physics as installed.
        **kwargs: passed on to what makes the environment.

    Returns:
        The environment, with actions in the task's own units and flat
        observations.

    Raises:
        ValueError: an unknown id, a task that cannot be made here, or
            spaces that no agent of this book can act in.
    """
    task = as_task(env)
    make = task.env
    if isinstance(make, str):
        make = partial(_from_registry, _find(make), paper_physics)
    made: Any = None
    try:
        with _blame(f"cannot make {task.name!r}"):
            made = make(**{**task.kwargs, **kwargs})
            if not isinstance(made, gym.Env):
                raise TypeError(f"{made!r} is no gymnasium.Env")
            for wrapper in task.wrappers:
                made = wrapper(made)
        return _flat(made, task.name)
    except BaseException:
        if isinstance(made, gym.Env):
            made.close()
        raise


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
def _number(name, what, value):
    """A float from a number, or from an array of one."""
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind not in "biuf":
        shape = f" of shape {list(array.shape)}" if array.ndim else ""
        raise TaskError(
            f"{name} returned the {what} {value!r}{shape}: one number is "
            "wanted"
        )
    return float(array.item())


def _vector(name, size, value):
    """An observation as an array `[O]`."""
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.asarray(None)
    if array.shape != (size,) or array.dtype.kind not in "biuf":
        raise TaskError(
            f"{name} returned an observation of shape {list(array.shape)} "
            f"and type {array.dtype}: numbers of shape {[size]} are wanted"
        )
    return array


def _values(name, call, returned, wanted):
    """What `reset` or `step` returned, if it is as many values."""
    if not (isinstance(returned, tuple) and len(returned) == len(wanted)):
        is_tuple = isinstance(returned, tuple)
        what = f"{len(returned)} values" if is_tuple else repr(returned)
        raise TaskError(
            f"{call} of {name} returned {what}: {', '.join(wanted)} are "
            "wanted"
        )
    return returned


class Plain:
    """An engine of separate Gymnasium environments, for any task.

    Args:
        env: the task; an id, a factory or a Task.
        num_envs: number of copies, `E`.
        threads: most threads to use; tasks other than MuJoCo's use one.
        **kwargs: as for `make_one`.
    """

    def __init__(self, env: Any, num_envs: int, threads: int, **kwargs):
        self._name = as_task(env).name
        self.envs: list[Any] = []
        self._pool = None
        try:
            for _ in range(num_envs):
                self.envs.append(make_one(env, **kwargs))
            if len({id(e.unwrapped) for e in self.envs}) < num_envs:
                raise ValueError(
                    f"{self._name} returned the same environment twice: a "
                    "new one each time is wanted"
                )
        except BaseException:
            self.close()
            raise
        self.env = self.envs[0]
        self._size = self.env.observation_space.shape[0]
        mujoco_task = isinstance(self.env.unwrapped, MujocoEnv)
        self._threads = min(threads, num_envs) if mujoco_task else 1
        if self._threads > 1:
            self._pool = ThreadPoolExecutor(self._threads)

    def reset(self, i: int, seed: int) -> np.ndarray:
        """Begin an episode in copy i; return its observation `[O]`."""
        with _blame(f"reset of {self._name} failed"):
            returned = self.envs[i].reset(seed=seed)
        wanted = "an observation", "a dictionary"
        pair = _values(self._name, "reset", returned, wanted)
        return _vector(self._name, self._size, pair[0])

    def step(self, ids: np.ndarray, actions: np.ndarray) -> tuple:
        """Step the copies `ids` by actions `[n, A]` in the task's units.

        Returns:
            Observations `[n, O]`, rewards, terminated and truncated `[n]`.
        """
        n = min(self._threads, len(ids))

        def run(k):
            pairs = zip(ids[k::n], actions[k::n], strict=True)
            return [self._step_one(i, action) for i, action in pairs]

        spread = self._pool.map if self._pool and n > 1 else map
        parts = list(spread(run, range(n)))
        rows = [parts[j % n][j // n] for j in range(len(ids))]
        return tuple(np.array(x) for x in zip(*rows, strict=True))

    def _step_one(self, i, action):
        with _blame(f"step of {self._name} failed"):
            returned = self.envs[i].step(action)
        wanted = "observation", "reward", "terminated", "truncated", "info"
        five = _values(self._name, "step", returned, wanted)
        return (
            _vector(self._name, self._size, five[0]),
            _number(self._name, "reward", five[1]),
            bool(_number(self._name, "terminated", five[2])),
            bool(_number(self._name, "truncated", five[3])),
        )

    def close(self) -> None:
        """Close every copy, and the threads; warn of one that fails."""
        for env in self.envs:
            try:
                env.close()
            except Exception as error:
                what = f"close of {self._name} failed"
                warnings.warn(f"{what}: {_told(error)}", stacklevel=2)
        if self._pool:
            self._pool.shutdown()


class Batched:
    """An engine with all copies in one `mujoco.batch.Batch`.

    Args:
        env: the id or Task of one of `RULES`.
        num_envs: number of copies, `E`.
        threads: most threads to use.
    """

    def __init__(self, env: Any, num_envs: int, threads: int):
        self.env = make_one(env)
        task: Any = self.env.unwrapped
        self._task, self._rules = task, RULES[as_task(env).name]
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

    def close(self) -> None:
        """Close the one environment; the batch needs no closing."""
        self.env.close()


LONGEST = 10_000
"""Steps of an episode up to which its actions are kept for `restore`."""


def _inward(space):
    """The bounds of a Box in single precision, not outside it."""
    low, high = (x.astype(np.float32) for x in (space.low, space.high))
    above = np.nextafter(low, np.float32(np.inf))
    below = np.nextafter(high, np.float32(-np.inf))
    return (
        np.where(low < space.low, above, low),
        np.where(high > space.high, below, high),
    )


def _limit(env):
    """The time limit of an environment; 1000 steps where it has none."""
    limit = env.spec and env.spec.max_episode_steps
    if limit is None and env.has_wrapper_attr("_max_episode_steps"):
        limit = env.get_wrapper_attr("_max_episode_steps")
    return limit or 1000


class Environments:
    """Copies of one task, stepped together; `make` makes them.

    Use as a context, `with make(...) as environments`, or call `close`.

    Args:
        env: the task; an id, a factory or a Task.
        engine: what moves the simulations.
        num_envs: number of copies, `E`.
        seed: non-negative integer from which every episode's seed derives.
    """

    def __init__(
        self, env: Any, engine: Plain | Batched, num_envs: int, seed: int
    ):
        one: Any = engine.env
        self.env = one  # the first copy
        self.task, self.num_envs, self.seed = as_task(env), num_envs, seed
        self.env_id = self.task.name
        self.observation_size = one.observation_space.shape[0]
        self.action_size = one.action_space.shape[0]
        self.action_low, self.action_high = _inward(one.action_space)
        self.max_episode_steps = _limit(one)
        self._engine, self._dtype = engine, one.action_space.dtype
        self._episode = np.full(num_envs, -1)
        self._length = np.zeros(num_envs, int)
        self._return = np.zeros(num_envs)
        kept = min(self.max_episode_steps, LONGEST)
        shape = num_envs, kept, self.action_size
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
            ValueError: actions of another shape, a step before `reset`.
            ActionError: an action that is not finite.
            TaskError: the task fails, or returns what it must not.
        """
        sent = self._check_actions(np.asarray(actions, np.float32))
        ids = np.arange(self.num_envs)
        short = self._length < self._actions.shape[1]
        self._actions[ids[short], self._length[short]] = sent[short]
        after, reward, terminated, truncated = self._move(ids, sent)
        ended = terminated | truncated
        returns = np.where(ended, self._return, np.nan).astype(np.float32)
        length, observation = self._length.copy(), after.copy()
        for i in np.flatnonzero(ended).tolist():
            self._episode[i] += 1
            observation[i] = self._begin(i)
        return Step(
            observation, reward, terminated, truncated, after, returns, length
        )

    def episode_seeds(self) -> Int[np.ndarray, " E"]:
        """Return the seeds that the copies were last reset with, `[E]`."""
        return np.array([self._seed_of(i) for i in range(self.num_envs)])

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
            observation[i] = self._repeat(i, int(state["length"][i]))
        return observation

    def render(self) -> np.ndarray:
        """Draw the first copy, `[H, W, 3]`; see `make`.

        Raises:
            TaskError: it cannot be drawn.
        """
        with _blame(f"cannot draw {self.env_id}"):
            frame = np.asarray(self.env.render())
        if frame.ndim != 3 or frame.shape[2] != 3:
            raise TaskError(
                f"{self.env_id} drew {list(frame.shape)}: a picture of "
                "shape [H, W, 3] is wanted"
            )
        return frame

    @property
    def fps(self) -> float:
        """Pictures a second; 30 where the task does not say."""
        return float((self.env.metadata or {}).get("render_fps") or 30)

    def close(self) -> None:
        """Close every copy; nothing else can be done afterwards."""
        self._engine.close()

    def __enter__(self) -> "Environments":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _seed_of(self, i):
        """The seed of the episode that copy i is in."""
        entropy = self.seed, i, int(self._episode[i])
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        return seed if self.env_id in TASKS else seed % 2**31

    def _begin(self, i):
        """Begin copy i's episode from its own seed; return `[O]`."""
        self._length[i], self._return[i] = 0, 0.0
        first = self._engine.reset(i, self._seed_of(i))[None]
        return self._check_values(np.array([i]), first, np.zeros(1))[0][0]

    def _repeat(self, i, length):
        """Go through copy i's episode again, or begin another; `[O]`."""
        observation, ended = self._begin(i), length > self._actions.shape[1]
        for action in self._actions[i, : 0 if ended else length]:
            step = self._move(np.array([i]), action[None])
            observation, ended = step[0][0], (step[2] | step[3])[0]
            if ended:
                break
        if ended:
            self._episode[i] += 1
            observation = self._begin(i)
        return observation

    def _move(self, ids, actions):
        """Step the copies `ids` and count."""
        actions = rescale(actions, self.action_low, self.action_high)
        observation, reward, terminated, truncated = self._engine.step(
            ids, actions.astype(self._dtype)
        )
        self._length[ids] += 1
        self._return[ids] += reward
        observation, reward = self._check_values(ids, observation, reward)
        truncated = truncated | (self._length[ids] >= self.max_episode_steps)
        return observation, reward, terminated, truncated

    def _check_values(self, ids, observation, reward):
        """Single precision of what a task returned; refuse the infinite."""
        with np.errstate(over="ignore"):
            observation, reward = np.float32(observation), np.float32(reward)
        sound = np.isfinite(observation).all(1) & np.isfinite(reward)
        if not sound.all():
            i = ids[np.argmin(sound)]
            raise TaskError(
                f"{self.env_id} returned an observation or reward that is "
                f"not finite at step {self._length[i]} of episode "
                f"{self._episode[i]} of environment {i}"
            )
        return observation, reward

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
            raise ActionError(
                f"{self.env_id} was given an action that is not finite, "
                f"{actions[np.argmin(sound)]}, in environment "
                f"{np.argmin(sound)}: numbers in [-1, 1] are wanted"
            )
        if self._episode[0] < 0:
            raise ValueError(f"{self.env_id} needs reset() before step()")
        return actions


def longest_episode(env: Any) -> int:
    """Steps after which an episode of a task is cut; 1000 without a limit.

    Args:
        env: an id, a factory or a Task.

    Raises:
        ValueError: as make_one does.
    """
    task = as_task(env)
    known = isinstance(task.env, str) and not task.wrappers
    spec = _find(task.env) if known else None
    if spec and spec.max_episode_steps and not task.kwargs:
        return spec.max_episode_steps
    one = make_one(task)
    try:
        return _limit(one)
    finally:
        one.close()


def _has_rules(task):
    """Whether a task is one of RULES, with nothing changed."""
    by_id = isinstance(task.env, str) and task.env in RULES
    if not by_id or task.kwargs or task.wrappers:
        return False
    spec = gym.spec(task.env)
    changed = spec.kwargs or spec.additional_wrappers
    return bool(_is_robot(spec, {}) and not changed)


def _takes(call, name):
    """Whether a function or class can be called with an argument."""
    try:
        inspect.signature(call).bind_partial(**{name: None})
    except (TypeError, ValueError):
        return False
    return True


def _drawing(task, width, height):
    """The arguments with which a task draws, of this size if it can."""
    by_id = isinstance(task.env, str)
    mode: dict[str, Any] = {}
    if by_id or _takes(task.env, "render_mode"):
        mode = {"render_mode": "rgb_array"}
    one: Any = make_one(task, **mode)
    one.close()
    if one.render_mode != "rgb_array":
        raise ValueError(
            f"{task.name} draws nothing: an environment with the "
            f"render_mode 'rgb_array' is wanted, not {one.render_mode!r}"
        )
    maker = type(one.unwrapped) if by_id else task.env
    sized = isinstance(one.unwrapped, MujocoEnv) and _takes(maker, "width")
    return mode | ({"width": width, "height": height} if sized else {})


def make(
    env: Any,
    num_envs: int,
    seed: int,
    threads: int = 0,
    picture: tuple[int, int] | None = None,
) -> Environments:
    """Make copies of a task; Gymnasium's v4 robots get the paper's physics.

    Args:
        env: a Gymnasium id, a factory or a Task, with a bounded Box of
            actions; one without a time limit gets 1000 steps.
        num_envs: number of copies, `E`.
        seed: non-negative integer from which every episode's seed derives.
        threads: threads for the physics; 0 means one per core.
        picture: for `render`, width and height in pixels; only MuJoCo's
            tasks heed them.

    Returns:
        The environments; `reset` comes before the first `step`.

    Raises:
        ValueError: an unknown id, unsuitable spaces, no copies, a negative
            seed or number of threads, a picture of what cannot be drawn.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs is {num_envs}: at least 1 is wanted")
    if seed < 0:
        raise ValueError(f"seed is {seed}: at least 0 is wanted")
    if threads < 0:
        raise ValueError(f"threads is {threads}: at least 0 is wanted")
    task, threads = as_task(env), threads or os.cpu_count() or 1
    engine: Plain | Batched
    if picture:
        drawing = _drawing(task, *picture)
        engine = Plain(task, num_envs, threads, **drawing)
    else:
        kind = Batched if _has_rules(task) else Plain
        engine = kind(task, num_envs, threads)
    return Environments(task, engine, num_envs, seed)
