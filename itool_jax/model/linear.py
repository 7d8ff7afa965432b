"""The linear layers: plain, with low-rank adapters beside them, or of four-bit weights."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from itool_jax.model import quantize

LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
"""The linear layers, as `lora.targets` names them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters beside the linear layers' weights (https://arxiv.org/abs/2106.09685)."""

    rank: int = 16
    """Rank of the adapters' matrices; 0 trains all weights instead."""
    alpha: float = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in each step of the warm-up; preference training drops none."""
    targets: tuple[str, ...] = LINEAR
    """Layers that get adapters."""

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
    """A kernel in four bits, of which the kernel itself is made where it is used (https://arxiv.org/abs/2305.14314)."""

    def __init__(self, n_in: int, n_out: int):
        self.n_in = n_in
        for name, leaf in quantize.zeros(n_in, n_out)._asdict().items():
            setattr(self, name, nnx.Param(leaf))

    def dequantize(self, x: Array) -> tuple[Array, Array]:
        """[n_in, n_out] in the type of its input `x`; and `x`, before which it is not made."""
        codes = quantize.Codes(*(getattr(self, name)[...] for name in quantize.Codes._fields))
        # Else the compiler would make the kernels of all layers before a loop that reads them again and again.
        codes, x = jax.lax.optimization_barrier((codes, x))
        return quantize.dequantize(codes, self.n_in, x.dtype.name), x


@jax.custom_vjp
def _product(x: Array, w: Array) -> Array:
    """X @ w. The gradient of w reads what comes back as it lies, where XLA would compute it turned over, slowly."""
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
    """X @ a @ b. In its gradient the small operands are the ones turned over, as XLA would not have it on a host."""
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
            bound = n_in**-0.5  # Kaiming-uniform with a = sqrt(5), as PEFT starts A; B starts at zero
            start = jax.random.uniform(rngs.params(), (n_in, lora.rank), minval=-bound, maxval=bound)
            self.lora_a = nnx.LoRAParam(start)
            self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, n_out)))

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """[..., n_in] to [..., n_out], computed and returned in `dtype`; `key` is for dropout, None drops nothing."""
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
