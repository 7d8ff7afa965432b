"""Scores samples by perplexity (eq 4) and by the policy's own answers, and chooses which to search.

Perplexity is that of the gold response under the current policy. In a run: the replay buffer in, the iteration's
`scores.jsonl` out, with the chosen samples ranked. With `--output`: any data file in, one {id, n_tokens, logprob_sum,
perplexity} per sample out, under the untrained model.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from itool_jax.config import Config
from itool_jax.data.sources import read_samples
from itool_jax.evaluation import draws, results
from itool_jax.inference.sampler import Policy, target_log_probs
from itool_jax.mcts.policy import Searched
from itool_jax.model.log_probs import perplexity
from itool_jax.store import cache, outputs, splits
from itool_jax.store.across_hosts import Advance, by_row, map_across_hosts, planned
from itool_jax.store.cache import Figures, Step, Table, Task
from itool_jax.store.columns import row_of
from itool_jax.store.encoding import check_ids, check_lengths
from itool_jax.store.paths import BASE, command, phase_name
from itool_jax.store.run import Run
from itool_jax.store.splits import Samples
from itool_jax.store.tables import PerplexityRow, ScoreRow
from itool_jax.store.weights import PhasePolicy
from itool_jax.system.files import write_jsonl
from itool_jax.system.messages import log
from itool_jax.text.calls import looks_like_calls
from itool_jax.text.chat import Encoded, encode_sample
from itool_jax.text.padding import target_width
from itool_jax.training import replay


def run(run: Run) -> Table[ScoreRow] | None:
    """Scores a data file, or a run's replay buffer unless already done; returns the scores of the buffer."""
    config = run.config
    if config.output is not None:
        _score_file(run, config.output)
        return None
    policy = run.policy(phase_name(config.iteration - 1))
    return run.phase(phase_name(config.iteration)).cached(SCORE, policy, splits.search_pool(run.splits.train, config))


def _score_file(run: Run, output: Path) -> None:
    config, base = run.config, run.base
    samples = read_samples(splits.data_file(config), need_target=True, targets=config.samples.targets)
    encoded = [encode_sample(base.chat, sample) for sample in samples]
    check_ids(encoded, base.config.vocab_size)
    check_lengths(encoded, base.config.max_length)
    policy = run.policy(BASE).running()
    with outputs.resumed(config, output) as working:
        rows = map_across_hosts(config, working, encoded, lambda rows: _work(policy, rows, config), "perplexity")
        write_jsonl(output, rows)
    log(f"wrote {len(rows)} scores to {output}")


def score_buffer(task: Task, policy: PhasePolicy, pool: Samples) -> Figures:
    """Scores the whole pool with the current policy, and ranks the samples to search."""
    config, settings = task.config, task.config.replay
    # 1. Perplexities of the gold responses (eq 4).
    running, encoded = policy.running(), pool.encoded
    journaled = task.map(encoded, lambda rows: _work(running, rows, config), "perplexity")
    rows = [row_of(PerplexityRow, row) for row in journaled]
    # 2. Select the hardest share, or the share with the most mixed answers, separately for calls and texts.
    is_call = {sample.id: looks_like_calls(sample.target) for sample in pool.samples}
    scored = {row.id: replay.ScoredSample(row.id, row.perplexity, is_call[row.id]) for row in rows}
    mixed = settings.select == "mixed"
    right = _sampled_right(task, policy, pool) if mixed else {}
    if mixed:
        scored = {name: score._replace(right=right[name] / settings.samples) for name, score in scored.items()}
        chosen = replay.select_mixed(list(scored.values()), settings)
    else:
        chosen = replay.select_hardest(list(scored.values()), settings)
    rank = {sample_id: n for n, sample_id in enumerate(chosen)}
    searched = pool.choose(lambda samples: [sample for sample in samples if sample.id in rank])
    # 3. Count the policy's right answers to them: sampled, the ceiling of what a search can find; and greedy.
    if not mixed:
        right = _sampled_right(task, policy, searched)
    greedy = _right(task, policy, searched, n=1, temperature=0.0, part="greedy")
    scores = [ScoreRow(*row, rank.get(row.id), right.get(row.id), greedy.get(row.id)) for row in rows]
    write_jsonl(task.folder / results.SCORES, (row._asdict() for row in scores))
    mean = sum(row.perplexity for row in rows) / len(rows)
    figures = {"samples": len(rows), "hardest": len(rank), "mean_perplexity": round(mean, 4)}
    return figures | _ability(task, scored, rank, right, greedy)


def _sampled_right(task: Task, policy: PhasePolicy, pool: Samples) -> dict[str, int]:
    """Counts the right ones among the K answers that the policy samples for each prompt."""
    settings = task.config.replay
    return _right(task, policy, pool, n=settings.samples, temperature=settings.temperature, part="answers")


