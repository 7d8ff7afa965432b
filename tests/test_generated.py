"""The generated corpora: always the same, never mixed, and every gold follows from what was said."""

import itertools
import re
from collections import Counter
from typing import Any, get_args

import pytest

from itool_jax.data import generated, lexicon
from itool_jax.data.generated import GeneratedSettings, Part, generate, make_sample
from itool_jax.text.calls import Call, read_calls
from itool_jax.text.sample import Sample

PARTS: tuple[Part, ...] = get_args(Part)
TASK: tuple[Part, ...] = ("train", "validation", "test")
COUNT = 400
NAMES = {start + end for start in lexicon.NAME_STARTS for end in lexicon.NAME_ENDS}
VERBS = {word: verb[0] for verb in lexicon.VERBS + lexicon.TASK_VERBS for word in verb}
TASK_THINGS = {word: thing[0] for domain in lexicon.TASK_DOMAINS for thing in domain.things for word in thing}
THINGS = TASK_THINGS | {w: thing[0] for d in lexicon.PRETRAINING_DOMAINS for thing in d.things for w in thing}
JSON_TYPES = {"string": str, "integer": int, "number": float, "boolean": bool}

Tool = dict[str, Any]


@pytest.fixture(scope="module")
def corpora() -> dict[Part, list[Sample]]:
    return {part: generate(part, COUNT) for part in PARTS}


def tools_of(sample: Sample) -> dict[str, Tool]:
    return {tool["function"]["name"]: tool["function"] for tool in sample.tools}


def calls_of(sample: Sample) -> list[Call]:
    return read_calls(sample.target) or []


def conversation(sample: Sample) -> str:
    return "\n".join(message["content"] for message in sample.messages)


def spoken(tool: Tool) -> re.Pattern[str]:
    """Every way to ask for a tool: its own words, and the synonyms in its description."""
    verbs, things = zip(tool["name"].split("_"), tool["description"].split(), strict=True)
    return re.compile(rf"\b({'|'.join(verbs)}) a ({'|'.join(things)})\b")


def meaning(name: str) -> tuple[str, str] | None:
    """A domain tool's verb and thing, synonyms made one; None for tools of random words."""
    verb, thing = name.split("_")
    return (VERBS[verb], THINGS[thing]) if verb in VERBS and thing in THINGS else None


def meanings(samples: list[Sample]) -> set[tuple[str, str]]:
    found = {meaning(name) for sample in samples for name in tools_of(sample)}
    return {pair for pair in found if pair is not None}


# The same ones, and each part its own ------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_a_sample_depends_on_part_index_and_seed_alone(corpora: dict[Part, list[Sample]], part: Part) -> None:
    samples = corpora[part]
    assert len(samples) == COUNT
    assert len({sample.id for sample in samples}) == COUNT
    assert generate(part, 30) == samples[:30]
    assert [make_sample(part, i, 0) for i in (29, 3)] == [samples[29], samples[3]]
    other = generate(part, 30, seed=1)
    assert not {sample.id for sample in other} & {sample.id for sample in samples}
    assert all(one.messages != two.messages for one, two in zip(other, samples, strict=False))


def test_samples_are_not_repeated(corpora: dict[Part, list[Sample]]) -> None:
    texts = Counter(conversation(sample) for samples in corpora.values() for sample in samples)
    assert sum(count - 1 for count in texts.values()) < 0.02 * COUNT * len(PARTS)
    asked = {part: {conversation(sample) for sample in samples} for part, samples in corpora.items()}
    assert not asked["test"] & (asked["train"] | asked["validation"] | asked["pretraining"])


def test_the_two_sets_of_domains_share_no_thing_and_no_parameter() -> None:
    domains = (lexicon.PRETRAINING_DOMAINS, lexicon.TASK_DOMAINS)
    for words_of in (
        lambda domain: {word for thing in domain.things for word in thing},
        lambda domain: {parameter.name for parameter in domain.parameters},
    ):
        own, task = (set().union(*map(words_of, side)) for side in domains)
        assert min(len(own), len(task)) >= 40
        assert not own & task
    names = [domain.name for side in domains for domain in side]
    assert len(set(names)) == len(names)


