"""PPO: many small steps on fresh experience.

Exported by tools/export.py from book/baselines/ppo.md; edit the chapter.
"""

__all__ = [
    "goes_on",
    "discounted_sum",
    "clipped_gain",
    "PPOConfig",
    "PPOState",
    "PPO",
    "improve_policy",
    "improve_value",
    "update",
]

# %% Imports
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from som.agent.actor_critic import AGENTS, at_least_one
from som.agent.critic import Transition
from som.agent.networks import MLP
from som.training.export import OnePass, layers, one_pass


# %% Where an episode ended
def goes_on(batch: Transition) -> Float[Array, "T ..."]:
    """1 where the next row continues the episode, else 0.

    Args:
        batch: rows in time order, [T, ...].
    """
    same = jnp.all(batch.next_observation[:-1] == batch.observation[1:], -1)
    last = jnp.zeros_like(batch.terminated[:1])
    return jnp.concatenate([same, last]) * (1 - batch.terminated)


def discounted_sum(
    x: Float[Array, "T ..."],
    goes_on: Float[Array, "T ..."],
    decay: float,
) -> Float[Array, "T ..."]:
    """Sum of x from each step to its episode's end, Equation (eq-ppo-gae).

    Args:
        x: what is summed, in time order.
        goes_on: 1 where the next row continues the episode, else 0.
        decay: weight of the next row, gamma lambda or gamma.
    """

    def back(after, row):
        x, goes_on = row
        here = x + decay * goes_on * after
        return here, here

    zero = jnp.zeros_like(x[0])
    return jax.lax.scan(back, zero, (x, goes_on), reverse=True)[1]


# %% The clipped objective
def clipped_gain(
    ratio: Float[Array, "*B"], advantage: Float[Array, "*B"], clip: float
) -> Float[Array, "*B"]:
    """The gain of moving probability by a ratio, Equation (eq-ppo-clip).

    Args:
        ratio: new probability over old.
        advantage: of the action.
        clip: epsilon, beyond which no more is gained.
    """
    kept = jnp.clip(ratio, 1 - clip, 1 + clip)
    return jnp.minimum(ratio * advantage, kept * advantage)


# %% The agent
@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO; defaults are Table 4 of the paper.

    Raises:
        ValueError: a size or a number of steps below one.
    """

    width: int = 512  # units per hidden layer
    depth: int = 3  # hidden layers
    activation: str = "gelu"  # between the layers, a name of jax.nn
    discount: float = 0.995  # gamma, per environment step
    trace: float = 0.95  # lambda_A, decay of the advantage a step
    reward_scale: float = 1.0  # factor on every reward
    actor_lr: float = 1e-4  # Adam step of the policy
    value_lr: float = 1e-3  # Adam step of the value
    clip: float = 0.2  # epsilon of the clipped objective
    target_kl: float = 0.01  # the policy stops at 1.5 times this, in nats
    policy_steps: int = 80  # most steps of the policy per chunk
    value_steps: int = 80  # steps of the value per chunk
    initial_log_std: float = -0.5  # log deviation of actions in [-1, 1]

    def __post_init__(self):
        at_least_one(self, "width", "depth", "policy_steps", "value_steps")


class PPOState(NamedTuple):
    """All that changes while PPO learns (a pytree of arrays)."""

    policy: Any  # the mean's parameters under "mean", log_std [A]
    value: Any
    policy_opt: optax.OptState
    value_opt: optax.OptState
    step: Array  # chunks learned from


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimization (Schulman et al., 2017).

    Args:
        config: see PPOConfig.
        observation_size: O.
        action_size: A; the box of actions is [-1, 1]^A.
    """

    config: PPOConfig
    observation_size: int
    action_size: int

    profiles: ClassVar[dict[str, Any]] = {
        "paper": PPOConfig(),
        "laptop": PPOConfig(
            width=64, depth=2, discount=0.99, actor_lr=1e-3, target_kl=0.03
        ),
        "spinningup": PPOConfig(
            width=64, depth=2, activation="tanh", discount=0.99, trace=0.97,
            actor_lr=3e-4,
        ),
    }  # fmt: skip
    loops: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"warmup": 0, "chunk_steps": 4000, "capacity": 4000},
        "laptop": {"warmup": 0, "chunk_steps": 500, "capacity": 500},
        "spinningup": {
            "warmup": 0,
            "chunk_steps": 4000,
            "capacity": 4000,
            "num_envs": 4,
        },
    }
    on_policy: ClassVar[bool] = True  # learns from its latest steps only
    rewrites: ClassVar[bool] = False  # guides are kept in the replay
    learning_only: ClassVar[tuple[str, ...]] = (
        "value",
        "policy_opt",
        "value_opt",
    )  # fields of the state that acting does not need

    def net(self, size: int) -> Any:
        """A network of the observation, an `MLP` with so many outputs."""
        c = self.config
        return MLP(c.width, c.depth, size, c.activation)

    def init(self, key) -> PPOState:
        """Fresh parameters and optimizer states."""
        k_policy, k_value = jax.random.split(key)
        s, A = jnp.zeros(self.observation_size), self.action_size
        log_std = jnp.full(A, self.config.initial_log_std)
        mean = self.net(A).init(k_policy, s)
        policy = {"mean": mean, "log_std": log_std}
        value = self.net(1).init(k_value, s)
        return PPOState(
            policy,
            value,
            optax.adam(self.config.actor_lr).init(policy),
            optax.adam(self.config.value_lr).init(value),
            jnp.zeros((), jnp.int32),
        )

    def mean(self, policy, observation) -> Float[Array, "... A"]:
        """Mean of the Gaussian."""
        return self.net(self.action_size).apply(policy["mean"], observation)

    def log_prob(self, policy, observation, action) -> Float[Array, "..."]:
        """Log-density of actions, not clipped, in nats."""
        mean, std = self.mean(policy, observation), jnp.exp(policy["log_std"])
        return jnp.sum(jax.scipy.stats.norm.logpdf(action, mean, std), -1)

    def values(self, value, observation) -> Float[Array, "..."]:
        """V(s) of observations [..., O]."""
        return self.net(1).apply(value, observation)[..., 0]

    def act(self, state, observation, key, explore: bool = False):
        """A draw when exploring, which may leave the box; else the mean.

        Args:
            observation: [..., O].
            key: random key.
            explore: draw from the Gaussian, as during collection.

        Returns:
            Action [..., A], in [-1, 1] unless exploring.
        """
        mean = self.mean(state.policy, observation)
        if not explore:
            return jnp.clip(mean, -1, 1)
        std = jnp.exp(state.policy["log_std"])
        return mean + std * jax.random.normal(key, mean.shape)

    def update(self, state, batch: Transition, key):
        """Learn from one chunk of the policy's own steps.

        Args:
            batch: what the state's policy has just done, in time order,
                [T, ...].
            key: not used; nothing is random here.

        Returns:
            New state and a flat dict of scalar metrics.
        """
        return update(self, state, batch)


