"""Responses of a model to prompts from a file.

In: a data file of samples or raw prompts. Out: `--output`, {id, token_ids, text} a line; without it, the texts.
"""

from typing import Any

from itool_jax.config import Config
from itool_jax.data.records import write_jsonl
from itool_jax.data.sources import read_samples
from itool_jax.metrics import progress, say
from itool_jax.sampler import respond
from itool_jax.stages import folder
from itool_jax.text.chat import encode_sample


def run(config: Config) -> dict[str, Any]:
    """Generates for every row of the data file; returns how many."""
    samples = read_samples(folder.data_file(config), need_target=False)
    base = folder.load_base(config)
    encoded = [encode_sample(base.chat, sample) for sample in samples]
    folder.check_ids(encoded, base.config.vocab_size)
    folder.check_room(encoded, base.config.max_length, room=1)
    with progress("generate", len(encoded)) as advance:
        responses = respond(
            folder.load_policy(config, "base"),
            folder.step_table(base, "sentence"),
            [(row.id, row.prompt_ids) for row in encoded],
            config.generate,
            base.config.max_length,
            config.seed,
            advance,
        )
    rows = []
    for row, ids in zip(encoded, responses, strict=True):
        text = base.chat.tokenizer.decode(base.chat.content_ids(ids))
        rows.append({"id": row.id, "token_ids": ids, "text": text})
    if config.output is None:
        for row in rows:
            print(f"{row['id']}\t{row['text']}")
    else:
        write_jsonl(config.output, rows)
        say(f"wrote {len(rows)} responses to {config.output}")
    return {"samples": len(rows)}
