"""Trains the embedded checkpoint from scratch: `python -m benchmarks.pretraining.pretrain --output DIR`.

Out: a Hugging Face folder (config.json, model.safetensors, tokenizer, chat template, model card with the measured
accuracy). The corpus is `data.generated`'s pretraining part: short samples first, then all. From 0.4 of the steps on it
also has self-evaluation questions about answers spoiled by rules, from 0.6 on also about the model's own answers.
"""

import dataclasses
import itertools
import queue
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

from benchmarks.pretraining import tokenizer as embedded_tokenizer
from benchmarks.pretraining.structured_start import structured_start
from itool_jax.data.generated import make_sample
from itool_jax.evaluation.statistics import standard_error
from itool_jax.inference.sampler import GenerateSettings, Policy, generate
from itool_jax.model import export, hf
from itool_jax.model.transformer import ModelConfig, abstract
from itool_jax.system.messages import log
from itool_jax.text import chat as chat_format
from itool_jax.text import padding
from itool_jax.text.chat import Chat, Encoded
from itool_jax.text.sample import Sample
from itool_jax.text.steps import build_step_table, split_steps
from itool_jax.training.loop import TrainState, sft_loss, train_step
from itool_jax.training.replay import curriculum, sample_features

SPOILED_SHARE, OWN_SHARE = 0.12, 0.15  # shares of rows that evaluate spoiled answers, and the model's own answers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Training options of the embedded checkpoint."""

    output: Path
    """Folder for the new checkpoint."""
    start: Path | None = None
    """Folder of a checkpoint of this script to train further. Without one, training begins from a structured start."""
    seed: int = 0
    """Seed of weights, corpus and order."""
    tokens: float = 18e6
    """Tokens to train on, including padding."""
    short_tokens: float = 3e6
    """Tokens at the beginning that come from short samples only; at most 0.4 of `tokens`."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    tokens_per_batch: int = 2048
    """Tokens per batch, including padding."""

    def __post_init__(self) -> None:
        if not 0 <= self.short_tokens <= 0.4 * self.tokens:
            raise ValueError(f"short_tokens must be from 0 to 0.4 of tokens, got {self.short_tokens} of {self.tokens}")


def model_config(vocab_size: int) -> ModelConfig:
    """Returns the embedded architecture: about a million weights."""
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
    """Returns the config.json that reads back as `config`."""
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
    """An endless stream of batches, which `prefetched` makes in a thread."""

    def __init__(self, chat: Chat, settings: Settings, vocab_size: int):
        self.chat, self.settings = chat, settings
        self.table = build_step_table(chat.tokenizer, "call", vocab_size, chat.stop_ids)
        self.letters = chat_format.answer_ids(chat, "AB")
        self.own: list[tuple[Encoded, list[int], bool]] = []
        self.short_only, self.spoiled = True, False

    def row(self, index: int) -> tuple[list[int], list[int]]:
        """Returns prompt and target of one row: a sample, or a question about an answer to it."""
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
        """Returns a wrong answer near the right one.

        A token is changed or dropped, the first step is doubled, or another sample's answer is taken.
        """
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
        """Returns a self-evaluation question about an answer or its first steps, and the letter that answers it."""
        gold = encoded.target_ids[:-1]
        steps = split_steps(self.table, answer)
        shown = [t for step in steps[: rng.randint(1, len(steps))] for t in step] if rng.random() < 0.5 else answer
        right = right or shown == gold[: len(shown)]
        before, after = chat_format.evaluation_frame(self.chat, gold)
        letter = self.letters[0 if right else 1]
        return encoded.prompt_ids + before + shown + after, [letter, self.chat.end_of_turn]

    def batches(self, index: int) -> Iterator[padding.TargetBatch]:
        """Yields shuffled batches of rows of similar width, from row `index` on, forever."""
        window = 768
        while True:
            rows = [self.row(i) for i in range(index, index + window)]
            index += window
            by_width: dict[int, list[tuple[list[int], list[int]]]] = {}
            for prompt, target in rows:
                width = padding.target_width(len(prompt), len(target), smallest=64)
                if width <= (96 if self.short_only else 384):
                    by_width.setdefault(width, []).append((prompt, target))
            made = []
            for width, same in sorted(by_width.items()):
                count = max(1, self.settings.tokens_per_batch // width)
                full = range(0, len(same) - count + 1, count)
                made += [padding.collate(same[start : start + count], width, count) for start in full]
            random.Random(index).shuffle(made)
            yield from made


def prefetched(batches: Iterator[padding.TargetBatch], depth: int = 8) -> Iterator[padding.TargetBatch]:
    """Yields the same batches, made ahead in a thread."""
    ready: queue.Queue = queue.Queue(depth)

    def work() -> None:
        for batch in batches:
            ready.put(batch)

    threading.Thread(target=work, daemon=True).start()
    while True:
        yield ready.get()


def held_out(count: int, chat: Chat, seed: int) -> tuple[list[Sample], list[Encoded]]:
    """Returns samples that training never sees, with other names and another stream of tools."""
    samples = [make_sample("pretraining_test", i, seed) for i in range(count)]
    return samples, [chat_format.encode_sample(chat, sample) for sample in samples]


def answers(policy: Policy, corpus: Corpus, encoded: list[Encoded], temperature: float) -> list[list[int]]:
    """Returns the model's answers, without the end of turn."""
    settings = GenerateSettings(max_tokens=96, temperature=temperature)
    prompts = [(e.id, e.prompt_ids) for e in encoded]
    batches = generate(policy, corpus.table, prompts, settings, max_length=1024, seed=1)
    responses = dict(itertools.chain.from_iterable(batches))
    return [[t for t in responses[i] if t != corpus.chat.end_of_turn] for i in range(len(prompts))]


