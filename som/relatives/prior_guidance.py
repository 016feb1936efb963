"""Plans from a learned prior.

Exported by tools/export.py from book/relatives/prior_guidance.md; edit the chapter.
"""

__all__ = [
    "Hills",
    "VALUES",
    "ddim",
    "exact_noise",
    "normal_log_prob",
    "gaussian_kl",
    "plan_log_prob",
    "tilt",
    "latent_grid",
    "MixturePrior",
    "objective_on",
    "best_mixture",
    "Prior",
    "Guidance",
    "Worth",
    "PriorGuidance",
    "no_state",
    "fit_prior",
    "member",
    "as_mixture",
    "classifier_guided",
    "classifier_free",
    "best_of",
    "selection_kl",
    "sliced_distance",
    "temperature_for",
    "MEASURES",
    "judged",
]

# %% Imports
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from som.agent.critic import polyak
from som.agent.networks import MLP
from som.theory.boltzmann import GaussianMixture, eight_gaussians
from som.theory.sde import SDE


# %% Recordings in the plane
@dataclass(frozen=True)
class Hills:
    """A value with Gaussian hills of height one, Equation (eq-prior-hills).

    Args:
        centres: of the hills, a tuple of tuples of A numbers.
        width: deviation of each, in units of the plan.
    """

    centres: tuple[tuple[float, ...], ...]
    width: float = 0.3

    def __call__(self, a: Float[Array, "*B A"]) -> Float[Array, "*B"]:
        """The value of plans."""
        gap = a[..., None, :] - jnp.asarray(self.centres)
        square = jnp.sum(gap**2, -1) / self.width**2
        return jnp.sum(jnp.exp(-0.5 * square), -1)

    def times(
        self, mixture: GaussianMixture
    ) -> tuple[GaussianMixture, Float[Array, ""]]:
        """The mixture times this value, normalised, and the mean value."""
        centres = jnp.asarray(self.centres)
        narrow, wide = mixture.std**2, self.width**2
        both, size = narrow + wide, centres.shape[-1]
        gap = mixture.means[:, None] - centres
        means = (wide * mixture.means[:, None] + narrow * centres) / both
        mass = (wide / both) ** (size / 2) * jnp.exp(
            -0.5 * jnp.sum(gap**2, -1) / both
        )
        mass *= (mixture.weights / jnp.sum(mixture.weights))[:, None]
        std = (narrow * wide / both) ** 0.5
        product = GaussianMixture(means.reshape(-1, size), mass.ravel(), std)
        return product, jnp.sum(mass)

    def behind(
        self, mixture: GaussianMixture, sde: SDE
    ) -> Callable[[Array, Any], Array]:
        """Mean value behind a noised plan, (a [..., A], t) -> [...]."""
        product, mean = self.times(mixture)

        def expected(a, t):
            left, noise = sde.mean(t), sde.std(t)
            ratio = product.log_prob(a, left, noise)
            return mean * jnp.exp(ratio - mixture.log_prob(a, left, noise))

        return expected


VALUES = {
    "one hill": Hills(((0.5, 0.5),)),
    "two hills": Hills(((0.5, 0.5), (-0.5, -0.5))),
}


