"""Reads and writes adapters in the PEFT format (https://huggingface.co/docs/peft/developer_guides/checkpoint).

In and out: a folder with adapter_config.json and adapter_model.safetensors. What an adapter here cannot hold is an
error that names it.
"""

import json
import math
from pathlib import Path

import jax
import numpy as np

from itool_jax.model.export import write_tensors
from itool_jax.model.hf import LAYER_NAMES
from itool_jax.model.linear import LoraSettings
from itool_jax.model.transformer import Params
from itool_jax.system.untrusted import inside, read_json

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model.model.layers."
_REFUSED = (
    *("use_dora", "use_qalora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "lora_bias"),
    *("alora_invocation_tokens", "layer_replication", "trainable_token_indices", "target_parameters"),
)
"""Settings of PEFT that change what an adapter computes, if they have a value."""
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq")
"""Beginnings of `init_lora_weights` that also change the base."""


def read_settings(folder: Path) -> tuple[int, float]:
    """Returns rank and alpha of an adapter; alpha is that of PEFT's scaling alpha/rank.

    Raises:
        ValueError: not a LoRA adapter, or one of a kind that is not supported; names the file and the setting.
    """
    path = inside(folder, CONFIG)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {folder} is not an adapter of PEFT")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path} is not a JSON object")
    if str(raw.get("peft_type")).upper() != "LORA":
        raise ValueError(f"{path}: peft_type={raw.get('peft_type')} is not supported, only LORA")
    for name in _REFUSED:
        if raw.get(name):
            raise ValueError(f"{path}: {name}={str(raw[name])[:60]} is not supported; merge the adapter with PEFT")
    if raw.get("bias") not in (None, "none"):
        raise ValueError(f"{path}: bias={raw['bias']} is not supported; merge the adapter with PEFT")
    if str(raw.get("init_lora_weights")).lower().startswith(_CHANGED_BASE):
        raise ValueError(
            f"{path}: init_lora_weights={raw['init_lora_weights']} goes with a changed base; merge it with PEFT"
        )
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"{path}: r and lora_alpha must be positive numbers, got {rank!r} and {alpha!r}")
    return rank, float(alpha) * (rank**0.5 if raw.get("use_rslora") else 1.0)


def base_name(folder: Path) -> str:
    """Returns the name or path of the model that an adapter says it was trained for; empty if it names none."""
    return str(read_json(folder / CONFIG).get("base_model_name_or_path") or "")


def load_adapter(folder: Path, adapters: Params, lora: LoraSettings) -> Params:
    """Returns fresh `adapters`, in the layout for training, with the values of a folder, sharded as they are.

    Raises:
        ValueError: rank or alpha differ from `lora`, or a tensor is unknown, incomplete or misshaped; names it.
    """
    from safetensors import SafetensorError, safe_open

    rank, alpha = read_settings(folder)
    if rank != lora.rank or not math.isclose(alpha, lora.alpha, rel_tol=1e-5):
        raise ValueError(
            f"adapter {folder} has rank {rank} and alpha {alpha:.8g}, but the settings say {lora.rank} and "
            f"{lora.alpha:.8g}; set --lora.rank={rank} --lora.alpha={alpha:.8g}"
        )
    path = inside(folder, TENSORS)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; save the adapter as safetensors")
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no dictionary
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    layers = dict(adapters["layers"])
    for name, part in layers.items():
        module = LAYER_NAMES[f"{name}.kernel"].removesuffix(".weight")
        if any(module in key for key in tensors):  # others keep the values of fresh adapters, which change nothing
            layers[name] = {
                key: _stacked(path, tensors, f"{module}.lora_{side}.weight", part[key])
                for key, side in (("lora_a", "A"), ("lora_b", "B"))
            }
    if tensors:
        raise ValueError(
            f"{path}: tensor {min(tensors)} is of a module that lora.targets does not name, or not of this model"
        )
    return {"layers": layers}


def _stacked(path: Path, tensors: dict[str, np.ndarray], name: str, like: jax.Array) -> jax.Array:
    """Takes one matrix of all layers out of `tensors`, and places it as `like` is."""
    n_layers, *shape = like.shape
    names = [f"{_PREFIX}{layer}.{name}" for layer in range(n_layers)]
    for key in names:
        if key not in tensors:
            raise ValueError(f"{path}: tensor {key} is missing; an adapter of some layers only is not supported")
        if list(tensors[key].T.shape) != shape:
            raise ValueError(
                f"{path}: tensor {key} has shape {tensors[key].shape}, the model asks for {tuple(shape[::-1])}; "
                "was the adapter trained for another model?"
            )
    whole = np.stack([tensors.pop(key).T.astype(np.float32) for key in names])
    return jax.make_array_from_callback(like.shape, like.sharding, lambda part: whole[part])


def save_adapter(folder: Path, adapters: Params, lora: LoraSettings, base: str) -> None:
    """Writes adapters in the PEFT format; `base` is the path or Hub name of their base model."""
    tensors: dict[str, np.ndarray] = {}
    targets: list[str] = []
    for name, part in adapters["layers"].items():
        module = LAYER_NAMES[f"{name}.kernel"].removesuffix(".weight")
        targets.append(module.rpartition(".")[2])
        for side, matrix in (("A", part["lora_a"]), ("B", part["lora_b"])):
            for i, layer in enumerate(np.asarray(matrix)):
                key = f"{_PREFIX}{i}.{module}.lora_{side}.weight"
                tensors[key] = np.ascontiguousarray(layer.T)
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / TENSORS, tensors)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
