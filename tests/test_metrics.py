"""What a run reports: JSON lines that any tool reads, messages on stderr, and a bar that counts."""

import io
import json
import math
import re
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from itool_jax.system import messages
from itool_jax.system.messages import log
from itool_jax.system.metrics import Metrics
from itool_jax.system.progress import progress


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_every_line_is_one_object_of_plain_json(tmp_path: Path) -> None:
    path, start = tmp_path / "metrics.jsonl", time.time()
    Metrics(path, "warmup").write(1, loss=2.5, rate=1e-5)
    Metrics(path, "iteration_1").write(7, loss=math.nan, norm=math.inf, n=3)
    first, second = (json.loads(line, parse_constant=no_constant) for line in path.read_text().splitlines())
    assert first.pop("time") == pytest.approx(start, abs=60)
    assert first == {"stage": "warmup", "step": 1, "loss": 2.5, "rate": 1e-5}
    assert second.pop("time") >= start - 0.001
    assert second == {"stage": "iteration_1", "step": 7, "loss": None, "norm": None, "n": 3}


def test_messages_go_to_stderr_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = "[bold]no markup[/bold], and one line " + "however long " * 30
    log(text)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == text + "\n"


def test_work_that_nobody_watches_ends_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("counting", 5) as advance:
        advance()
        advance(3, note="loss 1.500")
        assert capsys.readouterr().err == ""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.split()[:3] == ["counting", "4", "in"]


def test_a_terminal_sees_how_far_the_work_is(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(messages, "console", Console(file=screen, force_terminal=True, width=160))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("counting", 5) as advance:
        advance(3, note="loss 1.500")
        deadline = time.monotonic() + 20
        while "3/5" not in screen.getvalue() and time.monotonic() < deadline:  # a thread draws the bar now and then
            time.sleep(0.05)
        for expected in ("counting", "3/5", "loss 1.500"):
            assert expected in screen.getvalue()
    assert re.search(r"counting +3 in \d+\.\d s\n$", re.sub("\x1b[^a-zA-Z]*[a-zA-Z]", "", screen.getvalue()))


def test_an_error_passes_through_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with progress("counting", 2) as advance:
            advance()
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert "counting" not in capsys.readouterr().err
