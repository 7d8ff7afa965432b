"""Warm-up training (section 4.2): supervised fine-tuning on easy, then medium, then hard samples.

In: the warm-up samples, and validation samples if `warmup.epochs` is auto. Out: the weights of phase `warmup`.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import grain

from itool_jax.data.batches import packed_batches, sft_batches
from itool_jax.evaluation import benchmark
from itool_jax.evaluation.answers import answer_greedily
from itool_jax.store import checkpoint, splits, training
from itool_jax.store.cache import Figures, Step, Task
from itool_jax.store.paths import BASE, WARMUP, WEIGHTS
from itool_jax.store.run import Run
from itool_jax.store.splits import Samples
from itool_jax.store.weights import PhasePolicy, restore_trained, training_graph
from itool_jax.system import hosts
from itool_jax.system.files import read_json, write_json
from itool_jax.system.messages import log
from itool_jax.text.calls import looks_like_calls
from itool_jax.text.chat import Encoded
from itool_jax.training import loop as train
from itool_jax.training import replay
from itool_jax.training.settings import WarmupSettings

VALIDATION = 600
"""Number of validation samples that measure a round's gain; all of them if there are fewer."""
PLATEAU = 0.005
"""Minimum gain of a round, as a share of the validation samples, for another round to follow."""


def run(run: Run) -> PhasePolicy:
    """Trains from the base unless already done; returns the policy π0."""
    run.config.warmup.n_micro()
    benchmark.check_leakage(run)
    warmup_set, _ = splits.split_replay(run.splits.train, run.config)
    return run.phase(WARMUP).cached(TRAIN, run.policy(BASE), warmup_set)


def fit(task: Task, base: PhasePolicy, samples: Samples) -> Figures:
    """Trains the base on the samples, easiest third first, and saves the policy π0."""
    config, settings = task.config, task.config.warmup
    figures: Figures = {"samples": len(samples.samples)}
    if settings.epochs == 0:
        log("warm-up: warmup.epochs=0, so the policy is the base model")
        return figures | {"steps": 0, "weights": checkpoint.save(task.folder / WEIGHTS, base.trainable()[0])}
    _show_example(task, samples)
    # 1. Rank the samples by difficulty and split them into three parts (eq 1).
    encoded = {row.id: row for row in samples.encoded}
    features = [replay.sample_features(sample) for sample in samples.samples]
    thirds = replay.curriculum(features, settings.order, config.seed)
    parts = [[encoded[i] for i in part] for part in thirds if part]
    # 2. Train on one part after the other, carrying the weights over (eq 2 and 3).
    loss = train.sft_loss(training_graph(config, dropout=True))
    if settings.epochs == "auto":
        return figures | _fit_until_plateau(task, base, parts, loss)
    batches, spans = _curriculum(settings, parts, settings.epochs, config.seed)
    given, what = (loss, settings, base.trainable(), batches), f"warm-up, {settings.order}"
    digest = training.train_and_save(task, *given, seed=config.seed, what=what, spans=spans)
    return figures | {"steps": len(batches), "weights": digest}


def _show_example(task: Task, samples: Samples) -> None:
    """Logs the tool format and one complete example, the first with calls."""
    chat = task.run.base.chat
    number = next((i for i, s in enumerate(samples.samples) if looks_like_calls(s.target)), 0)
    sample, row = samples.samples[number], samples.encoded[number]
    how = "as the chat template writes it" if chat.native else "explained in the system message"
    log(f"tool format: {chat.form.name}, {how}, as in sample {sample.id}, which is trained on from ▶ on:")
    prompt, target = (chat.tokenizer.decode(ids) for ids in (row.prompt_ids, row.target_ids))
    log("\n".join(f"  {line}" for line in f"{prompt}▶{target}".splitlines()))
    if (n := sum(bool(s.before_calls) for s in samples.samples)) and not chat.form.keeps_text:
        log(f"{n} answers have text before their calls, which is dropped: {chat.form.name} has no place for it")


TRAIN = Step("warmup", [WEIGHTS], fit, lambda phase: phase.run.policy(phase.name))


def _curriculum(
    settings: WarmupSettings, parts: Sequence[list[Encoded]], epochs: int, seed: int
) -> tuple[grain.MapDataset, list[int]]:
    """Makes batches of one part after the other; returns them, and the lengths in steps of the learning-rate cycles."""
    batches = [_batches(settings, part, epochs, seed + n) for n, part in enumerate(parts)]
    steps = [len(part) for part in batches]
    return grain.MapDataset.concatenate(batches), steps if settings.schedule == "per_part" else [sum(steps)]


