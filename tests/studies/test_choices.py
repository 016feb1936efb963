"""The map of open choices names every combination, and each is a valid agent."""

from som.agent.actor_critic import make_agent
from som.agent.som import SOM
from som.studies.choices import COMBINATIONS, ONE_CHANGE, arm_name
from som.training.command_line import STUDIES


def agent(name):
    """Make the agent that an arm describes."""
    arm = COMBINATIONS.get(name) or ONE_CHANGE[name]
    if "noise_range" in arm:
        arm = arm | {"noise_range": tuple(arm["noise_range"])}
    return make_agent("som", 1, 2, "bandit", **arm)


def test_every_arm_is_a_different_agent():
    names = list(STUDIES["choices"].arms)
    assert len(names) == len(COMBINATIONS) + len(ONE_CHANGE)
    settings = [agent(name).config for name in names]
    assert len(set(settings)) == len(names) - 1  # the default, twice


def test_each_single_change_is_one():
    default = vars(agent("default").config)
    for name in ONE_CHANGE:
        config = vars(agent(name).config)
        changed = {k for k, v in config.items() if v != default[k]}
        if name == "paper-literal":
            literal = vars(SOM.profiles["paper-literal"])
            paper = vars(SOM.profiles["paper"])
            told = {k for k, v in literal.items() if v != paper[k]}
            assert {k: config[k] for k in told} == {k: literal[k] for k in told}
            assert changed <= told
        elif name != "default":
            assert len(changed) == 1, name


def test_the_default_is_on_the_map():
    name = arm_name("box", "lagrangian", 2.0, "sharpened")
    assert agent(name).config == agent("default").config
