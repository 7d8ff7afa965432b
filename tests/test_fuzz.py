"""Hostile input: every reader gives a result or one clear error, in bounded time and memory, and executes nothing.

The targets are those of `python -m benchmarks.fuzz`, which draws for hours what is drawn here for a second each; below
them stand the inputs that once broke something, or that an attacker would try first.
"""

import contextlib
import gzip
import json
import resource
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import fuzz_targets
from itool_jax import config
from itool_jax.data import benchmarks, formats, rows, schemas, sources
from itool_jax.evaluation.bfcl import checker as bfcl
from itool_jax.evaluation.bfcl import reader as bfcl_read
from itool_jax.model import hf
from itool_jax.store.cache import read_figures
from itool_jax.store.columns import read_table
from itool_jax.store.paths import done_file
from itool_jax.store.tables import EvaluationRow, NodeRow, PreferenceRow, ReferenceRow, ScoreRow, TreeRow
from itool_jax.system import messages, untrusted
from itool_jax.text import chat
from itool_jax.text.sample import Sample
from tests import tiny
from tests.conftest import write

EXAMPLES = {"config_file": 20, "weights": 40, "index": 40, "tokenizer": 60, "template": 100, "samples": 60}
SECONDS, MEGABYTES = 20.0, 1500


@st.composite
def inputs(draw: st.DrawFn, target: fuzz_targets.Target) -> bytes:
    """A seed of the target with up to six places replaced by pieces, repeated, or by any bytes."""
    data = bytearray(draw(st.sampled_from(target.seeds)))
    for _ in range(draw(st.integers(0, 6))):
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.sampled_from((0, 0, 1, 2, 10, 100))))
        piece = draw(st.one_of(st.sampled_from(target.pieces), st.binary(max_size=4)))
        data[begin:end] = piece * draw(st.sampled_from((1, 1, 1, 2, 60)))
    return bytes(data)


@pytest.mark.parametrize("name", fuzz_targets.TARGETS)
def test_any_input_gives_a_result_or_an_error_that_names_its_file(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(messages.console, "quiet", True)
    target = fuzz_targets.TARGETS[name]
    target.run(target.seeds[0])  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=EXAMPLES.get(name, 300),
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(target))
    def check(data: bytes) -> None:
        start = time.monotonic()
        target.run(data)
        assert time.monotonic() - start < SECONDS

    check()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES << 10


# Time ---------------------------------------------------------------------------------------------------------

N = 300_000


def _conversation(text: str) -> dict[str, Any]:
    return {"conversations": [{"from": "system", "value": text}, {"from": "user", "value": "q"}]}


