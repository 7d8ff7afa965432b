"""Settings: defaults, YAML, command line, their order, what is refused, and what binds a run directory."""

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from itool_jax import config as settings
from itool_jax.config import Config, Recipe, Runtime
from itool_jax.inference.sampler import GenerateRuntime
from itool_jax.store import directory as run_directory
from itool_jax.training.settings import PreferenceRecipe, TrainingRuntime, WarmupRecipe
from tests.conftest import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").rglob("*.yaml"))

BINDING = {
    "": (
        "model",
        "adapter",
        "data",
        "skip_bad_rows",
        "strict",
        "tool_format",
        "tool_style",
        "seed",
        "dtype",
        "quantize",
        "deterministic",
    ),
    "lora.": ("rank", "alpha", "dropout", "targets"),
    "generated.": ("train", "validation", "test", "writers"),
    "samples.": ("targets", "test_share", "validation_share", "test_file", "fraction", "limit", "max_tools"),
    "warmup.": (
        *("learning_rate", "batch_size", "epochs", "weight_decay", "warmup_ratio", "clip_norm"),
        *("max_epochs", "schedule", "order", "pack"),
    ),
    "replay.": (
        *("replay_fraction", "hardest_fraction", "skip_fraction"),
        *("select", "pool", "samples", "temperature"),
    ),
    "search.": (
        *("n_simulations", "breadth", "max_depth", "exploration", "discount", "value_weight"),
        *("temperature", "top_p", "prior_exponent", "granularity", "max_step_tokens", "max_last_step_tokens"),
        *("outcome", "inject_gold"),
    ),
    "self_eval.": ("reference", "scale", "weight", "both_orders"),
    "pairs.": ("min_q_gap", "require", "rejected", "held_out", "file"),
    "preference.": (
        *("learning_rate", "batch_size", "epochs", "weight_decay", "warmup_ratio", "clip_norm"),
        *("loss", "beta", "margin", "orpo_lambda", "dpop_lambda", "sft_weight", "reference", "merge", "control"),
    ),
    "generate.": ("max_tokens",),
}
"""The settings that bind a run directory, by section."""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refused(*arguments: str) -> str:
    """The one line that a command line is refused with."""
    with pytest.raises(ValueError) as caught:
        settings.parse(arguments)
    line = str(caught.value)
    assert line
    assert "\n" not in line
    assert not re.search("[│╭╰─\x1b]", line)
    return line


# Where values come from -------------------------------------------------------------------------------------


def test_without_model_or_data_the_demo_is_run():
    demo = yaml.safe_load((REPOSITORY / "configs/demo.yaml").read_text())
    config = settings.parse(["--stage=iterate"])
    assert config.run_dir == Path(demo["run_dir"])
    assert config.generated.train == demo["generated"]["train"]
    assert config.preference.sft_weight == demo["preference"]["sft_weight"]


@pytest.mark.parametrize("own", ["--model=some/model", "--data=rows.jsonl"])
def test_with_a_model_or_data_the_defaults_hold(own: str):
    config = settings.parse(["--stage=iterate", own])
    assert config == dataclasses.replace(Config(stage="iterate"), **dict([own[2:].split("=")]))


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path):
    path = write(tmp_path / "c.yaml", "seed: 5\nsearch: {breadth: 7, inject_gold: false}\npreference.beta: 0.3\n")
    config = settings.parse(["--stage=search", f"--config={path}", "--search.breadth=2"])
    assert (config.seed, config.search.breadth, config.preference.beta) == (5, 2, 0.3)
    assert config.search.inject_gold == "never"
    assert config.search.max_depth == Config(stage="search").search.max_depth
    config = settings.parse(["--config", str(path), "--stage=search", "--search.inject_gold", "--preference.beta=None"])
    assert config.search.inject_gold == "always"
    assert config.preference.beta is None


def test_of_several_files_the_later_ones_win(tmp_path: Path):
    first = write(tmp_path / "a.yaml", "seed: 5\nsearch: {breadth: 7}\n")
    second = write(tmp_path / "b.yaml", "search: {breadth: 4, max_depth: 2}\n")
    config = settings.parse(["--stage=search", f"--config={first},{second}", "--search.max_depth=6"])
    assert (config.seed, config.search.breadth, config.search.max_depth) == (5, 4, 6)
    demo, ipo = (settings.parse(["--stage=iterate", f"--config={name}"]) for name in ("demo", "demo,ablations/ipo"))
    changed = {name for name, value in ipo.flat().items() if demo.flat()[name] != value}
    assert changed == {"config", "run_dir", "preference.loss"}
    assert ipo.preference.resolved_beta == 0.1


