"""What the hardware allows: `python -m benchmarks.roofline` prints the table of docs/performance.md.

Counts operations and bytes of each kind of work from a model's shape, and takes the slower of computing and reading
memory; then the hours of the paper's whole recipe from these. Nothing here runs a model.
"""

import dataclasses
from typing import Annotated

import tyro

from benchmarks.memory import LLAMA
from itool_jax.mcts.search import SearchSettings
from itool_jax.model.transformer import ModelConfig

BYTES = 2  # of a weight or a cached number in bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What a device can do at most; the defaults are an H200 as measured."""

    bandwidth: float = 4.3e12
    """Bytes a second that its memory gives."""
    peak: float = 790e12
    """Operations a second in dense bfloat16 products."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Some work on a model: its operations, and the bytes that it must read."""

    flops: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        """The least time it takes."""
        return max(self.flops / machine.peak, self.bytes / machine.bandwidth)

    def __rmul__(self, times: float) -> "Work":
        return Work(flops=times * self.flops, bytes=times * self.bytes)


def layer_weights(c: ModelConfig) -> int:
    """Weights of the linear parts of all layers."""
    attention = c.hidden_size * c.head_dim * (2 * c.n_heads + 2 * c.n_kv_heads)
    return c.n_layers * (attention + 3 * c.hidden_size * c.intermediate_size)


