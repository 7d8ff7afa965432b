"""The embedded checkpoint's parts: its tokenizer and chat template, its corpus, and the weights it starts from."""

import dataclasses
import functools
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.pretraining import pretrain
from benchmarks.pretraining import tokenizer as embedded_tokenizer
from benchmarks.pretraining.pretrain import Corpus, Settings
from benchmarks.pretraining.structured_start import structured_start
from itool_jax.config import parse
from itool_jax.data import lexicon
from itool_jax.data.generated import generate, make_sample, splits
from itool_jax.model import hf
from itool_jax.model.transformer import ModelConfig, Params, abstract
from itool_jax.text.calls import read_calls
from itool_jax.text.chat import Chat, answer_ids, encode_sample, evaluation_frame, load_tokenizer
from itool_jax.text.padding import TargetBatch, collate
from itool_jax.text.sample import Sample
from itool_jax.text.steps import build_step_table, split_steps
from tests import tiny

LONGEST, LONGEST_OF_TASK = 384, 448  # only the task asks for more than three calls
NAMES = [start + end for start in lexicon.NAME_STARTS for end in lexicon.NAME_ENDS]
PIECES = [*embedded_tokenizer.pieces(), *embedded_tokenizer.SPECIAL, " ", "\n", "é", "🙂"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedded")
    embedded_tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def chat(folder: Path) -> Chat:
    return Chat(load_tokenizer(str(folder)))


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return generate("pretraining", 60) + generate("train", 60) + generate("test", 60)


# Tokenizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", " ", "  a  b ", "\r\n\t\n\n", "\x00", "don't", "漢字 é 🙂", "f( a = 1 )", "x" * 3000, "<|end|>x<|user|>"],
)
def test_known_hard_texts_survive_a_round_trip(chat: Chat, text: str) -> None:
    ids = chat.encode(text)
    assert chat.tokenizer.decode(ids) == text
    assert chat.tokenizer.unk_token_id not in ids


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
def test_any_text_survives_a_round_trip(chat: Chat, text: str) -> None:
    assert chat.tokenizer.decode(chat.encode(text)) == text


def test_every_word_is_one_token_and_every_name_two(chat: Chat) -> None:
    words = {word: chat.encode(word) for word in lexicon.words()}
    assert [word for word, ids in words.items() if len(ids) != 1] == []
    assert len({ids[0] for ids in words.values()}) == len(words) > 400
    names = {name: tuple(chat.encode(name)) for name in NAMES}
    assert {len(ids) for ids in names.values()} == {2}
    assert len(set(names.values())) == len(NAMES)


@pytest.mark.parametrize("text", ["to {} and", '[f(a="{}", b=1)]', 'x="{}")]', "result {}", "with {}"])
def test_a_name_reads_the_same_wherever_it_stands(chat: Chat, text: str) -> None:
    """Copying is copying ids."""
    before, after = text.split("{}")
    for name in NAMES[::37]:
        assert chat.encode(text.format(name)) == chat.encode(before) + chat.encode(name) + chat.encode(after)


def test_what_opens_and_closes_calls_is_one_token(chat: Chat) -> None:
    for text in ("[", "(", "=", '="', '", ', ", ", ")]", '")]', '"), ', "), "):
        assert len(chat.encode(text)) == 1, text
    ids = chat.encode('[find_hotel(city="Balban", nights=25), rate_song(title="Danefen")]')
    assert len(ids) == 26


@pytest.mark.parametrize("part", ["pretraining", "train", "test", "test_known"])
def test_samples_are_short(chat: Chat, part: Any) -> None:
    encoded = [encode_sample(chat, sample) for sample in generate(part, 250, writers=12)]
    lengths = [len(row.prompt_ids) + len(row.target_ids) for row in encoded]
    assert max(lengths) <= (LONGEST if part == "pretraining" else LONGEST_OF_TASK)
    assert np.mean(np.array(lengths) > LONGEST) < 0.02
    assert 100 < np.mean(lengths) < 200
    letters = set(chat.tokenizer.convert_tokens_to_ids(list("bcdefghjklmnopqrstuvwxyz")))
    assert len(letters) == 24
    assert not letters & {token for row in encoded for token in row.prompt_ids + row.target_ids}


# Chat --------------------------------------------------------------------------------------------------------


