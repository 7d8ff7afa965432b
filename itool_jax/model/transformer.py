"""Implements the decoder-only transformer of the Llama and Qwen families as one Flax NNX module.

In: token ids, positions and, when decoding, the caches of earlier tokens (see `model.cache`).
Out: the last hidden state of every token and the updated cache. For training, layers are stacked along a leading axis
and computed by a scan; for running, each layer has separate arrays (see `model.stacking`). The module is
split once into `(graph, params)`; compiled functions take the plain dictionary
`params` and merge the two inside (`nnx.merge(graph, params)`, or `nnx.merge(graph, base, adapters)`).
"""

import dataclasses
import functools
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
"""Recomputation in the backward pass: nothing, each whole layer, or all of a layer except its matrix products."""
SHORT_STACK = 8


class RopeScaling(NamedTuple):
    """Llama 3.1's frequency-dependent stretch of the rotary embedding (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class LinearScaling(NamedTuple):
    """Positions divided by a factor (`rope_type: linear`, arXiv 2306.15595)."""

    factor: float


class YarnScaling(NamedTuple):
    """YaRN's stretch of slow dimensions, and its factor on queries and keys (`rope_type: yarn`, arXiv 2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    """Dimensions with at least this many turns in the original context keep their frequency."""
    beta_slow: float = 1.0
    """Dimensions with at most this many turns are slowed down by the factor."""
    attention_factor: float = 1.0


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
    rope_scaling: RopeScaling | LinearScaling | YarnScaling | None = None
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool = False
    """Normalise queries and keys per head before rotation, as in Qwen3."""
    max_length: int
    dtype: str = "float32"
    """Data type of the matrix products; norms, softmax and losses are always float32."""
    nf4: bool = False
    """Store the layers' kernels as NF4 codes."""
    stacked: bool = True
    """Stack the layers' weights along a leading axis, for training; else keep each layer separate, for running."""
    remat: Remat = "none"


class RmsNorm(nnx.Module):
    """x / rms(x) · scale, in float32."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        """Normalises `x` of any leading shape; returns the type of `x`."""
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...].astype(jnp.float32)).astype(x.dtype)


def rope_frequencies(config: ModelConfig) -> Float[Array, " half"]:
    """Computes the angle (radians) per position of each pair of head dimensions, stretched if the config says so.

    Uses float64 until the end, since these are compile-time constants whose error would grow with the position.
    """
    half = config.head_dim // 2
    frequencies = config.rope_theta ** (-np.arange(half) / half)
    if (scaling := config.rope_scaling) is not None:
        frequencies = frequencies * slowdown(frequencies, scaling)
    return jnp.asarray(frequencies, jnp.float32)


def slowdown(frequencies: np.ndarray, scaling: RopeScaling | LinearScaling | YarnScaling) -> np.ndarray:
    """Computes what to multiply frequencies (radians per position) by: 1 for fast ones, 1 / factor for slow ones."""
    if isinstance(scaling, LinearScaling):
        return np.full_like(frequencies, 1 / scaling.factor)
    if isinstance(scaling, YarnScaling):

        def dimension(turns: float) -> float:
            """Returns the index of the frequency with so many turns in the original context."""
            return np.log(scaling.original_max_position_embeddings / (turns * 2 * np.pi)) / -np.log(frequencies[1])

        low = max(np.floor(dimension(scaling.beta_fast)), 0)
        high = min(np.ceil(dimension(scaling.beta_slow)), 2 * len(frequencies) - 1)
        slow = np.clip((np.arange(len(frequencies)) - low) / (high - low if high != low else 1e-3), 0.0, 1.0)
        return slow / scaling.factor + (1 - slow)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return smooth + (1 - smooth) / scaling.factor


def rotate(x_BTHD: Array, angles_BTF: Array, factor: float = 1.0) -> Array:
    """Applies the rotary position embedding, times a factor, in the half-split layout of Hugging Face checkpoints."""
    cos, sin = jnp.cos(angles_BTF)[:, :, None] * factor, jnp.sin(angles_BTF)[:, :, None] * factor
    first, second = jnp.split(x_BTHD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHD.dtype)


Keys = Sequence[Array | None]
NO_KEYS: Keys = (None,) * len(LINEAR)
"""Random keys for the dropout of a layer's linear parts."""
_LayerOutput = tuple[Array, tuple[Array, Array]]
"""Hidden states, and the layer's keys and values in cache layout."""
_StackOutput = tuple[Array, tuple[Array, ...], tuple[Array, ...]]
"""Hidden states after all layers, keys of each layer, values of each layer."""


