"""Faults of model folders, run directories, benchmarks and exports."""

# A catalogue is a table: an entry is a line, however long (E501 is off for this file).
# fmt: off
import struct

from tests.faults.inputs import GENERATE, ITERATE, SCORE
from tests.faults.place import (
    cut,
    edit,
    fault,
    file,
    finished,
    full_disk,
    gguf,
    header,
    index,
    locked,
    mkdir,
    remove,
    tensors,
    write_scores,
)

GGUF = SCORE.replace("MODEL", "DIR/m.gguf")
NORM = "model.layers.1.input_layernorm.weight"
CONFIG, WEIGHTS = "model/config.json", "model/model.safetensors"


def _entry(**changes: object) -> dict[str, object]:
    """A header of one tensor."""
    return {"model.norm.weight": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]} | changes}


MODELS = [
    fault("model-absent", "a folder that is not there", "--stage=score --model=DIR/none --data=FILE --output=OUT", "model DIR/none is neither a folder, a GGUF file nor a hub name such as meta-llama/Llama-3.2-1B-Instruct"),
    fault("config-json-absent", "no config.json", SCORE, "MODEL/config.json does not exist: MODEL is not a Hugging Face model folder", remove(CONFIG)),
    fault("config-json-cut", "a config.json that is cut off", SCORE, "MODEL/config.json is not valid JSON: …", cut(CONFIG, 60)),
    fault("config-json-list", "a config.json that is a list", SCORE, "MODEL/config.json is not a JSON object", file(CONFIG, [1])),
    fault("config-json-bytes", "a config.json that is no text", SCORE, "MODEL/config.json is not valid JSON: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte", file(CONFIG, b"\xff{}")),
    fault("config-json-deep", "a config.json nested without end", SCORE, "MODEL/config.json is not valid JSON: nested more than 100 levels deep", file(CONFIG, "[" * 100000)),
    fault("architecture", "another architecture", SCORE, "MODEL/config.json: architecture ['GPT2LMHeadModel'] is not supported; known: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM", edit(CONFIG, architectures=["GPT2LMHeadModel"])),
    fault("architecture-kind", "an architecture that is a list", SCORE, "MODEL/config.json: architecture [['x']] is not supported; known: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM", edit(CONFIG, architectures=[["x"]])),
    fault("config-key-absent", "no vocab_size", SCORE, "MODEL/config.json: 'vocab_size' is missing", edit(CONFIG, vocab_size=None)),
    fault("config-key-zero", "no layers", SCORE, "MODEL/config.json: num_hidden_layers must be a positive integer, got 0", edit(CONFIG, num_hidden_layers=0)),
    fault("config-key-kind", "a width that is a text", SCORE, "MODEL/config.json: hidden_size must be a positive integer, got 'wide'", edit(CONFIG, hidden_size="wide")),
    fault("config-key-unknown", "a feature that is not known", SCORE, "MODEL/config.json: logit_softcapping=30 is not a known setting; remove it if it does not change the logits", edit(CONFIG, logit_softcapping=30)),
    fault("config-heads", "heads that do not divide", SCORE, "MODEL/config.json: num_attention_heads=4 is not a multiple of num_key_value_heads=3", edit(CONFIG, num_key_value_heads=3)),
    fault("config-head-dim", "an odd head", SCORE, "MODEL/config.json: head_dim=7 is odd; rotary embeddings need an even number", edit(CONFIG, head_dim=7)),
    fault("config-activation", "another activation", SCORE, "MODEL/config.json: hidden_act=gelu is not supported, only silu", edit(CONFIG, hidden_act="gelu")),
    fault("config-activation-kind", "an activation that is a list", SCORE, "MODEL/config.json: hidden_act=['silu'] is not supported, only silu", edit(CONFIG, hidden_act=["silu"])),
    fault("config-rope", "another scaling of positions", SCORE, "MODEL/config.json: rope scaling of type dynamic is not supported, only llama3, linear, yarn", edit(CONFIG, rope_scaling={"rope_type": "dynamic"})),
    fault("config-rope-kind", "scaling that is a text", SCORE, "MODEL/config.json: rope_scaling must be an object, got 'linear'", edit(CONFIG, rope_scaling="linear")),
    fault("config-epsilon", "an epsilon that is a list", SCORE, "MODEL/config.json: rms_norm_eps must be a number, got '[1]'", edit(CONFIG, rms_norm_eps=[1])),
    fault("config-window", "a sliding window", SCORE, "MODEL/config.json: sliding_window=8 is not supported, only full attention", edit(CONFIG, architectures=["MistralForCausalLM"], sliding_window=8)),
    fault("config-layer-types", "layers of another type", SCORE, "MODEL/config.json: layer_types: layers of type linear_attention are not supported, only full_attention", edit(CONFIG, layer_types=["linear_attention"])),
    fault("config-huge", "more layers than a machine holds", SCORE, "MODEL/config.json: num_hidden_layers must be at most 10000, got 1000000", edit(CONFIG, num_hidden_layers=10**6)),
    fault("config-mismatch", "a width that the weights have not", SCORE, "MODEL/model.safetensors: tensor model.layers.0.mlp.down_proj.weight has shape (32, 48), config.json asks for (32, 64)", edit(CONFIG, intermediate_size=64)),
    fault("weights-absent", "no weights", SCORE, "MODEL contains neither model.safetensors nor model.safetensors.index.json", remove(WEIGHTS)),
    fault("weights-empty", "an empty weight file", SCORE, "MODEL/model.safetensors is not a readable safetensors file: Error while deserializing header: …", file(WEIGHTS, b"")),
    fault("weights-cut", "weights that are cut off", SCORE, "MODEL/model.safetensors is not a readable safetensors file: Error while deserializing header: …", cut(WEIGHTS, 5000)),
    fault("weights-header-huge", "a header of 2^62 bytes", SCORE, "MODEL/model.safetensors is not a readable safetensors file: Error while deserializing header: …", header(_entry(), 2**62)),
    fault("weights-header-short", "a header longer than the file", SCORE, "MODEL/model.safetensors is not a readable safetensors file: Error while deserializing header: …", header(_entry(), 5000)),
    fault("weights-header-json", "a header that is no object", SCORE, "MODEL/model.safetensors is not a readable safetensors file: Error while deserializing header: …", header([1])),
    fault("weights-offsets", "offsets beyond the end", SCORE, "MODEL/model.safetensors is not a readable safetensors file: Error while deserializing header: …", header(_entry(data_offsets=[0, 2**40]))),
    fault("weights-offsets-negative", "negative offsets", SCORE, "MODEL/model.safetensors is not a readable safetensors file: Error while deserializing header: …", header(_entry(data_offsets=[-1, 127]), None, bytes(128))),
    fault("weights-overflow", "a shape that overflows", SCORE, "MODEL/model.safetensors is not a readable safetensors file: Error while deserializing header: …", header(_entry(shape=[2**62, 2**62]), None, bytes(128))),
    fault("weights-integers", "weights that are whole numbers", SCORE, "MODEL/model.safetensors: tensor model.layers.1.input_layernorm.weight has dtype I32, expected one of F32, F16, BF16, F64", tensors(lambda t: t.update({NORM: t[NORM].astype("int32")}))),
    fault("weights-missing", "a tensor is missing", SCORE, "MODEL: tensor model.layers.1.input_layernorm.weight is missing", tensors(lambda t: t.pop(NORM))),
    fault("weights-extra", "a tensor too many", SCORE, "MODEL: unexpected tensor extra", tensors(lambda t: t.update(extra=t[NORM]))),
    fault("weights-shape", "a tensor of another shape", SCORE, "MODEL/model.safetensors: tensor model.layers.1.input_layernorm.weight has shape (31,), config.json asks for (32,)", tensors(lambda t: t.update({NORM: t[NORM][:-1]}))),
    fault("index-outside", "an index that leaves the folder", SCORE, "'../outside.safetensors' is not the name of a file in MODEL", index({"model.norm.weight": "../outside.safetensors"})),
    fault("index-absolute", "an index with a whole path", SCORE, "'/etc/passwd' is not the name of a file in MODEL", index({"model.norm.weight": "/etc/passwd"})),
    fault("index-kind", "an index that is a list", SCORE, "MODEL/model.safetensors.index.json has no weight_map from tensors to file names", index([1])),
    fault("index-empty", "an index of nothing", SCORE, "MODEL/model.safetensors does not exist", index({})),
    fault("index-null", "a name with a null byte", SCORE, "'a\\x00b' is not the name of a file in MODEL", index({"model.norm.weight": "a\0b"})),
    fault("index-file-absent", "an index of a missing file", SCORE, "MODEL/a.safetensors does not exist", index({"model.norm.weight": "a.safetensors"})),
    fault("tokenizer-absent", "no tokenizer", SCORE, "cannot load the tokenizer of MODEL: it has no tokenizer.json", remove("model/tokenizer.json")),
    fault("tokenizer-cut", "a tokenizer that is cut off", SCORE, "cannot load the tokenizer of MODEL: …", cut("model/tokenizer.json", 100)),
    fault("tokenizer-list", "a tokenizer that is a list", SCORE, "cannot load the tokenizer of MODEL: …", file("model/tokenizer.json", [])),
    fault("tokenizer-large", "more tokens than embeddings", SCORE, "tokenizer of MODEL has 266 tokens, but the model has only 260 embeddings", edit(CONFIG, vocab_size=260)),
    fault("template-absent", "no chat template", SCORE, "sample a: tokenizer of MODEL has no chat template; add chat_template.jinja to the model folder, or give raw prompts", remove("model/chat_template.jinja")),
    fault("template-syntax", "a template that is cut off", SCORE, "chat template of MODEL cannot render the conversation: …", file("model/chat_template.jinja", "{% if")),
    fault("template-refuses", "a template that refuses", SCORE, "chat template of MODEL cannot render the conversation: no", file("model/chat_template.jinja", "{{ raise_exception('no') }}")),
    fault("template-escape", "a template that reaches for Python", SCORE, "chat template of MODEL cannot render the conversation: …", file("model/chat_template.jinja", "{{ ().__class__.__base__.__subclasses__() }}")),
    fault("template-divides", "a template that divides by zero", SCORE, "chat template of MODEL cannot render the conversation: …", file("model/chat_template.jinja", "{{ 1 // 0 }}")),
    fault("template-native", "a native tool format that is not known", f"{SCORE} --tool_format=native", "chat template of MODEL writes tool calls in none of the forms known here; set --tool_format=brackets or json", file("model/chat_template.jinja", "{% for m in messages %}{{ m.content }}{% endfor %}")),
    fault("tool-style", "a style of tools that the template lists itself", f"{SCORE} --tool_style=signature", "tool_style=signature is only for tool_format=brackets and json; the chat template of MODEL lists the tools itself"),
    fault("template-loop", "a template that counts without end", SCORE, "chat template of MODEL cannot render the conversation: …", file("model/chat_template.jinja", "{% for i in range(10**9) %}{% endfor %}")),
    fault("generation-config", "a generation_config.json that is a list", SCORE, "MODEL/generation_config.json is not a JSON object", file("model/generation_config.json", [1])),
    fault("generation-eos", "an end token that is a text", GENERATE, "MODEL/generation_config.json: eos_token_id must be token ids, got 'end'", file("model/generation_config.json", {"eos_token_id": "end"})),
    fault("generation-eos-large", "an end token beyond the vocabulary", GENERATE, "end-of-turn token 9999 is outside the model's vocabulary of 272", file("model/generation_config.json", {"eos_token_id": 9999})),
    fault("gguf-absent", "a GGUF file that is not there", GGUF, "model DIR/m.gguf is neither a folder, a GGUF file nor a hub name such as meta-llama/Llama-3.2-1B-Instruct"),
    fault("gguf-folder", "a folder of GGUF files", SCORE, "MODEL/config.json does not exist: MODEL holds GGUF files; name one, such as --model=MODEL/a.gguf", remove(CONFIG), file("model/a.gguf", b"")),
    fault("gguf-kind", "a GGUF file that is none", GGUF, "DIR/m.gguf is not a readable GGUF file: it does not begin with GGUF", file("m.gguf", b"PK12")),
    fault("gguf-empty", "an empty GGUF file", GGUF, "DIR/m.gguf is not a readable GGUF file: it is empty", file("m.gguf", b"")),
    fault("gguf-version", "a GGUF file of another version", GGUF, "DIR/m.gguf is not a readable GGUF file: version 9 is not supported, only 2 and 3", file("m.gguf", b"GGUF" + struct.pack("<IQQ", 9, 0, 0))),
    fault("gguf-header", "a header that is cut off", GGUF, "DIR/m.gguf is not a readable GGUF file: it ends within its header; download it again", gguf(), cut("m.gguf", 2000)),
    fault("gguf-cut", "a GGUF file that is cut off", GGUF, "DIR/m.gguf ends before the end of tensor …", gguf(), cut("m.gguf", 60000)),
    fault("gguf-split", "one of several GGUF files", GGUF, "DIR/m.gguf: the file is one of several parts; join them with llama-gguf-split --merge", gguf({"split.count": 2})),
    fault("gguf-type", "adapters in a GGUF file", GGUF, "DIR/m.gguf: general.type=adapter is not supported, only model", gguf({"general.type": "adapter"})),
    fault("gguf-architecture", "another architecture in a GGUF file", GGUF, "DIR/m.gguf: architecture gemma3 is not supported in a GGUF file; known: llama, qwen2, qwen3 (Mistral's is llama)", gguf({"general.architecture": "gemma3"})),
    fault("gguf-experts", "experts in a GGUF file", GGUF, "DIR/m.gguf: llama.expert_count=8 is not supported", gguf({"llama.expert_count": 8})),
    fault("gguf-key-absent", "no number of layers in a GGUF file", GGUF, "DIR/m.gguf: llama.block_count is missing", gguf({"llama.block_count": None})),
    fault("gguf-key-kind", "a number of layers that is a text", GGUF, "DIR/m.gguf: llama.block_count must be a positive number, got two", gguf({"llama.block_count": "two"})),
    fault("gguf-head", "heads turned in part", GGUF, "DIR/m.gguf: llama.rope.dimension_count=4 is not supported, only the size of a head, 8", gguf({"llama.rope.dimension_count": 4})),
    fault("gguf-layers", "more layers than tensors", GGUF, "DIR/m.gguf: tensor model.layers.2.input_layernorm.weight is missing", gguf({"llama.block_count": 3})),
    fault("gguf-tokenizer", "no tokenizer in a GGUF file", GGUF, "cannot load the tokenizer of DIR/m.gguf: it has no tokenizer; use the model's Hugging Face folder instead", gguf({"tokenizer.ggml.tokens": None})),
    fault("gguf-tokenizer-kind", "a tokenizer of another kind", GGUF, "cannot load the tokenizer of DIR/m.gguf: tokenizer.ggml.model=t5 is not supported, only gpt2 and llama; use the model's Hugging Face folder instead", gguf({"tokenizer.ggml.model": "t5"})),
    fault("gguf-pre", "a pre-tokenizer that is not known", GGUF, "cannot load the tokenizer of DIR/m.gguf: tokenizer.ggml.pre=gpt-4o is not known, only llama-bpe, llama3, llama-v3, qwen2, smollm, tekken; use the model's Hugging Face folder instead", gguf({"tokenizer.ggml.pre": "gpt-4o"})),
    fault("gguf-id", "an end token beyond the vocabulary of a GGUF file", GGUF, "cannot load the tokenizer of DIR/m.gguf: tokenizer.ggml.eos_token_id=900 is not the id of one of 272 tokens", gguf({"tokenizer.ggml.eos_token_id": 900})),
    fault("gguf-token-types", "too few kinds of tokens", GGUF, "cannot load the tokenizer of DIR/m.gguf: tokenizer.ggml.token_type must have a number for each of 272 tokens", gguf({"tokenizer.ggml.token_type": [1]})),
    fault("gguf-scores", "no scores of pieces", GGUF, "cannot load the tokenizer of DIR/m.gguf: tokenizer.ggml.scores must have a number for each of 272 tokens", gguf({"tokenizer.ggml.model": "llama"})),
    fault("gguf-merges", "a merge of three", GGUF, "cannot load the tokenizer of DIR/m.gguf: …", gguf({"tokenizer.ggml.merges": ["a b c"]})),
]

