"""Training batches from encoded samples and pairs, as grain data sets.

In: rows of token ids. Out: `TargetBatch`es and `PairBatch`es of few shapes, in a seeded order. Rows of similar
length come together, which saves most of the padding; which batch comes when is random.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from itool_jax.text.chat import Encoded
from itool_jax.text.padding import PairBatch, TargetBatch, bucket, collate, collate_packed, target_width

OPEN_PACKS = 64  # packs that are looked through for room
SHORT_STEP = 128  # tokens of a step that all pairs of a batch keep within, nearly always
WINDOW = 16  # batches whose rows are sorted by length among themselves


class PairRow(NamedTuple):
    """One preference pair as token ids, with its reference log-probabilities and visit counts."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    reference: tuple[float, float]
    visits: tuple[int, int]


def sft_batches(rows: Sequence[Encoded], batch_size: int, epochs: int, seed: int) -> grain.MapDataset:
    """Batches of prompts and targets; the last of an epoch is filled up with masked rows."""
    widths = [target_width(len(row.prompt_ids), len(row.target_ids)) for row in rows]

    def make(chosen: list[int]) -> TargetBatch:
        ids = [(rows[i].prompt_ids, rows[i].target_ids) for i in chosen]
        return collate(ids, max(widths[i] for i in chosen), batch_size)

    return _batches(widths, batch_size, epochs, seed, make)


def packed_batches(rows: Sequence[Encoded], width: int, batch_size: int, epochs: int, seed: int) -> grain.MapDataset:
    """Batches of rows of `width` tokens, or as many as the longest sample needs, that hold several samples each."""
    width = max([width, *(target_width(len(row.prompt_ids), len(row.target_ids)) for row in rows)])
    order: list[list[list[int]]] = []
    for epoch in range(epochs):
        packs = _pack(rows, width, random.Random(f"{seed}/{epoch}"))
        order += [packs[i : i + batch_size] for i in range(0, len(packs), batch_size)]

    def make(packs: list[list[int]]) -> TargetBatch:
        return collate_packed([[rows[i][1:] for i in pack] for pack in packs], width, batch_size)

    return grain.MapDataset.source(order).map(make)


def _pack(rows: Sequence[Encoded], width: int, rng: random.Random) -> list[list[int]]:
    """Row numbers by pack, in a random order: each goes to the first open pack with room for it and its targets."""
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
    """Batches of pairs; the last of an epoch is filled up with pairs that do not count."""
    widths = [bucket(max(sum(map(len, row[:3])), 2 * len(row.chosen_ids), 2 * len(row.rejected_ids))) for row in rows]

    def make(chosen: list[int]) -> PairBatch:
        return collate_pairs([rows[i] for i in chosen], max(widths[i] for i in chosen), batch_size)

    return _batches(widths, batch_size, epochs, seed, make)


def collate_pairs(rows: Sequence[PairRow], width: int, count: int) -> PairBatch:
    """One batch of `count` pairs, the missing ones empty; short steps have room for few targets, so few logits."""
    missing, longest = count - len(rows), max((len(ids) for row in rows for ids in row[1:3]), default=0)
    half = min(SHORT_STEP, width // 2) if longest <= SHORT_STEP else width // 2
    chosen = collate([(row.prompt_ids, row.chosen_ids) for row in rows], width, count, half)
    rejected = collate([(row.prompt_ids, row.rejected_ids) for row in rows], width, count, half)
    both = TargetBatch(
        chosen.tokens_BT, *(np.concatenate(x, axis=1) for x in zip(chosen[1:4], rejected[1:4], strict=True))
    )
    branch_BT = np.zeros((count, width), np.int32)
    for i, row in enumerate(rows):
        fork, middle = len(row.prompt_ids), len(row.prompt_ids) + len(row.chosen_ids)
        end = middle + len(row.rejected_ids)
        both.tokens_BT[i, middle:end] = row.rejected_ids
        branch_BT[i, fork:middle], branch_BT[i, middle:end] = 1, 2
        # The first token of either step is predicted where the prompt ends.
        both.positions_BR[i, half + 1 : half + end - middle] += middle - fork

    def column(values: list[float]) -> np.ndarray:
        return np.array(values + [0.0] * missing, np.float32)

    return PairBatch(
        both,
        branch_BT,
        (column([row.reference[0] for row in rows]), column([row.reference[1] for row in rows])),
        (column([row.visits[0] for row in rows]), column([row.visits[1] for row in rows])),
        np.arange(count) < len(rows),
    )


def _batches(
    widths: Sequence[int], batch_size: int, epochs: int, seed: int, make: Callable[[list[int]], Any]
) -> grain.MapDataset:
    order = [chosen for epoch in range(epochs) for chosen in _epoch(widths, batch_size, f"{seed}/{epoch}")]
    return grain.MapDataset.source(order).map(make)


def _epoch(widths: Sequence[int], batch_size: int, seed: str) -> list[list[int]]:
    """Row numbers of each batch of one pass."""
    rng = random.Random(seed)
    rows = rng.sample(range(len(widths)), len(widths))
    found = []
    for start in range(0, len(rows), WINDOW * batch_size):
        window = sorted(rows[start : start + WINDOW * batch_size], key=lambda i: widths[i])
        found += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    rng.shuffle(found)
    return found
