"""LQL and NC-LQL: no actor at all.

Exported by tools/export.py from book/baselines/nclql.md; edit the chapter.
"""

__all__ = [
    "NoisyCritic",
    "LangevinConfig",
    "LAPTOP",
    "level_step",
    "Langevin",
    "LQL",
    "NCLQL",
]

# %% Imports
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from som.agent.actor_critic import (
    AGENTS,
    BASELINE_LOOPS,
    LAPTOP_FRAME,
    ActorCritic,
    ActorCriticConfig,
    at_least_one,
    best_of_n,
    critic_step,
)
from som.agent.critic import Transition, polyak
from som.agent.networks import MLP, TimeEmbedding, twice
from som.baselines.qsm import langevin_path
from som.theory.probability_flow import unit_rescale


# %% The critic that knows its level
class NoisyCritic(nn.Module):
    """Twin critics that see a noise level: mean and std, [..., 2] each.

    Args of a call: observation [..., O], action [..., A], level 0 to L - 1
    [...], by default the last, with leading shapes that broadcast.

    Args:
        width: units per hidden layer.
        depth: number of hidden layers.
        num_levels: L; the last level is the critic proper.
        activation: between the layers, a name of jax.nn.
    """

    width: int
    depth: int
    num_levels: int
    activation: str = "mish"

    @nn.compact
    def __call__(
        self,
        observation: Float[Array, "... O"],
        action: Float[Array, "... A"],
        level: Any = None,
    ) -> tuple[Float[Array, "... 2"], Float[Array, "... 2"]]:
        level = self.num_levels - 1 if level is None else level
        embed = twice(TimeEmbedding)()
        mlp = twice(MLP, in_axes=(None, None, -1))(
            self.width, self.depth, 2, self.activation
        )
        when = embed(jnp.asarray(level, jnp.float32))
        mean, raw = jnp.moveaxis(mlp(observation, action, when), -2, 0)
        return mean, nn.softplus(raw)


# %% The agent
@dataclass(frozen=True)
class LangevinConfig(ActorCriticConfig):
    """Settings of LQL and NC-LQL; defaults are those of NC-LQL's code."""

    activation: str = "mish"  # between the layers, a name of jax.nn
    distributional: bool = False  # critics predict a std beside the mean
    num_particles: int = 1  # walks per action; the best by Q acts
    noise_scale: float = 0.0  # no noise beside the walk's own

    num_levels: int = 10  # L; 1 is LQL
    num_steps: int = 2  # T, steps per level
    noise_range: tuple[float, float] = (0.1, 0.001)  # first and last sigma
    step_size: float = 1e-4  # eta of the last level
    weight: float = 500.0  # w, factor of the gradient or its length
    unit: bool = True  # keep only the gradient's direction

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "num_levels", "num_steps")
        if self.batch_norm and self.num_levels > 1:
            raise ValueError(
                "batch_norm is True; critics with noise levels have none"
            )
        first, last = self.noise_range
        if not (first >= last > 0 and self.step_size > 0):
            raise ValueError(
                f"noise_range is {self.noise_range} and step_size "
                f"{self.step_size}; positive numbers are wanted, the noise "
                "falling"
            )


LAPTOP: dict[str, Any] = LAPTOP_FRAME | {
    "reward_scale": 0.2,  # a temperature here
    "activation": "gelu",
    "num_particles": 1,
}  # what the profiles `laptop` and `bandit` share


def level_step(agent: "Langevin", before, critic, opt, batch, key):
    """One Adam step of the noisy levels towards the clean one.

    Args:
        before: critics that give the target.
        critic, opt: critics that learn, and their optimizer's state.
        batch: transitions, leading axis B.
        key: random key.

    Returns:
        New critics, optimizer state, and the loss.
    """
    k_level, k_noise = jax.random.split(key)
    s, a = batch.observation, batch.action
    num_levels = agent.config.num_levels
    target = jnp.mean(agent.twins(before, s, a, num_levels - 1), -1)
    level = jax.random.randint(k_level, target.shape, 0, num_levels - 1)
    noise = jax.random.normal(k_noise, a.shape)
    a_l = a + agent.sigmas[level][:, None] * noise

    def loss(params):
        now = critic | {"params": params}
        gap = agent.twins(now, s, a_l, level) - target[:, None]
        return jnp.sum(jnp.mean(gap**2, 0))

    value, grads = jax.value_and_grad(loss)(critic["params"])
    return *agent.critic_adam(critic, grads, opt), value


