"""AdamW, Muon and schedules against hand cases; where the optimiser's state lies on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from configs import base
from launch import config, optimizer
from launch import mesh as mesh_lib
from nn import param
from nn.config import RULES
from nn.param import Spec

SIZES = {'embed': 8, 'heads': 4, 'head_dim': 2, 'ffw': 16}


def matrix(axes, contract):
  return param.matrix(SIZES, axes, contract)


def table():
  """One array of every kind: stacked matrices with heads, a gain, embeddings, a frozen one."""
  layer = {'q': matrix(('embed', 'heads', 'head_dim'), ('embed',)),
           'o': matrix(('heads', 'head_dim', 'embed'), ('heads', 'head_dim')),
           'up': matrix(('embed', 'ffw'), ('embed',)),
           'scale': Spec((8,), ('embed',), param.ones)}
  return {'embed': {'table': Spec((24, 8), ('vocab', 'embed'), param.normal(0.02))},
          'blocks': param.stack(layer, 3),
          'bias': Spec((8,), ('embed',), param.zeros, trainable=False),
          'unembed': {'table': Spec((24, 8), ('vocab', 'embed'), param.normal(0.02), ('embed',))}}


def values(seed):
  """Independent normal values around 1 in the shape of the trainable part of the table."""
  rng = np.random.default_rng(seed)
  specs, _ = param.split(table(), table())
  return jax.tree.map(lambda s: jnp.asarray(rng.normal(1, 1, s.shape), jnp.float32), specs)


@functools.cache
def compiled(**options):
  tx = optimizer.make(table(), **options)
  return jax.jit(lambda p, g, rate: tx.update(g, tx.init(p), p, learning_rate=rate)[0])


def one_step(params, grads, learning_rate=0.1, **options):
  return compiled(**options)(params, grads, np.float32(learning_rate))


def test_adamw_by_hand():
  specs = {'w': Spec((1, 1), ('embed', 'ffw'), param.zeros, ('embed',)),
           'b': Spec((1,), ('embed',), param.zeros)}
  tx = optimizer.make(specs, weight_decay=0.5, b1=0.9, b2=0.5, eps=0.0)
  params = {'w': jnp.full((1, 1), 2.0), 'b': jnp.full((1,), 2.0)}
  state = tx.init(params)
  # First step: bias correction undoes (1 - b), so the direction is g / |g| = 1.
  grads = {'w': jnp.full((1, 1), 3.0), 'b': jnp.full((1,), 3.0)}
  updates, state = tx.update(grads, state, params, learning_rate=0.1)
  np.testing.assert_allclose(updates['w'], -0.1 * (1 + 0.5 * 2), rtol=1e-6)
  np.testing.assert_allclose(updates['b'], -0.1, rtol=1e-6)            # no decay of vectors
  # Second step, gradient 1: mean (0.9 * 0.3 + 0.1) / (1 - 0.81), square (0.5 * 4.5 + 0.5) / 0.75.
  grads = jax.tree.map(jnp.ones_like, grads)
  updates, state = tx.update(grads, state, params, learning_rate=0.01)
  direction = (0.37 / 0.19) / np.sqrt(2.75 / 0.75)
  np.testing.assert_allclose(updates['w'], -0.01 * (direction + 1), rtol=1e-6)
  np.testing.assert_allclose(updates['b'], -0.01 * direction, rtol=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
  params, grads = values(0), values(1)
  norm = float(optax.tree.norm(grads))
  clipped = one_step(params, grads, clip=norm / 4, eps=1.0)
  by_hand = one_step(params, jax.tree.map(lambda g: g / 4, grads), eps=1.0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), clipped, by_hand)
  untouched = one_step(params, grads, clip=norm * 1.01, eps=1.0)
  jax.tree.map(np.testing.assert_array_equal, untouched, one_step(params, grads, eps=1.0))


def test_the_learning_rate_is_data():
  params, grads = values(0), values(1)
  tx = optimizer.make(table(), name='muon', weight_decay=0.1)
  traces = []

  @jax.jit
  def update(state, rate):
    traces.append(rate)
    return tx.update(grads, state, params, learning_rate=rate, use=jnp.int32(0))

  state = tx.init(params)
  small, after_small = update(state, np.float32(0.1))
  large, after_large = update(state, np.float32(0.4))
  assert len(traces) == 1
  jax.tree.map(lambda a, b: np.testing.assert_allclose(4 * a, b, rtol=1e-6), small, large)
  jax.tree.map(np.testing.assert_array_equal, after_small, after_large)


def test_muon_on_stacked_heads_is_muon_on_every_layers_matrix():
  params, grads = values(0), values(1)
  shapes = {'q': (8, 8), 'o': (8, 8), 'up': (8, 16)}                    # inputs, outputs
  matrices = {(name, layer): grads['blocks'][name][layer].reshape(shape)
              for name, shape in shapes.items() for layer in range(3)}
  alone = contrib.scale_by_muon(
      weight_dimension_numbers=dict.fromkeys(matrices, contrib.MuonDimensionNumbers(0, 1)))
  directions = jax.jit(lambda g: alone.update(g, alone.init(g))[0])(matrices)
  for rms, scales in ((0.0, {'q': 1, 'o': 1, 'up': 2**0.5}),            # sqrt(outputs / inputs)
                      (0.2, {'q': 0.2 * 8**0.5, 'o': 0.2 * 8**0.5, 'up': 0.2 * 16**0.5})):
    update = one_step(params, grads, 0.1, name='muon', muon_rms=rms)['blocks']
    for (name, layer), direction in directions.items():
      np.testing.assert_allclose(update[name][layer].reshape(shapes[name]),
                                 -0.1 * scales[name] * direction, rtol=1e-3, atol=1e-6)


def test_muons_directions_are_nearly_orthogonal():
  update = -one_step(values(0), values(1), 1.0, name='muon', muon_rms=0.0)['blocks']['o'][0]
  singular = np.linalg.svd(update.reshape(8, 8), compute_uv=False)
  assert 0.6 < singular.min() and singular.max() < 1.3      # its coefficients aim at 0.7 to 1.2


def test_muon_leaves_vectors_and_vocabulary_to_adam_at_their_own_rate():
  params, grads = values(0), values(1)
  muon = param.flat(one_step(params, grads, 0.1, name='muon', weight_decay=0.3, adam_rate=0.25))
  adam = param.flat(one_step(params, grads, 0.025, name='adamw', weight_decay=0.3))
  for name in ('embed/table', 'unembed/table', 'blocks/scale'):
    np.testing.assert_allclose(muon[name], adam[name], rtol=1e-6)
  for name in ('blocks/q', 'blocks/o', 'blocks/up'):
    assert np.abs(muon[name] - 4 * adam[name]).max() > 1e-3


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_decay_is_decoupled_and_of_matrices_only(name):
  params, grads = values(0), values(1)
  plain = param.flat(one_step(params, grads, 0.1, name=name))
  decayed = param.flat(one_step(params, grads, 0.1, name=name, weight_decay=0.5))
  for key, value in param.flat(params).items():
    share = 0.5 if key in ('blocks/q', 'blocks/o', 'blocks/up', 'unembed/table') else 0.0
    np.testing.assert_allclose(decayed[key] - plain[key], -0.1 * share * value, atol=1e-6)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_moments_lie_where_their_parameters_lie(name):
  specs = table()
  mesh = mesh_lib.make_mesh({'data': 1, 'fsdp': 2, 'model': 4})
  where = param.shardings(specs, mesh, dict(RULES))
  tx = optimizer.make(specs, name=name, clip=1.0)
  with jax.set_mesh(mesh):
    params = jax.device_put(values(0), param.split(where, specs)[0])
    placed = optimizer.state_shardings(tx, specs, where, mesh)
    state = jax.jit(tx.init, out_shardings=placed)(params)
    grads = jax.tree.map(jnp.ones_like, params)
    _, after = jax.jit(tx.update)(grads, state, params, learning_rate=jnp.float32(0.1))
  wanted = {name: x.sharding for name, x in param.flat(params).items()}
  assert not wanted['blocks/q'].is_fully_replicated
  moments = 0
  for tree in (state, after):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      keys = '/'.join(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
      match = [n for n in wanted if f'/{keys}'.endswith(f'/{n}')]
      assert leaf.sharding.is_equivalent_to(
          wanted[match[0]] if match else jax.NamedSharding(mesh, jax.P()), leaf.ndim), path
      moments += len(match)
  # Two trees of six arrays; Adam has two moments for each, Muon one for its three.
  assert moments == 2 * (6 * 2 if name == 'adamw' else 3 * 2 + 3)


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_an_update_on_a_mesh_is_the_update_on_one_device(name):
  specs, params, grads = table(), values(0), values(1)
  alone = one_step(params, grads, name=name, weight_decay=0.1, clip=1.0)
  mesh = mesh_lib.make_mesh({'data': 1, 'fsdp': 2, 'model': 4})
  where = param.split(param.shardings(specs, mesh, dict(RULES)), specs)[0]
  with jax.set_mesh(mesh):
    spread = one_step(jax.device_put(params, where), jax.device_put(grads, where),
                      name=name, weight_decay=0.1, clip=1.0)
  # Newton-Schulz multiplies rounding errors by up to 3.4 in each of five iterations.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), alone, spread)


def rates(kind, at, **options):
  rate = optimizer.schedule(kind, peak=2.0, **options)
  return [rate(step) for step in at]


@pytest.mark.parametrize('kind, options, at, expected', [
    ('constant', {'steps': 4}, (0, 3, 9), (2, 2, 2)),
    ('constant', {'steps': 9, 'warmup': 3}, (0, 1, 2, 3, 8), (0.5, 1, 1.5, 2, 2)),
    ('wsd', {'steps': 10, 'warmup': 1, 'decay': 3}, (0, 1, 6, 7, 8, 9, 10, 11),
     (1, 2, 2, 1.5, 1, 0.5, 0, 0)),
    ('wsd', {'steps': 10, 'decay': 1, 'floor': 0.5}, (8, 9, 10, 11), (2, 1.5, 1, 1)),
    ('wsd', {'steps': 10}, (0, 9, 10), (2, 2, 0)),
    ('wsd', {'steps': 2, 'warmup': 3, 'decay': 0}, (0, 1), (0.5, 1)),     # stopped while rising
    ('cosine', {'steps': 8}, (0, 2, 4, 8, 9), (2, 1 + 2**-0.5, 1, 0, 0)),
    ('cosine', {'steps': 10, 'warmup': 2, 'floor': 0.1}, (0, 2, 6, 10, 99),
     (2 / 3 * 1, 2, 1.1, 0.2, 0.2)),
    ('cosine', {'steps': 2, 'warmup': 2}, (1, 2), (4 / 3, 2)),
])
def test_schedules_by_hand(kind, options, at, expected):
  np.testing.assert_allclose(rates(kind, at, **options), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize('f, said', [
    (lambda: optimizer.make(table(), name='adam'), "'adam', wanted adamw or muon"),
    (lambda: optimizer.schedule('linear', peak=1.0, steps=1), "'linear', wanted constant, wsd"),
    (lambda: optimizer.schedule('wsd', peak=-1.0, steps=1), "'learning_rate': -1.0"),
    (lambda: optimizer.schedule('wsd', peak=float('nan'), steps=1), "'learning_rate': nan"),
    (lambda: optimizer.schedule('wsd', peak=1.0, steps=1, decay=-1), "'decay': -1"),
    (lambda: optimizer.schedule('wsd', peak=1.0, steps=1, floor=1.5), "'floor': 1.5"),
])
def test_bad_options_are_refused(f, said):
  with pytest.raises(ValueError, match=said):
    f()


def test_only_the_options_in_use_are_read():
  c = base.get_config()
  t = config.Tracked(c)
  optimizer.from_config(table(), t.sft.optimizer, steps=5)
  unread = {key for key in c.sft.optimizer if f'sft.optimizer.{key}' not in t._read}
  assert unread == {'decay', 'floor', 'muon_beta', 'muon_steps', 'muon_rms', 'adam_rate'}
  c.sft.optimizer.update(name='muon', schedule='wsd', learning_rate=0.5, decay=1, floor=0.2)
  tx, rate = optimizer.from_config(table(), t.sft.optimizer, steps=5)
  assert set(c.sft.optimizer) == {key.split('.')[-1] for key in t._read}
  assert (rate(3), rate(4), rate(5)) == (0.5, pytest.approx(0.3), pytest.approx(0.1))
  options = {k: v for k, v in c.sft.optimizer.items()
             if k not in ('learning_rate', 'schedule', 'warmup', 'decay', 'floor')}
  params, grads = values(0), values(1)
  update = jax.jit(lambda: tx.update(grads, tx.init(params), params, learning_rate=0.1)[0])()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
               update, one_step(params, grads, **options))
