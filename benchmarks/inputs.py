"""Writes the benchmarks' inputs: random checkpoints as Hugging Face folders, and task files of token ids and sizes.

In: a work folder. Out: `tasks`, the paths of JSON files that every side reads, so that all do the same work.
"""

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.pretraining.tokenizer import SPECIAL, TEMPLATE
from benchmarks.protocol import Task
from itool_jax.data.generated import make_sample
from itool_jax.data.sources import load
from itool_jax.model import export, gguf, hf
from itool_jax.model.transformer import abstract
from itool_jax.store.tables import PreferenceRow, ScoreRow
from itool_jax.system.gguf import is_gguf
from itool_jax.text.calls import read_calls
from itool_jax.text.chat import Chat, Encoded, answer_ids, encode_sample, evaluation_frame, load_tokenizer
from itool_jax.text.sample import Sample, sample_row
from itool_jax.text.steps import build_step_table, split_steps
from itool_jax.training import replay

Row = dict[str, Any]

LLAMA: Row = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},  # the only type that Tunix computes
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "pad_token_id": 0,
}


def _shape(vocabulary: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Row:
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return LLAMA | sizes | {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads}


# 35 M weights; 260 M weights, a gigabyte in float32; and the smallest that vLLM takes.
MODELS = {
    "35m": _shape(8192, 512, 1664, 8, 8, 4),
    "1gb": _shape(8192, 1024, 4096, 16, 16, 8),
    "tiny": _shape(512, 64, 96, 2, 2, 1),
}

TREES = {"breadth": 3, "max_depth": 3, "n_simulations": 16, "max_step_tokens": 32, "max_last_step_tokens": 32}
LORA = {"rank": 16}
LEARNING_RATE = 1e-4
FULL: dict[str, list[Row]] = {
    "generate": [{"rows": 32, "prompt": 256, "new": 64}],
    "score": [{"rows": 64, "prompt": 256, "target": 256}],
    "search": [{"rows": n, "prompt": 512, "settings": TREES} for n in (1, 4, 16, 64)],
    "search_batched": [{"rows": 8, "prompt": 512, "candidates": 4, "new": 32}],
    "sft": [{"rows": 8, "prompt": 256, "target": 256, "steps": 2, "lora": LORA}],
    "full_sft": [{"rows": 8, "prompt": 256, "target": 256, "steps": 2, "lora": {"rank": 0}}],
    "dpo": [{"rows": 4, "prompt": 448, "step": 64, "steps": 2, "lora": LORA}],
    "import": [{"model": "1gb"}],
}
SMALL_TREES = {"breadth": 2, "max_depth": 2, "n_simulations": 3, "max_step_tokens": 6, "max_last_step_tokens": 8}
SMALL: dict[str, list[Row]] = {
    "generate": [{"rows": 2, "prompt": 24, "new": 4}],
    "score": [{"rows": 4, "prompt": 16, "target": 16}],
    "search": [{"rows": n, "prompt": 64, "settings": SMALL_TREES} for n in (1, 2)],
    "search_batched": [{"rows": 2, "prompt": 32, "candidates": 2, "new": 4}],
    "sft": [{"rows": 2, "prompt": 16, "target": 16, "steps": 2, "lora": {"rank": 2}}],
    "full_sft": [{"rows": 2, "prompt": 16, "target": 16, "steps": 2, "lora": {"rank": 0}}],
    "dpo": [{"rows": 2, "prompt": 24, "step": 8, "steps": 2, "lora": {"rank": 2}}],
    "import": [{"model": "tiny"}],
}
UNITS = {
    "generate": "tokens/s",
    "score": "tokens/s",
    "search": "states/s",
    "search_batched": "tokens/s",
    "sft": "tokens/s",
    "full_sft": "tokens/s",
    "dpo": "pairs/s",
    "import": "GB/s",
}


def tasks(work: Path, suite: str, *, small: bool) -> list[Path]:
    """Writes a suite's tasks, smallest first, and the checkpoints they need unless they exist.

    Peers run only the last task.
    """
    sizes = (SMALL if small else FULL)[suite]
    paths: list[Path] = []
    for size in sizes:
        model = checkpoint(work, size.get("model") or ("tiny" if small else "35m"))
        name = f"{suite}_{size['rows']}" if size is not sizes[-1] else suite
        task = {"name": name, "suite": suite, "unit": UNITS[suite], "sizes": size, "model": str(model), "seed": 0}
        task |= {"out": str(work), "learning_rate": LEARNING_RATE}
        path = work / "tasks" / f"{name}{'_small' if small else ''}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(task | _rows(suite, size, model)))
        paths.append(path)
    return paths


def checkpoint(work: Path, name: str) -> Path:
    """Returns a folder with random weights and a matching tokenizer."""
    folder, raw = work / "models" / name, MODELS[name]
    if not (folder / "config.json").exists():
        save_tokenizer(folder, raw["vocab_size"])
        (folder / "config.json").write_text(json.dumps(raw))
        params = random_params(folder)
        (folder / "config.json").unlink()  # written last: it marks a complete folder
        export.save(folder, params, raw)
    return folder


def random_params(folder: Path) -> Any:
    """Makes weights whose logits spread by two or three nats, so that greedy tokens are seldom close."""
    _, shapes, _ = abstract(hf.read_config(folder, "float32"))
    rng = np.random.default_rng(0)

    def make(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> np.ndarray:
        if not (width := spread(path, x.shape)):
            return np.ones(x.shape, np.float32)
        return rng.standard_normal(x.shape, np.float32) * np.float32(width)

    return jax.tree.map_with_path(make, shapes)


def spread(path: tuple[Any, ...], shape: tuple[int, ...]) -> float:
    """Returns the standard deviation of a random weight; 0 for the scale of a norm, which is 1."""
    if path[-1].key == "scale":
        return 0.0
    return {"embedding": shape[-1] / 6, "lm_head": shape[0] / 6}.get(path[-1].key, shape[-2]) ** -0.5


def save_tokenizer(folder: Path, size: int) -> None:
    """Saves byte-pair pieces of generated samples, as many as the model has ids, and the embedded model's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    texts = (json.dumps(sample_row(make_sample("train", i, 0))) for i in range(6000 if size > 1000 else 100))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([f"<extra {i}>" for i in range(size - tokenizer.get_vocab_size())])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|pad|>", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def _rows(suite: str, size: Row, model: Path) -> Task:
    """Returns the token ids of a task, the same in every run."""
    if suite == "import":
        return {}
    if suite == "search":
        return search_rows(size, model)
    rng = np.random.default_rng(0)

    def ids(length: int) -> list[list[int]]:
        # The special tokens come first.
        high = json.loads((model / "config.json").read_text())["vocab_size"]
        return rng.integers(len(SPECIAL), high, (size["rows"], length)).tolist()

    parts = {"prompts": ids(size["prompt"])}
    if "target" in size:
        parts["targets"] = ids(size["target"])
    if "step" in size:
        parts |= {"chosen": ids(size["step"]), "rejected": ids(size["step"])}
    return parts


def search_rows(size: Row, model: Path) -> Task:
    """Returns samples answered by calls, with prompts of equal length and all a program without itool_jax needs."""
    chat = Chat(load_tokenizer(str(model)))
    table = build_step_table(chat.tokenizer, "call", len(chat.tokenizer), chat.stop_ids)
    problems = []
    for sample in _samples(size["rows"]):
        encoded = encode_sample(chat, sample)
        frame = evaluation_frame(chat, chat.content_ids(encoded.target_ids))
        problem = {"prompt_ids": _fit(encoded.prompt_ids, size["prompt"]), "target_ids": encoded.target_ids}
        steps = split_steps(table, encoded.target_ids)
        problems.append(problem | {"sample": sample_row(sample), "gold_steps": steps, "frame": frame._asdict()})
    return {"problems": problems, "letters": answer_ids(chat, "AB"), "stop_ids": list(chat.stop_ids)}


def _samples(count: int) -> Iterator[Sample]:
    """Yields samples whose answer is calls, with enough tools for any prompt length."""
    generated = (make_sample("train", i, 1) for i in range(10_000))
    for i, sample in zip(range(count), (s for s in generated if s.category == "calls"), strict=False):
        rng = random.Random(i)
        others = [make_sample("train", rng.randrange(10_000), 2).tools for _ in range(24)]
        tools = (*sample.tools, *(tool for group in others for tool in group))
        yield Sample(id=sample.id, messages=sample.messages, tools=tools, target=sample.target)


def _fit(ids: list[int], length: int, tail: int = 8) -> list[int]:
    """Cuts a prompt to a length, keeping its end."""
    assert len(ids) >= length, f"a prompt of {len(ids)} tokens is shorter than {length}"
    return [*ids[: length - tail], *ids[-tail:]]


# Rows of real lengths ----------------------------------------------------------------------------------------


def real_rows(s: Any, work: Path, training: Row) -> dict[str, list[int]]:
    """Writes the inputs of `benchmarks.real_lengths`; returns the lengths of the prompts of each work.

    For the program: a data file per command, and `tables.json`, the tables that search and preference training read.
    For transformers: `tasks.json` with the same rows as token ids, the settings `training`, and the model as a folder.
    """
    place = hf.find(s.model)
    chat = Chat(load_tokenizer(str(place)))
    samples = sorted((x for x in load(s.data) if len(read_calls(x.target) or ()) == 1), key=lambda x: x.id)
    for_training, for_search = replay.split(
        samples[s.rows :], 1 - replay.ReplaySettings().replay_fraction, "replay", seed=0
    )
    scored = list(map(_with_tools, samples[: s.rows], itertools.cycle(s.tools)))
    trained = list(map(_with_tools, for_training[: s.train], itertools.cycle(s.train_tools)))
    searched = list(map(_with_tools, for_search[: s.searched], itertools.cycle(s.tools)))
    encoded = {sample.id: encode_sample(chat, sample) for sample in (*scored, *trained, *searched)}
    shortest = min(scored, key=lambda sample: len(encoded[sample.id].prompt_ids))
    files = {"start": [shortest], "score": scored, "generate": scored[: s.answers], "train": trained + searched}
    for name, chosen in files.items():
        (work / f"{name}.jsonl").write_text("".join(json.dumps(sample_row(sample)) + "\n" for sample in chosen))

    parts = replay.curriculum([replay.sample_features(sample) for sample in trained], "easy_to_hard", 0)
    gold = [encoded[sample.id] for sample in trained]
    pairs = [(gold[i % len(gold)], gold[(i + 1) % len(gold)].target_ids) for i in range(s.pairs)]
    rows = {name: [_ids(encoded[sample.id]) for sample in files[name]] for name in ("start", "score", "generate")}
    rows["warmup"] = [[_ids(encoded[i]) for i in part] for part in parts]
    rows["dpo"] = [[_ids(row), {"prompt": row.prompt_ids, "target": rejected}] for row, rejected in pairs]
    folder = _as_folder(place, work / "model")
    (work / "tasks.json").write_text(
        json.dumps({"model": str(folder), "stop": chat.stop_ids, "max_tokens": s.max_tokens, **training, **rows})
    )
    tables = {
        "scores.jsonl": [ScoreRow(x.id, 0, 0.0, 1.0, rank, 0, 0)._asdict() for rank, x in enumerate(searched)],
        "pairs.jsonl": [_pair(i, row, rejected)._asdict() for i, (row, rejected) in enumerate(pairs)],
        "answers.jsonl": [],
    }
    (work / "tables.json").write_text(json.dumps(tables))
    named = {"score": scored, "training": trained, "search": searched}
    return {name: [len(encoded[sample.id].prompt_ids) for sample in chosen] for name, chosen in named.items()}


def _with_tools(sample: Sample, n: int) -> Sample:
    """Returns the sample with n of its tools, the one it calls among them."""
    called = [call.name for call in read_calls(sample.target) or ()]
    first = sorted(sample.tools, key=lambda tool: tool["function"]["name"] not in called)[:n]
    return dataclasses.replace(sample, tools=tuple(tool for tool in sample.tools if tool in first))


def _ids(row: Encoded) -> Row:
    return {"prompt": row.prompt_ids, "target": row.target_ids}


def _pair(number: int, row: Encoded, rejected: Sequence[int]) -> PreferenceRow:
    """Makes a row of pairs.jsonl in which only the token ids matter."""
    texts, ids = ("", "", ""), (row.prompt_ids, row.target_ids, list(rejected))
    return PreferenceRow(str(number), *texts, *ids, 1.0, 0.0, 1, 1, row.id, 0, 1, 2, 1.0, -1.0)


def _as_folder(place: Path, folder: Path) -> Path:
    """Returns a model's folder; writes one, without tokenizer, for a GGUF file, which transformers reads slowly."""
    if not is_gguf(place):
        return place
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(gguf.raw_config(place)))
    shapes = {name: shape for name, (shape, _) in gguf.tensors(place).items()}
    weights = {name: gguf.read(place, name, (slice(None),) * len(shape)) for name, shape in shapes.items()}
    contiguous = {name: np.ascontiguousarray(x) for name, x in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
