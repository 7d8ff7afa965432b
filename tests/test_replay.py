"""Split, selection and curriculum: functions of ids, scores and seed, whatever the order of the file."""

import math
import random
from collections.abc import Sequence
from typing import TypeVar

import pytest

from itool_jax.text.sample import Sample
from itool_jax.training import replay
from itool_jax.training.replay import CurriculumOrder, DifficultyFeatures, ReplaySettings, ScoredSample

Item = TypeVar("Item")
ORDERS: list[CurriculumOrder] = ["easy_to_hard", "mixed", "hard_to_easy"]
IDS = [f"sample-{i}" for i in range(5000)]


def split(
    ids: Sequence[str], fraction: float, purpose: str, seed: int, together: str = ""
) -> tuple[list[str], list[str]]:
    """Ids of each side, for samples of one turn, or for conversations that an id names before `together`."""
    samples = [Sample(id=i, messages=(), conversation=i.split(together)[0] if together else "") for i in ids]
    first, rest = replay.split(samples, fraction, purpose, seed)
    return [s.id for s in first], [s.id for s in rest]


def shuffled(items: Sequence[Item], seed: int = 0) -> list[Item]:
    return random.Random(seed).sample(items, len(items))


def random_scores(n: int, seed: int = 0) -> list[ScoredSample]:
    rng = random.Random(seed)
    # Few distinct values, so that ties are common.
    return [ScoredSample(f"s{i}", rng.choice([1.0, 1.5, 2.0, 7.5]), rng.random() < 0.7) for i in range(n)]


def random_features(n: int, seed: int = 0) -> list[DifficultyFeatures]:
    rng = random.Random(seed)
    return [DifficultyFeatures(f"s{i}", rng.randint(1, 5), rng.randint(10, 40), rng.randint(0, 3)) for i in range(n)]


# Mixed answers ----------------------------------------------------------------------------------------------


def test_the_most_evenly_mixed_come_first_and_what_is_always_or_never_right_not_at_all() -> None:
    rights = {"never": 0.0, "always": 1.0, "few": 0.125, "half": 0.5, "many": 0.75, "quarter": 0.25, "b": 0.5}
    perplexities = {"half": 1.5, "b": 1.5, "quarter": 9.0}
    scores = [ScoredSample(name, perplexities.get(name, 2.0), True, right) for name, right in rights.items()]
    # p (1 - p): b and half .25, by id; quarter and many .1875, by perplexity; few .109375.
    every = ReplaySettings(hardest_fraction=1.0)
    assert replay.select_mixed(shuffled(scores), every) == ["b", "half", "quarter", "many", "few"]
    # The share is of the pool: three of seven.
    assert replay.select_mixed(shuffled(scores), ReplaySettings(hardest_fraction=3 / 7)) == ["b", "half", "quarter"]
    assert replay.select_mixed([score._replace(right=0.0) for score in scores], every) == []


def test_mixed_texts_are_taken_apart_from_mixed_calls() -> None:
    calls = [ScoredSample(f"call {i}", 1.0, True, 0.5) for i in range(20)]
    texts = [ScoredSample(f"text {i}", 1.0, False, 0.25) for i in range(10)]
    taken = replay.select_mixed(calls + texts, ReplaySettings(hardest_fraction=0.2))
    assert [sum(name.startswith(kind) for name in taken) for kind in ("call", "text")] == [4, 2]


@pytest.mark.parametrize(
    ("texts", "calls", "kept"),
    [
        (15, 85, (15, 85)),
        (10, 90, (10, 90)),  # at the bounds, 10 and 20 %, nothing is left out
        (20, 80, (20, 80)),
        (4, 96, (4, 36)),  # 4 are 10 % of 40
        (40, 60, (15, 60)),  # 15 are 20 % of 75
        (0, 50, (0, 50)),
        (50, 0, (50, 0)),
        (30, 2, (1, 2)),  # one of three is nearest that leaves any
    ],
)
def test_items_are_left_out_until_the_share_is_within_the_margin(texts: int, calls: int, kept: tuple[int, int]) -> None:
    items = [(f"text {i}", True) for i in range(texts)] + [(f"call {i}", False) for i in range(calls)]
    left = replay.keep_share(items, 0.15, 0.05, seed=3)
    assert tuple(sum(id_.startswith(kind) for id_ in left) for kind in ("text", "call")) == kept
    assert replay.keep_share(shuffled(items), 0.15, 0.05, seed=3) == left


# Split ------------------------------------------------------------------------------------------------------


def test_split_is_a_partition_of_about_the_asked_sizes() -> None:
    warmup, kept = split(IDS, 0.9, "replay", seed=0)
    assert sorted(warmup + kept) == sorted(IDS)
    assert abs(len(kept) - 500) < 5 * math.sqrt(5000 * 0.9 * 0.1)


def test_split_does_not_depend_on_file_order_and_does_on_the_seed() -> None:
    assert split(shuffled(IDS), 0.9, "replay", seed=0) == split(IDS, 0.9, "replay", seed=0)
    _, kept = split(IDS, 0.9, "replay", seed=0)
    _, kept_by_another_seed = split(IDS, 0.9, "replay", seed=1)
    assert len(set(kept) & set(kept_by_another_seed)) < len(kept) / 3  # about a tenth, were they independent


