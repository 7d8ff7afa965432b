"""Kills a run at random moments, again and again, and compares what it comes to with one that nobody disturbed.

`python -m tests.faults.kills --folder=DIR --kills=200 -- --stage=iterate …` runs the command in folders of its own, in
children that begin with everything imported. Out: a JSON line a run, with the stages that signals met, and one with
the sum.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from itool_jax.main import PREEMPTED
from itool_jax.main import main as run
from tests.runs import lasting

PAUSE = 0.05
"""A child is killed up to so many seconds after a change of its files."""


def start(arguments: Sequence[str], folder: Path) -> int:
    """A child that runs the command in a run directory; its process id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        with (folder.parent / f"{folder.name}.log").open("a") as log:
            os.dup2(log.fileno(), sys.stderr.fileno())
            os.dup2(log.fileno(), sys.stdout.fileno())
        code = run([*arguments, f"--run_dir={folder}"])
    finally:
        os._exit(code)


def stage_of(folder: Path) -> str:
    """What a run was at when it was killed, by its log."""
    with contextlib.suppress(OSError):
        for line in reversed((folder / "log.jsonl").read_text(errors="replace").splitlines()):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if row.get("text") == "begin":
                    return str(row["stage"])
                if str(row.get("text", "")).startswith("end after"):
                    return f"after {row['stage']}"
    return "start"


COMPUTED_TOGETHER = ("scores.jsonl", "trees.jsonl", "pairs.jsonl")
"""Files of numbers whose last bits depend on which rows were computed together: a resumed step computes the others."""
TOLERANCE = 1e-5


def results(folder: Path) -> dict[str, Any]:
    """All that must be equal: every file but the log and the environment.

    Bytes, but for the files of numbers computed together, whose rows are parsed, the summary of them, and steps'
    figures, whose hashes of those files are left out.
    """
    lasts: dict[str, Any] = dict(lasting(folder))
    for name in list(lasts):
        path = folder / name
        if name.endswith(("log.jsonl", "environment.json")):
            del lasts[name]
        elif name.endswith(COMPUTED_TOGETHER):
            lasts[name] = [json.loads(line) for line in path.read_text().splitlines()]
        elif name == "summary.json":
            lasts[name] = without_seconds(json.loads(path.read_text()))
        elif name.endswith(".json") and "after" in (figures := json.loads(path.read_text())):
            hashes = {n: value for n, value in figures["outputs"].items() if n not in COMPUTED_TOGETHER}
            lasts[name] = figures | {"outputs": hashes, "after": sorted(figures["after"]), "seconds": None}
    return lasts


def without_seconds(content: Any) -> Any:
    """A JSON value without the keys "seconds", at any depth."""
    if isinstance(content, dict):
        return {key: without_seconds(value) for key, value in content.items() if key != "seconds"}
    return list(map(without_seconds, content)) if isinstance(content, list) else content


def equal(a: Any, b: Any) -> bool:
    """Whether two results are equal, numbers with fractions within `TOLERANCE`."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def kill_until_done(
    arguments: Sequence[str], folder: Path, most: int, rng: random.Random, asked: Iterator[signal.Signals], apart: float
) -> list[str]:
    """Runs the command to its end, sending it up to `most` signals, the next of `asked`; which, and at what stages.

    Files change `apart` times between two signals on average: some meet a process that has hardly begun, others one
    that is a stage further.
    """
    met: list[str] = []
    while True:
        pid = start(arguments, folder)
        count = 1 + int(rng.expovariate(1 / apart)) if len(met) < most else sys.maxsize
        if await_changes(pid, folder, count) < count:
            if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
                raise RuntimeError(f"a run ended by itself, see {folder}.log")
            return met
        time.sleep(rng.uniform(0, PAUSE))
        sent = next(asked)
        os.kill(pid, sent)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:  # it was through
            return met
        if code != (PREEMPTED if sent == signal.SIGTERM else -sent):
            raise RuntimeError(f"a run ended with {code}, see {folder}.log")
        met.append(f"{sent.name} {stage_of(folder)}")


def await_changes(pid: int, folder: Path, count: int) -> int:
    """Waits until files of a run have changed so many times, or its process has ended; how often they did."""
    seen, before = 0, sizes(folder)
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.005)
        now = sizes(folder)
        seen, before = seen + (now != before), now
        if seen >= count:
            break
    return seen


def sizes(folder: Path) -> dict[str, int]:
    """The sizes of all files of a run."""
    by_path = {}
    for where, _, names in os.walk(folder):
        for path in (os.path.join(where, name) for name in names):
            with contextlib.suppress(OSError):  # gone since
                by_path[path] = os.lstat(path).st_size
    return by_path


def compare(
    arguments: Sequence[str], folder: Path, kills: int, seed: int, asked: Iterator[signal.Signals], a_run: int
) -> dict[str, Any]:
    """Runs the command undisturbed once, then with kills, about `a_run` a time, until there were enough.

    Returns how many signals each stage met, and which files of which run differ from those of the undisturbed one.
    """
    rng, met, runs = random.Random(seed), Counter(), 0
    pid = start(arguments, folder / "undisturbed")
    changes = await_changes(pid, folder / "undisturbed", sys.maxsize)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError(f"the run ended with an error, see {folder / 'undisturbed'}.log")
    wanted, differing = results(folder / "undisturbed"), []
    while met.total() < kills:
        here = folder / f"killed_{runs}"
        stages = kill_until_done(arguments, here, kills - met.total(), rng, asked, changes / a_run)
        files = results(here)
        names = sorted(wanted.keys() | files)
        differing += [f"{here.name}/{n}" for n in names if not equal(wanted.get(n), files.get(n))]
        met.update(stages)
        runs += 1
        print(json.dumps({"run": runs, "kills": stages, "differing": differing}), flush=True)
        if not differing:
            shutil.rmtree(here)
    by_stage = dict(met.most_common())
    return {"kills": met.total(), "runs": runs, "changes": changes, "by_stage": by_stage, "differing": differing}


def import_all() -> None:
    """Everything that a child would import, without starting jax."""
    import orbax.checkpoint  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    import itool_jax.stages.iterate  # noqa: F401


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--a_run", type=int, default=12, help="kills of one run, about")
    parser.add_argument("--signals", default="SIGKILL", help="sent in turn, joined by commas")
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()
    import_all()
    options.folder.mkdir(parents=True, exist_ok=True)
    asked = itertools.cycle(signal.Signals[name] for name in options.signals.split(","))
    comparison = compare(options.arguments, options.folder, options.kills, options.seed, asked, options.a_run)
    print(json.dumps(comparison))
    sys.exit(bool(comparison["differing"]))


if __name__ == "__main__":
    main()