# %% A planner that is a map
def ddim(
    denoise: Callable,
    z: Float[Array, "*B A"],
    sde: SDE,
    num_steps: int,
    power: float = 2.0,
) -> Float[Array, "*B A"]:
    """A plan from noise without fresh noise, Equation (eq-prior-ddim).

    Args:
        denoise: the noise in a noised plan, (a [..., A], t) -> [..., A].
        z: where to start, at time 1.
        sde: forward SDE of the denoiser.
        num_steps: n, evaluations of the denoiser.
        power: of the times (i / n)^power; 1 for equal steps.

    Raises:
        ValueError: fewer than one step.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; at least 1 is wanted")
    times = jnp.linspace(1.0, 0.0, num_steps + 1) ** power

    def step(a, times):
        t, r = times
        noise = denoise(a, t)
        clean = (a - sde.std(t) * noise) / sde.mean(t)
        return sde.mean(r) * clean + sde.std(r) * noise, None

    return jax.lax.scan(step, z, (times[:-1], times[1:]))[0]


def exact_noise(mixture: GaussianMixture, sde: SDE) -> Callable:
    """The best denoiser of a mixture, (a [..., A], t) -> [..., A]."""
    return lambda a, t: (
        -sde.std(t) * mixture.score(a, sde.mean(t), sde.std(t))
    )


# %% One divergence, two spaces
def normal_log_prob(
    z: Float[Array, "*B A"], mean, log_std
) -> Float[Array, "*B"]:
    """Log-density of a Gaussian with a deviation for each number."""
    square = ((z - mean) * jnp.exp(-log_std)) ** 2
    return -jnp.sum(0.5 * square + log_std + 0.5 * jnp.log(2 * jnp.pi), -1)


def gaussian_kl(
    mean: Float[Array, "*B A"], log_std: Float[Array, "*B A"]
) -> Float[Array, "*B"]:
    """Divergence from N(0, I) in nats, Equation (eq-prior-same-kl)."""
    variance = jnp.exp(2 * log_std)
    return 0.5 * jnp.sum(mean**2 + variance - 1 - 2 * log_std, -1)


def plan_log_prob(
    decode: Callable, z: Float[Array, "N A"], log_prob: Float[Array, "N"]
) -> Float[Array, "N"]:
    """Log-density of the plans of latents, Equation (eq-prior-density).

    Args:
        decode: the planner, latent [A] -> plan [A].
        z: latents.
        log_prob: log-density of the law that they are drawn from.

    Returns:
        Log-density at decode(z); finite where decode is invertible.
    """
    slopes = jax.vmap(jax.jacfwd(decode))(z)
    return log_prob - jnp.linalg.slogdet(slopes)[1]


# %% The best of all priors
def tilt(
    values: Float[Array, "N"],
    temperature,
    log_prior: Float[Array, "N"] | None = None,
) -> tuple[Float[Array, "N"], Float[Array, ""]]:
    """The best law over given points, Equation (eq-prior-optimum).

    Args:
        values: J of each point's plan.
        temperature: Theta, in units of the value.
        log_prior: logarithms of the prior's shares; None, all alike, as for
            points that were drawn from it.

    Returns:
        Shares under the best law, and its objective Theta log Z.
    """
    if log_prior is None:
        log_prior = jnp.full(values.shape, -np.log(len(values)))
    logits = log_prior + values / temperature
    log_z = jax.nn.logsumexp(logits)
    return jnp.exp(logits - log_z), temperature * log_z


def latent_grid(
    size: int = 61, half: float = 4.0
) -> tuple[Float[Array, "G 2"], Float[Array, "G"]]:
    """Latents on a square grid, and the logarithms of their shares.

    Args:
        size: points along each axis.
        half: the grid covers [-half, half]^2, in deviations of N(0, I).
    """
    side = jnp.linspace(-half, half, size)
    z = jnp.stack(jnp.meshgrid(side, side), -1).reshape(-1, 2)
    return z, jax.nn.log_softmax(-0.5 * jnp.sum(z**2, -1))


# %% What a Gaussian loses
class MixturePrior(NamedTuple):
    """A mixture of Gaussians over latents, each with diagonal covariance."""

    logits: Float[Array, "M"]
    mean: Float[Array, "M A"]
    log_std: Float[Array, "M A"]

    def log_prob(self, z: Float[Array, "*B A"]) -> Float[Array, "*B"]:
        """Log-density of latents."""
        each = normal_log_prob(z[..., None, :], self.mean, self.log_std)
        return jax.nn.logsumexp(each + jax.nn.log_softmax(self.logits), -1)


def objective_on(
    grid: Float[Array, "G A"],
    log_prior: Float[Array, "G"],
    values: Float[Array, "G"],
    prior: MixturePrior,
    temperature,
) -> Float[Array, ""]:
    """F of a prior, Equation (eq-prior-objective), as a sum over a grid."""
    log_q = jax.nn.log_softmax(prior.log_prob(grid))
    gain = values - temperature * (log_q - log_prior)
    return jnp.sum(jnp.exp(log_q) * gain)


def best_mixture(
    grid: Float[Array, "G 2"],
    log_prior: Float[Array, "G"],
    values: Float[Array, "G"],
    temperature,
    components: int = 1,
    steps: int = 150,
) -> tuple[MixturePrior, Float[Array, ""]]:
    """The best mixture of so many Gaussians, by ascent from eight starts.

    Args:
        grid, log_prior: as of latent_grid.
        values: J of the plan of each latent on the grid.
        temperature: Theta.
        components: M; each start has them at even angles.
        steps: of Adam, from 0.1 down to 0 by a cosine.

    Returns:
        The prior, and its objective.
    """
    adam = optax.adam(optax.cosine_decay_schedule(0.1, steps))
    value = partial(objective_on, grid, log_prior, values)
    lose = lambda prior: -value(prior, temperature)

    def climb(turn):
        angle = turn + 2 * jnp.pi * jnp.arange(components) / components
        mean = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
        start = MixturePrior(jnp.zeros(components), mean, 0.0 * mean - 0.5)

        def step(carry, _):
            prior, opt = carry
            move, opt = adam.update(jax.grad(lose)(prior), opt)
            return (optax.apply_updates(prior, move), opt), None

        begin = start, adam.init(start)
        prior = jax.lax.scan(step, begin, None, steps)[0][0]
        return prior, value(prior, temperature)

    turns = 2 * jnp.pi * jnp.arange(8) / 8
    found, value_of = jax.jit(jax.vmap(climb))(turns)
    best = jnp.argmax(value_of)
    return jax.tree.map(lambda x: x[best], found), value_of[best]


# %% Learn it
class Prior(nn.Module):
    """Mean and logarithm of the deviation of the latent, given the state.

    Begins at N(0, I) for every state.

    Args:
        size: A, numbers in a latent.
        width: units per hidden layer.
        depth: number of hidden layers, at least 2.
    """

    size: int
    width: int = 64
    depth: int = 2

    @nn.compact
    def __call__(
        self, observation: Float[Array, "*B O"]
    ) -> tuple[Float[Array, "*B A"], Float[Array, "*B A"]]:
        h = MLP(self.width, self.depth - 1, self.width)(observation)
        zero = nn.initializers.zeros
        out = nn.Dense(2 * self.size, kernel_init=zero)(nn.gelu(h))
        mean, log_std = jnp.split(out, 2, -1)
        return mean, jnp.clip(log_std, -5.0, 2.0)


class Guidance(NamedTuple):
    """All that changes while a prior learns."""

    prior: Any  # psi
    value: Any  # phi
    prior_target: Any  # slowly following copies
    value_target: Any
    prior_opt: optax.OptState
    value_opt: optax.OptState


Worth = Callable[[Array, Array], Array]  # (s [B, O], z [B, A]) -> J [B]


@dataclass(frozen=True)
class PriorGuidance:
    """A learned prior for a frozen planner.

    Raises:
        ValueError: no latent, no step, or a share outside [0, 1].
    """

    size: int  # A, numbers in a latent
    observation_size: int = 1  # O; without states one number, zero
    steps: int = 400  # updates over which both Adams fall to zero
    width: int = 64  # units per hidden layer, of both networks
    depth: int = 3  # hidden layers of the latent value
    prior_lr: float = 3e-2  # first Adam step of the prior
    value_lr: float = 2e-3  # first Adam step of the latent value
    tau: float = 0.02  # share of the networks in each step of their copies
    wide: float = 0.5  # share of N(0, I) in what the latent value learns from
    squash: float | None = None  # c in z = c tanh(u); the public code has 2
    normalise: bool = False  # divide the value by its mean size

    def __post_init__(self):
        """Refuse what cannot be trained."""
        if self.size < 1 or self.steps < 1 or not 0 <= self.wide <= 1:
            raise ValueError(
                "PriorGuidance wants size >= 1, steps >= 1 and wide in "
                f"[0, 1], got {self.size}, {self.steps} and {self.wide}"
            )

    @property
    def prior(self) -> Any:
        """The network p_psi(z | s), a `Prior`."""
        return Prior(self.size, self.width)

    @property
    def value(self) -> Any:
        """The network V_phi(s, z), an `MLP` of one output."""
        return MLP(self.width, self.depth, 1)

    @property
    def adams(self) -> tuple[Any, Any]:
        """Optimizers of the prior and of the latent value."""
        fall = lambda lr: optax.cosine_decay_schedule(lr, self.steps)
        return optax.adam(fall(self.prior_lr)), optax.adam(
            fall(self.value_lr)
        )

    def init(self, key) -> Guidance:
        """Before the first update: the cloned planner."""
        k_prior, k_value = jax.random.split(key)
        s, z = jnp.zeros(self.observation_size), jnp.zeros(self.size)
        prior, value = (
            self.prior.init(k_prior, s),
            self.value.init(k_value, s, z),
        )
        adam, value_adam = self.adams
        opts = adam.init(prior), value_adam.init(value)
        return Guidance(prior, value, prior, value, *opts)

    def latent(self, u: Float[Array, "*B A"]) -> Float[Array, "*B A"]:
        """What the planner receives: u, or c tanh(u) with `squash`."""
        return u if self.squash is None else self.squash * jnp.tanh(u)

    def draw(
        self, prior, observation: Float[Array, "*B O"], key=None
    ) -> Float[Array, "*B A"]:
        """A latent for each state; without a key, that of the mean."""
        u, log_std = self.prior.apply(prior, observation)
        if key is not None:
            u += jnp.exp(log_std) * jax.random.normal(key, u.shape)
        return self.latent(u)

    def ask(
        self, prior, observation: Float[Array, "B O"], key
    ) -> Float[Array, "B A"]:
        """Latents for the value to learn from: the prior's and N(0, I)'s."""
        k_prior, k_wide, k_which = jax.random.split(key, 3)
        z = self.draw(prior, observation, k_prior)
        wide = self.latent(jax.random.normal(k_wide, z.shape))
        which = jax.random.uniform(k_which, z[..., :1].shape)
        return jnp.where(which < self.wide, wide, z)

    def value_loss(self, value, observation, z, worth) -> Float[Array, ""]:
        """Equation (eq-prior-value)."""
        guess = self.value.apply(value, observation, z)[..., 0]
        return jnp.mean((guess - worth) ** 2)

    def prior_loss(
        self, prior, value, observation, temperature, key
    ) -> Float[Array, ""]:
        """Equation (eq-prior-loss)."""
        z = self.draw(prior, observation, key)
        v = self.value.apply(value, observation, z)[..., 0]
        size = jax.lax.stop_gradient(jnp.mean(jnp.abs(v)))
        kl = gaussian_kl(*self.prior.apply(prior, observation))
        gain = jnp.mean(v) / (size if self.normalise else 1.0)
        return temperature * jnp.mean(kl) - gain

    def update(
        self,
        state: Guidance,
        observation: Float[Array, "B O"],
        worth: Worth,
        temperature,
        key,
    ) -> Guidance:
        """One step of the latent value, then one of the prior."""
        k_ask, k_prior = jax.random.split(key)
        adam, value_adam = self.adams
        z = self.ask(state.prior_target, observation, k_ask)
        judged = jax.lax.stop_gradient(worth(observation, z))
        slope = jax.grad(self.value_loss)(state.value, observation, z, judged)
        move, value_opt = value_adam.update(slope, state.value_opt)
        value = optax.apply_updates(state.value, move)
        value_target = polyak(state.value_target, value, self.tau)
        slope = jax.grad(self.prior_loss)(
            state.prior, value_target, observation, temperature, k_prior
        )
        move, prior_opt = adam.update(slope, state.prior_opt)
        prior = optax.apply_updates(state.prior, move)
        prior_target = polyak(state.prior_target, prior, self.tau)
        return Guidance(
            prior, value, prior_target, value_target, prior_opt, value_opt
        )


def no_state(key, num: int) -> Float[Array, "B 1"]:
    """The states of a world without states."""
    return jnp.zeros((num, 1))


def fit_prior(
    guidance: PriorGuidance,
    worth: Worth,
    temperatures: Sequence[float],
    seeds: Sequence[int],
    observe: Callable[[Any, int], Array] = no_state,
    batch: int = 128,
) -> Guidance:
    """Learn a prior for each temperature and each seed, side by side.

    Args:
        guidance: the method and its settings.
        worth: J of the plan of a latent; nothing is differentiated in it.
        temperatures: Theta, T of them, each above zero.
        seeds: whole numbers, S of them.
        observe: draws states, (key, number) -> [number, O].
        batch: states, and latents, for each update.

    Returns:
        The last state; leaves have the leading shape [T, S].

    Raises:
        ValueError: a temperature that is not positive.
    """
    thetas = np.asarray(temperatures, np.float32)
    if not (thetas > 0).all():
        raise ValueError(f"temperatures are {temperatures}; all must be > 0")

    def one(theta, begin, key):
        def step(state, key):
            k_state, key = jax.random.split(key)
            s = observe(k_state, batch)
            return guidance.update(state, s, worth, theta, key), None

        keys = jax.random.split(key, guidance.steps)
        return jax.lax.scan(step, begin, keys)[0]

    keys = jnp.stack([jax.random.PRNGKey(seed) for seed in seeds])
    k_init, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
    begin = jax.vmap(guidance.init)(k_init)
    all_seeds = jax.vmap(one, (None, 0, 0))
    every = jax.jit(jax.vmap(all_seeds, (0, None, None)))
    return every(thetas, begin, keys)


def member(tree: Any, *index: int) -> Any:
    """One of many networks that were trained side by side."""
    return jax.tree.map(lambda x: x[index], tree)


def as_mixture(guidance: PriorGuidance, prior: Any) -> MixturePrior:
    """A learned prior of a world without states, as a mixture of one."""
    mean, log_std = guidance.prior.apply(prior, jnp.zeros((1, 1)))
    return MixturePrior(jnp.zeros(1), mean, log_std)


# %% The others
def classifier_guided(
    denoise: Callable, energy: Callable, sde: SDE
) -> Callable:
    """A denoiser that also climbs, Equation (eq-prior-classifier).

    Args:
        denoise: the noise in a noised plan, (a [..., A], t) -> [..., A].
        energy: scale times value, (a [..., A], t) -> [...].
        sde: forward SDE of the denoiser.
    """

    def shifted(a, t):
        slope = jax.grad(lambda a: jnp.sum(energy(a, t)))(a)
        return denoise(a, t) - sde.std(t) * slope

    return shifted


def classifier_free(wanted: Callable, denoise: Callable, weight) -> Callable:
    """The effect of a condition, exaggerated: Equation (eq-prior-free).

    Args:
        wanted: denoiser of the wanted plans.
        denoise: denoiser of all plans.
        weight: w; 0 is the wanted plans alone.
    """
    return lambda a, t: (1 + weight) * wanted(a, t) - weight * denoise(a, t)


def best_of(
    plans: Float[Array, "N *B A"], values: Float[Array, "N *B"]
) -> Float[Array, "*B A"]:
    """Of N plans the one with the greatest value."""
    best = jnp.argmax(values, 0)[None, ..., None]
    return jnp.take_along_axis(plans, best, 0)[0]


def selection_kl(num: int) -> float:
    """Divergence of the best of so many, Equation (eq-prior-selection)."""
    return float(np.log(num) - (num - 1) / num)


def sliced_distance(
    x: Float[Array, "N A"], y: Float[Array, "N A"], directions: int = 32
) -> Float[Array, ""]:
    """Sliced Wasserstein distance of equally many points, in their units."""
    shape = x.shape[-1], directions
    along = jax.random.normal(jax.random.PRNGKey(7), shape)
    along /= jnp.linalg.norm(along, axis=0)
    gap = jnp.sort(x @ along, 0) - jnp.sort(y @ along, 0)
    return jnp.mean(jnp.abs(gap))


def temperature_for(values: Float[Array, "N"], mean) -> Float[Array, ""]:
    """Theta, 0.001 to 1000, at which the best law has this mean value.

    Args:
        values: J of draws of the prior.
        mean: wanted, under the weights of `tilt`.
    """

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        weights, _ = tilt(values, jnp.exp(middle))
        cold = weights @ values > mean
        return jnp.where(cold, middle, low), jnp.where(cold, high, middle)

    ends = jnp.log(1e-3), jnp.log(1e3)
    low, high = jax.lax.fori_loop(0, 40, halve, ends)
    return jnp.exp((low + high) / 2)


MEASURES = ("value", "kl", "log density", "off", "distance")


@partial(jax.jit, static_argnums=0)
def judged(value: Hills, plans: Float[Array, "N 2"], kl) -> Float[Array, "5"]:
    """MEASURES of plans; `kl` is handed through."""
    recorded = eight_gaussians()
    k_draw, k_pick = jax.random.split(jax.random.PRNGKey(8))
    draws = recorded.sample(k_draw, 20_000)
    edge = jnp.quantile(recorded.log_prob(draws), 0.01)
    mean, values = jnp.mean(value(plans)), value(draws)
    weights, _ = tilt(values, temperature_for(values, mean))
    pick = jax.random.choice(k_pick, len(draws), (len(plans),), p=weights)
    log_prob = recorded.log_prob(plans)
    off = jnp.mean(log_prob < edge)
    distance = sliced_distance(plans, draws[pick])
    return jnp.stack([mean, kl, jnp.mean(log_prob), off, distance])
