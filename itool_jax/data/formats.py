"""Converts rows of public data sets to samples, one function per data set.

In: a row as published. Out: samples whose calls, in history and target, are bracketed lists,
`[get_weather(city="Paris")]`. Text that only explains a data set's own output format is left out, since the chat
template writes the tools. A row of another form raises ValueError with the reason; the caller adds the file name and
row.
"""

import dataclasses
import itertools
import json
import random
import re
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import Any, Literal, NamedTuple

from itool_jax.data.schemas import flat_schema, tool_schema, tool_schemas, tools_inside
from itool_jax.text.calls import Call, calls_from_openai, write_calls
from itool_jax.text.sample import Row, Sample, content_id
from itool_jax.text.tool_formats import MISTRAL, TAGGED

Targets = Literal["all", "after_user"]
"""Assistant turns of a conversation that become samples: all, or those that follow a user turn."""
NO_CALL = "None of the available tools can help with this request."
"""Target used if a data set's answer is an empty list of calls."""

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_TOOLACE_LEAD_IN = re.compile(r"(?<!\s)\s*+Here is a list of functions in JSON format that you can invoke[:.]?\s*$")
_TOOLRL_NAME = re.compile(r"\d+\. Name: (.*)", re.DOTALL)
_TOOLRL_TAG = re.compile(r"<(user|think|tool_call|obs|response)>")
_GLAIVE_TURN = re.compile(r"^(USER|ASSISTANT|FUNCTION RESPONSE):", re.MULTILINE)
_GLAIVE_OPENING, _GLAIVE_CLOSING = re.compile(r"\"arguments\"\s*+:\s*+'"), re.compile(r"'\s*+}\s*+\Z")
_NO_SPACE = re.compile(r"\S")
_TOOLBENCH_ACTION, _TOOLBENCH_INPUT = "Action:", re.compile(r"\nAction Input: *+")
MAX_MESSAGES = 1000
"""Most messages in a conversation. Each of its samples holds all earlier messages, which takes quadratic memory."""


def samples_from_conversation(
    conversation_id: str, messages: Sequence[Row], tools: tuple[Row, ...], targets: Targets, category: str = ""
) -> list[Sample]:
    """Makes one sample per assistant turn, or per assistant turn after a user turn; other turns are history only.

    Turns without content, turns of weight 0, and turns before the first user turn, which answer nothing, are history
    too. Samples that follow a user turn have the ids "ID", "ID/2", "ID/3", ..., the same for both `targets`. Other
    turns are counted from the last of these: the second turn of "ID" is "ID/1.2", the third of "ID/2" is "ID/2.3".
    """
    if len(messages) > MAX_MESSAGES:
        raise ValueError(f"a conversation of {len(messages)} messages, more than {MAX_MESSAGES}")
    samples: list[Sample] = []
    answers, turn = 0, 0  # turns after a user turn so far; turns since the last of these, inclusive
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), len(messages))
    for i in range(first + 1, len(messages)):
        if messages[i]["role"] != "assistant" or not messages[i]["content"]:
            continue
        after_user = messages[i - 1]["role"] == "user"
        answers, turn = (answers + 1, 1) if after_user else (answers, turn + 1)
        if (not after_user and targets == "after_user") or not _has_weight(messages[i]):
            continue
        number = f"{answers}" if after_user else f"{answers}.{turn}"
        name = conversation_id if number == "1" else f"{conversation_id}/{number}"
        shown, target, before = tuple(messages[:i]), messages[i]["content"], messages[i].get("before_calls", "")
        sample = Sample(id=name, messages=shown, tools=tools, target=target, before_calls=before, category=category)
        if sample.follows_user:
            sample = dataclasses.replace(sample, following=_until_user(messages, i + 1))
        samples.append(sample)
    return [dataclasses.replace(s, conversation=conversation_id) for s in samples] if len(samples) > 1 else samples


