"""The data of a run: training, validation and test part, made once, written down and described.

In: `--data`, or the generated corpus. Out: `data/{train,validation,test}.jsonl`, `data/card.json`, and
`data/skipped.txt` where rows were left out. Nothing is ever truncated: a sample that is too long for the model ends
the run, or is left out like a wrong row.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

from itool_jax import hosts, replay
from itool_jax.config import Config
from itool_jax.data import generated, sources
from itool_jax.data.card import describe, lines, overlap, overlap_lines
from itool_jax.data.rows import refuse
from itool_jax.files import whole_file, write_json, write_jsonl
from itool_jax.messages import say
from itool_jax.stages import benchmark, folder
from itool_jax.text.chat import Encoded, encode_sample
from itool_jax.text.sample import Sample, sample_row
from itool_jax.untrusted import read_json

CARD = "data/card.json"
PARTS = ("train", "validation", "test")
HELD_OUT = {"test": 0.1, "validation": 0.05}
"""Shares of a data set without parts of its own that are kept for evaluation, each of what the one before left."""


class Part(NamedTuple):
    """Samples, and the same as token ids."""

    samples: list[Sample]
    encoded: list[Encoded]


def samples(config: Config, part: str) -> list[Sample]:
    """The train, validation or test part; made, described and written down when first asked for."""
    make(config)
    return sources.load(_path(config, part))


def _path(config: Config, part: str) -> Path:
    return config.run_dir / "data" / f"{part}.jsonl"


def make(config: Config) -> None:
    """Makes and describes all parts where one is missing."""
    hosts.by_first("data", functools.partial(_make, config))


def _make(config: Config) -> None:
    if _made(config):
        return
    skipped: list[str] | None = [] if config.skip_bad_rows else None
    parts, left_out = divide(config, skipped)
    write_json(config.run_dir / folder.SOURCES, folder.fingerprints(config))
    _describe(config, parts, left_out, skipped or [])
    for name in PARTS:
        write_jsonl(_path(config, name), (sample_row(sample) for sample in parts[name].samples))


def _made(config: Config) -> bool:
    """Whether all parts and the card are there."""
    return all(path.exists() for path in (config.run_dir / CARD, *(_path(config, part) for part in PARTS)))


def look_for_benchmarks(config: Config) -> None:
    """Adds to the data card what of the benchmarks stands among the training samples, where it does not say yet."""
    hosts.by_first("benchmarks", functools.partial(_look_for_benchmarks, config))


def _look_for_benchmarks(config: Config) -> None:
    names = [*config.evaluate.benchmarks, *benchmark.question_files(config)]
    known = _read_card(config)["benchmarks"] if names and _made(config) else ()
    new = {name: sources.load_questions(Path(name)) for name in names if name not in known}
    make(config)
    if new:
        found = overlap(samples(config, "train"), new)
        card = _read_card(config)
        write_json(config.run_dir / CARD, card | {"benchmarks": card["benchmarks"] | found})
        for line in overlap_lines(found):
            say(line)


def warmup_and_replay(config: Config) -> tuple[list[Sample], list[Sample]]:
    """The training samples: those of the warm-up, and the replay buffer."""
    return split_off_replay(config, samples(config, "train"))


def split_off_replay(config: Config, found: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Training samples as those of the warm-up and the replay buffer."""
    warmup, buffer = replay.split(found, 1 - config.replay.replay_fraction, "replay", config.seed)
    if not warmup or not buffer:
        raise ValueError(f"{len(found)} training samples are too few to split off a replay buffer; add data")
    return warmup, buffer


def divide(config: Config, skipped: list[str] | None) -> tuple[dict[str, Part], dict[str, int]]:
    """The three parts, nothing written; how many repeats and too long samples are not in them, as the card names these.

    Reasons why rows were left out go to `skipped`; where there is no such list, the first is an error.
    """
    if config.data == "generated":
        sizes = config.generated
        counts: dict[generated.Part, int] = {"train": sizes.train, "validation": sizes.validation, "test": sizes.test}
        made = {part: generated.generate(part, count) for part, count in counts.items()}
        parts = {part: Part(found, folder.encode(config, found)) for part, found in made.items()}
        return parts, {"repeats_left_out": 0, "too_long": 0}
    given = sources.load(config.data, skipped)
    once = _without_repeats(given)
    encoded, too_long = _encode(config, once, skipped)
    # Always the same parts, whatever the seed, so that runs of several seeds can be compared.
    rest, test = replay.split([s for s in once if s.id in encoded], 1 - HELD_OUT["test"], "test", 0)
    train, validation = replay.split(rest, 1 - HELD_OUT["validation"], "validation", 0)
    parts = {"train": train, "validation": validation, "test": test}
    if empty := [part for part, chosen in parts.items() if not chosen]:
        left_out = f" ({len(skipped)} left out, the first: {skipped[0]})" if skipped else ""
        raise ValueError(
            f"data {config.data} has {len(encoded)} samples{left_out}: too few, its {empty[0]} part would be empty"
        )
    counts_left_out = {"repeats_left_out": len(given) - len(once), "too_long": too_long}
    return {part: Part(found, [encoded[s.id] for s in found]) for part, found in parts.items()}, counts_left_out


def _encode(config: Config, found: list[Sample], skipped: list[str] | None) -> tuple[dict[str, Encoded], int]:
    """The token ids of samples by id, and how many are too long: what the model cannot take is met now, not later."""
    base = folder.load_base(config)
    encoded: dict[str, Encoded] = {}
    too_long = 0
    for sample in found:
        try:
            row = encode_sample(base.chat, sample)
            too_long += len(row.prompt_ids) + len(row.target_ids) > base.config.max_length
            folder.check_lengths([row], base.config.max_length)
            encoded[sample.id] = row
        except ValueError as error:
            refuse(f"{sample.place}: {error}", skipped, error)
    return encoded, too_long


def _without_repeats(given: list[Sample]) -> list[Sample]:
    """The samples, each once: one that stands twice could be trained on and tested too."""
    kept: dict[str, Sample] = {}
    for sample in given:
        content = sample_row(dataclasses.replace(sample, id="", conversation=""))
        kept.setdefault(json.dumps(content, sort_keys=True), sample)
    return list(kept.values())


def _describe(config: Config, parts: dict[str, Part], left_out: dict[str, int], skipped: list[str]) -> None:
    """Keeps the data card, and prints it unless the data is the generated corpus, which is always the same."""
    card = describe({name: part.samples for name, part in parts.items()}, {n: p.encoded for n, p in parts.items()})
    card |= {"data": config.data, **left_out, "rows_skipped": len(skipped) - left_out["too_long"]}
    if skipped:
        with whole_file(config.run_dir / "data" / "skipped.txt") as file:
            file.write("".join(f"{line}\n" for line in skipped).encode())
    write_json(config.run_dir / CARD, card)
    if config.data != "generated":
        for line in lines(card):
            say(line)


def _read_card(config: Config) -> dict[str, Any]:
    """The data card as it is, with its benchmarks, none where there is no card yet."""
    path = config.run_dir / CARD
    try:
        card = {"benchmarks": {}} | (read_json(path) if path.exists() else {})
        return card | {"benchmarks": dict(card["benchmarks"])}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to have the benchmarks looked for again") from error
