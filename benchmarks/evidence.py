"""Does the loop teach more than further fine-tuning? `python -m benchmarks.evidence --seeds 0 1 2 --output DIR`.

For each seed: the demo, then its control (the gold responses of the same prompts, for as many steps, from the same
warm-up), both evaluated on the whole test part. Prints accuracies with standard errors over seeds, and the paired
differences over all samples; writes evidence.json. Finished runs are not run again.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import tyro

from itool_jax import config as settings
from itool_jax.config import Config
from itool_jax.evaluation.statistics import describe, mean_and_standard_error, paired_difference
from itool_jax.stages import evaluate, folder, iterate

FROM_SEARCH = ("score.json", "search.json", "scores.jsonl", "pairs.jsonl", "trees.jsonl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Which runs to make."""

    output: Path = Path("runs/evidence")
    """Folder of the runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One demo and one control each."""
    split: str = "test"
    """Part to evaluate on: test for claims, validation to choose settings."""
    options: tuple[str, ...] = ()
    """Further settings for both, such as --preference.learning_rate=1e-4."""
    control_options: tuple[str, ...] = ()
    """Settings for the control alone."""


def main(s: Settings) -> None:
    """Makes the runs that are missing, compares them and writes evidence.json."""
    rows: list[dict[str, Any]] = []
    for seed in s.seeds:
        common = ["--stage=iterate", f"--seed={seed}", "--evaluate.limit=0", f"--evaluate.split={s.split}", *s.options]
        run = settings.parse([*common, f"--run_dir={s.output / f'demo_{seed}'}"])
        settings.save_or_check(run)
        iterate.run(run)
        options = [*common, *s.control_options, "--preference.control", f"--run_dir={s.output / f'control_{seed}'}"]
        control = settings.parse(options)
        settings.save_or_check(control)
        _share(run, control)
        iterate.run(control)
        rows.append({"seed": seed, "demo": _results(run), "control": _results(control)})
    (s.output / "evidence.json").write_text(json.dumps(_report(rows), indent=2) + "\n")


def _share(run: Config, control: Config) -> None:
    """Gives the control the data, the warm-up and the searches of the run."""
    for name in ("data", "base", "warmup"):
        shutil.copytree(run.run_dir / name, control.run_dir / name, dirs_exist_ok=True)
    for i in range(1, run.iterations + 1):
        target = control.run_dir / folder.phase_name(i)
        target.mkdir(parents=True, exist_ok=True)
        for name in FROM_SEARCH:
            shutil.copy(run.run_dir / folder.phase_name(i) / name, target / name)


def _results(run: Config) -> dict[str, dict[str, bool]]:
    return {phase: evaluate.read_results(run, phase) for phase in iterate.phases(run)}


def _report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies by phase over seeds, and paired comparisons over all seeds and samples."""
    report: dict[str, Any] = {"accuracy": {}, "comparisons": {}}
    for kind in ("demo", "control"):
        for phase in rows[0][kind]:
            values = [100 * sum(row[kind][phase].values()) / len(row[kind][phase]) for row in rows]
            mean, error = mean_and_standard_error(values)
            report["accuracy"][f"{kind} {phase}"] = {"by_seed": values, "mean": mean, "standard_error": error}
            print(f"{kind:<8} {phase:<12} {mean:6.2f} ± {error:.2f}   by seed: {', '.join(f'{v:.2f}' for v in values)}")
    last = list(rows[0]["demo"])[-1]
    for name, a, b in (
        ("demo against warm-up", ("demo", last), ("demo", "warmup")),
        ("control against warm-up", ("control", last), ("control", "warmup")),
        ("demo against control", ("demo", last), ("control", last)),
    ):
        marks = [[row[kind][phase][i] for row in rows for i in row["demo"][last]] for kind, phase in (a, b)]
        result = paired_difference(*marks)
        report["comparisons"][name] = {**result._asdict(), "text": describe(result)}
        print(f"{name}: {describe(result)}")
    return report


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
