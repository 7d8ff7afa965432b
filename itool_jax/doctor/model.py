"""Checks that a model's folder and the data fit together for a run, with the loaders' own checks.

In: settings. Out: findings, and samples to show. No weights are read and nothing is written.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from rich.text import Text

from itool_jax.config import Config
from itool_jax.data.card import fault_lines, left_out_lines, target_faults
from itool_jax.doctor.machine import Finding
from itool_jax.model import hf
from itool_jax.store.base import load_base, model_folder, step_table
from itool_jax.store.splits import divide, divide_replay, require_part
from itool_jax.system.untrusted import harmless, one_line
from itool_jax.text.calls import looks_like_calls
from itool_jax.text.chat import Chat, Encoded, Message, answer_ids, evaluation_frame
from itool_jax.text.sample import Sample
from itool_jax.text.steps import split_steps

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION = {"role": "user", "content": "Weather in Zürich — and in 東京?"}
ANSWER = '[get_weather(city="Zürich"), get_weather(city="東京")]'
CALL, RESULT = '[get_weather(city="Zürich")]', {"role": "tool", "content": '{"degrees": 12}'}
CONVERSATIONS: dict[str, tuple[list[Message], str]] = {
    "text and a call in one turn": (
        [QUESTION, {"role": "assistant", "content": CALL, "before_calls": "I will look."}, RESULT],
        "12 degrees.",
    ),
    "parallel calls and results": ([QUESTION, {"role": "assistant", "content": ANSWER}, RESULT, RESULT], "Both 12."),
    "a call after a result": ([QUESTION, {"role": "assistant", "content": CALL}, RESULT], CALL),
    "an empty turn": ([QUESTION, {"role": "assistant", "content": ""}, QUESTION], "12 degrees."),
}
"""Conversations in which templates differ, each with the answer to it."""
SHOWN = 160
"""Characters shown from the end of a prompt."""
LISTED = 3
"""Number of wrong rows of the data that are listed."""


def _refused(what: str, remedy: str, check: Callable[[], Any]) -> tuple[Any, list[Finding]]:
    """Returns a check's result, or its error as a finding."""
    try:
        return check(), []
    except (ValueError, OSError) as error:
        return None, [Finding("error", what, one_line(error), remedy)]


def model(config: Config) -> Iterator[Finding]:
    """Checks the configuration, weights (by their file headers), tokenizer, special tokens and template."""
    place = model_folder(config)
    shapes, findings = _refused("model", "use a supported model", lambda: hf.read_config(place, config.dtype))
    yield from findings
    if shapes is None:
        return
    count = f"{shapes.n_layers} layers of {shapes.hidden_size}, vocabulary {shapes.vocab_size}"
    yield Finding("ok", "model", f"{place}: {count}, context {shapes.max_length}")
    held, findings = _refused("weights", "download the model again", lambda: hf.checked(place, shapes)[1])
    yield from findings
    if held is not None:
        total = sum(math.prod(tensor.shape) for tensor in held.values())
        stored = f", dequantized from {kind}" if (kind := hf.quantization(place)) else ""
        source = "config.json" if place.is_dir() else "its metadata"
        yield Finding("ok", "weights", f"{len(held)} tensors with {total:,} numbers, matching {source}{stored}")
    base, findings = _refused("tokenizer", "use the model's own tokenizer", lambda: load_base(config))
    yield from findings
    if base is not None:
        yield from tokens(base.chat, base.config.vocab_size)
        yield from template(base.chat, config)


def tokens(chat: Chat, vocab_size: int) -> Iterator[Finding]:
    """Reports the vocabulary size, and checks the tokens that end a response."""
    yield Finding("ok", "tokenizer", f"{chat.n_ids} tokens, model vocabulary {vocab_size}")
    named = ", ".join(f"{chat.tokenizer.convert_ids_to_tokens(i)} ({i})" for i in chat.stop_ids)
    if (largest := max(chat.stop_ids)) >= vocab_size:
        text = f"token {largest} ends a response, but the model has only {vocab_size} embeddings"
        yield Finding("error", "stop tokens", text, "correct eos_token_id in generation_config.json")
    else:
        yield Finding("ok", "stop tokens", f"{named}; the first ends a turn")


