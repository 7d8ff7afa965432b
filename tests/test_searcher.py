"""The search over a small model, where cached must equal uncached, and what it writes."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import pytest
from flax import nnx

from itool_jax.config import Config
from itool_jax.evaluation import draws
from itool_jax.inference import sampler
from itool_jax.inference.sampler import GenerateSettings, Policy, target_log_probs
from itool_jax.mcts.pairs import PairSettings, preference_pairs
from itool_jax.mcts.policy import OWN_BUCKET, PATH_BUCKET, PROMPT_BUCKET, ModelPolicy, Searched
from itool_jax.mcts.search import FinishedTree, Response, SearchSettings, State, Step, search
from itool_jax.mcts.value import SelfEvaluationSettings
from itool_jax.model import hf
from itool_jax.model.transformer import Params, abstract
from itool_jax.stages import search as stage
from itool_jax.store.base import Base
from itool_jax.store.columns import json_of, row_of
from itool_jax.store.tables import PreferenceRow, SearchRow, TreeRow
from itool_jax.text.chat import Chat, answer_ids, encode_sample, evaluation_frame, load_tokenizer
from itool_jax.text.padding import bucket, pad
from itool_jax.text.sample import Sample
from itool_jax.text.steps import StepTable, build_step_table
from tests import tiny
from tests.test_search import by_path, response_of

# The model as the search's functions -------------------------------------------------------------------------

SMALL = SearchSettings(
    n_simulations=8,
    breadth=2,
    max_depth=3,
    max_step_tokens=6,
    max_last_step_tokens=10,
    batch=4,
    exploration=2.0,
    inject_gold="always",
)
CALLS = '[f(a="x"), g(b=1)]'
QUESTIONS = ["short", "a longer question, " * 4, "is there a tool? " * 9, "very long " * 30]
TARGETS = [CALLS, "[f(a=1)]", "No tool fits.", '[g(b="yes")]']
SAMPLES = [
    Sample(id=f"sample {i}", messages=({"role": "user", "content": question},), target=target)
    for i, (question, target) in enumerate(zip(QUESTIONS, TARGETS, strict=True))
]


AnyModel = TypeVar("AnyModel", bound=ModelPolicy)


class Setup(NamedTuple):
    base: Base
    policy: Policy
    table: StepTable
    batch: list[Searched]

    def model(
        self,
        rows: Sequence[int] = range(4),
        search_settings: SearchSettings = SMALL,
        self_eval: SelfEvaluationSettings = SelfEvaluationSettings(),  # noqa: B008
        seed: int = 3,
        kind: type[AnyModel] = ModelPolicy,
    ) -> AnyModel:
        batch, max_length, key = [self.batch[i] for i in rows], self.base.config.max_length, jax.random.key(seed)
        return kind(self.policy, self.base.chat, max_length, self.table, batch, search_settings, self_eval, key)


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
    params = jax.tree.map(jax.numpy.asarray, params)
    table = build_step_table(chat.tokenizer, "call", config.vocab_size, chat.stop_ids)
    batch = [Searched(sample, encode_sample(chat, sample)) for sample in SAMPLES]
    return Setup(Base(config, chat), Policy(abstract(config)[0], params), table, batch)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graph: nnx.GraphDef, params: Params, tokens_BT: jax.Array, length_B: jax.Array) -> jax.Array:
    model = nnx.merge(graph, params)
    hidden_BTD, _ = model(tokens_BT)
    return model.logits(hidden_BTD[np.arange(len(length_B)), length_B - 1])


def uncached(setup: Setup, ids: Sequence[int]) -> np.ndarray:
    """Float64 logits of the token after `ids`."""
    return np.asarray(logits_of(*setup.policy, *pad([ids], 768))[0], np.float64)


def run(model: ModelPolicy) -> list[FinishedTree]:
    return search(model.problems, model, model.settings)


COMPILED: dict[str, Any] = {
    "prefill": sampler.prefill,
    "sample_step": sampler.sample_step,
    "score_step": sampler.score_step,
    "answer": sampler.choice_logits,
}
"""The programs of the model; what else a search compiles takes no time."""


class Shapes(ModelPolicy):
    """A policy that notes which shapes its requests are padded to, as far as they are known from outside."""

    shapes: dict[str, set[tuple[int, ...]]]

    def propose(self, states: Sequence[State], /) -> list[list[Step]]:
        def size(some: Sequence[State]) -> int:
            return 1 if len(some) == 1 else SMALL.lanes

        def path(some: Sequence[State]) -> int:
            return bucket(max(len(state.response) for state in some), PATH_BUCKET)

        gold = [state for state in states if state.gold_step]
        token_budget = max(10 if state.until_stop else 6 for state in states)
        self.shapes["sample_step"].add((self.prompts.width, size(states), path(states), token_budget))
        if gold:
            self.shapes["score_step"].add((self.prompts.width, size(gold), path(gold), OWN_BUCKET))
        return super().propose(states)


class Searches(NamedTuple):
    together: list[FinishedTree]
    first: list[FinishedTree]
    last: list[FinishedTree]
    turned: list[FinishedTree]
    programs: dict[str, int]
    shapes: dict[str, set[tuple[int, ...]]]


@pytest.fixture(scope="module")
def searches(setup: Setup) -> Searches:
    """All problems at once, the first and the last of them alone, and in reverse; and what was compiled on the way."""
    jax.clear_caches()  # no program of another test
    shapes: dict[str, set[tuple[int, ...]]] = {"sample_step": set(), "score_step": set()}

    def run_rows(rows: Sequence[int]) -> list[FinishedTree]:
        model = setup.model(rows, kind=Shapes)
        model.shapes = shapes
        return run(model)

    together, first, last, turned = run_rows(range(4)), run_rows([0]), run_rows([3]), run_rows([3, 2, 1, 0])
    programs = {name: function._cache_size() for name, function in COMPILED.items()}
    return Searches(together, first, last, turned, programs, shapes)


EXACT = ("n_nodes", "parent_N", "depth_N", "children_NW", "visit_count_N", "terminal_N")


def assert_same_decisions(one: FinishedTree, two: FinishedTree) -> None:
    """Every choice is the same; numbers may differ as sums of another order do."""
    for name in EXACT:
        np.testing.assert_array_equal(getattr(one.tree, name), getattr(two.tree, name), err_msg=name)
    np.testing.assert_array_equal(one.tree.extra.outcome, two.tree.extra.outcome)
    np.testing.assert_array_equal(one.tree.extra.matches_reference, two.tree.extra.matches_reference)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), one.tree, two.tree)
    assert one.steps == two.steps


def test_a_model_searches_many_as_each_alone_in_any_order(searches: Searches) -> None:
    # Alone, the first prompt is padded to another width than beside the last.
    assert_same_decisions(searches.together[0], searches.first[0])
    assert_same_decisions(searches.together[3], searches.last[0])
    for one, two in zip(searches.together, reversed(searches.turned), strict=True):
        assert_same_decisions(one, two)
    # The trees are worth comparing: of many shapes, with ends that the policy found itself.
    trees = [one.tree for one in searches.together]
    assert len({tuple(tree.parent_N) for tree in trees}) > 1
    own_ends = [tree.terminal_N & ~tree.extra.matches_reference for tree in trees]
    assert np.sum(own_ends) > 8
    assert any((ends & (tree.depth_N < SMALL.max_depth)).any() for ends, tree in zip(own_ends, trees, strict=True))


def test_those_that_wait_for_a_lane_become_what_they_become_at_once(setup: Setup, searches: Searches) -> None:
    waiting = run(setup.model(search_settings=dataclasses.replace(SMALL, batch=2)))
    for one, two in zip(searches.together, waiting, strict=True):
        assert_same_decisions(one, two)


def test_a_search_compiles_exactly_these_programs(setup: Setup, searches: Searches) -> None:
    lengths = [len(row.encoded.prompt_ids) for row in setup.batch]
    assert len(set(lengths)) == 4
    assert len({bucket(n, PROMPT_BUCKET) for n in lengths}) == 2
    # A program for each shape: of the prompts, of all of them or a quarter, of the path, of the step.
    for name, shapes in searches.shapes.items():
        assert searches.programs[name] == len(shapes), name
    assert searches.programs == {"prefill": 3, "sample_step": 6, "score_step": 3, "answer": 9}


def test_gold_is_found_and_rewarded(setup: Setup) -> None:
    settings = dataclasses.replace(SMALL, max_depth=1, max_last_step_tokens=20)
    model = setup.model([1, 2], settings)
    for one, row in zip(run(model), model.batch, strict=True):
        gold = by_path(one)[tuple(row.encoded.target_ids)]
        assert one.tree.extra.outcome[gold] == 1
        assert one.tree.terminal_N[gold]
        assert one.tree.extra.matches_reference[gold]
        assert (one.tree.extra.outcome == 1).sum() == 1  # nothing else that is so long could be right by chance


@pytest.mark.parametrize("reference", ["gold", "none"])
@pytest.mark.parametrize("scale", ["binary", "four_grades"])
def test_a_judgement_is_that_of_the_uncached_model(setup: Setup, reference: Any, scale: Any) -> None:
    chat, self_eval = setup.base.chat, SelfEvaluationSettings(reference=reference, scale=scale)
    candidates = [(2, chat.encode("No.")), (0, chat.encode('[f(a="x"')), (0, setup.batch[0].encoded.target_ids)]
    candidates += [(0, chat.encode("[g")), (3, setup.batch[3].encoded.target_ids)]
    responses = [Response(problem, problem, ids) for problem, ids in candidates]
    confidences = setup.model(self_eval=self_eval).judge(responses)
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
    assert confidences == pytest.approx(expected, abs=1e-4)
    assert np.ptp(expected) > 0.02


@pytest.mark.parametrize("scale", ["binary", "four_grades"])
def test_both_orders_average_the_judgements_of_either(setup: Setup, scale: Any) -> None:
    """In the second one the letters of the answers are in reverse, in the question and in what is read."""
    chat, encoded = setup.base.chat, setup.batch[0].encoded
    responses = [Response(0, 0, chat.encode(text)) for text in ("[f", "[g")]
    plain = setup.model(self_eval=SelfEvaluationSettings(scale=scale))
    one = plain.judge(responses)
    averaging = setup.model(self_eval=SelfEvaluationSettings(scale=scale, both_orders=True))
    both = averaging.judge(responses)
    assert averaging.swapped[0] == pytest.approx(plain.swapped[0], abs=1e-6)  # what is compared is no average
    letters = SelfEvaluationSettings(scale=scale).letters
    frame = evaluation_frame(chat, encoded.target_ids[:-1], scale, letters=letters[::-1])
    ids = [*encoded.prompt_ids, *frame.before, *responses[0].token_ids, *frame.after]
    logits_A = uncached(setup, ids)[answer_ids(chat, letters[::-1])]
    shares_A = np.exp(logits_A) / np.exp(logits_A).sum()
    in_reverse = float(shares_A @ ([1.0, 0.0] if scale == "binary" else [0.25, 0.025, -0.25, -0.5]))
    assert plain.swapped == {0: (one[0], pytest.approx(in_reverse, abs=1e-4))}
    assert both[0] == pytest.approx((one[0] + in_reverse) / 2, abs=1e-4)
    plain.judge(responses)
    assert len(plain.swapped) == 1


def test_a_proposal_scores_the_gold_as_the_model_does(setup: Setup) -> None:
    model = setup.model()
    gold = [problem.gold_steps for problem in model.problems]
    assert [[token for step in steps for token in step] for steps in gold] == [
        row.encoded.target_ids for row in setup.batch
    ]
    assert [len(steps) for steps in gold] == [3, 2, 2, 2]  # the last is the end of turn
    limit = SMALL.max_step_tokens
    states = [State(b, b, [], limit, False, steps[0][:limit]) for b, steps in enumerate(gold)]
    proposals = model.propose(states)
    rows = [(setup.batch[s.problem].encoded.prompt_ids, s.gold_step) for s in states]
    expected = tiny.in_order(target_log_probs(setup.policy, rows, 1024))
    assert [len(steps) for steps in proposals] == [SMALL.breadth + 1] * 4
    assert [steps[-1].token_ids for steps in proposals] == [state.gold_step for state in states]
    assert [steps[-1].log_prob for steps in proposals] == pytest.approx(expected, abs=1e-3)
    first = [steps[0] for steps in proposals]
    rows = [(setup.batch[s.problem].encoded.prompt_ids, step.token_ids) for s, step in zip(states, first, strict=True)]
    expected = tiny.in_order(target_log_probs(setup.policy, rows, 1024))
    assert [step.log_prob for step in first] == pytest.approx(expected, abs=1e-3)
    assert [step.stopped for step in first] == [step.token_ids[-1] == setup.base.chat.end_of_turn for step in first]


def test_no_gold_step_is_no_candidate_and_the_last_step_may_be_longer(setup: Setup) -> None:
    states = [State(1, 1, [], 10, True, []), State(0, 0, [], 6, False, [])]
    proposals = setup.model().propose(states)
    assert [len(steps) for steps in proposals] == [SMALL.breadth] * 2
    assert all(1 <= len(step.token_ids) <= 6 for step in proposals[1])
    last = [step for seed in range(6) for step in setup.model(seed=seed).propose(states)[0]]
    assert max(len(step.token_ids) for step in last) > 6
    assert all(len(step.token_ids) == 10 or step.token_ids[-1] == setup.base.chat.end_of_turn for step in last)


def test_a_step_ends_where_the_context_does(setup: Setup) -> None:
    _, prompt, gold = setup.batch[0].encoded
    frame = setup.model([0]).frames[0]  # the question about a response, the gold one at least, must fit as well
    length = len(prompt) + len(frame.before) + len(gold) + len(frame.after)
    config = dataclasses.replace(setup.base.config, max_length=length)
    short = setup._replace(base=setup.base._replace(config=config))
    for path, budget in ((gold[:-3], 3), (gold[:-1], 1)):
        steps = [
            step.token_ids
            for seed in range(4)
            for step in short.model([0], seed=seed).propose([State(0, 0, path, 6, False, [])])[0]
        ]
        assert max(map(len, steps)) == budget
    none = setup.base._replace(config=dataclasses.replace(config, max_length=length - 1))
    with pytest.raises(ValueError, match=f"sample {setup.batch[0].sample.id}: its recorded answers and the self-eval"):
        setup._replace(base=none).model([0])
    setup._replace(base=none).model([0], self_eval=SelfEvaluationSettings(weight=0.0))  # no question is asked


def test_recorded_turns_are_graded_each_by_its_own_gold(setup: Setup) -> None:
    """And what stands between them is what the template writes between an answer and the next one."""
    chat = setup.base.chat
    following = ({"role": "tool", "content": "3"}, {"role": "assistant", "content": "[g(b=3)]"})
    following += ({"role": "tool", "content": "ok"}, {"role": "assistant", "content": "Done."})
    sample = dataclasses.replace(SAMPLES[1], following=following)
    encoded = encode_sample(chat, sample)
    model = setup._replace(batch=[Searched(sample, encoded)]).model([0])
    (problem,) = model.problems
    assert len(problem.later) == 2
    asked = {"role": "assistant", "content": sample.target}
    whole = chat.prompt_ids([*sample.messages, asked, *following], sample.tools)
    so_far = [*encoded.prompt_ids, *problem.gold]
    assert whole[: len(so_far)] == so_far
    ends = [[*chat.encode(text), chat.end_of_turn] for text in (sample.target, "[g(b=3)]", "Done.", "[g(b=4)]")]
    assert [model.grade(0, turn, ids, True) for turn, ids in enumerate(ends[:3])] == [1.0, 1.0, 1.0]
    assert [model.grade(0, turn, ends[3], True) for turn in range(3)] == [-1.0, -1.0, -1.0]
    trees = run(model)
    assert trees[0].observed


def test_samples_depend_on_seed_id_path_and_candidate(setup: Setup) -> None:
    state = State(0, 0, [], 6, False, [])

    def steps_of(model: ModelPolicy, state: State = state) -> list[list[int]]:
        return [step.token_ids for step in model.propose([state])[0]]

    first = steps_of(setup.model([0]))
    assert first[0] != first[1]
    assert steps_of(setup.model([1, 0]), state._replace(lane=3, problem=1)) == first
    assert steps_of(setup.model([0], seed=4)) != first
    other = setup.batch[0]._replace(sample=dataclasses.replace(SAMPLES[0], id="another"))
    assert steps_of(setup._replace(batch=[other]).model([0])) != first
    greedy = steps_of(setup.model([0], dataclasses.replace(SMALL, temperature=0.0)))
    assert greedy[0] == greedy[1]
    assert greedy[0][0] == int(uncached(setup, setup.batch[0].encoded.prompt_ids).argmax())


def test_a_lane_may_go_to_another_problem(setup: Setup) -> None:
    """What is cached by lane is computed again."""
    model = setup.model()
    state = State(2, 0, [], 6, False, [])
    response = Response(2, 0, setup.base.chat.encode("[f"))
    for problem in (0, 1, 0):
        fresh = setup.model()
        other, judged = state._replace(problem=problem), response._replace(problem=problem)
        steps, expected = model.propose([other])[0], fresh.propose([other])[0]
        assert [step.token_ids for step in steps] == [step.token_ids for step in expected]
        assert model.judge([judged]) == pytest.approx(fresh.judge([judged]), abs=1e-6)


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
    assert setup.model().grade(0, 0, ids, finished) == expected


# What is written ---------------------------------------------------------------------------------------------


def test_trees_and_pairs_are_written_as_they_are(searches: Searches, setup: Setup) -> None:
    chat, pairs = setup.base.chat, 0
    decode = functools.partial(chat.tokenizer.decode, skip_special_tokens=False)
    for searched, sample, one in zip(setup.batch, SAMPLES, searches.together, strict=True):
        tree = stage._tree_row(one, searched, chat)
        assert row_of(TreeRow, json.loads(json.dumps(json_of(tree)))) == tree
        assert (tree.id, tree.gold) == (sample.id, sample.target)
        assert [node.node for node in tree.nodes] == list(range(one.tree.n_nodes))
        assert all(node.text == decode(node.token_ids) for node in tree.nodes)
        assert tree.nodes[0].visits == SMALL.n_simulations + 1  # the walk down the gold
        assert "observed" not in json_of(tree)["nodes"][0]
        for pair in preference_pairs(one.tree, one.steps, chat.tokenizer.decode, PairSettings()):
            row, nodes = stage._pair_row(pair, searched, chat, Config(stage="search"), 2), tree.nodes
            assert row_of(PreferenceRow, json.loads(json.dumps(json_of(row)))) == row
            assert row.id == f"{row.tree}/2/{row.node}"
            assert row.chosen_ids == nodes[row.chosen_node].token_ids
            assert row.rejected_ids == nodes[row.rejected_node].token_ids
            assert row.visits_chosen == nodes[row.chosen_node].visits
            assert row.prompt_ids == searched.encoded.prompt_ids + response_of(one, pair.node)
            for side in ("prompt", "chosen", "rejected"):
                assert getattr(row, side) == decode(getattr(row, f"{side}_ids"))
            assert row.q_chosen >= row.q_rejected + 0.1 - 1e-5
            pairs += 1
    assert pairs


def test_own_answers_are_counted_whatever_is_sampled_beside_them(setup: Setup) -> None:
    """Any text that ends is right where the gold is one; the model does not hit upon the calls of the others."""
    params = dict(setup.policy.params)
    params["embedding"] = params["embedding"].at[setup.base.chat.end_of_turn].multiply(1.5)  # it ends more often
    setup = setup._replace(policy=setup.policy._replace(params=params))
    samples = [dataclasses.replace(s, target="No tool fits." if i < 2 else CALLS) for i, s in enumerate(SAMPLES)]
    items = [Searched(sample, encode_sample(setup.base.chat, sample)) for sample in samples]
    config = Config(stage="score", search=SMALL, generate=GenerateSettings(max_tokens=20))

    def counts(items: Sequence[Searched], n: int = 16, batch: int = 4) -> list[int]:
        settings = dataclasses.replace(draws.settings(config, n, 1.0), batch=batch)
        given = setup.policy, setup.base, setup.table, items, settings, jax.random.key(1)
        return tiny.in_order(draws.count_right(*given))

    counted = counts(items)
    assert counted[2:] == [0, 0]
    assert 0 < sum(counted) < 32
    assert counts(items[::-1], batch=1) == counted[::-1]
    assert sum(counts(items, n=1)) <= sum(counted)


@pytest.mark.parametrize("is_probability", [True, False])
def test_four_grades_are_no_probability(is_probability: bool) -> None:
    root = {"parent": -1, "terminal": False, "outcome": 0.0, "confidence": 0.0, "sampled": True}
    ends = [root | {"parent": 0, "terminal": True, "outcome": o, "confidence": c} for o, c in ((1.0, 0.9), (-1.0, 0.2))]
    row = {"tree": {"id": "a", "nodes": [root, *ends]}, "judged": [0.9, 0.4], "invalid_pairs": 0, "answers": []}
    searched = row_of(SearchRow, row | {"pairs": [], "reachable": True})
    judged = stage._figures([searched], [], is_probability)["self_evaluation"]
    assert (judged["responses"], judged["auc"], judged["asked_both_ways"]) == (2, 1.0, 1)
    assert judged["flipped"] == (1.0 if is_probability else None)
    assert judged["calibration_error"] == (pytest.approx(0.15) if is_probability else None)


def test_draws_of_an_iteration_and_a_purpose_are_their_own() -> None:
    config = Config(stage="score")
    keys = [draws.random_key(config, i, purpose) for i in (1, 2) for purpose in ("answers", "search")]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 4


def test_groups_are_of_one_length_unless_they_are_few(setup: Setup) -> None:
    samples = [dataclasses.replace(sample, id=f"{sample.id}/{i}") for i in range(3) for sample in SAMPLES]
    encoded = [encode_sample(setup.base.chat, sample) for sample in samples]
    assert len({bucket(len(row.prompt_ids), PROMPT_BUCKET) for row in encoded}) == 2  # nine short, three long
    for least, sizes in ((5, [9, 3]), (9, [9, 3]), (10, [12])):
        items = [Searched(*row) for row in zip(samples, encoded, strict=True)]
        groups = draws.by_prompt_width(items, least)
        assert [len(group) for group in groups] == sizes
        rows = [items[i] for group in groups for i in group]
        assert {row.sample.id for row in rows} == {sample.id for sample in samples}
        assert all(row.sample.id == row.encoded.id for row in rows)
        widths = [bucket(len(row.encoded.prompt_ids), PROMPT_BUCKET) for row in rows]
        assert widths == sorted(widths)
