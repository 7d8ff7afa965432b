"""What the documentation shows is there: files and names that it links to, settings, and commands that parse."""

import re
import shlex

import pytest

from docs.hooks import settings_page, sources
from itool_jax.config import Config, parse
from tests.conftest import REPOSITORY

PAGES = sorted(
    str(path.relative_to(REPOSITORY)) for pattern in ("*.md", "docs/*.md") for path in REPOSITORY.glob(pattern)
)
PROGRAM = "-m itool_jax.main "
STAGE = "--stage=iterate"
SCRIPTS = ("launch/laptop.sh", "launch/slurm.sh")
SETTINGS = REPOSITORY / "configs/smoke.yaml"


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def commands(page: str) -> list[str]:
    """The command lines of our program in a page's blocks of shell, and of the launchers, which pass theirs on."""
    blocks = re.findall(r"^```(?:bash|console|sh)\n(.*?)^```", text_of(page), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    shown = [f"{STAGE} {line.split(script, 1)[1]}" for line in lines for script in SCRIPTS if script in line]
    return shown + [part.split(PROGRAM, 1)[1] for line in lines for part in line.split("&&") if PROGRAM in part]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_to_names_in_them(page: str) -> None:
    assert sources.faults(text_of(page), page) == []


def test_equations_are_linked_to_the_code_that_computes_them() -> None:
    linked = {(link.path, link.name) for link in sources.links(text_of("docs/method.md"), "docs/method.md")}
    for path, name in [
        ("itool_jax/model/log_probs.py", "perplexity"),
        ("itool_jax/mcts/tree.py", "puct"),
        ("itool_jax/mcts/value.py", "confidence"),
        ("itool_jax/mcts/tree.py", "backup"),
        ("itool_jax/training/losses.py", "dpo"),
    ]:
        assert (path, name) in linked


def test_a_link_to_nothing_is_found() -> None:
    text = (
        "[a](../itool_jax/training/losses.py#dpo) [b](../itool_jax/training/losses.py#walk) [c](none.md) `[d](no.md)`"
    )
    assert sources.faults(text, "docs/x.md") == [
        "docs/x.md: itool_jax/training/losses.py defines no walk",
        "docs/x.md: docs/none.md is no file",
    ]


def test_links_in_the_site_lead_to_the_line_of_the_definition() -> None:
    line = sources.definitions("itool_jax/training/losses.py")["LossSettings.resolved_beta"]
    assert "def resolved_beta" in text_of("itool_jax/training/losses.py").splitlines()[line - 1]
    text = sources.rewritten("[b](../itool_jax/training/losses.py#LossSettings.resolved_beta)", "docs/x.md")
    assert text == f"[b](source/itool_jax/training/losses.py.md#__codelineno-0-{line})"
    assert sources.rewritten("[x](../docs/faq.md#a)", "benchmarks/RESULTS.md") == "[x](../../faq.md#a)"


def arguments_of(command: str) -> list[str]:
    """Its arguments; files of settings that runs write stand for any."""
    line = re.split(r"\s\d?[>|&;]", command)[0]
    line = line.replace('"', "") if line.count('"') % 2 else line  # of a command within another's quotes
    arguments = [part for part in shlex.split(line, comments=True) if not part.startswith("$")]
    return [f"--config={SETTINGS}" if re.fullmatch("--config=.*[.]yaml", part) else part for part in arguments]


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(page: str) -> None:
    for command in commands(page):
        arguments = arguments_of(command)
        if not {"...", "…", "--help"} & set(arguments):
            assert f"--stage={parse(arguments).stage}" in arguments


def test_arguments_are_those_that_the_program_gets() -> None:
    line = '--stage=export --config=runs/x/config.yaml "$@" --output="A B" 2> log.txt  # a note'
    assert arguments_of(line) == ["--stage=export", f"--config={SETTINGS}", "--output=A B"]


def test_commands_are_found() -> None:
    assert [line.split()[0] for line in commands("docs/your-data.md")] == [
        "--stage=score",
        "--stage=iterate",
        "--stage=dpo",
    ]


def test_page_of_settings_holds_each_with_default_and_help() -> None:
    page = settings_page.page()
    for name, value in Config(stage="iterate").flat().items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `--{name}` |"))
        _, _, kind, default, text, _ = (cell.strip() for cell in row.split("|"))
        shown = " ".join(value) if isinstance(value, list) else value
        assert default == ("must be given" if name == "stage" else f"`{shown}`" if shown not in (None, "") else "none")
        assert re.fullmatch(r"<code>[^<>]+</code>", kind)
        assert len(text) > 10
