"""Generates tool-use corpora: a seed, a part and a count in, `Sample`s out, always the same ones.

`pretraining` trains the embedded checkpoint; it has its own domains, and tools whose words are drawn at random.
`train`, `validation` and `test` are the default task: other domains, each part with its own tools and names.
`test_known` has the names of `test` and the tools of `train`.

The task's golds come from one writer, or from several with different habits, since real tool data is a mixture. The
reward accepts all spellings, and a request does not depend on who writes its answer.
"""

import dataclasses
import functools
import hashlib
import random
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from itool_jax.data import lexicon
from itool_jax.data.lexicon import Domain, Parameter
from itool_jax.text.sample import Sample

Part = Literal["pretraining", "pretraining_test", "train", "validation", "test", "test_known"]

# Shares, in percent, of the task's tools and of all made-up names that belong to each part.
TOOL_SHARES = {"train": 60, "validation": 15, "test": 25}
NAME_SHARES = {"pretraining": 40, "pretraining_test": 10, "train": 25, "validation": 10, "test": 15}
KNOWN: Literal["test_known"] = "test_known"  # no tools or names of its own: train's tools, test's names

# Shares of the kinds of samples, in percent, and the possible numbers of calls for two kinds.
PRETRAINING_KINDS = {"calls": 70, "irrelevance": 15, "multi_turn": 15}
TASK_KINDS = {"calls": 60, "long": 10, "irrelevance": 15, "multi_turn": 15}
N_CALLS = {"calls": (1, 1, 1, 2, 2, 3), "long": (4, 5, 6)}

ArgumentOrder = Literal["schema", "alphabetical", "reversed", "as_asked"]
CallOrder = Literal["as_asked", "reversed", "by_name"]


class Manner(NamedTuple):
    """Style of the requests in a corpus."""

    synonyms: float  # share of requests with other words than the tool's name
    shuffled: float  # share of requests with the parameters in shuffled order


PRETRAINING_MANNER = Manner(synonyms=0.4, shuffled=0.4)
TASK_MANNER = Manner(synonyms=0.5, shuffled=0.5)


class Writer(NamedTuple):
    """Habits of a writer of answers, the same in all answers."""

    arguments: ArgumentOrder
    """Order of a call's arguments: as in the schema, alphabetical, reversed schema, or as in the request."""
    calls: CallOrder
    """Order of parallel calls: as in the request, reversed, or by tool name."""
    defaults: bool
    """True to write optional arguments that the request does not mention, with their default."""


CLEAN = Writer("schema", "as_asked", defaults=False)


class Tool(NamedTuple):
    """A tool and the words that requests may use for it."""

    name: str
    description: str
    parameters: tuple[Parameter, ...]
    required: tuple[str, ...]
    spoken: tuple[str, ...]  # the name's own words first
    meaning: str

    def schema(self) -> dict[str, Any]:
        """Returns the tool as an OpenAI function schema."""
        properties = {
            p.name: {"type": p.type}
            | ({"enum": list(p.options)} if p.options else {})
            | ({"default": p.default} if p.default is not None else {})
            for p in self.parameters
        }
        parameters = {"type": "object", "properties": properties, "required": list(self.required)}
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


class Request(NamedTuple):
    """One call and the words that request it."""

    tool: Tool
    arguments: dict[str, Any]  # in the order of the words
    words: str

    def call(self, writer: Writer = CLEAN) -> str:
        """Returns the call as a writer spells it."""
        arguments = dict(self.arguments)
        if writer.defaults:
            optional = {p.name: p.default for p in self.tool.parameters if p.default is not None}
            arguments |= {name: value for name, value in optional.items() if name not in arguments}
        names = [p.name for p in self.tool.parameters if p.name in arguments]
        if writer.arguments == "as_asked":
            names = list(arguments)
        elif writer.arguments != "schema":
            names = names[::-1] if writer.arguments == "reversed" else sorted(names)
        return f"{self.tool.name}({', '.join(f'{name}={_literal(arguments[name])}' for name in names)})"


