"""The data of a run: no sample twice, wrong rows named or listed, and a card that counts what there is."""

import json
from pathlib import Path

import pytest

from itool_jax.data.card import describe, lines
from itool_jax.data.records import Sample
from itool_jax.main import main
from itool_jax.text.chat import Encoded
from tests.conftest import read, write
from tests.runs import make_samples

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
    reasons = ("line 113: not valid JSON", "line 114: not a JSON object", 'line 112: id "s5" is already that of')
    reasons += ("line 1: sample has no", 'line 115: sample has no "messages"', "sample long: its 2")
    assert len(skipped) == len(reasons)
    assert all(any(reason in line for line in skipped) for reason in reasons)
    parts = [read(spoilt / f"run/data/{part}.jsonl") for part in ("train", "validation", "test")]
    assert sorted(row["id"] for part in parts for row in part) == sorted(f"s{i}" for i in range(100))
    card = json.loads((spoilt / "run/data/card.json").read_text())
    assert (card["rows_skipped"], card["repeats_left_out"]) == (6, 10)
    assert sum(part["samples"] for part in card["parts"].values()) == 100
    err = capsys.readouterr().err
    assert "10 repeats left out, 6 rows skipped" in err
    assert f"train: {card['parts']['train']['samples']} samples of" in err


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
    assert card["overlap_with_train"] == {"test": {"questions": 1, "samples_with_a_known_tool": 1}}
    text = "\n".join(lines(card | {"data": "d.jsonl", "repeats_left_out": 0, "rows_skipped": 0}))
    assert "train: 2 samples of 1 conversations, 4 turns, 2 calls, 1 texts, 18 tokens" in text
    assert "test shares with train: 1 questions, a tool in 1 samples" in text
