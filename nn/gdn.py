"""The linear-attention mixer: Gated DeltaNet, KDA, FG2-GDN, FG2-GDN+ and GDN-2.

q, k and v go through a short causal convolution and SiLU, q and k are L2-normalised, the recurrence
of kernels/fg2_gdn runs, and its output is normalised per head and gated. There are no positions in
it. What differs between the values of `model.gdn.variant`:

            log-decay     learning rate              output gate
  gdn       per head      beta per head              SiLU, full rank        (arXiv:2412.06464)
  kda       per channel   beta per head              sigmoid, low rank      (arXiv:2510.26692)
  fg2       per channel   per channel, one           as kda                 (arXiv:2604.19021)
  fg2_plus  per channel   per channel, two: k and v  as kda                 (the same)
  gdn2      per channel   erase and write            as kda                 (arXiv:2605.22791)

How FG2's learning rates come from x is our reading: full-rank projections with a bias that begins
at 0.

B rows, T positions, D model width, Hk key heads, Hv value heads, K key channels, V value channels,
W tokens the convolution sees, R rank.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels import fg2_gdn as kernel
from nn import cache, norm, param
from nn.config import ModelConfig
from nn.linear import linear
from nn.param import Spec

# state [B, Hv, K, V] float32, and per stream the last W - 1 inputs of its convolution
# [B, W - 1, H, K or V] in the compute dtype, 0 where they are of another segment.
State = dict[str, jax.Array]

STREAMS = ('q', 'k', 'v')
CHUNK = 64                             # tokens of a chunk that FLOPs are counted for, everywhere


def specs(cfg: ModelConfig) -> dict[str, Spec]:
  heads, key_heads, key, value = cfg.gdn_sizes
  g = cfg.gdn
  sizes = {'embed': cfg.embed_dim, 'heads': heads, 'kv_heads': key_heads, 'key_dim': key,
           'value_dim': value}
  query, values = ('kv_heads', 'key_dim'), ('heads', 'value_dim')

  def projection(name, out, rank=0):
    if not rank:
      return {name: param.matrix(sizes, ('embed', *out), contract=('embed',))}
    low = sizes | {'rank': rank}
    return {f'{name}_down': param.matrix(low, ('embed', 'rank'), contract=('embed',)),
            f'{name}_up': param.matrix(low, ('rank', *out), contract=('rank',))}

  def convolution(out):
    return Spec((g.conv, *(sizes[a] for a in out)), ('conv', *out), param.normal(g.conv ** -0.5))

  def bias(out, init=param.zeros):
    return Spec(tuple(sizes[a] for a in out), out, init)

  table = projection('q', query) | projection('k', query) | projection('v', values)
  table |= {f'{name}_conv': convolution(out) for name, out in zip(STREAMS, (query, query, values))}
  out = ('heads',) if g.variant == 'gdn' else ('heads', 'key_dim')
  rank = value if g.decay_rank < 0 else g.decay_rank
  table |= projection('decay', out, 0 if g.variant == 'gdn' else rank)
  table |= {'decay_log': bias(('heads',), functools.partial(_decay_log, cfg)),
            'decay_bias': bias(out, _time_step)}
  if g.variant in ('gdn', 'kda'):
    table |= projection('beta', ('heads',))
  else:
    gates = {'beta_k': ('heads', 'key_dim'), **({} if g.variant == 'fg2' else {'beta_v': values})}
    for name, out in gates.items():
      table |= projection(name, out, g.beta_rank)
      if g.variant != 'gdn2':
        table[f'{name}_bias'] = bias(out)
  rank = (0 if g.variant == 'gdn' else value) if g.gate_rank < 0 else g.gate_rank
  table |= projection('gate', values, rank)
  table |= {'norm': bias(('value_dim',), param.ones)}
  return table | {
      'o': param.matrix(sizes, ('heads', 'value_dim', 'embed'), contract=('heads', 'value_dim'),
                        scale=(2 * len(cfg.layers)) ** -0.5)}


def apply(
    params: dict, cfg: ModelConfig, x: jax.Array, positions: jax.Array, segments: jax.Array,
) -> jax.Array:
  """The mixer over whole rows: [B, T, D], [B, T], [B, T] -> [B, T, D].

  Every segment begins with an empty state. Padding comes before, after or between segments, not
  inside one: the convolution counts slots.
  """
  del positions
  return _run(params, cfg, x, segments, None)[0]


def init_cache(cfg: ModelConfig, num_rows: int, length: int) -> State:
  del length                           # nothing here grows with it
  heads, key_heads, key, value = cfg.gdn_sizes
  inputs = {'q': ('kv_heads', key_heads, key), 'k': ('kv_heads', key_heads, key),
            'v': ('heads', heads, value)}
  empty = lambda *sizes, dtype=cfg.dtype: jnp.zeros((num_rows, *sizes), dtype)
  state = {
      name: param.constrain(empty(cfg.gdn.conv - 1, *sizes), cfg.rules, 'batch', None, axis, None)
      for name, (axis, *sizes) in inputs.items()}
  whole = empty(heads, key, value, dtype=jnp.float32)
  return state | {'state': param.constrain(whole, cfg.rules, 'batch', 'heads', None, None)}


def prefill(
    params: dict, cfg: ModelConfig, x: jax.Array, positions: jax.Array, segments: jax.Array,
    state: State, at: cache.Place,
) -> tuple[jax.Array, State]:
  """`apply` going on from a state in each row's first segment, and the state after the last one."""
  del positions
  before = {name: cache.read(a, at) for name, a in state.items()}
  y, after = _run(params, cfg, x, segments, before)
  return y, _write(state, after, at)


