"""Readers: every form gives the same kind of sample, and a wrong row is named."""

import pytest

from itool_jax.data.sources import load, load_questions, read_samples
from itool_jax.text.sample import RawSample, Sample, sample_row
from tests.tiny import CALL, TOOL, USER


def test_a_written_sample_reads_back_as_itself(file):
    sample = Sample(id="a", messages=(USER,), tools=(TOOL,), target="[f(a=1)]", category="easy")
    assert read_samples(file(sample_row(sample)), need_target=True) == [sample]
    assert load(file(sample_row(sample))) == [sample]


@pytest.mark.parametrize(
    "target",
    [
        "[f(a=1)]",
        {"role": "assistant", "content": "[f(a=1)]"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "[f("}, {"type": "text", "text": "a=1)]"}],
        },
    ],
)
@pytest.mark.parametrize("place", ["target", "last message"])
def test_every_way_to_write_a_target_gives_the_same_sample(file, target, place):
    if place == "target":
        row = {"id": "a", "messages": [USER], "target": target}
    else:
        last = target if isinstance(target, dict) else {"role": "assistant", "content": target}
        row = {"id": "a", "messages": [USER, last]}
    (sample,) = read_samples(file(row), need_target=True)
    assert sample == Sample(id="a", messages=(USER,), target="[f(a=1)]")


def test_calls_of_the_history_are_written_like_those_of_the_target(file):
    history = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "7"},
    ]
    (sample,) = read_samples(file({"id": 5, "messages": history, "target": "seven"}), need_target=True)
    assert sample.id == "5"
    assert sample.messages[1] == {"role": "assistant", "content": "[f(a=1)]"}


def test_a_conversation_gives_its_last_turn_or_every_turn_or_those_after_a_user_turn(file):
    answer = {"role": "assistant", "content": "one"}
    tool = {"role": "tool", "content": "t"}
    conversation = [
        USER,
        answer,
        tool,
        {"role": "assistant", "content": "two"},
        USER,
        {"role": "assistant", "content": "three"},
    ]
    path = file({"id": "c", "messages": conversation})
    assert [sample.target for sample in read_samples(path, need_target=True)] == ["three"]
    by_targets = {
        targets: [(sample.id, sample.target, len(sample.messages)) for sample in load(path, targets=targets)]
        for targets in ("after_user", "all")
    }
    assert by_targets["after_user"] == [("c", "one", 1), ("c/2", "three", 5)]
    assert by_targets["all"] == [("c", "one", 1), ("c/1.2", "two", 3), ("c/2", "three", 5)]
    assert [sample.id for sample in load(path)] == ["c", "c/1.2", "c/2"]


def test_targets_are_needed_only_where_asked_for(file):
    path = file({"id": "a", "messages": [USER]})
    assert read_samples(path, need_target=False) == [Sample(id="a", messages=(USER,))]
    with pytest.raises(ValueError, match='line 1: sample has no "target"'):
        read_samples(path, need_target=True)


def test_raw_rows_are_kept_exactly(file):
    path = file({"id": "a", "prompt_ids": [1, 0], "target_ids": [3]})
    assert read_samples(path, need_target=True) == [RawSample(id="a", prompt_ids=(1, 0), target_ids=(3,))]
    path = file({"id": "a", "prompt_ids": [1]}, {"id": "b", "prompt": " x\n"})
    assert read_samples(path, need_target=False) == [
        RawSample(id="a", prompt_ids=(1,)),
        RawSample(id="b", prompt=" x\n"),
    ]
    with pytest.raises(ValueError, match='line 1: sample has no "target_ids"'):
        read_samples(path, need_target=True)
    with pytest.raises(ValueError, match="raw prompts"):
        load(file({"id": "a", "prompt_ids": [1], "target_ids": [3]}))


