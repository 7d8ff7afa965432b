"""The generated corpora: always the same, never mixed, and every gold follows from what was said."""

import hashlib
import itertools
import json
import re
from collections import Counter
from typing import Any, get_args

import pytest

from itool_jax.config import parse
from itool_jax.data import generated, lexicon
from itool_jax.data.generated import (
    CLEAN,
    KNOWN,
    ArgumentOrder,
    CallOrder,
    GeneratedSettings,
    Part,
    Request,
    Tool,
    Writer,
    generate,
    make_sample,
    splits,
    writer_of,
)
from itool_jax.mcts.value import outcome
from itool_jax.text.calls import Call, read_calls
from itool_jax.text.sample import Row, Sample, sample_row

PARTS: tuple[Part, ...] = get_args(Part)
TASK: tuple[Part, ...] = ("train", "validation", "test", "test_known")
COUNT = 400
NAMES = {start + end for start in lexicon.NAME_STARTS for end in lexicon.NAME_ENDS}
VERBS = {word: verb[0] for verb in lexicon.VERBS + lexicon.TASK_VERBS for word in verb}
TASK_THINGS = {word: thing[0] for domain in lexicon.TASK_DOMAINS for thing in domain.things for word in thing}
THINGS = TASK_THINGS | {w: thing[0] for d in lexicon.PRETRAINING_DOMAINS for thing in d.things for w in thing}
JSON_TYPES = {"string": str, "integer": int, "number": float, "boolean": bool}
ARGUMENT_ORDERS: tuple[ArgumentOrder, ...] = get_args(ArgumentOrder)
CALL_ORDERS: tuple[CallOrder, ...] = get_args(CallOrder)
WRITERS = [Writer(*habits) for habits in itertools.product(ARGUMENT_ORDERS, CALL_ORDERS, (False, True))]


@pytest.fixture(scope="module")
def corpora() -> dict[Part, list[Sample]]:
    return {part: generate(part, COUNT) for part in PARTS}


def tools_of(sample: Sample) -> dict[str, Row]:
    return {tool["function"]["name"]: tool["function"] for tool in sample.tools}


def calls_of(sample: Sample) -> list[Call]:
    return read_calls(sample.target) or []


def conversation(sample: Sample) -> str:
    return "\n".join(message["content"] for message in sample.messages)


def spoken(tool: Row) -> re.Pattern[str]:
    """Every way to ask for a tool: its own words, and the synonyms in its description."""
    verbs, things = zip(tool["name"].split("_"), tool["description"].split(), strict=True)
    return re.compile(rf"\b({'|'.join(verbs)}) a ({'|'.join(things)})\b")


def meaning(name: str) -> tuple[str, str] | None:
    """A domain tool's verb and thing, synonyms made one; None for tools of random words."""
    verb, thing = name.split("_")
    return (VERBS[verb], THINGS[thing]) if verb in VERBS and thing in THINGS else None


def meanings(samples: list[Sample]) -> set[tuple[str, str]]:
    pairs = {meaning(name) for sample in samples for name in tools_of(sample)}
    return {pair for pair in pairs if pair is not None}


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


@pytest.mark.parametrize(
    ("part", "seed", "digest"),
    [
        ("pretraining", 0, "640e877288e3f6c5b4252dd0241f09e0960c8aaddaf0e9613b8c8aab962ba868"),
        ("pretraining", 1, "2a021f518ff76ff72b47b3241d9c0f770f0fff46bd31ae741e57950510b02869"),
        ("pretraining_test", 0, "f157e7521d8ac4f25209c28fff9cf44273716b9e4c04e47e7859317ae88c4b68"),
        ("pretraining_test", 1, "bebcea8bf2a346353ac31d05d089a5119fffe7ec4b3a27380afb40a872f27883"),
    ],
)
def test_the_corpus_of_the_embedded_checkpoint_never_changes(part: Part, seed: int, digest: str) -> None:
    """The checkpoint was trained on it: another one could not be made again."""
    rows = "".join(json.dumps(sample_row(sample)) + "\n" for sample in generate(part, 500, seed))
    assert hashlib.sha256(rows.encode()).hexdigest() == digest


