"""The evidence harness: which cells there are, how a rate is chosen, what is kept of a cell, and the table."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from benchmarks import evidence
from benchmarks.evidence import ARMS, DEVELOPMENT_SEEDS, NONE, RATES, REPORTED_SEEDS, SFT, Cell, Result, Settings
from itool_jax.store import directory as run_directory

N = 1000


def result(cell: Cell, right: int, seconds: float = 60.0) -> Result:
    """A cell of N samples, of which the first ones are right; the first 100 are calls, the last 100 refusals."""
    place = np.arange(N)
    categories = {"calls": place < 100, "refusals": place >= N - 100, "nothing": place < 0}
    return Result(cell, place < right, categories if cell.arm == NONE else {}, "ids", seconds)


def by_name(*results: Result) -> dict[str, Result]:
    return {row.cell.name: row for row in results}


def developed(right: Mapping[float, int]) -> Iterator[Result]:
    """All development cells, each arm with that many right answers at each rate."""
    for seed in DEVELOPMENT_SEEDS:
        yield result(Cell("many", NONE, None, seed), 400, seconds=600)
        for arm in ARMS:
            yield from (result(Cell("many", arm, rate, seed), right[rate]) for rate in RATES)


RIGHT = dict(zip(RATES, (410, 430, 420), strict=True))


# Cells -------------------------------------------------------------------------------------------------------


def test_a_development_cell_never_sees_the_test_part_and_no_seed_serves_both() -> None:
    assert not set(DEVELOPMENT_SEEDS) & set(REPORTED_SEEDS)
    assert {cell.part for cell in evidence.all_cells({}) if cell.seed in DEVELOPMENT_SEEDS} == {"validation"}
    assert {cell.part for cell in evidence.all_cells({}) if cell.seed in REPORTED_SEEDS} == {"test"}
    run = Path("run")
    for cell in evidence.all_cells({}):
        assert evidence.cell_config(cell, run).iterations == (1 if cell.seed in DEVELOPMENT_SEEDS else 3)


def test_the_cells_are_those_of_the_protocol() -> None:
    cells = list(evidence.all_cells({}))
    trained = [cell for cell in cells if cell.arm != NONE]
    assert len(trained) == 7 * 3 * 2 + 7 * 3 + 3 * 3
    assert len(cells) - len(trained) == 2 + 3 + 3
    assert {cell.arm for cell in trained if cell.corpus == "clean"} == {"default", SFT, "chosen_steps"}
    known = list(evidence.all_cells(dict.fromkeys(ARMS, RATES[0])))
    assert len({cell.name for cell in known}) == len(cells) == len(known)
    assert all(cell.known for cell in known)
    assert sum(cell.known for cell in cells) == 42 + 8


def test_names_tell_cells_apart() -> None:
    assert Cell("many", "raft", 3e-4, 10).name == "many_raft_0.0003_10"
    assert Cell("clean", NONE, None, 0).name == "clean_none_0"
    assert Cell("many", "raft", None, 0).name == "many_raft_?_0"


def test_the_cells_left_are_those_without_a_result() -> None:
    assert evidence.cells_left({}) == list(evidence.all_cells({}))
    results = by_name(*developed(RIGHT))
    left = evidence.cells_left(results)
    assert {cell.seed for cell in left} == set(REPORTED_SEEDS)
    assert {cell.rate for cell in left if cell.arm != NONE} == {RATES[1]}
    first = left[0]
    assert evidence.cells_left(results | by_name(result(first, 400))) == left[1:]
    only = evidence.cells_left(results, ("many_raft_*", "clean_none_1"))
    assert [cell.name for cell in only] == [f"many_raft_{RATES[1]:g}_{seed}" for seed in (0, 1, 2)] + ["clean_none_1"]


def test_time_is_that_of_finished_cells_of_the_same_kind() -> None:
    development, reported = Cell("many", SFT, RATES[0], 10), Cell("many", SFT, RATES[0], 0)
    warmup = Cell("many", NONE, None, 0)
    assert evidence.seconds_left([development], {}) is None
    results = by_name(result(development, 1, 60), result(warmup, 1, 600))
    assert evidence.seconds_left([development, reported, warmup], results) == 60 + 60 + 600
    results |= by_name(result(reported, 1, 100))
    assert evidence.seconds_left([development, reported, reported], results) == 60 + 100 + 100
    assert evidence.seconds_left([], {}) == 0


# Rates -------------------------------------------------------------------------------------------------------


def test_the_rate_is_the_best_on_validation_and_of_equals_the_lowest() -> None:
    assert evidence.best_rate({1e-4: 41.0, 1e-3: 43.0, 1e-2: 42.0}) == 1e-3
    assert evidence.best_rate({1e-2: 43.0, 1e-3: 43.0, 1e-4: 41.0}) == 1e-3
    assert evidence.best_rate({1e-3: 0.1 + 0.2, 1e-4: 0.3}) == 1e-4  # equal but for rounding


def test_a_rate_is_chosen_over_the_seeds_once_all_cells_of_the_arm_are_finished() -> None:
    results = by_name(*developed(RIGHT))
    assert evidence.chosen_rates(results) == dict.fromkeys(ARMS, RATES[1])
    better = Cell("many", "raft", RATES[2], DEVELOPMENT_SEEDS[0])
    assert evidence.chosen_rates(results | by_name(result(better, 441)))["raft"] == RATES[2]  # 43.05 over 43.0
    del results[better.name]
    assert set(evidence.chosen_rates(results)) == set(ARMS) - {"raft"}


# What is kept ------------------------------------------------------------------------------------------------


def test_marks_are_packed_four_a_digit() -> None:
    marks = [True, False, False, True, True, True, False, False, True, True]
    assert evidence.pack(marks) == "9cc0"
    assert evidence.unpack("9cc0", 10).tolist() == marks
    assert evidence.unpack(evidence.pack([]), 0).tolist() == []
    many = np.random.default_rng(0).random(4801) < 0.5
    assert np.array_equal(evidence.unpack(evidence.pack(many.tolist()), 4801), many)
    assert len(evidence.pack(many.tolist())) == 2 * 601


def kept(cell: Cell, marks: list[bool]) -> dict[str, object]:
    settings = run_directory.binding_settings(evidence.cell_config(cell, Path("run")))
    row = {"cell": cell._asdict(), "settings": settings, "seconds": 7.5, "n": len(marks), "ids": "ab"}
    return row | {"correct": evidence.pack(marks), "categories": {"calls": evidence.pack(marks)}}


def test_a_finished_cell_is_read_again(tmp_path: Path) -> None:
    cell, marks = Cell("many", "raft", RATES[0], 10), [True, False, True]
    (tmp_path / f"{cell.name}.json").write_text(json.dumps(kept(cell, marks)))
    read = evidence.read_results(tmp_path)[cell.name]
    assert (read.cell, read.correct.tolist(), read.ids, read.seconds) == (cell, marks, "ab", 7.5)
    assert read.categories["calls"].tolist() == marks
    assert read.accuracy == pytest.approx(200 / 3)
    assert cell not in evidence.cells_left({cell.name: read})


def test_cells_of_other_settings_or_samples_are_refused_by_name(tmp_path: Path) -> None:
    cell = Cell("clean", SFT, RATES[0], 1)
    row = kept(cell, [True])
    settings = row["settings"]
    assert isinstance(settings, dict)
    path = tmp_path / f"{cell.name}.json"
    path.write_text(json.dumps(row | {"settings": settings | {"search.breadth": 9}}))
    with pytest.raises(
        ValueError, match=rf"{path.name} was created with search.breadth=9, but it is now \d+; move it away"
    ):
        evidence.read_results(tmp_path)
    path.write_text(json.dumps(row | {"settings": settings | {"search.old": 1}}))
    with pytest.raises(ValueError, match=r"was created with search\.old=1, but it is now missing"):
        evidence.read_results(tmp_path)
    path.write_text(json.dumps(row))
    other = Cell("clean", NONE, None, 1)
    (tmp_path / "other.json").write_text(json.dumps(kept(other, [True]) | {"ids": "cd"}))
    with pytest.raises(ValueError, match=r"other\.json has other samples"):
        evidence.read_results(tmp_path)
    unknown = other._replace(corpus="x")._asdict()
    (tmp_path / "other.json").write_text(json.dumps(kept(other, [True]) | {"cell": unknown}))
    with pytest.raises(ValueError, match=r"other\.json: unknown corpus x or arm none"):
        evidence.read_results(tmp_path)


def test_arms_differ_in_their_own_settings_alone() -> None:
    def binding(corpus: str, arm: str) -> dict[str, object]:
        return run_directory.binding_settings(evidence.cell_config(Cell(corpus, arm, 0.5, 3), Path("run")))

    def changed(corpus: str, arm: str) -> dict[str, object]:
        default = binding("many", "default")
        return {name: value for name, value in binding(corpus, arm).items() if value != default[name]}

    assert binding("many", "default")["preference.learning_rate"] == 0.5
    assert binding("many", "default")["seed"] == 3
    assert changed("many", "chosen_steps") == {"preference.loss": "chosen_steps"}
    assert changed("many", SFT) == {"preference.control": SFT}
    assert changed("many", "swapped") == {"preference.control": "swapped"}
    assert changed("many", "raft") == {"preference.loss": "raft"}
    assert changed("many", "whole_rejected") == {"pairs.rejected": "whole"}
    assert changed("many", "gold_pairs").items() >= {"search.inject_gold": "always", "pairs.require": "gap"}.items()
    assert {name.split(".")[0] for name in changed("many", "gold_pairs")} <= {"search", "pairs", "self_eval"}
    assert changed("clean", "default") == {"generated.writers": 1}


# The table ---------------------------------------------------------------------------------------------------


def row_of(text: str, arm: str) -> list[str]:
    """The cells of an arm's row in the last table of a report."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {arm} |")]
    return [cell.strip() for cell in lines[-1].strip("|").split("|")]


