"""Reads the calls of a BFCL response, in Python, Java or JavaScript, as the leaderboard's decoder does.

In: the raw text of a response, or the list of calls of a function-calling model. Out: calls, or an error. The
leaderboard uses Python's own expression grammar for call lists. So this reader accepts bare words as strings,
arithmetic, and calls as values, unlike `itool_jax.text.calls.read_calls`, which serves the reward and requires
literals. It computes but never executes: nothing of a response reaches `eval`, and time and memory are bounded for
every text.

The rules follow the scorer (https://pypi.org/project/bfcl-eval/2025.8.6.2/) and are described in `docs/evaluation.md`.
"""

import ast
import functools
import json
import operator
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

import tree_sitter
import tree_sitter_java
import tree_sitter_javascript

from itool_jax.text.calls import Call

Language = Literal["Python", "Java", "JavaScript"]

MAX_CHARACTERS: dict[Language, int] = {"Python": 100_000, "Java": 4_000, "JavaScript": 4_000}
"""A longer response is unreadable. Tree-sitter takes quadratic time and memory, at worst 1 s and 400 MB for 4,000
characters. The longest right answers in Java and JavaScript are a tenth as long."""
MAX_COMPUTED = 10_000
"""Most bits or items in a result of arithmetic, such as `2 ** 10` or `"ab" * 3`."""


class UnreadableError(ValueError):
    """Error for a response that cannot be read as calls."""


def read_response(text: Any, language: Language) -> list[Call] | None:
    """Returns the calls of a response, or None if it parses as Java or JavaScript but holds no call.

    Backticks, newlines and spaces at both ends and missing outer brackets are ignored. In Python, the last value of a
    repeated keyword counts and positional arguments are dropped; in the other languages, a positional argument is kept
    under the name None. Raises `UnreadableError` for everything else, including a value that is not a string.
    """
    if not isinstance(text, str):
        raise UnreadableError(f"a response must be a string, got {type(text).__name__}")
    if len(text) > MAX_CHARACTERS[language]:
        raise UnreadableError(f"{len(text)} characters, more than {MAX_CHARACTERS[language]}")
    text = text.strip("`\n ")
    text = text if text.startswith("[") else "[" + text
    text = text if text.endswith("]") else text + "]"
    try:
        return _READERS[language](text)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise UnreadableError(str(error)) from None


def read_function_calls(result: Any) -> list[Call] | None:
    """Returns the calls of a function-calling model's response, `[{name: arguments}]`, arguments as JSON text.

    Returns None if some arguments are JSON but not an object. Raises `UnreadableError` for everything else; that
    includes text, which is no call. As on the leaderboard, empty text is an empty list.
    """
    if not isinstance(result, list) and result != "":
        raise UnreadableError("not a list of calls")
    calls, listed = [], list[Any](result)
    for call in listed:
        try:
            [(name, given)] = call.items()
            calls.append(Call(name, json.loads(given) if isinstance(given, str) else given))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UnreadableError(str(error)) from None
    return calls if all(isinstance(call.arguments, dict) for call in calls) else None


def _python(text: str) -> list[Call]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns about unknown escapes in strings
        body = ast.parse(text.strip("[]'"), mode="eval").body
    calls = [body] if isinstance(body, ast.Call) else getattr(body, "elts", None)
    if calls is None or not all(isinstance(call, ast.Call) for call in calls):
        raise UnreadableError("not a list of calls")
    return [_python_call(call) for call in calls]


def _python_call(node: ast.Call) -> Call:
    names, function = [], node.func
    while isinstance(function, ast.Attribute):
        names.append(function.attr)
        function = function.value
    if isinstance(function, ast.Name):
        names.append(function.id)
    arguments: dict[Any, Any] = {keyword.arg: _python_value(keyword.value) for keyword in node.keywords}
    return Call(".".join(reversed(names)), arguments)


def _python_value(node: ast.AST | None) -> Any:
    match node:
        case ast.Constant(value=value):
            return "..." if value is Ellipsis else value
        case ast.UnaryOp(operand=ast.Constant(value=int() | float() | complex() as value)):
            return -value  # for any operator: the leaderboard negates for `not x` too
        case ast.List():
            return [_python_value(item) for item in node.elts]
        case ast.Tuple():
            return tuple(_python_value(item) for item in node.elts)
        case ast.Dict():
            return {_python_value(key): _python_value(value) for key, value in zip(node.keys, node.values, strict=True)}
        case ast.BinOp():
            return _computed(node)
        case ast.Name():
            return node.id
        case ast.Call(keywords=[]):
            return ast.unparse(node)
        case ast.Call():
            call = _python_call(node)
            return {call.name: call.arguments}
        case ast.Subscript():
            return f"{ast.unparse(node.value)}[{ast.unparse(node.slice)}]"
    raise UnreadableError(f"{type(node).__name__} is not a value")


_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Invert: operator.invert,
    ast.Not: operator.not_,
}
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}


