"""The chat: what is streamed is what generate answers, and every command, signal and end of input does its part."""

import io
import json
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import itool_jax
from itool_jax.data.schemas import tool_schemas
from itool_jax.data.sources import load
from itool_jax.inference import streaming
from itool_jax.inference.sampler import row_keys
from itool_jax.inference.streaming import Stream, as_text
from itool_jax.main import main
from itool_jax.stages.chat import highlighted, read_tools
from itool_jax.store.run import Run
from itool_jax.system.untrusted import harmless
from itool_jax.text.call_checks import faults, signature, stub
from itool_jax.text.calls import Call, read_calls
from tests.runs import Made, copy_run

pytestmark = pytest.mark.usefixtures("restored_jax_settings")

WEATHER = {
    "name": "get_weather",
    "description": "the weather of a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
        "required": ["city"],
    },
    "response": {
        "type": "object",
        "properties": {"sky": {"enum": ["clear"]}, "degrees": {"type": "number"}, "hours": {"type": "array"}},
    },
}
TOOLS = tool_schemas([{"type": "function", "function": WEATHER}])
TINY = ("--generate.max_tokens=12",)

Chat = Callable[..., str]


@pytest.fixture
def chat(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Chat:
    """What a chat prints when these lines are typed; with the shipped checkpoint where no model is named."""

    def talk(*lines: str, tools: object = None, settings: tuple[str, ...] = ()) -> str:
        arguments = ["--stage=generate", "--chat", *settings]
        if tools is not None:
            (tmp_path / "tools.json").write_text(json.dumps(tools))
            arguments.append(f"--tools={tmp_path / 'tools.json'}")
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        assert main(arguments) == 0
        return capsys.readouterr().out

    return talk


# Streaming --------------------------------------------------------------------------------------------------


def test_a_conversation_streams_what_generate_answers_with_few_programs(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = itool_jax.load(tiny_folder)
    base, policy = Run(model.config).base, Run(model.config).policy("base").running()
    is_stop_V = np.isin(np.arange(base.config.vocab_size), base.chat.stop_ids)
    stream = Stream(policy, is_stop_V)
    key_1 = row_keys(jax.random.key(0), np.zeros(1, np.uint32))
    decode = base.chat.tokenizer.decode
    messages: list[dict[str, str]] = []
    sizes = []
    for words in ("hi", "what is " + "very " * 20 + "far?", "é?"):
        messages.append({"role": "user", "content": words})
        ids = base.chat.prompt_ids(messages)
        answer_ids = [i for chunk in stream.generate(ids, 12, key_1) for i in chunk]
        text = decode(base.chat.content_ids(answer_ids))
        assert text == model.generate(messages, max_tokens=12)
        assert len(answer_ids) == 12 or answer_ids[-1] in base.chat.stop_ids
        messages.append({"role": "assistant", "content": text})
        sizes.append((streaming._sample._cache_size(), streaming._read._cache_size()))
    assert sizes[-1][0] == sizes[0][0]  # one program samples all turns
    assert sizes[-1][1] <= sizes[0][1] + 2  # and prompts are read by one a width
    # Back to an earlier place, and on from one that was left in the middle.
    first = base.chat.prompt_ids(messages[:1])
    expected = [i for chunk in Stream(policy, is_stop_V).generate(first, 9, key_1) for i in chunk]
    assert next(stream.generate(first, 9, key_1)) == expected[: streaming.CHUNK]
    assert [i for chunk in stream.generate(first, 9, key_1) for i in chunk] == expected
    # The cache grows where a response needs more of it, and keeps what was read.
    monkeypatch.setattr(streaming, "SMALLEST_CACHE", 64)
    small = Stream(policy, is_stop_V)
    assert [i for chunk in small.generate(first, 9, key_1) for i in chunk] == expected
    assert [i for chunk in small.generate([*first, *expected], 50, key_1) for i in chunk] == [
        i for chunk in stream.generate([*first, *expected], 50, key_1) for i in chunk
    ]


@pytest.mark.parametrize("program", ["_read", "_sample"])
def test_what_was_stopped_within_a_program_is_read_again(
    program: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = itool_jax.load(tiny_folder)
    base, policy = Run(model.config).base, Run(model.config).policy("base").running()
    is_stop_V = np.zeros(base.config.vocab_size, bool)
    key_1 = row_keys(jax.random.key(0), np.zeros(1, np.uint32))
    ids = base.chat.prompt_ids([{"role": "user", "content": "what is far?"}], TOOLS)
    stream = Stream(policy, is_stop_V)
    expected = [i for chunk in stream.generate(ids, 8, key_1) for i in chunk]

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(streaming, program, stopped)
        with pytest.raises(KeyboardInterrupt):
            list(stream.generate(ids, 8, key_1))
    logits: list[np.ndarray] = []
    read = streaming._read
    monkeypatch.setattr(streaming, "_read", lambda *a: logits.append(np.asarray((result := read(*a))[0])) or result)
    for again in (stream, Stream(policy, is_stop_V)):
        assert [i for chunk in again.generate(ids, 8, key_1) for i in chunk] == expected
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-6)


def test_samples_depend_on_the_key_alone(tiny_folder: Path) -> None:
    model = itool_jax.load(tiny_folder)
    base, policy = Run(model.config).base, Run(model.config).policy("base").running()
    is_stop_V = np.zeros(base.config.vocab_size, bool)
    keys = [row_keys(jax.random.key(0), np.array([i], np.uint32)) for i in range(2)]
    draws = [
        [i for c in Stream(policy, is_stop_V).generate([65, 66], 10, key, 1.0) for i in c] for key in (*keys, keys[0])
    ]
    assert draws[0] == draws[2] != draws[1]
    assert len(draws[0]) == 10


def test_a_character_is_shown_when_all_its_bytes_are_there() -> None:
    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    text = "aé€😀 ok"
    pieces = list(as_text(decode, [[byte] for byte in text.encode()]))
    assert pieces == list(text)
    assert "".join(as_text(decode, [[0x61, 0xF0], [0x9F], [0x98]])) == "a\ufffd"  # cut off for good
    assert list(as_text(decode, [])) == []


# Calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('get_weather(city="Paris", days=3, unit="C")', []),
        ("get_weather(days=3)", ["argument city is missing"]),
        ('get_weater(city="Paris")', ["unknown function get_weater; did you mean get_weather?"]),
        ("xyz()", ["unknown function xyz"]),
        ('get_weather(city="Paris", day=3)', ["unknown argument day"]),
        (
            'get_weather(city=5, days=True, unit="K")',
            ["argument city must be a string", "argument days must be an integer", "argument unit must be one of C, F"],
        ),
    ],
)
def test_what_is_wrong_with_a_call_is_said(text: str, expected: list[str]) -> None:
    calls = read_calls(f"[{text}]")
    assert calls is not None
    assert faults(calls[0], TOOLS) == expected


