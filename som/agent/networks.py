"""Networks.

Exported by tools/export.py from book/agent/networks.md; edit the chapter.
"""

__all__ = [
    "MLP",
    "time_features",
    "TimeEmbedding",
    "Policy",
    "Critic",
]

# %% Imports
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


# %% Several inputs, one perceptron
class MLP(nn.Module):
    """Perceptron on the concatenation of its inputs.

    The first layer keeps one kernel per input and adds the results, so
    inputs only need shapes that broadcast: a state [O] meets its candidate
    actions [K, A] without being copied K times.

    Args:
        width: units per hidden layer.
        depth: number of hidden layers.
        size: number of outputs.
    """

    width: int
    depth: int
    size: int

    @nn.compact
    def __call__(self, *inputs: Float[Array, "... _"]) -> Float[Array, "... S"]:
        fan_in = sum(x.shape[-1] for x in inputs)
        init = nn.initializers.truncated_normal(fan_in**-0.5)
        h = sum(
            nn.Dense(self.width, use_bias=i == 0, kernel_init=init)(x)
            for i, x in enumerate(inputs)
        )
        for _ in range(self.depth - 1):
            h = nn.Dense(self.width)(nn.gelu(h))
        return nn.Dense(self.size)(nn.gelu(h))


# %% Features of time
def time_features(t: Float[Array, "..."], size: int = 16) -> Float[Array, "... F"]:
    """Sinusoids of t at frequencies 10000^(-j / (size/2)), [..., size]."""
    half = size // 2
    angles = t[..., None] * 10000.0 ** (-jnp.arange(half) / half)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class TimeEmbedding(nn.Module):
    """Sixteen sinusoids of a time, through 16 -> 32 -> 16."""

    @nn.compact
    def __call__(self, t: Float[Array, "..."]) -> Float[Array, "... 16"]:
        return nn.Dense(16)(nn.gelu(nn.Dense(32)(time_features(t))))


# %% The policy network
class Policy(nn.Module):
    """Average velocity u(a, r, t, s): [..., A].

    Args:
        action_size: A.
        width: units per hidden layer.
        depth: number of hidden layers.
    """

    action_size: int
    width: int
    depth: int

    @nn.compact
    def __call__(self, a, r, t, observation) -> Float[Array, "... A"]:
        start, length = TimeEmbedding()(t), TimeEmbedding()(t - r)
        mlp = MLP(self.width, self.depth, self.action_size)
        return mlp(observation, a, start, length)


# %% Twin critics in one pass
class Critic(nn.Module):
    """Twin distributional critics: mean and std of the return, [..., 2] each.

    Both twins are evaluated as one stacked network.

    Args:
        width: units per hidden layer.
        depth: number of hidden layers.
    """

    width: int
    depth: int

    @nn.compact
    def __call__(
        self, observation: Float[Array, "... O"], action: Float[Array, "... A"]
    ) -> tuple[Float[Array, "... 2"], Float[Array, "... 2"]]:
        twins = nn.vmap(
            MLP,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=-1,
            axis_size=2,
        )(self.width, self.depth, 2)
        mean, raw = jnp.moveaxis(twins(observation, action), -2, 0)
        return mean, nn.softplus(raw)
