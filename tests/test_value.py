"""Outcome and self-evaluation: both gradings, the best assignment, defaults, and the numbers of eq 7."""

import itertools
import math
import random
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itool_jax.mcts.value import best_assignment, confidence, four_grade_confidence, outcome

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
        (TEXT, "", True),
        (TEXT, CALLS, False),
        (TEXT, " [f(a=", False),
        (TEXT, "[]", False),
        ("[Note] no tool fits.", "[Note] no tool fits. ", True),
        ("[Note] no tool fits.", "[f()]", False),
    ],
)
def test_binary_outcome(gold: str, response: str, right: bool) -> None:
    assert outcome(gold, response, finished=True) == (1.0 if right else -1.0)
    assert outcome(gold, response, finished=False) == -1.0
    assert (outcome(gold, response, finished=True, grading="graded") == 1.0) is right
    assert outcome(gold, response, finished=False, grading="graded") == 0.0


@pytest.mark.parametrize(
    ("gold", "response", "expected"),
    [
        ("[f(a=1, b=2)]", "[f(a=1, b=3)]", 0.9 * (1 + 1 + 1) / 4),
        ("[f(a=1, b=2)]", "[f(a=1)]", 0.9 * (1 + 1 / 2 + 1) / 4),
        ("[f(a=1)]", "[f(a=1, b=2)]", 0.9 * (1 + 1 / 2 + 1) / 3),
        ("[f(a=1)]", "[g(a=1)]", 0.0),
        ("[f(a=1), g()]", "[f(a=1)]", 0.9 * (1 / 2 + 2) / 4),
        ("[f(a=1)]", "[f(a=1), f(a=1)]", 0.9 * (1 / 2 + 2) / 3),
        ("[f(a=1), f(a=2)]", "[f(a=2), f(a=3)]", 0.9 * (1 + 2 + 1) / 5),
        ("[f(a=1), f(a=2)]", "[f(a=2)]", 0.9 * (1 / 2 + 2) / 5),
        ("[f()]", "[f(a=1)]", 0.9 * (1 + 0) / 2),
        ("[f(a=1)]", "[f(a=", 0.0),
        ("[f(a=1)]", TEXT, 0.0),
        (TEXT, "[f(a=1)]", 0.0),
    ],
)
def test_graded_outcome(gold: str, response: str, expected: float) -> None:
    assert outcome(gold, response, finished=True, grading="graded") == pytest.approx(expected, abs=1e-12)


def test_better_responses_earn_more() -> None:
    ladder = ["[f(a=", "[h()]", "[f()]", "[f(a=2)]", "[f(a=1)]", "[f(a=1, b=3)]", "[f(b=2, a=1)]"]
    earned = [outcome("[f(a=1, b=2)]", response, finished=True, grading="graded") for response in ladder]
    assert earned[0] == earned[1] == 0.0
    assert all(low < high for low, high in itertools.pairwise(earned[1:]))


@settings(deadline=None)
@given(st.text(), st.text(), st.booleans(), st.sampled_from(["binary", "graded"]))
def test_any_text_gets_an_outcome(gold: str, response: str, finished: bool, grading: Any) -> None:
    value = outcome(gold, "[" + response, finished=finished, grading=grading)
    assert value in (-1.0, 1.0) if grading == "binary" else 0.0 <= value <= 1.0


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
    graded = outcome(gold, response, finished=True, tools=[tool], grading="graded")
    assert (graded == 1.0) is right


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object"}, {"properties": {"a": None}, "required": None}])
def test_tools_without_defaults_change_nothing(parameters: Any) -> None:
    tools = [{"name": "f", "parameters": parameters}, {"name": "no_parameters"}]
    assert outcome("[f(a=1)]", "[f(a=1)]", finished=True, tools=tools) == 1.0
    assert outcome("[f(a=1)]", "[f()]", finished=True, tools=tools) == -1.0


@pytest.mark.parametrize("seed", range(30))
def test_assignment_is_the_best(seed: int) -> None:
    numbers = random.Random(seed)
    n_rows, n_columns = numbers.randint(1, 5), numbers.randint(1, 5)
    credit = [[numbers.choice([0.0, 0.5, 1.0, 2.0, numbers.random()]) for _ in range(n_columns)] for _ in range(n_rows)]
    wide = credit if n_rows <= n_columns else [list(column) for column in zip(*credit, strict=True)]
    best = max(
        sum(row[column] for row, column in zip(wide, columns, strict=True))
        for columns in itertools.permutations(range(len(wide[0])), len(wide))
    )
    assert best_assignment(credit) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("credit", [[], [[], []]])
def test_assignment_of_nothing(credit: list[list[float]]) -> None:
    assert best_assignment(credit) == 0.0


def test_many_repeated_calls_take_little_time() -> None:
    gold = "[" + ", ".join(f"f(a={i})" for i in range(60)) + "]"
    response = "[" + ", ".join(f"f(a={i})" for i in range(200, 20, -1)) + "]"
    start = time.perf_counter()
    value = outcome(gold, response, finished=True, grading="graded")
    assert time.perf_counter() - start < 5.0
    assert value == pytest.approx(0.9 * (60 / 180 + 60 + 39) / 121)


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
