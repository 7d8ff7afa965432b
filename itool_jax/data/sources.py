"""Reads tool-use data of any known form.

In: a file, a folder of files, or `hf:OWNER/NAME` for a data set on the Hugging Face hub. The form is detected from the
content: the OpenAI form {id, messages, tools, target}, raw rows, ToolACE, ToolBench, xLAM-60k, Seal-Tools, ToolRL,
Glaive or API-Bank; for evaluation data also the tests of BFCL and API-Bank.
Out: lists of samples with distinct ids. Errors are one line that names the file and the row.
"""

import dataclasses
import functools
import glob
import itertools
import os
import pathlib
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from itool_jax.data import benchmarks, formats
from itool_jax.data.formats import Targets, samples_from_conversation
from itool_jax.data.rows import SUFFIXES, read_rows, refuse, without_none
from itool_jax.data.schemas import tool_schemas
from itool_jax.system.files import place
from itool_jax.system.messages import log
from itool_jax.system.untrusted import MAX_DEPTH, TOO_DEEP, too_deep
from itool_jax.text.calls import calls_from_openai, read_calls, write_calls
from itool_jax.text.sample import RawSample, Row, Sample, content_id

HUB = "hf:"
ROLES = ("system", "developer", "user", "assistant", "tool")
CALL_KEYS = ("tool_calls", "function_call")
Path = str | os.PathLike[str]
Numbered = list[tuple[int, Row]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplesSettings:
    """Selection of samples: the turns to learn, the held-out parts, and how many samples to use."""

    targets: Targets = "all"
    """Assistant turns that warm-up trains on: all (also those after a tool result or another assistant turn) or
    after_user (only those after a user turn). The search always uses after_user. A row with its own target is one
    sample."""

    test_share: float = 0.1
    """Share of the data held out for the test part; conversations stay whole. Unused with test_file and the generated
    corpus. With 0 and no test_file, a run is evaluated on a benchmark only."""

    validation_share: float = 0.05
    """Share of the rest held out for the validation part. Unused with the generated corpus, which has its own."""

    test_file: str | None = None
    """Data of the test part, in any form that --data accepts. Its samples are removed from the other parts."""

    fraction: float = 1.0
    """Share of the training samples to use, chosen by a hash of their ids and the seed. Conversations stay whole. A
    smaller share is a subset of a larger one."""

    limit: int = 0
    """Most training samples to use, the first by the same hash; 0 = all."""

    max_tools: int = 0
    """Most tools to offer with a sample of any part: those that its conversation calls, and others of its own drawn by
    its id; 0 = all. Fewer tools make prompts shorter and the task easier."""

    def __post_init__(self) -> None:
        for name in ("test_share", "validation_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"samples.{name} must be in [0, 1), got {getattr(self, name)}")
        if self.test_file == "":
            raise ValueError("samples.test_file must not be empty; omit it to use none")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"samples.fraction must be in (0, 1], got {self.fraction}")
        for name in ("limit", "max_tools"):
            if getattr(self, name) < 0:
                raise ValueError(f"samples.{name} must not be negative, got {getattr(self, name)}")


def load(source: Path, skipped: list[str] | None = None, targets: Targets = SamplesSettings.targets) -> list[Sample]:
    """Loads all training samples of a file, a folder or `hf:OWNER/NAME` (its split "train").

    A conversation yields one sample for each assistant turn that `targets` selects. If a list `skipped` is given, an
    invalid row is left out and the reason added to the list.

    Raises:
        ValueError: the source or a row is invalid, or a row is raw; one line that names the source and the row.
    """
    return _load(source, targets, need_target=True, for_training=True, skipped=skipped)


def read_samples(
    source: Path, need_target: bool, targets: Targets = SamplesSettings.targets
) -> list[Sample | RawSample]:
    """Reads the samples of a file, a folder or `hf:OWNER/NAME`, including raw ones and ones without a target.

    The raw forms are {id, prompt_ids, target_ids}, {id, prompt_ids} and {id, prompt}. In the OpenAI form, {id,
    messages, tools, target}, a row is one sample. Its target is a text or an assistant message, whose `tool_calls`
    become a bracketed list; without one, a final assistant turn of the messages is the target. A row without an id gets
    one derived from its content. The public forms are read as in `load`.

    Raises:
        ValueError: the source or a row is invalid, or a file repeats an id; one line that names the source and the row.
    """
    return _load(source, targets, need_target, for_training=False, skipped=None)


def from_rows(rows: Iterable[Row], need_target: bool) -> list[Sample]:
    """Converts rows in the OpenAI form, {messages, tools, target}, to samples, as `read_samples` does.

    Raises:
        ValueError: a row is invalid; one line that gives its number, from 1.
    """
    read = functools.partial(from_openai, need_target=need_target, turns=None)
    samples = [sample for number, row in enumerate(rows, 1) for sample in read_row(f"sample {number}", read, row)]
    if any(isinstance(sample, RawSample) for sample in samples):
        raise ValueError('a sample needs "messages"; raw prompts are supported in files only')
    return _distinct(samples)


def with_fewer_tools(sample: Sample, most: int) -> Sample:
    """Returns a sample with at most `most` of its tools, in their order; all that its conversation calls stay.

    The others are drawn with the sample's id as seed.
    """
    if len(sample.tools) <= most:
        return sample
    called = _called(sample)
    others = [i for i, tool in enumerate(sample.tools) if tool["function"]["name"] not in called]
    n_called = len(sample.tools) - len(others)
    drawn = random.Random(sample.id).sample(others, min(len(others), max(0, most - n_called)))
    tools = [tool for i, tool in enumerate(sample.tools) if i in drawn or i not in others]
    return dataclasses.replace(sample, tools=tuple(tools))


def _called(sample: Sample) -> set[str]:
    """Returns the names of the functions that a sample's target or another of its assistant turns calls."""
    turns = [message for message in (*sample.messages, *sample.following) if message["role"] == "assistant"]
    entries = [entry for turn in turns for entry in turn.get("tool_calls") or []]
    texts = [text for text in (sample.target, *(turn.get("content") for turn in turns)) if isinstance(text, str)]
    named = {entry.get("function", entry).get("name") for entry in entries}
    return named | {call.name for text in texts for call in read_calls(text) or []}


def named(source: str) -> list[pathlib.Path]:
    """Returns the files and folders that a setting names: one, several with commas in between, or a pattern (`*`).

    Raises:
        ValueError: a pattern matches nothing.
    """
    if os.path.exists(source):
        return [pathlib.Path(source)]
    paths: list[pathlib.Path] = []
    for part in source.split(","):
        part = os.path.expanduser(part)
        found = sorted(glob.glob(part)) if glob.has_magic(part) else [part]
        if not found:
            raise ValueError(f"{part} matches no file")
        paths += map(pathlib.Path, found)
    return paths


def load_questions(source: Path) -> list[Sample]:
    """Loads the samples of evaluation data: the forms of `load`, and the tests of BFCL (without targets) and API-Bank.

    A conversation yields one sample for each answer to a user turn, so that each question counts once.

    Raises:
        ValueError: the source or a row is invalid; one line that names the source and the row.
    """
    name = os.fspath(source)
    if name.startswith(HUB):
        return load(name, targets="after_user")
    return _distinct(sample for path in named(name) for file in _files(path) for sample in _questions(file))


def _questions(file: pathlib.Path) -> list[Sample]:
    rows = list(read_rows(file))
    read = _test_reader(rows[0][1]) if rows else None
    if read is None:
        return load(file, targets="after_user")
    return [sample for number, row in rows for sample in read_row(place(file, number), read, row)]


def _test_reader(row: Row) -> Callable[[Row], list[Sample]] | None:
    """Returns the function that reads a test set with rows like this one; None if it is not from a test set."""
    if {"instruction", "input", "expected_output"} <= row.keys():
        return benchmarks.from_api_bank_test
    return benchmarks.from_bfcl if {"id", "question"} <= row.keys() else None


def files_of(source: str, skipped: list[str] | None) -> Iterator[tuple[str, Numbered, Callable[[int], str]]]:
    """Yields for each file of a source, or for a data set of the hub: its name, its rows, and the place of each."""
    if source.startswith(HUB):
        yield source, _hub_rows(source), lambda number: f"{source} row {number}"
        return
    for file in (file for path in named(source) for file in _files(path)):
        yield str(file), list(read_rows(file, skipped)), functools.partial(place, file)


def _load(
    source: Path, targets: Targets, need_target: bool, for_training: bool, skipped: list[str] | None
) -> list[Any]:
    return _distinct(
        sample
        for file in files_of(os.fspath(source), skipped)
        for sample in _samples(*file, targets, need_target, for_training=for_training, skipped=skipped)
    )


def _samples(
    name: str,
    rows: Numbered,
    where: Callable[[int], str],
    targets: Targets,
    need_target: bool,
    for_training: bool,
    skipped: list[str] | None,
) -> list[Sample | RawSample]:
    samples: list[Sample | RawSample] = []
    plain = functools.partial(from_openai, need_target=need_target, turns=targets if for_training else None)
    first: dict[str, int] = {}
    read: Callable[[Row], list[Any]] | None = None
    for number, row in rows:
        try:
            if read is None or skipped is not None:  # with invalid rows, one row's form says nothing about the others
                read = _public_reader(row, where(number), pathlib.Path(name), targets) or plain
            if read is plain:
                _refuse_repeated_id(row, number, first, where)
            new = read_row(where(number), read, row)
            samples += [dataclasses.replace(s, place=where(number)) if isinstance(s, Sample) else s for s in new]
        except ValueError as error:
            refuse(str(error), skipped, error)
    if not samples:
        raise ValueError(f"{name} contains no samples")
    if thoughts := sum(holds_thought(row) for _, row in rows):
        log(f"{name}: thoughts before answers, <think>...</think>, are left out ({thoughts} rows)")
    if for_training and any(isinstance(sample, RawSample) for sample in samples):
        raise ValueError(f"{name} contains raw prompts, which only the stages score and generate accept")
    return samples


def holds_thought(value: Any) -> bool:
    """Returns whether a text in a JSON value, at any depth, begins with a thought."""
    if isinstance(value, str):
        return formats.has_thought(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(holds_thought, items))


def _public_reader(row: Row, where: str, path: pathlib.Path, targets: Targets) -> Callable[[Row], list[Sample]] | None:
    """Returns the function that reads rows like this one; None for the OpenAI form and raw rows."""
    keys = row.keys()
    if {"chosen", "rejected"} <= keys:
        raise ValueError(f"{where}: a preference pair, not a sample; train on it with --stage=dpo --pairs.file")
    if keys & {"messages", "prompt_ids", "prompt"}:
        return None
    if {"query", "calling"} <= keys:
        return functools.partial(formats.from_seal_tools, catalogue=_seal_tools_beside(path))
    if {"query", "tools", "answers"} <= keys:
        return formats.from_xlam
    if {"system", "chat"} <= keys:
        return functools.partial(formats.from_glaive, targets=targets)
    if {"tools", "conversations"} <= keys:
        return functools.partial(formats.from_sharegpt, targets=targets)
    if {"system", "conversations"} <= keys:
        return functools.partial(formats.from_toolace, targets=targets)
    if "conversations" in keys:
        return functools.partial(formats.from_toolbench, targets=targets)
    if {"instruction", "output"} <= keys:
        if "**Available Tools**" in str(row["instruction"]):
            return formats.from_toolrl
        if not row.get("input"):
            raise ValueError(f"{where}: looks like Alpaca's form, which has no tools; {_WANTED}")
        return benchmarks.from_api_bank
    raise ValueError(f'{where}: sample has no "messages", and its keys match no known data set: {", ".join(row)}')


_WANTED = "a sample has messages, tools and target, see docs/your-data.md"


def _refuse_repeated_id(row: Row, number: int, first: dict[str, int], where: Callable[[int], str]) -> None:
    if (key := row.get("id")) is not None and first.setdefault(str(key), number) != number:
        raise ValueError(f'{where(number)}: duplicate id "{key}", first used in {where(first[str(key)])}')


def from_openai(row: Row, need_target: bool, turns: Targets | None) -> list[Any]:
    """Returns a row's sample; without a target, one per turn of `turns`, or only the last turn if `turns` is None."""
    if row.get("messages") is None and row.keys() & {"prompt_ids", "prompt"}:
        return [_raw(row, need_target)]
    messages = row.get("messages")
    if not messages or not isinstance(messages, list):
        raise ValueError('sample has no "messages"')
    shown = [_message(message, number) for number, message in enumerate(messages, 1)]
    following: tuple[Row, ...] = ()
    before = str(row.get("before_calls") or "")
    name, category = _id(row), str(row.get("category") or "")
    tools = tool_schemas(row.get("tools") or row.get("functions"))  # the latter is OpenAI's older name
    if row.get("target") is not None:
        answer, following = _target(row["target"]), _following(row)
        target, before = answer["content"], answer.get("before_calls", before)
    elif turns is not None:
        samples = samples_from_conversation(name, shown, tools, turns, category)
        if not samples:
            raise ValueError('sample has no "target" and no assistant turn that follows a user turn')
        return samples
    else:
        last = shown.pop() if shown[-1]["role"] == "assistant" else {"content": ""}
        target, before = last["content"], last.get("before_calls", "")
    if need_target and not target:
        raise ValueError(f'sample has {"an empty" if row.get("target") is not None else "no"} "target"')
    if not shown:
        raise ValueError("sample has no message before its target")
    sample = Sample(id=name, messages=tuple(shown), tools=tools, target=target, before_calls=before, category=category)
    conversation = str(row.get("conversation") or "")
    return [dataclasses.replace(sample, conversation=conversation, following=following)]


def _following(row: Row) -> tuple[Row, ...]:
    """Returns the messages that follow a row's target."""
    given = row.get("following") or []
    if not isinstance(given, list):
        raise ValueError('"following" must be a list of messages')
    try:
        messages = tuple(_message(message, number) for number, message in enumerate(given, 1))
    except ValueError as error:
        raise ValueError(f'"following": {error}') from error
    if wrong := [message["role"] for message in messages if message["role"] not in ("assistant", "tool")]:
        raise ValueError(f'"following" has a message with role {wrong[0]!r}, expected assistant or tool')
    return messages


def _raw(row: Row, need_target: bool) -> RawSample:
    prompt = row.get("prompt")
    if prompt is not None and row.get("prompt_ids") is not None:
        raise ValueError('sample has both "prompt" and "prompt_ids"')
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise ValueError('"prompt" must be a non-empty string')
    prompt_ids, target_ids = _token_ids(row, "prompt_ids"), _token_ids(row, "target_ids")
    if need_target and target_ids is None:
        raise ValueError('sample has no "target_ids"')
    return RawSample(id=_id(row), prompt_ids=prompt_ids, prompt=prompt, target_ids=target_ids)


def _token_ids(row: Row, key: str) -> tuple[int, ...] | None:
    ids = row.get(key)
    if ids is None:
        return None
    if not isinstance(ids, list) or not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise ValueError(f'"{key}" must be a non-empty list of token ids (non-negative integers)')
    return tuple(ids)


def _id(row: Row) -> str:
    given = row.get("id")
    if given is not None and type(given) not in (str, int):
        raise ValueError('"id" must be a string or an integer')
    return content_id("sample", row) if given in (None, "") else str(given)


def _message(message: Any, number: int) -> Row:
    """Returns the message with text content; calls become a bracketed list, and text beside them `before_calls`."""
    if isinstance(message, dict) and message.get("role") == "function":
        message = message | {"role": "tool"}  # OpenAI's older name for it
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise ValueError(f"message {number} has role {str(role)[:40]!r}, expected one of {', '.join(ROLES)}")
    if message["role"] != "assistant" and message.get("content") is None:
        raise ValueError(f'message {number} has no "content"')
    try:
        read = _assistant(message) if message["role"] == "assistant" else {"content": _text(message)}
    except ValueError as error:
        raise ValueError(f"message {number}: {error}") from error
    # Tables hold None for missing keys.
    kept = {key: value for key, value in message.items() if value is not None and key not in CALL_KEYS}
    return kept | read


def _assistant(message: Row) -> Row:
    """Returns the content of an assistant message, calls as a bracketed list, and the text beside them."""
    before = str(message.get("before_calls") or "")
    calls = message.get("tool_calls") or ([message["function_call"]] if message.get("function_call") else None)
    if calls is not None:
        content = write_calls(calls_from_openai(formats.field({"tool_calls": calls}, "tool_calls", list)))
        before = _text(message).strip()
    else:
        turn = formats.assistant_turn(_text(message))
        content, before = turn["content"], turn.get("before_calls", before)
    return {"content": content} | ({"before_calls": before} if before else {})


def _text(message: Row) -> str:
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError('"content" must be a string, or a list of parts that are text: no pictures or sounds')
    return content or ""


def _target(target: Any) -> Row:
    if not isinstance(target, str | dict):
        raise ValueError('"target" must be a string or an assistant message')
    return _assistant(target if isinstance(target, dict) else {"content": target})


def read_row(where: str, read: Callable[[Row], Any], row: Row) -> Any:
    """Applies `read` to a row, which may hold anything. Raises ValueError with the place and the reason if it fails."""
    try:
        samples = read(row)
        if too_deep([(s.messages, s.tools, s.following) for s in samples if isinstance(s, Sample)], MAX_DEPTH + 3):
            raise ValueError(f"a value is {TOO_DEEP}")
        return samples
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    except KeyError as error:
        raise ValueError(f'{where}: "{error.args[0]}" is missing') from error
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where}: a value is of the wrong type ({error})") from error


