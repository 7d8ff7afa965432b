"""Monte Carlo tree search on the chosen prompts (section 4.3), and the preference pairs it yields.

In: `scores.jsonl` of the iteration. Out: `trees.jsonl`, one tree per line; `pairs.jsonl`, one pair per line with
`prompt`, `chosen` and `rejected` as preference trainers read them, and token ids, Q values, visits, tree and node;
`answers.jsonl`, the right answers that the model sampled itself.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from itool_jax.config import Config
from itool_jax.evaluation import draws
from itool_jax.evaluation.results import is_solved
from itool_jax.evaluation.statistics import calibration_error, roc_auc
from itool_jax.inference.sampler import Policy
from itool_jax.mcts.pairs import Pair, preference_pairs
from itool_jax.mcts.policy import ModelPolicy, Searched
from itool_jax.mcts.search import RIGHT, FinishedTree, is_reachable
from itool_jax.mcts.search import grow as grow_trees
from itool_jax.stages import score
from itool_jax.store.across_hosts import Advance
from itool_jax.store.base import Base, let_go_of_programs
from itool_jax.store.cache import Figures, Phase, Step, Table, Task
from itool_jax.store.columns import json_of, row_of
from itool_jax.store.paths import command, phase_name
from itool_jax.store.run import Run
from itool_jax.store.splits import Samples, search_pool
from itool_jax.store.tables import AnswerRow, NodeRow, PreferenceRow, ScoreRow, SearchRow, TreeRow
from itool_jax.store.weights import PhasePolicy
from itool_jax.system.files import write_jsonl
from itool_jax.system.messages import log
from itool_jax.text.calls import looks_like_calls
from itool_jax.text.chat import Chat
from itool_jax.text.steps import StepTable
from itool_jax.training import replay

REFUSAL_MARGIN = 0.05
"""Maximum difference between the share of pairs whose gold is text and that share in the training data."""


class Forest(NamedTuple):
    """The trees of an iteration, their preference pairs, and the model's own right answers in them."""

    trees: Table[TreeRow]
    pairs: Table[PreferenceRow]
    answers: Table[AnswerRow]


def run(run: Run) -> Forest:
    """Searches the chosen samples of an iteration unless already done; returns the result."""
    config = run.config
    phase, policy = run.phase(phase_name(config.iteration)), run.policy(phase_name(config.iteration - 1))
    pool = search_pool(run.splits.train, config)
    scores = phase.read(score.SCORE)
    return phase.cached(SEARCH, policy, score.ranked_hardest(pool, scores), scores)


def grow(task: Task, policy: PhasePolicy, hard: Samples, scores: Table[ScoreRow]) -> Figures:
    """Searches the prompts in lock-step, and writes their trees, preference pairs and right answers.

    `scores` tell which prompts the policy has already answered correctly.
    """
    run, config = task.run, task.config
    table = run.step_table(config.search.granularity)
    right = {row.id: row.right for row in scores.rows}
    items = [
        Searched(sample, encoded, bool(right[sample.id]))
        for sample, encoded in zip(hard.samples, hard.encoded, strict=True)
    ]
    running = policy.running()

    def work(items: Sequence[Searched]) -> Iterator[Advance]:
        yield Advance(0, (), draws.planned(items, config.search, config.search.n_simulations))
        for n_simulations, finished in trees(running, run.base, table, items, config, task.iteration):
            yield Advance(n_simulations, [(i, json_of(row)) for i, row in finished])

    journaled = task.map(items, work, f"search, iteration {task.iteration}", units=config.search.n_simulations)
    results = [row_of(SearchRow, row) for row in journaled]
    pairs = _with_refusals(task, [pair for row in results for pair in row.pairs])
    write_jsonl(task.folder / "trees.jsonl", (json_of(row.tree) for row in results))
    write_jsonl(task.folder / "pairs.jsonl", map(json_of, pairs))
    write_jsonl(task.folder / "answers.jsonl", (json_of(answer) for row in results for answer in row.answers))
    figures = {
        "prompts": len(items),
        "trees": len(results),
        "pairs": len(pairs),
        "generated_tokens": sum(row.sampled_tokens for row in results),
        **_figures(results, pairs, config.self_eval.scale == "binary"),
    }
    _remark(task.phase, config, figures)
    return figures


def _read(phase: Phase) -> Forest:
    origin, folder = (phase.name, "search"), phase.folder
    made_by = origin, command(origin)
    return Forest(
        Table(folder / "trees.jsonl", TreeRow, ["id", "gold", "nodes"], *made_by),
        Table(folder / "pairs.jsonl", PreferenceRow, PAIR_KEYS, *made_by),
        Table(folder / "answers.jsonl", AnswerRow, AnswerRow._fields, *made_by),
    )


PAIR_KEYS = ("id", "prompt_ids", "chosen_ids", "rejected_ids", "visits_chosen", "visits_rejected", "tree")
SEARCH = Step("search", ["trees.jsonl", "pairs.jsonl", "answers.jsonl"], grow, _read)


