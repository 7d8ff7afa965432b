"""Readers of the public data sets: their rows give samples, and a wrong one is named."""

import contextlib
import copy
import functools
import gzip
import json
import re
import sys
import types

import pytest

from itool_jax.data.formats import NO_CALL, from_seal_tools, seal_tools_catalogue, seal_tools_entry
from itool_jax.data.sources import load, read_samples, with_fewer_tools
from itool_jax.system.files import write_jsonl
from itool_jax.text.calls import read_calls
from itool_jax.text.sample import Sample
from tests.conftest import shared_path
from tests.tiny import CALL, TOOL, USER

TOOLACE = {
    "system": "Today is Monday.\nHere is a list of functions in JSON format that you can invoke:\n"
    '[{"name": "Trends API", "description": "d", "parameters": {"type": "dict", "properties":'
    ' {"n": {"type": "int"}}, "required": ["n"]}, "required": null}]. \n'
    "Put it in the format of [func1(a=1), func2()]\n",
    "conversations": [
        {"from": "user", "value": "q"},
        {"from": "assistant", "value": "[Trends API(n=1)]"},
        {"from": "tool", "value": "{}"},
        {"from": "assistant", "value": "done"},
        {"from": "user", "value": "thanks"},
        {"from": "assistant", "value": "welcome"},
    ],
}
XLAM = {
    "id": 7,
    "query": "q",
    "tools": '[{"name": "f", "description": "d", "parameters": {"n": {"type": "int, optional", "default": "2"}}}]',
    "answers": '[{"name": "f", "arguments": {"n": 3}}, {"name": "f", "arguments": {}}]',
}
TOOLBENCH = {
    "id": "Step 1: q",
    "conversations": [
        {
            "from": "system",
            "value": "You are AutoGPT.\nSpecifically, you have access to the following APIs: "
            "[{'name': 'get_for_x', 'description': \"it's\", 'parameters': {'type': 'object', 'properties': "
            "{'q': {'type': 'string'}}, 'required': ['q'], 'optional': []}}, "
            "{'name': 'Finish', 'description': 'd', 'parameters': {}}]",
        },
        {"from": "user", "value": "\nfind it\nBegin!\n"},
        {"from": "assistant", "value": '\nThought: \nAction: get_for_x\nAction Input: {\n  "q": "it"\n}'},
        {"from": "function", "value": "{}"},
        {
            "from": "assistant",
            "value": "\nThought: \nAction: Finish\n"
            'Action Input: {"return_type": "give_answer", "final_answer": "found"}',
        },
    ],
}

TOOLRL = {
    "instruction": '**Available Tools**\n1. Name: f\nDescription: d\nParameters: {"n": {"type": "int"}}\n\n'
    "**Steps for Each Turn**\n1. Think",
    "input": "<user> q </user>",
    "output": '<think> <tool_call> or not </think>\n<tool_call>\n{"name": "f", "parameters": {"n": 1}}\n</tool_call>',
}
GLAIVE = {
    "conversations": [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"n": 1}}'},
        {"from": "observation", "value": "{}"},
        {"from": "gpt", "value": "done"},
    ],
    "tools": '[{"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}]',
}
GLAIVE_HUB = {
    "system": "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
    '{\n    "name": "f",\n    "description": "d",\n    "parameters": {"type": "object", "properties": {}}\n}\n\n'
    '{"name": "g", "description": "d", "parameters": {}}\n\n',
    "chat": 'USER: q\n\n\nASSISTANT: <functioncall> {"name": "f", "arguments": \'{"n": 1}\'} <|endoftext|>\n\n\n'
    "FUNCTION RESPONSE: {}\n\n\nASSISTANT: done <|endoftext|>\n\n\n"
    "USER: thanks\n\n\nASSISTANT: Well: welcome.\n\nBye. <|endoftext|>\n\n\n",
}
API_BANK = {
    "instruction": "Generate an API request.",
    "input": '{"apiCode": "ToolSearcher", "description": "d", "input_parameters": {"keywords": {"type": "str"}}}\n'
    "User: q\nAPI-Request: [ToolSearcher(keywords='f')]->{'name': 'f', 'description': 'd', 'input_parameters': "
    "{'n': {'type': 'int'}}}\nGenerate API Request:",
    "output": "API-Request: [f(n=1)]",
}
SEAL_TOOL = {
    "api_name": "f",
    "api_description": "d",
    "field": "A/x",
    "parameters": {"n": {"type": "int", "description": "d"}},
    "required": ["n"],
}
ROWS = {
    "openai": {
        "id": "a",
        "messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, USER],
        "tools": [TOOL],
        "target": {"role": "assistant", "content": [{"type": "text", "text": "t"}]},
        "category": "c",
    },
    "xlam": XLAM,
    "glaive": GLAIVE,
    "glaive_hub": GLAIVE_HUB,
    "toolace": TOOLACE,
    "toolbench": TOOLBENCH,
    "toolrl": TOOLRL,
    "api_bank": API_BANK,
    "seal_tools": {"id": "r", "query": "q", "calling": [{"api": "f", "parameters": {"n": 1}}]},
}

