"""Fuzz targets: one function per reader, which takes any bytes and raises if the reader breaks its promise.

The promise: a reader returns a result, or raises ValueError or OSError whose text names the file; `main` prints these
as one line. The caller limits time and memory.
"""

import contextlib
import functools
import json
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from itool_jax import config as settings
from itool_jax.data import sources
from itool_jax.data.rows import SUFFIXES, read_rows
from itool_jax.evaluation import api_bank, comparison
from itool_jax.evaluation.bfcl import checker as bfcl
from itool_jax.evaluation.bfcl import data as bfcl_data
from itool_jax.evaluation.bfcl import reader as bfcl_read
from itool_jax.model import hf
from itool_jax.store import columns
from itool_jax.store import directory as run_directory
from itool_jax.store.cache import read_figures
from itool_jax.store.sources import check_sources
from itool_jax.store.tables import EvaluationRow, PreferenceRow, ScoreRow, TreeRow
from itool_jax.system.journal import Journal
from itool_jax.text.calls import Call, read_calls, same_calls, write_calls
from itool_jax.text.chat import Chat, encode_sample, load_tokenizer

Row = dict[str, Any]


class BrokenPromiseError(Exception):
    """Error of a reader that raised another exception, or one whose message does not name its file."""


class Target(NamedTuple):
    """A function of bytes, its seed inputs, and pieces to combine."""

    run: Callable[[bytes], None]
    seeds: list[bytes]
    pieces: list[bytes]
    guided: bool = True
    """True if it runs this package's own code, so that coverage is informative."""


@functools.cache
def _place() -> Path:
    return Path(tempfile.mkdtemp(prefix="itool_fuzz_"))


def _keeps_promise(path: Path, read: Callable[[], Any]) -> Any:
    """Returns what `read` returns; None if the file is refused as promised."""
    try:
        return read()
    except (ValueError, OSError) as error:
        if str(path) not in str(error) and str(path) not in str(getattr(error, "filename", "")):
            raise BrokenPromiseError(f"the error does not name {path.name}: {error!r}") from error
    except Exception as error:
        raise BrokenPromiseError(repr(error)) from error
    return None


def _written(name: str, data: bytes) -> Path:
    path = _place() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


# Model outputs ------------------------------------------------------------------------------------------------

KINDS = {
    "simple": ("string", "integer", "float", "boolean", "array", "tuple", "dict", "any"),
    "java": ("byte", "long", "float", "double", "boolean", "char", "String", "any", "Array", "ArrayList", "HashMap"),
    "javascript": ("String", "integer", "Bigint", "float", "Boolean", "dict", "array", "any"),
}
ALLOWED = ["", "x", 1, 1.5, True, [1, "x"], {"k": ["v"]}, [{"k": ["v"]}]]


def _question(category: str) -> tuple[list[Row], list[Row]]:
    """Returns a function with a parameter of every kind, and its possible answers."""
    items = {"simple": "dict", "java": "long", "javascript": "Boolean"}[category]
    properties = {f"p{i}": {"type": kind, "items": {"type": items}} for i, kind in enumerate(KINDS[category])}
    function = {"name": "f", "parameters": {"type": "dict", "properties": properties, "required": []}}
    return [function], [{"f": dict.fromkeys(properties, ALLOWED)}]


QUESTIONS = {category: _question(category) for category in KINDS}


def calls(data: bytes) -> None:
    """Fuzzes the reward's reader: calls stay the same when they are written and read again."""
    read_calls(_text(data))
    parsed = read_calls(data.decode("utf-8", "replace"))  # partial characters do not survive a round trip
    if parsed is not None:
        again = read_calls(write_calls(parsed))
        if again is None or not same_calls(parsed, again):
            raise BrokenPromiseError("the calls change when they are written and read again")


