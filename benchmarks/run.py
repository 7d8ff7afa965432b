"""Speed, side by side with peers: `python -m benchmarks.run --suite=generate,score --peers --json=OUT`.

Ours and each peer do the same work on the same random checkpoint and token ids, each in a process and environment of
its own, warmed up, in float32. They must agree on what they compute; then rounds alternate, one program at a time.
Prints a table of rates (more is better) with ratios to each peer, and writes the rows as JSON: `ours` and `theirs` are
medians over the rounds and `ratio` theirs; `median` and `spread` are the median and the extremes of the rounds' ratios,
or of our rates where there is no peer; `agree` is the worst error of what both sides computed.
"""

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tyro

from benchmarks import compilations, inputs, peers
from benchmarks.peers import PEERS
from benchmarks.protocol import Child, Task, alternate, disagreement
from itool_jax.system.allocator import KEEP_FREED_MEMORY

SUITES = (*inputs.UNITS, "compile")
TOLERANCE = {"values": 1e-3, "tokens": 0.1}

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    suite: str = ",".join(SUITES)
    """Suites, with commas."""
    peers: bool = False
    """Compare with other programs; makes their environments in the work folder when they are not there."""
    only: str = ",".join(peer.name for peer in PEERS)
    """Peers to compare with, with commas."""
    rounds: int = 5
    """Measured rounds of each program."""
    json: Path | None = None
    """File for the rows of the table."""
    small: bool = False
    """Tiny model and shapes, to see that everything works."""
    work: Path | None = None
    """Folder for checkpoints, environments and logs, kept for the next time; default: a temporary one."""

    def __post_init__(self) -> None:
        known = {"suite": SUITES, "only": [peer.name for peer in PEERS]}
        for name, values in known.items():
            if unknown := set(getattr(self, name).split(",")) - set(values):
                raise ValueError(f"{name} must be among {', '.join(values)}, got {min(unknown)}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be positive, got {self.rounds}")


def main(settings: Settings) -> list[Row]:
    """Measures all suites, prints the table and writes the JSON."""
    with tempfile.TemporaryDirectory() as temporary:
        work = (settings.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        rows: list[Row] = []
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(work / "xla"))
        environment = KEEP_FREED_MEMORY | {"JAX_COMPILATION_CACHE_DIR": cache}
        print(HEADER)
        with Child(sys.executable, "benchmarks.children.ours", work / "logs" / "ours.log", environment) as ours:
            for suite in settings.suite.split(","):
                for row in measure_suite(suite, settings, work, ours):
                    rows.append(row)
                    print(line(row), flush=True)
    print(f"on {rows[0]['device']}")
    if settings.json is not None:
        settings.json.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def measure_suite(suite: str, settings: Settings, work: Path, ours: Child) -> Iterator[Row]:
    """Rows of a suite, one a size and peer, as they are measured."""
    if suite == "compile":
        yield from compilations.rows(work, small=settings.small)
        return
    *growing, full = inputs.tasks(work, suite, small=settings.small)
    for task in growing:  # they show how our rate grows; only the full size is compared
        yield from measure(task, ours, {}, 1)
    with contextlib.ExitStack() as stack:
        others = {name: stack.enter_context(child) for name, child in start_peers(suite, settings, work)}
        yield from measure(full, ours, others, settings.rounds)


def start_peers(suite: str, settings: Settings, work: Path) -> Iterator[tuple[str, Child]]:
    """The peers of a suite by name; those that cannot be installed are left out, and said to be."""
    for peer in PEERS if settings.peers else ():
        if suite in peer.suites and peer.name in settings.only.split(","):
            try:
                python = peers.python_of(peer.environment, work)
            except RuntimeError as error:
                print(f"{peer.name} left out: {error}", file=sys.stderr)
                continue
            log = work / "logs" / f"{suite}_{peer.name}.log"
            yield peer.name, Child(python, peer.module, log, peers.VARIABLES, peer.arguments)


def measure(path: Path, ours: Child, others: Mapping[str, Child], rounds: int) -> list[Row]:
    """Prepares a task on both sides, compares what they compute, and alternates rounds."""
    task = json.loads(path.read_text())
    prepared = ours.ask(do="prepare", task=str(path))
    errors = {name: _prepare(name, child, path, prepared["check"]) for name, child in others.items()}
    agreeing = {name: error for name, error in errors.items() if error is not None}
    rates, *theirs = alternate([ours, *(others[name] for name in agreeing)], rounds)
    if not agreeing:
        return [_row(task, prepared["device"], rates)]
    return [
        _row(task, prepared["device"], rates, name, peer_rates, error)
        for (name, error), peer_rates in zip(agreeing.items(), theirs, strict=True)
    ]


def _prepare(name: str, child: Child, path: Path, check: dict[str, list[Any]]) -> float | None:
    """The worst error between a peer and us; None, said aloud, for a peer that fails or computes something else."""
    try:
        found = disagreement(check, child.ask(do="prepare", task=str(path))["check"])
    except RuntimeError as error:
        print(f"{name} left out: {error}", file=sys.stderr)
        return None
    if wrong := {kind: error for kind, error in found.items() if not error <= TOLERANCE[kind]}:
        print(f"{name} left out: it computes something else, {wrong}", file=sys.stderr)
        return None
    return max(found.values())


def _row(
    task: Task,
    device: str,
    rates: list[float],
    peer: str | None = None,
    theirs: list[float] | None = None,
    agree: float | None = None,
) -> Row:
    ours, ratios = statistics.median(rates), [a / b for a, b in zip(rates, theirs or [], strict=bool(theirs))]
    compared = ratios or rates
    return {
        "name": task["name"],
        "peer": peer,
        "ours": ours,
        "theirs": statistics.median(theirs) if theirs else None,
        "ratio": ours / statistics.median(theirs) if theirs else None,
        "unit": task["unit"],
        "median": statistics.median(compared),
        "spread": [min(compared), max(compared)],
        "device": device,
        "shapes": task["sizes"],
        "agree": agree,
        "rounds": {"ours": rates, "theirs": theirs or []},
    }


HEADER = f"{'name':<21} {'peer':<10} {'ours':>10} {'theirs':>10} {'unit':<9} {'ratio':>6} {'rounds':>13} {'agree':>8}"


def line(row: Row) -> str:
    """A row of the table."""

    def number(value: float | None, width: int, form: str) -> str:
        return f"{'' if value is None else format(value, form):>{width}}"

    low, high = row["spread"]
    cells = [
        f"{row['name']:<21} {row['peer'] or '':<10}",
        f"{number(row['ours'], 10, '.4g')} {number(row['theirs'], 10, '.4g')} {row['unit']:<9}",
        f"{number(row['ratio'], 6, '.2f')} {f'{low:.3g}-{high:.3g}':>13} {number(row['agree'], 8, '.1e')}",
    ]
    return " ".join(cells)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