AGAIN = "--stage=iterate --run_dir=RUN SETTINGS"
WARMUP = "--stage=warmup --run_dir=RUN SETTINGS"
DPO = "--stage=dpo --run_dir=RUN SETTINGS"
DONE = "run/warmup/warmup.json"

RUNS = [
    fault("stage-score-early", "score before the warm-up", "--stage=score --run_dir=RUN SETTINGS", "RUN has no weights of warmup yet; run --stage=warmup first"),
    fault("stage-dpo-early", "preference training before the warm-up", DPO, "RUN has no weights of warmup yet; run --stage=warmup first"),
    fault("stage-search-late", "a round whose base is not there", "--stage=search --iteration=4 --run_dir=RUN SETTINGS", "RUN has no weights of iteration_3 yet; run --stage=dpo --iteration=3 first", finished),
    fault("run-other-settings", "settings that were others", f"{AGAIN} --search.breadth=3", "run directory RUN was created with search.breadth=2, but it is now 3; choose another --run_dir, or use the same settings", finished),
    fault("run-config-yaml", "a config.yaml that is cut off", AGAIN, "RUN/config.yaml is damaged …", finished, file("run/config.yaml", "seed: [")),
    fault("run-config-bytes", "a config.yaml that is no text", AGAIN, "RUN/config.yaml is damaged ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte); choose another --run_dir", finished, file("run/config.yaml", b"\xff")),
    fault("run-config-list", "a config.yaml that is a list", AGAIN, "RUN/config.yaml is damaged or from another version (no model); choose another --run_dir", finished, file("run/config.yaml", "[]")),
    fault("run-config-bomb", "a config.yaml of aliases", AGAIN, "RUN/config.yaml is damaged (an alias (*name) is not allowed here); choose another --run_dir", finished, file("run/config.yaml", "a: &a [x]\nb: [*a, *a]\n")),
    fault("run-config-deep", "a config.yaml nested without end", AGAIN, "RUN/config.yaml is damaged (nested more than 100 levels deep); choose another --run_dir", finished, file("run/config.yaml", "[" * 10000)),
    fault("run-done-cut", "a done file that is cut off", WARMUP, "RUN/warmup/warmup.json is damaged …", finished, cut(DONE, 20)),
    fault("run-done-list", "a done file that is a list", WARMUP, "RUN/warmup/warmup.json is damaged (not a JSON object); delete it to run the stage again", finished, file(DONE, [])),
    fault("run-done-bytes", "a done file that is no text", WARMUP, "RUN/warmup/warmup.json is damaged ('utf-8' codec can't decode byte 0xff in position 0: invalid start byte); delete it to run the stage again", finished, file(DONE, b"\xff")),
    fault("run-done-deep", "a done file nested without end", WARMUP, "RUN/warmup/warmup.json is damaged (nested more than 100 levels deep); delete it to run the stage again", finished, file(DONE, "[" * 100000)),
    fault("run-done-key", "a done file without its seconds", WARMUP, 'RUN/warmup/warmup.json is damaged (no "seconds"); delete it to run the stage again', finished, edit(DONE, seconds=None)),
    fault("run-done-outside", "a done file that names another's file", WARMUP, "RUN/warmup/warmup.json is damaged (../../etc/passwd is not in its folder); delete it to run the stage again", finished, edit(DONE, outputs={"../../etc/passwd": "0"})),
    fault("run-done-absolute", "a done file that names a whole path", WARMUP, "RUN/warmup/warmup.json is damaged (/etc/passwd is not in its folder); delete it to run the stage again", finished, edit(DONE, outputs={"/etc/passwd": "0"})),
    fault("run-started", "a folder of unfinished work, damaged", WARMUP, "RUN/warmup/warmup.working/started.json is damaged …", finished, remove(DONE), file("run/warmup/warmup.working/started.json", "{")),
    fault("run-sources", "sources.json is a list", WARMUP, "RUN/data/sources.json is damaged (not a JSON object); delete it to run the stage again", finished, file("run/data/sources.json", [])),
    fault("run-sources-key", "sources.json without the model", WARMUP, 'RUN/data/sources.json is damaged (no "model"); choose another --run_dir', finished, edit("run/data/sources.json", model=None)),
    fault("run-sources-changed", "a model that is another", WARMUP, "run directory RUN was created with a different chat_template.jinja of --model=MODEL_OF_RUN; choose another --run_dir", finished, edit("run/data/sources.json", model={"config.json": "0"})),
    fault("run-train-cut", "a data part that is cut off", WARMUP, "RUN/data/train.jsonl line 1: not valid JSON (…", finished, remove(DONE), cut("run/data/train.jsonl", 30)),
    fault("run-scores-absent", "no scores", "--stage=search --run_dir=RUN SETTINGS", "RUN/iteration_1/scores.jsonl does not exist; run --stage=score --iteration=1 first", finished, remove("run/iteration_1/scores.jsonl", "run/iteration_1/search.json")),
    fault("run-scores-key", "scores without ranks", "--stage=search --run_dir=RUN SETTINGS", 'RUN/iteration_1/scores.jsonl line 1: no "rank"; delete the file to compute it again', finished, remove("run/iteration_1/search.json"), file("run/iteration_1/scores.jsonl", '{"id": "s1"}\n')),
    fault("run-pairs-absent", "no pairs", DPO, "RUN/iteration_1/pairs.jsonl does not exist; run --stage=search --iteration=1 first", finished, remove("run/iteration_1/pairs.jsonl", "run/iteration_1/dpo.json")),
    fault("run-pairs-key", "pairs without a prompt", DPO, 'RUN/iteration_1/pairs.jsonl line 1: no "prompt_ids"; delete the file to compute it again', finished, remove("run/iteration_1/dpo.json"), file("run/iteration_1/pairs.jsonl", '{"id": "s1"}\n')),
    fault("run-in-use", "another process is at work there", AGAIN, "RUN is in use by process 7 on HOST; wait for it, or choose another folder", locked("run/.lock")),
    fault("output-in-use", "another process writes the output", SCORE, "DIR is in use by process 7 on HOST; wait for it, or choose another folder", locked(".out.jsonl.lock")),
    fault("disk-full", "a disk that is full", ITERATE, "RUN: No space left on device; free some space and rerun the same command (finished work is kept)", full_disk),
]

