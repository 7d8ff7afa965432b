"""The presets against the pages they stand for, value by value."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from itool_jax import config as settings
from itool_jax.config import Config, Recipe
from tests.conftest import REPOSITORY

METHOD = Path(os.environ.get("ITOOL_SHARED") or REPOSITORY.parent / "shared") / "METHOD.md"

PAPER: list[tuple[str, dict[str, Any]]] = [
    # 2 · Data
    ("The reinforcement target is an assistant turn that follows a user turn", {"samples.targets": "after_user"}),
    ("90 % warm-up, 10 % replay buffer [P]", {"replay.replay_fraction": 0.10}),
    # 3 · Warm-up
    ("Train easy, then medium, then hard, carrying the weights", {"warmup.order": "easy_to_hard"}),
    (
        "LoRA on all linear layers, r 16, α 32",
        {"lora.rank": 16, "lora.alpha": 32.0, "lora.targets": ["q", "k", "v", "o", "gate", "up", "down"]},
    ),
    ("lr 5e-5, weight decay 0.01 [P app. A]", {"warmup.learning_rate": 5e-5, "warmup.weight_decay": 0.01}),
    ("cosine with 10 % warm-up [R], one epoch a part [J]", {"warmup.warmup_ratio": 0.1, "warmup.epochs": 1}),
    ("The optimizer's schedule spans the three parts", {"warmup.schedule": "span"}),
    # 4 · Replay buffer
    ("takes the top α by perplexity (α = 0.20 [P])", {"replay.select": "perplexity", "replay.hardest_fraction": 0.2}),
    ("Every iteration re-scores the whole buffer", {"replay.pool": "buffer", "replay.skip_fraction": 0.0}),
    # 5 · Search
    ("`call` (default): one complete function call inside the list", {"search.granularity": "call"}),
    ("exploration = 1 [X]", {"search.exploration": 1.0}),
    ("λ = 1 by default [R], 0 is the paper's literal product", {"search.prior_exponent": 1.0}),
    ("W sampled steps (temperature 1 [X])", {"search.temperature": 1.0, "search.top_p": 1.0}),
    ("with `inject_gold` (default on [X]", {"search.inject_gold": "always"}),
    ("`R(s) = O(s) + C(s)`", {"self_eval.weight": 1.0}),
    ("whitespace and keyword order ignored), else −1", {"search.outcome": "binary"}),
    ("the model reads tools, query, the reference answer, then the candidate", {"self_eval.reference": "gold"}),
    ("`C = P(correct) / (P(correct) + P(incorrect))`", {"self_eval.scale": "binary"}),
    ("`self_eval.both_orders` averages both (off by default", {"self_eval.both_orders": False}),
    ("γ = 1. `value_weight: visits` (default, eq 9)", {"search.discount": 1.0, "search.value_weight": "visits"}),
    (
        "W 3, D 3 [R], 16 simulations [J], step limit 64 tokens, last step 512 [J]",
        {
            "search.breadth": 3,
            "search.max_depth": 3,
            "search.n_simulations": 16,
            "search.max_step_tokens": 64,
            "search.max_last_step_tokens": 512,
        },
    ),
    ("when the gap is at least 0.1 and the texts differ", {"pairs.min_q_gap": 0.1}),
    ("`gap`: the literal paper", {"pairs.require": "gap"}),
    # 6 · Preference optimisation
    ("| DPO | −log σ(βΔ) | β 0.1 |", {"preference.loss": "dpo", "preference.beta": 0.1}),
    ("margin 0.5 [R]", {"preference.margin": 0.5}),
    ("NLL over the response | λ 0.1 |", {"preference.orpo_lambda": 0.1}),
    ("max(0, logref_w − logπ_w))), λ 50", {"preference.dpop_lambda": 50.0}),
    ("An optional NLL term on the chosen step (`preference.sft_weight`)", {"preference.sft_weight": 0.0}),
    ("the policy as it stood when the iteration began [P, R]", {"preference.reference": "iteration"}),
    (
        "lr 5e-6 ([R]; the paper's 5e-5 in its preset), 2 epochs, global batch 8, cosine",
        {"preference.learning_rate": 5e-5, "preference.epochs": 2, "preference.batch_size": 8},
    ),
    ("Three iterations [P fig. 5]", {"iterations": 3}),
]
"""What sections 2 to 6 of the method say, in its words, and the settings that this is."""

TABLE: dict[str, Any] = {
    "pairs.require": "gap",
    "search.inject_gold": "always",
    "replay.select": "perplexity",
    "replay.pool": "buffer",
    "search.exploration": 1,
    "search.top_p": 1,
    "self_eval.weight": 1,
    "warmup.schedule": "span",
    "warmup.epochs": 1,
    "samples.targets": "after_user",
    "samples.test_share": 0,
    "samples.validation_share": 0,
    "samples.test_file": None,
    "samples.fraction": 1,
    "samples.limit": 0,
    "preference.reference": "iteration",
    "preference.merge": False,
    "preference.loss": "dpo",
}
"""The column paper_v1 of the table of new settings in section 10."""

UNSAID: dict[str, Any] = {
    "tool_format": "brackets",
    "tool_style": "schema",
    "samples.max_tools": 0,
    "adapter": None,
    "pairs.file": None,
    "warmup.batch_size": 16,
    "warmup.clip_norm": 1.0,
    "warmup.pack": 0,
    "lora.dropout": 0.0,
    "preference.weight_decay": 0.01,
    "preference.warmup_ratio": 0.1,
    "preference.clip_norm": 1.0,
    "preference.control": "none",
    "pairs.held_out": 0.0,
    "pairs.rejected": "whole",
}
"""Settings that the method leaves open; the preset holds on to what they were."""

NOT_OF_THE_PAPER = {
    *("model", "data", "dtype", "seed", "skip_bad_rows", "strict", "quantize", "deterministic"),
    *("generated.train", "generated.validation", "generated.test", "generated.writers"),
    *("warmup.max_epochs", "replay.samples", "replay.temperature"),  # of warmup.epochs=auto and replay.select=mixed
    "generate.max_tokens",
}
"""Settings of a run that its preset need not fix: what is trained on what, and what only measures or saves memory."""


def given(name: str) -> dict[str, Any]:
    return dict(settings._flatten(yaml.safe_load((REPOSITORY / f"configs/{name}.yaml").read_text())))


def resolved(names: str) -> dict[str, Any]:
    return settings.parse(["--stage=iterate", f"--config={names}"]).flat()


def expected() -> dict[str, Any]:
    return {name: value for _, values in PAPER for name, value in values.items()} | TABLE | UNSAID


def test_the_paper_has_the_values_of_the_method() -> None:
    preset = resolved("paper_v1")
    assert {name: preset[name] for name in expected()} == expected()


def test_the_paper_writes_out_every_value_so_that_defaults_cannot_change_it() -> None:
    assert expected().keys() - given("paper_v1").keys() == set()
    recipe = Config(stage="iterate").flat(Recipe).keys()
    assert recipe - expected().keys() == NOT_OF_THE_PAPER


@pytest.mark.skipif(not METHOD.exists(), reason="needs METHOD.md of the public data: set ITOOL_SHARED to its folder")
def test_the_method_says_so() -> None:
    page = " ".join(METHOD.read_text().split())
    assert [words for words, _ in PAPER if " ".join(words.split()) not in page] == []
    assert dict(table_rows(METHOD.read_text())) == TABLE


def table_rows(page: str) -> Iterator[tuple[str, Any]]:
    """Yields the settings of the table of section 10, each with its value for paper_v1, unless it has none there."""
    table = page[page.index("| setting | values | default | demo | paper_v1 |") : page.index("Also decided:")]
    for row in table.splitlines()[2:]:
        cells = re.split(r"\s*\|\s*", row.strip("| "))
        if len(cells) < 5 or cells[-1] == "–":
            continue
        names = re.findall(r"`([a-z_.]+)`", cells[0])
        section = names[0].split(".")[0]
        for name, value in zip(names, cells[-1].split(", "), strict=True):
            yield name if not name.startswith(".") else section + name, yaml.safe_load(value.replace("none", "null"))


OFFICIAL = {
    **{"replay.replay_fraction": 0.3, "replay.hardest_fraction": 0.3, "replay.select": "perplexity"},
    **{"search.breadth": 3, "search.max_depth": 3, "search.n_simulations": 5},
    **{"search.temperature": 1.5, "search.max_step_tokens": 50, "search.granularity": "argument"},
    **{"search.inject_gold": "never", "self_eval.scale": "four_grades", "pairs.min_q_gap": 0.1},
    **{"preference.loss": "simpo", "preference.beta": 2.5, "preference.margin": 0.5},
    **{"preference.learning_rate": 1e-6, "preference.epochs": 2, "preference.batch_size": 64},
    **{"lora.rank": 8, "lora.alpha": 16.0, "preference.merge": True},
    **{"iterations": 1, "preference.reference": "iteration"},
}
XIE = {
    **{"search.breadth": 2, "search.max_depth": 3, "search.n_simulations": 64},
    **{"search.temperature": 1.0, "search.max_step_tokens": 128, "search.granularity": "sentence"},
    **{"search.inject_gold": "always", "search.value_weight": "max1", "search.prior_exponent": 1.25},
    **{"preference.loss": "conservative_dpo", "preference.beta": 0.1},
    **{"lora.rank": 0, "preference.reference": "warmup"},
}


@pytest.mark.parametrize(("name", "values"), [("official_repo", OFFICIAL), ("xie2024", XIE)])
def test_the_presets_of_others_set_what_can_be_set(name: str, values: dict[str, Any]) -> None:
    assert given(name).items() >= values.items()
    preset = resolved(f"paper,{name}")
    assert {key: preset[key] for key in values} == values
    assert (preset["data"], preset["pairs.require"]) == ("hf:Team-ACE/ToolACE", "gap")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("official_repo", ["penalty of .75", "fixed seed", "equations 8", "-.3", "word overlap of at most .95"]),
        ("xie2024", ["+1.25", "final path only"]),
    ],
)
def test_the_presets_of_others_say_what_they_cannot_express(name: str, words: list[str]) -> None:
    lines = (REPOSITORY / f"configs/{name}.yaml").read_text().splitlines()
    header = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    assert [word for word in words if word not in header.partition("Not offered:")[2]] == []
