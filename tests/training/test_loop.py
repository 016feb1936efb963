"""The training loop: it learns, it resumes to the bit, it refuses clearly.

Run as a program it trains until it kills itself: see test_resume_after_kill.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from examples import Climber

from som.agent.actor_critic import AGENTS, make_agent
from som.agent.critic import Transition
from som.training import environments, loop, records, replay
from som.training.records import CheckpointError

# Compiling an update takes most of the time here, so all tests share these.
AGENT = {
    "width": 32, "depth": 2, "batch_size": 32, "num_samples": 4,
    "num_particles": 4, "actor_lr": 2e-3, "critic_lr": 2e-3,
}  # fmt: skip
LOOP = {
    "num_envs": 5, "warmup": 200, "capacity": 40_000, "updates_per_step": 0.4,
    "chunk_steps": 100, "evaluations": 2, "episodes": 3, "checkpoint_seconds": 1e9,
}  # fmt: skip
STEPS = 1_000


def config(seeds=(0,), **changes):
    """The configuration of a trainer."""
    return {
        "algo": "som", "env": "Cart-v0", "steps": STEPS, "seeds": list(seeds),
        "profile": "laptop", "agent": AGENT, "loop": {**LOOP, **changes},
    }  # fmt: skip


def train(out=None, progress=None, steps=STEPS, **changes):
    """A short run of one seed."""
    options = {"env": "Cart-v0", **AGENT, **LOOP, **changes}
    return loop.train(steps=steps, out=out, progress=progress, **options)


def advance(trainer, buffer, chunks):
    for _ in range(chunks):
        buffer, _ = loop.run_chunk(trainer, buffer)
    return buffer


def everything(trainer, buffer):
    """Every array that decides how a run goes on."""
    envs = [env.state() for env in trainer.envs]
    return jax.tree.leaves(
        (trainer.state, buffer, trainer.rows, trainer.observation, envs)
    )


def assert_same(one, two):
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_same_arrays(one, two):
    """Two checkpoint files hold the same arrays, to the bit."""
    with np.load(one) as a, np.load(two) as b:
        assert set(a) == set(b)
        for name in set(a) - {"metadata"}:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A finished run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "straight"
    return train(out)


# The schedule


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


def test_rollout_is_what_stepping_by_hand_gives():
    agent = make_agent("som", 11, 1, width=8, depth=1, num_particles=3)
    one, task = np.ones(1, np.float32), "InvertedDoublePendulum-v4"
    policy = loop.Policy(agent, loop.init_seeds(agent, (0,)), task, -one, one)
    seen = loop.rollout_states(policy, 40, seed=3)
    assert seen.shape == (40, 11)
    envs = environments.make(task, 1, 3)
    policy.calls, observation, ended = 0, envs.reset(), 0
    for expected in seen:
        assert np.array_equal(observation[0], expected)
        step = envs.step(policy.act(observation))
        observation, ended = step.observation, ended + step.terminated[0]
    assert ended > 1  # untrained, it falls soon, and stands again
    assert np.array_equal(seen, loop.rollout_states(policy, 40, seed=3))
    assert not np.array_equal(seen[:1], loop.rollout_states(policy, 1, seed=4))
    with pytest.raises(ValueError, match="steps is 0; at least 1"):
        loop.rollout_states(policy, 0)


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
    assert names == ["paper", "laptop", "paper-literal"]
    for kind in AGENTS.values():
        assert {"laptop", "paper"} <= set(loop.profiles(kind))


def test_an_agent_may_change_its_schedule():
    sdac = AGENTS["sdac"]
    assert loop.schedule(sdac, "paper").warmup == 30_000
    assert loop.schedule(sdac, "laptop") == loop.LAPTOP
    config = loop.make_config("sdac", "Hopper-v4", 10, (0,), "paper", {})
    assert config["loop"]["warmup"] == 30_000
    given = {"warmup": 7}
    config = loop.make_config("sdac", "Hopper-v4", 10, (0,), "paper", given)
    assert config["loop"]["warmup"] == 7


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


def test_it_learns():
    run = train(steps=6_000, evaluations=1, episodes=20)
    final = np.mean(run.record["curve"][-1]["returns"])
    assert final > -5, "idle returns about -17, random actions -34"


# Saving and resuming


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_resume_from_any_chunk_is_exact(tmp_path, at):
    """In warm-up, just before and after the first update, and later."""
    one = loop.Trainer(config())
    buffer = advance(one, one.empty_buffer(), at)
    loop.save_checkpoint(one, buffer, tmp_path / "c.npz")
    two = loop.Trainer(config())
    other = loop.load_checkpoint(two, tmp_path / "c.npz")
    assert_same(everything(one, buffer), everything(two, other))
    buffer, other = advance(one, buffer, 2), advance(two, other, 2)
    assert_same(everything(one, buffer), everything(two, other))


def test_resume_with_a_ring_that_has_wrapped(tmp_path):
    small = config(capacity=300)
    one = loop.Trainer(small)
    buffer = one.empty_buffer()
    for _ in range(5):
        buffer = loop.store(buffer, loop.collect(one, one.state))
        one.chunk += 1
    loop.save_checkpoint(one, buffer, tmp_path / "c.npz")
    two = loop.Trainer(small)
    other = loop.load_checkpoint(two, tmp_path / "c.npz")
    assert int(other.added[0]) == 500
    assert_same(everything(one, buffer), everything(two, other))


def test_resume_after_kill(tmp_path, straight):
    """Training that is killed outright ends where the undisturbed run ended."""
    out = tmp_path / "killed"
    places = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, __file__, str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-500:]
    assert records.read_metadata(out / "checkpoint.npz")["chunk"] == 6
    run = loop.resume(out)
    assert_same_arrays(out / "checkpoint.npz", straight.out / "checkpoint.npz")
    assert_same_arrays(out / "policy.npz", straight.out / "policy.npz")
    returns = [point["returns"] for point in run.record["curve"]]
    assert returns == [point["returns"] for point in straight.record["curve"]]


def test_resume_before_the_first_checkpoint_starts_over(tmp_path, straight):
    config_of = records.read_record(straight.out / "config.json")
    records.write_record(tmp_path / "config.json", config_of)
    loop.resume(tmp_path)
    assert_same_arrays(tmp_path / "checkpoint.npz", straight.out / "checkpoint.npz")


@pytest.mark.parametrize("chunk", [2, 5])
def test_ctrl_c_saves_and_resume_continues(tmp_path, straight, chunk):
    """Once in warm-up, once while learning."""

    def interrupt(step, metrics):
        if step == 100 * chunk:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # ignored in a background job
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert records.read_metadata(tmp_path / "checkpoint.npz")["chunk"] == chunk
    loop.resume(tmp_path)
    assert_same_arrays(tmp_path / "checkpoint.npz", straight.out / "checkpoint.npz")


def test_ten_slices_are_one_run(tmp_path, straight):
    """Each chunk in a slice of its own, from one whole checkpoint to the next."""
    run = train(tmp_path, time_limit=1e-9)
    for chunk in range(2, 11):
        assert not loop.is_finished(tmp_path)
        (tmp_path / "packed-0.npz").unlink()
        run = loop.resume(tmp_path, time_limit=1e-9)
        assert records.read_metadata(tmp_path / "checkpoint.npz")["chunk"] == chunk
    assert loop.is_finished(tmp_path)
    assert_same_arrays(tmp_path / "checkpoint.npz", straight.out / "checkpoint.npz")
    assert_same_arrays(tmp_path / "policy.npz", straight.out / "policy.npz")
    slices = run.record["slices"]
    assert [part["first_step"] for part in slices] == list(range(0, 1000, 100))
    assert all(part["refilled"] == 0 for part in slices)
    seconds = sum(part["seconds"] for part in slices)
    assert seconds == pytest.approx(run.record["wall_seconds"])


def test_packed_checkpoint_goes_on_with_a_new_replay(tmp_path):
    """Only the optimisers' moments are rounded; the record tells of the refill."""
    train(tmp_path, steps=600, seeds=(3, 5), time_limit=1e-9)
    for _ in range(3):
        loop.resume(tmp_path, time_limit=1e-9)
    whole = loop.Trainer(config((3, 5)))
    loop.load_checkpoint(whole, tmp_path / "checkpoint.npz")
    packed = loop.Trainer(config((3, 5)))
    buffer = loop.load_packed(packed, tmp_path)
    assert packed.chunk == 4 and packed.refilled == 200
    assert int(buffer.added[0]) == 100  # the other hundred rows are pending
    assert not np.array_equal(packed.rows, whole.rows)
    for name in whole.state._fields:
        pair = getattr(whole.state, name), getattr(packed.state, name)
        near = 2**-8 if name.endswith("_opt") else 0
        for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
            np.testing.assert_allclose(a, b, rtol=near)
            assert a.dtype == b.dtype
    (tmp_path / "checkpoint.npz").unlink()
    run = loop.resume(tmp_path)
    refilled = [part["refilled"] for part in run.record["slices"]]
    assert refilled == [0, 0, 0, 0, 200]
    assert run.record["curve"][-1]["step"] == 600


