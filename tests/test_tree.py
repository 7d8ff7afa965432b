"""The search tree against golden toy trees, a plain float64 search, and the invariants of the backup."""

import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itool_jax.mcts import tree as trees
from itool_jax.mcts.tree import NO_CHILD, NO_PARENT, ROOT, Candidates, NodeExtra, Tree, ValueWeight

MAX_NODES, WIDTH = 48, 3


class State(NamedTuple):
    """A state of a toy problem; terminal without children."""

    name: str
    score: float = 0.0
    prior: float = 0.0
    children: tuple["State", ...] = ()


class Search(NamedTuple):
    """One finished toy search: the tree as numpy arrays, node ids by name, the leaf's name a simulation."""

    tree: Tree
    ids: dict[str, int]
    leaves: list[str]
    root_values: list[float]

    def of(self, name: str) -> dict[str, float]:
        arrays = {"n": self.tree.visit_count_N, "q": self.tree.q_value_N, "v": self.tree.value_N}
        return {key: array[self.ids[name]].item() for key, array in arrays.items()}


TOY = State(
    "",
    children=(
        State("a", 0.6, 0.6, (State("aa", 1.9, 0.7), State("ab", -0.7, 0.3))),
        State("b", 0.3, 0.4, (State("ba", -0.8, 0.5), State("bb", 1.8, 0.5))),
    ),
)


# --- drivers: the arrays under test, and the reference ---

select_child = jax.jit(trees.select_child)
expand = jax.jit(trees.expand)
backup = jax.jit(trees.backup, static_argnames="value_weight")
descend = jax.jit(trees.descend)
# The same over a batch of trees.
descend_all = jax.jit(jax.vmap(trees.descend, (0, None)))
select_child_all = jax.jit(jax.vmap(trees.select_child, (0, 0, None)))
expand_all = jax.jit(jax.vmap(trees.expand))


@functools.partial(jax.jit, static_argnames="value_weight")
def backup_all(tree: Tree, leaf_B: jax.Array, discount: float, value_weight: ValueWeight) -> Tree:
    return jax.vmap(lambda one, leaf: trees.backup(one, leaf, discount, value_weight))(tree, leaf_B)


def stacked(rows: Sequence[Any]) -> Any:
    """Pytrees as one with a dimension more in front."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def candidates_of(state: State, width: int = WIDTH) -> Candidates:
    """The children of a state, padded to the tree's slots; none of a terminal one."""

    def column(value: Callable[[State], object], padding: object) -> jax.Array:
        return jnp.asarray([value(c) for c in state.children] + [padding] * (width - len(state.children)))

    terminal_W = column(lambda c: not c.children, False)
    score_W = column(lambda c: c.score, 0.0)
    return Candidates(
        valid_W=column(lambda c: True, False),
        prior_W=column(lambda c: c.prior, 0.0),
        state_score_W=score_W,
        terminal_W=terminal_W,
        extra=NodeExtra(jnp.zeros_like(score_W), score_W, *[jnp.zeros_like(terminal_W)] * 3),
    )


def run_search(
    roots: list[State],
    n_simulations: int,
    exploration: float = 1.0,
    discount: float = 1.0,
    value_weight: ValueWeight = "visits",
) -> list[Search]:
    """Searches a batch of toy problems with the arrays under test."""
    tree = stacked([trees.new_tree(MAX_NODES, WIDTH)] * len(roots))
    states: list[dict[int, State]] = [{ROOT: root} for root in roots]
    leaves: list[list[str]] = [[] for _ in roots]
    root_values: list[list[float]] = [[] for _ in roots]
    for _ in range(n_simulations):
        node_B = descend_all(tree, exploration)
        while True:
            here = [known[int(node)] for known, node in zip(states, node_B, strict=True)]
            if not any(state.children for state in here):
                break
            tree, child_BW = expand_all(tree, node_B, stacked([candidates_of(state) for state in here]))
            for known, state, child_W in zip(states, here, np.asarray(child_BW), strict=True):
                known.update({int(i): c for i, c in zip(child_W, state.children, strict=False) if i != NO_CHILD})
            inner_B = jnp.asarray([bool(state.children) for state in here])
            node_B = jnp.where(inner_B, select_child_all(tree, node_B, exploration), node_B)
        tree = backup_all(tree, node_B, discount, value_weight)
        for b, state in enumerate(here):
            leaves[b].append(state.name)
            root_values[b].append(float(tree.value_N[b, ROOT]))
    arrays = jax.device_get(tree)
    return [
        Search(
            tree=jax.tree.map(lambda array, b=b: array[b], arrays),
            ids={state.name: node for node, state in states[b].items()},
            leaves=leaves[b],
            root_values=root_values[b],
        )
        for b in range(len(roots))
    ]