def responses(data: bytes) -> None:
    """Fuzzes the readers and checkers of benchmarks: no text may raise."""
    text = _text(data)
    for language in ("Python", "Java", "JavaScript"):
        with contextlib.suppress(bfcl_read.UnreadableError):
            bfcl_read.read_response(text, language)
    for category, (functions, answers) in QUESTIONS.items():
        bfcl.check(functions, text, answers, category)
    api_bank.check(text, Call("f", {"a": "x"}))


# Data ---------------------------------------------------------------------------------------------------------


def files(data: bytes) -> None:
    """Fuzzes files of rows; the first byte selects the file type."""
    suffixes = (*SUFFIXES, ".parquet.gz", ".JSON", "")
    path = _written("d" + suffixes[data[0] % len(suffixes)] if data else "d.jsonl", data[1:])
    _keeps_promise(path, lambda: list(read_rows(path)))


def samples(data: bytes) -> None:
    """Fuzzes rows of every format, as training data, data to score, and questions; turns the samples into prompts."""
    path = _written("samples.jsonl", data)
    for read in (sources.load, sources.load_questions, functools.partial(sources.read_samples, need_target=False)):
        for sample in _keeps_promise(path, functools.partial(read, path)) or ():
            _keeps_promise(Path(f"sample {sample.id}"), functools.partial(encode_sample, _chat(), sample))


def questions(data: bytes) -> None:
    """Fuzzes questions and answers of BFCL and API-Bank, one row each, and a file of scores."""
    lines = data.split(b"\n")
    path = _written("BFCL_v3_simple.json", lines[0])
    _written("possible_answer/BFCL_v3_simple.json", lines[-1])
    loaded = _keeps_promise(_place(), lambda: bfcl_data.load_questions(path.parent, "simple")) or ()
    for question in loaded:
        for text in ("[f(a=1)]", "[f()]"):
            try:
                bfcl.check(question.functions, text, question.answer, "simple")
            except ValueError:
                continue
    path = _written("level-1-api.json", lines[0])
    _keeps_promise(path, lambda: api_bank.load_questions(path.parent, "level_1"))
    path = _written("scores.json", lines[0])
    _keeps_promise(path, lambda: comparison.read_scores(path))


# Models -------------------------------------------------------------------------------------------------------


def _model() -> Path:
    """Returns a folder with the embedded model's config, tokenizer and template; its weights are the last target's."""
    home, source = _place() / "model", Path(settings.__file__).parent / "embedded" / "model"
    home.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (home / name).write_bytes((source / name).read_bytes())
    return home


@functools.cache
def _chat() -> Chat:
    return Chat(load_tokenizer(str(Path(settings.__file__).parent / "embedded" / "model")))


def model_config(data: bytes) -> None:
    """Fuzzes config.json."""
    path = _written("config/config.json", data)
    _keeps_promise(path, lambda: hf.read_config(path.parent, "float32"))


def weights(data: bytes) -> None:
    """Fuzzes model.safetensors: reading it by its header, and checking it against config.json."""
    path = _written(f"weights/{hf.WEIGHTS}", data)
    if _keeps_promise(path, lambda: hf._tensors(path.parent)) is not None:
        path = _model() / hf.WEIGHTS
        path.write_bytes(data)
        _keeps_promise(path.parent, lambda: hf.load(path.parent))


def gguf(data: bytes) -> None:
    """Fuzzes a GGUF file: its weights, and its tokenizer."""
    path = _written("m.gguf", data)
    _keeps_promise(path, lambda: hf.load(path))
    _keeps_promise(path, lambda: Chat(load_tokenizer(str(path))).encode("hi"))


def index(data: bytes) -> None:
    """Fuzzes the index of a model of several files, all of them missing."""
    (_model() / hf.WEIGHTS).unlink(missing_ok=True)
    path = _written(f"model/{hf.INDEX}", data)
    _keeps_promise(path.parent, lambda: hf.load(path.parent))


def tokenizer(data: bytes) -> None:
    """Fuzzes tokenizer.json; the other files are valid."""
    path = _model() / "tokenizer.json"
    path.write_bytes(data)
    _keeps_promise(path.parent, lambda: Chat(load_tokenizer(str(path.parent))).encode("hi"))


