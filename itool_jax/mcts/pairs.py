"""Step-level preference pairs out of finished search trees.

In: a finished `Tree` and the tokens of the step into each node.
Out: at most one `Pair` a node, its best child against its worst.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from itool_jax.mcts.tree import NO_CHILD, ROOT, Tree

# Q is float32: 0.4 - 0.3 must count as a gap of 0.1.
ROUNDING = 1e-5


@dataclass(frozen=True, kw_only=True)
class PairSettings:
    """Which siblings make a preference pair."""

    min_q_gap: float = 0.1
    """Smallest difference in Q between the preferred and the dispreferred step of a pair."""

    def __post_init__(self) -> None:
        if not self.min_q_gap >= 0:
            raise ValueError(f"pairs.min_q_gap must not be negative, got {self.min_q_gap}")


class Pair(NamedTuple):
    """Two continuations of one state: prompt + `path`, then `chosen_ids` rather than `rejected_ids`."""

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


def preference_pairs(
    tree: Tree, steps: Sequence[list[int]], decode: Callable[[list[int]], str], settings: PairSettings
) -> list[Pair]:
    """Returns the pairs of a finished tree, by node.

    A node gives a pair when two or more of its children are eligible (visited, or terminal), the highest and
    lowest Q among them (the first slot where tied) lie at least `min_q_gap` apart, and the two texts differ.
    The Q of a terminal child that was never visited is its step reward: a visit would not change it.

    Args:
        tree: one tree.
        steps: token ids of the step into each node; none for the root.
        decode: gives the text of a step from its ids.
        settings: thresholds.
    """
    tree = jax.device_get(tree)
    pairs = [_node_pair(tree, node, steps, settings.min_q_gap) for node in range(int(tree.n_nodes))]
    return [pair for pair in pairs if pair and decode(pair.chosen_ids) != decode(pair.rejected_ids)]


def _node_pair(tree: Tree, node: int, steps: Sequence[list[int]], min_q_gap: float) -> Pair | None:
    """Returns the best and the worst eligible child of a node, or None; their texts may be equal."""
    children = _eligible_children(tree, node)
    if len(children) < 2:
        return None
    q_values = tree.q_value_N[children]
    best, worst = int(np.argmax(q_values)), int(np.argmin(q_values))
    q_chosen, q_rejected = float(q_values[best]), float(q_values[worst])
    if q_chosen - q_rejected < min_q_gap - ROUNDING:
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
        path=_path(tree, node, steps),
        chosen_ids=steps[chosen],
        rejected_ids=steps[rejected],
    )


def _eligible_children(tree: Tree, node: int) -> list[int]:
    children = [int(child) for child in tree.children_NW[node] if child != NO_CHILD]
    return [child for child in children if tree.terminal_N[child] or tree.visit_count_N[child] > 0]


def _path(tree: Tree, node: int, steps: Sequence[list[int]]) -> list[int]:
    path: list[int] = []
    while node != ROOT:
        path = steps[node] + path
        node = int(tree.parent_N[node])
    return path
