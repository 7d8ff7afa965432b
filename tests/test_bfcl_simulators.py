"""BFCL's multi-turn conversations with the official simulators; skipped where those are not installed."""

import contextlib
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from itool_jax.evaluation.bfcl import data as bfcl_data
from itool_jax.evaluation.bfcl import scores as bfcl_scores
from itool_jax.evaluation.bfcl import setup as bfcl_setup
from itool_jax.evaluation.bfcl.checker import Verdict, language_of
from itool_jax.evaluation.bfcl.data import MORE_FUNCTIONS, Question
from itool_jax.evaluation.bfcl.reader import Language, UnreadableError, read_response
from itool_jax.evaluation.bfcl.simulators import (
    MAX_STEPS,
    SimulatorError,
    Simulators,
    check_multi_turn,
    converse,
    official_verdicts,
)
from itool_jax.text.calls import Call
from itool_jax.text.chat import Chat
from itool_jax.text.tool_formats import TAGGED
from tests.conftest import shared_path
from tests.test_chat import QWEN, byte_tokenizer
from tests.test_tool_formats import TAGS

pytestmark = pytest.mark.simulator

FILES = {"root": {"a": {"type": "directory", "contents": {"f.txt": {"type": "file", "content": "x"}}}}}


# A process that holds all that its parent has open, and calls no audit hook.
FORK = (
    "{module}.fork_exec([b'/x'],[b'/x'],False,(),None,[],-1,-1,-1,-1,-1,-1,-1,-1,False,True,-1,None,None,None,-1,"
    "lambda: __import__('time').sleep(30),False)"
)
# Changes what judges, for whatever is judged in the same process.
FORGERY = (
    "[cd(folder='' + str(setattr(__import__('sys').modules['bfcl_eval.eval_checker.eval_runner'], "
    "'multi_turn_checker', lambda *a: {'valid': True})))]"
)


@pytest.fixture(scope="module")
def simulators() -> Iterator[Simulators]:
    try:
        bfcl_setup.python()
    except ValueError as error:
        pytest.skip(str(error))
    with Simulators() as running:
        yield running


def question(turns: Sequence[str | None], answer: Any, name: str = "multi_turn_base_0", **fields: Any) -> Question:
    """About a file system; None is a turn that only brings functions."""
    said = [[] if text is None else [{"role": "user", "content": text}] for text in turns]
    row = {"id": name, "initial_config": {"GorillaFileSystem": FILES}, "involved_classes": ["GorillaFileSystem"]}
    return Question(name, name.rpartition("_")[0], said, [], answer, row | fields | {"question": said})


def execute(simulators: Simulators, *steps: str, seconds: float = 60) -> dict[str, Any]:
    row = question(["q"], []).row
    command = {"do": "execute", "steps": steps, "config": row["initial_config"], "long_context": False}
    return simulators.ask(command | {"classes": row["involved_classes"]}, seconds)


def test_calls_are_executed_on_the_state_that_earlier_steps_left(simulators: Simulators) -> None:
    assert json.loads(execute(simulators, "[ls()]")["results"][0]) == {"current_directory_content": ["f.txt"]}
    reply = execute(simulators, "[touch(file_name='g.txt')]", "[ls(), pwd()]")
    assert reply["calls"] == ["ls()", "pwd()"]
    assert json.loads(reply["results"][0]) == {"current_directory_content": ["f.txt", "g.txt"]}
    assert json.loads(execute(simulators, "[ls()]")["results"][0]) == {"current_directory_content": ["f.txt"]}
    assert execute(simulators, "Done.") == {"calls": None, "results": []}


