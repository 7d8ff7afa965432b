"""Answers samples greedily with a policy and grades each answer against the sample's target: exact calls, typed values.

In: a policy and samples. Out: one `Answer` per sample, journaled in the step's working folder.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from itool_jax.inference.sampler import generate
from itool_jax.mcts.value import outcome
from itool_jax.store.across_hosts import Advance, by_row, planned
from itool_jax.store.cache import Task
from itool_jax.store.splits import Samples
from itool_jax.store.weights import PhasePolicy
from itool_jax.text.padding import bucket


class Answer(NamedTuple):
    """A policy's answer to a sample."""

    text: str
    finished: bool
    """True if the answer ends with a stop token, False if it ran into the length limit."""
    correct: bool


def answer_greedily(
    task: Task, policy: PhasePolicy, samples: Samples, what: str, folder: Path | None = None
) -> list[Answer]:
    """Answers the samples in order; finished answers are journaled in `folder`, by default the step's own."""
    run, config = task.run, task.config
    table = run.step_table("sentence")
    greedy = dataclasses.replace(config.generate, temperature=0.0)
    prompts = [(row.id, row.prompt_ids) for row in samples.encoded]
    running = policy.running()

    def answer(prompts: Sequence[tuple[str, list[int]]]) -> Iterator[Advance]:
        limit = run.base.config.max_length
        rows = generate(running, table, prompts, greedy, limit, config.seed)
        return by_row(rows, planned([bucket(len(ids) - 1) for _, ids in prompts], greedy.tokens_per_batch))

    chat, answers = run.base.chat, []
    for sample, ids in zip(samples.samples, task.map(prompts, answer, what, folder=folder), strict=True):
        finished, text = bool(ids) and ids[-1] in chat.stop_ids, chat.tokenizer.decode(chat.content_ids(ids))
        correct = outcome(sample.target, text, finished=finished, tools=sample.tools, read=chat.read_calls) > 0
        answers.append(Answer(text, finished, correct))
    return answers
