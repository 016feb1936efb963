"""Counts against hand-made sums; benchmarks at sizes that take no time."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import som
from som.agent.actor_critic import make_agent
from som.mujoco import speed
from som.mujoco.speed import (
    action_times,
    algorithms,
    cycle,
    floors,
    growth,
    kernels,
    largest_difference,
    loop_speed,
    operations,
    parity,
    parity_title,
    parts,
    peaks,
    physics_speeds,
    traffic,
    update_times,
)
from som.training.command_line import BENCHMARKS

TASK = "InvertedDoublePendulum-v4"
SMALLEST = {
    "width": 4, "depth": 1, "batch_size": 4, "num_samples": 2, "num_particles": 2,
    "estimator": "box", "target": "jvp", "chunk": 1, "discount": 0.0,
}  # fmt: skip
TINY = make_agent("som", 17, 6, "paper", **SMALLEST)


def with_config(**changes):
    """The paper's agent with some settings changed."""
    return make_agent("som", 17, 6, "paper", **changes)


def test_the_benchmarks_are_entered():
    assert BENCHMARKS["machine"] is speed.machine
    assert BENCHMARKS["algorithms"] is speed.algorithms


# What an update must do


def test_operations_by_hand():
    shape = SMALLEST | {"width": 3, "depth": 2, "target_particles": None}
    agent = make_agent("som", 2, 1, **shape)
    kappa = 2 * 2 * (1 * 3 + 3 * 3 + 3 * 2)  # twins, an action
    kappa_s = 2 * 2 * (2 * 3)
    pi = 2 * (1 * 3 + 3 * 3 + 3 * 1)
    pi_s = 2 * ((2 + 16 + 16) * 3 + 2 * (16 * 32 + 32 * 16))
    parts = operations(agent)
    assert parts["K pass"] == 4 * (2 * kappa + kappa_s)
    assert parts["N pass"] == 4 * (2 * (kappa + pi) + kappa_s + pi_s)
    assert parts["critics"] == 16 * (kappa + kappa_s)
    assert parts["policy"] == 16 * (pi + pi_s) + 8 * 4 * kappa
    changes = {"target_particles": 1, "policy_batch": 3, "batch_norm": True}
    parts = operations(make_agent("som", 2, 1, **shape | changes))
    assert parts["K pass"] == 3 * (2 * kappa + kappa_s)
    assert parts["N pass"] == 4 * (pi + pi_s)
    assert parts["critics"] == 32 * (kappa + kappa_s)  # 2 * 4 rows, four passes
    assert parts["policy"] == 12 * (pi + pi_s) + 8 * 3 * kappa
    changes = {"estimator": "shared", "rows_per_state": 2, "policy_batch": 3}
    parts = operations(make_agent("som", 2, 1, **shape | changes))
    gradients = 2 * 2 * (kappa + kappa_s)
    jump = pi + pi_s
    assert parts["K pass"] == 3 * (2 * kappa + kappa_s + gradients + jump)
    assert parts["policy"] == 24 * (pi + pi_s) + 8 * 3 * kappa


def test_the_gradient_at_the_guesses_doubles_the_k_pass():
    box, idem = (
        operations(with_config(estimator=name))["K pass"] for name in ("box", "idem")
    )
    assert 1.99 < idem / box < 2
    centre = operations(with_config(estimator="combined"))["K pass"]
    assert box < centre < 1.03 * box


@pytest.mark.parametrize("field", ["num_samples", "target_particles", "batch_size"])
def test_operations_grow_in_proportion(field):
    part = {"num_samples": "K pass", "target_particles": "N pass"}.get(field, "critics")
    one, two = (operations(with_config(**{field: 512 * i}))[part] for i in (1, 2))
    assert two / one == pytest.approx(2, rel=0.05)


def test_floors_are_means_over_a_cycle():
    agent = with_config()
    flops, moved = operations(agent), traffic(agent)
    least = floors(agent, 1e9, 1e6)
    delayed = (flops["K pass"] + flops["policy"]) / 2
    whole = flops["N pass"] + flops["critics"] + delayed
    assert least["arithmetic ms"] == pytest.approx(whole / 1e6)
    assert least["state ms"] == pytest.approx(moved["state"] / 1e3)
    spilled = moved["state"] + moved["N pass"] + moved["K pass"] / 2
    assert least["activations ms"] == pytest.approx(spilled / 1e3)
    every = floors(with_config(policy_delay=1), 1e9, 1e6)
    assert every["arithmetic ms"] == pytest.approx(sum(flops.values()) / 1e6)


def test_traffic_counts_the_state_twice():
    state = jax.jit(TINY.init)(jax.random.PRNGKey(0))
    assert traffic(TINY)["state"] == 2 * sum(x.nbytes for x in jax.tree.leaves(state))


# The same numbers


def test_largest_difference_is_relative_to_each_leaf():
    x = {"a": jnp.array([100.0, 0.0]), "b": jnp.array([0.0, 1e-3])}
    y = {"a": jnp.array([100.0, 1.0]), "b": jnp.array([1e-4, 1e-3])}
    assert largest_difference(x, y) == pytest.approx(0.1)
    assert largest_difference(x, x) == 0


