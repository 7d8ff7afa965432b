"""Converts Java and JavaScript literals to Python values, by the types that BFCL's functions document.

In: the text of one argument and the documented type. Out: a value. Text that does not fit its type stays text, which
the checker then rejects by type. The patterns accept what the leaderboard's patterns accept; those that could take
exponential time are rewritten.
"""

import re
from collections.abc import Callable
from typing import Any

MAX_CHARACTERS = 2_000
"""Longer collections stay text: the patterns take quadratic time. The benchmark's answers are a tenth as long."""

JAVA_TYPES: dict[str, type] = {
    **dict.fromkeys(("byte", "short", "integer", "long"), int),
    **dict.fromkeys(("float", "double"), float),
    **dict.fromkeys(("char", "String", "any"), str),
    **dict.fromkeys(("Array", "ArrayList", "Queue", "Stack"), list),
    **dict.fromkeys(("HashMap", "Hashtable"), dict),
    "Set": set,
    "boolean": bool,
}
"""Required Python type of a value, by documented Java type."""
JAVASCRIPT_TYPES: dict[str, type] = {
    **dict.fromkeys(("String", "any"), str),
    **dict.fromkeys(("integer", "Bigint"), int),
    "float": float,
    "Boolean": bool,
    "dict": dict,
    "array": list,
}
"""Required Python type of a value, by documented JavaScript type."""

_INTEGER = re.compile(r"-?\d+$")
_LONG = re.compile(r"(-?\d+)[lL]$")
_BIGINT = re.compile(r"(-?\d+)n$")
_DOUBLE = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?$")
_FLOAT = re.compile(r"(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)[fF]$")
_DECIMAL = re.compile(r"-?\d+(?:\.\d+)?$")
_BOOLEANS = {"true": True, "false": False}

_JAVA_AS_LIST = re.compile(r"new\s+ArrayList<\w*>\(Arrays\.asList\((.+?)\)\)")
_JAVA_ADDS = re.compile(r"new\s+ArrayList<\w*>\(\)\s*+\{\{\s*+(.+?)\}\}", re.DOTALL)
_JAVA_ADD = re.compile(r"add\((.+?)\)")
_JAVA_EMPTY_LIST = re.compile(r"new\s+ArrayList<\w*>\(\)")
_JAVA_ARRAY = re.compile(r"new\s+\w+\[\]\s*\{(.*?)\}")
_JAVA_PUTS = re.compile(r"new\s+HashMap<.*?>\s*+\(\)\s*+\{\s*+\{?+\s*+([^}]*+)\}", re.DOTALL)
_JAVA_PUT = re.compile(r'put\("(.*?)",\s*+([^)\n]*+)\)')
_JAVA_EMPTY_MAP = re.compile(r"new\s+HashMap<.*?>\s*+\(\)")

# A row may end anywhere except where the outer bracket closes. Lines may end only between rows.
_ROWS = r"\s*+\[(?>(?:\]\s*+,\s*+\[|(?!\]\s*+%s)[^\n])*)\]\s*+%s"
_JS_MATRIX = re.compile(r"\[" + _ROWS % (r"\]", r"\]") + r"|new\s+Array\(" + _ROWS % (r"\)", r"\)"))
_JS_ROW = re.compile(r"\[(.*?)\]")
_JS_ARRAY = re.compile(r"\[(.*?)\]|new\s+Array\((.*?)\)")
_JS_OBJECT = re.compile(r"\{(.*?)\}")
_JS_PAIR = re.compile(r"([^:]+):\s*(.*?)(?:,\s*(?=[^,]+:)|$)")


def java_value(text: str, kind: str, item_kind: str | None = None) -> Any:
    """Converts Java text of the documented type `kind`, a key of `JAVA_TYPES`, with items of type `item_kind`."""
    match kind:
        case "byte" | "short" | "integer":
            return _number(int, _INTEGER, text)
        case "long":
            return _number(int, _LONG, text)
        case "float":
            return _number(float, _FLOAT, text)
        case "double":
            return _number(float, _DOUBLE, text)
        case "boolean":
            return _BOOLEANS.get(text, text)
    if len(text) > MAX_CHARACTERS:
        return text
    match kind:
        case "ArrayList":
            return _java_list(text, item_kind)
        case "Array":
            return _java_array(text, item_kind)
        case "HashMap":
            return _java_map(text)
    return text