def test_no_word_is_a_verb_twice_or_a_thing_twice() -> None:
    """Else two tools of different meaning could be called the same."""
    domains = lexicon.PRETRAINING_DOMAINS + lexicon.TASK_DOMAINS
    for groups in (lexicon.VERBS + lexicon.TASK_VERBS, [thing for domain in domains for thing in domain.things]):
        words = [word for group in groups for word in group]
        assert all(len(group) == 2 for group in groups)
        assert len(set(words)) == len(words)


def test_parts_share_no_tool(corpora: dict[Part, list[Sample]]) -> None:
    found = {part: meanings(corpora[part]) for part in PARTS if part != "pretraining"}
    assert min(map(len, found.values())) > 100
    for (a, one), (b, two) in itertools.combinations(found.items(), 2):
        assert not one & two, (a, b)
    every = {(verb, thing) for verb in VERBS.values() for thing in TASK_THINGS.values()}
    assert set().union(*(found[part] for part in TASK)) <= every
    assert {thing for _, thing in found["pretraining_test"]}.isdisjoint(TASK_THINGS.values())


def test_pretraining_meets_the_tasks_tools_by_chance_only(corpora: dict[Part, list[Sample]]) -> None:
    """Its tools of random words draw on all words, so that every one is trained; few make a task's tool."""
    tools = [tool for sample in corpora["pretraining"] for tool in tools_of(sample).values()]
    task = [tool for part in TASK for sample in corpora[part] for tool in tools_of(sample).values()]
    likened = [tool for tool in tools if (pair := meaning(tool["name"])) and pair[1] in TASK_THINGS.values()]
    assert len(likened) < 0.02 * len(tools)
    signatures = ({(t["name"], *t["parameters"]["properties"]) for t in side} for side in (tools, task))
    assert not set.intersection(*signatures)
    assert sum(meaning(tool["name"]) is None for tool in tools) > 0.2 * len(tools)


def test_parts_share_no_made_up_name(corpora: dict[Part, list[Sample]]) -> None:
    words = {
        part: {word for sample in samples for word in re.findall(r"\w+", f"{conversation(sample)} {sample.target}")}
        for part, samples in corpora.items()
    }
    names = {part: found & NAMES for part, found in words.items()}
    assert min(map(len, names.values())) > 200
    for (a, one), (b, two) in itertools.combinations(names.items(), 2):
        assert not one & two, (a, b)
    capitals = set().union(*words.values()) - set().union(*names.values())
    assert {word for word in capitals if word[0].isupper()} == {"None", "True", "False"}


# What a sample holds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_kinds_come_in_their_shares(corpora: dict[Part, list[Sample]], part: Part) -> None:
    kinds = Counter(sample.category for sample in corpora[part])
    assert kinds.keys() == {"calls", "irrelevance", "multi_turn"}
    for kind, share in (("calls", 0.70), ("irrelevance", 0.15), ("multi_turn", 0.15)):
        assert kinds[kind] / COUNT == pytest.approx(share, abs=0.06)
    lengths = Counter(len(calls_of(sample)) for sample in corpora[part] if sample.category == "calls")
    assert lengths.keys() == {1, 2, 3}
    assert lengths[1] > lengths[2] > lengths[3] > 0.05 * COUNT
    offered = [len(sample.tools) for sample in corpora[part]]
    assert min(offered) == 1
    assert max(offered) >= 8


def fits(value: Any, schema: Tool) -> bool:
    return type(value) is JSON_TYPES[schema["type"]] and value in schema.get("enum", [value])


