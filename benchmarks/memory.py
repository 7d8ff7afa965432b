"""Memory of a training step, from the compiler alone: `python -m benchmarks.memory --json=OUT`.

Compiles SFT and DPO steps of Llama 3.1 8B for meshes of devices that need not be here, without weights, and prints
what each device holds: arguments (weights, optimizer) and temporaries (activations). `--topology=v5e:2x4` asks the TPU
compiler (it comes with the extra `tpu`, and needs no TPU) about eight devices of 16 GB; otherwise the compiler of the
host is asked, which computes bfloat16 products in float32 and so counts more temporaries than other devices need.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import tyro

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from itool_jax import train
from itool_jax.losses import LossSettings
from itool_jax.model.linear import LoraSettings
from itool_jax.model.sharding import AXES, ROWS, MeshSettings, make_mesh, placed
from itool_jax.model.transformer import ModelConfig, RopeScaling, abstract
from itool_jax.text.padding import PairBatch, TargetBatch

KEY = jax.eval_shape(lambda: jax.random.key(0))
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


MACHINES = (
    Machine(name="1 x 141 GB", gigabytes=141, mesh=MeshSettings()),
    Machine(name="8 x 80 GB", gigabytes=80, mesh=MeshSettings(data=8)),
    Machine(name="1 x 24 GB", gigabytes=24, mesh=MeshSettings(), weights=("qlora",)),
    Machine(name="8 x 16 GB", gigabytes=16, mesh=MeshSettings(fsdp=8)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What is compiled."""

    length: int = 2048
    """Tokens in a row."""
    rows: int = 8
    """Rows (samples or pairs) of a step, all devices together."""
    topology: str | None = None
    """Ask the TPU compiler about this slice, such as v5e:2x4, for the machine of eight devices of 16 GB; the others are
    then left out."""
    json: Path | None = None
    """File for the rows of the table."""


def batch_of(kind: str, rows: int, length: int, mesh: Mesh) -> Any:
    """Shapes of a batch, its rows spread over the mesh."""
    spread = rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    where = NamedSharding(mesh, PartitionSpec(ROWS if spread else None))

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    targets = length // 2 if kind == "sft" else length
    batch = TargetBatch(
        array(rows, length), array(rows, targets), array(rows, targets), array(rows, targets, dtype=jnp.bool_)
    )
    if kind == "sft":
        return batch
    number = array(rows, dtype=jnp.float32)
    return PairBatch(batch, array(rows, length), (number, number), (number, number), array(rows, dtype=jnp.bool_))


def _stored(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A weight of the base as a run holds it: bfloat16, but for four-bit codes and their scales."""
    coded = "kernel" in [part.key for part in path[:-1]]
    return leaf if coded else jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)


def step_memory(kind: str, weights: str, mesh: Mesh, settings: Settings) -> dict[str, float]:
    """Gigabytes a device, by purpose."""
    config, lora = dataclasses.replace(LLAMA, nf4=weights == "qlora"), LoraSettings()
    graph, base, adapters = abstract(config, lora)
    base = jax.tree.map_with_path(_stored, base)
    optimizer = train.adamw(0.01, 1.0)
    loss = train.sft_loss(graph) if kind == "sft" else train.preference_loss(graph, LossSettings())
    with jax.set_mesh(mesh):
        state = placed(jax.eval_shape(lambda x: train.TrainState(x, optimizer.init(x)), adapters))
        n_micro = max(1, settings.rows // (mesh.shape["data"] * mesh.shape["fsdp"]))
        whole = NamedSharding(mesh, PartitionSpec())
        key = jax.ShapeDtypeStruct((), KEY.dtype, sharding=whole)
        rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
        batch = batch_of(kind, settings.rows, settings.length, mesh)
        lowered = train.train_step.lower(loss, optimizer, n_micro, state, placed(base), batch, key, rate)
        found = lowered.compile().memory_analysis()
    sizes = {"arguments": found.argument_size_in_bytes, "temporaries": found.temp_size_in_bytes}
    sizes["new outputs"] = found.output_size_in_bytes - found.alias_size_in_bytes
    return {name: size / 1e9 for name, size in sizes.items()} | {"total": sum(sizes.values()) / 1e9}


def mesh_of(machine: Machine, topology: str | None) -> Mesh:
    """A mesh of devices of the host, or of a slice that the TPU compiler knows."""
    if topology is None:
        return make_mesh(machine.mesh)
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    shape = tuple(getattr(machine.mesh, axis) for axis in AXES)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def main(settings: Settings) -> None:
    """Prints the table and writes the JSON."""
    rows = []
    print(f"Llama 3.1 8B, {settings.rows} rows of {settings.length} tokens a step, one row a device at a time")
    print(f"{'devices':<12} {'step':<5} {'weights':<8} {'arguments':>10} {'temporaries':>12} {'total':>8}  GB a device")
    for machine in MACHINES if settings.topology is None else MACHINES[-1:]:
        for kind in ("sft", "dpo"):
            for weights in machine.weights:
                try:
                    sizes = step_memory(kind, weights, mesh_of(machine, settings.topology), settings)
                except jax.errors.JaxRuntimeError as error:  # the TPU compiler refuses what does not fit
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


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
