"""Imitation with a short horizon.

Exported by tools/export.py from book/relatives/horizon.md; edit the chapter.
"""

__all__ = [
    "World",
    "ring",
    "line",
    "walk",
    "transition",
    "visitation",
    "time_average",
    "score",
    "EXPERT",
    "episodes",
    "counts",
    "Dual",
    "dual",
    "solve_dual",
    "clone",
    "Recordings",
    "record_episodes",
    "log_ratio",
    "igi_weights",
    "start_law",
    "METHODS",
    "ALPHA_D",
    "imitate",
    "DISCOUNTS",
    "FLOORS",
    "WORLDS",
    "sample_size",
    "hidden_share",
    "compare",
]

# %% Imports
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.special import logsumexp

from som.agent.actor_critic import closest


# %% Two worlds of forty states
class World(NamedTuple):
    """Finitely many states, deterministic steps, a start in state 0.

    Args:
        next_state: where each action leads, [S, A].
        reward: of each action in each state, [S, A]; for tests only, no
            imitator sees it.
        horizon: steps of an episode, H.
    """

    next_state: Int[np.ndarray, "S A"]
    reward: Float[np.ndarray, "S A"]
    horizon: int

    @property
    def first(self) -> Float[np.ndarray, "S"]:
        """The law of the first state: all mass on state 0."""
        return np.eye(len(self.next_state))[0]


def ring(size: int = 40) -> World:
    """A circle of states; -1 for each step back, 1 for each ahead."""
    state = np.arange(size)
    steps = np.stack([state - 1, state + 1], 1) % size
    return World(steps, np.tile([-1.0, 1.0], (size, 1)), 5 * size)


