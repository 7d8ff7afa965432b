"""Accuracy of a phase's policy on held-out samples: exact calls, greedy decoding.

In: a phase with weights and the test (or validation) part. Out: `evaluation_<split>_<limit>.jsonl`, a row a sample, and
the accuracies, overall and by category: thirds of the calls by difficulty, long answers, calls of tools that the
training samples offer and of others, irrelevance, multi-turn.
"""

import dataclasses
import functools
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from itool_jax import replay
from itool_jax.config import Config
from itool_jax.evaluation.statistics import PairedDifference, paired_difference, standard_error
from itool_jax.files import write_jsonl
from itool_jax.messages import say
from itool_jax.stages import benchmark, columns, comparison, leakage
from itool_jax.stages.answers import answer_greedily
from itool_jax.stages.cache import Figures, Step, Task, read_figures
from itool_jax.stages.paths import BASE, trained_phases
from itool_jax.stages.run import Run
from itool_jax.stages.splits import Samples, require_part
from itool_jax.stages.weights import PhasePolicy
from itool_jax.text.calls import looks_like_calls, read_calls
from itool_jax.text.sample import Sample

CATEGORIES = (
    *("overall", "easy", "medium", "hard", "irrelevance", "multi_turn"),
    *("long", "known_tools", "new_tools"),
)
LONG = 4
"""Calls of an answer that counts as long."""

Row = dict[str, Any]


def run(run: Run) -> dict[str, Figures]:
    """Evaluates every phase of the run that has weights, or some on a benchmark; returns the figures of each."""
    config = run.config
    if config.benchmark is not None:
        return benchmark.run(run)
    require_part(config)
    leakage.check(run)
    held_out = run.splits.test if config.evaluate.split == "test" else run.splits.validation
    phases = (BASE, *trained_phases(config.run_dir))
    return {phase: run.phase(phase).cached(step(config), run.policy(phase), held_out) for phase in phases}


def step(config: Config, *, aloud: bool = True) -> Step[Figures]:
    """The evaluation of a phase on the split and the number of samples that the settings name."""
    name = f"evaluation_{config.evaluate.split}_{config.evaluate.limit or 'all'}"
    compute = functools.partial(accuracy, aloud=aloud)
    this: Step[Figures] = Step(name, [f"{name}.jsonl"], compute, lambda phase: phase.figures(name))
    return this


WATCHED = 200
"""Validation samples that are answered after each phase, to see whether training changed anything."""
SMALL_DELTA, FEW_CHANGED = 0.5, 0.02
"""Below both of these hardly anything was trained: Δ of held-out pairs in nats, and the share of changed answers."""


def _watching(config: Config) -> Config:
    """The settings of the evaluation that watches a training."""
    return dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, split="validation", limit=WATCHED))


def watching_step(config: Config) -> Step[Figures]:
    """The evaluation that watches a training."""
    return step(_watching(config), aloud=False)


def watch(run: Run, policy: PhasePolicy) -> None:
    """Answers some validation samples with a phase's policy, for `what_training_changed`."""
    if run.splits.validation.samples:
        watching = run.with_settings(_watching(run.config))
        watching.phase(policy.phase).cached(watching_step(run.config), policy, run.splits.validation)


def what_training_changed(config: Config, phase: str, before: str) -> Figures:
    """How far the training of a phase moved the policy, and whether that is hardly at all.

    `changed` is the share of validation answers that differ from those of the phase before, None without validation
    samples; `delta` is Δ (eq 11) on the pairs that were not trained on, in nats, None without any.
    """
    paths = [results_file(_watching(config), name) for name in (phase, before)]
    changed = n = None
    if all(path.is_file() for path in paths):
        tables = [columns.read_table(path, ["id", "response"]) for path in paths]
        answers, earlier = ({row["id"]: row["response"] for row in table} for table in tables)
        n = len(answers)
        changed = sum(text != earlier.get(name) for name, text in answers.items()) / n
    held_out = (read_figures(config.run_dir, phase, "dpo") or {}).get("held_out") or {}
    delta = held_out.get("delta")
    known = [value < limit for value, limit in ((delta, SMALL_DELTA), (changed, FEW_CHANGED)) if value is not None]
    return {"changed": changed, "validation_samples": n, "delta": delta, "hardly_trained": bool(known) and all(known)}


