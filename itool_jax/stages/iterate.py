"""The whole method: warm-up, then rounds of scoring, search and preference training, evaluated after each phase.

In: the settings. Out: a complete run directory with `summary.json`, and a printed table.
"""

from typing import Any

from itool_jax.config import Config
from itool_jax.evaluation import benchmark, results, summary
from itool_jax.planning import sizes
from itool_jax.stages import dpo, evaluate, report, score, search, warmup
from itool_jax.store import cache
from itool_jax.store.paths import BASE, WARMUP, iteration_of, phase_name
from itool_jax.store.run import Run
from itool_jax.store.splits import Samples, has_part, require_part, search_pool, split_replay
from itool_jax.store.weights import PhasePolicy
from itool_jax.system.files import write_json
from itool_jax.system.hosts import is_first
from itool_jax.system.messages import log


def run(run: Run) -> dict[str, Any]:
    """Runs all unfinished steps; returns the summary."""
    _check_batch_sizes(run.config)
    _check_held_out(run.config)
    _drop_summary_of_fewer_iterations(run.config)
    benchmark.check_leakage(run)
    run = sizes.lowered(run)
    iterate(run)
    return _finish(run)


def iterate(run: Run) -> PhasePolicy:
    """Runs the paper's loop (figure 2); returns the last policy. Equation numbers are the paper's, see docs/method.md.

    `phase.cached(step, *inputs)` computes a step from its inputs, or reads the result of an earlier command. Each
    `Step` names a function in its stage's file.
    """
    config, data = run.config, run.splits
    warmup_set, _ = split_replay(data.train, config)
    pool = search_pool(data.train, config)  # the replay buffer
    held_out = data.test if config.evaluate.split == "test" else data.validation

    policy = run.policy(BASE)
    _evaluate(run, policy, held_out)  # baseline for the warm-up

    policy = run.phase(WARMUP).cached(warmup.TRAIN, policy, warmup_set)  # π0: SFT from easy to hard, eq 1 to 3
    _evaluate(run, policy, held_out)
    if config.iterations:
        evaluate.watch(run, policy)  # baseline for the first iteration

    for phase in run.iterations():
        scores = phase.cached(score.SCORE, policy, pool)  # perplexity of the gold responses, eq 4
        hard = score.ranked_hardest(pool, scores)  # the share α with the highest perplexity, or the most mixed answers
        # Trees: PUCT, outcome, self-evaluation, backup; eq 5 to 9.
        forest = phase.cached(search.SEARCH, policy, hard, scores)
        # DPO on the best against the worst child of each node; the policy passed in is also π_ref; eq 10 and 11.
        policy = phase.cached(dpo.TRAIN, policy, forest.pairs, forest.answers)
        _evaluate(run, policy, held_out)
        _watch(run, policy)
    return policy


def _evaluate(run: Run, policy: PhasePolicy, held_out: Samples) -> None:
    """Evaluates on the held-out split if there is one, and a trained policy also on the benchmark if there is one."""
    if policy.phase not in summary.evaluated_phases(run.config):
        report.refresh(run.config)
        return
    if has_part(run.config, run.config.evaluate.split):
        run.phase(policy.phase).cached(evaluate.step(run.config), policy, held_out)
    if run.config.benchmark is not None and policy.phase != BASE:
        benchmark.evaluate(run, policy.phase)
    report.refresh(run.config)


def _watch(run: Run, policy: PhasePolicy) -> None:
    """Logs how far an iteration moved the policy, and points out if it hardly moved."""
    evaluate.watch(run, policy)
    before = phase_name(iteration_of(policy.phase) - 1)
    log(results.describe_training(policy.phase, results.what_training_changed(run.config, policy.phase, before)))


def _check_batch_sizes(config: Config) -> None:
    """Fails on inconsistent batch sizes before any work."""
    for training in (config.warmup, config.preference):
        training.n_micro()


def _check_held_out(config: Config) -> None:
    """Fails before any work if there is nothing to evaluate on; logs a note if there is only a benchmark."""
    if config.benchmark is None:
        require_part(config)
    elif not has_part(config, config.evaluate.split):
        split = config.evaluate.split
        log(f"samples.{split}_share=0 leaves no {split} part: evaluating on {config.benchmark} only")


def _drop_summary_of_fewer_iterations(config: Config) -> None:
    last, evaluation = summary.evaluated_phases(config)[-1], results.evaluation_name(config)
    if is_first() and cache.read_figures(config.run_dir, last, evaluation) is None:
        (config.run_dir / "summary.json").unlink(missing_ok=True)


def _finish(run: Run) -> dict[str, Any]:
    """Writes and prints the summary."""
    config, content = run.config, summary.summarize(run.config)
    if is_first():
        write_json(config.run_dir / "summary.json", content)
        page = report.refresh(config)
        summary.show(config, content, f"Open {page}" if page else "")
    return content
