"""Orbax checkpoints of pytrees: a policy's adapters, the optimizer's state, the data position.

In: a folder and a pytree of arrays. Out: the folder, complete or absent; and the tree again, shaped like a given one.
"""

import contextlib
import errno
import gc
import hashlib
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np


def save(folder: Path, tree: Any) -> str:
    """Writes `tree` to `folder` and returns its digest; an earlier one is replaced only when the new one is complete.

    Raises:
        OSError: the disk is full or the folder cannot be written; the earlier one is untouched.
    """
    import orbax.checkpoint as ocp  # slow to import

    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        with _quiet(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial, tree, force=True)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except ValueError as error:  # what the storage library makes of an error of the disk
        full = "No space left" in str(error)
        number, reason = (errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else (errno.EIO, _reason(error))
        raise OSError(number, reason, str(folder)) from error
    finally:
        for left in folder.parent.glob(f"{partial.name}*"):
            shutil.rmtree(left, ignore_errors=True)
    return digest(tree)


def digest(tree: Any) -> str:
    """A hash of all the tree's values: equal for equal trees, however they are laid out on devices."""
    found = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(tree):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def restore(folder: Path, like: Any) -> Any:
    """The tree saved in `folder`, with the structure, shapes, types and shardings of `like`: arrays, or shapes alone.

    Raises:
        ValueError: the folder is missing or damaged, or a tensor is missing, extra or of another shape; names it.
    """
    import orbax.checkpoint as ocp

    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} does not exist; run the stage that writes it first")
    folder = folder.absolute()
    with _quiet():
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                if (metadata := checkpointer.metadata(folder).item_metadata) is not None:  # None where it is damaged
                    _compare(metadata.tree, like)
                return checkpointer.restore(folder, like)
        except (MemoryError, PermissionError):
            raise  # no damage
        except Exception as error:  # damage comes out as errors of many kinds, bare ones among them
            reason = _reason(error)
        # Other reads that failed come to their ends while nobody listens: their frames are freed in here.
        time.sleep(0.5)
        gc.collect()
    raise ValueError(f"checkpoint {folder}: {reason}; delete it to compute it again")


def _compare(found: Any, wanted: Any) -> None:
    """ValueError names the first tensor that is missing, extra or of another shape."""
    found, wanted = _shapes(found), _shapes(wanted)
    for name in sorted(found | wanted):
        if name not in found:
            raise ValueError(f"tensor {name} is missing")
        if name not in wanted:
            raise ValueError(f"tensor {name} is unexpected")
        if found[name] != wanted[name]:
            raise ValueError(f"tensor {name} has shape {found[name]}, expected {wanted[name]}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


def _reason(error: Exception) -> str:
    """The first line of what went wrong, without the storage library's own settings behind it."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text.partition(" [tensorstore_spec")[0].removesuffix(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from printing the traceback of every thread and read that met an error; the first is raised."""
    logger = logging.getLogger("absl")
    before = logger.disabled, sys.unraisablehook
    logger.disabled, sys.unraisablehook = True, lambda _: None
    try:
        yield
    finally:
        logger.disabled, sys.unraisablehook = before