def _has_weight(turn: Row) -> bool:
    """Returns whether an assistant turn is to be learned: OpenAI's `weight`, and `train` and `trainable` of others.

    Raises:
        ValueError: a weight between 0 and 1, or of another type.
    """
    for key in ("weight", "train", "trainable"):
        if (weight := turn.get(key)) is None:
            continue
        if weight not in (0, 1):
            raise ValueError(f'"{key}" of an assistant turn must be 0 or 1, got {str(weight)[:40]}')
        if not weight:
            return False
    return True


def has_thought(text: str) -> bool:
    """Returns whether a text begins with a thought, `<think>...</think>`."""
    return text.lstrip().startswith("<think>") and "</think>" in text


def assistant_turn(text: str) -> Row:
    """Returns an assistant message of a text, which may be calls as models with markers write them.

    A thought before the answer, `<think>...</think>`, is dropped: models here answer without thinking.
    """
    if has_thought(text):
        text = text.partition("</think>")[2].lstrip()
    for form in (TAGGED, MISTRAL):
        before, mark, _ = text.partition(form.name)
        if mark and (form.keeps_text or not before.strip()) and (calls := form.read(text)) is not None:
            try:
                message: Row = {"role": "assistant", "content": write_calls(calls)}
            except ValueError:  # a name that a list cannot hold
                break
            return message | ({"before_calls": before.strip()} if before.strip() else {})
    return {"role": "assistant", "content": text}


def _until_user(messages: Sequence[Row], start: int) -> tuple[Row, ...]:
    """Returns the assistant and tool messages from `start` up to the next message of another role."""
    later = itertools.islice(messages, start, None)
    return tuple(itertools.takewhile(lambda message: message["role"] in ("assistant", "tool"), later))


def from_toolace(row: Row, targets: Targets) -> list[Sample]:
    """Converts a ToolACE row (arXiv 2409.00920): {system, conversations: [{from: user|assistant|tool, value}]}.

    The list of tools is cut out of the system text; the rest stays as the system message.
    """
    system = field(row, "system", str)
    tools, start, end = tools_inside(system)
    before, after = _TOOLACE_LEAD_IN.sub("", system[:start]), system[end:].lstrip(". \n")
    messages = [{"role": "system", "content": f"{before}\n{after}".strip()}, *sharegpt_turns(row)]
    return samples_from_conversation(content_id("toolace", row), messages, tool_schemas(tools), targets)


def from_sharegpt(row: Row, targets: Targets) -> list[Sample]:
    """Converts a row of LLaMA-Factory's form, such as its Glaive: {conversations: [{from, value}], tools as JSON text}.

    Turns are from human, gpt, function_call and observation; the row may also have a text `system`.
    """
    # Tables hold None where a row has no tools or system text.
    tools = tool_schemas(field(row, "tools", str, list, NoneType))
    system = field(row, "system", str, NoneType) if "system" in row else None
    messages = [{"role": "system", "content": system}] if system else []
    return samples_from_conversation(content_id("glaive", row), messages + sharegpt_turns(row), tools, targets)


def from_glaive(row: Row, targets: Targets) -> list[Sample]:
    """Converts a row of Glaive as published by its authors, glaive-function-calling-v2: {system, chat}, both texts.

    The system text lists only the functions, one JSON object each. Assistant text before a call is dropped.
    """
    _, brace, listed = field(row, "system", str).partition("{")
    start, *turns = _GLAIVE_TURN.split(field(row, "chat", str))
    if start.strip() or "ASSISTANT" not in turns[::2]:
        raise ValueError('"chat" is not a dialogue of "USER: ..." and "ASSISTANT: ..." turns')
    messages = [_glaive_message(speaker, text) for speaker, text in zip(turns[::2], turns[1::2], strict=True)]
    tools = tool_schemas(_json_values(brace + listed))
    return samples_from_conversation(content_id("glaive", row), messages, tools, targets)


def from_toolbench(row: Row, targets: Targets) -> list[Sample]:
    """Converts a ToolBench ReAct conversation (arXiv 2307.16789): every action, or the first.

    Thoughts and the tool Finish are dropped; an action that gives the final answer becomes that answer.
    """
    turns = sharegpt_turns(row)
    if not turns or turns[0]["role"] != "system":
        raise ValueError('"conversations" does not start with a system turn that lists the APIs')
    listed = [tool for tool in tools_inside(turns[0]["content"])[0] if tool["name"] != "Finish"]
    messages = [
        turn | {"content": _toolbench_answer(turn["content"])} if turn["role"] == "assistant" else turn
        for turn in turns[1:]
    ]
    for message in messages:
        message["content"] = message["content"].strip().removesuffix("Begin!").strip()
    return samples_from_conversation(content_id("toolbench", row), messages, tool_schemas(listed), targets)


