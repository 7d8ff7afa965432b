"""The losses against numbers worked out by hand, float64 NumPy, and the properties the formulas promise."""

import math
from collections.abc import Iterator
from typing import get_args

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from itool_jax.mcts.value import step_prior
from itool_jax.model.log_probs import masked_log_prob_sum, perplexity, token_log_probs, token_log_probs_from_logits
from itool_jax.training import losses
from itool_jax.training.losses import LossName, LossSettings, PairLogProbs

ALL_LOSSES = list(losses.DEFAULT_BETA)
"""Those of pairs."""


def make_pair(*fields: float) -> PairLogProbs:
    return PairLogProbs(*(jnp.array([field], jnp.float32) for field in fields))


# Policy and reference sums for chosen and rejected, lengths 5 and 7, visits 12 and 4 (ε is a quarter).
WORKED = make_pair(-10, -14, -12, -13, 5, 7, 12, 4)


def random_pair(seed: int, n: int = 16) -> PairLogProbs:
    rng = np.random.default_rng(seed)
    sums = -rng.uniform(0.5, 30, (4, n))
    return PairLogProbs(*(jnp.asarray(x, jnp.float32) for x in (*sums, *rng.integers(1, 20, (4, n)))))


def swap(pair: PairLogProbs) -> PairLogProbs:
    return PairLogProbs(*(pair[i] for i in (1, 0, 3, 2, 5, 4, 7, 6)))


def random_inputs(
    batch: int, time: int, width: int = 8, vocabulary: int = 11
) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (batch, time, width)),
        jax.random.normal(keys[1], (width, vocabulary)),
        jax.random.randint(keys[2], (batch, time), 0, vocabulary),
    )


# Log-probabilities ------------------------------------------------------------------------------------------


def test_token_log_probs_match_a_float64_log_softmax() -> None:
    hidden_BTD, unembedding_DV, targets_BT = random_inputs(2, 5)
    logits_BTV = np.asarray(hidden_BTD, np.float64) @ np.asarray(unembedding_DV, np.float64)
    log_softmax_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    expected_BT = np.take_along_axis(log_softmax_BTV, np.asarray(targets_BT)[..., None], -1)[..., 0]
    np.testing.assert_allclose(token_log_probs(hidden_BTD, unembedding_DV, targets_BT), expected_BT, atol=1e-5)
    from_logits_BT = token_log_probs_from_logits(jnp.asarray(logits_BTV, jnp.float32), targets_BT)
    np.testing.assert_allclose(from_logits_BT, expected_BT, atol=1e-5)


def test_log_probs_of_low_precision_and_huge_logits_are_float32_and_finite() -> None:
    logits_BTV = jnp.array([[[1e4, -1e4, 0.0]]], jnp.bfloat16)
    for target, expected in [(0, 0.0), (1, -2e4), (2, -1e4)]:
        log_probs_BT = token_log_probs_from_logits(logits_BTV, jnp.array([[target]]))
        assert log_probs_BT.dtype == jnp.float32
        np.testing.assert_allclose(log_probs_BT, [[expected]], rtol=5e-3)


