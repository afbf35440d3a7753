"""Causal attention by plain matmuls on blocks of queries and keys.

What a CPU runs, and any shape runs anywhere. B rows, T positions, H query heads, G key/value heads,
R = H / G, K head size, V size of a value (often K), N blocks of C positions.

Heads that share keys are folded into one matmul, [R C, K] x [K, C] for every row and group, and
sums are divided by the softmax's denominator after the last product. Scores, softmax and sums are
in float32, products in the dtype of q.
"""

import functools

import jax
import jax.numpy as jnp

FAR = -1e30                            # a score that is not seen: finite, so no gradient is NaN
SHORT = 128                            # positions up to which weights are kept for backward
BLOCK = 32                             # positions of a block of queries in a short row
LONG_BLOCK = 64                        # positions of a block in a long row; both measured


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, segments: jax.Array, scale: float,
    window: int = 0,
) -> jax.Array:
  """As `reference.attention`. No [B, H, T, T] array exists for rows longer than SHORT."""
  num_rows, length, num_groups, head_dim = k.shape
  # [B, G, R, T, K], [B, G, T, K] and [B, G, T, V]
  q = (q * scale).astype(q.dtype).reshape(
      num_rows, length, num_groups, -1, head_dim).transpose(0, 2, 3, 1, 4)
  k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
  out = (short if length <= SHORT else long)(q, k, v, segments, window)
  return out.transpose(0, 3, 1, 2, 4).reshape(num_rows, length, -1, v.shape[3])


def short(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: int,
) -> jax.Array:
  """Every block of queries against all keys before its end.

  [B, G, R, T, K], [B, G, T, K], [B, G, T, V], [B, T] -> [B, G, R, T, V].
  """
  length = k.shape[2]
  return jnp.concatenate([
      _rows(q[:, :, :, begin:end], k[:, :, :end], v[:, :, :end], segments[:, :end], begin, window)
      for begin in range(0, length, BLOCK) for end in (min(begin + BLOCK, length),)], axis=3)


