"""A bandit in the plane.

Exported by tools/export.py from book/studies/bandit.md; edit the chapter.
"""

__all__ = [
    "query",
    "KnownCritic",
    "with_known_critic",
    "as_key",
    "Sampler",
    "check_reward",
    "CHUNK",
    "advance",
    "fit_seeds",
    "fit",
    "noise_grid",
    "draw_arrows",
]

# %% Imports
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from som.agent.actor_critic import (
    AGENTS,
    add_noise,
    candidates,
    closest,
    make_agent,
    q_value,
)
from som.agent.critic import Transition
from som.agent.som import OneStep
from som.theory.boltzmann import Reward, gaussian_noise
from som.training.loop import seed_axes


# %% A task without states
def query(agent, state, reward: Reward, noise: float, share: float, key):
    """One batch of terminal transitions: uniform actions and the policy's.

    Args:
        reward: maps actions [..., 2] to [...].
        noise: standard deviation added to every reward.
        share: of the batch, actions that the policy chose.

    Returns:
        Transition with leading axis B.
    """
    k_uniform, k_own, k_explore, k_reward = jax.random.split(key, 4)
    size = agent.config.batch_size
    own_size = round(share * size)
    observation = jnp.zeros((size, 1))
    policy = agent.acting_policy(state)
    own = candidates(agent, policy, observation[:own_size], k_own, 1)[0]
    own = add_noise(agent, own, state.log_alpha, k_explore)
    action = jax.random.uniform(
        k_uniform, (size - own_size, 2), minval=-1, maxval=1
    )
    action = jnp.concatenate([own, action])
    if noise:
        value = gaussian_noise(reward, noise)(action, k_reward)
    else:
        value = reward(action)
    return Transition(observation, action, value, jnp.ones(size), observation)


# %% The critic may be given
class KnownCritic(NamedTuple):
    """A reward in the place of the critic network."""

    reward: Reward

    def init(self, key, observation, action) -> dict:
        """No parameters."""
        return {"params": {}}

    def apply(self, params, observation, action):
        """The reward as the mean of both twins, and a std of one."""
        mean = jnp.stack([self.reward(action)] * 2, -1)
        return mean, jnp.ones_like(mean)


def with_known_critic(agent, reward: Reward):
    """The same agent with the reward in the place of its critic."""
    known = property(lambda self: KnownCritic(reward))
    kind = type(agent).__name__
    cls = type(f"Known{kind}", (type(agent),), {"critic_net": known})
    return cls(**{f.name: getattr(agent, f.name) for f in fields(agent)})


# %% Fit
def as_key(key) -> jax.Array:
    """A random key, or the key that a whole number stands for.

    Raises:
        ValueError: neither.
    """
    if isinstance(key, jax.Array | np.ndarray):
        if key.ndim or jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return jnp.asarray(key)
    try:
        return jax.random.PRNGKey(operator.index(key))
    except TypeError:
        raise ValueError(
            f"the key is {key!r}; wanted is a whole number or a random key "
            "such as jax.random.PRNGKey(0)"
        ) from None


