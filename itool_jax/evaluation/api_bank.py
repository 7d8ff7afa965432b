"""API-Bank, levels 1 and 2: makes prompts for a model and judges its call without executing it.

In: the published test files. Out: verdicts. The official evaluator executes each call on its own database and compares
the results API by API; here the name and all arguments must match as text. `docs/evaluation.md` says where the two
differ and on how many cases they agree.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from itool_jax.data.rows import read_rows
from itool_jax.evaluation.bfcl.checker import Verdict
from itool_jax.system.files import place
from itool_jax.text.calls import Call

CATEGORIES = ("level_1", "level_2", "level_2_without_search")
"""Level 2 is scored twice: as a whole, and without the calls of ToolSearcher, whose keywords are free text."""
SEARCH = "ToolSearcher"
MAX_CHARACTERS = 20_000
"""A longer response is treated as having no call, because the pattern takes quadratic time."""

_FILES = {"level_1": "level-1-api.json", "level_2": "level-2-api.json", "level_2_without_search": "level-2-api.json"}
_CALL = re.compile(r"\[(\w+)\((.*)\)\]")
_ARGUMENT = re.compile(r"""\b(\w+)\s*=\s*(?:['"](.+?)['"]|(\[.*\])|(\w+))""")
# The published answers nest quotes: a value ends at the quote before the next argument or the end of the text.
_WHOLE_ARGUMENT = re.compile(r"""\b(\w+)\s*=\s*(?:['"](.*?)['"](?=\s*(?:,\s*\w+\s*=|$))|([^'",\s][^,]*))""")


class Question(NamedTuple):
    """A dialogue whose next turn is a call."""

    id: str
    messages: tuple[dict[str, str], ...]
    answer: Call


def read_call(text: Any, argument: re.Pattern[str] = _ARGUMENT) -> Call | None:
    """Returns the call `[ApiName(key='value')]` found anywhere in a response, its values as text, or None without one.

    As in the official evaluator, a quoted value ends at the next quote of either kind, so some published answers cannot
    be given.
    """
    match = _CALL.search(text) if isinstance(text, str) and len(text) <= MAX_CHARACTERS else None
    if match is None:
        return None
    values = {m[1]: next(value for value in m.groups()[1:] if value is not None) for m in argument.finditer(match[2])}
    return Call(match[1], values)


def check(model_output: Any, answer: Call, read: Callable[[str], list[Call] | None] | None = None) -> Verdict:
    """Checks that the response's call has the name and the arguments of `answer`. No text raises an error.

    `read` reads calls in the model's own form; the first of them counts, and the official form where there is none.

    Error types are the official evaluator's, as far as they can be determined without executing the call.
    """
    own = read(model_output) if read and isinstance(model_output, str) else None
    call = own[0] if own else read_call(model_output)
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
    """Returns the file with a category's tests, plain or .gz. Raises ValueError if there is none."""
    for path in (folder / f"{_FILES[category]}{ending}" for ending in ("", ".gz")):
        if path.is_file():
            return path
    raise ValueError(f"{folder} contains no {_FILES[category]}, plain or .gz")


def load_questions(folder: Path, category: str) -> list[Question]:
    """Loads the tests of a category from a folder with `level-1-api.json` and `level-2-api.json`, plain or .gz.

    Raises ValueError for a missing file, and for a row of another form, naming file and row.
    """
    path = question_file(folder, category)
    questions = []
    for number, row in read_rows(path):
        try:
            question = _question(row)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{place(path, number)}: not a test of API-Bank ({error!r})") from None
        if question.answer.name != SEARCH or category != "level_2_without_search":
            questions.append(question)
    return questions


def _question(row: Mapping[str, Any]) -> Question:
    answer = read_call(row["expected_output"], _WHOLE_ARGUMENT)
    if answer is None:
        raise KeyError("expected_output contains no call")
    if not all(isinstance(row[key], str) for key in ("instruction", "input")):
        raise TypeError("instruction and input must be strings")
    messages = ({"role": "system", "content": row["instruction"]}, {"role": "user", "content": row["input"]})
    return Question(f"{row['file']}/{row['id']}", messages, answer)


def judge(
    questions: Sequence[Question],
    results: Mapping[str, Any],
    read: Callable[[str], list[Call] | None] | None = None,
) -> dict[str, Verdict]:
    """Returns the verdict on each response, by question id; `read` as for `check`."""
    return {q.id: check(results[q.id], q.answer, read) for q in questions if q.id in results}
