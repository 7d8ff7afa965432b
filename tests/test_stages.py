"""The stages through the command line: a whole run of a tiny model, end to end.

The run of `iterate` is made once; the other tests read it, or go on from a copy.
"""

import contextlib
import errno
import io
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
import yaml

from itool_jax.data import records
from itool_jax.main import main
from itool_jax.replay import split
from itool_jax.text.chat import Chat, load_tokenizer
from tests.conftest import read, write

pytestmark = pytest.mark.usefixtures("restored_jax_settings")

Row = dict[str, Any]


SMALL = ("--generate.max_tokens=12", "--generate.tokens_per_batch=1024")  # alike everywhere: fewer programs


ITERATIONS, BREADTH, DEPTH, SIMULATIONS = 2, 2, 2, 4


class Made(NamedTuple):
    """A finished run and what it was made from."""

    folder: Path
    settings: list[str]
    samples: list[Row]
    chat: Chat
    output: str


def make_samples(n: int = 120) -> list[Row]:
    """Short ones: calls, a quarter refusals, a few with an earlier turn."""
    rows = []
    for i in range(n):
        name = f"f{i % 3}"
        tool = {"name": name, "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
        turns = [{"role": "user", "content": f"{name} {i}"}]
        if i % 5 == 0:
            turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, *turns]
        target = f"[{name}(x={i})]" if i % 4 else "I cannot."
        target = f"[{name}(x={i}), {name}(x=1)]" if i % 4 == 1 else target
        tools = [{"type": "function", "function": tool}]
        rows.append({"id": f"s{i}", "messages": turns, "tools": tools, "target": target})
    return rows


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Made:
    folder = tmp_path_factory.mktemp("iterate")
    samples = make_samples()
    data = write(folder / "d.jsonl", samples)
    settings = [
        *(
            f"--model={tiny_folder}",
            f"--data={data}",
            f"--iterations={ITERATIONS}",
            "--lora.rank=2",
            "--evaluate.limit=0",
        ),
        *("--replay.replay_fraction=0.2", "--replay.hardest_fraction=0.4", "--warmup.batch_size=8"),
        *(f"--search.n_simulations={SIMULATIONS}", f"--search.breadth={BREADTH}", f"--search.max_depth={DEPTH}"),
        *("--search.step_limit=8", "--search.last_step_limit=12", "--search.batch=4"),
        *("--preference.learning_rate=1e-3", *SMALL),
    ]
    chat = Chat(load_tokenizer(str(tiny_folder)))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["--stage=iterate", f"--run_dir={folder / 'run'}", *settings]) == 0
    return Made(folder / "run", settings, samples, chat, out.getvalue())


def again(made: Made, folder: Path, *changes: str, stage: str = "iterate") -> int:
    """The same command on another run directory."""
    return main([f"--stage={stage}", f"--run_dir={folder}", *made.settings, *changes])


def copy_run(made: Made, folder: Path) -> Path:
    return Path(shutil.copytree(made.folder, folder / "run"))


