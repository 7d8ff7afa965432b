"""The reader of call lists: totality, bounded time, typed values, round trips, and real rows."""

import gzip
import json
import math
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from itool_jax.text.calls import (
    MAX_DEPTH,
    Call,
    calls_from_openai,
    looks_like_calls,
    read_calls,
    same_calls,
    value_key,
    write_calls,
)
from tests.conftest import shared_path

EXAMPLE = '[get_weather(city="Paris", days=3), Market Trends API(a=[1, {"x": None}], ok=true)]'


def argument(text: str) -> Any:
    """The value that `text` reads as, or an ellipsis where it is unreadable."""
    calls = read_calls(f"[f(a={text})]")
    return ... if calls is None else calls[0].arguments["a"]


def identical(a: Any, b: Any) -> bool:
    return value_key(a) == value_key(b)


def test_reads_the_example() -> None:
    assert read_calls(EXAMPLE) == [
        Call("get_weather", {"city": "Paris", "days": 3}),
        Call("Market Trends API", {"a": [1, {"x": None}], "ok": True}),
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-7", -7),
        ("+7", 7),
        ("1.0", 1.0),
        (".5", 0.5),
        ("2.", 2.0),
        ("-1.5e-3", -1.5e-3),
        ("1E5", 1e5),
        ("True", True),
        ("false", False),
        ("null", None),
        ("None", None),
        ("[]", []),
        ("{}", {}),
        ("()", []),
        ("(1)", 1),
        ("(1,)", [1]),
        ("(1, 2)", [1, 2]),
        ("[1,2 , 3,]", [1, 2, 3]),
        ("{'a': {\"b\": [True, null]}, 2: 'x',}", {"a": {"b": [True, None]}, 2: "x"}),
        ("'it\\'s'", "it's"),
        ('"say \\"hi\\""', 'say "hi"'),
        ('"[f(a=1)], )"', "[f(a=1)], )"),
        ('"a\nb"', "a\nb"),
        (r'"\n\t\\\/\u00e9\x41\U0001F600"', "\n\t\\/éA😀"),
        (r'"\ud83d\ude00"', "😀"),
        (r'"\ud83d"', "\ufffd"),
        (r"'\d+\u12'", r"\d+\u12"),
        (r"'\U00110000'", r"\U00110000"),
    ],
)
def test_values_are_typed(text: str, value: Any) -> None:
    assert identical(argument(text), value)


@pytest.mark.parametrize(
    "text",
    [
        "Paris",
        "foo.bar",
        "Trueish",
        "NaN",
        "Infinity",
        "1e999",
        "007",
        "1_000",
        "0x1F",
        "2*3",
        "10px",
        "--1",
        "- 1",
        '"open',
        "'a\"",
        '"a" "b"',
        "[1",
        "[1}",
        "[,]",
        "[1,,2]",
        "{1}",
        "{[1]: 2}",
        "{'a' 1}",
        "",
        "=1",
        "9" * 5000,
    ],
)
def test_unreadable_values(text: str) -> None:
    assert argument(text) is ...


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (" \n[ f ( a = 1 ,b=2, ) , g( ), ]\t", [Call("f", {"a": 1, "b": 2}), Call("g", {})]),
        ("[f(a=1,a=2)]", [Call("f", {"a": 2})]),
        ("[v1/get-all.items(ref-number=1)]", [Call("v1/get-all.items", {"ref-number": 1})]),
        ("[Today's Quiz(), B()]", [Call("Today's Quiz", {}), Call("B", {})]),
        ("[1 Hour / Minutely (Nowcast)(x=1)]", [Call("1 Hour / Minutely (Nowcast)", {"x": 1})]),
        ("[Send (A - B) Now(x='(')]", [Call("Send (A - B) Now", {"x": "("})]),
        ("[天气(城市='巴黎')]", [Call("天气", {"城市": "巴黎"})]),
    ],
)
def test_tolerated_lists(text: str, calls: list[Call]) -> None:
    assert read_calls(text) == calls


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "[]",
        "[ ]",
        "[,]",
        "f(a=1)",
        "Sorry, I cannot.",
        "[f]",
        "[f(]",
        "[f)]",
        "[f(a)]",
        "[f(5)]",
        "[f(a=)]",
        "[f(a=1)",
        "[f(a=1]",
        "[f(a=1))]",
        "[f(a=1)]]",
        "[f(a=1)] done",
        "Sure: [f(a=1)]",
        "[f(a=1) g()]",
        "[(a=1)]",
        "[f(a=1),,g()]",
        "[f(,)]",
        "[f(a=1 b=2)]",
        "[f(=1)]",
        "[f( =1)]",
        "['f()']",
        '["f()"]',
        "[f()(a=1)]",
        "[1, 2]",
        "[f(a==1)]",
        "[f('a'=1)]",
        '[{"name": "f", "arguments": {}}]',
        "[[f()]]",
        "```[f()]```",
        "[f(a=1), g]",
        "[()]",
    ],
)
def test_not_a_call_list(text: str) -> None:
    assert read_calls(text) is None


