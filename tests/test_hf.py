"""Checkpoints: what a folder holds is what is loaded, and what is not understood is refused by name."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from itool_jax.model import export, hf
from itool_jax.model.transformer import LinearScaling, RopeScaling, YarnScaling, abstract
from itool_jax.text.chat import Chat, answer_ids, load_tokenizer
from tests import tiny

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
Tensors = dict[str, np.ndarray]


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def write_config(folder: Path, changes: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    raw = {k: v for k, v in tiny.raw_config(**changes).items() if k not in without}
    (folder / "config.json").write_text(json.dumps(raw))


def identical(a: Any, b: Any) -> bool:
    """The same tree of arrays, types and bits included."""
    same = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return all(jax.tree.leaves(same))


def test_the_tiny_folder_is_complete(tiny_folder: Path) -> None:
    config, params = hf.load(tiny_folder)
    chat = Chat(load_tokenizer(str(tiny_folder)))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    text = chat.tokenizer.decode(chat.prompt_ids([{"role": "user", "content": "hé, f()]"}], [tool]))
    assert text.startswith('<|user|>hé, f()]<|end|><|tools|>[{"type": "function"')
    assert text.endswith("<|end|><|assistant|>")
    assert [chat.tokenizer.decode([i]) for i in chat.stop_ids] == ["<|end|>"]
    assert len(chat.target_ids("[f(a=1), f(a=2)]")) < len("[f(a=1), f(a=2)]")
    assert len(answer_ids(chat, "ABCD")) == 4
    assert len(chat.tokenizer) < config.vocab_size == len(params["embedding"])


# config.json ------------------------------------------------------------------------------------------------


def test_reads_the_tiny_config(folder: Path) -> None:
    config = hf.read_config(folder, "bfloat16")
    assert (config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim) == (2, 4, 2, 8)
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (tiny.VOCABULARY, 32, 48)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-5, 1e4, None)
    assert (config.tie_embeddings, config.qkv_bias, config.max_length) == (True, False, 1024)
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "without", "field", "value"),
    [
        ({"rope_theta": 5e5}, ("rope_parameters",), "rope_theta", 5e5),
        ({}, ("rope_parameters",), "rope_theta", 1e4),
        ({"rope_parameters": {"rope_theta": 1e6}}, (), "rope_theta", 1e6),
        (
            {"rope_parameters": {"rope_type": "llama3"} | LLAMA3},
            (),
            "rope_scaling",
            RopeScaling(8, 1, 4, 8192),
        ),
        ({"rope_scaling": {"rope_type": "llama3"} | LLAMA3}, (), "rope_scaling", RopeScaling(8, 1, 4, 8192)),
        ({"rope_scaling": {"type": "llama3"} | LLAMA3}, (), "rope_scaling", RopeScaling(8, 1, 4, 8192)),
        ({"rope_scaling": None}, (), "rope_scaling", None),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, (), "rope_scaling", LinearScaling(4.0)),
        ({"rope_scaling": YARN}, (), "rope_scaling", YarnScaling(4.0, 64, 32.0, 1.0, 0.1 * math.log(4.0) + 1)),
        ({"rope_scaling": YARN | {"attention_factor": 1.5}}, (), "rope_scaling", YarnScaling(4.0, 64, 32.0, 1.0, 1.5)),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}}, ("rope_parameters",), "rope_theta", 1e6),
        ({}, ("num_key_value_heads",), "n_kv_heads", 4),
        ({"head_dim": None}, (), "head_dim", 8),
        ({"head_dim": 16}, (), "head_dim", 16),
        ({}, ("tie_word_embeddings",), "tie_embeddings", False),
        ({"architectures": ["Qwen2ForCausalLM"]}, (), "qkv_bias", True),
        # As Qwen2.5 checkpoints have it: a window that is named and not used.
        (
            {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 8, "use_sliding_window": False},
            (),
            "qkv_bias",
            True,
        ),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (), "qkv_bias", False),
        # A window that no position reaches is none; Mistral's default, 4096, is one of these here.
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 1024}, (), "max_length", 1024),
        ({"architectures": ["MistralForCausalLM"]}, (), "max_length", 1024),
    ],
)
def test_accepts_every_spelling(
    folder: Path, changes: dict[str, Any], without: tuple[str, ...], field: str, value: Any
) -> None:
    write_config(folder, changes, without)
    assert getattr(hf.read_config(folder, "float32"), field) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            "GemmaForCausalLM.* is not supported; known: LlamaForCausalLM",
        ),
        ({"architectures": None}, "architecture None is not supported"),
        ({"architectures": ["LlamaForCausalLM", "LlamaForCausalLM"]}, "is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "'original_max_position_embeddings' is missing"),
        ({"rope_parameters": YARN | {"mscale": 2.0}}, "rope setting mscale is not supported"),
        ({"rope_parameters": YARN | {"truncate": False}}, "rope setting truncate is not supported"),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "type dynamic is not supported, only llama3, linear, yarn",
        ),
        ({"rope_scaling": {"type": "linear"}}, "'factor' is missing"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'low_freq_factor' is missing"),
        ({"rope_scaling": "linear"}, r"config\.json: rope_scaling must be an object, got 'linear'"),
        ({"rope_parameters": "linear"}, r"config\.json: rope_parameters must be an object, got 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope setting full_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not a known setting"),
        ({"logit_scale": 0.5}, "logit_scale=0.5 is not a known setting"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layers of type sliding_attention"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 16, "use_sliding_window": False}, "window=16"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 512}, "sliding_window=512"),
        ({"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192}, "sliding_window=4096"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 512, "use_sliding_window": True},
            "sliding_window=512",
        ),
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"hidden_size": "32"}, "config.json"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
        ({"rms_norm_eps": "small"}, "config.json"),
    ],
)
def test_refuses_what_it_does_not_compute(folder: Path, changes: dict[str, Any], message: str) -> None:
    write_config(folder, changes)
    with pytest.raises(ValueError, match=message) as error:
        hf.load(folder)
    assert str(folder / "config.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["architectures", "vocab_size", "num_hidden_layers", "hidden_act", "rms_norm_eps"])
def test_names_a_key_that_is_absent(folder: Path, key: str) -> None:
    write_config(folder, {}, without=(key,))
    with pytest.raises(ValueError, match=f"'{key}' is missing"):
        hf.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("[1]", "config.json is not a JSON object"),
        (b"\xff\xfe", "config.json is not valid JSON"),
        (None, "config.json does not exist"),
    ],
)
def test_refuses_a_broken_config(folder: Path, content: str | bytes | None, message: str) -> None:
    path = folder / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        hf.load(folder)


# Tensors ----------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[Tensors], Any]) -> None:
    """Changes the tensors of a single-file checkpoint in place."""
    tensors = load_file(folder / hf.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / hf.WEIGHTS)


NORM, QUERY = "model.norm.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY), f"tensor {QUERY} is missing"),
        (lambda t: t.pop(NORM), f"tensor {NORM} is missing"),
        (lambda t: t.update({"extra.weight": t[NORM]}), "unexpected tensor extra.weight$"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[NORM], "z": t[NORM]}),
            r"unexpected tensor model.layers.2.mlp.up_proj.weight and 1 more",
        ),
        (
            lambda t: t.update({QUERY.replace("weight", "bias"): t[NORM]}),
            "unexpected tensor model.layers.1.self_attn.q_proj.bias",
        ),
        (
            lambda t: t.update({QUERY: t[QUERY][:-1]}),
            rf"{QUERY} has shape \(31, 32\), config.json asks for \(32, 32\)",
        ),
        (lambda t: t.update({NORM: t[NORM][None]}), rf"{NORM} has shape \(1, 32\)"),
        (lambda t: t.update({QUERY: t[QUERY].astype(np.int8)}), f"{QUERY} has dtype I8, expected one of F32"),
    ],
)
def test_names_the_tensor_that_is_wrong(folder: Path, change: Callable[[Tensors], Any], message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message) as error:
        hf.load(folder)
    assert str(folder) in str(error.value)


def test_leaves_tensors_aside_that_carry_nothing(folder: Path) -> None:
    _, params = hf.load(folder)
    head = load_file(folder / hf.WEIGHTS)["model.embed_tokens.weight"]
    spare = {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": head[0]}
    rewrite(folder, lambda t: t.update(spare))
    assert identical(hf.load(folder)[1], params)
    write_config(folder, {"tie_word_embeddings": False})
    assert np.array_equal(hf.load(folder)[1]["lm_head"], head.T)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_every_float_type(folder: Path, stored: Any, dtype: str) -> None:
    rewrite(folder, lambda t: t.update({name: value.astype(stored) for name, value in t.items()}))
    query = load_file(folder / hf.WEIGHTS)[QUERY]
    assert query.dtype == stored
    config, params = hf.load(folder, dtype)
    kernel = params["layers"]["q"]["kernel"][1]
    assert config.dtype == kernel.dtype == dtype
    assert np.array_equal(kernel, query.T.astype(dtype))
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_round_trip_keeps_every_bit(tmp_path: Path, family: str, tied: bool, dtype: str) -> None:
    changes = {"architectures": [f"{family}ForCausalLM"], "tie_word_embeddings": tied}
    params = tiny.random_params(tiny.model_config(tmp_path / "first", dtype, **changes))
    export.save(tmp_path / "first", params, tiny.raw_config(**changes))
    config, loaded = hf.load(tmp_path / "first", dtype)
    assert identical(loaded, params)
    export.save(tmp_path / "deep" / "second", loaded, json.loads((tmp_path / "first/config.json").read_text()))
    assert hf.load(tmp_path / "deep" / "second", dtype)[0] == config
    for name in ("config.json", hf.WEIGHTS):
        assert (tmp_path / "deep" / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    assert ("lm_head.weight" in load_file(tmp_path / "first" / hf.WEIGHTS)) is not tied


# Files ------------------------------------------------------------------------------------------------------


def shard(folder: Path, n: int = 3) -> dict[str, str]:
    """Replaces the single file by `n` shards and their index; returns the weight map."""
    tensors = load_file(folder / hf.WEIGHTS)
    (folder / hf.WEIGHTS).unlink()
    weight_map = {name: f"model-{i % n + 1:05}-of-{n:05}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({t: v for t, v in tensors.items() if weight_map[t] == file}, folder / file)
    (folder / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def test_shards_are_one_checkpoint(folder: Path) -> None:
    _, params = hf.load(folder)
    shard(folder)
    # Weights in another layout, as some repositories hold them too, are no part of the checkpoint.
    save_file({"tok_embeddings.weight": np.zeros(3)}, folder / "consolidated.safetensors")
    assert identical(hf.load(folder)[1], params)


def test_a_single_file_goes_before_shards_left_over(folder: Path) -> None:
    _, params = hf.load(folder)
    file = (folder / hf.WEIGHTS).read_bytes()
    shard(folder)
    (folder / hf.WEIGHTS).write_bytes(file)
    for left_over in folder.glob("model-*.safetensors"):
        left_over.write_bytes(b"")
    assert identical(hf.load(folder)[1], params)


def test_names_what_an_index_promises_and_no_file_holds(folder: Path) -> None:
    weight_map = shard(folder)
    index = json.loads((folder / hf.INDEX).read_text())
    index["weight_map"]["a.b"] = weight_map[NORM]
    (folder / hf.INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"tensor a.b of .*index.json is not in {weight_map[NORM]}"):
        hf.load(folder)
    (folder / weight_map[NORM]).unlink()
    with pytest.raises(ValueError, match=f"{weight_map[NORM]} does not exist"):
        hf.load(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_refuses_a_broken_index(folder: Path, content: str) -> None:
    shard(folder)
    (folder / hf.INDEX).write_text(content)
    with pytest.raises(ValueError, match=r"index\.json (is not valid JSON|has no weight_map)"):
        hf.load(folder)


@pytest.mark.parametrize("spoil", [lambda b: b[:-100], lambda b: b"garbage" * 9, lambda b: b"", lambda b: b[:50]])
def test_refuses_a_corrupt_file(folder: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = folder / hf.WEIGHTS
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file") as error:
        hf.load(folder)
    assert "\n" not in str(error.value)


def test_refuses_a_folder_without_weights(folder: Path) -> None:
    (folder / hf.WEIGHTS).rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"contains neither model\.safetensors nor"):
        hf.load(folder)


# Names ------------------------------------------------------------------------------------------------------


def test_finds_a_local_folder(folder: Path) -> None:
    assert hf.find(str(folder)) == folder


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "/no/where", "a/b/c"])
def test_refuses_what_is_neither_folder_nor_hub_name(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="neither a folder, a GGUF file nor a hub name"):
        hf.find(name)


def test_asks_the_hub_for_what_it_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        assert not local_files_only
        asked.append((name, allow_patterns))
        if name == "some/private":
            raise LocalEntryNotFoundError("first line\nsecond line")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hf.find("some/model") == folder
    name, patterns = asked[0]
    assert name == "some/model"
    files = ["config.json", "tokenizer.json", "model-00001-of-00002.safetensors", "chat_template.jinja"]
    assert all(any(Path(file).match(pattern) for pattern in patterns) for file in [*files, hf.INDEX])
    assert not any(Path("consolidated.safetensors").match(pattern) for pattern in patterns)
    with pytest.raises(ValueError, match=r"some/private is not a local folder and could not .*: first line$"):
        hf.find("some/private")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc, which tells the peak memory")
def test_import_holds_little_more_than_the_weights(tmp_path: Path) -> None:
    """A random checkpoint of two gigabytes in several files, read by a process of its own; -s prints the figures."""
    shape = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 25, "vocab_size": 16000}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 8, "tie_word_embeddings": False}
    config = tiny.model_config(tmp_path, "bfloat16", **shape)
    random = np.random.default_rng(0)

    def leaf(_: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
        return random.integers(0, 2**14, x.shape, np.uint16).view(ml_dtypes.bfloat16)

    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.dtype(ml_dtypes.bfloat16)), abstract(config)[1])
    export.save(tmp_path, shapes, tiny.raw_config(**shape), leaf, shard_bytes=3e8)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    code = f"""
import jax, jax.numpy as jnp
from pathlib import Path
from itool_jax.model import hf
jax.block_until_ready(jnp.ones(8) @ jnp.ones(8))
hf.read_config(Path({str(tmp_path)!r}), "bfloat16")
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
params = jax.block_until_ready(hf.load(Path({str(tmp_path)!r}), "bfloat16")[1])
sizes = [x.nbytes for x in jax.tree.leaves(params)]
print(1024 * (peak() - before), sum(sizes), max(sizes))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    extra, weights, largest = map(int, done.stdout.split())
    print(f"weights {weights / 1e9:.2f} GB, largest stack {largest / 1e9:.2f} GB, host memory {extra / 1e9:.2f} GB")
    assert 0.9 * weights < extra < weights + 1.5 * largest
