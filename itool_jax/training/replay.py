"""Selects samples by id: the replay split, the hardest share and the curriculum.

In: perplexities and sample features. Out: sample ids. Uses neither model nor sampler. Results depend on ids, scores
and seed, never on the order of the input.
"""

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from itool_jax.text.calls import read_calls
from itool_jax.text.sample import Sample

CurriculumOrder = Literal["easy_to_hard", "mixed", "hard_to_easy"]
N_PARTS = 3  # easy, medium, hard


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """Size of the replay buffer, and the selection of the samples to search in each iteration."""

    replay_fraction: float = 0.1
    """Share of the training samples kept out of warm-up as the replay buffer."""

    hardest_fraction: float = 0.2
    """Share α of the pool that each iteration searches, at most."""

    skip_fraction: float = 0.0
    """With select=perplexity: share of samples with the very highest perplexity to skip first, as too hard to solve."""

    select: Literal["perplexity", "mixed"] = "mixed"
    """How to select samples for the search. mixed: samples that the model answers right only sometimes, preferring the
    most even mix. perplexity: highest perplexity of the gold response, as in the paper (eq 4)."""

    pool: Literal["buffer", "all"] = "buffer"
    """Source of the searched samples. buffer: the replay buffer. all: all training samples, including those of the
    warm-up."""

    samples: int = 8
    """K: answers sampled per prompt, for every prompt of the pool with select=mixed, else for the searched ones."""

    temperature: float = 1.0
    """Sampling temperature of these answers."""

    def __post_init__(self) -> None:
        if not 0 < self.replay_fraction < 1:
            raise ValueError(f"replay.replay_fraction must be in (0, 1), got {self.replay_fraction}")
        if not 0 < self.hardest_fraction <= 1:
            raise ValueError(f"replay.hardest_fraction must be in (0, 1], got {self.hardest_fraction}")
        if self.samples < 1:
            raise ValueError(f"replay.samples must be positive, got {self.samples}")
        if not self.temperature > 0:
            raise ValueError(f"replay.temperature must be positive, got {self.temperature}")
        if not 0 <= self.skip_fraction < 1:
            raise ValueError(f"replay.skip_fraction must be in [0, 1), got {self.skip_fraction}")
        if self.skip_fraction + self.hardest_fraction > 1 + 1e-9:
            raise ValueError(
                "replay.skip_fraction + replay.hardest_fraction must be at most 1, "
                f"got {self.skip_fraction} + {self.hardest_fraction}"
            )
        if self.skip_fraction and self.select != "perplexity":
            raise ValueError(
                "replay.skip_fraction is only for replay.select=perplexity; mixed skips what is never solved"
            )

    def n_searched(self, n: int) -> int:
        """Returns how many of `n` samples are selected: the share α, but at least one."""
        return max(1, round(self.hardest_fraction * n))


class ScoredSample(NamedTuple):
    """A buffer sample: the perplexity of its gold response (eq 4), and whether that is calls rather than text."""

    id: str
    perplexity: float
    is_call: bool
    right: float = 0.0
    """Share of the model's sampled answers that are right."""


class DifficultyFeatures(NamedTuple):
    """Measures of a sample's difficulty: candidate tools, characters of the tool list, calls in the response."""

    id: str
    n_tools: int
    tools_length: int
    n_calls: int


def sample_features(sample: Sample) -> DifficultyFeatures:
    """Computes a sample's difficulty features: its candidate tools, the length of their text, the calls it needs."""
    length = len(json.dumps(sample.tools, ensure_ascii=False))
    return DifficultyFeatures(sample.id, len(sample.tools), length, len(read_calls(sample.target) or ()))


