"""Estimates the device memory of each stage, finds the largest sizes that fit, and suggests changes if none does.

In: settings, the data as token ids, and a device's limits. Out: bytes by purpose, from the compiler's analysis of the
same programs that the stages run. Nothing is allocated.
"""

import contextlib
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from itool_jax.config import Config, is_out_of_memory
from itool_jax.model.sharding import AXES, MeshSettings, mesh_shape, row_devices, use_mesh
from itool_jax.model.transformer import ModelConfig
from itool_jax.planning import memory, sizes
from itool_jax.planning.memory import MemoryEstimate
from itool_jax.planning.sizes import TOKENS
from itool_jax.store.base import load_base
from itool_jax.system.devices import CPU_SHARES, HERE, Device, device_like, device_of
from itool_jax.system.messages import log
from itool_jax.system.untrusted import one_line
from itool_jax.text.padding import bucket, group, target_width

FAST_FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
"""Flags with which the host compiles in a third of the time; the programs are analyzed and never run."""
# The host compiles for devices that are not present. By default it would copy weights to float32, all at once and
# before the loop that reads them, which no accelerator does; float16, which it leaves alone, stands in for bfloat16. It
# would also drop barriers before merging common subexpressions, which would keep the decoded NF4 kernels of all layers.
HOST_FLAGS = (
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    "--xla_disable_hlo_passes=while-loop-invariant-code-motion,change-op-data-type,operand_upcaster,cse_barrier_expander",
)
SIZES = {stage: name for name, stage in sizes.STAGE_OF.items()}
"""The setting that a stage's memory depends on most."""


class Hardware(NamedTuple):
    """Devices that a run is planned for, and the compiler that analyzes its programs."""

    device: Device | None
    """None if the devices are present and their kind has no data sheet."""
    name: str
    n_devices: int
    limit: int
    """Bytes per device that programs may use."""
    answers: str
    """Description of the compiler that does the analysis."""
    on_host: bool
    """True if the host's compiler stands in for the device's."""
    tpus: Sequence[Any] = ()
    """Devices that only the TPU compiler knows."""


class StageNeed(NamedTuple):
    """Memory a stage needs at one size."""

    stage: str
    size: int
    """Value of the setting in `SIZES`, or tokens per batch."""
    need: MemoryEstimate | None
    """None if the compiler itself rejected the program for lack of memory."""

    def fits(self, limit: int) -> bool:
        """Returns whether a device has enough memory."""
        return self.need is not None and self.need.total <= limit


def hardware_of(config: Config) -> Hardware:
    """Returns the devices of `--plan.device`. Host devices are set up to stand in for them before JAX is first used."""
    p, needed = config.plan, math.prod((max(1, config.mesh.data), config.mesh.fsdp, config.mesh.tensor))
    if p.device == HERE:
        here = _devices(FAST_FLAGS)
        if (count := p.count or len(here)) > len(here):
            raise ValueError(f"plan.count={count}, but this machine has {len(here)} devices; set --plan.device")
        kind = here[0].device_kind
        limit = memory.device_limit(p.memory_share)
        device = _measured(limit / p.memory_share, len(here)) if kind == "cpu" else device_like(kind)
        return Hardware(device, kind, count, limit, f"this machine's compiler for {kind}", False)
    device, count = device_of(p.device), p.count or needed
    limit = int(device.gigabytes * 1e9 * p.memory_share)
    tpus, reason = _tpus(device, count) if device.topology else ((), "")
    if tpus:
        return Hardware(device, p.device, count, limit, "the TPU's compiler (libtpu)", False, tpus)
    jax.config.update("jax_platforms", "cpu")
    flags = (f"--xla_force_host_platform_device_count={count}", *HOST_FLAGS, *FAST_FLAGS)
    if (n_host := len(_devices(flags))) < count:
        raise ValueError(f"plan.count={count}, but JAX already runs on {n_host} devices; plan in a new process")
    answers = "the host's compiler" + (", with float16 in place of bfloat16" if config.dtype == "bfloat16" else "")
    answers += f"; the TPU's was not available ({reason}) and lays arrays out differently" if device.topology else ""
    return Hardware(device, p.device, count, limit, answers, True)