class Reference:
    """The same search in float64, one object a node and recursion instead of arrays."""

    def __init__(self, state: State, reward: float = 0.0):
        self.state, self.reward, self.q, self.n, self.v = state, reward, reward, 0, 0.0
        self.children = [Reference(c, c.score - state.score) for c in state.children]

    def simulate(self, exploration: float, discount: float, value_weight: ValueWeight) -> str:
        leaf = self.state.name
        if self.children:
            scores = [c.q + exploration * c.state.prior * math.sqrt(self.n) / (1 + c.n) for c in self.children]
            child = self.children[scores.index(max(scores))]
            leaf = child.simulate(exploration, discount, value_weight)
            weights = [c.n if value_weight == "visits" else max(1, c.n) for c in self.children]
            self.v = sum(w * c.q for w, c in zip(weights, self.children, strict=True)) / sum(weights)
            self.q = self.reward + discount * self.v if self.state.name else 0.0  # no edge leads into the root
        self.n += 1
        return leaf

    def walk(self) -> Iterator["Reference"]:
        yield self
        for child in self.children:
            yield from child.walk()


def random_state(rng: random.Random, name: str = "", depth: int = 0) -> State:
    """At most three deep, three wide: 40 nodes. Scores: +-1 at terminals, plus a confidence."""
    terminal = depth == 3 or (depth > 0 and rng.random() < 0.3)
    width = 0 if terminal else rng.randint(1, WIDTH)
    outcome = rng.choice([-1, 1]) if terminal else 0
    children = tuple(random_state(rng, name + "abc"[i], depth + 1) for i in range(width))
    return State(name, outcome + rng.random() if depth else 0.0, rng.random(), children)


def random_states(seed: int, count: int) -> list[State]:
    rng = random.Random(seed)
    return [random_state(rng) for _ in range(count)]


# --- golden numbers ---


@pytest.mark.parametrize(
    ("q", "prior", "visits", "score"), [(0.5, 0.6, 2, 0.9), (0.3, 0.3, 1, 0.6), (0.0, 0.1, 0, 0.2)]
)
def test_puct(q, prior, visits, score):
    got = trees.puct(jnp.float32(q), jnp.float32(prior), jnp.int32(4), jnp.int32(visits), 1.0)
    assert got == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    ("value_weight", "discount", "leaves", "n", "q", "v", "first_v"),
    [
        ("visits", 1.0, "aa aa aa bb bb aa bb aa", (5, 3), (1.9, 1.8), 1.8625, 1.9),
        ("max1", 1.0, "aa bb aa aa aa aa bb aa", (6, 2), (1.528571, 0.933333), 1.379762, 0.45),
        ("visits", 0.9, "aa aa aa bb bb aa bb aa", (5, 3), (1.77, 1.65), 1.725, 1.77),
    ],
)
def test_golden_toy_tree(value_weight, discount, leaves, n, q, v, first_v):
    (search,) = run_search([TOY], 8, exploration=4.0, discount=discount, value_weight=value_weight)
    a, b = search.of("a"), search.of("b")
    assert search.leaves == leaves.split()
    assert (a["n"], b["n"]) == n
    assert (a["q"], b["q"]) == pytest.approx(q, abs=2e-6)
    assert search.of("")["v"] == pytest.approx(v, abs=2e-6)
    assert search.root_values[0] == pytest.approx(first_v, abs=2e-6)


