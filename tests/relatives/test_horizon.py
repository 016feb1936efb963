"""Imitation in tables: visitations, the dual, the corrected start law, cloning."""

import numpy as np
import pytest
from scipy.optimize import minimize

from som.relatives import horizon
from som.relatives.horizon import (
    METHODS,
    clone,
    compare,
    counts,
    dual,
    episodes,
    hidden_share,
    igi_weights,
    imitate,
    line,
    log_ratio,
    record_episodes,
    ring,
    sample_size,
    score,
    solve_dual,
    start_law,
    time_average,
    transition,
    visitation,
    walk,
)


@pytest.fixture(scope="module")
def data():
    return record_episodes(line(12), 60, np.random.default_rng(0))


def inflow(world, visits):
    """Flow into each state, by a loop over all pairs."""
    flow = np.zeros(len(visits))
    for (state, action), share in np.ndenumerate(visits):
        flow[world.next_state[state, action]] += share
    return flow


def test_the_ring_goes_round_and_the_line_has_walls():
    np.testing.assert_array_equal(ring(4).next_state, [[3, 1], [0, 2], [1, 3], [2, 0]])
    np.testing.assert_array_equal(line(3).next_state, [[0, 1], [0, 2], [1, 2]])
    assert line(3).reward.sum() == line(3).reward[2, 1] == 1
    assert ring().horizon == 200 and line().horizon == 100


def test_transition_is_a_stochastic_matrix():
    np.testing.assert_allclose(
        transition(line(3), walk(line(3), 0.9)),
        [[0.1, 0.9, 0], [0.1, 0, 0.9], [0, 0.1, 0.9]],
    )


def test_visitation_is_the_discounted_sum_over_time():
    world, policy, gamma = ring(7), walk(ring(7), 0.8), 0.6
    state, total = world.first, np.zeros(7)
    for t in range(200):
        total += (1 - gamma) * gamma**t * state
        state = state @ transition(world, policy)
    np.testing.assert_allclose(
        visitation(world, policy, gamma, world.first),
        total[:, None] * policy,
        atol=1e-12,
    )


def test_time_average_is_what_is_played():
    world, policy = line(6), walk(line(6), 0.7)
    states, actions = episodes(world, policy, 3000, np.random.default_rng(0))
    seen = counts(world, states, actions) / actions.size
    np.testing.assert_allclose(seen, time_average(world, policy), atol=0.01)
    moved = world.next_state[states[:, :-1], actions]
    np.testing.assert_array_equal(states[:, 1:], moved)


def test_score_of_a_perfect_runner():
    # On the ring every step ahead is 1 and the expert slips in a tenth: 0.8 a step.
    assert score(ring(), walk(ring(), 1.0)) == pytest.approx(100 / 0.8)
    # On the line 39 of 100 steps lead to the wall, the rest are paid.
    world = line()
    coin, expert = (
        np.sum(time_average(world, walk(world, p)) * world.reward) for p in (0.5, 0.9)
    )
    wanted = 100 * (0.61 - coin) / (expert - coin)
    assert score(world, walk(world, 1.0)) == pytest.approx(wanted)


def test_counts_take_weights():
    states, actions = np.array([[0, 1, 0, 1]]), np.array([[1, 0, 1]])
    table = counts(ring(3), states, actions, np.array([1.0, 0.5, 0.25]))
    np.testing.assert_allclose(table, [[0, 1.25], [0.5, 0], [0, 0]])


def test_log_ratio_by_hand():
    expert, union = np.array([[2.0, 0.0]]), np.array([[2.0, 6.0]])
    np.testing.assert_allclose(log_ratio(expert, union, 0.0), [[np.log(4), -np.inf]])
    wanted = np.log([[(3 / 4) / (3 / 10), (1 / 4) / (7 / 10)]])
    np.testing.assert_allclose(log_ratio(expert, union, 1.0), wanted)
    never = log_ratio(np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]]), 0.0)
    np.testing.assert_allclose(never, [[0, -np.inf]])