def test_a_prompt_and_its_target_begin_every_longer_conversation(chat: Chat, samples: list[Sample]) -> None:
    for sample in samples:
        encoded = encode_sample(chat, sample)
        turns = [*sample.messages, {"role": "assistant", "content": sample.target}]
        whole = chat.encode(chat.render(turns, sample.tools, add_generation_prompt=False))
        assert whole == encoded.prompt_ids + encoded.target_ids
        later = chat.prompt_ids([*turns, {"role": "user", "content": "find a hotel"}], sample.tools)
        assert later[: len(whole)] == whole
        assert chat.tokenizer.decode(encoded.target_ids[:-1]) == sample.target
    assert {sample.category for sample in samples} == {"calls", "long", "irrelevance", "multi_turn"}


def test_a_default_is_shown_behind_its_parameter(chat: Chat) -> None:
    properties = {
        "hall": {"type": "string"},
        "era": {"type": "string", "enum": ["ancient", "modern"], "default": "modern"},
        "fee": {"type": "number", "default": 4.5},
        "guided": {"type": "boolean", "default": False},
    }
    parameters = {"type": "object", "properties": properties, "required": ["hall"]}
    tool = {"type": "function", "function": {"name": "find_visit", "description": "", "parameters": parameters}}
    shown = "find_visit(hall:string, era=modern|ancient|modern:string?, fee=4.5:number?, guided=False:boolean?)\n"
    text = chat.tokenizer.decode(chat.prompt_ids([{"role": "user", "content": "find a visit"}], [tool]))
    assert text == f"<|user|>find a visit<|end|><|tools|>{shown}<|end|><|assistant|>"
    words = chat.tokenizer.convert_ids_to_tokens(chat.encode("guided=False:boolean?)\n"))
    assert [chat.tokenizer.convert_tokens_to_string([word]) for word in words] == [
        *("guided", "=", "False"),
        ":boolean?)\n",
    ]


@pytest.mark.parametrize("name", ["demo", "smoke"])
def test_the_search_can_reach_every_gold_of_the_corpus(chat: Chat, name: str) -> None:
    """A step above `max_depth` has `max_step_tokens`; the one there is the whole remainder, `max_last_step_tokens`."""
    config = parse(["--stage=search", f"--config={name}"])
    search = config.search
    table = build_step_table(chat.tokenizer, search.granularity, len(chat.tokenizer), chat.stop_ids)
    targets = [sample.target for samples in splits(config.generated).values() for sample in samples]
    golds = [split_steps(table, chat.target_ids(target)) for target in dict.fromkeys(targets)]
    inner = max(len(step) for gold in golds for step in gold[: search.max_depth - 1])
    last = max(sum(map(len, gold[search.max_depth - 1 :])) for gold in golds)
    whole = max(sum(map(len, gold)) for gold in golds)
    for limit, longest in (
        (search.max_step_tokens, inner),
        (search.max_last_step_tokens, last),
        (config.generate.max_tokens, whole),
    ):
        assert longest <= limit <= longest + 8  # no more than needed: the search takes longer with them


def test_a_prompt_is_the_question_then_the_tools(chat: Chat) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "cabin": {"type": "string", "enum": ["first", "economy"]}},
        "required": ["city"],
    }
    function = {"name": "find_hotel", "description": "search lodging", "parameters": parameters}
    tool = {"type": "function", "function": function}
    messages = [{"role": "system", "content": "on"}, {"role": "user", "content": "find a hotel in Balban"}]
    turns = [*messages, {"role": "assistant", "content": "x"}, {"role": "user", "content": "now"}]
    shown = "<|tools|>search lodging: find_hotel(city:string, cabin|first|economy:string?)\n<|end|>"
    start = "<|system|>on<|end|><|user|>find a hotel in Balban<|end|>" + shown
    assert chat.tokenizer.decode(chat.prompt_ids(messages, [tool])) == start + "<|assistant|>"
    assert chat.tokenizer.decode(chat.prompt_ids(messages, [function])) == start + "<|assistant|>"
    # Once only: behind the first question.
    again = start + "<|assistant|>x<|end|><|user|>now<|end|><|assistant|>"
    assert chat.tokenizer.decode(chat.prompt_ids(turns, [tool])) == again
    assert "<|tools|>" not in chat.tokenizer.decode(chat.prompt_ids(messages))


