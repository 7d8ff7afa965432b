"""BFCL's files: reads questions and answers, makes prompts, reads and writes responses in the leaderboard's layout.

A data folder holds `questions/` and `possible_answer/` with `BFCL_v3_<category>.json`, one question per line, plain or
.gz. The folder `data` of the installed scorer (`itool_jax.evaluation.bfcl.setup`) works as it is. Categories have their
v3 names; v4 names are accepted.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from itool_jax.data.rows import read_rows
from itool_jax.evaluation.bfcl.checker import expected_calls, language_of
from itool_jax.system.files import place, write_jsonl
from itool_jax.text.calls import Call
from itool_jax.text.sample import Row

Version = Literal["v3", "v4"]
Message = dict[str, Any]
Response = str | list[dict[str, str]]
"""Text, or the calls of a function-calling model: `{name: arguments}`, the arguments as JSON text."""

TEMPERATURE = 0.001
"""Sampling temperature of the leaderboard."""

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

# The leaderboard's prompt (Apache-2.0, https://github.com/ShishirPatil/gorilla), word for word; scores under another
# prompt would not be comparable.
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
MORE_FUNCTIONS = "I have updated some more functions you can choose from. What about now?"
"""User turn that adds functions that were missing so far."""
_HINTS = {"Python": "Python 3", "Java": "Java 8 SDK", "JavaScript": "JavaScript"}
_JSON_TYPES = {
    **{kind: kind for kind in ("integer", "number", "string", "boolean", "array", "object")},
    **dict.fromkeys(("byte", "short", "long", "Bigint"), "integer"),
    **dict.fromkeys(("float", "double"), "number"),
    **dict.fromkeys(("list", "tuple", "ArrayList", "Array", "Queue", "Stack"), "array"),
    **dict.fromkeys(("dict", "HashMap", "Hashtable"), "object"),
    "bool": "boolean",
}
"""JSON schema types by the types in BFCL's documentation; all others are strings."""


class Question(NamedTuple):
    """A BFCL question: user turns, available functions and possible answers."""

    id: str
    category: str
    turns: Sequence[Sequence[Message]]
    functions: Sequence[Mapping[str, Any]]
    """Documented functions; empty for multi-turn, whose functions come with the simulators."""
    answer: Sequence[Any]
    """Possible answers; empty if no call, or any call, is right."""
    row: Row
    """All published fields."""


def select(names: Sequence[str]) -> tuple[str, ...]:
    """Expands names of categories (v3 or v4) and groups, in order. Raises ValueError for an unknown name."""
    chosen: set[str] = set()
    for name in names:
        name = _V3_NAMES.get(name, name)
        if name not in (*GROUPS, *CATEGORIES):
            known = ", ".join((*GROUPS, *CATEGORIES))
            raise ValueError(f"unknown BFCL category {name!r}; choose from: {known}")
        chosen |= set(GROUPS.get(name, (name,)))
    return tuple(category for category in CATEGORIES if category in chosen)


def question_file(folder: Path, category: str) -> Path:
    """Returns the file of a category's questions, plain or .gz. Raises ValueError if there is none."""
    return _find(folder, "questions", category)


def load_questions(folder: Path, category: str) -> list[Question]:
    """Loads the questions of a category, in file order. Raises ValueError for an invalid one, naming file and row."""
    file = question_file(folder, category)
    answers: dict[str, list[Any]] = {}
    if "relevance" not in category:
        answer_file = _find(folder, "possible_answer", category)
        for number, row in read_rows(answer_file):
            name = _field(row, "id", answer_file, number, str)
            answers[name] = _field(row, "ground_truth", answer_file, number, list)
    questions = []
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
        questions.append(question)
    return questions


class Edition(NamedTuple):
    """Which questions and possible answers were scored."""

    files: str
    """v3 or v4, as in the names of the files."""
    digest: dict[str, str]
    """Hash of each category's questions and possible answers."""
    corrected: dict[str, bool]
    """By id, whether a possible answer that was once wrong has its correction."""

    def line(self) -> str:
        """Returns one line for the reader of a score."""
        late = [f"{name} (gorilla {CORRECTIONS[name].change})" for name, done in self.corrected.items() if not done]
        state = "without the correction of " + ", ".join(late) if late else "with all corrections known here"
        checked = f", {state}" if self.corrected else ""
        return f"questions and possible answers: BFCL {self.files} files{checked}"


class Correction(NamedTuple):
    """A possible answer that the leaderboard corrected after v4 came out; it changes scores."""

    category: str
    change: str
    is_made: Callable[[Sequence[Any]], bool]


CORRECTIONS = {
    "live_simple_205-116-13": Correction("live_simple", "#1175", lambda answer: "2023-04-29" in str(answer)),
    "multi_turn_base_154": Correction("multi_turn_base", "#1177", lambda answer: len(answer) == 5),
}
"""https://github.com/ShishirPatil/gorilla/blob/main/berkeley-function-call-leaderboard/CHANGELOG.md"""


