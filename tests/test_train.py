"""Training: losses against sums worked out from plain logits, one program for all fits, adapters only."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from itool_jax.data.batches import PairRow, collate_pairs
from itool_jax.inference.sampler import score
from itool_jax.model.linear import Linear, LoraSettings
from itool_jax.model.lora import beside, initialize_adapters
from itool_jax.model.transformer import ModelConfig, Params, abstract
from itool_jax.store import checkpoint, training
from itool_jax.system import hosts
from itool_jax.system.metrics import Metrics
from itool_jax.system.preemption import PreemptionError
from itool_jax.text.padding import PairBatch, TargetBatch, collate, collate_packed
from itool_jax.training import loop as train
from itool_jax.training import losses
from itool_jax.training.loop import TrainState, train_step
from itool_jax.training.losses import LossName, LossSettings, PairLogProbs
from itool_jax.training.settings import PreferenceSettings, TrainingSettings, WarmupSettings
from tests import tiny

V, WIDTH = 24, 16
KEY = jax.random.key(0)
LORA = LoraSettings(rank=4, alpha=8.0)
ROWS = [([3, 5, 7], [9, 2]), ([4], [11, 12, 13, 2]), ([6, 6, 8, 1, 9], [2]), ([7, 3], [5, 6, 7])]
PAIRS = [([3, 5, 7], [9, 2], [9, 8, 2]), ([4], [11, 12, 13, 2], [2]), ([6, 6, 8, 1, 9], [10], [12, 2, 5])]
VISITS = [(4, 1), (2, 6), (1, 1)]


class Model(NamedTuple):
    config: ModelConfig
    graph: nnx.GraphDef
    base: Params
    adapters: Params


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """One layer of random weights; adapters that change its answers already."""
    config = tiny.model_config(tmp_path_factory.mktemp("train"), vocab_size=V, num_hidden_layers=1)
    fresh = initialize_adapters(config, LORA, jax.random.key(0))
    noise = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32), fresh)
    return Model(config, abstract(config, LORA)[0], tiny.random_params(config), adapters)


@functools.partial(jax.jit, static_argnums=0)
def all_logits(graph: nnx.GraphDef, adapters: Params, base: Params, tokens_BT: jax.Array) -> jax.Array:
    policy = nnx.merge(graph, adapters, base)
    return policy.logits(policy(tokens_BT)[0])


def token_log_probs(model: Model, prompt: list[int], target: list[int]) -> np.ndarray:
    """Float64 log π of each target token, from the logits of the whole row alone."""
    tokens_BT = np.zeros((1, WIDTH), np.int32)
    tokens_BT[0, : len(prompt) + len(target)] = prompt + target
    logits_TV = np.asarray(all_logits(model.graph, model.adapters, model.base, tokens_BT)[0], np.float64)
    log_probs_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
    return np.array([log_probs_TV[len(prompt) - 1 + i, token] for i, token in enumerate(target)])


@pytest.fixture(scope="module")
def gathered(model: Model) -> dict[str, Any]:
    """Log-probs of the rows' targets, and sums over the chosen and the rejected steps."""
    return {
        "rows": [token_log_probs(model, *row) for row in ROWS],
        "chosen": [token_log_probs(model, prompt, chosen).sum() for prompt, chosen, _ in PAIRS],
        "rejected": [token_log_probs(model, prompt, rejected).sum() for prompt, _, rejected in PAIRS],
    }


# The compiled functions are shared by the tests: shapes and settings decide how often they compile.
_value_and_gradient = jax.jit(jax.value_and_grad(lambda loss, *a: loss(*a), argnums=1, has_aux=True), static_argnums=0)


def evaluate(loss: train.LossFn, model: Model, batch: Any) -> tuple[float, dict[str, Any], Params]:
    """Value, metrics and gradient, all divided by the weight."""
    sums = _value_and_gradient(loss, model.adapters, model.base, batch, KEY)
    weight = sums[0][1]["weight"]
    (value, metrics), gradient = jax.tree.map(lambda x: x / weight, sums)
    return float(value), {name: float(x) for name, x in metrics.items() if name != "weight"}, gradient


