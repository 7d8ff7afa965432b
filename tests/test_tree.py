"""The search tree against golden toy trees, a plain float64 search, and the invariants of the backup."""

import math
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itool_jax.mcts import tree as trees
from itool_jax.mcts.tree import NO_CHILD, NO_PARENT, ROOT, Candidates, Tree, ValueWeight

MAX_NODES, WIDTH = 48, 3


class State(NamedTuple):
    """A state of a toy problem; terminal without children."""

    name: str
    score: float = 0.0
    prior: float = 0.0
    children: tuple["State", ...] = ()


class Search(NamedTuple):
    """One finished toy search: the tree's arrays as numpy, node ids by name, the leaf's name a simulation."""

    tree: Tree
    ids: dict[str, int]
    leaves: list[str]
    root_values: list[float]

    def of(self, name: str) -> dict[str, float]:
        arrays = {"n": self.tree.visit_count_BN, "q": self.tree.q_value_BN, "v": self.tree.value_BN}
        return {key: array[0, self.ids[name]].item() for key, array in arrays.items()}


TOY = State(
    "",
    children=(
        State("a", 0.6, 0.6, (State("aa", 1.9, 0.7), State("ab", -0.7, 0.3))),
        State("b", 0.3, 0.4, (State("ba", -0.8, 0.5), State("bb", 1.8, 0.5))),
    ),
)


# --- drivers: the arrays under test, and the reference ---

descend = jax.jit(trees.descend)
select_child = jax.jit(trees.select_child)
expand = jax.jit(trees.expand)
backup = jax.jit(trees.backup, static_argnames="value_weight")


def candidates_of(states: list[State], width: int = WIDTH) -> Candidates:
    """The children of one state a tree, padded to the tree's slots."""

    def rows(value: Callable[[State], object], padding: object) -> jax.Array:
        padded = [[value(c) for c in s.children] + [padding] * (width - len(s.children)) for s in states]
        return jnp.asarray(padded)

    terminal_BW = rows(lambda c: not c.children, False)
    score_BW = rows(lambda c: c.score, 0.0)
    return Candidates(
        valid_BW=rows(lambda c: True, False),
        prior_BW=rows(lambda c: c.prior, 0.0),
        state_score_BW=score_BW,
        confidence_BW=score_BW,
        outcome_BW=jnp.zeros_like(score_BW),
        terminal_BW=terminal_BW,
        on_gold_BW=jnp.zeros_like(terminal_BW),
    )


