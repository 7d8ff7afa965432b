"""Measures our BFCL and API-Bank checkers against the official ones: `python -m benchmarks.checker`.

Shows how far they agree, how fast and how safe ours are. In: the public data (ITOOL_SHARED, default ../shared): cases
with official verdicts, and real outputs of two models with official scores. Out: a table of agreement by category,
cases per second, and with --fuzz=N the slowest of N mutated outputs; as JSON with --json=FILE. Any exception but the
reader's own ends the program.
"""

import dataclasses
import gzip
import itertools
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from itool_jax.evaluation import api_bank
from itool_jax.evaluation.bfcl import data as bfcl_data
from itool_jax.evaluation.bfcl import scores as bfcl_scores
from itool_jax.evaluation.bfcl.checker import check
from itool_jax.text.calls import Call, read_calls

Row = dict[str, Any]
PIECES = (
    *(
        "[",
        "]",
        "(",
        ")",
        "{",
        "}",
        ",",
        "=",
        "'",
        '"',
        "\\",
        "\n",
        "`",
        " ",
        ".",
        ":",
        "-",
        "not ",
        "lambda: ",
        "**",
        "*",
    ),
    *("f(", "a=1", "[[", "]]", "((", "))", "{{", "}}", "'''", '"""', "\\x", "\\N{", "\0", "é", "\ud800", "9" * 5000),
    *("new HashMap<>() {{ put(", "new ArrayList<>(Arrays.asList(", "new int[]{", "new Array(", "`${", "//", "/*", "#"),
    *("2**9**9", "'a'*9**9", "%9999999999d", "1e999", "0x", "1_0", "1j", "f'{x}'", "b'a'", "...", "None", "true", "@"),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of the comparison."""

    fuzz: int = 0
    """Number of mutated outputs to check as well."""
    seed: int = 0
    """Random seed of the mutations."""
    json: Path | None = None
    """File to write the figures to."""


def read(path: Path) -> list[Row]:
    """Reads the rows of a gzipped JSONL file."""
    with gzip.open(path, "rt") as file:
        return [json.loads(line) for line in file]


def verdict(row: Row) -> tuple[bool, str | None]:
    """Returns our verdict on a case."""
    dots = row.get("underscore_to_dot", False)
    return check(row["functions"], row["model_output"], row["possible_answer"], row["category"], underscore_to_dot=dots)


def cases(rows: list[Row]) -> Row:
    """Computes agreement by category, over the cases on which the official decoders of v3 and v4 agree."""
    counts: dict[str, Counter[str]] = {}
    start = time.perf_counter()
    verdicts = [verdict(row) for row in rows]
    seconds = time.perf_counter() - start
    for row, (valid, error) in zip(rows, verdicts, strict=True):
        count = counts.setdefault(row["category"], Counter())
        if "verdict_v3" in row:
            count["marked"] += 1
            count["marked_equal"] += valid == row["verdict_v3"]
            continue
        count["n"] += 1
        count["equal"] += valid == row["verdict"]
        kinds = [str(kind).partition(":")[0] for kind in (error, row["error_type"])]
        count["same_kind"] += valid == row["verdict"] and kinds[0] == kinds[1]
    return {"categories": {name: dict(count) for name, count in counts.items()}, "per_second": len(rows) / seconds}


def outputs(shared: Path) -> Row:
    """Compares counts and failing ids on real outputs with the official ones, by category."""
    categories, n, seconds = {}, 0, 0.0
    for folder in sorted((shared / "data/bfcl_outputs").iterdir()):
        official = json.loads((folder / "official_scores.json").read_text())
        for category, path in bfcl_data.find_results(folder).items():
            questions = bfcl_data.load_questions(shared / "data/bfcl_v3", category)
            responses = bfcl_data.read_results(path, questions)
            start = time.perf_counter()
            score = bfcl_scores.score(bfcl_scores.judge(questions, responses), len(questions))
            seconds += time.perf_counter() - start
            n += score.total
            theirs = official[category]
            categories[f"{folder.name} {category}"] = {
                "correct": score.correct,
                "official": theirs["correct_count"],
                "total": score.total,
                "same_ids": score.failed.keys() == theirs["failed"].keys(),
                "same_error_types": score.failed == theirs["failed"],
            }
    return {"categories": categories, "n": n, "per_second": n / seconds}


def api_bank_cases(rows: list[Row]) -> Row:
    """Computes agreement with the official evaluator, which executes calls."""
    answers = [Call(row["ground_truth"]["api_name"], row["ground_truth"]["param_dict"]) for row in rows]
    equal = [
        api_bank.check(row["model_output"], answer).valid == row["verdict"]
        for row, answer in zip(rows, answers, strict=True)
    ]
    return {
        "n": len(equal),
        "equal": sum(equal),
        "others": [r["id"] for r, e in zip(rows, equal, strict=True) if not e],
    }


def mutations(texts: list[str], seed: int) -> Iterator[str]:
    """Yields texts that are cut, repeated, nested, spliced and sprinkled with pieces that readers stumble over."""
    chance = random.Random(seed)
    while True:
        text = chance.choice(texts)
        for _ in range(chance.randint(1, 4)):
            at, to = sorted(chance.choices(range(len(text) + 1), k=2))
            piece = chance.choice(PIECES)
            match chance.randrange(6):
                case 0:
                    text = text[:at] + text[to:]
                case 1:
                    text = text[:at] + piece + text[at:]
                case 2:
                    text = text[:at] + text[at:to] * chance.randint(2, 9) + text[to:]
                case 3:
                    text = text[:at] + piece * chance.choice((2, 50, 500)) + text[at:]
                case 4:
                    text = text[:at] + chance.choice(texts)[-50:] + text[to:]
                case _:
                    text = text[:at] + piece + text[to:]
        yield text[:200_000]


def fuzz(rows: list[Row], n: int, seed: int) -> Row:
    """Checks and reads `n` mutated outputs; returns the slowest, in seconds, and how many could still be read."""
    texts = mutations([row["model_output"] for row in rows], seed)
    slowest, right, read_count, start = (0.0, ""), 0, 0, time.perf_counter()
    for number, text in enumerate(itertools.islice(texts, n)):
        began = time.perf_counter()
        right += verdict({**rows[number % len(rows)], "model_output": text})[0]
        read_count += read_calls(text) is not None
        api_bank.read_call(text)
        slowest = max(slowest, (time.perf_counter() - began, text[:200]))
    return {
        "n": n,
        "seconds": time.perf_counter() - start,
        "slowest_s": slowest[0],
        "slowest": slowest[1],
        "right": right,
        "read": read_count,
    }


def main(settings: Settings) -> None:
    """Runs the comparison, prints the results and writes the JSON."""
    shared = Path(os.environ.get("ITOOL_SHARED") or "../shared")
    rows = read(shared / "data/bfcl_v3/checker_cases_dev.jsonl.gz")
    results: Row = {
        "cases": cases(rows),
        "outputs": outputs(shared),
        "api_bank": api_bank_cases(read(shared / "data/api_bank/checker_cases_dev.jsonl.gz")),
    }
    print(f"{'cases':24} {'equal':>9} {'same kind':>9} {'v3 only':>10}")
    for name, c in results["cases"]["categories"].items():
        marked = f"{c['marked_equal']}/{c['marked']}" if "marked" in c else ""
        print(f"{name:24} {c['equal']:>4}/{c['n']:<4} {c['same_kind']:>9} {marked:>10}")
    print(f"{results['cases']['per_second']:.0f} cases per second\n\n{'outputs':56} ours official of  same ids, errors")
    for name, c in results["outputs"]["categories"].items():
        same = f"{c['same_ids']}, {c['same_error_types']}"
        print(f"{name:56} {c['correct']:>4} {c['official']:>8} {c['total']:>4} {same}")
    print(f"{results['outputs']['n']} outputs, {results['outputs']['per_second']:.0f} per second")
    print(f"API-Bank: {results['api_bank']['equal']} of {results['api_bank']['n']} verdicts equal")
    if settings.fuzz:
        results["fuzz"] = fuzz(rows, settings.fuzz, settings.seed)
        print(
            "fuzz: {n} outputs in {seconds:.0f} s, slowest {slowest_s:.3f} s, {read} parsed".format(**results["fuzz"])
        )
    if settings.json is not None:
        settings.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Settings, prog="python -m benchmarks.checker"))