def test_an_ids_side_does_not_depend_on_other_ids_or_flip_back_with_the_fraction() -> None:
    _, kept = split(IDS, 0.9, "replay", seed=0)
    _, kept_of_some = split(IDS[::3], 0.9, "replay", seed=0)
    assert kept_of_some == [id_ for id_ in kept if id_ in set(IDS[::3])]
    _, kept_by_more = split(IDS, 0.8, "replay", seed=0)
    assert set(kept) < set(kept_by_more)


def test_splits_for_different_purposes_are_independent() -> None:
    rest, test = split(IDS, 0.9, "test", seed=0)
    assert 0.05 < len(split(rest, 0.9, "replay", seed=0)[1]) / len(rest) < 0.15
    assert 0.05 < len(split(test, 0.9, "replay", seed=0)[1]) / len(test) < 0.15


def test_the_turns_of_a_conversation_stay_together_and_the_order_is_random() -> None:
    turns = [f"{id_}{turn}" for id_ in IDS[:300] for turn in ("", "/2", "/3")]
    sides = split(turns, 0.5, "test", seed=0, together="/")
    for side in sides:
        assert {id_.split("/")[0] for id_ in side} == {id_ for id_ in side if "/" not in id_}
        assert side != sorted(side)
    assert min(map(len, sides)) > 300


def test_split_is_the_same_on_every_machine() -> None:
    ids = [f"id{i}" for i in range(12)]
    assert split(ids, 0.5, "replay", seed=7)[1] == ["id8", "id11", "id4", "id6"]


def test_split_at_its_ends_and_on_nothing() -> None:
    assert sorted(split(IDS, 1.0, "replay", seed=0)[0]) == sorted(IDS)
    assert sorted(split(IDS, 0.0, "replay", seed=0)[1]) == sorted(IDS)
    assert split([], 0.9, "replay", seed=0) == ([], [])


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_split_refuses_impossible_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction must be in"):
        split(IDS, fraction, "replay", seed=0)


def test_repeated_ids_are_refused() -> None:
    message = "sample id 'b' appears 2 times"
    with pytest.raises(ValueError, match=message):
        split(["a", "b", "b"], 0.9, "replay", seed=0)
    with pytest.raises(ValueError, match=message):
        replay.select_hardest([ScoredSample("b", 1.0, True), ScoredSample("b", 2.0, False)], ReplaySettings())
    with pytest.raises(ValueError, match=message):
        replay.curriculum([DifficultyFeatures("b", 1, 1, 1)] * 2, "mixed", seed=0)


# Selection --------------------------------------------------------------------------------------------------


def test_hardest_are_taken_separately_among_calls_and_texts() -> None:
    calls = [ScoredSample(f"call{i}", 10.0 + i, True) for i in range(10)]
    texts = [ScoredSample(f"text{i}", 1.0 + i, False) for i in range(5)]
    assert replay.select_hardest(calls + texts, ReplaySettings()) == ["call9", "call8", "text4"]


def test_ties_go_by_id_and_every_group_gives_at_least_one() -> None:
    scores = [
        ScoredSample(id_, 2.0, is_call) for id_, is_call in [("c", True), ("a", True), ("d", False), ("b", False)]
    ]
    assert replay.select_hardest(scores, ReplaySettings(hardest_fraction=0.01)) == ["a", "b"]
    assert replay.select_hardest(scores[:2], ReplaySettings(hardest_fraction=0.01)) == ["a"]
    assert replay.select_hardest([], ReplaySettings()) == []


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_perplexity_that_is_not_finite_is_the_highest(bad: float) -> None:
    scores = [ScoredSample("a", 1e30, True), ScoredSample("b", bad, True), ScoredSample("c", 3.0, True)]
    for order in (scores, scores[::-1]):
        assert replay.select_hardest(order, ReplaySettings(hardest_fraction=1.0)) == ["b", "a", "c"]


def test_skipping_passes_over_the_very_highest() -> None:
    scores = [ScoredSample(f"{i}", float(i), True) for i in range(10)]
    settings = ReplaySettings(select="perplexity", hardest_fraction=0.3, skip_fraction=0.2)
    assert replay.select_hardest(scores, settings) == ["7", "6", "5"]
    one_left = ReplaySettings(select="perplexity", hardest_fraction=0.1, skip_fraction=0.9)
    assert replay.select_hardest(scores[:1], one_left) == ["0"]


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(("n", "seed"), [(0, 0), (1, 1), (2, 2), (3, 3), (10, 4), (47, 5), (60, 6)])
def test_selection_properties(n: int, seed: int, fraction: float) -> None:
    scores, settings = random_scores(n, seed), ReplaySettings(hardest_fraction=fraction)
    chosen = replay.select_hardest(scores, settings)
    assert chosen == replay.select_hardest(shuffled(scores, seed + 1), settings)
    by_id = {score.id: score for score in scores}
    perplexities = [by_id[id_].perplexity for id_ in chosen]
    assert perplexities == sorted(perplexities, reverse=True)
    for is_call in (True, False):
        group = [score for score in scores if score.is_call == is_call]
        taken = [score for score in group if score.id in chosen]
        left = [score for score in group if score.id not in chosen]
        assert len(taken) == (max(1, round(fraction * len(group))) if group else 0)
        assert all((t.perplexity, rest.id) >= (rest.perplexity, t.id) for t in taken for rest in left)


