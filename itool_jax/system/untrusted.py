"""Checks untrusted input: files anyone may have written, a model's templates, file names; and hides secrets.

In: text, paths and values. Out: the same within bounds, or ValueError with one line that says what is wrong; texts
with their secrets removed.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MAX_DEPTH = 100
"""Most levels of lists and objects in a JSON value; Python's own limit differs between reader and writer."""
MAX_SETTINGS_BYTES = 100_000
"""Largest YAML file; all settings of a run take 5,000 bytes."""
MAX_JSON_BYTES = 1 << 26
"""Largest JSON file other than data; an index of 10,000 tensors takes 1 MB."""
TOO_DEEP = f"nested more than {MAX_DEPTH} levels deep"


def too_deep(value: Any, limit: int = MAX_DEPTH) -> bool:
    """Returns whether lists, tuples and dictionaries are nested more than `limit` levels deep."""
    level = [value]
    for _ in range(limit + 1):
        inner = [x for x in level if isinstance(x, dict | list | tuple)]
        if not inner:
            return False
        level = [item for x in inner for item in (x.values() if isinstance(x, dict) else x)]
    return True


def parse_json(text: str) -> Any:
    """Parses JSON; raises ValueError for any other text, and for values nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    if text.count("[") + text.count("{") > MAX_DEPTH and too_deep(value):
        raise ValueError(TOO_DEEP)
    return value


def read_text(path: Path, limit: int = MAX_JSON_BYTES) -> str:
    """Reads a file of at most `limit` bytes; ValueError if it is larger or not UTF-8."""
    with path.open("rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    return data.decode("utf-8")


def read_json(path: Path) -> Any:
    """Reads the value in a JSON file; its ValueErrors do not name the file."""
    return parse_json(read_text(path))


def read_yaml(path: Path) -> Any:
    """Reads the value in a YAML file; ValueError, without the file's name, if it is invalid, too large or has aliases.

    With aliases, a few lines can expand to billions of values, and settings need none.
    """
    text = read_text(path, MAX_SETTINGS_BYTES)
    try:
        _check_events(yaml.parse(text, yaml.SafeLoader))
        return yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # Values such as `!!int ""` raise the last four.
        raise ValueError(one_line(error)) from error


def _check_events(events: Iterator[Any]) -> None:
    """Raises ValueError at an alias or too deep a level: the time to read YAML grows with the square of its depth."""
    depth = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("an alias (*name) is not allowed here")
        if depth > MAX_DEPTH:
            raise ValueError(TOO_DEEP)


def inside(folder: Path, name: str) -> Path:
    """Returns the path of a file in a folder; ValueError if its name, or a link, leads out of the folder.

    In the Hub's cache, a model's files are links to files outside its folder; these links are allowed.
    """
    home, place = folder.resolve(), Path(name)
    if "\0" in name or place.is_absolute() or ".." in place.parts or not place.parts:
        raise ValueError(f"{name!r} is not the name of a file in {folder}")
    real = Path(os.path.realpath(home / place))  # Path.resolve raises an error for a circle of links
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not any(real.is_relative_to(parent) for parent in (home, blobs)):
        raise ValueError(f"{folder / place} is a link to a file outside its folder; put the file itself there")
    return folder / place


_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """Replaces characters that change how a terminal shows the rest: control and text-direction characters."""
    return _CONTROL.sub("\ufffd", text)


def one_line(error: BaseException | str) -> str:
    """Returns an error's message in one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


# Secrets ------------------------------------------------------------------------------------------------------

_SECRET_NAME = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|(^|_)KEY$|CREDENTIAL", re.IGNORECASE
)
_SECRETS = (
    re.compile(r"\b(?:(?:hf_|gh[opsu]_|sk-|sk-ant-|sk-proj-)[A-Za-z0-9]{20,}|(?:wandb_v1_|github_pat_)\w{20,})"),
    re.compile(r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)|(?<=://)[^\s/@:]{8,}(?=@)"),
    re.compile(r"(?<=bearer )[^\s'\",;]{8,}|(?<=basic )[^\s'\",;]{16,}", re.IGNORECASE),
    re.compile(r"(?<=[?&;])(?:[\w-]*(?:token|secret|password|api_?key|signature))=[^\s&;'\"]+", re.IGNORECASE),
)
_NAMED_SECRET = re.compile(r"((?:token|secret|password|api[-_]?key|credential)=)[^\s&;'\"]+", re.IGNORECASE)
HIDDEN = "***"


def redacted(text: str) -> str:
    """Hides tokens and passwords in a text: those in the environment, and anything that looks like one."""
    for value in _secret_values():
        text = text.replace(value, HIDDEN)
    for pattern in _SECRETS:
        text = pattern.sub(HIDDEN, text)
    return _NAMED_SECRET.sub(rf"\1{HIDDEN}", text)


def show_traceback(_: object, error: BaseException, __: object) -> None:
    """Prints the traceback of an error that ends the program, as Python does, with its secrets hidden."""
    print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def _secret_values() -> list[str]:
    """Returns the values of environment variables whose names suggest a secret, longest first."""
    secrets = {value.strip() for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    return sorted((value for value in secrets if len(value) >= 8 and value[0] not in "/~."), key=len, reverse=True)


# Time and memory ----------------------------------------------------------------------------------------------


class ExceededError(Exception):
    """Code used more time or memory than its limit."""


@contextlib.contextmanager
def bounded(seconds: float, memory_bytes: int) -> Iterator[None]:
    """Raises `ExceededError` in the enclosed code if it runs too long or the process grows by too much memory.

    The check runs five times a second, between steps of the interpreter: a single step, such as multiplying a text by a
    number, runs to its end. Outside the main thread, or while another timer runs, nothing is bounded.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return
    end, most = time.monotonic() + seconds, _resident() + memory_bytes

    def look(*_: object) -> None:
        if time.monotonic() > end:
            raise ExceededError(f"it takes more than {seconds:g} seconds")
        if _resident() > most:
            raise ExceededError(f"it takes more than {memory_bytes >> 20} MB")

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.2)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _resident() -> int:
    """Returns the process's resident memory in bytes; 0 if the system does not report it."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