def javascript_value(text: str, kind: str, item_kind: str | None = None) -> Any:
    """Converts JavaScript text of the type `kind`, a key of `JAVASCRIPT_TYPES`, with items of type `item_kind`."""
    match kind:
        case "String":
            return _unquoted(text, "\"'")
        case "integer":
            return _number(int, _INTEGER, text)
        case "float":
            return _number(float, _DECIMAL, text)
        case "Bigint":
            return _number(int, _BIGINT, text)
        case "Boolean":
            return _BOOLEANS.get(text, text)
    if len(text) > MAX_CHARACTERS:
        return text
    match kind:
        case "dict":
            return _javascript_object(text.strip())
        case "array":
            return _javascript_array(text.strip(), item_kind)
    return text


def _number(of: type, pattern: re.Pattern[str], text: Any) -> Any:
    match = pattern.match(text) if isinstance(text, str) else None
    try:
        return of(match[match.lastindex or 0]) if match else text
    except ValueError:  # Python limits the number of digits
        return text


def _unquoted(text: str, quotes: str) -> str:
    """Removes the quotes around `text`; a lone quote counts as both."""
    return text[1:-1] if text[:1] in tuple(quotes) and text.endswith(text[0]) else text


def _plain(text: str, quotes: str, special: Callable[[str], Any]) -> Any:
    """Converts a scalar of undocumented type: boolean, string, whatever `special` reads, number, or the text itself."""
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if text[:1] in tuple(quotes) and text.endswith(text[0]):
        return text[1:-1]
    value = special(text)
    if value != text:
        return value
    for of in (int, float):
        try:
            return of(text)
        except ValueError:
            continue
    return text


def _java_plain(text: str) -> Any:
    return _plain(text, '"', lambda number: _number(int, _LONG, _number(float, _FLOAT, number)))


def _javascript_plain(text: str) -> Any:
    return _plain(text.strip(), "\"'", str)


def _java_list(text: str, item_kind: str | None) -> Any:
    if match := _JAVA_AS_LIST.search(text):
        return [_java_item(item.strip(), item_kind) for item in match[1].split(",")]
    if match := _JAVA_ADDS.search(text):
        return [_java_item(item.strip(), item_kind) for item in _JAVA_ADD.findall(match[1])]
    return [] if _JAVA_EMPTY_LIST.search(text) else text


def _java_item(text: str, kind: str | None) -> Any:
    if kind in ("char", "String"):
        return text[1:-1]
    return java_value(text, kind) if kind else _java_plain(text)


def _java_array(text: str, item_kind: str | None) -> Any:
    if not (match := _JAVA_ARRAY.search(text)):
        return text
    items = [item.strip() for item in match[1].split(",") if item.strip()]
    return [java_value(item, item_kind) if item_kind else _java_plain(item) for item in items]


def _java_map(text: str) -> Any:
    if match := _JAVA_PUTS.search(text):
        return {key: _java_plain(value.strip()) for key, value in _JAVA_PUT.findall(match[1])}
    return {} if _JAVA_EMPTY_MAP.search(text) else text


def _javascript_array(text: str, item_kind: str | None) -> Any:
    if match := _JS_MATRIX.match(text):
        rows = [row.strip() for row in _JS_ROW.findall(match[0])]
        rows[0] = rows[0].removeprefix("[")
        return [[_javascript_plain(item) for item in row.split(",")] for row in rows]
    if not (match := _JS_ARRAY.match(text)):
        return text
    inside = (match[1] if match[1] is not None else match[2]).strip()
    items = [item.strip() for item in inside.split(",")] if inside else []
    return [javascript_value(item, item_kind) if item_kind else _javascript_plain(item) for item in items]


def _javascript_object(text: str) -> Any:
    if not (match := _JS_OBJECT.match(text)):
        return text
    pairs = _JS_PAIR.findall(match[1])
    return {key.strip().strip("'\""): _javascript_member(value.strip()) for key, value in pairs}


def _javascript_member(text: str) -> Any:
    if text.startswith("[") and text.endswith("]"):
        return _javascript_array(text, None)
    if text.startswith("{") and text.endswith("}"):
        return _javascript_object(text)
    return _javascript_plain(text.strip("'\""))
