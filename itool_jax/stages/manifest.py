"""What a stage was made from, so that finished work is not done again, and stale work never used.

In: a stage's work, the names of what it writes and of the stages it comes after. Out: its figures in `<stage>.json`,
with hashes of inputs and outputs; before it is done, a folder `<stage>.working` with what is done of it.
"""

import contextlib
import functools
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from itool_jax import hosts
from itool_jax.checkpoint import CHECKSUMS, damage
from itool_jax.config import Config
from itool_jax.files import read_json, write_json
from itool_jax.messages import say, working_on
from itool_jax.metrics import track_results
from itool_jax.preemption import PreemptionError, asked_to_stop
from itool_jax.run_directory import binding_settings
from itool_jax.stages import columns, folder


def once(
    config: Config,
    phase: str,
    stage: str,
    work: Callable[[], dict[str, Any]],
    outputs: Sequence[str],
    after: Sequence[tuple[str, str]] = (),
    *,
    inputs: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Does a stage's work unless it is done; returns and keeps its figures, with the seconds it took.

    It is done where the figures and all `outputs`, names in the phase's folder, are there, and the settings, the parts
    of the data or the hashes of other `inputs`, and the results of the stages it comes `after`, (phase, stage) each,
    are still those it was made from.
    """
    begin = functools.partial(_begin, config, phase, stage, outputs, after, inputs)
    asked, figures, basis, before = hosts.by_first(f"begin {phase}/{stage}", begin)
    if asked:
        raise PreemptionError
    if figures is not None:
        return figures
    start = time.monotonic()
    with working_on(phase, stage):
        figures = work()
        track_results(phase, stage, figures)
    seconds = round(before + time.monotonic() - start, 2)

    def end() -> dict[str, Any]:
        digests = {name: _digest(config.run_dir / phase / name) for name in outputs}
        result = figures | {"seconds": seconds, "after": basis, "outputs": digests}
        write_json(folder.done_file(config, phase, stage), result)
        shutil.rmtree(working_folder(config, phase, stage))
        return result

    return hosts.by_first(f"end {phase}/{stage}", end)


def _begin(
    config: Config,
    phase: str,
    stage: str,
    outputs: Sequence[str],
    after: Sequence[tuple[str, str]],
    inputs: Mapping[str, str] | None,
) -> tuple[bool, dict[str, Any] | None, dict[str, Any], float]:
    """Whether to stop here; the stage's figures where it is done; what it is made from; and seconds spent on it."""
    if asked_to_stop():
        return True, None, {}, 0.0
    folder.check_sources(config, ("model", "data") if inputs is None else ("model",))
    basis = _inputs(config, inputs) | {f"{p}/{s}": _result_digest(config, p, s) for p, s in after}
    working = working_folder(config, phase, stage)
    figures = folder.read_done(config, phase, stage)
    paths = {name: config.run_dir / phase / name for name in outputs}
    if figures is not None and all(path.exists() for path in paths.values()):
        bad = next((f"{path}: {bad}" for path in paths.values() if path.is_dir() and (bad := damage(path))), None)
        if bad is None and figures.get("after") == basis:
            shutil.rmtree(working, ignore_errors=True)
            changed = [path for name, path in paths.items() if _digest(path) != figures["outputs"].get(name)]
            note = f", {changed[0]} has been changed since" if changed else ""
            say(f"{phase}: {stage} is done already{note}")
            return False, figures, basis, 0.0
        say(f"{phase}: {bad or f'{stage} was made from results that have changed since'}, so it is done again")
    return False, None, basis, _open(working, basis)


@contextlib.contextmanager
def resumed(config: Config, output: Path) -> Iterator[Path]:
    """A folder beside a file for what is done of it, gone when it is written; elsewhere for a pipe or a device."""
    if output.exists() and not output.is_file():
        if hosts.count() > 1:
            raise ValueError(f"output {output} must be a file, which {hosts.count()} processes can meet through")
        with tempfile.TemporaryDirectory() as elsewhere:
            yield Path(elsewhere)
        return
    working = output.with_name(f"{output.name}.working")
    settings = {name: value for name, value in config.flat().items() if not name.startswith("distributed.")}
    phase = folder.answering_phase(config)
    checksums = folder.weights_folder(config, phase) / CHECKSUMS
    weights = _digest(checksums) if phase != "base" and checksums.exists() else None
    basis = {"settings": hash_of(settings), "sources": folder.fingerprints(config), "weights": weights}
    hosts.by_first(f"begin {output}", lambda: _open(working, basis))
    yield working
    hosts.by_first(f"end {output}", lambda: shutil.rmtree(working))


def _inputs(config: Config, inputs: Mapping[str, str] | None) -> dict[str, Any]:
    """Digests of the settings that matter and of what is read; `check_sources` knows the model's files."""
    settings = {name: value for name, value in binding_settings(config).items() if name != "data"}
    parts = sorted((config.run_dir / "data").glob("*.jsonl"))
    read = {f"data/{path.name}": _digest(path) for path in parts} if inputs is None else inputs
    return {"settings": hash_of(settings), **read}


def hash_of(content: Any) -> str:
    """A hash of plain JSON."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _digest(path: Path) -> str | None:
    """A hash of a file's content; a folder's files have checksums of their own."""
    return None if path.is_dir() else hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def working_folder(config: Config, phase: str, stage: str) -> Path:
    """Where a stage keeps what it has done while it is not finished."""
    return config.run_dir / phase / f"{stage}.working"


def _open(working: Path, basis: dict[str, Any]) -> float:
    """Makes the folder of unfinished work, empty unless the work there is of the same inputs; seconds spent on it."""
    path = working / "started.json"
    begun, seconds = read_json(path) if path.exists() else {}, 0.0
    if begun.get("after") == basis:
        last = max(file.stat().st_mtime for file in working.rglob("*"))
        if not columns.fault(begun, ["seconds", "time"]):
            seconds = begun["seconds"] + max(0.0, last - begun["time"])
    elif working.exists():
        say(f"{working} is of other inputs, so the work begins anew")
        shutil.rmtree(working)
    write_json(path, {"after": basis, "seconds": seconds, "time": time.time()})
    return seconds


def _result_digest(config: Config, phase: str, stage: str) -> str | None:
    """A hash of all that a stage came to, its files as they are now; None where it is not done."""
    figures = folder.read_done(config, phase, stage)
    if figures is None:
        return None
    lasting = {name: value for name, value in figures.items() if name != "seconds"}
    files = [config.run_dir / phase / name for name in figures["outputs"]]
    return hash_of([lasting, *(_digest(path) for path in files if path.is_file())])
