"""Preference training on an iteration's pairs (section 4.3, eq 10 and 11), or a supervised alternative or control.

In: `pairs.jsonl`, `answers.jsonl`, the policy that the iteration started from, and the reference, which is the same
policy unless `preference.reference` is warmup. Out: the iteration's weights and, if the loss compares pairs,
`reference.jsonl` with the reference's log-probabilities. With `pairs.file`, its pairs become the iteration's
`pairs.jsonl`, and no search or warm-up is needed.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import grain

from itool_jax.config import Config
from itool_jax.data.batches import PairRow, pair_batches, repeat_or_thin, sft_batches
from itool_jax.data.pairs import GivenPair, load_pairs
from itool_jax.data.rows import refuse
from itool_jax.inference.sampler import target_log_probs
from itool_jax.stages import search
from itool_jax.store import checkpoint, training
from itool_jax.store.across_hosts import Advance, by_row, planned
from itool_jax.store.base import Base
from itool_jax.store.cache import Figures, Phase, Step, Table, Task
from itool_jax.store.columns import json_of
from itool_jax.store.encoding import check_ids, check_lengths
from itool_jax.store.paths import BASE, WARMUP, WEIGHTS, command, phase_name, weights_folder
from itool_jax.store.run import Run
from itool_jax.store.sources import fingerprints
from itool_jax.store.tables import AnswerRow, PreferenceRow, ReferenceRow
from itool_jax.store.weights import PhasePolicy, training_graph
from itool_jax.system.files import write_jsonl
from itool_jax.system.messages import log
from itool_jax.text.chat import Encoded, encode_sample
from itool_jax.text.padding import target_width
from itool_jax.text.sample import content_id
from itool_jax.training import loop as train
from itool_jax.training.replay import is_drawn

R = TypeVar("R", PreferenceRow, AnswerRow)
T = TypeVar("T")
Batches = grain.MapDataset


def run(run: Run) -> PhasePolicy:
    """Trains on an iteration's pairs unless already done; returns the new policy."""
    config = run.config
    config.preference.n_micro()
    phase, policy = run.phase(phase_name(config.iteration)), run.policy(phase_name(config.iteration - 1))
    if config.pairs.file is None:
        forest = phase.read(search.SEARCH)
        return phase.cached(TRAIN, policy, forest.pairs, forest.answers)
    pairs = phase.cached(_from_file(config))
    if config.iteration == 1 and not weights_folder(config.run_dir, WARMUP).is_dir():
        log("no warm-up: training starts from the base model")
        run.phase(WARMUP).cached(UNTRAINED, run.policy(BASE))
    return phase.cached(_without_data(TRAIN), policy, pairs)


def fit(
    task: Task, policy: PhasePolicy, pairs: Table[PreferenceRow], answers: Table[AnswerRow] | None = None
) -> Figures:
    """Trains the policy to prefer the chosen steps, and saves the iteration's weights.

    `preference.control` and the supervised losses train on other targets, for the same number of steps. Pairs of a file
    come without `answers`.
    """
    config, settings = task.config, task.config.preference
    rows, held_out = _hold_out(config, pairs.rows)
    if not rows:
        return _keep(task, policy, "all pairs are held out" if held_out else "the search found no pairs")
    source = task.run.policy(WARMUP) if settings.reference == "warmup" else policy
    reference: dict[str, ReferenceRow] = {}
    graph = training_graph(config, dropout=False)  # dropout would make log-ratios to the reference noisy
    if settings.control == "sft_same_prompts" or settings.is_supervised:
        targets = _targets(task, rows, _hold_out(config, answers.rows)[0] if answers else [])
        if not targets:
            return _keep(task, policy, "the trees hold no right answer by the model itself")
        batches = sft_batches(targets, settings.batch_size, settings.epochs, config.seed + task.iteration)
        loss = train.sft_loss(graph)
    else:
        step = REFERENCE if config.pairs.file is None else _without_data(REFERENCE)
        reference = _by_pair(pairs.rows, Phase(task.run, task.phase).cached(step, source, pairs))
        batches = _pair_batches(task, rows, reference)
        loss = train.preference_loss(graph, settings.loss_settings)
    what = f"{settings.loss if settings.control == 'none' else settings.control}, {task.phase}"
    seed = config.seed + task.iteration
    known = reference and source.phase == policy.phase
    before = [reference[row.id] for row in held_out] if known else _measure(task, policy, held_out, "before")
    start = policy.trainable(merge=settings.merge)
    digest = training.train_and_save(task, loss, settings, start, batches, seed=seed, what=what)
    measured = compare_held_out(before, _measure(task, task.run.policy(task.phase), held_out, "after"))
    _report(task, measured)
    return {"pairs": len(rows), "steps": len(batches), "weights": digest, "held_out": measured}


