"""Right-or-wrong marks of samples in; standard errors, paired tests and one line of plain words out."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

SIGNIFICANCE_LEVEL = 0.05


class PairedDifference(NamedTuple):
    """Run a against run b on the same samples; accuracies are fractions, positive means that a is better."""

    difference: float
    standard_error: float
    p_value: float
    n: int
    wins: int
    losses: int
    significant: bool


def standard_error(correct: Sequence[bool]) -> float:
    """Binomial standard error sqrt(p(1-p)/n) of an accuracy, as a fraction; nan for no samples."""
    if len(correct) == 0:
        return math.nan
    p = float(np.mean(np.asarray(correct, dtype=bool)))
    return math.sqrt(p * (1 - p) / len(correct))


def wilson_interval(accuracy: float, n: int) -> tuple[float, float]:
    """The 95 % score interval of an accuracy over n > 0 samples; unlike ± 1.96 standard errors it holds near 0 and 1.

    Wilson (1927), https://doi.org/10.1080/01621459.1927.10502953.
    """
    z2 = 1.959964**2
    middle, half = accuracy + z2 / (2 * n), math.sqrt(z2 * (accuracy * (1 - accuracy) + z2 / (4 * n)) / n)
    low, high = (middle - half) / (1 + z2 / n), (middle + half) / (1 + z2 / n)
    return max(0.0, min(low, accuracy)), min(
        1.0, max(high, accuracy)
    )  # rounded, a bound could miss an accuracy of 0 or 1


def resampled_accuracies(correct: int, total: int, random: np.random.Generator, n_resamples: int) -> np.ndarray:
    """Accuracies, shape (n_resamples,), of bootstrap resamples of `total` answers, `correct` of them right.

    Drawing answers with replacement, each right with the share observed, is a binomial draw.
    """
    return random.binomial(total, correct / total, n_resamples) / total


def percentile_interval(resampled: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of bootstrapped figures."""
    low, high = np.quantile(resampled, (0.025, 0.975))
    return float(low), float(high)


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over independent runs (seeds) and its standard error; nan where undefined, as the error of one."""
    if len(values) == 0:
        return math.nan, math.nan
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), error


def paired_difference(a: Sequence[bool], b: Sequence[bool]) -> PairedDifference:
    """Accuracy of a minus accuracy of b, marked sample by sample in the same order: McNemar's exact test.

    Wins are samples that only a gets right, losses those that only b does; the two-sided p-value asks whether
    a fair coin would have split them so unevenly. Raises ValueError where the lengths differ.
    """
    if len(a) != len(b):
        raise ValueError(f"paired runs must mark the same samples, got {len(a)} and {len(b)} marks")
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
    """A mean over seeds and samples of paired differences, with a bootstrap interval; all are fractions."""

    mean: float
    low: float
    high: float


def hierarchical_bootstrap(
    differences: Sequence[Sequence[float]], *, level: float = 0.99, draws: int = 10_000, seed: int = 0
) -> MeanDifference:
    """The mean difference of two arms over seeds and samples, and the percentile interval of a two-level bootstrap.

    Each draw resamples the seeds with replacement, then the samples, and takes the mean. All seeds of a draw share its
    samples, because they share the test part: if each seed drew its own, a sample that is hard for every seed would
    count as many independent ones, and the interval would be too narrow. (Owen 2007, the pigeonhole bootstrap,
    https://doi.org/10.1214/07-AOAS122.) Time and memory grow with the number of distinct columns, which is at most
    3 ** seeds for right-or-wrong marks.

    Args:
        differences: for each seed, one arm's mark minus the other's by sample, all in one order: [seeds][samples].
        level: share of the draws that the interval holds.
        draws: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: there is no seed or no sample, or the seeds have different numbers of samples.
    """
    if len({len(row) for row in differences}) != 1 or not len(differences[0]):
        counts = [len(row) for row in differences]
        raise ValueError(f"a bootstrap needs one or more seeds with the same samples, got {counts} samples by seed")
    random, S = np.random.default_rng(seed), len(differences)
    # Samples with equal differences in all seeds are alike: it is enough to draw how often each kind comes.
    kinds_SK, counts_K = np.unique(np.asarray(differences, dtype=float), axis=1, return_counts=True)
    n = counts_K.sum()
    means_DS = random.multinomial(n, counts_K / n, draws) @ kinds_SK.T / n
    weights_DS = random.multinomial(S, np.full(S, 1 / S), draws) / S
    low, high = np.quantile((means_DS * weights_DS).sum(axis=1), ((1 - level) / 2, (1 + level) / 2))
    return MeanDifference(float((kinds_SK @ counts_K).mean() / n), float(low), float(high))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted for their number by Holm's step-down method, in the order given.

    Rejecting those below a level keeps the chance of any false rejection below it. Holm (1979),
    https://www.jstor.org/stable/4615733.
    """
    adjusted, largest = {}, 0.0
    for rank, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_value))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def describe(difference: PairedDifference) -> str:
    """One line in percentage points: "+5.2 ± 1.1 points (n=400, p=0.0001)"; says where nothing was gained."""
    if difference.n == 0:
        return "no samples to compare, no significant gain"
    p_text = "p<0.0001" if difference.p_value < 0.0001 else f"p={difference.p_value:.4f}"
    gain, error = 100 * difference.difference, 100 * difference.standard_error
    line = f"{gain:+.1f} ± {error:.1f} points (n={difference.n}, {p_text})"
    if not difference.significant:
        return f"{line}, no significant gain"
    return line if difference.difference > 0 else f"{line}, a significant loss"


def _sign_test(wins: int, losses: int) -> float:
    """Exact two-sided binomial p-value at one half, in integers, so that no count is too large."""
    n, k = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def roc_auc(scores: Sequence[float], right: Sequence[bool]) -> float | None:
    """How often a right one is scored above a wrong one, ties counting half; None where either is missing."""
    scores_N, right_N = np.asarray(scores), np.asarray(right, dtype=bool)
    n_right, n_wrong = int(right_N.sum()), int((~right_N).sum())
    if not n_right or not n_wrong:
        return None
    ordered = np.sort(scores_N)
    ranks_N = (np.searchsorted(ordered, scores_N, "left") + np.searchsorted(ordered, scores_N, "right") + 1) / 2
    return float((ranks_N[right_N].sum() - n_right * (n_right + 1) / 2) / (n_right * n_wrong))


def calibration_error(probabilities: Sequence[float], right: Sequence[bool], bins: int = 10) -> float | None:
    """Mean distance between the probability of being right and the share that is right, over bins of equal width.

    The expected calibration error (https://arxiv.org/abs/1706.04599, eq 3); None for no values.
    """
    if len(probabilities) == 0:
        return None
    p_N, right_N = np.asarray(probabilities), np.asarray(right, dtype=float)
    bin_N = np.clip((p_N * bins).astype(int), 0, bins - 1)
    gaps = [abs((p_N[bin_N == b] - right_N[bin_N == b]).sum()) for b in np.unique(bin_N)]
    return float(sum(gaps) / len(p_N))