@pytest.mark.parametrize("union_weight", [0.0, 0.7])
def test_gradient_of_the_dual_by_differences(data, union_weight):
    world, gamma = line(12), 0.8
    ratio = log_ratio(data.expert, data.union)
    nu = np.random.default_rng(1).normal(size=12)

    def at(nu):
        start = world.first
        return dual(world, data.union, ratio, start, gamma, nu, union_weight).value

    h = 1e-5 * np.eye(12)
    slope = [(at(nu + e) - at(nu - e)) / 2e-5 for e in h]
    got = dual(world, data.union, ratio, world.first, gamma, nu, union_weight)
    np.testing.assert_allclose(got.gradient, slope, atol=1e-8)
    assert got.visits.sum() == pytest.approx(1)
    # A constant in nu changes nothing.
    assert at(nu + 3) == pytest.approx(at(nu))


@pytest.mark.parametrize("gamma", [0.1, 0.9])
def test_the_minimum_is_a_visitation_and_no_other_solver_finds_less(data, gamma):
    world, ratio = line(12), log_ratio(data.expert, data.union)
    best = solve_dual(world, data.union, ratio, world.first, gamma)
    flow = (1 - gamma) * world.first + gamma * inflow(world, best.visits)
    np.testing.assert_allclose(best.visits.sum(1), flow, rtol=1e-8)

    def loss(nu):
        found = dual(world, data.union, ratio, world.first, gamma, nu)
        return found.value, found.gradient

    other = minimize(loss, np.zeros(12), jac=True, method="BFGS")
    assert best.value <= other.fun + 1e-12
    assert best.value == pytest.approx(other.fun, abs=1e-4)  # BFGS stops early


@pytest.mark.parametrize("alpha_d", [0.0, 0.5])
def test_the_dual_is_minus_the_divergence_of_its_visits(data, alpha_d):
    world = line(12)
    ratio = log_ratio(data.expert, data.union)
    d_union = data.union / data.union.sum()
    best = solve_dual(world, data.union, ratio, world.first, 0.8, alpha_d)
    zeta = best.visits / d_union
    primal = np.sum(best.visits * ((1 + alpha_d) * np.log(zeta) - ratio))
    assert -best.value == pytest.approx(primal, abs=1e-9)
    # Any other visitation, here that of some policy, is further away.
    rng = np.random.default_rng(2)
    for _ in range(5):
        policy = rng.dirichlet([1, 1], 12)
        other = visitation(world, policy, 0.8, world.first)
        ratio_of = np.log(other / d_union)
        assert np.sum(other * ((1 + alpha_d) * ratio_of - ratio)) > primal


def test_no_visitation_is_told(data):
    ratio = log_ratio(data.expert, data.union)
    union = data.union.copy()
    union[0] = 0  # the start was never left
    with pytest.raises(ArithmeticError, match="no visitation"):
        solve_dual(line(12), union, ratio, line(12).first, 0.5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_igi_weights_undo_a_geometric_time(gamma):
    weights = igi_weights(30, gamma)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights[1:-1], 1 / 30)
    # Law of T + G, one time after the other: x_t = gamma x_(t-1) + (1 - gamma) w_t.
    law = [0.0]
    for weight in weights:
        law.append(gamma * law[-1] + (1 - gamma) * weight)
    np.testing.assert_allclose(law[1:], [1 / 30] * 30 + [0], atol=1e-12)


def test_start_law_by_hand():
    states = np.array([[0, 1, 2]])  # H = 2: weights 2, 1, -1 at gamma = 1/2
    with_tail = start_law(ring(4), states, 0.5, tail=True)
    np.testing.assert_allclose(with_tail, [1, 0.5, -0.5, 0])
    without = start_law(ring(4), states, 0.5, tail=False)
    np.testing.assert_allclose(without, [2 / 3, 1 / 3, 0, 0])


@pytest.mark.parametrize("gamma", [0.3, 0.95])
def test_the_expert_has_its_own_visitation_from_the_corrected_law(gamma):
    world = ring(9)
    states, actions = episodes(world, walk(world, 0.9), 3, np.random.default_rng(3))
    share = counts(world, states, actions) / actions.size
    start = start_law(world, states, gamma, tail=True)
    flow = (1 - gamma) * start + gamma * inflow(world, share)
    np.testing.assert_allclose(flow, share.sum(1), atol=1e-12)
    # The telescoped form: the same expectation of any function of the state.
    nu = np.random.default_rng(4).normal(size=9)
    telescoped = np.mean(nu[states[:, :-1]] - gamma * nu[states[:, 1:]])
    assert (1 - gamma) * start @ nu == pytest.approx(telescoped)


