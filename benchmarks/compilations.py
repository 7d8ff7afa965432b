"""Measures what compiling costs a run: how many programs, how long, and how fast a second start is.

Starts `python -m itool_jax.main --config=smoke` twice, with an empty compilation cache and with the one it left. Then
starts the search alone. Times run from the start of the process to the last tree, so the first step took less.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.protocol import ROOT, TAIL, cpu

COMPILED = re.compile(r"Finished XLA compilation of (.*) in ([\d.]+(?:e-?\d+)?) sec")
OF_THE_MODEL = re.compile(r"jit\((prefill|sample_step|choice_logits|score_step)\)")
SMALL = ["--iterations=1", "--generated.train=60", "--generated.validation=10", "--generated.test=10"]


class Start(NamedTuple):
    """Measurements of one start of the program."""

    programs: int
    of_the_model: int
    """Number of model programs that a search uses."""
    compiling: float
    seconds: float


def rows(work: Path, *, small: bool) -> list[dict[str, Any]]:
    """Returns rows of the table: programs and seconds of a first start, a second start, and a search alone."""
    arguments = ["--config=smoke", *(SMALL if small else [])]
    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        first = _start(["--stage=iterate", *arguments], folder)
        shutil.rmtree(folder / "run")
        second = _start(["--stage=iterate", *arguments], folder)
        (folder / "run" / "iteration_1" / "trees.jsonl").unlink()
        search = _start(["--stage=search", "--iteration=1", *arguments], folder)
    measured = [
        ("compile_programs", first.programs, "programs"),
        ("compile_seconds", first.compiling, "s"),
        ("compile_first_start", first.seconds, "s"),
        ("compile_second_start", second.seconds, "s"),
        ("compile_search", search.of_the_model, "programs"),
        ("compile_search_again", search.seconds, "s"),
    ]
    return [_row(name, value, unit, " ".join(arguments)) for name, value, unit in measured]


def _row(name: str, value: float, unit: str, shapes: str) -> dict[str, Any]:
    empty = {"peer": None, "theirs": None, "ratio": None, "agree": None}
    row = {"name": name, "ours": value, "unit": unit, "median": value, "spread": [value, value]}
    return row | empty | {"device": cpu(), "shapes": {"command": shapes}, "rounds": {"ours": [value], "theirs": []}}


def _start(arguments: list[str], folder: Path) -> Start:
    """Runs the program in the run directory `run` of a folder, with its compilation cache in the same folder."""
    environment = {"JAX_LOG_COMPILES": "1", "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "itool_jax.main", *arguments, f"--run_dir={folder / 'run'}"]
    start = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-TAIL:]}")
    compiled = COMPILED.findall(done.stderr)
    of_the_model = sum(1 for name, _ in compiled if OF_THE_MODEL.search(name))
    return Start(len(compiled), of_the_model, sum(float(took) for _, took in compiled), seconds)