def test_samples_are_not_repeated(corpora: dict[Part, list[Sample]]) -> None:
    texts = Counter(conversation(sample) for samples in corpora.values() for sample in samples)
    assert sum(count - 1 for count in texts.values()) < 0.02 * COUNT * len(PARTS)
    asked = {part: {conversation(sample) for sample in samples} for part, samples in corpora.items()}
    assert not (asked["test"] | asked[KNOWN]) & (asked["train"] | asked["validation"] | asked["pretraining"])


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
    by_part = {part: meanings(corpora[part]) for part in PARTS if part not in ("pretraining", KNOWN)}
    assert min(map(len, by_part.values())) > 100
    for (a, one), (b, two) in itertools.combinations(by_part.items(), 2):
        assert not one & two, (a, b)
    every = {(verb, thing) for verb in VERBS.values() for thing in TASK_THINGS.values()}
    assert set().union(*(by_part[part] for part in TASK if part != KNOWN)) <= every
    assert {thing for _, thing in by_part["pretraining_test"]}.isdisjoint(TASK_THINGS.values())


def test_the_known_part_has_the_tools_of_train_and_the_names_of_test(corpora: dict[Part, list[Sample]]) -> None:
    schemas = {name: tool for sample in generate("train", 3000) for name, tool in tools_of(sample).items()}
    known = [tool for sample in corpora[KNOWN] for tool in tools_of(sample).values()]
    assert sum(schemas.get(tool["name"]) == tool for tool in known) > 0.99 * len(known)
    said = {word for sample in corpora[KNOWN] for word in re.findall(r"\w+", conversation(sample))} & NAMES
    assert len(said) > 200
    assert {generated._share_of(name, generated.NAME_SHARES) for name in said} == {"test"}


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
    del words[KNOWN]  # its names are those of test
    names = {part: used & NAMES for part, used in words.items()}
    assert min(map(len, names.values())) > 200
    for (a, one), (b, two) in itertools.combinations(names.items(), 2):
        assert not one & two, (a, b)
    capitals = set().union(*words.values()) - set().union(*names.values())
    assert {word for word in capitals if word[0].isupper()} == {"None", "True", "False"}


# What a sample holds -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_kinds_come_in_their_shares(corpora: dict[Part, list[Sample]], part: Part) -> None:
    kinds = Counter(sample.category for sample in corpora[part])
    long = 0 if part.startswith("pretraining") else 0.10
    assert kinds.keys() == {"calls", "irrelevance", "multi_turn"} | ({"long"} if long else set())
    for kind, share in (("calls", 0.70 - long), ("long", long), ("irrelevance", 0.15), ("multi_turn", 0.15)):
        assert kinds[kind] / COUNT == pytest.approx(share, abs=0.06)
    longest = Counter(len(calls_of(sample)) for sample in corpora[part] if sample.category == "long")
    assert longest.keys() == ({4, 5, 6} if long else set())
    lengths = Counter(len(calls_of(sample)) for sample in corpora[part] if sample.category == "calls")
    assert lengths.keys() == {1, 2, 3}
    assert lengths[1] > lengths[2] > lengths[3] > 0.05 * COUNT
    offered = [len(sample.tools) for sample in corpora[part]]
    assert min(offered) == 1
    assert 8 <= max(offered) <= 9


def fits(value: Any, schema: Row) -> bool:
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
        said = [
            call.name.replace("_", " a ") in sample.messages[-1]["content"]
            for sample in corpora[part]
            for call in calls_of(sample)
        ]
        return sum(said) / len(said)

    for part in PARTS:
        expected = 0.6 if part.startswith("pretraining") else 0.5
        assert own_words(part) == pytest.approx(expected, abs=0.07)


# Who writes the answers --------------------------------------------------------------------------------------


