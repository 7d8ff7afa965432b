"""A terminal chat for trying out a model that calls tools.

In: lines typed or piped in, and the tools in a JSON file. Out: answers as they are sampled, their calls as `text.calls`
reads them, and with /save the conversation as a row of training data.

Tools are never executed. For each call you are asked for the tool's result; Enter takes an example.
"""

import contextlib
import functools
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.text import Text

from itool_jax.data import generated
from itool_jax.data.formats import samples_from_conversation
from itool_jax.data.rows import read_rows
from itool_jax.data.schemas import tool_schemas
from itool_jax.inference.sampler import row_keys, stable_hash
from itool_jax.inference.streaming import Stream, as_text
from itool_jax.model.sharding import use_own_mesh
from itool_jax.store.paths import BASE
from itool_jax.store.run import Run
from itool_jax.system.files import write_jsonl
from itool_jax.system.messages import console_out
from itool_jax.system.untrusted import harmless, read_json
from itool_jax.text import call_checks
from itool_jax.text.calls import Call, contains_call, write_calls
from itool_jax.text.sample import Row

HELP = """\
/reset         starts a new conversation with the same tools and system message
/system TEXT   starts a new conversation with TEXT as system message; without TEXT, with none
/tools         lists the tools
/save FILE     adds the conversation to FILE.jsonl as training data
/help          lists the commands
/quit          quits, like Ctrl-D; Ctrl-C stops an answer and discards the turn"""
NEW = ("/reset", "/system")
EXAMPLE = 40
"""Index of the generated validation sample that supplies the tools if no file does; the demo does not train on it."""

SAVED = (".jsonl", ".jsonl.gz")
"""Extensions that /save accepts, so that it cannot overwrite another file, such as the one with the tools."""


def run(run: Run) -> dict[str, Any]:
    """Chats until the input ends; returns the number of turns."""
    config = run.config
    example = generated.make_sample("validation", EXAMPLE, 0)
    tools, given = read_tools(config.tools) if config.tools else (example.tools, example.tools)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # end at once: there is nothing to save
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, lets `input` edit and recall lines
    with use_own_mesh(config.mesh):
        session = Session(run, tools, given)
        if config.tools is None:
            session.notify(f"demo tools; try: {example.messages[-1]['content']}", "dim")
        session.talk()
    return {"turns": session.turns}


