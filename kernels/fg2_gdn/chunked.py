"""The recurrence of reference.py in chunks of C tokens: products in XLA, and a backward pass.

B rows, T tokens, H value heads, K key channels, V value channels; a block is R chunks, and inside a
block arrays are [R, B, H, C, ...]. With A, B, Q, X the stacked a, b, q, x of a chunk, S its
incoming state, D_ts the decay from token s (exclusive) to token t (inclusive), e_t the decay from
the chunk's start to t and f_s from s to its end:

  L_ts = sum_c B_tc D_tsc A_sc  (s < t)       P_ts = sum_c Q_tc D_tsc A_sc  (s <= t)
  M = (I + L)^-1                              U = M (X - (B e) S)
  O = (Q e) S + P U                           S' = Diag(e_C) S + (A f)^T U

Decays are products of exp(g), never quotients, so no decay is too strong and a forgotten state is a
factor 0. L and P are built by halving: the lower left block of two neighbouring halves is one
product of factors that are both at most 1, referenced to the border between the halves; no [C, C,
K] array exists. Only the inputs and the state at block borders are kept for the backward pass,
which computes a block's chunks again.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def scan(symmetric, scale, chunk, chunks, q, k, v, g, gate_k, gate_v, state, valid, fresh):
  """reference.scan, where valid and fresh may be None: all valid, none fresh.

  chunk: C, a power of two from 2. chunks: R, chunks of a block. T must be a multiple of R C.
  """
  return _forward(symmetric, scale, chunk, chunks, q, k, v, g, gate_k, gate_v, state, valid, fresh)[
    0
  ]


def _forward(symmetric, scale, chunk, chunks, *arrays):
  *tokens, state, valid, fresh = arrays

  def block(state, index):
    part = _part(tokens, valid, fresh, index, chunk, chunks, symmetric, scale, state.dtype)
    after, (states, u) = _states(part, state)
    o = _dot(part.q * part.start, states) + _dot(part.scores_q, u)
    return after, (_join(o).astype(tokens[2].dtype), state)

  after, (o, borders) = jax.lax.scan(
    block, state, jnp.arange(tokens[0].shape[1] // (chunk * chunks))
  )
  return (_unblock(o), after), (*arrays, borders)


def _backward(symmetric, scale, chunk, chunks, saved, grads):
  *tokens, initial, valid, fresh, borders = saved
  d_o, d_after = grads

  def block(d_state, at):
    index, state = at
    part = _part(tokens, valid, fresh, index, chunk, chunks, symmetric, scale, state.dtype)
    states, u = _states(part, state)[1]
    d_o_block = _split(_slice(d_o, index, chunk * chunks), chunk).astype(state.dtype)
    d_state, d_tokens = _block_backward(part, states, u, d_o_block, d_state, symmetric, scale)
    return d_state, tuple(
      _join(_ungroup(x, y.shape[2])).astype(y.dtype) for x, y in zip(d_tokens, tokens)
    )

  steps = (jnp.arange(borders.shape[0]), borders)
  d_initial, d_tokens = jax.lax.scan(block, d_after.astype(initial.dtype), steps, reverse=True)
  return (*map(_unblock, d_tokens), d_initial, None, None)


scan.defvjp(_forward, _backward)


class Part(NamedTuple):
  """What the passes over a block share; arrays are [R, B, H, C, ...] in the state's dtype."""

  tokens: tuple  # q, k, v, g, gate_k, gate_v; q, k and v are 0 where not valid
  valid: jax.Array | None  # [R, B, 1, C, 1] of 0 and 1
  q: jax.Array  # [.., K] times scale
  a: jax.Array  # [.., K]
  b: jax.Array  # [.., K]
  pairs: tuple  # what _scores needs again in _scores_backward
  start: jax.Array  # [.., K or 1] decay from the chunk's start, e
  end_t: jax.Array  # [R, B, H, K, C] transposed A f
  end: jax.Array  # [.., K or 1] decay to the chunk's end, f
  scores_q: jax.Array  # [.., C] P
  inverse: jax.Array  # [.., C] M
  written: jax.Array  # [.., V] M X
  erased: jax.Array  # [.., K] M (B e)