def _rows(q, k, v, segments, begin, window):
  num_rows, num_groups, ratio, num_queries, head_dim = q.shape
  time = jnp.arange(k.shape[2])
  seen = (time[begin:, None] >= time) & (segments[:, begin:, None] == segments[:, None, :])
  if window:
    seen &= time[begin:, None] - time < window
  seen = jnp.tile(seen, (1, ratio, 1))[:, None]                # [B, 1, R C, end]
  scores = jnp.einsum('bgqk,bgsk->bgqs', q.reshape(num_rows, num_groups, -1, head_dim), k,
                      preferred_element_type=jnp.float32)
  scores = jnp.where(seen, scores, FAR)
  weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
  total = jnp.sum(weights, axis=-1).reshape(q.shape[:-1])
  sums = jnp.einsum(
      'bgqs,bgsv->bgqv', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
  real = (segments[:, begin:] != 0)[:, None, None]
  out = sums.reshape(*q.shape[:-1], -1) * jnp.where(real, 1 / total, 0)[..., None]
  return out.astype(q.dtype)


def long(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, window: int,
) -> jax.Array:
  """`short`, with online softmax (arXiv:1805.02867) over the blocks of keys that are seen.

  Weights are computed again backward.
  """
  length = k.shape[2]
  pad = -length % LONG_BLOCK

  def blocks(x, axis):                 # the block number first, so that one block lies together
    x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], -1, LONG_BLOCK, *x.shape[axis + 1:])
    return jnp.moveaxis(x, axis, 0)

  num_rows, num_groups, ratio, _, head_dim = q.shape
  q = blocks(q, 3).reshape(-1, num_rows, num_groups, ratio * LONG_BLOCK, head_dim)
  out = _blockwise(window, q, blocks(k, 2), blocks(v, 2), blocks(segments, 1))
  out = out.reshape(-1, num_rows, num_groups, ratio, LONG_BLOCK, v.shape[3])
  return jnp.moveaxis(out, 0, 3).reshape(
      num_rows, num_groups, ratio, -1, v.shape[3])[:, :, :, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(window, q, k, v, segments):
  """[N, B, G, R C, K], [N, B, G, C, K], [N, B, G, C, V], [N, B, C] -> [N, B, G, R C, V]."""
  return _blockwise_forward(window, q, k, v, segments)[0]


def _first(window, size, i):
  """The first block of keys that block i of the queries sees."""
  return jnp.maximum(i - (window + size - 2) // size, 0) if window else 0


def _scores(window, q, k, query_segments, key_segments, after):
  """[B, G, R C, C] float32. after: how many blocks the queries' is after the keys'."""
  size = k.shape[2]
  seen = (((after > 0) | jnp.tri(size, dtype=bool))
          & (query_segments[:, :, None] == key_segments[:, None, :]))
  if window:
    time = jnp.arange(size)
    seen &= after * size + time[:, None] - time < window
  seen = jnp.tile(seen, (1, q.shape[2] // size, 1))[:, None]
  scores = jnp.einsum('bgqk,bgsk->bgqs', q, k, preferred_element_type=jnp.float32)
  return jnp.where(seen, scores, FAR)


def _blockwise_forward(window, q, k, v, segments):
  def rows(i):
    qi, si = q[i], segments[i]

    def add(j, carry):
      top, total, sums = carry
      scores = _scores(window, qi, k[j], si, segments[j], i - j)
      new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
      weights = jnp.exp(scores - new_top)
      fade = jnp.exp(top - new_top)
      more = jnp.einsum(
          'bgqs,bgsv->bgqv', weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
      return new_top, fade * total + jnp.sum(weights, axis=-1, keepdims=True), fade * sums + more

    # The diagonal first: every position sees itself, so that `top` is a real score from then on.
    zero = jnp.zeros((*qi.shape[:-1], v.shape[-1]), jnp.float32)
    carry = add(i, (jnp.full_like(zero[..., :1], FAR), zero[..., :1], zero))
    first = _first(window, si.shape[1], i)
    top, total, sums = jax.lax.fori_loop(first, i, add, carry)
    real = jnp.tile(si != 0, (1, qi.shape[2] // si.shape[1]))[:, None, :, None]
    out = (sums * jnp.where(real, 1 / total, 0)).astype(q.dtype)
    # exp(score - (-FAR)) is 0: no gradient from padding.
    return out, jnp.where(real, top + jnp.log(total), -FAR)

  out, normaliser = jax.lax.map(rows, jnp.arange(q.shape[0]))
  return out, (q, k, v, segments, out, normaliser)


def _blockwise_backward(window, residuals, grad):
  q, k, v, segments, out, normaliser = residuals

  def rows(carry, i):
    qi, gi, si = q[i], grad[i], segments[i]
    drift = jnp.sum(gi.astype(jnp.float32) * out[i].astype(jnp.float32), axis=-1, keepdims=True)

    def add(j, carry):
      dq, dk, dv = carry
      weights = jnp.exp(_scores(window, qi, k[j], si, segments[j], i - j) - normaliser[i])
      dweights = jnp.einsum('bgqv,bgsv->bgqs', gi, v[j], preferred_element_type=jnp.float32)
      dscores = (weights * (dweights - drift)).astype(q.dtype)
      product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
      return (dq + product('bgqs,bgsk->bgqk', dscores, k[j]),
              dk.at[j].add(product('bgqs,bgqk->bgsk', dscores, qi)),
              dv.at[j].add(product('bgqs,bgqv->bgsv', weights.astype(q.dtype), gi)))

    first = _first(window, si.shape[1], i)
    dq, dk, dv = jax.lax.fori_loop(first, i + 1, add, (jnp.zeros(qi.shape, jnp.float32), *carry))
    return (dk, dv), dq.astype(q.dtype)

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  (dk, dv), dq = jax.lax.scan(rows, (zeros(k), zeros(v)), jnp.arange(q.shape[0]))
  return dq, dk.astype(k.dtype), dv.astype(v.dtype), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