def split(samples: Iterable[Sample], fraction: float, purpose: str, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Splits samples into about `fraction` of them and the rest, each in random but reproducible order.

    A sample's side depends only on its id, the purpose and the seed, never on other samples; splits for different
    purposes are independent. All turns of a conversation are on the side that the conversation's id determines.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    samples = sorted(samples, key=lambda sample: sample.id)
    _reject_duplicates(sample.id for sample in samples)
    place = {sample.id: uniform(purpose, seed, sample.conversation or sample.id) for sample in samples}
    samples.sort(key=lambda sample: place[sample.id])
    return [s for s in samples if place[s.id] < fraction], [s for s in samples if place[s.id] >= fraction]


def is_drawn(id_: str, fraction: float, purpose: str, seed: int) -> bool:
    """Returns whether an id is in a random but reproducible `fraction`, independent for each purpose."""
    return uniform(purpose, seed, id_) < fraction


def select_hardest(scores: Sequence[ScoredSample], settings: ReplaySettings) -> list[str]:
    """Returns the ids of the hardest samples, highest perplexity first, ties by id.

    The share is taken separately from samples whose gold is calls and from those whose gold is text, at least one
    from each non-empty group. A perplexity that is not finite counts as the highest.
    """
    _reject_duplicates(score.id for score in scores)
    taken: list[ScoredSample] = []
    for is_call in (True, False):
        group = sorted((score for score in scores if score.is_call == is_call), key=_hardest_first)
        skip = min(round(settings.skip_fraction * len(group)), max(len(group) - 1, 0))
        taken += group[skip : skip + settings.n_searched(len(group))]
    return [score.id for score in sorted(taken, key=_hardest_first)]


def select_mixed(scores: Sequence[ScoredSample], settings: ReplaySettings) -> list[str]:
    """Returns the ids of samples that the model sometimes solves (0 < p < 1 over K answers), highest p (1 - p) first.

    Ties go to the higher perplexity, then by id. At most the share α of calls and of texts is taken, possibly less.
    """
    _reject_duplicates(score.id for score in scores)
    taken: list[ScoredSample] = []
    for is_call in (True, False):
        group = [score for score in scores if score.is_call == is_call]
        mixed = sorted((score for score in group if 0 < score.right < 1), key=_most_mixed_first)
        taken += mixed[: settings.n_searched(len(group))]
    return [score.id for score in sorted(taken, key=_most_mixed_first)]


def keep_share(items: Sequence[tuple[str, bool]], share: float, margin: float, seed: int) -> set[str]:
    """Returns the ids of the most items whose share of marked ones is within `margin` of `share`.

    Items are (id, marked); a seeded hash chooses among them. If all or none are marked, all are kept.
    """
    marked, others = ([id_ for id_, mark in items if mark == wanted] for wanted in (True, False))
    least, most = max(0.0, share - margin), min(1.0, share + margin)
    n_marked, n_others = len(marked), len(others)
    if marked and others and n_marked < least * len(items):
        n_others = max(1, math.floor(n_marked * (1 - least) / least + 1e-9))
    if marked and others and n_marked > most * len(items):
        n_marked = max(1, math.floor(n_others * most / (1 - most) + 1e-9))

    def drawn(ids: list[str], n: int) -> list[str]:
        return sorted(ids, key=lambda id_: uniform("share", seed, id_))[:n]

    return {*drawn(marked, n_marked), *drawn(others, n_others)}


def difficulty(features: Sequence[DifficultyFeatures]) -> list[float]:
    """Computes the mean percentile rank of the three features, in [0, 1]; equal values share their average rank."""
    n = len(features)
    rank_sums = np.zeros(n)
    for name in ("n_tools", "tools_length", "n_calls"):
        values = np.array([getattr(feature, name) for feature in features])
        in_order = np.sort(values)
        below = np.searchsorted(in_order, values, "left")
        not_above = np.searchsorted(in_order, values, "right")
        rank_sums += (below + not_above - 1) / 2
    # Half-integer ranks add up exactly; dividing only once, at the end, keeps ties exact.
    return (rank_sums / (3 * (n - 1))).tolist() if n > 1 else [0.5] * n


def curriculum(features: Sequence[DifficultyFeatures], order: CurriculumOrder, seed: int) -> list[list[str]]:
    """Cuts ids into three parts whose sizes differ by at most one, in training order.

    easy_to_hard: cut by difficulty, ties by id; hard_to_easy: the same parts in reverse order; mixed: cut after a
    seeded shuffle.
    """
    ids = [feature.id for feature in features]
    _reject_duplicates(ids)
    keys = [uniform("curriculum", seed, id_) for id_ in ids] if order == "mixed" else difficulty(features)
    ids = [id_ for _, id_ in sorted(zip(keys, ids, strict=True))]
    bounds = [math.ceil(len(ids) * part / N_PARTS) for part in range(N_PARTS + 1)]
    parts = [ids[start:stop] for start, stop in pairwise(bounds)]
    return parts[::-1] if order == "hard_to_easy" else parts


def _hardest_first(score: ScoredSample) -> tuple[float, str]:
    return (-score.perplexity if math.isfinite(score.perplexity) else -math.inf, score.id)


def _most_mixed_first(score: ScoredSample) -> tuple[float, float, str]:
    # Rounded: p and 1 - p are equally mixed, but their products differ in the last bit.
    return -round(score.right * (1 - score.right), 9), *_hardest_first(score)


def uniform(purpose: str, seed: int, id_: str) -> float:
    """Hashes an id to a number in [0, 1), the same on every machine and independent for each purpose."""
    digest = hashlib.blake2b(f"{purpose}:{seed}:{id_}".encode(errors="surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) / 2**53  # 53 bits fit a float exactly, so the result is never 1.0


def _reject_duplicates(ids: Iterable[str]) -> None:
    id_, count = next(iter(Counter(ids).most_common(1)), ("", 0))
    if count > 1:
        raise ValueError(f"sample id {id_!r} appears {count} times; give every sample a unique id")
