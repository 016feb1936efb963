"""What a policy's candidates look like.

Exported by tools/export.py from book/mujoco/policies.md; edit the chapter.
"""

__all__ = [
    "draw_candidates",
    "candidate_q",
    "q_statistics",
    "PERPLEXITY",
    "embed",
    "kernel_regression",
    "heat_map",
]

# %% Imports
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.spatial import cKDTree
from threadpoolctl import threadpool_limits

from som.agent.actor_critic import candidates, q_value
from som.training.policy import Policy, normalize, rollout_states


# %% Candidates and their Q
def _check_states(policy, states):
    size = policy.agent.observation_size
    if states.ndim != 2 or states.shape[1] != size:
        raise ValueError(
            f"states has shape {list(states.shape)}; [S, {size}] is wanted"
        )


def draw_candidates(
    policy: Policy,
    states: Float[np.ndarray, "S O"],
    num: int,
    key: jax.Array,
) -> Float[np.ndarray, "N S A"]:
    """Candidates of a policy, as best of N draws them before it picks.

    Args:
        policy: trained.
        states: observations, [S, O].
        num: N, candidates for each state.
        key: random key.

    Returns:
        Actions in [-1, 1], [N, S, A].

    Raises:
        ValueError: no candidates, or states of another size.
    """
    _check_states(policy, states)
    if num < 1:
        raise ValueError(f"num is {num}; at least 1 is wanted")
    params = policy.agent.acting_policy(policy.state)
    seen = normalize(states, policy.scale)
    return np.asarray(_candidates(policy.agent, params, seen, key, num))


def candidate_q(
    critic: Policy,
    states: Float[np.ndarray, "S O"],
    actions: Float[np.ndarray, "N S A"],
) -> Float[np.ndarray, "N S"]:
    """Q of actions by the critic of a trained policy.

    Args:
        critic: the policy whose critic is asked.
        states: observations, [S, O].
        actions: in [-1, 1], [N, S, A].

    Returns:
        The smaller of the twins' means, over the reward scale, [N, S].

    Raises:
        ValueError: states of another size.
    """
    _check_states(critic, states)
    seen = normalize(states, critic.scale)
    q = _q_value(critic.agent, critic.state.critic, seen, actions)
    return np.asarray(q) / critic.agent.config.reward_scale


def q_statistics(
    policies: dict[str, Policy],
    critic: Policy,
    states: Float[np.ndarray, "S O"],
    num: int,
    key: jax.Array,
) -> dict[str, Float[np.ndarray, "2 S"]]:
    """Mean and std of Q over candidates, (eq-policies-statistics).

    Args:
        policies: by name.
        critic: the policy whose critic judges all of them.
        states: observations, [S, O].
        num: N, candidates for each state.
        key: random key; every policy has noise of its own.

    Returns:
        By name, mean and standard deviation for each state, [2, S].

    Raises:
        ValueError: no candidates, or states of another size.
    """
    stats, keys = {}, jax.random.split(key, len(policies))
    for key, (name, policy) in zip(keys, policies.items(), strict=True):
        actions = draw_candidates(policy, states, num, key)
        q = candidate_q(critic, states, actions)
        stats[name] = np.stack([q.mean(0), q.std(0)])
    return stats


_candidates = jax.jit(candidates, static_argnums=(0, 4))
_q_value = jax.jit(q_value, static_argnums=0)


# %% A map of the actions
PERPLEXITY = 30  # neighbours that a point of the map should keep


def embed(
    points: Float[np.ndarray, "P A"], seed: int = 0
) -> Float[np.ndarray, "P 2"]:
    """Map of points by t-SNE (van der Maaten and Hinton, 2008).

    Args:
        points: actions, [P, A], more than PERPLEXITY of them.
        seed: of the optimiser.

    Returns:
        Places on the map, [P, 2], without units.

    Raises:
        ValueError: too few points, or points on a line.
    """
    num, size = points.shape
    if num <= PERPLEXITY or size < 2:
        raise ValueError(
            f"points has shape [{num}, {size}]; more than {PERPLEXITY} "
            "points of at least 2 coordinates are wanted"
        )
    from sklearn.manifold import TSNE  # takes a second: not with the rest

    method = TSNE(perplexity=PERPLEXITY, max_iter=500, random_state=seed)
    with threadpool_limits(1):
        return method.fit_transform(np.asarray(points, np.float32))


# %% The landscape under the map
def kernel_regression(
    at: Float[np.ndarray, "M 2"],
    points: Float[np.ndarray, "P 2"],
    values: Float[np.ndarray, " P"],
    width: float,
) -> Float[np.ndarray, " M"]:
    """Average of values with Gaussian weights (Nadaraya and Watson).

    Args:
        at: where it is wanted, [M, 2].
        points: where the values are, [P, 2].
        values: [P].
        width: h, deviation of the kernel, in units of the points.

    Returns:
        The averages, [M].

    Raises:
        ValueError: a width that is not positive.
    """
    if not width > 0:
        raise ValueError(f"width is {width}; a positive number is wanted")
    return np.asarray(_weigh(at, points, values, width))


@jax.jit
def _weigh(at, points, values, width) -> Array:
    square = jnp.sum((at[:, None] - points) ** 2, -1)
    return jax.nn.softmax(-square / (2 * width**2), -1) @ values


def heat_map(
    points: Float[np.ndarray, "P 2"],
    values: Float[np.ndarray, " P"],
    size: int = 80,
) -> tuple[
    Float[np.ndarray, " G"], Float[np.ndarray, " G"], Float[np.ndarray, "G G"]
]:
    """Kernel regression on a grid around the points, with Scott's width.

    Args:
        points: places on a map, [P, 2].
        values: [P].
        size: G, grid points along each axis.

    Returns:
        Both axes [G] and the averages [G, G], rows from low to high; nan
        where the nearest point is farther than three widths.
    """
    width = len(points) ** (-1 / 6) * np.sqrt(np.var(points, 0).mean())
    low, high = points.min(0) - width, points.max(0) + width
    x, y = np.linspace(low, high, size).T
    at = np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)
    heat = kernel_regression(at, points, values, width)
    nearest = cKDTree(points).query(at)[0]
    heat = np.where(nearest < 3 * width, heat, np.nan)
    return x, y, heat.reshape(size, size)
