"""`--benchmark`: a model's responses to public questions, scored, kept, compared; result files that others made."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from itool_jax.evaluation import benchmark, comparison
from itool_jax.evaluation.bfcl import scores as bfcl_scores
from itool_jax.evaluation.bfcl import setup as bfcl_setup
from itool_jax.evaluation.bfcl.data import CATEGORIES, MULTI_TURN, SINGLE_TURN, Question, first_tools, load_questions
from itool_jax.main import main
from itool_jax.text.calls import read_calls
from itool_jax.text.chat import Chat, load_tokenizer
from tests import tiny
from tests.conftest import read, shared_path, write
from tests.runs import SMALL, Made, again, copy_run
from tests.test_bfcl_data import write_data


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for the leaderboard's prompts, a byte a token."""
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("long"), max_position_embeddings=16_384)


@pytest.fixture(scope="module")
def tagged_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a template that writes calls in a form of its own."""
    folder = tiny.tiny_checkpoint(tmp_path_factory.mktemp("tagged"), max_position_embeddings=1 << 18)
    (folder / "chat_template.jinja").write_text(tiny.TAGGED_TEMPLATE)
    return folder


def evaluate(model: Path, run_dir: Path, *settings: str) -> int:
    command = ["--stage=evaluate", "--benchmark=bfcl", f"--model={model}", f"--run_dir={run_dir}"]
    return main([*command, *SMALL, *settings])


def results(folder: Path, category: str, *texts: Any) -> Path:
    """A result file, as anyone may make one."""
    folder.mkdir(exist_ok=True)
    rows = [{"id": f"{category}_{i}", "result": text} for i, text in enumerate(texts)]
    return write(folder / f"BFCL_v3_{category}_result.json", rows)


def test_questions_are_answered_once_scored_and_kept(
    tmp_path: Path, long_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", "multiple", 3)
    write_data(data, "simple", 2)
    settings = [f"--data={data}", "--categories", "simple", "multiple"]
    assert evaluate(long_folder, tmp_path / "run", *settings) == 0
    out = capsys.readouterr().out
    assert "bfcl, base: % correct" in out
    assert "5 of 7 missing" in out  # of non-live
    assert "questions and possible answers: BFCL v3 files" in out
    assert "not answer" not in out
    where = tmp_path / "run/base/bfcl"
    rows = read(where / "BFCL_v3_multiple_result.json")
    assert [row["id"] for row in rows] == ["multiple_0", "multiple_1", "multiple_2"]
    assert all(isinstance(row["result"], str) and row["result"] for row in rows)
    scores = json.loads((where / "scores.json").read_text())
    assert {name: row["total"] for name, row in scores.items()} == {"simple": 2, "multiple": 3}
    assert all(row["correct"] + len(row["failed"]) == row["total"] for row in scores.values())
    summary = json.loads((where / "summary.json").read_text())
    assert summary["columns"]["overall"] is None
    assert summary["errors"].keys() == summary["edition"]["digest"].keys() == scores.keys()
    # Again: nothing is answered; a category whose responses are gone is answered again, and alike.
    assert evaluate(long_folder, tmp_path / "run", *settings) == 0
    assert capsys.readouterr().err.count("already done") == 2
    (where / "BFCL_v3_multiple_result.json").unlink()
    assert evaluate(long_folder, tmp_path / "run", *settings) == 0
    assert capsys.readouterr().err.count("already done") == 1
    assert read(where / "BFCL_v3_multiple_result.json") == rows
    # Of other questions nothing is done yet; those that did not change are not asked again.
    write_data(data, "simple", 3)
    assert evaluate(long_folder, tmp_path / "run", *settings) == 0
    assert capsys.readouterr().err.count("already done") == 1
    assert json.loads((where / "scores.json").read_text())["simple"]["total"] == 3


def test_a_part_and_the_layout_of_v4(tmp_path: Path, long_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data", "simple", 3)
    chosen = [f"--data={data}", "--categories=simple_python", "--evaluate.benchmark_limit=1", "--evaluate.layout=v4"]
    assert evaluate(long_folder, tmp_path / "run", *chosen) == 0
    assert "1 of 3" in capsys.readouterr().out
    where = tmp_path / "run/base/bfcl_1"
    assert len(read(where / "non_live/BFCL_v4_simple_python_result.json")) == 1
    # What it wrote is what --results reads.
    output = tmp_path / "scores.json"
    command = ["--stage=evaluate", "--benchmark=bfcl", f"--results={where}", f"--data={data}", f"--output={output}"]
    assert main(command) == 0
    assert json.loads(output.read_text()) == json.loads((where / "scores.json").read_text())


def test_prompts_that_do_not_fit_are_told(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", "simple")
    write_data(tmp_path / "data", "irrelevance", 3)
    settings = [f"--data={data}", "--categories", "simple", "irrelevance"]
    for _ in range(2):  # the second time from what the first one kept
        assert evaluate(tiny_folder, tmp_path / "run", *settings) == 0
        captured = capsys.readouterr()
        assert "unanswered" in captured.out
        assert "the model did not answer 5 of 5 questions" in captured.out
        summary = json.loads((tmp_path / "run/base/bfcl/summary.json").read_text())
        assert summary["unanswered"] == {"simple": 2, "irrelevance": 3}
        assert summary["accuracy"] == {"simple": 0.0, "irrelevance": 1.0}
        (tmp_path / "run/base/bfcl/summary.json").unlink()
    (tmp_path / "run/base/bfcl/BFCL_v3_simple_result.json").unlink()
    assert evaluate(tiny_folder, tmp_path / "run", *settings) == 0
    assert "simple: 2 of 2 prompts do not fit the model's context" in capsys.readouterr().err
    rows = read(tmp_path / "run/base/bfcl/BFCL_v3_simple_result.json")
    assert rows[0]["result"].startswith("Error during inference: ")


def test_models_that_were_shown_no_dots_are_judged_by_what_they_were_shown(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", "simple", 2, name="a.f")
    results(tmp_path / "r", "simple", "[a.f(b='x')]", "[a_f(b='x')]")
    output = tmp_path / "scores.json"
    command = ["--stage=evaluate", "--benchmark=bfcl", f"--data={data}", f"--results={tmp_path / 'r'}"]
    for settings, failed in (([], ["simple_1"]), (["--evaluate.underscore_to_dot"], ["simple_0"])):
        assert main([*command, f"--output={output}", *settings]) == 0
        assert json.loads(output.read_text())["simple"]["failed"] == failed


FC = {"a_f": '{"b": "x"}'}


def test_result_files_of_function_calling_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data", "simple", 6, name="a.f")
    write_data(data, "irrelevance", 4)
    output = tmp_path / "scores.json"
    command = ["--stage=evaluate", "--benchmark=bfcl", f"--data={data}", f"--output={output}"]
    # Text is no call, even if another model's would be one.
    simple = [[FC], [{"a.f": {"b": "x"}}], [{"a_f": '{"b": "y"}'}], [], "[a.f(b='x')]", "[a_f(b='x')]"]
    results(tmp_path / "r", "simple", *simple)
    results(tmp_path / "r", "irrelevance", [FC], [], "[a_f(b='x')]", None)
    assert main([*command, f"--results={tmp_path / 'r'}"]) == 0
    scores = json.loads(output.read_text())
    assert scores["simple"]["failed"] == [f"simple_{i}" for i in (2, 3, 4, 5)]
    assert scores["irrelevance"]["failed"] == ["irrelevance_0"]
    # Without a list in any file, text is read as a prompted model's.
    results(tmp_path / "p", "simple", "[a.f(b='x')]", "<tool_call>\n{}\n</tool_call>")
    results(tmp_path / "p", "irrelevance", "[a_f(b='x')]", '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')
    capsys.readouterr()
    assert main([*command, f"--results={tmp_path / 'p'}"]) == 0
    scores = json.loads(output.read_text())
    assert (scores["simple"]["failed"], scores["irrelevance"]["failed"]) == (["simple_1"], ["irrelevance_0"])
    assert capsys.readouterr().err.count("of 2 responses hold calls in a form that the leaderboard does not read") == 1
    results(tmp_path / "w", "simple", [FC], [{"name": "a_f", "arguments": {}}])
    assert main([*command, f"--results={tmp_path / 'w'}"]) == 2
    err = capsys.readouterr().err
    assert 'row 2: simple_1: "result" is neither text nor a list of {name: arguments}' in err
    assert err.count("\n") == 1


def script(monkeypatch: pytest.MonkeyPatch, chat: Chat, answers: Mapping[str, str]) -> dict[str, str]:
    """Answers by key in place of the model's; returns the prompts, which it fills."""
    prompts: dict[str, str] = {}

    def generate(_policy: Any, _table: Any, rows: Any, *_: Any) -> Iterator[list[tuple[int, list[int]]]]:
        prompts.update({key: chat.tokenizer.decode(ids) for key, ids in rows})
        yield [(i, chat.target_ids(answers.get(key, "Done."))) for i, (key, _) in enumerate(rows)]

    monkeypatch.setattr(benchmark, "generate", generate)
    return prompts