@pytest.mark.parametrize("part", PARTS)
def test_every_gold_is_a_valid_use_of_the_offered_tools(corpora: dict[Part, list[Sample]], part: Part) -> None:
    types = set()
    for sample in corpora[part]:
        tools, calls = tools_of(sample), calls_of(sample)
        assert len(tools) == len(sample.tools), "two tools of one name"
        assert bool(calls) == (sample.category != "irrelevance")
        assert calls or sample.target == lexicon.REFUSAL
        for call in calls:
            parameters = tools[call.name]["parameters"]
            assert set(parameters["required"]) <= set(call.arguments) <= set(parameters["properties"])
            for name, value in call.arguments.items():
                assert fits(value, parameters["properties"][name]), (sample.id, name)
                types.add(type(value))
    assert types == set(JSON_TYPES.values())


@pytest.mark.parametrize("part", PARTS)
def test_every_value_was_said(corpora: dict[Part, list[Sample]], part: Part) -> None:
    asked = 0
    for sample in corpora[part]:
        said = set(re.findall(r"[\w.]*\w", conversation(sample)))
        for value in [value for call in calls_of(sample) for value in call.arguments.values()]:
            assert isinstance(value, bool) or str(value) in said, sample.id
            asked += 1
    assert asked > COUNT


@pytest.mark.parametrize("part", PARTS)
def test_the_needed_tool_is_offered_where_there_are_calls_and_only_there(
    corpora: dict[Part, list[Sample]], part: Part
) -> None:
    for sample in corpora[part]:
        question = sample.messages[-1]["content"]
        asked = {name for name, tool in tools_of(sample).items() if spoken(tool).search(question)}
        assert asked == {call.name for call in calls_of(sample)}, sample.id
        assert re.search(r"\w+ a \w+", question)


@pytest.mark.parametrize("part", PARTS)
def test_later_turns_refer_back(corpora: dict[Part, list[Sample]], part: Part) -> None:
    referring = 0
    for sample in corpora[part]:
        roles = [message["role"] for message in sample.messages]
        if sample.category != "multi_turn":
            assert roles == ["user"]
            continue
        assert roles == ["user", "assistant", "tool", "user"]
        (first,) = read_calls(sample.messages[1]["content"]) or []
        (call,) = calls_of(sample)
        assert first.name in tools_of(sample)
        result = sample.messages[2]["content"].split()[-1]
        question = sample.messages[-1]["content"]
        for name in re.findall(r"with (\w+) from the result", question):
            assert call.arguments[name] == result
            referring += 1
        for name in re.findall(r"with the same (\w+)", question):
            assert call.arguments[name] == first.arguments[name]
            referring += 1
    assert referring > 0.08 * COUNT


def test_the_task_is_said_in_other_words_more_often(corpora: dict[Part, list[Sample]]) -> None:
    def own_words(part: Part) -> float:
        found = [
            call.name.replace("_", " a ") in sample.messages[-1]["content"]
            for sample in corpora[part]
            for call in calls_of(sample)
        ]
        return sum(found) / len(found)

    for part in PARTS:
        expected = 0.6 if part.startswith("pretraining") else 0.5
        assert own_words(part) == pytest.approx(expected, abs=0.07)


# Corners -----------------------------------------------------------------------------------------------------


def test_a_tool_that_takes_no_name_is_asked_for_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = lexicon.Parameter("level", "integer", ("at {}",))
    tool = generated.Tool("set_lamp", "put light", (parameter,), ("level",), ("set a lamp", "put a light"), "set lamp")
    monkeypatch.setattr(generated, "_pool", lambda *_: [tool])
    follow_ups = [s for s in generate("train", 60) if s.category == "multi_turn"]
    assert follow_ups
    for sample in follow_ups:
        assert [call.name for call in calls_of(sample)] == ["set_lamp"]
        assert list(tools_of(sample)) == ["set_lamp"]


@pytest.mark.parametrize("name", ["train", "validation", "test"])
def test_sizes_must_be_positive(name: str) -> None:
    assert getattr(GeneratedSettings(**{name: 1}), name) == 1
    with pytest.raises(ValueError, match=f"generated.{name} must be positive, got 0"):
        GeneratedSettings(**{name: 0})


def test_the_test_part_is_large_enough_for_claims() -> None:
    assert GeneratedSettings().test >= 2000