@pytest.mark.parametrize("value_weight", ["visits", "max1"])
def test_a_new_edge_starts_at_its_step_reward(value_weight):
    """And has to: from zero, the search takes other paths than the golden ones."""
    tree, child_W = expand(trees.new_tree(MAX_NODES, WIDTH), ROOT, candidates_of(TOY))
    np.testing.assert_allclose(tree.q_value_N[child_W[:2]], [0.6, 0.3], rtol=1e-6)

    from_reward, from_zero = Reference(TOY), Reference(TOY)
    for node in from_zero.walk():
        node.q = 0.0
    golden = run_search([TOY], 8, exploration=4.0, value_weight=value_weight)[0].leaves
    assert [from_reward.simulate(4.0, 1.0, value_weight) for _ in range(8)] == golden
    assert [from_zero.simulate(4.0, 1.0, value_weight) for _ in range(8)] != golden


@pytest.mark.parametrize("value_weight", ["visits", "max1"])
@pytest.mark.parametrize(("exploration", "discount"), [(1.0, 1.0), (4.0, 1.0), (1.0, 0.9), (0.0, 1.0), (2.0, 0.0)])
def test_random_trees_equal_the_plain_search(value_weight, exploration, discount):
    roots = random_states(seed=11, count=6)
    for root, search in zip(roots, run_search(roots, 20, exploration, discount, value_weight), strict=True):
        reference = Reference(root)
        assert search.leaves == [reference.simulate(exploration, discount, value_weight) for _ in range(20)]
        nodes = [node for node in reference.walk() if node.state.name in search.ids]
        assert len(nodes) == search.tree.n_nodes
        for node in nodes:
            got = search.of(node.state.name)
            assert got["n"] == node.n
            assert (got["q"], got["v"]) == pytest.approx((node.q, node.v), abs=1e-5)


# --- invariants ---


@pytest.mark.parametrize("value_weight", ["visits", "max1"])
def test_visits_add_up(value_weight):
    for search in run_search(random_states(seed=1, count=6), 16, value_weight=value_weight):
        children_NW, visits_N = search.tree.children_NW, search.tree.visit_count_N
        assert visits_N[ROOT] == 16
        inner = [node for node in search.ids.values() if (children_NW[node] != NO_CHILD).any()]
        assert ROOT in inner
        for node in inner:
            assert visits_N[node] == visits_N[children_NW[node][children_NW[node] != NO_CHILD]].sum()


def test_undiscounted_q_is_the_mean_terminal_score_below():
    roots = random_states(seed=2, count=6)
    for root, search in zip(roots, run_search(roots, 16), strict=True):
        score = {node.state.name: node.state.score for node in Reference(root).walk()}
        visited = [name for name in search.ids if name and search.of(name)["n"]]
        assert visited
        for name in visited:
            below = [score[leaf] for leaf in search.leaves if leaf.startswith(name)]
            assert search.of(name)["q"] == pytest.approx(sum(below) / len(below) - score[name[:-1]], abs=1e-5)


@pytest.mark.parametrize("value_weight", ["visits", "max1"])
def test_discount_zero_leaves_the_step_reward(value_weight):
    for search in run_search(random_states(seed=3, count=6), 16, discount=0.0, value_weight=value_weight):
        np.testing.assert_array_equal(search.tree.q_value_N, search.tree.step_reward_N)
        assert np.ptp(search.tree.q_value_N) > 0


def test_exploration_zero_is_greedy():
    (search,) = run_search([TOY], 8, exploration=0.0)
    assert search.leaves == ["aa"] * 8
    tree = jax.tree.map(jnp.asarray, search.tree)
    q_a, q_b = search.of("a")["q"], search.of("b")["q"]
    assert q_a > q_b
    assert select_child(tree, ROOT, 0.0) == search.ids["a"]
    swapped = tree._replace(q_value_N=tree.q_value_N.at[search.ids["b"]].set(q_a + 1))
    assert select_child(swapped, ROOT, 0.0) == search.ids["b"]