def assert_close(one: Params, two: Params) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, two)


# Supervised loss ---------------------------------------------------------------------------------------------


def test_sft_is_the_mean_over_target_tokens(model: Model, gathered: dict[str, Any]) -> None:
    value, _, gradient = evaluate(train.sft_loss(model.graph), model, collate(ROWS, WIDTH, 6))
    every = np.concatenate(gathered["rows"])
    assert len(every) == 10
    assert value == pytest.approx(-every.mean(), abs=1e-4)
    assert value != pytest.approx(-np.mean([row.mean() for row in gathered["rows"]]), abs=1e-3)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-2


def test_sft_ignores_padding_and_the_order(model: Model, gathered: dict[str, Any]) -> None:
    loss, batch = train.sft_loss(model.graph), collate(ROWS, WIDTH, 6)
    value, _, gradient = evaluate(loss, model, batch)
    for same in (garbled(batch), collate(ROWS[::-1], WIDTH, 6)):
        other, _, other_gradient = evaluate(loss, model, same)
        assert other == pytest.approx(value, abs=1e-5)
        assert_close(gradient, other_gradient)
    less, _, _ = evaluate(loss, model, collate(ROWS[:3], WIDTH, 6))
    assert less == pytest.approx(-np.concatenate(gathered["rows"][:3]).mean(), abs=1e-4)
    assert abs(less - value) > 1e-3


def garbled(batch: TargetBatch) -> TargetBatch:
    """The same batch with other tokens wherever it holds none."""
    used_BT = np.zeros(batch.tokens_BT.shape, bool)
    for b, (prompt, target) in enumerate(ROWS):
        used_BT[b, : len(prompt) + len(target)] = True
    return batch._replace(
        tokens_BT=np.where(used_BT, batch.tokens_BT, 21).astype(np.int32),
        targets_BR=np.where(batch.mask_BR, batch.targets_BR, 20).astype(np.int32),
    )


def test_packed_rows_lose_what_single_rows_do(model: Model) -> None:
    """Value and gradient: no sample sees another, and each begins at position 0."""
    loss = train.sft_loss(model.graph)
    value, _, gradient = evaluate(loss, model, collate(ROWS, WIDTH, 6))
    packed = collate_packed([[ROWS[0], ROWS[2]], [ROWS[3], ROWS[1]]], WIDTH, 3)
    again, _, same = evaluate(loss, model, packed)
    assert again == pytest.approx(value, rel=1e-5)
    assert_close(gradient, same)
    for other in (packed._replace(segment_BT=None), packed._replace(segment_BT=packed.segment_BT * 0 + 1)):
        assert evaluate(loss, model, other)[0] != pytest.approx(value, rel=1e-3)


# Preference losses -------------------------------------------------------------------------------------------


def pair_batch(reference: list[tuple[float, float]], order: tuple[int, ...] = (0, 1, 2)) -> PairBatch:
    rows = [PairRow(*PAIRS[i], reference[i], VISITS[i]) for i in order]
    return collate_pairs(rows, WIDTH, 4)


REFERENCE = [(-5.0, -9.0), (-20.0, -2.5), (-4.0, -12.0)]


def by_hand(gathered: dict[str, Any], reference: list[tuple[float, float]]) -> PairLogProbs:
    lengths = [[len(pair[side]) for pair in PAIRS] for side in (1, 2)]
    columns = (gathered["chosen"], gathered["rejected"], *zip(*reference, strict=True), *lengths)
    return PairLogProbs(*(np.array(c, np.float32) for c in (*columns, *zip(*VISITS, strict=True))))


def test_dpo_is_that_of_sums_gathered_by_hand(model: Model, gathered: dict[str, Any]) -> None:
    settings = LossSettings()
    value, metrics, _ = evaluate(train.preference_loss(model.graph, settings), model, pair_batch(REFERENCE))
    pair = by_hand(gathered, REFERENCE)
    assert value == pytest.approx(float(losses.dpo(pair, 0.1).mean()), abs=1e-4)
    expected = {name: float(x) for name, x in losses.pair_metrics(pair, 0.1).items()}
    assert metrics == pytest.approx(expected, abs=1e-4)
    assert 0 < expected["reward_accuracy"] < 1


