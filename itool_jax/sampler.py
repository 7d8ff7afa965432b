"""Compiled generation and scoring over a key-value cache that all rows of a prompt share.

In: a `Policy` and token ids. Out: sampled steps with their log-probabilities, log-probabilities of given
targets, and answers to one-letter questions. Prompts are computed once (`prefill`); rows that continue them
keep only their own tokens. Shapes are bucketed, so that a data set of any lengths compiles a handful of
programs.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from itool_jax import losses
from itool_jax.model.cache import Prefix, Suffix, empty_suffix
from itool_jax.model.transformer import Params, Transformer
from itool_jax.text.padding import TargetBatch, bucket, collate, group, pad, target_width
from itool_jax.text.steps import StepState, StepTable, advance, advance_path
from itool_jax.types import FloatB


class Policy(NamedTuple):
    """A model ready to run: the module's graph and its weights."""

    graph: nnx.GraphDef
    params: Params


class Steps(NamedTuple):
    """One sampled step a row; `tokens` are padded with 0 behind `length`."""

    tokens_BT: Int[Array, "B T"]
    length_B: Int[Array, " B"]
    log_prob_B: Float[Array, " B"]
    """Sum of the tokens' log-probabilities at temperature 1."""
    stopped_B: Bool[Array, " B"]
    """Whether the step ends the response with a stop token."""


@functools.partial(jax.jit, static_argnums=0)
def prefill(graph: nnx.GraphDef, params: Params, tokens_PT: Array, length_P: Array) -> Prefix:
    """Keys and values of P right-padded prompts."""
    return nnx.merge(graph, params)(tokens_PT, length_P)[1]


@functools.partial(jax.jit, static_argnums=0)
def score(graph: nnx.GraphDef, params: Params, batch: TargetBatch) -> FloatB:
    """Sum of log π over each row's target tokens, given all before them [B]."""
    model = nnx.merge(graph, params)
    hidden_BRD = model.hidden_at(batch.tokens_BT, batch.positions_BR)
    log_probs_BR = losses.token_log_probs(hidden_BRD, model.unembedding(), batch.targets_BR)
    return losses.masked_log_prob_sum(log_probs_BR, batch.mask_BR)


def _right_aligned(path_BS: Array, length_B: Array) -> tuple[Array, Array, Array]:
    """Rows moved to the right end, which slots hold a token, and each slot's place in its row."""
    S = path_BS.shape[1]
    place_BS = jnp.arange(S)[None] - (S - length_B)[:, None]
    tokens = jnp.take_along_axis(path_BS, jnp.maximum(place_BS, 0), axis=1)
    return tokens, place_BS >= 0, place_BS


def _read_path(
    model: Transformer, prefix: Prefix, path_BS: Array, length_B: Array, slots: int
) -> tuple[Array, Suffix, Array]:
    """Feeds every row's own tokens; returns the last hidden state, the cache and the next position."""
    B, rows = len(length_B), len(length_B) // len(prefix.length_P)
    prompt_B = jnp.repeat(prefix.length_P, rows)
    tokens, valid, place = _right_aligned(path_BS, length_B)
    suffix = empty_suffix(prefix, B, slots)
    hidden, suffix = model.extend(tokens, valid, prompt_B[:, None] + jnp.maximum(place, 0), prefix, suffix, 0)
    return hidden[:, -1], suffix, prompt_B + length_B


@functools.partial(jax.jit, static_argnums=0)
def answer(
    graph: nnx.GraphDef,
    params: Params,
    prefix: Prefix,
    path_BS: Array,
    length_B: Array,
    answer_ids_A: Array,
) -> Array:
    """Logits [B, A] of the answer tokens that may follow each row's path: one forward pass for all rows."""
    model = nnx.merge(graph, params)
    hidden, _, _ = _read_path(model, prefix, path_BS, length_B, path_BS.shape[1])
    return model.logits(hidden)[:, answer_ids_A]


