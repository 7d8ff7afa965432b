"""What the package's own code never does: run text as code, unpickle, start a shell, trust a model's code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

WORKER = "itool_jax/evaluation/bfcl/worker.py"
"""The confined child, which runs the official scorer, and that evaluates."""

FORBIDDEN_MODULES = ("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve")
FORBIDDEN_CALLS = ("eval", "exec", "os.system", "os.popen")


def offences(tree: ast.AST) -> Iterator[str]:
    """What a module does that it should not, with the line."""
    for node in ast.walk(tree):
        for offence in (*_imports(node), *_calls(node)):
            yield f"line {getattr(node, 'lineno', 0)}: {offence}"


def _imports(node: ast.AST) -> Iterator[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    if isinstance(node, ast.ImportFrom):
        names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    for name in names:
        if name.split(".")[0] in FORBIDDEN_MODULES or name in FORBIDDEN_CALLS:
            yield name


def _calls(node: ast.AST) -> Iterator[str]:
    if not isinstance(node, ast.Call):
        return
    name = ast.unparse(node.func)
    if name.removeprefix("builtins.") in FORBIDDEN_CALLS:
        yield name
    if name in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load"):
        yield f"{name}, where yaml.safe_load is meant"
    for keyword in node.keywords:
        false = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        if keyword.arg in ("shell", "trust_remote_code", "allow_pickle") and not false:
            yield f"{name}({keyword.arg}=…)"


MODULES = sorted((REPOSITORY / "itool_jax").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(REPOSITORY)) for path in MODULES])
def test_a_module_runs_nothing_that_it_reads(path: Path):
    if str(path.relative_to(REPOSITORY)) != WORKER:
        assert list(offences(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "code",
    [
        *("eval('1')", "exec(x)", "builtins.eval(x)", "os.system('ls')", "import pickle", "from pickle import loads"),
        *("from os import system", "subprocess.run(x, shell=True)", "yaml.load(x)", "yaml.unsafe_load(x)"),
        *("AutoTokenizer.from_pretrained(x, trust_remote_code=True)", "np.load(x, allow_pickle=flag)"),
    ],
)
def test_each_of_these_is_seen(code: str):
    assert len(list(offences(ast.parse(code)))) >= 1


@pytest.mark.parametrize(
    "code", ["yaml.safe_load(x)", "f(trust_remote_code=False)", "model.eval()", "ast.literal_eval(x)"]
)
def test_what_is_harmless_is_not(code: str):
    assert list(offences(ast.parse(code))) == []