def step(
    params: dict, cfg: ModelConfig, x: jax.Array, position: jax.Array, valid: jax.Array,
    index: jax.Array, state: State, at: cache.Place,
) -> tuple[jax.Array, State]:
  """One token of every row: [B, D] -> [B, D]. It goes on in the segment that the state is from."""
  del position, valid, index
  before = {name: cache.read(a, at) for name, a in state.items()}
  after, streams = {}, []
  for name in STREAMS:
    window = jnp.concatenate([before[name], linear(x, params[name])[:, None]], axis=1)
    after[name] = window[:, 1:]
    streams.append(_silu(
        jnp.einsum('bwhk,whk->bhk', window.astype(jnp.float32), params[f'{name}_conv']), x.dtype))
  q, k, v = _unit(streams[0]), _unit(streams[1]), streams[2]
  one = {'gdn': kernel.kda_step, 'kda': kernel.kda_step, 'gdn2': kernel.gdn2_step}
  heads, after['state'] = one.get(cfg.gdn.variant, kernel.fg2_gdn_step)(
      q, k, v, _log_decay(params, cfg, x), *_rates(params, cfg, x), before['state'])
  return _output(params, cfg, x, heads), _write(state, after, at)


def flops(cfg: ModelConfig, length: int) -> int:
  """FLOPs of the forward pass, per token: projections and the recurrence in chunks of 64 tokens."""
  del length
  heads, _, key, value = cfg.gdn_sizes
  return param.matmul_flops(specs(cfg)) + heads * (6 * key * value + 3 * CHUNK * key + CHUNK**2)


def warm_start(params: dict, cfg: ModelConfig, variant: str) -> tuple[dict, ModelConfig]:
  """A gdn or kda layer as a layer of a finer variant that computes the same function, exactly.

  Every learning rate and decay per head is copied to all channels (spec of FG2: beta equal over
  channels is KDA).

  Args:
    params: of the layer, or of several with a leading axis; the tree of `specs`.
    cfg: of the model the layer is from.
    variant: what the layer shall be: kda, fg2, fg2_plus or gdn2.

  Returns:
    The parameters, and the model's config with `gdn` changed to fit them.

  Raises:
    ValueError: a variant that the layer's is no special case of; fg2 where K and V differ.
  """
  order = ('gdn', 'kda', 'fg2', 'fg2_plus', 'gdn2')
  old = cfg.gdn
  if old.variant not in ('gdn', 'kda') or variant not in order[order.index(old.variant):]:
    raise ValueError(f'a layer of variant {old.variant!r} has no exact form as {variant!r}; '
                     'gdn can become kda, and both can become fg2, fg2_plus or gdn2')
  if variant == old.variant:
    return params, cfg
  heads, _, key, value = cfg.gdn_sizes
  copies = lambda a, n: jnp.repeat(a[..., None], n, axis=-1)
  params, rank, gate_rank = dict(params), old.decay_rank, old.gate_rank
  if old.variant == 'gdn':
    params |= {name: copies(params[name], key) for name in ('decay', 'decay_bias')}
    rank, gate_rank = 0, max(old.gate_rank, 0)
  if variant != 'kda':
    beta = params.pop('beta')
    for name, channels in {
        'beta_k': key, **({} if variant == 'fg2' else {'beta_v': value})}.items():
      params[name] = copies(beta, channels)
      if variant != 'gdn2':
        params[f'{name}_bias'] = jnp.zeros((*beta.shape[:-2], heads, channels), beta.dtype)
  gate = old.gate or ('silu' if old.variant == 'gdn' else 'sigmoid')
  new = dataclasses.replace(
      old, variant=variant, decay_rank=rank, gate_rank=gate_rank, beta_rank=0, gate=gate)
  return params, dataclasses.replace(cfg, gdn=new)


