"""SIGTERM asks a run to stop where nothing is lost: Slurm, Kubernetes and TPU maintenance send it some time ahead.

In: the signal, or the word of another process that had it (see `hosts`). Out: whether to stop, asked after each step of
a training and each batch of the rest.
"""

import signal
import threading


class PreemptionError(Exception):
    """The run was asked to stop, and all that it has done is kept."""


_asked_to_stop = threading.Event()


def listen() -> None:
    """From now on SIGTERM asks the run to stop where nothing is lost; a second one ends it at once."""
    _asked_to_stop.clear()
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(*_: object) -> None:
    ask_to_stop()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def ask_to_stop() -> None:
    """Asks this process, as a signal does: another one of the run was."""
    _asked_to_stop.set()


def asked_to_stop() -> bool:
    """Whether the run was asked to stop; what one process is asked, all know within seconds."""
    return _asked_to_stop.is_set()


def stop_if_asked() -> None:
    """Raises PreemptionError where the run was asked to stop."""
    if asked_to_stop():
        raise PreemptionError