def _part(tokens, valid, fresh, index, chunk, chunks, symmetric, scale, dtype):
  """Everything about block `index` that does not depend on the state."""
  cut = lambda x: _split(_slice(x, index, chunk * chunks), chunk).astype(dtype)
  q, k, v, g, gate_k, gate_v = map(cut, tokens)
  q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2) for x in (q, k))
  decay = jnp.exp(g)
  if valid is not None:
    valid, fresh = (cut(x[..., None, None]) for x in (valid, fresh))
    q, k, v = q * valid, k * valid, v * valid
    decay = jnp.where(valid == 0, 1, decay) * (1 - fresh)
  b = gate_k * k
  a = b if symmetric else k
  scaled = scale * q
  levels, start, end = _decays(decay)
  strict, pairs = (_scores if g.shape[-1] == 1 else _channel_scores)(scaled, b, a, levels)
  scores_q = strict[..., 0, :, :] + _inner(scaled, a) * np.eye(chunk, dtype=dtype)
  inverse = _inverse(strict[..., 1, :, :])
  solved = _dot(inverse, jnp.concatenate([gate_v * v, b * start], axis=-1))
  written, erased = jnp.split(solved, [v.shape[-1]], axis=-1)
  end_t = _transpose(a * end)
  return Part(
    (q, k, v, g, gate_k, gate_v),
    valid,
    scaled,
    a,
    b,
    pairs,
    start,
    end_t,
    end,
    scores_q,
    inverse,
    written,
    erased,
  )


def _states(part, state):
  """The state after a block, and of its chunks the states before, and U [R, B, H, C, V]."""

  def step(state, at):
    written, erased, end_t, start = at
    u = written - _dot(erased, state)
    return jnp.swapaxes(start, -1, -2) * state + _dot(end_t, u), (state, u)

  return jax.lax.scan(step, state, (part.written, part.erased, part.end_t, part.start[..., -1:, :]))


def _block_backward(part, states, u, d_o, d_state, symmetric, scale):
  """The gradients of the state before a block, and of its q, k, v, g, gate_k, gate_v.

  With dS the gradient of the state after a chunk: dU = P^T dO + (A f) dS, dX = M^T dU, dP = tril(dO
  U^T), dL = -stril(dX U^T), and dS before it = Diag(e_C) dS + (Q e)^T dO - W^T dU. States are
  transposed here, [V, K], which lets every product but one run over rows as they lie.
  """
  d_o_t = _transpose(d_o)
  d_u_t = _dot(d_o_t, part.scores_q)
  read = _dot(d_o_t, part.q * part.start)

  def step(d_state_t, at):
    d_u_t, read, erased, end_t, start = at
    d_u_t = d_u_t + _dot(d_state_t, end_t)
    return d_state_t * start + read - _dot(d_u_t, erased), (d_state_t, d_u_t)

  at = d_u_t, read, part.erased, part.end_t, part.start[..., -1:, :]
  d_state_t, (d_states_t, d_u_t) = jax.lax.scan(
    step, jnp.swapaxes(d_state, -1, -2), at, reverse=True
  )
  d_x = _transpose(_dot(d_u_t, part.inverse))
  d_rows = jnp.concatenate([d_o, -d_x], axis=-2)
  d_scores = _dot_t(d_rows, u)
  pull = _scores_backward if part.start.shape[-1] == 1 else _channel_scores_backward
  d_qb, d_a = pull(d_scores, part.pairs)
  d_qb = d_qb + _dot_t(d_rows, states) * jnp.concatenate([part.start, part.start], axis=-2)
  d_q, d_b = jnp.split(d_qb, 2, axis=-2)
  d_end = part.end * _dot(u, d_states_t)

  q, k, v, g, gate_k, gate_v = part.tokens
  later = _inner(part.q, d_q, g) + _inner(part.b, d_b, g) - _inner(part.a, d_a, g)
  through = part.start[..., -1:, :] * _inner(d_states_t, jnp.swapaxes(states, -1, -2), g)
  terms = jnp.concatenate([later, _inner(part.a, d_end, g), through], axis=-2)
  chunk, width = u.shape[-2:]
  square = np.ones((chunk, chunk))
  sums = np.concatenate([np.triu(square), np.tril(square, -1), np.ones((chunk, width))], axis=1)
  d_g = _dot(jnp.broadcast_to(sums.astype(u.dtype), (*u.shape[:-2], *sums.shape)), terms)

  diagonal = _inner(d_o, u)
  d_q = scale * (d_q + diagonal * part.a)
  d_a = d_a + diagonal * part.q + d_end
  d_written = d_a + d_b if symmetric else d_b
  d_k = gate_k * d_written if symmetric else d_a + gate_k * d_b
  d_gate_k = _inner(k, d_written, gate_k)
  d_v, d_gate_v = gate_v * d_x, _inner(v, d_x, gate_v)
  if part.valid is not None:
    d_q, d_k, d_v, d_g = (x * part.valid for x in (d_q, d_k, d_v, d_g))
  return jnp.swapaxes(d_state_t, -1, -2), (d_q, d_k, d_v, d_g, d_gate_k, d_gate_v)


