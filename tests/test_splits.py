"""The data of a run: no sample twice, wrong rows named or listed, and a card that counts what there is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from itool_jax.config import Config
from itool_jax.data import card
from itool_jax.data.card import describe, lines, overlap
from itool_jax.data.generated import GeneratedSettings
from itool_jax.main import main
from itool_jax.model.sharding import MeshSettings, use_mesh
from itool_jax.store.directory import NO_RESULTS
from itool_jax.store.splits import load_splits
from itool_jax.text.chat import Encoded
from itool_jax.text.sample import Sample
from tests.conftest import read, write
from tests.runs import make_samples
from tests.tiny import USER

pytestmark = pytest.mark.usefixtures("restored_jax_settings")


def warm_up(folder: Path, model: Path, *changes: str) -> int:
    """A warm-up of no account, for the data it makes."""
    options = [f"--model={model}", f"--data={folder / 'd.jsonl'}", f"--run_dir={folder / 'run'}", "--lora.rank=1"]
    return main(["--stage=warmup", *options, "--replay.replay_fraction=0.5", "--warmup.batch_size=64", *changes])


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """Good rows, ten of them twice under another id, and wrong ones of four kinds."""
    rows = make_samples(100)
    repeats = [row | {"id": f"again {row['id']}"} for row in rows[:10]]
    path = write(tmp_path / "d.jsonl", rows + repeats)
    long = rows[0] | {"id": "long", "target": "[f0(x=1)]" + "x" * 2000}
    wrong = [json.dumps(rows[5]), "{", "[1]", json.dumps({"id": "e", "messages": 5}), json.dumps(long)]
    path.write_text('{"foo": 1}\n' + path.read_text() + "\n".join(wrong) + "\n")
    return tmp_path


def test_wrong_rows_end_the_run_or_are_listed(
    spoilt: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert warm_up(spoilt, tiny_folder) == 2
    assert f"{spoilt / 'd.jsonl'} line 113: not valid JSON" in capsys.readouterr().err
    assert warm_up(spoilt, tiny_folder, "--skip_bad_rows") == 0
    skipped = (spoilt / "run/data/skipped.txt").read_text().splitlines()
    reasons = ("line 113: not valid JSON", "line 114: not a JSON object", 'line 112: duplicate id "s5", first used in')
    reasons += ("line 1: sample has no", 'line 115: sample has no "messages"', "line 116: sample long: its 2")
    assert len(skipped) == len(reasons)
    assert all(any(f"d.jsonl {reason}" in line for line in skipped) for reason in reasons)
    parts = [read(spoilt / f"run/data/{part}.jsonl") for part in ("train", "validation", "test")]
    assert sorted(row["id"] for part in parts for row in part) == sorted(f"s{i}" for i in range(100))
    card = json.loads((spoilt / "run/data/card.json").read_text())
    assert (card["rows_skipped"], card["too_long"], card["repeats_left_out"]) == (5, 1, 10)
    assert sum(part["samples"] for part in card["parts"].values()) == 100
    err = capsys.readouterr().err
    assert "10 duplicates dropped, 5 invalid rows skipped, 1 samples too long for the model; nothing truncated" in err
    assert f"train: {card['parts']['train']['samples']} samples of" in err


def test_benchmarks_are_looked_for_among_the_training_samples(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "d.jsonl", make_samples(60))
    bfcl = write(tmp_path / "bfcl.jsonl", [{"id": f"q{i}", "question": [[USER]]} for i in range(3)])
    assert warm_up(tmp_path, tiny_folder, f"--evaluate.benchmarks={bfcl}") == 0
    assert (
        f"overlap of {bfcl} with train: 0 of 3 questions, 0 near duplicates; 0 of 0 samples" in capsys.readouterr().err
    )
    # Another benchmark, and the same run, which is done: it is looked for all the same.
    trained = read(tmp_path / "run/data/train.jsonl")
    asked = [{"id": f"b{i}", "question": [row["messages"][-1:]]} for i, row in enumerate(trained[:7])]
    asked[0]["function"] = [trained[0]["tools"][0]["function"]]
    asked.append({"id": "other", "question": [[USER], [], [trained[0]["messages"][-1]]], "function": [{"name": "g"}]})
    more = write(tmp_path / "more.jsonl", asked)
    assert warm_up(tmp_path, tiny_folder, "--evaluate.benchmarks", str(bfcl), str(more)) == 0
    err = capsys.readouterr().err
    shared = f"overlap of {more} with train: 8 of 9 questions (b0, b1, b2, b3, b4, …), 0 near duplicates; "
    assert f"{shared}1 of 3 samples with tools list one" in err
    assert f"overlap of {bfcl}" not in err
    saved_card = json.loads((tmp_path / "run/data/card.json").read_text())
    assert saved_card["parts"]["train"]["samples"] == len(trained)
    assert saved_card["benchmarks"][str(bfcl)]["questions"] == 0
    assert saved_card["benchmarks"][str(more)]["questions"] == 8
    assert saved_card["benchmarks"][str(more)]["question_ids"] == [*(f"b{i}" for i in range(7)), "other/2"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [(None, "does not exist"), ({"foo": 1}, "line 1: sample has no"), ({"id": "a", "question": 5}, "line 1:")],
)
def test_a_benchmark_that_cannot_be_read_ends_the_run_before_any_work(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], row: Any, reason: str
) -> None:
    write(tmp_path / "d.jsonl", make_samples(60))
    path = tmp_path / "b.jsonl"
    if row is not None:
        write(path, [row])
    assert warm_up(tmp_path, tiny_folder, f"--evaluate.benchmarks={path}") == 2
    err = capsys.readouterr().err
    assert f"error: {path} {reason}" in err
    assert err.count("\n") == 1
    assert {entry.name for entry in (tmp_path / "run").iterdir()} <= set(NO_RESULTS)


@pytest.mark.parametrize("damage", ["{", '{"benchmarks": 5}', "[1]"])
def test_a_damaged_card_is_named(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    write(tmp_path / "d.jsonl", make_samples(60))
    assert warm_up(tmp_path, tiny_folder) == 0
    (tmp_path / "run/data/card.json").write_text(damage)
    assert warm_up(tmp_path, tiny_folder, f"--evaluate.benchmarks={tmp_path / 'd.jsonl'}") == 2
    assert f"error: {tmp_path / 'run/data/card.json'} is damaged" in capsys.readouterr().err
    (tmp_path / "run/data/card.json").unlink()  # as it says
    assert warm_up(tmp_path, tiny_folder, f"--evaluate.benchmarks={tmp_path / 'd.jsonl'}") == 0
    assert json.loads((tmp_path / "run/data/card.json").read_text()).keys() >= {"parts", "benchmarks"}


def test_the_generated_corpus_has_a_card_that_is_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = GeneratedSettings(train=8, validation=2, test=3)
    with use_mesh(MeshSettings()):
        load_splits(Config(stage="warmup", run_dir=tmp_path, generated=sizes))
    card = json.loads((tmp_path / "data/card.json").read_text())
    assert {name: part["samples"] for name, part in card["parts"].items()} == {"train": 8, "validation": 2, "test": 3}
    assert (card["too_long"], card["rows_skipped"]) == (0, 0)
    assert capsys.readouterr() == ("", "")


def test_the_turns_of_a_conversation_stay_in_one_part(tmp_path: Path, tiny_folder: Path) -> None:
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    rows = [
        {"id": f"data/{i}", "messages": [{"role": "user", "content": f"{i}"}, turns[1], *turns[2:]]} for i in range(60)
    ]
    write(tmp_path / "d.jsonl", rows)
    assert warm_up(tmp_path, tiny_folder) == 0
    parts = [read(tmp_path / f"run/data/{part}.jsonl") for part in ("train", "validation", "test")]
    conversations = [{row["conversation"] for row in part} for part in parts]
    assert sum(map(len, conversations)) == len(set().union(*conversations)) == 60
    assert sum(map(len, parts)) == 180


def test_the_card_by_hand() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    asked = ({"role": "user", "content": "Now  What"},)
    train = [
        Sample(id="a", messages=asked, tools=(tool,), target="[f(), f(x=1)]", conversation="c"),
        Sample(id="a/2", messages=asked * 3, target="no", conversation="c"),
    ]
    test = [
        Sample(id="b", messages=({"role": "user", "content": "now what"},), tools=(tool,), target="no"),
        Sample(id="c", messages=({"role": "user", "content": "else"},), target="no"),
    ]
    encoded = {"train": [Encoded("a", [1] * 5, [1] * 3), Encoded("a/2", [1] * 9, [2])]}
    encoded["test"] = [Encoded("b", [1], [1]), Encoded("c", [1], [1])]
    card = describe({"train": train, "test": test}, encoded)
    assert card["parts"]["train"] == {
        **{"samples": 2, "conversations": 1, "turns": 4, "calls": 2, "texts": 1, "prompt_tokens": 14},
        **{"target_tokens": 4, "longest": 10, "median": 9},
    }
    assert card["overlap_with_train"] == {
        "test": {
            **{"samples": 2, "questions": 1, "question_ids": ["b"], "near_questions": 0, "near_question_ids": {}},
            **{"samples_with_tools": 1, "samples_with_a_known_tool": 1, "known_tools": ["f"]},
        }
    }
    card |= {"data": "d.jsonl", "repeats_left_out": 0, "rows_skipped": 0, "too_long": 3, "train_left_out": 0}
    card |= {"validation_texts_left_out": 0, "test_texts_left_out": 4, "buffer_left_out": 5}
    text = "\n".join(lines(card))
    assert "  4 texts left out of test: they follow no user turn, so any text would count as right" in text
    assert "  5 training samples unused: they follow no user turn, and their conversations are in the replay" in text
    assert "left out of validation" not in text
    assert "samples.fraction" not in text
    assert "data d.jsonl: 0 duplicates dropped, 0 invalid rows skipped, 3 samples too long for the model" in text
    assert "train: 2 samples of 1 conversations, 4 turns, 2 calls, 1 texts, 18 tokens" in text
    assert (
        "overlap of test with train: 1 of 2 questions (b), 0 near duplicates; 1 of 1 samples with tools list one"
        in text
    )


def test_samples_that_ask_nothing_share_no_question() -> None:
    silent = Sample(id="a", messages=({"role": "tool", "content": "x"},), target="no")
    assert overlap([silent], {"b": [silent]})["b"]["questions"] == 0


def test_near_duplicates_are_found_by_their_runs_of_words() -> None:
    def asking(name: str, text: str, tool: str) -> Sample:
        tools = ({"type": "function", "function": {"name": tool}},)
        return Sample(id=name, messages=({"role": "user", "content": text},), tools=tools, target="no")

    text = "please find me a cheap direct flight from Oslo to Rome on the third of May for two adults"
    train = [asking("other", "what is the weather like in Rome today", "weather"), asking("t", text, "find_flight")]
    report = overlap(
        train,
        {
            "test": [
                asking("same", text.upper(), "FindFlight"),
                asking("near", text.replace("two", "three"), "flights.find"),
                asking("far", "please find me a cheap direct flight from Bern to Cairo in June", "book"),
            ]
        },
    )["test"]
    assert report["question_ids"] == ["same"]
    assert report["near_question_ids"] == {"near": "t"}
    assert (report["questions"], report["near_questions"], report["known_tools"]) == (1, 1, ["findflight"])


def test_near_duplicates_are_all_that_comparing_every_pair_finds() -> None:
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in range(6)]
    texts = [" ".join(random.choice(words, size=random.integers(1, 9))) for _ in range(150)]
    near = card._NearDuplicates({text: str(i) for i, text in enumerate(dict.fromkeys(texts[:100]))})
    n_similar = 0
    for text in texts[100:]:
        runs = card._runs(text)
        similar = [name for name, other in near.questions if len(runs & other) >= card.NEAR * len(runs | other)]
        assert near.find(text) == (similar[0] if similar else None)
        n_similar += bool(similar)
    assert 5 < n_similar < 45
