"""Prepares the search trees of a run for its report.

In: `trees.jsonl` and `pairs.jsonl` of an iteration, and the samples that were searched. Out: an index entry and compact
JSON for each tree, and figures of the iteration's search.
"""

import functools
import itertools
import re
import statistics as numbers
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from itool_jax.data import sources
from itool_jax.evaluation.errors import error_kind
from itool_jax.evaluation.results import is_solved
from itool_jax.mcts.search import RIGHT
from itool_jax.report.page import as_json
from itool_jax.store import columns
from itool_jax.store.cache import Figures
from itool_jax.store.tables import NodeRow, PreferenceRow, TreeRow
from itool_jax.text.sample import Row, Sample

NODE = ("parent", "text", "visits", "q", "value", "prior", "outcome", "confidence", "terminal", "gold", "sampled")
"""Fields of a node that the report keeps, in this order."""
PAIR = ("node", "chosen_node", "rejected_node", "q_chosen", "q_rejected")
STOP = re.compile(r"(?:<[^<>\s]{1,40}>\s*)+$")
"""The stop tokens at the end of a response, as tokenizers write them."""
LONGEST_STOP = 200
"""Maximum characters of these stop tokens."""
ROUNDED = 5
SHORT = 240
GAPS = [0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0]
"""Bin edges for gaps in Q; the last bin is open."""


class ReportTree(NamedTuple):
    """A tree's index entry, and the tree as JSON."""

    entry: Figures
    text: str


@functools.lru_cache(maxsize=3)
def samples(path: Path, changed: int) -> dict[str, Sample]:
    """Returns the samples of a split by id; rereads the file only if it has changed."""
    del changed  # part of the cache's key
    return {sample.id: sample for sample in sources.load(path)} if path.stat().st_size else {}


def prompt(sample: Sample, number: Callable[[Sequence[Row]], int]) -> Figures:
    """Returns what the model sees of a sample; `number` maps a list of tools to its index."""
    messages = [{"role": str(m.get("role")), "content": _content(m)} for m in sample.messages]
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return {"question": asked[-1] if asked else "", "messages": messages, "tools": number(sample.tools)}


def _content(message: Row) -> str:
    content = message.get("content")
    return content if isinstance(content, str) else "" if content is None else as_json(content)


def trees(phase: Path, run_dir: Path, number: Callable[[Sequence[Row]], int]) -> list[ReportTree]:
    """Returns the trees of an iteration in the order they were searched."""
    train = run_dir / "data/train.jsonl"
    known = samples(train, train.stat().st_mtime_ns) if train.is_file() else {}
    rows, pairs = _tables(phase)
    by_tree: dict[str, list[PreferenceRow]] = {}
    for pair in pairs:
        by_tree.setdefault(pair.tree, []).append(pair)
    return [_report_tree(row, by_tree.get(row.id, []), known.get(row.id), phase.name, number) for row in rows]


def _tables(phase: Path) -> tuple[list[TreeRow], list[PreferenceRow]]:
    """Returns the trees and pairs of an iteration; empty before its search."""
    files = [phase / name for name in ("trees.jsonl", "pairs.jsonl")]
    if not all(path.is_file() for path in files):
        return [], []
    times = [path.stat().st_mtime_ns for path in files]
    return _trees(files[0], times[0]), _pairs(files[1], times[1])


@functools.lru_cache(maxsize=16)
def _trees(path: Path, _: int) -> list[TreeRow]:
    return columns.read_table(path, TreeRow, ["id", "gold", "nodes"])


@functools.lru_cache(maxsize=16)
def _pairs(path: Path, _: int) -> list[PreferenceRow]:
    return columns.read_table(path, PreferenceRow, ["tree", *PAIR, "chosen_ids", "rejected_ids"])


def _report_tree(
    row: TreeRow,
    pairs: Sequence[PreferenceRow],
    sample: Sample | None,
    phase: str,
    number: Callable[[Sequence[Row]], int],
) -> ReportTree:
    shown = prompt(sample or Sample(id=row.id, messages=()), number)
    ends = {n: _kind(row, n) for n, node in enumerate(row.nodes) if node.terminal}
    entry = {
        "phase": phase,
        "id": row.id,
        "question": shown["question"][:SHORT],
        "solved": is_solved(row.nodes),
        "by_gold": is_solved(row.nodes, own=False) and not is_solved(row.nodes),
        "kinds": sorted({kind for kind in ends.values() if kind}),
        "nodes": len(row.nodes),
        "pairs": len(pairs),
    }
    nodes = [[_rounded(getattr(node, name)) for name in NODE] for node in row.nodes]
    paired = [[_rounded(getattr(pair, name)) for name in PAIR] for pair in pairs]
    tree = {**shown, "gold": row.gold, "nodes": nodes, "pairs": paired, "ends": ends}
    return ReportTree(entry, as_json(tree))


def _rounded(value: Any) -> Any:
    return round(value, ROUNDED) if isinstance(value, float) else value


def _kind(row: TreeRow, node: int) -> str | None:
    """Returns the kind of error of the response that ends at a node; None if it is right.

    If the model ended the response, its last step holds the stop token.
    """
    if row.nodes[node].outcome >= RIGHT:
        return None
    text = response(row.nodes, node)
    stop = STOP.search(text, max(0, len(text) - LONGEST_STOP))
    return error_kind(row.gold, text[: stop.start()] if stop else text, finished=stop is not None)


def response(nodes: Sequence[NodeRow], node: int) -> str:
    """Joins the text from the root to a node."""
    steps = []
    while node > 0:
        steps.append(nodes[node].text + (nodes[node].observed or ""))
        node = nodes[node].parent
    return "".join(reversed(steps))


def statistics(phase: Path) -> Figures | None:
    """Returns figures of an iteration's trees and pairs; None before its search."""
    rows, pairs = _tables(phase)
    if not rows:
        return None
    with_pairs = {pair.tree for pair in pairs}
    gold = {row.id: [node.gold for node in row.nodes] for row in rows}
    gaps = [pair.q_chosen - pair.q_rejected for pair in pairs]
    return {
        "phase": phase.name,
        "trees": len(rows),
        "verdicts": Counter(_verdict(row) for row in rows),
        "nodes": sum(len(row.nodes) for row in rows),
        "pairs": len(pairs),
        "trees_without_pairs": sum(row.id not in with_pairs for row in rows),
        "gaps": _histogram(gaps),
        "median_gap": numbers.median(gaps) if gaps else None,
        "first_step": sum(pair.node == 0 for pair in pairs),
        "chosen_is_gold": sum(_at(gold.get(pair.tree, []), pair.chosen_node) for pair in pairs),
        "chosen_injected": sum(not pair.chosen_sampled for pair in pairs),
        "chosen_tokens": sum(len(pair.chosen_ids) for pair in pairs),
        "rejected_tokens": sum(len(pair.rejected_ids) for pair in pairs),
    }


def _verdict(row: TreeRow) -> str:
    """Returns whether the finished responses of a tree are right, wrong, mixed or none."""
    ends = {node.outcome >= RIGHT for node in row.nodes if node.terminal}  # graded: less is a near miss
    return "none" if not ends else "mixed" if len(ends) == 2 else "right" if True in ends else "wrong"


def _histogram(gaps: Sequence[float]) -> list[Figures]:
    bounds = [*GAPS, float("inf")]
    return [{"from": low, "n": sum(low <= gap < high for gap in gaps)} for low, high in itertools.pairwise(bounds)]


def _at(marks: Sequence[bool], node: int) -> bool:
    return node < len(marks) and marks[node]
