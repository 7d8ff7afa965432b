"""Encodes samples as token ids and checks that they fit the model's vocabulary and context."""

from collections.abc import Sequence

from itool_jax.store.base import Base
from itool_jax.text.chat import Encoded, encode_sample
from itool_jax.text.sample import RawSample, Sample


def encode(base: Base, samples: Sequence[Sample | RawSample]) -> list[Encoded]:
    """Encodes each sample's prompt and target; ValueError names one that is empty or longer than the context."""
    encoded = [encode_sample(base.chat, sample) for sample in samples]
    check_lengths(encoded, base.config.max_length)
    return encoded


def check_lengths(encoded: Sequence[Encoded], limit: int) -> None:
    """Raises ValueError naming a sample with no target, or one that exceeds the context of `limit` tokens."""
    for row in encoded:
        if not row.target_ids:
            raise ValueError(f"sample {row.id}: no target")
    check_room(encoded, limit)


def check_ids(encoded: Sequence[Encoded], vocab_size: int) -> None:
    """Raises ValueError naming a sample with a token id outside the vocabulary; raw rows may hold any number."""
    for row in encoded:
        if (largest := max((*row.prompt_ids, *row.target_ids), default=0)) >= vocab_size:
            raise ValueError(f"sample {row.id}: token id {largest} is not in the model's vocabulary of {vocab_size}")


def check_room(encoded: Sequence[Encoded], limit: int, room: int = 0) -> None:
    """Raises ValueError naming a sample whose prompt is empty, or that with `room` more tokens exceeds the context."""
    for row in encoded:
        length = len(row.prompt_ids) + len(row.target_ids)
        if not row.prompt_ids:
            raise ValueError(f"sample {row.id}: the prompt is empty")
        if length + room > limit:
            raise ValueError(
                f"sample {row.id}: its {length} tokens do not fit the model's context of {limit}; "
                "remove the sample, or use a model with a longer context"
            )
