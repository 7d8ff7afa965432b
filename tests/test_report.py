"""The report of a run: what it holds, that nothing in it can break out, and the page in a browser."""

import json
import math
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from itool_jax.config import Config
from itool_jax.evaluation.errors import KINDS, error_kind
from itool_jax.evaluation.statistics import wilson_interval
from itool_jax.main import main
from itool_jax.report import data as report_data
from itool_jax.report import page, server
from itool_jax.report import trees as report_trees
from itool_jax.stages import report
from itool_jax.store.columns import row_of
from itool_jax.store.tables import TreeRow
from tests.conftest import read, write
from tests.runs import ITERATIONS, PHASES, Made, copy_run

HOSTILE = (
    '</script><img src=x onerror="document.title=1"><script>alert(1)</script><!-- {{css}} \u2028 \U0001f4a3 \ud800'
)


def of(folder: Path, **settings: Any) -> Config:
    return Config(stage="report", run_dir=folder, **settings)


def embedded_json(text: str, name: str) -> Any:
    """What a script element of the page holds."""
    match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    return json.loads(match[1])


# What it holds ------------------------------------------------------------------------------------------------


def test_a_finished_run_has_left_its_report(made: Made):
    text = (made.folder / "report.html").read_text()
    content = embedded_json(text, "report")
    assert content["title"] == made.folder.name
    assert content["summary"]["finished"]
    assert content["phases"] == PHASES
    assert text.count('id="tree-') - text.count('id="tree-list"') - text.count('id="tree-co') >= len(content["trees"])


@pytest.fixture(scope="module")
def shown(made: Made) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    content, trees = report.content(of(made.folder))
    return content, [json.loads(tree) for tree in trees]


def test_its_figures_are_those_of_the_summary(shown: Any, made: Made):
    summary = json.loads((made.folder / "summary.json").read_text())
    for row, phase in zip(shown[0]["evaluation"]["phases"], summary["phases"], strict=True):
        assert (row["phase"], row["accuracy"], row["n"]) == (phase["name"], phase["accuracy"], phase["n"])
        for name, bounds in row["interval"].items():
            assert bounds is None or bounds[0] <= row["accuracy"][name] <= bounds[1]
    assert shown[0]["evaluation"]["comparisons"] == summary["comparisons"]
    assert [row["pairs"] for row in shown[0]["searches"]] == [row["pairs"] for row in summary["search"]]


def test_settings_that_differ_are_marked(shown: Any):
    rows = {row["name"]: row for row in shown[0]["settings"]}
    assert rows["search.breadth"] == {"name": "search.breadth", "value": 2, "default": 3, "differs": True}
    assert not rows["seed"]["differs"]
    assert "output" not in rows


def test_every_tree_and_pair_of_the_run_is_there(shown: Any, made: Made):
    content, trees = shown
    phases = [f"iteration_{n + 1}" for n in range(ITERATIONS)]
    rows = [(phase, row) for phase in phases for row in read(made.folder / phase / "trees.jsonl")]
    assert [(entry["phase"], entry["id"]) for entry in content["trees"]] == [(phase, row["id"]) for phase, row in rows]
    for (_, row), tree in zip(rows, trees, strict=True):
        assert tree["gold"] == row["gold"]
        assert [node[1] for node in tree["nodes"]] == [node["text"] for node in row["nodes"]]
        assert tree["messages"][-1]["role"] == "user"
        assert content["tool_lists"][tree["tools"]][0]["name"].startswith("f")
    pairs = [row for phase in phases for row in read(made.folder / phase / "pairs.jsonl")]
    assert sum(len(tree["pairs"]) for tree in trees) == len(pairs)


