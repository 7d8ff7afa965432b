"""Reads rows from a run's files, and checks their values, so that an error names the damaged file.

In: a file or figures, and the keys that a stage needs. Out: rows as named tuples, or a description of what is wrong.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from itool_jax.data.rows import read_rows
from itool_jax.system.files import place

R = TypeVar("R", bound=tuple)
"""Type of a row, a NamedTuple; `NamedTuple` itself is a function, which cannot be checked at run time."""
MAX_ID = 2**31 - 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int and 0 <= token <= MAX_ID for token in value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(item is None or _is_number(item) for item in value.values())


NODE_NUMBERS = ("visits", "q", "value", "prior", "outcome", "confidence")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_nodes(value: Any) -> bool:
    """Checks the nodes of a search tree: a root first, and every other node after its parent."""
    return isinstance(value, list) and bool(value) and all(_is_node(node, n) for n, node in enumerate(value))


def _is_node(node: Any, number: int) -> bool:
    return (
        isinstance(node, dict)
        and type(node.get("parent")) is int
        and (-1 if number == 0 else 0) <= node["parent"] < number
        and isinstance(node.get("text"), str)
        and all(_is_number(node.get(name)) for name in NODE_NUMBERS)
        and all(isinstance(node.get(name), bool) for name in ("terminal", "gold"))
    )


def _is_intervals(value: Any) -> bool:
    return isinstance(value, dict) and all(
        bounds is None or (isinstance(bounds, list) and len(bounds) == 2 and all(map(_is_number, bounds)))
        for bounds in value.values()
    )


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("id", "tree"), (lambda value: isinstance(value, str), "a string")),
    **dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids", "answer_ids"), (_is_token_ids, "a list of token ids")),
    **dict.fromkeys(("chosen", "rejected", "visits_chosen", "visits_rejected"), (_is_number, "a number")),
    **dict.fromkeys(("prompts", "trees", "pairs", "generated_tokens", "seconds", "time"), (_is_number, "a number")),
    **dict.fromkeys(("accuracy", "n", "standard_error"), (_is_numbers, "an object of numbers")),
    **dict.fromkeys(("node", "chosen_node", "rejected_node"), (_is_count, "a node number")),
    **dict.fromkeys(("q_chosen", "q_rejected", "perplexity", "n_tokens"), (_is_number, "a number")),
    **dict.fromkeys(
        ("response", "target", "gold", "text", "phase", "against"), (lambda value: isinstance(value, str), "a string")
    ),
    "nodes": (_is_nodes, "a list of nodes, each after its parent"),
    **dict.fromkeys(("rank", "right"), (lambda value: value is None or _is_number(value), "a number or null")),
    **dict.fromkeys(("correct", "finished"), (lambda value: isinstance(value, bool), "true or false")),
    **dict.fromkeys(("categories", "regressions"), (_is_texts, "a list of strings")),
    "interval": (_is_intervals, "an object of pairs of numbers"),
}
"""For each key, a check of its value and a description of what the value must be."""


def fault(row: Mapping[str, Any], keys: Sequence[str]) -> str | None:
    """Describes what is wrong with a row that must hold these keys; None if nothing is."""
    for key in keys:
        if key not in row:
            return f'no "{key}"'
        if key in KINDS and not KINDS[key][0](row[key]):
            return f'"{key}" is not {KINDS[key][1]}'
    return None


def read_table(path: Path, kind: type[R], keys: Sequence[str]) -> list[R]:
    """Reads the rows of a file of the run; ValueError names a row that lacks one of the keys or has a malformed one."""
    rows = []
    for number, row in read_rows(path):
        if bad := fault(row, keys):
            raise ValueError(f"{place(path, number)}: {bad}; delete the file to compute it again")
        rows.append(row_of(kind, row))
    return rows


def row_of(kind: type[R], content: Mapping[str, Any]) -> R:
    """Makes a row, and rows in its fields, from a JSON object; a field that is absent has its default, or None."""
    named: Any = kind
    given = {**named._field_defaults, **content}
    return named._make(_field_of(hint, given.get(name)) for name, hint in _types(kind).items())


def json_of(row: tuple[Any, ...]) -> dict[str, Any]:
    """Returns a row, and rows in its fields, as a JSON object, without fields that are None by default and unset."""
    named: Any = row
    optional = [name for name, default in named._field_defaults.items() if default is None]
    fields = named._asdict().items()
    return {name: _json_of_field(value) for name, value in fields if value is not None or name not in optional}


_types = functools.cache(get_type_hints)


def _is_row(kind: Any) -> bool:
    return hasattr(kind, "_fields")


def _field_of(hint: Any, value: Any) -> Any:
    if _is_row(hint):
        return row_of(hint, value)
    if get_origin(hint) is list and _is_row(item_kind := get_args(hint)[0]):
        return [row_of(item_kind, item) for item in value]
    return value


def _json_of_field(value: Any) -> Any:
    if _is_row(value):
        return json_of(value)
    return [json_of(item) for item in value] if isinstance(value, list) and value and _is_row(value[0]) else value
