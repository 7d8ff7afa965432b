"""Preference training on the pairs of an iteration (section 4.3, eq 10 and 11).

In: `pairs.jsonl`, and the policy the iteration began with, which is also the reference. Out: the iteration's weights,
and `reference.jsonl`, the reference's log-probabilities.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain

from itool_jax import checkpoint, train
from itool_jax.config import Config
from itool_jax.data.batches import PairRow, pair_batches, sft_batches
from itool_jax.data.records import write_jsonl
from itool_jax.journal import Keep
from itool_jax.metrics import progress, say
from itool_jax.sampler import target_log_probs
from itool_jax.stages import folder, manifest, parts
from itool_jax.stages.spread import spread

Row = dict[str, Any]
Batches = grain.MapDataset
PAIR_KEYS = ("id", "prompt_ids", "chosen_ids", "rejected_ids", "visits_chosen", "visits_rejected", "tree")


def run(config: Config) -> dict[str, Any]:
    """Trains on an iteration's pairs unless that is done; returns the stage's figures."""
    config.preference.n_micro()
    phase = folder.phase_name(config.iteration)
    return manifest.once(config, phase, "dpo", lambda: _train(config, phase), [folder.WEIGHTS], [(phase, "search")])


def _train(config: Config, phase: str) -> dict[str, Any]:
    before = folder.phase_name(config.iteration - 1)
    folder.require_policy(config, before)
    rows = folder.need(config, phase, "pairs.jsonl", "search", PAIR_KEYS)
    if not rows:
        say(f"{phase}: the search found no pair, the policy stays as it is")
        digest = checkpoint.save(folder.weights_folder(config, phase), folder.load_trained(config, before))
        return {"pairs": 0, "steps": 0, "weights": digest}
    loss, batches = _control(config, rows) if config.preference.control else _prefer(config, phase, before, rows)
    what = f"{'control' if config.preference.control else config.preference.loss}, {phase}"
    seed, working = config.seed + config.iteration, manifest.working_folder(config, phase, "dpo")
    digest = folder.train(config, phase, working, loss, config.preference, before, batches, seed=seed, what=what)
    return {"pairs": len(rows), "steps": len(batches), "weights": digest}


def _prefer(config: Config, phase: str, before: str, rows: list[Row]) -> tuple[train.LossFn, Batches]:
    """The preference loss over the pairs; the reference is the policy as it stands, computed once."""
    settings = config.preference
    reference = _reference(config, phase, before, rows)
    pairs = [
        PairRow(
            row["prompt_ids"],
            row["chosen_ids"],
            row["rejected_ids"],
            reference[row["id"]],
            (row["visits_chosen"], row["visits_rejected"]),
        )
        for row in rows
    ]
    graph = folder.training_graph(config)
    batches = pair_batches(pairs, settings.batch_size, settings.epochs, config.seed + config.iteration)
    return train.preference_loss(graph, settings.loss_settings), batches


def _control(config: Config, rows: list[Row]) -> tuple[train.LossFn, Batches]:
    """Equal compute without preferences: the gold responses of the pairs' samples, for as many steps."""
    settings = config.preference
    by_id = {sample.id: sample for sample in parts.samples(config, "train")}
    encoded = folder.encode(config, [by_id[row["tree"]] for row in rows])
    graph = folder.training_graph(config)
    batches = sft_batches(encoded, settings.batch_size, settings.epochs, config.seed + config.iteration)
    return train.sft_loss(graph), batches


def _reference(config: Config, phase: str, before: str, rows: list[Row]) -> dict[str, tuple[float, float]]:
    path = config.run_dir / phase / "reference.jsonl"
    work = functools.partial(_score_pairs, config, phase, path, before, rows)
    manifest.once(config, phase, "reference", work, [path.name], [(phase, "search")])
    table = folder.read_table(path, ["id", "chosen", "rejected"])
    found = {row["id"]: (row["chosen"], row["rejected"]) for row in table}
    if missing := [row["id"] for row in rows if row["id"] not in found]:
        raise ValueError(f"{path} holds no row of pair {missing[0]}; delete it to compute it again")
    return found


def _score_pairs(config: Config, phase: str, path: Path, before: str, rows: list[Row]) -> dict[str, Any]:
    policy = folder.load_policy(config, before)
    steps = [(row["prompt_ids"], row[f"{side}_ids"]) for row in rows for side in ("chosen", "rejected")]

    def answer(steps: Sequence[Any], _: Keep) -> list[float]:
        sums: dict[int, float] = {}
        with progress("reference log-probs", len(steps)) as advance:
            for batch in target_log_probs(policy, steps, config.generate.tokens_per_batch):
                sums |= batch
                advance(len(batch))
        return [sums[i] for i in range(len(steps))]

    sums = spread(config, manifest.working_folder(config, phase, "reference"), steps, answer)
    found = zip(rows, sums[::2], sums[1::2], strict=True)
    write_jsonl(path, ({"id": row["id"], "chosen": c, "rejected": r} for row, c, r in found))
    return {"pairs": len(rows)}