def test_a_writer_spells_calls_by_habit() -> None:
    parameters = (
        lexicon.Parameter("port", "string", ()),
        lexicon.Parameter("crew", "integer", (), default=30),
        lexicon.Parameter("towed", "boolean", (), default=False),
    )
    boat = Tool("follow_boat", "track vessel", parameters, ("port",), (), "")
    request = Request(boat, {"towed": True, "port": "Balban"}, "follow a boat under tow to Balban")
    assert request.call() == 'follow_boat(port="Balban", towed=True)'
    spelt = {writer: request.call(writer) for writer in WRITERS if writer.calls == "as_asked"}
    assert spelt == {
        ("schema", "as_asked", False): 'follow_boat(port="Balban", towed=True)',
        ("alphabetical", "as_asked", False): 'follow_boat(port="Balban", towed=True)',
        ("reversed", "as_asked", False): 'follow_boat(towed=True, port="Balban")',
        ("as_asked", "as_asked", False): 'follow_boat(towed=True, port="Balban")',
        ("schema", "as_asked", True): 'follow_boat(port="Balban", crew=30, towed=True)',
        ("alphabetical", "as_asked", True): 'follow_boat(crew=30, port="Balban", towed=True)',
        ("reversed", "as_asked", True): 'follow_boat(towed=True, crew=30, port="Balban")',
        ("as_asked", "as_asked", True): 'follow_boat(towed=True, port="Balban", crew=30)',
    }
    sail, dock = (Request(Tool(name, "", (), (), (), ""), {}, "") for name in ("sail", "dock"))
    follow = request.call()
    written = {order: generated._answer([sail, dock, request], CLEAN._replace(calls=order)) for order in CALL_ORDERS}
    assert written == {
        "as_asked": f"[sail(), dock(), {follow}]",
        "reversed": f"[{follow}, dock(), sail()]",
        "by_name": f"[dock(), {follow}, sail()]",
    }


def test_one_writer_is_the_clean_one_and_twelve_have_every_pair_of_orders() -> None:
    ids = [f"s-{i}" for i in range(1000)]
    assert {writer_of(name, 1) for name in ids} == {CLEAN}
    twelve = {writer_of(name, 12) for name in ids}
    assert len(twelve) == 12
    assert {writer[:2] for writer in twelve} == set(itertools.product(ARGUMENT_ORDERS, CALL_ORDERS))
    assert sum(writer.defaults for writer in twelve) == 6


@pytest.mark.parametrize("part", TASK)
def test_all_writers_golds_agree_by_the_reward(monkeypatch: pytest.MonkeyPatch, part: Part) -> None:
    spellings = [set[str]() for _ in range(60)]
    tools = [sample.tools for sample in generate(part, 60)]
    for writer in WRITERS:
        monkeypatch.setattr(generated, "writer_of", lambda *_, writer=writer: writer)
        for golds, sample in zip(spellings, generate(part, 60), strict=True):
            golds.add(sample.target)
    for offered, golds in zip(tools, spellings, strict=True):
        for gold, answer in itertools.permutations(golds, 2):
            assert outcome(gold, answer, finished=True, tools=offered) == 1.0
    assert max(map(len, spellings)) >= 12


@pytest.mark.parametrize("part", TASK)
def test_the_request_is_the_same_whoever_answers(corpora: dict[Part, list[Sample]], part: Part) -> None:
    """So that corpora of different numbers of writers are paired by id."""
    changed = 0
    for clean, mixed in zip(corpora[part], generate(part, COUNT, writers=12), strict=True):
        assert (clean.id, clean.tools, clean.category) == (mixed.id, mixed.tools, mixed.category)
        assert len(clean.messages) == len(mixed.messages)
        for one, two in zip(clean.messages, mixed.messages, strict=True):
            if one["role"] == "assistant":  # an earlier turn of the same writer
                assert outcome(one["content"], two["content"], finished=True, tools=clean.tools) == 1.0
            else:
                assert one == two
        assert (clean.target == lexicon.REFUSAL) == (mixed.target == lexicon.REFUSAL)
        changed += clean.target != mixed.target
    assert 0.5 * COUNT < changed < 0.65 * COUNT


def test_defaults_are_of_optional_parameters_that_take_no_name(corpora: dict[Part, list[Sample]]) -> None:
    kinds = Counter[str]()
    for part in PARTS:
        for tool in [tool for sample in corpora[part] for tool in tools_of(sample).values()]:
            for name, schema in tool["parameters"]["properties"].items():
                free = schema["type"] == "string" and "enum" not in schema
                optional = name not in tool["parameters"]["required"]
                assert ("default" in schema) == (optional and not free and part in TASK)
                if "default" in schema:
                    assert fits(schema["default"], schema)
                    kinds[schema["type"]] += 1
    assert kinds.keys() == JSON_TYPES.keys()


