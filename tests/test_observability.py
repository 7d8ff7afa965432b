"""What can be followed of a run without a terminal: its log, TensorBoard, Weights & Biases, traces; and no secrets."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

from itool_jax.config import Config
from itool_jax.main import close_log, main, open_log
from itool_jax.stages import evaluate, generate
from itool_jax.store.cache import Step
from itool_jax.system import hosts, messages, profiling, trackers
from itool_jax.system.messages import log, working_on
from itool_jax.system.metrics import Metrics, attach_trackers, track_results
from itool_jax.system.untrusted import redacted
from tests.conftest import REPOSITORY, read, write
from tests.runs import SMALL, make_samples

pytestmark = pytest.mark.usefixtures("restored_jax_settings")

SECRETS = {"HF_TOKEN": "hf_" + "s3cr3tS3cr3tS3cr3t", "WANDB_API_KEY": "0123456789" * 4, "MY_PASSWORD": "correct horse"}
EXTRAS = {name: importlib.util.find_spec(package) is not None for name, package in trackers.PACKAGES.items()}


class Recorder:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, dict[str, float]]] = []

    def write(self, group: str, step: int, values: Any) -> None:
        self.rows.append((group, step, dict(values)))

    def close(self) -> None:
        self.rows.append(("closed", 0, {}))


@pytest.fixture
def opened(tmp_path: Path):
    """The log of a run directory, and what trackers got."""
    recorder = Recorder()
    messages.open_log(tmp_path)
    attach_trackers([recorder])
    yield tmp_path / "log.jsonl", recorder
    close_log()


# The log ----------------------------------------------------------------------------------------------------


def test_the_log_holds_what_is_said_with_its_stage(opened: Any):
    path, _ = opened
    log("before")
    with working_on("warmup", "warmup"):
        log("inside, [bold]as it is[/bold]")
    log("behind")
    rows = read(path)
    assert all(abs(row.pop("time") - time.time()) < 60 for row in rows)
    assert [list(row.values()) for row in rows] == [
        [None, "info", "before"],
        ["warmup/warmup", "info", "begin"],
        ["warmup/warmup", "info", "inside, [bold]as it is[/bold]"],
        ["warmup/warmup", "info", "end after 0.0 s"],
        [None, "info", "behind"],
    ]
    assert list(rows[0]) == ["stage", "level", "text"]


def test_the_log_ends_with_the_line_a_user_sees(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stage(error: BaseException) -> Any:
        def work() -> dict[str, Any]:
            raise error

        step: Step[None] = Step("warmup", [], lambda _: work(), lambda _: None)
        return lambda run: run.phase("warmup").cached(step)

    command = ["--stage=evaluate", f"--model={tiny_folder}", f"--run_dir={tmp_path / 'run'}"]
    for error, code, text in ((ValueError("too bad"), 2, "too bad"), (KeyboardInterrupt(), 130, "Interrupted")):
        monkeypatch.setattr(evaluate, "run", stage(error))
        assert main(command) == code
        last = read(tmp_path / "run/log.jsonl")[-1]
        assert (last["stage"], last["level"]) == ("warmup/warmup", "error")
        assert text in last["text"]
        assert capsys.readouterr().err.splitlines()[-1] == last["text"]
    monkeypatch.setattr(evaluate, "run", stage(RuntimeError("a bug")))
    with pytest.raises(RuntimeError):
        main(command)
    assert "a bug" in read(tmp_path / "run/log.jsonl")[-1]["text"]
    assert messages.current_stage() is None


def test_a_run_directory_with_only_a_log_takes_other_settings(tmp_path: Path, tiny_folder: Path):
    """A command that failed before it computed anything binds nobody."""
    command = ["--stage=dpo", f"--model={tiny_folder}", f"--run_dir={tmp_path / 'run'}"]
    assert main([*command, "--data=missing.jsonl"]) == 2
    assert (tmp_path / "run/log.jsonl").exists()
    assert main([*command, "--data=other.jsonl"]) == 2
    assert "has no weights" in read(tmp_path / "run/log.jsonl")[-1]["text"]


# Several processes ------------------------------------------------------------------------------------------


def test_of_several_processes_the_first_one_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for index in (1, 0):
        monkeypatch.setattr(hosts._run, "index", index)
        open_log(Config(stage="warmup", run_dir=tmp_path))
        log("hello")
        Metrics(tmp_path / "metrics.jsonl", "warmup").write(1, loss=1.0)
        close_log()
        assert sorted(p.name for p in tmp_path.iterdir()) == ([] if index else ["log.jsonl", "metrics.jsonl"])
    assert capsys.readouterr().err == "hello\n"


def test_asking_who_writes_starts_no_backend():
    code = (
        "import jax; from itool_jax.system.messages import log; log('x'); from jax._src import xla_bridge as x; "
        "assert not x.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# Trackers ---------------------------------------------------------------------------------------------------


def test_trackers_get_steps_by_phase_and_figures_by_stage(opened: Any):
    path, recorder = opened
    Metrics(path.parent / "metrics.jsonl", "iteration_2").write(7, loss=0.5, norm=float("nan"))
    for phase in ("base", "warmup", "iteration_2"):
        results = {"accuracy": {"overall": 0.5, "hard": None}, "pairs": 3, "weights": "digest", "whole": True}
        track_results(phase, "evaluation", results)
    close_log()
    figures = {"accuracy/overall": 0.5, "pairs": 3}
    assert recorder.rows == [
        ("iteration_2", 7, {"loss": 0.5}),
        *(("evaluation", step, figures) for step in (0, 1, 3)),
        ("closed", 0, {}),
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_any_work(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--stage=warmup", f"--run_dir={tmp_path / 'run'}", f"--log.{name}"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.endswith(
        f"log.{name} needs a package that is not installed; run: pip install {trackers.PACKAGES[name]}\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def observed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """The folder of a warm-up that was watched in every way, by a process that knew secrets."""
    path = tmp_path_factory.mktemp("observed")
    data = write(path / "d.jsonl", make_samples(80))
    settings = [
        f"--model={tiny_folder}",
        f"--data={data}",
        f"--run_dir={path / 'run'}",
        "--warmup.batch_size=6",
        *SMALL,
    ]
    command = [sys.executable, "-m", "itool_jax.main", "--stage=warmup", "--profile", *settings]
    command += [f"--log.{name}" for name, there in EXTRAS.items() if there]
    # So that no copy of the program is started with another command line, and nothing leaves the machine.
    env = {**os.environ, **SECRETS, "MALLOC_MMAP_MAX_": "0", "WANDB_MODE": "offline", "XLA_FLAGS": ""}
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path / "run"


READ_EVENTS = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]); events.Reload()
print(json.dumps({tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}))
"""