def trees(
    policy: Policy, base: Base, table: StepTable, items: Sequence[Searched], config: Config, iteration: int
) -> Iterator[tuple[int, list[tuple[int, SearchRow]]]]:
    """Searches samples, and yields the progress after each round.

    That is the number of simulations finished, and (index into `items`, row) for each completed tree.
    """
    key, weight = draws.random_key(config, iteration, "search"), config.self_eval.weight
    settings = config.search.fitted(len(items))
    for group in draws.by_prompt_width(items, settings.lanes):
        let_go_of_programs(base)  # of the last group, whose widths were others
        # Search them in lock-step, `search.batch` at a time (eq 5 to 9).
        batch = [items[i] for i in group]
        max_length = base.config.max_length
        model = ModelPolicy(policy, base.chat, max_length, table, batch, settings, config.self_eval, key)
        for n_simulations, finished in grow_trees(model.problems, model, settings, weight):
            # The best and the worst step at each node form a preference pair.
            yield (
                n_simulations,
                [(group[i], _row(i, tree, model, base.chat, config, iteration)) for i, tree in finished],
            )


def _row(
    problem: int, finished: FinishedTree, model: ModelPolicy, chat: Chat, config: Config, iteration: int
) -> SearchRow:
    searched, decode = model.batch[problem], chat.tokenizer.decode
    pairs = preference_pairs(finished.tree, finished.steps, decode, config.pairs, finished.observed)
    return SearchRow(
        tree=_tree_row(finished, searched, chat),
        pairs=[_pair_row(pair, searched, chat, config, iteration) for pair in pairs if config.pairs.accepts(pair)],
        invalid_pairs=sum(not config.pairs.is_valid(pair) for pair in pairs),
        answers=_own_answers(finished, searched, iteration),
        sampled_tokens=finished.sampled_tokens,
        judged=model.swapped.get(problem),
        reachable=is_reachable(model.problems[problem], config.search),
    )


def _own_answers(finished: FinishedTree, searched: Searched, iteration: int) -> list[AnswerRow]:
    """Returns the right turns that the model sampled from first token to last, without duplicates."""
    tree, answers = finished.tree, dict[tuple[int, ...], AnswerRow]()
    for node in range(1, int(tree.n_nodes)):
        ends_right = node in finished.observed or (tree.terminal_N[node] and tree.extra.outcome[node] >= RIGHT)
        path = _path(finished, node)
        if not ends_right or not tree.extra.sampled[path].all():
            continue
        before: list[int] = list(searched.encoded.prompt_ids)
        turn: list[int] = []
        for step in path:
            turn += finished.steps[step]
            if step in finished.observed and step != node:
                before, turn = [*before, *turn, *finished.observed[step]], []
        sample = searched.sample.id
        answers.setdefault((*before, -1, *turn), AnswerRow(f"{sample}/{iteration}/{node}", sample, before, turn))
    return list(answers.values())


def _path(finished: FinishedTree, node: int) -> list[int]:
    """Returns the path of nodes from the root's child to a node."""
    path: list[int] = []
    while node > 0:
        path.append(node)
        node = int(finished.tree.parent_N[node])
    return path[::-1]


# Results ----------------------------------------------------------------------------------------------------


def _with_refusals(task: Task, pairs: list[PreferenceRow]) -> list[PreferenceRow]:
    """Drops pairs of calls or texts at random, to keep the share of texts within 5 points of the training data's."""
    config = task.config
    if config.pairs.require == "gap":
        return pairs
    is_text = {sample.id: not looks_like_calls(sample.target) for sample in task.run.splits.train.samples}
    share = sum(is_text.values()) / len(is_text)
    marked = [(pair.id, is_text[pair.tree]) for pair in pairs]
    kept = replay.keep_share(marked, share, REFUSAL_MARGIN, config.seed + task.iteration)
    n_texts, of_data = sum(text for _, text in marked), f"{100 * share:.0f} %"
    if len(kept) < len(pairs):
        log(
            f"{task.phase}: dropped {len(pairs) - len(kept)} of {len(pairs)} pairs at random: {n_texts} were for text "
            f"answers, whose share is kept within {100 * REFUSAL_MARGIN:.0f} points of the training data's {of_data}"
        )
    elif pairs and not n_texts and share > REFUSAL_MARGIN:
        log(
            f"{task.phase}: no pair is for a text answer, but {of_data} of the training data are; the policy may "
            "unlearn refusals"
        )
    return [pair for pair in pairs if pair.id in kept]


