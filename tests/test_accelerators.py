"""Programs that accelerators will run, lowered on a machine without one, and the choice of attention kernels."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from itool_jax.inference import sampler
from itool_jax.inference.sampler import Policy
from itool_jax.mcts import policy, search
from itool_jax.mcts.policy import ModelPolicy, Searched
from itool_jax.mcts.search import Response, SearchSettings, State
from itool_jax.mcts.tree import Candidates, NodeExtra
from itool_jax.mcts.value import SelfEvaluationSettings
from itool_jax.model import attention
from itool_jax.model.attention import Kernel, KeyValues, attend_causally, attend_in_one_kernel, causal_kernel
from itool_jax.model.linear import LoraSettings
from itool_jax.model.lora import beside
from itool_jax.model.sharding import MeshSettings, compute_capability, placed, use_mesh
from itool_jax.model.transformer import Params, abstract
from itool_jax.text.chat import Chat, encode_sample, load_tokenizer
from itool_jax.text.padding import PairBatch, TargetBatch
from itool_jax.text.sample import Sample
from itool_jax.text.steps import StepTable, build_step_table
from itool_jax.training import loop as train
from itool_jax.training.losses import LossSettings
from tests import tiny

LORA = LoraSettings(rank=4)
MESH = MeshSettings(data=2, fsdp=2, tensor=2)
FLASH, FLASH_BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
LIBRARY = {"cuda": {"cu_threefry2x32_ffi", FLASH, FLASH_BACKWARD}, "tpu": set[str]()}
"""Calls to a platform's library that a program may contain; a host callback or a Pallas kernel is none of them."""


class Target(NamedTuple):
    """A device that programs are lowered for."""

    platform: str
    capability: tuple[int, ...]

    @property
    def flash(self) -> bool:
        return self.capability >= (8, 0)


@pytest.fixture(params=[Target("cuda", (9, 0)), Target("cuda", (7, 5)), Target("tpu", ())], ids=str)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    """The device that the model takes for the one it runs on; eight of them in a mesh."""
    monkeypatch.setattr(attention, "compute_capability", lambda: request.param.capability)
    monkeypatch.setattr(attention, "cudnn_works", lambda *_: True)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91100)
    jax.clear_caches()  # traces depend on the device
    with use_mesh(MESH):
        yield request.param
    jax.clear_caches()


class Setup(NamedTuple):
    chat: Chat
    table: StepTable
    stacked: Any
    """The model to train, in bfloat16."""
    running: Any

    def policy(self) -> Policy:
        graph, base, adapters = abstract(self.running, LORA)
        return Policy(graph, beside(placed(in_bfloat16(base), running=True), placed(adapters, running=True)))


def in_bfloat16(shapes: Params) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("model")
    tiny.save_tokenizer(folder)
    config, chat = tiny.model_config(folder, "bfloat16"), Chat(load_tokenizer(str(folder)))
    table = build_step_table(chat.tokenizer, "call", config.vocab_size, chat.stop_ids)
    return Setup(chat, table, config, dataclasses.replace(config, stacked=False))


def lowered(target: Target, function: Any, *arguments: Any) -> str:
    """The program of a jitted function for the target, after the checks that all programs must pass."""
    text = function.trace(*arguments).lower(lowering_platforms=(target.platform,)).as_text()
    assert "mhlo.num_partitions = 8" in text
    assert calls(text) <= LIBRARY[target.platform]
    return text


def calls(text: str) -> set[str]:
    return set(re.findall(r"custom_call @([\w$.]+)", text))


def products(text: str) -> set[tuple[str, str]]:
    """The types of the operands of all matrix products."""
    operands = re.findall(r"dot_general.* : \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)", text)
    assert operands
    return set(operands)


# Programs ---------------------------------------------------------------------------------------------------


