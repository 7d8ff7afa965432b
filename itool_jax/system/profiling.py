"""Traces a few steps of each kind of work, for Perfetto (https://ui.perfetto.dev) and XProf.

In: a call at the end of each step. Out: `<folder>/<kind>/plugins/profile/<time>/` with `perfetto_trace.json.gz` and the
files that XProf and TensorBoard's profiler read.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

SKIPPED, TRACED = 4, 4
"""Steps skipped for compilation and warm-up, and steps traced after them."""


@contextlib.contextmanager
def traced(folder: Path | None, what: str, done: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Yields a function to call at the end of each step of `what`; passes `done` a message about a finished trace.

    Each kind of work, the first word of `what`, is traced once. Fewer than five steps, or no folder, give no trace.
    """
    kind = re.split(r"[\s,]", what)[0]
    place = None if folder is None else folder / kind
    if place is None or place.exists():
        yield lambda: None
        return
    trace = _Trace(place, kind)
    try:
        yield trace.tick
    finally:
        if trace.stop():
            done(f"profile: traced {trace.steps - SKIPPED} steps of {kind}, see {place}")


class _Trace:
    """Counter of steps that starts and stops the trace."""

    def __init__(self, place: Path, kind: str):
        self.place, self.kind, self.steps = place, kind, 0
        self.step: contextlib.ExitStack | None = None

    def tick(self) -> None:
        """Counts a finished step."""
        if self.steps == SKIPPED + TRACED:
            return
        self.steps += 1
        if self.steps == SKIPPED:
            self._start()
        elif self.step is not None:
            self.step.close()
            if self.steps < SKIPPED + TRACED:
                self._mark()
            else:
                self._end()

    def stop(self) -> bool:
        """Ends a trace that is still running; returns whether one was made."""
        if self.step is not None:
            self.step.close()
            self._end()
        if self.steps == SKIPPED:  # no step followed its start
            shutil.rmtree(self.place, ignore_errors=True)
        return self.place.exists()

    def _start(self) -> None:
        import jax

        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call would fill the trace
        jax.profiler.start_trace(self.place, create_perfetto_trace=True, profiler_options=options)
        self._mark()

    def _mark(self) -> None:
        """Marks the start of a step; XProf tells steps apart by these marks."""
        import jax

        self.step = contextlib.ExitStack()
        self.step.enter_context(jax.profiler.StepTraceAnnotation(self.kind, step_num=self.steps))

    def _end(self) -> None:
        import jax

        self.step = None
        jax.profiler.stop_trace()
