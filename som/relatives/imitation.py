"""Imitation with networks.

Exported by tools/export.py from book/relatives/imitation.md; edit the chapter.
"""

__all__ = [
    "absorbing_weight",
    "start_weights",
    "Demonstrations",
    "demonstrations",
    "Rows",
    "Data",
    "rows_of",
    "draw",
    "prepare",
    "METHODS",
    "ImitatorConfig",
    "dual_value",
    "with_flag",
    "slope",
    "ImitatorState",
    "Imitator",
    "ratio_loss",
    "absorbing_pair",
    "temporal_differences",
    "start_term",
    "nu_loss",
    "clone_loss",
    "row_weights",
    "update",
    "CHUNK",
    "learn",
    "train_imitator",
    "DISCOUNTS",
    "ALPHAS",
    "UPDATES",
    "settings_of_arms",
    "arms",
    "ImitationStudy",
    "is_short",
]

# %% Imports
import argparse
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from som.agent.actor_critic import OFFLINE, at_least_one, make_agent
from som.agent.networks import MLP
from som.relatives.horizon import METHODS as DUAL
from som.relatives.datasets import (
    ROBOTS,
    Recordings,
    Steps,
    content_hash,
    normalized_score,
    read_set,
    references,
    stack_steps,
)
from som.training import records
from som.training.command_line import (
    COMMANDS,
    STUDIES,
    count,
    override,
    seed_list,
)
from som.training.environments import Task
from som.training.logs import ProgressLine, plain_console
from som.training.loop import fold, init_seeds, seed_axes, seed_numbers
from som.training.policy import (
    Policy,
    Scale,
    evaluate,
    normalize,
    save_policy,
)
from som.training.runs import EVALUATION_SEED, Run, alone, interruptible


# %% Ends that are real
def absorbing_weight(
    steps: Steps, discount: float, fading: bool = False
) -> float:
    """Weight of the absorbing state, against one for all real steps.

    Equation (eq-imitation-absorbing) of the chapter.

    Args:
        steps: recorded.
        discount: gamma, below one.
        fading: real steps count gamma^t, and the absorbing state what is
            left of that after an episode's end.
    """
    ends = steps.terminated
    if not fading:
        return float(discount / (1 - discount) * ends.mean())
    fade = discount ** steps.time.astype(float)
    return float(discount / (1 - discount) * fade[ends].sum() / fade.sum())


