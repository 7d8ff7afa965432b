"""Step-level Monte Carlo tree search over many prompts in lock-step (section 4.3 of the paper).

In: problems, and the model as functions: `propose` steps, `judge` states, `grade` responses. Out: a `Forest`, from
which `mcts.pairs` takes preferences. The bookkeeping of `mcts.tree` runs compiled on all trees at once; this module
keeps their tokens and decides which states need the model.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from itool_jax import losses
from itool_jax.mcts import tree as trees
from itool_jax.mcts.tree import ROOT, Candidates, Tree, ValueWeight
from itool_jax.text.steps import Granularity


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
    def seats(self) -> int:
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


class State(NamedTuple):
    """A state to expand: which problem, its response so far, and what the next step may be."""

    problem: int
    path: list[int]
    limit: int
    whole: bool
    """Whether the step is the whole remainder."""
    gold_step: list[int]
    """The gold's next step where it joins the candidates, else empty."""


class Proposal(NamedTuple):
    """Candidate steps of one state; an empty step is no candidate."""

    steps: list[list[int]]
    log_probs: list[float]
    """Sum of log π at temperature 1."""
    stopped: list[bool]
    """Whether the step ends the response with a stop token."""


Propose = Callable[[list[State]], list[Proposal]]
Judge = Callable[[list[tuple[int, list[int]]]], list[float]]
"""Confidence C of (problem, response so far) states (eq 7)."""
Grade = Callable[[int, list[int], bool], float]
"""Outcome O of a terminal state: (problem, response, whether it ended by a stop token)."""
Seat = Callable[[list[tuple[int, int]]], None]
"""Is told of (seat, problem) before the model is asked about that problem; another one had the seat till then."""


class Forest(NamedTuple):
    """Finished trees of some problems and the tokens of the step into each node."""

    tree: Tree
    step_tokens_BNS: np.ndarray
    step_length_BN: np.ndarray
    sampled_tokens_B: np.ndarray


class _Seats(NamedTuple):
    """What grows at each seat: a problem's number, NOBODY where there is none, what is left to do, and its tokens."""

    problem_B: np.ndarray
    left_B: np.ndarray
    """Simulations still to make."""
    leaf_B: np.ndarray
    sampled_B: np.ndarray
    tokens_BNS: np.ndarray
    """Of the step into each node."""
    length_BN: np.ndarray
    paths: list[dict[int, list[int]]]
    """The whole response up to each node."""


NOBODY = -1

_descend = jax.jit(trees.descend)
_select = jax.jit(trees.select_child)
_expand = jax.jit(trees.expand)
_backup = functools.partial(jax.jit, static_argnames="value_weight")(trees.backup)


@jax.jit
def _renew(tree: Tree, chosen_B: jax.Array) -> Tree:
    """The trees with those chosen as they begin."""
    new = trees.new_tree(*tree.children_BNW.shape)
    return jax.tree.map(lambda x, y: jnp.where(chosen_B.reshape(-1, *(1,) * (x.ndim - 1)), x, y), new, tree)


def search(
    problems: Sequence[Problem],
    propose: Propose,
    judge: Judge,
    grade: Grade,
    settings: SearchSettings,
    advance: Callable[..., None] = lambda *_: None,
    seat: Seat = lambda _: None,
) -> Forest:
    """The trees of all problems, in their order; see `grow`."""
    found = dict(grow(problems, propose, judge, grade, settings, advance, seat))
    parts = [found[number] for number in sorted(found)]
    tree, tokens, lengths, sampled = zip(*parts, strict=True)
    return Forest(
        jax.tree.map(lambda *rows: np.concatenate(rows), *tree),
        np.concatenate(tokens),
        np.concatenate(lengths),
        np.concatenate(sampled),
    )


def grow(
    problems: Sequence[Problem],
    propose: Propose,
    judge: Judge,
    grade: Grade,
    settings: SearchSettings,
    advance: Callable[..., None] = lambda *_: None,
    seat: Seat = lambda _: None,
) -> Iterator[tuple[int, Forest]]:
    """Searches `settings.batch` problems at a time; gives each one's number and tree as soon as it is done.

    A problem that waits takes the seat of one that is done, so that the model's calls stay full. What a tree becomes
    does not depend on the others.
    """
    s, size = settings, (settings.seats, settings.max_nodes)
    tree = trees.new_tree(*size, s.slots)
    seats = _Seats(
        np.full(s.seats, NOBODY),
        np.zeros(s.seats, np.int32),
        np.zeros(s.seats, np.int32),
        np.zeros(s.seats, np.int32),
        np.zeros((*size, max(s.max_step_tokens, s.max_last_step_tokens)), np.int32),
        np.zeros(size, np.int32),
        [{} for _ in range(s.seats)],
    )
    waiting = iter(range(len(problems)))
    while True:
        for b in np.flatnonzero((seats.problem_B != NOBODY) & (seats.left_B == 0)).tolist():
            yield int(seats.problem_B[b]), _finished(tree, seats, b)
            seats.problem_B[b] = NOBODY
        free = np.flatnonzero(seats.problem_B == NOBODY).tolist()
        if taken := list(zip(free, waiting, strict=False)):
            seat(taken)
            _sit_down(seats, taken, s.n_simulations)
            tree = _renew(tree, np.isin(np.arange(s.seats), free))
        if not seats.left_B.any():
            return
        tree = _grow_once(tree, seats, problems, (propose, judge, grade), s, advance)


