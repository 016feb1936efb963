"""Inputs that several tests share."""

import multiprocessing
from dataclasses import dataclass, fields
from functools import partial

import flax.linen as nn
import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np

from som import AGENTS, make_agent
from som.agent.actor_critic import ActorCritic, ActorCriticConfig, q_value
from som.agent.critic import Transition


def transitions(n, observation_size=3, action_size=2):
    """Make n random steps of experience; none is terminal."""
    keys = jax.random.split(jax.random.PRNGKey(5), 3)
    return Transition(
        jax.random.normal(keys[0], (n, observation_size)),
        jax.random.uniform(keys[1], (n, action_size), minval=-1, maxval=1),
        jnp.ones(n),
        jnp.zeros(n),
        jax.random.normal(keys[2], (n, observation_size)),
    )


@dataclass(frozen=True)
class Climber(ActorCritic):
    """Moves its noise up the critic; compiles in no time."""

    profiles = {"laptop": ActorCriticConfig(actor_lr=1e-2)}  # noqa: RUF012

    def init_policy(self, key):
        return nn.Dense(self.action_size).init(key, jnp.zeros(self.action_size))

    def transport(self, policy, noise, observation, key):
        move = nn.Dense(self.action_size)
        return jnp.stack([noise, move.apply(policy, noise)])

    def policy_loss(self, policy, state, batch, key):
        noise = jax.random.normal(key, batch.action.shape)
        a = self.transport(policy, noise, batch.observation, key)[-1]
        return -jnp.mean(q_value(self, state.critic, batch.observation, a))


class Cart(gym.Env):
    """Bring a cart on a line to rest at the origin, in 20 steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = self.np_random.uniform(-1, 1, 2)
        return np.float32(self.state), {}

    def step(self, action):
        x, v = self.state
        v = 0.8 * v + 0.2 * float(action[0])
        self.state = np.array([np.clip(x + 0.4 * v, -3, 3), v])
        return np.float32(self.state), -float(x * x), False, False, {}


gym.register("Cart-v0", entry_point=Cart, max_episode_steps=20)


def in_a_process(job, *args):
    """Do a job in another process, and return how that process ended.

    It is forked from one that has imported som and not yet touched a device, which
    saves the imports; the job is a function of a module that can be imported.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["som"])
    process = context.Process(target=job, args=args)
    process.start()
    process.join()
    return process.exitcode


NAMES = sorted(AGENTS)
ON_POLICY = [name for name in NAMES if AGENTS[name].on_policy]
OFF_POLICY = [name for name in NAMES if name not in ON_POLICY]
TINY = {
    "width": 8, "depth": 1, "batch_size": 8, "num_particles": 2, "num_samples": 2,
    "num_steps": 2, "num_levels": 3, "num_gradient_steps": 2, "num_uniform": 2,
    "entropy_samples": 4, "policy_steps": 3, "value_steps": 3, "policy_delay": 2,
    "alpha_delay": 2, "chunk": 0,
}  # fmt: skip


def own(name, settings):
    """The settings that an agent's configuration has."""
    known = {f.name for f in fields(AGENTS[name].profiles["laptop"])}
    return {k: v for k, v in settings.items() if k in known}


def tiny(name, **changes):
    return own(name, TINY | changes)


def make(name, **changes):
    """An agent of three observations and two actions."""
    return make_agent(name, 3, 2, **tiny(name, **changes))


def batch_for(agent):
    """Experience in the shape that the agent's update takes."""
    if not agent.on_policy:
        return transitions(8)
    return jax.tree.map(lambda x: x.reshape(4, 3, *x.shape[1:]), transitions(12))


@partial(jax.jit, static_argnums=0)
def update(agent, state, batch, key):
    return agent.update(state, batch, key)


def assert_same(a, b, **tolerance):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(x, y, **({"rtol": 0, "atol": 0} | tolerance))
