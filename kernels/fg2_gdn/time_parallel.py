"""The recurrence with T split over the devices of a mesh axis: sequence parallelism, in shard_map.

B rows, T tokens of a device, H value heads, K key channels, V value channels, N devices. What the
tokens of a device do to a state is S -> A S + R: one pass over them with V + K value channels, the
added ones writing nothing and starting from the identity, gives R and A. All devices gather all
pairs, [N, B, H, K, V + K], fold those before them into the state they start from, and run their
tokens again from there. So each device computes about 3 times what its share of a single pass is,
and one gather is all they exchange; gradients take the same way back.
"""

import jax
import jax.numpy as jnp


def scan(run, tokens, state, segments, marks, axis):
  """Output of this device's tokens and the state after the last device's.

  Args:
    run: (tokens, state, valid, fresh) -> output, final state, on one device.
    tokens: q, k, v, g, gate_k, gate_v of this device, [B, T, ...].
    state: [B, H, K, V] before the first token of the first device.
    segments: [B, T] ids or None. marks: valid and fresh of this device alone, or (None, None).
    axis: name of the mesh axis that T is split over, in its order.
  """
  batch, heads, keys, values = state.shape
  q, k, v, g, gate_k, gate_v = tokens
  more = [(0, 0)] * 3 + [(0, keys)]
  wide = (
    q,
    k,
    jnp.pad(v, more),
    g,
    gate_k,
    gate_v if gate_v.shape[-1] == 1 else jnp.pad(gate_v, more),
  )
  identity = jnp.broadcast_to(jnp.eye(keys, dtype=state.dtype), (batch, heads, keys, keys))
  start = jnp.concatenate([jnp.zeros_like(state), identity], axis=-1)
  _, effect = run(wide, start, *marks)
  keep = jnp.ones((batch,), bool) if segments is None else _continues(segments, axis)
  effects, keeps = jax.lax.all_gather((effect, keep), axis)

  mine = jnp.zeros_like(state)
  for device in range(effects.shape[0]):
    state = jnp.where(keeps[device, :, None, None, None], state, 0)
    mine = jnp.where(jax.lax.axis_index(axis) == device, state, mine)
    added, passed = jnp.split(effects[device], [values], axis=-1)
    state = added + jnp.einsum('bhkc,bhcv->bhkv', passed, state, precision='highest')
  return run(tokens, mine, *marks)[0], state


def _continues(segments, axis):
  """Whether what comes before goes on in this device's first segment: [B] bool; yes without one."""
  valid = segments != 0
  rows = jnp.arange(segments.shape[0])
  some = valid.any(axis=1)
  first = segments[rows, jnp.argmax(valid, axis=1)]
  last = segments[rows, segments.shape[1] - 1 - jnp.argmax(valid[:, ::-1], axis=1)]
  somes, lasts = jax.lax.all_gather((some, last), axis)
  found, before = jnp.zeros_like(some), jnp.zeros_like(last)
  for device in range(somes.shape[0]):
    earlier = somes[device] & (device < jax.lax.axis_index(axis))
    found, before = found | earlier, jnp.where(earlier, lasts[device], before)
  return ~some | ~found | (first == before)
