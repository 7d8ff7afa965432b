"""Turns messages into token ids: chat template, tool format, loss mask and the self-evaluation question.

In: a tokenizer with a chat template, and samples. Out: the ids of a prompt, of a target, and those around a candidate
that the model is asked to judge. Prompt and target are tokenised separately, so that training, scoring, search and
evaluation see the same ids, and the loss covers exactly the assistant's content and its end-of-turn token.
"""

import datetime
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from itool_jax.system.gguf import is_gguf
from itool_jax.system.untrusted import bounded, read_json
from itool_jax.text import gguf
from itool_jax.text.calls import Call, read_calls, write_calls
from itool_jax.text.sample import RawSample, Sample
from itool_jax.text.tool_formats import (
    BRACKETS,
    JSON,
    PROBE,
    PROBES,
    TAG,
    Form,
    ToolFormat,
    ToolStyle,
    describe,
    recognise,
)

# The important part comes first; the embedded model was trained on the rest.
QUESTION_WITH_REFERENCE = (
    "That answer is the reference. A candidate that begins correctly is correct so far.\n"
    "Candidate answer so far: {candidate}\nIs it correct? {reply}"
)
QUESTION_ALONE = "An answer that begins correctly is correct so far. Is your answer so far correct? {reply}"
REPLY_BINARY = "Reply {0} for correct or {1} for incorrect."
REPLY_FOUR_GRADES = "Reply {0} (fully correct), {1} (mostly correct), {2} (mostly wrong) or {3} (wrong)."

TEMPLATE_SECONDS, TEMPLATE_BYTES = 10.0, 1 << 30
"""Limits for a chat template on one conversation; real ones take a millisecond."""

# Placeholders that mark a position in a rendered conversation; they are cut out again and never tokenised.
_ANSWER_MARK, _CANDIDATE_MARK = "ANSWER-GOES-HERE", "CANDIDATE-GOES-HERE"
# Templates that write today's date would otherwise give a different prompt every day.
DATE = datetime.datetime(2024, 7, 26)
# transformers passes no functions to templates, so a macro takes the place of the one that tells today's date.
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("-", "") for letter in "dmYybBaAHMSjeIp"]
_STRFTIME_NOW = (
    "{%- macro strftime_now(form) -%}{{ form"
    + "".join(f" | replace('{directive}', '{DATE.strftime(directive)}')" for directive in _DIRECTIVES)
    + " }}{%- endmacro %}"
)
# Special tokens inside the text of a conversation are replaced by these marks before it is rendered.
_MARK, _MARKED = "\ue000{}\ue001", re.compile("\ue000(\\d+)\ue001")

Message = Mapping[str, Any]
Scale = Literal["binary", "four_grades"]
"""Scale of the self-evaluation question: two answers or four."""


class Encoded(NamedTuple):
    """A sample as token ids; the loss covers only `target_ids`."""

    id: str
    prompt_ids: list[int]
    target_ids: list[int]


class EvaluationFrame(NamedTuple):
    """Ids to append to a prompt: `before`, the candidate's ids without end of turn, `after`.

    The next token that the model predicts is the letter of its answer.
    """

    before: list[int]
    after: list[int]


def load_tokenizer(path: str) -> Any:
    """Loads the tokenizer of a local model folder, GGUF file or Hub name; ValueError if there is none."""
    # Otherwise the first line a user sees would be advice about torch, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    folder = Path(path).is_dir()
    if not folder and not is_gguf(path) and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        raise ValueError(f"model folder {path} does not exist")
    try:
        if is_gguf(path):
            return gguf.load_tokenizer(Path(path))
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=folder)
        tokenizer.clean_up_tokenization_spaces = False  # it would drop spaces from decoded calls
        return tokenizer
    except BaseException as error:  # the tokenizers library raises bare Exception for a broken file, or panics
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        missing = folder and not (Path(path) / "tokenizer.json").exists()
        hint = "it has no tokenizer.json" if missing else reason
        raise ValueError(f"cannot load the tokenizer of {path}: {hint}") from error


