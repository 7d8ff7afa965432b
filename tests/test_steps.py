"""Step boundaries: the table against a slow reader of characters, on made-up and on real vocabularies."""

import base64
import json
import time
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itool_jax.text import steps
from itool_jax.text.chat import load_tokenizer
from itool_jax.text.steps import (
    Granularity,
    StepTable,
    advance,
    advance_path,
    build_step_table,
    initial_state,
    split_steps,
)
from tests.conftest import shared_path
from tests.test_chat import byte_tokenizer

MERGED = [
    "),",
    ")]",
    '")]',
    '")',
    '"),',
    "),b(",
    "a()",
    "[a(",
    ",b",
    "(x",
    "='",
    '\\"',
    "],",
    ". ",
    '."',
    "Hi.",
    "[a(x=1)]",
    "[a(x=1,",
    "\n\n",
    "[]",
    "]]",
]
STOP = "<|end|>"
GRANULARITIES = get_args(Granularity)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer([STOP], MERGED)


@pytest.fixture(scope="module")
def tables(tokenizer) -> dict[str, StepTable]:
    stop = tokenizer.convert_tokens_to_ids(STOP)
    return {g: build_step_table(tokenizer, g, len(tokenizer) + 3, [stop]) for g in GRANULARITIES}


def reference_split(texts: list[str], granularity: Granularity) -> list[int]:
    """Indices of the tokens after which a step ends, read from the whole text so far."""
    ends, begin = [], 0
    for i, text in enumerate(texts):
        so_far = "".join(texts[: i + 1])
        if text == STOP:
            ended = True
        elif so_far.lstrip().startswith("["):
            signs = [("start", 0), *list_depths(so_far)]
            in_step = [depth for _, depth in signs[len("".join(texts[:begin])) :]]
            level = 0 if granularity == "sentence" else 1
            closed = in_step[-1] <= level < max(in_step)
            comma = granularity == "argument" and (",", 2) in signs[len(so_far) - len(text) + 1 :]
            ended = closed or comma
        else:
            has_word = any(char.isalnum() for char in "".join(texts[begin : i + 1]))
            ended = has_word and text.rstrip(" \"'").endswith((".", "!", "?", "\n"))
        if ended:
            ends.append(i)
            begin = i + 1
    return ends


def list_depths(text: str):
    """(character, depth after it) for each character of a list of calls, strings included."""
    depth, quote, escaped = 0, "", False
    for char in text:
        if quote:
            if escaped:
                escaped = False
            elif char == "\\":
                escaped = True
            elif char == quote:
                quote = ""
            yield "string", depth
            continue
        if char in "'\"":
            quote = char
        depth += (char in "[({") - (char in "])}")
        yield char, depth


def encode(tokenizer, pieces: list[str]) -> list[int]:
    """Ids of the pieces, each of which must be one token."""
    ids = [tokenizer.encode(piece, add_special_tokens=False) for piece in pieces]
    assert all(len(i) == 1 for i in ids), [p for p, i in zip(pieces, ids, strict=True) if len(i) != 1]
    return [i[0] for i in ids]


def joined(pieces: list[list[int]]) -> list[int]:
    return [token for step in pieces for token in step]


def spell(text: str) -> list[str]:
    """Text in characters, with tokens of several characters between bars."""
    return [piece for i, part in enumerate(text.split("|")) for piece in ([part] if i % 2 else part)]


