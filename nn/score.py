"""From hidden states to log-probabilities, a stretch of positions at a time.

The only module that shifts by one. B rows, T positions, D model width, V vocabulary, S ids of a
truncated support, k ids asked for, C positions of a chunk.
"""

import jax
import jax.numpy as jnp

from nn import model, mtp, param
from nn.config import ModelConfig
from nn.types import Batch, Output, Want

FAR = -1e30                            # minus infinity that stays finite in sums and gradients
CHUNK_BYTES = 2**24                    # of float32 logits that exist at once on a device
# On a device; with fewer, reading the table takes longer than multiplying by it.
CHUNK_TOKENS = 512

MAIN = (0, ())                         # the model's own head, see _head

Scores = dict[Want, jax.Array | tuple[jax.Array, ...]]


def score(
    params: dict, cfg: ModelConfig, output: Output, batch: Batch, wants: tuple[Want, ...],
) -> Scores:
  """What `wants` ask about every token, given the tokens before it in its segment.

  Logits are divided by batch.temperature. Where batch.support names ids and the token is among
  them, LOGP, ENTROPY and `mtp` are of the distribution over these ids alone; the other kinds are
  always of the distribution over all ids.

  Returns:
    {want: float32 [B, T]}, and for the other kinds what `nn.types` says; 0 where there is nothing
    to predict from, at a segment's first token (first k + 1 for depth k of multi-token prediction)
    and at padding. Differentiable; [B, T, V] logits never exist unless they are small (CHUNK_BYTES,
    of each head), and are not kept for the backward pass even then.

  Raises:
    ValueError: a kind that this model cannot answer.
  """
  if unknown := sorted({want.kind for want in wants} - KINDS.keys()):
    raise ValueError(f'nothing in this model answers {unknown}; known are {sorted(KINDS)}')
  length = batch.tokens.shape[1]
  heads = sorted({MAIN} | {_head(want) for want in wants})
  hidden = lambda depth, detach: output.mtp_hidden[detach][depth - 1] if depth else output.hidden
  known = mtp.reach(batch.segments, 1 + max(depth for depth, _ in heads))
  rows = {
      'hidden': [mtp.previous(hidden(*head)) for head in heads],
      'inside': [known[depth] for depth, _ in heads],
      'tokens': batch.tokens, 'support': batch.support,
      'ids': {want.ids: batch.data[want.ids][0] for want in wants if want.kind == 'at'}}

  @jax.checkpoint
  def values(chunk):
    out, main = {}, None
    for (depth, detach), hidden, inside in zip(heads, chunk['hidden'], chunk['inside']):
      table = jax.lax.stop_gradient(params) if 'head' in detach else params
      logits = model.unembed(table, cfg, hidden) / batch.temperature
      main = main if depth else logits
      seen = chunk | {'hidden': hidden, 'main': main, 'temperature': batch.temperature}
      blank = lambda x: jnp.where(inside.reshape(inside.shape + (1,) * (x.ndim - 2)), x, 0)
      out |= {want: jax.tree.map(blank, KINDS[want.kind](logits, seen, want))
              for want in wants if _head(want) == (depth, detach)}
    return out

  size = cfg.score_chunk or chunk_size(cfg, *batch.tokens.shape)
  if size >= length:
    return values(rows)
  num_chunks = -(-length // size)
  size = -(-length // num_chunks)
  pad = num_chunks * size - length

  def cut(x):                          # [B, T, ...] -> [chunks, B, C, ...]
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], num_chunks, size, *x.shape[2:]), 1, 0)

  def join(x):
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], num_chunks * size, *x.shape[3:])[:, :length]

  return jax.tree.map(join, jax.lax.map(values, jax.tree.map(cut, rows)))


