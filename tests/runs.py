"""A whole run of `iterate` of a tiny model, made once for all workers, and what tests do with copies of it."""

import contextlib
import io
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from itool_jax.main import main
from itool_jax.system.files import write_jsonl
from itool_jax.text.chat import Chat, load_tokenizer
from tests import tiny

Row = dict[str, Any]

SMALL = ("--generate.max_tokens=12", "--generate.tokens_per_batch=1024")  # alike everywhere: fewer programs
ITERATIONS, BREADTH, DEPTH, SIMULATIONS = 2, 2, 2, 4


class Made(NamedTuple):
    """A finished run and what it was made from."""

    folder: Path
    settings: list[str]
    samples: list[Row]
    chat: Chat
    output: str


def make_samples(n: int = 120) -> list[Row]:
    """Short ones: calls, a quarter refusals, a few with an earlier turn."""
    rows = []
    for i in range(n):
        name = f"f{i % 3}"
        tool = {"name": name, "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
        turns = [{"role": "user", "content": f"{name} {i}"}]
        if i % 5 == 0:
            turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}, *turns]
        target = f"[{name}(x={i})]" if i % 4 else "I cannot."
        target = f"[{name}(x={i}), {name}(x=1)]" if i % 4 == 1 else target
        tools = [{"type": "function", "function": tool}]
        rows.append({"id": f"s{i}", "messages": turns, "tools": tools, "target": target})
    return rows


def make_or_read(folder: Path) -> Made:
    """Runs `iterate` of a tiny model in a new folder, or returns the run that is already there."""
    model, data, output = folder / "model", folder / "d.jsonl", folder / "output.txt"
    settings = [
        *(f"--model={model}", f"--data={data}", f"--iterations={ITERATIONS}", "--lora.rank=2", "--evaluate.limit=0"),
        *("--replay.replay_fraction=0.2", "--replay.hardest_fraction=0.4", "--warmup.batch_size=8"),
        *(f"--search.n_simulations={SIMULATIONS}", f"--search.breadth={BREADTH}", f"--search.max_depth={DEPTH}"),
        # As in the paper: a model of random weights finds nothing right by itself.
        *("--search.inject_gold=always", "--pairs.require=gap", "--search.exploration=1", "--replay.select=perplexity"),
        *("--search.max_step_tokens=8", "--search.max_last_step_tokens=12", "--search.batch=4"),
        *("--preference.learning_rate=1e-3", *SMALL),
    ]
    if not output.exists():
        tiny.tiny_checkpoint(model, talkative=False)
        write_jsonl(data, make_samples())
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["--stage=iterate", f"--run_dir={folder / 'run'}", *settings]) == 0
        output.write_text(out.getvalue())
    return Made(folder / "run", settings, make_samples(), Chat(load_tokenizer(str(model))), output.read_text())


def again(made: Made, folder: Path, *changes: str, stage: str = "iterate") -> int:
    """The same command on another run directory."""
    return main([f"--stage={stage}", f"--run_dir={folder}", *made.settings, *changes])


def copy_run(made: Made, folder: Path) -> Path:
    return Path(shutil.copytree(made.folder, folder / "run"))


def contents(folder: Path, *leave_out: str) -> dict[str, bytes]:
    """All files of a run but the checkpoints, whose inner names are random, and what holds times and seconds."""
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if "weights" not in name
        and not name.endswith((".json", "metrics.jsonl", "log.jsonl", "report.html", ".lock", *leave_out))
    }


PROGRESS = re.compile(rb'.*"level": "progress".*\n')
CLOCK = re.compile(rb'("time": [\d.]+)|("seconds": [\d.]+)|([\d.]+ s\b)')


def lasting(folder: Path) -> dict[str, bytes]:
    """All files of a run without what the clock, the process and the folder's name put there; of weights, digests.

    The report holds all of this too, and is left out.
    """
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {
        name: CLOCK.sub(b"", PROGRESS.sub(b"", path.read_bytes())).replace(str(folder).encode(), b"FOLDER")
        for name, path in files.items()
        if "weights" not in name and name not in (".lock", "report.html")
    }


PHASES = ["base", "warmup", *(f"iteration_{i + 1}" for i in range(ITERATIONS))]
WATCHED = "evaluation_validation_200"
"""The step that answers validation samples after the warm-up and each iteration."""
N_STAGES = 4 + 5 * ITERATIONS  # warm-up and three evaluations; score, search, dpo and two evaluations
STEP_FILES = ("scores.jsonl", "trees.jsonl", "pairs.jsonl", "answers.jsonl", "reference.jsonl")


def rewrite_config(folder: Path, **changes: Any) -> list[str]:
    """Changes settings of a run directory; returns them as arguments."""
    path = folder / "config.yaml"
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))
    return [f"--{name}={value}" for name, value in changes.items() if value is not True] + [
        f"--{name}" for name, value in changes.items() if value is True
    ]
