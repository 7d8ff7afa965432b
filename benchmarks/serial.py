"""Searches step by step, one prompt at a time, in plain code: the algorithm of `itool_jax.mcts` without its batching.

Generates one candidate after another, and scores and judges each new state with separate calls, like the public code of
arXiv 2405.00451. In: a problem and the model as functions. Out: the root of its tree.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

Ids = list[int]
SENTENCE_ENDS = (".", "!", "?", "\n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SerialSettings:
    """Sizes of a tree, named as in `itool_jax.mcts.search`."""

    breadth: int
    max_depth: int
    n_simulations: int
    max_step_tokens: int
    max_last_step_tokens: int
    exploration: float = 1.0


class Model(NamedTuple):
    """Policy and grader as functions of one state at a time."""

    sample: Callable[[Ids, int, bool, int], Ids]
    """Samples a step after a response so far: (response, most tokens, whether it is the whole remainder, candidate)."""
    log_prob: Callable[[Ids, Ids], float]
    """Sum of log π of a step after a response so far."""
    judge: Callable[[Ids], float]
    """Confidence C of a response so far (eq 7)."""
    grade: Callable[[Ids, bool], float]
    """Outcome O of a whole response, given whether it ended with a stop token."""


@dataclasses.dataclass
class Node:
    """A state and the edge into it."""

    path: Ids
    depth: int
    prior: float = 0.0
    score: float = 0.0
    reward: float = 0.0
    q: float = 0.0
    value: float = 0.0
    visits: int = 0
    terminal: bool = False
    children: "list[Node]" = dataclasses.field(default_factory=list)


def search(gold_steps: list[Ids], stop_ids: Ids, model: Model, s: SerialSettings) -> Node:
    """Builds the tree of one prompt."""
    root = Node([], 0)
    for number in range(1 + s.n_simulations):
        walk = [root]
        while not walk[-1].terminal:
            if not walk[-1].children:
                expand(walk[-1], gold_steps, stop_ids, model, s)
            gold = gold_child(walk[-1], gold_steps, s) if number == 0 else None  # the first walk follows the gold
            walk.append(gold or select(walk[-1], s.exploration))
        back_up(walk)
    return root


def gold_child(node: Node, gold_steps: list[Ids], s: SerialSettings) -> Node | None:
    """Returns the child that the gold's next step leads to, if any."""
    until_stop = node.depth + 1 >= s.max_depth
    step = next_gold_step(node.path, gold_steps, until_stop)[
        : s.max_last_step_tokens if until_stop else s.max_step_tokens
    ]
    return next((child for child in node.children if step and child.path == node.path + step), None)


def select(node: Node, exploration: float) -> Node:
    """Returns the child of highest PUCT (eq 5), the first if tied."""

    def puct(child: Node) -> float:
        return child.q + exploration * child.prior * math.sqrt(node.visits) / (1 + child.visits)

    return max(node.children, key=puct)


def expand(node: Node, gold_steps: list[Ids], stop_ids: Ids, model: Model, s: SerialSettings) -> None:
    """Samples steps, adds the gold's next one, and scores each new state (eq 6)."""
    until_stop = node.depth + 1 >= s.max_depth
    limit = s.max_last_step_tokens if until_stop else s.max_step_tokens
    steps = [model.sample(node.path, limit, until_stop, w) for w in range(s.breadth)]
    steps.append(next_gold_step(node.path, gold_steps, until_stop)[:limit])
    for step in [step for i, step in enumerate(steps) if step and step not in steps[:i]]:
        path, stopped = node.path + step, step[-1] in stop_ids
        child = Node(path, node.depth + 1, terminal=stopped or until_stop)
        child.prior = math.exp(model.log_prob(node.path, step) / len(step))
        child.score = model.judge(path) + (model.grade(path, stopped) if child.terminal else 0.0)
        child.q = child.reward = child.score - node.score
        node.children.append(child)


def next_gold_step(path: Ids, gold_steps: list[Ids], until_stop: bool) -> Ids:
    """Returns the gold's next step, or all of its remainder, if the response so far is the gold's; else nothing."""
    gold = [token for step in gold_steps for token in step]
    if path != gold[: len(path)]:
        return []
    end = 0
    for step in gold_steps:
        end += len(step)
        if end > len(path):
            return gold[len(path) :] if until_stop else gold[len(path) : end]
    return []


def back_up(walk: list[Node]) -> None:
    """Counts a simulation, and updates V and Q from its leaf to the root (eq 8 and 9)."""
    for node in reversed(walk):
        node.visits += 1
        visits = sum(child.visits for child in node.children)
        node.value = sum(child.visits * child.q for child in node.children) / max(1, visits)
        node.q = node.reward + node.value


def nodes_below(node: Node) -> int:
    """Counts the judged states."""
    return sum(1 + nodes_below(child) for child in node.children)


def ends_step(before: str, step: str) -> bool:
    """Returns whether a step ends here, given the response's text before the step, and the step's own text so far.

    In a list of calls, a step ends where brackets outside strings are back at list level; elsewhere at the end of a
    sentence.
    """
    if not (before + step).lstrip().startswith("["):
        return step.rstrip(" \"'").endswith(SENTENCE_ENDS) and any(c.isalnum() for c in step)
    depth, quote, escaped, highest = 0, "", False, 0
    for i, c in enumerate(before + step):
        if quote:
            quote = "" if c == quote and not escaped else quote
            escaped = c == "\\" and not escaped
        elif c in "\"'":
            quote = c
        else:
            depth += (c in "[({") - (c in "])}")
        highest = max(highest, depth) if i >= len(before) else 0
    return not quote and depth <= 1 < highest
