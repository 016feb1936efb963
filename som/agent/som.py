"""The SOM agent.

Exported by tools/export.py from book/agent/som.md; edit the chapter.
"""

__all__ = [
    "SOMConfig",
    "SOMState",
    "candidates",
    "q_value",
    "best_of_n",
    "add_noise",
    "ESTIMATORS",
    "MIN_TIME",
    "q_spread",
    "flow_velocity",
    "times",
    "policy_target",
    "policy_loss",
    "critic_step",
    "policy_step",
    "alpha_step",
    "LITERAL",
    "LAPTOP",
    "SOM",
    "AGENTS",
    "closest",
    "make_agent",
]

# %% Imports
import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from som.agent.critic import (
    Transition,
    critic_loss,
    polyak,
    td_target,
    update_bound,
)
from som.agent.networks import Critic, Policy
from som.agent.temperature import temperature_loss
from som.theory import meanflow, probability_flow, score
from som.theory.sde import SDE, VE, VP


# %% The configuration
@dataclass(frozen=True)
class SOMConfig:
    """Everything the agent can be told; defaults are the profile `paper`.

    The first block is Table 3 of the paper, the second what it leaves open.
    """

    width: int = 256  # units per hidden layer
    depth: int = 3  # hidden layers
    batch_size: int = 256  # transitions per update
    discount: float = 0.99  # gamma, per environment step
    tau: float = 0.005  # share of the online critic moved into the target
    reward_scale: float = 0.2  # factor on every reward
    actor_lr: float = 1e-4  # Adam step of the policy
    critic_lr: float = 1e-4  # Adam step of the critics
    alpha_lr: float = 7e-3  # Adam step of log alpha
    alpha_delay: int = 250  # updates between two steps of alpha
    target_entropy: float = -0.9  # nats per action dimension
    noise_scale: float = 0.1  # exploration noise in units of alpha
    num_particles: int = 32  # N of best-of-N
    num_samples: int = 100  # K of the score estimate

    sde: Literal["vp", "ve"] = "vp"  # forward SDE
    noise_range: tuple[float, float] = (0.1, 2.0)  # beta (VP), sigma (VE)
    estimator: Literal["idem", "box", "combined"] = "combined"
    rescale: float | None = 12.0  # w of Equation (8); None: score as it is
    target: Literal["jvp", "semigroup", "lagrangian"] = "lagrangian"
    anchor_share: float = 0.25  # share of the batch with r = t
    prior_share: float = 0.5  # share of the batch that starts from the prior
    q_scale: Literal["state", "batch"] = "state"  # whose std divides Q
    inverse_temperature: float | None = 10.0  # factor on Q; None: alpha
    clip_guesses: bool = False  # `idem`: clip a_0|t to the action box
    initial_alpha: float = 5.0  # where the temperature starts
    policy_delay: int = 2  # updates per step of policy and target critic
    ema_policy: bool = True  # act with the lagging copy of the policy
    chunk: int = 5  # guesses evaluated at once (memory); 0: all

    def __post_init__(self):
        for name in ("width", "depth", "batch_size", "num_particles"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; at least 1 is wanted"
                )
        if self.anchor_share + self.prior_share > 1:
            raise ValueError(
                f"anchor_share {self.anchor_share} and prior_share "
                f"{self.prior_share} share one batch; together at most 1"
            )


# %% The state
class SOMState(NamedTuple):
    """All that changes while the agent learns (a pytree of arrays)."""

    policy: Any  # parameters, as flax keeps them
    critic: Any
    target_policy: Any
    target_critic: Any
    policy_opt: optax.OptState
    critic_opt: optax.OptState
    log_alpha: Float[Array, ""]
    alpha_opt: optax.OptState
    bound: Float[Array, "2"]  # running mean of the critics' std
    step: Array  # updates made


# %% Acting: best of N
def candidates(
    agent: "SOM", policy, observation: Float[Array, "... O"], key, num: int
) -> Float[Array, "N ... A"]:
    """N one-step actions for each observation, clipped to the box."""
    shape = (num, *observation.shape[:-1], agent.action_size)
    noise = agent.sde.prior_std() * jax.random.normal(key, shape)
    r, t = jnp.zeros(()), jnp.ones(())  # these and s meet the noise late
    u = agent.policy_net.apply(policy, noise, r, t, observation)
    return jnp.clip(noise - u, -1, 1)


