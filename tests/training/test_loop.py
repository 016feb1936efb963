"""The training loop: its schedule, its random keys, one chunk."""

import threading
from dataclasses import asdict, replace

import gymnasium as gym
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from carts import AGENT, LOOP, advance, config
from examples import Cart, Climber

from som.agent.actor_critic import AGENTS, make_agent
from som.agent.critic import Transition
from som.training import environments, loop, replay, sweep


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_envs", 0), ("warmup", -1), ("updates_per_step", 0.0), ("episodes", 0),
        ("updates_per_step", float("nan")), ("checkpoint_seconds", -1.0),
    ],
)  # fmt: skip
def test_schedule_refuses(field, value):
    with pytest.raises(ValueError, match=f"^{field} is .* of at least .* is wanted$"):
        loop.LoopConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("capacity", 1.5), ("warmup", "many")])
def test_schedule_refuses_other_types(field, value):
    schedule = object.__new__(loop.LoopConfig)  # the tests' type checker is stricter
    for name, default in asdict(loop.LoopConfig()).items():
        object.__setattr__(schedule, name, default)
    object.__setattr__(schedule, field, value)
    with pytest.raises(ValueError, match=f"^{field} is {value!r}; a whole number of"):
        schedule.__post_init__()


def test_schedule_refuses_a_chunk_that_overflows_the_buffer():
    with pytest.raises(ValueError, match="at least the 100 rows of one chunk"):
        loop.LoopConfig(capacity=99, chunk_steps=100)


def test_schedule_of_the_paper():
    paper = loop.schedule(AGENTS["som"], "paper")
    assert (paper.vector_steps, paper.updates) == (50, 50)
    assert (paper.warmup, paper.capacity) == (100_000, 1_000_000)
    # The profile of the plane has no environment and so no schedule.
    names = loop.profiles(AGENTS["som"])
    assert names == ["paper", "laptop", "sample-efficient", "paper-literal"]
    efficient = loop.schedule(AGENTS["sac"], "sample-efficient")
    assert efficient == replace(loop.LAPTOP, updates_per_step=1.0, num_envs=1)
    for kind in AGENTS.values():
        assert {"laptop", "paper"} <= set(loop.profiles(kind))


def test_an_agent_may_change_its_schedule():
    sdac = AGENTS["sdac"]
    assert loop.schedule(sdac, "paper").warmup == 30_000
    assert loop.schedule(sdac, "laptop") == loop.LAPTOP
    config = loop.make_config("sdac", "Hopper-v4", 1e6, (0,), "paper", {})
    assert config["loop"]["warmup"] == 30_000
    given = {"warmup": 7}
    config = loop.make_config("sdac", "Hopper-v4", 1e6, (0,), "paper", given)
    assert config["loop"]["warmup"] == 7


