"""Defines the linear layers: plain, with low-rank adapters, or with four-bit weights."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from itool_jax.model import quantize

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
"""Names of the linear layers in `lora.targets`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters of the linear layers (https://arxiv.org/abs/2106.09685)."""

    rank: int = 16
    """Rank of the adapter matrices. 0: no adapters, train all weights."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs to drop in each warm-up step. Preference training uses no dropout."""
    targets: tuple[str, ...] = LINEAR
    """Linear layers that get adapters."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank must not be negative, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha must be positive, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout must be in [0, 1), got {self.dropout}")
        if unknown := [name for name in self.targets if name not in LINEAR]:
            raise ValueError(f"lora.targets must be among {' '.join(LINEAR)}, got {unknown[0]}")
        if not self.targets:
            raise ValueError("lora.targets must name a layer; lora.rank=0 trains without adapters")


class Nf4Kernel(nnx.Module):
    """A four-bit kernel, dequantised where it is used (https://arxiv.org/abs/2305.14314)."""

    def __init__(self, n_in: int, n_out: int):
        self.n_in = n_in
        for name, leaf in quantize.zeros(n_in, n_out)._asdict().items():
            setattr(self, name, nnx.Param(leaf))

    def dequantize(self, x: Array) -> tuple[Array, Array]:
        """Returns the kernel [n_in, n_out] in the type of `x`, computed no earlier than `x`; and `x` itself."""
        codes = quantize.Codes(*(getattr(self, name)[...] for name in quantize.Codes._fields))
        # Without the barrier, the compiler would dequantise the kernels of all layers before a loop that reuses them.
        codes, x = jax.lax.optimization_barrier((codes, x))
        return quantize.dequantize(codes, self.n_in, x.dtype.name), x


@jax.custom_vjp
def _product(x: Array, w: Array) -> Array:
    """Computes x @ w; the gradient of w reads d_y untransposed, where XLA would slowly compute it transposed."""
    return x @ w


def _product_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, ...]]:
    return x @ w, (x, w)


def _product_backward(saved: tuple[Array, ...], d_y: Array) -> tuple[Array, Array]:
    x, w = saved
    d_y, rows = jax.lax.optimization_barrier(d_y), tuple(range(x.ndim - 1))
    return d_y @ w.T, jnp.tensordot(x, d_y, (rows, rows))


_product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def _low_rank(x: Array, a: Array, b: Array) -> Array:
    """Computes x @ a @ b; its gradient transposes only the small operands, which XLA would not do on a CPU."""
    return x @ a @ b


def _low_rank_forward(x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    low = x @ a
    return low @ b, (x, low, a, b)


def _low_rank_backward(saved: tuple[Array, ...], d_y: Array) -> tuple[Array, Array, Array]:
    x, low, a, b = saved
    d_low = d_y @ b.T
    rows = tuple(range(x.ndim - 1))
    return d_low @ a.T, jnp.tensordot(d_low, x, (rows, rows)).T, jnp.tensordot(low, d_y, (rows, rows))


_low_rank.defvjp(_low_rank_forward, _low_rank_backward)


class Linear(nnx.Module):
    """x @ kernel (+ bias) (+ alpha/rank · x @ A @ B), with A and B in float32."""

    def __init__(
        self,
        n_in: int,
        n_out: int,
        *,
        bias: bool,
        lora: LoraSettings | None,
        dtype: str,
        nf4: bool,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.lecun_normal()
        plain = nnx.Param(init(rngs.params(), (n_in, n_out), jnp.float32))
        self.kernel = Nf4Kernel(n_in, n_out) if nf4 else plain
        self.bias = nnx.Param(jnp.zeros(n_out)) if bias else None
        self.dtype, self.lora_scale = dtype, 0.0
        if lora is not None:
            self.lora_scale, self.dropout = lora.alpha / lora.rank, lora.dropout
            bound = n_in**-0.5  # Kaiming-uniform with a = sqrt(5), as PEFT initializes A; B starts at zero
            start = jax.random.uniform(rngs.params(), (n_in, lora.rank), minval=-bound, maxval=bound)
            self.lora_a = nnx.LoRAParam(start)
            self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, n_out)))

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """Maps [..., n_in] to [..., n_out] in `dtype`; `key` is for dropout, None turns it off."""
        x = x.astype(self.dtype)
        if isinstance(self.kernel, Nf4Kernel):
            kernel, x = self.kernel.dequantize(x)
        else:
            kernel = self.kernel[...]
        kernel = kernel.astype(self.dtype)
        if not self.lora_scale:
            y = _product(x, kernel)
        else:
            y = x @ kernel
            if key is not None and self.dropout:
                kept = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
                x = jnp.where(kept, x / (1 - self.dropout), 0)
            a, b = self.lora_a[...].astype(self.dtype), self.lora_scale * self.lora_b[...]
            y = y + _low_rank(x, a, b.astype(self.dtype))
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)
