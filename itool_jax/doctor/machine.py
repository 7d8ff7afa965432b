"""Checks a machine for a run: packages, devices, driver, disk, compilation cache, Hub and other processes.

In: settings. Out: findings, each with a remedy. A file is written to test the disk, and then deleted.
"""

import collections
import importlib.metadata
import logging
import math
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from itool_jax.config import Config
from itool_jax.model.hf import could_be_hub_name, is_local
from itool_jax.model.sharding import AXES, checked_shape, compute_capability
from itool_jax.planning.memory import device_limit
from itool_jax.store.directory import check
from itool_jax.system.untrusted import one_line

TRIAL = 32 << 20
"""Bytes written to test the disk."""
SLOW = 20e6
"""Bytes per second below which a disk counts as slow."""
NETWORK = 10.0
"""Seconds to wait for the Hub."""
DRIVERS = ((580, "cuda13"), (525, "cuda12"))
"""Minimum NVIDIA driver for each build of JAX."""
CLUSTERS = {
    "SLURM_JOB_ID": "Slurm",
    "OMPI_MCA_orte_hnp_uri": "Open MPI",
    "TPU_WORKER_HOSTNAMES": "a TPU slice",
    "JOBSET_NAME": "GKE",
    "MEGASCALE_COORDINATOR_ADDRESS": "a multi-slice TPU",
}
Level = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """One line of the doctor's output."""

    level: Level
    what: str
    text: str
    remedy: str = ""


def packages(there: Mapping[str, str]) -> Iterator[Finding]:
    """Checks Python, the package's requirements, and that the installed JAX, jaxlib and plugins work together."""
    yield Finding("ok", "python", platform.python_version())
    if missing := _missing():
        line = f"pip install {' '.join(repr(name) for name in missing)}"
        yield Finding("error", "packages", f"{', '.join(missing)} not installed or the wrong version", line)
    jax_version, jaxlib = there.get("jax", "?"), there.get("jaxlib", "?")
    plugins = {n: v for n, v in there.items() if n.startswith(("jax-cuda", "jax-rocm"))}
    if wrong := {name: version for name, version in plugins.items() if version != jaxlib}:
        named = ", ".join(f"{name} {version}" for name, version in wrong.items())
        again = f"pip install 'jax[{min(wrong).split('-')[1]}]=={jax_version}'"
        yield Finding("error", "jax", f"{named} does not match jaxlib {jaxlib}, so JAX ignores it", again)
    elif _numbers(there.get("flax", "9")) <= (0, 12, 8) and _numbers(jax_version) >= (0, 11, 1):
        text = f"flax {there['flax']} does not work with jax {jax_version}"
        yield Finding("error", "jax", text, "pip install 'flax>=0.12.12' (Python 3.12), or 'jax<0.11' 'jaxlib<0.11'")
    else:
        others = "".join(f", {name} {version}" for name, version in plugins.items())
        yield Finding("ok", "jax", f"jax {jax_version}, jaxlib {jaxlib}, flax {there.get('flax', '?')}{others}")


