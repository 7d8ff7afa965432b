"""The whole method: warm-up, then rounds of score, search and preference training, evaluated after each phase.

In: the settings. Out: a run directory with everything, `summary.json`, and a table.
"""

import dataclasses
from typing import Any

import jax
from rich.table import Table

from itool_jax.config import Config
from itool_jax.evaluation.statistics import describe
from itool_jax.files import read_json, write_json
from itool_jax.hosts import is_first
from itool_jax.messages import console_out, say
from itool_jax.stages import benchmark, columns, dpo, evaluate, folder, report, score, search, warmup

SEARCH_KEYS = ("prompts", "trees", "pairs", "generated_tokens", "seconds")
MEASURED = ("accuracy", "n", "standard_error")


def run(config: Config) -> dict[str, Any]:
    """Runs what is not done yet; returns the summary."""
    for training in (config.warmup, config.preference):
        training.n_micro()  # sizes that do not go together are met now, not hours later
    last, evaluation = phases(config)[-1], evaluate.results_file(config, "base").stem
    if is_first() and folder.read_done(config, last, evaluation) is None:  # one that is there is of fewer iterations
        (config.run_dir / "summary.json").unlink(missing_ok=True)
    evaluate.evaluate(config, "base")
    report.refresh(config)
    warmup.run(config)
    _evaluate(config, "warmup")
    for iteration in range(1, config.iterations + 1):
        now = dataclasses.replace(config, iteration=iteration)
        score.run(now)
        search.run(now)
        dpo.run(now)
        _evaluate(now, folder.phase_name(iteration))
    summary = summarize(config)
    if is_first():
        write_json(config.run_dir / "summary.json", summary)
        made = report.refresh(config)
        show(config, summary, f", {made.name} to look at it" if made else "")
    return summary


def _evaluate(config: Config, phase: str) -> None:
    """On the held-out part, and on the benchmark where there is one."""
    evaluate.evaluate(config, phase)
    if config.benchmark is not None:
        benchmark.evaluate(config, phase)
    report.refresh(config)


def phases(config: Config) -> list[str]:
    """All phases in order."""
    return ["base", *(folder.phase_name(i) for i in range(config.iterations + 1))]


def summarize(config: Config) -> dict[str, Any]:
    """What the run came to, from the figures its stages left."""
    stage = evaluate.results_file(config, "base").stem
    found = []
    for name in phases(config):
        figures = _figures(config, name, stage)
        seconds = sum(_seconds(config, name, s) for s in ("warmup", "score", "search", "dpo", stage))
        measured = {key: figures[key] for key in MEASURED}
        found.append({"name": name, **measured, "seconds": round(seconds, 2)})
    searches = []
    for i in range(1, config.iterations + 1):
        figures = _figures(config, folder.phase_name(i), "search")
        searches.append({"iteration": i, **{key: figures[key] for key in SEARCH_KEYS}})
    return {
        "finished": True,
        "seed": config.seed,
        "model": config.model,
        "data": config.data,
        "device": jax.devices()[0].device_kind,
        "split": config.evaluate.split,
        "phases": found,
        "search": searches,
        "comparisons": _comparisons(config),
        "benchmark": _benchmark(config),
    }


def _benchmark(config: Config) -> dict[str, Any] | None:
    """The benchmark's figures by phase; null without one."""
    if config.benchmark is None:
        return None
    trained = phases(config)[1:]
    read = {phase: read_json(benchmark.results_folder(config, phase) / "summary.json") for phase in trained}
    return {"name": config.benchmark, "phases": read}


def _figures(config: Config, phase: str, stage: str) -> dict[str, Any]:
    figures = folder.read_done(config, phase, stage)
    assert figures is not None  # every stage was just run
    if bad := columns.fault(figures, SEARCH_KEYS if stage == "search" else MEASURED):
        path = folder.done_file(config, phase, stage)
        raise ValueError(f"{path} is damaged ({bad}); delete it to run the stage again")
    return figures


def _seconds(config: Config, phase: str, stage: str) -> float:
    figures = folder.read_done(config, phase, stage)
    return figures["seconds"] if figures else 0.0


def _comparisons(config: Config) -> list[dict[str, Any]]:
    """Each phase against the one before, and the last against the warm-up, paired over samples."""
    names = phases(config)
    pairs = list(zip(names[1:], names, strict=False))
    if config.iterations > 1:
        pairs.append((names[-1], "warmup"))
    found = []
    for phase, before in pairs:
        result, lower = evaluate.compared(config, phase, before)
        if config.benchmark is not None and before != "base":
            lower += [f"{config.benchmark} {line}" for line in benchmark.regressions(config, before, phase)]
        row = {"phase": phase, "against": before, **result._asdict(), "text": describe(result), "regressions": lower}
        found.append(row)
    return found


def show(config: Config, summary: dict[str, Any], more: str = "") -> None:
    """Prints the summary as a table, and what is significant of it."""
    names = [name for name, count in summary["phases"][0]["n"].items() if count]
    # No frame and narrow gaps: the widest row just fits 80 columns.
    title = f"exact answers, % ± standard error, {summary['split']} part"
    table = Table(title=title, title_justify="left", box=None, collapse_padding=True, pad_edge=False)
    table.add_column("phase", no_wrap=True)
    for name in names:
        table.add_column(f"{name}\nn={summary['phases'][0]['n'][name]}", justify="right")
    table.add_column("time", justify="right")
    for phase in summary["phases"]:
        cells = [f"{100 * phase['accuracy'][n]:.1f}±{100 * phase['standard_error'][n]:.1f}" for n in names]
        table.add_row(phase["name"], *cells, f"{phase['seconds']:.0f}s")
    console_out.print(table)
    for row in summary["search"]:
        per_second = row["generated_tokens"] / max(row["seconds"], 1e-9)
        console_out.print(
            f"search {row['iteration']}: {row['prompts']} prompts, {row['pairs']} pairs, "
            f"{row['generated_tokens']} tokens, {per_second:.0f} tokens/s",
            soft_wrap=True,
        )
    for row in summary["comparisons"]:
        console_out.print(f"{row['phase']} against {row['against']}: {row['text']}", soft_wrap=True)
        for line in row["regressions"]:
            console_out.print(f"  lower: {line}", soft_wrap=True)
    say(f"everything is in {config.run_dir}{more}")
