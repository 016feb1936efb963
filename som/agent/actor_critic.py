"""The actor-critic frame.

Exported by tools/export.py from book/agent/actor_critic.md; edit the chapter.
"""

__all__ = [
    "at_least_one",
    "ActorCriticConfig",
    "LAPTOP_FRAME",
    "SAMPLE_EFFICIENT",
    "BASELINE_LOOPS",
    "EFFICIENT_LOOPS",
    "ActorCriticState",
    "candidates",
    "q_value",
    "best_of_n",
    "add_noise",
    "critic_step",
    "policy_step",
    "alpha_step",
    "ActorCritic",
    "AGENTS",
    "OFFLINE",
    "ELSEWHERE",
    "closest",
    "make_agent",
]

# %% Imports
import difflib
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from som.agent.batch_norm import joint_pass
from som.agent.critic import (
    Transition,
    critic_loss,
    polyak,
    scalar_critic_loss,
    td_target,
    update_bound,
)
from som.agent.networks import Critic, smoothed
from som.agent.temperature import temperature_loss


# %% The settings they share
def at_least_one(config: Any, *names: str) -> None:
    """Refuse counts below one; a count may be None.

    Raises:
        ValueError: one of the named settings is below 1.
    """
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; at least 1 is wanted")


@dataclass(frozen=True)
class ActorCriticConfig:
    """Settings that every off-policy agent has; defaults are the paper's."""

    width: int = 256  # units per hidden layer
    depth: int = 3  # hidden layers
    activation: str = "gelu"  # between the layers, a name of jax.nn
    batch_size: int = 256  # transitions per update
    discount: float = 0.99  # gamma, per environment step
    tau: float = 0.005  # share of the online networks moved into the target
    reward_scale: float = 0.2  # factor on every reward
    actor_lr: float = 1e-4  # Adam step of the policy
    critic_lr: float = 1e-4  # Adam step of the critics
    alpha_lr: float = 7e-3  # Adam step of log alpha
    alpha_delay: int = 250  # updates between two steps of alpha
    target_entropy: float = -0.9  # nats per action dimension
    noise_scale: float = 0.1  # exploration noise in units of alpha
    num_particles: int = 32  # N of best-of-N

    target_particles: int | None = None  # N in the Bellman target; None: N
    batch_norm: bool = False  # critics normalise what enters each layer
    lagging_critic: bool = True  # who values what follows; False: the online
    critic_momentum: float = 0.9  # first decay rate of the critics' Adam
    distributional: bool = True  # critics predict a std beside the mean
    initial_alpha: float = 5.0  # where the temperature starts
    policy_delay: int = 2  # updates per step of policy and targets
    ema_policy: bool = True  # act with the lagging copy of the policy
    bins: int = 0  # of a categorical critic; 0: none
    scaled_rewards: bool = False  # so that returns fit into [-5, 5]
    n_step: int = 1  # rewards before the Bellman target's value
    newest: int = 0  # rows of each batch that are the latest
    twin_mean: bool = False  # instead of the smaller twin
    unit_weights: bool = False  # critics' hidden columns have length one

    def __post_init__(self):
        at_least_one(
            self,
            "width",
            "depth",
            "batch_size",
            "num_particles",
            "target_particles",
        )


LAPTOP_FRAME: dict[str, Any] = {
    "width": 128,
    "batch_size": 128,
    "num_particles": 16,
    "tau": 0.02,
    "reward_scale": 1.0,
    "actor_lr": 1e-3,
    "critic_lr": 1e-3,
    "initial_alpha": 1.0,
}  # what every agent's profile `laptop` changes

SAMPLE_EFFICIENT: dict[str, Any] = {
    "batch_norm": True,
    "lagging_critic": False,
    "critic_momentum": 0.5,
}  # what the profile `sample-efficient` changes in `laptop`

BASELINE_LOOPS: dict[str, dict[str, Any]] = {"paper": {"warmup": 30_000}}
"""Table 3 of the paper: its baselines begin to learn before SOM does."""
EFFICIENT_LOOPS: dict[str, dict[str, Any]] = {
    "sample-efficient": {"updates_per_step": 1.0, "num_envs": 1}
}
"""A normalised critic can use an update for every step."""


