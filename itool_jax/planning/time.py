"""Estimates how much work each stage of a run is, and how long it takes at assumed speeds.

In: settings and data. Out: tokens and seconds per stage, by the formulas of `itool_jax.planning.roofline`. The gold
responses stand in for what only the run can tell: trees are full, sampled responses have the steps and lengths of the
gold ones, and a loop over many rows lasts as long as the 90th percentile of their lengths. Loading, compiling and
saving are not included.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import grain
import numpy as np

from itool_jax.config import Config
from itool_jax.data.batches import packed_batches, sft_batches
from itool_jax.planning.roofline import Machine, decode, forward, full_step, lora_step
from itool_jax.store.base import load_base, step_table
from itool_jax.system.devices import Device
from itool_jax.text.calls import looks_like_calls
from itool_jax.text.chat import Encoded, evaluation_frame
from itool_jax.text.padding import bucket, group, target_width
from itool_jax.text.sample import Sample
from itool_jax.text.steps import split_steps
from itool_jax.training import replay

LOOKED_AT = 256
"""Number of gold responses that are split into steps."""


class Workload(NamedTuple):
    """Work of a stage over the whole run."""

    stage: str
    what: str
    tokens: int
    """Tokens that the model reads or samples."""
    padded: int
    """Tokens including padding, if the stage knows its batches beforehand."""
    seconds: float
    """Seconds on all devices together; NaN if the device has no data sheet."""


class Data(NamedTuple):
    """Samples to train on and to evaluate, possibly none."""

    warmup: list[Sample]
    pool: list[Sample]
    """Samples that searched prompts are chosen from."""
    encoded: dict[str, Encoded]
    evaluated: list[Encoded]

    def rows(self, samples: Sequence[Sample]) -> list[Encoded]:
        """Returns the token ids of samples."""
        return [self.encoded[sample.id] for sample in samples]


class TimeModel:
    """Seconds of work on `count` devices with `copies` of the model, at the assumed shares of peak speed."""

    def __init__(self, config: Config, device: Device | None, count: int, copies: int):
        self.model, self.rank, self.shares = load_base(config).config, config.lora.rank, config.plan.shares(device)
        self.count, self.copies = count, copies
        nan = float("nan")
        bandwidth, peak = (device.bandwidth * 1e9, device.teraflops * 1e12) if device is not None else (nan, nan)
        self.machine = Machine(bandwidth=bandwidth, peak=peak)

    def train(self, rows: float, length: float, logits: float) -> float:
        """Returns the seconds of training on rows of `length` tokens, of which `logits` are targets."""
        shape = (self.model, 1, round(length), round(logits))
        work = lora_step(*shape, self.rank) if self.rank else full_step(*shape)
        # A step reads the weights once for all its rows, so reading them is never the bottleneck.
        return rows * work.flops / self.machine.peak / self.count / self.shares.training

    def read(self, rows: float, length: float, logits: float, before: float = 0) -> float:
        """Returns the seconds of passes over rows of `length` tokens, after `before` cached ones."""
        work = forward(self.model, 1, round(length), round(logits), round(before))
        return rows * work.flops / self.machine.peak / self.count / self.shares.scoring

    def sample(self, tokens: float, rows: float, prompts: float, prompt: float, own: float) -> float:
        """Returns the seconds of sampling `tokens` tokens for each of `rows` rows at once.

        The rows share `prompts` prompts; each has `own` tokens before the sampled ones.
        """
        share = [max(1, round(x / self.copies)) for x in (rows, prompts)]
        work = decode(self.model, share[0], round(prompt), share[1], round(own))
        return tokens * work.seconds(self.machine) / (self.count / self.copies) / self.shares.decode


def workloads(config: Config, data: Data, time_model: TimeModel, batch: int) -> list[Workload]:
    """Returns the workloads of a run that searches `batch` prompts at a time."""
    rows = [_warmup(config, data, time_model)]
    if config.iterations:
        trees = _trees(config, data)
        prompts = config.iterations * _hardest(config, data.pool)
        rows.append(_scores(config, data, time_model, max(1, min(batch, prompts // config.iterations))))
        rows.append(_search(data, time_model, trees, prompts, min(batch, prompts / config.iterations)))
        rows.append(_preferences(config, data, time_model, trees, prompts))
    return [*rows, _evaluation(config, data, time_model)] if data.evaluated else rows


def _warmup(config: Config, data: Data, time_model: TimeModel) -> Workload:
    """Computes the warm-up's work from the batches it really makes."""
    s, rows = config.warmup, data.rows(data.warmup)
    thirds = replay.curriculum([replay.sample_features(x) for x in data.warmup], s.order, config.seed)
    batches: list[grain.MapDataset] = []
    if not s.most_epochs:
        return Workload("warmup", "none (warmup.epochs=0)", 0, 0, 0.0)
    for number, ids in enumerate(part for part in thirds if part):
        given = ([data.encoded[i] for i in ids], s.batch_size, s.most_epochs, config.seed + number)
        batches.append(packed_batches(given[0], s.pack, *given[1:]) if s.pack else sft_batches(*given))
    shapes = [batch.tokens_BT.shape for part in batches for batch in part]
    padded, n = sum(map(math.prod, shapes)), sum(shape[0] for shape in shapes)
    tokens = s.most_epochs * sum(map(_length, rows))
    seconds = time_model.train(n, padded / n, s.most_epochs * sum(len(row.target_ids) for row in rows) / n)
    most = f" at most, {s.max_epochs} rounds (validation not included)" if s.epochs == "auto" else ""
    return Workload("warmup", f"{len(rows)} samples, {len(shapes)} steps{most}", tokens, padded, seconds)


