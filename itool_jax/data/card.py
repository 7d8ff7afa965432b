"""What a data set holds: the data card of a run.

In: samples by part, and the same as token ids. Out: counts, as a dictionary and as lines to print.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from itool_jax.data.records import Sample
from itool_jax.text.calls import read_calls
from itool_jax.text.chat import Encoded


def describe(parts: Mapping[str, Sequence[Sample]], encoded: Mapping[str, Sequence[Encoded]]) -> dict[str, Any]:
    """Counts of each part, and what of the held-out parts stands in the training part too."""
    questions = {name: [_question(sample) for sample in part] for name, part in parts.items()}
    tools = {name: [_tools(sample) for sample in part] for name, part in parts.items()}
    trained_questions, trained_tools = set(questions["train"]), set().union(*tools["train"])
    found: dict[str, Any] = {"parts": {name: _counts(part, encoded[name]) for name, part in parts.items()}}
    found["overlap_with_train"] = {
        name: {
            "questions": sum(question in trained_questions for question in questions[name]),
            "samples_with_a_known_tool": sum(bool(offered & trained_tools) for offered in tools[name]),
        }
        for name in parts
        if name != "train"
    }
    return found


def lines(card: Mapping[str, Any]) -> list[str]:
    """The card as text, a line a part."""
    found = [f"data {card['data']}: {card['repeats_left_out']} repeats left out, {card['rows_skipped']} rows skipped"]
    for name, c in card["parts"].items():
        line = f"  {name}: {c['samples']} samples of {c['conversations']} conversations, {c['turns']} turns, "
        line += f"{c['calls']} calls, {c['texts']} texts, {c['prompt_tokens'] + c['target_tokens']} tokens"
        found.append(f"{line} (the longest sample {c['longest']}, half of them at most {c['median']})")
    for name, c in card["overlap_with_train"].items():
        found.append(
            f"  {name} shares with train: {c['questions']} questions, "
            f"a tool in {c['samples_with_a_known_tool']} samples"
        )
    return found


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
