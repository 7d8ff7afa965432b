"""Reads a run directory, finished or not, into plain values for its report.

In: a run directory. Out: what was run, figures, curves and examples; and its search trees, each as compact JSON.
"""

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from itool_jax.config import Config, Runtime, current_value
from itool_jax.data.rows import read_rows
from itool_jax.evaluation import results
from itool_jax.evaluation.errors import KINDS, error_kind
from itool_jax.evaluation.statistics import describe, wilson_interval
from itool_jax.report import trees as report_trees
from itool_jax.store import columns
from itool_jax.store.cache import Figures, read_figures
from itool_jax.store.paths import done_file, iteration_of, phase_name
from itool_jax.store.splits import CARD
from itool_jax.store.tables import EvaluationRow, ScoreRow
from itool_jax.system import environment, untrusted
from itool_jax.system.files import read_json
from itool_jax.system.messages import LogRow
from itool_jax.text.sample import Row, Sample

MOST_POINTS, MOST_EXAMPLES, LAST_LINES = 400, 1000, 40
"""Most points of a curve, example samples and log lines that a report shows."""
STAGES = ("warmup", "score", "search", "reference", "dpo")
COMPARED = {"phase": str, "against": str, "text": str, "regressions": list[str]}
SCORED = {"accuracy": results.NUMBERS, "n": results.NUMBERS, "interval": dict[str, tuple[float, float] | None]}
SHOWN = ("*.json*", "*.yaml", "*/*.json*", "*/*/summary.json")
"""Files that a report shows, relative to the run directory."""
RESULTS = re.compile(r"evaluation_(test|validation)_(\d+|all)")


def phases(config: Config) -> list[str]:
    """Returns the phases that the run has begun, in order."""
    names = map(phase_name, itertools.count())
    trained = itertools.takewhile(lambda name: (config.run_dir / name).is_dir(), names)
    return [name for name in ("base",) if (config.run_dir / name).is_dir()] + list(trained)


def stamp(config: Config) -> str:
    """Returns a text that changes whenever a file shown in the report changes."""
    paths = sorted(path for pattern in SHOWN for path in config.run_dir.glob(pattern))
    marks = [(str(path), status.st_mtime_ns, status.st_size) for path in paths if (status := _status(path))]
    return f"{hash(tuple(marks)) & (2**64 - 1):x}"


def _status(path: Path) -> Any:
    try:
        return path.stat()
    except FileNotFoundError:  # it is being replaced
        return None


def find(config: Config) -> tuple[Figures, list[report_trees.ReportTree]]:
    """Returns the report, and the trees of all iterations in the order of its index.

    Raises:
        ValueError: there is no run, or one of its files is damaged; names the file.
    """
    if not (config.run_dir / "config.yaml").is_file():
        raise ValueError(f"{config.run_dir} is not a run directory (no config.yaml); set --run_dir")
    names, tool_lists = phases(config), ToolLists()
    config = _with_evaluation(config, names)
    iterations = [name for name in names if name.startswith("iteration_")]
    trees = [
        tree
        for name in iterations
        for tree in report_trees.trees(config.run_dir / name, config.run_dir, tool_lists.number)
    ]
    report = {
        "title": config.run_dir.resolve().name,
        "settings": _settings(config.run_dir / "config.yaml"),
        "environment": _environment(config.run_dir / environment.FILE),
        "card": _card(config.run_dir / CARD),
        "summary": _optional(config.run_dir / "summary.json"),
        "log": _log(config.run_dir / "log.jsonl"),
        "phases": names,
        "evaluation": _evaluation(config, names),
        "benchmarks": _benchmarks(config, names),
        "training": _training(config.run_dir / "metrics.jsonl"),
        "perplexity": _perplexity(config, iterations),
        "iterations": [figures for name in iterations if (figures := _iteration(config, name))],
        "searches": [figures for name in iterations if (figures := report_trees.statistics(config.run_dir / name))],
        "stages": _stages(config, names),
        "kinds": KINDS,
        "examples": _examples(config, names, tool_lists),
        "trees": [tree.entry for tree in trees],
    }
    return report | {"tool_lists": tool_lists.lists}, trees


