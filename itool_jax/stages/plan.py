"""Estimate of a run's cost before paying for a machine: memory per device, tokens, hours, and settings to change.

In: settings, a model's config.json and tokenizer (no weights), the data, and devices that need not be present
(`--plan.device`, `--plan.count`). Out: a table, and with `--output` the same as JSON. Nothing else is written and no
weights are allocated: memory comes from the compiler's own analysis of the programs that the stages run.
"""

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Iterator

from rich.table import Table

from itool_jax.config import Config
from itool_jax.planning import estimate as memory
from itool_jax.planning.estimate import SIZES, Hardware, Planner, StageNeed
from itool_jax.planning.sizes import TOKENS, Rows
from itool_jax.planning.time import Data, TimeModel, Workload, workloads
from itool_jax.store.cache import Figures
from itool_jax.store.splits import divide, divide_replay
from itool_jax.system.files import write_json
from itool_jax.system.messages import console_out, log

STAGES = ("warmup", "score", "search", "dpo", "evaluate")
PURPOSES = {
    "weights": ("weights",),
    "adapters": ("adapters",),
    "optimizer": ("optimizer",),
    "KV cache": ("caches",),
    "temporary": ("temporaries",),
    "other": ("batch", "outputs"),
    "total": ("total",),
}
"""Columns of the table, with the parts of the memory estimate that each one adds up."""


def run(config: Config) -> Figures:
    """Prints the plan, writes it to `--output` if given, and returns it."""
    start = time.monotonic()
    with _without_collection():  # collecting garbage would walk over all samples again and again
        plan = _plan(config)
    plan["seconds_to_plan"] = round(time.monotonic() - start, 1)
    _show(plan)
    if config.output is not None:
        write_json(config.output, plan)
        log(f"wrote {config.output}")
    return plan


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _plan(config: Config) -> Figures:
    hardware = memory.hardware_of(config)
    config = memory.laid_out(config, hardware)
    data = _data(config)
    planner = Planner(config, Rows(data.rows(data.warmup), data.rows(data.pool), data.evaluated), hardware)
    log(f"planning for {hardware.n_devices} x {hardware.name}, using {hardware.answers}")
    # 1. The memory that each stage needs with the current settings, and the largest sizes that fit.
    stages = STAGES if config.iterations else (STAGES[0], STAGES[-1])
    stages = stages if data.evaluated else stages[:-1]  # a run may be evaluated on nothing but a benchmark
    as_set = [planner.as_set(stage) for stage in stages]
    most = [planner.largest(stage) for stage in stages if stage in SIZES]
    # 2. Settings to change if a stage does not fit.
    fits = all(at.fits(hardware.limit) for at in as_set)
    change = None if fits else memory.change_of(planner, stages)
    # 3. How long each stage takes.
    batch = next((at.size for at in as_set if at.stage == "search"), 1)
    time_model = TimeModel(config, hardware.device, memory.devices_used(config), memory.copies(config, hardware))
    shares = {f"{name}_share": share for name, share in time_model.shares._asdict().items()}
    return {
        "devices": _devices(config, hardware),
        "model": dict(zip(("parameters", "trained"), memory.parameters(config), strict=True)) | {"name": config.model},
        "fits": fits,
        "stages": _stages(as_set, workloads(config, data, time_model, batch), hardware),
        "largest": [_size_row(at, hardware) | {"of": planner.no_larger_than(at)} for at in most],
        "change": None if change is None else _change_row(change, hardware),
        "assumed": dataclasses.asdict(config.plan) | shares | {"dtype": config.dtype, "benchmark": config.benchmark},
    }


def _data(config: Config) -> Data:
    """Splits the data as a run would, in memory only; of the generated corpus, makes no more than is planned for."""
    count, limit = getattr(config.generated, config.evaluate.split), config.evaluate.limit
    held_out = {"validation": 1, "test": 1, config.evaluate.split: min(count, limit or count)}
    config = dataclasses.replace(config, generated=dataclasses.replace(config.generated, **held_out))
    parts, _ = divide(config, [] if config.skip_bad_rows else None)
    warmup, buffer = divide_replay(config, parts["train"].samples)
    pool = buffer if config.replay.pool == "buffer" else [s for s in parts["train"].samples if s.follows_user]
    encoded = {row.id: row for row in parts["train"].encoded}
    return Data(warmup, pool, encoded, parts[config.evaluate.split].encoded[: config.evaluate.limit or None])


def _devices(config: Config, hardware: Hardware) -> Figures:
    mesh = dataclasses.asdict(config.mesh)
    sheet = None if hardware.device is None else hardware.device._asdict()
    used = memory.devices_used(config)
    row = {"name": hardware.name, "count": hardware.n_devices, "used": used, "mesh": mesh, "data_sheet": sheet}
    return row | {"bytes_for_programs": hardware.limit, "analysis": hardware.answers}


def _need_row(at: StageNeed, hardware: Hardware) -> Figures:
    need = at.need
    by_purpose = None if need is None else need._asdict() | {"total": need.total}
    return {"bytes_a_device": by_purpose, "fits": at.fits(hardware.limit)}


def _size_row(at: StageNeed, hardware: Hardware) -> Figures:
    setting = SIZES.get(at.stage, TOKENS)
    return {"stage": at.stage, "setting": setting, "value": at.size} | _need_row(at, hardware)


def _stages(as_set: list[StageNeed], times: list[Workload], hardware: Hardware) -> list[Figures]:
    rows = []
    for at, workload in zip(as_set, times, strict=True):
        hours = workload.seconds / 3600 if math.isfinite(workload.seconds) else None
        work = {"work": workload.what, "tokens": workload.tokens, "padded_tokens": workload.padded, "hours": hours}
        rows.append(_size_row(at, hardware) | work)
    return rows


