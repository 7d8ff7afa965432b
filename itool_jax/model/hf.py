"""Hugging Face checkpoints: config.json and safetensors in, `ModelConfig` and weights out, and back.

Everything a file holds must be understood: an unknown architecture, a config feature this code does not compute, a
missing, extra or misshaped tensor is refused by name.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from itool_jax.model.transformer import ModelConfig, Params, RopeScaling, abstract

ARCHITECTURES = {"LlamaForCausalLM": False, "MistralForCausalLM": False, "Qwen2ForCausalLM": True}
"""Supported architectures, and whether their query, key and value projections have biases."""

_LAYER_NAMES = {
    "attention_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    **{f"{n}.kernel": f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"{n}.bias": f"self_attn.{n}_proj.bias" for n in "qkv"},
    **{f"{n}.kernel": f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
}
_TOP_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
}


def find(name: str) -> Path:
    """The local folder of a model: a path, or a hub name that is downloaded once (weights, tokenizer, configs)."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ValueError(f"model {name} is neither a folder nor a hub name such as meta-llama/Llama-3.2-1B-Instruct")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"model {name} is no folder here and cannot be had from the hub: {reason}") from error


def read_config(folder: Path, dtype: str) -> ModelConfig:
    """The shapes in a folder's config.json, older and newer spellings alike."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist: {folder} is not a Hugging Face model folder")
    try:
        raw = json.loads(path.read_text())
        return _config(raw, dtype)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]!r}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _config(raw: dict[str, Any], dtype: str) -> ModelConfig:
    names = raw["architectures"]
    if len(names) != 1 or names[0] not in ARCHITECTURES:
        raise ValueError(f"architecture {', '.join(names)} is not supported; known: {', '.join(ARCHITECTURES)}")
    refused = {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "sliding_window": None}
    for key, plain in refused.items():
        if raw.get(key) not in (plain, None, False):
            raise ValueError(f"{key}={raw[key]} is not supported")
    if raw["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"hidden_act={raw['hidden_act']} is not supported, only silu")
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or rope
    n_heads = raw["num_attention_heads"]
    return ModelConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        n_layers=raw["num_hidden_layers"],
        n_heads=n_heads,
        n_kv_heads=raw.get("num_key_value_heads") or n_heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // n_heads,
        rms_norm_eps=raw["rms_norm_eps"],
        # Llama 2's config.json predates the key; its paper's value holds there.
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(scaling),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=ARCHITECTURES[names[0]],
        max_length=raw["max_position_embeddings"],
        dtype=dtype,
    )


def _rope_scaling(raw: dict[str, Any]) -> RopeScaling | None:
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope scaling of type {kind} is not supported, only llama3")
    return RopeScaling(*(raw[field] for field in RopeScaling._fields))


def _names(params: Params, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """(place in `params`, name in the checkpoint, whether it is stacked over layers) of every weight."""
    for key, value in params.items():
        if isinstance(value, dict):
            yield from _names(value, (*path, key))
        elif path[:1] == ("layers",):
            yield (*path, key), _LAYER_NAMES[".".join((*path, key)[1:])], True
        else:
            yield (*path, key), _TOP_NAMES[".".join((*path, key))], False


def load(folder: Path, dtype: str = "float32") -> tuple[ModelConfig, Params]:
    """Configuration and weights of a folder; weights are stored in `dtype`, one tensor in host memory at a time."""
    config = read_config(folder, dtype)
    _, shapes, _ = abstract(config)
    files = _tensor_files(folder)
    expected: dict[str, tuple[int, ...]] = {}
    params: Params = {}
    for path, name, stacked in _names(shapes):
        shape = _at(shapes, path).shape
        if not stacked:
            one = name == "lm_head.weight"
            expected[name] = shape[::-1] if one else shape
            value = _read(files, name, expected[name], transpose=one)
        else:
            names = [f"model.layers.{i}.{name}" for i in range(config.n_layers)]
            expected |= dict.fromkeys(names, shape[:0:-1])
            value = np.stack([_read(files, n, shape[:0:-1], transpose=len(shape) == 3) for n in names])
        _put(params, path, jnp.asarray(value, config.dtype))
    # An untied copy of tied embeddings and old rotary buffers carry nothing new.
    spare = {n for n in files if "rotary_emb" in n} | ({"lm_head.weight"} if config.tie_embeddings else set())
    if extra := sorted(set(files) - set(expected) - spare):
        raise ValueError(f"{folder}: unexpected tensor {extra[0]}" + (f" and {len(extra) - 1} more" * (len(extra) > 1)))
    return config, params


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, for single and sharded checkpoints."""
    from safetensors import SafetensorError, safe_open

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ValueError(f"{folder} holds no .safetensors file")
    found: dict[str, Path] = {}
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                found |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    index = folder / "model.safetensors.index.json"
    if index.exists() and (missing := set(json.loads(index.read_text())["weight_map"]) - set(found)):
        raise ValueError(f"{folder}: tensor {min(missing)} of {index.name} is in none of the {len(paths)} files")
    return found


def _read(files: dict[str, Path], name: str, shape: tuple[int, ...], *, transpose: bool) -> np.ndarray:
    from safetensors import safe_open

    if name not in files:
        folder = next(iter(files.values())).parent
        raise ValueError(f"{folder}: tensor {name} is missing")
    with safe_open(files[name], framework="flax") as file:
        value = np.asarray(file.get_tensor(name))
    if value.shape != tuple(shape):
        raise ValueError(f"{files[name]}: tensor {name} has shape {value.shape}, config.json asks for {tuple(shape)}")
    return value.T if transpose else value


def save(folder: Path, params: Params, raw_config: dict[str, Any]) -> None:
    """Writes config.json and model.safetensors; `raw_config` is the content of config.json."""
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    for path, name, stacked in _names(params):
        value = np.asarray(_at(params, path))
        rows = enumerate(value) if stacked else [(None, value)]
        for i, one in rows:
            full = name if i is None else f"model.layers.{i}.{name}"
            turned = one.T if path[-1] in ("kernel", "lm_head") else one
            tensors[full] = np.ascontiguousarray(turned)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw_config, indent=2) + "\n")


def _at(tree: Params, path: tuple[str, ...]) -> jax.Array:
    for key in path:
        tree = tree[key]
    return tree  # pyright: ignore[reportReturnType]


def _put(tree: Params, path: tuple[str, ...], value: jax.Array) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
