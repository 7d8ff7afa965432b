"""Fuzzes readers with coverage guidance: `python -m benchmarks.fuzz --seconds=60 --targets calls files`.

Each target of `benchmarks.fuzz_targets` runs on hostile input in its own process: under atheris if it is installed
(`pip install -e '.[fuzz]'`), else with random mixes of its seeds and pieces. Out: a table of executions, the slowest
input and new findings. Inputs that broke a promise are kept in a folder; `--again=FILE` with the target reruns one.
"""

import dataclasses
import json
import mmap
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

SLOW, HANG, MEMORY, LONGEST = 10.0, 60.0, 4 << 30, 1 << 16
"""Seconds an input may take, seconds after which it counts as hung, bytes of memory, and bytes per input."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the fuzzer."""

    seconds: float = 60.0
    """Seconds per target."""
    targets: tuple[str, ...] = ()
    """Names of the targets to fuzz; all if none is given."""
    seed: int = 0
    """Random seed."""
    guided: bool = True
    """Use atheris if it is installed."""
    findings: Path = Path("fuzz-findings")
    """Folder for inputs that broke a promise."""
    corpus: Path | None = None
    """Folder that keeps inputs which reached new code, by target, for later runs."""
    json: Path | None = None
    """File to write the results to."""
    again: Path | None = None
    """Input file to run again, alone."""
    child: str = ""
    """Internal: the file to write a target's result to."""


class Session:
    """Runner of one target on one input after another, with counts and findings."""

    def __init__(self, settings: Settings, name: str, run: Callable[[bytes], None]):
        self.settings, self.name, self.run = settings, name, run
        self.start, self.executions, self.slowest, self.slowest_input = time.monotonic(), 0, 0.0, b""
        self.failures: dict[str, str] = {}
        self.guided = False
        self.current = mmap.mmap(os.open(f"{settings.child}.input", os.O_RDWR), LONGEST + 8)

    def execute(self, data: bytes) -> None:
        """Runs the target and keeps findings; ends the process when its time is over."""
        if not self.executions:  # otherwise atheris ends the process if our alarm comes late
            signal.signal(signal.SIGALRM, signal.SIG_IGN)
        self.current[:8] = len(data).to_bytes(8, "little")
        self.current[8 : 8 + len(data)] = data
        begin = time.monotonic()
        try:
            self.run(data)
        except Exception as error:
            self._keep(data, error)
        taken = time.monotonic() - begin
        if taken > SLOW and self.name != "template":  # it has this time limit itself
            self._keep(data, TimeoutError("slow"))
        if taken > self.slowest:
            self.slowest, self.slowest_input = taken, data
        self.executions += 1
        if time.monotonic() - self.start > self.settings.seconds:
            self.finish()

    def _keep(self, data: bytes, error: Exception) -> None:
        frame = (traceback.extract_tb((error.__cause__ or error).__traceback__) or [None])[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}" if frame else ""
        kind = f"{type(error.__cause__ or error).__name__} {place}"
        if kind not in self.failures:
            self.failures[kind] = str(error)[:200]
            self.settings.findings.mkdir(parents=True, exist_ok=True)
            (self.settings.findings / f"{self.name}-{len(self.failures)}").write_bytes(data)

    def finish(self) -> None:
        """Writes the result and ends the process, which atheris never does."""
        seconds = time.monotonic() - self.start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        result = {"executions": self.executions, "seconds": round(seconds, 1), "found": self.failures, "peak_mb": peak}
        result |= {"slowest_seconds": round(self.slowest, 3), "slowest_input": repr(self.slowest_input[:60])}
        result |= {"slowest_bytes": len(self.slowest_input), "guided": self.guided}
        Path(self.settings.child).write_text(json.dumps(result))
        os._exit(0)