class Chat:
    """A tokenizer's chat format.

    `end_of_turn` is the special token that the template puts after an assistant's content, or the end-of-sequence
    token if it puts none. `stop_ids` are all tokens that end a response, end of turn first. `n_ids` is one more than
    the largest id that a text can contain. `form` is how answers write calls; with `native`, the template lists the
    tools and writes earlier calls itself, else the system message lists them and says what an answer looks like.
    `folders`, of a model and its adapter, may list more tokens that end a response than the tokenizer's own folder.

    Raises:
        ValueError: `tool_format` is native, and the template writes calls in no known form or not at all; or
            `tool_style` is given, and the template lists the tools.
    """

    def __init__(
        self,
        tokenizer: Any,
        tool_format: ToolFormat = "auto",
        tool_style: ToolStyle = "schema",
        folders: Sequence[Path] = (),
    ):
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or "the model"
        self._folders = dict.fromkeys((Path(self.name), *folders))
        self.tool_style: ToolStyle = tool_style
        self.form, self.native = self._find_form(tool_format)
        special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(special)
        # The mark's own first character comes first, so that a text that holds it is not taken for a mark.
        self._special = [_MARK[0], *sorted(special.values(), key=len, reverse=True)]
        self.end_of_turn = self._find_end_of_turn()
        self.stop_ids = self._find_stop_ids()
        self.n_ids = max(tokenizer.get_vocab().values(), default=-1) + 1  # a damaged vocabulary has gaps

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Message] = ()) -> list[int]:
        """Encodes the conversation up to the start of the assistant's content.

        The template writes its own start token. A special token that stands in the text of the conversation, such as
        `</s>`, is encoded as that text.

        Raises:
            ValueError: there is no template, it refuses the conversation, or it leaves out a part of it.
        """
        messages, tools = self._marked(messages), self._marked(tools)
        text = self.render(messages, tools, add_generation_prompt=True)
        self._check_shown(text, messages, tools)
        return self._encode_marked(text)

    def target_ids(self, answer: str, before_calls: str = "") -> list[int]:
        """Encodes an answer, its calls written in the tool format, and its end of turn.

        `before_calls` is text in the same turn; formats that cannot hold it leave it out.
        """
        text = self.written(self._marked(answer), self._marked(before_calls))
        return [*self._encode_marked(text), self.end_of_turn]

    def written(self, answer: str, before_calls: str = "") -> str:
        """Writes an answer, `[f(a=1)]` or text, in the tool format."""
        calls = None if self.form is BRACKETS else read_calls(answer)
        if calls is None:
            return answer
        text = self.form.write(calls)
        return f"{before_calls}\n{text}" if before_calls and self.form.keeps_text else text

    def read_calls(self, answer: str) -> list[Call] | None:
        """Reads the calls of an answer in the tool format; None if it is anything else."""
        return self.form.read(answer)

    def content_ids(self, ids: Sequence[int]) -> list[int]:
        """Returns the ids of a response without the tokens that end it."""
        return [i for i in ids if i not in self.stop_ids]

    def as_message(self, answer: str) -> dict[str, Any]:
        """Turns an answer into an assistant message, with calls as a bracketed list."""
        calls = None if self.form is BRACKETS else self.read_calls(answer)
        try:
            content = write_calls(calls or ())
        except ValueError:  # no calls, or ones with a name that only JSON can hold
            return {"role": "assistant", "content": answer}
        before = answer.partition(TAG)[0].strip() if self.form.keeps_text else ""
        return {"role": "assistant", "content": content} | ({"before_calls": before} if before else {})

    def observation_ids(
        self, messages: Sequence[Message], answer: str, results: Sequence[Message], tools: Sequence[Message] = ()
    ) -> list[int]:
        """Encodes the text between an assistant turn, ended by its end-of-turn token, and the next one's content.

        `results` are the messages in between, mostly from tools.
        """
        # A template may accept tool results only after calls, so an answer with calls is marked by a call of that name.
        calls = read_calls(answer)
        marked = write_calls([*calls[:-1], Call(_ANSWER_MARK, {})]) if calls else _ANSWER_MARK
        results = self._marked(results)
        turns = [*self._marked(messages), {"role": "assistant", "content": marked}, *results]
        text = self.render(turns, self._marked(tools), add_generation_prompt=True).rpartition(_ANSWER_MARK)[2]
        self._check_shown(text, results, ())
        ids = self._encode_marked(text)
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), -1)
        return ids[end + 1 :]

    def encode(self, text: str, **how: Any) -> list[int]:
        """Encodes a text with no special tokens added; `how` is for the tokenizer."""
        # Not verbose: callers report over-long inputs, with the sample's id.
        try:
            return self.tokenizer.encode(text, add_special_tokens=False, verbose=False, **how)
        except (TypeError, UnicodeError) as error:  # JSON can contain half a character, "\ud800"
            raise ValueError(f"tokenizer of {self.name} cannot encode the text: {str(error)[:100]}") from error

    def holds_special(self, text: str) -> bool:
        """Returns whether a text contains a special token, as one does that a template wrote."""
        return any(token in text for token in self._special[1:])

    def _marked(self, content: Any) -> Any:
        """Replaces special tokens in the texts of a JSON value, at any depth, by marks."""
        if isinstance(content, str):
            for number, token in enumerate(self._special):
                if token in content:
                    content = content.replace(token, _MARK.format(number))
            return content
        if isinstance(content, Mapping):
            return {key: self._marked(value) for key, value in content.items()}
        return [self._marked(item) for item in content] if isinstance(content, list | tuple) else content

    def _encode_marked(self, text: str) -> list[int]:
        """Encodes a text with marks; each stands for a special token's text."""
        first, *others = _MARKED.split(text)
        ids = self.encode(first)
        for number, after in zip(others[::2], others[1::2], strict=True):
            ids += self._continued(self._special[int(number)], split_special_tokens=True)
            ids += self._continued(after) if after else []
        return ids

    def _continued(self, text: str, **how: Any) -> list[int]:
        """Encodes a text that follows another one; some tokenizers put a space before the first."""
        before, ids = self.encode("x"), self.encode(f"x{text}", **how)
        return ids[len(before) :] if ids[: len(before)] == before else self.encode(text, **how)

    def _check_shown(self, text: str, messages: Sequence[Message], tools: Sequence[Message]) -> None:
        """Raises ValueError for the first message or tool that a rendered conversation does not contain."""
        squeezed = functools.cache(lambda: _squeeze(text))
        for number, message in enumerate(messages, 1):
            content = message.get("content") or ""
            calls = read_calls(content) if message["role"] == "assistant" else None
            parts = [call.name for call in calls] if calls else [content.rpartition("</think>")[2].strip()]
            for part in parts:
                if part not in text and not any(_squeeze(form) in squeezed() for form in _spellings(part)):
                    raise ValueError(
                        f"chat template of {self.name} leaves out message {number} ({message['role']}: "
                        f"{_MARKED.sub('', part)[:40]!r}); use a template that knows the role, or move the text"
                    )
        for tool in tools:
            name = tool.get("function", tool).get("name", "")
            if name not in text:
                remedy = (
                    "set --tool_format=brackets" if self.native else "it shows no system message, which lists the tools"
                )
                raise ValueError(f"chat template of {self.name} leaves out tool {name!r}; {remedy}")

    def render(self, messages: Sequence[Message], tools: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Renders the conversation with the chat template, in the tool format, with thinking off and a fixed date.

        An assistant's content may be calls, `[f(a=1)]`; text beside them is in the message's `before_calls`.

        Raises:
            ValueError: there is no template, or it refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"tokenizer of {self.name} has no chat template; "
                "add chat_template.jinja to the model folder, or give raw prompts"
            )
        if "developer" not in str(self.tokenizer.chat_template):  # OpenAI's newer name for the system
            messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in map(dict, messages)]
        if tools and not self.native:
            messages, tools = _with_system(messages, describe(self.form, tools, self.tool_style)), ()
        return self._apply_template(self._in_format(messages), tools, add_generation_prompt)

    def _apply_template(
        self, messages: Sequence[Message], tools: Sequence[Message], add_generation_prompt: bool
    ) -> str:
        shown_tools = [dict(tool) for tool in tools] or None
        template = self.tokenizer.get_chat_template(tools=shown_tools)
        settings: dict[str, Any] = {"enable_thinking": False, "date_string": f"{DATE:%d %b %Y}"}
        settings = {key: value for key, value in settings.items() if key in template}
        if "strftime_now" in template:
            settings["chat_template"] = _STRFTIME_NOW + template
        try:
            with bounded(TEMPLATE_SECONDS, TEMPLATE_BYTES):  # Jinja is sandboxed; only time and memory need limits
                return self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=shown_tools,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **settings,
                )
        except Exception as error:  # from the template, which may divide by zero or recurse forever
            reason = f"{error or type(error).__name__}"
            raise ValueError(f"chat template of {self.name} cannot render the conversation: {reason[:500]}") from error

    def _in_format(self, messages: Sequence[Message]) -> list[Message]:
        """Writes the assistants' calls in the tool format: as text, or for the template to write."""
        shown: list[Message] = []
        open_ids: list[str] = []
        for number, message in enumerate(messages):
            before = message.get("before_calls", "")
            message = {key: value for key, value in message.items() if key != "before_calls"}
            calls = read_calls(message["content"] or "") if message["role"] == "assistant" else None
            if calls:
                open_ids = [f"{number:05d}{i:04d}"[-9:] for i in range(len(calls))]  # nine characters, as Mistral wants
            if message["role"] == "tool" and open_ids:
                message["tool_call_id"] = open_ids.pop(0)
            elif calls and self.native and self.form is not BRACKETS and (len(calls) == 1 or self._writes_parallel):
                message |= {"content": before, "tool_calls": _tool_calls(calls, open_ids)}
            elif calls:
                text = self.written(message["content"])
                message["content"] = f"{before}\n{text}" if before else text
            shown.append(message)
        return shown

    def _find_form(self, tool_format: ToolFormat) -> tuple[Form, bool]:
        """Returns the form of calls, and whether the template writes it."""
        if tool_format in ("brackets", "json") or not self.tokenizer.chat_template:
            return JSON if tool_format == "json" else BRACKETS, False
        if (form := recognise(self._probe(PROBE))) is not None:
            if self.tool_style != "schema":
                raise ValueError(
                    f"tool_style={self.tool_style} is only for tool_format=brackets and json; "
                    f"the chat template of {self.name} lists the tools itself"
                )
            return form, True
        if tool_format == "native":
            raise ValueError(
                f"chat template of {self.name} writes tool calls in none of the forms known here; "
                "set --tool_format=brackets or json"
            )
        return BRACKETS, False

    @functools.cached_property
    def _writes_parallel(self) -> bool:
        return all(call.name in self._probe(PROBES) for call in PROBES)

    def _probe(self, calls: Sequence[Call]) -> str:
        """Renders a conversation that ends in calls; empty if the template refuses it."""
        question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": ""}
        ids = [f"{number:09d}" for number in range(len(calls))]
        # Of several templates, transformers takes the one named tool_use where there are tools.
        several = isinstance(self.tokenizer.chat_template, dict)
        tools = [
            {"type": "function", "function": {"name": name, "description": "", "parameters": {}}} for name, _ in calls
        ]
        try:
            messages = [question, answer | {"tool_calls": _tool_calls(calls, ids)}]
            return self._apply_template(messages, tools if several else (), False)
        except ValueError:
            return ""

    def _find_end_of_turn(self) -> int:
        if self.tokenizer.chat_template:
            probe = ({"role": "user", "content": "x"}, {"role": "assistant", "content": _ANSWER_MARK})
            text = self.render(probe, (), add_generation_prompt=False)
            after = self.encode(text.rpartition(_ANSWER_MARK)[2])
            end = next((i for i in after if i in self.special_ids), None)
            if end is not None:
                return end
        if self.tokenizer.eos_token_id is None:
            raise ValueError(
                f"tokenizer of {self.name} has no end-of-turn token; set eos_token in tokenizer_config.json"
            )
        return self.tokenizer.eos_token_id

    def _find_stop_ids(self) -> tuple[int, ...]:
        ids = [self.end_of_turn, self.tokenizer.eos_token_id]
        ids += [i for folder in self._folders for i in _generation_eos(folder)]
        return tuple(dict.fromkeys(i for i in ids if i is not None))


