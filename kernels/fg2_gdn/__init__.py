"""FG2-GDN, the gated delta rule with a learning rate per channel, and GDN, KDA and GDN-2.

B rows, T tokens, Hk key heads, Hv value heads (a multiple of Hk), K key channels, V value channels.
Value head h reads key head h // (Hv // Hk). Per value head the state S [K, V] follows (products of
vectors channel by channel)

  F_t = Diag(exp(g_t)) S_{t-1}         decay
  u_t = x_t - F_t^T b_t                what of x_t the decayed state does not answer to b_t
  S_t = F_t + a_t u_t^T                write
  o_t = scale S_t^T q_t                read

              a_t          b_t          x_t
  fg2_gdn     gate_k k     gate_k k     gate_v v      gates: sqrt(beta), per channel
  gdn, kda    k            beta k       beta v        beta per head; decay per head, per channel
  gdn2        k            erase k      write v       (arXiv:2605.22791)

fg2_gdn with gate_v given is FG2-GDN+ (arXiv:2604.19021), without it FG2-GDN. The step (I - a b^T)
Diag(exp(g)) is a contraction for fg2_gdn whenever |gate_k k|^2 <= 2.

Implementations: `reference` (the definition), `chunked` (XLA, every platform), `pallas_tpu`, and
`pallas_gpu`, which auto leaves alone: its values are checked by an interpreter, its code by the
compiler for an H200, but no GPU has run it yet.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.fg2_gdn import chunked, pallas_gpu, pallas_tpu, reference, time_parallel

IMPLEMENTATIONS = ('reference', 'chunked', 'pallas_tpu', 'pallas_gpu')
PLATFORM = {'pallas_tpu': 'tpu', 'pallas_gpu': 'gpu'}  # where one runs; the others run everywhere
AUTO = {'cpu': 'chunked', 'gpu': 'chunked', 'tpu': 'pallas_tpu'}  # platform -> implementation
# Tokens of a chunk by platform. CPU: the fastest of 8 to 64 at K = V = 32, 64 and 128. TPU: by
# static bundles per token, benchmarks/fg2_gdn_tpu.py.
CHUNK = {'cpu': 16, 'gpu': 64, 'tpu': 64}
HEADS = 4  # value heads of a grid step of pallas_tpu, likewise
# Numbers in one of chunked's temporaries. On CPU one fits the L2 cache; elsewhere larger ones cost
# memory only.
BLOCK = {'cpu': 2**16, 'gpu': 2**22, 'tpu': 2**22}
# Tokens at least between two of the states that chunked keeps for its backward pass.
BORDER = 64


def fg2_gdn(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  g: jax.Array,
  gate_k: jax.Array,
  gate_v: jax.Array | None = None,
  *,
  initial_state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  scale: float | None = None,
  chunk_size: int | None = None,
  implementation: str = 'auto',
  time_axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The recurrence at the top of this file with a = b = gate_k k and x = gate_v v, over whole rows.

  Args:
    q: [B, T, Hk, K].
    k: [B, T, Hk, K]; L2-normalise it before, not after, gating.
    v: [B, T, Hv, V].
    g: [B, T, Hv, K] or [B, T, Hv], log-decay in nats, at most 0; no lower bound.
    gate_k: [B, T, Hv, K] or [B, T, Hv], sqrt of the erase strength, in [0, sqrt(2)].
    gate_v: [B, T, Hv, V] or [B, T, Hv], sqrt of the write strength; None: gate_k, which per channel
      needs K = V.
    initial_state: [B, Hv, K, V] float32, carried into the first segment of each row; None: zeros.
    segment_ids: [B, T] integers; the state starts at 0 in every segment but a row's first. 0 is
      padding: it leaves the state alone, its output is 0, and what its tokens hold (if finite) has
      no influence. None: a row is one segment.
    scale: what o is multiplied by; None: 1 / sqrt(K).
    chunk_size: tokens of a chunk, a power of two from 2; None: chosen by platform. The reference
      has no chunks; those of pallas_gpu have 64 tokens.
    implementation: auto, or one of IMPLEMENTATIONS.
    time_axis: inside shard_map, the mesh axis that T is split over, see time_parallel.py. The final
      state is then the whole row's, on every device.

  Returns:
    o [B, T, Hv, V] in v's dtype, and the state after the last segment of each row, [B, Hv, K, V]
    float32. States and all sums are float32 (float64 for float64 inputs).
  """
  if gate_v is None:
    if gate_k.ndim == 4 and k.shape[-1] != v.shape[-1]:
      raise ValueError(
        f'gate_v is None, which ties it to gate_k per channel, but k has {k.shape[-1]} channels '
        f'and v {v.shape[-1]}'
      )
    gate_v = gate_k
  gates = {'gate_k': gate_k, 'gate_v': gate_v}
  checked = _check(
    q, k, v, g, gates, 2**0.5, initial_state, segment_ids, scale, chunk_size, implementation
  )
  return _scan(*checked, segment_ids, time_axis, symmetric=True)