def test_one_end_token_and_single_letters_for_self_evaluation(chat: Chat) -> None:
    assert chat.stop_ids == tuple(chat.tokenizer.convert_tokens_to_ids(["<|end|>"]))
    assert len(set(answer_ids(chat, "ABCD"))) == 4
    frame = evaluation_frame(chat, chat.encode("[f()]"))
    shown = chat.tokenizer.decode([*frame.before, *chat.encode("[g()]"), *frame.after])
    assert shown.startswith("[f()]<|end|><|user|>That answer is the reference.")
    assert "\nCandidate answer so far: [g()]\nIs it correct? Reply A for correct or B for incorrect." in shown
    assert shown.endswith("<|end|><|assistant|>")
    assert chat.tokenizer.unk_token_id not in [*frame.before, *frame.after]


def test_a_step_is_a_call(chat: Chat, samples: list[Sample]) -> None:
    table = build_step_table(chat.tokenizer, "call", len(chat.tokenizer), chat.stop_ids)
    for sample in samples:
        steps = split_steps(table, encode_sample(chat, sample).target_ids)
        assert len(steps) == len(read_calls(sample.target) or [sample.target]) + 1
        assert steps[-1] == [chat.end_of_turn]


# Structured start --------------------------------------------------------------------------------------------

CONFIG = pretrain.model_config(512)
SMALL = dataclasses.replace(
    CONFIG, vocab_size=1168, hidden_size=96, intermediate_size=32, n_layers=2, head_dim=16, max_length=512
)
MARKERS = [3, 4, 5, 6]


@functools.cache
def start_of(seed: int) -> Params:
    return structured_start(CONFIG, MARKERS, seed)


@functools.partial(jax.jit, static_argnums=0)
def likeliest(config: ModelConfig, params: Params, tokens_BT: jax.Array) -> jax.Array:
    model = nnx.merge(abstract(config)[0], params)
    return jnp.argmax(model.logits(model(tokens_BT)[0]), axis=-1)


def next_tokens(params: Params, tokens_BT: np.ndarray) -> np.ndarray:
    """The token that the model finds likeliest after each position."""
    rows, length = tokens_BT.shape
    padded_BT = np.pad(tokens_BT, [(0, 16 - rows), (0, 160 - length)])  # one shape, one program
    return np.asarray(likeliest(CONFIG, params, padded_BT))[:rows, :length]


def repeated(length: int, rows: int = 3) -> np.ndarray:
    """Random tokens, then the same once more."""
    half_BT = np.random.default_rng(length).integers(8, CONFIG.vocab_size, (rows, length))
    return np.tile(half_BT, 2).astype(np.int32)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("length", [20, 80])
def test_induction_works_from_the_start(length: int, seed: int) -> None:
    tokens_BT = repeated(length)
    found_BT = next_tokens(start_of(seed), tokens_BT)
    right_BT = found_BT[:, :-1] == tokens_BT[:, 1:]
    assert right_BT[:, length:].mean() > 0.8
    assert right_BT[:, : length - 1].mean() < 0.2  # nothing is known of what never stood before


def test_ordinary_weights_know_no_induction() -> None:
    tokens_BT = repeated(20)
    found_BT = next_tokens(tiny.random_params(CONFIG), tokens_BT)
    assert (found_BT[:, 20:-1] == tokens_BT[:, 21:]).mean() < 0.2


def test_the_last_two_tokens_decide_where_one_is_ambiguous() -> None:
    """… a x p … b x q … b x → q: the last token alone has two successors."""
    rng = np.random.default_rng(0)
    rows, after = [], []
    for _ in range(16):
        fill = rng.permutation(np.arange(8, CONFIG.vocab_size)).tolist()
        a, b, x, p, q = (fill.pop() for _ in range(5))
        first, second = ([a, x, p], [b, x, q]) if rng.random() < 0.5 else ([b, x, q], [a, x, p])
        rows.append([*fill[:8], *first, *fill[8:16], *second, *fill[16:24], b, x])
        after.append(q)
    found_BT = next_tokens(start_of(0), np.array(rows, np.int32))
    assert (found_BT[:, -1] == after).mean() > 0.8


