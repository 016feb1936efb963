"""Imitation with networks: ends, start laws, losses, runs, the command."""

import os
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from som import load, make_agent
from som.relatives import imitation
from som.relatives.datasets import (
    Episode,
    Recordings,
    Uniform,
    record,
    stack_steps,
    write_set,
)
from som.relatives.imitation import (
    METHODS,
    Demonstrations,
    ImitationStudy,
    Imitator,
    ImitatorConfig,
    absorbing_weight,
    arms,
    demonstrations,
    draw,
    dual_value,
    prepare,
    ratio_loss,
    rows_of,
    start_term,
    start_weights,
    temporal_differences,
    train_imitator,
    update,
    with_flag,
)
from som.training.command_line import main
from som.training.environments import Task
from som.training.policy import Scale

NAME = "InvertedDoublePendulum-v4"
TINY = {"width": 8, "batch_size": 8}


def some_steps(lengths, ended, size=3, seed=0):
    rng, made = np.random.default_rng(seed), []
    for n, falls in zip(lengths, ended, strict=True):
        s = rng.normal(size=(n + 1, size)).astype(np.float32)
        a = rng.uniform(-1, 1, (n, 2)).astype(np.float32)
        made.append(Episode(s, a, np.zeros(n, np.float32), falls, not falls))
    return stack_steps(made, -np.ones(2), np.ones(2))


@pytest.fixture(scope="module")
def demo():
    expert = some_steps((20, 15), (True, False))
    union = some_steps((20, 15, 4, 6, 9), (True, False, True, True, False))
    return Demonstrations(
        expert, union, Task(NAME), -np.ones(2), np.ones(2), {"hash": "x"}
    )


@pytest.fixture(scope="module")
def pendulum():
    """Recordings by chance, of which the first two play the expert."""
    made = record(Uniform(1), NAME, 12)
    bounds = -np.ones(1, np.float32), np.ones(1, np.float32)
    kept = Recordings("som/x/expert-v0", Task(NAME), made, *bounds, "u", {}, "")
    return demonstrations(kept, kept, 2, 3)


# Ends and starts


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
def test_the_absorbing_state_never_starts(gamma):
    steps = some_steps((7, 4, 5), (True, False, True))
    extra = gamma / (1 - gamma)
    assert absorbing_weight(steps, gamma) == pytest.approx(extra * 2 / 16)
    here, after = start_weights(steps, gamma, tail=True)
    assert here.sum() + after.sum() == pytest.approx(1)
    total = 16 + 2 * extra  # steps, and the absorbing pairs of two ends
    assert here[0] == pytest.approx(1 / (1 - gamma) / total)
    assert here[1] == pytest.approx(1 / total)
    np.testing.assert_array_equal(np.flatnonzero(after), [10] if gamma else [])
    without, none = start_weights(steps, gamma)
    assert without.min() > 0 == none.max() and without.sum() == pytest.approx(1)


def test_fading_steps_leave_what_is_left():
    steps, gamma = some_steps((3,), (True,)), 0.5
    real, rest = 1 + 0.5 + 0.25, 0.125 / (1 - 0.5)
    expected = rest / real
    assert absorbing_weight(steps, gamma, fading=True) == pytest.approx(expected)


def test_rows_are_drawn_by_their_law():
    steps = some_steps((4,), (False,))
    scale = Scale(np.zeros(3), np.ones(3))
    rows = rows_of(steps, scale, 0.0, np.array([0.0, 3.0, 0.0, 1.0]))
    drawn = draw(rows, jax.random.PRNGKey(0), 4000)
    first = (drawn.observation == steps.observation[1]).all(-1)
    last = (drawn.observation == steps.observation[3]).all(-1)
    assert np.all(first | last) and abs(first.mean() - 0.75) < 0.04


