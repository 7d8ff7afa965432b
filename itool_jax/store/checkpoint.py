"""Orbax checkpoints of pytrees: a policy's adapters, the optimizer's state, the data position.

In: a folder and a pytree of arrays. Out: the folder, complete or absent; later the tree, restored to a given structure.
Each checkpoint holds checksums of its files, written last. A damaged checkpoint is reported and never used.
"""

import contextlib
import errno
import gc
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from itool_jax.model.sharding import to_host
from itool_jax.system import hosts
from itool_jax.system.files import whole_file
from itool_jax.system.messages import log
from itool_jax.system.untrusted import read_json

CHECKSUMS = "checksums.json"
COSTS = 0.02
"""Share of training time that automatic checkpoints may take."""


def save(folder: Path, tree: Any) -> str:
    """Writes `tree` to `folder` and returns its digest.

    An earlier checkpoint is replaced only once the new one is complete.

    Raises:
        OSError: the disk is full or the folder cannot be written; the earlier checkpoint is untouched.
    """
    import orbax.checkpoint as ocp  # slow to import

    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with _disk_errors(folder):
            with _quiet(), ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(partial, tree, force=True)
            if hosts.is_first():
                seal(partial)
        if hosts.is_first():
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    finally:
        for left in folder.parent.glob(f"{partial.name}*") if hosts.is_first() else ():
            shutil.rmtree(left, ignore_errors=True)
    hosts.barrier(f"{folder} is there")
    return digest(tree)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns the storage library's ValueErrors about the disk back into OSErrors."""
    try:
        yield
    except ValueError as error:
        full = "No space left" in str(error)
        number, reason = (errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else (errno.EIO, _reason(error))
        raise OSError(number, reason, str(folder)) from error


def digest(tree: Any) -> str:
    """Hashes all values of a tree; equal trees have equal hashes, however they are laid out on devices."""
    hasher = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(tree):
        hasher.update(np.asarray(to_host(leaf)).tobytes())
    return hasher.hexdigest()


def restore(folder: Path, like: Any) -> Any:
    """Restores the tree saved in `folder`, with the structure, shapes, types and shardings of `like`.

    `like` holds arrays, or only their shapes.

    Raises:
        ValueError: the folder is missing or damaged, or a tensor is missing, unexpected or has the wrong shape; the
            message names it.
    """
    import orbax.checkpoint as ocp

    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} does not exist; run the stage that writes it first")
    folder = folder.absolute()
    if (CHECKSUMS in os.listdir(folder)) and (bad := damage(folder)):  # earlier versions wrote no checksums
        raise ValueError(f"checkpoint {folder}: {bad}; delete it to compute it again")
    with _quiet():
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                if (metadata := checkpointer.metadata(folder).item_metadata) is not None:  # None if it is damaged
                    _compare(metadata.tree, like)
                return checkpointer.restore(folder, like)
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # not damage; JaxRuntimeError means that another process is gone or a device is full
        except Exception as error:  # damage raises many kinds of errors, some of them bare Exceptions
            reason = _reason(error)
        # Let other failed reads finish and free their frames here, while their tracebacks are silenced.
        time.sleep(0.5)
        gc.collect()
    raise ValueError(f"checkpoint {folder}: {reason}; delete it to compute it again")


def seal(folder: Path) -> None:
    """Writes the checksums of a complete checkpoint."""
    checksums = json.dumps(_checksums(folder), indent=0).encode()
    with whole_file(folder / CHECKSUMS) as file:
        file.write(checksums)


def damage(folder: Path) -> str | None:
    """Describes what is wrong with a checkpoint; None if it is complete and unchanged."""
    try:
        sealed = read_json(folder / CHECKSUMS)
        checksums = _checksums(folder)
        wrong = sorted(name for name in sealed.keys() | checksums.keys() if sealed.get(name) != checksums.get(name))
    except FileNotFoundError:
        return "it was not finished"
    except (ValueError, AttributeError):
        wrong = [CHECKSUMS]
    return f"{wrong[0]} is damaged" if wrong else None


