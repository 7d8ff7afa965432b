"""Step-level Monte Carlo tree search over many prompts in lock-step (section 4.3 of the paper).

In: problems, and a `Model` that proposes steps, judges states and grades responses. Out: a `FinishedTree` for each
problem, from which `mcts.pairs` takes preferences. The trees grow in the lanes of a batch: `mcts.tree` runs compiled
on all lanes at once; this module keeps the tokens of their nodes and asks the model about the states to expand.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from itool_jax import losses
from itool_jax.mcts.tree import (
    NO_PARENT,
    ROOT,
    Candidates,
    NodeExtra,
    Tree,
    ValueWeight,
    backup,
    descend,
    expand,
    new_tree,
    select_child,
)
from itool_jax.text.steps import Granularity
from itool_jax.types import IntB


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Step-level Monte Carlo tree search."""

    n_simulations: int = 16
    """Simulations a prompt: root-to-leaf walks, each backed up once."""
    breadth: int = 3
    """W: steps sampled at each expansion."""
    max_depth: int = 3
    """D: steps in a response; the last one is the whole remainder."""
    exploration: float = 1.0
    """PUCT's exploration constant (eq 5); 0 is greedy."""
    discount: float = 1.0
    """γ of the backup (eq 8)."""
    value_weight: ValueWeight = "visits"
    """Children's weights in a state's value: their visits (eq 9), or max(1, visits) as in arXiv 2405.00451's code."""
    temperature: float = 1.0
    """Sampling temperature of the steps."""
    prior_exponent: float = 1.0
    """λ of the prior exp(Σ log π / length^λ): 0 is the plain product, 1 the geometric mean."""
    granularity: Granularity = "call"
    """A step: one call (or sentence of text), one argument, or one whole list of calls."""
    max_step_tokens: int = 64
    """Longest step, in tokens."""
    max_last_step_tokens: int = 512
    """Longest last step, in tokens."""
    outcome: Literal["binary", "graded"] = "binary"
    """O of a whole response: right or wrong, +1 or -1, or graded between them by how much of the calls is right."""
    inject_gold: bool = True
    """Whether the gold's next step joins the candidates where the response so far is the gold's."""
    batch: int | Literal["auto"] = 64
    """Prompts searched together; auto is as many as fit a device's memory by the compiler's estimate, found once
    and kept with the run."""

    def __post_init__(self) -> None:
        for name in ("n_simulations", "breadth", "max_depth", "max_step_tokens", "max_last_step_tokens", "batch"):
            if getattr(self, name) != "auto" and getattr(self, name) < 1:
                raise ValueError(f"search.{name} must be positive, got {getattr(self, name)}")
        for name in ("exploration", "temperature", "prior_exponent"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"search.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"search.discount must be in [0, 1], got {self.discount}")

    @property
    def lanes(self) -> int:
        """Prompts searched together, once that is known."""
        assert self.batch != "auto", "search.batch was not resolved"
        return self.batch

    @property
    def slots(self) -> int:
        """Child slots of a node: the sampled steps and the gold's."""
        return self.breadth + self.inject_gold

    @property
    def max_nodes(self) -> int:
        """The most nodes a tree can have. In a full one, only the node on the gold's path has a child more."""
        total, level = 1, 1
        for _ in range(self.max_depth):
            level = level * self.breadth + self.inject_gold
            total += level
        # Nor can a tree hold more than its simulations expand, at most one node a level each.
        return min(total, 1 + self.n_simulations * self.max_depth * self.slots)


class Problem(NamedTuple):
    """A prompt to search; `gold_steps` is the gold response, stop token included, cut into steps."""

    id: str
    gold_steps: list[list[int]]


# What the search asks of a model ----------------------------------------------------------------------------


class State(NamedTuple):
    """A state to expand, and what its next step may be."""

    lane: int
    problem: int
    response: list[int]
    """Tokens after the prompt."""
    limit: int
    """The most tokens that the step may have."""
    until_stop: bool
    """Whether the step is the whole remainder, up to a stop token."""
    gold_step: list[int]
    """The gold's next step where it joins the candidates, else empty."""


class Step(NamedTuple):
    """A candidate step of one token or more."""

    token_ids: list[int]
    log_prob: float
    """Sum of log π at temperature 1."""
    stopped: bool
    """Whether a stop token ends it, and with it the response."""


class Response(NamedTuple):
    """A response to judge, complete or not."""

    lane: int
    problem: int
    token_ids: list[int]


@runtime_checkable
class Model(Protocol):
    """The three functions that a search calls.

    A problem keeps its lane until its tree is complete; then the lane's requests name another problem. A model may
    cache by lane what it computes of a problem.
    """

    def propose(self, states: Sequence[State], /) -> list[list[Step]]:
        """Returns the candidates of each state: `breadth` sampled steps, then the gold step if the state has one."""
        ...

    def judge(self, responses: Sequence[Response], /) -> list[float]:
        """Returns the confidence C in each response (eq 7); the responses of a lane are adjacent."""
        ...

    def grade(self, problem: int, response: list[int], stopped: bool, /) -> float:
        """Returns the outcome O of a terminal state; `stopped` is false where a length limit ended the response."""
        ...


# What it yields ---------------------------------------------------------------------------------------------


class FinishedTree(NamedTuple):
    """The tree of one problem after its last simulation, as NumPy arrays, and the tokens of its nodes."""

    tree: Tree
    steps: list[list[int]]
    """Token ids of the step into each node; none for the root."""
    sampled_tokens: int


class Round(NamedTuple):
    """What came of expanding a leaf of every growing tree."""

    n_simulations: int
    """Simulations that ended, over all trees."""
    finished: list[tuple[int, FinishedTree]]
    """The trees that are complete now, each with the number of its problem."""


def search(problems: Sequence[Problem], model: Model, settings: SearchSettings) -> list[FinishedTree]:
    """Returns the trees of all problems, in their order; see `grow`."""
    finished: dict[int, FinishedTree] = {}
    for one_round in grow(problems, model, settings):
        finished.update(one_round.finished)
    return [finished[number] for number in range(len(problems))]


def grow(problems: Sequence[Problem], model: Model, settings: SearchSettings) -> Iterator[Round]:
    """Searches `settings.batch` problems at a time, and yields each tree in the round that completes it.

    A waiting problem takes the lane of one that is done, so that the model's calls stay full. What a tree becomes does
    not depend on the others.
    """
    trees = _new_trees(settings)
    lanes: dict[int, _Lane] = {}
    waiting = iter(range(len(problems)))
    while True:
        free = [b for b in range(settings.lanes) if b not in lanes]
        # `free` comes first: zip would else take a problem that no lane is free for.
        if new := {b: _new_lane(number, settings) for b, number in zip(free, waiting, strict=False)}:
            trees = _reset(trees, np.isin(np.arange(settings.lanes), list(new)))
            lanes = dict(sorted((lanes | new).items()))
        if not lanes:
            return
        trees, lanes = _expand_leaves(trees, lanes, problems, model, settings)
        trees, lanes, n_simulations = _end_simulations(trees, lanes, settings)
        done = {b: lane for b, lane in lanes.items() if lane.simulations_left == 0}
        yield Round(n_simulations, _finished(trees, done))
        lanes = {b: lane for b, lane in lanes.items() if b not in done}


# One round --------------------------------------------------------------------------------------------------


class _Node(NamedTuple):
    """A node's tokens, and what is known of it when it joins the tree."""

    step: list[int]
    response: list[int]
    depth: int
    log_prob: float
    terminal: bool
    outcome: float
    confidence: float
    matches_reference: bool


class _Lane(NamedTuple):
    """The problem whose tree grows in a lane of the batch, and where its simulation stands."""

    problem: int
    simulations_left: int
    leaf: int
    nodes: list[_Node]
    sampled_tokens: int

    @property
    def leaf_node(self) -> _Node:
        return self.nodes[self.leaf]


_Lanes = Mapping[int, _Lane]


def _new_lane(problem: int, s: SearchSettings) -> _Lane:
    root = _Node([], [], 0, 0.0, terminal=False, outcome=0.0, confidence=0.0, matches_reference=True)
    return _Lane(problem, s.n_simulations, ROOT, [root], 0)


def _expand_leaves(
    trees: Tree, lanes: _Lanes, problems: Sequence[Problem], model: Model, s: SearchSettings
) -> tuple[Tree, dict[int, _Lane]]:
    """Gives the leaf of every lane its candidates as children, and moves on to the best of them (PUCT)."""
    states = [_state(b, lane, problems[lane.problem], s) for b, lane in lanes.items()]
    proposals = model.propose(states)
    candidates = [_distinct(steps) for steps in proposals]
    confidences = _judge(states, candidates, model)
    children = {
        b: _children(lane.leaf_node, problems[lane.problem], state, steps, scores, model)
        for (b, lane), state, steps, scores in zip(lanes.items(), states, candidates, confidences, strict=True)
    }
    leaf_B = _per_lane({b: lane.leaf for b, lane in lanes.items()}, ROOT, s)
    trees, _ = _expand(trees, leaf_B, _stack(children, s))
    best_B = np.asarray(_select_child(trees, leaf_B, s.exploration))
    expanded = {}
    for (b, lane), steps in zip(lanes.items(), proposals, strict=True):
        sampled = lane.sampled_tokens + sum(len(step.token_ids) for step in steps[: s.breadth])
        expanded[b] = lane._replace(leaf=int(best_B[b]), nodes=lane.nodes + children[b], sampled_tokens=sampled)
    return trees, expanded


def _judge(states: Sequence[State], candidates: Sequence[Sequence[Step]], model: Model) -> list[list[float]]:
    """Returns the confidence in each candidate of each state, from one call of the model."""
    responses = [
        Response(state.lane, state.problem, state.response + step.token_ids)
        for state, steps in zip(states, candidates, strict=True)
        for step in steps
    ]
    confidences = iter(model.judge(responses))
    return [[next(confidences) for _ in steps] for steps in candidates]


def _end_simulations(trees: Tree, lanes: _Lanes, s: SearchSettings) -> tuple[Tree, dict[int, _Lane], int]:
    """Backs up the simulations that reached a terminal state, and starts the next ones at the root.

    Those may reach a terminal state without the model, in a full tree all of them do. In the end every lane with
    simulations left stands at a state to expand. Also returns how many simulations ended.
    """
    lanes, n_simulations = dict(lanes), 0
    while ended := {b: lane for b, lane in lanes.items() if lane.simulations_left and lane.leaf_node.terminal}:
        leaf_B = _per_lane({b: lane.leaf for b, lane in ended.items()}, NO_PARENT, s)
        trees = _backup(trees, leaf_B, s.discount, s.value_weight)
        next_B = np.asarray(_descend(trees, s.exploration))
        for b, lane in ended.items():
            lanes[b] = lane._replace(leaf=int(next_B[b]), simulations_left=lane.simulations_left - 1)
        n_simulations += len(ended)
    return trees, lanes, n_simulations


def _finished(trees: Tree, done: _Lanes) -> list[tuple[int, FinishedTree]]:
    if not done:
        return []
    arrays = jax.device_get(trees)
    finished = []
    for b, lane in done.items():
        tree = jax.tree.map(lambda x, b=b: x[b], arrays)
        finished.append((lane.problem, FinishedTree(tree, [node.step for node in lane.nodes], lane.sampled_tokens)))
    return finished


# One state --------------------------------------------------------------------------------------------------


def _state(lane_number: int, lane: _Lane, problem: Problem, s: SearchSettings) -> State:
    """Returns the state at the leaf of a lane."""
    node = lane.leaf_node
    until_stop = node.depth + 1 >= s.max_depth
    limit = s.max_last_step_tokens if until_stop else s.max_step_tokens
    gold: list[int] = []
    if s.inject_gold and node.matches_reference:
        gold = _next_gold_step(problem.gold_steps, len(node.response), until_stop)
    return State(lane_number, lane.problem, node.response, limit, until_stop, gold[:limit])


def _next_gold_step(gold_steps: list[list[int]], done: int, until_stop: bool) -> list[int]:
    """Returns the gold's tokens after the first `done`: up to its next step boundary, or all of them."""
    for i, step in enumerate(gold_steps):
        if done < len(step):
            return _joined([step[done:], *gold_steps[i + 1 :]]) if until_stop else step[done:]
        done -= len(step)
    return []


def _joined(steps: Sequence[list[int]]) -> list[int]:
    return [token for step in steps for token in step]


def _distinct(steps: Sequence[Step]) -> list[Step]:
    """Drops repeated steps; the first of equals stays."""
    distinct: dict[tuple[int, ...], Step] = {}
    for step in steps:
        distinct.setdefault(tuple(step.token_ids), step)
    return list(distinct.values())


def _children(
    parent: _Node, problem: Problem, state: State, steps: Sequence[Step], confidences: Sequence[float], model: Model
) -> list[_Node]:
    """Returns the nodes that the candidates of a state lead to, with their scores."""
    gold = _joined(problem.gold_steps)
    children = []
    for step, confidence in zip(steps, confidences, strict=True):
        response = state.response + step.token_ids
        terminal = step.stopped or state.until_stop
        children.append(
            _Node(
                step=step.token_ids,
                response=response,
                depth=parent.depth + 1,
                log_prob=step.log_prob,
                terminal=terminal,
                outcome=model.grade(state.problem, response, step.stopped) if terminal else 0.0,
                confidence=confidence,
                matches_reference=response == gold[: len(response)],
            )
        )
    return children


# All lanes at once ------------------------------------------------------------------------------------------

_descend = jax.jit(jax.vmap(descend, in_axes=(0, None)))
_select_child = jax.jit(jax.vmap(select_child, in_axes=(0, 0, None)))
_expand = jax.jit(jax.vmap(expand))


@functools.partial(jax.jit, static_argnames="value_weight")
def _backup(trees: Tree, leaf_B: IntB, discount: float | jax.Array, value_weight: ValueWeight) -> Tree:
    return jax.vmap(lambda tree, leaf: backup(tree, leaf, discount, value_weight))(trees, leaf_B)


def _new_trees(s: SearchSettings) -> Tree:
    return jax.vmap(lambda _: new_tree(s.max_nodes, s.slots))(jnp.arange(s.lanes))


@jax.jit
def _reset(trees: Tree, chosen_B: jax.Array) -> Tree:
    """Resets the chosen trees to a bare root."""

    def reset(tree: Tree, chosen: jax.Array) -> Tree:
        return jax.tree.map(lambda new, old: jnp.where(chosen, new, old), new_tree(*tree.children_NW.shape), tree)

    return jax.vmap(reset)(trees, chosen_B)


def _per_lane(values: Mapping[int, int], empty: int, s: SearchSettings) -> np.ndarray:
    """Returns the values of some lanes as an array over all of them."""
    array_B = np.full(s.lanes, empty, np.int32)
    array_B[list(values)] = list(values.values())
    return array_B


def _stack(children: Mapping[int, Sequence[_Node]], s: SearchSettings) -> Candidates:
    """Returns the children of some lanes' leaves as arrays over all lanes and child slots."""

    def column(value: Callable[[_Node], Any], dtype: Any = np.float32) -> np.ndarray:
        array_BW = np.zeros((s.lanes, s.slots), dtype)
        for b, nodes in children.items():
            array_BW[b, : len(nodes)] = [value(node) for node in nodes]
        return array_BW

    outcome_BW = column(lambda node: node.outcome)
    confidence_BW = column(lambda node: node.confidence)
    length_BW = column(lambda node: len(node.step))
    prior_BW = losses.step_prior(column(lambda node: node.log_prob), length_BW, s.prior_exponent)
    return Candidates(
        valid_W=column(lambda _: True, bool),
        prior_W=np.asarray(prior_BW),
        state_score_W=outcome_BW + confidence_BW,  # eq 6
        terminal_W=column(lambda node: node.terminal, bool),
        extra=NodeExtra(outcome_BW, confidence_BW, column(lambda node: node.matches_reference, bool)),
    )