def template(chat: Chat, config: Config) -> Iterator[Finding]:
    """Renders, tokenises and decodes a conversation, and checks what loss masks and the search rely on."""
    messages = ({"role": "system", "content": "Be brief."}, QUESTION)
    rendered, findings = _refused("template", "add chat_template.jinja to the folder", lambda: _render(chat, messages))
    yield from findings
    if rendered is None:
        return
    prompt, whole = rendered
    ids = chat.encode(prompt)
    again = chat.tokenizer.decode(ids, skip_special_tokens=False)
    if again == prompt:
        yield Finding("ok", "template", f"tokenising ({len(ids)} tokens) and decoding leaves the prompt unchanged")
    else:
        pairs = enumerate(zip(again, prompt, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(again), len(prompt)))
        was, now = prompt[at : at + 20], again[at : at + 20]
        text = f"tokenising and decoding changes the prompt at character {at}: {was!r} became {now!r}"
        yield Finding("warning", "template", text, "the model reads a different text than the template writes")
    if TOOL["function"]["name"] not in prompt:
        yield Finding("error", "template", "the tools do not appear in the prompt", "use a template that writes tools")
    how = "as the template writes it" if chat.native else "explained in the system message, with the tools"
    yield Finding("ok", "tool format", f"{chat.form.name}, {how}: {one_line(chat.form.example)}")
    yield _prefix(chat, prompt, whole, ids)
    yield from _conversations(chat)
    yield from _self_evaluation(chat, config)


def _self_evaluation(chat: Chat, config: Config) -> Iterator[Finding]:
    s = config.self_eval
    gold, remedy = chat.encode(ANSWER) if s.reference == "gold" else None, "use another template or tokenizer"
    ids, findings = _refused("self-evaluation", remedy, lambda: answer_ids(chat, s.letters))
    findings += _refused("self-evaluation", remedy, lambda: evaluation_frame(chat, gold, s.scale))[1]
    yield from findings or [
        Finding("ok", "self-evaluation", f"the answers {', '.join(s.letters)} are the tokens {ids}")
    ]


def _render(chat: Chat, messages: tuple[dict[str, str], ...]) -> tuple[str, str]:
    """Renders the prompt alone, and the conversation with the answer."""
    prompt = chat.render(messages, (TOOL,), add_generation_prompt=True)
    answered = (*messages, {"role": "assistant", "content": ANSWER})
    return prompt, chat.render(answered, (TOOL,), add_generation_prompt=False)


def _prefix(chat: Chat, prompt: str, whole: str, ids: list[int]) -> Finding:
    """Checks that a conversation begins with its prompt: as text, and as tokens up to where the loss begins."""
    what, own = "loss mask", [*ids, *chat.target_ids(ANSWER)]
    if not whole.startswith(prompt):
        text = "the prompt is not a prefix of the same conversation with its answer"
        mend = "training and sampling here agree, but other trainers may use this template differently"
        return Finding("warning", what, text, mend)
    if chat.encode(whole)[: len(own)] != own:
        text = "tokenising prompt and answer separately gives other tokens than tokenising both together"
        return Finding(
            "warning", what, text, "serve with the same template: the model is trained on separately tokenised answers"
        )
    return Finding(
        "ok", what, f"the prompt's {len(ids)} tokens are a prefix of the answered conversation; the answer's follow"
    )


def _conversations(chat: Chat) -> Iterator[Finding]:
    """Compares the tokens of training with those that the template writes for whole conversations."""
    what, agree = "conversations", []
    for name, (messages, answer) in CONVERSATIONS.items():
        try:
            own = [*chat.prompt_ids(messages, (TOOL,)), *chat.target_ids(answer)]
            answered = [*messages, {"role": "assistant", "content": answer}]
            whole = chat.encode(chat.render(answered, (TOOL,), add_generation_prompt=False))
        except ValueError as error:
            yield Finding("warning", what, f"{name}: {one_line(error)}", "such conversations cannot be used")
            continue
        if whole[: len(own)] == own:
            agree.append(name)
            continue
        at = next((i for i, pair in enumerate(zip(own, whole, strict=False)) if pair[0] != pair[1]), len(whole))
        ours, theirs = (chat.tokenizer.decode(ids[max(at - 4, 0) : at + 12]) for ids in (own, whole))
        text = f"{name}: training sees {ours!r} where the template's whole conversation has {theirs!r}"
        yield Finding("warning", what, text, "serve turn by turn with the same template, as training renders them")
    if agree:
        yield Finding("ok", what, f"training's tokens are the template's: {', '.join(agree)}")


