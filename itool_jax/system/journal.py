"""Finished rows of a step, kept on disk as they come, so that a killed step computes only the rows that are missing.

In: results by the number of their item. Out: the same after a kill. A journal is a file that only grows: each line is
a checksum and the JSON of some rows, `[[number, result], ...]`, written at once.
"""

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from itool_jax.system import untrusted
from itool_jax.system.messages import say


class Journal:
    """Appends to the journal at `path`, behind its last whole line; with `writes` false, to nothing."""

    def __init__(self, path: Path, *, writes: bool = True):
        _, whole = read(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = (path if writes else Path(os.devnull)).open("ab")
        if writes:
            self._file.truncate(whole)

    def __enter__(self) -> "Journal":
        """The journal."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        """Closes its file."""
        self._file.close()

    def append(self, rows: Mapping[int, Any]) -> None:
        """Writes results, plain JSON values, by item number; they survive the process from here on."""
        text = json.dumps(list(rows.items())).encode()
        self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self._file.flush()


def read(path: Path) -> tuple[dict[int, Any], int]:
    """The results by item number in the journal at `path`, and how many bytes of the file are whole lines.

    A line that was cut off when the process was killed is left out; so are a damaged one and all behind it, with a
    message.
    """
    rows: dict[int, Any] = {}
    content = path.read_bytes() if path.exists() else b""
    whole, lines = 0, 0
    while (end := content.find(b"\n", whole)) >= 0:
        checksum, _, text = content[whole:end].partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            say(f"{path} is damaged after its first {lines} lines; the rows from there on are computed again")
            break
        entry = untrusted.parse_json(text.decode())  # as it was written, by its checksum
        if not isinstance(entry, list) or not all(isinstance(x, list) and len(x) == 2 for x in entry):
            raise ValueError(f"{path} is not a journal of rows; delete it")
        rows.update(entry)
        whole, lines = end + 1, lines + 1
    return rows, whole
