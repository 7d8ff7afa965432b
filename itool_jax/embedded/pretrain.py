"""Trains the embedded checkpoint from nothing: `python -m itool_jax.embedded.pretrain --output DIR`.

Out: a Hugging Face folder (config.json, model.safetensors, tokenizer, chat template, model card with the measured
accuracy). The corpus is `data.generated`'s pretraining part: short samples first, then all; in the second half also
questions of self-evaluation, about answers spoiled by hand and about the model's own answers.
"""

import dataclasses
import functools
import json
import queue
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

from itool_jax import losses
from itool_jax.data.generated import make_sample
from itool_jax.data.records import Sample
from itool_jax.embedded import tokenizer as embedded_tokenizer
from itool_jax.embedded.structured_start import structured_start
from itool_jax.metrics import say
from itool_jax.model import hf
from itool_jax.model.transformer import ModelConfig, Params, abstract
from itool_jax.replay import curriculum, sample_features
from itool_jax.sampler import GenerateSettings, Policy, respond
from itool_jax.text import chat as chat_format
from itool_jax.text import padding
from itool_jax.text.chat import Chat, Encoded
from itool_jax.text.steps import build_step_table, split_steps
from itool_jax.train import TrainState, train_step

SPOILED_SHARE, OWN_SHARE = 0.12, 0.15  # of all rows: self-evaluation of answers spoiled by hand; of the model's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How the embedded checkpoint is trained."""

    output: Path
    """Folder of the new checkpoint."""
    seed: int = 0
    """Seed of weights, corpus and order."""
    tokens: float = 18e6
    """Tokens to train on, padding included."""
    short_tokens: float = 3e6
    """Tokens in the beginning that come from short samples only."""
    learning_rate: float = 2e-3
    """Highest learning rate of AdamW."""
    tokens_per_batch: int = 2048
    """Tokens in a batch, padding included."""


def model_config(vocab_size: int) -> ModelConfig:
    """The embedded architecture: about a million weights."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=144,
        intermediate_size=320,
        n_layers=4,
        n_heads=6,
        n_kv_heads=6,
        head_dim=32,
        rms_norm_eps=1e-5,
        rope_theta=1e8,
        tie_embeddings=True,
        qkv_bias=False,
        max_length=1024,
    )


def raw_config(config: ModelConfig, chat: Chat) -> dict[str, object]:
    """The config.json that reads back as `config`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": config.max_length,
        "eos_token_id": chat.end_of_turn,
        "pad_token_id": chat.tokenizer.pad_token_id,
        "torch_dtype": "float32",
    }


class Corpus:
    """An endless stream of batches, made in a thread of its own."""

    def __init__(self, chat: Chat, settings: Settings, vocab_size: int):
        self.chat, self.settings = chat, settings
        self.table = build_step_table(chat.tokenizer, "call", vocab_size, chat.stop_ids)
        self.letters = chat_format.answer_ids(chat, "AB")
        self.own: list[tuple[Encoded, list[int], bool]] = []
        self.short_only, self.spoiled = True, False

    def row(self, index: int) -> tuple[list[int], list[int]]:
        """Prompt and target of one row: a sample, or a question about an answer to it."""
        rng = random.Random(f"{self.settings.seed}/{index}/row")
        draw = rng.random()
        if self.own and draw < OWN_SHARE:
            return self.question(rng, *rng.choice(self.own))
        encoded = chat_format.encode_sample(self.chat, make_sample("pretraining", index, self.settings.seed))
        if self.spoiled and draw < OWN_SHARE + SPOILED_SHARE:
            other = make_sample("pretraining", index + 1, self.settings.seed)
            right = rng.random() < 0.5
            candidate = encoded.target_ids if right else self.spoil(rng, encoded, other)
            return self.question(rng, encoded, candidate[:-1], right)
        return encoded.prompt_ids, encoded.target_ids

    def spoil(self, rng: random.Random, encoded: Encoded, other: Sample) -> list[int]:
        """A wrong answer near the right one: a word of it changed, dropped or doubled, or another sample's answer."""
        ids = list(encoded.target_ids)
        place = rng.randrange(1, len(ids) - 1)
        kind = rng.randrange(4)
        if kind == 0:
            ids[place] = rng.choice(encoded.prompt_ids)
        elif kind == 1:
            del ids[place]
        elif kind == 2:
            steps = split_steps(self.table, ids)
            ids = [token for step in steps for token in step * (2 if step is steps[0] else 1)]
        else:
            ids = self.chat.target_ids(other.target)
        return ids if ids != encoded.target_ids else [*ids[:-2], ids[-1]]

    def question(
        self, rng: random.Random, encoded: Encoded, answer: list[int], right: bool
    ) -> tuple[list[int], list[int]]:
        """A question of self-evaluation about a whole answer or its first steps, and the letter that answers it."""
        gold = encoded.target_ids[:-1]
        steps = split_steps(self.table, answer)
        shown = [t for step in steps[: rng.randint(1, len(steps))] for t in step] if rng.random() < 0.5 else answer
        right = right or shown == gold[: len(shown)]
        before, after = chat_format.evaluation_frame(self.chat, gold)
        letter = self.letters[0 if right else 1]
        return encoded.prompt_ids + before + shown + after, [letter, self.chat.end_of_turn]

    def batches(self) -> Iterator[padding.TargetBatch]:
        """Shuffled batches of rows of similar width, for ever."""
        index, window = 0, 768
        while True:
            rows = [self.row(i) for i in range(index, index + window)]
            index += window
            widths = [padding.target_width(len(p), len(t), smallest=64) for p, t in rows]
            made = []
            for chosen, width, count in padding.group(widths, self.settings.tokens_per_batch):
                if len(chosen) == count and width <= (96 if self.short_only else 384):
                    made.append(padding.collate([rows[i] for i in chosen], width, count))
            random.Random(index).shuffle(made)
            yield from made