def test_the_table_of_made_up_cells() -> None:
    results = by_name(*developed(RIGHT))
    rate = RATES[1]
    for seed in REPORTED_SEEDS:
        results |= by_name(result(Cell("many", NONE, None, seed), 400 + seed))
        results |= by_name(result(Cell("many", SFT, rate, seed), 400 + seed))
        results |= by_name(result(Cell("many", "default", rate, seed), 500 + seed))
    text = evidence.report(results)
    assert text.count("| arm |") == 2  # rates, and one corpus: nothing of the clean one is finished
    assert "| default | 41.00 | **43.00** | 42.00 |" in text
    assert "(n=1000)" in text
    warmup = row_of(text, "none (the warm-up)")
    assert warmup[2] == "40.10 ± 0.06"  # 40.0, 40.1, 40.2
    default = row_of(text, "default")
    assert default[:3] == ["default", f"{rate:g}", "50.10 ± 0.06"]
    mean, interval = default[3].strip("*").split(" ", 1)
    low, high = map(float, interval.strip("[]").split(", "))
    assert mean == "+10.00"
    assert default[3].startswith("**")  # above 0: a gain
    assert (low, high) == pytest.approx((10 - 2.44, 10 + 2.44), abs=0.3)  # 2.5758 sqrt(.1 x .9 / 1000) points
    assert default[4] == default[3]
    assert default[5:] == ["<0.0001, <0.0001, <0.0001", "<0.0001, <0.0001, <0.0001", "none"]
    sft = row_of(text, SFT)
    assert sft[3:] == ["+0.00 [+0.00, +0.00]", "", "1.0000, 1.0000, 1.0000", "1.0000, 1.0000, 1.0000", "none"]
    assert "raft" not in text.split("whole test part")[1]  # its reported cells are not finished
    assert text.rstrip().endswith(f"The default against the other arms, in points: {SFT} {default[3]}")


