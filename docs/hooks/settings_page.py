"""The page of all settings, made from the dataclasses whenever the site is built, so that it is never stale.

In: `itool_jax.config.Config`, and the text of `settings.md`. Out: the page: that text, and a table for each dataclass,
with name, type, default and help text.
"""

import ast
import dataclasses
import inspect
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = "settings.md"
BAR = " &#124; "


def page() -> str:
    """The page as Markdown."""
    from itool_jax.config import Config

    head = (Path(__file__).parents[1] / PAGE).read_text(encoding="utf-8")
    parts = [head, "## The run itself\n", *_table(Config, "")]
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(value := _value(field)):
            kind = type(value)
            path = kind.__module__.replace(".", "/") + ".py"
            where = f"[`{kind.__module__}.{kind.__name__}`](../{path}#{kind.__name__})"
            parts += [
                f"\n## {field.name}\n",
                f"{_plain(kind.__doc__ or '')} {where}\n",
                *_table(kind, f"{field.name}."),
            ]
    return "\n".join(parts) + "\n"


def _table(kind: type, head: str) -> Iterator[str]:
    """The settings of a dataclass, those that are dataclasses themselves left out."""
    helps, kinds = _helps(kind), typing.get_type_hints(kind)
    yield "| setting | type | default | |"
    yield "|---|---|---|---|"
    for field in dataclasses.fields(kind):
        if not dataclasses.is_dataclass(_value(field)):
            shown = f"<code>{_named(kinds[field.name])}</code>"
            cells = (f"`--{head}{field.name}`", shown, _default(field), _plain(helps[field.name]))
            yield f"| {' | '.join(cells)} |"


def _helps(kind: type) -> dict[str, str]:
    """The text below each field, the nearest class of those that have the field."""
    helps: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(inspect.getsource(base)).body[0].body  # type: ignore[attr-defined]
        for field, text in zip(body, [*body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                helps[field.target.id] = text.value.value  # type: ignore[union-attr]
    return helps


def _value(field: dataclasses.Field[Any]) -> Any:
    """The default; MISSING where there is none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _named(kind: Any) -> str:
    """A type's name, of a choice its values; a bar as an entity, for it stands in a table."""
    if typing.get_origin(kind) is typing.Literal:
        return BAR.join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return BAR.join(map(_named, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"{_named(typing.get_args(kind)[0])} …"
    return "none" if kind is type(None) else kind.__name__


def _default(field: dataclasses.Field[Any]) -> str:
    if (value := _value(field)) is dataclasses.MISSING:
        return "must be given"
    value = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return "none" if value in (None, "") else f"`{value}`"


def _plain(text: str) -> str:
    """A docstring in one line of a table."""
    return " ".join(text.split()).replace("|", "&#124;")


def on_files(files: Any, config: Any) -> Any:
    """Puts the page in place of its text."""
    from mkdocs.structure.files import File

    files.remove(files.get_file_from_path(PAGE))
    files.append(File.generated(config, PAGE, content=page()))
    return files
