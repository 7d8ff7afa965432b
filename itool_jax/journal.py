"""Answers of the model, kept on disk as they come, so that a killed stage need not ask for any of them again.

In: a key and a function for each piece of work, in an order that does not change. Out: what the function gave, now or
before the stage was killed. A journal is a file that only grows, a line a piece: checksum, then JSON of key and value.
"""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

from itool_jax import hosts, untrusted
from itool_jax.messages import say
from itool_jax.preemption import stop_if_asked
from itool_jax.progress import mark_replay

T = TypeVar("T")
LAYOUT = "layout"
Keep = Callable[[str, Callable[[], Any]], Any]
"""`keep(key, compute)` is `compute()`, or what it was when it was asked for before; plain JSON values only."""


def keep_nothing(_: str, compute: Callable[[], T]) -> T:
    """Computes always."""
    return compute()


class Journal:
    """The journal at `path`, which begins empty where there is none, or one of another `layout`.

    The layout is what the order of the work depends on, as plain JSON. A line that was cut off when the process was
    killed is left out; so are a damaged one and all behind it, which is said. Power failures may cost the last lines,
    never the order of those that stay. Processes that compute `together` share one, which the first writes.
    """

    def __init__(self, path: Path, layout: Any, *, together: bool = False):
        self.path, self.together = path, together
        self.known, whole = read(path)
        if self.known.get(LAYOUT, layout) != layout:
            say(f"{path} was written with other settings, so the stage begins anew")
            self.known, whole = {}, 0
        if together:
            hosts.meet(f"{path} was read")
        path.parent.mkdir(parents=True, exist_ok=True)
        writes = hosts.is_first() or not together
        self.file: BinaryIO = (path if writes else Path(os.devnull)).open("ab")
        if writes:
            self.file.truncate(whole)
        self.keep(LAYOUT, lambda: layout)

    def __enter__(self) -> "Journal":
        """The journal."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        """Closes its file."""
        self.file.close()

    def keep(self, key: str, compute: Callable[[], T]) -> T:
        """The value of a piece of work: the one on disk, or else computed and written there.

        Raises:
            PreemptionError: the run was asked to stop; everything so far is on disk.
        """
        mark_replay(key in self.known)
        if key in self.known:
            return self.known[key]
        (hosts.stop_together if self.together else stop_if_asked)()
        value = compute()
        text = json.dumps([key, value]).encode()
        self.file.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self.file.flush()
        return value


def read(path: Path) -> tuple[dict[str, Any], int]:
    """The values by key of the journal at `path`, and how many bytes of the file they take."""
    found: dict[str, Any] = {}
    content = path.read_bytes() if path.exists() else b""
    whole = 0
    while (end := content.find(b"\n", whole)) >= 0:
        checksum, _, text = content[whole:end].partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            say(f"{path} is damaged behind its first {len(found)} lines; what stood there is computed again")
            break
        entry = untrusted.parse_json(text.decode())  # as it was written, by its checksum
        if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
            raise ValueError(f"{path} is no journal of a stage; delete it")
        found[entry[0]], whole = entry[1], end + 1
    return found, whole
