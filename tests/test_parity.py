"""Random models of every family against Hugging Face: logits, greedy tokens, padding and caches.

Forty of them, the most in the slow run; `-s` prints the worst error of each.
"""

import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from itool_jax.inference.sampler import GenerateSettings, Policy, generate, prefill, sample_step, target_log_probs
from itool_jax.model import hf
from itool_jax.model.transformer import abstract
from itool_jax.text.padding import pad
from itool_jax.text.steps import StepTable
from tests import tiny

pytestmark = pytest.mark.parity

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral")
N_MODELS, N_QUICK = 40, 6
NEW, CONTEXT = 6, 128


def random_config(seed: int) -> tuple[str, dict[str, Any]]:
    """A family, and settings of a small model: number and size of heads, tying, RoPE, widths."""
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 3])
    heads, head_dim = kv_heads * rng.choice([1, 2, 4]), rng.choice([4, 8, 16])
    family = FAMILIES[seed % len(FAMILIES)]
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": rng.choice([1e4, 5e5])}
    if rng.random() < 0.4:  # stretched: the rows below reach beyond the original context
        kind = random.Random(f"rope {seed}").choice(["llama3", "linear", "yarn"])
        rope |= {"rope_type": kind, "factor": 8.0}
        if kind == "llama3":
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        if kind != "linear":
            rope |= {"original_max_position_embeddings": 16}
    changes = {
        "vocab_size": rng.choice([61, 97, 128]),
        "hidden_size": heads * rng.choice([4, 6, head_dim]),  # not always the heads' own width
        "intermediate_size": rng.choice([20, 48]),
        "num_hidden_layers": rng.choice([1, 2, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": rng.random() < 0.5,
        "rms_norm_eps": rng.choice([1e-6, 1e-5]),
        "rope_parameters": rope,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "Qwen2":  # its heads have no size of their own
        changes["hidden_size"] = heads * head_dim
        del changes["head_dim"]
    return family, changes | ({"sliding_window": None} if family == "Mistral" else {})


def torch_model(seed: int) -> Any:
    """The Hugging Face model, random weights spread wide enough for mistakes to show."""
    torch = pytest.importorskip("torch")
    import transformers

    family, changes = random_config(seed)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.randn(weight.shape) * 0.3 + ("norm" in name))
    return model


MODELS = [pytest.param(i, marks=[pytest.mark.slow] if i >= N_QUICK else []) for i in range(N_MODELS)]


@pytest.mark.parametrize("seed", MODELS)
def test_a_random_model_is_that_of_hugging_face(seed: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch_model(seed)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    config, params = hf.load(tmp_path)
    policy = Policy(abstract(config)[0], params)
    rng = np.random.default_rng(seed)
    rows = [rng.integers(0, config.vocab_size, n).tolist() for n in (47, 30, 5)]
    # 1. Logits of right-padded rows are those of each row alone.
    tokens_BT, _ = pad(rows, 48)
    found_BTV = np.asarray(jax.jit(lambda p, x: logits_of(policy.graph, p, x))(params, tokens_BT))
    worst = 0.0
    for row, found_TV in zip(rows, found_BTV, strict=True):
        with torch.no_grad():
            expected = model(torch.tensor([row])).logits[0].numpy()
        worst = max(worst, np.abs(found_TV[: len(row)] - expected).max() / expected.std())
    assert worst < 1e-4
    # 2. Greedy tokens, from the cache, of all rows together and of one alone.
    table = plain_table(config.vocab_size)
    settings = GenerateSettings(max_tokens=NEW, tokens_per_batch=3 * CONTEXT)
    prompts = [(str(i), row) for i, row in enumerate(rows)]
    answers = tiny.in_order(generate(policy, table, prompts, settings, CONTEXT, 0))
    assert answers[1:2] == tiny.in_order(generate(policy, table, prompts[1:2], settings, CONTEXT, 0))
    for row, answer in zip(rows, answers, strict=True):
        ids = torch.tensor([row])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        assert answer == whole[0, len(row) :].tolist()
    # 3. Log-probabilities of these answers, cached and not.
    sums = tiny.in_order(target_log_probs(policy, list(zip(rows, answers, strict=True)), 3 * CONTEXT))
    np.testing.assert_allclose(cached_log_probs(policy, table, rows, answers), sums, rtol=1e-4, atol=1e-4)
    print(f"{seed:2} {model.config.model_type:8} worst error {worst:.1e}")


def logits_of(graph: nnx.GraphDef, params: Any, tokens_BT: jax.Array) -> jax.Array:
    model = nnx.merge(graph, params)
    return model.logits(model(tokens_BT)[0])


def plain_table(vocab_size: int) -> StepTable:
    """No token ends a step or a response."""
    cells, flags = np.zeros((vocab_size, 6), np.int32), np.zeros(vocab_size, bool)
    return StepTable(cells, cells, cells, cells, flags, flags, np.int32(1), np.int32(2))


def cached_log_probs(policy: Policy, table: StepTable, rows: list[list[int]], answers: list[list[int]]) -> np.ndarray:
    """Sums over the greedy answers, taken again token by token through the caches."""
    n = len(rows)
    prefix = prefill(*policy, *pad([row[:-1] for row in rows], CONTEXT))
    ones = np.ones(n, np.int32)
    steps = sample_step(
        policy.graph, NEW, policy.params, table, prefix, *pad([row[-1:] for row in rows], 1),
        jax.random.split(jax.random.key(0), n), NEW * ones, ones.astype(bool), np.float32(0),
    )  # fmt: skip
    assert np.asarray(steps.tokens_BT).tolist() == answers
    return np.asarray(steps.log_prob_B)
