"""Inputs that users of such tools really have: nothing of them is lost, changed or invented without a word.

Each kind is tested on small inputs made here; those of the public data are a second run of some.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from itool_jax import config as settings
from itool_jax.config import Config
from itool_jax.data.rows import without_none
from itool_jax.data.sources import load, read_samples
from itool_jax.main import main
from itool_jax.model import hf
from itool_jax.system.files import write_jsonl
from itool_jax.text.chat import Chat, encode_sample, load_tokenizer
from itool_jax.text.sample import Sample
from tests import runs, tiny
from tests.conftest import shared_path
from tests.tiny import TOOL, USER

ROLES = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}<|system|>{{ message.content }}<|end|>
{%- elif message.role == 'user' -%}<|user|>{{ message.content }}<|end|>
{%- elif message.role == 'assistant' -%}<|assistant|>{{ message.content }}<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
"""
"""A template that says nothing of roles it does not know."""


def turn(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.fixture
def chat_of(tmp_path: Path) -> Callable[[str], Chat]:
    """Makes the chat of a template."""

    def make(template: str, **settings: Any) -> Chat:
        tiny.save_tokenizer(tmp_path)
        (tmp_path / "chat_template.jinja").write_text(template)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return Chat(load_tokenizer(str(tmp_path)))

    return make


@pytest.fixture
def loaded(tmp_path: Path) -> Callable[..., list[Sample]]:
    """Loads rows from a file."""

    def read(*rows: dict[str, Any], name: str = "rows.jsonl") -> list[Sample]:
        write_jsonl(tmp_path / name, rows)
        return load(tmp_path / name)

    return read


def text_of(chat: Chat, messages: list[dict[str, Any]], tools: tuple[Any, ...] = ()) -> str:
    return chat.tokenizer.decode(chat.prompt_ids(messages, tools))


# What the prompt must contain -------------------------------------------------------------------------------


def test_a_developers_message_is_a_systems(chat_of: Callable[[str], Chat]):
    chat = chat_of(ROLES)
    said = [turn("developer", "Say MANGO."), USER]
    assert text_of(chat, said) == text_of(chat, [turn("system", "Say MANGO."), USER])
    assert "<|system|>Say MANGO." in text_of(chat, said)
    other = chat_of(ROLES.replace("'system'", "'developer'"))
    assert "<|system|>Say MANGO." in text_of(other, said)  # it knows the role, and is left to it


@pytest.mark.parametrize(
    ("messages", "left_out"),
    [
        ([USER, turn("assistant", "[f()]"), turn("tool", "20 degrees"), USER], "message 3 (tool: '20 degrees')"),
        ([turn("system", "Be brief."), turn("critic", "No."), USER], "message 2 (critic: 'No.')"),
    ],
)
def test_a_message_that_the_template_leaves_out_is_named(
    chat_of: Callable[[str], Chat], messages: list[Any], left_out: str
):
    with pytest.raises(ValueError, match="leaves out") as error:
        chat_of(ROLES).prompt_ids(messages)
    assert f"leaves out {left_out}" in str(error.value)


def test_results_that_the_template_leaves_out_are_named(chat_of: Callable[[str], Chat]):
    with pytest.raises(ValueError, match=r"leaves out message 1 \(tool: '20 degrees'\)"):
        chat_of(ROLES).observation_ids([USER], "[f()]", [turn("tool", "20 degrees")])


def test_tools_that_the_template_leaves_out_are_named(chat_of: Callable[[str], Chat]):
    template = tiny.tagged(tiny.TEMPLATE)
    assert text_of(chat_of(template), [USER], (TOOL,))
    silent = template.replace("{{ tools | tojson }}", "")
    with pytest.raises(ValueError, match="leaves out tool 'f'; set --tool_format=brackets"):
        chat_of(silent).prompt_ids([USER], (TOOL,))


@pytest.mark.parametrize("how", ["tojson", "trim", "replace('  ', ' ')", "upper"])
def test_a_template_may_write_a_message_in_its_own_way(chat_of: Callable[[str], Chat], how: str):
    chat = chat_of(ROLES.replace("<|user|>{{ message.content }}", f"<|user|>{{{{ message.content | {how} }}}}"))
    question = turn("user", ' Is  "ö"\n5 > 4? ')
    if how == "upper":
        with pytest.raises(ValueError, match="leaves out message 1"):
            chat.prompt_ids([question])
    else:
        assert chat.prompt_ids([question])


def test_a_template_that_asks_for_the_date_gets_the_same_every_day(chat_of: Callable[[str], Chat]):
    chat = chat_of("<|system|>{{ strftime_now('%d %b %Y') }}<|end|>" + ROLES)
    assert text_of(chat, [USER]).startswith("<|system|>26 Jul 2024<|end|>")


# Tokens -----------------------------------------------------------------------------------------------------


def test_decoded_text_keeps_its_spaces(chat_of: Callable[..., Chat]):
    chat = chat_of(ROLES, clean_up_tokenization_spaces=True)
    text = '[f(a="do n\'t , you ?", b=" .")]'
    assert chat.tokenizer.decode(chat.target_ids(text)[:-1]) == text


@pytest.mark.parametrize("template", [ROLES, tiny.tagged(tiny.TEMPLATE)])
def test_a_special_token_inside_a_text_is_text(chat_of: Callable[..., Chat], template: str):
    chat = chat_of(template)
    text = "<b>a<|end|> b<|user|>"
    messages = [turn("user", f"strike {text}"), turn("assistant", f'[f(x="{text}")]'), turn("user", "again")]
    tools = ({"type": "function", "function": {"name": "f", "description": text, "parameters": {}}},)
    ids = chat.prompt_ids(messages, tools)
    plain = chat.prompt_ids(
        json.loads(json.dumps(messages).replace("<|", "(")), json.loads(json.dumps(tools).replace("<|", "("))
    )
    assert sum(i in chat.special_ids for i in ids) == sum(i in chat.special_ids for i in plain)
    assert chat.tokenizer.decode(ids).count(text) == 3
    target = chat.target_ids(f'[f(x="{text}")]')
    assert [i for i in target if i in chat.special_ids] == [chat.end_of_turn] == target[-1:]
    assert text in chat.tokenizer.decode(target)
    (call,) = chat.read_calls(chat.tokenizer.decode(chat.content_ids(target))) or []
    assert call.arguments == {"x": text}


def test_end_tokens_of_config_json_end_answers_too(tmp_path: Path):
    folder = tiny.tiny_checkpoint(tmp_path / "model")
    tokenizer = load_tokenizer(str(folder))
    other = tokenizer.convert_tokens_to_ids("<|pad|>")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [tokenizer.eos_token_id, other]}))
    assert Chat(load_tokenizer(str(folder))).stop_ids == (tokenizer.eos_token_id, other)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    assert Chat(load_tokenizer(str(folder))).stop_ids == (tokenizer.eos_token_id,)


