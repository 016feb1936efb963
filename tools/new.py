"""Begin a chapter, an agent's or a study's, that passes every check as it stands.

    python tools/new.py agent climber
    python tools/new.py study ridge

The chapter, its module, its notebook, its test and its line in _toc.yml are made; the
agent learns, the study can be run. What remains is to make them say something new.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import export
import format_cells
import notebooks

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

"""
AGENT = '''\
# TITLE: a policy that climbs the critic

One sentence that says how an action is made and what the policy learns.

**Builds on:** {doc}`../agent/actor_critic`.

## Imports

```{code-cell} ipython3
:tags: [export, hide-input]

from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array

from som.agent.actor_critic import (
    AGENTS,
    BASELINE_LOOPS,
    LAPTOP_FRAME,
    ActorCritic,
    ActorCriticConfig,
    q_value,
)
from som.agent.critic import Transition
from som.agent.networks import MLP
```

```{code-cell} ipython3
import jax
import numpy as np
```

## The idea

The policy is a network without noise, $a = \\tanh f_\\theta(s)$, and climbs the smaller
of the two critics:

```{math}
:label: eq-NAME-loss
\\mathcal L(\\theta) = -\\,\\mathbb E_s \\min_k Q_k(s, \\tanh f_\\theta(s)) .
```

## The code

The settings of the frame, and what is different here. The comment behind a field is
what `som settings` shows.

```{code-cell} ipython3
:tags: [export]

@dataclass(frozen=True)
class TITLEConfig(ActorCriticConfig):
    """Settings of TITLE; say where the defaults are from."""

    num_particles: int = 1  # all candidates would be the same
    distributional: bool = False  # critics predict a std beside the mean


@dataclass(frozen=True)
class TITLE(ActorCritic):
    """A deterministic policy that climbs the critic.

    Args:
        config: see TITLEConfig.
        observation_size: O.
        action_size: A; actions live in [-1, 1]^A.
    """

    config: TITLEConfig

    profiles: ClassVar[dict[str, Any]] = {
        "paper": TITLEConfig(),
        "laptop": TITLEConfig(
            **LAPTOP_FRAME
            | {"num_particles": 1, "reward_scale": 0.2, "actor_lr": 3e-4},
            policy_delay=1,
        ),  # faster, tanh is at its bounds before the critic knows anything
    }
    loops: ClassVar[dict[str, dict[str, Any]]] = BASELINE_LOOPS

    @property
    def policy_net(self) -> Any:
        """The network f, an `MLP`."""
        c = self.config
        return MLP(c.width, c.depth, self.action_size, c.activation)

    def init_policy(self, key) -> Any:
        """Fresh parameters of the policy."""
        return self.policy_net.init(key, jnp.zeros(self.observation_size))

    def transport(self, policy, noise, observation, key) -> Array:
        """One step, from any noise to the same action: [2, ..., A]."""
        action = jnp.tanh(self.policy_net.apply(policy, observation))
        return jnp.stack([noise, action + 0 * noise])

    def policy_loss(self, policy, state, batch: Transition, key) -> Array:
        """Minus the smaller Q at the batch's states, a scalar mean."""
        action = jnp.tanh(self.policy_net.apply(policy, batch.observation))
        q = q_value(self, state.critic, batch.observation, action)
        return -jnp.mean(q)


AGENTS["NAME"] = TITLE
```

## Does it do what the equation says?

The loss, written out for one state after the other:

```{code-cell} ipython3
:tags: [check]

agent = TITLE(TITLEConfig(width=16, depth=2), 3, 2)
state = agent.init(jax.random.PRNGKey(0))
s = jax.random.normal(jax.random.PRNGKey(1), (6, 3))
batch = Transition(s, jnp.zeros((6, 2)), jnp.zeros(6), jnp.zeros(6), s)
values = []
for one in s:
    action = jnp.tanh(agent.policy_net.apply(state.policy, one))
    q, _ = agent.critic_net.apply(state.critic, one, action)
    values.append(min(float(q[0]), float(q[1])))
got = agent.policy_loss(state.policy, state, batch, None)
assert np.isclose(got, -np.mean(values), rtol=1e-5)
print(f"loss {got:.4f}, by hand {-np.mean(values):.4f}")
```
'''
AGENT_TEST = '''\
"""TITLE: its loss moves the action where the critic is greater."""

import jax
import jax.numpy as jnp
import numpy as np
from examples import transitions

from som import make_agent
from som.agent.actor_critic import q_value

TINY = {"width": 8, "depth": 1, "batch_size": 4}


def test_a_step_down_the_loss_is_a_step_up_the_critic():
    agent = make_agent("NAME", 3, 2, **TINY)
    state, batch = agent.init(jax.random.PRNGKey(0)), transitions(4)

    def loss(policy):
        return agent.policy_loss(policy, state, batch, None)

    slope = jax.grad(loss)(state.policy)
    moved = jax.tree.map(lambda p, g: p - 1e-2 * g, state.policy, slope)
    s, noise = batch.observation, jnp.zeros((4, 2))
    actions = [
        agent.transport(policy, noise, s, None)[-1] for policy in (state.policy, moved)
    ]
    q = [q_value(agent, state.critic, s, action) for action in actions]
    assert np.mean(q[1]) > np.mean(q[0])
    np.testing.assert_allclose(loss(state.policy), -np.mean(q[0]), rtol=1e-5)


def test_noise_changes_nothing():
    agent = make_agent("NAME", 3, 2, **TINY)
    state, s = agent.init(jax.random.PRNGKey(0)), transitions(4).observation
    noise = jax.random.normal(jax.random.PRNGKey(1), (4, 2))
    way = [agent.transport(state.policy, e, s, None) for e in (noise, 0 * noise)]
    np.testing.assert_array_equal(way[0][-1], way[1][-1])
'''
STUDY = '''\
# TITLE: a question in one line

One sentence that says what is compared, and why one would want to know.

**Builds on:** {doc}`landscapes`.

## Imports

```{code-cell} ipython3
:tags: [export, hide-input]

import numpy as np

from som.studies.bandit import Sampler
from som.studies.landscapes import Landscape, Study
from som.training.command_line import STUDIES
```

```{code-cell} ipython3
from pathlib import Path

from som.studies.landscapes import fit_arm, landscape
from som.theory.boltzmann import box_grid
from som.training.records import read_record
```

## The study

What is measured is one function. What is compared is a table: by name, what `fit` is
told.

```{code-cell} ipython3
:tags: [export]

def mean_reward(fits: list[Sampler], scape: Landscape) -> dict:
    """Mean reward of 1000 actions of each seed."""
    actions = [fit(fit.prior(1, 1000)) for fit in fits]
    return {"mean reward": [float(np.mean(scape.reward(a))) for a in actions]}


STUDIES["NAME"] = Study(
    {
        f"{num} guesses": {
            "algo": "som",
            "landscape": "eight-modes",
            "steps": 2000,
            "num_samples": num,
        }
        for num in (8, 32)
    },
    (mean_reward,),
)
```

## A miniature, live

```{code-cell} ipython3
:tags: [check]

arm = STUDIES["NAME"].arms["8 guesses"]
small = {"steps": 500, "width": 32, "batch_size": 64, "known": True}
result = fit_arm(arm | small, [0], (mean_reward,), lambda done: None)
uniform = float(landscape("eight-modes").reward(box_grid(100)).mean())
print(f"mean reward {result['mean reward'][0]:.2f}, uniform {uniform:.2f}")
assert result["mean reward"][0] > uniform
```

## What was recorded

`som study NAME` makes the record.

```{code-cell} ipython3
path = Path("../results/studies/NAME.json")
if path.exists():
    for name, arm in read_record(path)["arms"].items():
        print(f"{name:12}", np.round(arm["mean reward"], 2))
else:
    print("not yet made")
```
'''
STUDY_TEST = '''\
"""TITLE: what is measured, and that every arm can be fitted."""

import jax.numpy as jnp
import numpy as np

from som import make_agent
from som.studies.bandit import Sampler
from som.studies.landscapes import landscape
from som.studies.NAME import mean_reward
from som.training.command_line import STUDIES


class Still(Sampler):
    """Brings every noise to the origin."""

    def prior(self, key, num):
        return jnp.ones((num, 2))

    def __call__(self, noise):
        return 0 * noise


def test_mean_reward_is_that_of_the_actions():
    scape = landscape("eight-modes")
    got = mean_reward([Still(None, None)] * 2, scape)["mean reward"]
    np.testing.assert_allclose(got, [float(scape.reward(jnp.zeros(2)))] * 2, rtol=1e-6)


def test_every_arm_is_a_different_agent():
    told = ("algo", "landscape", "steps")
    agents = {
        make_agent("som", 1, 2, **{k: v for k, v in arm.items() if k not in told})
        for arm in STUDIES["NAME"].arms.values()
    }
    assert len(agents) == len(STUDIES["NAME"].arms)
'''
KINDS = {
    "agent": ("baselines", "compared", AGENT, AGENT_TEST),
    "study": ("studies", None, STUDY, STUDY_TEST),
}  # the part, the chapter that stays its last, the texts


