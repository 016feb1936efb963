"""Energies and Boltzmann policies.

Exported by tools/export.py from book/theory/boltzmann.md; edit the chapter.
"""

__all__ = [
    "Reward",
    "box_grid",
    "boltzmann_samples",
    "GaussianMixture",
    "EIGHT_MODES_SCALE",
    "normalised_density",
    "eight_gaussians",
    "eight_modes",
    "TALL_MODES",
    "RADIUS",
    "near",
    "moon_gaussians",
    "two_moons",
    "checkerboard",
    "NoisyReward",
    "gaussian_noise",
    "gaussian_bump",
]

# %% Imports
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float


# %% Q as a negative energy
Reward = Callable[[Array], Array]  # [..., A] -> [...]


def box_grid(size: int) -> Float[Array, "G G 2"]:
    """Centres of size x size equal cells of the box [-1, 1]^2.

    Args:
        size: cells along each axis, G.

    Returns:
        Points, [G, G, 2]; the first axis is a_2, the second a_1, as images
        and contour plots want it.
    """
    side = (2 * jnp.arange(size) + 1.0) / size - 1
    return jnp.stack(jnp.meshgrid(side, side), axis=-1)


def boltzmann_samples(
    energy: Reward, key: jax.Array, num_samples: int, grid: int = 256
) -> Float[Array, "N 2"]:
    """Draw actions from p_0 proportional to exp(energy) on [-1, 1]^2.

    Exact for an energy that is constant over each cell of the grid.

    Args:
        energy: alpha * Q, maps actions [..., 2] to [...].
        key: random key.
        num_samples: number of actions, N.
        grid: cells along each axis.

    Returns:
        Actions, [N, 2].
    """
    cell_key, inside_key = jax.random.split(key)
    centres = box_grid(grid).reshape(-1, 2)
    probabilities = jax.nn.softmax(energy(centres))
    a = jax.random.choice(cell_key, centres, (num_samples,), p=probabilities)
    return a + jax.random.uniform(inside_key, a.shape, minval=-1) / grid


# %% A mixture whose diffused score is known
@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """Isotropic Gaussian mixture, with its diffused score in closed form.

    Appendix G of the paper, for any kernel N(mean * a_0, std^2 I).

    Args:
        means: component centres, [M, A], in units of the action.
        weights: positive weights, [M]; need not sum to one.
        std: standard deviation of each component, in units of the action.

    Raises:
        ValueError: if the shapes disagree or weights or std are not positive.
    """

    means: Float[Array, "M A"]
    weights: Float[Array, "M"]
    std: float

    def __post_init__(self):
        """Refuse what is not a mixture."""
        if self.weights.shape != self.means.shape[:-1]:
            raise ValueError(
                "GaussianMixture wants means [M, A] and weights [M], got "
                f"{self.means.shape} and {self.weights.shape}."
            )
        if not self.std > 0:
            raise ValueError(
                f"GaussianMixture wants std > 0, got {self.std}."
            )
        # Values are not known while jax.jit traces.
        traced = isinstance(self.weights, jax.core.Tracer)
        if not traced and not np.all(np.asarray(self.weights) > 0):
            raise ValueError(
                f"GaussianMixture wants weights > 0, got {self.weights}."
            )

    def _components(self, a, mean, std):
        """Offsets [..., M, A], variance v and log w_k N(a; m mu_k, v I)."""
        size = self.means.shape[-1]
        variance = (mean * self.std) ** 2 + std**2
        offsets = mean * self.means - a[..., None, :]
        logits = (
            jnp.log(self.weights / jnp.sum(self.weights))
            - 0.5 * jnp.sum(offsets**2, -1) / variance
            - 0.5 * size * jnp.log(2 * jnp.pi * variance)
        )
        return offsets, variance, logits

    def log_prob(
        self, a: Float[Array, "*B A"], mean=1.0, std=0.0
    ) -> Float[Array, "*B"]:
        """Log-density after diffusion by N(mean * a_0, std^2 I).

        Args:
            a: actions, [..., A].
            mean: m, the kernel's factor; 1 leaves the mixture in place.
            std: sigma, the kernel's standard deviation; 0 adds no noise.

        Returns:
            Logarithm of the density, [...].
        """
        return jax.nn.logsumexp(self._components(a, mean, std)[2], axis=-1)

    def score(
        self, a: Float[Array, "*B A"], mean=1.0, std=0.0
    ) -> Float[Array, "*B A"]:
        """Gradient of log_prob with respect to a, in closed form.

        Args:
            a: actions, [..., A].
            mean: m, the kernel's factor.
            std: sigma, the kernel's standard deviation.

        Returns:
            Score, [..., A].
        """
        offsets, variance, logits = self._components(a, mean, std)
        rho = jax.nn.softmax(logits, axis=-1)
        return jnp.einsum("...m,...ma->...a", rho, offsets) / variance

    def sample(self, key: jax.Array, num_samples: int) -> Float[Array, "N A"]:
        """Draw actions [N, A] from the mixture itself, before diffusion."""
        component_key, noise_key = jax.random.split(key)
        log_weights = jnp.log(self.weights)
        chosen = jax.random.categorical(
            component_key, log_weights, shape=(num_samples,)
        )
        centres = self.means[chosen]
        noise = jax.random.normal(noise_key, centres.shape)
        return centres + self.std * noise


# %% Eight modes
EIGHT_MODES_SCALE = 2.0  # the paper's plane is [-2, 2]^2: a_paper = 2 a