def prefetched(batches: Iterator[padding.TargetBatch], depth: int = 8) -> Iterator[padding.TargetBatch]:
    """The same batches, made ahead in a thread."""
    ready: queue.Queue = queue.Queue(depth)

    def work() -> None:
        for batch in batches:
            ready.put(batch)

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield ready.get()


def sft_loss(graph, trainable: Params, frozen: Params, batch: padding.TargetBatch):
    """Mean NLL over target tokens."""
    del frozen
    model = nnx.merge(graph, trainable)
    hidden_BRD = model.hidden_at(batch.tokens_BT, batch.positions_BR)
    log_probs_BR = losses.token_log_probs(hidden_BRD, model.unembedding(), batch.targets_BR)
    total, count = losses.sft_loss(log_probs_BR, batch.mask_BR)
    return total / count, {}


def held_out(count: int, chat: Chat, seed: int) -> tuple[list[Sample], list[Encoded]]:
    """Samples that training never sees: names of their own, and another stream of tools."""
    samples = [make_sample("pretraining_test", i, seed) for i in range(count)]
    return samples, [chat_format.encode_sample(chat, sample) for sample in samples]


def answers(policy: Policy, corpus: Corpus, encoded: list[Encoded], temperature: float) -> list[list[int]]:
    """The model's answers, end of turn removed."""
    settings = GenerateSettings(max_tokens=96, temperature=temperature)
    found = respond(policy, corpus.table, [(e.id, e.prompt_ids) for e in encoded], settings, max_length=1024, seed=1)
    return [[t for t in ids if t != corpus.chat.end_of_turn] for ids in found]


def judge_own(policy: Policy, corpus: Corpus, start: int, count: int) -> list[tuple[Encoded, list[int], bool]]:
    """The model's own answers to training samples at temperature 1, half of them wrong where there are enough."""
    samples = [make_sample("pretraining", i, corpus.settings.seed) for i in range(start, start + count)]
    encoded = [chat_format.encode_sample(corpus.chat, sample) for sample in samples]
    found = answers(policy, corpus, encoded, temperature=1.0)
    judged = [(e, ids, ids == e.target_ids[:-1]) for e, ids in zip(encoded, found, strict=True) if ids]
    wrong = [row for row in judged if not row[2]]
    right = [row for row in judged if row[2]]
    return wrong + right[: max(len(wrong), count // 4)]


def accuracy(policy: Policy, corpus: Corpus, count: int) -> dict[str, float]:
    """Exact answers on held-out samples: overall, thirds by difficulty, irrelevance, multi-turn."""
    samples, encoded = held_out(count, corpus.chat, corpus.settings.seed)
    found = answers(policy, corpus, encoded, temperature=0.0)
    right = {e.id: ids == e.target_ids[:-1] for e, ids in zip(encoded, found, strict=True)}
    calls = [s for s in samples if s.category != "irrelevance"]
    thirds = curriculum([sample_features(s) for s in calls], "easy_to_hard", 0)
    parts = dict(zip(("easy", "medium", "hard"), thirds, strict=True))
    parts |= {kind: [s.id for s in samples if s.category == kind] for kind in ("irrelevance", "multi_turn")}
    return {"overall": float(np.mean(list(right.values())))} | {
        name: float(np.mean([right[i] for i in ids])) for name, ids in parts.items()
    }


def train(settings: Settings) -> None:
    """Trains, measures and writes the checkpoint."""
    embedded_tokenizer.save(settings.output)
    chat = Chat(chat_format.load_tokenizer(str(settings.output)))
    config = model_config(-(-len(chat.tokenizer) // 16) * 16)
    markers = chat.tokenizer.convert_tokens_to_ids(["<|user|>", "<|tools|>", "<|assistant|>", "<|tool|>"])
    params = jax.tree.map(jnp.asarray, structured_start(config, markers, settings.seed))
    graph = abstract(config)[0]
    corpus = Corpus(chat, settings, config.vocab_size)
    n_steps = int(settings.tokens / settings.tokens_per_batch)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, 100, n_steps, 0.05 * settings.learning_rate
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    loss = functools.partial(sft_loss, graph)
    state = TrainState(params, optimizer.init(params), jnp.int32(0))
    started, recent = time.monotonic(), []
    for step, batch in enumerate(prefetched(corpus.batches()), 1):
        corpus.short_only = step * settings.tokens_per_batch < settings.short_tokens
        corpus.spoiled = step > 0.4 * n_steps
        state, values = train_step(loss, optimizer, state, {}, batch)
        recent.append(values["loss"])
        if step % 100 == 0:
            mean = float(np.mean([float(x) for x in recent]))
            say(f"step {step}/{n_steps}  {time.monotonic() - started:.0f} s  loss {mean:.3f}")
            recent = []
        if step in (int(0.6 * n_steps), int(0.8 * n_steps)):
            corpus.own = judge_own(Policy(graph, state.trainable), corpus, start=10**7 + step, count=2048)
        if step % 1000 == 0 or step == n_steps:
            say(f"held out: {accuracy(Policy(graph, state.trainable), corpus, 600)}")
            hf.save(settings.output, state.trainable, raw_config(config, chat))
        if step == n_steps:
            break
    measured = accuracy(Policy(graph, state.trainable), corpus, 2000)
    (settings.output / "training.json").write_text(
        json.dumps(dataclasses.asdict(settings) | {"output": None, "held_out": measured}, indent=2) + "\n"
    )
    say(f"held out (2000 samples): {measured}")


if __name__ == "__main__":
    train(tyro.cli(Settings, description=__doc__))
