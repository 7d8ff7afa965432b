"""The search over toy problems, where everything is known, and over a small model, where cached must equal uncached."""

import dataclasses
import functools
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx

from itool_jax import sampler
from itool_jax.data.records import Sample
from itool_jax.mcts.pairs import PairSettings, preference_pairs
from itool_jax.mcts.search import Forest, Problem, Proposal, SearchSettings, State, search
from itool_jax.mcts.tree import NO_CHILD, ROOT
from itool_jax.mcts.value import SelfEvaluationSettings, outcome
from itool_jax.model import hf
from itool_jax.model.transformer import Params, abstract
from itool_jax.sampler import Policy, target_log_probs
from itool_jax.stages import search as stage
from itool_jax.stages.folder import Base
from itool_jax.stages.search import Searched, Searcher
from itool_jax.text.chat import Chat, answer_ids, encode_sample, evaluation_frame, load_tokenizer
from itool_jax.text.padding import bucket, pad
from itool_jax.text.steps import StepTable, build_step_table
from tests import tiny

STOP = 0


def settings(**changes: Any) -> SearchSettings:
    """Small toy settings, with changes."""
    small = {"breadth": 3, "max_depth": 3, "step_limit": 4, "last_step_limit": 8, "inject_gold": False, "batch": 5}
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
    assert forest.sampled_tokens == toy.sampled > 0
    assert not forest.step_tokens_BNS[np.arange(8) >= forest.step_length_BN[..., None]].any()
    assert not forest.step_length_BN[:, ROOT].any()


def test_a_batch_holds_only_so_many_problems() -> None:
    with pytest.raises(ValueError, match=r"^search.batch is 4, got 5 problems$"):
        Toy(PROBLEMS, settings(batch=4)).run()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *((name, 0, "must be positive, got 0") for name in ("n_simulations", "breadth", "max_depth", "batch")),
        *((name, -1, "must be positive, got -1") for name in ("step_limit", "last_step_limit")),
        *((name, -0.5, "must not be negative, got -0.5") for name in ("exploration", "temperature", "prior_exponent")),
        ("exploration", math.nan, "must not be negative, got nan"),
        ("discount", 1.1, r"must be in \[0, 1\], got 1.1"),
    ],
)
def test_bad_settings_are_named(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=f"^search.{name} {message}$"):
        SearchSettings(**{name: value})


# The model as the search's functions -------------------------------------------------------------------------

SMALL = SearchSettings(
    n_simulations=8, breadth=2, max_depth=3, step_limit=6, last_step_limit=10, batch=4, exploration=2.0
)
CALLS = '[f(a="x"), g(b=1)]'
QUESTIONS = ["short", "a longer question, " * 4, "is there a tool? " * 9, "very long " * 30]
TARGETS = [CALLS, "[f(a=1)]", "No tool fits.", '[g(b="yes")]']
SAMPLES = [
    Sample(id=f"sample {i}", messages=({"role": "user", "content": question},), target=target)
    for i, (question, target) in enumerate(zip(QUESTIONS, TARGETS, strict=True))
]


class Setup(NamedTuple):
    base: Base
    policy: Policy
    table: StepTable
    batch: list[Searched]

    def searcher(
        self,
        rows: Sequence[int] = range(4),
        search_settings: SearchSettings = SMALL,
        self_eval: SelfEvaluationSettings = SelfEvaluationSettings(),  # noqa: B008
        seed: int = 3,
    ) -> Searcher:
        batch = [self.batch[i] for i in rows]
        return Searcher(self.policy, self.base, self.table, batch, search_settings, self_eval, seed)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    """One layer of random weights that likes a few tokens, so that calls, ends and duplicates come often."""
    folder = tiny.tiny_checkpoint(tmp_path_factory.mktemp("search"), num_hidden_layers=1)
    config, params = hf.load(folder)
    chat = Chat(load_tokenizer(str(folder)))
    liked = [chat.end_of_turn, *(chat.encode(piece)[0] for piece in ["[", "f", "(", "a", "=", "1", ")]", "),", "."])]
    embedding = np.array(params["embedding"])
    embedding[liked] *= 2.5
    params = params | {"embedding": embedding}
    base = Base(config, jax.tree.map(jax.numpy.asarray, params), chat)
    table = build_step_table(chat.tokenizer, "call", config.vocab_size, chat.stop_ids)
    batch = [Searched(sample, encode_sample(chat, sample)) for sample in SAMPLES]
    return Setup(base, Policy(abstract(config)[0], base.params), table, batch)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graph: nnx.GraphDef, params: Params, tokens_BT: jax.Array, length_B: jax.Array) -> jax.Array:
    model = nnx.merge(graph, params)
    hidden_BTD, _ = model(tokens_BT)
    return model.logits(hidden_BTD[np.arange(len(length_B)), length_B - 1])


