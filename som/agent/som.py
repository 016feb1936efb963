"""The SOM agent.

Exported by tools/export.py from book/agent/som.md; edit the chapter.
"""

__all__ = [
    "SOMConfig",
    "ESTIMATORS",
    "MIN_TIME",
    "q_spread",
    "flow_velocity",
    "TIME_LAWS",
    "times",
    "policy_target",
    "policy_loss",
    "OneStep",
    "PAPER",
    "LITERAL",
    "LAPTOP",
    "EFFICIENT",
    "NORMALIZED_LOOPS",
    "BANDIT",
    "SOM",
]

# %% Imports
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Float

from som.agent.actor_critic import (
    AGENTS,
    EFFICIENT_LOOPS,
    LAPTOP_FRAME,
    SAMPLE_EFFICIENT,
    ActorCritic,
    ActorCriticConfig,
    at_least_one,
    candidates,
    q_value,
)
from som.agent.critic import Transition
from som.agent.networks import Policy
from som.theory import meanflow, probability_flow, score
from som.theory.sde import SDE, VE, VP


# %% The configuration
@dataclass(frozen=True)
class SOMConfig(ActorCriticConfig):
    """Everything the agent can be told.

    K is in Table 3 of the paper, the rest is what it leaves open.
    """

    num_samples: int = 100  # K of the score estimate
    sde: Literal["vp", "ve"] = "vp"  # forward SDE
    noise_range: tuple[float, float] = (0.1, 2.0)  # beta (VP), sigma (VE)
    estimator: Literal["idem", "box", "combined", "shared"] = "combined"
    sharpening: float = 4.0  # w_s: the score times 1 + w_s (1 - t)^2
    rescale: float | None = None  # w of (8): this length, not sharpened
    target: Literal["jvp", "semigroup", "lagrangian"] = "lagrangian"
    time_law: Literal["uniform", "logit-normal", "ends"] = "uniform"  # r, t
    anchor_share: float = 0.25  # share of the batch with r = t
    prior_share: float = 0.5  # share of the batch that starts from the prior
    q_scale: Literal["state", "batch"] = "state"  # whose std divides Q
    inverse_temperature: float | None = 10.0  # factor on Q; None: alpha
    clip_guesses: bool = False  # `idem`: clip a_0|t to the action box
    chunk: int = 5  # guesses evaluated at once (memory); 0: all
    policy_batch: int | None = None  # states per policy step; None: all
    rows_per_state: int = 1  # rows of the policy step at each state
    residual: bool = False  # the policy's output has its input added
    climb: float = 0.0  # c: weight of Q at the jump's end in the loss

    def __post_init__(self):
        super().__post_init__()
        at_least_one(self, "num_samples", "policy_batch", "rows_per_state")
        if self.anchor_share + self.prior_share > 1:
            raise ValueError(
                f"anchor_share {self.anchor_share} and prior_share "
                f"{self.prior_share} share one batch; together at most 1"
            )
        if self.target == "semigroup" and self.anchor_share == 0:
            raise ValueError(
                "anchor_share is 0; the semigroup target wants rows with "
                "r = t, for only there it sees the critic"
            )


# %% The velocity that the critic defines
ESTIMATORS = {
    "idem": score.idem_score,
    "box": score.box_score,
    "combined": score.combined_score,
}
MIN_TIME = 1e-3  # the score is asked for no earlier: sigma(0) is zero


def q_spread(
    agent: "SOM", critic, observation: Float[Array, "B O"], key, num: int = 8
) -> Float[Array, ""]:
    """Scale of Q: its std over uniform actions, within states or over all.

    32 states of the batch are enough for a mean, at a fraction of the cost.
    """
    observation = observation[:32]
    shape = (num, len(observation), agent.action_size)
    actions = jax.random.uniform(key, shape, minval=-1, maxval=1)
    q = q_value(agent, critic, observation, actions)
    if agent.config.q_scale == "batch":
        return jnp.std(q) + 1e-6
    return jnp.mean(jnp.std(q, 0)) + 1e-6