def test_defaults_are_written_only_where_the_request_does_not_mention_them() -> None:
    written = 0
    for clean, mixed in zip(generate("train", COUNT), generate("train", COUNT, writers=12), strict=True):
        calls = {call.name: call.arguments for call in calls_of(clean)}
        assert bool(calls) == bool(calls_of(mixed))
        for call in calls_of(mixed):
            properties = tools_of(clean)[call.name]["parameters"]["properties"]
            added = {name: value for name, value in call.arguments.items() if name not in calls[call.name]}
            assert calls[call.name].items() <= call.arguments.items()
            assert all(value == properties[name]["default"] for name, value in added.items())
            written += bool(added)
    assert written > 0.05 * COUNT


def test_habits_have_their_published_shares_of_the_default_training_part() -> None:
    """The figures of docs/method.md. Results on this corpus hold for these: never change them."""
    settings = parse(["--stage=iterate"]).generated
    assert (settings.train, settings.validation, settings.test, settings.writers) == (1000, 600, 2400, 12)
    writers = [writer_of(f"train-0-{i}", settings.writers) for i in range(settings.train)]
    assert Counter(writer.arguments for writer in writers) == {
        "schema": 254,
        "alphabetical": 246,
        "reversed": 269,
        "as_asked": 231,
    }
    assert Counter(writer.calls for writer in writers) == {"as_asked": 344, "reversed": 313, "by_name": 343}
    assert Counter(writer.defaults for writer in writers) == {False: 514, True: 486}


# The splits --------------------------------------------------------------------------------------------------


def test_the_test_split_takes_turns_between_new_and_known_tools() -> None:
    made = splits(GeneratedSettings(train=3, validation=2, test=5, writers=12))
    assert made["train"] == generate("train", 3, writers=12)
    assert made["validation"] == generate("validation", 2, writers=12)
    assert [s.id for s in made["test"]] == ["test-0-0", "test_known-0-0", "test-0-1", "test_known-0-1", "test-0-2"]
    assert made["test"][::2] == generate("test", 3, writers=12)
    assert made["test"][1::2] == generate(KNOWN, 2, writers=12)
    longer = splits(GeneratedSettings(train=1, validation=1, test=9, writers=12))["test"]
    assert longer[:5] == made["test"]


def test_the_default_splits_have_their_published_sizes() -> None:
    """The figures of docs/method.md."""
    made = splits(parse(["--stage=iterate"]).generated)
    assert {name: Counter(sample.category for sample in samples) for name, samples in made.items()} == {
        "train": {"calls": 579, "long": 92, "irrelevance": 169, "multi_turn": 160},
        "validation": {"calls": 374, "long": 58, "irrelevance": 82, "multi_turn": 86},
        "test": {"calls": 1414, "long": 252, "irrelevance": 374, "multi_turn": 360},
    }


# Corners -----------------------------------------------------------------------------------------------------


def test_a_tool_that_takes_no_name_is_asked_for_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = lexicon.Parameter("level", "integer", ("at {}",))
    tool = Tool("set_lamp", "put light", (parameter,), ("level",), ("set a lamp", "put a light"), "set lamp")
    monkeypatch.setattr(generated, "_pool", lambda *_: [tool])
    follow_ups = [s for s in generate("train", 60) if s.category == "multi_turn"]
    assert follow_ups
    for sample in follow_ups:
        assert [call.name for call in calls_of(sample)] == ["set_lamp"]
        assert list(tools_of(sample)) == ["set_lamp"]


@pytest.mark.parametrize("name", ["train", "validation", "test", "writers"])
def test_sizes_must_be_positive(name: str) -> None:
    assert getattr(GeneratedSettings(**{name: 1}), name) == 1
    with pytest.raises(ValueError, match=f"generated.{name} must be positive, got 0"):
        GeneratedSettings(**{name: 0})


def test_the_test_part_is_large_enough_for_claims() -> None:
    assert GeneratedSettings().test >= 2000