def test_a_template_that_writes_calls_is_asked_as_function_calling_models_are(
    tmp_path: Path, tagged_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data", "simple", 3, name="a.f")
    write_data(data, "irrelevance", 2)
    settings = [f"--data={data}", "--categories", "simple", "irrelevance"]
    texts = {"simple_0": '[a_f(b="x")]', "simple_1": '[a.f(b="x")]', "irrelevance_0": '[f(b="é")]'}
    chat = Chat(load_tokenizer(str(tagged_folder)))
    prompts = script(monkeypatch, chat, texts)
    assert evaluate(tagged_folder, tmp_path / "run", *settings) == 0
    assert "base: function-calling mode: the template lists the functions, calls are <tool_call>" in (
        capsys.readouterr().err
    )
    shown = f"<|user|>q<|end|><|tools|>{json.dumps(first_tools(load_questions(data, 'simple')[0]))}<|end|><|assistant|>"
    assert prompts["simple_0"] == shown
    where = tmp_path / "run/base/bfcl"
    rows = [row["result"] for name in ("simple", "irrelevance") for row in read(where / f"BFCL_v3_{name}_result.json")]
    assert rows == [[FC], [{"a.f": '{"b": "x"}'}], "Done.", [{"f": '{"b": "\\u00e9"}'}], "Done."]
    scores = json.loads((where / "scores.json").read_text())
    assert scores["simple"]["failed"] == ["simple_1", "simple_2"]  # its tools had no dots
    assert scores["irrelevance"]["failed"] == ["irrelevance_0"]
    # In brackets, the same template is asked as before.
    prompts = script(monkeypatch, Chat(chat.tokenizer, "brackets"), {"simple_0": '[a.f(b="x")]'})
    assert evaluate(tagged_folder, tmp_path / "prompt", "--tool_format=brackets", *settings) == 0
    assert "function-calling mode" not in capsys.readouterr().err
    assert prompts["simple_0"].startswith("<|system|>You are an expert in composing functions.")
    assert "<|tools|>" not in prompts["simple_0"]
    rows = read(tmp_path / "prompt/base/bfcl/BFCL_v3_simple_result.json")
    assert [row["result"] for row in rows] == ['[a.f(b="x")]', "Done.", "Done."]
    scores = json.loads((tmp_path / "prompt/base/bfcl/scores.json").read_text())
    assert scores["simple"]["failed"] == ["simple_1", "simple_2"]


def test_api_bank_counts_calls_in_the_templates_own_form(
    tmp_path: Path, tagged_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"file": "t", "id": 0, "instruction": "Call f0.", "input": "User: q", "expected_output": "[f0(x='1')]"}
    (tmp_path / "level-1-api.json").write_text(json.dumps([row]))
    prompts = script(monkeypatch, Chat(load_tokenizer(str(tagged_folder))), {"t/0": "[f0(x=1)]"})
    command = ["--stage=evaluate", "--benchmark=api_bank", f"--model={tagged_folder}", f"--data={tmp_path}"]
    assert main([*command, "--categories=level_1", f"--run_dir={tmp_path / 'run'}", *SMALL]) == 0
    assert prompts == {"t/0": "<|system|>Call f0.<|end|><|user|>User: q<|end|><|assistant|>"}
    where = tmp_path / "run/base/api_bank"
    assert read(where / "level_1_result.jsonl")[0]["result"].startswith("<tool_call>")
    assert json.loads((where / "scores.json").read_text())["level_1"]["correct"] == 1


def test_result_files_of_others_are_scored_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data", "simple", 3)
    results(tmp_path / "a", "simple", "[f(b='x')]", "[f(b='x')]", "no")
    results(tmp_path / "b", "simple", "[f(b='x')]", "[f(b='y')]", "[f(b='X')]")
    command = ["--stage=evaluate", "--benchmark=bfcl", f"--data={data}"]
    for name in "ab":
        assert main([*command, f"--results={tmp_path / name}", f"--output={tmp_path / f'{name}.json'}"]) == 0
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "simple": {"correct": 2, "total": 3, "failed": ["simple_2"]}
    }
    assert "simple, errors: value_error:string 1" in capsys.readouterr().out
    against = [f"--results={tmp_path / 'a'}", f"--against={tmp_path / 'b.json'}", f"--output={tmp_path / 'a.json'}"]
    assert main([*command, *against]) == 0
    out = capsys.readouterr().out
    assert "simple against" in out
    assert "+0.0 ± 47.1 points (n=3, p=1.0000), no significant gain" in out
    differing = json.loads((tmp_path / "a.comparison.json").read_text())["simple"]
    assert (differing["only_here"], differing["only_there"]) == (["simple_1"], ["simple_2"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (["--results=none"], "none contains no BFCL_v3_<category>_result.json"),
        (["--categories=simpel"], "unknown BFCL category 'simpel'"),
        (["--data=none"], "none/questions contains no BFCL_v3_simple.json, plain or .gz"),
        (["--evaluate.phase=iteration_9"], "evaluate.phase=iteration_9 has no weights"),
        (["--evaluate.benchmark_limit=-1"], "evaluate.benchmark_limit must not be negative, got -1"),
        (["--output=x.json"], "output is only for stages score, generate, export and plan, and for results"),
        (["--against=none.json"], "none.json not found; --against needs the scores.json of another run"),
        (["--benchmark=api_bank", "--official"], "official is only for --benchmark=bfcl"),
        (["--benchmark=api_bank", "--results=none"], "results is only for --benchmark=bfcl"),
        (["--evaluate.underscore_to_dot"], "evaluate.underscore_to_dot is only for results"),
        (["--stage=warmup"], "benchmark is only for stages evaluate and iterate, got stage warmup"),
        (["--stage=iterate", "--official"], "official is only for stage evaluate, got stage iterate"),
    ],
)
def test_wrong_settings_are_named(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: Any,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert evaluate(tiny_folder, tmp_path / "run", *settings) == 2
    err = capsys.readouterr().err
    assert reason in err
    assert err.count("\n") == 1


def test_settings_without_a_benchmark_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--stage=evaluate", "--categories=simple"]) == 2
    assert "categories needs a benchmark; set --benchmark=bfcl" in capsys.readouterr().err


def test_without_the_official_environment_the_command_is_named(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ITOOL_BFCL", str(tmp_path / "none"))
    data = write_data(tmp_path / "data", "simple")
    official = [f"--data={data}", "--categories=simple", "--official"]
    for settings in ([], ["--categories=multi_turn", f"--data={tmp_path}"], official):
        assert evaluate(tiny_folder, tmp_path / "run", *settings) == 2
        assert "run python -m itool_jax.evaluation.bfcl.setup" in capsys.readouterr().err
        assert not list((tmp_path / "run").rglob("*_result.json"))  # before any work


def test_another_scores_file_must_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data", "simple", 2)
    results(tmp_path / "a", "simple", "no", "no")
    command = ["--stage=evaluate", "--benchmark=bfcl", f"--data={data}", f"--results={tmp_path / 'a'}"]
    for content, reason in (
        ("{", "is not a scores.json"),
        ("{}", "has none of the categories simple"),
        ('{"simple": {"correct": 1, "total": 1, "failed": []}}', "2 questions cannot be compared with 1"),
    ):
        (tmp_path / "b.json").write_text(content)
        assert main([*command, f"--against={tmp_path / 'b.json'}"]) == 2
        assert reason in capsys.readouterr().err


def test_nothing_to_score_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data", "simple", 2)
    command = ["--stage=evaluate", "--benchmark=bfcl", f"--data={data}", f"--results={tmp_path / 'a'}"]
    results(tmp_path / "a", "simple", "no")
    assert main([*command, "--categories=java"]) == 2
    assert "a contains none of the categories java" in capsys.readouterr().err
    (tmp_path / "a/BFCL_v3_simple_result.json").write_text("")
    assert main(command) == 2
    assert "BFCL_v3_simple_result.json contains no responses" in capsys.readouterr().err


def test_columns_of_parts_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_data(tmp_path / "data", "live_relevance", 3)
    results(tmp_path / "a", "live_relevance", "[f()]", "no")
    command = ["--stage=evaluate", "--benchmark=bfcl", f"--data={data}", f"--results={tmp_path / 'a'}"]
    assert main(command) == 0
    rows = [
        line for line in capsys.readouterr().out.splitlines() if line.split()[:1] in (["relevance"], ["live_relevance"])
    ]
    assert [row.rstrip().endswith("2 of 3") for row in rows] == [True, True]


def test_iterate_evaluates_after_each_phase_and_looks_for_the_questions(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_run(made, tmp_path)
    asked = [f"User: {row['messages'][-1]['content']}" for row in made.samples[:2]]
    row = {"file": "t", "instruction": "Call f0.", "expected_output": "[f0(x='1')]"}
    tests = [row | {"id": i, "input": text} for i, text in enumerate(asked)]
    (tmp_path / "api").mkdir()
    (tmp_path / "api/level-1-api.json").write_text(json.dumps(tests))
    settings = ["--benchmark=api_bank", "--categories=level_1", f"--evaluate.benchmark_data={tmp_path / 'api'}"]
    assert again(made, folder, *settings) == 0
    captured = capsys.readouterr()
    assert f"overlap of {tmp_path / 'api/level-1-api.json'} with train: " in captured.err
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["benchmark"]["name"] == "api_bank"
    assert list(summary["benchmark"]["phases"]) == ["warmup", "iteration_1", "iteration_2"]
    assert all(figures["n"] == {"level_1": 2} for figures in summary["benchmark"]["phases"].values())
    assert captured.out.count("api_bank, ") == 3
    # The run's own phases by name.
    assert again(made, folder, *settings, "--evaluate.phase=all", stage="evaluate") == 0
    assert capsys.readouterr().out.count("api_bank, ") == 4
    # The benchmark's folder may take the place of the data that the run was trained on.
    rest = [setting for setting in made.settings if not setting.startswith("--data=")]
    command = ["--stage=evaluate", *settings[:2], f"--data={tmp_path / 'api'}", f"--run_dir={folder}", *rest]
    assert main(command) == 0
    assert "iteration_2: api_bank/level_1 already done" in capsys.readouterr().err


def test_what_fell_is_marked(tmp_path: Path, made: Made) -> None:
    def scores(wrong: int) -> dict[str, Any]:
        failed = [f"q{i}" for i in range(wrong)]
        return {"simple": {"correct": 40 - wrong, "total": 40, "failed": failed}}

    by_phase = {
        phase: bfcl_scores.paired(comparison.read_scores(tmp_path / "b.json")["simple"], earlier["simple"])
        for phase, wrong in (("few", 6), ("many", 20), ("none", 0))
        if (tmp_path / "a.json").write_text(json.dumps(scores(3)))
        and (tmp_path / "b.json").write_text(json.dumps(scores(wrong)))
        and (earlier := comparison.read_scores(tmp_path / "a.json"))
    }
    lines = comparison.fallen(by_phase)
    assert lines == [
        "few -7.5 ± 4.2 points (n=40, p=0.2500, not significant)",
        "many -42.5 ± 7.8 points (n=40, p=0.0000, significant)",
    ]


@pytest.mark.benchmark
def test_all_single_turn_categories_with_the_published_files(
    tmp_path: Path, long_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shared_path("data/bfcl_v3")
    assert evaluate(long_folder, tmp_path / "run", f"--data={data}", "--evaluate.benchmark_limit=2") == 0
    where = tmp_path / "run/base/bfcl_2"
    scores = json.loads((where / "scores.json").read_text())
    assert tuple(scores) == SINGLE_TURN
    assert {row["total"] for row in scores.values()} == {2}
    for category in SINGLE_TURN:
        rows = read(where / f"BFCL_v3_{category}_result.json")
        assert not any(row["result"].startswith("Error") for row in rows)
    assert "do not fit" not in capsys.readouterr().err


@pytest.mark.simulator
def test_a_multi_turn_category_with_the_published_files_and_the_official_scorer(
    tmp_path: Path, long_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        bfcl_setup.python()
    except ValueError as error:
        pytest.skip(str(error))
    settings = ["--categories", "multi_turn_miss_func", "java", "--evaluate.benchmark_limit=2", "--official"]
    assert evaluate(long_folder, tmp_path / "run", *settings) == 0
    rows = read(tmp_path / "run/base/bfcl_2/BFCL_v3_multi_turn_miss_func_result.json")
    assert [row["id"] for row in rows] == ["multi_turn_miss_func_0", "multi_turn_miss_func_1"]
    assert all(isinstance(text, str) for row in rows for turn in row["result"] for text in turn)
    out = capsys.readouterr().out
    assert "the official scorer and ours" in out
    assert out.count("none") == 2  # categories with another verdict


@pytest.mark.simulator
@pytest.mark.parametrize("tool_format", ["native", "brackets"])
def test_all_categories_in_both_modes_and_the_official_scorer(
    tmp_path: Path,
    tagged_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tool_format: Any,
) -> None:
    try:
        published = bfcl_setup.data()
    except ValueError as error:
        pytest.skip(str(error))
    chosen: dict[str, Question] = {}
    for part in ("questions", "possible_answer"):
        (tmp_path / "data" / part).mkdir(parents=True)
    for category in CATEGORIES:  # a question whose answers name their arguments: no decoder reads others
        questions = load_questions(published, category)
        chosen[category] = next(q for q in questions if category in SINGLE_TURN or all(map(keyword_only, q.answer)))
        name, row = f"BFCL_v3_{category}.json", chosen[category].row
        write(tmp_path / "data/questions" / name, [row])
        write(tmp_path / "data/possible_answer" / name, [{"id": row["id"], "ground_truth": chosen[category].answer}])
    settings = [f"--tool_format={tool_format}", f"--data={tmp_path / 'data'}", "--official"]

    def failed(*more: str) -> dict[str, list[str]]:
        assert evaluate(tagged_folder, tmp_path / "run", *settings, *more) == 0
        captured = capsys.readouterr()
        scores = json.loads((tmp_path / "run/base/bfcl/scores.json").read_text())
        assert [row["total"] for row in scores.values()] == [1] * len(scores)
        assert captured.out.count("none") == len(scores)  # of the verdicts differ
        assert ("function-calling mode" in captured.err) == (tool_format == "native")
        assert "not answer" not in captured.out
        return {name: row["failed"] for name, row in scores.items()}

    assert tuple(failed()) == SINGLE_TURN
    # Prompts of many turns take a tiny model minutes, so the published answers take its place.
    answers = {
        f"{chosen[category].id}/{number}/0": f"[{', '.join(calls)}]"
        for category in MULTI_TURN
        for number, calls in enumerate(chosen[category].answer, 1)
        if calls
    }
    prompts = script(monkeypatch, Chat(load_tokenizer(str(tagged_folder)), tool_format), answers)
    assert failed("--categories=multi_turn") == {category: [] for category in MULTI_TURN}
    assert "<|tool|>" in prompts["multi_turn_base_1/1/1"]
    assert ("<|tools|>" in prompts["multi_turn_base_1/1/1"]) == (tool_format == "native")
    rows = read(tmp_path / "run/base/bfcl/BFCL_v3_multi_turn_base_result.json")
    assert isinstance(rows[0]["result"][0][0], list) == (tool_format == "native")


def keyword_only(calls: list[str]) -> bool:
    """Whether a turn's published answers, if any, are calls with named arguments."""
    return not calls or read_calls(f"[{', '.join(calls)}]") is not None


def test_every_category_has_a_place_in_a_column() -> None:
    assert set(bfcl_scores.NEEDED["overall"]) == set(CATEGORIES)
