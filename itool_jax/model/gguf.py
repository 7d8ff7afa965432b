"""Reads a GGUF file of llama.cpp as if it were a Hugging Face folder.

In: a file. Out: what config.json would hold, and the tensors, dequantized, under their names there. The package `gguf`
dequantizes them. A setting or tensor that is not understood is an error that names it.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from itool_jax.model.transformer import RopeScaling, slowdown
from itool_jax.system.gguf import Header, Place, read_header

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""Mistral files are of architecture llama, which computes the same."""
PERMUTED = ("llama",)
"""Architectures whose q and k have the two halves of each head interleaved."""
FLOATS = ("F32", "F16", "BF16", "F64")

_KEYS = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OPTIONAL = {"attention.head_count_kv": "num_key_value_heads", "rope.freq_base": "rope_theta"}
_HEAD_SIZES = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}
_EMBEDDING, _ROPE = "token_embd.weight", "rope_freqs.weight"
_TOP_NAMES = {
    _EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"},
    **{f"attn_{n}_norm": f"self_attn.{n}_norm" for n in "qk"},
    **{f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")},
}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What Llama 3.1 to 3.3 stretch positions by; a file holds only the resulting divisors."""


def raw_config(path: Path) -> dict[str, Any]:
    """Returns the content that the model's config.json would have.

    Raises:
        ValueError: the file is damaged, one of several parts, or of an unsupported model; names the file and the key.
    """
    header = read_header(path)
    try:
        return _config(header, path)
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{path}: {error}") from error


def _config(header: Header, path: Path) -> dict[str, Any]:
    given = header.metadata
    if given.get("split.count", 1) != 1:
        raise ValueError("the file is one of several parts; join them with llama-gguf-split --merge")
    if (kind := given.get("general.type", "model")) != "model":
        raise ValueError(f"general.type={kind} is not supported, only model")
    if (name := given.get("general.architecture")) not in list(ARCHITECTURES):
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"architecture {name} is not supported in a GGUF file; known: {known} (Mistral's is llama)")
    own = {key.removeprefix(f"{name}."): value for key, value in given.items() if key.startswith(f"{name}.")}
    known = {*_KEYS, *_OPTIONAL, *_HEAD_SIZES, "vocab_size"}
    if unknown := sorted(key for key, value in own.items() if value not in (0, "none") and key not in known):
        raise ValueError(f"{name}.{unknown[0]}={str(own[unknown[0]])[:40]} is not supported")
    if missing := [key for key in _KEYS if key not in own]:
        raise ValueError(f"{name}.{missing[0]} is missing")
    for key in [key for key in (*_KEYS, *_OPTIONAL) if key in own]:
        if not isinstance(own[key], int | float) or not own[key] > 0:
            raise ValueError(f"{name}.{key} must be a positive number, got {str(own[key])[:40]}")
    if _EMBEDDING not in header.tensors:
        raise ValueError(f"tensor {_EMBEDDING} is missing")
    config = {new: _short(own[key]) for key, new in (_KEYS | _OPTIONAL).items() if key in own}
    config = {"num_key_value_heads": config["num_attention_heads"], "rope_theta": 10000.0} | config
    config |= {
        "architectures": [ARCHITECTURES[name]],
        "model_type": name,
        "hidden_act": "silu",
        "vocab_size": header.tensors[_EMBEDDING].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    width = config["hidden_size"] // config["num_attention_heads"]
    if name != "qwen2":  # its heads have no size of their own
        width = config["head_dim"] = own.get("attention.key_length", width)
    for key in _HEAD_SIZES:
        if own.get(key, width) != width:
            raise ValueError(f"{name}.{key}={own[key]} is not supported, only the size of a head, {width}")
    if _ROPE in header.tensors:
        config["rope_scaling"] = _llama3(_values(path, header.tensors[_ROPE]), config["rope_theta"], width)
    ids = {f"{new}_token_id": given.get(f"tokenizer.ggml.{key}_token_id") for new, key in _IDS.items()}
    return config | {key: value for key, value in ids.items() if value is not None}


def _short(value: Any) -> Any:
    """Returns a 32-bit float as the number it was written as: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _llama3(divisors: np.ndarray, theta: float, width: int) -> dict[str, Any]:
    """Returns the setting that stretches positions by these divisors."""
    factor = _short(float(divisors.max()))
    frequencies = theta ** (-np.arange(width // 2) / (width // 2))
    expected = 1 / slowdown(frequencies, RopeScaling(factor=factor, **_LLAMA3))
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ValueError(f"tensor {_ROPE} does not stretch positions as Llama 3 does, which is not supported")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def tensors(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Lists shape and type of all weights, by their names in a Hugging Face folder; reads none.

    The type is that of all matrices if they have the same one of 16 bits, else F32: quantized weights are dequantized.

    Raises:
        ValueError: the file is cut off, a tensor's type is not known, or the package `gguf` is missing.
    """
    header = read_header(path)
    for name, place in header.tensors.items():
        if place.offset + math.prod(_byte_shape(path, place)) > path.stat().st_size:
            raise ValueError(f"{path} ends before the end of tensor {name}; download it again")
    types = {_type(path, place).name for place in header.tensors.values() if len(place.shape) > 1}
    dtype = types.pop() if types in ({"F16"}, {"BF16"}) else "F32"
    return {_name(name): (place.shape, dtype) for name, place in header.tensors.items() if name != _ROPE}


def read(path: Path, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a part of a tensor, named as in a Hugging Face folder, as float32; dequantizes only its rows."""
    header = read_header(path)
    place = next(place for key, place in header.tensors.items() if _name(key) == name)
    rows: Any = index[0]
    architecture = header.metadata["general.architecture"]
    if architecture in PERMUTED and (part := re.search(r"\.([qk])_proj\.weight$", name)):
        key = "attention.head_count" if part[1] == "q" else "attention.head_count_kv"
        n_heads = header.metadata.get(f"{architecture}.{key}", header.metadata[f"{architecture}.attention.head_count"])
        rows = np.arange(place.shape[0]).reshape(n_heads, -1, 2).swapaxes(1, 2).reshape(-1)[rows]
    return _values(path, place, rows)[:, *index[1:]] if len(place.shape) > 1 else _values(path, place)[index]


def quantization(path: Path) -> str | None:
    """Returns what most weights are quantized to, such as "4 bits (Q4_1)"; None if they are floats."""
    sizes: dict[str, int] = {}
    for place in read_header(path).tensors.values():
        name = _type(path, place).name
        sizes[name] = sizes.get(name, 0) + math.prod(place.shape)
    most = max(sizes, key=lambda name: sizes[name])
    bits = re.search(r"\d", most)  # Q4_1, IQ2_XXS and MXFP4 have it first
    return None if most in FLOATS or bits is None else f"{bits[0]} bits ({most})"


def _name(name: str) -> str:
    """Returns a tensor's name in a Hugging Face folder, or the same if there is none."""
    part = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if part and part[2] in _LAYER_NAMES:
        return f"model.layers.{part[1]}.{_LAYER_NAMES[part[2]]}.{part[3]}"
    return _TOP_NAMES.get(name, name)


def _values(path: Path, place: Place, rows: Any = slice(None)) -> np.ndarray:
    """Reads and dequantizes some rows of a matrix, or a vector, which is the only row of one."""
    data = np.memmap(path, np.uint8, "r", place.offset, _byte_shape(path, place))
    values = _library().dequantize(np.ascontiguousarray(data[rows]), _type(path, place))
    return values if len(place.shape) > 1 else values[0]


def _byte_shape(path: Path, place: Place) -> tuple[int, int]:
    """Returns the number of a tensor's rows, and the bytes of each."""
    numbers, size = _library().GGML_QUANT_SIZES[_type(path, place)]
    if place.shape[-1] % numbers:
        raise ValueError(f"{path}: rows of {place.shape[-1]} numbers cannot be of type {_type(path, place).name}")
    return math.prod(place.shape[:-1]), place.shape[-1] // numbers * size


def _type(path: Path, place: Place) -> Any:
    """Returns the library's name of a tensor's type, which it can dequantize."""
    library = _library()
    try:
        kind = library.GGMLQuantizationType(place.type)
        library.dequantize(np.zeros((1, library.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: {error}; pip install -U gguf may know this type of weights") from error
    return kind


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF files need a package that is not installed; run: pip install gguf") from error
    return gguf
