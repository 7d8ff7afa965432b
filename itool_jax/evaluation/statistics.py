"""Statistics of right-or-wrong marks: standard errors, intervals, paired tests and one-line descriptions."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

SIGNIFICANCE_LEVEL = 0.05


class PairedDifference(NamedTuple):
    """Difference between runs a and b on the same samples, as fractions; positive means that a is better."""

    difference: float
    standard_error: float
    p_value: float
    n: int
    wins: int
    losses: int
    significant: bool


def standard_error(correct: Sequence[bool]) -> float:
    """Returns the binomial standard error sqrt(p(1-p)/n) of an accuracy, as a fraction; nan for no samples."""
    if len(correct) == 0:
        return math.nan
    p = float(np.mean(np.asarray(correct, dtype=bool)))
    return math.sqrt(p * (1 - p) / len(correct))


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """Returns the 95 % score interval of an accuracy over n > 0 samples.

    Unlike ± 1.96 standard errors, it is valid near 0 and 1.
    Wilson (1927), https://doi.org/10.1080/01621459.1927.10502953.
    """
    z2 = 1.959964**2
    middle, half = accuracy + z2 / (2 * n), math.sqrt(z2 * (accuracy * (1 - accuracy) + z2 / (4 * n)) / n)
    low, high = (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)
    return max(0.0, min(low, accuracy)), min(
        1.0, max(high, accuracy)
    )  # rounding could move a bound past an accuracy of 0 or 1


def resampled_accuracies(correct: int, total: int, random: np.random.Generator, n_resamples: int) -> np.ndarray:
    """Returns the accuracies, shape (n_resamples,), of bootstrap resamples of `total` answers with `correct` right.

    Drawing answers with replacement, each right with the observed share, is a binomial draw.
    """
    return random.binomial(total, correct / total, n_resamples) / total


def percentile_interval(resampled: np.ndarray) -> tuple[float, float]:
    """Returns the 95 % percentile interval of bootstrapped figures."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(low), float(high)


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns mean and standard error over independent runs (seeds); nan if undefined, such as the error of one run."""
    if len(values) == 0:
        return math.nan, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> PairedDifference:
    """Computes the accuracy of a minus that of b, with marks in the same sample order, and McNemar's exact test.

    Wins are samples that only a gets right, losses those that only b gets right. The two-sided p-value is the
    probability that a fair coin splits them at least this unevenly. Raises ValueError if the lengths differ.
    """
    if len(a) != len(b):
        raise ValueError(f"paired runs must cover the same samples, got {len(a)} and {len(b)} marks")
    n = len(a)
    a_right, b_right = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    wins, losses = int(np.sum(a_right & ~b_right)), int(np.sum(b_right & ~a_right))
    p_value = _sign_test(wins, losses)
    if n == 0:
        return PairedDifference(math.nan, math.nan, p_value, n, wins, losses, significant=False)
    difference = (wins - losses) / n
    error = math.sqrt(((wins + losses) / n - difference**2) / n)
    return PairedDifference(difference, error, p_value, n, wins, losses, significant=p_value < SIGNIFICANCE_LEVEL)


class MeanDifference(NamedTuple):
    """Mean of paired differences over seeds and samples, with a bootstrap interval; all are fractions."""

    mean: float
    low: float
    high: float


def hierarchical_bootstrap(
    differences: Sequence[Sequence[float]], *, level: float = 0.99, draws: int = 10_000, seed: int = 0
) -> MeanDifference:
    """Returns the mean difference of two arms over seeds and samples, with the interval of a two-level bootstrap.

    Each draw resamples the seeds with replacement, then the samples, and takes the mean. All seeds of a draw use the
    same resampled samples, because they share the test part. If each seed drew its own, a sample that is hard for every
    seed would count as many independent ones, and the interval would be too narrow (Owen 2007, the pigeonhole
    bootstrap, https://doi.org/10.1214/07-AOAS122). Time and memory grow with the number of distinct columns, which is
    at most 3 ** seeds for right-or-wrong marks.

    Args:
        differences: for each seed, one arm's mark minus the other's by sample, in one order: [seeds][samples].
        level: share of the draws inside the percentile interval.
        draws: number of bootstrap draws.
        seed: random seed of the draws.

    Raises:
        ValueError: there is no seed or no sample, or the seeds have different numbers of samples.
    """
    if len({len(row) for row in differences}) != 1 or not len(differences[0]):
        counts = [len(row) for row in differences]
        raise ValueError(
            f"a bootstrap needs the same samples, at least one, for every seed, got {counts} samples by seed"
        )
    random, S = np.random.default_rng(seed), len(differences)
    # Samples with equal differences in all seeds are interchangeable, so it is enough to draw the count of each kind.
    kinds_SK, counts_K = np.unique(np.asarray(differences, dtype=float), axis=1, return_counts=True)
    n = counts_K.sum()
    means_DS = random.multinomial(n, counts_K / n, draws) @ kinds_SK.T / n
    weights_DS = random.multinomial(S, np.full(S, 1 / S), draws) / S
    low, high = np.quantile((means_DS * weights_DS).sum(axis=1), ((1 - level) / 2, (1 + level) / 2))
    return MeanDifference(float((kinds_SK @ counts_K).mean() / n), float(low), float(high))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusts p-values for multiple tests by Holm's step-down method; the order is kept.

    Rejecting those below a level keeps the chance of any false rejection below that level. Holm (1979),
    https://www.jstor.org/stable/4615733.
    """
    adjusted, largest = {}, 0.0
    for rank, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_value))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def describe(difference: PairedDifference) -> str:
    """Describes a difference in percentage points, "+5.2 ± 1.1 points (n=400, p=0.0001)", and says if it is no gain."""
    if difference.n == 0:
        return "no samples to compare, no significant gain"
    p_text = "p<0.0001" if difference.p_value < 0.0001 else f"p={difference.p_value:.4f}"
    gain, error = 100 * difference.difference, 100 * difference.standard_error
    line = f"{gain:+.1f} ± {error:.1f} points (n={difference.n}, {p_text})"
    if not difference.significant:
        return f"{line}, no significant gain"
    return line if difference.difference > 0 else f"{line}, a significant loss"


def _sign_test(wins: int, losses: int) -> float:
    """Returns the exact two-sided binomial p-value at one half; integer arithmetic allows counts of any size."""
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def roc_auc(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """Returns the share of (right, wrong) pairs whose right one scores higher; ties count half. None without pairs."""
    scores_N, right_N = np.asarray(scores), np.asarray(right, dtype=bool)
    n_right, n_wrong = int(right_N.sum()), int((~right_N).sum())
    if not n_right or not n_wrong:
        return None
    ordered = np.sort(scores_N)
    ranks_N = (np.searchsorted(ordered, scores_N, "left") + np.searchsorted(ordered, scores_N, "right") + 1) / 2
    return float((ranks_N[right_N].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


def calibration_error(probabilities: Sequence[float], right: Sequence[bool], bins: int = 10) -> float | None:
    """Computes the expected calibration error (https://arxiv.org/abs/1706.04599, eq 3); None for no values.

    This is the mean distance between the predicted probability and the share that is right, over bins of equal width.
    """
    if len(probabilities) == 0:
        return None
    p_N, right_N = np.asarray(probabilities), np.asarray(right, dtype=float)
    bin_N = np.clip((p_N * bins).astype(int), 0, bins - 1)
    gaps = [abs((p_N[bin_N == b] - right_N[bin_N == b]).sum()) for b in np.unique(bin_N)]
    return float(sum(gaps) / len(p_N))
