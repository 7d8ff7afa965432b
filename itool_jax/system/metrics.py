"""The numbers of a run: `metrics.jsonl` in the run directory, and the trackers.

In: numbers by name. Out: `metrics.jsonl`, one object a line with time, stage, step and values; TensorBoard and Weights
& Biases if asked (`trackers`). Of several processes, only the first one writes.
"""

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from itool_jax.system.files import whole_file
from itool_jax.system.hosts import is_first
from itool_jax.system.trackers import Tracker
from itool_jax.system.untrusted import parse_json

_trackers: list[Tracker] = []


def attach_trackers(trackers: Iterable[Tracker]) -> None:
    """Sends all numbers to these trackers, too, from now on."""
    _trackers.extend(trackers)


def close_trackers() -> None:
    """Closes the trackers, which may upload what is left, and detaches them."""
    closing = [*_trackers]
    _trackers.clear()
    for tracker in closing:
        tracker.close()


class Metrics(NamedTuple):
    """The numbers of one stage in a metrics file."""

    path: Path
    stage: str
    steps_before: int = 0
    """Steps of the stage that earlier trainings took; those of this one are counted behind them."""

    def write(self, step: int, **values: float) -> None:
        """Appends one line, with null for what is not finite, since JSON has no other word for it."""
        if not is_first():
            return
        step += self.steps_before
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {"time": round(time.time(), 3), "stage": self.stage, "step": step, **finite}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        _track(self.stage, step, values)

    def drop_after(self, step: int) -> None:
        """Removes the lines of this stage after a step from which it resumes, and a line that was cut off."""
        if not self.path.is_file():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        last = step + self.steps_before
        kept = [line for line in lines if line.endswith(b"\n") and not self._is_later(line, last)]
        if kept != lines:
            with whole_file(self.path) as file:
                file.writelines(kept)

    def _is_later(self, line: bytes, step: int) -> bool:
        try:
            row = parse_json(line.decode())
            return row["stage"] == self.stage and row["step"] > step
        except (ValueError, TypeError, KeyError):
            return True


def track_results(phase: str, stage: str, results: Mapping[str, Any]) -> None:
    """Sends the numbers among a stage's results to the trackers, at its phase: 0 base, 1 warm-up, and so on."""
    number = {"base": 0, "warmup": 1}.get(phase)
    number = 1 + int(phase.removeprefix("iteration_")) if number is None else number
    _track(stage, number, dict(_numbers(results)))


def _numbers(tree: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers in nested mappings, each with the names that lead to it."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{head}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{head}{name}", value


def _track(group: str, step: int, values: Mapping[str, float]) -> None:
    for tracker in _trackers:
        tracker.write(group, step, {name: value for name, value in values.items() if math.isfinite(value)})
