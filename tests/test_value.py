"""Outcome and self-evaluation: which responses are right, defaults, and the numbers of eq 7."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itool_jax.mcts.value import confidence, four_grade_confidence, outcome

CALLS = '[f(a="x", b=1), g(c=[1, 2])]'
TEXT = "I cannot help with that."


@pytest.mark.parametrize(
    ("gold", "response", "right"),
    [
        (CALLS, CALLS, True),
        (CALLS, "[ g(c=(1,2)),f(b = 1,a='x') ]", True),
        (CALLS, '[f(a="x", b=1)]', False),
        (CALLS, CALLS[:-1] + ", f()]", False),
        (CALLS, '[f(a="x", b=1.0), g(c=[1, 2])]', False),
        (CALLS, CALLS[:-1], False),
        (CALLS, CALLS + " done", False),
        (CALLS, TEXT, False),
        (CALLS, "", False),
        (TEXT, TEXT, True),
        (TEXT, "Another refusal.", True),
        (TEXT, "", False),
        (TEXT, " \n", False),
        (TEXT, "I call it: [f(a=1)]", False),
        (TEXT, "Sure. [f()]", False),
        (TEXT, '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', False),
        (TEXT, '{"name": "f", "parameters": {"a": 1}}', False),
        (TEXT, '[TOOL_CALLS][{"name": "f", "arguments": {}}]', False),
        (TEXT, "See [the docs](http://x.y) or f(a=1).", True),
        (TEXT, "The list [see below (optional)] is long.", True),
        (TEXT, CALLS, False),
        (TEXT, " [f(a=", False),
        (TEXT, "[]", False),
        ("[Note] no tool fits.", "[Note] no tool fits. ", True),
        ("[Note] no tool fits.", "[f()]", False),
        ("[f(Paris)]", TEXT, False),  # a gold that attempts calls rewards no refusal
        ("[f(Paris)]", " [f(Paris)]", True),
    ],
)
def test_outcome(gold: str, response: str, right: bool) -> None:
    assert outcome(gold, response, finished=True) == (1.0 if right else -1.0)
    assert outcome(gold, response, finished=False) == -1.0


@settings(deadline=None)
@given(st.text(), st.text(), st.booleans())
def test_any_text_gets_an_outcome(gold: str, response: str, finished: bool) -> None:
    assert outcome(gold, "[" + response, finished=finished) in (-1.0, 1.0)
    assert outcome(gold, gold, finished=finished) == (1.0 if finished else -1.0)
    assert outcome(gold, "a" + response, finished=finished) in (-1.0, 1.0)


PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "default": "Rome"},
        "days": {"default": 3},
        "unit": {"default": "C"},
        "x": {},
    },
    "required": ["unit"],
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}


@pytest.mark.parametrize(
    ("gold", "response", "right"),
    [
        ('[weather(unit="C", days=3)]', '[weather(unit="C")]', True),
        ('[weather(unit="C")]', '[weather(unit="C", days=3, city="Rome")]', True),
        ('[weather(unit="C", days=4)]', '[weather(unit="C")]', False),
        ('[weather(unit="C")]', '[weather(unit="C", days=3.0)]', False),
        ('[weather(unit="C")]', "[weather()]", False),
        ("[other(days=3)]", "[other()]", False),
        ("[weather(x=None)]", "[weather()]", False),
    ],
)
@pytest.mark.parametrize("tool", [TOOL, TOOL["function"]])
def test_optional_defaults_may_be_left_out(gold: str, response: str, right: bool, tool: dict[str, Any]) -> None:
    assert outcome(gold, response, finished=True, tools=[tool]) == (1.0 if right else -1.0)
    assert outcome(gold, response, finished=True) == -1.0


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object"}, {"properties": {"a": None}, "required": None}])
def test_tools_without_defaults_change_nothing(parameters: Any) -> None:
    tools = [{"name": "f", "parameters": parameters}, {"name": "no_parameters"}]
    assert outcome("[f(a=1)]", "[f(a=1)]", finished=True, tools=tools) == 1.0
    assert outcome("[f(a=1)]", "[f()]", finished=True, tools=tools) == -1.0


def test_many_repeated_calls_take_little_time() -> None:
    gold, response = (f"[{', '.join(f'f(a={i % 7})' for i in range(n))}]" for n in (300, 301))
    start = time.perf_counter()
    assert outcome(gold, gold, finished=True) == 1.0
    assert outcome(gold, response, finished=True) == -1.0
    assert time.perf_counter() - start < 5.0


@pytest.mark.parametrize(
    ("response", "grade"),
    [
        ("[f(a=1, b=2), g()]", 1.0),
        ("[g(), f(b=2, a=1)]", 1.0),
        # J(names) + J(names of f's parameters) + 1 equal value + J of none, of 1 + 3 + 1.
        ("[f(a=1, b=3), g()]", 0.9 * (1 + (1 + 1) + 1) / 5),
        ("[f(a=1), g()]", 0.9 * (1 + (1 / 2 + 1) + 1) / 5),
        ("[f(a=1, b=2)]", 0.9 * (1 / 2 + (1 + 2)) / 5),
        ("[f(a=1, b=2), g(), g()]", 0.9 * (2 / 3 + (1 + 2) + 1) / 5),
        # Of two calls of one name, the better match counts.
        ("[f(a=3, b=4), f(a=1, b=2)]", 0.9 * (1 / 3 + (1 + 2)) / 5),
        ("[h(a=1)]", 0.0),
        ("[f(a=1, b=2), g()", 0.0),
        ("I cannot.", 0.0),
    ],
)
def test_graded_outcome_by_hand(response: str, grade: float) -> None:
    reward = outcome("[f(a=1, b=2), g()]", response, finished=True, grading="graded")
    assert reward == pytest.approx(2 * grade - 1)
    assert outcome("[f(a=1, b=2), g()]", response, finished=False, grading="graded") == -1.0


def test_text_and_calls_that_disagree_get_no_grade() -> None:
    assert outcome("I cannot.", "[f()]", finished=True, grading="graded") == -1.0
    assert outcome("I cannot.", "Sorry.", finished=True, grading="graded") == 1.0


def test_confidence() -> None:
    assert float(confidence(jnp.float32(3), jnp.float32(1))) == pytest.approx(0.880797, abs=1e-6)
    correct_BW, incorrect_B1 = jnp.array([[0.0, 3.0], [1e4, -1e4]]), jnp.array([[0.0], [0.0]])
    expected_BW = [[0.5, 1 / (1 + math.exp(-3))], [1.0, 0.0]]
    np.testing.assert_allclose(confidence(correct_BW, incorrect_B1), expected_BW, atol=1e-6)


def test_confidence_ignores_a_shift_of_both_logits() -> None:
    logits_B = jnp.array([-2.0, 0.0, 2.0])
    np.testing.assert_allclose(confidence(logits_B + 5, logits_B[::-1] + 5), confidence(logits_B, logits_B[::-1]))


def test_four_grades() -> None:
    sure_GG = jnp.where(jnp.eye(4, dtype=bool), 100.0, 0.0)
    np.testing.assert_allclose(four_grade_confidence(sure_GG), [0.25, 0.025, -0.25, -0.5], atol=1e-6)
    logits_B1G = jnp.log(jnp.array([[[0.4, 0.3, 0.2, 0.1]]])) + 7.0
    np.testing.assert_allclose(four_grade_confidence(logits_B1G), [[(0.4 + 0.03 - 0.2 - 0.2) / 4]], atol=1e-6)
    np.testing.assert_allclose(jax.jit(four_grade_confidence)(sure_GG), four_grade_confidence(sure_GG), atol=1e-6)