def test_each_method_starts_where_it_should(demo):
    first = demo.union.time == 0
    for method, steps, weights in (
        ("uncorrected", demo.union, first / first.sum()),
        ("DemoDICE", demo.union, first / first.sum()),
        ("IGI", demo.expert, start_weights(demo.expert, 0.9)[0]),
    ):
        start = prepare(demo, method, 0.9).start
        assert len(start.observation) == len(steps.time)
        probability = np.diff(start.ladder, prepend=0)
        np.testing.assert_allclose(probability, weights, atol=1e-6)
    fade = prepare(demo, "discounted ratio", 0.5).expert
    p = np.diff(fade.ladder, prepend=0)
    np.testing.assert_allclose(p[1:4] / p[:3], 0.5, rtol=1e-3)


# Losses


def test_the_dual_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    delta, share = rng.normal(size=6), rng.dirichlet(np.ones(6))
    given = jnp.float32(0.3), jnp.float32(delta), jnp.float32(share)
    plain = 0.3 + np.log(np.sum(share * np.exp(delta)))
    assert float(dual_value(*given)) == pytest.approx(plain, abs=1e-5)
    scaled = 0.3 + 1.5 * np.log(np.sum(share * np.exp(delta / 1.5)))
    assert float(dual_value(*given, 0.5)) == pytest.approx(scaled, abs=1e-5)


def test_a_terminated_step_leads_to_the_absorbing_state(demo):
    agent = Imitator(ImitatorConfig(discount=0.9, **TINY), 3, 2)
    state = agent.init(jax.random.PRNGKey(0))
    rows = prepare(demo, "telescoped", 0.9).union
    rho, delta, share = temporal_differences(agent, state.ratio, state.nu, rows)
    assert float(share.sum()) == pytest.approx(1) and len(delta) == len(rows.ended) + 1
    rho, delta, share = map(np.asarray, (rho, delta, share))
    flag = jnp.zeros(4).at[3].set(1.0)
    end = float(agent.multiplier(state.nu, flag))
    here = agent.multiplier(state.nu, with_flag(rows.observation))
    after = agent.multiplier(state.nu, with_flag(rows.next_observation))
    here, after = np.asarray(here), np.asarray(after)
    for i in np.flatnonzero(demo.union.terminated):
        assert delta[i] == pytest.approx(rho[i] + 0.9 * end - here[i], abs=1e-5)
    i = int(np.flatnonzero(~demo.union.terminated)[0])
    assert delta[i] == pytest.approx(rho[i] + 0.9 * after[i] - here[i], abs=1e-5)
    assert delta[-1] == pytest.approx(rho[-1] - 0.1 * end, abs=1e-5)


@pytest.mark.parametrize("gamma", [0.1, 0.9, 0.99])
def test_both_corrected_forms_have_one_gradient(gamma):
    steps = some_steps((12, 9), (True, False))
    for k in (*range(11), *range(12, 20)):
        steps.next_observation[k] = steps.observation[k + 1]
    agent = Imitator(ImitatorConfig(discount=gamma, **TINY), 3, 2)
    nu = agent.init(jax.random.PRNGKey(0)).nu
    scale = Scale(np.zeros(3), np.ones(3))
    rows = rows_of(steps, scale, absorbing_weight(steps, gamma))
    here, after = start_weights(steps, gamma, tail=True)

    def drawn(nu):
        value = partial(agent.multiplier, nu)
        total = here @ value(with_flag(rows.observation))
        total += after @ value(with_flag(rows.next_observation))
        return (1 - gamma) * total

    one, two = (
        jax.grad(drawn)(nu),
        jax.grad(lambda nu: start_term(agent, nu, rows, rows))(nu),
    )
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_the_discriminator_falls_where_both_are_alike(demo):
    agent = Imitator(ImitatorConfig(ratio_penalty=0.0, **TINY), 3, 2)
    rows = prepare(demo, "telescoped", 0.9).union
    ratio = jax.tree.map(jnp.zeros_like, agent.init(jax.random.PRNGKey(0)).ratio)
    loss, gradient = jax.value_and_grad(
        lambda p: ratio_loss(agent, p, rows, rows, jax.random.PRNGKey(1))
    )(ratio)
    assert loss == pytest.approx(2 * np.log(2), abs=1e-5)
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradient)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_what_it_uses(demo, method):
    agent = Imitator(ImitatorConfig(method, 0.9, 0.5, **TINY), 3, 2)
    state = agent.init(jax.random.PRNGKey(0))
    data = prepare(demo, method, 0.9)
    new, metrics = jax.jit(update, static_argnums=0)(
        agent, state, data, jax.random.PRNGKey(1)
    )
    moved = {
        name
        for name in ("policy", "ratio", "nu")
        if any(
            not np.array_equal(x, y)
            for x, y in zip(
                jax.tree.leaves(getattr(state, name)),
                jax.tree.leaves(getattr(new, name)),
                strict=True,
            )
        )
    }
    expected = {"policy"}
    if method in METHODS[:6]:
        expected |= {"ratio"}
    if method in METHODS[:5]:
        expected |= {"nu"}
    assert moved == expected and new.step == 1
    assert all(np.isfinite(v) for v in metrics.values())


