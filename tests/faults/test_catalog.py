"""Every fault of the catalogue is provoked for real: its exit code, its one line, and docs/faults.md as it stands."""

import contextlib
from pathlib import Path

import pytest

from itool_jax.main import main
from tests.conftest import REPOSITORY
from tests.faults import document
from tests.faults.catalog import FAULTS
from tests.faults.place import Fault, Place, set_up
from tests.runs import Made

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("restored_jax_settings")]

PREFIX = "python -m itool_jax.main: error: "


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.name for fault in FAULTS])
def test_a_fault_ends_in_its_line(
    fault: Fault, made: Made, tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    with contextlib.ExitStack() as held:
        place = Place(tmp_path, made, held)
        set_up(place, tiny_folder, fault.steps)
        capfd.readouterr()
        assert main(place.arguments(fault.command)) == 2
    *progress, last = place.shown(capfd.readouterr().err).splitlines()
    assert not any("Traceback" in line or "error" in line for line in progress)
    assert last.startswith(PREFIX)
    line = last.removeprefix(PREFIX)
    wanted = fault.line
    assert (line.startswith(wanted[:-1]) and len(line) >= len(wanted)) if wanted.endswith("…") else line == wanted


def test_names_and_lines_are_given_once():
    names = [fault.name for fault in FAULTS]
    assert sorted(set(names)) == sorted(names)
    assert [fault.name for fault in FAULTS if len(fault.line.removesuffix("…")) < 15 or not fault.how] == []


def test_the_document_is_current():
    assert document.PATH == REPOSITORY / "docs" / "faults.md"
    assert document.PATH.read_text() == document.text(), "docs/faults.md is old: run python -m tests.faults.document"
