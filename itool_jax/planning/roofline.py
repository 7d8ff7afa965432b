"""Computes the operations and bytes of each kind of work from a model's shape, and the least time they take.

In: a model's configuration, rows and lengths, and a machine. Out: a lower bound in seconds: the longer of computing and
reading memory. Nothing here runs a model.
"""

import dataclasses

from itool_jax.model.linear import LINEAR
from itool_jax.model.transformer import ModelConfig

BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of a weight or a cached number, by the model's dtype."""
NF4_BYTES = 0.516
"""Bytes of a four-bit weight, including its share of the scales."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Peak rates of a device; the defaults are measured on an H200."""

    bandwidth: float = 4.3e12
    """Memory bandwidth, in bytes per second."""
    peak: float = 790e12
    """Peak of dense bfloat16 matrix products, in operations per second."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Work on a model: its operations, and the bytes that it must read."""

    flops: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        """Returns the least time the work takes."""
        return max(self.flops / machine.peak, self.bytes / machine.bandwidth)

    def __rmul__(self, times: float) -> "Work":
        return Work(flops=times * self.flops, bytes=times * self.bytes)


def layer_weights(c: ModelConfig) -> int:
    """Counts the weights of the linear parts of all layers."""
    attention = c.hidden_size * c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads)
    return c.n_layers * (attention + 3 * c.hidden_size * c.intermediate_size)


def linear(c: ModelConfig, rows: int, length: int, logits: int) -> float:
    """Counts the operations of products with weights: two per weight and token.

    The last layer computes keys and values of all tokens, and the rest only where logits are wanted.
    """
    keys_and_values = 2 * c.hidden_size * c.head_dim * c.n_kv_heads
    left_out = (layer_weights(c) // c.n_layers - keys_and_values) * (length - logits)
    return 2 * rows * (layer_weights(c) * length - left_out + c.hidden_size * c.vocab_size * logits)


def forward(c: ModelConfig, rows: int, length: int, logits: int = 0, before: int = 0) -> Work:
    """Counts a causal pass over rows of `length` tokens after `before` cached ones, with logits at the last `logits`.

    Attention takes 4 operations per query, key and head dimension: for the score, and for its share of the value.
    """
    seen = length * (before + (length + 1) / 2)
    seen_last = logits * (before + length - (logits - 1) / 2)
    attention = 4 * rows * c.n_heads * c.head_dim * ((c.n_layers - 1) * seen + seen_last)
    flops = linear(c, rows, length, logits) + attention
    return Work(flops=flops, bytes=weight_bytes(c, logits > 0) + cache_bytes(c, rows * before))


def decode(c: ModelConfig, rows: int, length: int, prompts: int | None = None, own: int = 0) -> Work:
    """Counts decoding one token per row: reads all weights, each prompt's cache once, and the rows' own caches."""
    prompts = rows if prompts is None else prompts
    step = forward(c, rows, 1, logits=1, before=length + own)
    return Work(flops=step.flops, bytes=weight_bytes(c) + cache_bytes(c, prompts * length + rows * own))


def weight_bytes(c: ModelConfig, logits: bool = True) -> float:
    """Returns the bytes of weights read in a pass: the layers, and the unembedding if there are logits."""
    a_weight = NF4_BYTES if c.nf4 else BYTES[c.dtype]
    return a_weight * layer_weights(c) + BYTES[c.dtype] * c.hidden_size * c.vocab_size * logits


def cache_bytes(c: ModelConfig, tokens: int) -> float:
    """Returns the bytes of the keys and values of `tokens` tokens."""
    return 2 * BYTES[c.dtype] * c.n_layers * c.n_kv_heads * c.head_dim * tokens


def adapter_weights(c: ModelConfig, rank: int, targets: tuple[str, ...] = LINEAR) -> int:
    """Counts the adapter weights of all layers."""
    width, kv_width = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    shapes = {"q": c.hidden_size + width, "k": c.hidden_size + kv_width, "v": c.hidden_size + kv_width}
    shapes |= {"o": width + c.hidden_size, **dict.fromkeys(("gate", "up", "down"), c.hidden_size + c.intermediate_size)}
    return c.n_layers * rank * sum(shapes[name] for name in targets)


def lora_step(c: ModelConfig, rows: int, length: int, logits: int, rank: int = 16) -> Work:
    """Counts a training step of adapters: a forward pass, and a backward pass that skips the frozen weights' gradients.

    Attention takes twice the operations in the backward pass. Recomputation to save memory does not count.
    """
    once = forward(c, rows, length, logits)
    flops = 2 * once.flops + (once.flops - linear(c, rows, length, logits))
    return Work(flops=flops + 6 * adapter_weights(c, rank) * rows * length, bytes=2 * once.bytes)


def full_step(c: ModelConfig, rows: int, length: int, logits: int) -> Work:
    """Counts a training step of all weights: as one of adapters, plus a product for the gradient of each weight."""
    once = forward(c, rows, length, logits)
    return Work(flops=3 * once.flops, bytes=3 * once.bytes)