asked = functools.partial(load, targets="after_user")


@pytest.mark.parametrize("result", ["{[1]: 2}", "{'name': 'g', 'input_parameters': {'n'}}", "not found"])
def test_api_bank_searches_that_found_no_tool_offer_none(file, result):
    head, _, _ = API_BANK["input"].partition("->")
    (some,), (none,) = load(file(API_BANK)), load(file(API_BANK | {"input": f"{head}->{result}"}))
    assert [tool["function"]["name"] for tool in some.tools] == ["ToolSearcher", "f"]
    assert none.tools == some.tools[:1]
    assert none.messages[-1] == {"role": "tool", "content": result}


def test_glaive_without_tools_offers_none(file):
    with_tools, without = asked(file(GLAIVE, GLAIVE | {"tools": None}))
    assert [tool["function"]["name"] for tool in with_tools.tools] == ["f"]
    assert without.tools == ()
    assert without.target == with_tools.target == "[f(n=1)]"


def test_sharegpt_keeps_its_system_text_and_its_tools(file):
    with_text, without = asked(file(GLAIVE | {"system": "s"}, GLAIVE | {"system": None}))
    assert with_text.messages == ({"role": "system", "content": "s"}, USER)
    assert without.messages == (USER,)
    assert with_text.tools == without.tools == asked(file(GLAIVE))[0].tools


def test_what_a_user_of_glaive_says_is_no_call(file):
    (sample,) = load(file(GLAIVE_HUB | {"chat": "USER: what is <functioncall> {}?\n\n\nASSISTANT: a tag"}))
    assert sample.messages[0]["content"] == "what is <functioncall> {}?"
    assert sample.target == "a tag"


def called(call):
    """A row of Glaive's own form in which this is called."""
    return GLAIVE_HUB | {"chat": f"USER: q\n\n\nASSISTANT: Sure! <functioncall> {call} <|endoftext|>"}