def test_names_are_taken_with_underscores_and_with_hyphens():
    flags = ["--run_dir=a", "--search.n_simulations=3"]
    assert settings.parse(["--stage=iterate", *flags]) == settings.parse(
        ["--stage=iterate", *(flag.replace("_", "-") for flag in flags)]
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_that_ships_is_valid_and_short(path: Path):
    name = str(path.relative_to(REPOSITORY / "configs").with_suffix(""))
    config = settings.parse(["--stage=iterate", f"--config={name}"])
    assert settings.find_config(name) == path
    assert len(path.read_text().splitlines()) <= 40
    given = dict(settings._flatten(yaml.safe_load(path.read_text())))
    assert given
    assert {name: config.flat()[name] for name in given} == given


def test_a_saved_config_gives_the_same_settings_again(tmp_path: Path):
    config = settings.parse(
        ["--stage=iterate", "--model=m", f"--run_dir={tmp_path / 'run'}", "--search.no-inject_gold", "--seed=3"]
    )
    run_directory.save_or_check(config)
    again = settings.parse(["--stage=score", f"--config={tmp_path / 'run/config.yaml'}"])
    assert dataclasses.replace(again, config=None, stage="iterate") == config


# What is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--stage=walk", ["--stage", "'walk'", "iterate", "evaluate"]),
        ("--search.breadht=3", ["--search.breadht=3", "--search.breadth"]),
        ("surplus", ["surplus"]),
        ("--search.breadth=three", ["--search.breadth", "'three'"]),
        ("--search.breadth", ["--search.breadth"]),
        ("--search.breadth=0", ["search.breadth must be positive, got 0"]),
        ("--search.n_simulations=-1", ["search.n_simulations must be positive, got -1"]),
        ("--search.exploration=nan", ["search.exploration", "nan"]),
        ("--search.discount=2", ["search.discount must be in [0, 1], got 2.0"]),
        ("--search.granularity=word", ["--search.granularity", "'word'", "sentence"]),
        ("--replay.replay_fraction=1", ["replay.replay_fraction"]),
        ("--replay.hardest_fraction=nan", ["replay.hardest_fraction", "nan"]),
        ("--warmup.learning_rate=0", ["warmup.learning_rate must be positive, got 0.0"]),
        ("--warmup.learning_rate=inf", ["warmup.learning_rate", "inf"]),
        ("--warmup.batch_size=0", ["warmup.batch_size must be positive, got 0"]),
        ("--preference.epochs=0", ["preference.epochs must be positive, got 0"]),
        ("--preference.beta=-1", ["preference.beta", "-1"]),
        ("--preference.beta=nan", ["preference.beta", "nan"]),
        ("--preference.loss=mse", ["--preference.loss", "'mse'", "dpo"]),
        ("--pairs.min_q_gap=nan", ["pairs.min_q_gap", "nan"]),
        ("--lora.rank=-1", ["lora.rank must not be negative, got -1"]),
        ("--mesh.fsdp=0", ["mesh.fsdp must be at least 1, got 0"]),
        ("--lora.alpha=inf", ["lora.alpha", "inf"]),
        ("--generate.temperature=nan", ["generate.temperature", "nan"]),
        ("--generate.max_tokens=0", ["generate.max_tokens must be positive, got 0"]),
        ("--evaluate.limit=-1", ["evaluate.limit must not be negative, got -1"]),
        ("--generated.train=0", ["generated.train", "0"]),
        ("--samples.targets=some", ["--samples.targets", "'some'", "after_user"]),
        ("--samples.test_share=1", ["samples.test_share must be in [0, 1), got 1.0"]),
        ("--samples.validation_share=-0.1", ["samples.validation_share must be in [0, 1), got -0.1"]),
        ("--samples.test_file=", ["samples.test_file must not be empty"]),
        ("--samples.fraction=0", ["samples.fraction must be in (0, 1], got 0.0"]),
        ("--samples.limit=-1", ["samples.limit must not be negative, got -1"]),
        ("--iterations=-1", ["iterations must not be negative, got -1"]),
        ("--iteration=0", ["iteration must be positive, got 0"]),
        ("--seed=-1", ["seed must be from 0", "-1"]),
        ("--seed=99999999999999999999", ["seed must be from 0", "99999999999999999999"]),
        ("--output=x.jsonl", ["output", "score, generate, export and plan", "iterate"]),
        ("--overwrite", ["overwrite is only for stage export, got stage iterate"]),
        ("--preference.control=half", ["--preference.control", "'half'", "swapped"]),
        ("--warmup.epochs=some", ["--warmup.epochs", "some"]),
        ("--dtype=float16", ["--dtype", "'float16'", "float32"]),
    ],
)
def test_a_bad_argument_is_refused_in_one_line_that_names_it(argument: str, words: list[str]):
    line = refused("--stage=iterate", argument)
    assert [word for word in words if word not in line] == []


