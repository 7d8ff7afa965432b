"""Maps work over many items, divided among the processes of a run and journaled row by row.

In: items, and a function that yields results as they finish. Out: the result of each item, in order. Each process works
on its own items, with a copy of the model on its own devices. If one copy needs the devices of several hosts, all
processes work on all items together.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from itool_jax.config import Config
from itool_jax.model.sharding import row_devices, runs_apart, use_own_mesh
from itool_jax.system import hosts, journal
from itool_jax.system.journal import Journal
from itool_jax.system.preemption import stop_if_asked
from itool_jax.system.progress import Batch, progress
from itool_jax.text.padding import group

T = TypeVar("T")


class Advance(NamedTuple):
    """Progress of the work: units done, and finished results, each with the index of its item."""

    units: int
    results: Sequence[tuple[int, Any]]
    plan: Sequence[Batch] = ()
    """The batches to come, for the estimate of the time left; work that knows them begins with it."""


Work = Callable[[Sequence[T]], Iterable[Advance]]


def by_row(batches: Iterable[Sequence[tuple[int, Any]]], plan: Sequence[Batch] = ()) -> Iterator[Advance]:
    """Turns batches of finished rows into advances of one unit per row."""
    if plan:
        yield Advance(0, (), plan)
    for rows in batches:
        yield Advance(len(rows), rows)


def planned(widths: Sequence[int], tokens_per_batch: int) -> list[Batch]:
    """Returns the batches of a model's rows of these padded widths, as the sampler groups them."""
    groups = group(widths, tokens_per_batch, row_devices(running=True))
    return [Batch(len(indices), width * count, (width, count)) for indices, width, count in groups]


def map_across_hosts(
    config: Config, working: Path, items: Sequence[T], work: Work[T], what: str, units: int = 1
) -> list[Any]:
    """Computes the result of `work`, plain JSON, for each item; returns them in the order of the items.

    Finished rows are journaled in the folder `working`. A killed step computes only the missing rows, even with another
    number of processes. `units` is the number of progress units per item.

    Raises:
        PreemptionError: the run was asked to stop; the finished rows are on disk.
    """
    if not items:
        return []
    apart = runs_apart(config.mesh)  # if not, all processes compute all items together and the first one journals them
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
            advance(part.units, plan=part.plan)
            stop_if_any_asked(config)
    if count > 1:
        hosts.barrier(f"{working} is complete")
        rows = _read_all(working)
        hosts.barrier(f"{working} was read to the end")
    return [rows[i] for i in range(len(items))]


def stop_if_any_asked(config: Config) -> None:
    """Raises PreemptionError if the run was asked to stop; of processes that compute together, all raise or none."""
    if runs_apart(config.mesh):
        stop_if_asked()
    else:
        hosts.stop_together()


def _read_all(working: Path) -> dict[int, Any]:
    """Reads the finished rows from all journals in a folder."""
    rows: dict[int, Any] = {}
    for path in sorted(working.glob("rows*.journal")):
        rows |= journal.read(path)[0]
    return rows
