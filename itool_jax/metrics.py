"""What a run reports while it works: messages, progress bars, and the files that hold the same.

In: messages, and numbers by name. Out, in the run directory: `metrics.jsonl` (one object a line: time, stage, step,
values) and `log.jsonl` (time, stage, level, text: every message, how far each work is, where stages begin and end, and
errors); TensorBoard, Weights & Biases and traces when asked (`trackers`, `profiling`). Of several processes, only the
first reports.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from itool_jax.data.records import whole_file
from itool_jax.hosts import is_first
from itool_jax.profiling import traced
from itool_jax.trackers import LogSettings, Tracker, open_trackers
from itool_jax.untrusted import parse_json, redacted

console = Console(stderr=True, highlight=False)
console_out = Console(highlight=False)
"""For tables, which of several processes the first one prints."""

PROGRESS_SECONDS = 30.0
"""How often `log.jsonl` says how far a work is."""


class Journal:
    """What one command leaves in its run directory: lines in `log.jsonl`, numbers with the trackers."""

    def __init__(self, folder: Path, trackers: list[Tracker], profile: bool):
        self.path, self.trackers = folder / "log.jsonl", trackers
        self.traces = folder / "profile" if profile else None

    def line(self, level: str, text: str) -> None:
        """Appends one line."""
        row = {"time": round(time.time(), 3), "stage": _stage, "level": level, "text": redacted(text)}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


_journal: Journal | None = None
_stage: str | None = None
_replays = False


def open_journal(folder: Path, settings: LogSettings, config: Mapping[str, Any], profile: bool) -> None:
    """From here on, messages and numbers are kept in the run directory too."""
    global _journal
    close_journal()
    if is_first():
        _journal = Journal(folder, open_trackers(settings, folder, config), profile)


def close_journal() -> None:
    """Ends what `open_journal` began, where it did."""
    global _journal, _stage
    journal, _journal, _stage = _journal, None, None
    for tracker in journal.trackers if journal else ():
        tracker.close()


class Metrics(NamedTuple):
    """The metrics file of one stage."""

    path: Path
    stage: str

    def write(self, step: int, **values: float) -> None:
        """Appends one line; what is not finite becomes null, since JSON has no other word for it."""
        if not is_first():
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {"time": round(time.time(), 3), "stage": self.stage, "step": step, **finite}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        _track(self.stage, step, values)

    def drop_after(self, step: int) -> None:
        """Takes out the lines of this stage behind a step, where it goes on, and a line that was cut off."""
        if not self.path.is_file():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith(b"\n") and not self._is_later(line, step)]
        if kept != lines:
            with whole_file(self.path) as file:
                file.writelines(kept)

    def _is_later(self, line: bytes, step: int) -> bool:
        try:
            row = parse_json(line.decode())
            return row["stage"] == self.stage and row["step"] > step
        except (ValueError, TypeError, KeyError):
            return True


@contextlib.contextmanager
def working_on(phase: str, stage: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Inside, the log says what is being worked on. Call what it yields with the stage's figures, for the trackers."""
    global _stage
    before, start = _stage, time.monotonic()
    _stage = f"{phase}/{stage}"
    note("info", "begin")
    number = {"base": 0, "warmup": 1}.get(phase)
    number = 1 + int(phase.removeprefix("iteration_")) if number is None else number
    yield lambda figures: _track(stage, number, dict(_numbers(figures)))
    note("info", f"end after {time.monotonic() - start:.1f} s")
    _stage = before


def current_stage() -> str | None:
    """What is being worked on, `phase/stage`, or what failed; None outside of any stage."""
    return _stage


def _numbers(tree: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, float]]:
    """The numbers among figures, by the names that lead to them."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{head}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{head}{name}", value


def _track(group: str, step: int, values: Mapping[str, float]) -> None:
    for tracker in _journal.trackers if _journal else ():
        tracker.write(group, step, {name: value for name, value in values.items() if math.isfinite(value)})


def say(text: str) -> None:
    """One line for the user, on stderr, so that stdout holds results only."""
    if is_first():
        note("info", text)
        console.print(redacted(text), markup=False, soft_wrap=True)


def fail(text: str) -> None:
    """The line that a command ends with in error; every process says its own."""
    with contextlib.suppress(OSError):  # the disk that is full may be what it is about
        note("error", text)
    print(redacted(text), file=sys.stderr)


def note(level: str, text: str) -> None:
    """A line for `log.jsonl` alone."""
    if _journal is not None:
        _journal.line(level, text)


@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar for `total` units of work, some `done` before; call what it yields with units and, if wished, `note=`.

    Where nobody looks at a terminal, one line at the end says how long it took; `log.jsonl` says now and then how far
    it is.
    """
    global _replays
    before, start, _replays = done, time.monotonic(), False
    told = start
    bar = Progress(
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (sys.stderr.isatty() and is_first()),
    )
    with bar, traced(_journal and _journal.traces, what, say) as tick:
        task = bar.add_task(what, total=total, completed=done, note="")

        def advance(units: int = 1, note: str = "") -> None:
            nonlocal before, done, start, told
            done += units
            bar.update(task, advance=units, note=note)
            if _replays:
                before, start = done, time.monotonic()
                return
            tick()
            if (now := time.monotonic()) - told >= PROGRESS_SECONDS:
                told = now
                left = (now - start) / max(done - before, 1) * max(total - done, 0)
                _tell(what, done, total, now - start, left, note)

        yield advance
    new = f", {done - before} of them" if before else ""
    say(f"{what:<28} {done}{new} in {time.monotonic() - start:.1f} s")


def mark_replay(replays: bool) -> None:
    """Whether what comes next was done before the work was interrupted: it says nothing of its speed."""
    global _replays
    _replays = replays


def _tell(what: str, done: int, total: int, seconds: float, left: float, extra: str) -> None:
    text = f"{what} {done}/{total}, {seconds:.0f} s, about {left:.0f} s left"
    note("progress", f"{text}, {extra}" if extra else text)
