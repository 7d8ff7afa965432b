"""Measures an 8B-shaped random Llama on one accelerator: `python -m benchmarks.gpu --json=OUT`.

On an H100 most of the time is compiling: 400 s for the decoding rows alone; `--kinds` and `--layers` reduce it.

In bfloat16, measures decoding, prefill, scoring, a search, and steps of LoRA SFT and DPO, each with its share of what
the hardware allows (`itool_jax.planning.roofline`): of memory bandwidth for decoding, of peak operations for the rest,
where recomputation to save memory does not count. Before timing, compares cached log-probabilities with uncached ones.
Search, SFT and DPO also show the most memory they took and the memory planned by the compiler's analysis
(`itool_jax.planning.memory`). `--small` uses a tiny model in float32, to check that everything works.
"""

import ctypes
import dataclasses
import functools
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import inputs
from benchmarks.children.ours import device, searched, step_table
from benchmarks.memory import LLAMA
from itool_jax.data.batches import PairRow, collate_pairs
from itool_jax.inference import sampler
from itool_jax.inference.sampler import Policy
from itool_jax.mcts.policy import ModelPolicy
from itool_jax.mcts.search import FinishedTree, SearchSettings
from itool_jax.mcts.search import search as search_trees
from itool_jax.mcts.value import SelfEvaluationSettings
from itool_jax.model import hf, stacking
from itool_jax.model.linear import LoraSettings
from itool_jax.model.lora import initialize_adapters
from itool_jax.model.transformer import ModelConfig, Params, abstract
from itool_jax.planning import memory, roofline
from itool_jax.planning.roofline import Machine, Work
from itool_jax.planning.sizes import search_lengths
from itool_jax.store.base import Base
from itool_jax.text.chat import Chat, load_tokenizer
from itool_jax.text.padding import bucket, collate, pad
from itool_jax.training import loop as train
from itool_jax.training.losses import LossSettings

Row = dict[str, Any]
KINDS = ("decode", "prefill", "scoring", "sft", "dpo", "search")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Shapes of the work."""

    model: ModelConfig
    prompt: int
    new: int
    batches: tuple[int, ...]
    """Numbers of rows to decode."""
    rows: int
    """Rows of prefill, scoring and training."""
    length: int
    target: int
    step: int
    micro: int
    """Rows per micro-batch of training."""
    prompts: int
    """Prompts of the search."""
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
    trees=SearchSettings(batch=32, max_last_step_tokens=128),
)


HOST = dataclasses.replace(
    LARGE,
    model=dataclasses.replace(
        LLAMA,
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        n_layers=8,
        n_heads=16,
        n_kv_heads=16,
        head_dim=64,
        dtype="float32",
    ),
    prompt=512,
    new=32,
    batches=(1, 8),
    rows=2,
    length=512,
    target=128,
    prompts=8,
    trees=SearchSettings(batch=8, n_simulations=1, max_depth=2, max_last_step_tokens=32),
)
"""Sizes for a CPU and its memory: a model of 0.2 billion parameters."""


def small() -> Sizes:
    """Returns sizes for two cores and a few seconds; vocabulary and layers are those of `inputs`' smallest model."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(inputs.MODELS["tiny"]))
        model = hf.read_config(Path(folder), "float32")
    trees = SearchSettings(batch=2, n_simulations=2, breadth=2, max_depth=2, max_step_tokens=4, max_last_step_tokens=6)
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
    """Command-line options."""

    small: bool = False
    """Use a tiny model and shapes, to check that everything works."""
    host: bool = False
    """Use a float32 model of 0.2 billion parameters, to measure memory on a machine without an accelerator."""
    machine: Machine = dataclasses.field(default_factory=Machine)
    """Peak rates that shares refer to; the defaults are an H200's."""
    kinds: tuple[Literal["decode", "prefill", "scoring", "sft", "dpo", "search"], ...] = KINDS
    """Kinds of work to measure."""
    layers: int = 0
    """Number of layers of the model; fewer layers compile sooner. 0 keeps the model's own number."""
    rounds: int = 3
    """Number of measured rounds, of which the median counts."""
    json: Path | None = None
    """File to write the rows of the table to."""


def main(settings: Settings) -> list[Row]:
    """Measures everything, prints the table and writes the JSON."""
    sizes = small() if settings.small else HOST if settings.host else LARGE
    if settings.layers:
        sizes = dataclasses.replace(sizes, model=dataclasses.replace(sizes.model, n_layers=settings.layers))
    rows: list[Row] = []
    print(f"{'work':<34} {'rate':>10} {'unit':<9} {'share':>6}  of")
    for row in measure(sizes, settings):
        rows.append(row | {"device": device(), "dtype": sizes.model.dtype, "peak_memory_gb": peak_memory()})
        share = f"{row['share']:6.1%}" if row["share"] is not None else " " * 6
        print(f"{row['name']:<34} {row['rate']:10.5g} {row['unit']:<9} {share}  {row['of']}", flush=True)
        if settings.json is not None:  # results are kept even if a later measurement fails
            settings.json.write_text(json.dumps(rows, indent=2) + "\n")
    print(f"on {device()}, {sizes.model.dtype}; peak memory in use: {peak_memory() or float('nan'):.1f} GB")
    return rows


