"""What an update must cost: counts against sums made by hand."""

from functools import partial

import jax
import pytest

from som.agent.actor_critic import make_agent
from som.mujoco import cost
from som.mujoco.cost import TINY, floors, measured, operations, peaks, shown, traffic
from som.training.records import write_record


def with_config(**changes):
    """The paper's agent with some settings changed."""
    return make_agent("som", 17, 6, "paper", **changes)


def test_operations_by_hand():
    shape = TINY | {"width": 3, "depth": 2, "target_particles": None}
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
    agent = with_config(**TINY)
    state = agent.init(jax.random.PRNGKey(0))
    assert traffic(agent)["state"] == 2 * sum(x.nbytes for x in jax.tree.leaves(state))


def test_peaks(monkeypatch):
    monkeypatch.setattr(cost, "stream", partial(cost.stream, 1000))
    assert min(peaks(1).values()) > 0


def test_a_table_has_a_column_for_each_machine_that_has_it(tmp_path):
    for name, value in (("cpu", 1234.5), ("h200", 0.12345)):
        tables = {"times": {"a": value}} | ({"b": {"x": 1}} if name == "cpu" else {})
        write_record(tmp_path / f"{name}.json", {"tables": tables})
    machines = measured(tmp_path)
    assert list(machines) == list(cost.MACHINES)
    both = shown(machines, "times")
    assert both.head == ("times", "CPU", "H200")
    assert both.rows == [("a", "1,234", "0.123")]
    assert shown(machines, "b").head == ("b", "CPU")
    assert shown(measured(tmp_path / "none"), "b").rows == [("not yet run",)]
