"""Classifies wrong responses: gold and response in, one of `KINDS` out."""

from collections import Counter

from itool_jax.text.calls import Call, contains_call, looks_like_calls, read_calls, same_calls
from itool_jax.text.tool_formats import read_any

UNFINISHED = "cut off"
KINDS = {
    UNFINISHED: "the response hit the length limit",
    "no call": "text where calls are expected",
    "needless call": "calls where text is expected",
    "unreadable": "looks like calls but cannot be parsed",
    "missing call": "only expected functions are called, but some are missing",
    "extra call": "all expected functions are called, plus others or repeats",
    "wrong function": "calls a function that is not expected, and misses one that is",
    "wrong parameters": "the right functions, but with missing or extra parameters",
    "wrong value": "the right functions and parameters, but a value differs",
    "wrong format": "the right calls, but not in the tool format",
    "other": "none of the above",
}
"""Kinds of error and their meaning; if several fit, the first one here is reported."""


def error_kind(gold: str, response: str, *, finished: bool) -> str:
    """Returns the kind of error of a response that was judged wrong."""
    if not finished:
        return UNFINISHED
    wanted, calls = read_calls(gold), read_any(response)
    if wanted is None:
        return "needless call" if contains_call(response) else "other"
    if calls is None:
        return "unreadable" if contains_call(response) or looks_like_calls(response) else "no call"
    return "wrong format" if same_calls(wanted, calls) else _between(wanted, calls)


def _between(wanted: list[Call], calls: list[Call]) -> str:
    names, there = (Counter(call.name for call in side) for side in (wanted, calls))
    if names != there:
        return "missing call" if there < names else "extra call" if names < there else "wrong function"
    expected, given = (Counter((call.name, *sorted(call.arguments)) for call in side) for side in (wanted, calls))
    return "wrong value" if expected == given else "wrong parameters"
