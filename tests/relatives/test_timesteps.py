import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.feature_selection import f_regression

from som.baselines.diffusion import Denoiser, posterior, vp_schedule
from som.relatives import timesteps
from som.relatives.timesteps import (
    AdaptiveSampler,
    SecondMoment,
    Task,
    TimePolicy,
    TimesStudy,
    beta_entropy,
    beta_log_density,
    bound_rest,
    bound_weights,
    f_statistic,
    fit_times,
    fixed_rules,
    gain_between,
    gradient_variance,
    held_out_errors,
    moons_task,
    reward_quality,
    start,
    step_of,
    updates_until,
)
from som.training.records import read_record

CHAIN = vp_schedule(20, beta_max=20.0)
KEY = jax.random.PRNGKey(0)
MU, S = 0.4, 0.25  # of Gaussian data


class Exact:
    """The best denoiser of N(MU, S^2)."""

    def apply(self, params, a, step, observation):
        m, std = CHAIN.mean[step][..., None], CHAIN.std[step][..., None]
        return std * (a - m * MU) / (m**2 * S**2 + std**2)


def gaussian_task(num=4000):
    """One-dimensional Gaussian data with the exact denoiser."""
    held_out = MU + S * jax.random.normal(KEY, (num, 1))
    return Task(lambda key, n: held_out[:n], held_out, CHAIN, Exact())


@pytest.fixture(scope="module")
def tiny():
    """Two moons, six steps, eight units."""
    moons = moons_task()
    schedule = vp_schedule(6, beta_max=20.0)
    return Task(moons.sample, moons.held_out[:32], schedule, Denoiser(2, 8, 1, "gelu"))


def test_terms_are_divergences_found_by_sampling():
    rng = np.random.default_rng(0)
    for n in (2, 7, 20):
        a_0, a_n, guess = jnp.array([[0.3], [-0.5], [0.7]])
        m, std = float(CHAIN.mean[n]), float(CHAIN.std[n])
        believed = (a_n - std * guess) / m
        (mean, v), (model, _) = (
            posterior(CHAIN, x, a_n, jnp.array(n)) for x in (a_0, believed)
        )
        sd = float(jnp.sqrt(v))
        x = rng.normal(float(mean[0]), sd, 400_000)
        log_p = stats.norm.logpdf(x, float(mean[0]), sd)
        ratio = log_p - stats.norm.logpdf(x, float(model[0]), sd)
        noise = (a_n - m * a_0) / std
        term = float(bound_weights(CHAIN)[n - 1] * (guess - noise)[0] ** 2)
        assert abs(ratio.mean() - term) < 5 * ratio.std() / len(x) ** 0.5


def test_bound_is_the_chains_own_likelihood_bound():
    """Against an importance estimate that simulates the chain, in nats."""
    rng = np.random.default_rng(1)
    task, (beta, mean, std) = gaussian_task(), (np.asarray(x, float) for x in CHAIN)
    a_0 = MU + S * rng.normal(size=40_000)
    path = [a_0]
    for n in range(1, 21):
        kick = rng.normal(size=a_0.shape)
        path.append(np.sqrt(1 - beta[n]) * path[-1] + np.sqrt(beta[n]) * kick)
    log_ratio = stats.norm.logpdf(path[-1])
    for n in range(20, 0, -1):
        pull = std[n] * (path[n] - mean[n] * MU) / (mean[n] ** 2 * S**2 + std[n] ** 2)
        clean = (path[n] - std[n] * pull) / mean[n]
        if n == 1:
            log_ratio += stats.norm.logpdf(a_0, clean, std[1] / mean[1])
        else:
            v = std[n - 1] ** 2 / std[n] ** 2 * beta[n]
            of_a_n = np.sqrt(1 - beta[n]) * std[n - 1] ** 2 / std[n] ** 2
            at = mean[n - 1] * beta[n] / std[n] ** 2 * clean + of_a_n * path[n]
            log_ratio += stats.norm.logpdf(path[n - 1], at, np.sqrt(v))
        keep = np.sqrt(1 - beta[n])
        log_ratio -= stats.norm.logpdf(path[n], keep * path[n - 1], np.sqrt(beta[n]))
    bits = -log_ratio / np.log(2)
    ours = float(task.bound(held_out_errors(task, None)))
    error = 5 * bits.std() * (1 / 40_000 + 1 / 4000) ** 0.5
    assert abs(bits.mean() - ours) < error
    assert ours > stats.norm(MU, S).entropy() / np.log(2)  # it is a bound


