"""BFCL's files, prompts and scores: the leaderboard's layouts and averages, and one clear line for wrong files."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from itool_jax.evaluation.bfcl import data as bfcl_data
from itool_jax.evaluation.bfcl import scores as bfcl_scores
from itool_jax.evaluation.bfcl.data import CATEGORIES, MULTI_TURN, SINGLE_TURN, Question
from itool_jax.evaluation.bfcl.scores import Score
from tests.conftest import shared_path

TOOL = {
    "name": "f",
    "description": "Does it.",
    "parameters": {
        "type": "dict",
        "properties": {
            "a": {"type": "ArrayList", "description": "A.", "items": {"type": "long"}},
            "b": {"type": "any", "description": "B."},
        },
        "required": [],
    },
}


def question(category: str, *messages: dict[str, str], functions: Any = (TOOL,)) -> Question:
    return Question(f"{category}_0", category, [list(messages)], list(functions), [], {})


def write_data(
    folder: Path, category: str, n: int = 2, *, zipped: bool = False, answers: int | None = None, name: str = "f"
) -> Path:
    """A data folder with one category's questions and answers, about a function of that name."""
    rows = [
        {"id": f"{category}_{i}", "question": [[{"role": "user", "content": "q"}]], "function": [TOOL | {"name": name}]}
        for i in range(n)
    ]
    truth = [
        {"id": f"{category}_{i}", "ground_truth": [{name: {"b": ["x"]}}]}
        for i in range(n if answers is None else answers)
    ]
    for part, content in (("questions", rows), ("possible_answer", truth)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in content).encode()
        path = folder / part / f"BFCL_v3_{category}.json"
        if zipped:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(text))
        else:
            path.write_bytes(text)
    return folder


def test_categories_by_name_and_group() -> None:
    assert len(SINGLE_TURN) == 13
    assert len(MULTI_TURN) == 4
    assert bfcl_data.select(["multi_turn", "simple_python", "java"]) == ("simple", "java", *MULTI_TURN)
    assert bfcl_data.select(["all"]) == CATEGORIES
    with pytest.raises(ValueError, match="unknown BFCL category 'simpel'; choose from: all, single_turn"):
        bfcl_data.select(["simpel"])


@pytest.mark.parametrize("zipped", [False, True])
def test_questions_are_read_plain_and_gzipped(tmp_path: Path, zipped: bool) -> None:
    questions = bfcl_data.load_questions(write_data(tmp_path, "simple", zipped=zipped), "simple")
    assert [(q.id, q.answer) for q in questions] == [(f"simple_{i}", [{"f": {"b": ["x"]}}]) for i in range(2)]


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contains no BFCL_v3_java\.json, plain or \.gz"):
        bfcl_data.load_questions(tmp_path, "java")
    write_data(tmp_path, "simple", answers=1)
    with pytest.raises(ValueError, match=r"BFCL_v3_simple\.json row 2: no possible answer to simple_1"):
        bfcl_data.load_questions(tmp_path, "simple")
    (tmp_path / "questions/BFCL_v3_simple.json").write_text('{"id": "simple_0"}\n')
    with pytest.raises(ValueError, match=r'BFCL_v3_simple\.json row 1: no "question"'):
        bfcl_data.load_questions(tmp_path, "simple")


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("questions", {"function": TOOL}, 'questions/BFCL_v3_java.json row 1: "function" is not a list'),
        (
            "questions",
            {"question": [{}]},
            'questions/BFCL_v3_java.json row 1: java_0: "question" is not a list of turns',
        ),
        ("questions", {"id": 1}, 'questions/BFCL_v3_java.json row 1: "id" is not a string'),
        (
            "possible_answer",
            {"ground_truth": {}},
            'possible_answer/BFCL_v3_java.json row 1: "ground_truth" is not a list',
        ),
        (
            "possible_answer",
            {"ground_truth": [{}]},
            "questions/BFCL_v3_java.json row 1: java_0: a possible answer contains",
        ),
        ("possible_answer", {"truth": 0}, 'possible_answer/BFCL_v3_java.json row 1: no "ground_truth"'),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, part: str, change: dict[str, Any], reason: str) -> None:
    path = write_data(tmp_path, "java", 1) / part / "BFCL_v3_java.json"
    row = json.loads(path.read_text())
    if "truth" in change:
        del row["ground_truth"]
    path.write_text(json.dumps(row | change) + "\n")
    with pytest.raises(ValueError) as error:
        bfcl_data.load_questions(tmp_path, "java")
    assert reason in str(error.value)