def test_a_schema_may_hold_anything() -> None:
    odd = {"a": {"type": ["integer", "null"]}, "b": True, "c": {"type": {}}, "d": {}, "e": {"type": []}}
    tools = tool_schemas([{"name": "f", "parameters": {"type": "object", "properties": odd}}])
    assert faults(Call("f", {"a": None, "b": 1, "c": 1, "d": 1, "e": 1}), tools) == []
    assert faults(Call("f", {"a": "x"}), tools) == ["argument a must be an integer|null"]
    assert signature(tools[0]["function"]) == "f(a: integer|null?, b: any?, c: {}?, d: any?, e: any?)"


def test_a_stub_is_an_example_of_the_response() -> None:
    assert json.loads(stub("get_weather", TOOLS)) == {"sky": "clear", "degrees": 1.0, "hours": []}
    assert stub("unknown", TOOLS) == '{"ok": true}'


# The chat ---------------------------------------------------------------------------------------------------


def test_a_conversation_with_calls_is_saved_as_training_data(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "saved.jsonl"
    question = "i need to change a pump along Salilan with voltage 81.5 in idle mode"
    shown = chat(
        *("/save", f"/save {file}", question, "/tools", '{"done": 1}', f"/save {file}", "/reset", "/bye", "/help"),
        *("/system Be kind.", question, f"/save {file}", f"/save {file}", "/quit", "never"),
    )
    assert f"try: {question}\n" in shown
    call = 'change_pump(line="Salilan", voltage=81.5, mode="idle")'
    assert (
        f'you> {question}\nmodel> [{call}]\n  call 1: {call}\nresult of change_pump [Enter: {{"ok": true}}]> /tools\n'
        in shown
    )
    for line in (
        "/save needs a FILE",
        "not saved: no answer to save yet",
        "you> /bye\n",  # the reset ended the turn
        "change_pump(",
        "saved; ",
        'Enter: {"ok": true}]> {"done": 1}\n',
        "unknown command /bye; /help lists the commands",
        "/system TEXT",
        "new conversation with that system message",
    ):
        assert line in shown
    assert "never" not in shown
    assert shown.endswith("> /quit\n")
    samples = load(file, targets="after_user")
    assert [sample.messages[-1]["content"] for sample in samples] == [question, question]
    assert samples[0].target == f"[{call}]"
    assert samples[0].tools
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0]["messages"][2] == {"role": "tool", "name": "change_pump", "content": '{"done": 1}'}
    assert rows[1]["messages"][0] == {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize("tools", [WEATHER, {"type": "function", "function": WEATHER}, [WEATHER]])
def test_tools_come_in_each_openai_form(chat: Chat, tiny_folder: Path, tools: object) -> None:
    shown = chat("/tools", tools=tools, settings=(f"--model={tiny_folder}",))
    assert "get_weather(city: string, days: integer?, unit: any?)  the weather of a city" in shown
    assert shown.endswith("you> \n")


def test_a_bare_function_keeps_what_its_results_look_like(tmp_path: Path) -> None:
    bare = WEATHER | {"response": {"type": "object", "properties": {"t": {"type": "number"}}}}
    (tmp_path / "tools.json").write_text(json.dumps([bare, {"name": "other"}]))
    tools, given = read_tools(tmp_path / "tools.json")
    assert (stub("get_weather", given), stub("other", given)) == ('{"t": 1.0}', '{"ok": true}')
    assert "response" not in tools[0]["function"]


def test_a_run_answers_with_the_phase_that_is_asked_for(chat: Chat, made: Made, tmp_path: Path) -> None:
    folder = copy_run(made, tmp_path)
    settings = tuple(s for s in made.settings if not s.startswith("--data"))
    shown = chat("f1 7", tools=[WEATHER], settings=(f"--run_dir={folder}", "--generate.phase=last", *settings))
    assert shown.startswith(f"iteration_2 of {folder}, 1 tools")
    model = itool_jax.load(made.folder)
    assert f"model> {harmless(model.generate('f1 7', [WEATHER]))}\n" in shown


def test_a_conversation_that_is_too_long_is_taken_back(chat: Chat, tiny_folder: Path) -> None:
    shown = chat("x" * 1100, "/save x.jsonl", settings=(f"--model={tiny_folder}",), tools=[WEATHER])
    assert "tokens, but the model's context is 1024; /reset starts a new one; turn discarded" in shown
    assert "not saved: no answer" in shown


def test_an_interrupt_stops_the_answer_and_the_chat_goes_on(
    chat: Chat, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    file, sample = tmp_path / "saved.jsonl", streaming._sample
    calls = []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return sample(*arguments)

    monkeypatch.setattr(streaming, "_sample", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    settings = (f"--model={tiny_folder}", *TINY)
    shown = chat("one", f"/save {file}", "two", f"/save {file}", settings=settings, tools=[WEATHER])
    assert "stopped; turn discarded" in shown
    assert "not saved: no answer to save yet" in shown
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert row["messages"][0] == {"role": "user", "content": "two"}
    assert row["messages"][1]["content"] == itool_jax.load(tiny_folder).generate("two", [WEATHER], max_tokens=12)


def test_a_file_of_another_kind_is_not_written_over(chat: Chat, tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    shown = chat("hello", f"/save {file}", tools=[WEATHER])
    assert "/save needs a name that ends in .jsonl or .jsonl.gz, got " in shown
    assert json.loads(file.read_text()) == [WEATHER]


def test_no_answer_moves_the_cursor_or_colours_the_terminal() -> None:
    assert harmless("a\u202eb\u2066c\u2028\x9b2J\t\n") == "a\ufffdb\ufffdc\ufffd\ufffd2J\t\n"
    assert highlighted(Call("f\x1b[2J", {"a\x07": "\x1b[31mred\n"})).plain == 'f�[2J(a�="\\u001b[31mred\\n")'
