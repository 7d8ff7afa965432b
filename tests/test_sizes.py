"""Sizes left to the device's memory: what fits is found and kept; where memory was too little, it says what to do."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from itool_jax import config as settings
from itool_jax.config import Config
from itool_jax.model.sharding import MeshSettings, use_mesh
from itool_jax.planning import memory, sizes
from itool_jax.stages import score, search
from itool_jax.store.run import Run
from itool_jax.training import loop as train
from tests.conftest import read
from tests.runs import Made, again, copy_run, rewrite_config

pytestmark = pytest.mark.usefixtures("restored_jax_settings")

BATCH = 8  # warmup.batch_size of the run that all share


def configured(made: Made, folder: Path, *changes: str) -> Config:
    return settings.parse(["--stage=iterate", f"--run_dir={folder}", *made.settings, *changes])


@pytest.fixture(scope="module")
def needs(made: Made) -> Callable[[str, int], float]:
    """Bytes of a size, in the shared run."""
    known: dict[tuple[str, int], float] = {}

    def need(name: str, size: int) -> float:
        if (name, size) not in known:
            known[name, size] = sizes.need_of(Run(configured(made, made.folder)), name)(size)
        return known[name, size]

    return need


def limit(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setenv(memory.LIMIT, str(size / 1e9))


# The search for what fits -----------------------------------------------------------------------------------


def test_the_largest_that_fits_is_found_with_few_compilations():
    candidates = [2**i for i in range(9)]
    for fixed, power, bound in itertools.product((0, 10, 1000), (0.5, 1, 1.5), (5, 11, 90, 1100, 1300, 9000)):
        asked: list[int] = []

        def need(size: int, fixed: int = fixed, power: float = power, asked: list[int] = asked) -> float:
            asked.append(size)
            return fixed + size**power

        fitting = [size for size in candidates if fixed + size**power <= bound]
        largest, tried = memory.largest(candidates, need, bound)
        assert largest == max(fitting, default=1)
        assert list(tried) == asked
        assert largest in tried
        assert len(asked) <= (1 if largest == candidates[-1] else 5)
        assert len(set(asked)) == len(asked)


def test_what_the_compiler_refuses_does_not_fit():
    needs = {8: float("inf"), 4: float("inf"), 2: 30.0, 1: 20.0}
    assert memory.largest(list(needs), needs.__getitem__, 40)[0] == 2
    assert memory.largest(list(needs), needs.__getitem__, 5)[0] == 1

    def refuse(size: int) -> memory.MemoryEstimate:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm" * (size > 1))

    assert sizes.total(refuse)(2) == float("inf")
    with pytest.raises(jax.errors.JaxRuntimeError):
        sizes.total(refuse)(1)


def test_a_device_has_what_it_says(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(memory.LIMIT, raising=False)
    assert 1e6 < memory.device_limit(0.9) < 1e13  # a share of the host's free memory
    limit(monkeypatch, 3e9)
    assert memory.device_limit(0.9) == 3_000_000_000


@pytest.mark.parametrize("name", list(sizes.STAGE_OF))
def test_larger_sizes_need_more(needs: Callable[[str, int], float], name: str):
    assert needs(name, 4) > 1.2 * needs(name, 2)


def test_a_search_is_given_room_for_its_widths(made: Made):
    """Each width of the real search is one that the estimate has room for."""
    config = configured(made, made.folder)
    run = Run(config)
    rows = run.splits.train.encoded
    lengths = sizes.search_lengths(run.base.chat, rows, config.search, config.self_eval)
    for iteration in (1, 2):
        for pair in read(made.folder / f"iteration_{iteration}/pairs.jsonl"):
            own = [len(pair[f"{side}_ids"]) for side in ("chosen", "rejected")]
            assert len(pair["prompt_ids"]) + sum(own) <= sizes.pair_width(config, rows)
            assert max(own) <= lengths.own
    assert max(len(row.prompt_ids) for row in rows) <= lengths.prompt <= lengths.asked


# auto, in a run ---------------------------------------------------------------------------------------------


def test_a_warm_up_takes_what_fits_and_keeps_to_it(
    made: Made,
    tmp_path: Path,
    needs: Callable[[str, int], float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    name = "warmup.micro_batch"
    limit(monkeypatch, (needs(name, 2) + needs(name, 4)) / 2)
    assert again(made, tmp_path / "run", f"--{name}=auto", stage="warmup") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if name in line]
    assert len(said) == 1
    assert said[0].startswith(f"{name}=auto: 2, which needs ")
    assert "; 4 would need " in said[0]
    assert json.loads((tmp_path / "run" / sizes.FILE).read_text()) == {name: 2}
    assert again(made, tmp_path / "other", f"--{name}=2", stage="warmup") == 0
    digests = [json.loads((tmp_path / d / "warmup/warmup.json").read_text())["weights"] for d in ("run", "other")]
    assert digests[0] == digests[1]
    limit(monkeypatch, 1e12)  # as if it went on on a larger device
    (tmp_path / "run/warmup/warmup.json").unlink()
    assert again(made, tmp_path / "run", f"--{name}=auto", stage="warmup") == 0
    assert "auto" not in capsys.readouterr().err
    assert json.loads((tmp_path / "run/warmup/warmup.json").read_text())["weights"] == digests[0]


def test_a_search_takes_what_fits_and_keeps_to_it(
    made: Made,
    tmp_path: Path,
    needs: Callable[[str, int], float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    folder, name = copy_run(made, tmp_path), "search.batch"
    auto = rewrite_config(folder, search__batch="auto")
    before = (folder / "iteration_1/trees.jsonl").read_bytes()
    for size in (needs(name, 4) * 1.01, 1e12):
        (folder / "iteration_1/search.json").unlink()
        limit(monkeypatch, size)
        assert again(made, folder, *auto, stage="search") == 0
        assert json.loads((folder / sizes.FILE).read_text()) == {name: 4}
        assert (folder / "iteration_1/trees.jsonl").read_bytes() == before
    err = capsys.readouterr().err
    assert err.count("search.batch=auto: 4, which needs ") == err.count("auto") == 1


def test_a_stage_that_does_not_fit_at_its_smallest_size_is_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = copy_run(made, tmp_path)
    (folder / sizes.FILE).unlink(missing_ok=True)
    monkeypatch.setattr(sizes, "need_of", lambda *_: lambda size: size * 1e9)
    limit(monkeypatch, 1e3)
    for size in ("auto", "2"):
        run = Run(configured(made, folder, f"--warmup.micro_batch={size}"))
        with pytest.raises(
            ValueError, match=r"^warmup does not fit: warmup.micro_batch=1 needs 1 GB of 1e-06 GB per device"
        ):
            (sizes.resolved if size == "auto" else sizes.lowered)(run)


def test_a_kept_size_that_another_mesh_cannot_share_out_is_found_again(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = copy_run(made, tmp_path)
    (folder / sizes.FILE).write_text(json.dumps({"warmup.micro_batch": 4}))
    monkeypatch.setattr(sizes, "need_of", lambda *_: lambda size: size)
    limit(monkeypatch, 1e12)
    run = Run(configured(made, folder, "--warmup.micro_batch=auto"))
    assert sizes.resolved(run).config.warmup.micro_batch == 4
    with use_mesh(MeshSettings(data=4)):
        assert sizes.resolved(run).config.warmup.micro_batch == 2  # all of a device's share
    (folder / sizes.FILE).write_text("{")
    with pytest.raises(ValueError, match=r"sizes.json is damaged"):
        sizes.resolved(run)


def test_all_processes_go_by_the_smallest_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(memory.multihost_utils, "process_allgather", lambda value: np.array([value, 5e8], np.float32))
    limit(monkeypatch, 1e9)
    assert memory.device_limit(0.9) == 500_000_000


@pytest.mark.parametrize("name", list(sizes.STAGE_OF))
def test_auto_is_a_word_of_the_command_line_and_of_yaml(tmp_path: Path, name: str):
    (tmp_path / "c.yaml").write_text(f"{name}: auto\n")
    for argument in (f"--{name}=auto", f"--config={tmp_path / 'c.yaml'}"):
        config = settings.parse(["--stage=iterate", "--model=m", argument])
        assert config.flat()[name] == "auto"
    for wrong in ("much", "-1", "1.5"):
        with pytest.raises(ValueError, match=name.replace("_", "[-_]")):
            settings.parse(["--stage=iterate", "--model=m", f"--{name}={wrong}"])


# Sizes as set -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(sizes.STAGE_OF))
def test_what_is_said_to_fit_without_compiling_does(made: Made, needs: Callable[[str, int], float], name: str):
    run = Run(configured(made, made.folder))
    for size in (2, 4):
        bounds = [program.bound(run.base.config) for program in sizes._plan_of_run(run, name)(size)]
        assert needs(name, size) < max(bounds) < 30 * needs(name, size)
    heavy = dataclasses.replace(run.base.config, vocab_size=100_000)  # its weights are most of what it needs
    for program in sizes._plan_of_run(run, name)(1):
        assert program.need(heavy).total < program.bound(heavy)


def test_sizes_that_fit_are_left_alone_and_nothing_is_compiled(made: Made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sizes, "need_of", None)
    run = Run(configured(made, made.folder))
    assert sizes.lowered(run).config == run.config


@pytest.mark.parametrize("name", list(sizes.STAGE_OF))
def test_sizes_that_do_not_fit_are_lowered(
    made: Made,
    needs: Callable[[str, int], float],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    before = 4 if name == "search.batch" else BATCH
    run = Run(configured(made, made.folder))
    monkeypatch.setattr(sizes, "STAGE_OF", {name: sizes.STAGE_OF[name]})
    limit(monkeypatch, 1.01 * needs(name, before))
    assert sizes.lowered(run).config == run.config
    limit(monkeypatch, 1.01 * needs(name, 2))
    assert sizes.lowered(run).config == sizes.with_size(run.config, name, 2)
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"{name} lowered from {before} to 2: {before} would need ")


def test_a_run_is_searched_again_with_another_batch(made: Made, tmp_path: Path):
    """The trees are the same but for rounding."""
    folder = copy_run(made, tmp_path)

    def trees() -> list[Any]:
        rows = read(folder / "iteration_1/trees.jsonl")
        return [
            [(node["parent"], node["text"], node["visits"], node["outcome"]) for node in row["nodes"]] for row in rows
        ]

    before = trees()
    (folder / "iteration_1/search.json").unlink()
    assert again(made, folder, "--search.batch=2", stage="search") == 0
    assert trees() == before


# Too little memory ------------------------------------------------------------------------------------------


def exhaust(*_: Any, **__: Any) -> Any:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")


@pytest.mark.parametrize(
    ("stage", "where", "fails", "advice"),
    [
        ("warmup", "warmup/warmup", (train, "train_step"), "lower warmup.micro_batch from 8 GB to 4 GB; or"),
        ("dpo", "iteration_1/dpo", (train, "train_step"), "lower preference.micro_batch from 8 GB to 4 GB; or"),
        (
            "search",
            "iteration_1/search",
            (search, "trees"),
            "lower search.batch from 4 GB to 2 GB; or",
        ),
        (
            "score",
            "iteration_1/score",
            (score, "target_log_probs"),
            "lower generate.tokens_per_batch from 1024 to 512; or",
        ),
    ],
)
def test_too_little_memory_is_one_line_of_advice(
    made: Made,
    tmp_path: Path,
    stage: str,
    where: str,
    fails: tuple[Any, str],
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    folder = copy_run(made, tmp_path)
    (folder / f"{where}.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(*fails, exhaust)
        if stage in ("warmup", "dpo"):  # the estimate wants what fails here
            need_of = sizes.need_of
            patch.setattr(sizes, "need_of", lambda *given: (patch.undo(), need_of(*given))[1])
        assert again(made, folder, stage=stage) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    estimates = re.findall(r" \(about ([\d.]+) GB per device\)", line)
    assert advice in re.sub(r" \(about [\d.]+ GB per device\)", " GB", line)
    assert f"error: out of device memory in {where} (RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.); " in line
    assert [float(x) for x in estimates] == sorted(map(float, estimates), reverse=True)
    assert len(estimates) == (0 if stage == "score" else 2)
    assert read(folder / "log.jsonl")[-1]["text"] == line


def test_where_a_size_cannot_be_smaller_or_nothing_can_be_estimated(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sizes, "need_of", exhaust)
    for size, words in ((1, "=1 is the smallest size;"), (2, " from 2 to 1; or")):
        config = configured(made, tmp_path, f"--warmup.micro_batch={size}")
        assert f"warmup.micro_batch{words} set remat" in sizes.advice(Run(config), "warmup/warmup", "")
    config = configured(made, tmp_path, "--warmup.micro_batch=8", "--mesh.data=2")
    with use_mesh(config.mesh):  # a device's share is less than what is set
        assert "lower warmup.micro_batch from 4 to 2; or" in sizes.advice(Run(config), "warmup/warmup", "")
