"""Coordinates the processes of a run, one per host: they find each other, agree, and notice when one is gone.

In: settings, or what Slurm, a TPU pod or GKE report. Out: functions that decide the same on all processes, and a thread
that ends this process with a line naming another one that died, hung or failed. A single process pays nothing for them.
Messages go through the key-value store of jax's coordination service, which process 0 holds.
"""

import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

from itool_jax.system.preemption import PreemptionError, ask_to_stop, asked_to_stop, stop_if_asked
from itool_jax.system.untrusted import redacted

T = TypeVar("T")
LOST = 69
"""Exit code of a process that stops because another one did."""
BEAT, WAITING = 2.0, 60.0
"""Seconds between two heartbeats of a process, and between two lines that name the processes waited for."""
ASKED = "asked to stop"
"""Exit marker of a process that was asked to stop."""
PARTING = 20.0
"""Seconds that process 0, which holds the store, waits for the others to leave first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistributedSettings:
    """Several processes that work as one, each on the devices of its host, with a shared run directory."""

    auto: bool = False
    """Get the next three settings from Slurm, the TPU pod, GKE or Open MPI, whichever started this process."""
    coordinator_address: str | None = None
    """Host and port of process 0, such as node1:12345."""
    num_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""
    heartbeat_timeout: float = 30.0
    """Seconds without a heartbeat from a process before the others stop and name it."""

    def __post_init__(self) -> None:
        names = ("coordinator_address", "num_processes", "process_id")
        given = [f"distributed.{name}" for name in names if getattr(self, name) is not None]
        if given and (self.auto or len(given) < 3):
            raise ValueError(
                f"{given[0]} is set {'with distributed.auto' if self.auto else 'alone'}; set either auto, or all of "
                "coordinator_address, num_processes and process_id"
            )
        if given and not 0 <= (self.process_id or 0) < (self.num_processes or 0):
            raise ValueError(
                f"distributed.process_id must be from 0 to num_processes - 1, got {self.process_id} of "
                f"{self.num_processes}"
            )
        if not self.heartbeat_timeout > 2 * BEAT:
            raise ValueError(
                f"distributed.heartbeat_timeout must be more than {2 * BEAT:.0f} seconds, got {self.heartbeat_timeout}"
            )

    @property
    def several(self) -> bool:
        """True if the command is one of several processes."""
        return self.auto or self.coordinator_address is not None


# This process -----------------------------------------------------------------------------------------------


class _Other(NamedTuple):
    """The last heartbeat from another process, and its time."""

    text: str
    time: float

    @property
    def state(self) -> dict[str, Any]:
        """The contents of the heartbeat; empty before the first one."""
        return json.loads(self.text) if self.text else {}


@dataclasses.dataclass
class _Run:
    """The processes of this run; `store` is set once they have found each other."""

    store: Any = None
    index: int = 0
    count: int = 1
    stage: Callable[[], str | None] = lambda: None
    agreed: dict[str, Any] = dataclasses.field(default_factory=dict)
    left: set[int] = dataclasses.field(default_factory=set)
    leaving: bool = False
    timeout: float = 0.0
    steps: int = 0
    step_time: float = 0.0
    heard: dict[int, _Other] = dataclasses.field(default_factory=dict)
    threads: list[threading.Thread] = dataclasses.field(default_factory=list)


_run = _Run()


def index() -> int:
    """Returns the number of this process."""
    return _run.index


def count() -> int:
    """Returns the number of processes."""
    return _run.count


def is_first() -> bool:
    """Returns whether this is the first process, the one that writes logs, metrics and results."""
    return _run.index == 0


def join(settings: DistributedSettings, stage: Callable[[], str | None] = lambda: None) -> None:
    """Connects to the other processes; call it before the first use of a device.

    `stage` returns the stage this process is in, for messages.

    Raises:
        ValueError: the other processes are not known, or did not arrive.
    """
    if not settings.several or _run.store is not None:
        return
    import jax
    from jax._src import distributed  # the store has no public name; Orbax and Flax use it by this one too

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    try:
        jax.distributed.initialize(
            settings.coordinator_address,
            settings.num_processes,
            settings.process_id,
            cluster_detection_method=None if settings.auto else "deactivate",
            shutdown_timeout_seconds=int(PARTING),
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the processes of this run could not connect to each other: {reason}") from error
    _run.store, _run.index, _run.count = distributed.global_state.client, jax.process_index(), jax.process_count()
    _run.stage, _run.timeout = stage, settings.heartbeat_timeout
    _watch()


# Agreement --------------------------------------------------------------------------------------------------


def broadcast_from_primary(name: str, compute: Callable[[], T]) -> T:
    """Computes a plain JSON value on the first process and returns it on all; its ValueError is shared too.

    Each name is computed once. A single process calls `compute()` every time.
    """
    if _run.store is None:
        return compute()
    if name not in _run.agreed:
        key = f"itool/agreed/{_plain(name)}"
        if is_first():
            try:
                told: dict[str, Any] = {"value": compute()}
            except ValueError as error:
                told = {"error": str(error)}
            _run.store.key_value_set(f"{key}/0", json.dumps(told), allow_overwrite=True)
        else:
            (text,) = _await(f"{key}/", 1)
            told = json.loads(text)
        _run.agreed[name] = told
    if "error" in _run.agreed[name]:
        raise ValueError(_run.agreed[name]["error"])
    return _run.agreed[name]["value"]


def barrier(name: str) -> None:
    """Waits until all processes reach this point; use each name once.

    Raises:
        PreemptionError: the run was asked to stop while waiting.
    """
    if _run.store is not None:
        key = f"itool/met/{_plain(name)}"
        _run.store.key_value_set(f"{key}/{index()}", "here", allow_overwrite=True)
        _await(f"{key}/", count())


def _plain(name: str) -> str:
    """Hashes a name so that it can be part of a key, in which slashes are separators."""
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def _await(prefix: str, wanted: int) -> list[str]:
    """Waits for `wanted` keys with this prefix and returns their values; the watch handles lost processes."""
    pause, told = 0.005, time.monotonic()
    while len(entries := _run.store.key_value_dir_get(prefix)) < wanted:
        if is_first() and time.monotonic() - told > WAITING:
            told = time.monotonic()
            missing = set(range(count())) - {int(key.rpartition("/")[2]) for key, _ in entries}
            print(f"waiting for {', '.join(_described(i) for i in sorted(missing))}", file=sys.stderr)
        if _run.left:  # a process that was asked to stop has left and will not arrive
            stop_if_asked()
        time.sleep(pause)
        pause = min(0.2, pause * 1.5)
    return [value for _, value in entries]


class Vote(NamedTuple):
    """A process's vote for the end of a training step, or the votes of all."""

    stop: Any
    save: Any


