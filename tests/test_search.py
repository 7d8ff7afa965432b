"""The search over toy problems, where everything is known."""

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from itool_jax.mcts.search import Forest, Problem, Proposal, SearchSettings, State, grow, search
from itool_jax.mcts.tree import NO_CHILD, ROOT

STOP = 0


def settings(**changes: Any) -> SearchSettings:
    """Small toy settings, with changes."""
    small = {
        "breadth": 3,
        "max_depth": 3,
        "max_step_tokens": 4,
        "max_last_step_tokens": 8,
        "inject_gold": False,
        "batch": 5,
    }
    return SearchSettings(**(small | changes))


# A toy tree of known numbers ---------------------------------------------------------------------------------

A, B = 1, 2
PRIORS = {(A,): 0.6, (B,): 0.4, (A, A): 0.7, (A, B): 0.3, (B, A): 0.5, (B, B): 0.5}
OUTCOMES = {(A, A): 1.0, (A, B): -1.0, (B, A): -1.0, (B, B): 1.0}
CONFIDENCES = {(A,): 0.6, (B,): 0.3, (A, A): 0.9, (A, B): 0.3, (B, A): 0.2, (B, B): 0.8}


def known_propose(states: list[State]) -> list[Proposal]:
    def log_probs(state: State) -> list[float]:
        return [math.log(PRIORS[*state.path, step]) for step in (A, B)]

    return [Proposal([[A], [B]], log_probs(state), [len(state.path) == 1] * 2) for state in states]


def known_judge(states: list[tuple[int, list[int]]]) -> list[float]:
    return [CONFIDENCES[tuple(response)] for _, response in states]


def known_grade(_: int, response: list[int], finished: bool) -> float:
    assert finished
    return OUTCOMES[tuple(response)]


def known_search(**changes: Any) -> Forest:
    toy = settings(breadth=2, max_depth=2, exploration=4.0, batch=1, **changes)
    return search([Problem("toy", [])], known_propose, known_judge, known_grade, toy)


def by_path(forest: Forest, b: int = 0) -> dict[tuple[int, ...], int]:
    """Node numbers of a tree by the response so far."""
    found: dict[tuple[int, ...], int] = {}
    for node in range(forest.tree.n_nodes_B[b]):
        found[tuple(response_of(forest, b, node))] = node
    assert len(found) == forest.tree.n_nodes_B[b], "two nodes of one response"
    return found


def response_of(forest: Forest, b: int, node: int) -> list[int]:
    response: list[int] = []
    while node != ROOT:
        response = step_of(forest, b, node) + response
        node = int(forest.tree.parent_BN[b, node])
    return response


def step_of(forest: Forest, b: int, node: int) -> list[int]:
    return forest.step_tokens_BNS[b, node, : forest.step_length_BN[b, node]].tolist()


@pytest.mark.parametrize(
    ("value_weight", "discount", "leaves", "n", "q", "v"),
    [
        ("visits", 1.0, "aa aa aa bb bb aa bb aa", (5, 3), (1.9, 1.8), 1.8625),
        ("max1", 1.0, "aa bb aa aa aa aa bb aa", (6, 2), (1.528571, 0.933333), 1.379762),
        ("visits", 0.9, "aa aa aa bb bb aa bb aa", (5, 3), (1.77, 1.65), 1.725),
    ],
)
def test_the_toy_tree_comes_out_as_computed_by_hand(
    value_weight: Any, discount: float, leaves: str, n: tuple[int, int], q: tuple[float, float], v: float
) -> None:
    forests = [known_search(n_simulations=i, value_weight=value_weight, discount=discount) for i in range(1, 9)]
    tree, node = forests[-1].tree, by_path(forests[-1])
    assert tuple(tree.visit_count_BN[0, node[step,]] for step in (A, B)) == n
    assert [tree.q_value_BN[0, node[step,]] for step in (A, B)] == pytest.approx(q, abs=2e-6)
    assert tree.value_BN[0, ROOT] == pytest.approx(v, abs=2e-6)
    assert tree.prior_BN[0, node[A, B]] == pytest.approx(0.3)
    assert tree.state_score_BN[0, node[B, A]] == pytest.approx(-0.8)
    # Each simulation adds a visit to one leaf: the one on its path.
    counts = [{path: f.tree.visit_count_BN[0, i] for path, i in by_path(f).items()} for f in forests]
    visited = [
        next(path for path in OUTCOMES if now.get(path, 0) > before.get(path, 0))
        for before, now in zip([{}, *counts], counts, strict=False)
    ]
    assert " ".join("".join("_ab"[token] for token in path) for path in visited) == leaves