def test_glaive_as_its_authors_publish_it(file):
    first, second = asked(file(GLAIVE_HUB))
    assert (first.messages, first.target) == ((USER,), "[f(n=1)]")
    assert [tool["function"]["name"] for tool in first.tools] == ["f", "g"]
    assert [message["role"] for message in second.messages] == ["user", "assistant", "tool", "assistant", "user"]
    assert second.messages[1:3] == ({"role": "assistant", "content": "[f(n=1)]"}, {"role": "tool", "content": "{}"})
    assert (second.id, second.target) == (f"{first.id}/2", "Well: welcome.\n\nBye.")
    text = {"system": "SYSTEM: You are a helpful assistant, with no access to external functions.\n\n"}
    (none, _) = asked(file(GLAIVE_HUB | text))
    assert (none.messages, none.tools) == ((USER,), ())


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("""{"name": "f", "arguments": '{"a": "b"}'}""", {"a": "b"}),
        ("""{"name": "f", "arguments": '{\n  "a": {"b": [1]}\n}'}""", {"a": {"b": [1]}}),
        ("""{"name": "f", "arguments": {"a": 1.5}}""", {"a": 1.5}),
        ("""{"name": "f", "arguments": "{\\"a\\": 1}"}""", {"a": 1}),
        ("""{"name": "f", "arguments": '{"a": "it's [User's Name]"}'}""", {"a": "it's [User's Name]"}),
        ("""{"name": "f", "arguments": '{"a": "it\\'s"}'}""", {"a": "it's"}),
        ("""{"name": "f", "arguments": '{"a": "\\\\'"}'}""", {"a": "\\'"}),
        ("""{"name": "f", "arguments": '{"a": "'}'}"}'}""", {"a": "'}'}"}),
        ("""{"name": "f", "arguments": '{}'}""", {}),
        ("""{"name": "f"}""", {}),
    ],
)
def test_calls_of_glaive_are_read_however_their_arguments_are_quoted(file, call, arguments):
    (sample,) = load(file(called(call)))
    assert read_calls(sample.target) == [("f", arguments)]


def test_both_forms_of_glaive_give_the_same_samples(file):
    """Conversations as LLaMA-Factory keeps them, written as Glaive's authors publish them."""
    given = json.loads(gzip.decompress(shared_path("data/glaive/glaive_toolcall_en_demo.json.gz").read_bytes()))
    speakers = {"human": "USER", "gpt": "ASSISTANT", "function_call": "ASSISTANT", "observation": "FUNCTION RESPONSE"}
    rows = []
    for row in given:
        chat = ""
        for turn in row["conversations"]:
            text = turn["value"]
            if turn["from"] == "function_call":
                call = json.loads(text)
                quoted = f"'{json.dumps(call['arguments'], ensure_ascii=False)}'"
                text = f'<functioncall> {{"name": "{call["name"]}", "arguments": {quoted}}}'
            end = " <|endoftext|>" if speakers[turn["from"]] == "ASSISTANT" else ""
            chat += f"{speakers[turn['from']]}: {text}{end}\n\n\n"
        tools = json.loads(row["tools"]) if row["tools"] else []
        rows.append({"system": "SYSTEM: \n" + "\n\n".join(json.dumps(tool, indent=4) for tool in tools), "chat": chat})
    theirs = asked(file(*given))
    assert len(theirs) == 746
    assert [(s.messages, s.tools, s.target) for s in asked(file(*rows))] == [
        (tuple(m | {"content": m["content"].strip()} for m in s.messages), s.tools, s.target.strip()) for s in theirs
    ]


def test_scores_and_responses_are_had_of_folders_too(file, tmp_path):
    file(XLAM)
    file({"id": "a", "prompt_ids": [1], "target_ids": [2]})
    assert [sample.id for sample in read_samples(tmp_path, need_target=True)] == ["xlam-7", "a"]


def test_toolrl_takes_the_answer_after_the_thought(file):
    row = TOOLRL | {"output": "<think> so </think>\n<response> text </response>"}
    calls, text = load(file(TOOLRL, row))
    assert (calls.messages, calls.target, text.target) == ((USER,), "[f(n=1)]", "text")
    assert calls.tools[0]["function"]["parameters"]["required"] == ["n"]


def test_a_name_with_parts_of_a_value_in_it_does_not_spoil_the_data(file):
    spilt = '<tool_call>\n{"name": "f", "parameters": {"\\"2 h\\"}], n": 1}}\n</tool_call>'
    (sample,) = load(file(TOOLRL | {"output": spilt}))
    assert read_calls(sample.target) == [("f", {"2 h n": 1})]


