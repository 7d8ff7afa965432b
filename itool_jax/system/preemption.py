"""Stops a run without losing work after SIGTERM, which Slurm, Kubernetes and TPU maintenance send some time ahead.

In: the signal, or a message from another process that received it (see `hosts`). Out: whether to stop, checked after
each training step and after each batch of other work.
"""

import signal
import threading


class PreemptionError(Exception):
    """The run was asked to stop; all its work is saved."""


_asked_to_stop = threading.Event()


def listen() -> None:
    """Makes SIGTERM ask the run to stop at a safe point; a second SIGTERM ends it at once."""
    _asked_to_stop.clear()
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(*_: object) -> None:
    ask_to_stop()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def ask_to_stop() -> None:
    """Asks this process to stop, as SIGTERM does; used when another process of the run was asked."""
    _asked_to_stop.set()


def asked_to_stop() -> bool:
    """Returns whether the run was asked to stop; a request to one process reaches all within seconds."""
    return _asked_to_stop.is_set()


def stop_if_asked() -> None:
    """Raises PreemptionError if the run was asked to stop."""
    if asked_to_stop():
        raise PreemptionError
