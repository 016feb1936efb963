"""Which times to train on.

Exported by tools/export.py from book/relatives/timesteps.md; edit the chapter.
"""

__all__ = [
    "bound_weights",
    "bound_rest",
    "step_of",
    "Task",
    "NUM_STEPS",
    "moons_task",
    "digits_task",
    "TASKS",
    "gradient_variance",
    "centres",
    "Rule",
    "draw_from",
    "Fixed",
    "fixed_rules",
    "SecondMoment",
    "TimePolicy",
    "beta_log_density",
    "beta_entropy",
    "f_statistic",
    "SamplerState",
    "AdaptiveSampler",
    "BATCH",
    "EVERY",
    "TAU",
    "Training",
    "start",
    "update",
    "gain_between",
    "round_of",
    "advance",
    "held_out_errors",
    "Fit",
    "fit_times",
    "reward_quality",
    "updates_until",
    "rule_named",
    "fit_rule",
    "rounded",
    "TimesStudy",
    "MOONS",
    "DIGITS",
]

# %% Imports
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.scipy.special import betaln, digamma
from jaxtyping import Array, Float, Int
from scipy.special import logit, ndtr

from som.agent.critic import polyak
from som.agent.networks import MLP
from som.baselines.diffusion import (
    Denoiser,
    Schedule,
    perturb,
    vp_schedule,
)
from som.studies.landscapes import Study, tally
from som.theory.boltzmann import moon_gaussians
from som.training.command_line import STUDIES
from som.training.records import make_arms


# %% The chain and its bound
def bound_weights(schedule: Schedule) -> Float[Array, "T"]:
    """The factors c_1 ... c_T of Equation (eq-timesteps-bound)."""
    beta, std = (np.asarray(x, float) for x in (schedule.beta, schedule.std))
    later = beta[2:] / (2 * (1 - beta[2:]) * std[1:-1] ** 2)
    return jnp.asarray([0.5, *later], jnp.float32)


def bound_rest(
    schedule: Schedule, a_0: Float[Array, "B A"]
) -> Float[Array, "B"]:
    """What of the bound no denoiser can change, in nats per dimension."""
    left, noise = schedule.mean[-1], schedule.std[-1]
    prior = (left * a_0) ** 2 + noise**2 - 1 - 2 * jnp.log(noise)
    width = schedule.std[1] / schedule.mean[1]
    return 0.5 * jnp.mean(prior, -1) + 0.5 * jnp.log(2 * jnp.pi * width**2)


def step_of(t: Float[Array, "..."], num_steps: int) -> Int[Array, "..."]:
    """The step n, 1 to T, of a position t in [0, 1]: equal shares of it."""
    step = 1 + jnp.floor(t * num_steps).astype(jnp.int32)
    return jnp.clip(step, 1, num_steps)


@dataclass(frozen=True, eq=False)
class Task:
    """Data, a chain for it and a network that learns to denoise.

    Args:
        sample: draws data, (key, number) -> [number, A].
        held_out: data that no batch contains, [H, A].
        schedule: of T steps.
        denoiser: the network, a Denoiser or another that is called as one.
        cell: width of the cells of data that were whole numbers, else 1.
    """

    sample: Callable[[Any, int], Array]
    held_out: Float[Array, "H A"]
    schedule: Schedule
    denoiser: Any
    cell: float = 1.0

    @property
    def num_steps(self) -> int:
        """The number of steps, T."""
        return len(self.schedule.beta) - 1

    def init(self, key) -> Any:
        """Fresh parameters of the network."""
        a = self.held_out[0]
        return self.denoiser.init(key, a, jnp.int32(1), jnp.zeros(1))

    def errors(
        self, params, a_0: Float[Array, "B A"], t: Float[Array, "B M"], key
    ) -> Float[Array, "B M"]:
        """Mean squared error of the noise, M positions for each point."""
        step = step_of(t, self.num_steps)
        noise = jax.random.normal(key, (*t.shape, a_0.shape[-1]))
        clean = jnp.broadcast_to(a_0[:, None], noise.shape)
        a_n = perturb(self.schedule, clean, step, noise)
        guess = self.denoiser.apply(params, a_n, step, jnp.zeros(1))
        return jnp.mean((guess - noise) ** 2, -1)

    def terms(self, params, a_0, t, key) -> Float[Array, "B M"]:
        """L_n of the bound at M positions, in bits per dimension."""
        weight = bound_weights(self.schedule) / jnp.log(2)
        weight = weight[step_of(t, self.num_steps) - 1]
        return weight * self.errors(params, a_0, t, key)

    def bound(self, errors: Float[Array, "... T"]) -> Float[Array, "..."]:
        """The bound of the held-out data, in bits per dimension.

        Args:
            errors: mean squared error of the noise at each step.
        """
        rest = jnp.mean(bound_rest(self.schedule, self.held_out))
        nats = rest + errors @ bound_weights(self.schedule)
        return nats / jnp.log(2) - jnp.log2(self.cell)


