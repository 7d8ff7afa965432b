"""Defines the settings of SFT and of preference training.

A recipe defines what is trained; a runtime defines how it is computed.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from itool_jax.model import sharding
from itool_jax.training.losses import LossSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Recipe of AdamW with a cosine schedule over some epochs."""

    section: ClassVar[str] = "training"

    learning_rate: float
    """Peak learning rate."""
    batch_size: int
    """Samples (or pairs) per step."""
    epochs: int | Literal["auto"]
    """Passes over the data."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises from zero, before its cosine decay."""
    clip_norm: float = 1.0
    """Maximum gradient norm; larger gradients are scaled down to it."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "batch_size", "clip_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{self.section}.{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"{self.section}.warmup_ratio must be in [0, 1), got {self.warmup_ratio}")
        if not self.weight_decay >= 0:
            raise ValueError(f"{self.section}.weight_decay must not be negative, got {self.weight_decay}")

    def rate(self, step: int, n_steps: int) -> float:
        """Computes the learning rate of step 0, 1, …: a linear rise, then a cosine decay to zero."""
        rise = self.warmup_ratio * n_steps
        if step < rise:
            return self.learning_rate * (step + 1) / (rise + 1)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1.0, n_steps - rise)))

    def rates(self, spans: Sequence[int]) -> list[float]:
        """Computes the learning rates of a whole training: one rise and decay per span, given in steps."""
        return [self.rate(step, n_steps) for n_steps in spans for step in range(n_steps)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRuntime:
    """How a training is computed: in which parts, and how often it is saved."""

    section: ClassVar[str] = "training"

    micro_batch: int | Literal["auto"] = 0
    """Samples (or pairs) per gradient computation on each device; fewer save memory. 0: the device's whole share of a
    batch. auto: as many as fit by the compiler's estimate, which is made once and kept with the run."""
    checkpoint_every: int = 0
    """Steps between two checkpoints during training. 0: chosen automatically, at most about 2 % overhead."""

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
        """Returns the number of micro-batches per batch on the mesh in use; ValueError if they do not divide evenly."""
        assert self.micro_batch != "auto", f"{self.section}.micro_batch was not resolved"
        share, name = self.share(), f"{self.section}.batch_size={self.batch_size}"
        if self.micro_batch and share % min(self.micro_batch, share):
            raise ValueError(
                f"{name}: {self.section}.micro_batch={self.micro_batch} must divide the {share} rows per device"
            )
        return share // min(self.micro_batch or share, share)

    def share(self) -> int:
        """Returns the rows of a batch per device of the mesh in use; ValueError if they do not divide evenly."""
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
    """Peak learning rate."""
    batch_size: int = 16
    """Samples per step."""
    epochs: int | Literal["auto"] = 1
    """Epochs per difficulty level (easy, medium, hard); 0 skips training. auto: rounds of one epoch per level, until a
    round gains less than half a point of validation accuracy."""
    max_epochs: int = 6
    """Maximum number of rounds with epochs=auto."""
    schedule: Literal["per_part", "span"] = "per_part"
    """Learning rate schedule. per_part: one rise and decay per difficulty level. span: one over all three, with
    epochs=auto one per round."""
    order: Literal["easy_to_hard", "mixed", "hard_to_easy"] = "easy_to_hard"
    """Order of the difficulty levels; mixed and hard_to_easy are for comparison."""
    pack: int = 0
    """Width in tokens of rows that pack several samples, which do not see each other; batch_size then counts rows.
    0: one sample per row."""

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
        """Most epochs per difficulty level."""
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
    """Peak learning rate."""
    batch_size: int = 8
    """Pairs per step."""
    epochs: int = 2
    """Epochs over the pairs of an iteration."""
    reference: Literal["iteration", "warmup"] = "iteration"
    """Reference policy, for losses that use one: the policy at the start of the iteration, or after warm-up."""
    merge: bool = False
    """At the start of each iteration, merge the adapters into the weights (in the weights' dtype) and train new ones.
    Otherwise keep training the same adapters."""
    control: Literal["none", "sft_same_prompts", "swapped"] = "none"
    """Control experiment with the same number of steps. sft_same_prompts: fine-tune on the gold responses of the pairs'
    prompts. swapped: swap chosen and rejected in a random half of the pairs, which must gain nothing."""

    def __post_init__(self) -> None:
        LossSettings.__post_init__(self)
        TrainingRecipe.__post_init__(self)
        if self.epochs < 1:
            raise ValueError(f"preference.epochs must be positive, got {self.epochs}")
        if self.control == "swapped" and self.loss == "raft":
            raise ValueError(
                "preference.control=swapped swaps the steps of pairs, but preference.loss=raft has no pairs"
            )

    @property
    def loss_settings(self) -> LossSettings:
        """Settings of the loss alone."""
        return LossSettings(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LossSettings)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceSettings(PreferenceRecipe, TrainingSettings):
    """Preference training on the searched pairs (section 4.3, eq 10 and 11)."""

    def __post_init__(self) -> None:
        PreferenceRecipe.__post_init__(self)
        TrainingSettings.__post_init__(self)