def peak_memory() -> float | None:
    """Returns the device's peak memory in use, in GB; None if it does not report it."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] / 1e9 if stats else None


def with_memory(plan: memory.MemoryEstimate, held: Any, work: Callable[[], Any]) -> tuple[Any, Row]:
    """Does work that reads `held`, and compares its memory with the plan; both in GB of this device.

    The device only reports the peak since the start. So a block is allocated first, as large as that peak less what is
    in use now and less half of what the work needs; the work itself then reaches a new peak. On the host, the process's
    memory is measured while the work runs a second time, with all programs compiled.
    """
    stats = jax.local_devices()[0].memory_stats
    before, block = stats(), None
    row = {"planned_gb": plan.total / 1e9, "plan_gb": {k: v / 1e9 for k, v in plan._asdict().items()}}
    if before is None:
        work()
        low = _forget_peak()
    else:
        room = before["peak_bytes_in_use"] - before["bytes_in_use"] - (plan.temporaries + plan.outputs) // 2
        block = jax.block_until_ready(jnp.zeros(max(room, 1), jnp.uint8))
        low = stats()["bytes_in_use"]
    done = jax.block_until_ready(work())
    del block
    peak = _process("VmHWM") if before is None else stats()["peak_bytes_in_use"]
    taken = peak - low + sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held))
    row |= {"measured_gb": taken / 1e9}
    print(f"{'':<34} memory {taken / 1e9:.2f} GB, planned {plan.total / 1e9:.2f} ({taken / plan.total - 1:+.1%})")
    return done, row


def _forget_peak() -> int:
    """Returns this process's bytes, and makes Linux count their peak from now on."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _process("VmRSS")


