"""The data of a run: its train, validation and test splits, made once, saved and described.

In: `--data`, or the generated corpus, and `samples.test_file`. Out: `data/{train,validation,test}.jsonl`,
`data/card.json`, and `data/skipped.txt` if rows were left out. Nothing is ever truncated: a sample too long for the
model ends the run, or is skipped like a bad row.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from itool_jax.config import Config
from itool_jax.data import generated, sources
from itool_jax.data.card import describe, left_out_lines, lines, target_fault
from itool_jax.data.rows import refuse
from itool_jax.store.base import load_base
from itool_jax.store.encoding import check_lengths, encode
from itool_jax.store.paths import StepId
from itool_jax.store.sources import SOURCES, fingerprints
from itool_jax.system import hosts
from itool_jax.system.files import whole_file, write_json, write_jsonl
from itool_jax.system.messages import log
from itool_jax.system.untrusted import read_json
from itool_jax.text.calls import looks_like_calls
from itool_jax.text.chat import Encoded, encode_sample
from itool_jax.text.sample import Sample, sample_row
from itool_jax.training import replay

CARD = "data/card.json"
NAMES = ("train", "validation", "test")


class Samples:
    """Samples and their token ids, both loaded on first use and cached.

    `origin` is the step that chose the samples, if any. Subsets chosen from these samples share their token ids.
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
        """Returns a subset of the samples; `choose` is called on first use."""
        return Samples(lambda: choose(self.samples), self._encode, self._known, origin, require)


class Splits(NamedTuple):
    """The three splits of a run's data."""

    train: Samples
    validation: Samples
    test: Samples


class Part(NamedTuple):
    """The samples of one split, and their token ids."""

    samples: list[Sample]
    encoded: list[Encoded]


def load_splits(config: Config) -> Splits:
    """Returns a run's splits; creates, describes and saves them if one is missing."""
    made: dict[str, Part] = {}
    hosts.broadcast_from_primary("data", lambda: made.update(_make(config)))

    def encode_all(samples: list[Sample]) -> list[Encoded]:
        return encode(load_base(config), samples)

    def split(name: str) -> Samples:
        known: dict[str, Encoded] = {}

        def load() -> list[Sample]:
            samples, part = _read(config, name), made.pop(name, None)
            if part is not None and samples == part.samples:  # just made by this process
                known.update((row.id, row) for row in part.encoded)
            return samples

        return Samples(load, encode_all, known)

    return Splits(*map(split, NAMES))


def split_replay(train: Samples, config: Config) -> tuple[Samples, Samples]:
    """Splits the training samples into those of the warm-up and those of the replay buffer (section 4.2)."""

    @functools.cache
    def both() -> tuple[list[Sample], list[Sample]]:
        return divide_replay(config, train.samples)

    return train.choose(lambda _: both()[0]), train.choose(lambda _: both()[1])


def search_pool(train: Samples, config: Config) -> Samples:
    """Returns the samples an iteration picks prompts from: the replay buffer, or all that follow a user turn."""
    if config.replay.pool == "buffer":
        return split_replay(train, config)[1]
    return train.choose(lambda samples: [sample for sample in samples if sample.follows_user])


