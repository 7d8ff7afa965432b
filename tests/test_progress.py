"""How far long work is: one clock for bar and lines, whose estimate knows the batches and programs to come."""

import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from rich.console import Console

from itool_jax.inference import sampler
from itool_jax.store.across_hosts import planned
from itool_jax.system import messages
from itool_jax.system import progress as module
from itool_jax.system.progress import Batch, Clock, current_work, progress
from itool_jax.text.padding import bucket, group, target_width
from tests.conftest import read

COMPILE = "/jax/core/compile/backend_compile_duration"


class Hands:
    """A clock that tests move."""

    now = 1000.0


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    hands = Hands()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: hands.now))
    return hands


class Once:
    """An event that comes after one wait."""

    def __init__(self) -> None:
        self.waits = [True, False]

    def wait(self, _: float) -> bool:
        return self.waits.pop()

    def set(self) -> None:
        pass


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """What a thread would do: calls of these report the running work, and nothing else does."""
    targets: list[Callable[[], None]] = []

    def thread(target: Callable[[], None], daemon: bool) -> Any:
        targets.append(target)
        return SimpleNamespace(start=lambda: None, join=lambda: None)

    monkeypatch.setattr(module, "threading", SimpleNamespace(Event=Once, Thread=thread))
    return targets


def test_what_was_done_before_says_nothing_of_the_speed(hands: Hands) -> None:
    clock = Clock(40, done=15)
    assert (clock.left(), str(clock)) == (None, "0 s")
    hands.now += 20
    clock.advance(5)
    assert str(clock) == "20 s, about 80 s left"
    hands.now += 20
    clock.advance(5)
    assert str(clock) == "40 s, about 60 s left"
    clock.advance(15)
    assert str(clock) == "40 s, about 0 s left"


def test_time_is_as_the_tokens_and_not_as_the_rows(hands: Hands) -> None:
    clock = Clock(103)
    clock.follow([Batch(100, 1000, "p"), Batch(2, 3000, "p"), Batch(1, 1000, "p")])
    hands.now += 10
    clock.advance(100)
    assert clock.left() == pytest.approx(40)
    hands.now += 30
    clock.advance(2)
    assert clock.left() == pytest.approx(10)


def test_compilation_is_no_part_of_the_speed_but_of_the_programs_to_come(hands: Hands) -> None:
    """As a real run: 1 of 124 rows after 30 s, nearly all of them compilation; the last two rows need a program too."""
    clock = Clock(124)
    clock.follow([Batch(1, 100, "a"), Batch(121, 6000, "b"), Batch(2, 200, "c")])
    hands.now += 28
    clock.hear("/jax/core/compile/jaxpr_trace_duration", 3.0)  # a part of the next
    clock.hear(COMPILE, 28.0)
    hands.now += 1
    clock.advance(1)
    assert clock.left() == pytest.approx(62 + 2 * 28)  # not 29 s for each row
    hands.now += 30
    clock.hear(COMPILE, 30.0)
    hands.now += 60
    clock.advance(121)
    assert clock.left() == pytest.approx(2 + 30)  # not 2
    hands.now += 12
    assert str(clock) == "2 min, about 20 s left"
    hands.now += 20.5
    assert str(clock) == "3 min"  # the estimate has run out: nothing is better than less than the truth


def test_compilations_within_others_count_once(hands: Hands) -> None:
    clock = Clock(2)
    for after, seconds in ((5, 1), (1, 1), (2, 6), (4, 2)):
        hands.now += after
        clock.hear(COMPILE, seconds)
    clock.hear("/jax/compilation_cache/cache_retrieval_time_sec", 100)
    clock.advance(1)
    assert clock.left() == pytest.approx(12 - 8)


def test_a_program_of_the_cache_tells_what_another_may_take(hands: Hands) -> None:
    clock = Clock(3)
    clock.follow([Batch(1, 1, "a"), Batch(1, 1, "b"), Batch(1, 1, "b")])
    hands.now += 4
    clock.hear(COMPILE, 1)
    clock.hear("/jax/compilation_cache/compile_time_saved_sec", 20)
    hands.now += 1
    clock.advance(1)
    assert clock.left() == pytest.approx(2 * 4 + 21)


def test_jax_tells_the_clock_of_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []
    monkeypatch.setattr(
        Clock, "hear", lambda _, event, duration_secs, **__: heard.append(duration_secs * (event == COMPILE))
    )
    with progress("doubling", 1):
        jax.jit(lambda x: 2 * x + 1.5)(jax.numpy.ones(7))
    assert sum(heard) > 0
    before = len(heard)
    jax.jit(lambda x: 2 * x + 2.5)(jax.numpy.ones(7))
    assert len(heard) == before


def test_who_asks_is_told_what_is_running(hands: Hands, reports: list[Callable[[], None]]) -> None:
    with progress("doubling", 2) as advance:
        hands.now += 100
        advance()
        assert current_work() == "doubling 1/2, 100 s, about 100 s left"
    assert current_work() is None


def test_bar_and_lines_tell_the_same(
    hands: Hands, reports: list[Callable[[], None]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(messages, "console", Console(file=screen, force_terminal=True, width=160))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    messages.open_log(tmp_path)
    try:
        with progress("counting", 40, done=15) as advance:
            hands.now += 20
            advance(5, note="loss 1.5")
            reports[0]()
    finally:
        messages.close_log()
    texts = [row["text"] for row in read(tmp_path / "log.jsonl") if row["level"] == "progress"]
    assert texts == ["counting 20/40, 20 s, about 80 s left, loss 1.5"]
    assert "20 s, about 80 s left" in screen.getvalue()


def test_without_a_terminal_a_line_comes_after_seconds_and_then_every_minute(
    hands: Hands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    over = threading.Event()

    class Waits:
        def wait(self, seconds: float) -> bool:
            waits.append(seconds)
            hands.now += seconds
            if len(waits) > 3:
                over.set()
            return len(waits) > 3

        def set(self) -> None:
            assert over.wait(60)

    monkeypatch.setattr(module, "threading", SimpleNamespace(Event=Waits, Thread=threading.Thread))
    with progress("counting", 4):
        pass  # as a step that takes minutes
    assert waits == [5, 60, 60, 60]
    assert capsys.readouterr().err.splitlines() == [
        *("counting 0/4, 5 s", "counting 0/4, 65 s", "counting 0/4, 2 min"),
        "counting                     0 in 185.0 s",
    ]


@pytest.mark.parametrize("tokens", [256, 1000, 4096])
def test_the_plan_is_how_the_sampler_groups_rows(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    called: list[Any] = []
    monkeypatch.setattr(sampler, "group", lambda *arguments: called.append(arguments) or [])
    prompts = [(f"r{n}", list(range(2 + 37 * n % 400))) for n in range(30)]
    rows = [(ids, ids[: len(ids) // 2 + 1]) for _, ids in prompts]
    nothing: Any = None
    list(sampler.generate(nothing, nothing, prompts, sampler.GenerateSettings(tokens_per_batch=tokens), 1024, 0))
    list(sampler.target_log_probs(nothing, rows, tokens))
    plans = [
        planned([bucket(len(ids) - 1) for _, ids in prompts], tokens),
        planned([target_width(len(prompt), len(target)) for prompt, target in rows], tokens),
    ]
    for plan, arguments in zip(plans, called, strict=True):
        groups = [(len(indices), (width, count)) for indices, width, count in group(*arguments)]
        assert [(batch.units, batch.program) for batch in plan] == groups
