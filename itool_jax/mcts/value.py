"""The score of a state in the search tree: outcome and self-evaluation (eq 6 and 7).

In: the gold and the candidate response as text, or the logits of the answers to the self-evaluation question.
Out: O, one number a response, and C, one number a state.
"""

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float

from itool_jax.text.calls import Call, looks_like_calls, read_calls, same_calls, value_key
from itool_jax.types import AnyArray

Grading = Literal["binary", "graded"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfEvaluationSettings:
    """The model's own judgement of a state (eq 7)."""

    reference: Literal["gold", "none"] = "gold"
    """Whether the model sees the gold response when it judges a candidate."""
    scale: Literal["binary", "four_grades"] = "binary"
    """Answers: correct or incorrect, or four grades as in the authors' code."""

    @property
    def letters(self) -> str:
        """The answer letters."""
        return "AB" if self.scale == "binary" else "ABCD"


def outcome(
    gold: str,
    response: str,
    *,
    finished: bool,
    grading: Grading = "binary",
    tools: Sequence[Mapping[str, Any]] = (),
) -> float:
    """O of eq 6 for a terminal state: how far `response` agrees with `gold`.

    `binary` gives +1.0 where the calls are equal as multisets of typed calls and -1.0 otherwise; `graded`
    gives 0.0 to 1.0, with partial credit for names, parameters and values (after ToolRL, arXiv 2504.13958).
    Gold that is no call list is text: then a response is right when it attempts no call list, or is the gold
    itself. A response that ran into the length limit (`finished` false) is wrong. `tools` are OpenAI tool
    schemas; an optional parameter left out counts as given with its default.
    """
    agreement = _agreement(gold, response, tools) if finished else 0.0
    if grading == "graded":
        return agreement
    return 1.0 if agreement == 1.0 else -1.0


def confidence(
    correct_logit: Float[AnyArray, "..."], incorrect_logit: Float[AnyArray, "..."]
) -> Float[AnyArray, "..."]:
    """C of eq 7, P(correct) / (P(correct) + P(incorrect)), from the two answers' logits; shapes broadcast."""
    return jax.nn.sigmoid(correct_logit - incorrect_logit)


def four_grade_confidence(logits_BG: Float[AnyArray, "... 4"]) -> Float[AnyArray, "..."]:
    """(A + 0.1 B - C - 2 D) / 4, from -0.5 to 0.25, over probabilities normalised among the four answers.

    The last axis holds the logits of A, B, C, D (the scale of the iTool authors' code); other axes stay.
    """
    probabilities_BG = jax.nn.softmax(logits_BG, axis=-1)
    return jnp.sum(probabilities_BG * jnp.array([1.0, 0.1, -1.0, -2.0]), axis=-1) / 4


def _agreement(gold: str, response: str, tools: Sequence[Mapping[str, Any]]) -> float:
    """1.0 for a right response, 0.0 for an unreadable one or the wrong kind, partial credit below 0.9."""
    gold_calls, calls = read_calls(gold), read_calls(response)
    if gold_calls is None:
        return float(not looks_like_calls(response) or response.strip() == gold.strip())
    if calls is None:
        return 0.0
    defaults = _optional_defaults(tools)
    gold_calls = [_without_defaults(call, defaults) for call in gold_calls]
    calls = [_without_defaults(call, defaults) for call in calls]
    return 1.0 if same_calls(gold_calls, calls) else _partial_credit(gold_calls, calls)


def _partial_credit(gold_calls: Sequence[Call], calls: Sequence[Call]) -> float:
    """0.9 · [J(names) + Σ matched calls (J(parameters) + equal values)] / [1 + Σ gold (1 + parameters)].

    J is the Jaccard index; calls match under the assignment that earns most, and only with a call of the
    same name.
    """
    credit = _jaccard((call.name for call in gold_calls), (call.name for call in calls))
    by_name: defaultdict[str, tuple[list[Call], list[Call]]] = defaultdict(lambda: ([], []))
    for side, group in enumerate((gold_calls, calls)):
        for call in group:
            by_name[call.name][side].append(call)
    for gold_group, group in by_name.values():
        credit += best_assignment([[_call_credit(a, b) for b in group] for a in gold_group])
    return 0.9 * credit / (1 + sum(1 + len(call.arguments) for call in gold_calls))


def _call_credit(gold: Call, call: Call) -> float:
    shared = gold.arguments.keys() & call.arguments.keys()
    equal = sum(value_key(gold.arguments[name]) == value_key(call.arguments[name]) for name in shared)
    return _jaccard(gold.arguments, call.arguments) + equal


def _jaccard(a: Iterable[Hashable], b: Iterable[Hashable]) -> float:
    """Jaccard index of two multisets; two empty ones agree."""
    counts_a, counts_b = Counter(iter(a)), Counter(iter(b))  # a mapping stands for its keys
    union = (counts_a | counts_b).total()
    return (counts_a & counts_b).total() / union if union else 1.0


def best_assignment(credit: Sequence[Sequence[float]]) -> float:
    """The largest sum of entries, at most one of each row and one of each column (the Hungarian method).

    `credit` is rectangular and not negative, rows by columns; an empty one gives 0.0.
    """
    rows = list(credit)
    if not rows or not rows[0]:
        return 0.0
    if len(rows) > len(rows[0]):
        rows = list(zip(*rows, strict=True))
    row_of: list[int | None] = [None] * len(rows[0])
    row_price, column_price = [0.0] * len(rows), [0.0] * len(rows[0])
    for row in range(len(rows)):
        _place(row, rows, row_of, row_price, column_price)
    return sum(rows[row][column] for column, row in enumerate(row_of) if row is not None)


def _place(
    row: int,
    credit: Sequence[Sequence[float]],
    row_of: list[int | None],
    row_price: list[float],
    column_price: list[float],
) -> None:
    """Gives `row` a column by the cheapest path of exchanges; changes `row_of` (by column) and the prices."""
    distance, previous = [math.inf] * len(row_of), [-1] * len(row_of)
    open_columns, reached, column, here = set(range(len(row_of))), 0.0, -1, row
    while True:
        for other in open_columns:
            step = reached - credit[here][other] - row_price[here] - column_price[other]
            if step < distance[other]:
                distance[other], previous[other] = step, column
        column = min(open_columns, key=lambda other: distance[other])
        open_columns.remove(column)
        reached = distance[column]
        if (owner := row_of[column]) is None:
            break
        here = owner
    row_price[row] += reached
    for other in set(range(len(row_of))) - open_columns - {column}:
        owner = row_of[other]
        assert owner is not None  # only the last column of the path was free
        row_price[owner] += reached - distance[other]
        column_price[other] -= reached - distance[other]
    while column != -1:
        row_of[column] = row if previous[column] == -1 else row_of[previous[column]]
        column = previous[column]


def _optional_defaults(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Hashable]]:
    """Function name to parameter name to the key of its default, for optional parameters that have one."""
    defaults = {}
    for tool in tools:
        function = tool.get("function", tool)
        schema = function.get("parameters") or {}
        required = schema.get("required") or ()
        defaults[function["name"]] = {
            name: value_key(parameter["default"])
            for name, parameter in (schema.get("properties") or {}).items()
            if name not in required and isinstance(parameter, Mapping) and "default" in parameter
        }
    return defaults


def _without_defaults(call: Call, defaults: Mapping[str, Mapping[str, Hashable]]) -> Call:
    """`call` without the arguments that repeat an optional parameter's default: both spellings are equal."""
    if call.name not in defaults:
        return call
    own = defaults[call.name]
    kept = {name: x for name, x in call.arguments.items() if name not in own or own[name] != value_key(x)}
    return Call(call.name, kept)