# %% The state
class ActorCriticState(NamedTuple):
    """All that changes while an agent learns (a pytree of arrays)."""

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
    agent: "ActorCritic", policy, observation: Float[Array, "... O"], key, num
) -> Float[Array, "N ... A"]:
    """N actions for each observation, clipped to the box."""
    k_noise, k_path = jax.random.split(key)
    shape = (num, *observation.shape[:-1], agent.action_size)
    noise = agent.prior_std * jax.random.normal(k_noise, shape)
    path = agent.transport(policy, noise, observation, k_path)
    return jnp.clip(path[-1], -1, 1)


def q_value(
    agent: "ActorCritic", critic, observation, action
) -> Float[Array, "..."]:
    """The smaller of the twins' means."""
    both = agent.critic_net.apply(critic, observation, action)[0]
    return (jnp.mean if agent.config.twin_mean else jnp.min)(both, -1)


def best_of_n(
    agent: "ActorCritic", policy, critic, observation, key, num: Any = None
) -> Float[Array, "... A"]:
    """Of N actions for each observation [..., O], the one of greatest Q.

    N is `num`, or else the configuration's num_particles.
    """
    num = num or agent.config.num_particles
    actions = candidates(agent, policy, observation, key, num)
    if num == 1:
        return actions[0]
    best = jnp.argmax(q_value(agent, critic, observation, actions), 0)
    return jnp.take_along_axis(actions, best[None, ..., None], 0)[0]


def add_noise(
    agent: "ActorCritic", action: Float[Array, "... A"], log_alpha, key
) -> Float[Array, "... A"]:
    """Add noise of deviation noise_scale * alpha, clip to the box."""
    std = agent.config.noise_scale * jnp.exp(log_alpha)
    return jnp.clip(
        action + std * jax.random.normal(key, action.shape), -1, 1
    )


def unit_columns(params, depth):
    (name, net), = params.items()
    net = dict(net)
    groups = [["Dense_0", "Dense_1"]]
    groups += [[f"Dense_{i}"] for i in range(2, depth + 1)]
    for group in groups:
        length = jnp.sqrt(
            sum(jnp.sum(net[k]["kernel"] ** 2, -2, keepdims=True) for k in group)
        )
        for k in group:
            net[k] = net[k] | {"kernel": net[k]["kernel"] / length}
    return {name: net}


# %% The critic's step
def critic_step(agent: "ActorCritic", state, batch: Transition, key):
    """One Adam step of the twin critics towards the best-of-N target."""
    config = agent.config
    k_next, k_target = jax.random.split(key)
    next_action, cost = batch.action, jnp.zeros(len(batch.reward))
    if config.discount > 0:  # else a bandit: nothing follows
        next_action, cost = agent.follow(
            state, batch.next_observation, k_next
        )
    now = batch.observation, batch.action
    after = batch.next_observation, next_action

    def loss(params):
        critic = state.critic | {"params": params}
        (mean, std), (next_mean, next_std), stats = agent.both_values(
            critic, state.target_critic, now, after
        )
        next_mean = next_mean - cost[:, None]
        if config.twin_mean:
            next_mean = jnp.broadcast_to(
                jnp.mean(next_mean, -1, keepdims=True), next_mean.shape
            )
        if config.bins:
            aim = config.reward_scale * batch.reward[:, None]
            aim += (config.discount * (1 - batch.terminated))[
                :, None
            ] * jnp.min(next_mean, -1, keepdims=True)
            mass = jax.lax.stop_gradient(smoothed(aim, config.bins))
            value = -jnp.sum(jnp.mean(jnp.sum(mass * std, 1), 0))
            return value, (stats, state.bound, mean, jnp.zeros_like(mean))
        target = td_target(
            k_target,
            config.reward_scale * batch.reward,
            config.discount * (1 - batch.terminated),
            next_mean,
            next_std,
        )
        bound = update_bound(state.bound, std, config.tau, state.step == 0)
        if config.distributional:
            value = critic_loss(mean, std, target, bound)
        else:
            value = scalar_critic_loss(mean, target)
        return value, (stats, bound, mean, std)

    (value, (stats, bound, mean, std)), grads = jax.value_and_grad(
        loss, has_aux=True
    )(state.critic["params"])
    critic, opt = agent.critic_adam(state.critic, grads, state.critic_opt)
    metrics = {
        "critic/loss": value,
        "critic/q": jnp.mean(mean),
        "critic/std": jnp.mean(std),
    }
    return critic | stats, opt, bound, metrics


