"""The model: equal to a plain float64 reading of the paper's formulas and to Hugging Face, cached or not."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from itool_jax.inference.sampler import Policy, prefill
from itool_jax.model import attention, hf
from itool_jax.model.attention import KeyValues, attend, attend_in_blocks
from itool_jax.model.cache import Prefix, empty_suffix
from itool_jax.model.transformer import (
    Layer,
    LinearScaling,
    ModelConfig,
    Params,
    RopeScaling,
    YarnScaling,
    abstract,
    rope_frequencies,
    slowdown,
)
from tests import tiny
from tests.conftest import shared_path

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SHAPES = {
    "GQA, tied": {},
    "untied, scaled rope": {"tie_word_embeddings": False, "rope_parameters": LLAMA3},
    "Qwen2": {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 1},
    "nine layers, wide heads": {"num_hidden_layers": 9, "head_dim": 12},
}


@functools.partial(jax.jit, static_argnums=0)
def run(graph: nnx.GraphDef, params: Params, tokens_BT: Any, length_B: Any) -> tuple[jax.Array, Prefix]:
    model = nnx.merge(graph, params)
    hidden, prefix = model(tokens_BT, length_B)
    return model.logits(hidden), prefix


@functools.partial(jax.jit, static_argnums=0)
def proceed(graph, params, tokens_BT, valid_BT, positions_BT, prefix, suffix, slot):
    model = nnx.merge(graph, params)
    hidden, suffix = model.extend(tokens_BT, valid_BT, positions_BT, [prefix], suffix, slot)
    return model.logits(hidden), suffix


def forward(policy: Policy, tokens_BT: Any) -> np.ndarray:
    """Logits of rows that are all full; most tests give (3, 40) tokens, so that a model compiles once."""
    B, T = np.shape(tokens_BT)
    return np.asarray(run(*policy, tokens_BT, np.full(B, T, np.int32))[0])


def random_tokens(shape: tuple[int, ...], seed: int = 0, vocab_size: int = tiny.VOCABULARY) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, shape, np.int32)


def worst(actual: Any, expected: Any) -> float:
    """The largest difference, in units of the expected values' own spread."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert expected.std() > 0.1  # of nothing, all is a copy
    return float(np.abs(actual - expected).max() / expected.std())


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    config = tiny.model_config(tmp_path_factory.mktemp("config"), **SHAPES[request.param])
    return config, tiny.make_policy(config)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Policy]:
    config = tiny.model_config(tmp_path_factory.mktemp("config"))
    return config, tiny.make_policy(config)