class Layer(nnx.Module):
    """A pre-norm layer of attention and gated MLP, each added to the residual stream."""

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
        self.head_dim, self.running = c.head_dim, not c.stacked
        self.rope_factor = c.rope_scaling.attention_factor if isinstance(c.rope_scaling, YarnScaling) else 1.0

    def __call__(
        self,
        x_BTD: Array,
        angles_BTF: Array,
        mask_BTK: Array,
        only_causal: bool,
        keys: Keys = NO_KEYS,
        at_BR: Array | None = None,
    ) -> _LayerOutput:
        """Runs the layer over whole rows; returns its output (only at `at_BR` if given), keys and values."""
        q_BTHD, k_BHDK, v_BHKD = self.project(x_BTD, angles_BTF, keys)
        if at_BR is None:
            own = KeyValues(k_BHDK, v_BHKD, mask_BTK)
            attended_BTD = attend_causally(q_BTHD, own, only_causal=only_causal, running=self.running)
        else:
            x_BTD, q_BTHD, mask_BTK = (pick(x, at_BR) for x in (x_BTD, q_BTHD, mask_BTK))
            attended_BTD = attend_in_blocks(q_BTHD, [KeyValues(k_BHDK, v_BHKD, mask_BTK)])
        return self.finish(x_BTD, attended_BTD, keys), (k_BHDK, v_BHKD)

    def extend(
        self,
        x_BTD: Array,
        angles_BTF: Array,
        shared: list[KeyValues],
        own: KeyValues,
        slot: Array | int,
        at_BR: Array | None = None,
    ) -> _LayerOutput:
        """Runs the layer over new tokens and writes them to the rows' cache `own` from `slot` on; returns as a call."""
        q_BTHD, k_new, v_new = self.project(x_BTD, angles_BTF)
        k_BHDS = jax.lax.dynamic_update_slice_in_dim(own.k_BHDK, k_new, slot, axis=3)
        v_BHSD = jax.lax.dynamic_update_slice_in_dim(own.v_BHKD, v_new, slot, axis=2)
        mask_BTS = own.mask_BTK
        if at_BR is not None:
            x_BTD, q_BTHD, mask_BTS = (pick(x, at_BR) for x in (x_BTD, q_BTHD, mask_BTS))
        attended_BTD = attend_in_blocks(q_BTHD, [*shared, KeyValues(k_BHDS, v_BHSD, mask_BTS)])
        return self.finish(x_BTD, attended_BTD), (k_BHDS, v_BHSD)

    def project(self, x_BTD: Array, angles_BTF: Array, keys: Keys = NO_KEYS) -> tuple[Array, Array, Array]:
        """Computes queries [B, T, H, D] and, in cache layout, keys [B, H, D, T] and values [B, H, T, D]."""
        h = self.attention_norm(x_BTD)
        projections = zip((self.q, self.k, self.v), keys[:3], strict=True)
        q, k, v = (f(h, key).reshape(*h.shape[:2], -1, self.head_dim) for f, key in projections)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(x, angles_BTF, self.rope_factor) for x in (q, k))
        return q, k.transpose(0, 2, 3, 1), v.swapaxes(1, 2)

    def finish(self, x_BTD: Array, attended_BTD: Array, keys: Keys = NO_KEYS) -> Array:
        """Adds the projected attention and the MLP to the residual stream `x_BTD`."""
        x = x_BTD + self.o(attended_BTD, keys[3])
        h = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(h, keys[4])) * self.up(h, keys[5]), keys[6])


