"""Creates low-rank adapters, and joins or merges them with a base (https://arxiv.org/abs/2106.09685)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from itool_jax.model.linear import LoraSettings
from itool_jax.model.sharding import constrain
from itool_jax.model.transformer import ModelConfig, Params, Transformer


@functools.partial(jax.jit, static_argnums=(0, 1))
def initialize_adapters(config: ModelConfig, lora: LoraSettings, key: Array) -> Params:
    """Creates adapters that change nothing yet (A random, B zero) in float32, sharded over the mesh in use."""
    model = Transformer(config, lora, rngs=nnx.Rngs(key))  # under jit the base weights are never allocated
    return constrain(nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))


@functools.partial(jax.jit, static_argnums=2)
def merge_adapters(base: Params, adapters: Params, lora: LoraSettings) -> Params:
    """Replaces every adapted kernel of the base with kernel + alpha/rank · A B."""
    if "lora_a" in adapters:
        change = jnp.einsum("...ir,...ro->...io", adapters["lora_a"], adapters["lora_b"])
        return base | {"kernel": (base["kernel"] + lora.alpha / lora.rank * change).astype(base["kernel"].dtype)}
    return base | {name: merge_adapters(base[name], part, lora) for name, part in adapters.items()}


def beside(base: Params, adapters: Params) -> Params:
    """Joins a base and its adapters into one tree, the weights of the adapted model, without merging them."""
    shared = base.keys() & adapters.keys()
    return base | adapters | {name: beside(base[name], adapters[name]) for name in shared}
