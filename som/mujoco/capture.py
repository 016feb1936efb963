"""How far up the critic.

Exported by tools/export.py from book/mujoco/capture.md; edit the chapter.
"""

__all__ = [
    "NUM",
    "capture",
    "two_jumps",
    "flow",
    "measure",
    "trace",
    "TRACES",
    "collect",
    "AHEAD",
    "foretold",
    "frozen",
    "JUMPS",
    "ask",
]

# %% Imports
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from som.agent.actor_critic import candidates, q_value
from som.agent.critic import Transition
from som.agent.som import (
    SOM,
    OneStep,
    flow_velocity,
    policy_loss,
    q_spread,
)
from som.baselines.dipo import climb
from som.theory.probability_flow import integrate
from som.training import environments
from som.training.loop import defaults
from som.training.policy import load, normalize, rollout_states
from som.training.records import (
    curve_arrays,
    provenance,
    read_run,
    write_record,
)
from som.training.runs import train


# %% Capture
NUM = 16  # candidates, and starts of the climb of either kind


@partial(jax.jit, static_argnums=0)
def capture(
    agent: Any, policy, critic, observation: Float[Array, "S O"], key
) -> dict[str, Float[Array, ""]]:
    """How far up the critic each way of an agent comes.

    Equation (eq-capture).

    Args:
        agent: one with a critic Q(s, a).
        policy: parameters that draw the actions.
        critic: parameters whose Q is climbed.
        observation: states, [S, O].
        key: random key.

    Returns:
        By name of the way, 0 for uniform actions and 1 at the top. `size`
        is the mean of abs(a) over the best candidates, `top` that of the
        highest points; `spread` the deviation of a state's jumps.
    """
    k_uniform, k_jump, k_flow = jax.random.split(key, 3)
    value = lambda a: q_value(agent, critic, observation, a)
    jumps = candidates(agent, policy, observation, k_jump, NUM)
    shape = (4 * NUM, *jumps.shape[1:])
    uniform = jax.random.uniform(k_uniform, shape, minval=-1)
    starts = jnp.concatenate([jumps, uniform[:NUM]])
    tops = climb(value, starts, 100, 0.02, jnp.inf)

    def pick(a):  # of the candidates at each state, the best
        best = jnp.argmax(value(a), 0)
        return jnp.take_along_axis(a, best[None, :, None], 0)

    ways = {"one jump": jumps, f"best of {NUM}": pick(jumps)}
    if isinstance(agent, OneStep):
        ways["two jumps"] = two_jumps(agent, policy, observation, k_jump)
    fixed = getattr(agent.config, "inverse_temperature", None)
    if isinstance(agent, SOM) and fixed is not None:
        ways["flow"] = flow(agent, critic, fixed, observation, k_flow)
    low, high = value(uniform).mean(), value(pick(tops)).mean()
    heights = {
        name: (value(a).mean() - low) / (high - low)
        for name, a in ways.items()
    }
    sizes = {"size": pick(jumps), "top": pick(tops)}
    heights |= {k: jnp.mean(jnp.abs(a)) for k, a in sizes.items()}
    return heights | {"spread": jnp.mean(jnp.std(jumps, 0))}


def two_jumps(
    agent: OneStep, policy, observation: Float[Array, "S O"], key
) -> Float[Array, "N S A"]:
    """Actions of the jumps 1 to 1/2 and 1/2 to 0, [N, S, A]."""
    shape = (NUM, len(observation), agent.action_size)
    a = agent.prior_std * jax.random.normal(key, shape)
    for r, t in ((0.5, 1.0), (0.0, 0.5)):
        times = jnp.float32(r), jnp.float32(t)
        a -= (t - r) * agent.policy_net.apply(policy, a, *times, observation)
    return jnp.clip(a, -1, 1)


def flow(
    agent: SOM, critic, factor, observation: Float[Array, "S O"], key
) -> Float[Array, "N S A"]:
    """Actions at the ends of the flow that the jump is taught, [N, S, A].

    Args:
        factor: inverse temperature, on Q over its spread.
    """
    k_noise, k_spread, k_way = jax.random.split(key, 3)
    shape = (NUM, len(observation), agent.action_size)
    noise = agent.prior_std * jax.random.normal(k_noise, shape)
    spread = q_spread(agent, critic, observation, k_spread)

    def way(noise, state, key):  # one set of guesses for the whole way
        v = flow_velocity(agent, critic, factor / spread, state, key)
        return jnp.clip(integrate(v, noise, 50), -1, 1)

    keys = jax.random.split(k_way, shape[:2])
    over_states = jax.vmap(way)
    return jax.vmap(over_states, in_axes=(0, None, 0))(
        noise, observation, keys
    )