AGENTS["ppo"] = PPO


def improve_policy(agent: PPO, policy, opt, batch: Transition, advantage):
    """Adam steps on the clipped objective until the policy has moved far.

    Args:
        agent: for its networks and settings.
        policy, opt: parameters that made the batch, optimizer state.
        batch: steps [T, ...].
        advantage: normalised, [T, ...].

    Returns:
        policy, opt, the number of steps, and the KL where they ended.
    """
    config, adam = agent.config, optax.adam(agent.config.actor_lr)
    log_prob = lambda p: agent.log_prob(p, batch.observation, batch.action)
    old = log_prob(policy)

    def loss(policy):
        change = log_prob(policy) - old
        gain = clipped_gain(jnp.exp(change), advantage, config.clip)
        return -jnp.mean(gain), -jnp.mean(change)

    look = jax.grad(loss, has_aux=True)  # the gradient, and the KL

    def near(carry):
        _, _, steps, (_, kl) = carry
        more = steps < config.policy_steps
        return more & (kl <= 1.5 * config.target_kl)

    def move(carry):
        policy, opt, steps, (gradient, _) = carry
        updates, opt = adam.update(gradient, opt)
        policy = optax.apply_updates(policy, updates)
        return policy, opt, steps + 1, look(policy)

    start = policy, opt, jnp.zeros((), jnp.int32), look(policy)
    policy, opt, steps, (_, kl) = jax.lax.while_loop(near, move, start)
    return policy, opt, steps, kl


def improve_value(agent: PPO, value, opt, observation, aim):
    """Adam steps on the squared distance from the rewards to go.

    Args:
        agent: for its network and settings.
        value, opt: parameters, optimizer state.
        observation: [..., O].
        aim: rewards to go, [...].

    Returns:
        value, opt, and the mean loss of the steps.
    """
    adam = optax.adam(agent.config.value_lr)
    loss = lambda p: jnp.mean((agent.values(p, observation) - aim) ** 2)

    def move(carry, _):
        value, opt = carry
        error, gradient = jax.value_and_grad(loss)(value)
        updates, opt = adam.update(gradient, opt)
        return (optax.apply_updates(value, updates), opt), error

    steps = agent.config.value_steps
    (value, opt), errors = jax.lax.scan(move, (value, opt), length=steps)
    return value, opt, jnp.mean(errors)


def update(agent: PPO, state: PPOState, batch: Transition):
    """Both halves of PPO's update; see PPO.update."""
    config = agent.config
    value = agent.values(state.value, batch.observation)
    after = agent.values(state.value, batch.next_observation)
    discount = config.discount * (1 - batch.terminated)
    delta = config.reward_scale * batch.reward + discount * after - value
    on = goes_on(batch)
    advantage = discounted_sum(delta, on, config.discount * config.trace)
    aim = value + discounted_sum(delta, on, config.discount)
    spread = jnp.std(advantage) + 1e-8
    advantage = (advantage - jnp.mean(advantage)) / spread
    policy, policy_opt, steps, kl = improve_policy(
        agent, state.policy, state.policy_opt, batch, advantage
    )
    value, value_opt, error = improve_value(
        agent, state.value, state.value_opt, batch.observation, aim
    )
    metrics = {
        "policy/steps": jnp.float32(steps),
        "policy/kl": kl,
        "policy/std": jnp.mean(jnp.exp(policy["log_std"])),
        "value/loss": error,
        "value/mean": jnp.mean(aim),
    }
    state = PPOState(policy, value, policy_opt, value_opt, state.step + 1)
    return state, metrics


# %% Taken away
@one_pass.register(PPO)
def _(agent, state) -> OnePass:
    params = dict(state.policy["mean"]["params"])
    last = f"Dense_{len(params) - 1}"
    wider = (0, 0), (0, agent.action_size)
    bias = [params[last]["bias"], state.policy["log_std"]]
    params[last] = {
        "kernel": jnp.pad(params[last]["kernel"], wider),
        "bias": jnp.concatenate(bias),
    }
    net, noise = layers("policy", params, 1), np.zeros((1, agent.action_size))
    return OnePass("gauss", net, noise)