def from_xlam(row: Row) -> list[Sample]:
    """Converts an XLAM-60k row (arXiv 2406.18518): {id, query, tools, answers}, the last two JSON texts.

    If the list of answers is empty, the target is `NO_CALL`.
    """
    answers = field(row, "answers", str, list)
    answers = read_json("answers", answers) if isinstance(answers, str) else answers
    if not isinstance(answers, list):
        raise ValueError('"answers" is not a list of calls')
    name = f"xlam-{row['id']}" if "id" in row else content_id("xlam", row)
    tools = tool_schemas(field(row, "tools", str, list))
    target = _bracketed(answers) if answers else NO_CALL
    return [_question(name, field(row, "query", str), tools, target)]


def from_toolrl(row: Row) -> list[Sample]:
    """Converts a ToolRL SFT row (arXiv 2504.13958): {instruction, input, output}, with tools in the instruction."""
    _, heading, rest = field(row, "instruction", str).partition("**Available Tools**")
    listed = rest.partition("\n\n**Steps for Each Turn**")[0]
    tools = tuple(_toolrl_tool(text) for text in re.split(r"\n(?=\d+\. Name: )", listed)[1:])
    if not heading:
        raise ValueError('"instruction" has no list of tools')
    history = [
        _toolrl_message(tag, text.strip()) for tag, text in _toolrl_blocks(field(row, "input", str)) if tag != "think"
    ]
    # The thought may itself mention the tags, so the answer starts after the last thought.
    answers = _toolrl_blocks(field(row, "output", str).rpartition("</think>")[2])
    if not history or not answers:
        raise ValueError('"input" has no dialogue, or "output" has no answer')
    target = _toolrl_message(answers[0][0], answers[0][1].strip())["content"]
    name = content_id("toolrl", row)
    return [Sample(id=name, messages=tuple(history), tools=tools, target=target)]


class SealTools(NamedTuple):
    """Seal-Tools' tools by name, and tool names by field ("Science/Geology") and by area ("Science")."""

    tools: dict[str, Row]
    fields: dict[str, list[str]]
    areas: dict[str, list[str]]
    field_of: dict[str, str]


def seal_tools_entry(row: Row) -> tuple[str, Row]:
    """Returns field and tool of a row of tool.jsonl, {api_name, api_description, field, parameters, required}."""
    name, description = field(row, "api_name", str), field(row, "api_description", str)
    schema = flat_schema(field(row, "parameters", dict), field(row, "required", list))
    return field(row, "field", str), tool_schema({"name": name, "description": description, "parameters": schema})


def seal_tools_catalogue(entries: Iterable[tuple[str, Row]]) -> SealTools:
    """Builds the catalogue from (field, tool) pairs."""
    catalogue = SealTools({}, {}, {}, {})
    for where, tool in entries:
        name = tool["function"]["name"]
        catalogue.tools[name] = tool
        catalogue.field_of[name] = where
        catalogue.fields.setdefault(where, []).append(name)
        catalogue.areas.setdefault(where.partition("/")[0], []).append(name)
    return catalogue


def from_seal_tools(row: Row, catalogue: SealTools, n_candidates: int = 10) -> list[Sample]:
    """Converts a Seal-Tools row (arXiv 2405.08355): {id, query, calling: [{api, parameters}]}.

    Rows name only the gold tools. The candidates are the gold tools plus distractors, first from the same field, then
    from the same area, up to `n_candidates` in all, drawn and shuffled with the row's id as seed. A value such as
    "API_call_2" refers to the output of an earlier call.
    """
    name, calls = field(row, "id", str), field(row, "calling", list)
    calling = [{"name": field(call, "api", str), "arguments": field(call, "parameters", dict)} for call in calls]
    gold = list(dict.fromkeys(call["name"] for call in calling))
    if unknown := [tool for tool in gold if tool not in catalogue.tools]:
        raise ValueError(f'tool "{unknown[0]}" is not in the list of tools')
    rng = random.Random(name)
    candidates = gold + _distractors(gold, catalogue, n_candidates - len(gold), rng)
    rng.shuffle(candidates)
    tools = tuple(catalogue.tools[tool] for tool in candidates)
    target = _bracketed(calling) if calling else NO_CALL
    return [_question(name, field(row, "query", str), tools, target)]