def test_the_newer_checkpoint_is_taken(tmp_path):
    run = train(tmp_path, time_limit=1e-9)
    old = (tmp_path / "checkpoint.npz").read_bytes()
    run = loop.resume(tmp_path, time_limit=1e-9)
    (tmp_path / "checkpoint.npz").write_bytes(old)
    run = loop.resume(tmp_path, time_limit=1e-9)
    assert [p["refilled"] for p in run.record["slices"]] == [0, 0, 200]
    assert [p["first_step"] for p in run.record["slices"]] == [0, 100, 200]


def test_a_file_of_something_else_is_not_overwritten(tmp_path, straight):
    config_of = records.read_record(straight.out / "config.json")
    records.write_record(tmp_path / "config.json", config_of)
    shutil.copy(straight.out / "policy.npz", tmp_path / "checkpoint.npz")
    with pytest.raises(CheckpointError, match="something else"):
        loop.resume(tmp_path)


def test_packed_checkpoints_must_belong_together(tmp_path):
    train(tmp_path, seeds=(0, 1), time_limit=1e-9)
    first = (tmp_path / "packed-1.npz").read_bytes()
    loop.resume(tmp_path, time_limit=1e-9)
    (tmp_path / "packed-1.npz").write_bytes(first)
    (tmp_path / "checkpoint.npz").unlink()
    with pytest.raises(CheckpointError, match=r"different chunks: \[1, 2\]"):
        loop.resume(tmp_path)


