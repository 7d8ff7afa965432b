"""The loop learns: search and DPO teach a model which of two answers is right, or the wrong one if pairs are swapped.

The model is made by hand. After a prompt it writes `[f()]` or `[g()]`, about as often, whichever the prompt's letters
favour by chance; only `[f()]` is ever right.
"""

import random
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from itool_jax.main import main
from itool_jax.model import export
from itool_jax.text.chat import load_tokenizer
from tests import tiny
from tests.conftest import read, write

pytestmark = pytest.mark.usefixtures("restored_jax_settings")

RIGHT = "[f()]"
CHAIN = [("<|assistant|>", "["), ("[", "f"), ("[", "g"), ("f", "("), ("g", "("), ("(", ")]"), (")]", "<|end|>")]
"""Tokens, and one that often follows each."""


def undecided_model(folder: Path) -> Path:
    """Writes a model folder whose next token depends on the last one as in `CHAIN`, and a little on the prompt."""
    tiny.save_tokenizer(folder)
    tokenizer = load_tokenizer(str(folder))
    changes = {"num_hidden_layers": 1, "tie_word_embeddings": False}
    params = jax.tree.map(np.array, tiny.random_params(tiny.model_config(folder, **changes)))
    params["embedding"] *= 0.1
    params["lm_head"] *= 0.02
    params["norm"]["scale"][:] = 1.0
    for name in ("o", "down"):
        params["layers"][name]["kernel"] *= 0.1
    ids = {token: tokenizer.encode(token, add_special_tokens=False)[0] for pair in CHAIN for token in pair}
    for dimension, token in enumerate(dict(CHAIN)):
        params["embedding"][ids[token]] = np.eye(tiny.RAW_CONFIG["hidden_size"])[dimension]
        for follower in (after for before, after in CHAIN if before == token):
            params["lm_head"][dimension, ids[follower]] = 2.0
    export.save(folder, params, tiny.raw_config(**changes))
    return folder


def run(stage: str, folder: Path, *changes: str) -> None:
    settings = [
        *(f"--model={folder.parent / 'model'}", f"--data={folder.parent / 'data.jsonl'}", "--lora.rank=0"),
        *("--warmup.learning_rate=1e-12", "--warmup.batch_size=32", "--replay.replay_fraction=0.5"),  # teaches nothing
        *("--replay.hardest_fraction=1", "--search.breadth=2", "--search.n_simulations=4", "--search.max_depth=2"),
        *("--pairs.require=gap", "--pairs.held_out=0", "--search.exploration=1"),  # swapped pairs are trained on too
        *("--search.max_step_tokens=6", "--search.max_last_step_tokens=6", "--generate.max_tokens=6"),
        *("--preference.learning_rate=1e-3", "--preference.epochs=2", "--evaluate.limit=0"),
    ]
    assert main([f"--stage={stage}", f"--run_dir={folder}", *settings, *changes]) == 0


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to its pairs."""
    folder = tmp_path_factory.mktemp("learning")
    undecided_model(folder / "model")
    letters = random.Random(0)
    questions = ["".join(letters.choices("abcdefgh", k=12)) for _ in range(100)]
    write(
        folder / "data.jsonl",
        [
            {"id": question, "messages": [{"role": "user", "content": question}], "tools": [], "target": RIGHT}
            for question in questions
        ],
    )
    for stage in ("warmup", "score", "search"):
        run(stage, folder / "run")
    return folder / "run"


def swapped(pair: dict[str, Any]) -> dict[str, Any]:
    """The pair with all that is said of its two sides exchanged."""
    other = {"chosen": "rejected", "rejected": "chosen"}
    sides = {name: side for name in pair for side in other if side in name and name.replace(side, other[side]) in pair}
    return pair | {name: pair[name.replace(side, other[side])] for name, side in sides.items()}


@pytest.mark.parametrize("is_swapped", [False, True], ids=["as searched", "swapped"])
def test_the_policy_learns_what_the_pairs_prefer(searched: Path, is_swapped: bool):
    folder = searched.with_name(f"swapped_{is_swapped}")
    shutil.copytree(searched, folder)
    if is_swapped:
        pairs = folder / "iteration_1/pairs.jsonl"
        write(pairs, map(swapped, read(pairs)))
    run("dpo", folder)
    run("evaluate", folder)
    before, after = (
        np.mean([row["correct"] for row in read(folder / phase / "evaluation_test_all.jsonl")])
        for phase in ("warmup", "iteration_1")
    )
    assert 0.2 < before < 0.8
    assert after < 0.1 if is_swapped else after > 0.9
