"""The stages through the command line: a whole run of a tiny model, end to end.

The run is that of `runs.make_or_read`; the tests read it, or go on from a copy.
"""

import dataclasses
import gc
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from itool_jax import config as settings
from itool_jax.data.sources import load
from itool_jax.evaluation import results
from itool_jax.evaluation.summary import COLUMNS, SEARCH_KEYS
from itool_jax.model import stacking
from itool_jax.stages import dpo
from itool_jax.store.tables import ReferenceRow
from itool_jax.store.weights import Weights, restore_trained
from itool_jax.system.files import write_jsonl
from itool_jax.training import loop as train
from itool_jax.training.replay import is_drawn, split
from tests.conftest import read
from tests.runs import (
    BREADTH,
    DEPTH,
    ITERATIONS,
    PHASES,
    SIMULATIONS,
    STEP_FILES,
    WATCHED,
    Made,
    Row,
    again,
    copy_run,
    rewrite_config,
)

pytestmark = pytest.mark.usefixtures("restored_jax_settings")


def test_a_run_leaves_all_its_files(made: Made):
    expected = {"config.yaml", "summary.json", "metrics.jsonl", ".lock", "log.jsonl", "environment.json"}
    expected |= {"report.html"}
    expected |= {f"data/{part}.jsonl" for part in ("train", "validation", "test")}
    expected |= {"data/sources.json", "data/card.json"}
    expected |= {f"{phase}/evaluation_test_all.{kind}" for phase in PHASES for kind in ("json", "jsonl")}
    expected |= {f"{phase}/{WATCHED}.{kind}" for phase in PHASES[1:] for kind in ("json", "jsonl")}
    expected |= {"warmup/warmup.json"}
    for phase in PHASES[2:]:
        expected |= {
            f"{phase}/{name}" for name in (*STEP_FILES, "score.json", "search.json", "reference.json", "dpo.json")
        }
    files = {str(path.relative_to(made.folder)) for path in made.folder.rglob("*") if path.is_file()}
    assert {name for name in files if "/weights/" not in name} == expected
    assert [p for p in PHASES if (made.folder / p / "weights").is_dir()] == PHASES[1:]
    assert yaml.safe_load((made.folder / "config.yaml").read_text())["search.breadth"] == BREADTH


def test_every_sample_is_in_one_part_and_reads_back(made: Made):
    parts = {part: read(made.folder / f"data/{part}.jsonl") for part in ("train", "validation", "test")}
    assert sorted(row["id"] for rows in parts.values() for row in rows) == sorted(row["id"] for row in made.samples)
    assert all(parts.values())
    given = {row["id"]: row for row in made.samples}
    for row in parts["train"]:
        assert (row["messages"], row["target"]) == (given[row["id"]]["messages"], given[row["id"]]["target"])


def test_the_hardest_of_the_buffer_are_searched(made: Made):
    buffer = [s.id for s in split(load(made.folder / "data/train.jsonl"), 0.8, "replay", 0)[1]]
    targets = {row["id"]: row["target"] for row in made.samples}
    for phase in PHASES[2:]:
        scores = read(made.folder / phase / "scores.jsonl")
        assert sorted(row["id"] for row in scores) == sorted(buffer)
        ranked = sorted((row for row in scores if row["rank"] is not None), key=lambda row: row["rank"])
        assert [row["rank"] for row in ranked] == list(range(len(ranked)))
        for is_call in (True, False):
            kind = [row for row in scores if targets[row["id"]].startswith("[") == is_call]
            taken = [row["perplexity"] for row in ranked if row in kind]
            left = [row["perplexity"] for row in kind if row["rank"] is None]
            assert len(taken) == max(1, round(0.4 * len(kind)))
            assert min(taken) > max(left)
            assert taken == sorted(taken, reverse=True)
        trees = read(made.folder / phase / "trees.jsonl")
        assert sorted(tree["id"] for tree in trees) == sorted(row["id"] for row in ranked)


