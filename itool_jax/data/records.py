"""The records that data is made of, and the files that hold them.

In: files of rows, one JSON object each: JSON lines, a JSON array or parquet, gzipped or not.
Out: `Sample` and `RawSample`; dictionaries with their row numbers; files that are either whole or absent.
"""

import codecs
import contextlib
import gzip
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from itool_jax.hosts import is_first
from itool_jax.untrusted import MAX_DEPTH, TOO_DEEP, too_deep

Row = dict[str, Any]
PARQUET_ROWS = 64
PACKED, SMALL = 100, 1 << 30
"""What a compressed file may come to: so many times its size, or so many bytes where that is more. A few kilobytes can
stand for any number of zeros."""
SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One tool-use turn: what the model sees, and what it should answer."""

    id: str
    messages: tuple[Row, ...]
    """OpenAI chat messages, the target not among them."""
    tools: tuple[Row, ...] = ()
    """OpenAI tool schemas, {"type": "function", "function": {"name", "description", "parameters"}}."""
    target: str = ""
    """One bracketed list of calls, or plain text; empty where it is unknown."""
    category: str = ""
    conversation: str = ""
    """Which conversation it is a turn of; empty where it is the only one."""
    place: str = field(default="", compare=False)
    """Where it was read, for messages: file and row; no part of the sample and never written."""


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """Token ids, or a text, that the model gets exactly as given."""

    id: str
    prompt_ids: tuple[int, ...] | None = None
    prompt: str | None = None
    target_ids: tuple[int, ...] | None = None


def sample_row(sample: Sample) -> Row:
    """The row of a file that reads back as this very sample."""
    row: Row = {"id": sample.id, "messages": list(sample.messages), "tools": list(sample.tools)}
    row["target"] = sample.target
    return row | {key: value for key in ("category", "conversation") if (value := getattr(sample, key))}


def content_id(prefix: str, row: Row) -> str:
    """An id made from a row's content, for data without ids: it never depends on the order of a file."""
    digest = hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()
    return f"{prefix}-{digest[:16]}"


def place(path: str | os.PathLike[str], number: int) -> str:
    """How messages name a row: `FILE line 7`, or `FILE row 7` where rows are no lines."""
    kind = "row" if _kind(pathlib.Path(path)) in (".json", ".parquet") else "line"
    return f"{os.fspath(path)} {kind} {number}"


def read_rows(path: str | os.PathLike[str], skipped: list[str] | None = None) -> Iterator[tuple[int, Row]]:
    """Yields (number from 1, row) of a .jsonl, .json (lines or one array) or .parquet file, .gz or not.

    Where a list `skipped` is given, what is wrong with a row is put there and the next one read.

    Raises:
        ValueError: the file is missing or unreadable, or a row is no JSON object; names file and row.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not a file" if path.is_dir() else f"{path} does not exist")
    if _kind(path) == ".parquet":
        yield from _parquet_rows(path)
        return
    data = _read_bytes(path)
    is_array = _kind(path) == ".json" and data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
    for number, row in enumerate(_decode(data, str(path)), 1) if is_array else _lines(path, data, skipped):
        if isinstance(row, dict):
            yield number, row
        else:
            refuse(f"{place(path, number)}: not a JSON object", skipped)


def refuse(reason: str, skipped: list[str] | None, cause: Exception | None = None) -> None:
    """Puts the reason why a row is left out into `skipped`; ValueError with it where there is no such list."""
    if skipped is None:
        raise ValueError(reason) from cause
    skipped.append(" ".join(reason.split()))  # a reason may quote a text of several lines


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Row]) -> int:
    """Writes rows as JSON lines, gzipped where the name ends in .gz, and returns how many.

    The file takes its name only when it is whole, so that a reader never meets half of one. A link keeps
    pointing where it does; a pipe or a device is written to as it is.

    Raises:
        ValueError: a row holds a value that is not JSON, such as NaN; names file and row.
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
    """A new file to write to, which takes its name, in place of an earlier one, only when all is written.

    Of several processes the first one writes for all.
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
    """Removes what `whole_file` left of files in a folder and below it when its process was killed.

    Whoever calls it holds the lock: no other process writes there.
    """
    for left in folder.rglob(".*.*.partial"):
        if left.name.split(".")[-2].isdigit() and not left.is_dir():
            left.unlink(missing_ok=True)


def _write_rows(raw: BinaryIO, path: pathlib.Path, rows: Iterable[Row]) -> int:
    # No time stamp: equal rows give equal bytes.
    file = gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) if path.suffix == ".gz" else raw
    count = 0
    for count, row in enumerate(rows, 1):
        file.write(_encode(row, place(path, count)))
    if file is not raw:
        file.close()
    return count


def _kind(path: pathlib.Path) -> str:
    return pathlib.Path(path.name.removesuffix(".gz")).suffix


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
    """How many bytes a compressed file may come to."""
    return max(PACKED * path.stat().st_size, SMALL)


def _too_large(path: pathlib.Path) -> str:
    return f"{path} holds more than {_most(path) >> 20} MB, far more than its size; unpack it and split it"


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


def _encode(row: Row, where: str) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: cannot be written as JSON ({error})") from error


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[int, Row]]:
    import pyarrow  # the import is slow, and few files are parquet
    import pyarrow.parquet

    number, size, most = 0, 0, _most(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            # A few rows at a time: what they come to is not known before, for one value may stand in all of them.
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                if (size := size + batch.nbytes) > most:
                    raise ValueError(_too_large(path))
                for row in batch.to_pylist():
                    number += 1
                    if too_deep(row):
                        raise ValueError(f"row {number} is {TOO_DEEP}")
                    yield number, row
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} cannot be read ({(str(error).splitlines() or [type(error).__name__])[0]})") from error
