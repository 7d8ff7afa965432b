"""Perplexity of the gold responses under the current policy (eq 4), and which samples are hardest.

In a run: the replay buffer in, `scores.jsonl` of the iteration out, the hardest marked. With `--output`: any data file
in, {id, n_tokens, logprob_sum, perplexity} a sample out, under the model as it is.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from itool_jax import losses, replay
from itool_jax.config import Config
from itool_jax.data.sources import read_samples
from itool_jax.files import write_jsonl
from itool_jax.messages import say
from itool_jax.sampler import Policy, target_log_probs
from itool_jax.stages import cache, outputs, splits
from itool_jax.stages.cache import Figures, Step, Table, Task
from itool_jax.stages.encoding import check_ids, check_lengths
from itool_jax.stages.paths import BASE, command, phase_name
from itool_jax.stages.run import Run
from itool_jax.stages.splits import Samples
from itool_jax.stages.spread import by_row, map_across_hosts
from itool_jax.stages.weights import PhasePolicy
from itool_jax.text.calls import looks_like_calls
from itool_jax.text.chat import Encoded, encode_sample

Row = dict[str, Any]


def run(run: Run) -> Table | None:
    """Scores a data file, or the replay buffer of a run unless that is done; returns the scores of the buffer."""
    config = run.config
    if config.output is not None:
        _score_file(run, config.output)
        return None
    _, buffer = splits.split_replay(run.splits.train, config)
    policy = run.policy(phase_name(config.iteration - 1))
    return run.phase(phase_name(config.iteration)).cached(SCORE, policy, buffer)


def _score_file(run: Run, output: Path) -> None:
    config, base = run.config, run.base
    samples = read_samples(splits.data_file(config), need_target=True)
    encoded = [encode_sample(base.chat, sample) for sample in samples]
    check_ids(encoded, base.config.vocab_size)
    check_lengths(encoded, base.config.max_length)
    policy = run.policy(BASE).running()
    with outputs.resumed(config, output) as working:
        rows = map_across_hosts(
            config, working, encoded, lambda rows: by_row(perplexities(policy, rows, config)), "perplexity"
        )
        write_jsonl(output, rows)
    say(f"wrote {len(rows)} scores to {output}")


def score_buffer(task: Task, policy: PhasePolicy, buffer: Samples) -> Figures:
    """Scores the whole buffer with the policy as it is now, and ranks the hardest."""
    config = task.config
    # 1. Perplexities of the gold responses (eq 4).
    running, encoded = policy.running(), buffer.encoded
    rows = task.map(encoded, lambda rows: by_row(perplexities(running, rows, config)), "perplexity")
    # 2. Take the hardest share, calls and texts apart.
    is_call = {sample.id: looks_like_calls(sample.target) for sample in buffer.samples}
    scored = [replay.ScoredSample(row["id"], row["perplexity"], is_call[row["id"]]) for row in rows]
    rank = {sample_id: n for n, sample_id in enumerate(replay.select_hardest(scored, config.replay))}
    write_jsonl(task.folder / SCORES, (row | {"rank": rank.get(row["id"])} for row in rows))
    mean = sum(row["perplexity"] for row in rows) / len(rows)
    return {"samples": len(rows), "hardest": len(rank), "mean_perplexity": round(mean, 4)}


SCORES = "scores.jsonl"


def _read(phase: cache.Phase) -> Table:
    origin = (phase.name, "score")
    return Table(phase.folder / SCORES, ["id", "rank"], origin, command(origin))


SCORE = Step("score", [SCORES], score_buffer, _read)


def ranked_hardest(buffer: Samples, scores: Table) -> Samples:
    """The samples of the buffer that were ranked, hardest first."""

    def ranked(samples: Sequence[Any]) -> list[Any]:
        ranks = {row["id"]: row["rank"] for row in scores.rows if row["rank"] is not None}
        return sorted((s for s in samples if s.id in ranks), key=lambda s: ranks[s.id])

    return buffer.choose(ranked, scores.origin, scores.require)


def perplexities(policy: Policy, encoded: Sequence[Encoded], config: Config) -> Iterator[list[tuple[int, Row]]]:
    """Yields the finished rows of each batch, (place, {id, n_tokens, logprob_sum, perplexity}).

    Raises:
        ValueError: a log-probability is not finite; names the sample.
    """
    targets = [(row.prompt_ids, row.target_ids) for row in encoded]
    for batch in target_log_probs(policy, targets, config.generate.tokens_per_batch):
        places, log_probs = zip(*batch, strict=True)
        yield list(zip(places, _rows([encoded[i] for i in places], log_probs), strict=True))


def _rows(encoded: Sequence[Encoded], log_probs: Sequence[float]) -> list[Row]:
    for row, log_prob in zip(encoded, log_probs, strict=True):
        if not math.isfinite(log_prob):
            raise ValueError(
                f"sample {row.id}: its log-probability is {log_prob}; the weights are damaged, "
                "or training diverged: lower its learning_rate"
            )
    counts = [len(row.target_ids) for row in encoded]
    # JSON has no infinity.
    values = np.minimum(losses.perplexity(np.array(log_probs), np.array(counts)), np.finfo(np.float32).max).tolist()
    return [
        {"id": row.id, "n_tokens": n, "logprob_sum": log_prob, "perplexity": value}
        for row, n, log_prob, value in zip(encoded, counts, log_probs, values, strict=True)
    ]