def writer_of(sample_id: str, writers: int) -> Writer:
    """Chooses one of `writers` for a sample by a hash of its id, so the prompt does not reveal the writer.

    Twelve writers cover each pair of argument order and call order once; a single writer is `CLEAN`.
    """
    number = _hash(f"writer of {sample_id}") % writers
    arguments, calls = get_args(ArgumentOrder), get_args(CallOrder)
    return Writer(arguments[number % len(arguments)], calls[number % len(calls)], defaults=number // 3 % 2 == 1)


def _answer(requests: Sequence[Request], writer: Writer) -> str:
    """Returns the list of calls as a writer spells it."""
    ordered = sorted(requests, key=lambda request: request.tool.name) if writer.calls == "by_name" else requests
    ordered = ordered[::-1] if writer.calls == "reversed" else ordered
    return f"[{', '.join(request.call(writer) for request in ordered)}]"


def _is_pretraining(part: Part) -> bool:
    return part.startswith("pretraining")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _share_of(text: str, shares: dict[str, int]) -> str:
    position = _hash(text) % sum(shares.values())
    for name, share in shares.items():
        if (position := position - share) < 0:
            return name
    raise AssertionError("shares cover every position")


def _name(rng: random.Random, part: Part) -> str:
    """Draws a made-up name that belongs to `part`."""
    owner = "test" if part == KNOWN else part
    while True:
        name = rng.choice(lexicon.NAME_STARTS) + rng.choice(lexicon.NAME_ENDS)
        if _share_of(name, NAME_SHARES) == owner:
            return name


def _tool(rng: random.Random, verb: Sequence[str], thing: Sequence[str], parameters: Sequence[Parameter]) -> Tool:
    chosen = rng.sample(parameters, k=min(len(parameters), rng.choice((1, 2, 2, 3, 3, 4))))
    required = tuple(p.name for i, p in enumerate(chosen) if i == 0 or rng.random() < 0.6)
    (verb_1, verb_2), (thing_1, thing_2) = rng.sample(verb, 2), rng.sample(thing, 2)
    spoken = tuple(f"{v} a {t}" for v in (verb_1, verb_2) for t in (thing_1, thing_2))
    name, description, meaning = f"{verb_1}_{thing_1}", f"{verb_2} {thing_2}", f"{verb[0]} {thing[0]}"
    return Tool(name, description, tuple(chosen), required, spoken, meaning)


def _domain_tools(part: Part, domain: Domain, rng: random.Random) -> list[Tool]:
    """Returns all tools of a domain that belong to a part; the task's tools are fixed, those of pretraining vary."""
    if _is_pretraining(part):
        pairs = [(v, t) for v in rng.sample(lexicon.VERBS, 6) for t in domain.things]
        return [_tool(rng, v, t, domain.parameters) for v, t in pairs]
    return list(_task_tools("train" if part == KNOWN else part, domain))


@functools.cache
def _task_tools(part: Part, domain: Domain) -> tuple[Tool, ...]:
    pairs = [(v, t) for v in lexicon.VERBS + lexicon.TASK_VERBS for t in domain.things]
    mine = [(v, t) for v, t in pairs if _share_of(f"{v[0]} {t[0]}", TOOL_SHARES) == part]
    return tuple(_task_tool(v, t, domain.parameters) for v, t in mine)


def _task_tool(verb: Sequence[str], thing: Sequence[str], parameters: Sequence[Parameter]) -> Tool:
    """Makes a tool whose optional parameters have defaults, except those that take a name."""
    rng = random.Random(f"{verb[0]} {thing[0]}")
    tool = _tool(rng, verb, thing, parameters)
    return tool._replace(
        parameters=tuple(
            p if p.name in tool.required or _takes_name(p) else p._replace(default=_value(rng, p, "train"))
            for p in tool.parameters
        )
    )


def _takes_name(parameter: Parameter) -> bool:
    return parameter.type == "string" and not parameter.options


def _random_tools(rng: random.Random) -> list[Tool]:
    """Makes tools with random words as verbs, things and parameters, so that only reading can tell them apart."""
    words = list(lexicon.words())
    verbs = [rng.sample(words, 2) for _ in range(4)]
    things = [rng.sample(words, 2) for _ in range(3)]
    names = rng.sample(words, 6)
    parameters = [_random_parameter(rng, name, words) for name in names]
    return [_tool(rng, v, t, parameters) for v in verbs for t in things]


def _random_parameter(rng: random.Random, name: str, words: list[str]) -> Parameter:
    kind = rng.choice(("string", "string", "string", "integer", "number", "boolean", "enum"))
    if kind == "enum":
        return Parameter(name, "string", (f"as {{}} {name}",), tuple(rng.sample(words, 3)))
    return Parameter(name, kind, (f"with {name}", f"without {name}") if kind == "boolean" else (f"{name} {{}}",))


def _value(rng: random.Random, parameter: Parameter, part: Part) -> Any:
    if parameter.options:
        return rng.choice(parameter.options)
    if parameter.type == "string":
        return _name(rng, part)
    if parameter.type == "integer":
        return rng.randint(2, 99)
    if parameter.type == "number":
        return round(rng.randint(1, 99) + rng.randint(1, 9) / 10, 1)
    return rng.random() < 0.5


def _phrase(rng: random.Random, parameter: Parameter, value: Any) -> str:
    if parameter.type == "boolean":
        plain = f"with {parameter.name} {'on' if value else 'off'}"
        return plain if rng.random() < 0.3 else parameter.phrases[0 if value else 1]
    spoken = rng.choice(parameter.phrases) if rng.random() < 0.7 else f"with {parameter.name} {{}}"
    return spoken.format(value)


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


def _request(rng: random.Random, tool: Tool, part: Part, given: tuple[str, Any, str] | None = None) -> Request:
    """Draws a call of `tool` and its words; `given` fixes the name, value and phrase of one parameter."""
    said: list[tuple[str, Any, str]] = []  # name, value and phrase
    for parameter in tool.parameters:
        if given is not None and parameter.name == given[0]:
            said.append(given)
        elif parameter.name in tool.required or rng.random() < 0.5:
            value = _value(rng, parameter, part)
            said.append((parameter.name, value, _phrase(rng, parameter, value)))
    manner = PRETRAINING_MANNER if _is_pretraining(part) else TASK_MANNER
    if rng.random() < manner.shuffled:
        rng.shuffle(said)
    spoken = rng.choice(tool.spoken[1:]) if rng.random() < manner.synonyms else tool.spoken[0]
    words = " ".join([spoken, *(phrase for _, _, phrase in said)])
    return Request(tool, {name: value for name, value, _ in said}, words)


def _candidates(rng: random.Random, wanted: list[Tool], pool: list[Tool], count: int) -> list[Tool]:
    """Draws up to `count` distractors, half of them sharing a word with a wanted tool; no name or meaning repeats."""
    words = {word for tool in wanted for word in tool.name.split("_")}
    others = rng.sample(pool, len(pool))
    close = [tool for tool in others if words & set(tool.name.split("_"))]
    chosen: list[Tool] = []
    while len(chosen) < count and others:
        tool = close.pop() if close and rng.random() < 0.5 else others.pop()
        if all(tool.name != other.name and tool.meaning != other.meaning for other in wanted + chosen):
            chosen.append(tool)
    return chosen


def _sentence(rng: random.Random, requests: list[Request]) -> str:
    joint = rng.choice(lexicon.JOINTS)
    opening = rng.choice(lexicon.OPENINGS) + " " if rng.random() < 0.5 else ""
    return opening + joint.join(request.words for request in requests)


def _earlier_turns(
    rng: random.Random, tool: Tool, part: Part, writer: Writer
) -> tuple[list[dict[str, str]], tuple[str, Any, str]]:
    """Makes a finished exchange about `tool`, and the parameter that the next request takes from it."""
    first = _request(rng, tool, part)
    result = _name(rng, part)
    turns = [
        {"role": "user", "content": _sentence(rng, [first])},
        {"role": "assistant", "content": _answer([first], writer)},
        {"role": "tool", "content": f"result {result}"},
    ]
    call = first.call()
    strings = [p.name for p in tool.parameters if f'{p.name}="' in call and not p.options]
    if strings and rng.random() < 0.5:
        name = rng.choice(strings)
        value = call.split(f'{name}="')[1].split('"')[0]
        return turns, (name, value, f"with the same {name}")
    return turns, ("", result, "")


def _follow_up(
    rng: random.Random, pool: list[Tool], part: Part, writer: Writer
) -> tuple[list[dict[str, str]], list[Tool], Request]:
    """Makes earlier turns, the tools of both turns, and a request that refers back."""
    first = rng.choice(pool)
    turns, given = _earlier_turns(rng, first, part, writer)
    fits = [t for t in pool if any(_takes_name(p) and given[0] in ("", p.name) for p in t.parameters)]
    if not fits:  # no parameter takes a name: request the same tool again
        return turns, [first], _request(rng, first, part)
    tool = rng.choice(fits)
    if not given[0]:
        name = rng.choice([p.name for p in tool.parameters if _takes_name(p)])
        given = (name, given[1], f"with {name} from the result")
    return turns, list(dict.fromkeys([first, tool])), _request(rng, tool, part, given)


def _pool(rng: random.Random, part: Part) -> list[Tool]:
    if part == "pretraining" and rng.random() < 0.4:
        return _random_tools(rng)
    domains = lexicon.PRETRAINING_DOMAINS if _is_pretraining(part) else lexicon.TASK_DOMAINS
    chosen = rng.sample(domains, rng.choice((1, 1, 2)))
    return [tool for domain in chosen for tool in _domain_tools(part, domain, rng)]


def make_sample(part: Part, index: int, seed: int, writers: int = 1) -> Sample:
    """Makes sample number `index` of a part; its `category` is calls, long, irrelevance or multi_turn.

    The number of `writers` changes only how calls are spelt.
    """
    sample_id = f"{part}-{seed}-{index}"
    rng, writer = random.Random(f"{seed}/{part}/{index}"), writer_of(sample_id, writers)
    pool = _pool(rng, part)
    kinds = PRETRAINING_KINDS if _is_pretraining(part) else TASK_KINDS
    kind = rng.choices(list(kinds), weights=list(kinds.values()))[0]
    turns: list[dict[str, str]] = []
    if kind == "multi_turn":
        turns, wanted, request = _follow_up(rng, pool, part, writer)
        requests = [request]
    else:
        wanted = _distinct(rng, pool, rng.choice(N_CALLS[kind]) if kind in N_CALLS else 1)
        requests = [_request(rng, tool, part) for tool in wanted]
    distractors = _candidates(rng, wanted, pool, rng.randint(1, 2 if kind == "long" else 6))
    tools = distractors if kind == "irrelevance" else wanted + distractors
    rng.shuffle(tools)
    return Sample(
        id=sample_id,
        messages=(*turns, {"role": "user", "content": _sentence(rng, requests)}),
        tools=tuple(tool.schema() for tool in tools),
        target=lexicon.REFUSAL if kind == "irrelevance" else _answer(requests, writer),
        category=kind,
    )


def _distinct(rng: random.Random, pool: list[Tool], count: int) -> list[Tool]:
    """Draws up to `count` tools with different names and meanings."""
    chosen: list[Tool] = []
    for tool in rng.sample(pool, min(len(pool), 4 * count)):
        if len(chosen) < count and all(tool.name != t.name and tool.meaning != t.meaning for t in chosen):
            chosen.append(tool)
    return chosen


def generate(part: Part, count: int, seed: int = 0, writers: int = 1) -> list[Sample]:
    """Generates the first `count` samples of a part."""
    return [make_sample(part, index, seed, writers) for index in range(count)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedSettings:
    """Sizes of the generated corpus, and its number of writers."""

    train: int = 4000
    """Number of training samples, for warm-up and replay buffer."""
    validation: int = 600
    """Number of validation samples, for choosing settings. Their tools and names are in no other part."""
    test: int = 2400
    """Number of test samples, for final results. Their names are in no other part. Their tools alternate between new
    ones, in no other part, and those of the training samples."""
    writers: int = 1
    """Number of writers of the answers. Writers differ in the order of arguments and of parallel calls, and in whether
    they write out defaults; all spellings are right. 1 = all answers in one style."""

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test", "writers"):
            if getattr(self, name) < 1:
                raise ValueError(f"generated.{name} must be positive, got {getattr(self, name)}")


def splits(settings: GeneratedSettings) -> dict[str, list[Sample]]:
    """Returns the default task's train, validation and test splits, always the same samples."""
    turns: tuple[Part, Part] = ("test", KNOWN)
    return {
        "train": generate("train", settings.train, writers=settings.writers),
        "validation": generate("validation", settings.validation, writers=settings.writers),
        "test": [make_sample(turns[i % 2], i // 2, 0, settings.writers) for i in range(settings.test)],
    }
