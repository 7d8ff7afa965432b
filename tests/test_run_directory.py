"""A run directory used again: what is done is kept, what is missing, stale or damaged is made again or named."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from itool_jax import config
from itool_jax.main import PREEMPTED
from itool_jax.stages import generate, score
from itool_jax.store import directory as run_directory
from itool_jax.store import outputs
from itool_jax.store.sources import fingerprints
from itool_jax.system import files, preemption
from itool_jax.system.preemption import PreemptionError
from tests.conftest import REPOSITORY, read, write
from tests.runs import BREADTH, ITERATIONS, N_STAGES, PHASES, STEP_FILES, WATCHED, Made, again, contents, copy_run

pytestmark = pytest.mark.usefixtures("restored_jax_settings")


def test_a_finished_run_does_nothing_again(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = copy_run(made, tmp_path)
    files = [path for path in folder.rglob("*") if path.is_file()]
    log = folder / "log.jsonl"
    lines = log.read_text()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    assert again(made, folder) == 0
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(files)
    assert log.read_text().startswith(lines)
    for path, (content, time) in before.items():
        if path.name in (log.name, "environment.json", "report.html", ".lock"):
            continue
        assert path.read_bytes() == content, path
        assert path.stat().st_mtime_ns == time or path.name in ("summary.json", ".lock")
    out, err = capsys.readouterr()
    assert out == made.output
    assert err.count("already done") == N_STAGES
    assert err.count("\n") == N_STAGES + ITERATIONS + 1  # what each training changed, and where everything is


def test_what_a_killed_process_left_unfinished_is_removed(made: Made, tmp_path: Path):
    folder = copy_run(made, tmp_path)
    left, other = folder / "iteration_1" / ".trees.jsonl.4711.partial", folder / ".mine.partial"
    left.write_text("{")
    other.write_text("not ours")
    assert again(made, folder) == 0
    assert (left.exists(), other.exists()) == (False, True)


def test_each_stage_alone_in_another_folder_gives_the_same_run(made: Made, tmp_path: Path):
    folder = tmp_path / "run"
    assert again(made, folder, stage="warmup") == 0
    for iteration in range(1, ITERATIONS + 1):
        for stage in ("score", "search", "dpo"):
            assert again(made, folder, f"--iteration={iteration}", stage=stage) == 0
    assert again(made, folder, stage="evaluate") == 0
    assert not (folder / "summary.json").exists()
    watched = f"{WATCHED}.jsonl"  # only the loop looks at what a training changed
    assert contents(folder, "config.yaml") == contents(made.folder, "config.yaml", watched)
    assert len(contents(folder)) == 1 + 3 + len(PHASES) + len(STEP_FILES) * ITERATIONS
    assert again(made, folder) == 0
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, made.folder))
    assert ours["comparisons"] == theirs["comparisons"]


def test_a_killed_run_goes_on_where_it_stopped(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As if killed after the trees of iteration 1 were written and before its pairs were."""
    folder = copy_run(made, tmp_path)
    shutil.rmtree(folder / "iteration_2")
    shutil.rmtree(folder / "iteration_1/weights")
    for name in (
        "search.json",
        "pairs.jsonl",
        "reference.jsonl",
        "dpo.json",
        "evaluation_test_all.json",
        f"{WATCHED}.json",
    ):
        (folder / "iteration_1" / name).unlink()
    (folder / "summary.json").unlink()
    kept = (folder / "iteration_1/scores.jsonl").stat().st_mtime_ns
    assert again(made, folder) == 0
    assert (folder / "iteration_1/scores.jsonl").stat().st_mtime_ns == kept
    assert capsys.readouterr().err.count("already done") == 5  # base, warm-up and its two evaluations, score
    assert contents(folder, "config.yaml") == contents(made.folder, "config.yaml")
    assert json.loads((folder / "summary.json").read_text())["finished"]


