"""Agents' conversations: which turns are samples, what follows them, and in which part of the data they are."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from itool_jax.config import Config
from itool_jax.data.generated import GeneratedSettings
from itool_jax.data.sources import SamplesSettings, load, read_samples
from itool_jax.doctor.model import data as examine_data
from itool_jax.main import main
from itool_jax.store import splits
from itool_jax.store.sources import check_sources
from itool_jax.text.chat import Chat, encode_sample, load_tokenizer
from itool_jax.text.sample import Sample, sample_row
from tests.conftest import read, write
from tests.runs import SMALL, make_samples

pytestmark = pytest.mark.usefixtures("restored_jax_settings")
File = Callable[..., Path]
Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def tool(text: str) -> Row:
    return {"role": "tool", "content": text}


AGENT = [user("q"), assistant("[f()]"), tool("1"), assistant("[g()]"), tool("2"), assistant("done")]


def ids(messages: list[Row], file: File, targets: Any = "all") -> dict[str, str]:
    """The target of each sample of a conversation named c, by the sample's id."""
    return {s.id: s.target for s in load(file({"id": "c", "messages": messages}), targets=targets)}


# Samples ------------------------------------------------------------------------------------------------------


def test_every_turn_of_an_agent_is_a_sample_and_the_first_knows_what_came_after_it(file: File):
    first, second, last = samples = load(file({"id": "c", "messages": AGENT}))
    assert [(s.id, s.target, len(s.messages)) for s in samples] == [
        ("c", "[f()]", 1),
        ("c/1.2", "[g()]", 3),
        ("c/1.3", "done", 5),
    ]
    assert [s.follows_user for s in samples] == [True, False, False]
    assert first.following == tuple(AGENT[2:])
    assert second.following == last.following == ()
    assert {s.conversation for s in samples} == {"c"}
    (alone,) = load(file({"id": "c", "messages": AGENT}), targets="after_user")
    assert alone == dataclasses.replace(first, conversation="")


@pytest.mark.parametrize(
    ("messages", "every", "after_user"),
    [
        ([*AGENT, *AGENT], ["c", "c/1.2", "c/1.3", "c/2", "c/2.2", "c/2.3"], ["c", "c/2"]),
        ([user("q"), assistant("[f()]"), tool("1")], ["c"], ["c"]),  # ends in a tool result
        ([user("q"), assistant("a"), assistant("b")], ["c", "c/1.2"], ["c"]),
        ([user("q"), assistant(""), tool("1"), assistant("b")], ["c/0.1"], None),  # an empty turn is history
        ([user("q"), assistant("a"), user("r"), assistant(""), assistant("b")], ["c", "c/1.2"], ["c"]),
        ([assistant("hello"), user("q"), assistant("a")], ["c"], ["c"]),  # a greeting answers nothing
        ([user("q"), {"role": "system", "content": "s"}, assistant("a")], ["c/0.1"], None),
    ],
)
def test_ids_of_turns_after_a_user_turn_do_not_depend_on_the_others(
    file: File, messages: list[Row], every: list[str], after_user: list[str] | None
):
    assert list(ids(messages, file)) == every
    if after_user is None:
        with pytest.raises(ValueError, match="no assistant turn that follows a user turn"):
            ids(messages, file, "after_user")
    else:
        chosen = ids(messages, file, "after_user")
        assert list(chosen) == after_user
        assert chosen.items() <= ids(messages, file).items()


def test_what_follows_ends_at_the_next_user_turn(file: File):
    messages = [*AGENT[:3], user("r"), assistant("[h()]"), tool("3"), assistant(""), tool("4")]
    first, second = load(file({"id": "c", "messages": messages}))
    assert first.following == (tool("1"),)
    assert second.following == (tool("3"), assistant(""), tool("4"))
    answered, asked_again = load(file({"id": "c", "messages": [*AGENT[:2], user("r"), assistant("a")]}))
    assert answered.following == asked_again.following == ()


@pytest.mark.parametrize(
    ("messages", "follows"),
    [
        ([user("q")], True),
        ([*AGENT, user("r")], True),
        ([user("q"), {"role": "system", "content": "s"}], True),
        ([{"role": "system", "content": "s"}], True),
        (AGENT[:3], False),
        (AGENT[:2], False),
        ([*AGENT[:3], {"role": "system", "content": "s"}], False),
        ([tool("1")], False),
    ],
)
def test_a_sample_follows_a_user_turn_if_nothing_was_answered_since(messages: list[Row], follows: bool):
    assert Sample(id="a", messages=tuple(messages)).follows_user == follows


