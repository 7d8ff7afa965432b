"""Scores states of the search tree by outcome and self-evaluation (eq 6 and 7).

In: the gold and the candidate response as text, or the logits of the answers to the self-evaluation question.
Out: O, one number per response, and C, one number per state.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from itool_jax.text.calls import Call, contains_call, looks_like_calls, read_calls, same_calls, value_key
from itool_jax.text.chat import Scale
from itool_jax.types import AnyArray

Grading = Literal["binary", "graded"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelfEvaluationSettings:
    """Settings of the model's own judgement of a state (eq 7)."""

    reference: Literal["gold", "none"] = "gold"
    """Reference response shown to the model when it judges a candidate: the gold response, or none."""
    scale: Scale = "binary"
    """Answer scale. binary: correct or incorrect. four_grades: four answers, as in the authors' code."""
    weight: float = 1.0
    """Factor of the judgement C in a state's score O + C (eq 6). 0 turns self-evaluation off."""
    both_orders: bool = False
    """Ask a second time with the answer letters reversed, and average. Doubles the cost."""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"self_eval.weight must not be negative, got {self.weight}")

    @property
    def letters(self) -> str:
        """Answer letters of the scale."""
        return "AB" if self.scale == "binary" else "ABCD"


def outcome(
    gold: str,
    response: str,
    *,
    finished: bool,
    tools: Sequence[Mapping[str, Any]] = (),
    grading: Grading = "binary",
    read: Callable[[str], list[Call] | None] = read_calls,
) -> float:
    """Computes O of eq 6 for a terminal state: +1.0 if `response` agrees with `gold`, else -1.0.

    Calls agree if they are equal as multisets of typed calls. Gold that is not a call list is text; then a response is
    right if it equals the gold, or if it is not empty and contains no call in any known form. A response cut off by
    the length limit (`finished` false) is wrong. `tools` are OpenAI tool schemas: an omitted optional parameter equals
    one given with its default. `read` reads the calls of a response in its tool format; gold is a bracketed list.

    With `graded`, a response whose calls can be read but are wrong gets 2 g - 1, which separates near misses. Here
    g = 0.9 [J(names) + Σ over matched calls (J(parameter names) + equal values)] / [1 + Σ over gold calls (1 +
    parameters)], J is the Jaccard index of multisets, and calls with the same name are matched to maximize g.
    """
    if not finished:
        return -1.0
    gold_calls, calls = read_calls(gold), read(response)
    if gold_calls is None:
        # Gold that looks like calls but cannot be parsed requires an exact match.
        says_something = bool(response.strip()) and calls is None and not contains_call(response)
        right = response.strip() == gold.strip() or (says_something and not looks_like_calls(gold))
        return 1.0 if right else -1.0
    if calls is None:
        return -1.0
    defaults = _optional_defaults(tools)
    wanted, given = ([_without_defaults(call, defaults) for call in side] for side in (gold_calls, calls))
    if same_calls(wanted, given):
        return 1.0
    return -1.0 if grading == "binary" else 2 * _similarity(wanted, given) - 1


def _similarity(gold: Sequence[Call], calls: Sequence[Call]) -> float:
    """Computes g of `outcome`, from 0 to 0.9."""
    from scipy.optimize import linear_sum_assignment  # slow to import, rarely needed

    names, gold_names = (Counter(call.name for call in side) for side in (calls, gold))
    shared = (names & gold_names).total() / (names | gold_names).total()
    gains_GC = np.array([[_common(want, call) for call in calls] for want in gold])
    matched = gains_GC[linear_sum_assignment(gains_GC, maximize=True)].sum()
    return 0.9 * float(shared + matched) / (1 + sum(1 + len(call.arguments) for call in gold))


def _common(want: Call, call: Call) -> float:
    """Adds the Jaccard index of two calls' parameter names (1 if there are none) and their number of equal values.

    Returns 0 if the calls have different names.
    """
    if want.name != call.name:
        return 0.0
    shared, either = want.arguments.keys() & call.arguments.keys(), want.arguments.keys() | call.arguments.keys()
    equal = sum(value_key(want.arguments[name]) == value_key(call.arguments[name]) for name in shared)
    return equal + (len(shared) / len(either) if either else 1.0)


def confidence(
    correct_logit: Float[AnyArray, "..."], incorrect_logit: Float[AnyArray, "..."]
) -> Float[AnyArray, "..."]:
    """Computes C of eq 7, P(correct) / (P(correct) + P(incorrect)), from the two logits; shapes broadcast."""
    return jax.nn.sigmoid(correct_logit - incorrect_logit)


def four_grade_confidence(logits_BG: Float[AnyArray, "... 4"]) -> Float[AnyArray, "..."]:
    """Computes (A + 0.1 B - C - 2 D) / 4, from -0.5 to 0.25, of probabilities normalised over the four answers.

    The last axis holds the logits of A, B, C, D (the scale of the iTool authors' code); other axes are kept.
    """
    probabilities_BG = jax.nn.softmax(logits_BG, axis=-1)
    return jnp.sum(probabilities_BG * jnp.array([1.0, 0.1, -1.0, -2.0]), axis=-1) / 4


def _optional_defaults(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Hashable]]:
    """Maps function and parameter name to the key of the default, for optional parameters that have one."""
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
    """Removes arguments equal to an optional parameter's default, since omitting them means the same."""
    if call.name not in defaults:
        return call
    own = defaults[call.name]
    kept = {name: x for name, x in call.arguments.items() if name not in own or own[name] != value_key(x)}
    return Call(call.name, kept)


def step_prior(log_prob_sum: ArrayLike, length: ArrayLike, exponent: float) -> jax.Array:
    """Computes a step's prior (eq 5), exp(log_prob_sum / length^exponent); exponent 0: product, 1: geometric mean."""
    return jnp.exp(
        jnp.asarray(log_prob_sum, jnp.float32) / jnp.maximum(jnp.asarray(length, jnp.float32), 1.0) ** exponent
    )
