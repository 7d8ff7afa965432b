"""Answers kept as they come: read again after a kill, up to where the file is whole, and never for other settings."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itool_jax import preemption
from itool_jax.journal import Journal

VALUES: list[Any] = [[1, 2.5, None], 1e-40, -0.1, {"a": ["ä\n", True]}, float("-inf"), []]


def fill(path: Path, values: list[Any], layout: Any = 0) -> list[Any]:
    """What a journal gives for pieces of work, and appends to; those computed are counted in `computed`."""
    computed.clear()

    def compute(number: int, value: Any) -> Any:
        computed.append(number)
        return value

    with Journal(path, layout) as journal:
        return [journal.keep(f"k{i}", lambda i=i, value=value: compute(i, value)) for i, value in enumerate(values)]


computed: list[int] = []


def test_answers_are_computed_once(tmp_path: Path):
    path = tmp_path / "a/b.journal"
    assert fill(path, VALUES) == VALUES
    assert computed == list(range(len(VALUES)))
    content = path.read_bytes()
    assert fill(path, [None] * len(VALUES)) == VALUES
    assert computed == []
    assert path.read_bytes() == content


def test_an_answer_is_on_disk_before_the_next_one_is_computed(tmp_path: Path):
    path = tmp_path / "journal"
    with Journal(path, 0) as journal:
        for n in range(3):
            journal.keep(f"k{n}", lambda n=n: f"value {n}")
            assert f"value {n}".encode() in path.read_bytes()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cut=st.integers(min_value=0, max_value=400))
def test_a_journal_cut_anywhere_keeps_what_is_whole(tmp_path_factory: pytest.TempPathFactory, cut: int):
    path = tmp_path_factory.mktemp("cut") / "journal"
    fill(path, VALUES)
    content = path.read_bytes()
    path.write_bytes(content[:cut])
    assert fill(path, VALUES) == VALUES
    assert computed == list(range(len(VALUES) - len(computed), len(VALUES)))
    assert len(computed) == content[cut:].count(b"\n") - (cut < content.index(b"\n") + 1)
    assert path.read_bytes() == content


@pytest.mark.parametrize("byte", [0, 5, 12])
def test_a_damaged_line_and_those_behind_it_are_computed_again(
    tmp_path: Path, byte: int, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "journal"
    fill(path, VALUES)
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[3])
    damaged[byte] ^= 1
    path.write_bytes(b"".join([*lines[:3], bytes(damaged), *lines[4:]]))
    assert fill(path, VALUES) == VALUES
    assert computed == list(range(2, len(VALUES)))  # the first line is the layout's
    assert f"{path} is damaged behind its first 3 lines" in capsys.readouterr().err
    assert path.read_bytes() == b"".join(lines)


def test_a_journal_of_other_settings_begins_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "journal"
    fill(path, VALUES, {"batch": 4})
    assert fill(path, VALUES[::-1], {"batch": 8}) == VALUES[::-1]
    assert len(computed) == len(VALUES)
    assert "was written with other settings" in capsys.readouterr().err


def test_who_is_asked_to_stop_does_so_before_the_next_answer(tmp_path: Path):
    path = tmp_path / "journal"
    fill(path, VALUES[:2])
    preemption.ask_to_stop()
    try:
        with pytest.raises(preemption.PreemptionError):
            fill(path, VALUES)
        assert computed == []
    finally:
        preemption.listen()
    assert fill(path, VALUES) == VALUES
    assert computed == list(range(2, len(VALUES)))
