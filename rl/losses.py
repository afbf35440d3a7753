"""Weights, ratios and per-token losses. n rows of one optimiser step, T positions.

Weights are numpy, formed on the host once per optimiser step. The rest runs inside jit in float32,
and is finite wherever its inputs are, masked positions included: a weight of 0 stops no NaN.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rl.types import token_mean

# Nats. A larger log-ratio says only that two policies have nothing in common, and may overflow.
MAX_LOG_RATIO = 20.0
MAX_SEQUENCE_LOG_RATIO = 10.0
MAX_K3 = 10.0


def sequence_mean(mask: np.ndarray) -> np.ndarray:
  """Weights that give every row with a trained token the same say: [n, T] -> [n, T]."""
  length = mask.sum(axis=1, keepdims=True)
  return mask / np.maximum(length, 1) / max((length > 0).sum(), 1)


def sequence_sum(mask: np.ndarray) -> np.ndarray:
  """Weights for the mean over rows of the sum over tokens: [n, T] -> [n, T].

  They add up to the mean length, not to 1.
  """
  return mask / max(mask.any(axis=1).sum(), 1)


def constant(length: int):
  """Dr. GRPO's weights (arXiv:2503.20783): a constant instead of each row's own length."""
  return lambda mask: sequence_sum(mask) / length


AGGREGATES = {
    'token_mean': token_mean,
    'sequence_mean': sequence_mean,
    'sequence_sum': sequence_sum,
}


def weighted_sum(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Sum of weight * x. Where weight is 0, x adds nothing, but must be finite for a 0 gradient."""
  return jnp.sum(jnp.where(weight != 0, weight * x, 0.0))


def token_log_ratio(logp: jax.Array, old_logp: jax.Array, mask: jax.Array) -> jax.Array:
  """Every token's own log-ratio to the old policy: [n, T] -> [n, T]."""
  del mask
  return jnp.clip(logp - old_logp, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def sequence_log_ratio(logp: jax.Array, old_logp: jax.Array, mask: jax.Array) -> jax.Array:
  """GSPO's ratio in its token form (arXiv:2507.18071, eq. 14): [n, T] -> [n, T].

  The value is the mean log-ratio of the row's trained tokens, at every token; the gradient is that
  token's own. With one advantage per row and sequence_mean this is the sequence form, gradients
  included. One sequence per row.
  """
  length = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
  mean = jnp.sum(jnp.where(mask > 0, logp - old_logp, 0.0), axis=1, keepdims=True) / length
  own = logp - jax.lax.stop_gradient(logp)
  return jnp.minimum(jax.lax.stop_gradient(mean) + own, MAX_SEQUENCE_LOG_RATIO)


RATIOS = {'token': token_log_ratio, 'sequence': sequence_log_ratio}


def clipped_policy_loss(
    log_ratio: jax.Array,
    advantage: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """PPO's clipped surrogate (arXiv:1707.06347, eq. 7), per token, to be minimised.

  Args:
    log_ratio: [n, T] float32, log of new over old probability; carries the gradient.
    advantage: [n, T] float32; no gradient flows through it.
    clip_low: a ratio below 1 - clip_low earns nothing more from a bad token.
    clip_high: a ratio above 1 + clip_high earns nothing more from a good token.
    dual_clip: a ratio above it costs nothing more at a bad token (arXiv:1912.09729); 0: no bound.

  Returns:
    [n, T] loss in advantage units, and metrics of the same shape.
  """
  advantage = jax.lax.stop_gradient(advantage)
  ratio = jnp.exp(log_ratio)
  plain = -advantage * ratio
  loss = jnp.maximum(plain, -advantage * jnp.clip(ratio, 1 - clip_low, 1 + clip_high))
  if dual_clip:
    loss = jnp.where(advantage < 0, jnp.minimum(loss, -advantage * dual_clip), loss)
  return loss, {
      'clip_fraction': (loss != plain).astype(jnp.float32),
      'kl_from_old': ratio - 1 - log_ratio,     # never negative; estimates KL(old || new)
  }


def k1(logp: jax.Array, ref_logp: jax.Array) -> jax.Array:
  """Unbiased for KL(policy || reference), but on own samples its mean gradient is 0."""
  return jnp.clip(logp - ref_logp, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def k2(logp: jax.Array, ref_logp: jax.Array) -> jax.Array:
  """Biased, but on own samples its mean gradient is that of KL(policy || reference)."""
  return 0.5 * jnp.square(k1(logp, ref_logp))


def k3(logp: jax.Array, ref_logp: jax.Array) -> jax.Array:
  """Unbiased for KL(policy || reference), never negative; on own samples its mean gradient is that
  of KL(reference || policy).
  """
  log_ratio = k1(logp, ref_logp)
  return jnp.minimum(jnp.expm1(-log_ratio) + log_ratio, MAX_K3)


def k3_value_k2_gradient(logp: jax.Array, ref_logp: jax.Array) -> jax.Array:
  """k3, with the gradient of k2."""
  square = k2(logp, ref_logp)
  return jax.lax.stop_gradient(k3(logp, ref_logp)) + (square - jax.lax.stop_gradient(square))


KL = {'k1': k1, 'k2': k2, 'k3': k3, 'k3_k2': k3_value_k2_gradient}
