"""Tool formats: how a prompt lists tools, and how an answer writes calls.

Samples hold calls in one canonical form, `[f(a=1)]` (see `text.calls`). A form here writes those calls as a model
writes them, and reads them back; `text.chat` uses it for targets, conversations and answers alike. Three native forms
are known: those of the chat templates of Qwen and Hermes, of Llama 3.1, and of Mistral.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from itool_jax.text.call_checks import signature
from itool_jax.text.calls import Call, contains_call, read_calls, write_calls

ToolFormat = Literal["auto", "brackets", "json", "native"]
ToolStyle = Literal["schema", "signature"]
Tool = Mapping[str, Any]

TAG = "<tool_call>"
_TAGGED = re.compile(r"<tool_call>\s*+(.*?)\s*+</tool_call>", re.DOTALL)
_SHARED_RULES = (
    "Give every required parameter, and optional ones only where they are needed. "
    "If no function fits, or a required value is unknown, answer with text instead."
)


class Form(NamedTuple):
    """One way of writing calls. `read` returns None for anything else, as `read_calls` does."""

    name: str
    example: str
    write: Callable[[Sequence[Call]], str]
    read: Callable[[str], list[Call] | None]
    opening: str
    """The characters one of which begins an answer with calls."""
    call_depth: int
    """Depth of brackets to which a call returns when it ends."""
    argument_depth: int
    """Depth of brackets at which commas separate arguments."""
    keeps_text: bool = False
    """Whether text can precede the calls in the same answer."""
    instruction: str = ""
    """What the system message says about answers, where the template does not."""
    parser: str = ""
    """vLLM's `--tool-call-parser` for it; empty if there is none."""


def _write_json(calls: Sequence[Call], arguments: str = "arguments") -> list[str]:
    return [json.dumps({"name": name, arguments: given}, ensure_ascii=False) for name, given in calls]


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError(digits)
    return number


_DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)


def _read_json(text: str) -> Any:
    """Parses JSON; None for anything else, including numbers that are not finite."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None


def _from_objects(objects: Any) -> list[Call] | None:
    """Converts `{"name", "arguments"}` objects; None if there are none, or one is something else."""
    calls = []
    for one in objects if isinstance(objects, list) else ():
        given = one.get("arguments", one.get("parameters")) if isinstance(one, dict) else None
        if not isinstance(given, dict) or not isinstance(one.get("name"), str):
            return None
        calls.append(Call(one["name"], given))
    return calls or None


def _read_tagged(text: str) -> list[Call] | None:
    bodies, outside = _TAGGED.findall(text), _TAGGED.sub("", text)
    if not bodies or contains_call(outside) or text.rpartition("</tool_call>")[2].strip():
        return None
    return _from_objects([_read_json(body) for body in bodies])


def _read_objects(text: str) -> list[Call] | None:
    """Reads JSON objects with semicolons in between."""
    objects, rest = [], text.strip()
    while rest:
        try:
            one, end = _DECODER.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        objects.append(one)
        rest = rest[end:].lstrip()
        if rest and not (rest.startswith(";") and rest[1:].strip()):
            return None
        rest = rest[1:].lstrip()
    return _from_objects(objects)


def _read_mistral(text: str) -> list[Call] | None:
    return _from_objects(_read_json(text.strip().removeprefix("[TOOL_CALLS]")))


BRACKETS = Form(
    "brackets",
    '[f(x=1), g(y="a")]',
    write_calls,
    read_calls,
    "[",
    1,
    2,
    instruction="You can call the functions below. To call them, answer with nothing but a list such as "
    f'[function_name(parameter=value, other="text"), ...], with Python literals as values. {_SHARED_RULES}',
    parser="pythonic",
)
JSON = Form(
    "json",
    '[{"name": "f", "arguments": {"x": 1}}]',
    lambda calls: f"[{', '.join(_write_json(calls))}]",
    lambda text: _from_objects(_read_json(text)),
    "[",
    1,
    3,
    instruction="You can call the functions below. To call them, answer with nothing but a JSON list such as "
    f'[{{"name": "function_name", "arguments": {{"parameter": value}}}}, ...]. {_SHARED_RULES}',
)
TAGGED = Form(
    TAG,
    '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
    lambda calls: "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in _write_json(calls)),
    _read_tagged,
    "<",
    0,
    3,
    keeps_text=True,
    parser="hermes",
)
LLAMA = Form(
    "Llama 3.1's JSON",
    '{"name": "f", "parameters": {"x": 1}}',
    lambda calls: "; ".join(_write_json(calls, "parameters")),
    _read_objects,
    "{",
    0,
    2,
    parser="llama3_json",
)
MISTRAL = Form(
    "[TOOL_CALLS]",
    '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]',
    lambda calls: f"[TOOL_CALLS][{', '.join(_write_json(calls))}]",
    _read_mistral,
    "[",
    1,
    3,
    parser="mistral",
)
NATIVE = (TAGGED, LLAMA, MISTRAL, BRACKETS)
"""Forms that chat templates write; `BRACKETS` too, as the embedded model's template does."""

PROBE = (Call("probe_tool", {"first": "a", "second": 2}),)
PROBES = (*PROBE, Call("other_tool", {}))


def recognise(rendered: str) -> Form | None:
    """Returns the form in which a rendered conversation holds `PROBE` as its last turn, None if in none of them."""
    for form in NATIVE:
        if form.write(PROBE) in rendered:
            return form
    if "[TOOL_CALLS]" in rendered and PROBE[0].name in rendered.rpartition("[TOOL_CALLS]")[2]:
        return MISTRAL  # its calls also have ids, which differ by template
    return None


def read_any(text: str) -> list[Call] | None:
    """Reads calls written in any of the forms; None if there are none."""
    return next((calls for form in (*NATIVE, JSON) if (calls := form.read(text)) is not None), None)


def describe(form: Form, tools: Sequence[Tool], style: ToolStyle) -> str:
    """Writes the part of the system message that lists the tools and says what an answer looks like."""
    lines = [_signature_line(tool) if style == "signature" else json.dumps(tool, ensure_ascii=False) for tool in tools]
    return "\n".join([form.instruction, "", "Functions:", *lines])


def _signature_line(tool: Tool) -> str:
    function = tool.get("function", tool)
    about = " ".join(str(function.get("description") or "").split())
    return signature(function) + (f" - {about}" if about else "")
