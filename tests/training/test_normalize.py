"""Observations in deviations: counted right, kept everywhere, or off."""

import subprocess
import sys
from dataclasses import asdict

import gymnasium as gym
import numpy as np
import onnxruntime
import pytest
from carts import advance, assert_same_arrays, config, everything, train
from examples import Cart

import som
from som.agent.actor_critic import AGENTS
from som.training import checkpoints, loop, records, runs, sweep
from som.training.policy import evaluate, load, normalize, rollout_states

UNITS = np.array([1e2, 1e-2])


class Odd(Cart):
    """The cart, which observes kilometres beside micrometres, far from zero."""

    def odd(self, returned):
        return (np.float32(UNITS * (returned[0] + 3)), *returned[1:])

    def reset(self, **words):
        return self.odd(super().reset(**words))

    def step(self, action):
        return self.odd(super().step(action))


gym.register("OddUnits-v0", entry_point=Odd, max_episode_steps=20)
NORMAL = {"env": "OddUnits-v0", "normalize_observations": True}


def trainer(seeds=(0,), **changes):
    made = config(seeds, normalize_observations=True, **changes)
    return loop.Trainer(made | {"env": "OddUnits-v0"})


@pytest.fixture(scope="module")
def normal(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "normal", seeds=2, **NORMAL)


def test_what_was_seen_is_what_was_collected():
    one, buffer, rows = trainer((0, 3)), None, []
    buffer = one.empty_buffer()
    for _ in range(4):
        buffer = advance(one, buffer, 1)
        rows.append(one.rows[..., :2])
    found = np.concatenate(rows, 1).astype(np.float64)
    assert (one.seen.number == 400).all()
    np.testing.assert_allclose(one.seen.mean, found.mean(1), rtol=1e-12)
    np.testing.assert_allclose(one.seen.spread / 400, found.var(1), rtol=1e-9)
    np.testing.assert_allclose(one.scale.std, found.std(1), rtol=1e-6)
    assert 1e3 < (one.scale.std[:, 0] / one.scale.std[:, 1]).min() < 1e5


def test_what_hardly_varies_is_only_shifted():
    seen = loop.see(loop.nothing_seen(1, 2), np.full((1, 9, 2), [7e3, 0.0]))
    scale = loop.scale_of(seen)
    np.testing.assert_array_equal(scale.std, [[1, 1]])
    np.testing.assert_array_equal(normalize(np.array([7e3, 2.0]), scale), [[0, 2]])