def test_the_system_prompt_comes_first_and_keeps_a_prompt_of_the_question() -> None:
    user, system = {"role": "user", "content": "q"}, {"role": "system", "content": "Be brief."}
    alone = bfcl_data.first_messages(question("simple", user))
    both = bfcl_data.first_messages(question("simple", system, user))
    assert alone[1:] == both[1:] == [user]
    assert alone[0]["content"].startswith("You are an expert in composing functions.")
    assert (
        "[{'name': 'f', 'description': 'Does it. Note that the provided function is in Python 3 syntax.'"
        in (alone[0]["content"])
    )
    assert both[0]["content"] == alone[0]["content"] + "\n\nBe brief."


def test_other_languages_types_move_into_the_descriptions() -> None:
    shown = bfcl_data.shown_functions([TOOL], "java")[0]
    assert shown["description"] == "Does it. Note that the provided function is in Java 8 SDK syntax."
    assert shown["parameters"]["properties"] == {
        "a": {
            "type": "string",
            "description": "A. This is Java ArrayList type parameter in string representation. The list elements are "
            "of type long; they are not in string representation.",
        },
        "b": {
            "type": "string",
            "description": "B. This parameter can be of any type of Java object in string representation.",
        },
    }
    assert TOOL["parameters"]["properties"]["a"]["type"] == "ArrayList"  # the question itself stays
    inner = {"type": "dict", "description": "D.", "properties": {"k": {"type": "String"}}}
    function = {"name": "g", "description": "", "parameters": {"properties": {"d": inner}}}
    shown = bfcl_data.shown_functions([function], "javascript")[0]["parameters"]["properties"]["d"]
    assert shown["description"].endswith('representation. {"k": {"type": "String"}}')
    assert "properties" not in shown


def test_tools_have_names_and_types_that_interfaces_allow() -> None:
    inner = {"x": {"type": "tuple", "items": {"type": "float"}}, "y": {"type": "any"}}
    properties = {
        "a": {"type": "float", "description": "A."},
        "b": {"type": "dict", "properties": inner},
        "c": {"type": "array", "items": {"type": "dict", "properties": {"z": {"type": "bool"}}}},
        "d": {"type": "list", "items": {"type": "tuple", "items": {"type": "long"}}},
        "e": {"description": "E."},
    }
    function = {"name": "g.h.i", "description": "G.", "parameters": {"type": "dict", "properties": properties}}
    before = json.dumps(function)
    assert bfcl_data.as_tools([function]) == [
        {
            "type": "function",
            "function": {
                "name": "g_h_i",
                "description": "G.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "a": {"type": "number", "description": "A. This is a float type value.", "format": "float"},
                        "b": {
                            "type": "object",
                            "properties": {
                                "x": {"type": "array", "items": {"type": "number"}},
                                "y": {"type": "string"},
                            },
                        },
                        "c": {
                            "type": "array",
                            "items": {"type": "object", "properties": {"z": {"type": "boolean"}}},
                        },
                        "d": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
                        "e": {"description": "E.", "type": "string"},
                    },
                },
            },
        }
    ]
    assert json.dumps(function) == before
    java = bfcl_data.first_tools(question("java"))[0]["function"]["parameters"]["properties"]
    assert [schema["type"] for schema in java.values()] == ["string", "string"]


@pytest.mark.parametrize(
    ("version", "name"),
    [("v3", "BFCL_v3_java_result.json"), ("v4", "non_live/BFCL_v4_simple_java_result.json")],
)
def test_result_files_are_found_where_they_are_written(tmp_path: Path, version: Any, name: str) -> None:
    path = bfcl_data.result_file(tmp_path, "java", version)
    assert path == tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"id": "java_0", "result": "x"}\n')
    assert bfcl_data.find_results(tmp_path) == {"java": path}
    assert bfcl_data.read_results(path, [question("java")]) == {"java_0": "x"}


