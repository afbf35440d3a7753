"""Every implementation of the grouped matmul against numpy, group by group: values and gradients.

N rows, E groups, I inputs, O outputs.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import grouped_matmul as kernel
from kernels.grouped_matmul import blocks, dispatch, megablox, reference, tiles

IMPLEMENTATIONS = {
    'reference': reference,
    'blocks': blocks,
    'tiles': tiles,
    'megablox': types.SimpleNamespace(
        product=functools.partial(megablox.product, interpret=True),
        weight_gradient=functools.partial(megablox.weight_gradient, interpret=True)),
}
# Of five groups: even; ragged; the first, a middle and the last one empty; all rows in one; hardly
# any; none at all.
SIZES = {
    'even': (40, 40, 40, 40, 40), 'ragged': (1, 77, 16, 105, 1), 'empty': (0, 90, 0, 110, 0),
    'one': (0, 0, 0, 200, 0), 'tail': (3, 0, 17, 0, 33), 'nothing': (0, 0, 0, 0, 0),
}
ROWS, INPUTS, OUTPUTS = 200, 24, 40


def draw(*shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


@functools.partial(jax.jit, static_argnums=0)
def pull(name, x, w, sizes, grad):
  """Result, gradient of the rows, gradient of the matrices."""
  y, back = jax.vjp(
      lambda x, w: dispatch.with_derivatives(IMPLEMENTATIONS[name], x, w, sizes), x, w)
  return y, *back(grad)


def expected(x, w, sizes, grad):
  """The three of `pull`, in float64, one group at a time."""
  x, w, grad = (np.asarray(a, np.float64) for a in (x, w, grad))
  y, dx, dw = np.zeros(grad.shape), np.zeros(x.shape), np.zeros(w.shape)
  end = np.cumsum(sizes)
  for e, rows in enumerate(map(slice, end - sizes, end)):
    y[rows], dx[rows], dw[e] = x[rows] @ w[e], grad[rows] @ w[e].T, x[rows].T @ grad[rows]
  return y, dx, dw


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
@pytest.mark.parametrize('case', SIZES)
def test_values_and_gradients_match_numpy_and_nothing_reaches_empty_groups(name, case):
  sizes = np.array(SIZES[case])
  x, w, grad = draw(ROWS, INPUTS), draw(5, INPUTS, OUTPUTS, seed=1), draw(ROWS, OUTPUTS, seed=2)
  # What lies behind the last group is nobody's, and may be anything.
  used = sizes.sum()
  dirty = pull(name, x.at[used:].set(jnp.inf), w, jnp.asarray(sizes, jnp.int32),
               grad.at[used:].set(jnp.nan))
  for actual, want in zip(dirty, expected(x, w, sizes, grad), strict=True):
    np.testing.assert_allclose(actual, want, atol=1e-4)
  for a in dirty[:2]:
    np.testing.assert_array_equal(a[used:], 0)
  np.testing.assert_array_equal(dirty[2][sizes == 0], 0)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_bfloat16_rows_keep_the_weight_gradient_in_float32(name):
  sizes = np.array([50, 0, 150])
  x, w, grad = (
      draw(ROWS, INPUTS, dtype=jnp.bfloat16), draw(3, INPUTS, OUTPUTS, seed=1),
      draw(ROWS, OUTPUTS, seed=2, dtype=jnp.bfloat16))
  y, dx, dw = pull(name, x, w, jnp.asarray(sizes, jnp.int32), grad)
  want = expected(x, w.astype(jnp.bfloat16), sizes, grad)
  assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
  np.testing.assert_allclose(dw, want[2], atol=1e-4)
  for actual, exact in ((y, want[0]), (dx, want[1])):
    np.testing.assert_allclose(actual.astype(jnp.float32), exact, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize('name', ['blocks', 'tiles'])
def test_no_array_of_all_experts_times_all_rows_exists(name):
  rows, experts = 8192, 32
  x, w, sizes = (jax.ShapeDtypeStruct(s, d) for s, d in (
      ((rows, 64), jnp.float32), ((experts, 64, 64), jnp.float32), ((experts,), jnp.int32)))
  grad = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
  memory = pull.lower(name, x, w, sizes, grad).compile().memory_analysis()
  # Padded rows, a few times over; a dense product over experts has 32 times as many numbers as the
  # rows.
  assert memory.temp_size_in_bytes < 0.5 * 4 * rows * experts * 64, (
      memory.temp_size_in_bytes / (4 * rows * 64))


def test_the_choice_is_made_by_platform():
  assert [kernel.choose(on) for on in ('cpu', 'gpu', 'tpu')] == ['blocks', 'tiles', 'megablox']
  with pytest.raises(ValueError, match="no grouped matmul for platform 'abacus'"):
    kernel.choose('abacus')


@pytest.mark.parametrize('shapes, implementation, match', [
    (((8, 3), (2, 4, 5), (2,)), 'auto', 'do not fit together'),
    (((8, 4), (2, 4, 5), (3,)), 'auto', 'do not fit together'),
    (((8, 4), (2, 4, 5), (2,)), 'dense',
     "unknown grouped matmul 'dense'; known are auto, reference"),
    (((8, 4), (2, 4, 5), (2,)), 'megablox', 'runs on tpu, not on cpu'),
])
def test_what_does_not_fit_is_refused(shapes, implementation, match):
  x, w, sizes = (jnp.zeros(s, d) for s, d in zip(shapes, (jnp.float32, jnp.float32, jnp.int32)))
  with pytest.raises(ValueError, match=match):
    kernel.grouped_matmul(x, w, sizes, implementation=implementation)