CASES = [
    ("call", "[a(x=1), b(y=2)]", ["[a(x=1)", ", b(y=2)", "]"]),
    ("call", "[a(x=1|),| b(y=2|)]|", ["[a(x=1),", " b(y=2)]"]),
    ("call", "[a(x='p|\\\"|q')]", ["[a(x='p\\\"q')", "]"]),
    ("call", '[a(x="(,[|")]|', ['[a(x="(,[")]']),
    ("call", "[a(x='it\\'s)', y=(1, 2))]", ["[a(x='it\\'s)', y=(1, 2))", "]"]),
    ("call", "[a(), b(z=[{'k': [1, 2]}])]", ["[a()", ", b(z=[{'k': [1, 2]}])", "]"]),
    ("call", 'x', ["x"]),
    ("call", "|[a(x=1)]|", ["[a(x=1)]"]),
    ("call", "[|a()|, |a()|]", ["[a()", ", a()", "]"]),
    ("call", "[a(|),b(|)]", ["[a(),b()", "]"]),
    ("call", "|[]|", ["[]"]),
    ("call", " \n[a(x=1)]", [" \n[a(x=1)", "]"]),
    ("call", "[Market Trends API(a=1)]", ["[Market Trends API(a=1)", "]"]),
    ("call", "Sorry! No [tool], (none) fits.", ["Sorry!", " No [tool], (none) fits."]),
    ("call", "Hello.|\n\n|He said \"no.\" Bye?", ["Hello.", '\n\nHe said "no.', '" Bye?']),
    ("call", "|Hi.||Hi.|", ["Hi.", "Hi."]),
    ("call", "So... yes", ["So.", ".. yes"]),
    ("argument", "[a(x=1, y=[1, 2], z='p,q')]", ["[a(x=1,", " y=[1, 2],", " z='p,q')", "]"]),
    ("argument", "|[a(x=1,|y=2)]", ["[a(x=1,", "y=2)", "]"]),
    ("argument", "[a(x=1), b(y=2)]", ["[a(x=1)", ", b(y=2)", "]"]),
    ("argument", "[a(x=[1|],|y=2|),|b(z=1|)]|", ["[a(x=[1],", "y=2),", "b(z=1)]"]),
    ("argument", "Oh, no. Yes, sir!", ["Oh, no.", " Yes, sir!"]),
    ("sentence", "[a(x=1), b(y=2)]", ["[a(x=1), b(y=2)]"]),
    ("sentence", "[a(x=[[1|]]||)]|", ["[a(x=[[1]])]"]),
    ("sentence", "[a(), b()] Done. Yes.", ["[a(), b()]", " Done. Yes."]),
    ("sentence", "Yes. No.", ["Yes.", " No."]),
]  # fmt: skip


@pytest.mark.parametrize(("granularity", "text", "expected"), CASES)
def test_steps_end_where_a_reader_would_cut(granularity, text, expected, tokenizer, tables):
    ids = encode(tokenizer, [piece for piece in spell(text) if piece])
    assert [tokenizer.decode(step) for step in split_steps(tables[granularity], ids)] == expected


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("text", ["[a(x='(", "No tool", "[a(x=1)]"])
def test_end_of_turn_ends_any_step(granularity, text, tokenizer, tables):
    stop = tokenizer.convert_tokens_to_ids(STOP)
    ids = [*encode(tokenizer, list(text)), stop]
    pieces = split_steps(tables[granularity], [*ids, *ids])
    assert joined(pieces) == [*ids, *ids]
    assert [step[-1] for step in pieces].count(stop) == 2
    assert all(stop not in step[:-1] for step in pieces)


def test_a_step_that_begins_inside_a_call_ends_with_the_call(tokenizer, tables):
    """The search may cut a step at its token limit; the next one starts in mid-call."""
    ids = encode(tokenizer, list("[a(x=1)]"))
    state = advance_path(tables["call"], jnp.array([ids]), jnp.array([5]))
    ends = []
    for token in ids[5:]:
        state, ended = advance(tables["call"], state, jnp.array([token]))
        ends.append(bool(ended[0]))
    assert ends == [False, True, False]


PIECES = st.sampled_from([*MERGED, *"[](){}'\"\\,.!? \nabx1=é-", STOP])
RESPONSES = st.tuples(st.sampled_from(["", "[", "[a(", "Yes"]), st.lists(PIECES, max_size=24))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(response=RESPONSES)
@settings(deadline=None, max_examples=150)
def test_table_agrees_with_a_reader_of_characters(granularity, response, tokenizer, tables):
    texts = [*response[0], *response[1]]
    if STOP in texts:
        texts = texts[: texts.index(STOP) + 1]
    ids = [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False)]
    # Half a letter is a token of its own, and so is every piece.
    texts = tokenizer.batch_decode([[i] for i in ids])
    pieces = split_steps(tables[granularity], ids)
    assert joined(pieces) == ids
    assert all(pieces)
    ends = np.cumsum([len(step) for step in pieces])
    expected = reference_split(texts, granularity)
    assert [int(end) - 1 for end in ends if end < len(ids)] == [end for end in expected if end < len(ids) - 1]


