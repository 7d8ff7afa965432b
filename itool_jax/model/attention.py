"""Computes attention of rows over several segments of keys and values, some of them shared by a group of rows.

In: queries [B, T, heads, head_dim]; keys, values and a mask for each segment. Out: the attended values
[B, T, heads · head_dim], computed in blocks if there are many scores. Causal attention over whole rows uses cuDNN's
flash attention on NVIDIA GPUs that have it.
"""

import functools
import logging
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from itool_jax.model.sharding import ROWS, compute_capability, fit, n_devices

_log = logging.getLogger(__name__)

MASKED = -1e30
SCORES_AT_ONCE = 1 << 27
"""Most attention scores in a device's memory at a time, four bytes each."""
CAUSAL_PARTS, SMALLEST_PART = 4, 64
"""Most parts that the queries of a causal pass are cut into, and tokens in the smallest part."""


class KeyValues(NamedTuple):
    """Keys and values of `rows` rows; `mask` [rows, T or 1, K] marks those that a query may see."""

    k_BHDK: Array
    v_BHKD: Array
    mask_BTK: Array


def attend(q_BTHD: Array, segments: list[KeyValues]) -> Array:
    """Attends over several segments under one softmax; a segment may be shared by a group of rows.

    A segment with fewer rows than the queries (a prompt shared by its candidates) is read in place: the
    queries of a group are folded into one long row, so that nothing is copied. The softmax is normalised
    at the end, over all segments. Returns [B, T, H · D].
    """
    B, T, H, D = q_BTHD.shape
    kv_heads = segments[0].k_BHDK.shape[1]
    q = q_BTHD.reshape(B, T, kv_heads, H // kv_heads, D).transpose(0, 2, 3, 1, 4)
    # Each segment gets separate queries: on GPUs, XLA merges products that share an operand. It would concatenate the
    # keys of all segments, and so copy the whole cache for every token.
    queries = [q]
    while len(queries) < len(segments):
        queries.append(jax.lax.optimization_barrier(queries[-1]))
    folded = [_segment_scores(*pair) for pair in zip(queries, segments, strict=True)]
    best = jnp.stack([_unfold(s.max(axis=-1), B) for s in folded]).max(axis=0)
    best = jax.lax.stop_gradient(best)
    total, out = jnp.zeros(()), jnp.zeros(())
    for s, (_, v, _) in zip(folded, segments, strict=True):
        weight = jnp.exp(s - _fold(best, len(s))[..., None])
        total += _unfold(weight.sum(axis=-1), B)
        rows, heads, group, length, K = weight.shape
        flat = weight.astype(v.dtype).reshape(rows, heads, group * length, K)
        mixed = jnp.matmul(flat, v, preferred_element_type=jnp.float32)
        out += _unfold(mixed.reshape(rows, heads, group, length, D), B)
    out = (out / total[..., None]).astype(q_BTHD.dtype)  # [B, kv heads, group, T, D]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H * D)


def attend_in_blocks(q_BTHD: Array, segments: list[KeyValues]) -> Array:
    """Computes `attend`, in consecutive blocks of queries if there are many scores.

    Only one block's scores are in memory at a time, in the backward pass too: memory grows with T, not with T².
    """
    B, T, H, _ = q_BTHD.shape
    n_scores = B * T * H * sum(segment.k_BHDK.shape[-1] for segment in segments)
    n = min(T, -(-n_scores // (SCORES_AT_ONCE * n_devices())))
    if n == 1:
        return attend(q_BTHD, segments)

    def blocks(x_BT: Array) -> Array:
        padded = jnp.pad(x_BT, [(0, 0), (0, -T % n)] + [(0, 0)] * (x_BT.ndim - 2))
        return padded.reshape(len(x_BT), n, -1, *x_BT.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def block(part: tuple[Array, list[Array | None]]) -> Array:
        q, masks = part
        masked = [s if mask is None else s._replace(mask_BTK=mask) for s, mask in zip(segments, masks, strict=True)]
        return attend(q, masked)

    masks = [blocks(s.mask_BTK) if s.mask_BTK.shape[1] == T else None for s in segments]
    out = jax.lax.map(block, (blocks(q_BTHD), masks))
    return out.swapaxes(0, 1).reshape(B, -1, out.shape[-1])[:, :T]


Kernel = Literal["cudnn", "xla"]


def causal_kernel(capability: tuple[int, ...], dtype: Any, head_dim: int) -> Kernel:
    """Chooses what computes causal attention: cuDNN's flash attention where it is supported, else `attend`.

    cuDNN needs an NVIDIA GPU of compute capability 8.0 (Ampere), 16-bit values, and heads of a multiple of 8, at most
    128 (256 on some GPUs).
    """
    is_16_bit = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
    return "cudnn" if capability >= (8, 0) and is_16_bit and head_dim % 8 == 0 and head_dim <= 128 else "xla"


@functools.cache
def cudnn_works(dtype: Any, head_dim: int) -> bool:
    """Returns whether cuDNN's kernel runs here, forwards and backwards, and agrees with XLA's products.

    A driver or library without it must not end a run.
    """
    shape = jax.ShapeDtypeStruct((1, 128, 2, head_dim), dtype)

    def outputs(x_BTHD: Array, kernel: Kernel) -> tuple[Array, Array]:
        def total(x_BTHD: Array) -> tuple[Array, Array]:
            out = jax.nn.dot_product_attention(x_BTHD, x_BTHD, x_BTHD, is_causal=True, implementation=kernel)
            return out.astype(jnp.float32).sum(), out

        return jax.grad(total, has_aux=True)(x_BTHD)

    x_BTHD = np.random.default_rng(0).standard_normal(shape.shape).astype(shape.dtype)
    try:
        # Compiled ahead of time, this also runs while another function is traced.
        by_kernel = [jax.jit(outputs, static_argnums=1).lower(shape, k).compile()(x_BTHD) for k in get_args(Kernel)]
    except Exception as error:  # many kinds, from the check of versions to the driver
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        _log.warning("cuDNN's flash attention does not work here (%s); XLA's products compute attention", reason)
        return False
    agrees = all(np.allclose(*map(np.float32, pair), rtol=0.1, atol=0.1) for pair in zip(*by_kernel, strict=True))
    if not agrees:
        _log.warning("cuDNN's flash attention gives wrong values here; XLA's products compute attention")
    return agrees


def attend_in_one_kernel(q_BTHD: Array, own: KeyValues, *, running: bool, kernel: Kernel) -> Array:
    """Computes `attend` for rows whose mask is only causal, on each device of the mesh for its own rows and heads."""
    k_BTHD, v_BTHD = own.k_BHDK.transpose(0, 3, 1, 2), own.v_BHKD.swapaxes(1, 2)
    attend_locally = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation=kernel)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        axes = ("data", None, ("fsdp", "tensor"), None) if running else (ROWS, None, "tensor", None)
        spec = fit(axes, k_BTHD.shape, mesh)
        attend_locally = jax.shard_map(attend_locally, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    return attend_locally(q_BTHD, k_BTHD, v_BTHD).reshape(*q_BTHD.shape[:2], -1)


def attend_causally(q_BTHD: Array, own: KeyValues, *, only_causal: bool = False, running: bool = False) -> Array:
    """Computes `attend` for causal masks, skipping the keys after each part of the queries.

    Args:
        q_BTHD: the queries of whole rows.
        own: their keys and values; the mask hides at least the keys after each query.
        only_causal: the mask hides nothing else, so a kernel that knows only this mask may compute it.
        running: rows and heads are sharded as in the layout for running (see `model.stacking`).
    """
    dtype, head_dim = q_BTHD.dtype, q_BTHD.shape[-1]
    wanted = causal_kernel(compute_capability(), dtype, head_dim) if only_causal else "xla"
    if wanted == "cudnn" and cudnn_works(dtype, head_dim):
        return attend_in_one_kernel(q_BTHD, own, running=running, kernel="cudnn")
    T = q_BTHD.shape[1]
    n = min(CAUSAL_PARTS, max(1, T // SMALLEST_PART))
    ends = [T * (i + 1) // n for i in range(n)]
    parts = [
        attend_in_blocks(
            q_BTHD[:, start:end],
            [KeyValues(own.k_BHDK[..., :end], own.v_BHKD[:, :, :end], own.mask_BTK[:, start:end, :end])],
        )
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    return jnp.concatenate(parts, axis=1) if n > 1 else parts[0]


def _segment_scores(q: Array, segment: KeyValues) -> Array:
    """Computes masked float32 scores [rows, kv heads, group, B / rows · T, K]."""
    k, _, mask = segment
    folded = _fold(q, len(k))
    rows, heads, group, length, D = folded.shape
    flat = folded.reshape(rows, heads, group * length, D)
    scores = jnp.matmul(flat, k, preferred_element_type=jnp.float32) * D**-0.5
    return jnp.where(mask[:, None, None], scores.reshape(rows, heads, group, length, -1), MASKED)


def _fold(x: Array, rows: int) -> Array:
    """Folds each group of rows into one: [B, heads, group, T, …] to [rows, heads, group, B / rows · T, …]."""
    B, heads, group, T = x.shape[:4]
    if rows == B:
        return x
    x = x.reshape(rows, B // rows, *x.shape[1:])
    return jnp.moveaxis(x, 1, 3).reshape(rows, heads, group, B // rows * T, *x.shape[5:])


def _unfold(x: Array, B: int) -> Array:
    """Inverts `_fold`."""
    rows, heads, group, length = x.shape[:4]
    if rows == B:
        return x
    x = x.reshape(rows, heads, group, B // rows, -1, *x.shape[4:])
    return jnp.moveaxis(x, 3, 1).reshape(B, heads, group, length * rows // B, *x.shape[5:])


def pick(x_BT: Array, at_BR: Array) -> Array:
    """Picks positions `at_BR` of each row: [B, T, …] to [B, R, …]."""
    return jnp.take_along_axis(x_BT, at_BR.reshape(*at_BR.shape, *(1,) * (x_BT.ndim - 2)), axis=1)
