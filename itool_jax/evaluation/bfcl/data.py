"""BFCL's files: questions and possible answers in, prompts for a model; its responses, in the leaderboard's layout.

A data folder holds `questions/` and `possible_answer/` with `BFCL_v3_<category>.json`, one question a line, plain or
.gz; the folder `data` of the installed scorer (`itool_jax.evaluation.bfcl.setup`) will do as it is. Categories go by
their names in v3; those of v4 are understood.
"""

import copy
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from itool_jax.data.rows import read_rows
from itool_jax.evaluation.bfcl.checker import expected_calls, language_of
from itool_jax.system.files import place, write_jsonl

Version = Literal["v3", "v4"]
Message = dict[str, str]
Row = dict[str, Any]

TEMPERATURE = 0.001
"""What the leaderboard samples at."""

SIMPLE = ("simple", "java", "javascript")
NON_LIVE = (*SIMPLE, "multiple", "parallel", "parallel_multiple", "irrelevance")
LIVE = (
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
    *("live_irrelevance", "live_relevance"),
)
SINGLE_TURN = NON_LIVE + LIVE
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
CATEGORIES = SINGLE_TURN + MULTI_TURN
GROUPS = {
    "all": CATEGORIES,
    "single_turn": SINGLE_TURN,
    "non_live": NON_LIVE,
    "live": LIVE,
    "multi_turn": MULTI_TURN,
}
_V4_NAMES = {"simple": "simple_python", "java": "simple_java", "javascript": "simple_javascript"}
_V3_NAMES = {new: old for old, new in _V4_NAMES.items()}
_RESULT_FILE = re.compile(r"BFCL_v[34]_(\w+)_result\.json(?:\.gz)?")

# The leaderboard's prompt (Apache-2.0, https://github.com/ShishirPatil/gorilla), word for word: with another one,
# scores could not be compared.
_SYSTEM_PROMPT = """\
You are an expert in composing functions. You are given a question and a set of possible functions. Based on the \
question, you will need to make one or more function/tool calls to achieve the purpose.
If none of the functions can be used, point it out. If the given question lacks the parameters required by the \
function, also point it out.
You should only return the function calls in your response.

If you decide to invoke any of the function(s), you MUST put it in the format of [func_name1(params_name1=\
params_value1, params_name2=params_value2...), func_name2(params)]
You SHOULD NOT include any other text in the response.

At each turn, you should try your best to complete the tasks requested by the user within the current turn. Continue \
to output functions to call until you have fulfilled the user's request to the best of your ability. Once you have no \
more functions to call, the system will consider the current turn complete and proceed to the next turn or task.

Here is a list of functions in JSON format that you can invoke.
{functions}

"""
MORE_FUNCTIONS = "{functions}\nI have updated some more functions you can choose from. What about now?"
"""The user's turn that brings the functions missing so far."""
_HINTS = {"Python": "Python 3", "Java": "Java 8 SDK", "JavaScript": "JavaScript"}


class Question(NamedTuple):
    """A question of BFCL: what is asked turn by turn, what may be called, and what is right."""

    id: str
    category: str
    turns: Sequence[Sequence[Message]]
    functions: Sequence[Mapping[str, Any]]
    """As documented; those of multi-turn questions come with the simulators."""
    answer: Sequence[Any]
    """Possible answers; empty where no call, or any, is right."""
    row: Row
    """All fields as published."""


def select(names: Sequence[str]) -> tuple[str, ...]:
    """The categories that names of categories (v3 or v4) and groups stand for, in order. ValueError for an unknown."""
    chosen: set[str] = set()
    for name in names:
        name = _V3_NAMES.get(name, name)
        if name not in (*GROUPS, *CATEGORIES):
            known = ", ".join((*GROUPS, *CATEGORIES))
            raise ValueError(f"category {name!r} is none of BFCL's: {known}")
        chosen |= set(GROUPS.get(name, (name,)))
    return tuple(category for category in CATEGORIES if category in chosen)


