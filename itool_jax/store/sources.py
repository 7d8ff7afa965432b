"""Hashes of the model and data files, so that a run never resumes with different files of the same name."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from itool_jax.config import Config
from itool_jax.data.rows import SUFFIXES
from itool_jax.data.sources import named
from itool_jax.model import hf, peft
from itool_jax.store.base import model_folder
from itool_jax.system.files import read_json

SOURCES = "data/sources.json"
MODEL = ("model", "adapter")
ALL = (*MODEL, "data", "samples.test_file")
"""The settings that name a run's input files."""
_PATTERNS = {"model": hf.FILES, "adapter": (peft.CONFIG, peft.TENSORS, *hf.FILES)}


def fingerprints(config: Config, names: Sequence[str] = ALL) -> dict[str, Any]:
    """Hashes each model and data file, by name; big files are not read whole."""
    hashes: dict[str, Any] = {}
    for name in names:
        given = config.flat()[name]
        if given is None or (name == "data" and given == "generated"):
            continue
        places = [model_folder(config)] if name == "model" else named(str(given))
        patterns = _PATTERNS.get(name) or [f"*{ending}" for ending in SUFFIXES]
        files: list[Path] = []
        for place in places:
            files += [place] if place.is_file() else sorted(p for pattern in patterns for p in place.glob(pattern))
        several = len(places) > 1  # their files may have the same names
        hashes[name] = {str(path) if several else path.name: _ends(path) for path in files if path.is_file()}
    return hashes


def _ends(path: Path, size: int = 1 << 20) -> str:
    """Hashes a file's length, beginning and end."""
    with path.open("rb") as file:
        length, beginning = path.stat().st_size, file.read(size)
        file.seek(max(0, length - size))
        return hashlib.blake2b(b"%d " % length + beginning + file.read(), digest_size=16).hexdigest()


def check_sources(config: Config, names: Sequence[str] = ALL) -> None:
    """Raises ValueError naming the first model or data file that changed since the run began."""
    path = config.run_dir / SOURCES
    if not path.exists():
        return
    then, now = read_json(path), fingerprints(config, names)
    for name in now:
        if not isinstance(then.get(name), dict):
            raise ValueError(f'{path} is damaged (no "{name}"); choose another --run_dir')
        if changed := sorted(f for f in then[name] | now[name] if then[name].get(f) != now[name].get(f)):
            source = f"{changed[0]} of --{name}={config.flat()[name]}"
            raise ValueError(
                f"run directory {config.run_dir} was created with a different {source}; choose another --run_dir"
            )