class ToolLists:
    """Lists of tools without duplicates: many samples offer the same."""

    def __init__(self) -> None:
        self.lists: list[Any] = []
        self._numbers: dict[str, int] = {}

    def number(self, tools: Sequence[Row]) -> int:
        """Returns the index of a list of tools, adding it if it is new."""
        key = json.dumps(tools, sort_keys=True)
        if key not in self._numbers:
            self._numbers[key] = len(self.lists)
            self.lists.append([tool.get("function", tool) for tool in tools])
        return self._numbers[key]


def _optional(path: Path) -> Figures | None:
    return read_json(path) if path.is_file() else None


def _environment(path: Path) -> Figures:
    sessions = (_optional(path) or {}).get("sessions")
    return {"sessions": [row for row in sessions if isinstance(row, dict)] if isinstance(sessions, list) else []}


def _card(path: Path) -> Figures | None:
    card = _optional(path)
    for name in ("parts", "overlap_with_train") if card else ():
        counts = card.get(name) if card else None
        if not isinstance(counts, dict) or not all(_counts(row) for row in counts.values()):
            raise ValueError(f"{path} is damaged (its {name} are not counts by part); choose another --run_dir")
    return card


def _counts(row: Any) -> bool:
    """Returns whether a row of the card has no text where the page shows a number."""
    return isinstance(row, dict) and not any(isinstance(value, str) for value in row.values())


def _settings(path: Path) -> list[Figures]:
    """Returns the run's settings; those of single commands, such as its output, only where they are of interest."""
    try:
        saved = untrusted.read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(saved, dict):
        raise ValueError(f"{path} is damaged (no settings)")
    defaults = Config(stage="iterate")
    default, runtime = defaults.flat(), defaults.flat(Runtime)
    kept = ("iterations", "benchmark", "evaluate.", "generate.", "mesh.")
    known = {
        name: current_value(name, value)
        for name, value in saved.items()
        if name not in runtime or name.startswith(kept)
    }
    return [
        {"name": name, "value": value, "default": default.get(name), "differs": value != default.get(name)}
        for name, value in known.items()
    ]


def _log(path: Path) -> Figures:
    """Returns the last lines of the log, and the current stage."""
    rows = [columns.row_of(LogRow, row) for row in _lines(path)]
    begun = [row for row in rows if row.text == "begin"]
    return {
        "lines": [row._asdict() for row in rows[-LAST_LINES:]],
        "stage": begun[-1].stage if begun else None,
        "time": rows[-1].time if rows else None,
    }


def _lines(path: Path) -> list[Row]:
    """Reads rows of a file that another process may be writing; skips what cannot be read yet."""
    return [row for _, row in read_rows(path, skipped=[])] if path.is_file() else []


def _with_evaluation(config: Config, names: Sequence[str]) -> Config:
    """Returns the settings with the evaluation that covers most phases of the run, the latest if several do."""
    files = [path for name in names for path in (config.run_dir / name).glob("evaluation_*.jsonl")]
    files = [path for path in files if RESULTS.fullmatch(path.stem)]
    watching = results.evaluation_name(results.watching(config))  # shows what training changed, not how good a phase is
    files = [path for path in files if path.stem != watching] or files
    if not files:
        return config
    counts = Counter(path.stem for path in files)
    best = max(files, key=lambda path: (counts[path.stem], path.stat().st_mtime_ns)).stem
    _, split, limit = best.split("_")
    chosen = dataclasses.replace(config.evaluate, split=split, limit=0 if limit == "all" else int(limit))
    return dataclasses.replace(config, evaluate=chosen)


# Accuracy -----------------------------------------------------------------------------------------------------