def _decays(decay):
  """Products of decays [.., C, K] over rows: of the halves of every level, and of the chunk.

  start[t] is the product from its half's first row to t, end[s] from s + 1 to its half's last row.
  Level h has the halves of h rows, [.., C / 2h, h, K]; the last two results are the same for the
  whole chunk, [.., C, K].
  """
  start, end = decay, jnp.ones_like(decay)
  levels = []
  rows = 1
  while rows < decay.shape[-2]:
    start, end = (x.reshape(*decay.shape[:-2], -1, 2, rows, decay.shape[-1]) for x in (start, end))
    levels.append((start[..., 1, :, :], end[..., 0, :, :]))
    one = jnp.ones_like(start[..., 0, -1:, :])
    start = (start * jnp.stack([one, start[..., 0, -1:, :]], axis=-3)).reshape(decay.shape)
    end = (end * jnp.stack([levels[-1][0][..., -1:, :], one], axis=-3)).reshape(decay.shape)
    rows *= 2
  return levels, start, end


def _channel_scores(q, b, a, levels):
  """Strictly lower decayed scores of q and b with a, [.., 2, C, C], for decays per channel."""
  pairs, blocks = [], []
  for start, end in levels:
    rows = start.shape[-2]
    left = jnp.concatenate([_lower(q, rows) * start, _lower(b, rows) * start], axis=-2)
    right = _upper(a, rows) * end
    pairs.append((left, right, start, end))
    blocks.append(_dot_t(left, right).reshape(*right.shape[:-2], 2, rows, rows))
  return _assemble(blocks), pairs


def _channel_scores_backward(d_scores, pairs):
  """Gradients [.., 2 C, K] of q and b, one below the other, and [.., C, K] of a."""
  d_q, d_b, d_a = 0, 0, 0
  blocks = _disassemble(d_scores)
  for (left, right, start, end), block in zip(pairs, blocks):
    rows = start.shape[-2]
    d_left = _dot(block, right)
    d_right = _dot(_transpose(block), left) * end
    zero = jnp.zeros_like(d_right)
    put = lambda *x: jnp.stack(x, axis=-3).reshape(*right.shape[:-3], -1, right.shape[-1])
    d_q += put(zero, d_left[..., :rows, :] * start)
    d_b += put(zero, d_left[..., rows:, :] * start)
    d_a += put(d_right, zero)
  return jnp.concatenate([d_q, d_b], axis=-2), d_a


def _scores(q, b, a, levels):
  """_channel_scores for one decay per head: the decay between two tokens is a matrix of its own."""
  blocks = [(start * jnp.swapaxes(end, -1, -2))[..., None, :, :] for start, end in levels]
  decay = _assemble(blocks)
  qb = jnp.concatenate([q, b], axis=-2)
  scores = _dot_t(qb, a).reshape(*q.shape[:-2], 2, q.shape[-2], -1)
  return scores * decay, (qb, a, decay)


