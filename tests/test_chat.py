"""Chat templates on ids: a prompt and its target are what the template writes, and nothing is read twice."""

import json
import logging
from collections.abc import Sequence
from typing import NamedTuple

import pytest

from itool_jax.text import chat as chats
from itool_jax.text.chat import Chat, answer_ids, encode_sample, evaluation_frame, load_tokenizer
from itool_jax.text.sample import RawSample, Sample
from tests.conftest import shared_path

LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
QWEN = ["<|unused|>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
GEMMA = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather",
        "parameters": {"type": "object", "properties": {}},
    },
}
QUESTION = {"role": "user", "content": "Weather in Paris?"}
CALL = {"role": "assistant", "content": "[get_weather()]"}
CONVERSATIONS = {
    "one turn": [QUESTION],
    "system": [{"role": "system", "content": "Be brief."}, QUESTION],
    "many turns": [
        QUESTION,
        {"role": "assistant", "content": "Which?"},
        {"role": "user", "content": "France"},
    ],
    "tool result": [QUESTION, CALL, {"role": "tool", "content": "sunny, 20"}],
    "after a tool result": [
        QUESTION,
        CALL,
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "It is sunny."},
        {"role": "user", "content": "And in Rome?"},
    ],
}
ANSWER = '[get_weather(city="Paris", n=[1, 2])]'


class Family(NamedTuple):
    """A chat template and what is true of the prompts it writes."""

    special: list[str]
    end_of_turn: str
    template: str | None = None  # None: that of the public data
    starts: bool = False  # writes a start token
    dated: bool = False
    thinks: bool = False  # thinking can be switched off, and earlier turns lose their thinking marks
    system: bool = True  # takes system messages, where tools also go that it does not know of


TRIMS = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '\n\n' + (system or '') + '<|eot_id|>' }}
{%- for message in messages %}
    {%- set role = 'ipython' if message.role == 'tool' else message.role %}
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
    {%- if tools and loop.first %}{{- 'Functions: ' + tools | tojson + '\n\n' }}{%- endif %}
    {{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""
TOOL_ROLE = """\
{%- for message in messages %}
    {%- if loop.first and (tools or message.role == 'system') %}
        {{- '<|im_start|>system\n' + (message.content if message.role == 'system' else 'You help.') }}
        {%- for tool in tools or [] %}{{- '\n' + tool | tojson }}{%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}
    {%- elif message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
THINKS = """\
{%- set last = namespace(user=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' and loop.last and loop.index0 > last.user %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' + ('' if enable_thinking else '<think>\n\n</think>\n\n') }}
{%- endif %}
"""
REJECTS_SYSTEM = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for message in messages %}
    {%- set role = 'model' if message.role == 'assistant' else 'user' %}
    {{- '<start_of_turn>' + role + '\n' + message.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}
"""
FAMILIES = {
    "trims": Family(LLAMA, "<|eot_id|>", TRIMS, starts=True, dated=True),
    "tool role": Family(QWEN, "<|im_end|>", TOOL_ROLE),
    "thinks": Family(QWEN, "<|im_end|>", THINKS, thinks=True),
    "rejects system": Family(GEMMA, "<end_of_turn>", REJECTS_SYSTEM, starts=True, system=False),
    "llama3": Family(LLAMA, "<|eot_id|>", starts=True),
    "llama3_1": Family(LLAMA, "<|eot_id|>", starts=True, dated=True),
    "llama3_2": Family(LLAMA, "<|eot_id|>", starts=True, dated=True),
    "qwen2_5": Family(QWEN, "<|im_end|>"),
    "qwen3": Family(QWEN, "<|im_end|>", thinks=True),
    "qwen3_instruct_2507": Family(QWEN, "<|im_end|>"),
}
"""Short templates in the manner of Llama, Qwen and Gemma; and those of released models, where public data is."""


def byte_tokenizer(special: list[str], merged: Sequence[str] = (), template: str | None = None):
    """A tokenizer of bytes, `merged` texts (one token each) and special tokens (BOS first, EOS last)."""
    import tokenizers
    import transformers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in merged])
    backend.add_special_tokens(special)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=special[-1], bos_token=special[0]
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module", params=FAMILIES)
def real(request) -> tuple[Family, Chat]:
    family = FAMILIES[request.param]
    template = family.template or shared_path(f"tokenizers/chat_templates/{request.param}.jinja").read_text()
    return family, Chat(byte_tokenizer(family.special, template=template))


def tools_for(family: Family) -> list[dict]:
    return [TOOL] if family.system else []


def marks(chat: Chat) -> set[int]:
    return set(chat.tokenizer.all_special_ids) | {
        i for i, t in chat.tokenizer.added_tokens_decoder.items() if t.special
    }


def test_end_of_turn_is_the_templates_not_the_end_of_sequence(real):
    family, chat = real
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_of_turn) == family.end_of_turn
    assert chat.stop_ids == (chat.end_of_turn, chat.tokenizer.eos_token_id)
    assert chat.end_of_turn != chat.tokenizer.eos_token_id


