"""Preference pairs of other trainers: every form is read as its trainer means it, and `--stage=dpo` trains on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from itool_jax import config as settings
from itool_jax.data.pairs import load_pairs
from itool_jax.inference.sampler import target_log_probs
from itool_jax.main import main
from itool_jax.store.run import Run
from itool_jax.text.chat import Chat, load_tokenizer
from tests.conftest import read, write
from tests.runs import Made, again, copy_run

pytestmark = pytest.mark.usefixtures("restored_jax_settings")

Row = dict[str, Any]
TOOL = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
USER, CHOSEN, REJECTED = "call f with 1", "[f(x=1)]", "[f(x=2)]"


def message(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def called(x: int) -> Row:
    function = {"name": "f", "arguments": json.dumps({"x": x})}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


SYSTEM = message("system", "Be brief.")
FORMS: dict[str, Row] = {
    "TRL, messages": {
        "prompt": [SYSTEM, message("user", USER)],
        "chosen": [message("assistant", CHOSEN)],
        "rejected": [message("assistant", REJECTED)],
    },
    "TRL, calls": {"prompt": [SYSTEM, message("user", USER)], "chosen": [called(1)], "rejected": [called(2)]},
    "TRL, implicit prompt": {
        "chosen": [SYSTEM, message("user", USER), message("assistant", CHOSEN)],
        "rejected": [SYSTEM, message("user", USER), message("assistant", REJECTED)],
    },
    "texts": {"system": "Be brief.", "prompt": USER, "chosen": CHOSEN, "rejected": REJECTED},
    "LLaMA-Factory, ShareGPT": {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": USER}],
        "chosen": {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        "rejected": {"from": "gpt", "value": REJECTED},
    },
    "LLaMA-Factory, messages": {
        "messages": [SYSTEM, message("user", USER)],
        "chosen": message("assistant", CHOSEN),
        "rejected": message("assistant", REJECTED),
    },
    "LLaMA-Factory, Alpaca": {
        "system": "Be brief.",
        "instruction": "call f",
        "input": "with 1",
        "chosen": CHOSEN,
        "rejected": REJECTED,
    },
}


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_same_pair(file: Callable[..., Path], name: str, as_text: bool) -> None:
    tools: Any = [TOOL]
    row = FORMS[name] | {"tools": json.dumps(tools) if as_text else tools}
    (pair,) = load_pairs(str(file(row)))
    assert pair.samples is not None
    chosen, rejected = pair.samples
    assert (chosen.target, rejected.target) == (CHOSEN, REJECTED)
    assert chosen.messages == rejected.messages
    shown = [(m["role"], m["content"].replace("\n", " ")) for m in chosen.messages]
    assert shown == [("system", "Be brief."), ("user", USER)]
    assert [tool["function"]["name"] for tool in chosen.tools] == ["f"]
    assert (pair.texts is not None) == (name == "texts")


def test_earlier_turns_stay(file: Callable[..., Path]) -> None:
    alpaca = FORMS["LLaMA-Factory, Alpaca"] | {"history": [["hi", "hello"]]}
    (pair,) = load_pairs(str(file(alpaca)))
    assert pair.samples is not None
    assert [m["content"] for m in pair.samples[0].messages] == ["Be brief.", "hi", "hello", "call f\nwith 1"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": None}, 'a pair needs "chosen" and "rejected", but "rejected" is missing'),
        ({"rejected": [message("assistant", CHOSEN)]}, '"chosen" and "rejected" are the same answer'),
        ({"chosen": [called(1), message("tool", "1"), message("assistant", "1")]}, '"chosen" has 3 messages; a pair'),
        ({"chosen": [message("user", "x")]}, "\"chosen\" is a message of 'user', not of the assistant"),
        ({"chosen": ""}, '"chosen": sample has an empty "target"'),
        ({"prompt": [message("bot", "x")]}, "\"chosen\": message 1 has role 'bot'"),
        ({"prompt": None, "chosen": "a b", "rejected": "a c"}, 'a pair needs its "prompt" in a column'),
        ({"images": ["x.png"]}, '"images" cannot be shown to a model of text'),
        ({"instruction": "x"}, 'a pair has "prompt" and "instruction"; keep the one that holds the prompt'),
        ({"history": [["a", "b"]]}, '"history" without "instruction"'),
        ({"prompt": None, "instruction": "x", "history": ["ab"]}, '"history" must be a list of [question, answer]'),
        ({"prompt": None, "instruction": "x", "input": 5}, '"input" is missing or not a string'),
        ({"system": "x"}, 'a pair has "system" and a system message; keep one'),
        ({"id": True}, '"id" must be a string or an integer'),
        ({"prompt": "other"} | FORMS["TRL, implicit prompt"], '"prompt" is not the last'),
        ({"prompt_ids": [1]}, '"chosen_ids" is missing or not a list'),
        ({"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [-1]}, '"rejected_ids" must be a non-empty list'),
        ({"tools": "none"}, '"chosen": '),
    ],
)
def test_what_is_no_pair_is_refused_by_name(file: Callable[..., Path], change: Row, reason: str) -> None:
    good, bad = FORMS["TRL, messages"] | {"id": "a"}, FORMS["TRL, messages"] | change
    path = file(good, bad)
    with pytest.raises(ValueError) as error:
        load_pairs(str(path))
    assert str(error.value).startswith(f"{path} line 2: {reason}")
    skipped: list[str] = []
    assert [pair.id for pair in load_pairs(str(path), skipped)] == ["a"]
    assert len(skipped) == 1
    with pytest.raises(ValueError, match=r'line 2: duplicate id "a", first in .* line 1'):
        load_pairs(str(file(good, good)))
    nameless = FORMS["TRL, messages"]
    with pytest.raises(ValueError, match=r"line 2: the same pair again, first in .* line 1"):
        load_pairs(str(file(nameless, nameless)))
    with pytest.raises(ValueError, match=r"contains no pairs \(first: .*line 1"):
        load_pairs(str(file(bad)), [])


def test_whole_conversations_may_repeat_the_prompt(file: Callable[..., Path]) -> None:
    """As in UltraFeedback's binarized form."""
    (pair,) = load_pairs(str(file(FORMS["TRL, implicit prompt"] | {"prompt": USER})))
    assert pair.samples is not None
    assert [m["content"] for m in pair.samples[0].messages] == ["Be brief.", USER]


