"""What a run reports while it works: JSON lines on disk, progress bars and short messages on the terminal.

In: numbers by name. Out: `metrics.jsonl` (one object a line: time, stage, step, values), and a bar with what is
being done, how far it is and how long it will take.
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False)
console_out = Console(highlight=False)


class Metrics(NamedTuple):
    """The metrics file of one stage."""

    path: Path
    stage: str

    def write(self, step: int, **values: float) -> None:
        """Appends one line; what is not finite becomes null, since JSON has no other word for it."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {"time": round(time.time(), 3), "stage": self.stage, "step": step, **finite}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def say(text: str) -> None:
    """One line for the user, on stderr, so that stdout holds results only."""
    console.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def progress(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar for `total` units of work; call what it yields with the units done and, if wished, `note=`.

    Where nobody looks at a terminal, one line at the end says how long it took.
    """
    start = time.monotonic()
    done = 0
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
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(what, total=total, note="")

        def advance(units: int = 1, note: str = "") -> None:
            nonlocal done
            done += units
            bar.update(task, advance=units, note=note)

        yield advance
    say(f"{what:<28} {done} in {time.monotonic() - start:.1f} s")