# %% A trained policy, live
def measure(run: str | Path) -> dict[str, float]:
    """The capture of a policy file or a run's folder, at 40 of its states.

    Args:
        run: whatever `load` takes.

    Returns:
        What `capture` returns, as numbers.
    """
    policy = load(run)
    agent, state = policy.agent, policy.state
    states = normalize(rollout_states(policy, 400)[::10], policy.scale)
    params, key = agent.acting_policy(state), jax.random.PRNGKey(0)
    found = capture(agent, params, state.critic, states, key)
    return {name: float(value) for name, value in found.items()}


# %% Does it lag?
def trace(
    steps: int, seed: int = 0, every: int = 2500, **settings
) -> dict[str, Any]:
    """Train on HalfCheetah-v4, and measure the capture on the way.

    Args:
        steps: environment steps, in the profile `sample-efficient`.
        seed: of the run.
        every: environment steps between two measurements.
        **settings: fields that differ from the profile, or `algo`.

    Returns:
        Steps, and by name of the way its capture under the critic of the
        moment (`now`) and of 500 updates ago (`before`).
    """
    critics: list[Any] = []
    found: dict[str, Any] = {"steps": [], "now": [], "before": []}

    def watch(step, metrics, trainer):
        policy = trainer.policy(0)
        agent, state = policy.agent, policy.state
        critics[:] = [*critics[-2:], state.critic]
        if step % every or step <= trainer.loop.warmup:
            return
        states = rollout_states(policy, 400)[::10]
        rest = normalize(states, policy.scale), jax.random.PRNGKey(step)
        params = agent.acting_policy(state)
        found["steps"].append(step)
        for name, critic in (("now", critics[-1]), ("before", critics[0])):
            heights = capture(agent, params, critic, *rest)
            found[name].append({k: float(v) for k, v in heights.items()})

    ends = {"evaluations": 1, "episodes": 1}
    train(
        env="HalfCheetah-v4", steps=steps, seeds=(seed,), progress=watch,
        profile="sample-efficient", **ends | settings,
    )  # fmt: skip
    return found


TRACES: dict[str, dict[str, Any]] = {
    "the profile": {"climb": 0.0},
    "inverse temperature 40": {"inverse_temperature": 40.0, "climb": 0.0},
}


def collect(
    folder: str | Path, path: str | Path, steps: int = 20_000
) -> dict[str, Any]:
    """Measure finished runs, watch two others, and write the record.

    Args:
        folder: below it lie the runs, each with its record.json.
        path: of the record, ending in .json.
        steps: how long the runs of TRACES are.

    Returns:
        The record: `runs`, each with algorithm, seed, settings, returns by
        step and capture at the end; `traces` by name; where it was made.
    """
    rows = []
    for file in sorted(Path(folder).rglob("record.json")):
        run = read_run(file)
        at, returns = curve_arrays(run)
        usual, pace = defaults(run["algo"], run["profile"])
        own = json.loads(json.dumps(asdict(usual)))  # as a record has them
        own["num_envs"] = pace.num_envs
        config = run["config"]
        made = config["agent"] | {"num_envs": config["loop"]["num_envs"]}
        rows.append(
            {
                "algo": run["algo"],
                "seed": run["seeds"][0],
                "changes": {k: v for k, v in made.items() if v != own[k]},
                "source": run["provenance"]["source"],
                "steps": at.tolist(),
                "returns": returns[0].tolist(),
                "capture": measure(file.parent),
            }
        )
    record = {
        "provenance": provenance(),
        "runs": rows,
        "traces": {k: trace(steps, **v) for k, v in TRACES.items()},
    }
    write_record(path, record)
    return record


# %% Does it know how good it is?
AHEAD = 500  # steps; what comes later counts less than a hundredth