def test_the_start_has_the_models_shapes_and_depends_on_the_seed() -> None:
    first, again, other = (structured_start(SMALL, MARKERS, seed) for seed in (0, 0, 1))
    for config, params in ((SMALL, first), (CONFIG, start_of(0))):
        expected = abstract(config)[1]
        assert jax.tree.structure(params) == jax.tree.structure(expected)
        for ours, shape in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
            assert ours.shape == shape.shape
            assert ours.dtype == np.float32
            assert np.isfinite(ours).all()
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["embedding"], other["embedding"])


def test_the_full_model_has_about_a_million_weights(chat: Chat) -> None:
    config = pretrain.model_config(1168)
    sizes = [leaf.size for leaf in jax.tree.leaves(abstract(config)[1])]
    assert 0.9e6 < sum(sizes) < 1.3e6
    assert len(chat.tokenizer) <= config.vocab_size


def test_the_raw_configuration_reads_back(tmp_path: Path, chat: Chat) -> None:
    config = pretrain.model_config(1168)
    (tmp_path / "config.json").write_text(json.dumps(pretrain.raw_config(config, chat)))
    assert hf.read_config(tmp_path, "float32") == config


# Corpus ------------------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(chat: Chat, tmp_path: Path) -> Corpus:
    return Corpus(chat, Settings(output=tmp_path), len(chat.tokenizer))


def test_rows_are_samples_at_first(corpus: Corpus, chat: Chat) -> None:
    for i in range(40):
        encoded = encode_sample(chat, make_sample("pretraining", i, 0))
        assert corpus.row(i) == (encoded.prompt_ids, encoded.target_ids)


def parts_of(corpus: Corpus, row: tuple[list[int], list[int]]) -> tuple[str, str, str] | None:
    """Gold, candidate and letter of a question of self-evaluation; None for a sample."""
    text = corpus.chat.tokenizer.decode(row[0])
    if "Candidate answer so far: " not in text:
        return None
    before, _, after = text.rpartition("Candidate answer so far: ")
    before, _, _ = before.rpartition("<|end|><|user|>")
    candidate, _, question = after.partition("\nIs it correct?")
    assert question == " Reply A for correct or B for incorrect.<|end|><|assistant|>"
    letter, end = row[1]
    assert end == corpus.chat.end_of_turn
    return before.rpartition("<|assistant|>")[2], candidate, corpus.chat.tokenizer.decode([letter])


def test_spoiled_answers_are_asked_about_and_the_letter_is_right(corpus: Corpus) -> None:
    corpus.spoiled = True
    rows = [parts_of(corpus, corpus.row(i)) for i in range(400)]
    questions = [row for row in rows if row is not None]
    # As long as the model has not answered itself, they stand in for its own answers too.
    share = pretrain.SPOILED_SHARE + pretrain.OWN_SHARE
    assert len(questions) / len(rows) == pytest.approx(share, abs=0.06)
    for gold, candidate, letter in questions:
        assert letter == ("A" if gold.startswith(candidate) else "B")
    letters = Counter(letter for *_, letter in questions)
    assert min(letters.values()) > 0.25 * len(questions)
    assert any(candidate != gold for gold, candidate, letter in questions if letter == "A")  # its first steps


def test_the_models_own_answers_are_asked_about(corpus: Corpus, chat: Chat) -> None:
    sample = next(s for s in generate("pretraining_test", 20) if s.category == "calls")
    encoded = encode_sample(chat, sample)
    gold, wrong = encoded.target_ids[:-1], chat.encode("[wrong()]")
    corpus.own, corpus.spoiled = [(encoded, gold, True), (encoded, wrong, False)], True
    questions = [row for row in (parts_of(corpus, corpus.row(i)) for i in range(1, 401)) if row is not None]
    own = [row for row in questions if row[0] == chat.tokenizer.decode(gold)]
    assert len(own) / 400 == pytest.approx(pretrain.OWN_SHARE, abs=0.05)
    assert (len(questions) - len(own)) / 400 == pytest.approx(pretrain.SPOILED_SHARE, abs=0.05)
    for _, candidate, letter in own:
        assert letter == ("B" if candidate == "[wrong()]" else "A")
    assert {letter for *_, letter in own} == {"A", "B"}


