"""Compiled generation and scoring over a key-value cache that all rows of a prompt share.

In: a `Policy` and token ids. Out: sampled steps with their log-probabilities, log-probabilities of given targets, and
answers to one-letter questions. Prompts are computed once (`prefill`); rows that continue them keep only their own
tokens. Shapes are bucketed, so that a data set of any lengths compiles a handful of programs.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from itool_jax import losses
from itool_jax.model.cache import Prefix, Suffix, empty_suffix
from itool_jax.model.transformer import Params
from itool_jax.text.steps import StepTable, advance, advance_path

SMALLEST_BUCKET = 128


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


def bucket(length: int) -> int:
    """The padded length: the next power of two, `SMALLEST_BUCKET` at least."""
    return max(SMALLEST_BUCKET, 1 << max(0, length - 1).bit_length())


def pad(rows: Sequence[Sequence[int]], width: int, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded int32 tokens [count or len(rows), width] and the rows' lengths; missing rows are empty."""
    tokens = np.zeros((count or len(rows), width), np.int32)
    lengths = np.zeros(len(tokens), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths


def batches(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[tuple[list[int], int, int]]:
    """Groups rows of similar length: (indices, padded width, padded row count), shortest first.

    The row count depends on the width alone, so each width compiles once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (bucket(lengths[i]), i))
    while order:
        width = bucket(lengths[order[0]])
        rows = max(1, tokens_per_batch // width)
        chosen = [i for i in order[:rows] if bucket(lengths[i]) == width]
        order = order[len(chosen) :]
        yield chosen, width, rows


@functools.partial(jax.jit, static_argnums=0)
def prefill(graph: nnx.GraphDef, params: Params, tokens_PT: Array, length_P: Array) -> Prefix:
    """Keys and values of P right-padded prompts."""
    return nnx.merge(graph, params)(tokens_PT, length_P)[1]


@functools.partial(jax.jit, static_argnums=0)
def score(graph: nnx.GraphDef, params: Params, tokens_BT: Array, start_B: Array, length_B: Array) -> Array:
    """Sum of log π over tokens start..length of each right-padded row, given all before them [B]."""
    model = nnx.merge(graph, params)
    hidden, _ = model(tokens_BT[:, :-1])
    log_probs_BT = losses.token_log_probs(hidden, model.unembedding(), tokens_BT[:, 1:])
    position = jnp.arange(1, tokens_BT.shape[1])[None]
    counted = (position >= start_B[:, None]) & (position < length_B[:, None])
    return jnp.where(counted, log_probs_BT, 0.0).sum(axis=1)


def _right_aligned(path_BS: Array, length_B: Array) -> tuple[Array, Array, Array]:
    """Rows moved to the right end, which slots hold a token, and each slot's place in its row."""
    S = path_BS.shape[1]
    place_BS = jnp.arange(S)[None] - (S - length_B)[:, None]
    tokens = jnp.take_along_axis(path_BS, jnp.maximum(place_BS, 0), axis=1)
    return tokens, place_BS >= 0, place_BS


def _read_path(model, prefix: Prefix, path_BS: Array, length_B: Array, slots: int) -> tuple[Array, Suffix, Array]:
    """Feeds every row's own tokens; returns the last hidden state, the cache and the next position."""
    B, rows = len(length_B), len(length_B) // len(prefix.length_P)
    prompt_B = jnp.repeat(prefix.length_P, rows)
    tokens, valid, place = _right_aligned(path_BS, length_B)
    suffix = empty_suffix(prefix, B, slots)
    hidden, suffix = model.extend(tokens, valid, prompt_B[:, None] + jnp.maximum(place, 0), prefix, suffix, 0)
    return hidden[:, -1], suffix, prompt_B + length_B


@functools.partial(jax.jit, static_argnums=0)
def answer(graph, params, prefix: Prefix, path_BS: Array, length_B: Array, answer_ids_A: Array) -> Array:
    """Logits [B, A] of the answer tokens that may follow each row's path: one forward pass for all rows."""
    model = nnx.merge(graph, params)
    hidden, _, _ = _read_path(model, prefix, path_BS, length_B, path_BS.shape[1])
    return model.logits(hidden)[:, answer_ids_A]


def _choose(logits_BV: Array, keys_B: Array, t: Array, temperature: Array) -> Array:
    """A token a row by inverse transform: one uniform number a row and token; temperature 0 takes the best."""
    uniform_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(keys_B)
    shifted = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / jnp.maximum(temperature, 1e-6)
    mass_BV = jnp.cumsum(jnp.exp(shifted), axis=-1)
    sampled = jnp.argmax(mass_BV > uniform_B[:, None] * mass_BV[:, -1:], axis=-1)
    return jnp.where(temperature > 0, sampled, jnp.argmax(logits_BV, axis=-1)).astype(jnp.int32)


class _Loop(NamedTuple):
    t: Array
    hidden_BD: Array
    suffix: Suffix
    steps: Steps
    automaton: tuple
    done_B: Array


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
        graph: the model's graph, with `params` its weights.
        max_tokens: room for a step.
        table: step boundaries and stop tokens.
        prefix: P prompts without their last token; B = P · R rows continue them, R to a prompt.
        path_BS: right-padded; the prompt's last token, then the response so far.
        keys_B: one random key a row; token t uses the key with t folded in.
        limit_B: tokens a row may take, at most `max_tokens`.
        whole_B: rows whose step is the whole remainder, up to a stop token.
        forced_BT: rows with `forced_length` > 0 take these tokens instead, and are only scored.
        temperature: of the sampling; log-probabilities are those at temperature 1. 0 is greedy.
    """
    model = nnx.merge(graph, params)
    B, S = path_BS.shape
    hidden_BD, suffix, position_B = _read_path(model, prefix, path_BS, path_length_B, S + max_tokens)

    def take(t, hidden_BD, steps: Steps, automaton, done_B) -> tuple[Steps, tuple, Array]:
        logits_BV = model.logits(hidden_BD)
        is_forced = forced_length_B > 0
        token_B = jnp.where(is_forced, forced_BT[:, t], _choose(logits_BV, keys_B, t, temperature))
        chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
        log_prob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
        automaton, step_ended_B = advance(table, automaton, token_B)
        stopped_B = table.is_stop_V[token_B]
        ended_B = stopped_B | (step_ended_B & ~whole_B) | (t + 1 >= limit_B)
        ended_B = jnp.where(is_forced, t + 1 >= forced_length_B, ended_B)
        live_B = ~done_B
        steps = Steps(
            steps.tokens_BT.at[:, t].set(jnp.where(live_B, token_B, 0)),
            steps.length_B + live_B,
            steps.log_prob_B + jnp.where(live_B, log_prob_B, 0.0),
            steps.stopped_B | (live_B & stopped_B),
        )
        return steps, automaton, done_B | ended_B

    def body(loop: _Loop) -> _Loop:
        # The last token is written and read, then the next one taken.
        token_B1 = jax.lax.dynamic_slice_in_dim(loop.steps.tokens_BT, loop.t - 1, 1, axis=1)
        position_B1 = (position_B + loop.t - 1)[:, None]
        hidden_B1D, suffix = model.extend(
            token_B1, ~loop.done_B[:, None], position_B1, prefix, loop.suffix, S + loop.t - 1
        )
        steps, automaton, done_B = take(loop.t, hidden_B1D[:, 0], loop.steps, loop.automaton, loop.done_B)
        return _Loop(loop.t + 1, hidden_B1D[:, 0], suffix, steps, automaton, done_B)

    empty = Steps(
        jnp.zeros((B, max_tokens), jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros(B), jnp.zeros(B, bool)
    )
    automaton = advance_path(table, path_BS[:, 1:], path_length_B - 1)
    steps, automaton, done_B = take(0, hidden_BD, empty, automaton, limit_B <= 0)
    start = _Loop(jnp.int32(1), hidden_BD, suffix, steps, automaton, done_B)
    return jax.lax.while_loop(lambda loop: ~loop.done_B.all() & (loop.t < max_tokens), body, start).steps