def test_toolace_cuts_the_tools_out_of_the_system_text(file):
    first, second = asked(file(TOOLACE))
    assert first.messages[0]["content"] == "Today is Monday.\nPut it in the format of [func1(a=1), func2()]"
    assert first.messages[1:] == (USER,)
    assert first.tools[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
    }
    assert (first.target, second.target) == ("[Trends API(n=1)]", "welcome")
    assert second.id == f"{first.id}/2"
    first, done, last = load(file(TOOLACE), targets="all")
    assert (done.id, done.target, len(done.messages)) == (f"{first.id}/1.2", "done", 4)
    assert first.following == ({"role": "tool", "content": "{}"}, {"role": "assistant", "content": "done"})
    assert (last.id, last.following, done.following) == (second.id, (), ())


def test_xlam_reads_its_json_texts(file):
    calls, none = load(file(XLAM, XLAM | {"id": 8, "answers": "[]"}))
    assert (calls.id, calls.target, calls.messages) == ("xlam-7", "[f(n=3), f()]", (USER,))
    assert calls.tools[0]["function"]["parameters"]["properties"]["n"] == {"type": "integer", "default": 2}
    assert none.target == NO_CALL


def test_toolbench_turns_actions_into_calls_and_finish_into_text(file):
    sample, last = load(file(TOOLBENCH))
    assert (last.id, last.target, len(last.messages)) == (f"{sample.id}/1.2", "found", 3)
    assert sample.messages == ({"role": "user", "content": "find it"},)
    assert sample.target == '[get_for_x(q="it")]'
    assert [tool["function"]["name"] for tool in sample.tools] == ["get_for_x"]
    system, user, _, _, finish = TOOLBENCH["conversations"]
    (sample,) = load(file({"conversations": [system, user, finish]}))
    assert sample.target == "found"


@pytest.mark.parametrize(
    ("row", "change", "reason"),
    [
        (TOOLACE, {"conversations": [{"from": "bot", "value": "x"}]}, 'from "bot"'),
        (TOOLACE, {"conversations": "x"}, '"conversations" is missing or not a list'),
        (XLAM, {"answers": "[{"}, '"answers" is not valid JSON'),
        (XLAM, {"answers": '[{"name": "f"}]'}, "tool call 1"),
        (XLAM, {"answers": "{}"}, '"answers" is not a list'),
        (XLAM, {"tools": '[{"name": "f", "parameters": {"a": 1}}]'}, 'parameter "a"'),
        (XLAM, {"query": None}, '"query" is missing or not a string'),
        (XLAM, {"answers": 3}, '"answers" is missing or not a string or a list'),
        (XLAM, {"tools": None}, '"tools" is missing or not a string or a list'),
        (XLAM, {"tools": '[{"name": "f", "description": 5}]'}, '"description" of tool "f" is not a string'),
        (GLAIVE, {"tools": 3}, '"tools" is missing or not a string'),
        (GLAIVE, {"system": 3}, '"system" is missing or not a string'),
        (GLAIVE_HUB, {"chat": 3}, '"chat" is missing or not a string'),
        (GLAIVE_HUB, {"chat": "hello"}, '"chat" is not a dialogue'),
        (GLAIVE_HUB, {"chat": "USER: hello"}, '"chat" is not a dialogue'),
        (GLAIVE_HUB, {"system": 'SYSTEM: - {"name": '}, "a tool is not valid JSON"),
        (GLAIVE_HUB, {"system": 'SYSTEM: - {"description": "d"}'}, 'a tool has no "name"'),
        (called('{"name": "f", "arguments": \'{"a": \'}'), {}, '"functioncall" is not valid JSON'),
        (called('{"name": "f", "arguments": 5}'), {}, "tool call 1"),
        (called('{"name": "f", "parameters": {}}'), {}, "tool call 1"),
        (called('["f"]'), {}, "tool call 1"),
        (called(""), {}, '"functioncall" is not valid JSON'),
        (TOOLRL, {"instruction": TOOLRL["instruction"].replace('{"n": {"type": "int"}}', "3")}, "are not an object"),
        (TOOLBENCH, {"conversations": []}, "does not start with a system turn"),
        (TOOLRL, {"output": "x"}, "no answer"),
        (TOOLRL, {"input": ""}, "no dialogue"),
        (TOOLRL, {"output": "<tool_call>\n{]\n</tool_call>"}, '"tool_call" is not valid JSON'),
        (TOOLRL, {"instruction": "**Available Tools**\n1. Name: f\nWhat: d"}, "a tool is not written as"),
        ({"instruction": "x", "input": "y", "output": ""}, {}, "has no user turn"),
        (API_BANK, {"input": f"3\n{API_BANK['input']}"}, "a tool is not an object"),
    ],
)
def test_a_wrong_row_of_a_public_form_is_named(tmp_path, row, change, reason):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row | change]))
    for read in (load, lambda path: read_samples(path, need_target=False)):
        with pytest.raises(ValueError, match=reason) as error:
            read(path)
        assert str(error.value).startswith(f"{path} row 1: ")


