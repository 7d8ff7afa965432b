"""A trace of a few steps of each kind of work, for Perfetto (https://ui.perfetto.dev) and XProf.

In: a call at the end of each step. Out: `<folder>/<kind>/plugins/profile/<time>/`: `perfetto_trace.json.gz`, and what
XProf and TensorBoard's profiler read.
"""

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

SKIPPED, TRACED = 4, 4
"""Steps that are left to compile and warm up, and steps that are traced behind them."""


@contextlib.contextmanager
def traced(folder: Path | None, what: str, done: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Call what it yields at the end of each step of `what`; `done` is told of a trace. Without a folder, none is made.

    Of each kind of work, which is the first word of `what`, one trace is made; fewer than five steps leave none.
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
            done(f"profile: traced {trace.steps - SKIPPED} of the steps of {kind}, in {place}")


class _Trace:
    """Steps are counted; those to trace lie between `start_trace` and `stop_trace`."""

    def __init__(self, place: Path, kind: str):
        self.place, self.kind, self.steps = place, kind, 0
        self.step: contextlib.ExitStack | None = None

    def tick(self) -> None:
        """A step is over."""
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
        """Ends a trace that is still on; returns whether any was made."""
        if self.step is not None:
            self.step.close()
            self._end()
        if self.steps == SKIPPED:  # nothing came behind its start
            shutil.rmtree(self.place, ignore_errors=True)
        return self.place.exists()

    def _start(self) -> None:
        import jax

        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call would fill the trace
        jax.profiler.start_trace(self.place, create_perfetto_trace=True, profiler_options=options)
        self._mark()

    def _mark(self) -> None:
        """XProf tells steps apart by these marks."""
        import jax

        self.step = contextlib.ExitStack()
        self.step.enter_context(jax.profiler.StepTraceAnnotation(self.kind, step_num=self.steps))

    def _end(self) -> None:
        import jax

        self.step = None
        jax.profiler.stop_trace()
