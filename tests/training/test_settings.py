"""Settings: their meanings are the comments, their values the profile's."""

from dataclasses import dataclass, fields
from typing import Literal

import pytest

from som import AGENTS
from som.training import loop
from som.training.settings import meanings, settings, show


@dataclass(frozen=True)
class Base:
    """A first configuration.

    Args: none  # not a field
    """

    width: int = 3  # units
    pace: float = 0.1  # steps per second, "fast" is 1
    plain: int = 0

    def area(self):
        side: int = self.width  # not a field
        return side**2


@dataclass(frozen=True)
class Richer(Base):
    """Another, with a field of its own and one that it says anew."""

    width: int = 4  # units of each of two layers
    kind: Literal["a", "b"] = "a"
    law: Literal["c", "d"] = "c"  # of the noise


def test_meanings_are_the_comments_of_the_class_and_its_bases():
    assert meanings(Richer()) == {
        "width": "units of each of two layers",
        "pace": 'steps per second, "fast" is 1',
        "kind": "a or b",
        "law": "of the noise: c or d",
    }


@pytest.mark.parametrize("algo", sorted(AGENTS))
def test_every_field_is_listed_with_its_value_and_meaning(algo):
    for profile in loop.profiles(AGENTS[algo]):
        found = settings(algo, profile)
        here, paper = loop.defaults(algo, profile), loop.defaults(algo, "paper")
        values = {f.name: getattr(c, f.name) for c in here for f in fields(c)}
        assert {s.name: s.value for s in found} == values
        for s in found:
            assert s.paper == getattr(paper[s.owner == "loop"], s.name)
            assert len(s.meaning.split()) > 1


def test_the_table_names_profile_value_and_meaning(capsys):
    show("som", "laptop")
    lines = capsys.readouterr().out.splitlines()
    first, profiles = lines[0].split(" (there are: ")
    assert first == "som, profile laptop"
    assert profiles.rstrip(")").split(", ") == loop.profiles(AGENTS["som"])
    width = next(line.split() for line in lines if line.split()[0] == "width")
    assert width == ["width", "128", "256", "units", "per", "hidden", "layer"]
    owners = [line.split()[0] for line in lines if line.endswith("meaning")]
    assert owners == ["agent", "loop"]


@pytest.mark.parametrize("columns", [80, 200])
def test_the_table_fits_into_the_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    show("sac", "laptop")
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) < columns
    words = " ".join(text.split())
    for s in settings("sac", "laptop"):
        assert s.meaning in words
    assert "initial_alpha 1.0 2.71828 where" in words  # e, in the profile `paper`


def test_unknown_names_get_a_sentence():
    with pytest.raises(ValueError, match="unknown algorithm 'sum'; did you mean 'som'"):
        settings("sum")
    with pytest.raises(
        ValueError, match="unknown profile 'papr'; did you mean 'paper'"
    ):
        settings("som", "papr")
