"""SAC: a Gaussian that is paid for its entropy.

Exported by tools/export.py from book/baselines/sac.md; edit the chapter.
"""

__all__ = [
    "log_slope",
    "squash",
    "LOG_STD",
    "SACConfig",
    "LAPTOP",
    "SAC",
]

# %% Imports
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from som.agent.actor_critic import (
    AGENTS,
    BASELINE_LOOPS,
    EFFICIENT_LOOPS,
    LAPTOP_FRAME,
    SAMPLE_EFFICIENT,
    ActorCritic,
    ActorCriticConfig,
    best_of_n,
    q_value,
)
from som.agent.critic import Transition
from som.agent.networks import MLP
from som.training.export import OnePass, first_noise, layers, one_pass


# %% The density of a squashed Gaussian
def log_slope(u: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(1 - tanh(u)^2), exact also where tanh(u) rounds to one."""
    return 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))


def squash(
    mean: Float[Array, "... A"],
    log_std: Float[Array, "... A"],
    noise: Float[Array, "... A"],
    jacobian: bool = True,
) -> tuple[Float[Array, "... A"], Float[Array, "..."]]:
    """A squashed Gaussian's action and its log-density.

    Args:
        mean, log_std: of the Gaussian before tanh, [..., A].
        noise: standard normal, [..., A].
        jacobian: count the slope of tanh; without it the second result is
            the log-density of u, not of the action.

    Returns:
        tanh(mean + std * noise), [..., A], and log pi of it in nats, [...].
    """
    u = mean + jnp.exp(log_std) * noise
    inner = jax.scipy.stats.norm.logpdf(noise) - log_std
    return jnp.tanh(u), jnp.sum(inner - jacobian * log_slope(u), -1)


# %% The agent
LOG_STD = (-20.0, 0.5)  # the range of the Gaussian's log-std


@dataclass(frozen=True)
class SACConfig(ActorCriticConfig):
    """Settings of SAC; defaults are Table 3 of the paper."""

    actor_lr: float = 3e-4  # Adam step of the policy
    critic_lr: float = 3e-4  # Adam step of the critics
    alpha_lr: float = 3e-4  # Adam step of log alpha
    alpha_delay: int = 1  # updates between two steps of alpha
    target_entropy: float = -1.0  # nats per action dimension
    noise_scale: float = 0.0  # the policy's own spread explores
    num_particles: int = 1  # N of best-of-N in acting
    distributional: bool = False  # critics predict a std beside the mean
    initial_alpha: float = math.e  # where the temperature starts
    policy_delay: int = 1  # updates per step of policy and targets
    ema_policy: bool = False  # act with the lagging copy of the policy
    jacobian: bool = True  # count the slope of tanh in the log-density


LAPTOP = SACConfig(**LAPTOP_FRAME | {"num_particles": 1}, alpha_lr=1e-3)


@dataclass(frozen=True)
class SAC(ActorCritic):
    """Soft actor-critic (Haarnoja et al., 2018).

    Args:
        config: see SACConfig.
        observation_size: O.
        action_size: A; actions live in [-1, 1]^A.
    """

    config: SACConfig

    profiles: ClassVar[dict[str, Any]] = {
        "paper": SACConfig(),
        "laptop": LAPTOP,
        "sample-efficient": replace(LAPTOP, **SAMPLE_EFFICIENT),
        "relax": SACConfig(jacobian=False),  # a defect, see "Differences"
    }
    loops: ClassVar[dict[str, dict[str, Any]]] = {
        **BASELINE_LOOPS,
        **EFFICIENT_LOOPS,
        "laptop": {"normalize_observations": True},
        "relax": BASELINE_LOOPS["paper"],
    }

    @property
    def policy_net(self) -> Any:
        """The network of mean and log-std, an `MLP` to [..., 2 A]."""
        c = self.config
        return MLP(c.width, c.depth, 2 * self.action_size, c.activation)

    def init_policy(self, key) -> Any:
        """Fresh parameters of the policy."""
        return self.policy_net.init(key, jnp.zeros(self.observation_size))

    def moments(self, policy, observation) -> tuple[Array, Array]:
        """Mean and log-std before tanh, [..., A] each."""
        out = self.policy_net.apply(policy, observation)
        mean, log_std = jnp.split(out, 2, -1)
        return mean, jnp.clip(log_std, *LOG_STD)

    def draw(self, policy, observation, key) -> tuple[Array, Array]:
        """An action for each observation, [..., A], and its log pi."""
        mean, log_std = self.moments(policy, observation)
        noise = jax.random.normal(key, mean.shape)
        return squash(mean, log_std, noise, self.config.jacobian)

    def transport(self, policy, noise, observation, key) -> Array:
        """One step from noise to tanh(mean + std * noise)."""
        mean, log_std = self.moments(policy, observation)
        return jnp.stack([noise, jnp.tanh(mean + jnp.exp(log_std) * noise)])

    def act(self, state, observation, key, explore: bool = False):
        """A draw when exploring, else tanh of the mean: [..., A].

        With more than one particle, the best of N draws in both cases.
        """
        policy = self.acting_policy(state)
        if explore or self.config.num_particles > 1:
            return best_of_n(self, policy, state.critic, observation, key)
        return jnp.tanh(self.moments(policy, observation)[0])

    def follow(self, state, observation, key) -> tuple[Array, Array]:
        """A draw, [B, A], and alpha log pi, [B]: the price of certainty."""
        action, log_pi = self.draw(state.policy, observation, key)
        return action, jnp.exp(state.log_alpha) * log_pi

    def policy_loss(self, policy, state, batch: Transition, key) -> Array:
        """Mean of alpha log pi - min Q, one draw per state."""
        s = batch.observation
        action, log_pi = self.draw(policy, s, key)
        q = q_value(self, state.critic, s, action)
        return jnp.mean(jnp.exp(state.log_alpha) * log_pi - q)

    def alpha_loss(self, log_alpha, state, batch: Transition, key) -> Array:
        """log(alpha) times the excess of the policy's entropy."""
        log_pi = self.draw(state.policy, batch.observation, key)[1]
        target = self.config.target_entropy * self.action_size
        return log_alpha * (-jnp.mean(log_pi) - target)


AGENTS["sac"] = SAC


# %% Taken away
@one_pass.register(SAC)
def _(agent, state) -> OnePass:
    net = layers("policy", agent.acting_policy(state)["params"], 1)
    num, size = agent.config.num_particles, agent.action_size
    noise = first_noise(num, size, split=False)
    return OnePass("squash", net, noise * (num > 1), LOG_STD)
