"""Finished rows kept as they come: read again after a kill, up to where the file is whole."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itool_jax import config
from itool_jax.store.across_hosts import Advance, by_row, map_across_hosts
from itool_jax.store.cache import _State
from itool_jax.system import journal, preemption
from itool_jax.system.journal import Journal
from tests.conftest import REPOSITORY

VALUES: list[Any] = [[1, 2.5, None], 1e-40, -0.1, {"a": ["ä\n", True]}, float("-inf"), []]


def fill(path: Path, values: Sequence[Any] = VALUES) -> None:
    """Appends a line for each value that is not there yet."""
    known, _ = journal.read(path)
    with Journal(path) as kept:
        for number, value in enumerate(values):
            if number not in known:
                kept.append({number: value})


def test_rows_are_read_as_they_were_written(tmp_path: Path):
    path = tmp_path / "a/b.journal"
    with Journal(path) as kept:
        kept.append({3: VALUES[3], 0: VALUES[0]})
        kept.append({1: VALUES[1]})
    assert journal.read(path) == ({i: VALUES[i] for i in (3, 0, 1)}, path.stat().st_size)
    content = path.read_bytes()
    with Journal(path, writes=False) as kept:
        kept.append({2: VALUES[2]})
    assert path.read_bytes() == content


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cut=st.integers(min_value=0, max_value=400))
def test_a_journal_cut_anywhere_keeps_what_is_whole(tmp_path_factory: pytest.TempPathFactory, cut: int):
    path = tmp_path_factory.mktemp("cut") / "journal"
    fill(path)
    content = path.read_bytes()
    path.write_bytes(content[:cut])
    known, whole = journal.read(path)
    assert known == dict(enumerate(VALUES[: content[:cut].count(b"\n")]))
    assert whole == content[:cut].rfind(b"\n") + 1
    fill(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("byte", [0, 5, 12])
def test_a_damaged_line_and_those_behind_it_are_left_out(tmp_path: Path, byte: int, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "journal"
    fill(path)
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[3])
    damaged[byte] ^= 1
    path.write_bytes(b"".join([*lines[:3], bytes(damaged), *lines[4:]]))
    assert journal.read(path)[0] == dict(enumerate(VALUES[:3]))
    assert f"{path} is damaged after its first 3 lines" in capsys.readouterr().err
    fill(path)
    assert path.read_bytes() == b"".join(lines)


KILLED = """
import os, signal, sys
from pathlib import Path
from itool_jax.system.journal import Journal

with Journal(Path(sys.argv[1])) as kept:
    kept.append({0: "a"})
    kept.append({1: "b"})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_rows_survive_the_process_that_appended_them(tmp_path: Path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "j")], cwd=REPOSITORY, check=False)
    assert killed.returncode == -9
    assert journal.read(tmp_path / "j")[0] == {0: "a", 1: "b"}


# Work on many items -----------------------------------------------------------------------------------------

ITEMS = [10, 11, 12, 13, 14]


class KilledError(Exception):
    pass


def run(working: Path, seen: list[int], fail_at: int | None = None) -> list[Any]:
    """Doubles the items two at a time, in reverse; the second of each pair finishes first."""

    def work(items: Sequence[int]) -> Any:
        places = list(range(len(items)))[::-1]
        for start in range(0, len(places), 2):
            batch = places[start : start + 2]
            if fail_at in (items[i] for i in batch):
                raise KilledError
            seen.extend(items[i] for i in batch)
            yield [(i, 2 * items[i]) for i in batch]

    settings = config.Config(stage="score")
    return map_across_hosts(settings, working, ITEMS, lambda items: by_row(work(items)), "doubling")


def test_results_come_in_the_order_of_the_items(tmp_path: Path):
    seen: list[int] = []
    assert run(tmp_path, seen) == [20, 22, 24, 26, 28]
    assert seen == [14, 13, 12, 11, 10]
    assert run(tmp_path, seen) == [20, 22, 24, 26, 28]
    assert len(seen) == 5  # nothing is computed again


def test_only_rows_that_are_missing_are_computed(tmp_path: Path):
    seen: list[int] = []
    with pytest.raises(KilledError):
        run(tmp_path, seen, fail_at=12)
    assert seen == [14, 13]
    assert run(tmp_path, seen) == [20, 22, 24, 26, 28]
    assert seen == [14, 13, 12, 11, 10]


def test_rows_of_other_processes_count(tmp_path: Path):
    """As if a run of two processes went on with one."""
    for index, rows in enumerate(({0: 20, 2: 24}, {1: 22})):
        with Journal(tmp_path / (f"rows_{index}.journal" if index else "rows.journal")) as kept:
            kept.append(rows)
    seen: list[int] = []
    assert run(tmp_path, seen) == [20, 22, 24, 26, 28]
    assert seen == [14, 13]


def test_who_is_asked_to_stop_does_so_after_the_batch_and_keeps_it(tmp_path: Path):
    def work(items: Sequence[int]) -> Any:
        for place, item in enumerate(items):
            preemption.ask_to_stop()
            yield Advance(1, [(place, 2 * item)])

    try:
        with pytest.raises(preemption.PreemptionError):
            map_across_hosts(config.Config(stage="score"), tmp_path, ITEMS, work, "doubling")
    finally:
        preemption.listen()
    seen: list[int] = []
    assert run(tmp_path, seen) == [20, 22, 24, 26, 28]
    assert seen == [14, 13, 12, 11]


ASKED_TWICE = """
import ctypes, os, signal, sys, threading
from pathlib import Path
from itool_jax import main
from itool_jax.config import Config
from itool_jax.store.across_hosts import Advance, map_across_hosts
from itool_jax.system import preemption

libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)

def acknowledge(times):
    main._acknowledge_stop(times)
    if times == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        libc.pthread_mutex_unlock(mutex)

def work(items):
    yield Advance(1, [(0, 20)])
    # Compiled code, in which Python's own handler of signals does not run, ends after both signals are acknowledged.
    libc.pthread_mutex_lock(mutex)
    threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
    libc.pthread_mutex_lock(mutex)
    yield Advance(1, [(1, 22)])
    yield Advance(1, [(2, 0)])

preemption.listen(acknowledge)
try:
    map_across_hosts(Config(stage="score"), Path(sys.argv[1]), [10, 11, 12, 13, 14], work, "doubling")
except preemption.PreemptionError:
    sys.exit(75)
"""


def test_each_sigterm_is_acknowledged_at_once_and_loses_nothing(tmp_path: Path):
    asked = subprocess.run(
        [sys.executable, "-c", ASKED_TWICE, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert asked.returncode == 75, asked.stderr
    first, second = (line for line in asked.stderr.splitlines() if "topping" in line)
    assert re.fullmatch(
        r"Stopping after the current step of doubling 1/5, \d+ s(, about \d+ s left)?; finished work is kept\.", first
    )
    assert second.startswith("Still stopping after the current step of doubling 1/5, ")
    assert second.endswith("; kill -9 ends it at once, and finished work is kept.")
    seen: list[int] = []
    assert run(tmp_path, seen) == [20, 22, 24, 26, 28]
    assert seen == [14, 13, 12]


def test_the_state_of_a_step_is_plain_json_for_the_other_processes():
    for state in (_State(stop=True), _State(stop=False, done=True), _State(stop=False, basis={"settings": "x"})):
        assert _State(*json.loads(json.dumps(state))) == state