# Toy problems without end ------------------------------------------------------------------------------------


class Toy:
    """A policy and a judge that depend on a problem's id, the response so far and the candidate, and nothing else."""

    def __init__(
        self, problems: Sequence[Problem], search_settings: SearchSettings, stopping: float = 0.3, longest: int = 3
    ):
        self.problems, self.settings = problems, search_settings
        self.stopping, self.longest = stopping, longest
        self.states: list[State] = []
        self.calls, self.sampled = 0, 0
        self.grades: list[tuple[list[int], bool]] = []

    def random(self, problem: int, *parts: Any) -> random.Random:
        return random.Random(f"{self.problems[problem].id}/{parts}")

    def propose(self, states: list[State]) -> list[Proposal]:
        self.calls += 1
        self.states += states
        return [self.proposal(state) for state in states]

    def proposal(self, state: State) -> Proposal:
        steps = [self.step(state, w) for w in range(self.settings.breadth)]
        self.sampled += sum(map(len, steps))
        steps += [state.gold_step] if self.settings.inject_gold else []
        log_probs = [-self.random(state.problem, state.path, step).random() * (len(step) + 1) for step in steps]
        return Proposal(steps, log_probs, [step[-1:] == [STOP] for step in steps])

    def step(self, state: State, w: int) -> list[int]:
        rng = self.random(state.problem, state.path, w)
        if state.gold_step and rng.random() < 0.3:
            return state.gold_step  # the policy hits upon the gold by itself
        step = [rng.randint(1, 9) for _ in range(rng.randint(1, self.longest))]
        ended = rng.random() < (0.7 if state.whole else self.stopping)
        return [*step, STOP] if ended else step

    def judge(self, states: list[tuple[int, list[int]]]) -> list[float]:
        return [self.random(problem, "confidence", response).random() for problem, response in states]

    def grade(self, problem: int, response: list[int], finished: bool) -> float:
        self.grades.append((response, finished))
        return self.random(problem, "grade", response).choice([-1.0, 1.0]) if finished else -1.0

    def run(self, advance: Callable[..., None] = lambda *_: None) -> Forest:
        return search(self.problems, self.propose, self.judge, self.grade, self.settings, advance)


GOLDS = [
    [[5, 5], [6], [7, STOP]],
    [[4], [STOP]],
    [[1, 2, 3], [1, 2, 3], [1], [2], [STOP]],
    [[8, 8, STOP]],
    [[3], [3, STOP]],
]
PROBLEMS = [Problem(f"problem {i}", gold) for i, gold in enumerate(GOLDS)]


def assert_same_trees(one: Forest, two: Forest, rows: Sequence[int]) -> None:
    """Tree i of `two` is tree rows[i] of `one`, to the last bit."""
    for name, a, b in zip(one.tree._fields, one.tree, two.tree, strict=True):
        np.testing.assert_array_equal(a[list(rows)], b, err_msg=name)
    np.testing.assert_array_equal(one.step_tokens_BNS[list(rows)], two.step_tokens_BNS)
    np.testing.assert_array_equal(one.step_length_BN[list(rows)], two.step_length_BN)


@pytest.mark.parametrize("inject_gold", [False, True])
def test_many_together_are_each_alone_in_any_order(inject_gold: bool) -> None:
    toy = settings(n_simulations=12, inject_gold=inject_gold)
    together = Toy(PROBLEMS, toy).run()
    assert len({int(n) for n in together.tree.n_nodes_B}) > 1
    for b, problem in enumerate(PROBLEMS):
        assert_same_trees(together, Toy([problem], toy).run(), [b])
    order = [3, 0, 4, 2, 1]
    assert_same_trees(together, Toy([PROBLEMS[b] for b in order], toy).run(), order)


