"""Journals of a step's finished rows, so that a killed step computes only the missing rows.

In: results by item number. Out: the same results after a kill. A journal is an append-only file: each line holds a
checksum and the JSON of some rows, `[[number, result], ...]`, in one write.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from itool_jax.system import untrusted
from itool_jax.system.messages import log


class Journal:
    """Writer that appends to the journal at `path` after its last whole line; with `writes` false, writes nothing."""

    def __init__(self, path: Path, *, writes: bool = True):
        _, whole = read(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = (path if writes else Path(os.devnull)).open("ab")
        if writes:
            self._file.truncate(whole)

    def __enter__(self) -> "Journal":
        """Returns the journal."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        """Closes the file."""
        self._file.close()

    def append(self, rows: Mapping[int, Any]) -> None:
        """Appends results, plain JSON, by item number; from then on they survive the death of the process."""
        text = json.dumps(list(rows.items())).encode()
        self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self._file.flush()


def read(path: Path) -> tuple[dict[int, Any], int]:
    """Reads the results in the journal at `path`, by item number, and the length in bytes of its whole lines.

    A line cut off by a kill is ignored. A damaged line and all lines after it are dropped with a message.
    """
    rows: dict[int, Any] = {}
    content = path.read_bytes() if path.exists() else b""
    whole, lines = 0, 0
    while (end := content.find(b"\n", whole)) >= 0:
        checksum, _, text = content[whole:end].partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            log(f"{path} is damaged after its first {lines} lines; recomputing the rows that follow")
            break
        entry = untrusted.parse_json(text.decode())  # intact, since its checksum matches
        if not isinstance(entry, list) or not all(isinstance(x, list) and len(x) == 2 for x in entry):
            raise ValueError(f"{path} is not a journal of rows; delete it")
        rows.update(entry)
        whole, lines = end + 1, lines + 1
    return rows, whole
