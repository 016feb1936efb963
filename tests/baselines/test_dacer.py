"""DACER: the mixture's entropy, the gradient through the chain, a bandit."""

import jax
import jax.numpy as jnp
import numpy as np
from examples import transitions

from som.agent.actor_critic import add_noise, candidates, make_agent, q_value
from som.baselines.dacer import (
    DACERConfig,
    Mixture,
    fit_mixture,
    fit_to_shares,
    log_joint,
    mixture_entropy,
    spread_out,
)

TINY = {"width": 8, "depth": 1, "num_steps": 3, "entropy_samples": 8}


def tiny(**options):
    return make_agent("dacer", 3, 2, **TINY | options)


def test_mixture_of_two_points_by_hand():
    x = jnp.array([[0.0], [2.0], [10.0]])
    share = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    weight, mean, cov = fit_to_shares(x, share)
    np.testing.assert_allclose(weight, [2 / 3, 1 / 3], atol=1e-5)
    np.testing.assert_allclose(mean[:, 0], [1, 10], atol=1e-4)
    np.testing.assert_allclose(cov[:, 0, 0], [1 + 1e-5, 1e-5], rtol=1e-4)


def test_log_joint_and_entropy_of_standard_normals():
    mixture = Mixture(
        jnp.array([0.25, 0.75]), jnp.zeros((2, 2)), jnp.stack([jnp.eye(2)] * 2)
    )
    joint = log_joint(jnp.array([[0.0, 0.0], [1.0, 2.0]]), mixture)
    log_2pi = np.log(2 * np.pi)
    expected = np.log([0.25, 0.75]) - log_2pi - np.array([[0.0], [2.5]])
    np.testing.assert_allclose(joint, expected, rtol=1e-5)
    of_weights = -0.25 * np.log(0.25) - 0.75 * np.log(0.75)
    np.testing.assert_allclose(
        mixture_entropy(mixture), 1 + log_2pi + of_weights, rtol=1e-5
    )


def test_spread_out_finds_three_clusters():
    centres = jnp.array([[0.0, 0.0], [5.0, 0.0], [0.0, 5.0]])
    noise = 0.1 * jax.random.normal(jax.random.PRNGKey(0), (3, 20, 2))
    share = spread_out((centres[:, None] + noise).reshape(-1, 2), 3)
    labels = np.argmax(share, -1).reshape(3, 20)
    assert np.all(labels == labels[:, :1])
    assert sorted(labels[:, 0].tolist()) == [0, 1, 2]


def test_entropy_scales_and_survives_degenerate_samples():
    x = jax.random.normal(jax.random.PRNGKey(0), (200, 3))
    fit = jax.jit(lambda x: mixture_entropy(fit_mixture(x, 3)))
    np.testing.assert_allclose(fit(2 * x) - fit(x), 3 * np.log(2), atol=0.01)
    for degenerate in (jnp.ones_like(x), x.at[:, 1].set(1.0), jnp.sign(x)):
        assert np.isfinite(fit(degenerate))


def test_profiles():
    paper, laptop = (make_agent("dacer", 3, 2, p).config for p in ("paper", "laptop"))
    assert paper == DACERConfig()
    assert (paper.width, paper.depth, paper.activation) == (256, 3, "mish")
    assert (paper.actor_lr, paper.critic_lr, paper.alpha_lr) == (3e-4, 3e-4, 3e-2)
    assert (paper.num_steps, paper.num_particles) == (20, 1)
    assert (paper.alpha_delay, paper.num_components) == (10_000, 3)
    assert (paper.entropy_samples, paper.initial_alpha) == (200, 3.0)
    assert paper.distributional and not paper.ema_policy
    assert (laptop.width, laptop.batch_size) == (128, 128)


def test_loss_is_minus_q_of_the_noisy_action():
    agent, batch, key = tiny(), transitions(4), jax.random.PRNGKey(1)
    state = agent.init(jax.random.PRNGKey(0))
    k_path, k_noise = jax.random.split(key)
    action = candidates(agent, state.policy, batch.observation, k_path, 1)[0]
    kick = 0.1 * jax.random.normal(k_noise, (1, 4, 2))[0]  # alpha is 1
    action = jnp.clip(action + kick, -1, 1)
    by_hand = -jnp.mean(q_value(agent, state.critic, batch.observation, action))
    loss = jax.jit(agent.policy_loss)(state.policy, state, batch, key)
    np.testing.assert_allclose(loss, by_hand, rtol=1e-4)


def test_gradient_of_alpha_is_the_excess_of_the_measured_entropy():
    agent, batch, key = tiny(target_entropy=-0.5), transitions(4), jax.random.PRNGKey(1)
    state = agent.init(jax.random.PRNGKey(0))
    slope = jax.jit(jax.grad(agent.alpha_loss))(state.log_alpha, state, batch, key)
    k_path, k_noise = jax.random.split(key)
    drawn = candidates(agent, state.policy, batch.observation, k_path, 8)
    drawn = add_noise(agent, drawn, state.log_alpha, k_noise)
    fit = jax.jit(lambda x: mixture_entropy(fit_mixture(x, 3)))
    entropy = np.mean([fit(drawn[:, i]) for i in range(4)])
    np.testing.assert_allclose(slope, entropy + 0.5 * 2, rtol=1e-3)


def test_a_clipped_action_has_no_gradient():
    """The trap of the chapter: in the corner nothing can be learned."""
    agent, batch, key = tiny(), transitions(4), jax.random.PRNGKey(1)
    state = agent.init(jax.random.PRNGKey(0))
    gradient = jax.jit(jax.grad(agent.policy_loss))

    def size(tree):
        return sum(float(jnp.abs(x).sum()) for x in jax.tree.leaves(tree))

    assert size(gradient(state.policy, state, batch, key)) > 0
    last = max(state.policy["params"]["MLP_0"], key=lambda n: int(n.split("_")[1]))
    stuck = jax.tree.map(lambda x: x, state.policy)
    stuck["params"]["MLP_0"][last]["bias"] = jnp.full(2, -1e3)
    assert size(gradient(stuck, state, batch, key)) == 0