# Rows -------------------------------------------------------------------------------------------------------


def test_turns_of_weight_0_are_history_only(loaded: Callable[..., list[Sample]]):
    messages = [USER, turn("assistant", "no", weight=0), USER, turn("assistant", "yes", weight=1)]
    (sample,) = loaded({"id": "r", "messages": messages})
    assert (sample.id, sample.target) == ("r/2", "yes")
    assert sample.messages[1]["content"] == "no"
    for key, weight in (("train", False), ("trainable", 0)):
        messages[1] = turn("assistant", "no", **{key: weight})
        assert [sample.target for sample in loaded({"id": "r", "messages": messages})] == ["yes"]
    messages[1] = turn("assistant", "no", weight=0.5)
    with pytest.raises(ValueError, match=r'"weight" of an assistant turn must be 0 or 1, got 0\.5'):
        loaded({"id": "r", "messages": messages})
    given = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "no", "weight": 0}]
    given += [{"from": "human", "value": "q"}, {"from": "gpt", "value": "yes"}]
    assert [sample.target for sample in loaded({"conversations": given, "tools": "[]"})] == ["yes"]


def test_functions_are_tools_and_a_function_call_is_a_call(loaded: Callable[..., list[Sample]]):
    call = {"name": "f", "arguments": '{"a": 1}'}
    result = turn("function", "20", name="f")
    messages = [USER, turn("assistant", None, function_call=call), result, turn("assistant", "It is 20.")]
    first, second = loaded({"id": "r", "messages": messages, "functions": [TOOL["function"]]})
    assert first.target == "[f(a=1)]"
    assert first.tools == second.tools == (TOOL,)
    assert [message["role"] for message in second.messages] == ["user", "assistant", "tool"]
    assert second.messages[1]["content"] == "[f(a=1)]"
    row = {"messages": [USER], "tools": [TOOL], "target": turn("assistant", "Let me see.", function_call=call)}
    (sample,) = loaded(row)
    assert (sample.target, sample.before_calls) == ("[f(a=1)]", "Let me see.")


