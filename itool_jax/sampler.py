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
from itool_jax.hosts import to_host
from itool_jax.journal import Keep, keep_nothing
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
    hidden_BRD, _ = model(batch.tokens_BT, at_BR=batch.positions_BR)
    log_probs_BR = losses.token_log_probs(hidden_BRD, model.unembedding(), batch.targets_BR)
    return losses.masked_log_prob_sum(log_probs_BR, batch.mask_BR)


class _Read(NamedTuple):
    """What rows leave behind that were fed tokens of their own: the cache, its end, and hidden states."""

    suffix: Suffix
    hidden_BRD: Array
    end_B: Array
    """The position after the last token."""


def _read(
    model: Transformer,
    shared: Sequence[Prefix],
    own_BT: Array,
    length_B: Array,
    at_BR: Array | None = None,
    spare: int = 0,
) -> _Read:
    """Feeds right-padded rows of at least one token behind what they share.

    The hidden states are those of the last token, or of the places `at_BR`; `spare` slots of the cache stay free.
    """
    B, T = own_BT.shape
    start_B = sum((jnp.repeat(part.length_P, B // len(part.length_P)) for part in shared), jnp.zeros(B, jnp.int32))
    place_T = jnp.arange(T)
    suffix = empty_suffix(shared[0], B, T + spare)
    valid_BT, position_BT = place_T < length_B[:, None], start_B[:, None] + place_T
    at_BR = length_B[:, None] - 1 if at_BR is None else at_BR
    hidden_BRD, suffix = model.extend(own_BT, valid_BT, position_BT, shared, suffix, 0, at_BR)
    return _Read(suffix, hidden_BRD, start_B + length_B)


@functools.partial(jax.jit, static_argnums=0)
def answer(
    graph: nnx.GraphDef,
    params: Params,
    prefix: Prefix,
    path_PS: Array,
    path_length_P: Array,
    own_BT: Array,
    own_length_B: Array,
    answer_ids_A: Array,
) -> Array:
    """Logits [B, A] of the answer tokens that may follow each row: one forward pass for all rows.

    A row is a prompt, a path that the rows of a prompt share, and tokens of its own; the first two are computed once.
    """
    model = nnx.merge(graph, params)
    path = _read(model, [prefix], path_PS, path_length_P)
    own = _read(model, [prefix, _shared(path, path_length_P)], own_BT, own_length_B)
    return model.logits(own.hidden_BRD[:, 0])[:, answer_ids_A]


def _shared(read: _Read, length_B: Array) -> Prefix:
    return Prefix(read.suffix.k, read.suffix.v, length_B)


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
    """Sum of log π of the step [P] that follows each prompt and path; paths and steps are right-padded."""
    model = nnx.merge(graph, params)
    P, T = step_PT.shape
    row_PS = jnp.pad(path_PS, [(0, 0), (0, T)])
    place_PT = path_length_P[:, None] + jnp.arange(T)
    row_PS = row_PS.at[jnp.arange(P)[:, None], place_PT].set(step_PT)
    before = _read(model, [prefix], row_PS, path_length_P + step_length_P, place_PT - 1)
    log_probs_PT = losses.token_log_probs(before.hidden_BRD, model.unembedding(), step_PT)
    return losses.masked_log_prob_sum(log_probs_PT, jnp.arange(T) < step_length_P[:, None])


def choose(logits_BV: Array, keys_B: Array, t: Array, temperature: Array) -> Array:
    """A token a row by inverse transform: one uniform number a row and token; temperature 0: the best."""

    def sampled() -> Array:
        uniform_B = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, t)))(keys_B)
        shifted = (logits_BV - logits_BV.max(axis=-1, keepdims=True)) / temperature
        mass_BV = jnp.cumsum(jnp.exp(shifted), axis=-1)
        return jnp.argmax(mass_BV > uniform_B[:, None] * mass_BV[:, -1:], axis=-1)

    best = functools.partial(jnp.argmax, logits_BV, axis=-1)
    return jax.lax.cond(temperature > 0, sampled, best).astype(jnp.int32)


class _Rows(NamedTuple):
    """What stays as it is while a step is sampled."""

    keys_B: Array
    limit_B: Array
    whole_B: Array
    temperature: Array


class _Loop(NamedTuple):
    t: Array
    suffix: Suffix
    steps: Steps
    automaton: StepState
    done_B: Array