@pytest.mark.parametrize("value_weight", ["visits", "max1"])
def test_permuted_siblings_permute_the_results(value_weight):
    def mirrored(state: State) -> State:
        return state._replace(children=tuple(mirrored(child) for child in reversed(state.children)))

    roots = random_states(seed=4, count=6)
    plain = run_search(roots, 16, value_weight=value_weight)
    permuted = run_search([mirrored(root) for root in roots], 16, value_weight=value_weight)
    assert any(one.ids != other.ids for one, other in zip(plain, permuted, strict=True))
    for one, other in zip(plain, permuted, strict=True):
        assert one.leaves == other.leaves
        assert one.ids.keys() == other.ids.keys()
        for name in one.ids:
            assert one.of(name) == pytest.approx(other.of(name), abs=1e-5)


@pytest.mark.parametrize("value_weight", ["visits", "max1"])
def test_a_batch_equals_each_tree_alone(value_weight):
    """The same decisions, and numbers equal but for the last bit: jax 0.12 adds up a batch of one in another order."""

    def assert_equal(x, y):
        if np.issubdtype(np.asarray(x).dtype, np.floating):
            np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-7)
        else:
            np.testing.assert_array_equal(x, y)

    roots = random_states(seed=5, count=7)
    together = run_search(roots, 12, discount=0.9, value_weight=value_weight)
    for root, search in zip(roots, together, strict=True):
        (alone,) = run_search([root], 12, discount=0.9, value_weight=value_weight)
        assert alone.leaves == search.leaves
        jax.tree.map(assert_equal, alone.tree, search.tree)


# --- one operation at a time ---


def children_of(scores, terminal, valid=None, matches_reference=None, priors=None) -> Candidates:
    """Candidates of a node."""
    width = len(scores)
    score_W = jnp.asarray(scores)
    outcome_W = jnp.asarray([1.0 if end else 0.0 for end in terminal])
    return Candidates(
        valid_W=jnp.asarray(valid or [True] * width),
        prior_W=jnp.asarray(priors or [0.5] * width),
        state_score_W=score_W,
        terminal_W=jnp.asarray(terminal),
        extra=NodeExtra(
            outcome_W,
            score_W - outcome_W,
            jnp.asarray(matches_reference or [False] * width),
            *[jnp.asarray([True] * width)] * 2,
        ),
    )


def test_new_tree_is_a_root():
    tree = trees.new_tree(5, 3)
    assert tree.children_NW.shape == (5, 3)
    assert (tree.children_NW == NO_CHILD).all()
    assert tree.parent_N.shape == (5,)
    assert (tree.parent_N == NO_PARENT).all()
    assert tree.n_nodes == 1
    assert tree.extra.matches_reference.tolist() == [True] + [False] * 4
    assert tree.state_score_N[ROOT] == 0
    assert descend(tree, 1.0) == ROOT
    assert select_child(tree, ROOT, 1.0) == NO_CHILD