# %% Sharpening: a stronger pull towards the end
def flow_velocity(
    agent: "SOM",
    critic,
    factor,
    observation: Float[Array, "O"],
    key,
    actions: Float[Array, "J A"] | None = None,
) -> Callable:
    """The velocity field (6) or (8) of one state, as a function of (a, t).

    Args:
        factor: inverse temperature over the scale of Q, scalar.
        observation: s, [O].
        key: random key of the score estimate.
        actions: of the policy; around them `shared` has its guesses, and
            over the whole box without them.

    Returns:
        Function of (a [A], t scalar) to [A].
    """
    config, sde = agent.config, agent.sde

    def energy(a):
        a = jnp.clip(a, -1, 1) if config.clip_guesses else a
        return factor * q_value(agent, critic, observation, a)

    if config.estimator == "shared":
        num, size = config.num_samples, agent.action_size
        guesses = 2 * score.lattice(key, num, size) - 1
        if actions is not None:
            guesses = score.guesses_near(key, actions, num)
        energies = score.evaluate(energy, guesses, config.chunk)
        slope = score.fit_slope(guesses, energies)

    def velocity(a, t):
        t = jnp.maximum(t, MIN_TIME)
        limit = sde.mean(t) + 4 * sde.std(t)  # p_t is empty beyond
        a = jnp.clip(a, -limit, limit)
        if config.estimator == "shared":
            estimate = score.shared_score(energy, slope, a, t, sde)
        else:
            estimate = ESTIMATORS[config.estimator](
                energy, a, t, sde, key, config.num_samples, config.chunk
            )
        if config.rescale is None:
            estimate *= 1 + config.sharpening * (1 - t) ** 2
        else:  # a factor would be lost
            estimate = probability_flow.unit_rescale(estimate, config.rescale)
        return probability_flow.velocity(estimate, a, t, sde)

    return velocity


# %% The policy loss
TIME_LAWS: dict[str, Callable] = {
    "uniform": lambda x: x,
    "logit-normal": lambda x: jax.nn.sigmoid(ndtri(x) - 0.4),
    "ends": lambda x: jnp.sin(jnp.pi / 2 * x) ** 2,
}
"""What makes times of uniform numbers, by `time_law`."""


def times(agent: "SOM", key, num: int):
    """Pairs r <= t of the time law, [B] each; r = t in the first
    anchor_share of the batch, t = 1 in the last prior_share."""
    row = (jnp.arange(num) + 0.5) / num
    r, t = TIME_LAWS[agent.config.time_law](jax.random.uniform(key, (2, num)))
    t = jnp.where(row > 1 - agent.config.prior_share, 1.0, t)
    r, t = jnp.minimum(r, t), jnp.maximum(r, t)
    return jnp.where(row < agent.config.anchor_share, t, r), t


def policy_target(
    agent: "SOM", u: Callable, velocity: Callable, a_t, r, t, key
) -> Float[Array, "A"]:
    """What u(a_t, r, t) should be for one state, by the configured rule.

    Args:
        u: average velocity of this state, (a [A], r, t) -> [A].
        velocity: its instantaneous velocity, (a [A], t) -> [A].
    """
    if agent.config.target == "jvp":
        return meanflow.target(u, velocity(a_t, t), a_t, r, t)
    if agent.config.target == "lagrangian":
        return meanflow.lagrangian_target(u, velocity, a_t, r, t)
    s = jax.random.uniform(key, (), minval=r, maxval=t)
    jump = meanflow.semigroup_target(u, a_t, r, s, t)
    return jnp.where(r == t, velocity(a_t, t), jump)


