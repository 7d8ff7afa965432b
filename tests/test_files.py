"""The stages that read one file and write one: score and generate."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from itool_jax.main import main
from itool_jax.model import export, hf
from itool_jax.model.transformer import abstract
from itool_jax.text.chat import Chat, load_tokenizer
from tests import tiny
from tests.conftest import read, shared_path, write

pytestmark = pytest.mark.usefixtures("restored_jax_settings")

Row = dict[str, Any]


SMALL = ("--generate.max_tokens=12", "--generate.tokens_per_batch=1024")  # alike everywhere: fewer programs


def run_file(stage: str, model: Path, data: Path, *settings: str) -> list[Row]:
    """The rows that a stage writes for a data file."""
    output = data.with_name(f"{stage}.out.jsonl")
    settings = (f"--model={model}", f"--data={data}", f"--output={output}", *SMALL, *settings)
    assert main([f"--stage={stage}", *settings]) == 0
    return read(output)


MESSAGES = [{"role": "user", "content": "hi"}]
TARGET = "[f(a=1), g()]"


class Plain:
    """A model without cache, batch or loop: all logits of one row, from one forward pass."""

    width = 64

    def __init__(self, folder: Path):
        config, self.params = hf.load(folder, "float32")
        graph = abstract(config)[0]

        def forward(params: Any, ids_BT: jax.Array, length_B: jax.Array) -> Any:
            model = nnx.merge(graph, params)
            return model.logits(model(ids_BT, length_B)[0])

        self.forward = jax.jit(forward)

    def log_probs(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities after each token, in float64."""
        padded = np.zeros((1, self.width), np.int32)
        padded[0, : len(ids)] = ids
        logits_BTV = np.asarray(self.forward(self.params, padded, np.array([len(ids)])), np.float64)
        shifted_TV = logits_BTV[0, : len(ids)] - logits_BTV[0, : len(ids)].max(axis=-1, keepdims=True)
        return shifted_TV - np.log(np.exp(shifted_TV).sum(axis=-1, keepdims=True))

    def greedy(self, ids: list[int], n: int, stop_ids: tuple[int, ...]) -> list[int]:
        """The best token, again and again."""
        tokens: list[int] = []
        while len(tokens) < n and not set(tokens) & set(stop_ids):
            tokens.append(int(self.log_probs([*ids, *tokens])[-1].argmax()))
        return tokens


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> Plain:
    return Plain(tiny_folder)


def test_the_score_of_a_sample_is_what_a_plain_computation_gives(tmp_path: Path, tiny_folder: Path, plain: Plain):
    tokenizer = load_tokenizer(str(tiny_folder))
    prompt_ids = tokenizer.encode("<|user|>hi<|end|><|assistant|>", add_special_tokens=False)
    target_ids = tokenizer.encode(f"{TARGET}<|end|>", add_special_tokens=False)
    raw = [
        {"id": "raw", "prompt_ids": prompt_ids, "target_ids": target_ids},
        {"id": "other", "prompt_ids": target_ids, "target_ids": prompt_ids * 7},
        {"id": 7, "prompt_ids": [3], "target_ids": [4]},
    ]
    sample = {"id": "chat", "messages": MESSAGES, "tools": [], "target": TARGET}
    rows = run_file("score", tiny_folder, write(tmp_path / "d.jsonl", [sample, *raw]), "--dtype=float32")

    assert [row["id"] for row in rows] == ["chat", "raw", "other", "7"]
    for row, given in zip(rows, [raw[0], *raw], strict=True):
        assert list(row) == ["id", "n_tokens", "logprob_sum", "perplexity"]
        ids, n = given["prompt_ids"] + given["target_ids"], len(given["target_ids"])
        log_probs_TV = plain.log_probs(ids)
        expected = sum(log_probs_TV[t - 1, ids[t]] for t in range(len(ids) - n, len(ids)))
        assert row["n_tokens"] == n
        assert row["logprob_sum"] == pytest.approx(expected, abs=1e-4, rel=1e-6)
        assert row["perplexity"] == pytest.approx(math.exp(-expected / n), rel=1e-5)
    assert rows[0]["logprob_sum"] == rows[1]["logprob_sum"]


def test_public_data_is_scored_and_continued_as_it_is(tmp_path: Path, tiny_folder: Path):
    tools = '[{"name": "f", "description": "d", "parameters": {"n": {"type": "int"}}}]'
    xlam = {"id": 7, "query": "hi", "tools": tools, "answers": '[{"name": "f", "arguments": {"n": 3}}]'}
    toolrl = {
        "instruction": '**Available Tools**\n1. Name: f\nDescription: d\nParameters: {"n": {"type": "int"}}',
        "input": "<user> hi </user>",
        "output": '<think> so </think>\n<tool_call>\n{"name": "f", "parameters": {"n": 3}}\n</tool_call>',
    }
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema}}
    same = {"id": "same", "messages": MESSAGES, "tools": [tool], "target": "[f(n=3)]"}
    for stage in ("score", "generate"):
        [expected] = run_file(stage, tiny_folder, write(tmp_path / "openai.jsonl", [same]))
        for row in (xlam, toolrl):
            [written] = run_file(stage, tiny_folder, write(tmp_path / "public.jsonl", [row]))
            assert written.pop("id").startswith(("xlam-7", "toolrl-"))
            assert written == {key: value for key, value in expected.items() if key != "id"}


