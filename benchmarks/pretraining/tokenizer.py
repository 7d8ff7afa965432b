"""Builds the embedded checkpoint's tokenizer and chat template from the generator's words.

A word, a digit or a run of punctuation is cut greedily into the longest known pieces, so that a name has the same ids
everywhere and copying it is copying ids. Every byte is a fallback piece, so any text survives a round trip.
"""

import json
from pathlib import Path
from typing import Any

from itool_jax.data import lexicon

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|tools|>", "<|assistant|>", "<|tool|>", "<|unknown|>")
# A space belongs to the small word after it; types include the punctuation around them.
SMALL_WORDS = (
    "a and then also the in on at by to for of from with without as is it you i any please can could want need help "
    "me not do that only"
).split()
TYPES = ("string", "integer", "number", "boolean", "array", "object")
OTHER_WORDS = (
    "None tools None none kindly should same result results code off on True False correct incorrect or so far "
    "Candidate answer Reply your Is A B C D fully mostly wrong now yes no"
).split()
SIGNS = '[ ] ( ) { } = =" " \' , . : ; | _ - + * / ? ! < > @ # $ % & ~ ^ `'.split()
PUNCTUATION = (*SIGNS, '", ', ", ", '"), ', "), ", ")]", '")]', "]", '"]', "()", "()]", "(), ", ": ")
# Runs are cut at 64 characters, because finding the pieces of one takes cubic time.
PATTERN = (
    r":(?:" + "|".join(TYPES) + r")\??(?:, |\)\n)?"
    r"| (?:" + "|".join(SMALL_WORDS) + r")(?![A-Za-z0-9])"
    r"|[A-Za-z]{1,64}|[0-9]|\n| |[^\sA-Za-z0-9]{1,64} ?|\s"
)

# The tools follow the first question, so that each tool can be read in the light of what is asked.
TEMPLATE = """\
{%- set seen = namespace(question=false) -%}
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
{%- if tools and message.role == 'user' and not seen.question -%}
{%- set seen.question = true -%}
<|tools|>
{%- for tool in tools -%}
{%- set f = tool.function if tool.function is defined else tool -%}
{{ f.description + ': ' if f.description }}{{ f.name }}(
{%- for name, p in f.parameters.properties.items() -%}
{{ name }}{{ '=' ~ p.default if p.default is defined }}{{ '|' + p.enum | join('|') if p.enum is defined }}:{{ p.type -}}
{{ '' if name in f.parameters.required | default([]) else '?' }}{{ '' if loop.last else ', ' }}
{%- endfor -%}
)
{% endfor -%}
<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""


def pieces() -> list[str]:
    """Returns the known pieces of text, in their fixed order."""
    types = [f":{t}{q}{end}" for t in TYPES for q in ("", "?") for end in ("", ", ", ")\n")]
    names = [*lexicon.NAME_STARTS, *lexicon.NAME_ENDS]
    spoken = {w for group in (lexicon.OPENINGS, lexicon.JOINTS) for text in group for w in text.split() if w.isalpha()}
    spoken |= {w for d in lexicon.PRETRAINING_DOMAINS + lexicon.TASK_DOMAINS for w in _phrase_words(d)}
    texts = [*types, *PUNCTUATION, *(f" {w}" for w in SMALL_WORDS), *SMALL_WORDS, *OTHER_WORDS]
    texts += [*names, *sorted(spoken), *lexicon.words()]
    return list(dict.fromkeys(texts))


def _phrase_words(domain: lexicon.Domain) -> set[str]:
    phrases = " ".join(phrase for p in domain.parameters for phrase in p.phrases)
    return {word for word in phrases.split() if word.isalpha()}


def build() -> Any:
    """Builds a `tokenizers.Tokenizer`: greedy longest pieces over bytes written as printable characters."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    printable = ["".join(piece for piece, _ in as_bytes.pre_tokenize_str(text)) for text in pieces()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: i for i, text in enumerate(dict.fromkeys([*SPECIAL, *printable, *alphabet]))}
    model = models.WordPiece(
        vocabulary, unk_token="<|unknown|>", continuing_subword_prefix="", max_input_chars_per_word=100_000
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def save(folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja, as any checkpoint has them."""
    folder.mkdir(parents=True, exist_ok=True)
    build().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|pad|>",
        "eos_token": "<|end|>",
        "unk_token": "<|unknown|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