def test_parity_of_a_right_and_a_wrong_update(monkeypatch):
    right = parity(**SMALLEST)
    assert set(right) >= {"policy", "critic", "critic_opt", "metrics"}
    assert max(right.values()) < 1e-4
    assert "CPU" in parity_title()

    def wrong(agent, inputs):
        state, batch, key = inputs
        state, metrics = jax.jit(agent.update)(state, batch, key)
        return state._replace(bound=1.01 * state.bound), metrics

    monkeypatch.setattr(speed, "_update_elsewhere", wrong)
    assert parity(**SMALLEST)["bound"] == pytest.approx(0.01, rel=1e-3)


def test_cycle_makes_whole_cycles_and_the_same_ones():
    call, updates = cycle(TINY, seeds=2)
    assert updates % TINY.config.policy_delay == 0
    first, second = call(), call()
    assert first.step == TINY.config.policy_delay + updates
    assert first.log_alpha.shape == (2,)
    assert largest_difference(first, second) == 0
    policies = jax.tree.leaves(first.policy)
    assert any(np.abs(x[0] - x[1]).max() > 0 for x in policies)


# Times


def test_peaks(monkeypatch):
    monkeypatch.setattr(speed, "stream", partial(speed.stream, 1000))
    assert min(peaks(1).values()) > 0


def test_kernels_are_named_and_sum_to_a_whole():
    product = jax.jit(lambda x: jnp.tanh(x @ x))
    shares = kernels(partial(product, jnp.ones((256, 256))))
    assert shares and 0 < sum(shares.values()) <= 100.1
    assert not any("." in name for name in shares)


def test_benchmark_of_updates_actions_and_physics():
    result = update_times("paper", 1, **SMALLEST)
    assert all(value > 0 for value in result.values())
    assert set(physics_speeds([TASK], 1, num_envs=2, steps=3)) == {TASK}
    actions = action_times(1, width=4, depth=1)
    assert set(actions) == {"N=1 ms", "N=32 ms"} and min(actions.values()) > 0


def test_benchmark_of_the_parts():
    result = parts(1, **SMALLEST)
    assert set(result) == {"N pass ms", "critics ms", "policy ms", "update ms"}
    assert min(result.values()) > 0


def test_benchmark_of_the_loop():
    small = {"chunk_steps": 10, "capacity": 10_000}
    result = loop_speed(1, TASK, **SMALLEST, **small)
    assert result["steps per second"] > 0 and result["update ms"] > 0
    assert result["temporary MiB"] < result["buffer MiB"]


def test_growth_times_a_shared_size_once():
    axes = {"K": ("num_samples", (2,)), "seeds": ("seeds", (1, 2))}
    result = growth(1, axes, **SMALLEST)
    assert [list(rows) for rows in result.values()] == [["2"], ["1", "2"]]
    assert result["K"]["2"] == result["seeds"]["1"] > 0


def test_algorithms_leave_out_on_policy_updates(monkeypatch):
    class OnPolicy(type(TINY)):
        on_policy = True
        profiles = {"paper": replace(TINY.config, num_particles=1)}  # noqa: RUF012

    # dipo keeps guides in its replay
    agents = {"ppo": OnPolicy} | {n: som.AGENTS[n] for n in ("mfp", "dipo")}
    monkeypatch.setattr(speed, "AGENTS", agents)
    for module in ("agent.actor_critic", "training.loop", "training.policy"):
        monkeypatch.setattr(f"som.{module}.AGENTS", agents)
    tiny = {"width": 4, "depth": 1, "batch_size": 4, "discount": 0.0}
    tables = dict(algorithms(1, ["mfp", "dipo", "ppo"], **tiny))
    learners = {"mfp", "dipo"}
    assert [set(rows) for rows in tables.values()] == [
        learners, learners, {"ppo", *learners},
    ]  # fmt: skip
    assert all(value > 0 for rows in tables.values() for value in rows.values())
    assert jax.config.jax_enable_compilation_cache


def test_machine_yields_the_tables_that_the_chapter_reads(monkeypatch):
    row = {"x": 1.0}
    for name in (
        "peaks", "update_times", "parts", "kernels", "action_times",
        "physics_speeds", "loop_speed", "parity",
    ):  # fmt: skip
        monkeypatch.setattr(speed, name, lambda *_, **__: row)
    monkeypatch.setattr(speed, "cycle", lambda agent: (None, 1))
    monkeypatch.setattr(speed, "growth", lambda _: dict.fromkeys(speed.AXES, row))
    tables = dict(speed.machine(1))
    assert all(rows == row for rows in tables.values())
    assert set(tables) >= {
        "the machine",
        "one update, paper profile, HalfCheetah's sizes",
        "one action, paper profile",
        parity_title(),
        *(f"ms per update against {axis}" for axis in speed.AXES),
    }