@pytest.mark.parametrize("turns", CONVERSATIONS)
@pytest.mark.parametrize("tools", [(), (TOOL,)], ids=["no tools", "tools"])
def test_prompt_and_target_are_the_whole_conversation_of_the_template(real, turns, tools):
    """What is trained on is what the template writes for the finished conversation, ids and all."""
    family, chat = real
    messages = CONVERSATIONS[turns]
    sample = Sample(id="s", messages=tuple(messages), tools=tools, target=ANSWER)
    if not family.system and (tools or turns == "system"):
        with pytest.raises(ValueError, match=r"sample s: .* cannot render the conversation: System role not supported"):
            encode_sample(chat, sample)
        return
    encoded = encode_sample(chat, sample)
    whole = chat.encode(
        chat.render([*messages, {"role": "assistant", "content": ANSWER}], tools, add_generation_prompt=False)
    )
    together = encoded.prompt_ids + encoded.target_ids
    assert whole[: len(together)] == together
    assert chat.tokenizer.decode(whole[len(together) :]).strip() == ""
    assert chat.tokenizer.decode(encoded.target_ids[:-1]) == chat.written(ANSWER)
    assert encoded.target_ids[-1] == chat.end_of_turn
    assert not marks(chat) & set(encoded.target_ids[:-1])
    assert ("get_weather" in chat.tokenizer.decode(encoded.prompt_ids)) == bool(tools or "tool" in turns)


def test_empty_target_still_has_a_mask(real):
    assert encode_sample(real[1], Sample(id="s", messages=(QUESTION,))).target_ids == [real[1].end_of_turn]


def test_the_template_alone_writes_the_start_token(real):
    family, chat = real
    ids = chat.prompt_ids([QUESTION])
    assert ids.count(chat.tokenizer.bos_token_id) == family.starts


def test_no_date_of_today_in_a_prompt(real):
    family, chat = real
    text = chat.tokenizer.decode(chat.prompt_ids([QUESTION], tools_for(family)))
    assert ("26 Jul 2024" in text) == family.dated


def test_thinking_is_switched_off_where_it_is_optional(real):
    family, chat = real
    assert ("<think>\n\n</think>" in chat.tokenizer.decode(chat.prompt_ids([QUESTION]))) == family.thinks


@pytest.mark.parametrize("scale", ["binary", "four_grades"])
def test_evaluation_continues_the_prompt_as_the_template_would(real, scale):
    family, chat = real
    tools, reference, candidate = tools_for(family), chat.written("[a(x=1)]"), "[a(x="
    prompt = chat.prompt_ids([QUESTION], tools)
    frame = evaluation_frame(chat, chat.encode(reference), scale)
    reply = (chats.REPLY_BINARY if scale == "binary" else chats.REPLY_FOUR_GRADES).format(*"ABCD")
    question = chats.QUESTION_WITH_REFERENCE.format(candidate=candidate, reply=reply)
    turns = [QUESTION, {"role": "assistant", "content": reference}, {"role": "user", "content": question}]
    whole = chat.encode(chat.render(turns, tools, add_generation_prompt=True))
    framed = prompt + frame.before + chat.encode(candidate) + frame.after
    if family.thinks:  # its marks leave the prompt when turns follow: only what comes after the reference can agree
        n = len(framed) - len(prompt) - len(chat.encode(reference))
        assert framed[-n:] == whole[-n:]
    else:
        assert framed == whole


def test_evaluation_alone_asks_about_the_assistants_own_answer(real):
    family, chat = real
    frame = evaluation_frame(chat, None)
    text = chat.tokenizer.decode(frame.after)
    assert frame.before == []
    assert frame.after[0] == chat.end_of_turn
    assert chats.QUESTION_ALONE.format(reply=chats.REPLY_BINARY.format(*"AB")) in text
    opening = text.rindex(family.special[1])
    assert chat.tokenizer.decode(chat.prompt_ids([QUESTION])).endswith(text[opening:])


def test_reference_ids_are_never_tokenised_again():
    """Ids that no encoder would give for their text survive, and no placeholder does."""
    chat = Chat(byte_tokenizer(QWEN, ["ab"], PLAIN))
    apart = [*chat.encode("a"), *chat.encode("b")]
    assert apart != chat.encode("ab")
    frame = evaluation_frame(chat, apart)
    assert frame.before[:2] == apart
    assert "GOES-HERE" not in chat.tokenizer.decode(frame.before + frame.after)


def test_a_template_without_end_of_turn_falls_back_to_the_end_of_sequence():
    chat = Chat(byte_tokenizer(QWEN, template=PLAIN))
    assert chat.end_of_turn == chat.tokenizer.eos_token_id
    frame = evaluation_frame(chat, chat.encode("yes"))
    assert frame.before[: len("yes") + 1] == [*chat.encode("yes"), chat.end_of_turn]