def run_search(
    roots: list[State],
    n_simulations: int,
    exploration: float = 1.0,
    discount: float = 1.0,
    value_weight: ValueWeight = "visits",
) -> list[Search]:
    """Searches a batch of toy problems with the arrays under test."""
    tree = trees.new_tree(len(roots), MAX_NODES, WIDTH)
    states: list[dict[int, State]] = [{ROOT: root} for root in roots]
    leaves: list[list[str]] = [[] for _ in roots]
    root_values: list[list[float]] = [[] for _ in roots]
    everywhere_B = jnp.ones(len(roots), bool)
    for _ in range(n_simulations):
        node_B = descend(tree, exploration)
        while True:
            here = [known[int(node)] for known, node in zip(states, node_B, strict=True)]
            if not any(state.children for state in here):
                break
            active_B = jnp.asarray([bool(state.children) for state in here])
            tree, child_BW = expand(tree, node_B, candidates_of(here), active_B)
            for known, state, child_W in zip(states, here, np.asarray(child_BW), strict=True):
                known.update({int(i): c for i, c in zip(child_W, state.children, strict=False) if i != NO_CHILD})
            node_B = jnp.where(active_B, select_child(tree, node_B, exploration), node_B)
        tree = backup(tree, node_B, everywhere_B, discount, value_weight=value_weight)
        for b, state in enumerate(here):
            leaves[b].append(state.name)
            root_values[b].append(float(tree.value_BN[b, ROOT]))
    arrays = jax.device_get(tree)
    return [
        Search(
            tree=Tree(*(array[b : b + 1] for array in arrays)),
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
    tree = trees.new_tree(1, MAX_NODES, WIDTH)
    tree, child_BW = expand(tree, jnp.array([ROOT]), candidates_of([TOY]), jnp.array([True]))
    np.testing.assert_allclose(tree.q_value_BN[0, child_BW[0, :2]], [0.6, 0.3], rtol=1e-6)

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
        assert len(nodes) == search.tree.n_nodes_B[0]
        for node in nodes:
            got = search.of(node.state.name)
            assert got["n"] == node.n
            assert (got["q"], got["v"]) == pytest.approx((node.q, node.v), abs=1e-5)


# --- invariants ---


@pytest.mark.parametrize("value_weight", ["visits", "max1"])
def test_visits_add_up(value_weight):
    for search in run_search(random_states(seed=1, count=6), 16, value_weight=value_weight):
        children_NW, visits_N = search.tree.children_BNW[0], search.tree.visit_count_BN[0]
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
        np.testing.assert_array_equal(search.tree.q_value_BN, search.tree.step_reward_BN)
        assert np.ptp(search.tree.q_value_BN) > 0


def test_exploration_zero_is_greedy():
    (search,) = run_search([TOY], 8, exploration=0.0)
    assert search.leaves == ["aa"] * 8
    tree = Tree(*map(jnp.asarray, search.tree))
    q_a, q_b = search.of("a")["q"], search.of("b")["q"]
    assert q_a > q_b
    assert select_child(tree, jnp.array([ROOT]), 0.0)[0] == search.ids["a"]
    swapped = tree._replace(q_value_BN=tree.q_value_BN.at[0, search.ids["b"]].set(q_a + 1))
    assert select_child(swapped, jnp.array([ROOT]), 0.0)[0] == search.ids["b"]


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
def test_a_batch_equals_each_tree_alone_exactly(value_weight):
    roots = random_states(seed=5, count=7)
    together = run_search(roots, 12, discount=0.9, value_weight=value_weight)
    for root, search in zip(roots, together, strict=True):
        (alone,) = run_search([root], 12, discount=0.9, value_weight=value_weight)
        assert alone.leaves == search.leaves
        for name, array, other in zip(Tree._fields, alone.tree, search.tree, strict=True):
            np.testing.assert_array_equal(array, other, err_msg=name)


# --- one operation at a time ---


def children_of(scores, terminal, valid=None, on_gold=None, priors=None) -> Candidates:
    """Candidates of one tree."""
    width = len(scores)
    score_BW = jnp.asarray([scores])
    outcome_BW = jnp.asarray([[1.0 if end else 0.0 for end in terminal]])
    return Candidates(
        valid_BW=jnp.asarray([valid or [True] * width]),
        prior_BW=jnp.asarray([priors or [0.5] * width]),
        state_score_BW=score_BW,
        confidence_BW=score_BW - outcome_BW,
        outcome_BW=outcome_BW,
        terminal_BW=jnp.asarray([terminal]),
        on_gold_BW=jnp.asarray([on_gold or [False] * width]),
    )


def test_new_tree_is_a_root():
    tree = trees.new_tree(2, 5, 3)
    assert tree.children_BNW.shape == (2, 5, 3)
    assert (tree.children_BNW == NO_CHILD).all()
    assert tree.parent_BN.shape == (2, 5)
    assert (tree.parent_BN == NO_PARENT).all()
    assert tree.n_nodes_B.tolist() == [1, 1]
    assert tree.on_gold_BN.tolist() == [[True] + [False] * 4] * 2
    assert tree.state_score_BN[0, ROOT] == 0
    assert descend(tree, 1.0).tolist() == [ROOT, ROOT]
    assert select_child(tree, jnp.array([ROOT, ROOT]), 1.0).tolist() == [NO_CHILD, NO_CHILD]


def test_expand_writes_valid_candidates_contiguously():
    tree = trees.new_tree(1, 8, 3)
    root_B, yes_B = jnp.array([ROOT]), jnp.array([True])
    first = children_of([0.25, 9.0, 0.75], [False] * 3, [True, False, True], [False, False, True], [0.2, 0.9, 0.4])
    tree, child_BW = expand(tree, root_B, first, yes_B)
    assert child_BW.tolist() == [[1, NO_CHILD, 2]]
    second = children_of([1.5, 9.0, 9.0], [True, False, False], [True, False, False])
    tree, child_BW = expand(tree, jnp.array([2]), second, yes_B)
    assert child_BW.tolist() == [[3, NO_CHILD, NO_CHILD]]

    used = slice(0, 4)
    assert tree.n_nodes_B.tolist() == [4]
    assert tree.children_BNW[0, used].tolist() == [[1, -1, 2], [-1] * 3, [3, -1, -1], [-1] * 3]
    assert tree.parent_BN[0, used].tolist() == [NO_PARENT, 0, 0, 2]
    assert tree.depth_BN[0, used].tolist() == [0, 1, 1, 2]
    assert tree.state_score_BN[0, used].tolist() == [0.0, 0.25, 0.75, 1.5]
    assert tree.step_reward_BN[0, used].tolist() == [0.0, 0.25, 0.75, 0.75]
    assert tree.q_value_BN[0, used].tolist() == [0.0, 0.25, 0.75, 0.75]
    assert tree.confidence_BN[0, used].tolist() == [0.0, 0.25, 0.75, 0.5]
    assert tree.outcome_BN[0, used].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert tree.terminal_BN[0, used].tolist() == [False, False, False, True]
    assert tree.on_gold_BN[0, used].tolist() == [True, False, True, False]
    np.testing.assert_allclose(tree.prior_BN[0, used], [0.0, 0.2, 0.4, 0.5], rtol=1e-6)
    assert not any(np.asarray(array)[0, 4:].any() for array in (tree.state_score_BN, tree.q_value_BN, tree.depth_BN))


def test_expand_leaves_alone_what_it_must_not_touch():
    """Inactive trees, terminal nodes and nodes that have children."""
    tree = trees.new_tree(1, 12, 2)
    grown, _ = expand(tree, jnp.array([ROOT]), children_of([1.5, 0.5], [True, False]), jnp.array([True]))
    more = children_of([0.1, 0.2], [False, False])
    for before, node, active in [
        (tree, ROOT, False),
        (grown, ROOT, True),
        (grown, 1, True),
        (grown, 2, False),
    ]:
        after, child_BW = expand(before, jnp.array([node]), more, jnp.array([active]))
        assert child_BW.tolist() == [[NO_CHILD, NO_CHILD]]
        jax.tree.map(np.testing.assert_array_equal, before, after)
    assert expand(grown, jnp.array([2]), more, jnp.array([True]))[1].tolist() == [[3, 4]]


def test_expand_drops_what_does_not_fit():
    tree = trees.new_tree(1, 3, 3)
    tree, child_BW = expand(tree, jnp.array([ROOT]), children_of([0.1, 0.2, 0.3], [True] * 3), jnp.array([True]))
    assert child_BW.tolist() == [[1, 2, NO_CHILD]]
    assert tree.n_nodes_B.tolist() == [3]
    np.testing.assert_allclose(tree.state_score_BN, [[0.0, 0.1, 0.2]], rtol=1e-6)


def test_expand_refuses_another_width():
    tree = trees.new_tree(1, 8, 3)
    with pytest.raises(ValueError, match="3 child slots, got 2 candidates"):
        trees.expand(tree, jnp.array([ROOT]), children_of([0.1, 0.2], [True] * 2), jnp.array([True]))


@pytest.mark.parametrize(
    ("scores", "valid", "slot"),
    [
        ([0.5, 0.5, 0.5], None, 0),
        ([0.1, 0.5, 0.5], None, 1),
        ([0.5, -8.0, 0.5], [False, True, False], 1),  # an empty slot loses to any child
    ],
)
def test_select_child_takes_the_first_of_the_best(scores, valid, slot):
    tree = trees.new_tree(1, 8, 3)
    root_B = jnp.array([ROOT])
    tree, child_BW = expand(tree, root_B, children_of(scores, [False] * 3, valid), jnp.array([True]))
    assert select_child(tree, root_B, 1.0)[0] == child_BW[0, slot]


def test_descend_stops_at_each_trees_own_leaf():
    tree = trees.new_tree(2, 12, 3)
    deep_shallow = candidates_of([TOY, TOY])
    tree, child_BW = expand(tree, jnp.array([ROOT, ROOT]), deep_shallow, jnp.array([True, True]))
    below = candidates_of([TOY.children[0]] * 2)
    tree, below_BW = expand(tree, child_BW[:, 0], below, jnp.array([True, False]))
    assert descend(tree, 1.0).tolist() == [below_BW[0, 0], child_BW[1, 0]]


def test_backup_counts_active_trees_only():
    tree = trees.new_tree(2, 6, 3)
    node_B = jnp.array([ROOT, ROOT])
    tree, child_BW = expand(tree, node_B, candidates_of([TOY, TOY]), jnp.array([True, True]))
    after = backup(tree, child_BW[:, 1], jnp.array([True, False]), 1.0, value_weight="visits")
    assert after.visit_count_BN[:, :3].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert after.value_BN[0, ROOT] == pytest.approx(0.3)
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(one[1], other[1]), tree, after)
