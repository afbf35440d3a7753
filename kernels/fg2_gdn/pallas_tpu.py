"""The recurrence of reference.py as Mosaic TPU kernels: a chunk of C tokens per grid step.

B rows, T tokens, Hk key heads, Hv value heads, K key channels, V value channels (filled up with
zeros to multiples of 128), N chunks. The algebra and its letters are those of chunked.py, with the
state transposed, [V, K], so that decays scale its columns.

Every decay that a chunk needs, for each level of halving and for the chunk, is exp of a sum of
log-decays: all of them are one product of a constant 0/1 matrix with g, and the gradient of g is
one product with its transpose. No decay is a difference of sums, none can overflow, and a
forgotten state is a log-decay of -10000. The scores of a level are one product over the whole
chunk with half the rows set to 0; what lies outside the level's blocks is masked.

With bfloat16 inputs the operands of products are bfloat16, but decays, scores, inverse, state and
sums float32; with float32 inputs everything is. Only the inputs are kept for the backward pass: it
runs the forward kernel again for the states at chunk borders, then the chunks in reverse.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.fg2_gdn import masking

LANES = 128


class Setup(NamedTuple):
  """What is static: see `scan`. key_size and value_size are K and V after filling up."""

  symmetric: bool
  scale: float
  chunk: int
  heads: int
  group: int
  key_size: int
  value_size: int
  interpret: object


def scan(
  q,
  k,
  v,
  g,
  gate_k,
  gate_v,
  state,
  valid,
  fresh,
  *,
  symmetric,
  scale,
  chunk,
  heads,
  interpret=False,
):
  """reference.scan; valid and fresh may be None. heads: value heads of a grid step, at most."""
  length, value_heads = v.shape[1:3]
  group = value_heads // k.shape[2]
  q, k, v, g = masking.mask(q, k, v, g, valid, fresh)
  fits = [
    n for n in range(1, heads + 1) if value_heads % n == 0 and (n % group == 0 or group % n == 0)
  ]
  size = [-(-x.shape[-1] // LANES) * LANES for x in (k, v)]
  setup = Setup(symmetric, scale, chunk, max(fits), group, *size, interpret)

  def flat(x, like, size):
    x = jnp.broadcast_to(x, (*x.shape[:3], like.shape[-1]))
    x = jnp.pad(x, [(0, 0), (0, -length % chunk), (0, 0), (0, size - x.shape[-1])])
    return x.reshape(*x.shape[:2], -1)

  key, value = (
    functools.partial(flat, like=k, size=size[0]),
    functools.partial(flat, like=v, size=size[1]),
  )
  state_t = jnp.swapaxes(state, -1, -2).astype(jnp.float32)
  state_t = jnp.pad(
    state_t, [(0, 0), (0, 0), (0, size[1] - v.shape[-1]), (0, size[0] - k.shape[-1])]
  )
  arrays = key(q), key(k), value(v), key(g.astype(jnp.float32)), key(gate_k), value(gate_v), state_t
  o, state_t = _scan(setup, *arrays)
  o = o.reshape(*o.shape[:2], value_heads, -1)[:, :length, :, : v.shape[-1]]
  return o, jnp.swapaxes(state_t[:, :, : v.shape[-1], : k.shape[-1]], -1, -2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(setup, *arrays):
  return _call_forward(setup, arrays, False)


def _scan_forward(setup, *arrays):
  return _scan(setup, *arrays), arrays


def _scan_backward(setup, arrays, grads):
  states = _call_forward(setup, arrays, True)
  d_q, d_k, d_v, d_g, d_gate_k, d_gate_v, d_state = _call_backward(setup, arrays, states, *grads)
  if setup.group > 1:
    grouped = (*d_q.shape[:2], -1, setup.group, setup.key_size)
    d_q, d_k = (
      jnp.sum(x.reshape(grouped), axis=3).reshape(y.shape).astype(y.dtype)
      for x, y in ((d_q, arrays[0]), (d_k, arrays[1]))
    )
  return d_q, d_k, d_v, d_g, d_gate_k, d_gate_v, d_state


_scan.defvjp(_scan_forward, _scan_backward)


def _call_forward(setup, arrays, keep):
  """Output and final state; if keep, the states before all chunks [B, Hv, N, V, K] float32."""
  grid, rows, borders, whole = _blocks(setup, arrays, lambda n: n)
  tokens, state = arrays[:6], arrays[6]
  if keep:
    out, specs = (
      [jax.ShapeDtypeStruct((*state.shape[:2], grid[2], *state.shape[2:]), jnp.float32)],
      [borders],
    )
  else:
    out = [
      jax.ShapeDtypeStruct(tokens[2].shape, tokens[2].dtype),
      jax.ShapeDtypeStruct(state.shape, jnp.float32),
    ]
    specs = [rows[2], whole]
  result = _call(
    functools.partial(_forward_kernel, setup=setup, keep=keep),
    setup,
    grid,
    [_constant(_sums(setup)), *rows, whole],
    specs,
    out,
  )(_sums(setup), *tokens, state)
  return result[0] if keep else tuple(result)


def _call_backward(setup, arrays, states, d_o, d_after):
  """Gradients of the arrays; those of q and k per value head."""
  last = states.shape[2] - 1
  grid, rows, borders, whole = _blocks(setup, arrays, lambda n: last - n)
  tokens = arrays[:6]
  per_value_head = (rows[3], rows[3], *rows[2:])
  width = tokens[3].shape
  shapes = [(width, tokens[0]), (width, tokens[1])] + [(x.shape, x) for x in tokens[2:]]
  out = [
    jax.ShapeDtypeStruct(shape, jnp.float32 if setup.group > 1 and i < 2 else x.dtype)
    for i, (shape, x) in enumerate(shapes)
  ] + [jax.ShapeDtypeStruct(d_after.shape, jnp.float32)]
  sums = _sums(setup)
  return _call(
    functools.partial(_backward_kernel, setup=setup),
    setup,
    grid,
    [_constant(sums), _constant(sums.T), *rows, borders, rows[2], whole],
    [*per_value_head, whole],
    out,
  )(sums, sums.T, *tokens, states, d_o, d_after)


def _call(kernel, setup, grid, in_specs, out_specs, out_shape):
  return pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shape,
    scratch_shapes=[pltpu.VMEM((setup.heads, setup.value_size, setup.key_size), jnp.float32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel', 'arbitrary')),
    interpret=setup.interpret,
    name=kernel.func.__name__.strip('_'),
  )


def _blocks(setup, arrays, at):
  """Grid, and block specs of token arrays, of states at borders, of a state. at: step -> chunk."""
  batch, length, width = arrays[3].shape
  grid = batch, width // (setup.heads * setup.key_size), length // setup.chunk
  key_heads = max(1, setup.heads // setup.group)
  repeats = max(1, setup.group // setup.heads)  # grid steps that read the same key heads
  first_key = lambda j: jax.lax.div(j, repeats)

  def rows(heads, size, head=lambda j: j):
    return pl.BlockSpec((1, setup.chunk, heads * size), lambda b, j, n: (b, at(n), head(j)))

  key, value = rows(setup.heads, setup.key_size), rows(setup.heads, setup.value_size)
  shared = rows(key_heads, setup.key_size, first_key)
  size = (setup.value_size, setup.key_size)
  borders = pl.BlockSpec((1, setup.heads, 1, *size), lambda b, j, n: (b, j, at(n), 0, 0))
  whole = pl.BlockSpec((1, setup.heads, *size), lambda b, j, n: (b, j, 0, 0))
  return grid, (shared, shared, value, key, key, value), borders, whole


def _constant(x):
  return pl.BlockSpec(x.shape, lambda b, j, n: (0, 0))


def _sums(setup):
  """0/1 matrix [(levels + 2) C, C] whose product with g is every log-decay of a chunk.

  Per level h = 1, 2, .. C / 2: row t sums from the border of its pair of halves to t (second half,
  t included) or from t (excluded) to the border. Then from the chunk's start, and to its end.
  """
  t, s = np.indices((setup.chunk, setup.chunk))
  parts, half = [], 1
  while half < setup.chunk:
    border = t // (2 * half) * (2 * half) + half
    parts.append(np.where(t >= border, (s >= border) & (s <= t), (s > t) & (s < border)))
    half *= 2
  return jnp.asarray(np.concatenate([*parts, s <= t, s > t]), jnp.bfloat16)


class Chunk(NamedTuple):
  """What the passes over a chunk share, all float32."""

  q: jax.Array  # [C, K] times scale
  a: jax.Array  # [C, K]
  b: jax.Array  # [C, K]
  decays: list  # per level [C, K]
  pairs: list  # per level: left [2 C, K] and right [C, K] factors of the scores
  start: jax.Array  # [C, K] e
  end: jax.Array  # [C, K] f
  scores: jax.Array  # [C, C] P
  inverse: jax.Array  # [C, C] M


def _chunk(setup, exact, sums, q, k, g, gate_k):
  size = setup.chunk
  q, b = setup.scale * q, gate_k * k
  a = b if setup.symmetric else k
  decays = jnp.exp(_dot_01(sums, g, exact))
  *levels, start, end = [decays[i : i + size] for i in range(0, decays.shape[0], size)]
  scores = jnp.where(
    _same(2 * size, size, size), _dot_nt(jnp.concatenate([q, jnp.zeros_like(q)]), a, exact), 0
  )
  pairs = []
  for level, decay in enumerate(levels):
    lower = _lower(decay.shape, 1 << level)
    left = jnp.concatenate([jnp.where(lower, q * decay, 0), jnp.where(lower, b * decay, 0)])
    right = jnp.where(lower, 0, a * decay)
    pairs.append((left, right))
    scores += jnp.where(_block(2 * size, size, 1 << level), _dot_nt(left, right, exact), 0)
  inverse = _inverse(scores[size:], exact)
  return Chunk(q, a, b, levels, pairs, start, end, scores[:size], inverse)


def _forward_kernel(sums, q, k, v, g, gate_k, gate_v, state, *out, setup, keep):
  carry = out[-1]

  @pl.when(pl.program_id(2) == 0)
  def _():
    carry[...] = state[0]

  exact = v.dtype == jnp.float32
  for h in range(setup.heads):
    key, head, values = _lanes(setup, h)
    part = _chunk(
      setup,
      exact,
      sums[...],
      *(_load(x, at) for x, at in ((q, key), (k, key), (g, head), (gate_k, head))),
    )
    before = carry[h]
    if keep:
      out[0][0, h, 0] = before
    x = _load(gate_v, values) * _load(v, values)
    u = _dot(part.inverse, x - _dot_nt(part.b * part.start, before, exact), exact)
    if not keep:
      o = _dot_nt(part.q * part.start, before, exact) + _dot(part.scores, u, exact)
      out[0][0, :, values] = o.astype(v.dtype)
    carry[h] = before * part.start[-1:] + _dot_tn(u, part.a * part.end, exact)

  if not keep:

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
      out[1][0] = carry[...]


def _backward_kernel(
  sums,
  sums_t,
  q,
  k,
  v,
  g,
  gate_k,
  gate_v,
  states,
  d_o,
  d_after,
  d_q,
  d_k,
  d_v,
  d_g,
  d_gate_k,
  d_gate_v,
  d_state,
  carry,
  *,
  setup,
):
  @pl.when(pl.program_id(2) == 0)
  def _():
    carry[...] = d_after[0]

  exact = v.dtype == jnp.float32
  size = setup.chunk
  for h in range(setup.heads):
    key, head, values = _lanes(setup, h)
    keys, gates_k = _load(k, key), _load(gate_k, head)
    part = _chunk(setup, exact, sums[...], _load(q, key), keys, _load(g, head), gates_k)
    before, d_next = states[0, h, 0], carry[h]
    given, gates_v = _load(v, values), _load(gate_v, values)
    u = _dot(part.inverse, gates_v * given - _dot_nt(part.b * part.start, before, exact), exact)

    d_out = _load(d_o, values)
    d_u = _dot_tn(part.scores, d_out, exact) + _dot_nt(part.a * part.end, d_next, exact)
    d_x = _dot_tn(part.inverse, d_u, exact)
    rows = jnp.concatenate([d_out, -d_x])
    d_scores = _dot_nt(rows, u, exact)
    d_qb = _dot(rows, before, exact) * jnp.concatenate([part.start, part.start])
    d_a = _dot(u, d_next, exact) * part.end

    through = part.start[-1:] * jnp.sum(before * d_next, axis=0, keepdims=True)
    last = jax.lax.broadcasted_iota(jnp.int32, part.start.shape, 0) == size - 1
    terms = [
      part.q * d_qb[:size] + part.b * d_qb[size:] + jnp.where(last, through, 0),
      part.a * d_a,
    ]
    levels = []
    for level, (decay, (left, right)) in enumerate(zip(part.decays, part.pairs)):
      block = jnp.where(_block(2 * size, size, 1 << level), d_scores, 0)
      lower = _lower(decay.shape, 1 << level)
      d_left = _dot(block, right, exact) * jnp.concatenate([jnp.where(lower, decay, 0)] * 2)
      d_right = jnp.where(lower, 0, _dot_tn(block, left, exact) * decay)
      levels.append(part.q * d_left[:size] + part.b * d_left[size:] + part.a * d_right)
      d_qb, d_a = d_qb + d_left, d_a + d_right
    d_g[0, :, head] = _dot_01(sums_t[...], jnp.concatenate([*levels, *terms]), exact)

    diagonal = jnp.where(_same(size, size, size), d_scores[:size], 0)
    d_queries = d_qb[:size] + _dot(diagonal, part.a, exact)
    d_a += _dot(diagonal, part.q, exact)
    d_b = d_qb[size:]
    d_gated = d_a + d_b if setup.symmetric else d_b
    d_q[0, :, head] = (setup.scale * d_queries).astype(d_q.dtype)
    d_k[0, :, head] = (gates_k * d_gated if setup.symmetric else d_a + gates_k * d_b).astype(
      d_k.dtype
    )
    d_gate_k[0, :, head] = (keys * d_gated).astype(d_gate_k.dtype)
    d_v[0, :, values] = (gates_v * d_x).astype(d_v.dtype)
    d_gate_v[0, :, values] = (given * d_x).astype(d_gate_v.dtype)
    reads = jnp.concatenate([part.q * part.start, part.b * part.start])
    carry[h] = d_next * part.start[-1:] + _dot_tn(rows, reads, exact)

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _():
    d_state[0] = carry[...]


def _inverse(lower, exact):
  """(I + lower)^-1 by halves, as in chunked.py."""
  size = lower.shape[0]
  result = jnp.where(_same(size, size, size), 1.0, jnp.where(_block(size, size, 1), -lower, 0))
  half = 2
  while half < size:
    block = jnp.where(_block(size, size, half), lower, 0)
    result = result - _dot_3(_dot_3(result, block, exact), result, exact)
    half *= 2
  return result


def _lanes(setup, h):
  """Where value head h of a block lies in its key, value-head-wide key, and value arrays."""
  key = h // setup.group if setup.heads % setup.group == 0 else 0
  return tuple(
    slice(i * size, (i + 1) * size)
    for i, size in ((key, setup.key_size), (h, setup.key_size), (h, setup.value_size))
  )


def _load(ref, lanes):
  return ref[0, :, lanes].astype(jnp.float32)


def _lower(shape, half):
  """Rows of the second halves of pairs of halves."""
  return jax.lax.broadcasted_iota(jnp.int32, shape, 0) & half != 0


def _block(rows, columns, half):
  """[rows, columns]: the lower left blocks of pairs of halves; rows beyond `columns` count anew."""
  t = jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 0) & (columns - 1)
  s = jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
  return ((t ^ s) & -half == half) & (t & half != 0)


def _same(rows, columns, top):
  """[rows, columns]: the diagonal of the first `top` rows."""
  t = jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 0)
  s = jax.lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
  return (t == s) & (t < top)


def _product(x, y, dimensions, exact):
  if not exact:
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
  return jax.lax.dot_general(
    x,
    y,
    (dimensions, ((), ())),
    preferred_element_type=jnp.float32,
    precision=jax.lax.Precision.HIGHEST if exact else None,
  )


def _dot(x, y, exact):
  return _product(x, y, ((1,), (0,)), exact)


def _dot_nt(x, y, exact):
  return _product(x, y, ((1,), (1,)), exact)


def _dot_tn(x, y, exact):
  return _product(x, y, ((0,), (0,)), exact)


def _parts(x, count):
  """bfloat16 arrays that add up to x, to 8 bits each."""
  parts = []
  for _ in range(count):
    parts.append(x.astype(jnp.bfloat16))
    x = x - parts[-1].astype(jnp.float32)
  return parts


def _dot_01(zero_one, x, exact):
  """Product with a matrix of 0 and 1, to 16 bits of x, or all of them."""
  return sum(_dot(zero_one, part, False) for part in reversed(_parts(x, 3 if exact else 2)))


def _dot_3(x, y, exact):
  """A product to about 16 bits, or in float32."""
  if exact:
    return _dot(x, y, True)
  (x, x_low), (y, y_low) = _parts(x, 2), _parts(y, 2)
  return _dot(x, y, False) + (_dot(x_low, y, False) + _dot(x, y_low, False))
