"""Runs this package for `benchmarks.run`, through the functions that its stages call."""

import functools
import itertools
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.protocol import Task, Work, cpu, serve, timed
from itool_jax.data.batches import PairRow, pair_batches, sft_batches
from itool_jax.inference.sampler import GenerateSettings, Policy, prefill, row_keys, sample_step, target_log_probs
from itool_jax.inference.sampler import generate as sample
from itool_jax.mcts.policy import ModelPolicy, Searched
from itool_jax.mcts.search import Response, SearchSettings, State, search
from itool_jax.mcts.value import SelfEvaluationSettings
from itool_jax.model import hf
from itool_jax.model.linear import LoraSettings
from itool_jax.model.lora import initialize_adapters
from itool_jax.model.transformer import Params, abstract
from itool_jax.store import training
from itool_jax.store.base import Base
from itool_jax.system.metrics import Metrics
from itool_jax.text.chat import Chat, Encoded, load_tokenizer
from itool_jax.text.padding import bucket, pad
from itool_jax.text.sample import Sample
from itool_jax.text.steps import StepTable, build_step_table
from itool_jax.training import loop as train
from itool_jax.training.losses import LossSettings
from itool_jax.training.settings import PreferenceSettings, WarmupSettings

LANES = 16
"""Number of prompts searched together, enough to fill two cores."""


def load(task: Task) -> tuple[Base, Policy]:
    config, params = hf.load(Path(task["model"]), stacked=False)
    chat = Chat(load_tokenizer(task["model"]))
    return Base(config, chat), Policy(abstract(config)[0], params)


def step_table(base: Base, *, endless: bool) -> StepTable:
    """Returns the table of step ends; an endless one has no stop token, so that every response has its full length."""
    table = build_step_table(base.chat.tokenizer, "call", base.config.vocab_size, base.chat.stop_ids)
    return table._replace(is_stop_V=jnp.zeros_like(table.is_stop_V)) if endless else table


def in_order(batches: Iterable[list[tuple[int, Any]]]) -> list[Any]:
    """Returns the values of all rows of some batches, in order of their index."""
    return [value for _, value in sorted(itertools.chain.from_iterable(batches))]


def generate(task: Task) -> Work:
    base, policy = load(task)
    table = step_table(base, endless=True)
    prompts = [(str(i), ids) for i, ids in enumerate(task["prompts"])]
    tokens = sum(bucket(len(ids) - 1) for _, ids in prompts)
    settings = GenerateSettings(max_tokens=task["sizes"]["new"], tokens_per_batch=tokens)

    def answers() -> list[list[int]]:
        return in_order(sample(policy, table, prompts, settings, base.config.max_length, task["seed"]))

    return Work({"tokens": answers()}, timed(lambda: sum(map(len, answers()))))


def score(task: Task) -> Work:
    _, policy = load(task)
    rows = list(zip(task["prompts"], task["targets"], strict=True))
    tokens = sum(len(prompt) + len(target) for prompt, target in rows)
    per_batch = GenerateSettings().tokens_per_batch

    def work() -> float:
        in_order(target_log_probs(policy, rows, per_batch))
        return tokens

    return Work({"values": in_order(target_log_probs(policy, rows, per_batch))}, timed(work))


def search_batched(task: Task) -> Work:
    """Measures several samples of each prompt, which is prefilled once, as in an expansion of the search."""
    base, policy = load(task)
    table, prompts = step_table(base, endless=True), task["prompts"]
    candidates, new = task["sizes"]["candidates"], task["sizes"]["new"]
    n_rows = len(prompts) * candidates
    keys = row_keys(jax.random.key(task["seed"]), np.arange(n_rows, dtype=np.uint32))
    last = [ids[-1:] for ids in prompts]

    def sample(temperature: float) -> np.ndarray:
        prefix = prefill(*policy, *pad([ids[:-1] for ids in prompts], bucket(len(prompts[0]) - 1)))
        steps = sample_step(
            policy.graph,
            new,
            policy.params,
            table,
            prefix,
            *pad(last, 1),
            keys,
            np.full(n_rows, new, np.int32),
            np.ones(n_rows, bool),
            np.float32(temperature),
        )
        return np.asarray(steps.tokens_BT)

    return Work({"tokens": sample(0.0).tolist()}, timed(lambda: sample(1.0).size))


def search_trees(task: Task) -> Work:
    """Measures the search of all problems, including prefill."""
    base, policy = load(task)
    table = step_table(base, endless=False)
    batch = [searched(problem) for problem in task["problems"]]
    settings = SearchSettings(
        batch=min(len(batch), LANES), inject_gold="always", exploration=1.0, **task["sizes"]["settings"]
    )

    def new_model() -> ModelPolicy:
        max_length, self_eval = base.config.max_length, SelfEvaluationSettings()
        return ModelPolicy(
            policy, base.chat, max_length, table, batch, settings, self_eval, jax.random.key(task["seed"])
        )

    def work() -> float:
        model = new_model()
        trees = search(model.problems, model, settings)
        return float(sum(len(tree.steps) - 1 for tree in trees))  # every node but the roots was judged

    work()
    return Work({"values": _first_gold_steps(new_model())}, timed(work))


