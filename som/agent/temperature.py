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


# %% Entropy of the noise
def noise_entropy(alpha, noise_scale: float, action_size: int):
    """Entropy of N(0, (noise_scale alpha)^2 I) in nats, closed form."""
    log_std = jnp.log(noise_scale * alpha)
    return action_size * (log_std + 0.5 * np.log(2 * np.pi * np.e))


# %% The loss that moves the temperature
def temperature_loss(
    log_alpha, target_entropy: float, noise_scale: float, action_size: int
):
    """log(alpha) * (entropy - target), the entropy held constant."""
    alpha = jnp.exp(jax.lax.stop_gradient(log_alpha))
    entropy = noise_entropy(alpha, noise_scale, action_size)
    return log_alpha * (entropy - target_entropy)


def resting_alpha(target_entropy_per_action: float, noise_scale: float) -> float:
    """Where the temperature comes to rest, for any action size."""
    log_std = target_entropy_per_action - 0.5 * np.log(2 * np.pi * np.e)
    return float(np.exp(log_std) / noise_scale)