@pytest.mark.parametrize("row", [XLAM, GLAIVE, GLAIVE_HUB, TOOLACE, TOOLBENCH, TOOLRL, API_BANK])
def test_the_public_forms_are_read_with_and_without_need_of_a_target(file, row):
    path = file(row, row)
    samples = load(path)
    assert len({sample.id for sample in samples}) == len(samples) >= 2
    assert read_samples(path, need_target=True) == read_samples(path, need_target=False) == samples


@pytest.mark.parametrize(("row", "key"), [(XLAM, "answers"), (XLAM, "tools"), (GLAIVE, "tools")])
def test_what_a_later_row_lacks_is_named(file, row, key):
    path = file(row, {name: value for name, value in row.items() if name != key})
    with pytest.raises(ValueError) as error:
        load(path)
    assert str(error.value).startswith(f'{path} line 2: "{key}" is missing')


def test_a_row_that_no_reader_foresaw_is_still_named(file, monkeypatch):
    for error, reason in [
        (KeyError("answers"), '"answers" is missing'),
        (TypeError("no text"), r"a value is of the wrong type \(no text\)"),
        (AttributeError("no items"), r"a value is of the wrong type \(no items\)"),
    ]:

        def read(row, error=error):
            raise error

        monkeypatch.setattr("itool_jax.data.formats.from_xlam", read)
        with pytest.raises(ValueError, match=f"line 1: {reason}$"):
            load(file(XLAM))


def spoilt(value):
    """Copies of a JSON value, each with one value in it of another type, inside JSON texts too."""
    yield from (other for other in (None, True, 5, "x", [], [5], {}, {"x": 5}) if type(other) is not type(value))
    for match in re.finditer(r"[\[{].*", value) if isinstance(value, str) else ():
        with contextlib.suppress(json.JSONDecodeError):
            inside, end = json.JSONDecoder().raw_decode(value, match.start())
            yield from (f"{value[: match.start()]}{json.dumps(other)}{value[end:]}" for other in spoilt(inside))
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        without = copy.copy(value)
        del without[key]
        yield without
        for other in spoilt(value[key]):
            changed = copy.copy(value)
            changed[key] = other
            yield changed


@pytest.mark.parametrize(
    "form", ["openai", "xlam", "glaive", "glaive_hub", "toolace", "toolbench", "toolrl", "api_bank", "seal_tools"]
)
def test_whatever_type_a_value_has_the_row_is_read_or_named(tmp_path, form):
    row = ROWS[form]
    write_jsonl(tmp_path / "tool.jsonl", [SEAL_TOOL])
    path, lines = tmp_path / "rows.jsonl", []
    for change in spoilt(row):
        if not isinstance(change, dict):
            continue
        write_jsonl(path, [row, change])
        try:
            assert len(load(path)) >= 1
        except ValueError as error:
            lines.append(str(error))
    assert len(lines) > 5
    assert [line for line in lines if not line.startswith(f"{path} line 2: ") or "\n" in line] == []


