"""Standard errors and paired tests against values known from elsewhere."""

import math

import numpy as np
import pytest

from itool_jax.evaluation.statistics import (
    PairedDifference,
    calibration_error,
    describe,
    hierarchical_bootstrap,
    holm,
    mean_and_standard_error,
    paired_difference,
    roc_auc,
    standard_error,
    wilson_interval,
)


def marks(both: int, only_a: int, only_b: int, neither: int) -> tuple[list[bool], list[bool]]:
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return a, b


@pytest.mark.parametrize(("right", "n", "expected"), [(50, 100, 0.05), (0, 10, 0), (10, 10, 0), (360, 400, 0.015)])
def test_binomial_standard_error(right: int, n: int, expected: float) -> None:
    assert standard_error([True] * right + [False] * (n - right)) == pytest.approx(expected)


def test_nothing_measured_is_nan_without_a_warning() -> None:
    assert math.isnan(standard_error([]))
    assert all(math.isnan(x) for x in mean_and_standard_error([]))
    mean, error = mean_and_standard_error([0.5])
    assert mean == 0.5
    assert math.isnan(error)
    nothing = paired_difference([], [])
    assert math.isnan(nothing.difference)
    assert nothing.n == 0
    assert not nothing.significant


def test_mean_and_standard_error_over_seeds() -> None:
    assert mean_and_standard_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (1, 0, 1.0),
        (5, 0, 0.0625),
        (6, 0, 0.03125),
        (8, 2, 0.109375),  # 2 (1 + 10 + 45) / 1024
        (9, 1, 0.021484375),  # 2 (1 + 10) / 1024
    ],
)
def test_exact_p_values(wins: int, losses: int, p_value: float) -> None:
    result = paired_difference(*marks(7, wins, losses, 3))
    assert (result.wins, result.losses, result.n) == (wins, losses, 10 + wins + losses)
    assert result.p_value == p_value
    assert result.significant == (p_value < 0.05)
    assert paired_difference(*marks(7, losses, wins, 3)).p_value == p_value


def test_p_value_matches_a_simulated_fair_coin() -> None:
    heads = np.random.default_rng(0).binomial(60, 0.5, 200_000)
    simulated = np.mean(np.abs(heads - 30) >= 8)
    assert paired_difference(*marks(0, 38, 22, 0)).p_value == pytest.approx(simulated, abs=0.004)


def test_p_value_of_thousands_of_one_sided_samples_is_zero_not_an_error() -> None:
    result = paired_difference([True] * 5000, [False] * 5000)
    assert result.p_value == 0
    assert result.significant
    assert result.standard_error == 0


def test_difference_and_its_error_are_those_of_the_per_sample_differences() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.random(400) < 0.6, rng.random(400) < 0.5
    result = paired_difference(a.tolist(), b.tolist())
    per_sample = a.astype(float) - b.astype(float)
    assert result.difference == pytest.approx(per_sample.mean())
    assert result.standard_error == pytest.approx(per_sample.std() / 20)
    mirrored = paired_difference(b.tolist(), a.tolist())
    assert mirrored.difference == -result.difference
    assert mirrored.p_value == result.p_value


def test_pairing_sees_what_the_accuracies_alone_hide() -> None:
    paired = paired_difference(*marks(180, 20, 0, 200))
    independent = math.hypot(standard_error([True] * 200 + [False] * 200), standard_error([True] * 180 + [False] * 220))
    assert paired.difference == pytest.approx(0.05)
    assert paired.standard_error < independent / 3


def test_runs_on_different_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="same samples, got 2 and 1 marks"):
        paired_difference([True, False], [True])


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (PairedDifference(0.052, 0.011, 0.00012, 400, 0, 0, True), "+5.2 ± 1.1 points (n=400, p=0.0001)"),
        (PairedDifference(0.052, 0.011, 1e-9, 400, 0, 0, True), "+5.2 ± 1.1 points (n=400, p<0.0001)"),
        (
            PairedDifference(0.01, 0.02, 0.7, 90, 0, 0, False),
            "+1.0 ± 2.0 points (n=90, p=0.7000), no significant gain",
        ),
        (
            PairedDifference(-0.2, 0.02, 0.001, 90, 0, 0, True),
            "-20.0 ± 2.0 points (n=90, p=0.0010), a significant loss",
        ),
        (paired_difference([], []), "no samples to compare, no significant gain"),
    ],
)
def test_described_in_words(difference: PairedDifference, expected: str) -> None:
    assert describe(difference) == expected