def field(row: Any, key: str, *kinds: type) -> Any:
    """Returns the value of a row's key. Raises ValueError if it is absent or has none of these types."""
    if not isinstance(row, dict) or key not in row or not isinstance(row[key], kinds):
        names = {str: "a string", list: "a list", dict: "an object", NoneType: "null"}
        raise ValueError(f'"{key}" is missing or not {" or ".join(names[kind] for kind in kinds)}')
    return row[key]


def read_json(name: str, text: str) -> Any:
    """Parses a JSON text inside a row. Raises ValueError if it is not valid."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'"{name}" is not valid JSON ({str(error)[:60]})') from error


def _question(name: str, query: str, tools: tuple[Row, ...], target: str) -> Sample:
    return Sample(id=name, messages=({"role": "user", "content": query},), tools=tools, target=target)


def _bracketed(calls: Sequence[Any]) -> str:
    """Writes calls as a bracketed list.

    Some published rows have names that contain parts of values, `"1.5 hours"}], date`. If a name is not allowed in a
    list, the offending characters are removed, so that one such row does not make the data set unusable.
    """
    try:
        return write_calls(calls_from_openai(calls))
    except ValueError:
        cleaned = [
            Call(_clean(call.get("name")), {_clean(key): value for key, value in call["arguments"].items()})
            for call in calls
            if isinstance(call, dict) and isinstance(call.get("arguments"), dict)
        ]
        if len(cleaned) < len(calls):
            raise
        return write_calls(cleaned)


def _clean(name: Any) -> str:
    return " ".join(re.sub(r"[()\[\]{}\"'=,]", " ", str(name)).split()) or "_"


def sharegpt_turns(row: Row) -> list[Row]:
    """Returns the messages of {conversations: [{from, value}]}, calls as a bracketed list."""
    messages = []
    for turn in field(row, "conversations", list):
        speaker, value = field(turn, "from", str), field(turn, "value", str)
        if speaker not in _ROLES:
            raise ValueError(f'a turn is from "{speaker}", expected one of {", ".join(_ROLES)}')
        if speaker == "function_call":
            called = read_json("function_call", value)
            value = _bracketed(called if isinstance(called, list) else [called])
        kept = {key: turn[key] for key in ("weight", "train", "trainable") if turn.get(key) is not None}
        role = _ROLES[speaker]
        shown = assistant_turn(value) if role == "assistant" else {"role": role, "content": _untagged(value)}
        messages.append(shown | kept)
    return messages


def _untagged(text: str) -> str:
    """Returns a tool's result without the `<tool_response>` around it, which chat templates write themselves."""
    inner = text.strip().removeprefix("<tool_response>").removesuffix("</tool_response>")
    return inner.strip("\n") if len(inner) == len(text.strip()) - 31 else text


def _glaive_message(speaker: str, text: str) -> Row:
    role = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}[speaker]
    text = text.replace("<|endoftext|>", "").strip()
    if role == "assistant" and "<functioncall>" in text:
        before, *calls = text.split("<functioncall>")
        text = _bracketed([_glaive_call(call.strip()) for call in calls])
        return {"role": role, "content": text} | ({"before_calls": before.strip()} if before.strip() else {})
    return {"role": role, "content": text}


