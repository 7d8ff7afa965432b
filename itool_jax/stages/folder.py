"""The run directory: what each stage reads and writes, and where; nothing else couples stages.

    config.yaml  summary.json  metrics.jsonl  log.jsonl  environment.json  report.html
    data/        {train,validation,test}.jsonl; card.json; skipped.txt; sources.json, what model and data files were
    base/ warmup/ iteration_1/ …    a phase each: weights/ (but base), evaluation_<split>_<limit>.jsonl, and of an
                                    iteration scores.jsonl, trees.jsonl, pairs.jsonl, reference.jsonl
A stage's `<stage>.json` is written last: where it stands, and what the stage was made from is as it was, it is done.
Before, `<stage>.working/` holds what the stage has done so far.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
from flax import nnx

from itool_jax import checkpoint
from itool_jax.config import Config
from itool_jax.data.rows import SUFFIXES, read_rows
from itool_jax.files import place, read_json
from itool_jax.metrics import Metrics
from itool_jax.model import forms, hf
from itool_jax.model.lora import beside, initialize_adapters, merge_adapters
from itool_jax.model.sharding import MeshSettings, placed, runs_apart, use_own_mesh
from itool_jax.model.transformer import ModelConfig, Params, abstract
from itool_jax.run_directory import check_weights
from itool_jax.sampler import Policy
from itool_jax.stages import columns
from itool_jax.text.chat import Chat, Encoded, encode_sample, load_tokenizer
from itool_jax.text.sample import Sample
from itool_jax.text.steps import Granularity, StepTable, build_step_table
from itool_jax.train import LossFn, TrainingSettings, fit

SOURCES = "data/sources.json"


class Base(NamedTuple):
    """The checkpoint a run starts from, but for its weights, which `base_params` loads."""

    config: ModelConfig
    chat: Chat


def phase_name(iteration: int) -> str:
    """The phase that iteration 1, 2, … ends with; 0 is the warm-up."""
    return f"iteration_{iteration}" if iteration else "warmup"


def model_folder(config: Config) -> Path:
    """Where the model's files are."""
    return _find_model(config.model, not config.looks_only, config.stage != "doctor")


@functools.lru_cache(maxsize=1)
def _find_model(name: str, weights: bool, fetch: bool) -> Path:
    return Path(__file__).parent.parent / "embedded" / "model" if name == "embedded" else hf.find(name, weights, fetch)


@functools.lru_cache(maxsize=2)
def _load(folder: Path, dtype: str, nf4: bool, remat: str) -> Base:
    model = hf.read_config(folder, dtype)
    remat = ("layers" if model.n_layers > 8 else "none") if remat == "auto" else remat
    return Base(dataclasses.replace(model, nf4=nf4, remat=remat), Chat(load_tokenizer(str(folder))))


def load_base(config: Config) -> Base:
    """The checkpoint a run starts from: shapes, tokenizer and template."""
    base = _load(model_folder(config), config.dtype, config.quantize == "nf4", config.remat)
    if (n := base.chat.n_ids) > base.config.vocab_size:
        raise ValueError(
            f"tokenizer of {config.model} has {n} tokens, its model only {base.config.vocab_size} embeddings"
        )
    return base


@functools.lru_cache(maxsize=1)
def _held(folder: Path, dtype: str, nf4: bool, mesh: MeshSettings) -> dict[bool, Params]:
    """The weights of a checkpoint by whether they are stacked: in one form at a time, for there is room for one."""
    return {}


def base_params(config: Config, *, stacked: bool) -> Params:
    """The weights a run starts from, to train (`stacked`) or to run, on the mesh in use; read once.

    Those given out before in the other form are no longer there.
    """
    folder, nf4 = model_folder(config), config.quantize == "nf4"
    held = _held(folder, config.dtype, nf4, config.mesh)
    if not held:
        held[stacked] = hf.load(folder, config.dtype, nf4=nf4, stacked=stacked)[1]
    elif stacked not in held and runs_apart(config.mesh):  # the other form is to lie on other devices
        held.clear()
        held[stacked] = hf.load(folder, config.dtype, nf4=nf4, stacked=stacked)[1]
    elif stacked not in held:
        held[stacked] = (forms.to_train if stacked else forms.to_run)(held.pop(not stacked))
    return held[stacked]


def step_table(config: Config, granularity: Granularity) -> StepTable:
    """Step boundaries and stop tokens of the model's vocabulary."""
    base = load_base(config)
    with use_own_mesh(config.mesh):
        return build_step_table(base.chat.tokenizer, granularity, base.config.vocab_size, base.chat.stop_ids)


WEIGHTS = "weights"
"""The part of a phase's folder with what training changed: adapters, or all weights where there are none."""