BFCL = "--stage=evaluate --benchmark=bfcl --results=DIR/r --data=DIR/b --categories simple --output=OUT"
QUESTION = {"id": "simple_0", "question": [[{"role": "user", "content": "q"}]], "function": [{"name": "f", "description": "", "parameters": {"type": "dict", "properties": {}, "required": []}}]}
ANSWER = {"id": "simple_0", "ground_truth": [{"f": {}}]}
Q, A, R = "b/questions/BFCL_v3_simple.json", "b/possible_answer/BFCL_v3_simple.json", "r/BFCL_v3_simple_result.json"
GOOD = (file(Q, QUESTION), file(A, ANSWER), file(R, {"id": "simple_0", "result": "[f()]"}))
API_BANK = "--stage=evaluate --benchmark=api_bank --run_dir=RUN SETTINGS --evaluate.benchmark_data=DIR/b"

BENCHMARKS = [
    fault("results-absent", "a folder without result files", BFCL, "DIR/r contains no BFCL_v3_<category>_result.json", mkdir("r")),
    fault("results-twice", "two files of one category", BFCL, "DIR/r contains results of several models: ., more; --results must be one model's folder", *GOOD, file("r/more/BFCL_v3_simple_result.json", "")),
    fault("results-cut", "a result file that is cut off", BFCL, "DIR/r/BFCL_v3_simple_result.json row 1: not valid JSON (…", *GOOD, file(R, '{"id": ')),
    fault("results-key", "a row without a result", BFCL, 'DIR/r/BFCL_v3_simple_result.json row 1: no "result"', *GOOD, file(R, {"id": "simple_0"})),
    fault("results-unknown", "a row of an unknown question", BFCL, "DIR/r/BFCL_v3_simple_result.json row 1: 'simple_9' is not a question of this category", *GOOD, file(R, {"id": "simple_9", "result": ""})),
    fault("results-id-kind", "an id that is a list", BFCL, 'DIR/r/BFCL_v3_simple_result.json row 1: "id" is not a string', *GOOD, file(R, {"id": ["simple_0"], "result": ""})),
    fault("results-form", "a result that is neither text nor calls", BFCL, 'DIR/r/BFCL_v3_simple_result.json row 1: simple_0: "result" is neither text nor a list of {name: arguments}', *GOOD, file(R, {"id": "simple_0", "result": [{"name": "f", "arguments": {}}]})),
    fault("results-twice-id", "a question answered twice", BFCL, "DIR/r/BFCL_v3_simple_result.json row 2: 'simple_0' appears twice", *GOOD, file(R, '{"id": "simple_0", "result": ""}\n' * 2)),
    fault("questions-absent", "no questions", BFCL, "DIR/b/questions contains no BFCL_v3_simple.json, plain or .gz; --evaluate.benchmark_data, or --data, must be a folder with questions/ and possible_answer/", *GOOD, remove(Q)),
    fault("answers-absent", "no possible answers", BFCL, "DIR/b/possible_answer contains no BFCL_v3_simple.json, plain or .gz; --evaluate.benchmark_data, or --data, must be a folder with questions/ and possible_answer/", *GOOD, remove(A)),
    fault("answers-other", "answers to other questions", BFCL, "DIR/b/questions/BFCL_v3_simple.json row 1: no possible answer to simple_0", *GOOD, file(A, {**ANSWER, "id": "simple_1"})),
    fault("answers-key", "an answer without its truth", BFCL, 'DIR/b/possible_answer/BFCL_v3_simple.json row 1: no "ground_truth"', *GOOD, file(A, {"id": "simple_0"})),
    fault("answers-kind", "a truth that is a number", BFCL, "DIR/b/possible_answer/BFCL_v3_simple.json row 1: \"ground_truth\" is not a list", *GOOD, file(A, {**ANSWER, "ground_truth": 1})),
    fault("answers-function", "a truth of an unknown function", BFCL, "DIR/b/questions/BFCL_v3_simple.json row 1: simple_0: the possible answer calls 'g', which is not among the functions", *GOOD, file(Q, {**QUESTION, "function": QUESTION["function"] * 2}), file(A, {**ANSWER, "ground_truth": [{"g": {}}]})),
    fault("questions-key", "a question without functions", BFCL, 'DIR/b/questions/BFCL_v3_simple.json row 1: no "function"', *GOOD, file(Q, {"id": "simple_0", "question": []})),
    fault("category-bfcl", "a category that there is none of", BFCL.replace("simple", "easy"), "unknown BFCL category 'easy'; choose from: all, single_turn, non_live, live, multi_turn, simple, java, javascript, multiple, parallel, parallel_multiple, irrelevance, live_simple, live_multiple, live_parallel, live_parallel_multiple, live_irrelevance, live_relevance, multi_turn_base, multi_turn_miss_func, multi_turn_miss_param, multi_turn_long_context", *GOOD),
    fault("results-api-bank", "results of API-Bank", BFCL.replace("=bfcl", "=api_bank"), "results is only for --benchmark=bfcl, got --benchmark=api_bank", *GOOD),
    fault("against-absent", "scores that are not there", f"{BFCL} --against=DIR/scores.json", "DIR/scores.json not found; --against needs the scores.json of another run", *GOOD),
    fault("against-kind", "scores that are none", f"{BFCL} --against=DIR/scores.json", "DIR/scores.json is not a scores.json: …", *GOOD, file("scores.json", [1])),
    fault("against-other", "scores of another category", f"{BFCL} --against=DIR/scores.json", "DIR/scores.json has none of the categories simple", *GOOD, write_scores),
    fault("category-api-bank", "a level that there is none of", f"{API_BANK} --categories level_9", "unknown API-Bank category 'level_9'; choose from: level_1, level_2, level_2_without_search", finished),
    fault("api-bank-absent", "no tests of API-Bank", f"{API_BANK} --categories level_1", "DIR/b contains no level-1-api.json, plain or .gz", finished, mkdir("b")),
    fault("api-bank-row", "a test without a call", f"{API_BANK} --categories level_1", "DIR/b/level-1-api.json row 1: not a test of API-Bank …", finished, file("b/level-1-api.json", [{"expected_output": "no"}])),
    fault("benchmark-phase", "a phase that was not trained", f"{API_BANK} --evaluate.phase=iteration_9", "evaluate.phase=iteration_9 has no weights in RUN; phases with weights: base warmup iteration_1 iteration_2", finished),
]