def _scores_backward(d_scores, pairs):
  qb, a, decay = pairs
  d = (d_scores.reshape(*qb.shape[:-2], 2, *decay.shape[-2:]) * decay).reshape(d_scores.shape)
  return _dot(d, a), _dot(_transpose(d), qb)


def _assemble(blocks):
  """Lower left blocks [.., C / 2h, S, h, h], from h = 1 -> strictly lower [.., S, C, C]."""
  matrix = jnp.stack([jnp.zeros_like(blocks[0])] * 2, axis=-4)
  for block in blocks:
    pair = matrix.reshape(*block.shape[:-3], 2, *block.shape[-3:])
    upper, lower = pair[..., 0, :, :, :], pair[..., 1, :, :, :]
    top = jnp.concatenate([upper, jnp.zeros_like(block)], axis=-1)
    matrix = jnp.concatenate([top, jnp.concatenate([block, lower], axis=-1)], axis=-2)
  return matrix[..., 0, :, :, :]


def _disassemble(matrix):
  """The lower left blocks [.., C / 2h, 2 h, h], from h = 1, of two matrices [.., 2 C, C]."""
  size = matrix.shape[-1]
  matrix = matrix.reshape(*matrix.shape[:-2], 1, 2, size, size)
  blocks = []
  while size > 1:
    size //= 2
    block = matrix[..., size:, :size]
    blocks.append(block.reshape(*block.shape[:-3], 2 * size, size))
    halves = jnp.stack([matrix[..., :size, :size], matrix[..., size:, size:]], axis=-4)
    matrix = halves.reshape(*halves.shape[:-5], -1, 2, size, size)
  return blocks[::-1]


def _inverse(lower):
  """(I + lower)^-1 of strictly lower matrices [.., C, C], by halves.

  The block of a pair of halves is minus inverse x block x inverse. The powers of `lower` in a
  Neumann product would grow like binomials where neighbouring keys are alike and cancel; nothing
  grows here.
  """
  row, column = np.indices(lower.shape[-2:])
  result = np.eye(len(row), dtype=lower.dtype)
  rows = 1
  while rows < len(row):
    block = lower * ((row // rows % 2 == 1) & (column // rows == row // rows - 1))
    result = result - (block if rows == 1 else _dot(_dot(result, block), result))
    rows *= 2
  return result


def _inner(x, y, like=None):
  """x * y [.., C, D], summed over D unless `like` has that dimension."""
  if like is not None and like.shape[-1] == x.shape[-1]:
    return x * y
  return jnp.einsum('...d,...d->...', x, y, precision='highest')[..., None]


def _dot(x, y):
  return jnp.matmul(x, y, precision='highest')


def _dot_t(x, y):
  return _dot(x, jnp.swapaxes(y, -1, -2))


def _transpose(x):
  """Swaps the last two dimensions in memory: a product that reads them swapped is slow on CPU."""
  return jax.lax.optimization_barrier(jnp.swapaxes(x, -1, -2))


def _lower(x, rows):
  return x.reshape(*x.shape[:-2], -1, 2, rows, x.shape[-1])[..., 1, :, :]


def _upper(x, rows):
  return x.reshape(*x.shape[:-2], -1, 2, rows, x.shape[-1])[..., 0, :, :]


def _slice(x, index, size):
  return jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1)


def _split(x, chunk):
  """[B, R C, H, D] -> [R, B, H, C, D]."""
  return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).transpose(1, 0, 3, 2, 4)


def _join(x):
  """[R, B, H, C, D] -> [B, R C, H, D]."""
  rows, batch, heads, chunk, size = x.shape
  return x.transpose(1, 0, 3, 2, 4).reshape(batch, rows * chunk, heads, size)


def _ungroup(x, heads):
  """Sums [R, B, H, C, D] over the value heads of a key head -> [R, B, heads, C, D]."""
  if x.shape[2] == heads:
    return x
  return jnp.sum(x.reshape(*x.shape[:2], heads, -1, *x.shape[3:]), axis=3)


def _unblock(x):
  """[T / R C, B, R C, H, D] -> [B, T, H, D]."""
  return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
