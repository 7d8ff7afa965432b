"""Computes log-probabilities of tokens from hidden states or logits, their sums, and perplexity, all in float32."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Int, Shaped

from itool_jax.types import AnyArray, FloatB, FloatBT, TokensBT


def token_log_probs_from_logits(
    logits_BTV: Float[AnyArray, "*BT V"], targets_BT: Int[AnyArray, "*BT"]
) -> Float[jax.Array, "*BT"]:
    """Computes the float32 log-softmax of logits (any leading shape) at the target ids, in nats: log_probs_BT."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return picked_BT - jax.nn.logsumexp(logits_BTV, axis=-1)


def token_log_probs(
    hidden_BTD: Float[AnyArray, "B T D"],
    unembedding_DV: Float[AnyArray, "D V"],
    targets_BT: TokensBT,
    chunk: int = 1024,
) -> FloatBT:
    """Computes log-probs of the targets from final hidden states, without holding float32 logits for all of B x T.

    Args:
      hidden_BTD: hidden state at each position, already aligned: position t predicts targets_BT[:, t].
      unembedding_DV: the output matrix.
      targets_BT: token ids.
      chunk: most token positions whose logits exist at once, in the backward pass too; at least B.

    Returns:
      log_probs_BT, float32, nats.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be positive, got {chunk}")

    def log_probs(hidden_BTD: Float[AnyArray, "B C D"], targets_BT: Int[AnyArray, "B C"]) -> jax.Array:
        logits_BTV = jnp.einsum("btd,dv->btv", hidden_BTD, unembedding_DV, preferred_element_type=jnp.float32)
        return token_log_probs_from_logits(logits_BTV, targets_BT)

    batch, time = targets_BT.shape
    if batch * time <= chunk:
        return log_probs(hidden_BTD, targets_BT)
    # Cut along time, not the batch: a batch sharded over devices then stays in place.
    n_chunks = -(-time // max(1, chunk // batch))
    width = -(-time // n_chunks)

    def cut(x: AnyArray) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, n_chunks * width - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, n_chunks, width, *x.shape[2:]), 1, 0)

    # Without checkpoint, the scan would keep every chunk's logits for the backward pass.
    body = jax.checkpoint(lambda xs: log_probs(*xs), prevent_cse=False)
    chunks = jax.lax.map(body, (cut(hidden_BTD), cut(targets_BT)))
    return jnp.moveaxis(chunks, 0, 1).reshape(batch, n_chunks * width)[:, :time]


def masked_log_prob_sum(log_probs_BT: FloatBT, mask_BT: Shaped[AnyArray, "B T"]) -> FloatB:
    """Sums the log-probs of each sequence where the mask (bool or 0/1) is true; other values may be anything."""
    return jnp.where(mask_BT.astype(bool), log_probs_BT.astype(jnp.float32), 0.0).sum(axis=-1)


def perplexity(log_prob_sum: ArrayLike, n_tokens: ArrayLike) -> jax.Array:
    """Computes exp(-log_prob_sum / n_tokens) (eq 4): 1 for a certain response, inf if float32 overflows."""
    return jnp.exp(-jnp.asarray(log_prob_sum, jnp.float32) / jnp.asarray(n_tokens, jnp.float32))