def contents(folder: Path, *leave_out: str) -> dict[str, bytes]:
    """All files of a run but the checkpoints, whose inner names are random, and the clock's: times and seconds."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if "adapters" not in name and not name.endswith((".json", "metrics.jsonl", *leave_out))
    }


PHASES = ["base", "warmup", *(f"iteration_{i + 1}" for i in range(ITERATIONS))]
N_STAGES = 3 + 4 * ITERATIONS  # warm-up and two evaluations; score, search, dpo and evaluation
STEP_FILES = ("scores.jsonl", "trees.jsonl", "pairs.jsonl", "reference.jsonl")


def test_a_run_leaves_all_its_files(made: Made):
    expected = {"config.yaml", "summary.json", "metrics.jsonl"}
    expected |= {f"data/{part}.jsonl" for part in ("train", "validation", "test")} | {"data/sources.json"}
    expected |= {f"{phase}/evaluation_test_all.{kind}" for phase in PHASES for kind in ("json", "jsonl")}
    expected |= {"warmup/warmup.json"}
    for phase in PHASES[2:]:
        expected |= {
            f"{phase}/{name}" for name in (*STEP_FILES, "score.json", "search.json", "reference.json", "dpo.json")
        }
    found = {str(path.relative_to(made.folder)) for path in made.folder.rglob("*") if path.is_file()}
    assert {name for name in found if "/adapters/" not in name} == expected
    assert [p for p in PHASES if (made.folder / p / "adapters").is_dir()] == PHASES[1:]
    assert yaml.safe_load((made.folder / "config.yaml").read_text())["search.breadth"] == BREADTH


def test_every_sample_is_in_one_part_and_reads_back(made: Made):
    parts = {part: read(made.folder / f"data/{part}.jsonl") for part in ("train", "validation", "test")}
    assert sorted(row["id"] for rows in parts.values() for row in rows) == sorted(row["id"] for row in made.samples)
    assert all(parts.values())
    given = {row["id"]: row for row in made.samples}
    for row in parts["train"]:
        assert (row["messages"], row["target"]) == (given[row["id"]]["messages"], given[row["id"]]["target"])


def test_the_hardest_of_the_buffer_are_searched(made: Made):
    train = [row["id"] for row in read(made.folder / "data/train.jsonl")]
    buffer = split(train, 0.8, "replay", 0)[1]
    targets = {row["id"]: row["target"] for row in made.samples}
    for phase in PHASES[2:]:
        scores = read(made.folder / phase / "scores.jsonl")
        assert sorted(row["id"] for row in scores) == sorted(buffer)
        ranked = sorted((row for row in scores if row["rank"] is not None), key=lambda row: row["rank"])
        assert [row["rank"] for row in ranked] == list(range(len(ranked)))
        for is_call in (True, False):
            kind = [row for row in scores if targets[row["id"]].startswith("[") == is_call]
            taken = [row["perplexity"] for row in ranked if row in kind]
            left = [row["perplexity"] for row in kind if row["rank"] is None]
            assert len(taken) == max(1, round(0.4 * len(kind)))
            assert min(taken) > max(left)
            assert taken == sorted(taken, reverse=True)
        trees = read(made.folder / phase / "trees.jsonl")
        assert sorted(tree["id"] for tree in trees) == sorted(row["id"] for row in ranked)


def test_trees_obey_their_invariants(made: Made):
    for phase in PHASES[2:]:
        for tree in read(made.folder / phase / "trees.jsonl"):
            nodes = tree["nodes"]
            assert nodes[0]["visits"] == SIMULATIONS
            assert [node["node"] for node in nodes] == list(range(len(nodes)))
            for node in nodes:
                children = [child for child in nodes if child["parent"] == node["node"] and child is not nodes[0]]
                assert node["depth"] <= DEPTH
                assert len(children) <= BREADTH + 1
                assert len({tuple(child["token_ids"]) for child in children}) == len(children)
                if children and node["visits"]:
                    assert node["visits"] == sum(child["visits"] for child in children)
                    assert not node["terminal"]
                assert made.chat.tokenizer.decode(node["token_ids"]) == node["text"]
            # The gold's steps are among the candidates, and so is a response that is right.
            assert max(node["outcome"] for node in nodes) == 1


def test_pairs_are_what_trainers_read_and_agree_with_their_trees(made: Made):
    samples, decode = {row["id"]: row for row in made.samples}, made.chat.tokenizer.decode
    for number, phase in enumerate(PHASES[2:], 1):
        trees = {tree["id"]: tree["nodes"] for tree in read(made.folder / phase / "trees.jsonl")}
        pairs = read(made.folder / phase / "pairs.jsonl")
        assert len(pairs) >= len(trees) // 2
        assert len({pair["id"] for pair in pairs}) == len(pairs)
        for pair in pairs:
            nodes, sample = trees[pair["tree"]], samples[pair["tree"]]
            assert pair["id"] == f"{pair['tree']}/{number}/{pair['node']}"
            path, node = [], pair["node"]
            while node:
                path, node = nodes[node]["token_ids"] + path, nodes[node]["parent"]
            asked = made.chat.prompt_ids(sample["messages"], read_tools(made, sample["id"]))
            assert pair["prompt_ids"] == asked + path
            for side in ("chosen", "rejected"):
                child = nodes[pair[f"{side}_node"]]
                assert child["parent"] == pair["node"]
                assert pair[f"{side}_ids"] == child["token_ids"]
                assert pair[f"visits_{side}"] == child["visits"]
                assert pair[side] == decode(pair[f"{side}_ids"])
                assert child["terminal"] or child["visits"] > 0
                ends = [t in made.chat.stop_ids for t in pair[f"{side}_ids"]]
                assert not any(ends[:-1])
                assert child["terminal"] or not ends[-1]
            assert pair["prompt"] == decode(pair["prompt_ids"])
            whole = decode(pair["prompt_ids"] + pair["chosen_ids"])
            assert whole.startswith(pair["prompt"])
            assert pair["chosen"] != pair["rejected"]
            assert pair["q_chosen"] - pair["q_rejected"] >= 0.1 - 1e-5


def read_tools(made: Made, sample_id: str) -> list[Row]:
    """The tools of a training sample as the run saw them."""
    return next(row["tools"] for row in read(made.folder / "data/train.jsonl") if row["id"] == sample_id)


def test_the_summary_has_its_fixed_shape(made: Made):
    summary = json.loads((made.folder / "summary.json").read_text())
    fixed = ["finished", "seed", "model", "data", "device", "phases", "search"]
    assert [key for key in fixed if key not in summary] == []
    assert set(summary) - set(fixed) == {"split", "comparisons"}
    assert summary["finished"] is True
    assert (summary["seed"], summary["device"]) == (0, jax.devices()[0].device_kind)
    assert f"--model={summary['model']}" in made.settings
    assert f"--data={summary['data']}" in made.settings
    n_test = len(read(made.folder / "data/test.jsonl"))
    assert [phase["name"] for phase in summary["phases"]] == PHASES
    for phase in summary["phases"]:
        assert set(phase) == {"name", "accuracy", "n", "standard_error", "seconds"}
        for name in ("accuracy", "n", "standard_error"):
            assert set(phase[name]) == {"overall", "easy", "medium", "hard", "irrelevance", "multi_turn"}
        assert phase["n"]["overall"] == n_test == sum(phase["n"][n] for n in ("easy", "medium", "hard", "irrelevance"))
        rows = read(made.folder / phase["name"] / "evaluation_test_all.jsonl")
        for name, accuracy in phase["accuracy"].items():
            marks = [row["correct"] for row in rows if name in ("overall", *row["categories"])]
            assert accuracy == pytest.approx(sum(marks) / len(marks))
            assert phase["standard_error"][name] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / len(marks)))
        assert phase["seconds"] > 0
    assert [row["iteration"] for row in summary["search"]] == list(range(1, ITERATIONS + 1))
    for row, phase in zip(summary["search"], PHASES[2:], strict=True):
        assert set(row) == {"iteration", "prompts", "trees", "pairs", "generated_tokens", "seconds"}
        trees = read(made.folder / phase / "trees.jsonl")
        assert row["prompts"] == row["trees"] == len(trees)
        assert row["pairs"] == len(read(made.folder / phase / "pairs.jsonl"))
        sampled = sum(len(node["token_ids"]) for tree in trees for node in tree["nodes"])
        assert row["generated_tokens"] > sampled / 3


def test_the_table_says_the_same(made: Made):
    summary = json.loads((made.folder / "summary.json").read_text())
    lines = [line for line in made.output.splitlines() if " against " not in line]
    for phase in summary["phases"]:
        [line] = [line for line in lines if line.startswith(f"{phase['name']} ") and "±" in line]
        assert f"{100 * phase['accuracy']['overall']:.1f}±" in line
        assert len(line) <= 80
    for row in summary["comparisons"]:
        assert f"{row['phase']} against {row['against']}: {row['text']}\n" in made.output
    pairs = {(row["phase"], row["against"]) for row in summary["comparisons"]}
    assert ("warmup", "base") in pairs
    assert (PHASES[-1], "warmup") in pairs


def test_a_model_text_that_is_no_call_is_wrong_and_nothing_worse(made: Made):
    rows = read(made.folder / "base/evaluation_test_all.jsonl")
    assert all(row["target"] for row in rows)
    assert any(not row["finished"] for row in rows)  # the tiny model babbles
    assert not any(row["correct"] for row in rows if row["target"].startswith("["))
    assert not any(row["correct"] for row in rows if not row["finished"])


def test_the_first_step_of_each_iteration_has_a_dpo_loss_of_ln_2(made: Made):
    metrics = read(made.folder / "metrics.jsonl")
    for phase in PHASES[2:]:
        steps = [row for row in metrics if row["stage"] == phase]
        assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
        assert len(steps) > 1
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert steps[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
        assert steps[-1]["loss"] < math.log(2) - 1e-4


def test_a_finished_run_does_nothing_again(made: Made, capsys: pytest.CaptureFixture[str]):
    files = [path for path in made.folder.rglob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    assert again(made, made.folder) == 0
    assert sorted(path for path in made.folder.rglob("*") if path.is_file()) == sorted(files)
    for path, (content, time) in before.items():
        assert path.read_bytes() == content, path
        assert path.stat().st_mtime_ns == time or path.name == "summary.json"
    out, err = capsys.readouterr()
    assert out == made.output
    assert err.count("is done already") == N_STAGES
    assert err.count("\n") == N_STAGES + 1  # and where everything is


def test_each_stage_alone_in_another_folder_gives_the_same_run(made: Made, tmp_path: Path):
    folder = tmp_path / "run"
    assert again(made, folder, stage="warmup") == 0
    for iteration in range(1, ITERATIONS + 1):
        for stage in ("score", "search", "dpo"):
            assert again(made, folder, f"--iteration={iteration}", stage=stage) == 0
    assert again(made, folder, stage="evaluate") == 0
    assert not (folder / "summary.json").exists()
    assert contents(folder, "config.yaml") == contents(made.folder, "config.yaml")
    assert len(contents(folder)) == 1 + 3 + len(PHASES) + len(STEP_FILES) * ITERATIONS
    assert again(made, folder) == 0
    ours, theirs = (json.loads((f / "summary.json").read_text()) for f in (folder, made.folder))
    assert ours["comparisons"] == theirs["comparisons"]


def test_a_killed_run_goes_on_where_it_stopped(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As if killed after the trees of iteration 1 were written and before its pairs were."""
    folder = copy_run(made, tmp_path)
    shutil.rmtree(folder / "iteration_2")
    shutil.rmtree(folder / "iteration_1/adapters")
    for name in ("search.json", "pairs.jsonl", "reference.jsonl", "dpo.json", "evaluation_test_all.json"):
        (folder / "iteration_1" / name).unlink()
    (folder / "summary.json").unlink()
    kept = (folder / "iteration_1/scores.jsonl").stat().st_mtime_ns
    assert again(made, folder) == 0
    assert (folder / "iteration_1/scores.jsonl").stat().st_mtime_ns == kept
    assert capsys.readouterr().err.count("is done already") == 4  # base, warm-up and its evaluation, score
    assert contents(folder, "config.yaml") == contents(made.folder, "config.yaml")
    assert json.loads((folder / "summary.json").read_text())["finished"]


