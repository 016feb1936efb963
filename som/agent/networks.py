"""Networks.

Exported by tools/export.py from book/agent/networks.md; edit the chapter.
"""

__all__ = [
    "mish",
    "EPSILON",
    "MLP",
    "time_features",
    "TimeEmbedding",
    "Field",
    "Policy",
    "twice",
    "Critic",
]

# %% Imports
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


# %% Many actions for one state
@jax.custom_jvp
def mish(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The activation x tanh(log(1 + e^x)), Equation (eq-networks-mish)."""
    return _mish_and_slope(x)[0]


@mish.defjvp
def _(x, tangent):
    value, slope = _mish_and_slope(*x)
    return value, slope * tangent[0]


def _mish_and_slope(x):
    y = jnp.exp(jnp.minimum(x, 20.0))
    m = y * (y + 2)
    ratio = m / (m + 2)
    return x * ratio, ratio + 4 * x * y * (y + 1) / (m + 2) ** 2


EPSILON = 1e-3  # added to the variances of a normalisation


class MLP(nn.Module):
    """Perceptron on the concatenation of its inputs.

    The first layer keeps one kernel per input and adds the products, so
    inputs only need shapes that broadcast: a state [O] meets its candidate
    actions [K, A] without being copied K times. Weights start with variance
    1 / (inputs of the layer), biases at zero.

    Args:
        width: units per hidden layer.
        depth: number of hidden layers, at least 1.
        size: number of outputs.
        activation: between the layers, a name of jax.nn.
        batch_norm: normalise what enters each layer (chapter batch_norm).
        training: by the statistics of the batch, not the running ones.
    """

    width: int
    depth: int
    size: int
    activation: str = "gelu"
    batch_norm: bool = False
    training: bool = False

    @nn.compact
    def __call__(
        self, *inputs: Float[Array, "... _"]
    ) -> Float[Array, "... S"]:
        def even(x):
            if not self.batch_norm:
                return x
            past = not self.training
            return nn.BatchNorm(past, momentum=0.99, epsilon=EPSILON)(x)

        fan_in = sum(x.shape[-1] for x in inputs)
        h = jnp.zeros(())
        for i, x in enumerate(inputs):
            init = nn.initializers.variance_scaling(
                x.shape[-1] / fan_in, "fan_in", "truncated_normal"
            )
            h += nn.Dense(self.width, use_bias=i == 0, kernel_init=init)(
                even(x)
            )
        name = self.activation
        bend = mish if name == "mish" else getattr(jax.nn, name, None)
        if not callable(bend):
            raise ValueError(
                f"activation is {name[:40]!r}; a function of jax.nn is wanted"
            )
        for _ in range(self.depth - 1):
            h = nn.Dense(self.width)(even(bend(h)))
        return nn.Dense(self.size)(even(bend(h)))


# %% Features of time
def time_features(
    t: Float[Array, "..."], size: int = 16
) -> Float[Array, "... F"]:
    """Sinusoids of t at frequencies 10000^(-2j / size).

    Args:
        t: diffusion times, unscaled, in [0, 1]: [...].
        size: F, even: F/2 sines, then F/2 cosines.

    Returns:
        Features, [..., F].
    """
    half = size // 2
    angles = t[..., None] * 10000.0 ** (-jnp.arange(half) / half)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)


class TimeEmbedding(nn.Module):
    """Sixteen sinusoids of a time, through 16 -> 32 -> 16."""

    @nn.compact
    def __call__(self, t: Float[Array, "..."]) -> Float[Array, "... 16"]:
        return nn.Dense(16)(nn.gelu(nn.Dense(32)(time_features(t))))


# %% The policy network
class Field(nn.Module):
    """A vector for each action, given the state and times: [..., A].

    Args of `vector`: action a [..., A], observation [..., O], any number of
    times [...], with leading shapes that broadcast.

    Args:
        action_size: A.
        width: units per hidden layer.
        depth: number of hidden layers.
        activation: between the layers, a name of jax.nn.
    """

    action_size: int
    width: int
    depth: int
    activation: str = "gelu"

    @nn.compact
    def vector(
        self,
        a: Float[Array, "... A"],
        observation: Float[Array, "... O"],
        *times: Float[Array, "..."],
    ) -> Float[Array, "... A"]:
        """What a subclass's call returns, given its times."""
        embedded = [TimeEmbedding()(t) for t in times]
        mlp = MLP(self.width, self.depth, self.action_size, self.activation)
        return mlp(observation, a, *embedded)


class Policy(Field):
    """Average velocity u(a, r, t, s), the one-step policy: [..., A].

    Args of a call: point a [..., A], times r <= t [...], observation
    [..., O].

    Args:
        residual: add the point to the output, Equation
            (eq-networks-residual); the rest as in Field.
    """

    residual: bool = False

    def __call__(self, a, r, t, observation) -> Float[Array, "... A"]:
        """A field given the end t and the length t - r."""
        u = self.vector(a, observation, t, t - r)
        return a + u if self.residual else u


# %% Twin critics in one pass
@cache
def twice(module: type[nn.Module], in_axes: Any = None) -> Any:
    """Two of a module with parameters of their own, as one stacked module.

    Args:
        module: its class.
        in_axes: axis of the twin in each input; None, both see the same.

    Returns:
        A class like it, one for the same arguments; the last axis of a
        call's results is the twin.
    """
    return nn.vmap(
        module,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        out_axes=-1,
        axis_size=2,
    )


LIMIT = 5.0


def middles(bins):
    edges = jnp.linspace(-LIMIT, LIMIT, bins + 1)
    return (edges[1:] + edges[:-1]) / 2


def smoothed(value, bins):
    """HL-Gauss: [B, 1] to the masses of a Gaussian in the bins, [B, bins, 1]."""
    edges = jnp.linspace(-LIMIT, LIMIT, bins + 1)
    sigma = 0.75 * 2 * LIMIT / bins
    value = jnp.clip(value, -LIMIT, LIMIT)
    below = jax.scipy.special.erf((edges - value) / (2**0.5 * sigma))
    mass = jnp.diff(below, axis=-1) / (below[:, -1:] - below[:, :1])
    return mass[..., None]


class Critic(nn.Module):
    """Twin distributional critics: mean and std of the return, [..., 2] each.

    Both twins are evaluated as one stacked network; the last axis of the
    results is the twin. Leading shapes of the inputs broadcast.

    Args:
        width: units per hidden layer.
        depth: number of hidden layers.
        activation: between the layers, a name of jax.nn.
        batch_norm: normalise what enters each layer (chapter batch_norm).
        training: by the statistics of the batch, not the running ones.
    """

    width: int
    depth: int
    activation: str = "gelu"
    batch_norm: bool = False
    training: bool = False
    bins: int = 0  # categorical head on [-LIMIT, LIMIT]

    @nn.compact
    def __call__(
        self,
        observation: Float[Array, "... O"],
        action: Float[Array, "... A"],
    ) -> tuple[Float[Array, "... 2"], Float[Array, "... 2"]]:
        mlp = twice(MLP)(
            self.width,
            self.depth,
            self.bins or 2,
            self.activation,
            self.batch_norm,
            self.training,
        )
        if self.bins:
            log_p = jax.nn.log_softmax(mlp(observation, action), -2)
            return jnp.einsum("...bt,b->...t", jnp.exp(log_p), middles(self.bins)), log_p
        mean, raw = jnp.moveaxis(mlp(observation, action), -2, 0)
        return mean, nn.softplus(raw)
