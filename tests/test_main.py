"""The command line: help, exit codes, and one clear line for whatever a user can get wrong."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from safetensors.numpy import load_file, save_file

from itool_jax import config as settings
from itool_jax.config import Config
from itool_jax.main import main
from itool_jax.stages import generate, iterate, score
from itool_jax.store import directory as run_directory
from tests import tiny
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("restored_jax_settings")

Run = Callable[..., str]

SAMPLE = {"id": "a", "messages": [{"role": "user", "content": "hi"}], "tools": [], "target": "[f()]"}


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line that must end with code 2 and one line on stderr; returns that line."""

    def run(*arguments: Any) -> str:
        capfd.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("python -m itool_jax.main: error: ")
        assert "Traceback" not in err
        return err.removeprefix("python -m itool_jax.main: error: ").removesuffix("\n")

    return run


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# Help and exit codes ----------------------------------------------------------------------------------------


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    text = re.sub(r"[│╭╮╰╯─]", " ", out)
    entries = re.split(r"\n\s+(?=-)", text)
    explained = {}
    for entry in entries:
        head, _, rest = entry.partition("\n")
        for name in re.findall(r"--([\w.-]+)", head):
            explained[name] = re.sub(r"\((default|required)[^()]*\)", "", rest).strip()
    for name in Config(stage="iterate").flat():
        words = explained[name.replace("_", "-")]
        assert len(words.split()) >= 3, name


