"""The settings.

Exported by tools/export.py from book/training/settings.md; edit the chapter.
"""

__all__ = [
    "meanings",
    "Setting",
    "settings",
    "show",
]

# %% Imports
import dataclasses
import inspect
import re
import shutil
import textwrap
import typing
from typing import Any, Literal, NamedTuple

from som.training import loop


# %% One source
_FIELD = re.compile(r"^    (\w+): [^#\n]*# (.+)$", re.MULTILINE)


def meanings(config: Any) -> dict[str, str]:
    """What the fields of a configuration mean, by their comments.

    Args:
        config: a dataclass's instance.

    Returns:
        A line for each field that has a comment or takes one of a few words.
    """
    found: dict[str, str] = {}
    for kind in reversed(type(config).__mro__):
        if dataclasses.is_dataclass(kind):
            found |= dict(_FIELD.findall(inspect.getsource(kind)))
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            words = " or ".join(typing.get_args(hint))
            found[name] = (
                f"{found[name]}: {words}" if name in found else words
            )
    names = [field.name for field in dataclasses.fields(config)]
    return {name: found[name] for name in names if name in found}


# %% The list
class Setting(NamedTuple):
    """One field of an agent's or of the loop's configuration."""

    owner: str  # "agent" or "loop"
    name: str
    value: Any  # in the profile
    paper: Any  # in the profile `paper`
    meaning: str


def settings(algo: str = "som", profile: str = "laptop") -> list[Setting]:
    """Every setting of an agent and of its loop.

    Args:
        algo: name of the algorithm, a key of som.AGENTS.
        profile: one of its profiles.

    Raises:
        ValueError: no such algorithm or profile.
    """
    here, paper = loop.defaults(algo, profile), loop.defaults(algo, "paper")
    found = []
    for owner, config, usual in zip(
        ("agent", "loop"), here, paper, strict=True
    ):
        meaning = meanings(config)
        for field in dataclasses.fields(config):
            name = field.name
            values = getattr(config, name), getattr(usual, name)
            found.append(Setting(owner, name, *values, meaning[name]))
    return found


def _short(value: Any) -> str:
    """A value as text, of a number the first six digits."""
    long = isinstance(value, float) and len(str(value)) > 12
    return f"{value:.6g}" if long else str(value)


def show(algo: str = "som", profile: str = "laptop") -> None:
    """Print every setting of an agent and of its loop in one profile."""
    found = settings(algo, profile)
    first = 4 + max(len(s.name) for s in found)
    values = [len(profile), *(len(_short(s.value)) for s in found)]
    papers = [len("paper"), *(len(_short(s.paper)) for s in found)]
    here, usual = 2 + max(values), 2 + max(papers)
    before = first + here + usual + 2
    page = max(shutil.get_terminal_size().columns, before + 20) - 1
    known = ", ".join(loop.profiles(loop.AGENTS[algo]))
    print(f"{algo}, profile {profile} (there are: {known})")
    print(
        "change a setting by --set NAME=VALUE; a number whose meaning names"
    )
    print("no unit (steps, updates, rows, seconds, nats, ...) has none")
    for owner in ("agent", "loop"):
        print(f"{owner:{first}}{profile:>{here}}{'paper':>{usual}}  meaning")
        for s in found:
            if s.owner == owner:
                row = f"  {s.name:{first - 2}}{_short(s.value):>{here}}"
                row += f"{_short(s.paper):>{usual}}  {s.meaning}"
                indent = " " * before
                print(textwrap.fill(row, page, subsequent_indent=indent))
