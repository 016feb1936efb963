"""The map of open choices names every combination, and each is a valid agent."""

from som.agent.actor_critic import make_agent
from som.agent.som import SOM
from som.studies.choices import COMBINATIONS, ONE_CHANGE, arm_name
from som.training.command_line import STUDIES


def agent(name):
    """Make the agent that an arm describes."""
    arm = dict(STUDIES["choices"].arms[name])
    for key in ("landscape", "steps"):
        del arm[key]
    return make_agent(arm.pop("algo"), 1, 2, "laptop", **arm)


def test_every_arm_is_a_different_agent():
    names = list(STUDIES["choices"].arms)
    assert len(names) == len(COMBINATIONS) + len(ONE_CHANGE)
    settings = [str(agent(name).config) for name in COMBINATIONS]
    assert len(set(settings)) == len(COMBINATIONS)


def test_each_single_change_is_one():
    default = vars(agent("default").config)
    for name in ONE_CHANGE:
        config = vars(agent(name).config)
        changed = {k for k, v in config.items() if str(v) != str(default[k])}
        if name == "paper-literal":
            literal = vars(SOM.profiles["paper-literal"])
            paper = vars(SOM.profiles["paper"])
            assert changed == {k for k, v in literal.items() if v != paper[k]}
        elif name not in ("default", "score as it is, beta to 6"):
            assert len(changed) == 1, name


def test_the_default_is_on_the_map():
    name = arm_name("combined", "lagrangian", 2.0, 10.0)
    assert str(agent(name).config).replace("[", "(").replace("]", ")") == str(
        agent("default").config
    )