def kda(
  q,
  k,
  v,
  g,
  beta,
  *,
  initial_state=None,
  segment_ids=None,
  scale=None,
  chunk_size=None,
  implementation='auto',
  time_axis=None,
):
  """Kimi Delta Attention (arXiv:2510.26692): fg2_gdn but beta [B, T, Hv] in [0, 2], not its root.

  g is [B, T, Hv, K].
  """
  _check_dimensions('g', g, 4)
  _check_dimensions('beta', beta, 3)
  gates = {'beta': beta, 'beta of v': beta}
  checked = _check(
    q, k, v, g, gates, 2.0, initial_state, segment_ids, scale, chunk_size, implementation
  )
  return _scan(*checked, segment_ids, time_axis, symmetric=False)


def gdn(
  q,
  k,
  v,
  g,
  beta,
  *,
  initial_state=None,
  segment_ids=None,
  scale=None,
  chunk_size=None,
  implementation='auto',
  time_axis=None,
):
  """Gated DeltaNet (arXiv:2412.06464): kda, but g is one decay per head, [B, T, Hv]."""
  _check_dimensions('g', g, 3)
  _check_dimensions('beta', beta, 3)
  gates = {'beta': beta, 'beta of v': beta}
  checked = _check(
    q, k, v, g, gates, 2.0, initial_state, segment_ids, scale, chunk_size, implementation
  )
  return _scan(*checked, segment_ids, time_axis, symmetric=False)


def gdn2(
  q,
  k,
  v,
  g,
  erase,
  write,
  *,
  initial_state=None,
  segment_ids=None,
  scale=None,
  chunk_size=None,
  implementation='auto',
  time_axis=None,
):
  """Gated DeltaNet-2 (arXiv:2605.22791): fg2_gdn but erase scales b only, and write x.

  erase is [B, T, Hv, K], write [B, T, Hv, V], both in [0, 2].
  """
  _check_dimensions('erase', erase, 4)
  _check_dimensions('write', write, 4)
  gates = {'erase': erase, 'write': write}
  checked = _check(
    q, k, v, g, gates, 2.0, initial_state, segment_ids, scale, chunk_size, implementation
  )
  return _scan(*checked, segment_ids, time_axis, symmetric=False)


def fg2_gdn_step(q, k, v, g, gate_k, gate_v, state, *, scale=None):
  """fg2_gdn for one token: its arguments without T -> o [B, Hv, V], state [B, Hv, K, V]."""
  return _step(q, k, v, g, gate_k, gate_k if gate_v is None else gate_v, state, True, scale)


def kda_step(q, k, v, g, beta, state, *, scale=None):
  """kda, and with g [B, Hv] gdn, for one token -> o [B, Hv, V], state [B, Hv, K, V]."""
  return _step(q, k, v, g, beta, beta, state, False, scale)


def gdn2_step(q, k, v, g, erase, write, state, *, scale=None):
  """gdn2 for one token: its arguments without T -> o [B, Hv, V], state [B, Hv, K, V]."""
  return _step(q, k, v, g, erase, write, state, False, scale)