def test_cloning_learns_a_linear_expert():
    rng = np.random.default_rng(0)
    s = rng.normal(size=(401, 3)).astype(np.float32)
    a = np.tanh(s[:-1] @ np.array([[0.5], [-0.3], [0.2]], np.float32))
    made = [Episode(s, a, np.zeros(400, np.float32), False, True)]
    steps = stack_steps(made, -np.ones(1), np.ones(1))
    bounds = -np.ones(1), np.ones(1)
    demo = Demonstrations(steps, steps, Task("Hopper-v4"), *bounds, {})
    agent = Imitator(ImitatorConfig("expert cloning", width=32, policy_lr=3e-3), 3, 1)
    data, state = prepare(demo, "expert cloning", 0.9), None
    state = imitation.init_seeds(agent, (0,))
    keys = jax.random.PRNGKey(0)[None]
    state, _ = imitation.learn(agent, state, data, keys, 600)
    one = jax.tree.map(lambda x: x[0], state.policy)
    shown = data.expert.observation
    mean, _ = agent.spread(one, shown)
    assert np.abs(mean - steps.action).max() < 0.15


# What it is given


def test_demonstrations_are_put_together(pendulum):
    assert len(pendulum.expert.first) == 2
    assert len(pendulum.union.first) == 2 + 3 + 12
    first = len(pendulum.expert.time)
    np.testing.assert_array_equal(
        pendulum.union.observation[:first], pendulum.expert.observation
    )


def test_bad_input_gets_its_sentence(pendulum, demo):
    kept = Recordings("a-v0", Task(NAME), [1, 2], np.ones(1), np.ones(1), "u", {}, "")
    with pytest.raises(ValueError, match=r"2 known and 1 hidden .* at most 2"):
        demonstrations(kept, kept, 2, 1)
    with pytest.raises(ValueError, match="one task is wanted"):
        demonstrations(kept, kept._replace(task=Task("Hopper-v4")), 1, 1)
    with pytest.raises(ValueError, match="method is 'dice'; one of uncorrected"):
        ImitatorConfig(method="dice")
    with pytest.raises(ValueError, match=r"discount is 1\.0"):
        ImitatorConfig(discount=1.0)
    with pytest.raises(ValueError, match="evaluations is 5; at least 1"):
        train_imitator(demo, steps=2)
    with pytest.raises(ValueError, match="setting of imitator 'gama'"):
        train_imitator(demo, gama=0.5)


# Runs


def test_a_run_goes_on_and_its_policy_acts(pendulum, tmp_path):
    settings = {"evaluations": 2, "episodes": 2, "method": "IGI", **TINY}
    whole = train_imitator(pendulum, 12, 2, **settings)
    told = []

    def stop(done, metrics):
        told.append(done)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        train_imitator(pendulum, 12, 2, out=tmp_path, progress=stop, **settings)
    assert told == [6] and (tmp_path / "checkpoint.npz").exists()
    parts = train_imitator(pendulum, 12, 2, out=tmp_path, **settings)
    again = train_imitator(pendulum, 12, 2, out=tmp_path, **settings)
    for run in (parts, again):
        for x, y in zip(
            jax.tree.leaves(run.policies[1].state),
            jax.tree.leaves(whole.policies[1].state),
            strict=True,
        ):
            np.testing.assert_array_equal(x, y)
        points = [p["returns"] for p in run.record["curve"]]
        assert points == [p["returns"] for p in whole.record["curve"]]
    policy = load(tmp_path, 1)
    seen = pendulum.union.observation[:4]
    np.testing.assert_array_equal(policy(seen, 0), parts.policies[1](seen, 0))
    assert policy.algo == "imitator"
    assert main(["evaluate", str(tmp_path), "--episodes", "2"]) == 0
    with pytest.raises(ValueError, match=r"holds another run .*steps is 12 there"):
        train_imitator(pendulum, 13, 2, out=tmp_path, **settings)


