"""Faults of model folders, run directories, benchmarks and exports."""

from tests.faults.inputs import GENERATE, ITERATE, SCORE
from tests.faults.place import (
    cut,
    edit,
    fault,
    file,
    finished,
    full_disk,
    header,
    index,
    locked,
    mkdir,
    remove,
    tensors,
    write_scores,
)

NORM = "model.layers.1.input_layernorm.weight"
CONFIG, WEIGHTS = "model/config.json", "model/model.safetensors"


def _entry(**changes: object) -> dict[str, object]:
    """A header of one tensor."""
    return {"model.norm.weight": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]} | changes}


MODELS = [
    fault("model-absent", "a folder that is not there", "--stage=score --model=DIR/none --data=FILE --output=OUT", "?"),
    fault("config-json-absent", "no config.json", SCORE, "?", remove(CONFIG)),
    fault("config-json-cut", "a config.json that is cut off", SCORE, "?", cut(CONFIG, 60)),
    fault("config-json-list", "a config.json that is a list", SCORE, "?", file(CONFIG, [1])),
    fault("config-json-bytes", "a config.json that is no text", SCORE, "?", file(CONFIG, b"\xff{}")),
    fault("config-json-deep", "a config.json nested without end", SCORE, "?", file(CONFIG, "[" * 100000)),
    fault("architecture", "another architecture", SCORE, "?", edit(CONFIG, architectures=["GPT2LMHeadModel"])),
    fault("architecture-kind", "an architecture that is a list", SCORE, "?", edit(CONFIG, architectures=[["x"]])),
    fault("config-key-absent", "no vocab_size", SCORE, "?", edit(CONFIG, vocab_size=None)),
    fault("config-key-zero", "no layers", SCORE, "?", edit(CONFIG, num_hidden_layers=0)),
    fault("config-key-kind", "a width that is a text", SCORE, "?", edit(CONFIG, hidden_size="wide")),
    fault("config-key-unknown", "a feature that is not known", SCORE, "?", edit(CONFIG, logit_softcapping=30)),
    fault("config-heads", "heads that do not divide", SCORE, "?", edit(CONFIG, num_key_value_heads=3)),
    fault("config-head-dim", "an odd head", SCORE, "?", edit(CONFIG, head_dim=7)),
    fault("config-activation", "another activation", SCORE, "?", edit(CONFIG, hidden_act="gelu")),
    fault("config-activation-kind", "an activation that is a list", SCORE, "?", edit(CONFIG, hidden_act=["silu"])),
    fault("config-rope", "another scaling of positions", SCORE, "?", edit(CONFIG, rope_scaling={"rope_type": "yarn"})),
    fault("config-rope-kind", "scaling that is a text", SCORE, "?", edit(CONFIG, rope_scaling="linear")),
    fault("config-epsilon", "an epsilon that is a list", SCORE, "?", edit(CONFIG, rms_norm_eps=[1])),
    fault("config-window", "a sliding window", SCORE, "?", edit(CONFIG, architectures=["MistralForCausalLM"], sliding_window=8)),
    fault("config-layer-types", "layers of another type", SCORE, "?", edit(CONFIG, layer_types=["linear_attention"])),
    fault("config-huge", "more layers than a machine holds", SCORE, "?", edit(CONFIG, num_hidden_layers=10**6)),
    fault("config-mismatch", "a width that the weights have not", SCORE, "?", edit(CONFIG, intermediate_size=64)),
    fault("weights-absent", "no weights", SCORE, "?", remove(WEIGHTS)),
    fault("weights-empty", "an empty weight file", SCORE, "?", file(WEIGHTS, b"")),
    fault("weights-cut", "weights that are cut off", SCORE, "?", cut(WEIGHTS, 5000)),
    fault("weights-header-huge", "a header of 2^62 bytes", SCORE, "?", header(_entry(), 2**62)),
    fault("weights-header-short", "a header longer than the file", SCORE, "?", header(_entry(), 5000)),
    fault("weights-header-json", "a header that is no object", SCORE, "?", header([1])),
    fault("weights-offsets", "offsets beyond the end", SCORE, "?", header(_entry(data_offsets=[0, 2**40]))),
    fault("weights-offsets-negative", "negative offsets", SCORE, "?", header(_entry(data_offsets=[-1, 127]), None, bytes(128))),
    fault("weights-overflow", "a shape that overflows", SCORE, "?", header(_entry(shape=[2**62, 2**62]), None, bytes(128))),
    fault("weights-integers", "weights that are whole numbers", SCORE, "?", tensors(lambda t: t.update({NORM: t[NORM].astype("int32")}))),
    fault("weights-missing", "a tensor is missing", SCORE, "?", tensors(lambda t: t.pop(NORM))),
    fault("weights-extra", "a tensor too many", SCORE, "?", tensors(lambda t: t.update(extra=t[NORM]))),
    fault("weights-shape", "a tensor of another shape", SCORE, "?", tensors(lambda t: t.update({NORM: t[NORM][:-1]}))),
    fault("index-outside", "an index that leaves the folder", SCORE, "?", index({"model.norm.weight": "../outside.safetensors"})),
    fault("index-absolute", "an index with a whole path", SCORE, "?", index({"model.norm.weight": "/etc/passwd"})),
    fault("index-kind", "an index that is a list", SCORE, "?", index([1])),
    fault("index-empty", "an index of nothing", SCORE, "?", index({})),
    fault("index-null", "a name with a null byte", SCORE, "?", index({"model.norm.weight": "a\0b"})),
    fault("index-file-absent", "an index of a missing file", SCORE, "?", index({"model.norm.weight": "a.safetensors"})),
    fault("tokenizer-absent", "no tokenizer", SCORE, "?", remove("model/tokenizer.json")),
    fault("tokenizer-cut", "a tokenizer that is cut off", SCORE, "?", cut("model/tokenizer.json", 100)),
    fault("tokenizer-list", "a tokenizer that is a list", SCORE, "?", file("model/tokenizer.json", [])),
    fault("tokenizer-large", "more tokens than embeddings", SCORE, "?", edit(CONFIG, vocab_size=260)),
    fault("template-absent", "no chat template", SCORE, "?", remove("model/chat_template.jinja")),
    fault("template-syntax", "a template that is cut off", SCORE, "?", file("model/chat_template.jinja", "{% if")),
    fault("template-refuses", "a template that refuses", SCORE, "?", file("model/chat_template.jinja", "{{ raise_exception('no') }}")),
    fault("template-escape", "a template that reaches for Python", SCORE, "?", file("model/chat_template.jinja", "{{ ().__class__.__base__.__subclasses__() }}")),
    fault("template-divides", "a template that divides by zero", SCORE, "?", file("model/chat_template.jinja", "{{ 1 // 0 }}")),
    fault("template-loop", "a template that counts without end", SCORE, "?", file("model/chat_template.jinja", "{% for i in range(10**9) %}{% endfor %}")),
    fault("generation-config", "a generation_config.json that is a list", SCORE, "?", file("model/generation_config.json", [1])),
    fault("generation-eos", "an end token that is a text", GENERATE, "?", file("model/generation_config.json", {"eos_token_id": "end"})),
    fault("generation-eos-large", "an end token beyond the vocabulary", GENERATE, "?", file("model/generation_config.json", {"eos_token_id": 9999})),
]

