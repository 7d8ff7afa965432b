"""Estimates programs' device memory from the compiler's own analysis, and finds the largest size that fits.

In: shapes of a model, settings, and a size. Out: bytes per device. Nothing is allocated and no weights are needed:
programs are compiled for the current mesh and not run.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from itool_jax.inference import sampler
from itool_jax.mcts.search import SearchSettings
from itool_jax.model.cache import Prefix, empty_prefix
from itool_jax.model.linear import LoraSettings
from itool_jax.model.lora import beside
from itool_jax.model.sharding import placed, row_devices
from itool_jax.model.transformer import ModelConfig, abstract
from itool_jax.text.padding import PairBatch, TargetBatch
from itool_jax.text.steps import N_STATES, StepTable
from itool_jax.training import loop as train
from itool_jax.training.losses import LossSettings

Shape = jax.ShapeDtypeStruct
LIMIT = "ITOOL_DEVICE_GB"
"""Environment variable that overrides a device's memory, in GB."""


class MemoryEstimate(NamedTuple):
    """Bytes per device by purpose: present before a program runs, needed while it runs, and returned by it."""

    weights: int
    """Weights of the base, or those that adapters were merged into."""
    adapters: int
    optimizer: int
    caches: int
    """Keys and values of prompts."""
    batch: int
    """Other inputs of the program, and what the compiler adds to them, such as padding."""
    temporaries: int
    """Activations, gradients and logits; in a search also the rows' own keys and values."""
    outputs: int

    @property
    def arguments(self) -> int:
        """Bytes present before the program runs."""
        return sum(self[:5])

    @property
    def total(self) -> int:
        """Sum of all bytes."""
        return sum(self)


class Resident(NamedTuple):
    """Bytes per device that stay allocated while programs run."""

    weights: int = 0
    adapters: int = 0
    optimizer: int = 0
    caches: int = 0


class Lengths(NamedTuple):
    """Padded widths of a search's inputs, in tokens."""

    prompt: int
    asked: int
    """The prompt followed by the reference answer and the question."""
    path: int
    """The response so far."""
    own: int
    """A response and the end of the question about it."""


def _estimate(program: Any, resident: Resident, unread: int = 0) -> MemoryEstimate:
    """Estimates the memory of a lowered program, given resident bytes, of which it does not read `unread`."""
    used = program.compile().memory_analysis()
    read = used.argument_size_in_bytes - (sum(resident) - unread)
    return MemoryEstimate(
        *resident, max(0, read), used.temp_size_in_bytes, used.output_size_in_bytes - used.alias_size_in_bytes
    )


class Program(NamedTuple):
    """A program as a function of the model, and what one more layer adds to its need."""

    need: Callable[[ModelConfig], MemoryEstimate]
    layer: Callable[[ModelConfig], MemoryEstimate] | None = None
    """Bytes of a layer on one device: weights, and keys and values that stay until the end. None for training, whose
    layers are a loop: any depth compiles equally fast."""
    bound: Callable[[ModelConfig], float] = lambda _: math.inf
    """Bytes that the program surely needs no more than, without compiling it."""

    def at_depth(self, model: ModelConfig) -> MemoryEstimate:
        """Extrapolates the need of a deep model from shallower ones of the same widths.

        Compiling an inference model takes time proportional to its layers, many minutes for 80. Models with few layers
        are compiled as they are.
        """
        if self.layer is None:
            return self.need(model)
        layer = self.layer(model)
        if not jax.sharding.get_mesh().empty:  # how layers are spread over devices is the compiler's choice: measure it
            return self._from_two(model, LOOP if layer.temporaries else SHALLOW)
        for depth in (SHALLOW, LOOP):
            if model.n_layers <= 2 * depth:
                break
            few = self.need(dataclasses.replace(model, n_layers=depth))
            whole = MemoryEstimate(*(x + (model.n_layers - depth) * y for x, y in zip(few, layer, strict=True)))
            # The error is at most what a sampling loop's start needs beside the caches, which may hide the loop's need.
            beside = few.temporaries - depth * layer.temporaries
            if not layer.temporaries or depth == LOOP or beside <= UNSEEN * whole.total:
                return whole
        return self.need(model)

    def _from_two(self, model: ModelConfig, low: int) -> MemoryEstimate:
        """Extrapolates along the line through the needs at two depths."""
        if model.n_layers <= 2 * low:
            return self.need(model)
        high = low + low // 2
        few, more = (self.need(dataclasses.replace(model, n_layers=n)) for n in (low, high))
        times = (model.n_layers - high) / (high - low)
        return MemoryEstimate(*(max(0, round(y + times * (y - x))) for x, y in zip(few, more, strict=True)))


