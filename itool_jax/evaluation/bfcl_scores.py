"""Responses to BFCL's questions in, scores as the leaderboard weighs them out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from itool_jax.evaluation.bfcl import Verdict, check
from itool_jax.evaluation.bfcl_data import LIVE, MULTI_TURN, NON_LIVE, SIMPLE, Question

COLUMNS = ("non-live", "live", "multi-turn", "relevance", "irrelevance", "overall")
"""Those of the paper's Table 1."""
_NEEDED = {
    "non-live": NON_LIVE,
    "live": LIVE,
    "multi-turn": MULTI_TURN,
    "relevance": ("live_relevance",),
    "irrelevance": ("irrelevance", "live_irrelevance"),
    "overall": NON_LIVE + LIVE + MULTI_TURN,
}


class Score(NamedTuple):
    """One category's score."""

    correct: int
    total: int
    """Questions that were answered."""
    questions: int
    """Questions there are; a part of them makes no official figure."""
    failed: dict[str, str]
    """Error type by question id."""

    def kinds(self) -> Counter[str]:
        """How many failed by the main kind of error, the part before the colon and what follows a decoder's."""
        return Counter(self.failed.values())


def judge(questions: Sequence[Question], results: Mapping[str, Any]) -> dict[str, Verdict]:
    """The verdict on each single-turn response, by question id, in the order of the questions."""
    return {q.id: check(q.functions, results[q.id], q.answer, q.category) for q in questions if q.id in results}


def score(verdicts: Mapping[str, Verdict], n_questions: int) -> Score:
    """The score of a category's verdicts, of which there may be fewer than questions."""
    failed = {name: str(verdict.error_type) for name, verdict in verdicts.items() if not verdict.valid}
    return Score(len(verdicts) - len(failed), len(verdicts), n_questions, failed)


def figures(scores: Mapping[str, Score]) -> dict[str, float | None]:
    """The columns of Table 1 as fractions; None where a category of a column was not run, overall also where one is partial."""
    accuracy = {name: np.float64(found.correct / found.total) for name, found in scores.items() if found.total}
    totals = {name: found.total for name, found in scores.items()}
    known = {column for column in COLUMNS if accuracy.keys() >= set(_NEEDED[column])}
    if any(found.total < found.questions for found in scores.values()):
        known -= {"overall"}
    weighed = _columns(accuracy, totals, known)
    return {column: float(weighed[column]) if column in weighed else None for column in COLUMNS}


def intervals(scores: Mapping[str, Score], seed: int = 0, n_resamples: int = 10_000) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of the columns that `figures` gives, questions resampled within each category."""
    known = {column for column, figure in figures(scores).items() if figure is not None}
    random = np.random.default_rng(seed)
    # Drawing n answers with replacement, each right with the share observed, is a binomial draw.
    drawn = {
        name: random.binomial(found.total, found.correct / found.total, n_resamples) / found.total
        for name, found in scores.items()
        if found.total
    }
    weighed = _columns(drawn, {name: found.total for name, found in scores.items()}, known)
    return {column: tuple(np.quantile(values, (0.025, 0.975)).tolist()) for column, values in weighed.items()}


def _columns(accuracy: Mapping[str, Any], totals: Mapping[str, int], known: set[str]) -> dict[str, Any]:
    """The leaderboard's averages of accuracies, numbers or arrays of one shape."""

    def mean(values: Sequence[Any]) -> Any:
        return sum(values) / len(values)

    found = {}
    if "non-live" in known:
        simple = mean([accuracy[name] for name in SIMPLE])
        found["non-live"] = mean([simple, *(accuracy[name] for name in NON_LIVE if name not in SIMPLE)])
    if "live" in known:
        found["live"] = sum(accuracy[name] * totals[name] for name in LIVE) / sum(totals[name] for name in LIVE)
    for column in ("multi-turn", "relevance", "irrelevance"):
        if column in known:
            found[column] = mean([accuracy[name] for name in _NEEDED[column]])
    if "overall" in known:
        found["overall"] = mean([found["non-live"], found["live"], found["multi-turn"]])
    return found


def as_json(scores: Mapping[str, Score]) -> dict[str, Any]:
    """`{category: {"correct", "total", "failed": [ids]}}`."""
    return {
        name: {"correct": found.correct, "total": found.total, "failed": list(found.failed)}
        for name, found in scores.items()
    }