def _take(table: StepTable, rows: _Rows, logits_BV: Array, loop: _Loop) -> _Loop:
    """Token t of every live row, given the logits before it."""
    t, live_B = loop.t, ~loop.done_B
    token_B = choose(logits_BV, rows.keys_B, t, rows.temperature)
    log_prob_B = losses.token_log_probs_from_logits(logits_BV, token_B)
    automaton, boundary_B = advance(table, loop.automaton, token_B)
    stopped_B = table.is_stop_V[token_B]
    ended_B = stopped_B | (boundary_B & ~rows.whole_B) | (t + 1 >= rows.limit_B)
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
    path_PS: Int[Array, "P S"],
    path_length_P: Int[Array, " P"],
    keys_B: Array,
    limit_B: Int[Array, " B"],
    whole_B: Bool[Array, " B"],
    temperature: Float[Array, ""],
) -> Steps:
    """Samples one step for every row, in one compiled loop that ends when the last row does.

    Args:
        graph: the model's graph.
        params: its weights.
        max_tokens: room for a step.
        table: step boundaries and stop tokens.
        prefix: P prompts without their last token; B = P · R rows continue them, R to a prompt.
        path_PS: right-padded; the prompt's last token, then the response so far, the same for all R rows.
        path_length_P: tokens of each path, the prompt's last one included.
        keys_B: one random key a row; token t uses the key with t folded in.
        limit_B: tokens a row may take, at most `max_tokens`; a row with limit 0 takes none.
        whole_B: rows whose step is the whole remainder, up to a stop token.
        temperature: of the sampling; log-probabilities are those at temperature 1. 0 is greedy.
    """
    model, rows = nnx.merge(graph, params), _Rows(keys_B, limit_B, whole_B, temperature)
    (P, S), B = path_PS.shape, len(limit_B)
    # The path of a group of rows is a part that they share; that of a single row opens the row's own cache.
    path = _read(model, [prefix], path_PS, path_length_P, spare=max_tokens if P == B else 0)
    shared = [prefix] if P == B else [prefix, _shared(path, path_length_P)]
    suffix, first_slot = (path.suffix, S) if P == B else (empty_suffix(prefix, B, max_tokens), 0)
    end_B = jnp.repeat(path.end_B, B // P)

    def body(loop: _Loop) -> _Loop:
        # The last token is written and read, then the next one taken.
        last = loop.t - 1
        token_B1 = jax.lax.dynamic_slice_in_dim(loop.steps.tokens_BT, last, 1, axis=1)
        place_B1, slot = (end_B + last)[:, None], first_slot + last
        hidden_B1D, suffix = model.extend(token_B1, ~loop.done_B[:, None], place_B1, shared, loop.suffix, slot)
        return _take(table, rows, model.logits(hidden_B1D[:, 0]), loop._replace(suffix=suffix))

    empty = Steps(jnp.zeros((B, max_tokens), jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros(B), jnp.zeros(B, bool))
    of_rows = functools.partial(jnp.repeat, repeats=B // P, axis=0)
    automaton = jax.tree.map(of_rows, advance_path(table, path_PS[:, 1:], path_length_P - 1))
    start = _Loop(jnp.int32(0), suffix, empty, automaton, limit_B <= 0)
    first = _take(table, rows, of_rows(model.logits(path.hidden_BRD[:, 0])), start)
    return jax.lax.while_loop(lambda loop: ~loop.done_B.all() & (loop.t < max_tokens), body, first).steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateRecipe:
    """Which responses of a model count."""

    max_tokens: int = 512
    """Longest response, in tokens."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"generate.max_tokens must be positive, got {self.max_tokens}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateRuntime:
    """How the responses of one command are sampled."""

    temperature: float = 0.0
    """Sampling temperature; 0 is greedy."""
    tokens_per_batch: int = 16384
    """Prompt tokens in a batch, padding included; smaller needs less memory."""
    phase: str | None = None
    """Phase of the run in --run_dir whose weights answer, such as warmup or iteration_2, or last; else the model as it
    is."""

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
    keep: Keep = keep_nothing,
) -> list[list[int]]:
    """Whole responses to (id, prompt ids), stop token included; `advance(n)` is told of every n finished.

    A response ends where prompt and response fill the context of `max_length` tokens.
    Depends on the seed, a prompt's id and the prompt, never on what else is in the batch.
    """
    found: list[list[int]] = [[] for _ in prompts]
    widths = [bucket(len(ids) - 1) for _, ids in prompts]
    for number, (chosen, width, count) in enumerate(group(widths, settings.tokens_per_batch)):
        batch = functools.partial(_respond, policy, table, [prompts[i] for i in chosen], width, count)
        rows = keep(f"responses {number}", functools.partial(batch, settings, max_length, seed))
        for row, i in zip(rows, chosen, strict=True):
            found[i] = row
        advance(len(chosen))
    return found


def _respond(
    policy: Policy,
    table: StepTable,
    prompts: Sequence[tuple[str, Sequence[int]]],
    width: int,
    count: int,
    settings: GenerateSettings,
    max_length: int,
    seed: int,
) -> list[list[int]]:
    """The responses to one batch of at most `count` prompts, padded to `width`."""
    padded = [*prompts, *[prompts[0]] * (count - len(prompts))]
    prefix = prefill(*policy, *pad([ids[:-1] for _, ids in padded], width))
    path_PS, length_P = pad([ids[-1:] for _, ids in padded], 1)
    limits = [min(settings.max_tokens, max_length - len(ids)) for _, ids in prompts]
    limits += [0] * (count - len(prompts))
    steps = sample_step(
        policy.graph,
        settings.max_tokens,
        policy.params,
        table,
        prefix,
        path_PS,
        length_P,
        row_keys(jax.random.key(seed), np.array([text_key(name) for name, _ in padded], np.uint32)),
        np.array(limits, np.int32),
        np.ones(count, bool),
        np.float32(settings.temperature),
    )
    tokens_BT, lengths_B = to_host((steps.tokens_BT, steps.length_B))
    return [tokens_BT[row, : lengths_B[row]].tolist() for row in range(len(prompts))]


def target_log_probs(
    policy: Policy,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    tokens_per_batch: int,
    advance: Callable[..., None] = lambda *_: None,
    keep: Keep = keep_nothing,
) -> list[float]:
    """Sum of log π over the target of each (prompt ids, target ids)."""
    found = [0.0] * len(rows)
    widths = [target_width(len(prompt), len(target)) for prompt, target in rows]
    for number, (chosen, width, count) in enumerate(group(widths, tokens_per_batch)):
        batch = functools.partial(collate, [rows[i] for i in chosen], width, count)
        sums = keep(f"log-probs {number}", lambda batch=batch: to_host(score(*policy, batch())).tolist())
        for i, total in zip(chosen, sums, strict=False):
            found[i] = total
        advance(len(chosen))
    return found