def test_conversations_go_on_in_one_batch_until_each_has_ended(simulators: Simulators) -> None:
    script = {
        "multi_turn_base_0/1/0": "[touch(file_name='g.txt')]",
        "multi_turn_base_0/2/0": "[ls()]",
        "multi_turn_miss_func_0/1/0": "I have no such function.",
        "multi_turn_miss_func_0/2/0": "[mkdir(dir_name='d')]",
    }
    asked: list[list[str]] = []
    seen: dict[str, Any] = {}

    def answer(conversations: Sequence[Any]) -> list[str]:
        assert not any(tools for _, _, tools in conversations)  # the system prompt lists them
        asked.append([key for key, _, _ in conversations])
        seen.update({key: list(messages) for key, messages, _ in conversations})
        return [script.get(key, "Done.") for key, _, _ in conversations]

    missed = {"1": ["mkdir"]}
    questions = [
        question(["Make g.txt.", "List."], [["touch(file_name='g.txt')"], ["ls()"]]),
        question(["Make d.", None], [[], ["mkdir(dir_name='d')"]], "multi_turn_miss_func_0", missed_function=missed),
    ]
    done: list[int] = []
    results = {}
    for ended in converse(questions, answer, simulators):
        done.append(len(ended))
        results |= {questions[place].id: result for place, result in ended}
    assert asked[0] == ["multi_turn_base_0/1/0", "multi_turn_miss_func_0/1/0"]
    assert results == {
        "multi_turn_base_0": [["[touch(file_name='g.txt')]", "Done."], ["[ls()]", "Done."]],
        "multi_turn_miss_func_0": [["I have no such function."], ["[mkdir(dir_name='d')]", "Done."]],
    }
    assert sum(done) == 2
    last = seen["multi_turn_base_0/2/1"]
    assert [message["role"] for message in last] == [
        *("system", "user", "assistant", "tool", "assistant", "user", "assistant", "tool"),
    ]
    assert "f.txt" in last[-1]["content"]
    system, more = (seen["multi_turn_miss_func_0/2/0"][i]["content"] for i in (0, -1))
    assert "'mkdir'" not in system
    assert more.startswith("[{'name': 'mkdir'")
    assert more.endswith("What about now?")
    for asked_question in questions:
        assert official_verdicts([asked_question], results, simulators) == {asked_question.id: Verdict(True, None)}


def tagged(*calls: tuple[str, dict[str, Any]]) -> str:
    return TAGGED.write([Call(*call) for call in calls])


def test_function_calling_conversations_show_tools_calls_and_results_by_the_template(simulators: Simulators) -> None:
    chat = Chat(byte_tokenizer(QWEN, template=TAGS))
    touch, listed = ("touch", {"file_name": "g.txt"}), ("ls", {})
    script = {
        "multi_turn_base_0/1/0": f"I look.\n{tagged(touch, listed)}",
        "multi_turn_base_0/2/0": "[ls()]",  # in another form, so text
        "multi_turn_miss_func_0/1/0": tagged(("a[b", {})),  # no call list, and so no template, can hold this name
        "multi_turn_miss_func_0/2/0": tagged(("mkdir", {"dir_name": "d"})),
    }
    missed = {"1": ["mkdir"]}
    questions = [
        question(["Make g.txt.", "List."], [["touch(file_name='g.txt')", "ls()"], []]),
        question(["Make d.", None], [[], ["mkdir(dir_name='d')"]], "multi_turn_miss_func_0", missed_function=missed),
    ]
    seen: dict[str, tuple[list[Any], list[Any]]] = {}

    def answer(conversations: Sequence[Any]) -> list[str]:
        seen.update({key: (list(messages), tools) for key, messages, tools in conversations})
        for _, messages, tools in conversations:
            chat.prompt_ids(messages, tools)
        return [script.get(key, "Done.") for key, _, _ in conversations]

    batches = converse(questions, answer, simulators, chat)
    results = {questions[place].id: result for ended in batches for place, result in ended}
    assert results == {
        "multi_turn_base_0": [[[{"touch": '{"file_name": "g.txt"}'}, {"ls": "{}"}], "Done."], ["[ls()]"]],
        "multi_turn_miss_func_0": [[[{"a[b": "{}"}], "Done."], [[{"mkdir": '{"dir_name": "d"}'}], "Done."]],
    }
    messages, tools = seen["multi_turn_base_0/1/1"]
    assert messages[0] == {"role": "user", "content": "Make g.txt."}
    text = chat.render(messages, tools, add_generation_prompt=True)
    assert f"<|im_start|>assistant\n{script['multi_turn_base_0/1/0']}<|im_end|>" in text
    assert text.count("<tool_response>") == 2
    assert [message["name"] for message in messages[2:]] == ["touch", "ls"]
    assert '"current_directory_content"' in messages[-1]["content"]
    assert {"mkdir", "ls"} <= {tool["function"]["name"] for tool in tools}
    # Functions that come later are listed last; those known already have the hint twice, as on the leaderboard.
    before, after = (seen[f"multi_turn_miss_func_0/{turn}"] for turn in ("1/1", "2/0"))
    assert "mkdir" not in {tool["function"]["name"] for tool in before[1]}
    assert after[1][-1]["function"]["name"] == "mkdir"
    hints = [tool["function"]["description"].count("in Python 3 syntax.") for tool in after[1]]
    assert hints == [2] * len(before[1]) + [1]
    assert after[0][-1] == {"role": "user", "content": MORE_FUNCTIONS}
    assert before[0][-1]["role"] == "user"
    assert "Error during execution" in before[0][-1]["content"]
    for asked in questions:
        verdicts = official_verdicts([asked], results, simulators, function_calling=True)
        assert verdicts == {asked.id: Verdict(True, None)}


