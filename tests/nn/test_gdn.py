"""The linear-attention mixer alone and in hybrid stacks.

By hand, packed, padded, streamed, sharded, warm-started.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import nn_tiny as tiny
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nn import gdn, model, param, score
from nn.config import GDN
from nn.types import LOGP

VARIANTS = ('gdn', 'kda', 'fg2', 'fg2_plus', 'gdn2')
HYBRID = dict(pattern=('gdn', 'attention'), rope_theta=0.0)


def config(variant='fg2_plus', **options):
  """Two key heads, four value heads, K = 4; V differs from it where the variant lets it.

  Short chunks compile fast.
  """
  sizes = dict(
      num_heads=4, num_key_heads=2, key_dim=4, value_dim=4 if variant == 'fg2' else 6, chunk=4)
  model_options = {
      name: options.pop(name) for name in list(options) if name not in GDN.__dataclass_fields__}
  layers = dict(head=(), repeats=1, pattern=('gdn',)) | model_options
  return tiny.config(gdn=GDN(variant=variant, **(sizes | options)), **layers)


def layer(cfg, seed=0):
  return tiny.params(cfg, seed)['blocks']['0']['mixer']


def single(cfg, seed=0):
  """The parameters of one layer, without the axis of repeats."""
  return jax.tree.map(lambda a: a[0], layer(cfg, seed))


def draw(*shape, seed=1):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@functools.partial(jax.jit, static_argnums=1)
def run(params, cfg, x, segments, state):
  return gdn.prefill(params, cfg, x, None, segments, state, None)


@functools.partial(jax.jit, static_argnums=1)
def logp_and_grad(params, cfg, rows, weights):
  """logp [B, T], and the gradient of its weighted sum."""
  def loss(params):
    logp = score.score(params, cfg, tiny.forward(params, cfg, rows), rows, (LOGP,))[LOGP]
    return jnp.sum(weights * logp), logp
  grads, logp = jax.grad(loss, has_aux=True)(params)
  return logp, grads


def assert_trees_close(actual, expected, rtol):
  for name, e in param.flat(expected).items():
    np.testing.assert_allclose(
        param.flat(actual)[name], e, rtol=0, atol=rtol * max(np.abs(e).max(), 1e-6), err_msg=name)


def by_hand(p, cfg, x):
  """One row [T, D] in float64, a token and a head at a time."""
  p, x = ({k: np.asarray(v, np.float64) for k, v in p.items()}, np.asarray(x, np.float64))
  g, (heads, key_heads, key, value) = cfg.gdn, cfg.gdn_sizes
  sigmoid = lambda z: 1 / (1 + np.exp(-z))

  def project(name, t):
    if name in p:
      return np.tensordot(x[t], p[name], 1)
    return np.tensordot(x[t] @ p[f'{name}_down'], p[f'{name}_up'], 1)

  def stream(name, t):
    z = sum(p[f'{name}_conv'][g.conv - 1 - back] * project(name, t - back)
            for back in range(min(g.conv, t + 1)))
    z = z * sigmoid(z)
    return z / np.sqrt((z**2).sum(-1, keepdims=True) + 1e-6) if name in 'qk' else z

  out, states = np.zeros_like(x), np.zeros((heads, key, value))
  for t in range(len(x)):
    q, k, v = (stream(name, t) for name in 'qkv')
    rate, f = np.exp(p['decay_log']), project('decay', t) + p['decay_bias']
    rates = {n: sigmoid(project(n, t) + p.get(f'{n}_bias', 0)) for n in ('beta', 'beta_k', 'beta_v')
             if n in p or f'{n}_up' in p}
    read = np.zeros((heads, value))
    for h in range(heads):
      kh, qh = k[h // (heads // key_heads)], q[h // (heads // key_heads)]
      log_decay = (g.lower_bound * sigmoid(rate[h] * f[h]) if g.lower_bound
                   else -rate[h] * np.log1p(np.exp(f[h])))
      decay = np.exp(log_decay) * np.ones(key)
      two = 2.0 if g.negative else 1.0
      if g.variant in ('gdn', 'kda'):
        a, b, written = kh, two * rates['beta'][h] * kh, two * rates['beta'][h] * v[h]
      elif g.variant == 'gdn2':
        a, b, written = kh, two * rates['beta_k'][h] * kh, rates['beta_v'][h] * v[h]
      else:
        other = rates['beta_k' if g.variant == 'fg2' else 'beta_v'][h]
        a = b = np.sqrt(two * rates['beta_k'][h]) * kh
        written = np.sqrt(two * other) * v[h]
      decayed = decay[:, None] * states[h]
      states[h] = decayed + np.outer(a, written - decayed.T @ b)
      read[h] = states[h].T @ qh / np.sqrt(key)
    read = read / np.sqrt((read**2).mean(-1, keepdims=True) + g.norm_eps) * p['norm']
    gate = project('gate', t)
    silu = (g.gate or ('silu' if g.variant == 'gdn' else 'sigmoid')) == 'silu'
    out[t] = np.tensordot(read * (gate * sigmoid(gate) if silu else sigmoid(gate)), p['o'], 2)
  return out


@pytest.mark.parametrize('options', [
    *({'variant': v} for v in VARIANTS),
    {'variant': 'kda', 'lower_bound': -5.0, 'decay_rank': 0, 'gate_rank': 3, 'gate': 'silu'},
    {'variant': 'fg2_plus', 'negative': True, 'beta_rank': 3, 'conv': 1},
    {'variant': 'gdn2', 'negative': True, 'conv': 2}], ids=lambda o: '-'.join(map(str, o.values())))
def test_layer_matches_plain_numpy(options):
  cfg = config(**options)
  params, x = single(cfg), draw(1, 9, 16)
  y = jax.jit(gdn.apply, static_argnums=1)(params, cfg, x, None, jnp.ones((1, 9), jnp.int32))
  np.testing.assert_allclose(y[0], by_hand(params, cfg, x[0]), atol=3e-5)


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('old', ['gdn', 'kda'])
def test_a_finer_variant_begins_as_the_coarser_layer(old, variant):
  cfg = config(old, value_dim=4)
  params, x, segments = layer(cfg), draw(2, 21, 16), jnp.ones((2, 21), jnp.int32)
  if variant == 'gdn' and old == 'kda':
    with pytest.raises(ValueError, match="'kda' has no exact form as 'gdn'"):
      gdn.warm_start(params, cfg, variant)
    return
  finer, new = gdn.warm_start(params, cfg, variant)
  assert {k: a.shape for k, a in finer.items()} == {
      k: (1, *s.shape) for k, s in gdn.specs(new).items()}, 'a stack of one layer'
  take = lambda tree: jax.tree.map(lambda a: a[0], tree)
  apply = jax.jit(gdn.apply, static_argnums=1)
  np.testing.assert_allclose(apply(take(finer), new, x, None, segments),
                             apply(take(params), cfg, x, None, segments), atol=2e-6)


def test_a_model_with_finer_layers_begins_as_it_was():
  cfg = config('kda', **HYBRID | dict(head=('gdn',), repeats=2, tail=('attention', 'gdn')))
  params, rows = tiny.params(cfg), tiny.batch(tiny.tokens(2, 21))
  finer, new = model.warm_start(params, cfg, 'fg2_plus')
  assert new.gdn.variant == 'fg2_plus'
  assert {k: a.shape for k, a in param.flat(finer).items()} == {
      k: s.shape for k, s in param.flat(model.specs(new)).items()}
  np.testing.assert_allclose(tiny.forward(finer, new, rows).hidden,
                             tiny.forward(params, cfg, rows).hidden, atol=2e-5)
  with pytest.raises(ValueError, match="no layer has the mixer gdn, so none can become 'fg2'"):
    model.warm_start(params, tiny.config(), 'fg2')


def test_warm_start_refuses_one_gate_for_keys_and_values_of_other_width():
  with pytest.raises(ValueError, match='key_dim 4 and value_dim 6'):
    gdn.warm_start(layer(config('kda')), config('kda'), 'fg2')


def test_packed_rows_equal_separate_ones():
  cfg = config(**HYBRID)
  params = tiny.params(cfg)
  tokens, weights = tiny.tokens(1, 20), draw(1, 20)
  packed = tiny.batch(tokens, np.where(np.arange(20) < 10, 1, 2)[None])
  logp, grad = logp_and_grad(params, cfg, packed, weights)
  apart_logp, apart_grad = logp_and_grad(
      params, cfg, tiny.batch(tokens.reshape(2, 10)), weights.reshape(2, 10))
  np.testing.assert_allclose(logp.reshape(2, 10), apart_logp, atol=3e-5)
  assert_trees_close(grad, apart_grad, 3e-5)


@pytest.mark.parametrize('variant', ['gdn', 'fg2_plus'])
def test_a_packed_document_does_not_depend_on_its_neighbour_in_a_single_bit(variant):
  cfg = config(variant)
  params, x, other = single(cfg), draw(1, 16, 16), draw(1, 16, 16, seed=2)
  segments = jnp.array([[3] * 7 + [1] * 9])
  apply = jax.jit(gdn.apply, static_argnums=1)
  y = apply(params, cfg, x, None, segments)
  for first in (True, False):
    changed = apply(
        params, cfg, jnp.where((jnp.arange(16) < 7)[:, None] == first, other, x), None, segments)
    same = slice(7, None) if first else slice(None, 7)
    np.testing.assert_array_equal(changed[:, same], y[:, same])
    assert (np.asarray(changed) != y).any()


@pytest.mark.parametrize('before, after', [(7, 0), (3, 4)])
def test_padding_leaves_output_states_and_gradients_alone(before, after):
  cfg = config(**HYBRID)
  params, tokens, weights = tiny.params(cfg), tiny.tokens(2, 10), draw(2, 10)
  pad = lambda x, value: np.pad(x, ((0, 0), (before, after)), constant_values=value)
  plain, padded = tiny.batch(tokens), tiny.batch(pad(tokens, 7), pad(np.ones_like(tokens), 0))
  everywhere = jnp.full((2, before + 10 + after), 3.0).at[:, before:before + 10].set(weights)
  logp, grad = logp_and_grad(params, cfg, plain, weights)
  padded_logp, padded_grad = logp_and_grad(params, cfg, padded, everywhere)
  np.testing.assert_allclose(padded_logp[:, before:before + 10], logp, atol=3e-5)
  assert_trees_close(padded_grad, grad, 5e-5)

  cfg, x = config(), draw(2, before + 10 + after, 16)
  params, empty = single(cfg), gdn.init_cache(cfg, 2, 0)
  inside = x[:, before:before + 10]
  _, state = run(params, cfg, inside, jnp.ones((2, 10), jnp.int32), empty)
  _, same = run(params, cfg, x, pad(np.ones((2, 10), np.int32), 0), empty)
  assert_trees_close(same, state, 1e-5)


@pytest.mark.parametrize(
    'segments', [[1] * 14, [1] * 5 + [2] * 6 + [0] * 3, [4] * 9 + [2] * 5, [0] * 2 + [1] * 12])
@pytest.mark.parametrize('cut', [1, 6, 9, 13])
def test_two_parts_with_a_carried_state_are_the_whole(segments, cut):
  """The second part begins with the segment the first ended in, or with another.

  With another it begins with an empty state.
  """
  cfg = config()
  params, x = single(cfg), draw(2, 14, 16)
  segments = jnp.broadcast_to(jnp.array(segments), (2, 14))
  whole, state = run(params, cfg, x, segments, gdn.init_cache(cfg, 2, 0))
  first, middle = run(params, cfg, x[:, :cut], segments[:, :cut], gdn.init_cache(cfg, 2, 0))
  if segments[0, cut] not in (segments[0, cut - 1], 0):
    middle = gdn.init_cache(cfg, 2, 0)     # a carried state belongs to the first segment of its row
  second, end = run(params, cfg, x[:, cut:], segments[:, cut:], middle)
  valid = (segments != 0)[..., None]
  np.testing.assert_allclose(np.where(valid, jnp.concatenate([first, second], axis=1), 0),
                             np.where(valid, whole, 0), atol=1e-5)
  assert_trees_close(end, state, 1e-5)


@pytest.mark.parametrize('variant, unroll, prepared', [
    ('gdn', False, False), ('kda', True, True), ('fg2', False, True), ('fg2_plus', False, False),
    ('fg2_plus', True, True), ('gdn2', False, True)])
def test_prefill_and_steps_equal_forward(variant, unroll, prepared):
  cfg = config(variant, unroll=unroll, **HYBRID | dict(repeats=2, tail=('gdn',)))
  params = tiny.params(cfg)
  tokens, start, prompt, length = tiny.tokens(3, 12), np.array([0, 2, 6]), 7, 15
  rows = tiny.batch(tokens, np.arange(12) >= start[:, None])
  expected = tiny.forward(params, dataclasses.replace(cfg, unroll=False), rows).hidden
  given = model.prepare(params, cfg) if prepared else params
  step = jax.jit(functools.partial(model.step, cfg=cfg))
  hidden, cache, _ = jax.jit(functools.partial(model.prefill, cfg=cfg, length=length))(
      given, tokens=rows.tokens[:, :prompt], start=jnp.asarray(start))
  np.testing.assert_allclose(hidden, expected[:, prompt - 1], atol=2e-5)
  cache = model.repeat_cache(cache, 2)
  for t in range(prompt, 12):
    hidden, cache, _ = step(given, tokens=jnp.repeat(rows.tokens[:, t], 2), cache=cache)
    np.testing.assert_allclose(hidden[::2], expected[:, t], atol=2e-5)
    np.testing.assert_array_equal(hidden[::2], hidden[1::2])


def test_no_position_depends_on_a_later_token():
  np.testing.assert_array_equal(
      tiny.reached(config(tied=False, **HYBRID), 7), np.arange(40) <= 7)


def test_attention_without_positions_does_not_read_them():
  cfg = config(**HYBRID)
  params, rows = tiny.params(cfg), tiny.batch(tiny.tokens(2, 9))
  other = rows.replace(positions=rows.positions[:, ::-1])
  np.testing.assert_array_equal(
      tiny.forward(params, cfg, rows).hidden, tiny.forward(params, cfg, other).hidden)


@pytest.mark.parametrize('logit', [-100.0, 100.0])
def test_gradients_are_finite_where_a_gate_is_shut_or_open(logit):
  cfg = config()
  params = single(cfg) | {
      'beta_k_bias': jnp.full((4, 4), logit), 'beta_v_bias': jnp.full((4, 6), logit)}
  total = lambda p, x: jnp.sum(gdn.apply(p, cfg, x, None, jnp.ones((1, 9), jnp.int32)) ** 2)
  grads = jax.jit(jax.grad(total, argnums=(0, 1)))(params, draw(1, 9, 16))
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('variant', ['gdn', 'fg2_plus'])
def test_learning_rates_begin_around_a_half_and_decays_where_the_papers_put_them(variant):
  cfg = config(variant, num_heads=64, num_key_heads=64)
  params = model.init(jax.random.key(0), cfg)['blocks']['0']['mixer']
  a, dt = np.exp(params['decay_log']), np.log1p(np.exp(params['decay_bias']))
  assert (0 if variant == 'gdn' else 1) <= a.min() < 4 and 12 < a.max() <= 16
  assert 1e-3 * 0.99 < dt.min() < 2e-3 and 0.05 < dt.max() < 0.1 * 1.01
  assert all((np.asarray(params[n]) == 0).all()
             for n in params if n.startswith('beta') and n.endswith('bias'))


MESHES = {
    'rows and heads': ({'data': 2, 'fsdp': 2, 'model': 2}, {}),
    'key heads do not divide': ({'data': 2, 'model': 4}, {'kv_heads': ()}),
    'time': ({'data': 2, 'model': 4},
             dict(time=('model',), heads=(), kv_heads=(), ffw=(), vocab=())),
}


@pytest.mark.parametrize('name', MESHES)
def test_a_hybrid_stack_on_a_mesh_equals_one_device(name):
  axes, changes = MESHES[name]
  plain = config(**HYBRID)
  cfg = dataclasses.replace(plain, rules=tuple((a, changes.get(a, to)) for a, to in plain.rules))
  params = tiny.params(cfg)
  segments = np.where(np.arange(16) < np.array([5, 16, 9, 1] * 2)[:, None], 1, 2)
  segments[0, :3] = segments[2, 14:] = 0
  rows, weights = tiny.batch(tiny.tokens(8, 16), segments), draw(8, 16)
  logp, grads = logp_and_grad(params, plain, rows, weights)

  mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
  split = tuple(a for a in ('data', 'fsdp', 'expert') if a in axes)
  put = lambda x: jax.device_put(
      x, NamedSharding(mesh, PartitionSpec(split) if x.ndim else PartitionSpec()))
  with jax.set_mesh(mesh):
    given = jax.device_put(params, param.shardings(model.specs(cfg), mesh, dict(cfg.rules)))
    split_logp, split_grads = logp_and_grad(given, cfg, *jax.tree.map(put, (rows, weights)))
  np.testing.assert_allclose(split_logp, logp, atol=5e-5)
  assert_trees_close(split_grads, grads, 5e-5)


def test_decoding_on_a_mesh_equals_one_device():
  cfg = config(**HYBRID)
  params, tokens = tiny.params(cfg), jnp.asarray(tiny.tokens(8, 7))
  start = jnp.arange(8) // 2

  def decode(params, tokens, start):
    hidden, cache, _ = model.prefill(params, cfg, tokens[:, :5], start, 9)
    for t in range(5, 7):
      hidden, cache, _ = model.step(params, cfg, tokens[:, t], cache)
    return hidden, cache

  expected, _ = jax.jit(decode)(params, tokens, start)
  mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'model'), axis_types=(AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    given = jax.device_put(params, param.shardings(model.specs(cfg), mesh, dict(cfg.rules)))
    rows = NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
    hidden, cache = jax.jit(decode)(given, *jax.device_put((tokens, start), rows))
  np.testing.assert_allclose(hidden, expected, atol=2e-5)
  state = cache.layers['blocks']['0']['state']
  assert state.sharding.is_equivalent_to(
      NamedSharding(mesh, PartitionSpec(None, ('data', 'fsdp'), 'model')), 5)


@pytest.mark.parametrize('options, message', [
    (dict(variant='mamba'), "model.gdn.variant is 'mamba', wanted one of gdn, kda"),
    (dict(gate='tanh'), "model.gdn.gate is 'tanh', wanted silu or sigmoid"),
    (dict(conv=0), 'model.gdn.conv is 0'),
    (dict(lower_bound=5.0), 'model.gdn.lower_bound is 5.0'),
    (dict(num_heads=4, num_key_heads=3),
     'num_heads 4 is not a multiple of model.gdn.num_key_heads 3'),
    (dict(variant='fg2', value_dim=6), 'key_dim 4 and value_dim 6 must be equal'),
    (dict(gate_rank=-2), 'model.gdn.gate_rank is -2'),
    (dict(head=('attention',), pattern=('attention',)), 'no layer has the mixer gdn')])
def test_options_that_cannot_be_meant_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    config(**options)