def template(data: bytes) -> None:
    """Fuzzes a chat template."""
    chat = _chat()
    before = chat.tokenizer.chat_template
    chat.tokenizer.chat_template = _text(data).encode("utf-8", "replace").decode()
    try:
        turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant", "user")]
        _keeps_promise(Path(chat.name), lambda: chat.render(turns, (), add_generation_prompt=True))
    finally:
        chat.tokenizer.chat_template = before


# Settings and runs --------------------------------------------------------------------------------------------


def config_file(data: bytes) -> None:
    """Fuzzes a YAML file of settings, and the one that a run keeps."""
    path = _written("c.yaml", data)
    parsed = _keeps_promise(path, lambda: settings.parse(["--stage=iterate", f"--config={path}", "--run_dir=r"]))
    _written("run/config.yaml", data)
    _written("run/x", b"")
    run = settings.Config(stage="iterate", run_dir=_place() / "run")
    _keeps_promise(run.run_dir, lambda: run_directory.save_or_check(run))
    if parsed is not None and parsed.run_dir != Path("r"):
        raise BrokenPromiseError("the file overrides the command line")


def run_files(data: bytes) -> None:
    """Fuzzes files of a run: markers of finished stages, tables, sources and a journal."""
    run = settings.Config(stage="iterate", run_dir=_place() / "run", model=str(_place() / "nothing"))
    path = _written("run/warmup/warmup.json", data)
    _keeps_promise(path, lambda: read_figures(run.run_dir, "warmup", "warmup"))
    path = _written("run/data/sources.json", data)
    _keeps_promise(path.parent.parent, lambda: check_sources(run, ()))
    for kind in (ScoreRow, TreeRow, PreferenceRow, EvaluationRow):
        path = _written("run/t.jsonl", data)
        _keeps_promise(path, functools.partial(columns.read_table, path, kind, kind._fields))
    path = _written("run/a.journal", data)

    def reopen() -> None:
        with Journal(path) as journal:
            journal.append({0: 1})

    _keeps_promise(path, reopen)


# Seeds and pieces ---------------------------------------------------------------------------------------------

