"""The data of a run: training, validation and test part, made once, written down and described.

In: `--data`, or the generated corpus. Out: `data/{train,validation,test}.jsonl`, `data/card.json`, and
`data/skipped.txt` where rows were left out.
"""

import dataclasses
import json
from typing import NamedTuple

from itool_jax import replay
from itool_jax.config import Config
from itool_jax.data import generated, sources
from itool_jax.data.card import describe, lines
from itool_jax.data.records import Sample, refuse, sample_row, whole_file, write_jsonl
from itool_jax.metrics import say
from itool_jax.stages import folder
from itool_jax.text.chat import Encoded

HELD_OUT = {"test": 0.1, "validation": 0.05}
"""Shares of a data set without parts of its own that are kept for evaluation, each of what the one before left."""


class Part(NamedTuple):
    """Samples, and the same as token ids."""

    samples: list[Sample]
    encoded: list[Encoded]


def samples(config: Config, part: str) -> list[Sample]:
    """The train, validation or test part; made, described and written down when first asked for."""
    path = config.run_dir / "data" / f"{part}.jsonl"
    if not path.exists():
        skipped: list[str] | None = [] if config.skip_bad_rows else None
        parts, repeats = _make_parts(config, skipped)
        folder.write_json(config.run_dir / folder.SOURCES, folder.fingerprints(config))
        _describe(config, parts, repeats, skipped or [])
        for name, (found, _) in parts.items():
            write_jsonl(config.run_dir / "data" / f"{name}.jsonl", (sample_row(sample) for sample in found))
    return sources.load(path)


def warmup_and_replay(config: Config) -> tuple[list[Sample], list[Sample]]:
    """The training samples: those of the warm-up, and the replay buffer."""
    found = samples(config, "train")
    warmup, buffer = replay.split(found, 1 - config.replay.replay_fraction, "replay", config.seed)
    if not warmup or not buffer:
        raise ValueError(f"{len(found)} training samples are too few to split off a replay buffer; add data")
    return warmup, buffer


def _make_parts(config: Config, skipped: list[str] | None) -> tuple[dict[str, Part], int]:
    """The three parts, and how many repeats are not in them."""
    if config.data == "generated":
        sizes = config.generated
        counts: dict[generated.Part, int] = {"train": sizes.train, "validation": sizes.validation, "test": sizes.test}
        made = {part: generated.generate(part, count) for part, count in counts.items()}
        return {part: Part(found, folder.encode(config, found)) for part, found in made.items()}, 0
    given = sources.load(config.data, skipped)
    once = _without_repeats(given)
    encoded: dict[str, Encoded] = {}
    for sample in once:  # one that the model cannot take is met now, not hours later
        try:
            encoded[sample.id] = folder.encode(config, [sample])[0]
        except ValueError as error:
            refuse(str(error), skipped, error)
    # Always the same parts, whatever the seed, so that runs of several seeds can be compared.
    rest, test = replay.split([s for s in once if s.id in encoded], 1 - HELD_OUT["test"], "test", 0)
    train, validation = replay.split(rest, 1 - HELD_OUT["validation"], "validation", 0)
    parts = {"train": train, "validation": validation, "test": test}
    if empty := [part for part, chosen in parts.items() if not chosen]:
        raise ValueError(f"data {config.data} has {len(encoded)} samples: too few, its {empty[0]} part would be empty")
    return {part: Part(found, [encoded[s.id] for s in found]) for part, found in parts.items()}, len(given) - len(once)


def _without_repeats(given: list[Sample]) -> list[Sample]:
    """The samples, each once: one that stands twice could be trained on and tested too."""
    kept: dict[str, Sample] = {}
    for sample in given:
        content = sample_row(dataclasses.replace(sample, id="", conversation=""))
        kept.setdefault(json.dumps(content, sort_keys=True), sample)
    return list(kept.values())


def _describe(config: Config, parts: dict[str, Part], repeats: int, skipped: list[str]) -> None:
    """Keeps and prints the data card."""
    card = describe({name: part.samples for name, part in parts.items()}, {n: p.encoded for n, p in parts.items()})
    card |= {"data": config.data, "repeats_left_out": repeats, "rows_skipped": len(skipped)}
    if skipped:
        with whole_file(config.run_dir / "data" / "skipped.txt") as file:
            file.write("".join(f"{line}\n" for line in skipped).encode())
    folder.write_json(config.run_dir / "data" / "card.json", card)
    if config.data != "generated":
        for line in lines(card):
            say(line)
