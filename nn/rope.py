"""Rotary position embedding (arXiv:2104.09864), pairing element i of a head with element i + K/2.

K head size.
"""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  """Turns pair i of every head by positions * theta**(-2i/K) radians.

  Args:
    x: [..., H, K], any float dtype.
    positions: [...] int32.

  Returns:
    [..., H, K] in x's dtype: turned in float32, because bfloat16 cannot hold the angle of a late
    position.
  """
  half = x.shape[-1] // 2
  angle = positions[..., None, None] * theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
