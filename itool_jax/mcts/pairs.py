"""Extracts step-level preference pairs from finished search trees.

In: a finished `Tree` and the tokens of the step into each node.
Out: at most one `Pair` per node: its best child against its worst.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np

from itool_jax.mcts.tree import NO_CHILD, ROOT, Tree

# Q is float32: 0.4 - 0.3 must count as a gap of 0.1.
ROUNDING = 1e-5


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Rules for turning sibling steps into preference pairs."""

    min_q_gap: float = 0.1
    """Smallest difference in Q between the chosen and the rejected step of a pair."""
    require: Literal["outcome", "gap"] = "outcome"
    """Further condition on a pair. outcome: the best outcome below the chosen step must also beat the best one below
    the rejected step by min_q_gap. gap: no further condition, as in the paper."""
    rejected: Literal["whole", "first_difference"] = "whole"
    """How much of the rejected step to keep. whole: all of it, as in the paper. first_difference: up to and including
    the first token that differs from the chosen step, so that training does not penalize the tokens after it."""
    held_out: float = 0.1
    """Share of the searched prompts whose pairs are kept out of training, to measure its effect."""
    file: str | None = None
    """Pairs for stage dpo to train on instead of a search's: a file, a folder or hf:OWNER/NAME with the columns of TRL
    (prompt, chosen, rejected) or LLaMA-Factory, or the pairs.jsonl of another run of the same model."""

    def __post_init__(self) -> None:
        if not self.min_q_gap >= 0:
            raise ValueError(f"pairs.min_q_gap must not be negative, got {self.min_q_gap}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"pairs.held_out must be in [0, 1), got {self.held_out}")
        if self.file == "":
            raise ValueError("pairs.file must not be empty; omit it to train on the search's pairs")

    def accepts(self, pair: "Pair") -> bool:
        """Returns whether to train on a pair whose Q gap is wide enough."""
        return self.require == "gap" or self.is_valid(pair)

    def is_valid(self, pair: "Pair") -> bool:
        """Returns whether the outcomes agree that the chosen step is better."""
        return pair.best_ending_chosen - pair.best_ending_rejected >= self.min_q_gap - ROUNDING and (
            pair.best_ending_chosen > pair.best_ending_rejected
        )


class Pair(NamedTuple):
    """Two continuations of the state prompt + `path`: `chosen_ids` is preferred over `rejected_ids`."""

    node: int
    chosen_node: int
    rejected_node: int
    q_chosen: float
    q_rejected: float
    visits_chosen: int
    visits_rejected: int
    path: list[int]  # tokens from the root to the node
    chosen_ids: list[int]
    rejected_ids: list[int]
    best_ending_chosen: float
    """Highest outcome O among the tree's responses that continue from the chosen step; -1 if none ended."""
    best_ending_rejected: float
    chosen_sampled: bool
    """True if the model sampled the chosen step, False if it is an injected gold step."""
    chosen_is_gold: bool
    """True if the response up to and including the chosen step matches the gold response, sampled or injected."""


def preference_pairs(
    tree: Tree,
    steps: Sequence[list[int]],
    decode: Callable[[list[int]], str],
    settings: PairSettings,
    observed: Mapping[int, list[int]] | None = None,
) -> list[Pair]:
    """Returns the pairs of a finished tree whose Q gap is wide enough, in node order.

    `settings.accepts` decides which of them to train on. A node gives a pair if:
    - at least two of its children are eligible: visited or terminal, and not cut off by the token limit;
    - the highest and lowest Q among them (the first slot on ties) are at least `min_q_gap` apart;
    - the texts of these two steps differ.

    The Q of a terminal child that was never visited is its step reward, which a visit would not change.

    Args:
        tree: one tree.
        steps: token ids of the step into each node; empty for the root.
        decode: converts the ids of a step to text.
        settings: thresholds.
        observed: by node, the recorded tokens that follow the step into it.
    """
    tree = jax.device_get(tree)
    behind = {node: [*ids, *(observed or {}).get(node, [])] for node, ids in enumerate(steps)}
    endings_N = _best_endings(tree)
    nodes = range(int(tree.n_nodes))
    pairs = [_node_pair(tree, node, steps, behind, endings_N, settings) for node in nodes]
    return [pair for pair in pairs if pair and decode(pair.chosen_ids) != decode(pair.rejected_ids)]


def _best_endings(tree: Tree) -> np.ndarray:
    """Returns the highest outcome O of the terminal states at or below each node, -1 if there are none."""
    best_N = np.where(tree.terminal_N, tree.extra.outcome, -1.0)
    for node in range(int(tree.n_nodes) - 1, ROOT, -1):  # children have higher ids than their parents
        parent = int(tree.parent_N[node])
        best_N[parent] = max(best_N[parent], best_N[node])
    return best_N


def _node_pair(
    tree: Tree,
    node: int,
    steps: Sequence[list[int]],
    behind: Mapping[int, list[int]],
    endings_N: np.ndarray,
    settings: PairSettings,
) -> Pair | None:
    """Pairs the best and the worst eligible child of a node, if their Q gap is wide enough; the texts may be equal."""
    children = _eligible_children(tree, node)
    if len(children) < 2:
        return None
    q_values = tree.q_value_N[children]
    best, worst = int(np.argmax(q_values)), int(np.argmin(q_values))
    q_chosen, q_rejected = float(q_values[best]), float(q_values[worst])
    if q_chosen - q_rejected < settings.min_q_gap - ROUNDING:
        return None
    chosen, rejected = children[best], children[worst]
    return Pair(
        node=node,
        chosen_node=chosen,
        rejected_node=rejected,
        q_chosen=q_chosen,
        q_rejected=q_rejected,
        visits_chosen=int(tree.visit_count_N[chosen]),
        visits_rejected=int(tree.visit_count_N[rejected]),
        path=_path(tree, node, behind),
        chosen_ids=steps[chosen],
        rejected_ids=steps[rejected]
        if settings.rejected == "whole"
        else _until_they_differ(steps[rejected], steps[chosen]),
        best_ending_chosen=float(endings_N[chosen]),
        best_ending_rejected=float(endings_N[rejected]),
        chosen_sampled=bool(tree.extra.sampled[chosen]),
        chosen_is_gold=bool(tree.extra.matches_reference[chosen]),
    )


def _until_they_differ(ids: list[int], other: list[int]) -> list[int]:
    """Returns `ids` up to and including the first token that differs from `other`."""
    n_alike = sum(itertools.takewhile(bool, (a == b for a, b in zip(ids, other, strict=False))))
    return ids[: n_alike + 1]


def _eligible_children(tree: Tree, node: int) -> list[int]:
    children = [int(child) for child in tree.children_NW[node] if child != NO_CHILD]
    return [
        child
        for child in children
        if tree.extra.complete[child] and (tree.terminal_N[child] or tree.visit_count_N[child] > 0)
    ]


def _path(tree: Tree, node: int, behind: Mapping[int, list[int]]) -> list[int]:
    path: list[int] = []
    while node != ROOT:
        path = behind[node] + path
        node = int(tree.parent_N[node])
    return path
