"""The base checkpoint of a run: the location of its files, its shapes, tokenizer and chat template."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

from itool_jax.config import Config
from itool_jax.model import hf
from itool_jax.model.sharding import use_own_mesh
from itool_jax.model.transformer import ModelConfig
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
    """Returns the folder of tokenizer and template: the adapter's if it brings its own, else the model's."""
    adapter = config.adapter
    return adapter if adapter is not None and (adapter / "tokenizer.json").is_file() else model_folder(config)


def load_base(config: Config) -> Base:
    """Returns the checkpoint's shapes and tokenizer, read once; ValueError if they do not match."""
    shown = config.tool_format, config.tool_style
    folders = model_folder(config), tokenizer_folder(config)
    base = _load(*folders, config.dtype, config.quantize == "nf4", config.remat, *shown)
    if (n := base.chat.n_ids) > base.config.vocab_size:
        raise ValueError(
            f"tokenizer of {config.model} has {n} tokens, but the model has only {base.config.vocab_size} embeddings"
        )
    return base


@functools.lru_cache(maxsize=2)
def _load(
    folder: Path, tokenizer: Path, dtype: str, nf4: bool, remat: str, tool_format: ToolFormat, tool_style: ToolStyle
) -> Base:
    model = hf.read_config(folder, dtype)
    remat = ("layers" if model.n_layers > DEEP else "none") if remat == "auto" else remat
    chat = Chat(load_tokenizer(str(tokenizer)), tool_format, tool_style, model=folder)
    return Base(dataclasses.replace(model, nf4=nf4, remat=remat), chat)


def step_table(config: Config, granularity: Granularity) -> StepTable:
    """Builds the table of step boundaries and stop tokens for the model's vocabulary."""
    base = load_base(config)
    with use_own_mesh(config.mesh):
        chat = base.chat
        return build_step_table(chat.tokenizer, granularity, base.config.vocab_size, chat.stop_ids, chat.form)