@pytest.mark.parametrize("loss", ["dpo", "conservative_dpo"])
def test_it_is_ln_2_where_the_policy_is_the_reference(model: Model, gathered: dict[str, Any], loss: LossName) -> None:
    reference = list(zip(gathered["chosen"], gathered["rejected"], strict=True))
    settings = LossSettings(loss=loss)
    value, metrics, gradient = evaluate(train.preference_loss(model.graph, settings), model, pair_batch(reference))
    assert value == pytest.approx(math.log(2), abs=1e-4)
    assert metrics["reward_margin"] == pytest.approx(0, abs=1e-4)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) > 1e-3


@pytest.mark.parametrize(("name", "sft_weight"), [*((name, 0.0) for name in losses.DEFAULT_BETA), ("dpo", 0.5)])
def test_every_loss_is_finite_and_ignores_padding_and_order(
    model: Model, gathered: dict[str, Any], name: LossName, sft_weight: float
) -> None:
    settings = LossSettings(loss=name, sft_weight=sft_weight)
    loss = train.preference_loss(model.graph, settings)
    value, metrics, gradient = evaluate(loss, model, pair_batch(REFERENCE))
    expected = losses.preference_loss(settings, by_hand(gathered, REFERENCE)).mean()
    assert value == pytest.approx(float(expected), rel=1e-4)
    leaves = jax.tree.leaves(gradient)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert max(float(np.abs(leaf).max()) for leaf in leaves) > 1e-4
    other, other_metrics, other_gradient = evaluate(loss, model, pair_batch(REFERENCE, (2, 0, 1)))
    assert other == pytest.approx(value, rel=1e-5)
    assert other_metrics == pytest.approx(metrics, abs=1e-4)
    assert_close(gradient, other_gradient)
    # What stands in the columns of a pair that does not count must not matter either.
    spoiled = pair_batch(REFERENCE)
    for column, value_3 in zip((*spoiled.reference, *spoiled.visits), (1e30, -1e30, 7, 7), strict=True):
        column[3] = value_3
    assert evaluate(loss, model, spoiled)[:1] == (value,)


def test_a_loss_is_made_once(model: Model) -> None:
    """Else every fit would compile its step again."""
    graph, settings = abstract(model.config, LORA)[0], PreferenceSettings(loss="ipo", beta=0.2, epochs=7)
    assert train.sft_loss(graph) is train.sft_loss(model.graph)
    assert settings.loss_settings == LossSettings(loss="ipo", beta=0.2)
    same = train.preference_loss(graph, settings.loss_settings)
    assert same is train.preference_loss(model.graph, LossSettings(loss="ipo", beta=0.2))
    assert same is not train.preference_loss(model.graph, LossSettings(loss="ipo", beta=0.3))


# Steps -------------------------------------------------------------------------------------------------------