def _computed(node: ast.AST) -> Any:
    """Computes arithmetic on literals. Raises `UnreadableError` for anything the leaderboard would have to execute."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List():
            return [_computed(item) for item in node.elts]
        case ast.Tuple():
            return tuple(_computed(item) for item in node.elts)
        case ast.UnaryOp():
            return _UNARY[type(node.op)](_computed(node.operand))
        case ast.BinOp() if type(node.op) in _BINARY:
            left, right = _computed(node.left), _computed(node.right)
            if _size_bound(node.op, left, right) > MAX_COMPUTED:
                raise UnreadableError("the result of arithmetic in a value is too large")
            return _BINARY[type(node.op)](left, right)
    raise UnreadableError(f"{type(node).__name__} is not supported in arithmetic")


def _size_bound(op: ast.operator, left: Any, right: Any) -> float:
    """Returns an upper bound on the bits or items of a result, before it is computed."""
    sizes = _size(left), _size(right)
    whole = isinstance(left, int) and isinstance(right, int)
    match op:
        case ast.Pow() | ast.LShift() if whole:
            return sizes[0] * max(right, 1) if isinstance(op, ast.Pow) else sizes[0] + right
        case ast.Mult() if not whole and isinstance(left, int):
            return left * sizes[1]
        case ast.Mult() if not whole and isinstance(right, int):
            return right * sizes[0]
        case ast.Mod() if isinstance(left, str | bytes):
            return float("inf")  # a format string can ask for any width
    return sizes[0] + sizes[1]


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value.bit_length()
    return len(value) if isinstance(value, str | bytes | list | tuple) else 1


def _java(text: str) -> list[Call] | None:
    source = text[1:-1]
    for node in _nodes(_parsed(source, "Java")):
        if node.type == "method_invocation":
            return [_java_call(node, source)]
    return None


def _java_call(node: tree_sitter.Node, source: str) -> Call:
    name, owner = _field(node, "name"), node.child_by_field_name("object")
    full_name = f"{_slice(owner, source)}.{_slice(name, source)}" if owner else _slice(name, source)
    arguments = _Arguments()
    for child in _field(node, "arguments").children:
        if child.type == "assignment_expression":
            arguments.add(_slice(child.children[0], source), _java_value(child.children[2], source))
        elif child.type in ("identifier", "class_literal", "set"):
            arguments.add(None, _java_value(child, source))
    return Call(full_name, arguments.by_name)


def _java_value(node: tree_sitter.Node, source: str, nested: bool = False) -> str:
    """Returns the text of an argument without white space between tokens; a top-level literal loses its quotes."""
    inner = functools.partial(_java_value, source=source, nested=True)
    match node.type:
        case "string_literal" | "character_literal":
            return _slice(node, source) if nested else _slice(node, source)[1:-1]
        case "identifier" | "class_literal" | "type_identifier" | "method_invocation":
            return _slice(node, source)
        case "array_creation_expression":
            return f"new {inner(_field(node, 'type'))}[]{inner(_field(node, 'value'))}"
        case "object_creation_expression":
            values = [child for child in _field(node, "arguments").children if child.type not in (",", "(", ")")]
            return f"new {inner(_field(node, 'type'))}({', '.join(map(inner, values))})"
    return "".join(map(inner, node.children)) if node.children else _slice(node, source)


def _javascript(text: str) -> list[Call] | None:
    for statement in _parsed(text[1:-1], "JavaScript").children:
        for node in statement.children if statement.type == "expression_statement" else ():
            if node.type == "call_expression":
                return [_javascript_call(node)]
    return None


def _javascript_call(node: tree_sitter.Node) -> Call:
    arguments = _Arguments()
    for child in node.children[1].children:
        if child.type == "assignment_expression":
            value = _text(child.children[2])
            quoted = value[:1] in ("'", '"') and value.endswith(value[0])
            arguments.add(_text(child.children[0]), value[1:-1] if quoted else value)
        elif child.type in ("identifier", "true"):
            arguments.add(None, _text(child))
    return Call(_text(node.children[0]), arguments.by_name)


class _Arguments:
    """Arguments by name; the positional one has the name None."""

    def __init__(self) -> None:
        self.by_name: dict[Any, str] = {}

    def add(self, name: str | None, value: str) -> None:
        if name in self.by_name:
            raise UnreadableError(f"the argument {name!r} is repeated")
        self.by_name[name] = value


@functools.cache
def _grammar(language: Language) -> tree_sitter.Language:
    grammar = {"Java": tree_sitter_java, "JavaScript": tree_sitter_javascript}[language]
    return tree_sitter.Language(grammar.language())


def _parsed(source: str, language: Language) -> tree_sitter.Node:
    root = tree_sitter.Parser(_grammar(language)).parse(source.encode()).root_node
    if any(node.is_error for node in _nodes(root)):
        raise UnreadableError(f"not valid {language}")
    return root


def _nodes(root: tree_sitter.Node) -> Iterator[tree_sitter.Node]:
    """Yields all nodes, depth first; uses a list as the stack, so that any depth works."""
    waiting = [root]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += reversed(node.children)


def _field(node: tree_sitter.Node, name: str) -> tree_sitter.Node:
    child = node.child_by_field_name(name)
    if child is None:
        raise UnreadableError(f"a {node.type} without {name}")
    return child


def _slice(node: tree_sitter.Node, source: str) -> str:
    # Like the leaderboard, this slices characters at byte offsets: text after an umlaut is shifted.
    return source[node.start_byte : node.end_byte]


def _text(node: tree_sitter.Node) -> str:
    assert node.text is not None  # the tree keeps the bytes that it was parsed from
    return node.text.decode()


_READERS: dict[str, Callable[[str], list[Call] | None]] = {"Python": _python, "Java": _java, "JavaScript": _javascript}
