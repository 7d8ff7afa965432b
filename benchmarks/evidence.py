"""Do searched preferences teach more than fine-tuning? `python -m benchmarks.evidence --output=../evidence`.

A cell is one run: a corpus, an arm, a learning rate and a seed. Development cells, of one iteration, choose each arm's
rate on the validation part; reported cells, of all iterations, then see the test part once. A finished cell is kept as
benchmarks/evidence/CELL.json, small enough to commit and enough to compute every figure again; it is not run again. A
killed command resumes.

All arms of a corpus and seed begin with copies of one run: its data, its warm-up, and its iteration 1 up to the
searched trees, so that they share prompts and sampled tokens. (`gold_pairs` and `whole_rejected` search the same
prompts again, once for all their rates.) From iteration 2 on each arm scores, searches and trains with its own policy,
for that is what the loop is: `sft_same_prompts` takes the prompts that its own policy makes pairs of.
"""

import dataclasses
import fnmatch
import functools
import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from itool_jax import config as settings
from itool_jax import main
from itool_jax.config import Config, Stage
from itool_jax.evaluation import results
from itool_jax.evaluation.statistics import (
    MeanDifference,
    hierarchical_bootstrap,
    holm,
    mean_and_standard_error,
    paired_difference,
)
from itool_jax.model.sharding import use_mesh
from itool_jax.stages import evaluate
from itool_jax.store import columns
from itool_jax.store import directory as run_directory
from itool_jax.store.cache import read_figures
from itool_jax.store.paths import WARMUP, phase_name
from itool_jax.store.run import Run
from itool_jax.store.tables import EvaluationRow, PreferenceRow
from itool_jax.system.allocator import keep_freed_memory
from itool_jax.system.files import read_json, whole_file, write_json
from itool_jax.system.preemption import PreemptionError

# Fixed before any result was looked at ----------------------------------------------------------------------

FIXED = ("--config=demo", "--warmup.epochs=auto", "--warmup.max_epochs=6", "--generated.validation=2400")
"""Settings of every cell: the default run, with a larger validation part. Plateau rule: the warm-up ends with the first
epoch that gains less than 0.5 points on the first 600 validation samples, after six at the latest."""
CORPORA: dict[str, tuple[str, ...]] = {"many": (), "clean": ("--generated.writers=1",)}
"""The default corpus, whose training answers are a mixture of several writers' habits; and one writer's."""
NONE, DEFAULT, SFT = "none", "default", "sft_same_prompts"
"""The arm without preference training, which is the warm-up; the default run; fine-tuning on the gold responses."""
ARMS: dict[str, tuple[str, ...]] = {
    DEFAULT: (),
    SFT: ("--preference.control=sft_same_prompts",),
    "chosen_steps": ("--preference.loss=chosen_steps",),
    "raft": ("--preference.loss=raft",),
    "gold_pairs": (
        *("--search.inject_gold=always", "--search.exploration=1", "--self_eval.weight=1"),
        *("--pairs.require=gap", "--pairs.min_q_gap=0.1", "--pairs.rejected=whole"),
    ),
    "whole_rejected": ("--pairs.rejected=whole",),
    "swapped": ("--preference.control=swapped",),
}
"""What each arm changes; `gold_pairs` makes its pairs as paper_v1 does."""
OWN_SEARCH = ("gold_pairs", "whole_rejected")
"""Arms whose settings change the search of iteration 1."""
REPORTED: dict[str, tuple[str, ...]] = {"many": tuple(ARMS), "clean": (DEFAULT, SFT, "chosen_steps")}
"""Arms that are reported, by corpus."""
DEVELOPED = "many"
"""The corpus that rates are chosen on; they hold for the other one too."""
RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates of preference training to try. An arm's is the one whose accuracy after iteration 1, on the whole
validation part and averaged over the development seeds, is highest; of equal ones the lowest."""
DEVELOPMENT_SEEDS = (10, 11)
REPORTED_SEEDS = (0, 1, 2)
LEVEL, DRAWS = 0.99, 10_000
"""The test: a gain is claimed where this interval of `hierarchical_bootstrap`, over all reported seeds and the whole
test part, lies above 0. Beside it stand McNemar's exact p-value of each seed, and the same adjusted over arms."""
TOLERATED = 0.02
"""A category fell if its interval lies below 0, or its mean by more than this."""

