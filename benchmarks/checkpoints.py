"""Measures what checkpoints cost a training: `python -m benchmarks.checkpoints --json=OUT`.

Trains the same steps without checkpoints and with them, as often as a run saves them by default, in turn and several
times. Prints the size of a checkpoint, the time to save one, their number, and their share of the time.
"""

import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro

from itool_jax.config import Config
from itool_jax.data.batches import sft_batches
from itool_jax.model import hf
from itool_jax.model.linear import LoraSettings
from itool_jax.model.lora import initialize_adapters
from itool_jax.model.transformer import abstract
from itool_jax.store import training
from itool_jax.store.base import model_folder
from itool_jax.store.checkpoint import Training
from itool_jax.system.metrics import Metrics
from itool_jax.text.chat import Encoded
from itool_jax.training import loop as train
from itool_jax.training.settings import WarmupSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Trainings to measure."""

    model: str = "embedded"
    """Folder of the model, or `embedded` for the embedded one."""
    steps: int = 200
    """Steps per training, of 8 rows of 256 tokens."""
    rounds: int = 3
    """Number of trainings of each kind."""
    ranks: tuple[int, ...] = (16, 0)
    """Values of lora.rank to measure; 0 trains all weights."""
    json: Path | None = None
    """File to write the rows to."""


class Counted(Training):
    """Checkpoints that record their number, their size and the time they block."""

    saves, blocking, size = 0, 0.0, 0

    def save(self, step: int, state: Any, position: Any) -> None:
        """Saves as usual, and adds the time the training waited."""
        start = time.monotonic()
        super().save(step, state, position)
        self.blocking += time.monotonic() - start
        self.saves += 1

    def finish(self) -> None:
        """Finishes as usual, and records the size of the last checkpoint."""
        start = time.monotonic()
        super().finish()
        self.blocking += time.monotonic() - start
        last = max((path for path in self.folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name))
        self.size = sum(os.path.getsize(path) for path in last.rglob("*") if path.is_file())


def main(s: Settings) -> list[dict[str, Any]]:
    """Trains, prints the table and writes the JSON."""
    where = model_folder(Config(stage="warmup", model=s.model))
    rows = []
    print("kind          MB   saves    ms/save  share by waiting  share by the clock")
    for rank in s.ranks:
        row = {"rank": rank, "steps": s.steps, "device": jax.devices()[0].device_kind, **measure(where, rank, s)}
        rows.append(row)
        name = f"LoRA, {rank}" if rank else "all weights"
        print(
            f"{name:<12} {row['bytes'] / 1e6:5.1f} {row['saves']:6} {1e3 * row['seconds_a_save']:9.0f} "
            f"{100 * row['share_waiting']:15.2f} % {100 * row['share_clock']:17.2f} %",
            flush=True,
        )
    if s.json is not None:
        s.json.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def measure(where: Path, rank: int, s: Settings) -> dict[str, Any]:
    """Measures one kind of training, without and with checkpoints."""
    random = np.random.default_rng(0)
    config, base = hf.load(where)
    encoded = [Encoded(str(i), *random.integers(0, config.vocab_size, (2, 120)).tolist()) for i in range(8 * s.steps)]
    batches, lora = sft_batches(encoded, 8, 1, 0), LoraSettings(rank=rank)
    loss = train.sft_loss(abstract(config, lora)[0])
    settings = WarmupSettings(batch_size=8)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    kept: Counted | None = None
    for number in range(1 + 2 * s.rounds):  # the first one compiles
        with tempfile.TemporaryDirectory() as scratch:
            kept = Counted(Path(scratch) / "kept") if number % 2 == 0 else None
            adapters = initialize_adapters(config, lora, jax.random.key(0)) if rank else hf.load(where)[1]
            start = time.monotonic()
            path = Metrics(Path(scratch) / "metrics.jsonl", "warmup")
            frozen = base if rank else {}
            given = loss, settings, (adapters, frozen), batches
            training.train_resumably(*given, seed=0, what="train", metrics=path, checkpoints=kept)
            if number:
                seconds[kept is not None].append(time.monotonic() - start)
    assert kept is not None
    without, with_them = (statistics.median(seconds[key]) for key in (False, True))
    return {
        "bytes": kept.size,
        "saves": kept.saves,
        "seconds_a_save": kept.blocking / kept.saves,
        "share_waiting": kept.blocking / with_them,
        "share_clock": with_them / without - 1,
        "seconds": seconds[True],
        "seconds_without": seconds[False],
    }


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
