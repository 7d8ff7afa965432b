"""The benchmarks: suites on a tiny model, peers in their own processes, and the serial search they compare with."""

import dataclasses
import importlib.util
import json
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import attention, gpu, inputs, peers, real_lengths, run, scaling, serial
from benchmarks.memory import LLAMA
from benchmarks.protocol import Child, alternate, disagreement
from itool_jax.inference import sampler
from itool_jax.mcts.search import Problem, Response, SearchSettings, State, Step, search
from itool_jax.model import hf
from itool_jax.model.transformer import abstract
from itool_jax.planning import roofline
from itool_jax.text.chat import Chat, load_tokenizer
from itool_jax.text.padding import collate
from itool_jax.text.steps import build_step_table, split_steps
from tests.runs import make_samples

COMPARED = {"score": "hf", "search": "hf_serial"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[run.Row]:
    """The table of some suites, with Hugging Face as the peer where torch is installed, in this very environment."""
    folder = tmp_path_factory.mktemp("benchmarks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "python_of", lambda *_: Path(sys.executable))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(jax.config.jax_compilation_cache_dir))
        patch.delenv("XLA_FLAGS")
        settings = run.Settings(
            suite="score,search",
            small=True,
            rounds=1,
            peers=importlib.util.find_spec("torch") is not None,
            only="hf,hf_serial",
            work=folder,
            json=folder / "rows.json",
        )
        results = run.main(settings)
    assert json.loads((folder / "rows.json").read_text()) == results
    return results


@pytest.mark.benchmark
def test_each_suite_has_a_row_and_the_search_one_for_each_number_of_prompts(rows: list[run.Row]) -> None:
    assert [row["name"] for row in rows] == ["score", "search_1", "search"]
    keys = "name peer ours theirs ratio unit median spread device shapes agree rounds"
    assert all(list(row) == keys.split() for row in rows)
    for row in rows:
        assert len(row["rounds"]["ours"]) == 1
        assert 0 < row["spread"][0] <= row["median"] <= row["spread"][1]
        assert row["ours"] == pytest.approx(np.median(row["rounds"]["ours"]))
        assert run.line(row).split()[0] == row["name"]


@pytest.mark.benchmark
def test_peers_agree_before_they_are_timed(rows: list[run.Row]) -> None:
    pytest.importorskip("torch")
    compared = {row["name"]: row for row in rows if row["peer"]}
    assert {name: row["peer"] for name, row in compared.items()} == COMPARED
    for row in compared.values():
        assert 0 < row["agree"] < 1e-4
        assert row["ratio"] == pytest.approx(row["ours"] / np.median(row["rounds"]["theirs"]))


@pytest.mark.slow
def test_every_suite_of_ours_runs(tmp_path: Path) -> None:
    results = run.main(run.Settings(small=True, rounds=1, work=tmp_path))
    assert {row["name"].partition("_")[0] for row in results} >= {suite.partition("_")[0] for suite in run.SUITES}
    programs = next(row for row in results if row["name"] == "compile_programs")
    assert programs["ours"] > 0


# The protocol ------------------------------------------------------------------------------------------------


def test_a_child_that_dies_says_why(tmp_path: Path) -> None:
    with (
        Child(sys.executable, "benchmarks.nothing", tmp_path / "log", {}) as child,
        pytest.raises(RuntimeError, match=r"benchmarks\.nothing ended without an answer(.|\n)*No module named"),
    ):
        alternate([child], 1)


def test_disagreement_is_the_worst_error_of_what_both_sides_tell() -> None:
    ours = {"values": [2.0, 4.0, 9.0], "tokens": [[1, 2], [3]]}
    assert disagreement(ours, {"values": [2.0, 5.0]}) == {"values": pytest.approx(0.2)}
    assert disagreement(ours, {"tokens": [[1, 2], [4]]}) == {"tokens": 0.5}
    assert disagreement(ours, ours) == {"values": 0.0, "tokens": 0.0}


@pytest.mark.parametrize("wrong", [{"suite": "score,speed"}, {"only": "hf,none"}, {"rounds": 0}])
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        run.Settings(**wrong)


# The serial search -------------------------------------------------------------------------------------------

GOLD = [[7, 8], [9], [10, 0]]
STOP = 0
SIZES = {"breadth": 3, "max_depth": 3, "n_simulations": 24, "max_step_tokens": 4, "max_last_step_tokens": 6}


def number(*values: Any) -> float:
    """Between 0 and 1, the same for the same values."""
    return zlib.crc32(repr(values).encode()) / 2**32


def step_of(path: list[int], limit: int, candidate: int) -> list[int]:
    step = [1 + int(6 * number(path, candidate, t)) for t in range(1 + int(2 * number(path, candidate)))]
    return [*step, STOP] if number("stop", path, candidate) < 0.2 else step[:limit]


def log_prob(path: list[int], step: list[int]) -> float:
    return -len(step) * (0.1 + number("p", path, step))


def test_serial_and_batched_search_build_the_same_tree() -> None:
    model = serial.Model(
        lambda path, limit, _, candidate: step_of(path, limit, candidate),
        log_prob,
        lambda path: number("judge", path),
        lambda path, finished: 1.0 if finished and number("grade", path) < 0.5 else -1.0,
    )
    root = serial.search(GOLD, [STOP], model, serial.SerialSettings(**SIZES))

    class Toy:
        def propose(self, states: Sequence[State]) -> list[list[Step]]:
            return [[self.step(state, step) for step in self.candidates(state)] for state in states]

        def candidates(self, state: State) -> list[list[int]]:
            sampled = [step_of(state.response, state.limit, w) for w in range(SIZES["breadth"])]
            return [*sampled, state.gold_step] if state.gold_step else sampled

        def step(self, state: State, step: list[int]) -> Step:
            return Step(step, log_prob(state.response, step), STOP in step, sampled=step != state.gold_step)

        def judge(self, responses: Sequence[Response]) -> list[float]:
            return [model.judge(response.token_ids) for response in responses]

        def grade(self, _: int, turn: int, response: list[int], stopped: bool) -> float:
            return model.grade(response, stopped)

    (finished,) = search(
        [Problem("p", GOLD)], Toy(), SearchSettings(batch=1, inject_gold="always", exploration=1.0, **SIZES)
    )
    tree = finished.tree
    assert serial.nodes_below(root) == tree.n_nodes - 1 > 20

    def compare(node: serial.Node, n: int) -> None:
        assert node.visits == tree.visit_count_N[n]
        assert node.value == pytest.approx(tree.value_N[n], abs=1e-4)
        if n:  # no edge leads to the root
            assert node.q == pytest.approx(tree.q_value_N[n], abs=1e-4)
        ids = [i for i in tree.children_NW[n].tolist() if i >= 0]
        for child, i in zip(node.children, ids, strict=True):
            assert child.path[len(node.path) :] == finished.steps[i]
            compare(child, i)

    compare(root, 0)


@pytest.mark.parametrize(
    "text", ['[f(a="x"), g(b=[1, 2]), h()]', "It works. Does it? Yes", "[f(a=\"not ), here\", b='it\\'s'), g(a=(1))]"]
)
def test_steps_end_in_decoded_text_where_they_end_in_token_ids(text: str, tiny_folder: Path) -> None:
    chat = Chat(load_tokenizer(str(tiny_folder)))
    ids = chat.encode(text)
    table = build_step_table(chat.tokenizer, "call", len(chat.tokenizer), chat.stop_ids)
    steps: list[list[int]] = [[]]
    for i, token in enumerate(ids):
        steps[-1].append(token)
        if serial.ends_step(chat.tokenizer.decode(ids[: i + 1 - len(steps[-1])]), chat.tokenizer.decode(steps[-1])):
            steps.append([])
    assert [step for step in steps if step] == split_steps(table, ids)
    assert len(steps) > 2


# The inputs --------------------------------------------------------------------------------------------------


def test_search_prompts_have_one_length_and_gold_in_steps(tmp_path: Path) -> None:
    *_, path = inputs.tasks(tmp_path, "search", small=True)
    task = json.loads(path.read_text())
    assert [len(problem["prompt_ids"]) for problem in task["problems"]] == [64] * task["sizes"]["rows"]
    for problem in task["problems"]:
        assert [t for step in problem["gold_steps"] for t in step] == problem["target_ids"]
        assert problem["target_ids"][-1] in task["stop_ids"]


# Other benchmarks --------------------------------------------------------------------------------------------


def test_operations_are_those_of_the_compiled_program(tmp_path: Path) -> None:
    """The counts of the roofline against XLA's own, which also has what is no matrix product."""
    config = hf.read_config(inputs.checkpoint(tmp_path, "tiny"), "float32")
    config = dataclasses.replace(config, stacked=False)
    graph, params, _ = abstract(config)
    rows, length, targets = 4, 64, 32
    batch = collate([([1] * targets, [2] * targets)] * rows, length, rows)
    counted = sampler.score.lower(graph, params, batch).compile().cost_analysis()["flops"]
    expected = roofline.forward(config, rows, length, targets).flops
    assert expected < counted < 1.5 * expected
    one, two = (roofline.lora_step(config, n, length, targets).flops for n in (1, 2))
    assert two == pytest.approx(2 * one)
    assert one > 2 * roofline.forward(config, 1, length, targets).flops


def test_decoding_reads_a_prompt_once_whatever_its_rows() -> None:
    shared, alone = roofline.decode(LLAMA, 192, 1000, 64), roofline.decode(LLAMA, 192, 1000)
    assert alone.bytes - shared.bytes == pytest.approx(128 * 1000 * 131072)  # 128 KiB a token
    assert shared.flops == alone.flops
    weights = roofline.layer_weights(LLAMA) + 4096 * 128256
    assert weights == pytest.approx(7.5e9, rel=0.01)
    assert roofline.decode(LLAMA, 1, 0).bytes == 2 * weights


@pytest.mark.slow
def test_the_accelerator_script_measures_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main(gpu.Settings(small=True, rounds=1, json=tmp_path / "g.json"))
    rows = json.loads((tmp_path / "g.json").read_text())
    names = ["decode, batch 1", "decode, batch 2", "prefill", "scoring", "LoRA SFT", "LoRA DPO", "search"]
    assert [row["name"] for row in rows] == names
    assert all(row["rate"] > 0 for row in rows)
    assert all((row["share"] is None) == (row["name"] == "search") for row in rows)
    assert "with and without cache" in capsys.readouterr().out
    attention.main(attention.Settings(small=True, caches=2))
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "differs from ours" in line]
    assert [line[0] for line in lines] == ["ours", "a", "the", "sums", "jax.nn,"]
    assert all(float(line[-1]) < 0.02 for line in lines)


def test_slopes_on_log_axes() -> None:
    assert scaling.slope((1, 2, 8), [3.0, 6.0, 24.0]) == pytest.approx(1)
    assert scaling.slope((1, 2, 8), [3.0, 3.0, 3.0]) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_a_search_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    rows = scaling.main(
        scaling.Settings(prompts=(2, 3), length=(64,), breadth=(2,), simulations=(2,), batch=2, json=tmp_path / "s")
    )
    assert [row["size"] for row in rows if "size" in row] == [2, 3, 64, 2, 2]
    assert all(row["states"] > 0 and row["megabytes"] > 0 for row in rows if "size" in row)


@pytest.mark.slow
def test_real_commands_are_measured_with_an_empty_and_a_full_cache(tmp_path: Path, tiny_folder: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in make_samples() if row["target"].count("f") == 1))
    settings = real_lengths.Settings(
        data=data,
        model=str(tiny_folder),
        rows=3,
        answers=2,
        max_tokens=4,
        train=3,
        pairs=2,
        searched=1,
        transformers=all(map(importlib.util.find_spec, ("torch", "peft"))),
        json=tmp_path / "rows.json",
    )
    rows = real_lengths.main(settings)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    by_work = {(row["work"], row["side"]): row for row in rows}
    for work in real_lengths.WORKS:
        empty, full = by_work[work, "ours, empty"], by_work[work, "ours, full"]
        assert 0 < full["cpu_seconds"] < empty["cpu_seconds"]
        assert full["of_the_model"] == empty["of_the_model"] > 0
        assert ((work, "transformers") in by_work) == (settings.transformers and work != "search")
        assert ("agree" in full) == ((work, "transformers") in by_work)
