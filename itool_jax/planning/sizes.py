"""Chooses sizes by the device's memory: those set to `auto`, and lower ones where those set do not fit.

In: the settings, the model's shapes and the data. Out: settings with numbers, and `sizes.json` in the run directory,
which keeps those that were `auto`: a resumed run, even on another machine, uses the sizes it began with. If memory runs
out nevertheless: one line that says what to lower.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from itool_jax.config import Config, is_out_of_memory
from itool_jax.mcts.policy import own_width, path_width, prompt_width
from itool_jax.mcts.search import SearchSettings
from itool_jax.mcts.value import SelfEvaluationSettings
from itool_jax.model.sharding import use_own_mesh
from itool_jax.planning import memory
from itool_jax.store.base import load_base
from itool_jax.store.run import Run
from itool_jax.store.splits import search_pool, split_replay
from itool_jax.system import hosts
from itool_jax.system.files import read_json, write_json
from itool_jax.system.messages import current_stage, log
from itool_jax.text.chat import Chat, Encoded, evaluation_frame
from itool_jax.text.padding import bucket, target_width
from itool_jax.training.settings import TrainingSettings

FILE = "sizes.json"
MOST = 256
"""Largest search.batch that auto considers."""
STAGE_OF = {"warmup.micro_batch": "warmup", "search.batch": "search", "preference.micro_batch": "dpo"}
TOKENS = "generate.tokens_per_batch"
"""The setting to lower for stages that only run the model."""
BytesOfSize = Callable[[int], float]
Plan = Callable[[int], list[memory.Program]]


def resolved(run: Run) -> Run:
    """Returns the settings with a number for each `auto` size that the stage needs, the same on all processes.

    Raises:
        ValueError: a stage does not fit at its smallest size; what to change.
    """
    config, flat = run.config, run.config.flat()
    names = [n for n, stage in STAGE_OF.items() if flat[n] == "auto" and config.stage in ("iterate", stage)]
    known = hosts.broadcast_from_primary("sizes", lambda: _known(config)) if names else {}
    for name in names:
        candidates = _candidates(run, name)
        value = known.get(name, 0)
        if value < 1 or (
            name != "search.batch" and value not in candidates
        ):  # the mesh now divides batches differently
            known[name] = value = _find(run, name, candidates)
            write_json(config.run_dir / FILE, known)
        run = run.with_settings(with_size(run.config, name, value))
    return run


def lowered(run: Run) -> Run:
    """Returns the settings with each size of the whole loop lowered to what fits, the same on all processes.

    Raises:
        ValueError: a stage does not fit at its smallest size; what to change.
    """
    for name in STAGE_OF if run.config.iterations else ["warmup.micro_batch"]:
        run = _lowered(run, name)
    return run


def _known(config: Config) -> dict[str, int]:
    """Returns the sizes stored in the run directory."""
    path = config.run_dir / FILE
    stored = read_json(path) if path.exists() else {}
    return {name: stored[name] for name in STAGE_OF if isinstance(stored.get(name), int) and stored[name] > 0}


def _find(run: Run, name: str, candidates: Sequence[int]) -> int:
    """Finds and logs the largest candidate that fits, the same on all processes."""
    limit = memory.device_limit(run.config.plan.memory_share)
    value, needs = _largest(run, name, candidates, limit)
    fits = f"needs {_gb(needs[value])} of {_gb(limit)} per device by the compiler's estimate"
    larger = min((size for size in needs if size > value), default=None)
    beyond = f"; {larger} would need {_gb(needs[larger])}" if larger is not None else ""
    log(f"{name}=auto: {value}, which {fits}{beyond}")
    return value


def _lowered(run: Run, name: str) -> Run:
    """Returns the settings with a size lowered to what fits, and logs it; those given if that fits."""
    limit = memory.device_limit(run.config.plan.memory_share)
    size = size_in_use(run.config, name, len(search_pool(run.splits.train, run.config).samples))
    model = run.base.config
    if max(program.bound(model) for program in _plan_of_run(run, name)(size)) <= limit:
        return run
    value, needs = _largest(run, name, [*(c for c in _candidates(run, name) if c < size), size], limit)
    if value == size:
        return run
    log(
        f"{name} lowered from {size} to {value}: {size} would need {_gb(needs[size])} of {_gb(limit)} per device by "
        f"the compiler's estimate, {value} needs {_gb(needs[value])}"
    )
    return run.with_settings(with_size(run.config, name, value))


def size_in_use(config: Config, name: str, buffer: int) -> int:
    """Returns the size that a stage uses with numbers for settings, for a replay buffer of `buffer` samples."""
    if name == "search.batch":
        return config.search.fitted(config.replay.n_searched(buffer)).lanes
    settings = training_settings(config, name)
    return settings.share() // settings.n_micro()


def _largest(run: Run, name: str, sizes: Sequence[int], limit: int) -> tuple[int, dict[int, float]]:
    """Returns the largest size that fits, the same on all processes, and the bytes per device of those tried.

    Raises:
        ValueError: none fits.
    """
    with use_own_mesh(run.config.mesh) if name == "search.batch" else contextlib.nullcontext():
        value, needs = memory.largest(sizes, need_of(run, name), limit)
    value, tried = hosts.broadcast_from_primary(f"size {name}", lambda: (value, [*needs.items()]))
    needs = dict(tried)
    if needs[value] > limit:
        raise ValueError(
            f"{STAGE_OF[name]} does not fit: {name}={value} needs {_gb(needs[value])} of {_gb(limit)} per device by "
            f"the compiler's estimate; set remat=layers, quantize=nf4 or a larger mesh.fsdp, or shorten samples; "
            f"{memory.LIMIT}=GB overrides what a device has"
        )
    return value, needs


def _candidates(run: Run, name: str) -> list[int]:
    """Returns the sizes to try: powers of two times the devices that share prompts, or divisors of a device's share."""
    if name != "search.batch":
        share = training_settings(run.config, name).share()
        return [size for size in range(1, share + 1) if share % size == 0]
    return search_batches(run.config, len(search_pool(run.splits.train, run.config).samples))