def test_examples_hold_answers_of_every_phase(shown: Any, made: Made):
    examples = shown[0]["examples"]
    rows = {row["id"]: row for row in read(made.folder / "warmup/evaluation_test_all.jsonl")}
    assert {row["id"] for row in examples["samples"]} == set(rows)
    for sample in examples["samples"]:
        row, answer = rows[sample["id"]], sample["answers"]["warmup"]
        assert (answer["response"], answer["kind"] is None) == (row["response"], row["correct"])
    wrong = sum(not row["correct"] for row in rows.values())
    assert sum(examples["kinds"]["warmup"].values()) == wrong


def test_curves_hold_every_step_of_a_short_training(shown: Any, made: Made):
    rows = [row for row in read(made.folder / "metrics.jsonl") if row["stage"] == "warmup"]
    curve = next(row for row in shown[0]["training"] if row["phase"] == "warmup")
    assert curve["steps"] == [row["step"] for row in rows]
    assert curve["curves"]["loss"] == [row["loss"] for row in rows]


def test_long_trainings_are_thinned_out_and_end_where_they_end(tmp_path: Path):
    rows = [{"time": 0, "stage": "warmup", "step": n, "loss": n} for n in range(1, 5001)]
    (curve,) = report_data._training(write(tmp_path / "metrics.jsonl", rows))
    assert len(curve["steps"]) <= report_data.MOST_POINTS + 1
    assert (curve["steps"][-1], curve["n_steps"]) == (5000, 5000)


def test_perplexity_before_and_after_is_of_the_same_samples(shown: Any, made: Made):
    first, last = shown[0]["perplexity"]
    rows = read(made.folder / "iteration_1/scores.jsonl")
    searched = [row["perplexity"] for row in rows if row["rank"] is not None]
    assert (first["before"]["n"], first["after"]["n"], first["all"]["n"]) == (len(searched), len(searched), len(rows))
    assert min(searched) <= first["before"]["p50"] <= max(searched)
    assert last["after"] is None


def test_a_run_that_goes_on_has_a_report_too(made: Made, tmp_path: Path):
    folder = copy_run(made, tmp_path)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "iteration_2")
    (folder / "iteration_1/evaluation_test_all.json").unlink()
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"time": 1, "stage": "iteration_1/dpo", "level": "info", "text": "begin"}\n{"time": 2, "sta')
    content, _ = report.content(of(folder))
    assert content["log"]["stage"] == "iteration_1/dpo"
    assert [row["phase"] for row in content["evaluation"]["phases"]] == ["base", "warmup"]
    assert content["evaluation"]["comparisons"][0]["text"].startswith(("+", "-"))
    assert content["summary"] is None


def test_a_run_that_has_only_begun_has_one_too(made: Made, tmp_path: Path):
    shutil.copy(made.folder / "config.yaml", tmp_path)
    assert main(["--stage=report", f"--run_dir={tmp_path}"]) == 0
    assert embedded_json((tmp_path / "report.html").read_text(), "report")["phases"] == []


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.yaml", None, "is not a run directory"),
        ("iteration_1/trees.jsonl", '{"id": "a", "gold": "", "nodes": [{"parent": 3}]}\n', "each after its parent"),
        ("iteration_1/pairs.jsonl", '{"tree": "a", "node": -1}\n', "a node number"),
        ("summary.json", "{", "summary.json is damaged"),
        ("data/card.json", '{"parts": [1]}', "card.json is damaged"),
    ],
)
def test_a_damaged_file_is_named(made: Made, tmp_path: Path, capsys: Any, name: str, text: str | None, said: str):
    folder = copy_run(made, tmp_path)
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    assert main(["--stage=report", f"--run_dir={folder}"]) == 2
    assert said in capsys.readouterr().err
    assert report.refresh(of(folder)) is None  # and a run goes on without it


def test_trees_beyond_the_limit_are_left_out_and_counted(made: Made, monkeypatch: pytest.MonkeyPatch):
    everything, trees = report.content(of(made.folder))
    monkeypatch.setattr(report, "TREE_BYTES", sum(map(len, trees[:3])))
    fewer, kept = report.content(of(made.folder))
    assert kept == trees[:3]
    assert fewer["trees"] == everything["trees"][:3]
    assert fewer["trees_left_out"] == len(trees) - 3


