"""What a run was made in is kept with it; the same command gives the same files, whatever process runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from itool_jax.main import main
from itool_jax.stages import evaluate
from itool_jax.system import environment
from tests.conftest import REPOSITORY, read
from tests.runs import Made, again, copy_run, lasting

pytestmark = pytest.mark.usefixtures("restored_jax_settings")


def sessions(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / environment.FILE).read_text())["sessions"]


@pytest.mark.processes
def test_the_same_command_gives_the_same_files(made: Made, tmp_path: Path):
    """Two new processes, and the one that tests, at work at the same time."""
    folders = [tmp_path / name / "run" for name in "ab"]
    command = [sys.executable, "-m", "itool_jax.main", "--stage=iterate", *made.settings]
    running = [
        subprocess.Popen(
            [*command, f"--run_dir={folder}"], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for folder in folders
    ]
    outputs = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs[0][1].decode()
    first, second, ours = (lasting(folder) for folder in (*folders, made.folder))
    assert len(first) > 30
    assert first["warmup/warmup.json"].count(b'"weights": "') == 1
    assert first == second
    # The process of the tests has another command line.
    for name in (environment.FILE, "log.jsonl"):
        del first[name], ours[name]
    assert first == ours


def test_the_environment_of_a_run(made: Made):
    session = sessions(made.folder)[0]
    assert session["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"jax", "flax", "numpy", "orbax-checkpoint"} <= session["packages"].keys()
    assert session["devices"] == {"cpu": 8}
    assert (session["backend"], session["processes"]) == ("cpu", 1)
    assert "--stage=iterate" in session["command"]
    assert "device_count=8" in session["flags"]["XLA_FLAGS"]
    if (REPOSITORY / ".git").exists():
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        assert session["code"]["commit"] == git.stdout.strip()


def test_a_run_that_goes_on_elsewhere_says_what_changed(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    folder = copy_run(made, tmp_path)
    session = sessions(folder)[0]
    other = session | {"devices": {"H9": 2}, "packages": session["packages"] | {"jax": "0.0.1"}, "code": None}
    (folder / environment.FILE).write_text(json.dumps({"sessions": [other]}))
    assert again(made, folder) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "different environment" in line]
    assert len(said) == 1
    for part in ("devices 2 x H9 → 8 x cpu", f"jax 0.0.1 → {session['packages']['jax']}"):
        assert part in said[0]
    assert [s["devices"] for s in sessions(folder)] == [{"H9": 2}, {"cpu": 8}]
    assert said[0] in [row["text"] for row in read(folder / "log.jsonl")]
    assert again(made, folder) == 0
    assert "different environment" not in capsys.readouterr().err
    assert len(sessions(folder)) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"sessions": 3}', '{"sessions": [3]}'])
def test_a_damaged_file_never_stops_a_run(made: Made, tmp_path: Path, content: str):
    folder = copy_run(made, tmp_path)
    (folder / environment.FILE).write_text(content)
    assert again(made, folder) == 0
    assert len(sessions(folder)) == 1


def test_the_command_line_is_kept_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_TOKEN", "correct horse")
    environment.record(tmp_path, ["main", "--data=correct horse", "--hub_token=abc", "--a=b"])
    assert sessions(tmp_path)[0]["command"] == "main '--data=***' --hub_token=*** --a=b"


# Determinism ------------------------------------------------------------------------------------------------


def test_what_a_gpu_needs_is_set_before_its_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The compiler ends a process whose flags it does not know."""
    code = (
        "from itool_jax.system import environment as e; e.make_deterministic(); "
        "import jax; print(jax.numpy.arange(3).sum())"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert printed == "3\n"
    monkeypatch.setenv("XLA_FLAGS", "--mine=1")
    monkeypatch.setattr(evaluate, "run", lambda _: None)
    command = ["--stage=evaluate", f"--run_dir={tmp_path}", "--deterministic"]
    for _ in range(2):
        assert main(command) == 0
        assert os.environ["XLA_FLAGS"].split() == ["--mine=1", *environment.DETERMINISTIC]
    assert sessions(tmp_path)[0]["flags"]["XLA_FLAGS"] == os.environ["XLA_FLAGS"]


@pytest.mark.parametrize(("cores", "rows", "n"), [(1, 8, 1), (2, 8, 2), (6, 8, 4), (64, 16, 8), (2, 9, 1)])
def test_a_cpu_becomes_as_many_devices_as_share_a_batch(cores: int, rows: int, n: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    given: dict[str, int] = {}
    monkeypatch.setattr(jax.config, "update", given.__setitem__)
    environment.split_cpu(rows)
    assert not given  # the tests' XLA_FLAGS set the number of devices
    monkeypatch.setenv("XLA_FLAGS", "")
    environment.split_cpu(rows)
    # Several devices on as many threads must not have several programs in flight: one waits for another for ever.
    assert given == {"jax_num_cpu_devices": n, "jax_cpu_enable_async_dispatch": False}


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ({}, "0.9"),
        ({"XLA_CLIENT_MEM_FRACTION": "0.3"}, "0.3"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"}, None),  # JAX refuses both
    ],
)
def test_programs_may_use_most_of_a_gpu(given: dict[str, str], share: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "environ", dict(given))
    environment.use_gpu_memory()
    assert os.environ.get("XLA_CLIENT_MEM_FRACTION") == share