def question_file(folder: Path, category: str) -> Path:
    """The file of a category's questions, plain or .gz. Raises ValueError where there is none."""
    return _find(folder, "questions", category)


def load_questions(folder: Path, category: str) -> list[Question]:
    """The questions of a category, in the order of the file. Raises ValueError, naming file and row, for wrong ones."""
    file = question_file(folder, category)
    answers: dict[str, list[Any]] = {}
    if "relevance" not in category:
        answer_file = _find(folder, "possible_answer", category)
        for number, row in read_rows(answer_file):
            name = _field(row, "id", answer_file, number, str)
            answers[name] = _field(row, "ground_truth", answer_file, number, list)
    found = []
    for number, row in read_rows(file):
        question_id = _field(row, "id", file, number, str)
        if "relevance" not in category and question_id not in answers:
            raise ValueError(f"{place(file, number)}: no possible answer to {question_id}")
        answer = answers.get(question_id, [])
        turns = _field(row, "question", file, number, list)
        functions = [] if category in MULTI_TURN else _field(row, "function", file, number, list)
        for name, kind in (("initial_config", dict), ("involved_classes", list)) if category in MULTI_TURN else ():
            _field(row, name, file, number, kind)
        question = Question(question_id, category, turns, functions, answer, row)
        if problem := _wrong_form(question):
            raise ValueError(f"{place(file, number)}: {question_id}: {problem}")
        found.append(question)
    return found


def _wrong_form(question: Question) -> str | None:
    """What is wrong with a question's messages, functions and answers; None where nothing is."""
    if not question.turns or not all(
        isinstance(turn, list) and all(_is_message(message) for message in turn) for turn in question.turns
    ):
        return '"question" is no list of turns, each a list of messages'
    if question.category in MULTI_TURN:
        turns_are_lists = all(isinstance(turn, list) for turn in question.answer)
        return None if turns_are_lists else "the possible answer is no list of turns, each a list of calls"
    if not all(isinstance(function, dict) for function in question.functions):
        return '"function" is no list of objects'
    try:
        if "relevance" not in question.category:
            expected_calls(question.functions, question.answer, language_of(question.category))
        first_messages(question)
    except ValueError as error:
        return str(error)
    except (TypeError, KeyError, AttributeError) as error:
        return f"no prompt can be made of it ({error!r})"
    return None


def _field(row: Row, name: str, file: Path, number: int, kind: type = object) -> Any:
    if name not in row:
        raise ValueError(f'{place(file, number)}: no "{name}"')
    if not isinstance(row[name], kind):
        raise ValueError(f'{place(file, number)}: "{name}" is no {_KINDS[kind]}')
    return row[name]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


_KINDS = {str: "text", list: "list", dict: "object"}


def _find(folder: Path, part: str, category: str) -> Path:
    """The file of a category's questions or answers."""
    folders = [folder / part] if part == "possible_answer" else [folder / part, folder]
    names = (f"BFCL_v3_{category}.json", f"BFCL_v4_{_V4_NAMES.get(category, category)}.json")
    for path in (where / (name + ending) for where in folders for name in names for ending in ("", ".gz")):
        if path.is_file():
            return path
    raise ValueError(
        f"{folders[0]} holds no {names[0]}, plain or .gz; --data is a folder with questions/ and possible_answer/"
    )


def first_messages(question: Question) -> list[Message]:
    """The conversation a model is asked to go on with first: the leaderboard's system prompt, then the first turn."""
    return with_system_prompt(question.turns[0], shown_functions(question.functions, question.category))


