"""Checks the values in a run's rows and figures, so that an error names the damaged file.

In: a row, and the keys that a stage needs. Out: a description of what is wrong with it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from itool_jax.data.rows import read_rows
from itool_jax.system.files import place

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


def read_table(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Reads the rows of a file of the run; ValueError names a row whose keys are missing or malformed."""
    rows = []
    for number, row in read_rows(path):
        if bad := fault(row, keys):
            raise ValueError(f"{place(path, number)}: {bad}; delete the file to compute it again")
        rows.append(row)
    return rows
