"""Prints messages for the user and writes the log of a run.

In: texts. Out: stderr, and `log.jsonl` in the run directory, with time, stage, level and text of messages, progress,
errors, and the start and end of each stage. Of several processes, only the first one writes.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from itool_jax.system.hosts import is_first
from itool_jax.system.untrusted import redacted

console = Console(stderr=True, highlight=False)
console_out = Console(highlight=False)
"""For tables; of several processes, only the first one prints them."""


class LogRow(NamedTuple):
    """A line of `log.jsonl`."""

    time: float
    """Seconds since the epoch."""
    stage: str | None
    """What was running, as `phase/stage`; None outside a stage."""
    level: str
    """info, progress or error."""
    text: str


@dataclasses.dataclass
class _Log:
    path: Path | None = None
    """`log.jsonl` of the run directory in use, if any."""
    stage: str | None = None


_log = _Log()


def open_log(folder: Path) -> None:
    """Starts appending all messages to `log.jsonl` in a folder, too."""
    _log.path = folder / "log.jsonl"


def close_log() -> None:
    """Stops writing to `log.jsonl` and forgets the stage."""
    _log.path = _log.stage = None


def log(text: str) -> None:
    """Logs a line and prints it on stderr, so that stdout holds results only."""
    if is_first():
        note("info", text)
        console.print(redacted(text), markup=False, soft_wrap=True)


def fail(text: str) -> None:
    """Prints and logs the error that ends a command, in every process."""
    tell("error", text)


def tell(level: str, text: str) -> None:
    """Prints and logs a line in every process, even on a full disk."""
    with contextlib.suppress(OSError):
        note(level, text)
    print(redacted(text), file=sys.stderr, flush=True)


def note(level: str, text: str) -> None:
    """Appends a line to `log.jsonl` only."""
    if _log.path is not None:
        row = LogRow(round(time.time(), 3), _log.stage, level, redacted(text))
        with _log.path.open("a") as file:
            file.write(json.dumps(row._asdict()) + "\n")


@contextlib.contextmanager
def working_on(phase: str, stage: str) -> Iterator[None]:
    """Logs the start and end of a stage and tags all lines between with it; a failed stage stays set."""
    before, start = _log.stage, time.monotonic()
    _log.stage = f"{phase}/{stage}"
    note("info", "begin")
    yield
    note("info", f"end after {time.monotonic() - start:.1f} s")
    _log.stage = before


def current_stage() -> str | None:
    """Returns the stage that is running or has failed, as `phase/stage`; None outside a stage."""
    return _log.stage