@pytest.mark.parametrize(
    ("steps", "warmup", "evaluations", "episodes"),
    [
        (500, 250, 1, 3), (4_000, 2_000, 4, 6), (10_000, 5_000, 10, 6),
        (20_000, 5_000, 12, 10), (40_000, 5_000, 12, 20), (50_000, 5_000, 12, 20),
    ],
)  # fmt: skip
def test_a_short_run_keeps_its_proportions(steps, warmup, evaluations, episodes):
    made = loop.make_config("som", "Hopper-v4", steps, [0], "laptop", {})["loop"]
    assert made["warmup"] == warmup
    assert (made["evaluations"], made["episodes"]) == (evaluations, episodes)
    assert evaluations * episodes * 1000 <= 6 * steps
    given = {"warmup": 100, "evaluations": 40, "episodes": 20}
    made = loop.make_config("som", "Hopper-v4", steps, [0], "laptop", given)["loop"]
    assert {name: made[name] for name in given} == given
    given = {"evaluations": 40}  # then fewer episodes fit
    made = loop.make_config("som", "Hopper-v4", steps, [0], "laptop", given)["loop"]
    assert made["episodes"] == max(1, min(20, 6 * steps // 40_000))


@pytest.mark.parametrize("profile", ["laptop", "sample-efficient", "paper"])
@pytest.mark.parametrize("env", environments.TASKS)
def test_the_protocol_of_sweeps_is_played_whole(profile, env):
    """20 episodes, 12 times in 50 000 steps and 40 times in the paper's runs."""
    steps = sweep.usual_steps("som", env, profile)
    made = loop.make_config("som", env, steps, [0], profile, {})["loop"]
    assert made["episodes"] == 20
    assert made["evaluations"] == (40 if profile == "paper" else 12)


def test_long_episodes_are_played_less_often():
    def long(limit):
        return gym.wrappers.TimeLimit(Cart(), limit)

    for limit, episodes in ((1_000, 20), (2_000, 12), (10_000, 2), (10**6, 1)):
        task = environments.Task(long, {"limit": limit})
        made = loop.make_config("som", task, 50_000, [0], "laptop", {})["loop"]
        assert (made["evaluations"], made["episodes"]) == (12, episodes)


@pytest.mark.parametrize(("warmup", "least"), [(200, 201), (201, 301), (0, 101)])
def test_a_run_that_learns_nothing_is_refused(warmup, least):
    given = LOOP | {"warmup": warmup}
    words = "som", "Cart-v0", least - 1, [0], "laptop", given
    with pytest.raises(ValueError, match=f"steps is .* at least {least} are wanted"):
        loop.make_config(*words)
    made = loop.make_config("som", "Cart-v0", least, [0], "laptop", AGENT | given)
    trainer = loop.Trainer(made)
    advance(trainer, trainer.empty_buffer(), trainer.chunks - 1)
    assert trainer.state.step == 0  # the last chunk, and only it, learns
    assert trainer.steps >= warmup and trainer.chunk == trainer.chunks - 1


def test_a_number_of_seeds_is_the_first_of_them():
    for given in (3, np.int64(3), range(3), np.arange(3), (0, 1, 2)):
        assert loop.seed_numbers(given) == [0, 1, 2]
    assert loop.seed_numbers([5]) == [5]


def test_no_setting_belongs_to_both_agent_and_loop():
    own = set(loop.LoopConfig.__dataclass_fields__)
    for kind in AGENTS.values():
        assert not own & set(type(kind.profiles["paper"]).__dataclass_fields__)


class Improver(Climber):
    """Raises the guide of every row it draws."""

    rewrites = True

    def revise(self, state, batch):
        return batch._replace(guide=batch.guide + 1)


class Watcher(Climber):
    """Tells whether each step of its batch begins where the last one ended."""

    on_policy = True

    def update(self, state, batch, key):
        same = batch.next_observation[:-1] == batch.observation[1:]
        state = state._replace(step=state.step + 1)
        return state, {"chained": jnp.mean(same), "rows": 1.0 * len(batch.reward)}


@pytest.fixture
def made(monkeypatch):
    """A trainer of an agent class that is entered for one test."""

    def make(kind, seeds=(0,), **changes):
        monkeypatch.setitem(AGENTS, "made", kind)
        settings = config(seeds, **changes) | {"algo": "made", "agent": {}}
        return loop.Trainer(settings)

    return make


def test_better_actions_are_written_back(made):
    trainer = made(Improver, warmup=100)
    buffer = advance(trainer, trainer.empty_buffer(), 2)
    rows, width = np.asarray(buffer.rows[0]), trainer.agent.action_size
    raised = np.rint(rows[:100, -width:] - rows[:100, 2 : 2 + width])
    keys = loop.fold(trainer.key(loop.LEARN, 1), 0)  # the first of its updates
    first = replay.draw(
        jax.tree.map(lambda x: x[0], buffer),
        jax.random.split(keys[0])[0],
        trainer.agent.config.batch_size,
    )
    assert raised.max() > 1 and raised[np.asarray(first)].min() >= 1
    # A row that a batch holds twice is raised once.
    assert raised.max() <= trainer.loop.updates
    fresh = trainer.rows[0]
    np.testing.assert_array_equal(fresh[:, -width:], fresh[:, 2 : 2 + width])


def test_an_on_policy_agent_sees_its_chunk_in_order(made):
    trainer = made(Watcher, seeds=(0, 1), warmup=0)
    buffer = trainer.empty_buffer()
    for number in (1, 2):
        buffer, metrics = loop.run_chunk(trainer, buffer)
        # Episodes and chunks have 20 steps: only the last one ends an episode.
        np.testing.assert_array_equal(metrics["chained"], [1, 1])
        np.testing.assert_array_equal(metrics["rows"], [20, 20])
        assert trainer.state.step == trainer.chunk == number
    assert int(buffer.added[0]) == 0


# Seeds and keys


def test_streams_of_keys_are_distinct():
    seeds = jnp.stack([jax.random.PRNGKey(s) for s in range(3)])
    keys = [loop.fold(seeds, loop.INIT)]
    for stream in (loop.ACT, loop.LEARN):
        parents = [loop.fold(loop.fold(seeds, stream), c) for c in range(5)]
        keys += parents + [loop.fold(p, i) for p in parents for i in range(5)]
    keys = np.concatenate(keys)
    assert len(np.unique(keys, axis=0)) == len(keys)


def test_common_step_keeps_the_branches():
    agent = make_agent("som", 2, 1, **AGENT)
    state = loop.init_seeds(agent, (0, 1))
    sizes = (2,), (1,), (), (), (2,)
    batch = Transition(*(jnp.zeros((2, 32, *size)) for size in sizes))
    axes = loop.seed_axes(state)
    update = jax.vmap(agent.update, (axes, 0, 0), (axes, 0))
    keys = jax.random.split(jax.random.PRNGKey(0), 2)
    assert str(jax.make_jaxpr(update)(state, batch, keys)).count(" cond[") >= 2


def test_two_seeds_are_each_seed_alone():
    both, buffer = loop.Trainer(config((0, 1))), None
    alone = [loop.Trainer(config((seed,))) for seed in (0, 1)]
    buffer, buffers = both.empty_buffer(), [one.empty_buffer() for one in alone]
    for chunk in range(3):
        buffer = advance(both, buffer, 1)
        buffers = [advance(*pair, 1) for pair in zip(alone, buffers, strict=True)]
        for i in range(2):
            if chunk < 2:  # warm-up: nothing computed, so nothing rounded
                np.testing.assert_array_equal(both.rows[i], alone[i].rows[0])
    assert int(both.state.step) == both.loop.updates
    for i in range(2):
        np.testing.assert_array_equal(buffer.rows[i], buffers[i].rows[0])
        pair = both.policy(i).state, alone[i].policy().state
        for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


# Collecting and learning


def test_collected_rows_are_one_history():
    trainer = loop.Trainer(config((3,)))
    first = loop.collect(trainer, trainer.state)
    assert np.isnan(trainer.ends[0][:-1]).all() and (trainer.ends[1][-1] == 20).all()
    sums = first.reshape(20, 5, -1)[..., 3].sum(0)  # s, a, r
    np.testing.assert_allclose(trainer.ends[0][-1, 0], sums, rtol=1e-5)
    steps = trainer.loop.vector_steps
    rows = jnp.asarray(first.reshape(steps, 5, -1))
    s, a, r, terminated, after, guide = replay.unpack(rows, 1)
    assert guide == ()
    assert not terminated.any() and (np.abs(a) <= 1).all() and np.std(a) > 0.3
    np.testing.assert_allclose(r, -np.square(s[..., 0]), rtol=1e-5)
    assert (s[1:] == after[:-1]).all(-1).sum() == 5 * (steps - 1)  # no episode ended
    x, v = s[..., 0], 0.8 * s[..., 1] + 0.2 * 2 * a[..., 0]
    np.testing.assert_allclose(after[..., 0], np.clip(x + 0.4 * v, -3, 3), atol=1e-5)


def test_learn_takes_the_buffer_and_fills_it():
    trainer = loop.Trainer(config())
    buffer = advance(trainer, trainer.empty_buffer(), 2)
    given, rows = buffer, trainer.rows
    buffer = advance(trainer, buffer, 1)
    assert given.rows.is_deleted()
    assert int(buffer.added[0]) == 200
    np.testing.assert_array_equal(buffer.rows[:, 100:200], rows)
    assert int(trainer.state.step) == trainer.loop.updates == 40


def test_physics_does_not_wait_for_learning(monkeypatch):
    """Learning that lasts until the simulator has stepped must not deadlock."""
    trainer, stepped = loop.Trainer(config()), threading.Event()
    buffer = advance(trainer, trainer.empty_buffer(), 2)
    learn, step = loop.learn, trainer.envs[0].step

    def slow_learn(*args):
        assert stepped.wait(120)
        return learn(*args)

    def watched_step(action):
        stepped.set()
        return step(action)

    monkeypatch.setattr(loop, "learn", slow_learn)
    monkeypatch.setattr(trainer.envs[0], "step", watched_step)
    advance(trainer, buffer, 1)
    assert int(trainer.state.step) == 40