def test_hub_data_goes_through_the_same_readers(monkeypatch):
    hub = types.SimpleNamespace(load_dataset=lambda name, split: {("o/n", "train"): [XLAM]}[(name, split)])
    monkeypatch.setitem(sys.modules, "datasets", hub)
    assert [sample.id for sample in load("hf:o/n")] == ["xlam-7"]
    with pytest.raises(ValueError, match=r"hf:o/absent could not be downloaded"):
        load("hf:o/absent")


def test_seal_tools_needs_its_tools_and_draws_distractors_by_id(file, tmp_path):
    row = {"id": "r", "query": "q", "calling": [{"api": "gold", "parameters": {"a": "x"}}]}
    path = file(row)
    with pytest.raises(ValueError, match=r"needs tool\.jsonl"):
        load(path)
    names = {"gold": "A/x", "near": "A/x", "same": "A/y", "far": "B/z"}
    listed = [SEAL_TOOL | {"api_name": name, "field": where} for name, where in names.items()]
    write_jsonl(tmp_path / "tool.jsonl", listed)
    catalogue = seal_tools_catalogue(map(seal_tools_entry, listed))
    (sample,) = load(path)
    assert [sample] == from_seal_tools(row, catalogue) == read_samples(path, need_target=True)
    samples = {n: from_seal_tools(row, catalogue, n)[0] for n in (1, 2, 3, 9)}
    assert {n: {tool["function"]["name"] for tool in sample.tools} for n, sample in samples.items()} == {
        1: {"gold"},
        2: {"gold", "near"},
        3: {"gold", "near", "same"},
        9: {"gold", "near", "same"},
    }
    unknown = file(row | {"calling": [{"api": "absent", "parameters": {}}]})
    with pytest.raises(ValueError, match='line 1: tool "absent" is not in the list'):
        load(unknown)


def test_seal_tools_hides_the_gold_tool_among_the_distractors():
    tools = [SEAL_TOOL | {"api_name": f"f{i}"} for i in range(4)]
    catalogue = seal_tools_catalogue(map(seal_tools_entry, tools))
    rows = [{"id": f"r{i}", "query": "q", "calling": [{"api": "f0", "parameters": {}}]} for i in range(40)]
    names = [[tool["function"]["name"] for tool in from_seal_tools(row, catalogue)[0].tools] for row in rows]
    assert {offered.index("f0") for offered in names} == {0, 1, 2, 3}


def test_fewer_tools_keep_those_that_the_conversation_calls():
    tools = tuple({"type": "function", "function": {"name": f"f{i}", "parameters": {}}} for i in range(8))
    call = {"type": "function", "function": {"name": "f5", "arguments": "{}"}}
    turns = (USER, {"role": "assistant", "content": "[f6()]"}, {"role": "assistant", "tool_calls": [call]})
    offered = []
    for number in range(40):
        sample = Sample(id=f"s{number}", messages=turns, tools=tools, target="[f1(a=1), f1(a=2)]")
        cut = with_fewer_tools(sample, 4)
        assert cut == with_fewer_tools(sample, 4)
        offered.append([tool["function"]["name"] for tool in cut.tools])
        assert offered[-1] == sorted(offered[-1])
        assert {"f1", "f5", "f6"} <= set(offered[-1])
        assert len(offered[-1]) == 4
        assert len(with_fewer_tools(sample, 2).tools) == 3
        assert with_fewer_tools(sample, 8) is sample
    assert len({name for names in offered for name in names}) == 8


@pytest.mark.parametrize("key", ["api_name", "api_description", "field", "parameters", "required"])
def test_a_wrong_row_among_the_tools_of_seal_tools_is_named(file, tmp_path, key):
    for wrong in ({k: v for k, v in SEAL_TOOL.items() if k != key}, SEAL_TOOL | {key: 5}):
        tools = tmp_path / "tool.jsonl.gz"
        tools.write_bytes(gzip.compress("\n".join(map(json.dumps, [SEAL_TOOL, wrong])).encode()))
        with pytest.raises(ValueError) as error:
            load(file(ROWS["seal_tools"]))
        assert str(error.value).startswith(f'{tools} line 2: "{key}" is missing or not ')