AGAIN = "--stage=iterate --run_dir=RUN SETTINGS"
WARMUP = "--stage=warmup --run_dir=RUN SETTINGS"
DPO = "--stage=dpo --run_dir=RUN SETTINGS"
DONE = "run/warmup/warmup.json"

RUNS = [
    fault("stage-score-early", "score before the warm-up", "--stage=score --run_dir=RUN SETTINGS", "?"),
    fault("stage-dpo-early", "preference training before the warm-up", DPO, "?"),
    fault("stage-search-late", "a round whose base is not there", "--stage=search --iteration=4 --run_dir=RUN SETTINGS", "?", finished),
    fault("run-other-settings", "settings that were others", f"{AGAIN} --search.breadth=3", "?", finished),
    fault("run-config-yaml", "a config.yaml that is cut off", AGAIN, "?", finished, file("run/config.yaml", "seed: [")),
    fault("run-config-bytes", "a config.yaml that is no text", AGAIN, "?", finished, file("run/config.yaml", b"\xff")),
    fault("run-config-list", "a config.yaml that is a list", AGAIN, "?", finished, file("run/config.yaml", "[]")),
    fault("run-config-bomb", "a config.yaml of aliases", AGAIN, "?", finished, file("run/config.yaml", "a: &a [x]\nb: [*a, *a]\n")),
    fault("run-config-deep", "a config.yaml nested without end", AGAIN, "?", finished, file("run/config.yaml", "[" * 10000)),
    fault("run-done-cut", "a done file that is cut off", WARMUP, "?", finished, cut(DONE, 20)),
    fault("run-done-list", "a done file that is a list", WARMUP, "?", finished, file(DONE, [])),
    fault("run-done-bytes", "a done file that is no text", WARMUP, "?", finished, file(DONE, b"\xff")),
    fault("run-done-deep", "a done file nested without end", WARMUP, "?", finished, file(DONE, "[" * 100000)),
    fault("run-done-key", "a done file without its seconds", WARMUP, "?", finished, edit(DONE, seconds=None)),
    fault("run-done-outside", "a done file that names another's file", WARMUP, "?", finished, edit(DONE, outputs={"../../etc/passwd": "0"})),
    fault("run-done-absolute", "a done file that names a whole path", WARMUP, "?", finished, edit(DONE, outputs={"/etc/passwd": "0"})),
    fault("run-started", "a folder of unfinished work, damaged", WARMUP, "?", finished, remove(DONE), file("run/warmup/warmup.working/started.json", "{")),
    fault("run-sources", "sources.json is a list", WARMUP, "?", finished, file("run/data/sources.json", [])),
    fault("run-sources-key", "sources.json without the model", WARMUP, "?", finished, edit("run/data/sources.json", model=None)),
    fault("run-sources-changed", "a model that is another", WARMUP, "?", finished, edit("run/data/sources.json", model={"config.json": "0"})),
    fault("run-train-cut", "a data part that is cut off", WARMUP, "?", finished, remove(DONE), cut("run/data/train.jsonl", 30)),
    fault("run-scores-absent", "no scores", "--stage=search --run_dir=RUN SETTINGS", "?", finished, remove("run/iteration_1/scores.jsonl", "run/iteration_1/search.json")),
    fault("run-scores-key", "scores without ranks", "--stage=search --run_dir=RUN SETTINGS", "?", finished, remove("run/iteration_1/search.json"), file("run/iteration_1/scores.jsonl", '{"id": "s1"}\n')),
    fault("run-pairs-absent", "no pairs", DPO, "?", finished, remove("run/iteration_1/pairs.jsonl", "run/iteration_1/dpo.json")),
    fault("run-pairs-key", "pairs without a prompt", DPO, "?", finished, remove("run/iteration_1/dpo.json"), file("run/iteration_1/pairs.jsonl", '{"id": "s1"}\n')),
    fault("run-in-use", "another process is at work there", AGAIN, "?", locked("run/.lock")),
    fault("output-in-use", "another process writes the output", SCORE, "?", locked(".out.jsonl.lock")),
    fault("disk-full", "a disk that is full", ITERATE, "?", full_disk),
]

