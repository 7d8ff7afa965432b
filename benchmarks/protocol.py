"""Connects the parent with the measured programs: one JSON object per line, over the child's stdin and stdout.

The child calls `serve` with a function per suite that loads, warms up and returns `Work`. The parent uses `Child` and
`alternate`. Needs only the standard library, because children run in their own environments.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TAIL = 2000  # characters shown of a failed child's log

Task = dict[str, Any]
"""A task, as `benchmarks.inputs` wrote it."""
Round = Callable[[], tuple[float, float]]
"""One measured round: the amount of work done, in the suite's unit, and the seconds it took."""


class Work(NamedTuple):
    """A suite that is loaded and warmed up."""

    check: dict[str, list[Any]]
    """Results both sides must agree on: `values` are numbers, `tokens` are rows of token ids."""
    round: Round


def timed(work: Callable[[], float]) -> Round:
    """Returns a round that times a function, which returns its amount of work."""

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        amount = work()
        return amount, time.perf_counter() - start

    return run


def cpu() -> str:
    """Returns the number and name of the processors."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else 'CPU'}"


def serve(suites: Mapping[str, Callable[[Task], Work]], device: Callable[[], str] = cpu) -> None:
    """Answers the parent until it closes the pipe."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of libraries goes to the log
    work: Work | None = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "prepare":
            task = json.loads(Path(request["task"]).read_text())
            work = None  # frees the last suite before loading this one
            work = suites[task["suite"]](task)
            reply: dict[str, Any] = {"check": work.check, "device": device()}
        else:
            assert work is not None, "prepare comes first"
            amount, seconds = work.round()
            reply = {"amount": amount, "seconds": seconds}
        print(json.dumps(reply), file=answers, flush=True)


class Child:
    """A program under measurement, seen from the parent; it is idle between requests."""

    def __init__(
        self,
        python: str | Path,
        module: str,
        log: Path,
        environment: Mapping[str, str],
        arguments: Sequence[str] = (),
    ):
        self.name, self.log = module, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [str(python), "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
                text=True,
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Returns the answer to a request; raises RuntimeError, with the end of the log, if the child died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(f"{self.name} ended without an answer:\n{self.log.read_text()[-TAIL:]}")
        return json.loads(answer)

    def rate(self) -> float:
        """Runs one round and returns work per second."""
        answer = self.ask(do="round")
        return answer["amount"] / answer["seconds"]

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: Any) -> None:
        """Ends the child and waits for it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def alternate(children: Sequence[Child], rounds: int) -> list[list[float]]:
    """Returns the rates of each child in each round; within a round, one child runs after another."""
    by_round = [[child.rate() for child in children] for _ in range(rounds)]
    return [list(rates) for rates in zip(*by_round, strict=True)]


def disagreement(a: Mapping[str, list[Any]], b: Mapping[str, list[Any]]) -> dict[str, float]:
    """Returns the largest relative error of numbers, and the share of rows of tokens that differ.

    A side may return fewer rows than the other.
    """
    by_kind: dict[str, float] = {}
    for kind in a.keys() & b.keys():
        pairs = list(zip(a[kind], b[kind], strict=False))
        errors = [abs(x - y) / max(abs(x), abs(y), 1e-9) for x, y in pairs] if kind == "values" else []
        by_kind[kind] = max(errors) if errors else statistics.mean(float(x != y) for x, y in pairs)
    return by_kind