def test_help_comes_fast_and_may_be_cut_short():
    """As in `… --help | head -1`: whoever reads it goes away, and nobody complains."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(
        [sys.executable, "-m", "itool_jax.main", "--help"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 4  # of a processor; 1.25 on a machine with nothing else to do


def test_help_imports_nothing_slow_that_it_does_not_need():
    heavy = {"grain", "orbax", "scipy", "tokenizers", "transformers", "huggingface_hub", "wandb"}
    code = f"import sys, itool_jax.main; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_command_of_its_own_ends_with_code_2_and_one_line(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "itool_jax.main", "--stage=generate", f"--data={tmp_path / 'none.jsonl'}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    line = f"python -m itool_jax.main: error: {tmp_path / 'none.jsonl'} does not exist\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_an_interrupt_is_one_line_and_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    def interrupt(config: Config) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(iterate, "run", interrupt)
    assert main(["--stage=iterate", f"--run_dir={tmp_path}"]) == 130
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err == "Interrupted. Rerun the same command to resume.\n"


def test_a_fault_of_the_program_is_not_taken_for_one_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(config: Config) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(iterate, "run", fail)
    with pytest.raises(KeyError, match="a bug"):
        main(["--stage=iterate", f"--run_dir={tmp_path}"])


def test_the_whole_traceback_is_there_for_who_asks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ITOOL_TRACEBACK", "1")
    with pytest.raises(ValueError, match=r"^search\.breadth must be positive, got 0"):
        main(["--stage=iterate", "--search.breadth=0"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n  lines"), "two lines"),
        (ValueError(), "ValueError"),
        (OSError(errno.ENOSPC, "No space left on device"), "DIR: No space left on device; free some space and"),
        (OSError(errno.ENOSPC, "No space left on device", "a.jsonl"), "a.jsonl: No space left on device; free some"),
        (OSError(errno.EACCES, "Permission denied", "a.jsonl"), "a.jsonl: Permission denied"),
        (OSError("of a library\nof the network"), "of a library of the network"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: 9 GB"),
            "out of device memory (RESOURCE_EXHAUSTED: 9 GB); lower",
        ),
    ],
)
def test_errors_are_one_line(error: Exception, line: str):
    described = settings.describe_error(error, Path("DIR"))
    assert described.startswith(f"python -m itool_jax.main: error: {line}")
    assert ("kept" in described) == ("No space" in line)


def test_float32_is_computed_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    seen = []
    monkeypatch.setattr(score, "run", lambda config: seen.append(jax.config.values["jax_default_matmul_precision"]))
    assert main(["--stage=score", "--dtype=float32", "--data=d", f"--output={tmp_path / 'o'}"]) == 0
    assert seen == ["highest"]


# Arguments and files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--stage=walk", ["'walk'", "iterate"]),
        ("--search.breadht=3", ["--search.breadht=3", "--search.breadth"]),
        ("--search.breadth=0", ["search.breadth must be positive, got 0"]),
        ("--search.temperature=nan", ["search.temperature", "nan"]),
        ("--config=absent.yaml", ["config 'absent.yaml' not found", "demo"]),
    ],
)
def test_a_bad_argument(refused: Run, argument: str, words: list[str]):
    line = refused("--stage=iterate", argument)
    assert [word for word in words if word not in line] == []


def test_a_bad_config_file(refused: Run, tmp_path: Path):
    path = write_rows(tmp_path / "c.yaml", "search: {breadht: 3}")
    assert refused("--stage=iterate", f"--config={path}").startswith(f"{path}: unknown setting search.breadht")


@pytest.mark.parametrize("stage", ["score", "generate", "iterate"])
def test_a_missing_model(refused: Run, tmp_path: Path, stage: str):
    data = write_rows(tmp_path / "d.jsonl", *({**SAMPLE, "id": f"s{i}", "target": f"[f({i})]"} for i in range(200)))
    output = [f"--output={tmp_path / 'o.jsonl'}"] if stage != "iterate" else []
    line = refused(
        f"--stage={stage}", f"--model={tmp_path / 'none'}", f"--data={data}", f"--run_dir={tmp_path}", *output
    )
    assert line.startswith(f"model {tmp_path / 'none'} is neither")


@pytest.mark.parametrize("stage", ["score", "generate"])
def test_no_data(refused: Run, tmp_path: Path, tiny_folder: Path, stage: str):
    line = refused(f"--stage={stage}", f"--model={tiny_folder}", f"--output={tmp_path / 'o.jsonl'}")
    assert line.startswith(f"--stage={stage} needs --data=FILE")


BAD_DATA = [
    ([], "{data} contains no samples"),
    (["", "  "], "{data} contains no samples"),
    ([SAMPLE, '{"id": '], "{data} line 2: not valid JSON"),
    ([SAMPLE, "[1]"], "{data} line 2: not a JSON object"),
    ([SAMPLE, {"id": "b"}], '{data} line 2: sample has no "messages"'),
    ([SAMPLE, SAMPLE], '{data} line 2: duplicate id "a", first used in {data} line 1'),
    ([{"id": "b", "prompt_ids": [-1], "target_ids": [1]}], '{data} line 1: "prompt_ids" must be'),
    (
        [{"id": "b", "prompt_ids": [1], "target_ids": [272]}],
        "sample b: token id 272 is not in the model's vocabulary of",
    ),
    ([{"id": "b", "prompt_ids": [10**9], "target_ids": [1]}], "sample b: token id 1000000000 is not in the model's"),
    ([{"id": "b", "prompt_ids": [1] * 2000, "target_ids": [1]}], "sample b: its 2001 tokens do not fit the model's"),
    ([{"id": "b", "prompt_ids": [1], "target_ids": [1] * 1024}], "sample b: its 1025 tokens do not fit the model's"),
    ([{**SAMPLE, "target": "x" * 1024}], "sample a: its 1"),
    ([{**SAMPLE, "target": ""}], '{data} line 1: sample has an empty "target"'),
]


@pytest.mark.parametrize(("rows", "message"), BAD_DATA)
def test_bad_data(refused: Run, tmp_path: Path, tiny_folder: Path, rows: list[Any], message: str):
    data, output = write_rows(tmp_path / "d.jsonl", *rows), tmp_path / "o.jsonl"
    output.write_text("precious\n")
    line = refused("--stage=score", f"--model={tiny_folder}", f"--data={data}", f"--output={output}")
    assert line.startswith(message.format(data=data))
    assert output.read_text() == "precious\n"


def test_a_prompt_that_leaves_no_room(refused: Run, tmp_path: Path, tiny_folder: Path):
    data = write_rows(tmp_path / "d.jsonl", {"id": "b", "prompt_ids": [1] * 1024})
    line = refused("--stage=generate", f"--model={tiny_folder}", f"--data={data}", f"--output={tmp_path / 'o'}")
    assert line.startswith("sample b: its 1024 tokens do not fit the model's context of 1024")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([SAMPLE], "data {data} has 1 samples, too few"),
        ([SAMPLE, "{"], "{data} line 2: not valid JSON"),
        ([], "{data} contains no samples"),
        ([{"id": "a", "prompt_ids": [1], "target_ids": [2]}], "{data} contains raw prompts, which only"),
        (
            [{**SAMPLE, "id": f"s{i}", "target": "x" * 1024 if i == 150 else f"x{i}"} for i in range(200)],
            "{data} line 151: sample s150: its 1",
        ),
    ],
)
def test_bad_training_data_is_met_before_anything_is_computed(
    refused: Run, tmp_path: Path, tiny_folder: Path, rows: list[Any], message: str
):
    data, run = write_rows(tmp_path / "d.jsonl", *rows), tmp_path / "run"
    line = refused("--stage=iterate", f"--model={tiny_folder}", f"--data={data}", f"--run_dir={run}")
    assert line.startswith(message.format(data=data))
    assert {path.name for path in run.iterdir()} <= set(run_directory.NO_RESULTS)


# Models -----------------------------------------------------------------------------------------------------


def copy_model(tiny_folder: Path, folder: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, folder))


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(NORM), f": tensor {NORM} is missing"),
        (
            lambda tensors: tensors.update({"model.extra.weight": tensors[NORM]}),
            ": unexpected tensor model.extra.weight",
        ),
        (
            lambda tensors: tensors.update({NORM: tensors[NORM][:-1]}),
            f"/model.safetensors: tensor {NORM} has shape (31,), config.json asks for (32,)",
        ),
    ],
    ids=["missing", "extra", "misshaped"],
)
def test_a_model_with_a_wrong_tensor(
    refused: Run, tmp_path: Path, tiny_folder: Path, change: Callable[[dict[str, Any]], Any], message: str
):
    model = copy_model(tiny_folder, tmp_path / "model")
    change_tensors(model, change)
    data = write_rows(tmp_path / "d.jsonl", SAMPLE)
    line = refused("--stage=score", f"--model={model}", f"--data={data}", f"--output={tmp_path / 'o'}")
    assert line.startswith(f"{model}{message}")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["absent", "cut"])
def test_a_model_with_a_damaged_file(refused: Run, tmp_path: Path, tiny_folder: Path, file: str, damage: str):
    model = copy_model(tiny_folder, tmp_path / "model")
    if damage == "absent":
        (model / file).unlink()
    else:
        (model / file).write_bytes((model / file).read_bytes()[:100])
    data = write_rows(tmp_path / "d.jsonl", SAMPLE)
    line = refused("--stage=score", f"--model={model}", f"--data={data}", f"--output={tmp_path / 'o'}")
    assert str(model) in line
    assert file in line or file.partition(".")[0] in line


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json", "LICENSE"])
def test_links_that_an_export_could_not_follow_are_refused_before_training(
    refused: Run, tmp_path: Path, tiny_folder: Path, name: str
):
    model, run = copy_model(tiny_folder, tmp_path / "model"), tmp_path / "run"
    link, elsewhere = model / name, tmp_path / "elsewhere"
    link.unlink(missing_ok=True)
    link.symlink_to(elsewhere)
    command = ("--stage=warmup", f"--model={model}", f"--run_dir={run}")
    assert refused(*command) == f"{link} is a link to a file outside its folder; put the file itself there"
    for target in (model / "nothing", link):  # the second is a circle
        link.unlink()
        link.symlink_to(target)
        assert refused(*command) == f"{link} is a link to a file that does not exist; put the file itself there"
    assert not (run / "warmup").exists()


def test_a_model_whose_weights_are_not_numbers(tmp_path: Path, tiny_folder: Path, capfd: pytest.CaptureFixture[str]):
    model = copy_model(tiny_folder, tmp_path / "model")
    change_tensors(model, lambda tensors: tensors["model.norm.weight"].fill(float("nan")))
    data = write_rows(tmp_path / "d.jsonl", SAMPLE)
    assert main(["--stage=score", f"--model={model}", f"--data={data}", f"--output={tmp_path / 'o'}"]) == 2
    assert "error: sample a: its log-probability is nan" in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "o").exists()


def test_a_tokenizer_larger_than_its_model(refused: Run, tmp_path: Path):
    model = tiny.tiny_checkpoint(tmp_path / "model", vocab_size=260)
    data = write_rows(tmp_path / "d.jsonl", SAMPLE)
    line = refused("--stage=score", f"--model={model}", f"--data={data}", f"--output={tmp_path / 'o'}")
    assert line.startswith(f"tokenizer of {model} has 266 tokens")


@pytest.mark.parametrize("stage", ["score", "generate", "iterate"])
def test_a_tokenizer_without_a_chat_template(refused: Run, tmp_path: Path, tiny_folder: Path, stage: str):
    model = copy_model(tiny_folder, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    data = write_rows(tmp_path / "d.jsonl", *({**SAMPLE, "id": f"s{i}", "target": f"[f({i})]"} for i in range(200)))
    output = [f"--output={tmp_path / 'o'}"] if stage != "iterate" else []
    line = refused(f"--stage={stage}", f"--model={model}", f"--data={data}", f"--run_dir={tmp_path / 'run'}", *output)
    place = f"{data} line 1: " if stage == "iterate" else ""
    assert line.startswith(f"{place}sample s0: tokenizer of {model} has no chat template; add chat_template.jinja")


# Places to write --------------------------------------------------------------------------------------------


def test_an_output_that_is_a_folder(refused: Run, tmp_path: Path, tiny_folder: Path):
    data = write_rows(tmp_path / "d.jsonl", SAMPLE)
    line = refused("--stage=score", f"--model={tiny_folder}", f"--data={data}", f"--output={tmp_path}")
    assert line == f"output {tmp_path} is a folder, not a file"


def test_a_run_directory_that_is_a_file(refused: Run, tmp_path: Path, tiny_folder: Path):
    data = write_rows(tmp_path / "d.jsonl", SAMPLE)
    assert refused("--stage=iterate", f"--model={tiny_folder}", f"--run_dir={data}") == (
        f"folder {data} cannot be created (File exists); set --run_dir"
    )


def test_a_full_disk_while_an_output_is_written(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data, output = write_rows(tmp_path / "d.jsonl", {"id": "a", "prompt": "x"}), tmp_path / "o.jsonl"
    output.write_text("precious\n")
    arguments = ["--stage=generate", f"--model={tiny_folder}", f"--data={data}", f"--output={output}"]
    monkeypatch.setattr(generate, "generate", lambda *_: [[(0, [5])]])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert main(arguments) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"python -m itool_jax.main: error: {output}: No space left on device; free some space")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "o.jsonl", "o.jsonl.working"]
    assert output.read_text() == "precious\n"
    assert main(arguments) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "o.jsonl"]
    assert json.loads(output.read_text())["token_ids"] == [5]
