"""Token rows of any lengths to rectangular arrays of few shapes, so that few programs are compiled."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from itool_jax.types import AnyArray, FloatB

SMALLEST_WIDTH = 128


class TargetBatch(NamedTuple):
    """Rows of prompt and target, right-padded, and where their target tokens are predicted.

    R is half of T: a row is given a width of at least twice its target.
    """

    tokens_BT: Int[AnyArray, "B T"]
    positions_BR: Int[AnyArray, "B R"]
    """The position before each target token."""
    targets_BR: Int[AnyArray, "B R"]
    mask_BR: Bool[AnyArray, "B R"]
    segment_BT: Int[AnyArray, "B T"] | None = None
    """Which of a packed row's samples a token belongs to, from 1; None where a row is one sample."""


class PairBatch(NamedTuple):
    """Preference pairs, one a row: the prompt once, then both steps, neither of which sees the other.

    The first half of R belongs to the chosen steps, the second to the rejected ones.
    """

    row: TargetBatch
    branch_BT: Int[AnyArray, "B T"]
    """Which step a token belongs to: 1 chosen, 2 rejected, 0 none, so that both see it."""
    reference: tuple[FloatB, FloatB]
    """Sums of log π_ref over the chosen and the rejected step."""
    visits: tuple[FloatB, FloatB]
    real_B: Bool[AnyArray, " B"]
    """False for padding."""


def bucket(length: int, smallest: int = SMALLEST_WIDTH) -> int:
    """The padded length: the next of 128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280, …

    Powers of two and the halves between, from 512 on the quarters: a program more costs less than the padding there.
    """
    power = max(smallest, 1 << max(0, length - 1).bit_length())
    eighths = (5, 6, 7) if power > 512 else (6,)
    between = (power * n // 8 for n in eighths)
    return next((width for width in between if width >= max(length, smallest)), power)


def target_width(prompt_length: int, target_length: int, smallest: int = SMALLEST_WIDTH) -> int:
    """Width of a `TargetBatch` that holds such a row."""
    return bucket(max(prompt_length + target_length, 2 * target_length), smallest)


def pad(rows: Sequence[Sequence[int]], width: int, count: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded int32 tokens [count or len(rows), width] and the rows' lengths; missing rows are empty."""
    tokens = np.zeros((count or len(rows), width), np.int32)
    lengths = np.zeros(len(tokens), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    return tokens, lengths


def collate(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], width: int, count: int, targets: int | None = None
) -> TargetBatch:
    """(prompt, target) rows as one batch of `count` rows with room for `targets`, half a row unless it says so.

    The missing rows are empty and masked.
    """
    room = width // 2 if targets is None else targets
    batch = TargetBatch(
        np.zeros((count, width), np.int32),
        np.zeros((count, room), np.int32),
        np.zeros((count, room), np.int32),
        np.zeros((count, room), bool),
    )
    for i, (prompt, target) in enumerate(rows):
        p, n = len(prompt), len(target)
        batch.tokens_BT[i, :p], batch.tokens_BT[i, p : p + n] = prompt, target
        batch.positions_BR[i, :n] = np.arange(p - 1, p + n - 1)
        batch.targets_BR[i, :n], batch.mask_BR[i, :n] = target, True
    return batch


def collate_packed(
    packs: Sequence[Sequence[tuple[Sequence[int], Sequence[int]]]], width: int, count: int
) -> TargetBatch:
    """A batch of `count` rows that hold several (prompt, target) pairs each, one behind the other."""
    segment_BT = np.zeros((count, width), np.int32)
    batch = collate([], width, count)._replace(segment_BT=segment_BT)
    for b, pack in enumerate(packs):
        start, first = 0, 0
        for number, (prompt, target) in enumerate(pack, 1):
            one = collate([(prompt, target)], width, 1)
            end, n = start + len(prompt) + len(target), len(target)
            batch.tokens_BT[b, start:end] = one.tokens_BT[0, : end - start]
            segment_BT[b, start:end] = number
            batch.positions_BR[b, first : first + n] = one.positions_BR[0, :n] + start
            batch.targets_BR[b, first : first + n], batch.mask_BR[b, first : first + n] = target, True
            start, first = end, first + n
    return batch


def group(widths: Sequence[int], tokens_per_batch: int) -> Iterator[tuple[list[int], int, int]]:
    """Groups rows of equal padded width: (indices, width, rows a batch), narrowest first.

    The number of rows depends on the width alone, so that each width compiles once.
    """
    order = sorted(range(len(widths)), key=lambda i: (widths[i], i))
    start = 0
    while start < len(order):
        width = widths[order[start]]
        rows = max(1, tokens_per_batch // width)
        chosen = [i for i in order[start : start + rows] if widths[i] == width]
        start += len(chosen)
        yield chosen, width, rows
