"""Reads, writes and compares lists of function calls.

In: any text, such as `[get_weather(city="Paris", days=3), Market Trends API(ok=true)]`, or the `tool_calls`
of OpenAI messages.
Out: `Call` records, their canonical text, and whether two lists hold the same calls.

The reader never raises, takes time linear in the text's length, and evaluates nothing.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

MAX_DEPTH = 64  # levels of lists and dicts inside one argument

_SPACE = re.compile(r"\s*+")
# Real tool names contain spaces, apostrophes and parentheses: `Today's Quiz`, `Forecast (Nowcast)`. A name does not
# begin with a quote, so that a list of strings is not a call list. Possessive repeats keep a failed match linear. White
# space is skipped before a match, so that a name is never only white space. Repeated groups are atomic, (?>(?:…)*),
# instead of possessive, (?:…)*+, which Python 3.11.2 matches wrongly.
_NAME = re.compile(r"(?!')[^()\[\]{}\"=,\n]++(?>(?:\((?=\S)[^()\[\]{}\"=,\n]++\)[^()\[\]{}\"=,\n]*+)*)")
_KEYWORD = re.compile(r"[^()\[\]{}\"'=,\n]++")
_STRING = re.compile(r"\"(?>(?:[^\"\\]++|\\.)*)\"|'(?>(?:[^'\\]++|\\.)*)'", re.DOTALL)
_NUMBER = re.compile(r"[+-]?+(?:(?:0|[1-9][0-9]*+)(?>(?:\.[0-9]*+)?)|\.[0-9]++)(?>(?:[eE][+-]?+[0-9]++)?)")
_WORD = re.compile(r"(?:True|true|False|false|None|null)\b")
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|U00(?:0[0-9a-fA-F]|10)[0-9a-fA-F]{4}|.)", re.DOTALL)

_ANY_CALL = re.compile(
    r"<tool_call>|\[TOOL_CALLS\]|<\|python_tag\|>|<function="
    r"|\"name\"\s*+:\s*+\"[^\"]*+\"\s*+,\s*+\"(?:arguments|parameters)\"\s*+:"
    r"|\[\s*+[^()\[\]{}\"'=,\n]{1,100}\(\s*+(?:\)|[^()\[\]{}\"'=,\n]{1,100}=)"
)

_WORDS = {"True": True, "true": True, "False": False, "false": False, "None": None, "null": None}
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0", "\n": ""}
_ESCAPED |= {character: character for character in "\\'\"/"}


class Call(NamedTuple):
    """One function call. `==` compares as Python does (1 == 1.0 == True); `same_calls` also compares types."""

    name: str
    arguments: dict[str, Any]


class _UnreadableError(Exception):
    """The text is not a list of calls."""


def read_calls(text: str) -> list[Call] | None:
    """Reads the calls in `text`; returns None unless it is exactly one bracketed list of at least one call.

    Values are Python or JSON literals. Tuples read as lists, and the last of repeated keywords counts. White space
    between tokens and a trailing comma are allowed. Positional arguments, bare words as values (`city=Paris`), numbers
    with leading zeros, infinities and nesting beyond `MAX_DEPTH` are unreadable: a reward that accepted an unquoted
    word as a string would teach a policy to leave quotes out.
    """
    try:
        return _Reader(text).calls()
    except _UnreadableError:
        return None


def looks_like_calls(text: str) -> bool:
    """Returns whether `text` attempts a call list, readable or not: it begins with `[` after white space."""
    return text.lstrip().startswith("[")


def contains_call(text: str) -> bool:
    """Returns whether `text` contains a call anywhere, in any of the forms that models write.

    These are a bracketed list, `[f(a=1)]` or `[f()]`; JSON with a name and arguments or parameters; and the markers of
    Qwen, Hermes, Mistral and Llama.
    """
    return looks_like_calls(text) or _ANY_CALL.search(text) is not None


def write_calls(calls: Sequence[Call]) -> str:
    """Writes calls as canonical text, `[f(a="x", b=1), g()]`, which `read_calls` reads back to the same calls.

    Raises ValueError if there are no calls, or for a name or value that a call list cannot hold.
    """
    if not calls:
        raise ValueError("a call list needs at least one call, got none")
    return "[" + ", ".join(_written_call(call) for call in calls) + "]"


def calls_from_openai(tool_calls: Sequence[Any]) -> list[Call]:
    """Converts OpenAI `tool_calls` entries, or bare `{"name", "arguments"}` objects, to calls.

    Arguments are JSON text or a dict. Raises ValueError, naming the entry, if one is malformed or cannot be written as
    a call.
    """
    calls = []
    for number, entry in enumerate(tool_calls, start=1):
        try:
            call = _openai_call(entry)
            _written_call(call)
        except ValueError as error:
            raise ValueError(f"tool call {number}: {error}") from None
        calls.append(call)
    return calls


def same_calls(a: Sequence[Call], b: Sequence[Call]) -> bool:
    """Compares `a` and `b` as multisets with typed values: 1, 1.0, "1" and True all differ."""
    return Counter(map(_call_key, a)) == Counter(map(_call_key, b))


def value_key(value: Any) -> Hashable:
    """Returns a hashable key that is equal only for the same typed value; the order in a dict is ignored."""
    match value:
        case list() | tuple():
            return "list", tuple(map(value_key, value))
        case dict():
            return "dict", frozenset((value_key(key), value_key(item)) for key, item in value.items())
        case float():
            return "float", repr(value + 0.0)  # repr makes nan equal itself; adding 0.0 makes -0.0 equal 0.0
        case _:
            return type(value).__name__, value


def _call_key(call: Call) -> Hashable:
    return call.name, value_key(call.arguments)


class _Reader:
    """A cursor over one text; each method reads one item and moves past it, or raises `_UnreadableError`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def calls(self) -> list[Call]:
        self.expect("[")
        calls = []
        while not self.accept("]"):
            calls.append(self.call())
            self.separator("]")
        if not calls or self.at != len(self.text):
            raise _UnreadableError
        return calls

    def call(self) -> Call:
        name = self.match(_NAME).strip()
        self.expect("(")
        arguments = {}
        while not self.accept(")"):
            keyword = self.match(_KEYWORD).strip()
            self.expect("=")
            arguments[keyword] = self.value(0)
            self.separator(")")
        return Call(name, arguments)

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise _UnreadableError
        if self.accept("["):
            return self.items("]", depth)[0]
        if self.accept("{"):
            return self.dictionary(depth)
        if self.accept("("):
            items, comma = self.items(")", depth)
            return items[0] if len(items) == 1 and not comma else items  # (1) is 1 and (1,) is a tuple
        return self.scalar()

    def items(self, close: str, depth: int) -> tuple[list[Any], bool]:
        """Reads items up to `close`, and whether a comma follows the last one."""
        items, comma = [], False
        while not self.accept(close):
            items.append(self.value(depth + 1))
            comma = self.separator(close)
        return items, comma

    def dictionary(self, depth: int) -> dict[Any, Any]:
        items = {}
        while not self.accept("}"):
            key = self.scalar()
            self.expect(":")
            items[key] = self.value(depth + 1)
            self.separator("}")
        return items

    def scalar(self) -> Any:
        character = self.text[self.at : self.at + 1]
        if character in ("'", '"'):
            return _unescaped(self.match(_STRING)[1:-1])
        if character.isalpha():
            return _WORDS[self.match(_WORD)]
        return _number(self.match(_NUMBER))

    def match(self, pattern: re.Pattern[str]) -> str:
        """Returns the text that `pattern` matches here, and skips white space after it."""
        matched = pattern.match(self.text, self.at)
        if matched is None:
            raise _UnreadableError
        self.skip_space(matched.end())
        return matched[0]

    def accept(self, mark: str) -> bool:
        """Skips `mark`, a single character, and the white space around it; returns False if it is not next."""
        self.skip_space(self.at)
        if not self.text.startswith(mark, self.at):
            return False
        self.skip_space(self.at + 1)
        return True

    def expect(self, mark: str) -> None:
        if not self.accept(mark):
            raise _UnreadableError

    def separator(self, close: str) -> bool:
        """Skips a comma and returns whether there was one; without one, `close` must come next."""
        comma = self.accept(",")
        if not comma and not self.text.startswith(close, self.at):
            raise _UnreadableError
        return comma

    def skip_space(self, start: int) -> None:
        space = _SPACE.match(self.text, start)
        assert space is not None  # the pattern matches the empty string
        self.at = space.end()


