"""Perplexity of the gold responses under the current policy (eq 4), and which samples are hardest.

In a run: the replay buffer in, `scores.jsonl` of the iteration out, the hardest marked. With `--output`: any data file
in, {id, n_tokens, logprob_sum, perplexity} a sample out, under the model as it is.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from itool_jax import losses, replay
from itool_jax.config import Config
from itool_jax.data.records import write_jsonl
from itool_jax.data.sources import read_samples
from itool_jax.metrics import progress, say
from itool_jax.sampler import Policy, target_log_probs
from itool_jax.stages import folder, manifest, parts
from itool_jax.stages.spread import spread
from itool_jax.text.calls import looks_like_calls
from itool_jax.text.chat import Encoded, encode_sample

Row = dict[str, Any]


def run(config: Config) -> dict[str, Any]:
    """Scores a data file, or the replay buffer of a run unless that is done; returns the figures."""
    if config.output is not None:
        return _score_file(config, config.output)
    phase = folder.phase_name(config.iteration)
    after = [folder.policy_stage(folder.phase_name(config.iteration - 1))]
    return manifest.once(config, phase, "score", lambda: _score_buffer(config, phase), ["scores.jsonl"], after)


def _score_file(config: Config, output: Path) -> dict[str, Any]:
    samples = read_samples(folder.data_file(config), need_target=True)
    base = folder.load_base(config)
    encoded = [encode_sample(base.chat, sample) for sample in samples]
    folder.check_ids(encoded, base.config.vocab_size)
    folder.check_lengths(encoded, base.config.max_length)
    policy = folder.load_policy(config, "base")
    with manifest.resumed(config, output) as working:
        rows = spread(config, working, encoded, lambda rows, _: perplexities(policy, rows, config))
        write_jsonl(output, rows)
    say(f"wrote {len(rows)} scores to {output}")
    return {"samples": len(rows)}


def _score_buffer(config: Config, phase: str) -> dict[str, Any]:
    before = folder.phase_name(config.iteration - 1)
    folder.require_policy(config, before)
    # 1. Score the whole buffer again, with the policy as it is now.
    _, buffer = parts.warmup_and_replay(config)
    policy, encoded = folder.load_policy(config, before), folder.encode(config, buffer)
    working = manifest.working_folder(config, phase, "score")
    rows = spread(config, working, encoded, lambda rows, _: perplexities(policy, rows, config))
    # 2. Take the hardest share, calls and texts apart.
    is_call = {sample.id: looks_like_calls(sample.target) for sample in buffer}
    scored = [replay.ScoredSample(row["id"], row["perplexity"], is_call[row["id"]]) for row in rows]
    rank = {sample_id: n for n, sample_id in enumerate(replay.select_hardest(scored, config.replay))}
    write_jsonl(config.run_dir / phase / "scores.jsonl", (row | {"rank": rank.get(row["id"])} for row in rows))
    mean = sum(row["perplexity"] for row in rows) / len(rows)
    return {"samples": len(rows), "hardest": len(rank), "mean_perplexity": round(mean, 4)}


def perplexities(policy: Policy, encoded: Sequence[Encoded], config: Config) -> list[Row]:
    """One row a sample, in the order given."""
    with progress("perplexity", len(encoded)) as advance:
        return score_rows(policy, encoded, config, advance)


def score_rows(
    policy: Policy,
    encoded: Sequence[Encoded],
    config: Config,
    advance: Callable[..., None] = lambda *_: None,
) -> list[Row]:
    """The same without a word; `advance(n)` is told of every n samples."""
    rows = [(row.prompt_ids, row.target_ids) for row in encoded]
    by_index: dict[int, float] = {}
    for batch in target_log_probs(policy, rows, config.generate.tokens_per_batch):
        by_index |= batch
        advance(len(batch))
    sums = [by_index[i] for i in range(len(rows))]
    for row, total in zip(encoded, sums, strict=True):
        if not math.isfinite(total):
            raise ValueError(
                f"sample {row.id}: its log-probability is {total}; the weights are damaged, "
                "or training diverged: lower its learning_rate"
            )
    counts = [len(row.target_ids) for row in encoded]
    # JSON has no infinity.
    values = np.minimum(losses.perplexity(np.array(sums), np.array(counts)), np.finfo(np.float32).max).tolist()
    return [
        {"id": row.id, "n_tokens": n, "logprob_sum": total, "perplexity": value}
        for row, n, total, value in zip(encoded, counts, sums, values, strict=True)
    ]
