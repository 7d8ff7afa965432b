"""Keys and values kept between calls: prompts once (`Prefix`), their continuations a row each (`Suffix`).

A layer's part is an array of its own, heads before slots and keys as columns: a decode loop then writes in place, and
its products read the caches as they lie, without slices or transposed copies.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Keys = tuple[Float[Array, "B H D K"], ...]
Values = tuple[Float[Array, "B H K D"], ...]


class Prefix(NamedTuple):
    """What P prompts left behind, read by all the rows that continue them."""

    k: Keys
    v: Values
    length_P: Int[Array, " P"]


class Suffix(NamedTuple):
    """The continuation of B rows, S slots each; a row's unused slots are not valid."""

    k: Keys
    v: Values
    valid_BS: Bool[Array, "B S"]


def empty_suffix(prefix: Prefix, rows: int, slots: int) -> Suffix:
    """An unused cache of `slots` tokens for `rows` rows, shaped and typed like the prefix."""
    _, heads, size, _ = prefix.k[0].shape
    k = tuple(jnp.zeros((rows, heads, size, slots), layer.dtype) for layer in prefix.k)
    v = tuple(jnp.zeros((rows, heads, slots, size), layer.dtype) for layer in prefix.v)
    return Suffix(k, v, jnp.zeros((rows, slots), bool))