def with_system_prompt(messages: Sequence[Message], functions: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages after the system prompt that lists the functions; a system prompt of their own is appended to it."""
    prompt = _SYSTEM_PROMPT.format(functions=functions)
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{prompt}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": prompt}, *messages]


def shown_functions(functions: Iterable[Mapping[str, Any]], category: str) -> list[dict[str, Any]]:
    """Documentation as models see it: with the language, and types other than Python's as part of the descriptions."""
    language = "Python" if category in MULTI_TURN else language_of(category)
    shown = copy.deepcopy([dict(function) for function in functions])
    for function in shown:
        function["description"] += f" Note that the provided function is in {_HINTS[language]} syntax."
        for parameter in function["parameters"]["properties"].values() if language != "Python" else ():
            _as_text(parameter, language)
    return shown


def _as_text(parameter: dict[str, Any], language: str) -> None:
    """Documents a parameter as a string that holds code."""
    kind = parameter["type"]
    if kind == "any":
        parameter["description"] += f" This parameter can be of any type of {language} object in string representation."
    else:
        parameter["description"] += f" This is {language} {kind} type parameter in string representation."
    if kind in ("ArrayList", "Array", "array"):
        item = parameter.pop("items")["type"]
        parameter["description"] += f" The list elements are of type {item}; they are not in string representation."
    if language == "JavaScript" and kind == "dict" and "properties" in parameter:
        schema = json.dumps(parameter.pop("properties"))
        parameter["description"] += (
            f" The dictionary entries have the following schema; they are not in string representation. {schema}"
        )
    parameter["type"] = "string"


def result_file(folder: Path, category: str, version: Version) -> Path:
    """Where the leaderboard's scorer looks for a model's responses, in the model's folder."""
    if version == "v3":
        return folder / f"BFCL_v3_{category}_result.json"
    group = next(name for name in ("non_live", "live", "multi_turn") if category in GROUPS[name])
    return folder / group / f"BFCL_v4_{_V4_NAMES.get(category, category)}_result.json"


def write_results(folder: Path, category: str, results: Mapping[str, Any], version: Version) -> Path:
    """Writes responses by question id, and returns the file; a response is text, or turns of steps of text."""
    path = result_file(folder, category, version)
    write_jsonl(path, ({"id": name, "result": result} for name, result in results.items()))
    return path


def find_results(folder: Path, layout: Version = "v3") -> dict[str, Path]:
    """The result files in one model's folder, below it too, by category; of one category in both layouts `layout`'s.

    Raises ValueError for none, for the folders of several models, and for two files of a category in one layout.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("BFCL_v*_result.json*")):
        match = _RESULT_FILE.fullmatch(path.name)
        category = _V3_NAMES.get(match[1], match[1]) if match else None
        if category in CATEGORIES:
            found.setdefault(category, []).append(path)
    if not found:
        raise ValueError(f"{folder} holds no BFCL_v3_<category>_result.json")
    models = sorted({_model_folder(path, folder) for paths in found.values() for path in paths})
    if len(models) > 1:
        names = ", ".join(str(model.relative_to(folder)) for model in models)
        raise ValueError(f"{folder} holds the results of several models: {names}; --results is one model's folder")
    files = {}
    for category, paths in found.items():
        chosen = [path for path in paths if path.name.startswith(f"BFCL_{layout}_")] or paths
        if len(chosen) > 1:
            raise ValueError(f"{chosen[0]} and {chosen[1]} are both of {category}; --results is one model's folder")
        files[category] = chosen[0]
    return {category: files[category] for category in CATEGORIES if category in files}


def _model_folder(path: Path, top: Path) -> Path:
    """The folder of a model that a result file is of; the layout of v4 has folders by group in it."""
    grouped = path.parent.name in ("non_live", "live", "multi_turn") and path.parent != top
    return path.parent.parent if grouped else path.parent


def read_results(path: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """Responses by question id. ValueError names a row without id or result, repeated, or of an unknown question."""
    known = {question.id for question in questions}
    results: dict[str, Any] = {}
    for number, row in read_rows(path):
        question_id = _field(row, "id", path, number, str)
        if question_id not in known or question_id in results:
            problem = "is given twice" if question_id in results else "is none of the category's questions"
            raise ValueError(f"{place(path, number)}: {question_id!r} {problem}")
        results[question_id] = _field(row, "result", path, number)
    if not results:
        raise ValueError(f"{path} holds no responses")
    return results