def edition(folder: Path, categories: Iterable[str]) -> Edition:
    """Returns which edition of these categories a data folder holds."""
    files, digest, corrected = set[str](), dict[str, str](), dict[str, bool]()
    for category in categories:
        questions = load_questions(folder, category)
        files.add(question_file(folder, category).name.split("_")[1])
        content = json.dumps([(q.row, q.answer) for q in questions], sort_keys=True)
        digest[category] = hashlib.sha256(content.encode()).hexdigest()[:16]
        for question in questions:
            correction = CORRECTIONS.get(question.id)
            if correction is not None and correction.category == category:
                corrected[question.id] = correction.is_made(question.answer)
    return Edition(" and ".join(sorted(files)), digest, corrected)


def _wrong_form(question: Question) -> str | None:
    """Describes what is wrong with a question's messages, functions or answers; None if nothing is."""
    if not question.turns or not all(
        isinstance(turn, list) and all(_is_message(message) for message in turn) for turn in question.turns
    ):
        return '"question" is not a list of turns, each a list of messages'
    if question.category in MULTI_TURN:
        turns_are_lists = all(isinstance(turn, list) for turn in question.answer)
        return None if turns_are_lists else "the possible answer is not a list of turns, each a list of calls"
    if not all(isinstance(function, dict) for function in question.functions):
        return '"function" is not a list of objects'
    try:
        if "relevance" not in question.category:
            expected_calls(question.functions, question.answer, language_of(question.category))
        first_messages(question)
        first_tools(question)
    except ValueError as error:
        return str(error)
    except (TypeError, KeyError, AttributeError) as error:
        return f"cannot build a prompt from it ({error!r})"
    return None


def _field(row: Row, name: str, file: Path, number: int, kind: type = object) -> Any:
    if name not in row:
        raise ValueError(f'{place(file, number)}: no "{name}"')
    if not isinstance(row[name], kind):
        raise ValueError(f'{place(file, number)}: "{name}" is not {_KINDS[kind]}')
    return row[name]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


_KINDS = {str: "a string", list: "a list", dict: "an object"}


def _find(folder: Path, part: str, category: str) -> Path:
    """Returns the file of a category's questions or answers. Raises ValueError if there is none."""
    folders = [folder / part] if part == "possible_answer" else [folder / part, folder]
    names = (f"BFCL_v3_{category}.json", f"BFCL_v4_{_V4_NAMES.get(category, category)}.json")
    for path in (where / (name + ending) for where in folders for name in names for ending in ("", ".gz")):
        if path.is_file():
            return path
    raise ValueError(
        f"{folders[0]} contains no {names[0]}, plain or .gz; --evaluate.benchmark_data, or --data, "
        "must be a folder with questions/ and possible_answer/"
    )


def first_tools(question: Question) -> list[dict[str, Any]]:
    """Returns the functions as the template of a function-calling model lists them; its messages are the first turn."""
    return as_tools(shown_functions(question.functions, question.category))


def first_messages(question: Question) -> list[Message]:
    """Returns the first prompt as messages: the leaderboard's system prompt, then the first turn."""
    return with_system_prompt(question.turns[0], shown_functions(question.functions, question.category))


