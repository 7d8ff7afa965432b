"""Sampling and scoring: what the uncached model would do, whatever else is in the batch."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from itool_jax.inference import sampler
from itool_jax.inference.sampler import (
    GenerateSettings,
    Policy,
    Steps,
    generate,
    row_keys,
    stable_hash,
    target_log_probs,
)
from itool_jax.model import hf
from itool_jax.model.transformer import abstract
from itool_jax.text.chat import load_tokenizer
from itool_jax.text.padding import bucket, pad, target_width
from itool_jax.text.steps import StepTable, build_step_table, split_steps
from tests import tiny
from tests.conftest import shared_path

# Few enough that every kind of token is sampled often; id 0 ends a turn.
PIECES = ["", "[", "f(", "a", "=", "1", ", ", ")", "),", ")]", "]", '"', ".", " ", "b", "!"]
STOP, OPEN, CALL, NAME, EQUALS, ONE, CLOSE_ALL, FULL_STOP = 0, 1, 2, 3, 4, 5, 9, 12
V, T = len(PIECES), 6
WIDTH, PATH = 16, 5  # padded widths of prompts and of paths
PROMPTS = [[3, 14, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3]]
RESPONSES = [[], [OPEN, CALL], [OPEN, CALL, NAME, EQUALS], [NAME], [], [NAME, FULL_STOP]]
ROWS = [PROMPTS[b // 3] + response for b, response in enumerate(RESPONSES)]
B = len(ROWS)
EACH_PROMPT = [PROMPTS[b // 3] for b in range(B)]


class Letters:
    """What a step table asks of a tokenizer."""

    def __len__(self) -> int:
        return V

    def batch_decode(self, ids: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return ["".join(PIECES[i] for i in row) for row in ids]


class Setup(NamedTuple):
    policy: Policy
    table: StepTable


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    # One layer compiles fast; how layers and caches fit together is tested with the model.
    config = tiny.model_config(tmp_path_factory.mktemp("sampler"), vocab_size=V, num_hidden_layers=1)
    return Setup(tiny.make_policy(config, seed=1), build_step_table(Letters(), "call", V, [STOP]))


@functools.partial(jax.jit, static_argnums=0)
def last_logits(graph, params, tokens_BT, length_B) -> jax.Array:
    model = nnx.merge(graph, params)
    hidden_BTD, _ = model(tokens_BT)
    return model.logits(hidden_BTD[np.arange(len(length_B)), length_B - 1])


def uncached(policy: Policy, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Float64 logits [len(rows), V] of the token after each row."""
    tokens_BT, length_B = pad(rows, 32)
    return np.asarray(last_logits(*policy, tokens_BT, length_B), np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def inputs(setup: Setup, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> tuple:
    """The arguments of `sample_step` from `params` to `path_length_P`: a prompt for each response."""
    prefix = sampler.prefill(*setup.policy, *pad([prompt[:-1] for prompt in prompts], WIDTH))
    paths = [[*prompt[-1:], *response] for prompt, response in zip(prompts, responses, strict=True)]
    return setup.policy.params, setup.table, prefix, *pad(paths, PATH)


def sample(setup: Setup, *, prompts=EACH_PROMPT, responses=RESPONSES, keys: Any = 0, **changes: Any) -> Steps:
    """`sample_step` of the standard rows, or of as many for each as there are limits; `keys` is a seed or the keys."""
    settings: dict[str, Any] = {"limit_B": np.full(len(responses), T), "temperature": 1.0} | changes
    n = len(settings["limit_B"])
    steps = sampler.sample_step(
        setup.policy.graph,
        T,
        *inputs(setup, prompts, responses),
        jax.random.split(jax.random.key(keys), n) if isinstance(keys, int) else keys,
        np.asarray(settings["limit_B"], np.int32),
        np.asarray(settings["until_stop_B"] if "until_stop_B" in settings else np.zeros(n, bool)),
        np.float32(settings["temperature"]),
    )
    return jax.tree.map(np.asarray, steps)


def tokens_of(steps: Steps) -> list[list[int]]:
    assert all(not row[n:].any() for row, n in zip(steps.tokens_BT, steps.length_B, strict=True))
    return [row[:n].tolist() for row, n in zip(steps.tokens_BT, steps.length_B, strict=True)]


def scores(setup: Setup, rows: Sequence[tuple[list[int], list[int]]], tokens_per_batch: int = 1024) -> list[float]:
    """Log-probability of each row's target."""
    return tiny.in_order(target_log_probs(setup.policy, rows, tokens_per_batch))


class Expected(NamedTuple):
    tokens: list[list[int]]
    log_probs: list[float]
    ends: list[str]


def reference(
    setup: Setup, limits: Sequence[int], until_stop_B: Sequence[bool], choose: Callable[[int, int, np.ndarray], int]
) -> Expected:
    """A step a row, without cache, loop or table in the device: `choose(row, t, log_probs)` picks tokens."""
    expected = Expected([[] for _ in ROWS], [0.0] * B, [""] * B)
    for t in range(T):
        log_probs_BV = log_softmax(uncached(setup.policy, [r + x for r, x in zip(ROWS, expected.tokens, strict=True)]))
        for b in range(B):
            if expected.ends[b] or not limits[b]:
                continue
            token = choose(b, t, log_probs_BV[b])
            expected.tokens[b].append(token)
            expected.log_probs[b] += log_probs_BV[b, token]
            response = RESPONSES[b] + expected.tokens[b]
            # A step has ended where any further token would begin another.
            more = len(split_steps(setup.table, [*response, NAME])) > len(split_steps(setup.table, response))
            if token == STOP:
                expected.ends[b] = "stop"
            elif more and not until_stop_B[b]:
                expected.ends[b] = "boundary"
            elif t + 1 == limits[b]:
                expected.ends[b] = "limit"
    return expected


# Steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "until_stop_B"),
    [([T] * B, [False] * B), ([T] * B, [True] * B), ([0, 1, 2, 3, 4, 5], [False, True] * 3)],
    ids=["steps", "whole", "limits"],
)
def test_greedy_equals_uncached_argmax(setup: Setup, limits: list[int], until_stop_B: list[bool]) -> None:
    steps = sample(setup, temperature=0.0, limit_B=limits, until_stop_B=until_stop_B)
    expected = reference(setup, limits, until_stop_B, lambda b, t, log_probs: int(log_probs.argmax()))
    assert tokens_of(steps) == expected.tokens
    np.testing.assert_allclose(steps.log_prob_B, expected.log_probs, rtol=0, atol=1e-4)
    assert steps.stopped_B.tolist() == [end == "stop" for end in expected.ends]


def test_sampled_steps_end_where_they_should(setup: Setup) -> None:
    limits, until_stop_B = [T, T, 3, T, T, 2], [False, False, False, False, True, False]
    ends = []
    for seed in range(12):
        steps = sample(setup, keys=seed, limit_B=limits, until_stop_B=until_stop_B)
        tokens = tokens_of(steps)
        expected = reference(setup, limits, until_stop_B, lambda b, t, _, tokens=tokens: (tokens[b] + [STOP] * T)[t])
        assert tokens == expected.tokens
        np.testing.assert_allclose(steps.log_prob_B, expected.log_probs, rtol=0, atol=1e-4)
        assert steps.stopped_B.tolist() == [end == "stop" for end in expected.ends]
        ends += expected.ends
    assert all(ends.count(end) > 3 for end in ("stop", "boundary", "limit"))


def test_log_probs_are_those_of_scoring(setup: Setup) -> None:
    steps = sample(setup, temperature=1.7, until_stop_B=[True] * B)
    scored = scores(setup, list(zip(ROWS, tokens_of(steps), strict=True)))
    np.testing.assert_allclose(steps.log_prob_B, scored, rtol=0, atol=1e-4)
    assert np.ptp(scored) > 1


def test_a_given_step_is_scored_as_the_uncached_model_does(setup: Setup) -> None:
    crossing = [ONE, CLOSE_ALL, FULL_STOP, NAME, ONE]  # goes on after the end of its list
    given = [[NAME], crossing, [], [NAME], [STOP], [NAME, ONE, STOP]]
    params, _, prefix, path_PS, length_P = inputs(setup, EACH_PROMPT, RESPONSES)
    actual = sampler.score_step(setup.policy.graph, params, prefix, path_PS, length_P, *pad(given, T))
    scored = scores(setup, list(zip(ROWS, given, strict=True)))
    np.testing.assert_allclose(actual, scored, rtol=0, atol=1e-4)
    assert actual[2] == 0


def test_rows_that_share_a_path_are_as_each_alone(setup: Setup) -> None:
    keys = jax.random.split(jax.random.key(9), 3 * B)
    until_stop_B = np.arange(3 * B) % 3 == 0
    together = sample(setup, keys=keys, limit_B=np.full(3 * B, T), until_stop_B=until_stop_B)
    for w in range(3):
        alone = sample(setup, keys=keys[w::3], until_stop_B=until_stop_B[w::3])
        assert tokens_of(alone) == tokens_of(together)[w::3]
        np.testing.assert_allclose(alone.log_prob_B, together.log_prob_B[w::3], rtol=0, atol=1e-4)
    assert len({tuple(row) for row in tokens_of(together)}) > B


def test_a_row_of_limit_zero_takes_nothing(setup: Setup) -> None:
    steps = sample(setup, limit_B=[0, 2, 0, 2, 0, 0])
    assert (steps.length_B > 0).tolist() == [False, True, False, True, False, False]
    assert not steps.log_prob_B[steps.length_B == 0].any()
    assert not steps.stopped_B[steps.length_B == 0].any()


# Randomness -------------------------------------------------------------------------------------------------


def test_a_key_gives_its_tokens_wherever_the_row_stands(setup: Setup) -> None:
    keys = jax.random.split(jax.random.key(5), B)
    settings = {"until_stop_B": np.arange(B) % 2 == 0, "limit_B": np.arange(B) + 1}
    steps = sample(setup, keys=keys, **settings)
    order = np.arange(B)[::-1]
    moved = sample(
        setup,
        prompts=EACH_PROMPT[::-1],
        responses=[RESPONSES[b] for b in order],
        keys=keys[order],
        **{name: value[order] for name, value in settings.items()},
    )
    assert tokens_of(moved) == [tokens_of(steps)[b] for b in order]
    np.testing.assert_allclose(moved.log_prob_B, steps.log_prob_B[order], rtol=0, atol=1e-5)
    # Other neighbours, of another prompt, change nothing either.
    other = sample(
        setup,
        prompts=[*EACH_PROMPT[:3], *[[ONE] * 4] * 3],
        responses=[*RESPONSES[:3], [], [], []],
        keys=keys,
        **settings,
    )
    assert tokens_of(other)[:3] == tokens_of(steps)[:3]
    # The key does decide.
    assert tokens_of(sample(setup, keys=keys[::-1], **settings)) != tokens_of(steps)


def misfit(counts_V: np.ndarray, log_probs_V: np.ndarray) -> float:
    """Standard deviations by which chi-square exceeds its mean; rare tokens are counted together."""
    expected_V = np.exp(log_probs_V) * counts_V.sum()
    rare = expected_V < 5
    counts = np.append(counts_V[~rare], counts_V[rare].sum())
    expected = np.append(expected_V[~rare], max(expected_V[rare].sum(), 1e-9))
    if counts[-1] == 0 and expected[-1] < 5:
        counts, expected = counts[:-1], expected[:-1]
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    assert freedom >= 2
    return (chi_square - freedom) / np.sqrt(2 * freedom)


@pytest.fixture(scope="module")
def many(setup: Setup) -> Callable[[float], tuple[np.ndarray, np.ndarray]]:
    """Two tokens of 4,096 equal rows at a temperature, and each row's log-probability."""
    n = 4096

    @functools.cache
    def draw(temperature: float) -> tuple[np.ndarray, np.ndarray]:
        steps = sample(
            setup,
            prompts=PROMPTS[:1],
            responses=[[]],
            until_stop_B=np.ones(n, bool),
            limit_B=np.full(n, 2),
            temperature=temperature,
        )
        return steps.tokens_BT[:, :2], steps.log_prob_B

    return draw


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_frequencies_match_the_softmax(setup: Setup, many: Callable, temperature: float) -> None:
    tokens_B2, _ = many(temperature)
    logits_V = uncached(setup.policy, ROWS[:1])[0]
    first_V = np.bincount(tokens_B2[:, 0], minlength=V)
    assert misfit(first_V, log_softmax(logits_V / temperature)) < 4
    assert misfit(first_V, log_softmax(logits_V / temperature * 1.2)) > 10  # it would notice
    # The second token is drawn anew, given the first.
    common = int(np.where(np.arange(V) == STOP, 0, first_V).argmax())
    second_V = np.bincount(tokens_B2[tokens_B2[:, 0] == common, 1], minlength=V)
    assert second_V.sum() > 400
    logits_V = uncached(setup.policy, [[*ROWS[0], common]])[0]
    assert misfit(second_V, log_softmax(logits_V / temperature)) < 4


def test_a_nucleus_is_the_likeliest_tokens_that_make_up_the_share(setup: Setup) -> None:
    """The tokens' log-probabilities stay those of the whole distribution; a share of 1 changes nothing."""
    logits_V = uncached(setup.policy, ROWS[:1])[0]
    log_probs_V = log_softmax(logits_V)
    order_V = np.argsort(-log_probs_V)
    cumulative_V = np.cumsum(np.exp(log_probs_V[order_V]))
    n = 2048
    keys_B = jax.random.split(jax.random.key(5), n)
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V, jnp.float32), (n, V))
    draw = functools.partial(sampler.sample_token, logits_BV, keys_B, jnp.int32(0), jnp.float32(1.0))
    for top_p in (0.3, 0.7):
        kept = order_V[: int(np.searchsorted(cumulative_V, top_p)) + 1]
        token_B = np.asarray(draw(top_p))
        assert set(token_B.tolist()) <= set(kept.tolist())
        within_V = np.full(V, -np.inf)
        within_V[kept] = log_softmax(logits_V[kept])
        counts_V = np.bincount(token_B, minlength=V)
        assert counts_V[kept[0]] / n == pytest.approx(np.exp(within_V[kept[0]]), abs=0.06)
    np.testing.assert_array_equal(draw(1.0), draw())
    assert (np.asarray(draw(1e-6)) == order_V[0]).all()


