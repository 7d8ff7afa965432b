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
from itool_jax.mcts.search import Forest
from itool_jax.messages import say
from itool_jax.stages import score
from itool_jax.stages.cache import Figures, Phase, Step, Table, Task
from itool_jax.stages.paths import command, phase_name
from itool_jax.stages.run import Run
from itool_jax.stages.searcher import PROMPT_BUCKET, Searched, Searcher
from itool_jax.stages.splits import Samples, split_replay
from itool_jax.stages.spread import Advance
from itool_jax.stages.weights import PhasePolicy
from itool_jax.text.chat import Chat
from itool_jax.text.padding import bucket

Row = dict[str, Any]


class Search(NamedTuple):
    """What the search of an iteration came to."""

    trees: Table
    pairs: Table


def run(run: Run) -> Search:
    """Searches the hardest samples of an iteration unless that is done."""
    config = run.config
    phase, policy = run.phase(phase_name(config.iteration)), run.policy(phase_name(config.iteration - 1))
    _, buffer = split_replay(run.splits.train, config)
    return phase.cached(TREES, policy, score.hardest(buffer, phase.made(score.PERPLEXITIES)))


def grow(task: Task, policy: PhasePolicy, hard: Samples) -> Figures:
    """Searches the prompts in lock-step, and writes their trees and preference pairs."""
    run, config = task.run, task.config
    table = run.step_table(config.search.granularity)
    items = [Searched(*row) for row in zip(hard.samples, hard.encoded, strict=True)]

    def work(items: Sequence[Searched]) -> Iterator[Advance]:
        for n_simulations, finished in trees(policy.running(), run.base, table, items, config, task.iteration):
            yield Advance(n_simulations, finished)

    results = task.map(items, work, f"search, iteration {task.iteration}", units=config.search.n_simulations)
    pairs = [pair for row in results for pair in row["pairs"]]
    write_jsonl(task.folder / "trees.jsonl", (row["tree"] for row in results))
    write_jsonl(task.folder / "pairs.jsonl", pairs)
    _remark(task.phase, results)
    tokens = sum(row["sampled_tokens"] for row in results)
    return {"prompts": len(items), "trees": len(results), "pairs": len(pairs), "generated_tokens": tokens}


def _read(phase: Phase) -> Search:
    origin = (phase.name, "search")
    trees = Table(phase.folder / "trees.jsonl", ["id", "gold", "nodes"], origin, command(origin))
    return Search(trees, Table(phase.folder / "pairs.jsonl", PAIR_KEYS, origin, command(origin)))


PAIR_KEYS = ("id", "prompt_ids", "chosen_ids", "rejected_ids", "visits_chosen", "visits_rejected", "tree")
TREES = Step("search", ["trees.jsonl", "pairs.jsonl"], grow, _read)


def trees(policy, base, table, items, config, iteration=1):
    places = {item.sample.id: i for i, item in enumerate(items)}
    for group in _groups(items, config.search.seats):
        # 2. Search them in lock-step, `search.batch` at a time (eq 5 to 9).
        searcher = Searcher(policy, base, table, group, config.search, config.self_eval, config.seed)
        # 3. The best and the worst step at each node are a preference pair.
        results = _results(searcher.search(), group, base.chat, config, iteration)
        yield len(group) * config.search.n_simulations, [(places[name], row) for name, row in results.items()]


def _results(forest: Forest, group: Sequence[Searched], chat: Chat, config: Config, iteration: int) -> dict[str, Row]:
    """Tree and pairs of each sample by its id."""
    decode = chat.tokenizer.decode
    pairs = preference_pairs(forest.tree, forest.step_tokens_BNS, forest.step_length_BN, decode, config.pairs)
    found = {}
    for b, searched in enumerate(group):
        own = [_pair_row(pair, searched, chat, iteration) for pair in pairs if pair.tree == b]
        tree, tokens = _tree_row(forest, b, searched, chat), int(forest.sampled_tokens_B[b])
        found[searched.sample.id] = {"tree": tree, "pairs": own, "sampled_tokens": tokens}
    return found


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


def _groups(items: Sequence[Searched], least: int) -> list[list[Searched]]:
    """Samples of one padded prompt length together, with the next longer ones where they are less than `least`."""
    rows = sorted(items, key=lambda row: bucket(len(row.encoded.prompt_ids), PROMPT_BUCKET))
    found: list[list[Searched]] = []
    for _, same in itertools.groupby(rows, lambda row: bucket(len(row.encoded.prompt_ids), PROMPT_BUCKET)):
        if not found or len(found[-1]) >= least:
            found.append([])
        found[-1] += same
    return found


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


def _tree_row(forest: Forest, b: int, searched: Searched, chat: Chat) -> Row:
    t, decode = forest.tree, functools.partial(chat.tokenizer.decode, skip_special_tokens=False)

    def node(n: int) -> Row:
        ids = forest.step_tokens_BNS[b, n, : forest.step_length_BN[b, n]].tolist()
        return {
            "node": n,
            "parent": int(t.parent_BN[b, n]),
            "depth": int(t.depth_BN[b, n]),
            "text": decode(ids),
            "token_ids": ids,
            "visits": int(t.visit_count_BN[b, n]),
            "q": float(t.q_value_BN[b, n]),
            "value": float(t.value_BN[b, n]),
            "prior": float(t.prior_BN[b, n]),
            "outcome": float(t.outcome_BN[b, n]),
            "confidence": float(t.confidence_BN[b, n]),
            "terminal": bool(t.terminal_BN[b, n]),
            "gold": bool(t.on_gold_BN[b, n]),
        }

    nodes = [node(n) for n in range(int(t.n_nodes_B[b]))]
    return {"id": searched.sample.id, "gold": searched.sample.target, "nodes": nodes}
