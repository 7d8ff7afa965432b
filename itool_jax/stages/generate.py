"""Responses of a model to prompts from a file, or to a person in the terminal.

In: a data file of samples or raw prompts. Out: `--output`, {id, token_ids, text} a line; without it, the texts. With
`--chat`, see `stages.chat`.
"""

from collections.abc import Sequence
from typing import Any

from itool_jax.config import Config
from itool_jax.data.records import write_jsonl
from itool_jax.data.sources import read_samples
from itool_jax.journal import Keep, keep_nothing
from itool_jax.metrics import progress, say
from itool_jax.sampler import generate
from itool_jax.stages import chat, folder, manifest
from itool_jax.stages.spread import spread
from itool_jax.text.chat import Encoded, encode_sample

Row = dict[str, Any]


def run(config: Config) -> dict[str, Any]:
    """Generates for every row of the data file; returns how many. A chat returns how many turns it had."""
    if config.chat:
        return chat.run(config)
    samples = read_samples(folder.data_file(config), need_target=False)
    base = folder.load_base(config)
    encoded = [encode_sample(base.chat, sample) for sample in samples]
    folder.check_ids(encoded, base.config.vocab_size)
    folder.check_room(encoded, base.config.max_length, room=1)
    policy, table = folder.load_policy(config, folder.answering_phase(config)), folder.step_table(config, "sentence")

    def answer(rows: Sequence[Encoded], _: Keep) -> list[Row]:
        prompts = [(row.id, row.prompt_ids) for row in rows]
        responses: dict[int, list[int]] = {}
        with progress("generate", len(prompts)) as advance:
            for batch in generate(policy, table, prompts, config.generate, base.config.max_length, config.seed):
                responses |= batch
                advance(len(batch))
        texts = [base.chat.tokenizer.decode(base.chat.content_ids(responses[i])) for i in range(len(rows))]
        return [{"id": row.id, "token_ids": responses[i], "text": texts[i]} for i, row in enumerate(rows)]

    if config.output is None:
        for row in answer(encoded, keep_nothing):
            print(f"{row['id']}\t{row['text']}")
    else:
        with manifest.resumed(config, config.output) as working:
            write_jsonl(config.output, spread(config, working, encoded, answer))
        say(f"wrote {len(encoded)} responses to {config.output}")
    return {"samples": len(encoded)}
