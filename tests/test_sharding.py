"""Meshes of eight devices of the host give one device's results, and weights lie where the table says."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from itool_jax import train
from itool_jax.data.batches import PairRow, collate_pairs
from itool_jax.losses import LossSettings
from itool_jax.model import hf, sharding
from itool_jax.model.linear import LoraSettings
from itool_jax.model.lora import initialize_adapters, merge_adapters
from itool_jax.model.sharding import MeshSettings, use_mesh
from itool_jax.model.transformer import abstract
from itool_jax.sampler import GenerateSettings, Policy, respond, target_log_probs
from itool_jax.text.chat import Chat, load_tokenizer
from itool_jax.text.padding import collate
from itool_jax.text.steps import build_step_table
from tests import tiny

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
LORA = LoraSettings(rank=4)
RANDOM = np.random.default_rng(0)
ROWS = [(RANDOM.integers(0, 250, 9 + 5 * i).tolist(), RANDOM.integers(0, 250, 3 + i).tolist()) for i in range(8)]


def settings_of(shape: tuple[int, int, int]) -> MeshSettings:
    return MeshSettings(data=shape[0], fsdp=shape[1], tensor=shape[2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two key heads of eight: a mesh of tensor=8 has more shards than heads."""
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("sharded"), tie_word_embeddings=False)


def everything(folder: Path) -> dict[str, Any]:
    """Losses of a few steps of SFT and DPO, scores and responses, on the mesh in use."""
    config, base = hf.load(folder)
    graph, own = abstract(config, LORA)[0], train.adamw(0.01, 1.0)
    found: dict[str, Any] = {}
    pairs = [PairRow(prompt, target, [*target[::-1], 7], (-9.0, -8.0), (2, 1)) for prompt, target in ROWS]
    batches = {"sft": collate(ROWS, 128, 8), "dpo": collate_pairs(pairs, 128, 8)}
    losses = {"sft": train.sft_loss(graph), "dpo": train.preference_loss(graph, LossSettings())}
    for name, batch in batches.items():
        state = train.new_state(own, initialize_adapters(config, LORA, jax.random.key(0)))
        found[name] = []
        for _ in range(3):
            state, metrics = train.train_step(
                losses[name], own, 2, state, base, batch, jax.random.key(0), np.float32(1e-2)
            )
            found[name].append(float(metrics["loss"]))
        found[f"{name} state"] = state
    policy = Policy(abstract(config)[0], merge_adapters(base, found["sft state"].trainable, LORA))
    found["scores"] = target_log_probs(policy, ROWS, 1024)
    chat = Chat(load_tokenizer(str(folder)))
    table = build_step_table(chat.tokenizer, "sentence", config.vocab_size, chat.stop_ids)
    prompts = [(str(i), prompt) for i, (prompt, _) in enumerate(ROWS)]
    for temperature in (0.0, 1.0):
        settings = GenerateSettings(max_tokens=8, temperature=temperature, tokens_per_batch=1024)
        found[f"responses at {temperature}"] = respond(policy, table, prompts, settings, 1024, 0)
    return found | {"base": base}


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return everything(folder)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_mesh_gives_what_one_device_gives(folder: Path, alone: dict[str, Any], shape: tuple[int, int, int]) -> None:
    with use_mesh(settings_of(shape)):
        found = everything(folder)
    for name in ("sft", "dpo"):
        assert found[name] == pytest.approx(alone[name], rel=1e-5)
        assert alone[name][2] < alone[name][0] - 0.01
    assert found["scores"] == pytest.approx(alone["scores"], rel=1e-5)
    for temperature in (0.0, 1.0):
        assert found[f"responses at {temperature}"] == alone[f"responses at {temperature}"]
    data, fsdp, tensor = shape
    kernel, embedding = found["base"]["layers"]["q"]["kernel"], found["base"]["embedding"]
    assert kernel.addressable_shards[0].data.size == kernel.size // (fsdp * tensor)
    assert embedding.addressable_shards[0].data.size == embedding.size // (fsdp * tensor)
    state = found["sft state"]
    # A step leaves everything where it was made, the optimizer's moments beside their weights.
    for tree in (state.trainable, state.optimizer[1][0].mu, state.optimizer[1][0].nu):
        a, b = tree["layers"]["q"]["lora_a"], tree["layers"]["q"]["lora_b"]
        assert a.addressable_shards[0].data.size == a.size // fsdp
        assert b.addressable_shards[0].data.size == b.size // tensor
    assert len(kernel.sharding.device_set) == data * fsdp * tensor == 8


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
    found = sharding.spec_of(keys, shape, mesh)
    assert tuple(found) + (None,) * (len(shape) - len(found)) == tuple(spec) + (None,) * (len(shape) - len(spec))


def test_meshes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"mesh of data=3 fsdp=4 tensor=1 needs 12 devices, 8 are here"):
        sharding.make_mesh(MeshSettings(data=3, fsdp=4))
    with pytest.raises(ValueError, match=r"mesh.fsdp must be at least 1, got 0"):
        MeshSettings(fsdp=0)
    assert dict(sharding.make_mesh(MeshSettings(data=0, tensor=2)).shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert dataclasses.asdict(MeshSettings()) == {"data": 1, "fsdp": 1, "tensor": 1}


def test_micro_batches_are_counted_in_rows_a_device() -> None:
    settings = train.WarmupSettings(batch_size=24, micro_batch=2)
    assert settings.n_micro() == 12
    with use_mesh(MeshSettings(data=2, fsdp=2)):
        assert settings.n_micro() == 3
        assert train.WarmupSettings(batch_size=8, micro_batch=8).n_micro() == 1
        assert train.WarmupSettings(batch_size=24).n_micro() == 1
    message = r"^warmup.batch_size=24 must be a multiple of the 8 devices"
    with use_mesh(MeshSettings(data=8)), pytest.raises(ValueError, match=message):
        settings.n_micro()
    with use_mesh(MeshSettings(data=8)), pytest.raises(ValueError, match=r"batch_size=4 must be a multiple of the 8"):
        train.WarmupSettings(batch_size=4).n_micro()


@pytest.mark.parametrize("shape", [(2, 2, 2), (4, 2, 1)], ids=str)
def test_no_part_of_a_weight_is_read_twice(
    folder: Path, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    read = hf._read

    def counted(*arguments: Any) -> np.ndarray:
        found = read(*arguments)
        sizes.append(found.size)
        return found

    monkeypatch.setattr(hf, "_read", counted)
    with use_mesh(settings_of(shape)):
        params = hf.load(folder)[1]
    assert sum(sizes) == sum(leaf.size for leaf in jax.tree.leaves(params))
