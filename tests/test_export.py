"""Exported folders: transformers and PEFT open them and give the policy's logits; nothing is overwritten unasked."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from itool_jax import config as settings
from itool_jax.inference.sampler import Policy
from itool_jax.main import main
from itool_jax.model import hf
from itool_jax.model.export import write_tensors
from itool_jax.store import base as base_store
from itool_jax.store.base import load_base
from itool_jax.store.run import Run
from itool_jax.store.weights import restore_trained
from itool_jax.text.chat import Chat, load_tokenizer
from tests.conftest import write
from tests.runs import Made, copy_run, make_samples

pytestmark = pytest.mark.usefixtures("restored_jax_settings")

TOKENS_BT = np.random.default_rng(0).integers(0, 250, (2, 24)).astype(np.int32)


def logits(policy: Policy) -> np.ndarray:
    def run(params: Any, tokens_BT: jax.Array) -> jax.Array:
        model = nnx.merge(policy.graph, params)
        return model.logits(model(tokens_BT)[0])

    return np.asarray(jax.jit(run)(policy.params, TOKENS_BT))


@pytest.fixture(scope="module")
def made(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A copy of the run: exports write to its log."""
    return made._replace(folder=copy_run(made, tmp_path_factory.mktemp("exported")))


def policy_of(made: Made, phase: str, *changes: str) -> Policy:
    config = settings.parse(["--stage=evaluate", f"--run_dir={made.folder}", *made.settings, *changes])
    return Run(config).policy(phase).running()


def exported(made: Made, target: Path, *changes: str) -> int:
    return main(["--stage=export", f"--run_dir={made.folder}", f"--output={target}", *made.settings, *changes])


def torch_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS_BT, dtype=torch.long)).logits.float().numpy()