def linear(c: ModelConfig, rows: int, length: int, logits: int) -> float:
    """Operations of the products with weights: two a weight and token, in the last layer where its outcome is wanted.

    The last layer has keys and values at all tokens, and the rest where logits are asked for.
    """
    keys_and_values = 2 * c.hidden_size * c.head_dim * c.n_kv_heads
    left_out = (layer_weights(c) // c.n_layers - keys_and_values) * (length - logits)
    return 2 * rows * (layer_weights(c) * length - left_out + c.hidden_size * c.vocab_size * logits)


def forward(c: ModelConfig, rows: int, length: int, logits: int = 0, before: int = 0) -> Work:
    """A causal pass over rows of `length` tokens behind `before` cached ones, with logits at the last `logits` of each.

    Attention takes 4 operations a query, key and dimension of a head: its score, and its share of the value.
    """
    seen = length * (before + (length + 1) / 2)
    seen_last = logits * (before + length - (logits - 1) / 2)
    attention = 4 * rows * c.n_heads * c.head_dim * ((c.n_layers - 1) * seen + seen_last)
    read = layer_weights(c) + (c.hidden_size * c.vocab_size if logits else 0)
    return Work(flops=linear(c, rows, length, logits) + attention, bytes=BYTES * read + cache_bytes(c, rows * before))


def decode(c: ModelConfig, rows: int, length: int, prompts: int | None = None, own: int = 0) -> Work:
    """A token for each of some rows: all weights are read, each prompt's cache once, and the rows' own caches."""
    prompts = rows if prompts is None else prompts
    step = forward(c, rows, 1, logits=1, before=length + own)
    caches = cache_bytes(c, prompts * length + rows * own)
    return Work(flops=step.flops, bytes=BYTES * (layer_weights(c) + c.hidden_size * c.vocab_size) + caches)


def cache_bytes(c: ModelConfig, tokens: int) -> float:
    """Keys and values of as many tokens."""
    return 2 * BYTES * c.n_layers * c.n_kv_heads * c.head_dim * tokens


def lora_step(c: ModelConfig, rows: int, length: int, logits: int, rank: int = 16) -> Work:
    """A training step of adapters: a pass forwards, and one back through activations but not to the frozen weights.

    Attention takes twice the operations backwards. What is computed again to save memory does not count.
    """
    once = forward(c, rows, length, logits)
    shapes = 2 * (c.hidden_size + c.n_heads * c.head_dim) + 2 * (c.hidden_size + c.n_kv_heads * c.head_dim)
    adapters = c.n_layers * rank * (shapes + 3 * (c.hidden_size + c.intermediate_size))
    flops = 2 * once.flops + (once.flops - linear(c, rows, length, logits)) + 6 * adapters * rows * length
    return Work(flops=flops, bytes=2 * once.bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The paper's experiment; its numbers, and where it gives none, what is assumed of the data."""

    samples: int = 11300
    warmup_share: float = 0.9
    hardest: int = 226
    """Prompts searched in an iteration."""
    iterations: int = 3
    prompt: int = 1024
    """Tokens of a prompt (assumed)."""
    target: int = 96
    """Tokens of a response (assumed)."""
    step: int = 48
    """Tokens of a sampled step (assumed; the limit is 64)."""
    states: int = 39
    """Evaluated states of a tree (a full tree of breadth and depth 3)."""
    question: int = 96
    """Tokens of a state and of the question about it (assumed)."""
    pairs: int = 5
    """Preference pairs of a tree (assumed)."""
    preference_epochs: int = 2
    batch: int = 64
    """Prompts searched together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """What of the least time's speed is reached."""

    decode: float = 0.60
    training: float = 0.45
    scoring: float = 0.55


def hours(c: ModelConfig, machine: Machine, r: Recipe, shares: Shares) -> dict[str, float]:
    """Hours of each stage of the recipe on one device."""
    n, whole, expansions = r.iterations, r.prompt + r.target, r.states / 3
    reached = {
        "warm-up": (lora_step(c, round(r.samples * r.warmup_share), whole, r.target), shares.training),
        "scores": (n * forward(c, round(r.samples * (1 - r.warmup_share)), whole, r.target), shares.scoring),
        "search, prompts": (2 * n * forward(c, r.hardest, r.prompt), shares.scoring),  # with the reference, and without
        "search, sampling": (
            n * r.hardest / r.batch * expansions * r.step * decode(c, 3 * r.batch, r.prompt, r.batch, r.step),
            shares.decode,
        ),
        "search, self-evaluation": (
            n * forward(c, r.hardest * r.states, r.question, logits=1, before=r.prompt),
            shares.scoring,
        ),
        "preferences": (
            n * r.preference_epochs * lora_step(c, r.hardest * r.pairs, r.prompt + 2 * r.step, 2 * r.step),
            shares.training,
        ),
    }
    found = {name: work.seconds(machine) / share / 3600 for name, (work, share) in reached.items()}
    return found | {"all": sum(found.values())}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is projected."""

    machine: Machine = dataclasses.field(default_factory=Machine)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    shares: Shares = dataclasses.field(default_factory=Shares)
    model: Annotated[ModelConfig, tyro.conf.Suppress] = LLAMA


def main(s: Settings) -> None:
    """Prints the limits and the hours."""
    c, m = s.model, s.machine
    search = SearchSettings()
    print(f"{'work':<44} {'limit':>10} unit      bound by")
    rows: list[tuple[str, Work, float, str]] = [
        (f"decode, batch {n}, {s.recipe.prompt} tokens before", decode(c, n, s.recipe.prompt), n, "tokens/s")
        for n in (1, 32, 128)
    ]
    shared = decode(c, search.breadth * search.batch, s.recipe.prompt, search.batch, search.step_limit)
    rows += [
        (f"decode, {search.batch} prompts x {search.breadth}", shared, search.breadth * search.batch, "tokens/s"),
        ("prefill, 8 x 2048", forward(c, 8, 2048), 8 * 2048, "tokens/s"),
        ("scoring, 8 x 2048, 512 targets", forward(c, 8, 2048, 512), 8 * 2048, "tokens/s"),
        ("LoRA SFT, 8 x 2048, 512 targets", lora_step(c, 8, 2048, 512), 8 * 2048, "tokens/s"),
        ("LoRA DPO, 4 pairs, 2048 + 2 x 64", lora_step(c, 4, 2176, 128), 4, "pairs/s"),
    ]
    for name, work, amount, unit in rows:
        bound = "compute" if work.flops / m.peak > work.bytes / m.bandwidth else "memory"
        print(f"{name:<44} {amount / work.seconds(m):10.5g} {unit:<9} {bound}")
    print()
    for name, value in hours(c, m, s.recipe, s.shares).items():
        print(f"{name:<44} {value:10.3f} hours")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