def read_tools(path: Path) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Reads a JSON file with one tool or bare function, or a list; returns OpenAI tool schemas, and the tools as given.

    Raises:
        ValueError: the file holds no valid tool; names the file.
    """
    if path.suffix == ".jsonl":
        raise ValueError(f"tools {path} must be a JSON file with one tool or a list of tools, not one row per line")
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"tools {path} is not JSON ({error}); it must hold one tool or a list, see --help") from error
    try:
        given = content if isinstance(content, list) else [content]
        schemas = tool_schemas(given)
    except ValueError as error:
        raise ValueError(f"tools {path}: {error}") from error
    if not schemas:
        raise ValueError(f"tools {path}: no tools in the file")
    return schemas, tuple(given)


class _ResetError(Exception):
    """Signal that the user started a new conversation during a turn."""


class Session:
    """A model, its tools and the conversation so far."""

    def __init__(self, run: Run, tools: Sequence[Row], given: Sequence[Row]):
        config = run.config
        self.config, self.tools, self.given = config, tuple(tools), given
        self.base = run.base
        policy = run.answering_policy()
        is_stop_V = np.zeros(self.base.config.vocab_size, bool)
        is_stop_V[list(self.base.chat.stop_ids)] = True
        self.stream = Stream(policy.running(), is_stop_V)
        self.system: Row | None = None
        self.turns = 0
        self.reset()
        name = config.model if policy.phase == BASE else f"{policy.phase} of {config.run_dir}"
        self.notify(f"{name}, {len(self.tools)} tools; /help lists the commands", "dim")

    def reset(self) -> None:
        """Starts a new conversation."""
        self.messages = [self.system] if self.system else []
        self.id = f"chat-{time.time_ns() // 1000:x}"

    def talk(self) -> None:
        """Answers lines until the input ends."""
        try:
            while True:
                try:
                    line = _ask("you> ").strip()
                except KeyboardInterrupt:
                    self.notify("\nuse /quit or Ctrl-D to quit", "dim")
                    continue
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.turn(line)
        except EOFError:
            return

    def turn(self, text: str) -> None:
        """Answers a question until an answer calls no tool; takes the turn back if it is interrupted or fails."""
        if any("\ud800" <= character <= "\udfff" for character in text):
            self.notify("the line is not valid UTF-8", "yellow")
            return
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            while calls := self.answer():
                results = [self.result(call) for call in calls]
                self.messages += [
                    {"role": "tool", "name": c.name, "content": r} for c, r in zip(calls, results, strict=True)
                ]
            self.turns += 1
        except _ResetError:
            return
        except KeyboardInterrupt:
            self.notify("\nstopped; turn discarded", "yellow")
            self.messages = before
        except ValueError as error:
            self.notify(f"{error}; turn discarded", "red")
            self.messages = before

    def answer(self) -> list[Call]:
        """Lets the model answer, shows the text and its calls, and returns the calls."""
        chat, settings = self.base.chat, self.config.generate
        ids = chat.prompt_ids(self.messages, self.tools)
        if (token_budget := self.base.config.max_length - len(ids)) < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, but the model's context is {self.base.config.max_length}; "
                "/reset starts a new one"
            )
        limit = min(settings.max_tokens, token_budget)
        fold = np.array([stable_hash(f"{len(self.messages)} {self.messages[-1]['content']}")], np.uint32)
        key_1 = row_keys(jax.random.key(self.config.seed), fold)
        response_ids: list[int] = []
        decode = functools.partial(chat.tokenizer.decode, clean_up_tokenization_spaces=False)
        console_out.print("model> ", end="", style="bold")
        chunks = self.stream.generate(ids, limit, key_1, settings.temperature)
        for piece in as_text(lambda ids: decode(chat.content_ids(ids)), _kept(chunks, response_ids)):
            console_out.out(harmless(piece), end="", highlight=False)
            console_out.file.flush()
        console_out.print()
        text = decode(chat.content_ids(response_ids))
        self.messages.append(chat.as_message(text))
        if response_ids[-1] not in chat.stop_ids:
            self.notify(
                f"cut off after {len(response_ids)} tokens (generate.max_tokens, or the model's context)", "yellow"
            )
        return self.show_calls(text)

    def show_calls(self, text: str) -> list[Call]:
        """Shows the parsed calls of an answer with the faults of each, and returns the calls."""
        calls = self.base.chat.read_calls(text)
        if calls is None and contains_call(text):
            self.notify("  looks like a call, but cannot be parsed in the tool format", "red")
        for number, call in enumerate(calls or (), 1):
            console_out.print(Text(f"  call {number}: ", style="dim") + highlighted(call), soft_wrap=True)
            for line in call_checks.faults(call, self.tools):
                self.notify(f"    {line}", "red")
        return calls or []

    def result(self, call: Call) -> str:
        """Asks the user for the result of a call; an empty line takes the example."""
        # Only the tools as given keep a bare function's result schema.
        example = call_checks.stub(call.name, self.given)
        while True:
            line = _ask(f"result of {harmless(call.name)} [Enter: {harmless(example)}]> ").strip()
            if not line.startswith("/"):
                return line or example
            self.command(line)
            if line.split()[0] in NEW:
                raise _ResetError

    def command(self, line: str) -> None:
        """Runs a slash command; raises EOFError to end the chat."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/quit":
                raise EOFError
            case "/help":
                self.notify(HELP)
            case "/tools":
                for tool in self.tools:
                    function = tool["function"]
                    self.notify(f"{call_checks.signature(function)}  {function['description']}")
            case "/reset":
                self.reset()
                self.notify("new conversation", "dim")
            case "/system":
                self.system = {"role": "system", "content": rest} if rest else None
                self.reset()
                self.notify(f"new conversation {'with that' if rest else 'without a'} system message", "dim")
            case "/save":
                self.save(rest)
            case _:
                self.notify(f"unknown command {name}; /help lists the commands", "yellow")

    def save(self, name: str) -> None:
        """Adds the conversation to a file of training data, or updates it there."""
        if not name:
            self.notify("/save needs a FILE to add the conversation to", "yellow")
            return
        if not name.endswith(SAVED):
            self.notify(f"/save needs a name that ends in {' or '.join(SAVED)}, got {name}", "yellow")
            return
        try:
            if not samples_from_conversation(self.id, self.messages, self.tools, "after_user"):
                raise ValueError("no answer to save yet")
            path = Path(name).expanduser()
            rows = [row for _, row in read_rows(path)] if path.exists() else []
            row = {"id": self.id, "messages": self.messages, "tools": list(self.tools)}
            count = write_jsonl(path, [*(other for other in rows if other.get("id") != self.id), row])
            self.notify(f"saved; {name} now has {count} conversation{'s' * (count > 1)}", "dim")
        except (ValueError, OSError) as error:
            self.notify(f"not saved: {error}", "red")

    def notify(self, text: str, style: str = "") -> None:
        """Prints a line that does not come from the model."""
        console_out.print(Text(harmless(text), style=style), soft_wrap=True)


def highlighted(call: Call) -> Text:
    """Formats a call as canonical text, with colours for its name, argument names and values."""
    text = Text(harmless(call.name), style="bold cyan")
    text.append("(")
    for number, (name, value) in enumerate(call.arguments.items()):
        written = write_calls([Call("f", {"x": value})]).removeprefix("[f(x=").removesuffix(")]")
        text.append(", " if number else "")
        text.append(harmless(name), style="green").append("=")
        text.append(harmless(written), style="magenta" if isinstance(value, str) else "blue")
    return text.append(")")


def _kept(chunks: Iterator[list[int]], response_ids: list[int]) -> Iterator[list[int]]:
    """Yields the chunks as they come, and appends them to `found`."""
    for chunk in chunks:
        response_ids += chunk
        yield chunk


def _ask(prompt: str) -> str:
    """Reads a line from the user; EOFError at the end of the input. Echoes piped lines as if they had been typed."""
    if sys.stdin.isatty():
        return input(prompt)
    console_out.out(prompt, end="", highlight=False)
    line = sys.stdin.readline()
    console_out.out(line.removesuffix("\n"), highlight=False)
    if not line:
        raise EOFError
    return line
