"""What compiling costs a run of the program: how many programs, how long, and how fast a second start is.

Starts `python -m itool_jax.main` twice, with an empty compilation cache and with the one it left behind.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import inputs
from benchmarks.protocol import ROOT, TAIL, cpu

COMPILED = re.compile(r"Finished XLA compilation of .* in ([\d.]+(?:e-?\d+)?) sec")


class Start(NamedTuple):
    """One start of the program."""

    programs: int
    compiling: float
    seconds: float


def rows(work: Path, *, small: bool) -> list[dict[str, Any]]:
    """Rows of the table: programs and seconds of the first start, seconds of both starts."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        arguments = _small_run(work, folder) if small else ["--stage=iterate", "--config=smoke"]
        first, second = _start(arguments, folder), _start(arguments, folder)
    found = [
        ("compile_programs", first.programs, "programs"),
        ("compile_seconds", first.compiling, "s"),
        ("compile_first_start", first.seconds, "s"),
        ("compile_second_start", second.seconds, "s"),
    ]
    return [_row(name, value, unit, " ".join(arguments[:2])) for name, value, unit in found]


def _row(name: str, value: float, unit: str, shapes: str) -> dict[str, Any]:
    empty = {"peer": None, "theirs": None, "ratio": None, "agree": None}
    row = {"name": name, "ours": value, "unit": unit, "median": value, "spread": [value, value]}
    return row | empty | {"device": cpu(), "shapes": {"command": shapes}, "rounds": {"ours": [value], "theirs": []}}


def _small_run(work: Path, folder: Path) -> list[str]:
    data = folder / "data.jsonl"
    data.write_text(json.dumps({"id": "0", "prompt_ids": [20, 21], "target_ids": [22, 23]}) + "\n")
    model = inputs.checkpoint(work, "tiny")
    return ["--stage=score", f"--model={model}", f"--data={data}", f"--output={folder / 'scores.jsonl'}"]


def _start(arguments: list[str], folder: Path) -> Start:
    """Runs the program in a new run directory, with the compilation cache in `folder`."""
    run_dir = folder / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    environment = {"JAX_LOG_COMPILES": "1", "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "itool_jax.main", *arguments, f"--run_dir={run_dir}"]
    start = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-TAIL:]}")
    found = [float(x) for x in COMPILED.findall(done.stderr)]
    return Start(len(found), sum(found), seconds)
