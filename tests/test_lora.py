"""Adapters: nothing at first, the same folded in or apart, on all linear layers, alone in the gradient."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from itool_jax.model.linear import Linear, LoraSettings
from itool_jax.model.lora import beside, initialize_adapters, merge_adapters
from itool_jax.model.transformer import ModelConfig, Params, abstract
from tests import tiny

LORA = LoraSettings(rank=8, alpha=16.0)
TOKENS_BT = jnp.asarray(np.random.default_rng(0).integers(0, tiny.VOCABULARY, (2, 9)), jnp.int32)
LINEAR = {  # size in and out, of a Llama of width 32, four heads of 8 over two, and an MLP of 48
    "q": (32, 32),
    "k": (32, 16),
    "v": (32, 16),
    "o": (32, 32),
    "gate": (32, 48),
    "up": (32, 48),
    "down": (48, 32),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    # Nine layers are a loop, which compiles faster than two in a row.
    return tiny.model_config(tmp_path_factory.mktemp("lora"), num_hidden_layers=9)


@pytest.fixture(scope="module")
def base(config: ModelConfig) -> Params:
    return tiny.random_params(config)


@pytest.fixture(scope="module")
def fresh(config: ModelConfig) -> Params:
    return initialize_adapters(config, LORA, jax.random.key(0))


@pytest.fixture(scope="module")
def trained(fresh: Params) -> Params:
    """Adapters as training leaves them: no part is zero."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.2 * random.normal(size=x.shape).astype(np.float32), fresh)


def logits(config: ModelConfig, base: Params, adapters: Params | None = None, lora: LoraSettings = LORA) -> jax.Array:
    graph, _, _ = abstract(config, lora if adapters else None)

    @jax.jit
    def run(*parts: Params) -> jax.Array:
        model = nnx.merge(graph, *parts)
        return model.logits(model(TOKENS_BT)[0])

    return run(base, adapters) if adapters else run(base)


def test_all_linear_layers_are_adapted(config: ModelConfig, fresh: Params) -> None:
    assert set(fresh) == {"layers"}
    assert set(fresh["layers"]) == set(LINEAR)
    for name, (n_in, n_out) in LINEAR.items():
        assert set(fresh["layers"][name]) == {"lora_a", "lora_b"}
        assert fresh["layers"][name]["lora_a"].shape == (config.n_layers, n_in, LORA.rank)
        assert fresh["layers"][name]["lora_b"].shape == (config.n_layers, LORA.rank, n_out)
    _, shapes, adapter_shapes = abstract(config, LORA)
    assert jax.tree.structure(adapter_shapes) == jax.tree.structure(fresh)
    assert jax.tree.structure(shapes) == jax.tree.structure(abstract(config)[1])


def test_a_starts_as_peft_starts_it(config: ModelConfig) -> None:
    wide = initialize_adapters(config, LORA, jax.random.key(0))
    for name, (n_in, _) in LINEAR.items():
        a, b = wide["layers"][name]["lora_a"], wide["layers"][name]["lora_b"]
        assert a.dtype == b.dtype == jnp.float32
        assert not b.any()
        # Kaiming-uniform with a = sqrt(5): uniform within 1 / sqrt(n_in).
        assert 0.95 < float(jnp.abs(a).max()) * n_in**0.5 <= 1
        assert float(a.std()) * n_in**0.5 == pytest.approx(3**-0.5, rel=0.1)
    starts = [a for name in ("q", "k", "gate") for a in wide["layers"][name]["lora_a"]]
    assert len({np.asarray(a[:8, :8]).tobytes() for a in starts}) == 3 * config.n_layers


def copied(params: Params) -> Params:
    """The same arrays in a tree of its own, for `merge_adapters` to change."""
    return jax.tree.map(lambda x: x, params)


def test_only_the_targets_are_adapted(config: ModelConfig, base: Params) -> None:
    some = dataclasses.replace(LORA, targets=("q", "down"))
    fresh = initialize_adapters(config, some, jax.random.key(0))
    assert set(fresh["layers"]) == {"q", "down"}
    trained = jax.tree.map(lambda x: x + 0.1, fresh)
    merged = logits(config, merge_adapters(copied(base), trained, some))
    np.testing.assert_allclose(logits(config, base, trained, some), merged, rtol=0, atol=1e-4)


def test_base_and_adapters_run_as_one_tree_too(config: ModelConfig, base: Params, trained: Params) -> None:
    graph = abstract(config, LORA)[0]
    together = jax.jit(lambda params: (m := nnx.merge(graph, params)).logits(m(TOKENS_BT)[0]))(beside(base, trained))
    np.testing.assert_array_equal(together, logits(config, base, trained))


