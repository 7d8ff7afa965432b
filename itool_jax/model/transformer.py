"""The decoder-only transformer of the Llama and Qwen families, as one Flax NNX module.

In: token ids, positions and, when decoding, what was computed before (see `model.cache`).
Out: the last hidden state of every token and the updated cache. For training, layers are stacked along a leading axis
and computed by a scan over them; to run, each has arrays of its own (see `model.forms`). The module is
split once into `(graph, params)`; everything compiled works on the plain dictionary
`params` and merges the two inside (`nnx.merge(graph, params)`, or `nnx.merge(graph, base, adapters)`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from itool_jax.model.attention import KeyValues, attend_causally, attend_in_blocks, pick
from itool_jax.model.cache import Prefix, Suffix
from itool_jax.model.linear import LINEAR, Linear, LoraSettings
from itool_jax.model.sharding import ROWS, constrain_axes

Params = dict[Any, Any]
Remat = Literal["none", "layers", "dots"]
"""What the backward pass computes again: nothing, each layer whole, or all of a layer but its matrix products."""
SHORT_STACK = 8


class RopeScaling(NamedTuple):
    """Llama 3.1's frequency-dependent stretch of the rotary embedding (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shapes and constants of one checkpoint, read from its config.json by `model.hf`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool = False
    """Queries and keys are normalised head by head before they are rotated, as in Qwen3."""
    max_length: int
    dtype: str = "float32"
    """Computation type of the matrix products; norms, softmax and losses are always float32."""
    nf4: bool = False
    """The layers' kernels are NF4 codes."""
    stacked: bool = True
    """The layers' weights lie along a leading axis, as training wants them; else each layer has its own, to run."""
    remat: Remat = "none"


class RmsNorm(nnx.Module):
    """x / rms(x) · scale, in float32."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """Any leading shape; returned in the type of `x`."""
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(config: ModelConfig) -> Float[Array, " half"]:
    """Angle (radians) a position of each pair of head dimensions, stretched where the config asks for it.

    Constants of the compiled program, so float64 until the end: an error would grow with the position.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)  # 0: slow dimensions, fully stretched; 1: fast ones, left alone
        frequencies = frequencies * (smooth + (1 - smooth) / scaling.factor)
    return jnp.asarray(frequencies, jnp.float32)


def rotate(x_BTHD: Array, angles_BTF: Array) -> Array:
    """Rotary position embedding in the half-split layout of the Hugging Face checkpoints."""
    cos, sin = jnp.cos(angles_BTF)[:, :, None], jnp.sin(angles_BTF)[:, :, None]
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHD.dtype)


Keys = Sequence[Array | None]
NO_KEYS: Keys = (None,) * len(LINEAR)
"""Random keys of a layer's linear parts, for dropout."""


class Layer(nnx.Module):
    """Pre-norm attention and gated MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, lora: LoraSettings | None, rngs: nnx.Rngs):
        c, width, kv_width = config, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim

        def linear(name: str, n_in: int, n_out: int, bias: bool = False) -> Linear:
            adapted = lora if lora is not None and name in lora.targets else None
            return Linear(n_in, n_out, bias=bias, lora=adapted, dtype=c.dtype, nf4=c.nf4, rngs=rngs)

        self.attention_norm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.q = linear("q", c.hidden_size, width, c.qkv_bias)
        self.k = linear("k", c.hidden_size, kv_width, c.qkv_bias)
        self.v = linear("v", c.hidden_size, kv_width, c.qkv_bias)
        self.q_norm = RmsNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RmsNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.o = linear("o", width, c.hidden_size)
        self.mlp_norm = RmsNorm(c.hidden_size, c.rms_norm_eps)
        self.gate = linear("gate", c.hidden_size, c.intermediate_size)
        self.up = linear("up", c.hidden_size, c.intermediate_size)
        self.down = linear("down", c.intermediate_size, c.hidden_size)
        self.head_dim = c.head_dim

    def project(self, x_BTD: Array, angles_BTF: Array, keys: Keys = NO_KEYS) -> tuple[Array, Array, Array]:
        """Queries, keys (both rotated) and values, each [B, T, heads, head_dim]."""
        h = self.attention_norm(x_BTD)
        projections = zip((self.q, self.k, self.v), keys[:3], strict=True)
        q, k, v = (f(h, key).reshape(*h.shape[:2], -1, self.head_dim) for f, key in projections)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotate(q, angles_BTF), rotate(k, angles_BTF), v

    def finish(self, x_BTD: Array, attended_BTD: Array, keys: Keys = NO_KEYS) -> Array:
        """The layer's output: `x_BTD` with projected attention and MLP added."""
        x = x_BTD + self.o(attended_BTD, keys[3])
        h = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(h, keys[4])) * self.up(h, keys[5]), keys[6])