def test_a_row_with_a_target_is_one_sample_and_reads_back_as_itself(file: File):
    samples = load(file({"id": "c", "messages": AGENT}))
    path = file(*map(sample_row, samples))
    assert load(path) == load(path, targets="after_user") == read_samples(path, need_target=True) == samples
    assert [list(sample_row(s)) for s in samples[:2]] == [
        ["id", "messages", "tools", "target", "following", "conversation"],
        ["id", "messages", "tools", "target", "conversation"],
    ]


def test_prompts_and_targets_of_a_conversation_are_its_beginnings(file: File, tiny_folder: Path):
    chat = Chat(load_tokenizer(str(tiny_folder)))
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {}}}]
    samples = load(file({"id": "c", "messages": [*AGENT, *AGENT], "tools": tools}))
    whole = chat.encode(chat.render((*AGENT, *AGENT), samples[0].tools, add_generation_prompt=False))
    lengths = []
    for sample in samples:
        row = encode_sample(chat, sample)
        ids = [*row.prompt_ids, *row.target_ids]
        assert ids == whole[: len(ids)]
        lengths.append(len(ids))
    assert lengths == sorted(set(lengths))
    assert lengths[-1] == len(whole)


# Parts --------------------------------------------------------------------------------------------------------

N = 200


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    """200 conversations: a call, its result, another call, its result, a text."""
    turns = [[user(f"ask {i}"), *AGENT[1:]] for i in range(N)]
    return write(tmp_path / "agents.jsonl", [{"id": f"c{i}", "messages": row} for i, row in enumerate(turns)])


def configured(data: Path | str, model: Path | str, run_dir: Path, **samples: Any) -> Config:
    return Config(
        stage="iterate", model=str(model), data=str(data), run_dir=run_dir, samples=SamplesSettings(**samples)
    )


def names(part: splits.Part) -> list[str]:
    return [sample.id for sample in part.samples]