class Transformer(nnx.Module):
    """Embedding, layers, final norm, and an unembedding that may be tied to the embedding."""

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
        """Returns the output matrix in `config.dtype`."""
        kernel = self.embedding[...].T if self.lm_head is None else self.lm_head[...]
        return kernel.astype(self.config.dtype)

    def logits(self, hidden: Array) -> Array:
        """Computes float32 logits of hidden states of any leading shape."""
        return jnp.matmul(hidden, self.unembedding(), preferred_element_type=jnp.float32)

    def _embed(self, tokens_BT: Array, positions_BT: Array) -> tuple[Array, Array]:
        """Returns the tokens' embeddings and the rotary angles of their positions."""
        # Gather the table's rows to full width before the lookup: XLA reshards poorly from split vectors to rows.
        embedding = constrain_axes(self.embedding[...], "tensor")
        hidden_BTD = embedding[tokens_BT].astype(self.config.dtype)
        hidden_BTD = constrain_axes(hidden_BTD, ROWS if self.config.stacked else "data")
        return hidden_BTD, positions_BT[..., None].astype(jnp.float32) * rope_frequencies(self.config)

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        length_B: Int[Array, " B"] | None = None,
        branch_BT: Int[Array, "B T"] | None = None,
        segment_BT: Int[Array, "B T"] | None = None,
        key: Array | None = None,
        at_BR: Int[Array, "B R"] | None = None,
    ) -> tuple[Float[Array, "B T D"] | Float[Array, "B R D"], Prefix]:
        """Runs right-padded rows causally; returns hidden states, and keys and values as a `Prefix`.

        Args:
            tokens_BT: right-padded; causality hides the padding.
            length_B: the rows' lengths, used only in the returned prefix.
            branch_BT: a token sees, and its position counts, only earlier tokens of branch 0 and of its own branch.
            segment_BT: a token sees only earlier tokens of its own segment, which acts as a separate row.
            key: turns on the adapters' dropout.
            at_BR: positions whose hidden states to return, all if None; saves logits and most of the last layer.
        """
        B, T = tokens_BT.shape
        mask_BTK, positions_BT = _mask_and_positions(B, T, branch_BT, segment_BT)
        only_causal = branch_BT is None and segment_BT is None
        hidden, angles_BTF = self._embed(tokens_BT, positions_BT)

        def run(layer: Layer, number: Array | int, x_BTD: Array, wanted_BR: Array | None) -> _LayerOutput:
            return layer(x_BTD, angles_BTF, mask_BTK, only_causal, _dropout_keys(key, number), wanted_BR)

        if self._is_scanned:
            hidden, k, v = self._scan(run, hidden)
            hidden = hidden if at_BR is None else pick(hidden, at_BR)
        else:
            hidden, k, v = self._unroll(run, hidden, at_BR, range(self.config.n_layers))
        return self.norm(hidden), Prefix(k, v, jnp.full(B, T) if length_B is None else length_B)

    @property
    def _is_scanned(self) -> bool:
        # A short stack compiles fast and runs faster unrolled; a deep one is a loop.
        return self.config.stacked and (self.config.n_layers > SHORT_STACK or self.config.remat != "none")

    def _unroll(
        self, run: Callable[..., _LayerOutput], hidden: Array, at_BR: Array | None, inputs: Sequence[Any]
    ) -> _StackOutput:
        """Runs the layers one after the other, the last one only at the wanted positions; `run` gets each its input.

        All layers but the last have the same shapes, so they are traced once, as a function that XLA inlines.
        """

        @functools.partial(jax.jit, static_argnums=0)
        def run_layer(
            graph: nnx.GraphDef, weights: Any, own: Any, x_BTD: Array, wanted_BR: Array | None
        ) -> _LayerOutput:
            return run(nnx.merge(graph, weights), own, x_BTD, wanted_BR)

        keys_and_values = []
        for number, own in enumerate(inputs):
            is_last = number == self.config.n_layers - 1
            hidden, kv = run_layer(*nnx.split(self.layer(number)), own, hidden, at_BR if is_last else None)
            keys_and_values.append(kv)
        k, v = zip(*keys_and_values, strict=True)
        return hidden, k, v

    def _scan(self, run: Callable[..., _LayerOutput], hidden: Array) -> _StackOutput:
        """Runs the layers as one compiled loop over their stacked weights."""
        graph, stacked = nnx.split(self.layers)

        def body(x_BTD: Array, inputs: tuple[Any, Array]) -> _LayerOutput:
            weights, number = inputs
            return run(nnx.merge(graph, weights), number, x_BTD, None)

        numbered = (stacked, jnp.arange(self.config.n_layers))
        hidden, (k, v) = jax.lax.scan(_rematerialize(body, self.config.remat), hidden, numbered)
        return hidden, tuple(k), tuple(v)

    def layer(self, number: int) -> Layer:
        """Returns layer `number`."""
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
        """Extends rows by tokens that see the rows' own caches and the shared prefixes.

        Args:
            tokens_BT: the new tokens; token t of every row goes to cache slot `slot + t`.
            valid_BT: False at padding.
            positions_BT: positions of the tokens, for the rotary embedding.
            shared: prefixes, each of some P with B = P · R, that groups of R rows see in full length.
            suffix: the rows' own caches; a token sees the valid slots up to its own.
            slot: the first slot to write.
            at_BR: indices into T whose hidden states to return, all if None.

        Returns:
            hidden states of the tokens, and the updated caches of the rows.
        """
        T, S = tokens_BT.shape[1], suffix.valid_BS.shape[1]
        hidden, angles_BTF = self._embed(tokens_BT, positions_BT)
        # Tokens see all shared tokens, and the valid tokens of their own row up to themselves.
        shared_masks = [(jnp.arange(part.k[0].shape[3]) < part.length_P[:, None])[:, None] for part in shared]
        valid_BS = jax.lax.dynamic_update_slice_in_dim(suffix.valid_BS, valid_BT, slot, axis=1)
        own_mask_BTS = valid_BS[:, None] & (jnp.arange(S) <= slot + jnp.arange(T)[:, None])

        def run(layer: Layer, caches: list[tuple[Array, Array]], x_BTD: Array, wanted_BR: Array | None) -> _LayerOutput:
            masks = [*shared_masks, own_mask_BTS]
            *parts, own = [KeyValues(k, v, mask) for (k, v), mask in zip(caches, masks, strict=True)]
            return layer.extend(x_BTD, angles_BTF, parts, own, slot, wanted_BR)

        caches = [
            [(cache.k[number], cache.v[number]) for cache in (*shared, suffix)]
            for number in range(self.config.n_layers)
        ]
        hidden, k, v = self._unroll(run, hidden, at_BR, caches)
        return self.norm(hidden), Suffix(k, v, valid_BS)