TRAIN = Step("dpo", [WEIGHTS], fit, lambda phase: phase.run.policy(phase.name))


def _keep(task: Task, policy: PhasePolicy, why: str) -> Figures:
    """Saves the unchanged policy as the iteration's, because there is nothing to train on."""
    log(f"{task.phase}: {why}; keeping the policy unchanged")
    trainable, _ = policy.trainable(merge=task.config.preference.merge)
    digest = checkpoint.save(task.folder / WEIGHTS, trainable)
    return {"pairs": 0, "steps": 0, "weights": digest, "held_out": compare_held_out([], [])}


def _is_swapped(config: Config, row: PreferenceRow) -> bool:
    """Returns True if the control `swapped` swaps the chosen and the rejected step of a pair, by a fair coin."""
    return config.preference.control == "swapped" and is_drawn(row.id, 0.5, "swapped", config.seed)


def _pair_batches(task: Task, rows: Sequence[PreferenceRow], reference: dict[str, ReferenceRow]) -> Batches:
    """Makes batches of the pairs with the reference's log-probabilities."""
    settings, pairs = task.config.preference, list[PairRow]()
    for row in rows:
        log_probs = reference[row.id]
        better = row.chosen_ids, log_probs.chosen, row.visits_chosen
        worse = row.rejected_ids, log_probs.rejected, row.visits_rejected
        if _is_swapped(task.config, row):
            better, worse = worse, better
        pairs.append(PairRow(row.prompt_ids, better[0], worse[0], (better[1], worse[1]), (better[2], worse[2])))
    return pair_batches(pairs, settings.batch_size, settings.epochs, task.config.seed + task.iteration)


def _targets(task: Task, rows: Sequence[PreferenceRow], answers: Sequence[AnswerRow]) -> list[Encoded]:
    """Returns the targets of a supervised loss, as many as there are pairs, so that all arms take equally many steps.

    Control `sft_same_prompts`: the gold responses to the pairs' prompts. `chosen_steps`: the pairs' chosen steps.
    `raft`: right answers to any searched prompt, thinned or repeated at random; empty if there are none.
    """
    if task.config.preference.control == "sft_same_prompts":
        by_id = {sample.id: sample for sample in task.run.splits.train.samples}
        return task.run.splits.train.choose(lambda _: [by_id[row.tree] for row in rows]).encoded
    if task.config.preference.loss == "chosen_steps":
        steps = [row.rejected_ids if _is_swapped(task.config, row) else row.chosen_ids for row in rows]
        return [Encoded(row.id, row.prompt_ids, step) for row, step in zip(rows, steps, strict=True)]
    own = [Encoded(row.id, row.prompt_ids, row.answer_ids) for row in answers]
    return repeat_or_thin(own, len(rows), task.config.seed + task.iteration) if own else []


# Pairs from elsewhere ---------------------------------------------------------------------------------------


def _without_data(step: Step[T]) -> Step[T]:
    """Returns a step that does not read the run's training data."""
    return dataclasses.replace(step, data_hashes={})


def _from_file(config: Config) -> Step[Table[PreferenceRow]]:
    """Returns the step that encodes the pairs of `pairs.file`."""
    hashes = fingerprints(config, ["pairs.file"])["pairs.file"]
    return Step("pairs", [PAIRS], encode_pairs, _read_pairs, hashes)


