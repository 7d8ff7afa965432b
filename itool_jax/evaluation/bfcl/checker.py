"""Checks single-turn responses to BFCL questions by the leaderboard's rules.

In: documented functions, the raw text of a response and the possible answers. Out: a verdict, with one of the
leaderboard's error types. Nothing is executed. The rules follow the last scorer of BFCL v3
(https://pypi.org/project/bfcl-eval/2025.8.6.2/); `docs/evaluation.md` lists them and the measured agreement.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from itool_jax.evaluation.bfcl.reader import Language, UnreadableError, read_function_calls, read_response
from itool_jax.evaluation.bfcl.values import JAVA_TYPES, JAVASCRIPT_TYPES, java_value, javascript_value
from itool_jax.text.calls import Call

_PYTHON_TYPES: dict[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
_TYPES: dict[Language, dict[str, type]] = {"Python": _PYTHON_TYPES, "Java": JAVA_TYPES, "JavaScript": JAVASCRIPT_TYPES}
_CONVERTERS: dict[Language, Callable[[str, str, str | None], Any]] = {
    "Java": java_value,
    "JavaScript": javascript_value,
}
_TEXT_ERRORS: dict[Language, str] = {"Java": "type_error:java", "JavaScript": "type_error:js"}
_IGNORED = re.compile(r"[ ,./\-_*^]")

Function = Mapping[str, Any]
Answer = Mapping[str, Any]


class Verdict(NamedTuple):
    """Verdict on a response: valid, or the leaderboard's name of the error, `kind:detail`."""

    valid: bool
    error_type: str | None


def hides_dots(model_output: Any) -> bool:
    """Returns True for a list of calls without a dot in any name: most function-calling interfaces allow no dots."""
    if not isinstance(model_output, list):
        return False
    return not any("." in name for call in model_output if isinstance(call, dict) for name in call)


class _WrongError(Exception):
    """Error for a wrong response; the message is the error type."""


def check(
    functions: Sequence[Function],
    model_output: Any,
    possible_answer: Sequence[Answer] | None,
    category: str,
    *,
    underscore_to_dot: bool = False,
    function_calling: bool = False,
) -> Verdict:
    """Checks `model_output`, a response to a question of `category`: its raw text, or a list of `{name: arguments}`.

    `functions` and `possible_answer` are the question's `function` and `ground_truth` entries; relevance and
    irrelevance have no answer. Categories have their v3 or v4 names (`simple`, `simple_python`, `live_parallel`). Set
    `underscore_to_dot` if the model was shown `_` for every dot in a function's name; for a list of calls without a dot
    in any name that is assumed. Text is no call if the model is in `function_calling` mode. No response raises an
    error; one of another form counts as unreadable. Raises ValueError for an unknown category or parameter type, and if
    the possible answers are missing, malformed or name an unknown function.
    """
    language = language_of(category)
    listed = function_calling or isinstance(model_output, list)
    try:
        calls = read_function_calls(model_output) if listed else read_response(model_output, language)
    except UnreadableError:
        calls = None
        error = "ast_decoder:decoder_failed"
    else:
        error = "ast_decoder:decoder_wrong_output_format"
    try:
        if "irrelevance" in category:
            _require(not calls, "irrelevance_error:decoder_success")
        elif "relevance" in category:
            _require(bool(calls), "relevance_error:decoder_failed")
        else:
            answers = expected_calls(functions, possible_answer, language)
            if calls is None:
                raise _WrongError(error)
            checker = _Checker(language, underscore_to_dot or hides_dots(model_output))
            checker.calls(calls, answers, category)
    except _WrongError as wrong:
        return Verdict(False, str(wrong))
    except (TypeError, KeyError, AttributeError, IndexError, StopIteration) as error:  # never caused by text
        raise ValueError(f"malformed functions or possible answers ({error!r})") from error
    return Verdict(True, None)


_KINDS = ("simple", "multiple", "parallel", "parallel_multiple", "irrelevance", "relevance")
_SPECIAL: dict[str, Language] = {
    **dict.fromkeys(("java", "simple_java"), "Java"),
    **dict.fromkeys(("javascript", "simple_javascript"), "JavaScript"),
}


def language_of(category: str) -> Language:
    """Returns the language of a single-turn category's calls. Raises ValueError for an unknown category."""
    if category in _SPECIAL:
        return _SPECIAL[category]
    if category.removeprefix("live_").removesuffix("_python") not in _KINDS:
        raise ValueError(f"{category!r} is not a single-turn category of BFCL")
    return "Python"


def _require(condition: bool, error_type: str) -> None:
    if not condition:
        raise _WrongError(error_type)


