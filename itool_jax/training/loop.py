"""Trains by gradient descent, with one compiled step and one loop for both SFT and preference training.

In: a loss function, its weights and batches of arrays. Out: an `Update` after each step, so that the caller can log,
save and stop.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from itool_jax.model import sharding
from itool_jax.model.log_probs import masked_log_prob_sum, token_log_probs
from itool_jax.model.transformer import Params
from itool_jax.text.padding import PairBatch, TargetBatch
from itool_jax.training import losses
from itool_jax.training.losses import LossSettings
from itool_jax.training.settings import TrainingSettings
from itool_jax.types import AnyArray, Scalar

Loss = tuple[Scalar, dict[str, Scalar]]
LossFn = Callable[..., Loss]
"""`loss_fn(trainable, frozen, batch, key) -> (sum of losses, {"weight": …, sums of metrics})`. The step adds up
micro-batches and divides once by their total weight. The key is for dropout."""


class TrainState(NamedTuple):
    """Everything that training changes."""

    trainable: Params
    optimizer: optax.OptState


@functools.cache
def adamw(weight_decay: float, clip_norm: float) -> optax.GradientTransformation:
    """Builds AdamW with a learning rate of 1; `train_step` takes the actual rate, so no schedule is compiled in."""
    return optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(1.0, weight_decay=weight_decay))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    n_micro: int,
    state: TrainState,
    frozen: Params,
    batch: Any,
    key: Array,
    learning_rate: Array | float,
) -> tuple[TrainState, dict[str, Array]]:
    """Performs one update, computing a batch in `n_micro` parts in turn; adds loss and gradient norm to the metrics.

    If either is not finite, the state stays unchanged and `skipped` is true.
    """
    gradients = jax.value_and_grad(loss_fn, has_aux=True)
    if n_micro == 1:
        (loss, sums), gradient = gradients(state.trainable, frozen, batch, key)
    else:
        parts = jax.tree.map(lambda x: x.reshape(-1, n_micro, *x.shape[1:]).swapaxes(0, 1), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradients, state.trainable, frozen, first, key))

        def add(total: Any, part: Any) -> tuple[Any, None]:
            number, rows = part
            part_gradients = gradients(state.trainable, frozen, rows, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, part_gradients), None

        ((loss, sums), gradient), _ = jax.lax.scan(add, zeros, (jnp.arange(n_micro), parts))
    (loss, sums, gradient) = jax.tree.map(lambda x: x / sums["weight"], (loss, sums, gradient))
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trainable)
    trainable = jax.tree.map(lambda p, u: p + learning_rate * u, state.trainable, updates)
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    new = jax.tree.map(functools.partial(jnp.where, finite), TrainState(trainable, optimizer_state), state)
    metrics = {name: value for name, value in sums.items() if name != "weight"}
    return sharding.constrain(new), metrics | {"loss": loss, "gradient_norm": norm, "skipped": ~finite}


def new_state(optimizer: optax.GradientTransformation, trainable: Params) -> TrainState:
    """Creates the state before the first step; it takes over `trainable` without a copy."""
    state = TrainState(trainable, _new_moments(optimizer, trainable))
    # Commit arrays to their devices, as the step's outputs are; otherwise the second step would recompile.
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, state))


@functools.partial(jax.jit, static_argnums=0)
def _new_moments(optimizer: optax.GradientTransformation, trainable: Params) -> optax.OptState:
    """Creates the optimizer's state already sharded: on a mesh, no device ever holds all of it."""
    return sharding.constrain(optimizer.init(trainable))


class Update(NamedTuple):
    """Result of one training step. The next step reuses the memory of `state`."""

    step: int
    """Steps done, counted from 1."""
    state: TrainState
    metrics: dict[str, Array]
    """Scalars on the device, perhaps not computed yet: reading one waits for the device."""


def fit(
    loss_fn: LossFn,
    settings: TrainingSettings,
    state: TrainState,
    frozen: Params,
    batches: Iterable[Any],
    rates: Sequence[float],
    *,
    seed: int,
    steps_done: int = 0,
) -> Iterator[Update]:
    """Trains on each batch in turn, and yields after each.

    Args:
        loss_fn: computes the sum of losses over a batch.
        settings: weight decay, clipping, micro-batches.
        state: parameters and optimizer after `steps_done` steps; donated.
        frozen: parameters that stay fixed.
        batches: remaining batches, as host arrays.
        rates: learning rate of each step of the whole training.
        seed: seed of the dropout; step n folds n in.
        steps_done: steps done by earlier commands.
    """
    optimizer, key, n_micro = adamw(settings.weight_decay, settings.clip_norm), jax.random.key(seed), settings.n_micro()
    for step, batch in enumerate(batches, steps_done):
        rate, step_key = np.float32(rates[step]), jax.random.fold_in(key, step)
        rows = sharding.to_devices(batch)
        state, metrics = train_step(loss_fn, optimizer, n_micro, state, frozen, rows, step_key, rate)
        yield Update(step + 1, state, metrics)


@functools.cache
def sft_loss(graph: nnx.GraphDef) -> LossFn:
    """Returns the NLL of target tokens (eq 2) as a loss over `TargetBatch`es; the weight is the number of tokens."""

    def loss(trainable: Params, frozen: Params, batch: TargetBatch, key: Array) -> Loss:
        total, count = losses.sft_loss(_log_probs(graph, trainable, frozen, batch, key), batch.mask_BR)
        return total, {"weight": count}

    return loss


@functools.cache
def preference_loss(graph: nnx.GraphDef, settings: LossSettings) -> LossFn:
    """Returns a preference loss (eq 11 or a variant) over `PairBatch`es; the weight is the number of pairs."""

    def loss(trainable: Params, frozen: Params, batch: PairBatch, key: Array) -> Loss:
        log_probs = jnp.split(_log_probs(graph, trainable, frozen, batch.row, key, batch.branch_BT), 2, axis=1)
        masks = jnp.split(batch.row.mask_BR, 2, axis=1)
        chosen_B, rejected_B = map(masked_log_prob_sum, log_probs, masks)
        lengths = [mask_BR.sum(axis=1) for mask_BR in masks]
        pair = losses.PairLogProbs(
            chosen_B, rejected_B, *batch.reference, lengths[0], lengths[1], batch.visits[0], batch.visits[1]
        )
        metrics = losses.pair_metrics(pair, settings.resolved_beta, batch.real_B.astype(jnp.float32))
        # A padding pair has no tokens. Select instead of multiplying by 0: its loss may be infinite.
        loss_B = jnp.where(batch.real_B, losses.preference_loss(settings, pair), 0.0)
        return loss_B.sum(), metrics | {"weight": batch.real_B.sum(dtype=jnp.float32)}

    return loss


def _log_probs(
    graph: nnx.GraphDef,
    trainable: Params,
    frozen: Params,
    batch: TargetBatch,
    key: Array,
    branch_BT: AnyArray | None = None,
) -> AnyArray:
    model = nnx.merge(graph, trainable, frozen)
    hidden_BRD, _ = model(
        batch.tokens_BT, branch_BT=branch_BT, segment_BT=batch.segment_BT, key=key, at_BR=batch.positions_BR
    )
    return token_log_probs(hidden_BRD, model.unembedding(), batch.targets_BR)
