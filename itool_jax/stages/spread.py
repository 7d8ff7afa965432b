"""Work of a stage on many items, kept as it is done, so that a killed stage goes on within a batch.

In: items and a function that works on some of them. Out: what it made of each, in their order. Of several processes
each works on its own items, with a copy of the model on its own devices, and reads what the others made from the run
directory; where a copy needs more than the devices of one host, all work on all items together.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from itool_jax import hosts
from itool_jax.config import Config
from itool_jax.journal import Journal, Keep, read
from itool_jax.model.sharding import runs_apart, use_own_mesh

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
    apart = runs_apart(config.mesh)
    index, count = (hosts.index(), hosts.count()) if apart else (0, 1)
    own = items[index::count]
    with use_own_mesh(config.mesh), Journal(_journal(working, index), _layout(config), together=not apart) as journal:
        results = list(work(own, journal.keep)) if own else []
        if count > 1:
            journal.keep("results", lambda: results)
    if count == 1:
        return results
    hosts.meet(f"{working} is complete")
    found: list[Any] = [None] * len(items)
    for i in range(count):
        found[i::count] = results if i == index else read(_journal(working, i))[0]["results"]
    hosts.meet(f"{working} was read")
    return found


def _journal(working: Path, process: int) -> Path:
    return working / (f"answers_{process}.journal" if process else "answers.journal")


def _layout(config: Config) -> dict[str, Any]:
    """What changes what is computed together, and with that the last bits of results."""
    settings = {n: value for n, value in config.flat().items() if n.startswith(("generate.", "mesh.", "search."))}
    return settings | {"processes": hosts.count()}
