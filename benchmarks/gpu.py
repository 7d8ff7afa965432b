"""An 8B-shaped random Llama on one accelerator: `python -m benchmarks.gpu --json=OUT`, under nine minutes.

In bfloat16: decoding, prefill, scoring, a search, and steps of LoRA SFT and DPO, each with its share of what the
hardware allows (`benchmarks.roofline`): of the memory's bandwidth for decoding, of peak operations for the rest, where
what is computed again to save memory does not count. Before anything is timed, cached log-probabilities are compared
with uncached ones. `--small` takes a tiny model in float32, to see that everything works.
"""

import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import inputs, roofline
from benchmarks.children.ours import device, searched, step_table
from benchmarks.memory import LLAMA
from benchmarks.roofline import Machine, Work
from itool_jax import sampler, train
from itool_jax.data.batches import PairRow, collate_pairs
from itool_jax.losses import LossSettings
from itool_jax.mcts.search import SearchSettings
from itool_jax.mcts.value import SelfEvaluationSettings
from itool_jax.memory import step_table as any_step_table
from itool_jax.model import forms, hf
from itool_jax.model.linear import LoraSettings
from itool_jax.model.lora import initialize_adapters
from itool_jax.model.transformer import ModelConfig, Params, abstract
from itool_jax.sampler import Policy
from itool_jax.stages.folder import Base
from itool_jax.stages.search import Searcher
from itool_jax.text.chat import Chat, load_tokenizer
from itool_jax.text.padding import bucket, collate, pad

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shapes of the work."""

    model: ModelConfig
    prompt: int
    new: int
    batches: tuple[int, ...]
    """Rows of decoding."""
    rows: int
    """Rows of prefill, scoring and training."""
    length: int
    target: int
    step: int
    micro: int
    """Rows of training that are computed at once."""
    prompts: int
    """Of the search."""
    trees: SearchSettings


LARGE = Sizes(
    model=LLAMA,
    prompt=1024,
    new=64,
    batches=(1, 32, 128),
    rows=8,
    length=2048,
    target=512,
    step=64,
    micro=1,
    prompts=48,
    trees=SearchSettings(batch=32, last_step_limit=128),
)


def small() -> Sizes:
    """For two cores and some seconds; vocabulary and layers are those of the smallest model of `inputs`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(inputs.MODELS["tiny"]))
        model = hf.read_config(Path(folder), "float32")
    trees = SearchSettings(batch=2, n_simulations=2, breadth=2, max_depth=2, step_limit=4, last_step_limit=6)
    return Sizes(
        model=dataclasses.replace(model, remat="layers"),
        prompt=64,
        new=4,
        batches=(1, 2),
        rows=2,
        length=32,
        target=8,
        step=4,
        micro=1,
        prompts=3,
        trees=trees,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    small: bool = False
    """Tiny model and shapes, to see that everything works."""
    machine: Machine = dataclasses.field(default_factory=Machine)
    """What the shares are of; the defaults are an H200's."""
    rounds: int = 3
    """Measured rounds, of which the median counts."""
    json: Path | None = None
    """File for the rows of the table."""


def main(settings: Settings) -> list[Row]:
    """Measures everything, prints the table and writes the JSON."""
    sizes = small() if settings.small else LARGE
    rows: list[Row] = []
    print(f"{'work':<34} {'rate':>10} {'unit':<9} {'share':>6}  of")
    for row in measure(sizes, settings):
        rows.append(row | {"device": device(), "dtype": sizes.model.dtype, "peak_memory_gb": peak_memory()})
        share = f"{row['share']:6.1%}" if row["share"] is not None else " " * 6
        print(f"{row['name']:<34} {row['rate']:10.5g} {row['unit']:<9} {share}  {row['of']}", flush=True)
        if settings.json is not None:  # what was measured is kept, whatever comes next
            settings.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"on {device()}, {sizes.model.dtype}; most memory in use: {peak_memory() or float('nan'):.1f} GB")
    return rows


def peak_memory() -> float | None:
    """Gigabytes of the device that were in use at once; None where it does not tell."""
    found = jax.local_devices()[0].memory_stats()
    return found["peak_bytes_in_use"] / 1e9 if found else None


