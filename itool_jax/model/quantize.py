"""Quantises weights to NF4 for QLoRA (https://arxiv.org/abs/2305.14314): four bits per weight, double-quantised scales.

In: a kernel [in, out]. Out: `Codes`, about 0.516 bytes per weight, and the kernel again, for use in a compiled step.
Values follow the bitsandbytes definition. Blocks of 64 weights along the input are scaled by their largest magnitude
and coded by 16 quantiles of a normal distribution. The scales, minus their mean, are stored in eight bits with a
dynamic exponent, in blocks of 256.
"""

from statistics import NormalDist
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

BLOCK, SCALE_BLOCK = 64, 256


class Codes(NamedTuple):
    """A quantised kernel [in, out]; a stack of layers has one more leading axis."""

    codes: Array
    """uint8 [in / 2, out]; a byte holds two neighbouring weights along the input, the first in the upper four bits."""
    scales: Array
    """uint8 [in / 64, out]; the largest magnitude of each block, as a code of `DYNAMIC`."""
    scale_of_scales: Array
    """float32 [in · out / 64 / 256]; scales are ordered output by output, as in a checkpoint's [out, in]."""
    scale_mean: Array
    """float32 []."""


def _normal_quantiles() -> np.ndarray:
    """Computes the 16 values of NF4: 0, and quantiles of a normal distribution on both sides, scaled to [-1, 1]."""
    offset = 0.9677083  # the outermost quantile: between those of 15 and of 16 equal parts
    positive, negative = ([NormalDist().inv_cdf(x) for x in np.linspace(offset, 0.5, n)[:-1]] for n in (9, 8))
    values = np.sort(np.array([*positive, 0.0, *(-x for x in negative)]))
    return (values / np.abs(values).max()).astype(np.float32)


def _dynamic() -> np.ndarray:
    """Computes the 256 values of an eight-bit float with a sign, a unary base-ten exponent and a linear fraction."""
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2**i + 1)
        middles = 10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2
        values += [*middles, *-middles]
    return np.sort(np.array(values)).astype(np.float32)


NF4, DYNAMIC = _normal_quantiles(), _dynamic()


def zeros(n_in: int, n_out: int) -> Codes:
    """Allocates all-zero codes for a kernel of this shape; a partial last block is padded with zeros."""
    blocks = -(-n_in // BLOCK)
    scales = jnp.zeros(-(-blocks * n_out // SCALE_BLOCK))
    codes = jnp.zeros((blocks * BLOCK // 2, n_out), jnp.uint8)
    return Codes(codes, jnp.zeros((blocks, n_out), jnp.uint8), scales, jnp.zeros(()))


def quantize(kernel: Float[Array, "in out"]) -> Codes:
    """Returns the nearest codes of a kernel; under jit its float32 copy exists only during this call."""
    n_in, n_out = kernel.shape
    blocks = -(-n_in // BLOCK)
    padded = jnp.pad(kernel.astype(jnp.float32), [(0, blocks * BLOCK - n_in), (0, 0)]).reshape(blocks, BLOCK, n_out)
    largest = jnp.abs(padded).max(axis=1)
    codes = _nearest(padded / jnp.where(largest > 0, largest, 1.0)[:, None], NF4).reshape(-1, 2, n_out)
    flat = largest.T.reshape(-1)
    mean = flat.mean()
    grouped = jnp.pad(flat - mean, (0, -flat.size % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
    scale = jnp.abs(grouped).max(axis=1)
    scales = jnp.searchsorted(_midpoints(DYNAMIC), grouped / jnp.where(scale > 0, scale, 1.0)[:, None])
    scales = scales.astype(jnp.uint8).reshape(-1)[: flat.size].reshape(n_out, blocks).T
    return Codes(codes[:, 0] << 4 | codes[:, 1], scales, scale, mean)


def dequantize(q: Codes, n_in: int, dtype: str) -> Float[Array, "in out"]:
    """Returns the kernel that the codes represent."""
    blocks, n_out = q.scales.shape
    scale = jnp.repeat(q.scale_of_scales, SCALE_BLOCK)[: blocks * n_out].reshape(n_out, blocks).T
    largest = jnp.asarray(DYNAMIC)[q.scales] * scale + q.scale_mean
    values = jnp.asarray(NF4)[jnp.stack([q.codes >> 4, q.codes & 15], axis=1)].reshape(blocks, BLOCK, n_out)
    return (values * largest[:, None]).reshape(-1, n_out)[:n_in].astype(dtype)


def _midpoints(values: np.ndarray) -> np.ndarray:
    return (values[1:] + values[:-1]) / 2


def _nearest(x: Array, values: np.ndarray) -> Array:
    codes = jnp.zeros(x.shape, jnp.uint8)
    for middle in _midpoints(values).tolist():
        codes += x > middle
    return codes
