"""Planners in one step, and learned ones.

Exported by tools/export.py from book/relatives/planners.md; edit the chapter.
"""

__all__ = [
    "NUM_STEPS",
    "plane_noise",
    "line_velocity",
    "flow_loss",
    "fit_flow",
    "KNOBS",
    "plane_planner",
    "guided_planner",
    "prior_plans",
    "guided_plans",
    "fit_method",
    "PriorStudy",
]

# %% Imports
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from som.agent.networks import Policy
from som.relatives.prior_guidance import (
    MEASURES,
    VALUES,
    Hills,
    PriorGuidance,
    best_of,
    classifier_free,
    classifier_guided,
    ddim,
    exact_noise,
    fit_prior,
    gaussian_kl,
    judged,
    normal_log_prob,
    plan_log_prob,
    selection_kl,
)
from som.relatives.timesteps import rounded
from som.theory.boltzmann import eight_gaussians
from som.theory.meanflow import lagrangian_target, one_step
from som.theory.sde import VP
from som.training.command_line import STUDIES
from som.training.records import make_arms


NUM_STEPS = 20  # evaluations of the frozen planner


def plane_noise() -> tuple[Callable, VP]:
    """The exact denoiser of the eight modes, and its SDE."""
    sde = VP(0.1, 20.0)
    return exact_noise(eight_gaussians(), sde), sde


# %% One step in the place of twenty
def line_velocity(denoise: Callable, sde: VP) -> Callable:
    """A denoiser's flow on the straight line, Equation (eq-prior-line).

    Args:
        denoise: the noise in a noised plan, (a [..., A], t) -> [..., A].
        sde: its forward SDE.

    Returns:
        Velocity, (a [..., A], t) -> [..., A]; t is kept in [0.001, 0.99].
    """
    low, slope = sde.beta_min, sde.beta_max - sde.beta_min

    def v(a, t):
        t = jnp.clip(t, 1e-3, 0.99)
        integral = jnp.log1p((t / (1 - t)) ** 2)
        root = jnp.sqrt(low**2 + 2 * slope * integral)
        tau = 2 * integral / (root + low)
        noise = denoise(sde.mean(tau) / (1 - t) * a, tau)
        return noise - (a - t * noise) / (1 - t)

    return v


def flow_loss(
    apply: Callable,
    params: Any,
    velocity: Callable,
    observation: Float[Array, "B O"],
    plan: Float[Array, "B A"],
    key,
) -> Float[Array, ""]:
    """Error of an average velocity on the line, by the Lagrangian target.

    Args:
        apply: of a `Policy`, (params, a, r, t, s) -> [A].
        params: of it.
        velocity: of the flow, (a [A], t) -> [A].
        observation: states.
        plan: recorded plans, to have places a_t to ask at.
        key: random key.
    """
    k_noise, k_time, k_rule = jax.random.split(key, 3)
    noise = jax.random.normal(k_noise, plan.shape)
    times = jnp.sort(jax.random.uniform(k_time, (len(plan), 2)), -1)
    rule = jax.random.uniform(k_rule, (len(plan),))
    t = jnp.where(rule < 0.5, 1.0, times[:, 1])
    r = jnp.where(rule < 0.25, 0.0, times[:, 0])
    a_t = plan + t[:, None] * (noise - plan)

    def error(a, r, t, s):
        u = lambda a, r, t: apply(params, a, r, t, s)
        return u(a, r, t) - lagrangian_target(u, velocity, a, r, t)

    errors = jax.vmap(error)(a_t, r, t, observation)
    return jnp.mean(jnp.sum(errors**2, -1))


def fit_flow(
    velocity: Callable,
    sample: Callable,
    size: int,
    key,
    steps: int = 1500,
    batch: int = 128,
) -> Callable:
    """Learn a planner in one step from the flow of another; no states.

    Args:
        velocity: of the flow on the line, (a [A], t) -> [A].
        sample: draws recorded plans, (key, number) -> [number, A].
        size: A.
        key: random key.
        steps: updates; Adam falls from 0.004 to zero.
        batch: rows per update.

    Returns:
        The planner, latents [..., A] -> plans [..., A].
    """
    network, nothing = Policy(size, 64, 3), jnp.zeros(1)
    adam = optax.adam(optax.cosine_decay_schedule(4e-3, steps))
    k_init, key = jax.random.split(key)
    zero, one = jnp.zeros(()), jnp.ones(())
    params = network.init(k_init, jnp.zeros(size), zero, one, nothing)

    def step(carry, key):
        params, opt = carry
        k_plan, key = jax.random.split(key)
        plan, s = sample(k_plan, batch), jnp.zeros((batch, 1))
        slope = jax.grad(
            lambda p: flow_loss(network.apply, p, velocity, s, plan, key)
        )(params)
        move, opt = adam.update(slope, opt)
        return (optax.apply_updates(params, move), opt), None

    train = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys)[0])
    begin = params, adam.init(params)
    params = train(begin, jax.random.split(key, steps))[0]

    def decode(z):
        s, time = jnp.zeros((*z.shape[:-1], 1)), 0 * z[..., 0]
        u = lambda a, r, t: network.apply(params, a, time + r, time + t, s)
        return one_step(u, z)

    return decode


# %% The study
KNOBS = {
    "prior": (10.0, 1.0, 0.3, 0.1, 0.03, 0.01),
    "selection": (1, 4, 16, 64, 256),
    "classifier": (1.0, 3.0, 10.0, 30.0, 100.0),
    "classifier-free": (0.0, 1.0, 3.0, 10.0),
}


