"""The doctor: what is well is said, what is wrong is named with a remedy, and nothing is changed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

from itool_jax import config as settings
from itool_jax.doctor import machine
from itool_jax.doctor import model as doctor_model
from itool_jax.doctor.machine import Finding, Gpu
from itool_jax.main import main
from itool_jax.store.base import load_base
from itool_jax.system import environment
from itool_jax.text.chat import Chat, load_tokenizer
from tests.conftest import write
from tests.runs import Made, copy_run, make_samples

pytestmark = pytest.mark.usefixtures("restored_jax_settings")

Doctor = Callable[..., tuple[int, list[str], str]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "d.jsonl", make_samples())


@pytest.fixture
def doctor(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Runs the stage; gives its exit code, what it prints and its last line on stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(model: Path | str, *arguments: str) -> tuple[int, list[str], str]:
        own = [f"--model={model}", f"--data={data}", f"--run_dir={tmp_path / 'run'}"]
        own = [a for a in own if a.split("=")[0] not in {b.split("=")[0] for b in arguments}]
        capsys.readouterr()
        code = main(["--stage=doctor", *own, *arguments])
        printed = capsys.readouterr()
        return code, printed.out.splitlines(), printed.err.strip()

    return run


def line(lines: list[str], level: str, what: str) -> str:
    """The text of the one line of that level about that, and its remedy."""
    at = [i for i, text in enumerate(lines) if text.startswith(f"{level:<8}{what:<16}")]
    assert len(at) == 1, lines
    remedy = lines[at[0] + 1].strip() if lines[at[0] + 1 :] and lines[at[0] + 1].startswith(" " * 24) else ""
    return f"{lines[at[0]][24:]} {remedy}".strip()


def contents(place: Path) -> dict[str, tuple[bytes, int]]:
    files = sorted(p for p in place.rglob("*") if p.is_file())
    return {str(p.relative_to(place)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def copied(model: Path, place: Path) -> Path:
    return Path(shutil.copytree(model, place / "model"))


# All is well ------------------------------------------------------------------------------------------------


def test_where_all_is_well_nothing_is_changed(doctor: Doctor, tiny_folder: Path, tmp_path: Path, data: Path):
    before = contents(tiny_folder), contents(tmp_path), contents(data.parent)
    code, lines, err = doctor(tiny_folder)
    assert (code, err) == (0, "")
    assert (contents(tiny_folder), contents(tmp_path), contents(data.parent)) == before
    assert not (tmp_path / "run").exists()
    assert lines[-1] == "no errors, 1 warning"
    assert not [text for text in lines if text.startswith("error")]
    assert "1 of 8 devices are used" in line(lines, "warning", "mesh")
    assert jax.__version__ in line(lines, "ok", "jax")
    assert "8 x cpu; programs may use" in line(lines, "ok", "devices")
    assert "2 layers of 32, vocabulary 272, context 1024" in line(lines, "ok", "model")
    assert "matching config.json" in line(lines, "ok", "weights")
    assert line(lines, "ok", "stop tokens").startswith("<|end|> (")
    assert "prefix of the answered conversation" in line(lines, "ok", "loss mask")
    assert " tokens, longest " in line(lines, "ok", "data")


def test_the_preview_shows_what_is_trained_on(tiny_folder: Path, data: Path):
    config = settings.parse(["--stage=doctor", f"--model={tiny_folder}", f"--data={data}"])
    _, samples = doctor_model.data(config)
    assert [shown.sample.target[0] for shown in samples] == ["[", "I"]
    chat = load_base(config).chat
    for shown in samples:
        _, before, trained, steps = doctor_model.preview(config, shown)
        coloured = [trained.plain[s.start : s.end] for s in trained.spans if "on" in str(s.style).split()]
        assert "".join(coloured) == f"{shown.sample.target}<|end|>"
        assert len(coloured) == len(shown.encoded.target_ids)
        assert before.plain.endswith("<|assistant|>")
        assert steps.plain.endswith("<|end|>")
        assert chat.target_ids(shown.sample.target) == shown.encoded.target_ids
        n_calls = shown.sample.target.count("(")
        assert steps.plain.count(" | ") == max(1, n_calls)


# The model and the data -------------------------------------------------------------------------------------


def test_tensors_of_another_shape(doctor: Doctor, tiny_folder: Path, tmp_path: Path):
    model = copied(tiny_folder, tmp_path)
    weights = load_file(model / "model.safetensors")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"][:-1].copy()}, model / "model.safetensors")
    code, lines, err = doctor(model)
    assert code == 2
    assert "model.norm.weight has shape (31,), config.json asks for (32,)" in line(lines, "error", "weights")
    assert "→ download the model again" in line(lines, "error", "weights")
    assert err == "python -m itool_jax.main: error: doctor: 1 error and 1 warning; fix the errors marked above"


def test_a_folder_without_weights_or_with_a_model_that_is_not_known(doctor: Doctor, tiny_folder: Path, tmp_path: Path):
    model = copied(tiny_folder, tmp_path)
    (model / "model.safetensors").unlink()
    code, lines, _ = doctor(model)
    assert code == 2
    assert "contains neither model.safetensors nor" in line(lines, "error", "weights")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["Gpt"]}))
    code, lines, _ = doctor(model)
    assert code == 2
    assert "architecture ['Gpt'] is not supported" in line(lines, "error", "model")


def test_a_tokenizer_of_another_model(doctor: Doctor, tiny_folder: Path, tmp_path: Path):
    model = copied(tiny_folder, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 260}))
    code, lines, _ = doctor(model)
    assert code == 2
    assert "has 266 tokens" in line(lines, "error", "tokenizer")
    assert not [text for text in lines if "data" in text[8:24]]


def test_templates_that_lack_something(tiny_folder: Path, tmp_path: Path):
    config = settings.parse(["--stage=doctor", f"--model={tiny_folder}"])
    chat = Chat(load_tokenizer(str(tiny_folder)))
    given = chat.tokenizer.chat_template

    def findings(template: str | None) -> dict[str, Finding]:
        chat.tokenizer.chat_template = template
        return {finding.what: finding for finding in doctor_model.template(chat, config)}

    assert {finding.level for finding in findings(given).values()} == {"ok"}
    assert findings(given + "{%- if not add_generation_prompt -%}done{%- endif -%}")["loss mask"].level == "ok"
    other = findings("{%- if add_generation_prompt -%}A{%- endif -%}" + given)["loss mask"]
    assert (other.level, "is not a prefix" in other.text) == ("warning", True)
    without = findings(given.replace("tools | tojson", "tools | length"))["template"]
    assert (without.level, without.text) == ("error", "the tools do not appear in the prompt")
    assert "has no chat template" in findings(None)["template"].text


def test_rows_that_a_run_would_refuse(doctor: Doctor, tiny_folder: Path, tmp_path: Path):
    rows = make_samples()
    rows[3]["messages"] = [{"role": "user", "content": "x" * 2000}]
    path = write(tmp_path / "long.jsonl", [*rows, {"id": "bad", "messages": 3}])
    code, lines, _ = doctor(tiny_folder, f"--data={path}")
    assert code == 2
    error = next(text for text in lines if text.startswith("error   data"))
    assert "2 rows are wrong or too long, the first: " in error
    code, lines, _ = doctor(tiny_folder, f"--data={path}", "--skip_bad_rows")
    assert code == 0
    code, lines, _ = doctor(tiny_folder, f"--data={tmp_path / 'none.jsonl'}")
    assert code == 2
    assert "does not exist → check --data" in line(lines, "error", "data")
    code, lines, _ = doctor(tiny_folder, f"--data={write(tmp_path / 'bad.jsonl', [{'foo': 1}])}")
    assert code == 2
    assert 'line 1: sample has no "messages"' in line(lines, "error", "data")


def test_a_run_directory_that_a_run_would_refuse(doctor: Doctor, made: Made, tmp_path: Path):
    folder = copy_run(made, tmp_path)
    options = [*made.settings, f"--run_dir={folder}"]
    assert doctor("", *options)[0] == 0
    code, lines, _ = doctor("", *options, "--seed=5")
    assert code == 2
    assert "seed=0, but it is now 5" in line(lines, "error", "run directory")
    code, lines, _ = doctor("", *made.settings, f"--run_dir={folder / 'config.yaml'}")
    assert code == 2
    assert "is a file" in line(lines, "error", "run directory")


# The machine ------------------------------------------------------------------------------------------------


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.what: finding.level for finding in findings}


def test_plugins_that_do_not_go_with_jaxlib():
    there = dict(environment.versions())
    assert levels(list(machine.packages(there)))["jax"] == "ok"
    wrong = {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "jax-cuda12-plugin": "0.10.0"}
    finding = next(f for f in machine.packages(wrong) if f.what == "jax")
    assert (finding.level, finding.remedy) == ("error", "pip install 'jax[cuda12]==0.10.2'")
    assert "jax-cuda12-plugin 0.10.0 does not match jaxlib 0.10.2" in finding.text
    old = {"jax": "0.12.0", "jaxlib": "0.12.0", "flax": "0.12.8"}
    assert "flax 0.12.8 does not work with jax 0.12.0" in next(f for f in machine.packages(old) if f.what == "jax").text


def test_a_gpu_that_jax_does_not_see(monkeypatch: pytest.MonkeyPatch):
    gpu = Gpu("NVIDIA H100 80GB HBM3", "570.124.06", "81559 MiB")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    findings = list(machine.accelerators([gpu], "cpu", []))
    assert [f.level for f in findings] == ["error"]
    assert findings[0].remedy == "pip install 'itool-jax[cuda12]'"
    assert next(iter(machine.accelerators([gpu._replace(driver="580.65")], "cpu", []))).remedy.endswith("[cuda13]'")
    (alone,) = machine.accelerators([], "cpu", ["jax-cuda13-plugin"])
    assert alone.level == "warning"
    assert "jax-cuda13-plugin is installed, but no NVIDIA driver" in alone.text
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not list(machine.accelerators([], "cpu", ["jax-cuda13-plugin"]))
    assert "unset JAX_PLATFORMS" in next(iter(machine.accelerators([gpu], "cpu", []))).remedy
    assert [f.level for f in machine.accelerators([gpu], "gpu", [])] == ["ok"]
    assert "too old" in next(iter(machine.accelerators([gpu._replace(driver="470.1")], "gpu", []))).text


def test_devices_without_bfloat16_units():
    for platform, capability in (("cpu", ()), ("gpu", (7, 0)), ("gpu", (7, 5))):
        (finding,) = machine.bfloat16_units(platform, capability, "bfloat16")
        assert (finding.level, finding.what) == ("warning", "dtype")
        assert "computed in float32" in finding.text
        assert "--dtype=float32" in finding.remedy
        assert not list(machine.bfloat16_units(platform, capability, "float32"))
    for platform, capability in (("gpu", (8, 0)), ("gpu", (12, 0)), ("gpu", ()), ("tpu", ())):
        assert not list(machine.bfloat16_units(platform, capability, "bfloat16"))


def test_what_nvidia_smi_prints_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA L4, 570.1, 23034 MiB'\necho 'NVIDIA L4, 570.1, 23034 MiB'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.gpus() == [Gpu("NVIDIA L4", "570.1", "23034 MiB")] * 2
    program.write_text("#!/bin/sh\nexit 9\n")
    assert machine.gpus() == []


def test_a_mesh_that_cannot_be():
    def mesh(*arguments: str) -> Finding:
        config = settings.parse(["--stage=doctor", *arguments])
        return next(finding for finding in machine.devices(config, {}) if finding.what == "mesh")

    assert mesh("--mesh.data=8", "--preference.batch_size=8").level == "ok"
    assert "needs 16 devices, but only 8 are available" in mesh("--mesh.fsdp=16").text
    assert "warmup.batch_size=4 must be a multiple of the 8" in mesh("--mesh.fsdp=8", "--warmup.batch_size=4").text
    assert "1 of 8 devices are used" in mesh("--mesh.data=1").text


def test_a_mesh_over_several_processes_is_looked_at_from_one():
    def mesh(*arguments: str) -> Finding:
        several = (
            "--distributed.coordinator_address=a:1",
            "--distributed.num_processes=2",
            "--distributed.process_id=0",
        )
        config = settings.parse(["--stage=doctor", *(several if arguments else ("--distributed.auto",)), *arguments])
        return next(finding for finding in machine.devices(config, {}) if finding.what == "mesh")

    assert (
        mesh("--mesh.fsdp=16", "--warmup.batch_size=16", "--preference.batch_size=16").text == "data=1 fsdp=16 tensor=1"
    )
    assert "batch_size=8 must be a multiple of the 16 devices" in mesh("--mesh.data=0", "--warmup.batch_size=8").text
    assert "uses 8 of the 16 devices of 2 processes" in mesh("--mesh.data=8").text
    assert mesh().level == "warning"
    assert "not checked" in mesh().text


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "TRIAL", 1 << 20)
    assert next(f.level for f in machine.disk(tmp_path / "run/deep", 1)) == "ok"
    assert next(f.level for f in machine.disk(tmp_path, 1 << 60)) == "error"
    assert list(tmp_path.iterdir()) == []

    def refuse(_: Path) -> tuple[float, float]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(machine, "_try_disk", refuse)
    assert list(machine.disk(tmp_path, 1))[1] == Finding(
        "error", "disk", f"{tmp_path}: Permission denied", "choose another --run_dir"
    )
    monkeypatch.setattr(machine, "_try_disk", lambda _: (1e6, 0.0))
    assert list(machine.disk(tmp_path, 1))[1].level == "warning"


def test_the_compile_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a-cache").write_text("")
    assert next(iter(machine.compile_cache(tmp_path))).text == f"{tmp_path}, 1 programs"
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert next(iter(machine.compile_cache(tmp_path / "x"))).level == "warning"


def test_a_hub_name_without_a_network(doctor: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", secret := "hf_" + "x" * 30)
    code, lines, err = doctor("owner/name")
    assert code == 2
    text = "\n".join(lines)
    assert "token found, offline (HF_HUB_OFFLINE)" in text
    assert "model owner/name is not in the cache, and HF_HUB_OFFLINE is set" in line(lines, "error", "hub")
    assert "not checked" in line(lines, "warning", "model")
    assert "hf download" not in text
    assert "model /none is neither a local file or folder nor a hub name" in "\n".join(doctor("/none")[1])
    assert secret not in text + err
    assert not (tmp_path / "hub").exists()


def test_other_processes(monkeypatch: pytest.MonkeyPatch):
    def findings(*arguments: str) -> list[Finding]:
        return list(machine.processes(settings.parse(["--stage=doctor", *arguments])))

    for name in machine.CLUSTERS:
        monkeypatch.delenv(name, raising=False)
    assert findings() == []
    assert [f.level for f in findings("--distributed.auto")] == ["error"]
    own = ["--distributed.num_processes=2", "--distributed.process_id=0"]
    assert [f.level for f in findings(*own, "--distributed.coordinator_address=localhost:1234")] == ["ok"]
    assert [f.level for f in findings(*own, "--distributed.coordinator_address=localhost")] == ["error"]
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert [f.text for f in findings("--distributed.auto")] == ["started by Slurm"]
    assert [f.level for f in findings()] == ["warning"]