def _distinct(samples: Iterable[Any]) -> list[Any]:
    """Makes ids distinct: a repeated one becomes "ID-2". Ids derived from content repeat if rows do."""
    samples = list(samples)
    taken, out = {sample.id for sample in samples}, {}
    counts: dict[str, itertools.count[int]] = {}  # by id, so that many repeats of one id take linear time
    for sample in samples:
        name, numbers = sample.id, counts.setdefault(sample.id, itertools.count(2))
        while name in out or (name != sample.id and name in taken):
            name = f"{sample.id}-{next(numbers)}"
        out[name] = dataclasses.replace(sample, id=name)
    return list(out.values())


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
    files = [file for file in files if not file.name.startswith("tool.jsonl")]  # Seal-Tools' tools, not samples
    if not files:
        raise ValueError(f"{path} contains no data files ({', '.join(SUFFIXES)})")
    return files


def _seal_tools_beside(path: pathlib.Path) -> formats.SealTools:
    for file in (path.parent / "tool.jsonl", path.parent / "tool.jsonl.gz"):
        if file.exists():
            return _seal_tools(str(file))
    raise ValueError(f"{path} is Seal-Tools data and needs tool.jsonl or tool.jsonl.gz in the same folder")


@functools.lru_cache(maxsize=2)
def _seal_tools(file: str) -> formats.SealTools:
    entries = (read_row(place(file, number), formats.seal_tools_entry, row) for number, row in read_rows(file))
    return formats.seal_tools_catalogue(entries)


def _hub_rows(name: str) -> Numbered:
    import datasets  # the import takes a second, and most runs read files

    try:
        table = datasets.load_dataset(name.removeprefix(HUB), split="train")
    except Exception as error:  # the hub raises errors of many libraries; to the user all mean the same
        raise ValueError(
            f"{name} could not be downloaded ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from error
    return [(number, without_none(dict(row))) for number, row in enumerate(table, 1)]
