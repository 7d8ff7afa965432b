"""Reads the rows of data files, JSON objects in JSON lines, a JSON array or parquet, gzipped or not.

In: a file. Out: its rows as dictionaries, with their numbers for messages.
"""

import codecs
import gzip
import json
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from itool_jax.system.files import place, row_format
from itool_jax.system.untrusted import MAX_DEPTH, TOO_DEEP, too_deep
from itool_jax.text.sample import Row

PARQUET_ROWS = 64
PACKED, SMALL = 100, 1 << 30
"""Limit on a file's unpacked size: this many times its size or this many bytes, whichever is larger. A few kilobytes
can unpack to any number of zeros."""
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


def read_rows(path: str | os.PathLike[str], skipped: list[str] | None = None) -> Iterator[tuple[int, Row]]:
    """Yields (number from 1, row) of a .jsonl, .json (lines or one array) or .parquet file, .gz or not.

    If a list `skipped` is given, problems with rows are added to it and reading continues.

    Raises:
        ValueError: the file is missing or unreadable, or a row is not a JSON object; names file and row.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not a file" if path.is_dir() else f"{path} does not exist")
    if row_format(path) == ".parquet":
        yield from _parquet_rows(path)
        return
    if path.suffix.lower() in (".csv", ".tsv", ".xlsx"):
        raise ValueError(f"{path} is a table of texts; write its rows as JSON lines, see docs/your-data.md")
    data = _read_bytes(path)
    is_array = row_format(path) == ".json" and data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    for number, row in enumerate(_decode(data, str(path)), 1) if is_array else _lines(path, data, skipped):
        if isinstance(row, dict):
            yield number, row
        else:
            refuse(f"{place(path, number)}: not a JSON object", skipped)


def refuse(reason: str, skipped: list[str] | None, cause: Exception | None = None) -> None:
    """Adds the reason why a row is left out to `skipped`; without such a list, raises ValueError with the reason."""
    if skipped is None:
        raise ValueError(reason) from cause
    skipped.append(" ".join(reason.split()))  # a reason may quote a text of several lines


def without_none(row: Row) -> Row:
    """Returns a table's row without the None that tables fill in where an object lacks a key that others have.

    The row's own keys stay: they tell the forms of data apart.
    """
    return {key: _dense(value) for key, value in row.items()}


def _dense(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _dense(item) for key, item in value.items() if item is not None}
    return [_dense(item) for item in value] if isinstance(value, list) else value


def _read_bytes(path: pathlib.Path) -> bytes:
    try:
        if path.suffix != ".gz":
            return path.read_bytes()
        with gzip.open(path) as file:
            data = file.read(_most(path) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    if len(data) > _most(path):
        raise ValueError(_too_large(path))
    return data


def _most(path: pathlib.Path) -> int:
    """Returns the most bytes that a file may unpack to."""
    return max(PACKED * path.stat().st_size, SMALL)


def _too_large(path: pathlib.Path) -> str:
    return f"{path} decompresses to more than {_most(path) >> 20} MB, far more than its size; decompress and split it"


def _decode(data: bytes, where: str) -> Any:
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON (a number has too many digits)") from error
    except RecursionError as error:
        raise ValueError(f"{where}: not valid JSON (nested too deeply)") from error
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and too_deep(value, MAX_DEPTH + 1):  # one more for an array
        raise ValueError(f"{where}: not valid JSON ({TOO_DEEP})")
    return value


def _lines(path: pathlib.Path, data: bytes, skipped: list[str] | None) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = _decode(line, place(path, number))
        except ValueError as error:
            refuse(str(error), skipped, error)
            continue
        yield number, row


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[int, Row]]:
    import pyarrow  # the import is slow, and few files are parquet
    import pyarrow.parquet

    number, size, most = 0, 0, _most(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # A few rows at a time: their unpacked size is unknown before, since one value may repeat in all of them.
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                if (size := size + batch.nbytes) > most:
                    raise ValueError(_too_large(path))
                for row in batch.to_pylist():
                    number += 1
                    if too_deep(row):
                        raise ValueError(f"row {number} is {TOO_DEEP}")
                    yield number, without_none(row)
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})") from error
