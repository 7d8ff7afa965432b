"""Stops a run without losing work after SIGTERM, which Slurm, Kubernetes and TPU maintenance send some time ahead.

In: the signal, or a message from another process that received it (see `hosts`). Out: whether to stop, checked after
each training step and after each batch of other work; and a call, at once, that can say so.
"""

import contextlib
import dataclasses
import functools
import os
import signal
import threading
from collections.abc import Callable


class PreemptionError(Exception):
    """The run was asked to stop; all its work is saved."""


@dataclasses.dataclass
class _State:
    asked: bool = False
    acknowledge: Callable[[int], None] = lambda _: None
    """Called with the number of SIGTERMs so far."""
    received: int = 0


_state = _State()


def listen(acknowledge: Callable[[int], None] = lambda _: None) -> None:
    """Makes SIGTERM ask the run to stop at a safe point, and call `acknowledge` in a thread, with 1, 2, … for each.

    Further SIGTERMs change nothing else: a scheduler may send several, and a checkpoint may be half written.
    """
    _state.asked, _state.acknowledge, _state.received = False, acknowledge, 0
    # Python calls a signal's handler once the main thread is back from compiled code, perhaps after minutes of XLA's.
    # It writes the signal's number to this pipe at once.
    signal.set_wakeup_fd(_pipe_of_signals(os.getpid()), warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: ask_to_stop())


@functools.cache
def _pipe_of_signals(_: int) -> int:
    """Starts a process's thread that reads the numbers of signals from a pipe; returns the end to write to."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    threading.Thread(target=_hear, args=(read,), daemon=True).start()
    return write


def _hear(signals: int) -> None:
    while numbers := os.read(signals, 64):
        for number in numbers:
            if number == signal.SIGTERM:
                ask_to_stop()
                _state.received += 1
                with contextlib.suppress(OSError):  # nobody reads stderr
                    _state.acknowledge(_state.received)


def ask_to_stop() -> None:
    """Asks this process to stop, as SIGTERM does; used when another process of the run was asked."""
    _state.asked = True


def asked_to_stop() -> bool:
    """Returns whether the run was asked to stop; a request to one process reaches all within seconds."""
    return _state.asked


def stop_if_asked() -> None:
    """Raises PreemptionError if the run was asked to stop."""
    if asked_to_stop():
        raise PreemptionError