def encode_pairs(task: Task) -> Figures:
    """Writes the pairs of `pairs.file` as `pairs.jsonl`.

    Raises:
        ValueError: a pair is invalid or does not fit the model, unless `skip_bad_rows` is set; names file and row.
    """
    config, base = task.config, task.run.base
    skipped: list[str] | None = [] if config.skip_bad_rows else None
    rows: list[PreferenceRow] = []
    plain = thoughts = cut = 0
    assert config.pairs.file is not None
    for pair in load_pairs(config.pairs.file, skipped):
        try:
            if config.preference.loss == "conservative_dpo" and pair.visits is None:
                raise ValueError("preference.loss=conservative_dpo needs visits_chosen and visits_rejected of a search")
            prompt, chosen, rejected = _encoded(base, pair)
        except ValueError as error:
            refuse(f"{pair.place}: {error}", skipped, error)
            continue
        plain += pair.texts is not None and pair.ids is None and not base.chat.holds_special(pair.texts[0])
        thoughts += pair.thoughts
        cut += not base.chat.form.keeps_text and any(sample.before_calls for sample in pair.samples or ())
        rows.append(_row(base, pair, prompt, chosen, rejected))
    if not rows:
        raise ValueError(f"{config.pairs.file}: no pair is usable" + (f" (first: {skipped[0]})" if skipped else ""))
    if plain:
        log(f"{plain} prompts are plain text, so the chat template writes them as a user's message")
    if thoughts:
        log(f"thoughts before answers, <think>...</think>, are left out ({thoughts} pairs)")
    if cut:
        log(f"{cut} pairs have text before calls, which is dropped: {base.chat.form.name} has no place for it")
    for reason in skipped or ():
        log(f"skipped {reason}")
    write_jsonl(task.folder / PAIRS, map(json_of, rows))
    log(f"{task.phase}: {len(rows)} pairs of {config.pairs.file}, {len(skipped or ())} rows skipped")
    return {"pairs": len(rows), "skipped": len(skipped or ())}


def _row(base: Base, pair: GivenPair, prompt: list[int], chosen: list[int], rejected: list[int]) -> PreferenceRow:
    """Returns the row of a pair. Q is unknown; visits are equal, favouring neither step, unless a search counted them.

    Pairs of the same prompt, or tree, are held out together.
    """
    decode, visits = base.chat.tokenizer.decode, pair.visits or (1, 1)
    return PreferenceRow(
        id=pair.id,
        prompt=decode(prompt),
        chosen=decode(chosen),
        rejected=decode(rejected),
        prompt_ids=prompt,
        chosen_ids=chosen,
        rejected_ids=rejected,
        q_chosen=0.0,
        q_rejected=0.0,
        visits_chosen=visits[0],
        visits_rejected=visits[1],
        tree=pair.tree or content_id("prompt", {"ids": prompt}),
        node=0,
        chosen_node=0,
        rejected_node=0,
        best_ending_chosen=0.0,
        best_ending_rejected=0.0,
        chosen_sampled=False,
    )


def _encoded(base: Base, pair: GivenPair) -> tuple[list[int], list[int], list[int]]:
    """Returns the token ids of a pair's prompt, chosen and rejected step; ValueError if they do not fit the model."""
    chat = base.chat
    if pair.ids is not None:
        prompt, chosen, rejected = pair.ids
        check_ids([Encoded(pair.id, prompt, [*chosen, *rejected])], base.config.vocab_size)
        if pair.texts is not None and tuple(map(chat.tokenizer.decode, pair.ids)) != pair.texts:
            raise ValueError("its token ids are not those of its texts; were they made with another model?")
    elif pair.texts is not None and chat.holds_special(pair.texts[0]):  # a template wrote it
        if pair.has_context:
            raise ValueError(
                'its "prompt" was written by a template, so "system" and "tools" would be left out; remove them'
            )
        prompt, chosen, rejected = map(chat.encode, pair.texts)
        chosen, rejected = (
            ids if ids and ids[-1] in chat.stop_ids else [*ids, chat.end_of_turn] for ids in (chosen, rejected)
        )
    else:
        assert pair.samples is not None
        (_, prompt, chosen), (_, _, rejected) = (encode_sample(chat, sample) for sample in pair.samples)
    if chosen == rejected:
        raise ValueError("both answers are the same in the tool format")
    check_lengths([Encoded(pair.id, prompt, step) for step in (chosen, rejected)], base.config.max_length)
    return prompt, chosen, rejected


PAIRS = "pairs.jsonl"


def _read_pairs(phase: Phase) -> Table[PreferenceRow]:
    origin = (phase.name, "pairs")
    return Table(phase.folder / PAIRS, PreferenceRow, search.PAIR_KEYS, origin, command((phase.name, "dpo")))


def keep_base(task: Task, base: PhasePolicy) -> Figures:
    """Saves the untrained base as the policy to start from, where there was no warm-up."""
    return {"weights": checkpoint.save(task.folder / WEIGHTS, base.trainable()[0])}


UNTRAINED = _without_data(Step("untrained", [WEIGHTS], keep_base, lambda phase: phase.run.policy(phase.name)))