def with_system_prompt(messages: Sequence[Message], functions: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Prepends the system prompt that lists the functions; a system prompt in `messages` is appended to it."""
    prompt = _SYSTEM_PROMPT.format(functions=functions)
    if messages and messages[0]["role"] == "system":
        return [{"role": "system", "content": f"{prompt}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": prompt}, *messages]


def shown_functions(functions: Iterable[Mapping[str, Any]], category: str) -> list[dict[str, Any]]:
    """Returns the documentation shown to models: descriptions name the language and hold types other than Python's."""
    language = "Python" if category in MULTI_TURN else language_of(category)
    shown = copy.deepcopy([dict(function) for function in functions])
    for function in shown:
        function["description"] += f" Note that the provided function is in {_HINTS[language]} syntax."
        for parameter in function["parameters"]["properties"].values() if language != "Python" else ():
            _as_text(parameter, language)
    return shown


def as_tools(functions: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Converts the documentation shown to models to OpenAI's tools, as the leaderboard does for such interfaces.

    Names have `_` for every dot, and types are those of JSON schemas.
    """
    tools = copy.deepcopy([dict(function) for function in functions])
    for tool in tools:
        tool["name"] = tool["name"].replace(".", "_")
        schema = tool.setdefault("parameters", {})
        schema["type"] = "object"
        _to_json_types(schema.setdefault("properties", {}))
    return [{"type": "function", "function": tool} for tool in tools]


def _to_json_types(properties: Mapping[str, Any]) -> None:
    """Rewrites the types of parameters, in place, as deep as the leaderboard does."""
    for schema in properties.values():
        if schema.get("type") == "float":
            schema["format"] = "float"
            schema["description"] = schema.get("description", "") + " This is a float type value."
        match _to_json_type(schema):
            case {"type": "array" | "object", "properties": inner}:
                _to_json_types(inner)
            case {"type": "array" | "object", "items": items}:
                match _to_json_type(items):
                    case {"type": "array", "items": inner}:
                        _to_json_type(inner)
                    case {"type": "object", "properties": inner}:
                        _to_json_types(inner)


def _to_json_type(schema: dict[str, Any]) -> dict[str, Any]:
    schema["type"] = _JSON_TYPES.get(str(schema.get("type")), "string")
    return schema


def _as_text(parameter: dict[str, Any], language: str) -> None:
    """Rewrites a parameter's documentation, in place, as a string that holds code."""
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
    """Returns the path in a model's folder where the leaderboard's scorer looks for responses."""
    if version == "v3":
        return folder / f"BFCL_v3_{category}_result.json"
    group = next(name for name in ("non_live", "live", "multi_turn") if category in GROUPS[name])
    return folder / group / f"BFCL_v4_{_V4_NAMES.get(category, category)}_result.json"


def write_results(folder: Path, category: str, results: Mapping[str, Any], version: Version) -> Path:
    """Writes responses by question id and returns the path.

    A response is text or calls, as `written_response` returns them, or for multi-turn turns of steps of such.
    """
    path = result_file(folder, category, version)
    write_jsonl(path, ({"id": name, "result": result} for name, result in results.items()))
    return path


def written_response(text: str, calls: Sequence[Call] | None) -> Response:
    """Returns a function-calling model's response as in the leaderboard's files: its calls, or text without any."""
    return text if calls is None else [{name: json.dumps(arguments)} for name, arguments in calls]


def is_function_calling(result: Any, category: str) -> bool:
    """Returns True if a response to a question of the category holds calls in the form of function-calling models.

    An empty list is such a response too; text can come from any model.
    """
    turns = result if category in MULTI_TURN and isinstance(result, list) else [[result]]
    return any(isinstance(step, list) for turn in turns if isinstance(turn, list) for step in turn)


def find_results(folder: Path, layout: Version = "v3") -> dict[str, Path]:
    """Finds one model's result files, at any depth in its folder, by category; `layout` wins if both layouts are there.

    Raises ValueError if there are none, for folders of several models, and for two files of a category in one layout.
    """
    by_category: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("BFCL_v*_result.json*")):
        match = _RESULT_FILE.fullmatch(path.name)
        category = _V3_NAMES.get(match[1], match[1]) if match else None
        if category in CATEGORIES:
            by_category.setdefault(category, []).append(path)
    if not by_category:
        raise ValueError(f"{folder} contains no BFCL_v3_<category>_result.json")
    models = sorted({_model_folder(path, folder) for paths in by_category.values() for path in paths})
    if len(models) > 1:
        names = ", ".join(str(model.relative_to(folder)) for model in models)
        raise ValueError(f"{folder} contains results of several models: {names}; --results must be one model's folder")
    files = {}
    for category, paths in by_category.items():
        chosen = [path for path in paths if path.name.startswith(f"BFCL_{layout}_")] or paths
        if len(chosen) > 1:
            raise ValueError(
                f"{chosen[0]} and {chosen[1]} are both results for {category}; --results must be one model's folder"
            )
        files[category] = chosen[0]
    return {category: files[category] for category in CATEGORIES if category in files}


def _model_folder(path: Path, top: Path) -> Path:
    """Returns the model folder of a result file; in the v4 layout it has a subfolder per group."""
    grouped = path.parent.name in ("non_live", "live", "multi_turn") and path.parent != top
    return path.parent.parent if grouped else path.parent


def read_results(path: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """Reads responses by question id; arguments of calls that are objects are written as JSON text.

    Raises ValueError for a row without id or result, or with a result of another form, a repeated or unknown id, or a
    file without responses.
    """
    known = {question.id: question.category in MULTI_TURN for question in questions}
    results: dict[str, Any] = {}
    for number, row in read_rows(path):
        question_id = _field(row, "id", path, number, str)
        if question_id not in known or question_id in results:
            problem = "appears twice" if question_id in results else "is not a question of this category"
            raise ValueError(f"{place(path, number)}: {question_id!r} {problem}")
        result, multi_turn = _field(row, "result", path, number), known[question_id]
        try:
            results[question_id] = _turns(result) if multi_turn and isinstance(result, list) else _response(result)
        except TypeError:
            form = "turns of steps, each text" if multi_turn else "text"
            problem = f'"result" is neither {form} nor a list of {{name: arguments}}'
            raise ValueError(f"{place(path, number)}: {question_id}: {problem}") from None
    if not results:
        raise ValueError(f"{path} contains no responses")
    return results


def _turns(turns: list[Any]) -> list[list[Response | None]]:
    if not all(isinstance(turn, list) for turn in turns):
        raise TypeError
    return [[_response(step) for step in turn] for turn in turns]


def _response(result: Any) -> Response | None:
    """Returns a response with its arguments as JSON text; TypeError if it has another form."""
    if result is None or isinstance(result, str):
        return result
    calls = [next(iter(call.items())) for call in result if isinstance(call, dict) and len(call) == 1]
    if len(calls) < len(result) or not all(isinstance(given, str | dict) for _, given in calls):
        raise TypeError
    return [{name: given if isinstance(given, str) else json.dumps(given)} for name, given in calls]