def _mask_and_positions(B: int, T: int, branch_BT: Array | None, segment_BT: Array | None) -> tuple[Array, Array]:
    """Computes the mask of tokens that each token sees [B, T, K], and its position among them [B, T]."""
    mask_BTK = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
    if branch_BT is None and segment_BT is None:
        return mask_BTK, jnp.broadcast_to(jnp.arange(T), (B, T))
    if branch_BT is not None:
        mask_BTK &= (branch_BT[:, None] == 0) | (branch_BT[:, None] == branch_BT[:, :, None])
    if segment_BT is not None:
        mask_BTK &= segment_BT[:, None] == segment_BT[:, :, None]
    return mask_BTK, mask_BTK.sum(axis=-1) - 1


def _dropout_keys(key: Array | None, number: Array | int) -> Keys:
    """Derives a key for each linear part of layer `number`; all None if `key` is None."""
    return NO_KEYS if key is None else tuple(jax.random.split(jax.random.fold_in(key, number), len(LINEAR)))


def _rematerialize(function: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """Makes the backward pass recompute the function's intermediate values according to `remat`."""
    if remat == "none":
        return function
    policies = jax.checkpoint_policies
    saved = {"layers": policies.nothing_saveable, "dots": policies.dots_with_no_batch_dims_saveable}
    return jax.checkpoint(function, policy=saved[remat])


def abstract(config: ModelConfig, lora: LoraSettings | None = None) -> tuple[nnx.GraphDef, Params, Params]:
    """Returns the module's graph, and the shapes of its base weights and adapters, without allocating them."""
    first = config if config.stacked else dataclasses.replace(config, n_layers=1)
    model = nnx.eval_shape(lambda: Transformer(first, lora, rngs=nnx.Rngs(0)))
    if not config.stacked:  # copies of a layer: tracing each layer's random weights takes seconds
        model.config = config
        model.layers = nnx.List(nnx.clone(model.layers[0]) for _ in range(config.n_layers))
    graph, adapters, base = nnx.split(model, nnx.LoRAParam, ...)
    return graph, nnx.to_pure_dict(base), nnx.to_pure_dict(adapters)
