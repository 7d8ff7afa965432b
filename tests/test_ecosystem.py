"""What others read of a run, with the real libraries: pairs in TRL, folders as vLLM wants them.

docs/ecosystem.md lists these and the tests of transformers, PEFT, the BFCL scorer, TensorBoard and W&B, which stand
with the code they are about.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import itool_jax
from itool_jax.main import main
from tests.conftest import REPOSITORY, read
from tests.runs import Made

pytestmark = pytest.mark.usefixtures("restored_jax_settings")


def exported(made: Made, target: Path, *changes: str) -> Path:
    assert main(["--stage=export", f"--run_dir={made.folder}", f"--output={target}", *made.settings, *changes]) == 0
    return target


@pytest.mark.filterwarnings("ignore")  # of torch and TRL
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
    found = trainer(KeepsIds, precompute_ref_log_probs=True)
    rows = list(found.train_dataset)
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


# vLLM itself needs a GPU, or to be built from source: benchmarks/peers.py has it where there is one.

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