def _process(name: str) -> int:
    """Returns bytes from /proc: VmRSS is the current value, VmHWM the peak."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def measure(s: Sizes, settings: Settings) -> Iterator[Row]:
    """Yields all rows of the table; the weights are made once, first for inference and then for training."""
    running = dataclasses.replace(s.model, stacked=False)
    policy = Policy(abstract(running)[0], random_weights(running))
    ids = np.random.default_rng(0).integers(8, s.model.vocab_size, (max(*s.batches, s.rows), s.length + 2 * s.step))
    if {"decode", "scoring", "search"} & set(settings.kinds):
        compare_cached(policy, ids, s)
    timed = functools.partial(seconds, rounds=settings.rounds)
    machine = settings.machine
    for rows in s.batches if "decode" in settings.kinds else ():
        taken = timed(decoding(policy, ids[:rows, : s.prompt], s.new))
        work = s.new * roofline.decode(s.model, rows, s.prompt, own=s.new // 2)
        yield _row(f"decode, batch {rows}", rows * s.new, "tokens/s", taken, work, machine, "bandwidth")
    if "prefill" in settings.kinds:
        taken = timed(lambda: sampler.prefill(*policy, *pad(ids[: s.rows, : s.length].tolist(), s.length)))
        work = roofline.forward(s.model, s.rows, s.length)
        yield _row("prefill", s.rows * s.length, "tokens/s", taken, work, machine, "peak")
    samples = [(row[: s.length - s.target].tolist(), row[s.length - s.target : s.length].tolist()) for row in ids]
    batch = collate(samples[: s.rows], s.length, s.rows)
    if "scoring" in settings.kinds:
        taken = timed(lambda: sampler.score(*policy, batch))
        work = roofline.forward(s.model, s.rows, s.length, s.target)
        yield _row("scoring", s.rows * s.length, "tokens/s", taken, work, machine, "peak")
    weights = stacking.to_train(policy.params)  # consumes the policy's
    pairs = [PairRow(*_parts(row, s), (0.0, 0.0), (1, 1)) for row in ids[: s.rows]]
    width = bucket(s.length + 2 * s.step)
    pair_batch = collate_pairs(pairs, width, s.rows)
    for name, loss, data, size, amount, unit, work in (
        (
            "LoRA SFT",
            None,
            batch,
            s.length,
            s.rows * s.length,
            "tokens/s",
            roofline.lora_step(s.model, s.rows, s.length, s.target),
        ),
        (
            "LoRA DPO",
            LossSettings(),
            pair_batch,
            width,
            s.rows,
            "pairs/s",
            roofline.lora_step(s.model, s.rows, s.length + 2 * s.step, 2 * s.step),
        ),
    ):
        if name[-3:].lower() not in settings.kinds:
            continue
        targets = (data.row if loss else data).targets_BR.shape[1]
        plan = memory.training(loss, s.model, LoraSettings(), s.rows // s.micro, s.rows, size, targets=targets)
        step, state = training(loss, weights, data, s)
        _, used = with_memory(plan, (weights, state), step)
        taken = timed(step)
        yield _row(name, amount, unit, taken, work, machine, "peak (MFU)") | used
        del step, state
    if "search" in settings.kinds:
        yield searching(Policy(policy.graph, stacking.to_run(weights)), running, s, machine)


def _parts(ids: np.ndarray, s: Sizes) -> list[list[int]]:
    """Splits ids into a prompt and two steps."""
    return [part.tolist() for part in np.split(ids, [s.length, s.length + s.step])]


def _row(name: str, amount: float, unit: str, taken: float, work: Work | None, machine: Machine, of: str) -> Row:
    share = None
    if work is not None:
        share = (work.bytes / machine.bandwidth if of == "bandwidth" else work.flops / machine.peak) / taken
    return {"name": name, "rate": amount / taken, "unit": unit, "seconds": taken, "share": share, "of": of}


def seconds(work: Callable[[], Any], rounds: int) -> float:
    """Returns the median seconds of some rounds, after one that compiles."""
    jax.block_until_ready(work())
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(work())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def random_weights(config: ModelConfig) -> Params:
    """Makes inference weights on the device; norms are ones."""

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def make(shape: tuple[int, ...], spread: float, key: jax.Array) -> jax.Array:
        weight = spread * jax.random.normal(key, shape) if spread else jnp.ones(shape)
        return weight.astype(config.dtype)

    leaves, structure = jax.tree.flatten_with_path(abstract(config)[1])
    spreads = [inputs.spread(path, x.shape) for path, x in leaves]
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [make(x.shape, spread, key) for (_, x), spread, key in zip(leaves, spreads, keys, strict=True)]
    return jax.tree.unflatten(structure, made)


def compare_cached(policy: Policy, ids: np.ndarray, s: Sizes) -> None:
    """Raises RuntimeError if log-probabilities after a cache differ from those of a full pass."""
    rows, fork = ids[:2, : s.prompt + s.step].tolist(), s.prompt
    whole = sampler.score(*policy, collate([(row[:fork], row[fork:]) for row in rows], bucket(len(rows[0])), 2))
    prefix = sampler.prefill(*policy, *pad([row[: fork - 1] for row in rows], fork))
    paths, steps = pad([row[fork - 1 : fork] for row in rows], 1), pad([row[fork:] for row in rows], s.step)
    cached = sampler.score_step(*policy, prefix, *paths, *steps)
    error = float(np.max(np.abs(np.asarray(cached) - np.asarray(whole)))) / s.step
    print(f"log-probabilities with and without cache differ by {error:.1e} nats per token")
    if error > (1e-4 if s.model.dtype == "float32" else 2e-2):
        raise RuntimeError(f"cached and uncached log-probabilities differ by {error:.3g} nats per token")


def decoding(policy: Policy, ids: np.ndarray, new: int) -> Callable[[], Any]:
    """Returns a function that samples `new` tokens per row, after prompts that are prefilled beforehand."""
    rows = len(ids)
    table = memory.step_table(policy.params["embedding"].shape[0])  # no stop token: all rows run to the end
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


def searching(policy: Policy, config: ModelConfig, s: Sizes, machine: Machine) -> Row:
    """Measures a search, the second time it runs."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs.save_tokenizer(folder, config.vocab_size)
        problems = inputs.search_rows({"rows": s.prompts, "prompt": s.prompt}, folder)["problems"]
        base = Base(config, Chat(load_tokenizer(name)))
    table, group = step_table(base, endless=False), [searched(problem) for problem in problems]

    def search() -> list[FinishedTree]:
        model = ModelPolicy(
            policy, base.chat, config.max_length, table, group, s.trees, SelfEvaluationSettings(), jax.random.key(0)
        )
        return search_trees(model.problems, model, s.trees)

    lengths = search_lengths(base.chat, [item.encoded for item in group], s.trees, SelfEvaluationSettings())
    programs = memory.searching(LoraSettings(rank=0), s.trees, lengths, s.trees.batch)
    plan = max((program.need(config) for program in programs), key=lambda need: need.total)
    _, used = with_memory(plan, policy.params, search)
    start = time.perf_counter()
    trees = search()
    states, taken = float(sum(len(tree.steps) - 1 for tree in trees)), time.perf_counter() - start
    return _row("search", states, "states/s", taken, None, machine, "") | used


def training(loss: LossSettings | None, weights: Params, batch: Any, s: Sizes) -> tuple[Callable[[], Any], Any]:
    """Returns a function that does one training step of adapters after another, and the shapes of its initial state."""
    lora = LoraSettings()
    graph, optimizer = abstract(s.model, lora)[0], train.adamw(0.01, 1.0)
    fn = train.sft_loss(graph) if loss is None else train.preference_loss(graph, loss)
    state = [train.new_state(optimizer, initialize_adapters(s.model, lora, jax.random.key(0)))]

    def step() -> Any:
        key, rate = jax.random.key(0), np.float32(1e-5)
        state[0], metrics = train.train_step(fn, optimizer, s.rows // s.micro, state[0], weights, batch, key, rate)
        return metrics

    return step, jax.eval_shape(lambda: state[0])


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