BFCL = "--stage=evaluate --benchmark=bfcl --results=DIR/r --data=DIR/b --categories simple --output=OUT"
QUESTION = {"id": "simple_0", "question": [[{"role": "user", "content": "q"}]], "function": [{"name": "f", "description": "", "parameters": {"type": "dict", "properties": {}, "required": []}}]}
ANSWER = {"id": "simple_0", "ground_truth": [{"f": {}}]}
Q, A, R = "b/questions/BFCL_v3_simple.json", "b/possible_answer/BFCL_v3_simple.json", "r/BFCL_v3_simple_result.json"
GOOD = (file(Q, QUESTION), file(A, ANSWER), file(R, {"id": "simple_0", "result": "[f()]"}))
API_BANK = "--stage=evaluate --benchmark=api_bank --run_dir=RUN SETTINGS --evaluate.benchmark_data=DIR/b"

BENCHMARKS = [
    fault("results-absent", "a folder without result files", BFCL, "?", mkdir("r")),
    fault("results-twice", "two files of one category", BFCL, "?", *GOOD, file("r/more/BFCL_v3_simple_result.json", "")),
    fault("results-cut", "a result file that is cut off", BFCL, "?", *GOOD, file(R, '{"id": ')),
    fault("results-key", "a row without a result", BFCL, "?", *GOOD, file(R, {"id": "simple_0"})),
    fault("results-unknown", "a row of an unknown question", BFCL, "?", *GOOD, file(R, {"id": "simple_9", "result": ""})),
    fault("results-id-kind", "an id that is a list", BFCL, "?", *GOOD, file(R, {"id": ["simple_0"], "result": ""})),
    fault("results-twice-id", "a question answered twice", BFCL, "?", *GOOD, file(R, '{"id": "simple_0", "result": ""}\n' * 2)),
    fault("questions-absent", "no questions", BFCL, "?", *GOOD, remove(Q)),
    fault("answers-absent", "no possible answers", BFCL, "?", *GOOD, remove(A)),
    fault("answers-other", "answers to other questions", BFCL, "?", *GOOD, file(A, {**ANSWER, "id": "simple_1"})),
    fault("answers-key", "an answer without its truth", BFCL, "?", *GOOD, file(A, {"id": "simple_0"})),
    fault("answers-kind", "a truth that is a number", BFCL, "?", *GOOD, file(A, {**ANSWER, "ground_truth": 1})),
    fault("answers-function", "a truth of an unknown function", BFCL, "?", *GOOD, file(Q, {**QUESTION, "function": QUESTION["function"] * 2}), file(A, {**ANSWER, "ground_truth": [{"g": {}}]})),
    fault("questions-key", "a question without functions", BFCL, "?", *GOOD, file(Q, {"id": "simple_0", "question": []})),
    fault("category-bfcl", "a category that there is none of", BFCL.replace("simple", "easy"), "?", *GOOD),
    fault("results-api-bank", "results of API-Bank", BFCL.replace("=bfcl", "=api_bank"), "?", *GOOD),
    fault("against-absent", "scores that are not there", f"{BFCL} --against=DIR/scores.json", "?", *GOOD),
    fault("against-kind", "scores that are none", f"{BFCL} --against=DIR/scores.json", "?", *GOOD, file("scores.json", [1])),
    fault("against-other", "scores of another category", f"{BFCL} --against=DIR/scores.json", "?", *GOOD, write_scores),
    fault("category-api-bank", "a level that there is none of", f"{API_BANK} --categories level_9", "?", finished),
    fault("api-bank-absent", "no tests of API-Bank", f"{API_BANK} --categories level_1", "?", finished, mkdir("b")),
    fault("api-bank-row", "a test without a call", f"{API_BANK} --categories level_1", "?", finished, file("b/level-1-api.json", [{"expected_output": "no"}])),
    fault("benchmark-phase", "a phase that was not trained", f"{API_BANK} --evaluate.phase=iteration_9", "?", finished),
]

EXPORT = "--stage=export --run_dir=RUN SETTINGS --output=DIR/o"

EXPORTS = [
    fault("export-no-run", "a run that is not there", EXPORT, "?"),
    fault("export-no-weights", "a run without weights", EXPORT, "?", mkdir("run")),
    fault("export-phase", "a phase without weights", f"{EXPORT} --export.phase=iteration_9", "?", finished),
    fault("export-exists", "a folder that is there", EXPORT, "?", finished, file("o/x", "")),
    fault("export-replace", "a folder that is no model", f"{EXPORT} --overwrite", "?", finished, file("o/x", "")),
    fault("export-over-model", "the model itself", EXPORT.replace("DIR/o", "RUN") + " --overwrite", "?", finished),
    fault("export-base", "a base where there is one only", f"{EXPORT} --export.base=original", "?", finished),
    fault("export-file", "a file in the way", EXPORT.replace("DIR/o", "FILE"), "?", finished),
    fault("export-damaged", "weights that are damaged", EXPORT, "?", finished, cut("run/iteration_2/weights/_METADATA", 5)),
    fault("export-unfinished", "weights that were not finished", EXPORT, "?", finished, remove("run/iteration_2/weights"), mkdir("run/iteration_2/weights")),
]
