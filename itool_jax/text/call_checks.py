"""Checks calls against the available tools, and makes up stub results for tools.

In: calls, as `text.calls` reads them, and OpenAI tool schemas. Out: one line per fault; a stub result to try a model
with. Nothing is run.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from itool_jax.system.untrusted import MAX_DEPTH
from itool_jax.text.calls import Call

Tool = Mapping[str, Any]

_KINDS: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_EXAMPLES: dict[str, Any] = {"string": "text", "integer": 1, "number": 1.0, "boolean": True, "null": None}


def find(name: str, tools: Sequence[Tool]) -> Tool | None:
    """Finds the function of that name among tools or bare functions: its name, description and parameters."""
    functions = (tool.get("function", tool) for tool in tools)
    return next((function for function in functions if function["name"] == name), None)


def faults(call: Call, tools: Sequence[Tool]) -> list[str]:
    """Lists what is wrong with a call, one line per fault; empty if it fits the schema.

    Checks the function, required and unknown arguments, and the type and `enum` of each value; ignores anything else
    that a schema may require.
    """
    function = find(call.name, tools)
    if function is None:
        close = difflib.get_close_matches(call.name, [tool["function"]["name"] for tool in tools], 1)
        return [f"unknown function {call.name}" + (f"; did you mean {close[0]}?" if close else "")]
    schema = function.get("parameters") or {}
    known = schema.get("properties") or {}
    lines = [f"argument {name} is missing" for name in schema.get("required") or () if name not in call.arguments]
    for name, value in call.arguments.items():
        if name not in known:
            lines.append(f"unknown argument {name}")
        elif isinstance(known[name], Mapping):
            lines += _value_faults(name, value, known[name])
    return lines


def stub(name: str, tools: Sequence[Tool]) -> str:
    """Returns a stub result as JSON: an example of the function's `response` schema if any, else {"ok": true}."""
    function = find(name, tools) or {}
    schema = function.get("response", function.get("returns"))
    if not isinstance(schema, Mapping):
        return json.dumps({"ok": True})
    return json.dumps(_example(schema, 0), ensure_ascii=False)


def signature(function: Tool) -> str:
    """Formats a function as `name(city: string, days: integer?)`; a question mark marks optional parameters."""
    schema = function["parameters"]
    required = schema.get("required") or ()
    parts = [
        f"{name}: {_type(one)}{'' if name in required else '?'}"
        for name, one in (schema.get("properties") or {}).items()
    ]
    return f"{function['name']}({', '.join(parts)})"


def _type(schema: Any) -> str:
    kind = schema.get("type", "any") if isinstance(schema, Mapping) else "any"
    return "|".join(map(str, kind)) or "any" if isinstance(kind, list) else str(kind)


def _value_faults(name: str, value: Any, schema: Mapping[str, Any]) -> list[str]:
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    known = [_KINDS[kind] for kind in kinds if isinstance(kind, str) and kind in _KINDS]
    # True is an int in Python, but not in a schema.
    fits = any(isinstance(value, kind) and (not isinstance(value, bool) or bool in kind) for kind in known)
    if known and len(known) == len(kinds) and not fits:
        kind = _type(schema)
        return [f"argument {name} must be {'an' if kind.startswith(('a', 'i', 'o')) else 'a'} {kind}"]
    options = schema.get("enum")
    if isinstance(options, list) and value not in options:
        return [f"argument {name} must be one of {', '.join(map(str, options))}"]
    return []


def _example(schema: Any, depth: int) -> Any:
    """Returns a minimal value that matches a JSON schema."""
    if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
        return None
    options = schema.get("enum")
    if isinstance(options, list) and options:
        return options[0]
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if isinstance(properties := schema.get("properties"), Mapping) or kind in ("object", "dict"):
        return {str(name): _example(one, depth + 1) for name, one in (properties or {}).items()}
    if kind == "array":
        return [_example(schema["items"], depth + 1)] if "items" in schema else []
    return _EXAMPLES.get(str(kind), "text")
