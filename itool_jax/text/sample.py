"""Samples: a prompt and its target answer, as messages and tools or as raw tokens."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
"""A JSON object, such as a row of a data file."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One tool-use turn: the prompt that the model sees, and the answer that it should give."""

    id: str
    messages: tuple[Row, ...]
    """OpenAI chat messages, without the target."""
    tools: tuple[Row, ...] = ()
    """OpenAI tool schemas, {"type": "function", "function": {"name", "description", "parameters"}}."""
    target: str = ""
    """One bracketed list of calls, or plain text; empty if unknown."""
    before_calls: str = ""
    """Text in the same assistant turn as the target's calls, before them."""
    category: str = ""
    conversation: str = ""
    """The conversation that the turn belongs to; empty if it is the only turn."""
    following: tuple[Row, ...] = ()
    """Messages recorded after the target up to the next user turn: tool results and further assistant turns. Only
    samples that follow a user turn have them."""
    place: str = field(default="", compare=False)
    """File and row that the sample was read from, for messages; not part of the sample and never written."""

    @property
    def follows_user(self) -> bool:
        """True if the target begins the answer to a user turn, with no assistant or tool message in between.

        System messages do not count; a sample with only system messages begins an answer too.
        """
        roles = (message["role"] for message in reversed(self.messages))
        return next((role == "user" for role in roles if role in ("user", "assistant", "tool")), True)


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """Token ids, or a text, passed to the model exactly as given."""

    id: str
    prompt_ids: tuple[int, ...] | None = None
    prompt: str | None = None
    target_ids: tuple[int, ...] | None = None


def sample_row(sample: Sample) -> Row:
    """Converts a sample to a file row that reads back as the same sample."""
    row: Row = {"id": sample.id, "messages": list(sample.messages), "tools": list(sample.tools)}
    row["target"] = sample.target
    if sample.before_calls:
        row["before_calls"] = sample.before_calls
    if sample.following:
        row["following"] = list(sample.following)
    return row | {key: value for key in ("category", "conversation") if (value := getattr(sample, key))}


def content_id(prefix: str, row: Row) -> str:
    """Makes an id from a row's content, for data without ids; it never depends on the order of a file."""
    digest = hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()
    return f"{prefix}-{digest[:16]}"
