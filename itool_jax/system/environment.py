"""Records a run's versions, devices, code and command line in `environment.json` of the run directory.

In: the command line. Out: a list of sessions, with a new one whenever anything differs from the last, and one line that
says what. A changed environment never ends a run: its results may only differ in their last bits.
"""

import collections
import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from itool_jax.system.files import whole_file
from itool_jax.system.untrusted import one_line, read_json, redacted

FILE = "environment.json"
PACKAGES = (
    *("itool-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers"),
    *("tokenizers", "safetensors", "datasets", "libtpu"),
)
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64", "NVIDIA_TF32_OVERRIDE")
DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")
"""XLA flags for deterministic GPU kernels, with none chosen by a timing."""
CPU_DEVICES = (1, 2, 4, 8)
"""Numbers of devices that a CPU can be split into; each holds a copy of the model."""


def make_deterministic() -> None:
    """Sets the XLA flags for bitwise reproducible results; call it before the first use of a device."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*flags, *(flag for flag in DETERMINISTIC if flag not in flags)])


def programs_folder() -> Path:
    """Returns the folder of compiled programs: JAX_COMPILATION_CACHE_DIR, or a default folder."""
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/itool_jax/xla")).expanduser()


def keep_programs() -> None:
    """Turns on the persistent compilation cache, so that later processes reuse compiled programs."""
    jax.config.update("jax_compilation_cache_dir", str(programs_folder()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def require_devices() -> None:
    """Raises ValueError if JAX_PLATFORMS names a kind of device that this machine lacks; starts JAX's devices."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        if not (given := os.environ.get("JAX_PLATFORMS")):
            raise
        raise ValueError(
            f"JAX_PLATFORMS={given}, but JAX cannot start such a device here ({one_line(error)[:160]}); "
            "unset it, or install the extra for that device (cuda12, cuda13, tpu)"
        ) from error


def use_gpu_memory() -> None:
    """Lets programs use 90 % of a GPU's memory, not JAX's default of 75 %, unless the environment sets a share.

    Call it before the first use of a device.
    """
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the older name; JAX refuses both together
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.9")


def split_cpu(rows: int) -> None:
    """Makes CPU cores JAX devices, as many as can share batches of `rows`; call it before the first use of a device.

    As a single device, the CPU leaves cores idle during the small operations of decoding. Changes nothing if XLA_FLAGS
    sets the number of devices, or if devices are in use already.
    """
    if "device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(RuntimeError):  # in use
        jax.config.update("jax_num_cpu_devices", max(n for n in CPU_DEVICES if n <= cores and rows % n == 0))
        # XLA has as many threads as cores. With several programs in flight, a thread that waits for another device can
        # keep that device from running, until XLA ends the process; so each program ends before the next begins.
        jax.config.update("jax_cpu_enable_async_dispatch", False)


def record(folder: Path, arguments: Sequence[str]) -> str | None:
    """Adds this session to the file in `folder` unless it equals the last one; returns a message about changes."""
    now = describe(arguments)
    sessions = _read(folder / FILE)
    before = sessions[-1] if sessions else None
    if before is None or {**before, "time": now["time"]} != now:
        with whole_file(folder / FILE) as file:
            file.write(json.dumps({"sessions": [*sessions, now]}, indent=2).encode() + b"\n")
    changes = list(_changes(before, now)) if before is not None else []
    if not changes:
        return None
    more = f" and {len(changes) - 4} more" if len(changes) > 4 else ""
    return f"resuming in a different environment: {', '.join(changes[:4])}{more}; results may differ in their last bits"


def describe(arguments: Sequence[str]) -> dict[str, Any]:
    """Describes the process and its environment in plain values; secrets in the command line are hidden."""
    devices = jax.devices()
    return {
        "time": round(time.time(), 3),
        "command": redacted(shlex.join(arguments)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "backend": jax.default_backend(),
        "devices": dict(collections.Counter(device.device_kind for device in devices)),
        "processes": jax.process_count(),
        "flags": {name: redacted(os.environ[name]) for name in FLAGS if os.environ.get(name)},
        "code": _code(),
    }


def versions() -> dict[str, str]:
    """Returns the versions of the relevant installed packages, including accelerator plugins."""
    there = {dist.name.lower().replace("_", "-"): dist.version for dist in importlib.metadata.distributions()}
    return {
        name: there[name] for name in sorted(there) if name in PACKAGES or name.startswith(("jax-cuda", "jax-rocm"))
    }


def _code() -> dict[str, Any] | None:
    """Returns the commit of this checkout and whether its files differ from it; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    commit, status = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "dirty": status != ""}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _read(path: Path) -> list[dict[str, Any]]:
    """Reads the earlier sessions; a missing or damaged file counts as none, because nothing depends on it."""
    try:
        sessions = read_json(path)["sessions"]
        return [session for session in sessions if isinstance(session, dict)]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yields `jax 0.10.1 → 0.10.2` for each value that differs, except the time and the command."""
    for name in sorted((before.keys() | now.keys()) - {"time", "command"}):
        a, b = before.get(name), now.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping) and name != "devices":
            yield from _changes(a, b)
        elif a != b:
            yield f"{name} {_shown(a)} → {_shown(b)}"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{count} x {kind}" for kind, count in value.items())
    return "none" if value is None else str(value)[:60]