@pytest.mark.parametrize(("batch", "time", "chunk"), [(3, 11, 1), (3, 11, 7), (3, 11, 32), (11, 3, 2), (1, 33, 12)])
def test_chunked_log_probs_equal_plain_ones_gradients_included(batch: int, time: int, chunk: int) -> None:
    hidden_BTD, unembedding_DV, targets_BT = random_inputs(batch, time)
    weights_BT = jnp.arange(1.0, 1 + batch * time).reshape(batch, time)

    def weighted(hidden_BTD: jax.Array, unembedding_DV: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
        log_probs_BT = token_log_probs(hidden_BTD, unembedding_DV, targets_BT, chunk)
        return (weights_BT * log_probs_BT).mean(), log_probs_BT

    gradient = jax.grad(weighted, argnums=(0, 1), has_aux=True)
    chunked_gradients, chunked_BT = gradient(hidden_BTD, unembedding_DV, chunk)
    plain_gradients, plain_BT = gradient(hidden_BTD, unembedding_DV, batch * time)
    np.testing.assert_allclose(chunked_BT, plain_BT, atol=1e-6)
    for chunked, plain in zip(chunked_gradients, plain_gradients, strict=True):
        assert np.abs(plain).max() > 0.1
        np.testing.assert_allclose(chunked, plain, atol=2e-5)


def buffer_sizes(jaxpr: jax.extend.core.Jaxpr) -> Iterator[int]:
    """Sizes of every intermediate value, those of inner jaxprs (scan, checkpoint, jit) included."""
    for equation in jaxpr.eqns:
        yield from (math.prod(variable.aval.shape) for variable in equation.outvars)
        for value in equation.params.values():
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from buffer_sizes(getattr(value, "jaxpr", value))


@pytest.mark.parametrize(("chunk", "holds_all_logits"), [(16, False), (4 * 64, True)])
def test_chunking_never_holds_all_logits_even_in_the_backward_pass(chunk: int, holds_all_logits: bool) -> None:
    batch, time, vocabulary = 4, 64, 512
    hidden_BTD, unembedding_DV, targets_BT = random_inputs(batch, time, vocabulary=vocabulary)
    gradient = jax.grad(lambda h, u: token_log_probs(h, u, targets_BT, chunk).sum(), argnums=(0, 1))
    largest = max(buffer_sizes(jax.make_jaxpr(gradient)(hidden_BTD, unembedding_DV).jaxpr))
    assert (largest >= batch * time * vocabulary) == holds_all_logits
    assert holds_all_logits or largest <= chunk * vocabulary


def test_chunk_must_be_positive() -> None:
    with pytest.raises(ValueError, match="chunk must be positive, got 0"):
        token_log_probs(*random_inputs(1, 2), chunk=0)


@pytest.mark.parametrize(("exponent", "expected"), [(0.0, 0.36), (1.0, 0.711379), (1.25, 0.772006)])
def test_step_prior_worked_by_hand(exponent: float, expected: float) -> None:
    log_prob_sum = jnp.log(jnp.array([0.9, 0.8, 0.5])).sum()
    assert step_prior(log_prob_sum, jnp.array(3), exponent) == pytest.approx(expected, abs=1e-6)


def test_perplexity_worked_by_hand() -> None:
    log_prob_sum = jnp.log(jnp.array([0.5, 0.25, 0.5])).sum()
    assert perplexity(log_prob_sum, jnp.array(3)) == pytest.approx(2.519842, abs=1e-6)


@pytest.mark.parametrize("length", [1, 4, 300])
def test_perplexity_inverts_the_geometric_mean_prior_and_is_one_for_certainty(length: int) -> None:
    log_prob_sum, n = jnp.array(-0.7 * length), jnp.array(length)
    inverse = perplexity(log_prob_sum, n) * step_prior(log_prob_sum, n, 1.0)
    assert inverse == pytest.approx(1, abs=1e-6)
    assert perplexity(jnp.array(0.0), n) == 1


# Supervised loss --------------------------------------------------------------------------------------------


def test_sft_loss_sums_over_the_mask_and_ignores_padding_and_order() -> None:
    log_probs_BT = jnp.array([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]])
    mask_BT = jnp.array([[0, 1, 1], [1, 0, 0]])
    total, count = losses.sft_loss(log_probs_BT, mask_BT)
    assert (total, count) == (14, 3)
    padded_BT = jnp.pad(log_probs_BT, ((0, 1), (0, 2)), constant_values=jnp.nan)[::-1]
    assert losses.sft_loss(padded_BT, jnp.pad(mask_BT, ((0, 1), (0, 2)))[::-1]) == (total, count)


def test_sft_gradient_is_minus_one_on_the_mask_and_zero_elsewhere() -> None:
    mask_BT = jnp.array([[True, False, True]])
    gradient_BT = jax.grad(lambda x: losses.sft_loss(x, mask_BT)[0])(jnp.array([[-1.0, jnp.nan, -3.0]]))
    np.testing.assert_array_equal(gradient_BT, [[-1, 0, -1]])


def test_masked_sum_ignores_prompt_and_padding() -> None:
    log_probs_BT = jnp.array([[jnp.nan, -1.5, -2.5, -jnp.inf]])
    assert masked_log_prob_sum(log_probs_BT, jnp.array([[0, 1, 1, 0]])) == -4


# Preference losses: numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("dpo", 0.554355), ("conservative_dpo", 0.629355), ("ipo", 19.866122), ("simpo", 0.974077)],
)
def test_losses_worked_by_hand(loss: LossName, expected: float) -> None:
    np.testing.assert_allclose(losses.preference_loss(LossSettings(loss=loss), WORKED), [expected], rtol=1e-6)