def test_wrong_result_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contains no BFCL_v3_<category>_result\.json"):
        bfcl_data.find_results(tmp_path)
    path = tmp_path / "BFCL_v3_simple_result.json"
    asked = [question("simple")]
    for row, reason in (
        ({"id": "simple_9", "result": ""}, "'simple_9' is not a question of this category"),
        ({"result": ""}, 'no "id"'),
        ({"id": "simple_0"}, 'no "result"'),
    ):
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=f"row 1: {reason}"):
            bfcl_data.read_results(path, asked)
    path.write_text("")
    with pytest.raises(ValueError, match="contains no responses"):
        bfcl_data.read_results(path, asked)
    path.write_text('{"id": "simple_0", "result": ""}\n' * 2)
    with pytest.raises(ValueError, match="row 2: 'simple_0' appears twice"):
        bfcl_data.read_results(path, asked)
    path.with_name(f"{path.name}.gz").write_text("")
    with pytest.raises(ValueError, match="are both results for simple"):
        bfcl_data.find_results(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / path.name).write_text("")
    with pytest.raises(
        ValueError, match=r"contains results of several models: \., other; --results must be one model's"
    ):
        bfcl_data.find_results(tmp_path)


CALL = {"f": '{"b": "x"}'}


@pytest.mark.parametrize(
    ("category", "result", "read"),
    [
        ("simple", "x", "x"),
        ("simple", None, None),
        ("simple", [], []),
        ("simple", [CALL, {"g": "no JSON"}], [CALL, {"g": "no JSON"}]),
        ("simple", [{"f": {"b": "x"}}], [CALL]),
        ("multi_turn_base", "Error", "Error"),
        ("multi_turn_base", [[[CALL], "x"], [], [None]], [[[CALL], "x"], [], [None]]),
        ("multi_turn_base", [[[{"f": {"b": "x"}}]]], [[[CALL]]]),
    ],
)
def test_responses_are_text_or_lists_of_calls(tmp_path: Path, category: str, result: Any, read: Any) -> None:
    path = tmp_path / f"BFCL_v3_{category}_result.json"
    path.write_text(json.dumps({"id": f"{category}_0", "result": result}) + "\n")
    assert bfcl_data.read_results(path, [question(category)]) == {f"{category}_0": read}


@pytest.mark.parametrize(
    ("category", "result", "form"),
    [
        *(("simple", result, "text") for result in (5, {"f": "{}"}, ["f()"], [{}], [CALL, {"f": 1}])),
        ("simple", [{"name": "f", "arguments": {}}], "text"),
        ("simple", [[CALL]], "text"),
        *(("multi_turn_base", result, "turns of steps, each text") for result in ([CALL], ["x"], [[{"f": [1]}]])),
    ],
)
def test_responses_of_another_form_are_named(tmp_path: Path, category: str, result: Any, form: str) -> None:
    path = tmp_path / f"BFCL_v3_{category}_result.json"
    path.write_text(json.dumps({"id": f"{category}_0", "result": result}) + "\n")
    reason = rf'row 1: {category}_0: "result" is neither {form} nor a list of {{name: arguments}}$'
    with pytest.raises(ValueError, match=reason):
        bfcl_data.read_results(path, [question(category)])


def test_of_both_layouts_the_one_asked_for_is_taken(tmp_path: Path) -> None:
    for version in ("v3", "v4"):
        path = bfcl_data.result_file(tmp_path, "java", version)
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    for version in ("v3", "v4"):
        expected = {"java": bfcl_data.result_file(tmp_path, "java", version)}
        assert bfcl_data.find_results(tmp_path, version) == expected


def scores(**changes: Score) -> dict[str, Score]:
    """Every category: the n-th has n right of 20."""
    return {name: Score(n, 20, 20, {}) for n, name in enumerate(CATEGORIES)} | changes


def test_columns_by_hand() -> None:
    # non-live: mean of mean(0, 1, 2), 3, 4, 5, 6; live: mean of 7 … 12; multi-turn: mean of 13 … 16; all of 20.
    columns = bfcl_scores.figures(scores())
    expected = {"non-live": 3.8, "live": 9.5, "multi-turn": 14.5, "relevance": 12, "irrelevance": 8.5}
    expected["overall"] = (3.8 + 9.5 + 14.5) / 3
    assert columns == {name: pytest.approx(value / 20) for name, value in expected.items()}
    # Live goes by the number of questions.
    weighted = bfcl_scores.figures(scores(live_simple=Score(100, 100, 100, {})))
    assert weighted["live"] == pytest.approx((100 + 8 + 9 + 10 + 11 + 12) / 200)