def _bound(model: ModelConfig, tokens: int, width: int, logits: int, cached: int = 0, trains: bool = False) -> float:
    """Bounds the bytes of a pass over `tokens` tokens that attend to `width`, with logits at `logits` of them.

    It keeps every array of a layer, of all layers if it trains, in float32, with gradients and two moments. That is
    more than programs need, but where memory is plenty they need not be compiled to know that they fit.
    """
    m, heads = model, model.n_heads + 2 * model.n_kv_heads
    a_layer = m.hidden_size * (heads + m.n_heads) * m.head_dim + 3 * m.hidden_size * m.intermediate_size
    weights = m.n_layers * a_layer + 2 * m.vocab_size * m.hidden_size
    a_token = 8 * m.hidden_size + 6 * m.intermediate_size + 2 * heads * m.head_dim + 3 * m.n_heads * width
    activations = tokens * a_token * (m.n_layers if trains else 1) + 4 * logits * m.vocab_size
    kept = cached * 2 * m.n_layers * m.n_kv_heads * m.head_dim
    return 4.0 * ((4 if trains else 1) * weights + activations + kept)


SHALLOW = 4
"""Layers from which each further one adds the same memory."""
LOOP = 12
"""The same for sampling loops: with fewer layers, their caches may be smaller than what they need at the start."""
UNSEEN = 0.02
"""Share of a need that `SHALLOW` layers may overestimate before `LOOP` layers are compiled."""


def training(
    loss: LossSettings | None,
    model: ModelConfig,
    lora: LoraSettings,
    n_micro: int,
    rows: int,
    length: int,
    packed: bool = False,
    targets: int | None = None,
) -> MemoryEstimate:
    """Estimates a training step of `rows` rows of `length` tokens in `n_micro` micro-batches; SFT if `loss` is None.

    A row has room for `targets` targets. The default is half its length, or its full length for pairs, whose steps may
    be long.
    """
    graph, base, adapters = abstract(model, lora)
    optimizer = train.adamw(0.01, 1.0)
    own, frozen = (adapters, _stored(base, model.dtype)) if lora.rank else (base, {})
    state = placed(jax.eval_shape(lambda x: train.TrainState(x, optimizer.init(x)), own))
    fn = train.sft_loss(graph) if loss is None else train.preference_loss(graph, loss)
    batch = _batch(loss is not None, rows, length, packed, targets)
    key, rate = _array(dtype=jax.eval_shape(jax.random.key, 0).dtype), _array(dtype=jnp.float32)
    trained = (0, _bytes(state.trainable)) if lora.rank else (_bytes(state.trainable), 0)
    resident = Resident(_bytes(placed(frozen)) + trained[0], trained[1], _bytes(state.optimizer))
    return _estimate(train.train_step.lower(fn, optimizer, n_micro, state, placed(frozen), batch, key, rate), resident)


def _batch(pairs: bool, rows: int, length: int, packed: bool, targets: int | None) -> TargetBatch | PairBatch:
    """Returns the shapes of a batch. It comes from the host, so it lies where the program wants it."""
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
    """Returns the base weights as a run stores them: in `dtype`, except four-bit codes and their scales."""

    def stored(path: Any, leaf: Shape) -> Shape:
        coded = "kernel" in [part.key for part in path[:-1]]
        return leaf if coded else Shape(leaf.shape, jnp.dtype(dtype))

    return jax.tree.map_with_path(stored, base)


class _Running(NamedTuple):
    """Shapes of a model for inference."""

    graph: Any
    weights: Any
    resident: Resident


def _running(model: ModelConfig, lora: LoraSettings) -> _Running:
    graph, base, adapters = abstract(dataclasses.replace(model, stacked=False), lora)
    base = placed(_stored(base, model.dtype), running=True)
    if not lora.rank:
        return _Running(graph, base, Resident(_bytes(base)))
    # Adapters are merged into float32 weights; other models keep them beside the weights (`store.weights`).
    if model.dtype == "float32" and not model.nf4:
        graph = abstract(dataclasses.replace(model, stacked=False))[0]
        return _Running(graph, base, Resident(_bytes(base)))
    adapters = placed(adapters, running=True)
    return _Running(graph, beside(base, adapters), Resident(_bytes(base), _bytes(adapters)))


