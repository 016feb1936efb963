"""The agent: options run, identities hold, a bandit is learned."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import transitions
from scipy import stats

from som.agent.actor_critic import candidates, make_agent, q_value
from som.agent.critic import Transition
from som.agent.som import (
    SOM,
    SOMConfig,
    flow_velocity,
    q_spread,
    times,
)
from som.theory.meanflow import lagrangian_target
from som.theory.score import fit_slope, guesses_near, shared_score

TINY = SOMConfig(width=8, depth=1, batch_size=4, num_samples=4, num_particles=3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"estimator": "idem", "target": "jvp", "inverse_temperature": None},
        {"estimator": "idem", "clip_guesses": True, "q_scale": "batch"},
        {"estimator": "box", "target": "semigroup", "rescale": 4.0},
        {"batch_norm": True, "target_particles": 1, "policy_batch": 2},
        {"batch_norm": True, "lagging_critic": False, "climb": 1.0},
        {"estimator": "shared", "rows_per_state": 2, "policy_batch": 2},
        {"sde": "ve", "noise_range": (0.05, 1.0), "ema_policy": True},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "default",
)
def test_every_option_makes_finite_updates(options):
    agent = SOM(replace(TINY, **options), 3, 2)
    state = agent.init(jax.random.PRNGKey(0))
    update = jax.jit(agent.update)
    for i in range(2):
        state, metrics = update(state, transitions(4), jax.random.PRNGKey(i))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((state, metrics)))
    assert int(state.step) == 2
    start = agent.init(jax.random.PRNGKey(0))
    for name in ("policy", "critic", "target_critic"):
        pairs = zip(
            jax.tree.leaves(getattr(start, name)),
            jax.tree.leaves(getattr(state, name)),
            strict=True,
        )
        assert any(not np.array_equal(x, y) for x, y in pairs), name


def test_chunks_change_memory_not_numbers():
    batch, key = transitions(4), jax.random.PRNGKey(1)
    results = []
    for chunk in (0, 2):
        agent = SOM(replace(TINY, chunk=chunk), 3, 2)
        state = agent.init(jax.random.PRNGKey(0))
        results.append(jax.jit(agent.update)(state, batch, key)[0].policy)
    for x, y in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)


def test_times_are_sorted_anchored_and_start_from_the_prior():
    shares = {"anchor_share": 0.25, "prior_share": 0.5}
    agent = SOM(replace(TINY, **shares), 3, 2)
    r, t = times(agent, jax.random.PRNGKey(0), 400)
    assert np.all(r <= t)
    assert np.sum(r == t) == 100
    assert np.sum(t == 1) == 200
    assert not np.any((t == 1) & (r == t))
    with pytest.raises(ValueError, match=r"anchor_share 0.6 and prior_share 0.5"):
        replace(TINY, anchor_share=0.6, prior_share=0.5)


@pytest.mark.parametrize(
    ("law", "wanted"),
    [
        ("uniform", stats.uniform.cdf),
        ("logit-normal", lambda x: stats.norm.cdf(np.log(x / (1 - x)), -0.4)),
        ("ends", stats.beta(0.5, 0.5).cdf),
    ],
)
def test_times_have_their_law(law, wanted):
    changes = {"anchor_share": 0.0, "prior_share": 0.0, "time_law": law}
    both = times(SOM(replace(TINY, **changes), 3, 2), jax.random.PRNGKey(0), 4000)
    assert stats.kstest(np.ravel(both), wanted).pvalue > 0.01


def test_rows_of_one_state_share_its_guesses():
    options = {"estimator": "shared", "rows_per_state": 3, "policy_batch": 2}
    agent = SOM(replace(TINY, **options), 3, 2)
    state, batch = agent.init(jax.random.PRNGKey(0)), transitions(4)
    key = jax.random.PRNGKey(5)
    k_time, k_noise, k_prior, k_spread, k_row = jax.random.split(key, 5)
    r, t = times(agent, k_time, 6)
    spread = q_spread(agent, state.critic, batch.observation[:2], k_spread)
    noises, starts = jax.random.split(k_noise, 6), jax.random.normal(k_prior, (6, 2))
    losses = []
    for i in range(6):  # row i belongs to state i mod 2
        s, a = batch.observation[i % 2], batch.action[i % 2]
        k_score, _, k_jump = jax.random.split(jax.random.split(k_row, 2)[i % 2], 3)
        near = candidates(agent, state.policy, s, k_jump, 1)
        guesses = guesses_near(k_score, near, 4)

        def energy(a, s=s):
            return 10 / spread * q_value(agent, state.critic, s, a)

        def u(a, r, t, s=s):
            return agent.policy_net.apply(state.policy, a, r, t, s)

        def velocity(a, t, s=s, energy=energy, guesses=guesses):
            slope = fit_slope(guesses, energy(guesses))
            score = 1 + 4 * (1 - t) ** 2
            score *= shared_score(energy, slope, a, jnp.maximum(t, 1e-3), agent.sde)
            return -0.5 * agent.sde.beta(t) * (a + score)

        a_t = starts[i] if t[i] == 1 else agent.sde.perturb(noises[i], a, t[i])
        aim = lagrangian_target(u, velocity, a_t, r[i], t[i])
        losses.append(np.sum((u(a_t, r[i], t[i]) - aim) ** 2))
    loss = agent.policy_loss(state.policy, state, batch, key)
    np.testing.assert_allclose(loss, np.mean(losses), rtol=2e-4)


def test_sharpening_multiplies_the_score_and_only_late():
    a, observation, key = jnp.array([0.2, -0.5]), jnp.ones(3), jax.random.PRNGKey(2)
    state = SOM(TINY, 3, 2).init(key)

    def score(t, **options):
        agent = SOM(replace(TINY, **options), 3, 2)
        v = flow_velocity(agent, state.critic, 3.0, observation, key)(a, t)
        return -2 * v / agent.sde.beta(t) - a

    for t, factor in ((1.0, 1.0), (0.5, 2.0), (1e-3, 1 + 4 * 0.999**2)):
        t = jnp.float32(t)
        plain = score(t, sharpening=0.0)
        np.testing.assert_allclose(score(t, sharpening=4.0), factor * plain, rtol=1e-4)
        given = score(t, sharpening=4.0, rescale=7.0)
        np.testing.assert_allclose(jnp.linalg.norm(given), 7.0, rtol=1e-4)


def test_spread_of_q_is_blind_to_the_state():
    agent = SOM(TINY, 3, 2)
    state = agent.init(jax.random.PRNGKey(0))
    s, key = transitions(64).observation, jax.random.PRNGKey(3)
    within = q_spread(agent, state.critic, s, key)
    whole = SOM(replace(TINY, q_scale="batch"), 3, 2)
    assert 0 < float(within) < float(q_spread(whole, state.critic, s, key))


def test_profiles_and_names():
    paper, laptop, literal = (
        make_agent("som", 3, 2, profile=p).config
        for p in ("paper", "laptop", "paper-literal")
    )
    assert (paper.width, paper.batch_size, paper.num_samples) == (256, 256, 100)
    assert (paper.num_particles, paper.actor_lr, paper.alpha_delay) == (32, 1e-4, 250)
    assert (literal.estimator, literal.target, literal.rescale) == ("idem", "jvp", 25)
    assert laptop.width < paper.width
    assert make_agent("som", 3, 2, width=7).config.width == 7
    for bad, near in (("sam", "som"), ("smo", "som")):
        with pytest.raises(ValueError, match=f"{bad}.*{near}"):
            make_agent(bad, 3, 2)
    with pytest.raises(ValueError, match=r"widht.*width"):
        make_agent("som", 3, 2, widht=3)
    with pytest.raises(ValueError, match="papper"):
        make_agent("som", 3, 2, profile="papper")
    counts = ("num_samples", "policy_batch", "rows_per_state", "target_particles")
    for name in counts:
        with pytest.raises(ValueError, match=f"{name} is 0; at least 1 is wanted"):
            replace(TINY, **{name: 0})
    with pytest.raises(ValueError, match=r"anchor_share is 0; the semigroup"):
        replace(TINY, target="semigroup", anchor_share=0.0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        make_agent("som", 3, 2, batch_size=0)


def test_a_bandit_with_one_peak_is_learned():
    peak = jnp.array([0.4, -0.3])
    agent = make_agent(
        "som", 1, 2, width=32, depth=2, batch_size=64, num_samples=8, num_particles=4
    )

    def body(state, key):
        k_action, k_update = jax.random.split(key)
        a = jax.random.uniform(k_action, (64, 2), minval=-1, maxval=1)
        reward = -5 * jnp.sum((a - peak) ** 2, -1)
        zero = jnp.zeros((64, 1))
        batch = Transition(zero, a, reward, jnp.ones(64), zero)
        return agent.update(state, batch, k_update)[0], None

    def distance(state):
        drawn = candidates(
            agent, state.policy, jnp.zeros(1), jax.random.PRNGKey(9), 500
        )
        return float(jnp.mean(jnp.linalg.norm(drawn - peak, axis=-1)))

    state = agent.init(jax.random.PRNGKey(0))
    keys = jax.random.split(jax.random.PRNGKey(1), 1500)
    after, _ = jax.jit(partial(jax.lax.scan, body))(state, keys)
    assert distance(after) < 0.5 * distance(state)
    assert distance(after) < 0.3
