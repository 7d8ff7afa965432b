"""The base checkpoint of a run: the location of its files, its shapes, tokenizer and chat template."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax

from itool_jax.config import Config
from itool_jax.model import hf
from itool_jax.model.sharding import use_own_mesh
from itool_jax.model.transformer import ModelConfig
from itool_jax.system.allocator import release_freed_memory
from itool_jax.text.chat import Chat, load_tokenizer
from itool_jax.text.steps import Granularity, StepTable, build_step_table
from itool_jax.text.tool_formats import ToolFormat, ToolStyle

DEEP = 8
"""With more layers than this, remat=auto recomputes whole layers in the backward pass."""


class Base(NamedTuple):
    """A checkpoint without its weights; `store.weights` owns those."""

    config: ModelConfig
    chat: Chat


def model_folder(config: Config) -> Path:
    """Returns the folder that holds the model's files, or its GGUF file."""
    return _find_model(config.model, not config.looks_only, config.stage != "doctor")


@functools.lru_cache(maxsize=1)
def _find_model(name: str, weights: bool, fetch: bool) -> Path:
    return Path(__file__).parent.parent / "embedded" / "model" if name == "embedded" else hf.find(name, weights, fetch)


def tokenizer_folder(config: Config) -> Path:
    """Returns the folder of tokenizer and template: the adapter's if it brings its own, else the model's.

    Raises:
        ValueError: the adapter brings a template without a tokenizer, which would be ignored.
    """
    adapter = config.adapter
    if adapter is None or (adapter / "tokenizer.json").is_file():
        return adapter or model_folder(config)
    if lone := [name for name in ("chat_template.jinja", "tokenizer.model") if (adapter / name).is_file()]:
        raise ValueError(
            f"{adapter / lone[0]} has no tokenizer.json beside it; copy that of the model there, or remove it"
        )
    return model_folder(config)


def load_base(config: Config) -> Base:
    """Returns the checkpoint's shapes and tokenizer, read once; ValueError if they do not match."""
    shown = config.tool_format, config.tool_style
    folders = model_folder(config), tokenizer_folder(config), config.adapter
    base = _load(*folders, config.dtype, config.quantize == "nf4", config.remat, *shown)
    if (n := base.chat.n_ids) > base.config.vocab_size:
        raise ValueError(
            f"tokenizer of {config.model} has {n} tokens, but the model has only {base.config.vocab_size} embeddings"
        )
    return base


@functools.lru_cache(maxsize=2)
def _load(
    folder: Path,
    tokenizer: Path,
    adapter: Path | None,
    dtype: str,
    nf4: bool,
    remat: str,
    tool_format: ToolFormat,
    tool_style: ToolStyle,
) -> Base:
    model = hf.read_config(folder, dtype)
    remat = ("layers" if model.n_layers > DEEP else "none") if remat == "auto" else remat
    chat = Chat(load_tokenizer(str(tokenizer)), tool_format, tool_style, (folder, adapter) if adapter else (folder,))
    return Base(dataclasses.replace(model, nf4=nf4, remat=remat), chat)


def step_table(config: Config, granularity: Granularity) -> StepTable:
    """Builds the table of step boundaries and stop tokens for the model's vocabulary."""
    base = load_base(config)
    with use_own_mesh(config.mesh):
        chat = base.chat
        return build_step_table(chat.tokenizer, granularity, base.config.vocab_size, chat.stop_ids, chat.form)


def let_go_of_programs(base: Base) -> None:
    """Frees the compiled programs so far if the model is deep and runs on a CPU.

    A program of 30 layers keeps 50 MB of host memory and leaves more in freed pieces; a search has some 30. One that
    is used again comes from the compilation cache. Beside accelerators, hosts have memory to spare.
    """
    if jax.default_backend() == "cpu" and base.config.n_layers > DEEP:
        jax.clear_caches()
        release_freed_memory()
