"""Reads preference pairs in the columns of other trainers, and a run's own `pairs.jsonl`.

In: rows of TRL (https://huggingface.co/docs/trl/dataset_formats#preference) or LLaMA-Factory
(https://llamafactory.readthedocs.io/en/latest/getting_started/data_preparation.html). Out: for each row, a prompt with
a chosen and a rejected answer, as two samples, as texts, or as token ids.
"""

import os
from typing import Any, NamedTuple

from itool_jax.data.formats import field, sharegpt_turns
from itool_jax.data.rows import refuse
from itool_jax.data.sources import files_of, from_openai, holds_thought, read_row
from itool_jax.text.sample import Row, Sample, content_id

ANSWERS = ("chosen", "rejected")
CONTEXTS = ("prompt", "messages", "conversations", "instruction")
"""Columns that a pair's prompt may stand in."""
MEDIA = ("images", "image", "videos", "audios")
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


class GivenPair(NamedTuple):
    """A preference pair of a file."""

    id: str
    place: str
    """File and row, for messages."""
    samples: tuple[Sample, Sample] | None = None
    """The prompt with the chosen and with the rejected answer as target."""
    texts: tuple[str, str, str] | None = None
    """Prompt, chosen and rejected answer, if all are texts: a template may have written the prompt already."""
    ids: tuple[list[int], list[int], list[int]] | None = None
    """Prompt, chosen and rejected step as token ids; nothing else is given then, except the texts."""
    visits: tuple[int, int] | None = None
    """Visits of both steps, if a search made the pair."""
    tree: str = ""
    """What held-out pairs are chosen by: the tree of a search; empty for others, which go by their prompt."""
    thoughts: bool = False
    """True if a thought before an answer, `<think>...</think>`, was left out."""
    has_context: bool = False
    """True if the row has a system text or tools beside a prompt that is a text."""


def load_pairs(source: str, skipped: list[str] | None = None) -> list[GivenPair]:
    """Loads the pairs of a file, a folder, several files or `hf:OWNER/NAME`.

    A row has `chosen` and `rejected`, each a text, an assistant message, or a list of one; and before them `prompt` (a
    text or messages), `messages`, `conversations`, or `instruction` and `input`. Without any of these, both answers are
    conversations that differ only in their last message. `tools` and `system` are those of samples.

    Raises:
        ValueError: a row is invalid, and no list `skipped` is given to add the reason to; names file and row.
    """
    pairs: dict[str, GivenPair] = {}
    for _, rows, where in files_of(os.fspath(source), skipped):
        for number, row in rows:
            try:
                pair = read_row(where(number), _pair, row)._replace(place=where(number))
                if other := pairs.get(pair.id):
                    named = f'duplicate id "{pair.id}"' if row.get("id") else "the same pair again"
                    raise ValueError(f"{pair.place}: {named}, first in {other.place}")
            except ValueError as error:
                refuse(str(error), skipped, error)
                continue
            pairs[pair.id] = pair
    if not pairs:
        raise ValueError(f"{source} contains no pairs" + (f" (first: {skipped[0]})" if skipped else ""))
    return [*pairs.values()]


def _pair(row: Row) -> GivenPair:
    if missing := [key for key in ANSWERS if row.get(key) is None]:
        raise ValueError(f'a pair needs "chosen" and "rejected", but "{missing[0]}" is missing')
    if media := [key for key in MEDIA if row.get(key)]:
        raise ValueError(f'"{media[0]}" cannot be shown to a model of text; remove such rows')
    given_id = row.get("id")
    if given_id is not None and type(given_id) not in (str, int):
        raise ValueError('"id" must be a string or an integer')
    name = content_id("pair", row) if given_id in (None, "") else str(given_id)
    given = row.get("prompt"), row["chosen"], row["rejected"]
    texts = (str(given[0]), str(given[1]), str(given[2])) if all(isinstance(x, str) for x in given) else None
    if any(row.get(key) is not None for key in IDS):
        ids = (_ids(row, IDS[0]), _ids(row, IDS[1]), _ids(row, IDS[2]))
        better, worse = row.get("visits_chosen"), row.get("visits_rejected")
        visits = (better, worse) if isinstance(better, int) and isinstance(worse, int) else None
        return GivenPair(name, "", None, texts, ids, visits, str(row.get("tree") or ""))
    messages, answers = _conversation(row)
    chosen, rejected = (
        _sample(name, messages, row.get("tools"), key, x) for key, x in zip(ANSWERS, answers, strict=True)
    )
    if (chosen.target, chosen.before_calls) == (rejected.target, rejected.before_calls):
        raise ValueError('"chosen" and "rejected" are the same answer')
    has_context = bool(row.get("system") or row.get("tools"))
    samples = chosen, rejected
    return GivenPair(name, "", samples, texts, thoughts=holds_thought(row), has_context=has_context)


