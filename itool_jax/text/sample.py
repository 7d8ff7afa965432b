"""Samples: what a model sees and what it should answer, as messages and tools or as raw tokens."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
"""A JSON object, such as a row of a data file."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One tool-use turn: what the model sees, and what it should answer."""

    id: str
    messages: tuple[Row, ...]
    """OpenAI chat messages, the target not among them."""
    tools: tuple[Row, ...] = ()
    """OpenAI tool schemas, {"type": "function", "function": {"name", "description", "parameters"}}."""
    target: str = ""
    """One bracketed list of calls, or plain text; empty where it is unknown."""
    category: str = ""
    conversation: str = ""
    """Which conversation it is a turn of; empty where it is the only one."""
    following: tuple[Row, ...] = ()
    """Messages recorded after the target up to the next user turn: tool results and further assistant turns. Only
    samples that follow a user turn have them."""
    place: str = field(default="", compare=False)
    """Where it was read, for messages: file and row; no part of the sample and never written."""

    @property
    def follows_user(self) -> bool:
        """Whether the target begins the answer to a user turn: no assistant or tool message stands between.

        System messages do not count, and a sample of nothing but system messages begins an answer too.
        """
        roles = (message["role"] for message in reversed(self.messages))
        return next((role == "user" for role in roles if role in ("user", "assistant", "tool")), True)


@dataclass(frozen=True, kw_only=True)
class RawSample:
    """Token ids, or a text, that the model gets exactly as given."""

    id: str
    prompt_ids: tuple[int, ...] | None = None
    prompt: str | None = None
    target_ids: tuple[int, ...] | None = None


def sample_row(sample: Sample) -> Row:
    """The row of a file that reads back as this very sample."""
    row: Row = {"id": sample.id, "messages": list(sample.messages), "tools": list(sample.tools)}
    row["target"] = sample.target
    if sample.following:
        row["following"] = list(sample.following)
    return row | {key: value for key in ("category", "conversation") if (value := getattr(sample, key))}


def content_id(prefix: str, row: Row) -> str:
    """An id made from a row's content, for data without ids: it never depends on the order of a file."""
    digest = hashlib.sha256(json.dumps(row, sort_keys=True, default=str).encode()).hexdigest()
    return f"{prefix}-{digest[:16]}"