def policy_loss(
    agent: "SOM", policy, critic, log_alpha, batch: Transition, key
):
    """Equation (7): mean squared distance from the target, over the batch.

    With `climb`, minus Q at the ends of fresh jumps, Equation
    (eq-som-climb) of the chapter.

    Args:
        policy: parameters of u_theta.
        critic: parameters of Q_phi, constants here.
        log_alpha: temperature, used where inverse_temperature is None.
        batch: transitions; only s and a_0 are used.
        key: random key.

    Returns:
        Loss, a scalar.
    """
    config = agent.config
    batch = jax.tree.map(lambda x: x[: config.policy_batch], batch)
    each = config.rows_per_state
    num = each * len(batch.observation)
    k_time, k_noise, k_prior, k_spread, k_row, k_climb = jax.random.split(
        key, 6
    )
    r, t = times(agent, k_time, num)
    a_t = jax.vmap(agent.sde.perturb)(
        jax.random.split(k_noise, num), jnp.tile(batch.action, (each, 1)), t
    )
    prior = agent.prior_std * jax.random.normal(k_prior, a_t.shape)
    a_t = jnp.where((t == 1)[:, None], prior, a_t)
    spread = q_spread(agent, critic, batch.observation, k_spread)
    fixed = config.inverse_temperature
    factor = (jnp.exp(log_alpha) if fixed is None else fixed) / spread
    still = jax.lax.stop_gradient(policy)

    def one(observation, rows, key):
        k_score, k_middle, k_jump = jax.random.split(key, 3)
        net = lambda params, a, r, t: agent.policy_net.apply(
            params, a, r, t, observation
        )
        u = lambda a, r, t: net(still, a, r, t)
        jump = candidates(agent, still, observation, k_jump, 1)
        v = flow_velocity(agent, critic, factor, observation, k_score, jump)
        aim = jax.vmap(lambda *row: policy_target(agent, u, v, *row))(
            *rows, jax.random.split(k_middle, each)
        )
        return jnp.mean(jnp.sum((net(policy, *rows) - aim) ** 2, -1))

    def by_state(x):  # rows of one state lie a round apart
        return jnp.swapaxes(x.reshape(each, -1, *x.shape[1:]), 0, 1)

    rows = jax.tree.map(by_state, (a_t, r, t))
    keys = jax.random.split(k_row, num // each)
    loss = jnp.mean(jax.vmap(one)(batch.observation, rows, keys))
    if config.climb == 0:
        return loss
    jumps = candidates(agent, policy, batch.observation, k_climb, 1)
    height = jnp.mean(q_value(agent, critic, batch.observation, jumps))
    return loss - config.climb * height / spread


# %% The agent
@dataclass(frozen=True)
class OneStep(ActorCritic):
    """An agent whose policy is an average velocity, asked once an action."""

    @property
    def policy_net(self) -> Any:
        """The network u_theta(a, r, t, s), a `Policy`."""
        c = self.config
        sizes = self.action_size, c.width, c.depth
        return Policy(*sizes, c.activation, c.residual)

    def init_policy(self, key) -> Any:
        """Fresh parameters of u_theta."""
        s, a = jnp.zeros(self.observation_size), jnp.zeros(self.action_size)
        return self.policy_net.init(key, a, jnp.zeros(()), jnp.ones(()), s)

    def transport(self, policy, noise, observation, key) -> Array:
        """Noise and action, [2, ..., A]: one step, nothing between."""
        r, t = jnp.zeros(()), jnp.ones(())  # these and s meet the noise late
        u = self.policy_net.apply(policy, noise, r, t, observation)
        return jnp.stack([noise, noise - u])


PAPER = SOMConfig(
    target_particles=1,
    estimator="shared",
    policy_batch=64,
    rows_per_state=4,
)
LITERAL = SOMConfig(
    noise_range=(0.1, 20.0),
    estimator="idem",
    sharpening=0.0,
    rescale=25.0,
    target="jvp",
    anchor_share=0.0,
    prior_share=0.0,
    q_scale="batch",
    inverse_temperature=None,
    ema_policy=False,
)
LAPTOP = SOMConfig(
    **LAPTOP_FRAME,
    num_samples=12,
    chunk=0,
    policy_delay=1,
    target_particles=1,
    policy_batch=64,
    residual=True,
    inverse_temperature=40.0,
)
EFFICIENT = replace(LAPTOP, **SAMPLE_EFFICIENT, target_particles=4, climb=1.0)
NORMALIZED_LOOPS: dict[str, dict[str, Any]] = {
    name: EFFICIENT_LOOPS.get(name, {}) | {"normalize_observations": True}
    for name in ("laptop", "sample-efficient")
}
"""The loops of the small profiles, with normalised observations."""
BANDIT = replace(
    LAPTOP,
    policy_delay=2,
    target_particles=None,
    policy_batch=None,
    estimator="box",
    num_samples=32,
    anchor_share=0.0,
    prior_share=0.75,
    actor_lr=2e-3,
    residual=False,
    inverse_temperature=10.0,
)


@dataclass(frozen=True)
class SOM(OneStep):
    """Score-based one-step MeanFlow policy optimisation (Algorithm 1).

    Args:
        config: see SOMConfig.
        observation_size: O.
        action_size: A; actions live in [-1, 1]^A.
    """

    config: SOMConfig

    profiles: ClassVar[dict[str, Any]] = {
        "paper": PAPER,
        "laptop": LAPTOP,
        "sample-efficient": EFFICIENT,
        "bandit": BANDIT,
        "paper-literal": LITERAL,
    }
    loops: ClassVar[dict[str, dict[str, Any]]] = NORMALIZED_LOOPS

    @property
    def sde(self) -> SDE:
        """The forward SDE that the configuration names."""
        kind = VP if self.config.sde == "vp" else VE
        return kind(*self.config.noise_range)

    @property
    def prior_std(self) -> float:
        """Deviation of a_1."""
        return self.sde.prior_std()

    def policy_loss(self, policy, state, batch: Transition, key) -> Array:
        """Equation (7) against the critic of the last update."""
        return policy_loss(
            self, policy, state.critic, state.log_alpha, batch, key
        )


AGENTS["som"] = SOM