def test_adapters_depend_on_the_key_alone(config: ModelConfig, fresh: Params) -> None:
    again, other = (initialize_adapters(config, LORA, jax.random.key(seed)) for seed in (0, 1))
    a, b, c = (np.asarray(tree["layers"]["q"]["lora_a"]) for tree in (fresh, again, other))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_adapters_stay_float32_in_a_bfloat16_model(tmp_path: Path) -> None:
    half = tiny.model_config(tmp_path, "bfloat16")
    _, _, adapters = abstract(half, LORA)
    assert {x.dtype.name for x in jax.tree.leaves(adapters)} == {"float32"}


def test_fresh_adapters_change_nothing(config: ModelConfig, base: Params, fresh: Params) -> None:
    assert np.array_equal(logits(config, base, fresh), logits(config, base))
    merged = merge_adapters(copied(base), fresh, LORA)
    assert jax.tree.all(jax.tree.map(np.array_equal, merged, base))


def test_folded_in_equals_apart(config: ModelConfig, base: Params, trained: Params) -> None:
    plain, apart = logits(config, base), logits(config, base, trained)
    assert float(jnp.abs(apart - plain).max()) > 0.5
    merged = merge_adapters(copied(base), trained, LORA)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_allclose(logits(config, merged), apart, rtol=0, atol=1e-4)


def test_folding_adds_alpha_over_rank_times_the_product(base: Params, trained: Params) -> None:
    merged = merge_adapters(copied(base), trained, LORA)
    for name in LINEAR:
        part = {k: np.asarray(v, np.float64) for k, v in trained["layers"][name].items()}
        change = np.asarray(merged["layers"][name]["kernel"] - base["layers"][name]["kernel"])
        np.testing.assert_allclose(change, 2.0 * part["lora_a"] @ part["lora_b"], rtol=0, atol=1e-5)
    untouched = [tree["layers"]["attention_norm"]["scale"] for tree in (merged, base)]
    assert np.array_equal(*untouched)
    assert np.array_equal(merged["embedding"], base["embedding"])


def test_folding_keeps_the_type_of_the_base(trained: Params, base: Params) -> None:
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), base)
    merged = merge_adapters(half, trained, LORA)
    assert {x.dtype.name for x in jax.tree.leaves(merged)} == {"bfloat16"}


def test_the_gradient_reaches_every_adapter(config: ModelConfig, base: Params, trained: Params) -> None:
    graph, _, _ = abstract(config, LORA)

    def loss(adapters: Params) -> jax.Array:
        return (nnx.merge(graph, base, adapters)(TOKENS_BT)[0] ** 3).mean()

    gradient = jax.jit(jax.grad(loss))(trained)
    assert jax.tree.structure(gradient) == jax.tree.structure(trained)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        per_layer = np.abs(leaf).max(axis=(1, 2))
        assert (per_layer > 1e-6).all(), path


@pytest.mark.parametrize("rank", [0, 3])
def test_gradients_of_a_linear_layer_are_those_of_its_formula(rank: int) -> None:
    lora = LoraSettings(rank=rank, alpha=6.0) if rank else None
    layer = Linear(5, 7, bias=False, lora=lora, dtype="float32", nf4=False, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 4, 5)), rng.standard_normal((2, 4, 7))
    if rank:
        layer.lora_b[...] = jnp.asarray(rng.standard_normal((rank, 7)), jnp.float32)
    graph, params = nnx.split(layer)
    params = nnx.to_pure_dict(params)

    def loss(params: Params, x: jax.Array) -> jax.Array:
        return (nnx.merge(graph, params)(x) * weight).sum()

    with jax.default_matmul_precision("highest"):
        gradient, d_x = jax.grad(loss, argnums=(0, 1))(params, jnp.asarray(x, jnp.float32))
    flat_x, flat_weight = x.reshape(8, 5), weight.reshape(8, 7)
    matrix, expected = np.asarray(params["kernel"], np.float64), {"kernel": flat_x.T @ flat_weight}
    if rank:
        a, b = (np.asarray(params[name], np.float64) for name in ("lora_a", "lora_b"))
        scale, matrix = 6.0 / rank, matrix + 6.0 / rank * a @ b
        expected |= {"lora_a": scale * flat_x.T @ flat_weight @ b.T, "lora_b": scale * (flat_x @ a).T @ flat_weight}
    assert gradient.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(gradient[name], value, rtol=0, atol=1e-4)
    np.testing.assert_allclose(d_x, weight @ matrix.T, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": -1}, "lora.rank must not be negative, got -1"),
        ({"dropout": 1.0}, r"lora.dropout must be in \[0, 1\), got 1.0"),
        ({"targets": ("q", "query")}, "lora.targets must be among q k v o gate up down, got query"),
        ({"targets": ()}, "lora.targets must name a layer"),
        ({"alpha": 0.0}, "lora.alpha must be positive, got 0.0"),
        ({"alpha": float("nan")}, "lora.alpha must be positive, got nan"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraSettings(**settings)