@given(responses=st.lists(RESPONSES, min_size=3, max_size=3))
@settings(deadline=None, max_examples=25)
def test_compiled_batch_follows_each_response_as_alone(responses, tokenizer, tables):
    table = tables["argument"]
    length = 40
    rows = [
        [i for piece in [*head, *tail] for i in tokenizer.encode(piece, add_special_tokens=False)][:length]
        for head, tail in responses
    ]
    tokens_BT = jnp.array([row + [0] * (length - len(row)) for row in rows])
    states, ended_TB = run_batch(table, tokens_BT)
    after = path_states(table, tokens_BT, jnp.array([len(row) for row in rows]))
    for b, row in enumerate(rows):
        cuts = {0, len(row), *(np.flatnonzero(ended_TB[: len(row), b]) + 1).tolist()}
        assert cuts == {0, *np.cumsum([len(step) for step in split_steps(table, row)]).tolist()}
        assert int(after.automaton[b]) == int(states.automaton[len(row), b])
        assert int(after.depth[b]) == int(states.depth[len(row), b])


path_states = jax.jit(advance_path)


@jax.jit
def run_batch(table: StepTable, tokens_BT):
    def body(state, token_B):
        after, ended_B = advance(table, state, token_B)
        return after, (after, ended_B)

    start = initial_state((tokens_BT.shape[0],))
    _, (states, ended_TB) = jax.lax.scan(body, start, tokens_BT.T)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), start, states), ended_TB


def test_padding_and_special_tokens_change_nothing(tokenizer, tables):
    table = tables["call"]
    state = advance_path(table, jnp.array([encode(tokenizer, list("[a(x='("))]), jnp.array([7]))
    for token in range(len(tokenizer), len(tokenizer) + 3):
        after, ended = advance(table, state, jnp.array([token]))
        assert not ended[0]
        assert all(np.array_equal(new, old) for new, old in zip(after, state, strict=True))


def test_an_end_of_turn_the_model_does_not_have_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"end-of-turn token 300 is outside the model's vocabulary of 277"):
        build_step_table(tokenizer, "call", 277, [3, 300])


def test_batches_of_any_shape(tables):
    state, ended = advance(tables["call"], initial_state((2, 3)), jnp.zeros((2, 3), jnp.int32))
    assert state.depth.shape == state.automaton.shape == ended.shape == (2, 3)
    assert (state.automaton.dtype, state.depth.dtype) == (jnp.int8, jnp.int32)


def test_stories_tokenizer_keeps_calls_whole():
    tokenizer = load_tokenizer(str(shared_path("checkpoints/stories260K")))
    table = build_step_table(tokenizer, "call", 512, [2])
    text = '[get(city="Pa),ris", n=[1, 2]), other(b=1)]'
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert [tokenizer.decode(step) for step in split_steps(table, ids)] == [
        '[get(city="Pa),ris", n=[1, 2])',
        ", other(b=1)",
        "]",
    ]


def test_qwen_vocabulary_of_150_000_is_read_in_seconds():
    tokenizer, ids_of = qwen_tokenizer()
    begin = time.perf_counter()
    table = build_step_table(tokenizer, "call", 152064, [151645])
    assert time.perf_counter() - begin < 20, "2 s on an idle desktop"
    assert table.next_state_VQ.shape == (152064, steps.N_STATES)
    # Pieces that Qwen's vocabulary really has.
    pieces = [
        "[",
        "get",
        "_weather",
        "(c",
        "ity",
        '="',
        "Paris",
        " (",
        "),",
        '",',
        " n",
        "=[",
        "1",
        "]),",
        " other",
        "(b",
        "='",
        "\\'",
        ")",
        "')]",
    ]
    split = split_steps(table, [*ids_of(pieces), 151645])
    assert [tokenizer.decode(step) for step in split] == [
        '[get_weather(city="Paris (),", n=[1]),',
        " other(b='\\')')]",
        "<|im_end|>",
    ]


def qwen_tokenizer():
    """Qwen's ids and texts, without its merges: pieces are looked up, not found."""
    import tokenizers
    import transformers

    lines = shared_path("tokenizers/qwen/qwen.tiktoken").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    added = json.loads(shared_path("tokenizers/qwen/qwen3_tokenizer_config.json").read_text())["added_tokens_decoder"]
    letters = byte_letters()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([token["content"] for _, token in sorted(added.items(), key=lambda item: int(item[0]))])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    return tokenizer, lambda pieces: [ranks[piece.encode()] for piece in pieces]


def byte_letters() -> dict[int, str]:
    """The visible letter that byte-level vocabularies write for each byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
