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
from itool_jax.text.padding import PairBatch, TargetBatch, bucket, collate, target_width

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


def pair_batches(rows: Sequence[PairRow], batch_size: int, epochs: int, seed: int) -> grain.MapDataset:
    """Batches of pairs; the last of an epoch is filled up with pairs that do not count."""
    widths = [bucket(max(sum(map(len, row[:3])), 2 * len(row.chosen_ids), 2 * len(row.rejected_ids))) for row in rows]

    def make(chosen: list[int]) -> PairBatch:
        return collate_pairs([rows[i] for i in chosen], max(widths[i] for i in chosen), batch_size)

    return _batches(widths, batch_size, epochs, seed, make)


def collate_pairs(rows: Sequence[PairRow], width: int, count: int) -> PairBatch:
    """One batch of `count` pairs, the missing ones empty."""
    missing, half = count - len(rows), width // 2
    chosen = collate([(row.prompt_ids, row.chosen_ids) for row in rows], width, count)
    rejected = collate([(row.prompt_ids, row.rejected_ids) for row in rows], width, count)
    both = TargetBatch(
        chosen.tokens_BT, *(np.concatenate(x, axis=1) for x in zip(chosen[1:], rejected[1:], strict=True))
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
