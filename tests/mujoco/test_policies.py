"""Clouds of candidates: drawn as they act, judged by one critic, laid on a map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import som
from som.mujoco import policies
from som.studies.bandit import with_known_critic
from som.training.loop import init_seeds
from som.training.policy import Policy, Scale

KEY = jax.random.PRNGKey(0)
C = np.array([1.0, -2.0], np.float32)
REACHER = 11, 2  # sizes of its observations and actions
SMALL = {"width": 8, "depth": 1, "num_particles": 3, "residual": False}


def policy(algo="som", reward=None, zero=False):
    """Make an untrained policy; a reward takes the place of its critic."""
    agent = som.make_agent(algo, *REACHER, **SMALL)
    agent = with_known_critic(agent, reward) if reward else agent
    state = init_seeds(agent, (0,))
    state = jax.tree.map(jnp.zeros_like, state) if zero else state
    ones = np.ones(REACHER[1], np.float32)
    return Policy(agent, state, "Reacher-v4", -ones, ones)


def states(num):
    return np.random.default_rng(1).normal(size=(num, 11)).astype(np.float32)


@pytest.fixture(scope="module")
def two():
    return {"SOM": policy("som"), "MFP": policy("mfp")}


def test_candidates_are_those_of_the_acting_policy(two):
    s = states(4)
    for one in two.values():
        drawn = policies.draw_candidates(one, s, 6, KEY)
        assert drawn.shape == (6, 4, 2) and np.abs(drawn).max() <= 1
        assert np.array_equal(drawn, policies.draw_candidates(one, s, 6, KEY))
        other = policies.draw_candidates(one, s, 6, jax.random.PRNGKey(1))
        assert not np.array_equal(drawn, other)
        k_action, _ = jax.random.split(jax.random.PRNGKey(1))
        drawn = policies.draw_candidates(one, s, SMALL["num_particles"], k_action)
        q = policies.candidate_q(one, s, drawn)
        one.calls = 0
        done = policies.candidate_q(one, s, one.act(s)[None])
        np.testing.assert_allclose(done[0], q.max(0), rtol=1e-4, atol=1e-5)


def test_a_policy_sees_states_in_its_own_units(two):
    plain, s = two["SOM"], states(4)
    scale = Scale(np.full((1, 11), 3.0), np.full((1, 11), 2.0))
    ones = np.ones(REACHER[1], np.float32)
    seeds = init_seeds(plain.agent, (0,))
    scaled = Policy(plain.agent, seeds, "Reacher-v4", -ones, ones, scale=scale)
    drawn = policies.draw_candidates(scaled, s, 5, KEY)
    by_hand = policies.draw_candidates(plain, (s - 3) / 2, 5, KEY)
    np.testing.assert_allclose(drawn, by_hand, atol=1e-5)
    np.testing.assert_allclose(
        policies.candidate_q(scaled, s, drawn),
        policies.candidate_q(plain, (s - 3) / 2, drawn),
        rtol=1e-4,
        atol=1e-5,
    )


def test_q_is_the_smaller_twin_in_units_of_the_task(two):
    one, s = two["MFP"], states(3)
    actions = policies.draw_candidates(one, s, 5, KEY)
    q = policies.candidate_q(one, s, actions)
    for i, j in np.ndindex(5, 3):
        twins = one.agent.critic_net.apply(
            one.state.critic, *map(jnp.asarray, (s[j], actions[i, j]))
        )[0]
        scale = one.agent.config.reward_scale
        np.testing.assert_allclose(q[i, j], twins.min() / scale, rtol=1e-4)


def test_statistics_of_a_known_q():
    one = policy(reward=lambda a: a @ C, zero=True)
    s, scale = states(3), one.agent.config.reward_scale
    (key,) = jax.random.split(KEY, 1)
    actions = policies.draw_candidates(one, s, 400, key)
    _, spread = policies.q_statistics({"one": one}, one, s, 400, KEY)["one"]
    known = np.sqrt([np.cov(a.T, bias=True) @ C @ C for a in actions.swapaxes(0, 1)])
    np.testing.assert_allclose(spread, known / scale, rtol=1e-3)
    k_noise, _ = jax.random.split(key)
    noise = one.agent.prior_std * jax.random.normal(k_noise, actions.shape)
    np.testing.assert_allclose(actions, np.clip(noise, -1, 1), atol=1e-6)


def test_ranks_of_policies_survive_an_affine_change_of_q(two):
    judge = [
        policy(reward=lambda a: jnp.sin(3 * a @ C)),
        policy(reward=lambda a: 2 * jnp.sin(3 * a @ C) + 5),
    ]
    s = states(20)
    plain, changed = (policies.q_statistics(two, j, s, 50, KEY) for j in judge)
    assert list(plain) == ["SOM", "MFP"]
    higher = [p["SOM"] > p["MFP"] for p in (plain, changed)]
    assert np.array_equal(*higher)
    scale = judge[0].agent.config.reward_scale
    for name, (mean, spread) in plain.items():
        np.testing.assert_allclose(changed[name][0], 2 * mean + 5 / scale, rtol=1e-4)
        np.testing.assert_allclose(changed[name][1], 2 * spread, rtol=1e-3)


def test_map_keeps_far_clusters_apart_and_forgets_their_widths():
    rng = np.random.default_rng(0)
    tight, wide = rng.normal(size=(2, 60, 3))
    cloud = np.concatenate([0.02 * tight - 0.5, 0.2 * wide + 0.5])
    places = policies.embed(cloud)
    assert np.array_equal(places, policies.embed(cloud))
    first, second = places[:60], places[60:]
    gap = np.linalg.norm(first.mean(0) - second.mean(0))
    assert gap > 4 * max(first.std(0).max(), second.std(0).max())
    assert 0.5 < first.std(0).mean() / second.std(0).mean() < 2


def test_kernel_regression_is_the_double_loop():
    rng = np.random.default_rng(0)
    at, points, values = (
        rng.normal(size=(5, 2)),
        rng.normal(size=(9, 2)),
        np.arange(9.0),
    )
    got = policies.kernel_regression(at, points, values, 0.5)
    for z, mean in zip(at, got, strict=True):
        weights = [np.exp(-sum((z - p) ** 2) / 0.5) for p in points]
        want = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        assert mean == pytest.approx(want, rel=1e-4)


def test_kernel_regression_by_hand():
    points, values = np.array([[0.0, 0.0], [2.0, 0.0]]), np.array([0.0, 1.0])
    at = np.array([[1.0, 5.0], [2.0, 0.0], [100.0, 0.0]])
    got = policies.kernel_regression(at, points, values, 1.0)
    # Halfway; weights 1 and e^-2; so far away that both weights underflow.
    np.testing.assert_allclose(got, [0.5, 1 / (1 + np.exp(-2)), 1], rtol=1e-5)
    same = policies.kernel_regression(at, points, np.full(2, 7.0), 0.1)
    np.testing.assert_allclose(same, 7, rtol=1e-6)


def test_heat_map_covers_the_points_and_nothing_far_from_them():
    line = np.linspace(-1, 1, 15)
    points = np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    points = np.concatenate([points, points + np.array([8, 2])])
    values = points @ [0.5, 1.0]
    x, y, heat = policies.heat_map(points, values, 41)
    assert heat.shape == (41, 41) and len(x) == len(y) == 41
    assert x[0] < -1 and x[-1] > 9 and y[0] < -1 and y[-1] > 3
    assert np.nanmin(heat) >= values.min() and np.nanmax(heat) <= values.max()
    width = len(points) ** (-1 / 6) * np.sqrt(points.var(0).mean())
    for row, column in np.ndindex(heat.shape):
        at = np.array([x[column], y[row]])
        far = np.linalg.norm(points - at, axis=1).min() >= 3 * width
        assert np.isnan(heat[row, column]) == far
    small = points[:, 0] < 2
    centre = policies.kernel_regression(
        np.zeros((1, 2)), points[small], values[small], 0.2
    )
    assert abs(centre[0]) < 1e-3  # a linear function, in the middle


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (lambda p: policies.draw_candidates(p, states(2), 0, KEY), "num is 0; at"),
        (
            lambda p: policies.draw_candidates(p, np.zeros((2, 4)), 3, KEY),
            r"states has shape \[2, 4\]; \[S, 11\] is wanted",
        ),
        (
            lambda p: policies.candidate_q(p, np.zeros((2, 4)), np.zeros((3, 2, 2))),
            r"states has shape \[2, 4\]",
        ),
        (lambda p: policies.embed(np.zeros((30, 3))), r"shape \[30, 3\]; more than 30"),
        (lambda p: policies.embed(np.zeros((50, 1))), "at least 2 coordinates"),
        (
            lambda p: policies.heat_map(np.zeros((5, 2)), np.zeros(5)),
            r"width is 0\.0; a positive number is wanted",
        ),
    ],
)
def test_bad_input_gets_a_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        wrong(policy())
