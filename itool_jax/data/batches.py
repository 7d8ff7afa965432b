"""Makes training batches from encoded samples and pairs, as grain data sets.

In: rows of token ids. Out: `TargetBatch`es and `PairBatch`es of few shapes, in a seeded order. Rows of similar length
share a batch, which saves most of the padding; the order of the batches is random.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np

from itool_jax.text.chat import Encoded
from itool_jax.text.padding import PairBatch, TargetBatch, bucket, collate, collate_packed, fill, stack, target_width

T = TypeVar("T")

OPEN_PACKS = 64  # packs that are searched for free space
SHORT_STEP = 128  # tokens; the steps of nearly all batches are no longer than this
WINDOW = 16  # batches; rows are sorted by length within a window of this many


class PairRow(NamedTuple):
    """One preference pair as token ids, with its reference log-probabilities and visit counts."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    reference: tuple[float, float]
    visits: tuple[int, int]


def repeat_or_thin(rows: Sequence[T], count: int, seed: int) -> list[T]:
    """Returns `count` rows in a seeded order: a subset, or all rows repeated with counts that differ by at most 1."""
    order = random.Random(f"repeat_or_thin/{seed}").sample(range(len(rows)), len(rows))
    return [rows[order[i % len(order)]] for i in range(count)]


def sft_batches(rows: Sequence[Encoded], batch_size: int, epochs: int, seed: int) -> grain.MapDataset:
    """Makes batches of prompts and targets; the last batch of an epoch is padded with masked rows."""
    widths = [target_width(len(row.prompt_ids), len(row.target_ids)) for row in rows]

    def make(chosen: list[int]) -> TargetBatch:
        ids = [(rows[i].prompt_ids, rows[i].target_ids) for i in chosen]
        return collate(ids, max(widths[i] for i in chosen), batch_size)

    return _batches(widths, batch_size, epochs, seed, make)


def packed_batches(rows: Sequence[Encoded], width: int, batch_size: int, epochs: int, seed: int) -> grain.MapDataset:
    """Makes batches whose rows hold several samples, `width` tokens each or more if the longest sample needs it."""
    width = max([width, *(target_width(len(row.prompt_ids), len(row.target_ids)) for row in rows)])
    order: list[list[list[int]]] = []
    for epoch in range(epochs):
        packs = _pack(rows, width, random.Random(f"{seed}/{epoch}"))
        order += [packs[i : i + batch_size] for i in range(0, len(packs), batch_size)]

    def make(packs: list[list[int]]) -> TargetBatch:
        return collate_packed([[rows[i][1:] for i in pack] for pack in packs], width, batch_size)

    return grain.MapDataset.source(order).map(make)


def _pack(rows: Sequence[Encoded], width: int, rng: random.Random) -> list[list[int]]:
    """Packs row numbers in a random order, each into the first open pack with space for it and its targets."""
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []
    first_open = 0
    for i in rng.sample(range(len(rows)), len(rows)):
        length, n = len(rows[i].prompt_ids) + len(rows[i].target_ids), len(rows[i].target_ids)
        fits = (p for p in range(first_open, len(packs)) if room[p][0] >= length and room[p][1] >= n)
        if (place := next(fits, None)) is None:
            place = len(packs)
            packs.append([])
            room.append((width, width // 2))
            first_open = max(0, len(packs) - OPEN_PACKS)
        packs[place].append(i)
        room[place] = room[place][0] - length, room[place][1] - n
    rng.shuffle(packs)
    return packs


def pair_batches(rows: Sequence[PairRow], batch_size: int, epochs: int, seed: int) -> grain.MapDataset:
    """Makes batches of pairs; the last batch of an epoch is padded with pairs that do not count."""
    widths = [_pair_width(row) for row in rows]

    def make(chosen: list[int]) -> PairBatch:
        return collate_pairs([rows[i] for i in chosen], max(widths[i] for i in chosen), batch_size)

    return _batches(widths, batch_size, epochs, seed, make)


def _pair_width(row: PairRow) -> int:
    """Returns the width of a row that fits the pair and whose half fits the longer step."""
    n_chosen, n_rejected = len(row.chosen_ids), len(row.rejected_ids)
    return bucket(max(len(row.prompt_ids) + n_chosen + n_rejected, 2 * n_chosen, 2 * n_rejected))


def collate_pairs(rows: Sequence[PairRow], width: int, count: int) -> PairBatch:
    """Builds a batch of `count` pairs, padded with empty ones; short steps get few target slots, hence few logits."""
    longest = max((max(len(row.chosen_ids), len(row.rejected_ids)) for row in rows), default=0)
    n_targets = min(SHORT_STEP, width // 2) if longest <= SHORT_STEP else width // 2
    missing = _pair(PairRow([], [], [], (0.0, 0.0), (0, 0)), width, n_targets)._replace(real_B=np.array([False]))
    return stack([*(_pair(row, width, n_targets) for row in rows), *[missing] * (count - len(rows))])


def _pair(row: PairRow, width: int, n_targets: int) -> PairBatch:
    """Builds a batch of one pair: prompt, chosen and rejected step in one row, with `n_targets` targets per step."""
    prompt, chosen, rejected = row.prompt_ids, row.chosen_ids, row.rejected_ids
    # The last prompt token predicts the first token of either step; each later token is predicted by the one before it.
    fork = len(prompt) - 1
    middle = len(prompt) + len(chosen)
    chosen_positions = range(fork, fork + len(chosen))
    rejected_positions = [fork, *range(middle, middle + len(rejected) - 1)] if rejected else []

    def halves(of_chosen: Sequence[int], of_rejected: Sequence[int]) -> np.ndarray:
        return np.concatenate([fill(of_chosen, n_targets), fill(of_rejected, n_targets)], axis=1)

    both_steps = TargetBatch(
        tokens_BT=fill([*prompt, *chosen, *rejected], width),
        positions_BR=halves(chosen_positions, rejected_positions),
        targets_BR=halves(chosen, rejected),
        mask_BR=halves([1] * len(chosen), [1] * len(rejected)).astype(bool),
    )
    branch_BT = fill([0] * len(prompt) + [1] * len(chosen) + [2] * len(rejected), width)
    reference_chosen, reference_rejected = np.array(row.reference, np.float32)[:, None]
    visits_chosen, visits_rejected = np.array(row.visits, np.float32)[:, None]
    return PairBatch(
        both_steps,
        branch_BT,
        reference=(reference_chosen, reference_rejected),
        visits=(visits_chosen, visits_rejected),
        real_B=np.array([True]),
    )


def _batches(
    widths: Sequence[int], batch_size: int, epochs: int, seed: int, make: Callable[[list[int]], Any]
) -> grain.MapDataset:
    order = [chosen for epoch in range(epochs) for chosen in _epoch(widths, batch_size, f"{seed}/{epoch}")]
    return grain.MapDataset.source(order).map(make)


def _epoch(widths: Sequence[int], batch_size: int, seed: str) -> list[list[int]]:
    """Chooses the row numbers of each batch of one epoch."""
    rng = random.Random(seed)
    rows = rng.sample(range(len(widths)), len(widths))
    batches = []
    for start in range(0, len(rows), WINDOW * batch_size):
        window = sorted(rows[start : start + WINDOW * batch_size], key=lambda i: widths[i])
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    rng.shuffle(batches)
    return batches