def foretold(
    run: str | Path, steps: int = 4000, seed: int = 0
) -> dict[str, float]:
    """What the critic says of a policy's actions, and what came of them.

    Args:
        run: whatever `load` takes.
        steps: environment steps of one rollout, without exploration.
        seed: of the environment.

    Returns:
        `said`, the mean of Q, and `came`, that of the discounted return,
        over the `states` after which the rollout shows AHEAD steps or the
        task's own end; and their `correlation`.
    """
    policy = load(run)
    seen, taken, reward, over, cut = [], [], [], [], []
    with environments.make(policy.task, 1, seed) as envs:
        observation = envs.reset()
        for _ in range(steps):
            seen.append(observation[0])
            taken.append(policy.act(observation)[0])
            step = envs.step(taken[-1][None])
            reward.append(step.reward[0])
            over.append(step.terminated[0])
            cut.append(step.truncated[0])
            observation = step.observation
    came, ahead = np.zeros(steps), np.zeros(steps)
    later, known, discount = 0.0, 0, policy.agent.config.discount
    for i in reversed(range(steps)):
        if over[i] or cut[i]:
            later, known = 0.0, AHEAD if over[i] else 0
        later, known = reward[i] + discount * later, known + 1
        came[i], ahead[i] = later, known
    whole = ahead > AHEAD
    said = policy.q(np.stack(seen), np.stack(taken))[whole]
    came = came[whole]
    return {
        "said": float(said.mean()),
        "came": float(came.mean()),
        "correlation": float(np.corrcoef(said, came)[0, 1]),
        "states": int(whole.sum()),
    }


# %% A critic that stands still
def frozen(
    run: str | Path, updates: int = 2500, seed: int = 0, **settings
) -> dict[str, float]:
    """Teach a new policy by the critic of a trained one of SOM.

    Args:
        run: whatever `load` takes.
        updates: steps of Adam, 128 states each.
        seed: of the new policy and of its batches.
        **settings: fields that differ from the trained one's.

    Returns:
        What `capture` returns, as numbers, for the new policy, and
        `meant`: the spread of the flow's ends by 200 guesses.
    """
    policy = load(run)
    config, critic = policy.agent.config, policy.state.critic
    agent = replace(policy.agent, config=replace(config, **settings))
    states = normalize(rollout_states(policy, 4000), policy.scale)
    seen, unseen = jnp.asarray(states[:3000]), jnp.asarray(states[3000::20])
    actions = candidates(
        policy.agent, policy.agent.acting_policy(policy.state), seen,
        jax.random.PRNGKey(seed), 1,
    )[0]  # fmt: skip
    adam = optax.adam(agent.config.actor_lr)

    def step(carry, key):
        params, opt = carry
        k_row, k_loss = jax.random.split(key)
        size = agent.config.batch_size
        i = jax.random.randint(k_row, (size,), 0, len(seen))
        none = jnp.zeros(size)
        batch = Transition(seen[i], actions[i], none, none, seen[i])
        gradient = jax.grad(partial(policy_loss, agent))(
            params, critic, policy.state.log_alpha, batch, k_loss
        )
        updates, opt = adam.update(gradient, opt)
        return (optax.apply_updates(params, updates), opt), None

    params = agent.init_policy(jax.random.PRNGKey(seed))
    keys = jax.random.split(jax.random.PRNGKey(seed + 1), updates)
    start = params, adam.init(params)
    (params, _), _ = jax.jit(partial(jax.lax.scan, step))(start, keys)
    found = capture(agent, params, critic, unseen, keys[0])
    many = replace(agent, config=replace(agent.config, num_samples=200))
    factor = agent.config.inverse_temperature
    ends = jax.jit(partial(flow, many))(
        critic, factor, unseen[::5], keys[0]
    )  # the target itself, nearly
    found["meant"] = jnp.mean(jnp.std(ends, 0))
    return {name: float(value) for name, value in found.items()}


JUMPS: dict[str, dict[str, Any]] = {
    "noisy": {"residual": False, "inverse_temperature": 10.0},
    "residual": {"residual": True, "inverse_temperature": 10.0},
    "residual, colder": {"residual": True, "inverse_temperature": 40.0},
}


def ask(
    runs: dict[str, str | Path], taught: dict[str, str | Path], path
) -> dict[str, Any]:
    """What critics foretell, and what new policies learn from them.

    Args:
        runs: by name, what `foretold` is asked of.
        taught: by name, the runs whose critics teach each of JUMPS.
        path: of the record, ending in .json.

    Returns:
        The record: `foretold` by name, `frozen` by name and jump.
    """
    record = {
        "provenance": provenance(),
        "foretold": {name: foretold(run) for name, run in runs.items()},
        "frozen": {
            name: {jump: frozen(run, **own) for jump, own in JUMPS.items()}
            for name, run in taught.items()
        },
    }
    write_record(path, record)
    return record
