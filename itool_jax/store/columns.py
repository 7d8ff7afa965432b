"""Reads rows from a run's files, and checks their values, so that an error names the damaged file.

In: a file or figures, and the types of the keys that a stage needs. Out: rows as named tuples, or a description of what
is wrong.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from itool_jax.data.rows import read_rows
from itool_jax.system.files import place

R = TypeVar("R", bound=tuple)
"""Type of a row, a NamedTuple; `NamedTuple` itself is a function, which cannot be checked at run time."""


def fault(content: Mapping[str, Any], types: Mapping[str, Any]) -> str | None:
    """Describes the first of these keys that is missing or has a value of another type; None if there is none.

    A type `Annotated[type, words, rule]` also requires that `rule(value)` is true, and is described by `words`.
    """
    for key, kind in types.items():
        if key not in content:
            return f'no "{key}"'
        if not _check(kind)(content[key]):
            return f'"{key}" is not {_describe(kind)}'
    return None


@functools.cache
def _check(kind: Any) -> Callable[[Any], bool]:
    """Returns a function that is true for JSON values of this type."""
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin is Annotated:
        fits, rule = _check(args[0]), args[2]
        return lambda value: fits(value) and rule(value)
    checks = [_check(arg) for arg in args]
    if origin is UnionType:
        return lambda value: any(fits(value) for fits in checks)
    if origin is tuple:
        return lambda value: (
            isinstance(value, list)
            and len(value) == len(checks)
            and all(fits(item) for fits, item in zip(checks, value, strict=True))
        )
    if origin is list:
        return lambda value: isinstance(value, list) and all(map(checks[0], value))
    if origin is dict:
        return lambda value: isinstance(value, dict) and all(map(checks[1], value.values()))
    if _is_row(kind):
        types, defaults = _types(kind, include_extras=True), kind._field_defaults
        return lambda value: isinstance(value, dict) and not fault({**defaults, **value}, types)
    return lambda value: type(value) in ((int, float) if kind is float else (kind,))


_WORDS = {
    str: ("a string", "strings"),
    bool: ("true or false", "booleans"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    NoneType: ("null", "nulls"),
    list: ("a list", "lists"),
    dict: ("an object", "objects"),
    tuple: ("a pair", "pairs"),
}


def _describe(kind: Any, plural: bool = False) -> str:
    origin, args = get_origin(kind) or kind, get_args(kind)
    if origin is Annotated:
        return args[1]
    if origin is UnionType:
        return " or ".join(_describe(arg, plural) for arg in args)
    return _WORDS[origin][plural] + (f" of {_describe(args[-1], plural=True)}" if args else "")


def read_table(path: Path, kind: type[R], keys: Sequence[str]) -> list[R]:
    """Reads the rows of a file of the run; ValueError names a row that lacks one of the keys or has a malformed one."""
    types, rows = _types(kind, include_extras=True), []
    for number, row in read_rows(path):
        if bad := fault(row, {key: types[key] for key in keys}):
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
