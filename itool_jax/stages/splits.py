"""The data of a run: train, validation and test split, made once, written down and described.

In: `--data`, or the generated corpus. Out: `data/{train,validation,test}.jsonl`, `data/card.json`, and
`data/skipped.txt` if rows were left out. Nothing is ever truncated: a sample that is too long for the model ends the
run, or is left out like a wrong row.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from itool_jax import hosts, replay
from itool_jax.config import Config
from itool_jax.data import generated, sources
from itool_jax.data.card import describe, lines
from itool_jax.data.rows import refuse
from itool_jax.files import whole_file, write_json, write_jsonl
from itool_jax.messages import say
from itool_jax.stages.base import load_base
from itool_jax.stages.encoding import check_lengths, encode
from itool_jax.stages.paths import StepId
from itool_jax.stages.sources import SOURCES, fingerprints
from itool_jax.text.chat import Encoded, encode_sample
from itool_jax.text.sample import Sample, sample_row
from itool_jax.untrusted import read_json

CARD = "data/card.json"
NAMES = ("train", "validation", "test")
HELD_OUT = {"test": 0.1, "validation": 0.05}
"""Shares of a data set without splits of its own that are kept for evaluation, each of what the one before left."""


class Samples:
    """Samples and their token ids, each read or computed when first asked for and then kept.

    `origin` is the step that chose the samples, if any; samples chosen from these share their token ids.
    """

    def __init__(
        self,
        load: Callable[[], list[Sample]],
        encode: Callable[[list[Sample]], list[Encoded]],
        known: dict[str, Encoded] | None = None,
        origin: StepId | None = None,
        require: Callable[[], None] = lambda: None,
    ):
        self._load, self._encode, self._known = load, encode, {} if known is None else known
        self.origin, self.require = origin, require

    @functools.cached_property
    def samples(self) -> list[Sample]:
        """The samples."""
        return self._load()

    @functools.cached_property
    def encoded(self) -> list[Encoded]:
        """Their token ids, in the same order; ValueError names a sample that does not fit the model."""
        new = [sample for sample in self.samples if sample.id not in self._known]
        self._known.update((row.id, row) for row in self._encode(new))
        return [self._known[sample.id] for sample in self.samples]

    def choose(
        self,
        choose: Callable[[list[Sample]], list[Sample]],
        origin: StepId | None = None,
        require: Callable[[], None] = lambda: None,
    ) -> "Samples":
        """Some of the samples, by a function that is called when they are needed."""
        return Samples(lambda: choose(self.samples), self._encode, self._known, origin, require)


class Splits(NamedTuple):
    """The three splits of a run's data."""

    train: Samples
    validation: Samples
    test: Samples


class Part(NamedTuple):
    """The samples of one split, and the same as token ids."""

    samples: list[Sample]
    encoded: list[Encoded]


def load_splits(config: Config) -> Splits:
    """The splits of a run, made, described and written down if one is missing."""
    made: dict[str, Part] = {}
    hosts.broadcast_from_primary("data", lambda: made.update(_make(config)))

    def encode_all(samples: list[Sample]) -> list[Encoded]:
        return encode(load_base(config), samples)

    def split(name: str) -> Samples:
        known: dict[str, Encoded] = {}

        def load() -> list[Sample]:
            samples, part = sources.load(_path(config, name)), made.pop(name, None)
            if part is not None and samples == part.samples:  # made by this process, just now
                known.update((row.id, row) for row in part.encoded)
            return samples

        return Samples(load, encode_all, known)

    return Splits(*map(split, NAMES))


def split_replay(train: Samples, config: Config) -> tuple[Samples, Samples]:
    """The training samples of the warm-up, and those of the replay buffer (section 4.2)."""

    @functools.cache
    def both() -> tuple[list[Sample], list[Sample]]:
        return divide_replay(config, train.samples)

    return train.choose(lambda _: both()[0]), train.choose(lambda _: both()[1])


def search_pool(train: Samples, config: Config) -> Samples:
    """The training samples that an iteration chooses its prompts from: the replay buffer, or all."""
    return train if config.replay.pool == "all" else split_replay(train, config)[1]


