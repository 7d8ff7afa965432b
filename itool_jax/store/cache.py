"""Steps with cached results: finished work is not repeated, and stale results are never used.

In: a step and its input values. Out: the step's value, read from its files. `<step>.json` holds the step's figures with
hashes of its inputs and outputs. Until the step is done, a folder `<step>.working` holds finished rows and checkpoints.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

from itool_jax.config import Config
from itool_jax.store import columns
from itool_jax.store.across_hosts import Work, map_across_hosts
from itool_jax.store.base import let_go_of_programs
from itool_jax.store.checkpoint import damage
from itool_jax.store.directory import STARTED, binding_settings
from itool_jax.store.paths import StepId, done_file, iteration_of, working_folder
from itool_jax.store.sources import ALL, MODEL, check_sources
from itool_jax.system import hosts
from itool_jax.system.files import read_json, write_json
from itool_jax.system.messages import log, working_on
from itool_jax.system.metrics import track_results
from itool_jax.system.preemption import PreemptionError, asked_to_stop

if TYPE_CHECKING:
    from itool_jax.store.run import Run

T = TypeVar("T")
R = TypeVar("R", bound=tuple)
Figures = dict[str, Any]


@runtime_checkable
class Value(Protocol):
    """An input of a step: data, or the result of another step."""

    @property
    def origin(self) -> StepId | None:
        """The step that produced it; None if it comes with the run's data or model."""
        ...

    def require(self) -> None:
        """Raises ValueError, naming the step to run first, if the value does not exist yet."""
        ...


@dataclasses.dataclass(frozen=True)
class Step(Generic[T]):
    """A computation whose result is cached in a phase's folder."""

    name: str
    outputs: Sequence[str]
    """Files and folders that it writes in the phase's folder."""
    compute: Callable[..., Figures]
    """compute(task, *inputs) writes the outputs and returns the step's figures as plain JSON."""
    read: Callable[["Phase"], T]
    """Returns the value: a handle that reads the outputs on demand."""
    data_hashes: Mapping[str, str] | None = None
    """Hashes, by name, of the data that the step reads instead of the run's; None if it reads the run's data."""


class Task(NamedTuple):
    """The context in which a step runs."""

    run: "Run"
    phase: str
    step: str

    @property
    def config(self) -> Config:
        """The run's settings."""
        return self.run.config

    @property
    def iteration(self) -> int:
        """The phase's iteration number; 0 for the warm-up."""
        return iteration_of(self.phase)

    @property
    def folder(self) -> Path:
        """The phase's folder."""
        return self.config.run_dir / self.phase

    @property
    def working(self) -> Path:
        """The folder of unfinished work."""
        return working_folder(self.config.run_dir, self.phase, self.step)

    def map(
        self, items: Sequence[T], work: Work[T], what: str, units: int = 1, folder: Path | None = None
    ) -> list[Any]:
        """Computes the result of `work` for each item, journaled row by row; see `map_across_hosts`.

        A step that maps more than once must pass a separate folder in `working` for each call.
        """
        return map_across_hosts(self.config, folder or self.working, items, work, what, units)


class Phase(NamedTuple):
    """A phase of a run: base, warmup, iteration_1, …"""

    run: "Run"
    name: str

    @property
    def folder(self) -> Path:
        """The phase's folder."""
        return self.run.config.run_dir / self.name

    def cached(self, step: Step[T], *inputs: Value) -> T:
        """Returns a step's value; computes it from `inputs` unless it exists and the inputs are unchanged."""
        compute_once(self.run, self.name, step, inputs)
        return step.read(self)

    def read(self, step: Step[T]) -> T:
        """Returns the value that an earlier command computed; if none did, its first use names the step to run."""
        return step.read(self)

    def figures(self, step: str) -> Figures:
        """Returns the figures of a finished step."""
        figures = read_figures(self.run.config.run_dir, self.name, step)
        assert figures is not None, f"{step} was not computed"
        return figures


class Table(Generic[R]):
    """Rows of a file that a step wrote, read and checked on first use."""

    def __init__(self, path: Path, kind: type[R], keys: Sequence[str], origin: StepId, command: str):
        self.path, self._kind, self._keys, self._command, self.origin = path, kind, keys, command, origin
        self._rows: list[R] | None = None

    def require(self) -> None:
        """Raises ValueError, naming the step to run first, if the file does not exist."""
        if not self.path.exists():
            raise ValueError(f"{self.path} does not exist; run {self._command} first")

    @property
    def rows(self) -> list[R]:
        """The rows; ValueError names one that lacks a key."""
        if self._rows is None:
            self.require()
            self._rows = columns.read_table(self.path, self._kind, self._keys)
        return self._rows


def compute_once(run: "Run", phase: str, step: Step[Any], inputs: Sequence[Value]) -> None:
    """Runs a step unless it is done, and saves its figures with the seconds it took.

    A step is done if its figures and all outputs exist, and the settings, the data and the results of the steps that
    produced its inputs have not changed since.

    Raises:
        ValueError: an input does not exist yet, or a file of the run is damaged.
        PreemptionError: the run was asked to stop.
    """
    task = Task(run, phase, step.name)
    state = _State(*hosts.broadcast_from_primary(f"begin {phase}/{step.name}", lambda: _begin(task, step, inputs)))
    if state.stop:
        raise PreemptionError
    if state.done:
        return
    for value in inputs:
        value.require()
    start = time.monotonic()
    let_go_of_programs(run.base)
    with working_on(phase, step.name):
        figures = step.compute(task, *inputs)
        track_results(phase, step.name, figures)
    seconds = round(state.seconds + time.monotonic() - start, 2)
    hosts.broadcast_from_primary(
        f"end {phase}/{step.name}", lambda: _end(task, step, figures | {"seconds": seconds}, state.basis or {})
    )


