"""Locks a run directory for one process at a time, and ties it to one set of settings, saved in config.yaml.

In: a command's settings. Out: a lock on what it writes; its settings saved, or compared with the saved ones.
"""

import contextlib
import dataclasses
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from itool_jax.config import Config, Recipe, Runtime, current_value
from itool_jax.system import untrusted
from itool_jax.system.files import remove_unfinished, whole_file
from itool_jax.system.hosts import DistributedSettings, is_first

LOCK = ".lock"
STARTED = "started.json"
"""File in the working folder of a step that began."""
NO_RESULTS = (LOCK, "config.yaml", "environment.json", "log.jsonl", "report.html", "profile", "tensorboard", "wandb")
"""Files and folders that a run directory may hold before anything was computed."""


def binding_settings(config: Config) -> dict[str, Any]:
    """Returns the settings that commands on one run directory must share."""
    settings = config.flat(Recipe)
    if _evaluates_benchmark(config):
        del settings["data"]  # the benchmark's, not the run's
    return settings


@contextlib.contextmanager
def lock(config: Runtime) -> Iterator[None]:
    """Locks what the command writes: the run directory, or its output file.

    The system releases the lock when the process ends, however it ends.

    Raises:
        ValueError: another process holds the lock; the message names it.
    """
    output = config.output
    unseen = config.stage in ("export", "report") or (
        output is None and (config.stage == "generate" or config.results is not None)
    )
    if (
        not is_first() or unseen or (output is not None and output.exists() and not output.is_file())
    ):  # a pipe or a device, say
        yield
        return
    path = config.run_dir / LOCK if output is None else output.with_name(f".{output.name}{LOCK}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        name = "run_dir" if output is None else "output"
        raise ValueError(f"folder {path.parent} cannot be created ({error.strerror}); set --{name}") from error
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(200) or "another process"
            raise ValueError(f"{path.parent} is in use by {holder}; wait for it, or choose another folder") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        if output is None:
            remove_unfinished(config.run_dir)
        try:
            yield
        finally:
            if config.output is not None:
                path.unlink(missing_ok=True)


def save_or_check(config: Config) -> None:
    """Saves the settings in the run directory; if it already holds results, checks that the settings match.

    `iterate` updates the saved number of iterations. Stages that write only their own file need no run directory, only
    a folder for that file.

    Raises:
        ValueError: the directory was made with other settings; the message names the first that differs.
    """
    if not config.keeps_run:
        if config.output is not None and config.output.is_dir():
            raise ValueError(f"output {config.output} is a folder, not a file")
        if config.output is not None:
            config.output.parent.mkdir(parents=True, exist_ok=True)
        return
    if config.stage == "export" and not config.run_dir.is_dir():
        raise ValueError(f"run directory {config.run_dir} does not exist")
    path = config.run_dir / "config.yaml"
    if check(config):
        saved = untrusted.read_yaml(path)
        if config.stage == "iterate" and saved.get("iterations") != config.iterations:
            _save(path, saved | {"iterations": config.iterations})
        return
    config.run_dir.mkdir(parents=True, exist_ok=True)
    # These apply to this command only.
    alone = {"output": None, "overwrite": False, "against": None, "official": False}
    lasting = dataclasses.replace(config, **alone, distributed=DistributedSettings())
    if _evaluates_benchmark(config):
        lasting = dataclasses.replace(lasting, data=Config.data)
    _save(path, lasting.flat())


def _save(path: Path, settings: dict[str, Any]) -> None:
    with whole_file(path) as file:
        file.write(yaml.safe_dump(settings, sort_keys=False).encode())


def check(config: Config) -> bool:
    """Returns whether the run directory holds work with the same settings; ValueError if they differ."""
    if config.run_dir.exists() and not config.run_dir.is_dir():
        raise ValueError(f"run directory {config.run_dir} is a file; choose another --run_dir")
    path = config.run_dir / "config.yaml"
    # A command that failed before it computed anything does not bind later ones to its settings.
    begun = path.exists() and any(map(_holds_results, config.run_dir.iterdir()))
    if begun:
        _check_saved(path, config)
    return begun


def _holds_results(entry: Path) -> bool:
    """Returns whether a file or folder of a run directory holds anything computed; a step that began may have none."""
    if entry.name in NO_RESULTS:
        return False
    return entry.is_file() or any(file.is_file() and file.name != STARTED for file in entry.rglob("*"))


def check_weights(config: Config) -> None:
    """Raises ValueError if this is not a run directory, or its model, adapter or quantize settings differ."""
    path = config.run_dir / "config.yaml"
    if not path.is_file():
        raise ValueError(f"{config.run_dir} is not a run directory: no config.yaml")
    _check_saved(path, config, ("model", "adapter", "lora.", "quantize"))


def _check_saved(path: Path, config: Config, only: tuple[str, ...] = ("",)) -> None:
    """Raises ValueError if a setting whose name begins with one of `only` differs from the saved one."""
    mend = "choose another --run_dir"
    try:
        saved = untrusted.read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); {mend}") from error
    binding = {name: value for name, value in binding_settings(config).items() if name.startswith(only)}
    for name, value in binding.items():
        if not isinstance(saved, dict) or name not in saved:
            raise ValueError(f"{path} is damaged or from another version (no {name}); {mend}")
        if current_value(name, saved[name]) != value:
            raise ValueError(
                f"run directory {config.run_dir} was created with {name}={saved[name]}, but it is now {value}; "
                f"{mend}, or use the same settings"
            )


def _evaluates_benchmark(config: Runtime) -> bool:
    """Returns whether --data belongs to a benchmark."""
    return config.stage == "evaluate" and config.benchmark is not None