def test_log_probs_are_those_of_temperature_one(setup: Setup, many: Callable) -> None:
    tokens_B2, log_prob_B = many(0.6)
    stopped = tokens_B2[:, 0] == STOP
    assert stopped.any()
    expected = log_softmax(uncached(setup.policy, ROWS[:1])[0])[STOP]
    np.testing.assert_allclose(log_prob_B[stopped], expected, rtol=0, atol=1e-4)


# Answers and scores -----------------------------------------------------------------------------------------


def test_an_answer_is_the_uncached_models(setup: Setup) -> None:
    ids = np.array([ONE, NAME, 14], np.int32)
    params, _, prefix, path_PS, length_P = inputs(setup, EACH_PROMPT, RESPONSES)
    own = [[NAME], [ONE, CLOSE_ALL, NAME], [STOP, ONE]]  # three rows to a prompt and path
    logits_BA = sampler.choice_logits(setup.policy.graph, params, prefix, path_PS, length_P, *pad(own * B, 4), ids)
    rows = [row + x for row in ROWS for x in own]
    expected = np.concatenate([uncached(setup.policy, rows[i : i + B]) for i in range(0, len(rows), B)])[:, ids]
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits_BA, expected, rtol=0, atol=1e-4)


def test_scores_equal_float64_sums_over_logits(setup: Setup) -> None:
    random = np.random.default_rng(3)
    lengths = [(1, 1), (1, 9), (12, 1), (20, 11), (7, 8), (3, 0)]
    rows = [tuple(random.integers(0, V, n).tolist() for n in pair) for pair in lengths]
    expected = []
    for prompt, target in rows:
        given = [prompt + target[:i] for i in range(len(target))] + [[STOP]] * (2 * B - len(target))
        log_probs = log_softmax(np.concatenate([uncached(setup.policy, half) for half in (given[:B], given[B:])]))
        expected.append(sum(log_probs[i, token] for i, token in enumerate(target)))
    scored = scores(setup, rows)
    np.testing.assert_allclose(scored, expected, rtol=0, atol=1e-4)
    assert scored[-1] == 0
    for n in (1, 5):
        np.testing.assert_allclose(scores(setup, rows[:n]), scored[:n], atol=1e-5)


