"""Actions, physics and the loop, timed at sizes that take no time."""

from som.mujoco.cost import TINY
from som.mujoco.pace import action_times, loop_speed, physics_speeds

TASK = "InvertedDoublePendulum-v4"


def test_benchmark_of_the_loop():
    small = {"chunk_steps": 10, "capacity": 10_000}
    result = loop_speed(1, TASK, **TINY, **small)
    assert result["steps per second"] > 0 and result["update ms"] > 0
    assert result["temporary MiB"] < result["buffer MiB"]


def test_times_of_actions_and_physics():
    assert set(physics_speeds([TASK], 1, num_envs=2, steps=3)) == {TASK}
    actions = action_times(1, width=4, depth=1)
    assert set(actions) == {"N=1 ms", "N=32 ms"} and min(actions.values()) > 0