def test_a_deeper_stack_traces_no_more_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing layer by layer took two CPU seconds for each program of 30 layers."""
    traced: list[int] = []
    finish = Layer.finish
    monkeypatch.setattr(Layer, "finish", lambda *args: traced.append(1) or finish(*args))
    for n_layers in (3, 6):
        config = dataclasses.replace(tiny.model_config(tmp_path), stacked=False, n_layers=n_layers)
        graph, params, _ = abstract(config)
        prefill.trace(graph, params, np.ones((2, 8), np.int32), np.ones(2, np.int32))
    assert len(traced) == 2


# The forward pass -------------------------------------------------------------------------------------------


def plain_logits(config: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one row, in float64, one head and one layer at a time."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    group, size = config.n_heads // config.n_kv_heads, config.head_dim

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.rms_norm_eps) * scale

    def frequency(i: int) -> float:
        plain = config.rope_theta ** (-2 * i / size)
        if (s := config.rope_scaling) is None:
            return plain
        wavelength = 2 * np.pi / plain
        if wavelength > s.original_max_position_embeddings / s.low_freq_factor:
            return plain / s.factor
        if wavelength < s.original_max_position_embeddings / s.high_freq_factor:
            return plain
        share = s.original_max_position_embeddings / wavelength - s.low_freq_factor
        share /= s.high_freq_factor - s.low_freq_factor
        return (1 - share) * plain / s.factor + share * plain

    def turn(x_TD: np.ndarray) -> np.ndarray:
        angles = np.arange(len(x_TD))[:, None] * np.array([frequency(i) for i in range(size // 2)])
        z = (x_TD[:, : size // 2] + 1j * x_TD[:, size // 2 :]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], axis=1)

    def attention(layer: Params, x: np.ndarray) -> np.ndarray:
        q, k, v = (x @ layer[n]["kernel"] + layer[n].get("bias", 0) for n in "qkv")
        heads = []
        for h in range(config.n_heads):
            own, shared = slice(h * size, (h + 1) * size), slice(h // group * size, (h // group + 1) * size)
            scores = turn(q[:, own]) @ turn(k[:, shared]).T / np.sqrt(size)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, shared])
        return np.concatenate(heads, axis=1) @ layer["o"]["kernel"]

    x = params["embedding"][tokens]
    for i in range(config.n_layers):
        layer = jax.tree.map(lambda stacked, i=i: stacked[i], params["layers"])
        x = x + attention(layer, norm(x, layer["attention_norm"]["scale"]))
        h = norm(x, layer["mlp_norm"]["scale"])
        gate = h @ layer["gate"]["kernel"]
        x = x + gate / (1 + np.exp(-gate)) * (h @ layer["up"]["kernel"]) @ layer["down"]["kernel"]
    x = norm(x, params["norm"]["scale"])
    return x @ (params["embedding"].T if config.tie_embeddings else params["lm_head"])


def test_equals_a_plain_float64_model(model: tuple[ModelConfig, Policy]) -> None:
    config, policy = model
    tokens_BT = random_tokens((3, 40))
    logits_BTV = forward(policy, tokens_BT)
    assert logits_BTV.dtype == jnp.float32
    for row, logits_TV in zip(tokens_BT, logits_BTV, strict=True):
        assert worst(logits_TV, plain_logits(config, policy.params, row)) < 2e-5


def test_no_token_sees_what_comes_after_it(tiny_model: tuple[ModelConfig, Policy]) -> None:
    policy = tiny_model[1]
    tokens_BT = np.repeat(random_tokens((1, 40)), 3, axis=0)
    tokens_BT[1, 17] += 1
    tokens_BT[2, 39] += 1
    plain, middle, last = np.asarray(forward(policy, tokens_BT))
    np.testing.assert_array_equal(middle[:17], plain[:17])
    assert (np.abs(middle[17:] - plain[17:]).max(axis=1) > 1e-4).all()
    np.testing.assert_array_equal(last[:39], plain[:39])


@pytest.mark.parametrize("lengths", [(20, 7, 9), (1, 30, 5), (12, 0, 4), (12, 4, 0)])
def test_branches_share_what_is_before_them_and_do_not_see_each_other(
    tiny_model: tuple[ModelConfig, Policy], lengths: tuple[int, int, int]
) -> None:
    policy = tiny_model[1]
    tokens_T, branch_T = random_tokens((40,)), np.zeros(40, np.int32)
    before, one, _ = lengths
    branch_T[before : before + one], branch_T[before + one : sum(lengths)] = 1, 2
    model = nnx.merge(*policy)
    found_TV = model.logits(model(jnp.asarray(tokens_T[None]), branch_BT=jnp.asarray(branch_T[None]))[0])[0]
    for branch in (1, 2):
        kept = np.flatnonzero((branch_T == 0) & (np.arange(40) < before) | (branch_T == branch))
        alone_TV = forward(policy, np.pad(tokens_T[kept], (0, 40 - len(kept)))[None])[0, : len(kept)]
        np.testing.assert_allclose(found_TV[kept], alone_TV, rtol=0, atol=2e-5)


def test_chosen_positions_are_those_of_the_whole(model: tuple[ModelConfig, Policy]) -> None:
    _, (graph, params) = model
    tokens_BT, at_BR = random_tokens((3, 40)), np.random.default_rng(1).integers(0, 40, (3, 5))

    @jax.jit
    def chosen(params: Params, tokens_BT: jax.Array, at_BR: jax.Array) -> jax.Array:
        module = nnx.merge(graph, params)
        return module.logits(module(tokens_BT, at_BR=at_BR)[0])

    whole_BTV = forward(Policy(graph, params), tokens_BT)
    assert worst(chosen(params, tokens_BT, at_BR), whole_BTV[np.arange(3)[:, None], at_BR]) < 1e-5


def test_rows_do_not_see_each_other(tiny_model: tuple[ModelConfig, Policy]) -> None:
    policy = tiny_model[1]
    tokens_BT = random_tokens((3, 40))
    logits_BTV = np.asarray(forward(policy, tokens_BT))
    moved_BTV = np.asarray(forward(policy, np.stack([tokens_BT[2], tokens_BT[2] * 0, tokens_BT[0]])))
    np.testing.assert_allclose(moved_BTV[2], logits_BTV[0], rtol=0, atol=1e-6)
    np.testing.assert_allclose(moved_BTV[0], logits_BTV[2], rtol=0, atol=1e-6)


def test_bfloat16_comes_close_to_float32(tmp_path: Path, tiny_model: tuple[ModelConfig, Policy]) -> None:
    config, policy = tiny_model
    half = tiny.model_config(tmp_path, "bfloat16")
    tokens_BT = random_tokens((3, 40))
    logits_BTV = forward(tiny.make_policy(half), tokens_BT)
    assert logits_BTV.dtype == jnp.float32  # the logits stay exact whatever the products are computed in
    difference = np.abs(logits_BTV - forward(policy, tokens_BT))
    assert 0 < difference.mean() < 0.05
    assert config.dtype == "float32"


def test_recomputing_layers_changes_no_gradient(tmp_path: Path) -> None:
    plain = tiny.model_config(tmp_path, num_hidden_layers=1)
    thrifty = dataclasses.replace(plain, remat="layers")
    tokens_BT, params = jnp.asarray(random_tokens((2, 8))), tiny.random_params(plain)

    def loss(config: ModelConfig, params: Params) -> jax.Array:
        return (nnx.merge(abstract(config)[0], params)(tokens_BT)[0] ** 3).mean()

    assert "remat" in str(jax.make_jaxpr(functools.partial(loss, thrifty))(params))
    assert "remat" not in str(jax.make_jaxpr(functools.partial(loss, plain))(params))
    expected, actual = (jax.jit(jax.grad(functools.partial(loss, c)))(params) for c in (plain, thrifty))
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        scale = np.abs(one).max()
        assert scale > 0
        np.testing.assert_allclose(other / scale, one / scale, rtol=0, atol=1e-5)


def test_scaled_rope_leaves_fast_dimensions_alone_and_stretches_slow_ones() -> None:
    scaling = RopeScaling(8.0, 1.0, 4.0, 8192)  # those of Llama 3.1 8B
    base = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "n_layers": 1, "n_heads": 1}
    base |= {"n_kv_heads": 1, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
    base |= {"tie_embeddings": True, "qkv_bias": False, "max_length": 131072}
    plain = rope_frequencies(ModelConfig(**base))
    ratio = np.asarray(plain / rope_frequencies(ModelConfig(**base, rope_scaling=scaling)))
    np.testing.assert_allclose(ratio[:29], 1.0)
    np.testing.assert_allclose(ratio[35:], 8.0, rtol=1e-6)
    assert (np.diff(ratio[28:36]) > 0).all()
    np.testing.assert_allclose(plain[1], 5e5 ** (-1 / 64), rtol=1e-7)


def test_linear_scaling_stretches_all_dimensions_and_yarn_the_slow_ones() -> None:
    frequencies = 1e6 ** (-np.arange(64) / 64)
    np.testing.assert_allclose(slowdown(frequencies, LinearScaling(4.0)), 0.25)
    ratio = slowdown(frequencies, YarnScaling(4.0, 32768))  # those of Qwen2.5 with 131,072 tokens
    turns = 32768 * frequencies / (2 * np.pi)
    np.testing.assert_allclose(ratio[turns > 34], 1.0)
    np.testing.assert_allclose(ratio[turns < 0.75], 0.25)
    between = ratio[(turns < 30) & (turns > 1.1)]
    assert (np.diff(between) < 0).all()
    assert ((between > 0.25) & (between < 1)).all()


def test_a_real_checkpoint_predicts_its_reference_text() -> None:
    folder = shared_path("checkpoints/stories260K")
    config, params = hf.load(folder)
    reference = json.loads((folder / "greedy_reference.json").read_text())
    tokens = np.array([reference["prompt_ids"] + reference["greedy_ids"]], np.int32)
    predicted = np.asarray(forward(Policy(abstract(config)[0], params), tokens).argmax(axis=-1))[0]
    assert predicted[:-1].tolist() == reference["greedy_ids"]


# The cache --------------------------------------------------------------------------------------------------

LENGTHS = (9, 14, 0)  # of the prompts; nothing before the first token is a prefix too
PROMPTS = [random_tokens((n,), seed=n) for n in LENGTHS]
TAIL = 6  # tokens that follow a prompt


@pytest.mark.parametrize("rows_together", [1, 3])
def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch, rows_together: int) -> None:
    """Three queries of seven at a time, over a segment of each row and one that a group of rows shares."""
    keys = iter(jax.random.split(jax.random.key(0), 5))
    B, T, H, D, shared, own = 6, 7, 4, 8, 5, 9
    q_BTHD = jax.random.normal(next(keys), (B, T, H, D))

    def segment(rows: int, length: int, mask: Any) -> KeyValues:
        k = jax.random.normal(next(keys), (rows, 2, D, length))
        return KeyValues(k, jax.random.normal(next(keys), (rows, 2, length, D)), jnp.asarray(mask))

    prompt = segment(B // rows_together, shared, np.ones((B // rows_together, 1, shared), bool))
    row = segment(B, own, np.random.default_rng(0).random((B, T, own)) < 0.5)

    def loss(q_BTHD: jax.Array) -> jax.Array:
        return (attend_in_blocks(q_BTHD, [prompt, row]) ** 3).sum()

    out, (value, slope) = attend(q_BTHD, [prompt, row]), jax.value_and_grad(loss)(q_BTHD)
    assert "scan" not in str(jax.make_jaxpr(loss)(q_BTHD))
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", B * H * 3 * (shared + own))
    assert "scan" in str(jax.make_jaxpr(lambda x: loss(x))(q_BTHD))  # a new function: the old one's is kept
    np.testing.assert_allclose(attend_in_blocks(q_BTHD, [prompt, row]), out, rtol=1e-5, atol=1e-6)
    again, slope_again = jax.value_and_grad(loss)(q_BTHD)
    assert float(again) == pytest.approx(float(value), rel=1e-5)
    np.testing.assert_allclose(slope_again, slope, rtol=1e-4, atol=1e-5)


def padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    tokens_BT = np.full((len(rows), 40), 7, np.int32)
    for padded_row, row in zip(tokens_BT, rows, strict=True):
        padded_row[: len(row)] = row
    return tokens_BT


def extended(policy: Policy, tails_BT: np.ndarray, pieces: list[int]) -> np.ndarray:
    """Logits [B, T, V] of tails fed after shared prompts piece by piece, a padding slot before each piece."""
    _, prefix = run(*policy, padded(PROMPTS), np.array(LENGTHS, np.int32))
    B, rows = len(tails_BT), len(tails_BT) // len(PROMPTS)
    suffix = empty_suffix(prefix, B, TAIL + len(pieces) + 2)
    slot, done, logits = 0, 0, []
    for piece in pieces:
        tokens_BT = np.pad(tails_BT[:, done : done + piece], [(0, 0), (1, 0)], constant_values=5)
        place_T = np.arange(piece + 1, dtype=np.int32) - 1
        valid_BT = np.broadcast_to(place_T >= 0, tokens_BT.shape)
        positions_BT = np.repeat(np.int32(LENGTHS), rows)[:, None] + done + np.maximum(place_T, 0)
        out_BTV, suffix = proceed(*policy, tokens_BT, valid_BT, positions_BT, prefix, suffix, slot)
        logits.append(out_BTV[:, 1:])
        slot, done = slot + piece + 1, done + piece
    return np.concatenate(logits, axis=1)


def uncached(policy: Policy, tails_BT: np.ndarray) -> np.ndarray:
    rows = len(tails_BT) // len(PROMPTS)
    prompts = [prompt for prompt in PROMPTS for _ in range(rows)]
    whole_BT = padded([np.concatenate(pair) for pair in zip(prompts, tails_BT, strict=True)])
    chunks = [forward(policy, whole_BT[i : i + 3]) for i in range(0, len(whole_BT), 3)]
    logits = np.concatenate(chunks)
    return np.stack([logits[b, len(p) : len(p) + TAIL] for b, p in enumerate(prompts)])


@pytest.mark.parametrize(("pieces", "rows"), [([6], 1), ([6], 3), ([1] * 6, 3)], ids=str)
def test_cached_pieces_equal_the_whole(tiny_model: tuple[ModelConfig, Policy], pieces: list[int], rows: int) -> None:
    tails_BT = random_tokens((len(PROMPTS) * rows, TAIL), seed=1)
    policy = tiny_model[1]
    assert worst(extended(policy, tails_BT, pieces), uncached(policy, tails_BT)) < 1e-5


def test_no_two_segments_are_read_by_the_same_queries() -> None:
    """A compiler that makes one product of two with an operand in common copies the cache for it."""
    k, v = jnp.ones((2, 1, 4, 3)), jnp.ones((2, 1, 3, 4))
    segments = [KeyValues(k, v, jnp.ones((2, 1, 3), bool))] * 3
    lowered = jax.jit(attend).lower(jnp.ones((2, 1, 2, 4)), segments).as_text()
    assert lowered.count("optimization_barrier") == 2


def test_cached_equals_uncached_for_every_shape(model: tuple[ModelConfig, Policy]) -> None:
    tails_BT = random_tokens((len(PROMPTS) * 2, TAIL), seed=1)
    assert worst(extended(model[1], tails_BT, [3, 3]), uncached(model[1], tails_BT)) < 1e-5


# Parity with Hugging Face -----------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
THETA = {"rope_type": "default", "rope_theta": 5e5}
PARITY = {
    "Llama, no GQA": ("Llama", {"num_key_value_heads": 4}),
    "Llama, GQA 2, tied": ("Llama", {"tie_word_embeddings": True}),
    "Llama, one key head, wide heads": ("Llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "Llama 3.1 beyond its first context": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 16}),
    "Llama, theta and eps": ("Llama", {"rope_parameters": THETA, "rms_norm_eps": 1e-2}),
    "Llama, one layer": ("Llama", {"num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 999}),
    "Qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen2, untied, six heads": (
        "Qwen2",
        {"num_attention_heads": 6, "hidden_size": 48, "num_key_value_heads": 3, "rope_parameters": THETA},
    ),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Mistral, GQA 4, a window nothing reaches": (
        "Mistral",
        {"num_attention_heads": 8, "head_dim": 6, "sliding_window": 64},
    ),
}


@pytest.fixture
def torch_model(request: pytest.FixtureRequest, tmp_path: Path):
    """A Hugging Face model of random weights, saved to `tmp_path` in two or more files."""
    torch = pytest.importorskip("torch")
    import transformers

    family, changes = request.param
    config = getattr(transformers, f"{family}Config")(**SMALL | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Stock biases of zero, norms of one and logits near zero would hide mistakes.
            weight.copy_(torch.randn(weight.shape) * 0.2 + ("norm" in name))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    return model


@pytest.mark.parity
@pytest.mark.parametrize("torch_model", PARITY.values(), ids=PARITY, indirect=True)
def test_parity_with_hugging_face(torch_model: Any, tmp_path: Path) -> None:
    import torch

    config, params = hf.load(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    lengths = (48, 31, 5)
    tokens_BT = random_tokens((len(lengths), 48), vocab_size=config.vocab_size)
    logits_BTV = forward(Policy(abstract(config)[0], params), tokens_BT)
    for length, row, logits_TV in zip(lengths, tokens_BT, logits_BTV, strict=True):
        with torch.no_grad():
            expected = torch_model(torch.tensor(row[None, :length], dtype=torch.long)).logits[0].numpy()
        # What stands behind a row's end, here random tokens, does not matter.
        assert worst(logits_TV[:length], expected) < 1e-4


@pytest.mark.parity
def test_hugging_face_reads_what_is_saved(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    changes = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": False}
    folder = tiny.tiny_checkpoint(tmp_path, **changes)
    config, params = hf.load(folder)
    tokens_BT = random_tokens((3, 40))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()
    assert worst(forward(Policy(abstract(config)[0], params), tokens_BT), expected) < 1e-4