def _evaluation(config: Config, names: Sequence[str]) -> Figures:
    evaluated = []
    for name in names:
        stage = results.results_file(config, name).stem
        figures = read_figures(config.run_dir, name, stage)
        if figures is None:
            continue
        if bad := columns.fault(figures, results.MEASURED):
            raise ValueError(f"{done_file(config.run_dir, name, stage)} is damaged ({bad}); delete it to run it again")
        interval = {key: _interval(value, figures["n"].get(key)) for key, value in figures["accuracy"].items()}
        evaluated.append({"phase": name, "interval": interval, **{key: figures[key] for key in ("accuracy", "n")}})
    return {
        "split": config.evaluate.split,
        "limit": config.evaluate.limit,
        "categories": [name for name in results.CATEGORIES if any(row["n"].get(name) for row in evaluated)],
        "phases": evaluated,
        "comparisons": _comparisons(config, [row["phase"] for row in evaluated]),
    }


def _interval(accuracy: float | None, n: float | None) -> tuple[float, float] | None:
    return wilson_interval(accuracy, int(n)) if accuracy is not None and n and 0 <= accuracy <= 1 else None


def _comparisons(config: Config, names: Sequence[str]) -> list[Figures]:
    """Returns the comparisons in a finished run's summary, or else of each available phase with the one before."""
    summary = _optional(config.run_dir / "summary.json")
    told = (summary or {}).get("comparisons")
    if isinstance(told, list) and not any(columns.fault(row, COMPARED) for row in told if isinstance(row, dict)):
        return [row for row in told if isinstance(row, dict)]
    comparisons = []
    for before, phase in itertools.pairwise(names):
        result, lower = results.compared(config, phase, before)
        comparisons.append({"phase": phase, "against": before, "text": describe(result), "regressions": lower})
    return comparisons


def _benchmarks(config: Config, names: Sequence[str]) -> list[Figures]:
    """Returns a row for each phase and benchmark that was scored."""
    benchmarks = []
    for name in names:
        for path in sorted((config.run_dir / name).glob("*/summary.json")):
            if path.parent.name.startswith(("bfcl", "api_bank")):
                figures = read_json(path)
                if bad := columns.fault(figures, SCORED):
                    raise ValueError(f"{path} is damaged ({bad}); delete it to score the benchmark again")
                benchmarks.append({**figures, "phase": name, "benchmark": path.parent.name})
    return benchmarks


# Curves -------------------------------------------------------------------------------------------------------


