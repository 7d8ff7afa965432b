"""Shards weights and activations over a mesh of devices, using one table from parameter names to axes.

Axes: `data` (rows of a batch), `fsdp` (rows too, and weights along their other dimension) and `tensor` (heads, the
inner width of the MLP, the vocabulary). A model that only runs uses `fsdp` as a further `tensor` axis; otherwise
decoding would move all weights to every device for each token. An axis that does not divide a dimension is dropped
there. XLA inserts the communication (GSPMD, arXiv 2105.04663), so every mesh gives the results of one device.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Array

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")

# Innermost dimensions; a stack of layers has one more leading dimension, which is not sharded.
INWARD, OUTWARD = ("fsdp", "tensor"), ("tensor", "fsdp")
IN, OUT = ("q", "k", "v", "gate", "up"), ("o", "down")
SPECS: dict[str, tuple[str | None, ...]] = {
    "embedding": ("tensor", "fsdp"),
    "lm_head": INWARD,
    **{f"{name}.bias": ("tensor",) for name in ("q", "k", "v")},
    **{f"{name}.{part}": INWARD for name in IN for part in ("kernel", "kernel.codes", "kernel.scales")},
    **{f"{name}.{part}": OUTWARD for name in OUT for part in ("kernel", "kernel.codes", "kernel.scales")},
    **{f"{name}.lora_a": ("fsdp", None) for name in IN},
    **{f"{name}.lora_b": (None, "tensor") for name in IN},
    **{f"{name}.lora_a": ("tensor", None) for name in OUT},
    **{f"{name}.lora_b": (None, "fsdp") for name in OUT},
}
"""Axes of each weight, by the end of its name; weights not listed are replicated on every device."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """Layout of the devices; data × fsdp × tensor of them are used."""

    data: int = 1
    """Copies of the model, each with its share of a batch. 0: as many as the devices allow, given the other axes; on a
    machine without an accelerator, one per CPU core, at most 8."""
    fsdp: int = 1
    """Devices over which to split the weights of a copy, and its rows."""
    tensor: int = 1
    """Devices over which to split each layer's heads and widths."""

    def __post_init__(self) -> None:
        for name, least in (("data", 0), ("fsdp", 1), ("tensor", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"mesh.{name} must be at least {least}, got {getattr(self, name)}")


def make_mesh(settings: MeshSettings) -> Mesh:
    """Makes the mesh; ValueError if there are too few devices, or if several processes would not use all of them."""
    shape = checked_shape(settings, jax.device_count(), jax.process_count())
    return _mesh(shape, jax.devices()[: math.prod(shape)])


def checked_shape(settings: MeshSettings, count: int, processes: int) -> tuple[int, int, int]:
    """Computes `mesh_shape` on `count` devices of several processes; ValueError if the mesh does not fit them."""
    data, fsdp, tensor = shape = mesh_shape(settings, count)
    if (needed := math.prod(shape)) > count:
        raise ValueError(
            f"mesh of data={data} fsdp={fsdp} tensor={tensor} needs {needed} devices, but only {count} are available"
        )
    if needed < count and processes > 1:
        raise ValueError(
            f"mesh of data={data} fsdp={fsdp} tensor={tensor} uses {needed} of the {count} devices of "
            f"{processes} processes, which must all be used; set --mesh.data=0"
        )
    return shape


def mesh_shape(settings: MeshSettings, count: int | None = None) -> tuple[int, int, int]:
    """Computes the sizes of the three axes on `count` devices, by default all devices."""
    data, fsdp, tensor = settings.data, settings.fsdp, settings.tensor
    return data or max(1, (count or jax.device_count()) // (fsdp * tensor)), fsdp, tensor


def mesh_here(settings: MeshSettings) -> MeshSettings:
    """Returns a run's mesh, or one device if the run was made on more devices than there are here."""
    return settings if math.prod(mesh_shape(settings)) <= jax.device_count() else MeshSettings()


def _mesh(shape: tuple[int, ...], devices: Sequence[Any]) -> Mesh:
    return jax.make_mesh(shape, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def use_mesh(settings: MeshSettings) -> contextlib.AbstractContextManager[Any]:
    """Spreads compiled functions inside the context over the mesh; does nothing on one device."""
    mesh = make_mesh(settings)
    return jax.set_mesh(mesh) if mesh.size > 1 else contextlib.nullcontext()


def runs_apart(settings: MeshSettings) -> bool:
    """Returns whether each of several processes runs its own copy of the model on the devices of its host."""
    processes, (data, fsdp, tensor) = jax.process_count(), mesh_shape(settings)
    return processes > 1 and data % processes == 0 and jax.local_device_count() % (fsdp * tensor) == 0


def use_own_mesh(settings: MeshSettings) -> contextlib.AbstractContextManager[Any]:
    """Restricts the context to the process's own devices if each process runs its own copy of the model.

    A single process, or several that run the model together, use the whole mesh.
    """
    if not runs_apart(settings):
        return contextlib.nullcontext()
    data, fsdp, tensor = mesh_shape(settings)
    return jax.set_mesh(_mesh((data // jax.process_count(), fsdp, tensor), jax.local_devices()))


def to_devices(batch: Any) -> Any:
    """Puts a batch of host arrays on the mesh in use; each process provides the rows of its own devices."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return batch

    def put(x: Any) -> Any:
        where = NamedSharding(mesh, fit((ROWS,) + (None,) * (x.ndim - 1), x.shape, mesh))
        return jax.make_array_from_callback(x.shape, where, lambda part: x[part])

    return jax.tree.map(put, batch)


def to_host(tree: Any) -> Any:
    """Fetches arrays as whole NumPy arrays; if one spans several hosts, all processes must call this together."""

    def fetch(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return jax.device_get(x)

    return jax.tree.map(fetch, tree)


def spec_of(
    path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh, running: bool = False
) -> PartitionSpec:
    """Looks up the axes of one weight by its path in the parameters (or in an optimizer's state)."""
    keys = [str(part.key) for part in path if isinstance(part, jax.tree_util.DictKey)]
    axes: tuple[Any, ...] = next((SPECS[name] for n in (3, 2, 1) if (name := ".".join(keys[-n:])) in SPECS), ())
    if running:
        axes = tuple({"fsdp": None, "tensor": ("fsdp", "tensor"), None: None}[axis] for axis in axes)
    if len(shape) < len(axes):  # a count or another scalar of the optimizer
        return PartitionSpec()
    return fit(((None,) * (len(shape) - len(axes)) + axes), shape, mesh)


def fit(axes: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Keeps the axes that divide their dimensions; if a dimension has several axes, drops the first ones first."""
    return PartitionSpec(*(_dividing(axis, size, mesh) for axis, size in zip(axes, shape, strict=True)))


def _dividing(axis: Any, size: int, mesh: Mesh | AbstractMesh) -> Any:
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    names = tuple(name for name in names if name not in mesh.manual_axes)  # of `on_each_copy`
    while names and size % math.prod(mesh.shape[name] for name in names):
        names = names[1:]
    return None if not names else names[0] if len(names) == 1 else names


def sharding_of(path: tuple[Any, ...], shape: tuple[int, ...], running: bool = False) -> jax.sharding.Sharding:
    """Returns the sharding of one weight: on the mesh in use, or whole on the first device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return SingleDeviceSharding(jax.local_devices()[0])
    return NamedSharding(mesh, spec_of(path, shape, mesh, running))


def placed(shapes: Any, running: bool = False) -> Any:
    """Adds shardings to the shapes of weights or of an optimizer's state."""

    def place(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        where = sharding_of(path, leaf.shape, running)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    return jax.tree.map_with_path(place, shapes)


def compute_capability() -> tuple[int, ...]:
    """Returns the compute capability of the NVIDIA GPUs here, such as (9, 0); empty for other devices."""
    parts = str(getattr(jax.devices()[0], "compute_capability", "")).split(".")
    return tuple(map(int, parts)) if all(part.isdigit() for part in parts) else ()


def n_devices() -> int:
    """Counts the devices of the mesh in use, inside a compiled function."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def row_devices(running: bool = False) -> int:
    """Counts the devices over which the mesh in use spreads the rows of a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in (ROWS[:1] if running else ROWS))


def on_each_copy(n_prompts: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Returns what makes a compiled function of (arrays by row, whole arrays) run on each copy of the model by itself.

    It changes nothing if there is one copy, if the copies cannot share `n_prompts` evenly, or if a copy has several
    devices: they exchange parts of it, and copies whose loops end at different times would wait for each other forever.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or (copies := mesh.shape["data"]) == 1 or n_prompts % copies or mesh.size > copies:
        return lambda function: function
    rows, whole = PartitionSpec("data"), PartitionSpec()
    return functools.partial(
        jax.shard_map, in_specs=(rows, whole), out_specs=rows, axis_names={"data"}, check_vma=False
    )


def constrain_axes(x: Array, *axes: str | tuple[str, ...]) -> Array:
    """Shards the first dimensions of `x` over these axes of the mesh in use, if any, inside a compiled function."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, fit(axes + (None,) * (x.ndim - len(axes)), x.shape, mesh))


def constrain(tree: Any, running: bool = False) -> Any:
    """Shards weights or an optimizer's state over the mesh in use, if any, inside a compiled function."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return tree
    place = jax.lax.with_sharding_constraint
    return jax.tree.map_with_path(lambda path, leaf: place(leaf, spec_of(path, leaf.shape, mesh, running)), tree)
