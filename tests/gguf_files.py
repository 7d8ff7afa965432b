"""Writes GGUF files as llama.cpp's converter does, from folders in Hugging Face layout, with the package `gguf`.

In: a model folder with a byte-level tokenizer. Out: a file with its configuration, tokenizer, template and weights; q
and k of Llama and Mistral are interleaved.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
FAMILIES = {"Llama": "llama", "Mistral": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{n}_{part}": f"attn_{n}{end}" for n in "qkv" for part, end in (("proj", ""), ("norm", "_norm"))},
    **{f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
}


def to_gguf(folder: Path, path: Path, kind: str = "F32", changes: dict[str, Any] | None = None) -> Path:
    """Writes the model in `folder` with matrices of the given kind, and changes to the metadata; None leaves out."""
    import gguf

    raw = json.loads((folder / "config.json").read_text())
    metadata = configuration(raw) | tokenizer(folder) | (changes or {})
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        add(writer, key, value)
    quantized = gguf.GGMLQuantizationType[kind]
    for name, value in tensors(folder, raw).items():
        type_of = quantized if value.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(value.astype(np.float32), type_of), raw_dtype=type_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add(writer: Any, key: str, value: Any) -> None:
    adders = ((bool, writer.add_bool), (int, writer.add_uint32), (float, writer.add_float32), (str, writer.add_string))
    if isinstance(value, list):
        writer.add_array(key, value)
    elif value is not None:
        next(adder for kind, adder in adders if isinstance(value, kind))(key, value)


def configuration(raw: dict[str, Any]) -> dict[str, Any]:
    """The metadata that config.json becomes."""
    family = FAMILIES[raw["architectures"][0].removesuffix("ForCausalLM")]
    width = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    own = {
        "block_count": raw["num_hidden_layers"],
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"],
        "rope.freq_base": raw["rope_parameters"]["rope_theta"],
    }
    if family == "llama":
        own |= {"vocab_size": raw["vocab_size"], "rope.dimension_count": width}
    if family != "qwen2" and "head_dim" in raw:
        own |= {"attention.key_length": width, "attention.value_length": width}
    general = {"general.architecture": family, "general.type": "model", "general.name": "Tiny"}
    return general | {f"{family}.{key}": value for key, value in own.items()}


def tokenizer(folder: Path) -> dict[str, Any]:
    """The metadata that tokenizer.json, tokenizer_config.json and the template become."""
    content = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    n = json.loads((folder / "config.json").read_text())["vocab_size"]
    texts, types = [f"[PAD{i}]" for i in range(n)], [UNUSED] * n
    for text, i in content["model"]["vocab"].items():
        texts[i], types[i] = text, NORMAL
    for token in content["added_tokens"]:
        texts[token["id"]], types[token["id"]] = token["content"], CONTROL if token["special"] else USER_DEFINED
    ids = {text: i for i, text in enumerate(texts)}
    named = {"bos": "bos", "eos": "eos", "pad": "padding"}
    given = {key: settings.get(f"{name}_token") for name, key in named.items()}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
        **{f"tokenizer.ggml.{key}_token_id": ids[text] for key, text in given.items() if text},
        "tokenizer.chat_template": (folder / "chat_template.jinja").read_text(),
    }


def tensors(folder: Path, raw: dict[str, Any]) -> dict[str, np.ndarray]:
    """The weights under llama.cpp's names and in its order."""
    family = FAMILIES[raw["architectures"][0].removesuffix("ForCausalLM")]
    n_heads = {"q": raw["num_attention_heads"], "k": raw["num_key_value_heads"]}
    made = {}
    for name, value in load_file(folder / "model.safetensors").items():
        layer, part, kind = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name).groups()  # type: ignore
        if family == "llama" and (head := re.fullmatch(r"self_attn\.([qk])_proj", part)):
            value = interleaved(value, n_heads[head[1]])
        made[f"{'' if layer is None else f'blk.{layer}.'}{NAMES[part]}.{kind}"] = value
    rope = raw["rope_parameters"]
    if rope["rope_type"] == "llama3":
        made["rope_freqs.weight"] = divisors(rope, raw["hidden_size"] // raw["num_attention_heads"])
    return made


def interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """The two halves of each head's rows, taken in turn."""
    halves = weight.reshape(n_heads, 2, -1, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def divisors(rope: dict[str, Any], width: int) -> np.ndarray:
    """What Llama 3 divides the frequency of each pair of a head's dimensions by, as in the paper's code."""
    made = []
    for i in range(0, width, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / width)
        ratio = rope["original_max_position_embeddings"] / wavelength
        if ratio > rope["high_freq_factor"]:
            made.append(1.0)
        elif ratio < rope["low_freq_factor"]:
            made.append(rope["factor"])
        else:
            smooth = (ratio - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            made.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.asarray(made, np.float32)