def test_a_run_that_goes_on_to_more_iterations_is_not_finished(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def stop(*_: Any) -> Any:
        raise PreemptionError

    folder = copy_run(made, tmp_path)
    monkeypatch.setattr(score, "ranked_hardest", stop)
    assert again(made, folder, f"--iterations={ITERATIONS + 1}") == PREEMPTED
    assert not (folder / "summary.json").exists()
    assert config.parse(["--stage=iterate", f"--config={folder / 'config.yaml'}"]).iterations == ITERATIONS + 1


def test_answers_of_other_weights_are_not_gone_on_with(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, output = copy_run(made, tmp_path), tmp_path / "o.jsonl"
    command = ["--stage=generate", *made.settings, "--generate.phase=last", f"--run_dir={folder}", f"--output={output}"]

    def killed() -> None:
        with contextlib.suppress(KeyboardInterrupt), outputs.resumed(config.parse(command), output) as working:
            (working / "kept").touch()
            raise KeyboardInterrupt

    killed()
    killed()
    assert capsys.readouterr().err == ""
    checksums = folder / f"iteration_{ITERATIONS}/weights/checksums.json"
    checksums.write_text(checksums.read_text() + " ")  # trained again
    killed()
    assert "its inputs changed" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "listens"), [((), False), (("--output=o.jsonl",), True)])
def test_only_what_keeps_something_is_asked_to_stop(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...], listens: bool
):
    heard: list[bool] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preemption, "listen", lambda _: heard.append(True))
    monkeypatch.setattr(generate, "run", lambda _: None)
    assert again(made, tmp_path / "run", *more, stage="generate") == 0
    assert bool(heard) == listens


def test_scores_of_result_files_leave_the_run_directory_alone(tmp_path: Path):
    elsewhere = config.Config(stage="evaluate", benchmark="bfcl", results=tmp_path, run_dir=tmp_path / "run")
    with run_directory.lock(elsewhere):
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lost", ["warmup/weights", "iteration_1/pairs.jsonl", "base/evaluation_test_all.jsonl"])
def test_a_stage_is_done_only_where_its_files_are(
    made: Made, tmp_path: Path, lost: str, capsys: pytest.CaptureFixture[str]
):
    """What the messages about damaged files advise, to delete them, must help."""
    folder = copy_run(made, tmp_path)
    path = folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert again(made, folder) == 0
    assert capsys.readouterr().err.count("already done") == N_STAGES - 1
    assert path.exists()
    assert contents(folder, "config.yaml").keys() >= contents(made.folder, "config.yaml", "reference.jsonl").keys()


