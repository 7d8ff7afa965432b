"""The search over toy problems, where everything is known."""

import math
import random
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from itool_jax.mcts.pairs import PairSettings, preference_pairs
from itool_jax.mcts.search import (
    FinishedTree,
    Problem,
    Response,
    SearchSettings,
    State,
    Step,
    Turn,
    grow,
    is_reachable,
    search,
)
from itool_jax.mcts.tree import NO_CHILD, ROOT

STOP = 0


def settings(**changes: Any) -> SearchSettings:
    """Small toy settings, with changes."""
    small = {
        "breadth": 3,
        "max_depth": 3,
        "max_step_tokens": 4,
        "max_last_step_tokens": 8,
        "inject_gold": "never",
        "exploration": 1.0,
        "batch": 5,
    }
    return SearchSettings(**(small | changes))


# A toy tree of known numbers ---------------------------------------------------------------------------------

A, B = 1, 2
PRIORS = {(A,): 0.6, (B,): 0.4, (A, A): 0.7, (A, B): 0.3, (B, A): 0.5, (B, B): 0.5}
OUTCOMES = {(A, A): 1.0, (A, B): -1.0, (B, A): -1.0, (B, B): 1.0}
CONFIDENCES = {(A,): 0.6, (B,): 0.3, (A, A): 0.9, (A, B): 0.3, (B, A): 0.2, (B, B): 0.8}


class Known:
    """The toy tree as a model."""

    def propose(self, states: Sequence[State]) -> list[list[Step]]:
        return [
            [Step([step], math.log(PRIORS[*state.response, step]), len(state.response) == 1) for step in (A, B)]
            for state in states
        ]

    def judge(self, responses: Sequence[Response]) -> list[float]:
        return [CONFIDENCES[tuple(response.token_ids)] for response in responses]

    def grade(self, _: int, turn: int, response: list[int], stopped: bool) -> float:
        assert stopped
        assert turn == 0
        return OUTCOMES[tuple(response)]


def known_search(**changes: Any) -> FinishedTree:
    toy = settings(breadth=2, max_depth=2, exploration=4.0, batch=1, **changes)
    (finished,) = search([Problem("toy", [])], Known(), toy)
    return finished


def by_path(finished: FinishedTree) -> dict[tuple[int, ...], int]:
    """Node numbers of a tree by the response so far."""
    nodes = {tuple(response_of(finished, node)): node for node in range(finished.tree.n_nodes)}
    assert len(nodes) == finished.tree.n_nodes == len(finished.steps), "two nodes of one response"
    return nodes


def response_of(finished: FinishedTree, node: int) -> list[int]:
    response: list[int] = []
    while node != ROOT:
        response = finished.steps[node] + response
        node = int(finished.tree.parent_N[node])
    return response


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
    grown = [known_search(n_simulations=i, value_weight=value_weight, discount=discount) for i in range(1, 9)]
    tree, node = grown[-1].tree, by_path(grown[-1])
    assert tuple(tree.visit_count_N[node[step,]] for step in (A, B)) == n
    assert [tree.q_value_N[node[step,]] for step in (A, B)] == pytest.approx(q, abs=2e-6)
    assert tree.value_N[ROOT] == pytest.approx(v, abs=2e-6)
    assert tree.prior_N[node[A, B]] == pytest.approx(0.3)
    assert tree.state_score_N[node[B, A]] == pytest.approx(-0.8)
    # Each simulation adds a visit to one leaf: the one on its path.
    counts = [{path: one.tree.visit_count_N[i] for path, i in by_path(one).items()} for one in grown]
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

    def propose(self, states: Sequence[State]) -> list[list[Step]]:
        self.calls += 1
        self.states += states
        return [self.proposal(state) for state in states]

    def proposal(self, state: State) -> list[Step]:
        steps = [self.step(state, w) for w in range(self.settings.breadth)]
        self.sampled += sum(map(len, steps))
        proposed = [
            Step(step, self.log_prob(state.problem, state.response, step), step[-1] == STOP, len(step) < state.limit)
            for step in [*steps, *([state.gold_step] if state.gold_step else [])]
        ]
        return [step._replace(sampled=i < len(steps)) for i, step in enumerate(proposed)]

    def log_prob(self, problem: int, response: list[int], step: list[int]) -> float:
        return -self.random(problem, response, step).random() * (len(step) + 1)

    def step(self, state: State, w: int) -> list[int]:
        rng = self.random(state.problem, state.response, w)
        if state.gold_step and rng.random() < 0.3:
            return state.gold_step  # the policy hits upon the gold by itself
        step = [rng.randint(1, 9) for _ in range(rng.randint(1, self.longest))]
        ended = rng.random() < (0.7 if state.until_stop else self.stopping)
        return [*step, STOP] if ended else step

    def judge(self, responses: Sequence[Response]) -> list[float]:
        return [self.random(response.problem, "confidence", response.token_ids).random() for response in responses]

    def grade(self, problem: int, turn: int, response: list[int], stopped: bool) -> float:
        self.grades.append((response, stopped))
        return self.random(problem, "grade", response).choice([-1.0, 1.0]) if stopped else -1.0

    def run(self) -> list[FinishedTree]:
        return search(self.problems, self, self.settings)


