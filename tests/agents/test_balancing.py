"""Every agent of som.AGENTS learns a task of MuJoCo, by the call that users make."""

import numpy as np
import pytest
from examples import NAMES, own

from som import AGENTS, train

SMALL = {"width": 64, "batch_size": 64, "num_particles": 4, "num_samples": 8}


@pytest.mark.parametrize("name", [n for n in NAMES if n != "lql"])
def test_balances_the_double_pendulum_for_longer(name):
    early = {} if AGENTS[name].on_policy else {"warmup": 1_000} | own(name, SMALL)
    options = {"evaluations": 1, "episodes": 10, **early}
    run = train(name, "InvertedDoublePendulum-v4", 4_000, **options)
    uniform = 57.5  # mean return of uniform actions over 1579 episodes
    assert np.mean(run.record["curve"][-1]["returns"]) > 2 * uniform


def test_lql_learns_not_to_swing_the_reacher():
    # Its temperature is for flat landscapes, see the chapter: it cannot
    # balance, and here it comes as far as an arm at rest (-11.8).
    options = {"evaluations": 1, "episodes": 10, "warmup": 1_000} | own("lql", SMALL)
    run = train("lql", "Reacher-v4", 4_000, **options)
    uniform = -42.9  # mean return of uniform actions over 1000 episodes
    assert np.mean(run.record["curve"][-1]["returns"]) > uniform / 2
