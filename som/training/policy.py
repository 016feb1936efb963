"""A policy to use.

Exported by tools/export.py from book/training/policy.md; edit the chapter.
"""

__all__ = [
    "acting",
    "CLIP",
    "Scale",
    "normalize",
    "Policy",
    "evaluate",
    "rollout_states",
    "restore_agent",
    "of_this_version",
    "save_policy",
    "load",
    "read_policies",
]

# %% Imports
import operator
import types
import typing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from som.agent.actor_critic import (
    AGENTS,
    OFFLINE,
    ActorCritic,
    candidates,
    make_agent,
    q_value,
)
from som.training import environments, records


# %% What acting needs
def acting(agent, state):
    """The state without what only learning needs."""
    return state._replace(**dict.fromkeys(agent.learning_only, ()))


# %% Observations of one size
CLIP = 10.0
"""Deviations from the mean, at most, that an agent is shown."""


class Scale(NamedTuple):
    """In which units an agent observes; [O], or [S, O] of all seeds."""

    mean: Any
    std: Any


def normalize(observation, scale: Scale | None):
    """What an agent is shown, Equation (eq-policy-normalize).

    Args:
        observation: [..., O].
        scale: mean and std, [O]; None: the observation as it is.
    """
    if scale is None:
        return observation
    deviations = (observation - scale.mean) / scale.std
    return jnp.clip(deviations, -CLIP, CLIP)


# %% Observations in, actions out
class Policy:
    """A trained policy: NumPy observations in, NumPy actions out.

    Args:
        agent: the algorithm.
        state: agent states [S, ...], of which one seed is used.
        env: the task it was trained on; an id, a factory or a Task.
        low, high: the task's action bounds, [A].
        index: which seed.
        scale: in which units the agent observes, [S, O]; None: as it is.
    """

    def __init__(
        self, agent, state, env: Any, low, high, index: int = 0, scale=None
    ):
        self.agent, self.task = agent, environments.as_task(env)
        self.env_id = self.task.name
        kinds = (AGENTS | OFFLINE).items()
        self.algo = next(k for k, v in kinds if isinstance(agent, v))
        state = acting(agent, state)
        self.state = jax.tree.map(
            lambda x: jnp.asarray(x)[index], state._replace(step=())
        )._replace(step=jnp.asarray(state.step))
        self.scale: Scale | None = None
        if scale is not None:
            parts = (np.asarray(part, np.float32) for part in scale)
            self.scale = Scale(*(part[index] for part in parts))
        self.low = np.asarray(low, np.float32)
        self.high = np.asarray(high, np.float32)
        self.reset()

    def __repr__(self) -> str:
        sizes = self.agent.observation_size, self.agent.action_size
        return (
            f"<{self.algo} policy for {self.env_id}: "
            "observation [{}] to action [{}]>".format(*sizes)
        )

    def reset(self, seed: int = 0) -> None:
        """Begin the noise anew: the same seed, the same actions again.

        Raises:
            ValueError: no such seed.
        """
        self.seed, self.calls = _whole(seed), 0

    def act(self, observation, seed: int | None = None) -> np.ndarray:
        """Action in [-1, 1], without exploration noise.

        Args:
            observation: [O] or [B, O].
            seed: of the noise, then the same in every row and at every
                call; by default each row and call has its own.

        Returns:
            [A] or [B, A].

        Raises:
            ValueError: another shape, or a number that is not finite.
        """
        observation = self._observed(observation)
        key = self._key(seed)
        return np.asarray(
            _act(
                self.agent,
                self.state,
                self.scale,
                observation,
                key,
                seed is not None,
            )
        )

    def __call__(self, observation, seed: int | None = None) -> np.ndarray:
        """Action in the task's own units, [A] or [B, A]; see act."""
        action = self.act(observation, seed)
        return environments.rescale(action, self.low, self.high)

    def candidates(
        self, observation, num: int, seed: int | None = None
    ) -> np.ndarray:
        """Actions to choose from, in the task's own units.

        Args:
            observation: [O] or [B, O].
            num: N; with the agent's own N, SOM's `policy(observation,
                seed)` is the best of `candidates(observation, N, seed)`.
            seed: as in act.

        Returns:
            [N, A] or [N, B, A].

        Raises:
            ValueError: as in act; N below one; an agent without candidates.
        """
        observation = self._observed(observation)
        self._needs_critic()
        if num < 1:
            raise ValueError(f"num is {num}; at least 1 is wanted")
        key, alike = self._key(seed), seed is not None
        actions = _candidates(
            self.agent, self.state, self.scale, observation, key, num, alike
        )
        return environments.rescale(np.asarray(actions), self.low, self.high)

    def q(self, observation, action) -> np.ndarray:
        """What the critic expects of an action and of all that follows.

        The smaller twin's value, in the task's reward, discounted by the
        agent's `discount` for each step. The critic itself knows scaled
        rewards; its value is divided by `reward_scale` here.

        Args:
            observation: [O] or [B, O].
            action: [..., A] in the task's units, of a shape that broadcasts
                with the observation's; one outside the bounds counts as
                the nearest inside.

        Returns:
            Q(s, a), [...].

        Raises:
            ValueError: as in act; another shape; an agent without a critic.
        """
        observation, action = self._observed(observation), np.asarray(action)
        self._needs_critic()
        size = self.agent.action_size
        if action.ndim < 1 or action.shape[-1] != size:
            raise ValueError(
                f"action has shape {list(action.shape)}; [..., {size}] is "
                "wanted"
            )
        width = np.maximum(self.high - self.low, 1e-9)  # none where fixed
        inside = np.clip(action, self.low, self.high) - self.low
        inside = np.float32(2 * inside / width - 1)
        return np.asarray(
            _q(self.agent, self.state, self.scale, observation, inside)
        )

    def _key(self, seed: int | None) -> np.ndarray:
        """The random key of this call, or that of a seed's call zero."""
        if seed is not None:
            return np.array([_whole(seed), 0], np.uint32)
        self.calls += 1
        return np.array([self.seed, self.calls], np.uint32)

    def _observed(self, observation) -> np.ndarray:
        try:
            observation = np.asarray(observation, np.float32)
        except (TypeError, ValueError):
            raise ValueError(
                f"observation is a {type(observation).__name__}; an array "
                "of numbers is wanted (of a dictionary or tuple, "
                "gymnasium.spaces.flatten makes one)"
            ) from None
        size = self.agent.observation_size
        if observation.ndim not in (1, 2) or observation.shape[-1] != size:
            raise ValueError(
                f"observation has shape {list(observation.shape)}; "
                f"[{size}] or [B, {size}] is wanted"
            )
        if not np.isfinite(observation).all():
            raise ValueError(
                "observation holds NaN or infinity; finite numbers are wanted"
            )
        return observation

    def _needs_critic(self) -> None:
        if not isinstance(self.agent, ActorCritic):
            raise ValueError(
                f"{self.algo} has no candidates and no critic of actions"
            )


