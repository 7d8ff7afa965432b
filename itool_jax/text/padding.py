"""Pads token rows of any length to arrays of a few shapes, so that few programs are compiled."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from itool_jax.types import AnyArray, FloatB

SMALLEST_WIDTH = 128


class TargetBatch(NamedTuple):
    """Right-padded rows of prompt and target, with the positions that predict the target tokens.

    R is half of T: a row's width is at least twice its target's length.
    """

    tokens_BT: Int[AnyArray, "B T"]
    positions_BR: Int[AnyArray, "B R"]
    """The position before each target token."""
    targets_BR: Int[AnyArray, "B R"]
    mask_BR: Bool[AnyArray, "B R"]
    segment_BT: Int[AnyArray, "B T"] | None = None
    """The sample, from 1, that each token of a packed row belongs to; None if each row is one sample."""


class PairBatch(NamedTuple):
    """Preference pairs, one per row: the prompt once, then both steps, which do not see each other.

    The first half of R belongs to the chosen steps, the second to the rejected ones.
    """

    row: TargetBatch
    branch_BT: Int[AnyArray, "B T"]
    """The step that each token belongs to: 1 chosen, 2 rejected, 0 neither, so that both see it."""
    reference: tuple[FloatB, FloatB]
    """Sums of log π_ref over the chosen and the rejected step."""
    visits: tuple[FloatB, FloatB]
    real_B: Bool[AnyArray, " B"]
    """False for padding."""


def bucket(length: int, smallest: int = SMALLEST_WIDTH) -> int:
    """Rounds a length up to the next of 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, …

    These are powers of two and the midpoints between them. From 512 on they also include the quarter points, because an
    extra program costs less than the padding there.
    """
    power = max(smallest, 1 << max(0, length - 1).bit_length())
    eighths = (5, 6, 7) if power > 512 else (6,)
    between = (power * n // 8 for n in eighths)
    return next((width for width in between if width >= max(length, smallest)), power)


def target_width(prompt_length: int, target_length: int, smallest: int = SMALLEST_WIDTH) -> int:
    """Computes the width of a `TargetBatch` that holds a row with these lengths."""
    return bucket(max(prompt_length + target_length, 2 * target_length), smallest)


def pad(rows: Sequence[Sequence[int]], width: int, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads rows to int32 tokens [count or len(rows), width] and lengths; missing rows are empty."""
    tokens = np.zeros((count or len(rows), width), np.int32)
    lengths = np.zeros(len(tokens), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths


def fill(values: Sequence[int], width: int) -> np.ndarray:
    """Pads values with zeros to one int32 row [1, width]."""
    row = np.zeros((1, width), np.int32)
    row[0, : len(values)] = values
    return row


def stack(batches: Sequence[Any]) -> Any:
    """Joins the rows of batches of equal width into one batch."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)


def collate(rows: Sequence[tuple[Sequence[int], Sequence[int]]], width: int, count: int) -> TargetBatch:
    """Builds a batch of `count` rows from (prompt, target) token ids; missing rows are empty and masked."""
    return collate_packed([[row] for row in rows], width, count)._replace(segment_BT=None)


def collate_packed(
    packs: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], width: int, count: int
) -> TargetBatch:
    """Builds a batch of `count` rows, each holding several (prompt, target) samples in sequence."""
    missing = [_target_row([], width)] * (count - len(packs))
    return stack([*(_target_row(pack, width) for pack in packs), *missing])


def _target_row(samples: Sequence[tuple[Sequence[int], Sequence[int]]], width: int) -> TargetBatch:
    """Builds a batch of one row that holds samples in sequence, each as its own segment."""
    tokens: list[int] = []
    segments: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for number, (prompt, target) in enumerate(samples, 1):
        first_target = len(tokens) + len(prompt)
        positions += range(first_target - 1, first_target - 1 + len(target))
        targets += target
        tokens += [*prompt, *target]
        segments += [number] * (len(prompt) + len(target))
    return TargetBatch(
        tokens_BT=fill(tokens, width),
        positions_BR=fill(positions, width // 2),
        targets_BR=fill(targets, width // 2),
        mask_BR=fill([1] * len(targets), width // 2).astype(bool),
        segment_BT=fill(segments, width),
    )


def group(widths: Sequence[int], tokens_per_batch: int, devices: int = 1) -> Iterator[tuple[list[int], int, int]]:
    """Groups rows into batches, yielding (indices, width, rows in the padded batch), narrowest first.

    Rows that do not fill a batch of their width join wider ones if that adds at most a quarter of `tokens_per_batch` in
    padding, and an eighth of the tokens still to compute: for a small job too, that costs less than one more program.
    The others share a batch of only as many rows as they need. Row counts are `devices` times 1, 2, 3, 4, 6, 8, 12, …,
    so few programs compile. Omitting the rows of the first batches does not change the others.
    """
    order = sorted(range(len(widths)), key=lambda i: (widths[i], i))
    by_width = [(width, list(same)) for width, same in itertools.groupby(order, widths.__getitem__)]
    wider = [width for width, _ in by_width[1:]]
    waiting: list[int] = []
    left = sum(widths)
    for (width, same), next_width in itertools.zip_longest(by_width, wider):
        waiting += same
        most = devices * max(1, _round_down(tokens_per_batch // width // devices))
        while len(waiting) >= most:
            yield waiting[:most], width, most
            left -= sum(widths[i] for i in waiting[:most])
            waiting = waiting[most:]
        bound = min(tokens_per_batch // 4, left // 8)
        if waiting and (next_width is None or sum(next_width - widths[i] for i in waiting) > bound):
            yield waiting, width, devices * bucket(-(-len(waiting) // devices), 1)
            left -= sum(widths[i] for i in waiting)
            waiting = []


def _round_down(count: int) -> int:
    """Rounds down to 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, …"""
    power = 1 << count.bit_length() >> 1
    return power * 3 // 2 if power > 1 and count >= power * 3 // 2 else power
