"""NF4: the codes and errors of bitsandbytes, few bytes a weight, and training beside them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from itool_jax.inference.sampler import Policy, score
from itool_jax.model import hf, quantize
from itool_jax.model.linear import LoraSettings
from itool_jax.model.lora import beside, initialize_adapters
from itool_jax.model.transformer import abstract
from itool_jax.text.padding import collate
from itool_jax.training import loop as train
from tests import tiny

SHAPES = [(128, 96), (256, 64), (512, 640), (64, 1000)]


def kernel(n_in: int, n_out: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_in, n_out)).astype(np.float32) * 0.02


def test_the_sixteen_values_are_those_of_the_paper() -> None:
    printed = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0]
    printed += [0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    np.testing.assert_allclose(quantize.NF4, printed, atol=5e-5)
    assert len(set(quantize.DYNAMIC.tolist())) == 256
    assert (quantize.DYNAMIC.min(), quantize.DYNAMIC.max()) == (pytest.approx(-0.9930, abs=1e-4), 1.0)


@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
@pytest.mark.parity
def test_codes_and_error_are_those_of_bitsandbytes(n_in: int, n_out: int) -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = kernel(n_in, n_out)
    codes = jax.jit(quantize.quantize)(weight)
    ours = np.asarray(quantize.dequantize(codes, n_in, "float32"))
    packed, state = functional.quantize_4bit(
        torch.tensor(weight.T.copy()), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    theirs = functional.dequantize_4bit(packed, state).numpy().T
    assert np.array_equal(np.asarray(codes.codes).T.reshape(-1), packed.numpy().reshape(-1))
    assert np.abs(ours - weight).mean() == pytest.approx(np.abs(theirs - weight).mean(), rel=1e-4)
    # Scales fall on the neighbouring eight-bit value now and then, for it rounds a few of them otherwise.
    assert np.abs(ours - theirs).max() < 0.02 * np.abs(weight).max()


@pytest.mark.parametrize(("n_in", "n_out"), SHAPES)
def test_bytes_a_weight(n_in: int, n_out: int) -> None:
    packed = quantize.quantize(jnp.asarray(kernel(n_in, n_out)))
    assert sum(leaf.nbytes for leaf in packed) / (n_in * n_out) < 0.5171
    assert [(x.shape, x.dtype) for x in packed] == [(x.shape, x.dtype) for x in quantize.zeros(n_in, n_out)]


def test_widths_that_blocks_do_not_divide_and_blocks_of_zeros() -> None:
    weight = kernel(100, 7)
    weight[64:, 3] = 0
    back = quantize.dequantize(quantize.quantize(jnp.asarray(weight)), 100, "float32")
    assert back.shape == (100, 7)
    assert np.abs(back - weight).mean() < 0.12 * np.abs(weight).mean()
    assert np.abs(back[64:, 3]).max() < 1e-9 + 0.01 * np.abs(weight).max()


def test_a_quantised_model_is_the_model_of_its_dequantised_weights_and_trains(tmp_path: Path) -> None:
    folder = tiny.tiny_checkpoint(tmp_path)
    config, params = hf.load(folder, nf4=True)
    layers = params["layers"]
    plain = hf.load(folder)[1]
    for name in ("q", "k", "v", "o", "gate", "up", "down"):
        n_in = plain["layers"][name]["kernel"].shape[1]
        unpack = jax.vmap(lambda c, n=n_in: quantize.dequantize(c, n, "float32"))
        plain["layers"][name]["kernel"] = unpack(quantize.Codes(**layers[name]["kernel"]))
    rows = [([5, 6, 7], [8, 9, 10]), ([4] * 20, [11, 12])]
    batch = collate(rows, 128, 2)
    scores = score(*Policy(abstract(config)[0], params), batch)
    expected = score(*Policy(abstract(hf.load(folder)[0])[0], plain), batch)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)
    lora = LoraSettings(rank=4)
    graph, shapes, _ = abstract(config, lora)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    adapters = initialize_adapters(config, lora, jax.random.key(0))
    own = train.adamw(0.0, 1.0)
    state, seen = train.new_state(own, adapters), []
    for _ in range(4):
        state, metrics = train.train_step(
            train.sft_loss(graph), own, 1, state, params, batch, jax.random.key(0), np.float32(1e-2)
        )
        seen.append(float(metrics["loss"]))
    assert seen[0] == pytest.approx(-float(expected.sum()) / 5, rel=1e-4)
    assert seen[-1] < seen[0] - 0.1
    trained = score(*Policy(graph, beside(params, state.trainable)), batch)
    assert -float(trained.sum()) / 5 < seen[-1]
    model = nnx.merge(graph, params, adapters)
    assert model.config.nf4