@dataclass(frozen=True)
class Sampler:
    """What fit has learned: a map from noise [n, 2] to actions [n, 2]."""

    agent: Any
    state: Any

    def __repr__(self) -> str:
        kind = type(self.agent).__name__
        return f"<sampler of {kind}: noise [n, 2] to actions [n, 2]>"

    def prior(self, key, num: int) -> Float[Array, "n 2"]:
        """Noise as the agent draws it."""
        shape = (num, 2)
        return self.agent.prior_std * jax.random.normal(as_key(key), shape)

    def path(self, noise, key=None) -> Float[Array, "T n 2"]:
        """Every point on the way from noise to action; the last in the box.

        Args:
            noise: [n, 2].
            key: random key of policies that add noise on the way; by
                default one and the same.
        """
        key = as_key(0 if key is None else key)
        policy = self.agent.acting_policy(self.state)
        way = _transport(self.agent, policy, jnp.asarray(noise), key)
        return way.at[-1].set(jnp.clip(way[-1], -1, 1))

    def __call__(self, noise) -> Float[Array, "n 2"]:
        """Actions for the given noise."""
        return self.path(noise)[-1]

    def at(self, noise, times, key=None) -> Float[Array, "T n 2"]:
        """Where each noise is at some times between 1 (noise) and 0.

        A chain is asked for its nearest step. A one-step policy knows a
        place in between as well: a_1 - (1 - t) u(a_1, t, 1).

        Args:
            noise: [n, 2].
            times: T numbers in [0, 1].
            key: as in path.
        """
        noise = jnp.asarray(noise)
        way = self.path(noise, key)
        if not isinstance(self.agent, OneStep):
            last = len(way) - 1
            return way[np.asarray([round((1 - t) * last) for t in times])]
        policy = self.agent.acting_policy(self.state)
        u = lambda t: self.agent.policy_net.apply(
            policy, noise, t, jnp.ones(()), jnp.zeros(1)
        )
        stops = [noise - (1 - t) * u(jnp.float32(t)) for t in times]
        return jnp.stack(
            [jnp.clip(a, -1, 1) if t == 0 else a
             for t, a in zip(times, stops, strict=True)]
        )  # fmt: skip

    def q(self, action) -> Float[Array, "..."]:
        """The critic's value of actions [..., 2], in units of the reward."""
        q = q_value(self.agent, self.state.critic, jnp.zeros(1), action)
        return q / self.agent.config.reward_scale


@partial(jax.jit, static_argnums=0)
def _transport(agent, policy, noise, key):
    return agent.transport(policy, noise, jnp.zeros((len(noise), 1)), key)


def check_reward(reward: Reward, num: int = 1000) -> None:
    """Refuse a function that is not a reward over the square.

    Args:
        reward: maps actions [..., 2] to [...].
        num: actions to try.

    Raises:
        ValueError: not one finite number for each action, or not JAX.
    """
    actions = jax.random.uniform(
        jax.random.PRNGKey(0), (num, 2), minval=-1, maxval=1
    )
    value = np.asarray(reward(actions))
    if value.shape != (num,):
        raise ValueError(
            f"the reward maps actions of shape {(num, 2)} to {value.shape}; "
            f"one number for each action is wanted: {(num,)}"
        )
    try:
        jax.eval_shape(reward, actions)
    except jax.errors.JAXTypeError:
        raise ValueError(
            "JAX cannot trace the reward, which computes with NumPy or asks "
            "for a value by `if`; jax.numpy and jnp.where are wanted"
        ) from None
    if not np.all(np.isfinite(value)):
        wrong = np.asarray(actions, float)[~np.isfinite(value)][0]
        where = wrong.round(3).tolist()
        raise ValueError(
            f"the reward of action {where} is not finite; a finite number "
            "for every action in [-1, 1]^2 is wanted"
        )


CHUNK = 500  # updates between two looks at the metrics


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def advance(agent, reward, noise, share, state, keys, updates):
    """Updates of every seed, and the last metrics; any number of them."""
    axes = seed_axes(state)

    def one(state, key):
        k_query, k_update = jax.random.split(key)
        batch = query(agent, state, reward, noise, share, k_query)
        batch = agent.revise(state, batch)
        return agent.update(state, batch, k_update)

    def every(state):
        each = jax.vmap(lambda key: jax.random.fold_in(key, state.step))
        return jax.vmap(one, (axes, 0), (axes, 0))(state, each(keys))

    none = jax.tree.map(jnp.zeros_like, jax.eval_shape(every, state)[1])
    body = lambda _, carry: every(carry[0])
    return jax.lax.fori_loop(0, updates, body, (state, none))