def _glaive_call(text: str) -> Any:
    """Parses a call, {"name": "f", "arguments": '{"a": 1}'}, which the single quotes keep from being JSON."""
    opening, closing = _GLAIVE_OPENING.search(text), _GLAIVE_CLOSING.search(text)
    if opening and closing and opening.end() <= closing.start():
        unquoted = re.sub(r"(?<!\\)\\'", "'", text[opening.end() : closing.start()])
        text = f"{text[: opening.end() - 1]}{unquoted}}}"
    call = read_json("functioncall", text)
    # Functions without parameters are called without arguments.
    return call | {"arguments": {}} if isinstance(call, dict) and call.keys() == {"name"} else call


def _json_values(text: str) -> list[Any]:
    """Parses the JSON values that follow each other in a text."""
    values, at = [], 0
    while start := _NO_SPACE.search(text, at):
        try:
            value, at = json.JSONDecoder().raw_decode(text, start.start())
        except (ValueError, RecursionError) as error:
            raise ValueError(f'a tool is not valid JSON: "{text[start.start() :][:40]}"') from error
        values.append(value)
    return values


def _toolbench_answer(text: str) -> str:
    action = _toolbench_action(text)
    if not action:
        return text
    arguments = read_json("Action Input", action[1].strip() or "{}")
    if action[0].strip() == "Finish" and isinstance(arguments, dict):
        return str(arguments.get("final_answer") or NO_CALL)
    return _bracketed([{"name": action[0].strip(), "arguments": arguments}])


def _toolbench_action(text: str) -> tuple[str, str] | None:
    r"""Returns name and input of the first action, "Thought: …Action: f\nAction Input: {…}"; None without one."""
    begin = len(text) - len(text.lstrip())
    if not text.startswith(("Thought:", _TOOLBENCH_ACTION), begin):
        return None
    for match in _TOOLBENCH_INPUT.finditer(text):
        line = max(text.rfind("\n", 0, match.start()), begin)
        action = text.find(_TOOLBENCH_ACTION, line, match.start())
        name = text[action + len(_TOOLBENCH_ACTION) : match.start()]
        if action >= 0 and name and (action == begin or text.startswith("Thought:", begin)):
            return name, text[match.end() :]
    return None


def _toolrl_tool(text: str) -> Row:
    head, has_parameters, parameters = text.strip().rpartition("\nParameters: ")
    head, has_description, description = head.rpartition("\nDescription: ")
    name = _TOOLRL_NAME.fullmatch(head)
    if not (has_parameters and has_description and name):
        raise ValueError(f'a tool is not written as Name, Description, Parameters: "{text.strip()[:40]}"')
    schema = flat_schema(read_json("Parameters", parameters))
    return tool_schema({"name": name[1], "description": description, "parameters": schema})


def _toolrl_blocks(text: str) -> list[tuple[str, str]]:
    """Returns tag and content of each block, `<obs>…</obs>`; unclosed blocks are ignored."""
    blocks, end, unclosed = [], 0, set()
    for opening in _TOOLRL_TAG.finditer(text):
        if opening.start() < end or opening[1] in unclosed:
            continue
        close = text.find(f"</{opening[1]}>", opening.end())
        if close < 0:
            unclosed.add(opening[1])
            continue
        blocks.append((opening[1], text[opening.end() : close]))
        end = close
    return blocks


def _toolrl_message(tag: str, text: str) -> Row:
    if tag == "tool_call":
        calls = [read_json("tool_call", line) for line in text.splitlines() if line.strip()]
        calling = [{"name": field(c, "name", str), "arguments": field(c, "parameters", dict)} for c in calls]
        return {"role": "assistant", "content": _bracketed(calling)}
    return {"role": {"user": "user", "obs": "tool", "response": "assistant"}[tag], "content": text}


def _distractors(gold: list[str], catalogue: SealTools, n: int, rng: random.Random) -> list[str]:
    fields = list(dict.fromkeys(catalogue.field_of[tool] for tool in gold))
    areas = list(dict.fromkeys(name.partition("/")[0] for name in fields))
    chosen: list[str] = []
    for pool in ([catalogue.fields[f] for f in fields], [catalogue.areas[a] for a in areas]):
        taken = {*gold, *chosen}
        names = [name for group in pool for name in group if name not in taken]
        chosen += rng.sample(names, min(len(names), max(0, n - len(chosen))))
    return chosen
