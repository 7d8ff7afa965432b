"""Training batches: every row once an epoch, in an order that the seed alone decides, in few shapes."""

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from itool_jax.data.batches import (
    PairRow,
    collate_pairs,
    packed_batches,
    pair_batches,
    repeat_or_thin,
    sft_batches,
)
from itool_jax.text.chat import Encoded
from itool_jax.text.padding import TargetBatch, bucket


def encoded(count: int) -> list[Encoded]:
    """Rows of many lengths; each opens with a token of its own."""
    rng = random.Random(0)
    lengths = [(rng.randint(1, 300), rng.randint(1, 80)) for _ in range(count)]
    return [Encoded(f"row {i}", [1000 + i] + [1] * p, [2 + i] * t) for i, (p, t) in enumerate(lengths)]


def pairs(count: int) -> list[PairRow]:
    rng = random.Random(1)
    return [
        PairRow(
            [1000 + i] + [1] * rng.randint(0, 300),
            [2 + i] * rng.randint(1, 80),
            [500 + i] * rng.randint(1, 80),
            (-float(i) - 0.5, -float(i) - 0.25),
            (i + 1, 2 * i),
        )
        for i in range(count)
    ]


def targets(batch: TargetBatch, b: int) -> list[int]:
    return batch.targets_BR[b, batch.mask_BR[b]].tolist()


def opening(batch: TargetBatch) -> list[int]:
    """The rows of a batch by number; -1 is padding."""
    return [int(token) - 1000 if token else -1 for token in batch.tokens_BT[:, 0]]


def flat(batches: Any) -> list[np.ndarray]:
    return [array for batch in batches for array in batch]