def platform() -> str:
  """cpu, tpu or gpu: of the ambient mesh, which need not be here to be compiled for, or ours."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def choose(on: str, dtype=jnp.float32) -> str:
  """The implementation that 'auto' stands for on a platform; kernels take bfloat16 and float32."""
  return AUTO[on] if jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32) else 'chunked'


def _scan(tokens, state, run, segments, time_axis, *, symmetric):
  """What `_check` returned -> output and final state."""
  run = functools.partial(run, symmetric=symmetric)
  marks = (None, None) if segments is None else _marks(segments)
  if time_axis is None:
    return run(tokens, state, *marks)
  return time_parallel.scan(run, tokens, state, segments, marks, time_axis)


def _check(q, k, v, g, gates, limit, state, segments, scale, chunk, implementation):
  """All token arrays with channels, the state, and `_run` bound to its choices; or an error."""
  batch, length, heads, width = _check_shapes(q, k, v, g, gates)
  on = platform()
  if implementation == 'auto':
    implementation = choose(on, q.dtype)
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f'implementation is {implementation!r}, wanted auto or one of {", ".join(IMPLEMENTATIONS)}'
    )
  if PLATFORM.get(implementation, on) != on:
    raise ValueError(
      f'implementation {implementation!r} runs on {PLATFORM[implementation]}, not on {on}'
    )
  smallest = 16 if implementation == 'pallas_tpu' else 2
  if chunk is not None and (chunk < smallest or chunk & (chunk - 1)):
    raise ValueError(f'chunk_size is {chunk}, wanted a power of two, at least {smallest}')
  if implementation == 'pallas_tpu' and q.dtype not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f'q has dtype {q.dtype}; pallas_tpu takes bfloat16 and float32')
  if implementation == 'pallas_gpu':
    _check_gpu(q, v, chunk)
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  shape = (batch, heads, k.shape[-1], width)
  if state is None:
    state = jnp.zeros(shape, dtype)
  elif state.shape != shape:
    raise ValueError(
      f'initial_state has shape {state.shape}, wanted {shape}: rows, value heads, K, V'
    )
  if segments is not None and segments.shape != (batch, length):
    raise ValueError(
      f'segment_ids has shape {segments.shape}, wanted {(batch, length)}: rows, tokens'
    )
  _check_values(g, gates, limit)

  scale = k.shape[-1] ** -0.5 if scale is None else scale
  tokens = (q, k, v, *(x if x.ndim == 4 else x[..., None] for x in (g, *gates.values())))
  chunk = min(chunk or CHUNK[on], max(smallest, 1 << (length - 1).bit_length()))
  run = functools.partial(_run, implementation, on, scale, chunk)
  return tokens, state.astype(dtype), run


def _run(implementation, on, scale, chunk, tokens, state, valid, fresh, *, symmetric):
  """reference.scan by an implementation; valid and fresh may be None."""
  batch, length = tokens[0].shape[:2]
  if implementation == 'reference':
    if valid is None:
      valid, fresh = jnp.ones((batch, length), bool), jnp.zeros((batch, length), bool)
    return reference.scan(*tokens, state, valid, fresh, symmetric=symmetric, scale=scale)
  if implementation == 'pallas_tpu':
    return pallas_tpu.scan(
      *tokens, state, valid, fresh, symmetric=symmetric, scale=scale, chunk=chunk, heads=HEADS
    )

  if implementation == 'pallas_gpu':
    return pallas_gpu.scan(*tokens, state, valid, fresh, symmetric=symmetric, scale=scale)

  wanted = -(-length // chunk)
  temporary = batch * state.shape[1] * chunk * max(state.shape[2:])
  chunks = max(1, BORDER // chunk, BLOCK[on] // temporary)
  blocks = -(-wanted // chunks)
  chunks = -(-wanted // blocks)
  fill = blocks * chunks * chunk - length
  pad = lambda x: jnp.pad(x, [(0, 0), (0, fill)] + [(0, 0)] * (x.ndim - 2))
  marks = (None, None) if valid is None else (pad(valid), pad(fresh))
  o, state = chunked.scan(symmetric, scale, chunk, chunks, *map(pad, tokens), state, *marks)
  return o[:, :length], state


def _step(q, k, v, g, gate_k, gate_v, state, symmetric, scale):
  whole = [x[:, None] for x in (q, k, v, g, gate_k, gate_v)]
  batch, _, heads, width = _check_shapes(
    *whole[:4], {'the gate of k': whole[4], 'the gate of v': whole[5]}
  )
  if state.shape != (batch, heads, k.shape[-1], width):
    raise ValueError(
      f'state has shape {state.shape}, wanted {(batch, heads, k.shape[-1], width)}: '
      'rows, value heads, K, V'
    )
  g, gate_k, gate_v = (x if x.ndim == 3 else x[..., None] for x in (g, gate_k, gate_v))
  arrays = [x.astype(state.dtype) for x in (q, k, v, g, gate_k, gate_v)]
  scale = k.shape[-1] ** -0.5 if scale is None else scale
  o, state = reference.step(*arrays, state, symmetric=symmetric, scale=scale)
  return o.astype(v.dtype), state


def _marks(segments):
  """Which tokens are not padding, and which of them begin another segment: [B, T] bool."""
  valid = segments != 0
  last = jax.lax.cummax(jnp.where(valid, jnp.arange(segments.shape[1]), -1), axis=1)
  last = jnp.pad(last[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
  before = jnp.take_along_axis(segments, jnp.maximum(last, 0), axis=1)
  return valid, valid & (last >= 0) & (segments != before)


def _check_gpu(q, v, chunk):
  if q.dtype != jnp.bfloat16:
    raise ValueError(f'q has dtype {q.dtype}; pallas_gpu takes bfloat16')
  if chunk not in (None, pallas_gpu.CHUNK):
    raise ValueError(f'chunk_size is {chunk}; pallas_gpu has chunks of {pallas_gpu.CHUNK}')
  if max(q.shape[-1], v.shape[-1]) > pallas_gpu.CHANNELS:
    raise ValueError(
      f'q has {q.shape[-1]} channels and v {v.shape[-1]}; pallas_gpu takes at most '
      f'{pallas_gpu.CHANNELS}'
    )


def _check_dimensions(name, x, wanted):
  if x.ndim != wanted:
    raise ValueError(
      f'{name} has shape {x.shape}, wanted {wanted} dimensions: '
      f'rows, tokens, value heads{", channels" * (wanted - 3)}'
    )


def _check_shapes(q, k, v, g, gates):
  """B, T, Hv, V of arguments whose shapes fit each other."""
  for name, x in (('q', q), ('k', k), ('v', v)):
    if x.ndim != 4 or 0 in x.shape:
      raise ValueError(
        f'{name} has shape {x.shape}, wanted rows, tokens, heads, channels, none of them 0'
      )
  if q.shape != k.shape:
    raise ValueError(f'q has shape {q.shape} and k {k.shape}, wanted the same')
  if v.shape[:2] != k.shape[:2]:
    raise ValueError(f'v has shape {v.shape} and k {k.shape}: rows and tokens differ')
  if v.shape[2] % k.shape[2]:
    raise ValueError(
      f'v has {v.shape[2]} heads, which is not a multiple of the {k.shape[2]} heads of q and k'
    )
  heads = v.shape[:3]
  wanted = {'g': (g, k.shape[3])} | {
    name: (x, size) for (name, x), size in zip(gates.items(), (k.shape[3], v.shape[3]))
  }
  for name, (x, size) in wanted.items():
    if x.shape not in (heads, (*heads, size)):
      raise ValueError(f'{name} has shape {x.shape}, wanted {(*heads, size)} or {heads}')
  for name, x in {'q': q, 'k': k, 'v': v, 'g': g, **gates}.items():
    if not jnp.issubdtype(x.dtype, jnp.floating):
      raise ValueError(f'{name} has dtype {x.dtype}, wanted floats')
  return *heads, v.shape[3]


def _check_values(g, gates, limit):
  """With jax_enable_checks: g at most 0, gates in [0, limit]; in jit, when the values exist."""
  if not jax.config.jax_enable_checks:
    return
  limit = limit * (1 + 2**-7)  # a gate formed in bfloat16 may be rounded up
  for name, x, low, high in (
    ('g', g, -np.inf, 0.0),
    *((name, x, 0.0, limit) for name, x in gates.items()),
  ):
    check = functools.partial(_check_range, name, low, high)
    if isinstance(x, jax.core.Tracer):
      jax.debug.callback(check, jnp.min(x), jnp.max(x))
    else:
      check(jnp.min(x), jnp.max(x))


def _check_range(name, low, high, smallest, largest):
  if not (smallest >= low and largest <= high):
    raise ValueError(f'{name} has values from {smallest} to {largest}, wanted {low} to {high}')
