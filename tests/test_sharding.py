"""Meshes of eight devices of the host give one device's results, and weights lie where the table says."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from itool_jax.data.batches import PairRow, collate_pairs
from itool_jax.inference.sampler import GenerateSettings, Policy, generate, target_log_probs
from itool_jax.mcts.policy import ModelPolicy, Searched
from itool_jax.mcts.search import SearchSettings, search
from itool_jax.mcts.value import SelfEvaluationSettings
from itool_jax.model import hf, sharding, stacking
from itool_jax.model.linear import LoraSettings
from itool_jax.model.lora import initialize_adapters, merge_adapters
from itool_jax.model.sharding import MeshSettings, use_mesh
from itool_jax.model.transformer import abstract
from itool_jax.store import checkpoint
from itool_jax.text.chat import Chat, encode_sample, load_tokenizer
from itool_jax.text.padding import collate, collate_packed
from itool_jax.text.sample import Sample
from itool_jax.text.steps import build_step_table
from itool_jax.training import loop as train
from itool_jax.training.losses import LossSettings
from itool_jax.training.settings import WarmupSettings
from tests import tiny

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
LORA = LoraSettings(rank=4)
KINDS = ("sft", "dpo", "nf4", "packed", "all weights")
RANDOM = np.random.default_rng(0)
ROWS = [(RANDOM.integers(0, 250, 9 + 5 * i).tolist(), RANDOM.integers(0, 250, 3 + i).tolist()) for i in range(8)]


def settings_of(shape: tuple[int, int, int]) -> MeshSettings:
    return MeshSettings(data=shape[0], fsdp=shape[1], tensor=shape[2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two key heads of eight: a mesh of tensor=8 has more shards than heads."""
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("sharded"), tie_word_embeddings=False)


def train_on(kind: str, folder: Path) -> tuple[list[float], train.TrainState]:
    """Losses of three steps of a kind of training, and what they lead to, on the mesh in use."""
    config, base = hf.load(folder, nf4=kind == "nf4")
    lora = None if kind == "all weights" else dataclasses.replace(LORA, dropout=0.2 if kind == "packed" else 0.0)
    graph, own = abstract(config, lora)[0], train.adamw(0.01, 1.0)
    batch, loss = collate(ROWS, 128, 8), train.sft_loss(graph)
    if kind == "dpo":
        pairs = [PairRow(prompt, target, [*target[::-1], 7], (-9.0, -8.0), (2, 1)) for prompt, target in ROWS]
        batch, loss = collate_pairs(pairs, 128, 8), train.preference_loss(graph, LossSettings())
    if kind == "packed":
        batch = collate_packed([[row, ROWS[0]] for row in ROWS], 128, 8)
    trainable = base if lora is None else initialize_adapters(config, lora, jax.random.key(0))
    frozen = {} if lora is None else base
    state, rate, losses = train.new_state(own, trainable), np.float32(1e-3 if lora is None else 1e-2), []
    for _ in range(3):
        state, metrics = train.train_step(loss, own, 2, state, frozen, batch, jax.random.key(0), rate)
        losses.append(float(metrics["loss"]))
    return losses, state


