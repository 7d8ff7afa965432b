"""Measures attention over caches on an accelerator: `python -m benchmarks.attention`, two minutes.

First compares ways to attend to one cache while decoding: their time with the least time for reading keys and values,
and their results with ours. Then traces the kernels of a decode step of a few layers of an 8B shape, and lists the
slowest first. `--small` uses tiny shapes, to check that everything works.
"""

import dataclasses
import functools
import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from benchmarks import gpu
from benchmarks.children.ours import device
from itool_jax.inference.sampler import Policy
from itool_jax.model.attention import KeyValues, attend
from itool_jax.model.transformer import abstract
from itool_jax.planning.roofline import Machine

Array = Any
MOST = 12
"""Number of kernels shown."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Shapes, and the machine to compare with."""

    small: bool = False
    """Use tiny shapes, to check that everything works."""
    rows: tuple[int, ...] = (32, 128)
    """Numbers of rows to decode. The comparison of single attentions uses the last."""
    layers: int = 8
    """Number of layers of the model that decodes."""
    caches: int = 6
    """Number of caches to attend to in turn, so that none is still in on-chip memory."""
    machine: Machine = dataclasses.field(default_factory=Machine)
    """Peak rates of the device; the defaults are an H200's."""


def grouped(q: Array, k: Array, v: Array, mask: Array, accumulate: Any) -> Array:
    """Attends with one product for the queries of a group of heads; k is [B, H, D, K]."""
    queries = q.reshape(len(q), k.shape[1], -1, q.shape[-1])
    scores = jnp.matmul(queries, k, preferred_element_type=accumulate).astype(jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1).astype(v.dtype)
    return jnp.matmul(weights, v, preferred_element_type=accumulate).astype(q.dtype)


def sums(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Does the same without matrix products."""
    queries = q.reshape(len(q), k.shape[1], -1, q.shape[-1]).astype(jnp.float32)
    each = [queries[:, :, g] for g in range(queries.shape[2])]
    scores = jnp.stack([(x[..., None] * k.astype(jnp.float32)).sum(-2) for x in each], 2) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, -1e30), axis=-1)
    return jnp.stack([(weights[:, :, g, :, None] * v).sum(2) for g in range(len(each))], 2).astype(q.dtype)


def library(q: Array, k: Array, v: Array, mask: Array, implementation: Any) -> Array:
    """Calls JAX's own attention, whose caches are [B, K, H, D]."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation=implementation)


def ways(on_gpu: bool) -> dict[str, Callable[..., Array]]:
    """Returns the implementations to compare, ours first."""
    functions: dict[str, Callable[..., Array]] = {
        "ours": lambda q, k, v, mask: attend(q, [KeyValues(k, v, mask)]),
        "one product per group": functools.partial(grouped, accumulate=jnp.float32),
        "the same, 16-bit scores": functools.partial(grouped, accumulate=jnp.bfloat16),
        "sums": sums,
        "jax.nn, XLA": functools.partial(library, implementation="xla"),
    }
    return functions | ({"jax.nn, cuDNN": functools.partial(library, implementation="cudnn")} if on_gpu else {})


def compare(s: Settings, rows: int, heads: int, group: int, size: int, keys: int) -> Iterator[tuple[str, float, float]]:
    """Yields name, seconds and largest difference from ours of each implementation, with caches in its own layout."""
    key, dtype = jax.random.key(0), jnp.bfloat16
    q = jax.random.normal(key, (rows, 1, heads * group, size), dtype)
    caches = [
        (jax.random.normal(a, (rows, heads, size, keys), dtype), jax.random.normal(b, (rows, heads, keys, size), dtype))
        for a, b in jax.random.split(key, (s.caches, 2))
    ]
    mask, first = jnp.arange(keys)[None, None] < keys - keys // 8, None
    mask = jnp.broadcast_to(mask, (rows, 1, keys))
    turned = [(k.transpose(0, 3, 1, 2), v.swapaxes(1, 2)) for k, v in caches]
    for name, way in ways(jax.default_backend() == "gpu").items():
        whole = jax.jit(lambda q, caches, mask, way=way: [way(q, k, v, mask) for k, v in caches])
        given = q, turned if name.startswith("jax.nn") else caches, mask
        taken = gpu.seconds(functools.partial(whole, *given), 7)
        output = np.asarray(whole(*given)[0], np.float32).ravel()
        first = output if first is None else first
        yield name, taken, float(np.max(np.abs(output - first)))


def kernels(work: Callable[[], Any]) -> Counter[str]:
    """Returns the microseconds of each kernel while `work` runs; empty if the trace has none."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            jax.block_until_ready(work())
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        content = json.loads(gzip.decompress(path.read_bytes()))
    events = content["traceEvents"] if isinstance(content, dict) else content
    threads = {(e.get("pid"), e.get("tid")): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    by_kernel: Counter[str] = Counter()
    for e in events:
        if e.get("ph") == "X" and "Stream" in threads.get((e["pid"], e["tid"]), ""):
            by_kernel[e["name"]] += e["dur"]
    return by_kernel


def main(s: Settings) -> None:
    """Prints both tables."""
    sizes = gpu.small() if s.small else gpu.LARGE
    rows, shape = ((2,), (2, 2, 2, 8, 16)) if s.small else (s.rows, (s.rows[-1], 8, 4, 128, 1024))
    n_bytes = s.caches * 2 * 2 * shape[0] * shape[1] * shape[3] * shape[4]
    print(f"{s.caches} caches of {shape} (rows, heads, queries per head, size, keys), bfloat16, on {device()}")
    print(f"reading them takes at least {1e3 * n_bytes / s.machine.bandwidth:.3f} ms")
    for name, taken, difference in compare(s, *shape):
        print(f"  {name:<28} {1e3 * taken:8.3f} ms, differs from ours by {difference:.1e}", flush=True)
    model = dataclasses.replace(sizes.model, stacked=False, n_layers=1 if s.small else s.layers)
    policy = Policy(abstract(model)[0], gpu.random_weights(model))
    ids = np.random.default_rng(0).integers(8, model.vocab_size, (max(rows), sizes.prompt))
    for count in rows:
        work = gpu.decoding(policy, ids[:count], sizes.new)
        taken, by_kernel = gpu.seconds(work, 3), kernels(work)
        print(f"decode, {count} rows, {model.n_layers} layers: {1e3 * taken / sizes.new:.2f} ms per token, by kernel:")
        for name, microseconds in by_kernel.most_common(MOST):
            print(f"  {microseconds / by_kernel.total():6.1%} {name[:90]}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
