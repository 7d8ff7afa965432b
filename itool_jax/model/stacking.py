"""Converts a model's weights between two layouts: layers stacked along a leading axis (training) or separate (running).

A scan over stacked layers compiles fast and needs little memory, in its backward pass too; a decode loop needs arrays
that it can read in place. On a mesh, the two layouts are also sharded differently (see `model.sharding`). Both
functions convert one leaf at a time and empty their argument, so memory never holds a second copy of the model.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from itool_jax.model.sharding import sharding_of
from itool_jax.model.transformer import Params

Name = tuple[Any, ...]


def to_run(params: Params) -> Params:
    """Unstacks the layers' weights, keying `layers` by number; empties `params`."""
    leaves, single = _take_leaves(params), {}
    while leaves:
        name, x = leaves.popitem()
        if name[0] == "layers":
            names = [(name[0], number, *name[1:]) for number in range(len(x))]
            single |= zip(names, _compiled(tuple, _where(name, x.shape[1:], running=True))(x), strict=True)
        else:
            single[name] = jax.device_put(x, _where(name, x.shape, running=True))
    return unflatten_dict(single)


def to_train(params: Params) -> Params:
    """Stacks the weights of separate layers; empties `params`."""
    leaves, stacked = _take_leaves(params), {}
    n_layers = 1 + max((name[1] for name in leaves if name[0] == "layers"), default=-1)
    while leaves:
        name, x = next(iter(leaves.items()))
        if name[0] == "layers":
            inner = name[2:]
            parts, name = [leaves.pop((name[0], i, *inner)) for i in range(n_layers)], (name[0], *inner)
            stacked[name] = _compiled(jnp.stack, _where(name, (n_layers, *x.shape), running=False))(parts)
        else:
            stacked[name] = jax.device_put(leaves.pop(name), _where(name, x.shape, running=False))
    return unflatten_dict(stacked)


def _take_leaves(params: Params) -> dict[Name, jax.Array]:
    """Moves the leaves out of `params`, keyed by path; empties `params`."""
    leaves = cast(dict[Name, jax.Array], flatten_dict(params))
    params.clear()
    return leaves


def _where(name: Name, shape: tuple[int, ...], running: bool) -> jax.sharding.Sharding:
    return sharding_of(tuple(map(jax.tree_util.DictKey, name)), shape, running)


@functools.cache
def _compiled(function: Callable[..., Any], where: jax.sharding.Sharding) -> Callable[..., Any]:
    return jax.jit(function, out_shardings=where)
