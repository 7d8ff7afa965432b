"""Estimates the memory of a training step with the compiler alone: `python -m benchmarks.memory --json=OUT`.

Compiles SFT and DPO steps of Llama 3.1 8B, without weights, for meshes of devices that need not be present. Prints what
each device holds: arguments (weights, optimizer) and temporaries (activations). `--topology=v5e:2x4` asks the TPU
compiler (from the extra `tpu`; it needs no TPU) about eight devices of 16 GB. Otherwise the host's compiler is asked,
as by `--stage=plan`.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from itool_jax.mcts.search import SearchSettings
from itool_jax.model.linear import LoraSettings
from itool_jax.model.sharding import AXES, MeshSettings, make_mesh
from itool_jax.model.transformer import ModelConfig, RopeScaling
from itool_jax.planning import memory
from itool_jax.planning.estimate import HOST_FLAGS
from itool_jax.planning.memory import Lengths
from itool_jax.text.padding import bucket
from itool_jax.training.losses import LossSettings

QUESTION = 64
"""Approximate number of tokens of the question about a response."""
LLAMA = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192),
    tie_embeddings=False,
    qkv_bias=False,
    max_length=131072,
    dtype="bfloat16",
    remat="layers",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Devices, and how the model is laid out on them."""

    name: str
    gigabytes: int
    mesh: MeshSettings
    weights: tuple[str, ...] = ("lora", "qlora")
    search_batch: int = 64
    """Value of search.batch."""


MACHINES = (
    Machine(name="1 x 141 GB", gigabytes=141, mesh=MeshSettings()),
    Machine(name="8 x 80 GB", gigabytes=80, mesh=MeshSettings(data=8)),
    Machine(name="1 x 24 GB", gigabytes=24, mesh=MeshSettings(), weights=("qlora",), search_batch=8),
    Machine(name="8 x 16 GB", gigabytes=16, mesh=MeshSettings(fsdp=8), search_batch=32),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Programs to compile."""

    length: int = 2048
    """Tokens per row."""
    rows: int = 8
    """Rows (samples or pairs) per step, on all devices together."""
    topology: str | None = None
    """Ask the TPU compiler about this slice, such as v5e:2x4. Measures only the machine of eight 16 GB devices."""
    kinds: tuple[str, ...] = ("sft", "dpo", "search")
    """Programs to measure: a training step (sft, dpo), or the calls of a search with the machine's search.batch."""
    model: Annotated[ModelConfig, tyro.conf.Suppress] = LLAMA
    json: Path | None = None
    """File to write the rows of the table to."""


def measure(kind: str, weights: str, machine: Machine, mesh: Mesh, settings: Settings) -> dict[str, float]:
    """Returns gigabytes per device, by purpose."""
    dtype = "float16" if settings.topology is None else "bfloat16"  # see HOST_FLAGS
    model, lora = dataclasses.replace(settings.model, nf4=weights == "qlora", dtype=dtype), LoraSettings()
    with jax.set_mesh(mesh):
        if kind == "search":
            search = SearchSettings()
            own = bucket(search.max_last_step_tokens + QUESTION)
            lengths = Lengths(settings.length, settings.length, bucket(search.max_depth * search.max_step_tokens), own)
            batch = machine.search_batch
            programs = memory.searching(lora, search, lengths, batch)
            need = max((program.at_depth(model) for program in programs), key=lambda need: need.total)
        else:
            n_micro = max(1, settings.rows // (mesh.shape["data"] * mesh.shape["fsdp"]))
            loss = None if kind == "sft" else LossSettings()
            need = memory.training(loss, model, lora, n_micro, settings.rows, settings.length)
    sizes = {"arguments": need.arguments, "temporaries": need.temporaries, "new outputs": need.outputs}
    return {name: size / 1e9 for name, size in sizes.items()} | {"total": need.total / 1e9}


def mesh_of(machine: Machine, topology: str | None) -> Mesh:
    """Returns a mesh of host devices, or of a slice that the TPU compiler knows."""
    if topology is None:
        return make_mesh(machine.mesh)
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    shape = tuple(getattr(machine.mesh, axis) for axis in AXES)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def main(settings: Settings) -> None:
    """Prints the table and writes the JSON."""
    rows = []
    print(f"Llama 3.1 8B, {settings.rows} rows of {settings.length} tokens per step, one row per device at a time")
    print(
        f"{'devices':<12} {'step':<5} {'weights':<8} {'arguments':>10} {'temporaries':>12} {'total':>8}  GB per device"
    )
    for machine in MACHINES if settings.topology is None else MACHINES[-1:]:
        for kind in settings.kinds:
            for weights in machine.weights:
                try:
                    mesh = mesh_of(machine, settings.topology)
                    sizes = measure(kind, weights, machine, mesh, settings)
                except jax.errors.JaxRuntimeError as error:  # the TPU compiler rejects what does not fit
                    reason = str(error).splitlines()[0]
                    rows.append({"devices": machine.name, "step": kind, "weights": weights, "refused": reason})
                    print(f"{machine.name:<12} {kind:<5} {weights:<8} {reason[:90]}")
                    continue
                fits = sizes["total"] <= machine.gigabytes
                rows.append({"devices": machine.name, "step": kind, "weights": weights, **sizes, "fits": fits})
                row = (
                    f"{machine.name:<12} {kind:<5} {weights:<8} {sizes['arguments']:10.1f} {sizes['temporaries']:12.1f}"
                )
                print(f"{row} {sizes['total']:8.1f}  {'fits' if fits else 'does not fit'}", flush=True)
    if settings.json is not None:
        settings.json.write_text(json.dumps(rows, indent=2) + "\n")


def prepare() -> None:
    """Sets the compiler's environment before it is first used."""
    flags = " ".join(["--xla_force_host_platform_device_count=8", *HOST_FLAGS])
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


if __name__ == "__main__":
    prepare()
    main(tyro.cli(Settings, description=__doc__))