def _run(params, cfg, x, segments, before):
  """[B, T, D], and the state after the last segment; before: a state or None."""
  after, streams = {}, []
  for name in STREAMS:
    inputs = linear(x, params[name])
    inputs = param.constrain(
        inputs, cfg.rules, 'batch', 'time', 'heads' if name == 'v' else 'kv_heads', None)
    y, after[name] = _convolve(
        inputs, params[f'{name}_conv'], segments, None if before is None else before[name])
    streams.append(y)
  q, k, v = _unit(streams[0]), _unit(streams[1]), streams[2]
  arrays = q, k, v, _log_decay(params, cfg, x), *_rates(params, cfg, x)
  heads, after['state'] = _recur(cfg, arrays, segments, None if before is None else before['state'])
  return _output(params, cfg, x, heads), after


def _convolve(x, weight, segments, before):
  """SiLU of the causal convolution of every channel with the last W tokens of its segment.

  Args:
    x: [B, T, H, K].
    weight: [W, H, K], the present token's last.
    before: [B, W - 1, H, K], what comes before the first segment of each row; None: nothing.

  Returns:
    [B, T, H, K], and the last W - 1 inputs of the last segment.
  """
  length, history = x.shape[1], weight.shape[0] - 1
  if before is None:
    before = jnp.zeros((x.shape[0], history, *x.shape[2:]), x.dtype)
  inputs = jnp.concatenate([before, x], axis=1)
  # What was before belongs to the segment that the row begins with.
  ids = jnp.concatenate([jnp.repeat(segments[:, :1], history, axis=1), segments], axis=1)
  y = 0
  for i in range(history + 1):
    same = ids[:, i:i + length] == segments
    y += (jnp.where(same[..., None, None], inputs[:, i:i + length], 0).astype(jnp.float32)
          * weight[i])

  # One past the last token.
  end = jnp.max(jnp.where(segments != 0, jnp.arange(1, length + 1), 0), axis=1)
  last = end[:, None] + jnp.arange(history)
  kept = jnp.take_along_axis(inputs, last[..., None, None], axis=1)
  here = (jnp.take_along_axis(ids, last, axis=1)
          == jnp.take_along_axis(ids, end[:, None] + history - 1, axis=1))
  return _silu(y, x.dtype), jnp.where(here[..., None, None], kept, 0)


def _log_decay(params, cfg, x):
  """g [..., Hv] or [..., Hv, K] float32, in nats per token, at most 0."""
  g = _project(params, 'decay', x).astype(jnp.float32) + params['decay_bias']
  rate = jnp.exp(params['decay_log'])
  rate = rate if cfg.gdn.variant == 'gdn' else rate[:, None]
  if cfg.gdn.lower_bound:
    return cfg.gdn.lower_bound * jax.nn.sigmoid(rate * g)
  return -rate * jax.nn.softplus(g)


def _rates(params, cfg, x):
  """Learning rates as kernels take them, float32: beta; its root per channel; erase and write."""
  scale = 2.0 if cfg.gdn.negative else 1.0
  logits = lambda name: (
      _project(params, name, x).astype(jnp.float32) + params.get(f'{name}_bias', 0))
  if cfg.gdn.variant in ('gdn', 'kda'):
    return (scale * jax.nn.sigmoid(logits('beta')),)
  if cfg.gdn.variant == 'gdn2':        # only what is erased is doubled
    return scale * jax.nn.sigmoid(logits('beta_k')), jax.nn.sigmoid(logits('beta_v'))
  # The slope of sqrt(sigmoid(z)) written out would be infinite where the sigmoid is 0.
  root = lambda name: math.sqrt(scale) * jnp.exp(0.5 * jax.nn.log_sigmoid(logits(name)))
  return root('beta_k'), (None if cfg.gdn.variant == 'fg2' else root('beta_v'))