TAGGED = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "target", "before"),
    [
        (TAGGED, "[f(a=1)]", ""),
        (f"Let me see.\n{TAGGED}\n{TAGGED}", "[f(a=1), f(a=1)]", "Let me see."),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]', "[f(a=1)]", ""),
        (f"<think>\nhm {TAGGED}\n</think>\n\n{TAGGED}", "[f(a=1)]", ""),
        ("<think>\nhm\n</think>\n\nIt is 20.", "It is 20.", ""),
        ("Write </think> to end a thought.", "Write </think> to end a thought.", ""),
        ("Use <tool_call> to call.", "Use <tool_call> to call.", ""),
        ("<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", ""),
    ],
)
@pytest.mark.parametrize("form", ["messages", "target", "message", "sharegpt"])
def test_calls_that_an_answer_writes_with_markers_are_calls(
    loaded: Callable[..., list[Sample]], form: str, text: str, target: str, before: str
):
    row: dict[str, Any] = {"messages": [USER], "tools": [TOOL], "target": text}
    if form == "messages":
        row = {"messages": [USER, turn("assistant", text)], "tools": [TOOL]}
    elif form == "message":
        row["target"] = turn("assistant", text)
    elif form == "sharegpt":
        turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": text}]
        row = {"conversations": turns, "tools": json.dumps([TOOL])}
    (sample,) = loaded(row)
    assert (sample.target, sample.before_calls) == (target, before)


def test_dropped_thoughts_are_counted(loaded: Callable[..., list[Sample]], capsys: pytest.CaptureFixture[str]):
    loaded(
        *({"messages": [USER, turn("assistant", f"<think>{i}</think>yes")]} for i in range(3)),
        {"messages": [USER, turn("assistant", "no")]},
    )
    assert "thoughts before answers, <think>...</think>, are left out (3 rows)" in capsys.readouterr().err


def test_a_results_own_tags_are_the_templates(loaded: Callable[..., list[Sample]]):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": TAGGED}]
    turns += [{"from": "tool", "value": "<tool_response>\n20\n</tool_response>"}, {"from": "gpt", "value": "It is 20."}]
    samples = loaded({"conversations": turns, "tools": json.dumps([TOOL])})
    assert samples[1].messages[-1] == {"role": "tool", "content": "20"}


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "u"}}, {"type": "text", "text": None}, {}])
def test_pictures_are_refused(loaded: Callable[..., list[Sample]], part: dict[str, Any]):
    with pytest.raises(ValueError, match="parts that are text: no pictures"):
        loaded({"messages": [turn("user", [{"type": "text", "text": "q"}, part])], "target": "a"})  # type: ignore[arg-type]


# Tables -----------------------------------------------------------------------------------------------------