def test_a_stopped_run_is_the_same_run(pendulum, tmp_path, monkeypatch):
    monkeypatch.setattr(imitation, "CHUNK", 3)
    settings = {"evaluations": 1, "episodes": 1, **TINY}
    whole = train_imitator(pendulum, 9, 1, **settings)

    def interrupt(done, metrics):
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train_imitator(pendulum, 9, 1, out=tmp_path, progress=interrupt, **settings)
    assert (tmp_path / "checkpoint.npz").exists()
    rest = train_imitator(pendulum, 9, 1, out=tmp_path, **settings)
    for x, y in zip(
        jax.tree.leaves(rest.policy.state),
        jax.tree.leaves(whole.policy.state),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_an_imitator_is_not_trained_by_the_loop(capsys):
    assert main(["train", "--algo", "imitator", "--env", NAME]) == 1
    assert "unknown algorithm 'imitator'" in capsys.readouterr().err
    assert make_agent("imitator", 3, 1).observation_size == 3


def test_the_command(tmp_path, capsys):
    made = record(Uniform(1), NAME, 6)
    for kind in ("expert", "random"):
        write_set(f"som/p/{kind}-v0", made, NAME, "uniform", root=tmp_path / "sets")
    words = "imitate som/p/expert-v0 som/p/random-v0 --hidden 2 --steps 6 --set "
    words += "width=8 --set method=IGI --set batch_size=8 --root"
    out = ["--out", str(tmp_path / "run")]
    assert main([*words.split(), str(tmp_path / "sets"), *out]) == 0
    assert "return" in capsys.readouterr().out
    assert load(tmp_path / "run").agent.config.method == "IGI"
    assert main(["imitate", "a-v0", "b-v0", "--root", str(tmp_path / "sets")]) == 1
    assert "there is no set a-v0" in capsys.readouterr().err


# The study


def test_the_arms_are_all_there():
    assert len(arms()) == 3 * (4 * 6 + 4 + 3)
    assert not set(arms()) & set(imitation.STUDIES["imitation-more"].arms)
    assert len(imitation.STUDIES["imitation-more"].arms) == 3 * len(arms())
    assert imitation.STUDIES["imitation"].overnight
    short = imitation.STUDIES["imitation-short"].arms
    assert len(short) == 3 * (3 * 3 + 2 + 3) and set(short) <= set(arms())


def test_a_study_keeps_what_it_has(tmp_path):
    made = record(Uniform(3), "Hopper-v4", 12)
    for kind in ("expert", "random"):
        write_set(f"som/hopper/{kind}-v0", made, "Hopper-v4", "u", root=tmp_path)
    arm = {
        "env": "Hopper-v4", "known": 1, "hidden": 10, "others": "random",
        "steps": 10,
        "settings": TINY,
    }  # fmt: skip
    study = ImitationStudy({"a": arm, "b": arm}, tmp_path)
    told = []
    path = tmp_path / "r.json"
    record_ = study.run(path, (0, 1), progress=lambda n, name: told.append((n, name)))
    assert told[-1] == (20, "b") and study.total(None) == 20
    assert len(record_["arms"]["a"]["returns"]) == 2
    assert record_["arms"]["a"]["returns"] == record_["arms"]["b"]["returns"]
    with pytest.raises(ValueError, match="no set som/walker2d/expert-v0"):
        lost = {"c": arm | {"env": "Walker2d-v4"}}
        ImitationStudy(lost, tmp_path).run(path, (0,))
