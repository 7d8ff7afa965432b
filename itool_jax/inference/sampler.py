"""Generates and scores tokens in compiled programs over a key-value cache that all rows of a prompt share.

In: a `Policy` and token ids. Out: sampled steps with their log-probabilities, log-probabilities of given
targets, and answers to one-letter questions. Each prompt is prefilled once; the rows that continue it
cache only their own tokens. Shapes are bucketed, so that a data set of any lengths compiles only a few
programs.
"""

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from itool_jax.model.cache import Prefix, Suffix, as_prefix, empty_suffix
from itool_jax.model.log_probs import masked_log_prob_sum, token_log_probs, token_log_probs_from_logits
from itool_jax.model.sharding import on_each_copy, row_devices, to_host
from itool_jax.model.transformer import Params, Transformer
from itool_jax.text.padding import TargetBatch, bucket, collate, group, pad, target_width
from itool_jax.text.steps import StepState, StepTable, advance, advance_path
from itool_jax.types import FloatB


class Policy(NamedTuple):
    """A model ready to run: the module's graph and its weights."""

    graph: nnx.GraphDef
    params: Params


class Steps(NamedTuple):
    """One sampled step per row; `tokens_BT` is padded with 0 after `length_B`."""

    tokens_BT: Int[Array, "B T"]
    length_B: Int[Array, " B"]
    log_prob_B: Float[Array, " B"]
    """Sum of the tokens' log-probabilities at temperature 1."""
    stopped_B: Bool[Array, " B"]
    """True if the step ends the response with a stop token."""
    complete_B: Bool[Array, " B"]
    """True if it ends at a step boundary, False if the limit cut it off."""


@functools.partial(jax.jit, static_argnums=0)
def prefill(graph: nnx.GraphDef, params: Params, tokens_PT: Array, length_P: Array) -> Prefix:
    """Computes keys and values of P right-padded prompts."""
    return nnx.merge(graph, params)(tokens_PT, length_P)[1]


@functools.partial(jax.jit, static_argnums=0)
def score(graph: nnx.GraphDef, params: Params, batch: TargetBatch) -> FloatB:
    """Sums log π over each row's target tokens, given all tokens before them [B]."""
    model = nnx.merge(graph, params)
    hidden_BRD, _ = model(batch.tokens_BT, at_BR=batch.positions_BR)
    log_probs_BR = token_log_probs(hidden_BRD, model.unembedding(), batch.targets_BR)
    return masked_log_prob_sum(log_probs_BR, batch.mask_BR)


class _Extended(NamedTuple):
    """Cache, end positions and hidden states after extending a batch."""

    suffix: Suffix
    end_B: Array
    """The position after each row's last token."""
    hidden_BRD: Array


