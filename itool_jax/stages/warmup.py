"""Warm-up training (section 4.2): supervised fine-tuning on easy, then medium, then hard samples.

In: the warm-up samples. Out: the weights of phase `warmup`.
"""

import grain

from itool_jax import replay, train
from itool_jax.data.batches import packed_batches, sft_batches
from itool_jax.stages import leakage, splits, training
from itool_jax.stages.cache import Figures, Step, Task
from itool_jax.stages.paths import BASE, WARMUP, WEIGHTS
from itool_jax.stages.run import Run
from itool_jax.stages.splits import Samples
from itool_jax.stages.weights import PhasePolicy, training_graph
from itool_jax.text.chat import Encoded
from itool_jax.train import WarmupSettings


def run(run: Run) -> PhasePolicy:
    """Trains from the base unless that is done; returns the policy π0."""
    run.config.warmup.n_micro()
    leakage.check(run)
    warmup_set, _ = splits.split_replay(run.splits.train, run.config)
    return run.phase(WARMUP).cached(TRAIN, run.policy(BASE), warmup_set)


def fit(task: Task, base: PhasePolicy, samples: Samples) -> Figures:
    """Trains the base on the samples, the easy third first, and keeps the policy π0."""
    config, settings = task.config, task.config.warmup
    # 1. Rank the samples by difficulty and cut them into three parts (eq 1).
    encoded = {row.id: row for row in samples.encoded}
    features = [replay.sample_features(sample) for sample in samples.samples]
    thirds = replay.curriculum(features, settings.order, config.seed)
    # 2. Train on one after the other, carrying the weights (eq 2 and 3); one schedule spans all.
    parts = [_batches(settings, [encoded[i] for i in part], config.seed + n) for n, part in enumerate(thirds) if part]
    batches, loss = grain.MapDataset.concatenate(parts), train.sft_loss(training_graph(config, dropout=True))
    what = f"warm-up, {settings.order}"
    digest = training.train_and_save(task, loss, settings, base.trainable(), batches, seed=config.seed, what=what)
    return {"samples": len(samples.samples), "steps": len(batches), "weights": digest}


TRAIN = Step("warmup", [WEIGHTS], fit, lambda phase: phase.run.policy(phase.name))


def _batches(settings: WarmupSettings, rows: list[Encoded], seed: int) -> grain.MapDataset:
    if settings.pack:
        return packed_batches(rows, settings.pack, settings.batch_size, settings.epochs, seed)
    return sft_batches(rows, settings.batch_size, settings.epochs, seed)
