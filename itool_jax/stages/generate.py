"""Generation of responses to prompts from a file, or to a user in the terminal.

In: a data file of samples or raw prompts. Out: `--output`, one {id, token_ids, text} per line; without it, the texts
are printed. For `--chat`, see `stages.chat`.
"""

from collections.abc import Iterator, Sequence

from itool_jax.data.sources import read_samples
from itool_jax.inference.sampler import generate
from itool_jax.stages import chat
from itool_jax.store import outputs
from itool_jax.store.across_hosts import Advance, by_row, map_across_hosts, planned
from itool_jax.store.cache import Figures
from itool_jax.store.encoding import check_ids, check_room
from itool_jax.store.run import Run
from itool_jax.store.splits import data_file
from itool_jax.store.tables import GeneratedRow
from itool_jax.system.files import write_jsonl
from itool_jax.system.messages import log
from itool_jax.system.progress import Batch, progress
from itool_jax.text.chat import Encoded, encode_sample
from itool_jax.text.padding import bucket

WHAT = "generate"


def run(run: Run) -> Figures:
    """Generates a response for every row of the data file; returns the number of rows, or of turns after a chat."""
    config = run.config
    if config.chat:
        return chat.run(run)
    samples = read_samples(data_file(config), need_target=False, targets=config.samples.targets)
    chat_format, model = run.base.chat, run.base.config
    encoded = [encode_sample(chat_format, sample) for sample in samples]
    check_ids(encoded, model.vocab_size)
    check_room(encoded, model.max_length, room=1)
    policy, table = run.answering_policy().running(), run.step_table("sentence")

    def answer(rows: Sequence[Encoded]) -> Iterator[list[tuple[int, GeneratedRow]]]:
        prompts = [(row.id, row.prompt_ids) for row in rows]
        for batch in generate(policy, table, prompts, config.generate, model.max_length, config.seed):
            yield [(i, _row(rows[i].id, ids)) for i, ids in batch]

    def _row(name: str, ids: list[int]) -> GeneratedRow:
        return GeneratedRow(name, ids, chat_format.tokenizer.decode(chat_format.content_ids(ids)))

    def plan(rows: Sequence[Encoded]) -> list[Batch]:
        return planned([bucket(len(row.prompt_ids) - 1) for row in rows], config.generate.tokens_per_batch)

    def work(rows: Sequence[Encoded]) -> Iterator[Advance]:
        return by_row(([(i, row._asdict()) for i, row in batch] for batch in answer(rows)), plan(rows))

    if config.output is None:
        with progress(WHAT, len(encoded)) as advance:
            advance(0, plan=plan(encoded))
            answered: dict[int, GeneratedRow] = {}
            for batch in answer(encoded):
                answered |= dict(batch)
                advance(len(batch))
        for _, row in sorted(answered.items()):
            print(f"{row.id}\t{row.text}")
    else:
        with outputs.resumed(config, config.output) as working:
            rows = map_across_hosts(config, working, encoded, work, WHAT)
            write_jsonl(config.output, rows)
        log(f"wrote {len(encoded)} responses to {config.output}")
    return {"samples": len(encoded)}
