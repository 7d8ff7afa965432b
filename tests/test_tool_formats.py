"""Tool formats: what they write they read back, and every part of the program sees the same tokens."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from itool_jax.evaluation.errors import error_kind
from itool_jax.main import main
from itool_jax.mcts.value import outcome
from itool_jax.system.files import write_jsonl
from itool_jax.text.calls import Call, write_calls
from itool_jax.text.chat import Chat, encode_sample
from itool_jax.text.sample import Sample
from itool_jax.text.steps import Granularity, build_step_table, split_steps
from itool_jax.text.tool_formats import BRACKETS, JSON, LLAMA, MISTRAL, TAGGED, Form, ToolFormat, read_any
from tests import runs, tiny
from tests.conftest import shared_path
from tests.test_chat import GEMMA, QWEN, byte_tokenizer
from tests.test_chat import LLAMA as LLAMA_TOKENS

FORMS = {form.name: form for form in (BRACKETS, JSON, TAGGED, LLAMA, MISTRAL)}
CALLS = [Call("f", {"a": 1, "b": ["x, y", {"k": None}]}), Call("g", {}), Call("f", {"s": 'a "b"\n</tool_call>;'})]


def some_calls(seed: int) -> list[Call]:
    rng = random.Random(seed)

    def value(depth: int = 0) -> Any:
        plain = [1, -2.5, True, None, "", 'é"]}\\', "<tool_call>", "a; b", "it's"]
        kind = rng.randrange(3 if depth < 3 else 1)
        if kind == 0:
            return rng.choice(plain)
        items = [value(depth + 1) for _ in range(rng.randrange(3))]
        return items if kind == 1 else {f"k{i}": item for i, item in enumerate(items)}

    return [Call(rng.choice("fgh"), {name: value() for name in "abc"[: rng.randrange(4)]}) for _ in range(1 + seed % 3)]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_calls_read_back_as_written(form: Form):
    for seed in range(200):
        calls = some_calls(seed)
        assert form.read(form.write(calls)) == calls
        assert read_any(form.write(calls)) == calls
    assert form.read(form.example) is not None


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    "broken", ["", "text", "[]", "{}", "[1]", "null", '[{"name": "f"}]', '{"name": 1, "arguments": {}}', "<tool_call>"]
)
def test_anything_else_is_no_calls(form: Form, broken: str):
    assert form.read(broken) is None
    text = form.write(CALLS[:1])
    assert form.read(text[:-1]) is None
    assert form.read(f"{text} and more") is None
    others = [other for other in FORMS.values() if other is not form]
    assert [other.name for other in others if other.read(text) and {form, other} != {JSON, MISTRAL}] == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999", "-Infinity"])
def test_numbers_that_are_not_finite_are_no_values(number: str):
    body = f'{{"name": "f", "arguments": {{"a": {number}}}}}'
    for form, text in ((JSON, f"[{body}]"), (TAGGED, f"<tool_call>\n{body}\n</tool_call>"), (LLAMA, body)):
        assert form.read(text) is None


def test_text_before_tags_is_allowed_and_another_call_there_is_not():
    assert TAGGED.read(f"I look.\n{TAGGED.write(CALLS[:1])}") == CALLS[:1]
    assert TAGGED.read(f"[f(a=1)]\n{TAGGED.write(CALLS[:1])}") is None


def test_a_right_call_in_another_form_is_wrong_and_the_error_says_so():
    gold = write_calls(CALLS[:1])
    for form in (JSON, TAGGED, LLAMA):
        assert outcome(gold, form.write(CALLS[:1]), finished=True, read=form.read) == 1
        assert outcome(gold, gold, finished=True, read=form.read) == -1
        assert outcome(gold, form.write(CALLS[:1]), finished=True) == -1
        assert outcome("I cannot.", form.write(CALLS[:1]), finished=True) == -1
        assert error_kind(gold, form.write(CALLS[:1]), finished=True) == "wrong format"
    assert error_kind(gold, TAGGED.write(CALLS[1:2]), finished=True) == "wrong function"


# Templates ---------------------------------------------------------------------------------------------------

TAGS = """\
{%- if tools %}<|im_start|>system
{{ messages[0].content + '\\n' if messages[0].role == 'system' }}Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for m in messages if m.role != 'system' %}
{%- if m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ '\\n' if m.content or not loop.first }}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ONE_OBJECT = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\\n\\n' }}
{%- if tools and loop.first %}{{ 'Tools: ' + tools | tojson + '\\n\\n' }}{% endif %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = m.tool_calls[0].function -%}
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}
{%- else %}{{ m.content | trim }}{% endif %}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
NUMBERED = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif -%}
[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]
{%- elif m.tool_calls -%}
[TOOL_CALLS][
{%- for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "
{{- c.id }}"}{{ ', ' if not loop.last }}{% endfor %}]</s>
{%- elif m.role == 'assistant' %}{{ m.content }}</s>
{%- else -%}
{%- if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
[INST]{{ m.content }}[/INST]
{%- endif %}{%- endfor %}"""
MISTRAL_TOKENS = ["<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "</s>"]
TEMPLATES: dict[str, tuple[Form, list[str], str | None]] = {
    "tags": (TAGGED, QWEN, TAGS),
    "one object": (LLAMA, LLAMA_TOKENS, ONE_OBJECT),
    "numbered": (MISTRAL, MISTRAL_TOKENS, NUMBERED),
    "qwen2_5": (TAGGED, QWEN, None),
    "qwen3": (TAGGED, QWEN, None),
    "llama3_1": (LLAMA, LLAMA_TOKENS, None),
    "llama3_2": (LLAMA, LLAMA_TOKENS, None),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "Finds a thing.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
            "required": ["a"],
        },
    },
}
USER = {"role": "user", "content": "What?"}
CALLED = {"role": "assistant", "content": "[f(a=1)]"}
BOTH = {"role": "assistant", "content": '[f(a=1), f(a=2, b="x")]'}
RESULTS = [{"role": "tool", "content": '{"t": 3}'}, {"role": "tool", "content": "4"}]
TALKS = {
    "a question": [USER],
    "a result": [USER, CALLED, RESULTS[0]],
    "parallel results": [USER, BOTH, *RESULTS],
    "answered": [USER, CALLED, RESULTS[0], {"role": "assistant", "content": "3."}, USER],
}


@pytest.fixture(scope="module", params=TEMPLATES)
def template(request: pytest.FixtureRequest) -> tuple[Form, list[str], str]:
    form, special, text = TEMPLATES[request.param]
    return form, special, text or shared_path(f"tokenizers/chat_templates/{request.param}.jinja").read_text()


def chat_of(template: tuple[Form, list[str], str], tool_format: ToolFormat = "auto", **changes: Any) -> Chat:
    return Chat(byte_tokenizer(template[1], template=template[2]), tool_format, **changes)


def test_a_template_that_writes_calls_is_recognised(template):
    for tool_format in ("auto", "native"):
        chat = chat_of(template, tool_format)
        assert (chat.form, chat.native) == (template[0], True)
    assert [chat_of(template, f).form for f in ("brackets", "json")] == [BRACKETS, JSON]


def test_a_template_that_writes_none_gets_brackets_and_native_is_refused():
    tokenizer = byte_tokenizer(GEMMA, template="{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}")
    chat = Chat(tokenizer)
    assert (chat.form, chat.native) == (BRACKETS, False)
    with pytest.raises(ValueError, match="in none of the forms known here; set --tool_format=brackets or json"):
        Chat(tokenizer, "native")


@pytest.mark.parametrize("tool_format", ["native", "brackets", "json"])
@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("target", ["[f(a=1)]", "I cannot."])
def test_training_serving_and_search_see_the_same_tokens(template, tool_format: ToolFormat, talk: str, target: str):
    """A prompt and its target are what the template writes for the finished conversation; so is what follows them."""
    chat, messages = chat_of(template, tool_format), TALKS[talk]
    sample = Sample(id="s", messages=tuple(messages), tools=(TOOL,), target=target)
    row = encode_sample(chat, sample)
    answered = [*messages, {"role": "assistant", "content": target}]
    whole = chat.encode(chat.render(answered, [TOOL], add_generation_prompt=False))
    if chat.form is not MISTRAL:  # its template adds an id to each call, and moves tools to the last user turn
        together = row.prompt_ids + row.target_ids
        if "think" not in chat.tokenizer.decode(row.prompt_ids):
            assert whole[: len(together)] == together
    results = [RESULTS[0]] if target.startswith("[") else [USER]
    behind = chat.observation_ids(messages, target, results, [TOOL])
    after = chat.prompt_ids([*answered, *results], [TOOL])
    assert behind
    assert after[-len(behind) :] == behind
    assert not set(behind[:-20]) & set(chat.stop_ids[1:]) or chat.form is MISTRAL
    answer = chat.tokenizer.decode(chat.content_ids(row.target_ids))
    assert (chat.read_calls(answer) is not None) == target.startswith("[")
    assert outcome(target, answer, finished=True, read=chat.read_calls) == 1
    assert chat.as_message(answer) == {"role": "assistant", "content": target}


@pytest.mark.parametrize("tool_format", ["brackets", "json"])
def test_the_system_message_lists_tools_and_shows_an_answer_where_the_template_does_not(template, tool_format):
    chat = chat_of(template, tool_format)
    text = chat.render([{"role": "system", "content": "Be brief."}, USER], [TOOL], add_generation_prompt=True)
    assert text.count("Finds a thing.") == text.count("Be brief.") == 1
    assert chat.form.instruction.splitlines()[0] in text
    assert "<tools>" not in text
    assert "Given the following functions" not in text
    assert chat.form.instruction not in chat.render([USER], [], add_generation_prompt=True)
    short = chat_of(template, tool_format, tool_style="signature").render([USER], [TOOL], add_generation_prompt=True)
    assert "f(a: integer, b: string?) - Finds a thing." in short
    assert json.dumps(TOOL) in text
    assert json.dumps(TOOL) not in short


def test_text_beside_calls_stays_in_the_conversation_and_in_targets_that_can_hold_it(template):
    talk = [USER, CALLED | {"before_calls": "I look."}, RESULTS[0]]
    for tool_format in ("native", "brackets", "json"):
        chat = chat_of(template, tool_format)
        text = chat.tokenizer.decode(chat.target_ids("[f(a=1)]", "I look."))
        assert ("I look." in text) == (chat.form is TAGGED)
        if tool_format != "native" or chat.form is TAGGED:
            assert "I look." in chat.render(talk, [TOOL], add_generation_prompt=True)


# Steps -------------------------------------------------------------------------------------------------------

BOTH_CALLS = [Call("f", {"a": 1, "b": "x, }"}), Call("g", {"c": [1, 2], "d": {"e": 3}})]
SPLITS: dict[str, tuple[list[str], list[str]]] = {
    "brackets": (
        ['[f(a=1, b="x, }")', ', g(c=[1, 2], d={"e": 3})', "]"],
        ["[f(a=1,", ' b="x, }")', ", g(c=[1, 2],", ' d={"e": 3})', "]"],
    ),
    "json": (
        [
            '[{"name": "f", "arguments": {"a": 1, "b": "x, }"}}',
            ', {"name": "g", "arguments": {"c": [1, 2], "d": {"e": 3}}}',
            "]",
        ],
        [
            '[{"name": "f", "arguments": {"a": 1,',
            ' "b": "x, }"}}',
            ', {"name": "g", "arguments": {"c": [1, 2],',
            ' "d": {"e": 3}}}',
            "]",
        ],
    ),
    "<tool_call>": (
        [
            '<tool_call>\n{"name": "f", "arguments": {"a": 1, "b": "x, }"}}\n</tool_call>',
            '\n<tool_call>\n{"name": "g", "arguments": {"c": [1, 2], "d": {"e": 3}}}\n</tool_call>',
        ],
        [
            '<tool_call>\n{"name": "f", "arguments": {"a": 1,',
            ' "b": "x, }"}}\n</tool_call>',
            '\n<tool_call>\n{"name": "g", "arguments": {"c": [1, 2],',
            ' "d": {"e": 3}}}\n</tool_call>',
        ],
    ),
    "Llama 3.1's JSON": (
        [
            '{"name": "f", "parameters": {"a": 1, "b": "x, }"}}',
            '; {"name": "g", "parameters": {"c": [1, 2], "d": {"e": 3}}}',
        ],
        [
            '{"name": "f", "parameters": {"a": 1,',
            ' "b": "x, }"}}',
            '; {"name": "g", "parameters": {"c": [1, 2],',
            ' "d": {"e": 3}}}',
        ],
    ),
}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("merged", [(), ("<tool_call>", "</tool_call>", "}}", ', "', "</")], ids=["bytes", "merged"])
def test_steps_are_calls_or_arguments_in_every_form(name: str, merged: tuple[str, ...]):
    form, tokenizer = FORMS[name], byte_tokenizer(QWEN, merged)
    stop = tokenizer.eos_token_id
    ids = [*tokenizer.encode(form.write(BOTH_CALLS), add_special_tokens=False), stop]
    for granularity, expected in zip(("call", "argument"), SPLITS[name], strict=True):
        table = build_step_table(tokenizer, granularity, len(tokenizer), [stop], form)
        steps = [tokenizer.decode(step, skip_special_tokens=True) for step in split_steps(table, ids)]
        if not merged:
            assert [step for step in steps if step] == expected
        assert len([step for step in steps if step]) == len(expected)
    whole = build_step_table(tokenizer, "sentence", len(tokenizer), [stop], form)
    assert len([step for step in split_steps(whole, ids) if step != [stop]]) == 1


@pytest.mark.parametrize("granularity", ["call", "argument", "sentence"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_sentences_are_steps_in_every_form(form: Form, granularity: Granularity):
    tokenizer = byte_tokenizer(QWEN, ("<tool_call>",))
    table = build_step_table(tokenizer, granularity, len(tokenizer), [tokenizer.eos_token_id], form)
    ids = tokenizer.encode("If a < b, no. Yes! I do", add_special_tokens=False)
    assert [tokenizer.decode(s) for s in split_steps(table, ids)] == ["If a < b, no.", " Yes!", " I do"]
    if form is TAGGED:
        ids = tokenizer.encode(f"I look.\n{form.write(CALLS[:1])}", add_special_tokens=False)
        first, *rest = [tokenizer.decode(s) for s in split_steps(table, ids)]
        assert first == "I look."
        assert "".join(rest).strip() == form.write(CALLS[:1])
        assert len(rest) == (2 if granularity == "argument" else 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# A whole run -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_speaks_the_templates_form_from_warm_up_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model, run = tiny.tiny_checkpoint(tmp_path / "model", talkative=False), tmp_path / "run"
    head, rest = tiny.TEMPLATE.split("{%- if message.tool_calls -%}")
    rest = rest.partition("<|end|>")[2]
    calls = (
        "{%- for call in message.tool_calls or [] -%}{{ '\\n' if message.content or not loop.first }}<tool_call>\n"
        '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n'
        "</tool_call>{%- endfor -%}<|end|>"
    )
    (model / "chat_template.jinja").write_text(head + calls + rest)
    write_jsonl(tmp_path / "d.jsonl", runs.make_samples(60))
    settings = [
        *(f"--model={model}", f"--data={tmp_path / 'd.jsonl'}", f"--run_dir={run}", "--iterations=1", "--lora.rank=2"),
        *("--replay.select=perplexity", "--replay.replay_fraction=0.3", "--search.inject_gold=always"),
        *("--pairs.require=gap", "--search.n_simulations=4", "--search.breadth=2", "--search.max_depth=2"),
        *("--search.max_step_tokens=64", "--search.max_last_step_tokens=64", "--warmup.batch_size=16", *runs.SMALL),
    ]
    assert main(["--stage=iterate", *settings]) == 0
    assert "tool format: <tool_call>, as the chat template writes it, as in sample" in capsys.readouterr().err
    table = {row["id"]: row for row in read_lines(run / "iteration_1" / "trees.jsonl")}
    calls_of = {name: row for name, row in table.items() if row["gold"].startswith("[")}
    assert calls_of
    for row in calls_of.values():
        steps = [node["text"] for node in row["nodes"] if node["gold"] and node["depth"]]
        assert steps[0].startswith("<tool_call>")
        assert steps[0].endswith("</tool_call>")
    texts = [pair["chosen"] for pair in read_lines(run / "iteration_1" / "pairs.jsonl")]
    assert any("<tool_call>" in text for text in texts)
    assert not any(text.startswith("[f") for text in texts)
    assert main(["--stage=export", *settings, f"--output={tmp_path / 'out'}"]) == 0
    assert "--tool-call-parser=hermes" in (tmp_path / "out" / "SERVING.md").read_text()
