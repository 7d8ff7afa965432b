"""Keys and values kept between calls: prompts once (`Prefix`), their continuations a row each (`Suffix`).

A layer's part is an array of its own, heads before slots: a decode loop then writes in place, and its products read the
caches as they lie, without slices or transposed copies.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Layers = tuple[Float[Array, "B H K D"], ...]


class Prefix(NamedTuple):
    """What P prompts left behind, read by all the rows that continue them; [P, H, K, D] a layer."""

    k: Layers
    v: Layers
    length_P: Int[Array, " P"]


class Suffix(NamedTuple):
    """The continuation of B rows, S slots each, [B, H, S, D] a layer; a row's unused slots are not valid."""

    k: Layers
    v: Layers
    valid_BS: Bool[Array, "B S"]


def empty_suffix(prefix: Prefix, rows: int, slots: int) -> Suffix:
    """An unused cache of `slots` tokens for `rows` rows, shaped and typed like the prefix."""
    _, heads, _, size = prefix.k[0].shape
    zeros = tuple(jnp.zeros((rows, heads, slots, size), k.dtype) for k in prefix.k)
    return Suffix(zeros, zeros, jnp.zeros((rows, slots), bool))
