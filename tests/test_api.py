"""The library does what the stages do: the same answers, scores and trees, in a few lines."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

import itool_jax
from itool_jax.data.generated import make_sample
from itool_jax.main import main
from tests import tiny
from tests.conftest import REPOSITORY, read, write
from tests.runs import Made

pytestmark = pytest.mark.usefixtures("restored_jax_settings")

SAMPLE = {
    "id": "a",
    "messages": [tiny.USER],
    "tools": [tiny.TOOL],
    "target": {"role": "assistant", "tool_calls": [tiny.CALL]},
}


def test_importing_it_is_fast_and_names_what_there_is() -> None:
    code = "import sys, itool_jax; print('jax' in sys.modules, 'tyro' in sys.modules, *dir(itool_jax))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    words = printed.stdout.split()
    assert words[:2] == ["False", "False"]
    assert {"load", "Model", "Score", "SearchTree", "__version__"} <= set(words)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = itool_jax.lod
    assert (REPOSITORY / "itool_jax" / "py.typed").is_file()


@pytest.mark.embedded
def test_three_lines_search_with_the_shipped_model() -> None:
    model = itool_jax.load()
    tree = model.search(make_sample("validation", 40, 0), n_simulations=2, breadth=2, inject_gold=True)
    drawn = str(tree)
    assert drawn.startswith(f"validation-0-40: gold {tree.gold}\n")
    assert len(drawn.splitlines()) == len(tree.nodes)
    assert [mark for mark in ("[gold]", " Q=+", " O=+1") if mark not in drawn] == []
    row = json.loads(json.dumps(tree.to_dict()))
    assert row["nodes"][0]["parent"] == -1
    assert {"prompt", "chosen", "rejected"} <= {key for pair in tree.pairs for key in pair} or not tree.pairs


def test_a_model_answers_and_scores_as_the_stages_do(tiny_folder: Path, tmp_path: Path) -> None:
    model = itool_jax.load(tiny_folder, "--generate.max_tokens=9")
    data = write(tmp_path / "d.jsonl", [SAMPLE])
    common = [f"--model={tiny_folder}", f"--data={data}", "--generate.max_tokens=9"]
    assert main(["--stage=generate", f"--output={tmp_path / 'g.jsonl'}", *common]) == 0
    assert main(["--stage=score", f"--output={tmp_path / 's.jsonl'}", *common]) == 0
    answer = model.generate([tiny.USER], [tiny.TOOL])
    assert answer == read(tmp_path / "g.jsonl")[0]["text"]
    assert model.generate(["q", [tiny.USER]], [tiny.TOOL["function"]]) == [answer, answer]
    assert model.generate([]) == []
    (row,) = read(tmp_path / "s.jsonl")
    for target in ("[f(a=1)]", SAMPLE["target"]):
        score = model.score("q", target, [tiny.TOOL])
        assert score.n_tokens == row["n_tokens"]
        assert score.log_prob == pytest.approx(row["logprob_sum"], rel=1e-5)
        assert score.perplexity == pytest.approx(row["perplexity"], rel=1e-5)
    hot = [model.generate(["q", "r"], temperature=1.0, seed=seed) for seed in (0, 1, 0)]
    assert hot[0] == hot[2] != hot[1]
    assert model.generate("r", temperature=1.0, seed=1) == hot[1][1]


def test_a_run_directory_gives_the_trees_it_holds(made: Made) -> None:
    model = itool_jax.load(made.folder, phase="warmup")
    assert (model.phase, repr(model)) == ("warmup", f"<{model.config.model}, warmup: context of 1024 tokens>")
    kept = read(made.folder / "iteration_1" / "trees.jsonl")[:3]
    pairs = read(made.folder / "iteration_1" / "pairs.jsonl")
    rows = {row["id"]: row for row in read(made.folder / "data" / "train.jsonl")}
    trees = model.search([rows[tree["id"]] for tree in kept])
    assert model.search([]) == []
    for tree, expected in zip(trees, kept, strict=True):
        assert [node["text"] for node in tree.nodes] == [node["text"] for node in expected["nodes"]]
        assert [n["q"] for n in tree.nodes] == pytest.approx([n["q"] for n in expected["nodes"]], abs=1e-4)
        assert [p["id"] for p in tree.pairs] == [p["id"] for p in pairs if p["tree"] == tree.id]
    assert itool_jax.load(made.folder).phase == "iteration_2"
    assert itool_jax.load(made.folder, phase="base").phase == "base"


def test_errors_say_what_to_mend(tiny_folder: Path, made: Made, tmp_path: Path) -> None:
    for arguments, message in (
        (("none",), "model none"),
        ((tiny_folder, "--dtype=float8"), "dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            itool_jax.load(*arguments)
    with pytest.raises(ValueError, match=r"phase=warmup needs a run directory, but .* has no config"):
        itool_jax.load(tiny_folder, phase="warmup")
    with pytest.raises(ValueError, match=r"is part of a run; load .* with phase='warmup'"):
        itool_jax.load(made.folder / "warmup")
    for setting in ("--stage=dpo", "--help"):
        with pytest.raises(ValueError, match=f"load does not accept {setting}"):
            itool_jax.load(tiny_folder, setting)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds an adapter; set --model=None --adapter="):
        itool_jax.load(tmp_path)
    with pytest.raises(ValueError, match=r"phase=iteration_9 has no weights in .*: warmup, iteration_1"):
        itool_jax.load(made.folder, phase="iteration_9")
    model = itool_jax.load(tiny_folder)
    with pytest.raises(ValueError, match="conversation 1 ends with an assistant turn"):
        model.generate([tiny.USER, {"role": "assistant", "content": "x"}])
    with pytest.raises(ValueError, match="sample 1: message 1 has role 'bot'"):
        model.generate([{"role": "bot", "content": "x"}])
    with pytest.raises(ValueError, match="do not fit the model's context of 1024"):
        model.generate("x" * 2000)
    with pytest.raises(ValueError, match='sample 1: a tool has no "name"'):
        model.generate("x", [{}])
    with pytest.raises(ValueError, match='sample 1: sample has an empty "target"'):
        model.score("x", "")
    with pytest.raises(ValueError, match=r"search\.breadth must be positive"):
        model.search(SAMPLE, breadth=0)
    with pytest.raises(ValueError, match="unknown search setting breadht"):
        model.search(SAMPLE, breadht=2)
    with pytest.raises(ValueError, match='sample 2: sample has no "target"'):
        model.search([SAMPLE, {"messages": [tiny.USER]}])


def test_arguments_of_another_type_are_refused_without_a_type_checker_too(tiny_folder: Path) -> None:
    model: Any = itool_jax.load(tiny_folder)
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        for wrong in ({"role": "user", "content": "x"}, 5, None, [["x"]]):
            with pytest.raises(ValueError, match="a conversation must be a string or a list"):
                model.generate(wrong)
        for wrong in ("x", 5, ["x"]):
            with pytest.raises(ValueError, match="a sample must be a dict with messages, tools and target, got"):
                model.search(wrong)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
