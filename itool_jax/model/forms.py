"""The two forms of a model's weights: layers stacked along a leading axis, to train, and each by itself, to run.

A scan over stacked layers compiles fast and keeps little in memory, its backward pass too; a decode loop wants arrays
that it can read where they lie. On a mesh the two are also laid out differently (see `model.sharding`). Either function
goes from one form to the other a leaf at a time and empties what it is given: a model is never there twice.
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
    """Stacked weights as those of single layers, `layers` by number; `params` is emptied."""
    leaves, found = _taken(params), {}
    while leaves:
        name, x = leaves.popitem()
        if name[0] == "layers":
            names = [(name[0], number, *name[1:]) for number in range(len(x))]
            found |= zip(names, _compiled(tuple, _where(name, x.shape[1:], running=True))(x), strict=True)
        else:
            found[name] = jax.device_put(x, _where(name, x.shape, running=True))
    return unflatten_dict(found)


def to_train(params: Params) -> Params:
    """The weights of single layers as stacked ones; `params` is emptied."""
    leaves, found = _taken(params), {}
    n_layers = 1 + max((name[1] for name in leaves if name[0] == "layers"), default=-1)
    while leaves:
        name, x = next(iter(leaves.items()))
        if name[0] == "layers":
            inner = name[2:]
            parts, name = [leaves.pop((name[0], i, *inner)) for i in range(n_layers)], (name[0], *inner)
            found[name] = _compiled(jnp.stack, _where(name, (n_layers, *x.shape), running=False))(parts)
        else:
            found[name] = jax.device_put(leaves.pop(name), _where(name, x.shape, running=False))
    return unflatten_dict(found)


def _taken(params: Params) -> dict[Name, jax.Array]:
    leaves = cast(dict[Name, jax.Array], flatten_dict(params))
    params.clear()
    return leaves


def _where(name: Name, shape: tuple[int, ...], running: bool) -> jax.sharding.Sharding:
    return sharding_of(tuple(map(jax.tree_util.DictKey, name)), shape, running)


@functools.cache
def _compiled(function: Callable[..., Any], where: jax.sharding.Sharding) -> Callable[..., Any]:
    return jax.jit(function, out_shardings=where)
