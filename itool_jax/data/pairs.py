"""Reads preference pairs in the columns of other trainers, and a run's own `pairs.jsonl`.

In: rows of TRL (https://huggingface.co/docs/trl/dataset_formats#preference) or LLaMA-Factory
(https://llamafactory.readthedocs.io/en/latest/getting_started/data_preparation.html). Out: for each row, a prompt with
a chosen and a rejected answer, as two samples, as texts, or as token ids.
"""

import os
from typing import Any, NamedTuple

from itool_jax.data.formats import field, sharegpt_turns
from itool_jax.data.rows import refuse
from itool_jax.data.sources import files_of, from_openai, read_row
from itool_jax.text.sample import Row, Sample, content_id

ANSWERS = ("chosen", "rejected")
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


def load_pairs(source: str, skipped: list[str] | None = None) -> list[GivenPair]:
    """Loads the pairs of a file, a folder, several files or `hf:OWNER/NAME`.

    A row has `chosen` and `rejected`, each a text, an assistant message, or a list of one; and before them `prompt` (a
    text or messages), `messages`, `conversations`, or `instruction` and `input`. Without any of these, both answers are
    conversations that differ only in their last message. `tools` and `system` are those of samples.

    Raises:
        ValueError: a row is invalid, and no list `skipped` is given to add the reason to; names file and row.
    """
    pairs: dict[str, GivenPair] = {}
    for name, rows, where in files_of(os.fspath(source), skipped):
        before = len(pairs)
        for number, row in rows:
            try:
                pair = read_row(where(number), _pair, row)._replace(place=where(number))
                if other := pairs.get(pair.id):
                    raise ValueError(f'{pair.place}: duplicate id "{pair.id}", first used in {other.place}')
            except ValueError as error:
                refuse(str(error), skipped, error)
                continue
            pairs[pair.id] = pair
        if len(pairs) == before:
            raise ValueError(f"{name} contains no pairs")
    return [*pairs.values()]


def _pair(row: Row) -> GivenPair:
    if missing := [key for key in ANSWERS if row.get(key) is None]:
        raise ValueError(f'a pair needs "chosen" and "rejected", but "{missing[0]}" is missing')
    name = str(row["id"]) if row.get("id") not in (None, "") else content_id("pair", row)
    given = row.get("prompt"), row["chosen"], row["rejected"]
    texts = (str(given[0]), str(given[1]), str(given[2])) if all(isinstance(x, str) for x in given) else None
    if any(row.get(key) is not None for key in IDS):
        return GivenPair(name, "", None, texts, (_ids(row, IDS[0]), _ids(row, IDS[1]), _ids(row, IDS[2])))
    messages, answers = _conversation(row)
    chosen, rejected = (
        _sample(name, messages, row.get("tools"), key, x) for key, x in zip(ANSWERS, answers, strict=True)
    )
    if (chosen.target, chosen.before_calls) == (rejected.target, rejected.before_calls):
        raise ValueError('"chosen" and "rejected" are the same answer')
    return GivenPair(name, "", (chosen, rejected), texts)


def _conversation(row: Row) -> tuple[list[Any], list[Any]]:
    """Returns the messages before the answers, and both answers."""
    answers = [_answer(key, row[key]) for key in ANSWERS]
    if (key := next((k for k in ("prompt", "messages") if row.get(k)), None)) is not None:
        messages = field(row, key, str, list)
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    elif row.get("conversations"):
        messages = sharegpt_turns(row)
    elif row.get("instruction"):
        asked = [part for key in ("instruction", "input") if (part := row.get(key))]
        past = [x for pair in row.get("history") or [] for x in zip(("user", "assistant"), pair, strict=True)]
        messages = [{"role": role, "content": text} for role, text in [*past, ("user", "\n".join(asked))]]
    else:
        messages, answers = _split(*(row[key] for key in ANSWERS))
    if system := row.get("system"):
        messages = [{"role": "system", "content": system}, *messages]
    return messages, answers


def _answer(key: str, answer: Any) -> Any:
    """Returns an answer as a text or a message."""
    if isinstance(answer, dict) and {"from", "value"} <= answer.keys():
        return sharegpt_turns({"conversations": [answer]})[0]
    return answer[0] if isinstance(answer, list) and len(answer) == 1 else answer


def _split(chosen: Any, rejected: Any) -> tuple[list[Any], list[Any]]:
    """Returns the messages that both conversations begin with, and their last messages."""
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        raise ValueError('a pair needs its "prompt": texts that contain it cannot be divided')
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
