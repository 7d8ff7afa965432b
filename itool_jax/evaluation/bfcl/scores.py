"""Scores responses to BFCL questions, weighted as on the leaderboard."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from itool_jax.evaluation.bfcl.checker import Verdict, check
from itool_jax.evaluation.bfcl.data import LIVE, MULTI_TURN, NON_LIVE, SIMPLE, Question
from itool_jax.evaluation.statistics import (
    PairedDifference,
    paired_difference,
    percentile_interval,
    resampled_accuracies,
)

COLUMNS = ("non-live", "live", "multi-turn", "relevance", "irrelevance", "overall")
"""Columns of the paper's Table 1."""
NEEDED = {
    "non-live": NON_LIVE,
    "live": LIVE,
    "multi-turn": MULTI_TURN,
    "relevance": ("live_relevance",),
    "irrelevance": ("irrelevance", "live_irrelevance"),
    "overall": NON_LIVE + LIVE + MULTI_TURN,
}


class Score(NamedTuple):
    """Score of one category."""

    correct: int
    total: int
    """Number of questions with a response."""
    questions: int
    """Number of questions in the category; a score on only some of them is not official."""
    failed: dict[str, str]
    """Error type by question id."""
    unanswered: int = 0
    """Number answered by the harness instead of the model, for example because the prompt does not fit its context."""

    def kinds(self) -> Counter[str]:
        """Counts failures by error type."""
        return Counter(self.failed.values())


def judge(
    questions: Sequence[Question],
    results: Mapping[str, Any],
    *,
    underscore_to_dot: bool = False,
    function_calling: bool = False,
) -> dict[str, Verdict]:
    """Returns the verdict on each single-turn response by question id, in the order of the questions.

    `underscore_to_dot` and `function_calling` say how the model was asked, as for `check`.
    """
    mode = {"underscore_to_dot": underscore_to_dot, "function_calling": function_calling}
    return {q.id: check(q.functions, results[q.id], q.answer, q.category, **mode) for q in questions if q.id in results}


def score(verdicts: Mapping[str, Verdict], n_questions: int, unanswered: int = 0) -> Score:
    """Returns the score of a category's verdicts; there may be fewer verdicts than questions."""
    failed = {name: str(verdict.error_type) for name, verdict in verdicts.items() if not verdict.valid}
    return Score(len(verdicts) - len(failed), len(verdicts), n_questions, failed, unanswered)


def figures(scores: Mapping[str, Score]) -> dict[str, float | None]:
    """Returns the columns of Table 1 as fractions; None if a category of a column was not run.

    Overall is also None if a category was run only in part.
    """
    accuracy = {name: score.correct / score.total for name, score in scores.items() if score.total}
    columns = _columns(accuracy, scores)
    return {column: columns.get(column) for column in COLUMNS}


class Intervals(NamedTuple):
    """95 % bootstrap intervals; questions are resampled within each category."""

    categories: dict[str, tuple[float, float]]
    columns: dict[str, tuple[float, float]]
    """Intervals of the columns that `figures` returns and that are not None."""


def intervals(scores: Mapping[str, Score], seed: int = 0, n_resamples: int = 10_000) -> Intervals:
    """Returns the intervals of all accuracies, as fractions."""
    random = np.random.default_rng(seed)
    drawn = {
        name: resampled_accuracies(score.correct, score.total, random, n_resamples)
        for name, score in scores.items()
        if score.total
    }
    columns = _columns(drawn, scores)
    return Intervals(*({name: percentile_interval(x) for name, x in side.items()} for side in (drawn, columns)))


def _columns(accuracy: Mapping[str, Any], scores: Mapping[str, Score]) -> dict[str, Any]:
    """Averages accuracies (numbers or arrays of one shape) as the leaderboard does; omits columns that lack inputs."""

    def mean(names: Sequence[str], of: Mapping[str, Any] = accuracy) -> Any:
        return sum(of[name] for name in names) / len(names)

    known = {column for column in COLUMNS if accuracy.keys() >= set(NEEDED[column])}
    columns = {}
    if "non-live" in known:
        others = [name for name in NON_LIVE if name not in SIMPLE]
        columns["non-live"] = mean(["simple", *others], {**accuracy, "simple": mean(SIMPLE)})
    if "live" in known:
        total = sum(scores[name].total for name in LIVE)
        columns["live"] = sum(accuracy[name] * scores[name].total for name in LIVE) / total
    for column in known & {"multi-turn", "relevance", "irrelevance"}:
        columns[column] = mean(NEEDED[column])
    if "overall" in known and all(scores[name].total == scores[name].questions for name in NEEDED["overall"]):
        columns["overall"] = mean(("non-live", "live", "multi-turn"), columns)
    return columns


def paired(now: Score, then: Score) -> PairedDifference:
    """Compares two runs question by question. Raises ValueError if their numbers of questions differ."""
    if now.total != then.total:
        raise ValueError(
            f"{now.total} questions cannot be compared with {then.total}; evaluate both runs on the same questions"
        )
    either = now.failed.keys() | then.failed.keys()
    both_right = [True] * (now.total - len(either))
    marks = ([name not in side.failed for name in either] + both_right for side in (now, then))
    return paired_difference(*marks)


def pooled(scores: Sequence[Score]) -> Score:
    """Pools all questions of several categories into one score."""
    failed = {name: error for score in scores for name, error in score.failed.items()}
    correct, total, questions = (sum(column) for column in list(zip(*scores, strict=True))[:3])
    return Score(correct, total, questions, failed)


def as_json(scores: Mapping[str, Score]) -> dict[str, Any]:
    """Returns `{category: {"correct", "total", "failed": [ids]}}`."""
    return {
        name: {"correct": score.correct, "total": score.total, "failed": list(score.failed)}
        for name, score in scores.items()
    }