def vote(*, stop: bool, save: bool) -> Vote:
    """Casts this process's vote; every process calls it once per step, and none waits for the others."""
    if _run.store is None:
        return Vote(stop, save)
    import jax
    import numpy as np

    mesh = jax.sharding.get_mesh()
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
    here = np.array([[stop, save]], np.int32)
    return Vote(*_any()(jax.make_array_from_callback((mesh.size, 2), rows, lambda _: here)))


@functools.cache
def _any() -> Callable[[Any], Any]:
    import jax

    return jax.jit(lambda wishes: tuple(wishes.max(axis=0)))


def decided(votes: Vote) -> Vote:
    """Returns what any process voted for in that step, the same on all processes."""
    return Vote(*(bool(wish) for wish in votes))


def stop_together() -> None:
    """Raises PreemptionError like `stop_if_asked`, for processes that compute together: all raise, or none."""
    if decided(vote(stop=asked_to_stop(), save=False)).stop:
        raise PreemptionError


# Heartbeats -------------------------------------------------------------------------------------------------


def step_done() -> None:
    """Counts a training step that all processes make together, so that one that falls behind is known to hang."""
    _run.steps, _run.step_time = _run.steps + 1, time.monotonic()


def _watch() -> None:
    """Starts the threads that send this process's heartbeat and check those of the others."""
    _run.heard = {i: _Other("", time.monotonic()) for i in range(count())}
    _run.threads = [threading.Thread(target=target, daemon=True) for target in (_beat, _judge)]
    for thread in _run.threads:
        thread.start()
    _end_in_words_without_store()