def search_batches(config: Config, buffer: int) -> list[int]:
    """Returns the values of search.batch to try, for a replay buffer of `buffer` samples."""
    count = memory.row_devices(running=True)
    wanted = min(MOST, config.replay.n_searched(buffer))
    return [count << power for power in range(MOST.bit_length()) if power == 0 or count << power <= wanted]


def training_settings(config: Config, name: str) -> TrainingSettings:
    """Returns the training settings that a size belongs to."""
    return config.warmup if name.startswith("warmup") else config.preference


def with_size(config: Config, name: str, value: int) -> Config:
    """Returns the settings with one size set to a number."""
    section, field = name.split(".")
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{field: value})})


# Memory per size --------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Samples as token ids: those of the warm-up, the replay buffer, and those that every phase is evaluated on."""

    warmup: list[Encoded]
    buffer: list[Encoded]
    evaluated: Sequence[Encoded] = ()


def need_of(run: Run, name: str) -> BytesOfSize:
    """Returns a function from a size to bytes per device, for the longest rows that data and settings allow."""
    plan, model = _plan_of_run(run, name), run.base.config
    return total(lambda size: max((p.at_depth(model) for p in plan(size)), key=lambda need: need.total))


def _plan_of_run(run: Run, name: str) -> Plan:
    warmup, _ = split_replay(run.splits.train, run.config)
    rows = (warmup if name.startswith("warmup") else search_pool(run.splits.train, run.config)).encoded
    return plan_of(run.config, name, Rows(rows, rows))


