"""The report of a run: `report.html` in its directory, one self-contained page.

In: a run directory, finished or not. Out: the page; with `--watch`, a server on this machine whose page follows the
run.
"""

from pathlib import Path
from typing import Any

from itool_jax.config import Config
from itool_jax.report import data as report_data
from itool_jax.report import page, server
from itool_jax.system.files import whole_file
from itool_jax.system.hosts import is_first
from itool_jax.system.messages import log
from itool_jax.system.untrusted import one_line

FILE = "report.html"
TREE_BYTES = 128 << 20
"""Size limit of the trees in the page; the page says how many it leaves out. A thousand trees take some 5 MB."""


def run(config: Config) -> dict[str, Any]:
    """Writes the report, or serves it until the user interrupts; returns the number of trees shown."""
    if config.watch:
        return {"trees": server.serve(lambda: report_data.stamp(config), lambda: content(config, live=True))}
    report, _ = write(config)
    log(f"wrote the report to {config.run_dir / FILE}")
    return {"trees": len(report["trees"])}


def write(config: Config) -> tuple[dict[str, Any], list[str]]:
    """Writes the page; returns its content."""
    report, trees = content(config)
    with whole_file(config.run_dir / FILE) as file:
        file.write(page.assemble(report, trees, report["title"]).encode())
    return report, trees


def content(config: Config, *, live: bool = False) -> tuple[dict[str, Any], list[str]]:
    """Returns the report's data, and its trees as JSON texts."""
    report, trees = report_data.find(config)
    size, kept = 0, 0
    for tree in trees:
        size += len(tree.text)
        kept += size <= TREE_BYTES
    left_out = len(trees) - kept
    report |= {"trees": report["trees"][:kept], "trees_left_out": left_out, "live": live}
    return report, [tree.text for tree in trees[:kept]]


def refresh(config: Config) -> Path | None:
    """Writes the page during a run or at its end; returns its path, or None. A failing report never ends a run."""
    if not is_first():
        return None
    try:
        write(config)
    except Exception as error:  # a fault of the report must not end days of work
        log(f"could not write the report: {one_line(error)}")
        return None
    return config.run_dir / FILE