def _checksums(folder: Path) -> dict[str, str]:
    """Hashes each file in a folder."""
    checksums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / CHECKSUMS:
            with path.open("rb") as file:
                checksums[str(path.relative_to(folder))] = hashlib.file_digest(file, "blake2b").hexdigest()[:32]
    return checksums


class TrainCheckpoints:
    """Checkpoints of a training in progress, written in the background; the last two are kept.

    `every` is the number of steps between checkpoints. 0 picks the smallest number that costs at most `COSTS` of the
    time.
    """

    def __init__(self, folder: Path, every: int = 0):
        import orbax.checkpoint as ocp

        self.folder, self.every = folder.absolute(), every
        self.kept, self.next, self.time = 0, every or 1, 0.0
        self.thread = ThreadPoolExecutor(1)
        self.sealing: Future[None] | None = None
        hosts.broadcast_from_primary(f"checkpoints of {folder}", self._drop_damaged)
        with _quiet():
            self.manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(max_to_keep=2))

    def _drop_damaged(self) -> None:
        """Removes unfinished and damaged checkpoints, and reports the damaged ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.iterdir()):
            if bad := damage(path):
                if "damaged" in bad:
                    log(f"checkpoint {path}: {bad}; falling back to the previous one")
                shutil.rmtree(path)

    def _seal(self) -> None:
        """Waits until the newest checkpoint is complete, then writes its checksums."""
        self.manager.wait_until_finished()
        for path in self.folder.iterdir() if hosts.is_first() else ():
            if path.name.isdigit() and not (path / CHECKSUMS).exists():
                seal(path)

    def restore(self, like: Any) -> tuple[int, Any, Any] | None:
        """Returns the steps done, the state laid out as `like`, and the data position; None without a checkpoint."""
        import orbax.checkpoint as ocp

        step = self.manager.latest_step()
        if step is None:
            return None
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
        with _quiet():
            restored = self.manager.restore(step, args=wanted)
        self.kept, self.next = step, step + (self.every or 1)
        return step, restored["state"], restored["data"]

    def due(self, step: int) -> bool:
        """Returns whether to save a checkpoint after this step."""
        return step >= self.next

    def save(self, step: int, state: Any, position: Any) -> None:
        """Starts writing the state and the data position; the caller may change the arrays at once."""
        import orbax.checkpoint as ocp

        start = time.monotonic()
        self._wait()
        parts = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(position))
        with _quiet():
            self.manager.save(step, args=parts)
        self.sealing = self.thread.submit(self._seal)
        end = time.monotonic()
        apart = self.every or 1
        if not self.every and self.time:
            apart = max(1, math.ceil((end - start) / (start - self.time) * (step - self.kept) / COSTS))
        self.kept, self.next, self.time = step, step + apart, end

    def _wait(self) -> None:
        if self.sealing is not None:
            with _disk_errors(self.folder):
                self.sealing.result()

    def finish(self) -> None:
        """Waits until the last state is on disk."""
        self._wait()
        self.thread.shutdown()
        with _quiet():
            self.manager.close()


def _compare(saved: Any, wanted: Any) -> None:
    """Raises ValueError naming the first tensor that is missing, unexpected or has the wrong shape."""
    saved, wanted = _shapes(saved), _shapes(wanted)
    for name in sorted(saved | wanted):
        if name not in saved:
            raise ValueError(f"tensor {name} is missing")
        if name not in wanted:
            raise ValueError(f"unexpected tensor {name}")
        if saved[name] != wanted[name]:
            raise ValueError(f"tensor {name} has shape {saved[name]}, expected {wanted[name]}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _reason(error: Exception) -> str:
    """Returns the first line of an error, without the storage library's settings that follow."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text.partition(" [tensorstore_spec")[0].removesuffix(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from printing a traceback for every failed thread and read; the first error is raised."""
    logger = logging.getLogger("absl")
    before = logger.disabled, sys.unraisablehook
    logger.disabled, sys.unraisablehook = True, lambda _: None
    try:
        yield
    finally:
        logger.disabled, sys.unraisablehook = before
