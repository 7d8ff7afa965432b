"""Exports weights as Hugging Face checkpoints: config.json and safetensors, sharded with an index if they are large."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from itool_jax.model.hf import INDEX, WEIGHTS, stored_as
from itool_jax.model.transformer import Params

Leaf = Callable[[tuple[Any, ...], Any], Any]


def save(
    folder: Path,
    params: Params,
    raw_config: dict[str, Any],
    leaf: Leaf = lambda _, x: x,
    shard_bytes: float = 5e9,
) -> None:
    """Writes config.json and the weights, in one file, or in several if they are larger than `shard_bytes`.

    `raw_config` is the content of config.json. `leaf(path, x)` computes each leaf to write from one of `params`, only
    when it is written, so that memory never holds all computed leaves of a large model. It is rounded to the type of x.
    """
    leaves = jax.tree.leaves_with_path(params)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _Shards(folder, shard_bytes)
    for path, x in leaves:
        value = np.asarray(leaf(path, x)).astype(x.dtype, copy=False)
        names, stacked, transposed = stored_as(path, len(value))
        for name, part in zip(names, value if stacked else value[None], strict=True):
            shards.add(name, np.ascontiguousarray(part.T if transposed else part))
    shards.finish()
    text = json.dumps(raw_config | dict.fromkeys(("dtype", "torch_dtype"), leaves[0][1].dtype.name), indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


class _Shards:
    """Files of limited size, and the index from tensors to files."""

    def __init__(self, folder: Path, limit: float):
        self.folder, self.limit = folder, limit
        self.tensors: dict[str, np.ndarray] = {}
        self.files: list[list[str]] = []
        self.total = 0

    def add(self, name: str, value: np.ndarray) -> None:
        """Adds a tensor; first writes the pending ones if it would make their file too large."""
        if self.tensors and sum(x.nbytes for x in self.tensors.values()) + value.nbytes > self.limit:
            self._write()
        self.tensors[name] = value
        self.total += value.nbytes

    def finish(self) -> None:
        """Writes the pending tensors, and renames the files to their final names, which contain the file count."""
        self._write()
        if len(self.files) == 1:
            self._part(1).rename(self.folder / WEIGHTS)
            return
        index: dict[str, str] = {}
        for number, names in enumerate(self.files, 1):
            file = f"model-{number:05}-of-{len(self.files):05}.safetensors"
            self._part(number).rename(self.folder / file)
            index |= dict.fromkeys(names, file)
        content = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(index.items()))}
        (self.folder / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _write(self) -> None:
        self.files.append(list(self.tensors))
        write_tensors(self._part(len(self.files)), self.tensors)
        self.tensors = {}

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number}.safetensors"


def write_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file with default permissions; the library's own would be readable only by their owner."""
    from safetensors.numpy import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)