def searched(problem: dict[str, Any]) -> Searched:
    """Converts a problem of a task for the search."""
    row = {key: tuple(value) if isinstance(value, list) else value for key, value in problem["sample"].items()}
    sample = Sample(**row)
    return Searched(sample, Encoded(sample.id, problem["prompt_ids"], problem["target_ids"]))


def _first_gold_steps(model: ModelPolicy) -> list[float]:
    """Returns log-probability and self-evaluation of the gold's first step, for each problem."""
    limit = model.settings.max_step_tokens
    steps = [problem.gold_steps[0][:limit] for problem in model.problems[: model.settings.lanes]]
    proposals = model.propose([State(b, b, [], limit, False, step) for b, step in enumerate(steps)])
    confidences = model.judge([Response(b, b, step) for b, step in enumerate(steps)])
    return [x for p, c in zip(proposals, confidences, strict=True) for x in (p[-1].log_prob, c)]


def sft(task: Task) -> Work:
    settings = WarmupSettings(
        batch_size=task["sizes"]["rows"],
        epochs=task["sizes"]["steps"],
        warmup_ratio=0.0,
        learning_rate=task["learning_rate"],
    )
    rows = [Encoded(str(i), *ids) for i, ids in enumerate(zip(task["prompts"], task["targets"], strict=True))]
    tokens = sum(len(row.prompt_ids) + len(row.target_ids) for row in rows)
    batches = sft_batches(rows, settings.batch_size, settings.epochs, task["seed"])
    return _training(task, train.sft_loss, settings, batches, tokens)


def dpo(task: Task) -> Work:
    settings = PreferenceSettings(
        batch_size=task["sizes"]["rows"],
        epochs=task["sizes"]["steps"],
        warmup_ratio=0.0,
        learning_rate=task["learning_rate"],
    )
    _, policy = load(task)
    per_batch = GenerateSettings().tokens_per_batch
    sides = [
        in_order(target_log_probs(policy, list(zip(task["prompts"], task[side], strict=True)), per_batch))
        for side in ("chosen", "rejected")
    ]
    rows = [
        PairRow(*ids, reference, (1, 1))
        for *ids, reference in zip(
            task["prompts"], task["chosen"], task["rejected"], zip(*sides, strict=True), strict=True
        )
    ]
    batches = pair_batches(rows, settings.batch_size, settings.epochs, task["seed"])
    loss = functools.partial(train.preference_loss, settings=LossSettings())
    return _training(task, loss, settings, batches, len(rows), [float(np.mean(side)) for side in sides])


def _training(task: Task, loss: Any, settings: Any, batches: Any, amount: int, values: Any = ()) -> Work:
    """Measures steps of the training loop, and returns their losses to check.

    Of adapters only the first loss is checked, before their random start matters.
    """
    config, params = hf.load(Path(task["model"]))
    lora = LoraSettings(**task["sizes"]["lora"])
    trainable: Params = params
    if lora.rank:
        trainable = initialize_adapters(config, lora, jax.random.key(task["seed"]))
    graph, frozen = abstract(config, lora)[0], params if lora.rank else {}
    path = Path(tempfile.mkdtemp(dir=task["out"])) / "metrics.jsonl"

    def work() -> float:
        trained = training.train_resumably(
            loss(graph),
            settings,
            (jax.tree.map(jnp.copy, trainable), frozen),  # training consumes them
            batches,
            seed=task["seed"],
            what=task["name"],
            metrics=Metrics(path, task["name"]),
        )
        jax.block_until_ready(trained)
        return float(amount * len(batches))

    work()
    losses = [json.loads(line)["loss"] for line in path.read_text().splitlines()]
    return Work({"values": [*values, *(losses[:1] if lora.rank else losses)]}, timed(work))


def load_weights(task: Task) -> Work:
    """Measures loading a checkpoint until every weight has been read."""

    def load_and_sum() -> float:
        _, params = hf.load(Path(task["model"]), stacked=False)
        return float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(params)))

    size = (Path(task["model"]) / hf.WEIGHTS).stat().st_size / 1e9

    def work() -> float:
        load_and_sum()
        return size

    return Work({"values": [load_and_sum()]}, timed(work))


SUITES = {
    "generate": generate,
    "score": score,
    "search": search_trees,
    "search_batched": search_batched,
    "sft": sft,
    "full_sft": sft,
    "dpo": dpo,
    "import": load_weights,
}


def device() -> str:
    """Returns the name of the accelerator or of the processors."""
    kind = jax.devices()[0].device_kind
    return cpu() if kind == "cpu" else f"{jax.device_count()} x {kind}"


if __name__ == "__main__":
    # The same settings as in itool_jax.main for float32; the environment sets the compilation cache.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_default_matmul_precision", "highest")
    serve(SUITES, device)