# Data -------------------------------------------------------------------------------------------------------


class Shown(NamedTuple):
    """A sample to show."""

    sample: Sample
    encoded: Encoded


def data(config: Config) -> tuple[list[Finding], list[Shown]]:
    """Checks the data as a run would load it, and picks samples of it: a call and a text, if there are any."""
    skipped: list[str] = []
    remedy = "check --data; --skip_bad_rows skips wrong rows"
    made, findings = _refused("data", remedy, lambda: divide(config, skipped))
    if made is None:
        return [f._replace(text=f"{f.text}; {_first(skipped)}") if skipped else f for f in findings], []
    train, limit = made[0]["train"], load_base(config).config.max_length
    lengths = sorted(len(row.prompt_ids) + len(row.target_ids) for row in train.encoded)
    counts = ", ".join(f"{len(part.samples)} {name}" for name, part in made[0].items())
    text = f"{counts}; median {statistics.median(lengths):.0f} tokens, longest {lengths[-1]}, context {limit}"
    findings = [Finding("ok", "data", text), *(Finding("ok", "data", line.strip()) for line in left_out_lines(made[1]))]
    wrong = target_faults([sample for part in made[0].values() for sample in part.samples])
    findings += [Finding("warning", "data", line.strip(), "mend the rows") for line in fault_lines(wrong)]
    if config.benchmark is None:
        findings += _refused("evaluation", "", lambda: require_part(config))[1]
    if skipped:
        level = "warning" if config.skip_bad_rows else "error"
        remedy = "they are skipped" if config.skip_bad_rows else "fix them, or skip them with --skip_bad_rows"
        findings.append(Finding(level, "data", _first(skipped), remedy))
    _, short = _refused("data", "add data", lambda: divide_replay(config, train.samples))
    if (tokens := config.search.max_last_step_tokens) + lengths[-1] > limit:
        text = f"a last step of {tokens} tokens after the longest sample exceeds the context"
        mend = "responses are cut off at the context limit; lower search.max_last_step_tokens if that matters"
        short.append(Finding("warning", "data", text, mend))
    by_kind: dict[bool, Shown] = {}
    for sample, row in zip(train.samples, train.encoded, strict=True):
        by_kind.setdefault(looks_like_calls(sample.target), Shown(sample, row))
    return findings + short, [by_kind[kind] for kind in (True, False) if kind in by_kind]


def _first(skipped: Sequence[str]) -> str:
    first = "; ".join(" ".join(line.split())[:200] for line in skipped[:LISTED])
    return f"{len(skipped)} rows are wrong or too long, the first: {first}"


def preview(config: Config, shown: Shown) -> Iterator[Text]:
    """Yields the end of a prompt, the trained tokens one by one, and the steps a search would take."""
    chat = load_base(config).chat
    decode = chat.tokenizer.decode
    prompt = harmless(decode(shown.encoded.prompt_ids, skip_special_tokens=False))
    before = Text("not trained  ", style="bold").append(f"…{prompt[-SHOWN:]}" if len(prompt) > SHOWN else prompt, "dim")
    trained = Text("trained      ", style="bold")
    for number, token in enumerate(shown.encoded.target_ids):  # two alternating shades separate the tokens
        trained.append(_visible(chat, token), "black on green" if number % 2 else "black on bright_green")
    steps = Text("steps        ", style="bold")
    table = step_table(config, config.search.granularity)
    for number, step in enumerate(split_steps(table, shown.encoded.target_ids)):
        steps.append(" | " if number else "", "bold red").append(harmless(decode(step, skip_special_tokens=False)))
    yield Text(f"sample {shown.sample.id}: {len(shown.encoded.prompt_ids)} prompt tokens, then the target")
    yield from (before, trained, steps)


def _visible(chat: Chat, token: int) -> str:
    """Decodes a token, with line ends and partial characters made visible."""
    text = chat.tokenizer.decode([token], skip_special_tokens=False).replace("�", "·")
    return harmless(text).replace("\n", "\\n")
