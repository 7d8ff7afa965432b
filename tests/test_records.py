"""Records and their files: what is written reads back, what is broken is named, no file is half there."""

import dataclasses
import gzip
import json
import os
import threading

import pyarrow
import pyarrow.parquet
import pytest

from itool_jax.data.rows import read_rows
from itool_jax.system.files import place, write_jsonl
from itool_jax.text.sample import Sample, content_id, sample_row

ROWS = [{"id": "a", "text": "é\u2028\n"}, {"id": "b", "n": [1, 2.5, None, {"x": True}]}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "deep/er/rows.jsonl"])
def test_written_rows_read_back(tmp_path, name):
    assert write_jsonl(tmp_path / name, ROWS) == 2
    assert list(read_rows(tmp_path / name)) == [(1, ROWS[0]), (2, ROWS[1])]


@pytest.mark.parametrize("name", ["rows.json", "rows.json.gz"])
@pytest.mark.parametrize("layout", ["array", "lines", "array behind a byte-order mark"])
def test_json_files_hold_an_array_or_lines(tmp_path, name, layout):
    text = "\n".join(map(json.dumps, ROWS)) if layout == "lines" else json.dumps(ROWS, indent=1)
    data = text.encode("utf-8-sig" if "mark" in layout else "utf-8")
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [row for _, row in read_rows(tmp_path / name)] == ROWS


def test_parquet_rows_read_back(tmp_path):
    rows = [{"id": "a", "n": [1, 2]}, {"id": "b", "n": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(read_rows(tmp_path / "rows.parquet")) == [(1, rows[0]), (2, rows[1])]


def test_numbers_are_line_numbers_whatever_blank_lines_stand_between(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('\ufeff{"id": 1}\r\n\n  \n{"id": 2}\n')
    assert list(read_rows(path)) == [(1, {"id": 1}), (4, {"id": 2})]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"id": 1}\n{"id": \n', "a.jsonl line 2: not valid JSON"),
        ("a.jsonl", b'{"id": 1}\n\n[1]\n', "a.jsonl line 3: not a JSON object"),
        ("a.jsonl", b'{"id": "\xff"}', "a.jsonl line 1: not UTF-8"),
        ("a.jsonl", b'{"a":' * 100_000, "a.jsonl line 1: not valid JSON"),
        ("a.json", b'[{"id": 1}, 2]', "a.json row 2: not a JSON object"),
        ("a.json", b'[{"id": 1}', "a.json: not valid JSON"),
        ("a.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "a.jsonl line 1: not valid JSON"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "a.jsonl.gz cannot be read"),
        ("a.parquet", b"not parquet", "a.parquet cannot be read"),
    ],
)
def test_broken_files_are_named_with_the_row_in_one_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError) as error:
        list(read_rows(tmp_path / name))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no\.jsonl does not exist"):
        list(read_rows(tmp_path / "no.jsonl"))
    with pytest.raises(ValueError, match="is a folder"):
        list(read_rows(tmp_path))


def test_place_says_line_only_for_lines():
    assert place("x/a.jsonl.gz", 7) == "x/a.jsonl.gz line 7"
    assert place("a.json", 7) == "a.json row 7"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_a_failed_write_names_the_row_and_leaves_the_earlier_file_alone(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"rows\.jsonl line 2: cannot be written"):
        write_jsonl(path, [{"id": "a"}, {"id": value}])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_no_file_appears_before_all_rows_are_there(tmp_path):
    path = tmp_path / "rows.jsonl"

    def rows():
        yield {"id": "a"}
        assert not path.exists()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_jsonl(path, rows())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_one_and_its_file_is_written(tmp_path, exists):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "rows.jsonl", tmp_path / "link.jsonl"
    if exists:
        target.write_text("earlier")
    link.symlink_to(target)
    assert write_jsonl(link, ROWS) == 2
    assert link.is_symlink()
    assert [row for _, row in read_rows(target)] == ROWS
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["elsewhere", "link.jsonl", "rows.jsonl"]


@pytest.mark.parametrize("linked", [True, False])
def test_a_pipe_is_written_to_and_not_replaced(tmp_path, linked):
    pipe, link = tmp_path / "pipe.jsonl", tmp_path / "link.jsonl"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    contents = []
    reader = threading.Thread(target=lambda: contents.append(pipe.read_bytes()), daemon=True)
    reader.start()
    assert write_jsonl(link if linked else pipe, ROWS) == 2
    assert pipe.is_fifo()
    reader.join(timeout=20)
    assert [json.loads(line) for line in contents[0].split(b"\n")[:-1]] == ROWS


def test_equal_rows_give_equal_bytes_even_gzipped(tmp_path):
    write_jsonl(tmp_path / "a.jsonl.gz", ROWS)
    write_jsonl(tmp_path / "b.jsonl.gz", ROWS)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_content_ids_depend_on_content_alone():
    assert content_id("p", {"a": 1, "b": 2}) == content_id("p", {"b": 2, "a": 1})
    assert content_id("p", {"a": 1}) != content_id("p", {"a": 2})
    assert content_id("p", {"a": 1}).startswith("p-")


def test_samples_are_frozen_and_leave_out_an_empty_category():
    sample = Sample(id="a", messages=({"role": "user", "content": "hi"},), target="x")
    assert sample_row(sample) == {
        "id": "a",
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [],
        "target": "x",
    }
    assert sample_row(dataclasses.replace(sample, category="easy"))["category"] == "easy"
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample.id = "b"
