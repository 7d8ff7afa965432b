"""Training by gradient descent: one state, one compiled step, one loop, shared by SFT and preference training.

In: a loss function, its weights and batches of arrays. Out: the training after each step, for its caller to log, save
and stop.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array

from itool_jax import losses
from itool_jax.losses import LossSettings
from itool_jax.model import sharding
from itool_jax.model.transformer import Params
from itool_jax.text.padding import PairBatch, TargetBatch
from itool_jax.types import AnyArray, Scalar

Loss = tuple[Scalar, dict[str, Scalar]]
LossFn = Callable[..., Loss]
"""`loss_fn(trainable, frozen, batch, key) -> (sum of losses, {"weight": …, sums of metrics})`: micro-batches add up,
and the step divides once by the weight of all. The key is for dropout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """AdamW with a cosine schedule, over some epochs of batches."""

    section: ClassVar[str] = "training"

    learning_rate: float
    """Highest learning rate."""
    batch_size: int
    """Samples (or pairs) a step."""
    epochs: int | Literal["auto"]
    """Passes over the data."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup_ratio: float = 0.1
    """Share of all steps in which the learning rate rises from zero, before its cosine fall."""
    clip_norm: float = 1.0
    """Largest norm of a gradient; larger ones are scaled down."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "batch_size", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{self.section}.{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"{self.section}.warmup_ratio must be in [0, 1), got {self.warmup_ratio}")
        if not self.weight_decay >= 0:
            raise ValueError(f"{self.section}.weight_decay must not be negative, got {self.weight_decay}")

    def rate(self, step: int, n_steps: int) -> float:
        """Learning rate of step 0, 1, …: a linear rise, then a cosine to zero."""
        rise = self.warmup_ratio * n_steps
        if step < rise:
            return self.learning_rate * (step + 1) / (rise + 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, n_steps - rise)))

    def rates(self, spans: Sequence[int]) -> list[float]:
        """Learning rate of each step of a training: a rise and a fall in each span of so many steps."""
        return [self.rate(step, n_steps) for n_steps in spans for step in range(n_steps)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRuntime:
    """How a training is computed: in which parts, and saved how often."""

    section: ClassVar[str] = "training"

    micro_batch: int | Literal["auto"] = 0
    """Samples (or pairs) whose gradient a device computes at once, to save memory; 0 is its whole share of a batch,
    auto as much of it as fits by the compiler's estimate, found once and kept with the run."""
    checkpoint_every: int = 0
    """Steps between two checkpoints of a training that goes on; 0 is as few as take 2 % of the time."""

    def __post_init__(self) -> None:
        if self.checkpoint_every < 0:
            raise ValueError(f"{self.section}.checkpoint_every must not be negative, got {self.checkpoint_every}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingSettings(TrainingRuntime, TrainingRecipe):
    """All settings of a training."""

    def __post_init__(self) -> None:
        TrainingRecipe.__post_init__(self)
        TrainingRuntime.__post_init__(self)
        if self.micro_batch != "auto" and (self.micro_batch < 0 or self.batch_size % max(1, self.micro_batch)):
            raise ValueError(
                f"{self.section}.micro_batch must divide {self.section}.batch_size={self.batch_size}, "
                f"got {self.micro_batch}"
            )

    def n_micro(self) -> int:
        """Parts that a batch is computed in, one after the other, on the mesh in use; ValueError where it has none."""
        assert self.micro_batch != "auto", f"{self.section}.micro_batch was not resolved"
        share, name = self.share(), f"{self.section}.batch_size={self.batch_size}"
        if self.micro_batch and share % min(self.micro_batch, share):
            raise ValueError(f"{name}: {self.section}.micro_batch={self.micro_batch} must divide a device's {share}")
        return share // min(self.micro_batch or share, share)

    def share(self) -> int:
        """Rows of a batch on each device of the mesh in use; ValueError where they cannot be shared out evenly."""
        devices = sharding.row_devices()
        share, rest = divmod(self.batch_size, devices)
        if rest:
            name = f"{self.section}.batch_size={self.batch_size}"
            raise ValueError(f"{name} must be a multiple of the {devices} devices of mesh.data and mesh.fsdp")
        return share


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupRecipe(TrainingRecipe):
    """Warm-up: supervised fine-tuning from easy to hard (section 4.2)."""

    section: ClassVar[str] = "warmup"

    learning_rate: float = 5e-5
    """Highest learning rate."""
    batch_size: int = 16
    """Samples a step."""
    epochs: int | Literal["auto"] = 1
    """Passes over each of the three parts before the next; 0 trains nothing. auto takes rounds of one pass over each,
    until a round gains less than half a point of accuracy on the validation part."""
    max_epochs: int = 6
    """Most rounds that epochs=auto takes."""
    schedule: Literal["per_part", "span"] = "per_part"
    """Learning rate: a rise and a fall for each of the three parts, or one over all three. With epochs=auto, the same
    in each round."""
    order: Literal["easy_to_hard", "mixed", "hard_to_easy"] = "easy_to_hard"
    """Order of the three parts; the others are for comparison."""
    pack: int = 0
    """Width in tokens of rows that hold several samples each, none seeing another; batch_size then counts such rows.
    0 gives each sample a row."""

    def __post_init__(self) -> None:
        TrainingRecipe.__post_init__(self)
        if self.epochs != "auto" and self.epochs < 0:
            raise ValueError(f"warmup.epochs must not be negative, got {self.epochs}")
        if self.max_epochs < 1:
            raise ValueError(f"warmup.max_epochs must be positive, got {self.max_epochs}")
        if self.pack < 0:
            raise ValueError(f"warmup.pack must not be negative, got {self.pack}")

    @property
    def most_epochs(self) -> int:
        """Passes over each part, at most."""
        return self.max_epochs if self.epochs == "auto" else self.epochs


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupSettings(WarmupRecipe, TrainingSettings):
    """Warm-up: supervised fine-tuning from easy to hard (section 4.2)."""

    def __post_init__(self) -> None:
        WarmupRecipe.__post_init__(self)
        TrainingSettings.__post_init__(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceRecipe(LossSettings, TrainingRecipe):
    """Preference training on the searched pairs (section 4.3, eq 10 and 11)."""

    section: ClassVar[str] = "preference"

    learning_rate: float = 5e-6
    """Highest learning rate."""
    batch_size: int = 8
    """Pairs a step."""
    epochs: int = 2
    """Passes over the pairs of an iteration."""
    reference: Literal["iteration", "warmup"] = "iteration"
    """Policy that losses with a reference measure from: the one that the iteration began with, or the warm-up's."""
    merge: bool = False
    """Merge the adapters into the weights when an iteration begins, in the weights' type, and train new ones; else the
    same adapters are trained on."""
    control: Literal["none", "sft_same_prompts", "swapped"] = "none"
    """What to compare with, for as many steps. sft_same_prompts: fine-tuning on the gold responses of the pairs'
    prompts. swapped: chosen and rejected exchanged in half of the pairs, at random, which must gain nothing."""

    def __post_init__(self) -> None:
        LossSettings.__post_init__(self)
        TrainingRecipe.__post_init__(self)
        if self.epochs < 1:
            raise ValueError(f"preference.epochs must be positive, got {self.epochs}")
        if self.control == "swapped" and self.loss == "raft":
            raise ValueError("preference.control=swapped exchanges steps of pairs, and preference.loss=raft has none")

    @property
    def loss_settings(self) -> LossSettings:
        """What the loss alone depends on."""
        return LossSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LossSettings)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings(PreferenceRecipe, TrainingSettings):
    """Preference training on the searched pairs (section 4.3, eq 10 and 11)."""

    def __post_init__(self) -> None:
        PreferenceRecipe.__post_init__(self)
        TrainingSettings.__post_init__(self)


class TrainState(NamedTuple):
    """All that training changes."""

    trainable: Params
    optimizer: optax.OptState


@functools.cache
def adamw(weight_decay: float, clip_norm: float) -> optax.GradientTransformation:
    """AdamW for a learning rate of 1: the rate comes with each step, so that no schedule is compiled in."""
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
    """One update from `n_micro` parts of a batch, one after the other; metrics gain loss and the gradient's norm.

    Where either is not finite, the state stays as it is and `skipped` is true.
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
            found = gradients(state.trainable, frozen, rows, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, found), None

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
    """The state before the first step, of which `trainable` becomes a part: it is not copied."""
    state = TrainState(trainable, _new_moments(optimizer, trainable))
    # Committed to their devices like what the step gives back, or the second step would compile it again.
    return jax.device_put(state, jax.tree.map(lambda x: x.sharding, state))


@functools.partial(jax.jit, static_argnums=0)
def _new_moments(optimizer: optax.GradientTransformation, trainable: Params) -> optax.OptState:
    """Made where they lie: on a mesh, no device ever holds all of them."""
    return sharding.constrain(optimizer.init(trainable))


class Update(NamedTuple):
    """A training after one more step. The next step reuses the memory of `state`."""

    step: int
    """Steps done, from 1."""
    state: TrainState
    metrics: dict[str, Array]
    """Scalars that may still be computed: reading one waits for the device."""


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
    """Trains on one batch after the other, and yields after each.

    Args:
        loss_fn: the sum of losses over a batch.
        settings: weight decay, clipping, micro-batches.
        state: parameters and optimizer after `steps_done` steps; used up.
        frozen: parameters that stay.
        batches: those that follow, arrays of the host.
        rates: the learning rate of each step of the whole training.
        seed: of the dropout; step n folds n in.
        steps_done: steps of earlier commands.
    """
    optimizer, key, n_micro = adamw(settings.weight_decay, settings.clip_norm), jax.random.key(seed), settings.n_micro()
    for step, batch in enumerate(batches, steps_done):
        rate, step_key = np.float32(rates[step]), jax.random.fold_in(key, step)
        rows = sharding.to_devices(batch)
        state, metrics = train_step(loss_fn, optimizer, n_micro, state, frozen, rows, step_key, rate)
        yield Update(step + 1, state, metrics)


@functools.cache
def sft_loss(graph: nnx.GraphDef) -> LossFn:
    """NLL of target tokens (eq 2), for `TargetBatch`es; the weight is their number."""

    def loss(trainable: Params, frozen: Params, batch: TargetBatch, key: Array) -> Loss:
        total, count = losses.sft_loss(_log_probs(graph, trainable, frozen, batch, key), batch.mask_BR)
        return total, {"weight": count}

    return loss


@functools.cache
def preference_loss(graph: nnx.GraphDef, settings: LossSettings) -> LossFn:
    """Preference loss of the pairs of a `PairBatch` (eq 11 and its kin); the weight is their number."""

    def loss(trainable: Params, frozen: Params, batch: PairBatch, key: Array) -> Loss:
        log_probs = jnp.split(_log_probs(graph, trainable, frozen, batch.row, key, batch.branch_BT), 2, axis=1)
        masks = jnp.split(batch.row.mask_BR, 2, axis=1)
        chosen_B, rejected_B = map(losses.masked_log_prob_sum, log_probs, masks)
        lengths = [mask_BR.sum(axis=1) for mask_BR in masks]
        pair = losses.PairLogProbs(
            chosen_B, rejected_B, *batch.reference, lengths[0], lengths[1], batch.visits[0], batch.visits[1]
        )
        metrics = losses.pair_metrics(pair, settings.resolved_beta, batch.real_B.astype(jnp.float32))
        # A padded pair has no tokens; what its loss is must not matter, not even as 0 times infinity.
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
    return losses.token_log_probs(hidden_BRD, model.unembedding(), batch.targets_BR)