def test_what_was_made_from_changed_results_is_made_again(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = copy_run(made, tmp_path)
    path = folder / "iteration_1/pairs.jsonl"
    write(path, read(path)[1:])  # another search
    assert again(made, folder) == 0
    err = capsys.readouterr().err
    stale = [line.split(" again: ")[0] for line in err.splitlines() if "inputs have changed" in line]
    evaluations = ("evaluation_test_all", WATCHED)
    assert stale[:4] == [f"iteration_1: running {s}" for s in ("dpo", "reference", *evaluations)]
    assert stale[4:] == [f"iteration_2: running {s}" for s in ("score", "search", "dpo", "reference", *evaluations)]
    assert len(read(folder / "iteration_1/reference.jsonl")) == len(read(path))
    assert again(made, folder) == 0
    assert capsys.readouterr().err.count("already done") == N_STAGES


@pytest.mark.parametrize("what", ["model", "data"])
def test_a_run_directory_of_other_files_is_refused(
    made: Made, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
):
    """The same names on the command line, and other content behind them."""
    folder, before = copy_run(made, tmp_path), contents(made.folder)
    sources = json.loads((folder / "data/sources.json").read_text())
    name = sorted(sources[what])[0]
    sources[what][name] = "0" * 32
    (folder / "data/sources.json").write_text(json.dumps(sources))
    line = refused(capsys, made, folder)
    assert line.startswith(f"run directory {folder} was created with a different {name} of --{what}=")
    assert contents(folder) == before


def test_files_that_nobody_reads_may_come_and_go(made: Made, tmp_path: Path, tiny_folder: Path):
    model = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    data = write(tmp_path / "data.jsonl", made.samples).rename(tmp_path / "model/d.jsonl")
    settings = config.Config(stage="iterate", model=str(model), data=str(data.parent))
    sources = fingerprints(settings)
    for name in (".DS_Store", "notes.txt", "README.md", "pytorch_model.pth", ".gitattributes"):
        (model / name).write_text("x")
    assert fingerprints(settings) == sources
    assert "config.json" in sources["model"]
    assert "d.jsonl" in sources["data"]


def test_later_settings_may_change_what_is_evaluated(made: Made, tmp_path: Path):
    folder = copy_run(made, tmp_path)
    assert again(made, folder, "--evaluate.limit=3", "--evaluate.split=validation", stage="evaluate") == 0
    rows = read(folder / "warmup/evaluation_validation_3.jsonl")
    validation = [row["id"] for row in read(folder / "data/validation.jsonl")]
    assert [row["id"] for row in rows] == validation[:3]


def refused(capsys: pytest.CaptureFixture[str], made: Made, folder: Path, *changes: str, stage: str = "iterate") -> str:
    """The last line on stderr of a command that ends with code 2; what goes before it is progress."""
    capsys.readouterr()
    assert again(made, folder, *changes, stage=stage) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in line or "error" in line for line in before)
    assert last.startswith("python -m itool_jax.main: error: ")
    return last.removeprefix("python -m itool_jax.main: error: ")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("score", "has no weights of warmup yet; run --stage=warmup first"),
        ("search", "has no weights of warmup yet; run --stage=warmup first"),
        ("dpo", "has no weights of warmup yet; run --stage=warmup first"),
        ("score --iteration=3", "has no weights of iteration_2 yet; run --stage=dpo --iteration=2 first"),
    ],
)
def test_a_stage_before_its_time_names_the_one_to_run(
    made: Made, tmp_path: Path, command: str, message: str, capsys: pytest.CaptureFixture[str]
):
    stage, *changes = command.split()
    line = refused(capsys, made, tmp_path / "run", *changes, stage=stage)
    assert line == f"{tmp_path / 'run'} {message}"