def test_packed_checkpoint_of_the_paper_is_small(tmp_path):
    """Ten megabytes at most for one seed of the largest task."""
    run = config() | {"env": "Humanoid-v4", "profile": "paper", "agent": {}}
    loop.save_packed(loop.Trainer(run), tmp_path)
    assert (tmp_path / "packed-0.npz").stat().st_size < 10e6


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_no_time_is_refused(limit):
    with pytest.raises(ValueError, match=r"time_limit is .*seconds"):
        train(time_limit=limit)


def test_second_ctrl_c_stops_at_once():
    with loop.interruptible() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_interruptible_in_another_thread():
    def enter():
        with loop.interruptible() as stop:
            seen.append(stop.is_set())

    seen = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [False]


def test_full_disk_loses_nothing(tmp_path, straight, monkeypatch):
    savez, calls = np.savez, []

    def full(file, **arrays):
        calls.append(1)
        if len(calls) > 6:
            raise OSError(28, "No space left on device")
        savez(file, **arrays)

    monkeypatch.setattr(records.np, "savez", full)
    with pytest.raises(CheckpointError, match=r"No space left.* is intact"):
        train(tmp_path, checkpoint_seconds=1e-9)
    monkeypatch.undo()
    assert records.read_metadata(tmp_path / "checkpoint.npz")["chunk"] == 3
    loop.resume(tmp_path)
    assert_same_arrays(tmp_path / "checkpoint.npz", straight.out / "checkpoint.npz")


def test_finished_run_comes_back_as_it_is(straight):
    files = sorted(straight.out.iterdir())
    before = [f.stat().st_mtime_ns for f in files]
    again = loop.resume(straight.out)
    assert again.record == straight.record
    assert [f.stat().st_mtime_ns for f in files] == before
    here = np.zeros((3, 2))
    np.testing.assert_array_equal(again.policy(here), straight.policy(here))


def test_resume_between_the_last_checkpoint_and_the_record(tmp_path, straight):
    for name in ("config.json", "checkpoint.npz"):
        shutil.copy(straight.out / name, tmp_path)
    run = loop.resume(tmp_path)
    assert run.record["curve"] == straight.record["curve"]
    assert records.read_record(tmp_path / "record.json") == run.record


def test_folder_of_a_run(straight):
    names = {"config.json", "checkpoint.npz", "policy.npz", "record.json"}
    assert {f.name for f in straight.out.iterdir()} == names | {"learning_curve.png"}
    assert records.read_record(straight.out / "record.json") == straight.record