EXPORT = "--stage=export --run_dir=RUN SETTINGS --output=DIR/o"

EXPORTS = [
    fault("answer-phase", "a phase that answers without weights", "--stage=generate --run_dir=RUN SETTINGS --generate.phase=iteration_9", "generate.phase=iteration_9 has no weights in RUN; phases with weights: warmup, iteration_1, iteration_2", finished),
    fault("answer-no-run", "a phase of no run", "--stage=generate --run_dir=RUN SETTINGS --generate.phase=last", "RUN is not a run directory: no config.yaml"),
    fault("answer-settings", "a phase of other weights", "--stage=generate --run_dir=RUN SETTINGS --generate.phase=last --lora.rank=3", "run directory RUN was created with lora.rank=2, but it is now 3; choose another --run_dir, or use the same settings", finished),
    fault("export-no-run", "a run that is not there", EXPORT, "run directory RUN does not exist"),
    fault("export-no-weights", "a run without weights", EXPORT, "RUN has no weights of warmup yet; run --stage=warmup first", mkdir("run")),
    fault("export-phase", "a phase without weights", f"{EXPORT} --export.phase=iteration_9", "export.phase=iteration_9 has no weights in RUN; phases with weights: warmup, iteration_1, iteration_2", finished),
    fault("export-exists", "a folder that is there", EXPORT, "output DIR/o exists; choose another --output, or replace it with --overwrite", finished, file("o/x", "")),
    fault("export-replace", "a folder that is no model", f"{EXPORT} --overwrite", "output DIR/o is not an exported model, so --overwrite does not replace it", finished, file("o/x", "")),
    fault("export-over-model", "the model itself", EXPORT.replace("DIR/o", "RUN") + " --overwrite", "output RUN is not an exported model, so --overwrite does not replace it", finished),
    fault("export-base", "a base where there is one only", f"{EXPORT} --export.base=original", "export.base is only for runs with quantize=nf4; other adapters have a single base", finished),
    fault("export-file", "a file in the way", EXPORT.replace("DIR/o", "FILE"), "output FILE exists; choose another --output, or replace it with --overwrite", finished),
    fault("export-damaged", "weights that are damaged", EXPORT, "checkpoint RUN/iteration_2/weights: _METADATA is damaged; delete it to compute it again", finished, cut("run/iteration_2/weights/_METADATA", 5)),
    fault("export-unfinished", "weights that were not finished", EXPORT, "checkpoint RUN/iteration_2/weights: Individual parameter subdirectory not found at path: RUN/iteration_2/weights/layers.…", finished, remove("run/iteration_2/weights"), mkdir("run/iteration_2/weights")),
]
