"""What bounds input from outside, and what keeps secrets out of everything that is shown or saved."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from rich.console import Console

from itool_jax import config
from itool_jax.main import main
from itool_jax.model import hf
from itool_jax.store import directory as run_directory
from itool_jax.store.base import load_base
from itool_jax.system import messages, untrusted

pytestmark = pytest.mark.usefixtures("restored_jax_settings")

HUB, WANDB = "hf_" + "aB3dE5" * 6, "0123456789abcdef" * 2 + "01234567"
SECRET_TEXTS = [
    f"the token {HUB} is not valid",
    f"key {WANDB} was refused",
    "https://someone:s3cret-word@host/path failed",
    "https://s3cret-token-word@host/path failed",
    "GET https://host/file?name=x&access_token=s3cret-word&y=1",
    "Authorization: Bearer s3cret-word-of-mine",
    "sk-ant-" + "s3cret" * 6,
    "ghp_" + "s3cret" * 6,
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", HUB)
    monkeypatch.setenv("WANDB_API_KEY", WANDB)


def is_hidden(text: str) -> bool:
    return not any(secret in text for secret in (HUB, WANDB, "s3cret"))


@pytest.mark.parametrize("text", SECRET_TEXTS)
def test_secrets_are_hidden_in_errors_and_messages(text: str, capsys: pytest.CaptureFixture[str]):
    assert not is_hidden(text)
    assert is_hidden(untrusted.redacted(text))
    assert untrusted.HIDDEN in untrusted.redacted(text)
    assert is_hidden(config.describe_error(ValueError(text)))
    messages.log(text)
    assert is_hidden(capsys.readouterr().err)


@pytest.mark.parametrize(
    "text",
    [
        "runs/sk-learn-tools-benchmark-of-mine/hf_models/x.jsonl line 3: no target",
        "meta-llama/Llama-3.2-1B-Instruct: 1,024 tokens at 12:30, see https://huggingface.co/docs?page=2",
        "--data=hf:OWNER/NAME weights_0123456789abcdef0123456789abcdef",
        "the token id 7 is not in the vocabulary",
    ],
)
def test_what_is_no_secret_is_shown(text: str):
    assert untrusted.redacted(text) == text


def test_a_short_value_in_the_environment_hides_nothing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "parallelism")
    monkeypatch.setenv("MY_TOKEN", "no")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token")
    text = "no parallelism in /var/run/token"
    assert untrusted.redacted(text) == text


@pytest.mark.parametrize(
    "argument", [f"--model={HUB}", "--data=https://me:s3cret-word@host/d", f"--run_dir=runs/{HUB}"]
)
def test_no_setting_holds_a_secret_so_that_none_is_saved(
    tmp_path: Path, argument: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["--stage=iterate", argument]) == 2
    out, err = capsys.readouterr()
    assert is_hidden(out + err)
    assert "holds a token or password" in err
    assert list(tmp_path.iterdir()) == []


def test_a_refused_download_does_not_show_the_token(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: object, **__: object) -> str:
        raise OSError(f"401 for https://user:{WANDB}@huggingface.co/o/m?token={HUB}\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match="could not be downloaded from the Hub") as caught:
        hf.find("owner/name")
    line = config.describe_error(caught.value)
    assert is_hidden(line)
    assert "401 for https://***@huggingface.co/o/m?" in line


def test_a_traceback_of_the_program_hides_secrets(capsys: pytest.CaptureFixture[str]):
    error = KeyError(f"a bug met {HUB}")
    untrusted.show_traceback(KeyError, error, None)
    err = capsys.readouterr().err
    assert is_hidden(err)
    assert err.startswith("KeyError: 'a bug met ***'")


def test_a_saved_config_and_all_files_of_a_run_hold_no_secret(tmp_path: Path):
    run = config.parse(["--stage=iterate", "--model=m", f"--run_dir={tmp_path / 'run'}"])
    run_directory.save_or_check(run)
    assert is_hidden("".join(path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file()))


def test_too_little_memory_on_the_host_is_one_line():
    line = config.describe_error(MemoryError())
    assert line.startswith(
        "python -m itool_jax.main: error: out of host memory (MemoryError); lower warmup.micro_batch"
    )


# Bounds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda x: [x], lambda x: {"a": x}, lambda x: (x, 1)])
def test_depth_is_counted_in_lists_tuples_and_objects(make):
    value = 1
    for _ in range(untrusted.MAX_DEPTH):
        value = make(value)
    assert not untrusted.too_deep(value)
    assert untrusted.too_deep(make(value))


def test_json_is_read_to_the_last_level_and_no_deeper():
    text = "[" * untrusted.MAX_DEPTH + "]" * untrusted.MAX_DEPTH
    assert json.dumps(untrusted.parse_json(text)) == text
    for wrong in (f"[{text}]", "[" * 100_000, "{"):
        with pytest.raises(ValueError, match=r"levels deep|Expecting"):
            untrusted.parse_json(wrong)


def test_a_file_is_read_up_to_its_bound(tmp_path: Path):
    (tmp_path / "a").write_text("12345")
    assert untrusted.read_text(tmp_path / "a", 5) == "12345"
    with pytest.raises(ValueError, match="more than 4 bytes"):
        untrusted.read_text(tmp_path / "a", 4)


def test_names_stay_in_their_folder(tmp_path: Path):
    home = tmp_path / "home"
    (home / "sub").mkdir(parents=True)
    (tmp_path / "outside").write_text("x")
    (home / "out").symlink_to(tmp_path / "outside")
    (home / "within").symlink_to("sub")
    for name in ("a.json", "sub/a.json", "within/a.json", "sub"):
        assert untrusted.inside(home, name) == home / name
    for name in ("../outside", "sub/../../outside", "/etc/passwd", "out", "", ".", "a\0b"):
        with pytest.raises(ValueError, match=r"is not the name of a file in|link to a file outside its folder"):
            untrusted.inside(home, name)


def test_memory_is_bounded():
    held = []

    def fill() -> None:
        while True:
            held.append(bytearray(1 << 20))

    with pytest.raises(untrusted.ExceededError, match=r"more than 50 MB"), untrusted.bounded(60, 50 << 20):
        fill()


def test_secrets_are_hidden_before_the_terminal_wraps_them(monkeypatch: pytest.MonkeyPatch):
    console = Console(record=True, width=20, file=open("/dev/null", "w"))  # noqa: SIM115 - rich closes nothing
    monkeypatch.setattr(messages, "console", console)
    messages.log(f"x {HUB} y")
    assert is_hidden(console.export_text().replace("\n", ""))
    console.file.close()


def test_a_vocabulary_with_gaps_has_as_many_ids_as_the_largest_says(tmp_path: Path, tiny_folder: Path):
    """Its tokens are as many as the model's embeddings, and one of them has none: JAX would take another's."""
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"]["a"] = 5000
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"has 5001 tokens, .* only 272 embeddings"):
        load_base(config.Config(stage="score", model=str(model)))