def _whole(seed) -> int:
    try:
        number = operator.index(seed)
        good = 0 <= number < 2**31
    except TypeError:
        good = False
    if not good:
        raise ValueError(
            f"seed is {seed!r}; a whole number from 0 to 2147483647 is wanted"
        )
    return number


@partial(jax.jit, static_argnames=("agent", "alike"))
def _act(agent, state, scale, observation, key, alike: bool):
    observation = normalize(observation, scale)
    one = lambda s: agent.act(state, s, key)
    alike = alike and observation.ndim == 2
    return (jax.vmap(one) if alike else one)(observation)


@partial(jax.jit, static_argnames=("agent", "num", "alike"))
def _candidates(agent, state, scale, observation, key, num, alike: bool):
    observation = normalize(observation, scale)
    policy, (k_action, _) = agent.acting_policy(state), jax.random.split(key)
    one = lambda s: candidates(agent, policy, s, k_action, num)
    alike = alike and observation.ndim == 2
    return (jax.vmap(one, out_axes=1) if alike else one)(observation)


@partial(jax.jit, static_argnames="agent")
def _q(agent, state, scale, observation, action):
    observation = normalize(observation, scale)
    value = q_value(agent, state.critic, observation, action)
    return value / agent.config.reward_scale


# %% Evaluation
def evaluate(
    policy: Policy, env: Any = None, episodes: int = 20, seed: int = 0
) -> np.ndarray:
    """Undiscounted returns of whole episodes, without exploration noise.

    Args:
        policy: what to evaluate.
        env: an id, factory or Task; None is the policy's own.
        episodes: number of episodes, run side by side.
        seed: seed of the environments.

    Returns:
        Returns, [episodes], the first episode of each environment.

    Raises:
        ValueError: no episodes, or an unknown task.
        environments.TaskError: the task fails.
    """
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}; at least 1 is wanted")
    policy.reset()
    returns = np.full(episodes, np.nan)
    task = policy.task if env is None else env
    with environments.make(task, episodes, seed) as envs:
        observation = envs.reset()
        while np.isnan(returns).any():
            step = envs.step(policy.act(observation))
            observation, new = step.observation, step.episode_return
            returns = np.where(np.isnan(returns), new, returns)
    return returns