def divide_replay(config: Config, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Divides training samples into warm-up and replay buffer; ValueError if either would be empty.

    The buffer holds samples that follow a user turn. Other turns of its conversations go to neither side, because their
    prompts would show the warm-up the buffer's targets.
    """
    warmup, aside = _replay_sides(config, samples)
    if not warmup or not aside:
        raise ValueError(f"{len(samples)} training samples are too few to split off a replay buffer; add data")
    buffer = [sample for sample in aside if sample.follows_user]
    if not buffer:
        raise ValueError(
            f"none of the {len(aside)} training samples split off for the replay buffer follows a user turn; "
            "add such data, or raise replay.replay_fraction"
        )
    return warmup, buffer


def _replay_sides(config: Config, samples: list[Sample]) -> tuple[list[Sample], list[Sample]]:
    return replay.split(samples, 1 - config.replay.replay_fraction, "replay", config.seed)


def has_part(config: Config, name: str) -> bool:
    """Returns whether the settings leave any samples for a held-out part."""
    s = config.samples
    share = s.test_share if name == "test" else s.validation_share
    return config.data == "generated" or share > 0 or (name == "test" and s.test_file is not None)


def require_part(config: Config) -> None:
    """Raises ValueError, naming the setting, if there is no part to evaluate on."""
    name = config.evaluate.split
    if not has_part(config, name):
        other = ", set samples.test_file, or set --benchmark" if name == "test" else ""
        raise ValueError(f"samples.{name}_share=0 leaves no {name} part to evaluate on; raise it{other}")


def data_file(config: Config) -> str:
    """Returns `--data` for a stage that reads its own data file; ValueError if none is given."""
    if config.data == "generated":
        raise ValueError(f"--stage={config.stage} needs --data=FILE, a file of samples or raw prompts")
    return config.data


def _path(config: Config, name: str) -> Path:
    return config.run_dir / "data" / f"{name}.jsonl"


def _read(config: Config, name: str) -> list[Sample]:
    path = _path(config, name)
    return sources.load(path) if path.stat().st_size or name == "train" or has_part(config, name) else []


def are_made(config: Config) -> bool:
    """Returns whether all splits and their data card exist."""
    return all(path.exists() for path in (config.run_dir / CARD, *(_path(config, name) for name in NAMES)))


def _make(config: Config) -> dict[str, Part]:
    """Makes, describes and writes the splits unless they exist; returns those it made."""
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
    """Computes the three splits, and the number of samples left out of them by reason, for the card; writes nothing.

    Reasons why rows were left out go to `skipped`; without such a list, the first one is an error.
    """
    file = config.samples.test_file
    test, too_long = _read_whole(config, file, skipped) if file is not None else (None, 0)
    parts: dict[str, Part]
    if config.data == "generated":
        base = load_base(config)
        made = generated.splits(config.generated)
        parts = {name: Part(samples, encode(base, samples)) for name, samples in made.items()}
        left_out = {"repeats_left_out": 0, "too_long": 0}
    else:
        parts, left_out = _divide_data(config, skipped)
    if test is not None:
        other = {name: _some(part, _without(part.samples, test.samples)) for name, part in parts.items()}
        left_out["repeats_left_out"] += sum(len(parts[name].samples) - len(other[name].samples) for name in parts)
        left_out["too_long"] += too_long
        parts = other | {"test": test}
    for name in ("validation", "test"):
        kept = [sample for sample in parts[name].samples if _can_be_judged(sample)]
        left_out[f"{name}_texts_left_out"] = len(parts[name].samples) - len(kept)
        parts[name] = _some(parts[name], kept)
    _check_not_empty(config, parts, skipped)
    used = _used(config, parts["train"].samples)
    left_out["train_left_out"] = len(parts["train"].samples) - len(used)
    parts["train"] = _some(parts["train"], used)
    left_out["buffer_left_out"] = sum(not sample.follows_user for sample in _replay_sides(config, used)[1])
    return parts, left_out


def _read_whole(config: Config, source: str, skipped: list[str] | None) -> tuple[Part, int]:
    """Reads all samples of a data file as one part; also returns how many were too long."""
    samples = _without_repeats(sources.load(source, skipped, config.samples.targets))
    samples = _with_fewer_tools(samples, config)
    encoded, too_long = _encode_fitting(config, samples, skipped)
    return Part([s for s in samples if s.id in encoded], list(encoded.values())), too_long


def _divide_data(config: Config, skipped: list[str] | None) -> tuple[dict[str, Part], dict[str, int]]:
    """Computes the splits of `--data`; the test part is empty if `samples.test_file` provides it."""
    s = config.samples
    given = sources.load(config.data, skipped, s.targets)
    once = _with_fewer_tools(_without_repeats(given), config)
    encoded, too_long = _encode_fitting(config, once, skipped)
    # The splits do not depend on the seed, so that runs with different seeds can be compared.
    test_share = s.test_share if s.test_file is None else 0
    rest, held_out = replay.split([s for s in once if s.id in encoded], 1 - test_share, "test", 0)
    train, validation = replay.split(rest, 1 - s.validation_share, "validation", 0)
    chosen = {"train": train, "validation": validation, "test": held_out}
    parts = {name: Part(samples, [encoded[s.id] for s in samples]) for name, samples in chosen.items()}
    return parts, {"repeats_left_out": len(given) - len(once), "too_long": too_long}


def _with_fewer_tools(samples: list[Sample], config: Config) -> list[Sample]:
    """Returns samples with no more tools than `samples.max_tools`, and logs how many had more."""
    if not (most := config.samples.max_tools):
        return samples
    fewer = [sources.with_fewer_tools(sample, most) for sample in samples]
    n_cut = sum(len(a.tools) < len(b.tools) for a, b in zip(fewer, samples, strict=True))
    log(f"samples.max_tools={most}: {n_cut} of {len(samples)} samples are offered fewer tools than their data lists")
    return fewer


def _some(part: Part, chosen: list[Sample]) -> Part:
    encoded = {row.id: row for row in part.encoded}
    return Part(chosen, [encoded[sample.id] for sample in chosen])


def _can_be_judged(sample: Sample) -> bool:
    """Returns whether an answer can be wrong: if the target is text after a tool result, any text counts as right."""
    return sample.follows_user or looks_like_calls(sample.target)


def _check_not_empty(config: Config, parts: dict[str, Part], skipped: list[str] | None) -> None:
    """Raises ValueError naming an empty part, unless the settings leave it empty."""
    empty = [name for name in NAMES if not parts[name].samples and (name == "train" or has_part(config, name))]
    if not empty:
        return
    left_out = f" ({len(skipped)} left out, the first: {skipped[0]})" if skipped else ""
    if empty[0] == "test" and (file := config.samples.test_file) is not None:
        raise ValueError(f"samples.test_file {file} has no sample to evaluate on{left_out}")
    count = sum(len(part.samples) for part in parts.values())
    raise ValueError(
        f"data {config.data} has {count} samples{left_out}, too few: the {empty[0]} part would be empty; add data"
    )


def _used(config: Config, train: list[Sample]) -> list[Sample]:
    """Returns the training samples that samples.fraction and samples.limit keep."""
    s = config.samples
    if s.fraction == 1 and s.limit == 0:
        return train
    used, _ = replay.split(train, s.fraction, "samples", config.seed)
    if not used:
        raise ValueError(f"samples.fraction={s.fraction} leaves none of {len(train)} training samples; raise it")
    return used[: s.limit or None]


def _encode_fitting(config: Config, samples: list[Sample], skipped: list[str] | None) -> tuple[dict[str, Encoded], int]:
    """Encodes samples, by id, and counts those too long; one that does not fit the model is skipped or an error."""
    base = load_base(config)
    encoded: dict[str, Encoded] = {}
    too_long = 0
    for sample in samples:
        try:
            if config.strict and (fault := target_fault(sample)):
                raise ValueError(f"the target contradicts the tools: {fault}")
            row = encode_sample(base.chat, sample)
            too_long += len(row.prompt_ids) + len(row.target_ids) > base.config.max_length
            check_lengths([row], base.config.max_length)
            encoded[sample.id] = row
        except ValueError as error:
            refuse(f"{sample.place}: {error}{_how_to_leave_out(config, sample)}", skipped, error)
    return encoded, too_long


def _how_to_leave_out(config: Config, sample: Sample) -> str:
    """Returns a hint at the setting that leaves out a conversation's turns that do not follow a user turn."""
    is_further_turn = sample.conversation and not sample.follows_user and config.samples.targets == "all"
    return "; set samples.targets=after_user to leave such turns out" if is_further_turn else ""


def _without_repeats(given: list[Sample]) -> list[Sample]:
    """Removes duplicates: a repeated sample could be in both the training and the test part."""
    kept: dict[str, Sample] = {}
    for sample in given:
        kept.setdefault(_content(sample), sample)
    return list(kept.values())


def _without(given: list[Sample], others: Sequence[Sample]) -> list[Sample]:
    """Returns the samples that are not among the others."""
    known = set(map(_content, others))
    return [sample for sample in given if _content(sample) not in known]


def _content(sample: Sample) -> str:
    """Returns a sample's content as text, without its id, conversation and following turns."""
    return json.dumps(sample_row(dataclasses.replace(sample, id="", conversation="", following=())), sort_keys=True)


def _describe(config: Config, parts: dict[str, Part], left_out: dict[str, int], skipped: list[str]) -> None:
    """Writes and prints the data card; for the generated corpus, which never changes, prints only what is left out."""
    card = describe({name: part.samples for name, part in parts.items()}, {n: p.encoded for n, p in parts.items()})
    card |= {"data": config.data, **left_out, "rows_skipped": len(skipped) - left_out["too_long"]}
    if skipped:
        with whole_file(config.run_dir / "data" / "skipped.txt") as file:
            file.write("".join(f"{line}\n" for line in skipped).encode())
    write_json(config.run_dir / CARD, card)
    own = config.data != "generated" or config.samples.test_file is not None
    for line in lines(card) if own else left_out_lines(card):
        log(line)


def read_card(config: Config) -> dict[str, Any]:
    """Reads the data card with its benchmarks; without a card, there are none."""
    path = config.run_dir / CARD
    try:
        card = {"benchmarks": {}} | (read_json(path) if path.exists() else {})
        return card | {"benchmarks": dict(card["benchmarks"])}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to have the benchmarks looked for again") from error