def plan_of(config: Config, name: str, rows: Rows) -> Plan:
    """Returns a function from a size to the programs that need most, for the longest possible rows."""
    if name == "search.batch":
        lengths = search_lengths(load_base(config).chat, rows.buffer, config.search, config.self_eval)
        return lambda size: memory.searching(config.lora, config.search, lengths, size)
    settings, is_warmup = training_settings(config, name), name.startswith("warmup")
    prefers = not is_warmup and config.preference.control != "sft_same_prompts"
    encoded = rows.warmup if is_warmup else rows.buffer
    # Chosen steps and the model's own right answers are shorter than pairs.
    width = pair_width(config, encoded) if prefers else max(target_width(len(e[1]), len(e[2])) for e in encoded)
    pack = config.warmup.pack if is_warmup else 0
    loss = config.preference.loss_settings if prefers and not config.preference.is_supervised else None
    shape = (settings.batch_size, max(width, pack), pack > 0)
    share = settings.share()
    return lambda size: [memory.trained(loss, config.lora, share // size, *shape)]


def total(need: Callable[[int], memory.MemoryEstimate]) -> BytesOfSize:
    """Returns a function that gives total bytes, or infinity if the compiler rejects the program for lack of memory."""

    def bytes_of(size: int) -> float:
        try:
            return need(size).total
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return float("inf")

    return bytes_of


def search_lengths(
    chat: Chat, rows: Sequence[Encoded], s: SearchSettings, self_eval: SelfEvaluationSettings
) -> memory.Lengths:
    """Returns the padded widths of a search of any of these samples, as the searcher pads them.

    Responses may be the gold's.
    """
    longest = max(rows, key=lambda row: len(row.prompt_ids) + len(row.target_ids))
    gold = chat.content_ids(longest.target_ids) if self_eval.reference == "gold" else None
    frame = evaluation_frame(chat, gold, self_eval.scale)
    prompt, target = max(len(row.prompt_ids) for row in rows), max(len(row.target_ids) for row in rows)
    before_last = (s.max_depth - 1) * s.max_step_tokens
    path = max(before_last, target)
    return memory.Lengths(
        prompt_width(prompt),
        prompt_width(max(prompt, len(longest.prompt_ids) + len(frame.before))),
        path_width(path),
        own_width(max(path, before_last + s.max_last_step_tokens) + len(frame.after)),
    )


def pair_width(config: Config, rows: Sequence[Encoded]) -> int:
    """Returns the padded width of the longest possible pair: a prompt, a response and another step."""
    s, limit = config.search, load_base(config).config.max_length
    step = max(s.longest_step, *(len(row.target_ids) for row in rows))
    response = (s.max_depth - 1) * s.max_step_tokens + step
    longest = max(len(row.prompt_ids) for row in rows)
    return bucket(max(min(longest + response, limit) + step, 2 * step))


# Out of memory ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def explained(run: Run) -> Iterator[None]:
    """Turns an out-of-memory error into one line: the stage, the setting to lower, and what the lower value needs."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(advice(run, current_stage() or run.config.stage, str(error))) from error


def advice(run: Run, where: str, error: str) -> str:
    """Advises what to change after `where`, a stage or phase/stage, ran out of memory."""
    config = run.config
    stage = where.rpartition("/")[2]
    name = next((n for n, of in STAGE_OF.items() if of == stage), TOKENS)
    flat, text = config.flat(), " ".join(error.split())[:160]
    now, less = flat[name], flat[name] // 2 or None
    if name in STAGE_OF and name != "search.batch":
        share = training_settings(config, name).share()
        now = min(now or share, share)
        less = max((c for c in _candidates(run, name) if c < now), default=None)
    estimate = _estimate(run, name, now)
    if less:
        down = f"lower {name} from {now}{estimate} to {less}{_estimate(run, name, less)}; or"
    else:
        down = f"{name}={now}{estimate} is the smallest size;"
    return f"out of device memory in {where} ({text}); {down} set remat, quantize=nf4 or a larger mesh.fsdp"


def _estimate(run: Run, name: str, size: int) -> str:
    """Formats an estimate, such as ` (about 3.2 GB per device)`.

    Returns an empty string if the compiler gives none: a device without free memory may refuse even that.
    """
    if name not in STAGE_OF or run.config.pairs.file is not None:
        return ""
    try:
        need = need_of(run, name)(size)
    except (RuntimeError, ValueError, OSError):
        return ""
    return f" (about {_gb(need)} per device)"


def _gb(size: Any) -> str:
    return f"{size / 1e9:.3g} GB"
