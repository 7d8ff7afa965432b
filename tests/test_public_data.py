"""The published data sets and test sets themselves, read to the last row; skipped where they are absent."""

import gzip
import json

import pytest

from itool_jax.data.sources import load, load_questions
from itool_jax.text.calls import read_calls
from itool_jax.text.sample import sample_row
from tests.conftest import shared_path


@pytest.mark.parametrize(
    ("source", "n_samples", "n_calls"),
    [
        ("seal_tools", 2054, 2054),
        ("toolrl_sft", 400, 346),
        ("glaive", 746, 211),
        ("api_bank/lv3-api-train.json.gz", 907, 907),
    ],
)
def test_public_data_is_read_to_the_last_row(source, n_samples, n_calls):
    samples = load(shared_path(f"data/{source}"), targets="after_user")
    assert len(samples) == len({sample.id for sample in samples}) == n_samples
    calls = [read_calls(sample.target) for sample in samples]
    assert sum(call is not None for call in calls) == n_calls
    for sample, call in zip(samples, calls, strict=True):
        assert sample.target
        assert call is not None or not sample.target.startswith("[")
        assert any(message["role"] == "user" for message in sample.messages)
        for tool in sample.tools:
            assert tool["function"]["parameters"]["type"] == "object"
    json.dumps([sample_row(sample) for sample in samples], allow_nan=False)


def test_every_turn_of_glaive_is_a_sample_and_those_after_a_user_turn_stay_as_they_are():
    path = shared_path("data/glaive/glaive_toolcall_en_demo.json.gz")
    every, after_user = load(path), load(path, targets="after_user")
    rows = json.loads(gzip.decompress(path.read_bytes()))
    speakers = [turn["from"] for row in rows for turn in row["conversations"] if turn["value"]]
    assert len(every) == sum(speaker in ("gpt", "function_call") for speaker in speakers)
    assert len({sample.id for sample in every}) == len(every) > len(after_user)
    same = {sample.id: sample for sample in every if sample.follows_user}
    assert [same[s.id].target for s in after_user] == [s.target for s in after_user]
    assert len(same) == len(after_user)
    with_results = [s for s in after_user if s.following]
    assert {s.following[0]["role"] for s in with_results} == {"tool"}
    assert len(with_results) == sum(read_calls(s.target) is not None for s in after_user)


def test_seal_tools_offers_the_gold_tools_among_ten_and_the_same_ones_every_time():
    path = shared_path("data/seal_tools/dev.jsonl.gz")
    samples = load(path)
    assert len(samples) == 700
    places = set()
    for sample in samples:
        offered = [tool["function"]["name"] for tool in sample.tools]
        gold = {call.name for call in read_calls(sample.target) or []}
        assert gold <= set(offered)
        assert len(offered) == len(set(offered)) <= 10
        places |= {offered.index(name) for name in gold}
    assert places == set(range(10))
    assert load(path) == samples


def test_toolrl_targets_are_the_published_calls():
    path = shared_path("data/toolrl_sft/rlla_sft.json.gz")
    samples = load(path)
    assert samples[0].target == '[Search Managers(name="Alex Ferguson")]'
    assert samples[0].messages == (
        {"role": "user", "content": "Could you help me find information on the manager Alex Ferguson?"},
    )
    assert len(samples[0].tools) == 5
    assert sum(len(sample.messages) > 1 for sample in samples) == 40
    # Nothing of the published format, nor of its thoughts, is left in what the model learns.
    assert not any("<tool_call>" in sample.target or "<think>" in sample.target for sample in samples)


def test_api_bank_offers_the_tools_that_searches_found():
    samples = load(shared_path("data/api_bank/lv3-api-train.json.gz"))
    searched = [sample for sample in samples if len(sample.tools) > 1]
    assert len(searched) == 517
    known = 0
    for sample in searched:
        calls = read_calls(sample.target) or []
        known += calls[0].name in {tool["function"]["name"] for tool in sample.tools}
    assert known / len(searched) > 0.95


@pytest.mark.parametrize(
    ("source", "n", "n_with_tools"),
    [
        ("bfcl_v3/questions", 6821, 3637),  # questions of several turns list no tools, nor do four others
        ("api_bank/level-1-api.json.gz", 399, 399),
        ("api_bank/level-2-api.json.gz", 135, 135),
    ],
)
def test_published_test_sets_are_read_to_the_last_question(source, n, n_with_tools):
    samples = load_questions(shared_path(f"data/{source}"))
    assert len(samples) == len({sample.id for sample in samples}) == n
    assert all(any(message["role"] == "user" for message in sample.messages) for sample in samples)
    assert sum(bool(sample.tools) for sample in samples) == n_with_tools
