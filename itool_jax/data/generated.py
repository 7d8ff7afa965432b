"""The generated tool-use corpora: a seed, a part and a count in, `Sample`s out, always the same ones.

`pretraining` trains the embedded checkpoint: its own domains, and tools whose words are drawn at random.
`train`, `validation` and `test` are the default task: other domains, with tools and names that no other part has;
`test_known` has the names of `test` and the tools of `train`.

The golds of the task are written by one writer or by several with habits of their own, as real tool data is a mixture.
All spellings are right by the reward, and a request is the same whoever writes its answer.
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
KNOWN: Literal["test_known"] = "test_known"  # the part without tools and names of its own: train's tools, test's names

# Shares, in percent, of the kinds of samples, and how many calls those of two kinds ask for.
PRETRAINING_KINDS = {"calls": 70, "irrelevance": 15, "multi_turn": 15}
TASK_KINDS = {"calls": 60, "long": 10, "irrelevance": 15, "multi_turn": 15}
N_CALLS = {"calls": (1, 1, 1, 2, 2, 3), "long": (4, 5, 6)}

ArgumentOrder = Literal["schema", "alphabetical", "reversed", "as_asked"]
CallOrder = Literal["as_asked", "reversed", "by_name"]


class Manner(NamedTuple):
    """How people speak in a corpus."""

    synonyms: float  # share of requests that use other words than the tool's name does
    shuffled: float  # share of requests that name parameters in another order than the tool does


PRETRAINING_MANNER = Manner(synonyms=0.4, shuffled=0.4)
TASK_MANNER = Manner(synonyms=0.5, shuffled=0.5)


class Writer(NamedTuple):
    """The habits of one who writes answers; a writer has them in every answer."""

    arguments: ArgumentOrder
    """Order of a call's arguments: as in the schema, alphabetical, the schema's reversed, or as in the request."""
    calls: CallOrder
    """Order of parallel calls: as the request asks for them, the reverse, or by the tools' names."""
    defaults: bool
    """Whether optional arguments that the request does not mention are written out with their default."""


CLEAN = Writer("schema", "as_asked", defaults=False)


class Tool(NamedTuple):
    """A tool and the words people may use for it."""

    name: str
    description: str
    parameters: tuple[Parameter, ...]
    required: tuple[str, ...]
    spoken: tuple[str, ...]  # the name's own words first
    meaning: str

    def schema(self) -> dict[str, Any]:
        """The tool as an OpenAI function schema."""
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
    """One call and the words that ask for it."""

    tool: Tool
    arguments: dict[str, Any]  # in the order in which the words speak of them
    words: str

    def call(self, writer: Writer = CLEAN) -> str:
        """The call as a writer spells it."""
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
    """The writer of a sample among `writers`, by a hash of its id: nothing in the prompt tells who it is.

    Among twelve, each order of arguments goes with each order of calls once; one writer is `CLEAN`.
    """
    number = _hash(f"writer of {sample_id}") % writers
    arguments, calls = get_args(ArgumentOrder), get_args(CallOrder)
    return Writer(arguments[number % len(arguments)], calls[number % len(calls)], defaults=number // 3 % 2 == 1)


def _answer(requests: Sequence[Request], writer: Writer) -> str:
    """The list of calls as a writer spells it."""
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
    """A made-up name that belongs to `part`."""
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
    """All tools of a domain that belong to a part; the task's tools are fixed, those of pretraining vary."""
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
    """A tool whose optional parameters have defaults, but for those that take a name."""
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
    """Tools whose verbs, things and parameters are any words at all: they can only be told apart by reading."""
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
    """A call of `tool` and its words; `given` fixes one parameter: its name, value and phrase."""
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
    """`count` distractors, half of them sharing a word with a wanted tool; no two tools mean or are called the same."""
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
    """A finished exchange about `tool`, and the parameter that the next question takes from it."""
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
    """Earlier turns, the tools of both turns, and a request that refers back."""
    first = rng.choice(pool)
    turns, given = _earlier_turns(rng, first, part, writer)
    fits = [t for t in pool if any(_takes_name(p) and given[0] in ("", p.name) for p in t.parameters)]
    if not fits:  # nothing takes a name: ask for the same tool once more
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
    """Sample number `index` of a part; `category` is its kind: calls, long, irrelevance or multi_turn.

    How many `writers` there are changes how calls are spelt, and nothing else.
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
    """Up to `count` tools of different names and meanings."""
    chosen: list[Tool] = []
    for tool in rng.sample(pool, min(len(pool), 4 * count)):
        if len(chosen) < count and all(tool.name != t.name and tool.meaning != t.meaning for t in chosen):
            chosen.append(tool)
    return chosen


def generate(part: Part, count: int, seed: int = 0, writers: int = 1) -> list[Sample]:
    """The first `count` samples of a part."""
    return [make_sample(part, index, seed, writers) for index in range(count)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeneratedSettings:
    """Sizes of the generated corpus, and who writes its answers."""

    train: int = 4000
    """Training samples: warm-up and replay buffer."""
    validation: int = 600
    """Samples for choosing settings, with tools and names that no other part has."""
    test: int = 2400
    """Samples for claims, with names that no other part has: tools that no other part has and tools of the training
    samples take turns."""
    writers: int = 1
    """How many write the answers, each with habits of their own: the order of arguments and of parallel calls, and
    whether defaults are written out. All spellings are right; 1 writes every answer one way."""

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test", "writers"):
            if getattr(self, name) < 1:
                raise ValueError(f"generated.{name} must be positive, got {getattr(self, name)}")


def splits(settings: GeneratedSettings) -> dict[str, list[Sample]]:
    """The default task: its train, validation and test split, always the same samples."""
    turns: tuple[Part, Part] = ("test", KNOWN)
    return {
        "train": generate("train", settings.train, writers=settings.writers),
        "validation": generate("validation", settings.validation, writers=settings.writers),
        "test": [make_sample(turns[i % 2], i // 2, 0, settings.writers) for i in range(settings.test)],
    }