CELLS = Path(__file__).parent / "evidence"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Which cells to run, and where."""

    output: Path = Path("../evidence")
    """Folder of the run directories, one a cell, outside the checkout."""
    cells: Path = CELLS
    """Folder of the finished cells and of the table."""
    only: tuple[str, ...] = ()
    """Run only cells whose names match one of these patterns: --only 'many_default_*' '*_none_*'."""
    plan: bool = False
    """List the cells and the time that those left will take, and run none."""


# Cells ------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One run."""

    corpus: str
    arm: str
    rate: float | None
    """Learning rate; None for the warm-up, and as long as an arm's rate is not chosen."""
    seed: int

    @property
    def name(self) -> str:
        """Its name in files and messages."""
        rate = [] if self.arm == NONE else ["?" if self.rate is None else f"{self.rate:g}"]
        return "_".join([self.corpus, self.arm, *rate, str(self.seed)])

    @property
    def part(self) -> str:
        """The part of the data that it is evaluated on."""
        return "validation" if self.seed in DEVELOPMENT_SEEDS else "test"

    @property
    def iterations(self) -> int | None:
        """How many iterations it runs; None for as many as the default run has."""
        return 1 if self.part == "validation" else None

    @property
    def known(self) -> bool:
        """Whether it can be run: its rate is chosen."""
        return self.arm == NONE or self.rate is not None


class Result(NamedTuple):
    """What is kept of a finished cell."""

    cell: Cell
    correct: np.ndarray
    """Whether each sample of the part is right, in order of ids."""
    categories: dict[str, np.ndarray]
    """Whether each sample belongs to a category, by its name; of warm-ups only."""
    ids: str
    """A hash of the samples' ids."""
    seconds: float

    @property
    def accuracy(self) -> float:
        """Percent of the samples that are right."""
        return 100 * float(self.correct.mean())


Results = Mapping[str, Result]
"""Finished cells by name."""


def all_cells(rates: Mapping[str, float]) -> Iterator[Cell]:
    """Yields every cell in the order to run them; those whose arm has no chosen rate yet have none."""
    for seed in DEVELOPMENT_SEEDS:
        yield Cell(DEVELOPED, NONE, None, seed)
        yield from (Cell(DEVELOPED, arm, rate, seed) for arm in ARMS for rate in RATES)
    for corpus, arms in REPORTED.items():
        for seed in REPORTED_SEEDS:
            yield Cell(corpus, NONE, None, seed)
            yield from (Cell(corpus, arm, rates.get(arm), seed) for arm in arms)


def chosen_rates(results: Results) -> dict[str, float]:
    """The rate of each arm whose development cells are all finished."""
    rates = {}
    for arm in ARMS:
        names = {rate: [Cell(DEVELOPED, arm, rate, seed).name for seed in DEVELOPMENT_SEEDS] for rate in RATES}
        if all(name in results for by_seed in names.values() for name in by_seed):
            means = {rate: float(np.mean([results[n].accuracy for n in by_seed])) for rate, by_seed in names.items()}
            rates[arm] = best_rate(means)
    return rates


def best_rate(accuracies: Mapping[float, float]) -> float:
    """The rate of the highest accuracy; of equal ones the lowest."""
    return min(accuracies, key=lambda rate: (-round(accuracies[rate], 9), rate))


def cells_left(results: Results, only: Sequence[str] = ()) -> list[Cell]:
    """The cells that are not finished, of those whose names match a pattern of `only` if there is one."""
    cells = [cell for cell in all_cells(chosen_rates(results)) if cell.name not in results]
    return [cell for cell in cells if not only or any(fnmatch.fnmatch(cell.name, pattern) for pattern in only)]


