"""Every agent of som.AGENTS learns: to climb a hill, and a cart."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import NAMES, OFF_POLICY, ON_POLICY, TINY, own

from som import make_agent, train
from som.agent.actor_critic import candidates
from som.agent.critic import Transition

KEY = jax.random.PRNGKey(0)
HILL = {
    "width": 32, "depth": 2, "batch_size": 64, "num_particles": 4, "num_samples": 16,
    "num_steps": 10, "discount": 0.0, "reward_scale": 1.0, "actor_lr": 3e-3,
    "critic_lr": 3e-3, "tau": 0.05, "policy_delay": 1, "noise_scale": 0.05,
}  # fmt: skip
OWN = {
    "som": {"inverse_temperature": 20.0},
    "sac": {"initial_alpha": 0.01, "alpha_lr": 0.0},
    "qsm": {"first_step": 0.02, "q_factor": 10.0},
    "dacer": {"actor_lr": 1e-3},
    "sdac": {"q_factor": 50.0},
    "lql": {"num_steps": 100, "step_size": 2e-3, "weight": 10.0},
}  # rewards here are about one, not hundreds: what each agent wants then


def test_no_setting_is_dropped_in_silence():
    for settings in (TINY, HILL):
        assert set(settings) == set().union(*(own(name, settings) for name in NAMES))
    for name, changes in OWN.items():
        assert own(name, changes) == changes


def hill(s, a):
    """One-step episodes of a quadratic bandit: the best action is s."""
    reward = 1 - jnp.sum((jnp.clip(a, -1, 1) - s) ** 2, -1)
    return Transition(s, a, reward, jnp.ones_like(reward), s)


@pytest.mark.parametrize("name", OFF_POLICY)
def test_climbs_a_hill_that_depends_on_the_state(name):
    agent = make_agent(name, 2, 2, **own(name, HILL | OWN.get(name, {})))

    def body(state, key):
        k_draw, k_update = jax.random.split(key)
        s, a = jax.random.uniform(k_draw, (2, 64, 2), minval=-0.7, maxval=0.7)
        batch = agent.revise(state, hill(s, a))
        return agent.update(state, batch, k_update)[0], None

    keys = jax.random.split(KEY, 800)
    state, _ = jax.jit(partial(jax.lax.scan, body))(agent.init(KEY), keys)
    s = jax.random.uniform(keys[1], (300, 2), minval=-0.7, maxval=0.7)
    policy = agent.acting_policy(state)
    one = jax.jit(partial(candidates, agent), static_argnums=3)(policy, s, keys[2], 1)
    best = jax.jit(agent.act)(state, s, keys[2])
    distance = [float(jnp.linalg.norm(a - s, axis=-1).mean()) for a in (one[0], best)]
    assert distance[0] < 0.5 and distance[1] < 0.3, distance  # uniform: 0.83


@pytest.mark.parametrize("name", ON_POLICY)
def test_climbs_the_hill_by_its_own_actions(name):
    agent = make_agent(name, 2, 2, width=32, depth=2, discount=0.0)

    def body(state, key):
        k_state, k_act, k_update = jax.random.split(key, 3)
        s = jax.random.uniform(k_state, (1, 256, 2), minval=-0.7, maxval=0.7)
        a = agent.act(state, s, k_act, explore=True)
        return agent.update(state, hill(s, a), k_update)[0], None

    keys = jax.random.split(KEY, 200)
    state, _ = jax.jit(partial(jax.lax.scan, body))(agent.init(KEY), keys)
    s = jax.random.uniform(keys[1], (300, 2), minval=-0.7, maxval=0.7)
    distance = jnp.linalg.norm(agent.act(state, s, keys[2]) - s, axis=-1)
    assert distance.mean() < 0.3  # uniform: 0.83


@pytest.mark.parametrize("name", ON_POLICY)
def test_brings_the_cart_to_rest(name):
    options = {"width": 32, "depth": 2, "warmup": 0, "chunk_steps": 500}
    run = train(name, "Cart-v0", 15_000, evaluations=1, episodes=50, **options)
    idle = -6.0  # mean return of an idle cart, within 1
    assert np.mean(run.record["curve"][-1]["returns"]) > idle / 3