@pytest.mark.parametrize(("text", "attempt"), [("[f(", True), (" \n[]", True), ("No [f()]", False), ("", False)])
def test_looks_like_calls(text: str, attempt: bool) -> None:
    assert looks_like_calls(text) is attempt


def test_depth_is_bounded() -> None:
    assert argument("[" * MAX_DEPTH + "1" + "]" * MAX_DEPTH) is not ...
    assert argument("[" * (MAX_DEPTH + 1) + "1" + "]" * (MAX_DEPTH + 1)) is ...
    assert argument("{'a':" * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1)) is ...


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[f(a=" + "[" * 100_000,
        "[f(a=" + "{1:" * 100_000,
        "[f(a=" + "(" * 100_000,
        "[" + "f(" * 100_000,
        "[f(a='" + "\\" * 100_001,
        "[f(a=" + "9" * 100_000 + ")]",
        "[" + " " * 100_000,
        "[f" + "(x)" * 100_000,
        "[" + "a" * 100_000,
        "[f(" + "a" * 100_000,
        "[f(a=1" + ", " * 100_000,
        "[f(a='" + "\\u" * 50_000 + "')]",
        "[f" + "(x" * 100_000,
        "[f( " + " " * 100_000 + "x",
        "[f(a=" + "1e" * 100_000,
    ],
)
def test_hostile_text_takes_little_time(text: str) -> None:
    start = time.perf_counter()
    read_calls(text)
    assert time.perf_counter() - start < 5.0  # linear takes milliseconds, quadratic minutes


def test_long_list_is_read_whole() -> None:
    calls = [Call("f", {"a": index, "b": "x" * 10}) for index in range(1_000)]
    assert read_calls(write_calls(calls)) == calls


SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.from_regex(r"[A-Za-z_][\w.\-/ ']{0,8}\w( \([a-z -]*[a-z]\))?", fullmatch=True).filter(
    lambda name: name == name.strip() and "( " not in name
)
CALLS = st.lists(
    st.builds(Call, NAMES, st.dictionaries(st.from_regex(r"\w[\w.-]{0,5}", fullmatch=True), VALUES, max_size=3)),
    min_size=1,
    max_size=4,
)
MARKS = st.text(alphabet="[](){}'\"=,:\\ \nfaTrue10.-eu", max_size=40)


@given(CALLS)
@settings(deadline=None)
def test_written_calls_read_back(calls: list[Call]) -> None:
    read = read_calls(write_calls(calls))
    assert read is not None
    assert list(map(value_key, read)) == list(map(value_key, calls))


@given(CALLS, st.randoms())
@settings(deadline=None)
def test_order_does_not_matter(calls: list[Call], random: Any) -> None:
    shuffled = [
        Call(call.name, dict(random.sample(list(call.arguments.items()), len(call.arguments)))) for call in calls
    ]
    random.shuffle(shuffled)
    assert same_calls(calls, shuffled)
    assert not same_calls(calls, [*calls, calls[0]])


@given(st.text() | MARKS | MARKS.map("[f(a=".__add__))
@example("[f(a='\ud800\\n')]")
@settings(deadline=None, max_examples=500)
def test_no_text_raises_and_every_reading_is_writable(text: str) -> None:
    calls = read_calls(text)
    if calls is not None:
        assert looks_like_calls(text)
        assert same_calls(read_calls(write_calls(calls)) or [], calls)


@given(CALLS, st.data())
@settings(deadline=None)
def test_the_beginning_of_a_call_list_is_none(calls: list[Call], data: st.DataObject) -> None:
    text = write_calls(calls)
    assert read_calls(text[: data.draw(st.integers(0, len(text) - 1))]) is None


@given(CALLS, st.data())
@settings(deadline=None, max_examples=200)
def test_mutated_calls_never_raise(calls: list[Call], data: st.DataObject) -> None:
    text = write_calls(calls)
    start = data.draw(st.integers(0, len(text)))
    stop = data.draw(st.integers(start, min(len(text), start + 3)))
    mutated = text[:start] + data.draw(MARKS) + text[stop:]
    read = read_calls(mutated)
    assert read is None or same_calls(read_calls(write_calls(read)) or [], read)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("[f(a=1)]", "[f(a=1)]", True),
        ("[f(a=1), g(b=2)]", "[g(b=2),f(a = 1)]", True),
        ("[f(a={'x': 1, 'y': 2})]", "[f(a={'y': 2, 'x': 1})]", True),
        ("[f(a=(1, 2))]", "[f(a=[1, 2])]", True),
        ("[f(a=0.0)]", "[f(a=-0.0)]", True),
        ("[f(a=1)]", "[f(a=1.0)]", False),
        ("[f(a=1)]", "[f(a='1')]", False),
        ("[f(a=1)]", "[f(a=True)]", False),
        ("[f(a=0)]", "[f(a=None)]", False),
        ("[f(a=[1])]", "[f(a=[True])]", False),
        ("[f(a=[1, 2])]", "[f(a=[2, 1])]", False),
        ("[f(a=None)]", "[f()]", False),
        ("[f(), f()]", "[f()]", False),
        ("[f(), f(), g()]", "[f(), g(), g()]", False),
        ("[f(a='x')]", "[f(a='X')]", False),
        ("[f()]", "[F()]", False),
    ],
)
def test_same_calls(a: str, b: str, same: bool) -> None:
    assert same_calls(read_calls(a) or [], read_calls(b) or []) is same
    assert same_calls(read_calls(b) or [], read_calls(a) or []) is same