@pytest.mark.parametrize(
    ("kind", "gold", "response"),
    [
        ("no call", "[f(x=1)]", "I cannot."),
        ("needless call", "I cannot.", "[f(x=1)]"),
        ("unreadable", "[f(x=1)]", "[f(x=]"),
        ("missing call", "[f(x=1), g()]", "[f(x=1)]"),
        ("extra call", "[f(x=1)]", "[f(x=1), f(x=1)]"),
        ("wrong function", "[f(x=1)]", "[g(x=1)]"),
        ("wrong parameters", "[f(x=1)]", "[f(y=1)]"),
        ("wrong value", "[f(x=1)]", "[f(x='1')]"),
        ("other", "[f(x=", "no"),
    ],
)
def test_kinds_of_errors(kind: str, gold: str, response: str):
    assert error_kind(gold, response, finished=True) == kind
    assert error_kind(gold, response, finished=False) == "cut off"
    assert kind in KINDS


def test_stop_tokens_are_no_part_of_a_response():
    node = {"parent": 0, "outcome": -1.0}
    nodes = [{"parent": -1, "text": ""}, {"text": "[f(x=2)]", **node}, {"text": "<|eot_id|>", **node, "parent": 1}]
    assert report_trees._kind(row_of(TreeRow, {"gold": "[f(x=1)]", "nodes": nodes}), 2) == "wrong value"
    assert report_trees._kind(row_of(TreeRow, {"gold": "[f(x=1)]", "nodes": nodes[:2]}), 1) == "cut off"


def test_wilson_intervals():
    assert wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(1.0, 10)[1] == pytest.approx(1.0)


# Nothing breaks out -------------------------------------------------------------------------------------------


def make_hostile(made: Made, folder: Path) -> Path:
    """The report of a run whose data and answers try to be markup, and are long."""
    folder = copy_run(made, folder)
    for name in ("data/train.jsonl", "data/test.jsonl"):
        rows = read(folder / name)
        for row in rows:
            row["messages"][-1]["content"] += HOSTILE
            row["tools"][0]["function"]["description"] = HOSTILE
        write(folder / name, rows)
    for path in folder.glob("*/evaluation_*.jsonl"):
        rows = read(path)
        for row in rows:
            row["response"], row["correct"] = HOSTILE + "x" * 20_000, False
        write(path, rows)
    for path in folder.glob("*/trees.jsonl"):
        rows = read(path)
        for row in rows:
            row["gold"] = HOSTILE
            for node in row["nodes"][1:]:
                node["text"], node["q"] = HOSTILE, float("nan")
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1, "stage": HOSTILE, "level": "info", "text": HOSTILE}) + "\n")
    report.write(of(folder))
    return folder / "report.html"


def test_texts_cannot_end_the_element_they_stand_in(made: Made, tmp_path: Path):
    text = make_hostile(made, tmp_path).read_text()
    assert "<img" not in text
    bare = re.sub(r"<script[^>]*>.*?</script>", "", text, flags=re.DOTALL)
    assert "<script" not in bare
    assert "</script" not in bare
    first = embedded_json(text, "tree-0")
    assert first["nodes"][1][1] == HOSTILE
    assert first["nodes"][1][3] is None  # JSON has no NaN


def test_the_page_needs_no_network_and_allows_none(made: Made):
    text = (made.folder / "report.html").read_text()
    assert "sourceMappingURL" not in text
    assert not re.findall(
        r'(?:src|href)="(?!#|data:,")[^"]+"', re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    )
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_our_scripts_make_no_markup_from_texts():
    for name in page.SCRIPTS:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", (page.FOLDER / name).read_text()
        )


