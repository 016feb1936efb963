"""The benchmarks yield the tables that the chapters read."""

from dataclasses import replace

import jax

import som
from som.agent.actor_critic import make_agent
from som.mujoco import benchmark
from som.mujoco.benchmark import algorithms
from som.mujoco.cost import TINY
from som.mujoco.precision import parity_title
from som.mujoco.speed import AXES
from som.training.command_line import BENCHMARKS


def test_the_benchmarks_are_entered():
    assert BENCHMARKS["machine"] is benchmark.machine
    assert BENCHMARKS["algorithms"] is benchmark.algorithms


def test_algorithms_leave_out_on_policy_updates(monkeypatch):
    agent = make_agent("som", 17, 6, "paper", **TINY)

    class OnPolicy(type(agent)):
        on_policy = True
        profiles = {"paper": replace(agent.config, num_particles=1)}  # noqa: RUF012

    # dipo keeps guides in its replay
    agents = {"ppo": OnPolicy} | {n: som.AGENTS[n] for n in ("mfp", "dipo")}
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
        monkeypatch.setattr(benchmark, name, lambda *_, **__: row)
    monkeypatch.setattr(benchmark, "cycle", lambda agent: (None, 1))
    monkeypatch.setattr(benchmark, "growth", lambda _: dict.fromkeys(AXES, row))
    tables = dict(benchmark.machine(1))
    assert all(rows == row for rows in tables.values())
    assert set(tables) >= {
        "the machine",
        "one update, paper profile, HalfCheetah's sizes",
        "one action, paper profile",
        parity_title(),
        *(f"ms per update against {axis}" for axis in AXES),
    }
