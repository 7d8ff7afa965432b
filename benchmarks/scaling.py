"""Measures how a search's time and memory grow: `python -m benchmarks.scaling --json=OUT`.

Searches with a small random Llama while one size grows and the others stay the same: prompts, prompt length, breadth,
simulations. Prints seconds and the memory added to the process, and the slopes of both on log axes: 1 is linear, 0
constant. Each search runs in its own process, once to compile and once to be timed.
"""

import dataclasses
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tyro

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes to measure. Each tuple is a line of the figure; the other lines use its middle value."""

    prompts: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Numbers of prompts to search."""
    length: tuple[int, ...] = (256, 512, 1024)
    """Prompt lengths in tokens."""
    breadth: tuple[int, ...] = (2, 3, 4)
    """Values of search.breadth."""
    simulations: tuple[int, ...] = (2, 4, 8, 16)
    """Values of search.n_simulations."""
    batch: int = 8
    """Value of search.batch."""
    model: str = "tiny"
    """Name of the model in `benchmarks.inputs`."""
    json: Path | None = None
    """File to write the rows to."""


def main(s: Settings) -> list[Row]:
    """Measures every size, prints the table and the slopes, and writes the JSON."""
    lines = {name: getattr(s, name) for name in ("prompts", "length", "breadth", "simulations")}
    usual = {name: values[len(values) // 2] for name, values in lines.items()}
    rows: list[Row] = []
    print(f"{'line':<12} {'size':>6} {'seconds':>9} {'states':>7} {'MB':>7}")
    with tempfile.TemporaryDirectory() as work:
        for name, values in lines.items():
            for value in values:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    row = pool.apply(search_once, (s.model, s.batch, usual | {name: value}, Path(work)))
                rows.append({"line": name, "size": value} | row)
                print(
                    f"{name:<12} {value:6} {row['seconds']:9.2f} {row['states']:7} {row['megabytes']:7.0f}", flush=True
                )
    for name, values in ((name, values) for name, values in lines.items() if len(values) > 1):
        line = [row for row in rows if row["line"] == name]
        slopes = {what: slope(values, [row[what] for row in line]) for what in ("seconds", "megabytes")}
        print(f"{name}: time grows with power {slopes['seconds']:.2f}, memory with {slopes['megabytes']:.2f}")
        rows += [{"line": name, "slope": what, "power": power} for what, power in slopes.items()]
    if s.json is not None:
        s.json.write_text(json.dumps(rows, indent=2) + "\n")
    return rows


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """Returns the slope of a line through the points on log axes."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def search_once(model: str, batch: int, sizes: dict[str, int], work: Path) -> Row:
    """Runs two equal searches; returns the seconds and states of the second, and the memory of both."""
    import jax

    from benchmarks import inputs
    from benchmarks.children import ours
    from itool_jax.mcts.policy import ModelPolicy
    from itool_jax.mcts.search import SearchSettings, search
    from itool_jax.mcts.value import SelfEvaluationSettings

    jax.config.update("jax_compilation_cache_dir", str(work / "xla"))
    folder = inputs.checkpoint(work, model)
    base, policy = ours.load({"model": str(folder)})
    problems = inputs.search_rows({"rows": sizes["prompts"], "prompt": sizes["length"]}, folder)["problems"]
    table, group = ours.step_table(base, endless=False), [ours.searched(problem) for problem in problems]
    settings = SearchSettings(
        batch=batch,
        breadth=sizes["breadth"],
        n_simulations=sizes["simulations"],
        max_step_tokens=16,
        max_last_step_tokens=16,
    )
    before = peak_bytes()
    for _ in range(2):
        start = time.perf_counter()
        max_length = base.config.max_length
        searched = ModelPolicy(
            policy, base.chat, max_length, table, group, settings, SelfEvaluationSettings(), jax.random.key(0)
        )
        trees = search(searched.problems, searched, settings)
        seconds = time.perf_counter() - start
    states = sum(len(tree.steps) - 1 for tree in trees)
    return {"seconds": seconds, "states": states, "megabytes": (peak_bytes() - before) / 1e6}


def peak_bytes() -> int:
    """Returns the peak memory of this process; on Linux, getrusage would include what its parent had."""
    if (status := Path("/proc/self/status")).exists():
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