def expected_calls(
    functions: Sequence[Function], possible_answer: Sequence[Answer] | None, language: Language
) -> list[tuple[Function, Answer]]:
    """Returns (documentation, allowed values by parameter) of each expected call. Raises ValueError for other forms."""
    if not possible_answer:
        raise ValueError("a question that expects calls needs possible answers, got none")
    _need(isinstance(functions, list | tuple), "the functions are not a list")
    _need(isinstance(possible_answer, list | tuple), "the possible answers are not a list")
    for function in functions:
        known = isinstance(function, Mapping) and isinstance(function.get("name"), str)
        schema: Any = function.get("parameters") if known else None
        _need(isinstance(schema, Mapping), 'a function has no "name" or no "parameters"')
        _need(isinstance(schema.get("properties"), Mapping), f'{function["name"]} has no "properties"')
    by_name = {function["name"]: function for function in functions}
    pairs = []
    for answer in possible_answer:
        _need(isinstance(answer, Mapping) and len(answer) > 0, f"a possible answer contains no call: {answer!r}")
        name, parameters = next(iter(answer.items()))
        if not functions or (len(functions) != 1 and name not in by_name):
            raise ValueError(f"the possible answer calls {name!r}, which is not among the functions")
        function = functions[0] if len(functions) == 1 else by_name[name]
        _need(isinstance(parameters, Mapping), f"the possible arguments of {name!r} are not an object")
        for parameter, allowed in parameters.items():
            _require_form(f"{name}.{parameter}", function["parameters"]["properties"].get(parameter), allowed, language)
        pairs.append((function, parameters))
    return pairs


def _require_form(name: str, schema: Any, allowed: Any, language: Language) -> None:
    """Raises ValueError if a parameter's documentation or its allowed values have another form."""
    _need(isinstance(allowed, list), f"the allowed values of {name} are not a list")
    if schema is None:
        return
    types = _TYPES[language]
    _need(isinstance(schema, Mapping) and "type" in schema, f'{name} has no "type"')
    kinds = [schema["type"]]
    if isinstance(schema.get("items"), Mapping) and types.get(str(kinds[0])) is list:
        _need("type" in schema["items"], f'the items of {name} have no "type"')
        kinds.append(schema["items"]["type"])
    for kind in kinds:
        _need(kind in types, f"{language} has no parameters of type {kind!r} ({name}), only {', '.join(types)}")
    dicts: list[Any] = []
    if types[kinds[0]] is dict:
        dicts = allowed
    elif types[kinds[-1]] is dict:
        dicts = [item for answer in allowed if isinstance(answer, list) for item in answer]
    values = (value for answer in dicts if isinstance(answer, Mapping) for value in answer.values())
    _need(
        all(isinstance(value, list | str) for value in values), f"an allowed value of {name} has a key without a list"
    )


