"""Runs step-level Monte Carlo tree search over many prompts in lock-step (section 4.3 of the paper).

In: problems, and a `Model` that proposes steps, judges states and grades responses. Out: a `FinishedTree` for each
problem, from which `mcts.pairs` extracts preferences. The trees grow in the lanes of a batch: `mcts.tree` runs
compiled on all lanes at once, while this module keeps the nodes' tokens and calls the model to expand states.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

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
from itool_jax.mcts.value import step_prior
from itool_jax.text.steps import Granularity
from itool_jax.types import IntB

InjectGold = Literal["never", "unsolved", "always"]
RIGHT = 1.0
"""Outcome O of a right response."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchRecipe:
    """What step-level Monte Carlo tree search looks for."""

    n_simulations: int = 16
    """Simulations per prompt: root-to-leaf walks, each backed up once."""
    breadth: int = 3
    """W: steps sampled at each expansion."""
    max_depth: int = 3
    """D: most steps in a response. The last one is the whole remainder."""
    exploration: float = 4.0
    """PUCT's exploration constant (eq 5); 0 is greedy. Q ranges from -1 to 2, so at 1 the best child takes most
    visits."""
    discount: float = 1.0
    """Discount γ of the backup (eq 8)."""
    value_weight: ValueWeight = "visits"
    """Weight of each child in a state's value. visits: its visit count (eq 9). max1: max(1, visits), as in the code of
    arXiv 2405.00451."""
    temperature: float = 1.0
    """Sampling temperature of the steps."""
    top_p: float = 1.0
    """Nucleus sampling of steps: sample from the likeliest tokens that hold this share of the probability; 1 samples
    from all tokens. Priors always use the whole distribution."""
    prior_exponent: float = 1.0
    """λ of the prior exp(Σ log π / length^λ): 0 is the plain product, 1 the geometric mean."""
    granularity: Granularity = "call"
    """Size of a step in a list of calls: a call, an argument, or (sentence) the whole list. In text, a step is always a
    sentence."""
    max_step_tokens: int = 64
    """Longest step, in tokens."""
    max_last_step_tokens: int = 512
    """Longest last step, in tokens."""
    outcome: Literal["binary", "graded"] = "binary"
    """Outcome O of a whole response. binary: +1 if right, else -1. graded: in between, by how much of the calls is
    right."""
    inject_gold: InjectGold = "never"
    """When to add the gold response's next step to the candidates of a state that matches the gold response so far:
    never; unsolved, if none of the model's own samples was right; or always."""

    def __post_init__(self) -> None:
        for name in ("n_simulations", "breadth", "max_depth", "max_step_tokens", "max_last_step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"search.{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"search.top_p must be in (0, 1], got {self.top_p}")
        for name in ("exploration", "temperature", "prior_exponent"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"search.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"search.discount must be in [0, 1], got {self.discount}")

    @property
    def longest_step(self) -> int:
        """Most tokens of a step, last or not."""
        return max(self.max_last_step_tokens, self.max_step_tokens)

    @property
    def injects(self) -> bool:
        """True if trees may hold gold steps that were not sampled."""
        return self.inject_gold != "never"

    @property
    def slots(self) -> int:
        """Child slots of a node: the sampled steps, plus one if gold steps are injected."""
        return self.breadth + self.injects

    @property
    def max_nodes(self) -> int:
        """Most nodes a tree can have: `breadth` children per node, and one more per level if gold steps may join."""
        total, level = 1, 1
        for _ in range(self.max_depth):
            level = level * self.breadth + self.injects
            total += level
        # Walks bound the tree too: each expands at most one node per level.
        return min(total, 1 + (self.n_simulations + self.injects) * self.max_depth * self.slots)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchRuntime:
    """How a search is computed."""

    batch: int | Literal["auto"] = 64
    """Prompts searched together; iterate lowers it to what fits in device memory by the compiler's estimate. auto: as
    many as fit, which is found once and kept with the run."""

    def __post_init__(self) -> None:
        if self.batch != "auto" and self.batch < 1:
            raise ValueError(f"search.batch must be positive, got {self.batch}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSettings(SearchRuntime, SearchRecipe):
    """Step-level Monte Carlo tree search."""

    def __post_init__(self) -> None:
        SearchRecipe.__post_init__(self)
        SearchRuntime.__post_init__(self)

    @property
    def lanes(self) -> int:
        """Prompts searched together; `batch` must be resolved."""
        assert self.batch != "auto", "search.batch was not resolved"
        return self.batch

    def fitted(self, n: int) -> "SearchSettings":
        """Returns the settings for n prompts: no more lanes than the next power of two. Trees stay the same."""
        return dataclasses.replace(self, batch=min(self.lanes, 1 << max(0, n - 1).bit_length()))


class Turn(NamedTuple):
    """A recorded assistant turn that follows another one."""

    observation: list[int]
    """Tokens between the two turns: the tools' results, up to where the assistant speaks again."""
    gold_steps: list[list[int]]


class Problem(NamedTuple):
    """A prompt to search."""

    id: str
    gold_steps: list[list[int]]
    """Gold response, cut into steps, including the stop token."""
    solved: bool = False
    """True if the model sampled a right response before."""
    later: tuple[Turn, ...] = ()
    """Turns recorded after the gold response, up to the user's next question."""

    def gold_of(self, turn: int) -> list[list[int]]:
        """Returns the gold steps of turn 0, 1, …"""
        return self.later[turn - 1].gold_steps if turn else self.gold_steps

    @property
    def gold(self) -> list[int]:
        """Gold tokens of all turns, with the observations between them."""
        later = [token for turn in self.later for token in turn.observation + _joined(turn.gold_steps)]
        return _joined(self.gold_steps) + later


def is_reachable(problem: Problem, s: SearchSettings) -> bool:
    """Returns whether every gold turn fits the step and depth limits."""
    for turn in range(1 + len(problem.later)):
        steps = problem.gold_of(turn)
        single, last = steps[: s.max_depth - 1], _joined(steps[s.max_depth - 1 :])
        if max(map(len, single), default=0) > s.max_step_tokens or len(last) > s.max_last_step_tokens:
            return False
    return True


# What the search asks of a model ----------------------------------------------------------------------------


class State(NamedTuple):
    """A state to expand, and the limits of its next step."""

    lane: int
    problem: int
    response: list[int]
    """Tokens after the prompt."""
    limit: int
    """Most tokens in the step."""
    until_stop: bool
    """True if the step is the whole remainder, up to a stop token."""
    gold_step: list[int]
    """Gold step to add to the candidates; empty if none joins."""
    turn_start: int = 0
    """Number of response tokens that belong to earlier turns."""


class Step(NamedTuple):
    """A candidate step of at least one token."""

    token_ids: list[int]
    log_prob: float
    """Sum of log π at temperature 1."""
    stopped: bool
    """True if the step and its turn end with a stop token."""
    complete: bool = True
    """True if it ends at a step boundary, False if the token limit cut it off."""
    sampled: bool = True
    """True if the model sampled it, False if it is a gold step."""


class Response(NamedTuple):
    """A complete or partial response to judge."""

    lane: int
    problem: int
    token_ids: list[int]


@runtime_checkable
class Model(Protocol):
    """Interface of the model in a search.

    A problem keeps its lane until its tree is complete; then the lane is reassigned to another problem. A model may
    therefore cache its work on a problem by lane.
    """

    def propose(self, states: Sequence[State], /) -> list[list[Step]]:
        """Returns the candidates of each state: `breadth` sampled steps, then the gold step if the state has one."""
        ...

    def judge(self, responses: Sequence[Response], /) -> list[float]:
        """Returns the confidence C in each response (eq 7). Responses of the same lane are adjacent."""
        ...

    def grade(self, problem: int, turn: int, response: list[int], stopped: bool, /) -> float:
        """Returns the outcome O of a finished turn; `stopped` is false if a length limit ended it."""
        ...


# What it yields ---------------------------------------------------------------------------------------------


class FinishedTree(NamedTuple):
    """One problem's tree after the last simulation, as NumPy arrays, and the tokens of its nodes."""

    tree: Tree
    steps: list[list[int]]
    """Token ids of the step into each node; empty for the root."""
    sampled_tokens: int
    observed: dict[int, list[int]]
    """By node, the recorded tokens that follow the step into it, if that step ended a turn and another follows."""


class Round(NamedTuple):
    """Result of expanding one leaf in every growing tree."""

    n_simulations: int
    """Simulations that ended in this round, over all trees."""
    finished: list[tuple[int, FinishedTree]]
    """Trees completed in this round, each with its problem's index."""


def search(
    problems: Sequence[Problem], model: Model, settings: SearchSettings, confidence_weight: float = 1.0
) -> list[FinishedTree]:
    """Searches all problems and returns their trees in order; see `grow`."""
    finished: dict[int, FinishedTree] = {}
    for one_round in grow(problems, model, settings, confidence_weight):
        finished.update(one_round.finished)
    return [finished[number] for number in range(len(problems))]


def grow(
    problems: Sequence[Problem], model: Model, settings: SearchSettings, confidence_weight: float = 1.0
) -> Iterator[Round]:
    """Searches `settings.batch` problems at a time, and yields each tree in the round that completes it.

    A waiting problem takes over the lane of a finished one, so that the model's batches stay full. Trees do not affect
    each other. If gold steps join a tree, a walk down the gold path precedes the simulations; it counts as a visit.

    Args:
        problems: problems to search.
        model: proposes steps, judges states and grades responses.
        settings: search settings.
        confidence_weight: factor of C in R = O + weight · C (eq 6); at 0 the model does not judge.
    """
    n_turns = max((1 + len(problem.later) for problem in problems), default=1)
    trees = _new_trees(settings, n_turns)
    lanes: dict[int, _Lane] = {}
    waiting = iter(range(len(problems)))
    while True:
        free = [b for b in range(settings.lanes) if b not in lanes]
        # `free` comes first: otherwise zip would consume a problem before it finds that no lane is free.
        if new := {b: _new_lane(n, problems[n], settings) for b, n in zip(free, waiting, strict=False)}:
            trees = _reset(trees, np.isin(np.arange(settings.lanes), list(new)))
            lanes = dict(sorted((lanes | new).items()))
        if not lanes:
            return
        trees, lanes = _expand_leaves(trees, lanes, problems, model, settings, confidence_weight)
        trees, lanes, n_simulations = _end_simulations(trees, lanes, settings)
        done = {b: lane for b, lane in lanes.items() if lane.simulations_left == 0}
        yield Round(n_simulations, _finished(trees, done, problems))
        lanes = {b: lane for b, lane in lanes.items() if b not in done}


# One round --------------------------------------------------------------------------------------------------


class _Node(NamedTuple):
    """A node's tokens, and its properties when it joins the tree."""

    step: list[int]
    response: list[int]
    """All tokens after the prompt, including those recorded after the step."""
    turn: int
    turn_start: int
    """Number of response tokens that belong to earlier turns."""
    depth: int
    """Steps in the current turn."""
    log_prob: float
    terminal: bool
    outcome: float
    confidence: float
    matches_reference: bool
    complete: bool
    sampled: bool


class _Lane(NamedTuple):
    """The problem whose tree grows in a lane of the batch, and the state of its simulation."""

    problem: int
    simulations_left: int
    leaf: int
    nodes: list[_Node]
    sampled_tokens: int
    follows_reference: bool
    """True during the walk down the gold path, which precedes the simulations."""

    @property
    def leaf_node(self) -> _Node:
        return self.nodes[self.leaf]


_Lanes = Mapping[int, _Lane]


_BARE_ROOT = _Node(
    [],
    [],
    turn=0,
    turn_start=0,
    depth=0,
    log_prob=0.0,
    terminal=False,
    outcome=0.0,
    confidence=0.0,
    matches_reference=True,
    complete=True,
    sampled=True,
)


def _new_lane(number: int, problem: Problem, s: SearchSettings) -> _Lane:
    return _Lane(number, s.n_simulations, ROOT, [_BARE_ROOT], 0, follows_reference=_gold_joins(problem, s))


def _gold_joins(problem: Problem, s: SearchSettings) -> bool:
    return s.inject_gold == "always" or (s.inject_gold == "unsolved" and not problem.solved)


def _expand_leaves(
    trees: Tree, lanes: _Lanes, problems: Sequence[Problem], model: Model, s: SearchSettings, confidence_weight: float
) -> tuple[Tree, dict[int, _Lane]]:
    """Expands the leaf of every lane, and moves to its best child by PUCT, or to the gold step on the gold walk."""
    states = [_state(b, lane, problems[lane.problem], s) for b, lane in lanes.items()]
    proposals = model.propose(states)
    candidates = [_distinct(steps) for steps in proposals]
    confidences = _judge(states, candidates, model if confidence_weight else None)
    children = {
        b: _children(lane.leaf_node, problems[lane.problem], state, steps, scores, model)
        for (b, lane), state, steps, scores in zip(lanes.items(), states, candidates, confidences, strict=True)
    }
    leaf_B = _per_lane({b: lane.leaf for b, lane in lanes.items()}, ROOT, s)
    trees, _ = _expand(trees, leaf_B, _stack(children, s, confidence_weight))
    best_B = np.asarray(_select_child(trees, leaf_B, s.exploration))
    expanded = {}
    for (b, lane), state, steps in zip(lanes.items(), states, proposals, strict=True):
        follows_reference = lane.follows_reference and bool(state.gold_step)
        new = [node.step for node in children[b]]
        leaf = len(lane.nodes) + new.index(state.gold_step) if follows_reference else int(best_B[b])
        sampled = lane.sampled_tokens + sum(len(step.token_ids) for step in steps[: s.breadth])
        expanded[b] = lane._replace(
            leaf=leaf, nodes=lane.nodes + children[b], sampled_tokens=sampled, follows_reference=follows_reference
        )
    return trees, expanded


def _judge(states: Sequence[State], candidates: Sequence[Sequence[Step]], model: Model | None) -> list[list[float]]:
    """Returns the confidence in each candidate of each state, from one call to the model; zeros if `model` is None."""
    if model is None:
        return [[0.0 for _ in steps] for steps in candidates]
    responses = [
        Response(state.lane, state.problem, state.response + step.token_ids)
        for state, steps in zip(states, candidates, strict=True)
        for step in steps
    ]
    confidences = iter(model.judge(responses))
    return [[next(confidences) for _ in steps] for steps in candidates]


def _end_simulations(trees: Tree, lanes: _Lanes, s: SearchSettings) -> tuple[Tree, dict[int, _Lane], int]:
    """Backs up the simulations that reached a terminal state, and starts the next ones at the root.

    A new simulation may reach a terminal state without expanding anything; in a full tree all of them do. On return,
    every lane with simulations left is at a state to expand. Also returns how many simulations ended.
    """
    lanes, n_simulations = dict(lanes), 0
    while ended := {b: lane for b, lane in lanes.items() if lane.simulations_left and lane.leaf_node.terminal}:
        leaf_B = _per_lane({b: lane.leaf for b, lane in ended.items()}, NO_PARENT, s)
        trees = _backup(trees, leaf_B, s.discount, s.value_weight)
        next_B = np.asarray(_descend(trees, s.exploration))
        for b, lane in ended.items():
            left = lane.simulations_left - (not lane.follows_reference)
            lanes[b] = lane._replace(leaf=int(next_B[b]), simulations_left=left, follows_reference=False)
        n_simulations += sum(not lane.follows_reference for lane in ended.values())
    return trees, lanes, n_simulations


def _finished(trees: Tree, done: _Lanes, problems: Sequence[Problem]) -> list[tuple[int, FinishedTree]]:
    if not done:
        return []
    arrays = jax.device_get(trees)
    finished = []
    for b, lane in done.items():
        tree = jax.tree.map(lambda x, b=b: x[b], arrays)
        observed = {
            n: problems[lane.problem].later[node.turn - 1].observation
            for n, node in enumerate(lane.nodes)
            if node.depth == 0 and node.turn
        }
        steps = [node.step for node in lane.nodes]
        finished.append((lane.problem, FinishedTree(tree, steps, lane.sampled_tokens, observed)))
    return finished


# One state --------------------------------------------------------------------------------------------------


def _state(lane_number: int, lane: _Lane, problem: Problem, s: SearchSettings) -> State:
    """Builds the request to expand the leaf of a lane."""
    node = lane.leaf_node
    until_stop = node.depth + 1 >= s.max_depth
    limit = s.max_last_step_tokens if until_stop else s.max_step_tokens
    gold = _next_gold_step(problem, node, until_stop) if node.matches_reference and _gold_joins(problem, s) else []
    return State(lane_number, lane.problem, node.response, limit, until_stop, gold[:limit], node.turn_start)


def _next_gold_step(problem: Problem, node: _Node, until_stop: bool) -> list[int]:
    """Returns the gold tokens after a node on the gold path: up to the next step boundary, or the rest of the turn."""
    gold_steps, done = problem.gold_of(node.turn), len(node.response) - node.turn_start
    for i, step in enumerate(gold_steps):
        if done < len(step):
            return _joined([step[done:], *gold_steps[i + 1 :]]) if until_stop else step[done:]
        done -= len(step)
    return []


def _joined(steps: Sequence[list[int]]) -> list[int]:
    return [token for step in steps for token in step]


def _distinct(steps: Sequence[Step]) -> list[Step]:
    """Drops repeated steps, keeping the first of each."""
    distinct: dict[tuple[int, ...], Step] = {}
    for step in steps:
        distinct.setdefault(tuple(step.token_ids), step)
    return list(distinct.values())


def _children(
    parent: _Node, problem: Problem, state: State, steps: Sequence[Step], confidences: Sequence[float], model: Model
) -> list[_Node]:
    """Builds the nodes that a state's candidates lead to, with their scores."""
    gold, gold_step = problem.gold, _next_gold_step(problem, parent, state.until_stop)
    children = []
    for step, confidence in zip(steps, confidences, strict=True):
        response = state.response + step.token_ids
        node = _Node(
            step=step.token_ids,
            response=response,
            turn=parent.turn,
            turn_start=parent.turn_start,
            depth=parent.depth + 1,
            log_prob=step.log_prob,
            terminal=step.stopped or state.until_stop,
            outcome=0.0,
            confidence=confidence,
            matches_reference=response == gold[: len(response)],
            complete=step.complete if step.sampled else step.token_ids == gold_step,
            sampled=step.sampled,
        )
        if node.terminal:
            node = _after_turn(
                node, problem, model.grade(state.problem, node.turn, response[node.turn_start :], step.stopped)
            )
        children.append(node)
    return children


def _after_turn(node: _Node, problem: Problem, outcome: float) -> _Node:
    """Continues a node that ended its turn with the next recorded turn; ends it if this turn is wrong or the last."""
    if outcome < RIGHT or node.turn == len(problem.later):
        return node._replace(outcome=outcome)
    response = node.response + problem.later[node.turn].observation
    return node._replace(response=response, turn=node.turn + 1, turn_start=len(response), depth=0, terminal=False)


# All lanes at once ------------------------------------------------------------------------------------------

_descend = jax.jit(jax.vmap(descend, in_axes=(0, None)))
_select_child = jax.jit(jax.vmap(select_child, in_axes=(0, 0, None)))
_expand = jax.jit(jax.vmap(expand))


@functools.partial(jax.jit, static_argnames="value_weight")
def _backup(trees: Tree, leaf_B: IntB, discount: float | jax.Array, value_weight: ValueWeight) -> Tree:
    return jax.vmap(lambda tree, leaf: backup(tree, leaf, discount, value_weight))(trees, leaf_B)


def _new_trees(s: SearchSettings, n_turns: int) -> Tree:
    max_nodes = dataclasses.replace(s, max_depth=s.max_depth * n_turns).max_nodes
    return jax.vmap(lambda _: new_tree(max_nodes, s.slots))(jnp.arange(s.lanes))


@jax.jit
def _reset(trees: Tree, chosen_B: jax.Array) -> Tree:
    """Resets the selected trees to a bare root."""

    def reset(tree: Tree, chosen: jax.Array) -> Tree:
        return jax.tree.map(lambda new, old: jnp.where(chosen, new, old), new_tree(*tree.children_NW.shape), tree)

    return jax.vmap(reset)(trees, chosen_B)


def _per_lane(values: Mapping[int, int], empty: int, s: SearchSettings) -> np.ndarray:
    """Spreads values of some lanes into an array over all lanes, with `empty` elsewhere."""
    array_B = np.full(s.lanes, empty, np.int32)
    array_B[list(values)] = list(values.values())
    return array_B


def _stack(children: Mapping[int, Sequence[_Node]], s: SearchSettings, confidence_weight: float) -> Candidates:
    """Stacks the children of some lanes' leaves into arrays over all lanes and child slots."""

    def column(value: Callable[[_Node], Any], dtype: Any = np.float32) -> np.ndarray:
        array_BW = np.zeros((s.lanes, s.slots), dtype)
        for b, nodes in children.items():
            array_BW[b, : len(nodes)] = [value(node) for node in nodes]
        return array_BW

    outcome_BW = column(lambda node: node.outcome)
    confidence_BW = column(lambda node: node.confidence)
    length_BW = column(lambda node: len(node.step))
    prior_BW = step_prior(column(lambda node: node.log_prob), length_BW, s.prior_exponent)
    return Candidates(
        valid_W=column(lambda _: True, bool),
        prior_W=np.asarray(prior_BW),
        state_score_W=outcome_BW + confidence_weight * confidence_BW,  # eq 6
        terminal_W=column(lambda node: node.terminal, bool),
        extra=NodeExtra(
            outcome_BW,
            confidence_BW,
            column(lambda node: node.matches_reference, bool),
            column(lambda node: node.complete, bool),
            column(lambda node: node.sampled, bool),
        ),
    )
