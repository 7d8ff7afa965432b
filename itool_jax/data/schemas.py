"""Converts tool definitions of many dialects to OpenAI tool schemas.

In: definitions as data sets write them: bare functions, flat parameters, Python's types, lists inside texts.
Out: {"type": "function", "function": {"name", "description", "parameters": JSON schema}}. A definition already in this
form is returned unchanged, except for what chat templates rely on: a missing description becomes "", missing parameters
an object without properties.
"""

import ast
import itertools
import json
import re
from typing import Any

from itool_jax.text.sample import Row

MAX_TYPE = 1000
"""Most characters in a type's name; brackets in it take quadratic time."""
MAX_PLACES = 100
"""Most positions in a text where a list of tools is searched for; each may take time linear in the text."""
_JSON_TYPES = ("string", "integer", "number", "boolean", "object", "array", "null")
_PYTHON_TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "double": "number",
    "bool": "boolean",
    "dict": "object",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "none": "null",
}


def json_type(name: str) -> Row:
    """Returns the JSON schema of a Python type name: "List[int]" → {"type": "array", "items": {"type": "integer"}}.

    "X, optional" and "Optional[X]" become X. A name without a JSON type, such as "Any", becomes a string.
    """
    if len(name) > MAX_TYPE:
        return {"type": "string"}
    name = name.strip().removesuffix("optional").rstrip(" ,")
    head, _, inside = name.partition("[")
    kind = head.strip().rpartition(".")[2].lower()
    arguments = _type_arguments(inside.strip().removesuffix("]"))
    if kind == "optional" and arguments:
        return json_type(arguments[0])
    if kind in ("union", "") and arguments:
        return _union([json_type(argument) for argument in arguments])
    mapped = kind if kind in _JSON_TYPES else _PYTHON_TYPES.get(kind, "string")
    if mapped == "array" and arguments:
        return {"type": "array", "items": _union([json_type(argument) for argument in arguments])}
    return {"type": mapped}


def json_schema(schema: Row) -> Row:
    """Replaces Python type names at every level of a schema; a proper JSON schema is unchanged."""
    out: Row = {}
    for key, value in schema.items():
        if key == "type" and isinstance(value, str):
            out |= json_type(value)
        elif key == "properties" and isinstance(value, dict):
            # Tables hold None for properties that a tool lacks.
            kept = {name: item for name, item in value.items() if item is not None}
            out[key] = {name: _property(item) for name, item in kept.items()}
            flagged = [name for name, item in kept.items() if isinstance(item, dict) and item.get("required") is True]
            if flagged and not isinstance(schema.get("required"), list):
                out["required"] = flagged
        elif key == "items" and isinstance(value, dict):
            out[key] = json_schema(value)
        elif (key in ("required", "enum", "items") and value is None) or (key == "required" and "required" in out):
            continue
        else:
            out[key] = value
    return out


def _property(schema: Any) -> Any:
    """Returns the schema of a property; a flag "required" of its own belongs to the object that has the property."""
    if not isinstance(schema, dict):
        return schema
    return json_schema({k: v for k, v in schema.items() if k != "required" or not isinstance(v, bool)})


def flat_schema(parameters: Any, required: list[str] | None = None) -> Row:
    """Returns the JSON schema of parameters written as {name: {"type", "description", "default"}}.

    Without `required`, a parameter is required if its own "required" is true; where it has none, unless its type says
    "optional" or it has a default. Raises ValueError if the parameters or one of them is not an object.
    """
    if not isinstance(parameters, dict):
        raise ValueError("the parameters of a tool are not an object")
    properties: Row = {}
    needed: list[str] = []
    for name, parameter in parameters.items():
        if not isinstance(parameter, dict):
            raise ValueError(f'the description of parameter "{name}" is not an object')
        written, flag = str(parameter.get("type", "string")), parameter.get("required")
        own = ("type", "default", "required") if isinstance(flag, bool) else ("type", "default")
        schema = json_schema({"type": written} | {k: v for k, v in parameter.items() if k not in own})
        # In these data sets, an empty default means no default.
        if has_default := parameter.get("default") not in ("", None):
            schema["default"] = _typed(parameter["default"], schema.get("type"))
        if flag if isinstance(flag, bool) else not has_default and "optional" not in written.lower():
            needed.append(name)
        properties[name] = schema
    return {"type": "object", "properties": properties, "required": needed if required is None else required}


