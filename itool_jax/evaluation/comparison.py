"""Compares the benchmark scores of two runs, question by question.

In: scores, and the other run's `scores.json`. Out: the differences, printed and in a file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from itool_jax.config import Config
from itool_jax.evaluation.bfcl import scores as bfcl_scores
from itool_jax.evaluation.bfcl.scores import Score
from itool_jax.evaluation.statistics import PairedDifference, describe
from itool_jax.system.files import write_json
from itool_jax.system.messages import console_out, log
from itool_jax.system.untrusted import read_json


def read_scores(path: Path) -> dict[str, Score]:
    """Reads a `scores.json`. Raises ValueError if the file is missing or has another form."""
    if not path.is_file():
        raise ValueError(f"{path} not found; --against needs the scores.json of another run")
    try:
        content = read_json(path)
        return {
            name: Score(int(row["correct"]), int(row["total"]), int(row["total"]), dict.fromkeys(row["failed"], ""))
            for name, row in content.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not a scores.json: {error!r}") from error


def compare(config: Config, scores: Mapping[str, Score], output: Path | None) -> dict[str, Any]:
    """Compares `scores` with the run in `against`, question by question; prints the differences and writes `output`."""
    assert config.against is not None
    theirs = read_scores(config.against)
    shared = [category for category in scores if category in theirs]
    if not shared:
        raise ValueError(f"{config.against} has none of the categories {', '.join(scores)}")
    differences: dict[str, Any] = {}
    if config.benchmark == "bfcl" and len(shared) > 1:  # API-Bank's categories share questions
        pooled = [bfcl_scores.pooled([side[category] for category in shared]) for side in (scores, theirs)]
        result = bfcl_scores.paired(*pooled)
        differences["all"] = {**result._asdict(), "text": describe(result)}
        console_out.print(f"all {len(shared)} categories against {config.against}: {describe(result)}", soft_wrap=True)
    for category in shared:
        result = bfcl_scores.paired(scores[category], theirs[category])
        ours_failed, theirs_failed = scores[category].failed, theirs[category].failed
        only = {
            "only_here": [name for name in theirs_failed if name not in ours_failed],
            "only_there": [name for name in ours_failed if name not in theirs_failed],
        }
        differences[category] = {**result._asdict(), "text": describe(result), **only}
        console_out.print(f"{category} against {config.against}: {describe(result)}", soft_wrap=True)
        for side, ids in only.items():
            more = " …" if len(ids) > 8 else ""
            console_out.print(
                f"  correct {side.replace('_', ' ')} ({len(ids)}): {' '.join(ids[:8])}{more}", soft_wrap=True
            )
    if output is not None:
        write_json(output, differences)
        log(f"questions that only one run answers correctly are listed in {output}")
    return differences


def fallen(differences: Mapping[str, PairedDifference]) -> list[str]:
    """Returns a line for each category with fewer right answers than before, with the significance of the drop."""
    lines = []
    for category, x in differences.items():
        if x.difference < 0:
            doubt = "significant" if x.significant else "not significant"
            points = f"{100 * x.difference:+.1f} ± {100 * x.standard_error:.1f} points"
            lines.append(f"{category} {points} (n={x.n}, p={x.p_value:.4f}, {doubt})")
    return lines