@pytest.mark.parametrize(("change", "word"), [("--lora.rank=0", "lora.rank=0"), ("--quantize=nf4", "quantize=none")])
def test_adapters_that_cannot_be_merged_are_refused(change: str, word: str):
    line = refused("--stage=iterate", "--model=m", "--preference.merge", change)
    assert line.startswith("preference.merge ")
    assert word in line


def test_a_missing_stage_is_named_with_its_choices():
    line = refused("--seed=1")
    assert line.startswith("--stage is required; choose one of iterate, warmup, ")


def test_the_order_of_arguments_does_not_matter_to_an_error():
    assert refused("--search.breadth=0", "--stage=iterate") == refused("--stage=iterate", "--search.breadth=0")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("search: {breadht: 3}\n", ["unknown setting search.breadht", "--help"]),
        ("serach: {breadth: 3}\n", ["unknown setting serach.breadth"]),
        ("search: 3\n", ["unknown setting search;"]),
        ("seed: [1\n", ["is not valid YAML"]),
        ("seed\n", ["must contain settings"]),
        ("", ["must contain settings"]),
        ("seed: one\n", ["--seed", "'one'"]),
        ("search: {breadth: 0}\n", ["search.breadth must be positive, got 0"]),
        ("preference: {beta: .nan}\n", ["preference.beta", "nan"]),
        ("stage: walk\n", ["--stage", "'walk'"]),
        ("\x00", ["is not valid YAML"]),
    ],
)
def test_a_bad_file_is_refused_in_one_line_that_names_it(tmp_path: Path, text: str, words: list[str]):
    path = write(tmp_path / "c.yaml", text)
    line = refused("--stage=iterate", f"--config={path}")
    assert line.startswith(str(path))
    assert [word for word in words if word not in line] == []


def test_a_file_that_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "c.yaml").write_bytes(b"seed: \xff\xfe\n")
    assert str(tmp_path / "c.yaml") in refused("--stage=iterate", f"--config={tmp_path / 'c.yaml'}")


def test_the_paper_is_another_name_of_its_first_reading():
    first, other = (settings.parse(["--stage=iterate", f"--config={name}"]) for name in ("paper_v1", "paper"))
    assert dataclasses.replace(other, config="paper_v1") == first


def test_an_unknown_config_is_refused_with_the_known_ones():
    line = refused("--stage=iterate", "--config=dmeo")
    assert line == "config 'dmeo' not found; presets: " + ", ".join(
        sorted(str(p.relative_to(REPOSITORY / "configs").with_suffix("")) for p in CONFIGS)
    )


def test_a_file_may_hold_what_only_one_stage_takes(tmp_path: Path):
    path = write(tmp_path / "c.yaml", "overwrite: true\noutput: x\n")
    config = settings.parse(["--stage=export", f"--config={path}"])
    assert (config.overwrite, config.output) == (True, Path("x"))
    assert "got stage warmup" in refused("--stage=warmup", f"--config={path}")


# The run directory ------------------------------------------------------------------------------------------


def started(tmp_path: Path, *changes: str) -> Config:
    """The settings of a run in `tmp_path / "run"`."""
    return settings.parse(["--stage=iterate", "--model=m", f"--run_dir={tmp_path / 'run'}", *changes])


def make_run(tmp_path: Path) -> Path:
    """A run directory in which something has been computed."""
    run_directory.save_or_check(started(tmp_path))
    (tmp_path / "run/base").mkdir()
    (tmp_path / "run/base/evaluation.jsonl").touch()
    return tmp_path / "run/config.yaml"