def _missing() -> list[str]:
    """Returns the package's unmet requirements."""
    from packaging.requirements import Requirement

    try:
        required = [Requirement(line) for line in importlib.metadata.requires("itool-jax") or ()]
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return []
    missing = []
    for r in required:
        if r.marker is not None and not r.marker.evaluate({"extra": ""}):
            continue
        try:
            if not r.specifier.contains(importlib.metadata.version(r.name), prereleases=True):
                missing.append(f"{r.name}{r.specifier}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(f"{r.name}{r.specifier}")
    return missing


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


# Devices ----------------------------------------------------------------------------------------------------


class Gpu(NamedTuple):
    """A GPU as the driver reports it."""

    name: str
    driver: str
    memory: str


def gpus() -> list[Gpu]:
    """Returns the GPUs that nvidia-smi finds; empty if there is no such program or no driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in done.stdout.splitlines()]
    return [Gpu(*row) for row in rows if len(row) == 3]


def devices(config: Config, there: Mapping[str, str]) -> Iterator[Finding]:
    """Compares the devices that JAX and the driver see, and checks the mesh and how it divides batches."""
    logging.getLogger("jax").setLevel(logging.CRITICAL)  # failures are reported below, in one line
    try:
        seen = jax.devices()
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error)[:200]
        yield Finding("error", "devices", f"JAX cannot start: {reason}", "unset JAX_PLATFORMS, or fix the driver")
        return
    kinds = collections.Counter(device.device_kind for device in seen)
    room = f"; programs may use {device_limit(config.plan.memory_share) / 1e9:.1f} GB of each"
    yield Finding("ok", "devices", ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) + room)
    plugins = [name for name in there if name.startswith("jax-cuda") and name.endswith("-plugin")]
    yield from accelerators(gpus(), seen[0].platform, plugins)
    yield from bfloat16_units(seen[0].platform, compute_capability(), config.dtype)
    yield from _mesh(config)


def accelerators(listed: list[Gpu], platform_name: str, plugins: Sequence[str]) -> Iterator[Finding]:
    """Reports GPUs that JAX does not use, and JAX plugins without a GPU."""
    if listed:
        driver = listed[0].driver
        extra = next((name for least, name in DRIVERS if _numbers(driver) >= (least,)), None)
        if extra is None:
            text = f"NVIDIA driver {driver} is too old for JAX"
            yield Finding("error", "driver", text, f"install driver {DRIVERS[-1][0]} or newer")
        elif platform_name == "cpu":
            text = f"JAX uses only the CPU, but nvidia-smi finds {len(listed)} x {listed[0].name} (driver {driver})"
            forced = os.environ.get("JAX_PLATFORMS")
            mend = f"unset JAX_PLATFORMS, which is set to {forced}" if forced else f"pip install 'itool-jax[{extra}]'"
            yield Finding("error", "driver", text, mend)
        else:
            yield Finding("ok", "driver", f"{driver}, {len(listed)} x {listed[0].name} of {listed[0].memory}")
    elif platform_name == "cpu" and (nodes := [*Path("/dev").glob("accel[0-9]*")]):
        text = f"JAX uses only the CPU, but this machine has {len(nodes)} TPU chips"
        yield Finding("error", "driver", text, "pip install 'itool-jax[tpu]'")
    elif platform_name == "cpu" and plugins and not os.environ.get("JAX_PLATFORMS"):
        text = f"JAX uses only the CPU: {plugins[0]} is installed, but no NVIDIA driver responds"
        mend = "install the driver; a container needs docker run --gpus=all"
        yield Finding("warning", "driver", text, mend)


def bfloat16_units(platform_name: str, capability: tuple[int, ...], dtype: str) -> Iterator[Finding]:
    """Reports devices that compute bfloat16 products in float32; `capability` is empty except on NVIDIA GPUs."""
    if dtype != "bfloat16":
        return
    if platform_name == "cpu":
        text = "bfloat16 products are computed in float32 on a CPU, at the speed and peak memory of float32"
        yield Finding("warning", "dtype", text, "use --dtype=float32")
    elif capability and capability < (8, 0):
        version = ".".join(map(str, capability))
        text = f"GPUs of compute capability {version} have no bfloat16 units, so products are computed in float32"
        yield Finding("warning", "dtype", text, "use --dtype=float32 if its weights fit in memory")


def _mesh(config: Config) -> Iterator[Finding]:
    """Applies a run's own mesh checks; assumes that each of several processes has as many devices as this one."""
    if config.distributed.auto:
        text = "not checked: the mesh spans the devices of all processes, and only this process's are visible"
        yield Finding("warning", "mesh", text, "--stage=plan --plan.count=N checks it for N devices")
        return
    processes = config.distributed.num_processes or 1
    count = processes * len(jax.devices())
    try:
        shape = checked_shape(config.mesh, count, processes)
        with jax.sharding.use_abstract_mesh(AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))):
            for training in (config.warmup, config.preference):
                training.share() if training.micro_batch == "auto" else training.n_micro()
    except ValueError as error:
        yield Finding("error", "mesh", str(error), "change mesh or batch sizes")
        return
    if config.mesh.data and (used := math.prod(shape)) < count:
        text = f"{used} of {count} devices are used"
        yield Finding("warning", "mesh", text, "--mesh.data=0 uses all; --mesh.fsdp shards the weights")
    else:
        yield Finding("ok", "mesh", " ".join(f"{axis}={n}" for axis, n in zip(AXES, shape, strict=True)))


def run_directory(config: Config) -> Iterator[Finding]:
    """Checks that a run with these settings can use the run directory, if it exists."""
    try:
        check(config)
    except ValueError as error:
        yield Finding("error", "run directory", str(error))


# Disk, cache, hub, other processes --------------------------------------------------------------------------


def disk(folder: Path, needed: int) -> Iterator[Finding]:
    """Checks for `needed` free bytes where the run directory is or will be, and the speed of writes and renames."""
    place = _nearest(folder)
    free = shutil.disk_usage(place).free
    text = f"{free / 1e9:.1f} GB free in {place}, the run needs about {needed / 1e9:.1f} GB"
    if free < needed:
        yield Finding("error", "disk", text, "free some space, or choose another --run_dir")
    elif free < 2 * needed:
        yield Finding("warning", "disk", text, "free some space: checkpoints are written before old ones are deleted")
    else:
        yield Finding("ok", "disk", text)
    try:
        rate, rename = _try_disk(place)
    except OSError as error:
        yield Finding("error", "disk", f"{place}: {error.strerror}", "choose another --run_dir")
        return
    text = f"writes {rate / 1e6:.0f} MB/s, renames in {1000 * rename:.1f} ms"
    slow = rate < SLOW or rename > 1
    yield Finding(
        "warning" if slow else "ok", "disk", text, "a local disk would save checkpoints faster" if slow else ""
    )