def test_rows_without_ids_get_ids_that_do_not_depend_on_their_order(file):
    rows = [{"messages": [{"role": "user", "content": text}], "target": "t"} for text in ("x", "y", "x")]
    ids = [sample.id for sample in load(file(*rows))]
    assert len(set(ids)) == 3
    assert ids[2] == f"{ids[0]}-2"
    assert {sample.id for sample in load(file(*rows[::-1]))} == set(ids)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": "a"}, 'no "messages"'),
        ({"id": "a", "messages": []}, 'no "messages"'),
        ({"id": "a", "messages": "hi"}, 'no "messages"'),
        ({"id": "a", "messages": [{"role": "bot", "content": "x"}]}, "message 1 has role 'bot'"),
        ({"id": "a", "messages": [USER, "x"]}, "message 2 has role 'x'"),
        ({"id": "a", "messages": [{"role": "user"}]}, 'message 1 has no "content"'),
        ({"id": "a", "messages": [{"role": "user", "content": 3}]}, 'message 1: "content" must be a string'),
        ({"id": "a", "messages": [USER], "target": ""}, 'an empty "target"'),
        ({"id": "a", "messages": [USER], "target": 3}, '"target" must be a string'),
        ({"id": "a", "messages": [USER], "target": {"tool_calls": [{}]}}, "tool call 1"),
        ({"id": "a", "messages": [{"role": "assistant", "content": "x"}]}, "no message before"),
        ({"id": "a", "messages": [USER], "target": "t", "tools": [{}]}, 'a tool has no "name"'),
        ({"id": [1], "messages": [USER], "target": "t"}, '"id" must be'),
        ({"id": "a", "messages": [USER], "target": "t", "following": "x"}, '"following" must be a list of messages'),
        ({"id": "a", "messages": [USER], "target": "t", "following": ["x"]}, '"following": message 1 has role'),
        ({"id": "a", "messages": [USER], "target": "t", "following": [USER]}, "has a message with role 'user'"),
        ({"id": "a", "prompt_ids": [], "target_ids": [1]}, '"prompt_ids" must be a non-empty list'),
        ({"id": "a", "prompt_ids": [True], "target_ids": [1]}, '"prompt_ids" must be a non-empty list'),
        ({"id": "a", "prompt_ids": [1], "target_ids": [-1]}, '"target_ids" must be a non-empty list'),
        ({"id": "a", "prompt_ids": [1], "prompt": "x", "target_ids": [1]}, "both"),
        ({"id": "a", "prompt": "", "target_ids": [1]}, '"prompt" must be'),
        ({"id": "ok", "messages": [USER], "target": "t"}, 'duplicate id "ok", first used in'),
    ],
)
def test_a_wrong_row_is_named_by_file_and_line(file, row, reason):
    path = file({"id": "ok", "messages": [USER], "target": "t"}, row)
    with pytest.raises(ValueError) as error:
        read_samples(path, need_target=True)
    assert str(error.value).startswith(f"{path} line 2: ")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_sample_to_train_on_knows_its_place_which_is_no_part_of_it(file):
    path = file({"id": "a", "messages": [USER], "target": "t"}, {"id": "b", "messages": [USER], "target": "t"})
    _, sample = load(path)
    assert sample.place == f"{path} line 2"
    assert sample == Sample(id="b", messages=(USER,), target="t")
    assert "place" not in sample_row(sample)


def test_a_row_that_is_skipped_says_nothing_about_the_form_of_the_others(file):
    wrong, right = {"query": "q", "tools": "[", "answers": "[]"}, {"id": "a", "messages": [USER], "target": "t"}
    skipped: list[str] = []
    assert [sample.id for sample in load(file(wrong, right), skipped)] == ["a"]
    assert len(skipped) == 1
    assert "line 1" in skipped[0]


BFCL = {"id": "s", "question": [[USER]], "function": [{"name": "f", "parameters": {"type": "dict", "properties": {}}}]}


def test_questions_of_bfcl_are_read_turn_by_turn(file):
    second = {"role": "user", "content": "and then"}
    single, first, last = load_questions(file(BFCL, {"id": "m", "question": [[USER], [], [second]], "path": ["x"]}))
    assert (single.id, single.messages, single.tools[0]["function"]["name"]) == ("s", (USER,), "f")
    assert (first.id, first.messages, first.tools) == ("m", (USER,), ())
    assert (last.id, last.messages[-1]) == ("m/2", second)


def test_questions_of_api_bank_have_the_apis_of_their_instruction(file):
    instruction = 'Generate.\nAPI descriptions:\n{"name": "f", "description": "d", "input_parameters": {}}'
    row = {"file": "x.jsonl", "id": 2, "instruction": instruction, "expected_output": "API-Request: [f()]"}
    (sample,) = load_questions(file(row | {"input": "User: q\nAI: a\nUser: r\nGenerate API Request:\n"}))
    assert sample.id == "x.jsonl/2"
    assert [message["content"] for message in sample.messages] == ["q", "a", "r"]
    assert [tool["function"]["name"] for tool in sample.tools] == ["f"]


def test_questions_of_every_form_of_training_data_are_read(file):
    path = file({"id": "a", "messages": [USER], "target": "t"})
    file(BFCL)
    assert load_questions(path) == load(path)
    assert [sample.id for sample in load_questions(path.parent)] == ["a", "s"]


@pytest.mark.parametrize("change", [{"id": 5}, {"question": "q"}, {"question": [["q"]]}, {"function": [5]}])
def test_a_wrong_question_is_named_and_a_test_set_is_never_trained_on(file, change):
    path = file(BFCL, BFCL | change)
    with pytest.raises(ValueError, match=rf"^{path} line 2: "):
        load_questions(path)
    with pytest.raises(ValueError, match=r"line 1: .* match no known data set: id, question, function"):
        load(path)


def test_empty_and_unknown_data_is_named(file, tmp_path):
    for read in (load, lambda path: read_samples(path, need_target=False)):
        with pytest.raises(ValueError, match=r"data\d+\.jsonl contains no samples"):
            read(file())
    with pytest.raises(ValueError, match=r"line 1: .* match no known data set: x, y"):
        load(file({"x": 1, "y": 2}))
    with pytest.raises(ValueError, match="does not exist"):
        load(tmp_path / "absent.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty contains no data files"):
        load(tmp_path / "empty")