def _layer(model: ModelConfig, lora: LoraSettings, shared: int, own: int) -> MemoryEstimate:
    """Returns what a layer adds on one device, with keys and values of `shared` tokens of prompts and `own` others."""
    weights, adapters = _layer_weights(model, lora)
    a_token = 2 * model.n_kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    return MemoryEstimate(weights, adapters, 0, shared * a_token, 0, own * a_token, 0)


@functools.cache
def _layer_weights(model: ModelConfig, lora: LoraSettings) -> tuple[int, int]:
    """Returns the bytes of a layer's weights and adapters on one device."""
    one, two = (_running(dataclasses.replace(model, n_layers=n), lora).resident for n in (1, 2))
    return two.weights - one.weights, two.adapters - one.adapters


def searching(lora: LoraSettings, search: SearchSettings, lengths: Lengths, batch: int) -> list[Program]:
    """Returns the programs of a search of `batch` prompts that need most: a round of last steps, and its questions."""
    given, shared = (lora, search, lengths, batch), batch * (lengths.prompt + lengths.asked)
    rows, answers = batch * search.breadth, batch * (lengths.path + search.breadth * search.longest_step)
    width = lengths.asked + lengths.path + max(search.longest_step, lengths.own)
    asked = rows * lengths.own

    def bound(model: ModelConfig) -> float:
        return _bound(model, max(asked, answers), width, rows, shared + max(asked, answers))

    return [
        Program(lambda model: proposing(model, *given), lambda model: _layer(model, lora, shared, answers), bound),
        Program(lambda model: asking(model, *given), lambda model: _layer(model, lora, shared, 0), bound),
    ]


def trained(
    loss: LossSettings | None, lora: LoraSettings, n_micro: int, rows: int, length: int, packed: bool = False
) -> Program:
    """Returns the training step of `rows` rows of `length` tokens in `n_micro` micro-batches."""
    tokens = (1 if loss is None else 2) * rows // n_micro * length
    return Program(
        lambda model: training(loss, model, lora, n_micro, rows, length, packed),
        bound=lambda model: _bound(model, tokens, length, tokens, trains=True),
    )


def proposing(
    model: ModelConfig, lora: LoraSettings, search: SearchSettings, lengths: Lengths, batch: int
) -> MemoryEstimate:
    """Estimates a round of last steps.

    The caches of the prompts with the reference, which the questions read, stay allocated.
    """
    graph, weights, resident = _running(model, lora)
    prompt, asked = (_caches(graph, weights, width, batch) for width in (lengths.prompt, lengths.asked))
    table, path = step_table(model.vocab_size), (_array(batch, lengths.path), _array(batch))
    draws = _draws(batch * search.breadth)
    step = sampler.sample_step.lower(graph, search.longest_step, weights, table, prompt, *path, *draws)
    return _estimate(step, resident._replace(caches=_bytes(prompt) + _bytes(asked)), _bytes(asked))


def asking(
    model: ModelConfig, lora: LoraSettings, search: SearchSettings, lengths: Lengths, batch: int
) -> MemoryEstimate:
    """Estimates a round of questions about last steps; the caches of the prompts alone stay allocated."""
    graph, weights, resident = _running(model, lora)
    prompt, asked = (_caches(graph, weights, width, batch) for width in (lengths.prompt, lengths.asked))
    rows, path = batch * search.breadth, (_array(batch, lengths.path), _array(batch))
    ask = sampler.choice_logits.lower(
        graph, weights, asked, *path, *(_array(rows, lengths.own), _array(rows)), _array(2)
    )
    return _estimate(ask, resident._replace(caches=_bytes(prompt) + _bytes(asked)), _bytes(prompt))


def _draws(rows: int) -> tuple[Any, ...]:
    """Returns the shapes of `sampler.sample_step`'s keys, limits and until-stop flags per row, and the temperature."""
    key = jax.eval_shape(jax.random.key, 0).dtype
    return _array(rows, dtype=key), _array(rows), _array(rows, dtype=jnp.bool_), _array(dtype=jnp.float32)