def normalised_density(mixture: GaussianMixture) -> Reward:
    """Make a reward of a mixture: its density divided by its maximum.

    Args:
        mixture: the density, whose peaks lie near the component centres.

    Returns:
        Reward, maps actions [..., A] to values in (0, 1].
    """

    def climb(_, a):
        return a + mixture.std**2 * mixture.score(a)

    peaks = jax.lax.fori_loop(0, 10, climb, mixture.means)
    top = jnp.max(mixture.log_prob(peaks))

    @jax.jit
    def reward(a):
        # Rounding alone could lift a value above one.
        return jnp.exp(jnp.minimum(mixture.log_prob(a) - top, 0.0))

    return reward


def eight_gaussians() -> GaussianMixture:
    """The mixture behind eight_modes, on actions a = a_paper / 2.

    Returns:
        Mixture with centres 0, 2, 4, 6 (east, north, west, south) of twice
        the weight of the others.
    """
    angles = 2 * np.pi * np.arange(8) / 8
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    means = jnp.asarray(np.sqrt(2) * circle / EIGHT_MODES_SCALE, jnp.float32)
    weights = jnp.asarray([2.0, 1.0] * 4)
    return GaussianMixture(means, weights, 0.3 / EIGHT_MODES_SCALE)


def eight_modes() -> Reward:
    """Eight Gaussians on a circle, alternately tall and half as tall.

    Section 5.2 and Appendix F.1 of the paper, on actions a = a_paper / 2:
    radius 0.71, deviation 0.15.

    Returns:
        Reward, maps actions [..., 2] in [-1, 1]^2 to values in [0, 1].
    """
    return normalised_density(eight_gaussians())


# North, east, south, west; Appendix H.3 counts what is within RADIUS.
_OUT = 2**0.5 / EIGHT_MODES_SCALE
TALL_MODES = ((0, _OUT), (_OUT, 0), (0, -_OUT), (-_OUT, 0))
RADIUS = 0.5 / EIGHT_MODES_SCALE


def near(actions, modes=TALL_MODES) -> Bool[np.ndarray, "... m"]:
    """Whether each action [..., 2] is within RADIUS of each mode [m, 2]."""
    gap = np.asarray(actions)[..., None, :] - np.asarray(modes)
    return np.linalg.norm(gap, axis=-1) < RADIUS


# %% Two moons and a checkerboard
def moon_gaussians() -> GaussianMixture:
    """The mixture behind two_moons: 64 components along each half circle.

    Returns:
        Mixture in units of the action, a = (moons - (0.5, 0.25)) / 2.
    """
    theta = np.pi * (np.arange(64) + 0.5) / 64
    upper = np.stack([np.cos(theta), np.sin(theta)], axis=-1)
    lower = np.stack([1 - np.cos(theta), 0.5 - np.sin(theta)], axis=-1)
    means = (np.concatenate([upper, lower]) - np.array([0.5, 0.25])) / 2
    return GaussianMixture(
        jnp.asarray(means, jnp.float32), jnp.ones(128), 0.1 / 2
    )


def two_moons() -> Reward:
    """Two interlocking half circles of radius 1/2, blurred by 0.05.

    The plane of Appendix F.2 of the paper, which gives no formula: the
    density of the classic data set with noise 0.1, on a = moons / 2, centred.

    Returns:
        Reward, maps actions [..., 2] in [-1, 1]^2 to values in [0, 1].
    """
    return normalised_density(moon_gaussians())


def checkerboard() -> Reward:
    """Eight of 4 x 4 cells of side 0.4 on [-0.8, 0.8]^2, blurred by 0.04.

    The plane of Appendix F.3 of the paper, which gives no formula: the
    density of the classic data set on [-4, 4]^2, on a = board / 5, smoothed.

    Returns:
        Reward, maps actions [..., 2] in [-1, 1]^2 to values in [0, 1].
    """

    def even_columns(x):
        left, blur = jnp.array([-0.8, 0.0]), 0.04
        rise = jax.scipy.special.ndtr((x[..., None] - left) / blur)
        fall = jax.scipy.special.ndtr((x[..., None] - left - 0.4) / blur)
        return jnp.sum(rise - fall, axis=-1)

    @jax.jit
    def reward(a):
        even, odd = even_columns(a), even_columns(a - 0.4)
        return jnp.prod(even, axis=-1) + jnp.prod(odd, axis=-1)

    return reward


# %% Rewards that lie
NoisyReward = Callable[[Array, jax.Array], Array]


def gaussian_noise(reward: Reward, std: float) -> NoisyReward:
    """Add independent Gaussian noise to each query (Appendix H.1).

    Args:
        reward: clean reward, maps actions [..., A] to [...].
        std: standard deviation of the noise, in units of the reward.

    Returns:
        Noisy reward, maps actions [..., A] and a random key to [...].

    Raises:
        ValueError: if std is not positive.
    """
    if not std > 0:
        raise ValueError(f"gaussian_noise wants std > 0, got {std}.")

    def noisy(a, key):
        clean = reward(a)
        return clean + std * jax.random.normal(key, clean.shape)

    return noisy


def gaussian_bump(reward: Reward, height: float, width: float) -> Reward:
    """Add a Gaussian hill at the origin (Appendix H.2).

    Args:
        reward: clean reward with maximum 1, maps actions [..., A] to [...].
        height: peak of the hill as a share c of that maximum.
        width: standard deviation of the hill, in units of the action.

    Returns:
        Reward, maps actions [..., A] to [...].

    Raises:
        ValueError: if width is not positive.
    """
    if not width > 0:
        raise ValueError(f"gaussian_bump wants width > 0, got {width}.")

    def bumped(a):
        square = jnp.sum(a**2, axis=-1)
        return reward(a) + height * jnp.exp(-0.5 * square / width**2)

    return bumped