def test_with_an_exact_ratio_the_corrected_method_is_cloning(data):
    world = line(12)
    ratio = log_ratio(data.expert, data.union, 0.0)
    for gamma in (0.2, 0.9):
        start = start_law(world, data.states, gamma, tail=True)
        best = solve_dual(world, data.union, ratio, start, gamma)
        np.testing.assert_allclose(clone(best.visits), clone(data.expert), atol=1e-6)
        zero = dual(world, data.union, ratio, start, gamma, np.zeros(12))
        assert np.abs(zero.gradient).max() < 1e-12
        first = dual(world, data.union, ratio, world.first, gamma, np.zeros(12))
        assert np.abs(first.gradient).max() > 0.01


def test_clone_by_hand():
    visits = np.array([[3.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(clone(visits), [[0.75, 0.25], [0.5, 0.5]])
    # A floor of a half: 3/8 + 1/8 against 1/8 + 1/8.
    np.testing.assert_allclose(clone(visits, 0.5), [[2 / 3, 1 / 3], [0.5, 0.5]])


def test_recordings_add_up(data):
    rng = np.random.default_rng(0)
    world = line(12)
    assert data.expert.sum() == world.horizon and data.hidden.sum() == 60
    assert data.union.sum() == 63 * world.horizon and data.union.min() > 0
    again = record_episodes(world, 60, rng)
    np.testing.assert_array_equal(again.union, data.union)
    np.testing.assert_array_equal(counts(world, data.states, data.actions), data.expert)


def test_effective_size_and_hidden_share_step_by_step(data):
    visits = imitate(line(12), data, "IGI", 0.8)
    weights = np.repeat(
        (visits / np.maximum(data.union, 1)).ravel(), data.union.ravel().astype(int)
    )
    wanted = weights.sum() ** 2 / (len(weights) * np.sum(weights**2))
    assert sample_size(visits, data.union) == pytest.approx(wanted)
    assert sample_size(data.union / data.union.sum(), data.union) == pytest.approx(1)
    even = hidden_share(data.union / data.union.sum(), data)
    assert even == pytest.approx(2 / 63)


def test_methods_differ_in_what_they_say(data):
    world, gamma = line(12), 0.8
    for method in METHODS:
        visits = imitate(world, data, method, gamma)
        start, weights = world.first, 1.0
        if method in ("IGI", "telescoped"):
            start = start_law(world, data.states, gamma, method == "telescoped")
        if method == "discounted ratio":
            weights = gamma ** np.arange(world.horizon)
        flow = (1 - gamma) * start + gamma * inflow(world, visits)
        np.testing.assert_allclose(flow, visits.sum(1), atol=1e-9)
        # The visits have the form zeta d^D: log(visits / union) less the ratio is
        # a difference of nu, so it has no part that depends on the action alone.
        expert = counts(world, data.states, data.actions, weights)
        scale = 1 + 0.5 * (method == "DemoDICE")
        shape = scale * np.log(visits / data.union) - log_ratio(expert, data.union)
        moves = np.zeros((24, 13))
        moves[np.arange(24), world.next_state.ravel()] += gamma
        moves[np.arange(24), np.arange(24) // 2] -= 1
        moves[:, 12] = 1  # the normaliser
        left = np.linalg.lstsq(moves, shape.ravel(), rcond=None)
        np.testing.assert_allclose(moves @ left[0], shape.ravel(), atol=1e-7)


def test_bad_input_is_told(data):
    with pytest.raises(ValueError, match="telescoped"):
        imitate(line(12), data, "telescope", 0.5)
    with pytest.raises(ValueError, match=r"discount is 1.0; wanted is 0 <= gamma < 1"):
        imitate(line(12), data, "IGI", 1.0)


def test_the_collapse_and_its_cure(monkeypatch):
    monkeypatch.setattr(horizon, "DISCOUNTS", (0.5, 0.99))
    runs = [compare("ring", seed) for seed in range(2)]
    for run in runs:
        fall = {m: v[:, 1] - v[:, 0] for m, v in run["returns"].items()}
        assert np.all(fall["uncorrected"] > 40)
        assert np.all(np.abs(fall["IGI"]) < 1.5)
        assert np.all(np.abs(fall["telescoped"]) < 0.1)
    again = compare("ring", 1)["returns"]["IGI"]
    np.testing.assert_array_equal(again, runs[1]["returns"]["IGI"])