def _choose(logits_BV: Array, keys_B: Array, t: Array, temperature: Array) -> Array:
    """A token a row by inverse transform: one uniform number a row and token; temperature 0: the best."""
    uniform_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(keys_B)
    shifted = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / jnp.maximum(temperature, 1e-6)
    mass_BV = jnp.cumsum(jnp.exp(shifted), axis=-1)
    sampled = jnp.argmax(mass_BV > uniform_B[:, None] * mass_BV[:, -1:], axis=-1)
    return jnp.where(temperature > 0, sampled, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


class _Rows(NamedTuple):
    """What stays as it is while a step is sampled."""

    keys_B: Array
    limit_B: Array
    whole_B: Array
    forced_BT: Array
    forced_length_B: Array
    temperature: Array


class _Loop(NamedTuple):
    t: Array
    suffix: Suffix
    steps: Steps
    automaton: StepState
    done_B: Array


def _take(table: StepTable, rows: _Rows, logits_BV: Array, loop: _Loop) -> _Loop:
    """Token t of every live row, given the logits before it."""
    t, forced_B, live_B = loop.t, rows.forced_length_B > 0, ~loop.done_B
    sampled_B = _choose(logits_BV, rows.keys_B, t, rows.temperature)
    token_B = jnp.where(forced_B, rows.forced_BT[:, t], sampled_B)
    log_prob_B = losses.token_log_probs_from_logits(logits_BV, token_B)
    automaton, boundary_B = advance(table, loop.automaton, token_B)
    stopped_B = table.is_stop_V[token_B]
    ended_B = stopped_B | (boundary_B & ~rows.whole_B) | (t + 1 >= rows.limit_B)
    ended_B = jnp.where(forced_B, t + 1 >= rows.forced_length_B, ended_B)
    steps = Steps(
        loop.steps.tokens_BT.at[:, t].set(jnp.where(live_B, token_B, 0)),
        loop.steps.length_B + live_B,
        loop.steps.log_prob_B + jnp.where(live_B, log_prob_B, 0.0),
        loop.steps.stopped_B | (live_B & stopped_B),
    )
    return _Loop(t + 1, loop.suffix, steps, automaton, loop.done_B | ended_B)


@functools.partial(jax.jit, static_argnums=(0, 1))
def sample_step(
    graph: nnx.GraphDef,
    max_tokens: int,
    params: Params,
    table: StepTable,
    prefix: Prefix,
    path_BS: Int[Array, "B S"],
    path_length_B: Int[Array, " B"],
    keys_B: Array,
    limit_B: Int[Array, " B"],
    whole_B: Bool[Array, " B"],
    forced_BT: Int[Array, "B T"],
    forced_length_B: Int[Array, " B"],
    temperature: Float[Array, ""],
) -> Steps:
    """Samples one step for every row, in one compiled loop that ends when the last row does.

    Args:
        graph: the model's graph.
        params: its weights.
        max_tokens: room for a step.
        table: step boundaries and stop tokens.
        prefix: P prompts without their last token; B = P · R rows continue them, R to a prompt.
        path_BS: right-padded; the prompt's last token, then the response so far.
        path_length_B: tokens of each path, the prompt's last one included.
        keys_B: one random key a row; token t uses the key with t folded in.
        limit_B: tokens a row may take, at most `max_tokens`; a row with limit 0 takes none, forced or not.
        whole_B: rows whose step is the whole remainder, up to a stop token.
        forced_BT: tokens that rows with a forced length take instead, and are only scored on.
        forced_length_B: how many; 0 samples. Limits above 0 and boundaries do not bind such rows.
        temperature: of the sampling; log-probabilities are those at temperature 1. 0 is greedy.
    """
    model = nnx.merge(graph, params)
    B, S = path_BS.shape
    rows = _Rows(keys_B, limit_B, whole_B, forced_BT, forced_length_B, temperature)
    hidden_BD, suffix, position_B = _read_path(model, prefix, path_BS, path_length_B, S + max_tokens)

    def body(loop: _Loop) -> _Loop:
        # The last token is written and read, then the next one taken.
        last = loop.t - 1
        token_B1 = jax.lax.dynamic_slice_in_dim(loop.steps.tokens_BT, last, 1, axis=1)
        place_B1 = (position_B + last)[:, None]
        hidden_B1D, suffix = model.extend(token_B1, ~loop.done_B[:, None], place_B1, prefix, loop.suffix, S + last)
        return _take(table, rows, model.logits(hidden_B1D[:, 0]), loop._replace(suffix=suffix))

    zeros_B = jnp.zeros(B, jnp.int32)
    empty = Steps(jnp.zeros((B, max_tokens), jnp.int32), zeros_B, jnp.zeros(B), jnp.zeros(B, bool))
    automaton = advance_path(table, path_BS[:, 1:], path_length_B - 1)
    start = _Loop(jnp.int32(0), suffix, empty, automaton, limit_B <= 0)
    first = _take(table, rows, model.logits(hidden_BD), start)
    return jax.lax.while_loop(lambda loop: ~loop.done_B.all() & (loop.t < max_tokens), body, first).steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Sampling of whole responses."""

    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    max_tokens: int = 512
    """Longest response, in tokens."""
    tokens_per_batch: int = 16384
    """Prompt tokens in a batch, padding included; smaller needs less memory."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"generate.temperature must not be negative, got {self.temperature}")
        if self.max_tokens < 1:
            raise ValueError(f"generate.max_tokens must be positive, got {self.max_tokens}")
        if self.tokens_per_batch < 1:
            raise ValueError(f"generate.tokens_per_batch must be positive, got {self.tokens_per_batch}")


def text_key(text: str) -> int:
    """A number to fold into a random key, that depends on the text alone."""
    return zlib.crc32(text.encode())


@jax.jit
def row_keys(key: Array, *folds_B: Array) -> Array:
    """One key a row: `key` with each of the row's numbers folded in, in turn."""

    def fold(*numbers: Array) -> Array:
        return functools.reduce(jax.random.fold_in, numbers, key)

    return jax.vmap(fold)(*folds_B)


def respond(
    policy: Policy,
    table: StepTable,
    prompts: Sequence[tuple[str, Sequence[int]]],
    settings: GenerateSettings,
    max_length: int,
    seed: int,
    advance: Callable[..., None] = lambda *_: None,
) -> list[list[int]]:
    """Whole responses to (id, prompt ids), stop token included; `advance(n)` is told of every n finished.

    A response ends where prompt and response fill the context of `max_length` tokens.
    Depends on the seed, a prompt's id and the prompt, never on what else is in the batch.
    """
    found: list[list[int]] = [[] for _ in prompts]
    widths = [bucket(len(ids) - 1) for _, ids in prompts]
    for chosen, width, count in group(widths, settings.tokens_per_batch):
        padded = chosen + chosen[:1] * (count - len(chosen))
        prefix = prefill(*policy, *pad([prompts[i][1][:-1] for i in padded], width))
        path_BS, length_B = pad([prompts[i][1][-1:] for i in padded], 1)
        limits = [min(settings.max_tokens, max_length - len(prompts[i][1])) for i in chosen]
        limits += [0] * (count - len(chosen))
        steps = sample_step(
            policy.graph,
            settings.max_tokens,
            policy.params,
            table,
            prefix,
            path_BS,
            length_B,
            row_keys(jax.random.key(seed), np.array([text_key(prompts[i][0]) for i in padded], np.uint32)),
            np.array(limits, np.int32),
            np.ones(count, bool),
            np.zeros((count, settings.max_tokens), np.int32),
            np.zeros(count, np.int32),
            np.float32(settings.temperature),
        )
        tokens_BT, lengths_B = np.asarray(steps.tokens_BT), np.asarray(steps.length_B)
        for row, i in enumerate(chosen):
            found[i] = tokens_BT[row, : lengths_B[row]].tolist()
        advance(len(chosen))
    return found


def target_log_probs(
    policy: Policy,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    tokens_per_batch: int,
    advance: Callable[..., None] = lambda *_: None,
) -> list[float]:
    """Sum of log π over the target of each (prompt ids, target ids)."""
    found = [0.0] * len(rows)
    widths = [target_width(len(prompt), len(target)) for prompt, target in rows]
    for chosen, width, count in group(widths, tokens_per_batch):
        sums_B = np.asarray(score(*policy, collate([rows[i] for i in chosen], width, count)))
        for row, i in enumerate(chosen):
            found[i] = float(sums_B[row])
        advance(len(chosen))
    return found