def test_an_unfinished_table_says_so() -> None:
    results = by_name(*developed(RIGHT), *(result(Cell("many", NONE, None, seed), 400) for seed in (0, 1)))
    results |= by_name(*(result(Cell("many", "raft", RATES[1], seed), 410) for seed in (0, 1)))
    results |= by_name(result(Cell("many", SFT, RATES[1], 0), 410))
    text = evidence.report(results)
    assert "0, 1 (of 3; nothing is claimed before all are finished)" in text
    assert row_of(text, "raft")[2] == "41.00 ± 0.00"
    assert f"| {SFT} |" not in text.split("| arm |")[2].split("\n", 1)[1]  # one of its two cells is missing


def test_p_values_are_adjusted_over_the_arms_of_a_seed() -> None:
    results = by_name(*developed(RIGHT))
    for seed in REPORTED_SEEDS:
        results |= by_name(result(Cell("many", NONE, None, seed), 400))
        results |= by_name(result(Cell("many", "default", RATES[1], seed), 406))  # 6 wins: p = 2 / 2^6
        results |= by_name(result(Cell("many", "raft", RATES[1], seed), 408))  # 8 wins: p = 2 / 2^8
    text = evidence.report(results)
    assert row_of(text, "raft")[5:7] == ["0.0078, 0.0078, 0.0078", "0.0156, 0.0156, 0.0156"]
    assert row_of(text, "default")[5:7] == ["0.0312, 0.0312, 0.0312", "0.0312, 0.0312, 0.0312"]
    assert row_of(text, "default")[4] == ""  # nothing to compare with: fine-tuning is not finished


