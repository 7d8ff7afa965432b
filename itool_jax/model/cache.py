"""Caches keys and values between calls: each prompt once (`Prefix`), and its continuations row by row (`Suffix`).

Each layer has separate arrays, with heads before slots and keys as columns, so that a decode loop writes in place and
its matrix products read the caches without slices or transposed copies.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from itool_jax.model.sharding import constrain_axes

Keys = tuple[Float[Array, "B H D K"], ...]
Values = tuple[Float[Array, "B H K D"], ...]


class Prefix(NamedTuple):
    """Keys and values of P prompts, read by all rows that continue them."""

    k: Keys
    v: Values
    length_P: Int[Array, " P"]


class Suffix(NamedTuple):
    """Keys and values of B continuations, S slots each; unused slots are not valid."""

    k: Keys
    v: Values
    valid_BS: Bool[Array, "B S"]


@functools.partial(jax.jit, static_argnums=1)
def empty_prefix(like: Prefix, rows: int) -> Prefix:
    """Allocates an empty cache for `rows` prompts, shaped like `like`."""
    return _constrain(jax.tree.map(lambda x: jnp.zeros((rows, *x.shape[1:]), x.dtype), like))


@functools.partial(jax.jit, donate_argnums=0)
def place(prefix: Prefix, new: Prefix, row_P: Int[Array, " P"]) -> Prefix:
    """Overwrites rows of `prefix` (donated) with new prompts; out-of-range rows are dropped."""
    return _constrain(jax.tree.map(lambda x, y: x.at[row_P].set(y, mode="drop"), prefix, new))


def _constrain(prefix: Prefix) -> Prefix:
    """Shards rows and heads over the mesh as the running layout computes them."""
    return jax.tree.map(lambda x: constrain_axes(x, *("data", ("fsdp", "tensor"))[: x.ndim]), prefix)


def empty_suffix(prefix: Prefix, rows: int, slots: int) -> Suffix:
    """Allocates an empty cache of `slots` tokens for `rows` rows, shaped and typed like the prefix."""
    _, heads, size, _ = prefix.k[0].shape
    k = tuple(jnp.zeros((rows, heads, size, slots), layer.dtype) for layer in prefix.k)
    v = tuple(jnp.zeros((rows, heads, slots, size), layer.dtype) for layer in prefix.v)
    return Suffix(k, v, jnp.zeros((rows, slots), bool))


def as_prefix(suffix: Suffix, length_B: Int[Array, " B"]) -> Prefix:
    """Turns the first `length_B` slots of each row into a prefix that further rows continue."""
    return Prefix(suffix.k, suffix.v, length_B)