def _recur(cfg, arrays, segments, state):
  """The kernel on every device's own rows, heads and stretch of time.

  Returns:
    o [B, T, Hv, V], state [B, Hv, K, V].
  """
  ops = {'gdn': kernel.gdn, 'kda': kernel.kda, 'gdn2': kernel.gdn2}
  run = functools.partial(
      ops.get(cfg.gdn.variant, kernel.fg2_gdn), implementation=cfg.gdn.implementation,
      chunk_size=cfg.gdn.chunk or None)
  if jax.sharding.get_abstract_mesh().size <= 1:
    return run(*arrays, initial_state=state, segment_ids=segments)

  q, k, v, *gates = arrays
  split = functools.partial(param.mesh_axes, cfg.rules)
  rows, heads, time = (
      split('batch', q.shape[0]), split('heads', v.shape[2]), split('time', q.shape[1]))
  if len(time) > 1:
    raise ValueError(f'model.rules.time is {time}; the recurrence can be split over one mesh axis')
  if split('kv_heads', q.shape[2]) != heads:     # a device's value heads may need any key head
    q, k = (jnp.repeat(a, v.shape[2] // a.shape[2], axis=2) for a in (q, k))
  if state is None:
    state = jnp.zeros((q.shape[0], v.shape[2], k.shape[3], v.shape[3]), jnp.float32)
  shared = [i for i, a in enumerate(gates) if a is None]
  gates = [a for a in gates if a is not None]
  tokens, whole = (PartitionSpec(rows or None, time or None, heads or None),
                   PartitionSpec(rows or None, heads or None))

  def local(q, k, v, gates, state, segments):
    gates = list(gates)
    for i in shared:
      gates.insert(i, None)
    return run(q, k, v, *gates, initial_state=state, segment_ids=segments,
               time_axis=time[0] if time else None)

  return jax.shard_map(
      local, check_vma=False,
      in_specs=(tokens, tokens, tokens, tokens, whole, PartitionSpec(rows or None, time or None)),
      out_specs=(tokens, whole))(q, k, v, gates, state, segments)


def _output(params, cfg, x, heads):
  """[..., Hv, V] -> [..., D]: normalised per head, gated by x, projected."""
  gate = cfg.gdn.gate or ('silu' if cfg.gdn.variant == 'gdn' else 'sigmoid')
  gated = norm.rms_norm(heads.astype(jnp.float32), params['norm'], cfg.gdn.norm_eps)
  gated *= getattr(jax.nn, gate)(_project(params, 'gate', x).astype(jnp.float32))
  return linear(gated.astype(x.dtype), params['o'], 2)


def _project(params, name, x):
  """x by a projection of full or low rank."""
  if name in params:
    return linear(x, params[name])
  return linear(linear(x, params[f'{name}_down']), params[f'{name}_up'])


def _unit(x):
  """x [..., K] over its length."""
  x32 = x.astype(jnp.float32)
  return (x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def _silu(x, dtype):
  return jax.nn.silu(x).astype(dtype)


def _write(state, after, at):
  return {name: cache.write(a, after[name].astype(a.dtype), (0,) * after[name].ndim, at)
          for name, a in state.items()}


def _decay_log(cfg, key, shape):
  """log A with A uniform up to 16 (from 1, for gdn from 0); 0 where the decay is bounded."""
  if cfg.gdn.lower_bound:
    return jnp.zeros(shape)
  low = 1e-4 if cfg.gdn.variant == 'gdn' else 1.0
  return jnp.log(jax.random.uniform(key, shape, minval=low, maxval=16.0))


def _time_step(key, shape):
  """softplus of it is log-uniform in [0.001, 0.1]."""
  step = jnp.exp(jax.random.uniform(key, shape, minval=math.log(1e-3), maxval=math.log(0.1)))
  return step + jnp.log(-jnp.expm1(-step))