def test_what_a_table_fills_in_is_not_there(tmp_path: Path, loaded: Callable[..., list[Sample]]):
    import pyarrow
    import pyarrow.parquet

    def row(name: str, parameter: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
        schema = {"type": "object", "properties": {"p": {"type": "array", **parameter}}, "required": ["p"]}
        tool = {"type": "function", "function": {"name": name, "description": "", "parameters": schema}}
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        return {"messages": [USER, turn("assistant", "", tool_calls=[call])], "tools": [tool]}

    rows = [
        row("f", {"default": ["x"], "items": {"type": "string", "enum": ["x"]}}, {"a": 1}),
        row("g", {"items": {"type": "string"}}, {"b": {"c": "x"}}),
        row("h", {"description": "d"}, {"b": {"d": [1]}}),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    given, table = loaded(*rows), load(tmp_path / "rows.parquet")
    assert [(s.target, s.tools) for s in table] == [(s.target, s.tools) for s in given]
    assert without_none({"id": None, "a": [None, {"b": None, "c": [{"d": None}]}]}) == {
        "id": None,
        "a": [None, {"c": [{}]}],
    }


@pytest.mark.parametrize("flat", [True, False])
def test_a_parameters_own_flag_says_whether_it_is_required(loaded: Callable[..., list[Sample]], flat: bool):
    properties = {
        "city": {"type": "string", "description": "c", "required": True},
        "nights": {"type": "integer", "description": "n", "required": False},
    }
    function = {
        "name": "f",
        "description": "d",
        "parameters": properties if flat else {"type": "object", "properties": properties},
    }
    if flat:
        answers = [{"name": "f", "arguments": {"city": "x"}}]
        (sample,) = loaded({"query": "q", "tools": json.dumps([function]), "answers": json.dumps(answers)})
    else:
        (sample,) = loaded(
            {"messages": [USER], "tools": [{"type": "function", "function": function}], "target": "[f()]"}
        )
    schema = sample.tools[0]["function"]["parameters"]
    assert schema["required"] == ["city"]
    assert all("required" not in parameter for parameter in schema["properties"].values())


# Models -----------------------------------------------------------------------------------------------------


def test_a_head_beside_tied_embeddings_is_refused_unless_it_is_their_copy(tmp_path: Path):
    folder = tiny.tiny_checkpoint(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    for difference in (0, 1):
        head = tensors["model.embed_tokens.weight"] + np.float32(difference)
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors")
        if difference:
            with pytest.raises(ValueError, match=r"ties the head to the embeddings, but lm_head.weight differs"):
                hf.load(folder)
        else:
            assert hf.load(folder)[0].tie_embeddings


def test_keys_of_config_json_that_do_not_change_logits_are_harmless(tmp_path: Path):
    folder = tiny.tiny_checkpoint(tmp_path / "model", tokenizer_class="T", no_repeat_ngram_size=3, torchscript=True)
    assert hf.load(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"logit_scale": 2.0}))
    with pytest.raises(ValueError, match=r"logit_scale=2.0 is not a known setting"):
        hf.load(folder)


@pytest.mark.usefixtures("restored_jax_settings")
def test_several_templates_are_used_exported_and_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, run, out = tiny.tiny_checkpoint(tmp_path / "model"), tmp_path / "run", tmp_path / "out"
    (model / hf.TEMPLATES).mkdir()
    with_tools = model / hf.TEMPLATES / "tool_use.jinja"
    with_tools.write_text(tiny.tagged(tiny.TEMPLATE))
    (model / "chat_template.jinja").write_text(ROLES)
    chat = Chat(load_tokenizer(str(model)))
    assert chat.native
    sample = Sample(id="s", messages=(USER,), tools=(TOOL,), target="[f()]")
    ids = encode_sample(chat, sample)
    assert "<|tools|>" in chat.tokenizer.decode(ids.prompt_ids)
    write_jsonl(tmp_path / "d.jsonl", runs.make_samples(40))
    settings = [f"--model={model}", f"--data={tmp_path / 'd.jsonl'}", f"--run_dir={run}", "--lora.rank=2", *runs.SMALL]
    assert main(["--stage=warmup", *settings]) == 0
    assert main(["--stage=export", *settings, f"--output={out}"]) == 0
    assert encode_sample(Chat(load_tokenizer(str(out))), sample) == ids
    with_tools.write_text(with_tools.read_text() + " ")
    capsys.readouterr()
    assert main(["--stage=warmup", *settings]) == 2
    assert "with a different tool_use.jinja of --model" in capsys.readouterr().err


# The public inputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "targets"),
    [
        ("07-none-arguments/rows.parquet", ["[move(x=0, y=1)]", '[say(text="hi")]']),
        ("08-weight-0/rows.jsonl", [f'[get_weather(city="T{i}")]' for i in range(3)]),
        ("33-think-in-target/train.jsonl", [f'[get_weather(city="T{i}")]' for i in range(3)]),
        ("10-tool-call-tags/rows.jsonl", ['[get_weather(city="T0")]', "It is 20 degrees."]),
        ("09-function-call/rows.jsonl", ['[get_weather(city="T0")]', "You are welcome."]),
    ],
)
def test_the_targets_of_the_public_cases(file: str, targets: list[str]):
    assert [sample.target for sample in load(shared_path(f"cases/{file}"))][: len(targets)] == targets


