"""Reads the header of a GGUF file: its metadata, and where its tensors are.

In: a path. Out: values by key, and the shape, type and position of each tensor. No tensor is read. The format is
described at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import functools
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

MAGIC, VERSIONS, MAX_DIMENSIONS, ALIGNMENT = b"GGUF", (2, 3), 4, 32
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


class Place(NamedTuple):
    """A tensor in a GGUF file."""

    shape: tuple[int, ...]
    """Outermost dimension first, as in numpy; the file lists them in reverse."""
    type: int
    """Number of the ggml type."""
    offset: int
    """Bytes from the beginning of the file."""


class Header(NamedTuple):
    """What a GGUF file says about itself."""

    metadata: dict[str, Any]
    tensors: dict[str, Place]


def is_gguf(name: str | Path) -> bool:
    """Returns whether a name is that of a GGUF file, which may not exist."""
    return str(name).endswith(".gguf") and not Path(name).is_dir()


def read_header(path: Path) -> Header:
    """Reads a file's header, once as long as the file does not change.

    Raises:
        ValueError: it is not a GGUF file, or a damaged one; names the file.
    """
    stat = path.stat()
    try:
        return _read_header(path, stat.st_mtime_ns, stat.st_size)
    except (ValueError, OverflowError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path} is not a readable GGUF file: {error}") from error


@functools.lru_cache(maxsize=2)
def _read_header(path: Path, _: int, size: int) -> Header:
    if not size:
        raise ValueError("it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data)
        if reader.take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        if (version := reader.number("I")) not in VERSIONS:
            raise ValueError(f"version {version} is not supported, only {' and '.join(map(str, VERSIONS))}")
        n_tensors, n_values = reader.number("Q"), reader.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_values):
            key = reader.text()
            metadata[key] = reader.value(reader.number("I"))
        places = dict(reader.place() for _ in range(n_tensors))
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment must be a positive integer, got {alignment!r}")
    start = -(-reader.at // alignment) * alignment
    return Header(metadata, {name: place._replace(offset=start + place.offset) for name, place in places.items()})


class _Reader:
    """Little-endian values, read one after the other."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError("it ends within its header; download it again")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode()

    def value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a value has type {kind}, which is not known")
        kind, count = self.number("I"), self.number("Q")
        if kind == _TEXT:
            return [self.text() for _ in range(count)]
        if kind not in _NUMBERS:
            raise ValueError(f"an array has values of type {kind}, which is not known")
        data = self.take(count * struct.calcsize(f"<{_NUMBERS[kind]}"))
        return list(struct.unpack(f"<{count}{_NUMBERS[kind]}", data))

    def place(self) -> tuple[str, Place]:
        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"tensor {name[:80]} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return name, Place(shape, self.number("I"), self.number("Q"))
