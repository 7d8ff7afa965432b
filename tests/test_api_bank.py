"""API-Bank: the official reading of calls, by hand and on cases with official verdicts."""

import gzip
import json
from pathlib import Path

import pytest

from itool_jax.evaluation import api_bank
from itool_jax.text.calls import Call
from itool_jax.text.tool_formats import TAGGED
from tests.conftest import shared_path

ANSWER = Call("Book", {"name": "A B", "count": "2"})


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[Book(name='A B', count='2')]", None),
        ('API-Request: [Book(count = "2", name = "A B")] Done.', None),
        ("[Book(name='A B', count=2)]", None),
        ("[Book(name='A B', count='2')] [Book(name='A B', count='2')]", None),
        ("Book(name='A B', count='2')", "NO_API_CALL"),
        ("", "NO_API_CALL"),
        (None, "NO_API_CALL"),
        ("[book(name='A B', count='2')]", "API_NAME_MISMATCH"),
        ("[Book(name='A B')]", "MISS_INPUT_ARGUMENT"),
        ("[Book('A B', '2')]", "MISS_INPUT_ARGUMENT"),
        ("[Book(name='A B', count='2', x='1')]", "INVALID_INPUT_PARAMETER"),
        ("[Book(name='A b', count='2')]", "INPUT_MISMATCH"),
        ("[Book(name='A B', count='2 ')]", "INPUT_MISMATCH"),
        ("[f(" * 9000, "NO_API_CALL"),
    ],
)
def test_calls_by_hand(text: str | None, error: str | None) -> None:
    assert api_bank.check(text, ANSWER) == (error is None, error)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('<tool_call>\n{"name": "Book", "arguments": {"name": "A B", "count": 2}}\n</tool_call>', None),
        ('<tool_call>\n{"name": "Book", "arguments": {"name": "[A(B)]"}}\n</tool_call>', "MISS_INPUT_ARGUMENT"),
        ("[Book(name='A B', count='2')]", None),
        ("no", "NO_API_CALL"),
        (None, "NO_API_CALL"),
    ],
)
def test_calls_in_the_models_own_form_count_as_well(text: str | None, error: str | None) -> None:
    assert api_bank.check(text, ANSWER, TAGGED.read) == (error is None, error)
    question = api_bank.Question("q", (), ANSWER)
    assert api_bank.judge([question], {"q": text}, TAGGED.read)["q"].error_type == error
    if text and "<tool_call>" in text:
        assert not api_bank.check(text, ANSWER).valid


def test_the_official_verdicts_on_cases() -> None:
    with gzip.open(shared_path("data/api_bank/checker_cases_dev.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line in file]
    different = [
        row["id"]
        for row in rows
        if api_bank.check(
            row["model_output"], Call(row["ground_truth"]["api_name"], row["ground_truth"]["param_dict"])
        ).valid
        != row["verdict"]
    ]
    # Executing it refuses one published answer itself.
    assert len(different) == 1
    assert len(rows) == 133


def test_published_tests_and_how_many_of_their_answers_can_be_given() -> None:
    folder = shared_path("data/api_bank")
    by_level = {name: api_bank.load_questions(folder, name) for name in api_bank.CATEGORIES}
    assert {name: len(asked) for name, asked in by_level.items()} == {
        **{"level_1": 399, "level_2": 135, "level_2_without_search": 90}
    }
    with gzip.open(folder / "level-1-api.json.gz", "rt") as file:
        given = {q.id: row["expected_output"] for q, row in zip(by_level["level_1"], json.load(file), strict=True)}
    assert sum(verdict.valid for verdict in api_bank.judge(by_level["level_1"], given).values()) == 368
    for asked in by_level.values():
        assert len({question.id for question in asked}) == len(asked)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contains no level-1-api\.json"):
        api_bank.load_questions(tmp_path, "level_1")
    (tmp_path / "level-1-api.json").write_text('[{"file": "f", "id": 0, "input": "", "instruction": ""}]')
    with pytest.raises(ValueError, match=r"level-1-api\.json row 1: not a test of API-Bank \(KeyError"):
        api_bank.load_questions(tmp_path, "level_1")
