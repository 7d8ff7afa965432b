"""What others read of a run, with the real libraries: pairs in TRL, exported folders in vLLM.

docs/ecosystem.md lists these and the tests of transformers, PEFT, the BFCL scorer, TensorBoard and W&B, which stand
with the code they are about.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import itool_jax
from itool_jax.main import main
from itool_jax.text.tool_formats import BRACKETS, TAGGED, Form
from tests import tiny
from tests.conftest import REPOSITORY, read
from tests.runs import Made, copy_run

pytestmark = pytest.mark.usefixtures("restored_jax_settings")


@pytest.fixture(scope="module")
def made(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A copy of the run: exports write to its log."""
    return made._replace(folder=copy_run(made, tmp_path_factory.mktemp("exported")))


def exported(made: Made, target: Path, *changes: str) -> Path:
    assert main(["--stage=export", f"--run_dir={made.folder}", f"--output={target}", *made.settings, *changes]) == 0
    return target


@pytest.mark.filterwarnings("ignore")  # of torch and TRL
@pytest.mark.parity
def test_trl_reads_the_pairs_and_finds_the_log_probs_that_we_find(made: Made, tmp_path: Path):
    pytest.importorskip("torch")
    trl = pytest.importorskip("trl")
    import datasets
    import transformers

    model = exported(made, tmp_path / "model", "--export.phase=warmup")
    pairs, reference = (made.folder / "iteration_1" / name for name in ("pairs.jsonl", "reference.jsonl"))
    options: dict[str, Any] = {"output_dir": str(tmp_path / "out"), "report_to": "none", "use_cpu": True}
    options |= {"bf16": False, "gradient_checkpointing": False, "max_length": None, "disable_tqdm": True}

    class KeepsIds(trl.DPOTrainer):
        """Takes prompt_ids, chosen_ids and rejected_ids as they are in the file."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    def trainer(kind: Any, **more: Any) -> Any:
        return kind(
            model=transformers.AutoModelForCausalLM.from_pretrained(model),
            args=trl.DPOConfig(**options, **more),
            train_dataset=datasets.load_dataset(
                "json", data_files=str(pairs), split="train", cache_dir=str(tmp_path / "cache")
            ),
            processing_class=transformers.AutoTokenizer.from_pretrained(model),
        )

    ours = read(pairs)
    dpo = trainer(KeepsIds, precompute_ref_log_probs=True)
    rows = list(dpo.train_dataset)
    assert [row["chosen_ids"] for row in rows] == [row["chosen_ids"] for row in ours]
    for side in ("chosen", "rejected"):
        theirs = np.array([row[f"ref_{side}_logps"] for row in rows])
        np.testing.assert_allclose(theirs, [row[side] for row in read(reference)], atol=2e-4)
    # Left to itself TRL makes the ids from the texts, and puts an end of turn behind a step that does not end one.
    processed = trainer(trl.DPOTrainer).train_dataset
    tokenizer, end = made.chat.tokenizer, made.chat.tokenizer.eos_token
    assert len(processed) == len(ours)
    for row, pair in zip(processed, ours, strict=True):
        assert (
            tokenizer.decode(row["prompt_ids"] + row["chosen_ids"])
            == pair["prompt"] + pair["chosen"].removesuffix(end) + end
        )


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What its max_lora_rank may be; adapters of a smaller rank fit."""