def everything(folder: Path) -> dict[str, Any]:
    """Losses of every kind of training, scores, responses and search trees, on the mesh in use."""
    config, base = hf.load(folder, stacked=False)
    trained = {kind: train_on(kind, folder) for kind in KINDS}
    results: dict[str, Any] = {kind: losses for kind, (losses, _) in trained.items()}
    adapters = stacking.to_run(trained["sft"][1].trainable)
    policy = Policy(abstract(config)[0], merge_adapters(jax.tree.map(lambda x: x, base), adapters, LORA))
    results["scores"] = tiny.in_order(target_log_probs(policy, ROWS, 1024))
    chat = Chat(load_tokenizer(str(folder)))
    table = build_step_table(chat.tokenizer, "sentence", config.vocab_size, chat.stop_ids)
    prompts = [(str(i), prompt) for i, (prompt, _) in enumerate(ROWS)]
    for temperature in (0.0, 1.0):
        settings = GenerateSettings(max_tokens=8, temperature=temperature, tokens_per_batch=1024)
        results[f"responses at {temperature}"] = tiny.in_order(generate(policy, table, prompts, settings, 1024, 0))
    settings = SearchSettings(
        n_simulations=6, breadth=3, max_depth=2, max_step_tokens=6, max_last_step_tokens=6, batch=4
    )
    batch = [
        Searched(sample, encode_sample(chat, sample))
        for sample in (Sample(id=str(i), messages=(tiny.USER,), target=f"[f(a={i})]") for i in range(4))
    ]
    model = ModelPolicy(
        Policy(policy.graph, base),
        chat,
        config.max_length,
        table,
        batch,
        settings,
        SelfEvaluationSettings(),
        jax.random.key(0),
    )
    results["trees"] = search(model.problems, model, settings)
    return results


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return everything(folder)


@pytest.mark.slow  # a whole run on a mesh is in test_stages
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_mesh_gives_what_one_device_gives(folder: Path, alone: dict[str, Any], shape: tuple[int, int, int]) -> None:
    with use_mesh(settings_of(shape)):
        meshed = everything(folder)
    worst = {kind: max(abs(np.divide(meshed[kind], alone[kind]) - 1)) for kind in (*KINDS, "scores")}
    pairs = list(zip(meshed["trees"], alone["trees"], strict=True))
    worst["search"] = max(
        np.abs(getattr(one.tree, name) - getattr(expected.tree, name)).max()
        for name in ("q_value_N", "prior_N")
        for one, expected in pairs
    )
    print(f"\n{shape}: " + ", ".join(f"{name} {error:.1e}" for name, error in worst.items()))
    assert max(worst.values()) < 1e-5
    for kind in KINDS:
        assert alone[kind][2] < alone[kind][0] - 0.01
    # The same decisions: whole responses, and in trees every step and visit.
    for temperature in (0.0, 1.0):
        assert meshed[f"responses at {temperature}"] == alone[f"responses at {temperature}"]
    for one, expected in pairs:
        for name in ("children_NW", "visit_count_N", "terminal_N"):
            np.testing.assert_array_equal(getattr(one.tree, name), getattr(expected.tree, name))
        assert one.steps == expected.steps
        assert len(expected.steps) > 4
    jax.clear_caches()  # programs for eight devices map much memory, and a process may only map so much


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_weights_lie_where_the_table_says(folder: Path, tmp_path: Path, shape: tuple[int, int, int]) -> None:
    """Also those that one device saved; and a step leaves everything where it was made, moments beside weights."""
    _, alone = train_on("sft", folder)
    checkpoint.save(tmp_path / "weights", alone.trainable)
    data, fsdp, tensor = shape
    with use_mesh(settings_of(shape)):
        base = hf.load(folder)[1]
        _, state = train_on("sft", folder)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), alone.trainable)
        restored = checkpoint.restore(tmp_path / "weights", sharding.placed(shapes))
    assert checkpoint.digest(restored) == checkpoint.digest(alone.trainable)
    for weight in (base["layers"]["q"]["kernel"], base["embedding"]):
        assert weight.addressable_shards[0].data.size == weight.size // (fsdp * tensor)
        assert len(weight.sharding.device_set) == data * fsdp * tensor == 8
    for tree in (state.trainable, state.optimizer[1][0].mu, state.optimizer[1][0].nu, restored):
        a, b = tree["layers"]["q"]["lora_a"], tree["layers"]["q"]["lora_b"]
        assert a.addressable_shards[0].data.size == a.size // fsdp
        assert b.addressable_shards[0].data.size == b.size // tensor


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        (("embedding",), (272, 32), P("tensor", "fsdp")),
        (("layers", "q", "kernel"), (2, 32, 32), P(None, "fsdp", "tensor")),
        (("layers", "down", "kernel"), (2, 48, 32), P(None, "tensor", "fsdp")),
        (("layers", "o", "kernel", "codes"), (2, 32, 32), P(None, "tensor", "fsdp")),
        (("layers", "q", "kernel", "scale_mean"), (2,), P()),
        (("layers", "q", "bias"), (2, 32), P(None, "tensor")),
        (("layers", "attention_norm", "scale"), (2, 32), P()),
        (("layers", "q", "kernel"), (2, 33, 32), P(None, None, "tensor")),
        (("lm_head",), (32, 271), P("fsdp", None)),
    ],
)
def test_the_table(path: tuple[str, ...], shape: tuple[int, ...], spec: P) -> None:
    mesh = sharding.make_mesh(MeshSettings(fsdp=4, tensor=2))
    keys = tuple(jax.tree_util.DictKey(name) for name in path)
    actual = sharding.spec_of(keys, shape, mesh)
    assert tuple(actual) + (None,) * (len(shape) - len(actual)) == tuple(spec) + (None,) * (len(shape) - len(spec))