TOOL = {"name": "f", "description": "d", "parameters": {"a": {"type": "int, optional", "description": "x"}}}
TURNS = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "[f(a=1)]"}]
ROWS: list[Row] = [
    {"id": "a", "messages": [{"role": "user", "content": "q"}], "tools": [TOOL], "target": "[f(a=1)]"},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
            {"role": "tool", "content": "1"},
        ],
        "target": {"role": "assistant", "content": "x"},
    },
    {"id": 1, "prompt_ids": [1, 2], "target_ids": [3]},
    {"id": "b", "prompt": "x"},
    {"id": 1, "query": "q", "tools": json.dumps([TOOL]), "answers": '[{"name": "f", "arguments": {"a": 1}}]'},
    {"system": f"You may call: {json.dumps([TOOL])}. \nMore", "conversations": TURNS},
    {"tools": json.dumps([TOOL]), "conversations": [TURNS[0], {"from": "function_call", "value": '{"name": "f"}'}]},
    {
        "id": "c",
        "conversations": [
            {"from": "system", "value": f"APIs: {[TOOL]}"},
            {"from": "user", "value": "q Begin!"},
            {"from": "assistant", "value": 'Thought: t\nAction: f\nAction Input: {"a": 1}'},
        ],
    },
    {
        "system": 'SYSTEM: functions {"name": "f", "parameters": {"type": "object", "properties": {}}}',
        "chat": 'USER: q\n\nASSISTANT: <functioncall> {"name": "f", "arguments": \'{"a": "b"}\'} <|endoftext|>',
    },
    {
        "instruction": '**Available Tools**\n1. Name: f\nDescription: d\nParameters: {"a": {"type": "int"}}',
        "input": "<user> q </user>",
        "output": '<think> t </think>\n<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n</tool_call>',
    },
    {
        "instruction": "",
        "input": '{"name": "ToolSearcher", "description": "d", "parameters": {}}\nUser: q\nAPI-Request: '
        "[ToolSearcher(keywords='k')]->{'name': 'f', 'input_parameters': {'a': {'type': 'str'}}}\n"
        "Generate API Request:",
        "output": "API-Request: [f(a=b)]",
    },
    {"id": "q", "question": [[{"role": "user", "content": "q"}]], "function": [TOOL]},
    {"file": "f", "id": 0, "instruction": "API descriptions:\n", "input": "User: q\n", "expected_output": "[f(a='x')]"},
]
BFCL_ROWS = [
    {
        "id": "s",
        "question": [[{"role": "user", "content": "q"}]],
        "function": [{**TOOL, "parameters": {"type": "dict", "properties": {"a": {"type": "integer"}}}}],
    },
    {"id": "s", "ground_truth": [{"f": {"a": [1]}}]},
]
DONE = {"seconds": 1.5, "outputs": {"weights": None, "pairs.jsonl": "0f"}, "after": {}, "accuracy": {"overall": 1.0}}
TABLE = {"id": "s", "prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "correct": True, "categories": ["easy"]}
TABLE |= {"tree": "s", "rank": None, "visits_chosen": 1, "visits_rejected": 2, "chosen": -1.5, "rejected": -2.5}


def _json(*values: Any) -> bytes:
    return b"\n".join(json.dumps(value).encode() for value in values)


def _safetensors(header: Any, body: bytes = bytes(128)) -> bytes:
    text = _json(header)
    return struct.pack("<Q", len(text)) + text + body


def _gguf_value(value: Any) -> bytes:
    """A value of GGUF metadata after its type."""
    match value:
        case str():
            return struct.pack("<I", 8) + _gguf_text(value)
        case int():
            return struct.pack("<II", 4, value)
        case float():
            return struct.pack("<If", 6, value)
    items = [_gguf_value(item) for item in value]
    return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)


def _gguf_text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf(**changes: Any) -> bytes:
    """A Llama of one layer and one head of two numbers, and its tokenizer."""
    metadata = {
        "general.architecture": "llama",
        **{f"llama.{key}": 1 for key in ("block_count", "attention.head_count")},
        **{f"llama.{key}": 2 for key in ("embedding_length", "feed_forward_length", "context_length")},
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["h", "i", "hi", "</s>"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3],
        "tokenizer.ggml.merges": ["h i"],
        "tokenizer.ggml.eos_token_id": 3,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes = {"token_embd": (2, 4), "output_norm": (2,), **{f"blk.0.{name}": (2, 2) for name in matrices}}
    shapes |= {"blk.0.attn_norm": (2,), "blk.0.ffn_norm": (2,)}
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(shapes), len(metadata))]
    parts += [_gguf_text(key) + _gguf_value(value) for key, value in metadata.items()]
    for name, shape in shapes.items():
        parts.append(_gguf_text(f"{name}.weight") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0))
    return b"".join(parts) + bytes(100)


def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"id": "a", "n": [1, 2], "s": {"x": 1.5}}] * 3), sink)
    return sink.getvalue().to_pybytes()


def _gzip(data: bytes) -> bytes:
    import gzip

    return gzip.compress(data, mtime=0)