def seconds_left(cells: Sequence[Cell], results: Results) -> float | None:
    """About how long the cells take: as long as finished ones of their kind did on average; None if there are none."""

    def mean(cell: Cell) -> float | None:
        similar = [r for r in results.values() if (r.cell.arm == NONE) == (cell.arm == NONE)]
        same = [r for r in similar if r.cell.part == cell.part] or similar
        return float(np.mean([r.seconds for r in same])) if same else None

    times = [mean(cell) for cell in cells]
    return None if None in times else sum(time for time in times if time is not None)


# Runs -------------------------------------------------------------------------------------------------------


@functools.cache
def _options(corpus: str, arm: str) -> Config:
    return settings.parse(["--stage=iterate", *FIXED, *CORPORA[corpus], *ARMS.get(arm, ()), "--evaluate.limit=0"])


def cell_config(cell: Cell, run_dir: Path) -> Config:
    """The settings of a cell."""
    config = _options(cell.corpus, cell.arm)
    rate = config.preference.learning_rate if cell.rate is None else cell.rate
    return dataclasses.replace(
        config,
        seed=cell.seed,
        iterations=cell.iterations or config.iterations,
        run_dir=run_dir,
        preference=dataclasses.replace(config.preference, learning_rate=rate),
        evaluate=dataclasses.replace(config.evaluate, split=cell.part),
    )


def run_cell(cell: Cell, output: Path) -> dict[str, Any]:
    """Runs what is not done yet of a cell; returns what is kept of it."""
    shared = _searched(cell, output)
    if cell.arm == NONE:
        return _summary(cell, shared, WARMUP, begun_from=None)
    config = cell_config(cell, output / cell.name)
    _copy_run(shared, config)
    _run_stage(config, "dpo", 1)
    for iteration in range(2, config.iterations + 1):
        for stage in ("score", "search", "dpo"):
            _run_stage(config, stage, iteration)
    return _summary(cell, config, phase_name(config.iterations), begun_from=shared)


def _searched(cell: Cell, output: Path) -> Config:
    """The run that a cell begins with: warm-up, scores and search of iteration 1; made unless it is there."""
    warmup = cell._replace(arm=NONE, rate=None)
    config = cell_config(warmup, output / warmup.name)
    _run_stage(config, "warmup", 1)
    _run_stage(config, "score", 1)
    _run_stage(config, "search", 1)
    if cell.arm not in OWN_SEARCH:
        return config
    own = cell._replace(rate=None)
    searched = cell_config(own, output / f"{own.corpus}_{own.arm}_search_{own.seed}")
    _copy_run(config, searched)
    _run_stage(searched, "search", 1)
    return searched


def _run_stage(config: Config, stage: Stage, iteration: int) -> None:
    main.run(dataclasses.replace(config, stage=stage, iteration=iteration))


def _copy_run(source: Config, target: Config) -> None:
    """Begins a run with copies of another's data, warm-up and iteration 1, each copied whole or not at all.

    Stages that run alone take the results of earlier ones as they are, though made under settings of another arm.
    """
    run_directory.save_or_check(target)
    for name in ("data", WARMUP, phase_name(1)):
        copy = target.run_dir / f"{name}.copy"
        if not (target.run_dir / name).exists():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source.run_dir / name, copy)
            copy.rename(target.run_dir / name)


