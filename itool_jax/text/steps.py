"""Finds where a search step ends, from token ids alone.

In: a tokenizer, read once into a table with one row per token id. Out: pure functions that follow a response through
the table in constant time per token, inside a compiled decode loop (`advance`) or on the host (`split_steps`). No id is
ever decoded and re-tokenised, so tokens that straddle a boundary, such as `),` or `)]`, stay whole.

A response that begins as the tool format's calls do, such as with `[`, is a list of calls: brackets outside strings are
counted, and a step is a call (or an argument, or the whole list). Any other response is text, and a step is a sentence;
calls in tags may follow. An end-of-turn token ends any step.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from itool_jax.text.tool_formats import BRACKETS, TAG, Form
from itool_jax.types import AnyArray, LengthsB, TokensBT

Granularity = Literal["call", "argument", "sentence"]

# States of the automaton. START: only spaces so far. GAP and TEXT: in a text answer, without and with a word since the
# last step. LIST: in a list of calls, outside strings. The others: inside a string, named after its quote.
START, GAP, TEXT, LIST, SINGLE, DOUBLE, SINGLE_ESCAPED, DOUBLE_ESCAPED = range(8)
N_STATES = 8
_QUOTES = {"'": SINGLE, '"': DOUBLE}
_ESCAPES = {SINGLE: SINGLE_ESCAPED, DOUBLE: DOUBLE_ESCAPED}
_UNESCAPES = {SINGLE_ESCAPED: SINGLE, DOUBLE_ESCAPED: DOUBLE}
# Tags count as brackets: `<tool_call>` opens one level and `</tool_call>` closes it with its last character, in any
# tokens. A token with all of `<tool_call>` is written as one sign, which also ends a text.
_TAG_SIGN, _TAG_DEPTHS = "\1", {"<": 2, ">": -1, "/": -2, "\1": 1}
# Bit i of a token's comma mask: a comma i - 15 levels above the depth before the token. 31 bits fit a positive int32.
_COMMA_BITS, _COMMA_OFFSET = 31, 15
_SENTENCE_ENDS = (".", "!", "?", "\n")

CellsVQ = Int[AnyArray, "V Q"]
FlagsV = Bool[AnyArray, " V"]
IntAny = Int[AnyArray, "..."]
BoolAny = Bool[AnyArray, "..."]


class StepTable(NamedTuple):
    """One row per token id (V), one column per automaton state (Q); a pytree of arrays.

    `depth_change_VQ` is the net change of bracket depth. `highest_VQ` is the greatest depth within the token, relative
    to the depth before it (never negative). `commas_VQ` is a bit mask of the relative depths of commas (zero unless
    steps are arguments). `level` is the depth that a list step returns to when it ends, `comma_level` the depth of the
    commas between arguments.
    """

    next_state_VQ: CellsVQ
    depth_change_VQ: CellsVQ
    highest_VQ: CellsVQ
    commas_VQ: CellsVQ
    ends_sentence_V: FlagsV
    is_stop_V: FlagsV
    level: IntAny
    comma_level: IntAny


class StepState(NamedTuple):
    """The state of a response: automaton state (int8) and bracket depth (int32), both of any one batch shape."""

    automaton: IntAny
    depth: IntAny


def build_step_table(
    tokenizer: Any, granularity: Granularity, vocab_size: int, stop_ids: Sequence[int], form: Form = BRACKETS
) -> StepTable:
    """Reads the vocabulary into a table with the model's `vocab_size` rows (1.6 s for 150,000).

    Special tokens and padding ids beyond the tokenizer's change nothing. `stop_ids` are the end-of-turn tokens. Commas
    more than 15 levels away from the depth at which their token begins are ignored. `form` is how answers write calls.

    Raises:
        ValueError: a stop id is outside the vocabulary.
    """
    if max(stop_ids) >= vocab_size:
        raise ValueError(f"end-of-turn token {max(stop_ids)} is outside the model's vocabulary of {vocab_size}")
    texts = _token_texts(tokenizer, vocab_size)
    signatures = [_signature(text, form.opening) for text in texts]
    index = {signature: i for i, signature in enumerate(dict.fromkeys(signatures))}
    # U distinct signatures (1,615 in a vocabulary of 150,000), F the four fields of a scan.
    states = range(N_STATES)
    rows_UQF = np.array([[_scan(signature, state, form.opening) for state in states] for signature in index], np.int32)
    rows_VQF = rows_UQF[np.array([index[signature] for signature in signatures])]
    is_stop_V = np.zeros(vocab_size, bool)
    is_stop_V[list(stop_ids)] = True
    return StepTable(
        next_state_VQ=jnp.asarray(rows_VQF[..., 0], jnp.int8),
        depth_change_VQ=jnp.asarray(rows_VQF[..., 1], jnp.int16),
        highest_VQ=jnp.asarray(rows_VQF[..., 2], jnp.int16),
        commas_VQ=jnp.asarray(rows_VQF[..., 3] * (granularity == "argument")),
        ends_sentence_V=jnp.asarray(np.array([text.rstrip(" \"'”’").endswith(_SENTENCE_ENDS) for text in texts])),
        is_stop_V=jnp.asarray(is_stop_V),
        level=jnp.array(form.call_depth - (granularity == "sentence"), jnp.int32),
        comma_level=jnp.array(form.argument_depth, jnp.int32),
    )


def initial_state(shape: tuple[int, ...] = ()) -> StepState:
    """Returns the state before a response's first token, for a batch of the given shape."""
    return StepState(jnp.full(shape, START, jnp.int8), jnp.zeros(shape, jnp.int32))


