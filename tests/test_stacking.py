"""Weights to train and weights to run are the same model, and go from one form to the other without a second copy."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from itool_jax import config as settings
from itool_jax.model import hf, stacking
from itool_jax.model.sharding import MeshSettings, use_mesh
from itool_jax.model.transformer import ModelConfig, Params, abstract
from itool_jax.store.weights import Weights
from tests import tiny

TOKENS_BT = np.random.default_rng(0).integers(0, 250, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers, so that their numbers have two digits, with biases and an unembedding of its own."""
    changes = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": False}
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("deep"), num_hidden_layers=12, **changes)


def logits(config: ModelConfig, params: Params) -> np.ndarray:
    def run(params: Params, tokens_BT: jax.Array) -> jax.Array:
        model = nnx.merge(abstract(config)[0], params)
        return model.logits(model(tokens_BT)[0])

    return np.asarray(jax.jit(run)(params, TOKENS_BT))


def assert_equal(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("nf4", [False, True])
def test_both_forms_are_one_model(deep: Path, nf4: bool) -> None:
    config, stacked = hf.load(deep, nf4=nf4)
    running, single = hf.load(deep, nf4=nf4, stacked=False)
    assert running == dataclasses.replace(config, stacked=False)
    expected = logits(config, stacked)
    np.testing.assert_allclose(logits(running, single), expected, atol=1e-4 * expected.std())
    assert_equal(stacking.to_run(hf.load(deep, nf4=nf4)[1]), single)
    assert_equal(stacking.to_train(hf.load(deep, nf4=nf4, stacked=False)[1]), stacked)


@pytest.mark.parametrize("mesh", [MeshSettings(), MeshSettings(data=2, fsdp=2, tensor=2)], ids=["alone", "mesh"])
def test_a_model_is_never_there_twice(deep: Path, mesh: MeshSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every change of form, the bytes in memory after each leaf: two leaves more than the model at most."""
    seen: list[int] = []
    before = sum(x.nbytes for x in jax.live_arrays())
    compiled = stacking._compiled

    def spy(*arguments: Any) -> Any:
        def run(x: Any) -> Any:
            result = compiled(*arguments)(x)
            seen.append(sum(leaf.nbytes for leaf in jax.live_arrays()) - before)
            return result

        return run

    monkeypatch.setattr(stacking, "_compiled", spy)
    with use_mesh(mesh):
        params = hf.load(deep)[1]
        leaves = [leaf.nbytes for leaf in jax.tree.leaves(params)]
        for change in (stacking.to_run, stacking.to_train):
            given, params = params, {}
            params = change(given)
            assert given == {}
    assert len(seen) == 2 * 12  # twelve weights of a layer, there and back
    assert max(seen) <= sum(leaves) + 2 * max(leaves)


def test_a_run_holds_one_form_at_a_time(deep: Path) -> None:
    weights = Weights(settings.parse(["--stage=warmup", f"--model={deep}", "--data=none"]))

    def arrays(params: Params) -> set[int]:
        return {id(leaf) for leaf in jax.tree.leaves(params)}

    before = sum(x.nbytes for x in jax.live_arrays())
    stacked = weights.base(stacked=True)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(stacked))
    assert arrays(weights.base(stacked=True)) == arrays(stacked)  # read once
    single = weights.base(stacked=False)
    assert_equal(stacked, hf.load(deep)[1])  # what was handed out stays valid
    assert single["layers"].keys() == set(range(12))
    del stacked
    assert sum(x.nbytes for x in jax.live_arrays()) - before <= 1.1 * size
    assert_equal(weights.base(stacked=True), hf.load(deep)[1])


def test_weights_to_run_lie_by_heads_and_widths(deep: Path) -> None:
    """A mesh's fsdp is more of its tensor axis then, and rows are spread over data alone."""
    with use_mesh(MeshSettings(data=2, fsdp=2, tensor=2)):
        loaded = hf.load(deep, stacked=False)[1]
        for params in (loaded, stacking.to_run(hf.load(deep)[1])):
            layer = params["layers"][3]
            assert layer["q"]["kernel"].addressable_shards[0].data.shape == (32, 32 // 4)
            assert layer["o"]["kernel"].addressable_shards[0].data.shape == (32 // 4, 32)
            assert layer["q"]["bias"].addressable_shards[0].data.shape == (32 // 4,)
            assert params["embedding"].addressable_shards[0].data.shape == (tiny.VOCABULARY // 4, 32)
