"""Implements one search tree as preallocated arrays, independent of any model: PUCT selection, expansion and backup.

In: a model's and a judge's scores of new states (`Candidates`). Out: the `Tree` with visit counts, Q and V.
Every function is pure, has static shapes, and works on ONE tree; `jax.vmap` extends it to a batch, whose arrays have a
leading dimension B. Trees are independent, so batching does not change results. The caller keeps the nodes' tokens by
node id.

Letters: N nodes (the capacity), W child slots (the breadth, plus one if a gold step may join).
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from itool_jax.types import AnyArray

ROOT = 0
NO_PARENT = -1
NO_CHILD = -1

ValueWeight = Literal["visits", "max1"]

NodeId = Int[AnyArray, ""]
IntW = Int[AnyArray, " W"]
FloatW = Float[AnyArray, " W"]
BoolW = Bool[AnyArray, " W"]


class NodeExtra(NamedTuple):
    """Per-node (or per-candidate) data that the tree stores but does not use."""

    outcome: Float[AnyArray, " N"]  # O: 0 if not terminal
    confidence: Float[AnyArray, " N"]  # C (eq 7)
    matches_reference: Bool[AnyArray, " N"]  # the response so far is a prefix of the gold response
    complete: Bool[AnyArray, " N"]  # the step into the node was not cut off by the token limit
    sampled: Bool[AnyArray, " N"]  # the model sampled that step; else it is a gold step


class Tree(NamedTuple):
    """A tree of at most N nodes; entry i is node i and the edge into it, unused from `n_nodes` on."""

    n_nodes: Int[Array, ""]
    parent_N: Int[Array, " N"]  # NO_PARENT at the root
    depth_N: Int[Array, " N"]  # 0 at the root
    children_NW: Int[Array, "N W"]  # node ids or NO_CHILD
    prior_N: Float[Array, " N"]  # p of the edge into the node
    state_score_N: Float[Array, " N"]  # R = outcome + confidence (eq 6); 0 at the root
    step_reward_N: Float[Array, " N"]  # r = R(s') - R(s)
    visit_count_N: Int[Array, " N"]  # N
    q_value_N: Float[Array, " N"]  # Q of the edge into the node; the step reward until the first visit
    value_N: Float[Array, " N"]  # V; 0 if the node has no children or no visits
    terminal_N: Bool[Array, " N"]
    extra: NodeExtra


class Candidates(NamedTuple):
    """W candidate steps from one node, and the states they lead to; invalid slots are ignored."""

    valid_W: BoolW
    prior_W: FloatW
    state_score_W: FloatW
    terminal_W: BoolW
    extra: NodeExtra


def new_tree(max_nodes: int, max_children: int) -> Tree:
    """Creates a tree with only a root: R(root) = 0, and the empty response matches the reference."""
    zeros_N = jnp.zeros(max_nodes, jnp.float32)
    counts_N = jnp.zeros(max_nodes, jnp.int32)
    flags_N = jnp.zeros(max_nodes, bool)
    return Tree(
        n_nodes=jnp.int32(1),
        parent_N=jnp.full(max_nodes, NO_PARENT, jnp.int32),
        depth_N=counts_N,
        children_NW=jnp.full((max_nodes, max_children), NO_CHILD, jnp.int32),
        prior_N=zeros_N,
        state_score_N=zeros_N,
        step_reward_N=zeros_N,
        visit_count_N=counts_N,
        q_value_N=zeros_N,
        value_N=zeros_N,
        terminal_N=flags_N,
        extra=NodeExtra(zeros_N, zeros_N, *[flags_N.at[ROOT].set(True)] * 3),
    )


def puct(
    q: jax.Array,
    prior: jax.Array,
    parent_visits: jax.Array,
    child_visits: jax.Array,
    exploration: float | Array,
) -> jax.Array:
    """Computes eq 5, Q + exploration * p * sqrt(N(s)) / (1 + N(s')), elementwise.

    N(s) is the parent's visit count before the current simulation: at a new node it is 0, so Q alone decides.
    """
    return q + exploration * prior * jnp.sqrt(jnp.asarray(parent_visits, jnp.float32)) / (1 + child_visits)


def select_child(tree: Tree, node: NodeId, exploration: float | Array) -> NodeId:
    """Returns the child with the highest PUCT score, the first slot on ties; NO_CHILD if there are no children."""
    child_W = tree.children_NW[node]
    score_W = puct(
        tree.q_value_N[child_W],
        tree.prior_N[child_W],
        tree.visit_count_N[node],
        tree.visit_count_N[child_W],
        exploration,
    )
    return child_W[jnp.argmax(jnp.where(child_W == NO_CHILD, -jnp.inf, score_W))]


def is_leaf(tree: Tree, node: NodeId) -> Bool[AnyArray, ""]:
    """Returns whether the node has no children."""
    return jnp.all(tree.children_NW[node] == NO_CHILD)


def descend(tree: Tree, exploration: float | Array) -> NodeId:
    """Follows PUCT from the root to a node without children."""
    return jax.lax.while_loop(
        lambda node: ~is_leaf(tree, node),
        lambda node: select_child(tree, node, exploration),
        jnp.int32(ROOT),
    )


def expand(tree: Tree, node: NodeId, candidates: Candidates) -> tuple[Tree, IntW]:
    """Adds the valid candidates as children of a leaf; returns the tree and the new ids (NO_CHILD in unused slots).

    Ids are assigned in slot order. Terminal nodes and nodes with children stay unchanged. Candidates beyond the tree's
    capacity are dropped, so the caller must allocate enough nodes.
    The Q of a new edge is its step reward, so that siblings differ before their first visit.

    Raises:
        ValueError: the number of candidate slots differs from the tree's number of child slots.
    """
    max_nodes, max_children = tree.children_NW.shape
    if len(candidates.valid_W) != max_children:
        raise ValueError(f"the tree has {max_children} child slots, got {len(candidates.valid_W)} candidates")
    wanted_W = candidates.valid_W & is_leaf(tree, node) & ~tree.terminal_N[node]
    next_id_W = tree.n_nodes + jnp.cumsum(wanted_W, dtype=jnp.int32) - 1
    child_W = jnp.where(wanted_W & (next_id_W < max_nodes), next_id_W, NO_CHILD)

    # For each node: whether it is new, and which candidate it comes from.
    is_from_NW = jnp.arange(max_nodes)[:, None] == child_W
    is_new_N, slot_N = is_from_NW.any(axis=1), is_from_NW.argmax(axis=1)
    is_node_N = jnp.arange(max_nodes) == node

    def write(array_N: Array, value_W: AnyArray) -> Array:
        return jnp.where(is_new_N, jnp.asarray(value_W)[slot_N], array_N)

    step_reward_W = candidates.state_score_W - tree.state_score_N[node]
    tree = tree._replace(
        n_nodes=tree.n_nodes + jnp.sum(child_W != NO_CHILD, dtype=jnp.int32),
        parent_N=jnp.where(is_new_N, node, tree.parent_N),
        depth_N=jnp.where(is_new_N, tree.depth_N[node] + 1, tree.depth_N),
        children_NW=jnp.where(is_node_N[:, None] & wanted_W, child_W, tree.children_NW),
        prior_N=write(tree.prior_N, candidates.prior_W),
        state_score_N=write(tree.state_score_N, candidates.state_score_W),
        step_reward_N=write(tree.step_reward_N, step_reward_W),
        q_value_N=write(tree.q_value_N, step_reward_W),
        terminal_N=write(tree.terminal_N, candidates.terminal_W),
        extra=jax.tree.map(write, tree.extra, candidates.extra),
    )
    return tree, child_W


def backup(tree: Tree, leaf: NodeId, discount: float | Array, value_weight: ValueWeight) -> Tree:
    """Counts one simulation that ended at `leaf`, and updates V and Q from there up to the root.

    N += 1; V(s) = sum(w Q) / sum(w) over the children (eq 9); Q(s, a) = r + discount * V(s') (eq 8).
    A child's weight w is N(s') for "visits", which excludes unvisited children. For "max1" (the public code of
    arXiv 2405.00451) it is max(1, N(s')), which includes them with their step reward as Q.
    If `leaf` is NO_PARENT, the tree stays unchanged.
    """

    def update(carry: tuple[NodeId, Array, Array, Array]) -> tuple[NodeId, Array, Array, Array]:
        node, visit_count_N, q_value_N, value_N = carry
        child_W = tree.children_NW[node]
        weight_W = visit_count_N[child_W] if value_weight == "visits" else jnp.maximum(visit_count_N[child_W], 1)
        weight_W = jnp.where(child_W == NO_CHILD, 0, weight_W)
        value = jnp.sum(weight_W * q_value_N[child_W]) / jnp.maximum(jnp.sum(weight_W), 1)
        # No edge leads into the root.
        q_value = jnp.where(node == ROOT, 0.0, tree.step_reward_N[node] + discount * value)
        is_node_N = jnp.arange(len(visit_count_N)) == node
        return (
            tree.parent_N[node],
            visit_count_N + is_node_N,
            jnp.where(is_node_N, q_value, q_value_N),
            jnp.where(is_node_N, value, value_N),
        )

    start = jnp.int32(leaf), tree.visit_count_N, tree.q_value_N, tree.value_N
    _, visit_count_N, q_value_N, value_N = jax.lax.while_loop(lambda carry: carry[0] != NO_PARENT, update, start)
    return tree._replace(visit_count_N=visit_count_N, q_value_N=q_value_N, value_N=value_N)