def test_gap_and_dpo_gradient_worked_by_hand() -> None:
    assert losses.log_ratio_gap(WORKED) == 3
    gradient = jax.grad(lambda pair: losses.dpo(pair, 0.1).sum())(WORKED)
    np.testing.assert_allclose(gradient.policy_chosen_B, [-0.0425557], atol=1e-7)
    np.testing.assert_allclose(gradient.policy_rejected_B, [0.0425557], atol=1e-7)


def test_dpop_worked_by_hand() -> None:
    pair = make_pair(-13, -16, -12, -13, 5, 7, 1, 1)  # Δ is 2, and the chosen step fell by 1
    np.testing.assert_allclose(losses.dpop(pair, 0.1, 5.0), [0.854355], rtol=1e-6)
    settings = LossSettings(loss="dpop", dpop_lambda=5.0)
    np.testing.assert_allclose(losses.preference_loss(settings, pair), [0.854355], rtol=1e-6)
    assert LossSettings().dpop_lambda == 50
    risen = make_pair(-11, -16, -12, -13, 5, 7, 1, 1)
    np.testing.assert_array_equal(losses.dpop(risen, 0.1, 5.0), losses.dpo(risen, 0.1))


def test_orpo_worked_by_hand() -> None:
    pair = make_pair(-1 * 4, -2 * 3, 0, 0, 4, 3, 1, 1)
    np.testing.assert_allclose(losses.orpo(pair, 0.1), [1.023818], atol=1e-6)
    log_sigmoid = np.asarray(losses.orpo(pair, 0.0) - losses.orpo(pair, 1.0), np.float64)
    np.testing.assert_allclose(-np.log(np.expm1(-log_sigmoid)), [1.313262], atol=2e-6)  # the log odds ratio itself


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"), [(12, 4, 0.25), (1, 0, 0), (3, 3, 0.5), (2, 6, 0.5), (0, 0, 0)]
)
def test_label_noise_worked_by_hand(chosen: int, rejected: int, expected: float) -> None:
    assert losses.label_noise(jnp.array([chosen]), jnp.array([rejected])) == expected


def reference_loss(settings: LossSettings, pair: PairLogProbs) -> np.ndarray:
    """The table of formulas, literally, in float64."""
    pw, pl, rw, rl, nw, nl, vw, vl = (np.asarray(x, np.float64) for x in pair)
    beta, gap = settings.resolved_beta, (pw - rw) - (pl - rl)
    lw, ll = pw / nw, pl / nl

    def log_sigmoid(x: np.ndarray) -> np.ndarray:
        return -np.logaddexp(0, -x)

    noise = np.minimum(0.5, 1 - 1 / (1 + vl / np.maximum(1, vw)))
    log_odds = (lw - ll) - (np.log(1 - np.exp(lw)) - np.log(1 - np.exp(ll)))
    table = {
        "dpo": -log_sigmoid(beta * gap),
        "conservative_dpo": -(1 - noise) * log_sigmoid(beta * gap) - noise * log_sigmoid(-beta * gap),
        "ipo": ((pw - rw) / nw - (pl - rl) / nl - 1 / (2 * beta)) ** 2,
        "simpo": -log_sigmoid(beta * (lw - ll) - settings.margin),
        "orpo": -lw - settings.orpo_lambda * log_sigmoid(log_odds),
        "dpop": -log_sigmoid(beta * (gap - settings.dpop_lambda * np.maximum(0, rw - pw))),
    }
    return table[settings.loss] - settings.sft_weight * lw


@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
@pytest.mark.parametrize("beta", [None, 0.7])
@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_losses_match_float64(loss: LossName, beta: float | None, sft_weight: float) -> None:
    settings = LossSettings(loss=loss, beta=beta, margin=0.8, orpo_lambda=0.4, dpop_lambda=2.0, sft_weight=sft_weight)
    pair = random_pair(seed=1)
    loss_B = losses.preference_loss(settings, pair)
    assert loss_B.dtype == jnp.float32
    np.testing.assert_allclose(loss_B, reference_loss(settings, pair), rtol=2e-5)


# Preference losses: properties ------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dpo", "conservative_dpo", "dpop"])
@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_policy_equal_to_reference_gives_ln_2(loss: LossName, beta: float) -> None:
    pair = random_pair(seed=2)
    pair = pair._replace(reference_chosen_B=pair.policy_chosen_B, reference_rejected_B=pair.policy_rejected_B)
    loss_B = losses.preference_loss(LossSettings(loss=loss, beta=beta), pair)
    np.testing.assert_allclose(loss_B, np.full(16, math.log(2)), rtol=1e-6)