def uncached(setup: Setup, ids: Sequence[int]) -> np.ndarray:
    """Float64 logits of the token after `ids`."""
    return np.asarray(logits_of(*setup.policy, *pad([ids], 768))[0], np.float64)


class Searches(NamedTuple):
    together: Forest
    first: Forest
    last: Forest
    turned: Forest
    programs: dict[str, int]
    widths: dict[str, set[int]]


@pytest.fixture(scope="module")
def searches(setup: Setup) -> Searches:
    """All problems at once, the first and the last of them alone, and in reverse; and what was compiled on the way."""
    compiled = {"sample_step": sampler.sample_step, "answer": sampler.answer}
    before = {name: function._cache_size() for name, function in compiled.items()}
    widths: dict[str, set[int]] = {"propose": set(), "judge": set()}

    def run(rows: Sequence[int]) -> Forest:
        searcher = setup.searcher(rows)

        def propose(states: list[State]) -> list[Proposal]:
            widths["propose"] |= {1 + len(state.path) for state in states}
            return searcher.propose(states)

        def judge(states: list[tuple[int, list[int]]]) -> list[float]:
            widths["judge"] |= {1 + len(path) + len(searcher.frames[b].after) for b, path in states}
            return searcher.judge(states)

        return search(searcher.problems(), propose, judge, searcher.grade, SMALL)

    together, first, last, turned = run(range(4)), run([0]), run([3]), run([3, 2, 1, 0])
    programs = {name: function._cache_size() - before[name] for name, function in compiled.items()}
    return Searches(together, first, last, turned, programs, widths)


EXACT = (
    "parent_BN",
    "depth_BN",
    "children_BNW",
    "visit_count_BN",
    "outcome_BN",
    "terminal_BN",
    "on_gold_BN",
    "n_nodes_B",
)


def assert_same_decisions(one: Forest, two: Forest, rows: Sequence[int]) -> None:
    """Every choice is the same; numbers may differ as sums of another order do."""
    for name, a, b in zip(one.tree._fields, one.tree, two.tree, strict=True):
        if name in EXACT:
            np.testing.assert_array_equal(a[list(rows)], b, err_msg=name)
        else:
            np.testing.assert_allclose(a[list(rows)], b, atol=2e-4, err_msg=name)
    np.testing.assert_array_equal(one.step_tokens_BNS[list(rows)], two.step_tokens_BNS)
    np.testing.assert_array_equal(one.step_length_BN[list(rows)], two.step_length_BN)


def test_a_model_searches_many_as_each_alone_in_any_order(searches: Searches) -> None:
    # Alone, the first prompt is padded to another width than beside the last.
    assert_same_decisions(searches.together, searches.first, [0])
    assert_same_decisions(searches.together, searches.last, [3])
    assert_same_decisions(searches.together, searches.turned, [3, 2, 1, 0])
    # The trees are worth comparing: of many shapes, with ends that the policy found itself.
    tree = searches.together.tree
    assert len({tuple(row) for row in tree.parent_BN}) > 1
    assert (tree.terminal_BN & ~tree.on_gold_BN & (tree.outcome_BN > -1.5)).sum() > 8
    assert (tree.terminal_BN & (tree.depth_BN < SMALL.max_depth) & ~tree.on_gold_BN).any()


def test_programs_are_as_few_as_the_buckets(setup: Setup, searches: Searches) -> None:
    lengths = [len(row.encoded.prompt_ids) for row in setup.batch]
    prompts = {bucket(n, stage.PROMPT_BUCKET) for n in lengths}
    sizes, rooms = 2, 2  # all problems or a quarter of them; a step or the whole remainder
    paths = {kind: {bucket(n, stage.PATH_BUCKET) for n in found} for kind, found in searches.widths.items()}
    assert len(set(lengths)) == 4
    assert len(prompts) == 2
    assert all(len(searches.widths[kind]) > len(found) + 1 for kind, found in paths.items())
    first = 1  # the root's path is the prompt's last token alone
    most = {
        "sample_step": len(prompts) * sizes * (first + rooms * len(paths["propose"])),
        "answer": len(prompts) * sizes * len(paths["judge"]),
    }
    assert searches.programs.keys() == most.keys()
    for name, count in searches.programs.items():
        assert 1 <= count <= most[name], name


