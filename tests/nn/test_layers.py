"""The small parts of a layer against float64 and against plain autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nn import linear, norm, rope


def draw(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize('dtype, rtol', [
    (jnp.float32, 1e-6),
    (jnp.bfloat16, 1.01 * 2**-8),      # the exact answer, rounded once
])
def test_rms_norm_matches_float64(dtype, rtol):
  x, scale = draw(2, 3, 256).astype(dtype), draw(256, seed=1)
  x64, scale64 = np.asarray(x, np.float64), np.asarray(scale, np.float64)
  expected = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 1e-6) * scale64
  actual = norm.rms_norm(x, scale, 1e-6)
  assert actual.dtype == dtype
  np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=rtol)


def test_rms_norm_of_nothing_is_nothing():
  zeros = jnp.zeros((2, 8))
  np.testing.assert_array_equal(norm.rms_norm(zeros, jnp.ones(8), 1e-6), zeros)


def test_rotation_by_hand():
  # Two pairs (0, 2) and (1, 3), turned by position and by position / 10, theta being 100.
  x = jnp.array([[[1.0, 2.0, 3.0, 4.0]]])
  a, b = 3.0, 0.3
  expected = [np.cos(a) - 3 * np.sin(a), 2 * np.cos(b) - 4 * np.sin(b),
              3 * np.cos(a) + np.sin(a), 4 * np.cos(b) + 2 * np.sin(b)]
  np.testing.assert_allclose(rope.rotate(x, jnp.array([3]), 100.0)[0, 0], expected, rtol=1e-6)


def test_rotated_products_depend_on_distance_only():
  q, k = draw(1, 1, 16), draw(1, 1, 16, seed=1)
  product = lambda i, j: jnp.vdot(
      rope.rotate(q, jnp.array([i]), 1e4), rope.rotate(k, jnp.array([j]), 1e4))
  np.testing.assert_allclose(product(9, 4), product(105, 100), rtol=1e-4)
  assert abs(product(9, 4) - product(9, 5)) > 0.01


def test_rotation_of_a_late_position_in_bfloat16_is_rounded_once():
  x = draw(1, 2, 16).astype(jnp.bfloat16)
  late = jnp.array([1001])
  exact = rope.rotate(x.astype(jnp.float32), late, 1e4)
  np.testing.assert_array_equal(
      rope.rotate(x, late, 1e4).astype(jnp.float32), exact.astype(jnp.bfloat16))


@pytest.mark.parametrize('num_inputs, x_shape, w_shape', [
    (1, (2, 3, 5), (5, 7)), (1, (2, 3, 5), (5, 2, 4)), (2, (2, 3, 4, 2), (4, 2, 6)),
    (1, (3, 5), (5, 7)),
])
def test_products_and_their_gradients_equal_autodiff(num_inputs, x_shape, w_shape):
  x, w = draw(*x_shape), draw(*w_shape, seed=1)
  plain, pull_plain = jax.vjp(lambda x, w: jnp.tensordot(x, w, num_inputs), x, w)
  actual, pull = jax.vjp(lambda x, w: linear.linear(x, w, num_inputs), x, w)
  np.testing.assert_allclose(actual, plain, atol=1e-6)
  grad = draw(*plain.shape, seed=2)
  for a, e in zip(pull(grad), pull_plain(grad), strict=True):
    np.testing.assert_allclose(a, e, atol=1e-5)


def test_logits_and_their_gradients_equal_autodiff():
  x, table = draw(2, 3, 5), draw(11, 5, seed=1)
  plain, pull_plain = jax.vjp(lambda x, w: x @ w.T, x, table)
  actual, pull = jax.vjp(linear.logits, x, table)
  np.testing.assert_allclose(actual, plain, atol=1e-6)
  grad = draw(*plain.shape, seed=2)
  for a, e in zip(pull(grad), pull_plain(grad), strict=True):
    np.testing.assert_allclose(a, e, atol=1e-5)


def test_bfloat16_products_keep_the_weight_gradient_in_float32():
  x, w, grad = (draw(64, 8).astype(jnp.bfloat16), draw(8, 6, seed=1),
                draw(64, 6, seed=2).astype(jnp.bfloat16))
  exact = np.asarray(x, np.float64).T @ np.asarray(grad, np.float64)
  dx, dw = jax.vjp(linear.linear, x, w)[1](grad)
  assert dx.dtype == jnp.bfloat16 and dw.dtype == jnp.float32
  np.testing.assert_allclose(dw, exact, atol=1e-5)
  dtable = jax.vjp(linear.logits, x, w.T)[1](grad.astype(jnp.float32))[1]
  np.testing.assert_allclose(dtable.T, exact, atol=1e-5)