def dpo(folder: Path, model: Path, pairs: Path, *changes: str) -> int:
    small = ("--lora.rank=2", "--preference.learning_rate=1e-2", "--preference.batch_size=4", "--pairs.held_out=0")
    return main(["--stage=dpo", f"--run_dir={folder}", f"--model={model}", f"--pairs.file={pairs}", *small, *changes])


def test_pairs_train_a_model_that_had_no_warm_up(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [FORMS["TRL, messages"] | {"tools": [TOOL], "id": f"p{i}"} for i in range(8)]
    rows[0]["chosen"] = [message("assistant", f"<think>x</think>{CHOSEN}")]
    file = write(tmp_path / "pairs.jsonl", [*rows, FORMS["texts"] | {"id": "plain"}, FORMS["texts"] | {"chosen": None}])
    assert dpo(tmp_path / "run", tiny_folder, file) == 2
    assert f'{file} line 10: a pair needs "chosen"' in capsys.readouterr().err
    assert dpo(tmp_path / "run", tiny_folder, file, "--skip_bad_rows") == 0
    out = "".join(capsys.readouterr())
    assert "no warm-up: training starts from the base model" in out
    assert "1 prompts are plain text, so the chat template writes them as a user's message" in out
    assert "thoughts before answers, <think>...</think>, are left out (1 pairs)" in out
    assert f"iteration_1: 9 pairs of {file}, 1 rows skipped" in out
    written = read(tmp_path / "run" / "iteration_1" / "pairs.jsonl")
    chat = Chat(load_tokenizer(str(tiny_folder)))
    prompt = chat.prompt_ids([SYSTEM, message("user", USER)], [{"type": "function", "function": TOOL}])
    assert [row["prompt_ids"] for row in written[:8]] == [prompt] * 8
    assert len({row["tree"] for row in written}) == 2  # by prompt, so that held-out pairs share none
    assert written[0]["chosen_ids"] == chat.target_ids(CHOSEN)
    assert written[8]["prompt_ids"] == chat.prompt_ids([SYSTEM, message("user", USER)])
    assert not (tmp_path / "run" / "data").exists()  # the run's training data is not touched
    # The chosen answer became likelier than the rejected one.
    config = settings.parse(["--stage=dpo", f"--run_dir={tmp_path / 'run'}", f"--model={tiny_folder}", "--lora.rank=2"])
    steps = [(prompt, chat.target_ids(answer)) for answer in (CHOSEN, REJECTED)]
    margins: list[float] = []
    for phase in ("base", "iteration_1"):
        policy = Run(config).policy(phase).running()
        sums = dict(row for rows in target_log_probs(policy, steps, 1024) for row in rows)
        margins.append(sums[0] - sums[1])
    assert margins[1] > margins[0] + 0.5
    # Nothing is done twice; an edited file is encoded again.
    assert dpo(tmp_path / "run", tiny_folder, file, "--skip_bad_rows") == 0
    assert "iteration_1: dpo already done" in "".join(capsys.readouterr())
    write(file, rows)
    assert dpo(tmp_path / "run", tiny_folder, file, "--skip_bad_rows") == 0
    assert "running pairs again: its inputs have changed" in "".join(capsys.readouterr())


def test_texts_that_a_template_wrote_and_token_ids_stay_as_they_are(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's own pairs, as they are and without the ids, as TRL reads them."""
    own = made.folder / "iteration_1" / "pairs.jsonl"
    rows = read(own)
    model = Path(made.settings[0].removeprefix("--model="))
    assert dpo(tmp_path / "ids", model, own) == 0
    assert "plain text" not in "".join(capsys.readouterr())
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    again = read(tmp_path / "ids" / "iteration_1" / "pairs.jsonl")
    kept = (*ids, "tree", "visits_chosen", "visits_rejected")
    assert [[row[key] for key in kept] for row in again] == [[row[key] for key in kept] for row in rows]
    texts = write(
        tmp_path / "texts.jsonl", [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows]
    )
    assert dpo(tmp_path / "texts", model, texts) == 0
    assert "plain text" not in "".join(capsys.readouterr())
    again = read(tmp_path / "texts" / "iteration_1" / "pairs.jsonl")
    assert [row["prompt_ids"] for row in again] == [row["prompt_ids"] for row in rows]
    assert all(row["chosen_ids"][-1] in made.chat.stop_ids for row in again)
    told = write(
        tmp_path / "told.jsonl", [{"system": "x", "prompt": rows[0]["prompt"], "chosen": "a", "rejected": "b"}]
    )
    for changes, why in (
        ((told,), 'its "prompt" was written by a template, so "system" and "tools" would be left out; remove them'),
        ((texts, "--preference.loss=conservative_dpo"), "conservative_dpo needs visits_chosen and visits_rejected"),
    ):
        assert dpo(tmp_path / "refused", model, *changes) == 2
        assert why in capsys.readouterr().err
    other = write(tmp_path / "other.jsonl", [rows[0] | {"prompt": "another tokenizer's"}])
    assert dpo(tmp_path / "other", model, other) == 2
    assert "its token ids are not those of its texts; were they made with another model?" in capsys.readouterr().err


def test_pairs_may_follow_a_warm_up(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    pairs = (
        f"--pairs.file={write(tmp_path / 'pairs.jsonl', [FORMS['TRL, messages'] | {'id': str(i)} for i in range(4)])}"
    )
    assert again(made, folder, pairs, stage="warmup") == 0
    assert again(made, folder, pairs, "--pairs.held_out=0", stage="dpo") == 2  # another setting
    assert again(made, folder, pairs, stage="dpo") == 0
    assert "no warm-up" not in "".join(capsys.readouterr())
    changed = copy_run(made, tmp_path / "searched")
    assert again(made, changed, pairs, stage="dpo") == 2
    assert "was created with pairs.file=None" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stage=iterate",), "pairs.file is for stage dpo, but stage iterate makes pairs by its search; omit it"),
        (("--stage=dpo", "--preference.micro_batch=auto"), "preference.micro_batch=auto looks at the run's data"),
        (("--stage=dpo", "--preference.loss=raft"), "preference.loss=raft trains on the model's own right answers"),
        (("--stage=dpo", "--preference.control=sft_same_prompts"), "needs the prompts' gold answers"),
        (("--stage=dpo", "--pairs.file="), "pairs.file must not be empty"),
    ],
)
def test_settings_that_contradict_pairs_of_a_file(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model=embedded", "--pairs.file=pairs.jsonl", *arguments]) == 2
    assert message in capsys.readouterr().err
