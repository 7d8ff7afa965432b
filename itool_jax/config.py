"""All settings of a run: the dataclasses that live beside the code they steer, composed; YAML and command line in.

`Recipe` declares the settings that define a run, and `Runtime` those that say what one command does, where and how.
`Config` is both; its sections warmup, preference and generate hold settings of both kinds. A YAML file holds only what
differs from the defaults; the command line wins over it.
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
from itool_jax.mcts.search import SearchSettings
from itool_jax.mcts.value import SelfEvaluationSettings
from itool_jax.model.linear import LoraSettings
from itool_jax.model.sharding import MeshSettings
from itool_jax.system import untrusted
from itool_jax.system.devices import PlanSettings
from itool_jax.system.hosts import DistributedSettings
from itool_jax.system.trackers import LogSettings
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
"""Those that may be given a benchmark: it is asked by the first two."""
ONCE_TRUE_OR_FALSE: dict[str, dict[bool, str]] = {
    "preference.control": {False: "none", True: "sft_same_prompts"},
    "search.inject_gold": {False: "never", True: "always"},
}
"""Settings that were true or false in earlier versions, and what these values are called now."""
DEMO = "demo"
CONFIG_ALIASES = {"paper": "paper_v1"}
"""Other names of configs that come with the program."""
PROGRAM = "python -m itool_jax.main"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Evaluation after each phase."""

    limit: int = 400
    """Samples of the split to evaluate, always the same ones; 0 is all of them."""
    split: Literal["test", "validation"] = "test"
    """Which part: settings are chosen on validation, claims made on test."""
    intermediate: bool = True
    """Evaluate after each iteration; else after the last one only, beside base and warm-up."""
    phase: str | None = None
    """Phase evaluated on a benchmark: base, warmup, iteration_2, or all; the last one that has weights."""
    benchmark_data: Path | None = None
    """Folder of the benchmark's data where --data is something else; else what the official scorer brings."""
    benchmark_limit: int = 0
    """Questions of each category of a benchmark, the first ones; 0 is all, which official figures need."""
    layout: Literal["v3", "v4"] = "v3"
    """Names of the files that BFCL responses are written to."""
    underscore_to_dot: bool = False
    """The model of --results was shown _ for every dot in a function's name, as OpenAI's interface wants it."""
    benchmarks: tuple[str, ...] = ()
    """Evaluation data, files or folders, whose questions and tools the data card looks for among the training samples:
    BFCL's questions, API-Bank's tests, or any form of training data."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"evaluate.limit must not be negative, got {self.limit}")
        if self.benchmark_limit < 0:
            raise ValueError(f"evaluate.benchmark_limit must not be negative, got {self.benchmark_limit}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What of a run is exported, and how."""

    kind: Literal["merged", "adapter"] = "merged"
    """A whole model, adapters merged into its weights, as transformers reads it; or the adapters alone, for PEFT."""
    phase: str | None = None
    """Phase whose weights are exported, such as warmup or iteration_2; the last one that has any."""
    base: Literal["original", "dequantized"] | None = None
    """What adapters trained beside four-bit weights are merged into: the original 16-bit weights, or what the four bits
    stand for, which is what they were trained with. It must be said where quantize is nf4."""
    shard_gigabytes: float = 5.0
    """Largest size of a weight file."""

    def __post_init__(self) -> None:
        if not self.shard_gigabytes > 0:
            raise ValueError(f"export.shard_gigabytes must be positive, got {self.shard_gigabytes}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a run is: the settings that its results depend on. They bind the run directory."""

    model: str = "embedded"
    """Model folder in Hugging Face layout, a hub name, or the embedded checkpoint."""
    data: str = "generated"
    """Training data: a file, a folder, hf:OWNER/NAME, or the generated corpus; the folder with the questions and
    answers when a benchmark is evaluated."""
    skip_bad_rows: bool = False
    """Leave out training rows that are wrong or too long for the model, and list them; else the first ends the run."""
    seed: int = 0
    """Seed of everything random, but for the generated corpus, which is always the same."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and matrix products; adapters, optimizer, softmax and losses are float32 always."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4 keeps the layers' weights in four bits and trains adapters beside them (QLoRA)."""
    deterministic: bool = False
    """Have a GPU compute the same bits every time: XLA takes deterministic kernels only, and tries out no longer which
    of several is the fastest. By XLA's documentation they may be slower, and a few operations have none and are
    refused; what it costs here was not measured. Elsewhere it changes nothing."""
    lora: LoraSettings = LoraSettings()
    generated: GeneratedSettings = GeneratedSettings()
    samples: SamplesSettings = SamplesSettings()
    warmup: WarmupRecipe = WarmupRecipe()
    replay: ReplaySettings = ReplaySettings()
    search: SearchSettings = SearchSettings()
    self_eval: SelfEvaluationSettings = SelfEvaluationSettings()
    pairs: PairSettings = PairSettings()
    preference: PreferenceRecipe = PreferenceRecipe()
    generate: GenerateRecipe = GenerateRecipe()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, got {self.seed}")
        if self.quantize == "nf4" and self.lora.rank == 0:
            raise ValueError("quantize=nf4 needs adapters: weights of four bits are not trained; set lora.rank")
        if self.preference.merge and self.lora.rank == 0:
            raise ValueError("preference.merge needs adapters, and lora.rank=0 trains the weights themselves")
        if self.preference.merge and self.quantize == "nf4":
            raise ValueError("preference.merge would round adapters to four bits; set quantize=none, or do not merge")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runtime:
    """What one command does, where and how. Commands on one run directory may differ in these."""

    stage: Stage
    """What to run: iterate is the whole loop, of which warmup, score, search, dpo and evaluate are parts; plan and
    doctor come before a run, report, export and generate after it."""
    config: str | None = None
    """YAML file, or the name of one in configs/; several joined by commas, later ones win. Without a model, data or
    config of your own it is demo."""
    run_dir: Path = Path("runs/default")
    """Where a run keeps everything; finished work found there is not done again."""
    output: Path | None = None
    """File to write, for score and generate on a data file of their own, for evaluate with results, and for plan; for
    export, the folder to write."""
    watch: bool = False
    """For the stage report: serve it on this machine and follow the run, until Ctrl-C."""
    overwrite: bool = False
    """Replace an exported folder that is there already."""
    chat: bool = False
    """Have generate talk with you in the terminal, instead of answering a data file."""
    tools: Path | None = None
    """JSON file of the tools in a chat: OpenAI's schemas, or bare functions, one or a list; else some of the demo's."""
    benchmark: Literal["bfcl", "api_bank"] | None = None
    """Public benchmark: evaluate takes it in place of the held-out part, iterate beside it after every phase."""
    categories: tuple[str, ...] = ()
    """The benchmark's categories. BFCL's by name, or all, single_turn (which is the default), non_live, live or
    multi_turn (which runs the official simulators); API-Bank's level_1, level_2 and level_2_without_search."""
    results: Path | None = None
    """Folder of BFCL result files, whoever made them, that evaluate scores; no model is run."""
    against: Path | None = None
    """Another run's scores.json, with which evaluate compares a benchmark question by question."""
    official: bool = False
    """Have the official BFCL scorer judge the same responses, and show both."""
    iterations: int = 3
    """Rounds of score, search, preference training."""
    iteration: int = 1
    """Which round the stages score, search and dpo work on when run alone."""
    remat: Literal["auto", "none", "layers", "dots"] = "auto"
    """What the backward pass computes again to save memory: nothing, whole layers, or all but matrix products; auto is
    layers for models of more than eight."""
    profile: bool = False
    """Trace a few steps of each kind of work, once it is warm, into profile/ in the run directory, for Perfetto and
    XProf."""
    log: LogSettings = LogSettings()
    mesh: MeshSettings = MeshSettings()
    distributed: DistributedSettings = DistributedSettings()
    warmup: TrainingRuntime = TrainingRuntime()
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
                "output is for the stages score, generate, export and plan, and for results, "
                f"got it with stage {self.stage}"
            )
        self._check_benchmark()
        if self.distributed.several and (self.stage == "export" or (self.stage == "generate" and self.output is None)):
            need = "--output" if self.stage == "generate" else "one process"
            raise ValueError(f"stage {self.stage} needs {need}, got it with several processes (distributed)")
        if self.watch and self.stage != "report":
            raise ValueError(f"watch is for the stage report, got it with stage {self.stage}")
        if self.overwrite and self.stage != "export":
            raise ValueError(f"overwrite is for the stage export, got it with stage {self.stage}")
        self._check_chat()

    def _check_chat(self) -> None:
        if self.chat and self.stage != "generate":
            raise ValueError(f"chat is for the stage generate, got it with stage {self.stage}")
        if self.chat and self.output is not None:
            raise ValueError("output is for generate on a data file, got it with chat, where /save FILE writes one")
        if self.generate.phase is not None and self.stage not in ("generate", "export"):  # a file is tried with export
            raise ValueError(f"generate.phase is for the stage generate, got it with stage {self.stage}")
        if self.tools is not None and not self.chat:
            raise ValueError("tools is for a chat; in a data file each sample has its own. Set --chat")

    def _check_benchmark(self) -> None:
        given = [name for name in ("results", "against", "official") if getattr(self, name)]
        if given and self.stage != "evaluate":
            raise ValueError(f"{given[0]} is for the stage evaluate, got it with stage {self.stage}")
        if (given or self.categories) and self.benchmark is None:
            raise ValueError(f"{(given or ['categories'])[0]} needs a benchmark; set --benchmark=bfcl")
        if self.benchmark is not None and self.stage not in BENCHMARK_STAGES:
            raise ValueError(f"benchmark is for the stages evaluate and iterate, got it with stage {self.stage}")
        if self.evaluate.underscore_to_dot and self.results is None:
            raise ValueError("evaluate.underscore_to_dot is for results: our prompts show names with their dots")

    @property
    def looks_only(self) -> bool:
        """Whether the command changes nothing of a run, nor runs the model."""
        return self.stage in ("plan", "doctor")

    @property
    def resumes(self) -> bool:
        """Whether the same command goes on where this one was interrupted."""
        return self.stage != "export" and not self.looks_only and (self.keeps_run or self.output is not None)

    @property
    def keeps_run(self) -> bool:
        """Whether the command works in the run directory; some write one file of their own, or none."""
        alone = self.output is not None and self.stage != "export"
        writes = self.stage not in ("generate", "report") and not self.looks_only
        return writes and self.results is None and not alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Runtime, Recipe):
    """iTool: improves how a language model uses tools, by step-level tree search and preference training."""

    warmup: WarmupSettings = WarmupSettings()
    preference: PreferenceSettings = PreferenceSettings()
    generate: GenerateSettings = GenerateSettings()

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        Runtime.__post_init__(self)
        for name, value in self.flat().items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value}")
            if isinstance(value, str) and untrusted.redacted(value) != value:
                raise ValueError(f"{name} holds a token or password; give it in the environment, as HF_TOKEN")

    def flat(self, kind: type[Recipe] | type[Runtime] | None = None) -> dict[str, Any]:
        """Returns all settings, or those of one kind, by their command-line names, as plain values."""
        return dict(_leaves(self, kind or Config))