def _change_row(change: memory.Change, hardware: Hardware) -> Figures:
    row = {"settings": change.settings, "arguments": memory.as_arguments(change.settings)}
    return row | {"stages": [_size_row(at, hardware) for at in change.needs]}


# Printing ---------------------------------------------------------------------------------------------------


def _show(plan: Figures) -> None:
    for line in _head(plan):
        console_out.print(line, soft_wrap=True, markup=False)
    console_out.print(_memory_table(plan["stages"]))
    for line in _largest(plan):
        console_out.print(line, soft_wrap=True, markup=False)
    console_out.print(_time_table(plan["stages"]))
    for line in _foot(plan):
        console_out.print(line, soft_wrap=True, markup=False)


def _head(plan: Figures) -> list[str]:
    d, model = plan["devices"], plan["model"]
    mesh = " ".join(f"{axis}={n}" for axis, n in d["mesh"].items())
    share, kind = plan["assumed"]["memory_share"], d["data_sheet"]
    sheet = (
        "" if kind is None else f": {kind['gigabytes']:g} GB, {kind['bandwidth']:g} GB/s, {kind['teraflops']:g} TFLOP/s"
    )
    source = "" if kind is None else f"; source: {kind['source']}"
    idle = f"; {d['count'] - d['used']} idle" if d["used"] < d["count"] else ""
    return [
        f"{model['name']}: {model['parameters']:,} parameters, {model['trained']:,} trainable",
        f"{d['count']} x {d['name']}{sheet}; mesh {mesh}{idle}{source}",
        f"programs may use {d['bytes_for_programs'] / 1e9:.1f} GB of each ({share:.0%}); memory estimated by "
        f"{d['analysis']}",
        *(
            ["beside these, Python and libraries take 0.4 GB, and each program 2 to 5 MB a layer"]
            * (d["name"] == "cpu")
        ),
    ]


def _memory_table(rows: list[Figures]) -> Table:
    table = _table("GB per device, current settings")
    for name in ("stage", "size", *PURPOSES, ""):
        table.add_column(name, justify="left" if name == "stage" else "right", no_wrap=True)
    for row in rows:
        need = row["bytes_a_device"]
        cells = ["?" if need is None else f"{sum(need[x] for x in of) / 1e9:.2f}" for of in PURPOSES.values()]
        table.add_row(row["stage"], str(row["value"]), *cells, "fits" if row["fits"] else "NO")
    return table


def _largest(plan: Figures) -> list[str]:
    lines = []
    for row in plan["largest"]:
        if row["fits"]:
            total = row["bytes_a_device"]["total"] / 1e9
            of = f", {row['of']}" if row["of"] else ""
            lines.append(f"largest that fits: {row['setting']}={row['value']}, {total:.1f} GB{of}")
        else:
            lines.append(f"no {row['setting']} fits, not even {row['value']}")
    if plan["fits"]:
        return lines
    if (change := plan["change"]) is None:
        return [
            *lines,
            "does not fit, whatever dtype, remat, lora, quantize and mesh.fsdp are: use larger devices or more of them",
        ]
    runs_lower_it = change["settings"].keys() <= set(SIZES.values())
    words = "does not fit as set; a run will lower it to" if runs_lower_it else "does not fit; fits with"
    lines.append(f"{words} {change['arguments']}:")
    for row in change["stages"]:
        total = row["bytes_a_device"]["total"] / 1e9
        lines += [f"  {row['stage']}: {total:.1f} GB with {row['setting']}={row['value']}"]
    return lines


def _time_table(rows: list[Figures]) -> Table:
    table = _table("work of the whole run")
    for name in ("stage", "work", "M tokens", "padded", "time"):
        table.add_column(name, justify="left" if name in ("stage", "work") else "right", no_wrap=name != "work")
    for row in rows:
        tokens = [f"{row[key] / 1e6:.2f}" for key in ("tokens", "padded_tokens")]
        table.add_row(row["stage"], row["work"], *tokens, _duration(row["hours"]))
    return table


def _foot(plan: Figures) -> list[str]:
    hours, used, a = [row["hours"] for row in plan["stages"]], plan["devices"]["used"], plan["assumed"]
    if None in hours:
        return ["no data sheet for this device, so no times; set --plan.device=GB:bandwidth:TFLOPS"]
    total = math.fsum(hours)
    is_cpu = plan["devices"]["name"] == "cpu"
    slower = " (slower in float32)" if a["dtype"] == "float32" and not is_cpu else ""
    of_one = f" on {used} devices, {_duration(total * used)} of one" if used > 1 else ""
    more = "" if a["benchmark"] is None else f" or the questions of {a['benchmark']}"
    return [
        f"total: {_duration(total)}{of_one}, without loading, compilation{more}",
        f"assumed: sampling at {a['decode_share']:.0%} of bandwidth, training at {a['training_share']:.0%} of peak, "
        f"scoring at {a['scoring_share']:.0%}{slower}, {a['pairs_a_tree']:g} pairs per tree, responses as "
        "long as the gold's",
    ]


def _duration(hours: float | None) -> str:
    """Formats hours in the unit that a person would choose."""
    if hours is None:
        return "?"
    units = (("s", 3600 * hours, 99.5), ("min", 60 * hours, 99.5), ("h", hours, 48), ("days", hours / 24, math.inf))
    unit, number = next((unit, number) for unit, number, most in units if number < most)
    return f"{number:.1f} {unit}" if 0 < number < 9.95 else f"{number:.0f} {unit}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, collapse_padding=True, pad_edge=False)
