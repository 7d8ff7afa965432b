"""Shows progress bars on a terminal, logs progress lines, and counts steps for the profiler.

In: finished units of work. Out: a bar on stderr or, without a terminal, a line a minute; the same lines in `log.jsonl`;
and traces (`profiling`) if enabled. Bar and lines get their times from one `Clock`.
"""

import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from itool_jax.system import messages
from itool_jax.system.hosts import is_first
from itool_jax.system.messages import log, note
from itool_jax.system.profiling import traced
from itool_jax.system.untrusted import redacted

FIRST, EVERY = 5.0, 60.0
"""Seconds until the first progress line of some work, and between two lines."""
COMPILING = "/jax/core/compile/"
"""Prefix of the events by which JAX reports tracing, lowering and compiling."""
SAVED = "/jax/compilation_cache/compile_time_saved_sec"
"""Event by which JAX reports that a program was in the compilation cache."""


@dataclasses.dataclass
class _State:
    traces: Path | None = None
    """Folder for the traces of a profile."""
    working: Callable[[], str] | None = None
    """Describes the work that is running."""


_state = _State()


def trace_into(folder: Path | None) -> None:
    """Starts tracing a few steps of each kind of work into a folder; None turns tracing off."""
    _state.traces = folder


def current_work() -> str | None:
    """Describes the work that is running and how far it is; None if none is."""
    return _state.working() if _state.working else None


class Batch(NamedTuple):
    """A part of some work that is computed at once."""

    units: int
    cost: float
    """What its time is proportional to, such as its tokens with padding."""
    program: Hashable
    """The first of the batches with the same value compiles their program."""


class Clock:
    """Estimates the time left from the finished batches and those to come; time to compile is counted by programs."""

    def __init__(self, total: int, done: int = 0):
        self.total, self.done, self.note = total, done, ""
        self._plan: Sequence[Batch] = [Batch(total - done, total - done, None)]
        self._before = done
        self._start = self._last = time.monotonic()
        self._compilations: list[tuple[float, float]] = []
        """Begin and end of each, without overlap."""
        self._compiled = self._saved = self._longest = self._uncached = 0.0

    def follow(self, plan: Sequence[Batch]) -> None:
        """Sets the batches in which the remaining units will be computed, in order."""
        self._plan, self._before = plan, self.done

    def advance(self, units: int, note: str = "") -> None:
        """Counts finished units."""
        compiled = sum(end - begin for begin, end in self._compilations)
        # The next program may not be in the cache, as in a resumed run, so it counts in full.
        self._longest = max(self._longest, compiled - self._compiled + self._saved)
        self._uncached, self._saved = self._uncached + compiled - self._compiled + self._saved, 0.0
        self._compiled, self._last = compiled, time.monotonic()
        self.done, self.note = self.done + units, note

    def hear(self, event: str, duration_secs: float, **_: Any) -> None:
        """Notes the time of an event that JAX reports when it ends; others may have been part of it."""
        if event.startswith(COMPILING):
            end = time.monotonic()
            begin = max(end - duration_secs, self._start)
            while self._compilations and self._compilations[-1][0] >= begin:
                self._compilations.pop()
            self._compilations.append((begin, end))
        elif event == SAVED:
            self._saved += max(duration_secs, 0.0)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def left(self) -> float | None:
        """Returns the seconds left; None before the first units are finished, and after the estimate has run out."""
        units, finished, ahead = self.done - self._before, 0.0, 0.0
        begun: set[Hashable] = set()
        for batch in self._plan:
            part = min(max(units, 0) / batch.units, 1.0) if batch.units else 1.0
            units -= batch.units
            finished, ahead = finished + part * batch.cost, ahead + (1 - part) * batch.cost
            if part:
                begun.add(batch.program)
        if not ahead:
            return 0.0
        if not finished:
            return None
        new = {batch.program for batch in self._plan} - begun
        computing = max(self._last - self._start - self._compiled, 0.0) * ahead / finished
        compiling = len(new) * max(self._longest, self._uncached / len(begun))
        left = computing + compiling - (time.monotonic() - self._last)
        return left if left > 0 else None

    def __str__(self) -> str:
        left = self.left()
        return _duration(self.seconds) + ("" if left is None else f", about {_duration(left)} left")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """Shows a bar for `total` units of work, of which `done` are done already.

    Yields `advance(units=1, note="", plan=())`; a plan is for the units after these. A line at the end says how long
    the work took.
    """
    clock = Clock(total, done)
    shown = sys.stderr.isatty() and is_first()
    bar = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TextColumn("{task.fields[clock]}"),
        console=messages.console,
        transient=True,
        disable=not shown,
    )

    def line() -> str:
        return f"{what} {clock.done}/{total}, {clock}{', ' if clock.note else ''}{clock.note}"

    def report() -> None:
        note("progress", line())
        if is_first() and not shown:
            messages.console.print(redacted(line()), markup=False, soft_wrap=True)

    with bar, _reported(report), _heard(clock), _named(line), traced(_state.traces, what, log) as tick:
        task = bar.add_task(what, total=total, completed=done, note="", clock=clock)

        def advance(units: int = 1, note: str = "", plan: Sequence[Batch] = ()) -> None:
            clock.advance(units, note)
            if plan:
                clock.follow(plan)
            bar.update(task, advance=units, note=note)
            if units:
                tick()

        yield advance
    new = f" ({clock.done - done} new)" if done else ""
    log(f"{what:<28} {clock.done}{new} in {clock.seconds:.1f} s")


@contextlib.contextmanager
def _reported(report: Callable[[], None]) -> Iterator[None]:
    """Calls `report` after a few seconds and then every minute, in a thread, since a step may take many minutes."""
    over = threading.Event()

    def repeat() -> None:
        wait = FIRST
        while not over.wait(wait):
            with contextlib.suppress(OSError):  # the work goes on if nobody reads stderr
                report()
            wait = EVERY

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _heard(clock: Clock) -> Iterator[None]:
    """Tells the clock of compilations."""
    from jax import monitoring  # slow to import

    monitoring.register_event_duration_secs_listener(clock.hear)
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(clock.hear)


@contextlib.contextmanager
def _named(describe: Callable[[], str]) -> Iterator[None]:
    """Makes `current_work` describe the enclosed work."""
    before, _state.working = _state.working, describe
    try:
        yield
    finally:
        _state.working = before
