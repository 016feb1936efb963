"""What every agent of som.AGENTS must do, whatever it learns inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import NAMES, assert_same, batch_for, make, update

from som import AGENTS, make_agent
from som.training import loop
from som.training.policy import Policy

KEY = jax.random.PRNGKey(0)


def learn(agent, updates, key=KEY):
    state = agent.init(key)
    metrics = {}
    for i in range(updates):
        key = jax.random.PRNGKey(i)
        state, metrics = update(agent, state, batch_for(agent), key)
    return state, metrics


@pytest.mark.parametrize("name", NAMES)
def test_actions_have_their_shape_and_stay_in_the_box(name):
    agent = make(name)
    state, _ = learn(agent, 1)
    for shape in ((3,), (7, 3)):
        s = 3 * jax.random.normal(KEY, shape)
        for explore in (False, True):
            action = agent.act(state, s, KEY, explore=explore)
            assert action.shape == (*shape[:-1], 2)
            assert np.all(np.isfinite(action))
            # PPO's density is that of the sample before the environment clips it.
            if not (agent.on_policy and explore):
                assert np.abs(action).max() <= 1


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_numbers_and_other_seed_others(name):
    agent = make(name)
    first, metrics = learn(agent, 3)
    again, repeated = learn(agent, 3)
    assert_same((first, metrics), (again, repeated))
    other, _ = learn(agent, 3, jax.random.PRNGKey(1))
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    assert any(not np.array_equal(x, y) for x, y in leaves)


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_finite_scalars_and_the_step_counts(name):
    agent = make(name)
    state, metrics = learn(agent, 2)
    assert int(state.step) == 2 and metrics
    if getattr(agent.config, "noise_scale", 0):  # alpha_delay is 2
        assert state.log_alpha != agent.init(KEY).log_alpha
    for key, value in metrics.items():
        assert isinstance(key, str) and np.shape(value) == () and np.isfinite(value)


@pytest.mark.parametrize("name", NAMES)
def test_bad_input_gets_a_sentence(name):
    with pytest.raises(ValueError, match="width is 0; at least 1 is wanted"):
        make(name, width=0)
    with pytest.raises(ValueError, match="did you mean 'width'"):
        make_agent(name, 3, 2, widht=3)
    agent = make(name)
    one = jnp.ones(2)
    policy = Policy(agent, loop.init_seeds(agent, (0,)), "Cart-v0", -one, one)
    with pytest.raises(ValueError, match="finite numbers are wanted"):
        policy(np.array([0.0, np.nan, 0.0]))
    with pytest.raises(ValueError, match=r"\[3\] or \[B, 3\] is wanted"):
        policy(np.zeros(4))


def test_profiles_are_of_one_kind():
    for name in NAMES:
        kind = AGENTS[name]
        for profile, config in kind.profiles.items():
            assert isinstance(config, type(kind.profiles["paper"])), (name, profile)
        assert set(kind.loops) <= set(kind.profiles)
