"""The score of a state in the search tree: outcome and self-evaluation (eq 6 and 7).

In: the gold and the candidate response as text, or the logits of the answers to the self-evaluation question.
Out: O, one number a response, and C, one number a state.
"""

import dataclasses
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
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
    """The model's own judgement of a state (eq 7)."""

    reference: Literal["gold", "none"] = "gold"
    """Whether the model sees the gold response when it judges a candidate."""
    scale: Scale = "binary"
    """Answers: correct or incorrect, or four grades as in the authors' code."""
    weight: float = 1.0
    """Factor of the judgement C in the score O + C of a state (eq 6); at 0 the model is not asked."""
    both_orders: bool = False
    """Ask twice, the second time with the letters of the answers in reverse, and average: for twice the cost."""

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"self_eval.weight must not be negative, got {self.weight}")

    @property
    def letters(self) -> str:
        """The answer letters."""
        return "AB" if self.scale == "binary" else "ABCD"


def outcome(
    gold: str,
    response: str,
    *,
    finished: bool,
    tools: Sequence[Mapping[str, Any]] = (),
    grading: Grading = "binary",
) -> float:
    """O of eq 6 for a terminal state: +1.0 where `response` agrees with `gold`, else -1.0.

    Calls agree where they are equal as multisets of typed calls. Gold that is no call list is text: then a response
    is right when it says something and holds no call in any known form, or is the gold itself. A response that ran
    into the length limit (`finished` false) is wrong. `tools` are OpenAI tool schemas; an optional parameter left out
    counts as given with its default.

    `graded` tells near misses apart: between them a response whose calls are read, but not right, has 2 g - 1, where
    g = 0.9 [J(names) + Σ over matched calls (J(parameter names) + equal values)] / [1 + Σ over gold calls (1 +
    parameters)], J is the Jaccard index of multisets, and calls of one name are matched for the largest g.
    """
    if not finished:
        return -1.0
    if _is_right(gold, response, tools):
        return 1.0
    gold_calls, calls = read_calls(gold), read_calls(response)
    if grading == "binary" or gold_calls is None or calls is None:
        return -1.0
    defaults = _optional_defaults(tools)
    return 2 * _similarity(*([_without_defaults(call, defaults) for call in side] for side in (gold_calls, calls))) - 1


def _similarity(gold: Sequence[Call], calls: Sequence[Call]) -> float:
    """The g of `outcome`, from 0 to 0.9."""
    from scipy.optimize import linear_sum_assignment  # slow to import, and few runs grade

    names, gold_names = (Counter(call.name for call in side) for side in (calls, gold))
    shared = (names & gold_names).total() / (names | gold_names).total()
    gains_GC = np.array([[_common(want, call) for call in calls] for want in gold])
    matched = gains_GC[linear_sum_assignment(gains_GC, maximize=True)].sum()
    return 0.9 * float(shared + matched) / (1 + sum(1 + len(call.arguments) for call in gold))


def _common(want: Call, call: Call) -> float:
    """What two calls share: the Jaccard index of their parameters' names, 1 where there are none, and equal values."""
    if want.name != call.name:
        return 0.0
    shared, either = want.arguments.keys() & call.arguments.keys(), want.arguments.keys() | call.arguments.keys()
    equal = sum(value_key(want.arguments[name]) == value_key(call.arguments[name]) for name in shared)
    return equal + (len(shared) / len(either) if either else 1.0)


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


def _is_right(gold: str, response: str, tools: Sequence[Mapping[str, Any]]) -> bool:
    gold_calls, calls = read_calls(gold), read_calls(response)
    if gold_calls is None:
        # A gold that attempts calls and cannot be read can only be met word for word.
        says_something = bool(response.strip()) and not contains_call(response)
        return response.strip() == gold.strip() or (says_something and not looks_like_calls(gold))
    if calls is None:
        return False
    defaults = _optional_defaults(tools)
    return same_calls(*([_without_defaults(call, defaults) for call in side] for side in (gold_calls, calls)))


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


def step_prior(log_prob_sum: ArrayLike, length: ArrayLike, exponent: float) -> jax.Array:
    """Prior of a step (eq 5), exp(log_prob_sum / length^exponent); exponent 0: product, 1: geometric mean."""
    return jnp.exp(
        jnp.asarray(log_prob_sum, jnp.float32) / jnp.maximum(jnp.asarray(length, jnp.float32), 1.0) ** exponent
    )