def test_missing_scores_and_pairs_are_named_with_the_stage_that_writes_them(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = copy_run(made, tmp_path)
    for name, stage, writer in (("scores", "search", "score"), ("pairs", "dpo", "search")):
        for path in (f"{name}.jsonl", f"{stage}.json"):
            (folder / "iteration_1" / path).unlink()
        line = refused(capsys, made, folder, stage=stage)
        path = folder / f"iteration_1/{name}.jsonl"
        assert line == f"{path} does not exist; run --stage={writer} --iteration=1 first"


def test_a_run_directory_of_other_settings(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, before = copy_run(made, tmp_path), contents(made.folder)
    line = refused(capsys, made, folder, "--search.breadth=3")
    assert line.startswith(f"run directory {folder} was created with search.breadth={BREADTH}, ")
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", "seed: [", "config.yaml is damaged"),
        ("warmup/warmup.json", '{"samples": 1', "warmup/warmup.json is damaged"),
        ("warmup/warmup.json", "[]", "warmup/warmup.json is damaged"),
        ("base/evaluation_test_all.json", "", "base/evaluation_test_all.json is damaged"),
        ("base/evaluation_test_all.jsonl", '{"id": "s1"}\n', 'base/evaluation_test_all.jsonl line 1: no "correct"'),
        ("data/train.jsonl", "{\n", "data/train.jsonl line 1: not valid JSON"),
        ("iteration_2/scores.jsonl", '{"id": "s1"}\n', 'iteration_2/scores.jsonl line 1: no "rank"'),
        ("iteration_2/pairs.jsonl", '{"id": "s1"}\n', 'iteration_2/pairs.jsonl line 1: no "prompt_ids"'),
        ("iteration_2/reference.jsonl", "", "iteration_2/reference.jsonl has no row for pair"),
    ],
)
def test_a_damaged_file_of_a_run_is_named_and_the_rest_kept(
    made: Made, tmp_path: Path, file: str, content: str, message: str, capsys: pytest.CaptureFixture[str]
):
    folder = copy_run(made, tmp_path)
    # The last stages are still to be done, so that each file is read.
    for name in ("search.json", "dpo.json") if "scores" in file or "data" in file else ("dpo.json",):
        (folder / "iteration_2" / name).unlink()
    (folder / file).write_text(content)
    before = contents(folder)
    line = refused(capsys, made, folder)
    assert line.removeprefix("checkpoint ").startswith(f"{folder}/{message}")
    assert contents(folder) == before


def test_damaged_weights_are_named_and_made_again(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = copy_run(made, tmp_path)
    path = next(p for p in (folder / "iteration_1/weights").rglob("*") if p.is_file() and p.stat().st_size > 1000)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert again(made, folder) == 0
    err = capsys.readouterr().err
    name = path.relative_to(folder / "iteration_1/weights")
    assert f"running dpo again: {folder / 'iteration_1/weights'}: {name} is damaged" in err
    assert err.count("already done") == N_STAGES  # with the reference; what comes after is as it was
    assert contents(folder, "config.yaml") == contents(made.folder, "config.yaml")


def test_a_result_that_was_edited_is_named_and_kept(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = copy_run(made, tmp_path)
    path = folder / "iteration_2/pairs.jsonl"
    write(path, read(path)[1:])
    assert again(made, folder) == 0
    assert f"iteration_2: search already done, but {path} was edited since" in capsys.readouterr().err
    assert len(read(folder / "iteration_2/reference.jsonl")) == len(read(path))


def test_a_run_directory_in_use_is_refused(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = copy_run(made, tmp_path)
    with run_directory.lock(config.parse(["--stage=iterate", f"--run_dir={folder}"])):
        line = refused(capsys, made, folder)
    assert line.startswith(f"{folder} is in use by process {os.getpid()} on ")
    assert again(made, folder) == 0


def test_a_full_disk_loses_nothing(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder = copy_run(made, tmp_path)
    for name in ("trees.jsonl", "pairs.jsonl", "reference.jsonl", "search.json", "dpo.json"):
        (folder / "iteration_2" / name).unlink()
    before = contents(folder)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", fail)
        line = refused(capsys, made, folder)
    assert line.startswith(f"{folder}: No space left on device; free some space and rerun")
    assert contents(folder) == before
    assert again(made, folder) == 0
    assert contents(folder, "config.yaml") == contents(made.folder, "config.yaml")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_disk_that_is_full_in_earnest(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to("/dev/full")
    line = refused(capsys, made, folder, stage="warmup")
    assert line.startswith(f"{folder}: No space left on device; free some space")
    assert not (folder / "warmup/weights").exists()
    (folder / "metrics.jsonl").unlink()
    assert again(made, folder, stage="warmup") == 0
    ours, theirs = (read(f / "metrics.jsonl") for f in (folder, made.folder))
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs if row["stage"] == "warmup"]


def test_the_page_of_files_names_every_file_and_field(made: Made):
    page = (REPOSITORY / "docs/run-directory.md").read_text()
    known = set(re.findall(r"`([^`\n]+)`", page)) | set(re.findall(r"[\w.]+", page.split("```")[3]))
    for path in filter(Path.is_file, made.folder.rglob("*")):
        name = path.relative_to(made.folder)
        if "weights" in name.parts or path.name.startswith("."):
            continue
        assert re.sub("(?<=^evaluation_).*", "", path.name) in known, name
        if path.suffix in (".json", ".jsonl"):
            rows = [json.loads(path.read_text())] if path.suffix == ".json" else read(path)
            assert {key for row in rows for key in _keys(row)} - known == set(), name


VARIABLE = (
    "packages",
    "devices",
    "flags",
    "after",
    "outputs",
    "near_question_ids",
    "data",
    "model",
    "messages",
    "tools",
)
"""What has keys of no fixed name."""


def _keys(value: Any) -> Iterator[str]:
    """The names of all fields of a JSON value."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield key
        if key not in VARIABLE:
            yield from _keys(inner)
    for item in value if isinstance(value, list) else ():
        yield from _keys(item)
