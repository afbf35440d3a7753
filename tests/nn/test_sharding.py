"""One device and eight compute the same, and arrays lie where the rules say."""

import functools
import re

import jax
import jax.numpy as jnp
import nn_tiny as tiny
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from nn import model, param, score
from nn.types import ENTROPY, LOGP

# Four key heads and an odd number of tokens per row; logits in two chunks, so that the loop over
# them is split too.
CFG = tiny.config(num_kv_heads=4, score_chunk=6)
BATCH = ('data', 'fsdp')
MESHES = {
    'all axes': dict(data=2, fsdp=2, model=2),
    'data': dict(data=8),
    'fsdp': dict(fsdp=8),
    'model': dict(data=2, model=4),
}


def loss(params, rows, weights):
  out = model.forward(params, CFG, rows.tokens, rows.positions, rows.segments)
  values = score.score(params, CFG, out, rows, (LOGP, ENTROPY))
  return jnp.sum(weights * values[LOGP]) + 0.1 * jnp.sum(values[ENTROPY]), out.hidden


@functools.cache
def example():
  """Parameters, packed and padded rows, weights; hidden states, loss, gradients on one device."""
  segments = np.where(np.arange(11) < 4, 1, 2) * (np.arange(11) < 3 + np.arange(8)[:, None] * 2)
  rows = tiny.batch(tiny.tokens(8, 11), segments)
  weights = jnp.asarray(np.random.default_rng(1).standard_normal((8, 11)), jnp.float32)
  params = tiny.params(CFG)
  return params, rows, weights, jax.jit(jax.value_and_grad(loss, has_aux=True))(
      params, rows, weights)


def place(mesh, params, rows):
  """Both, where a train step has them."""
  params = jax.device_put(params, param.shardings(model.specs(CFG), mesh, dict(CFG.rules)))
  split = tuple(name for name in BATCH if name in mesh.shape)
  put = lambda x: jax.device_put(
      x, NamedSharding(mesh, PartitionSpec(split) if x.ndim else PartitionSpec()))
  return params, jax.tree.map(put, rows)


@pytest.mark.parametrize('name', MESHES)
def test_forward_and_gradients_on_a_mesh_equal_one_device(name):
  axes = MESHES[name]
  params, rows, weights, ((expected, hidden), grads) = example()
  mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
  with jax.set_mesh(mesh):
    params, (rows, weights) = place(mesh, params, (rows, weights))
    step = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, rows, weights).compile()
    (actual, split_hidden), split_grads = step(params, rows, weights)
    program = step.as_text()

  np.testing.assert_allclose(actual, expected, rtol=1e-5)
  np.testing.assert_allclose(split_hidden, hidden, atol=2e-5)
  for leaf, a in param.flat(split_grads).items():
    e = np.asarray(param.flat(grads)[leaf])
    np.testing.assert_allclose(a, e, atol=2e-5 * np.abs(e).max(), err_msg=leaf)

  rows_over = tuple(n for n in BATCH if n in axes)
  assert split_hidden.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(rows_over)), 3)
  # Nobody ever collects logits: chunks of six positions of 40 ids.
  assert 'ENTRY' in program
  gathered = re.findall(r'= f32\[([\d,]+)\]\S* all-gather', program)
  assert not [shape for shape in gathered if shape.endswith(',6,40')], gathered


def test_decoding_on_a_mesh_equals_one_device():
  params, rows, _, _ = example()
  start = jnp.arange(8) // 2
  def run(params, tokens, start):
    hidden, cache, _ = model.prefill(params, CFG, tokens[:, :5], start, 9)
    cache = model.repeat_cache(cache, 2)
    more = jnp.repeat(tokens[:, 5:7], 2, axis=0)
    for t in range(2):
      hidden, cache, _ = model.step(params, CFG, more[:, t], cache)
    return hidden, cache

  expected, _ = jax.jit(run)(params, rows.tokens, start)
  mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'model'), axis_types=(AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    params, (tokens, start) = place(mesh, params, (rows.tokens, start))
    hidden, cache = jax.jit(run)(params, tokens, start)
  np.testing.assert_allclose(hidden, expected, atol=2e-5)
  where = lambda *parts: NamedSharding(mesh, PartitionSpec(*parts))
  for part, lead in (('head', ()), ('blocks', (None,))):
    for a in jax.tree.leaves(cache.layers[part]):
      assert a.sharding.is_equivalent_to(where(*lead, BATCH, 'model'), a.ndim), a.sharding