def weights_folder(config: Config, phase: str) -> Path:
    """Where the weights that a phase trained are."""
    return config.run_dir / phase / WEIGHTS


def trained_phases(config: Config) -> list[str]:
    """The phases that have weights, in order."""
    names = map(phase_name, itertools.count())
    return list(itertools.takewhile(lambda phase: weights_folder(config, phase).is_dir(), names))


def answering_phase(config: Config) -> str:
    """The phase that `generate.phase` names; `base`, the model as it is, where it names none."""
    name = config.generate.phase
    if name in (None, "base"):
        return "base"
    check_weights(config)
    check_sources(config, ["model"])  # adapters belong to one base
    phases = trained_phases(config)
    chosen = phases[-1] if name == "last" and phases else name
    if chosen not in phases:
        there = ", ".join(phases) or "none yet"
        raise ValueError(f"generate.phase={name} has no weights in {config.run_dir}; there are: {there}")
    return chosen


def load_trained(config: Config, phase: str, dtype: str = "float32") -> Params:
    """What a phase trained, adapters or all weights; the base is not loaded."""
    model = hf.read_config(model_folder(config), config.dtype)
    _, weights, adapters = abstract(model, config.lora)
    shapes = adapters if config.lora.rank else weights
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), shapes)
    return checkpoint.restore(weights_folder(config, phase), placed(shapes))


def load_trainable(config: Config, phase: str) -> tuple[Params, Params]:
    """What training changes, as a phase left it, in float32, for `train.fit` to take over; and the weights that stay.

    Those of `base` are new adapters, which change nothing, or without adapters the weights themselves.
    """
    if not config.lora.rank:
        _held.cache_clear()  # the weights are there once: those that training changes
        return (hf.load(model_folder(config))[1] if phase == "base" else load_trained(config, phase)), {}
    if phase != "base":
        return load_trained(config, phase), base_params(config, stacked=True)
    adapters = initialize_adapters(load_base(config).config, config.lora, jax.random.key(config.seed))
    return adapters, base_params(config, stacked=True)


def training_graph(config: Config) -> nnx.GraphDef:
    """The module that both parts of `load_trainable` go into."""
    return abstract(load_base(config).config, config.lora)[0]


def load_policy(config: Config, phase: str) -> Policy:
    """A phase's policy, to run and not to train, on the devices that `spread` works with."""
    with use_own_mesh(config.mesh):
        return _load_policy(config, phase)


def _load_policy(config: Config, phase: str) -> Policy:
    model = dataclasses.replace(load_base(config).config, stacked=False)
    graph = abstract(model)[0]
    if phase == "base":
        return Policy(graph, base_params(config, stacked=False))
    if not config.lora.rank:
        _held.cache_clear()
        return Policy(graph, forms.to_run(load_trained(config, phase, config.dtype)))
    trained, frozen = forms.to_run(load_trained(config, phase)), base_params(config, stacked=False)
    if config.dtype == "float32" and config.quantize == "none":  # small models: there is room for the base beside it
        return Policy(graph, merge_adapters(frozen, trained, config.lora))
    # Merged into weights of less precision, adapters would lose most of what they learned.
    return Policy(abstract(model, config.lora)[0], beside(frozen, trained))


def train(
    config: Config,
    phase: str,
    working: Path,
    loss: LossFn,
    settings: TrainingSettings,
    before: str,
    batches: grain.MapDataset,
    *,
    seed: int,
    what: str,
) -> str:
    """Trains the weights of the phase before over batches and keeps them as the phase's; returns their digest.

    The training goes on from its last checkpoint in the folder `working` where it was killed.
    """
    kept = checkpoint.Training(working / "training", settings.checkpoint_every)
    metrics = Metrics(config.run_dir / "metrics.jsonl", phase)
    start = load_trainable(config, before)
    trained = fit(loss, settings, *start, batches, seed=seed, what=what, metrics=metrics, kept=kept)
    kept.finish()
    return checkpoint.save(weights_folder(config, phase), trained)


def data_file(config: Config) -> str:
    """The data file of the stages that read one of their own."""
    if config.data == "generated":
        raise ValueError(f"--stage={config.stage} needs --data=FILE, a file of samples or of raw prompts")
    return config.data


def fingerprints(config: Config, names: Sequence[str] = ("model", "data")) -> dict[str, Any]:
    """What tells one content of the model's and the data's files from another, without reading big ones whole."""
    found: dict[str, Any] = {}
    for name in names:
        if name == "data" and config.data == "generated":
            continue
        path = model_folder(config) if name == "model" else Path(config.data)
        patterns = hf.FILES if name == "model" else [f"*{ending}" for ending in SUFFIXES]
        paths = [path] if path.is_file() else sorted(p for pattern in patterns for p in path.glob(pattern))
        found[name] = {path.name: _ends(path) for path in paths if path.is_file()}
    return found


