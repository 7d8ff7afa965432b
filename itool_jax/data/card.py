"""What a data set holds: the data card of a run.

In: samples by part, and the same as token ids. Out: counts, as a dictionary and as lines to print.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from itool_jax.data.records import Sample
from itool_jax.text.calls import read_calls
from itool_jax.text.chat import Encoded

FIRST = 5
"""How many ids of shared questions a card lists."""


def describe(parts: Mapping[str, Sequence[Sample]], encoded: Mapping[str, Sequence[Encoded]]) -> dict[str, Any]:
    """Counts of each part, and what of the held-out parts stands in the training part too."""
    held_out = {name: part for name, part in parts.items() if name != "train"}
    return {
        "parts": {name: _counts(part, encoded[name]) for name, part in parts.items()},
        "overlap_with_train": overlap(parts["train"], held_out),
    }


def overlap(train: Sequence[Sample], sets: Mapping[str, Sequence[Sample]]) -> dict[str, dict[str, Any]]:
    """What of each set stands in the training part: questions, whatever their spacing and case, and tools by name."""
    questions = {_question(sample) for sample in train} - {""}
    tools = set().union(*map(_tools, train))
    found: dict[str, dict[str, Any]] = {}
    for name, samples in sets.items():
        known = [sample.id for sample in samples if _question(sample) in questions]
        offered = [_tools(sample) for sample in samples]
        found[name] = {
            "samples": len(samples),
            "questions": len(known),
            "first_questions": known[:FIRST],
            "samples_with_tools": sum(map(bool, offered)),
            "samples_with_a_known_tool": sum(bool(names & tools) for names in offered),
        }
    return found


def lines(card: Mapping[str, Any]) -> list[str]:
    """The card as text, a line a part."""
    left_out = f"{card['repeats_left_out']} repeats left out, {card['rows_skipped']} wrong rows skipped"
    found = [f"data {card['data']}: {left_out}, {card['too_long']} samples too long for the model; nothing truncated"]
    for name, c in card["parts"].items():
        line = f"  {name}: {c['samples']} samples of {c['conversations']} conversations, {c['turns']} turns, "
        line += f"{c['calls']} calls, {c['texts']} texts, {c['prompt_tokens'] + c['target_tokens']} tokens"
        found.append(f"{line} (the longest sample {c['longest']}, half of them at most {c['median']})")
    return found + overlap_lines(card["overlap_with_train"])


def overlap_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What `overlap` found as text, a line a set."""
    return [
        f"  {name} shares with train: {c['questions']} of {c['samples']} questions, a tool in "
        f"{c['samples_with_a_known_tool']} of the {c['samples_with_tools']} samples that list tools"
        for name, c in found.items()
    ]


def _counts(samples: Sequence[Sample], encoded: Sequence[Encoded]) -> dict[str, int]:
    calls = [read_calls(sample.target) for sample in samples]
    turns: dict[str, int] = {}
    for sample in samples:  # a conversation's last sample holds those before it
        key = sample.conversation or sample.id
        turns[key] = max(turns.get(key, 0), len(sample.messages) + 1)
    lengths = [len(row.prompt_ids) + len(row.target_ids) for row in encoded]
    return {
        "samples": len(samples),
        "conversations": len(turns),
        "turns": sum(turns.values()),
        "calls": sum(len(found) for found in calls if found is not None),
        "texts": sum(found is None for found in calls),
        "prompt_tokens": sum(len(row.prompt_ids) for row in encoded),
        "target_tokens": sum(len(row.target_ids) for row in encoded),
        "longest": max(lengths),
        "median": round(statistics.median(lengths)),
    }


def _question(sample: Sample) -> str:
    """The last thing the user said, whatever its spacing and case."""
    said = [str(message["content"]) for message in sample.messages if message["role"] == "user"]
    return " ".join(said[-1].casefold().split()) if said else ""


def _tools(sample: Sample) -> set[str]:
    return {tool["function"]["name"] for tool in sample.tools}