def measure(s: Sizes, settings: Settings) -> Iterator[Row]:
    """All rows of the table; the weights are made once, to run first and then to train."""
    running = dataclasses.replace(s.model, stacked=False)
    policy = Policy(abstract(running)[0], random_weights(running))
    ids = np.random.default_rng(0).integers(8, s.model.vocab_size, (max(*s.batches, s.rows), s.length + 2 * s.step))
    compare_cached(policy, ids, s)
    timed = functools.partial(seconds, rounds=settings.rounds)
    machine = settings.machine
    for rows in s.batches:
        taken = timed(decoding(policy, ids[:rows, : s.prompt], s.new))
        work = s.new * roofline.decode(s.model, rows, s.prompt, own=s.new // 2)
        yield _row(f"decode, batch {rows}", rows * s.new, "tokens/s", taken, work, machine, "bandwidth")
    taken = timed(lambda: sampler.prefill(*policy, *pad(ids[: s.rows, : s.length].tolist(), s.length)))
    work = roofline.forward(s.model, s.rows, s.length)
    yield _row("prefill", s.rows * s.length, "tokens/s", taken, work, machine, "peak")
    samples = [(row[: s.length - s.target].tolist(), row[s.length - s.target : s.length].tolist()) for row in ids]
    batch = collate(samples[: s.rows], s.length, s.rows)
    taken = timed(lambda: sampler.score(*policy, batch))
    work = roofline.forward(s.model, s.rows, s.length, s.target)
    yield _row("scoring", s.rows * s.length, "tokens/s", taken, work, machine, "peak")
    states, taken = searching(policy, running, s)
    yield _row("search", states, "states/s", taken, None, machine, "")
    weights = forms.to_train(policy.params)
    pairs = [PairRow(*_parts(row, s), (0.0, 0.0), (1, 1)) for row in ids[: s.rows]]
    pair_batch = collate_pairs(pairs, bucket(s.length + 2 * s.step), s.rows)
    for name, loss, data, amount, unit, work in (
        (
            "LoRA SFT",
            train.sft_loss,
            batch,
            s.rows * s.length,
            "tokens/s",
            roofline.lora_step(s.model, s.rows, s.length, s.target),
        ),
        (
            "LoRA DPO",
            functools.partial(train.preference_loss, settings=LossSettings()),
            pair_batch,
            s.rows,
            "pairs/s",
            roofline.lora_step(s.model, s.rows, s.length + 2 * s.step, 2 * s.step),
        ),
    ):
        taken = timed(training(loss, weights, data, s))
        yield _row(name, amount, unit, taken, work, machine, "peak (MFU)")


def _parts(ids: np.ndarray, s: Sizes) -> list[list[int]]:
    """A prompt and two steps."""
    return [part.tolist() for part in np.split(ids, [s.length, s.length + s.step])]


def _row(name: str, amount: float, unit: str, taken: float, work: Work | None, machine: Machine, of: str) -> Row:
    share = None
    if work is not None:
        share = (work.bytes / machine.bandwidth if of == "bandwidth" else work.flops / machine.peak) / taken
    return {"name": name, "rate": amount / taken, "unit": unit, "seconds": taken, "share": share, "of": of}


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """Median of some rounds, after one that compiles."""
    jax.block_until_ready(work())
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(work())
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def random_weights(config: ModelConfig) -> Params:
    """Weights to run, made on the device; norms are ones."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def make(shape: tuple[int, ...], spread: float, key: jax.Array) -> jax.Array:
        found = spread * jax.random.normal(key, shape) if spread else jnp.ones(shape)
        return found.astype(config.dtype)

    leaves, structure = jax.tree.flatten_with_path(abstract(config)[1])
    spreads = [inputs.spread(path, x.shape) for path, x in leaves]
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [make(x.shape, spread, key) for (_, x), spread, key in zip(leaves, spreads, keys, strict=True)]
    return jax.tree.unflatten(structure, made)


def compare_cached(policy: Policy, ids: np.ndarray, s: Sizes) -> None:
    """Raises RuntimeError where log-probabilities behind a cache are not those of a whole pass."""
    rows, fork = ids[:2, : s.prompt + s.step].tolist(), s.prompt
    whole = sampler.score(*policy, collate([(row[:fork], row[fork:]) for row in rows], bucket(len(rows[0])), 2))
    prefix = sampler.prefill(*policy, *pad([row[: fork - 1] for row in rows], fork))
    paths, steps = pad([row[fork - 1 : fork] for row in rows], 1), pad([row[fork:] for row in rows], s.step)
    cached = sampler.score_step(*policy, prefix, *paths, *steps)
    error = float(np.max(np.abs(np.asarray(cached) - np.asarray(whole)))) / s.step
    print(f"log-probability of a token, cached against uncached: differs by {error:.1e} nats")
    if error > (1e-4 if s.model.dtype == "float32" else 2e-2):
        raise RuntimeError(f"cached and uncached log-probabilities differ by {error:.3g} nats a token")


def decoding(policy: Policy, ids: np.ndarray, new: int) -> Callable[[], Any]:
    """Sampling of `new` tokens for rows of a prompt each, which is computed beforehand."""
    rows = len(ids)
    table = any_step_table(policy.params["embedding"].shape[0])  # no stop token: all rows run to the end
    prefix = sampler.prefill(*policy, *pad([row[:-1].tolist() for row in ids], ids.shape[1]))
    keys = sampler.row_keys(jax.random.key(0), np.arange(rows, dtype=np.uint32))
    return lambda: (
        sampler.sample_step(
            policy.graph,
            new,
            policy.params,
            table,
            prefix,
            *pad(ids[:, -1:].tolist(), 1),
            keys,
            np.full(rows, new, np.int32),
            np.ones(rows, bool),
            np.float32(1),
        ).tokens_BT
    )


def searching(policy: Policy, config: ModelConfig, s: Sizes) -> tuple[float, float]:
    """States of a search and its seconds, the second time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs.save_tokenizer(folder, config.vocab_size)
        problems = inputs.search_rows({"rows": s.prompts, "prompt": s.prompt}, folder)["problems"]
        base = Base(config, Chat(load_tokenizer(name)))
    table, group = step_table(base, endless=False), [searched(problem) for problem in problems]
    for _ in range(2):
        start = time.perf_counter()
        forest = Searcher(policy, base, table, group, s.trees, SelfEvaluationSettings(), 0).search()
    return float(np.sum(forest.tree.n_nodes_B - 1)), time.perf_counter() - start


def training(loss: Callable[..., Any], weights: Params, batch: Any, s: Sizes) -> Callable[[], Any]:
    """A training step of adapters after the other."""
    lora = LoraSettings()
    graph, optimizer = abstract(s.model, lora)[0], train.adamw(0.01, 1.0)
    state = [train.new_state(optimizer, initialize_adapters(s.model, lora, jax.random.key(0)))]

    def step() -> Any:
        key, rate = jax.random.key(0), np.float32(1e-5)
        state[0], metrics = train.train_step(
            loss(graph), optimizer, s.rows // s.micro, state[0], weights, batch, key, rate
        )
        return metrics

    return step


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