def chunk_size(cfg: ModelConfig, num_rows: int, length: int) -> int:
  """Positions whose logits exist at once, under the ambient mesh: all T where they are small."""
  rows = num_rows // param.ways(cfg.rules, 'batch', num_rows)
  vocabulary = cfg.vocab_size // param.ways(cfg.rules, 'vocab', cfg.vocab_size)
  tokens = max(CHUNK_TOKENS, CHUNK_BYTES // (4 * vocabulary))
  return min(length, max(1, tokens // rows))


def _head(want: Want) -> tuple[int, tuple[str, ...]]:
  """Whose logits answer it: depth of multi-token prediction, and what is cut off there."""
  return (want.size, want.detach) if want.kind in mtp.KINDS else MAIN


def _normaliser(logits: jax.Array) -> jax.Array:
  return jax.nn.logsumexp(logits, axis=-1)


def _take(logits: jax.Array, ids: jax.Array) -> jax.Array:
  return jnp.take_along_axis(logits, ids, axis=-1)


def _candidates(logits: jax.Array, chunk: dict) -> tuple[jax.Array, jax.Array]:
  """The support's logits [B, C, S], FAR for missing ids, and where the support holds [B, C]."""
  ids = chunk['support']
  logits = jnp.where(ids >= 0, _take(logits, jnp.maximum(ids, 0)), FAR)
  return logits, jnp.any((ids >= 0) & (ids == chunk['tokens'][..., None]), axis=-1)


def _logp(logits: jax.Array, chunk: dict, want: Want) -> jax.Array:
  """[B, C]."""
  del want
  normaliser = _normaliser(logits)
  if chunk['support'] is not None:
    candidates, holds = _candidates(logits, chunk)
    normaliser = jnp.where(holds, _normaliser(candidates), normaliser)
  return _take(logits, chunk['tokens'][..., None])[..., 0] - normaliser


def _entropy(logits: jax.Array, chunk: dict, want: Want) -> jax.Array:
  """[B, C], in nats."""
  del want

  def entropy(x):
    logp = x - _normaliser(x)[..., None]
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)

  if chunk['support'] is None:
    return entropy(logits)
  candidates, holds = _candidates(logits, chunk)
  return jnp.where(holds, entropy(candidates), entropy(logits))


def _topk(logits: jax.Array, chunk: dict, want: Want) -> tuple[jax.Array, jax.Array]:
  """ids [B, C, k] int32 and their log-probabilities [B, C, k]."""
  del chunk
  best, ids = jax.lax.top_k(logits, want.size)
  return ids, best - _normaliser(logits)[..., None]


def _at(logits: jax.Array, chunk: dict, want: Want) -> tuple[jax.Array, jax.Array]:
  """Log-probabilities of the given ids [B, C, k], and of all others together [B, C]."""
  ids = chunk['ids'][want.ids]
  normaliser = _normaliser(logits)
  others = jnp.put_along_axis(logits, ids, FAR, axis=-1, inplace=False)
  return _take(logits, ids) - normaliser[..., None], _normaliser(others) - normaliser


def _fixed(logits: jax.Array, chunk: dict, want: Want) -> tuple[jax.Array, jax.Array]:
  """Log-probability of one id [B, C], and the log-normaliser of the logits of all others [B, C]."""
  del chunk
  others = jnp.where(jnp.arange(logits.shape[-1]) == want.size, FAR, logits)
  return logits[..., want.size] - _normaliser(logits), _normaliser(others)


def _pull(logits: jax.Array, chunk: dict, want: Want) -> jax.Array:
  """|onehot(token) - softmax|^2 |hidden|^2 / temperature^2, softmax over all ids: [B, C]."""
  del want
  chance = jax.nn.softmax(logits, axis=-1)
  taken = _take(chance, chunk['tokens'][..., None])[..., 0]
  error = 1 - 2 * taken + jnp.sum(jnp.square(chance), axis=-1)
  size = jnp.sum(jnp.square(chunk['hidden'].astype(jnp.float32)), axis=-1)
  return error * size / jnp.square(chunk['temperature'])


def _draft(
    logits: jax.Array, chunk: dict, want: Want) -> tuple[jax.Array, jax.Array, jax.Array]:
  """[B, C] each."""
  del want
  best, main = jnp.argmax(logits, axis=-1), jnp.argmax(chunk['main'], axis=-1)
  as_float = lambda x: x.astype(jnp.float32)
  return jnp.ones(best.shape), as_float(best == chunk['tokens']), as_float(best == main)


KINDS = {'logp': _logp, 'entropy': _entropy, 'mtp': _logp, 'draft': _draft, 'topk': _topk,
         'at': _at, 'fixed': _fixed, 'pull': _pull}