# Difficulty and curriculum ----------------------------------------------------------------------------------


def test_difficulty_worked_by_hand() -> None:
    features = [
        DifficultyFeatures("a", 1, 100, 3),  # ranks 0, 1 and 2: 3 of 9
        DifficultyFeatures("b", 2, 100, 1),  # ranks 1.5, 1 and 0.5: 3 of 9
        DifficultyFeatures("c", 2, 100, 1),
        DifficultyFeatures("d", 9, 999, 4),  # ranks 3, 3 and 3
    ]
    assert replay.difficulty(features) == pytest.approx([3 / 9, 3 / 9, 3 / 9, 1.0])
    assert replay.difficulty(features)[0] == replay.difficulty(features)[1]  # exactly, or ties would not go by id


def test_difficulty_of_equals_and_of_one_is_the_middle_and_of_none_is_nothing() -> None:
    assert replay.difficulty([DifficultyFeatures(id_, 3, 50, 1) for id_ in "abcde"]) == [0.5] * 5
    assert replay.difficulty([DifficultyFeatures("a", 3, 50, 1)]) == [0.5]
    assert replay.difficulty([]) == []


@pytest.mark.parametrize(("n", "seed"), [(2, 0), (3, 1), (10, 2), (40, 3), (41, 4)])
def test_difficulty_properties(n: int, seed: int) -> None:
    features = random_features(n, seed)
    values = replay.difficulty(features)
    assert all(0 <= value <= 1 for value in values)
    assert sum(values) / n == pytest.approx(0.5)  # ranks with shared ties keep their mean
    rescaled = [f._replace(tools_length=f.tools_length**3 + 7, n_tools=10 * f.n_tools) for f in features]
    assert replay.difficulty(rescaled) == values
    for a, value_a in zip(features, values, strict=True):
        for b, value_b in zip(features, values, strict=True):
            if all(x <= y for x, y in zip(a[1:], b[1:], strict=True)):
                assert value_a <= value_b


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 30, 100])
def test_curriculum_is_three_equal_parts_of_everything_in_any_file_order(n: int, order: CurriculumOrder) -> None:
    features = random_features(n)
    parts = replay.curriculum(features, order, seed=3)
    assert sorted(id_ for part in parts for id_ in part) == sorted(feature.id for feature in features)
    sizes = [len(part) for part in parts]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 1
    assert parts == replay.curriculum(shuffled(features), order, seed=3)


def test_curriculum_rises_or_falls_in_difficulty() -> None:
    features = random_features(91)
    by_id = dict(zip((feature.id for feature in features), replay.difficulty(features), strict=True))
    parts = replay.curriculum(features, "easy_to_hard", seed=0)
    easy, medium, hard = ([by_id[id_] for id_ in part] for part in parts)
    assert max(easy) <= min(medium)
    assert max(medium) <= min(hard)
    assert max(easy) < min(hard)
    assert replay.curriculum(features, "hard_to_easy", seed=0) == parts[::-1]


def test_mixed_parts_are_alike_in_difficulty_and_follow_the_seed() -> None:
    features = random_features(900)
    by_id = dict(zip((feature.id for feature in features), replay.difficulty(features), strict=True))
    parts = replay.curriculum(features, "mixed", seed=0)
    assert all(abs(sum(by_id[id_] for id_ in part) / 300 - 0.5) < 0.06 for part in parts)
    assert parts != replay.curriculum(features, "mixed", seed=1)


def test_ties_in_difficulty_go_by_id() -> None:
    features = [DifficultyFeatures(id_, 1, 1, 1) for id_ in "fbdace"]
    assert replay.curriculum(features, "easy_to_hard", seed=0) == [["a", "b"], ["c", "d"], ["e", "f"]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replay_fraction": 0.0}, r"replay.replay_fraction must be in \(0, 1\), got 0.0"),
        ({"replay_fraction": 1.0}, r"replay.replay_fraction must be in \(0, 1\), got 1.0"),
        ({"hardest_fraction": 0.0}, r"replay.hardest_fraction must be in \(0, 1\], got 0.0"),
        ({"hardest_fraction": math.nan}, r"replay.hardest_fraction must be in \(0, 1\], got nan"),
        ({"skip_fraction": -0.1}, r"replay.skip_fraction must be in \[0, 1\), got -0.1"),
        ({"skip_fraction": 0.9}, "must be at most 1, got 0.9 \\+ 0.2"),
        ({"skip_fraction": 0.1, "select": "mixed"}, "replay.skip_fraction is only for replay.select=perplexity"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReplaySettings(**settings)
