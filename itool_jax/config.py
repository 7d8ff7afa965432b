"""All settings of a run: the dataclasses that live beside the code they steer, composed; YAML and command line in.

A YAML file holds differences from the defaults only; the command line wins over it. Every run saves its settings.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
import yaml

from itool_jax.data.generated import GeneratedSettings
from itool_jax.mcts.pairs import PairSettings
from itool_jax.mcts.search import SearchSettings
from itool_jax.mcts.value import SelfEvaluationSettings
from itool_jax.model.lora import LoraSettings
from itool_jax.replay import ReplaySettings
from itool_jax.sampler import GenerateSettings
from itool_jax.train import PreferenceSettings, WarmupSettings

Stage = Literal["iterate", "warmup", "score", "search", "dpo", "evaluate", "generate"]

DEMO = "demo"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Evaluation after each phase."""

    limit: int = 400
    """Samples of the split to evaluate, always the same ones; 0 is all of them."""
    split: Literal["test", "validation"] = "test"
    """Which part: settings are chosen on validation, claims made on test."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ValueError(f"evaluate.limit must not be negative, got {self.limit}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """iTool: improves how a language model uses tools, by step-level tree search and preference training."""

    stage: Stage
    """What to run: iterate is the whole loop, the others are its parts."""
    config: Path | None = None
    """YAML file, or the name of one in configs/; without a model, data or config of your own it is demo."""
    model: str = "embedded"
    """Model folder in Hugging Face layout, a hub name, or the embedded checkpoint."""
    data: str = "generated"
    """Training data: a file, a folder, hf:OWNER/NAME, or the generated corpus."""
    run_dir: Path = Path("runs/default")
    """Where a run keeps everything; finished work found there is not done again."""
    output: Path | None = None
    """File to write, for score and generate on a data file of their own."""
    iterations: int = 3
    """Rounds of score, search, preference training."""
    iteration: int = 1
    """Which round the stages score, search and dpo work on when run alone."""
    seed: int = 0
    """Seed of everything random."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Computation type."""
    lora: LoraSettings = LoraSettings()
    generated: GeneratedSettings = GeneratedSettings()
    warmup: WarmupSettings = WarmupSettings()
    replay: ReplaySettings = ReplaySettings()
    search: SearchSettings = SearchSettings()
    self_eval: SelfEvaluationSettings = SelfEvaluationSettings()
    pairs: PairSettings = PairSettings()
    preference: PreferenceSettings = PreferenceSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    generate: GenerateSettings = GenerateSettings()

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations must not be negative, got {self.iterations}")
        if self.iteration < 1:
            raise ValueError(f"iteration must be positive, got {self.iteration}")

    def flat(self) -> dict[str, Any]:
        """All settings by their command-line names, as plain values."""
        return dict(_flatten(dataclasses.asdict(self)))


def parse(arguments: Sequence[str]) -> Config:
    """The settings of a command line; tyro prints help and errors and exits with 0 and 2."""
    arguments = list(arguments)
    chosen = _chosen_file(arguments)
    if chosen is None and not any(a.split("=")[0].replace("-", "_") in ("__model", "__data") for a in arguments):
        chosen = DEMO
    from_file = _file_arguments(find_config(chosen)) if chosen else []
    return tyro.cli(Config, args=[*from_file, *arguments], prog="python -m itool_jax.main")


def _chosen_file(arguments: list[str]) -> str | None:
    for i, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
        if argument == "--config" and i + 1 < len(arguments):
            return arguments[i + 1]
    return None


def find_config(name: str) -> Path:
    """The YAML file of that path, or of that name among the configs that come with the program."""
    package = Path(__file__).parent
    folders = (package / "configs", package.parent / "configs")
    for path in (Path(name), *(folder / f"{name}.yaml" for folder in folders)):
        if path.is_file():
            return path
    known = sorted({str(p.relative_to(f).with_suffix("")) for f in folders if f.is_dir() for p in f.rglob("*.yaml")})
    raise ValueError(f"config {name} is no file, and none of: {', '.join(known)}")


def _file_arguments(path: Path) -> list[str]:
    """A YAML file as command-line arguments, so that one parser checks both."""
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings, one `name: value` a line")
    flat = dict(_flatten(content))
    known = {name for name, _ in _flatten(_defaults())}
    if unknown := sorted(set(flat) - known):
        raise ValueError(f"{path}: unknown setting {unknown[0]}; `--help` lists all")
    return [argument for name, value in flat.items() for argument in _argument(name, value)]


def _argument(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        head, _, last = name.rpartition(".")
        return [f"--{head + '.' if head else ''}{'' if value else 'no-'}{last}"]
    return [f"--{name}={value}"]


def _flatten(tree: dict[str, Any], head: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{head}{key}.")
        else:
            yield f"{head}{key}", str(value) if isinstance(value, Path) else value


def _defaults() -> dict[str, Any]:
    return dataclasses.asdict(Config(stage="iterate"))


# What may differ between two commands on one run directory: it does not change what an earlier one computed.
FREE = ("stage", "config", "run_dir", "output", "iterations", "iteration", "evaluate.", "generate.")


def save_or_check(config: Config) -> None:
    """Saves the settings in the run directory; an existing one must have been made with the same.

    Raises:
        ValueError: it was made with other settings; names the first.
    """
    path = config.run_dir / "config.yaml"
    flat = config.flat()
    if not path.exists():
        config.run_dir.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(yaml.safe_dump(flat, sort_keys=False))
        partial.replace(path)
        return
    saved = yaml.safe_load(path.read_text())
    for name, value in flat.items():
        if not name.startswith(FREE) and isinstance(saved, dict) and saved.get(name) != value:
            raise ValueError(
                f"run directory {config.run_dir} was made with {name}={saved.get(name)}, now it is {value}; "
                "choose another --run_dir or the same settings"
            )


def describe_error(error: BaseException) -> str:
    """One line for the user."""
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{Path(sys.argv[0]).name}: error: {text}"