@pytest.mark.parametrize(
    ("axes", "size", "spec"),
    [
        (("fsdp", "tensor"), 16, P(("fsdp", "tensor"))),
        (("fsdp", "tensor"), 12, P("tensor")),  # fsdp=4 alone would divide it too
        (("fsdp", "tensor"), 6, P("tensor")),
        (("fsdp", "tensor"), 7, P(None)),
        (("data", "fsdp"), 4, P("fsdp")),
        ("fsdp", 6, P(None)),
        (None, 8, P(None)),
    ],
)
def test_axes_that_do_not_divide_a_dimension_are_dropped_first_to_last(axes: Any, size: int, spec: P) -> None:
    mesh = AbstractMesh((2, 4, 2), sharding.AXES)
    assert sharding.fit((axes,), (size,), mesh) == spec


def test_arrays_are_fetched_whole_wherever_they_lie() -> None:
    rows = np.arange(16.0).reshape(8, 2)
    with use_mesh(MeshSettings(data=8)):
        spread = sharding.to_devices(rows)
    assert len(spread.sharding.device_set) == 8
    fetched = sharding.to_host({"spread": spread, "here": jax.numpy.ones(3), "number": 1})
    assert type(fetched["spread"]) is type(fetched["here"]) is np.ndarray
    np.testing.assert_array_equal(fetched["spread"], rows)
    assert fetched["number"] == 1


def test_meshes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"mesh of data=3 fsdp=4 tensor=1 needs 12 devices, but only 8 are available"):
        sharding.make_mesh(MeshSettings(data=3, fsdp=4))
    with pytest.raises(ValueError, match=r"mesh.fsdp must be at least 1, got 0"):
        MeshSettings(fsdp=0)
    assert dict(sharding.make_mesh(MeshSettings(data=0, tensor=2)).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert dataclasses.asdict(MeshSettings()) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_micro_batches_are_counted_in_rows_a_device() -> None:
    settings = WarmupSettings(batch_size=24, micro_batch=2)
    assert settings.n_micro() == 12
    with use_mesh(MeshSettings(data=2, fsdp=2)):
        assert settings.n_micro() == 3
        assert WarmupSettings(batch_size=8, micro_batch=8).n_micro() == 1
        assert WarmupSettings(batch_size=24).n_micro() == 1
    message = r"^warmup.batch_size=24: warmup.micro_batch=2 must divide the 3 rows per device$"
    with use_mesh(MeshSettings(data=8)), pytest.raises(ValueError, match=message):
        settings.n_micro()
    with use_mesh(MeshSettings(data=8)), pytest.raises(ValueError, match=r"batch_size=4 must be a multiple of the 8"):
        WarmupSettings(batch_size=4).n_micro()


@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 2, 1)], ids=str)
def test_no_part_of_a_weight_is_read_twice(
    folder: Path, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    read = hf._read

    def counted(*arguments: Any) -> np.ndarray:
        piece = read(*arguments)
        sizes.append(piece.size)
        return piece

    monkeypatch.setattr(hf, "_read", counted)
    with use_mesh(settings_of(shape)):
        params = hf.load(folder)[1]
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(params))