# Whole data sets --------------------------------------------------------------------------------------------


def data_set(n: int, longest: int) -> list[tuple[str, list[int]]]:
    random = np.random.default_rng(0)
    lengths = [1, 2, longest, *random.integers(1, longest, n - 3)]
    return [(f"row {i}", random.integers(1, V, length).tolist()) for i, length in enumerate(lengths)]


SETTINGS = GenerateSettings(temperature=1.0, max_tokens=T, tokens_per_batch=512)


def answers(setup: Setup, prompts: Sequence[tuple[str, list[int]]], seed: int = 7, **changes: Any) -> list:
    settings = dataclasses.replace(SETTINGS, **changes)
    return tiny.in_order(generate(setup.policy, setup.table, prompts, settings, 1024, seed))


def test_lengths_compile_a_program_a_bucket_and_size(setup: Setup) -> None:
    prompts = data_set(40, 190)
    assert len({len(ids) for _, ids in prompts}) > 30
    programs = (sampler.prefill, sampler.sample_step, sampler.score)
    before = [program._cache_size() for program in programs]
    for step in (1, 3):
        answers(setup, prompts[::step])
        answers(setup, prompts[::step], seed=8, temperature=0.0)
        scores(setup, [(ids, ids[: 3 * step]) for _, ids in prompts[::step]], 512)
    buckets = {bucket(len(ids) - 1) for _, ids in prompts}
    widths = {target_width(len(ids), n) for _, ids in prompts for n in (3, 9)}
    assert len(buckets) == 2
    for program, old, n in zip(programs, before, (len(buckets), len(buckets), len(widths)), strict=True):
        assert program._cache_size() - old <= 2 * n  # two sizes of the data