def toy_loss(trainable: Params, frozen: Params, batch: Any, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    error = trainable["w"] * frozen["scale"] - batch
    return (error**2).sum(), {"weight": jnp.float32(1), "size": jnp.abs(trainable["w"]).sum()}


@pytest.mark.parametrize("clip_norm", [0.5, 1e6])
def test_a_step_is_adamw_at_its_rate(clip_norm: float) -> None:
    settings = WarmupSettings(learning_rate=0.05, weight_decay=0.1, clip_norm=clip_norm)
    frozen, n_steps = {"scale": jnp.array([1.0, 2.0])}, 6
    start = {"w": jnp.array([1.0, -3.0])}
    rates = jnp.array([settings.rate(step, n_steps) for step in range(n_steps)])
    own = train.adamw(settings.weight_decay, settings.clip_norm)
    plain = optax.chain(optax.clip_by_global_norm(clip_norm), optax.adamw(lambda step: rates[step], weight_decay=0.1))
    weights, plain_state = start, plain.init(start)
    state = TrainState(jax.tree.map(jnp.copy, start), own.init(start))
    for step in range(n_steps):
        batch = jnp.array([step / 2, -1.0])
        (value, _), gradient = jax.value_and_grad(toy_loss, has_aux=True)(weights, frozen, batch, KEY)
        updates, plain_state = plain.update(gradient, plain_state, weights)
        weights = optax.apply_updates(weights, updates)
        state, metrics = train_step(toy_loss, own, 1, state, frozen, batch, KEY, np.float32(rates[step]))
        np.testing.assert_allclose(state.trainable["w"], weights["w"], rtol=1e-5)
        assert float(metrics["loss"]) == pytest.approx(float(value), rel=1e-5)
        norm = np.sqrt((np.asarray(gradient["w"]) ** 2).sum())
        assert float(metrics["gradient_norm"]) == pytest.approx(norm, rel=1e-5)
        assert "size" in metrics
    assert np.abs(np.asarray(weights["w"]) - np.asarray(start["w"])).min() > 1e-3


def run(
    model: Model, path: Path, n_steps: int, loss: train.LossFn, batch: Any, settings: TrainingSettings | None = None
) -> tuple[Params, list[dict[str, Any]]]:
    """A fit on one batch over and over; the adapters and the lines of its metrics."""
    settings = settings or WarmupSettings(learning_rate=0.03)
    batches = grain.MapDataset.source(range(n_steps)).map(lambda _: batch)
    path.mkdir(exist_ok=True)
    metrics = Metrics(path / "metrics.jsonl", "warmup")
    adapters = jax.tree.map(jnp.copy, model.adapters)  # training uses them up
    base = jax.device_put(model.base, jax.devices()[0])  # tied to a device, as one that was loaded is
    trained = training.train_resumably(loss, settings, (adapters, base), batches, seed=0, what="test", metrics=metrics)
    return trained, [json.loads(line) for line in metrics.path.read_text().splitlines()]


def test_fit_overfits_two_samples_and_changes_adapters_only(model: Model, tmp_path: Path) -> None:
    before, programs = jax.tree.map(np.array, (model.adapters, model.base)), train_step._cache_size()
    loss, batch = train.sft_loss(model.graph), collate(ROWS[:2], WIDTH, 4)
    trained, lines = run(model, tmp_path / "long", 60, loss, batch)
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert {line["stage"] for line in lines} == {"warmup"}
    assert lines[0]["loss"] > 1
    assert lines[-1]["loss"] < 0.05
    # Neither the base nor the adapters that the caller came with have changed, or been given away.
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, (model.adapters, model.base)))
    assert jax.tree.structure(trained) == jax.tree.structure(model.adapters)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), trained, model.adapters)
    assert all(jax.tree.leaves(changed))
    learnt = model._replace(adapters=trained)
    assert all(np.exp(token_log_probs(learnt, *row)).min() > 0.8 for row in ROWS[:2])
    # Other numbers of steps and rates, and the same loss asked for anew: still one program.
    again = train.sft_loss(abstract(model.config, LORA)[0])
    for n_steps, rate in ((1, 1e-3), (3, 2e-3)):
        other = collate(ROWS[n_steps - 1 :], WIDTH, 4)
        run(model, tmp_path / str(n_steps), n_steps, again, other, WarmupSettings(learning_rate=rate))
    assert train_step._cache_size() == programs + 1


