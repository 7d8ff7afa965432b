"""Makes the data card of a run, which describes its data set.

In: samples by part, and the same as token ids. Out: counts, as a dictionary and as lines to print.
"""

import math
import re
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from itool_jax.text.call_checks import faults
from itool_jax.text.calls import read_calls
from itool_jax.text.chat import Encoded
from itool_jax.text.sample import Sample

FIRST = 5
"""Number of shared question ids that are printed; the card lists all."""
FEW = 100
"""Samples of a held-out part below which its figures are said to be uncertain."""
NEAR = 0.7
"""Two questions are near duplicates if they share at least this fraction of their runs of three words (Jaccard)."""


def describe(parts: Mapping[str, Sequence[Sample]], encoded: Mapping[str, Sequence[Encoded]]) -> dict[str, Any]:
    """Returns the counts of each part and the overlap of the held-out parts with the training part."""
    held_out = {name: part for name, part in parts.items() if name != "train"}
    return {
        "parts": {name: _counts(part, encoded[name]) for name, part in parts.items()},
        "overlap_with_train": overlap(parts["train"], held_out),
        "target_faults": {name: fault for part in parts.values() for name, fault in target_faults(part).items()},
    }


def target_fault(sample: Sample) -> str | None:
    """Returns how the calls of a sample's target contradict its tools; None if they do not."""
    return next((fault for call in read_calls(sample.target) or () for fault in faults(call, sample.tools)), None)


def target_faults(samples: Sequence[Sample]) -> dict[str, str]:
    """Returns the fault of each sample whose target contradicts its tools, by id."""
    return {sample.id: fault for sample in samples if (fault := target_fault(sample))}


def overlap(train: Sequence[Sample], sets: Mapping[str, Sequence[Sample]]) -> dict[str, dict[str, Any]]:
    """Returns the overlap of each set with the training part.

    Questions are compared regardless of spacing and case. Near duplicates, which share most of their runs of three
    words (`NEAR`), are counted separately. Tools are compared by name, regardless of case and punctuation. Ids are
    those of the set's samples.
    """
    questions = {_question(sample): sample.id for sample in train if _question(sample)}
    near = _NearDuplicates(questions)
    tools = set().union(*map(_tools, train))
    overlaps: dict[str, dict[str, Any]] = {}
    for name, samples in sets.items():
        known = [sample.id for sample in samples if _question(sample) in questions]
        likely = {s.id: near.find(_question(s)) for s in samples if _question(s) not in questions}
        offered = [_tools(sample) for sample in samples]
        overlaps[name] = {
            "samples": len(samples),
            "questions": len(known),
            "question_ids": known,
            "near_questions": sum(other is not None for other in likely.values()),
            "near_question_ids": {sample: other for sample, other in likely.items() if other is not None},
            "samples_with_tools": sum(map(bool, offered)),
            "samples_with_a_known_tool": sum(bool(names & tools) for names in offered),
            "known_tools": sorted(set().union(*offered) & tools),
        }
    return overlaps


class _NearDuplicates:
    """Index of training questions that finds near duplicates, by `NEAR`, of another question.

    Near duplicates share one of the rarest runs of either (prefix filtering, https://doi.org/10.1145/1242572.1242591),
    so only a few questions are compared.
    """

    def __init__(self, questions: Mapping[str, str]) -> None:
        self.questions = [(sample_id, _runs(text)) for text, sample_id in questions.items()]
        self.places: dict[str, list[int]] = {}
        for number, (_, runs) in enumerate(self.questions):
            for run in runs:
                self.places.setdefault(run, []).append(number)

    def find(self, text: str) -> str | None:
        """Returns the id of the first training sample whose question is a near duplicate of `text`, or None."""
        runs = _runs(text)
        rarest = sorted(runs, key=lambda run: len(self.places.get(run, ())))[: int((1 - NEAR) * len(runs)) + 1]
        candidates = sorted({number for run in rarest for number in self.places.get(run, ())})
        near = (
            self.questions[number][0]
            for number in candidates
            if len(runs & self.questions[number][1]) >= NEAR * len(runs | self.questions[number][1])
        )
        return next(near, None)


def _runs(text: str) -> set[str]:
    words = re.findall(r"\w+", text)
    return {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))} if words else set()


