"""What of a benchmark's questions and tools stands among the training samples, for the data card."""

import functools
from pathlib import Path

from itool_jax import hosts
from itool_jax.data import sources
from itool_jax.data.card import overlap, overlap_lines
from itool_jax.files import write_json
from itool_jax.messages import say
from itool_jax.stages import benchmark, splits
from itool_jax.stages.run import Run


def check(run: Run) -> None:
    """Adds to the data card what of the benchmarks stands among the training samples, unless it says so already."""
    hosts.broadcast_from_primary("benchmarks", functools.partial(_check, run))


def _check(run: Run) -> None:
    config = run.config
    names = [*config.evaluate.benchmarks, *benchmark.question_files(config)]
    known = splits.read_card(config)["benchmarks"] if names and splits.are_made(config) else ()
    new = {name: sources.load_questions(Path(name)) for name in names if name not in known}
    train = run.splits.train
    if new:
        overlaps = overlap(train.samples, new)
        card = splits.read_card(config)
        write_json(config.run_dir / splits.CARD, card | {"benchmarks": card["benchmarks"] | overlaps})
        for line in overlap_lines(overlaps):
            say(line)