def test_gold_is_found_and_rewarded(searches: Searches, setup: Setup) -> None:
    for b, row in enumerate(setup.batch):
        gold = tuple(row.encoded.target_ids)
        nodes = by_path(searches.together, b)
        longest = max((path for path in nodes if gold[: len(path)] == path), key=len)
        assert len(longest) > 0
        if longest == gold:
            assert searches.together.tree.outcome_BN[b, nodes[gold]] == 1
            assert searches.together.tree.terminal_BN[b, nodes[gold]]
    assert searches.together.sampled_tokens > 50


@pytest.mark.parametrize("reference", ["gold", "none"])
@pytest.mark.parametrize("scale", ["binary", "four_grades"])
def test_a_judgement_is_that_of_the_uncached_model(setup: Setup, reference: Any, scale: Any) -> None:
    chat, self_eval = setup.base.chat, SelfEvaluationSettings(reference=reference, scale=scale)
    candidates = [(2, chat.encode("No.")), (0, chat.encode('[f(a="x"')), (0, setup.batch[0].encoded.target_ids)]
    candidates += [(0, chat.encode("[g")), (3, setup.batch[3].encoded.target_ids)]
    found = setup.searcher(self_eval=self_eval).judge(candidates)
    letters = answer_ids(chat, self_eval.letters)
    expected = []
    for problem, response in candidates:
        encoded = setup.batch[problem].encoded
        gold = encoded.target_ids[:-1] if reference == "gold" else None
        frame = evaluation_frame(chat, gold, scale)
        shown = [token for token in response if token != chat.end_of_turn]
        logits_A = uncached(setup, [*encoded.prompt_ids, *frame.before, *shown, *frame.after])[letters]
        shares_A = np.exp(logits_A) / np.exp(logits_A).sum()
        grades = [1.0, 0.0] if scale == "binary" else [0.25, 0.025, -0.25, -0.5]
        expected.append(float(shares_A @ grades))
    assert found == pytest.approx(expected, abs=1e-4)
    assert np.ptp(expected) > 0.02


def test_a_proposal_scores_the_gold_as_the_model_does(setup: Setup) -> None:
    searcher = setup.searcher()
    gold = [problem.gold_steps for problem in searcher.problems()]
    assert [[token for step in steps for token in step] for steps in gold] == [
        row.encoded.target_ids for row in setup.batch
    ]
    assert [len(steps) for steps in gold] == [3, 2, 2, 2]  # the last is the end of turn
    states = [State(b, [], SMALL.step_limit, False, steps[0][: SMALL.step_limit]) for b, steps in enumerate(gold)]
    proposals = searcher.propose(states)
    rows = [(setup.batch[s.problem].encoded.prompt_ids, s.gold_step) for s in states]
    expected = target_log_probs(setup.policy, rows, 1024)
    assert [p.steps[-1] for p in proposals] == [state.gold_step for state in states]
    assert [p.log_probs[-1] for p in proposals] == pytest.approx(expected, abs=1e-3)
    sampled = [(setup.batch[s.problem].encoded.prompt_ids, p.steps[0]) for s, p in zip(states, proposals, strict=True)]
    expected = target_log_probs(setup.policy, sampled, 1024)
    assert [p.log_probs[0] for p in proposals] == pytest.approx(expected, abs=1e-3)
    assert [p.stopped[0] for p in proposals] == [step[-1] == setup.base.chat.end_of_turn for _, step in sampled]


def test_no_gold_step_is_no_candidate_and_the_last_step_may_be_longer(setup: Setup) -> None:
    searcher = setup.searcher()
    states = [State(1, [], 10, True, []), State(0, [], 6, False, [])]
    proposals = searcher.propose(states)
    assert [proposal.steps[-1] for proposal in proposals] == [[], []]
    assert all(1 <= len(step) <= 6 for step in proposals[1].steps[:-1])
    whole = [step for seed in range(6) for step in setup.searcher(seed=seed).propose(states)[0].steps[:-1]]
    assert max(map(len, whole)) > 6
    assert all(len(step) == 10 or step[-1] == setup.base.chat.end_of_turn for step in whole)


def test_a_step_ends_where_the_context_does(setup: Setup) -> None:
    prompt = setup.batch[0].encoded.prompt_ids
    config = dataclasses.replace(setup.base.config, max_length=len(prompt) + 3)
    short = setup._replace(base=setup.base._replace(config=config))
    paths = [[], setup.base.chat.encode("[f"), setup.base.chat.encode("[f(a")]
    for path, room in zip(paths, (3, 1, 1), strict=True):
        steps = [
            step
            for seed in range(4)
            for step in short.searcher([0], seed=seed).propose([State(0, path, 6, False, [])])[0].steps[:-1]
        ]
        assert max(map(len, steps)) == room