def test_preference_training_prefers(model: Model, gathered: dict[str, Any], tmp_path: Path) -> None:
    reference = list(zip(gathered["chosen"], gathered["rejected"], strict=True))
    settings = PreferenceSettings(learning_rate=0.02)
    loss = train.preference_loss(model.graph, settings.loss_settings)
    _, lines = run(model, tmp_path, 25, loss, pair_batch(reference), settings)
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert lines[-1]["loss"] < 0.3
    assert lines[-1]["reward_accuracy"] == pytest.approx(1)
    assert lines[-1]["reward_margin"] > 1


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_the_gradient_of_micro_batches_is_that_of_the_batch(model: Model, kind: str) -> None:
    """Rows of different lengths and a padded one: equal shares of the parts would not do."""
    if kind == "sft":
        loss, batch = train.sft_loss(model.graph), collate(ROWS[:3], WIDTH, 4)
    else:
        loss, batch = train.preference_loss(model.graph, LossSettings()), pair_batch(REFERENCE)
    own, updates = train.adamw(0.0, 1e6), []
    for n_micro in (1, 2, 4):
        state = train.new_state(own, jax.tree.map(jnp.copy, model.adapters))
        state, metrics = train_step(loss, own, n_micro, state, model.base, batch, KEY, np.float32(1e-2))
        updates.append((state, jax.tree.map(float, metrics)))
    for state, metrics in updates[1:]:
        assert metrics == pytest.approx(updates[0][1], rel=1e-4)
        # Adam's first moment is the gradient: compared as it is, not as a step of equal size everywhere.
        moments = (s.optimizer[1][0].mu for s in (state, updates[0][0]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 + 1e-4 * np.abs(b).max()), *moments)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    """One layer with nothing but its adapter: B picks the inputs that A hands on one by one."""
    lora = LoraSettings(rank=50, alpha=50.0, dropout=0.3)
    layer = Linear(50, 50, bias=False, lora=lora, dtype="float32", nf4=False, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.zeros((50, 50))
    layer.lora_a[...] = layer.lora_b[...] = jnp.eye(50)
    x = jnp.full((400, 50), 2.0)
    np.testing.assert_allclose(layer(x), x, rtol=1e-5)
    dropped = np.asarray(layer(x, KEY))
    np.testing.assert_allclose(np.unique(np.round(dropped, 4)), [0, 2 / 0.7], atol=1e-4)
    assert (dropped == 0).mean() == pytest.approx(0.3, abs=0.02)
    assert not np.array_equal(dropped, layer(x, jax.random.key(1)))
    np.testing.assert_array_equal(dropped, layer(x, KEY))


def test_a_training_step_drops_and_a_policy_does_not(model: Model) -> None:
    graph = abstract(model.config, dataclasses.replace(LORA, dropout=0.5))[0]
    batch = collate(ROWS, WIDTH, 6)
    plain = evaluate(train.sft_loss(model.graph), model, batch)[0]
    assert evaluate(train.sft_loss(graph), model, batch)[0] != pytest.approx(plain, rel=1e-3)
    alike = [score(g, beside(model.base, model.adapters), batch) for g in (graph, model.graph)]
    np.testing.assert_allclose(*alike, rtol=1e-6)


@pytest.mark.parametrize("remat", ["layers", "dots"])
def test_what_is_computed_again_changes_nothing(model: Model, remat: Any) -> None:
    batch = collate(ROWS, WIDTH, 6)
    value, _, gradient = evaluate(train.sft_loss(model.graph), model, batch)
    graph = abstract(dataclasses.replace(model.config, remat=remat), LORA)[0]
    again, _, same = evaluate(train.sft_loss(graph), model, batch)
    assert again == pytest.approx(value, rel=1e-6)
    assert_close(gradient, same)


def test_no_batches_change_nothing(model: Model, tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", "warmup")
    loss = train.sft_loss(model.graph)
    none = grain.MapDataset.source([])
    start = model.adapters, model.base
    same = training.train_resumably(loss, WarmupSettings(), start, none, seed=0, what="none", metrics=metrics)
    jax.tree.map(np.testing.assert_array_equal, same, model.adapters)
    assert not metrics.path.exists()


# Goes on, and goes wrong ---------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


def test_who_is_asked_to_stop_while_the_model_is_loaded_compiles_no_step(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "asked_to_stop", lambda: True)
    metrics, batches = Metrics(tmp_path / "metrics.jsonl", "warmup"), grain.MapDataset.source([None])
    start, programs = (jax.tree.map(jnp.copy, model.adapters), model.base), train_step._cache_size()
    with pytest.raises(PreemptionError):
        training.train_resumably(
            train.sft_loss(model.graph), WarmupSettings(), start, batches, seed=0, what="test", metrics=metrics
        )
    assert train_step._cache_size() == programs


def test_a_training_that_was_cut_off_comes_to_the_same_bits(model: Model, tmp_path: Path) -> None:
    """Adapters with dropout off, batches that differ, cut off after any step."""
    data = grain.MapDataset.source(range(9)).map(lambda i: collate(ROWS[i % 3 :][:2], WIDTH, 4))
    settings, loss = WarmupSettings(learning_rate=0.03), train.sft_loss(model.graph)
    metrics = Metrics(tmp_path / "metrics.jsonl", "warmup")

    def fit_on(batches: grain.MapDataset, kept: checkpoint.TrainCheckpoints | None) -> Params:
        adapters = jax.tree.map(jnp.copy, model.adapters)
        base = jax.device_put(model.base, jax.devices()[0])
        given = loss, settings, (adapters, base), batches
        return training.train_resumably(*given, seed=0, what="test", metrics=metrics, checkpoints=kept)

    def lines() -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in metrics.path.read_text().splitlines()]
        return [{name: value for name, value in row.items() if name != "time"} for row in rows]

    def fail(i: int, after: int) -> Any:
        if i >= after:
            raise KilledError
        return data[i]

    whole = fit_on(data, None)
    expected = lines()
    for after in (1, 4, 7):
        folder = tmp_path / f"cut {after}"
        cut = grain.MapDataset.source(range(9)).map(lambda i, after=after: fail(i, after))
        kept = checkpoint.TrainCheckpoints(folder, 1)
        with pytest.raises(KilledError):
            fit_on(cut, kept)
        kept.finish()
        kept = checkpoint.TrainCheckpoints(folder, 1)
        jax.tree.map(np.testing.assert_array_equal, fit_on(data, kept), whole)
        assert lines() == expected


@pytest.mark.parametrize("wrong", [(2,), (1, 3, 5), (2, 3)])
def test_steps_without_finite_numbers_are_left_out(
    model: Model, tmp_path: Path, wrong: tuple[int, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    trained, rows = run_with(model, tmp_path, wrong, 6)
    assert [row["step"] for row in rows if row["skipped"]] == list(wrong)
    assert all(row["loss"] is None for row in rows if row["skipped"])
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(trained))
    assert capsys.readouterr().err.count(": skipped step ") == len(wrong)


def test_three_steps_in_a_row_without_finite_numbers_end_the_training(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 steps in a row .* the batch of step 4") as e:
        run_with(model, tmp_path, (2, 3, 4), 6)
    path = tmp_path / "warmup/not_finite_step_4.npz"
    assert str(path) in str(e.value)
    with np.load(path) as saved:
        assert np.isnan(saved["1"]).all() if "1" in saved else any(np.isnan(saved[n]).all() for n in saved.files)


def run_with(model: Model, folder: Path, wrong: tuple[int, ...], n_steps: int) -> tuple[Params, list[dict[str, Any]]]:
    """A fit whose batches of these steps carry a factor that is not a number."""
    inner = train.sft_loss(model.graph)

    def loss(trainable: Params, frozen: Params, batch: Any, key: Any) -> train.Loss:
        rows, factor = batch
        total, sums = inner(trainable, frozen, rows, key)
        return total * factor, sums

    def make(i: int) -> Any:
        return collate(ROWS[:2], WIDTH, 4), np.float32(np.nan if i + 1 in wrong else 1.0)

    batches, metrics = grain.MapDataset.source(range(n_steps)).map(make), Metrics(folder / "metrics.jsonl", "warmup")
    adapters, base = jax.tree.map(jnp.copy, model.adapters), jax.device_put(model.base, jax.devices()[0])
    start = adapters, base
    trained = training.train_resumably(loss, WarmupSettings(), start, batches, seed=0, what="test", metrics=metrics)
    return trained, [json.loads(line) for line in metrics.path.read_text().splitlines()]
