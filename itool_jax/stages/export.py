"""Export of a run's weights to a folder that other programs can load.

In: a run with weights. Out: `--output`, or `merged/` or `adapter/` in the phase's folder: a whole Hugging Face model
with tokenizer, template and generation settings, or adapters for PEFT. The folder appears only when it is complete.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from itool_jax.config import Config
from itool_jax.model import export, hf, peft, quantize, stacking
from itool_jax.model.lora import merge_adapters
from itool_jax.model.transformer import Params
from itool_jax.store.base import load_base, model_folder, tokenizer_folder
from itool_jax.store.paths import WARMUP, trained_phases
from itool_jax.store.run import Run
from itool_jax.store.sources import MODEL, check_sources
from itool_jax.store.weights import Weights, merged_phases, restore_trained
from itool_jax.system.gguf import is_gguf
from itool_jax.system.messages import log
from itool_jax.system.progress import progress
from itool_jax.system.untrusted import inside
from itool_jax.text import gguf
from itool_jax.text.chat import Chat
from itool_jax.text.tool_formats import describe

SERVING = "SERVING.md"


def run(run: Run) -> dict[str, Any]:
    """Writes the folder; returns its path."""
    config = run.config
    phases = trained_phases(config.run_dir)
    if not phases:
        run.policy(WARMUP).require()
    phase = config.export.phase or phases[-1]
    if phase not in phases:
        raise ValueError(
            f"export.phase={phase} has no weights in {config.run_dir}; phases with weights: {', '.join(phases)}"
        )
    check_sources(config, MODEL)  # adapters only fit the base they were trained with
    target = config.output or config.run_dir / phase / config.export.kind
    _refuse_to_replace(config, target)
    with _whole_folder(target) as partial:
        if config.export.kind == "adapter":
            _write_adapter(config, phase, partial)
        else:
            _write_merged(config, phase, partial)
        (partial / SERVING).write_text(_serving(run.base.chat, config), encoding="utf-8")
    log(f"wrote the weights of {phase} to {target}; {SERVING} there says how to serve it")
    return {"folder": str(target)}


def _serving(chat: Chat, config: Config) -> str:
    """Writes how to serve the folder so that prompts and calls are those of training."""
    merged, lora = config.export.kind == "merged", f"--max-lora-rank={max(config.lora.rank, 8)}"
    model = "MODEL" if merged else f"BASE --enable-lora --lora-modules tools=ADAPTER {lora}"
    lines = ["# Serving", "", f"The model was trained to write calls as {chat.form.name}, such as", ""]
    lines += [f"    {line}" for line in chat.form.example.splitlines()]
    if chat.form.parser:
        command = f"vllm serve {model} --enable-auto-tool-choice --tool-call-parser={chat.form.parser}"
        lines += ["", "vLLM returns them as `tool_calls` with", "", f"    {command}"]
        if not merged:  # it reads BASE's own list of them
            lines += [
                "",
                f"Answers end with one of the tokens {list(chat.stop_ids)}; if BASE does not list them all in its",
            ]
            lines += ["generation_config.json, give them as `stop_token_ids` with each request."]
    else:
        lines += ["", "vLLM has no parser for them: read them from the text of the answer."]
    if not chat.native:
        lines += [
            "",
            "In training, the system message listed the tools after the text below. Write them there yourself, instead",
            "of giving `tools` to the server:",
            "",
            *(f"    {line}" for line in describe(chat.form, (), chat.tool_style).splitlines()),
        ]
    return "\n".join(lines) + "\n"


def _write_adapter(config: Config, phase: str, target: Path) -> None:
    if config.lora.rank == 0:
        raise ValueError(
            "export.kind=adapter: this run trained all weights and has no adapters; set export.kind=merged"
        )
    if merged_phases(config, phase) != [phase]:
        raise ValueError(
            f"export.kind=adapter: with preference.merge, the adapters of {phase} apply to weights with earlier "
            "adapters merged in; set export.kind=merged"
        )
    if is_gguf(model_folder(config)):
        raise ValueError(f"export.kind=adapter: PEFT cannot load {config.model}, a GGUF file; set export.kind=merged")
    is_name = config.model != "embedded" and not Path(config.model).expanduser().exists()
    name = config.model if is_name else str(model_folder(config).resolve())  # PEFT may look for it from any folder
    peft.save_adapter(target, restore_trained(config, phase), config.lora, name)
    _copy_tokenizer(config, target)
    _write_generation_config(config, target)
    if config.quantize == "nf4":
        log(f"these adapters were trained on 4-bit weights of {name}; on its 16-bit weights, answers differ slightly")


def _write_merged(config: Config, phase: str, target: Path) -> None:
    nf4 = config.quantize == "nf4"
    if not nf4 and config.export.base is not None:
        raise ValueError("export.base is only for runs with quantize=nf4; other adapters have a single base")
    if nf4 and config.export.base is None:
        raise ValueError(
            "export.base must be original or dequantized: the weights into which adapters trained on 4-bit weights "
            "are merged"
        )
    trained = [stacking.to_run(restore_trained(config, part)) for part in merged_phases(config, phase)]
    kept = dataclasses.replace(config, quantize="none") if config.export.base == "original" else config
    base = Weights(kept).base(stacked=False) if config.lora.rank else {}
    model = dataclasses.replace(hf.read_config(model_folder(config), config.dtype), stacked=False)
    shapes, tensors = hf.checked(model_folder(config), model)

    def as_stored(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        (name,) = hf.stored_as(path, model.n_layers).names
        dtype = config.export.dtype or hf.FLOATS[tensors[name].dtype]
        return jax.ShapeDtypeStruct(shape.shape, jnp.dtype(dtype))

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> Any:
        """Computes one weight, at the time it is written; adapters are merged in float32, so it is rounded once."""
        advance(1)
        keys = [part.key for part in path]
        if config.lora.rank == 0:
            return _at(trained[0], keys)
        weight = _at(base, keys)
        if isinstance(weight, dict):
            weight = quantize.dequantize(quantize.Codes(**weight), shape.shape[0], config.dtype)
        for part in trained:
            adapters = _at(part, keys[:-1])
            if keys[-1] == "kernel" and adapters is not None:
                weight = merge_adapters({"kernel": weight.astype(jnp.float32)}, adapters, config.lora)["kernel"]
        return weight

    raw = hf.raw_config(model_folder(config))
    with progress("export", len(jax.tree.leaves(shapes))) as advance:
        export.save(target, jax.tree.map_with_path(as_stored, shapes), raw, leaf, config.export.shard_gigabytes * 1e9)
    _copy_tokenizer(config, target)
    _write_generation_config(config, target)


def _at(tree: Params, keys: list[Any]) -> Any:
    """Returns the value under the keys, or None if there is none."""
    for key in keys:
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _copy_tokenizer(config: Config, target: Path) -> None:
    folder = tokenizer_folder(config)
    if is_gguf(folder):
        gguf.save_tokenizer(folder, target)
        return
    for name in hf.COPIED:
        if (file := inside(folder, name)).is_file():
            shutil.copy(file, target / name)
    for path in sorted((folder / hf.TEMPLATES).glob("*.jinja")):
        (target / hf.TEMPLATES).mkdir(exist_ok=True)
        shutil.copy(inside(folder, f"{hf.TEMPLATES}/{path.name}"), target / hf.TEMPLATES)


def _write_generation_config(config: Config, target: Path) -> None:
    """Writes the base's generation config with all stop tokens as EOS, so that servers stop where training did."""
    file = model_folder(config) / "generation_config.json"
    stop_ids = load_base(config).chat.stop_ids  # rejects a damaged generation config
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    content["eos_token_id"] = list(stop_ids)
    (target / file.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _refuse_to_replace(config: Config, target: Path) -> None:
    """Raises ValueError if the target exists, unless --overwrite is set and it is an earlier export."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not config.overwrite:
        raise ValueError(f"output {target} exists; choose another --output, or replace it with --overwrite")
    place, model, run = target.resolve(), model_folder(config).resolve(), config.run_dir.resolve()
    kinds = (("config.json", "model*.safetensors"), ("adapter_config.json", "adapter_model.safetensors"))
    exported = any((place / name).is_file() and any(place.glob(weights)) for name, weights in kinds)
    if not exported or place in (model, run, *model.parents, *run.parents):
        raise ValueError(f"output {target} is not an exported model, so --overwrite does not replace it")


@contextlib.contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """Yields a temporary folder, renamed to the target, replacing any earlier one, once everything is written."""
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (target.with_name(f".{target.name}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
    try:
        partial.mkdir()
        yield partial
        if target.exists():
            target.rename(old)
        partial.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