@pytest.mark.parity
def test_transformers_opens_a_merged_model(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import transformers

    target = tmp_path / "model"
    assert exported(made, target, "--export.shard_gigabytes=2e-5") == 0
    names = {path.name for path in target.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    shards = sorted(target.glob("model-*-of-*.safetensors"))
    assert {shard.stat().st_mode for shard in shards} == {(target / "config.json").stat().st_mode}
    assert len(shards) > 2
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert {target / name for name in index["weight_map"].values()} == set(shards)
    assert index["metadata"]["total_size"] == sum(x.nbytes for shard in shards for x in load_file(shard).values())
    model = transformers.AutoModelForCausalLM.from_pretrained(target)
    ours = logits(policy_of(made, "iteration_2"))
    np.testing.assert_allclose(torch_logits(model), ours, atol=1e-4 * ours.std())
    assert np.abs(ours - logits(policy_of(made, "base"))).max() > 1e-2
    assert model.generation_config.eos_token_id == list(made.chat.stop_ids)
    again = Chat(load_tokenizer(str(target)))
    turns = [{"role": "user", "content": "hi"}]
    assert again.prompt_ids(turns) == made.chat.prompt_ids(turns)
    raw = json.loads((target / "config.json").read_text())
    assert raw["dtype"] == raw["torch_dtype"] == "float32"
    # And so do we.
    _, params = hf.load(target, stacked=False)
    np.testing.assert_array_equal(logits(Policy(policy_of(made, "base").graph, params)), ours)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, in PEFT
@pytest.mark.parity
def test_peft_opens_an_adapter(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    target = tmp_path / "adapter"
    assert exported(made, target, "--export.kind=adapter", "--export.phase=warmup") == 0
    name = json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(name), target)
    ours = logits(policy_of(made, "warmup"))
    np.testing.assert_allclose(torch_logits(model), ours, atol=1e-4 * ours.std())
    assert np.abs(ours - logits(policy_of(made, "base"))).max() > 1e-3


def test_a_run_begins_with_an_adapter(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "adapter"
    assert exported(made, target, "--export.kind=adapter", "--export.phase=warmup") == 0
    monkeypatch.chdir(tmp_path)  # from any folder
    base = Path(json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"])
    assert base.is_absolute()
    assert hf.load(base)
    with pytest.raises(ValueError, match=re.escape(f"holds an adapter; set --model={base} --adapter={target}")):
        hf.read_config(target, "float32")
    adapter = f"--adapter={target}"
    trained = logits(policy_of(made, "warmup"))
    np.testing.assert_array_equal(logits(policy_of(made, "base", adapter)), trained)
    rough = logits(policy_of(made, "base", adapter, "--dtype=bfloat16"))  # not merged
    np.testing.assert_allclose(rough, trained, atol=0.1 * trained.std())
    config = settings.parse(["--stage=warmup", f"--run_dir={tmp_path / 'run'}", *made.settings, adapter])
    start, _ = Run(config).policy("base").trainable()
    of_run = settings.parse(["--stage=warmup", f"--run_dir={made.folder}", *made.settings])
    jax.tree.map(np.testing.assert_array_equal, start, restore_trained(of_run, "warmup"))
    assert load_base(config).chat.stop_ids == made.chat.stop_ids
    # The adapter's own template and stop tokens count; those of the base stop too.
    (target / "generation_config.json").write_text('{"eos_token_id": [7]}')
    (target / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    base_store._load.cache_clear()
    chat = load_base(config).chat
    assert set(chat.stop_ids) >= {7, made.chat.tokenizer.eos_token_id}
    assert chat.tokenizer.decode(chat.prompt_ids([{"role": "user", "content": "hi"}])) == "hi"
    base_store._load.cache_clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 4}, "has rank 4 and alpha 32, but the settings say 2 and 32; set --lora.rank=4 --lora.alpha=32"),
        ({"r": 4, "use_rslora": True}, "set --lora.rank=4 --lora.alpha=64"),
        ({"r": 2, "lora_alpha": 16, "use_rslora": True}, "set --lora.rank=2 --lora.alpha=22.627417"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4 goes with a changed base"),
        ({"use_dora": True}, "use_dora=True is not supported; merge the adapter with PEFT"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head'] is not supported"),
        ({"bias": "all"}, "bias=all is not supported"),
        ({"peft_type": "IA3"}, "peft_type=IA3 is not supported, only LORA"),
        ({"r": 0}, "r and lora_alpha must be positive numbers, got 0 and 32"),
        ({"tensor": "x"}, "adapter_model.safetensors: tensor x is of a module that lora.targets does not name"),
        ({"drop": ".0.self_attn.q_proj.lora_A"}, "layers.0.self_attn.q_proj.lora_A.weight is missing"),
        ({"shape": ".0.self_attn.q_proj.lora_A"}, "was the adapter trained for another model?"),
    ],
)
def test_adapters_that_cannot_be_loaded_are_named(
    made: Made, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    target = tmp_path / "adapter"
    assert exported(made, target, "--export.kind=adapter") == 0
    path, file = target / "adapter_config.json", target / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if change.get("drop", change.get("shape", "")) in key)
    if "tensor" in change:
        tensors[change["tensor"]] = np.zeros(2, np.float32)
    elif "drop" in change:
        del tensors[name]
    elif "shape" in change:
        tensors[name] = np.zeros((2, 5), np.float32)
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    write_tensors(file, tensors)
    with pytest.raises(ValueError, match=re.escape(message)):
        policy_of(made, "base", f"--adapter={target}")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, in PEFT
@pytest.mark.parity
def test_an_adapter_of_peft_is_loaded(made: Made, tmp_path: Path) -> None:
    """One of some modules, with the other scaling."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(made.settings[0].removeprefix("--model="))
    lora = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True)
    model = peft.get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    given = (f"--adapter={tmp_path / 'adapter'}", "--lora.rank=4", "--lora.alpha=12")
    ours = logits(policy_of(made, "base", *given))
    np.testing.assert_allclose(torch_logits(model), ours, atol=1e-4 * ours.std())
    assert np.abs(ours - logits(policy_of(made, "base"))).max() > 1e-2


def test_what_is_there_is_not_overwritten_unasked(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    for changes, message in (
        ((), f"output {target} exists; choose another --output, or replace it with --overwrite"),
        (("--overwrite",), f"output {target} is not an exported model, so --overwrite does not replace it"),
        (("--export.phase=iteration_9",), "export.phase=iteration_9 has no weights in"),
        (("--export.kind=adapter", "--export.dtype=float16"), "export.dtype applies only to export.kind=merged"),
    ):
        assert exported(made, target, *changes) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["model", "thesis.tex"]
    (target / "config.json").write_text("{}")
    assert exported(made, target, "--overwrite") == 2  # a project of another kind
    model = Path(made.settings[0].removeprefix("--model="))
    assert exported(made, model, "--overwrite") == 2  # the very base
    assert f"output {model} is not an exported model" in capsys.readouterr().err
    assert hf.load(model)
    (target / "thesis.tex").unlink()
    (target / "model.safetensors").write_text("an older one")
    assert exported(made, target, "--overwrite") == 0
    assert hf.load(target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failed_export_leaves_the_old_one(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    assert exported(made, target, "--export.phase=warmup") == 0
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy", fail)
    assert exported(made, target, "--overwrite") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupt_at_the_last_moment_leaves_the_old_one(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    assert exported(made, target, "--export.phase=warmup") == 0
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    rename = Path.rename

    def interrupted(path: Path, other: Path) -> Path:
        if path.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", interrupted)
    assert exported(made, target, "--overwrite") == 130
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_adapters_are_not_merged_into_another_base(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    made = warmed_up(tmp_path, model, "--lora.rank=2")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    assert exported(made, tmp_path / "model") == 2
    assert "a different model.safetensors of --model=" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def warmed_up(tmp_path: Path, tiny_folder: Path, *changes: str) -> Made:
    """A run of the warm-up alone, of another kind of weights."""
    data = write(tmp_path / "d.jsonl", make_samples(60))
    options = [f"--model={tiny_folder}", f"--data={data}", "--replay.replay_fraction=0.5", "--warmup.batch_size=8"]
    options += ["--warmup.learning_rate=1e-2", *changes]
    assert main(["--stage=warmup", f"--run_dir={tmp_path / 'run'}", *options]) == 0
    return Made(tmp_path / "run", options, [], Chat(load_tokenizer(str(tiny_folder))), "")


def test_a_folder_of_the_hubs_cache_is_trained_and_exported(tiny_folder: Path, tmp_path: Path) -> None:
    """Its files are links to blobs; the export holds what they link to."""
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0a1b", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(tiny_folder, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    made = warmed_up(tmp_path, snapshot, "--lora.rank=2")
    assert exported(made, tmp_path / "model") == 0
    paths = list((tmp_path / "model").iterdir())
    assert not [path for path in paths if path.is_symlink()]
    assert {path.name for path in paths} == {path.name for path in blobs.iterdir()} | {
        "generation_config.json",
        "SERVING.md",
    }
    copied = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    assert all((tmp_path / "model" / name).read_bytes() == (blobs / name).read_bytes() for name in copied)
    assert hf.load(tmp_path / "model")


def test_each_tensor_keeps_the_type_of_the_models_own_files(tiny_folder: Path, tmp_path: Path) -> None:
    """A bfloat16 model with one float32 tensor, trained in float32: merged in float32, and rounded once."""
    model, norm = Path(shutil.copytree(tiny_folder, tmp_path / "base")), "model.norm.weight"
    tensors = {name: x.astype(jnp.bfloat16) for name, x in load_file(model / hf.WEIGHTS).items()}
    write_tensors(model / hf.WEIGHTS, tensors | {norm: tensors[norm].astype(np.float32)})
    made = warmed_up(tmp_path, model, "--lora.rank=2")
    policy = policy_of(made, "warmup")
    for changes, expected in (((), "bfloat16"), (("--export.dtype=float32",), "float32")):
        target = tmp_path / f"in_{expected}"
        assert exported(made, target, *changes) == 0
        types = {name: x.dtype.name for name, x in load_file(target / hf.WEIGHTS).items()}
        assert types == dict.fromkeys(tensors, expected) | {norm: "float32"}
        raw = json.loads((target / "config.json").read_text())
        assert raw["dtype"] == raw["torch_dtype"] == expected
        written, merged = hf.load(target, stacked=False)[1], jax.tree.map(np.asarray, policy.params)
        if expected == "bfloat16":
            merged = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), merged)
            merged["norm"] = policy.params["norm"]
        jax.tree.map(np.testing.assert_array_equal, written, merged)


def test_four_bit_bases_are_named_in_a_merge(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = warmed_up(tmp_path, tiny_folder, "--quantize=nf4", "--lora.rank=2")
    assert exported(made, tmp_path / "model") == 2
    assert "export.base must be original or dequantized" in capsys.readouterr().err
    ours = logits(policy_of(made, "warmup"))
    worst = {}
    for base in ("dequantized", "original"):
        target = tmp_path / base
        assert exported(made, target, f"--export.base={base}") == 0
        merged = Policy(policy_of(made, "base", "--quantize=none").graph, hf.load(target, stacked=False)[1])
        worst[base] = np.abs(logits(merged) - ours).max() / ours.std()
    assert worst["dequantized"] < 1e-4
    assert worst["original"] > 1e-2  # four bits are not sixteen, and the adapters were trained beside four


def test_all_weights_are_trained_and_exported_without_adapters(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = warmed_up(tmp_path, tiny_folder, "--lora.rank=0")
    assert exported(made, tmp_path / "adapter", "--export.kind=adapter") == 2
    assert "has no adapters; set export.kind=merged" in capsys.readouterr().err
    assert exported(made, tmp_path / "model") == 0
    trained, base = (hf.load(f, stacked=False)[1] for f in (tmp_path / "model", tiny_folder))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), trained, base)))
    policy = policy_of(made, "warmup")
    np.testing.assert_array_equal(logits(Policy(policy.graph, trained)), logits(policy))
