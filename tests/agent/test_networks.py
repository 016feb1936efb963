"""Networks: the split first layer, time features, policy and twin critics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from som.agent.networks import (
    MLP,
    Critic,
    Policy,
    TimeEmbedding,
    mish,
    time_features,
)

KEY = jax.random.key(0)
OBS, A, WIDTH, DEPTH = 3, 2, 8, 2


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def dense(params, i):
    layer = params["params"][f"Dense_{i}"]
    return np.asarray(layer["kernel"], float), layer.get("bias", 0.0)


@pytest.fixture(scope="module")
def critic():
    s, a = jnp.ones(OBS), jnp.ones(A)
    return jax.jit(Critic(WIDTH, DEPTH).init)(KEY, s, a)


@pytest.fixture(scope="module")
def policy():
    net = Policy(A, WIDTH, DEPTH)
    zero = jnp.zeros(())
    return net, jax.jit(net.init)(KEY, jnp.zeros(A), zero, zero, jnp.zeros(OBS))


def test_split_first_layer_equals_concatenation():
    keys = jax.random.split(KEY, 3)
    s, a = jax.random.normal(keys[0], (OBS,)), jax.random.normal(keys[1], (5, A))
    mlp = MLP(WIDTH, DEPTH, 4)
    params = jax.jit(mlp.init)(keys[2], s, a)
    (w_s, bias), (w_a, none) = dense(params, 0), dense(params, 1)
    assert none == 0.0
    h = np.concatenate([np.tile(s, (5, 1)), a], -1) @ np.concatenate([w_s, w_a]) + bias
    for i in (2, 3):
        kernel, bias = dense(params, i)
        h = gelu(h) @ kernel + bias
    np.testing.assert_allclose(jax.jit(mlp.apply)(params, s, a), h, atol=1e-5)


def test_a_residual_policy_adds_its_input(policy):
    net, params = policy
    a = jax.random.normal(KEY, (5, A))
    rest = jnp.float32(0.2), jnp.float32(0.7), jnp.ones(OBS)
    plain = net.apply(params, a, *rest)
    added = net.clone(residual=True).apply(params, a, *rest)
    assert jnp.abs(plain).max() > 0.01
    np.testing.assert_allclose(added, plain + a, atol=1e-6)


def test_all_first_kernels_have_the_deviation_of_one_joint_layer():
    params = jax.jit(MLP(2000, 1, 1).init)(KEY, jnp.zeros(12), jnp.zeros(4))
    for i, size in enumerate((12, 4)):
        kernel, _ = dense(params, i)
        assert kernel.shape == (size, 2000)
        assert kernel.std() == pytest.approx(1 / 4, rel=0.03)


def test_mish_is_finite_far_out_and_is_what_a_network_bends_by():
    far = jnp.array([-1e4, -100.0, 0.0, 100.0, 1e4])
    np.testing.assert_array_equal(mish(far), [0, 0, 0, 100, 1e4])
    slopes = jax.vmap(jax.grad(mish))(far)
    np.testing.assert_allclose(slopes, [0, 0, 0.6, 1, 1], atol=1e-6)
    mlp = MLP(WIDTH, 1, 4, "mish")
    x = jax.random.normal(KEY, (5, OBS))
    params = mlp.init(KEY, x)
    (first, _), (last, bias) = dense(params, 0), dense(params, 1)
    h = np.asarray(x @ first, float)
    h = h * np.tanh(np.log1p(np.exp(h)))
    np.testing.assert_allclose(mlp.apply(params, x), h @ last + bias, atol=1e-5)


def test_time_features_by_hand():
    t = jnp.array([0.0, 0.5])
    features = time_features(t, size=4)
    expected = [[0, 0, 1, 1], [math.sin(0.5), math.sin(0.005)]]
    expected[1] += [math.cos(0.5), math.cos(0.005)]
    np.testing.assert_allclose(features, expected, atol=1e-6)
    assert time_features(jnp.zeros((2, 3))).shape == (2, 3, 16)


def test_derivative_of_time_features_has_a_constant_norm():
    slope = jax.vmap(jax.jacfwd(time_features))(jnp.linspace(0, 1, 7))
    expected = math.sqrt((1 - 0.1**8) / 0.9)
    np.testing.assert_allclose(jnp.linalg.norm(slope, axis=-1), expected, rtol=1e-5)


def test_time_embedding_keeps_leading_axes():
    t = jnp.zeros((2, 3))
    out, params = TimeEmbedding().init_with_output(KEY, t)
    assert out.shape == (2, 3, 16)
    assert sum(x.size for x in jax.tree.leaves(params)) == 544 + 528


def test_policy_broadcasts_state_and_times(policy):
    net, params = policy
    a, s = jax.random.normal(KEY, (5, A)), jnp.arange(float(OBS))
    shared = jax.jit(net.apply)(params, a, jnp.zeros(()), jnp.ones(()), s)
    full = jax.jit(net.apply)(params, a, jnp.zeros(5), jnp.ones(5), jnp.tile(s, (5, 1)))
    assert shared.shape == (5, A)
    np.testing.assert_allclose(shared, full, atol=1e-6)


def test_policy_tells_interval_from_time(policy):
    net, params = policy

    def u(r, t):
        r, t = jnp.float32(r), jnp.float32(t)
        return net.apply(params, jnp.zeros(A), r, t, jnp.zeros(OBS))

    assert jnp.abs(u(0.0, 1.0) - u(1.0, 1.0)).max() > 1e-4
    assert jnp.abs(u(0.0, 0.5) - u(0.5, 1.0)).max() > 1e-4


def test_critic_is_two_separate_networks(critic):
    s, a = jax.random.normal(KEY, (4, OBS)), jnp.full((7, 4, A), 0.3)
    mean, std = jax.jit(Critic(WIDTH, DEPTH).apply)(critic, s, a)
    assert mean.shape == std.shape == (7, 4, 2)
    for i in range(2):
        own = jax.tree.map(lambda x, i=i: x[i], critic["params"]["VmapMLP_0"])
        alone = jax.jit(MLP(WIDTH, DEPTH, 2).apply)({"params": own}, s, a)
        np.testing.assert_allclose(mean[..., i], alone[..., 0], atol=1e-6)
        softplus = np.log1p(np.exp(alone[..., 1]))
        np.testing.assert_allclose(std[..., i], softplus, atol=1e-6)


def test_twins_start_apart_and_do_not_share_gradients(critic):
    s, a = jnp.ones(OBS), jnp.ones(A)

    def first(params):
        return Critic(WIDTH, DEPTH).apply(params, s, a)[0][0]

    mean, _ = jax.jit(Critic(WIDTH, DEPTH).apply)(critic, s, a)
    assert abs(mean[0] - mean[1]) > 1e-3
    slopes = jax.tree.leaves(jax.jit(jax.grad(first))(critic))
    assert not any(np.any(leaf[1]) for leaf in slopes)
    assert all(np.any(leaf[0]) for leaf in slopes)


def test_parameter_counts_at_paper_size():
    o, a, t = jnp.zeros(17), jnp.zeros(6), jnp.zeros(())

    def size(tree):
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    assert size(jax.eval_shape(Policy(6, 256, 3).init, KEY, a, t, t, o)) == 149_606
    assert size(jax.eval_shape(Critic(256, 3).init, KEY, o, a)) == 276_484


@pytest.mark.parametrize("name", ["gelo", "initializers"])
def test_an_activation_that_jax_does_not_have_is_refused(name):
    with pytest.raises(ValueError, match=f"activation is '{name}'; a function"):
        MLP(4, 2, 1, name).init(jax.random.PRNGKey(0), jnp.zeros(2))