GOLDS = [
    [[5, 5], [6], [7, STOP]],
    [[4], [STOP]],
    [[1, 2, 3], [1, 2, 3], [1], [2], [STOP]],
    [[8, 8, STOP]],
    [[3], [3, STOP]],
]
PROBLEMS = [Problem(f"problem {i}", gold) for i, gold in enumerate(GOLDS)]


def assert_same_tree(one: FinishedTree, two: FinishedTree) -> None:
    """To the last bit."""
    jax.tree.map(np.testing.assert_array_equal, one.tree, two.tree)
    assert one.steps == two.steps
    assert one.sampled_tokens == two.sampled_tokens


@pytest.mark.parametrize("inject_gold", ["never", "always"])
def test_many_together_are_each_alone_in_any_order(inject_gold: Any) -> None:
    toy = settings(n_simulations=12, inject_gold=inject_gold)
    together = Toy(PROBLEMS, toy).run()
    assert len({int(one.tree.n_nodes) for one in together}) > 1
    for one, problem in zip(together, PROBLEMS, strict=True):
        (alone,) = Toy([problem], toy).run()
        assert_same_tree(one, alone)
    order = [3, 0, 4, 2, 1]
    for b, one in zip(order, Toy([PROBLEMS[b] for b in order], toy).run(), strict=True):
        assert_same_tree(together[b], one)


@pytest.mark.parametrize("inject_gold", ["never", "always"])
@pytest.mark.parametrize("value_weight", ["visits", "max1"])
def test_visits_add_up(inject_gold: Any, value_weight: Any) -> None:
    toy = settings(n_simulations=12, inject_gold=inject_gold, value_weight=value_weight)
    inner = 0
    for tree in (one.tree for one in Toy(PROBLEMS, toy).run()):
        assert tree.visit_count_N[ROOT] == 12 + (inject_gold == "always")  # the walk down the gold comes first
        for node in range(tree.n_nodes):
            children = [child for child in tree.children_NW[node] if child != NO_CHILD]
            inner += bool(children)
            assert bool(children) <= (not tree.terminal_N[node])
            if children:
                assert tree.visit_count_N[node] == tree.visit_count_N[children].sum()
            elif tree.visit_count_N[node]:  # every simulation goes on to a terminal state
                assert tree.terminal_N[node]
    assert inner > 20


def test_scores_are_outcome_and_confidence_of_the_whole_response() -> None:
    toy = Toy(PROBLEMS, settings(n_simulations=8, prior_exponent=1.25))
    outcomes: set[float] = set()
    for b, finished in enumerate(toy.run()):
        tree = finished.tree
        outcomes |= set(tree.extra.outcome.tolist())
        for response, node in by_path(finished).items():
            if node == ROOT:
                assert tree.state_score_N[ROOT] == 0
                continue
            parent = int(tree.parent_N[node])
            confidence = toy.random(b, "confidence", list(response)).random()
            assert tree.extra.confidence[node] == pytest.approx(confidence)
            graded = toy.grade(b, 0, list(response), response[-1] == STOP) if tree.terminal_N[node] else 0.0
            assert tree.extra.outcome[node] == graded
            assert tree.state_score_N[node] == pytest.approx(graded + confidence)
            reward = tree.state_score_N[node] - tree.state_score_N[parent]
            assert tree.step_reward_N[node] == pytest.approx(reward)
            step = finished.steps[node]
            log_prob = toy.log_prob(b, list(response[: -len(step)]), step)
            assert tree.prior_N[node] == pytest.approx(math.exp(log_prob / len(step) ** 1.25), rel=1e-5)
    assert outcomes == {-1.0, 0.0, 1.0}