# %% Data
NUM_STEPS = 100  # T


def moons_task(width: int = 64) -> Task:
    """Two moons, A = 2, and a perceptron of three layers."""
    moons = moon_gaussians()
    return Task(
        moons.sample,
        moons.sample(jax.random.PRNGKey(99), 128),
        vp_schedule(NUM_STEPS, beta_max=20.0),
        Denoiser(2, width, 3, "gelu"),
    )


def digits_task(width: int = 128) -> Task:
    """The digits of scikit-learn, 8 x 8 pixels, noise fills grey levels."""
    from sklearn.datasets import load_digits  # takes a second

    data = np.random.default_rng(0).permutation(load_digits().data)
    grey = jnp.asarray(data / 8 - 1, jnp.float32)

    def blur(key, image):
        return image + jax.random.uniform(
            key, image.shape, minval=-1 / 16, maxval=1 / 16
        )

    def sample(key, num):
        k_which, k_blur = jax.random.split(key)
        which = jax.random.randint(k_which, (num,), 128, len(grey))
        return blur(k_blur, grey[which])

    return Task(
        sample,
        blur(jax.random.PRNGKey(99), grey[:128]),
        vp_schedule(NUM_STEPS, beta_max=20.0),
        Denoiser(64, width, 3, "gelu"),
        cell=1 / 8,
    )


TASKS = {"moons": cache(moons_task), "digits": cache(digits_task)}


# %% Not every time is equally loud
@partial(jax.jit, static_argnums=0)
def gradient_variance(
    task: Task, params, a_0: Float[Array, "B A"], key
) -> Float[Array, "T"]:
    """Variance of one point's gradient at each step, over all parameters."""

    def one(a, t, key):
        loss = lambda p: task.errors(p, a[None], t[None, None], key)[0, 0]
        return ravel_pytree(jax.grad(loss)(params))[0]

    def at(t):
        keys = jax.random.split(key, len(a_0))
        grads = jax.vmap(one, (0, None, 0))(a_0, t, keys)
        return jnp.sum(jnp.var(grads, 0, ddof=1))

    return jax.lax.map(at, centres(task.num_steps))


def centres(num_steps: int) -> Float[Array, "T"]:
    """The middle of each step's share of [0, 1]."""
    return (jnp.arange(num_steps) + 0.5) / num_steps


# %% Rules for drawing times
class Rule:
    """How times are drawn: the interface, and what most rules leave out.

    `t` in [0, 1] is a position between data (0) and noise (1): a flow takes
    it as its time, a chain by `step_of` as its step.
    """

    def init(self, key, size: int) -> Any:
        """The rule's first state, for data of this many dimensions."""
        raise NotImplementedError

    def draw(self, state, a_0, key) -> tuple[Array, Array]:
        """Positions and weights of the loss for a batch: [B] and [B]."""
        raise NotImplementedError

    def density(self, state, a_0) -> Float[Array, "T"]:
        """Density of the positions, step by step, for the points a_0."""
        raise NotImplementedError

    def see(self, state, t, loss) -> Any:
        """The state after an update with these losses, [B]."""
        return state

    def learn(self, state, a_0, t, gain, key) -> Any:
        """The state after an update whose gain can be asked for.

        Args:
            a_0, t: batch and positions of the update.
            gain: how much lower the loss is since the update,
                (a_0 [B, A], t [M], key before, key after) -> [B, M].
            key: random key.
        """
        return state


def draw_from(law, key, num: int) -> Float[Array, "B"]:
    """Positions whose step has the probabilities law [T], even within."""
    edges = jnp.linspace(0, 1, len(law) + 1)
    cdf = jnp.concatenate([jnp.zeros(1), jnp.cumsum(law)])
    return jnp.interp(jax.random.uniform(key, (num,)), cdf / cdf[-1], edges)


