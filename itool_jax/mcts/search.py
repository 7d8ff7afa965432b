"""Step-level Monte Carlo tree search over many prompts in lock-step (section 4.3 of the paper).

In: problems, and the model as functions: `propose` steps, `judge` states, `grade` responses. Out: a `Forest`, from
which `mcts.pairs` takes preferences. The bookkeeping of `mcts.tree` runs compiled on all trees at once; this module
keeps their tokens and decides which states need the model.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
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
    step_limit: int = 64
    """Longest step, in tokens."""
    last_step_limit: int = 512
    """Longest last step, in tokens."""
    inject_gold: bool = True
    """Whether the gold's next step joins the candidates where the response so far is the gold's."""
    batch: int = 64
    """Prompts searched together."""

    def __post_init__(self) -> None:
        for name in ("n_simulations", "breadth", "max_depth", "step_limit", "last_step_limit", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"search.{name} must be positive, got {getattr(self, name)}")
        for name in ("exploration", "temperature", "prior_exponent"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"search.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.discount <= 1:
            raise ValueError(f"search.discount must be in [0, 1], got {self.discount}")

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


class Forest(NamedTuple):
    """Finished trees of some problems and the tokens of the step into each node."""

    tree: Tree
    step_tokens_BNS: np.ndarray
    step_length_BN: np.ndarray
    sampled_tokens: int


class _Nodes(NamedTuple):
    """Tokens of all nodes: the step into each, and the whole response up to it."""

    tokens_BNS: np.ndarray
    length_BN: np.ndarray
    paths: list[dict[int, list[int]]]


_descend = jax.jit(trees.descend)
_select = jax.jit(trees.select_child)
_expand = jax.jit(trees.expand)
_backup = functools.partial(jax.jit, static_argnames="value_weight")(trees.backup)


def search(
    problems: Sequence[Problem],
    propose: Propose,
    judge: Judge,
    grade: Grade,
    settings: SearchSettings,
    advance: Callable[..., None] = lambda *_: None,
) -> Forest:
    """Searches all problems together; what one tree becomes does not depend on the others.

    Raises:
        ValueError: more problems than `settings.batch`.
    """
    s = settings
    if len(problems) > s.batch:
        raise ValueError(f"search.batch is {s.batch}, got {len(problems)} problems")
    tree = trees.new_tree(s.batch, s.max_nodes, s.slots)
    size = (s.batch, s.max_nodes)
    width = max(s.step_limit, s.last_step_limit)
    nodes = _Nodes(np.zeros((*size, width), np.int32), np.zeros(size, np.int32), [{ROOT: []} for _ in problems])
    # A tree whose simulation has reached a terminal state begins its next one while others still expand theirs:
    # every call of the model serves all unfinished trees.
    left_B = np.where(np.arange(s.batch) < len(problems), s.n_simulations, 0)
    leaf_B = np.asarray(_descend(tree, s.exploration))
    sampled = 0
    while left_B.any():
        while (ended_B := (left_B > 0) & _of(tree.terminal_BN, leaf_B)).any():
            tree = _backup(tree, leaf_B, ended_B, s.discount, s.value_weight)
            leaf_B = np.where(ended_B, np.asarray(_descend(tree, s.exploration)), leaf_B)
            left_B = left_B - ended_B
            advance(int(ended_B.sum()))
        rows = np.flatnonzero(left_B)
        if len(rows):
            depth_B, on_gold_B = _of(tree.depth_BN, leaf_B), _of(tree.on_gold_BN, leaf_B)
            states = [
                _state(problems[b], b, nodes.paths[b][int(leaf_B[b])], int(depth_B[b]), bool(on_gold_B[b]), s)
                for b in rows.tolist()
            ]
            proposals = propose(states)
            sampled += sum(len(step) for p in proposals for step in p.steps[: s.breadth])
            candidates = _candidates(states, proposals, problems, judge, grade, s)
            tree, child_BW = _expand(tree, leaf_B, candidates, left_B > 0)
            _keep(nodes, states, leaf_B, proposals, np.asarray(child_BW))
            leaf_B = np.where(left_B > 0, np.asarray(_select(tree, leaf_B, s.exploration)), leaf_B)
    tree = jax.tree.map(lambda x: np.asarray(x)[: len(problems)], tree)
    return Forest(tree, nodes.tokens_BNS[: len(problems)], nodes.length_BN[: len(problems)], sampled)


def _of(array_BN: jax.Array, node_B: np.ndarray) -> np.ndarray:
    return np.asarray(array_BN)[np.arange(len(node_B)), node_B]


def _state(problem: Problem, b: int, path: list[int], depth: int, on_gold: bool, s: SearchSettings) -> State:
    whole = depth + 1 >= s.max_depth
    limit = s.last_step_limit if whole else s.step_limit
    gold = _next_gold_step(problem.gold_steps, len(path), whole) if on_gold and s.inject_gold else []
    return State(b, path, limit, whole, gold[:limit])


def _next_gold_step(gold_steps: list[list[int]], done: int, whole: bool) -> list[int]:
    """What the gold says next after `done` tokens: up to its next step boundary, or all of it."""
    for i, step in enumerate(gold_steps):
        if done < len(step):
            return [*step[done:], *(t for later in gold_steps[i + 1 :] for t in later)] if whole else step[done:]
        done -= len(step)
    return []


def _candidates(
    states: list[State],
    proposals: list[Proposal],
    problems: Sequence[Problem],
    judge: Judge,
    grade: Grade,
    s: SearchSettings,
) -> Candidates:
    """Scores of all new states, as arrays over the whole batch."""
    shape = (s.batch, s.slots)
    new = Candidates(*(np.zeros(shape, bool if f in _FLAGS else np.float32) for f in Candidates._fields))
    log_prob_BW, length_BW = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    asked: list[tuple[int, int, list[int]]] = []
    for state, proposal in zip(states, proposals, strict=True):
        gold = [t for step in problems[state.problem].gold_steps for t in step]
        for w, step in enumerate(proposal.steps):
            if not step or step in proposal.steps[:w]:
                continue
            b, response, stopped = state.problem, state.path + step, proposal.stopped[w]
            new.valid_BW[b, w] = True
            log_prob_BW[b, w], length_BW[b, w] = proposal.log_probs[w], len(step)
            new.terminal_BW[b, w] = stopped or state.whole
            new.on_gold_BW[b, w] = response == gold[: len(response)]
            if new.terminal_BW[b, w]:
                new.outcome_BW[b, w] = grade(b, response, stopped)
            asked.append((b, w, response))
    confidences = judge([(b, response) for b, _, response in asked])
    for (b, w, _), confidence in zip(asked, confidences, strict=True):
        new.confidence_BW[b, w] = confidence
    return new._replace(
        prior_BW=np.asarray(losses.step_prior(log_prob_BW, length_BW, s.prior_exponent)),
        state_score_BW=new.outcome_BW + new.confidence_BW,  # eq 6
    )


_FLAGS = ("valid_BW", "terminal_BW", "on_gold_BW")


def _keep(
    nodes: _Nodes, states: list[State], leaf_B: np.ndarray, proposals: list[Proposal], child_BW: np.ndarray
) -> None:
    """Files the tokens of the new nodes."""
    for state, proposal in zip(states, proposals, strict=True):
        b = state.problem
        for w, step in enumerate(proposal.steps):
            if (child := int(child_BW[b, w])) != trees.NO_CHILD:
                nodes.tokens_BNS[b, child, : len(step)], nodes.length_BN[b, child] = step, len(step)
                nodes.paths[b][child] = nodes.paths[b][int(leaf_B[b])] + step
