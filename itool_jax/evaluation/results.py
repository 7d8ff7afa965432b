"""Reads the results of finished stages from a run directory: graded answers, figures of searches and trainings.

In: settings and a phase. Out: marks by sample, comparisons of phases, and the effect of a training.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from itool_jax.config import Config
from itool_jax.evaluation import comparison
from itool_jax.evaluation.statistics import PairedDifference, paired_difference
from itool_jax.mcts.search import RIGHT
from itool_jax.store import columns
from itool_jax.store.cache import Figures, read_figures
from itool_jax.store.tables import EvaluationRow, NodeRow

CATEGORIES = (
    *("overall", "easy", "medium", "hard", "irrelevance", "multi_turn"),
    *("long", "known_tools", "new_tools"),
)
WATCHED = 200
"""Number of validation samples answered after each phase, to see whether training changed anything."""
SMALL_DELTA, FEW_CHANGED = 0.5, 0.02
"""Below both, training had hardly any effect: Δ of held-out pairs in nats, and the share of changed answers."""
NUMBERS = dict[str, float | None]
"""Numbers by category."""
MEASURED: dict[str, type] = dict.fromkeys(("accuracy", "n", "standard_error"), NUMBERS)
"""Figures of an evaluation, and their types."""
SEARCH_FIGURES = (
    *("solved", "solved_by_gold", "unreachable_golds", "invalid_pairs", "chosen_is_gold", "chosen_injected"),
    *("answers", "self_evaluation"),
)
"""Figures of a search's result."""
ABILITY_FIGURES = ("select", "k", "greedy", "pass_at_1", "pass_at_k")
"""Figures of the policy's ability on the chosen prompts."""
SCORES = "scores.jsonl"


def evaluation_name(config: Config) -> str:
    """Returns the evaluation's name, which holds the split and the number of samples from the settings."""
    return f"evaluation_{config.evaluate.split}_{config.evaluate.limit or 'all'}"


def watching(config: Config) -> Config:
    """Returns the settings of the evaluation that monitors a training."""
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, split="validation", limit=WATCHED))


def what_training_changed(config: Config, phase: str, before: str) -> Figures:
    """Measures how far the training of a phase moved the policy, and flags a training with hardly any effect.

    `changed` is the share of validation answers that differ from those of the phase before, None without validation
    samples. `delta` is Δ (eq 11) on held-out pairs, in nats, None without any.
    """
    paths = [results_file(watching(config), name) for name in (phase, before)]
    changed = n = None
    if all(path.is_file() for path in paths):
        tables = [columns.read_table(path, EvaluationRow, ["id", "response"]) for path in paths]
        answers, earlier = ({row.id: row.response for row in table} for table in tables)
        n = len(answers)
        changed = sum(text != earlier.get(name) for name, text in answers.items()) / n
    held_out = (read_figures(config.run_dir, phase, "dpo") or {}).get("held_out") or {}
    delta = held_out.get("delta")
    known = [value < limit for value, limit in ((delta, SMALL_DELTA), (changed, FEW_CHANGED)) if value is not None]
    return {"changed": changed, "validation_samples": n, "delta": delta, "hardly_trained": bool(known) and all(known)}


def describe_training(phase: str, figures: Figures) -> str:
    """Describes the effect of a training in one line, with advice if it had hardly any."""
    parts = []
    if figures["changed"] is not None:
        parts.append(f"{100 * figures['changed']:.1f} % of {figures['validation_samples']} validation answers changed")
    if figures["delta"] is not None:
        parts.append(f"the margin on held-out pairs grew by {figures['delta']:.2f} nats")
    line = f"{phase}: {', '.join(parts) or 'no held-out data to measure the effect of training'}"
    if figures["hardly_trained"]:
        line += (
            "; training had almost no effect: raise preference.learning_rate or preference.epochs, or use more pairs"
        )
    return line


def results_file(config: Config, phase: str) -> Path:
    """Returns the path of a phase's graded responses."""
    return config.run_dir / phase / f"{evaluation_name(config)}.jsonl"


def read_results(config: Config, phase: str) -> dict[str, bool]:
    """Reads the mark (right or wrong) of each evaluated sample, by id."""
    rows = columns.read_table(results_file(config, phase), EvaluationRow, ["id", "correct"])
    return {row.id: row.correct for row in rows}


def compared(config: Config, phase: str, before: str) -> tuple[PairedDifference, list[str]]:
    """Compares a phase with an earlier one, sample by sample; also returns a line for each category that fell."""
    lower = comparison.fallen(by_category(config, phase, before))
    marks, before_marks = read_results(config, phase), read_results(config, before)
    return paired_difference(list(marks.values()), [before_marks[name] for name in marks]), lower


def by_category(config: Config, phase: str, before: str) -> dict[str, PairedDifference]:
    """Compares a phase with an earlier one in each category, sample by sample.

    Raises ValueError if the earlier phase has no mark for a sample.
    """
    marks = read_results(config, before)
    rows = columns.read_table(results_file(config, phase), EvaluationRow, ["id", "correct", "categories"])
    if missing := [row.id for row in rows if row.id not in marks]:
        path = results_file(config, before)
        raise ValueError(f"{path} has no row for sample {missing[0]}; delete it to compute it again")
    differences = {}
    for name in CATEGORIES[1:]:
        chosen = [row for row in rows if name in row.categories]
        differences[name] = paired_difference([row.correct for row in chosen], [marks[row.id] for row in chosen])
    return differences


def is_solved(nodes: Sequence[NodeRow], *, own: bool = True) -> bool:
    """Returns True if a tree, given as node rows, has a right response; with `own`, one without an injected step."""
    sampled = [True] * len(nodes)
    for n, node in enumerate(nodes[1:], 1):
        sampled[n] = sampled[node.parent] and node.sampled
    return any(node.terminal and node.outcome >= RIGHT and (sampled[n] or not own) for n, node in enumerate(nodes))
