"""Orbax checkpoints of pytrees: a policy's adapters, the optimizer's state, the data position.

In: a folder and a pytree of arrays. Out: the folder, complete or absent; and the tree again, shaped like a given one.
"""

from pathlib import Path
from typing import Any

import jax


def save(folder: Path, tree: Any) -> None:
    """Writes `tree` to `folder`; an earlier one is replaced only when the new one is complete."""
    import orbax.checkpoint as ocp  # slow to import

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute(), tree, force=True)


def restore(folder: Path, like: Any) -> Any:
    """The tree saved in `folder`, with the structure, shapes, types and shardings of `like`."""
    import orbax.checkpoint as ocp

    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} does not exist; run the stage that writes it first")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(folder.absolute(), jax.eval_shape(lambda: like))
    except (ValueError, OSError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"checkpoint {folder} cannot be read: {reason}; delete it to compute it again") from error
