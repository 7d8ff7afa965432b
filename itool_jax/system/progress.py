"""Shows progress bars on a terminal, logs progress lines, and counts steps for the profiler.

In: finished units of work. Out: a bar on stderr, lines in `log.jsonl`, and traces (`profiling`) if enabled.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from itool_jax.system import messages
from itool_jax.system.hosts import is_first
from itool_jax.system.messages import note, say
from itool_jax.system.profiling import traced

LOG_SECONDS = 30.0
"""Seconds between progress lines in `log.jsonl`."""


@dataclasses.dataclass
class _State:
    traces: Path | None = None
    """Folder for the traces of a profile."""


_state = _State()


def trace_into(folder: Path | None) -> None:
    """Starts tracing a few steps of each kind of work into a folder; None turns tracing off."""
    _state.traces = folder


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Shows a bar for `total` units of work, of which `done` are done already; yields `advance(units=1, note="")`.

    A line at the end says how long the work took. `log.jsonl` gets a line every `LOG_SECONDS` seconds.
    """
    before = done
    start = logged = time.monotonic()
    bar = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=messages.console,
        transient=True,
        disable=not (sys.stderr.isatty() and is_first()),
    )
    with bar, traced(_state.traces, what, say) as tick:
        task = bar.add_task(what, total=total, completed=done, note="")

        def advance(units: int = 1, note: str = "") -> None:
            nonlocal done, logged
            done += units
            bar.update(task, advance=units, note=note)
            tick()
            if (now := time.monotonic()) - logged >= LOG_SECONDS:
                logged = now
                left = (now - start) / max(done - before, 1) * max(total - done, 0)
                _log(what, done, total, now - start, left, note)

        yield advance
    new = f" ({done - before} new)" if before else ""
    say(f"{what:<28} {done}{new} in {time.monotonic() - start:.1f} s")


def _log(what: str, done: int, total: int, seconds: float, left: float, extra: str) -> None:
    text = f"{what} {done}/{total}, {seconds:.0f} s, about {left:.0f} s left"
    note("progress", f"{text}, {extra}" if extra else text)