def _number(token: str) -> int | float:
    if not any(mark in token for mark in ".eE"):
        try:
            return int(token)
        except ValueError:  # Python limits the digits it converts, because that takes quadratic time
            raise _UnreadableError from None
    number = float(token)
    if math.isinf(number):
        raise _UnreadableError
    return number


def _unescaped(body: str) -> str:
    """Resolves the escapes in `body`, a string without its quotes; an unknown escape keeps its backslash."""
    if "\\" not in body:
        return body
    text = _ESCAPE.sub(_unescape, body)
    # JSON writes a character beyond 16 bits as two escapes, which form a character only together.
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _unescape(match: re.Match[str]) -> str:
    escape = match[1]
    if len(escape) > 1:
        return chr(int(escape[1:], 16))
    return _ESCAPED[escape] if escape in _ESCAPED else match[0]


def _written_call(call: Call) -> str:
    arguments = ", ".join(f"{_checked(key, _KEYWORD)}={_written(value, 0)}" for key, value in call.arguments.items())
    return f"{_checked(call.name, _NAME)}({arguments})"


def _checked(name: Any, pattern: re.Pattern[str]) -> str:
    if not isinstance(name, str) or name != name.strip() or not pattern.fullmatch(name):
        raise ValueError(f"a call list cannot contain the name {name!r}")
    return name


def _written(value: Any, depth: int) -> str:
    if depth > MAX_DEPTH:
        raise ValueError(f"a value in a call list is nested more than {MAX_DEPTH} levels deep")
    match value:
        case list() | tuple():
            return "[" + ", ".join(_written(item, depth + 1) for item in value) + "]"
        case dict():
            items = (f"{_written_scalar(key)}: {_written(item, depth + 1)}" for key, item in value.items())
            return "{" + ", ".join(items) + "}"
    return _written_scalar(value)


def _written_scalar(value: Any) -> str:
    match value:
        case str():
            return json.dumps(value, ensure_ascii=False)
        case None | bool() | int():
            return str(value)
        case float() if math.isfinite(value):
            return repr(value)
    raise ValueError(f"a call list cannot contain the value {value!r}")


def _openai_call(entry: Any) -> Call:
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or "arguments" not in function:
        raise ValueError('expected {"name": ..., "arguments": ...}, alone or under "function"')
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the arguments of {function['name']!r} are not JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {function['name']!r} are not a JSON object")
    return Call(function["name"], arguments)