def encode_sample(chat: Chat, sample: Sample | RawSample) -> Encoded:
    """Encodes a sample; raw ids are used as given, and a raw text prompt with nothing added.

    Raises:
        ValueError: the conversation cannot be rendered; the message names the sample.
    """
    try:
        if isinstance(sample, RawSample):
            given = sample.prompt_ids if sample.prompt_ids is not None else chat.encode(sample.prompt or "")
            return Encoded(sample.id, list(given), list(sample.target_ids or ()))
        target_ids = chat.target_ids(sample.target, sample.before_calls)
        return Encoded(sample.id, chat.prompt_ids(sample.messages, sample.tools), target_ids)
    except ValueError as error:
        raise ValueError(f"sample {sample.id}: {error}") from error


def evaluation_frame(
    chat: Chat, reference_ids: Sequence[int] | None, scale: Scale = "binary", *, letters: str = "ABCD"
) -> EvaluationFrame:
    """Builds the self-evaluation question as a continuation of any prompt, so that it shares the cache (C of eq 6).

    With a reference (its ids, without end of turn), the assistant has answered with the reference, and the user shows
    the candidate and asks about it. Without one, the assistant has answered with the candidate itself. The turns are
    cut from a small conversation without tools, not from the sample's: templates that move tools or thinking when turns
    are added would change the prompt. Candidates and references are never re-tokenised. `letters` name the possible
    answers, best first.
    """
    reply = (REPLY_FOUR_GRADES if scale == "four_grades" else REPLY_BINARY).format(*letters)
    if reference_ids is None:
        return EvaluationFrame([], _turn_after_answer(chat, QUESTION_ALONE.format(reply=reply)))
    question = QUESTION_WITH_REFERENCE.format(candidate=_CANDIDATE_MARK, reply=reply)
    return EvaluationFrame(*_around_candidate(chat, reference_ids, question))