@pytest.mark.parametrize("inject_gold", [False, True])
@pytest.mark.parametrize("value_weight", ["visits", "max1"])
def test_visits_add_up(inject_gold: bool, value_weight: Any) -> None:
    toy = settings(n_simulations=12, inject_gold=inject_gold, value_weight=value_weight)
    tree = Toy(PROBLEMS, toy).run().tree
    assert (tree.visit_count_BN[:, ROOT] == 12).all()
    inner = 0
    for b, n_nodes in enumerate(tree.n_nodes_B):
        for node in range(n_nodes):
            children = [child for child in tree.children_BNW[b, node] if child != NO_CHILD]
            inner += bool(children)
            assert bool(children) <= (not tree.terminal_BN[b, node])
            if children:
                assert tree.visit_count_BN[b, node] == tree.visit_count_BN[b, children].sum()
            elif tree.visit_count_BN[b, node]:  # every simulation goes on to a terminal state
                assert tree.terminal_BN[b, node]
    assert inner > 20


def test_scores_are_outcome_and_confidence_of_the_whole_response() -> None:
    toy = Toy(PROBLEMS, settings(n_simulations=8, prior_exponent=1.25))
    forest = toy.run()
    tree = forest.tree
    for b in range(len(PROBLEMS)):
        for response, node in by_path(forest, b).items():
            if node == ROOT:
                assert tree.state_score_BN[b, ROOT] == 0
                continue
            parent = int(tree.parent_BN[b, node])
            confidence = toy.random(b, "confidence", list(response)).random()
            assert tree.confidence_BN[b, node] == pytest.approx(confidence)
            graded = toy.grade(b, list(response), response[-1] == STOP) if tree.terminal_BN[b, node] else 0.0
            assert tree.outcome_BN[b, node] == graded
            assert tree.state_score_BN[b, node] == pytest.approx(graded + confidence)
            reward = tree.state_score_BN[b, node] - tree.state_score_BN[b, parent]
            assert tree.step_reward_BN[b, node] == pytest.approx(reward)
            step = step_of(forest, b, node)
            path = list(response[: -len(step)])
            log_prob = -toy.random(b, path, step).random() * (len(step) + 1)
            assert tree.prior_BN[b, node] == pytest.approx(math.exp(log_prob / len(step) ** 1.25), rel=1e-5)
    assert {float(x) for x in tree.outcome_BN.ravel()} == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize(("max_depth", "inject_gold"), [(3, True), (3, False), (1, True)])
def test_at_full_depth_a_step_is_the_whole_remainder(max_depth: int, inject_gold: bool) -> None:
    toy = Toy(PROBLEMS, settings(n_simulations=10, max_depth=max_depth, inject_gold=inject_gold), longest=6)
    forest = toy.run()
    depth_of = {(b, path): int(forest.tree.depth_BN[b, n]) for b in range(5) for path, n in by_path(forest, b).items()}
    for state in toy.states:
        depth = depth_of[state.problem, tuple(state.path)]
        assert state.whole == (depth == max_depth - 1)
        assert state.limit == (8 if state.whole else 4)
    assert any(state.whole for state in toy.states)
    last = forest.tree.depth_BN == max_depth
    assert last.any()
    assert forest.tree.terminal_BN[last].all()
    assert forest.tree.depth_BN.max() == max_depth
    # Below that depth only a stop token ends a response.
    for (b, path), depth in depth_of.items():
        if 0 < depth < max_depth:
            assert forest.tree.terminal_BN[b, by_path(forest, b)[path]] == (path[-1] == STOP)


def test_a_truncated_response_gets_minus_one() -> None:
    toy = Toy(PROBLEMS, settings(n_simulations=12))
    forest = toy.run()
    truncated = [response for response, finished in toy.grades if not finished]
    assert truncated
    assert all((response[-1] == STOP) == finished for response, finished in toy.grades)
    found = 0
    for b in range(len(PROBLEMS)):
        for response, node in by_path(forest, b).items():
            if list(response) in truncated and forest.tree.terminal_BN[b, node]:
                assert forest.tree.outcome_BN[b, node] == -1
                found += 1
    assert found


