"""Does the loop teach more than further fine-tuning? `python -m benchmarks.evidence --seeds 0 1 2 --output DIR`.

For each seed: the demo, then its control (the gold responses of the same prompts, for as many steps, from the same
warm-up), both evaluated on the whole test part. The best iteration of either is chosen on the validation part. Prints
accuracies with standard errors over seeds, and differences: for each seed, paired over the test samples, and their
mean with its standard error over seeds; writes evidence.json. Finished runs are not run again.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import tyro

from itool_jax import config as settings
from itool_jax import main, run_directory
from itool_jax.allocator import keep_freed_memory
from itool_jax.config import Config
from itool_jax.evaluation.statistics import describe, mean_and_standard_error, paired_difference
from itool_jax.files import write_json
from itool_jax.stages import evaluate, iterate
from itool_jax.stages.paths import phase_name
from itool_jax.stages.run import Run

FROM_SEARCH = ("search.json", "pairs.jsonl", "trees.jsonl", "answers.jsonl")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Which runs to make."""

    output: Path = Path("runs/evidence")
    """Folder of the runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One demo and one control each."""
    options: str = ""
    """Further settings for both: --options="--preference.learning_rate=1e-4 --preference.epochs=2"."""
    control_options: str = ""
    """Settings for the control alone."""


def compare(s: Settings) -> None:
    """Makes the runs that are missing, compares them and writes evidence.json."""
    rows: list[dict[str, Any]] = []
    for seed in s.seeds:
        common = ["--stage=iterate", f"--seed={seed}", "--evaluate.limit=0", *s.options.split()]
        demo = settings.parse([*common, f"--run_dir={s.output / f'demo_{seed}'}"])
        main.run(demo)
        options = [*s.control_options.split(), "--preference.control=sft_same_prompts", f"--run_dir={s.output / f'control_{seed}'}"]
        control = settings.parse([*common, *options])
        _share(demo, control)
        for iteration in range(1, demo.iterations + 1):
            main.run(dataclasses.replace(control, stage="dpo", iteration=iteration))
        rows.append({kind: _results(run) for kind, run in (("demo", demo), ("control", control))})
    write_json(s.output / "evidence.json", _report(rows))


def _share(demo: Config, control: Config) -> None:
    """Gives the control the data, the warm-up and the searches of the demo."""
    run_directory.save_or_check(control)
    for name in ("data", "base", "warmup"):
        if not (control.run_dir / name).exists():
            shutil.copytree(demo.run_dir / name, control.run_dir / name)
    for i in range(1, demo.iterations + 1):
        target = control.run_dir / phase_name(i)
        target.mkdir(parents=True, exist_ok=True)
        for name in FROM_SEARCH:
            shutil.copy(demo.run_dir / phase_name(i) / name, target / name)


def _results(run: Config) -> dict[str, dict[str, dict[str, bool]]]:
    """Which samples are right, by part and phase."""
    found = {}
    for split in ("validation", "test"):
        config = dataclasses.replace(run, evaluate=dataclasses.replace(run.evaluate, split=split))
        evaluate.run(Run(config))
        found[split] = {phase: evaluate.read_results(config, phase) for phase in iterate.phases(config)}
    return found


def _report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracies by phase over seeds, and paired comparisons over all seeds and samples."""
    report: dict[str, Any] = {"accuracy": {}, "best": {}, "comparisons": {}}
    for kind in ("demo", "control"):
        means: dict[str, float] = {}
        for phase in rows[0][kind]["test"]:
            for split in ("validation", "test"):
                marks = [row[kind][split][phase] for row in rows]
                values = [100 * sum(found.values()) / len(found) for found in marks]
                mean, error = mean_and_standard_error(values)
                figures = {"by_seed": values, "mean": mean, "standard_error": error if len(rows) > 1 else None}
                report["accuracy"][f"{kind} {phase} {split}"] = figures
                by_seed = ", ".join(f"{value:.2f}" for value in values)
                spread = f" ± {error:.2f}" if len(rows) > 1 else ""
                print(f"{kind:<8} {phase:<12} {split:<11} {mean:6.2f}{spread}   by seed: {by_seed}")
            means[phase] = report["accuracy"][f"{kind} {phase} validation"]["mean"]
        report["best"][kind] = max((p for p in means if p.startswith("iteration")), key=lambda phase: means[phase])
    demo, control = ("demo", report["best"]["demo"]), ("control", report["best"]["control"])
    for a, b in ((demo, ("demo", "warmup")), (control, ("control", "warmup")), (demo, control)):
        name = f"{' '.join(a)} against {' '.join(b)}"
        report["comparisons"][name] = _difference(name, [[row[k]["test"][p] for k, p in (a, b)] for row in rows])
    return report


def _difference(name: str, rows: list[list[dict[str, bool]]]) -> dict[str, Any]:
    """Two runs against each other, sample by sample, seed by seed: seeds share the samples and cannot be pooled."""
    results = [paired_difference([a[i] for i in a], [b[i] for i in a]) for a, b in rows]
    mean, error = mean_and_standard_error([100 * result.difference for result in results])
    print(f"{name}: {mean:+.2f}" + (f" ± {error:.2f} points over {len(rows)} seeds" if len(rows) > 1 else " points"))
    for result in results:
        print(f"    {describe(result)}")
    by_seed = [{**result._asdict(), "text": describe(result)} for result in results]
    return {"mean": mean, "standard_error": error if len(rows) > 1 else None, "by_seed": by_seed}


if __name__ == "__main__":
    keep_freed_memory()
    compare(tyro.cli(Settings, description=__doc__))