def _devices(flags: Sequence[str]) -> list[Any]:
    """Returns JAX's devices, started with more XLA flags than the user's unless JAX was used before."""
    given = os.environ.get("XLA_FLAGS")
    all_flags = (given or "").split()
    all_flags += [flag for flag in flags if not _set(all_flags, flag)]
    os.environ["XLA_FLAGS"] = " ".join(all_flags)
    try:
        return jax.devices()  # XLA reads its flags here, only once
    finally:
        if given is None:
            del os.environ["XLA_FLAGS"]
        else:
            os.environ["XLA_FLAGS"] = given


def _set(flags: Sequence[str], flag: str) -> bool:
    return any(f.split("=")[0] == flag.split("=")[0] for f in flags)


def _measured(memory_bytes: float, n_devices: int) -> Device:
    """Times a matrix product on this machine's CPU, and one with a vector, which only reads; JAX's devices share it."""
    product, a, b = jax.jit(jnp.matmul), jnp.ones((4096, 512)), jnp.ones((512, 1664))
    flops = 2 * a.size * b.shape[1] / _fastest(lambda: product(a, b).block_until_ready())
    matrix, vector = np.ones((8192, 8192), np.float32), np.ones(8192, np.float32)
    bandwidth = matrix.nbytes / _fastest(lambda: matrix @ vector)
    gigabytes, teraflops = (float(f"{x / n_devices:.2g}") for x in (bandwidth / 1e9, flops / 1e12))
    source = "measured now, with float32 products of [4096, 512] × [512, 1664] and [8192, 8192] × [8192]"
    return Device(round(memory_bytes / 1e9, 1), gigabytes, teraflops, source, shares=CPU_SHARES)


def _fastest(work: Callable[[], object]) -> float:
    """Returns the least seconds that a call of `work` took, of a few."""
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _tpus(device: Device, count: int) -> tuple[Sequence[Any], str]:
    """Returns devices as the TPU compiler describes them, or the reason there are none."""
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # otherwise it queries the cloud about this machine, which is slow
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    flat = device.topology in ("v5e", "v6e")
    for power in range(11):
        sides = [1 << (power + 2 - i) // 3 for i in range(3)] if not flat else [1 << power // 2, 1 << (power + 1) // 2]
        try:
            name = f"{device.topology}:{'x'.join(map(str, sides))}"
            described = topologies.get_topology_desc(name, platform="tpu").devices
        except Exception as error:  # libtpu is missing, too old, or knows no such slice: use the host
            if power == 0 or "libtpu" in str(error):
                return (), one_line(error)[:80]
            continue
        if len(described) >= count:
            return described[:count], ""
    return (), f"it has no slice of {count} devices"


@contextlib.contextmanager
def on(hardware: Hardware, mesh: MeshSettings) -> Iterator[None]:
    """Compiles programs inside the context for the hardware, laid out on the mesh."""
    if not hardware.tpus:
        with use_mesh(mesh):
            yield
        return
    shape = (mesh.data, mesh.fsdp, mesh.tensor)
    devices = np.array(hardware.tpus[: math.prod(shape)]).reshape(shape)
    with jax.set_mesh(Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))):
        yield