def _batches(settings: WarmupSettings, rows: list[Encoded], epochs: int, seed: int) -> grain.MapDataset:
    if settings.pack:
        return packed_batches(rows, settings.pack, settings.batch_size, epochs, seed)
    return sft_batches(rows, settings.batch_size, epochs, seed)


# Rounds until validation stops gaining ----------------------------------------------------------------------


class _Round(NamedTuple):
    """A finished round, as stored in its folder."""

    steps: int
    correct: int
    """Validation samples answered correctly after the round."""


def _fit_until_plateau(task: Task, base: PhasePolicy, parts: Sequence[list[Encoded]], loss: train.LossFn) -> Figures:
    """Trains on all parts once per round until a round gains too little; saves the weights of the best round.

    Finished rounds stay in the step's folder with their weights, so that a killed warm-up resumes after the last one.
    """
    validation = task.run.splits.validation.choose(lambda samples: samples[:VALIDATION])
    n = len(validation.samples)
    if not n:
        raise ValueError("warmup.epochs=auto needs validation samples, but there are none; set it to a number")
    if n < VALIDATION:
        log(f"warm-up: warmup.epochs=auto expects {VALIDATION} validation samples, got {n}: gains will be noisy")
    policies: list[PhasePolicy] = [base]
    correct: list[int] = []
    steps = 0
    while len(correct) < task.config.warmup.max_epochs and not reached_plateau(correct, n):
        number = len(correct) + 1
        policy, done = _round(task, policies[-1], parts, loss, validation, number, steps)
        gained = f" ({100 * (done.correct - correct[-1]) / n:+.1f})" if correct else ""
        log(f"warm-up, round {number}: {100 * done.correct / n:.1f} % on {n} validation samples{gained}")
        policies.append(policy)
        correct.append(done.correct)
        steps += done.steps
    kept = best_round(correct)
    digest = checkpoint.save(task.folder / WEIGHTS, restore_trained(task.config, policies[kept].phase))
    return {
        "steps": steps,
        "weights": digest,
        "validation_samples": n,
        "accuracy_by_round": [right / n for right in correct],
        "kept_round": kept,
    }


def reached_plateau(correct: Sequence[int], n: int) -> bool:
    """Returns true if the last round gained too few right answers out of `n`; `correct` holds the count per round."""
    return len(correct) > 1 and correct[-1] - correct[-2] < PLATEAU * n


def best_round(correct: Sequence[int]) -> int:
    """Returns the round to keep, counted from 1: the last if it gained anything, else the one before."""
    return len(correct) - (len(correct) > 1 and correct[-1] <= correct[-2])


def _round(
    task: Task,
    policy: PhasePolicy,
    parts: Sequence[list[Encoded]],
    loss: train.LossFn,
    validation: Samples,
    number: int,
    steps_before: int,
) -> tuple[PhasePolicy, _Round]:
    """Trains a policy for a round and counts its right answers, unless already done; returns the policy and round."""
    config, settings, what = task.config, task.config.warmup, f"warm-up, round {number}"
    folder = task.working / f"round_{number}"
    trained = task.run.policy(str(folder.relative_to(config.run_dir)))
    state = hosts.broadcast_from_primary(f"{folder} so far", lambda: _state(folder))
    if state["done"] is not None:
        return trained, _Round(*state["done"])
    # Each part of each round gets its own seed; otherwise all would see their samples in the same order.
    seed = config.seed + (number - 1) * replay.N_PARTS
    batches, spans = _curriculum(settings, parts, 1, seed)
    if not state["trained"]:
        given = loss, settings, policy.trainable(), batches
        training.train_and_save(
            task, *given, seed=seed, what=what, spans=spans, round_folder=folder, steps_before=steps_before
        )
    answers = answer_greedily(task, trained, validation, f"evaluate {what}", folder)
    done = _Round(len(batches), sum(answer.correct for answer in answers))
    if hosts.is_first():
        write_json(folder / DONE, {"done": done})
        shutil.rmtree(folder / "training", ignore_errors=True)
        shutil.rmtree(task.working / f"round_{number - 2}" / WEIGHTS, ignore_errors=True)  # can no longer be the best
    return trained, done


DONE = "round.json"


def _state(folder: Path) -> Figures:
    """Reads a round's progress: `trained` if its weights exist, and its result as `done`, or None."""
    done = read_json(folder / DONE)["done"] if (folder / DONE).exists() else None
    return {"trained": (folder / WEIGHTS).is_dir(), "done": done}
