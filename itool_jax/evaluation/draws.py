"""Samples complete answers from a policy and counts how many are right.

In: a policy and samples. Out: one count per sample. Answers are generated like the first step of a search, so all
answers to a prompt share its cache.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax

from itool_jax.config import Config
from itool_jax.inference.sampler import Policy, stable_hash
from itool_jax.mcts.policy import ModelPolicy, Searched, prompt_width
from itool_jax.mcts.search import RIGHT, SearchSettings, State
from itool_jax.mcts.value import SelfEvaluationSettings
from itool_jax.store.base import Base
from itool_jax.system.progress import Batch
from itool_jax.text.calls import looks_like_calls
from itool_jax.text.steps import StepTable


def random_key(config: Config, iteration: int, purpose: str) -> jax.Array:
    """Returns the random key of an iteration for one purpose; keys of different purposes are independent."""
    key = jax.random.fold_in(jax.random.key(config.seed), iteration)
    return jax.random.fold_in(key, stable_hash(purpose))


def settings(config: Config, n: int, temperature: float) -> SearchSettings:
    """Returns settings for `n` complete answers per prompt, with at most a search's rows and prompts at once."""
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
    """Yields (index into `items`, number of right answers) for each prompt of a batch, batch by batch.

    A batch takes as long as its longest possible answer, so prompts with long golds share batches.
    """
    settings, no_question = settings.fitted(len(items)), SelfEvaluationSettings(weight=0.0)
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


def planned(items: Sequence[Searched], settings: SearchSettings, units: int = 1) -> list[Batch]:
    """Returns the batches in which prompts are answered or searched, of `units` units of progress per prompt."""
    groups = by_prompt_width(items, settings.fitted(len(items)).lanes)
    widths = [max(prompt_width(len(items[i].encoded.prompt_ids)) for i in group) for group in groups]
    return [Batch(units * len(group), width * len(group), width) for group, width in zip(groups, widths, strict=True)]


def _limit(item: Searched, settings: SearchSettings) -> int:
    """Returns the most tokens that an answer may have.

    Where the gold is calls, an answer far longer than the gold cannot be right. Where the gold is text, any text is
    right, so the full limit applies.
    """
    most = settings.max_last_step_tokens
    return min(most, 2 * len(item.encoded.target_ids) + 16) if looks_like_calls(item.sample.target) else most


def by_prompt_width(items: Sequence[Searched], least: int) -> list[list[int]]:
    """Groups sample indices by padded prompt length; a group with fewer than `least` is merged with the next."""

    def width(i: int) -> int:
        return prompt_width(len(items[i].encoded.prompt_ids))

    groups: list[list[int]] = []
    for _, same in itertools.groupby(sorted(range(len(items)), key=width), width):
        if not groups or len(groups[-1]) >= least:
            groups.append([])
        groups[-1] += same
    return groups