@pytest.mark.parametrize(
    ("count", "batch_size", "epochs"), [(1, 4, 1), (12, 4, 2), (13, 4, 3), (3, 8, 2), (70, 2, 1), (5, 1, 2)]
)
def test_every_sample_comes_once_an_epoch(count: int, batch_size: int, epochs: int) -> None:
    rows = encoded(count)
    batches = list(sft_batches(rows, batch_size, epochs, seed=0))
    a_pass = -(-count // batch_size)
    assert len(batches) == len(sft_batches(rows, batch_size, epochs, seed=0)) == epochs * a_pass
    for epoch in range(epochs):
        seen = [i for batch in batches[epoch * a_pass : (epoch + 1) * a_pass] for i in opening(batch)]
        assert Counter(seen) == Counter([*range(count), *[-1] * (a_pass * batch_size - count)])
    for batch in batches:
        for b, i in enumerate(opening(batch)):
            assert targets(batch, b) == (rows[i].target_ids if i >= 0 else [])
            whole = rows[i].prompt_ids + rows[i].target_ids if i >= 0 else []
            assert batch.tokens_BT[b, : len(whole)].tolist() == whole
            assert not batch.tokens_BT[b, len(whole) :].any()


def test_the_seed_alone_decides_the_order() -> None:
    rows = encoded(50)
    first, again, other = (list(sft_batches(rows, 4, 2, seed)) for seed in (3, 3, 4))
    for one, two in zip(flat(first), flat(again), strict=True):
        np.testing.assert_array_equal(one, two)
    assert [opening(batch) for batch in first] != [opening(batch) for batch in other]
    assert [opening(batch) for batch in first[:13]] != [opening(batch) for batch in first[13:]]  # epochs differ


def test_rows_of_one_length_come_together_in_few_shapes() -> None:
    rows = encoded(400)
    batches = list(sft_batches(rows, 4, 1, seed=0))
    widths = [batch.tokens_BT.shape[1] for batch in batches]
    assert {batch.tokens_BT.shape[0] for batch in batches} == {4}
    assert all(width == bucket(width) for width in widths)
    assert len(set(widths)) <= 4
    used = sum(len(row.prompt_ids) + len(row.target_ids) for row in rows)
    assert used / (4 * sum(widths)) > 0.7  # of random rows, padded to the longest of four, about half is used
    # Which batch comes when is random all the same: 15 batches that are sorted by length among themselves.
    alone = [batch.tokens_BT.shape[1] for batch in sft_batches(encoded(60), 4, 1, seed=0)]
    assert alone != sorted(alone)


def test_pairs_carry_reference_and_visits() -> None:
    rows = pairs(11)
    seen = []
    for batch in pair_batches(rows, 4, 1, seed=0):
        numbers = opening(batch.row)
        assert batch.real_B.tolist() == [i >= 0 for i in numbers]
        for b, i in enumerate(numbers):
            row = rows[i] if i >= 0 else PairRow([], [], [], (0.0, 0.0), (0, 0))
            assert targets(batch.row, b) == row.chosen_ids + row.rejected_ids
            whole = row.prompt_ids + row.chosen_ids + row.rejected_ids
            assert batch.row.tokens_BT[b, : len(whole)].tolist() == whole
            assert np.bincount(batch.branch_BT[b], minlength=3).tolist()[1:] == [
                len(row.chosen_ids),
                len(row.rejected_ids),
            ]
            assert (batch.reference[0][b], batch.reference[1][b]) == row.reference
            assert (batch.visits[0][b], batch.visits[1][b]) == row.visits
        seen += [i for i in numbers if i >= 0]
    assert sorted(seen) == list(range(11))


def test_a_step_is_predicted_from_the_end_of_the_prompt_and_its_own_tokens() -> None:
    rng = random.Random(2)
    rows = [
        PairRow([*range(100, 101 + i)], rng.sample(range(50), n), rng.sample(range(50, 99), m), (0.0, 0.0), (1, 1))
        for i, (n, m) in enumerate([(1, 1), (7, 3), (2, 9), (4, 1), (1, 5), (3, 0), (0, 3)])
    ]
    batch = collate_pairs(rows, 128, 8)
    tokens_BT, branch_BT = batch.row.tokens_BT, batch.branch_BT
    for side, name in ((0, "chosen_ids"), (1, "rejected_ids")):
        positions_BR, mask_BR = (np.split(x, 2, axis=1)[side] for x in (batch.row.positions_BR, batch.row.mask_BR))
        for b, row in enumerate(rows):
            step, positions = getattr(row, name), positions_BR[b, mask_BR[b]]
            assert tokens_BT[b, positions].tolist() == [row.prompt_ids[-1], *step][: len(step)]
            assert branch_BT[b, positions].tolist() == [0, *[side + 1] * len(step)][: len(step)]


@pytest.mark.parametrize(("chosen", "rejected"), [(1, 150), (150, 1)])
def test_a_pair_is_as_wide_as_its_longer_side(chosen: int, rejected: int) -> None:
    row = PairRow([7], [2] * chosen, [3] * rejected, (0.0, 0.0), (1, 1))
    (batch,) = pair_batches([row], 1, 1, seed=0)
    assert batch.row.tokens_BT.shape == (1, 384)  # half of a row must hold the longer step
    assert [half.sum() for half in np.split(batch.row.mask_BR, 2, axis=1)] == [chosen, rejected]


def test_a_batch_may_hold_no_pair() -> None:
    batch = collate_pairs([], 128, 2)
    assert not batch.real_B.any()
    assert not batch.row.mask_BR.any()
    assert batch.reference[0].tolist() == [0, 0]


@pytest.mark.parametrize(("longest", "room"), [(5, 256), (128, 256), (129, 512)])
def test_short_steps_have_room_for_few_targets(longest: int, room: int) -> None:
    rows = [PairRow([1] * 50, [2] * n, [3], (0.0, 0.0), (1, 1)) for n in (1, longest)]
    batch = collate_pairs(rows, 512, 4)
    assert batch.row.positions_BR.shape == batch.row.targets_BR.shape == batch.row.mask_BR.shape == (4, room)
    assert batch.row.mask_BR.sum(axis=1).tolist() == [2, longest + 1, 0, 0]
    assert batch.row.targets_BR[1, : room // 2].sum() == 2 * longest
    assert batch.row.targets_BR[1, room // 2] == 3


def test_packs_hold_every_sample_once_and_little_padding() -> None:
    rng = random.Random(0)
    rows = [Encoded(str(i), [i % 90 + 1] * rng.randint(5, 60), [i % 90 + 1] * rng.randint(1, 20)) for i in range(200)]
    data = packed_batches(rows, 256, 4, 2, seed=1)
    seen: list[int] = []
    used = 0
    for batch in data:
        assert batch.tokens_BT.shape == (4, 256)
        used += (batch.segment_BT > 0).sum()
        for tokens_T, segment_T, positions_R, targets_R, mask_R in zip(
            batch.tokens_BT, batch.segment_BT, batch.positions_BR, batch.targets_BR, batch.mask_BR, strict=True
        ):
            assert (tokens_T[positions_R[mask_R] + 1] == targets_R[mask_R]).all()
            for segment in range(1, segment_T.max() + 1):
                (tokens,) = {int(t) for t in tokens_T[segment_T == segment]}
                seen.append(int((segment_T == segment).sum()) * 100 + tokens)
    expected = [(len(row.prompt_ids) + len(row.target_ids)) * 100 + row.prompt_ids[0] for row in rows]
    assert sorted(seen) == sorted(expected * 2)
    assert used / (len(data) * 4 * 256) > 0.9
    again = packed_batches(rows, 256, 4, 2, seed=1)
    assert all(np.array_equal(a.tokens_BT, b.tokens_BT) for a, b in zip(data, again, strict=True))
    assert np.array_equal(data[7].tokens_BT, again[7].tokens_BT)  # any batch, without those before it
    assert packed_batches(rows, 16, 4, 1, seed=1)[0].tokens_BT.shape[1] >= 80


def test_rows_are_repeated_or_thinned_to_a_count() -> None:
    assert repeat_or_thin("abc", 0, seed=0) == []
    assert sorted(repeat_or_thin("abc", 3, seed=0)) == ["a", "b", "c"]
    assert sorted(Counter(repeat_or_thin("abc", 8, seed=0)).values()) == [2, 3, 3]
    thinned = {tuple(sorted(repeat_or_thin(range(6), 2, seed))) for seed in range(200)}
    assert all(len(set(chosen)) == 2 for chosen in thinned)
    assert len(thinned) == 15  # every choice comes up
    assert repeat_or_thin(range(100), 9, seed=3) == repeat_or_thin(range(100), 9, seed=3)
