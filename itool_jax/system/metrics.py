"""Writes a run's metrics to `metrics.jsonl` in the run directory and to the trackers.

In: numbers by name. Out: `metrics.jsonl`, one object per line with time, stage, step and values; also TensorBoard and
Weights & Biases if enabled (`trackers`). Of several processes, only the first one writes.
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
    """Starts sending all numbers to these trackers, too."""
    _trackers.extend(trackers)


def close_trackers() -> None:
    """Detaches the trackers and closes them; closing may upload remaining numbers."""
    closing = [*_trackers]
    _trackers.clear()
    for tracker in closing:
        tracker.close()


class Metrics(NamedTuple):
    """The metrics of one stage in a metrics file."""

    path: Path
    stage: str
    steps_before: int = 0
    """Steps that earlier trainings of the stage took; this training's step numbers continue from there."""

    def write(self, step: int, **values: float) -> None:
        """Appends one line, with null for values that are not finite, which JSON cannot hold."""
        if not is_first():
            return
        step += self.steps_before
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {"time": round(time.time(), 3), "stage": self.stage, "step": step, **finite}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        _track(self.stage, step, values)

    def drop_after(self, step: int) -> None:
        """Removes this stage's lines after the step from which it resumes, and lines that were cut off."""
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
    """Sends the numbers in a stage's results to the trackers, with its phase as the step: 0 base, 1 warm-up, …"""
    number = {"base": 0, "warmup": 1}.get(phase)
    number = 1 + int(phase.removeprefix("iteration_")) if number is None else number
    _track(stage, number, dict(_numbers(results)))


def _numbers(tree: Mapping[str, Any], head: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers in nested mappings, each with its path of names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{head}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{head}{name}", value


def _track(group: str, step: int, values: Mapping[str, float]) -> None:
    for tracker in _trackers:
        tracker.write(group, step, {name: value for name, value in values.items() if math.isfinite(value)})
