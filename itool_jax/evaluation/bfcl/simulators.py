"""Runs BFCL's multi-turn conversations and the official scorer in a child process that may be killed at any time.

In: questions, and a function that answers many conversations at once. Out: responses turn by turn, and verdicts.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from itool_jax.evaluation.bfcl import setup as bfcl_setup
from itool_jax.evaluation.bfcl.checker import Verdict, hides_dots
from itool_jax.evaluation.bfcl.data import (
    MORE_FUNCTIONS,
    MULTI_TURN,
    Message,
    Question,
    Response,
    as_tools,
    is_function_calling,
    shown_functions,
    with_system_prompt,
    written_response,
)
from itool_jax.text.chat import Chat

MAX_STEPS = 20
"""Most steps in a turn; a model that has not finished by then has failed, as on the leaderboard."""
SECONDS = 60
"""Seconds without an answer after which the child is replaced; normally the child stops a command earlier."""

Conversations = Sequence[tuple[str, Sequence[Message], Sequence[Mapping[str, Any]]]]
"""(key, messages, tools) of each conversation; tools are for the chat template, none in prompt mode."""
Answer = Callable[[Conversations], Sequence[str]]
"""Maps many conversations to one response each. Must not raise for inputs a model cannot take."""


class SimulatorError(ValueError):
    """Error for a child that died, hung, or could not carry out a command."""


class Simulators:
    """The official scorer as a child process: started on first use, replaced when it dies, ended with the block.

    It has no network, none of our environment variables, and a temporary working folder.
    """

    def __init__(self) -> None:
        self._python = bfcl_setup.python()
        self._child: subprocess.Popen[bytes] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="itool_bfcl_")

    def __enter__(self) -> "Simulators":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._folder.cleanup()

    def ask(self, command: Mapping[str, Any], seconds: float = SECONDS) -> dict[str, Any]:
        """Returns the child's answer to a command.

        Raises `SimulatorError` if there is none or it reports an error. A child that does not answer is replaced.
        """
        child = self._child or self._start()
        assert child.stdin is not None  # stdin and stdout are pipes
        try:
            text = json.dumps(command).encode() + b"\n"
            while text:
                text = text[child.stdin.write(text) :]
            line = self._line(child, seconds)
        except (BrokenPipeError, TimeoutError) as error:
            self._stop()
            raise SimulatorError(f"the simulators did not answer {command['do']} within {seconds} s") from error
        answer = json.loads(line)
        if "error" in answer:
            raise SimulatorError(f"the simulators failed on {command['do']}: {answer['error']}")
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        worker = Path(__file__).with_name("worker.py")
        surroundings = {"PATH": os.defpath, "BFCL_PROJECT_ROOT": self._folder.name, "OPENBLAS_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            [self._python, "-I", worker],
            bufsize=0,  # unbuffered, so closing the pipes flushes nothing
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self._folder.name,
            env=surroundings,
            start_new_session=True,
        )
        return self._child

    def _line(self, child: subprocess.Popen[bytes], seconds: float) -> bytes:
        assert child.stdout is not None
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(seconds):
                    raise TimeoutError
                part = os.read(child.stdout.fileno(), 1 << 20)
                if not part:
                    raise BrokenPipeError
                line += part
        return line

    def _stop(self) -> None:
        """Kills the child and its process group; never waits for them without a time limit."""
        if (child := self._child) is None:
            return
        self._child = None
        for end in (lambda: os.killpg(child.pid, signal.SIGKILL), child.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                end()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)


class _Conversation(NamedTuple):
    """A conversation in progress; its lists grow."""

    question: Question
    more: dict[str, list[dict[str, Any]]]
    """Functions that a turn adds, by turn number as text."""
    messages: list[Message]
    turns: list[list[Response]]
    """Responses so far, by turn."""
    executed: list[Response]
    """Responses of all turns whose calls were executed."""
    shown: list[dict[str, Any]]
    """Documentation that the chat template lists, in function-calling mode."""
    chat: Chat | None
    """The chat format in function-calling mode; None in prompt mode."""

    def begin_turn(self) -> None:
        number = str(len(self.turns))
        if number in self.more:
            text = MORE_FUNCTIONS
            if self.chat:  # as on the leaderboard, functions shown before get the hint about the language once more
                self.shown[:] = shown_functions([*self.shown, *self.more[number]], self.question.category)
            else:
                text = f"{self.more[number]}\n{text}"
            self.messages.append({"role": "user", "content": text})
        elif self.turns:
            self.messages.extend(self.question.turns[len(self.turns)])
        self.turns.append([])

    def end_turn(self) -> bool:
        """Begins the next turn; returns False if there is none."""
        if len(self.turns) == len(self.question.turns):
            return False
        self.begin_turn()
        return True


def converse(
    questions: Sequence[Question], answer: Answer, simulators: Simulators, chat: Chat | None = None
) -> Iterator[list[tuple[int, Any]]]:
    """Runs all conversations at once, one step of each per batch.

    After each step, yields the conversations that ended, as (index of the question, turns of steps). A turn ends when
    the model answers without calls. If the simulators fail, the conversation ends with the error text as its response,
    which the scorer counts as wrong. With `chat`, they run in function-calling mode: the chat template lists the
    functions and shows calls and results, and `chat` reads the calls.
    """
    documented = simulators.ask({"do": "functions"})["functions"]
    active = [(place, _begin(question, documented, chat)) for place, question in enumerate(questions)]
    while active:
        keys = [f"{c.question.id}/{len(c.turns)}/{len(c.turns[-1])}" for _, c in active]
        texts = answer([(key, c.messages, as_tools(c.shown)) for key, (_, c) in zip(keys, active, strict=True)])
        going_on, ended = [], []
        for (place, conversation), text in zip(active, texts, strict=True):
            try:
                goes_on = _step(conversation, text, simulators)
                result: Any = conversation.turns
            except SimulatorError as error:
                goes_on, result = False, f"Error during inference: {error}"
            if goes_on:
                going_on.append((place, conversation))
            else:
                ended.append((place, result))
        yield ended
        active = going_on


def _begin(question: Question, documented: Mapping[str, Sequence[dict[str, Any]]], chat: Chat | None) -> _Conversation:
    functions = [function for name in question.row["involved_classes"] for function in documented[name]]
    missed: dict[str, list[str]] = question.row.get("missed_function", {})
    more = {turn: [f for name in names for f in functions if f["name"] == name] for turn, names in missed.items()}
    held_back = {name for names in missed.values() for name in names}
    shown = shown_functions([f for f in functions if f["name"] not in held_back], question.category)
    messages = list(question.turns[0]) if chat else with_system_prompt(question.turns[0], shown)
    conversation = _Conversation(question, more, messages, [], [], shown if chat else [], chat)
    conversation.begin_turn()
    return conversation


def _step(conversation: _Conversation, text: str, simulators: Simulators) -> bool:
    """Adds a response and executes its calls; returns True if the conversation goes on."""
    chat, messages = conversation.chat, conversation.messages
    response = written_response(text, chat.read_calls(text)) if chat else text
    conversation.turns[-1].append(response)
    messages.append(chat.as_message(text) if chat else {"role": "assistant", "content": text})
    if chat and isinstance(response, str):
        return conversation.end_turn()
    row = conversation.question.row
    reply = simulators.ask(
        {
            "do": "execute",
            "steps": [*conversation.executed, response],
            "config": row["initial_config"],
            "classes": row["involved_classes"],
            "long_context": "long_context" in conversation.question.category,
        }
    )
    if reply["calls"] is None:
        return conversation.end_turn()
    conversation.executed.append(response)
    if chat and messages[-1]["content"] == text:  # calls that no template can show, and so no results of tools
        messages.append({"role": "user", "content": "\n".join(reply["results"])})
    else:
        names = reply["calls"] if isinstance(response, str) else [name for call in response for name in call]
        for name, result in zip(names, reply["results"], strict=True):
            messages.append({"role": "tool", "name": name, "content": result})
    return len(conversation.turns[-1]) <= MAX_STEPS


def official_verdicts(
    questions: Sequence[Question],
    results: Mapping[str, Any],
    simulators: Simulators,
    *,
    underscore_to_dot: bool = False,
    function_calling: bool = False,
) -> dict[str, Verdict]:
    """Returns the official scorer's verdicts on a category's responses, by id; multi-turn has no other judge.

    `underscore_to_dot` and `function_calling` say how the model was asked, as for `checker.check`. A question whose
    scoring dies or takes too long fails with `simulator_error`.
    """
    failed = {}
    for question in questions:
        if question.id in results:  # each in its own process, so answers cannot affect each other
            try:
                result = results[question.id]
                command = {
                    "do": "official",
                    "category": question.category,
                    "underscore_to_dot": underscore_to_dot or hides_dots(result),
                    "function_calling": function_calling or is_function_calling(result, question.category),
                    "question": question.row,
                    "answer": question.answer,
                    "result": result,
                }
                failed[question.id] = simulators.ask(command)["error_type"]
            except SimulatorError as error:
                failed[question.id] = f"simulator_error:{error}"
    return {name: Verdict(error is None, error) for name, error in failed.items()}


def check_multi_turn(rows: Iterable[Mapping[str, Any]]) -> dict[str, Verdict]:
    """Returns the official scorer's verdicts on multi-turn responses, by id, without question files.

    A row holds `id`, any unique text; `category`, such as `multi_turn_base`; `initial_config` and `involved_classes` as
    in the questions; `ground_truth`, the calls of each turn; and `model_output`, turns of steps, each text or a list
    of `{name: arguments}` with the arguments as JSON text. Raises ValueError for other rows, and if the official scorer
    is not installed.
    """
    by_category: dict[str, dict[str, tuple[Question, Any]]] = {}
    for number, row in enumerate(rows, 1):
        missing = [name for name in _CASE if name not in row]
        if missing or row["category"] not in MULTI_TURN:
            problem = f'no "{missing[0]}"' if missing else f"{row['category']!r} is not a multi-turn category of BFCL"
            raise ValueError(f"row {number}: {problem}")
        if any(row["id"] in cases for cases in by_category.values()):
            raise ValueError(f"row {number}: {row['id']!r} appears twice")
        question = Question(row["id"], row["category"], [], [], row["ground_truth"], {**row, "question": []})
        by_category.setdefault(row["category"], {})[row["id"]] = question, row["model_output"]
    verdicts: dict[str, Verdict] = {}
    with Simulators() as simulators:
        for cases in by_category.values():
            questions, results = zip(*cases.values(), strict=True)
            verdicts |= official_verdicts(questions, dict(zip(cases, results, strict=True)), simulators)
    return verdicts


_CASE = ("id", "category", "initial_config", "involved_classes", "ground_truth", "model_output")