def judge_own(policy: Policy, corpus: Corpus, start: int, count: int) -> list[tuple[Encoded, list[int], bool]]:
    """Judges the model's own answers to training samples at temperature 1; half of them wrong if there are enough."""
    samples = [make_sample("pretraining", i, corpus.settings.seed) for i in range(start, start + count)]
    encoded = [chat_format.encode_sample(corpus.chat, sample) for sample in samples]
    responses = answers(policy, corpus, encoded, temperature=1.0)
    judged = [(e, ids, ids == e.target_ids[:-1]) for e, ids in zip(encoded, responses, strict=True) if ids]
    wrong = [row for row in judged if not row[2]]
    right = [row for row in judged if row[2]]
    return wrong + right[: max(len(wrong), count // 4)]


def accuracy(policy: Policy, corpus: Corpus, count: int) -> dict[str, tuple[float, float, int]]:
    """Returns (accuracy, standard error, n) of exact answers on held-out samples, overall and by part."""
    samples, encoded = held_out(count, corpus.chat, corpus.settings.seed)
    responses = answers(policy, corpus, encoded, temperature=0.0)
    right = {e.id: ids == e.target_ids[:-1] for e, ids in zip(encoded, responses, strict=True)}
    calls = [s for s in samples if s.category != "irrelevance"]
    thirds = curriculum([sample_features(s) for s in calls], "easy_to_hard", 0)
    parts = {"overall": list(right)} | dict(zip(("easy", "medium", "hard"), thirds, strict=True))
    parts |= {kind: [s.id for s in samples if s.category == kind] for kind in ("irrelevance", "multi_turn")}
    marks = {name: [right[i] for i in ids] for name, ids in parts.items()}
    return {name: (sum(m) / len(m), standard_error(m), len(m)) for name, m in marks.items()}


def train(settings: Settings) -> None:
    """Trains, measures and writes the checkpoint."""
    embedded_tokenizer.save(settings.output)
    chat = Chat(chat_format.load_tokenizer(str(settings.output)))
    config = model_config(-(-len(chat.tokenizer) // 16) * 16)
    if settings.start is None:
        markers = chat.tokenizer.convert_tokens_to_ids(["<|user|>", "<|tools|>", "<|assistant|>", "<|tool|>"])
        params = jax.tree.map(jnp.asarray, structured_start(config, markers, settings.seed))
    else:
        params = hf.load(settings.start, "float32")[1]
    graph = abstract(config)[0]
    corpus = Corpus(chat, settings, config.vocab_size)
    n_steps = int(settings.tokens / settings.tokens_per_batch)
    rise = min(100, n_steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, rise, n_steps, 0.05 * settings.learning_rate
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0, b2=0.98, weight_decay=0.01))
    loss = sft_loss(graph)
    state, key = TrainState(params, optimizer.init(params)), jax.random.key(settings.seed)
    starts = [int(share * n_steps) for share in (0.0, settings.short_tokens / settings.tokens, 0.4, 0.6, 0.8, 1.0)]
    for phase, (first, last) in enumerate(itertools.pairwise(starts)):
        # Phases: 1. short samples; 2. all; 3. also questions about spoiled answers; 4 and 5. also about the model's
        # own.
        if first == last:
            continue
        corpus.short_only, corpus.spoiled = phase == 0, phase >= 2
        if phase >= 3:
            corpus.own = judge_own(Policy(graph, state.trainable), corpus, start=phase * 10**7, count=2048)
        batches, losses_seen = prefetched(corpus.batches(phase * 10**8)), []
        for step in range(first, last):
            state, values = train_step(loss, optimizer, 1, state, {}, next(batches), key, schedule(step))
            losses_seen.append(values["loss"])
            if step % 100 == 99:
                log(f"step {step + 1}/{n_steps}  loss {np.mean([float(x) for x in losses_seen[-100:]]):.3f}")
        measured = accuracy(Policy(graph, state.trainable), corpus, 600)
        log("held out: " + ", ".join(f"{name} {100 * p:.1f} %" for name, (p, _, _) in measured.items()))
        export.save(settings.output, state.trainable, raw_config(config, chat))
    measured = accuracy(Policy(graph, state.trainable), corpus, 2000)
    write_card(settings, measured, n_weights=sum(x.size for x in jax.tree.leaves(params)))
    log(f"held out (2000 samples): {measured}")


CARD = """---
license: apache-2.0
library_name: transformers
tags: [tool-use, function-calling, tiny]
---
# The embedded checkpoint of itool_jax

A Llama of {n_weights:,} parameters that calls tools in a small artificial English. It is meant for trying the training
loop on a laptop and for tests, and has no other use. Trained from scratch, with a structured initialization, on
generated samples of eight domains (travel, food, media, office, home, shop, sport, money) and of tools named by random
words.

{commands}

Exact answers, greedy, on {count} held-out samples of the domains it was trained on (unseen names, newly drawn
tools; easy, medium and hard are thirds of the calls by number of tools, length of the tool list and number of calls):

| part | exact, % | standard error |
|---|---|---|
{rows}

The words of the default task's domains occurred in training as names of random tools only.
"""


def write_card(settings: Settings, measured: dict[str, tuple[float, float, int]], n_weights: int) -> None:
    """Writes the model card with the measurements."""
    rows = "\n".join(f"| {name} (n={n}) | {100 * p:.1f} | {100 * e:.1f} |" for name, (p, e, n) in measured.items())
    count = measured["overall"][2]
    card = CARD.format(n_weights=n_weights, commands="\n".join(_commands(settings)), count=count, rows=rows)
    (settings.output / "README.md").write_text(card)


def _commands(settings: Settings) -> list[str]:
    """Returns the commands that led to a checkpoint, beginning with those of the one it started from."""
    indent, program = "    ", "python -m benchmarks.pretraining.pretrain"
    earlier: list[str] = []
    if settings.start is not None:
        card = (settings.start / "README.md").read_text()
        earlier = [line for line in card.splitlines() if line.startswith(indent + program)]
    folders = [f"--output DIR{len(earlier) + 1}"] + [f"--start DIR{len(earlier)}"] * bool(earlier)
    given = [f for f in dataclasses.fields(settings) if f.name not in ("output", "start")]
    changed = [(f.name, getattr(settings, f.name)) for f in given if getattr(settings, f.name) != f.default]
    flags = [f"--{name.replace('_', '-')} {value if value % 1 else int(value)}" for name, value in changed]
    return [*earlier, indent + " ".join([program, *folders, *flags])]


if __name__ == "__main__":
    train(tyro.cli(Settings, description=__doc__))
