"""Keys and values kept between calls: prompts once (`Prefix`), their continuations a row each (`Suffix`)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Prefix(NamedTuple):
    """What P prompts left behind, read by all the rows that continue them."""

    k_LPKHD: Float[Array, "L P K H D"]
    v_LPKHD: Float[Array, "L P K H D"]
    length_P: Int[Array, " P"]


class Suffix(NamedTuple):
    """The continuation of B rows, S slots each; a row's unused slots are not valid."""

    k_LBSHD: Float[Array, "L B S H D"]
    v_LBSHD: Float[Array, "L B S H D"]
    valid_BS: Bool[Array, "B S"]


def empty_suffix(prefix: Prefix, rows: int, slots: int) -> Suffix:
    """An unused cache of `slots` tokens for `rows` rows, shaped and typed like the prefix."""
    layers, _, _, heads, size = prefix.k_LPKHD.shape
    shape = (layers, rows, slots, heads, size)
    zeros = jnp.zeros(shape, prefix.k_LPKHD.dtype)
    return Suffix(zeros, zeros, jnp.zeros((rows, slots), bool))