def test_text_of_a_function_calling_model_is_no_call_to_the_official_scorer(simulators: Simulators) -> None:
    asked = question(["List."], [["ls()"]])
    for result, called in (([[[{"ls": "{}"}]]], True), ([["[ls()]"]], False)):
        verdict = official_verdicts([asked], {asked.id: result}, simulators, function_calling=True)[asked.id]
        assert verdict.valid == called
    case = asked.row | {"category": "multi_turn_base", "ground_truth": asked.answer, "model_output": [[[{"ls": "{}"}]]]}
    assert check_multi_turn([case])[asked.id].valid


def test_tools_are_those_of_the_official_harness() -> None:
    try:
        data, python = bfcl_setup.data(), bfcl_setup.python()
    except ValueError as error:
        pytest.skip(str(error))
    questions = [q for category in bfcl_data.SINGLE_TURN for q in bfcl_data.load_questions(data, category)]
    given = "".join(json.dumps([q.category, q.functions]) + "\n" for q in questions)
    done = subprocess.run([python, "-c", OFFICIAL_TOOLS], input=given, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [json.dumps(bfcl_data.first_tools(q)) for q in questions]
    assert len(questions) == 3641


OFFICIAL_TOOLS = """
import json, sys
from bfcl_eval.constants.type_mappings import GORILLA_TO_OPENAPI
from bfcl_eval.model_handler import utils
from bfcl_eval.model_handler.model_style import ModelStyle
for line in sys.stdin:
    category, functions = json.loads(line)
    functions = utils.func_doc_language_specific_pre_processing(functions, category)
    print(json.dumps(utils.convert_to_tool(functions, GORILLA_TO_OPENAPI, ModelStyle.OpenAI_Completions)))
"""


def as_lists(results: dict[str, Any], language: Language) -> dict[str, Any]:
    """Responses in text, some of them damaged, as a function-calling model's."""
    lists: dict[str, Any] = {}
    for i, (name, text) in enumerate(results.items()):
        lists[name] = text
        with contextlib.suppress(UnreadableError, TypeError):
            calls = read_response(text, language) or []
            names = [call.name.replace(".", "_") if i % 5 else call.name for call in calls]
            given = [json.dumps({str(key): value for key, value in call.arguments.items()}) for call in calls]
            given = [arguments[:-1] if i % 7 == 0 else "[1]" if i % 11 == 0 else arguments for arguments in given]
            lists[name] = [{name: arguments} for name, arguments in zip(names, given, strict=True)]
    return lists


def test_the_official_scorer_agrees_on_lists_of_calls(simulators: Simulators) -> None:
    folder, data = shared_path("data/bfcl_outputs/watt-ai_watt-tool-8B"), shared_path("data/bfcl_v3")
    for category in ("java", "javascript", "parallel", "live_relevance", "irrelevance"):
        questions = bfcl_data.load_questions(data, category)
        texts = bfcl_data.read_results(bfcl_data.find_results(folder)[category], questions)
        results = as_lists(texts, language_of(category))
        questions = questions[:120]
        official = official_verdicts(questions, results, simulators, function_calling=True)
        assert official == bfcl_scores.judge(questions, results, function_calling=True)
        assert {verdict.valid for verdict in official.values()} == {True, False}
        assert any(isinstance(result, list) for result in results.values())


def test_a_model_that_never_ends_its_turn_is_stopped(simulators: Simulators) -> None:
    asked = question(["List.", "More."], [["ls()"], ["ls()"]])
    batches = converse([asked], lambda batch: ["[ls()]"] * len(batch), simulators)
    [turns] = [result for ended in batches for _, result in ended]
    results = {asked.id: turns}
    assert [len(turn) for turn in results[asked.id]] == [MAX_STEPS + 1]
    assert official_verdicts([asked], results, simulators)[asked.id].error_type == "multi_turn:force_terminated"


@pytest.mark.parametrize(
    "code",
    [
        "__import__('os').system('touch {path}')",
        "len(open('{path}', 'w').name)",
        "len(open('/etc/passwd').read())",
        "len(str(__import__('socket').socket()))",
        "__import__('subprocess').call(['touch', '{path}'])",
        "len(__import__('os').listdir('/'))",
        "len(bytearray(9 << 30))",
        "len(__import__('gc').get_objects())",
        FORK.format(module="__import__('_posixsubprocess')"),
        FORK.format(module="__import__('importlib').reload(__import__('_posixsubprocess'))"),
        "__import__('os').fork()",
        "__import__('importlib').reload(__import__('posix')).fork()",
    ],
)
def test_text_of_a_model_does_no_harm(simulators: Simulators, tmp_path: Path, code: str) -> None:
    text = f"[cd(folder=1 + {code.format(path=tmp_path / 'harm')})]"
    assert execute(simulators, text) == {
        "calls": None,
        "results": [],
    }  # the official reader takes the error for no call
    assert not (tmp_path / "harm").exists()
    assert execute(simulators, "[pwd()]")["calls"] == ["pwd()"]


@pytest.mark.parametrize("code", ["__import__('os')._exit(3)", "exit()", "9 ** 9 ** 9"])
def test_a_child_that_dies_or_hangs_is_replaced(simulators: Simulators, code: str) -> None:
    with pytest.raises(SimulatorError, match="execute"):
        execute(simulators, f"[cd(folder=1 + {code})]", seconds=3)
    assert execute(simulators, "[pwd()]")["calls"] == ["pwd()"]


def test_it_sees_no_secrets(simulators: Simulators, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "s")
    with Simulators() as fresh:
        calls = execute(fresh, "[cd(folder='' + str(sorted(__import__('os').environ)))]")["calls"]
    assert "SECRET" not in calls[0]
    assert "PATH" in calls[0]


def test_a_question_whose_simulators_fail_is_failed_and_no_other(simulators: Simulators) -> None:
    good, bad = question(["q"], [["ls()"]]), question(["q"], [["ls()"]], "multi_turn_base_1")
    results = {good.id: [["[ls()]"]], bad.id: [["[cd(folder=1 + exit())]"]]}
    verdicts = official_verdicts([good, bad], results, simulators)
    assert verdicts[good.id].valid
    assert str(verdicts[bad.id].error_type).startswith("simulator_error:")


def test_a_response_changes_no_verdict_on_another(simulators: Simulators) -> None:
    questions = [question(["q"], [["ls()"]], f"multi_turn_base_{i}") for i in range(3)]
    results = {q.id: [[FORGERY if q is questions[0] else "no"]] for q in questions}
    verdicts = official_verdicts(questions, results, simulators)
    assert [verdicts[q.id].error_type for q in questions[1:]] == ["multi_turn:empty_turn_model_response"] * 2


def test_a_response_forges_no_answer_to_the_next_command(simulators: Simulators) -> None:
    forged = '[__import__(\'os\').write(i, b\'{{"calls": ["x"], "results": ["x"]}}\\n\') for i in range({})]'
    for n in (3, 9):
        with contextlib.suppress(SimulatorError):
            execute(simulators, f"[cd(folder='' + str({forged.format(n)}))]")
        assert execute(simulators, "[pwd()]")["calls"] == ["pwd()"]


def test_ending_it_waits_for_nothing_and_leaves_nothing(simulators: Simulators) -> None:
    fork = FORK.format(module="__import__('_posixsubprocess')")
    with Simulators() as fresh:
        folder = Path(fresh._folder.name)
        for code in (f"str({fork}) or 9 ** 9 ** 9", "9 ** 9 ** 9"):
            with contextlib.suppress(SimulatorError):
                execute(fresh, f"[cd(folder=1 + ({code}))]", seconds=3)
        start = time.monotonic()
    assert time.monotonic() - start < 10  # it would wait for a minute
    assert not folder.exists()


def test_a_killed_parent_leaves_nothing(simulators: Simulators) -> None:
    code = (
        "import os, signal; from itool_jax.evaluation.bfcl.simulators import Simulators; s = Simulators(); "
        "s.ask({'do': 'functions'}); print(s._folder.name, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    folder = Path(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())
    assert folder.name.startswith("itool_bfcl_")
    for _ in range(100):
        if not folder.exists():
            break
        time.sleep(0.1)
    assert not folder.exists()


def test_the_official_verdicts_on_cases(simulators: Simulators) -> None:
    with gzip.open(shared_path("data/bfcl_v3/multi_turn_cases_dev.jsonl.gz"), "rt") as file:
        rows = [json.loads(line) for line in file]
    verdicts = check_multi_turn(rows)  # with ids as published, multi_turn_base_13#1, which are no identifiers
    different = [row["id"] for row in rows if verdicts[row["id"]] != (row["verdict"], row["error_type"])]
    # In v3 a wrong token counts the days of the right one down too, which v4 mended: the extra call changes the state.
    assert different == ["multi_turn_base_151#3"]
    assert len(rows) == 66


def test_a_verdict_does_not_depend_on_the_id(simulators: Simulators) -> None:
    for name in ("multi_turn_base_0", "multi_turn_base_0#1", "a b", "1", "multi_turn_base"):
        asked = question(["q"], [["ls()"]], name)._replace(category="multi_turn_base")
        assert official_verdicts([asked], {name: [["[ls()]"]]}, simulators) == {name: Verdict(True, None)}
        wrong = official_verdicts([asked], {name: [["[pwd()]"]]}, simulators)
        assert wrong == {name: Verdict(False, "multi_turn:execution_response_mismatch")}


def test_wrong_multi_turn_rows_are_named() -> None:
    row = {"id": "a", "category": "multi_turn_base", "initial_config": {}, "involved_classes": ["MathAPI"]}
    row |= {"ground_truth": [], "model_output": []}
    for rows, reason in (
        ([{"id": "a"}], 'row 1: no "category"'),
        ([row | {"category": "simple"}], "row 1: 'simple' is not a multi-turn category"),
        ([row, row], "row 2: 'a' appears twice"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_multi_turn(rows)


def test_the_official_scorer_takes_names_without_dots(simulators: Simulators) -> None:
    tool = {"name": "a.f", "parameters": {"properties": {"b": {"type": "string"}}, "required": []}}
    row = {"id": "simple_0", "function": [tool], "question": []}
    asked = Question("simple_0", "simple", [], [tool], [{"a.f": {"b": ["x"]}}], row)
    for dots, text in ((False, "[a.f(b='x')]"), (True, "[a_f(b='x')]")):
        for shown in (False, True):
            verdicts = official_verdicts([asked], {asked.id: text}, simulators, underscore_to_dot=shown)
            assert verdicts[asked.id].valid == (dots == shown)
            assert verdicts == bfcl_scores.judge([asked], {asked.id: text}, underscore_to_dot=shown)


def test_the_official_scorer_agrees_on_real_outputs(simulators: Simulators) -> None:
    folder, data = shared_path("data/bfcl_outputs/watt-ai_watt-tool-8B"), shared_path("data/bfcl_v3")
    for category in ("java", "javascript", "parallel", "live_relevance"):
        questions = bfcl_data.load_questions(data, category)
        results = bfcl_data.read_results(bfcl_data.find_results(folder)[category], questions)
        assert official_verdicts(questions, results, simulators) == bfcl_scores.judge(questions, results)


def test_without_the_environment_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITOOL_BFCL", str(tmp_path))
    with pytest.raises(ValueError, match=r"is not installed in .*; run python -m itool_jax\.evaluation\.bfcl\.setup"):
        Simulators()
