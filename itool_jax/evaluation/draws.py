"""Whole answers that a policy samples itself, and how many of them are right.

In: a policy and samples. Out: a count a sample. The answers are grown as a search grows its first step, so that all of
a prompt's share its cache.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax

from itool_jax.config import Config
from itool_jax.inference.sampler import Policy, stable_hash
from itool_jax.mcts.policy import PROMPT_BUCKET, ModelPolicy, Searched
from itool_jax.mcts.search import RIGHT, SearchSettings, State
from itool_jax.mcts.value import SelfEvaluationSettings
from itool_jax.store.base import Base
from itool_jax.text.calls import looks_like_calls
from itool_jax.text.padding import bucket
from itool_jax.text.steps import StepTable


def random_key(config: Config, iteration: int, purpose: str) -> jax.Array:
    """The key of an iteration's draws; purposes are independent of each other."""
    key = jax.random.fold_in(jax.random.key(config.seed), iteration)
    return jax.random.fold_in(key, stable_hash(purpose))


def settings(config: Config, n: int, temperature: float) -> SearchSettings:
    """`n` whole answers to each prompt, in no more rows and of no more prompts at once than the run's searches have."""
    search = config.search
    return dataclasses.replace(
        search,
        breadth=n,
        max_depth=1,
        max_last_step_tokens=config.generate.max_tokens,
        temperature=temperature,
        top_p=1.0,
        inject_gold="never",
        batch=max(1, min(search.lanes, search.lanes * search.breadth // n)),
    )


def count_right(
    policy: Policy, base: Base, table: StepTable, items: Sequence[Searched], settings: SearchSettings, key: jax.Array
) -> Iterator[list[tuple[int, int]]]:
    """Yields after each batch, (index into `items`, how many of its answers are right).

    Prompts with long golds wait for each other: a batch takes as long as its longest answer may be.
    """
    no_question = SelfEvaluationSettings(weight=0.0)
    for group in by_prompt_width(items, settings.lanes):
        group = sorted(group, key=lambda i: _limit(items[i], settings))
        batch = [items[i] for i in group]
        model = ModelPolicy(policy, base.chat, base.config.max_length, table, batch, settings, no_question, key)
        for start in range(0, len(batch), settings.lanes):
            problems = range(len(batch))[start : start + settings.lanes]
            states = [
                State(lane, problem, [], _limit(batch[problem], settings), until_stop=True, gold_step=[])
                for lane, problem in enumerate(problems)
            ]
            proposals = model.propose(states)
            yield [
                (group[problem], sum(model.grade(problem, 0, s.token_ids, s.stopped) >= RIGHT for s in steps))
                for problem, steps in zip(problems, proposals, strict=True)
            ]


def _limit(item: Searched, settings: SearchSettings) -> int:
    """The most tokens that an answer may have.

    Calls in far more tokens than the gold's are not the gold's calls; any text is right where the gold is one.
    """
    most = settings.max_last_step_tokens
    return min(most, 2 * len(item.encoded.target_ids) + 16) if looks_like_calls(item.sample.target) else most


def by_prompt_width(items: Sequence[Searched], least: int) -> list[list[int]]:
    """Indices of samples, grouped by padded prompt length; a group of less than `least` takes in the next."""

    def width(i: int) -> int:
        return bucket(len(items[i].encoded.prompt_ids), PROMPT_BUCKET)

    groups: list[list[int]] = []
    for _, same in itertools.groupby(sorted(range(len(items)), key=width), width):
        if not groups or len(groups[-1]) >= least:
            groups.append([])
        groups[-1] += same
    return groups