@pytest.mark.parametrize("lost", ["warmup/adapters", "iteration_1/pairs.jsonl", "base/evaluation_test_all.jsonl"])
def test_a_stage_is_done_only_where_its_files_are(
    made: Made, tmp_path: Path, lost: str, capsys: pytest.CaptureFixture[str]
):
    """What the messages about damaged files advise, to delete them, must help."""
    folder = copy_run(made, tmp_path)
    path = folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert again(made, folder) == 0
    assert capsys.readouterr().err.count("is done already") == N_STAGES - 1
    assert path.exists()
    assert contents(folder, "config.yaml").keys() >= contents(made.folder, "config.yaml", "reference.jsonl").keys()


def test_what_was_made_from_changed_results_is_made_again(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = copy_run(made, tmp_path)
    path = folder / "iteration_1/pairs.jsonl"
    write(path, read(path)[1:])  # another search
    done = json.loads((folder / "iteration_1/search.json").read_text())
    (folder / "iteration_1/search.json").write_text(json.dumps(done | {"outputs": {}}))
    assert again(made, folder) == 0
    err = capsys.readouterr().err
    stale = [line.split(" was made from")[0] for line in err.splitlines() if "have changed since" in line]
    assert stale[:3] == ["iteration_1: dpo", "iteration_1: reference", "iteration_1: evaluation_test_all"]
    assert stale[3:] == [f"iteration_2: {s}" for s in ("score", "search", "dpo", "reference", "evaluation_test_all")]
    assert len(read(folder / "iteration_1/reference.jsonl")) == len(read(path))
    assert again(made, folder) == 0
    assert capsys.readouterr().err.count("is done already") == N_STAGES


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
    assert line.startswith(f"run directory {folder} was made with another {name} of --{what}=")
    assert contents(folder) == before


def test_later_settings_may_change_what_is_evaluated(made: Made, tmp_path: Path):
    folder = copy_run(made, tmp_path)
    assert again(made, folder, "--evaluate.limit=3", "--evaluate.split=validation", stage="evaluate") == 0
    rows = read(folder / "warmup/evaluation_validation_3.jsonl")
    validation = [row["id"] for row in read(folder / "data/validation.jsonl")]
    assert [row["id"] for row in rows] == validation[:3]


# What can go wrong in a run directory -----------------------------------------------------------------------


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
    before = contents(made.folder)
    line = refused(capsys, made, made.folder, "--search.breadth=3")
    assert line.startswith(f"run directory {made.folder} was made with search.breadth={BREADTH}, now it is 3; choose")
    assert contents(made.folder) == before


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
        ("iteration_2/reference.jsonl", "", "iteration_2/reference.jsonl holds no row of pair"),
        ("iteration_1/adapters/_METADATA", "{", "iteration_1/adapters: "),
    ],
)
def test_a_damaged_file_of_a_run_is_named_and_the_rest_kept(
    made: Made, tmp_path: Path, file: str, content: str, message: str, capsys: pytest.CaptureFixture[str]
):
    folder = copy_run(made, tmp_path)
    # The last stages are still to be done, so that each file is read.
    for name in (
        ("search.json", "dpo.json") if "scores" in file or "adapters" in file or "data" in file else ("dpo.json",)
    ):
        (folder / "iteration_2" / name).unlink()
    (folder / file).write_text(content)
    before = contents(folder)
    line = refused(capsys, made, folder)
    assert line.removeprefix("checkpoint ").startswith(f"{folder}/{message}")
    assert contents(folder) == before


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
        patch.setattr(records.os, "fsync", fail)
        line = refused(capsys, made, folder)
    assert line.startswith(f"{folder}: No space left on device; free some space and run the same command again")
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
    assert not (folder / "warmup").exists()
    (folder / "metrics.jsonl").unlink()
    assert again(made, folder, stage="warmup") == 0
    ours, theirs = (read(f / "metrics.jsonl") for f in (folder, made.folder))
    assert [row["loss"] for row in ours] == [row["loss"] for row in theirs if row["stage"] == "warmup"]