def _summary(cell: Cell, config: Config, phase: str, begun_from: Config | None) -> dict[str, Any]:
    """What is kept of a cell, the marks of its last phase among it."""
    run = Run(config)
    part = run.splits.test if cell.part == "test" else run.splits.validation
    with run_directory.lock(config), use_mesh(config.mesh):
        run.phase(phase).cached(evaluate.step(config), run.policy(phase), part)
    rows = columns.read_table(results.results_file(config, phase), EvaluationRow, ["id", "correct", "categories"])
    rows = sorted(rows, key=lambda row: row.id)
    names = sorted({name for row in rows for name in row.categories}) if cell.arm == NONE else []
    figures = _figures(config)
    copied = _figures(begun_from) if begun_from else {}
    own = {name: values for name, values in figures.items() if name not in copied}
    return {
        "cell": cell._asdict(),
        "part": cell.part,
        "settings": run_directory.binding_settings(config),
        "seconds": round(sum(values["seconds"] for values in own.values()), 1),
        "figures": {name: _without(values, "after", "outputs") for name, values in figures.items()},
        "pairs_by_kind": _pairs_by_kind(run),
        "n": len(rows),
        "ids": hashlib.blake2b("\n".join(row.id for row in rows).encode(), digest_size=8).hexdigest(),
        "correct": pack([row.correct for row in rows]),
        "categories": {name: pack([name in row.categories for row in rows]) for name in names},
    }


def _figures(config: Config) -> dict[str, dict[str, Any]]:
    """The figures of all finished steps, by phase/step: prompts, pairs, steps of training, seconds."""
    phases = [WARMUP, *(phase_name(i) for i in range(1, config.iterations + 1))]
    steps = [(phase, path.stem) for phase in phases for path in sorted((config.run_dir / phase).glob("*.json"))]
    by_step = {f"{phase}/{step}": read_figures(config.run_dir, phase, step) for phase, step in steps}
    return {name: figures for name, figures in by_step.items() if figures is not None}


def _without(figures: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name not in names}


def _pairs_by_kind(run: Run) -> dict[str, dict[str, int]]:
    """Pairs of each iteration by the category of their prompts: calls, refusals, turns of a conversation, …"""
    kinds = {sample.id: sample.category for sample in run.splits.train.samples}
    counts = {}
    for phase in run.iterations():
        if (path := phase.folder / "pairs.jsonl").exists():
            count = Counter(kinds[row.tree] for row in columns.read_table(path, PreferenceRow, ["tree"]))
            counts[phase.name] = dict(sorted(count.items()))
    return counts


# Finished cells ---------------------------------------------------------------------------------------------


def pack(marks: Sequence[bool]) -> str:
    """Marks as hexadecimal digits, four a digit, the first in the highest bit, padded with zeros to whole bytes."""
    return np.packbits(np.asarray(marks, dtype=bool)).tobytes().hex()