def _grow_once(
    tree: Tree,
    seats: _Seats,
    problems: Sequence[Problem],
    model: tuple[Propose, Judge, Grade],
    s: SearchSettings,
    advance: Callable[..., None],
) -> Tree:
    """Expands a leaf of every unfinished tree, and ends the simulations that reach a terminal state on the way.

    A tree whose simulation has ended begins its next one while others still expand theirs: every call of the model
    serves all unfinished trees, and a tree that is full is walked without the model.
    """
    propose, judge, grade = model
    while (ended_B := (seats.left_B > 0) & _of(tree.terminal_BN, seats.leaf_B)).any():
        tree = _backup(tree, seats.leaf_B, ended_B, s.discount, s.value_weight)
        seats.leaf_B[ended_B] = np.asarray(_descend(tree, s.exploration))[ended_B]
        seats.left_B[ended_B] -= 1
        advance(int(ended_B.sum()))
    active_B = seats.left_B > 0
    rows = np.flatnonzero(active_B).tolist()
    if not rows:
        return tree
    depth_B, on_gold_B = _of(tree.depth_BN, seats.leaf_B), _of(tree.on_gold_BN, seats.leaf_B)
    states = [
        _state(problems, int(seats.problem_B[b]), _path(seats, b), int(depth_B[b]), bool(on_gold_B[b]), s) for b in rows
    ]
    proposals = propose(states)
    seats.sampled_B[rows] += [sum(map(len, proposal.steps[: s.breadth])) for proposal in proposals]
    candidates = _candidates(rows, states, proposals, problems, judge, grade, s)
    tree, child_BW = _expand(tree, seats.leaf_B, candidates, active_B)
    _keep(seats, rows, proposals, np.asarray(child_BW))
    seats.leaf_B[rows] = np.asarray(_select(tree, seats.leaf_B, s.exploration))[rows]
    return tree


def _sit_down(seats: _Seats, taken: list[tuple[int, int]], n_simulations: int) -> None:
    for b, problem in taken:
        seats.problem_B[b], seats.left_B[b], seats.leaf_B[b], seats.sampled_B[b] = problem, n_simulations, ROOT, 0
        seats.tokens_BNS[b], seats.length_BN[b], seats.paths[b] = 0, 0, {ROOT: []}


def _path(seats: _Seats, b: int) -> list[int]:
    """The response up to the leaf of a tree."""
    return seats.paths[b][int(seats.leaf_B[b])]


def _finished(tree: Tree, seats: _Seats, b: int) -> Forest:
    """A tree by itself."""
    own = jax.tree.map(lambda x: np.asarray(x)[b : b + 1], tree)
    return Forest(own, seats.tokens_BNS[[b]], seats.length_BN[[b]], seats.sampled_B[[b]])


def _of(array_BN: jax.Array, node_B: np.ndarray) -> np.ndarray:
    return np.asarray(array_BN)[np.arange(len(node_B)), node_B]


def _state(
    problems: Sequence[Problem], problem: int, path: list[int], depth: int, on_gold: bool, s: SearchSettings
) -> State:
    whole = depth + 1 >= s.max_depth
    limit = s.max_last_step_tokens if whole else s.max_step_tokens
    gold = _next_gold_step(problems[problem].gold_steps, len(path), whole) if on_gold and s.inject_gold else []
    return State(problem, path, limit, whole, gold[:limit])


def _next_gold_step(gold_steps: list[list[int]], done: int, whole: bool) -> list[int]:
    """What the gold says next after `done` tokens: up to its next step boundary, or all of it."""
    for i, step in enumerate(gold_steps):
        if done < len(step):
            return [*step[done:], *(t for later in gold_steps[i + 1 :] for t in later)] if whole else step[done:]
        done -= len(step)
    return []


def _candidates(
    rows: list[int],
    states: list[State],
    proposals: list[Proposal],
    problems: Sequence[Problem],
    judge: Judge,
    grade: Grade,
    s: SearchSettings,
) -> Candidates:
    """Scores of all new states, as arrays over all seats; `rows` are those of the states."""
    shape = (s.seats, s.slots)
    new = Candidates(*(np.zeros(shape, bool if f in _FLAGS else np.float32) for f in Candidates._fields))
    log_prob_BW, length_BW = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    asked: list[tuple[int, int]] = []
    responses: list[tuple[int, list[int]]] = []
    for b, state, proposal in zip(rows, states, proposals, strict=True):
        gold = [t for step in problems[state.problem].gold_steps for t in step]
        for w, step in enumerate(proposal.steps):
            if not step or step in proposal.steps[:w]:
                continue
            response, stopped = state.path + step, proposal.stopped[w]
            new.valid_BW[b, w] = True
            log_prob_BW[b, w], length_BW[b, w] = proposal.log_probs[w], len(step)
            new.terminal_BW[b, w] = stopped or state.whole
            new.on_gold_BW[b, w] = response == gold[: len(response)]
            if new.terminal_BW[b, w]:
                new.outcome_BW[b, w] = grade(state.problem, response, stopped)
            asked.append((b, w))
            responses.append((state.problem, response))
    for place, confidence in zip(asked, judge(responses), strict=True):
        new.confidence_BW[place] = confidence
    return new._replace(
        prior_BW=np.asarray(losses.step_prior(log_prob_BW, length_BW, s.prior_exponent)),
        state_score_BW=new.outcome_BW + new.confidence_BW,  # eq 6
    )


_FLAGS = ("valid_BW", "terminal_BW", "on_gold_BW")


def _keep(seats: _Seats, rows: list[int], proposals: list[Proposal], child_BW: np.ndarray) -> None:
    """Files the tokens of the new nodes."""
    for b, proposal in zip(rows, proposals, strict=True):
        path = _path(seats, b)
        for w, step in enumerate(proposal.steps):
            if (child := int(child_BW[b, w])) != trees.NO_CHILD:
                seats.tokens_BNS[b, child, : len(step)], seats.length_BN[b, child] = step, len(step)
                seats.paths[b][child] = path + step