def test_folders_hold_what_vllm_reads(made: Made, tmp_path: Path):
    model = exported(made, tmp_path / "model")
    names = {path.name for path in model.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    config = json.loads((model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    tensors = load_file(model / "model.safetensors")
    assert {str(x.dtype) for x in tensors.values()} == {config["torch_dtype"]}
    assert "model.layers.1.self_attn.q_proj.weight" in tensors
    # It stops where training did.
    assert json.loads((model / "generation_config.json").read_text())["eos_token_id"] == list(made.chat.stop_ids)

    adapter = exported(made, tmp_path / "adapter", "--export.kind=adapter")
    content = json.loads((adapter / "adapter_config.json").read_text())
    assert (content["peft_type"], content["bias"]) == ("LORA", "none")
    assert content["r"] <= max(VLLM_RANKS)
    assert not {"modules_to_save", "use_dora"} & content.keys()
    lora = load_file(adapter / "adapter_model.safetensors")
    for name, matrix in lora.items():
        module, _, side = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        assert module.rpartition(".")[2] in content["target_modules"]
        assert matrix.shape[0 if side == "lora_A" else 1] == content["r"]
        rows, columns = tensors[f"{module}.weight"].shape
        assert matrix.shape[1 if side == "lora_A" else 0] == (columns if side == "lora_A" else rows)


MOST_TOKENS = 128
"""Of an answer, here and in vLLM."""


@contextlib.contextmanager
def served(program: str, log: Path, command: str) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a `vllm serve` line for the time of the block; gives a function that asks it for a greedy message."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    words = [program, *shlex.split(command)[1:], f"--port={port}", "--dtype=float32"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}

    def ask(**body: Any) -> dict[str, Any]:
        content = json.dumps({"temperature": 0, "max_tokens": MOST_TOKENS} | body).encode()
        request = urllib.request.Request(f"{url}/chat/completions", content, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["choices"][0]["message"]

    with (
        log.open("wb") as file,
        subprocess.Popen(words, stdout=file, stderr=file, env=environment, start_new_session=True) as server,
    ):
        try:
            for _ in range(240):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"{url}/models", timeout=5).close()
                    break
                assert server.poll() is None, log.read_text()[-2000:]
                time.sleep(1)
            yield ask
        finally:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.killpg(server.pid, signal.SIGTERM)


def sent(messages: list[dict[str, Any]], form: Form) -> list[dict[str, Any]]:
    """The messages as a client sends them, with the calls of earlier turns as the server returned them."""
    rows = []
    for message in messages:
        calls = BRACKETS.read(message["content"]) if form is TAGGED and message["role"] == "assistant" else None
        if calls:
            functions = [{"name": call.name, "arguments": json.dumps(call.arguments)} for call in calls]
            made = [{"id": f"call_{i}", "type": "function", "function": f} for i, f in enumerate(functions)]
            message = {"role": "assistant", "content": None, "tool_calls": made}
        rows.append(message)
    return rows


def check_answers(ask: Callable[..., dict[str, Any]], name: str, samples: list[Any], ours: list[Any], form: Form):
    """The server answers as we did. Its reader finds the calls that ours does, in answers that came to their end."""
    whole = [{"model": name, "messages": sent(x["messages"], form), "tools": x["tools"]} for x in samples]
    assert [ask(**body, tool_choice="none")["content"] for body in whole] == [row["text"] for row in ours]
    alike = 0
    for body, row in zip(whole, ours, strict=True):
        if len(row["token_ids"]) == MOST_TOKENS:
            continue
        calls = [call["function"] for call in ask(**body).get("tool_calls") or []]
        with contextlib.suppress(SyntaxError):
            if form is BRACKETS:
                compile(row["text"], "answer", "eval")  # its reader wants Python: no keyword twice
            assert [(f["name"], json.loads(f["arguments"])) for f in calls] == (form.read(row["text"]) or []), row
            alike += len(calls) > 0
    assert alike > len(ours) // 3


@pytest.mark.slow
@pytest.mark.parametrize("form", [BRACKETS, TAGGED], ids=lambda form: form.parser)
def test_vllm_serves_a_model_and_an_adapter(form: Form, tmp_path: Path):
    """By the line of the exported folder, vLLM answers as we do, and returns the calls that we read."""
    program = os.environ.get("ITOOL_VLLM")
    if program is None:
        pytest.skip("needs vLLM: set ITOOL_VLLM to its program, of an environment of its own (docs/chat.md)")
    start = shutil.copytree(REPOSITORY / "itool_jax" / "embedded" / "model", tmp_path / "start")
    if form is TAGGED:
        template = start / "chat_template.jinja"
        template.write_text(tiny.tagged(template.read_text()))
    most = f"--generate.max_tokens={MOST_TOKENS}"
    small = ["--generated.train=400", "--generated.validation=8", "--generated.test=24"]
    run = [f"--model={start}", f"--run_dir={tmp_path / 'run'}", "--warmup.learning_rate=2e-3", *small, most]
    if form is TAGGED:  # it has never seen these tokens, so adapters are not enough
        run += ["--generated.train=2200", "--lora.rank=0", "--warmup.epochs=1", "--warmup.batch_size=8"]
    assert main(["--stage=warmup", *run]) == 0
    model, adapter, answers = tmp_path / "model", tmp_path / "adapter", tmp_path / "answers.jsonl"
    assert main(["--stage=export", *run, f"--output={model}"]) == 0
    served_as = [(str(model), model)]
    if form is BRACKETS:
        assert main(["--stage=export", *run, f"--output={adapter}", "--export.kind=adapter"]) == 0
        served_as.append(("tools", adapter))
    data = tmp_path / "run" / "data" / "test.jsonl"
    assert main(["--stage=generate", f"--model={model}", f"--data={data}", f"--output={answers}", most]) == 0
    for name, folder in served_as:
        (line,) = [x.strip() for x in (folder / "SERVING.md").read_text().splitlines() if "vllm serve" in x]
        line = line.replace("MODEL", str(model)).replace("BASE", str(start)).replace("ADAPTER", str(adapter))
        with served(program, tmp_path / "vllm.log", line) as ask:
            check_answers(ask, name, read(data), read(answers), form)


def test_the_table_of_the_docs_names_tests_that_are_there():
    text = (REPOSITORY / "docs" / "ecosystem.md").read_text()
    named = [part.split("`")[0] for part in text.split("`tests/")[1:]]
    assert len(named) >= 8
    for name in named:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (REPOSITORY / "tests" / file).read_text()


def test_the_version_stands_in_one_place():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    path = REPOSITORY / project["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{itool_jax.__version__}"' in path.read_text()
