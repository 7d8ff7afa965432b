"""What all tests share: the compilation cache, checks of array shapes, the folder of public data, and a finished run.

In: the environment variables ITOOL_SHARED (public data, default `../shared`), JAX_COMPILATION_CACHE_DIR, and
ITOOL_TYPECHECK=1, which checks every annotation of the package while tests run.
Out: `shared_path`, which finds a file of the public data or skips the test, and the fixtures.
"""

import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import pytest
from filelock import FileLock

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

if os.environ.get("ITOOL_TYPECHECK") == "1":  # slow; it must come before the first import of the package
    from beartype import BeartypeConf, beartype
    from jaxtyping import install_import_hook

    typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int passes for a float, as in PEP 484
    install_import_hook("itool_jax", "tests.conftest.typecheck")

# Tests compile much and compute little.
FAST_COMPILER = "--xla_backend_optimization_level=0"
# Eight devices of the host, for tests of meshes; everything else uses the first.
os.environ["XLA_FLAGS"] = " ".join(
    [os.environ.get("XLA_FLAGS", ""), FAST_COMPILER, "--xla_force_host_platform_device_count=8"]
)

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    user_cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(user_cache / "itool_jax" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts a file that needs the finished run first and the other such files last, so that no worker waits for it."""
    files = list(dict.fromkeys(item.path for item in items if "made" in getattr(item, "fixturenames", ())))
    items.sort(key=lambda item: (item.path in files) - 2 * (item.path in files[:1]))


def shared_path(relative: str) -> pathlib.Path:
    """The path of `relative` in the folder of public data; skips the calling test where it is absent."""
    folder = pathlib.Path(os.environ.get("ITOOL_SHARED") or REPOSITORY.parent / "shared")
    path = folder / relative
    if not path.exists():
        pytest.skip(f"needs {relative} of the public data: set ITOOL_SHARED to the folder that holds it")
    return path


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: pathlib.Path, rows: Iterable[dict[str, Any]]) -> pathlib.Path:
    """Writes a JSONL file and returns its path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def file(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
    """Writes rows to a new JSONL file and returns its path."""
    numbers = itertools.count()

    def write_rows(*rows: dict[str, Any]) -> pathlib.Path:
        return write(tmp_path / f"data{next(numbers)}.jsonl", rows)

    return write_rows


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A complete model folder: two layers, random weights, a byte tokenizer with a chat template."""
    from tests import tiny  # it imports the package, which the hook above must see first

    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module", autouse=True)
def _programs_of_the_module() -> Iterator[None]:
    """Compiled programs are let go after each module: each takes pieces of memory, of which a process has 65,530."""
    yield
    jax.clear_caches()


@contextlib.contextmanager
def keep_jax_settings() -> Iterator[None]:
    """What `main` sets for the whole process does not reach other tests."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_default_matmul_precision")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def restored_jax_settings() -> Iterator[None]:
    """Settings of jax are what they were once the module's tests are through."""
    with keep_jax_settings():
        yield


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A finished run of a tiny model, and what it was made from; tests change copies only.

    The first worker that needs it makes it for all.
    """
    from tests import runs

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made"
    with FileLock(f"{folder}.lock"), keep_jax_settings():
        return runs.make_or_read(folder)
