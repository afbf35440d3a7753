"""The recurrence of reference.py as Mosaic GPU kernels for Hopper: chunks of 64 tokens.

B rows, T tokens, Hk key heads, Hv value heads, K key channels, V value channels (filled up with
zeros to 64 or 128; more are refused), N chunks of C = 64 tokens. The algebra and its letters are
those of chunked.py; u, d_u are U and its gradient, states S and its gradient before and after each
chunk. Every product is a wgmma with bfloat16 operands and float32 sums, so inputs are bfloat16.

Not one kernel but four, because a row's heads are too few to fill a GPU: what does not depend on
the state runs over all chunks at once, and only what does runs over them in turn.

  chunk_kernel     grid B, Hv, N        Q e, A f, P, M X, -M (B e), e_C: scores, inverse and all
  state_kernel     grid B, Hv, V / 64   S from chunk to chunk, in registers; O, or U and all S
  reverse_kernel   grid B, Hv, V / 64   the gradient of S, likewise, from the last chunk; that of U
  gradient_kernel  grid B, Hv, N, K / 64   the gradients of the inputs, which 64 key channels at a
                                           time do not share once those of P and L are known

The forward pass is the first two. Only the inputs are kept: the backward pass runs these two again,
then the others. What passes between kernels is bfloat16 in memory, e_C float32; the log-decays
enter as two bfloat16 parts. A level of halving takes its decays from one product of a 0/1 matrix
with them, as pallas_tpu.py explains; the matrices are made of iotas in registers. Scores, inverse,
state and the sums of all gradients are float32 in registers.

No GPU has run this yet. Mosaic GPU's interpreter checks the values and the order of copies, without
memory layouts, casts of layouts, transposed references or products of registers: hence the few
lines that ask for `interpret`. The compiler accepts the rest for an H200, see
benchmarks/fg2_gdn_gpu.py.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.fg2_gdn import masking

CHUNK = 64  # the rows of a wgmma
LEVELS = 6  # of halving
TILE = 64  # channels that a kernel takes at a time, where it does not take all
CHANNELS = 2 * TILE  # of keys and of values, at most: shared memory holds no more
SWIZZLE = 128  # bytes


class Setup(NamedTuple):
  """What is static: see `scan`. size: K and V after filling up."""

  symmetric: bool
  scale: float
  group: int
  size: int
  operand: object
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
  operand=jnp.bfloat16,
  interpret=None,
):
  """reference.scan; valid and fresh may be None.

  operand: float32 makes every product float32, which only the interpreter can do. interpret: the
  interpreter's parameters.
  """
  length, value_heads = v.shape[1:3]
  q, k, v, g = masking.mask(q, k, v, g, valid, fresh)
  size = -(-max(k.shape[-1], v.shape[-1]) // TILE) * TILE
  operand = jnp.dtype(operand)
  setup = Setup(symmetric, scale, value_heads // k.shape[2], size, operand, interpret)

  def flat(x, like, dtype=operand):
    x = jnp.broadcast_to(x.astype(dtype), (*x.shape[:3], like.shape[-1]))
    x = jnp.pad(x, [(0, 0), (0, -length % CHUNK), (0, 0), (0, size - x.shape[-1])])
    return x.reshape(*x.shape[:2], -1)

  tokens = flat(q, k), flat(k, k), flat(v, v), flat(g, k, jnp.float32), flat(gate_k, k)
  tokens = (*tokens, flat(gate_v, v))
  rest = [(0, size - n) for n in state.shape[2:]]
  state = jnp.pad(state.astype(jnp.float32), [(0, 0), (0, 0), *rest])
  o, state = _scan(setup, *tokens, state)
  o = o.reshape(*o.shape[:2], value_heads, -1)[:, :length, :, : v.shape[-1]]
  return o.astype(v.dtype), state[:, :, : k.shape[-1], : v.shape[-1]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(setup, *arrays):
  parts = _call_chunks(setup, arrays[:6], False)
  return _call_states(setup, parts, arrays[6], False)


def _scan_forward(setup, *arrays):
  return _scan(setup, *arrays), arrays


def _scan_backward(setup, arrays, grads):
  *tokens, state = arrays
  d_o, d_after = grads
  *parts, inverse = _call_chunks(setup, tokens, True)
  states, u = _call_states(setup, parts, state, True)
  d_states, d_u, d_state = _call_reverse(setup, parts, d_o, d_after)
  d_tokens = _call_gradients(setup, tokens, inverse, states, u, d_states, d_u, d_o)
  d_q, d_k, *d_rest = d_tokens
  if setup.group > 1:
    grouped = (*d_q.shape[:2], -1, setup.group, setup.size)
    d_q, d_k = (
      jnp.sum(x.reshape(grouped).astype(jnp.float32), axis=3)
      .reshape(tokens[0].shape)
      .astype(x.dtype)
      for x in (d_q, d_k)
    )
  return d_q, d_k, *d_rest, d_state


_scan.defvjp(_scan_forward, _scan_backward)


def _call_chunks(setup, tokens, keep):
  """Q e, -M (B e), M X, A f, P, e_C and if keep M, per chunk [B, Hv, N, C, ..]; e_C has no C."""
  q, k, v, g, gate_k, gate_v = tokens
  grid = _grid(setup, v)
  wide = lambda size: jax.ShapeDtypeStruct((*grid.values(), CHUNK, size), setup.operand)
  out = [
    *[wide(setup.size)] * 4,
    wide(CHUNK),
    jax.ShapeDtypeStruct((*grid.values(), setup.size), jnp.float32),
  ]
  scratch = [_tile(setup, setup.size)] * 5 + [_tile(setup, CHUNK)] * 3
  return _call(
    functools.partial(_chunk_kernel, setup=setup, keep=keep),
    setup,
    grid,
    out + [wide(CHUNK)] * keep,
    [*scratch, plgpu.SMEM((setup.size,), jnp.float32), *_barriers(5, 2)],
  )(q, k, v, gate_k, gate_v, *_parts_of_decays(setup, g))


def _call_states(setup, parts, state, keep):
  """O [B, T, Hv V] and the final state; if keep, S before, and U of, all chunks instead."""
  batch, heads, chunks = parts[0].shape[:3]
  size = setup.size
  if keep:
    out = [
      jax.ShapeDtypeStruct((batch, heads, chunks, size, size), setup.operand),
      jax.ShapeDtypeStruct((batch, heads, chunks, CHUNK, size), setup.operand),
    ]
  else:
    out = [
      jax.ShapeDtypeStruct((batch, chunks * CHUNK, heads * size), setup.operand),
      jax.ShapeDtypeStruct(state.shape, jnp.float32),
    ]
  return _call(
    functools.partial(_state_kernel, setup=setup, keep=keep, chunks=chunks),
    setup,
    dict(row=batch, head=heads, tile=size // TILE),
    out,
    [
      *(_tile(setup, columns, slots=2) for columns in (size, size, TILE, size, CHUNK)),
      plgpu.SMEM((2, size), jnp.float32),
      _tile(setup, TILE, size),
      _tile(setup, TILE),
      _tile(setup, TILE),
      _tile_32(size),
      plgpu.Barrier(num_arrivals=6, num_barriers=2),
      *_barriers(1),
    ],
  )(*parts, state)


def _call_reverse(setup, parts, d_o, d_after):
  """Gradients of S after, and of U of, all chunks [B, Hv, N, ..], and of the first state."""
  batch, heads, chunks = parts[0].shape[:3]
  size = setup.size
  reads, erased, _, ends, scores, decay = parts
  return _call(
    functools.partial(_reverse_kernel, setup=setup, chunks=chunks),
    setup,
    dict(row=batch, head=heads, tile=size // TILE),
    [
      jax.ShapeDtypeStruct((batch, heads, chunks, size, size), setup.operand),
      jax.ShapeDtypeStruct((batch, heads, chunks, CHUNK, size), setup.operand),
      jax.ShapeDtypeStruct(d_after.shape, jnp.float32),
    ],
    [
      *(_tile(setup, columns, slots=2) for columns in (size, size, TILE, size, CHUNK)),
      plgpu.SMEM((2, size), jnp.float32),
      _tile(setup, TILE, size),
      _tile(setup, TILE),
      _tile_32(size),
      plgpu.Barrier(num_arrivals=6, num_barriers=2),
      *_barriers(1),
    ],
  )(reads, erased, d_o, ends, scores, decay, d_after)


def _call_gradients(setup, tokens, inverse, states, u, d_states, d_u, d_o):
  """Gradients of q, k, v, g, gate_k, gate_v as they lie; those of q and k per value head."""
  q, k, v, g, gate_k, gate_v = tokens
  like = lambda x, dtype=setup.operand: jax.ShapeDtypeStruct(x.shape, dtype)
  grid = _grid(setup, v) | dict(tile=setup.size // TILE)
  return _call(
    functools.partial(_gradient_kernel, setup=setup),
    setup,
    grid,
    [like(g), like(g), like(v), like(g, jnp.float32), like(g), like(v)],
    [
      *[_tile(setup, TILE)] * 5,
      *[_tile(setup, setup.size)] * 5,
      *[_tile(setup, TILE)] * 8,
      _tile_32(CHUNK),
      *_barriers(11, 2),
    ],
  )(q, k, v, gate_k, gate_v, *_parts_of_decays(setup, g), inverse, states, u, d_states, d_u, d_o)


def _call(kernel, setup, grid, out, scratch):
  """grid: {name: size} of its axes."""
  options = {'interpret': setup.interpret} if setup.interpret else {}
  return plgpu.kernel(
    kernel,
    out_type=out,
    scratch_types=scratch,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    kernel_name=kernel.func.__name__.strip('_'),
    **options,
  )


def _grid(setup, v):
  return dict(row=v.shape[0], head=v.shape[2] // setup.size, chunk=v.shape[1] // CHUNK)


def _tile(setup, columns, rows=CHUNK, slots=None):
  """Shared memory for [rows, columns] of operands, or some of them."""
  shape = (rows, columns) if slots is None else (slots, rows, columns)
  return plgpu.SMEM(shape, setup.operand, transforms=_transforms(setup.operand))


def _tile_32(rows):
  """Shared memory for [rows, 64] float32."""
  return plgpu.SMEM((rows, TILE), jnp.float32, transforms=_transforms(jnp.dtype(jnp.float32)))


def _transforms(dtype):
  tiling = plgpu.TilingTransform((8, SWIZZLE // dtype.itemsize))
  return tiling, plgpu.SwizzleTransform(SWIZZLE)


def _barriers(*arrivals):
  return [plgpu.Barrier(num_arrivals=n) for n in arrivals]


def _parts_of_decays(setup, g):
  """log2 of the decays as two operands that add up to it: to 16 bits, or all of them."""
  g = g * np.float32(np.log2(np.e))
  high = lax.reduce_precision(g, 8, 7) if setup.operand == jnp.bfloat16 else g
  return high.astype(setup.operand), (g - high).astype(setup.operand)


def _chunk_kernel(q, k, v, gate_k, gate_v, high, low, *refs, setup, keep):
  reads, erased, written, ends, scores, decay, *inverse = refs[: 6 + keep]
  s_q, s_k, s_b, s_high, s_low, s_one, s_two, s_p, s_decay, first, second = refs[6 + keep :]
  row, head, chunk = (lax.axis_index(x) for x in ('row', 'head', 'chunk'))
  tokens = (row, pl.ds(chunk * CHUNK, CHUNK))
  of_key = (*tokens, pl.ds(lax.div(head, setup.group) * setup.size, setup.size))
  of_head = (*tokens, pl.ds(head * setup.size, setup.size))
  of_value = (*tokens, pl.ds(head * setup.size, setup.size))
  for source, at, target in (
    (q, of_key, s_q),
    (k, of_key, s_k),
    (gate_k, of_head, s_b),
    (high, of_head, s_high),
    (low, of_head, s_low),
  ):
    plgpu.copy_gmem_to_smem(source.at[at], target, first)
  plgpu.barrier_wait(first)

  log_decay = (s_high, s_low)
  s_b[...] = (_load(s_b) * _load(s_k)).astype(setup.operand)
  s_a = s_b if setup.symmetric else s_k
  t, s = _square(setup)
  tiles = _tiles(setup)
  diagonal = sum(jnp.sum(_load(s_q, tile) * _load(s_a, tile), axis=1) for tile in tiles)
  p = jnp.where(t == s, _spread(diagonal, (CHUNK, CHUNK)), 0)

  def level(i, both):
    p, strict = both
    half = lax.shift_left(1, i)
    lower, block = _lower(setup, half), _block(t, s, half)
    for tile in tiles:
      factors = _decays(setup, _level(t, s, half), log_decay, tile)
      s_one[...] = jnp.where(lower, 0, _load(s_a, tile) * factors).astype(setup.operand)
      plgpu.commit_smem()
      left_q, left_b = (
        jnp.where(lower, _load(x, tile) * factors, 0).astype(setup.operand) for x in (s_q, s_b)
      )
      right = _transposed(setup, s_one)
      p += jnp.where(block, _dot(setup, (left_q, right)), 0)
      strict += jnp.where(block, _dot(setup, (left_b, right)), 0)
    return p, strict

  p, strict = lax.fori_loop(0, LEVELS, level, (p, p * 0))
  s_p[...] = (setup.scale * p).astype(setup.operand)
  for tile in tiles:
    end, start = (_decays(setup, mask, log_decay, tile) for mask in (s > t, s <= t))
    s_k[:, tile] = (_load(s_a, tile) * end).astype(setup.operand)
    s_b[:, tile] = (_load(s_b, tile) * start).astype(setup.operand)
    s_q[:, tile] = (setup.scale * _load(s_q, tile) * start).astype(setup.operand)
  s_decay[...] = jnp.exp2(jnp.sum(_load(s_high) + _load(s_low), axis=0))
  s_x, s_gate = s_high, s_low  # which are used up
  plgpu.copy_gmem_to_smem(v.at[of_value], s_x, second)
  plgpu.copy_gmem_to_smem(gate_v.at[of_value], s_gate, second)
  solved = _inverse(setup, strict, t, s, s_one, s_two).astype(setup.operand)
  plgpu.barrier_wait(second)
  s_one[...] = solved
  for tile in tiles:
    s_x[:, tile] = (_load(s_x, tile) * _load(s_gate, tile)).astype(setup.operand)
  plgpu.commit_smem()
  for source, sign in ((s_b, -1), (s_x, 1)):
    for tile in tiles:
      source[:, tile] = (sign * _dot(setup, (s_one, source.at[:, tile]))).astype(setup.operand)
  plgpu.commit_smem()
  at = (row, head, chunk)
  results = ((s_q, reads), (s_b, erased), (s_x, written), (s_k, ends), (s_p, scores))
  for source, target in (*results, (s_decay, decay), *((s_one, x) for x in inverse)):
    plgpu.copy_smem_to_gmem(source, target.at[at])
  plgpu.wait_smem_to_gmem(0)


def _state_kernel(
  reads, erased, written, ends, scores, decay, initial, out_1, out_2, *scratch, setup, keep, chunks
):
  *slots, s_state, s_u, s_o, s_initial, ready, loaded = scratch
  s_reads, s_erased, s_written, s_ends, s_scores, s_decay = slots
  row, head, tile = (lax.axis_index(x) for x in ('row', 'head', 'tile'))
  columns = pl.ds(tile * TILE, TILE)

  def fetch(n):
    at, slot = (row, head, n), lax.rem(n, 2)
    for source, target in (
      (reads.at[at], s_reads),
      (erased.at[at], s_erased),
      (written.at[(*at, slice(None), columns)], s_written),
      (ends.at[at], s_ends),
      (scores.at[at], s_scores),
      (decay.at[at], s_decay),
    ):
      plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

  def step(n, state):
    pl.when(n + 1 < chunks)(lambda: fetch(n + 1))
    slot = lax.rem(n, 2)
    plgpu.barrier_wait(ready.at[slot])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    s_state[...] = state.astype(setup.operand)
    plgpu.commit_smem()
    u = _load(s_written.at[slot]) + _dot(setup, (s_erased.at[slot], s_state))
    s_u[...] = u.astype(setup.operand)
    plgpu.commit_smem()
    if keep:
      plgpu.copy_smem_to_gmem(s_state, out_1.at[row, head, n, :, columns])
      plgpu.copy_smem_to_gmem(s_u, out_2.at[row, head, n, :, columns])
    else:
      o = _dot(setup, (s_reads.at[slot], s_state), (s_scores.at[slot], s_u))
      s_o[...] = o.astype(setup.operand)
      plgpu.commit_smem()
      lanes = pl.ds(head * setup.size + tile * TILE, TILE)
      plgpu.copy_smem_to_gmem(s_o, out_1.at[row, pl.ds(n * CHUNK, CHUNK), lanes])
    state = state * _per_row(setup, s_decay.at[slot], state.shape)
    return state + _dot(setup, (_transposed(setup, s_ends.at[slot]), s_u))

  fetch(jnp.int32(0))
  plgpu.copy_gmem_to_smem(initial.at[row, head, :, columns], s_initial, loaded)
  plgpu.barrier_wait(loaded)
  state = lax.fori_loop(0, chunks, step, s_initial[...])
  if not keep:
    s_initial[...] = state
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(s_initial, out_2.at[row, head, :, columns])
  plgpu.wait_smem_to_gmem(0)


def _reverse_kernel(
  reads, erased, d_o, ends, scores, decay, d_after, d_states, d_u, d_state, *scratch, setup, chunks
):
  *slots, s_carry, s_d_u, s_whole, ready, loaded = scratch
  s_reads, s_erased, s_d_o, s_ends, s_scores, s_decay = slots
  row, head, tile = (lax.axis_index(x) for x in ('row', 'head', 'tile'))
  columns = pl.ds(tile * TILE, TILE)
  lanes = pl.ds(head * setup.size + tile * TILE, TILE)

  def fetch(i):
    n, slot = chunks - 1 - i, lax.rem(i, 2)
    at = (row, head, n)
    for source, target in (
      (reads.at[at], s_reads),
      (erased.at[at], s_erased),
      (d_o.at[row, pl.ds(n * CHUNK, CHUNK), lanes], s_d_o),
      (ends.at[at], s_ends),
      (scores.at[at], s_scores),
      (decay.at[at], s_decay),
    ):
      plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

  def step(i, carry):
    pl.when(i + 1 < chunks)(lambda: fetch(i + 1))
    n, slot = chunks - 1 - i, lax.rem(i, 2)
    plgpu.barrier_wait(ready.at[slot])
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    s_carry[...] = carry.astype(setup.operand)
    plgpu.commit_smem()
    given = s_d_o.at[slot]
    pulled = _dot(setup, (_transposed(setup, s_scores.at[slot]), given), (s_ends.at[slot], s_carry))
    s_d_u[...] = pulled.astype(setup.operand)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(s_carry, d_states.at[row, head, n, :, columns])
    plgpu.copy_smem_to_gmem(s_d_u, d_u.at[row, head, n, :, columns])
    carry = carry * _per_row(setup, s_decay.at[slot], carry.shape)
    return carry + _dot(
      setup,
      (_transposed(setup, s_reads.at[slot]), given),
      (_transposed(setup, s_erased.at[slot]), s_d_u),
    )

  fetch(jnp.int32(0))
  plgpu.copy_gmem_to_smem(d_after.at[row, head, :, columns], s_whole, loaded)
  plgpu.barrier_wait(loaded)
  carry = lax.fori_loop(0, chunks, step, s_whole[...])
  s_whole[...] = carry
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(s_whole, d_state.at[row, head, :, columns])
  plgpu.wait_smem_to_gmem(0)


def _gradient_kernel(
  q, k, v, gate_k, gate_v, high, low, inverse, states, u, d_states, d_u, d_o, *refs, setup
):
  d_q, d_k, d_v, d_g, d_gate_k, d_gate_v = refs[:6]
  s_q, s_k, s_gate, s_high, s_low = refs[6:11]
  s_state, s_d_state, s_u, s_d_x, s_d_o = refs[11:16]
  s_left_q, s_left_b, s_right, s_inverse = refs[16:20]
  s_d_p, s_d_l, s_d_p_t, s_d_l_t, s_d_g, first, second = refs[20:]
  row, head, chunk, tile = (lax.axis_index(x) for x in ('row', 'head', 'chunk', 'tile'))
  tokens, at = (row, pl.ds(chunk * CHUNK, CHUNK)), (row, head, chunk)
  key_head = lax.div(head, setup.group)
  of_key = (*tokens, pl.ds(key_head * setup.size + tile * TILE, TILE))
  of_head = (*tokens, pl.ds(head * setup.size + tile * TILE, TILE))
  of_value = (*tokens, pl.ds(head * setup.size, setup.size))
  channels = (*at, pl.ds(tile * TILE, TILE))
  for source, target in (
    (q.at[of_key], s_q),
    (k.at[of_key], s_k),
    (gate_k.at[of_head], s_gate),
    (high.at[of_head], s_high),
    (low.at[of_head], s_low),
    (inverse.at[at], s_inverse),
    (states.at[channels], s_state),
    (d_states.at[channels], s_d_state),
    (u.at[at], s_u),
    (d_u.at[at], s_d_x),
    (d_o.at[of_value], s_d_o),
  ):
    plgpu.copy_gmem_to_smem(source, target, first)
  plgpu.barrier_wait(first)

  operand = setup.operand
  t, s = _square(setup)
  log_decay = (s_high, s_low)
  for part in _tiles(setup):  # what was the gradient of U becomes minus that of X
    minus = -_dot(setup, (_transposed(setup, s_inverse), s_d_x.at[:, part]))
    s_d_x[:, part] = minus.astype(operand)
  plgpu.commit_smem()
  d_p = _dot(setup, (s_d_o, _transposed(setup, s_u)))
  diagonal = jnp.sum(jnp.where(t == s, d_p, 0), axis=1)
  s_d_p[...] = d_p.astype(operand)
  s_d_l[...] = _dot(setup, (s_d_x, _transposed(setup, s_u))).astype(operand)
  s_d_p_t[...] = _dot(setup, (s_u, _transposed(setup, s_d_o))).astype(operand)
  s_d_l_t[...] = _dot(setup, (s_u, _transposed(setup, s_d_x))).astype(operand)

  start = _decays(setup, s <= t, log_decay)
  d_queries = _dot(setup, (s_d_o, _transposed(setup, s_state))) * start
  d_b = _dot(setup, (s_d_x, _transposed(setup, s_state))) * start
  end = _decays(setup, s > t, log_decay)
  d_a = _dot(setup, (s_u, _transposed(setup, s_d_state))) * end
  for part in _tiles(setup):
    s_state[:, part] = (_load(s_state, part) * _load(s_d_state, part)).astype(operand)
  plgpu.commit_smem()
  everywhere = t >= 0
  ones = _zero_one(setup, everywhere)
  products = ((ones, _transposed(setup, s_state.at[:, part])) for part in _tiles(setup))
  s_d_g[...] = _decays(setup, everywhere, log_decay) * _dot(setup, *products)

  @pl.when(tile == 0)
  def _():
    plgpu.copy_gmem_to_smem(v.at[of_value], s_u, second)
    plgpu.copy_gmem_to_smem(gate_v.at[of_value], s_d_o, second)
    plgpu.barrier_wait(second)
    for part in _tiles(setup):
      d_x, gate = -_load(s_d_x, part), _load(s_d_o, part)
      s_d_o[:, part] = (d_x * _load(s_u, part)).astype(operand)
      s_d_x[:, part] = (d_x * gate).astype(operand)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(s_d_x, d_v.at[of_value])
    plgpu.copy_smem_to_gmem(s_d_o, d_gate_v.at[of_value])

  queries = lambda: setup.scale * _load(s_q)
  b = lambda: _load(s_gate) * _load(s_k)
  a = b if setup.symmetric else lambda: _load(s_k)

  def sum_over_time(mask, term):
    """Adds what gradients of log-decays [C, 64] mean for the tokens that are summed up in them."""
    s_left_q[...] = term.astype(operand)
    plgpu.commit_smem()
    s_d_g[...] += _dot(setup, (_zero_one(setup, mask), s_left_q))

  sum_over_time(t <= s, queries() * d_queries + b() * d_b)
  sum_over_time(t > s, a() * d_a)

  def level(i, sums):
    d_queries, d_b, d_a = sums
    half = lax.shift_left(1, i)
    factors, lower = _decays(setup, _level(t, s, half), log_decay), _lower(setup, half)
    s_left_q[...] = jnp.where(lower, queries() * factors, 0).astype(operand)
    s_left_b[...] = jnp.where(lower, b() * factors, 0).astype(operand)
    s_right[...] = jnp.where(lower, 0, a() * factors).astype(operand)
    plgpu.commit_smem()
    block, block_t = _block(t, s, half), _block(s, t, half)
    cut = lambda x, mask: jnp.where(mask, _load(x), 0).astype(operand)
    part = _dot(setup, (cut(s_d_p_t, block_t), s_left_q), (cut(s_d_l_t, block_t), s_left_b))
    part = jnp.where(lower, 0, part * factors)
    term, d_a = a() * part, d_a + part
    part = jnp.where(lower, _dot(setup, (cut(s_d_p, block), s_right)) * factors, 0)
    term, d_queries = term + queries() * part, d_queries + part
    part = jnp.where(lower, _dot(setup, (cut(s_d_l, block), s_right)) * factors, 0)
    term, d_b = term + b() * part, d_b + part
    sum_over_time(_level(s, t, half), term)
    return d_queries, d_b, d_a

  d_queries, d_b, d_a = lax.fori_loop(0, LEVELS, level, (d_queries, d_b, d_a))
  diagonal = _spread(diagonal, (CHUNK, TILE))
  d_queries += diagonal * a()
  d_a += diagonal * queries()
  d_gated = d_a + d_b if setup.symmetric else d_b
  d_keys = _load(s_gate) * d_gated if setup.symmetric else d_a + _load(s_gate) * d_b
  d_gate = _load(s_k) * d_gated
  s_q[...] = (setup.scale * d_queries).astype(operand)
  s_k[...] = d_keys.astype(operand)
  s_gate[...] = d_gate.astype(operand)
  plgpu.commit_smem()
  for source, target in ((s_q, d_q), (s_k, d_k), (s_d_g, d_g), (s_gate, d_gate_k)):
    plgpu.copy_smem_to_gmem(source, target.at[of_head])
  plgpu.wait_smem_to_gmem(0)


def _inverse(setup, lower, t, s, s_one, s_two):
  """(I + lower)^-1 [C, C] by halves, as in chunked.py; its products to about 16 bits."""

  def dot(x, y):
    (x, x_low), (y, y_low) = ((z.astype(setup.operand), _rest(setup, z)) for z in (x, y))
    s_one[...] = y
    s_two[...] = y_low
    plgpu.commit_smem()
    return _dot(setup, (x, s_one), (x_low, s_one), (x, s_two))

  def level(i, result):
    block = jnp.where(_block(t, s, lax.shift_left(1, i)), lower, 0)
    return result - dot(dot(result, block), result)

  result = jnp.where(t == s, 1.0, jnp.where(_block(t, s, 1), -lower, 0))
  return lax.fori_loop(1, LEVELS, level, result)


def _rest(setup, x):
  """What rounding x to an operand leaves, as an operand."""
  return (x - x.astype(setup.operand).astype(jnp.float32)).astype(setup.operand)


def _decays(setup, mask, log_decay, tile=slice(0, TILE)):
  """exp of the sums over s where mask [t, s] of a tile of the log-decays: [C, 64]."""
  matrix = _zero_one(setup, mask)
  return jnp.exp2(_dot(setup, *((matrix, x.at[:, tile]) for x in log_decay)))


def _dot(setup, *pairs):
  """Sum of products x y [rows, columns] float32; y in shared memory, x there or in registers."""
  if setup.interpret:
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32, precision='highest')
    return sum(product(x[...], y[...]) for x, y in pairs)

  def body(sums):
    for x, y in pairs:
      plgpu.wgmma(sums, x, y)
    return sums[...]

  shape = (pairs[0][0].shape[0], pairs[0][1].shape[1])
  return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))


def _transposed(setup, x):
  return x[...].T if setup.interpret else plgpu.transpose_ref(x, (1, 0))


def _load(x, columns=slice(None)):
  return x[:, columns].astype(jnp.float32)


def _spread(x, shape):
  """[rows] -> [rows, columns]."""
  return lax.broadcast_in_dim(x, shape, [0])


def _per_row(setup, x, shape):
  """Shared memory [rows] -> [rows, columns]."""
  if setup.interpret:
    return _spread(x[...], shape)
  return _spread(plgpu.load(x, (), layout=plgpu.Layout.WGMMA.reduce(1)), shape)


def _iota(setup, shape, dimension):
  if setup.interpret:
    return lax.broadcasted_iota(jnp.int32, shape, dimension)
  return plgpu.broadcasted_iota(jnp.int32, shape, dimension, layout=plgpu.Layout.WGMMA)


def _square(setup):
  """Row and column of every element of a [C, C] matrix."""
  return (_iota(setup, (CHUNK, CHUNK), i) for i in (0, 1))


def _lower(setup, half):
  """[C, 64]: rows of the second halves of pairs of halves."""
  return _iota(setup, (CHUNK, TILE), 0) & half != 0


def _level(t, s, half):
  """Whether t's decay at a level spans token s: those between t and the border of its halves.

  The border is before the first row of the second half; there t itself is included. Here and below
  rows give bounds that columns meet, since whole matrices that no level changes, t ^ s or s <= t,
  would be kept in registers.
  """
  start, second = t & -half, t & half != 0
  first, last = jnp.where(second, start, t + 1), jnp.where(second, t, start + half - 1)
  return (s >= first) & (s <= last)


def _block(t, s, half):
  """The lower left blocks of pairs of halves: t in a second half, s in the first before it."""
  first = jnp.where(t & half != 0, (t & -half) - half, CHUNK)
  return (s >= first) & (s < first + half)


def _zero_one(setup, mask):
  return jnp.where(mask, 1.0, 0.0).astype(setup.operand)


def _tiles(setup):
  return [slice(i, i + TILE) for i in range(0, setup.size, TILE)]
