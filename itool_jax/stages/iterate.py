"""The whole method: warm-up, then rounds of scoring, search and preference training, evaluated after each phase.

In: the settings. Out: a run directory with everything, `summary.json`, and a table.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.table import Table

from itool_jax.config import Config
from itool_jax.evaluation.statistics import describe
from itool_jax.files import read_json, write_json
from itool_jax.hosts import is_first
from itool_jax.messages import console_out, say
from itool_jax.stages import benchmark, cache, columns, dpo, evaluate, leakage, report, score, search, warmup
from itool_jax.stages.paths import BASE, WARMUP, done_file, iteration_of, phase_name
from itool_jax.stages.run import Run
from itool_jax.stages.splits import Samples, has_part, require_part, search_pool, split_replay
from itool_jax.stages.weights import PhasePolicy

SEARCH_KEYS = ("prompts", "trees", "pairs", "generated_tokens", "seconds")
MEASURED = ("accuracy", "n", "standard_error")
COLUMNS = 6
"""Categories that the summary's table shows beside each other; more go into a second one below."""


def run(run: Run) -> dict[str, Any]:
    """Runs what is not done yet; returns the summary."""
    _check_batch_sizes(run.config)
    _check_held_out(run.config)
    _drop_summary_of_fewer_iterations(run.config)
    leakage.check(run)
    iterate(run)
    return _finish(run)


def iterate(run: Run) -> PhasePolicy:
    """The paper's loop (figure 2); returns the last policy. Equations are the paper's, see docs/method.md.

    `phase.cached(step, *inputs)` computes a step from its inputs, or reads what an earlier command computed; each step
    is the function of the same stage's file that its `Step` names.
    """
    config, data = run.config, run.splits
    warmup_set, _ = split_replay(data.train, config)
    pool = search_pool(data.train, config)  # the replay buffer
    held_out = data.test if config.evaluate.split == "test" else data.validation

    policy = run.policy(BASE)
    _evaluate(run, policy, held_out)  # what the warm-up is compared with

    policy = run.phase(WARMUP).cached(warmup.TRAIN, policy, warmup_set)  # π0: SFT from easy to hard, eq 1 to 3
    _evaluate(run, policy, held_out)
    if config.iterations:
        evaluate.watch(run, policy)  # what the first iteration is compared with

    for phase in run.iterations():
        scores = phase.cached(score.SCORE, policy, pool)  # perplexity of the gold responses, eq 4
        hard = score.ranked_hardest(pool, scores)  # the share α of highest perplexity, or of the most mixed answers
        # Trees: PUCT, outcome, self-evaluation, backup; eq 5 to 9.
        forest = phase.cached(search.SEARCH, policy, hard, scores)
        # The best against the worst child of each node, by DPO; the policy passed in is π_ref too; eq 10 and 11.
        policy = phase.cached(dpo.TRAIN, policy, forest.pairs, forest.answers)
        _evaluate(run, policy, held_out)
        _watch(run, policy)
    return policy


def _evaluate(run: Run, policy: PhasePolicy, held_out: Samples) -> None:
    """On the held-out split if there is one, and for a trained policy on the benchmark if there is one."""
    if policy.phase not in evaluated_phases(run.config):
        report.refresh(run.config)
        return
    if _has_held_out(run.config):
        run.phase(policy.phase).cached(evaluate.step(run.config), policy, held_out)
    if run.config.benchmark is not None and policy.phase != BASE:
        benchmark.evaluate(run, policy.phase)
    report.refresh(run.config)


def _watch(run: Run, policy: PhasePolicy) -> None:
    """Says how far an iteration moved the policy, and where that is hardly at all."""
    evaluate.watch(run, policy)
    before = phase_name(iteration_of(policy.phase) - 1)
    say(evaluate.describe_training(policy.phase, evaluate.what_training_changed(run.config, policy.phase, before)))


def _check_batch_sizes(config: Config) -> None:
    """Fails on inconsistent batch sizes before any work."""
    for training in (config.warmup, config.preference):
        training.n_micro()


def _check_held_out(config: Config) -> None:
    """Fails before any work if there is nothing to evaluate on; says so if there is a benchmark only."""
    if config.benchmark is None:
        require_part(config)
    elif not _has_held_out(config):
        split = config.evaluate.split
        say(f"samples.{split}_share=0 leaves no {split} part: evaluating on {config.benchmark} only")


def _has_held_out(config: Config) -> bool:
    return has_part(config, config.evaluate.split)


def _drop_summary_of_fewer_iterations(config: Config) -> None:
    last, evaluation = evaluated_phases(config)[-1], evaluate.step(config).name
    if is_first() and cache.read_figures(config.run_dir, last, evaluation) is None:
        (config.run_dir / "summary.json").unlink(missing_ok=True)


# Summary ----------------------------------------------------------------------------------------------------


