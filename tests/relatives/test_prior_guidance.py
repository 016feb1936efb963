"""A learned prior: closed forms, searches on a grid, and what has no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from som.relatives.prior_guidance import (
    MEASURES,
    VALUES,
    MixturePrior,
    Prior,
    PriorGuidance,
    best_mixture,
    best_of,
    classifier_free,
    classifier_guided,
    ddim,
    exact_noise,
    fit_prior,
    gaussian_kl,
    judged,
    latent_grid,
    member,
    normal_log_prob,
    objective_on,
    plan_log_prob,
    selection_kl,
    sliced_distance,
    temperature_for,
    tilt,
)
from som.theory.boltzmann import GaussianMixture, eight_gaussians
from som.theory.sde import VP

KEY = jax.random.PRNGKey(0)
SDE = VP(0.1, 20.0)
MU, S = jnp.array([0.4, -0.2]), 0.25
GAUSSIAN = GaussianMixture(MU[None], jnp.ones(1), S)
Z = jax.random.normal(KEY, (64, 2))


def test_ddim_of_a_gaussian_is_linear():
    """The flow of N(MU, S^2) takes z to MU + S z."""
    found = ddim(exact_noise(GAUSSIAN, SDE), Z, SDE, 400)
    np.testing.assert_allclose(found, MU + S * Z, atol=0.01)


def test_ddim_with_constant_noise_is_exact_in_one_step():
    noise = jnp.array([0.3, -0.1])
    one, many = (ddim(lambda a, t: noise, Z, SDE, n) for n in (1, 7))
    np.testing.assert_allclose(one, many, atol=1e-3)
    np.testing.assert_allclose(
        one, (Z - SDE.std(1.0) * noise) / SDE.mean(1.0), rtol=1e-4
    )


def test_ddim_wants_a_step():
    with pytest.raises(ValueError, match="num_steps is 0; at least 1 is wanted"):
        ddim(lambda a, t: a, Z, SDE, 0)


def test_divergence_is_that_of_gaussians():
    mean, log_std = jnp.array([0.5, -1.0]), jnp.log(jnp.array([0.4, 1.5]))
    z = mean + jnp.exp(log_std) * jax.random.normal(KEY, (200_000, 2))
    zero = jnp.zeros(2)
    gap = normal_log_prob(z, mean, log_std) - normal_log_prob(z, zero, zero)
    error = 5 * float(gap.std()) / len(z) ** 0.5
    assert abs(float(gap.mean() - gaussian_kl(mean, log_std))) < error


def test_plans_of_a_linear_planner_have_its_density():
    C = jnp.array([[0.6, 0.3], [-0.2, 0.5]])
    zero = jnp.zeros(2)
    found = plan_log_prob(lambda z: MU + C @ z, Z, normal_log_prob(Z, zero, zero))
    wanted = jax.scipy.stats.multivariate_normal.logpdf(MU + Z @ C.T, MU, C @ C.T)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_tilt_by_hand():
    weights, best = tilt(jnp.array([0.0, jnp.log(3.0)]), 1.0)
    np.testing.assert_allclose(weights, [0.25, 0.75], rtol=1e-5)
    np.testing.assert_allclose(best, np.log(2.0), rtol=1e-5)
    cold, most = tilt(jnp.array([0.2, 1.0, 0.4]), 1e-3)
    np.testing.assert_allclose(cold, [0, 1, 0], atol=1e-6)
    warm, mean = tilt(jnp.array([0.0, 1.0]), 1e4, jnp.log(jnp.array([0.9, 0.1])))
    np.testing.assert_allclose(warm, [0.9, 0.1], atol=1e-3)
    assert abs(float(mean) - 0.1) < 1e-2 and most < 1.0


def test_every_prior_falls_short_of_the_best_by_its_divergence():
    grid, log_prior = latent_grid()
    value, theta = jnp.sin(grid[:, 0]) + 0.5 * grid[:, 1], 0.7
    weights, best = tilt(value, theta, log_prior)
    prior = MixturePrior(jnp.zeros(1), jnp.array([[0.5, 0.2]]), jnp.full((1, 2), -0.3))
    log_q = jax.nn.log_softmax(prior.log_prob(grid))
    kl = jnp.sum(jnp.exp(log_q) * (log_q - jnp.log(weights)))
    F = objective_on(grid, log_prior, value, prior, theta)
    np.testing.assert_allclose(F, best - theta * kl, atol=1e-4)


def test_a_linear_value_only_moves_the_prior():
    grid, log_prior = latent_grid()
    b = jnp.array([0.4, -0.2])
    found, F = best_mixture(grid, log_prior, grid @ b, 0.5)
    np.testing.assert_allclose(found.mean[0], b / 0.5, atol=0.02)
    np.testing.assert_allclose(jnp.exp(found.log_std[0]), [1, 1], atol=0.02)
    np.testing.assert_allclose(F, float(b @ b), atol=1e-2)  # |b|^2 / (2 Theta)


def test_hills_times_a_mixture_is_their_product():
    hills, mixture = VALUES["two hills"], eight_gaussians()
    product, mean = hills.times(mixture)
    log_both = mixture.log_prob(Z) + jnp.log(hills(Z))
    np.testing.assert_allclose(product.log_prob(Z) + jnp.log(mean), log_both, atol=1e-3)
    found = hills.behind(mixture, SDE)(Z, 1e-4)
    np.testing.assert_allclose(found[:8], hills(Z)[:8], atol=0.02)


def test_guidance_by_the_logarithm_of_success_is_the_conditional_denoiser():
    hills, mixture = VALUES["one hill"], eight_gaussians()
    denoise, behind = exact_noise(mixture, SDE), hills.behind(mixture, SDE)
    guided = classifier_guided(denoise, lambda a, t: jnp.log(behind(a, t)), SDE)
    wanted = exact_noise(hills.times(mixture)[0], SDE)
    np.testing.assert_allclose(guided(Z, 0.4), wanted(Z, 0.4), atol=1e-3)
    np.testing.assert_allclose(
        classifier_free(wanted, denoise, 0.0)(Z, 0.4), wanted(Z, 0.4)
    )
    more = classifier_free(wanted, denoise, 2.0)(Z, 0.4)
    np.testing.assert_allclose(more, 3 * wanted(Z, 0.4) - 2 * denoise(Z, 0.4))


def test_the_best_is_taken():
    plans = jnp.arange(12.0).reshape(3, 2, 2)
    values = jnp.array([[0.0, 5.0], [2.0, 1.0], [1.0, 0.0]])
    np.testing.assert_allclose(best_of(plans, values), [[4, 5], [2, 3]])
    assert selection_kl(1) == 0.0
    assert abs(selection_kl(2) - (np.log(2) - 0.5)) < 1e-12


def test_sliced_distance():
    assert float(sliced_distance(Z, Z[::-1])) == 0.0
    line = jnp.array([[0.0], [1.0]])
    assert abs(float(sliced_distance(line, line + 0.5)) - 0.5) < 1e-6


def test_temperature_is_found_again():
    values = jax.random.uniform(KEY, (500,))
    weights, _ = tilt(values, 0.3)
    assert abs(float(temperature_for(values, weights @ values)) - 0.3) < 1e-3


def test_judged_hands_the_divergence_through():
    found = judged(VALUES["one hill"], eight_gaussians().sample(KEY, 200), 0.7)
    assert len(found) == len(MEASURES) and abs(float(found[1]) - 0.7) < 1e-6


def test_training_begins_at_the_cloned_planner():
    net = Prior(3)
    s = jax.random.normal(KEY, (5, 4))
    mean, log_std = net.apply(net.init(KEY, s[0]), s)
    assert mean.shape == (5, 3) and not mean.any() and not log_std.any()


def test_latents_to_learn_from():
    for wide, deviation in ((0.0, 0.01), (1.0, 1.0)):
        guidance = PriorGuidance(2, wide=wide)
        prior = guidance.init(KEY).prior
        bias = prior["params"]["Dense_0"]["bias"]
        prior["params"]["Dense_0"]["bias"] = bias.at[2:].set(jnp.log(0.01))
        z = guidance.ask(prior, jnp.zeros((4000, 1)), KEY)
        assert abs(float(z.std()) / deviation - 1) < 0.05


def test_squash_bounds_the_latent_and_widens_it():
    u = jax.random.normal(KEY, (20_000, 2))
    z = PriorGuidance(2, squash=2.0).latent(u)
    assert float(jnp.abs(z).max()) <= 2.0 and abs(float(z.std()) - 1.256) < 0.01
    assert PriorGuidance(2).latent(u) is u


def test_normalised_loss_does_not_know_the_values_scale():
    s, guidance = jnp.zeros((32, 1)), PriorGuidance(2, normalise=True)
    state = guidance.init(KEY)
    value = jax.tree.map(lambda x: x, state.value)
    last = max(value["params"])
    scaled = {
        "params": value["params"]
        | {last: jax.tree.map(lambda x: 10 * x, value["params"][last])}
    }
    one, ten = (
        guidance.prior_loss(state.prior, v, s, 1.0, KEY) for v in (value, scaled)
    )
    np.testing.assert_allclose(one, ten, rtol=1e-4)


def test_nothing_is_differentiated_in_planner_and_critic():
    guidance = PriorGuidance(2, steps=3)

    def worth(s, z):
        shape = jax.ShapeDtypeStruct((len(z),), jnp.float32)
        return jax.pure_callback(lambda z: np.asarray(z)[:, 0], shape, z)

    state = guidance.update(guidance.init(KEY), jnp.zeros((8, 1)), worth, 1.0, KEY)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_linear_worth_is_learned_and_a_warm_prior_stays():
    """With g the identity and J = b z the best prior is N(b / Theta, I)."""
    b = jnp.array([0.5, -0.25])
    guidance = PriorGuidance(2, steps=400, width=32)
    state = fit_prior(guidance, lambda s, z: z @ b, [0.5, 1e4], [0, 1])
    for i, wanted in enumerate((b / 0.5, 0 * b)):
        for seed in range(2):
            prior = member(state.prior_target, i, seed)
            mean, log_std = guidance.prior.apply(prior, jnp.zeros(1))
            np.testing.assert_allclose(mean, wanted, atol=0.12)
            np.testing.assert_allclose(log_std, 0.0, atol=0.12)
    z = guidance.draw(member(state.prior_target, 1, 0), jnp.zeros((4, 1)))
    np.testing.assert_allclose(z, 0.0, atol=0.12)


def test_each_state_has_its_own_prior():
    guidance = PriorGuidance(1, observation_size=1, steps=400, width=32)

    def signs(key, num):
        return jax.random.rademacher(key, (num, 1), jnp.float32)

    state = fit_prior(guidance, lambda s, z: (s * z)[:, 0], [1.0], [0], signs)
    s = jnp.array([[1.0], [-1.0]])
    mean, _ = guidance.prior.apply(member(state.prior_target, 0, 0), s)
    np.testing.assert_allclose(mean, s, atol=0.2)


def test_the_same_seed_gives_the_same_prior():
    guidance = PriorGuidance(2, steps=2, width=8)

    def worth(s, z):
        return z[:, 0]

    one, two = (fit_prior(guidance, worth, [1.0], [0, 1], batch=4) for _ in "ab")
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(x, y)
    kernel = one.value["params"]["Dense_0"]["kernel"][0]
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize("wrong", [{"size": 0}, {"steps": 0}, {"wide": 1.5}])
def test_bad_settings_are_told_in_a_sentence(wrong):
    with pytest.raises(ValueError, match="PriorGuidance wants size >= 1"):
        PriorGuidance(**{"size": 2} | wrong)


def test_other_bad_input_is_told_in_a_sentence():
    with pytest.raises(ValueError, match="all must be > 0"):
        fit_prior(PriorGuidance(2), lambda s, z: z[:, 0], [1.0, 0.0], [0])