def test_the_scale_is_counted_the_same_after_a_checkpoint(tmp_path):
    straight = trainer((0, 3))
    buffer = advance(straight, straight.empty_buffer(), 4)
    checkpoints.save_checkpoint(straight, buffer, tmp_path / "check.npz")
    checkpoints.save_packed(straight, tmp_path)
    seen = straight.seen
    buffer = advance(straight, buffer, 2)
    other = trainer((0, 3))
    again = checkpoints.load_checkpoint(other, tmp_path / "check.npz")
    again = advance(other, again, 2)
    pairs = everything(straight, buffer), everything(other, again)
    for a, b in zip(*pairs, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(straight.seen, other.seen, strict=True):
        np.testing.assert_array_equal(a, b)
    packed = trainer((0, 3))
    checkpoints.load_packed(packed, tmp_path)
    assert (packed.seen.number == seen.number + packed.refilled).all()


def test_a_policy_is_shown_its_own_scale_wherever_it_is(tmp_path, normal):
    states = rollout_states(normal.policies[1], 40)
    assert np.ptp(states, 0)[0] > 100 * np.ptp(states, 0)[1]
    stored = load(normal.out, 1)
    pair = stored(states, seed=0), normal.policies[1](states, seed=0)
    np.testing.assert_array_equal(*pair)
    for name in ("mean", "std"):
        ours, kept = (
            getattr(normal.policies[1].scale, name),
            getattr(stored.scale, name),
        )
        np.testing.assert_array_equal(ours, kept)
    # Its network is that of an ordinary policy, which is shown deviations.
    plain = load(normal.out, 1)
    plain.scale = None
    shown = np.asarray(normalize(states, stored.scale))
    assert np.abs(shown).max() < 10
    np.testing.assert_allclose(stored(states, 0), plain(shown, 0), atol=1e-5)
    assert np.abs(stored(states, 0) - plain(states, 0)).max() > 0.1
    action = stored(states, 0)
    np.testing.assert_allclose(stored.q(states, action), plain.q(shown, action), 1e-4)
    again = evaluate(stored, episodes=3, seed=runs.EVALUATION_SEED + 1)
    assert again.tolist() == normal.record["curve"][-1]["returns"][1]


def test_it_is_exported_with_its_scale(tmp_path, normal):
    policy = normal.policies[1]
    states = rollout_states(policy, 40)
    np.save(tmp_path / "states.npy", states)
    for name in ("p.onnx", "p.npz"):
        som.export(policy, tmp_path / name)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    graph = onnxruntime.InferenceSession(tmp_path / "p.onnx", options)
    play = (
        "import numpy as np; from numpy_policy import act, load; p = load('p.npz');"
        "np.save('a.npy', [act(p, s) for s in np.load('states.npy')])"
    )
    subprocess.run([sys.executable, "-c", play], cwd=tmp_path, check=True)
    for actions in (
        graph.run(None, {"observation": states})[0],
        np.load(tmp_path / "a.npy"),
    ):
        np.testing.assert_allclose(actions, policy(states, seed=0), atol=1e-4)


def test_the_best_policy_keeps_the_scale_of_its_time(tmp_path):
    scales = []
    run = train(
        tmp_path, lambda step, now, trainer: scales.append(trainer.scale),
        evaluations=5, **NORMAL,
    )  # fmt: skip
    means = [np.mean(point["returns"]) for point in run.record["curve"]]
    chunk = run.record["curve"][int(np.argmax(means))]["step"] // 100 - 1
    for best in (run.best[0], runs.resume(tmp_path).best[0]):
        np.testing.assert_array_equal(best.scale.mean, scales[chunk].mean[0])


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, normal):
    train(tmp_path, lambda step, metrics: step == 300, seeds=2, **NORMAL)
    runs.resume(tmp_path)
    for name in ("checkpoint.npz", "policy.npz", "policy-best.npz"):
        assert_same_arrays(tmp_path / name, normal.out / name)


def test_off_is_as_before(tmp_path):
    """And a run of a version that had no such setting goes on without."""
    off = train(tmp_path)
    assert off.policy.scale is None
    assert "normalized" not in records.read_metadata(tmp_path / "policy.npz")
    old = records.read_record(tmp_path / "config.json")
    del old["loop"]["normalize_observations"]
    records.write_record(tmp_path / "config.json", old)
    assert train(tmp_path).record == off.record
    with pytest.raises(ValueError, match="normalize_observations is False there and"):
        train(tmp_path, normalize_observations=True)


def test_a_sweep_of_a_version_without_the_setting_goes_on(tmp_path):
    words = ["mfp"], ["Cart-v0"], 1, tmp_path, 1000
    (job,) = sweep.plan(*words)
    old = {k: v for k, v in job.config["loop"].items() if k != "normalize_observations"}
    records.write_record(job.folder / "config.json", job.config | {"loop": old})
    assert sweep.plan(*words) == [job]


@pytest.mark.parametrize("algo", ["ppo", "dipo"])
def test_other_kinds_of_agents_learn_from_it(algo):
    """One that learns on policy, and one that improves what it stored."""
    words = {"warmup": 0} if algo == "ppo" else {"warmup": 100}
    run = som.train(
        algo, steps=400, width=16, depth=2, chunk_steps=100, episodes=1, **NORMAL,
        **words, progress=False,
    )  # fmt: skip
    assert run.policy.scale is not None and np.isfinite(run.policy([300, 0.03])).all()
    assert AGENTS[algo].on_policy == (algo == "ppo")


@pytest.mark.parametrize("normalize_observations", [False, True])
def test_odd_units_are_learned_from_with_it_and_not_without(normalize_observations):
    run = train(
        env="OddUnits-v0", steps=6_000, evaluations=1, episodes=20,
        normalize_observations=normalize_observations,
    )  # fmt: skip
    final = np.mean(run.record["curve"][-1]["returns"])
    assert (final > -5) == normalize_observations, final  # idle: about -17


def test_it_wants_a_truth_value():
    schedule = object.__new__(loop.LoopConfig)  # the tests' type checker is stricter
    for name, default in asdict(loop.LoopConfig()).items():
        object.__setattr__(schedule, name, default)
    object.__setattr__(schedule, "normalize_observations", "yes")
    with pytest.raises(ValueError, match="normalize_observations is 'yes'; True or"):
        schedule.__post_init__()