def test_all_settings_are_saved_by_their_names(tmp_path: Path):
    saved = yaml.safe_load(make_run(tmp_path).read_text())
    assert saved == started(tmp_path).flat()
    assert saved["search.n_simulations"] == 16
    assert [path.name for path in (tmp_path / "run").iterdir() if path.is_file()] == ["config.yaml"]


@pytest.mark.parametrize(
    "change",
    ["--seed=1", "--search.breadth=2", "--data=d", "--preference.sft_weight=1", "--generate.max_tokens=3"],
)
def test_a_run_directory_of_other_settings_is_refused(tmp_path: Path, change: str):
    saved = make_run(tmp_path)
    before = saved.read_bytes()
    name, value = change[2:].split("=")
    with pytest.raises(
        ValueError, match=rf"^run directory .*run was created with {name}=.*, but it is now {value}.*--run_dir"
    ):
        run_directory.save_or_check(started(tmp_path, change))
    assert saved.read_bytes() == before


def test_a_setting_belongs_to_the_recipe_or_to_the_runtime():
    config = Config(stage="iterate")
    recipe, runtime = config.flat(Recipe), config.flat(Runtime)
    assert recipe.keys() & runtime.keys() == set()
    assert recipe | runtime == config.flat()


@pytest.mark.parametrize("part", [TrainingRuntime(), GenerateRuntime(), WarmupRecipe(), PreferenceRecipe(), Recipe()])
def test_a_part_of_the_settings_checks_itself(part: Any):
    name, bad = {
        TrainingRuntime: ("checkpoint_every", -1),
        GenerateRuntime: ("temperature", -1.0),
        WarmupRecipe: ("pack", -1),
        PreferenceRecipe: ("beta", -1.0),
        Recipe: ("seed", -1),
    }[type(part)]
    with pytest.raises(ValueError, match=rf"{name} must .*, got {bad}"):
        dataclasses.replace(part, **{name: bad})


def test_exactly_the_settings_that_define_a_run_bind_its_directory(tmp_path: Path):
    binding = run_directory.binding_settings(started(tmp_path))
    assert list(binding) == [section + name for section, names in BINDING.items() for name in names]


def test_the_config_of_a_run_that_was_moved_names_its_new_place(tmp_path: Path):
    saved = make_run(tmp_path)
    (saved.parent / "environment.json").write_text("{}")
    moved = saved.parent.rename(tmp_path / "moved") / "config.yaml"
    assert settings.parse(["--stage=export", f"--config={moved}"]).run_dir == moved.parent
    assert settings.parse(["--stage=export", f"--config={moved}", "--run_dir=other"]).run_dir == Path("other")


def test_the_config_of_a_run_serves_every_stage_and_may_lie_anywhere(tmp_path: Path):
    (tmp_path / "demo,ablations").mkdir()
    saved = write(tmp_path / "demo,ablations/ipo.yaml", "benchmark: bfcl\ncategories: [simple, multiple]\nseed: 5\n")
    configs = {stage: settings.parse([f"--stage={stage}", f"--config={saved}"]) for stage in get_args(settings.Stage)}
    assert {config.seed for config in configs.values()} == {5}
    asked = {stage for stage, config in configs.items() if config.benchmark and config.categories}
    assert asked == {"iterate", "evaluate", "export", "plan", "doctor"}
    with pytest.raises(ValueError, match="benchmark is only for stages evaluate and iterate"):
        settings.parse(["--stage=score", "--benchmark=bfcl"])


@pytest.mark.parametrize(("name", "values"), settings.ONCE_TRUE_OR_FALSE.items())
def test_what_was_once_true_or_false_is_still_understood(tmp_path: Path, name: str, values: dict[bool, str]):
    section, _, last = name.rpartition(".")
    flags = {True: [f"--{name}", f"--{name.replace('_', '-')}"], False: [f"--{section}.no-{last}"]}
    for value, now in values.items():
        path = write(tmp_path / f"{value}.yaml", f"{name}: {str(value).lower()}\n")
        for given in (*flags[value], f"--config={path}", f"--{name}={now}"):
            assert started(tmp_path, given).flat()[name] == now
            assert started(tmp_path, given, "--seed=3").flat()[name] == now
        config = started(tmp_path, f"--run_dir={tmp_path / last / now}", f"--{name}", now)
        run_directory.save_or_check(config)
        saved = config.run_dir / "config.yaml"
        (config.run_dir / "base").mkdir()
        (config.run_dir / "base/evaluation.jsonl").touch()
        saved.write_text(yaml.safe_dump(yaml.safe_load(saved.read_text()) | {name: value}))
        assert run_directory.check(config)
        other = started(tmp_path, f"--run_dir={config.run_dir}", f"--{name}={values[not value]}")
        with pytest.raises(ValueError, match=f"was created with {name}={value}, but it is now {values[not value]}"):
            run_directory.check(other)