def mutated(rng: random.Random, seeds: list[bytes], pieces: list[bytes]) -> bytes:
    """Returns a seed with some bytes replaced by pieces, by random bytes, or by bytes from elsewhere in it."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 8))):
        begin = rng.randrange(len(data) + 1)
        end = min(len(data), begin + rng.choice((0, 0, 1, 2, 8, 40)))
        match rng.randrange(5):
            case 0:
                data[begin:end] = rng.randbytes(rng.randrange(4))
            case 1:
                data[begin:end] = data[rng.randrange(len(data) + 1) :][: rng.randrange(60)]
            case _:
                data[begin:end] = rng.choice(pieces) * rng.choice((1, 1, 1, 2, 50))
    return bytes(data[:LONGEST])


def child(settings: Settings) -> None:
    """Fuzzes one target; does not return."""
    [name] = settings.targets
    guide = _atheris() if settings.guided else None
    if guide is not None:
        with guide.instrument_imports(include=["itool_jax"]):
            from benchmarks import fuzz_targets
    else:
        from benchmarks import fuzz_targets
    from itool_jax.system import messages
    from itool_jax.system.untrusted import bounded

    messages.console.quiet = True
    target = fuzz_targets.TARGETS[name]

    def run(data: bytes) -> None:
        if name == "template":
            target.run(data)
            return
        with bounded(HANG, MEMORY):
            target.run(data)

    for seed in target.seeds:
        run(seed)  # late imports are not timed
    session = Session(settings, name, run)
    if guide is not None and target.guided:
        _guided(guide, settings, session, target.seeds, target.pieces)
    rng = random.Random(settings.seed)
    while True:
        session.execute(mutated(rng, target.seeds, target.pieces))


def _atheris() -> Any:
    try:
        import atheris
    except ImportError:
        return None
    return atheris


def _guided(guide: Any, settings: Settings, session: Session, seeds: list[bytes], pieces: list[bytes]) -> None:
    """Hands over to atheris, which starts from the seeds and draws from the pieces."""
    session.guided = True
    corpus = (settings.corpus or Path(tempfile.mkdtemp(prefix="itool_corpus_"))) / session.name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    words = Path(f"{settings.child}.dict")
    words.write_text("".join('"' + re.sub("..", r"\\x\g<0>", piece[:60].hex()) + '"\n' for piece in pieces))

    def mutate(data: bytes, size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        return guide.Mutate(data, size) if rng.random() < 0.5 else mutated(rng, [data], pieces)[:size]

    # No atheris timeout: it would take over the timer that limits a template's rendering.
    flags = [f"-seed={settings.seed + 1}", "-timeout=0", "-rss_limit_mb=0", f"-max_len={LONGEST}", f"-dict={words}"]
    guide.Setup([sys.argv[0], *flags, str(corpus)], session.execute, custom_mutator=mutate)
    guide.Fuzz()


def fuzz(settings: Settings, name: str) -> dict[str, Any]:
    """Fuzzes one target in its own process; a crash or a hang is a finding too."""
    with tempfile.TemporaryDirectory(prefix="itool_fuzz_") as scratch:
        result, current = Path(scratch) / "result.json", Path(scratch) / "result.json.input"
        current.write_bytes(bytes(LONGEST + 8))
        command = [sys.executable, "-m", "benchmarks.fuzz", f"--targets={name}", f"--child={result}"]
        command += [f"--seconds={settings.seconds}", f"--seed={settings.seed}", f"--findings={settings.findings}"]
        command += [] if settings.guided else ["--no-guided"]
        command += [f"--corpus={settings.corpus}"] if settings.corpus else []
        try:
            done = subprocess.run(
                command,
                env=os.environ | {"TMPDIR": scratch, "JAX_PLATFORMS": "cpu"},
                capture_output=True,
                timeout=settings.seconds + HANG + 120,
                check=False,
            )
            reason = f"ended with code {done.returncode}: {done.stderr.decode(errors='replace')[-1000:]}"
        except subprocess.TimeoutExpired:
            reason = "hung"
        if result.exists():
            return json.loads(result.read_text())
        data = current.read_bytes()
        settings.findings.mkdir(parents=True, exist_ok=True)
        path = settings.findings / f"{name}-end"
        path.write_bytes(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return {"executions": 0, "seconds": 0.0, "found": {f"the process {reason}": str(path)}, "peak_mb": 0} | {
            "slowest_seconds": 0.0,
            "slowest_input": "",
            "slowest_bytes": 0,
            "guided": settings.guided,
        }


def show(results: dict[str, dict[str, Any]]) -> None:
    """Prints the table, and a line for each finding."""
    table = Table(box=None)
    for column in ("target", "executions", "per second", "slowest, s", "its size, bytes", "memory, MB", "new findings"):
        table.add_column(column, justify="left" if column == "target" else "right")
    for name, x in results.items():
        rate = f"{x['executions'] / max(x['seconds'], 1e-9):,.0f}"
        sizes = (f"{x['slowest_seconds']:.2f}", f"{x['slowest_bytes']:,}", f"{x['peak_mb']:,}")
        table.add_row(name, f"{x['executions']:,}", rate, *sizes, str(len(x["found"])))
    Console().print(table)
    for name, x in results.items():
        for kind, text in x["found"].items():
            print(f"{name}: {kind}: {text}")


def main(settings: Settings) -> int:
    """Fuzzes the chosen targets; returns 1 if anything was found."""
    if settings.child:
        child(settings)
    from benchmarks.fuzz_targets import TARGETS

    chosen = settings.targets or tuple(TARGETS)
    if unknown := set(chosen) - set(TARGETS):
        raise SystemExit(f"unknown target {min(unknown)}; choose from: {', '.join(TARGETS)}")
    if settings.again is not None:
        TARGETS[chosen[0]].run(settings.again.read_bytes())
        return 0
    results = {}
    for name in chosen:
        results[name] = fuzz(dataclasses.replace(settings, findings=settings.findings.absolute()), name)
        print(f"{name}: {results[name]['executions']:,} executions", file=sys.stderr)
    show(results)
    if settings.json is not None:
        settings.json.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(x["found"] for x in results.values()))


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