def unpack(text: str, n: int) -> np.ndarray:
    """The n marks that `pack` wrote."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=n).astype(bool)


def read_results(folder: Path) -> dict[str, Result]:
    """The finished cells of a folder by name.

    Raises:
        ValueError: a cell is unknown, was created with settings that are different now, or has other samples than the
            cells of its part before it; names the file.
    """
    results: dict[str, Result] = {}
    ids: dict[tuple[str, str], str] = {}
    for path in sorted(folder.glob("*.json")):
        kept = read_json(path)
        cell = Cell(**kept["cell"])
        if cell.corpus not in CORPORA or cell.arm not in (NONE, *ARMS):
            raise ValueError(f"{path}: unknown corpus {cell.corpus} or arm {cell.arm}; move the file away")
        now = run_directory.binding_settings(cell_config(cell, path))
        changed = [name for name in now if kept["settings"].get(name) != now[name]]
        if changed or kept["settings"].keys() != now.keys():
            name = (changed or sorted(kept["settings"].keys() - now.keys()))[0]
            was, new = kept["settings"].get(name, "missing"), now.get(name, "missing")
            raise ValueError(
                f"{path} was created with {name}={was}, but it is now {new}; move it away to rerun the cell"
            )
        if ids.setdefault((cell.corpus, cell.part), kept["ids"]) != kept["ids"]:
            raise ValueError(f"{path} has other samples than the cells before it; move it away to rerun the cell")
        categories = {name: unpack(text, kept["n"]) for name, text in kept["categories"].items()}
        results[cell.name] = Result(cell, unpack(kept["correct"], kept["n"]), categories, kept["ids"], kept["seconds"])
    return results


# Tables -----------------------------------------------------------------------------------------------------


def report(results: Results) -> str:
    """Markdown of what the finished cells say: the rates that were chosen, and a table a corpus."""
    rates = chosen_rates(results)
    parts = [_development_table(results, rates)]
    parts += [table for corpus in REPORTED if (table := _corpus_table(corpus, results, rates))]
    return "\n\n".join(parts) + "\n"


def _development_table(results: Results, rates: Mapping[str, float]) -> str:
    seeds = " and ".join(map(str, DEVELOPMENT_SEEDS))
    lines = [
        f"Validation part, exact answers in %, mean over development seeds {seeds}; the chosen rate is bold:",
        "",
        f"| arm | {' | '.join(f'{rate:g}' for rate in RATES)} |",
        f"|---|{'---|' * len(RATES)}",
    ]
    for arm in ARMS:
        cells = []
        for rate in RATES:
            names = [Cell(DEVELOPED, arm, rate, seed).name for seed in DEVELOPMENT_SEEDS]
            values = [results[name].accuracy for name in names if name in results]
            text = f"{np.mean(values):.2f}" if len(values) == len(names) else "–"
            cells.append(f"**{text}**" if rates.get(arm) == rate else text)
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _corpus_table(corpus: str, results: Results, rates: Mapping[str, float]) -> str | None:
    """The arms that are finished for every seed whose warm-up is; None if no warm-up is finished."""
    finished_seeds = [seed for seed in REPORTED_SEEDS if Cell(corpus, NONE, None, seed).name in results]

    def by_seed(arm: str) -> list[Result] | None:
        cells = [Cell(corpus, arm, rates.get(arm), seed) for seed in finished_seeds]
        of_arm = [results[cell.name] for cell in cells if cell.name in results]
        return of_arm if len(of_arm) == len(cells) else None

    finished = {arm: rows for arm in (NONE, *REPORTED[corpus]) if (rows := by_seed(arm))}
    if NONE not in finished:
        return None
    warmup, arms = finished[NONE], [arm for arm in finished if arm != NONE]
    p_values = [
        {arm: paired_difference(finished[arm][i].correct.tolist(), warmup[i].correct.tolist()).p_value for arm in arms}
        for i in range(len(finished_seeds))
    ]
    adjusted = [holm(one_seed) for one_seed in p_values]
    heads = ["arm", "rate", "accuracy", "against the warm-up", f"against {SFT}"]
    heads += ["p by seed", "p by seed, Holm", "categories that fell"]
    seeds, n = ", ".join(map(str, finished_seeds)), len(warmup[0].correct)
    if len(finished_seeds) < len(REPORTED_SEEDS):
        seeds += f" (of {len(REPORTED_SEEDS)}; nothing is claimed before all are finished)"
    lines = [
        f"Corpus `{corpus}`, exact answers in % on the whole test part (n={n}), mean ± standard error over seeds",
        f"{seeds}; differences to the warm-up and to {SFT} in points, with their {100 * LEVEL:g} % interval, bold",
        "where it lies above 0; p is McNemar's, against the warm-up:",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        f"| {NONE} (the warm-up) | | {_accuracy(warmup)} | | | | | |",
    ]
    for arm in arms:
        against_sft = _difference(finished[arm], finished[SFT]) if SFT in finished and arm != SFT else ""
        columns_of_arm = [
            *(arm, f"{rates[arm]:g}", _accuracy(finished[arm])),
            *(_difference(finished[arm], warmup), against_sft),
            *(", ".join(_p_value(one_seed[arm]) for one_seed in by) for by in (p_values, adjusted)),
            ", ".join(fallen(finished[arm], warmup)) or "none",
        ]
        lines.append(f"| {' | '.join(columns_of_arm)} |")
    others = [arm for arm in arms if arm != DEFAULT]
    if DEFAULT in arms and others:
        differences = [f"{arm} {_difference(finished[DEFAULT], finished[arm])}" for arm in others]
        lines += ["", f"The default against the other arms, in points: {' · '.join(differences)}"]
    return "\n".join(lines)


def fallen(arm: Sequence[Result], warmup: Sequence[Result]) -> list[str]:
    """A text for each category in which an arm is below the warm-up: significantly, or by more than is tolerated."""
    texts = []
    for name in warmup[0].categories:
        if warmup[0].categories[name].any():
            difference = _bootstrap(arm, warmup, warmup[0].categories[name])
            if difference.high < 0 or difference.mean < -TOLERATED:
                texts.append(f"{name} {_points(difference)}")
    return texts


def _bootstrap(
    arm: Sequence[Result], other: Sequence[Result], where: np.ndarray | slice = slice(None)
) -> MeanDifference:
    """One arm against another, paired by seed and sample, on some of the samples."""
    pairs = zip(arm, other, strict=True)
    rows = [(a.correct[where].astype(int) - b.correct[where]).tolist() for a, b in pairs]
    return hierarchical_bootstrap(rows, level=LEVEL, draws=DRAWS)


def _difference(arm: Sequence[Result], other: Sequence[Result]) -> str:
    difference = _bootstrap(arm, other)
    return f"**{_points(difference)}**" if difference.low > 0 else _points(difference)


def _points(difference: MeanDifference) -> str:
    mean, low, high = (round(100 * value, 2) + 0.0 for value in difference)  # no -0.00
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def _accuracy(rows: Sequence[Result]) -> str:
    mean, error = mean_and_standard_error([row.accuracy for row in rows])
    return f"{mean:.2f} ± {error:.2f}"


def _p_value(p_value: float) -> str:
    return "<0.0001" if p_value < 0.0001 else f"{p_value:.4f}"


# The command ------------------------------------------------------------------------------------------------


def compute(s: Settings) -> None:
    """Runs the cells that are left, in order, and writes the table anew after each."""
    results = read_results(s.cells)
    _print_plan(results, s)
    while not s.plan and (cell := next((c for c in cells_left(results, s.only) if c.known), None)):
        print(f"{cell.name}: starting; {_left(cells_left(results, s.only), results)}", flush=True)
        kept = run_cell(cell, s.output)
        s.cells.mkdir(parents=True, exist_ok=True)
        write_json(s.cells / f"{cell.name}.json", kept)
        results = read_results(s.cells)
        _write_table(s.cells, results)
    if results and not s.plan:
        _write_table(s.cells, results)
    print(report(results))
    if unknown := [cell.arm for cell in cells_left(results, s.only) if not cell.known]:
        arms = ", ".join(dict.fromkeys(unknown))
        print(f"no learning rate chosen yet for {arms}: development cells not finished")


def _write_table(folder: Path, results: Results) -> None:
    with whole_file(folder / "TABLE.md") as file:
        file.write(report(results).encode())


def _print_plan(results: Results, s: Settings) -> None:
    cells = list(all_cells(chosen_rates(results)))
    left = cells_left(results, s.only)
    n_finished = sum(cell.name in results for cell in cells)
    print(f"{len(cells)} cells, {n_finished} finished; {_left(left, results)}")
    if s.plan:
        for cell in cells:
            state = "finished" if cell.name in results else "left" if cell in left else "not requested"
            print(f"    {cell.name:<40} {cell.part:<11} {state}")


def _left(cells: Sequence[Cell], results: Results) -> str:
    """How many cells are to be run, and how long they take."""
    seconds = seconds_left(cells, results)
    known = f"about {(seconds or 0) / 3600:.1f} hours"
    return f"{len(cells)} to run, {'time unknown: no cell of their kind is finished' if seconds is None else known}"


if __name__ == "__main__":
    keep_freed_memory()
    try:
        compute(tyro.cli(Settings, description=__doc__))
    except (PreemptionError, KeyboardInterrupt):
        raise SystemExit("Stopped on request. Rerun the same command to resume.") from None