def parse(arguments: Sequence[str]) -> Config:
    """The settings of a command line; `--help` is printed and exits with 0.

    Raises:
        ValueError: one line that names the setting, and the YAML file where it stands in one.
    """
    arguments = [_at_home(argument) for argument in arguments]
    if not {"--stage", "--help", "-h"} & {argument.split("=")[0] for argument in arguments}:
        raise ValueError(f"what to do is missing: --stage={{{','.join(get_args(Stage))}}}; see --help")
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
    """An argument whose ~ the shell left alone, as most do behind an equals sign."""
    name, equals, value = argument.partition("=")
    return f"{name}={Path(value).expanduser()}" if equals and value.startswith("~/") else argument


def current_value(name: str, value: Any) -> Any:
    """The value of a setting as it is called now; files and runs of earlier versions may hold true or false."""
    return ONCE_TRUE_OR_FALSE[name][value] if name in ONCE_TRUE_OR_FALSE and isinstance(value, bool) else value


def _current(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the flags of settings that were once true or false as the values of today.

    `--preference.control` is such a flag where no value follows it.
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
    """What tyro makes of them, its errors as one line."""
    arguments = _current(arguments)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(Config, args=arguments, prog=PROGRAM)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(printed.getvalue())) from stop


def _one_line(box: str) -> str:
    """The text in a box that tyro printed, without its frame, colours and last part, which points to --help."""
    lines = [line.strip(" │|") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    parts: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch("[─-]+", line):
            parts.append([])
        elif line and not line.startswith(("╭", "╰", "+")):
            parts[-1].append(line)
    text = "; ".join(" ".join(part) for part in (parts[:-1] or parts))
    # tyro puts the section before what a dataclass of ours says, which names the setting itself.
    return re.sub(r"^Error parsing \w+: ", "", text) + "; see --help"


def _given(arguments: list[str], name: str) -> str | None:
    """What follows --config or --stage, the last time; ValueError where there are two of --config."""
    flat = [part for argument in arguments for part in argument.split("=", 1)]
    places = [i for i, part in enumerate(flat) if part == name]
    if len(places) > 1 and name == "--config":
        raise ValueError("--config is given twice; join the names with a comma, later ones win")
    return flat[places[-1] + 1] if places and places[-1] + 1 < len(flat) else None


def _names(chosen: str | None) -> list[str]:
    """The configs that --config names; that of a run may lie in a folder whose name holds commas."""
    if chosen is None:
        return []
    return [chosen] if Path(chosen).is_file() else chosen.split(",")


def find_config(name: str) -> Path:
    """The YAML file of that name among the configs that come with the program, or of that path."""
    package = Path(__file__).parent
    folders = (package / "configs", package.parent / "configs")
    file = f"{CONFIG_ALIASES.get(name, name)}.yaml"
    for path in (*(folder / file for folder in folders), Path(name)):
        if path.is_file():
            return path
    known = sorted({str(p.relative_to(f).with_suffix("")) for f in folders if f.is_dir() for p in f.rglob("*.yaml")})
    raise ValueError(f"config {name} is no file, and none of: {', '.join(known)}")


def _file_arguments(path: Path, stage: str | None) -> list[str]:
    """A YAML file as command-line arguments, so that one parser checks both.

    A run's own has the benchmark that the run was evaluated on, which most stages have no use for.
    """
    try:
        content = untrusted.read_yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings, one `name: value` a line")
    flat = dict(_flatten(content))
    if (
        path.name == "config.yaml" and (path.parent / "environment.json").is_file()
    ):  # that of a run, which may have been moved or copied since
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
            raise ValueError(f"{name} holds {option!r}, which would be read as an option")
        return [f"--{name}", *map(str, value)]
    return [_at_home(f"--{name}={value}")]


def _flatten(tree: dict[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested sections, each with its dotted name."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{head}{key}.")
        else:
            yield f"{head}{key}", value


def _leaves(settings: Any, kind: type, head: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the settings that the dataclass `kind` and its sections declare, each with its dotted name."""
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
    """Whether a device had too little memory for a program."""
    return isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def describe_error(error: BaseException, where: Path | None = None) -> str:
    """One line for the user; `where` is what was being written, for errors that name no file."""
    text = untrusted.one_line(error)
    if isinstance(error, MemoryError):
        text = f"out of host memory ({text[:200]}); lower {MEMORY_SETTINGS}, or give less data"
    if is_out_of_memory(error):
        text = f"out of device memory ({text[:200]}); lower {MEMORY_SETTINGS}"
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or where or 'error'}: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text += "; free some space and run the same command again: what is finished is kept"
    return untrusted.redacted(f"{PROGRAM}: error: {text}")
