"""The process of a run among others: what it is asked to do by signals.

In: SIGTERM, with which schedulers announce that a machine is taken away. Out: `PreemptionError`, raised where the
work can be taken up again.
"""

import signal
import threading
from typing import NamedTuple

_asked_to_stop = threading.Event()


class PreemptionError(Exception):
    """The run was asked to stop, and all that it has done is kept."""


def listen() -> None:
    """From now on SIGTERM asks the run to stop where nothing is lost; a second one ends it at once."""
    _asked_to_stop.clear()
    signal.signal(signal.SIGTERM, _ask_to_stop)


def _ask_to_stop(*_: object) -> None:
    _asked_to_stop.set()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def asked_to_stop() -> bool:
    """Whether the run was asked to stop."""
    return _asked_to_stop.is_set()


def stop_if_asked() -> None:
    """Raises PreemptionError where the run was asked to stop."""
    if asked_to_stop():
        raise PreemptionError


class Vote(NamedTuple):
    """What a process wishes to happen at the end of a training step, or what all do."""

    stop: bool
    save: bool


def vote(*, stop: bool, save: bool) -> Vote:
    """Tells the other processes what this one wishes; each calls it once a step."""
    return Vote(stop, save)


def decided(votes: Vote) -> Vote:
    """What any process wished in that step: the same in all of them."""
    return votes