def _training(path: Path) -> list[Figures]:
    """Returns the training curves of each phase; of long ones only every n-th step."""
    by_phase: dict[str, dict[int, Row]] = {}
    for row in _lines(path):
        if isinstance(row.get("stage"), str) and isinstance(row.get("step"), int):
            by_phase.setdefault(row["stage"], {})[row["step"]] = row
    trainings = []
    for phase, rows in by_phase.items():
        steps = sorted(rows)
        kept = sorted({*steps[:: 1 + len(steps) // MOST_POINTS], steps[-1]})
        names = sorted(set().union(*(rows[step].keys() for step in kept)) - {"time", "stage", "step"})
        curves = {name: [_number(rows[step].get(name)) for step in kept] for name in names}
        trainings.append({"phase": phase, "n_steps": len(steps), "steps": kept, "curves": curves})
    return trainings


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def _perplexity(config: Config, iterations: Sequence[str]) -> list[Figures]:
    """Returns perplexities of the gold responses by iteration: of all, and of the searched ones before and after it."""
    keys = ["id", "perplexity", "n_tokens", "rank"]
    paths = [config.run_dir / name / results.SCORES for name in iterations]
    tables = [columns.read_table(path, ScoreRow, keys) for path in paths if path.is_file()]
    curves = []
    for name, table, later in itertools.zip_longest(iterations[: len(tables)], tables, tables[1:]):
        searched = {row.id for row in table if row.rank is not None}
        curves.append(
            {
                "phase": name,
                "all": quantiles([row.perplexity for row in table]),
                "before": quantiles([row.perplexity for row in table if row.id in searched]),
                "after": quantiles([row.perplexity for row in later or () if row.id in searched]),
                "tokens": sum(row.n_tokens for row in table),
            }
        )
    return curves


def _iteration(config: Config, phase: str) -> Figures | None:
    """Returns figures of an iteration's searched prompts, its search and its training; None before a search."""
    scored, searched = (read_figures(config.run_dir, phase, stage) for stage in ("score", "search"))
    if scored is None or searched is None:
        return None
    ability = {key: scored.get(key) for key in results.ABILITY_FIGURES}
    trained = read_figures(config.run_dir, phase, "dpo")
    row = {
        "phase": phase,
        **ability,
        **{key: searched.get(key) for key in ("prompts", "pairs", *results.SEARCH_FIGURES)},
    }
    if trained is None:
        return row
    before = phase_name(iteration_of(phase) - 1)
    return row | {"held_out": trained.get("held_out"), **results.what_training_changed(config, phase, before)}


def quantiles(values: Sequence[float]) -> Figures | None:
    """Returns the 10th, 25th, 50th, 75th and 90th percentile, the mean and the count; None if there are no values."""
    if not values:
        return None
    ordered, last = sorted(values), len(values) - 1
    percentiles = {f"p{q}": ordered[round(q / 100 * last)] for q in (10, 25, 50, 75, 90)}
    return percentiles | {"mean": sum(values) / len(values), "n": len(values)}


def _stages(config: Config, names: Sequence[str]) -> list[Figures]:
    """Returns the numeric figures of each finished stage, such as its seconds."""
    stage = results.results_file(config, "base").stem
    stages = []
    for name, kind in itertools.product(names, (*STAGES, stage)):
        if (figures := read_figures(config.run_dir, name, kind)) is not None:
            kept = {key: value for key, value in figures.items() if _number(value) is not None}
            stages.append({"phase": name, "stage": "evaluate" if kind == stage else kind, **kept})
    return stages


# Examples -----------------------------------------------------------------------------------------------------


class _Answer(NamedTuple):
    """An evaluated answer; `kind` is its kind of error, None if it is right."""

    kind: str | None
    response: str


def _examples(config: Config, names: Sequence[str], tool_lists: ToolLists) -> Figures:
    """Returns responses of all phases to samples of the evaluated split, first those whose verdict changed."""
    answers = {name: by_id for name in names if (by_id := _answers(results.results_file(config, name)))}
    counts = {name: Counter(answer.kind for answer in by_id.values() if answer.kind) for name, by_id in answers.items()}
    ids = list(dict.fromkeys(sample_id for by_id in answers.values() for sample_id in by_id))
    ids.sort(key=lambda i: len({by_id[i].kind is None for by_id in answers.values() if i in by_id}) < 2)
    samples = _samples(config.run_dir, config.evaluate.split)
    shown = [sample for i in ids[:MOST_EXAMPLES] if (sample := samples.get(i))]
    return {
        "phases": list(answers),
        "kinds": {name: dict(kinds) for name, kinds in counts.items()},
        "left_out": len(ids) - len(shown),
        "samples": [_example(sample, answers, tool_lists) for sample in shown],
    }


def _answers(path: Path) -> dict[str, _Answer]:
    if not path.is_file():
        return {}
    rows = columns.read_table(path, EvaluationRow, ["id", "correct", "finished", "response", "target"])
    return {row.id: _Answer(_kind(row), row.response) for row in rows}


def _kind(row: EvaluationRow) -> str | None:
    return None if row.correct else error_kind(row.target, row.response, finished=row.finished)


def _example(sample: Sample, answers: Mapping[str, Mapping[str, _Answer]], tool_lists: ToolLists) -> Figures:
    shown = report_trees.prompt(sample, tool_lists.number)
    by_phase = {name: answer._asdict() for name, rows in answers.items() if (answer := rows.get(sample.id))}
    return {**shown, "id": sample.id, "gold": sample.target, "answers": by_phase}


def _samples(run_dir: Path, part: str) -> dict[str, Sample]:
    path = run_dir / "data" / f"{part}.jsonl"
    return report_trees.samples(path, path.stat().st_mtime_ns) if path.is_file() else {}