def fit_seeds(
    algo: str,
    reward: Reward,
    keys,
    steps: int | float,
    profile: str | None = None,
    noise: float = 0.0,
    known: bool = False,
    on_policy: float = 0.5,
    progress: Callable[[int], None] | None = None,
    **overrides,
) -> list[Sampler]:
    """Train one agent per key on a reward over the square, side by side.

    Args:
        algo: key of som.AGENTS.
        reward: maps actions [..., 2] in [-1, 1]^2 to [...], in jax.numpy.
        keys: random keys [S, 2], or S whole numbers.
        steps: updates.
        profile: of the agent's settings; by default `bandit` if it has
            one, else `laptop`, with tau 0.01.
        noise: standard deviation added to the reward at every query.
        known: use the reward itself as the critic.
        on_policy: share of the queries that the policy chooses.
        progress: called with the number of updates made, now and then.
        **overrides: fields of the agent's config.

    Returns:
        One sampler per key.

    Raises:
        ValueError: no usable reward, unknown algorithm or field.
        FloatingPointError: training diverged.
    """
    check_reward(reward)
    if not 1 <= steps < float("inf"):
        raise ValueError(f"steps is {steps}; at least 1 is wanted")
    keys = jnp.stack([as_key(key) for key in keys])
    settings = {"discount": 0.0, "reward_scale": 1.0} | overrides
    kind = AGENTS[closest(algo, AGENTS, "algorithm")]
    if kind.on_policy:
        raise ValueError(
            f"{algo} learns from its own latest actions only; wanted is an "
            "agent that learns from any"
        )
    if profile is None:
        profile = "bandit" if "bandit" in kind.profiles else "laptop"
        pace = {"tau": 0.01, "policy_delay": 2}  # there is no hurry here
        settings = pace | settings
    agent = make_agent(algo, 1, 2, profile, **settings)
    if known:
        agent = with_known_critic(agent, reward)
    state = jax.vmap(agent.init)(keys)
    state = state._replace(step=state.step[0])
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    done = 0
    while done < int(steps):
        chunk = min(CHUNK, int(steps) - done)
        state, metrics = advance(
            agent, reward, noise, on_policy, state, keys, chunk
        )
        done += chunk
        if not all(np.all(np.isfinite(m)) for m in metrics.values()):
            check_reward(reward, 10**6)
            raise FloatingPointError(f"{algo} diverged at update {done}")
        if progress:
            progress(done)
    state = state._replace(step=jnp.full(len(keys), state.step))
    pick = lambda i: jax.tree.map(lambda x: x[i], state)
    return [Sampler(agent, pick(i)) for i in range(len(keys))]


def fit(
    algo: str, reward: Reward, key, steps: int | float, **options
) -> Sampler:
    """Train an agent on a reward over the square.

    Args:
        algo, reward, steps, options: as in fit_seeds.
        key: random key, or a whole number.

    Returns:
        The map from noise [n, 2] to actions [n, 2] that was learned.

    Raises:
        ValueError, FloatingPointError: as in fit_seeds.
    """
    return fit_seeds(algo, reward, [key], steps, **options)[0]


# %% Counting
def noise_grid(size: int = 7, reach: float = 2.0) -> np.ndarray:
    """Noise on a regular grid of [-reach, reach]^2: [size^2, 2]."""
    line = np.linspace(-reach, reach, size)
    return np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)


def draw_arrows(ax, reward: Reward, path, modes=None) -> None:
    """Draw a reward, and the way of each noise to its action.

    Args:
        ax: matplotlib axes.
        reward: maps actions [..., 2] to [...].
        path: [T + 1, n, 2], as Sampler.path returns it.
        modes: crosses to draw, [m, 2].
    """
    line = np.linspace(-1, 1, 120)
    plane = jnp.stack(jnp.meshgrid(line, line), -1)
    ax.contourf(line, line, reward(plane), 12, cmap="Blues")
    path = np.asarray(path)
    if modes is not None:
        ax.plot(*np.asarray(modes).T, "x", color="#E69F00", ms=7, mew=2)
    if len(path) > 2:
        ax.plot(*path.transpose(2, 0, 1), color="0.45", lw=0.5)
    else:
        for start, end in zip(path[0], path[1], strict=True):
            arrow = {"arrowstyle": "->", "color": "0.35", "lw": 0.7}
            ax.annotate("", end, start, arrowprops=arrow)
    ax.plot(*path[0].T, "o", color="black", ms=2)
    ax.plot(*path[-1].T, "o", color="#D55E00", ms=3)
    reach = max(1.0, float(np.abs(path[0]).max())) * 1.05
    ax.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach))
    ax.set(xticks=[], yticks=[])
