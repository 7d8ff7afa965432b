"""Warm-up training (section 4.2): supervised fine-tuning on easy, then medium, then hard samples.

In: the training part of the data. Out: the adapters of phase `warmup`.
"""

import itertools
from typing import Any

from itool_jax import checkpoint, replay, train
from itool_jax.config import Config
from itool_jax.data.batches import sft_batches
from itool_jax.metrics import Metrics
from itool_jax.model.transformer import abstract
from itool_jax.stages import folder

PHASE = "warmup"


def run(config: Config) -> dict[str, Any]:
    """Trains from the base unless that is done; returns the stage's figures."""
    return folder.once(config, PHASE, "warmup", lambda: _warm_up(config), ["adapters"])


def _warm_up(config: Config) -> dict[str, Any]:
    settings, base = config.warmup, folder.load_base(config)
    # 1. Rank the warm-up samples by difficulty and cut them into three parts (eq 1).
    samples, _ = folder.warmup_and_replay(config)
    encoded = {row.id: row for row in folder.encode(config, samples)}
    parts = replay.curriculum([replay.sample_features(s) for s in samples], settings.order, config.seed)
    # 2. Train on one after the other, carrying the weights (eq 2 and 3); one schedule spans all.
    data = [
        sft_batches([encoded[i] for i in part], settings.batch_size, settings.epochs, config.seed + n)
        for n, part in enumerate(parts)
        if part
    ]
    graph = abstract(base.config, config.lora.config)[0]
    adapters = train.fit(
        train.sft_loss(graph),
        settings,
        folder.load_adapters(config, "base"),
        base.params,
        itertools.chain.from_iterable(data),
        n_steps := sum(len(part) for part in data),
        what=f"warm-up, {settings.order}",
        metrics=Metrics(config.run_dir / "metrics.jsonl", PHASE),
    )
    # 3. Keep the policy π0.
    digest = checkpoint.save(folder.adapters_folder(config, PHASE), adapters)
    return {"samples": len(samples), "steps": n_steps, "weights": digest}