def test_tools_that_a_template_would_leave_out_go_into_the_system_message():
    chat = Chat(byte_tokenizer(QWEN, template=PLAIN))
    system = {"role": "system", "content": "Be brief."}
    without = chat.tokenizer.decode(chat.prompt_ids([QUESTION], [TOOL]))
    joined = chat.tokenizer.decode(chat.prompt_ids([system, QUESTION], [TOOL]))
    assert without.startswith("system: You can call")
    assert joined.startswith("system: Be brief.\n\nYou can call")
    assert all(json.dumps(TOOL) in text for text in (without, joined))
    assert joined.count("system:") == 1


def test_answer_letters_are_what_a_target_would_begin_with(real):
    _, chat = real
    assert [[i, chat.end_of_turn] for i in answer_ids(chat, "ABCD")] == [chat.target_ids(letter) for letter in "ABCD"]


def test_answer_letters_of_several_tokens_are_refused():
    chat = Chat(byte_tokenizer(QWEN))
    with pytest.raises(ValueError, match=r"no single token for the self-evaluation answer 'AB'"):
        answer_ids(chat, ["A", "AB"])
    with pytest.raises(ValueError, match=r"no single token for the self-evaluation answer 'A'"):
        answer_ids(chat, ["A", "A"])


def test_raw_samples_are_used_as_given(real):
    _, chat = real
    raw = RawSample(id="r", prompt_ids=(5, 3), target_ids=(9,))
    assert encode_sample(chat, raw) == ("r", [5, 3], [9])
    assert encode_sample(chat, RawSample(id="r", prompt="a b")) == ("r", chat.encode("a b"), [])
    assert encode_sample(chat, RawSample(id="r", prompt_ids=())) == ("r", [], [])


def test_no_template_matters_only_once_a_chat_is_rendered(tmp_path):
    byte_tokenizer(QWEN).save_pretrained(tmp_path)
    chat = Chat(load_tokenizer(str(tmp_path)))
    assert chat.stop_ids == (chat.tokenizer.eos_token_id,)
    assert encode_sample(chat, RawSample(id="r", prompt_ids=(1,))).prompt_ids == [1]
    with pytest.raises(
        ValueError,
        match=rf"sample s: tokenizer of {tmp_path} has no chat template; add chat_template.jinja",
    ):
        encode_sample(chat, Sample(id="s", messages=(QUESTION,), target="x"))


def test_a_template_that_refuses_names_the_sample():
    chat = Chat(
        byte_tokenizer(
            QWEN, template=PLAIN + "{% if 'Paris' in messages[-1].content %}{{ raise_exception('no') }}{% endif %}"
        )
    )
    with pytest.raises(ValueError, match=r"sample s: chat template of .* cannot render the conversation: no"):
        encode_sample(chat, Sample(id="s", messages=(QUESTION,), tools=(TOOL,)))


def test_a_template_that_trips_over_a_type_names_the_sample():
    chat = Chat(
        byte_tokenizer(QWEN, template=PLAIN + "{% for m in messages %}{{ m.name + ':' if m.name }}{% endfor %}")
    )
    named = QUESTION | {"name": 5}
    with pytest.raises(ValueError, match=r"^sample s: chat template of .* cannot render the conversation: unsupported"):
        encode_sample(chat, Sample(id="s", messages=(named,)))


def test_a_text_longer_than_the_model_takes_is_encoded_without_a_word(tmp_path, monkeypatch):
    said = []
    logger = logging.getLogger("transformers.tokenization_utils_base")
    monkeypatch.setattr(logger, "warning", lambda *words: said.append(words))
    saved = byte_tokenizer(QWEN, template=PLAIN)
    saved.model_max_length = 8
    saved.save_pretrained(tmp_path)
    for tokenizer in (saved, load_tokenizer(str(tmp_path))):
        assert tokenizer.model_max_length == 8
        chat = Chat(tokenizer)
        sample = Sample(id="s", messages=(QUESTION,), target="x" * 99)
        encoded = encode_sample(chat, sample)
        assert len(encoded.prompt_ids) > 8
        assert len(encoded.target_ids) == 100
    assert said == []


@pytest.mark.parametrize(("eos", "expected"), [(None, []), (7, [7]), ([7, 9], [7, 9])])
def test_stop_ids_of_a_folder(tmp_path, eos, expected):
    byte_tokenizer(QWEN, template=PLAIN).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({} if eos is None else {"eos_token_id": eos}))
    chat = Chat(load_tokenizer(str(tmp_path)))
    assert chat.stop_ids == (chat.end_of_turn, *expected)
    assert chat.prompt_ids([QUESTION]) == Chat(byte_tokenizer(QWEN, template=PLAIN)).prompt_ids([QUESTION])


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"model folder /no/such/folder does not exist"):
        load_tokenizer("/no/such/folder")
    with pytest.raises(ValueError, match=r"cannot load the tokenizer of .*: it has no tokenizer.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot load the tokenizer of .*: ") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
    (tmp_path / "tokenizer.json").unlink()
    byte_tokenizer(QWEN).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"generation_config.json is not a JSON object"):
        Chat(load_tokenizer(str(tmp_path)))


def test_a_tokenizer_without_any_end_is_refused():
    tokenizer = byte_tokenizer(QWEN)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"has no end-of-turn token; set eos_token"):
        Chat(tokenizer)