def test_responses_depend_on_nothing_else_in_the_batch(setup: Setup) -> None:
    prompts = data_set(12, 120)
    responses = answers(setup, prompts)
    assert len({tuple(row) for row in responses}) > 6
    order = np.random.default_rng(1).permutation(len(prompts))
    assert answers(setup, [prompts[i] for i in order]) == [responses[i] for i in order]
    assert [answers(setup, [prompt])[0] for prompt in prompts] == responses
    assert answers(setup, prompts, seed=8) != responses
    assert answers(setup, [(f"other {name}", ids) for name, ids in prompts]) != responses


def test_batches_come_narrowest_first_and_go_on_without_those_that_are_done(setup: Setup) -> None:
    prompts = data_set(12, 190)
    rows = [(ids, ids[:3]) for _, ids in prompts]

    def responses(left: list[int]) -> list[list[tuple[int, Any]]]:
        return list(generate(setup.policy, setup.table, [prompts[i] for i in left], SETTINGS, 1024, 7))

    def sums(left: list[int]) -> list[list[tuple[int, Any]]]:
        return list(target_log_probs(setup.policy, [rows[i] for i in left], 512))

    prompt_widths = [bucket(len(ids) - 1) for _, ids in prompts]
    row_widths = [target_width(len(ids), len(target)) for ids, target in rows]
    for batches_of, widths in ((responses, prompt_widths), (sums, row_widths)):
        batches = batches_of(list(range(12)))
        order = [i for batch in batches for i, _ in batch]
        assert sorted(order) == list(range(12))
        assert [widths[i] for i in order] == sorted(widths)
        assert len(batches) > 3
        for n_done in (1, len(batches) - 1):
            done = {i for batch in batches[:n_done] for i, _ in batch}
            left = [i for i in range(12) if i not in done]
            assert [[(left[i], x) for i, x in batch] for batch in batches_of(left)] == batches[n_done:]


