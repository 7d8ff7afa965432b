"""Measures real commands on prompts of real lengths: `python -m benchmarks.real_lengths --data=FILE --json=OUT`.

Every stage runs as `python -m itool_jax.main` in its own process, with an empty compilation cache and with the one it
left; between the two, transformers does the same work in a process of its own. A row of the table holds CPU seconds
(user and system) and peak memory of the process, and the number of programs it compiled or read from the cache.
Unlike wall time, CPU seconds hardly depend on what else the machine does.
"""

import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks.compilations import COMPILED
from benchmarks.protocol import ROOT, TAIL, cpu, disagreement

Row = dict[str, Any]
WORKS = ("start", "score", "generate", "warmup", "dpo", "search")
TOLERANCE = {"values": 1e-3, "tokens": 0.0}
MODEL_PROGRAM = re.compile(r"jit\((score|prefill|sample_step|choice_logits|score_step|train_step)\)")
TRAINING = {"rank": 16, "alpha": 32.0, "learning_rate": 5e-5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Amounts of work. Rows are those of the data whose answer is one call."""

    data: Path
    """Data in any form that the program's --data accepts."""
    model: str = "smollm2"
    """Value of --model: a model folder, a GGUF file, or smollm2."""
    works: tuple[str, ...] = WORKS
    """Works to measure. start: scoring one short row."""
    rows: int = 20
    """Rows to score."""
    answers: int = 20
    """Rows to answer greedily, the first of those to score."""
    max_tokens: int = 16
    """Value of generate.max_tokens."""
    train: int = 9
    """Rows of the warm-up, which takes three steps."""
    pairs: int = 8
    """Pairs of the preference training, one step: the gold answer of a row over that of the next."""
    searched: int = 4
    """Prompts to search, with four simulations."""
    tools: tuple[int, ...] = (1, 2, 4, 6, 10)
    """Numbers of tools that the rows offer, in turn; they determine the lengths of the prompts."""
    train_tools: tuple[int, ...] = (1, 2, 4)
    """The same for the rows of both trainings."""
    transformers: bool = True
    """Compare with transformers and PEFT, installed in this environment."""
    json: Path | None = None
    """File to write the rows of the table to."""

    def __post_init__(self) -> None:
        if unknown := set(self.works) - set(WORKS):
            raise ValueError(f"works must be among {', '.join(WORKS)}, got {min(unknown)}")


def main(s: Settings) -> list[Row]:
    """Measures all works, prints the table and writes the JSON."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # memory of children counts from their parent's
            lengths = pool.apply(prepare, (s, work))
        print("; ".join(f"{what}: {len(n)} prompts of {min(n)} to {max(n)} tokens" for what, n in lengths.items()))
        if {"search", "dpo"} & set(s.works):
            ours(s, "base", "setup", work)
            add_tables(work / "base")
        print(f"{'work':<9} {'side':<13} {'CPU s':>7} {'GB':>6} {'programs':>9} {'of the model':>12} {'agree':>8}")
        for what in s.works:
            for side, measure in SIDES.items():
                if measure is theirs and not (s.transformers and what != "search"):
                    continue
                row = {"work": what, "side": side} | measure(s, what, side, work)
                rows.append(row)
                numbers = f"{row['cpu_seconds']:7.1f} {row['gigabytes']:6.2f}"
                counts = f"{row.get('programs', ''):>9} {row.get('of_the_model', ''):>12}"
                print(f"{what:<9} {side:<13} {numbers} {counts} {row.get('agree', ''):>8}", flush=True)
                if s.json is not None:
                    s.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"on {cpu()}")
    return rows


def ours(s: Settings, what: str, side: str, work: Path) -> Row:
    """Runs a work as the command that a user gives."""
    run_dir, output = work / f"{what} {side}", work / f"{what} {side}.jsonl"
    trained = [
        *(f"--data={work / 'train.jsonl'}", "--samples.test_share=0", "--samples.validation_share=0"),
        *(f"--lora.rank={TRAINING['rank']}", f"--lora.alpha={TRAINING['alpha']}", "--pairs.held_out=0"),
        *(f"--{part}.learning_rate={TRAINING['learning_rate']}" for part in ("warmup", "preference")),
        *(f"--warmup.batch_size={-(-s.train // 3)}", f"--preference.batch_size={s.pairs}", "--preference.epochs=1"),
        *("--search.n_simulations=4", f"--search.max_step_tokens={s.max_tokens}"),
        f"--search.max_last_step_tokens={s.max_tokens}",
    ]
    if what in ("start", "score", "generate"):
        stage = "generate" if what == "generate" else "score"
        arguments = [f"--stage={stage}", f"--data={work / what}.jsonl", f"--output={output}"]
        arguments += [f"--generate.max_tokens={s.max_tokens}"]
    elif what in ("warmup", "base"):
        run_dir = work / "base" if what == "base" else run_dir
        arguments = ["--stage=warmup", *trained, f"--run_dir={run_dir}", f"--warmup.epochs={int(what == 'warmup')}"]
    else:
        shutil.copytree(work / "base", run_dir)
        arguments = [f"--stage={what}", *trained, f"--run_dir={run_dir}", "--warmup.epochs=0"]
    environment = {"JAX_LOG_COMPILES": "1", "JAX_COMPILATION_CACHE_DIR": str(work / "xla" / what)}
    command = ["itool_jax.main", f"--model={s.model}", *arguments]
    row, log = measured(command, environment, work / f"{what} {side}.log")
    compiled = [name for name, _ in COMPILED.findall(log)]
    row |= {"programs": len(compiled), "of_the_model": sum(map(bool, map(MODEL_PROGRAM.search, compiled)))}
    if (check := work / f"{what} check.json").exists():
        errors = disagreement(results(what, run_dir, output), json.loads(check.read_text()))
        if wrong := {kind: error for kind, error in errors.items() if not error <= TOLERANCE[kind]}:
            raise RuntimeError(f"{what} differs from transformers: {wrong}")
        row["agree"] = format(max(errors.values()), ".1e")
    return row


def results(what: str, run_dir: Path, output: Path) -> dict[str, list[Any]]:
    """Reads what a command computed, to compare it with transformers."""
    if what == "warmup":
        return {"values": [read(run_dir / "metrics.jsonl")[0]["loss"]]}
    if what == "dpo":
        rows = read(run_dir / "iteration_1" / "reference.jsonl")
        return {"values": [row[step] for row in rows for step in ("chosen", "rejected")]}
    if what == "generate":
        return {"tokens": [row["token_ids"] for row in read(output)]}
    return {"values": [row["logprob_sum"] for row in read(output)]}


def theirs(s: Settings, what: str, side: str, work: Path) -> Row:
    """Runs a work with transformers, in a process that leaves its results for the check."""
    check = work / f"{what} check.json"
    waiting = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}  # threads that wait take no CPU seconds
    command = ["benchmarks.children.hf_command", what, str(work / "tasks.json"), str(check)]
    return measured(command, waiting, work / f"{what} {side}.log")[0]


def measured(module: Sequence[str], environment: Mapping[str, str], log: Path) -> tuple[Row, str]:
    """Runs a module to its end; returns its CPU seconds and peak memory, and its log."""
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *module],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(module)} failed:\n{log.read_text()[-TAIL:]}")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "gigabytes": peak / 1e9}, log.read_text()


def read(path: Path) -> list[Row]:
    """Reads a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def prepare(s: Settings, work: Path) -> dict[str, list[int]]:
    """Writes the data of all commands, and the same rows as token ids; returns the lengths of the prompts."""
    from benchmarks import inputs  # imports JAX, which the parent must not

    return inputs.real_rows(s, work, TRAINING)


def add_tables(run_dir: Path) -> None:
    """Writes the scores and the pairs that search and preference training read, as if computed from `run_dir`."""
    tables = json.loads((run_dir.parent / "tables.json").read_text())
    folder = run_dir / "iteration_1"
    folder.mkdir()
    for name, rows in tables.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


SIDES = {"ours, empty": ours, "transformers": theirs, "ours, full": ours}
"""Sides in the order in which they are measured."""

if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
