"""Preference pairs from small trees written out by hand."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itool_jax.mcts.pairs import Pair, PairSettings, preference_pairs
from itool_jax.mcts.tree import NO_CHILD, NO_PARENT, ROOT, Tree, new_tree

MAX_NODES, WIDTH, STEP = 8, 3, 3
SETTINGS = PairSettings()


def hand_tree(nodes: list[tuple[int, float, int, bool]], outcomes: dict[int, float] | None = None) -> Tree:
    """A tree from (parent, Q, visits, terminal) for nodes 1, 2, ...; the root is given."""
    tree = jax.tree.map(np.array, new_tree(MAX_NODES, WIDTH))
    tree.extra.complete[:] = tree.extra.sampled[:] = True
    for node, outcome in (outcomes or {}).items():
        tree.extra.outcome[node] = outcome
    for node, (parent, q, visits, terminal) in enumerate(nodes, start=1):
        tree.parent_N[node] = parent
        tree.q_value_N[node] = q
        tree.visit_count_N[node] = visits
        tree.terminal_N[node] = terminal
        slots_W = tree.children_NW[parent]
        slots_W[np.flatnonzero(slots_W == NO_CHILD)[0]] = node
    return tree._replace(n_nodes=np.int32(1 + len(nodes)))


STEPS = [[], *([10 * node, 10 * node + 1] for node in range(1, MAX_NODES))]
"""The step into node i is [10 i, 10 i + 1]."""


def pairs_of(tree: Tree, settings: PairSettings = SETTINGS, decode: Callable[[list[int]], str] = str) -> list[Pair]:
    return preference_pairs(tree, STEPS, decode, settings)


def test_exact_pairs_of_a_small_tree():
    tree = hand_tree(
        [
            (ROOT, 0.5, 2, False),  # 1
            (ROOT, 1.5, 3, False),  # 2
            (ROOT, -0.5, 1, True),  # 3
            (2, 0.25, 1, True),  # 4
            (2, 1.0, 2, False),  # 5
            (5, -1.0, 0, True),  # 6
            (5, 0.5, 2, True),  # 7
        ]
    )
    assert [pair[:10] for pair in pairs_of(tree)] == [
        (ROOT, 2, 3, 1.5, -0.5, 3, 1, [], [20, 21], [30, 31]),
        (2, 5, 4, 1.0, 0.25, 2, 1, [20, 21], [50, 51], [40, 41]),
        (5, 7, 6, 0.5, -1.0, 2, 0, [20, 21, 50, 51], [70, 71], [60, 61]),
    ]


def test_a_rejected_step_can_end_with_the_first_token_that_differs():
    tree = hand_tree([(ROOT, 1.0, 2, False), (ROOT, -1.0, 1, True)], {2: -1.0, 1: 1.0})
    cut = PairSettings(rejected="first_difference", require="gap")
    for rejected, kept in (([7, 8, 9, 5], [7, 8, 9]), ([3, 8], [3]), ([7, 8], [7, 8]), ([7, 8, 4, 6, 6], [7, 8, 4, 6])):
        steps = [[], [7, 8, 4], rejected]
        (whole,) = preference_pairs(tree, steps, str, SETTINGS)
        (pair,) = preference_pairs(tree, steps, str, cut)
        assert (pair.chosen_ids, pair.rejected_ids) == ([7, 8, 4], kept)
        assert pair._replace(rejected_ids=rejected) == whole


def test_device_arrays_give_plain_python_numbers():
    tree = jax.tree.map(jnp.asarray, hand_tree([(ROOT, 1.0, 1, True), (ROOT, 0.0, 0, True)]))
    (pair,) = pairs_of(tree)
    assert pair == Pair(ROOT, 1, 2, 1.0, 0.0, 1, 0, [], [10, 11], [20, 21], 0.0, 0.0, True, False)
    assert [type(value) for value in pair[:7]] == [int, int, int, float, float, int, int]
    assert [type(value) for value in pair[10:]] == [float, float, bool, bool]
    assert {type(token) for token in pair.chosen_ids + pair.rejected_ids} == {int}


def test_order_is_by_node():
    tree = hand_tree([(ROOT, 1.0, 2, False), (ROOT, 0.0, 1, True), (1, 1.0, 1, True), (1, 0.0, 1, True)])
    assert [pair.node for pair in pairs_of(tree)] == [0, 1]


@pytest.mark.parametrize(
    ("visits", "terminal", "expected"),
    [(0, False, []), (0, True, [(1, 2)]), (1, False, [(1, 2)])],
    ids=["neither", "terminal", "visited"],
)
def test_only_visited_or_terminal_children_are_eligible(visits, terminal, expected):
    tree = hand_tree([(ROOT, 1.0, 1, False), (ROOT, -1.0, visits, terminal)])
    assert [(pair.chosen_node, pair.rejected_node) for pair in pairs_of(tree)] == expected


def test_a_child_not_eligible_is_passed_over():
    tree = hand_tree([(ROOT, 9.0, 0, False), (ROOT, 1.0, 1, False), (ROOT, 0.0, 1, False)])
    assert [(pair.chosen_node, pair.rejected_node) for pair in pairs_of(tree)] == [(2, 3)]


@pytest.mark.parametrize(
    ("high", "low", "count"),
    # 0.4 and 0.3 lie less than 0.1 apart in float32; that must not matter
    [(0.4, 0.3, 1), (0.6, 0.5, 1), (0.3, 0.4, 1), (0.4, 0.301, 0), (0.4, 0.299, 1), (0.4, 0.4, 0)],
)
def test_gap_boundary(high, low, count):
    assert len(pairs_of(hand_tree([(ROOT, high, 1, True), (ROOT, low, 1, True)]))) == count


def test_a_step_that_was_cut_off_makes_no_pair():
    nodes = [(ROOT, 1.0, 1, True), (ROOT, 0.5, 1, True), (ROOT, -1.0, 1, True)]
    tree = hand_tree(nodes)
    tree.extra.complete[3] = False
    assert [(pair.chosen_node, pair.rejected_node) for pair in pairs_of(tree)] == [(1, 2)]
    tree.extra.complete[1] = False
    assert pairs_of(tree) == []


@pytest.mark.parametrize(
    ("outcomes", "best", "accepted"),
    [
        ({2: -1.0, 3: -1.0, 4: 1.0, 5: -1.0}, (1.0, -1.0), True),
        ({2: -1.0, 3: 1.0, 4: 1.0, 5: -1.0}, (1.0, 1.0), False),  # two right endings
        ({2: -1.0, 3: -1.0, 4: -1.0, 5: -1.0}, (-1.0, -1.0), False),  # two wrong ones
        ({2: -1.0, 3: 1.0, 4: -1.0, 5: -1.0}, (-1.0, 1.0), False),  # Q says the contrary of the outcomes
        ({2: -1.0, 3: 0.0, 4: 0.1, 5: -1.0}, (0.1, 0.0), True),  # near misses: as far apart as the least gap
        ({2: -1.0, 3: 0.0, 4: 0.05, 5: -1.0}, (0.05, 0.0), False),
    ],
)
def test_the_best_ending_below_the_chosen_step_must_beat_that_below_the_other(outcomes, best, accepted):
    """Node 1 leads to 4 and 5; 3 ends at once; 2 is between them in Q."""
    nodes = [(ROOT, 1.5, 2, False), (ROOT, 0.5, 1, True), (ROOT, 0.0, 1, True), (1, 1.0, 1, True), (1, 0.95, 1, True)]
    (pair,) = pairs_of(hand_tree(nodes, outcomes))
    assert (pair.chosen_node, pair.rejected_node) == (1, 3)
    assert (pair.best_ending_chosen, pair.best_ending_rejected) == pytest.approx(best)
    assert PairSettings().accepts(pair) == PairSettings().is_valid(pair) == accepted
    assert PairSettings(require="gap").accepts(pair)


def test_pairs_say_whether_the_chosen_step_was_sampled_and_whether_it_is_the_golds():
    tree = hand_tree([(ROOT, 1.0, 1, True), (ROOT, 0.0, 1, True)])
    tree.extra.sampled[1], tree.extra.matches_reference[1] = False, True
    (pair,) = pairs_of(tree)
    assert (pair.chosen_sampled, pair.chosen_is_gold) == (False, True)


def test_recorded_tokens_stand_in_the_path_and_in_no_step():
    tree = hand_tree([(ROOT, 1.0, 2, False), (1, 1.0, 1, True), (1, 0.0, 1, True)])
    (pair,) = preference_pairs(tree, STEPS, str, SETTINGS, {1: [7, 8]})
    assert (pair.path, pair.chosen_ids, pair.rejected_ids) == ([10, 11, 7, 8], [20, 21], [30, 31])


def test_gap_comes_from_the_settings():
    tree = hand_tree([(ROOT, 1.0, 1, True), (ROOT, 0.0, 1, True)])
    assert len(pairs_of(tree, PairSettings(min_q_gap=1.0))) == 1
    assert pairs_of(tree, PairSettings(min_q_gap=1.1)) == []


def test_equal_texts_give_no_pair():
    """Other ids, same text; neither does the runner-up step in."""
    nodes = [(ROOT, 1.0, 1, True), (ROOT, 0.5, 1, True), (ROOT, 0.0, 1, True)]
    text = {10: "f(x=1)", 20: "f(x=2)", 30: "f(x=1)"}
    assert pairs_of(hand_tree(nodes), decode=lambda ids: text[ids[0]]) == []
    assert len(pairs_of(hand_tree(nodes))) == 1


def test_ties_go_to_the_first():
    nodes = [(ROOT, 0.0, 1, True), (ROOT, 1.0, 1, True), (ROOT, 1.0, 1, True)]
    (pair,) = pairs_of(hand_tree(nodes))
    assert (pair.chosen_node, pair.rejected_node) == (2, 1)
    (pair,) = pairs_of(hand_tree([(parent, -q, n, end) for parent, q, n, end in nodes]))
    assert (pair.chosen_node, pair.rejected_node) == (1, 2)


def test_one_node_is_never_its_own_pair():
    tree = hand_tree([(ROOT, 1.0, 1, True), (ROOT, 1.0, 1, True)])
    assert pairs_of(tree, PairSettings(min_q_gap=0.0)) == []


def test_a_tree_without_siblings_gives_nothing():
    assert pairs_of(hand_tree([])) == []
    assert pairs_of(hand_tree([(ROOT, 1.0, 1, False), (1, 1.0, 1, True)])) == []
    assert hand_tree([]).parent_N[ROOT] == NO_PARENT


@pytest.mark.parametrize("gap", [-0.1, float("nan")])
def test_bad_gap_is_refused(gap):
    with pytest.raises(ValueError, match=r"pairs\.min_q_gap must not be negative, got"):
        PairSettings(min_q_gap=gap)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_bad_share_of_held_out_prompts_is_refused(share):
    with pytest.raises(ValueError, match=rf"pairs\.held_out must be in \[0, 1\), got {share}"):
        PairSettings(held_out=share)