def test_parquet_holds_the_same_as_json_lines(tmp_path: Path, tiny_folder: Path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": f"r{i}", "prompt_ids": [5, 6, i], "target_ids": [i, 2]} for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    scores = run_file("score", tiny_folder, tmp_path / "d.parquet")
    assert scores == run_file("score", tiny_folder, write(tmp_path / "d.jsonl", rows))
    assert len({row["perplexity"] for row in scores}) == 3


def test_an_infinite_perplexity_is_still_json(tmp_path: Path):
    model = tiny.tiny_checkpoint(tmp_path / "model")
    config, params = hf.load(model, "float32")
    export.save(model, params | {"embedding": params["embedding"] * 1000}, tiny.raw_config())
    rows = [{"id": f"r{i}", "prompt_ids": [5], "target_ids": [i]} for i in range(20)]
    scores = run_file("score", model, write(tmp_path / "d.jsonl", rows))
    assert config.vocab_size == tiny.VOCABULARY
    assert max(row["perplexity"] for row in scores) == np.finfo(np.float32).max


def test_raw_rows_need_no_chat_template(tmp_path: Path, tiny_folder: Path):
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    (model / "chat_template.jinja").unlink()
    scored = [{"id": "a", "prompt_ids": [5, 6], "target_ids": [7, 8, 9]}]
    asked = [{"id": "a", "prompt_ids": [5, 6]}, {"id": "b", "prompt": "&'"}]
    data = write(tmp_path / "d.jsonl", scored)
    assert run_file("score", model, data) == run_file("score", tiny_folder, data)
    responses = run_file("generate", model, write(data, asked))
    assert responses == run_file("generate", tiny_folder, data)


def test_generate_takes_raw_rows_exactly_as_given(tmp_path: Path, tiny_folder: Path, plain: Plain):
    chat = Chat(load_tokenizer(str(tiny_folder)))
    rows = [
        {"id": "ids", "prompt_ids": [262, 71, 72, 260, 263]},
        {"id": "text", "prompt": "<|user|>hi<|end|><|assistant|>"},
        {"id": "chat", "messages": MESSAGES},
        {"id": "one", "prompt_ids": [40]},
    ]
    assert chat.encode("<|user|>hi<|end|><|assistant|>") == rows[0]["prompt_ids"]
    responses = run_file("generate", tiny_folder, write(tmp_path / "d.jsonl", rows))
    assert [row["id"] for row in responses] == ["ids", "text", "chat", "one"]
    for row, ids in zip(responses, [rows[0]["prompt_ids"]] * 3 + [[40]], strict=True):
        assert list(row) == ["id", "token_ids", "text"]
        assert row["token_ids"] == plain.greedy(ids, 12, chat.stop_ids)
        assert row["text"] == chat.tokenizer.decode([t for t in row["token_ids"] if t not in chat.stop_ids])


def test_temperature_length_and_seed_are_settings(tmp_path: Path, tiny_folder: Path):
    data = write(tmp_path / "d.jsonl", [{"id": f"r{i}", "prompt_ids": [40, 41]} for i in range(6)])

    def ids(*settings: str) -> list[list[int]]:
        return [row["token_ids"] for row in run_file("generate", tiny_folder, data, *settings)]

    cold, warm = ids(), ids("--generate.temperature=1")
    assert all(row == cold[0] for row in cold)
    assert len({tuple(row) for row in warm}) > 1  # a key for each id
    assert warm == ids("--generate.temperature=1")
    assert warm != ids("--generate.temperature=1", "--seed=1")
    assert max(len(row) for row in warm) == 12


def test_without_an_output_the_texts_are_printed(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "d.jsonl", [{"id": "r", "prompt_ids": [40, 41]}])
    [row] = run_file("generate", tiny_folder, data)
    capsys.readouterr()
    assert main(["--stage=generate", f"--model={tiny_folder}", f"--data={data}", *SMALL]) == 0
    assert capsys.readouterr().out == f"r\t{row['text']}\n"
    assert not (tmp_path / "runs").exists()


def test_a_real_checkpoint_gives_its_reference_tokens(tmp_path: Path):
    folder = shared_path("checkpoints/stories260K")
    reference = json.loads((folder / "greedy_reference.json").read_text())
    data = write(tmp_path / "d.jsonl", [{"id": "bos", "prompt_ids": reference["prompt_ids"]}])
    [row] = run_file("generate", folder, data, "--generate.max_tokens=256")
    assert len(reference["greedy_ids"]) == 256
    assert row["token_ids"] == reference["greedy_ids"]
    assert row["text"].strip() == reference["text"].strip()