# %% The policy's step and the temperature's
def policy_step(agent: "ActorCritic", state, batch: Transition, key):
    """One Adam step of the policy against the critic of the last update."""
    loss, grads = jax.value_and_grad(
        lambda policy: agent.policy_loss(policy, state, batch, key)
    )(state.policy)
    adam = optax.adam(agent.config.actor_lr)
    updates, opt = adam.update(grads, state.policy_opt)
    return optax.apply_updates(state.policy, updates), opt, loss


def alpha_step(agent: "ActorCritic", state, batch: Transition, key):
    """One Adam step of log alpha."""
    gradient = jax.grad(agent.alpha_loss)(state.log_alpha, state, batch, key)
    adam = optax.adam(agent.config.alpha_lr)
    update, opt = adam.update(gradient, state.alpha_opt)
    return state.log_alpha + update, opt


# %% The agent
@dataclass(frozen=True)
class ActorCritic:
    """What off-policy agents share; an agent fills in the three blanks.

    Args:
        config: settings, an ActorCriticConfig or a richer one.
        observation_size: O.
        action_size: A; actions live in [-1, 1]^A.
    """

    config: Any
    observation_size: int
    action_size: int

    profiles: ClassVar[dict[str, Any]] = {}  # configs by name
    loops: ClassVar[dict[str, dict[str, Any]]] = {}  # see training/loop
    on_policy: ClassVar[bool] = False  # learns from its latest steps only
    rewrites: ClassVar[bool] = False  # guides are kept in the replay
    prior_std: ClassVar[Any] = 1.0  # deviation of the noise that is carried
    learning_only: ClassVar[tuple[str, ...]] = (
        "target_critic",
        "policy_opt",
        "critic_opt",
        "alpha_opt",
    )  # fields of the state that acting does not need

    def init_policy(self, key) -> Any:
        """Fresh parameters of the policy."""
        raise NotImplementedError

    def transport(self, policy, noise, observation, key) -> Array:
        """The way from noise to action, both ends included.

        Args:
            policy: parameters.
            noise: [..., A], of deviation prior_std.
            observation: [..., O], shapes that broadcast with the noise's.
            key: random key, for policies that add noise on the way.

        Returns:
            Points on the way, [T + 1, ..., A]; the last is the action.
        """
        raise NotImplementedError

    def policy_loss(self, policy, state, batch: Transition, key) -> Array:
        """What the policy minimises on a batch of transitions, a scalar."""
        raise NotImplementedError

    def next_action(self, state, observation, key) -> Array:
        """The action whose value the Bellman target takes, [B, A]."""
        k_action, k_noise = jax.random.split(key)
        action = best_of_n(
            self,
            state.policy,
            state.critic,
            observation,
            k_action,
            self.config.target_particles,
        )
        return add_noise(self, action, state.log_alpha, k_noise)

    def follow(self, state, observation, key) -> tuple[Array, Array]:
        """The next action, [B, A], and what its value pays for it, [B]."""
        action = self.next_action(state, observation, key)
        return action, jnp.zeros(len(observation))

    def both_values(self, critic, lagging, now, after):
        """Mean and std at (s, a) and at (s', a'), and new statistics.

        Args:
            critic, lagging: online and lagging parameters.
            now, after: pairs of observations and actions, [B, O], [B, A].
        """
        net, config = self.critic_net, self.config
        if not config.lagging_critic:
            lagging = jax.lax.stop_gradient(critic)
        if not config.batch_norm:
            return net.apply(critic, *now), net.apply(lagging, *after), {}
        here, there, stats = joint_pass(net, critic, now, after)
        if config.lagging_critic:
            _, there, _ = joint_pass(net, lagging, now, after)
        return here, jax.lax.stop_gradient(there), stats

    def critic_adam(self, critic, grads, opt):
        """The critic after a step of Adam, and the optimizer's new state."""
        config = self.config
        adam = optax.adam(config.critic_lr, config.critic_momentum)
        updates, opt = adam.update(grads, opt)
        params = optax.apply_updates(critic["params"], updates)
        if config.unit_weights:
            params = unit_columns(params, config.depth)
        return critic | {"params": params}, opt

    def revise(self, state, batch: Transition) -> Transition:
        """The batch with better guides, before an update uses it."""
        return batch

    def alpha_loss(self, log_alpha, state, batch: Transition, key) -> Array:
        """What the temperature minimises, a scalar.

        Here the entropy is that of the noise, in closed form; without noise
        there is nothing to set, and the temperature rests. An agent that
        measures the entropy of its actions draws them at the batch's states.
        """
        if self.config.noise_scale == 0:
            return 0.0 * log_alpha
        target = self.config.target_entropy * self.action_size
        scale = self.config.noise_scale
        return temperature_loss(log_alpha, target, scale, self.action_size)

    @property
    def critic_net(self) -> Any:
        """The network Q_phi(s, a), a `Critic`."""
        config = self.config
        return Critic(
            config.width, config.depth, config.activation, config.batch_norm,
            bins=config.bins,
        )

    def init(self, key) -> ActorCriticState:
        """Fresh parameters and optimizer states."""
        k_policy, k_critic = jax.random.split(key)
        s, a = jnp.zeros(self.observation_size), jnp.zeros(self.action_size)
        policy = self.init_policy(k_policy)
        critic = self.critic_net.init(k_critic, s, a)
        log_alpha = jnp.log(jnp.float32(self.config.initial_alpha))
        return ActorCriticState(
            policy,
            critic,
            policy,
            critic,
            optax.adam(self.config.actor_lr).init(policy),
            optax.adam(self.config.critic_lr).init(critic["params"]),
            log_alpha,
            optax.adam(self.config.alpha_lr).init(log_alpha),
            jnp.zeros(2),
            jnp.zeros((), jnp.int32),
        )

    def acting_policy(self, state) -> Any:
        """The parameters that act: the lagging ones if ema_policy says so."""
        return state.target_policy if self.config.ema_policy else state.policy

    def act(self, state, observation, key, explore: bool = False):
        """Best-of-N action; with noise when exploring.

        Args:
            observation: [..., O].
            key: random key.
            explore: add the temperature's noise, as during collection.

        Returns:
            Action in [-1, 1], [..., A].
        """
        policy = self.acting_policy(state)
        k_action, k_noise = jax.random.split(key)
        action = best_of_n(self, policy, state.critic, observation, k_action)
        if explore:
            action = add_noise(self, action, state.log_alpha, k_noise)
        return action

    def update(self, state, batch: Transition, key):
        """One update of critic, policy and temperature.

        Args:
            batch: transitions, leading axis B.
            key: random key.

        Returns:
            New state and a flat dict of scalar metrics.
        """
        config = self.config
        k_critic, k_policy, k_alpha = jax.random.split(key, 3)
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
            lambda: alpha_step(self, state, batch, k_alpha),
            lambda: (state.log_alpha, state.alpha_opt),
        )
        metrics |= {"policy/loss": loss, "alpha": jnp.exp(log_alpha)}
        return ActorCriticState(
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
AGENTS: dict[str, Any] = {}
OFFLINE: dict[str, Any] = {}
"""Agents that learn from recordings: they act, but not in the loop."""
ELSEWHERE = {
    "gamma": "here it is 'discount'",
    "gae_lambda": "here it is 'trace', of ppo",
    "clip_range": "here it is 'clip', of ppo",
    "n_epochs": "here they are 'policy_steps' and 'value_steps', of ppo",
    "learning_rate": "here they are 'actor_lr' and 'critic_lr'",
    "lr": "here they are 'actor_lr' and 'critic_lr'",
    "policy_lr": "here it is 'actor_lr'",
    "q_lr": "here it is 'critic_lr'",
    "ent_coef": "here it is 'initial_alpha', where the temperature starts",
    "polyak": "here it is 'tau', the share that moves",
    "policy_frequency": "here it is 'policy_delay'",
    "target_update_interval": "here it is 'policy_delay'",
    "net_arch": "here they are 'width' and 'depth'",
    "hidden_sizes": "here they are 'width' and 'depth'",
    "activation_fn": "here it is 'activation'",
    "buffer_size": "here it is 'capacity', of the loop",
    "learning_starts": "here it is 'warmup', of the loop",
    "start_steps": "here it is 'warmup', of the loop",
    "train_freq": "here it is 'updates_per_step', of the loop",
    "gradient_steps": "here it is 'updates_per_step', of the loop",
    "n_envs": "here it is 'num_envs', of the loop",
    "n_steps": "here it is 'chunk_steps', of the loop",
    "step": "here it is the argument 'steps'",
    "total_timesteps": "here it is the argument 'steps'",
    "env_id": "here it is the argument 'env'",
    "environment": "here it is the argument 'env'",
    "algorithm": "here it is the argument 'algo'",
    "callback": "here it is the argument 'progress'",
    "tensorboard_log": "here it is the argument 'log'",
    "seed": "here it is the argument 'seeds'",
    "verbose": "there is none: see the argument 'progress'",
    "device": "there is none: JAX takes a GPU where it finds one, unless "
    "the environment has JAX_PLATFORMS=cpu",
    "td3": "there is none; 'sac' is the nearest relative",
    "ddpg": "there is none; 'sac' is the nearest relative",
    "a2c": "there is none; 'ppo' is the nearest relative",
    "trpo": "there is none; 'ppo' is the nearest relative",
    "dqn": "there is none: actions here are continuous",
}  # names in other libraries, and what to say to them


def closest(word: str, choices, what: str) -> str:
    """The choice itself, or a ValueError that leads to the right one.

    Args:
        word: what was given.
        choices: the names there are.
        what: what they are names of, for the sentence.

    Raises:
        ValueError: word is not among the choices.
    """
    if word in choices:
        return word
    plain = str(word).lower().replace("-", "_")
    near = [plain] if plain in choices else None
    near = near or difflib.get_close_matches(plain, list(choices), 3)
    hint = f"known are {', '.join(sorted(choices))}"
    every = [*choices, *ELSEWHERE]
    best = difflib.get_close_matches(plain, every, 1, 0.8)
    if best and best[0] in ELSEWHERE:
        hint = f"if {best[0]!r} is meant: {ELSEWHERE[best[0]]}"
    elif near:
        hint = f"did you mean {' or '.join(map(repr, near))}?"
    hint = ELSEWHERE.get(plain, hint)
    raise ValueError(f"unknown {what} {word!r}; {hint}")


def make_agent(
    name: str,
    observation_size: int,
    action_size: int,
    profile: str = "laptop",
    **overrides,
):
    """An agent by its name.

    Args:
        name: key of AGENTS or of OFFLINE.
        observation_size: O.
        action_size: A.
        profile: key of the agent's profiles, "laptop", "paper", ...
        **overrides: fields of the agent's config to change.

    Raises:
        ValueError: unknown name, profile or field.
    """
    kinds = AGENTS | OFFLINE
    kind = kinds[closest(name, kinds, "algorithm")]
    config = kind.profiles[closest(profile, kind.profiles, "profile")]
    known = [f.name for f in fields(config)]
    for key in overrides:
        closest(key, known, f"setting of {name}")
    return kind(replace(config, **overrides), observation_size, action_size)
