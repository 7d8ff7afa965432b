"""Monte Carlo tree search on the hardest samples (section 4.3), and the preference pairs it yields.

In: `scores.jsonl` of the iteration. Out: `trees.jsonl`, a tree a line, and `pairs.jsonl`, a pair a line with `prompt`,
`chosen`, `rejected` as preference trainers read them, and token ids, Q values, visits, tree and node.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from itool_jax.config import Config
from itool_jax.data.records import write_jsonl
from itool_jax.journal import Keep
from itool_jax.mcts.pairs import Pair, preference_pairs
from itool_jax.mcts.policy import PROMPT_BUCKET, ModelPolicy, Searched
from itool_jax.mcts.search import FinishedTree, grow
from itool_jax.metrics import progress, say
from itool_jax.sampler import Policy
from itool_jax.stages import folder, manifest, parts
from itool_jax.stages.folder import Base
from itool_jax.stages.spread import spread
from itool_jax.text.chat import Chat
from itool_jax.text.padding import bucket
from itool_jax.text.steps import StepTable

Row = dict[str, Any]


def run(config: Config) -> dict[str, Any]:
    """Searches the hardest samples of an iteration unless that is done; returns the stage's figures."""
    phase = folder.phase_name(config.iteration)
    outputs, after = ["trees.jsonl", "pairs.jsonl"], [(phase, "score")]
    return manifest.once(config, phase, "search", lambda: _search(config, phase), outputs, after)


def _search(config: Config, phase: str) -> dict[str, Any]:
    base, settings = folder.load_base(config), config.search
    before = folder.phase_name(config.iteration - 1)
    folder.require_policy(config, before)
    policy, table = folder.load_policy(config, before), folder.step_table(config, settings.granularity)
    # 1. The hardest samples, by the perplexities of this iteration.
    scores = folder.need(config, phase, "scores.jsonl", "score", ["id", "rank"])
    ranks = {row["id"]: row["rank"] for row in scores if row["rank"] is not None}
    hardest = sorted((s for s in parts.samples(config, "train") if s.id in ranks), key=lambda s: ranks[s.id])
    items = [Searched(*row) for row in zip(hardest, folder.encode(config, hardest), strict=True)]

    def work(items: Sequence[Searched], keep: Keep) -> list[Row]:
        with progress(f"search, iteration {config.iteration}", len(items) * settings.n_simulations) as advance:
            rows: dict[int, Row] = {}
            for n_simulations, finished in trees(policy, base, table, items, config):
                advance(n_simulations)
                for number, row in finished:
                    rows[number] = keep(f"tree {items[number].sample.id}", lambda row=row: row)
            return [rows[number] for number in range(len(items))]

    results = spread(config, manifest.working_folder(config, phase, "search"), items, work)
    pairs = [pair for row in results for pair in row["pairs"]]
    write_jsonl(config.run_dir / phase / "trees.jsonl", (row["tree"] for row in results))
    write_jsonl(config.run_dir / phase / "pairs.jsonl", pairs)
    _remark(phase, results)
    tokens = sum(row["sampled_tokens"] for row in results)
    return {"prompts": len(items), "trees": len(results), "pairs": len(pairs), "generated_tokens": tokens}


def trees(
    policy: Policy, base: Base, table: StepTable, items: Sequence[Searched], config: Config
) -> Iterator[tuple[int, list[tuple[int, Row]]]]:
    """Searches samples, and yields after each round what is done.

    That is the number of simulations that ended, and (index into `items`, row) of each tree that is complete. A row is
    {tree, pairs, sampled_tokens}: a row of trees.jsonl, and rows of pairs.jsonl.
    """
    for group in _groups(items, config.search.lanes):
        # 2. Search them in lock-step, `search.batch` at a time (eq 5 to 9).
        batch = [items[i] for i in group]
        max_length = base.config.max_length
        model = ModelPolicy(policy, base.chat, max_length, table, batch, config.search, config.self_eval, config.seed)
        for n_simulations, finished in grow(model.problems, model, config.search):
            # 3. The best and the worst step at each node are a preference pair.
            yield n_simulations, [(group[i], _row(tree, batch[i], base.chat, config)) for i, tree in finished]


def _row(finished: FinishedTree, searched: Searched, chat: Chat, config: Config) -> Row:
    pairs = preference_pairs(finished.tree, finished.steps, chat.tokenizer.decode, config.pairs)
    return {
        "tree": _tree_row(finished, searched, chat),
        "pairs": [_pair_row(pair, searched, chat, config.iteration) for pair in pairs],
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
