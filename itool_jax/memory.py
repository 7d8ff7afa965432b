"""What programs take of a device's memory, by the compiler's own analysis, and the largest size that fits.

In: shapes of a model, settings, and a size. Out: bytes a device. Nothing is allocated and no weights are needed:
programs are compiled for the mesh in use and not run.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from itool_jax import sampler, train
from itool_jax.losses import LossSettings
from itool_jax.mcts.search import SearchSettings
from itool_jax.model.cache import Prefix, empty_prefix
from itool_jax.model.linear import LoraSettings
from itool_jax.model.lora import beside
from itool_jax.model.sharding import placed, row_devices
from itool_jax.model.transformer import ModelConfig, abstract
from itool_jax.text.padding import PairBatch, TargetBatch
from itool_jax.text.steps import N_STATES, StepTable

Shape = jax.ShapeDtypeStruct
LIMIT = "ITOOL_DEVICE_GB"
"""Environment variable that overrides what a device has."""
SHARE = 0.9
"""Of a device's memory that programs are given; the rest is for what the analysis does not see."""


class Need(NamedTuple):
    """Bytes a device: what a program reads, what it needs while it runs, what it makes beside what it reads."""

    arguments: int
    temporaries: int
    outputs: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class Lengths(NamedTuple):
    """Padded widths of what a search reads, in tokens."""

    prompt: int
    asked: int
    """The prompt with the reference answer and the question behind it."""
    path: int
    """The response so far."""
    own: int
    """A response, and the end of the question about it."""


def _need(program: Any, beside: int = 0) -> Need:
    found = program.compile().memory_analysis()
    new = found.output_size_in_bytes - found.alias_size_in_bytes
    return Need(found.argument_size_in_bytes + beside, found.temp_size_in_bytes, new)


def training(
    loss: LossSettings | None,
    model: ModelConfig,
    lora: LoraSettings,
    n_micro: int,
    rows: int,
    length: int,
    packed: bool = False,
    targets: int | None = None,
) -> Need:
    """A training step of `rows` rows of `length` tokens in `n_micro` parts; SFT where there is no preference loss.

    A row has room for `targets`: unless it says so, half its length, and all of it for pairs of long steps.
    """
    graph, base, adapters = abstract(model, lora)
    optimizer = train.adamw(0.01, 1.0)
    own, frozen = (adapters, _stored(base, model.dtype)) if lora.rank else (base, {})
    state = placed(jax.eval_shape(lambda x: train.TrainState(x, optimizer.init(x)), own))
    fn = train.sft_loss(graph) if loss is None else train.preference_loss(graph, loss)
    batch = _batch(loss is not None, rows, length, packed, targets)
    key, rate = _array(dtype=jax.eval_shape(jax.random.key, 0).dtype), _array(dtype=jnp.float32)
    return _need(train.train_step.lower(fn, optimizer, n_micro, state, placed(frozen), batch, key, rate))