def test_spoiling_changes_an_answer_and_keeps_its_end(corpus: Corpus, chat: Chat) -> None:
    rng = random.Random(0)
    for i in range(150):
        encoded = encode_sample(chat, make_sample("pretraining", i, 0))
        spoiled = corpus.spoil(rng, encoded, make_sample("pretraining", i + 1, 0))
        assert spoiled != encoded.target_ids
        assert len(spoiled) > 1
        assert spoiled[-1] == chat.end_of_turn
    # Another sample's answer that is the same one has to change as well.
    refused = next(s for s in generate("pretraining", 60) if s.category == "irrelevance")
    for _ in range(20):
        assert corpus.spoil(rng, encode_sample(chat, refused), refused) != encode_sample(chat, refused).target_ids


def test_batches_are_full_and_short_at_first(corpus: Corpus) -> None:
    short = list(itertools.islice(corpus.batches(0), 5))
    corpus.short_only = False
    long = list(itertools.islice(corpus.batches(768), 12))
    assert {batch.tokens_BT.shape[1] for batch in short} <= {64, 96}
    assert {batch.tokens_BT.shape[1] for batch in long} - {64, 96}
    for batch in short + long:
        rows, width = batch.tokens_BT.shape
        assert width <= LONGEST
        assert rows == corpus.settings.tokens_per_batch // width
        assert batch.mask_BR.any(axis=1).all()


def test_batches_made_ahead_are_the_same_ones(corpus: Corpus) -> None:
    made = [collate([([1, i], [2, i, i])], 8, 1) for i in range(20)]
    ahead = pretrain.prefetched(iter(made), depth=3)
    assert all(next(ahead) is batch for batch in made)


def test_held_out_samples_are_not_those_of_training(chat: Chat) -> None:
    samples, encoded = pretrain.held_out(20, chat, 0)
    assert [row.id for row in encoded] == [sample.id for sample in samples]
    assert all(sample.id.startswith("pretraining_test-") for sample in samples)


@pytest.mark.embedded
def test_training_writes_a_checkpoint_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole script, on a smaller model and one batch of samples, its measurements left out."""

    def batches(corpus: Corpus, index: int) -> Iterator[TargetBatch]:
        short = (row for row in map(corpus.row, itertools.count(index)) if len(row[0]) + len(row[1]) <= 128)
        return itertools.repeat(collate(list(itertools.islice(short, 2)), 128, 2))

    def small(vocab_size: int) -> ModelConfig:
        return dataclasses.replace(SMALL, vocab_size=vocab_size)

    monkeypatch.setattr(pretrain, "model_config", small)
    monkeypatch.setattr(Corpus, "batches", batches)
    monkeypatch.setattr(pretrain, "prefetched", lambda batches: batches)
    monkeypatch.setattr(pretrain, "judge_own", lambda *_, **__: [])
    monkeypatch.setattr(pretrain, "accuracy", lambda *_: {"overall": (0.5, 0.05, 100)})
    pretrain.train(Settings(output=tmp_path, tokens=103, short_tokens=20, tokens_per_batch=1))
    config, params = hf.load(tmp_path)
    assert config == small(config.vocab_size)
    start = structured_start(config, chat_markers(tmp_path), 0)
    assert jax.tree.structure(params) == jax.tree.structure(start)
    assert not np.allclose(params["embedding"], start["embedding"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert "| overall (n=100) | 50.0 | 5.0 |" in (tmp_path / "README.md").read_text()
    # Trained on from there, its card tells both commands.
    again = Settings(output=tmp_path / "2", start=tmp_path, seed=1, tokens=40, short_tokens=0, tokens_per_batch=1)
    pretrain.train(again)
    further = hf.load(tmp_path / "2")[1]["embedding"]
    moved, from_start = (np.abs(further - other).max() for other in (params["embedding"], start["embedding"]))
    assert 0 < moved < from_start
    card = (tmp_path / "2/README.md").read_text()
    first, second = (line.strip() for line in card.splitlines() if "pretrain" in line)
    assert first.endswith("--output DIR1 --tokens 103 --short-tokens 20 --tokens-per-batch 1")
    assert second.endswith("--output DIR2 --start DIR1 --seed 1 --tokens 40 --short-tokens 0 --tokens-per-batch 1")


def chat_markers(folder: Path) -> list[int]:
    names = ["<|user|>", "<|tools|>", "<|assistant|>", "<|tool|>"]
    return load_tokenizer(str(folder)).convert_tokens_to_ids(names)
