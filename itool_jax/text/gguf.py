"""Rebuilds the tokenizer that a GGUF file describes, so that it gives the ids of the model's original one.

In: a GGUF file. Out: a transformers tokenizer, or the files of one. transformers' own conversion ignores some
pre-tokenizers and normalizers, such as SmolLM2's digits and Qwen's NFC.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from itool_jax.system.gguf import read_header

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Values of tokenizer.ggml.token_type."""
_FOLDER = "the model's Hugging Face folder instead"
MAX_PIECE = 256
"""Longest SentencePiece token, in characters; real ones have up to 48. The time to recover its merges is quadratic."""
STOPS = ("eos", "eot", "eom")
"""Tokens that end a response, by their name in the metadata."""


class Words(NamedTuple):
    """How a byte-level tokenizer divides a text before it merges, named by `tokenizer.ggml.pre`."""

    pattern: str | None
    """None divides as GPT-2 does, after taking each digit alone."""
    whole: bool = False
    """A piece that is itself a token is not built from merges."""
    add_bos: bool = False
    nfc: bool = False


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), Words(_WORDS % "{1,3}", whole=True, add_bos=True)),
    "qwen2": Words(_WORDS % "", nfc=True),
    "smollm": Words(None),
    "tekken": Words(_CASED, whole=True, add_bos=True),
}


def load_tokenizer(path: Path) -> Any:
    """Builds the tokenizer of a GGUF file; ValueError for a kind that is not known here."""
    from transformers import PreTrainedTokenizerFast

    metadata = _metadata(path)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_build(metadata), **_settings(metadata))
    tokenizer.name_or_path = str(path)
    tokenizer.chat_template = metadata.get("chat_template")
    return tokenizer


def save_tokenizer(path: Path, folder: Path) -> None:
    """Writes the tokenizer of a GGUF file as a Hugging Face folder's tokenizer files."""
    metadata = _metadata(path)
    _build(metadata).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **_settings(metadata)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if template := metadata.get("chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def stop_ids(path: Path) -> list[int]:
    """Returns the ids of the tokens that the file says end a response."""
    metadata = _metadata(path)
    return [metadata[key] for kind in STOPS if (key := f"ggml.{kind}_token_id") in metadata]


def _metadata(path: Path) -> dict[str, Any]:
    """Returns the file's values about its tokenizer, named without `tokenizer.`; errors do not name the file."""
    metadata = {
        key.removeprefix("tokenizer."): value
        for key, value in read_header(path).metadata.items()
        if key.startswith("tokenizer.")
    }
    tokens, types = metadata.get("ggml.tokens"), metadata.get("ggml.token_type")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"it has no tokenizer; use {_FOLDER}")
    if not isinstance(types, list) or len(types) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type must have a number for each of {len(tokens)} tokens")
    for key, value in metadata.items():
        if key.endswith("_token_id") and not (type(value) is int and 0 <= value < len(tokens)):
            raise ValueError(f"tokenizer.{key}={str(value)[:40]} is not the id of one of {len(tokens)} tokens")
    if not isinstance(metadata.get("chat_template", ""), str):
        raise ValueError("tokenizer.chat_template must be a text")
    return metadata


def _settings(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that tokenizer_config.json holds."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    given = {name: metadata.get(f"ggml.{key}_token_id") for name, key in names.items()}
    special = {f"{name}_token": metadata["ggml.tokens"][i] for name, i in given.items() if i is not None}
    return {**special, "clean_up_tokenization_spaces": False}


def _build(metadata: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, processors

    kind = metadata.get("ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"tokenizer.ggml.model={kind} is not supported, only gpt2 and llama; use {_FOLDER}")
    tokens, types, add_bos = metadata["ggml.tokens"], metadata["ggml.token_type"], True
    vocabulary = {token: i for i, (token, t) in enumerate(zip(tokens, types, strict=True)) if t != UNUSED}
    if kind == "gpt2":
        pre = metadata.get("ggml.pre")
        if pre not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise ValueError(f"tokenizer.ggml.pre={pre} is not known, only {known}; use {_FOLDER}")
        words = PRE_TOKENIZERS[pre]
        add_bos = words.add_bos
        tokenizer = _byte_level(vocabulary, metadata, words)
    else:
        tokenizer = _sentence_piece(vocabulary, metadata)
    added = [
        AddedToken(token, normalized=False, special=t == CONTROL)
        for token, t in zip(tokens, types, strict=True)
        if t in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    bos = metadata.get("ggml.bos_token_id")
    if metadata.get("ggml.add_bos_token", add_bos) and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], pair=[tokens[bos], "$A", tokens[bos], "$B"], special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer


def _byte_level(vocabulary: dict[str, int], metadata: dict[str, Any], words: Words) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in metadata.get("ggml.merges") or ()]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=words.whole))
    if words.pattern is None:
        first = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(Regex(words.pattern), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words.pattern is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    if words.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentence_piece(vocabulary: dict[str, int], metadata: dict[str, Any]) -> Any:
    """Builds a SentencePiece tokenizer with byte fallback, as Hugging Face's conversion of Llama 2's does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    types, scores = metadata["ggml.token_type"], metadata.get("ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(types):
        raise ValueError(f"tokenizer.ggml.scores must have a number for each of {len(types)} tokens")
    pieces = {token: i for token, i in vocabulary.items() if types[i] == NORMAL}
    if (longest := max(map(len, pieces), default=0)) > MAX_PIECE:
        raise ValueError(f"tokenizer.ggml.tokens has a piece of {longest} characters, more than {MAX_PIECE}")
    unknown = metadata["ggml.tokens"][metadata.get("ggml.unknown_token_id", 0)]
    merges = _merges(pieces, scores)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    space, prefix = "▁", metadata.get("ggml.add_space_prefix", True)
    as_space = normalizers.Replace(" ", space)
    if "[INST]" in vocabulary and prefix:
        # Mistral's tokenizers from v2 on write turns as tokens, and no space after one; others begin each part with it.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(space, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), as_space] if prefix else [as_space])
    steps = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer


def _merges(pieces: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Recovers merges from the pieces' scores: every way to put a piece together, the best piece first."""
    merges = [
        (scores[i], len(left), len(right), left, right)
        for piece, i in pieces.items()
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in pieces and (right := piece[cut:]) in pieces
    ]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [(left, right) for *_, left, right in merges]
