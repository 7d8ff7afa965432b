"""Monte Carlo tree search on the hardest samples (section 4.3), and the preference pairs it yields.

In: `scores.jsonl` of the iteration. Out: `trees.jsonl`, a tree a line, and `pairs.jsonl`, a pair a line with `prompt`,
`chosen`, `rejected` as preference trainers read them, and token ids, Q values, visits, tree and node.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from itool_jax.config import Config
from itool_jax.files import write_jsonl
from itool_jax.mcts.pairs import Pair, preference_pairs
from itool_jax.mcts.policy import PROMPT_BUCKET, ModelPolicy, Searched
from itool_jax.mcts.search import FinishedTree
from itool_jax.mcts.search import grow as grow_trees
from itool_jax.messages import say
from itool_jax.sampler import Policy
from itool_jax.stages import score
from itool_jax.stages.base import Base
from itool_jax.stages.cache import Figures, Phase, Step, Table, Task
from itool_jax.stages.paths import command, phase_name
from itool_jax.stages.run import Run
from itool_jax.stages.splits import Samples, split_replay
from itool_jax.stages.spread import Advance
from itool_jax.stages.weights import PhasePolicy
from itool_jax.text.chat import Chat
from itool_jax.text.padding import bucket
from itool_jax.text.steps import StepTable

Row = dict[str, Any]


class Forest(NamedTuple):
    """The trees of an iteration, and the preference pairs made of them."""

    trees: Table
    pairs: Table


def run(run: Run) -> Forest:
    """Searches the hardest samples of an iteration unless that is done."""
    config = run.config
    phase, policy = run.phase(phase_name(config.iteration)), run.policy(phase_name(config.iteration - 1))
    _, buffer = split_replay(run.splits.train, config)
    return phase.cached(SEARCH, policy, score.ranked_hardest(buffer, phase.read(score.SCORE)))


def grow(task: Task, policy: PhasePolicy, hard: Samples) -> Figures:
    """Searches the prompts in lock-step, and writes their trees and preference pairs."""
    run, config = task.run, task.config
    table = run.step_table(config.search.granularity)
    items = [Searched(*row) for row in zip(hard.samples, hard.encoded, strict=True)]
    running = policy.running()

    def work(items: Sequence[Searched]) -> Iterator[Advance]:
        for n_simulations, finished in trees(running, run.base, table, items, config, task.iteration):
            yield Advance(n_simulations, finished)

    results = task.map(items, work, f"search, iteration {task.iteration}", units=config.search.n_simulations)
    pairs = [pair for row in results for pair in row["pairs"]]
    write_jsonl(task.folder / "trees.jsonl", (row["tree"] for row in results))
    write_jsonl(task.folder / "pairs.jsonl", pairs)
    _remark(task.phase, results)
    tokens = sum(row["sampled_tokens"] for row in results)
    return {"prompts": len(items), "trees": len(results), "pairs": len(pairs), "generated_tokens": tokens}


def _read(phase: Phase) -> Forest:
    origin = (phase.name, "search")
    trees = Table(phase.folder / "trees.jsonl", ["id", "gold", "nodes"], origin, command(origin))
    return Forest(trees, Table(phase.folder / "pairs.jsonl", PAIR_KEYS, origin, command(origin)))


PAIR_KEYS = ("id", "prompt_ids", "chosen_ids", "rejected_ids", "visits_chosen", "visits_rejected", "tree")
SEARCH = Step("search", ["trees.jsonl", "pairs.jsonl"], grow, _read)


def trees(
    policy: Policy, base: Base, table: StepTable, items: Sequence[Searched], config: Config, iteration: int
) -> Iterator[tuple[int, list[tuple[int, Row]]]]:
    """Searches samples, and yields after each round what is done.

    That is the number of simulations that ended, and (index into `items`, row) of each tree that is complete. A row is
    {tree, pairs, sampled_tokens}: a row of trees.jsonl, and rows of pairs.jsonl.
    """
    for group in _groups(items, config.search.lanes):
        # Search them in lock-step, `search.batch` at a time (eq 5 to 9).
        batch = [items[i] for i in group]
        max_length = base.config.max_length
        model = ModelPolicy(policy, base.chat, max_length, table, batch, config.search, config.self_eval, config.seed)
        for n_simulations, finished in grow_trees(model.problems, model, config.search):
            # The best and the worst step at each node are a preference pair.
            yield (
                n_simulations,
                [(group[i], _row(tree, batch[i], base.chat, config, iteration)) for i, tree in finished],
            )


def _row(finished: FinishedTree, searched: Searched, chat: Chat, config: Config, iteration: int) -> Row:
    pairs = preference_pairs(finished.tree, finished.steps, chat.tokenizer.decode, config.pairs)
    return {
        "tree": _tree_row(finished, searched, chat),
        "pairs": [_pair_row(pair, searched, chat, iteration) for pair in pairs],
        "sampled_tokens": finished.sampled_tokens,
    }


def _remark(phase: str, results: Sequence[Row]) -> None:
    """Says what of the trees has nothing to teach."""
    ends = [[node["outcome"] for node in row["tree"]["nodes"] if node["terminal"]] for row in results]
    solved, missed = (sum(all(x * sign > 0 for x in found) for found in ends if found) for sign in (1, -1))
    without = sum(not row["pairs"] for row in results)
    if without:
        say(
            f"{phase}: {without} of {len(results)} trees have no pair; all responses are right in {solved} trees, "
            f"wrong in {missed}"
        )
    if without == len(results):
        say(f"{phase}: the search found no pair, preference training will leave the policy as it is")


def _groups(items: Sequence[Searched], least: int) -> list[list[int]]:
    """Returns indices of samples, grouped by padded prompt length; a group of less than `least` takes in the next."""

    def width(i: int) -> int:
        return bucket(len(items[i].encoded.prompt_ids), PROMPT_BUCKET)

    groups: list[list[int]] = []
    for _, same in itertools.groupby(sorted(range(len(items)), key=width), width):
        if not groups or len(groups[-1]) >= least:
            groups.append([])
        groups[-1] += same
    return groups


def _pair_row(pair: Pair, searched: Searched, chat: Chat, iteration: int) -> Row:
    prompt_ids = searched.encoded.prompt_ids + pair.path
    decode = functools.partial(chat.tokenizer.decode, skip_special_tokens=False)
    return {
        "id": f"{searched.sample.id}/{iteration}/{pair.node}",
        "prompt": decode(prompt_ids),
        "chosen": decode(pair.chosen_ids),
        "rejected": decode(pair.rejected_ids),
        "prompt_ids": prompt_ids,
        "chosen_ids": pair.chosen_ids,
        "rejected_ids": pair.rejected_ids,
        "q_chosen": pair.q_chosen,
        "q_rejected": pair.q_rejected,
        "visits_chosen": pair.visits_chosen,
        "visits_rejected": pair.visits_rejected,
        "tree": searched.sample.id,
        "node": pair.node,
        "chosen_node": pair.chosen_node,
        "rejected_node": pair.rejected_node,
    }


def _tree_row(finished: FinishedTree, searched: Searched, chat: Chat) -> Row:
    tree, decode = finished.tree, functools.partial(chat.tokenizer.decode, skip_special_tokens=False)
    nodes = [
        {
            "node": n,
            "parent": int(tree.parent_N[n]),
            "depth": int(tree.depth_N[n]),
            "text": decode(token_ids),
            "token_ids": token_ids,
            "visits": int(tree.visit_count_N[n]),
            "q": float(tree.q_value_N[n]),
            "value": float(tree.value_N[n]),
            "prior": float(tree.prior_N[n]),
            "outcome": float(tree.extra.outcome[n]),
            "confidence": float(tree.extra.confidence[n]),
            "terminal": bool(tree.terminal_N[n]),
            "gold": bool(tree.extra.matches_reference[n]),
        }
        for n, token_ids in enumerate(finished.steps)
    ]
    return {"id": searched.sample.id, "gold": searched.sample.target, "nodes": nodes}