def advance(table: StepTable, state: StepState, token: IntAny) -> tuple[StepState, BoolAny]:
    """Returns the state after one more token and whether the step ends with it; `token` has `state`'s batch shape.

    A call ends at the first token after which the depth is back at list level or below, having been above it. If an
    earlier token of the step had gone above without ending the step, the depth would still be above. So the depths
    within this token decide, and nothing has to be reset when a step begins.
    """
    cell = (token, state.automaton)
    automaton = table.next_state_VQ[cell]
    depth = state.depth + table.depth_change_VQ[cell]
    closed = (depth <= table.level) & (state.depth + table.highest_VQ[cell] > table.level)
    bit = table.comma_level - state.depth + _COMMA_OFFSET
    in_mask = (bit >= 0) & (bit < _COMMA_BITS)
    comma = in_mask & ((table.commas_VQ[cell] >> (bit * in_mask) & 1) == 1)
    sentence = (automaton == TEXT) & table.ends_sentence_V[token]
    # A finished sentence resets TEXT to GAP, so that the blank lines after it do not make a step.
    automaton = (automaton - (TEXT - GAP) * sentence).astype(jnp.int8)
    return StepState(automaton, depth), closed | comma | sentence | table.is_stop_V[token]


def advance_path(table: StepTable, tokens_BT: TokensBT, length_B: LengthsB, start_B: LengthsB | int = 0) -> StepState:
    """Returns the state after each response's first `length_B` tokens; its current turn begins at `start_B`."""

    def follow(state: StepState, t_and_token: tuple[IntAny, IntAny]) -> tuple[StepState, None]:
        t, token_B = t_and_token
        after, _ = advance(table, state, token_B)
        inside_B = (t >= start_B) & (t < length_B)
        return jax.tree.map(lambda new, old: jnp.where(inside_B, new, old), after, state), None

    state = initial_state(tokens_BT.shape[:-1])
    times = jnp.arange(tokens_BT.shape[-1])
    return jax.lax.scan(follow, state, (times, jnp.moveaxis(tokens_BT, -1, 0)))[0]


def split_steps(table: StepTable, token_ids: Sequence[int]) -> list[list[int]]:
    """Splits a response into its non-empty steps, on the host; joined, they give the response again."""
    # numpy, because jax would recompile for every length of a response.
    host, state = jax.tree.map(np.asarray, (table, initial_state((1,))))
    steps: list[list[int]] = [[]]
    for token in token_ids:
        state, ended = advance(host, state, np.array([token]))
        steps[-1].append(token)
        if ended.item():
            steps.append([])
    return [step for step in steps if step]


def _token_texts(tokenizer: Any, vocab_size: int) -> list[str]:
    """Decodes each token alone; "" for special tokens and for ids that the tokenizer does not have."""
    n = min(len(tokenizer), vocab_size)
    texts = tokenizer.batch_decode(
        [[i] for i in range(n)], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return texts + [""] * (vocab_size - n)


def _signature(text: str, opening: str) -> str:
    """Reduces a token's text to what matters: a word becomes `a`, white space " ", a run of other signs `.`."""
    kept = ""
    if opening == "<":
        text, kept = text.replace(TAG, _TAG_SIGN), "".join(_TAG_DEPTHS)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"[^\W_]+", "a", text)
    return re.sub(rf"[^a \[\](){{}},'\"\\{kept}]+", ".", text)


def _scan(signature: str, state: int, opening: str) -> tuple[int, int, int, int]:
    """Computes next state, depth change, highest relative depth and comma mask of a token met in `state`."""
    depth = highest = commas = 0
    for char in signature:
        if (state == START and char == opening) or (state <= LIST and char == _TAG_SIGN):
            state = LIST
        if state == LIST:
            depth += (char in "[({") - (char in "])}") + _TAG_DEPTHS.get(char, 0)
            highest = max(highest, depth)
            if char == "," and 0 <= depth + _COMMA_OFFSET < _COMMA_BITS:
                commas |= 1 << (depth + _COMMA_OFFSET)
        state = _next_state(state, char)
    return state, depth, highest, commas


def _next_state(state: int, char: str) -> int:
    if state == START:
        return START if char == " " else TEXT if char == "a" else GAP
    if state == GAP:
        return TEXT if char == "a" else GAP
    if state == LIST:
        return _QUOTES.get(char, LIST)
    if state in _UNESCAPES:
        return _UNESCAPES[state]
    if char == "\\":
        return _ESCAPES.get(state, state)
    return LIST if _QUOTES.get(char) == state else state
