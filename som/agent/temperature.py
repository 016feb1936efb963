"""Temperature.

Exported by tools/export.py from book/agent/temperature.md; edit the chapter.
"""

__all__ = [
    "noise_entropy",
    "temperature_loss",
    "resting_alpha",
]

# %% Imports
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


# %% Entropy of the noise
def noise_entropy(
    alpha: Float[Array, ""] | float, noise_scale: float, action_size: int
) -> Float[Array, ""]:
    """Entropy of the noise N(0, (noise_scale alpha)^2 I), closed form.

    Args:
        alpha: temperature, positive.
        noise_scale: c, standard deviation of the noise at alpha = 1.
        action_size: A.

    Returns:
        Entropy in nats, a scalar.
    """
    log_std = jnp.log(noise_scale * alpha)
    return action_size * (log_std + 0.5 * np.log(2 * np.pi * np.e))


# %% The loss that moves the temperature
def temperature_loss(
    log_alpha: Float[Array, ""],
    target_entropy: float,
    noise_scale: float,
    action_size: int,
) -> Float[Array, ""]:
    """Loss whose gradient in log(alpha) is the excess of entropy.

    Args:
        log_alpha: logarithm of the temperature, scalar.
        target_entropy: entropy aimed at, nats over all dimensions.
        noise_scale: c, standard deviation of the noise at alpha = 1.
        action_size: A.

    Returns:
        log(alpha) * (entropy - target), the entropy held constant.
    """
    alpha = jnp.exp(jax.lax.stop_gradient(log_alpha))
    entropy = noise_entropy(alpha, noise_scale, action_size)
    return log_alpha * (entropy - target_entropy)


def resting_alpha(
    target_entropy_per_action: float, noise_scale: float
) -> float:
    """Temperature at which the noise has its target entropy, for any A.

    Args:
        target_entropy_per_action: entropy aimed at, nats per dimension.
        noise_scale: c, standard deviation of the noise at alpha = 1.

    Returns:
        alpha, where the gradient of temperature_loss vanishes.
    """
    log_std = target_entropy_per_action - 0.5 * np.log(2 * np.pi * np.e)
    return float(np.exp(log_std) / noise_scale)