def _beat() -> None:
    """Sends a heartbeat and reads those of the others, every `BEAT` seconds."""
    heard = _run.heard
    where = f"process {index()} on {socket.gethostname()}"
    for number in range(1 << 62):
        with contextlib.suppress(Exception):  # `_judge` finds those that do not answer
            quiet = time.monotonic() - _run.step_time
            state = {"number": number, "where": where, "stage": _run.stage(), "steps": _run.steps, "quiet": quiet}
            state["stop"] = asked_to_stop()
            _run.store.key_value_set(f"itool/alive/{index()}", json.dumps(state), allow_overwrite=True)
            for key, text in _run.store.key_value_dir_get("itool/alive/"):
                other = int(key.rpartition("/")[2])
                if text != heard[other].text:
                    heard[other] = _Other(text, time.monotonic())
                if json.loads(text)["stop"]:
                    ask_to_stop()
            left = _run.store.key_value_dir_get("itool/left/")
            if any(text == ASKED for _, text in left):  # it may stop before its next heartbeat
                ask_to_stop()
            _run.left |= {int(key.rpartition("/")[2]) for key, _ in left}
            heard[index()] = _Other("", time.monotonic())  # the store answers
            for key, line in _run.store.key_value_dir_get("itool/failed/"):
                if int(key.rpartition("/")[2]) != index() and not _run.leaving:
                    _end(line)
        if _run.leaving:
            return
        time.sleep(BEAT)


def _judge() -> None:
    """Ends this process if another one or the store is silent for too long, or if one hangs in training."""
    while True:
        time.sleep(1.0)
        silent = {i: time.monotonic() - other.time for i, other in _run.heard.items()}
        if _run.leaving:
            return
        if silent[index()] > _run.timeout and index() != 0:  # nobody can be heard if the store is silent
            _end(f"{_described(0)} has sent no heartbeat for {silent[index()]:.0f} s: it died or hangs")
        others = silent.keys() - _run.left - {index()} if silent[index()] < _run.timeout / 2 else ()
        for i in sorted(others):
            if (seconds := silent[i]) > _run.timeout:
                _end(f"{_described(i)} has sent no heartbeat for {seconds:.0f} s: it died or hangs")
            if (quiet := _behind(_run.heard[i].state)) > _run.timeout:
                _end(f"{_described(i)} has been at one training step for {quiet:.0f} s, behind the others: it hangs")


def _behind(state: dict[str, Any]) -> float:
    """Returns how many seconds a process has lagged behind this one's last step, while this one waited too."""
    if state.get("steps", _run.steps) >= _run.steps:
        return 0.0
    return min(state["quiet"], time.monotonic() - _run.step_time)


def _described(number: int) -> str:
    """Describes a process by its number, its host and the stage in its last heartbeat."""
    state = _run.heard[number].state
    at = f" (in {state['stage']})" if state.get("stage") else ""
    return f"{state.get('where', f'process {number}')}{at}"


def _end(line: str) -> NoReturn:
    """Ends this process at once, because its main thread may wait for the other one forever."""
    text = f"{line}; stopping process {index()}. Rerun the same command to resume.\n"
    with contextlib.suppress(OSError):
        os.write(2, redacted(text).encode())
    os._exit(LOST)


def _end_in_words_without_store() -> None:
    """Names process 0 after the stack trace with which jax's client aborts the others when process 0 dies."""
    if index() != 0:
        library = ctypes.CDLL(None)
        library.signal.argtypes, library.signal.restype = [ctypes.c_int, _HANDLER], ctypes.c_void_p
        library.signal(signal.SIGABRT, _on_abort)


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


@_HANDLER
def _on_abort(_: int) -> None:
    _end("process 0, which holds the key-value store, is gone")


def leave(failure: str | None = None) -> None:
    """Tells the others that this process ends, and why if it failed; the first process waits for them to leave."""
    if _run.store is None or _run.leaving:
        return
    with contextlib.suppress(Exception):
        key, text = "left", ASKED if asked_to_stop() else "done"
        if failure:
            key, text = "failed", f"process {index()} failed: {failure}"
        _run.store.key_value_set(f"itool/{key}/{index()}", text, allow_overwrite=True)
        end = time.monotonic() + (2 * BEAT if failure else PARTING)
        while is_first() and time.monotonic() < end and len(_run.left) < count():
            time.sleep(0.1)
    _run.leaving = True


def end(code: int) -> NoReturn:
    """Ends the process; a failed one of several skips jax's shutdown, which would wait for all of them."""
    if _run.store is None or not code:
        for thread in _run.threads:  # one still in a call to the store at Python's exit would crash the process
            thread.join(PARTING)
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def await_verdict() -> None:
    """Waits, after an error that another process may have caused, until the watch names it and ends this process."""
    if _run.store is not None:
        print("communication between the processes failed; waiting to find out which one is gone", file=sys.stderr)
        time.sleep(_run.timeout + 3 * BEAT)