def add_to_toc(text, part, name, last):
    """Return the table of contents with a chapter more at the end of a part."""
    lines = text.splitlines(keepends=True)
    mine = [i for i, line in enumerate(lines) if f"book/{part}/" in line]
    place = mine[-1] + 1
    if last:
        place = next(i for i in mine if lines[i].endswith(f"/{last}\n"))
    lines.insert(place, f"      - file: book/{part}/{name}\n")
    return "".join(lines)


def main(argv=None, root=ROOT):
    """Write the files; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("name", help="of the module: lower case, no spaces")
    args = parser.parse_args(argv)
    part, last, chapter, test = KINDS[args.kind]
    name, toc = args.name, root / "_toc.yml"
    if not (name.isidentifier() and name.islower()):
        print(f"{name!r} is no name of a module such as my_agent.", file=sys.stderr)
        return 1
    path = root / "book" / part / f"{name}.md"
    tests = root / "tests" / part / f"test_{name}.py"
    taken = [*root.glob(f"book/*/{name}.md"), *root.glob(f"tests/*/{tests.name}")]
    if taken:
        print(f"{taken[0].relative_to(root)} is there already.", file=sys.stderr)
        return 1
    title = "".join(word.capitalize() for word in name.split("_"))
    for file, text in ((path, HEADER + chapter), (tests, test)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace("NAME", name).replace("TITLE", title))
        print("wrote", file.relative_to(root))
    toc.write_text(add_to_toc(toc.read_text(), part, name, last))
    format_cells.main([str(path)])  # a long name breaks lines elsewhere
    failed = export.main([str(path)], root) or notebooks.main([str(path)], root)
    for words in (["check", "--select", "I", "--fix"], ["format"]):
        subprocess.run([format_cells.RUFF[0], *words, "-q", str(tests)], check=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
