"""The same update on another device, and one that is another."""

import jax
import pytest

from som.mujoco import precision
from som.mujoco.cost import TINY
from som.mujoco.precision import parity, parity_title


def test_parity_of_a_right_and_a_wrong_update(monkeypatch):
    right = parity(**TINY)
    assert set(right) >= {"policy", "critic", "critic_opt", "metrics"}
    assert max(right.values()) < 1e-4
    assert "CPU" in parity_title()

    def wrong(agent, inputs):
        state, batch, key = inputs
        state, metrics = jax.jit(agent.update)(state, batch, key)
        return state._replace(bound=1.01 * state.bound), metrics

    monkeypatch.setattr(precision, "_update_elsewhere", wrong)
    assert parity(**TINY)["bound"] == pytest.approx(0.01, rel=1e-3)
