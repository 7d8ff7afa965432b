"""Work on many items, spread over the processes of a run and journaled row by row.

In: items, and a function that yields the results of some as they finish. Out: the result of each item, in order. Each
of several processes works on its own items with a copy of the model on its own devices; if a copy needs the devices of
several hosts, all processes work on all items together.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from itool_jax.config import Config
from itool_jax.model.sharding import runs_apart, use_own_mesh
from itool_jax.system import hosts, journal
from itool_jax.system.journal import Journal
from itool_jax.system.preemption import stop_if_asked
from itool_jax.system.progress import progress

T = TypeVar("T")


class Advance(NamedTuple):
    """How far work came: units of progress, and the results that finished, each with its item's place."""

    units: int
    results: Sequence[tuple[int, Any]]


Work = Callable[[Sequence[T]], Iterable[Advance]]


def by_row(batches: Iterable[Sequence[tuple[int, Any]]]) -> Iterator[Advance]:
    """Batches of finished rows as advances of one unit a row."""
    for rows in batches:
        yield Advance(len(rows), rows)


def map_across_hosts(
    config: Config, working: Path, items: Sequence[T], work: Work[T], what: str, units: int = 1
) -> list[Any]:
    """The result of `work` for each item, plain JSON values, in the order of the items.

    Finished rows are journaled in the folder `working`; a step that was killed computes only those that are missing,
    whatever number of processes it goes on with. `units` of progress make an item.

    Raises:
        PreemptionError: the run was asked to stop; the finished rows are on disk.
    """
    if not items:
        return []
    apart = runs_apart(config.mesh)  # else all processes compute all items together, and the first writes them down
    index, count = (hosts.index(), hosts.count()) if apart else (0, 1)
    rows = _read_all(working)
    hosts.barrier(f"{working} was read")
    missing = [i for i in range(len(items)) if i not in rows]
    own = missing[index::count]
    path = working / (f"rows_{index}.journal" if index else "rows.journal")
    done = (len(items) - len(missing)) // count
    with (
        use_own_mesh(config.mesh),
        Journal(path, writes=apart or hosts.is_first()) as kept,
        progress(what, units * (done + len(own)), units * done) as advance,
    ):
        stop_if_any_asked(config)
        for part in work([items[i] for i in own]) if own else ():
            finished = {own[place]: result for place, result in part.results}
            if finished:
                kept.append(finished)
                rows |= finished
            advance(part.units)
            stop_if_any_asked(config)
    if count > 1:
        hosts.barrier(f"{working} is complete")
        rows = _read_all(working)
        hosts.barrier(f"{working} was read to the end")
    return [rows[i] for i in range(len(items))]


def stop_if_any_asked(config: Config) -> None:
    """Raises PreemptionError if the run was asked to stop; processes that compute together all raise, or none does."""
    if runs_apart(config.mesh):
        stop_if_asked()
    else:
        hosts.stop_together()


def _read_all(working: Path) -> dict[int, Any]:
    """The finished rows in all journals of a folder."""
    rows: dict[int, Any] = {}
    for path in sorted(working.glob("rows*.journal")):
        rows |= journal.read(path)[0]
    return rows