def test_trees_obey_their_invariants(made: Made):
    for phase in PHASES[2:]:
        for tree in read(made.folder / phase / "trees.jsonl"):
            nodes = tree["nodes"]
            assert nodes[0]["visits"] == SIMULATIONS + 1  # the walk down the gold
            assert [node["node"] for node in nodes] == list(range(len(nodes)))
            for node in nodes:
                children = [child for child in nodes if child["parent"] == node["node"] and child is not nodes[0]]
                assert node["depth"] <= DEPTH
                assert len(children) <= BREADTH + 1
                assert len({tuple(child["token_ids"]) for child in children}) == len(children)
                if children and node["visits"]:
                    assert node["visits"] == sum(child["visits"] for child in children)
                    assert not node["terminal"]
                assert made.chat.tokenizer.decode(node["token_ids"]) == node["text"]
            # The gold's steps are among the candidates, and so is a response that is right.
            assert max(node["outcome"] for node in nodes) == 1


def test_pairs_are_what_trainers_read_and_agree_with_their_trees(made: Made):
    samples, decode = {row["id"]: row for row in made.samples}, made.chat.tokenizer.decode
    for number, phase in enumerate(PHASES[2:], 1):
        trees = {tree["id"]: tree["nodes"] for tree in read(made.folder / phase / "trees.jsonl")}
        pairs = read(made.folder / phase / "pairs.jsonl")
        assert len(pairs) >= len(trees) // 2
        assert len({pair["id"] for pair in pairs}) == len(pairs)
        for pair in pairs:
            nodes, sample = trees[pair["tree"]], samples[pair["tree"]]
            assert pair["id"] == f"{pair['tree']}/{number}/{pair['node']}"
            path, node = [], pair["node"]
            while node:
                path, node = nodes[node]["token_ids"] + path, nodes[node]["parent"]
            asked = made.chat.prompt_ids(sample["messages"], read_tools(made, sample["id"]))
            assert pair["prompt_ids"] == asked + path
            for side in ("chosen", "rejected"):
                child = nodes[pair[f"{side}_node"]]
                assert child["parent"] == pair["node"]
                assert pair[f"{side}_ids"] == child["token_ids"]
                assert pair[f"visits_{side}"] == child["visits"]
                assert pair[side] == decode(pair[f"{side}_ids"])
                assert child["terminal"] or child["visits"] > 0
                ends = [t in made.chat.stop_ids for t in pair[f"{side}_ids"]]
                assert not any(ends[:-1])
                assert child["terminal"] or not ends[-1]
            assert pair["prompt"] == decode(pair["prompt_ids"])
            whole = decode(pair["prompt_ids"] + pair["chosen_ids"])
            assert whole.startswith(pair["prompt"])
            assert pair["chosen"] != pair["rejected"]
            assert pair["q_chosen"] - pair["q_rejected"] >= 0.1 - 1e-5


def read_tools(made: Made, sample_id: str) -> list[Row]:
    """The tools of a training sample as the run saw them."""
    return next(row["tools"] for row in read(made.folder / "data/train.jsonl") if row["id"] == sample_id)


def test_the_summary_has_its_fixed_shape(made: Made):
    summary = json.loads((made.folder / "summary.json").read_text())
    fixed = ["finished", "seed", "model", "data", "device", "phases", "search"]
    assert [key for key in fixed if key not in summary] == []
    assert set(summary) - set(fixed) == {"split", "comparisons", "benchmark", "training"}
    assert summary["benchmark"] is None  # none was chosen
    assert summary["finished"] is True
    assert (summary["seed"], summary["device"]) == (0, jax.devices()[0].device_kind)
    assert f"--model={summary['model']}" in made.settings
    assert f"--data={summary['data']}" in made.settings
    n_test = len(read(made.folder / "data/test.jsonl"))
    assert [phase["name"] for phase in summary["phases"]] == PHASES
    for phase in summary["phases"]:
        assert set(phase) == {"name", "accuracy", "n", "standard_error", "seconds"}
        for name in ("accuracy", "n", "standard_error"):
            assert set(phase[name]) == set(results.CATEGORIES)
        assert phase["n"]["overall"] == n_test == sum(phase["n"][n] for n in ("easy", "medium", "hard", "irrelevance"))
        rows = read(made.folder / phase["name"] / "evaluation_test_all.jsonl")
        for name, accuracy in phase["accuracy"].items():
            marks = [row["correct"] for row in rows if name in ("overall", *row["categories"])]
            if not marks:
                assert accuracy is None
                continue
            assert accuracy == pytest.approx(sum(marks) / len(marks))
            assert phase["standard_error"][name] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / len(marks)))
        assert phase["seconds"] > 0
    assert [row["iteration"] for row in summary["search"]] == list(range(1, ITERATIONS + 1))
    for row, phase in zip(summary["search"], PHASES[2:], strict=True):
        assert set(row) == {"iteration", *SEARCH_KEYS, *results.SEARCH_FIGURES, *results.ABILITY_FIGURES}
        trees = read(made.folder / phase / "trees.jsonl")
        assert row["prompts"] == row["trees"] == len(trees)
        assert row["pairs"] == len(read(made.folder / phase / "pairs.jsonl"))
        sampled = sum(len(node["token_ids"]) for tree in trees for node in tree["nodes"])
        assert row["generated_tokens"] > sampled / 3