def test_cells_add_their_width_in_bits():
    task = gaussian_task(8)
    fine = Task(task.sample, task.held_out, CHAIN, Exact(), cell=1 / 8)
    errors = jnp.ones(20)
    assert np.isclose(fine.bound(errors), task.bound(errors) + 3, atol=1e-5)
    assert bound_rest(CHAIN, task.held_out).shape == (8,)


def test_steps_have_equal_shares():
    assert step_of(jnp.array([0.0, 0.049, 0.051, 0.999, 1.0]), 20).tolist() == [
        1, 1, 2, 20, 20,
    ]  # fmt: skip
    shares = np.bincount(step_of((jnp.arange(2000) + 0.5) / 2000, 20))[1:]
    assert (shares == 100).all()


@pytest.mark.parametrize("shape", [(0.974, 0.974), (0.3, 2.0), (5.0, 1.5)])
def test_beta_law_against_scipy(shape):
    b, t = jnp.array(shape), np.linspace(0.02, 0.98, 9)
    assert np.isclose(beta_entropy(b), stats.beta(*shape).entropy(), atol=1e-5)
    found = beta_log_density(b, jnp.asarray(t, jnp.float32))
    np.testing.assert_allclose(found, stats.beta(*shape).logpdf(t), atol=1e-4)