def test_canonical_text() -> None:
    calls = [Call("f", {"a": 'é"\n', "b": 1, "c": (True, None), "d": {"k": 2.5, 3: "'"}}), Call("g", {})]
    assert write_calls(calls) == '[f(a="é\\"\\n", b=1, c=[True, None], d={"k": 2.5, 3: "\'"}), g()]'


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "at least one call"),
        ([Call("f(", {})], "the name 'f\\('"),
        ([Call(" f", {})], "the name ' f'"),
        ([Call("", {})], "the name ''"),
        ([Call("f", {"a=": 1})], "the name 'a='"),
        ([Call("f", {"a": math.nan})], "the value nan"),
        ([Call("f", {"a": {1, 2}})], "the value {1, 2}"),
        ([Call("f", {"a": {(1, 2): 3}})], "the value \\(1, 2\\)"),
        ([Call("f", {"a": json.loads("[" * 66 + "]" * 66)})], "more than 64 levels"),
    ],
)
def test_what_cannot_be_written(calls: list[Call], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_calls(calls)


def test_calls_from_openai() -> None:
    entries = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, null]}'}},
        {"type": "function", "function": {"name": "g", "arguments": {"b": 2.0}}},
        {"name": "h", "arguments": {}},
    ]
    assert calls_from_openai(entries) == [Call("f", {"a": [1, None]}), Call("g", {"b": 2.0}), Call("h", {})]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"function": {"name": "f"}}, 'expected {"name"'),
        ({"function": None}, 'expected {"name"'),
        ("f()", 'expected {"name"'),
        ({"name": "f", "arguments": "{"}, "arguments of 'f' are not JSON"),
        ({"name": "f", "arguments": "[" * 100_000}, "arguments of 'f' are not JSON"),
        ({"name": "f", "arguments": "[1]"}, "arguments of 'f' are not a JSON object"),
        ({"name": "f", "arguments": None}, "arguments of 'f' are not a JSON object"),
        ({"name": 'f"', "arguments": {}}, "cannot contain the name"),
        ({"name": 3, "arguments": {}}, 'expected {"name"'),
        ({"name": "f", "arguments": {1: 2}}, "cannot contain the name 1"),
        ({"name": "f", "arguments": '{"a": NaN}'}, "cannot contain the value nan"),
    ],
)
def test_malformed_openai_calls(entry: Any, message: str) -> None:
    with pytest.raises(ValueError, match="tool call 2: .*" + message):
        calls_from_openai([{"name": "ok", "arguments": {}}, entry])


@pytest.mark.parametrize("part", ["dev", "test_in_domain", "test_out_domain"])
def test_seal_tools_gold_reads_back(part: str) -> None:
    with gzip.open(shared_path(f"data/seal_tools/{part}.jsonl.gz"), "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) > 100
    for row in rows:
        calls = [Call(call["api"], call["parameters"]) for call in row["calling"]]
        assert same_calls(read_calls(write_calls(calls)) or [], calls), row["id"]


def test_real_model_outputs_mostly_read() -> None:
    """Outputs of a model that answers in this format: relevant categories read, refusals are told apart."""
    folder = shared_path("data/bfcl_outputs/watt-ai_watt-tool-8B")
    rate = {}
    for category in ("simple", "multiple", "parallel", "parallel_multiple", "live_simple", "irrelevance"):
        with gzip.open(folder / f"BFCL_v3_{category}_result.json.gz", "rt", encoding="utf-8") as lines:
            results = [json.loads(line)["result"] for line in lines]
        rate[category] = sum(read_calls(result) is not None for result in results) / len(results)
    print(rate)
    assert rate.pop("irrelevance") < 0.3
    assert min(rate.values()) > 0.9