def rollout_states(
    policy: Policy, steps: int = 800, seed: int = 0
) -> np.ndarray:
    """Observations that a policy acts on, one episode after the other.

    Args:
        policy: trained; acts without exploration noise, Appendix D.
        steps: T, environment steps.
        seed: seed of the environment.

    Returns:
        Observations in time order, [T, O].

    Raises:
        ValueError: no steps.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; at least 1 is wanted")
    policy.reset()  # the same rollout every time
    with environments.make(policy.task, 1, seed) as envs:
        observation, seen = envs.reset(), []
        for _ in range(steps):
            seen.append(observation[0])
            observation = envs.step(policy.act(observation)).observation
    return np.stack(seen)


# %% The file of a policy
def restore_agent(config: dict[str, Any], observation_size, action_size):
    """The agent of a configuration, also of one that JSON has stored.

    Raises:
        records.CheckpointError: a setting that the agent does not have.
    """
    settings = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in config["agent"].items()
    }
    name, profile = config["algo"], config["profile"]
    try:
        agent = make_agent(
            name, observation_size, action_size, profile, **settings
        )
    except ValueError as error:
        raise records.CheckpointError(
            f"another version of som wrote this and can read it: {error}"[
                :400
            ]
        ) from None
    for key, hint in typing.get_type_hints(type(agent.config)).items():
        if not _is(getattr(agent.config, key), hint):
            raise records.CheckpointError(
                f"the setting {key} is {settings[key]!r:.40}, which is none"
            )
    return agent


def _is(value, hint) -> bool:
    """Whether a stored value is of a setting's type, and finite."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, option) for option in options)
    if origin is typing.Literal:
        return value in options
    if origin is tuple:
        many = isinstance(value, tuple) and len(value) == len(options)
        return many and all(map(_is, value, options))
    if hint is float:
        return type(value) in (int, float) and abs(value) < np.inf
    return type(value) is hint


def of_this_version(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration with the settings that have come since.

    Each has the default of its class: what was done when it was written.
    """
    kinds = AGENTS | OFFLINE
    if "agent" not in config or config["algo"] not in kinds:
        return config  # those who use it say so
    some = next(iter(kinds[config["algo"]].profiles.values()))
    return config | {"agent": asdict(type(some)()) | config["agent"]}


def save_policy(
    path: Path, config: dict[str, Any], agent, state, low, high, scale=None
) -> None:
    """Write the policies of all seeds to one small file.

    Args:
        path: the file.
        config: the run's settings, as in its config.json.
        agent: the algorithm.
        state: agent states [S, ...], one for each of the config's seeds.
        low, high: the task's action bounds, [A].
        scale: in which units the agents observe, [S, O]; None: as it is.

    Raises:
        records.CheckpointError: it cannot be written; an old one is intact.
    """
    tree: dict[str, Any] = {
        "state": acting(agent, state),
        "low": np.float32(low),
        "high": np.float32(high),
    }
    names = ("algo", "env", "env_kwargs", "seeds", "profile", "agent")
    metadata = {name: config[name] for name in names if name in config}
    if scale is not None:
        tree["scale"] = Scale(*map(np.float32, scale))
        metadata["normalized"] = True
    metadata["observation_size"] = agent.observation_size
    metadata["action_size"] = agent.action_size
    records.save(path, tree, metadata)


def load(path, index: int = 0) -> Policy:
    """Load a trained policy.

    Args:
        path: a run's folder, or its policy.npz.
        index: which of its seeds, counted from 0.

    Returns:
        The policy: NumPy observation in, action in the task's units out.

    Raises:
        records.CheckpointError: no policy there, or not one of ours.
        ValueError: no such seed.
    """
    agent, tree, metadata = read_policies(path)
    seeds = metadata["seeds"]
    if not 0 <= index < len(seeds):
        raise ValueError(
            f"index is {index}; the policy has {len(seeds)} seed(s), "
            "counted from 0"
        )
    bounds, task = (
        (tree["low"], tree["high"]),
        environments.recorded(metadata),
    )
    return Policy(
        agent, tree["state"], task, *bounds, index, tree.get("scale")
    )


def read_policies(path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """All that the file of a policy holds.

    Args:
        path: a run's folder, or its policy.npz.

    Returns:
        The agent; the tree of its `state` [S, ...], the action bounds
        `low` and `high`, and the `scale` if it has one; the metadata.

    Raises:
        records.CheckpointError: no policy there, or not one of ours.
    """
    path = Path(path)
    path = path / "policy.npz" if path.is_dir() else path
    metadata = records.read_metadata(path)
    try:
        sizes = metadata["observation_size"], metadata["action_size"]
        for size in (*sizes, metadata["agent"].get("depth", 1)):
            if type(size) is not int or not 0 < size < path.stat().st_size:
                raise TypeError("sizes that fit into it")
        agent = restore_agent(of_this_version(metadata), *sizes)
        number, _ = len(metadata["seeds"]), environments.recorded(metadata)
    except (KeyError, AttributeError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        raise records.CheckpointError(
            f"{path} is not a policy: its metadata lacks {why}"
        ) from None
    bound = np.zeros(sizes[1], np.float32)
    like = {"state": _shapes(agent, number), "low": bound, "high": bound}
    if metadata.get("normalized"):
        like["scale"] = Scale(*[np.zeros((number, sizes[0]), np.float32)] * 2)
    tree, _ = records.load(path, like)
    floats = [x for x in jax.tree.leaves(tree) if x.dtype.kind == "f"]
    if not all(np.isfinite(x).all() for x in floats):
        raise records.CheckpointError(
            f"{path} holds a parameter that is not finite"
        )
    return agent, tree, metadata


def _shapes(agent, num: int):
    """Shapes of what some seeds act with, [S, ...], and of one step."""
    key = jax.random.PRNGKey(0)
    one = jax.eval_shape(lambda: acting(agent, agent.init(key)))
    many = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((num, *x.shape), x.dtype), one
    )
    return many._replace(step=one.step)
