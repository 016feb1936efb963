"""Names and commands of the runs at the paper's scale."""

import shlex

import pytest

from som.agent.actor_critic import make_agent
from som.mujoco.scale import (
    ASKED,
    STEPS,
    find_runs,
    missing,
    record_of,
    result,
    run_name,
    table,
    train_command,
)
from som.training.command_line import override, parser
from som.training.environments import TASKS
from som.training.records import mean_ci, write_record

ARMS = {"default": {}, "w 5": {"rescale": 5.0}}


def record(finals, step=1_000_000):
    """Make a record of two evaluations, two episodes each."""
    return {
        "steps": 1_000_000,
        "curve": [
            {"step": step // 2, "returns": [[0, 0] for _ in finals]},
            {"step": step, "returns": [[x - 1, x + 1] for x in finals]},
        ],
    }


def test_steps_are_the_papers():
    assert set(STEPS) == set(TASKS)
    assert sorted(STEPS.values()) == [1_000_000] * 3 + [5_000_000] * 6


def test_names():
    assert run_name("Hopper-v4", "paper") == "Hopper-v4-paper"
    assert run_name("Hopper-v4", rescale=5) == "Hopper-v4-paper-rescale=5"
    assert run_name("Hopper-v4", rescale=5.0) == "Hopper-v4-paper-rescale=5"
    assert run_name("Ant-v4", algo="sdac") == "Ant-v4-sdac-paper"
    name = "Ant-v4-paper-noise_range=0.02,3-sde=ve"
    assert run_name("Ant-v4", sde="ve", noise_range=(0.02, 3.0)) == name
    assert run_name("Ant-v4", noise_range=[0.02, 3.0], sde="ve") == name


@pytest.mark.parametrize(
    ("told", "steps"),
    [
        ({"env": "Ant-v4"}, 5_000_000),
        ({"env": "Reacher-v4", "sde": "ve", "noise_range": (0.02, 3.0)}, 1_000_000),
        ({"env": "Ant-v4", "rescale": 5.0, "num_samples": 4}, 5_000_000),
        ({"env": "Ant-v4", "rescale": None, "profile": "paper-literal"}, 5_000_000),
        ({"env": "Ant-v4", "algo": "mfp"}, 5_000_000),
    ],
)
def test_the_command_line_reads_what_was_meant(told, steps):
    words = shlex.split(train_command(**told))
    assert words[:2] == ["som", "train"]
    args = parser().parse_args(words[1:])
    assert (args.env, args.steps, args.seeds) == (told["env"], steps, tuple(range(5)))
    assert (args.algo, args.profile) == (
        told.get("algo", "som"),
        told.get("profile", "paper"),
    )
    config = make_agent(args.algo, 3, 2, args.profile).config
    read = dict(override(text, config) for text in args.overrides)
    assert read == {
        k: v for k, v in told.items() if k not in ("env", "algo", "profile")
    }
    assert args.out == f"runs/{run_name(**told)}"


@pytest.mark.parametrize(
    ("told", "sentence"),
    [
        ({"env": "Hoper-v4"}, "Hopper-v4"),
        ({"env": "Hopper-v4", "algo": "smo"}, "som"),
        ({"env": "Hopper-v4", "profile": "papre"}, "paper"),
        ({"env": "Hopper-v4", "recsale": 5}, "rescale"),
    ],
)
def test_no_command_for_what_cannot_be_run(told, sentence):
    with pytest.raises(ValueError, match=sentence):
        train_command(**told)


def test_what_is_kept_and_what_is_missing(tmp_path):
    write_record(tmp_path / "Hopper-v4-paper.json", record([10.0, 12.0]))
    assert record_of("Hopper-v4-paper", tmp_path)["steps"] == 1_000_000
    assert record_of("Ant-v4-paper", tmp_path) is None
    runs = find_runs(("Hopper-v4", "Reacher-v4"), ARMS, tmp_path)
    assert missing(runs, ARMS) == [
        train_command("Hopper-v4", rescale=5.0),
        train_command("Reacher-v4"),
        train_command("Reacher-v4", rescale=5.0),
    ]
    mean, low, high = mean_ci([10.0, 12.0])
    found = table(runs)
    assert found.head == ("task", "default", "w 5")
    first = f"{mean:.0f} [{low:.0f}, {high:.0f}]"
    assert found.rows[0] == ("Hopper-v4", first, "not yet run")
    assert found.rows[1][1:] == ("not yet run", "not yet run")


def test_everything_asked_for_has_a_command_of_its_own(tmp_path):
    lines = [
        line
        for tasks, arms in ASKED.values()
        for line in missing(find_runs(tasks, arms, tmp_path), arms)
    ]
    assert len(set(lines)) == len(lines) == 9 * 2 + 9 + 6 * (3 + 2 + 3)


def test_a_run_that_is_not_at_its_end_says_so():
    assert result(record([10.0, 12.0])).endswith("]")
    assert result(record([10.0, 12.0], 500_000)).endswith("] at 0.5M")
    assert result(None) == "not yet run"