@dataclass(frozen=True)
class Fixed(Rule):
    """One law of the steps and one weight for each, [T] and [T].

    The tables are part of the state and not of what is compiled, so that
    one program serves all fixed rules.
    """

    law: Any = field(compare=False)
    weight: Any = field(compare=False)

    def init(self, key, size):
        """The two tables."""
        return jnp.asarray(self.law), jnp.asarray(self.weight)

    def draw(self, state, a_0, key):
        """Positions by the law, each with the weight of its step."""
        law, weight = state
        t = draw_from(law, key, len(a_0))
        return t, weight[step_of(t, len(law)) - 1]

    def density(self, state, a_0):
        """The law in units of the uniform one."""
        return state[0] * len(state[0])


def fixed_rules(schedule: Schedule) -> dict[str, Fixed]:
    """The fixed rules of the page, by name."""
    mean, std = (np.asarray(x[1:], float) for x in schedule[1:])
    num = len(std)
    edge, even, one = np.linspace(0, 1, num + 1), np.full(num, 1 / num), 1.0
    snr = (mean / std) ** 2
    fast = np.where(np.gradient(std, 1 / num) > 0.1, 5.0, 1.0)
    bound = np.asarray(bound_weights(schedule), float)
    tables = {
        "uniform": (even, one),
        "logit-normal": (np.diff(ndtr(logit(edge))), one),
        "Beta(0.8, 1)": (np.diff(edge**0.8), one),
        "P2": (even, 1 / (1 + snr)),
        "Min-SNR": (even, np.minimum(snr, 5) / snr),
        "SpeeD": (fast / fast.sum(), one),
        "bound": (bound / bound.sum(), one),
    }
    return {
        name: Fixed(np.float32(law), np.float32(np.broadcast_to(weight, num)))
        for name, (law, weight) in tables.items()
    }


@dataclass(frozen=True)
class SecondMoment(Rule):
    """Importance sampling by the loss itself, without bias."""

    num_steps: int = NUM_STEPS  # T
    history: int = 10  # losses kept of each step
    floor: float = 1e-3  # share drawn uniformly

    def init(self, key, size):
        """Losses [T, history] and how many each step has had [T]."""
        empty = jnp.zeros((self.num_steps, self.history))
        return empty, jnp.zeros(self.num_steps, jnp.int32)

    def law(self, state) -> Float[Array, "T"]:
        """Probability of each step."""
        losses, count = state
        even = jnp.full(self.num_steps, 1 / self.num_steps)
        rms = jnp.sqrt(jnp.mean(losses**2, 1))
        law = (1 - self.floor) * rms / jnp.sum(rms) + self.floor * even
        return jnp.where(jnp.all(count >= self.history), law, even)

    def draw(self, state, a_0, key):
        """Positions by the law, weights 1 / (T p)."""
        law = self.law(state)
        t = draw_from(law, key, len(a_0))
        p = law[step_of(t, self.num_steps) - 1]
        return t, 1 / (self.num_steps * p)

    def density(self, state, a_0):
        """The law in units of the uniform one."""
        return self.law(state) * self.num_steps

    def see(self, state, t, loss):
        """Each loss takes the place of its step's oldest."""
        losses, count = state
        n = step_of(t, self.num_steps) - 1
        hits = jax.nn.one_hot(n, self.num_steps, dtype=jnp.int32)
        before = jnp.take_along_axis(jnp.cumsum(hits, 0), n[:, None], 1)
        slot = (count[n] + before[:, 0] - 1) % self.history
        return losses.at[n, slot].set(loss), count + hits.sum(0)


# %% A sampler that learns
class TimePolicy(nn.Module):
    """Shape parameters (b_1, b_2) of the Beta law of each point: [..., 2].

    The last layer starts at zero but for its bias 1/2, so that both are
    0.974 and the law is almost uniform.
    """

    width: int = 32  # units of its two layers

    @nn.compact
    def __call__(self, a_0: Float[Array, "... A"]) -> Float[Array, "... 2"]:
        h = nn.gelu(MLP(self.width, 1, self.width)(a_0))
        last = nn.Dense(
            2,
            kernel_init=nn.initializers.zeros,
            bias_init=nn.initializers.constant(0.5),
        )
        return nn.softplus(last(h)) + 1e-5


