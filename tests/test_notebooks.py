"""The notebooks: stripped, short, and they run; the walk-through stops where an install loses the accelerator."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FAST_COMPILER, REPOSITORY
from tests.runs import ITERATIONS, Made, copy_run

FOLDER = REPOSITORY / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LONGEST = 220
"""Lines of code that one may have."""


def cells(path: Path, kind: str = "code") -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def execute(path: Path, folder: Path, **environment: str) -> list[dict[str, Any]]:
    """Runs a notebook in a folder as Jupyter would; the outputs of its cells. An error in a cell is raised."""
    nbformat = pytest.importorskip("nbformat", reason="needs: pip install -e '.[notebooks]'")
    nbclient = pytest.importorskip("nbclient", reason="needs: pip install -e '.[notebooks]'")
    notebook = nbformat.read(path, as_version=4)
    python_path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    own = {
        "PYTHONPATH": python_path,
        "XLA_FLAGS": FAST_COMPILER,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    client = nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | own | environment)
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def printed(outputs: list[dict[str, Any]]) -> str:
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


def images(outputs: list[dict[str, Any]]) -> list[str]:
    return [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stripped_and_short(path: Path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"].keys() <= {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    for cell in notebook["cells"]:
        assert not cell["metadata"]
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
    assert sum(len(source(cell).splitlines()) for cell in cells(path)) <= LONGEST


LOST = [
    ("gpu | Tesla T4", "cpu | cpu", "broke jax's accelerator support"),
    ("tpu | TPU v5 lite", "cpu | cpu", "broke jax's accelerator support"),
    ("gpu | Tesla T4", "none | RuntimeError: jaxlib is older than jax", "broke jax's accelerator support"),
    ("cpu | cpu", "none | ImportError", "broke jax's accelerator support"),
    ("none | no module jax", "cpu | cpu", "finds no accelerator"),
]


@pytest.mark.parametrize(("before", "after", "complaint"), LOST)
def test_an_install_that_loses_the_accelerator_stops_the_walkthrough(before: str, after: str, complaint: str):
    (check,) = [source(cell) for cell in cells(FOLDER / "walkthrough.ipynb") if "broke jax" in source(cell)]
    names = {"before": before, "extra": "cuda12", "jax_device": lambda: after}
    with pytest.raises(RuntimeError, match=complaint):
        exec(check, names)


@pytest.mark.parametrize("device", ["gpu | Tesla T4", "tpu | TPU v5 lite", "cpu | cpu"])
def test_an_install_that_keeps_it_does_not(device: str):
    (check,) = [source(cell) for cell in cells(FOLDER / "walkthrough.ipynb") if "broke jax" in source(cell)]
    names = {"before": device, "extra": None, "jax_device": lambda: device}
    exec(check, names)
    assert names["platform"] == device.split(" | ")[0]


@pytest.mark.notebook
def test_the_results_browser_shows_a_run(made: Made, tmp_path: Path):
    folder = copy_run(made, tmp_path)
    outputs = execute(FOLDER / "results.ipynb", tmp_path, ITOOL_RUN=str(folder))
    text = printed(outputs)
    assert "base, warmup, iteration_1, iteration_2, evaluated on test_all" in text
    assert "8 trees, most pairs first" in text
    assert re.search(rf"from base to iteration_{ITERATIONS}: \d+ fixed, \d+ regressed, of 15\n", text)
    assert len(images(outputs)) == 4  # accuracy, curves, a tree, the pairs


@pytest.mark.notebook
def test_the_results_browser_shows_a_run_that_has_only_begun(made: Made, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("evaluation_test_all.json", "evaluation_test_all.jsonl"):
        (folder / "base").mkdir(exist_ok=True)
        (folder / "base" / name).write_bytes((made.folder / "base" / name).read_bytes())
    outputs = execute(FOLDER / "results.ipynb", tmp_path, ITOOL_RUN=str(folder))
    assert "base, evaluated on test_all" in printed(outputs)
    assert len(images(outputs)) == 1


SMALLEST = (
    "--iterations=1 --generated.train=60 --generated.validation=10 --generated.test=10 --evaluate.limit=10 "
    "--replay.select=perplexity --replay.replay_fraction=0.3 --replay.hardest_fraction=0.3 --search.n_simulations=2 "
    "--search.max_step_tokens=24 "
    "--search.max_last_step_tokens=40 --search.batch=4 --generate.max_tokens=40 --preference.epochs=1"
)


@pytest.mark.notebook
def test_the_walkthrough_runs_on_the_embedded_model(tmp_path: Path):
    text = printed(execute(FOLDER / "walkthrough.ipynb", tmp_path, ITOOL_SIZE=SMALLEST))
    for line in (
        "after: cpu",
        "gold: ",
        "N=",
        "wrote the weights of iteration_1 to model",
        "answered",
        "skipped: this needs",
    ):
        assert line in text
    assert (tmp_path / "model/model.safetensors").is_file()
