"""Every implementation of attention against the definition.

Values, all gradients, segments, padding, meshes. B rows, T positions, H query heads, G key/value
heads, K head size.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import AxisType, PartitionSpec

from kernels import attention as kernel
from kernels.attention import chunked, dispatch, gpu, reference, splash

IMPLEMENTATIONS = {
    'chunked': chunked.attention,
    'splash': functools.partial(splash.attention, interpret=True),
    'gpu': functools.partial(gpu.attention, interpret=True),
}
ROWS = 7


def layouts(length):
  """[7, T] int32: one segment; packed; padding on either side, in the middle, and everywhere."""
  time = np.arange(length)
  packed = [1 + time * pieces // length for pieces in (2, 5)]
  padded = [np.where(hole, 0, 1)
            for hole in (time < length // 3, time >= length // 2, time % 7 > 4, time >= 0)]
  return jnp.asarray(np.stack([np.ones(length), *packed, *padded]), jnp.int32)


def inputs(length, heads=4, groups=2, size=8, rows=ROWS, dtype=jnp.float32, value_size=0):
  """q, k, v and the gradient of the output. value_size: `size` unless given."""
  rng = np.random.default_rng(length)
  draw = lambda num, size: jnp.asarray(rng.standard_normal((rows, length, num, size)), dtype)
  value_size = value_size or size
  return draw(heads, size), draw(groups, size), draw(groups, value_size), draw(heads, value_size)


def pull(attend, q, k, v, grad, segments):
  """Output and the three gradients."""
  def run(q, k, v, grad):
    out, back = jax.vjp(lambda *args: attend(*args, segments=segments), q, k, v)
    return out, *back(grad)
  return jax.jit(run)(q, k, v, grad)


def assert_same(actual, expected, tolerance):
  for name, a, e in zip(('output', 'dq', 'dk', 'dv'), actual, expected, strict=True):
    assert a.dtype == e.dtype
    np.testing.assert_allclose(
        np.asarray(a, np.float32), np.asarray(e, np.float32), rtol=0, atol=tolerance, err_msg=name)


def by_hand(q, k, v, segments, scale):
  """The definition once more, as loops in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros((*q.shape[:3], v.shape[3]))
  ratio = q.shape[2] // k.shape[2]
  for b, t, h in np.ndindex(q.shape[:3]):
    seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t] != 0]
    if seen:
      scores = np.array([scale * q[b, t, h] @ k[b, s, h // ratio] for s in seen])
      weights = np.exp(scores - scores.max())
      out[b, t, h] = weights @ v[b, seen, h // ratio] / weights.sum()
  return out


@pytest.mark.parametrize('value_size', [8, 5])
def test_reference_matches_loops_in_float64(value_size):
  q, k, v, _ = inputs(11, value_size=value_size)
  segments = layouts(11)
  out = reference.attention(q, k, v, segments=segments, scale=0.3)
  np.testing.assert_allclose(out, by_hand(q, k, v, np.asarray(segments), 0.3), atol=2e-6)


@pytest.mark.parametrize('name, length', [
    ('chunked', 1), ('chunked', 33), ('chunked', 128),  # rows whose weights are kept
    ('chunked', 150), ('chunked', 192),                 # several blocks of a long row, whole or not
    ('splash', 1), ('splash', 130), ('gpu', 1), ('gpu', 130),
])
def test_implementation_matches_reference_in_output_and_gradients(name, length):
  q, k, v, grad = inputs(length)
  expected = pull(
      functools.partial(reference.attention, scale=0.35), q, k, v, grad, layouts(length))
  actual = pull(
      functools.partial(IMPLEMENTATIONS[name], scale=0.35), q, k, v, grad, layouts(length))
  assert_same(actual, expected, 1e-5)   # sums of up to 192 float32 products of size 1


@pytest.mark.parametrize('name, length, window', [
    ('chunked', 40, 1), ('chunked', 40, 11), ('chunked', 200, 1), ('chunked', 200, 2),
    ('chunked', 200, 65), ('chunked', 200, 66), ('chunked', 200, 130), ('splash', 200, 66),
])
def test_a_window_matches_reference_in_output_and_gradients(name, length, window):
  *arrays, grad = inputs(length, heads=2, groups=1)
  segments = layouts(length)
  run = lambda attend: pull(
      functools.partial(attend, scale=0.3, window=window), *arrays, grad, segments)
  assert_same(run(IMPLEMENTATIONS[name]), run(reference.attention), 2e-5)


def test_reference_sees_the_window_and_nothing_else():
  length, window = 9, 4
  *arrays, _ = inputs(length)
  segments = layouts(length)
  out = reference.attention(*arrays, segments=segments, scale=0.3, window=window)
  for t in range(length):
    first = max(0, t - window + 1)
    cut = [a[:, first:t + 1] for a in (*arrays, segments)]
    expected = reference.attention(*cut[:3], segments=cut[3], scale=0.3)[:, -1]
    np.testing.assert_allclose(out[:, t], expected, atol=1e-6)


@pytest.mark.parametrize('heads, groups', [(6, 6), (3, 1)])
@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_any_ratio_of_query_heads_to_key_heads(name, heads, groups):
  q, k, v, grad = inputs(20, heads, groups, 16)
  expected = pull(functools.partial(reference.attention, scale=0.2), q, k, v, grad, layouts(20))
  actual = pull(functools.partial(IMPLEMENTATIONS[name], scale=0.2), q, k, v, grad, layouts(20))
  assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize('name, length, value_size', [
    ('chunked', 60, 5), ('chunked', 140, 12), ('splash', 60, 5), ('splash', 60, 12), ('gpu', 60, 5),
    ('gpu', 60, 12)])
def test_values_narrower_and_wider_than_keys(name, length, value_size):
  q, k, v, grad = inputs(length, value_size=value_size, rows=3)
  attends = [functools.partial(attend, scale=0.35)
             for attend in (IMPLEMENTATIONS[name], reference.attention)]
  actual, expected = (pull(attend, q, k, v, grad, layouts(length)[1:4]) for attend in attends)
  assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize(
    'name, length', [('chunked', 60), ('chunked', 140), ('splash', 60), ('gpu', 60)])
def test_bfloat16_stays_within_its_roundings(name, length):
  q, k, v, grad = inputs(length, dtype=jnp.bfloat16)
  wide = [x.astype(jnp.float32) for x in (q, k, v, grad)]
  expected = pull(functools.partial(reference.attention, scale=0.35), *wide, layouts(length))
  actual = pull(
      functools.partial(IMPLEMENTATIONS[name], scale=0.35), q, k, v, grad, layouts(length))
  for a, e in zip(actual, expected, strict=True):
    assert a.dtype == jnp.bfloat16
    # Each number is a sum of products with entries rounded to 8 bits, a few times over.
    error = np.asarray(a, np.float32) - np.asarray(e)
    assert np.sqrt(np.mean(error**2)) < 0.01 * np.sqrt(np.mean(np.asarray(e) ** 2))


@pytest.mark.parametrize(
    'name, length', [('chunked', 60), ('chunked', 140), ('splash', 60), ('gpu', 60)])
def test_extreme_scores_stay_finite(name, length):
  q, k, v, grad = inputs(length)
  actual = pull(functools.partial(IMPLEMENTATIONS[name], scale=1e4), q, k, v, grad, layouts(length))
  for a in actual:
    assert np.isfinite(np.asarray(a)).all()


@pytest.mark.parametrize(
    'name, length', [('chunked', 60), ('chunked', 140), ('splash', 60), ('gpu', 60)])
def test_nothing_leaks_from_later_positions_other_segments_or_padding(name, length):
  q, k, v, grad = inputs(length, rows=3)
  segments = np.ones((3, length), np.int32)
  segments[:, 20:] = 2
  segments[:, 50:53] = 0
  grad = jnp.zeros_like(grad).at[:, 30].set(grad[:, 30])      # of position 30 alone
  _, dq, dk, dv = pull(
      functools.partial(IMPLEMENTATIONS[name], scale=0.35), q, k, v, grad, jnp.asarray(segments))
  for gradient in (dk, dv):
    reached = np.abs(np.asarray(gradient)).max(axis=(0, 2, 3)) > 0
    np.testing.assert_array_equal(reached, (np.arange(length) >= 20) & (np.arange(length) <= 30))
  np.testing.assert_array_equal(
      np.abs(np.asarray(dq)).max(axis=(0, 2, 3)) > 0, np.arange(length) == 30)


def test_long_rows_never_hold_all_pairs():
  length = 1024
  q, k, v, grad = jax.eval_shape(lambda: inputs(length, size=4, rows=2))
  segments = jax.ShapeDtypeStruct((2, length), jnp.int32)

  def largest(jaxpr):
    sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, 'size')]
    inner = [largest(sub) for eqn in jaxpr.eqns for sub in core.jaxprs_in_params(eqn.params)]
    return max([0, *sizes, *inner])

  def run(q, k, v, grad, segments):
    return pull(functools.partial(chunked.attention, scale=1.0), q, k, v, grad, segments)

  pairs = 2 * 4 * length * length
  assert largest(jax.make_jaxpr(run)(q, k, v, grad, segments).jaxpr) < pairs / 50


@pytest.mark.parametrize('groups, length', [(4, 9), (2, 17), (1, 3)])
def test_decoding_matches_the_last_row_of_the_definition(groups, length):
  q, k, v, _ = inputs(length, groups=groups, rows=3)
  start = jnp.array([0, 2, length - 1])
  valid = jnp.arange(length) >= start[:, None]
  expected = reference.attention(q, k, v, segments=valid.astype(jnp.int32), scale=0.35)[:, -1]
  # Two slots after the last one are not valid and hold what must not matter.
  spare = lambda x: jnp.pad(x, ((0, 0), (0, 2), (0, 0), (0, 0)), constant_values=1e9)
  actual = kernel.decode_attention(
      q[:, -1], spare(k).transpose(0, 2, 3, 1), spare(v).swapaxes(1, 2),
      jnp.pad(valid, ((0, 0), (0, 2))), 0.35)
  np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_default_scale_is_the_inverse_root_of_the_head_size():
  q, k, v, _ = inputs(12, size=16, rows=3)
  segments = jnp.ones((3, 12), jnp.int32)
  expected = reference.attention(q, k, v, segments=segments, scale=0.25)
  np.testing.assert_allclose(kernel.attention(q, k, v, segments=segments), expected, atol=2e-6)
  last = kernel.decode_attention(q[:, -1], k.transpose(0, 2, 3, 1), v.swapaxes(1, 2), segments == 1)
  np.testing.assert_allclose(last, expected[:, -1], atol=2e-6)


@pytest.mark.parametrize('on, length, size, expected', [
    ('cpu', 4096, 64, 'chunked'), ('tpu', 4096, 64, 'splash'), ('gpu', 4096, 64, 'gpu'),
    ('tpu', 100, 64, 'chunked'), ('gpu', 4096, 512, 'chunked'),
])
def test_what_auto_stands_for(on, length, size, expected):
  assert kernel.choose(on, length, size) == expected


def test_a_named_implementation_raises_where_it_cannot_serve():
  q, k, v, _ = inputs(8, rows=3)
  segments = jnp.ones((3, 8), jnp.int32)
  for name in ('splash', 'gpu'):
    with pytest.raises(ValueError, match='not on cpu'):
      kernel.attention(q, k, v, segments=segments, implementation=name)
  with pytest.raises(ValueError, match="'flash'.*known are auto, reference"):
    kernel.attention(q, k, v, segments=segments, implementation='flash')
  with pytest.raises(ValueError, match='do not fit'):
    kernel.attention(q[:, :, :3], k, v, segments=segments)
  with pytest.raises(ValueError, match='do not fit'):
    kernel.attention(q, k, v, segments=segments[:, :5])


# Key heads split as query heads are, and one key head for all.
@pytest.mark.parametrize('groups, kv_heads', [(2, ('model',)), (1, ())])
@pytest.mark.parametrize('name', ['splash', 'gpu'])
def test_kernels_on_a_mesh_run_on_each_device_s_rows_and_heads(name, groups, kv_heads):
  q, k, v, grad = inputs(20, groups=groups, rows=4)
  segments = layouts(20)[1:5]
  expected = pull(functools.partial(reference.attention, scale=0.35), q, k, v, grad, segments)
  axes = kernel.Axes(batch=('data', 'fsdp'), heads=('model',), kv_heads=kv_heads)
  run = functools.partial(IMPLEMENTATIONS[name], scale=0.35)

  def attend(q, k, v, segments):
    return dispatch.per_device(run, q, k, v, segments, axes)

  mesh = jax.make_mesh((2, 2, 2), ('data', 'fsdp', 'model'), axis_types=(AxisType.Auto,) * 3)
  with jax.set_mesh(mesh):
    place = lambda x: jax.device_put(
        x, jax.NamedSharding(mesh, PartitionSpec(('data', 'fsdp'), None)))
    actual = pull(attend, *map(place, (q, k, v, grad)), place(segments))
    assert actual[0].sharding.spec == PartitionSpec(('data', 'fsdp'), None, 'model')
  assert_same(actual, expected, 1e-5)


@pytest.mark.parametrize('length', [40, 140])
def test_the_compiler_splits_plain_matmuls_over_a_mesh_without_moving_rows_or_heads(length):
  q, k, v, grad = inputs(length, rows=4)
  segments = layouts(length)[1:5]
  attend = functools.partial(chunked.attention, scale=0.35)
  expected = pull(attend, q, k, v, grad, segments)
  mesh = jax.make_mesh(
      (2, 2), ('data', 'model'), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    place = lambda x, *spec: jax.device_put(
        x, jax.NamedSharding(mesh, PartitionSpec('data', None, *spec)))
    program = jax.jit(functools.partial(pull, attend)).lower(
        *(place(x, 'model') for x in (q, k, v, grad)), place(segments)).compile()
    actual = program(*(place(x, 'model') for x in (q, k, v, grad)), place(segments))
  assert_same(actual, expected, 1e-5)
  assert not re.search('all-gather|all-reduce|all-to-all|collective-permute', program.as_text())
