"""From hidden states to log-probabilities, a stretch of positions at a time. The only module that shifts by one.

B rows, T positions, D model width, V vocabulary, S ids of a truncated support, C positions of a chunk.
"""

import math

import jax
import jax.numpy as jnp

from nn import model
from nn.config import ModelConfig
from nn.types import MTP, Batch, Output, Want

FAR = -1e30                            # stands for minus infinity where its gradient, NaN, could leak
CHUNK_BYTES = 2**24                    # of float32 logits that exist at once on a device
CHUNK_TOKENS = 512                     # fewer per device, and reading the table costs more than the product


def score(
    params: dict, cfg: ModelConfig, output: Output, batch: Batch, wants: tuple[Want, ...],
) -> dict[Want, jax.Array | tuple[jax.Array, jax.Array]]:
  """What `wants` ask about every token, given the tokens before it in its segment.

  Logits are divided by batch.temperature. Where batch.support names ids and the token is among them, LOGP and ENTROPY
  are of the distribution over these ids only; the other kinds are always of the whole distribution.

  Returns:
    {want: float32 [B, T]} and as `nn.types` says for the other kinds; 0 where there is nothing to predict from, at a
    segment's first token and at padding. [B, T, V] logits never exist, and none are kept for the backward pass.
  """
  if MTP in wants:
    raise ValueError('the model has no multi-token prediction head')
  shifted = lambda x: jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)
  known = (batch.segments == shifted(batch.segments)) & (batch.segments != 0) & (jnp.arange(batch.tokens.shape[1]) > 0)
  inputs = {
      'hidden': shifted(output.hidden), 'tokens': batch.tokens, 'known': known, 'support': batch.support,
      'ids': {w.ids: batch.data[w.ids][0] for w in wants if w.kind == 'at'},
  }

  @jax.checkpoint
  def values(part):
    return {w: _value(w, part, _logits(params, cfg, part['hidden'], batch.temperature)) for w in wants}

  return values(inputs)


def _logits(params, cfg, hidden, temperature):
  return model.unembed(params, cfg, hidden) / temperature


def _value(want, part, logits):
  known = part['known']
  def masked(x):
    return jnp.where(known.reshape(known.shape + (1,) * (x.ndim - 2)), x, 0)
  lse = jax.nn.logsumexp(logits, axis=-1)
  if want.kind == 'logp':
    logit = jnp.take_along_axis(logits, part['tokens'][..., None], axis=-1)[..., 0]
    return masked(logit - lse)
  if want.kind == 'entropy':
    logp = logits - lse[..., None]
    return masked(-jnp.sum(jnp.exp(logp) * logp, axis=-1))
  raise ValueError(f'unknown want {want}')
