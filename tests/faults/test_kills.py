"""A run that is killed, or asked to stop, at random moments ends like one that nobody disturbed.

Search and scores make the same decisions, with numbers within 1e-5; everything else is equal byte for byte.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.runs import Made

pytestmark = pytest.mark.processes


def disturbed(folder: Path, kills: int, signals: str, arguments: list[str]) -> dict[str, Any]:
    """The sum of `tests.faults.kills`."""
    command = [sys.executable, "-m", "tests.faults.kills", f"--folder={folder}", f"--kills={kills}"]
    command += [f"--signals={signals}", "--", "--stage=iterate", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


MIXED = "SIGKILL,SIGKILL,SIGKILL,SIGKILL,SIGTERM"


@pytest.mark.parametrize("kills", [34, pytest.param(250, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_like_an_undisturbed_one(made: Made, tmp_path: Path, kills: int):
    comparison = disturbed(tmp_path / "runs", kills, MIXED, made.settings)
    assert (comparison["kills"], comparison["differing"]) == (kills, [])


@pytest.mark.slow
def test_the_smoke_configuration_killed(tmp_path: Path):
    comparison = disturbed(tmp_path / "runs", 10, "SIGKILL", ["--config=smoke"])
    assert (comparison["kills"], comparison["differing"]) == (10, [])