class Transformer(nnx.Module):
    """Embedding, layers, final norm, and an unembedding that may be the embedding itself."""

    def __init__(self, config: ModelConfig, lora: LoraSettings | None, *, rngs: nnx.Rngs):
        lora = lora if lora is not None and lora.rank else None

        @nnx.split_rngs(splits=config.n_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(config, lora, rngs)

        size = (config.vocab_size, config.hidden_size)
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), size))
        self.layers: Any = (
            stack(rngs) if config.stacked else nnx.List(Layer(config, lora, rngs) for _ in range(config.n_layers))
        )
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_embeddings else nnx.Param(0.02 * jax.random.normal(rngs.params(), size[::-1]))
        self.config = config

    def unembedding(self) -> Float[Array, "D V"]:
        """The output matrix in the computation type."""
        kernel = self.embedding[...].T if self.lm_head is None else self.lm_head[...]
        return kernel.astype(self.config.dtype)

    def logits(self, hidden: Array) -> Array:
        """Float32 logits of hidden states of any leading shape."""
        return jnp.matmul(hidden, self.unembedding(), preferred_element_type=jnp.float32)

    def _start(self, tokens_BT: Array, positions_BT: Array) -> tuple[Array, Array]:
        # Whole vectors before they are looked up: XLA finds no good way from their parts to rows.
        embedding = constrain_axes(self.embedding[...], "tensor")
        hidden = constrain_axes(embedding[tokens_BT].astype(self.config.dtype), ROWS if self.config.stacked else "data")
        return hidden, positions_BT[..., None].astype(jnp.float32) * rope_frequencies(self.config)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        length_B: Int[Array, " B"] | None = None,
        branch_BT: Int[Array, "B T"] | None = None,
        segment_BT: Int[Array, "B T"] | None = None,
        key: Array | None = None,
        at_BR: Int[Array, "B R"] | None = None,
    ) -> tuple[Float[Array, "B T D"] | Float[Array, "B R D"], Prefix]:
        """Causal pass over right-padded rows; also returns their keys and values as a `Prefix`.

        `length_B` goes into the returned prefix only: causality already hides the padding. Where `branch_BT` is
        given, a token sees those before it of branch 0 and of its own, as if no other branch were there; where
        `segment_BT` is, those of its own segment only, as if it were a row. `key` turns the adapters' dropout on.
        `at_BR` are the positions whose hidden states are wanted: what is not a target needs no logits, nor most of
        the last layer.
        """
        B, T = tokens_BT.shape
        seen = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        if branch_BT is not None:
            seen &= (branch_BT[:, None] == 0) | (branch_BT[:, None] == branch_BT[:, :, None])
        if segment_BT is not None:
            seen &= segment_BT[:, None] == segment_BT[:, :, None]
        if branch_BT is not None or segment_BT is not None:
            positions = seen.sum(axis=-1) - 1
        hidden, angles = self._start(tokens_BT, positions)

        def one_layer(layer: Layer, number: Array | int, x: Array) -> tuple[Array, tuple[Array, Array]]:
            keys = NO_KEYS if key is None else tuple(jax.random.split(jax.random.fold_in(key, number), len(LINEAR)))
            q, k, v = layer.project(x, angles, keys)
            k, v = k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)
            if at_BR is None or not self._flat or number < self.config.n_layers - 1:
                return layer.finish(x, attend_causally(q, KeyValues(k, v, seen)), keys), (k, v)
            own = KeyValues(k, v, pick(seen, at_BR))
            return layer.finish(pick(x, at_BR), attend_in_blocks(pick(q, at_BR), [own]), keys), (k, v)

        hidden, keys_and_values = self._through_layers(one_layer, hidden)
        if at_BR is not None and not self._flat:
            hidden = pick(hidden, at_BR)
        length = jnp.full(B, T) if length_B is None else length_B
        return self.norm(hidden), Prefix(*keys_and_values, length)

    def _through_layers(
        self, one_layer: Callable[..., tuple[Array, tuple[Array, Array]]], hidden: Array
    ) -> tuple[Array, tuple[tuple[Array, ...], tuple[Array, ...]]]:
        """The hidden states after all layers, and what each of them leaves behind."""
        if self._flat:
            left = []
            for number in range(self.config.n_layers):
                hidden, new = one_layer(self.layer(number), number, hidden)
                left.append(new)
            k, v = zip(*left, strict=True)
            return hidden, (k, v)
        graph, stacked = nnx.split(self.layers)

        def scanned(x: Array, inputs: Any) -> tuple[Array, tuple[Array, Array]]:
            return one_layer(nnx.merge(graph, inputs[0]), inputs[1], x)

        body = scanned if self.config.remat == "none" else jax.checkpoint(scanned, policy=self._keep)
        hidden, (k, v) = jax.lax.scan(body, hidden, (stacked, jnp.arange(self.config.n_layers)))
        return hidden, (tuple(k), tuple(v))

    def layer(self, number: int) -> Layer:
        """One of the layers."""
        if not self.config.stacked:
            return self.layers[number]
        graph, stacked = nnx.split(self.layers)
        return nnx.merge(graph, jax.tree.map(lambda weights: weights[number], stacked))

    def extend(
        self,
        tokens_BT: Int[Array, "B T"],
        valid_BT: Bool[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        shared: Sequence[Prefix],
        suffix: Suffix,
        slot: Int[Array, ""] | int,
        at_BR: Int[Array, "B R"] | None = None,
    ) -> tuple[Float[Array, "B T D"] | Float[Array, "B R D"], Suffix]:
        """Continues rows that share what is before them: B = P · R rows over P prefixes, with caches of their own.

        Token t of every row is written to cache slot `slot + t`; `valid_BT` is False at padding. Rows see their group's
        part of each of `shared`, which may be of several sizes P, and every valid slot up to their own. `at_BR` are the
        places among the T whose hidden states are wanted.
        """
        T, S = tokens_BT.shape[1], suffix.valid_BS.shape[1]
        hidden, angles = self._start(tokens_BT, positions_BT)
        valid_BS = jax.lax.dynamic_update_slice_in_dim(suffix.valid_BS, valid_BT, slot, axis=1)
        seen_TS = jnp.arange(S)[None] <= slot + jnp.arange(T)[:, None]
        own_mask = valid_BS[:, None] & seen_TS[None]
        masks = [(jnp.arange(part.k[0].shape[3])[None] < part.length_P[:, None])[:, None] for part in shared]
        k_new, v_new = [], []
        for i in range(self.config.n_layers):
            layer = self.layer(i)
            q, k, v = layer.project(hidden, angles)
            k = jax.lax.dynamic_update_slice_in_dim(suffix.k[i], k.transpose(0, 2, 3, 1), slot, axis=3)
            v = jax.lax.dynamic_update_slice_in_dim(suffix.v[i], v.swapaxes(1, 2), slot, axis=2)
            segments = [KeyValues(part.k[i], part.v[i], mask) for part, mask in zip(shared, masks, strict=True)]
            if at_BR is not None and i == self.config.n_layers - 1:
                hidden, q, own_mask = (pick(x, at_BR) for x in (hidden, q, own_mask))
            hidden = layer.finish(hidden, attend_in_blocks(q, [*segments, KeyValues(k, v, own_mask)]))
            k_new.append(k)
            v_new.append(v)
        return self.norm(hidden), Suffix(tuple(k_new), tuple(v_new), valid_BS)

    @property
    def _keep(self) -> Any:
        policies = jax.checkpoint_policies
        kept = policies.dots_with_no_batch_dims_saveable
        return kept if self.config.remat == "dots" else policies.nothing_saveable

    @property
    def _flat(self) -> bool:
        # A short stack compiles fast, and runs faster where each layer has a program of its own; a deep one is a loop.
        short = self.config.n_layers <= SHORT_STACK and self.config.remat == "none"
        return not self.config.stacked or short


def abstract(config: ModelConfig, lora: LoraSettings | None = None) -> tuple[nnx.GraphDef, Params, Params]:
    """The module's graph, and the shapes of its base weights and of its adapters; allocates neither."""
    model = nnx.eval_shape(lambda: Transformer(config, lora, rngs=nnx.Rngs(0)))
    graph, adapters, base = nnx.split(model, nnx.LoRAParam, ...)
    return graph, nnx.to_pure_dict(base), nnx.to_pure_dict(adapters)
