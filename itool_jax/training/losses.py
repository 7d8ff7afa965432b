"""Computes training losses from log-probabilities of tokens, with pure functions and in float32.

Preference losses take sums of log-probs over the tokens of a step and return one loss per pair. Only
`pair_metrics` averages over a batch: for losses, the caller divides by the global count.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Num, Shaped

from itool_jax.model.log_probs import masked_log_prob_sum
from itool_jax.types import AnyArray, FloatB, FloatBT, Scalar

CountB = Num[AnyArray, "B"]
LossName = Literal["dpo", "conservative_dpo", "ipo", "simpo", "orpo", "dpop", "chosen_steps", "raft"]

# ORPO has no β; its entry only scales the margin that `pair_metrics` reports, for comparison with DPO.
DEFAULT_BETA: dict[LossName, float] = {
    "dpo": 0.1,
    "conservative_dpo": 0.1,
    "ipo": 0.1,
    "simpo": 2.5,
    "orpo": 0.1,
    "dpop": 0.1,
}

# Upper bound on log-probs per token l in log(1 - e^l): keeps value and slope finite near 0.
_LOG1MEXP_CEILING = -1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Choice of preference loss, and its constants."""

    loss: LossName = "dpo"
    """Preference loss: dpo, conservative_dpo (label noise from visit counts), ipo, simpo, orpo or dpop. Two more are
    plain fine-tuning for the same number of steps, without rejected steps: chosen_steps trains on the chosen steps,
    raft on the model's own right answers in the trees."""

    beta: float | None = None
    """Strength of the pull towards the reference (simpo: scale of the reward). None: the default of the loss."""

    margin: float = 0.5
    """Target margin between the two rewards (simpo only)."""

    orpo_lambda: float = 0.1
    """Weight of the odds-ratio term (orpo only)."""

    dpop_lambda: float = 50.0
    """Weight λ of the penalty on chosen steps that are less likely than under the reference (dpop only)."""

    sft_weight: float = 0.0
    """Weight of the chosen step's negative log-likelihood per token, added to any pair loss."""

    def __post_init__(self) -> None:
        if self.beta is not None and not 0 < self.beta < float("inf"):
            raise ValueError(f"preference.beta must be positive and finite, got {self.beta}")
        for name in ("margin", "orpo_lambda", "dpop_lambda", "sft_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"preference.{name} must be zero or more and finite, got {value}")

    @property
    def resolved_beta(self) -> float:
        """β as set, or the default of the loss, which must be a pair loss."""
        return DEFAULT_BETA[self.loss] if self.beta is None else self.beta

    @property
    def is_supervised(self) -> bool:
        """True if the loss is `sft_loss` on some targets instead of a pair loss."""
        return self.loss not in DEFAULT_BETA


class PairLogProbs(NamedTuple):
    """B preference pairs: log-probs summed over each step's tokens (nats), lengths in tokens, visit counts."""

    policy_chosen_B: FloatB
    policy_rejected_B: FloatB
    reference_chosen_B: FloatB
    reference_rejected_B: FloatB
    chosen_length_B: CountB
    rejected_length_B: CountB
    chosen_visits_B: CountB
    rejected_visits_B: CountB


# Supervised loss --------------------------------------------------------------------------------------------


def sft_loss(log_probs_BT: FloatBT, mask_BT: Shaped[AnyArray, "B T"]) -> tuple[Scalar, Scalar]:
    """Returns (sum of negative log-likelihoods, number of tokens) where the mask is true, both float32 scalars.

    These are sums, not means: the caller adds up micro-batches and devices and divides once by the global count.
    """
    return -masked_log_prob_sum(log_probs_BT, mask_BT).sum(), mask_BT.astype(bool).sum(dtype=jnp.float32)


# Preference losses ------------------------------------------------------------------------------------------


def log_ratio_gap(pair: PairLogProbs) -> FloatB:
    """Computes Δ = (logπ_w - logref_w) - (logπ_l - logref_l) per pair, float32; the reward margin is βΔ."""
    chosen_B = _float32(pair.policy_chosen_B) - _float32(pair.reference_chosen_B)
    rejected_B = _float32(pair.policy_rejected_B) - _float32(pair.reference_rejected_B)
    return chosen_B - rejected_B


def dpo(pair: PairLogProbs, beta: float) -> FloatB:
    """Computes -log σ(βΔ) per pair (https://arxiv.org/abs/2305.18290, eq 7)."""
    return -jax.nn.log_sigmoid(beta * log_ratio_gap(pair))


def label_noise(chosen_visits_B: CountB, rejected_visits_B: CountB) -> FloatB:
    """Computes the label noise ε = min(1/2, 1 - 1/(1 + N_l / max(1, N_w))) from the search's visit counts."""
    ratio_B = _float32(rejected_visits_B) / jnp.maximum(_float32(chosen_visits_B), 1.0)
    return jnp.minimum(0.5, 1.0 - 1.0 / (1.0 + ratio_B))


def conservative_dpo(pair: PairLogProbs, beta: float) -> FloatB:
    """Computes DPO per pair with labels smoothed by `label_noise` (https://arxiv.org/abs/2405.00451)."""
    gap_B = beta * log_ratio_gap(pair)
    noise_B = label_noise(pair.chosen_visits_B, pair.rejected_visits_B)
    return -(1.0 - noise_B) * jax.nn.log_sigmoid(gap_B) - noise_B * jax.nn.log_sigmoid(-gap_B)


def ipo(pair: PairLogProbs, beta: float) -> FloatB:
    """Computes (h_w/n_w - h_l/n_l - 1/(2β))², h = logπ - logref, n tokens (https://arxiv.org/abs/2310.12036)."""
    chosen_B = _per_token(_float32(pair.policy_chosen_B) - pair.reference_chosen_B, pair.chosen_length_B)
    rejected_B = _per_token(_float32(pair.policy_rejected_B) - pair.reference_rejected_B, pair.rejected_length_B)
    return jnp.square(chosen_B - rejected_B - 1.0 / (2.0 * beta))


def simpo(pair: PairLogProbs, beta: float, margin: float) -> FloatB:
    """Computes -log σ(β(l_w - l_l) - margin), l = logπ per token, no reference (https://arxiv.org/abs/2405.14734)."""
    chosen_B = _per_token(pair.policy_chosen_B, pair.chosen_length_B)
    rejected_B = _per_token(pair.policy_rejected_B, pair.rejected_length_B)
    return -jax.nn.log_sigmoid(beta * (chosen_B - rejected_B) - margin)


def orpo(pair: PairLogProbs, orpo_lambda: float) -> FloatB:
    """Computes chosen NLL per token - λ log σ(log odds ratio), no reference (https://arxiv.org/abs/2403.07691)."""
    chosen_B = _per_token(pair.policy_chosen_B, pair.chosen_length_B)
    rejected_B = _per_token(pair.policy_rejected_B, pair.rejected_length_B)
    log_odds_B = (chosen_B - rejected_B) - (_log1mexp(chosen_B) - _log1mexp(rejected_B))
    return -chosen_B - orpo_lambda * jax.nn.log_sigmoid(log_odds_B)


def dpop(pair: PairLogProbs, beta: float, dpop_lambda: float) -> FloatB:
    """Computes -log σ(β(Δ - λ max(0, logref_w - logπ_w))) per pair (https://arxiv.org/abs/2402.13228, eq 3)."""
    fallen_B = jnp.maximum(_float32(pair.reference_chosen_B) - _float32(pair.policy_chosen_B), 0.0)
    return -jax.nn.log_sigmoid(beta * (log_ratio_gap(pair) - dpop_lambda * fallen_B))


def preference_loss(settings: LossSettings, pair: PairLogProbs) -> FloatB:
    """Computes the pair loss that the settings name, plus the NLL term on the chosen step, per pair."""
    match settings.loss:
        case "dpo":
            loss_B = dpo(pair, settings.resolved_beta)
        case "conservative_dpo":
            loss_B = conservative_dpo(pair, settings.resolved_beta)
        case "ipo":
            loss_B = ipo(pair, settings.resolved_beta)
        case "simpo":
            loss_B = simpo(pair, settings.resolved_beta, settings.margin)
        case "orpo":
            loss_B = orpo(pair, settings.orpo_lambda)
        case "dpop":
            loss_B = dpop(pair, settings.resolved_beta, settings.dpop_lambda)
        case "chosen_steps" | "raft":
            raise AssertionError(f"{settings.loss} compares no pairs; sft_loss computes it")
    return loss_B - settings.sft_weight * _per_token(pair.policy_chosen_B, pair.chosen_length_B)


def pair_metrics(pair: PairLogProbs, beta: float, weight_B: FloatB | None = None) -> dict[str, Scalar]:
    """Sums over pairs the rewards β(logπ - logref), their margin, and how often chosen exceeds rejected.

    `weight_B` is the weight of each pair; the default gives the mean.
    """
    chosen_B = beta * (_float32(pair.policy_chosen_B) - pair.reference_chosen_B)
    rejected_B = beta * (_float32(pair.policy_rejected_B) - pair.reference_rejected_B)
    weight_B = jnp.full(chosen_B.shape, 1 / chosen_B.size) if weight_B is None else weight_B
    return {
        "chosen_reward": (weight_B * chosen_B).sum(),
        "rejected_reward": (weight_B * rejected_B).sum(),
        "reward_margin": (weight_B * (chosen_B - rejected_B)).sum(),
        "reward_accuracy": (weight_B * (chosen_B > rejected_B)).sum(),
    }


def _float32(x: ArrayLike) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


def _per_token(log_prob_B: FloatB, length_B: CountB) -> FloatB:
    return _float32(log_prob_B) / jnp.maximum(_float32(length_B), 1.0)


def _log1mexp(x_B: FloatB) -> FloatB:
    """Computes log(1 - e^x), x <= 0. Each branch is accurate on its side of -ln 2 and finite (slope too) on both."""
    x_B = jnp.minimum(x_B, _LOG1MEXP_CEILING)
    return jnp.where(x_B > -0.6931472, jnp.log(-jnp.expm1(x_B)), jnp.log1p(-jnp.exp(x_B)))
