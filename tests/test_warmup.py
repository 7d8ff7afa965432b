"""The warm-up: parts and their learning rates, no warm-up at all, and rounds until validation stops gaining."""

import json
from pathlib import Path
from typing import Any

import pytest

from itool_jax import config as settings
from itool_jax.main import PREEMPTED
from itool_jax.planning import time as plan_time
from itool_jax.stages import plan
from itool_jax.stages.warmup import _curriculum, best_round, reached_plateau
from itool_jax.store import training
from itool_jax.text.chat import Encoded
from itool_jax.training.settings import WarmupSettings
from tests.conftest import read
from tests.runs import CLOCK, Made, Row, again

pytestmark = pytest.mark.usefixtures("restored_jax_settings")


def figures(folder: Path) -> Row:
    return json.loads((folder / "warmup/warmup.json").read_text())


@pytest.mark.parametrize(("schedule", "expected"), [("per_part", [4, 4, 2]), ("span", [10])])
def test_parts_come_one_after_the_other_in_spans_of_the_schedule(schedule: Any, expected: list[int]) -> None:
    parts = [[Encoded(f"{part}/{i}", [10 + part, 5], [7] * 20) for i in range(n)] for part, n in enumerate((4, 3, 2))]
    batches, spans = _curriculum(WarmupSettings(batch_size=2, schedule=schedule), parts, 2, seed=0)
    assert spans == expected
    assert len(batches) == 10
    seen = [int(batch.tokens_BT[0, 0]) - 10 for batch in batches]
    assert seen == [0] * 4 + [1] * 4 + [2] * 2


def test_no_passes_leave_the_base_as_it_is(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "run"
    assert again(made, folder, "--warmup.epochs=0", stage="warmup") == 0
    assert "warm-up: warmup.epochs=0, so the policy is the base model\n" in capsys.readouterr().err
    assert figures(folder)["steps"] == 0
    assert not (folder / "metrics.jsonl").exists()
    assert again(made, folder, "--warmup.epochs=0", stage="evaluate") == 0
    responses = [read(folder / phase / "evaluation_test_all.jsonl") for phase in ("base", "warmup")]
    assert responses[0] == responses[1]


AUTO = ("--warmup.epochs=auto", "--warmup.max_epochs=3", "--warmup.learning_rate=1e-12", "--warmup.checkpoint_every=1")


def test_rounds_end_where_validation_gains_nothing(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """At a rate that teaches nothing, the second round is the last and the first is kept; stopped in either, too."""
    assert again(made, tmp_path / "once", *AUTO[2:], stage="warmup") == 0
    assert again(made, tmp_path / "auto", *AUTO, stage="warmup") == 0
    part = len(read(tmp_path / "auto/data/validation.jsonl"))
    once, ours = figures(tmp_path / "once"), figures(tmp_path / "auto")
    accuracy = ours["accuracy_by_round"][0]
    assert ours == ours | {"validation_samples": part, "accuracy_by_round": [accuracy] * 2, "kept_round": 1}
    assert (ours["weights"], ours["steps"]) == (once["weights"], 2 * once["steps"])
    said = capsys.readouterr().err
    assert f"warmup.epochs=auto expects 600 validation samples, got {part}: " in said
    line = f"{100 * accuracy:.1f} % on {part} validation samples"
    assert f"warm-up, round 1: {line}\n" in said
    assert f"warm-up, round 2: {line} (+0.0)\n" in said
    rows = read(tmp_path / "auto/metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, ours["steps"] + 1))

    for stops_after in (2, once["steps"] + 2):
        with monkeypatch.context() as patch:
            votes = iter([False] * stops_after)
            patch.setattr(training, "asked_to_stop", lambda votes=votes: next(votes, True))
            assert again(made, tmp_path / f"cut {stops_after}", *AUTO, stage="warmup") == PREEMPTED
        assert again(made, tmp_path / f"cut {stops_after}", *AUTO, stage="warmup") == 0
        assert capsys.readouterr().err.count("resuming after step") == 1
        resumed = figures(tmp_path / f"cut {stops_after}")
        assert {k: v for k, v in resumed.items() if k != "seconds"} == {k: v for k, v in ours.items() if k != "seconds"}
        both = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("auto", f"cut {stops_after}")]
        assert CLOCK.sub(b"", both[0]) == CLOCK.sub(b"", both[1])


@pytest.mark.parametrize(
    ("correct", "kept", "taken"),
    [
        ((10, 16, 18, 30), 3, 3),  # 2 of 600 are less than half a point, and more than nothing
        ((10, 16, 15), 2, 3),
        ((10, 10), 1, 2),
        ((10, 13, 16, 19, 22), 5, 5),  # 3 of 600 are enough for another round
    ],
)
def test_which_round_is_the_last_and_which_is_kept(correct: tuple[int, ...], kept: int, taken: int):
    rounds = [n for n in range(1, len(correct) + 1) if not any(reached_plateau(correct[:m], 600) for m in range(1, n))]
    assert len(rounds) == taken
    assert best_round(correct[:taken]) == kept


@pytest.mark.parametrize(
    ("epochs", "passes", "words"),
    [("2", 2, "steps"), ("0", 0, "none (warmup.epochs=0)"), ("auto", 3, "at most, 3 rounds")],
)
def test_the_plan_knows_the_most_that_it_may_take(made: Made, epochs: str, passes: int, words: str):
    changes = f"--warmup.epochs={epochs}", "--warmup.max_epochs=3", "--run_dir=none"
    config = settings.parse(["--stage=plan", *made.settings, *changes])
    data, once = plan._data(config), figures(made.folder)
    row = plan_time._warmup(config, data, plan_time.TimeModel(config, None, 1, 1))
    assert words in row.what
    assert row.tokens == passes * sum(len(x.prompt_ids) + len(x.target_ids) for x in data.rows(data.warmup))
    assert not passes or row.what.startswith(f"{once['samples']} samples, {passes * once['steps']} steps")