def test_f_statistic_against_scikit_learn():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 6))
    y = x @ [3, 0, 1, 0, 0, -1] + rng.normal(size=20)
    found = f_statistic(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    np.testing.assert_allclose(found, f_regression(x, y)[0], rtol=1e-3, atol=1e-4)
    assert jnp.all(jnp.isfinite(f_statistic(jnp.zeros((20, 3)), jnp.zeros(20))))


def test_sampler_descends_the_objective_by_finite_differences():
    net = TimePolicy().init(KEY, jnp.zeros(2))
    net["params"]["Dense_0"]["bias"] = jnp.array([1.0, 2.0])
    fine = (np.arange(20_000) + 0.5) / 20_000

    def objective(bias):
        law = stats.beta(*np.logaddexp(0, bias) + 1e-5)
        density = law.pdf(fine)
        return np.mean(density * np.cos(3 * fine)) + 0.01 * law.entropy()

    wanted = [
        (objective(np.array([1.0, 2.0]) + h) - objective(np.array([1.0, 2.0]) - h))
        / 2e-3
        for h in 1e-3 * np.eye(2)
    ]
    rule, a_0 = AdaptiveSampler(), jnp.zeros((100_000, 2))
    t, weight = rule.draw(rule.init(KEY, 2)._replace(params=net), a_0, KEY)
    grads = jax.grad(rule.loss)(net, a_0, t, jnp.cos(3 * t), 0.3, 1.0)
    found = -grads["params"]["Dense_0"]["bias"]
    np.testing.assert_allclose(found, wanted, atol=6e-3)
    assert (weight == 1).all()


def test_sampler_goes_where_the_gain_is():
    rule, a_0 = AdaptiveSampler(num_steps=10), jnp.zeros((64, 2))

    @jax.jit
    def step(state, key):
        k_draw, k_learn = jax.random.split(key)
        t, _ = rule.draw(state, a_0, k_draw)

        def gain(points, at, before, after):
            each = (t[: len(points), None] > 0.7) + 0 * at
            return each + 0.1 * jax.random.normal(after, each.shape)

        return rule.learn(state, a_0, t, gain, k_learn)

    state = rule.init(KEY, 2)
    for key in jax.random.split(KEY, 150):
        state = step(state, key)
    density = rule.density(state, a_0)
    assert density[7:].sum() > 5 and state.lessons == 150  # of 10; uniform: 3


def test_chosen_steps_are_those_that_predict_the_sum():
    rule, a_0 = AdaptiveSampler(num_steps=10), jnp.zeros((4, 2))
    loud = jnp.array([0, 0, 5.0, 0, 0, 4.0, 0, 0, 6.0, 0]) + 0.01

    def gain(points, at, before, after):
        scale = loud[step_of(at, 10) - 1]
        return scale * jax.random.normal(before, (len(points), len(at)))

    learn = jax.jit(lambda s, k: rule.learn(s, a_0, jnp.full(4, 0.5), gain, k))
    state = rule.init(KEY, 2)
    for i, key in enumerate(jax.random.split(KEY, 20)):
        assert state.chosen.tolist() == [0, 1, 2], i  # the queue fills first
        state = learn(state, key)
    assert sorted(state.chosen.tolist()) == [2, 5, 8]


@pytest.mark.parametrize("published", [False, True])
def test_noise_before_and_after(published):
    rule, asked = AdaptiveSampler(published, num_steps=10), []

    def gain(points, at, before, after):
        asked.append(before is after)
        return jnp.zeros((len(points), len(at)))

    def learn(key):
        state = rule.init(key, 2)
        return rule.learn(state, jnp.zeros((4, 2)), jnp.full(4, 0.5), gain, key)

    jax.eval_shape(learn, KEY)
    assert asked == [not published] * 2


def test_importance_weights_have_no_bias():
    rule, rng = SecondMoment(num_steps=10), np.random.default_rng(0)
    state = rule.init(KEY, 2)
    assert np.allclose(rule.density(state, None), 1)
    see = jax.jit(rule.see)
    for _ in range(8):
        t = rng.uniform(size=64).astype(np.float32)
        state = see(state, t, np.exp(3 * t))
    law = np.asarray(rule.law(state), float)
    assert np.isclose(law.sum(), 1, atol=1e-5) and law.max() > 2 * law.min()
    middle = (jnp.arange(10) + 0.5) / 10
    weight = 1 / (10 * law)
    assert np.isclose(np.sum(law * weight * np.exp(3 * middle)),
                      np.exp(3 * middle).mean())  # fmt: skip
    t, drawn = rule.draw(state, jnp.zeros((50_000, 2)), KEY)
    np.testing.assert_allclose(drawn, weight[step_of(t, 10) - 1], rtol=1e-4)
    each = np.asarray(drawn * jnp.exp(3 * t))
    wanted = (np.exp(3) - 1) / 3
    assert abs(each.mean() - wanted) < 5 * each.std() / len(each) ** 0.5


def test_second_moment_keeps_the_last_losses_of_each_step():
    rule = SecondMoment(num_steps=2, history=3)
    state = rule.init(KEY, 2)
    see = jax.jit(rule.see)
    for t, loss in ([0.1, 0.9], [1.0, 9.0]), ([0.2, 0.3], [2.0, 3.0]):
        state = see(state, jnp.array(t), jnp.array(loss))
    losses, count = see(state, jnp.array([0.4, 0.2]), jnp.array([4.0, 5.0]))
    assert count.tolist() == [5, 1]
    assert losses[0].tolist() == [4, 5, 3]
    assert losses[1].tolist() == [9, 0, 0]


def test_fixed_rules_against_their_formulas():
    rules = fixed_rules(CHAIN)
    snr = (np.asarray(CHAIN.mean[1:]) / np.asarray(CHAIN.std[1:])) ** 2
    np.testing.assert_allclose(rules["P2"].weight, CHAIN.std[1:] ** 2, rtol=1e-4)
    np.testing.assert_allclose(
        rules["Min-SNR"].weight, np.minimum(1, 5 / snr), rtol=1e-4
    )
    rng = np.random.default_rng(0)
    draws = {
        "logit-normal": 1 / (1 + np.exp(-rng.normal(size=100_000))),
        "Beta(0.8, 1)": rng.beta(0.8, 1, 100_000),
    }
    for name, t in draws.items():
        counts = np.histogram(t, 20, (0, 1))[0] / len(t)
        np.testing.assert_allclose(rules[name].law, counts, atol=6e-3)
    speed = rules["SpeeD"].law
    assert np.isclose(speed.max() / speed.min(), 5, rtol=1e-4)
    for rule in rules.values():
        assert np.isclose(rule.law.sum(), 1, atol=1e-5)


def test_gradient_variance_against_a_loop(tiny):
    params, a_0 = tiny.init(KEY), tiny.held_out[:8]
    found = gradient_variance(tiny, params, a_0, KEY)
    keys = jax.random.split(KEY, 8)
    n = 3
    t = jnp.full((1, 1), (n - 0.5) / 6)
    grad = jax.jit(jax.grad(lambda p, a, key: tiny.errors(p, a, t, key)[0, 0]))
    grads = []
    for a, key in zip(a_0, keys, strict=True):
        leaves = jax.tree.leaves(grad(params, a[None], key))
        grads.append(np.concatenate([np.ravel(g) for g in leaves]))
    wanted = np.var(grads, 0, ddof=1).sum()
    assert np.isclose(found[n - 1], wanted, rtol=1e-3)


def test_gain_is_what_the_terms_lose(tiny):
    before, after = tiny.init(KEY), tiny.init(jax.random.PRNGKey(1))
    a_0, t = tiny.held_out[:4], jnp.array([0.1, 0.5])
    gain = gain_between(tiny, before, after)(a_0, t, KEY, KEY)
    every = jnp.broadcast_to(t, (4, 2))
    lost = tiny.terms(before, a_0, every, KEY) - tiny.terms(after, a_0, every, KEY)
    np.testing.assert_allclose(gain, lost, atol=1e-5)
    assert np.allclose(gain_between(tiny, before, before)(a_0, t, KEY, KEY), 0)


def test_same_seed_same_numbers_and_quality(tiny):
    rule = AdaptiveSampler(num_steps=6)
    one, two = (fit_times(tiny, rule, [0, 1], 40, looks=2) for _ in range(2))
    np.testing.assert_array_equal(one.errors, two.errors)
    assert one.updates == [20, 40] and one.errors.shape == (2, 2, 6)
    assert not np.allclose(one.errors[:, 0], one.errors[:, 1])
    state = start(tiny, rule, KEY)
    size, same, other = reward_quality(tiny, rule, state, KEY)
    assert other > 5 * same > 0 and size > 0


def test_updates_until():
    curve = np.array([[3.0, 3.0], [2.0, 3.0], [1.0, 2.5]])
    found = updates_until([10, 20, 30], curve, np.array([1.5, 1.0]))
    assert found[0] == 25 and np.isnan(found[1])


def test_too_few_updates_are_told_in_a_sentence(tiny):
    with pytest.raises(ValueError, match="at least 200 are wanted"):
        fit_times(tiny, SecondMoment(num_steps=6), [0], 100)


def test_a_killed_study_goes_on(tmp_path, monkeypatch):
    made = []

    def fit(arm, seeds, progress):
        made.append(arm["rule"])
        if made == ["a", "b"]:
            raise KeyboardInterrupt
        progress(arm["steps"])
        return {"bound": [1.0]}

    monkeypatch.setattr(timesteps, "fit_rule", fit)
    arms = {r: {"data": "moons", "rule": r, "steps": 2} for r in "ab"}
    study = TimesStudy(arms)
    with pytest.raises(KeyboardInterrupt):
        study.run(tmp_path / "x.json", [0])
    told = []
    study.run(tmp_path / "x.json", [0], progress=lambda *x: told.append(x))
    assert made == ["a", "b", "b"] and study.total(None) == 4
    assert told == [(2, "a"), (4, "b"), (4, "b")]
    assert list(read_record(tmp_path / "x.json")["arms"]) == ["a", "b"]
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_study_has_every_fixed_rule():
    names = tuple(timesteps.fixed_rules(vp_schedule(2)))
    assert timesteps.MOONS[: len(names)] == names