def _scores(config: Config, data: Data, time_model: TimeModel, batch: int) -> Workload:
    rows, n = data.rows(data.pool), config.iterations
    widths = [target_width(len(row.prompt_ids), len(row.target_ids)) for row in rows]
    groups = list(group(widths, config.generate.tokens_per_batch, time_model.copies))
    count, padded = (sum(x) for x in zip(*((k, k * width) for _, width, k in groups), strict=True))
    seconds = n * time_model.read(count, padded / count, _mean_target(rows))
    # K answers to each prompt of the pool or of the searched ones, and a greedy answer to each searched one.
    k, searched = config.replay.samples, _hardest(config, data.pool)
    drawn = len(rows) if config.replay.select == "mixed" else searched
    lanes = max(1, min(batch, batch * config.search.breadth // k))
    loop = min(float(np.quantile([len(row.target_ids) for row in rows], 0.9)), config.generate.max_tokens)
    prompt = float(np.mean([len(row.prompt_ids) for row in rows]))
    seconds += n * time_model.read(drawn + searched, prompt, 0)
    seconds += n * math.ceil(drawn / lanes) * time_model.sample(loop, lanes * k, lanes, prompt, loop / 2)
    seconds += n * math.ceil(searched / batch) * time_model.sample(loop, batch, batch, prompt, loop / 2)
    answers = drawn * k + searched
    tokens = n * (sum(map(_length, rows)) + round(answers * _mean_target(rows) + (drawn + searched) * prompt))
    what = f"{n} × {len(rows)} samples, {answers} answers"
    return Workload("score", what, tokens, n * padded + tokens - n * sum(map(_length, rows)), seconds)


class _ExpectedTree(NamedTuple):
    """Average tree to expect, judging by the gold responses."""

    expansions: float
    states: float
    tokens: float
    """Sampled tokens."""
    step: float
    loop: float
    """Tokens of a round: the 90th percentile of step lengths."""
    path: float
    """Tokens of a finished response."""
    around: float
    """Tokens of the question about a state, and of the reference before it."""


def _trees(config: Config, data: Data) -> _ExpectedTree:
    s, rows, base = config.search, data.rows(data.pool), load_base(config)
    table = step_table(config, s.granularity)
    sizes: list[tuple[float, float, float]] = []
    steps: list[int] = []
    for row in rows[:LOOKED_AT]:
        lengths = [len(step) for step in split_steps(table, row.target_ids)]
        lengths = [*lengths[: s.max_depth - 1], sum(lengths[s.max_depth - 1 :])][: len(lengths)]
        level, expansions, states, tokens = 1, 0, 0, 0
        for length in lengths:
            expansions, level = expansions + level, level * s.breadth
            states, tokens = states + level, tokens + level * length
        part = min(1.0, s.n_simulations * s.max_depth / expansions)
        sizes.append((part * expansions, part * states, part * tokens))
        steps += lengths
    gold = base.chat.content_ids(rows[0].target_ids) if config.self_eval.reference == "gold" else None
    frame = evaluation_frame(base.chat, gold, config.self_eval.scale)
    expansions, states, tokens = np.mean(sizes, axis=0).tolist()
    loop = float(np.quantile(steps, 0.9))
    return _ExpectedTree(expansions, states, tokens, float(np.mean(steps)), loop, _mean_target(rows), len(frame.after))


def _search(data: Data, time_model: TimeModel, trees: _ExpectedTree, prompts: int, batch: float) -> Workload:
    """Counts prompts with and without the reference, a sampling round per expansion, and a question per state."""
    rows = data.rows(data.pool)
    prompt, breadth = float(np.mean([len(row.prompt_ids) for row in rows])), trees.states / trees.expansions
    rounds = math.ceil(prompts / batch) * trees.expansions
    question = trees.path / 2 + trees.around  # a state is half a response on average
    seconds = [
        time_model.read(prompts, 2 * prompt + trees.path, 0),
        rounds * time_model.sample(trees.loop, batch * breadth, batch, prompt, trees.path / 2 + trees.loop / 2),
        time_model.read(prompts * trees.states, question, 1, prompt),
    ]
    tokens = prompts * (2 * prompt + trees.path + trees.tokens + trees.states * question)
    what = f"{prompts} trees of {trees.states:.0f} states, {prompts * trees.tokens / 1e6:.2f} M sampled"
    return Workload("search", what, round(tokens), round(tokens), math.fsum(seconds))


def _preferences(config: Config, data: Data, time_model: TimeModel, trees: _ExpectedTree, prompts: int) -> Workload:
    """Counts the reference's log-probabilities of both sides of each pair, and the training."""
    s, rows = config.preference, data.rows(data.pool)
    pairs = prompts * config.plan.pairs_a_tree
    before = float(np.mean([len(row.prompt_ids) for row in rows])) + trees.path / 4
    width = bucket(round(before + 2 * trees.step))
    trained = pairs * (1 - config.pairs.held_out)
    steps = config.iterations * math.ceil(trained / config.iterations / s.batch_size) * s.epochs
    seconds = time_model.read(2 * pairs, before + trees.step, trees.step)
    seconds += time_model.train(steps * s.batch_size, width, 2 * trees.step)
    tokens = trained * s.epochs * (before + 2 * trees.step) + 2 * pairs * (before + trees.step)
    what = f"{trained:.0f} pairs, {steps} steps"
    return Workload("dpo", what, round(tokens), round(steps * s.batch_size * width + 2 * pairs * before), seconds)


def _evaluation(config: Config, data: Data, time_model: TimeModel) -> Workload:
    """Counts greedy responses of every phase, in the batches that evaluation makes."""
    rows, n = data.evaluated, config.iterations + 2
    widths = [bucket(len(row.prompt_ids) - 1) for row in rows]
    groups = list(group(widths, config.generate.tokens_per_batch, time_model.copies))
    loop = float(np.quantile([len(row.target_ids) for row in rows], 0.9))
    loop = min(loop, config.generate.max_tokens)
    seconds = math.fsum(
        time_model.read(count, width, 0) + time_model.sample(loop, count, count, width, loop / 2)
        for _, width, count in groups
    )
    tokens, padded = sum(map(_length, rows)), sum(width * count for _, width, count in groups)
    return Workload("evaluate", f"{n} × {len(rows)} samples", n * tokens, n * padded, n * seconds)


def _hardest(config: Config, pool: Sequence[Sample]) -> int:
    """Returns how many samples an iteration searches."""
    scored = [replay.ScoredSample(s.id, 1.0, looks_like_calls(s.target)) for s in pool]
    return len(replay.select_hardest(scored, config.replay))


def _length(row: Encoded) -> int:
    return len(row.prompt_ids) + len(row.target_ids)


def _mean_target(rows: Sequence[Encoded]) -> float:
    return float(np.mean([len(row.target_ids) for row in rows]))
