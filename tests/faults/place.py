"""Where faults are provoked: a folder with a model, a data file and a finished run, and ways to damage them.

In: an entry's steps. Out: a `Place` in which its command fails. In commands and messages, MODEL, FILE, OUT and RUN are
files and folders of the place, DIR is the folder around them, and SETTINGS are those that the run was made with.
"""

import contextlib
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.conftest import write
from tests.gguf_files import to_gguf
from tests.runs import Made

SAMPLE = {"id": "a", "messages": [{"role": "user", "content": "hi"}], "tools": [], "target": "[f()]"}


class Place(NamedTuple):
    """A folder for one fault, the run that copies are made of, and what is held while the command runs."""

    folder: Path
    made: Made
    held: contextlib.ExitStack

    def names(self) -> dict[str, Path]:
        """What stands for what in commands and messages; the inner ones first."""
        inner = {"MODEL": "model", "FILE": "data.jsonl", "OUT": "out.jsonl", "RUN": "run"}
        return {name: self.folder / path for name, path in inner.items()} | {"DIR": self.folder}

    def arguments(self, command: str) -> list[str]:
        """A command as `main` gets it."""
        for name, path in self.names().items():
            command = command.replace(name, str(path))
        parts = [part.replace("\\n", "\n") for part in command.split()]
        return [argument for part in parts for argument in (self.made.settings if part == "SETTINGS" else [part])]

    def shown(self, text: str) -> str:
        """A message without the paths of this machine."""
        for name, path in self.names().items():
            text = text.replace(str(path), name)
        for setting in self.made.settings[:2]:  # the model and the data of the run
            name, _, path = setting.removeprefix("--").partition("=")
            text = text.replace(path, f"{name.upper()}_OF_RUN")
        return text


Step = Callable[[Place], Any]


class Fault(NamedTuple):
    """A thing that can be wrong, and the line that says so; one that ends in … goes on with a library's own words."""

    name: str
    how: str
    command: str
    line: str
    steps: tuple[Step, ...]


def fault(name: str, how: str, command: str, line: str, *steps: Step) -> Fault:
    """An entry of the catalogue."""
    return Fault(name, how, command, line, steps)


def set_up(place: Place, tiny_folder: Path, steps: tuple[Step, ...]) -> None:
    """A model, a data file and what the steps make of them."""
    shutil.copytree(tiny_folder, place.folder / "model")
    rows(SAMPLE)(place)
    for step in steps:
        step(place)


# Steps ------------------------------------------------------------------------------------------------------


def file(name: str, content: Any) -> Step:
    """A file of the place with this content: bytes, text, or JSON."""

    def step(place: Place) -> None:
        path = place.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())

    return step


def rows(*contents: Any) -> Step:
    """The data file: rows, or text as it stands."""
    lines = (row if isinstance(row, str) else json.dumps(row) for row in contents)
    return file("data.jsonl", "".join(f"{line}\n" for line in lines))


def samples(count: int, **changes: Any) -> Step:
    """A data file of so many distinct samples, the last one changed."""
    numbered = [{**SAMPLE, "id": f"s{i}", "target": f"[f(x={i})]"} for i in range(count)]
    return rows(*numbered[:-1], numbered[-1] | changes)


def remove(*names: str) -> Step:
    """Files or folders of the place that are gone."""

    def step(place: Place) -> None:
        for name in names:
            path = place.folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return step


def edit(name: str, **changes: Any) -> Step:
    """Keys of a JSON file; None takes one away."""

    def step(place: Place) -> None:
        path = place.folder / name
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return step


def header(content: Any, length: int | None = None, body: bytes = b"") -> Step:
    """A model.safetensors with this header, which says that it is `length` long."""
    text = json.dumps(content).encode()
    return file("model/model.safetensors", struct.pack("<Q", len(text) if length is None else length) + text + body)


def tensors(change: Callable[[dict[str, Any]], Any]) -> Step:
    """Changes the weights."""

    def step(place: Place) -> None:
        from safetensors.numpy import load_file, save_file

        path = place.folder / "model/model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    return step


def gguf(changes: dict[str, Any] | None = None) -> Step:
    """The model as a GGUF file, with changes to its metadata."""
    return lambda place: to_gguf(place.folder / "model", place.folder / "m.gguf", changes=changes)


def index(weight_map: Any) -> Step:
    """The weights' file has another name, which an index gives for every tensor of `weight_map`."""

    def step(place: Place) -> None:
        path = place.folder / "model/model.safetensors"
        path.rename(place.folder / "outside.safetensors")
        path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return step


def finished(place: Place) -> None:
    """A copy of the finished run."""
    shutil.copytree(place.made.folder, place.folder / "run")


def mkdir(name: str) -> Step:
    """A folder of the place."""
    return lambda place: (place.folder / name).mkdir(parents=True)


def cut(name: str, size: int) -> Step:
    """A file that ends too early."""

    def step(place: Place) -> None:
        path = place.folder / name
        path.write_bytes(path.read_bytes()[:size])

    return step


def locked(name: str) -> Step:
    """A lock of that name that another process holds."""

    def step(place: Place) -> None:
        import fcntl

        path = place.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        held = place.held.enter_context(path.open("w+"))
        held.write("process 7 on HOST")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)  # another opening of the file, so it counts as another's

    return step


def full_disk(place: Place) -> None:
    """No more can be written to disk."""
    import errno
    import os

    from _pytest.monkeypatch import MonkeyPatch

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch = place.held.enter_context(MonkeyPatch.context())
    patch.setattr(os, "fsync", fail)


def write_scores(place: Place) -> None:
    """Another run's scores of a category that is not evaluated."""
    write(place.folder / "scores.json", [{"java": {"correct": 1, "total": 1, "failed": {}}}])
