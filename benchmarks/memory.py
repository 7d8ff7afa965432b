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
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from itool_jax import sampler, train
from itool_jax.losses import LossSettings
from itool_jax.mcts.search import SearchSettings
from itool_jax.model.cache import empty_prefix
from itool_jax.model.linear import LoraSettings
from itool_jax.model.lora import beside
from itool_jax.model.sharding import AXES, ROWS, MeshSettings, make_mesh, placed, row_devices
from itool_jax.model.transformer import ModelConfig, RopeScaling, abstract
from itool_jax.text.padding import PairBatch, TargetBatch, bucket
from itool_jax.text.steps import N_STATES, StepTable

QUESTION = 64
"""Tokens of the question about a response, about."""
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
    """search.batch"""


MACHINES = (
    Machine(name="1 x 141 GB", gigabytes=141, mesh=MeshSettings()),
    Machine(name="8 x 80 GB", gigabytes=80, mesh=MeshSettings(data=8)),
    Machine(name="1 x 24 GB", gigabytes=24, mesh=MeshSettings(), weights=("qlora",), search_batch=8),
    Machine(name="8 x 16 GB", gigabytes=16, mesh=MeshSettings(fsdp=8), search_batch=32),
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
    kinds: tuple[str, ...] = ("sft", "dpo", "search")
    """What runs: a training step, or the calls of a search of as many prompts together as the machine's config says."""
    model: Annotated[ModelConfig, tyro.conf.Suppress] = LLAMA
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


def memory(kind: str, weights: str, machine: Machine, mesh: Mesh, settings: Settings) -> dict[str, float]:
    """Gigabytes a device, by purpose."""
    model = dataclasses.replace(settings.model, nf4=weights == "qlora")
    with jax.set_mesh(mesh):
        if kind == "search":
            found, kept = search_programs(model, machine.search_batch, settings)
        else:
            found, kept = [training_program(kind, model, mesh, settings).compile().memory_analysis()], 0
    sizes = {
        "arguments": max(f.argument_size_in_bytes for f in found) + kept,
        "temporaries": max(f.temp_size_in_bytes for f in found),
        "new outputs": max(f.output_size_in_bytes - f.alias_size_in_bytes for f in found),
    }
    return {name: size / 1e9 for name, size in sizes.items()} | {"total": sum(sizes.values()) / 1e9}


def training_program(kind: str, model: ModelConfig, mesh: Mesh, settings: Settings) -> Any:
    """A step of SFT or DPO, lowered."""
    graph, base, adapters = abstract(model, LoraSettings())
    base = jax.tree.map_with_path(_stored, base)
    optimizer = train.adamw(0.01, 1.0)
    loss = train.sft_loss(graph) if kind == "sft" else train.preference_loss(graph, LossSettings())
    state = placed(jax.eval_shape(lambda x: train.TrainState(x, optimizer.init(x)), adapters))
    n_micro = max(1, settings.rows // (mesh.shape["data"] * mesh.shape["fsdp"]))
    whole = NamedSharding(mesh, PartitionSpec())
    key = jax.ShapeDtypeStruct((), jax.eval_shape(jax.random.key, 0).dtype, sharding=whole)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    batch = batch_of(kind, settings.rows, settings.length, mesh)
    return train.train_step.lower(loss, optimizer, n_micro, state, placed(base), batch, key, rate)


def search_programs(model: ModelConfig, batch: int, settings: Settings) -> tuple[list[Any], int]:
    """What a round of last steps and one of self-evaluation take, as a search of `batch` prompts has them; and the
    bytes of what neither reads: the caches of the prompts while it asks, those of the questions while it samples."""
    graph, base, adapters = abstract(dataclasses.replace(model, stacked=False), LoraSettings())
    weights = placed(beside(jax.tree.map_with_path(_stored, base), adapters), running=True)
    search = SearchSettings(batch=batch)
    rows, path = batch * search.breadth, bucket(search.max_depth * search.step_limit)

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)  # from the host: it lies where the program wants it

    prompts = row_devices(running=True)
    new = sampler.prefill.eval_shape(graph, weights, array(prompts, settings.length), array(prompts))
    room = empty_prefix.lower(new, batch).compile()
    caches = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.tree.unflatten(jax.tree.structure(room.output_shardings), jax.tree.leaves(room.out_info)),
        room.output_shardings,
    )
    paths = array(batch, path), array(batch)
    step = sampler.sample_step.lower(
        *(graph, search.last_step_limit, weights, step_table(model.vocab_size), caches, *paths),
        *(array(rows, dtype=jax.eval_shape(jax.random.key, 0).dtype), array(rows), array(rows, dtype=jnp.bool_)),
        array(dtype=jnp.float32),
    )
    judged = array(rows, bucket(search.last_step_limit + QUESTION)), array(rows)
    answer = sampler.answer.lower(graph, weights, caches, *paths, *judged, array(2))
    kept = room.memory_analysis().output_size_in_bytes
    return [program.compile().memory_analysis() for program in (step, answer)], kept


def step_table(vocab_size: int) -> StepTable:
    """A table of step boundaries of any model: only its shape matters here."""
    cells, flags = np.zeros((vocab_size, N_STATES), np.int16), np.zeros(vocab_size, bool)
    return StepTable(cells.astype(np.int8), cells, cells, cells.astype(np.int32), flags, flags, np.int32(0))


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
        for kind in settings.kinds:
            for weights in machine.weights:
                try:
                    mesh = mesh_of(machine, settings.topology)
                    sizes = memory(kind, weights, machine, mesh, settings)
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


def prepare() -> None:
    """Sets the compiler's environment, before it is first used."""
    # The scheduler that starts all it can would keep the kernels of all layers at once; memory is what is asked for.
    flags = "--xla_force_host_platform_device_count=8 --xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


if __name__ == "__main__":
    prepare()
    main(tyro.cli(Settings, description=__doc__))
