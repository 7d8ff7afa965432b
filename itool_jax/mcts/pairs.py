"""Step-level preference pairs out of finished search trees.

In: a `Tree` and the tokens of the step into each node.
Out: at most one `Pair` a node, its best child against its worst.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from itool_jax.mcts.tree import NO_CHILD, ROOT, Tree
from itool_jax.types import AnyArray, IntBN

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

    tree: int  # row in the batch
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
    tree: Tree,
    step_tokens_BNS: Int[AnyArray, "B N S"],
    step_length_BN: IntBN,
    decode: Callable[[list[int]], str],
    settings: PairSettings,
) -> list[Pair]:
    """Returns the pairs of B finished trees, by tree, then by node.

    A node gives a pair when two or more of its children are eligible (visited, or terminal), the highest and
    lowest Q among them (the first slot where tied) lie at least `min_q_gap` apart, and the two texts differ.
    The Q of a terminal child that was never visited is its step reward: a visit would not change it.

    Args:
        tree: B trees of at most N nodes.
        step_tokens_BNS: ids of the step into each node, `step_length_BN` of them and then padding.
        step_length_BN: 0 at the root.
        decode: gives the text of a step from its ids.
        settings: thresholds.
    """
    tree = jax.device_get(tree)
    steps = _unpad(np.asarray(step_tokens_BNS), np.asarray(step_length_BN))
    pairs = [
        _node_pair(tree, b, node, steps[b], settings.min_q_gap)
        for b, n_nodes in enumerate(tree.n_nodes_B)
        for node in range(n_nodes)
    ]
    return [pair for pair in pairs if pair and decode(pair.chosen_ids) != decode(pair.rejected_ids)]


def _node_pair(tree: Tree, b: int, node: int, steps: list[list[int]], min_q_gap: float) -> Pair | None:
    """The best against the worst eligible child of a node, or None; texts are not looked at."""
    children = _eligible_children(tree, b, node)
    if len(children) < 2:
        return None
    q_values = tree.q_value_BN[b, children]
    best, worst = int(np.argmax(q_values)), int(np.argmin(q_values))
    q_chosen, q_rejected = float(q_values[best]), float(q_values[worst])
    if q_chosen - q_rejected < min_q_gap - ROUNDING:
        return None
    chosen, rejected = children[best], children[worst]
    return Pair(
        tree=b,
        node=node,
        chosen_node=chosen,
        rejected_node=rejected,
        q_chosen=q_chosen,
        q_rejected=q_rejected,
        visits_chosen=int(tree.visit_count_BN[b, chosen]),
        visits_rejected=int(tree.visit_count_BN[b, rejected]),
        path=_path(tree, b, node, steps),
        chosen_ids=steps[chosen],
        rejected_ids=steps[rejected],
    )


def _eligible_children(tree: Tree, b: int, node: int) -> list[int]:
    children = [int(child) for child in tree.children_BNW[b, node] if child != NO_CHILD]
    return [child for child in children if tree.terminal_BN[b, child] or tree.visit_count_BN[b, child] > 0]


def _path(tree: Tree, b: int, node: int, steps: list[list[int]]) -> list[int]:
    path: list[int] = []
    while node != ROOT:
        path = steps[node] + path
        node = int(tree.parent_BN[b, node])
    return path


def _unpad(tokens_BNS: np.ndarray, length_BN: np.ndarray) -> list[list[list[int]]]:
    return [
        [tokens_S[:length].tolist() for tokens_S, length in zip(tokens_NS, length_N, strict=True)]
        for tokens_NS, length_N in zip(tokens_BNS, length_BN, strict=True)
    ]