def targets(rows: int, length: int) -> TargetBatch:
    ids_BR = np.zeros((rows, length // 2), np.int32)
    return TargetBatch(np.zeros((rows, length), np.int32), ids_BR, ids_BR, ids_BR == 0)


@pytest.mark.parametrize("kind", ["sft", "packed", "dpo"])
def test_a_training_step(setup: Setup, target: Target, kind: str) -> None:
    graph, base, adapters = abstract(dataclasses.replace(setup.stacked, remat="layers"), LORA)
    optimizer, batch, loss = train.adamw(0.01, 1.0), targets(16, 64), train.sft_loss(graph)
    if kind == "packed":
        batch = batch._replace(segment_BT=batch.tokens_BT)
    if kind == "dpo":
        numbers = np.zeros(16, np.float32), np.zeros(16, np.float32)
        batch = PairBatch(batch, batch.tokens_BT, numbers, numbers, np.ones(16, bool))
        loss = train.preference_loss(graph, LossSettings())
    state = placed(jax.eval_shape(lambda x: train.TrainState(x, optimizer.init(x)), adapters))
    arguments = (state, placed(in_bfloat16(base)), batch, jax.random.key(0), np.float32(1e-3))
    text = lowered(target, train.train_step, loss, optimizer, 2, *arguments)
    # Flash attention knows only the causal mask.
    expected = {FLASH, FLASH_BACKWARD} if target.flash and kind == "sft" else set[str]()
    assert calls(text) & {FLASH, FLASH_BACKWARD} == expected
    assert '"fsdp"' in text.partition("func.func public @main")[2].partition("{\n")[0]  # weights are sharded
    assert "sdy.sharding_constraint" in text  # and the tokens' hidden states


def test_scoring_and_prefill(setup: Setup, target: Target) -> None:
    batch = targets(4, 64)
    for text in (
        lowered(target, sampler.score, *setup.policy(), batch),
        lowered(target, sampler.prefill, *setup.policy(), batch.tokens_BT, batch.tokens_BT[:, 0]),
    ):
        assert (FLASH in calls(text)) == target.flash
        assert products(text) == {("bf16", "bf16")}  # only a CPU computes them in float32


def test_a_round_of_a_search_and_its_decode_loop(setup: Setup, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowers whatever a proposal and a judgement call, with the arguments they pass, and computes none of it."""
    texts: dict[str, str] = {}

    def instead(name: str, function: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            texts[name] = lowered(target, function, *arguments)
            return jax.eval_shape(function, *arguments) if name == "place" else function.eval_shape(*arguments)

        return call

    for name, function in list(vars(policy).items()):
        if hasattr(function, "lower"):  # jitted
            monkeypatch.setattr(policy, name, instead(name, function))
    monkeypatch.setattr(policy, "to_host", lambda tree: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree))
    samples = [Sample(id=str(i), messages=(tiny.USER,), target="[f(a=1)]") for i in range(8)]
    rows = [Searched(sample, encode_sample(setup.chat, sample)) for sample in samples]
    settings = SearchSettings(breadth=2, batch=8, max_step_tokens=4, max_last_step_tokens=8, inject_gold="always")
    given = (setup.table, rows, settings, SelfEvaluationSettings(), jax.random.key(0))
    model = ModelPolicy(setup.policy(), setup.chat, setup.running.max_length, *given)
    states = [State(i, i, [5, 6], 4, until_stop=False, gold_step=[7]) for i in range(8)]
    assert [len(steps) for steps in model.propose(states)] == [3] * 8
    assert len(model.judge([Response(i, i, [5, 6, 7]) for i in range(8)])) == 8
    wanted = {"prefill", "empty_prefix", "place", "row_keys", "sample_step", "score_step", "choice_logits"}
    assert texts.keys() == {*wanted, "_confidences"}
    loop = texts["sample_step"].partition("stablehlo.while")[2]
    assert products(loop) == {("bf16", "bf16")}
    for name in ("sample_step", "score_step", "choice_logits"):
        assert '"tensor"' in texts[name].partition("func.func public @main")[2].partition("{\n")[0], name
    assert FLASH not in calls(texts["sample_step"])  # which attends to several segments


def test_the_trees_of_a_search(target: Target) -> None:
    s = SearchSettings(batch=4)
    trees = jax.eval_shape(functools.partial(search._new_trees, s, 1))
    lane_B, slot_BW = np.zeros(s.lanes, np.int32), np.zeros((s.lanes, s.slots), np.float32)
    flag_BW = slot_BW == 0
    extra = NodeExtra(slot_BW, slot_BW, flag_BW, flag_BW, flag_BW)
    programs = [
        lowered(target, search._descend, trees, s.exploration),
        lowered(target, search._select_child, trees, lane_B, s.exploration),
        lowered(target, search._expand, trees, lane_B, Candidates(flag_BW, slot_BW, slot_BW, flag_BW, extra)),
        lowered(target, search._backup, trees, lane_B, s.discount, s.value_weight),
        lowered(target, search._reset, trees, lane_B == 0),
    ]
    assert not any(name.startswith("__cudnn") for text in programs for name in calls(text))


def test_what_must_not_be_in_a_program_is_found(target: Target) -> None:
    def with_callback(x: Array) -> Array:
        jax.debug.callback(print, x)
        return x

    def with_kernel(x: Array) -> Array:
        return jax.ffi.ffi_call("another_library", jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    lowered(target, jax.jit(jnp.sin), np.zeros(8))
    with pytest.raises(ValueError, match="different from the lowering platform"):
        lowered(target, jax.jit(with_callback), np.zeros(8))
    with pytest.raises(AssertionError, match="another_library"):
        lowered(target, jax.jit(with_kernel), np.zeros(8))


# The choice of kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "capability", "dtype", "head_dim", "expected"),
    [
        ("Tesla V100-SXM2-16GB", "7.0", "bfloat16", 128, "xla"),
        ("Tesla T4", "7.5", "bfloat16", 64, "xla"),
        ("Tesla T4", "7.5", "float16", 64, "xla"),
        ("NVIDIA A100-SXM4-80GB", "8.0", "bfloat16", 128, "cudnn"),
        ("NVIDIA A10G", "8.6", "float16", 64, "cudnn"),
        ("NVIDIA L4", "8.9", "bfloat16", 96, "cudnn"),
        ("NVIDIA H100 80GB HBM3", "9.0", "bfloat16", 128, "cudnn"),
        ("NVIDIA H100 80GB HBM3", "9.0", "float32", 128, "xla"),
        ("NVIDIA H100 80GB HBM3", "9.0", "bfloat16", 256, "xla"),
        ("NVIDIA H100 80GB HBM3", "9.0", "bfloat16", 60, "xla"),
        ("NVIDIA B200", "10.0", "bfloat16", 128, "cudnn"),
        ("NVIDIA GeForce RTX 5090", "12.0", "bfloat16", 128, "cudnn"),
        ("AMD Instinct MI300X", "gfx942", "bfloat16", 128, "xla"),
        ("TPU v5 lite", None, "bfloat16", 128, "xla"),
        ("cpu", None, "bfloat16", 64, "xla"),
    ],
)
def test_the_kernel_fits_the_device(
    monkeypatch: pytest.MonkeyPatch, kind: str, capability: str | None, dtype: str, head_dim: int, expected: Kernel
) -> None:
    device = SimpleNamespace(device_kind=kind, **({} if capability is None else {"compute_capability": capability}))
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert causal_kernel(compute_capability(), dtype, head_dim) == expected


def test_a_device_without_cudnn_says_so_and_computes_in_parts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attention.cudnn_works.cache_clear()
    monkeypatch.setattr(attention, "compute_capability", lambda: (9, 0))  # but there is no such GPU
    x_BTHD = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    own = KeyValues(x_BTHD.transpose(0, 2, 3, 1), x_BTHD.swapaxes(1, 2), jnp.tril(jnp.ones((1, 4, 4), bool)))
    out_BTD = jax.jit(lambda q: attend_causally(q, own, only_causal=True))(x_BTHD)
    assert (out_BTD == 1).all()
    assert "cuDNN's flash attention does not work here (" in caplog.text


@pytest.mark.parametrize("running", [False, True])
@pytest.mark.parametrize("mesh", [MeshSettings(), MESH, MeshSettings(tensor=8)], ids=str)
def test_one_kernel_computes_what_the_parts_compute(mesh: MeshSettings, running: bool) -> None:
    """With the library's plain implementation in place of cuDNN's, over rows and heads as a mesh divides them."""
    keys = jax.random.split(jax.random.key(0), 3)
    q_BTHD = jax.random.normal(keys[0], (4, 6, 8, 8))
    k_BHDK, v_BHKD = jax.random.normal(keys[1], (4, 4, 8, 6)), jax.random.normal(keys[2], (4, 4, 6, 8))
    mask_BTK = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (4, 6, 6))

    def in_parts(q: Array, k: Array, v: Array) -> Array:
        return (attend_causally(q, KeyValues(k, v, mask_BTK)) ** 3).sum()

    def at_once(q: Array, k: Array, v: Array) -> Array:
        own = KeyValues(k, v, mask_BTK)
        return (attend_in_one_kernel(q, own, running=running, kernel="xla") ** 3).sum()

    with use_mesh(mesh):
        one, two = (jax.jit(jax.value_and_grad(f, (0, 1, 2)))(q_BTHD, k_BHDK, v_BHKD) for f in (in_parts, at_once))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), one, two)