JSON_PIECES = [
    *rb'{ } [ ] " : , null true 1e999 -1 NaN "\ud800" "\u0000" "../../x" [[]] {}'.split(b" "),
    *(b"\n", b"\xff", b"\xef\xbb\xbf", b"[" * 200, b'{"a":' * 200, b"9" * 5000),
]
KEYS = sorted({key for row in [*ROWS, *BFCL_ROWS, DONE, TABLE] for key in row} | {"role", "content", "name", "value"})
JSON_PIECES += [_json(key) + b":" for key in KEYS]
TEXT_PIECES = [
    *rb"""[ ] ( ) { } , = ' " \ ` . : - f( a= p0=1 p6={'k':'v'} [[[[ (((( \x \N{ `${ // /* """.split(),
    *b"2**9**9 'a'*9**9 %9999999999d 1e999 0x 1_0 1j ... None new\tint[]{ new\tArray( new\tHashMap<>(){{put(".split(
        b" "
    ),
    *(b" ", b"\n", b"\0", b"\xc3\xa9", b"\xff", b"'''", b"not ", b"lambda: ", b"9" * 5000),
    b"new ArrayList<>(Arrays.asList(",
]
YAML_PIECES = [
    *(
        b"seed: 1\n",
        b"search:\n  breadth: 2\n",
        b"&a ",
        b"*a",
        b"[*a, *a]\n",
        b"!!int ",
        b"!!binary ",
        b"!!timestamp x\n",
    ),
    *(b"!!python/object/apply:os.system ", b"!!set ", b"- ", b"? ", b": ", b"{", b"}", b"[" * 300, b"|\n", b"#", b"'"),
    *(b"data: ", b"categories: [--help]\n", b"2001-99-99", b"1:99", b"<<: ", b"---\n", b"%YAML 9.9\n", b"\t", b"\0"),
]
TEMPLATE_PIECES = [
    *b"{{ }} {% %} messages m.content endfor 'x' * ** ~ range(99) |tojson |list .__class__ [0] loop cycler".split(b" "),
    *(b" for m in messages ", b" if ", b" endif ", b" set x = ", b"namespace()", b"raise_exception('n')"),
    *(b" macro f() ", b" endmacro ", b"f()", b".format(", b"joiner", b"strftime_now('%Y')"),
]
_TENSOR = {"model.norm.weight": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}}
_JOURNAL = b'5b9a8b0c ["layout", {}]\n'
_EMBEDDED = Path(settings.__file__).parent / "embedded" / "model"

TARGETS: dict[str, Target] = {
    "calls": Target(calls, [b'[f(a=1, b="x"), g h(c=[1, {"k": None}], d=(1,))]'], TEXT_PIECES),
    "responses": Target(
        responses, [b"[f(p0='x', p4=[1, 2])]", b"f(p1 = 5L, p9 = new ArrayList<>(Arrays.asList(1L)))"], TEXT_PIECES
    ),
    "files": Target(
        files,
        [
            *(bytes([i]) + _json(ROWS[2]) for i in (0, 1)),
            *(bytes([i]) + _gzip(_json(ROWS[2])) for i in (2, 3)),
            b"\4" + _parquet(),
        ],
        JSON_PIECES,
    ),
    "samples": Target(samples, [_json(row) for row in ROWS], JSON_PIECES + TEXT_PIECES),
    "questions": Target(questions, [_json(*BFCL_ROWS), _json(ROWS[-1])], JSON_PIECES),
    "model_config": Target(model_config, [(_EMBEDDED / "config.json").read_bytes()], JSON_PIECES),
    "weights": Target(
        weights, [_safetensors(_TENSOR)], [*JSON_PIECES, *(struct.pack("<Q", n) for n in (0, 100, 2**40))]
    ),
    "gguf": Target(
        gguf,
        [_gguf(), _gguf(tokenizer__ggml__model="llama", tokenizer__ggml__scores=[0.0, 0.0, -1.0, 0.0])],
        [b"llama", b"qwen3", b"token_type", *(struct.pack("<Q", n) for n in (0, 1, 3, 100, 2**40, 2**63))],
    ),
    "index": Target(index, [_json({"weight_map": {"model.norm.weight": "a.safetensors"}})], JSON_PIECES),
    "tokenizer": Target(tokenizer, [(_EMBEDDED / "tokenizer.json").read_bytes()], JSON_PIECES, False),
    "template": Target(template, [(_EMBEDDED / "chat_template.jinja").read_bytes()], TEMPLATE_PIECES, False),
    "config_file": Target(config_file, [b"seed: 1\nsearch: {breadth: 2}\ncategories: [simple]\n"], YAML_PIECES),
    "run_files": Target(run_files, [_json(DONE), _json(TABLE), _JOURNAL], JSON_PIECES),
}
