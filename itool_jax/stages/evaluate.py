"""Accuracy of a phase's policy on held-out samples: exact calls, greedy decoding.

In: a phase with weights and the test (or validation) split. Out: `evaluation_<split>_<limit>.jsonl`, one row per
sample, and the accuracies, overall and by category: thirds of the calls by difficulty, long answers, calls of tools
seen and not seen in training, irrelevance, multi-turn.
"""

import functools
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from itool_jax.config import Config
from itool_jax.evaluation import benchmark, results
from itool_jax.evaluation.answers import answer_greedily
from itool_jax.evaluation.statistics import standard_error
from itool_jax.store.cache import Figures, Step, Task
from itool_jax.store.paths import BASE, trained_phases
from itool_jax.store.run import Run
from itool_jax.store.splits import Samples, require_part
from itool_jax.store.tables import EvaluationRow
from itool_jax.store.weights import PhasePolicy
from itool_jax.system.files import write_jsonl
from itool_jax.system.messages import log
from itool_jax.text.calls import looks_like_calls, read_calls
from itool_jax.text.sample import Sample
from itool_jax.training import replay

LONG = 4
"""Minimum number of calls in an answer that counts as long."""


def run(run: Run) -> dict[str, Figures]:
    """Evaluates the base and every trained phase, or the chosen phases on a benchmark; returns the figures of each."""
    config = run.config
    if config.benchmark is not None:
        return benchmark.run(run)
    require_part(config)
    benchmark.check_leakage(run)
    held_out = run.splits.test if config.evaluate.split == "test" else run.splits.validation
    phases = (BASE, *trained_phases(config.run_dir))
    return {phase: run.phase(phase).cached(step(config), run.policy(phase), held_out) for phase in phases}


def step(config: Config, *, aloud: bool = True) -> Step[Figures]:
    """Returns the step that evaluates a phase on the split and number of samples in the settings."""
    name = results.evaluation_name(config)
    compute = functools.partial(accuracy, aloud=aloud)
    this: Step[Figures] = Step(name, [f"{name}.jsonl"], compute, lambda phase: phase.figures(name))
    return this


def watching_step(config: Config) -> Step[Figures]:
    """Returns the evaluation step used to monitor training."""
    return step(results.watching(config), aloud=False)


def watch(run: Run, policy: PhasePolicy) -> None:
    """Generates a phase's answers to some validation samples, for `results.what_training_changed`."""
    if run.splits.validation.samples:
        watching = run.with_settings(results.watching(run.config))
        watching.phase(policy.phase).cached(watching_step(run.config), policy, run.splits.validation)


def accuracy(task: Task, policy: PhasePolicy, held_out: Samples, *, aloud: bool = True) -> Figures:
    """Generates greedy answers to the samples and grades them; logs the accuracies if `aloud`."""
    config = task.config
    categories = categorize(held_out.samples, tool_names(task.run.splits.train.samples))
    chosen = held_out.choose(lambda samples: samples[: config.evaluate.limit or None])
    answers = answer_greedily(task, policy, chosen, f"{'evaluate' if aloud else 'validate'} {task.phase}")
    rows = [
        EvaluationRow(sample.id, categories[sample.id], answer.correct, answer.finished, answer.text, sample.target)
        for sample, answer in zip(chosen.samples, answers, strict=True)
    ]
    write_jsonl(results.results_file(config, task.phase), (row._asdict() for row in rows))
    figures = summarize(rows)
    known = {name: value for name, value in figures["accuracy"].items() if value is not None}
    if aloud:
        log(f"{task.phase}: " + ", ".join(f"{name} {100 * value:.1f} %" for name, value in known.items()))
    return figures


def tool_names(samples: Sequence[Sample]) -> set[str]:
    """Collects the names of the tools that the samples offer."""
    return {tool.get("function", tool)["name"] for sample in samples for tool in sample.tools}


def categorize(samples: Sequence[Sample], known: AbstractSet[str]) -> dict[str, list[str]]:
    """Returns each sample's categories besides overall, by id; `known` holds the tool names of the training samples.

    A sample whose gold is calls counts in known_tools if all functions it calls are known, else in new_tools.
    """
    calls = [sample for sample in samples if looks_like_calls(sample.target)]
    thirds = replay.curriculum([replay.sample_features(sample) for sample in calls], "easy_to_hard", 0)
    categories = {sample.id: ["irrelevance"] for sample in samples}
    for name, ids in zip(("easy", "medium", "hard"), thirds, strict=True):
        categories |= {sample_id: [name] for sample_id in ids}
    for sample in samples:
        if any(message["role"] == "assistant" for message in sample.messages):
            categories[sample.id].append("multi_turn")
        if called := read_calls(sample.target):
            categories[sample.id].append("known_tools" if {call.name for call in called} <= known else "new_tools")
            if len(called) >= LONG:
                categories[sample.id].append("long")
    return categories


def summarize(rows: Sequence[EvaluationRow]) -> Figures:
    """Computes accuracy, count and standard error by category; accuracy and error are None without samples."""
    marks_of = {name: [r.correct for r in rows if name in ("overall", *r.categories)] for name in results.CATEGORIES}
    return {
        "accuracy": {name: sum(marks) / len(marks) if marks else None for name, marks in marks_of.items()},
        "n": {name: len(marks) for name, marks in marks_of.items()},
        "standard_error": {name: standard_error(marks) if marks else None for name, marks in marks_of.items()},
    }