def q_value(agent: "SOM", critic, observation, action) -> Float[Array, "..."]:
    """The smaller of the twins' means."""
    return jnp.min(agent.critic_net.apply(critic, observation, action)[0], -1)


def best_of_n(
    agent: "SOM", policy, critic, observation: Float[Array, "... O"], key
) -> Float[Array, "... A"]:
    """Of N one-step actions, the one that the critic likes best."""
    actions = candidates(
        agent, policy, observation, key, agent.config.num_particles
    )
    best = jnp.argmax(q_value(agent, critic, observation, actions), 0)
    return jnp.take_along_axis(actions, best[None, ..., None], 0)[0]


def add_noise(
    agent: "SOM", action: Float[Array, "... A"], log_alpha, key
) -> Float[Array, "... A"]:
    """Add noise of deviation noise_scale * alpha, clip to the box."""
    std = agent.config.noise_scale * jnp.exp(log_alpha)
    return jnp.clip(
        action + std * jax.random.normal(key, action.shape), -1, 1
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
    """Scale of Q: its std over uniform actions, within states or over all."""
    shape = (num, len(observation), agent.action_size)
    actions = jax.random.uniform(key, shape, minval=-1, maxval=1)
    q = q_value(agent, critic, observation, actions)
    if agent.config.q_scale == "batch":
        return jnp.std(q) + 1e-6
    return jnp.mean(jnp.std(q, 0)) + 1e-6


def flow_velocity(
    agent: "SOM", critic, factor, observation: Float[Array, "O"], key
) -> Callable:
    """The velocity field (6) or (8) of one state, as a function of (a, t).

    Args:
        factor: inverse temperature over the scale of Q, scalar.
        observation: s, [O].
        key: random key of the score estimate.

    Returns:
        Function of (a [A], t scalar) to [A].
    """
    config, sde = agent.config, agent.sde

    def energy(a):
        a = jnp.clip(a, -1, 1) if config.clip_guesses else a
        return factor * q_value(agent, critic, observation, a)

    def velocity(a, t):
        t = jnp.maximum(t, MIN_TIME)
        limit = sde.mean(t) + 4 * sde.std(t)  # p_t is empty beyond
        a = jnp.clip(a, -limit, limit)
        estimate = ESTIMATORS[config.estimator](
            energy, a, t, sde, key, config.num_samples, config.chunk
        )
        if config.rescale is not None:
            estimate = probability_flow.unit_rescale(estimate, config.rescale)
        return probability_flow.velocity(estimate, a, t, sde)

    return velocity


# %% The policy loss
def times(agent: "SOM", key, num: int):
    """Uniform pairs r <= t, [B] each; r = t in the first anchor_share of
    the batch, t = 1 in the last prior_share."""
    row = (jnp.arange(num) + 0.5) / num
    r, t = jax.random.uniform(key, (2, num))
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

    Args:
        policy: parameters of u_theta.
        critic: parameters of Q_phi, constants here.
        log_alpha: temperature, used where inverse_temperature is None.
        batch: transitions; only s and a_0 are used.
        key: random key.

    Returns:
        Loss, a scalar.
    """
    config, num = agent.config, len(batch.observation)
    k_time, k_noise, k_prior, k_spread, k_row = jax.random.split(key, 5)
    r, t = times(agent, k_time, num)
    a_t = jax.vmap(agent.sde.perturb)(
        jax.random.split(k_noise, num), batch.action, t
    )
    prior = agent.sde.prior_std() * jax.random.normal(k_prior, a_t.shape)
    a_t = jnp.where((t == 1)[:, None], prior, a_t)
    spread = q_spread(agent, critic, batch.observation, k_spread)
    fixed = config.inverse_temperature
    factor = (jnp.exp(log_alpha) if fixed is None else fixed) / spread

    def row(observation, a_t, r, t, key):
        k_score, k_middle = jax.random.split(key)
        net = lambda params, a, r, t: agent.policy_net.apply(
            params, a, r, t, observation
        )
        u = lambda a, r, t: net(jax.lax.stop_gradient(policy), a, r, t)
        v = flow_velocity(agent, critic, factor, observation, k_score)
        aim = policy_target(agent, u, v, a_t, r, t, k_middle)
        return jnp.sum((net(policy, a_t, r, t) - aim) ** 2)

    keys = jax.random.split(k_row, num)
    return jnp.mean(jax.vmap(row)(batch.observation, a_t, r, t, keys))


# %% The critic's step
def critic_step(agent: "SOM", state: SOMState, batch: Transition, key):
    """One Adam step of the twin critics towards the best-of-N target."""
    config = agent.config
    k_action, k_noise, k_target = jax.random.split(key, 3)
    action = best_of_n(
        agent, state.policy, state.critic, batch.next_observation, k_action
    )
    action = add_noise(agent, action, state.log_alpha, k_noise)
    next_mean, next_std = agent.critic_net.apply(
        state.target_critic, batch.next_observation, action
    )
    target = td_target(
        k_target,
        config.reward_scale * batch.reward,
        config.discount * (1 - batch.terminated),
        next_mean,
        next_std,
    )

    def loss(params):
        mean, std = agent.critic_net.apply(
            params, batch.observation, batch.action
        )
        bound = update_bound(state.bound, std, config.tau, state.step == 0)
        return critic_loss(mean, std, target, bound), (bound, mean, std)

    (value, (bound, mean, std)), grads = jax.value_and_grad(
        loss, has_aux=True
    )(state.critic)
    updates, opt = optax.adam(config.critic_lr).update(
        grads, state.critic_opt
    )
    metrics = {
        "critic/loss": value,
        "critic/q": jnp.mean(mean),
        "critic/std": jnp.mean(std),
    }
    return optax.apply_updates(state.critic, updates), opt, bound, metrics


# %% The policy's step and the temperature's
def policy_step(agent: "SOM", state: SOMState, batch: Transition, key):
    """One Adam step of the policy against the critic of the last update."""
    loss, grads = jax.value_and_grad(
        lambda policy: policy_loss(
            agent, policy, state.critic, state.log_alpha, batch, key
        )
    )(state.policy)
    adam = optax.adam(agent.config.actor_lr)
    updates, opt = adam.update(grads, state.policy_opt)
    return optax.apply_updates(state.policy, updates), opt, loss


def alpha_step(agent: "SOM", state: SOMState):
    """One Adam step of log alpha."""
    config = agent.config
    target = config.target_entropy * agent.action_size
    gradient = jax.grad(temperature_loss)(
        state.log_alpha, target, config.noise_scale, agent.action_size
    )
    adam = optax.adam(config.alpha_lr)
    update, opt = adam.update(gradient, state.alpha_opt)
    return state.log_alpha + update, opt


# %% The agent
LITERAL = SOMConfig(
    noise_range=(0.1, 20.0),
    estimator="idem",
    rescale=25.0,
    target="jvp",
    anchor_share=0.0,
    prior_share=0.0,
    q_scale="batch",
    inverse_temperature=None,
    ema_policy=False,
)
LAPTOP = SOMConfig(
    width=128,
    batch_size=128,
    num_samples=16,
    num_particles=16,
    tau=0.01,
    actor_lr=1e-3,
    critic_lr=1e-3,
    initial_alpha=1.0,
    chunk=0,
)


@dataclass(frozen=True)
class SOM:
    """Score-based one-step MeanFlow policy optimisation (Algorithm 1).

    Args:
        config: see SOMConfig.
        observation_size: O.
        action_size: A; actions live in [-1, 1]^A.
    """

    config: SOMConfig
    observation_size: int
    action_size: int

    learning_only: ClassVar[tuple[str, ...]] = (
        "target_critic",
        "policy_opt",
        "critic_opt",
        "alpha_opt",
    )  # fields of the state that acting does not need
    profiles: ClassVar[dict[str, SOMConfig]] = {
        "paper": SOMConfig(),
        "laptop": LAPTOP,
        "paper-literal": LITERAL,
    }

    @property
    def sde(self) -> SDE:
        """The forward SDE that the configuration names."""
        kind = VP if self.config.sde == "vp" else VE
        return kind(*self.config.noise_range)

    @property
    def policy_net(self) -> Any:
        """The network u_theta(a, r, t, s), a `Policy`."""
        return Policy(self.action_size, self.config.width, self.config.depth)

    @property
    def critic_net(self) -> Any:
        """The network Q_phi(s, a), a `Critic`."""
        return Critic(self.config.width, self.config.depth)

    def init(self, key) -> SOMState:
        """Fresh parameters and optimizer states."""
        k_policy, k_critic = jax.random.split(key)
        s, a = jnp.zeros(self.observation_size), jnp.zeros(self.action_size)
        policy = self.policy_net.init(
            k_policy, a, jnp.zeros(()), jnp.ones(()), s
        )
        critic = self.critic_net.init(k_critic, s, a)
        log_alpha = jnp.log(jnp.float32(self.config.initial_alpha))
        return SOMState(
            policy,
            critic,
            policy,
            critic,
            optax.adam(self.config.actor_lr).init(policy),
            optax.adam(self.config.critic_lr).init(critic),
            log_alpha,
            optax.adam(self.config.alpha_lr).init(log_alpha),
            jnp.zeros(2),
            jnp.zeros((), jnp.int32),
        )

    def act(self, state: SOMState, observation, key, explore: bool = False):
        """Best-of-N one-step action; with noise when exploring.

        Args:
            observation: [..., O].
            key: random key.
            explore: add the temperature's noise, as during collection.

        Returns:
            Action in [-1, 1], [..., A].
        """
        policy = (
            state.target_policy if self.config.ema_policy else state.policy
        )
        k_action, k_noise = jax.random.split(key)
        action = best_of_n(self, policy, state.critic, observation, k_action)
        if explore:
            action = add_noise(self, action, state.log_alpha, k_noise)
        return action

    def update(self, state: SOMState, batch: Transition, key):
        """One update of critic, policy and temperature.

        Args:
            batch: transitions, leading axis B.
            key: random key.

        Returns:
            New state and a flat dict of scalar metrics.
        """
        config = self.config
        k_critic, k_policy = jax.random.split(key)
        critic, critic_opt, bound, metrics = critic_step(
            self, state, batch, k_critic
        )

        def delayed():
            policy, opt, loss = policy_step(self, state, batch, k_policy)
            return (
                policy,
                opt,
                polyak(state.target_policy, policy, config.tau),
                polyak(state.target_critic, critic, config.tau),
                config.policy_delay * loss,  # its mean counts skipped steps
            )

        policy, policy_opt, target_policy, target_critic, loss = jax.lax.cond(
            state.step % config.policy_delay == 0,
            delayed,
            lambda: (
                state.policy,
                state.policy_opt,
                state.target_policy,
                state.target_critic,
                jnp.zeros(()),
            ),
        )
        log_alpha, alpha_opt = jax.lax.cond(
            state.step % config.alpha_delay == 0,
            lambda: alpha_step(self, state),
            lambda: (state.log_alpha, state.alpha_opt),
        )
        metrics |= {"policy/loss": loss, "alpha": jnp.exp(log_alpha)}
        return SOMState(
            policy,
            critic,
            target_policy,
            target_critic,
            policy_opt,
            critic_opt,
            log_alpha,
            alpha_opt,
            bound,
            state.step + 1,
        ), metrics


# %% Agents by name
AGENTS: dict[str, Any] = {"som": SOM}


def closest(word: str, choices, what: str) -> str:
    """The choice itself, or a ValueError that names the nearest one.

    Raises:
        ValueError: word is not among the choices.
    """
    if word in choices:
        return word
    near = difflib.get_close_matches(word, list(choices), 1, 0.0)[0]
    raise ValueError(f"unknown {what} {word!r}; did you mean {near!r}?")


def make_agent(
    name: str,
    observation_size: int,
    action_size: int,
    profile: str = "laptop",
    **overrides,
):
    """An agent by its name.

    Args:
        name: key of AGENTS.
        observation_size: O.
        action_size: A.
        profile: "paper", "laptop" or "paper-literal".
        **overrides: fields of the agent's config to change.

    Raises:
        ValueError: unknown name, profile or field.
    """
    kind = AGENTS[closest(name, AGENTS, "algorithm")]
    config = kind.profiles[closest(profile, kind.profiles, "profile")]
    known = [f.name for f in fields(config)]
    for key in overrides:
        closest(key, known, f"setting of {name}")
    return kind(replace(config, **overrides), observation_size, action_size)