def test_held_out_parts_have_what_can_be_judged_and_the_buffer_what_is_asked(
    agents: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = configured(agents, tiny_folder, tmp_path / "run")
    parts, left_out = splits.divide(config, None)
    conversations = {name: {s.conversation for s in part.samples} for name, part in parts.items()}
    assert sum(map(len, conversations.values())) == len(set().union(*conversations.values())) == N
    for name in ("validation", "test"):
        count = len(conversations[name])
        assert len(parts[name].samples) == 2 * count  # its two calls
        assert left_out[f"{name}_texts_left_out"] == count > 0
    assert len(parts["train"].samples) == 3 * len(conversations["train"])
    warmup, buffer = splits.divide_replay(config, parts["train"].samples)
    assert all(sample.follows_user and sample.following for sample in buffer)
    assert len(warmup) + 3 * len(buffer) == len(parts["train"].samples)
    assert not {s.conversation for s in warmup} & {s.conversation for s in buffer}
    assert left_out["buffer_left_out"] == 2 * len(buffer)
    assert all(row.id == s.id for part in parts.values() for s, row in zip(part.samples, part.encoded, strict=True))
    # The same in a run's files, and said.
    test = splits.load_splits(config).test.samples
    assert test == parts["test"].samples
    assert any(sample.following for sample in test)
    card = json.loads((tmp_path / "run/data/card.json").read_text())
    assert left_out.items() <= card.items()
    err = capsys.readouterr().err
    assert f"{left_out['test_texts_left_out']} texts left out of test: they follow no user turn" in err
    assert f"{left_out['buffer_left_out']} training samples unused: they follow no user turn" in err
    findings, _ = examine_data(config)
    assert f"{left_out['buffer_left_out']} training samples unused" in " ".join(finding.text for finding in findings)


def test_the_parts_of_turns_after_a_user_turn_do_not_depend_on_the_others(
    agents: Path, tiny_folder: Path, tmp_path: Path
):
    every, after_user = (
        splits.divide(configured(agents, tiny_folder, tmp_path, targets=targets), None)[0]
        for targets in ("all", "after_user")
    )
    for name in splits.NAMES:
        assert {s.id for s in every[name].samples if s.follows_user} == set(names(after_user[name]))


def test_data_without_turns_to_search_from_is_refused(tmp_path: Path, tiny_folder: Path):
    rows = [{"id": f"a{i}", "messages": [user(f"{i}"), *AGENT[1:3]], "target": "[g()]"} for i in range(60)]
    config = configured(write(tmp_path / "d.jsonl", rows), tiny_folder, tmp_path)
    parts, _ = splits.divide(config, None)
    with pytest.raises(ValueError, match=r"^none of the \d+ training samples split off for the replay buffer follows"):
        splits.divide_replay(config, parts["train"].samples)


def test_a_template_that_refuses_tool_results_names_the_setting_that_leaves_them_out(
    agents: Path, tiny_folder: Path, tmp_path: Path
):
    model = tmp_path / "model"
    model.mkdir()
    for path in tiny_folder.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    template = (model / "chat_template.jinja").read_text()
    refusing = "{%- for m in messages if m.role == 'tool' -%}{{ raise_exception('no tools') }}{%- endfor -%}"
    (model / "chat_template.jinja").write_text(refusing + template)
    with pytest.raises(
        ValueError, match=r"agents.jsonl line 1: sample c0/1.2: .*no tools; set samples.targets=after_user"
    ):
        splits.divide(configured(agents, model, tmp_path), None)
    assert splits.divide(configured(agents, model, tmp_path, targets="after_user"), None)[0]["train"].samples


# Shares, a test file, less data ---------------------------------------------------------------------------------


def test_shares_of_the_data(tmp_path: Path, tiny_folder: Path):
    path = write(tmp_path / "d.jsonl", make_samples(400))
    default, _ = splits.divide(configured(path, tiny_folder, tmp_path), None)
    assert 20 <= len(default["test"].samples) <= 60  # a tenth
    assert 8 <= len(default["validation"].samples) <= 32  # a twentieth of the rest
    half, _ = splits.divide(configured(path, tiny_folder, tmp_path, test_share=0.5, validation_share=0), None)
    assert 160 <= len(half["test"].samples) <= 240
    assert set(names(default["test"])) < set(names(half["test"]))
    assert not half["validation"].samples
    assert len(half["train"].samples) + len(half["test"].samples) == 400


def test_empty_parts_are_kept_and_read_back(tmp_path: Path, tiny_folder: Path):
    path = write(tmp_path / "d.jsonl", make_samples(60))
    config = configured(path, tiny_folder, tmp_path / "run", test_share=0, validation_share=0)
    for _ in range(2):  # made, then read
        loaded = splits.load_splits(config)
        assert len(loaded.train.samples) == 60
        assert loaded.test.samples == loaded.validation.samples == loaded.test.encoded == []
    card = json.loads((tmp_path / "run/data/card.json").read_text())
    assert card["parts"]["test"].items() >= {"samples": 0, "longest": 0}.items()
    # A part that was emptied by someone else is not taken for one that the settings leave out.
    (tmp_path / "run/data/train.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"train\.jsonl contains no samples"):
        splits.load_splits(config).train.samples  # noqa: B018


@pytest.mark.parametrize(("stage", "split"), [("iterate", "test"), ("evaluate", "test"), ("iterate", "validation")])
def test_a_run_with_nothing_to_evaluate_on_is_refused_before_any_work(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str], stage: str, split: str
):
    path = write(tmp_path / "d.jsonl", make_samples(60))
    command = [f"--stage={stage}", f"--model={tiny_folder}", f"--data={path}", f"--run_dir={tmp_path / 'run'}"]
    assert main([*command, f"--samples.{split}_share=0", f"--evaluate.split={split}"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    remedy = ", set samples.test_file, or set --benchmark" if split == "test" else ""
    assert line.endswith(f"samples.{split}_share=0 leaves no {split} part to evaluate on; raise it{remedy}")
    assert not (tmp_path / "run/data").exists()
    findings, _ = examine_data(configured(path, tiny_folder, tmp_path, test_share=0))
    assert [f.level for f in findings if f.what == "evaluation"] == ["error"]


def test_a_run_may_be_evaluated_on_a_benchmark_only(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
):
    path = write(tmp_path / "d.jsonl", make_samples(60))
    row = {"file": "t", "id": 0, "instruction": "Call f0.", "expected_output": "[f0(x='1')]", "input": "User: f0 1"}
    (tmp_path / "api").mkdir()
    (tmp_path / "api/level-1-api.json").write_text(json.dumps([row]))
    command = ["--stage=iterate", f"--model={tiny_folder}", f"--data={path}", f"--run_dir={tmp_path / 'run'}"]
    command += ["--iterations=0", "--lora.rank=1", "--warmup.batch_size=64", "--samples.test_share=0", *SMALL]
    command += ["--benchmark=api_bank", "--categories=level_1", f"--evaluate.benchmark_data={tmp_path / 'api'}"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "samples.test_share=0 leaves no test part: evaluating on api_bank only" in captured.err
    assert "exact answers" not in captured.out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [phase["accuracy"] for phase in summary["phases"]] == [{}, {}]
    assert list(summary["benchmark"]["phases"]) == ["warmup"]
    assert not list((tmp_path / "run").glob("*/evaluation_*"))


def test_a_test_file_is_the_test_part_and_nothing_of_it_is_trained_on(tmp_path: Path, tiny_folder: Path):
    rows = make_samples(100)
    path = write(tmp_path / "d.jsonl", rows)
    asked = [row | {"id": f"t{i}"} for i, row in enumerate(rows[:10])]
    talks = {"id": "talk", "messages": AGENT}
    test = write(tmp_path / "test.jsonl", [*asked, {"id": "s50", "messages": [user("new")], "target": "no"}])
    write(tmp_path / "more.jsonl", [talks])
    config = configured(path, tiny_folder, tmp_path / "run", test_file=str(test))
    parts, left_out = splits.divide(config, None)
    assert names(parts["test"]) == [*(f"t{i}" for i in range(10)), "s50"]
    assert left_out["repeats_left_out"] == 10
    assert sorted(names(parts["train"]) + names(parts["validation"])) == sorted(f"s{i}" for i in range(10, 100))
    # The card looks for its questions among the training samples; a changed file is noticed.
    loaded = splits.load_splits(config)
    assert [sample.id for sample in loaded.test.samples] == names(parts["test"])
    card = json.loads((tmp_path / "run/data/card.json").read_text())
    assert card["overlap_with_train"]["test"]["samples"] == 11
    check_sources(config)
    write(test, asked)
    with pytest.raises(ValueError, match=r"with a different test\.jsonl of --samples\.test_file="):
        check_sources(config)
    # Any form of data will do, beside the generated corpus too.
    sizes = GeneratedSettings(train=8, validation=2, test=3)
    other = configured("generated", "embedded", tmp_path, test_file=str(tmp_path / "more.jsonl"))
    parts, left_out = splits.divide(dataclasses.replace(other, generated=sizes), None)
    assert names(parts["test"]) == ["talk", "talk/1.2"]
    assert left_out["test_texts_left_out"] == 1
    assert [len(parts[name].samples) for name in ("train", "validation")] == [8, 2]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "contains no samples"),
        ([{"id": "a", "messages": AGENT[:3], "target": "text"}], "has no sample to evaluate on"),
        ([{"id": "a", "messages": [user("x" * 2000)], "target": "text"}], "do not fit the model's context"),
    ],
)
def test_a_test_file_that_cannot_be_the_test_part(tmp_path: Path, tiny_folder: Path, rows: list[Row], reason: str):
    path = write(tmp_path / "d.jsonl", make_samples(60))
    config = configured(path, tiny_folder, tmp_path, test_file=str(write(tmp_path / "test.jsonl", rows)))
    with pytest.raises(ValueError, match=reason) as error:
        splits.divide(config, None)
    assert "test.jsonl" in str(error.value)


def test_less_data_is_part_of_more_and_keeps_conversations_whole(agents: Path, tiny_folder: Path, tmp_path: Path):
    def used(seed: int = 0, **samples: Any) -> tuple[dict[str, splits.Part], dict[str, int]]:
        config = configured(agents, tiny_folder, tmp_path, **samples)
        return splits.divide(dataclasses.replace(config, seed=seed), None)

    (whole, none), (tenth, left), (half, _) = used(), used(fraction=0.1), used(fraction=0.5)
    n = len(whole["train"].samples)
    assert none["train_left_out"] == 0
    assert left["train_left_out"] == n - len(tenth["train"].samples)
    assert 0 < len(tenth["train"].samples) < 0.2 * n
    assert set(names(tenth["train"])) < set(names(half["train"])) < set(names(whole["train"]))
    turns = Counter(sample.conversation for sample in tenth["train"].samples)
    assert set(turns.values()) == {3}
    assert names(tenth["test"]) == names(whole["test"])
    assert set(names(used(seed=1, fraction=0.1)[0]["train"])) != set(names(tenth["train"]))
    limited, left = used(limit=40)
    assert len(limited["train"].samples) == 40
    assert left["train_left_out"] == n - 40
    assert set(names(used(limit=20)[0]["train"])) < set(names(limited["train"]))
    assert set(names(used(limit=20, fraction=0.5)[0]["train"])) < set(names(half["train"]))
    assert names(used(limit=10 * n)[0]["train"]) != []
    with pytest.raises(ValueError, match=r"^samples\.fraction=1e-09 leaves none of \d+ training samples; raise it"):
        used(fraction=1e-9)


def test_less_of_the_generated_corpus_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = configured("generated", "embedded", tmp_path / "run", limit=5)
    config = dataclasses.replace(config, generated=GeneratedSettings(train=30, validation=2, test=3))
    loaded = splits.load_splits(config)
    assert [len(part.samples) for part in loaded] == [5, 2, 3]
    assert (
        capsys.readouterr().err.count("25 training samples unused because of samples.fraction and samples.limit") == 1
    )
    assert len(read(tmp_path / "run/data/train.jsonl")) == 5