def test_a_category_not_run_or_in_part_withholds_overall() -> None:
    without = {name: score for name, score in scores().items() if name != "java"}
    assert {name for name, value in bfcl_scores.figures(without).items() if value is None} == {"non-live", "overall"}
    partial = bfcl_scores.figures(scores(java=Score(1, 20, 21, {})))
    assert {name for name, value in partial.items() if value is None} == {"overall"}
    assert set(bfcl_scores.figures({}).values()) == {None}


def test_intervals_hold_their_figures_and_shrink() -> None:
    figures = bfcl_scores.figures(scores())
    wide = bfcl_scores.intervals(scores())
    narrow = bfcl_scores.intervals({n: Score(s.correct * 25, 500, 500, {}) for n, s in scores().items()})
    assert wide.columns.keys() == figures.keys()
    for name, (low, high) in wide.columns.items():
        value = figures[name]
        assert value is not None
        assert low < value < high
        assert narrow.columns[name][1] - narrow.columns[name][0] < (high - low) / 2
    assert wide.categories["simple"] == (0.0, 0.0)
    # Ten of twenty: about ± 1.96 · sqrt(1/4/20), on a grid of twentieths.
    assert wide.categories["live_parallel_multiple"] == pytest.approx((0.3, 0.7), abs=0.051)


def test_two_runs_are_compared_question_by_question() -> None:
    now, then = Score(8, 10, 10, {"a": "x", "b": "y"}), Score(7, 10, 10, {"b": "", "c": "", "d": ""})
    comparison = bfcl_scores.paired(now, then)
    assert (comparison.n, comparison.wins, comparison.losses, comparison.difference) == (10, 2, 1, pytest.approx(0.1))
    both = bfcl_scores.paired(*(bfcl_scores.pooled([side, Score(5, 6, 6, {"e": ""})]) for side in (now, then)))
    assert (both.n, both.wins, both.losses) == (16, 2, 1)
    with pytest.raises(ValueError, match="10 questions cannot be compared with 9"):
        bfcl_scores.paired(now, Score(9, 9, 9, {}))


def test_the_edition_says_what_was_scored(tmp_path: Path) -> None:
    data = write_data(tmp_path, "simple")
    edition = bfcl_data.edition(data, ["simple"])
    assert (edition.files, edition.corrected) == ("v3", {})
    assert edition.line() == "questions and possible answers: BFCL v3 files"
    answers = data / "possible_answer" / "BFCL_v3_simple.json"
    answers.write_text(answers.read_text().replace("x", "y"))
    assert bfcl_data.edition(data, ["simple"]).digest != edition.digest
    # The corrections of gorilla #1175 and #1177.
    row = {"id": "live_simple_205-116-13", "question": [[{"role": "user", "content": "q"}]], "function": [TOOL]}
    (data / "questions" / "BFCL_v4_live_simple.json").write_text(json.dumps(row))
    for date, end in (
        ("27", "without the correction of live_simple_205-116-13 (gorilla #1175)"),
        ("29", "with all cor"),
    ):
        answer = {"id": row["id"], "ground_truth": [{"f": {"b": [f"2023-04-{date}"]}}]}
        (data / "possible_answer" / "BFCL_v4_live_simple.json").write_text(json.dumps(answer))
        line = bfcl_data.edition(data, ["simple", "live_simple"]).line()
        assert line.startswith(f"questions and possible answers: BFCL v3 and v4 files, {end}")
    correction = bfcl_data.CORRECTIONS["multi_turn_base_154"]
    assert [correction.is_made([[]] * n) for n in (6, 5)] == [False, True]


def test_the_edition_of_the_published_questions() -> None:
    data = shared_path("data/bfcl_v3")
    edition = bfcl_data.edition(data, ["live_simple", "multi_turn_base"])
    assert edition.corrected == dict.fromkeys(bfcl_data.CORRECTIONS, False)


def test_published_questions_are_all_there() -> None:
    data = shared_path("data/bfcl_v3")
    counts = {name: len(bfcl_data.load_questions(data, name)) for name in CATEGORIES}
    assert sum(counts[name] for name in bfcl_data.LIVE) == 2251
    assert sum(counts[name] for name in bfcl_data.NON_LIVE) == 1390
    assert [counts[name] for name in MULTI_TURN] == [200] * 4
    for name in SINGLE_TURN:
        for asked in bfcl_data.load_questions(data, name):
            assert bfcl_data.first_messages(asked)[0]["role"] == "system"