def _right(task: Task, policy: PhasePolicy, pool: Samples, *, n: int, temperature: float, part: str) -> dict[str, int]:
    """Counts the right ones among the `n` answers that the policy samples for each prompt, by sample id."""
    run, running = task.run, policy.running()
    items = [Searched(*row) for row in zip(pool.samples, pool.encoded, strict=True)]
    settings = draws.settings(task.config, n, temperature)
    table = run.step_table(task.config.search.granularity)

    def work(items: Sequence[Searched]) -> Iterator[Advance]:
        key = draws.random_key(task.config, task.iteration, part)  # created here, on this process's own mesh
        rows = draws.count_right(running, run.base, table, items, settings, key)
        return by_row(rows, draws.planned(items, settings))

    counts = task.map(
        items, work, "greedy answers" if temperature == 0 else f"{n} answers each", folder=task.working / part
    )
    return {item.sample.id: count for item, count in zip(items, counts, strict=True)}


def _ability(
    task: Task,
    scored: dict[str, replay.ScoredSample],
    rank: dict[str, int],
    right: dict[str, int],
    greedy: dict[str, int],
) -> Figures:
    """Computes and logs the policy's accuracy on the prompts chosen for the search."""
    settings, n = task.config.replay, len(rank)
    figures = {"select": settings.select, "k": settings.samples, "greedy": None, "pass_at_1": None, "pass_at_k": None}
    if settings.select == "mixed":
        asked = sum(
            settings.n_searched(size)
            for is_call in (True, False)
            if (size := sum(score.is_call == is_call for score in scored.values()))
        )
        figures["mixed_in_pool"] = sum(0 < score.right < 1 for score in scored.values())
        if n < asked:
            remedy = "" if n else "; warm up longer, raise replay.samples, or set replay.select=perplexity"
            log(f"{task.phase}: wanted {asked} prompts with both right and wrong answers, found {n}{remedy}")
    if n:
        figures["greedy"] = round(sum(greedy.values()) / n, 4)
        figures["pass_at_1"] = round(sum(right[name] for name in rank) / n / settings.samples, 4)
        figures["pass_at_k"] = round(sum(right[name] > 0 for name in rank) / n, 4)
        log(
            f"{task.phase}: {n} prompts to search: greedy accuracy {100 * figures['greedy']:.1f} %, "
            f"pass@1 {100 * figures['pass_at_1']:.1f} %, pass@{settings.samples} {100 * figures['pass_at_k']:.1f} %"
        )
    return figures


def _read(phase: cache.Phase) -> Table[ScoreRow]:
    origin = (phase.name, "score")
    return Table(phase.folder / results.SCORES, ScoreRow, ["id", "rank", "right"], origin, command(origin))


SCORE = Step("score", [results.SCORES], score_buffer, _read)


def ranked_hardest(pool: Samples, scores: Table[ScoreRow]) -> Samples:
    """Selects the ranked samples of the pool, in rank order."""

    def ranked(samples: Sequence[Any]) -> list[Any]:
        ranks = {row.id: row.rank for row in scores.rows if row.rank is not None}
        return sorted((s for s in samples if s.id in ranks), key=lambda s: ranks[s.id])

    return pool.choose(ranked, scores.origin, scores.require)


def _work(policy: Policy, encoded: Sequence[Encoded], config: Config) -> Iterator[Advance]:
    rows = ([(i, row._asdict()) for i, row in batch] for batch in perplexities(policy, encoded, config))
    widths = [target_width(len(row.prompt_ids), len(row.target_ids)) for row in encoded]
    return by_row(rows, planned(widths, config.generate.tokens_per_batch))


def perplexities(
    policy: Policy, encoded: Sequence[Encoded], config: Config
) -> Iterator[list[tuple[int, PerplexityRow]]]:
    """Yields the finished rows of each batch, each with its index into `encoded`.

    Raises:
        ValueError: a log-probability is not finite; names the sample.
    """
    targets = [(row.prompt_ids, row.target_ids) for row in encoded]
    for batch in target_log_probs(policy, targets, config.generate.tokens_per_batch):
        places, log_probs = zip(*batch, strict=True)
        yield list(zip(places, _rows([encoded[i] for i in places], log_probs), strict=True))


def _rows(encoded: Sequence[Encoded], log_probs: Sequence[float]) -> list[PerplexityRow]:
    for row, log_prob in zip(encoded, log_probs, strict=True):
        if not math.isfinite(log_prob):
            raise ValueError(
                f"sample {row.id}: its log-probability is {log_prob}; the weights are damaged, "
                "or training diverged: lower its learning_rate"
            )
    counts = [len(row.target_ids) for row in encoded]
    # JSON cannot represent infinity.
    values = np.minimum(perplexity(np.array(log_probs), np.array(counts)), np.finfo(np.float32).max).tolist()
    return [
        PerplexityRow(row.id, n, log_prob, value)
        for row, n, log_prob, value in zip(encoded, counts, log_probs, values, strict=True)
    ]