@pytest.mark.parametrize(
    "read",
    [
        lambda: schemas.tools_inside("[{" * (N // 2)),
        lambda: schemas.tools_inside("[{'a': 1}," * (N // 10) + "]"),
        lambda: schemas.json_type("List[" * (N // 5)),
        lambda: formats.from_toolace({"system": " " * N, "conversations": []}, "all"),
        lambda: formats.from_toolrl({"instruction": "**Available Tools**", "input": "<user>" * (N // 6), "output": ""}),
        lambda: formats.from_toolrl(
            {"instruction": "**Available Tools**\n1. Name: " + "\nDescription: " * (N // 14), "input": "", "output": ""}
        ),
        lambda: formats._toolbench_answer("Thought: " + "Action: x " * (N // 10)),
        lambda: formats._toolbench_answer("Thought: " + "Action: x\n" * (N // 10)),
        lambda: formats.from_glaive(
            {"system": "{} " * (N // 3), "chat": "USER: q\n\nASSISTANT: <functioncall>" + '"arguments":\'' * (N // 13)},
            "all",
        ),
        lambda: benchmarks.from_api_bank({"input": "\nUser: q", "output": "a" * N}),
        lambda: benchmarks.from_api_bank({"input": "\nUser: q" + "\nx" * (N // 2), "output": "[f()]"}),
        lambda: formats.samples_from_conversation("c", [{"role": "user", "content": "q"}] * N, (), "all"),
        lambda: sources._distinct([Sample(id="a", messages=()) for _ in range(N // 10)]),
        lambda: bfcl_read.read_response("a." * 50_000 + "f()", "Python"),
    ],
)
def test_reading_takes_linear_time(read: Callable[[], Any]):
    """Each of these took quadratic time or memory once, or would: minutes where it takes a second."""
    start = time.monotonic()
    with contextlib.suppress(ValueError):
        read()
    assert time.monotonic() - start < 15


# Files of data ------------------------------------------------------------------------------------------------


def refused(read: Callable[[], Any], *words: str) -> str:
    """The one line that something is refused with."""
    with pytest.raises((ValueError, OSError)) as caught:
        read()
    line = config.describe_error(caught.value)
    assert "\n" not in line
    assert [word for word in words if word not in line] == []
    return line


def test_a_small_file_of_many_zeros_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rows, "SMALL", 10 << 20)
    path = tmp_path / "d.jsonl.gz"
    with gzip.open(path, "wb") as file:
        for _ in range(200):
            file.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 18
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: list(rows.read_rows(path)), f"{path} decompresses to more than 19 MB, far more than its size")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10


def test_a_value_that_stands_in_all_rows_of_a_table_is_not_copied_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(rows, "SMALL", 10 << 20)
    path = tmp_path / "d.parquet"
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, pyarrow.int32()), ["x" * 10_000])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column.cast(pyarrow.large_string())}), path)
    assert path.stat().st_size < 100_000
    refused(lambda: sources.load(path), f"{path} decompresses to more than", "far more than its size")


@pytest.mark.parametrize("text", ['"\\ud800"', '"a\\udc00b"'])
def test_half_a_character_is_refused_with_its_row(tmp_path: Path, tiny_folder: Path, text: str):
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"id": "s", "messages": [{{"role": "user", "content": {text}}}], "target": "t"}}\n')
    [sample] = sources.load(path)
    tokenizer = chat.Chat(chat.load_tokenizer(str(tiny_folder)))
    line = refused(lambda: chat.encode_sample(tokenizer, sample), "sample s: tokenizer of", "cannot encode the text")
    assert line.encode()  # half a character in it could not be printed


@pytest.mark.parametrize("depth", [150, 500, 900, 990, 5000])
def test_deep_nesting_is_refused_by_every_reader(tmp_path: Path, depth: int):
    deep = "[" * depth + "]" * depth
    tools = f'[{{"name": "f", "parameters": {{"a": {{"enum": {deep}}}}}}}]'
    rows = [
        f'{{"id": "s", "messages": [{{"role": "user", "content": "q", "more": {deep}}}], "target": "t"}}',
        json.dumps({"query": "q", "tools": tools, "answers": "[]"}),
    ]
    for row in rows:
        path = tmp_path / "d.jsonl"
        path.write_text(row + "\n")
        line = refused(lambda path=path: sources.load(path), f"{path} line 1: ")
        assert "[" * 50 not in line  # a line says where, and does not repeat what stands there


# Models -------------------------------------------------------------------------------------------------------


def test_a_template_reaches_nothing_of_python(tiny_folder: Path):
    own = chat.Chat(chat.load_tokenizer(str(tiny_folder)))
    for text in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context }}{{ self.__init__.__globals__ }}",
        "{{ messages.__class__.__base__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ):
        own.tokenizer.chat_template = text
        line = refused(
            lambda: own.render([tiny.USER], (), add_generation_prompt=True), "cannot render the conversation"
        )
        assert not any(leak in line for leak in ("uid=", "root:", "<class 'object'>"))


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{{ 'x' * 10**15 }}",
        "{{ lipsum(n=10**6) }}",
    ],
)
def test_a_template_takes_bounded_time_and_memory(tiny_folder: Path, text: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 1.0)
    monkeypatch.setattr(chat, "TEMPLATE_BYTES", 200 << 20)
    own = chat.Chat(chat.load_tokenizer(str(tiny_folder)))
    own.tokenizer.chat_template = text
    start = time.monotonic()
    refused(lambda: own.render([tiny.USER], (), add_generation_prompt=True), "cannot render the conversation")
    assert time.monotonic() - start < 10


def test_what_bounds_a_template_leaves_no_timer_behind():
    before = signal.getsignal(signal.SIGALRM)

    def turn() -> None:
        while True:
            pass

    with pytest.raises(untrusted.ExceededError, match="takes more than"), untrusted.bounded(0.3, 1 << 30):
        turn()
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


NORM = {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (2**63, {}),
        (10**9, {}),
        (None, {"a": NORM, "b": NORM}),
        (None, {"a": NORM | {"data_offsets": [-8, 120]}}),
        (None, {"a": NORM | {"data_offsets": [0, 2**60]}}),
        (None, {"a": NORM | {"shape": [2**40, 2**40]}}),
        (None, {"a": NORM | {"shape": [-32]}}),
        (None, {"a": NORM | {"dtype": "F128"}}),
        (None, {"a": 1}),
        (None, []),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, length: int | None, header: Any):
    text = json.dumps(header).encode()
    path = tmp_path / hf.WEIGHTS
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(128))
    tiny.model_config(tmp_path)
    line = refused(lambda: hf.load(tmp_path), f"{path} is not a readable safetensors file")
    assert str(tmp_path) in line
    assert len(line) < 500


def test_an_index_cannot_leave_its_folder(tmp_path: Path):
    home = tmp_path / "model"
    tiny.tiny_checkpoint(tmp_path / "other")
    tiny.model_config(home)
    weights = tmp_path / "other" / hf.WEIGHTS
    (home / "link.safetensors").symlink_to(weights)
    for name in (
        "../other/model.safetensors",
        str(weights),
        "a/../../other/model.safetensors",
        "link.safetensors",
        "a\0",
        "",
    ):
        (home / hf.INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        refused(lambda: hf.load(home), str(home))
    hub = tmp_path / "hub"  # as the hub lays out its cache
    snapshot = tiny.tiny_checkpoint(hub / "snapshots/0a1b")
    (hub / "blobs").mkdir()
    (snapshot / hf.WEIGHTS).rename(hub / "blobs/f00")
    (snapshot / "model-1.safetensors").symlink_to("../../blobs/f00")
    names = list(hf._tensors(tmp_path / "other"))
    (snapshot / hf.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))
    assert hf.load(snapshot)[0].n_layers == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**30},
        {"hidden_size": True},
        {"rms_norm_eps": 10**400},
        {"rope_parameters": {"rope_theta": 10**400}},
        {"layer_types": [[]]},
    ],
)
def test_sizes_that_no_model_has_are_refused_before_shapes_are_made(tmp_path: Path, changes: dict[str, Any]):
    (tmp_path / "config.json").write_text(json.dumps(tiny.raw_config(**changes)))
    line = refused(lambda: hf.read_config(tmp_path, "float32"), f"{tmp_path / 'config.json'}: ")
    assert any(name in line for name in (*changes, "rope_theta"))


# Settings and runs --------------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "search: &a {b: *a}\n",
        "seed: " + "[" * 10_000,
        "a: " * 3,
        "x" * 200_000,
        "seed: !!int ''\n",
        "seed: !!timestamp x\n",
        "seed: !!bool x\n",
        "seed: 2001-99-99\n",
        "seed: " + "1" * 5000 + "\n",
        "seed: !!python/object/apply:os.system [id]\n",
        "categories: [--help]\n",
        "? [a]\n: 1\n",
    ],
    ids=range(13),
)
def test_a_hostile_yaml_file_is_refused_in_one_line(tmp_path: Path, text: str):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    start = time.monotonic()
    refused(lambda: config.parse(["--stage=iterate", f"--config={path}"]), str(path))
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a/../../../x"])
def test_a_finished_stage_names_files_of_its_own_folder_only(tmp_path: Path, name: str):
    run = config.Config(stage="iterate", run_dir=tmp_path)
    path = done_file(run.run_dir, "warmup", "warmup")
    path.parent.mkdir()
    path.write_text(json.dumps({"seconds": 1, "outputs": {name: "0"}}))
    line = refused(lambda: read_figures(run.run_dir, "warmup", "warmup"), f"{path} is damaged", "is not in its folder")
    assert name in line


NODE = {"node": 0, "parent": -1, "depth": 0, "text": "", "token_ids": [], "visits": 3, "q": 0.5, "value": 0}
NODE |= {"prior": 1.0, "outcome": 0.0, "confidence": 0.5, "terminal": False, "gold": False}


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        (ScoreRow, {"rank": "first"}, "an integer or null"),
        (ScoreRow, {"rank": True}, "an integer or null"),
        (ScoreRow, {"perplexity": None}, "a number"),
        (ScoreRow, {"id": [1]}, "a string"),
        (PreferenceRow, {"prompt_ids": "abc"}, "a list of token ids"),
        (PreferenceRow, {"prompt_ids": [2**40]}, "a list of token ids"),
        (PreferenceRow, {"node": -1}, "a node number"),
        (EvaluationRow, {"correct": 1}, "true or false"),
        (EvaluationRow, {"categories": ["easy", 1]}, "a list of strings"),
        (ReferenceRow, {"chosen": None}, "a number"),
        (TreeRow, {"nodes": []}, "a list of nodes, each after its parent"),
        (TreeRow, {"nodes": [NODE, NODE]}, "a list of nodes, each after its parent"),
        (TreeRow, {"nodes": [NODE | {"visits": "3"}]}, "a list of nodes, each after its parent"),
    ],
)
def test_a_table_of_wrong_values_is_named_where_it_is_read(
    tmp_path: Path, kind: type[Any], row: dict[str, Any], words: str
):
    path, (key,) = write(tmp_path / "t.jsonl", [row]), row
    line = refused(lambda: read_table(path, kind, [key]), f'{path} line 1: "{key}" is not {words}; delete the file')
    assert line.startswith(f"{config.PROGRAM}: error: {path}")


def test_nodes_of_earlier_versions_are_read_and_every_field_of_a_node_is_checked(tmp_path: Path):
    row = {"id": "a", "gold": "", "nodes": [NODE, NODE | {"parent": 0, "observed": "x"}]}
    (tree,) = read_table(write(tmp_path / "t.jsonl", [row]), TreeRow, TreeRow._fields)
    assert tree.nodes == [NodeRow(**NODE), NodeRow(**NODE | {"parent": 0}, observed="x")]
    for key in NODE:
        path = write(tmp_path / "t.jsonl", [row | {"nodes": [NODE | {key: {}}]}])
        refused(lambda path=path: read_table(path, TreeRow, ["nodes"]), f"{path} line 1")


# Benchmarks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [[{"f": 1}], [{"f": {"a": 1}}], [{}]])
@pytest.mark.parametrize("function", [{}, {"name": "f"}, {"name": "f", "parameters": {"properties": {"a": 1}}}])
def test_a_malformed_question_is_an_error_and_no_verdict(function: dict[str, Any], answer: Any):
    with pytest.raises(ValueError, match=r"(?: is| are| has| contains) no"):
        bfcl.check([function], "[f(a=1)]", answer, "simple")