def test_an_interval_holds_its_accuracy() -> None:
    for n in range(1, 500):
        assert wilson_interval(1.0, n)[1] == 1.0
        assert wilson_interval(0.0, n)[0] == 0.0


def test_auc_is_how_often_a_right_one_stands_above_a_wrong_one() -> None:
    scores, right = [0.9, 0.5, 0.5, 0.1], [True, True, False, False]
    # Pairs of right and wrong: .9 > .5, .9 > .1, .5 = .5 (half), .5 > .1.
    assert roc_auc(scores, right) == pytest.approx(3.5 / 4)
    assert roc_auc(scores, [not mark for mark in right]) == pytest.approx(0.5 / 4)
    assert roc_auc(scores, [True] * 4) is None
    assert roc_auc([], []) is None


def test_calibration_error_by_hand() -> None:
    # Bins [.9, 1]: mean .95, half right; [.2, .3): .2, none right: (2 * .45 + 1 * .2) / 3.
    assert calibration_error([0.9, 1.0, 0.2], [True, False, False]) == pytest.approx(1.1 / 3)
    assert calibration_error([1.0, 0.0], [True, False]) == 0
    assert calibration_error([], []) is None


# Several seeds -----------------------------------------------------------------------------------------------


def test_equal_differences_leave_the_bootstrap_nothing_to_vary() -> None:
    assert hierarchical_bootstrap([[0.25] * 40] * 3, draws=100) == pytest.approx((0.25, 0.25, 0.25))


def test_the_bootstrap_of_one_seed_is_the_normal_interval_of_its_mean() -> None:
    differences = np.repeat([1.0, 0.0, -1.0], [900, 2700, 400])
    mean, low, high = hierarchical_bootstrap([differences.tolist()], level=0.95, draws=40_000)
    error = differences.std() / math.sqrt(4000)
    assert mean == pytest.approx(0.125)
    assert (low, high) == pytest.approx((mean - 1.959964 * error, mean + 1.959964 * error), abs=error / 20)


def test_seeds_are_drawn_with_replacement() -> None:
    # Of the 27 draws of 3 seeds, one is 0 0 0 and one 2 2 2; three each (0 0 1, 1 2 2) are next.
    seeds = [[0.0] * 5, [1.0] * 5, [2.0] * 5]
    assert hierarchical_bootstrap(seeds, level=0.99) == pytest.approx((1, 0, 2))
    assert hierarchical_bootstrap(seeds, level=0.90) == pytest.approx((1, 1 / 3, 5 / 3))  # tails of 3.7 % and 14.8 %


def test_seeds_that_agree_on_every_sample_are_no_more_than_one() -> None:
    differences = np.random.default_rng(2).choice([-1.0, 0.0, 1.0], 900).tolist()
    once, thrice = (hierarchical_bootstrap([differences] * n, draws=40_000) for n in (1, 3))
    assert thrice == pytest.approx(once, abs=0.004)


def test_the_bootstrap_of_many_seeds_is_the_normal_interval_of_their_means() -> None:
    random = np.random.default_rng(3)
    by_seed = random.normal(0.1, 0.5, (150, 1))  # what differs between seeds dwarfs what differs between samples
    differences = by_seed + random.choice([-0.01, 0.01], (1, 60))
    mean, low, high = hierarchical_bootstrap(differences.tolist(), draws=40_000)
    error = by_seed.std() / math.sqrt(150)
    assert mean == pytest.approx(differences.mean())
    assert (low, high) == pytest.approx((mean - 2.575829 * error, mean + 2.575829 * error), abs=error / 10)


def test_a_bootstrap_comes_out_the_same_every_time() -> None:
    differences = np.random.default_rng(4).choice([-1.0, 0.0, 1.0], (3, 200)).tolist()
    assert hierarchical_bootstrap(differences) == hierarchical_bootstrap(differences)
    assert hierarchical_bootstrap(differences) != hierarchical_bootstrap(differences, seed=1)


@pytest.mark.parametrize("differences", [[], [[]], [[1.0], [1.0, 0.0]]])
def test_a_bootstrap_of_nothing_or_of_different_samples_is_refused(differences: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="a bootstrap needs the same samples"):
        hierarchical_bootstrap(differences)


def test_holm_by_hand() -> None:
    # Sorted: .005 x 4 = .02, .01 x 3 = .03, .03 x 2 = .06, .04 x 1 = .04 but not below the one before.
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(adjusted) == ["a", "b", "c", "d"]
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