def laid_out(config: Config, hardware: Hardware) -> Config:
    """Returns the settings with a number for `mesh.data`; an unset mesh takes all planned devices."""
    mesh, count = config.mesh, hardware.n_devices
    if mesh.data == 0 or mesh == MeshSettings():
        mesh = dataclasses.replace(mesh, data=max(1, count // (mesh.fsdp * mesh.tensor)))
    if (needed := math.prod((mesh.data, mesh.fsdp, mesh.tensor))) > count:
        raise ValueError(
            f"mesh of data={mesh.data} fsdp={mesh.fsdp} tensor={mesh.tensor} needs {needed} devices; set plan.count"
        )
    return dataclasses.replace(config, mesh=mesh)


# Memory per stage -------------------------------------------------------------------------------------------


class Planner:
    """Memory needs of a run's stages on some devices; each is compiled once."""

    def __init__(self, config: Config, rows: sizes.Rows, hardware: Hardware):
        self.config, self.rows, self.hardware = config, rows, hardware
        self.plans: dict[str, sizes.Plan] = {}
        self.need = functools.cache(self._need)

    def candidates(self, stage: str) -> list[int]:
        """Returns the sizes of a stage to consider."""
        if stage == "search":
            return sizes.search_batches(self.config, len(self.rows.buffer))
        share = sizes.training_settings(self.config, SIZES[stage]).share()
        return [n for n in range(1, share + 1) if share % n == 0]

    def as_set(self, stage: str) -> StageNeed:
        """Returns a stage's need at its configured size, or at the largest that fits if that is auto."""
        if stage not in SIZES:
            return self.need_at(stage, self.config.generate.tokens_per_batch)
        if self.config.flat()[SIZES[stage]] == "auto":
            return self.largest(stage)
        with on(self.hardware, self.config.mesh):
            size = sizes.size_in_use(self.config, SIZES[stage], len(self.rows.buffer))
        return self.need_at(stage, size)

    def need_at(self, stage: str, size: int) -> StageNeed:
        """Returns a stage's need at a size."""
        return StageNeed(stage, size, self.need(stage, size))

    def largest(self, stage: str) -> StageNeed:
        """Returns a stage's need at the largest size that fits, or at the smallest if none does."""
        with on(self.hardware, self.config.mesh):
            candidates = self.candidates(stage)
        size, _ = memory.largest(candidates, lambda n: _bytes(self.need(stage, n)), self.hardware.limit)
        return self.need_at(stage, size)

    def no_larger_than(self, at: StageNeed) -> str | None:
        """Names the limit that makes a size the largest candidate; returns None if a larger one did not fit."""
        with on(self.hardware, self.config.mesh):
            largest = self.candidates(at.stage)[-1]
        if at.size < largest:
            return None
        if at.stage != "search":
            return "a device's whole share of a batch"
        prompts = self.config.replay.n_searched(len(self.rows.buffer))
        return f"an iteration has {prompts} prompts" + (", larger sizes are not tried" if prompts > 2 * largest else "")

    def fewer_tokens(self, stage: str) -> StageNeed:
        """Returns the need of a stage that only runs the model, with fewer tokens per batch.

        Tries half the tokens and a quarter; returns the need at the current value if neither fits.
        """
        now = self.config.generate.tokens_per_batch
        return next(
            (f for n in (2, 4) if (f := self.need_at(stage, now // n)).fits(self.hardware.limit)),
            self.need_at(stage, now),
        )

    def _need(self, stage: str, size: int) -> MemoryEstimate | None:
        """Computes and logs a stage's need; returns None if the compiler rejects it for lack of memory."""
        need = self._compiled(stage, size)
        amount = "more than the compiler allows" if need is None else f"{need.total / 1e9:.2f} GB per device"
        log(f"{stage}, {SIZES.get(stage, TOKENS)}={size}: {amount}")
        return need

    def _compiled(self, stage: str, size: int) -> MemoryEstimate | None:
        model = load_base(self.config).config
        if self.hardware.on_host and model.dtype == "bfloat16":
            model = dataclasses.replace(model, dtype="float16")
        with on(self.hardware, self.config.mesh):
            programs = self._plan(stage)(size)
            try:
                return max((p.at_depth(model) for p in programs), key=lambda need: need.total)
            except jax.errors.JaxRuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                return None

    def _plan(self, stage: str) -> sizes.Plan:
        if stage not in self.plans:
            known = stage in SIZES
            self.plans[stage] = sizes.plan_of(self.config, SIZES[stage], self.rows) if known else self._other(stage)
        return self.plans[stage]

    def _other(self, stage: str) -> sizes.Plan:
        """Returns the program of the largest batch that a stage makes, as a function of its tokens per batch."""
        lora, limit = self.config.lora, self.config.generate.max_tokens
        if stage == "score":
            widths = [target_width(len(row.prompt_ids), len(row.target_ids)) for row in self.rows.buffer]
            return lambda n: [memory.log_probs(lora, *_largest_batch(widths, n))]
        widths = [bucket(len(row.prompt_ids) - 1) for row in self.rows.evaluated]
        return lambda n: [memory.responses(lora, *_largest_batch(widths, n), limit)]


def _largest_batch(widths: Sequence[int], tokens: int) -> tuple[int, int]:
    """Returns the rows and the width of the largest batch of rows of these widths."""
    batches = group(widths, tokens, row_devices(running=True))
    return max(((rows, width) for _, width, rows in batches), key=lambda batch: (math.prod(batch), batch[1]))


def _bytes(need: MemoryEstimate | None) -> float:
    return float("inf") if need is None else need.total


# What to change ---------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """Settings that make a run fit, and the stages' needs with them."""

    settings: dict[str, Any]
    needs: list[StageNeed]


def change_of(planner: Planner, stages: Sequence[str]) -> Change | None:
    """Returns the first change that makes all stages fit: sizes alone, or other settings too; None if none helps."""
    settings: dict[str, Any] = {}
    tried = [settings, *changes(planner.config, planner.hardware, load_base(planner.config).config)]
    for settings in tried:
        try:
            config = with_settings(planner.config, settings)
            change = _fitted(Planner(config, planner.rows, planner.hardware) if settings else planner, stages)
        except ValueError:  # this mesh cannot divide the batch
            continue
        if change is not None:
            return change._replace(settings=settings | change.settings)
        log(f"does not fit with {as_arguments(settings) or 'smaller sizes alone'}")
    return None


def _fitted(planner: Planner, stages: Sequence[str]) -> Change | None:
    """Chooses sizes that make the stages fit, keeping those that fit; None if a stage does not fit at its smallest."""
    settings: dict[str, Any] = {}
    needs: list[StageNeed] = []
    for stage in stages:
        now = planner.as_set(stage)
        if not now.fits(planner.hardware.limit):
            now = planner.largest(stage) if stage in SIZES else planner.fewer_tokens(stage)
            if not now.fits(planner.hardware.limit):
                return None
            name = SIZES.get(stage, TOKENS)
            settings[name] = min(settings.get(name, now.size), now.size)
        needs.append(now)
    return Change(settings, needs)


def changes(config: Config, hardware: Hardware, model: ModelConfig) -> Iterator[dict[str, Any]]:
    """Yields settings that save memory, the cheapest first: one by one, then together."""
    single: list[dict[str, Any]] = []
    if config.dtype == "float32":
        single.append({"dtype": "bfloat16"})
    if model.remat != "layers":
        single.append({"remat": "layers"})
    count = hardware.n_devices // config.mesh.tensor
    meshes = [n for n in (1 << power for power in range(1, 11)) if config.mesh.fsdp < n <= count and count % n == 0]
    single += [{"mesh.data": count // n, "mesh.fsdp": n} for n in meshes]
    if config.lora.rank == 0:
        single.append({"lora.rank": 16})
    if config.quantize == "none":
        single.append({"quantize": "nf4"} | ({"lora.rank": 16} if config.lora.rank == 0 else {}))
    yield from single
    # Then the strongest together: all changes that are not a mesh with each mesh, the mildest first.
    plain = {name: value for change in single if "mesh.fsdp" not in change for name, value in change.items()}
    halves = {name: value for name, value in plain.items() if name != "quantize"}
    for both in (halves, plain):
        for mesh in ({}, *({"mesh.data": count // n, "mesh.fsdp": n} for n in meshes)):
            if both and both | mesh not in single:
                yield both | mesh


def with_settings(config: Config, settings: dict[str, Any]) -> Config:
    """Returns the settings with some of them changed, by their names on the command line."""
    for name, value in settings.items():
        if "." in name:
            config = sizes.with_size(config, name, value)
    plain: dict[str, Any] = {name: value for name, value in settings.items() if "." not in name}
    return dataclasses.replace(config, **plain)


def as_arguments(settings: dict[str, Any]) -> str:
    """Formats settings as command-line arguments."""
    return " ".join(f"--{name}={value}" for name, value in settings.items())


def parameters(config: Config) -> tuple[int, int]:
    """Returns the number of model parameters, and of those that are trained: the adapters, if there are any."""
    _, base, adapters = memory.abstract(dataclasses.replace(load_base(config).config, nf4=False), config.lora)
    total, beside = (sum(math.prod(x.shape) for x in jax.tree.leaves(tree)) for tree in (base, adapters))
    return total, beside if config.lora.rank else total


def copies(config: Config, hardware: Hardware) -> int:
    """Returns how many copies of the model run, each on its share of the devices."""
    with on(hardware, config.mesh):
        return row_devices(running=True)


def devices_used(config: Config) -> int:
    """Returns the number of devices in the mesh."""
    return math.prod(mesh_shape(config.mesh))