def test_record(straight):
    record = straight.record
    assert [p["step"] for p in record["curve"]] == [500, 1000]
    assert [p["updates"] for p in record["curve"]] == [120, 320]
    assert np.shape(record["curve"][0]["returns"]) == (1, 3)
    assert record["config"]["agent"]["width"] == 32
    assert record["config"]["loop"]["warmup"] == 200
    assert record["seeds"] == [0] and record["wall_seconds"] > 0


def test_checkpoint_of_another_version(tmp_path, monkeypatch):
    trainer = loop.Trainer(config())
    whole = loop._metadata
    old = {k: v for k, v in whole(trainer).items() if k != "slices"}
    monkeypatch.setattr(loop, "_metadata", lambda trainer: old)
    loop.save_checkpoint(trainer, trainer.empty_buffer(), tmp_path / "c.npz")
    monkeypatch.setattr(loop, "_metadata", whole)
    with pytest.raises(CheckpointError, match="lacks slices: another version"):
        loop.load_checkpoint(trainer, tmp_path / "c.npz")


def test_checkpoint_of_another_run(tmp_path, straight):
    for other, sentence in [
        (config((0, 1)), "something else: it lacks .*envs"),
        (config(num_envs=4), "another size: .*envs"),
    ]:
        with pytest.raises(CheckpointError, match=sentence):
            loop.load_checkpoint(loop.Trainer(other), straight.out / "checkpoint.npz")
    with pytest.raises(CheckpointError, match="something else"):
        loop.load_checkpoint(loop.Trainer(config()), straight.out / "policy.npz")


def test_resume_refuses_what_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="no record at"):
        loop.resume(tmp_path)
    records.write_record(tmp_path / "config.json", {"algo": "som"})
    with pytest.raises(CheckpointError, match="does not describe a run"):
        loop.resume(tmp_path)


def test_tuples_of_a_config_survive_json():
    stored = config() | {"agent": {**AGENT, "noise_range": [0.1, 3.0]}}
    agent = loop.restore_agent(stored, 2, 1)
    assert agent.config.noise_range == (0.1, 3.0)
    hash(agent)  # jit needs it


def test_a_run_keeps_its_settings_when_the_profile_changes(tmp_path, monkeypatch):
    train(tmp_path / "run", steps=100)
    before = loop.load(tmp_path / "run").agent.config
    profiles = AGENTS["som"].profiles
    later = replace(profiles["laptop"], noise_range=(0.1, 5.0), tau=0.5)
    monkeypatch.setitem(profiles, "laptop", later)
    assert loop.load(tmp_path / "run").agent.config == before
    fresh = loop.make_config("som", "Cart-v0", 1, [0], "laptop", {})
    assert loop.Trainer(fresh).agent.config == later


def test_a_setting_of_another_version_is_refused():
    stored = config() | {"agent": {"noise_rnge": [0.1, 3.0]}}
    with pytest.raises(CheckpointError, match=r"another version.*noise_rnge"):
        loop.restore_agent(stored, 2, 1)


# Divergence


@pytest.mark.parametrize("where", ["metric", "parameter"])
def test_divergence_stops_and_keeps_the_last_good_state(tmp_path, monkeypatch, where):
    learn, calls = loop.learn, []

    def poison(x):
        return x * jnp.nan

    def poisoned(*args):
        state, buffer, metrics = learn(*args)
        calls.append(1)
        if len(calls) == 4:
            if where == "metric":
                metrics["critic/loss"] = jnp.full(1, jnp.nan)
            else:
                state = state._replace(policy=jax.tree.map(poison, state.policy))
        return state, buffer, metrics

    monkeypatch.setattr(loop, "learn", poisoned)
    name = "critic/loss" if where == "metric" else "a parameter"
    sentence = (
        f"^training diverged: {name} of seed 0 is not finite at step 600; "
        f"the last good checkpoint is {tmp_path / 'checkpoint.npz'}, of step 500$"
    )
    with pytest.raises(FloatingPointError, match=sentence):
        train(tmp_path, checkpoint_seconds=1e-9)
    trainer = loop.Trainer(config())
    loop.load_checkpoint(trainer, tmp_path / "checkpoint.npz")
    assert trainer.steps == 500
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(trainer.state))


def test_divergence_without_a_checkpoint(monkeypatch):
    def diverged(agent, state, buffer, rows, keys, updates):
        return state, buffer, {"critic/loss": jnp.array([jnp.inf])}

    monkeypatch.setattr(loop, "learn", diverged)
    with pytest.raises(FloatingPointError, match="step 300; no checkpoint had been"):
        train()


