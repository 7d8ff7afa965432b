"""The shipped checkpoint, and the default run on it."""

import json
from pathlib import Path

import pytest

from itool_jax.config import parse
from itool_jax.data.generated import make_sample
from itool_jax.inference.sampler import generate
from itool_jax.main import main
from itool_jax.store.base import model_folder
from itool_jax.store.encoding import encode
from itool_jax.store.run import Run
from itool_jax.training.replay import curriculum, sample_features

MODEL = model_folder(parse(["--stage=generate"]))


def test_the_shipped_checkpoint_is_a_small_plain_hugging_face_folder() -> None:
    names = {path.name for path in MODEL.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 10_000_000


def test_hugging_face_reads_the_shipped_checkpoint() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(MODEL)
    assert config.architectures == ["LlamaForCausalLM"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.decode(tokenizer.encode("[f(a=1)] é", add_special_tokens=False)) == "[f(a=1)] é"


@pytest.mark.embedded
def test_the_shipped_checkpoint_answers_easy_held_out_samples_of_its_own_domains() -> None:
    config = parse(["--stage=generate"])
    run = Run(config)
    samples = [make_sample("pretraining_test", i, 0) for i in range(300)]
    calls = [s for s in samples if s.category != "irrelevance"]
    easy_ids = set(curriculum([sample_features(s) for s in calls], "easy_to_hard", 0)[0])
    easy = [s for s in calls if s.id in easy_ids][:64]
    encoded = encode(run.base, easy)
    prompts = [(row.id, row.prompt_ids) for row in encoded]
    table, policy = run.step_table("sentence"), run.policy("base").running()
    batches = generate(policy, table, prompts, config.generate, run.base.config.max_length, seed=0)
    right = [ids == encoded[i].target_ids for batch in batches for i, ids in batch]
    assert sum(right) / len(right) > 0.7


@pytest.mark.slow
def test_the_smoke_run_goes_through(tmp_path: Path) -> None:
    assert main(["--stage=iterate", "--config=smoke", f"--run_dir={tmp_path}/run"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"]
    assert [phase["name"] for phase in summary["phases"]] == ["base", "warmup", "iteration_1", "iteration_2"]
    assert all(row["pairs"] > 0 for row in summary["search"])