def test_samples_depend_on_seed_id_path_and_candidate(setup: Setup) -> None:
    state = State(0, [], 6, False, [])
    first = setup.searcher([0]).propose([state])[0].steps
    assert first[0] != first[1]
    assert setup.searcher([1, 0]).propose([state._replace(problem=1)])[0].steps == first
    assert setup.searcher([0], seed=4).propose([state])[0].steps != first
    other = setup.batch[0]._replace(sample=dataclasses.replace(SAMPLES[0], id="another"))
    assert setup._replace(batch=[other]).searcher([0]).propose([state])[0].steps != first
    cold = dataclasses.replace(SMALL, temperature=0.0)
    greedy = setup.searcher([0], cold).propose([state])[0].steps
    assert greedy[0] == greedy[1]
    assert greedy[0][0] == int(uncached(setup, setup.batch[0].encoded.prompt_ids).argmax())


@pytest.mark.parametrize(
    ("response", "finished", "expected"),
    [
        (CALLS, True, 1.0),
        ('[g(b=1), f(a="x")]', True, 1.0),
        (CALLS, False, -1.0),
        ("[f()]", True, -1.0),
        ("", True, -1),
    ],
)
def test_a_response_is_graded_as_text(setup: Setup, response: str, finished: bool, expected: float) -> None:
    ids = setup.base.chat.encode(response) + [setup.base.chat.end_of_turn] * finished
    assert setup.searcher().grade(0, ids, finished) == expected
    graded = setup.searcher(search_settings=dataclasses.replace(SMALL, grading="graded"))
    assert graded.grade(0, ids, finished) == outcome(CALLS, response, finished=finished, grading="graded")


# What is written ---------------------------------------------------------------------------------------------


def test_trees_and_pairs_are_written_as_they_are(searches: Searches, setup: Setup) -> None:
    forest, chat = searches.together, setup.base.chat
    decode = functools.partial(chat.tokenizer.decode, skip_special_tokens=False)
    rows = [stage._tree_row(forest, b, row, chat) for b, row in enumerate(setup.batch)]
    assert json.loads(json.dumps(rows)) == rows
    for b, tree in enumerate(rows):
        assert (tree["id"], tree["gold"]) == (SAMPLES[b].id, SAMPLES[b].target)
        assert [node["node"] for node in tree["nodes"]] == list(range(forest.tree.n_nodes_B[b]))
        assert all(node["text"] == decode(node["token_ids"]) for node in tree["nodes"])
        assert tree["nodes"][0]["visits"] == SMALL.n_simulations
    pairs = preference_pairs(
        forest.tree, forest.step_tokens_BNS, forest.step_length_BN, chat.tokenizer.decode, PairSettings()
    )
    assert pairs
    for pair in pairs:
        row, nodes = stage._pair_row(pair, setup.batch[pair.tree], chat, 2), rows[pair.tree]["nodes"]
        assert json.loads(json.dumps(row)) == row
        assert row["id"] == f"{row['tree']}/2/{row['node']}"
        assert row["chosen_ids"] == nodes[row["chosen_node"]]["token_ids"]
        assert row["rejected_ids"] == nodes[row["rejected_node"]]["token_ids"]
        assert row["visits_chosen"] == nodes[row["chosen_node"]]["visits"]
        path = response_of(forest, pair.tree, pair.node)
        assert row["prompt_ids"] == setup.batch[pair.tree].encoded.prompt_ids + path
        for side in ("prompt", "chosen", "rejected"):
            assert row[side] == decode(row[f"{side}_ids"])
        assert row["q_chosen"] >= row["q_rejected"] + 0.1 - 1e-5


def test_batches_are_of_similar_length_and_complete(setup: Setup) -> None:
    samples = [dataclasses.replace(sample, id=f"{sample.id}/{i}") for i in range(3) for sample in SAMPLES]
    encoded = [encode_sample(setup.base.chat, sample) for sample in samples]
    batches = stage._batches(samples, encoded, 5)
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert {row.sample.id for batch in batches for row in batch} == {sample.id for sample in samples}
    assert all(row.sample.id == row.encoded.id for batch in batches for row in batch)
    widths = [bucket(len(row.encoded.prompt_ids), stage.PROMPT_BUCKET) for batch in batches for row in batch]
    assert widths == sorted(widths)