def _finish(run: Run) -> dict[str, Any]:
    """Writes and prints the summary."""
    config, summary = run.config, summarize(run)
    if is_first():
        write_json(config.run_dir / "summary.json", summary)
        page = report.refresh(config)
        show(config, summary, f", {page.name} to look at it" if page else "")
    return summary


def evaluated_phases(config: Config) -> list[str]:
    """The phases that are evaluated, in order."""
    iterations = range(1, config.iterations + 1)
    chosen = iterations if config.evaluate.intermediate else iterations[-1:]
    return [BASE, WARMUP, *map(phase_name, chosen)]


def summarize(run: Run) -> dict[str, Any]:
    """Summarizes the run from its stage results."""
    config = run.config
    evaluation = evaluate.step(config).name
    rows, kinds = [], ("warmup", "score", "search", "dpo", evaluation, evaluate.watching_step(config).name)
    names = [BASE, *(phase_name(i) for i in range(config.iterations + 1))]
    for name in evaluated_phases(config):
        before, names = names[: names.index(name) + 1], names[names.index(name) + 1 :]
        figures = _figures(config, name, evaluation) if _has_held_out(config) else {key: {} for key in MEASURED}
        seconds = sum(_seconds(config, phase, kind) for phase in before for kind in kinds)
        measured = {key: figures[key] for key in MEASURED}
        rows.append({"name": name, **measured, "seconds": round(seconds, 2)})
    searches, trainings = [], []
    for i in range(1, config.iterations + 1):
        name, before = phase_name(i), phase_name(i - 1)
        figures, scored = _figures(config, name, "search"), _figures(config, name, "score")
        found = {key: figures.get(key) for key in (*SEARCH_KEYS, *search.FOUND)}
        searches.append({"iteration": i, **found, **{key: scored.get(key) for key in score.ABILITY}})
        trained = {key: _figures(config, name, "dpo").get(key) for key in ("pairs", "steps", "held_out")}
        trainings.append({"iteration": i, **trained, **evaluate.what_training_changed(config, name, before)})
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
    """The benchmark's figures by phase; null without one."""
    if config.benchmark is None:
        return None
    trained = evaluated_phases(config)[1:]
    read = {phase: read_json(benchmark.results_folder(config, phase) / "summary.json") for phase in trained}
    return {"name": config.benchmark, "phases": read}


def _figures(config: Config, phase: str, stage: str) -> dict[str, Any]:
    figures = cache.read_figures(config.run_dir, phase, stage)
    assert figures is not None  # every stage was just run
    wanted = {"search": SEARCH_KEYS, "score": (), "dpo": ("pairs", "steps")}.get(stage, MEASURED)
    if bad := columns.fault(figures, wanted):
        path = done_file(config.run_dir, phase, stage)
        raise ValueError(f"{path} is damaged ({bad}); delete it to run the stage again")
    return figures


def _seconds(config: Config, phase: str, stage: str) -> float:
    figures = cache.read_figures(config.run_dir, phase, stage)
    return figures["seconds"] if figures else 0.0


def _comparisons(config: Config) -> list[dict[str, Any]]:
    """Each phase against the one before, and the last against the warm-up, paired over samples.

    Without a held-out part it is the benchmark's categories that are compared.
    """
    names = evaluated_phases(config)
    pairs = list(zip(names[1:], names, strict=False))
    if names[-2] not in (BASE, WARMUP):
        pairs.append((names[-1], WARMUP))
    rows = []
    held_out = _has_held_out(config)
    for phase, before in pairs if held_out else pairs[1:]:  # a benchmark is not asked of the base model
        result, lower = evaluate.compared(config, phase, before) if held_out else (None, [])
        if config.benchmark is not None and before != BASE:
            lower += [f"{config.benchmark} {line}" for line in benchmark.regressions(config, before, phase)]
        figures, text = (result._asdict(), describe(result)) if result else ({}, f"on {config.benchmark} only")
        row = {"phase": phase, "against": before, **figures, "text": text, "regressions": lower}
        rows.append(row)
    return rows


def _table(phases: Sequence[Mapping[str, Any]], names: Sequence[str], title: str | None) -> Table:
    """The accuracies of some categories, a row a phase; a table with a title also has the time."""
    # No frame and narrow gaps: the widest row just fits 80 columns.
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
    """Prints the summary as a table, and what is significant of it."""
    names = [name for name, count in summary["phases"][0]["n"].items() if count]
    title = f"exact answers, % ± standard error, {summary['split']} part" if names else "time of each phase"
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
        console_out.print(evaluate.describe_training(f"training {row['iteration']}", row), soft_wrap=True)
    for row in summary["comparisons"]:
        console_out.print(f"{row['phase']} against {row['against']}: {row['text']}", soft_wrap=True)
        for line in row["regressions"]:
            console_out.print(f"  lower: {line}", soft_wrap=True)
    say(f"everything is in {config.run_dir}{more}")