def _figures(results: Sequence[SearchRow], pairs: Sequence[PreferenceRow], is_probability: bool) -> Figures:
    """Computes the search's figures on trees, pairs and self-evaluation.

    If the self-evaluation is not a probability (four grades), its calibration error and flip rate are None.
    """
    trees = [row.tree.nodes for row in results]
    ends = [node for nodes in trees for node in nodes if node.terminal]
    asked = [row.judged for row in results if row.judged is not None]
    marks = [node.outcome >= RIGHT for node in ends]
    confidences = [node.confidence for node in ends]
    flips = sum((a > 0.5) != (b > 0.5) for a, b in asked)
    return {
        "solved": sum(is_solved(nodes) for nodes in trees),
        "solved_by_gold": sum(is_solved(nodes, own=False) and not is_solved(nodes) for nodes in trees),
        "trees_without_pairs": len({row.tree.id for row in results} - {pair.tree for pair in pairs}),
        "all_right": sum(all(n.outcome >= RIGHT for n in nodes if n.terminal) for nodes in trees),
        "all_wrong": sum(not any(n.outcome >= RIGHT for n in nodes if n.terminal) for nodes in trees),
        "unreachable_golds": sum(not row.reachable for row in results),
        "invalid_pairs": sum(row.invalid_pairs for row in results),
        "chosen_is_gold": sum(pair.chosen_is_gold for pair in pairs),
        "chosen_injected": sum(not pair.chosen_sampled for pair in pairs),
        "answers": sum(len(row.answers) for row in results),
        "self_evaluation": {
            "responses": len(marks) if asked else 0,
            "auc": roc_auc(confidences, marks) if asked else None,
            "calibration_error": calibration_error(confidences, marks) if asked and is_probability else None,
            "mean_right": _mean([c for c, mark in zip(confidences, marks, strict=True) if mark]) if asked else None,
            "mean_wrong": _mean([c for c, mark in zip(confidences, marks, strict=True) if not mark]) if asked else None,
            "asked_both_ways": len(asked),
            "flipped": flips / len(asked) if asked and is_probability else None,
        },
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _remark(phase: str, config: Config, figures: Figures) -> None:
    """Logs the results of the search, and which trees give nothing to learn from."""
    n, pairs = figures["trees"], figures["pairs"]
    by_gold = f", {figures['solved_by_gold']} more only with the gold's steps" if config.search.injects else ""
    log(f"{phase}: the model's own steps solve {figures['solved']} of {n} prompts{by_gold}")
    if figures["unreachable_golds"]:
        log(
            f"{phase}: the gold response exceeds the search limits in {figures['unreachable_golds']} of {n} prompts; "
            "raise search.max_depth, search.max_step_tokens or search.max_last_step_tokens"
        )
    if figures["trees_without_pairs"]:
        log(
            f"{phase}: {figures['trees_without_pairs']} of {n} trees have no pairs; all responses are right in "
            f"{figures['all_right']} trees, all wrong in {figures['all_wrong']}"
        )
    if pairs:
        log(
            f"{phase}: {pairs} pairs, the chosen step is the gold's in {figures['chosen_is_gold']} "
            f"(injected in {figures['chosen_injected']}); "
            + (
                f"{figures['invalid_pairs']} more do not compare a right ending with a wrong one and are dropped"
                if config.pairs.require == "outcome"
                else f"{figures['invalid_pairs']} do not compare a right ending with a wrong one"
            )
        )
    else:
        log(f"{phase}: the search found no pairs; preference training will leave the policy unchanged")
    judged = figures["self_evaluation"]
    if judged["auc"] is not None:
        line = f"{phase}: self-evaluation separates right from wrong responses with AUC {judged['auc']:.2f}"
        if judged["flipped"] is not None:
            line += (
                f" and calibration error {judged['calibration_error']:.2f}; swapping the letters flips "
                f"{100 * judged['flipped']:.0f} % of its answers"
            )
        log(line)


def _pair_row(pair: Pair, searched: Searched, chat: Chat, config: Config, iteration: int) -> PreferenceRow:
    prompt_ids = searched.encoded.prompt_ids + pair.path
    decode = functools.partial(chat.tokenizer.decode, skip_special_tokens=False)
    return PreferenceRow(
        id=f"{searched.sample.id}/{iteration}/{pair.node}",
        prompt=decode(prompt_ids),
        chosen=decode(pair.chosen_ids),
        rejected=decode(pair.rejected_ids),
        prompt_ids=prompt_ids,
        tree=searched.sample.id,
        valid=config.pairs.is_valid(pair),
        **{name: value for name, value in pair._asdict().items() if name != "path"},
    )


def _tree_row(finished: FinishedTree, searched: Searched, chat: Chat) -> TreeRow:
    tree, decode = finished.tree, functools.partial(chat.tokenizer.decode, skip_special_tokens=False)
    nodes = [
        NodeRow(
            node=n,
            parent=int(tree.parent_N[n]),
            depth=int(tree.depth_N[n]),
            text=decode(token_ids),
            token_ids=token_ids,
            visits=int(tree.visit_count_N[n]),
            q=float(tree.q_value_N[n]),
            value=float(tree.value_N[n]),
            prior=float(tree.prior_N[n]),
            outcome=float(tree.extra.outcome[n]),
            confidence=float(tree.extra.confidence[n]),
            terminal=bool(tree.terminal_N[n]),
            gold=bool(tree.extra.matches_reference[n]),
            sampled=bool(tree.extra.sampled[n]),
            complete=bool(tree.extra.complete[n]),
            observed=decode(finished.observed[n]) if n in finished.observed else None,
        )
        for n, token_ids in enumerate(finished.steps)
    ]
    return TreeRow(searched.sample.id, searched.sample.target, nodes)
