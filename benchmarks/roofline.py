"""Prints what the hardware allows, the table of docs/performance.md: `python -m benchmarks.roofline`.

Computes the limits of an 8B model, and the hours of the paper's whole recipe, from the operations and bytes of each
kind of work (`itool_jax.planning.roofline`). Nothing here runs a model.
"""

import dataclasses
from typing import Annotated

import tyro

from benchmarks.memory import LLAMA
from itool_jax.mcts.search import SearchSettings
from itool_jax.model.transformer import ModelConfig
from itool_jax.planning.roofline import Machine, Work, decode, forward, lora_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The paper's experiment, with assumptions about the data where the paper gives no numbers."""

    samples: int = 11300
    warmup_share: float = 0.9
    hardest: int = 226
    """Prompts searched per iteration."""
    iterations: int = 3
    prompt: int = 1024
    """Tokens per prompt (assumed)."""
    target: int = 96
    """Tokens per response (assumed)."""
    step: int = 48
    """Tokens per sampled step (assumed; the limit is 64)."""
    states: int = 39
    """Evaluated states per tree (a full tree of breadth and depth 3)."""
    question: int = 96
    """Tokens of a state and of the question about it (assumed)."""
    pairs: int = 5
    """Preference pairs per tree (assumed)."""
    preference_epochs: int = 2
    batch: int = 64
    """Prompts searched together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shares:
    """Shares of the hardware's maximum speed that are reached."""

    decode: float = 0.60
    training: float = 0.45
    scoring: float = 0.55


def hours(c: ModelConfig, machine: Machine, r: Recipe, shares: Shares) -> dict[str, float]:
    """Returns the hours of each stage of the recipe on one device."""
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
    by_part = {name: work.seconds(machine) / share / 3600 for name, (work, share) in reached.items()}
    return by_part | {"all": sum(by_part.values())}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Inputs of the projection."""

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
    shared = decode(c, search.breadth * search.batch, s.recipe.prompt, search.batch, search.max_step_tokens)
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