def line(size: int = 40) -> World:
    """A path between two walls; 1 for each push against the far one."""
    state = np.arange(size)
    steps = np.stack([state - 1, state + 1], 1).clip(0, size - 1)
    reward = np.zeros((size, 2))
    reward[-1, 1] = 1.0
    return World(steps, reward, 5 * size // 2)


def walk(world: World, ahead: float) -> Float[np.ndarray, "S 2"]:
    """The policy that goes ahead with one probability in every state."""
    return np.tile([1 - ahead, ahead], (len(world.next_state), 1))


def transition(
    world: World, policy: Float[np.ndarray, "S A"]
) -> Float[np.ndarray, "S S"]:
    """Probability of each next state (column) from each state (row)."""
    matrix = np.zeros((len(policy), len(policy)))
    rows = np.arange(len(policy))[:, None]
    np.add.at(matrix, (rows, world.next_state), policy)
    return matrix


def visitation(
    world: World,
    policy: Float[np.ndarray, "S A"],
    discount: float,
    start: Float[np.ndarray, "S"],
) -> Float[np.ndarray, "S A"]:
    """Discounted visitation of a policy: the flow equation, solved.

    Args:
        world: S states and A actions.
        policy: probabilities of the actions, each row sums to one.
        discount: gamma, below one.
        start: law of the first state; may have negative entries.

    Returns:
        Shares of the states and actions, together one.
    """
    flow = np.eye(len(policy)) - discount * transition(world, policy).T
    state = np.linalg.solve(flow, (1 - discount) * start)
    return state[:, None] * policy


def time_average(
    world: World, policy: Float[np.ndarray, "S A"]
) -> Float[np.ndarray, "S A"]:
    """Mean over an episode's H steps of the probabilities (s, a)."""
    matrix, state = transition(world, policy), world.first
    total = np.zeros(len(policy))
    for _ in range(world.horizon):
        total += state
        state = state @ matrix
    return total[:, None] * policy / world.horizon


def score(world: World, policy: Float[np.ndarray, "S A"]) -> float:
    """Exact return: 0 is that of coin tosses, 100 the expert's.

    A policy that slips less than the expert gets more than 100.
    """
    coin, expert, mine = (
        float(np.sum(time_average(world, p) * world.reward))
        for p in (walk(world, 0.5), walk(world, EXPERT), policy)
    )
    return 100 * (mine - coin) / (expert - coin)


EXPERT = 0.9  # of its steps the expert goes ahead; in the others it slips


def episodes(
    world: World,
    policy: Float[np.ndarray, "S A"],
    num: int,
    rng: np.random.Generator,
) -> tuple[Int[np.ndarray, "N T"], Int[np.ndarray, "N H"]]:
    """Play N episodes.

    Returns:
        States [N, H + 1], the one after the last step included, and
        actions [N, H].
    """
    states = np.zeros((num, world.horizon + 1), int)
    actions = np.zeros((num, world.horizon), int)
    ladder = np.cumsum(policy, 1)[:, :-1]
    for t in range(world.horizon):
        above = rng.random((num, 1)) > ladder[states[:, t]]
        actions[:, t] = above.sum(1)
        states[:, t + 1] = world.next_state[states[:, t], actions[:, t]]
    return states, actions


def counts(
    world: World, states, actions, weights=1.0
) -> Float[np.ndarray, "S A"]:
    """How often each action was taken in each state.

    Args:
        world: S states and A actions.
        states: [N, H + 1] of episodes; the last of each is not counted.
        actions: [N, H].
        weights: of the steps, broadcast to [N, H].
    """
    table = np.zeros(world.reward.shape)
    np.add.at(table, (states[:, :-1], actions), weights)
    return table


# %% Match the expert's visitation
class Dual(NamedTuple):
    """The dual at some multipliers.

    Args:
        value: F(nu), in nats.
        gradient: the flow that is missing in each state, [S].
        visits: the weighted recordings d = zeta d^D, [S, A]; sum to one.
        nu: the multipliers, [S].
    """

    value: float
    gradient: Float[np.ndarray, "S"]
    visits: Float[np.ndarray, "S A"]
    nu: Float[np.ndarray, "S"]


def dual(
    world: World,
    union: Float[np.ndarray, "S A"],
    ratio: Float[np.ndarray, "S A"],
    start: Float[np.ndarray, "S"],
    discount: float,
    nu: Float[np.ndarray, "S"],
    union_weight: float = 0.0,
) -> Dual:
    """The dual of visitation matching, derived in the chapter.

    The objective of DemoDICE (Kim et al. 2022), whose alpha is
    union_weight; arXiv 2401.09728 has it at zero.

    Args:
        world: S states and A actions.
        union: counts or shares of all recorded steps.
        ratio: log d^E / d^D; -inf where the expert never was.
        start: law of the first state; may have negative entries.
        discount: gamma, below one.
        nu: multipliers.
        union_weight: weight of KL(d || d^D) in the primal.
    """
    scale = 1 + union_weight
    delta = ratio + discount * nu[world.next_state] - nu[:, None]
    with np.errstate(divide="ignore"):  # log 0 = -inf: never recorded
        logits = np.log(union / union.sum()) + delta / scale
    log_mean = logsumexp(logits)
    visits = np.exp(logits - log_mean)
    to = world.next_state.ravel()
    inflow = np.bincount(to, visits.ravel(), len(nu))
    source = (1 - discount) * start
    gradient = source + discount * inflow - visits.sum(1)
    value = float(source @ nu + scale * log_mean)
    return Dual(value, gradient, visits, nu)


# %% Newton, state by state
def solve_dual(
    world: World,
    union: Float[np.ndarray, "S A"],
    ratio: Float[np.ndarray, "S A"],
    start: Float[np.ndarray, "S"],
    discount: float,
    union_weight: float = 0.0,
) -> Dual:
    """Minimise the dual by damped Newton steps, each state in its unit.

    Args:
        world, union, ratio, start, discount, union_weight: as in dual.

    Raises:
        ArithmeticError: no minimum; some start state was never left in
            the recordings, or the flow has nowhere to go.
    """
    size = union.size
    moves = np.zeros((size, len(start)))  # delta = ratio + moves @ nu
    pairs = np.arange(size)
    np.add.at(moves, (pairs, world.next_state.ravel()), discount)
    np.add.at(moves, (pairs, pairs // union.shape[1]), -1.0)
    look = lambda nu: dual(
        world, union, ratio, start, discount, nu, union_weight
    )
    now, damping = look(np.zeros(len(start))), 1.0
    for _ in range(500):  # about 100 are needed at gamma = 0.1
        missing = np.abs(now.gradient)
        unit = now.visits.sum(1) + missing + 1e-290  # no division by zero
        worst = np.max(missing / unit)
        if worst < 1e-9:
            return now
        d, mean = now.visits.ravel(), now.visits.ravel() @ moves
        hessian = (moves.T * d) @ moves - np.outer(mean, mean)
        scale = 1 / np.sqrt(unit)
        scaled = scale[:, None] * hessian * scale / (1 + union_weight)
        # F does not change with a constant in nu: 1e-12 makes it solvable.
        scaled += (damping * worst + 1e-12) * np.eye(len(start))
        step = -scale * np.linalg.solve(scaled, scale * now.gradient)
        new = look(now.nu + step)
        # 1e-13: what rounding does to F where visits are tiny.
        if new.value <= now.value + 1e-4 * now.gradient @ step + 1e-13:
            now, damping = new, max(damping / 4, 1e-6)
        else:
            damping *= 4
    raise ArithmeticError(
        f"no visitation was found: a state lacks {worst:.1e} of its flow"
    )


# %% From weights to a policy
def clone(
    visits: Float[np.ndarray, "S A"], floor: float = 0.0
) -> Float[np.ndarray, "S A"]:
    """The policy that weighted cloning learns.

    Args:
        visits: weights of states and actions; need not sum to one.
        floor: share of all weight that is spread evenly.

    Returns:
        Probabilities; coin tosses in a state without any weight.
    """
    table = (1 - floor) * visits / visits.sum() + floor / visits.size
    total = table.sum(1, keepdims=True)
    even = np.full_like(table, 1 / table.shape[1])
    return np.divide(table, total, out=even, where=total > 0)


class Recordings(NamedTuple):
    """What an imitator gets, and what is only for looking.

    Args:
        states, actions: the known episode of the expert, [1, H + 1] and
            [1, H].
        expert, union: counts of its steps and of all steps, [S, A].
        hidden: counts of the expert's steps in the large pile.
    """

    states: Int[np.ndarray, "1 T"]
    actions: Int[np.ndarray, "1 H"]
    expert: Float[np.ndarray, "S A"]
    union: Float[np.ndarray, "S A"]
    hidden: Float[np.ndarray, "S A"]


def record_episodes(
    world: World, others: int, rng: np.random.Generator
) -> Recordings:
    """One expert episode, two hidden ones, and others by coin tosses."""
    states, actions = episodes(world, walk(world, EXPERT), 1, rng)
    hidden = counts(world, *episodes(world, walk(world, EXPERT), 2, rng))
    rest = counts(world, *episodes(world, walk(world, 0.5), others, rng))
    expert = counts(world, states, actions)
    union = expert + hidden + rest
    return Recordings(states, actions, expert, union, hidden)


def log_ratio(
    expert: Float[np.ndarray, "S A"],
    union: Float[np.ndarray, "S A"],
    prior: float = 0.01,
) -> Float[np.ndarray, "S A"]:
    """The discriminator's log d^E / d^D, from counts.

    Args:
        expert, union: counts of steps.
        prior: steps added to every pair of both; with 0 the ratio is
            exact, and -inf where the expert never was.
    """
    of_expert, of_union = (
        (c + prior) / np.sum(c + prior) for c in (expert, union)
    )
    there = of_expert > 0
    ratio = np.full_like(of_expert, -np.inf)
    ratio[there] = np.log(of_expert[there] / of_union[there])
    return ratio


# %% Start where the expert was
def igi_weights(horizon: int, discount: float) -> Float[np.ndarray, "T"]:
    """Weights of the times 0, ..., H from which to start; they sum to one.

    Inverse geometric initial state sampling (arXiv 2401.09728), in the
    form that the chapter derives; the last weight is negative.
    """
    weights = np.ones(horizon + 1)
    weights[0] = 1 / (1 - discount)
    weights[-1] = -discount / (1 - discount)
    return weights / horizon


def start_law(
    world: World, states: Int[np.ndarray, "N T"], discount: float, tail: bool
) -> Float[np.ndarray, "S"]:
    """The corrected law of the first state, from expert episodes.

    Args:
        world: S states.
        states: of N episodes, [N, H + 1].
        discount: gamma, below one.
        tail: keep the negative weight of the last state; else drop it
            and divide by the sum of the others.
    """
    weights = igi_weights(states.shape[1] - 1, discount)
    if not tail:
        weights[-1] = 0.0
    law = np.zeros(len(world.next_state))
    np.add.at(law, states, np.broadcast_to(weights, states.shape))
    return law / law.sum()


# %% The other remedy
METHODS = (
    "uncorrected",  # from the first state: DemoDICE with alpha 0
    "IGI",  # the corrected start law, its tail dropped
    "telescoped",  # the corrected start law with its tail
    "discounted ratio",  # from the first state, expert steps times gamma^t
    "DemoDICE",  # from the first state, with a regulariser
)
ALPHA_D = 0.5  # DemoDICE's alpha here: half as much weight on d^D as on d^E


def imitate(
    world: World, data: Recordings, method: str, discount: float
) -> Float[np.ndarray, "S A"]:
    """The weighted recordings from which a method clones.

    Args:
        world: S states and A actions.
        data: what was recorded there.
        method: one of METHODS.
        discount: gamma, below one.

    Raises:
        ValueError: an unknown method, or no discount.
    """
    method = closest(method, METHODS, "method")
    if not 0 <= discount < 1:
        raise ValueError(f"discount is {discount}; wanted is 0 <= gamma < 1")
    expert, start = data.expert, world.first
    if method == "discounted ratio":
        fade = discount ** np.arange(world.horizon)
        expert = counts(world, data.states, data.actions, fade)
    elif method in ("IGI", "telescoped"):
        tail = method == "telescoped"
        start = start_law(world, data.states, discount, tail)
    ratio = log_ratio(expert, data.union)
    union_weight = ALPHA_D if method == "DemoDICE" else 0.0
    best = solve_dual(world, data.union, ratio, start, discount, union_weight)
    return best.visits


# %% All methods, all discounts
DISCOUNTS = (0.1, 0.5, 0.8, 0.9, 0.95, 0.99)
FLOORS = (0.0, 0.01)  # a table; something like a network
WORLDS: dict[str, dict[str, Any]] = {
    "ring": {"make": ring, "others": 40},
    "line": {"make": line, "others": 20},
}


def sample_size(
    visits: Float[np.ndarray, "S A"], union: Float[np.ndarray, "S A"]
) -> float:
    """Effective share of the recorded steps, in (0, 1].

    Args:
        visits: weights of the pairs, together one; the steps of a pair
            share its weight.
        union: counts of the steps.
    """
    there = union > 0
    square = np.sum(visits[there] ** 2 / union[there])
    return float(1 / (square * union.sum()))


def hidden_share(visits: Float[np.ndarray, "S A"], data: Recordings) -> float:
    """Share of all weight that falls on the expert's hidden steps."""
    there = data.union > 0
    part = data.hidden[there] / data.union[there]
    return float(np.sum(visits[there] * part))


def compare(name: str, seed: int) -> dict[str, Any]:
    """All methods, discounts and floors on one draw of recordings.

    Args:
        name: of one of WORLDS.
        seed: of the recordings.

    Returns:
        `returns` by method, floor and discount; `size` and `hidden` by
        method and discount; `cloned`, by floor, from the expert's episode
        and from the union.
    """
    world = WORLDS[name]["make"]()
    rng = np.random.default_rng(seed)
    data = record_episodes(world, WORLDS[name]["others"], rng)
    rates = lambda visits: [score(world, clone(visits, f)) for f in FLOORS]
    result: dict[str, Any] = {"returns": {}, "size": {}, "hidden": {}}
    for method in METHODS:
        all_visits = [imitate(world, data, method, g) for g in DISCOUNTS]
        by_floor = np.transpose([rates(v) for v in all_visits])
        result["returns"][method] = by_floor
        sizes = [sample_size(v, data.union) for v in all_visits]
        result["size"][method] = np.array(sizes)
        shares = [hidden_share(v, data) for v in all_visits]
        result["hidden"][method] = np.array(shares)
    result["cloned"] = {
        "expert": np.array(rates(data.expert)),
        "union": np.array(rates(data.union)),
    }
    return result