def test_the_tools_of_the_public_cases():
    for name in ("xlam", "openai"):
        (sample,) = load(shared_path(f"cases/22-required-false/{name}.jsonl"))
        assert sample.tools[0]["function"]["parameters"]["required"] == ["city"]
    table, lines = (load(shared_path(f"cases/16-nested-none/xlam.{ending}")) for ending in ("parquet", "jsonl"))
    assert [(s.tools, s.target) for s in table] == [(s.tools, s.target) for s in lines]


def test_the_models_of_the_public_cases(tmp_path: Path):
    dated = Chat(load_tokenizer(str(shared_path("cases/02-template-date/model"))))
    (sample,) = read_samples(shared_path("cases/02-template-date/rows.jsonl"), need_target=True)
    assert "Today is 2024-07-26." in dated.tokenizer.decode(encode_sample(dated, sample).prompt_ids)
    silent = Chat(load_tokenizer(str(shared_path("cases/11-tool-role-dropped/model"))))
    with pytest.raises(ValueError, match=r"leaves out message 3 \(tool: 'RESULT0: 20 degrees'\)"):
        for sample in load(shared_path("cases/11-tool-role-dropped/rows.jsonl")):
            encode_sample(silent, sample)
    assert len(Chat(load_tokenizer(str(shared_path("cases/17-eos-in-config/model")))).stop_ids) == 2
    with pytest.raises(ValueError, match="ties the head to the embeddings"):
        hf.load(shared_path("cases/06-tied-head/model"))
    strict = Chat(load_tokenizer(str(shared_path("cases/04-mistral-v3/model"))))
    for name in ("nine_ids", "openai_ids"):
        for sample in load(shared_path(f"cases/04-mistral-v3/{name}.jsonl")):
            encode_sample(strict, sample)
    ended = Chat(load_tokenizer(str(shared_path("cases/21-special-in-text/model"))))
    for sample in load(shared_path("cases/21-special-in-text/one.jsonl"))[:3]:
        assert set(encode_sample(ended, sample).target_ids[:-1]).isdisjoint(ended.stop_ids)


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3_1"])
def test_a_developers_message_in_real_templates(template: str, tmp_path: Path):
    tiny.save_tokenizer(tmp_path)
    shutil.copy(shared_path(f"tokenizers/chat_templates/{template}.jinja"), tmp_path / "chat_template.jinja")
    chat = Chat(load_tokenizer(str(tmp_path)))
    sample = load(shared_path("cases/01-developer-role/rows.jsonl"))[0]
    assert "MANGO" in chat.tokenizer.decode(encode_sample(chat, sample).prompt_ids)


# Which data -------------------------------------------------------------------------------------------------


def test_data_may_be_several_files_or_a_pattern(tmp_path: Path):
    for name in ("a-1", "a-2", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"id": name, "messages": [USER], "target": "t"}])
    ids = {
        f"{tmp_path}/a-1.jsonl,{tmp_path}/b.jsonl": ["a-1", "b"],
        f"{tmp_path}/a-*.jsonl": ["a-1", "a-2"],
        f"{tmp_path}/b.jsonl,{tmp_path}/a-?.jsonl": ["b", "a-1", "a-2"],
    }
    assert {given: [sample.id for sample in load(given)] for given in ids} == ids
    odd = tmp_path / "a,b.jsonl"
    write_jsonl(odd, [{"id": "odd", "messages": [USER], "target": "t"}])
    assert [sample.id for sample in load(odd)] == ["odd"]
    with pytest.raises(ValueError, match=r"c-\*\.jsonl matches no file"):
        load(f"{tmp_path}/b.jsonl,{tmp_path}/c-*.jsonl")
    with pytest.raises(ValueError, match=r"c\.jsonl does not exist"):
        load(f"{tmp_path}/b.jsonl,{tmp_path}/c.jsonl")


WANTED = "a sample has messages, tools and target, see docs/your-data.md"
ALPACA = f"looks like Alpaca's form, which has no tools; {WANTED}"
PAIR = "a preference pair, not a sample; train on it with --stage=dpo --pairs.file"


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"instruction": "i", "input": "", "output": "o"}, ALPACA),
        ({"instruction": "i", "output": "o"}, ALPACA),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, PAIR),
        ({"chosen": [USER], "rejected": [USER]}, PAIR),
    ],
)
def test_other_forms_are_told_what_to_do(loaded: Callable[..., list[Sample]], row: dict[str, Any], what: str):
    with pytest.raises(ValueError, match=r"rows\.jsonl line 1: ") as error:
        loaded(row)
    assert what in str(error.value)