def _conversation(row: Row) -> tuple[list[Any], list[Any]]:
    """Returns the messages before the answers, and both answers."""
    answers = [_answer(key, row[key]) for key in ANSWERS]
    given = [key for key in CONTEXTS if row.get(key)]
    if len(given) > 1:
        raise ValueError(f'a pair has "{given[0]}" and "{given[1]}"; keep the one that holds the prompt')
    if "instruction" not in given and (stray := [key for key in ("input", "history") if row.get(key)]):
        raise ValueError(f'"{stray[0]}" without "instruction"')
    whole = all(isinstance(answer, list) and len(answer) > 1 for answer in answers)
    if not given or (given == ["prompt"] and isinstance(row["prompt"], str) and whole):
        messages, answers = _split(*(row[key] for key in ANSWERS))
        if given and (not messages or messages[-1].get("content") != row["prompt"]):
            raise ValueError(
                '"prompt" is not the last message before the answers; remove the column if it is not needed'
            )
    elif given[0] == "conversations":
        messages = sharegpt_turns(row)
    elif given[0] == "instruction":
        asked = [field(row, key, str) for key in ("instruction", "input") if row.get(key)]
        past = [x for pair in row.get("history") or [] for x in zip(("user", "assistant"), _turn(pair), strict=True)]
        messages = [{"role": role, "content": text} for role, text in [*past, ("user", "\n".join(asked))]]
    else:
        messages = field(row, given[0], str, list)
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if row.get("system"):
        if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
            raise ValueError('a pair has "system" and a system message; keep one')
        messages = [{"role": "system", "content": field(row, "system", str)}, *messages]
    return messages, answers


def _turn(pair: Any) -> list[str]:
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
        raise ValueError('"history" must be a list of [question, answer]')
    return pair


def _answer(key: str, answer: Any) -> Any:
    """Returns an answer as a text or a message."""
    if isinstance(answer, dict) and {"from", "value"} <= answer.keys():
        return sharegpt_turns({"conversations": [answer]})[0]
    return answer[0] if isinstance(answer, list) and len(answer) == 1 else answer


def _split(chosen: Any, rejected: Any) -> tuple[list[Any], list[Any]]:
    """Returns the messages that both conversations begin with, and their last messages."""
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise ValueError('a pair needs its "prompt" in a column: give it, and only the answers in chosen and rejected')
    if chosen[:-1] != rejected[:-1]:
        raise ValueError('"chosen" and "rejected" must differ in their last message only; a pair compares single turns')
    return chosen[:-1], [chosen[-1], rejected[-1]]


def _sample(name: str, messages: list[Any], tools: Any, key: str, answer: Any) -> Sample:
    if isinstance(answer, list):
        raise ValueError(f'"{key}" has {len(answer)} messages; a pair compares single turns')
    if isinstance(answer, dict) and answer.get("role", "assistant") != "assistant":
        raise ValueError(f'"{key}" is a message of {str(answer["role"])[:40]!r}, not of the assistant')
    row = {"id": name, "messages": messages, "tools": tools, "target": answer}
    try:
        (sample,) = from_openai(row, need_target=True, turns=None)
    except ValueError as error:
        raise ValueError(f'"{key}": {error}') from error
    return sample


def _ids(row: Row, key: str) -> list[int]:
    ids = field(row, key, list)
    if not ids or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise ValueError(f'"{key}" must be a non-empty list of token ids')
    return ids
