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


def merge_adapters(base: Params, adapters: Params, lora: LoraSettings) -> Params:
    """Replaces every adapted kernel in `base` with kernel + alpha/rank · A B, one by one, and returns `base`."""
    if "lora_a" in adapters:
        base["kernel"] = _merged(base["kernel"], adapters["lora_a"], adapters["lora_b"], lora)
    else:
        for name, part in adapters.items():
            merge_adapters(base[name], part, lora)
    return base


@functools.partial(jax.jit, static_argnums=3)
def _merged(kernel: Array, a: Array, b: Array, lora: LoraSettings) -> Array:
    change = jnp.einsum("...ir,...ro->...io", a, b)
    return (kernel + lora.alpha / lora.rank * change).astype(kernel.dtype)


def beside(base: Params, adapters: Params) -> Params:
    """Joins a base and its adapters into one tree, the weights of the adapted model, without merging them."""
    shared = base.keys() & adapters.keys()
    return base | adapters | {name: beside(base[name], adapters[name]) for name in shared}