def answer_ids(chat: Chat, letters: Sequence[str]) -> list[int]:
    """Returns the single token of each answer letter at the start of a response.

    Raises:
        ValueError: a letter has no token of its own.
    """
    encoded = [chat.encode(letter) for letter in letters]
    for letter, ids in zip(letters, encoded, strict=True):
        if len(ids) != 1 or encoded.count(ids) > 1:
            raise ValueError(f"tokenizer of {chat.name} has no single token for the self-evaluation answer {letter!r}")
    return [ids[0] for ids in encoded]


def _around_candidate(chat: Chat, reference_ids: Sequence[int], question: str) -> tuple[list[int], list[int]]:
    left, mark, right = _text_after_answer(chat, question).partition(_CANDIDATE_MARK)
    if not mark or _CANDIDATE_MARK in right:
        raise ValueError(f"chat template of {chat.name} must write a user message verbatim and only once")
    return [*reference_ids, *_ended(chat, chat.encode(left))], chat.encode(right)


def _turn_after_answer(chat: Chat, question: str) -> list[int]:
    return _ended(chat, chat.encode(_text_after_answer(chat, question)))


def _text_after_answer(chat: Chat, question: str) -> str:
    turns = [("user", "x"), ("assistant", _ANSWER_MARK), ("user", question)]
    messages = [{"role": role, "content": content} for role, content in turns]
    return chat.render(messages, (), add_generation_prompt=True).rpartition(_ANSWER_MARK)[2]


