"""The shipped checkpoint, and the default run on it."""

import json
from pathlib import Path

import pytest

from itool_jax.config import parse
from itool_jax.data.generated import make_sample
from itool_jax.main import main
from itool_jax.replay import curriculum, sample_features
from itool_jax.sampler import respond
from itool_jax.stages import folder

MODEL = Path(folder.__file__).parent.parent / "embedded" / "model"


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
    base = folder.load_base(config)
    samples = [make_sample("pretraining_test", i, 0) for i in range(300)]
    calls = [s for s in samples if s.category != "irrelevance"]
    easy_ids = set(curriculum([sample_features(s) for s in calls], "easy_to_hard", 0)[0])
    easy = [s for s in calls if s.id in easy_ids][:64]
    encoded = folder.encode(config, easy)
    prompts = [(row.id, row.prompt_ids) for row in encoded]
    table, policy = folder.step_table(config, "sentence"), folder.load_policy(config, "base")
    found = respond(policy, table, prompts, config.generate, base.config.max_length, seed=0)
    right = [ids == row.target_ids for ids, row in zip(found, encoded, strict=True)]
    assert sum(right) / len(right) > 0.7


@pytest.mark.slow
def test_the_smoke_run_goes_through(tmp_path: Path) -> None:
    assert main(["--stage=iterate", "--config=smoke", f"--run_dir={tmp_path}/run"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["finished"]
    assert [phase["name"] for phase in summary["phases"]] == ["base", "warmup", "iteration_1", "iteration_2"]
    assert all(row["pairs"] > 0 for row in summary["search"])
