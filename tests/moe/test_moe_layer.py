"""The expert layer is the dense sum over experts, on one device and on meshes.

Also routes, loads, empty experts, and models of it.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe import dispatch, layer
from nn import model, param
from nn.config import MoE
from tests.moe import moe_tiny as tiny
from tests.nn import nn_tiny

MESHES = {
    'two': dict(expert=2), 'four': dict(data=2, expert=2), 'eight': dict(expert=8),
    'all axes': dict(fsdp=2, expert=2, model=2), 'whole experts': dict(data=4, model=2),
}


def on(axes):
  """The mesh of these axes as the ambient one."""
  return jax.set_mesh(jax.make_mesh(
      tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)))


def assert_close(actual, expected, rtol=2e-5):
  """Every leaf to rtol of its largest entry."""
  for (path, e), a in zip(
      jax.tree.leaves_with_path(expected), jax.tree.leaves(actual), strict=True):
    np.testing.assert_allclose(a, e, rtol=0, atol=rtol * np.abs(e).max() + 1e-12, err_msg=str(path))


@pytest.mark.parametrize('name', tiny.LAYOUTS)
def test_sparse_equals_the_dense_sum_over_experts(name):
  cfg = tiny.config(tiny.LAYOUTS[name])
  params, (x, segments) = tiny.params(cfg), tiny.rows()
  chosen = tiny.chosen_by_hand(params, cfg, x, segments)
  # Without the auxiliary losses, which have tests of their own.
  cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, balance_loss=0.0, z_loss=0.0))
  (_, (y, extras)), (grads, dx) = tiny.pull(params, cfg, x, segments)
  np.testing.assert_allclose(y, tiny.dense(params, cfg, x, chosen), atol=1e-5)
  np.testing.assert_array_equal(extras['load'], chosen.sum((0, 1)))

  def loss(trainable, x):
    y = tiny.dense(params | trainable, cfg, x, chosen)
    return jnp.sum(jnp.cos(jnp.arange(y.size)).reshape(y.shape) * y)

  expected, by_x = jax.grad(loss, (0, 1))(param.split(params, layer.specs(cfg))[0], x)
  assert_close(grads, expected)
  assert_close(dx, by_x)


@pytest.mark.parametrize('name, mesh', [
    *(('qwen3_moe', mesh) for mesh in MESHES), ('deepseek_v3', 'all axes')])
def test_meshes_change_nothing(name, mesh):
  cfg = tiny.config(tiny.LAYOUTS[name])
  params, (x, segments) = tiny.params(cfg), tiny.rows()
  one = tiny.pull(params, cfg, x, segments)
  with on(MESHES[mesh]):
    many = tiny.pull(params, cfg, x, segments)
  jax.tree.map(np.testing.assert_array_equal, [many[0][1][1][k] for k in ('routes', 'load')],
               [one[0][1][1][k] for k in ('routes', 'load')])
  assert_close(many, one)


@pytest.mark.parametrize('case', ['global', 'one row', 'all to one'])
def test_other_ways_over_the_experts_change_nothing(case):
  """The compiler's own split; rows that the mesh does not divide; a very skewed router.

  It is so skewed that one device gets every row.
  """
  cfg = tiny.config(tiny.LAYOUTS['qwen3_moe'])
  params, (x, segments) = tiny.params(cfg), tiny.rows()
  if case == 'one row':
    x, segments = x[:1], segments[:1]
  if case == 'all to one':
    params['router'] = params['router'].at[:, :2].add(50 * jnp.sign(x.sum((0, 1)))[:, None])
    x = jnp.abs(x) * jnp.sign(x.sum((0, 1)))
  one = tiny.pull(params, cfg, x, segments)
  if case == 'all to one':
    np.testing.assert_array_equal(one[0][1][1]['load'], [(segments != 0).sum()] * 2 + [0] * 6)
    for gradient in (one[1][0][name] for name in ('gate', 'up', 'down')):
      np.testing.assert_array_equal(gradient[2:], 0)
  other = dataclasses.replace(
      cfg, moe=dataclasses.replace(cfg.moe, dispatch='global')) if case == 'global' else cfg
  with on(dict(data=2, expert=4)):
    assert_close(tiny.pull(params, other, x, segments), one)


def test_rows_travel_and_experts_do_not():
  cfg = tiny.config(tiny.LAYOUTS['qwen3_moe'])
  params, (x, segments) = tiny.params(cfg), tiny.rows()
  with on(dict(expert=8)) as _:
    mesh = jax.sharding.get_mesh()
    put = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))
    params = {name: put(a, *(('expert',) if a.ndim == 3 else ())) for name, a in params.items()}
    program = tiny.pull.lower(
        params, cfg, put(x, 'expert'), put(segments, 'expert')).compile().as_text()
  assert 'all-to-all' in program
  # The largest thing that is collected from all is the router's counts.
  gathered = [np.prod([int(n) for n in shape.split(',') if n])
              for shape in re.findall(r'= \w+\[([\d,]*)\]\S* all-gather', program)]
  assert max(gathered) <= 64, gathered


def test_experts_that_the_mesh_does_not_divide_are_refused():
  cfg = tiny.config(MoE(experts=6, top_k=2, ffw_dim=12))
  x, segments = tiny.rows()
  with on(dict(expert=4)), pytest.raises(
      ValueError, match='experts 6 must be a multiple of the 4 devices'):
    tiny.pull(tiny.params(cfg), cfg, x, segments)


def test_padding_and_packing_change_no_load_and_no_loss():
  cfg = tiny.config(tiny.LAYOUTS['qwen3_moe'])
  params, (x, segments) = tiny.params(cfg), tiny.rows()
  real = np.asarray(segments) != 0
  alone = tiny.pull(params, cfg, x[real][None], jnp.ones((1, real.sum()), jnp.int32))[0][1][1]
  (_, (y, extras)), _ = tiny.pull(params, cfg, x, segments)
  np.testing.assert_array_equal(extras['load'], alone['load'])
  assert_close(extras['aux_loss'], alone['aux_loss'])
  np.testing.assert_array_equal(extras['routes'][real], alone['routes'][0])
  np.testing.assert_array_equal(extras['routes'][~real], -1)
  np.testing.assert_array_equal(y[~real], 0)
  (_, (other, _)), _ = tiny.pull(params, cfg, jnp.where(real[..., None], x, 1e3), segments)
  np.testing.assert_array_equal(other, y)


def test_bfloat16_activations_keep_router_and_gradients_in_float32():
  cfg = tiny.config(tiny.LAYOUTS['qwen3_next'], dtype='bfloat16')
  params, (x, segments) = tiny.params(cfg), tiny.rows()
  rounded = x.astype(jnp.bfloat16)
  (_, (y, extras)), (grads, _) = tiny.pull(params, cfg, rounded, segments)
  (_, (_, exact)), (exact_grads, _) = tiny.pull(params, cfg, rounded.astype(jnp.float32), segments)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(extras['routes'], exact['routes'])
  for name, g in param.flat(grads).items():
    e = param.flat(exact_grads)[name]
    assert g.dtype == jnp.float32
    assert jnp.linalg.norm(g - e) < 0.05 * jnp.linalg.norm(e), name


def test_moved_rows_come_back():
  order = dispatch.sort(jnp.array([3, 1, 3, 0, 1]))
  np.testing.assert_array_equal(order.source, [3, 1, 4, 0, 2])
  np.testing.assert_array_equal(order.source[order.target], np.arange(5))


# A whole model: routes and loads by layer, replay, decoding, biases.

CFG = nn_tiny.config(
    pattern=('attention', ('attention', 'moe')), tail=(('attention', 'moe'),),
    moe=MoE(experts=4, top_k=2, ffw_dim=8, bias_rate=0.25, balance_loss=0.1))


@pytest.mark.parametrize('unroll', [False, True])
def test_replay_gives_the_routes_and_the_function_of_the_recording(unroll):
  cfg = dataclasses.replace(CFG, unroll=unroll)
  params = tiny.draw(model.specs(cfg))
  rows = nn_tiny.batch(nn_tiny.tokens(2, 7), np.arange(7) < np.array([[7], [4]]))
  forward = jax.jit(lambda p, routes: model.forward(
      p, cfg, rows.tokens, rows.positions, rows.segments, routes))
  recorded = forward(params, None)
  assert recorded.routes.keys() == recorded.load.keys() == {2, 4, 5}
  np.testing.assert_array_equal(
      np.bincount(recorded.routes[4][rows.segments != 0].ravel(), minlength=4), recorded.load[4])

  replayed = {i: recorded.routes[i] for i in (2, 5)}
  np.testing.assert_allclose(forward(params, replayed).hidden, recorded.hidden, atol=1e-6)
  # Another router chooses otherwise, but not where it replays.
  other = jax.tree_util.tree_map_with_path(
      lambda path, a: -a if 'router' in str(path) else a, params)
  free, bound = forward(other, None), forward(other, replayed)
  assert any(np.any(free.routes[i] != recorded.routes[i]) for i in (2, 5))
  for i in (2, 5):
    np.testing.assert_array_equal(bound.routes[i], recorded.routes[i])
  # What it would have chosen is told beside what it took; layer 2 comes first and sees what it saw
  # when it was free.
  np.testing.assert_array_equal(bound.own_routes[2], free.routes[2])
  for i in (2, 4, 5):
    np.testing.assert_array_equal(free.own_routes[i], free.routes[i])
  with pytest.raises(ValueError, match=r'routes are given for layers \[0\], which have no experts'):
    forward(params, {0: recorded.routes[2]})


@pytest.mark.parametrize('unroll', [False, True])
def test_prefill_and_steps_equal_forward_and_choose_alike(unroll):
  cfg = dataclasses.replace(CFG, unroll=unroll)
  params = tiny.draw(model.specs(cfg))
  rows = nn_tiny.batch(nn_tiny.tokens(2, 8), np.arange(8) >= np.array([[0], [2]]))
  expected = nn_tiny.forward(params, cfg, rows)
  hidden, cache, routes = jax.jit(lambda p, t, s: model.prefill(p, cfg, t, s, 8))(
      model.prepare(params, cfg), rows.tokens[:, :5], jnp.array([0, 2]))
  assert routes.keys() == {2, 4, 5}
  for i in routes:
    np.testing.assert_array_equal(routes[i], expected.routes[i][:, :5])
  step = jax.jit(lambda p, t, c: model.step(p, cfg, t, c))
  for t in range(5, 9):
    np.testing.assert_allclose(hidden, expected.hidden[:, t - 1], atol=1e-5)
    if t < 8:
      hidden, cache, routes = step(params, rows.tokens[:, t], cache)
      for i in routes:
        np.testing.assert_array_equal(routes[i], expected.routes[i][:, t])


def test_after_an_update_every_layers_bias_has_moved_against_its_own_load():
  params = tiny.draw(model.specs(CFG))
  load = {2: jnp.array([9, 1, 1, 1]), 4: jnp.array([1, 9, 1, 1]), 5: jnp.array([3, 3, 3, 3])}
  after = model.after_update(params, CFG, load)
  moved = lambda part: after[part]['ffn']['bias'] - before[part]['ffn']['bias']
  before, after = ({'b': p['blocks']['1'], 't': p['tail']['0']} for p in (params, after))
  np.testing.assert_allclose(moved('b'), 0.25 * np.array([[-1, 1, 1, 1], [1, -1, 1, 1]]), rtol=1e-5)
  np.testing.assert_array_equal(moved('t'), 0)
  assert not param.flat(model.specs(CFG))['blocks/1/ffn/bias'].trainable


def test_flops_by_hand():
  cfg = tiny.config(tiny.LAYOUTS['qwen3_next'])
  assert layer.flops(cfg, 9) == 2 * tiny.WIDTH * (3 * (3 * 12 + 12) + 8 + 1)


def test_a_bias_without_a_rate_chooses_and_stays():
  cfg = dataclasses.replace(CFG, moe=dataclasses.replace(CFG.moe, bias_rate=0.0, bias=True))
  params = tiny.draw(model.specs(cfg))
  after = model.after_update(params, cfg, {5: jnp.array([9, 1, 1, 1])})
  np.testing.assert_array_equal(
      after['tail']['0']['ffn']['bias'], params['tail']['0']['ffn']['bias'])
  params['tail']['0']['ffn']['bias'] = jnp.array([0.0, 9.0, 0.0, 9.0])
  out = nn_tiny.forward(params, cfg, nn_tiny.batch(nn_tiny.tokens(2, 6)))
  np.testing.assert_array_equal(out.load[5], [0, 12, 0, 12])