def test_categories_that_fell_are_named() -> None:
    warmup = [result(Cell("many", NONE, None, seed), N) for seed in REPORTED_SEEDS]

    def arm(lost: int) -> list[Result]:
        """Right but for the last answers, which are refusals."""
        return [result(Cell("many", "default", RATES[0], seed), N - lost) for seed in REPORTED_SEEDS]

    assert evidence.fallen(arm(0), warmup) == []
    assert evidence.fallen(arm(2), warmup) == []  # two of a hundred: tolerated, and the interval reaches 0
    (text,) = evidence.fallen(arm(3), warmup)
    assert text.startswith("refusals -3.00 [")
    assert text.endswith("+0.00]")  # not significant, but more than 2 points


# A run -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_small_experiment_is_run_once_and_shares_its_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evidence._options.cache_clear()
    monkeypatch.setattr(evidence, "FIXED", ("--config=smoke", "--warmup.epochs=1"))
    monkeypatch.setattr(evidence, "ARMS", {arm: ARMS[arm] for arm in ("default", SFT, "gold_pairs")})
    monkeypatch.setattr(evidence, "REPORTED", {"many": ("default", SFT, "gold_pairs")})
    monkeypatch.setattr(evidence, "RATES", (1e-3,))
    monkeypatch.setattr(evidence, "DEVELOPMENT_SEEDS", (10,))
    monkeypatch.setattr(evidence, "REPORTED_SEEDS", (0,))
    settings = Settings(output=tmp_path / "runs", cells=tmp_path / "cells")
    evidence.compute(Settings(output=settings.output, cells=settings.cells, plan=True))
    assert "8 cells, 0 finished; 8 to run, time unknown" in capsys.readouterr().out
    assert not settings.cells.exists()
    evidence.compute(settings)
    assert len(list(settings.cells.glob("*.json"))) == 8
    assert "against the warm-up" in (settings.cells / "TABLE.md").read_text()
    first = {arm: settings.output / f"many_{arm}_0.001_0/iteration_1" for arm in evidence.ARMS}
    trees = {arm: (folder / "trees.jsonl").read_bytes() for arm, folder in first.items()}
    assert trees["default"] == trees[SFT] != trees["gold_pairs"]
    assert len({(folder / "scores.jsonl").read_bytes() for folder in first.values()}) == 1
    row = json.loads((settings.cells / "many_default_0.001_0.json").read_text())
    assert {"iteration_1/search", "iteration_2/search", "iteration_2/dpo"} <= row["figures"].keys()
    assert row["pairs_by_kind"].keys() == {"iteration_1", "iteration_2"}
    assert row["n"] == 60
    capsys.readouterr()
    evidence.compute(settings)
    assert "8 cells, 8 finished; 0 to run, about 0.0 hours" in capsys.readouterr().out
    evidence._options.cache_clear()