def _extend(
    model: Transformer,
    shared: Sequence[Prefix],
    tokens_BT: Array,
    length_B: Array,
    at_BR: Array | None = None,
    spare: int = 0,
) -> _Extended:
    """Extends shared prefixes by right-padded rows of at least one token.

    Args:
        model: the model.
        shared: consecutive prefixes that the rows continue; each prefix is shared by a group of rows.
        tokens_BT: right-padded.
        length_B: number of tokens in each row.
        at_BR: indices into T whose hidden states to return; None: those of the last tokens, R = 1.
        spare: free slots of the new cache beyond the T.
    """
    B, T = tokens_BT.shape
    start_B = sum((jnp.repeat(part.length_P, B // len(part.length_P)) for part in shared), jnp.zeros(B, jnp.int32))
    place_T = jnp.arange(T)
    valid_BT, positions_BT = place_T < length_B[:, None], start_B[:, None] + place_T
    at_BR = length_B[:, None] - 1 if at_BR is None else at_BR
    suffix = empty_suffix(shared[0], B, T + spare)
    hidden_BRD, suffix = model.extend(tokens_BT, valid_BT, positions_BT, shared, suffix, 0, at_BR)
    return _Extended(suffix, start_B + length_B, hidden_BRD)


@functools.partial(jax.jit, static_argnums=0)
def choice_logits(
    graph: nnx.GraphDef,
    params: Params,
    prefix: Prefix,
    path_PS: Array,
    path_length_P: Array,
    own_BT: Array,
    own_length_B: Array,
    answer_ids_A: Array,
) -> Array:
    """Computes the logits [B, A] of the answer tokens that may follow each row.

    A row is a prompt, a path that all rows of the prompt share, and its own tokens; the first two are computed once.
    """
    model = nnx.merge(graph, params)
    path = _extend(model, [prefix], path_PS, path_length_P)
    own = _extend(model, [prefix, as_prefix(path.suffix, path_length_P)], own_BT, own_length_B)
    return model.logits(own.hidden_BRD[:, 0])[:, answer_ids_A]


@functools.partial(jax.jit, static_argnums=0)
def score_step(
    graph: nnx.GraphDef,
    params: Params,
    prefix: Prefix,
    path_PS: Array,
    path_length_P: Array,
    step_PT: Array,
    step_length_P: Array,
) -> FloatB:
    """Sums log π over the step that follows each prompt and path [P]; paths and steps are right-padded."""
    model = nnx.merge(graph, params)
    P, T = step_PT.shape
    # Each row is the path, followed directly by its step.
    place_PT = path_length_P[:, None] + jnp.arange(T)
    row_PS = jnp.pad(path_PS, [(0, 0), (0, T)])
    row_PS = row_PS.at[jnp.arange(P)[:, None], place_PT].set(step_PT)
    row = _extend(model, [prefix], row_PS, path_length_P + step_length_P, at_BR=place_PT - 1)
    log_probs_PT = token_log_probs(row.hidden_BRD, model.unembedding(), step_PT)
    return masked_log_prob_sum(log_probs_PT, jnp.arange(T) < step_length_P[:, None])


def sample_token(logits_BV: Array, keys_B: Array, t: Array, temperature: Array, top_p: Array | float = 1.0) -> Array:
    """Samples token t of each row by inverse transform of one uniform number per row; temperature 0 is greedy.

    With `top_p` below 1, samples only from the likeliest tokens whose probabilities at that temperature add up to
    `top_p` (https://arxiv.org/abs/1904.09751).
    """

    def nucleus(weight_BV: Array) -> Array:
        falling_BV = -jnp.sort(-weight_BV, axis=-1)
        before_BV = jnp.cumsum(falling_BV, axis=-1) - falling_BV
        inside_BV = before_BV < top_p * weight_BV.sum(axis=-1, keepdims=True)
        least_B1 = jnp.where(inside_BV, falling_BV, jnp.inf).min(axis=-1, keepdims=True)
        return jnp.where(weight_BV >= least_B1, weight_BV, 0.0)

    def sampled() -> Array:
        uniform_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(keys_B)
        weight_BV = jnp.exp((logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature)
        weight_BV = jax.lax.cond(jnp.asarray(top_p) < 1, nucleus, lambda weight_BV: weight_BV, weight_BV)
        mass_BV = jnp.cumsum(weight_BV, axis=-1)
        return jnp.argmax(mass_BV > uniform_B[:, None] * mass_BV[:, -1:], axis=-1)

    best = functools.partial(jnp.argmax, logits_BV, axis=-1)
    return jax.lax.cond(temperature > 0, sampled, best).astype(jnp.int32)


class _Decoding(NamedTuple):
    """State of the decode loop."""

    t: Int[Array, ""]
    """Number of tokens sampled so far."""
    token_B: Int[Array, " B"]
    """Last sampled token, not yet in the cache."""
    suffix: Suffix
    automaton: StepState
    steps: Steps
    done_B: Bool[Array, " B"]


@functools.partial(jax.jit, static_argnums=(0, 1))
def sample_step(
    graph: nnx.GraphDef,
    max_tokens: int,
    params: Params,
    table: StepTable,
    prefix: Prefix,
    path_PS: Int[Array, "P S"],
    path_length_P: Int[Array, " P"],
    keys_B: Array,
    limit_B: Int[Array, " B"],
    until_stop_B: Bool[Array, " B"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""] | float = 1.0,
    turn_start_P: Int[Array, " P"] | int = 0,
) -> Steps:
    """Samples one step for every row, in one compiled loop that ends when the last row does.

    Args:
        graph: the model's graph.
        max_tokens: longest step, in tokens.
        params: the model's weights.
        table: step boundaries and stop tokens.
        prefix: P prompts without their last token; B = P · R rows continue them, R per prompt.
        path_PS: right-padded; the prompt's last token, then the response so far, shared by its R rows.
        path_length_P: number of tokens in each path, including the prompt's last one.
        keys_B: one random key per row; token t uses the key with t folded in.
        limit_B: most tokens per row, up to `max_tokens`; a row with limit 0 samples none.
        until_stop_B: rows whose step is the whole remainder, up to a stop token.
        temperature: sampling temperature, 0 is greedy; log-probabilities are always at temperature 1.
        top_p: nucleus sampling: share of the probability to sample from, likeliest tokens first.
        turn_start_P: number of tokens in each response so far that belong to earlier turns, whose steps do not count.
    """
    by_row = (
        prefix,
        path_PS,
        path_length_P,
        keys_B,
        limit_B,
        until_stop_B,
        jnp.broadcast_to(turn_start_P, len(path_PS)),
    )
    whole = (params, table, temperature, jnp.asarray(top_p))
    sample = functools.partial(_sample_step, graph, max_tokens)
    return on_each_copy(len(path_PS))(sample)(by_row, whole)


def _sample_step(graph: nnx.GraphDef, max_tokens: int, by_row: tuple[Any, ...], whole: tuple[Any, ...]) -> Steps:
    """Samples a step for the rows of one copy of the model, whose loop waits for no other copy's rows."""
    prefix, path_PS, path_length_P, keys_B, limit_B, until_stop_B, turn_start_P = by_row
    params, table, temperature, top_p = whole
    model = nnx.merge(graph, params)
    (P, S), B = path_PS.shape, len(limit_B)
    to_rows = functools.partial(jnp.repeat, repeats=B // P, axis=0)

    # 1. Prefill the paths. Rows share their path's cache; with one row per path, each row continues in that cache.
    path = _extend(model, [prefix], path_PS, path_length_P, spare=max_tokens if P == B else 0)
    if P == B:
        shared, suffix, first_slot = [prefix], path.suffix, S
    else:
        shared = [prefix, as_prefix(path.suffix, path_length_P)]
        suffix, first_slot = empty_suffix(prefix, B, max_tokens), 0
    first_logits_BV = to_rows(model.logits(path.hidden_BRD[:, 0]))
    first_position_B = to_rows(path.end_B)

    def sample(logits_BV: Array, state: _Decoding) -> _Decoding:
        """Samples the next token of each unfinished row."""
        t, live_B, steps = state.t, ~state.done_B, state.steps
        token_B = jnp.where(live_B, sample_token(logits_BV, keys_B, t, temperature, top_p), 0)
        log_prob_B = token_log_probs_from_logits(logits_BV, token_B)
        automaton, boundary_B = advance(table, state.automaton, token_B)
        stopped_B = table.is_stop_V[token_B]
        complete_B = stopped_B | (boundary_B & ~until_stop_B)
        ended_B = complete_B | (t + 1 >= limit_B)
        steps = Steps(
            tokens_BT=steps.tokens_BT.at[:, t].set(token_B),
            length_B=steps.length_B + live_B,
            log_prob_B=steps.log_prob_B + jnp.where(live_B, log_prob_B, 0.0),
            stopped_B=steps.stopped_B | (live_B & stopped_B),
            complete_B=steps.complete_B | (live_B & complete_B),
        )
        return _Decoding(t + 1, token_B, state.suffix, automaton, steps, state.done_B | ended_B)

    def decode(state: _Decoding) -> _Decoding:
        """Extends the cache by the last token and samples the next one."""
        last = state.t - 1
        live_B1, position_B1 = ~state.done_B[:, None], (first_position_B + last)[:, None]
        cached = (shared, state.suffix, first_slot + last)
        hidden_B1D, suffix = model.extend(state.token_B[:, None], live_B1, position_B1, *cached)
        return sample(model.logits(hidden_B1D[:, 0]), state._replace(suffix=suffix))

    def is_unfinished(state: _Decoding) -> Array:
        return ~state.done_B.all() & (state.t < max_tokens)

    # 2. Sample the first token from the logits after the path. 3. Sample the others in a loop.
    zeros_B = jnp.zeros(B, jnp.int32)
    none_B = jnp.zeros(B, bool)
    empty = Steps(jnp.zeros((B, max_tokens), jnp.int32), zeros_B, jnp.zeros(B), none_B, none_B)
    automaton = jax.tree.map(to_rows, advance_path(table, path_PS[:, 1:], path_length_P - 1, turn_start_P))
    state = _Decoding(jnp.int32(0), zeros_B, suffix, automaton, empty, limit_B <= 0)
    state = sample(first_logits_BV, state)
    return jax.lax.while_loop(is_unfinished, decode, state).steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateRecipe:
    """Limits on a model's responses."""

    max_tokens: int = 512
    """Longest response, in tokens."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"generate.max_tokens must be positive, got {self.max_tokens}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateRuntime:
    """Settings of generation for one command."""

    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    tokens_per_batch: int = 16384
    """Prompt tokens per batch, including padding. Smaller batches need less memory."""
    phase: str | None = None
    """Phase of the run in --run_dir whose weights to use, for example warmup or iteration_2, or last. None: the base
    model."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"generate.temperature must not be negative, got {self.temperature}")
        if self.tokens_per_batch < 1:
            raise ValueError(f"generate.tokens_per_batch must be positive, got {self.tokens_per_batch}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateSettings(GenerateRuntime, GenerateRecipe):
    """Sampling of whole responses."""

    def __post_init__(self) -> None:
        GenerateRecipe.__post_init__(self)
        GenerateRuntime.__post_init__(self)


def stable_hash(text: str) -> int:
    """Hashes a text to a number to fold into a random key; the same in every process."""
    return zlib.crc32(text.encode())


@jax.jit
def row_keys(key: Array, *folds_B: Array) -> Array:
    """Derives a key for each row by folding the row's numbers into `key`, one after the other."""

    def fold(*numbers: Array) -> Array:
        return functools.reduce(jax.random.fold_in, numbers, key)

    return jax.vmap(fold)(*folds_B)


def generate(
    policy: Policy,
    table: StepTable,
    prompts: Sequence[tuple[str, Sequence[int]]],
    settings: GenerateSettings,
    max_length: int,
    seed: int,
) -> Iterator[list[tuple[int, list[int]]]]:
    """Generates whole responses to prompts, a batch at a time, narrowest prompts first.

    A response depends only on the seed, the prompt and its id, never on the rest of the batch. Omitting the prompts of
    finished batches does not change the remaining batches.

    Args:
        policy: the model.
        table: step boundaries and stop tokens.
        prompts: (id, token ids) of each prompt.
        settings: temperature, length and batch size.
        max_length: tokens in the model's context, which prompt and response share.
        seed: seed of the sampling.

    Yields:
        after each batch, (index into `prompts`, token ids including the stop token) of its responses.
    """
    widths = [bucket(len(ids) - 1) for _, ids in prompts]
    for indices, width, count in group(widths, settings.tokens_per_batch, row_devices(running=True)):
        chosen = [prompts[i] for i in indices]
        responses = _generate_batch(policy, table, chosen, width, count, settings, max_length, seed)
        yield list(zip(indices, responses, strict=True))


def _generate_batch(
    policy: Policy,
    table: StepTable,
    prompts: Sequence[tuple[str, Sequence[int]]],
    width: int,
    count: int,
    settings: GenerateSettings,
    max_length: int,
    seed: int,
) -> list[list[int]]:
    """Generates responses to at most `count` prompts, padded to `width`; filler rows have limit 0."""
    n_missing = count - len(prompts)
    padded = [*prompts, *[prompts[0]] * n_missing]
    limits = [min(settings.max_tokens, max_length - len(ids)) for _, ids in prompts] + [0] * n_missing
    names_B = np.array([stable_hash(name) for name, _ in padded], np.uint32)
    # The path is the prompt's last token; its prefill gives the first logits.
    prefix = prefill(*policy, *pad([ids[:-1] for _, ids in padded], width))
    path_PS, path_length_P = pad([ids[-1:] for _, ids in padded], 1)
    steps = sample_step(
        policy.graph,
        settings.max_tokens,
        policy.params,
        table,
        prefix,
        path_PS,
        path_length_P,
        row_keys(jax.random.key(seed), names_B),
        np.array(limits, np.int32),
        np.ones(count, bool),
        np.float32(settings.temperature),
    )
    tokens_BT, length_B = to_host((steps.tokens_BT, steps.length_B))
    return [tokens_BT[row, : length_B[row]].tolist() for row in range(len(prompts))]


def target_log_probs(
    policy: Policy, rows: Sequence[tuple[Sequence[int], Sequence[int]]], tokens_per_batch: int
) -> Iterator[list[tuple[int, float]]]:
    """Scores the target of each (prompt ids, target ids), a batch at a time, narrowest rows first.

    Omitting the rows of finished batches does not change the remaining batches.

    Yields:
        after each batch, (index into `rows`, sum of log π over the target in nats) of its rows.
    """
    widths = [target_width(len(prompt), len(target)) for prompt, target in rows]
    for indices, width, count in group(widths, tokens_per_batch, row_devices(running=True)):
        batch = collate([rows[i] for i in indices], width, count)
        sums = to_host(score(*policy, batch)).tolist()
        yield list(zip(indices, sums[: len(indices)], strict=True))