def test_responses_end_with_a_stop_token_or_at_the_limit(setup: Setup) -> None:
    responses = answers(setup, data_set(30, 120))
    assert sum(row[-1] == STOP for row in responses) > 3
    assert all(STOP not in row[:-1] for row in responses)
    assert {len(row) for row in responses if row[-1] != STOP} == {T}
    # Whole responses go through step boundaries.
    assert any(len(split_steps(setup.table, row)) > 1 for row in responses)


def test_responses_end_where_the_context_does(setup: Setup) -> None:
    prompts = [(f"row {n}", ([*range(1, V)] * 5)[:n]) for n in range(52, 62)]
    free = answers(setup, prompts)
    bound = tiny.in_order(generate(setup.policy, setup.table, prompts, SETTINGS, 60, 7))
    assert bound == [row[: max(0, 60 - len(ids))] for row, (_, ids) in zip(free, prompts, strict=True)]
    assert len({len(row) for row in bound}) > 3


def test_row_keys_fold_every_number_in_turn() -> None:
    key = jax.random.key(3)
    keys = row_keys(key, np.array([1, 2, 2], np.uint32), np.array([5, 5, 6], np.uint32))
    data = jax.random.key_data(keys)
    assert len(np.unique(data, axis=0)) == 3
    one = jax.random.fold_in(jax.random.fold_in(key, 2), 5)
    assert np.array_equal(data[1], jax.random.key_data(one))
    assert stable_hash("a") != stable_hash("b")
    assert stable_hash("123456789") == 0xCBF43926  # as CRC-32 is specified: the same in every process


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "generate.temperature must not be negative, got -0.1"),
        ({"max_tokens": 0}, "generate.max_tokens must be positive, got 0"),
        ({"tokens_per_batch": 0}, "generate.tokens_per_batch must be positive, got 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateSettings(**settings)


def test_a_real_checkpoint_generates_its_reference_text() -> None:
    folder: Path = shared_path("checkpoints/stories260K")
    config, params = hf.load(folder)
    reference = json.loads((folder / "greedy_reference.json").read_text())
    table = build_step_table(load_tokenizer(str(folder)), "call", config.vocab_size, [2])
    settings = GenerateSettings(max_tokens=256, tokens_per_batch=1)
    policy = Policy(abstract(config)[0], params)
    # From the start token alone: the shared prefix is empty.
    assert reference["prompt_ids"] == [1]
    prompts = [("story", reference["prompt_ids"])]
    assert list(generate(policy, table, prompts, settings, config.max_length, 0)) == [[(0, reference["greedy_ids"])]]