@cache
def plane_planner(name: str) -> Callable:
    """A frozen planner of the eight modes, "20 steps" or "one step".

    Raises:
        ValueError: another name.
    """
    denoise, sde = plane_noise()
    if name == "20 steps":
        return jax.jit(lambda z: ddim(denoise, z, sde, NUM_STEPS))
    if name == "one step":
        flow, key = line_velocity(denoise, sde), jax.random.PRNGKey(0)
        sample = eight_gaussians().sample
        return jax.jit(fit_flow(flow, sample, 2, key, 2500))
    raise ValueError(
        f"planner is {name[:40]!r}; '20 steps' or 'one step' is wanted"
    )


def guided_planner(method: str, value: Hills, knob) -> Callable:
    """A planner whose every step is guided, latent -> plan."""
    (denoise, sde), recorded = plane_noise(), eight_gaussians()
    if method == "classifier":
        behind = value.behind(recorded, sde)
        energy = lambda a, t: knob * behind(a, t)
        guided = classifier_guided(denoise, energy, sde)
    else:
        wanted = exact_noise(value.times(recorded)[0], sde)
        guided = classifier_free(wanted, denoise, knob)
    return lambda z: ddim(guided, z, sde, NUM_STEPS)


def prior_plans(
    arm: dict[str, Any],
    value: Hills,
    decode: Callable,
    seeds: Sequence[int],
    noise: Float[Array, "S N A"],
) -> tuple[Float[Array, "T S N A"], Float[Array, "T S"]]:
    """Plans of priors of each temperature and seed, and their KL."""
    guidance = PriorGuidance(2, steps=arm["steps"])
    last = fit_prior(
        guidance, lambda s, z: value(decode(z)), arm["knobs"], seeds
    )
    apply = jax.vmap(jax.vmap(guidance.prior.apply, (0, None)), (0, None))
    mean, log_std = apply(last.prior_target, jnp.zeros(1))
    latents = mean[:, :, None] + jnp.exp(log_std)[:, :, None] * noise
    return decode(latents), gaussian_kl(mean, log_std)


def guided_plans(
    arm: dict[str, Any],
    value: Hills,
    decode: Callable,
    knob,
    noise: Float[Array, "N A"],
    key,
) -> tuple[Float[Array, "N A"], Float[Array, ""]]:
    """Plans of one setting of the other methods, and their KL."""
    if arm["method"] == "selection":
        more = jax.random.normal(key, (knob - 1, *noise.shape))
        plans = decode(jnp.concatenate([noise[None], more]))
        kl = selection_kl(knob)
        return best_of(plans, value(plans)), jnp.asarray(kl)
    decode = guided_planner(arm["method"], value, knob)
    zero = jnp.zeros(noise.shape[-1])
    log_prob = normal_log_prob(noise, zero, zero)
    log_plan, plans = plan_log_prob(decode, noise, log_prob), decode(noise)
    gap = log_plan - eight_gaussians().log_prob(plans)
    return plans, jnp.mean(gap)


def fit_method(
    arm: dict[str, Any], seeds: Sequence[int], num: int = 500
) -> dict[str, Any]:
    """Every setting of one method: each measure is [settings, seeds]."""
    value, decode = VALUES[arm["value"]], plane_planner(arm["planner"])
    keys = [jax.random.fold_in(jax.random.PRNGKey(6), s) for s in seeds]
    pairs = [jax.random.split(key) for key in keys]
    noise = jnp.stack([jax.random.normal(k, (num, 2)) for k, _ in pairs])
    if arm["method"] == "prior":
        plans, kl = prior_plans(arm, value, decode, seeds, noise)
        found = [
            [judged(value, *made) for made in zip(*row, strict=True)]
            for row in zip(plans, kl, strict=True)
        ]
    else:
        make: Callable = partial(guided_plans, arm, value, decode)
        if arm["method"] != "selection":  # whose knob is part of the shapes
            make = jax.jit(make)
        found = [
            [
                judged(value, *make(knob, z, key))
                for z, (_, key) in zip(noise, pairs, strict=True)
            ]
            for knob in arm["knobs"]
        ]
    table = np.moveaxis(np.asarray(found), -1, 0)
    return {name: rounded(x) for name, x in zip(MEASURES, table, strict=True)}


@dataclass(frozen=True)
class PriorStudy:
    """Priors and guidance in the plane.

    Args:
        arms: by name, `value`, `planner`, `method`, its `knobs`, and the
            `steps` of a training.
        most_seeds: no more than so many, however many are asked for.
    """

    arms: dict[str, dict[str, Any]]
    most_seeds: int | None = None

    def total(self, steps: int | None) -> int:
        """Settings of all arms together."""
        return sum(len(arm["knobs"]) for arm in self.arms.values())

    def run(
        self, path, seeds, steps=None, progress=None, processes=1
    ) -> dict[str, Any]:
        """Make every arm and write the record; go on with one begun.

        Args:
            path, seeds, progress: as in `Study.run` of the chapter on
                landscapes; progress is told the settings done.
            steps: updates of a prior, in the place of each arm's own.
            processes: not used: all takes a few minutes.
        """
        change = {"steps": steps} if steps else {}
        arms = {name: arm | change for name, arm in self.arms.items()}
        make = lambda arm, seeds, tell: fit_method(arm, seeds)
        size = lambda arm: len(arm["knobs"])
        return make_arms(path, seeds, arms, make, size, progress)


STUDIES["prior-guidance"] = PriorStudy(
    {
        f"{value}, {method}, {planner}": {
            "value": value,
            "planner": planner,
            "method": method,
            "knobs": list(KNOBS[method]),
            "steps": 400,
        }
        for value in VALUES
        for method, planner in (
            *((method, "20 steps") for method in KNOBS),
            ("prior", "one step"),
            ("selection", "one step"),
        )
    }
)