def test_the_library_comes_with_its_licence():
    assert "MIT License" in (page.FOLDER / "chart.LICENSE.md").read_text()
    assert "chartjs.org" in (page.FOLDER / "chart.umd.min.js").read_text()[:200]


# The server ---------------------------------------------------------------------------------------------------


@pytest.fixture
def served(made: Made, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server over a copy of the run."""
    folder = copy_run(made, tmp_path)
    config = of(folder, watch=True)
    source = server.Source(lambda: report_data.stamp(config), lambda: report.content(config, live=True))
    with server.listen(source) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder
        running.shutdown()
        thread.join()


def get(address: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_the_server_tells_what_is_new(served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(server, "SHARE", math.inf)
    address, folder = served
    status, text = get(f"{address}/report.json")
    first = json.loads(text)
    assert (status, first["live"], first["error"]) == (200, True, None)
    assert get(f"{address}/report.json?have={first['stamp']}") == (204, "")
    assert json.loads(get(f"{address}/tree?at=0")[1])["gold"]
    with (folder / "log.jsonl").open("a") as file:
        file.write('{"time": 1, "stage": null, "level": "info", "text": "something new"}\n')
    _, text = get(f"{address}/report.json?have={first['stamp']}")
    assert json.loads(text)["log"]["lines"][-1]["text"] == "something new"
    (folder / "summary.json").write_text("{")
    damaged = json.loads(get(f"{address}/report.json")[1])
    assert "summary.json is damaged" in damaged["error"]
    assert damaged["phases"] == PHASES  # what was known stays


def test_a_browser_that_goes_away_and_a_file_that_nobody_expected_end_nothing(
    served: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    address, folder = served
    monkeypatch.setattr(server, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(server, "SHARE", math.inf)
    get(f"{address}/report.json")

    def fail(*_: object) -> None:
        raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr(server.BaseHTTPRequestHandler, "end_headers", fail)
        with pytest.raises(OSError):
            get(f"{address}/report.json")
    monkeypatch.setattr(report_data, "find", lambda _: {}["no such key"])
    with (folder / "log.jsonl").open("a") as file:
        file.write("{}\n")
    content = json.loads(get(f"{address}/report.json")[1])
    assert (content["error"], content["phases"]) == ("'no such key'", PHASES)
    assert "Traceback" not in capsys.readouterr().err


def test_a_benchmark_that_is_scored_is_news(made: Made, tmp_path: Path):
    folder = copy_run(made, tmp_path)
    before = report_data.stamp(of(folder))
    (folder / "warmup/bfcl").mkdir()
    write(folder / "warmup/bfcl/summary.json", [{}])
    assert report_data.stamp(of(folder)) != before


def test_a_near_miss_is_not_right():
    nodes = [
        {"terminal": terminal, "outcome": outcome} for terminal, outcome in ((False, 0.0), (True, 0.7), (True, -1))
    ]
    assert report_trees._verdict(row_of(TreeRow, {"nodes": nodes})) == "wrong"
    right = {"terminal": True, "outcome": 1.0}
    assert report_trees._verdict(row_of(TreeRow, {"nodes": [*nodes, right]})) == "mixed"


def test_the_server_answers_this_machine_alone(served: tuple[str, Path]):
    address, _ = served
    assert address.startswith("http://127.0.0.1:")
    assert get(f"{address}/", Host="evil.example:80")[0] == 403
    assert get(f"{address}/../config.yaml")[0] == 404
    for at in ("99999", "-1", "x", ""):
        assert get(f"{address}/tree?at={at}")[0] == 404


def test_watching_ends_with_the_user(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(server.ThreadingHTTPServer, "serve_forever", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["--stage=report", "--watch", f"--run_dir={copy_run(made, tmp_path)}"]) == 0
    assert "http://127.0.0.1:" in capsys.readouterr().out


def test_watch_is_for_the_report(capsys: Any):
    assert main(["--stage=iterate", "--watch"]) == 2
    assert "watch is only for stage report" in capsys.readouterr().err
