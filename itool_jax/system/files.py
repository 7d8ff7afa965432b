"""Writes files atomically, and reads and writes the JSON files of a run.

In: rows or JSON objects. Out: JSON lines, gzipped or not, and JSON files. Of several processes, only the first writes.
"""

import contextlib
import gzip
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from itool_jax.system import untrusted
from itool_jax.system.hosts import is_first


def place(path: str | os.PathLike[str], number: int) -> str:
    """Returns the name of a row for messages: `FILE line 7`, or `FILE row 7` if rows are not lines."""
    kind = "row" if row_format(pathlib.Path(path)) in (".json", ".parquet") else "line"
    return f"{os.fspath(path)} {kind} {number}"


def row_format(path: pathlib.Path) -> str:
    """Returns the suffix that gives the row format, such as ".jsonl", ignoring ".gz"."""
    return pathlib.Path(path.name.removesuffix(".gz")).suffix


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[dict[str, Any]]) -> int:
    """Writes rows as JSON lines, gzipped if the name ends in .gz, and returns their number.

    The file gets its name only when it is complete, so that no reader sees a partial one. A link keeps its target;
    a pipe or a device is written to directly.

    Raises:
        ValueError: a row holds a value that is not JSON, such as NaN; the message names file and row.
        OSError: the disk is full or the folder cannot be written; the earlier file is untouched.
    """
    path = pathlib.Path(path)
    if path.exists() and not path.is_file():
        with open(path, "wb") as raw:
            return _write_rows(raw, path, rows)
    with whole_file(pathlib.Path(os.path.realpath(path))) as raw:
        return _write_rows(raw, path, rows)


@contextlib.contextmanager
def whole_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Yields a temporary file to write to, which replaces `path` only when it is complete.

    Of several processes, only the first writes.
    """
    if not is_first():
        with open(os.devnull, "wb") as nothing:
            yield nothing
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as raw:
            yield raw
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_unfinished(folder: pathlib.Path) -> None:
    """Removes partial files below a folder that killed processes left in `whole_file`.

    The caller must hold the lock, so that no other process writes there.
    """
    for left in folder.rglob(".*.*.partial"):
        if left.name.split(".")[-2].isdigit() and not left.is_dir():
            left.unlink(missing_ok=True)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads the object in a JSON file of the run; ValueError if it is damaged."""
    try:
        content = untrusted.read_json(path)
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path} is damaged ({error}); delete it to run the stage again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (not a JSON object); delete it to run the stage again")
    return content


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a JSON file atomically."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def _write_rows(raw: BinaryIO, path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> int:
    # No time stamp, so that equal rows give equal bytes.
    file = gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) if path.suffix == ".gz" else raw
    count = 0
    for count, row in enumerate(rows, 1):
        file.write(_encode(row, place(path, count)))
    if file is not raw:
        file.close()
    return count


def _encode(row: dict[str, Any], where: str) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: cannot be written as JSON ({error})") from error