def test_swapping_chosen_and_rejected_negates_the_gap() -> None:
    pair = random_pair(seed=3)
    gap_B = losses.log_ratio_gap(pair)
    assert np.abs(gap_B).min() > 1e-3
    np.testing.assert_array_equal(losses.log_ratio_gap(swap(pair)), -gap_B)


def test_conservative_dpo_without_noise_is_dpo_and_at_one_half_is_symmetric() -> None:
    pair = random_pair(seed=4)
    trusted = pair._replace(rejected_visits_B=jnp.zeros(16))
    np.testing.assert_allclose(losses.conservative_dpo(trusted, 0.1), losses.dpo(trusted, 0.1), rtol=1e-6)
    doubtful = pair._replace(chosen_visits_B=jnp.full(16, 3), rejected_visits_B=jnp.full(16, 3))
    symmetric_B = losses.conservative_dpo(doubtful, 0.1)
    np.testing.assert_allclose(symmetric_B, losses.conservative_dpo(swap(doubtful), 0.1), rtol=1e-6)


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_batch_order_does_not_matter(loss: LossName) -> None:
    pair, settings = random_pair(seed=5), LossSettings(loss=loss, sft_weight=0.1)
    permutation = np.random.default_rng(0).permutation(16)
    permuted_B = losses.preference_loss(settings, PairLogProbs(*(x[permutation] for x in pair)))
    np.testing.assert_array_equal(permuted_B, losses.preference_loss(settings, pair)[permutation])


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_padding_of_the_steps_does_not_matter(loss: LossName) -> None:
    log_probs_BT = -jax.random.uniform(jax.random.key(1), (4, 6), minval=0.1, maxval=3.0)
    mask_BT = jnp.array([[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]])

    def loss_of(log_probs_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
        sums, lengths = masked_log_prob_sum(log_probs_BT, mask_BT), mask_BT.sum(-1)
        pair = PairLogProbs(*(sums[i : i + 1] for i in range(4)), lengths[:1], lengths[1:2], jnp.ones(1), jnp.ones(1))
        return losses.preference_loss(LossSettings(loss=loss), pair)

    padded_BT = jnp.pad(
        jnp.where(mask_BT.astype(bool), log_probs_BT, jnp.nan), ((0, 0), (3, 5)), constant_values=jnp.nan
    )
    padded_B = loss_of(padded_BT, jnp.pad(mask_BT, ((0, 0), (3, 5))))
    np.testing.assert_allclose(padded_B, loss_of(log_probs_BT, mask_BT), rtol=1e-6)
    assert not np.allclose(padded_B, loss_of(log_probs_BT, jnp.ones_like(mask_BT)), rtol=1e-3)


def test_dpo_ignores_the_shared_prefix_gradient_included() -> None:
    pair = random_pair(seed=6)
    policy_prefix_B, reference_prefix_B = -jnp.linspace(0.5, 20, 16), -jnp.linspace(25, 1, 16)
    longer = pair._replace(
        policy_chosen_B=pair.policy_chosen_B + policy_prefix_B,
        policy_rejected_B=pair.policy_rejected_B + policy_prefix_B,
        reference_chosen_B=pair.reference_chosen_B + reference_prefix_B,
        reference_rejected_B=pair.reference_rejected_B + reference_prefix_B,
    )
    np.testing.assert_allclose(losses.dpo(longer, 0.1), losses.dpo(pair, 0.1), rtol=1e-5)

    def loss_with(prefix_B: jax.Array) -> jax.Array:
        chosen_B, rejected_B = pair.policy_chosen_B + prefix_B, pair.policy_rejected_B + prefix_B
        return losses.dpo(pair._replace(policy_chosen_B=chosen_B, policy_rejected_B=rejected_B), 0.1).sum()

    np.testing.assert_allclose(jax.grad(loss_with)(policy_prefix_B), np.zeros(16), atol=1e-7)


@pytest.mark.parametrize("loss", ["simpo", "orpo"])
def test_losses_without_reference_ignore_it(loss: LossName) -> None:
    pair = random_pair(seed=7)
    other = pair._replace(reference_chosen_B=pair.reference_chosen_B - 5)
    settings = LossSettings(loss=loss)
    np.testing.assert_array_equal(losses.preference_loss(settings, pair), losses.preference_loss(settings, other))


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_every_loss_pulls_chosen_up_and_rejected_down(loss: LossName) -> None:
    # At the reference, where IPO is below its target; ε a quarter, for at one half there is no direction.
    pair = random_pair(seed=8)._replace(chosen_visits_B=jnp.full(16, 12), rejected_visits_B=jnp.full(16, 4))
    pair = pair._replace(reference_chosen_B=pair.policy_chosen_B, reference_rejected_B=pair.policy_rejected_B)
    settings = LossSettings(loss=loss, beta=0.2)

    def total(chosen_B: jax.Array, rejected_B: jax.Array) -> jax.Array:
        moved = pair._replace(policy_chosen_B=chosen_B, policy_rejected_B=rejected_B)
        return losses.preference_loss(settings, moved).sum()

    slopes = jax.grad(total, argnums=(0, 1))(pair.policy_chosen_B, pair.policy_rejected_B)
    assert (slopes[0] < 0).all()
    assert (slopes[1] > 0).all()


EXTREMES = [0.0, -1e-30, -1e-8, -1e-3, -1.0, -1e3, -1e6]


@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_losses_and_gradients_are_finite_at_the_extremes(loss: LossName) -> None:
    *sums, counts = (x.ravel() for x in jnp.meshgrid(*[jnp.array(EXTREMES)] * 4, jnp.array([0, 1, 512])))
    pair, settings = PairLogProbs(*sums, *[counts] * 4), LossSettings(loss=loss, sft_weight=0.5)
    loss_B = losses.preference_loss(settings, pair)
    gradient = jax.grad(lambda sums: losses.preference_loss(settings, PairLogProbs(*sums, *pair[4:])).sum())(pair[:4])
    assert jnp.isfinite(loss_B).all()
    assert all(jnp.isfinite(x).all() for x in gradient)
    assert max(jnp.abs(x).max() for x in gradient) > 0


@pytest.mark.parametrize("x", [-1e-5, -0.1, -0.69, -0.7, -3.0, -80.0])
def test_log1mexp_is_accurate_on_both_branches(x: float) -> None:
    expected = math.log(-math.expm1(x)) if x > -0.69 else math.log1p(-math.exp(x))
    assert losses._log1mexp(jnp.array([x]))[0] == pytest.approx(expected, rel=1e-5, abs=1e-30)


# Settings and metrics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "beta"),
    [("dpo", 0.1), ("conservative_dpo", 0.1), ("ipo", 0.1), ("simpo", 2.5), ("orpo", 0.1), ("dpop", 0.1)],
)
def test_beta_is_the_losss_own_unless_set(loss: LossName, beta: float) -> None:
    assert LossSettings(loss=loss).resolved_beta == beta
    assert LossSettings(loss=loss, beta=0.3).resolved_beta == 0.3


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("beta", 0.0, "preference.beta must be positive and finite, got 0.0"),
        ("beta", math.nan, "preference.beta must be positive and finite, got nan"),
        ("margin", -0.1, "preference.margin must be zero or more and finite, got -0.1"),
        ("orpo_lambda", -1.0, "preference.orpo_lambda must be zero or more and finite, got -1.0"),
        ("dpop_lambda", -1.0, "preference.dpop_lambda must be zero or more and finite, got -1.0"),
        ("sft_weight", math.inf, "preference.sft_weight must be zero or more and finite, got inf"),
    ],
)
def test_bad_settings_are_refused_by_name(setting: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**{setting: value})


def test_the_other_losses_are_supervised() -> None:
    supervised = [name for name in get_args(LossName) if LossSettings(loss=name).is_supervised]
    assert supervised == ["chosen_steps", "raft"]
    assert set(get_args(LossName)) == {*ALL_LOSSES, *supervised}


def test_pair_metrics() -> None:
    pair = PairLogProbs(*jnp.array([[-10, -5], [-14, -2], [-12, -5], [-13, -2.5]]), *jnp.ones((4, 2)))
    metrics = losses.pair_metrics(pair, beta=0.1)
    np.testing.assert_allclose(metrics["reward_margin"], (0.3 - 0.05) / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["chosen_reward"], 0.2 / 2, rtol=1e-6)
    np.testing.assert_allclose(metrics["rejected_reward"], (-0.1 + 0.05) / 2, rtol=1e-6)
    assert metrics["reward_accuracy"] == 0.5


def test_everything_runs_compiled() -> None:
    pair = random_pair(seed=9)
    for loss in ALL_LOSSES:
        settings = LossSettings(loss=loss)
        compiled_B = jax.jit(losses.preference_loss, static_argnums=0)(settings, pair)
        np.testing.assert_allclose(compiled_B, losses.preference_loss(settings, pair), rtol=1e-5)