def lines(card: Mapping[str, Any]) -> list[str]:
    """Returns the card as lines of text, one per part."""
    left_out = f"{card['repeats_left_out']} duplicates dropped, {card['rows_skipped']} invalid rows skipped"
    texts = [f"data {card['data']}: {left_out}, {card['too_long']} samples too long for the model; nothing truncated"]
    for name, c in card["parts"].items():
        line = f"  {name}: {c['samples']} samples of {c['conversations']} conversations, {c['turns']} turns, "
        line += f"{c['calls']} calls, {c['texts']} texts, {c['prompt_tokens'] + c['target_tokens']} tokens"
        texts.append(f"{line} (longest sample {c['longest']}, median {c['median']})")
    if any(c["texts"] for c in card["parts"].values()):
        counts = ", ".join(f"{name} {c['texts']}" for name, c in card["parts"].items() if c["texts"])
        texts.append(f"  targets that are text, which any answer without a call meets: {counts}")
    for name, c in card["parts"].items():
        if name != "train" and 0 < c["samples"] < FEW:
            spread = 50 / math.sqrt(c["samples"])
            texts.append(
                f"  only {c['samples']} {name} samples: an accuracy near 50 % is uncertain by "
                f"± {spread:.0f} points; give more data, raise samples.{name}_share"
                + (" or set samples.test_file" * (name == "test"))
            )
    return texts + fault_lines(card["target_faults"]) + left_out_lines(card) + overlap_lines(card["overlap_with_train"])


def fault_lines(by_sample: Mapping[str, str]) -> list[str]:
    """Returns a line on targets that contradict their tools, by sample; none if there are none."""
    if not by_sample:
        return []
    named = "; ".join(f"{sample}: {fault}" for sample, fault in list(by_sample.items())[:FIRST])
    more = "; …" if len(by_sample) > FIRST else ""
    return [f"  {len(by_sample)} targets contradict the tools they call ({named}{more}); --strict refuses them"]


def left_out_lines(counts: Mapping[str, Any]) -> list[str]:
    """Returns a line for each reason why samples are in no part or not used, with counts from a card."""
    no_test = "they follow no user turn, so any text would count as right"
    reasons = {
        "validation_texts_left_out": f"texts left out of validation: {no_test}",
        "test_texts_left_out": f"texts left out of test: {no_test}",
        "train_left_out": "training samples unused because of samples.fraction and samples.limit",
        "buffer_left_out": "training samples unused: they follow no user turn, and their conversations are in the "
        "replay buffer",
    }
    return [f"  {counts[name]} {reason}" for name, reason in reasons.items() if counts[name]]


def overlap_lines(overlaps: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the result of `overlap` as lines of text, one per set."""
    return [
        f"  overlap of {name} with train: {c['questions']} of {c['samples']} questions{_first(c['question_ids'])}, "
        f"{c['near_questions']} near duplicates{_first(c['near_question_ids'])}; "
        f"{c['samples_with_a_known_tool']} of {c['samples_with_tools']} samples with tools list one also seen in "
        "training"
        for name, c in overlaps.items()
    ]


def _first(ids: Collection[str]) -> str:
    return f" ({', '.join(list(ids)[:FIRST])}{', …' if len(ids) > FIRST else ''})" if ids else ""


def _counts(samples: Sequence[Sample], encoded: Sequence[Encoded]) -> dict[str, int]:
    calls = [read_calls(sample.target) for sample in samples]
    turns: dict[str, int] = {}
    for sample in samples:  # a conversation's last sample holds all turns before it
        key = sample.conversation or sample.id
        turns[key] = max(turns.get(key, 0), len(sample.messages) + 1)
    lengths = [len(row.prompt_ids) + len(row.target_ids) for row in encoded]
    return {
        "samples": len(samples),
        "conversations": len(turns),
        "turns": sum(turns.values()),
        "calls": sum(len(parsed) for parsed in calls if parsed is not None),
        "texts": sum(parsed is None for parsed in calls),
        "prompt_tokens": sum(len(row.prompt_ids) for row in encoded),
        "target_tokens": sum(len(row.target_ids) for row in encoded),
        "longest": max(lengths, default=0),
        "median": round(statistics.median(lengths or [0])),
    }


def _question(sample: Sample) -> str:
    """Returns the last user message, with spacing and case normalized."""
    said = [str(message["content"]) for message in sample.messages if message["role"] == "user"]
    return " ".join(said[-1].casefold().split()) if said else ""


def _tools(sample: Sample) -> set[str]:
    return {re.sub(r"\W|_", "", tool["function"]["name"].casefold()) for tool in sample.tools}
