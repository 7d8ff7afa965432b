"""Converts rows of the API-Bank and BFCL benchmarks to samples, one function per data form.

In: a row as published. Out: samples. Samples of test sets are used to find their questions and tools among training
samples; the answers between the turns of a BFCL dialogue are unknown. A row of another form raises ValueError with the
reason; the caller adds the file name and row.
"""

import ast
import dataclasses
import re
from typing import Any

from itool_jax.data.formats import field, read_json
from itool_jax.data.schemas import flat_schema, tool_schema, tool_schemas
from itool_jax.text.calls import read_calls
from itool_jax.text.sample import Row, Sample, content_id

MAX_CHARACTERS = 200_000
"""Most characters in a dialogue, which is assembled line by line in quadratic time."""
_API_BANK_BARE = re.compile(r"\b(\w++)=([^'\"\[{(][^,=)]*+)(?=[,)])")


def from_bfcl(row: Row) -> list[Sample]:
    """Converts a BFCL v3 question: {id, question: a list of turns, each a list of messages, function}.

    Each turn becomes a sample without a target. Multi-turn rows list no functions.
    """
    name, tools = field(row, "id", str), tool_schemas(row.get("function"))
    messages: list[Row] = []
    samples: list[Sample] = []
    for turn in field(row, "question", list):
        if not turn:  # a turn that only adds a function
            continue
        messages += [{key: field(message, key, str) for key in ("role", "content")} for message in turn]
        number = f"/{len(samples) + 1}" if samples else ""
        samples.append(Sample(id=f"{name}{number}", messages=tuple(messages), tools=tools))
    return samples


def from_api_bank_test(row: Row) -> list[Sample]:
    """Converts an API-Bank test of level 1 or 2: {file, id, instruction (with the APIs), input, expected_output}."""
    listed = field(row, "instruction", str).partition("API descriptions:")[2]
    dialogue = {"input": f"{listed}\n{field(row, 'input', str)}", "output": field(row, "expected_output", str)}
    return [dataclasses.replace(sample, id=f"{row['file']}/{row['id']}") for sample in from_api_bank(dialogue)]


def from_api_bank(row: Row) -> list[Sample]:
    """Converts an API-Bank level-3 training row (arXiv 2304.08244): {instruction, input, output}.

    The tools are ToolSearcher and those that earlier searches of the dialogue found. Unquoted values are quoted.
    """
    head, separator, dialogue = field(row, "input", str).partition("\nUser: ")
    if not separator:
        raise ValueError('"input" has no user turn as in API-Bank; Alpaca\'s form is not read, see docs/your-data.md')
    if len(dialogue) > MAX_CHARACTERS:
        raise ValueError(f"a dialogue of {len(dialogue)} characters, more than {MAX_CHARACTERS}")
    tools = [_api_bank_tool(read_json("input", line)) for line in head.splitlines() if line.strip()]
    messages: list[Row] = [{"role": "user", "content": ""}]
    for line in dialogue.partition("\nGenerate API Request:")[0].split("\n"):
        request, _, result = line.partition("->")
        if line.startswith("API-Request:"):
            messages.append({"role": "assistant", "content": _api_bank_call(request)})
            messages.append({"role": "tool", "content": result})
            tools += [_api_bank_tool(tool) for tool in _api_bank_found(result)]
        elif line.startswith(("AI: ", "User: ")):
            speaker, _, content = line.partition(": ")
            messages.append({"role": "assistant" if speaker == "AI" else "user", "content": content})
        else:
            messages[-1]["content"] = f"{messages[-1]['content']}\n{line}".strip()
    distinct = {tool["function"]["name"]: tool for tool in tools}
    target = _api_bank_call(field(row, "output", str))
    name = content_id("api-bank", row)
    return [Sample(id=name, messages=tuple(messages), tools=tuple(distinct.values()), target=target)]


def _api_bank_tool(tool: Any) -> Row:
    if not isinstance(tool, dict):
        raise ValueError("a tool is not an object")
    name = tool.get("apiCode") or tool.get("name")
    parameters = tool.get("input_parameters", tool.get("parameters", {}))
    return tool_schema({"name": name, "description": tool.get("description"), "parameters": flat_schema(parameters)})


def _api_bank_found(result: str) -> list[Row]:
    """Returns the tools in a call's result; a result that is not a Python literal has none."""
    try:
        value = ast.literal_eval(result)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return []
    # Some results list a tool's parameters as a set, without types; such tools cannot be described.
    return [
        tool
        for tool in (value if isinstance(value, list) else [value])
        if isinstance(tool, dict) and "name" in tool and isinstance(tool.get("input_parameters"), dict)
    ]


def _api_bank_call(request: str) -> str:
    call = request.strip().removeprefix("API-Request:").strip()
    call = call if call.startswith("[") else f"[{call}]"
    if read_calls(call) is None:
        quoted = _API_BANK_BARE.sub(lambda match: f"{match[1]}={match[2].strip()!r}", call)
        return quoted if read_calls(quoted) is not None else call
    return call
