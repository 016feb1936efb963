"""A policy outside of JAX.

Exported by tools/export.py from book/training/export.md; edit the chapter.
"""

__all__ = [
    "affine",
    "layers",
    "first_noise",
    "OnePass",
    "one_pass",
    "twins",
    "ACTIVATIONS",
    "to_arrays",
    "load",
    "bend",
    "net",
    "shown",
    "candidates",
    "value",
    "act",
    "BENDS",
    "net_lines",
    "shown_lines",
    "candidate_lines",
    "best_lines",
    "to_onnx",
    "check",
    "PLAYER",
    "with_candidates",
    "export",
]

# %% Imports
import copy
import inspect
import zipfile
from dataclasses import replace
from functools import singledispatch
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from som.agent.networks import EPSILON, Critic, TimeEmbedding
from som.agent.som import OneStep
from som.training import environments, records
from som.training.policy import CLIP, Policy


# %% The layers, written out
def affine(params: Any, past: Any, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of an MLP's i-th layer, with its normalisation.

    Args:
        params: the MLP's kernels and biases, scales and shifts.
        past: the running statistics, empty if it does not normalise.
        i: which layer.
    """
    layer = params[f"Dense_{i}"]
    kernel, bias = np.asarray(layer["kernel"]), layer.get("bias", 0.0)
    if not past:
        return kernel, np.asarray(bias)
    norm, seen = params[f"BatchNorm_{i}"], past[f"BatchNorm_{i}"]
    mean, var = np.asarray(seen["mean"]), np.asarray(seen["var"])
    scale = np.asarray(norm["scale"]) / np.sqrt(var + EPSILON)
    shift = np.asarray(norm["bias"]) - mean * scale
    return scale[:, None] * kernel, np.asarray(bias) + shift @ kernel


def layers(
    name: str,
    params: Any,
    num_inputs: int,
    constants: Any = (),
    outputs: int | None = None,
    past: Any = (),
) -> dict[str, np.ndarray]:
    """The affine layers of an `MLP` as arrays with names.

    Args:
        name: of the network; every array's name begins with it.
        params: the MLP's.
        num_inputs: how many of its inputs stay inputs.
        constants: values of the inputs after these.
        outputs: how many of its outputs are wanted; None: all.
        past: its running statistics, if it normalises.

    Returns:
        NAME_in_I, a kernel for each input; NAME_bias_0; then NAME_kernel_K
        and NAME_bias_K of the layers K = 1, 2, ...
    """
    num = sum(key.startswith("Dense_") for key in params)
    pairs = [affine(params, past, i) for i in range(num)]
    kernels, biases = map(list, zip(*pairs, strict=True))
    first = num_inputs + len(constants)
    for i, value in enumerate(constants, num_inputs):
        biases[i] = biases[i] + np.asarray(value) @ kernels[i]
    arrays = {f"{name}_in_{i}": kernels[i] for i in range(num_inputs)}
    arrays[f"{name}_bias_0"] = sum(biases[1:first], biases[0])
    kernels[-1] = kernels[-1][:, :outputs]
    biases[-1] = biases[-1][:outputs]
    rest = zip(kernels[first:], biases[first:], strict=True)
    for k, (kernel, bias) in enumerate(rest, 1):
        arrays |= {f"{name}_kernel_{k}": kernel, f"{name}_bias_{k}": bias}
    return arrays


# %% Which agents act in one pass
def first_noise(num: int, size: int, split: bool = True) -> np.ndarray:
    """The standard normal noise of `policy(s, seed=0)`, [N, A].

    Args:
        num, size: N and A.
        split: whether the agent's act splits its key, as the frame's does.
    """
    key = jax.random.PRNGKey(0)
    k_action = jax.random.split(key)[0] if split else key
    k_noise, _ = jax.random.split(k_action)
    return np.asarray(jax.random.normal(k_noise, (num, size)))


class OnePass(NamedTuple):
    """How an agent's action comes out of one pass of one network."""

    form: str  # "step", "end", "squash" or "gauss"; see candidates
    net: dict[str, np.ndarray]  # its layers, named "policy"
    noise: np.ndarray  # of N candidates, [N, A]; zero: the mean acts
    log_std: tuple[float, float] = (-np.inf, np.inf)  # its bounds


@singledispatch
def one_pass(agent: Any, state) -> OnePass:
    """What an agent acts with, if it does so in one pass.

    Args:
        agent: the algorithm; later chapters register theirs.
        state: of one seed.

    Raises:
        ValueError: it does not, or nobody has said how.
    """
    raise ValueError(
        f"no export is known for {type(agent).__name__}: it is known for "
        "agents that act in one pass of one network, som, mfp, sac and ppo"
    )


@one_pass.register(OneStep)
def _(agent, state) -> OnePass:
    params = agent.acting_policy(state)["params"]
    embed = lambda i: TimeEmbedding().apply(
        {"params": params[f"TimeEmbedding_{i}"]}, jnp.ones(())
    )  # of t and of t - r: both are one
    net = layers("policy", params["MLP_0"], 2, (embed(0), embed(1)))
    noise = first_noise(agent.config.num_particles, agent.action_size)
    form = "end" if agent.config.residual else "step"
    return OnePass(form, net, noise)


def twins(agent: Any, critic) -> dict[str, np.ndarray]:
    """The layers of both twins' means, named "q0" and "q1".

    Raises:
        ValueError: the critic is another network.
    """
    if not isinstance(agent.critic_net, Critic):
        raise ValueError(
            f"{type(agent).__name__} has a critic of its own kind; one "
            "candidate, without its critic, can be exported"
        )
    arrays: dict[str, np.ndarray] = {}
    for j in (0, 1):
        parts = jax.tree.map(lambda x, j=j: x[j], critic)
        past = parts.get("batch_stats", {}).get("VmapMLP_0", {})
        params = parts["params"]["VmapMLP_0"]
        arrays |= layers(f"q{j}", params, 2, outputs=1, past=past)
    return arrays


# %% All of it as arrays
ACTIVATIONS = ("gelu", "mish", "relu", "tanh")  # what both players know


def to_arrays(policy: Policy) -> dict[str, np.ndarray]:
    """All that an action of a policy is made of, as arrays with names.

    Raises:
        ValueError: an agent or an activation that cannot be exported.
    """
    agent = policy.agent
    how, bend = one_pass(agent, policy.state), agent.config.activation
    if bend not in ACTIVATIONS:
        raise ValueError(
            f"activation is {bend!r}; one of {', '.join(ACTIVATIONS)} can "
            "be exported"
        )
    numbers = how.net | {
        "noise": how.noise,
        "prior_std": getattr(agent, "prior_std", 1.0),
        "reward_scale": agent.config.reward_scale,
        "log_std_bounds": how.log_std,
        "low": policy.low,
        "high": policy.high,
    }
    if len(how.noise) > 1:
        numbers |= twins(agent, policy.state.critic)
    if policy.scale is not None:
        mean, std = policy.scale
        numbers |= {"seen_mean": mean, "seen_std": std, "seen_clip": CLIP}
    words = {"form": np.array(how.form), "activation": np.array(bend)}
    return words | {k: np.asarray(v, np.float32) for k, v in numbers.items()}


# %% A player in NumPy
def load(path):
    """The arrays of an exported policy; no code is run."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def bend(arrays, x):
    """The activation between the layers."""
    kind = str(arrays["activation"])
    if kind == "gelu":
        x3 = x * x * x
        return x / 2 * (1 + np.tanh(0.7978846 * (x + 0.044715 * x3)))
    if kind == "mish":
        return x * np.tanh(np.logaddexp(0, x))
    return np.tanh(x) if kind == "tanh" else np.maximum(x, 0)


def net(arrays, name, *inputs):
    """Outputs of a network, "policy", "q0" or "q1", at its inputs."""
    h = sum(x @ arrays[f"{name}_in_{i}"] for i, x in enumerate(inputs))
    h, k = h + arrays[f"{name}_bias_0"], 1
    while f"{name}_kernel_{k}" in arrays:
        h = bend(arrays, h) @ arrays[f"{name}_kernel_{k}"]
        h, k = h + arrays[f"{name}_bias_{k}"], k + 1
    return h


def shown(arrays, observation):
    """What the networks are shown: in deviations, if they learned so."""
    s = np.asarray(observation, np.float32)
    if "seen_mean" not in arrays:
        return s
    s, most = s - arrays["seen_mean"], arrays["seen_clip"]
    return np.clip(s / arrays["seen_std"], -most, most)


def candidates(arrays, observation, noise):
    """Actions in [-1, 1], [N, A], from standard normal noise [N, A]."""
    if arrays["form"] in ("step", "end"):
        z = arrays["prior_std"] * noise
        f = net(arrays, "policy", observation, z)
        return np.clip(z * (arrays["form"] == "step") - f, -1, 1)
    mean, log_std = np.split(net(arrays, "policy", observation), 2)
    u = mean + np.exp(np.clip(log_std, *arrays["log_std_bounds"])) * noise
    return np.clip(np.tanh(u) if arrays["form"] == "squash" else u, -1, 1)


def value(arrays, observation, actions):
    """Q of actions in [-1, 1], [N, A]: the smaller twin's, [N]."""
    twins = [net(arrays, q, observation, actions) for q in ("q0", "q1")]
    return np.minimum(*twins)[:, 0] / arrays["reward_scale"]


def act(arrays, observation, noise=None):
    """The action [A] at an observation [O], in the task's units.

    It is the best of the candidates from noise [N, A], standard normal;
    without any, of those from the noise in the file, always the same.
    """
    s = shown(arrays, observation)
    noise = arrays["noise"] if noise is None else noise
    actions = candidates(arrays, s, np.asarray(noise, np.float32))
    best = np.argmax(value(arrays, s, actions)) if "q0_in_0" in arrays else 0
    low, high = arrays["low"], arrays["high"]
    middle, reach = (high + low) / 2, (high - low) / 2
    return np.clip(middle + reach * actions[best], low, high)


# %% The same as a graph
BENDS = {
    "gelu": 'Gelu <approximate = "tanh">',
    "mish": "Mish",
    "relu": "Relu",
    "tanh": "Tanh",
}  # the operations of ONNX's set 20


def net_lines(arrays: dict[str, np.ndarray], name: str, *inputs) -> list[str]:
    """The lines of a network; its outputs are called NAME."""
    kind, h, k = BENDS[str(arrays["activation"])], f"{name}_0", 1
    parts = [f"{name}_part_{i}" for i in range(len(inputs))]
    lines = [
        f"{part} = MatMul ({x}, {name}_in_{i})"
        for i, (part, x) in enumerate(zip(parts, inputs, strict=True))
    ]
    lines.append(f"{h} = Sum ({', '.join(parts)}, {name}_bias_0)")
    while f"{name}_kernel_{k}" in arrays:
        lines += [
            f"{name}_bent_{k} = {kind} ({h})",
            f"{name}_sum_{k} = MatMul ({name}_bent_{k}, {name}_kernel_{k})",
            f"{name}_{k} = Add ({name}_sum_{k}, {name}_bias_{k})",
        ]
        h, k = f"{name}_{k}", k + 1
    lines.append(f"{name} = Identity ({h})")
    return lines


def shown_lines(arrays: dict[str, np.ndarray]) -> list[str]:
    """The lines from observation [B, O] to s, what the networks see."""
    if "seen_mean" not in arrays:
        return ["s = Identity (observation)"]
    return [
        "centred = Sub (observation, seen_mean)",
        "deviations = Div (centred, seen_std)",
        "s = Clip (deviations, seen_low, seen_clip)",
    ]


def candidate_lines(arrays: dict[str, np.ndarray]) -> list[str]:
    """The lines from s [B, O] and noise [N, A] to actions."""
    spread = "rows = Unsqueeze (noise, axis_1)"
    if arrays["form"] in ("step", "end"):
        step = arrays["form"] == "step"
        return [
            spread,
            "z = Mul (rows, prior_std)",
            *net_lines(arrays, "policy", "s", "z"),
            f"raw = {'Sub (z, policy)' if step else 'Neg (policy)'}",
            "actions = Clip (raw, lowest, highest)",
        ]
    bend = "Tanh" if arrays["form"] == "squash" else "Identity"
    return [
        spread,
        *net_lines(arrays, "policy", "s"),
        "mean, free_log_std = Split <axis = -1, num_outputs = 2> (policy)",
        "log_std = Clip (free_log_std, log_std_low, log_std_high)",
        "std = Exp (log_std)",
        "shift = Mul (std, rows)",
        "u = Add (mean, shift)",
        f"raw = {bend} (u)",
        "actions = Clip (raw, lowest, highest)",
    ]


def best_lines(arrays: dict[str, np.ndarray]) -> list[str]:
    """The lines from actions [N, B, A] to the action [B, A]."""
    scale = [
        "scaled = Mul (best, reach)",
        "moved = Add (scaled, middle)",
        "bounded = Max (moved, low)",
        "action = Min (bounded, high)",
    ]
    if "q0_bias_0" not in arrays:
        return ["best = Gather <axis = 0> (actions, first)", *scale]
    return [
        *net_lines(arrays, "q0", "s", "actions"),
        *net_lines(arrays, "q1", "s", "actions"),
        "q = Min (q0, q1)",
        "one = ArgMax <axis = 0, keepdims = 1> (q)",
        "index = Expand (one, sizes)",
        "chosen = GatherElements <axis = 0> (actions, index)",
        "best = Squeeze (chosen, axis_0)",
        *scale,
    ]


def to_onnx(arrays: dict[str, np.ndarray], facts: dict[str, str]):
    """The graph from `observation` [B, O], and if one likes `noise` [N, A].

    Args:
        arrays: from to_arrays.
        facts: what to note in the file.

    Returns:
        An onnx.ModelProto whose output is `action` [B, A].

    Raises:
        ValueError: the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise ValueError(
            "an .onnx file is written by the package onnx, which is not "
            "installed here: `pip install onnx` brings it"
        ) from None
    O, A = len(arrays["policy_in_0"]), len(arrays["low"])
    lines = shown_lines(arrays) + candidate_lines(arrays) + best_lines(arrays)
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 20], producer_name: "som">\n'
        f"policy (float[B, {O}] observation, float[N, {A}] noise) => "
        f"(float[B, {A}] action) {{\n" + "\n".join(lines) + "\n}"
    )
    low, high = arrays["log_std_bounds"]
    constants = {
        "axis_0": np.array([0]),
        "axis_1": np.array([1]),
        "first": np.array(0),
        "sizes": np.array([1, 1, A]),
        "middle": (arrays["high"] + arrays["low"]) / 2,
        "reach": (arrays["high"] - arrays["low"]) / 2,
        "lowest": np.float32(-1),
        "highest": np.float32(1),
        "seen_low": -arrays.get("seen_clip", np.float32(0)),
        "log_std_low": low,
        "log_std_high": high,
    }
    for name, value in {**arrays, **constants}.items():
        if any(name in node.input for node in model.graph.node):
            tensor = onnx.numpy_helper.from_array(np.asarray(value), name)
            model.graph.initializer.append(tensor)
    onnx.helper.set_model_props(model, facts)
    onnx.checker.check_model(model, full_check=True)
    return model


# %% The file
def check(policy: Policy, arrays: dict[str, np.ndarray]) -> None:
    """Refuse arrays that do not act as the policy does.

    Raises:
        ValueError: they do not.
    """
    rng, n = np.random.default_rng(0), 8
    low, high = arrays["low"], arrays["high"]
    s = rng.normal(size=(n, policy.agent.observation_size))
    if policy.scale is not None:  # states as it knows them
        s = policy.scale.mean + policy.scale.std * s
    s = s.astype(np.float32)
    ours = policy(s, seed=0)
    plain = np.stack([act(arrays, row) for row in s])
    same = (np.abs(ours - plain) <= 1e-3 * (high - low)).all(-1)
    if "q0_in_0" in arrays:
        a = rng.uniform(-1, 1, (n, len(low))).astype(np.float32)
        pairs = zip(s, a[:, None], strict=True)
        values = [value(arrays, shown(arrays, x), y)[0] for x, y in pairs]
        same |= np.isclose(policy.q(s, ours), policy.q(s, plain), rtol=1e-5)
        expected = policy.q(s, environments.rescale(a, low, high))
        same &= np.isclose(values, expected, rtol=1e-3, atol=1e-3)
    if not same.all():
        raise ValueError(
            f"{policy.algo} with these settings cannot be exported: it "
            "acts by something that the exported arrays do not hold"
        )


PLAYER = '''"""Plays a policy that som exported; needs NumPy and nothing else.

arrays = load("policy.npz")
action = act(arrays, observation)  # in the task's units
"""

import numpy as np


''' + "\n\n".join(
    inspect.getsource(part)
    for part in (load, bend, net, shown, candidates, value, act)
)


def with_candidates(policy: Policy, num: int | None) -> Policy:
    """The same policy with another N of best-of-N; None: as it is.

    Raises:
        ValueError: N below one, or an agent without candidates.
    """
    if num is None:
        return policy
    config, other = policy.agent.config, copy.copy(policy)
    if not hasattr(config, "num_particles"):
        raise ValueError(f"{policy.algo} has one action for each observation")
    config = replace(config, num_particles=num)
    other.agent = replace(policy.agent, config=config)
    return other


def export(policy: Policy, path, candidates: int | None = None) -> Path:
    """Write a policy for a place without JAX, atomically.

    Args:
        policy: what `som.load` returns.
        path: the file; .onnx for a graph, .npz for arrays, beside which
            numpy_policy.py is written.
        candidates: N of best-of-N; by default the agent's own. With one,
            the critics are left out.

    Returns:
        The path.

    Raises:
        ValueError: an agent that cannot be exported, another ending, or
            an .npz of something else in the way.
        records.CheckpointError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".npz"):
        raise ValueError(f"{path} must end in .onnx or .npz")
    policy = with_candidates(policy, candidates)
    arrays = to_arrays(policy)
    check(policy, arrays)
    if path.suffix == ".onnx":
        facts = {"algo": policy.algo, "env": policy.env_id}
        graph = to_onnx(arrays, facts).SerializeToString()
        records.write_atomically(path, lambda file: file.write(graph))
        return path
    if path.exists() and "noise" not in _names(path):
        raise ValueError(f"{path} is no exported policy; it is not replaced")
    code = PLAYER.encode()
    player = path.with_name("numpy_policy.py")
    records.write_atomically(player, lambda file: file.write(code))
    records.write_atomically(
        path, lambda file: np.savez(file, allow_pickle=False, **arrays)
    )
    return path


def _names(path: Path) -> list[str]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return list(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return []