@pytest.mark.parametrize(("max_depth", "inject_gold"), [(3, "always"), (3, "never"), (1, "always")])
def test_at_full_depth_a_step_is_the_whole_remainder(max_depth: int, inject_gold: Any) -> None:
    toy = Toy(PROBLEMS, settings(n_simulations=10, max_depth=max_depth, inject_gold=inject_gold), longest=6)
    finished = toy.run()
    depth_of = {
        (b, path): int(one.tree.depth_N[n]) for b, one in enumerate(finished) for path, n in by_path(one).items()
    }
    for state in toy.states:
        depth = depth_of[state.problem, tuple(state.response)]
        assert state.until_stop == (depth == max_depth - 1)
        assert state.limit == (8 if state.until_stop else 4)
    assert any(state.until_stop for state in toy.states)
    last = [one.tree.terminal_N[one.tree.depth_N == max_depth] for one in finished]
    assert np.concatenate(last).size
    assert np.concatenate(last).all()
    assert max(depth_of.values()) == max_depth
    # Below that depth only a stop token ends a response.
    for (b, path), depth in depth_of.items():
        if 0 < depth < max_depth:
            assert finished[b].tree.terminal_N[by_path(finished[b])[path]] == (path[-1] == STOP)


def test_a_truncated_response_gets_minus_one() -> None:
    toy = Toy(PROBLEMS, settings(n_simulations=12))
    finished = toy.run()
    truncated = [response for response, stopped in toy.grades if not stopped]
    assert truncated
    assert all((response[-1] == STOP) == stopped for response, stopped in toy.grades)
    outcomes = [
        one.tree.extra.outcome[node]
        for one in finished
        for response, node in by_path(one).items()
        if list(response) in truncated and one.tree.terminal_N[node]
    ]
    assert outcomes
    assert set(outcomes) == {-1.0}


# Gold --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inject_gold", ["never", "always"])
def test_the_golds_next_step_is_among_the_candidates_where_the_response_is_the_golds(inject_gold: Any) -> None:
    toy = Toy(PROBLEMS, settings(n_simulations=12, inject_gold=inject_gold))
    finished = toy.run()
    expanded = hit = 0
    for state in toy.states:
        gold = [token for step in GOLDS[state.problem] for token in step]
        matches = gold[: len(state.response)] == state.response
        assert bool(state.gold_step) == (matches and inject_gold == "always")
        if not state.gold_step:
            continue
        boundaries = np.cumsum([len(step) for step in GOLDS[state.problem]]).tolist()
        after = next(end for end in boundaries if end > len(state.response))
        step = gold[len(state.response) : None if state.until_stop else after]
        assert state.gold_step == step
        one = finished[state.problem]
        assert one.tree.extra.matches_reference[by_path(one)[*state.response, *step]]
        expanded += 1
        hit += toy.step(state, 0) == step
    if inject_gold == "never":
        assert {len(state.gold_step) for state in toy.states} == {0}
        return
    assert expanded > len(PROBLEMS)
    assert hit, "no sampled step equals the gold's: the test says nothing of duplicates"


