"""Preference training on the pairs of an iteration (section 4.3, eq 10 and 11).

In: `pairs.jsonl`, and the policy the iteration began with, which is also the reference. Out: the iteration's weights,
and `reference.jsonl`, the reference's log-probabilities.
"""

from collections.abc import Sequence
from typing import Any

import grain

from itool_jax import checkpoint, train
from itool_jax.data.batches import PairRow, pair_batches, sft_batches
from itool_jax.files import write_jsonl
from itool_jax.messages import say
from itool_jax.sampler import target_log_probs
from itool_jax.stages import search, training
from itool_jax.stages.cache import Figures, Phase, Step, Table, Task
from itool_jax.stages.paths import WEIGHTS, command, phase_name
from itool_jax.stages.run import Run
from itool_jax.stages.spread import by_row
from itool_jax.stages.weights import PhasePolicy, restore_trained, training_graph

Row = dict[str, Any]
Batches = grain.MapDataset


def run(run: Run) -> PhasePolicy:
    """Trains on an iteration's pairs unless that is done; returns the new policy."""
    run.config.preference.n_micro()
    phase, policy = run.phase(phase_name(run.config.iteration)), run.policy(phase_name(run.config.iteration - 1))
    return phase.cached(TRAIN, policy, phase.read(search.SEARCH).pairs)


def fit(task: Task, policy: PhasePolicy, pairs: Table) -> Figures:
    """Trains the policy to prefer the chosen steps, and keeps it as the iteration's."""
    config, rows = task.config, pairs.rows
    if not rows:
        say(f"{task.phase}: the search found no pair, the policy stays as it is")
        digest = checkpoint.save(task.folder / WEIGHTS, restore_trained(config, policy.phase))
        return {"pairs": 0, "steps": 0, "weights": digest}
    if config.preference.control == "sft_same_prompts":
        loss, batches = _gold_responses(task, rows)
    else:
        reference = Phase(task.run, task.phase).cached(REFERENCE, policy, pairs)
        loss, batches = _preferences(task, rows, _by_pair(rows, reference))
    control = config.preference.control
    what = f"{config.preference.loss if control == 'none' else control}, {task.phase}"
    seed = config.seed + task.iteration
    digest = training.train_and_save(task, loss, config.preference, policy.trainable(), batches, seed=seed, what=what)
    return {"pairs": len(rows), "steps": len(batches), "weights": digest}


TRAIN = Step("dpo", [WEIGHTS], fit, lambda phase: phase.run.policy(phase.name))


def _preferences(
    task: Task, rows: Sequence[Row], reference: dict[str, tuple[float, float]]
) -> tuple[train.LossFn, Batches]:
    """The preference loss, and batches of the pairs with the reference's log-probabilities."""
    settings = task.config.preference
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
    batches = pair_batches(pairs, settings.batch_size, settings.epochs, task.config.seed + task.iteration)
    return train.preference_loss(training_graph(task.config), settings.loss_settings), batches


def _gold_responses(task: Task, rows: Sequence[Row]) -> tuple[train.LossFn, Batches]:
    """The equal-compute control: SFT on the gold responses of the pairs' prompts, for as many steps."""
    settings = task.config.preference
    by_id = {sample.id: sample for sample in task.run.splits.train.samples}
    chosen = task.run.splits.train.choose(lambda _: [by_id[row["tree"]] for row in rows])
    seed = task.config.seed + task.iteration
    batches = sft_batches(chosen.encoded, settings.batch_size, settings.epochs, seed)
    return train.sft_loss(training_graph(task.config)), batches


# The reference ----------------------------------------------------------------------------------------------


def score_pairs(task: Task, policy: PhasePolicy, pairs: Table) -> Figures:
    """Log-probabilities of both steps of each pair under the policy as it stands (π_ref of eq 11)."""
    rows = pairs.rows
    steps = [(row["prompt_ids"], row[f"{side}_ids"]) for row in rows for side in ("chosen", "rejected")]
    tokens, running = task.config.generate.tokens_per_batch, policy.running()
    sums = task.map(steps, lambda steps: by_row(target_log_probs(running, steps, tokens)), "reference log-probs")
    scored = zip(rows, sums[::2], sums[1::2], strict=True)
    write_jsonl(task.folder / FILE, ({"id": row["id"], "chosen": c, "rejected": r} for row, c, r in scored))
    return {"pairs": len(rows)}


FILE = "reference.jsonl"


def _read(phase: Phase) -> Table:
    origin = (phase.name, "reference")
    return Table(phase.folder / FILE, ["id", "chosen", "rejected"], origin, command((phase.name, "dpo")))


REFERENCE = Step("reference", [FILE], score_pairs, _read)


def _by_pair(pairs: Sequence[Row], reference: Table) -> dict[str, tuple[float, float]]:
    """(chosen, rejected) log-probabilities by pair id; ValueError names a pair without."""
    by_id = {row["id"]: (row["chosen"], row["rejected"]) for row in reference.rows}
    if missing := [row["id"] for row in pairs if row["id"] not in by_id]:
        raise ValueError(f"{reference.path} holds no row of pair {missing[0]}; delete it to compute it again")
    return by_id