def _nearest(folder: Path) -> Path:
    folder = folder.expanduser().absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def _try_disk(place: Path) -> tuple[float, float]:
    """Measures the write speed in bytes per second and the seconds of a rename; leaves no files."""
    with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as name:
        start = time.monotonic()
        with (Path(name) / "a").open("wb") as file:
            file.write(os.urandom(1 << 20) * (TRIAL >> 20))
            file.flush()
            os.fsync(file.fileno())
        written = time.monotonic()
        (Path(name) / "a").rename(Path(name) / "b")
        return TRIAL / max(written - start, 1e-9), time.monotonic() - written


def compile_cache(folder: Path) -> Iterator[Finding]:
    """Checks that compiled programs can be kept for the next start."""
    place = _nearest(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        text = f"{folder} is not writable, so every start recompiles all programs"
        yield Finding("warning", "compile cache", text, "set JAX_COMPILATION_CACHE_DIR to a writable folder")
    else:
        count = sum(path.name.endswith("-cache") for path in folder.iterdir()) if folder.is_dir() else 0
        yield Finding("ok", "compile cache", f"{folder}, {count} programs")


def hub(config: Config) -> Iterator[Finding]:
    """Checks access to the Hub if a Hub name is used: token, cached files, or a response."""
    given = [source for source in (config.data, config.samples.test_file) if source and source.startswith("hf:")]
    names = [("dataset", source.removeprefix("hf:")) for source in given]
    if config.model != "embedded" and not is_local(config.model):
        names.insert(0, ("model", config.model))
    if not names:
        return
    from huggingface_hub import constants, get_token

    token = "token found" if get_token() else "no token"
    offline = ", offline (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else ""
    yield Finding("ok", "hub", f"cache {constants.HF_HUB_CACHE}; {token}{offline}")
    for kind, name in names:
        if could_be_hub_name(name):
            yield _hub_name(kind, name, constants.HF_HUB_OFFLINE)
        else:
            yield Finding(
                "error", "hub", f"{kind} {name} is neither a local file or folder nor a hub name", "check the name"
            )


def _hub_name(kind: str, name: str, offline: bool) -> Finding:
    from huggingface_hub import HfApi, snapshot_download

    try:
        snapshot_download(name, repo_type=kind, local_files_only=True)
        return Finding("ok", "hub", f"{kind} {name} is in the cache")
    except Exception as error:  # not cached, or an invalid name, which the Hub library reports in many ways
        if offline:
            remedy = "unset HF_HUB_OFFLINE, or download it first on a machine with network access"
            return Finding("error", "hub", f"{kind} {name} is not in the cache, and HF_HUB_OFFLINE is set", remedy)
        reason = _first_line(error)
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=NETWORK)
        return Finding("ok", "hub", f"{kind} {name} is not downloaded yet, but can be")
    except Exception as error:  # from many libraries: no network, no such name, no permission
        text = _first_line(error) or reason
        gated = any(word in text for word in ("401", "403", "gated", "Gated"))
        remedy = "accept its licence on the Hub, then run hf auth login" if gated else "check the name and the network"
        return Finding("error", "hub", f"{kind} {name}: {text}", remedy)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def processes(config: Config) -> Iterator[Finding]:
    """Checks that a run of several processes can find the others."""
    d, cluster = config.distributed, next((name for key, name in CLUSTERS.items() if os.environ.get(key)), None)
    if not d.several:
        if cluster == "Slurm" and int(os.environ.get("SLURM_NTASKS") or 1) > 1:
            text = f"Slurm started {os.environ['SLURM_NTASKS']} tasks, but each would be a separate run"
            yield Finding("warning", "processes", text, "--distributed.auto makes them one run")
        return
    if d.auto and cluster is None:
        text = "distributed.auto is set, but this process was not started by Slurm, Open MPI, a TPU slice or GKE"
        yield Finding("error", "processes", text, "set distributed.coordinator_address, num_processes and process_id")
    elif d.auto:
        yield Finding("ok", "processes", f"started by {cluster}")
    else:
        yield _coordinator(d.coordinator_address or "", f"process {d.process_id} of {d.num_processes}")


def _coordinator(address: str, process: str) -> Finding:
    host, _, port = address.rpartition(":")
    try:
        socket.getaddrinfo(host, int(port))
        return Finding("ok", "processes", f"{process}, coordinator {address}")
    except (ValueError, OSError) as error:
        text = f"coordinator {address} cannot be resolved ({error})"
        return Finding(
            "error", "processes", text, "set host and port, such as node1:12345, with a name that all hosts can resolve"
        )
