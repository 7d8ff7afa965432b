"""Low-rank adapters: fresh ones for a base, and bases with adapters folded in (https://arxiv.org/abs/2106.09685)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from itool_jax.model.transformer import LoraConfig, ModelConfig, Params, Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters on all linear layers."""

    rank: int = 16
    """Rank of the adapters' matrices."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be positive, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha must be positive, got {self.alpha}")

    @property
    def config(self) -> LoraConfig:
        """The same, as the model takes it."""
        return LoraConfig(self.rank, self.alpha)


@functools.partial(jax.jit, static_argnums=(0, 1))
def initialize_adapters(config: ModelConfig, lora: LoraConfig, key: Array) -> Params:
    """Adapters that change nothing yet: A random, B zero; float32."""
    model = Transformer(config, lora, rngs=nnx.Rngs(key))  # under jit the base weights are never made
    return nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))


def merge_adapters(base: Params, adapters: Params, lora: LoraConfig) -> Params:
    """The base with kernel + alpha/rank · A B in place of every adapted kernel."""
    if "lora_a" in adapters:
        change = jnp.einsum("...ir,...ro->...io", adapters["lora_a"], adapters["lora_b"])
        kernel = base["kernel"] + (lora.alpha / lora.rank * change).astype(base["kernel"].dtype)
        return base | {"kernel": kernel}
    return base | {name: merge_adapters(base[name], part, lora) for name, part in adapters.items()}