def start_weights(
    steps: Steps, discount: float, tail: bool = False
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The corrected law of the first state, over recorded states.

    Args:
        steps: the expert's.
        discount: gamma, below one.
        tail: keep the negative weight of the state after a truncation.

    Returns:
        Weights of the states [n] and of the states after them [n];
        together one.
    """
    here = np.where(steps.time == 0, 1 / (1 - discount), 1.0)
    after = np.zeros_like(here)
    if tail:
        after[steps.truncated] = -discount / (1 - discount)
    total = here.sum() + after.sum()
    return here / total, after / total


# %% What is learned from
class Demonstrations(NamedTuple):
    """What an imitator learns from.

    Args:
        expert: steps of the expert's known episodes.
        union: all steps, those of the expert included.
        task: that they are of.
        low, high: bounds of its actions, [A].
        names: what was taken of which set, for the record.
    """

    expert: Steps
    union: Steps
    task: Task
    low: Float[np.ndarray, " A"]
    high: Float[np.ndarray, " A"]
    names: dict[str, Any]

    @property
    def scale(self) -> Scale:
        """Mean and deviation of the observations, [O]."""
        seen = self.union.observation
        return Scale(seen.mean(0), np.maximum(seen.std(0), 1e-3))


def demonstrations(
    expert: Recordings,
    others: Recordings,
    episodes: int = 1,
    hidden: int = 10,
) -> Demonstrations:
    """An expert's episodes, and others among which more of his are hidden.

    Args:
        expert: his set; the first `episodes` are known, the next `hidden`
            go into the large pile.
        others: the rest of the pile.
        episodes: known episodes.
        hidden: episodes of the expert in the pile.

    Raises:
        ValueError: too few episodes, or sets of two tasks.
    """
    if expert.task != others.task:
        raise ValueError(
            f"{expert.name} is of {expert.task.name} and {others.name} of "
            f"{others.task.name}; one task is wanted"
        )
    have = len(expert.episodes)
    if not (1 <= episodes and 0 <= hidden and episodes + hidden <= have):
        raise ValueError(
            f"{episodes} known and {hidden} hidden episodes are asked for; "
            f"at least one known and at most {have} together are wanted, "
            f"the episodes of {expert.name}"
        )
    known = expert.episodes[:episodes]
    pile = expert.episodes[episodes : episodes + hidden] + others.episodes
    bounds = expert.low, expert.high
    names = {
        "expert": expert.name, "episodes": episodes, "hidden": hidden,
        "others": others.name, "hash": content_hash(known + pile)[:16],
    }  # fmt: skip
    union = stack_steps(known + pile, *bounds)
    return Demonstrations(
        stack_steps(known, *bounds), union, expert.task, *bounds, names
    )


class Rows(NamedTuple):
    """Recorded steps on the device, and the law by which they are drawn.

    Args:
        observation: in units of the scale, [n, O].
        action: in [-1, 1], [n, A].
        next_observation: [n, O].
        ended: 1 where the absorbing state follows, [n].
        ladder: running sums of the rows' probabilities, [n].
        end: weight of the absorbing pair, against 1 for all rows.
    """

    observation: Float[Array, "n O"]
    action: Float[Array, "n A"]
    next_observation: Float[Array, "n O"]
    ended: Float[Array, " n"]
    ladder: Float[Array, " n"]
    end: Float[Array, ""]


class Data(NamedTuple):
    """All that an imitator learns from, on the device."""

    expert: Rows
    union: Rows
    start: Rows  # of which only the observations are used


def rows_of(steps: Steps, scale: Scale, end: float, weights=None) -> Rows:
    """Steps as Rows; all are equally likely, or as the weights say."""
    shown = lambda s: normalize(jnp.asarray(s), scale)
    weights = np.ones(len(steps.time)) if weights is None else weights
    ladder = np.cumsum(weights) / np.sum(weights)
    return Rows(
        shown(steps.observation),
        jnp.asarray(steps.action),
        shown(steps.next_observation),
        jnp.float32(steps.terminated),
        jnp.float32(ladder),
        jnp.float32(end),
    )


def draw(rows: Rows, key, num: int) -> Rows:
    """Some rows, drawn by their law with replacement."""
    place = jax.random.uniform(key, (num,))
    i = jnp.searchsorted(rows.ladder, place)
    i = jnp.minimum(i, len(rows.ladder) - 1)  # single precision
    s, a, after, ended = (x[i] for x in rows[:4])
    return Rows(s, a, after, ended, rows.ladder, rows.end)


def prepare(data: Demonstrations, method: str, discount: float) -> Data:
    """The arrays and the laws that a method draws from.

    Args:
        data: what there is.
        method: one of METHODS.
        discount: gamma, below one.
    """
    scale = data.scale
    weigh = partial(absorbing_weight, discount=discount)
    fading = method == "discounted ratio"
    fade = discount ** data.expert.time.astype(float) if fading else None
    expert = rows_of(
        data.expert, scale, weigh(data.expert, fading=fading), fade
    )
    union = rows_of(data.union, scale, weigh(data.union))
    if method == "IGI":
        weights, _ = start_weights(data.expert, discount)
        return Data(expert, union, rows_of(data.expert, scale, 0.0, weights))
    first = np.float32(data.union.time == 0)
    return Data(expert, union, rows_of(data.union, scale, 0.0, first))


# %% The methods
METHODS = (
    *DUAL,  # uncorrected, IGI, telescoped, discounted ratio, DemoDICE
    "weighted cloning",  # by the ratio alone
    "expert cloning",  # of the known episodes
    "union cloning",  # of all steps alike
)


@dataclass(frozen=True)
class ImitatorConfig:
    """Settings of an imitator.

    Raises:
        ValueError: a size below one, an unknown method, no discount.
    """

    method: str = "telescoped"  # one of METHODS
    discount: float = 0.95  # gamma, which sets the horizon
    union_weight: float = 0.0  # alpha_D, used by DemoDICE alone
    width: int = 256  # units per hidden layer
    depth: int = 2  # hidden layers
    activation: str = "relu"  # between the layers, a name of jax.nn
    batch_size: int = 256  # steps of each kind per update
    policy_lr: float = 3e-4  # Adam step of the policy
    ratio_lr: float = 3e-4  # Adam step of the discriminator
    nu_lr: float = 3e-4  # Adam step of nu
    ratio_penalty: float = 0.1  # weight of the discriminator's slope
    nu_penalty: float = 1e-4  # weight of the slope of nu
    ratio_clip: float = 10.0  # most nats of the log ratio, either way
    log_std_low: float = -3.0  # least log deviation of an action

    def __post_init__(self):
        at_least_one(self, "width", "depth", "batch_size")
        if self.method not in METHODS:
            raise ValueError(
                f"method is {self.method!r}; one of {', '.join(METHODS)} is "
                "wanted"
            )
        if not 0 <= self.discount < 1:
            raise ValueError(
                f"discount is {self.discount}; wanted is 0 <= gamma < 1"
            )


# %% Three losses
def dual_value(
    source: Float[Array, ""],
    delta: Float[Array, " n"],
    share: Float[Array, " n"],
    union_weight: float = 0.0,
) -> Float[Array, ""]:
    """The dual of visitation matching over rows, Equation (eq-horizon-dual).

    Args:
        source: (1 - gamma) times the mean of nu over the start law.
        delta: ratio + gamma nu(s') - nu(s) of each row.
        share: probability of each row in the union; together one.
        union_weight: alpha_D.
    """
    scale = 1 + union_weight
    return source + scale * jax.nn.logsumexp(delta / scale, b=share)


def with_flag(observation: Float[Array, "... O"]) -> Float[Array, "... F"]:
    """Observations with a 0 after them: not the absorbing state."""
    zero = jnp.zeros_like(observation[..., :1])
    return jnp.concatenate([observation, zero], -1)


def slope(function, point: Float[Array, "n F"]) -> Float[Array, " n"]:
    """Norm of the gradient of a scalar function at n points."""
    gradient = jax.vmap(jax.grad(function))(point)
    return jnp.sqrt(jnp.sum(gradient**2, -1) + 1e-12)  # finite at zero


class ImitatorState(NamedTuple):
    """All that changes while an imitator learns (a pytree of arrays)."""

    policy: Any
    ratio: Any  # parameters of the discriminator
    nu: Any
    policy_opt: optax.OptState
    ratio_opt: optax.OptState
    nu_opt: optax.OptState
    step: Array  # updates made


@dataclass(frozen=True)
class Imitator:
    """Horizon-controlled imitation from recordings.

    Args:
        config: see ImitatorConfig.
        observation_size: O.
        action_size: A; the box of actions is [-1, 1]^A.
    """

    config: ImitatorConfig
    observation_size: int
    action_size: int

    profiles: ClassVar[dict[str, Any]] = {
        "paper": ImitatorConfig(batch_size=512),
        "laptop": ImitatorConfig(width=128),
    }
    learning_only: ClassVar[tuple[str, ...]] = (
        "ratio",
        "nu",
        "policy_opt",
        "ratio_opt",
        "nu_opt",
    )  # fields of the state that acting does not need

    def net(self, size: int) -> Any:
        """A network with so many outputs."""
        c = self.config
        return MLP(c.width, c.depth, size, c.activation)

    def adam(self, name: str) -> optax.GradientTransformation:
        """The optimizer of the policy, the ratio or nu."""
        return optax.adam(getattr(self.config, f"{name}_lr"))

    def init(self, key) -> ImitatorState:
        """Fresh parameters and optimizer states."""
        keys = jax.random.split(key, 3)
        s, a = jnp.zeros(self.observation_size), jnp.zeros(self.action_size)
        policy = self.net(2 * self.action_size).init(keys[0], s)
        ratio = self.net(1).init(keys[1], with_flag(s), a)
        nu = self.net(1).init(keys[2], with_flag(s))
        return ImitatorState(
            policy,
            ratio,
            nu,
            self.adam("policy").init(policy),
            self.adam("ratio").init(ratio),
            self.adam("nu").init(nu),
            jnp.zeros((), jnp.int32),
        )

    def spread(self, policy, observation):
        """Mean and log deviation of the actions, [..., A] each."""
        out = self.net(2 * self.action_size).apply(policy, observation)
        mean, log_std = jnp.split(out, 2, -1)
        return jnp.tanh(mean), jnp.clip(log_std, self.config.log_std_low, 0)

    def act(self, state, observation, key, explore: bool = False):
        """The mean, or a draw when exploring, in [-1, 1], [..., A].

        Args:
            observation: [..., O].
            key: random key.
            explore: draw from the Gaussian.
        """
        mean, log_std = self.spread(state.policy, observation)
        if not explore:
            return mean
        noise = jax.random.normal(key, mean.shape)
        return jnp.clip(mean + jnp.exp(log_std) * noise, -1, 1)

    def log_ratio(self, ratio, features, action) -> Float[Array, "..."]:
        """The logit rho of states with their flag, [..., O + 1]."""
        return self.net(1).apply(ratio, features, action)[..., 0]

    def multiplier(self, nu, features) -> Float[Array, "..."]:
        """nu of states with their flag, [..., O + 1]."""
        return self.net(1).apply(nu, features)[..., 0]

    def update(self, state, data: Data, key):
        """One update of discriminator, multiplier and policy.

        Args:
            data: all that there is; batches are drawn from it.
            key: random key.

        Returns:
            New state and a flat dict of scalar metrics.
        """
        return update(self, state, data, key)


OFFLINE["imitator"] = Imitator


def ratio_loss(agent: Imitator, ratio, expert: Rows, union: Rows, key):
    """The discriminator's loss, Equation (eq-imitation-discriminator)."""
    logit = partial(agent.log_ratio, ratio)
    at_end = logit(*absorbing_pair(agent))
    terms = []
    for rows, sign in ((expert, -1.0), (union, 1.0)):
        real = logit(with_flag(rows.observation), rows.action)
        real = jnp.mean(jax.nn.softplus(sign * real))
        end = rows.end * jax.nn.softplus(sign * at_end)
        terms.append((real + end) / (1 + rows.end))
    joined = [
        jnp.concatenate([with_flag(rows.observation), rows.action], -1)
        for rows in (expert, union)
    ]
    mix = jax.random.uniform(key, (len(joined[0]), 1))
    between = mix * joined[0] + (1 - mix) * joined[1]
    cut = agent.observation_size + 1
    steep = slope(lambda x: logit(x[:cut], x[cut:]), between)
    penalty = jnp.mean((steep - 1) ** 2)
    return sum(terms) + agent.config.ratio_penalty * penalty


def absorbing_pair(agent: Imitator):
    """Features and action of the absorbing state, [O + 1] and [A]."""
    features = jnp.zeros(agent.observation_size + 1).at[-1].set(1.0)
    return features, jnp.zeros(agent.action_size)


def temporal_differences(agent: Imitator, ratio, nu, union: Rows):
    """Ratio, delta and share of the union's rows and of the absorbing one.

    Returns:
        The three of the rows and, last, of the absorbing pair, [n + 1].
    """
    config, end = agent.config, absorbing_pair(agent)
    value, at_end = partial(agent.multiplier, nu), end[0]
    logit = jnp.append(
        agent.log_ratio(ratio, with_flag(union.observation), union.action),
        agent.log_ratio(ratio, *end),
    )
    rho = jnp.clip(logit, -config.ratio_clip, config.ratio_clip)
    here = jnp.append(value(with_flag(union.observation)), value(at_end))
    after = value(with_flag(union.next_observation))
    after = jnp.where(union.ended > 0, value(at_end), after)
    after = jnp.append(after, value(at_end))
    delta = rho + config.discount * after - here
    share = jnp.append(jnp.full(len(union.ended), 1 / len(union.ended)),
                       union.end)  # fmt: skip
    return rho, delta, share / (1 + union.end)


def start_term(agent: Imitator, nu, expert: Rows, start: Rows):
    """(1 - gamma) times the mean of nu over the start law."""
    gamma, value = agent.config.discount, partial(agent.multiplier, nu)
    if agent.config.method != "telescoped":
        return (1 - gamma) * jnp.mean(value(with_flag(start.observation)))
    after = (1 - expert.ended) * value(with_flag(expert.next_observation))
    here = value(with_flag(expert.observation))
    return jnp.mean(here - gamma * after) / (1 + expert.end)


def nu_loss(agent: Imitator, nu, ratio, expert, union, start):
    """The dual over batches, with a penalty on the slope of nu."""
    config = agent.config
    alpha_d = config.union_weight if config.method == "DemoDICE" else 0.0
    _, delta, share = temporal_differences(agent, ratio, nu, union)
    source = start_term(agent, nu, expert, start)
    points = with_flag(union.observation)
    steep = slope(partial(agent.multiplier, nu), points)
    penalty = config.nu_penalty * jnp.mean(steep**2)
    return dual_value(source, delta, share, alpha_d) + penalty


def clone_loss(agent: Imitator, policy, rows: Rows, weights):
    """Minus the weighted log-likelihood of actions; weights [n] sum to 1."""
    mean, log_std = agent.spread(policy, rows.observation)
    gap = (rows.action - mean) / jnp.exp(log_std)
    return weights @ jnp.sum(gap**2 / 2 + log_std, -1)


def row_weights(agent: Imitator, rho, delta):
    """Weights of the union's rows for cloning, together one, [n]."""
    config = agent.config
    if config.method == "weighted cloning":
        return jax.nn.softmax(rho[:-1])
    alpha_d = config.union_weight if config.method == "DemoDICE" else 0.0
    return jax.nn.softmax(delta[:-1] / (1 + alpha_d))


def update(agent: Imitator, state: ImitatorState, data: Data, key):
    """All of an imitator's update; see Imitator.update."""
    config, keys = agent.config, jax.random.split(key, 4)
    expert, union, start = (
        draw(rows, k, config.batch_size)
        for rows, k in zip(data, keys, strict=False)
    )
    new: dict[str, Any] = {}
    metrics: dict[str, Any] = {}

    def descend(name: str, loss) -> Any:
        params, opt = getattr(state, name), getattr(state, f"{name}_opt")
        value, gradient = jax.value_and_grad(loss)(params)
        change, opt = agent.adam(name).update(gradient, opt)
        new[name] = optax.apply_updates(params, change)
        new[f"{name}_opt"], metrics[f"{name}/loss"] = opt, value

    even = jnp.full(config.batch_size, 1 / config.batch_size)
    if config.method in ("expert cloning", "union cloning"):
        rows = expert if config.method == "expert cloning" else union
        weights = even
    else:
        descend(
            "ratio", lambda p: ratio_loss(agent, p, expert, union, keys[3])
        )
        if config.method in DUAL:
            ratio = jax.lax.stop_gradient(state.ratio)
            descend(
                "nu", lambda p: nu_loss(agent, p, ratio, expert, union, start)
            )
        rows = union
        rho, delta, _ = temporal_differences(
            agent, state.ratio, state.nu, union
        )
        weights = jax.lax.stop_gradient(row_weights(agent, rho, delta))
        metrics["weights/size"] = 1 / jnp.sum(weights**2) / len(weights)
        metrics["ratio/mean"], metrics["delta/max"] = rho.mean(), delta.max()
    descend("policy", lambda p: clone_loss(agent, p, rows, weights))
    state = state._replace(**new, step=state.step + 1)
    return state, metrics


# %% One call
CHUNK = 500  # updates in one program


@partial(jax.jit, static_argnames=("agent", "num"))
def learn(agent: Imitator, state, data: Data, keys, num: int):
    """Make updates of all seeds; metrics are those of the last.

    Args:
        agent: the imitator.
        state: of S seeds, [S, ...].
        data: the same for all seeds.
        keys: [S, 2].
        num: updates.
    """
    axes = seed_axes(state)
    one = jax.vmap(agent.update, (axes, None, 0), (axes, 0))

    def step(state, i):
        return one(state, data, fold(keys, i))

    state, metrics = jax.lax.scan(step, state, jnp.arange(num))
    return state, jax.tree.map(lambda x: x[-1], metrics)


def train_imitator(
    data: Demonstrations,
    steps: int = 100_000,
    seeds: Any = (0,),
    profile: str = "laptop",
    out: str | Path | None = None,
    progress: Callable[[int, dict[str, Any]], Any] | None = None,
    evaluations: int = 5,
    episodes: int = 10,
    checkpoint_seconds: float = 60.0,
    **overrides: Any,
) -> Run:
    """Imitate an expert from recordings.

    Args:
        data: what there is to learn from.
        steps: updates.
        seeds: distinct non-negative integers; a number n is the first n.
        profile: of the imitator.
        out: folder for checkpoint, policy and record; None: none. One
            that holds the same run is gone on with.
        progress: told the updates so far and the metrics.
        evaluations: in all, evenly spaced.
        episodes: of each.
        checkpoint_seconds: seconds between two checkpoints.
        **overrides: fields of ImitatorConfig.

    Returns:
        The finished run, with the policies of all seeds.

    Raises:
        ValueError: bad input, or a folder that holds another run.
        FloatingPointError: training diverged.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the same call goes on.
    """
    sizes = data.expert.observation.shape[1], data.expert.action.shape[1]
    agent = make_agent("imitator", *sizes, profile, **overrides)
    numbers = seed_numbers(seeds)
    if steps < 1 or not 1 <= evaluations <= steps:
        raise ValueError(
            f"steps is {steps} and evaluations is {evaluations}; at least 1 "
            "of each, and no more of these than of those, are wanted"
        )
    config = records.as_json({
        "algo": "imitator", "env": data.task.name, "seeds": numbers,
        "profile": profile, "agent": asdict(agent.config), "steps": steps,
        "env_kwargs": dict(data.task.kwargs), "evaluations": evaluations,
        "episodes": episodes, "data": data.names,
    })  # fmt: skip
    folder = None if out is None else Path(out)
    with contextlib.ExitStack() as held:
        if folder:
            records.make_folder(folder)
            held.enter_context(alone(folder))
            _same(folder, config)
        study = _Training(agent, data, config, folder)
        stop = held.enter_context(interruptible())
        return study.finish(progress, stop, checkpoint_seconds)


def _same(folder: Path, config: dict[str, Any]) -> None:
    """Write the settings, or see that they are those of the folder."""
    path = folder / "config.json"
    if not path.exists():
        records.write_record(path, config)
        return
    old = records.read_record(path)
    differ = [
        f"{name} is {old.get(name)} there and {value} here"
        for name, value in config.items()
        if old.get(name) != value
    ]
    if differ:
        raise ValueError(
            f"{folder} holds another run ({'; '.join(differ[:2])[:300]}): "
            "choose another folder"
        )


class _Training:
    """A run of an imitator, wherever it is."""

    def __init__(self, agent, data: Demonstrations, config, folder):
        self.agent, self.demo, self.config = agent, data, config
        self.folder, self.curve, self.seconds = folder, [], 0.0
        c = agent.config
        self.data = prepare(data, c.method, c.discount)
        self.state = init_seeds(agent, tuple(config["seeds"]))
        self.metrics: dict[str, Any] = {}
        path = folder / "checkpoint.npz" if folder else None
        if path and path.exists():
            tree, facts = records.load(path, self.state)
            self.state = jax.tree.map(jnp.asarray, tree)
            self.curve, self.seconds = facts["curve"], facts["seconds"]

    @property
    def done(self) -> int:
        """Updates made."""
        return int(self.state.step)

    def policy(self, i: int) -> Policy:
        """The policy of one seed."""
        demo = self.demo
        scale = self._scale()
        return Policy(
            self.agent, self.state, demo.task, demo.low, demo.high, i, scale
        )

    def _scale(self) -> Scale:
        num = len(self.config["seeds"])
        return Scale(*(np.stack([x] * num) for x in self.demo.scale))

    def finish(self, progress, stop, checkpoint_seconds: float) -> Run:
        """Go on to the end."""
        total, each = self.config["steps"], self.config["evaluations"]
        begun, saved = time.monotonic() - self.seconds, time.monotonic()
        seeds = self.config["seeds"]
        roots = jnp.stack([jax.random.PRNGKey(seed) for seed in seeds])
        while self.done < total:
            marks = [-(-total * (i + 1) // each) for i in range(each)]
            goal = min(m for m in marks if m > self.done)
            num = min(CHUNK, goal - self.done)
            keys = fold(roots, self.done + 1)
            self.state, metrics = learn(
                self.agent, self.state, self.data, keys, num
            )
            self.metrics = {k: np.asarray(v) for k, v in metrics.items()}
            self._check()
            self.seconds = time.monotonic() - begun
            if self.done == goal:
                self._evaluate()
            try:
                if progress:
                    progress(self.done, self.metrics)
            except Exception:
                if self.folder:
                    self._save()
                raise
            late = time.monotonic() - saved > checkpoint_seconds
            if self.folder and (late or stop.is_set() or self.done == total):
                self._save()
                saved = time.monotonic()
            if stop.is_set() and self.done < total:
                raise stop.raises
        return self._run()

    def _check(self) -> None:
        bad = [k for k, v in self.metrics.items() if not np.isfinite(v).all()]
        if bad:
            raise FloatingPointError(
                f"{bad[0]} is not finite after {self.done} updates"
            )

    def _evaluate(self) -> None:
        values = [
            evaluate(self.policy(i), episodes=self.config["episodes"],
                     seed=EVALUATION_SEED + seed).tolist()
            for i, seed in enumerate(self.config["seeds"])
        ]  # fmt: skip
        self.metrics["evaluation/return"] = np.mean(values, axis=1)
        self.curve.append({
            "step": self.done, "updates": self.done, "seconds": self.seconds,
            "returns": values,
            "metrics": {k: v.tolist() for k, v in self.metrics.items()},
        })  # fmt: skip

    def _record(self) -> dict[str, Any]:
        names = "algo", "env", "profile", "seeds", "steps"
        return records.as_json(
            {name: self.config[name] for name in names}
            | {"config": {k: self.config[k] for k in ("agent", "data")},
               "curve": self.curve, "wall_seconds": self.seconds,
               "provenance": records.provenance()}
        )  # fmt: skip

    def _save(self) -> None:
        facts = {"curve": self.curve, "seconds": self.seconds}
        records.save(self.folder / "checkpoint.npz", self.state, facts)
        save_policy(
            self.folder / "policy.npz", self.config, self.agent, self.state,
            self.demo.low, self.demo.high, self._scale(),
        )  # fmt: skip
        records.write_record(self.folder / "record.json", self._record())

    def _run(self) -> Run:
        policies = [self.policy(i) for i in range(len(self.config["seeds"]))]
        return Run(
            self._record(), policies[0], self.folder, policies, policies
        )


# %% From the command line
def _imitate(args: argparse.Namespace) -> None:
    expert, others = (
        read_set(name, args.root) for name in (args.expert, args.others)
    )
    data = demonstrations(expert, others, args.known, args.hidden)
    config = Imitator.profiles["laptop"]
    given = dict(override(text, config) for text in args.overrides)
    out = Path(args.out)
    with ProgressLine(args.steps, plain_console(), unit="updates") as line:
        run = train_imitator(
            data, args.steps, args.seeds, out=out, progress=line, **given
        )
    final = np.mean(run.record["curve"][-1]["returns"], axis=1)
    mean, low, high = map(float, records.mean_ci(final))
    print(f"{run.policy.env_id}, {len(final)} seed(s):")
    print(f"  return {records.in_words(mean, low, high, '.1f')}")
    if references(data.task):
        print(f"  score  {normalized_score(data.task, mean):.1f}")
    print(f"  policy {out / 'policy.npz'}")


def _add_imitate(commands: Any) -> None:
    command = commands.add_parser(
        "imitate",
        help="learn a policy from recordings of an expert",
        description="Learn a policy from recordings of an expert and of "
        "others; typed again, go on with what is unfinished.",
    )
    command.set_defaults(
        run=_imitate,
        interrupted="interrupted; the same command goes on from what is "
        "saved.",
    )
    option = command.add_argument
    option("expert", help="set of the expert's episodes (no default)")
    option("others", help="set of other episodes (no default)")
    option("--known", type=count, default=1, metavar="N",
           help="episodes known to be the expert's (default: 1)")  # fmt: skip
    option("--hidden", type=int, default=10, metavar="N",
           help="more of them, among the others (default: 10)")  # fmt: skip
    option("--steps", type=count, default=100_000, metavar="N",
           help="updates (default: 1e5)")  # fmt: skip
    option("--seeds", type=seed_list, default=(0,), metavar="SEEDS",
           help="a number of seeds, or the seeds themselves with commas "
           "(default: 1)")  # fmt: skip
    option("--out", default="runs/imitator", metavar="DIR",
           help="run folder (default: runs/imitator)")  # fmt: skip
    option("--root", metavar="DIR",
           help="folder of all sets (default: Minari's own)")  # fmt: skip
    option("--set", action="append", default=[], metavar="FIELD=VALUE",
           dest="overrides", help="change one setting, such as "
           "method=IGI or discount=0.9; may be repeated (default: "
           "none)")  # fmt: skip


COMMANDS["imitate"] = _add_imitate


# %% The study
DISCOUNTS = (0.5, 0.8, 0.9, 0.95, 0.99, 0.995)
ALPHAS = (0.0, 0.05, 0.2, 1.0)  # of DemoDICE
UPDATES = 100_000


def settings_of_arms() -> dict[str, dict[str, Any]]:
    """The settings of each method and discount, by a name."""
    found: dict[str, dict[str, Any]] = {}
    for method in ("uncorrected", "IGI", "telescoped", "discounted ratio"):
        for gamma in DISCOUNTS:
            found[f"{method}, {gamma}"] = {
                "method": method,
                "discount": gamma,
            }
    for alpha in ALPHAS:
        found[f"DemoDICE, {alpha}"] = {
            "method": "DemoDICE", "discount": 0.99, "union_weight": alpha
        }  # fmt: skip
    for method in ("weighted cloning", "expert cloning", "union cloning"):
        found[method] = {"method": method}
    return found


def arms(
    known: Sequence[int] = (1,), others: Sequence[str] = ("random",)
) -> dict[str, dict[str, Any]]:
    """Arms of the study, by name: task, data, settings, steps.

    Args:
        known: numbers of known episodes.
        others: kinds of the other episodes.
    """
    found = {}
    for env in ROBOTS:
        for number in known:
            for kind in others:
                place = f"{env}, {number} known, {kind}"
                for name, settings in settings_of_arms().items():
                    found[f"{place}: {name}"] = {
                        "env": env, "known": number, "hidden": 10,
                        "others": kind,
                        "steps": UPDATES, "settings": settings,
                    }  # fmt: skip
    return found


@dataclass(frozen=True)
class ImitationStudy:
    """Arms to be trained, all seeds of an arm side by side.

    Args:
        arms: by name, as `arms` makes them.
        root: the folder of all sets; None: Minari's own.
        most_seeds: no more than so many, however many are asked for.
        overnight: `som study all` leaves it out.
    """

    arms: dict[str, dict[str, Any]]
    root: str | Path | None = None
    most_seeds: int | None = None
    overnight: bool = True

    def total(self, steps: int | None) -> int:
        """Updates of all arms together."""
        return sum(steps or arm["steps"] for arm in self.arms.values())

    def run(
        self, path, seeds, steps=None, progress=None, processes=1
    ) -> dict[str, Any]:
        """Train every arm and write the record; go on with one begun.

        Args:
            path: of the record, ending in .json.
            seeds: one imitator each.
            steps: updates, in the place of each arm's own.
            progress: told the updates made so far, and the arm's name.
            processes: not used; XLA uses the cores.

        Raises:
            ValueError: a set is missing.
        """
        change = {"steps": steps} if steps else {}
        arms = {name: arm | change for name, arm in self.arms.items()}
        size = lambda arm: arm["steps"]
        return records.make_arms(path, seeds, arms, self._arm, size, progress)

    def _arm(self, arm, seeds, tell) -> dict[str, Any]:
        place = f"som/{arm['env'].rpartition('-')[0].lower()}"
        expert = read_set(f"{place}/expert-v0", self.root)
        others = read_set(f"{place}/{arm['others']}-v0", self.root)
        data = demonstrations(expert, others, arm["known"], arm["hidden"])
        run = train_imitator(
            data, arm["steps"], seeds, progress=lambda n, _: tell(n),
            evaluations=1, **arm["settings"],
        )  # fmt: skip
        last = run.record["curve"][-1]
        return {
            "returns": np.mean(last["returns"], axis=1).round(2).tolist(),
            "metrics": last["metrics"], "data": data.names,
            "seconds": run.record["wall_seconds"],
        }  # fmt: skip


def is_short(settings: dict[str, Any]) -> bool:
    """Whether the short study has a method with these settings."""
    return (
        settings["method"] != "discounted ratio"
        and settings.get("discount", 0.9) in (0.5, 0.9, 0.99)
        and settings.get("union_weight", 0.2) in (0.05, 0.2)
    )


STUDIES["imitation"] = ImitationStudy(arms())
STUDIES["imitation-short"] = ImitationStudy(
    {
        name: arm | {"steps": 10_000}
        for name, arm in arms().items()
        if is_short(arm["settings"])
    }
)
STUDIES["imitation-more"] = ImitationStudy(
    {
        name: arm
        for name, arm in arms((1, 5), ("random", "medium-replay")).items()
        if name not in arms()
    }
)