def _need(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


class _Checker(NamedTuple):
    """Rules for one language; a check returns if nothing is wrong and raises `_WrongError` otherwise."""

    language: Language
    underscore_to_dot: bool

    def calls(self, calls: Sequence[Call], answers: Sequence[tuple[Function, Answer]], category: str) -> None:
        if "parallel" in category:
            _require(len(calls) == len(answers), "parallel_function_checker_no_order:wrong_count")
            self.parallel(calls, answers)
        else:
            kind = "multiple" if "multiple" in category else "simple"
            expected = len(answers) if kind == "multiple" else 1
            _require(len(calls) == expected, f"{kind}_function_checker:wrong_count")
            self.call(calls[0], *answers[0])

    def parallel(self, calls: Sequence[Call], answers: Sequence[tuple[Function, Answer]]) -> None:
        """Matches each answer in turn to the first call left that meets it, even if a later answer needs that call."""
        left = list(calls)
        for function, answer in answers:
            met = next((call for call in left if self.meets(call, function, answer)), None)
            _require(met is not None, "parallel_function_checker_no_order:cannot_find_match")
            left = [call for call in left if call is not met]

    def meets(self, call: Call, function: Function, answer: Answer) -> bool:
        try:
            self.call(call, function, answer)
        except _WrongError:
            return False
        return True

    def call(self, call: Call, function: Function, answer: Answer) -> None:
        name = function["name"].replace(".", "_") if self.underscore_to_dot else function["name"]
        _require(call.name == name, "simple_function_checker:wrong_func_name")
        schema = function["parameters"]
        required = schema.get("required") or ()
        _require(call.arguments.keys() >= set(required), "simple_function_checker:missing_required")
        for parameter, value in call.arguments.items():
            known = parameter in schema["properties"] and parameter in answer
            _require(known, "simple_function_checker:unexpected_param")
            self.argument(value, schema["properties"][parameter], answer[parameter])
        needed = [parameter for parameter, allowed in answer.items() if "" not in allowed]
        _require(call.arguments.keys() >= set(needed), "simple_function_checker:missing_optional")

    def argument(self, value: Any, schema: Mapping[str, Any], allowed: Sequence[Any]) -> None:
        """Checks an argument against its documentation and allowed values; "" there only means it may be left out."""
        kind, types = schema["type"], _TYPES[self.language]
        item_kind = schema["items"]["type"] if types[kind] is list and "items" in schema else None
        if self.language in _CONVERTERS:
            _require(isinstance(value, str), _TEXT_ERRORS.get(self.language, ""))
            value = _CONVERTERS[self.language](value, kind, item_kind)
        elif kind == "tuple" and isinstance(value, tuple):
            value = list(value)
        elif kind == "float" and type(value) is int:
            value = _float(value)
        expected, item = types[kind], types[item_kind] if item_kind else None
        if _check_type(value, allowed, expected, item):
            _require(_among(value, allowed), "value_error:others")
        elif expected is dict:
            _check_dict(value, allowed)
        elif expected is list and item is dict:
            _check_dicts(value, allowed)
        elif expected is str:
            _require(_normal(value) in [_normal(x) for x in allowed if isinstance(x, str)], "value_error:string")
        elif expected is list:
            _require(_among(_normal_items(value), map(_normal_items, allowed)), "value_error:list/tuple")
        else:
            _require(_among(value, allowed), "value_error:others")


def _float(value: int) -> float | int:
    try:
        return float(value)
    except OverflowError:
        return value


def _among(value: Any, allowed: Any) -> bool:
    """Returns True if `value` equals one of `allowed`; False for values nested too deep to compare."""
    try:
        return value in list(allowed)
    except RecursionError:
        return False


def _check_type(value: Any, allowed: Sequence[Any], expected: type, item: type | None) -> bool:
    """Rejects a value of a wrong type. Returns True if the value names a variable and must be compared as it is.

    Answers of a type other than the documented one hold a variable's name.
    """
    answer_type = _answer_type(allowed)
    if type(value) is expected and (item is None or any(_items_fit(value, answer, item) for answer in allowed)):
        return answer_type not in (None, expected)
    _require(answer_type is type(value), "type_error:simple")
    _require(type(value) is not expected, "type_error:nested")
    return True


def _answer_type(allowed: Sequence[Any]) -> type | None:
    """Returns the type of the first answer other than "", which only marks the parameter as optional."""
    return next((type(answer) for answer in allowed if answer != ""), None)


def _items_fit(items: Sequence[Any], answer: Any, expected: type) -> bool:
    """Returns True if all items have the documented type or that of the answer's items, or the answer is not a list."""
    if not isinstance(answer, list):
        return True
    return all(type(item) in (expected, _answer_type(answer)) for item in items)


def _normal(text: str) -> str:
    """Normalizes text for comparison: lower case, no spaces, little punctuation, one kind of quotes."""
    return _IGNORED.sub("", text).lower().replace("'", '"')


def _normal_value(value: Any) -> Any:
    return _normal(value) if isinstance(value, str) else value


def _normal_items(value: Any) -> list[Any]:
    return [_normal_value(item) for item in value]


def _check_dict(value: Any, allowed: Sequence[Any]) -> None:
    """Checks a dict against dicts of allowed values by key; the error is that of the last answer compared."""
    error = "dict_checker:unclear"
    for answer in allowed:
        if answer == "":
            continue
        mismatch = _dict_error(value, answer)
        if mismatch is None:
            return
        error = mismatch
    raise _WrongError(error)


def _dict_error(value: Any, answer: Any) -> str | None:
    if not isinstance(value, dict) or not isinstance(answer, dict):
        return "dict_checker:unclear"
    if any(key not in value and "" not in allowed for key, allowed in answer.items()):
        return "value_error:dict_key"
    for key, item in value.items():
        if key not in answer:
            return "value_error:dict_key"
        if not _among(_normal_value(item), map(_normal_value, answer[key])):
            return "value_error:dict_value"
    return None


def _check_dicts(value: Sequence[Any], allowed: Sequence[Any]) -> None:
    """Checks a list of dicts against lists of dicts, in order."""
    error = "list_dict_checker:unclear"
    for answer in allowed:
        error = _dicts_error(value, answer)
        if error is None:
            return
    raise _WrongError(error or "list_dict_checker:unclear")


def _dicts_error(value: Sequence[Any], answer: Any) -> str | None:
    if len(value) != len(answer):
        return "value_error:list_dict_count"
    for item, expected in zip(value, answer, strict=True):
        try:
            _check_dict(item, [expected])
        except _WrongError as wrong:
            return str(wrong)
    return None