# Gold --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inject_gold", [False, True])
def test_the_golds_next_step_is_among_the_candidates_where_the_response_is_the_golds(inject_gold: bool) -> None:
    toy = Toy(PROBLEMS, settings(n_simulations=12, inject_gold=inject_gold))
    forest = toy.run()
    expanded = hit = 0
    for state in toy.states:
        gold = [token for step in GOLDS[state.problem] for token in step]
        on_gold = gold[: len(state.path)] == state.path
        assert bool(state.gold_step) == (on_gold and inject_gold)
        if not state.gold_step:
            continue
        boundaries = np.cumsum([len(step) for step in GOLDS[state.problem]]).tolist()
        after = next(end for end in boundaries if end > len(state.path))
        step = gold[len(state.path) : None if state.whole else after]
        assert state.gold_step == step
        nodes = by_path(forest, state.problem)
        node = nodes[*state.path, *step]
        assert forest.tree.on_gold_BN[state.problem, node]
        expanded += 1
        hit += toy.step(state, 0) == step
    if not inject_gold:
        assert {len(state.gold_step) for state in toy.states} == {0}
        return
    assert expanded > len(PROBLEMS)
    assert hit, "no sampled step equals the gold's: the test says nothing of duplicates"


def test_a_step_equal_to_the_golds_or_a_siblings_joins_once() -> None:
    """`by_path` fails where two nodes hold one response; here every sampled step is the gold's."""
    toy = Toy(PROBLEMS, settings(n_simulations=6, inject_gold=True))
    toy.step = lambda state, w: state.gold_step or [1 + w // 2, STOP]  # type: ignore[method-assign]
    forest = toy.run()
    for b, gold in enumerate(GOLDS):
        steps = gold if len(gold) <= 3 else [*gold[:2], [token for step in gold[2:] for token in step]]
        assert len(by_path(forest, b)) == 1 + len(steps)
        assert forest.tree.on_gold_BN[b].sum() == 1 + len(steps)
    toy = Toy(PROBLEMS, settings(n_simulations=6))
    toy.step = lambda state, w: [1 + w // 2, STOP]  # type: ignore[method-assign]
    assert [len(by_path(toy.run(), b)) for b in range(5)] == [3] * 5


def test_the_gold_is_marked_down_to_its_end() -> None:
    toy = Toy(PROBLEMS, settings(n_simulations=40, inject_gold=True))
    forest = toy.run()
    for b, gold_steps in enumerate(GOLDS):
        gold = tuple(token for step in gold_steps for token in step)
        marked = {path for path, node in by_path(forest, b).items() if forest.tree.on_gold_BN[b, node]}
        assert all(gold[: len(path)] == path for path in marked)
        assert len({int(forest.tree.depth_BN[b, by_path(forest, b)[path]]) for path in marked}) == len(marked)
        assert gold in marked
        assert forest.tree.terminal_BN[b, by_path(forest, b)[gold]]


def test_a_gold_step_beyond_the_limit_goes_on_in_the_next_one() -> None:
    problem = Problem("long", [[1, 2, 3, 4, 5, 6], [7, STOP]])
    toy = Toy([problem], settings(n_simulations=60, exploration=20.0, inject_gold=True))
    by_path(toy.run())
    golds = {tuple(state.path): state.gold_step for state in toy.states if state.gold_step}
    assert golds == {(): [1, 2, 3, 4], (1, 2, 3, 4): [5, 6], (1, 2, 3, 4, 5, 6): [7, STOP]}


# Cost --------------------------------------------------------------------------------------------------------


def test_a_full_tree_has_forty_nodes_and_needs_the_model_no_more() -> None:
    """Three candidates, three steps: 1 + 3 + 9 + 27 nodes of which 13 are expanded."""
    done = []
    for n_simulations in (150, 300):
        toy = Toy(PROBLEMS[:2], settings(n_simulations=n_simulations, exploration=20.0), stopping=0.0)
        toy.step = lambda state, w: [w + 1] + [STOP] * state.whole  # type: ignore[method-assign]
        forest = toy.run()
        assert forest.tree.n_nodes_B.tolist() == [40, 40]
        assert toy.settings.max_nodes == 40
        assert len(toy.states) == 26
        assert len({(state.problem, *state.path) for state in toy.states}) == 26
        assert forest.tree.visit_count_BN[:, ROOT].tolist() == [n_simulations] * 2
        done.append(toy.calls)
    assert done[0] == done[1] <= 26


def test_the_golds_path_takes_one_node_more_at_each_of_its_levels() -> None:
    toy = Toy([PROBLEMS[2]], settings(n_simulations=300, exploration=20.0, inject_gold=True))
    toy.step = lambda state, w: [w + 6] + [STOP] * state.whole  # type: ignore[method-assign]
    forest = toy.run()
    assert toy.settings.max_nodes == 1 + 4 + 13 + 40
    assert forest.tree.n_nodes_B.tolist() == [58]
    assert len(toy.states) == 18
    assert forest.tree.on_gold_BN[0].sum() == 4


@pytest.mark.parametrize(
    ("breadth", "max_depth", "inject_gold", "max_nodes"),
    [(3, 3, False, 40), (3, 3, True, 58), (2, 1, False, 3), (2, 1, True, 4), (1, 4, False, 5), (1, 2, True, 6)],
)
def test_room_for_a_full_tree(breadth: int, max_depth: int, inject_gold: bool, max_nodes: int) -> None:
    toy = settings(breadth=breadth, max_depth=max_depth, inject_gold=inject_gold)
    assert toy.max_nodes == max_nodes
    assert toy.slots == breadth + inject_gold


def test_sampled_tokens_are_counted_and_progress_is_told() -> None:
    told: list[int] = []
    toy = Toy(PROBLEMS[:3], settings(n_simulations=7, inject_gold=True))
    forest = toy.run(told.append)
    assert sum(told) == 3 * 7
    assert forest.sampled_tokens_B.sum() == toy.sampled > 0
    assert not forest.step_tokens_BNS[np.arange(8) >= forest.step_length_BN[..., None]].any()
    assert not forest.step_length_BN[:, ROOT].any()


def test_a_problem_takes_the_seat_of_one_that_is_done() -> None:
    """As many at once as there are seats, each a seat once it is free; the trees are those of all at once."""
    all_at_once = Toy(PROBLEMS, settings(n_simulations=7, batch=len(PROBLEMS))).run()
    toy = Toy(PROBLEMS, settings(n_simulations=7, batch=2))
    seats: dict[int, int] = {}
    order: list[int] = []

    def seat(taken: list[tuple[int, int]]) -> None:
        seats.update(taken)
        order.extend(problem for _, problem in taken)

    def propose(states: list[State]) -> list[Proposal]:
        assert {state.problem for state in states} <= set(seats.values())
        assert len(states) <= 2
        return toy.propose(states)

    found = list(grow(PROBLEMS, propose, toy.judge, toy.grade, toy.settings, seat=seat))
    assert order == list(range(len(PROBLEMS)))
    assert sorted(number for number, _ in found) == order
    for number, forest in found:
        for one, together in zip(forest.tree, all_at_once.tree, strict=True):
            np.testing.assert_array_equal(one[0], together[number])
        np.testing.assert_array_equal(forest.step_tokens_BNS[0], all_at_once.step_tokens_BNS[number])
    assert sum(forest.sampled_tokens_B for _, forest in found) == all_at_once.sampled_tokens_B.sum()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, 0, "must be positive, got 0") for name in ("n_simulations", "breadth", "max_depth", "batch")),
        *((name, -1, "must be positive, got -1") for name in ("max_step_tokens", "max_last_step_tokens")),
        *((name, -0.5, "must not be negative, got -0.5") for name in ("exploration", "temperature", "prior_exponent")),
        ("exploration", math.nan, "must not be negative, got nan"),
        ("discount", 1.1, r"must be in \[0, 1\], got 1.1"),
    ],
)
def test_bad_settings_are_named(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^search.{name} {message}$"):
        SearchSettings(**{name: value})
