"""Categories of held-out samples, and the table of their accuracies."""

import json
from collections import Counter
from pathlib import Path

import pytest

from itool_jax.config import parse
from itool_jax.data.generated import splits
from itool_jax.evaluation import results, summary
from itool_jax.stages import evaluate
from itool_jax.text.sample import Row, Sample
from tests.conftest import write

KNOWN = {"f", "g"}


def sample(sample_id: str, target: str, turns: int = 1, offered: str = "f") -> Sample:
    earlier = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * (turns - 1)
    tool: Row = {"name": offered, "description": "", "parameters": {"type": "object", "properties": {}}}
    tools = ({"type": "function", "function": tool}, tool | {"name": "h"})
    return Sample(id=sample_id, messages=(*earlier, {"role": "user", "content": "q"}), tools=tools, target=target)


def test_tools_are_known_by_the_names_that_samples_offer() -> None:
    assert evaluate.tool_names([sample("a", "[]"), sample("b", "no", offered="Market Trends API")]) == {
        *("f", "h", "Market Trends API")
    }


@pytest.mark.parametrize(
    ("target", "categories"),
    [
        ("[f(a=1)]", ["known_tools"]),
        ("[f(a=1), g()]", ["known_tools"]),
        ("[f(a=1), x.y()]", ["new_tools"]),
        ("[h()]", ["new_tools"]),
        ("[f(), g(), f()]", ["known_tools"]),
        ("[f(), g(), f(), f(a=2)]", ["known_tools", "long"]),
        ("[h(), g(), f(), f(a=2), f(a=3)]", ["new_tools", "long"]),
        ("None of the tools can do that.", []),
        ("[]", []),
    ],
)
@pytest.mark.parametrize("turns", [1, 2])
def test_categories_follow_from_the_gold(target: str, categories: list[str], turns: int) -> None:
    labels = evaluate.categorize([sample("a", target, turns)], KNOWN)["a"]
    assert labels[1:] == ["multi_turn"] * (turns == 2) + categories
    assert labels[0] == "irrelevance" if target.startswith("N") else labels[0] in ("easy", "medium", "hard")
    assert set(labels) < set(results.CATEGORIES)


def test_a_tool_is_new_where_no_sample_was_trained_on() -> None:
    assert "new_tools" in evaluate.categorize([sample("a", "[f()]")], set())["a"]


def test_categories_of_the_default_test_split_have_their_published_sizes() -> None:
    """The figures of docs/method.md; the first samples of the split hold as many of each kind of tool."""
    made = splits(parse(["--stage=iterate"]).generated)
    labels = evaluate.categorize(made["test"], evaluate.tool_names(made["train"]))
    sizes = {limit: Counter(name for s in made["test"][:limit] for name in labels[s.id]) for limit in (1200, 2400)}
    assert sizes[2400] == {
        **{"easy": 676, "medium": 675, "hard": 675, "irrelevance": 374},
        **{"multi_turn": 360, "long": 252, "known_tools": 1012, "new_tools": 1014},
    }
    assert (sizes[1200]["known_tools"], sizes[1200]["new_tools"], sizes[1200]["long"]) == (512, 501, 119)
    named = {(s.id.split("-")[0], name) for s in made["test"] for name in labels[s.id] if name.endswith("_tools")}
    assert named == {("test", "new_tools"), ("test_known", "known_tools")}


def test_the_widest_table_fits_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    measured = {
        "accuracy": dict.fromkeys(results.CATEGORIES, 0.4321),
        "standard_error": dict.fromkeys(results.CATEGORIES, 0.1123),
        "n": dict.fromkeys(results.CATEGORIES, 99_999),
    }
    phases = [{"name": name, **measured, "seconds": 1234.0} for name in ("base", "warmup", "iteration_9")]
    content = {"phases": phases, "split": "validation", "search": [], "training": [], "comparisons": []}
    summary.show(parse(["--stage=iterate"]), content)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert all(name in out for name in results.CATEGORIES)
    assert out.count("43.2±11.2") == len(phases) * len(results.CATEGORIES)
    assert out.count("1234s") == len(phases)


@pytest.mark.parametrize(
    ("changed", "delta", "hardly"),
    [(0, 0.4, True), (3, 0.4, True), (4, 0.4, False), (3, 0.5, False), (3, None, True), (4, None, False)],
)
def test_hardly_anything_was_trained_where_neither_answers_nor_margins_moved(
    tmp_path: Path, changed: int, delta: float | None, hardly: bool
) -> None:
    """Of 200 answers, 2 % are 4."""
    config = parse(["--stage=iterate", f"--run_dir={tmp_path}"])
    for phase, n in (("warmup", 0), ("iteration_1", changed)):
        rows = [{"id": str(i), "response": "other" if i < n else "same"} for i in range(200)]
        (tmp_path / phase).mkdir()
        write(tmp_path / phase / "evaluation_validation_200.jsonl", rows)
    held_out = None if delta is None else {"delta": delta}
    figures = {"seconds": 1.0, "outputs": {}, "held_out": held_out}
    (tmp_path / "iteration_1/dpo.json").write_text(json.dumps(figures))
    measured = results.what_training_changed(config, "iteration_1", "warmup")
    assert measured == {"changed": changed / 200, "validation_samples": 200, "delta": delta, "hardly_trained": hardly}
    line = results.describe_training("iteration_1", measured)
    assert ("training had almost no effect" in line) == hardly
    assert f"{changed / 2:.1f} % of 200 validation answers changed" in line