def log_probs(lora: LoraSettings, rows: int, width: int) -> Program:
    """Returns the program that scores `rows` rows of `width` tokens."""
    return Program(lambda model: scoring(model, lora, rows, width), lambda model: _layer(model, lora, 0, 0))


def responses(lora: LoraSettings, rows: int, width: int, limit: int) -> Program:
    """Returns the program that samples responses of at most `limit` tokens to `rows` prompts of `width` tokens."""
    return Program(
        lambda model: responding(model, lora, rows, width, limit),
        lambda model: _layer(model, lora, rows * width, rows * (1 + limit)),
    )


def scoring(model: ModelConfig, lora: LoraSettings, rows: int, width: int) -> MemoryEstimate:
    """Estimates computing the log-probabilities of the targets of `rows` rows of `width` tokens."""
    graph, weights, resident = _running(model, lora)
    return _estimate(sampler.score.lower(graph, weights, _batch(False, rows, width, False, None)), resident)


def responding(model: ModelConfig, lora: LoraSettings, rows: int, width: int, limit: int) -> MemoryEstimate:
    """Estimates sampling responses of at most `limit` tokens to `rows` prompts of `width` tokens."""
    graph, weights, resident = _running(model, lora)
    prompt = _outputs(sampler.prefill, graph, weights, _array(rows, width), _array(rows))
    inputs = (step_table(model.vocab_size), prompt, _array(rows, 1), _array(rows), *_draws(rows))
    resident = resident._replace(caches=_bytes(prompt))
    return _estimate(sampler.sample_step.lower(graph, limit, weights, *inputs), resident)


def _caches(graph: Any, weights: Any, width: int, batch: int) -> Prefix:
    """Returns the shapes and shardings of the caches of `batch` prompts."""
    count = row_devices(running=True)
    new = sampler.prefill.eval_shape(graph, weights, _array(count, width), _array(count))
    return _outputs(empty_prefix, new, batch)


def _outputs(function: Any, *given: Any) -> Any:
    """Returns the shapes and shardings of a compiled function's outputs."""
    if jax.sharding.get_mesh().empty:  # one device leaves the compiler no choice
        return placed(function.eval_shape(*given))
    made = function.lower(*given).compile()

    def place(leaf: Any, where: Any) -> Shape:
        return Shape(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map(place, made.out_info, made.output_shardings)


def _bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def step_table(vocab_size: int) -> StepTable:
    """Returns a table of step boundaries for any model; only its shape matters here."""
    cells, flags = np.zeros((vocab_size, N_STATES), np.int16), np.zeros(vocab_size, bool)
    level: Any = np.int32(0)
    return StepTable(cells.astype(np.int8), cells, cells, cells.astype(np.int32), flags, flags, level, level)


# What fits --------------------------------------------------------------------------------------------------


def device_limit(share: float) -> int:
    """Returns the bytes that programs may use on each device: a share of the least that any process's devices have."""
    if LIMIT in os.environ:
        limit = float(os.environ[LIMIT]) * 1e9
    else:
        devices = jax.local_devices()
        stats = [device.memory_stats() or {} for device in devices]
        limit = share * min(s["bytes_limit"] if "bytes_limit" in s else _host_bytes() / len(devices) for s in stats)
    if jax.process_count() > 1:
        limit = float(np.min(multihost_utils.process_allgather(np.float32(limit))))
    return int(limit)


def _host_bytes() -> int:
    """Returns the host memory that is free for new work."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def largest(candidates: Sequence[int], need: Callable[[int], float], limit: int) -> tuple[int, dict[int, float]]:
    """Finds the largest size that needs at most `limit`, or the smallest if none does; also returns what was tried.

    Tries the very largest first, then bisects the rest. The only assumption is that larger sizes need more.
    """
    sizes, tried = sorted(candidates), {}
    fitting, beyond = 0, len(sizes)  # sizes[:fitting] fit, sizes[beyond:] do not
    middle = beyond - 1
    while fitting < beyond:
        tried[sizes[middle]] = need(sizes[middle])
        if tried[sizes[middle]] <= limit:
            fitting = middle + 1
        else:
            beyond = middle
        middle = (fitting + beyond) // 2
    return sizes[max(fitting - 1, 0)], tried