def _batch(pairs: bool, rows: int, length: int, packed: bool, targets: int | None) -> TargetBatch | PairBatch:
    """Shapes of a batch; from the host, so that it lies where the program wants it."""
    targets = targets or (length if pairs else length // 2)
    batch = TargetBatch(
        _array(rows, length),
        _array(rows, targets),
        _array(rows, targets),
        _array(rows, targets, dtype=jnp.bool_),
        _array(rows, length) if packed else None,
    )
    if not pairs:
        return batch
    number = _array(rows, dtype=jnp.float32)
    return PairBatch(batch, _array(rows, length), (number, number), (number, number), _array(rows, dtype=jnp.bool_))


def _array(*shape: int, dtype: Any = jnp.int32) -> Any:
    return Shape(shape, dtype)


def _stored(base: Any, dtype: str) -> Any:
    """Weights of the base as a run holds them: in `dtype`, but for four-bit codes and their scales."""

    def stored(path: Any, leaf: Shape) -> Shape:
        coded = "kernel" in [part.key for part in path[:-1]]
        return leaf if coded else Shape(leaf.shape, jnp.dtype(dtype))

    return jax.tree.map_with_path(stored, base)


def searching(model: ModelConfig, lora: LoraSettings, search: SearchSettings, lengths: Lengths, batch: int) -> Need:
    """A search of `batch` prompts: the more of a round of last steps and one of questions about them.

    Either keeps what the other reads: the caches of the prompts, and those of the questions.
    """
    model = dataclasses.replace(model, stacked=False)
    graph, base, adapters = abstract(model, lora)
    base = weights = placed(_stored(base, model.dtype), running=True)
    # Adapters are merged into a copy of a small model, and stand beside the weights of others (`folder.load_policy`).
    merged = model.dtype == "float32" and not model.nf4
    if merged or not lora.rank:
        graph = abstract(model)[0]
    else:
        weights = beside(base, placed(adapters, running=True))
    prompt, asked = (_caches(graph, weights, width, batch) for width in (lengths.prompt, lengths.asked))
    rows, path = batch * search.breadth, (_array(batch, lengths.path), _array(batch))
    step = sampler.sample_step.lower(
        *(graph, max(search.last_step_limit, search.step_limit), weights, step_table(model.vocab_size), prompt, *path),
        *(_array(rows, dtype=jax.eval_shape(jax.random.key, 0).dtype), _array(rows), _array(rows, dtype=jnp.bool_)),
        _array(dtype=jnp.float32),
    )
    ask = sampler.answer.lower(graph, weights, asked, *path, *(_array(rows, lengths.own), _array(rows)), _array(2))
    kept = _bytes(base) if merged and lora.rank else 0
    return max((_need(step, kept + _bytes(asked)), _need(ask, kept + _bytes(prompt))), key=lambda need: need.total)


def _caches(graph: Any, weights: Any, width: int, batch: int) -> Prefix:
    """Shapes of the caches of `batch` prompts, and where they lie."""
    count = row_devices(running=True)
    new = sampler.prefill.eval_shape(graph, weights, _array(count, width), _array(count))
    made = empty_prefix.lower(new, batch).compile()
    leaves = zip(jax.tree.leaves(made.out_info), jax.tree.leaves(made.output_shardings), strict=True)
    return jax.tree.unflatten(jax.tree.structure(new), [Shape(x.shape, x.dtype, sharding=s) for x, s in leaves])


def _bytes(tree: Any) -> int:
    """Of shapes that lie somewhere, what one device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def step_table(vocab_size: int) -> StepTable:
    """A table of step boundaries of any model: only its shape matters here."""
    cells, flags = np.zeros((vocab_size, N_STATES), np.int16), np.zeros(vocab_size, bool)
    level: Any = np.int32(0)
    return StepTable(cells.astype(np.int8), cells, cells, cells.astype(np.int32), flags, flags, level)


# What fits --------------------------------------------------------------------------------------------------


def device_limit() -> int:
    """Bytes that programs may take on each device; of all devices of all processes, the least."""
    if LIMIT in os.environ:
        found = float(os.environ[LIMIT]) * 1e9
    else:
        devices = jax.local_devices()
        stats = [device.memory_stats() or {} for device in devices]
        found = SHARE * min(s["bytes_limit"] if "bytes_limit" in s else _host_bytes() / len(devices) for s in stats)
    if jax.process_count() > 1:
        found = float(np.min(multihost_utils.process_allgather(np.float32(found))))
    return int(found)


def _host_bytes() -> int:
    """Memory of the host that is free for new work."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def largest(candidates: Sequence[int], need: Callable[[int], float], limit: int) -> tuple[int, dict[int, float]]:
    """The largest of some sizes that needs no more than `limit`, the smallest where none does; and what was looked at.

    The very largest is tried first, then halves of the rest: larger sizes need more, and that is all that is assumed.
    """
    sizes, tried = sorted(candidates), {}
    fitting, beyond = 0, len(sizes)  # the first so many fit; those from there on do not
    middle = beyond - 1
    while fitting < beyond:
        tried[sizes[middle]] = need(sizes[middle])
        if tried[sizes[middle]] <= limit:
            fitting = middle + 1
        else:
            beyond = middle
        middle = (fitting + beyond) // 2
    return sizes[max(fitting - 1, 0)], tried