def beta_log_density(
    b: Float[Array, "... 2"], t: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Log density of Beta(b_1, b_2) at t."""
    b_1, b_2 = b[..., 0], b[..., 1]
    inside = (b_1 - 1) * jnp.log(t) + (b_2 - 1) * jnp.log1p(-t)
    return inside - betaln(b_1, b_2)


def beta_entropy(b: Float[Array, "... 2"]) -> Float[Array, "..."]:
    """Entropy of Beta(b_1, b_2) in nats, Equation (eq-timesteps-entropy)."""
    b_1, b_2 = b[..., 0], b[..., 1]
    return (
        betaln(b_1, b_2)
        - (b_1 - 1) * digamma(b_1)
        - (b_2 - 1) * digamma(b_2)
        + (b_1 + b_2 - 2) * digamma(b_1 + b_2)
    )


# %% Which terms to look at
def f_statistic(
    x: Float[Array, "K T"], y: Float[Array, "K"]
) -> Float[Array, "T"]:
    """F of the regression of y on each column of x by itself."""
    x, y = x - x.mean(0), y - y.mean()
    spread = jnp.sum(x**2, 0) * jnp.sum(y**2)
    r_square = jnp.sum(x * y[:, None], 0) ** 2 / jnp.maximum(spread, 1e-30)
    return r_square / jnp.maximum(1 - r_square, 1e-7) * (len(y) - 2)


# %% The published estimator and ours
class SamplerState(NamedTuple):
    """What changes while the sampler learns."""

    params: Any  # of the TimePolicy
    opt: optax.OptState
    queue: Float[Array, "Q T"]  # changes of all terms, the newest first
    chosen: Int[Array, "3"]  # steps, less one, that make up the reward
    baseline: Float[Array, ""]  # running mean of the reward
    variance: Float[Array, ""]  # of the reward around it
    lessons: Int[Array, ""]  # how often it has learned


@dataclass(frozen=True)
class AdaptiveSampler(Rule):
    """Times by Beta laws that learn which updates gain most.

    Args:
        published: the estimator of the published code, not ours.
    """

    published: bool = False
    num_steps: int = NUM_STEPS  # T
    queue: int = 20  # sweeps of which the chosen steps are chosen
    entropy: float = 1e-2  # kappa, weight of the entropy
    lr: float = 1e-2  # Adam step
    keep: float = 0.9  # share of the old baseline kept

    @property
    def adam(self) -> optax.GradientTransformation:
        """Adam on gradients no longer than 1."""
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(self.lr)
        )

    def init(self, key, size):
        """Almost uniform; the first three steps are chosen."""
        params = TimePolicy().init(key, jnp.zeros(size))
        empty = jnp.zeros((self.queue, self.num_steps))
        zero = jnp.zeros(())
        return SamplerState(
            params, self.adam.init(params), empty, jnp.arange(3),
            zero, zero, jnp.int32(0),
        )  # fmt: skip

    def law(self, params, a_0: Float[Array, "B A"]) -> Float[Array, "B 2"]:
        """The two parameters of each point's Beta law."""
        return jnp.asarray(TimePolicy().apply(params, a_0))

    def draw(self, state, a_0, key):
        """Positions by each point's law, no weights."""
        b = self.law(state.params, a_0)
        t = jax.random.beta(key, b[:, 0], b[:, 1])
        return jnp.clip(t, 1e-6, 1 - 1e-6), jnp.ones(len(a_0))

    def density(self, state, a_0):
        """The mean density of the points' laws in the middle of each step."""
        b = self.law(state.params, a_0)
        t = centres(self.num_steps)
        return jnp.mean(jnp.exp(beta_log_density(b[:, None], t)), 0)

    def loss(self, params, a_0, t, reward, baseline, scale):
        """What one step of Adam descends, Equation (eq-timesteps-ours)."""
        b = self.law(params, a_0)
        log_density, entropy = beta_log_density(b, t), beta_entropy(b)
        if self.published:
            return -jnp.mean(log_density * (reward + self.entropy * entropy))
        advantage = (reward - baseline) / scale
        return -jnp.mean(log_density * advantage + self.entropy * entropy)

    def learn(self, state, a_0, t, gain, key):
        """One step of REINFORCE, then the choice of the steps anew."""
        k_sweep, k_sweep_after, k_reward, k_reward_after = jax.random.split(
            key, 4
        )
        if not self.published:  # the same noise before and after
            k_sweep_after, k_reward_after = k_sweep, k_reward
        every = centres(self.num_steps)
        sweep = gain(a_0[:1], every, k_sweep, k_sweep_after)[0]
        reward = gain(a_0, every[state.chosen], k_reward, k_reward_after)
        reward = jnp.sum(reward, 1)

        first = state.lessons == 0
        baseline = jnp.where(first, reward.mean(), state.baseline)
        spread = jnp.mean((reward - baseline) ** 2)
        variance = jnp.where(first, spread, state.variance)
        grads = jax.grad(self.loss)(
            state.params, a_0, t, reward, baseline, jnp.sqrt(variance + 1e-12)
        )
        step, opt = self.adam.update(grads, state.opt)

        queue = jnp.roll(state.queue, 1, 0).at[0].set(sweep)
        best = jax.lax.top_k(f_statistic(queue, queue.sum(1)), 3)[1]
        full = state.lessons + 1 >= self.queue
        old = self.keep
        return SamplerState(
            optax.apply_updates(state.params, step),
            opt,
            queue,
            jnp.where(full, best, state.chosen),
            old * baseline + (1 - old) * reward.mean(),
            old * variance + (1 - old) * spread,
            state.lessons + 1,
        )


# %% Training
BATCH = 64  # points per update
EVERY = 10  # updates for each time that the rule learns
_ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
TAU = 0.01  # share of the parameters moved into their average


class Training(NamedTuple):
    """All that changes while a denoiser learns."""

    params: Any
    opt: optax.OptState
    average: Any  # slowly following copy of the parameters: this is judged
    rule: Any  # state of the rule


def start(task: Task, rule: Rule, key) -> Training:
    """Before the first update."""
    k_net, k_rule = jax.random.split(key)
    params = task.init(k_net)
    state = rule.init(k_rule, task.held_out.shape[-1])
    return Training(params, _ADAM.init(params), params, state)


def update(task: Task, rule: Rule, state: Training, key):
    """One Adam step; also the batch and the positions that it used."""
    k_data, k_time, k_noise = jax.random.split(key, 3)
    a_0 = task.sample(k_data, BATCH)
    t, weight = rule.draw(state.rule, a_0, k_time)

    def loss(params):
        each = task.errors(params, a_0, t[:, None], k_noise)[:, 0]
        return jnp.mean(weight * each), each

    grads, each = jax.grad(loss, has_aux=True)(state.params)
    step, opt = _ADAM.update(grads, state.opt)
    params = optax.apply_updates(state.params, step)
    average = polyak(state.average, params, TAU)
    seen = rule.see(state.rule, t, each)
    return Training(params, opt, average, seen), (a_0, t)


def gain_between(task: Task, before, after) -> Callable:
    """The gain of an update from parameters `before` to `after`."""

    def gain(a_0, t, key_before, key_after):
        t = jnp.broadcast_to(t, (len(a_0), len(t)))
        old = task.terms(before, a_0, t, key_before)
        return old - task.terms(after, a_0, t, key_after)

    return gain


def round_of(task: Task, rule: Rule, state: Training, key) -> Training:
    """EVERY updates; from the last one the rule learns."""
    keys = jax.random.split(key, EVERY + 1)

    def body(carry, key):
        new, used = update(task, rule, carry[0], key)
        return (new, carry[0].params, used), None

    nothing = jnp.zeros((BATCH, task.held_out.shape[-1])), jnp.zeros(BATCH)
    begin = state, state.params, nothing
    last, _ = jax.lax.scan(body, begin, keys[1:])
    state, before, (a_0, t) = last
    gain = gain_between(task, before, state.params)
    return state._replace(rule=rule.learn(state.rule, a_0, t, gain, keys[0]))


@partial(jax.jit, static_argnums=(0, 1))
def advance(task: Task, rule: Rule, states: Training, keys) -> Training:
    """Rounds of all seeds side by side; keys are [rounds, S, 2]."""
    body = lambda states, keys: (
        jax.vmap(partial(round_of, task, rule))(states, keys),
        None,
    )
    return jax.lax.scan(body, states, keys)[0]


@partial(jax.jit, static_argnums=0)
def held_out_errors(task: Task, params) -> Float[Array, "T"]:
    """Error of the noise at each step, on held-out data and fixed noise."""
    a_0, key = task.held_out, jax.random.PRNGKey(98)
    every = centres(task.num_steps)
    t = jnp.broadcast_to(every, (len(a_0), len(every)))
    return jnp.mean(task.errors(params, a_0, t, key), 0)


class Fit(NamedTuple):
    """A training, looked at now and then, all seeds side by side."""

    updates: list[int]  # made before each look
    errors: np.ndarray  # of the noise on held-out data, [looks, S, T]
    density: np.ndarray  # of the positions, mean over seeds, [looks, T]
    early: Training  # of all seeds, at the first look
    last: Training  # at the last one
    seconds: float  # of one core, per update of one seed, without compiling


def fit_times(
    task: Task,
    rule: Rule,
    seeds,
    steps: int,
    looks: int = 20,
    progress: Callable[[int], None] = lambda done: None,
) -> Fit:
    """Train one denoiser per seed by a rule.

    Args:
        task, rule: what is learned, and by which times.
        seeds: whole numbers; the same for every rule gives the same data.
        steps: updates, rounded down to whole rounds between looks.
        looks: how often the held-out error is measured.
        progress: called with the number of updates made.

    Raises:
        ValueError: fewer updates than one round for each look.
    """
    rounds = steps // (EVERY * looks)
    if rounds < 1:
        raise ValueError(
            f"steps is {steps}; at least {EVERY * looks} are wanted, "
            f"{EVERY} for each of {looks} looks"
        )
    keys = jnp.stack([jax.random.PRNGKey(seed) for seed in seeds])
    states = jax.vmap(partial(start, task, rule))(keys)
    updates, errors, density, spent = [], [], [], 0.0
    early: Any = None
    for look in range(looks):
        split = lambda k: jax.random.split(
            jax.random.fold_in(k, look), rounds
        )
        now = time.process_time()
        states = advance(
            task, rule, states, jax.vmap(split)(keys).swapaxes(0, 1)
        )
        jax.block_until_ready(states)
        spent += (look > 0) * (time.process_time() - now)
        updates.append((look + 1) * rounds * EVERY)
        errors.append(_held_out(task, states.average))
        density.append(_density(task, rule, states.rule).mean(0))
        early = early or states
        progress(updates[-1])
    each = spent / (len(keys) * max(1, updates[-1] - updates[0]))
    both = np.stack(errors), np.stack(density)
    return Fit(updates, *both, early, states, each)


@partial(jax.jit, static_argnums=0)
def _held_out(task, params):
    return jax.vmap(partial(held_out_errors, task))(params)


@partial(jax.jit, static_argnums=(0, 1))
def _density(task, rule, states):
    return jax.vmap(lambda s: rule.density(s, task.held_out))(states)


# %% How much of a reward is noise?
@partial(jax.jit, static_argnums=(0, 1))
def reward_quality(
    task: Task, rule: AdaptiveSampler, state: Training, key
) -> Float[Array, "3"]:
    """Size of the gain, and how far the reward strays from it.

    One update is made, and its reward asked for 64 times with new noise.

    Returns:
        Root mean squares over the batch: the gain; the error of a reward
        with the same noise before and after; that of one with different.
    """
    k_update, k_same, k_other = jax.random.split(key, 3)
    new, (a_0, _) = update(task, rule, state, k_update)
    gain = gain_between(task, state.params, new.params)
    t = centres(task.num_steps)[state.rule.chosen]
    reward = lambda k, after: jnp.sum(gain(a_0, t, k, after), 1)
    keys = jax.random.split(k_same, 64)
    same = jax.vmap(reward)(keys, keys)
    other = jax.vmap(reward)(keys, jax.random.split(k_other, 64))
    one, two = jnp.mean(same.reshape(2, 32, -1), 1)  # independent halves
    square = [jnp.mean(one * two)]
    square += [jnp.mean(jnp.var(x, 0, ddof=1)) for x in (same, other)]
    return jnp.sqrt(jnp.maximum(jnp.stack(square), 0))


def updates_until(
    updates, curve: Float[np.ndarray, "L S"], goal: Float[np.ndarray, "S"]
) -> Float[np.ndarray, "S"]:
    """Updates until each seed's curve is down at its goal; nan for never.

    Between two looks the curve is a straight line.
    """
    updates, curve = np.asarray(updates, float), np.asarray(curve)
    found = np.full(len(goal), np.nan)
    for seed, (line, value) in enumerate(zip(curve.T, goal, strict=True)):
        there = np.flatnonzero(line <= value)
        if len(there):
            i = max(there[0], 1)
            found[seed] = np.interp(
                value, line[[i, i - 1]], updates[[i, i - 1]]
            )
    return found


# %% The study
def rule_named(name: str, schedule: Schedule) -> Rule:
    """A rule of this page by its name."""
    learning = {
        "second moment": SecondMoment(),
        "published": AdaptiveSampler(published=True),
        "ours": AdaptiveSampler(),
    }
    return (fixed_rules(schedule) | learning)[name]


def fit_rule(arm: dict[str, Any], seeds, progress) -> dict[str, Any]:
    """Fit one arm of the study and say what is kept of it."""
    task = TASKS[arm["data"]]()
    rule = rule_named(arm["rule"], task.schedule)
    fit = fit_times(task, rule, seeds, arm["steps"], progress=progress)
    result = {
        "updates": fit.updates,
        "bound": np.asarray(task.bound(jnp.asarray(fit.errors))),
        "error": fit.errors.mean(-1),
        "by step": fit.errors[-1].mean(0),
        "seconds": fit.seconds,
    }
    keys = jax.random.split(jax.random.PRNGKey(97), len(seeds))
    if arm["rule"] == "uniform":
        a_0 = task.sample(jax.random.PRNGKey(96), 128)
        result["variance"] = [
            jax.vmap(lambda p: gradient_variance(task, p, a_0, keys[0]))(
                at.params
            )
            for at in (fit.early, fit.last)
        ]
    if arm["rule"] in ("second moment", "published", "ours"):
        result["density"] = fit.density
    if arm["rule"] == "ours":
        quality = jax.vmap(partial(reward_quality, task, rule))
        result["chosen"] = fit.last.rule.chosen + 1
        result["reward"] = [quality(at, keys) for at in (fit.early, fit.last)]
    return {k: rounded(v) for k, v in result.items()}


def rounded(value) -> Any:
    """Numbers for a record, five figures of each."""
    short = lambda x: float(f"{x:.5g}")
    flat = np.vectorize(short, otypes=[float])
    return flat(np.asarray(value, float)).tolist()


@dataclass(frozen=True)
class TimesStudy:
    """All rules on both sets of data.

    Args:
        arms: by name, `data`, `rule` and `steps`.
        most_seeds: no more than so many, however many are asked for.
    """

    arms: dict[str, dict[str, Any]]
    most_seeds: int | None = None

    def total(self, steps: int | None) -> int:
        """Updates of all arms together."""
        return sum(steps or arm["steps"] for arm in self.arms.values())

    def run(
        self, path, seeds, steps=None, progress=None, processes=1
    ) -> dict[str, Any]:
        """Fit every arm and write the record; go on with one begun.

        Args:
            path, seeds, steps, progress: as in `Study.run` of the
                chapter on landscapes.
            processes: not used: an arm's seconds want a core alone.
        """
        change = {"steps": steps} if steps else {}
        arms = {name: arm | change for name, arm in self.arms.items()}
        size = lambda arm: arm["steps"]
        return make_arms(path, seeds, arms, fit_rule, size, progress)


MOONS = (
    "uniform", "logit-normal", "Beta(0.8, 1)", "P2", "Min-SNR", "SpeeD",
    "bound", "second moment", "published", "ours",
)  # fmt: skip
DIGITS = ("uniform", "second moment", "ours")
STUDIES["timesteps"] = TimesStudy(
    {
        f"{data}, {rule}": {"data": data, "rule": rule, "steps": 1600}
        for data, rules in (("moons", MOONS), ("digits", DIGITS))
        for rule in rules
    }
)


# %% SOM's own times
STUDIES["times"] = Study(
    {
        law: {
            "algo": "som", "landscape": "eight-modes", "steps": 3000,
            "time_law": law,
        } for law in ("uniform", "logit-normal", "ends")
    },
    (tally,),
)  # fmt: skip