def describe_training(phase: str, found: Figures) -> str:
    """One line of what a training changed, plain where that is hardly anything."""
    parts = []
    if found["changed"] is not None:
        parts.append(f"{100 * found['changed']:.1f} % of {found['validation_samples']} validation answers changed")
    if found["delta"] is not None:
        parts.append(f"the margin on held-out pairs grew by {found['delta']:.2f} nats")
    line = f"{phase}: {', '.join(parts) or 'nothing was held out to see what training changed'}"
    if found["hardly_trained"]:
        line += "; hardly anything was trained: raise preference.learning_rate or preference.epochs, or give more pairs"
    return line


def results_file(config: Config, phase: str) -> Path:
    """The file of a phase's graded responses."""
    return config.run_dir / phase / f"{step(config).name}.jsonl"


def accuracy(task: Task, policy: PhasePolicy, held_out: Samples, *, aloud: bool = True) -> Figures:
    """Answers the samples greedily and grades the answers; says how many are right, if `aloud`."""
    config = task.config
    categories = categorize(held_out.samples, tool_names(task.run.splits.train.samples))
    chosen = held_out.choose(lambda samples: samples[: config.evaluate.limit or None])
    answers = answer_greedily(task, policy, chosen, f"{'evaluate' if aloud else 'validate'} {task.phase}")
    rows = [
        {
            "id": sample.id,
            "categories": categories[sample.id],
            "correct": answer.correct,
            "finished": answer.finished,
            "response": answer.text,
            "target": sample.target,
        }
        for sample, answer in zip(chosen.samples, answers, strict=True)
    ]
    write_jsonl(results_file(config, task.phase), rows)
    figures = summarize(rows)
    known = {name: value for name, value in figures["accuracy"].items() if value is not None}
    if aloud:
        say(f"{task.phase}: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in known.items()))
    return figures


def read_results(config: Config, phase: str) -> dict[str, bool]:
    """Whether each evaluated sample is right, by id."""
    rows = columns.read_table(results_file(config, phase), ["id", "correct"])
    return {row["id"]: row["correct"] for row in rows}


def compared(config: Config, phase: str, before: str) -> tuple[PairedDifference, list[str]]:
    """One phase against another, sample by sample; and a line for each category that fell."""
    lower = comparison.fallen(by_category(config, phase, before))
    marks, before_marks = read_results(config, phase), read_results(config, before)
    return paired_difference(list(marks.values()), [before_marks[name] for name in marks]), lower


def by_category(config: Config, phase: str, before: str) -> dict[str, PairedDifference]:
    """Each category of one phase against another's, sample by sample."""
    marks = read_results(config, before)
    rows = columns.read_table(results_file(config, phase), ["id", "correct", "categories"])
    if missing := [row["id"] for row in rows if row["id"] not in marks]:
        path = results_file(config, before)
        raise ValueError(f"{path} holds no row of sample {missing[0]}; delete it to compute it again")
    found = {}
    for name in CATEGORIES[1:]:
        chosen = [row for row in rows if name in row["categories"]]
        found[name] = paired_difference([row["correct"] for row in chosen], [marks[row["id"]] for row in chosen])
    return found


def tool_names(samples: Sequence[Sample]) -> set[str]:
    """Names of the tools that the samples offer."""
    return {tool.get("function", tool)["name"] for sample in samples for tool in sample.tools}


def categorize(samples: Sequence[Sample], known: AbstractSet[str]) -> dict[str, list[str]]:
    """The categories each sample counts in, besides overall; `known` are the names of the training samples' tools.

    A sample whose gold is calls is one of known_tools if all of its functions are known, else of new_tools.
    """
    calls = [sample for sample in samples if looks_like_calls(sample.target)]
    thirds = replay.curriculum([replay.sample_features(sample) for sample in calls], "easy_to_hard", 0)
    found = {sample.id: ["irrelevance"] for sample in samples}
    for name, ids in zip(("easy", "medium", "hard"), thirds, strict=True):
        found |= {sample_id: [name] for sample_id in ids}
    for sample in samples:
        if any(message["role"] == "assistant" for message in sample.messages):
            found[sample.id].append("multi_turn")
        if called := read_calls(sample.target):
            found[sample.id].append("known_tools" if {call.name for call in called} <= known else "new_tools")
            if len(called) >= LONG:
                found[sample.id].append("long")
    return found


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """Accuracy, count and standard error by category; null where a category has no sample."""
    marks = {name: [r["correct"] for r in rows if name in ("overall", *r["categories"])] for name in CATEGORIES}
    return {
        "accuracy": {name: sum(found) / len(found) if found else None for name, found in marks.items()},
        "n": {name: len(found) for name, found in marks.items()},
        "standard_error": {name: standard_error(found) if found else None for name, found in marks.items()},
    }