@dataclass(frozen=True)
class Langevin(ActorCritic):
    """What LQL and NC-LQL share: a critic, and walks on it.

    Args:
        config: see LangevinConfig.
        observation_size: O.
        action_size: A; actions live in [-1, 1]^A.
    """

    config: LangevinConfig

    loops: ClassVar[dict[str, dict[str, Any]]] = BASELINE_LOOPS

    @property
    def sigmas(self) -> Float[Array, "L"]:
        """Standard deviation of the noise of each level."""
        levels = np.geomspace(
            *self.config.noise_range, self.config.num_levels
        )
        return jnp.asarray(levels, jnp.float32)

    @property
    def critic_net(self) -> Any:
        """A `Critic`, or a `NoisyCritic` where there are levels."""
        config = self.config
        if config.num_levels == 1:
            return super().critic_net
        return NoisyCritic(
            config.width, config.depth, config.num_levels, config.activation
        )

    def init_policy(self, key) -> Any:
        """There is none."""
        return ()

    def acting_policy(self, state) -> Any:
        """The online critics."""
        return state.critic

    def twins(self, critic, observation, action, level) -> Array:
        """Both twins at a level, [..., 2]; for some critics all are one."""
        net = self.critic_net
        at = (level,) if isinstance(net, NoisyCritic) else ()
        return net.apply(critic, observation, action, *at)[0]

    def transport(self, policy, noise, observation, key) -> Array:
        """The walk on the critics `policy`, [L T + 1, ..., A]."""
        config, sigmas = self.config, self.sigmas

        def drift(a, level):
            total = lambda a: jnp.sum(
                self.twins(policy, observation, a, level)
            )
            g, w = jax.grad(total)(a), config.weight
            return unit_rescale(g, w) if config.unit else w * g

        start = 2 * jax.scipy.special.ndtr(noise) - 1
        sizes = config.step_size * (sigmas / sigmas[-1]) ** 2
        return langevin_path(drift, start, sizes, key, config.num_steps)

    def next_action(self, state, observation, key) -> Array:
        """Where a walk on the online critics ends, [B, A]."""
        return best_of_n(self, state.critic, state.critic, observation, key)

    def update(self, state, batch: Transition, key):
        """One update of the critics: Bellman, then the noisy levels.

        Args:
            batch: transitions, leading axis B.
            key: random key.

        Returns:
            New state and a flat dict of scalar metrics.
        """
        k_critic, k_level = jax.random.split(key)
        critic, opt, bound, metrics = critic_step(
            self, state, batch, k_critic
        )
        if self.config.num_levels > 1:
            critic, opt, loss = level_step(
                self, state.critic, critic, opt, batch, k_level
            )
            metrics |= {"critic/level_loss": loss}
        return state._replace(
            critic=critic,
            target_critic=polyak(
                state.target_critic, critic, self.config.tau
            ),
            critic_opt=opt,
            bound=bound,
            step=state.step + 1,
        ), metrics


@dataclass(frozen=True)
class LQL(Langevin):
    """Langevin Q-learning: acts by a walk on the critics."""

    profiles: ClassVar[dict[str, Any]] = {
        "paper": LangevinConfig(
            num_levels=1,
            num_steps=20,
            step_size=1e-2,
            weight=0.5,
            unit=False,
        ),
        "laptop": LangevinConfig(
            **LAPTOP,
            num_levels=1,
            num_steps=20,
            step_size=1e-2,
            weight=50.0,
            unit=False,
        ),
        "bandit": LangevinConfig(
            **LAPTOP,
            num_levels=1,
            num_steps=100,
            step_size=2e-3,
            weight=10.0,
            unit=False,
        ),
    }


@dataclass(frozen=True)
class NCLQL(Langevin):
    """Noise-conditioned LQL: the walk descends through levels of blur."""

    profiles: ClassVar[dict[str, Any]] = {
        "paper": LangevinConfig(),
        "laptop": LangevinConfig(**LAPTOP),
        "bandit": LangevinConfig(
            **LAPTOP,
            noise_range=(0.5, 0.02),
            step_size=4e-5,
            weight=50.0,
        ),
    }


AGENTS["nclql"], AGENTS["lql"] = NCLQL, LQL
