"""A batch of search trees as preallocated arrays: PUCT selection, expansion and backup; it knows no model.

In: what a model and a judge say of new states (`Candidates`). Out: the `Tree` with visit counts, Q and V.
Every function is pure, works on all trees of the batch at once and has static shapes, so that it compiles.
Trees do not see each other: a batch gives what each tree gives alone. The tokens of the nodes stay with the
caller, in arrays indexed by node id.

Letters: B trees, N nodes (the capacity), W child slots (the breadth, plus one if the gold's step may join).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from itool_jax.types import AnyArray, IntB

ROOT = 0
NO_PARENT = -1
NO_CHILD = -1

ValueWeight = Literal["visits", "max1"]

IntBW = Int[AnyArray, "B W"]
FloatBW = Float[AnyArray, "B W"]
BoolB = Bool[AnyArray, "B"]
BoolBW = Bool[AnyArray, "B W"]


class Tree(NamedTuple):
    """B trees of at most N nodes; a column is a node and the edge into it, free from `n_nodes_B` on."""

    parent_BN: Int[Array, "B N"]  # NO_PARENT at the root
    depth_BN: Int[Array, "B N"]  # 0 at the root
    children_BNW: Int[Array, "B N W"]  # node ids or NO_CHILD
    prior_BN: Float[Array, "B N"]  # p of the edge into the node
    state_score_BN: Float[Array, "B N"]  # R = outcome + confidence (eq 6); 0 at the root
    confidence_BN: Float[Array, "B N"]  # C (eq 7)
    outcome_BN: Float[Array, "B N"]  # O: 0 where not terminal
    step_reward_BN: Float[Array, "B N"]  # r = R(s') - R(s)
    visit_count_BN: Int[Array, "B N"]  # N
    q_value_BN: Float[Array, "B N"]  # Q of the edge into the node; the step reward until the first visit
    value_BN: Float[Array, "B N"]  # V; 0 without children and before the first visit
    terminal_BN: Bool[Array, "B N"]
    on_gold_BN: Bool[Array, "B N"]  # the response so far is a prefix of the gold's
    n_nodes_B: IntB  # nodes in use


class Candidates(NamedTuple):
    """W candidate steps a tree and the scores of the states they lead to; slots not valid are ignored."""

    valid_BW: BoolBW
    prior_BW: FloatBW
    state_score_BW: FloatBW
    confidence_BW: FloatBW
    outcome_BW: FloatBW
    terminal_BW: BoolBW
    on_gold_BW: BoolBW


def new_tree(batch: int, max_nodes: int, max_children: int) -> Tree:
    """Returns `batch` trees that hold a root only, with R(root) = 0 and the empty prefix on the gold."""
    ids_BN = jnp.full((batch, max_nodes), NO_PARENT, jnp.int32)
    zeros_BN = jnp.zeros((batch, max_nodes), jnp.float32)
    counts_BN = jnp.zeros((batch, max_nodes), jnp.int32)
    flags_BN = jnp.zeros((batch, max_nodes), bool)
    return Tree(
        parent_BN=ids_BN,
        depth_BN=counts_BN,
        children_BNW=jnp.full((batch, max_nodes, max_children), NO_CHILD, jnp.int32),
        prior_BN=zeros_BN,
        state_score_BN=zeros_BN,
        confidence_BN=zeros_BN,
        outcome_BN=zeros_BN,
        step_reward_BN=zeros_BN,
        visit_count_BN=counts_BN,
        q_value_BN=zeros_BN,
        value_BN=zeros_BN,
        terminal_BN=flags_BN,
        on_gold_BN=flags_BN.at[:, ROOT].set(True),
        n_nodes_B=jnp.ones(batch, jnp.int32),
    )


def puct(
    q: jax.Array,
    prior: jax.Array,
    parent_visits: jax.Array,
    child_visits: jax.Array,
    exploration: float | Array,
) -> jax.Array:
    """Eq 5: Q + exploration * p * sqrt(N(s)) / (1 + N(s')), element by element.

    N(s) is the parent's count before the simulation at hand: at a node just expanded it is 0, so Q decides.
    """
    return q + exploration * prior * jnp.sqrt(jnp.asarray(parent_visits, jnp.float32)) / (1 + child_visits)


def select_child(tree: Tree, node_B: IntB, exploration: float | Array) -> IntB:
    """Returns the child of highest PUCT, the first slot where tied; NO_CHILD where the node has none."""
    child_BW = _children(tree, node_B)
    score_BW = puct(
        _gather(tree.q_value_BN, child_BW),
        _gather(tree.prior_BN, child_BW),
        _pick(tree.visit_count_BN, node_B)[:, None],
        _gather(tree.visit_count_BN, child_BW),
        exploration,
    )
    score_BW = jnp.where(child_BW == NO_CHILD, -jnp.inf, score_BW)
    return _pick(child_BW, jnp.argmax(score_BW, axis=1))


def is_leaf(tree: Tree, node_B: IntB) -> BoolB:
    """Returns whether the node has no children."""
    return jnp.all(_children(tree, node_B) == NO_CHILD, axis=1)


def descend(tree: Tree, exploration: float | Array) -> IntB:
    """Returns the node without children that PUCT leads to from each root."""

    def any_inner(node_B: IntB) -> jax.Array:
        return ~jnp.all(is_leaf(tree, node_B))

    def step(node_B: IntB) -> jax.Array:
        child_B = select_child(tree, node_B, exploration)
        return jnp.where(child_B == NO_CHILD, node_B, child_B)

    return jax.lax.while_loop(any_inner, step, jnp.full(tree.n_nodes_B.shape, ROOT, jnp.int32))


def expand(tree: Tree, node_B: IntB, candidates: Candidates, active_B: BoolB) -> tuple[Tree, IntBW]:
    """Writes the valid candidates as children of `node_B`; returns the tree and the ids, NO_CHILD where none.

    Ids are given out in slot order. Trees not active, terminal nodes and nodes with children are left alone.
    Candidates beyond the capacity of a tree are dropped, so the caller allocates enough nodes.
    The Q of a new edge is its step reward: with 0, the golden toy trees of the tests take other paths.

    Raises:
        ValueError: the candidates do not fill the tree's child slots.
    """
    max_children = tree.children_BNW.shape[2]
    if candidates.valid_BW.shape[1] != max_children:
        raise ValueError(f"the tree has {max_children} child slots, got {candidates.valid_BW.shape[1]} candidates")
    active_B = active_B & is_leaf(tree, node_B) & ~_pick(tree.terminal_BN, node_B)
    child_BW = _allocate(tree, candidates.valid_BW & active_B[:, None])
    old_children_BW = _children(tree, node_B)
    children_BW = jnp.where(active_B[:, None], child_BW, old_children_BW)
    row_B = jnp.arange(node_B.shape[0])
    tree = tree._replace(
        children_BNW=tree.children_BNW.at[row_B, node_B].set(children_BW),
        n_nodes_B=tree.n_nodes_B + jnp.sum(child_BW != NO_CHILD, axis=1, dtype=jnp.int32),
    )
    return _write_nodes(tree, node_B, child_BW, candidates), child_BW


def backup(tree: Tree, leaf_B: IntB, active_B: BoolB, discount: float | Array, value_weight: ValueWeight) -> Tree:
    """Counts one simulation that ended at `leaf_B` and renews V and Q from there up to the root, if active.

    N += 1; V(s) = sum(w Q) / sum(w) over the children (eq 9); Q(s, a) = r + discount * V(s') (eq 8).
    A child's weight w is N(s') for "visits", so that unvisited children take no part; for "max1" (the public
    code of arXiv 2405.00451) it is max(1, N(s')), so that they do, with their step reward as Q.
    """

    def any_left(carry: tuple[Tree, jax.Array]) -> jax.Array:
        return jnp.any(carry[1] != NO_PARENT)

    def step(carry: tuple[Tree, jax.Array]) -> tuple[Tree, jax.Array]:
        tree, node_B = carry
        tree = _update_node(tree, node_B, discount, value_weight)
        return tree, jnp.where(node_B == NO_PARENT, NO_PARENT, _pick(tree.parent_BN, node_B))

    start_B = jnp.where(active_B, leaf_B, NO_PARENT)
    return jax.lax.while_loop(any_left, step, (tree, start_B))[0]


def _update_node(tree: Tree, node_B: IntB, discount: float | Array, value_weight: ValueWeight) -> Tree:
    """One step of the backup; a node that is NO_PARENT stands for a tree that is done."""
    row_B = jnp.arange(node_B.shape[0])
    # A negative index would wrap round to the last node; one beyond the end is dropped.
    slot_B = jnp.where(node_B == NO_PARENT, tree.parent_BN.shape[1], node_B)
    value_B = _children_mean(tree, node_B, value_weight)
    q_value_B = jnp.where(node_B == ROOT, 0.0, _pick(tree.step_reward_BN, node_B) + discount * value_B)
    return tree._replace(
        visit_count_BN=tree.visit_count_BN.at[row_B, slot_B].add(1, mode="drop"),
        value_BN=tree.value_BN.at[row_B, slot_B].set(value_B, mode="drop"),
        q_value_BN=tree.q_value_BN.at[row_B, slot_B].set(q_value_B, mode="drop"),
    )


def _children_mean(tree: Tree, node_B: IntB, value_weight: ValueWeight) -> jax.Array:
    """Eq 9: the weighted mean of the children's Q; 0 where all weights are 0."""
    child_BW = _children(tree, node_B)
    visits_BW = _gather(tree.visit_count_BN, child_BW)
    weight_BW = visits_BW if value_weight == "visits" else jnp.maximum(visits_BW, 1)
    weight_BW = jnp.where(child_BW == NO_CHILD, 0, weight_BW)
    total_B = jnp.sum(weight_BW, axis=1)
    return jnp.sum(weight_BW * _gather(tree.q_value_BN, child_BW), axis=1) / jnp.maximum(total_B, 1)


def _allocate(tree: Tree, wanted_BW: BoolBW) -> jax.Array:
    """Returns the next free ids, in slot order, where wanted and within the capacity; else NO_CHILD."""
    next_BW = tree.n_nodes_B[:, None] + jnp.cumsum(wanted_BW, axis=1, dtype=jnp.int32) - 1
    return jnp.where(wanted_BW & (next_BW < tree.parent_BN.shape[1]), next_BW, NO_CHILD)


def _write_nodes(tree: Tree, node_B: IntB, child_BW: IntBW, candidates: Candidates) -> Tree:
    """Fills the rows of the new nodes `child_BW`, children of `node_B`."""
    row_B1 = jnp.arange(node_B.shape[0])[:, None]
    slot_BW = jnp.where(child_BW == NO_CHILD, tree.parent_BN.shape[1], child_BW)
    step_reward_BW = candidates.state_score_BW - _pick(tree.state_score_BN, node_B)[:, None]
    depth_B = _pick(tree.depth_BN, node_B) + 1

    def write(array_BN: Array, value_BW: AnyArray) -> Array:
        return array_BN.at[row_B1, slot_BW].set(value_BW, mode="drop")

    return tree._replace(
        parent_BN=write(tree.parent_BN, node_B[:, None]),
        depth_BN=write(tree.depth_BN, depth_B[:, None]),
        prior_BN=write(tree.prior_BN, candidates.prior_BW),
        state_score_BN=write(tree.state_score_BN, candidates.state_score_BW),
        confidence_BN=write(tree.confidence_BN, candidates.confidence_BW),
        outcome_BN=write(tree.outcome_BN, candidates.outcome_BW),
        step_reward_BN=write(tree.step_reward_BN, step_reward_BW),
        q_value_BN=write(tree.q_value_BN, step_reward_BW),
        terminal_BN=write(tree.terminal_BN, candidates.terminal_BW),
        on_gold_BN=write(tree.on_gold_BN, candidates.on_gold_BW),
    )


def _children(tree: Tree, node_B: IntB) -> jax.Array:
    return tree.children_BNW[jnp.arange(node_B.shape[0]), node_B]


def _pick(array_BN: Array, index_B: IntB) -> Array:
    return array_BN[jnp.arange(index_B.shape[0]), index_B]


def _gather(array_BN: Array, index_BW: IntBW) -> Array:
    """Looks up one row's entries; for NO_CHILD it gives the root's, which callers mask."""
    return jnp.take_along_axis(array_BN, jnp.maximum(index_BW, ROOT), axis=1)