def divide_replay(config: Config, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Training samples as those of the warm-up and of the replay buffer; ValueError if either would be empty."""
    warmup, buffer = replay.split(samples, 1 - config.replay.replay_fraction, "replay", config.seed)
    if not warmup or not buffer:
        raise ValueError(f"{len(samples)} training samples are too few to split off a replay buffer; add data")
    return warmup, buffer


def data_file(config: Config) -> str:
    """The data file of a stage that reads one of its own; ValueError if none is given."""
    if config.data == "generated":
        raise ValueError(f"--stage={config.stage} needs --data=FILE, a file of samples or of raw prompts")
    return config.data


def _path(config: Config, name: str) -> Path:
    return config.run_dir / "data" / f"{name}.jsonl"


def are_made(config: Config) -> bool:
    """Whether all splits and their card are there."""
    return all(path.exists() for path in (config.run_dir / CARD, *(_path(config, name) for name in NAMES)))


def _make(config: Config) -> dict[str, Part]:
    """Makes, describes and writes the splits unless they are there; returns those it made."""
    if are_made(config):
        return {}
    skipped: list[str] | None = [] if config.skip_bad_rows else None
    parts, left_out = divide(config, skipped)
    write_json(config.run_dir / SOURCES, fingerprints(config))
    _describe(config, parts, left_out, skipped or [])
    for name in NAMES:
        write_jsonl(_path(config, name), (sample_row(sample) for sample in parts[name].samples))
    return parts


def divide(config: Config, skipped: list[str] | None) -> tuple[dict[str, Part], dict[str, int]]:
    """The three splits, nothing written; and how many repeats and too long samples are not in them, for the card.

    Reasons why rows were left out go to `skipped`; if there is no such list, the first is an error.
    """
    if config.data == "generated":
        sizes = config.generated
        counts: dict[generated.Part, int] = {"train": sizes.train, "validation": sizes.validation, "test": sizes.test}
        made = {name: generated.generate(name, count) for name, count in counts.items()}
        base = load_base(config)
        parts = {name: Part(samples, encode(base, samples)) for name, samples in made.items()}
        return parts, {"repeats_left_out": 0, "too_long": 0}
    given = sources.load(config.data, skipped)
    once = _without_repeats(given)
    encoded, too_long = _encode_fitting(config, once, skipped)
    # Always the same splits, whatever the seed, so that runs of several seeds can be compared.
    rest, test = replay.split([s for s in once if s.id in encoded], 1 - HELD_OUT["test"], "test", 0)
    train, validation = replay.split(rest, 1 - HELD_OUT["validation"], "validation", 0)
    chosen = {"train": train, "validation": validation, "test": test}
    if empty := [name for name, samples in chosen.items() if not samples]:
        left_out = f" ({len(skipped)} left out, the first: {skipped[0]})" if skipped else ""
        raise ValueError(
            f"data {config.data} has {len(encoded)} samples{left_out}: too few, its {empty[0]} part would be empty"
        )
    counts_left_out = {"repeats_left_out": len(given) - len(once), "too_long": too_long}
    parts = {name: Part(samples, [encoded[s.id] for s in samples]) for name, samples in chosen.items()}
    return parts, counts_left_out


def _encode_fitting(config: Config, samples: list[Sample], skipped: list[str] | None) -> tuple[dict[str, Encoded], int]:
    """Token ids by sample id, and how many samples are too long: what the model cannot take is refused here."""
    base = load_base(config)
    encoded: dict[str, Encoded] = {}
    too_long = 0
    for sample in samples:
        try:
            row = encode_sample(base.chat, sample)
            too_long += len(row.prompt_ids) + len(row.target_ids) > base.config.max_length
            check_lengths([row], base.config.max_length)
            encoded[sample.id] = row
        except ValueError as error:
            refuse(f"{sample.place}: {error}", skipped, error)
    return encoded, too_long


def _without_repeats(given: list[Sample]) -> list[Sample]:
    """The samples, each once: a repeated one could be trained on and tested too."""
    kept: dict[str, Sample] = {}
    for sample in given:
        content = sample_row(dataclasses.replace(sample, id="", conversation=""))
        kept.setdefault(json.dumps(content, sort_keys=True), sample)
    return list(kept.values())


def _describe(config: Config, parts: dict[str, Part], left_out: dict[str, int], skipped: list[str]) -> None:
    """Writes the data card, and prints it unless the data is the generated corpus, which is always the same."""
    card = describe({name: part.samples for name, part in parts.items()}, {n: p.encoded for n, p in parts.items()})
    card |= {"data": config.data, **left_out, "rows_skipped": len(skipped) - left_out["too_long"]}
    if skipped:
        with whole_file(config.run_dir / "data" / "skipped.txt") as file:
            file.write("".join(f"{line}\n" for line in skipped).encode())
    write_json(config.run_dir / CARD, card)
    if config.data != "generated":
        for line in lines(card):
            say(line)


def read_card(config: Config) -> dict[str, Any]:
    """The data card with its benchmarks, none if there is no card yet."""
    path = config.run_dir / CARD
    try:
        card = {"benchmarks": {}} | (read_json(path) if path.exists() else {})
        return card | {"benchmarks": dict(card["benchmarks"])}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to have the benchmarks looked for again") from error
