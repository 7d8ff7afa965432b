"""Compares our speed with peers': `python -m benchmarks.run --suite=generate,score --peers --json=OUT`.

Ours and each peer do the same work on the same random checkpoint and token ids, each in its own process and
environment, warmed up, in float32. They must agree on what they compute; then rounds alternate, one program at a time.
Prints a table of rates (more is better) with ratios to each peer, and writes the rows as JSON: `ours` and `theirs` are
medians over the rounds, and `ratio` is the ratio of these medians; `median` and `spread` are the median and the
extremes of the rounds' ratios, or of our rates without a peer; `agree` is the worst error between what both sides
computed.
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
    """Options of the benchmark."""

    suite: str = ",".join(SUITES)
    """Suites to run, separated by commas."""
    peers: bool = False
    """Compare with other programs. Their environments are made in the work folder if they are missing."""
    only: str = ",".join(peer.name for peer in PEERS)
    """Peers to compare with, separated by commas."""
    rounds: int = 5
    """Measured rounds per program."""
    json: Path | None = None
    """File to write the rows of the table to."""
    small: bool = False
    """Use a tiny model and shapes, to check that everything works."""
    work: Path | None = None
    """Folder that keeps checkpoints, environments and logs for later runs. Default: a temporary folder."""

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
    """Yields the rows of a suite as they are measured, one per size and peer."""
    if suite == "compile":
        yield from compilations.rows(work, small=settings.small)
        return
    *growing, full = inputs.tasks(work, suite, small=settings.small)
    for task in growing:  # shows how our rate grows; only the full size is compared
        yield from measure(task, ours, {}, 1)
    with contextlib.ExitStack() as stack:
        others = {name: stack.enter_context(child) for name, child in start_peers(suite, settings, work)}
        yield from measure(full, ours, others, settings.rounds)


def start_peers(suite: str, settings: Settings, work: Path) -> Iterator[tuple[str, Child]]:
    """Yields the peers of a suite by name; reports and skips those that cannot be installed."""
    for peer in PEERS if settings.peers else ():
        if suite in peer.suites and peer.name in settings.only.split(","):
            try:
                python = peers.python_of(peer.environment, work)
            except RuntimeError as error:
                print(f"{peer.name} skipped: {error}", file=sys.stderr)
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
    """Returns the worst error between a peer and us; reports and returns None if the peer fails or disagrees."""
    try:
        errors = disagreement(check, child.ask(do="prepare", task=str(path))["check"])
    except RuntimeError as error:
        print(f"{name} skipped: {error}", file=sys.stderr)
        return None
    if wrong := {kind: error for kind, error in errors.items() if not error <= TOLERANCE[kind]}:
        print(f"{name} skipped: it computes something different, {wrong}", file=sys.stderr)
        return None
    return max(errors.values())


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
    """Formats a row of the table."""

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