def tool_schema(tool: Any) -> Row:
    """Returns the OpenAI tool schema of one definition: a tool schema, or a bare function, parameters flat or not.

    Raises:
        ValueError: the definition has no name, or parts whose types no chat template can write.
    """
    wrapped = isinstance(tool, dict) and isinstance(tool.get("function"), dict)
    function = tool["function"] if wrapped else tool
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f'a tool has no "name": {json.dumps(tool, default=str)[:80]}')
    # Some ToolACE definitions call them arguments.
    parameters = function.get("parameters", function.get("arguments"))
    if parameters is not None and not isinstance(parameters, dict):
        raise ValueError(f'the parameters of tool "{function["name"]}" are not an object')
    schema = json_schema(parameters or {"type": "object"}) if wrapped else _parameters(parameters or {})
    # ToolACE writes "required" beside the parameters.
    if not wrapped and function.get("required") and "required" not in schema:
        schema["required"] = function["required"]
    if schema.get("type") == "object" and schema.get("properties") is None:
        schema["properties"] = {}
    named = {"name": function["name"], "description": function.get("description") or "", "parameters": schema}
    _check_types(named)
    if not wrapped:
        return {"type": "function", "function": named}
    # A tool schema keeps all its keys, in their order.
    return {**({} if "type" in tool else {"type": "function"}), **tool, "function": function | named}


def tool_schemas(tools: Any) -> tuple[Row, ...]:
    """Returns the schemas of a list of definitions, which may be None or a JSON text. Raises ValueError for others."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools or "[]")
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise ValueError(f'"tools" is not valid JSON ({reason[:60]})') from error
    if not isinstance(tools, list | tuple | None):
        raise ValueError('"tools" is not a list')
    return tuple(tool_schema(tool) for tool in tools or ())


def tools_inside(text: str) -> tuple[list[Any], int, int]:
    """Finds the list of tool definitions inside a system text, as JSON or as Python writes it.

    Returns:
        The list and the positions of its start and end; ([], len, len) if there is none.
    """
    for match in itertools.islice(re.finditer(r"\[\s*+(\{|\])", text), MAX_PLACES):
        start = match.start()
        try:
            tools, end = json.JSONDecoder().raw_decode(text, start)
        except (ValueError, RecursionError):
            tools, end = _python_list(text, start)
        if isinstance(tools, list) and all(isinstance(tool, dict) and "name" in tool for tool in tools):
            return tools, start, end
    return [], len(text), len(text)


def _check_types(function: Row) -> None:
    schema = function["parameters"]
    parts = ((function, "description", str, "a string"), (schema, "properties", dict, "an object"))
    for part, key, kind, name in (*parts, (schema, "required", list, "a list")):
        if key in part and not isinstance(part[key], kind):
            raise ValueError(f'"{key}" of tool "{function["name"]}" is not {name}')


def _parameters(parameters: Row) -> Row:
    # A flat parameter may itself be named "type" or "properties"; its value is then an object.
    full = isinstance(parameters.get("type"), str) or ("properties" in parameters and "type" not in parameters)
    return json_schema(parameters) if full else flat_schema(parameters)


def _python_list(text: str, start: int) -> tuple[Any, int]:
    end = text.rfind("]") + 1
    try:
        return ast.literal_eval(text[start:end]), end
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None, start


def _type_arguments(inside: str) -> list[str]:
    """Splits at the commas outside brackets: "int, List[str, int]" → ["int", "List[str, int]"]."""
    parts, depth = [""], 0
    for character in inside:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip(" '\"") for part in parts if part.strip(" '\".")]


def _union(schemas: list[Row]) -> Row:
    kinds = list(dict.fromkeys(json.dumps(schema) for schema in schemas))
    if len(kinds) == 1:
        return schemas[0]
    if all(set(schema) == {"type"} and isinstance(schema["type"], str) for schema in schemas):
        return {"type": list(dict.fromkeys(schema["type"] for schema in schemas))}
    return {"anyOf": [json.loads(kind) for kind in kinds]}


def _typed(default: Any, kind: Any) -> Any:
    """Converts a default written as text, "3", to a value of its type, 3; returns it unchanged if it is not one."""
    if not isinstance(default, str) or kind not in ("integer", "number", "boolean", "object", "array"):
        return default
    try:
        value = json.loads(default.lower() if kind == "boolean" else default)
    except (ValueError, RecursionError):
        return default
    expected = {"integer": int, "number": int | float, "boolean": bool, "object": dict, "array": list}[kind]
    return value if isinstance(value, expected) else default
