"""Warm-up training (section 4.2): supervised fine-tuning on easy, then medium, then hard samples.

In: the training part of the data. Out: the weights of phase `warmup`.
"""

from typing import Any

import grain

from itool_jax import replay, train
from itool_jax.config import Config
from itool_jax.data.batches import packed_batches, sft_batches
from itool_jax.stages import folder, manifest, parts
from itool_jax.text.chat import Encoded
from itool_jax.train import WarmupSettings

PHASE = "warmup"


def run(config: Config) -> dict[str, Any]:
    """Trains from the base unless that is done; returns the stage's figures."""
    config.warmup.n_micro()
    parts.look_for_benchmarks(config)
    return manifest.once(config, PHASE, "warmup", lambda: _warm_up(config), [folder.WEIGHTS])


def _warm_up(config: Config) -> dict[str, Any]:
    settings = config.warmup
    # 1. Rank the warm-up samples by difficulty and cut them into three parts (eq 1).
    samples, _ = parts.warmup_and_replay(config)
    encoded = {row.id: row for row in folder.encode(config, samples)}
    thirds = replay.curriculum([replay.sample_features(s) for s in samples], settings.order, config.seed)
    # 2. Train on one after the other, carrying the weights (eq 2 and 3); one schedule spans all.
    data = [_batches(settings, [encoded[i] for i in part], config.seed + n) for n, part in enumerate(thirds) if part]
    batches, loss = grain.MapDataset.concatenate(data), train.sft_loss(folder.training_graph(config))
    what, working = f"warm-up, {settings.order}", manifest.working_folder(config, PHASE, "warmup")
    # 3. Keep the policy π0.
    digest = folder.train(config, PHASE, working, loss, settings, "base", batches, seed=config.seed, what=what)
    return {"samples": len(samples), "steps": len(batches), "weights": digest}


def _batches(settings: WarmupSettings, rows: list[Encoded], seed: int) -> grain.MapDataset:
    if settings.pack:
        return packed_batches(rows, settings.pack, settings.batch_size, settings.epochs, seed)
    return sft_batches(rows, settings.batch_size, settings.epochs, seed)
