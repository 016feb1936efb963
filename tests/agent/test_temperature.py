"""Temperature: entropy of the noise, its loss, and where alpha comes to rest."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from som.agent.temperature import noise_entropy, resting_alpha, temperature_loss


def test_entropy_by_hand():
    # The entropy of a standard normal number is 1.4189 nats.
    assert noise_entropy(10.0, 0.1, 1) == pytest.approx(1.418939, abs=1e-5)
    assert noise_entropy(5.0, 0.1, 3) == pytest.approx(3 * (1.418939 - math.log(2)))


def test_entropy_is_the_mean_surprise_of_samples():
    std = 0.25
    x = std * np.random.default_rng(0).standard_normal((20_000, 2))
    surprise = 0.5 * (x / std) ** 2 + math.log(std * math.sqrt(2 * math.pi))
    error = surprise.sum(1).std() / math.sqrt(len(x))
    assert abs(surprise.sum(1).mean() - noise_entropy(2.5, 0.1, 2)) < 4 * error


@pytest.mark.parametrize("size", [1, 6, 17])
def test_noise_at_rest_has_the_target_entropy(size):
    rest = resting_alpha(-0.9, 0.1)
    assert rest == pytest.approx(0.98378, abs=1e-5)
    assert noise_entropy(rest, 0.1, size) == pytest.approx(-0.9 * size, abs=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_gradient_is_the_excess_of_entropy(alpha):
    log_alpha = jnp.log(jnp.float32(alpha))
    slope = jax.grad(temperature_loss)(log_alpha, -0.9 * 6, 0.1, 6)
    assert slope == pytest.approx(
        6 * math.log(alpha / resting_alpha(-0.9, 0.1)), abs=1e-4
    )


def test_loss_value_by_hand():
    log_alpha = jnp.log(jnp.float32(2.0))
    excess = math.log(0.2) + 1.418939 + 0.9
    loss = temperature_loss(log_alpha, -0.9, 0.1, 1)
    assert loss == pytest.approx(math.log(2) * excess, abs=1e-5)


def test_ramp_of_the_paper_takes_579_steps():
    adam = optax.adam(7e-3)

    def step(carry, _):
        log_alpha, state = carry
        gradient = jax.grad(temperature_loss)(log_alpha, -0.9 * 6, 0.1, 6)
        update, state = adam.update(gradient, state)
        return (log_alpha + update, state), jnp.exp(log_alpha + update)

    start = jnp.log(jnp.float32(5.0))
    alphas = jax.lax.scan(step, (start, adam.init(start)), length=700)[1]
    arrived = np.argmax(alphas < 1.01 * resting_alpha(-0.9, 0.1)) + 1
    assert abs(arrived - 579) <= 2
    assert alphas[231] == pytest.approx(1.4815, rel=2e-3)
