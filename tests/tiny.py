"""A two-layer Llama, a byte tokenizer and the folder that holds both, as small as the code allows; and small rows.

In: changes to the configuration, a seed. Out: a configuration, weights with no zero, one or symmetry in them
(so that a forgotten bias or norm shows), a tokenizer with a chat template, or a complete model folder.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from itool_jax.inference.sampler import Policy
from itool_jax.model import export, hf
from itool_jax.model.transformer import ModelConfig, Params, abstract
from itool_jax.text.chat import load_tokenizer

T = TypeVar("T")

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|tools|>")
MERGED = ("),", ")]", ", ")
VOCABULARY = 272  # 256 bytes, the merged pieces, the special tokens, and a few ids that no token has
RAW_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
TEMPLATE = """\
{%- for message in messages -%}
<|{{ message.role }}|>{{ message.content }}
{%- if message.tool_calls -%}
[
{%- for call in message.tool_calls -%}
{{ call.function.name }}(
{%- for name, value in call.function.arguments | items -%}
{{ name }}=
{%- set word = 'True' if value is true else 'False' if value is false else 'None' if value is none -%}
{{ word or value | tojson }}{{ '' if loop.last else ', ' }}
{%- endfor -%}
){{ '' if loop.last else ', ' }}
{%- endfor -%}
]
{%- endif -%}
<|end|>
{%- if tools and loop.first -%}<|tools|>{{ tools | tojson }}<|end|>{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
_CALLS = TEMPLATE[TEMPLATE.index("[\n") : TEMPLATE.index("{%- endif -%}\n<|end|>")]


def tagged(template: str) -> str:
    """Changes this template, or the embedded model's, to write calls as Qwen's templates do."""
    assert _CALLS in template
    calls = """\
{%- for call in message.tool_calls -%}
{{ '\\n' if message.content or not loop.first }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor -%}
"""
    return template.replace(_CALLS, calls)


TAGGED_TEMPLATE = tagged(TEMPLATE)

# One of each for the rows of data files: a tool, a question, a call.
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}},
}
USER = {"role": "user", "content": "q"}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def raw_config(**changes: Any) -> dict[str, Any]:
    """The content of config.json, with changes to it."""
    return RAW_CONFIG | changes


def model_config(folder: Path, dtype: str = "float32", **changes: Any) -> ModelConfig:
    """The configuration as it is read from a config.json that is written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw_config(**changes)))
    return hf.read_config(folder, dtype)


def random_params(config: ModelConfig, seed: int = 0) -> Params:
    """Weights whose logits are spread by two or three nats; norms and biases are random too."""

    def spread(path: tuple[Any, ...], x: jax.Array) -> np.ndarray:
        noise = np.random.default_rng([seed, *str(path).encode()]).normal(size=x.shape)
        name = path[-1].key
        if name in ("embedding", "lm_head"):
            return noise * 2.5 * config.hidden_size**-0.5
        if name == "kernel":
            return noise * x.shape[-2] ** -0.5
        return 0.5 * noise + (name == "scale")

    _, shapes, _ = abstract(config)
    params = jax.tree.map_with_path(spread, shapes)
    return jax.tree.map(lambda x: jnp.asarray(x, config.dtype), params)


def make_policy(config: ModelConfig, seed: int = 0) -> Policy:
    """A model of random weights, ready to run."""
    return Policy(abstract(config)[0], random_params(config, seed))


def in_order(batches: Iterable[list[tuple[int, T]]]) -> list[T]:
    """The values of all rows that come in batches of (index, value), by index."""
    by_index = dict(itertools.chain.from_iterable(batches))
    return [by_index[i] for i in range(len(by_index))]


def save_tokenizer(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = [as_bytes.pre_tokenize_str(text)[0][0] for text in MERGED]
    merges = [(piece[0], piece[1]) for piece in pieces]
    vocabulary = {text: i for i, text in enumerate([*sorted(as_bytes.alphabet()), *pieces])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = as_bytes
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "eos_token": "<|end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": RAW_CONFIG["max_position_embeddings"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def tiny_checkpoint(folder: Path, *, seed: int = 0, talkative: bool = True, **changes: Any) -> Path:
    """Writes a complete model folder, with changes to its config.json, and returns it.

    One that is not `talkative` likes to end its responses.
    """
    save_tokenizer(folder)
    params = random_params(model_config(folder, **changes), seed)
    if not talkative:
        end = load_tokenizer(str(folder)).eos_token_id
        params = params | {"embedding": params["embedding"].at[end].multiply(2.0)}
    export.save(folder, params, raw_config(**changes))
    return folder