def _ended(chat: Chat, ids: list[int]) -> list[int]:
    """Returns the ids after an answer, with an end of turn added if the template writes none."""
    return ids if chat.end_of_turn in ids else [chat.end_of_turn, *ids]


def _tool_calls(calls: Sequence[Call], ids: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
        for id_, (name, arguments) in zip(ids, calls, strict=True)
    ]


def _spellings(text: str) -> Iterable[str]:
    """Yields a text as it is, and as JSON writes it."""
    yield text
    for ascii_only in (False, True):
        yield json.dumps(text, ensure_ascii=ascii_only)


def _squeeze(text: str) -> str:
    """Returns the letters and digits of a text: templates may change spaces, quotes and escapes."""
    return re.sub(r"[\W_]+", "", text)


def _with_system(messages: Sequence[Message], text: str) -> list[Message]:
    """Adds a text to the system message."""
    if messages and messages[0]["role"] == "system":
        first, rest = messages[0], messages[1:]
        return [{**first, "content": f"{first['content']}\n\n{text}"}, *rest]
    return [{"role": "system", "content": text}, *messages]


def _generation_eos(model: Path) -> list[int | None]:
    """Reads the end tokens that a model folder's generation_config.json lists, else its config.json, or a GGUF file."""
    if is_gguf(model):
        return [*gguf.stop_ids(model)]
    paths = [model / name for name in ("generation_config.json", "config.json")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return []
    try:
        listed = read_json(path).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object") from error
    ids = listed if isinstance(listed, list) else [listed]
    if wrong := [i for i in ids if i is not None and (type(i) is not int or not 0 <= i < 2**31)]:
        raise ValueError(f"{path}: eos_token_id must be token ids, got {str(wrong[0])[:40]!r}")
    return ids
