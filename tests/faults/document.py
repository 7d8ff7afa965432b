"""`python -m tests.faults.document`: writes docs/faults.md from the catalogue."""

from pathlib import Path

from tests.faults.catalog import FAULTS, SECTIONS
from tests.faults.place import Fault

PATH = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
INTRODUCTION = """\
# What can go wrong, and what is said

Made by `python -m tests.faults.document` from the catalogue in `tests/faults`, whose tests provoke each of these
{count} faults for real. Every one ends the program with code 2 and one line on stderr, which begins
`python -m itool_jax.main: error: `. `ITOOL_TRACEBACK=1` shows where it came from.

MODEL, FILE, OUT and RUN stand for a model's folder, a data file, an output and a run directory, all in the folder DIR;
SETTINGS are those that the run was made with. Where a line ends in …, a library's own words follow.
"""


def text() -> str:
    """The whole document."""
    parts = [INTRODUCTION.format(count=len(FAULTS))]
    for title, faults in SECTIONS.items():
        parts.append(f"\n## {title}\n\n")
        parts += map(_entry, faults)
    return "".join(parts)


def _entry(fault: Fault) -> str:
    command = fault.command if len(fault.command) < 200 else f"{fault.command[:60]}…"
    line = fault.line if len(fault.line) < 400 else f"{fault.line[:60]}…"
    return f"- **{fault.how}** (`{fault.name}`), `{command}`\n  > {line}\n"


if __name__ == "__main__":
    PATH.write_text(text())