def _ends(path: Path, size: int = 1 << 20) -> str:
    """A hash of a file's length, beginning and end."""
    with path.open("rb") as file:
        length, beginning = path.stat().st_size, file.read(size)
        file.seek(max(0, length - size))
        return hashlib.blake2b(b"%d " % length + beginning + file.read(), digest_size=16).hexdigest()


def check_sources(config: Config, names: Sequence[str] = ("model", "data")) -> None:
    """ValueError where the files of the model or the data are no longer those that the run began with."""
    path = config.run_dir / SOURCES
    if not path.exists():
        return
    then, now = read_json(path), fingerprints(config, names)
    for name in now:
        if not isinstance(then.get(name), dict):
            raise ValueError(f"{path} is damaged (it holds no {name}); choose another --run_dir")
        if changed := sorted(f for f in then[name] | now[name] if then[name].get(f) != now[name].get(f)):
            source = f"{changed[0]} of --{name}={getattr(config, name)}"
            raise ValueError(f"run directory {config.run_dir} was made with another {source}; choose another --run_dir")


def encode(config: Config, found: Sequence[Sample]) -> list[Encoded]:
    """Samples as token ids; ValueError names one that does not fit the model's context."""
    base = load_base(config)
    encoded = [encode_sample(base.chat, sample) for sample in found]
    check_lengths(encoded, base.config.max_length)
    return encoded


def check_lengths(encoded: Sequence[Encoded], limit: int) -> None:
    """Every prompt and target must fit the context together, and neither may be empty."""
    for row in encoded:
        if not row.target_ids:
            raise ValueError(f"sample {row.id}: there is no target")
    check_room(encoded, limit)


def check_ids(encoded: Sequence[Encoded], vocab_size: int) -> None:
    """Every token id must have an embedding: raw rows may hold any number."""
    for row in encoded:
        if (largest := max((*row.prompt_ids, *row.target_ids), default=0)) >= vocab_size:
            raise ValueError(f"sample {row.id}: token id {largest} is not in the model's vocabulary of {vocab_size}")


def check_room(encoded: Sequence[Encoded], limit: int, room: int = 0) -> None:
    """Every prompt, with its target and `room` more, must fit the context, and none may be empty."""
    for row in encoded:
        length = len(row.prompt_ids) + len(row.target_ids)
        if not row.prompt_ids:
            raise ValueError(f"sample {row.id}: the prompt is empty")
        if length + room > limit:
            raise ValueError(
                f"sample {row.id}: its {length} tokens do not fit the model's context of {limit}; "
                "remove the sample, or take a model with a longer context"
            )


def done_file(config: Config, phase: str, stage: str) -> Path:
    """What marks a stage of a phase as done, and holds its figures."""
    return config.run_dir / phase / f"{stage}.json"


def read_done(config: Config, phase: str, stage: str) -> dict[str, Any] | None:
    """The figures of a finished stage, or None."""
    path = done_file(config, phase, stage)
    if not path.exists():
        return None
    figures = read_json(path)
    for key, kind in (("seconds", int | float), ("outputs", dict)):
        if not isinstance(figures.get(key), kind):
            raise ValueError(f"{path} is damaged (it holds no {key}); delete it to run the stage again")
    if outside := [name for name in figures["outputs"] if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(f"{path} is damaged ({outside[0]} is not in its folder); delete it to run the stage again")
    return figures


def policy_stage(phase: str) -> tuple[str, str]:
    """The (phase, stage) that makes a phase's weights."""
    return phase, "warmup" if phase == "warmup" else "dpo"


def read_table(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a file of the run; ValueError names a row that lacks one of the keys."""
    found = []
    for number, row in read_rows(path):
        if bad := columns.fault(row, keys):
            raise ValueError(f"{place(path, number)}: {bad}; delete the file to compute it again")
        found.append(row)
    return found


def need(config: Config, phase: str, name: str, stage: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a file that an earlier stage writes; ValueError names the stage to run, or a row without a key."""
    path = config.run_dir / phase / name
    if not path.exists():
        raise ValueError(f"{path} does not exist; run {_command(stage, phase)} first")
    return read_table(path, keys)


def require_policy(config: Config, phase: str) -> None:
    """ValueError where the phase before has no weights yet."""
    if not weights_folder(config, phase).is_dir():
        command = _command(policy_stage(phase)[1], phase)
        raise ValueError(f"{config.run_dir} has no weights of {phase} yet; run {command} first")


def _command(stage: str, phase: str) -> str:
    iteration = phase.removeprefix("iteration_")
    return f"--stage={stage}" + (f" --iteration={iteration}" if iteration != phase else "")