class _State(NamedTuple):
    """The state of a step when a command reaches it, as plain JSON."""

    stop: bool
    done: bool = False
    basis: dict[str, Any] | None = None
    """Hashes of its inputs by name, if it has to run."""
    seconds: float = 0.0
    """Seconds that earlier commands spent on it."""


def _begin(task: Task, step: Step[Any], inputs: Sequence[Value]) -> _State:
    """Checks whether a step is done; if not, opens its working folder."""
    if asked_to_stop():
        return _State(stop=True)
    config = task.config
    check_sources(config, ALL if step.data_hashes is None else MODEL)
    basis = _basis(config, step, inputs)
    stale = _staleness(task, step, basis)
    if stale is None:
        shutil.rmtree(task.working, ignore_errors=True)
        log(f"{task.phase}: {step.name} already done{_edited(task, step)}")
        return _State(stop=False, done=True)
    if stale:
        log(f"{task.phase}: running {step.name} again: {stale}")
    return _State(stop=False, basis=basis, seconds=open_working(task.working, basis))


def _staleness(task: Task, step: Step[Any], basis: Mapping[str, Any]) -> str | None:
    """Returns why a step must run: a reason to print, "" if it never finished, or None if it is done."""
    figures = read_figures(task.config.run_dir, task.phase, step.name)
    paths = [task.folder / name for name in step.outputs]
    if figures is None or not all(path.exists() for path in paths):
        return ""
    for path in paths:
        if path.is_dir() and (bad := damage(path)):
            return f"{path}: {bad}"
    if not _unchanged(figures.get("after"), basis):
        return "its inputs have changed"
    return None


def _unchanged(recorded: Any, basis: Mapping[str, Any]) -> bool:
    """Checks that the inputs a step recorded are unchanged; earlier versions recorded fewer of them."""
    return (
        isinstance(recorded, dict)
        and "settings" in recorded
        and all(name in basis and basis[name] == value for name, value in recorded.items())
    )


def _edited(task: Task, step: Step[Any]) -> str:
    """Names an output that was edited after the step wrote it."""
    written = (read_figures(task.config.run_dir, task.phase, step.name) or {})["outputs"]
    paths = {name: task.folder / name for name in step.outputs}
    edited = [path for name, path in paths.items() if file_hash(path) != written.get(name)]
    return f", but {edited[0]} was edited since" if edited else ""


def _end(task: Task, step: Step[Any], figures: Figures, basis: Mapping[str, Any]) -> None:
    """Marks a step as done and removes its working folder."""
    outputs = {name: file_hash(task.folder / name) for name in step.outputs}
    write_json(done_file(task.config.run_dir, task.phase, step.name), figures | {"after": basis, "outputs": outputs})
    shutil.rmtree(task.working)


def _basis(config: Config, step: Step[Any], inputs: Sequence[Value]) -> dict[str, Any]:
    """Hashes the settings, the data and the results that a step is computed from, by name.

    `check_sources` checks the model's files separately.
    """
    settings = {name: value for name, value in binding_settings(config).items() if name != "data"}
    data = step.data_hashes
    if data is None:
        data = {f"data/{path.name}": file_hash(path) for path in sorted((config.run_dir / "data").glob("*.jsonl"))}
    origins = [value.origin for value in inputs if value.origin is not None]
    results = {f"{phase}/{name}": _result_digest(config, phase, name) for phase, name in origins}
    return {"settings": hash_of(settings), **data, **results}


def _result_digest(config: Config, phase: str, step: str) -> str | None:
    """Hashes a step's whole result, with its files as they are now; None if it is not done."""
    figures = read_figures(config.run_dir, phase, step)
    if figures is None:
        return None
    lasting = {name: value for name, value in figures.items() if name != "seconds"}
    files = [config.run_dir / phase / name for name in figures["outputs"]]
    return hash_of([lasting, *(file_hash(path) for path in files if path.is_file())])


def hash_of(content: Any) -> str:
    """Hashes plain JSON."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def file_hash(path: Path) -> str | None:
    """Hashes a file's content; None for a folder, whose files have their own checksums."""
    return None if path.is_dir() else hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def read_figures(run_dir: Path, phase: str, step: str) -> Figures | None:
    """Reads the figures of a finished step; None if there are none, ValueError if the file is damaged."""
    path = done_file(run_dir, phase, step)
    if not path.exists():
        return None
    figures = read_json(path)
    for key, kind in (("seconds", int | float), ("outputs", dict)):
        if not isinstance(figures.get(key), kind):
            raise ValueError(f'{path} is damaged (no "{key}"); delete it to run the stage again')
    if outside := [name for name in figures["outputs"] if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"{path} is damaged ({outside[0]} is not in its folder); delete it to run the stage again")
    return figures


def open_working(working: Path, basis: Mapping[str, Any]) -> float:
    """Opens the working folder, emptied if its inputs changed; returns the seconds already spent on that work."""
    path = working / STARTED
    begun, seconds = read_json(path) if path.exists() else {}, 0.0
    if _unchanged(begun.get("after"), basis):
        last = max(file.stat().st_mtime for file in working.rglob("*"))
        if not columns.fault(begun, {"seconds": float, "time": float}):
            seconds = begun["seconds"] + max(0.0, last - begun["time"])
    elif working.exists():
        log(f"discarding {working}: its inputs changed")
        shutil.rmtree(working)
    write_json(path, {"after": basis, "seconds": seconds, "time": time.time()})
    return seconds