def test_a_step_equal_to_the_golds_or_a_siblings_joins_once() -> None:
    """`by_path` fails where two nodes hold one response; here every sampled step is the gold's."""
    toy = Toy(PROBLEMS, settings(n_simulations=6, inject_gold="always"))
    toy.step = lambda state, w: state.gold_step or [1 + w // 2, STOP]  # type: ignore[method-assign]
    for one, gold in zip(toy.run(), GOLDS, strict=True):
        steps = gold if len(gold) <= 3 else [*gold[:2], [token for step in gold[2:] for token in step]]
        assert len(by_path(one)) == 1 + len(steps)
        assert one.tree.extra.matches_reference.sum() == 1 + len(steps)
    toy = Toy(PROBLEMS, settings(n_simulations=6))
    toy.step = lambda state, w: [1 + w // 2, STOP]  # type: ignore[method-assign]
    assert [len(by_path(one)) for one in toy.run()] == [3] * 5


def test_of_equal_steps_the_first_stays() -> None:
    """With the log-probability of its own; the gold's step comes last."""
    toy = Toy([Problem("gold", [[5, STOP]])], settings(n_simulations=1, max_depth=1, inject_gold="always"))
    log_probs = iter([-1.0, -2.0, -3.0, -4.0])
    toy.step = lambda state, w: [[6, STOP], [5, STOP], [6, STOP]][w]  # type: ignore[method-assign]
    toy.log_prob = lambda *_: next(log_probs)  # type: ignore[method-assign]
    (finished,) = toy.run()
    assert finished.steps == [[], [6, STOP], [5, STOP]]
    np.testing.assert_allclose(finished.tree.prior_N[1:3], np.exp([-1.0 / 2, -2.0 / 2]), rtol=1e-6)
    assert finished.tree.extra.matches_reference[:3].tolist() == [True, False, True]


def test_the_gold_is_marked_down_to_its_end() -> None:
    toy = Toy(PROBLEMS, settings(n_simulations=40, inject_gold="always"))
    for one, gold_steps in zip(toy.run(), GOLDS, strict=True):
        gold = tuple(token for step in gold_steps for token in step)
        nodes = by_path(one)
        marked = {path for path, node in nodes.items() if one.tree.extra.matches_reference[node]}
        assert all(gold[: len(path)] == path for path in marked)
        assert len({int(one.tree.depth_N[nodes[path]]) for path in marked}) == len(marked)
        assert gold in marked
        assert one.tree.terminal_N[nodes[gold]]


def test_a_gold_step_beyond_the_limit_goes_on_in_the_next_one() -> None:
    problem = Problem("long", [[1, 2, 3, 4, 5, 6], [7, STOP]])
    toy = Toy([problem], settings(n_simulations=60, exploration=20.0, inject_gold="always"))
    (finished,) = toy.run()
    by_path(finished)
    golds = {tuple(state.response): state.gold_step for state in toy.states if state.gold_step}
    assert golds == {(): [1, 2, 3, 4], (1, 2, 3, 4): [5, 6], (1, 2, 3, 4, 5, 6): [7, STOP]}


def test_one_walk_down_the_gold_comes_before_the_simulations() -> None:
    """With a single simulation too; where the gold joins no candidates, there is no such walk."""
    for inject_gold, solved, walks in [("always", True, True), ("unsolved", False, True), ("unsolved", True, False)]:
        problems = [problem._replace(solved=solved) for problem in PROBLEMS]
        for one, gold_steps in zip(
            Toy(problems, settings(n_simulations=1, inject_gold=inject_gold)).run(), GOLDS, strict=True
        ):
            assert one.tree.visit_count_N[ROOT] == 1 + walks
            gold = tuple(token for step in gold_steps for token in step)
            node = by_path(one).get(gold)
            assert not walks or (node is not None and one.tree.visit_count_N[node] >= 1)
            assert walks or one.tree.extra.sampled[: one.tree.n_nodes].all()


@pytest.mark.parametrize(
    ("gold", "reachable"),
    [
        ([[1] * 4, [2] * 4, [3] * 8], True),
        ([[1] * 4, [2] * 4, [3] * 4, [4] * 4], True),  # the third step is the whole remainder
        ([[1] * 5, [2]], False),
        ([[1], [2], [3] * 5, [4] * 4], False),
    ],
)
def test_a_gold_can_be_reached_where_the_limits_hold_its_steps(gold: list[list[int]], reachable: bool) -> None:
    assert is_reachable(Problem("gold", gold), settings()) == reachable
    assert is_reachable(Problem("later", [[1]], later=(Turn([9], gold),)), settings()) == reachable


# Recorded turns ----------------------------------------------------------------------------------------------

RESULT = [20, 21]
CONVERSATION = Problem("conversation", [[1], [2, STOP]], later=(Turn(RESULT, [[3], [4, STOP]]),))


class Talk(Toy):
    """Answers as it should in one of three candidates, is graded by the recorded turns, and notes what it is asked."""

    def step(self, state: State, w: int) -> list[int]:
        turn = int(state.turn_start > 0)
        done = len(state.response) - state.turn_start
        right = [token for step in CONVERSATION.gold_of(turn) for token in step][done:]
        wrong = [[7], [8, STOP]][w - 1] if w else []
        return wrong or (right if state.until_stop else right[:1])

    def grade(self, problem: int, turn: int, response: list[int], stopped: bool) -> float:
        self.grades.append((response, stopped))
        gold = [token for step in CONVERSATION.gold_of(turn) for token in step]
        return 1.0 if stopped and response == gold else -1.0


def test_the_search_goes_on_after_the_recorded_result_of_a_right_call() -> None:
    toy = Talk([CONVERSATION], settings(n_simulations=60, exploration=20.0, max_depth=2))
    (finished,) = toy.run()
    tree, nodes = finished.tree, range(int(finished.tree.n_nodes))
    whole = [finished.steps[node] for node in nodes]
    first_turn = [state for state in toy.states if not state.turn_start]
    second_turn = [state for state in toy.states if state.turn_start]
    # The tools' answer stands between the turns, and the steps of the second turn have the whole depth again.
    assert {tuple(state.response[:4]) for state in second_turn} == {(1, 2, STOP, *RESULT)[:4]}
    assert {state.turn_start for state in second_turn} == {5}
    assert {state.until_stop for state in first_turn} == {state.until_stop for state in second_turn} == {False, True}
    # Only a turn like the recorded one goes on; any other that ends is terminal and wrong.
    (turn_end,) = finished.observed
    assert finished.observed[turn_end] == RESULT
    assert whole[turn_end] == [2, STOP]
    assert not tree.terminal_N[turn_end]
    assert tree.extra.outcome[turn_end] == 0
    wrong = [node for node in nodes if whole[node] == [8, STOP]]
    assert len(wrong) > 2
    assert all(tree.terminal_N[node] and tree.extra.outcome[node] == -1 for node in wrong)
    right = [node for node in nodes if tree.terminal_N[node] and tree.extra.outcome[node] == 1]
    assert [whole[node] for node in right] == [[4, STOP]]
    assert tree.extra.matches_reference[right].all()


def test_pairs_of_a_later_turn_have_the_recorded_result_in_their_prompt() -> None:
    toy = Talk([CONVERSATION], settings(n_simulations=60, exploration=20.0, max_depth=2))
    (finished,) = toy.run()
    pairs = preference_pairs(finished.tree, finished.steps, str, PairSettings(), finished.observed)
    later = [pair for pair in pairs if len(pair.path) >= 5 and PairSettings().accepts(pair)]
    assert [pair.path for pair in later] == [[1, 2, STOP, *RESULT], [1, 2, STOP, *RESULT, 3]]
    assert [pair.chosen_ids for pair in later] == [[3], [4, STOP]]


def test_a_turn_that_is_injected_goes_on_too() -> None:
    toy = Talk([CONVERSATION], settings(n_simulations=1, max_depth=2, inject_gold="always"))
    (finished,) = toy.run()
    assert finished.tree.visit_count_N[ROOT] == 2
    ended = [n for n, step in enumerate(finished.steps) if step == [4, STOP]]
    assert finished.tree.visit_count_N[ended].sum() >= 1


# Cost --------------------------------------------------------------------------------------------------------


def test_a_full_tree_has_forty_nodes_and_needs_the_model_no_more() -> None:
    """Three candidates, three steps: 1 + 3 + 9 + 27 nodes of which 13 are expanded."""
    done = []
    for n_simulations in (150, 300):
        toy = Toy(PROBLEMS[:2], settings(n_simulations=n_simulations, exploration=20.0), stopping=0.0)
        toy.step = lambda state, w: [w + 1] + [STOP] * state.until_stop  # type: ignore[method-assign]
        finished = toy.run()
        assert [one.tree.n_nodes for one in finished] == [40, 40]
        assert toy.settings.max_nodes == 40
        assert len(toy.states) == 26
        assert len({(state.problem, *state.response) for state in toy.states}) == 26
        assert [one.tree.visit_count_N[ROOT] for one in finished] == [n_simulations] * 2
        done.append(toy.calls)
    assert done[0] == done[1] <= 26


def test_the_golds_path_takes_one_node_more_at_each_of_its_levels() -> None:
    toy = Toy([PROBLEMS[2]], settings(n_simulations=300, exploration=20.0, inject_gold="always"))
    toy.step = lambda state, w: [w + 6] + [STOP] * state.until_stop  # type: ignore[method-assign]
    (finished,) = toy.run()
    assert toy.settings.max_nodes == 1 + 4 + 13 + 40
    assert finished.tree.n_nodes == 58
    assert len(toy.states) == 18
    assert finished.tree.extra.matches_reference.sum() == 4


@pytest.mark.parametrize(
    ("breadth", "max_depth", "inject_gold", "max_nodes"),
    [(3, 3, False, 40), (3, 3, True, 58), (2, 1, False, 3), (2, 1, True, 4), (1, 4, False, 5), (1, 2, True, 6)],
)
def test_room_for_a_full_tree(breadth: int, max_depth: int, inject_gold: bool, max_nodes: int) -> None:
    toy = settings(breadth=breadth, max_depth=max_depth, inject_gold="always" if inject_gold else "never")
    assert toy.max_nodes == max_nodes
    assert toy.slots == breadth + inject_gold


def test_sampled_tokens_are_counted() -> None:
    toy = Toy(PROBLEMS[:3], settings(n_simulations=7, inject_gold="always"))
    finished = toy.run()
    assert sum(one.sampled_tokens for one in finished) == toy.sampled > 0
    for one in finished:
        assert [len(step) > 0 for step in one.steps] == [False] + [True] * int(one.tree.n_nodes - 1)


def test_a_round_tells_the_simulations_that_ended_and_the_trees_that_are_complete() -> None:
    toy = Toy(PROBLEMS, settings(n_simulations=7, batch=2))
    rounds = list(grow(PROBLEMS, toy, toy.settings))
    assert len(rounds) == toy.calls
    assert sum(one.n_simulations for one in rounds) == 7 * len(PROBLEMS)
    assert sum(bool(one.finished) for one in rounds) > 1
    assert rounds[-1].finished
    assert all(tree.tree.visit_count_N[ROOT] == 7 for one in rounds for _, tree in one.finished)
    assert list(grow([], toy, toy.settings)) == []


def test_a_problem_takes_the_lane_of_one_that_is_done() -> None:
    """As many at once as there are lanes, each in one of its own; the trees are those of all at once."""
    all_at_once = Toy(PROBLEMS, settings(n_simulations=7, batch=len(PROBLEMS))).run()
    toy = Toy(PROBLEMS, settings(n_simulations=7, batch=2))
    finished: dict[int, FinishedTree] = {}
    lanes: dict[int, int] = {}
    started: list[int] = []

    class Watched(Toy):
        def propose(self, states: Sequence[State]) -> list[list[Step]]:
            assert [state.lane for state in states] == sorted({state.lane for state in states})
            for state in states:
                if state.problem not in lanes:
                    started.append(state.problem)
                assert lanes.setdefault(state.problem, state.lane) == state.lane < 2
                assert state.problem not in finished
            # No lane stands idle while a problem waits.
            assert len(states) == min(2, len(PROBLEMS) - len(finished))
            return super().propose(states)

        def judge(self, responses: Sequence[Response]) -> list[float]:
            assert all(lanes[response.problem] == response.lane for response in responses)
            return super().judge(responses)

    for one_round in grow(PROBLEMS, Watched(PROBLEMS, toy.settings), toy.settings):
        finished.update(one_round.finished)
    assert started == list(range(len(PROBLEMS)))
    assert set(lanes.values()) == {0, 1}
    assert sorted(finished) == started
    for number, one in finished.items():
        assert_same_tree(one, all_at_once[number])


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
