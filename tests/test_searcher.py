"""The search over a small model, where cached must equal uncached, and what it writes."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from itool_jax.stages.folder import Base

from itool_jax import sampler
from itool_jax.mcts.pairs import PairSettings, preference_pairs
from itool_jax.mcts.search import Forest, Proposal, SearchSettings, State, search
from itool_jax.mcts.value import SelfEvaluationSettings
from itool_jax.model import hf
from itool_jax.model.transformer import Params, abstract
from itool_jax.sampler import Policy, target_log_probs
from itool_jax.stages import search as stage
from itool_jax.stages.searcher import PATH_BUCKET, PROMPT_BUCKET, Searched, Searcher
from itool_jax.text.chat import Chat, answer_ids, encode_sample, evaluation_frame, load_tokenizer
from itool_jax.text.padding import bucket, pad
from itool_jax.text.sample import Sample
from itool_jax.text.steps import StepTable, build_step_table
from tests import tiny
from tests.test_search import by_path, response_of

# The model as the search's functions -------------------------------------------------------------------------

SMALL = SearchSettings(
    n_simulations=8, breadth=2, max_depth=3, max_step_tokens=6, max_last_step_tokens=10, batch=4, exploration=2.0
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
        searcher = Searcher(self.policy, self.base, self.table, batch, search_settings, self_eval, seed)
        searcher.seat(list(enumerate(range(len(batch)))))
        return searcher


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

        return search(searcher.problems(), propose, judge, searcher.grade, SMALL, seat=searcher.seat)

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


def test_those_that_wait_for_a_seat_become_what_they_become_at_once(setup: Setup, searches: Searches) -> None:
    settings = dataclasses.replace(SMALL, batch=2)
    searcher = Searcher(setup.policy, setup.base, setup.table, setup.batch, settings, SelfEvaluationSettings(), 3)
    told: list[int] = []
    assert_same_decisions(searches.together, searcher.search(told.append), range(4))
    assert sum(told) == 4 * SMALL.n_simulations


def test_programs_are_as_few_as_the_buckets(setup: Setup, searches: Searches) -> None:
    lengths = [len(row.encoded.prompt_ids) for row in setup.batch]
    prompts = {bucket(n, PROMPT_BUCKET) for n in lengths}
    sizes, rooms = 2, 2  # all problems or a quarter of them; a step or the whole remainder
    paths = {kind: {bucket(n, PATH_BUCKET) for n in found} for kind, found in searches.widths.items()}
    assert len(set(lengths)) == 4
    assert len(prompts) == 2
    assert all(len(searches.widths[kind]) > len(found) + 1 for kind, found in paths.items())
    rows = 2  # candidates, and the gold by itself
    most = {
        "sample_step": len(prompts) * sizes * rooms * len(paths["propose"]),
        "answer": len(prompts) * sizes * rows * len(paths["propose"]) * len(paths["judge"]),
    }
    assert searches.programs.keys() == most.keys()
    for name, count in searches.programs.items():
        assert 1 <= count <= most[name], name


def test_gold_is_found_and_rewarded(setup: Setup) -> None:
    settings = dataclasses.replace(SMALL, max_depth=1, max_last_step_tokens=20)
    searcher = setup.searcher([1, 2], settings)
    forest = searcher.search()
    for b, row in enumerate(searcher.batch):
        gold = by_path(forest, b)[tuple(row.encoded.target_ids)]
        assert forest.tree.outcome_BN[b, gold] == 1
        assert forest.tree.terminal_BN[b, gold]
        assert forest.tree.on_gold_BN[b, gold]
        assert (forest.tree.outcome_BN[b] == 1).sum() == 1  # nothing else that is so long could be right by chance


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
    states = [
        State(b, [], SMALL.max_step_tokens, False, steps[0][: SMALL.max_step_tokens]) for b, steps in enumerate(gold)
    ]
    proposals = searcher.propose(states)
    rows = [(setup.batch[s.problem].encoded.prompt_ids, s.gold_step) for s in states]
    expected = tiny.in_order(target_log_probs(setup.policy, rows, 1024))
    assert [p.steps[-1] for p in proposals] == [state.gold_step for state in states]
    assert [p.log_probs[-1] for p in proposals] == pytest.approx(expected, abs=1e-3)
    sampled = [(setup.batch[s.problem].encoded.prompt_ids, p.steps[0]) for s, p in zip(states, proposals, strict=True)]
    expected = tiny.in_order(target_log_probs(setup.policy, sampled, 1024))
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
    _, prompt, gold = setup.batch[0].encoded
    frame = setup.searcher([0]).frames[0]  # the question about a response, the gold one at least, must fit as well
    length = len(prompt) + len(frame.before) + len(gold) + len(frame.after)
    config = dataclasses.replace(setup.base.config, max_length=length)
    short = setup._replace(base=setup.base._replace(config=config))
    for path, room in ((gold[:-3], 3), (gold[:-1], 1)):
        steps = [
            step
            for seed in range(4)
            for step in short.searcher([0], seed=seed).propose([State(0, path, 6, False, [])])[0].steps[:-1]
        ]
        assert max(map(len, steps)) == room
    none = setup.base._replace(config=dataclasses.replace(config, max_length=length - 1))
    with pytest.raises(ValueError, match=f"sample {setup.batch[0].sample.id}: the question about its answers"):
        setup._replace(base=none).searcher([0])


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


def test_groups_are_of_one_length_unless_they_are_few(setup: Setup) -> None:
    samples = [dataclasses.replace(sample, id=f"{sample.id}/{i}") for i in range(3) for sample in SAMPLES]
    encoded = [encode_sample(setup.base.chat, sample) for sample in samples]
    assert len({bucket(len(row.prompt_ids), PROMPT_BUCKET) for row in encoded}) == 2  # nine short, three long
    for least, sizes in ((5, [9, 3]), (9, [9, 3]), (10, [12])):
        items = [Searched(*row) for row in zip(samples, encoded, strict=True)]
        groups = stage._groups(items, least)
        assert [len(group) for group in groups] == sizes
        rows = [row for group in groups for row in group]
        assert {row.sample.id for row in rows} == {sample.id for sample in samples}
        assert all(row.sample.id == row.encoded.id for row in rows)
        widths = [bucket(len(row.encoded.prompt_ids), PROMPT_BUCKET) for row in rows]
        assert widths == sorted(widths)
