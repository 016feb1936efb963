"""The bandit in the plane: data, known critics, counting, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import Climber

from som.agent.actor_critic import AGENTS, make_agent
from som.studies import bandit
from som.studies.bandit import (
    check_reward,
    fit,
    fit_seeds,
    noise_grid,
    query,
    with_known_critic,
)

TINY = {"width": 8, "depth": 1, "batch_size": 8}
KEY = jax.random.PRNGKey(0)


def slope(a):
    """A reward that grows to the east."""
    return a[..., 0]


@pytest.fixture(autouse=True)
def climber(monkeypatch):
    monkeypatch.setitem(AGENTS, "climber", Climber)
    monkeypatch.setattr(bandit, "CHUNK", 10)


def test_queries_are_half_uniform_half_the_policys():
    agent = make_agent("som", 1, 2, **TINY)
    batch = query(agent, agent.init(KEY), slope, 0.0, 0.5, jax.random.PRNGKey(1))
    assert batch.action.shape == (8, 2)
    assert np.abs(batch.action).max() <= 1
    np.testing.assert_array_equal(batch.reward, batch.action[:, 0])
    assert np.all(batch.terminated == 1)


def test_noise_has_the_stated_deviation():
    agent = make_agent("som", 1, 2, **TINY | {"batch_size": 20_000})
    batch = query(agent, agent.init(KEY), slope, 0.3, 0.0, jax.random.PRNGKey(1))
    noise = np.asarray(batch.reward - batch.action[:, 0])
    assert abs(noise.std() - 0.3) < 0.006  # four standard errors
    assert abs(noise.mean()) < 0.0085


def test_known_critic_is_the_reward():
    known = fit("climber", slope, KEY, 10, known=True, **TINY)
    actions = noise_grid(5, 1.0)
    np.testing.assert_allclose(known.q(actions), actions[:, 0], rtol=1e-6)
    agent = with_known_critic(make_agent("climber", 1, 2, **TINY), slope)
    assert agent.init(KEY).critic == {"params": {}}


def test_sampler_stays_in_the_box_and_keeps_the_noise():
    sampler = fit("climber", slope, KEY, 10, **TINY)
    noise = 3 * noise_grid()
    path = sampler.path(noise)
    np.testing.assert_allclose(path[0], noise, rtol=1e-6)
    np.testing.assert_array_equal(path[-1], sampler(noise))
    assert np.abs(path[-1]).max() <= 1


def test_same_key_same_sampler_and_progress_is_told():
    told = []
    first = fit("climber", slope, KEY, 25, progress=told.append, **TINY)
    second = fit("climber", slope, KEY, 25, **TINY)
    assert told == [10, 20, 25]
    np.testing.assert_array_equal(first(noise_grid()), second(noise_grid()))


def test_seeds_differ_and_do_not_disturb_each_other():
    keys = jax.random.split(KEY, 2)
    both = fit_seeds("climber", slope, keys, 20, **TINY)
    alone = fit("climber", slope, keys[1], 20, **TINY)
    np.testing.assert_allclose(both[1](noise_grid()), alone(noise_grid()), atol=1e-4)
    assert not np.allclose(both[0](noise_grid()), alone(noise_grid()), atol=1e-2)


def test_slope_is_climbed():
    sampler = fit(
        "som", slope, KEY, 400, known=True, width=32, depth=2, batch_size=64,
        num_samples=8, actor_lr=3e-3, policy_delay=1, ema_policy=False,
    )  # fmt: skip
    assert np.mean(sampler(noise_grid())[:, 0]) > 0.5


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        (lambda a: a, r"\(1000, 2\); one number for each action"),
        (lambda a: jnp.sum(a), r"to \(\); one number"),
        (lambda a: jnp.log(a[..., 0]), r"reward of action \[.*\] is not finite"),
        (lambda a: np.cos(a[..., 0]), "JAX cannot trace the reward"),
        (lambda a: a[..., 0] if jnp.all(a < 2) else a[..., 1], "asks for a value by"),
    ],
)
def test_bad_rewards_get_one_sentence(reward, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit("climber", reward, KEY, 10, **TINY)


def test_a_small_region_that_is_not_finite_is_found():
    """The check before training cannot see it; the queries run into it."""

    def hole(a):
        return jnp.where(jnp.linalg.norm(a - 0.5, axis=-1) > 0.02, a[..., 0], jnp.nan)

    check_reward(hole)
    options = TINY | {"batch_size": 256}
    with pytest.raises(ValueError, match=r"action \[0\.\d+, 0\.\d+\] is not finite"):
        fit("climber", hole, KEY, 100, **options)


def test_whole_numbers_are_keys():
    by_key = fit("climber", slope, jax.random.PRNGKey(3), 10, **TINY)
    by_number = fit("climber", slope, 3, 1e1, **TINY)
    noise = by_key.prior(jax.random.PRNGKey(5), 4)
    np.testing.assert_array_equal(noise, by_number.prior(np.int64(5), 4))
    np.testing.assert_array_equal(by_key(noise), by_number(noise))
    np.testing.assert_array_equal(by_key.path(noise, 0), by_key.path(noise))
    for wrong in (0.5, "0", None):
        with pytest.raises(ValueError, match=r"the key is .*whole number"):
            fit("climber", slope, wrong, 10, **TINY)


def test_other_bad_input():
    with pytest.raises(ValueError, match="steps is 0"):
        fit("climber", slope, KEY, 0, **TINY)
    with pytest.raises(ValueError, match=r"smo.*som"):
        fit("smo", slope, KEY, 10)
    with pytest.raises(ValueError, match="widht"):
        fit("climber", slope, KEY, 10, widht=8)


def test_divergence_is_reported():
    with pytest.raises(FloatingPointError, match="climber diverged at update 10"):
        fit("climber", slope, KEY, 20, critic_lr=1e38, **TINY)
