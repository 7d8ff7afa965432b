"""Laws of the code that an import contract cannot state, read from the syntax trees."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "itool_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))
CHANGES = {"append", "add", "update", "pop", "popitem", "clear", "setdefault", "extend", "insert", "remove", "discard"}
PROCESS_WIDE = "system"
"""The room of what a process has one of: its log, its trackers, its request to stop, its place among others."""
REGISTRIES = {"evaluation/bfcl/worker.py": {"COMMANDS"}}
"""Filled by a decorator while the module is imported, and only read then."""
WITHOUT_RUNS = ("mcts", "training", "inference", "model", "data", "text", "system")
"""Rooms that know nothing of run directories."""


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def module_names(tree: ast.Module) -> set[str]:
    """Names that are assigned at the top level of a module."""
    targets = [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def changed_names(tree: ast.Module) -> Iterator[str]:
    """Names whose value some statement changes in place: an entry, an attribute, or by a method that does so."""
    for node in ast.walk(tree):
        match node:
            case ast.Subscript(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                yield name
            case ast.Attribute(value=ast.Name(id=name), ctx=ast.Store() | ast.Del()):
                yield name
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=method)) if method in CHANGES:
                yield name


def local_names(tree: ast.Module) -> set[str]:
    """Names that functions bind for themselves, which hide a module's."""
    bound = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    stores = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.Name)]
    return bound | {node.id for node in stores if isinstance(node.ctx, ast.Store)}


def changed_state(source: str) -> set[str]:
    tree = ast.parse(source)
    return (module_names(tree) & set(changed_names(tree))) - local_names(tree)


@pytest.mark.parametrize("path", [p for p in MODULES if not name_of(p).startswith(PROCESS_WIDE)], ids=name_of)
def test_only_the_system_room_has_state_at_module_level(path: Path) -> None:
    assert changed_state(path.read_text()) <= REGISTRIES.get(name_of(path), set())


@pytest.mark.parametrize("change", ["x['a'] = 1", "x.a = 1", "del x['a']", "x.update(a=1)", "x['a'] += 1"])
def test_changed_state_is_found(change: str) -> None:
    assert changed_state(f"x = {{}}\ndef f():\n    {change}") == {"x"}
    assert changed_state(f"x = {{}}\ndef f(x):\n    {change}") == set()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_function_rebinds_a_module_level_name(path: Path) -> None:
    assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Global)]


@pytest.mark.parametrize("path", [p for p in MODULES if name_of(p).startswith(WITHOUT_RUNS)], ids=name_of)
def test_the_science_knows_no_run_directory(path: Path) -> None:
    nodes = ast.walk(ast.parse(path.read_text()))
    assert not [node for node in nodes if isinstance(node, ast.Attribute) and node.attr == "run_dir"]
