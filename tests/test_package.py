"""The names that people import first."""

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import som
from som.training import policy, runs


def test_the_surface():
    assert set(som.__all__) >= {
        "AGENTS",
        "Run",
        "load",
        "make_agent",
        "resume",
        "train",
    }
    for name in som.__all__:
        assert getattr(som, name) is not None
    assert (som.train, som.resume, som.load) == (runs.train, runs.resume, policy.load)


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (som.train, ["algo", "env", "steps", "seeds", "profile", "out", "progress"]),
        (som.resume, ["out", "progress"]),
        (som.load, ["path"]),
        (som.make_agent, ["name", "observation_size", "action_size"]),
    ],
)
def test_signatures_are_stable(function, names):
    parameters = list(inspect.signature(function).parameters)
    assert parameters[: len(names)] == names


@pytest.mark.parametrize("name", sorted(som.AGENTS))
def test_every_agent_has_its_profiles(name):
    kind = som.AGENTS[name]
    assert set(kind.profiles) >= {"paper", "laptop"}
    for profile, config in kind.profiles.items():
        agent = som.make_agent(name, 3, 2, profile)
        assert isinstance(agent, kind) and agent.config == config
        assert (agent.observation_size, agent.action_size) == (3, 2)


def test_make_agent_takes_overrides_and_names_the_nearest():
    assert som.make_agent("som", 3, 2, width=8).config.width == 8
    with pytest.raises(ValueError, match=r"unknown algorithm 'sum'; .* 'som'"):
        som.make_agent("sum", 3, 2)
    with pytest.raises(ValueError, match="'widht'; did you mean 'width'"):
        som.make_agent("som", 3, 2, widht=8)


def test_bad_calls_are_one_sentence(tmp_path):
    calls = [
        lambda: som.load(tmp_path / "nothing"),
        lambda: som.resume(tmp_path),
        lambda: som.train(algo="sarsa"),
        lambda: som.train(env="HalfCheeta-v4"),
        lambda: som.train(steps=-1),
        lambda: som.train(seeds=np.array([0, 0])),
    ]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_import_computes_nothing():
    # A device that is open has threads, and a process that is forked from
    # one with threads may wait for them for ever.
    code = (
        "import som; from jax._src import xla_bridge; "
        "assert not xla_bridge._backends, xla_bridge._backends"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_clone_named_som_does_not_hide_the_package():
    """In the folder above it; setuptools then puts the clone on Python's path."""
    project = Path(__file__).parents[1] / "pyproject.toml"
    settings = tomllib.loads(project.read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == {"": "."}
