"""Padding: few widths, nothing lost, and positions that predict their targets."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from itool_jax.text.padding import SMALLEST_WIDTH, bucket, collate, group, pad, target_width

ids = st.lists(st.integers(1, 99), max_size=12)


def test_the_buckets_are_powers_of_two_and_the_halves_or_quarters_between() -> None:
    assert sorted({bucket(n) for n in range(1100)}) == [128, 192, 256, 384, 512, 640, 768, 896, 1024, 1280]


@pytest.mark.parametrize("smallest", [1, 48, 64, 96, SMALLEST_WIDTH, 256])
def test_a_bucket_holds_its_length_and_wastes_little(smallest: int) -> None:
    widths = [bucket(n, smallest) for n in range(3000)]
    assert widths == sorted(widths)
    assert widths[0] == smallest
    assert all(bucket(width, smallest) == width for width in widths)
    assert all(n <= width < max(1.5 * n, smallest + 1) for n, width in enumerate(widths))


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_target_fits_into_half_its_row(prompt_length: int, target_length: int) -> None:
    width = target_width(prompt_length, target_length)
    assert width >= prompt_length + target_length
    assert width // 2 >= target_length
    assert width == bucket(width)


@given(st.lists(ids, min_size=1, max_size=5), st.integers(0, 3))
def test_pad_keeps_every_token(rows: list[list[int]], missing: int) -> None:
    tokens_BT, length_B = pad(rows, 12, len(rows) + missing)
    assert tokens_BT.shape == (len(rows) + missing, 12)
    assert tokens_BT.dtype == length_B.dtype == np.int32
    assert [row[:n].tolist() for row, n in zip(tokens_BT, length_B, strict=True)] == rows + [[]] * missing
    assert not tokens_BT[np.arange(12) >= length_B[:, None]].any()
    assert np.array_equal(pad(rows, 12)[0], tokens_BT[: len(rows)])


@given(st.lists(st.tuples(ids.filter(len), ids), min_size=1, max_size=5), st.integers(0, 3))
def test_each_position_is_the_one_before_its_target(rows: list[tuple[list[int], list[int]]], missing: int) -> None:
    batch = collate(rows, 24, len(rows) + missing)
    assert batch.tokens_BT.shape == (len(rows) + missing, 24)
    assert batch.positions_BR.shape == batch.targets_BR.shape == batch.mask_BR.shape == (len(rows) + missing, 12)
    for b, (prompt, target) in enumerate(rows):
        mask_R = batch.mask_BR[b]
        assert batch.tokens_BT[b, : len(prompt) + len(target)].tolist() == prompt + target
        assert batch.targets_BR[b, mask_R].tolist() == target
        assert batch.tokens_BT[b, batch.positions_BR[b, mask_R] + 1].tolist() == target
        assert batch.positions_BR[b, mask_R].tolist() == [len(prompt) - 1 + i for i in range(len(target))]
    assert not batch.mask_BR[len(rows) :].any()
    assert batch.positions_BR.min() >= 0  # a padded row must not wrap round to its end


@given(st.lists(st.integers(0, 2000), max_size=60), st.sampled_from([1, 512, 4096]), st.sampled_from([1, 2, 8]))
def test_groups_cover_every_row_once_within_the_budget(lengths: list[int], budget: int, devices: int) -> None:
    widths = [bucket(n) for n in lengths]
    batches = list(group(widths, budget, devices))
    for chosen, width, rows in batches:
        assert 0 < len(chosen) <= rows
        assert rows % devices == 0
        assert rows == devices or rows * width <= budget
        assert max(widths[i] for i in chosen) <= width
        assert width in widths
        assert rows < 2 * max(devices, len(chosen))
    seen = [i for chosen, _, _ in batches for i in chosen]
    assert sorted(seen) == list(range(len(widths)))
    assert [widths[i] for i in seen] == sorted(widths)


@given(st.lists(st.integers(0, 2000), max_size=60), st.integers(0, 20))
def test_the_rows_of_the_first_batches_can_be_omitted(lengths: list[int], n: int) -> None:
    batches = list(group([bucket(length) for length in lengths], 4096))
    rest = sorted(i for chosen, _, _ in batches[n:] for i in chosen)
    again = group([bucket(lengths[i]) for i in rest], 4096)
    assert [([rest[i] for i in chosen], *shape) for chosen, *shape in again] == [tuple(batch) for batch in batches[n:]]


SEAL_TOOLS = [512, 1085, 1162, 1216, 1268, 1319, 1365, 1420, 1487, 1583, 2335]
"""Deciles of the prompt lengths of Seal-Tools: ten candidate tools as JSON, SmolLM2's tokenizer."""


@pytest.mark.parametrize(
    ("n", "scale", "share"), [(20, 1, 0.8), (124, 1, 0.85), (2054, 1, 0.9), (124, 0.2, 0.75), (2054, 0.2, 0.75)]
)
def test_real_lengths_take_few_programs_and_little_padding(n: int, scale: float, share: float) -> None:
    at = np.random.default_rng(0).random(n)
    lengths = (scale * np.interp(at, np.linspace(0, 1, 11), SEAL_TOOLS)).astype(int).tolist()
    batches = list(group([bucket(length) for length in lengths], 16384))
    assert sum(lengths) / sum(width * rows for _, width, rows in batches) > share
    assert len({(width, rows) for _, width, rows in batches}) <= 12


@pytest.mark.parametrize(("n", "share", "programs"), [(20, 0.7, 4), (124, 0.7, 8), (2000, 0.85, 12)])
def test_mixed_lengths_take_few_programs_and_little_padding(n: int, share: float, programs: int) -> None:
    lengths = [(150, 290, 520, 780, 1300)[i % 5] * (85 + i * 37 % 30) // 100 for i in range(n)]
    batches = list(group([bucket(length) for length in lengths], 16384))
    assert sum(lengths) / sum(width * rows for _, width, rows in batches) > share
    assert len({(width, rows) for _, width, rows in batches}) <= programs