def test_a_run_that_goes_on_to_more_iterations_says_so(tmp_path: Path):
    saved = make_run(tmp_path)
    run_directory.save_or_check(started(tmp_path, "--stage=search", "--iterations=7"))
    assert "iterations: 7" not in saved.read_text()
    run_directory.save_or_check(started(tmp_path, "--iterations=7"))
    assert "iterations: 7" in saved.read_text()


def test_a_home_that_the_shell_left_alone_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "c.yaml", "data: ~/d.jsonl\n")
    config = settings.parse(["--stage=iterate", "--config=~/c.yaml", "--run_dir=~/runs/a", "--model=a~/b"])
    assert (config.data, config.run_dir) == (f"{tmp_path}/d.jsonl", tmp_path / "runs/a")
    assert config.model == "a~/b"


def test_what_is_for_one_command_alone_is_not_saved(tmp_path: Path):
    (tmp_path / "run").mkdir()
    run_directory.save_or_check(started(tmp_path, "--stage=export", "--overwrite", f"--output={tmp_path / 'model'}"))
    again = settings.parse(["--stage=warmup", f"--config={tmp_path / 'run/config.yaml'}"])
    assert (again.overwrite, again.output) == (False, None)


def test_benchmarks_are_saved_and_read_again(tmp_path: Path):
    for given in ([], ["a", "b"]):
        run_directory.save_or_check(started(tmp_path, "--evaluate.benchmarks", *given))
        again = settings.parse(["--stage=warmup", f"--config={tmp_path / 'run/config.yaml'}", "--seed=0"])
        assert again.evaluate.benchmarks == tuple(given)


@pytest.mark.parametrize(
    "change",
    ["--iteration=2", "--evaluate.limit=7", "--evaluate.benchmarks=b.jsonl", "--stage=search"],
)
def test_settings_that_change_no_earlier_result_are_free(tmp_path: Path, change: str):
    saved = make_run(tmp_path)
    before = saved.read_bytes()
    run_directory.save_or_check(started(tmp_path, change))
    assert saved.read_bytes() == before


def test_a_command_that_computed_nothing_binds_nobody(tmp_path: Path):
    run_directory.save_or_check(started(tmp_path, "--seed=1"))
    run_directory.save_or_check(started(tmp_path, "--seed=2"))
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["seed"] == 2


@pytest.mark.parametrize(
    "damage", [b"seed: [", b"", b"just text", b"\xff\xfe", b"- 1\n", b"seed: 0\n"], ids=lambda damage: repr(damage)
)
def test_a_damaged_config_is_refused_by_name(tmp_path: Path, damage: bytes):
    saved = make_run(tmp_path)
    saved.write_bytes(damage)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(saved))} is damaged.*choose another --run_dir") as caught:
        run_directory.save_or_check(started(tmp_path))
    assert "\n" not in str(caught.value)
    assert saved.read_bytes() == damage


@pytest.mark.parametrize("stage", ["score", "generate"])
def test_a_file_of_its_own_needs_no_run_directory(tmp_path: Path, stage: str):
    output = tmp_path / "new/folder/out.jsonl"
    arguments = [f"--stage={stage}", "--data=d", f"--output={output}", f"--run_dir={tmp_path / 'run'}"]
    run_directory.save_or_check(settings.parse(arguments))
    assert output.parent.is_dir()
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_folder_is_refused_before_any_work(tmp_path: Path):
    config = settings.parse(["--stage=score", "--data=d", f"--output={tmp_path}"])
    with pytest.raises(ValueError, match=f"^output {re.escape(str(tmp_path))} is a folder"):
        run_directory.save_or_check(config)