# Arguments


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"warmpu": 1}, "unknown setting 'warmpu'; did you mean 'warmup'?"),
        ({"batchsize": 1}, "unknown setting 'batchsize'; did you mean 'batch_size'?"),
        ({"algo": "sam"}, "unknown algorithm 'sam'; did you mean 'som'?"),
        ({"profile": "labtop"}, "unknown profile 'labtop'; did you mean 'laptop'?"),
        ({"steps": 0}, "steps is 0; at least 1 is wanted"),
        ({"steps": -5}, "steps is -5; at least 1 is wanted"),
        ({"seeds": ()}, r"seeds is \[\]; a list of different whole numbers"),
        ({"seeds": (1, 1)}, r"seeds is \[1, 1\]; a list of different"),
        ({"seeds": (-1,)}, r"seeds is \[-1\]; a list of different"),
        ({"seeds": (0.5,)}, r"seeds is \(0.5,\); a list of different"),
        ({"seeds": 3}, "seeds is 3; a list of different"),
        ({"capacity": 0}, "capacity is 0; a whole number of at least 1 is wanted"),
        ({"env": "Kart-v0"}, "did you mean 'Cart-v0'?"),
        ({"env": "CartPole-v1"}, "a Box of one dimension is wanted"),
    ],
)  # fmt: skip
def test_train_refuses(tmp_path, change, sentence):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=sentence):
        loop.train(**{"env": "Cart-v0", "steps": 100, "out": out, **change})
    assert not out.exists()


def test_train_refuses_a_folder_that_holds_a_run(straight):
    with pytest.raises(ValueError, match="already holds a run; resume it instead"):
        train(straight.out)


def test_train_refuses_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        train(tmp_path / "file" / "run", progress=pytest.fail)


# The policy


def test_policy_takes_one_and_many(straight):
    one = straight.policy(np.zeros(2))
    many = straight.policy([[0.5, 0.0], [-0.5, 0.0]])
    assert (one.shape, many.shape) == ((1,), (2, 1))
    assert isinstance(many, np.ndarray) and (np.abs(many) <= 2).all()


def test_policy_answers_in_the_units_of_the_task(straight):
    policy = loop.load(straight.out)
    here = np.array([[2.0, 0.0], [-2.0, 0.0]])
    inside = policy.act(here)
    policy.calls = 0
    np.testing.assert_allclose(policy(here), 2 * inside)
    assert (policy.algo, policy.env_id) == ("som", "Cart-v0")


@pytest.mark.parametrize("shape", [(), (3,), (4, 3), (2, 2, 2)])
def test_policy_refuses_other_shapes(straight, shape):
    with pytest.raises(ValueError, match=r"has shape .*; \[2\] or \[B, 2\] is wanted"):
        straight.policy(np.zeros(shape))


def test_policy_refuses_what_is_not_finite(straight):
    with pytest.raises(ValueError, match="observation holds NaN or infinity"):
        straight.policy([np.nan, 0.0])


def test_load_refuses(straight, tmp_path):
    with pytest.raises(ValueError, match=r"index is 1; the policy has 1 seed\(s\)"):
        loop.load(straight.out, 1)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        loop.load(tmp_path)
    with pytest.raises(CheckpointError, match="is not a policy"):
        loop.load(straight.out / "checkpoint.npz")
    (tmp_path / "policy.npz").write_bytes(b"PK not ours")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        loop.load(tmp_path)


def test_evaluation_repeats(straight):
    first = loop.evaluate(straight.policy, "Cart-v0", 4, seed=5)
    assert first.shape == (4,) and np.isfinite(first).all()
    second = loop.evaluate(loop.load(straight.out), "Cart-v0", 4, seed=5)
    np.testing.assert_array_equal(first, second)
    other = loop.evaluate(straight.policy, "Cart-v0", 4, seed=6)
    assert (first != other).any()
    with pytest.raises(ValueError, match="episodes is 0"):
        loop.evaluate(straight.policy, "Cart-v0", 0)


def test_progress_sees_every_chunk():
    seen = []
    train(progress=lambda step, metrics: seen.append((step, metrics)), steps=450)
    assert [step for step, _ in seen] == [100, 200, 300, 400, 450]
    assert "critic/loss" not in seen[1][1] and "critic/loss" in seen[2][1]
    assert "evaluation/return" in seen[-1][1]


def _die(step, metrics):
    if step == 700:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    train(Path(sys.argv[1]), _die, checkpoint_seconds=1e-9)