def test_the_table_says_the_same(made: Made):
    summary = json.loads((made.folder / "summary.json").read_text())
    lines = [line for line in made.output.splitlines() if " against " not in line]
    for phase in summary["phases"]:
        shown = [line for line in lines if line.startswith(f"{phase['name']} ") and "±" in line]
        assert f"{100 * phase['accuracy']['overall']:.1f}±" in shown[0]
        assert len(shown) == -(-sum(count > 0 for count in phase["n"].values()) // COLUMNS)
        assert max(map(len, shown)) <= 80
    for row in summary["comparisons"]:
        assert f"{row['phase']} against {row['against']}: {row['text']}\n" in made.output
    pairs = {(row["phase"], row["against"]) for row in summary["comparisons"]}
    assert ("warmup", "base") in pairs
    assert (PHASES[-1], "warmup") in pairs


def test_a_model_text_that_is_no_call_is_wrong_and_nothing_worse(made: Made):
    rows = read(made.folder / "base/evaluation_test_all.jsonl")
    assert all(row["target"] for row in rows)
    assert any(not row["finished"] for row in rows)  # the tiny model babbles
    assert not any(row["correct"] for row in rows if row["target"].startswith("["))
    assert not any(row["correct"] for row in rows if not row["finished"])


def test_the_first_step_of_each_iteration_has_a_dpo_loss_of_ln_2(made: Made):
    metrics = read(made.folder / "metrics.jsonl")
    for phase in PHASES[2:]:
        steps = [row for row in metrics if row["stage"] == phase]
        assert [row["step"] for row in steps] == list(range(1, len(steps) + 1))
        assert len(steps) > 1
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert steps[0]["reward_margin"] == pytest.approx(0, abs=1e-4)
        assert steps[-1]["loss"] < math.log(2) - 1e-4


def test_a_search_without_pairs_leaves_the_policy_as_it_is(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = copy_run(made, tmp_path)
    for name in ("trees.jsonl", "pairs.jsonl", "search.json", "dpo.json", "evaluation_test_all.json"):
        (folder / "iteration_2" / name).unlink()
    changes = rewrite_config(folder, pairs__min_q_gap=10.0)
    assert again(made, folder, *changes) == 0
    assert "the search found no pairs; keeping the policy" in capsys.readouterr().err
    assert read(folder / "iteration_2/pairs.jsonl") == []
    responses = [read(folder / f"iteration_{i}/evaluation_test_all.jsonl") for i in (1, 2)]
    assert responses[0] == responses[1]
    assert responses[1] != read(made.folder / "iteration_2/evaluation_test_all.jsonl")


def test_the_control_takes_as_many_steps_on_the_gold_of_the_same_prompts(made: Made, tmp_path: Path):
    folder = copy_run(made, tmp_path)
    (folder / "iteration_2/dpo.json").unlink()
    changes = rewrite_config(folder, preference__control="sft_same_prompts")
    assert again(made, folder, *changes, "--iteration=2", stage="dpo") == 0
    ours, theirs = (json.loads((f / "iteration_2/dpo.json").read_text()) for f in (folder, made.folder))
    assert (ours["pairs"], ours["steps"]) == (theirs["pairs"], theirs["steps"])
    steps = [row for row in read(folder / "metrics.jsonl") if row["stage"] == "iteration_2"]
    assert len(steps) == ours["steps"]
    assert steps[0]["loss"] > 1.5  # nats a token of the gold response, not ln 2
    assert "reward_margin" not in steps[0]


def trained_again(made: Made, tmp_path: Path, **changes: Any) -> tuple[Path, Row, list[Row]]:
    """The preference training of iteration 2 with other settings: the run, its figures, and the metrics by step."""
    folder = copy_run(made, tmp_path)
    arguments = rewrite_config(folder, **changes)
    assert again(made, folder, *arguments, "--iteration=2", stage="dpo") == 0
    steps = [row for row in read(folder / "metrics.jsonl") if row["stage"] == "iteration_2"]
    return folder, json.loads((folder / "iteration_2/dpo.json").read_text()), steps


def test_held_out_pairs_by_hand():
    before = [ReferenceRow("a", -10.0, -12.0), ReferenceRow("b", -8.0, -7.0)]
    after = [ReferenceRow("a", -9.0, -14.0), ReferenceRow("b", -7.0, -8.0)]
    assert dpo.compare_held_out(before, after) == {
        **{"pairs": 2, "margin_before": 0.5, "margin_after": 3.0},
        **{"accuracy_before": 0.5, "accuracy_after": 1.0, "delta": 2.5},
    }
    none = dpo.compare_held_out([], [])
    assert none.pop("pairs") == 0
    assert set(none.values()) == {None}


@pytest.mark.parametrize("loss", ["dpo", "chosen_steps"])
def test_pairs_of_some_prompts_are_held_out_and_measured(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: str
):
    pairs = read(made.folder / "iteration_2/pairs.jsonl")
    held_out = [pair["id"] for pair in pairs if is_drawn(pair["tree"], 0.5, "held_out", 0)]
    assert 0 < len(held_out) < len(pairs)
    changes = {"preference__learning_rate": 1e-2, "preference__epochs": 5}
    _, figures, steps = trained_again(made, tmp_path, preference__loss=loss, pairs__held_out=0.5, **changes)
    assert figures["pairs"] == len(pairs) - len(held_out)
    assert len(steps) == 5 * -(-figures["pairs"] // 8)
    measured = figures["held_out"]
    margins = [
        row["chosen"] - row["rejected"]
        for row in read(made.folder / "iteration_2/reference.jsonl")
        if row["id"] in held_out
    ]
    assert measured["pairs"] == len(held_out)
    assert measured["margin_before"] == pytest.approx(sum(margins) / len(margins), abs=1e-4)
    assert measured["accuracy_before"] == sum(margin > 0 for margin in margins) / len(margins)
    assert measured["delta"] == pytest.approx(measured["margin_after"] - measured["margin_before"])
    assert abs(measured["delta"]) > 0.01
    assert f"iteration_2: {len(held_out)} held-out pairs: margin {measured['margin_before']:.2f} → " in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("count", [None, 3, 200])
def test_chosen_steps_and_own_answers_are_fine_tuned_on_for_as_many_steps(
    made: Made, tmp_path: Path, count: int | None
):
    """All pairs in one batch: the first loss is the mean over tokens, from the log-probs that the reference gave.

    None is `chosen_steps`; else `raft` with so many answers, the chosen steps themselves. Dropout is set, and is off.
    """
    pairs = read(made.folder / "iteration_2/pairs.jsonl")
    log_probs = {row["id"]: row["chosen"] for row in read(made.folder / "iteration_2/reference.jsonl")}
    changes = {"preference__loss": "raft" if count else "chosen_steps", "preference__batch_size": 64}
    source = copy_run(made, tmp_path / "source")
    answers = [
        {"id": pair["id"], "tree": pair["tree"], "prompt_ids": pair["prompt_ids"], "answer_ids": pair["chosen_ids"]}
        for pair in (pairs * 20)[:count]
    ]
    write_jsonl(source / "iteration_2/answers.jsonl", answers if count else [])
    given = made._replace(folder=source)
    _, figures, steps = trained_again(given, tmp_path, **changes, lora__dropout=0.9, pairs__held_out=0.0)
    assert (figures["pairs"], len(steps)) == (len(pairs), figures["steps"]) == (len(pairs), 2)
    assert len(pairs) <= 64
    assert "reward_margin" not in steps[0]
    assert steps[1]["loss"] < steps[0]["loss"]
    if count is None:
        targets = [(log_probs[pair["id"]], len(pair["chosen_ids"])) for pair in pairs]
        sums = [sum(column) for column in zip(*targets, strict=True)]
        assert steps[0]["loss"] == pytest.approx(-sums[0] / sums[1], rel=1e-4)


@pytest.mark.parametrize("loss", ["simpo", "chosen_steps"])
def test_the_swapped_control_exchanges_half_of_the_pairs(made: Made, tmp_path: Path, loss: str):
    """All pairs in one batch: the first loss by hand, from the log-probs that the reference gave."""
    pairs = read(made.folder / "iteration_2/pairs.jsonl")
    log_probs = {row["id"]: row for row in read(made.folder / "iteration_2/reference.jsonl")}
    changes = {"preference__loss": loss, "preference__control": "swapped", "preference__batch_size": 64}
    _, figures, steps = trained_again(made, tmp_path, **changes, pairs__held_out=0.0)
    assert (figures["pairs"], len(steps)) == (len(pairs), 2)
    sides = [("chosen", "rejected")[:: -1 if is_drawn(pair["id"], 0.5, "swapped", 0) else 1] for pair in pairs]
    assert len(pairs) / 4 < sum(chosen == "rejected" for chosen, _ in sides) < len(pairs) * 3 / 4
    both = list(zip(pairs, sides, strict=True))
    sums = [[log_probs[pair["id"]][side] for side in both_sides] for pair, both_sides in both]
    lengths = [[len(pair[f"{side}_ids"]) for side in both_sides] for pair, both_sides in both]
    expected = -sum(w for w, _ in sums) / sum(n for n, _ in lengths)
    if loss == "simpo":
        gaps = [w / m - x / n for (w, x), (m, n) in zip(sums, lengths, strict=True)]
        expected = sum(math.log1p(math.exp(-(2.5 * gap - 0.5))) for gap in gaps) / len(pairs)
    assert steps[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_the_reference_may_stay_the_warm_ups(made: Made, tmp_path: Path):
    """In iteration 2 its log-probs are not those of the policy that training starts from: the first Δ is not 0."""
    changes = {"preference__batch_size": 64, "pairs__held_out": 0.0, "preference__beta": 1.0}
    folder, _, steps = trained_again(made, tmp_path, preference__reference="warmup", **changes)
    fixed, began = ({row["id"]: row for row in read(f / "iteration_2/reference.jsonl")} for f in (folder, made.folder))
    gaps = [
        (began[name]["chosen"] - row["chosen"]) - (began[name]["rejected"] - row["rejected"])
        for name, row in fixed.items()
    ]
    assert max(map(abs, gaps)) > 0.01
    expected = sum(math.log1p(math.exp(-gap)) for gap in gaps) / len(gaps)
    assert steps[0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert steps[0]["reward_margin"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-4)


def test_without_own_answers_raft_leaves_the_policy_as_it_is(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = copy_run(made, tmp_path / "source")
    write_jsonl(source / "iteration_2/answers.jsonl", [])
    _, figures, _ = trained_again(made._replace(folder=source), tmp_path, preference__loss="raft")
    assert "iteration_2: the trees hold no right answer by the model itself; keeping" in capsys.readouterr().err
    assert figures["steps"] == 0
    assert figures["weights"] == json.loads((made.folder / "iteration_1/dpo.json").read_text())["weights"]


def test_adapters_are_merged_when_an_iteration_begins(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Policies are the base and all adapters up to them, each iteration's trained from new ones; exported, too."""
    folder = tmp_path / "run"
    assert again(made, folder, "--preference.merge", "--evaluate.limit=4") == 0
    for phase in PHASES[2:]:
        steps = [row for row in read(folder / "metrics.jsonl") if row["stage"] == phase]
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # scored and trained is the same policy
        assert steps[-1]["loss"] < math.log(2) - 1e-4
    config = settings.parse(["--stage=dpo", f"--run_dir={folder}", *made.settings, "--preference.merge"])
    weights = Weights(config)
    base, ours = (weights.policy(phase).params for phase in ("base", "iteration_2"))
    adapters = [stacking.to_run(restore_trained(config, phase)) for phase in PHASES[1:]]
    checked = 0
    for path, kernel in jax.tree.leaves_with_path(ours):
        keys = [part.key for part in path]
        changes = [part for part in (leaf_at(tree, keys[:-1]) for tree in adapters) if part and "lora_a" in part]
        expected = np.asarray(leaf_at(base, keys), np.float64)
        if keys[-1] == "kernel" and changes:
            assert len(changes) == len(PHASES) - 1
            for part in changes:
                expected = expected + 16.0 * np.asarray(part["lora_a"], np.float64) @ np.asarray(part["lora_b"])
            checked += 1
        np.testing.assert_allclose(kernel, expected, atol=1e-5)
    assert checked == 14  # two layers' linear ones
    assert again(made, folder, "--preference.merge", f"--output={tmp_path / 'model'}", stage="export") == 0
    exported = Weights(dataclasses.replace(config, model=str(tmp_path / "model"))).base(stacked=False)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), exported, ours)
    capsys.readouterr()
    adapter = ("--preference.merge", "--export.kind=adapter", f"--output={tmp_path / 'adapter'}")
    assert again(made, folder, *adapter, stage="export") != 0
    assert "export.kind=adapter: with preference.merge, the adapters of iteration_2" in capsys.readouterr().err
    assert again(made, folder, *adapter, "--export.phase=warmup", stage="export") == 0


def leaf_at(tree: Any, keys: list[Any]) -> Any:
    """What stands under the keys, None where there is nothing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


@pytest.mark.processes
def test_a_run_on_a_mesh_is_the_run_on_one_device(made: Made, tmp_path: Path):
    """Search, scores, training and responses: the same decisions, and numbers that differ by rounding alone."""
    folder = tmp_path / "run"
    assert again(made, folder, "--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2", "--iterations=1") == 0
    for name in ("pairs.jsonl", "scores.jsonl", "trees.jsonl"):
        ours, theirs = read(folder / "iteration_1" / name), read(made.folder / "iteration_1" / name)
        assert ours == [approximately(row) for row in theirs]
    for name in ("base", "warmup", "iteration_1"):
        results = [read(f / name / "evaluation_test_all.jsonl") for f in (folder, made.folder)]
        assert results[0] == results[1]
    ours, theirs = (read(f / "metrics.jsonl") for f in (folder, made.folder))
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs[: len(ours)]], rel=1e-4)


def approximately(value: Any) -> Any:
    """The value, its numbers with fractions only as near as rounding leaves them."""
    if isinstance(value, dict):
        return {key: approximately(part) for key, part in value.items()}
    if isinstance(value, list):
        return [approximately(part) for part in value]
    return pytest.approx(value, rel=1e-3, abs=1e-4) if isinstance(value, float) else value


def test_training_all_weights_holds_them_once(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Beside them their two moments, and nothing else of their size: no base, no copy to start from.

    A checkpoint copies them to the host, which is the device here, so none is made.
    """
    seen: list[int] = []
    step = train.train_step

    def spy(*arguments: Any) -> Any:
        seen.append(sum(x.nbytes for x in jax.live_arrays()))
        return step(*arguments)

    monkeypatch.setattr(train, "train_step", spy)
    gc.collect()
    before = sum(x.nbytes for x in jax.live_arrays())
    changes = "--lora.rank=0", "--warmup.checkpoint_every=1000"
    assert again(made, tmp_path / "run", *changes, stage="warmup") == 0
    config = settings.parse(["--stage=warmup", f"--run_dir={tmp_path / 'run'}", *made.settings, "--lora.rank=0"])
    weights = sum(x.nbytes for x in jax.tree.leaves(restore_trained(config, "warmup")))
    assert len(seen) > 5
    assert 3 * weights <= max(seen) - before < 3.1 * weights


@pytest.mark.parametrize(
    "changes",
    [
        ("--quantize=nf4", "--warmup.micro_batch=4", "--preference.micro_batch=2"),
        pytest.param(
            ("--lora.rank=0", "--dtype=bfloat16", "--remat=dots", "--preference.learning_rate=1e-4"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["four bits", "all weights"],
)
def test_other_kinds_of_weights_go_all_the_way(made: Made, tmp_path: Path, changes: tuple[str, ...]):
    folder = tmp_path / "run"
    for stage in ("warmup", "score", "search", "dpo"):
        assert again(made, folder, *changes, stage=stage) == 0
    steps = [row for row in read(folder / "metrics.jsonl") if row["stage"] == "iteration_1"]
    # The policy that the reference was scored with is the one that training starts from, whatever its weights are.
    tolerance = 1e-2 if "--dtype=bfloat16" in changes else 1e-4
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=tolerance)
    assert steps[-1]["loss"] < steps[0]["loss"] - 1e-4