def rewrite_config(folder: Path, **changes: Any) -> list[str]:
    """Changes settings of a run directory; returns them as arguments."""
    path = folder / "config.yaml"
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    return [f"--{name}={value}" for name, value in changes.items() if value is not True] + [
        f"--{name}" for name, value in changes.items() if value is True
    ]


def test_a_search_without_pairs_leaves_the_policy_as_it_is(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = copy_run(made, tmp_path)
    for name in ("trees.jsonl", "pairs.jsonl", "search.json", "dpo.json", "evaluation_test_all.json"):
        (folder / "iteration_2" / name).unlink()
    changes = rewrite_config(folder, pairs__min_q_gap=10.0)
    assert again(made, folder, *changes) == 0
    assert "the search found no pair, the policy stays as it is" in capsys.readouterr().err
    assert read(folder / "iteration_2/pairs.jsonl") == []
    responses = [read(folder / f"iteration_{i}/evaluation_test_all.jsonl") for i in (1, 2)]
    assert responses[0] == responses[1]
    assert responses[1] != read(made.folder / "iteration_2/evaluation_test_all.jsonl")


def test_the_control_takes_as_many_steps_on_the_gold_of_the_same_prompts(made: Made, tmp_path: Path):
    folder = copy_run(made, tmp_path)
    (folder / "iteration_2/dpo.json").unlink()
    changes = rewrite_config(folder, preference__control=True)
    assert again(made, folder, *changes, "--iteration=2", stage="dpo") == 0
    ours, theirs = (json.loads((f / "iteration_2/dpo.json").read_text()) for f in (folder, made.folder))
    assert (ours["pairs"], ours["steps"]) == (theirs["pairs"], theirs["steps"])
    steps = [row for row in read(folder / "metrics.jsonl") if row["stage"] == "iteration_2"][theirs["steps"] :]
    assert len(steps) == ours["steps"]
    assert steps[0]["loss"] > 1.5  # nats a token of the gold response, not ln 2
    assert "reward_margin" not in steps[0]