@pytest.mark.skipif(not EXTRAS["tensorboard"], reason="needs tensorboardX")
@pytest.mark.processes
def test_tensorboard_reads_the_run(observed: Path):
    if importlib.util.find_spec("tensorboard") is None:
        pytest.skip("needs tensorboard")
    printed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ_EVENTS, observed / "tensorboard"], check=True, capture_output=True
    ).stdout
    curves = json.loads(printed.splitlines()[-1])
    rows = read(observed / "metrics.jsonl")
    assert [step for step, _ in curves["warmup/loss"]] == [row["step"] for row in rows]
    assert [value for _, value in curves["warmup/loss"]] == pytest.approx([row["loss"] for row in rows])
    figures = json.loads((observed / "warmup/warmup.json").read_text())
    assert curves["warmup/samples"] == [[1, figures["samples"]]]


@pytest.mark.skipif(not EXTRAS["wandb"], reason="needs wandb")
@pytest.mark.processes
def test_wandb_keeps_the_run_offline(observed: Path):
    runs = list((observed / "wandb").glob("offline-run-*"))
    name = (observed / "wandb/id").read_text()
    assert [run.name.endswith(f"-{name}") for run in runs] == [True]
    content = (runs[0] / f"run-{name}.wandb").read_bytes()
    for word in (b"gradient_norm", b"warmup.batch_size"):
        assert word in content


@pytest.mark.processes
def test_no_secret_is_in_any_file_of_a_run(observed: Path):
    files = [path for path in observed.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for value in SECRETS.values():
            assert value.encode() not in content, path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at https://me:word@host/x?a=1", "at https://***@host/x?a=1"),
        ("token hf_abcdefghijklmnopqrst is", "token *** is"),
        ("--hub_token=abc --api-key=d --log.wandb", "--hub_token=*** --api-key=*** --log.wandb"),
        ("HF_TOKEN=abc x", "HF_TOKEN=*** x"),
        ("it holds: correct horse", "it holds: ***"),
        ("it holds: battery staple", "it holds: ***"),
        ("--generate.tokens_per_batch=16384 keys=3 a:b@c", "--generate.tokens_per_batch=16384 keys=3 a:b@c"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, shown: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_PASSWORD", SECRETS["MY_PASSWORD"])
    monkeypatch.setenv("MY_SIGNING_KEY", "battery staple")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "16384")
    assert redacted(text) == shown


# Traces -----------------------------------------------------------------------------------------------------


@pytest.mark.processes
def test_the_trace_of_a_run_opens(observed: Path):
    (path,) = observed.glob("profile/warm-up/plugins/profile/*/perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {event["args"]["step_num"] for event in events if event.get("name") == "warm-up"}
    assert steps == {str(profiling.SKIPPED + i) for i in range(profiling.TRACED)}
    assert any("train_step" in str(event.get("name")) for event in events)
    assert len(list(path.parent.glob("*.xplane.pb"))) == 1  # what XProf reads


@pytest.mark.parametrize(
    ("steps", "traced"), [(profiling.SKIPPED, 0), (profiling.SKIPPED + 1, 1), (20, profiling.TRACED)]
)
def test_a_few_steps_behind_the_first_ones_are_traced_once(
    tmp_path: Path, steps: int, traced: int, monkeypatch: pytest.MonkeyPatch
):
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda place, **_: (place.mkdir(parents=True), calls.append("on")))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("off"))
    said: list[str] = []
    for what in ("search, iteration 1", "search, iteration 2"):
        with profiling.traced(tmp_path / "profile", what, said.append) as tick:
            for i in range(steps):
                tick()
                calls += [str(i)] if calls and calls[-1] != "off" and "off" not in calls else []
        if traced:
            assert calls.count("on") == calls.count("off") == 1
            assert len(said) == 1
            assert f"traced {traced} steps of" in said[0]
    assert (tmp_path / "profile/search").exists() == (traced > 0)
    assert len(said) == (traced > 0)


def test_without_a_run_directory_nothing_is_kept(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "generate", lambda *_: [[(0, [5])]])
    data = write(tmp_path / "d.jsonl", [{"id": "a", "prompt": "x"}])
    command = ["--stage=generate", f"--model={tiny_folder}", f"--data={data}", "--output=o.jsonl", *SMALL, "--profile"]
    assert main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "o.jsonl"]
    assert not Config(stage="score", output=Path("o")).keeps_run
    assert Config(stage="export", output=Path("o")).keeps_run
