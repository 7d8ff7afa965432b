"""API-Bank, levels 1 and 2: prompts for a model, and whether its call is the right one, without executing it.

In: the published test files. Out: verdicts. The official evaluator executes a call on a database of its own and
compares what comes back API by API; here the name and all arguments must be the same text. `docs/evaluation.md` tells
where the two differ, and on how many cases they agree.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from itool_jax.data.rows import read_rows
from itool_jax.evaluation.bfcl.checker import Verdict
from itool_jax.system.files import place
from itool_jax.text.calls import Call

CATEGORIES = ("level_1", "level_2", "level_2_without_search")
"""Level 2 as a whole, and without the calls of ToolSearcher, whose keywords are free text."""
SEARCH = "ToolSearcher"
MAX_CHARACTERS = 20_000
"""A longer response holds no call: its pattern takes quadratic time."""

_FILES = {"level_1": "level-1-api.json", "level_2": "level-2-api.json", "level_2_without_search": "level-2-api.json"}
_CALL = re.compile(r"\[(\w+)\((.*)\)\]")
_ARGUMENT = re.compile(r"""\b(\w+)\s*=\s*(?:['"](.+?)['"]|(\[.*\])|(\w+))""")
# The published answers nest quotes: a value ends at the quote that a comma, a bracket or the end follows.
_WHOLE_ARGUMENT = re.compile(r"""\b(\w+)\s*=\s*(?:['"](.*?)['"](?=\s*(?:,\s*\w+\s*=|$))|([^'",\s][^,]*))""")


class Question(NamedTuple):
    """A dialogue whose next turn is a call."""

    id: str
    messages: tuple[dict[str, str], ...]
    answer: Call


def read_call(text: Any, argument: re.Pattern[str] = _ARGUMENT) -> Call | None:
    """The call in a response, `[ApiName(key='value')]` anywhere in it, its values as text; None without one.

    As the official evaluator reads it, a quoted value ends at the next quote of either kind, so that some published
    answers cannot be given.
    """
    found = _CALL.search(text) if isinstance(text, str) and len(text) <= MAX_CHARACTERS else None
    if found is None:
        return None
    values = {m[1]: next(value for value in m.groups()[1:] if value is not None) for m in argument.finditer(found[2])}
    return Call(found[1], values)


def check(model_output: Any, answer: Call) -> Verdict:
    """Whether the response's call has the name and the arguments of `answer`; no text raises.

    Error types are those of the official evaluator that can be told without executing.
    """
    call = read_call(model_output)
    if call is None:
        return Verdict(False, "NO_API_CALL")
    if call.name != answer.name:
        return Verdict(False, "API_NAME_MISMATCH")
    if answer.arguments.keys() - call.arguments.keys():
        return Verdict(False, "MISS_INPUT_ARGUMENT")
    if call.arguments.keys() - answer.arguments.keys():
        return Verdict(False, "INVALID_INPUT_PARAMETER")
    wrong = any(str(call.arguments[name]) != str(value) for name, value in answer.arguments.items())
    return Verdict(False, "INPUT_MISMATCH") if wrong else Verdict(True, None)


def question_file(folder: Path, category: str) -> Path:
    """The file of a category's tests, plain or .gz. Raises ValueError where there is none."""
    for path in (folder / f"{_FILES[category]}{ending}" for ending in ("", ".gz")):
        if path.is_file():
            return path
    raise ValueError(f"{folder} holds no {_FILES[category]}, plain or .gz")


def load_questions(folder: Path, category: str) -> list[Question]:
    """The tests of a category from a folder with `level-1-api.json` and `level-2-api.json`, plain or .gz.

    Raises ValueError, naming file and row, for a missing file and for a row of another form.
    """
    path = question_file(folder, category)
    found = []
    for number, row in read_rows(path):
        try:
            question = _question(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{place(path, number)}: not a test of API-Bank ({error!r})") from None
        if question.answer.name != SEARCH or category != "level_2_without_search":
            found.append(question)
    return found


def _question(row: Mapping[str, Any]) -> Question:
    answer = read_call(row["expected_output"], _WHOLE_ARGUMENT)
    if answer is None:
        raise KeyError("expected_output holds no call")
    if not all(isinstance(row[key], str) for key in ("instruction", "input")):
        raise TypeError("instruction and input must be texts")
    messages = ({"role": "system", "content": row["instruction"]}, {"role": "user", "content": row["input"]})
    return Question(f"{row['file']}/{row['id']}", messages, answer)


def judge(questions: Sequence[Question], results: Mapping[str, Any]) -> dict[str, Verdict]:
    """The verdict on each response, by question id."""
    return {q.id: check(results[q.id], q.answer) for q in questions if q.id in results}