def test_a_table_of_texts_is_told_what_to_do(tmp_path: Path):
    (tmp_path / "d.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"d\.csv is a table of texts; write its rows as JSON lines"):
        load(tmp_path / "d.csv")


# Settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "remedy"),
    [
        ("--learning_rate=1e-4", "set --warmup.learning_rate and --preference.learning_rate"),
        ("--lr=1e-4", "set --warmup.learning_rate and --preference.learning_rate"),
        ("--output-dir=x", "set --run_dir, or --output for an export"),
        ("--num_train_epochs=3", "set --warmup.epochs and --preference.epochs"),
        ("--bf16", "set --dtype=bfloat16"),
    ],
)
def test_names_of_other_trainers_lead_to_the_setting(argument: str, remedy: str, capsys: pytest.CaptureFixture[str]):
    assert main(["--stage=iterate", argument]) == 2
    name = argument.split("=")[0].replace("output-dir", "output_dir")
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {name} is no setting here; {remedy}; see --help")


def test_no_other_trainers_name_is_a_setting_here():
    names = {name for names, _ in settings._ELSEWHERE for name in names.split()}
    assert names.isdisjoint(Config(stage="iterate").flat())


def test_a_device_that_is_not_here_is_one_line(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "itool_jax.main",
        "--stage=warmup",
        "--config=smoke",
        f"--run_dir={tmp_path / 'r'}",
    ]
    done = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "cuda"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert "error: JAX_PLATFORMS=cuda, but JAX cannot start such a device here (" in line
    assert line.endswith("unset it, or install the extra for that device (cuda12, cuda13, tpu)")


def test_a_run_directory_that_cannot_be_made_is_named(capsys: pytest.CaptureFixture[str]):
    assert main(["--stage=warmup", "--config=smoke", "--run_dir=/proc/nope"]) == 2
    assert (
        "error: folder /proc/nope cannot be created (No such file or directory); set --run_dir"
        in capsys.readouterr().err
    )


def test_tools_must_be_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "tools.py").write_text("def f(a: int): ...\n")
    assert main(["--stage=generate", "--chat", f"--tools={tmp_path / 'tools.py'}"]) == 2
    assert "tools.py is not JSON (" in capsys.readouterr().err


# Targets and their tools ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("restored_jax_settings")
def test_targets_that_contradict_their_tools_are_listed_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows = runs.make_samples(40)
    schema = {"type": "object", "properties": {"n": {"type": "number"}}, "required": ["n"]}
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": schema}}
    wrong = {"unknown": "[g(n=1)]", "missing": "[f()]", "kind": '[f(n="39.3")]'}
    rows += [{"id": name, "messages": [turn("user", name)], "tools": [tool], "target": t} for name, t in wrong.items()]
    write_jsonl(tmp_path / "d.jsonl", rows)
    model = tiny.tiny_checkpoint(tmp_path / "model")
    given = [
        f"--model={model}",
        f"--data={tmp_path / 'd.jsonl'}",
        "--lora.rank=2",
        "--warmup.batch_size=4",
        *runs.SMALL,
    ]
    assert main(["--stage=warmup", *given, f"--run_dir={tmp_path / 'run'}"]) == 0
    card = json.loads((tmp_path / "run/data/card.json").read_text())
    assert card["target_faults"] == {
        "unknown": "unknown function g",
        "missing": "argument n is missing",
        "kind": "argument n must be a number",
    } | {name: fault for name, fault in card["target_faults"].items() if name not in wrong}
    err = capsys.readouterr().err
    assert "targets contradict the tools they call (" in err
    assert "test samples: an accuracy near 50 % is uncertain by ±" in err
    assert main(["--stage=warmup", *given, f"--run_dir={tmp_path / 'strict'}", "--strict"]) == 2
    assert "the target contradicts the tools: " in capsys.readouterr().err
    assert main(["--stage=warmup", *given, f"--run_dir={tmp_path / 'skip'}", "--strict", "--skip_bad_rows"]) == 0
    skipped = (tmp_path / "skip/data/skipped.txt").read_text()
    assert "unknown function g" in skipped