# Held-out pairs ---------------------------------------------------------------------------------------------


def _hold_out(config: Config, rows: Sequence[R]) -> tuple[list[R], list[R]]:
    """Splits pairs (or answers) by prompt into those to train on and those held out."""
    parts: tuple[list[R], list[R]] = [], []
    for row in rows:
        parts[is_drawn(row.tree, config.pairs.held_out, "held_out", config.seed)].append(row)
    return parts


def _measure(task: Task, policy: PhasePolicy, rows: Sequence[PreferenceRow], when: str) -> list[ReferenceRow]:
    """Computes the log-probabilities of the held-out pairs' steps, before or after training."""
    return _log_probs(task, policy, rows, f"held-out log-probs {when}", task.working / when) if rows else []


def compare_held_out(before: Sequence[ReferenceRow], after: Sequence[ReferenceRow]) -> Figures:
    """Measures how training changed held-out pairs, from their steps' log-probabilities before and after it.

    A pair's margin is log π_w - log π_l in nats. `delta` is the gain in mean margin: the Δ of eq 11 between the two
    policies, without β. Accuracy is the share of positive margins. All are None without pairs.
    """
    figures: Figures = {"pairs": len(before)}
    for name, rows in (("before", before), ("after", after)):
        margins = [row.chosen - row.rejected for row in rows]
        figures[f"margin_{name}"] = sum(margins) / len(margins) if margins else None
        figures[f"accuracy_{name}"] = sum(margin > 0 for margin in margins) / len(margins) if margins else None
    return figures | {"delta": figures["margin_after"] - figures["margin_before"] if before else None}


def _report(task: Task, x: Figures) -> None:
    """Logs how training changed the held-out pairs."""
    if x["pairs"]:
        log(
            f"{task.phase}: {x['pairs']} held-out pairs: "
            f"margin {x['margin_before']:.2f} → {x['margin_after']:.2f} nats, "
            f"chosen step more likely in {100 * x['accuracy_before']:.1f} → {100 * x['accuracy_after']:.1f} %"
        )
    elif share := task.config.pairs.held_out:
        log(f"{task.phase}: no held-out pairs (pairs.held_out={share}), so the effect of training is not measured")


# The reference ----------------------------------------------------------------------------------------------


def score_pairs(task: Task, policy: PhasePolicy, pairs: Table[PreferenceRow]) -> Figures:
    """Writes the log-probabilities of both steps of each pair under the given policy (π_ref of eq 11)."""
    log_probs = _log_probs(task, policy, pairs.rows, "reference log-probs")
    write_jsonl(task.folder / FILE, (row._asdict() for row in log_probs))
    return {"pairs": len(pairs.rows)}


def _log_probs(
    task: Task, policy: PhasePolicy, rows: Sequence[PreferenceRow], what: str, folder: Path | None = None
) -> list[ReferenceRow]:
    """Computes the log-probabilities of both steps of each pair."""
    steps = [(row.prompt_ids, step) for row in rows for step in (row.chosen_ids, row.rejected_ids)]
    tokens, running = task.config.generate.tokens_per_batch, policy.running()

    def work(steps: Sequence[tuple[list[int], list[int]]]) -> Iterator[Advance]:
        widths = [target_width(len(prompt), len(step)) for prompt, step in steps]
        return by_row(target_log_probs(running, steps, tokens), planned(widths, tokens))

    sums = task.map(steps, work, what, folder=folder)
    return [ReferenceRow(row.id, *both) for row, *both in zip(rows, sums[::2], sums[1::2], strict=True)]


FILE = "reference.jsonl"


def _read(phase: Phase) -> Table[ReferenceRow]:
    origin = (phase.name, "reference")
    return Table(phase.folder / FILE, ReferenceRow, ReferenceRow._fields, origin, command((phase.name, "dpo")))


REFERENCE = Step("reference", [FILE], score_pairs, _read)


def _by_pair(pairs: Sequence[PreferenceRow], reference: Table[ReferenceRow]) -> dict[str, ReferenceRow]:
    """Indexes the reference's log-probabilities by pair id; ValueError names a pair that has none."""
    by_id = {row.id: row for row in reference.rows}
    if missing := [row.id for row in pairs if row.id not in by_id]:
        raise ValueError(f"{reference.path} has no row for pair {missing[0]}; delete it to compute it again")
    return by_id
