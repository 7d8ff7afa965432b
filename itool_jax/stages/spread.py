"""Work of a stage on many items, kept as it is done, so that a killed stage goes on within a batch.

In: items and a function that works on some of them. Out: what it made of each, in their order.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from itool_jax.config import Config
from itool_jax.journal import Journal, Keep

T = TypeVar("T")
R = TypeVar("R")


def spread(
    config: Config, working: Path, items: Sequence[T], work: Callable[[Sequence[T], Keep], Sequence[R]]
) -> list[R]:
    """What `work(items, keep)` makes of the items, one result each, plain JSON values.

    `keep` is for the model's answers, which stand in the folder `working`: those of a killed process are read again.
    """
    if not items:
        return []
    with Journal(working / "answers.journal", _layout(config)) as journal:
        return list(work(items, journal.keep))


def _layout(config: Config) -> dict[str, Any]:
    """Settings that change what is computed together, and with that the last bits of results."""
    return {name: value for name, value in config.flat().items() if name.startswith(("generate.", "mesh.", "search."))}
