"""The layout of a run's files; stages share nothing else.

    config.yaml  summary.json  metrics.jsonl  log.jsonl  environment.json  report.html
    data/        {train,validation,test}.jsonl; card.json; skipped.txt; sources.json, hashes of the model and data files
    base/ warmup/ iteration_1/ …    one folder a phase: weights/ (not in base), evaluation_<split>_<limit>.jsonl, and
                                    for an iteration scores.jsonl, trees.jsonl, pairs.jsonl, answers.jsonl,
                                    reference.jsonl
A step's `<step>.json` is written last: if it exists and its inputs are unchanged, the step is done. Until then,
`<step>.working/` holds the rows and checkpoints of unfinished work.
"""

import itertools
from pathlib import Path

BASE, WARMUP = "base", "warmup"
WEIGHTS = "weights"
"""Subfolder of a phase for what training changed: the adapters, or all weights if there are none."""

StepId = tuple[str, str]
"""(phase, step)."""


def phase_name(iteration: int) -> str:
    """Returns the name of the phase of iteration 1, 2, …; 0 is the warm-up."""
    return f"iteration_{iteration}" if iteration else WARMUP


def iteration_of(phase: str) -> int:
    """Returns the iteration number of a phase; 0 for the warm-up."""
    return 0 if phase == WARMUP else int(phase.removeprefix("iteration_"))


def policy_step(phase: str) -> StepId | None:
    """Returns the step that trains a phase's weights; None for the base."""
    return None if phase == BASE else (phase, WARMUP if phase == WARMUP else "dpo")


def weights_folder(run_dir: Path, phase: str) -> Path:
    """Returns the folder of the weights that a phase trained."""
    return run_dir / phase / WEIGHTS


def trained_phases(run_dir: Path) -> list[str]:
    """Lists the phases that have weights, in order."""
    names = map(phase_name, itertools.count())
    return list(itertools.takewhile(lambda phase: weights_folder(run_dir, phase).is_dir(), names))


def done_file(run_dir: Path, phase: str, step: str) -> Path:
    """Returns the file that marks a step as done and holds its figures."""
    return run_dir / phase / f"{step}.json"


def working_folder(run_dir: Path, phase: str, step: str) -> Path:
    """Returns the folder of a step's unfinished work."""
    return run_dir / phase / f"{step}.working"


def command(step: StepId) -> str:
    """Returns the options that run one step alone, such as `--stage=score --iteration=2`."""
    phase, stage = step
    iteration = phase.removeprefix("iteration_")
    return f"--stage={stage}" + (f" --iteration={iteration}" if iteration != phase else "")
