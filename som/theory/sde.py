"""From action to noise: the forward SDE.

Exported by tools/export.py from book/theory/sde.md; edit the chapter.
"""

__all__ = [
    "VP",
    "VE",
    "SDE",
]

# %% Imports
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


# %% The variance-preserving kernel
@dataclass(frozen=True)
class VP:
    """Variance-preserving SDE, da = -beta(t) a / 2 dt + sqrt(beta(t)) dW.

    Equation (1) of the paper, with beta(t) linear in t on [0, 1]. Times t
    are scalars, or arrays that broadcast against the actions.

    Args:
        beta_min: beta(0), per unit of diffusion time.
        beta_max: beta(1), per unit of diffusion time.

    Raises:
        ValueError: unless 0 < beta_min <= beta_max < inf.
    """

    beta_min: float = 0.1
    beta_max: float = 6.0

    def __post_init__(self):
        """Refuse a schedule that is not positive and increasing."""
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                "VP wants 0 < beta_min <= beta_max < inf, got beta_min="
                f"{self.beta_min} and beta_max={self.beta_max}."
            )

    def beta(self, t):
        """Noise rate beta(t), per unit of diffusion time."""
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def integral(self, t):
        """B(t), the integral of beta from 0 to t."""
        slope = self.beta_max - self.beta_min
        return self.beta_min * t + 0.5 * slope * t**2

    def mean(self, t) -> Array:
        """m(t), the share of a_0 that is left at time t."""
        return jnp.exp(-0.5 * self.integral(t))

    def std(self, t) -> Array:
        """sigma(t), from 1 - m(t)^2 without cancellation."""
        return jnp.sqrt(-jnp.expm1(-self.integral(t)))

    def drift(self, a, t):
        """Drift -beta(t) a / 2 at actions a [..., A], [..., A]."""
        return -0.5 * self.beta(t) * a

    def diffusion_squared(self, t):
        """g(t)^2 = beta(t), variance gained per unit of diffusion time."""
        return self.beta(t)

    def prior_std(self) -> float:
        """Standard deviation of the noise that sampling starts from."""
        return 1.0

    def perturb(
        self, key: jax.Array, a0: Float[Array, "*B A"], t
    ) -> Float[Array, "*B A"]:
        """Draw a_t from the kernel p_t(a_t | a_0), Equation (1).

        Args:
            key: random key.
            a0: clean actions, [..., A].
            t: diffusion time in [0, 1], a scalar or [..., 1].

        Returns:
            Noisy actions, [..., A].
        """
        noise = jax.random.normal(key, a0.shape)
        return self.mean(t) * a0 + self.std(t) * noise


# %% The variance-exploding kernel
@dataclass(frozen=True)
class VE:
    """Variance-exploding SDE with a geometric sigma(t), Equation (9).

    Times t are scalars, or arrays that broadcast against the actions.

    Args:
        sigma_min: sigma(0), in units of the action.
        sigma_max: sigma(1), in units of the action.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max < inf.
    """

    sigma_min: float = 0.01
    sigma_max: float = 3.0

    def __post_init__(self):
        """Refuse a schedule that is not positive and increasing."""
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                "VE wants 0 < sigma_min < sigma_max < inf, got sigma_min="
                f"{self.sigma_min} and sigma_max={self.sigma_max}."
            )

    def mean(self, t) -> Array:
        """One: the VE kernel does not shrink the action."""
        return jnp.ones_like(jnp.asarray(t, jnp.float32))

    def std(self, t) -> Array:
        """sigma(t) = sigma_min (sigma_max / sigma_min)^t."""
        ratio = self.sigma_max / self.sigma_min
        return self.sigma_min * jnp.power(ratio, t)

    def drift(self, a, t):
        """Zero at all actions a [..., A], [..., A]."""
        return jnp.zeros_like(a)

    def diffusion_squared(self, t) -> Array:
        """g(t)^2 = d sigma^2 / dt, per unit of diffusion time."""
        rate = math.log(self.sigma_max / self.sigma_min)
        return 2 * rate * self.std(t) ** 2

    def prior_std(self) -> float:
        """Standard deviation of the noise that sampling starts from."""
        return self.sigma_max

    def perturb(
        self, key: jax.Array, a0: Float[Array, "*B A"], t
    ) -> Float[Array, "*B A"]:
        """Draw a_t from the kernel p_t(a_t | a_0), Equation (10).

        Args:
            key: random key.
            a0: clean actions, [..., A].
            t: diffusion time in [0, 1], a scalar or [..., 1].

        Returns:
            Noisy actions, [..., A].
        """
        return a0 + self.std(t) * jax.random.normal(key, a0.shape)


SDE = VP | VE
