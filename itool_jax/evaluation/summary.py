"""Summarizes a whole run: accuracies by phase, results of searches and trainings, comparisons.

In: the figures of finished stages. Out: the content of `summary.json`, and its table in the terminal.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.table import Table

from itool_jax.config import Config
from itool_jax.evaluation import benchmark, results
from itool_jax.evaluation.statistics import describe
from itool_jax.store import columns
from itool_jax.store.cache import read_figures
from itool_jax.store.paths import BASE, WARMUP, done_file, phase_name
from itool_jax.store.splits import has_part
from itool_jax.system.files import read_json
from itool_jax.system.messages import console_out, log

SEARCH_KEYS = dict.fromkeys(("prompts", "trees", "pairs", "generated_tokens", "seconds"), float)
"""Figures of a search that every run has, and their types."""
TRAINING_KEYS = dict.fromkeys(("pairs", "steps"), float)
COLUMNS = 6
"""Most categories in one table of the summary; the rest go into further tables below."""


def evaluated_phases(config: Config) -> list[str]:
    """Returns the evaluated phases, in order."""
    iterations = range(1, config.iterations + 1)
    chosen = iterations if config.evaluate.intermediate else iterations[-1:]
    return [BASE, WARMUP, *map(phase_name, chosen)]


def summarize(config: Config) -> dict[str, Any]:
    """Summarizes the run from its stage results."""
    evaluation, watching = results.evaluation_name(config), results.evaluation_name(results.watching(config))
    steps = ("warmup", "score", "search", "dpo", evaluation, watching)
    is_evaluated, rows = has_part(config, config.evaluate.split), []
    names = [BASE, *(phase_name(i) for i in range(config.iterations + 1))]
    for name in evaluated_phases(config):
        before, names = names[: names.index(name) + 1], names[names.index(name) + 1 :]
        figures = _figures(config, name, evaluation) if is_evaluated else {}
        seconds = sum(_seconds(config, phase, step) for phase in before for step in steps)
        measured = {key: figures.get(key, {}) for key in results.MEASURED}
        rows.append({"name": name, **measured, "seconds": round(seconds, 2)})
    searches, trainings = [], []
    for i in range(1, config.iterations + 1):
        name, before = phase_name(i), phase_name(i - 1)
        figures, scored = _figures(config, name, "search"), _figures(config, name, "score")
        searched = {key: figures.get(key) for key in (*SEARCH_KEYS, *results.SEARCH_FIGURES)}
        searches.append({"iteration": i, **searched, **{key: scored.get(key) for key in results.ABILITY_FIGURES}})
        trained = {key: _figures(config, name, "dpo").get(key) for key in (*TRAINING_KEYS, "held_out")}
        trainings.append({"iteration": i, **trained, **results.what_training_changed(config, name, before)})
    return {
        "finished": True,
        "seed": config.seed,
        "model": config.model,
        "data": config.data,
        "device": jax.devices()[0].device_kind,
        "split": config.evaluate.split,
        "phases": rows,
        "search": searches,
        "training": trainings,
        "comparisons": _comparisons(config),
        "benchmark": _benchmark(config),
    }


def _benchmark(config: Config) -> dict[str, Any] | None:
    """Returns the benchmark's figures by phase; None without a benchmark."""
    if config.benchmark is None:
        return None
    trained = evaluated_phases(config)[1:]
    read = {phase: read_json(benchmark.results_folder(config, phase) / "summary.json") for phase in trained}
    return {"name": config.benchmark, "phases": read}


def _figures(config: Config, phase: str, stage: str) -> dict[str, Any]:
    figures = read_figures(config.run_dir, phase, stage)
    assert figures is not None  # every stage was just run
    wanted = {"search": SEARCH_KEYS, "score": {}, "dpo": TRAINING_KEYS}.get(stage, results.MEASURED)
    if bad := columns.fault(figures, wanted):
        path = done_file(config.run_dir, phase, stage)
        raise ValueError(f"{path} is damaged ({bad}); delete it to run the stage again")
    return figures


def _seconds(config: Config, phase: str, stage: str) -> float:
    figures = read_figures(config.run_dir, phase, stage)
    return figures["seconds"] if figures else 0.0


def _comparisons(config: Config) -> list[dict[str, Any]]:
    """Compares each phase with the one before, and the last with the warm-up, paired over samples.

    Without a held-out part, only the benchmark's categories are compared.
    """
    names = evaluated_phases(config)
    pairs = list(zip(names[1:], names, strict=False))
    if names[-2] not in (BASE, WARMUP):
        pairs.append((names[-1], WARMUP))
    rows = []
    held_out = has_part(config, config.evaluate.split)
    for phase, before in pairs if held_out else pairs[1:]:  # the base model is not evaluated on the benchmark
        result, lower = results.compared(config, phase, before) if held_out else (None, [])
        if config.benchmark is not None and before != BASE:
            lower += [f"{config.benchmark} {line}" for line in benchmark.regressions(config, before, phase)]
        figures, text = (result._asdict(), describe(result)) if result else ({}, f"on {config.benchmark} only")
        row = {"phase": phase, "against": before, **figures, "text": text, "regressions": lower}
        rows.append(row)
    return rows


def _table(phases: Sequence[Mapping[str, Any]], names: Sequence[str], title: str | None) -> Table:
    """Makes a table of accuracies of some categories, one row per phase; a table with a title also has the time."""
    # Without a frame and with narrow gaps, the widest row just fits 80 columns.
    table = Table(title=title, title_justify="left", box=None, collapse_padding=True, pad_edge=False)
    table.add_column("phase", no_wrap=True)
    for name in names:
        table.add_column(f"{name}\nn={phases[0]['n'][name]}", justify="right")
    if title is not None:
        table.add_column("time", justify="right")
    for phase in phases:
        cells = [f"{100 * phase['accuracy'][n]:.1f}±{100 * phase['standard_error'][n]:.1f}" for n in names]
        table.add_row(phase["name"], *cells, *([f"{phase['seconds']:.0f}s"] if title is not None else []))
    return table


def show(config: Config, summary: dict[str, Any], more: str = "") -> None:
    """Prints the summary: accuracies as tables, then a line per search, training and comparison."""
    names = [name for name, count in summary["phases"][0]["n"].items() if count]
    title = f"exact answers, % ± standard error, {summary['split']} part" if names else "time per phase"
    for first in range(0, max(1, len(names)), COLUMNS):
        console_out.print(_table(summary["phases"], names[first : first + COLUMNS], title if first == 0 else None))
    for row in summary["search"]:
        per_second = row["generated_tokens"] / max(row["seconds"], 1e-9)
        console_out.print(
            f"search {row['iteration']}: {row['prompts']} prompts, {row['pairs']} pairs, "
            f"{row['generated_tokens']} tokens, {per_second:.0f} tokens/s",
            soft_wrap=True,
        )
    for row in summary["training"]:
        console_out.print(results.describe_training(f"training {row['iteration']}", row), soft_wrap=True)
    for row in summary["comparisons"]:
        console_out.print(f"{row['phase']} against {row['against']}: {row['text']}", soft_wrap=True)
        for line in row["regressions"]:
            console_out.print(f"  lower: {line}", soft_wrap=True)
    log(f"Done. {more or f'Results are in {config.run_dir}'}")