def test_expand_writes_valid_candidates_contiguously():
    tree = trees.new_tree(8, 3)
    first = children_of([0.25, 9.0, 0.75], [False] * 3, [True, False, True], [False, False, True], [0.2, 0.9, 0.4])
    tree, child_W = expand(tree, ROOT, first)
    assert child_W.tolist() == [1, NO_CHILD, 2]
    second = children_of([1.5, 9.0, 9.0], [True, False, False], [True, False, False])
    tree, child_W = expand(tree, 2, second)
    assert child_W.tolist() == [3, NO_CHILD, NO_CHILD]

    assert tree.n_nodes == 4
    assert tree.children_NW[:4].tolist() == [[1, -1, 2], [-1] * 3, [3, -1, -1], [-1] * 3]
    assert tree.parent_N[:4].tolist() == [NO_PARENT, 0, 0, 2]
    assert tree.depth_N[:4].tolist() == [0, 1, 1, 2]
    assert tree.state_score_N[:4].tolist() == [0.0, 0.25, 0.75, 1.5]
    assert tree.step_reward_N[:4].tolist() == [0.0, 0.25, 0.75, 0.75]
    assert tree.q_value_N[:4].tolist() == [0.0, 0.25, 0.75, 0.75]
    assert tree.extra.confidence[:4].tolist() == [0.0, 0.25, 0.75, 0.5]
    assert tree.extra.outcome[:4].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert tree.terminal_N[:4].tolist() == [False, False, False, True]
    assert tree.extra.matches_reference[:4].tolist() == [True, False, True, False]
    np.testing.assert_allclose(tree.prior_N[:4], [0.0, 0.2, 0.4, 0.5], rtol=1e-6)
    assert not any(np.asarray(array)[4:].any() for array in (tree.state_score_N, tree.q_value_N, tree.depth_N))


def test_expand_leaves_alone_what_it_must_not_touch():
    """Nodes without a valid candidate, terminal nodes and nodes that have children."""
    tree = trees.new_tree(12, 2)
    grown, _ = expand(tree, ROOT, children_of([1.5, 0.5], [True, False]))
    more, none = (children_of([0.1, 0.2], [False, False], [valid] * 2) for valid in (True, False))
    for before, node, candidates in [(tree, ROOT, none), (grown, ROOT, more), (grown, 1, more), (grown, 2, none)]:
        after, child_W = expand(before, node, candidates)
        assert child_W.tolist() == [NO_CHILD, NO_CHILD]
        jax.tree.map(np.testing.assert_array_equal, before, after)
    assert expand(grown, 2, more)[1].tolist() == [3, 4]


def test_expand_drops_what_does_not_fit():
    tree, child_W = expand(trees.new_tree(3, 3), ROOT, children_of([0.1, 0.2, 0.3], [True] * 3))
    assert child_W.tolist() == [1, 2, NO_CHILD]
    assert tree.n_nodes == 3
    np.testing.assert_allclose(tree.state_score_N, [0.0, 0.1, 0.2], rtol=1e-6)


def test_expand_refuses_another_width():
    with pytest.raises(ValueError, match="3 child slots, got 2 candidates"):
        expand(trees.new_tree(8, 3), ROOT, children_of([0.1, 0.2], [True] * 2))


@pytest.mark.parametrize(
    ("scores", "valid", "slot"),
    [
        ([0.5, 0.5, 0.5], None, 0),
        ([0.1, 0.5, 0.5], None, 1),
        ([0.5, -8.0, 0.5], [False, True, False], 1),  # an empty slot loses to any child
    ],
)
def test_select_child_takes_the_first_of_the_best(scores, valid, slot):
    tree, child_W = expand(trees.new_tree(8, 3), ROOT, children_of(scores, [False] * 3, valid))
    assert select_child(tree, ROOT, 1.0) == child_W[slot]


def test_descend_stops_at_each_trees_own_leaf():
    shallow, child_W = expand(trees.new_tree(12, 3), ROOT, candidates_of(TOY))
    deep, below_W = expand(shallow, child_W[0], candidates_of(TOY.children[0]))
    assert descend_all(stacked([deep, shallow]), 1.0).tolist() == [below_W[0], child_W[0]]


def test_backup_of_no_leaf_changes_nothing():
    """Alone, and in a batch in which another tree is backed up."""
    tree, child_W = expand(trees.new_tree(6, 3), ROOT, candidates_of(TOY))
    jax.tree.map(np.testing.assert_array_equal, tree, backup(tree, NO_PARENT, 1.0, value_weight="visits"))
    after = backup_all(stacked([tree, tree]), jnp.array([child_W[1], NO_PARENT]), 1.0, value_weight="visits")
    assert after.visit_count_N[:, :3].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert after.value_N[0, ROOT] == pytest.approx(0.3)
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one, other[1]), tree, after)
